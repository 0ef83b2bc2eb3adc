"""The shapes data: what is held out, captions that say the truth, layouts that are plain to see, files."""

import hashlib
import re
from itertools import product

import numpy as np
import prepare_shapes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prepare_shapes import SPLITS, hold_out_pairs, hold_out_triples, read_scene, sample_scene, write_captions
from scenes import (
    COLOURS,
    DIAMETERS,
    GAP,
    MARGIN,
    RELATIONS,
    SHAPES,
    Placed,
    Scene,
    Thing,
    draw_mask,
    has_relation,
    measure_shape,
    outline,
    place_scene,
)

from hf_dalle.data import CaptionImageDataset, load_rows


NUM_ROWS = {"train": 24, "validation": 4, "test_pairs": 6, "test_triples": 4}
NUMBERS = {"a": 1, "one": 1, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
SIZES = {"small": "small", "little": "small", "large": "large", "big": "large"}
THING = (
    rf"({'|'.join(NUMBERS)}) ({'|'.join(SIZES)}) (?:(\w+) )?(circle|square|triangle|star|cross)(?:e?s)?(?: in (\w+))?"
)
PLACES = {
    **{"left of": "left of", "to the left of": "left of", "right of": "right of", "to the right of": "right of"},
    **{"above": "above", "over": "above", "below": "below", "under": "below"},
}
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))

things = st.builds(Thing, *(st.sampled_from(sorted(words)) for words in (DIAMETERS, COLOURS, SHAPES)))
scenes_of_two = st.builds(Scene, things, st.just(1), st.sampled_from(RELATIONS), things).filter(
    lambda scene: scene.thing.pair != scene.other.pair
)
scenes = st.one_of(st.builds(Scene, things, st.integers(1, 4), st.none(), st.none()), scenes_of_two)


def read_caption(caption):
    """What an English reader takes from a caption: written apart from what writes it."""

    def read_thing(words):
        number, size, before, shape, after = re.fullmatch(THING, words).groups()
        assert (before is None) != (after is None)
        return Thing(SIZES[size], before or after, shape), NUMBERS[number]

    caption = re.sub(r"^(a picture of|there is|there are) ", "", caption)
    with_it = re.fullmatch(rf"(.+?) with (.+?) ({PLACE}) it", caption)
    if with_it:
        other, thing, place = with_it.groups()
        return Scene(read_thing(thing)[0], 1, PLACES[place], read_thing(other)[0])
    of_two = re.fullmatch(rf"(.+?)(?: is)? ({PLACE}) (.+)", caption)
    if of_two:
        thing, place, other = of_two.groups()
        return Scene(read_thing(thing)[0], 1, PLACES[place], read_thing(other)[0])
    return Scene(*read_thing(caption))


# ---------------------------------------------------------------------------------------------------- what is held out


def test_a_fifth_of_the_pairs_is_held_out_whoever_asks():
    assert sorted(hold_out_pairs()) == [
        *[("black", "circle"), ("blue", "triangle"), ("green", "square"), ("orange", "cross")],
        *[("pink", "square"), ("purple", "triangle"), ("red", "cross"), ("yellow", "circle")],
    ]
    assert len(hold_out_pairs()) == 0.2 * len(COLOURS) * len(SHAPES)
    seen = set(product(COLOURS, SHAPES)) - hold_out_pairs()
    assert min(sum(colour == one for one, _ in seen) for colour in COLOURS) == len(SHAPES) - 1
    assert min(sum(shape == one for _, one in seen) for shape in SHAPES) == len(COLOURS) - 2


def test_a_fifth_of_the_triples_is_held_out_whoever_asks():
    seen = set(product(COLOURS, SHAPES)) - hold_out_pairs()
    num_triples = 2 * len(seen) * (len(seen) - 1)
    assert len(hold_out_triples()) == round(0.2 * num_triples)
    assert all(a in seen and b in seen and a != b for a, _, b in hold_out_triples())
    assert {relation for _, relation, _ in hold_out_triples()} == {"left of", "above"}
    digest = hashlib.sha256(repr(sorted(hold_out_triples())).encode()).hexdigest()
    assert digest.startswith("6c6e31155b31e1c3")  # checkpoints were trained without these


@settings(max_examples=60, deadline=None)
@given(scene=scenes_of_two)
def test_a_triple_is_the_same_from_both_sides(scene):
    assert scene.turned() != scene and scene.turned().turned() == scene
    assert scene.triple == scene.turned().triple
    smaller = scene._replace(thing=scene.thing._replace(size="small"))
    assert smaller.triple == scene.triple
    mirrored = scene._replace(thing=scene.other, other=scene.thing)
    assert mirrored.triple != scene.triple  # says something else


@pytest.mark.parametrize("split", SPLITS)
def test_captions_show_what_a_split_may_and_nothing_else(split):
    for row in range(400):
        rng = np.random.default_rng((1, row))
        scene = sample_scene(split, rng)
        for caption in write_captions(scene, rng):
            said = read_caption(caption)
            assert said in ((scene, scene.turned()) if scene.relation else (scene,))
            # in their own words: the left one, or the upper one, first
            pairs = {said.thing.pair} | ({said.other.pair} if said.other else set())
            one, other = (said, said.turned()) if said.relation else (None, None)
            triples = [(s.thing.pair, s.relation, s.other.pair) for s in (one, other) if s is not None]
            has_pair = bool(pairs & hold_out_pairs())
            has_triple = any(triple in hold_out_triples() for triple in triples)
            assert has_pair == (split == "test_pairs")
            assert has_triple == (split == "test_triples")


def test_every_word_of_the_tests_is_seen_in_training():
    words = {}
    for split, num_scenes in (("train", 500), ("test_pairs", 500), ("test_triples", 500)):
        words[split] = set()
        for row in range(num_scenes):
            rng = np.random.default_rng((2, row))
            words[split].update(
                word for text in write_captions(sample_scene(split, rng), rng) for word in text.split()
            )
    assert words["test_pairs"] | words["test_triples"] <= words["train"]
    assert {*COLOURS, *SHAPES, "three", "3", "little", "under"} <= words["train"]


@settings(max_examples=60, deadline=None)
@given(scene=scenes, seed=st.integers(0, 2**32))
def test_captions_differ_and_say_all_of_the_scene(scene, seed):
    captions = write_captions(scene, np.random.default_rng(seed))
    assert len(set(captions)) == len(captions) == prepare_shapes.NUM_CAPTIONS
    assert {read_caption(caption) for caption in captions} <= {scene, scene.turned() if scene.relation else scene}


# ------------------------------------------------------------------------------------------------------------ layouts


@settings(max_examples=60, deadline=None)
@given(scene=scenes, seed=st.integers(0, 2**32))
def test_things_are_inside_apart_and_related_in_one_way(scene, seed):
    placed = place_scene(scene, np.random.default_rng(seed)).placed
    assert len(placed) == (2 if scene.relation else scene.count)
    corners = [outline(one.thing.shape) * one.diameter + (one.x, one.y) for one in placed]
    for own in corners:
        assert own.min() >= MARGIN - 1e-9 and own.max() <= 1 - MARGIN + 1e-9
    for i, one in enumerate(corners):
        for other in corners[:i]:
            assert np.linalg.norm(one[:, None] - other, axis=-1).min() >= GAP
    if scene.relation:
        assert [relation for relation in RELATIONS if has_relation(*placed, relation)] == [scene.relation]


@pytest.mark.parametrize(
    ("relation", "x", "y"), [("left of", 0.2, 0.5), ("right of", 0.8, 0.5), ("above", 0.5, 0.2), ("below", 0.5, 0.8)]
)
def test_relations_are_as_one_sees_them(relation, x, y):
    one, other = (Placed(Thing("small", "red", "star"), *place, 0.2) for place in ((x, y), (0.5, 0.5)))
    assert [name for name in RELATIONS if has_relation(one, other, name)] == [relation]


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_centre_are_those_of_what_is_drawn(shape):
    mask = draw_mask(Placed(Thing("large", "red", shape), 0.45, 0.55, 0.6), 200)
    assert mask.sum() / 200**2 == pytest.approx(measure_shape(shape)[0] * 0.6**2, rel=0.003)
    places = (np.arange(200) + 0.5) / 200
    assert mask.sum(0) @ places / mask.sum() == pytest.approx(0.45, abs=0.003)
    assert mask.sum(1) @ places / mask.sum() == pytest.approx(0.55, abs=0.003)


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    prepare_shapes.prepare(folder, NUM_ROWS, size=48)
    return folder


def test_files_are_what_training_reads(folder):
    for split, num_rows in NUM_ROWS.items():
        rows = load_rows(str(folder), split=split)
        assert len(rows) == num_rows
        for row in rows:
            scene = read_scene(row)
            assert prepare_shapes.belongs_to(scene, split) and row["kind"] == scene.kind
            assert {read_caption(text) for text in row["captions"]} <= {
                scene,
                scene.turned() if scene.relation else scene,
            }
    from hf_dalle import DalleImageProcessor

    item = CaptionImageDataset(load_rows(str(folder)), image_processor=DalleImageProcessor(size=48))[0]
    assert item["pixel_values"].shape == (3, 48, 48) and read_caption(item["caption"])
    assert {row["kind"] for row in load_rows(str(folder))} == {"one", "two", "count"}
    assert "397 of the 1,984 triples" in " ".join((folder / "README.md").read_text().split())


@pytest.mark.parametrize("num_train", [1, 400])
def test_the_readme_says_whether_training_has_every_word(tmp_path, num_train):
    prepare_shapes.prepare(tmp_path, {**NUM_ROWS, "train": num_train}, size=32)
    words = {}
    for split in SPLITS:
        texts = [text for row in load_rows(str(tmp_path), split=split) for text in row["captions"]]
        words[split] = {*" ".join(texts).split()}
    unseen = sorted(set().union(*words.values()) - words["train"])
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert bool(unseen) == (num_train == 1) and ", ".join(unseen) in text
    assert ("every word of the other splits' captions stands" in text) == (num_train == 400)


def test_the_same_seed_gives_the_same_files_and_another_others(folder, tmp_path):
    prepare_shapes.prepare(tmp_path / "same", NUM_ROWS, size=48)
    prepare_shapes.prepare(tmp_path / "other", NUM_ROWS, size=48, seed=1)
    for split in SPLITS:
        assert (tmp_path / "same" / f"{split}.parquet").read_bytes() == (folder / f"{split}.parquet").read_bytes()
        images = [
            {row["image"]["bytes"] for row in load_rows(str(where), split=split)}
            for where in (folder, tmp_path / "other")
        ]
        assert not images[0] & images[1]
    pictures = [row["image"]["bytes"] for split in SPLITS for row in load_rows(str(folder), split=split)]
    assert len(set(pictures)) == len(pictures)


def test_what_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(ValueError, match="below 32"):
        prepare_shapes.prepare(tmp_path, NUM_ROWS, size=16)
    with pytest.raises(ValueError, match="at least 1 row, got none for validation, test_pairs, test_triples"):
        prepare_shapes.main(["--num_test", "0", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"colour_1": "teal"}, "words that shapes do not"), ({"count": 7}, "words"), ({"relation": "beside"}, "words")],
)
def test_rows_of_other_words_are_refused(folder, change, message):
    row = next(row for row in load_rows(str(folder)) if row["kind"] == "two")
    with pytest.raises(ValueError, match=message):
        read_scene({**row, **change})
    with pytest.raises(ValueError, match="'shape_2' is missing"):
        read_scene({name: value for name, value in row.items() if name != "shape_2"})
