"""What training takes, known before: bytes that a forward pass keeps, operations of an update, bytes that are sent.

Counted on shapes, by tensors without values; no table, no settings of a run. `training/dry_run.py` and
`benchmarks/memory.py` put these numbers together and print them.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .configuration_dalle_prior import DallePriorConfig
from .image_attention import image_attention_offsets
from .sparse_attention import attend_in_blocks


@contextmanager
def without_values() -> Iterator[None]:
    """Inside, tensors have shapes and no values: a model of any size is built and traced in no memory."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        _forget_constants()


def _forget_constants() -> None:
    """Empties the caches of masks: what a trace puts there has no values."""
    for member in (image_attention_offsets, attend_in_blocks):
        for function in vars(sys.modules[member.__module__]).values():
            getattr(function, "cache_clear", lambda: None)()


def prior_loss_without_values(prior: torch.nn.Module, batch_size: int) -> torch.Tensor:
    """The loss of `batch_size` whole streams; a [`DallePriorForCausalLM`] by itself would look at its labels."""
    config = prior.config
    input_ids = torch.zeros(batch_size, config.stream_length + 1, dtype=torch.long)
    output = prior(input_ids[:, :-1], use_cache=False)
    text_labels = input_ids[:, 1:].clone()[:, : config.text_length]
    image_labels = input_ids[:, 1 + config.text_length :].clone()
    pairs = ((output.text_logits, text_labels), (output.image_logits, image_labels))
    return sum(F.cross_entropy(logits.float().flatten(0, 1), labels.flatten()) for logits, labels in pairs)


# ---------------------------------------------------------------------------------------------------------- bytes


def count_activations(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module], compute_loss: Callable[[], torch.Tensor]
) -> dict[str, int]:
    """
    Bytes of the tensors that a forward pass keeps for the backward one, weights not counted.

    Args:
        model (`torch.nn.Module`): in training mode; of transformers or diffusers. Its checkpointing ends switched on.
        layers (`Iterable[torch.nn.Module]`): the parts that gradient checkpointing computes again.
        compute_loss (`Callable`): the forward pass, of no arguments.

    Returns:
        `dict[str, int]`: `"activations"`, and `"activations, checkpointing"`: what goes into the layers, with all of
        the layer that keeps most, which comes back in the backward pass.
    """
    whole, largest_layer = count_saved_bytes(model, layers, compute_loss)
    enable_checkpointing(model)
    checkpointed, _ = count_saved_bytes(model, layers, compute_loss)
    return {"activations": whole, "activations, checkpointing": checkpointed + largest_layer}


def enable_checkpointing(model: torch.nn.Module) -> None:
    """Switches gradient checkpointing on, as the model's library calls it."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.enable_gradient_checkpointing()


def count_saved_bytes(
    model: torch.nn.Module, layers: Iterable[torch.nn.Module], compute_loss: Callable[[], torch.Tensor]
) -> tuple[int, int]:
    """Bytes kept by all of the forward pass, and by the one of `layers` that keeps most."""
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    saved, by_layer = {}, [0]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that its address is not another's later
        return tensor

    def count() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda *_: by_layer.append(-count())))
        hooks.append(layer.register_forward_hook(lambda *_: by_layer.append(by_layer.pop() + count())))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_loss()
    for hook in hooks:
        hook.remove()
    return count(), max(by_layer)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the state after an update: Muon has one moment, Adam's family two and a counter a tensor."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    if isinstance(optimizer, torch.optim.SGD):
        return 0
    if isinstance(optimizer, torch.optim.Muon):
        return sum(weight.nbytes for weight in weights)
    return sum(2 * weight.nbytes + 4 for weight in weights)


def shard_bytes(tensor: torch.Tensor, num_shards: int) -> int:
    """Of the first process's part under FSDP2, which cuts a tensor along its first dimension; no part is larger."""
    if not tensor.ndim:
        return tensor.nbytes
    rows = -(-tensor.shape[0] // num_shards)
    return tensor.nbytes // max(tensor.shape[0], 1) * rows


# ----------------------------------------------------------------------------------------------------- operations


def count_scores(config: DallePriorConfig) -> int:
    """How many pairs of a state and one that it sees all layers have: what no block edge adds to."""
    text, states = config.text_length, config.num_image_tokens
    total = 0
    for kind in config.attention_types:
        offsets = image_attention_offsets(kind, config.image_grid_size, config.conv_kernel_size)
        total += text * (text + 1) // 2 + text * states + sum(states - offset for offset in offsets)
    return total


def count_flops(config: DallePriorConfig) -> tuple[int, int]:
    """Of a stream's update: what the products with weights need, and what attention needs, two for a multiply-add."""
    width, states = config.hidden_size, config.stream_length
    layer = 4 * width**2 + 2 * width * config.intermediate_size
    heads = config.text_length * config.image_start_token_id + config.num_image_tokens * config.image_vocab_size
    # forward once, backward twice: products with weights; scores and sums over values, their gradients
    return 6 * (config.num_hidden_layers * layer * states + width * heads), 3 * 4 * width * count_scores(config)


def trace_flops(compute: Callable[[], object]) -> int:
    """Of the matrix products and convolutions that `compute` makes, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------- wire


def all_reduce_bytes(num_bytes: int, num_processes: int) -> float:
    """What each of a ring's processes sends (and gets) until all have the sum of `num_bytes` each."""
    return 2 * num_bytes * (num_processes - 1) / num_processes


def all_gather_bytes(num_bytes: int, num_processes: int) -> float:
    """What each of a ring's processes sends until all have the whole of `num_bytes`; to scatter sums costs as much."""
    return num_bytes * (num_processes - 1) / num_processes
