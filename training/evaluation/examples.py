"""A page of examples: captions with the real picture and each model's, of rows spread evenly, so that nobody picked.

It is drawn when pictures are; what they are worth is measured elsewhere.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont

from evaluation.frame import Evaluation


NUM_EXAMPLES = 16
CELL = 96  # side of a picture, in pixels
GAP = 6
TEXT_WIDTH = 190
NUM_LINES = 6  # of a caption, at most


def draw_examples(evaluation: Evaluation) -> Image.Image:
    """A line a row, in two columns: its own picture, one of each model, its caption."""
    rows = evaluation.rows
    number = min(NUM_EXAMPLES, len(rows))
    chosen = [place * len(rows) // number for place in range(number)]
    stores = {name: model.store for name, model in evaluation.models.items() if not model.store.missing()}
    lines = [
        ([rows.picture(row), *(store.read(row) for store in stores.values())], rows.captions[row]) for row in chosen
    ]
    heads = ["real", *stores]
    num_columns = 2 if len(heads) <= 4 and number > 1 else 1
    height = -(-number // num_columns)
    width, head = len(heads) * (CELL + GAP) + TEXT_WIDTH, 18
    canvas = Image.new("RGB", (num_columns * width, head + height * (CELL + GAP)), "white")
    pen, small, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=10), ImageFont.load_default(size=12)
    for column in range(num_columns):
        for place, word in enumerate(heads):
            left = column * width + place * (CELL + GAP)
            pen.text((left + 1, 2), word if len(word) <= 17 else f"{word[:16]}…", "black", small)
    for index, (pictures, caption) in enumerate(lines):
        left, top = index // height * width, head + index % height * (CELL + GAP)
        for place, picture in enumerate(pictures):
            canvas.paste(_fit(picture), (left + place * (CELL + GAP), top))
        words = "\n".join(textwrap.wrap(caption, 30)[:NUM_LINES])
        pen.text((left + len(heads) * (CELL + GAP) + 2, top + 2), words, "black", font)
    return canvas


def _fit(picture: Image.Image) -> Image.Image:
    """The centre square, at the side of a cell."""
    side = min(picture.size)
    left, top = ((length - side) / 2 for length in picture.size)
    filtering = Image.Resampling.BICUBIC if side > CELL else Image.Resampling.BOX
    return picture.resize((CELL, CELL), filtering, box=(left, top, left + side, top + side))
