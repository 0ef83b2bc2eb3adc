"""The console script `hf-dalle`: `hf-dalle draw "a caption"` writes pictures to files, `hf-dalle demo` opens a page.

Reads arguments, names files; the drawing itself is [`DALLEPipeline`]'s, the page `gradio_app.py`'s.
"""

import argparse
import dataclasses
import importlib.util
import math
import secrets
import sys
from pathlib import Path

import torch
from PIL import Image

from .drawing_service import DrawingService, Limits
from .pipeline_dalle import DALLEPipeline
from .provenance import Provenance, describe_drawing, save_png
from .safety_checker import OpenNSFWChecker


DEFAULT_CHECKPOINT = Path("checkpoints/emoji-mini")


def main(argv: list[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        argv (`list[str]`, *optional*): the arguments, by default those of the process.

    Returns:
        `int`: the exit code, 0, or 2 after an error that is the user's to mend: one line on stderr.
    """
    arguments = _build_parser().parse_args(argv)
    try:
        arguments.command(arguments)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"hf-dalle: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def draw(arguments: argparse.Namespace) -> None:
    """Draws pictures of one caption and writes them to a grid or to a folder of single files."""
    checkpoint = _find_checkpoint(arguments.checkpoint)
    output = Path(arguments.output or ("dalle" if arguments.no_grid else "dalle.png"))
    if not arguments.no_grid and output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output {output} names no picture; end it in .png, or add --no_grid for a folder")
    seed = secrets.randbelow(2**31) if arguments.seed is None else arguments.seed
    if not 0 <= seed < 2**63:
        raise ValueError(f"--seed {seed} is not in [0, 2**63)")
    image = Image.open(arguments.image) if arguments.image is not None else None
    pipeline = _load_pipeline(checkpoint, arguments)
    call = {
        "negative_prompt": arguments.negative_prompt,
        "image": image,
        "num_prefix_rows": arguments.num_prefix_rows,
        "num_images_per_prompt": arguments.num_images,
        "num_candidates": arguments.num_candidates,
        "guidance_scale": arguments.guidance_scale,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
    }
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(arguments.prompt, **call, generator=generator, max_batch_size=arguments.max_batch_size).images
    provenance = None
    if not arguments.no_metadata:
        provenance = describe_drawing(pipeline, arguments.prompt, seed, index=None, **call)
    write_images(images, output, not arguments.no_grid, provenance)
    best = f", the best of {arguments.num_candidates}" if arguments.num_candidates is not None else ""
    print(f"{len(images)} of {arguments.prompt!r}{best}, seed {seed}: {output.resolve()}")


def write_images(images: list[Image.Image], output: Path, as_grid: bool, provenance: Provenance | None) -> None:
    """Writes a grid, or a folder of single files; PNG files say in their text what they were drawn from."""
    if not as_grid:
        output.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images):
            own = None if provenance is None else dataclasses.replace(provenance, index=index)
            save_png(image, output / f"{index:03}.png", own)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix.lower() == ".png":
        save_png(make_grid(images), output, provenance)
    else:
        make_grid(images).save(output)


def make_grid(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, as near to a square as they go, row by row, on white."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid


def demo(arguments: argparse.Namespace) -> None:
    """Opens a page that draws what its visitors ask for, until it is interrupted."""
    if not importlib.util.find_spec("gradio"):
        raise OSError("the page needs gradio: pip install 'hf-dalle[demo]'")
    limits = Limits(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Limits)})
    checkpoint = _find_checkpoint(arguments.checkpoint)
    pipeline = _load_pipeline(checkpoint, arguments)
    from .gradio_app import launch

    service = DrawingService(pipeline, limits, use_provenance=not arguments.no_metadata)
    launch(service, checkpoint, arguments.host, arguments.port, arguments.share)


def _find_checkpoint(name: str | None) -> str | Path:
    if name is None and not DEFAULT_CHECKPOINT.is_dir():
        usage = "hf-dalle draw --checkpoint NAME, hf-dalle demo NAME"
        raise ValueError(f"there is no {DEFAULT_CHECKPOINT} here; name a folder or a Hub repository: {usage}")
    return name or DEFAULT_CHECKPOINT


def _load_pipeline(checkpoint: str | Path, arguments: argparse.Namespace) -> DALLEPipeline:
    given = {"dtype": getattr(torch, arguments.dtype)}
    if arguments.safety_threshold is not None:
        given["safety_checker"] = OpenNSFWChecker(arguments.safety_threshold)
    device = _find_device(arguments.device)
    return DALLEPipeline.from_pretrained(checkpoint, **given).to(device)


def _find_device(name: str | None) -> str:
    if name is None:
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return next(device for device, is_available in available.items() if is_available)
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return name


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-dalle", description="DALL-E: pictures from captions.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_draw(commands.add_parser("draw", help="draw pictures of a caption"))
    _add_demo(commands.add_parser("demo", help="open a page that draws, in the browser"))
    for command in commands.choices.values():
        add = command.add_argument
        add("--no_metadata", action="store_true", help="leave prompt, seed and settings out of the text of PNG files")
        words = "act on pictures that open_nsfw scores so high, as 0.8: draw blackens them, demo leaves them out"
        add("--safety_threshold", type=float, help=f"{words} (default: no check)")
        add("--device", help="cpu, cuda, mps, ... (default: the fastest here)")
        add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the weights")
    return parser


def _add_draw(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=draw)
    add = command.add_argument
    add("prompt", help="the caption")
    add("--checkpoint", help=f"folder or Hub repository of a DALLEPipeline (default: {DEFAULT_CHECKPOINT}, if here)")
    add("--num_images", type=int, default=4, help="how many pictures (default: 4)")
    add("--num_candidates", type=int, help="how many are drawn, of which the reranker chooses the best (default: all)")
    add("--max_batch_size", type=int, help="how many are drawn at once (default: as many as fit into free memory)")
    add("--seed", type=int, help="the same seed draws the same pictures (default: a new one each time)")
    add("--output", help="file of the grid (default: dalle.png), or with --no_grid a folder (default: dalle)")
    add("--no_grid", action="store_true", help="write each picture to a file of its own")
    add("--negative_prompt", help="what guidance leads away from")
    add("--image", help="a picture whose top rows are kept")
    add("--num_prefix_rows", type=int, help="how many rows of tokens of --image are kept")
    own = "(default: the checkpoint's own)"
    add("--guidance_scale", type=float, help=f"1 is none, above 1 the caption counts for more {own}")
    add("--temperature", type=float, help=f"below 1 the likely tokens count for more {own}")
    add("--top_k", type=int, help=f"draw among the k likeliest tokens, 0 is all {own}")
    add("--top_p", type=float, help=f"draw among the likeliest tokens that have this probability together {own}")


def _add_demo(command: argparse.ArgumentParser) -> None:
    command.set_defaults(command=demo)
    limits = Limits()
    add = command.add_argument
    words = "folder or Hub repository of a DALLEPipeline"
    add("checkpoint", nargs="?", help=f"{words} (default: {DEFAULT_CHECKPOINT}, if here)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    add("--port", type=int, help="(default: the first that is free from 7860 on)")
    add("--share", action="store_true", help="ask Gradio's servers for a public address")
    add("--max_images", type=int, default=limits.max_images, help="pictures of a drawing (%(default)s)")
    add("--max_candidates", type=int, default=limits.max_candidates, help="for the reranker (%(default)s)")
    add("--max_prompt_length", type=int, default=limits.max_prompt_length, help="characters (%(default)s)")
    add("--max_waiting", type=int, default=limits.max_waiting, help="drawings in the queue (%(default)s)")
    words = "drawings a minute from one address (%(default)s)"
    add("--max_per_minute", type=int, default=limits.max_per_minute, help=words)
