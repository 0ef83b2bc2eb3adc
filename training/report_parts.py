"""What reports are put together from: tables in Markdown, grids of pictures with words, PNG files that are small.

Which figures and pictures a report has is said where they are: `report.py`, `evaluation/`, `draw_gallery.py`,
`dvae_study_page.py`.
"""

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


MAX_BYTES = 300_000  # of a PNG file; above it is written in fewer colours


def make_table(head: list[str], rows: list[list]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def spread(length: int, number: int) -> list[int]:
    """`number` places evenly over `length`, from the first on: rows that nobody picked."""
    number = min(length, number)
    return [index * length // number for index in range(number)]


def save_png(image: Image.Image, path: Path) -> None:
    """With all colours, or with as many of a palette as fit in `MAX_BYTES`, but 32 whatever their size."""
    image.save(path, optimize=True)
    for num_colours in (256, 128, 64, 32):
        if path.stat().st_size <= MAX_BYTES:
            return
        image.quantize(num_colours, dither=Image.Dither.NONE).save(path, optimize=True)


def draw_entries(
    entries: list[tuple[list[Image.Image], str]], heads: list[str], num_columns: int, cell: int = 64
) -> Image.Image:
    """Rows of pictures, of each the centre square at a side of `cell`, with words beside them, column by column."""
    text_width, gap, head = 170, 4, 16
    font = ImageFont.load_default(size=12)
    height = -(-len(entries) // num_columns)
    width = len(heads) * (cell + gap) + text_width
    canvas = Image.new("RGB", (num_columns * width, head + height * (cell + gap)), "white")
    pen = ImageDraw.Draw(canvas)
    for column in range(-(-len(entries) // height)):
        for place, word in enumerate(heads):
            left = column * width + place * (cell + gap)
            pen.text((left + 1, 1), word, "black", ImageFont.load_default(size=9))
    for index, (pictures, words) in enumerate(entries):
        left, top = index // height * width, head + index % height * (cell + gap)
        for place, picture in enumerate(pictures):
            side = min(picture.size)
            x, y = ((length - side) / 2 for length in picture.size)
            square = picture.convert("RGB").resize((cell, cell), Image.Resampling.BOX, (x, y, x + side, y + side))
            canvas.paste(square, (left + place * (cell + gap), top))
        words = "\n".join(textwrap.wrap(words, 26)[: cell // 16])
        pen.text((left + len(heads) * (cell + gap) + 2, top + 2), words, "black", font)
    return canvas
