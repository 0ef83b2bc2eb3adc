"""The world of the shapes data: words, scenes of one or two kinds of things, where things may lie, and how they look.

Which scenes are drawn for which split, and what captions say of them, lives in `prepare_shapes.py`; how a picture is
read back in `evaluation/scene_checker.py`. Lengths are shares of the picture's side, y points down.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image


COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 0),
    "yellow": (250, 215, 30),
    "green": (30, 150, 60),
    "blue": (30, 90, 220),
    "purple": (125, 50, 165),
    "pink": (245, 120, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIAMETERS = {"small": 0.19, "large": 0.30}
RELATIONS = ("left of", "right of", "above", "below")
MAX_COUNT = 4
# Pale, so that every colour stands out: the nearest, pink on grey, is 117 away (Euclidean, channels of 255).
BACKGROUNDS = ((255, 255, 255), (226, 226, 226), (251, 245, 228), (224, 236, 248), (226, 243, 228), (248, 230, 236))

DIAMETER_JITTER = 0.05  # relative, either way
BACKGROUND_JITTER = 5  # of 255, a channel
MARGIN = 0.03  # between a thing and the border
GAP = 0.04  # between the circles around two things
MAX_SLOPE = 0.4  # of two things left of or above each other: offset across / offset along
NUM_LINES = 8  # sampled in a row of pixels


class Thing(NamedTuple):
    """What a caption says of one kind of things."""

    size: str
    colour: str
    shape: str

    @property
    def pair(self) -> tuple[str, str]:
        """What is held out together."""
        return self.colour, self.shape


class Scene(NamedTuple):
    """`count` times `thing`; or one `thing`, `relation`, one `other`."""

    thing: Thing
    count: int = 1
    relation: str | None = None
    other: Thing | None = None

    @property
    def kind(self) -> str:
        """ "one", "two" or "count"."""
        return "two" if self.relation is not None else "one" if self.count == 1 else "count"

    @property
    def pairs(self) -> set[tuple[str, str]]:
        return {thing.pair for thing in (self.thing, self.other) if thing is not None}

    @property
    def triple(self) -> tuple | None:
        """
        (pair, "left of" or "above", pair): the same for both ways to say it, "a red circle left of a blue square" and
        "a blue square right of a red circle"; sizes are no part of it.
        """
        if self.relation is None:
            return None
        scene = self if self.relation in ("left of", "above") else self.turned()
        return scene.thing.pair, scene.relation, scene.other.pair

    def turned(self) -> "Scene":
        """The same scene of two, said from the other side."""
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
        return Scene(self.other, 1, opposite[self.relation], self.thing)


class Placed(NamedTuple):
    """A thing in the picture: the centre of its area and its diameter."""

    thing: Thing
    x: float
    y: float
    diameter: float


class Layout(NamedTuple):
    """All that a picture is drawn from."""

    placed: tuple[Placed, ...]
    background: tuple[int, int, int]


@lru_cache(maxsize=len(SHAPES))
def outline(shape: str) -> np.ndarray:
    """The corners of a shape of diameter 1 around the centre of its area: N x 2, (x, y)."""
    if shape == "circle":
        angles = 2 * math.pi * np.arange(48) / 48
        points = 0.5 * np.stack([np.cos(angles), np.sin(angles)], 1)
    elif shape == "square":
        points = 0.45 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    elif shape == "triangle":
        points = np.array([(0, -0.54), (0.56, 0.43), (-0.56, 0.43)])
    elif shape == "star":
        angles = math.pi * np.arange(10) / 5 - math.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 0.6, 0.27)
        points = np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)
    else:
        a, b = 0.17, 0.52  # half the width and half the length of an arm
        points = np.array(
            [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ]
        )
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    centre = ((points + following) * cross[:, None]).sum(0) / (3 * cross.sum())
    return points - centre


@lru_cache(maxsize=len(SHAPES))
def measure_shape(shape: str) -> tuple[float, float, tuple[float, float, float, float]]:
    """
    Of a shape of diameter 1: its area, how far its farthest corner is from the centre of its area, and how far it
    reaches left, up, right and down of there.
    """
    points = outline(shape)
    following = np.roll(points, -1, axis=0)
    area = abs(float((points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]).sum())) / 2
    reaches = (*(-points.min(0)).tolist(), *points.max(0).tolist())
    return area, float(np.hypot(*points.T).max()), reaches


def place_scene(scene: Scene, rng: np.random.Generator) -> Layout:
    """Chooses background, diameters and places: by trial, until nothing overlaps and the relation is plain to see."""
    base = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    jitter = rng.integers(-BACKGROUND_JITTER, BACKGROUND_JITTER + 1, size=3).tolist()
    background = tuple(min(255, value + more) for value, more in zip(base, jitter, strict=True))
    things = [scene.thing, scene.other] if scene.kind == "two" else [scene.thing] * scene.count
    while True:
        placed = []
        for thing in things:
            one = _place_thing(thing, placed, rng)
            if one is None:
                break
            placed.append(one)
        if len(placed) == len(things) and (scene.kind != "two" or has_relation(*placed, scene.relation, MAX_SLOPE)):
            return Layout(tuple(placed), background)


def _place_thing(thing: Thing, placed: list[Placed], rng: np.random.Generator, num_trials: int = 20) -> Placed | None:
    """The thing where it overlaps none of those placed before; `None` where so many trials found no such place."""
    _, reach, (left, up, right, down) = measure_shape(thing.shape)
    diameter = DIAMETERS[thing.size] * (1 + DIAMETER_JITTER * (2 * rng.random() - 1))
    for along_x, along_y in rng.random((num_trials, 2)).tolist():
        x = MARGIN + left * diameter + along_x * (1 - 2 * MARGIN - (left + right) * diameter)
        y = MARGIN + up * diameter + along_y * (1 - 2 * MARGIN - (up + down) * diameter)
        if all(
            math.hypot(x - one.x, y - one.y)
            >= GAP + reach * diameter + measure_shape(one.thing.shape)[1] * one.diameter
            for one in placed
        ):
            return Placed(thing, x, y, diameter)
    return None


def has_relation(one: Placed, other: Placed, relation: str, max_slope: float = 1.0) -> bool:
    """
    Whether `one` is `relation` to `other`, by the centres of their areas: the offset along the relation's axis has the
    right sign, and the offset across it is at most `max_slope` times as large.
    """
    right, down = one.x - other.x, one.y - other.y
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    if relation in ("left of", "above"):
        along = -along
    return along > 0 and abs(across) <= max_slope * along


def draw_mask(one: Placed, size: int) -> np.ndarray:
    """
    The share of each pixel that a thing covers: size x size, in [0, 1]; exact along x, by samples along y.

    Each sampled line is inside from where it crosses an edge that goes up to where it crosses one that goes down, so
    what an edge adds to a pixel is the part of the pixel that lies right of the crossing, with the edge's sign.
    """
    corners = (outline(one.thing.shape) * one.diameter + (one.x, one.y)) * size  # in pixels
    following = np.roll(corners, -1, axis=0)
    lines = (np.arange(size * NUM_LINES) + 0.5) / NUM_LINES
    is_above, is_above_next = corners[:, 1, None] <= lines, following[:, 1, None] <= lines  # E x lines
    edges, rows = np.nonzero(is_above != is_above_next)
    (x, y), (x_next, y_next) = corners[edges].T, following[edges].T
    crossings = x + (lines[rows] - y) * (x_next - x) / (y_next - y)
    signs = np.where(is_above[edges, rows], -1, 1)
    parts = signs[:, None] * np.clip(np.arange(1, size + 1) - crossings[:, None], 0, 1)  # P x size
    mask = np.zeros((size, size))
    np.add.at(mask, rows // NUM_LINES, parts / NUM_LINES)
    return np.clip(mask, 0, 1).astype(np.float32)


def draw_layout(layout: Layout, size: int) -> Image.Image:
    """The picture, RGB, size x size, with smooth edges."""
    pixels = np.broadcast_to(np.array(layout.background, dtype=np.float32), (size, size, 3))
    for one in layout.placed:
        mask = draw_mask(one, size)[..., None]
        pixels = pixels + mask * (np.array(COLOURS[one.thing.colour], dtype=np.float32) - pixels)
    return Image.fromarray(pixels.round().astype(np.uint8))
