"""Makes caption-image data whose truth is known: small scenes of coloured shapes, with combinations that are held out.

    python training/prepare_shapes.py --output_dir data/shapes

Held out of `train` and `validation`, by hash, whatever the seed: a fifth of the (colour, shape) pairs, which only
`test_pairs` shows, and of what is left a fifth of the (pair, relation, pair) triples, which only `test_triples` shows.
What scenes are and how they look lives in `scenes.py`.
"""

import argparse
import hashlib
import io
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from itertools import product
from pathlib import Path

import datasets
import numpy as np
from scenes import COLOURS, DIAMETERS, MAX_COUNT, RELATIONS, SHAPES, Scene, Thing, draw_layout, place_scene
from shards import write_split
from tqdm.auto import tqdm


SPLITS = ("train", "validation", "test_pairs", "test_triples")
HELD_OUT_SHARE = 0.2
# Of each split, how many of its scenes are of one thing, of two, of several of a kind.
KIND_SHARES = {
    "train": {"one": 0.2, "two": 0.6, "count": 0.2},
    "validation": {"one": 0.2, "two": 0.6, "count": 0.2},
    "test_pairs": {"one": 0.3, "two": 0.5, "count": 0.2},
    "test_triples": {"two": 1.0},
}
NUM_CAPTIONS = 4
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
COUNT_WORDS = {1: ("a", "one"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "kind": datasets.Value("string"),
        "count": datasets.Value("int64"),
        **{f"{name}_1": datasets.Value("string") for name in Thing._fields},
        "relation": datasets.Value("string"),
        **{f"{name}_2": datasets.Value("string") for name in Thing._fields},
    }
)


def prepare(output_dir: Path, num_rows: dict[str, int], size: int = 60, seed: int = 0) -> None:
    """Writes a parquet file a split and a README; the same files for the same arguments.

    Args:
        output_dir: Where the files go; made when missing.
        num_rows: How many scenes each split gets, at least 1.
        size: Side of the square pictures in pixels, at least 32.
        seed: Of scenes, places and captions; what is held out does not depend on it.

    Raises:
        ValueError: For a size at which shapes cannot be told apart, or a split without rows.
    """
    if size < 32:
        raise ValueError(f"size is the pictures' side in pixels; below 32 a small star is no star, got {size}")
    empty = [split for split in SPLITS if num_rows[split] < 1]
    if empty:
        raise ValueError(f"every split needs at least 1 row, got none for {', '.join(empty)}")
    output_dir.mkdir(parents=True, exist_ok=True)
    # The README says that the data is whole; there is none while files are of two runs.
    (output_dir / "README.md").unlink(missing_ok=True)
    words = {}
    for split in SPLITS:
        examples = []
        for row in tqdm(range(num_rows[split]), desc=f"{split:>12}", unit="picture", mininterval=1):
            rng = np.random.default_rng((seed, SPLITS.index(split), row))
            examples.append(make_example(sample_scene(split, rng), rng, size))
        write_split(examples, FEATURES, output_dir / f"{split}.parquet")
        words[split] = {word for example in examples for text in example["captions"] for word in text.split()}
    unseen = sorted(set().union(*words.values()) - words["train"])
    (output_dir / "README.md").write_text(write_readme(num_rows, size, seed, unseen), encoding="utf-8")


# ------------------------------------------------------------------------------------------------ what is held out


def _by_hash(keys: Iterable[tuple]) -> list[tuple]:
    """In an order that is fixed and has nothing to do with what the keys say."""
    return sorted(keys, key=lambda key: hashlib.sha256(repr(key).encode()).digest())


@lru_cache(maxsize=1)
def hold_out_pairs() -> frozenset[tuple[str, str]]:
    """
    A fifth of the (colour, shape) pairs, the first by hash; but of each colour at most one and of each shape at most
    two, so that training shows every colour and every shape with most of the others.
    """
    pairs, held_out = list(product(COLOURS, SHAPES)), []
    for colour, shape in _by_hash(pairs):
        num_colour = sum(colour == one for one, _ in held_out)
        num_shape = sum(shape == one for _, one in held_out)
        if len(held_out) < round(HELD_OUT_SHARE * len(pairs)) and num_colour < 1 and num_shape < 2:
            held_out.append((colour, shape))
    return frozenset(held_out)


@lru_cache(maxsize=1)
def hold_out_triples() -> frozenset[tuple]:
    """A fifth of the triples, the first by hash."""
    triples = list_triples()
    return frozenset(_by_hash(triples)[: round(HELD_OUT_SHARE * len(triples))])


def list_triples() -> list[tuple]:
    """All triples ([`Scene.triple`], the same from both sides) of two different pairs that training shows."""
    seen = [pair for pair in product(COLOURS, SHAPES) if pair not in hold_out_pairs()]
    return [(a, relation, b) for a, relation, b in product(seen, ("left of", "above"), seen) if a != b]


def belongs_to(scene: Scene, split: str) -> bool:
    """Whether a split may show a scene."""
    has_new_pair = bool(scene.pairs & hold_out_pairs())
    if split == "test_pairs":
        return has_new_pair
    return not has_new_pair and (scene.triple in hold_out_triples()) == (split == "test_triples")


# --------------------------------------------------------------------------------------------- scenes and captions


def sample_scene(split: str, rng: np.random.Generator, kind: str | None = None) -> Scene:
    """A scene that the split may show, of the split's mixture of kinds or of the one given."""
    shares = KIND_SHARES[split]
    kind = kind or str(rng.choice(list(shares), p=list(shares.values())))
    while True:
        scene = sample_any_scene(kind, rng)
        if belongs_to(scene, split):
            return scene


def sample_any_scene(kind: str, rng: np.random.Generator) -> Scene:
    """A scene of a kind, all equally likely, held out or not; the two of a scene of two differ in colour or shape."""
    thing, other = _sample_thing(rng), _sample_thing(rng)
    if kind != "two":
        return Scene(thing, 1 if kind == "one" else int(rng.integers(2, MAX_COUNT + 1)))
    while other.pair == thing.pair:
        other = _sample_thing(rng)
    return Scene(thing, 1, RELATIONS[rng.integers(len(RELATIONS))], other)


def _sample_thing(rng: np.random.Generator) -> Thing:
    return Thing(*(words[rng.integers(len(words))] for words in (tuple(DIAMETERS), tuple(COLOURS), SHAPES)))


def write_captions(scene: Scene, rng: np.random.Generator, num_captions: int = NUM_CAPTIONS) -> list[str]:
    """Different wordings of a scene, each of which says all of it."""
    captions = {}  # a dict keeps the order
    while len(captions) < num_captions:
        captions[_write_caption(scene, rng)] = None
    return list(captions)


def _write_caption(scene: Scene, rng: np.random.Generator) -> str:
    def choose(words: tuple[str, ...]) -> str:
        return words[rng.integers(len(words))]

    if scene.kind != "two":
        there = "there is" if scene.count == 1 else "there are"
        form = choose(("{}", "{}", "a picture of {}", there + " {}"))
        return form.format(
            _name_thing(scene.thing, choose, choose(COUNT_WORDS[scene.count]), is_plural=scene.count > 1)
        )
    scene = scene if rng.random() < 0.5 else scene.turned()
    one, other = (_name_thing(thing, choose, "a") for thing in (scene.thing, scene.other))
    form = choose(("{0} {1} {2}", "{0} {1} {2}", "{0} is {1} {2}", "a picture of {0} {1} {2}", "{2} with {0} {1} it"))
    return form.format(one, choose(RELATION_WORDS[scene.relation]), other)


def _name_thing(thing: Thing, choose, number: str, is_plural: bool = False) -> str:
    shape = thing.shape + ("es" if thing.shape.endswith("s") else "s") * is_plural
    form = choose(("{0} {1} {2} {3}", "{0} {1} {2} {3}", "{0} {1} {3} in {2}"))
    return form.format(number, choose(SIZE_WORDS[thing.size]), thing.colour, shape)


# ------------------------------------------------------------------------------------------------------------ files


def make_example(scene: Scene, rng: np.random.Generator, size: int) -> dict:
    """One row of the parquet files, as `FEATURES` names its columns; the columns of what is not there are null."""
    buffer = io.BytesIO()
    draw_layout(place_scene(scene, rng), size).save(buffer, format="PNG", optimize=True)
    second = scene.other or (None,) * len(Thing._fields)
    return {
        "image": {"bytes": buffer.getvalue(), "path": None},
        "captions": write_captions(scene, rng),
        "kind": scene.kind,
        "count": scene.count,
        **{f"{name}_1": word for name, word in zip(Thing._fields, scene.thing, strict=True)},
        "relation": scene.relation,
        **{f"{name}_2": word for name, word in zip(Thing._fields, second, strict=True)},
    }


def read_scene(row: dict) -> Scene:
    """The scene of a row.

    Raises:
        ValueError: For words that are not those of `scenes.py`, or a column that is missing.
    """
    try:
        thing, other = (Thing(*(row[f"{name}_{number}"] for name in Thing._fields)) for number in (1, 2))
        scene = Scene(thing, row["count"], row["relation"], other if row["relation"] is not None else None)
    except KeyError as error:
        raise ValueError(f"a row of shapes needs the columns {sorted(FEATURES)}; {error} is missing") from error
    things = [thing] if scene.other is None else [thing, scene.other]
    is_known = all(t.size in DIAMETERS and t.colour in COLOURS and t.shape in SHAPES for t in things)
    if not is_known or scene.relation not in (None, *RELATIONS) or scene.count not in range(1, MAX_COUNT + 1):
        raise ValueError(f"a row has words that shapes do not: {scene}")
    return scene


def write_readme(num_rows: dict[str, int], size: int, seed: int, unseen: list[str]) -> str:
    """The text of the data's README: what it is, what is held out, and which words `train` does not have."""
    seen = "every word of the other splits' captions stands\nin `train`"
    if unseen:
        seen = f"`train` is so small that it lacks words\nof the other splits' captions: {', '.join(unseen)}"
    pairs = ", ".join(f"{colour} {shape}" for colour, shape in sorted(hold_out_pairs()))
    counts = "\n".join(f"| `{split}` | {num_rows[split]:,} |" for split in SPLITS)
    return f"""# Shapes with captions

Scenes of one thing, of two left of, right of, above or below each other, and of two to {MAX_COUNT} of a kind;
{len(COLOURS)} colours, {len(SHAPES)} shapes, {len(DIAMETERS)} sizes; {size} x {size} pixels, seed {seed}, made by
`training/prepare_shapes.py` with Pillow {version("pillow")}. Columns: {", ".join(f"`{name}`" for name in FEATURES)}.

| split | pictures |
|---|---:|
{counts}

`train` and `validation` show neither the pairs nor the triples below; {seen}.
`test_pairs` shows one of {len(hold_out_pairs())} of the {len(COLOURS) * len(SHAPES)} (colour, shape) pairs at least,
in whatever size and number: {pairs}.
`test_triples` shows one of {len(hold_out_triples())} of the {len(list_triples()):,} triples
(pair, left of or above, pair) of two different pairs that are in `train`; a triple is the same, said from the other
side, and whatever the sizes.
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draws scenes of coloured shapes with captions.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/shapes"), help="where the parquet files go")
    parser.add_argument("--num_train", type=int, default=40_000, help="scenes to train on")
    parser.add_argument("--num_test", type=int, default=2_000, help="scenes of each of the other splits")
    parser.add_argument("--size", type=int, default=60, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="of scenes, places and captions, not of what is held out")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    num_rows = {split: args.num_train if split == "train" else args.num_test for split in SPLITS}
    prepare(args.output_dir, num_rows, args.size, args.seed)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_shapes.py: {error}")
