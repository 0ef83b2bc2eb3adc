"""Makes the caption-image data of emoji-mini: emoji drawn by ten open sets, one parquet file a split.

Joins the pictures with the fixed lists in `training/data/` and writes `train`, `validation`, `test_style` and
`test_compose` of the five sets that measurements know, `train_more` of five further ones, and a README of licences and
credit. The sets live in `emoji_sets.py`, the drawing in `emoji_drawings.py`.

    python training/prepare_emoji.py --output_dir data/emoji
"""

import argparse
import csv
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet
from emoji_drawings import check_drawing, draw_pictures, read_drawings
from emoji_sets import (
    EMOJI_SETS,
    MORE_EMOJI_SETS,
    NAMES_CREDIT,
    NAMES_PACKAGE,
    Concept,
    EmojiSet,
    fetch_package,
    read_concepts,
)
from shards import write_split


SPLIT_FILE = Path(__file__).parent / "data" / "emoji_split.csv"
MORE_FILE = Path(__file__).parent / "data" / "emoji_more.csv"
SPLITS = ("train", "validation", "test_style", "test_compose")
MORE_SPLIT = "train_more"
MAX_TAGS = 6
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "caption_ko": datasets.Value("string"),
        "name": datasets.Value("string"),
        "hexcode": datasets.Value("string"),
        "style": datasets.Value("string"),
        "group": datasets.Value("string"),
    }
)


class SplitRow(NamedTuple):
    """A picture and the split that it belongs to; `icon` is its name in a set that does not tell which emoji it is."""

    hexcode: str
    style: str
    split: str
    name: str
    icon: str | None = None


def prepare(
    output_dir: Path, cache_dir: Path, size: int = 128, split_file: Path = SPLIT_FILE, more_file: Path = MORE_FILE
) -> bool:
    """Writes the five parquet files and their README, unless they are all there already.

    Args:
        output_dir: Where the files go; made when missing.
        cache_dir: Where the npm packages (.tgz) are kept, and looked for first.
        size: Side of the square pictures in pixels, at least 1.
        split_file: The csv of (hexcode, style, split, name) that says exactly which pictures there are.
        more_file: The csv of (hexcode, style, icon, name) of the sets that only add to training.

    Returns:
        True if the files were written, False if they were all there.

    Raises:
        ValueError: A package of another version or a damaged one, or pictures other than the split's.
        OSError: npm is missing or cannot fetch a package, or resvg-py is missing.
    """
    check_drawing(size)
    rows = read_split(split_file)
    rows += read_more(more_file, rows)
    readme = write_readme(rows, size)
    if is_complete(output_dir, rows, readme):
        print(f"{output_dir} holds all {len(rows):,} pictures already; remove it to make them again.")
        return False
    emoji_sets = (*EMOJI_SETS, *MORE_EMOJI_SETS)
    packages = {s.style: fetch_package(s.package, s.version, cache_dir) for s in emoji_sets}
    concepts = read_concepts(fetch_package(*NAMES_PACKAGE, cache_dir))
    pictures = {}
    for emoji_set in emoji_sets:
        icons = {row.hexcode: row.icon for row in rows if row.style == emoji_set.style and row.icon is not None}
        drawings = read_drawings(emoji_set, packages[emoji_set.style], icons or None)
        for hexcode, png in draw_pictures(emoji_set.style, drawings, concepts, size).items():
            pictures[hexcode, emoji_set.style] = png
    check_pictures(pictures, rows)
    by_hexcode = {concept.hexcode: concept for concept in concepts}
    examples = [make_example(row, by_hexcode[row.hexcode], pictures[row.hexcode, row.style]) for row in rows]
    output_dir.mkdir(parents=True, exist_ok=True)
    # Taken away first and put back last: where it is, the other files are whole and of one recipe.
    (output_dir / "README.md").unlink(missing_ok=True)
    for split in (*SPLITS, MORE_SPLIT):
        chosen = [example for example, row in zip(examples, rows, strict=True) if row.split == split]
        write_split(chosen, FEATURES, output_dir / f"{split}.parquet")
        print(f"{split}: {len(chosen):,} pictures")
    (output_dir / "README.md").write_text(readme, encoding="utf-8")
    print(f"{len(rows):,} pictures of {len({row.hexcode for row in rows}):,} concepts in {output_dir}")
    return True


def read_split(path: Path) -> list[SplitRow]:
    """Reads the split file and refuses unknown styles and splits and pictures named twice."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [SplitRow(r["hexcode"], r["style"], r["split"], r["name"]) for r in csv.DictReader(file)]
    styles = {emoji_set.style for emoji_set in EMOJI_SETS}
    for row in rows:
        if row.style not in styles or row.split not in SPLITS:
            raise ValueError(f"{path}: expected a style of {sorted(styles)} and a split of {SPLITS}, got {row}")
    _check_once(path, rows)
    return rows


def read_more(path: Path, rows: list[SplitRow]) -> list[SplitRow]:
    """
    Reads the list of further training pictures, and refuses unknown styles, concepts that `rows` keep for
    `test_compose`, and pictures named twice.
    """
    with open(path, encoding="utf-8", newline="") as file:
        more = [SplitRow(r["hexcode"], r["style"], MORE_SPLIT, r["name"], r["icon"]) for r in csv.DictReader(file)]
    styles = {emoji_set.style for emoji_set in MORE_EMOJI_SETS}
    held_out = {row.hexcode for row in rows if row.split == "test_compose"}
    for row in more:
        if row.style not in styles:
            raise ValueError(f"{path}: expected a style of {sorted(styles)}, got {row}")
        if row.hexcode in held_out:
            raise ValueError(f"{path}: {row.hexcode} ({row.name}) is of test_compose, which no style may train")
    _check_once(path, more)
    return more


def _check_once(path: Path, rows: list[SplitRow]) -> None:
    twice = [pair for pair, count in Counter((r.hexcode, r.style) for r in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names {len(twice)} pictures more than once, such as {twice[:5]}")


def is_complete(output_dir: Path, rows: list[SplitRow], readme: str) -> bool:
    """Whether `output_dir` holds exactly these pictures, made by this recipe (as its README tells it)."""
    try:
        if (output_dir / "README.md").read_text(encoding="utf-8") != readme:
            return False
        for split in (*SPLITS, MORE_SPLIT):
            path = output_dir / f"{split}.parquet"
            columns = pyarrow.parquet.read_table(path, columns=["hexcode", "style", "name"]).to_pydict().values()
            if list(zip(*columns, strict=True)) != [(r.hexcode, r.style, r.name) for r in rows if r.split == split]:
                return False
    except (OSError, ValueError):  # a file is not there or not whole
        return False
    return True


def check_pictures(pictures: dict[tuple[str, str], bytes], rows: list[SplitRow]) -> None:
    """Refuses pictures other than exactly those of the split file."""
    wanted = {(row.hexcode, row.style) for row in rows}
    missing, surplus = sorted(wanted - pictures.keys()), sorted(pictures.keys() - wanted)
    if missing or surplus:
        raise ValueError(
            f"the pictures drawn are not those of the split: {len(missing)} missing, such as {missing[:5]}, and "
            f"{len(surplus)} that it does not have, such as {surplus[:5]}. It was made with resvg-py 0.5.0; another "
            "version may tell duplicates apart differently: `pip install resvg-py==0.5.0` and run again"
        )


def make_captions(phrase: str, name: str, tags: Iterable[str]) -> list[str]:
    """The two forms of a caption: the name alone, then (where there are tags) with up to six of them."""
    caption = f"{phrase} style emoji of {name}"
    tags = [tag for tag in tags if tag != name][:MAX_TAGS]
    return [caption, f"{caption}, {', '.join(tags)}"] if tags else [caption]


def make_example(
    row: SplitRow, concept: Concept, png: bytes, emoji_sets: Iterable[EmojiSet] = (*EMOJI_SETS, *MORE_EMOJI_SETS)
) -> dict:
    """One row of the parquet files, as `FEATURES` names its columns."""
    emoji_set = next(s for s in emoji_sets if s.style == row.style)
    return {
        "image": {"bytes": png, "path": None},
        "captions": make_captions(emoji_set.phrase, row.name, concept.tags),
        "caption_ko": f"{emoji_set.phrase_ko} 스타일 {concept.name_ko} 이모지",
        "name": row.name,
        "hexcode": row.hexcode,
        "style": row.style,
        "group": concept.group,
    }


def write_readme(rows: list[SplitRow], size: int) -> str:
    """The text of the data's README: what it is, counts, licences and credit."""
    counts = Counter((row.style, row.split) for row in rows)
    count_lines, credit_lines = [], []
    for s in (*EMOJI_SETS, *MORE_EMOJI_SETS):
        cells = [s.style, f"{s.phrase} style emoji of ...", f"{s.phrase_ko} 스타일 ... 이모지"]
        cells += [f"{counts[s.style, split]:,}" for split in (*SPLITS, MORE_SPLIT)]
        count_lines.append(f"| {' | '.join(cells)} |")
        credit_lines.append(f"| {s.style} | `{s.package}` {s.version} | {s.credit} | {s.license} |")
    newline = "\n"
    return f"""# Emoji with captions

{len(rows):,} pictures of {len({row.hexcode for row in rows}):,} concepts, {size} x {size} pixels on white, made by
`training/prepare_emoji.py` with resvg-py {version("resvg-py")} and Pillow {version("pillow")}. Only `train` and
`{MORE_SPLIT}` train anything that ships; `test_style` holds styles kept back for concepts that are trained in other
styles, `test_compose` concepts that are trained in no style. Columns:
{", ".join(f"`{column}`" for column in FEATURES)}.

| style | caption | caption_ko | {" | ".join((*SPLITS, MORE_SPLIT))} |
|---|---|---|{"---:|" * (len(SPLITS) + 1)}
{newline.join(count_lines)}

## Licences and credit

| style | npm package | credit | licence |
|---|---|---|---|
{newline.join(credit_lines)}

Changes: drawn as pixels on white; pictures that repeat another one of their style left out.
Names, tags, groups and Korean names: {NAMES_CREDIT}
"""


def run_script(prepare: Callable[[Path, Path, int], object], description: str, output_dir: str) -> None:
    """Reads the command line of a script that makes pictures of emoji, and runs its `prepare`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="where the parquet files go")
    parser.add_argument("--cache_dir", type=Path, default=Path("data/npm"), help="where npm's packages are kept")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    arguments = parser.parse_args()
    try:
        prepare(arguments.output_dir, arguments.cache_dir, arguments.size)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    run_script(prepare, "Makes the pictures and captions that emoji-mini is trained on.", "data/emoji")
