"""A tiny caption-image set for tests, in memory and on disk.

A picture has a left and a right half, each of one colour, so that its caption tells everything about it.
"""

import io
import itertools
from pathlib import Path

import datasets
from PIL import Image


COLOURS = ("red", "green", "blue", "orange", "white")


def draw_picture(left: str, right: str) -> Image.Image:
    picture = Image.new("RGB", (16, 16), left)
    picture.paste(Image.new("RGB", (8, 16), right), (8, 0))
    return picture


def encode_picture(picture: Image.Image, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format)
    return file.getvalue()


def list_rows() -> list[dict]:
    """All 20 pictures of two colours, each with two captions."""
    return [
        {"image": draw_picture(left, right), "captions": [f"{left} and {right}", f"{right} beside {left}"]}
        for left, right in itertools.permutations(COLOURS, 2)
    ]


def write_parquet(path: Path, rows: list[dict]) -> Path:
    """Rows whose pictures are PIL's, bytes or `None`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [encode_picture(row["image"]) if isinstance(row["image"], Image.Image) else row["image"] for row in rows]
    table = {name: [row[name] for row in rows] for name in rows[0]}
    table["image"] = [None if image is None else {"bytes": image, "path": None} for image in images]
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(path)
    return path
