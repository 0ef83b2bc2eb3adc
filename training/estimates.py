"""What a run would take, by formula: parameters, memory a device, bytes that machines exchange, disk, data, time.

The model of a run's settings is built and traced without values; the counting lives in `hf_dalle.training_cost`. What
is printed of it, and which machines are meant, is `dry_run.py`'s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from arguments import DVAEArguments, PriorArguments, RerankerArguments, TrainArguments
from finetune_prior import add_adapter
from optimizers import make_gradient_scaler, make_optimizers, split_matrices
from train_reranker import make_config, make_model
from transformers import AutoTokenizer

from hf_dalle import DalleDVAE, DallePriorConfig, DallePriorForCausalLM
from hf_dalle.data import load_rows
from hf_dalle.losses import contrastive_loss, dvae_loss, pixel_loss
from hf_dalle.power_sgd import choose_rank, count_bytes, list_compressible
from hf_dalle.training_cost import (
    all_gather_bytes,
    all_reduce_bytes,
    count_activations,
    count_flops,
    count_saved_bytes,
    optimizer_bytes,
    prior_loss_without_values,
    shard_bytes,
    trace_flops,
    without_values,
)


BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}  # of a weight, `weights_dtype`


@dataclass
class Machines:
    """
    The processes of a run, one a device.

    Args:
        num_processes (`int`): of all machines.
        gpus_per_node (`int`): of one machine.
        sharding (`str`): "ddp" (a copy a process), "fsdp2" (shards over all processes), or "hsdp" (shards over the
            processes of a machine, a copy a machine).
        pictures_per_second (`float`, *optional*): of a process, as a run of this model showed.
        device_tflops (`float`, *optional*): 1e12 operations a second that a device reaches in training, where no rate
            is known.
    """

    num_processes: int = 1
    gpus_per_node: int = 8
    sharding: str = "ddp"
    pictures_per_second: float | None = None
    device_tflops: float | None = None

    @property
    def num_machines(self) -> int:
        return math.ceil(self.num_processes / self.gpus_per_node)

    @property
    def num_shards(self) -> int:
        """How many processes hold one copy of the weights together."""
        return {"ddp": 1, "fsdp2": self.num_processes, "hsdp": min(self.gpus_per_node, self.num_processes)}[
            self.sharding
        ]


@dataclass
class Traced:
    """A model without values, what it keeps and what it computes, for `train_batch_size` pictures."""

    model: torch.nn.Module
    activations: int
    flops: int
    tokens: dict[str, int]  # of a picture
    groups: list[dict] = field(default_factory=list)
    frozen: dict[str, int] = field(default_factory=dict)  # bytes of models that only look on
    notes: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------- the model


def trace(args: TrainArguments) -> Traced:
    """
    Builds the model of a run and takes its loss, all without values.

    Raises:
        ValueError: for settings that make no model.
    """
    stages = {DVAEArguments: _trace_dvae, PriorArguments: _trace_prior, RerankerArguments: _trace_reranker}
    return stages[type(args)](args)


def _count(args: TrainArguments, model: torch.nn.Module, layers: list, compute_loss: Callable) -> int:
    if args.mixed_precision == "fp16":
        make_gradient_scaler(args, model)  # whose hooks choose what is computed in float16

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            return compute_loss()

    if getattr(args, "gradient_checkpointing", False):
        return count_activations(model, layers, forward)["activations, checkpointing"]
    return count_saved_bytes(model, layers, forward)[0]


def _trace_dvae(args: DVAEArguments) -> Traced:
    with without_values():
        model = build_dvae(args.model).train()
        config = model.config
        pixels = torch.rand(args.train_batch_size, 3, config.sample_size, config.sample_size)

        def compute_loss() -> torch.Tensor:
            output = model(pixels.contiguous(memory_format=torch.channels_last), args.temperature_start)
            choices = (config.logit_laplace_eps, config.quantizer, args.min_log_b)
            parts = dvae_loss(pixels, output.mu, output.log_b, output.logits, args.kl_weight, *choices)
            if args.pixel_l1_weight == args.pixel_l2_weight == 0:
                return parts.loss + output.commitment_loss
            return pixel_loss(pixels, output.sample, args.pixel_l1_weight, args.pixel_l2_weight) + parts.kl

        activations = _count(args, model, [*model.encoder.groups, *model.decoder.groups], compute_loss)
        with torch.no_grad():
            flops = 3 * trace_flops(lambda: model(pixels)) // args.train_batch_size
        encoder, decoder = list(model.encoder.parameters()), list(model.decoder.parameters())
    groups = [{"params": decoder}, {"params": encoder, "lr": args.learning_rate}]
    return Traced(model, activations, flops, {"image": model.image_grid_size**2}, groups)


def build_dvae(sizes: dict) -> DalleDVAE:
    try:
        return DalleDVAE(**sizes)
    except TypeError as error:
        raise ValueError(f"`model` does not fit: {error}.") from error


def read_sizes(folder: str | Path) -> dict:
    """Of a saved dVAE, as [`build_dvae`] takes them."""
    return {name: value for name, value in DalleDVAE.load_config(folder).items() if not name.startswith("_")}


def _trace_prior(args: PriorArguments) -> Traced:
    config, dvae_config, notes = find_config(args)
    with without_values():
        model = _build_prior(config, args).train()
        model.set_attn_implementation(args.attn_implementation)
        layers = list(model.model.layers)
        activations = _count(args, model, layers, lambda: prior_loss_without_values(model, args.train_batch_size))
        activations += 4  # the share of captions kept, which the text loss is multiplied by
        groups = split_matrices(model, is_muon=args.optimizer == "muon")
        dvae = build_dvae(dvae_config) if dvae_config is not None else None
        frozen, flops = {}, sum(count_flops(config))
        if dvae is not None:
            frozen["dVAE"] = sum(weight.nbytes for weight in (*dvae.parameters(), *dvae.buffers()))
            if args.tokens_column is None:
                size = dvae.config.sample_size
                with torch.no_grad():
                    flops += trace_flops(lambda: dvae._encode(torch.rand(1, 3, size, size)))
    if args.tokens_column is None:
        notes.append("The dVAE encodes each batch; what that needs for a moment is not counted.")
    tokens = {"text": config.text_length, "image": config.num_image_tokens}
    return Traced(model, activations, flops, tokens, groups, frozen, notes)


def _trace_reranker(args: RerankerArguments) -> Traced:
    notes, dvae, image_size = [], None, None
    if args.dvae is not None and Path(args.dvae, "config.json").is_file():
        with without_values():
            dvae = build_dvae(read_sizes(args.dvae))
        image_size = dvae.config.sample_size
    elif args.dvae is not None:
        notes.append(
            f"There is no dVAE in {args.dvae} yet: pictures are of `model`'s size, and none is reconstructed."
        )
    if not Path(args.tokenizer, "tokenizer.json").is_file():
        raise ValueError(f"There is no tokenizer in {args.tokenizer} yet, which says how many embeddings there are.")
    config = make_config(args.model, AutoTokenizer.from_pretrained(args.tokenizer), image_size)
    size, text_length = config.vision_config.image_size, config.text_config.max_position_embeddings
    with without_values():
        model = make_model(config).train()
        pixels = torch.rand(args.train_batch_size, 3, size, size)
        ids = torch.full((args.train_batch_size, text_length), config.text_config.eos_token_id)

        def compute_loss() -> torch.Tensor:
            output = model(pixel_values=pixels, input_ids=ids)
            groups = torch.arange(args.train_batch_size)
            return contrastive_loss(
                output.image_embeds.float(), output.text_embeds.float(), model.logit_scale.exp(), groups
            )

        activations, frozen = _count(args, model, [], compute_loss), {}  # no layer is ever computed again
        with torch.no_grad():
            flops = 3 * trace_flops(lambda: model(pixel_values=pixels[:1], input_ids=ids[:1]))
        if dvae is not None:
            frozen["dVAE"] = sum(weight.nbytes for weight in (*dvae.parameters(), *dvae.buffers()))
            with torch.no_grad():
                flops += int(args.reconstruction_share * trace_flops(lambda: dvae(pixels[:1])))
            notes.append("What the dVAE needs for a moment to reconstruct pictures is not counted.")
    groups = [{"params": list(model.parameters())}]
    return Traced(model, activations, flops, {"text": text_length}, groups, frozen, notes)


def _build_prior(config: DallePriorConfig, args: PriorArguments) -> DallePriorForCausalLM:
    with torch.device(
        "meta"
    ):  # an adapter's layers are moved once they are made, which tensors without values are not
        model = DallePriorForCausalLM(config)
        if args.lora_rank is not None:
            add_adapter(model, args)
    made = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:  # tied weights stay one
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                made[id(weight)] = weight, torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
            module._parameters[name] = made[id(weight)][1]
    return model


def find_config(args: PriorArguments) -> tuple[DallePriorConfig, dict | None, list[str]]:
    """
    The prior's sizes, from what is there: the checkpoint to start from, the tokenizer, the dVAE. Where one is not
    there yet, the sizes of `model` or the paper's stand in for it, with a note.
    """
    notes, fixed, dvae = [], {"caption_dropout": args.caption_dropout}, None
    start = Path(args.init_from) if args.init_from else None
    is_pipeline = start is not None and (start / "model_index.json").is_file()
    dvae_folder, tokenizer_folder = args.dvae, args.tokenizer
    if is_pipeline:
        dvae_folder, tokenizer_folder = dvae_folder or start / "dvae", tokenizer_folder or start / "tokenizer"
    if Path(dvae_folder, "config.json").is_file():
        dvae = read_sizes(dvae_folder)
        with without_values():
            built = build_dvae(dvae)
        fixed |= {"image_vocab_size": built.config.vocab_size, "image_grid_size": built.image_grid_size}
    else:
        notes.append(f"There is no dVAE in {dvae_folder} yet: its sizes are `model`'s, or else the paper's.")
        if not {"image_vocab_size", "image_grid_size"} & args.model.keys():
            dvae = {}
    if Path(tokenizer_folder, "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        fixed |= {"text_vocab_size": len(tokenizer), "text_length": tokenizer.model_max_length}
    else:
        notes.append(f"There is no tokenizer in {tokenizer_folder} yet: its sizes are `model`'s, or else the paper's.")
    if start is not None:
        folder = {"subfolder": "prior"} if is_pipeline or not start.is_dir() else {}
        fixed = DallePriorConfig.from_pretrained(args.init_from, **folder).to_dict()
    return DallePriorConfig(**{**fixed, **args.model} if start else {**args.model, **fixed}), dvae, notes


# --------------------------------------------------------------------------------------------------- the estimates


def estimate(args: TrainArguments, machines: Machines) -> dict[str, dict]:
    """
    Every number that is printed, by table and row: bytes, counts, seconds.

    Raises:
        ValueError: for settings that do not fit each other.
    """
    is_prior = isinstance(args, PriorArguments)
    if machines.sharding != "ddp" and not (is_prior and args.lora_rank is None and args.optimizer == "adamw"):
        raise ValueError("Shards are for a prior with `optimizer: adamw` and without `lora_rank`: `--sharding ddp`.")
    traced = trace(args)
    trained = [weight for weight in traced.model.parameters() if weight.requires_grad]
    with without_values():
        optimizers = make_optimizers(args, traced.groups)
    state = sum(optimizer_bytes(optimizer) for optimizer in optimizers)
    ema = sum(weight.nbytes for weight in trained) if args.use_ema else 0
    weights = sum(tensor.nbytes for tensor in (*traced.model.parameters(), *traced.model.buffers()))
    num_pictures = args.train_batch_size * args.gradient_accumulation_steps * machines.num_processes
    compressed = _count_power_sgd(args, traced.model)
    parameters = {"parameters": sum(weight.numel() for weight in traced.model.parameters())}
    parameters["of these trained"] = sum(weight.numel() for weight in trained)
    memory = _count_memory(args, machines, traced, {"optimizer": state, "EMA": ema, **compressed})
    disk = weights + state + ema + compressed.get("PowerSGD's errors", 0) * (1 + machines.num_processes)
    num_kept = "all" if args.checkpoints_total_limit is None else args.checkpoints_total_limit
    finished = sum(weight.numel() for weight in traced.model.parameters()) * BYTES[args.weights_dtype]
    return {
        "model": parameters,
        "memory a device, bytes": {**memory, "sum": sum(memory.values())},
        "an update": {
            "pictures": num_pictures,
            **{f"{kind} tokens": num_pictures * number for kind, number in traced.tokens.items()},
            "operations": traced.flops * num_pictures * (4 / 3 if getattr(args, "gradient_checkpointing", 0) else 1),
        },
        "bytes an update": _count_traffic(args, machines, traced.model, trained),
        "disk, bytes": {"a checkpoint": disk, "checkpoints kept": num_kept, "finished model": finished},
        "data": _look_at_data(args, num_pictures),
        "time": _count_time(args, machines, traced.flops, num_pictures),
        "notes": dict(enumerate(traced.notes)),
    }


def _count_power_sgd(args: TrainArguments, model: torch.nn.Module) -> dict[str, int]:
    """Of a process, float32: an error for each number that is compressed, and a fixed Q a matrix."""
    rank = power_sgd_rank(args, model)
    if rank is None:
        return {}
    shapes = [matrix.shape for matrix in list_compressible(model, rank).values()]
    return {
        "PowerSGD's errors": 4 * sum(math.prod(shape) for shape in shapes),
        "PowerSGD's Q": 4 * sum(max(shape) * rank for shape in shapes),
    }


def power_sgd_rank(args: TrainArguments, model: torch.nn.Module) -> int | None:
    """The rank of a run; 0 stands for the paper's at this width."""
    rank = getattr(args, "power_sgd_rank", None)
    return choose_rank(model.config.hidden_size) if rank == 0 else rank


def _count_memory(args: TrainArguments, machines: Machines, traced: Traced, states: dict[str, int]) -> dict[str, int]:
    """Bytes of a device that last over the update, and those that its forward pass keeps."""
    weights, cut = list(traced.model.parameters()), machines.num_shards
    trained = [weight for weight in weights if weight.requires_grad]
    share = sum(shard_bytes(weight, cut) for weight in trained) / sum(weight.nbytes for weight in trained)
    buffers = sum(buffer.nbytes for buffer in traced.model.buffers())  # which are never cut
    memory = {
        "weights": sum(shard_bytes(weight, cut) for weight in weights) + buffers,
        "gradients": sum(shard_bytes(weight, cut) for weight in trained),
        **{name: math.ceil(number * share) for name, number in states.items() if number},
        "activations": traced.activations,
        **traced.frozen,
    }
    if machines.sharding == "ddp" and machines.num_processes > 1:
        memory["buckets of gradients to send"] = memory["gradients"]
    elif cut > 1:
        memory["gathered weights and gradients"] = _count_gathered(args, traced.model)
    return memory


def _split_layers(model: torch.nn.Module) -> tuple[list[list], list]:
    """The weights of each layer that FSDP2 gathers by itself, and those of no layer."""
    kinds = model._no_split_modules
    layers = [list(module.parameters()) for module in model.modules() if type(module).__name__ in kinds]
    inside = {id(weight) for layer in layers for weight in layer}
    return layers, [weight for weight in model.parameters() if id(weight) not in inside]


def _count_gathered(args: TrainArguments, model: torch.nn.Module) -> int:
    """What FSDP2 has whole at a time: two layers, the next being fetched, one's gradients, and what is in no layer."""
    layers, rest = _split_layers(model)
    numbers = [sum(weight.numel() for weight in layer) for layer in layers]
    others = sum(weight.numel() for weight in rest)
    largest = 3 * max(numbers) + 2 * others
    if args.gradient_accumulation_steps > 1:  # gradients stay whole until the last part of the batch
        largest += sum(numbers) - max(numbers)
    return largest * 4


def _count_traffic(args: TrainArguments, machines: Machines, model: torch.nn.Module, trained: list) -> dict:
    """What rings move an update, out of a process and out of a machine to others; as much comes in."""
    count, per_machine = machines.num_processes, min(machines.gpus_per_node, machines.num_processes)
    if machines.sharding == "ddp":
        sent = all_reduce_bytes(count_bytes(model, power_sgd_rank(args, model)), count)
        # A ring through all processes enters and leaves each machine once.
        return {"a process sends": sent, "a machine sends to others": sent if machines.num_machines > 1 else 0}
    if getattr(args, "power_sgd_rank", None) is not None:
        raise ValueError("`power_sgd_rank` goes with `--sharding ddp` only: PowerSGD is a hook of DDP.")
    cut = machines.num_shards
    layers, rest = (
        sum(shard_bytes(weight, cut) for weight in weights) * cut
        for weights in ([weight for layer in _split_layers(model)[0] for weight in layer], _split_layers(model)[1])
    )
    # Layers are gathered for the forward pass and again for the backward one, the others stay; sums come once.
    gathered = args.gradient_accumulation_steps * (2 * layers + rest)
    sent = all_gather_bytes(gathered, cut) + all_gather_bytes(layers + rest, cut)
    if machines.sharding == "fsdp2":
        return {"a process sends": sent, "a machine sends to others": sent if machines.num_machines > 1 else 0}
    shard = all_reduce_bytes((layers + rest) / cut, machines.num_machines)
    return {"a process sends": sent + shard, "a machine sends to others": shard * per_machine}


def _look_at_data(args: TrainArguments, num_pictures: int) -> dict:
    if args.dataset_name is not None:
        return {args.dataset_name: "of the Hub, which is not asked"}
    try:
        found = _count_rows(args)
    except OSError as error:
        return {args.train_data_dir: f"not found ({str(error)[:160]})"}
    if isinstance(found, str):
        return {args.train_data_dir: found}
    seen = num_pictures * args.max_train_steps
    return {"rows found": found, "pictures seen": seen, "times over the data": seen / max(found, 1)}


def _count_rows(args: TrainArguments) -> int | str:
    """Rows; of parquet as the files say, since `datasets` would convert them all to count."""
    folder = Path(args.train_data_dir)
    files = [*folder.glob(f"{args.train_split}.parquet"), *folder.glob(f"{args.train_split}-*.parquet")]
    if files:
        return sum(pq.read_metadata(path).num_rows for path in files)
    rows = load_rows(args.train_data_dir, None, args.train_split, args.image_column, args.streaming)
    return f"{rows.num_shards} shards, read in sequence" if args.streaming else len(rows)


def _count_time(args: TrainArguments, machines: Machines, flops: int, num_pictures: int) -> dict:
    if machines.pictures_per_second is not None:
        seconds = num_pictures / (machines.num_processes * machines.pictures_per_second)
    elif machines.device_tflops is not None:
        seconds = num_pictures * flops / (machines.num_processes * machines.device_tflops * 1e12)
    else:
        return {}
    return {"seconds an update": seconds, "hours in all": seconds * args.max_train_steps / 3600}
