"""Draws the pictures of an emoji set: Iconify's icons (SVG bodies with aliases) and WebP files, as RGB on white.

Where the packages come from lives in `emoji_sets.py`.
"""

import importlib.util
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from emoji_sets import Concept, EmojiSet, normalize_hexcode
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm


# Duplicates are told at one size, so that every size has the same pictures.
DUPLICATES_SIZE = 128


def check_drawing(size: int) -> None:
    """
    Raises:
        ValueError: For a size in pixels that no picture has.
        OSError: resvg-py is missing.
    """
    if size < 1:
        raise ValueError(f"size is the pictures' side in pixels and must be at least 1, got {size}")
    if importlib.util.find_spec("resvg_py") is None:
        raise OSError("resvg-py, which draws the SVG pictures, is missing: `pip install resvg-py`")


def read_drawings(
    emoji_set: EmojiSet, files: dict[str, bytes], icons: dict[str, str] | None = None
) -> dict[str, Callable[[int], Image.Image]]:
    """Finds one set's pictures in its package: Iconify's icons.json and chars.json, or assets/<hexcode>.webp.

    Args:
        emoji_set: Named where there is none.
        files: The package's, by path.
        icons: Icons by hexcode, where the set's chars.json is empty.

    Returns:
        By normalized hexcode, a function that draws the picture (RGB) at a given side in pixels.
    """
    drawings: dict[str, Callable[[int], Image.Image]] = {}
    if "icons.json" in files:
        icon_set = json.loads(files["icons.json"])
        names = json.loads(files["chars.json"]) if icons is None else icons
        for hexcode, name in sorted(names.items()):
            icon = resolve_icon(icon_set, name)
            drawings.setdefault(normalize_hexcode(hexcode), lambda size, icon=icon: draw_icon(icon, size))
    else:
        for path in sorted(path for path in files if path.endswith(".webp")):
            data = files[path]
            drawings.setdefault(normalize_hexcode(Path(path).stem), lambda size, data=data: draw_webp(data, size))
    if not drawings:
        raise ValueError(f"{emoji_set.package} {emoji_set.version} holds neither Iconify's json nor webp pictures")
    return drawings


def resolve_icon(icon_set: dict, name: str) -> dict:
    """Follows Iconify's aliases to one icon with body, left, top, width, height, hFlip, vFlip and rotate.

    As Iconify defines it, an alias adds its flips and quarter turns to its parent's; other keys replace the parent's.
    """
    chain = []
    while name not in icon_set["icons"]:
        alias = icon_set.get("aliases", {}).get(name)
        if alias is None or alias in chain:
            raise ValueError(f"the icon set {icon_set['prefix']} has no icon behind the name {name!r}")
        chain.append(alias)
        name = alias["parent"]
    icon = {"left": 0, "top": 0, "width": 16, "height": 16, "hFlip": False, "vFlip": False, "rotate": 0}
    icon |= {key: icon_set[key] for key in ("left", "top", "width", "height") if key in icon_set}
    icon |= icon_set["icons"][name]
    for alias in reversed(chain):
        flips = {key: icon[key] != alias.get(key, False) for key in ("hFlip", "vFlip")}
        icon = icon | alias | flips | {"rotate": (icon["rotate"] + alias.get("rotate", 0)) % 4}
    return icon


def draw_icon(icon: dict, size: int) -> Image.Image:
    """Draws a resolved icon on a white square, whole and centred; reads no fonts of the machine."""
    import resvg_py

    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{size}" height="{size}" viewBox="{icon["left"]} {icon["top"]} {icon["width"]} {icon["height"]}">'
        f"{icon['body']}</svg>"
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGB")
    # On a centred square, turning the pixels is turning the drawing.
    if icon["hFlip"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if icon["vFlip"]:
        image = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    clockwise = (None, Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90)
    turn = clockwise[icon["rotate"] % 4]
    return image if turn is None else image.transpose(turn)


def draw_webp(data: bytes, size: int) -> Image.Image:
    """Decodes a WebP and pastes it on a white square, whole and centred."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2), mask=image)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def draw_pictures(
    style: str, drawings: dict[str, Callable[[int], Image.Image]], concepts: Iterable[Concept], size: int
) -> dict[str, bytes]:
    """PNG bytes by hexcode of the concepts that a set has; of equal pictures the first in Unicode's order stays."""
    pictures: dict[str, bytes] = {}
    seen: set[bytes] = set()
    found = [concept for concept in concepts if normalize_hexcode(concept.hexcode) in drawings]
    for concept in tqdm(found, desc=f"{style:>11}", unit="picture", mininterval=1):
        draw = drawings[normalize_hexcode(concept.hexcode)]
        try:
            image = draw(DUPLICATES_SIZE)
        except (ValueError, UnidentifiedImageError) as error:
            raise ValueError(f"the {style} picture of {concept.hexcode} cannot be drawn: {error}") from error
        pixels = image.tobytes()
        if pixels in seen:
            continue
        seen.add(pixels)
        if size != DUPLICATES_SIZE:
            image = draw(size)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", optimize=True)
        pictures[concept.hexcode] = buffer.getvalue()
    return pictures
