"""Bytes that training and drawing with a prior of any size take, known before: `python benchmarks/memory.py 12b`.

Nothing of that size is allocated: the model is built and traced with tensors that have a shape and no values. A second
table holds the same rows at a small size beside what a real update and a real drawing there take.
"""

import argparse
import contextlib
from pathlib import Path

import torch
from timing import format_bytes, format_table
from transformers import AutoModelForCausalLM

from hf_dalle import DallePriorConfig, DallePriorForCausalLM
from hf_dalle.cache_dalle import DalleCache, cache_bytes
from hf_dalle.training_cost import count_activations, optimizer_bytes, prior_loss_without_values, without_values


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = ("adamw", "muon", "sgd")


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a preset (12b, 1.2b, emoji-mini), a config.json, or a folder that has one")
    parser.add_argument("--batch_size", type=int, default=1, help="pictures an update, or an accumulated part of one")
    parser.add_argument("--num_images", type=int, default=1, help="images of one prompt that are drawn at once")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="autocast in training")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="muon: for the layers' matrices only")
    parser.add_argument("--attn_implementation", choices=["sdpa", "eager"], default="sdpa")
    args = parser.parse_args(args)
    if args.batch_size < 1 or args.num_images < 1:
        parser.error("--batch_size and --num_images start at 1.")
    return args


def load_config(name: str) -> DallePriorConfig:
    """A preset by its name, else a config.json by its path or its folder's; of a pipeline's folder, the prior's."""
    path = Path(name)
    if not path.exists():
        return DallePriorConfig.from_preset(name)
    return DallePriorConfig.from_pretrained(path / "prior" if (path / "prior").is_dir() else path)


def shrink_config(config: DallePriorConfig) -> DallePriorConfig:
    """A small config with the kinds of layers of `config`, to measure with."""
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "text_vocab_size": 300, "text_length": 16}
    attention_types = [*dict.fromkeys(config.attention_types), config.attention_types[0]]
    sizes |= {"image_vocab_size": 64, "image_grid_size": 16, "num_hidden_layers": len(attention_types)}
    return DallePriorConfig(
        **{**config.to_dict(), **sizes, "intermediate_size": None, "attention_types": attention_types}
    )


def build_prior(config: DallePriorConfig, args: argparse.Namespace) -> DallePriorForCausalLM:
    """On the device and with the kind of tensors of the context."""
    options = {"dtype": DTYPES[args.dtype], "attn_implementation": args.attn_implementation}
    return AutoModelForCausalLM.from_config(config, **options).train()


# ------------------------------------------------------------------------------------------------------ by formula


def predict_bytes(config: DallePriorConfig, args: argparse.Namespace) -> dict[str, int]:
    """Bytes by what holds them, without allocating them."""
    with torch.device("meta"):
        prior = build_prior(config, args)
    weights = sum(weight.nbytes for weight in prior.parameters())
    return {
        "weights": weights,
        "gradients": weights,
        "optimizer": sum(map(optimizer_bytes, make_optimizers(prior, args.optimizer))),
        **count_prior_activations(config, args, is_real=False),
        "cache": cache_bytes(config, 1, args.num_images, DTYPES[args.dtype]),
    }


def make_optimizers(prior: DallePriorForCausalLM, kind: str) -> list[torch.optim.Optimizer]:
    """One for all weights, or Muon for the layers' matrices and AdamW for the rest."""
    if kind == "sgd":
        return [torch.optim.SGD(prior.parameters())]
    groups = {True: [], False: []}
    for name, weight in prior.named_parameters():
        groups[kind == "muon" and weight.ndim == 2 and ".layers." in name].append(weight)
    return [torch.optim.AdamW(groups[False]), *([torch.optim.Muon(groups[True])] if groups[True] else [])]


def count_prior_activations(config: DallePriorConfig, args: argparse.Namespace, is_real: bool) -> dict[str, int]:
    """Bytes that a forward pass keeps for the backward one, by [`count_activations`]; `is_real`: of real tensors."""
    with contextlib.nullcontext() if is_real else without_values():
        prior = build_prior(config, args)

        def forward() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                return compute_loss(prior, args.batch_size, is_real)

        return count_activations(prior, prior.model.layers, forward)


def compute_loss(prior: DallePriorForCausalLM, batch_size: int, is_real: bool) -> torch.Tensor:
    """The loss of whole streams."""
    if not is_real:
        return prior_loss_without_values(prior, batch_size)
    config = prior.config
    input_ids = torch.zeros(batch_size, config.stream_length + 1, dtype=torch.long)
    input_ids[:, config.text_length :] = config.image_token_offset
    return prior(input_ids, labels=input_ids).loss


# ------------------------------------------------------------------------------------------------------ by measuring


def measure_bytes(config: DallePriorConfig, args: argparse.Namespace) -> dict[str, int]:
    """The same as [`predict_bytes`], of the tensors of a real update and a real drawing."""
    prior = build_prior(config, args)
    activations = count_prior_activations(config, args, is_real=True)
    optimizers = make_optimizers(prior, args.optimizer)
    compute_loss(prior, args.batch_size, is_real=True).backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    cache = DalleCache(config, args.num_images)
    with torch.no_grad():
        prior.eval()(torch.zeros(1, config.text_length, dtype=torch.long), past_key_values=cache, use_cache=True)
    return {
        "weights": sum(weight.nbytes for weight in prior.parameters()),
        "gradients": sum(weight.grad.nbytes for weight in prior.parameters()),
        "optimizer": sum(part.nbytes for state in states for part in state.values() if torch.is_tensor(part)),
        **activations,
        "cache": cache.nbytes,
    }


def add_sums(num_bytes: dict[str, int]) -> dict[str, int]:
    """With what training and drawing take together, but for buffers of single operations."""
    held = num_bytes["weights"] + num_bytes["gradients"] + num_bytes["optimizer"]
    return {
        **num_bytes,
        "training": held + num_bytes["activations"],
        "training, checkpointing": held + num_bytes["activations, checkpointing"],
        "drawing": num_bytes["weights"] + num_bytes["cache"],
    }


def main(args: list[str] | None = None) -> None:
    """Prints both tables; see `--help`."""
    args = parse_arguments(args)
    config = load_config(args.config)
    print(
        f"{args.config}: batch {args.batch_size}, {args.dtype}, mixed precision {args.mixed_precision},"
        f" {args.optimizer}, {args.attn_implementation}; cache of {args.num_images} a prompt\n"
    )
    rows = add_sums(predict_bytes(config, args)).items()
    print(format_table(("what", "bytes"), [(name, format_bytes(number)) for name, number in rows]))
    small = shrink_config(config)
    measured = measure_bytes(small, args)
    rows = [(name, f"{value:,}", f"{measured[name]:,}") for name, value in predict_bytes(small, args).items()]
    print(f"\nAt width {small.hidden_size}, {small.num_hidden_layers} layers, {small.stream_length} states:\n")
    print(format_table(("what", "by formula", "measured"), rows))


if __name__ == "__main__":
    main()
