"""What can be wrong with pictures, found before anything is measured: broken ones, sizes, transparency, repetitions.

What would mislead whoever reads the figures is refused, what may is said. Pairing with rows is done in `pictures.py`.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from evaluation.frame import Evaluation
from evaluation.models import Model
from hf_dalle.data import open_picture


SHARD_SIZE = 256


def inspect_picture(encoded: Any) -> dict[str, int]:
    """Of one picture, a file's bytes or as the data holds it: sides (0 if it is broken), kind, and a digest."""
    blank = dict.fromkeys(("width", "height", "has_alpha", "is_grey", "is_flat", "digest"), 0)
    try:
        picture = open_picture(encoded)
    except ValueError:
        return blank
    pixels = np.asarray(picture)  # H x W x 3
    extremes = picture.getextrema()
    digest = hashlib.sha256(repr(picture.size).encode() + pixels.tobytes()).digest()
    return {
        "width": picture.width,
        "height": picture.height,
        "has_alpha": int(_has_alpha(encoded)),
        "is_grey": int((pixels == pixels[:, :, :1]).all()),
        "is_flat": int(all(low == high for low, high in extremes)),
        "digest": int.from_bytes(digest[:8], "big", signed=True),
    }


def _has_alpha(encoded: Any) -> bool:
    """Whether anything lies behind the picture that white has been put in the place of."""
    source = (encoded.get("bytes") or encoded.get("path")) if isinstance(encoded, dict) else encoded
    if not isinstance(source, Image.Image):
        source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if not source.has_transparency_data:
        return False
    return source.convert("RGBA").getchannel("A").getextrema()[0] < 255


def inspect_rows(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """What [`inspect_picture`] says of the rows' own pictures; stored. All processes must call it."""
    rows = evaluation.rows
    return _inspect(evaluation, {"of": "rows"}, rows.references, rows.encoded, "real pictures")


def inspect_model(evaluation: Evaluation, model: Model) -> dict[str, np.ndarray]:
    """The same of a model's pictures."""
    paths = model.store.paths
    return _inspect(
        evaluation, {"of": model.key}, range(len(paths)), lambda index: paths[index].read_bytes(), model.name
    )


def _inspect(
    evaluation: Evaluation, key: dict, rows: Sequence[int], read: Callable[[int], Any], whose: str
) -> dict[str, np.ndarray]:
    def inspect(indices: list[int]) -> dict[str, np.ndarray]:
        found = [inspect_picture(read(index)) for index in indices]
        return {name: np.array([one[name] for one in found], dtype=np.int64) for name in found[0]}

    return evaluation.compute("inspection", key, rows, inspect, SHARD_SIZE, f"{whose}: reading")


def sum_up(found: dict[str, np.ndarray], names: Sequence[str], whose: str) -> dict:
    """
    What the report says of a set of pictures.

    Raises:
        ValueError: if pictures cannot be read; `names` say which.
    """
    broken = np.flatnonzero(found["width"] == 0).tolist()
    if broken:
        raise ValueError(
            f"{len(broken)} of {whose} cannot be read, as {names[broken[0]]}: without them figures would be of other"
            " captions. Repair or replace them."
        )
    sizes = Counter(zip(found["width"].tolist(), found["height"].tolist(), strict=True))
    return {
        "num_pictures": len(names),
        "sizes": [[*size, number] for size, number in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))],
        "num_transparent": int(found["has_alpha"].sum()),
        "num_grey": int(found["is_grey"].sum()),
        "num_flat": int(found["is_flat"].sum()),
        "num_repeated": len(names) - len(np.unique(found["digest"])),
    }


def check_model_pictures(summary: dict, name: str, warn: Callable[[str], None]) -> None:
    """
    Judges a model's pictures.

    Raises:
        ValueError: for pictures of several sizes: what is blurred or compared there would be several things at once.
    """
    if len(summary["sizes"]) > 1:
        shown = ", ".join(f"{number} of {width} x {height}" for width, height, number in summary["sizes"][:3])
        raise ValueError(
            f"The pictures of {name} have {len(summary['sizes'])} sizes ({shown}): a model's pictures have one."
            " Blur and distances would mean something else for each; resize them alike first."
        )
    total = summary["num_pictures"]
    if summary["num_transparent"]:
        warn(
            f"{name}: {summary['num_transparent']} of {total} pictures are transparent in places; white is put behind."
        )
    if summary["num_flat"]:
        warn(f"{name}: {summary['num_flat']} of {total} pictures are of one colour alone (a safety checker's?).")
    if summary["num_repeated"]:
        warn(f"{name}: {summary['num_repeated']} of {total} pictures repeat another one of its pictures exactly.")


def describe_sizes(summary: dict) -> str:
    """`96 x 96`, or from the smallest to the largest."""
    sizes = sorted(summary["sizes"], key=lambda size: (size[0] * size[1], size))
    first, last = (f"{width} x {height}" for width, height, _ in (sizes[0], sizes[-1]))
    return first if first == last else f"{first} to {last}"
