"""A training step of the prior against a dense GPT2's, and sparse attention against dense over grids.

    python benchmarks/train_step.py                        # the figures, some minutes on two cores
    python benchmarks/train_step.py --plot train_step.png  # cost over four grids, too

A step is forward, backward and AdamW in float32 on random weights and ids, one stream a batch. Dense is our own model
with every layer full and `is_causal=True`. What is timed is the model's; how, lives in `timing.py`.
"""

import argparse
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from timing import Figure, add_timing_arguments, format_figures, median_ratio, set_threads, time_in_turns
from transformers import GPT2Config, GPT2LMHeadModel

from hf_dalle import DallePriorConfig, DallePriorForCausalLM
from hf_dalle.configuration_dalle_prior import paper_attention_types
from hf_dalle.sparse_attention import attend_in_blocks
from hf_dalle.training_cost import count_flops, count_scores


GPT2, DENSE, SPARSE = "GPT2, sdpa", "dense", "paper layout"
PEER_GRID, LARGE_GRID = 32, 64  # where the figures to reach are
PLOT_GRIDS = (16, 32, 48, 64)


def build_config(args: argparse.Namespace, grid_size: int, name: str = SPARSE) -> DallePriorConfig:
    """The prior's sizes, the default vocabularies; with [`DENSE`] every layer is full."""
    return DallePriorConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        text_length=args.text_length,
        image_grid_size=grid_size,
        attention_types=["full"] * args.num_hidden_layers if name == DENSE else None,
    )


def build_step(args: argparse.Namespace, grid_size: int, name: str) -> Callable[[], float]:
    """A function that takes one optimiser step of a contender and gives its loss."""
    config = build_config(args, grid_size, name)
    generator = torch.Generator().manual_seed(0)
    text_ids = torch.randint(config.text_vocab_size, (1, config.text_length), generator=generator)
    image_tokens = torch.randint(config.image_vocab_size, (1, config.num_image_tokens), generator=generator)
    if name == GPT2:
        sizes = {"n_embd": args.hidden_size, "n_layer": args.num_hidden_layers, "n_head": args.num_attention_heads}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.stream_length,
                bos_token_id=config.image_start_token_id,
                eos_token_id=None,
                attn_implementation="sdpa",
                **sizes,
                **no_dropout,
            )
        )
        model.loss_type = "ForCausalLM"  # what it computes anyway, with a warning
        ids = torch.cat([text_ids, image_tokens + config.image_token_offset], dim=1)
    else:
        model = DallePriorForCausalLM(config)
        model.set_attn_implementation("sdpa")
        ids = model.join_stream(text_ids, None, image_tokens)["input_ids"]
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, weight_decay=0.01, fused=True)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def build_attention(args: argparse.Namespace, grid_size: int, name: str) -> Callable[[], None]:
    """A function that runs the attention of all layers forward and backward, without their projections."""
    config = build_config(args, grid_size, name)
    shape = (1, config.stream_length, config.num_attention_heads, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(0)
    # B x states x heads x head width in memory, as projections give them
    states = [torch.randn(shape, generator=generator).transpose(1, 2).requires_grad_() for _ in range(3)]
    grad = torch.randn(shape, generator=generator).transpose(1, 2)

    def attend():
        for kind in config.attention_types:
            sizes = (config.text_length, config.image_grid_size, config.conv_kernel_size)
            torch.autograd.grad(attend_in_blocks(*states, kind, *sizes), states, grad)

    return attend


# -------------------------------------------------------------------------------------------------------- bounds


def measure_product_speed(args: argparse.Namespace, grid_size: int, num_rounds: int = 5) -> float:
    """FLOP/s of the widest product of a layer, forward, through the layer's own linear map."""
    config = build_config(args, grid_size)
    linear = DallePriorForCausalLM(config).model.layers[0].mlp.fc1
    states = torch.randn(config.stream_length, config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seconds = time_in_turns({"product": lambda: linear(states)}, num_rounds)["product"]
    return 2 * config.stream_length * linear.weight.numel() / min(seconds)


def describe_bound(args: argparse.Namespace, grid_size: int) -> str:
    products, attention = count_flops(build_config(args, grid_size))
    speed = measure_product_speed(args, grid_size)
    return (
        f"{products / 1e9:.0f} GFLOP of products and {attention / 1e9:.0f} of attention at the {speed / 1e9:.0f} "
        f"GFLOP/s of a layer's widest product: {(products + attention) / speed:.2f} s"
    )


# ---------------------------------------------------------------------------------------------------- measurements


def measure_peak_memory(args: argparse.Namespace, name: str) -> int:
    """Peak resident bytes of a process of its own that takes two steps, without those it had before its model."""
    sizes = [f"--{key}={getattr(args, key)}" for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    command = [sys.executable, __file__, *sizes, f"--text_length={args.text_length}", f"--peak_memory_of={name}"]
    if args.num_threads is not None:
        command.append(f"--num_threads={args.num_threads}")
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(args: argparse.Namespace):
    before = read_peak_memory()
    step = build_step(args, PEER_GRID, args.peak_memory_of)
    for _ in range(2):
        step()
    print(read_peak_memory() - before)


def read_peak_memory() -> int:
    """Peak resident bytes of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose getrusage counts the process that this one was started from
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def time_steps(args: argparse.Namespace, grid_size: int, names: tuple[str, ...]) -> dict[str, list[float]]:
    return time_in_turns({name: build_step(args, grid_size, name) for name in names}, args.num_rounds)


def time_attention(args: argparse.Namespace, grid_size: int) -> dict[str, list[float]]:
    return time_in_turns({name: build_attention(args, grid_size, name) for name in (DENSE, SPARSE)}, args.num_rounds)


def compare_with_peer(args: argparse.Namespace, grid_size: int) -> list[Figure]:
    seconds = time_steps(args, grid_size, (GPT2, SPARSE))
    ratio = median_ratio(seconds[SPARSE], seconds[GPT2])
    states = args.text_length + grid_size**2
    names = f"{states:,} states, seconds a step / {GPT2}'s {median(seconds[GPT2]):.2f} s"
    figures = [Figure(names, ratio, 0.70, describe_bound(args, grid_size))]
    if not args.quick:
        peaks = {name: measure_peak_memory(args, name) for name in (GPT2, SPARSE)}
        words = f"{states:,} states, peak memory / {GPT2}'s {peaks[GPT2] / 1e9:.2f} GB"
        bound = "weights, gradients, AdamW, logits, activations"
        figures.append(Figure(words, peaks[SPARSE] / peaks[GPT2], 1.0, bound))
    return figures


def compare_with_dense(args: argparse.Namespace, grid_size: int, seconds: dict[str, dict]) -> list[Figure]:
    """The whole step's and attention's, as speed-ups: at least so much is to be reached on the large grid."""
    steps, attention = seconds["step"], seconds["attention"]
    scores = [count_scores(build_config(args, grid_size, name)) for name in (DENSE, SPARSE)]
    share = median(attention[DENSE]) / median(steps[DENSE])
    place = f"{grid_size} x {grid_size} grid,"
    allowed = f"{scores[0] / scores[1]:.1f} times the scores"
    return [
        Figure(
            f"{place} dense step's {median(steps[DENSE]):.2f} s / ours",
            median_ratio(steps[DENSE], steps[SPARSE]),
            ">= 1.5" if grid_size == LARGE_GRID else "",
            f"attention is {share:.0%} of the dense step: without any {1 / (1 - share):.2f}",
        ),
        Figure(
            f"{place} dense attention's {median(attention[DENSE]):.2f} s / ours",
            median_ratio(attention[DENSE], attention[SPARSE]),
            ">= 4" if grid_size == LARGE_GRID else "",
            allowed,
        ),
    ]


def draw_plot(path: Path, seconds: dict[int, dict[str, dict[str, list[float]]]]):
    """Seconds over image states, dense and sparse: the whole step, and attention alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, part, title in zip(axes, ("step", "attention"), ("whole step", "attention alone"), strict=True):
        for name, style in ((DENSE, "o--"), (SPARSE, "o-")):
            axis.plot([grid**2 for grid in seconds], [median(seconds[grid][part][name]) for grid in seconds], style)
            last = median(seconds[max(seconds)][part][name])
            axis.annotate(name, (max(seconds) ** 2, last), (-6, 6), textcoords="offset points", ha="right")
        axis.set_xticks([grid**2 for grid in seconds], [f"{grid} x {grid}" for grid in seconds])
        axis.set(title=title, xlabel="grid of image tokens", ylabel="seconds", ylim=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_timing_arguments(parser)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_hidden_layers", type=int, default=8)
    parser.add_argument("--num_attention_heads", type=int, default=8)
    parser.add_argument("--text_length", type=int, default=256)
    parser.add_argument("--grids", type=int, nargs="*", help=f"where ours meets dense; by default {LARGE_GRID}")
    parser.add_argument("--plot", type=Path, help=f"a picture to write, of the grids {PLOT_GRIDS} by default")
    parser.add_argument("--no_peer", action="store_true", help="without GPT2")
    parser.add_argument("--peak_memory_of", choices=(GPT2, DENSE, SPARSE), help=argparse.SUPPRESS)
    args = parser.parse_args(args)
    if args.quick:
        args.hidden_size, args.num_hidden_layers, args.num_attention_heads, args.text_length = 32, 4, 2, 16
        args.num_rounds = min(args.num_rounds, 2)
    args.peer_grid = 8 if args.quick else PEER_GRID
    if args.grids is None:
        args.grids = [8, 16] if args.quick else list(PLOT_GRIDS) if args.plot else [LARGE_GRID]
    return args


def main(args: list[str] | None = None):
    args = parse_arguments(args)
    num_threads = set_threads(args.num_threads)
    if args.peak_memory_of is not None:
        print_peak_memory(args)
        return
    layout = ", ".join(dict.fromkeys(paper_attention_types(args.num_hidden_layers)))
    print(
        f"Width {args.hidden_size}, {args.num_hidden_layers} layers ({layout}), {args.num_attention_heads} heads, "
        f"{args.text_length} text states, float32, batch 1, {num_threads} threads, {args.num_rounds} rounds\n"
    )
    figures = [] if args.no_peer else compare_with_peer(args, args.peer_grid)
    seconds = {}
    for grid in args.grids:
        attention = time_attention(args, grid)
        seconds[grid] = {"step": time_steps(args, grid, (DENSE, SPARSE)), "attention": attention}
        figures += compare_with_dense(args, grid, seconds[grid])
    print(format_figures(figures))
    if args.plot and seconds:
        draw_plot(args.plot, seconds)
        print(f"\n{args.plot}: the cost over grids")


if __name__ == "__main__":
    main()
