"""The checker of shapes: all of what is drawn is read back, whatever is spoiled is caught and named."""

import io

import numpy as np
import pytest
from evaluation.scene_checker import Found, Verdict, judge, label_parts, read_picture
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter
from prepare_shapes import sample_any_scene
from scenes import (
    BACKGROUNDS,
    COLOURS,
    DIAMETERS,
    SHAPES,
    Layout,
    Placed,
    Scene,
    Thing,
    draw_layout,
    place_scene,
)
from test_prepare_shapes import scenes, scenes_of_two, things


SIZE = 60  # the recipe's
RED_STAR, BLUE_SQUARE = Thing("small", "red", "star"), Thing("large", "blue", "square")
seeds = st.integers(0, 2**32)


def draw(scene, seed=0, size=SIZE):
    return draw_layout(place_scene(scene, np.random.default_rng(seed)), size)


def sample(seed):
    """A scene, held out or not, and its picture."""
    rng = np.random.default_rng((3, seed))
    scene = sample_any_scene(("one", "two", "count")[seed % 3], rng)
    return scene, draw_layout(place_scene(scene, rng), SIZE)


def list_wrong(numbers, spoil=lambda image: image):
    return [
        seed
        for seed in numbers
        for scene, image in [sample(seed)]
        if not judge(read_picture(spoil(image)), scene).is_right
    ]


def compress(image, **kwargs):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **kwargs)
    return Image.open(buffer)


# --------------------------------------------------------------------------------------------- what is drawn is right


def test_what_is_drawn_is_read_back():
    assert list_wrong(range(120)) == []


@pytest.mark.slow
def test_thousands_that_are_drawn_are_read_back():
    assert list_wrong(range(5000)) == []


@settings(max_examples=25, deadline=None)
@given(scene=scenes, seed=seeds, size=st.sampled_from([48, 64, 96]))
def test_at_any_size(scene, seed, size):
    assert judge(read_picture(draw(scene, seed, size)), scene).is_right


@pytest.mark.parametrize(
    "spoil",
    [
        lambda image: image.filter(ImageFilter.GaussianBlur(0.8)),
        lambda image: compress(image, quality=90, subsampling=0),
        lambda image: Image.fromarray(
            (np.asarray(image) + np.random.default_rng(0).normal(0, 8, (SIZE, SIZE, 3))).clip(0, 255).astype(np.uint8)
        ),
    ],
    ids=["blur", "jpeg", "noise"],
)
def test_mild_harm_changes_no_reading(spoil):
    assert len(list_wrong(range(60), spoil)) <= 1


def test_things_are_found_where_they_are():
    layout = Layout((Placed(RED_STAR, 0.3, 0.62, 0.19), Placed(BLUE_SQUARE, 0.7, 0.3, 0.3)), BACKGROUNDS[0])
    found = read_picture(draw_layout(layout, SIZE))
    assert [tuple(one[:3]) for one in found] == [tuple(RED_STAR), tuple(BLUE_SQUARE)]
    for one, placed in zip(found, layout.placed, strict=True):
        assert (one.x, one.y) == pytest.approx((placed.x, placed.y), abs=0.01)


# ------------------------------------------------------------------------------------------- what is spoiled is caught


@settings(max_examples=40, deadline=None)
@given(scene=scenes, seed=seeds, part=st.sampled_from(["colour", "shape", "size"]), data=st.data())
def test_one_wrong_word_is_named(scene, seed, part, data):
    words = sorted({"colour": COLOURS, "shape": SHAPES, "size": DIAMETERS}[part])
    word = data.draw(st.sampled_from([word for word in words if word != getattr(scene.thing, part)]))
    spoiled = scene._replace(thing=scene.thing._replace(**{part: word}))
    verdict = judge(read_picture(draw(spoiled, seed)), scene)
    assert not verdict.is_right and verdict == judge(read_picture(draw(scene, seed)), scene)._replace(**{part: False})


@settings(max_examples=25, deadline=None)
@given(thing=things, counts=st.permutations([1, 2, 3, 4]), seed=seeds)
def test_a_wrong_count_is_named(thing, counts, seed):
    verdict = judge(read_picture(draw(Scene(thing, counts[0]), seed)), Scene(thing, counts[1]))
    assert verdict == Verdict(count=False, colour=True, shape=True, size=True, relation=None)


@settings(max_examples=25, deadline=None)
@given(scene=scenes_of_two, relation=st.sampled_from(["left of", "right of", "above", "below"]), seed=seeds)
def test_a_wrong_relation_is_named(scene, relation, seed):
    verdict = judge(read_picture(draw(scene._replace(relation=relation), seed)), scene)
    is_right = relation == scene.relation
    assert verdict == Verdict(True, True, True, True, is_right) and verdict.is_right == is_right


@settings(max_examples=25, deadline=None)
@given(scene=scenes_of_two, seed=seeds)
def test_a_missing_and_a_surplus_thing_are_named(scene, seed):
    missing = judge(read_picture(draw(Scene(scene.thing), seed)), scene)
    assert missing == Verdict(False, True, True, True, False)
    surplus = judge(read_picture(draw(scene, seed)), Scene(scene.thing))
    assert surplus == Verdict(False, True, True, True, None)
    assert not judge([], scene).is_right and judge([], Scene(scene.thing)) == Verdict(False, False, False, False, None)


@settings(max_examples=30, deadline=None)
@given(thing=things, angle=st.floats(0, 6.28), share=st.floats(0.2, 0.6), seed=seeds)
def test_two_of_a_kind_that_run_together_are_not_two(thing, angle, share, seed):
    diameter = DIAMETERS[thing.size]
    x, y = share * diameter * np.cos(angle) / 2, share * diameter * np.sin(angle) / 2
    placed = (Placed(thing, 0.5 - x, 0.5 - y, diameter), Placed(thing, 0.5 + x, 0.5 + y, diameter))
    found = read_picture(draw_layout(Layout(placed, BACKGROUNDS[seed % len(BACKGROUNDS)]), SIZE))
    assert not judge(found, Scene(thing, 2)).is_right


@settings(max_examples=30, deadline=None)
@given(one=things, other=things, seed=seeds)
def test_things_of_two_colours_that_touch_are_two(one, other, seed):
    assume(one.colour != other.colour and "star" not in (one.shape, other.shape))  # a star touches with a tip alone
    reach = 0.45 * (DIAMETERS[one.size] + DIAMETERS[other.size])
    placed = (
        Placed(one, 0.5 - reach / 2, 0.5, DIAMETERS[one.size]),
        Placed(other, 0.5 + reach / 2, 0.5, DIAMETERS[other.size]),
    )
    found = read_picture(draw_layout(Layout(placed, BACKGROUNDS[seed % len(BACKGROUNDS)]), SIZE))
    assert [thing.colour for thing in found] == [one.colour, other.colour]


def test_what_has_no_word_is_found_without_one():
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[0])
    assert read_picture(image) == []
    ImageDraw.Draw(image).rectangle((2, 2, 3, 3), fill=COLOURS["red"])
    assert read_picture(image) == []  # a speck
    ImageDraw.Draw(image).line((2, 30, 57, 36), fill=COLOURS["red"], width=4)
    (line,) = read_picture(image)
    assert line[:3] == (None, "red", None)
    ImageDraw.Draw(image).rectangle((8, 8, 50, 50), fill=COLOURS["blue"])
    assert (None, "blue", "square") in [one[:3] for one in read_picture(image)]  # neither small nor large
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[0])
    ImageDraw.Draw(image).ellipse((20, 20, 36, 36), fill=(120, 125, 130))
    assert [one[:3] for one in read_picture(image)] == [("large", None, "circle")]
    with pytest.raises(ValueError, match="is square; got 60 x 30"):
        read_picture(image.crop((0, 0, 60, 30)))


# ------------------------------------------------------------------------------------------------------------ by hand


@pytest.mark.parametrize(
    ("places", "verdict"),
    [
        ([(0.2, 0.5), (0.8, 0.5)], (True, True, True, True, True)),
        ([(0.8, 0.5), (0.2, 0.5)], (True, True, True, True, False)),
        ([(0.2, 0.2), (0.5, 0.8)], (True, True, True, True, False)),  # rather above than left of
        ([(0.2, 0.2), (0.8, 0.5)], (True, True, True, True, True)),
    ],
)
def test_relations_by_centres(places, verdict):
    found = [Found(*thing, *place) for thing, place in zip((RED_STAR, BLUE_SQUARE), places, strict=True)]
    for order in (found, found[::-1]):
        assert judge(order, Scene(RED_STAR, 1, "left of", BLUE_SQUARE)) == Verdict(*verdict)
        assert judge(order, Scene(BLUE_SQUARE, 1, "right of", RED_STAR)) == Verdict(*verdict)


def test_swapped_colours_are_no_pair_of_right_things():
    found = [Found("small", "blue", "star", 0.2, 0.5), Found("large", "red", "square", 0.8, 0.5)]
    assert judge(found, Scene(RED_STAR, 1, "left of", BLUE_SQUARE)) == Verdict(True, False, True, True, True)


def test_many_things_are_wrong_and_do_not_take_for_ever():
    found = [Found(*RED_STAR, x=i / 50, y=0.5) for i in range(50)]
    assert judge(found, Scene(RED_STAR, 4)) == Verdict(False, True, True, True, None)


@settings(max_examples=60, deadline=None)
@given(mask=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=7))
def test_connected_parts_are_those_of_a_flood(mask):
    mask = np.array(mask)
    expected, left = [], {tuple(place) for place in np.argwhere(mask).tolist()}
    while left:
        front, part = [left.pop()], np.zeros_like(mask)
        while front:
            y, x = front.pop()
            part[y, x] = True
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & left
            left -= near
            front += near
        expected.append(part.tobytes())
    assert sorted(part.tobytes() for part in label_parts(mask)) == sorted(expected)
