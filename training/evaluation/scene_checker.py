"""Reads a picture of shapes back, without learning: which things it shows and where; and judges it by a scene.

What scenes are, and how they are drawn, lives in `scenes.py`; the measurement that judges models' pictures in
`shapes.py`. A picture is right if it shows what the scene says, all of it, and nothing else.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import Image
from scenes import COLOURS, DIAMETERS, SHAPES, Placed, Scene, Thing, draw_mask, has_relation, measure_shape


# Shares and distances between what real pictures give and what spoiled ones do. Both have room: edges that a dVAE
# has blurred lose little area but much of their contrast.
MIN_COVER = 0.5  # of a thing, for a pixel to count as its own
MIN_CONTRAST = 50.0  # of a pixel to the background, of 255, Euclidean over the channels
MAX_COLOUR_DISTANCE = 70.0  # of a thing's colour to the one that it is called
NEAR_COLOUR = 40.0  # of a pixel to a colour that it is evidence of; yellow and orange are 81 apart
NEAR_WAY = 30.0  # of a pixel to the way between the background and a colour that it is a mixture of
MIN_SPECK = 0.15  # of the area of the smallest thing; less is noise, not a thing
MIN_PART = 0.3  # of the same; less of a second colour within a thing is noise
MIN_MATCH = 0.65  # of a thing with the shape that it is called: intersection over union of covers
MAX_SIZE_ERROR = 1.3  # of the diameter to that of the size that it is called, as a ratio, either way


PARTS = ("colour", "shape", "size")


class Found(NamedTuple):
    """A thing that a picture shows; `None` for what it has that no word is for."""

    size: str | None
    colour: str | None
    shape: str | None
    x: float
    y: float


class Verdict(NamedTuple):
    """Which parts of a scene a picture has right; `relation` is `None` where the scene has none."""

    count: bool
    colour: bool
    shape: bool
    size: bool
    relation: bool | None

    @property
    def is_right(self) -> bool:
        return all(part is not False for part in self)


# ---------------------------------------------------------------------------------------------------------- reading


def read_picture(image: Image.Image) -> list[Found]:
    """
    All things that a picture shows, from left to right.

    The background is the median of the border. Pixels that differ from it fall into connected parts, these apart where
    they have more than one colour. A part's covers (how far each pixel is on the way from the background to the
    part's colour) give area and centre; its shape is that whose cover of equal area and centre fits best, its size
    then follows from the area.

    Args:
        image (`PIL.Image.Image`): square, RGB.

    Raises:
        ValueError: if it is not square.
    """
    if image.width != image.height:
        raise ValueError(f"A picture of shapes is square; got {image.width} x {image.height}.")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    offsets = pixels - np.median(border, axis=0)  # H x W x 3, from the background
    contrast = np.linalg.norm(offsets, axis=-1)
    smallest = min(measure_shape(shape)[0] for shape in SHAPES) * (min(DIAMETERS.values()) * image.width) ** 2
    palette = np.array(list(COLOURS.values())) - np.median(border, axis=0)
    found = []
    for part in label_parts(contrast > MIN_CONTRAST):
        for own, colour in _split_colours(part, offsets, palette, MIN_PART * smallest):
            for cover in _measure_covers(own, offsets, colour):
                if cover.sum() >= MIN_SPECK * smallest:
                    found.append(_name_part(cover, colour, palette))
    return sorted(found, key=lambda one: one.x)


def label_parts(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a boolean H x W mask that are connected by sides of pixels, each a mask."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes the largest label of its neighbours, along whole rows and columns at a time
        before = labels
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            labels = _spread(labels, mask, axis, step)
        if np.array_equal(labels, before):
            return [labels == label for label in np.unique(labels[mask])]


def _spread(labels: np.ndarray, mask: np.ndarray, axis: int, step: int) -> np.ndarray:
    """The largest label that each pixel meets going back against `step` along an axis, within its run of the mask."""
    moved = np.moveaxis(labels, axis, 0)[::step]
    # Runs get apart by an offset that grows at each gap, so that one running maximum does for all of them.
    gaps = np.cumsum(~np.moveaxis(mask, axis, 0)[::step], axis=0) * (labels.size + 1)
    spread = np.where(moved > 0, np.maximum.accumulate(moved + gaps, axis=0) - gaps, 0)
    return np.moveaxis(spread[::step], 0, axis)


def _split_colours(
    part: np.ndarray, offsets: np.ndarray, palette: np.ndarray, min_pixels: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The areas of one colour that a connected part consists of, each a mask with its colour as an offset."""
    values = offsets[part]  # P x 3
    is_explained, colours = np.zeros(len(values), dtype=bool), []
    # An edge mixes its colour with the background, and may look like a paler colour: so the strongest come first, and
    # what lies on the way from the background to one of them is no evidence of another.
    for entry in palette[np.argsort(-np.linalg.norm(palette, axis=1), kind="stable")]:
        is_near = np.linalg.norm(values - entry, axis=1) < NEAR_COLOUR
        if (is_near & ~is_explained).sum() >= min_pixels:
            colours.append(np.median(values[is_near & ~is_explained], axis=0))
            is_explained |= _distance_to_way(values, colours[-1]) < NEAR_WAY
    if not colours:
        strength = np.linalg.norm(values, axis=1)
        colours = [values[strength >= np.quantile(strength, 0.75)].mean(0)]
    owner = np.stack([_distance_to_way(values, colour) for colour in colours]).argmin(0)
    areas = []
    for number, colour in enumerate(colours):
        own = np.zeros_like(part)
        own[part] = owner == number
        areas.append((own, colour))
    return areas


def _distance_to_way(values: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """How far offsets (P x 3) are from the way between the background and a colour."""
    shares = np.clip(values @ colour / (colour @ colour), 0, 1)
    return np.linalg.norm(values - shares[:, None] * colour, axis=1)


def _dilate(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _measure_covers(own: np.ndarray, offsets: np.ndarray, colour: np.ndarray) -> Iterator[np.ndarray]:
    """Of each thing in an area of one colour, H x W in [0, 1]: how far the pixels are on the way to that colour."""
    cover = np.clip(offsets @ colour / (colour @ colour), 0, 1)
    for piece in label_parts(own & (cover >= MIN_COVER)):
        edge = _dilate(piece) & (cover < MIN_COVER)
        yield np.where(piece | edge, cover, 0)


def _name_part(cover: np.ndarray, colour: np.ndarray, palette: np.ndarray) -> Found:
    side = len(cover)
    area = cover.sum()
    places = (np.arange(side) + 0.5) / side
    x, y = float(cover.sum(0) @ places / area), float(cover.sum(1) @ places / area)
    distances = np.linalg.norm(palette - colour, axis=-1)
    name = list(COLOURS)[int(distances.argmin())] if distances.min() <= MAX_COLOUR_DISTANCE else None
    matches = {}
    for shape in SHAPES:
        diameter = math.sqrt(area / measure_shape(shape)[0]) / side
        matches[shape] = _match(cover, draw_mask(Placed(Thing("", "", shape), x, y, diameter), side))
    shape = max(matches, key=matches.get)
    if matches[shape] < MIN_MATCH:
        return Found(None, name, None, x, y)
    diameter = math.sqrt(area / measure_shape(shape)[0]) / side
    size = min(DIAMETERS, key=lambda size: abs(math.log(diameter / DIAMETERS[size])))
    is_near = abs(math.log(diameter / DIAMETERS[size])) <= math.log(MAX_SIZE_ERROR)
    return Found(size if is_near else None, name, shape, x, y)


def _match(cover: np.ndarray, other: np.ndarray) -> float:
    return float(np.minimum(cover, other).sum() / np.maximum(cover, other).sum())


# ---------------------------------------------------------------------------------------------------------- judging


def judge(found: list[Found], scene: Scene) -> Verdict:
    """
    Compares what a picture shows with what it should.

    Things found are paired with things wanted so that as many words as possible agree. A part (colours, shapes, sizes)
    is right if it is in all pairs, and there is one; the count if there are as many things as wanted; the relation if
    both things are there and it holds between their centres.
    """
    wanted = [scene.thing, scene.other] if scene.other is not None else [scene.thing] * scene.count
    best = (-1, False, False, False, None if scene.relation is None else False)
    for places in _list_pairings(len(found), len(wanted)):
        pairs = [(found[i], wanted[j]) for i, j in places]
        agree = [[getattr(one, word) == getattr(thing, word) for one, thing in pairs] for word in PARTS]
        relation = None
        if scene.relation is not None:
            relation = len(pairs) == 2 and has_relation(pairs[0][0], pairs[1][0], scene.relation)
        # equal pairings but for the relation: the one where it holds
        best = max(best, (sum(map(sum, agree)), *map(all, agree), relation), key=lambda one: (one[0], bool(one[4])))
    return Verdict(len(found) == len(wanted), *best[1:])


@lru_cache(maxsize=64)
def _list_pairings(num_found: int, num_wanted: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """All ways to pair things found with things wanted, in the order of those wanted; of more than six found the
    first six are tried, since such a picture is wrong whatever they are."""
    num_found = min(num_found, 6)
    if num_found >= num_wanted:
        return tuple(
            tuple(zip(chosen, range(num_wanted), strict=True)) for chosen in permutations(range(num_found), num_wanted)
        )
    ways = (zip(range(num_found), chosen, strict=True) for chosen in permutations(range(num_wanted), num_found))
    return tuple(tuple(sorted(way, key=lambda pair: pair[1])) for way in ways) if num_found else ()
