"""Draws a checkpoint's gallery: `python training/draw_gallery.py CONFIG.yaml [--option value ...]`.

Pictures of captions in panels, top rows completed (paper, section 3.3), reconstructions, each a PNG with its captions.
A picture follows from the seed, its caption and its number alone; gallery.json says what was drawn.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from evaluation.pictures import make_generator, read_captions
from PIL import Image, ImageDraw, ImageFont
from report_parts import save_png, spread
from settings_file import parse_settings

from hf_dalle import DALLEPipeline
from hf_dalle.data import load_rows, open_picture
from hf_dalle.sampling import resolve_settings


GAP, FONT_SIZE, LINE_HEIGHT = 4, 12, 15
OWN_PANELS = ("completed", "reconstructions")
GREY = (224, 224, 224)  # where a completed picture's rows are not given


@dataclass
class GalleryArguments:
    """The settings of a gallery."""

    pipeline: str = field(default="", metadata={"help": "A DALLEPipeline's folder, or its repository on the Hub."})
    output_dir: str = field(default="", metadata={"help": "NAME.png of each panel and gallery.json go here."})
    panels: dict = field(
        default_factory=dict, metadata={"help": "By a panel's name the list of its captions, drawn in a row each."}
    )
    num_images: int = field(default=6, metadata={"help": "Pictures a caption."})
    num_columns: int = field(default=1, metadata={"help": "Captions side by side in a panel."})
    generation: dict = field(default_factory=dict, metadata={"help": "Arguments of the drawing, as guidance_scale."})
    seed: int = 0
    scale: int = field(default=1, metadata={"help": "Each pixel is shown as a square of so many."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of rows to complete and to reconstruct."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of a folder."})
    split: str = "validation"
    image_column: str = "image"
    caption_column: str = field(default="captions", metadata={"help": "Strings, or lists, of which the first counts."})
    num_completed: int = field(default=0, metadata={"help": "Rows, evenly over the split, whose top is completed."})
    num_prefix_rows: int | None = field(default=None, metadata={"help": "Rows of tokens of it that are kept."})
    num_reconstructed: int = field(default=0, metadata={"help": "Rows, evenly over the split, through the dVAE."})

    def __post_init__(self):
        for name in ("pipeline", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing.")
        for name, lowest in (("num_images", 1), ("num_columns", 1), ("scale", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from {lowest}.")
        for name, captions in self.panels.items():
            if not re.fullmatch(r"[a-z0-9_]+", str(name)) or name in OWN_PANELS:
                raise ValueError(
                    f"`panels` has {name!r}, which names a file: small letters, digits and _, not {OWN_PANELS}."
                )
            if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
                raise ValueError(f"`panels`, {name} is {captions!r}; expected a list of captions.")
        needs_data = self.num_completed > 0 or self.num_reconstructed > 0
        if needs_data and (self.data_dir is None) == (self.dataset_name is None):
            raise ValueError("`num_completed` and `num_reconstructed` need one of `data_dir` and `dataset_name`.")
        if not needs_data and not self.panels:
            raise ValueError("There is nothing to draw: `panels` is empty, and no row is completed or reconstructed.")
        if (self.num_completed > 0) != (self.num_prefix_rows is not None):
            raise ValueError("`num_completed` and `num_prefix_rows` belong together.")


@dataclass
class Block:
    """Pictures of one size in rows, with the words that stand under them."""

    rows: list[list[Image.Image]]
    words: str


def main(argv: list[str]) -> None:
    args = parse_settings(argv, GalleryArguments, "draw_gallery.py")
    pipe = DALLEPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    settings = resolve_settings(pipe.prior.generation_config, **args.generation)
    rows = open_rows(args, max(args.num_completed, args.num_reconstructed))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    panels = {name: draw_captions(args, pipe, captions) for name, captions in args.panels.items()}
    if args.num_completed:
        panels["completed"] = complete(args, pipe, spread_rows(rows, args.num_completed))
    if args.num_reconstructed:
        panels["reconstructions"] = reconstruct(pipe, spread_rows(rows, args.num_reconstructed))
    for name, blocks in panels.items():
        num_columns = len(blocks) if name == "reconstructions" else args.num_columns
        save_png(compose(blocks, num_columns, args.scale), folder / f"{name}.png")
    about = {**asdict(args), "generation": settings}
    about["captions"] = {name: [block.words for block in blocks] for name, blocks in panels.items()}
    (folder / "gallery.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"Written to {folder}: {', '.join(f'{name}.png' for name in panels)}.")


def open_rows(args: GalleryArguments, num_rows: int) -> list[tuple[Image.Image, str]]:
    """`num_rows` of the split with a caption, evenly over it: each a picture and its first caption."""
    if not num_rows:
        return []
    data = load_rows(args.data_dir, args.dataset_name, args.split, args.image_column)
    for column in (args.image_column, args.caption_column):
        if column not in data.column_names:
            raise ValueError(f"Split {args.split!r} has no column {column!r}; it has {sorted(data.column_names)}.")
    captions = read_captions(data, args.caption_column)
    kept = [row for row, texts in enumerate(captions) if texts]
    if not kept:
        raise ValueError(f"Split {args.split!r} has no caption in column {args.caption_column!r}.")
    chosen = [kept[place] for place in spread(len(kept), num_rows)]
    return [(open_picture(data[row][args.image_column]), captions[row][0]) for row in chosen]


def spread_rows(rows: list, num_rows: int) -> list:
    return [rows[place] for place in spread(len(rows), num_rows)]


def make_generators(args: GalleryArguments, caption: str) -> list[torch.Generator]:
    """One a picture, of seed, caption and number."""
    return [make_generator(args.seed, caption, number) for number in range(args.num_images)]


def draw(args: GalleryArguments, pipe: DALLEPipeline, caption: str, **kwargs) -> list[Image.Image]:
    """The pictures of a caption, in the order of their numbers."""
    given = {**args.generation, **kwargs, "num_images_per_prompt": args.num_images}
    return pipe(caption, generator=make_generators(args, caption), **given).images


def draw_captions(args: GalleryArguments, pipe: DALLEPipeline, captions: Sequence[str]) -> list[Block]:
    """A row of pictures for each caption."""
    return [Block([draw(args, pipe, caption)], caption) for caption in captions]


def complete(args: GalleryArguments, pipe: DALLEPipeline, rows: list[tuple[Image.Image, str]]) -> list[Block]:
    """For each row its picture, what of it is kept, and pictures that go on from there."""
    blocks = []
    for picture, caption in rows:
        (whole,) = to_size(pipe, [picture])
        kept = Image.new("RGB", whole.size, GREY)
        height = whole.height * args.num_prefix_rows // pipe.dvae.image_grid_size
        kept.paste(whole.crop((0, 0, whole.width, height)), (0, 0))
        drawn = draw(args, pipe, caption, image=picture, num_prefix_rows=args.num_prefix_rows)
        blocks.append(Block([[whole, kept, *drawn]], caption))
    return blocks


@torch.no_grad()
def reconstruct(pipe: DALLEPipeline, rows: list[tuple[Image.Image, str]]) -> list[Block]:
    """For each row its picture, and below it what the dVAE makes of its tokens."""
    blocks = []
    for picture, caption in rows:
        pixel_values = pipe.image_processor.preprocess(picture)["pixel_values"]
        tokens = pipe.dvae.encode(pixel_values.to(pipe.device, pipe.dvae.dtype)).tokens
        decoded = pipe.image_processor.postprocess(pipe.decode_tokens(tokens.flatten(1)), output_type="pil")
        blocks.append(Block([to_size(pipe, [picture]), decoded], caption))
    return blocks


def to_size(pipe: DALLEPipeline, pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures as the dVAE gets them."""
    pixel_values = pipe.image_processor.preprocess(pictures)["pixel_values"]
    return pipe.image_processor.postprocess(pixel_values, output_type="pil")


# ------------------------------------------------------------------------------------------------------------- layout


def compose(blocks: Sequence[Block], num_columns: int, scale: int = 1) -> Image.Image:
    """Blocks row by row on white, each with its words under its pictures, wrapped to their width."""
    font = ImageFont.load_default(size=FONT_SIZE)
    side = blocks[0].rows[0][0].width * scale + GAP
    width = side * max(len(row) for block in blocks for row in block.rows)
    lines = [wrap(block.words, font, width - GAP) for block in blocks]
    num_columns = min(num_columns, len(blocks))
    lefts, tops, bottom = [], [], GAP
    for first in range(0, len(blocks), num_columns):
        members = range(first, min(first + num_columns, len(blocks)))
        lefts += [GAP + (member - first) * (width + GAP) for member in members]
        tops += [bottom] * len(members)
        bottom += max(len(blocks[member].rows) * side + len(lines[member]) * LINE_HEIGHT for member in members) + GAP
    canvas = Image.new("RGB", (GAP + num_columns * (width + GAP), bottom), "white")
    pen = ImageDraw.Draw(canvas)
    for block, words, left, top in zip(blocks, lines, lefts, tops, strict=True):
        for row, pictures in enumerate(block.rows):
            for column, picture in enumerate(pictures):
                # not resized but repeated: what is shown is what was drawn
                enlarged = Image.fromarray(np.asarray(picture.convert("RGB")).repeat(scale, 0).repeat(scale, 1))
                canvas.paste(enlarged, (left + column * side, top + row * side))
        for number, line in enumerate(words):
            pen.text((left, top + len(block.rows) * side + number * LINE_HEIGHT), line, "black", font)
    return canvas


def wrap(words: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines that are at most so many pixels wide, but for a word that is wider by itself."""
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"draw_gallery.py: {error}")
