"""Draws the pictures of docs/ from the package itself: masks, layouts, densities, relaxed samples, what a dVAE keeps.

`python docs/figures.py` writes all of them to docs/figures, as `make docs` does; `--only NAME ...` some. It reads
checkpoints/emoji-mini and the pictures beside it.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from PIL import Image

from hf_dalle import DalleDVAE, DalleImageProcessor, DALLEPipeline, DallePriorConfig
from hf_dalle.autoencoder_dalle_dvae import gumbel_softmax
from hf_dalle.image_attention import image_attention_mask, image_attention_offsets, stream_attention_mask
from hf_dalle.logit_laplace import logit_laplace_log_prob, map_pixels


ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "emoji-mini"
COLOURS = {"row": "#4c78a8", "column": "#f58518", "conv": "#54a24b"}
TYPES = ("row", "column", "conv")


def draw_masks() -> Image.Image:
    """Above, masks of the whole stream on the paper's 4 x 4 grid; below, what one state of a 32 x 32 grid sees."""
    figure, axes = pyplot.subplots(2, 3, figsize=(8.4, 5.9), layout="constrained")
    num_text, grid = 6, 4
    for axis, kind in zip(axes[0], TYPES, strict=True):
        mask = stream_attention_mask(kind, num_text, grid, 3).int()
        mask[num_text:, num_text:] *= 2
        axis.imshow(mask.numpy(), cmap=ListedColormap(["white", "#bbbbbb", COLOURS[kind]]), vmin=0, vmax=2)
        axis.set_title(f"{kind}, 4 x 4 grid" + (", 3 x 3 kernel" if kind == "conv" else ""), fontsize=9)
        _set_cells(axis, len(mask))
    axes[0, 0].set_ylabel("state that attends", fontsize=8)
    axes[0, 0].set_xlabel("state attended to: 6 of text, 16 of the picture", fontsize=8)
    grid, query = 32, 16 * 32 + 14
    for axis, kind in zip(axes[1], TYPES, strict=True):
        seen = image_attention_mask(kind, grid, 11)[query].int().reshape(grid, grid)
        seen[query // grid, query % grid] = 2
        axis.imshow(seen.numpy(), cmap=ListedColormap(["white", COLOURS[kind], "black"]), vmin=0, vmax=2)
        num_keys = len(image_attention_offsets(kind, grid, 11))
        axis.set_title(f"{kind}: at most {num_keys} of 1,024 states", fontsize=9)
        _set_cells(axis, grid)
    axes[1, 0].set_ylabel("row of the grid", fontsize=8)
    axes[1, 0].set_xlabel("one state (black) and what it sees", fontsize=8)
    return _render(figure)


def draw_layout() -> Image.Image:
    """The attention type of each layer of the paper's 12 billion parameters."""
    types = DallePriorConfig.from_preset("12b").attention_types
    figure, axis = pyplot.subplots(figsize=(8.4, 1.15), layout="constrained")
    for layer, kind in enumerate(types, start=1):
        axis.bar(layer, 1, width=0.86, color=COLOURS[kind])
    axis.set_xlim(0.3, len(types) + 0.7)
    axis.set_yticks([])
    axis.set_xticks([1, 2, 6, *range(10, len(types), 8), len(types)])
    axis.tick_params(labelsize=8)
    axis.set_xlabel("layer", fontsize=8)
    handles = [Patch(color=COLOURS[kind], label=f"{kind}: {types.count(kind)}") for kind in TYPES]
    axis.legend(handles=handles, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=8, frameon=False)
    for side in ("top", "left", "right"):
        axis.spines[side].set_visible(False)
    return _render(figure)


def draw_temperature() -> Image.Image:
    """One categorical, and relaxed samples of it at falling temperatures: a row a sample, a column a code."""
    probabilities = torch.tensor([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.005])
    logits = probabilities.log().repeat(12, 1)
    figure, axes = pyplot.subplots(1, 5, figsize=(8.4, 2.6), layout="constrained")
    axes[0].bar(range(len(probabilities)), probabilities.tolist(), color=COLOURS["row"])
    axes[0].set_title("q, 8 codes", fontsize=9)
    axes[0].tick_params(labelsize=7)
    for axis, temperature in zip(axes[1:], (1, 1 / 2, 1 / 4, 1 / 16), strict=True):
        samples = gumbel_softmax(logits, temperature, torch.Generator().manual_seed(1))
        axis.imshow(samples.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        name = "1" if temperature == 1 else f"1/{round(1 / temperature)}"
        axis.set_title(rf"$\tau$ = {name}", fontsize=9)
        axis.set_xlabel(f"mean largest: {samples.amax(1).mean():.2f}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    return _render(figure)


def draw_likelihood() -> Image.Image:
    """Densities of the logit-Laplace over pixels, and the normal and Laplace densities that pixel errors stand for."""
    pixels = torch.linspace(-40, 295, 2000, dtype=torch.float64)
    mapped = map_pixels(pixels / 255)
    inside = (mapped > 0) & (mapped < 1)
    mapped = mapped[inside]
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 2.6), layout="constrained", sharey=True)
    for centre, scale, colour in ((128, 0.3, "row"), (128, 0.1, "column"), (250, 0.3, "conv")):
        mu = map_pixels(torch.tensor(centre / 255, dtype=torch.float64)).logit().expand_as(mapped)
        density = logit_laplace_log_prob(mapped, mu, torch.full_like(mu, scale).log()).exp() * 0.8 / 255
        axes[0].plot(pixels[inside], density, color=COLOURS[colour], label=f"shown {centre}, b = {scale}")
    axes[0].set_title("logit-Laplace of mapped pixels", fontsize=9)
    scale = 30.0
    normal = torch.distributions.Normal(250.0, scale).log_prob(pixels).exp()
    laplace = torch.distributions.Laplace(250.0, scale).log_prob(pixels).exp()
    axes[1].plot(pixels, normal, color=COLOURS["row"], label="normal, squared error")
    axes[1].plot(pixels, laplace, color=COLOURS["column"], label="Laplace, absolute error")
    axes[1].set_title("around 250, one scale of 30 for all pixels", fontsize=9)
    for axis in axes:
        axis.axvspan(-40, 0, color="#eeeeee")
        axis.axvspan(255, 295, color="#eeeeee")
        axis.set_xlim(-40, 295)
        axis.set_xlabel("pixel (grey: no such colour)", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("density", fontsize=8)
    return _render(figure)


def draw_reconstructions() -> Image.Image:
    """Pictures, their tokens (a colour a code, near ones alike) and what the decoder makes of the tokens."""
    dvae = DalleDVAE.from_pretrained(CHECKPOINT, subfolder="dvae").eval()
    processor = DalleImageProcessor.from_pretrained(CHECKPOINT, subfolder="image_processor")
    size = processor.size.height
    strip = Image.open(CHECKPOINT / "reconstructions.png").convert("RGB")  # of validation, originals above
    originals = [strip.crop((left, 0, left + size, size)) for left in range(0, 8 * size, size)]
    with torch.no_grad():
        tokens = dvae.encode(processor(originals)["pixel_values"]).tokens
        decoded = processor.postprocess(dvae.decode(tokens).sample, output_type="pil")
    codes = dvae.codebook.codes
    _, _, directions = torch.linalg.svd(codes - codes.mean(0), full_matrices=False)
    hues = (codes - codes.mean(0)) @ directions[:3].T  # K x 3, the first principal components as red, green, blue
    hues = ((hues / hues.std(0)).clamp(-2, 2) + 2) / 4
    cells = (hues[tokens] * 255).round().to(torch.uint8).numpy()  # B x h x w x 3
    grids = [Image.fromarray(grid).resize((size, size), Image.Resampling.NEAREST) for grid in cells]
    return _tile([originals, grids, decoded], gap=4)


def draw_rows() -> Image.Image:
    """A picture while its rows of tokens are drawn."""
    pipe = DALLEPipeline.from_pretrained(CHECKPOINT)
    pipe.set_progress_bar_config(disable=True)
    grid, shown = pipe.dvae.image_grid_size, []

    def keep(pipe, step, cell, tensors):
        if (cell + 1) % (2 * grid) == 0:
            shown.append(pipe.decode_partial(tensors["latents"]))

    prompts = ["a twemoji style emoji of smiling face with sunglasses", "a glossy 3d style emoji of teddy bear"]
    generators = [torch.Generator().manual_seed(0) for _ in prompts]
    pipe(prompts, generator=generators, callback_on_step_end=keep)
    return _tile([[step[row] for step in shown] for row in range(len(prompts))], gap=4)


FIGURES = {
    "masks": draw_masks,
    "layout": draw_layout,
    "temperature": draw_temperature,
    "likelihood": draw_likelihood,
    "reconstructions": draw_reconstructions,
    "rows": draw_rows,
}


def _set_cells(axis, size: int) -> None:
    axis.set_xticks(np.arange(size + 1) - 0.5, [])
    axis.set_yticks(np.arange(size + 1) - 0.5, [])
    axis.tick_params(length=0)
    axis.grid(color="#dddddd", linewidth=0.4)


def _render(figure: pyplot.Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    pyplot.close(figure)
    return Image.open(file).convert("RGB").quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)


def _tile(rows: Sequence[Sequence[Image.Image]], gap: int) -> Image.Image:
    """Pictures of one size, row by row, on white."""
    width, height = rows[0][0].size
    size = (len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            sheet.paste(picture, (left * (width + gap), top * (height + gap)))
    return sheet


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="by default all")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    pyplot.switch_backend("agg")
    for name in args.only:
        FIGURES[name]().save(args.output_dir / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
