"""Speed of the dVAE at OpenAI's released shape, beside OpenAI's own code with the same weights.

`python benchmarks/dvae.py --num_threads 2` prints a table of ratios, each with its bound: the time that the model's
convolutions alone take. Without the package `DALL-E` it times the dVAE alone. Peers live in `peers.py`.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from peers import build_openai_dvae
from timing import Figure, add_timing_arguments, format_figures, median_ratio, set_threads, time_in_turns

from hf_dalle import DalleDVAE


TOLERANCE = 1e-4
GOALS = {"encode": 0.92, "decode": 0.85}


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=1, help="pictures at once")
    add_timing_arguments(parser)
    return parser.parse_args(args)


def build_dvae(is_quick: bool) -> DalleDVAE:
    """The released shape with random weights; `is_quick`: its layout with the fewest channels that OpenAI's allows."""
    widths, sizes = (256, 512, 1024, 2048), {}
    if is_quick:
        widths, sizes = (64, 128, 256, 512), {"sample_size": 16, "vocab_size": 512}
    return DalleDVAE(encoder_block_out_channels=widths, decoder_block_out_channels=widths[::-1], **sizes).eval()


def collect_convolutions(dvae: DalleDVAE, call: Callable) -> list[Callable]:
    """The convolutions that `call` makes, each as a function that repeats it on its own input."""
    repeats = []

    def collect(module: torch.nn.Module, inputs: tuple, _) -> None:
        repeats.append(partial(module.forward, *inputs))

    hooks = [part.register_forward_hook(collect) for part in dvae.modules() if isinstance(part, torch.nn.Conv2d)]
    call()
    for hook in hooks:
        hook.remove()
    return repeats


def compare(dvae: DalleDVAE, name: str, ours: Callable, theirs: Callable | None, num_rounds: int) -> list[Figure]:
    """The rows of one direction; `ours` and `theirs` take nothing and give logits or pictures."""
    repeats = collect_convolutions(dvae, ours)
    contenders = {"ours": ours, "convolutions": lambda: [repeat() for repeat in repeats]}
    if theirs is not None:
        contenders["theirs"] = theirs
    seconds = time_in_turns(contenders, num_rounds)
    medians = {contender: f"{statistics.median(values):.3g}" for contender, values in seconds.items()}
    bound = f"{medians['convolutions']} for its convolutions alone"
    figures = [Figure(f"{name}, seconds", medians["ours"], bound=bound)]
    if theirs is not None:
        ratio, bound = (median_ratio(seconds[whose], seconds["theirs"]) for whose in ("ours", "convolutions"))
        difference = (ours() - theirs()).abs().max().item()
        figures.append(Figure(f"{name}, time / OpenAI's", ratio, GOALS[name], f"{bound:.2f}, as above"))
        figures.append(Figure(f"{name}, largest difference", f"{difference:.1e}", f"{TOLERANCE:.0e}"))
    return figures


@torch.no_grad()
def main(args: list[str] | None = None) -> None:
    """Prints the table; see `--help`."""
    args = parse_arguments(args)
    num_threads, dvae = set_threads(args.num_threads), build_dvae(args.quick)
    size, grid_size, vocab_size = dvae.config.sample_size, dvae.image_grid_size, dvae.config.vocab_size
    print(f"{args.batch_size} of {size} x {size}, {vocab_size} codes, float32, {num_threads} threads\n")
    pixels = torch.rand(args.batch_size, 3, size, size)
    tokens = torch.randint(vocab_size, (args.batch_size, grid_size, grid_size))
    encode = decode = None
    try:
        openai_encode, openai_decode = build_openai_dvae(dvae)
        encode, decode = partial(openai_encode, pixels), partial(openai_decode, tokens)
    except ImportError as error:
        print(f"OpenAI's is left out: {error}\n")
    figures = [
        *compare(dvae, "encode", lambda: dvae.encode(pixels).logits, encode, args.num_rounds),
        *compare(dvae, "decode", lambda: dvae.decode(tokens).sample, decode, args.num_rounds),
    ]
    print(format_figures(figures))


if __name__ == "__main__":
    main()
