"""Speed of drawing image tokens with a cache, beside transformers' Llama, DALLE-pytorch and the speed of memory.

`python benchmarks/decode.py --num_threads 2` prints a table of ratios, each with its bound. A whole image takes
minutes: timed are a stretch at its start and one at its end. Peers live in `peers.py`, roofs in `roofs.py`.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from peers import build_dalle_pytorch, build_llama, draw_with_dalle_pytorch, draw_with_llama
from roofs import list_products
from timing import (
    Figure,
    add_timing_arguments,
    format_bytes,
    format_figures,
    measure_bandwidth,
    median_ratio,
    set_threads,
    time_in_turns,
)

from hf_dalle import DALLEPipeline, DallePriorConfig, DallePriorForCausalLM
from hf_dalle.cache_dalle import cache_bytes, cache_bytes_read
from hf_dalle.sampling import draw_image_tokens, spawn_generators


CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "emoji-mini"
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "text_length": 256,
    "image_grid_size": 32,
    "text_vocab_size": 16384,
    "image_vocab_size": 8192,
}
QUICK_SIZES = dict(zip(SIZES, (32, 4, 2, 8, 8, 64, 32), strict=True))
PRODUCTS = ("F.linear", "x @ Wt", "oneDNN")
# What starts a drawing from a caption's ids (1 x T), its first image tokens (1 x k) and how many images to draw.
Drawing = Callable[[torch.Tensor, torch.Tensor, int], Iterator]


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--num_tokens", type=int, default=8, help="tokens that each draws in its turn")
    parser.add_argument("--num_images", type=int, nargs="+", default=[1, 4], help="images of one prompt at once")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="a pipeline whose first image is timed")
    add_timing_arguments(parser)
    args = parser.parse_args(args)
    if args.quick:
        vars(args).update(QUICK_SIZES, num_tokens=2, num_rounds=2)
    if count_drawn(args) > args.image_grid_size**2:
        parser.error(f"a stretch of {count_drawn(args)} tokens is longer than the image: fewer rounds or tokens")
    return args


def count_drawn(args: argparse.Namespace) -> int:
    """Tokens of a stretch: the first, which comes from reading what is before it, a warm-up, and the timed rounds."""
    return 1 + (args.num_rounds + 1) * args.num_tokens


def build_priors(args: argparse.Namespace) -> dict[str, DallePriorForCausalLM]:
    """Two layouts with the same random weights, held once: attention to all earlier states, and the paper's."""
    sizes = {name: getattr(args, name) for name in SIZES}
    dense = DallePriorConfig(**sizes, attention_types=["full"] * args.num_hidden_layers)
    priors = {"dense": DallePriorForCausalLM(dense).eval()}
    with torch.device("meta"):
        priors["paper"] = DallePriorForCausalLM(DallePriorConfig(**sizes)).eval()
    priors["paper"].load_state_dict(priors["dense"].state_dict(), assign=True)
    return priors


def build_drawings(priors: dict[str, DallePriorForCausalLM]) -> dict[str, Drawing]:
    """The two layouts and their peers, by name."""
    config = priors["dense"].config
    llama = build_llama(config)

    def draw_with_prior(prior, text_ids, image_tokens, num_images):
        return draw_image_tokens(
            prior,
            text_ids,
            torch.ones_like(text_ids),
            generators=spawn_generators(torch.Generator().manual_seed(0), num_images),
            num_images_per_prompt=num_images,
            image_prefix=image_tokens if image_tokens.shape[1] else None,
        )

    drawings = {name: partial(draw_with_prior, prior) for name, prior in priors.items()}
    drawings["Llama"] = lambda text_ids, image_tokens, num_images: draw_with_llama(
        llama, torch.cat([text_ids, image_tokens + config.image_token_offset], dim=1), num_images
    )
    try:
        peer = build_dalle_pytorch(config)
        drawings["DALLE-pytorch"] = partial(draw_with_dalle_pytorch, peer)
    except (ImportError, ValueError) as error:
        print(f"Left out: {error}\n")
    return drawings


def time_images(
    priors: dict[str, DallePriorForCausalLM], drawings: dict[str, Drawing], num_images: int, args, bandwidth: float
) -> dict[str, dict[str, list[float]]]:
    """
    Seconds a step in each round, by stretch, `"start"` and `"end"`, and by name; in a step each image gets a token.
    `"<layout> cache"` is what reading its cache takes.
    """
    # The one peer that has no images of one prompt reads it once for each: left out where that takes minutes.
    drawings = {name: draw for name, draw in drawings.items() if num_images == 1 or name != "DALLE-pytorch"}
    stretches = {"start": 0, "end": args.image_grid_size**2 - count_drawn(args)}  # the first cell of each
    running = {
        (stretch, name): start_drawing(draw, num_images, first_cell, args)
        for stretch, first_cell in stretches.items()
        for name, draw in drawings.items()
    }
    turns = {key: partial(advance, iterator, args.num_tokens) for key, iterator in running.items()}
    products = list_products(priors["dense"], num_images)
    timed = time_in_turns({**products, **turns}, args.num_rounds)
    for iterator in running.values():
        iterator.close()
    seconds = {}
    for stretch, first_cell in stretches.items():
        seconds[stretch] = {name: timed[name] for name in products}
        for name in drawings:
            seconds[stretch][name] = [value / args.num_tokens for value in timed[stretch, name]]
        for name, prior in priors.items():
            # A cell is drawn from the state before it, which reads itself too.
            states = range(first_cell, first_cell + count_drawn(args) - 1)
            num_bytes = statistics.mean(cache_bytes_read(prior.config, state, 1, num_images) for state in states)
            seconds[stretch][f"{name} cache"] = [num_bytes / bandwidth] * args.num_rounds
    return seconds


def start_drawing(draw: Drawing, num_images: int, first_cell: int, args: argparse.Namespace) -> Iterator:
    """A drawing of random ids that has read all before `first_cell` and drawn that one."""
    text_ids = torch.randint(1, args.text_vocab_size, (1, args.text_length))
    iterator = draw(text_ids, torch.randint(args.image_vocab_size, (1, first_cell)), num_images)
    advance(iterator, 1)
    return iterator


def advance(iterator: Iterator, num_tokens: int) -> None:
    for _ in range(num_tokens):
        next(iterator)


def list_speeds(layout: str, num_images: int, seconds: dict[str, dict[str, list[float]]]) -> list[Figure]:
    """The rows of one layout and number of images."""
    # A step at the start and one at the end, in the same round: twice the mean step of an image.
    whole = {
        name: [sum(pair) for pair in zip(seconds["start"][name], end, strict=True)]
        for name, end in seconds["end"].items()
    }
    middle = {name: statistics.median(values) / 2 for name, values in whole.items()}
    roof, floor = add_cache(whole, layout, PRODUCTS[:2]), add_cache(whole, layout, PRODUCTS)
    parts = ", ".join(f"{name} {1000 * middle[name]:.1f}" for name in (*PRODUCTS, f"{layout} cache"))
    step = " to ".join(f"{1000 * statistics.median(timed[layout]):.1f}" for timed in seconds.values())
    title = f"{layout}, {num_images} image{'s' if num_images > 1 else ''}"
    ratio, bound = (median_ratio(times, roof) for times in (whole[layout], floor))
    goal = 1.10 if num_images == 1 else ""
    figures = [
        Figure(f"{title}: ms a step, start to end", step, bound=f"ms: {parts}"),
        Figure(f"{title}: time / roof", ratio, goal, f"{bound:.2f} for the fastest product and the cache"),
    ]
    for peer in ("Llama", "DALLE-pytorch"):
        if peer in whole:
            ratio, bound = (median_ratio(times, whole[peer]) for times in (whole[layout], floor))
            figures.append(Figure(f"{title}: time / {peer}'s", ratio, 0.75 if peer == "Llama" else "", f"{bound:.2f}"))
    return figures


def add_cache(seconds: dict[str, list[float]], layout: str, products: Sequence[str]) -> list[float]:
    """In each round, the fastest of the products and the reading of a layout's cache."""
    fastest = min(products, key=lambda name: statistics.median(seconds[name]))
    return [sum(pair) for pair in zip(seconds[fastest], seconds[f"{layout} cache"], strict=True)]


def list_paper_figures(
    priors: dict[str, DallePriorForCausalLM], seconds: dict[str, dict[str, list[float]]]
) -> list[Figure]:
    """The rows of the paper's layout: how a step grows within an image, and the bytes of its cache, by formula."""
    start, end = seconds["start"], seconds["end"]
    floor = {stretch: add_cache(timed, "paper", PRODUCTS) for stretch, timed in seconds.items()}
    growth, bound = median_ratio(end["paper"], start["paper"]), median_ratio(floor["end"], floor["start"])
    llama = f"Llama's own {median_ratio(end['Llama'], start['Llama']):.2f}; {bound:.2f} if bound by memory"
    figures = [Figure("paper: last token / first image token", growth, 1.05, llama)]
    for stretch, words in (("start", "first image token"), ("end", "last token")):
        timed = seconds[stretch]
        ratio, bound = (median_ratio(ours, timed["Llama"]) for ours in (timed["paper"], floor[stretch]))
        figures.append(Figure(f"paper, {words}: time / Llama's", ratio, 0.75, f"{bound:.2f}"))
    configs = [priors[name].config for name in ("paper", "dense")]
    states = range(configs[0].num_image_tokens)
    held = [cache_bytes(config) for config in configs]
    read = [[cache_bytes_read(config, state) for state in states] for config in configs]
    for words, (paper, dense), goal in (
        ("cache bytes", held, 0.45),
        ("cache bytes read a token, last state", [part[-1] for part in read], 0.25),
        ("cache bytes read a token, mean", [sum(part) / len(states) for part in read], 0.40),
    ):
        bound = f"exact: {format_bytes(paper)} of {format_bytes(dense)}"
        figures.append(Figure(f"paper: {words} / dense", paper / dense, goal, bound))
    return figures


def time_first_image(checkpoint: str) -> Figure:
    """From a loaded pipeline to its first picture in this process."""
    pipeline = DALLEPipeline.from_pretrained(checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    pipeline("a glossy 3d style emoji of hedgehog", generator=torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - start
    return Figure(f"{Path(checkpoint).name}, loaded: seconds to the first image", seconds, 1.5)


def main(args: list[str] | None = None) -> None:
    """Prints the table; see `--help`."""
    args = parse_arguments(args)
    num_threads = set_threads(args.num_threads)
    figures = []
    if Path(args.checkpoint).is_dir():  # first: later calls of a process are faster
        figures.append(time_first_image(args.checkpoint))
    else:
        print(f"Left out: there is no {args.checkpoint}.\n")
    bandwidth = measure_bandwidth(2**24 if args.quick else 2**29)
    priors = build_priors(args)
    drawings = build_drawings(priors)
    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in SIZES)
    print(f"{sizes}; float32, {num_threads} threads, {bandwidth / 1e9:.1f} GB/s\n")
    for num_images in args.num_images:
        seconds = time_images(priors, drawings, num_images, args, bandwidth)
        for layout in priors:
            figures += list_speeds(layout, num_images, seconds)
        if num_images == args.num_images[0]:
            figures += list_paper_figures(priors, seconds)
    print(format_figures(figures))


if __name__ == "__main__":
    main()
