"""What a run needs to know of its processes: a launch that is not what was asked for, PowerSGD, a sharded model.

How Accelerate is told of machines is in accelerate/*.yaml; the order of a run lives in `loop.py`.
"""

import copy
import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from arguments import PriorArguments, TrainArguments
from diffusers.training_utils import EMAModel
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_dalle.power_sgd import PowerSGD, choose_rank, list_compressible


def check_launch(accelerator: Accelerator, args: TrainArguments) -> None:
    """
    Compares what the launcher was asked for, by its environment variables, with what Accelerate made of it: where
    these differ it says nothing, and one process trains alone, a whole model on each, or in another precision.

    Raises:
        ValueError: where they differ, or where the run's settings do not go with FSDP or DeepSpeed.
    """
    num_asked = int(os.environ.get("WORLD_SIZE") or 1)
    # Without a world size Accelerate's launcher started one process; it gives addresses where more were asked for.
    is_alone = "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys()
    if accelerator.num_processes < num_asked or (is_alone and accelerator.num_processes == 1):
        raise ValueError(
            f"The launcher was asked for {'several processes' if is_alone else f'{num_asked} processes'}, but only"
            f" {accelerator.num_processes} takes part: on CPUs `accelerate launch` starts one, so use `torchrun"
            " --nproc_per_node N training/train.py ...`. If one is meant, unset MASTER_ADDR, MASTER_PORT, WORLD_SIZE."
        )
    kind = accelerator.distributed_type
    for name, asked in (("FSDP", DistributedType.FSDP), ("DEEPSPEED", DistributedType.DEEPSPEED)):
        if _is_true(f"ACCELERATE_USE_{name}") and kind != asked:
            raise ValueError(
                f"The launcher was asked for {name}, but Accelerate gives {kind.value} on {accelerator.device.type}:"
                " each process would hold a whole model. Leave it out of Accelerate's config, or use GPUs."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", args.mixed_precision):
        raise ValueError(
            f"The launcher was asked for mixed precision {precision}, but `mixed_precision` is {args.mixed_precision}"
            " in the settings, which decide: change it there."
        )
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin, args)
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config, args)


def _is_true(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _check_fsdp(plugin, args: TrainArguments) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError("FSDP 1 is not supported: set `fsdp_version: 2` in Accelerate's config.")
    if not plugin.cpu_ram_efficient_loading:
        raise ValueError("Each process would start from other weights: set `fsdp_cpu_ram_efficient_loading: true`.")
    if not isinstance(args, PriorArguments):
        raise ValueError("FSDP is for the prior: other models fit a GPU, use accelerate/one_node_ddp.yaml.")
    if args.lora_rank is not None or args.optimizer != "adamw":
        raise ValueError(
            "FSDP goes with `optimizer: adamw` and without `lora_rank`: use accelerate/one_node_ddp.yaml."
        )


def _check_deepspeed(config: dict, args: TrainArguments) -> None:
    clipping = config.get("gradient_clipping")
    if clipping not in ("auto", args.max_grad_norm) and (clipping or args.max_grad_norm):
        raise ValueError(
            f"DeepSpeed clips gradients at {clipping}, but `max_grad_norm` is {args.max_grad_norm}: write the same"
            " into `gradient_clipping` of Accelerate's config."
        )
    faults = {
        "ZeRO stage 3": config.get("zero_optimization", {}).get("stage") == 3,
        "`gradient_accumulation_steps` above 1": args.gradient_accumulation_steps > 1,
        "`mixed_precision: fp16`": args.mixed_precision == "fp16",
        "`optimizer: muon`": getattr(args, "optimizer", "adamw") != "adamw",
        "`use_ema: true` in bf16, whose weights are too coarse for it": args.use_ema
        and args.mixed_precision == "bf16",
    }
    wrong = [words for words, is_wrong in faults.items() if is_wrong]
    if wrong:
        raise ValueError(f"With DeepSpeed this does not go: {', '.join(wrong)}. FSDP2 takes it.")


def make_power_sgd(args: TrainArguments, model: torch.nn.Module, scaler) -> PowerSGD | None:
    """
    Registers PowerSGD on the prepared `model` where `power_sgd_rank` asks for it.

    Raises:
        ValueError: if the model is not under DDP, or the rank leaves nothing to compress.
    """
    rank = getattr(args, "power_sgd_rank", None)
    if rank is None:
        return None
    prior = getattr(model, "module", model)
    rank = rank or choose_rank(prior.config.hidden_size)
    parameters = list_compressible(prior, rank)
    hook = PowerSGD(parameters, rank, seed=args.seed, scale_of=scaler.scale_of)
    hook.register(model)
    if not parameters:
        raise ValueError(f"`power_sgd_rank` {rank} leaves no matrix of the prior smaller: lower it, or leave it out.")
    return hook


# ------------------------------------------------------------------------------------------------ a sharded model


def use_autocast(accelerator: Accelerator, model: torch.nn.Module) -> None:
    """
    Has a model that FSDP is to shard compute in `mixed_precision` as under DDP, by autocast. Accelerate would have
    FSDP cast everything instead: gains, embeddings, the residual stream, gradients to be averaged, the loss.
    """
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.native_amp:
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
        dtype = {"bf16": torch.bfloat16}[accelerator.mixed_precision]  # float16 is `gradient_scaling`'s
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether a forward pass takes all processes at once."""
    return isinstance(model, FSDPModule)


def gather_model(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module | None:
    """
    The model as a user loads it. One that FSDP shards is gathered, which all processes must ask for: a plain copy in
    the main process's memory, not its GPU's; `None` on the others.
    """
    model = accelerator.unwrap_model(model)
    if not is_sharded(model):
        return model
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    kind = next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))
    with torch.device("meta"):
        whole = kind(copy.deepcopy(model.config))
    whole.set_attn_implementation(model.config._attn_implementation)
    whole.generation_config = copy.deepcopy(model.generation_config)
    whole.load_state_dict(weights, assign=True)
    return whole.train(model.training)


class ShardedEMA(EMAModel):
    """The moving average of weights that FSDP may shard: each process averages its shards, checkpoints hold wholes."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], **kwargs):
        self._parameters = list(parameters)
        super().__init__(_list_shards(self._parameters), **kwargs)

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().step(_list_shards(parameters))

    def store(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().store(_list_shards(parameters))

    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().copy_to(_list_shards(parameters))

    def restore(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        super().restore(_list_shards(parameters))

    def state_dict(self) -> dict:
        """Of wholes on the main process; all processes must call it."""
        state, wholes = super().state_dict(), []
        for shard, parameter in zip(state["shadow_params"], self._parameters, strict=True):
            if isinstance(parameter, DTensor):
                layout = {"device_mesh": parameter.device_mesh, "placements": parameter.placements}
                sizes = {"shape": parameter.shape, "stride": parameter.stride()}
                whole = DTensor.from_local(shard, **layout, **sizes, run_check=False).full_tensor()
                shard = whole.cpu() if torch.distributed.get_rank() == 0 else shard.new_empty(0)
            wholes.append(shard)
        return {**state, "shadow_params": wholes}

    def load_state_dict(self, state: dict) -> None:
        """Takes this process's shards of the wholes."""
        wholes = zip(state["shadow_params"], self._parameters, strict=True)
        super().load_state_dict({**state, "shadow_params": [_take_shard(whole, own) for whole, own in wholes]})


def _list_shards(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    # Looked up anew each time: FSDP may move its shards.
    return [
        torch.nn.Parameter(parameter.detach().to_local(), requires_grad=parameter.requires_grad)
        if isinstance(parameter, DTensor)
        else parameter
        for parameter in parameters
    ]


def _take_shard(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    if whole.shape != parameter.shape:
        raise ValueError(
            f"The average has a weight of {tuple(whole.shape)}, the model one of {tuple(parameter.shape)}."
        )
    whole = whole.to(parameter.device)
    # Every process has read the whole, so none sends it.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
