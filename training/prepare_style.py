"""Makes a small caption-image set of one style that emoji-mini never saw, for `configs/emoji_mini_lora.yaml`.

100 black-and-white emoji of Fluent's high-contrast set to train on and 32 of other concepts to validate on, all of
concepts that the checkpoint knows in other styles. How emoji are fetched and drawn lives in `emoji_sets.py` and
`emoji_drawings.py`.

    python training/prepare_style.py --output_dir data/emoji-style
"""

import hashlib
from collections import Counter
from pathlib import Path

from emoji_drawings import check_drawing, draw_pictures, read_drawings
from emoji_sets import NAMES_CREDIT, NAMES_PACKAGE, EmojiSet, fetch_package, normalize_hexcode, read_concepts
from prepare_emoji import FEATURES, SPLIT_FILE, SplitRow, make_example, read_split, run_script
from shards import write_split


STYLE = EmojiSet(
    "high-contrast", "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "a high contrast", "고대비",
    "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) by Microsoft",
    "[MIT](https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE)",
)  # fmt: skip
NUM_PICTURES = {"train": 100, "validation": 32}
MIN_STYLES = 4  # a concept that few sets draw is one that the checkpoint hardly knows


def prepare(output_dir: Path, cache_dir: Path, size: int = 128) -> None:
    """Writes `train.parquet`, `validation.parquet` and a README with the licence.

    Args:
        output_dir: Where the files go; made when missing.
        cache_dir: Where the npm packages (.tgz) are kept, and looked for first.
        size: Side of the square pictures in pixels, at least 1.

    Raises:
        ValueError: A damaged package, or one of another version.
        OSError: npm is missing or cannot fetch a package, or resvg-py is missing.
    """
    check_drawing(size)
    concepts = {concept.hexcode: concept for concept in read_concepts(fetch_package(*NAMES_PACKAGE, cache_dir))}
    drawings = read_drawings(STYLE, fetch_package(STYLE.package, STYLE.version, cache_dir))
    drawn = {hexcode for hexcode in concepts if normalize_hexcode(hexcode) in drawings}
    splits = choose_concepts(read_split(SPLIT_FILE), drawn)
    chosen = [concepts[row.hexcode] for rows in splits.values() for row in rows]
    pictures = draw_pictures(STYLE.style, drawings, chosen, size)
    if len(pictures) < len(chosen):
        raise ValueError(f"{len(chosen) - len(pictures)} of the {len(chosen)} pictures repeat another one")
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        examples = [make_example(row, concepts[row.hexcode], pictures[row.hexcode], (STYLE,)) for row in rows]
        write_split(examples, FEATURES, output_dir / f"{split}.parquet")
        print(f"{split}: {len(examples)} pictures")
    (output_dir / "README.md").write_text(write_readme(splits, size), encoding="utf-8")


def choose_concepts(rows: list[SplitRow], drawn: set[str]) -> dict[str, list[SplitRow]]:
    """Chooses the concepts of each split: a fixed rule that no order of files or hash seed changes.

    Args:
        rows: The split file of the checkpoint's own data.
        drawn: Hexcodes of the concepts that the new style draws.

    Returns:
        For each split its rows, of the new style, in the order of the choice.

    Raises:
        ValueError: There are too few concepts.
    """
    num_styles = Counter(row.hexcode for row in rows if row.split == "train")
    names = {row.hexcode: row.name for row in rows}
    known = [hexcode for hexcode in names if hexcode in drawn and num_styles[hexcode] >= MIN_STYLES]
    known.sort(key=lambda hexcode: hashlib.sha256(hexcode.encode()).digest())
    if len(known) < sum(NUM_PICTURES.values()):
        raise ValueError(f"{len(known)} concepts are known and drawn, but {sum(NUM_PICTURES.values())} are needed")
    splits, first = {}, 0
    for split, count in NUM_PICTURES.items():
        splits[split] = [SplitRow(h, STYLE.style, split, names[h]) for h in known[first : first + count]]
        first += count
    return splits


def write_readme(splits: dict[str, list[SplitRow]], size: int) -> str:
    """The text of the data's README: what it is, licence and credit."""
    return f"""# Emoji of one more style

{len(splits["train"])} to train on and {len(splits["validation"])} of other concepts to validate on,
{size} x {size} pixels on white, made by `training/prepare_style.py`. Captions: "{STYLE.phrase} style emoji of ...".

Pictures: `{STYLE.package}` {STYLE.version}, {STYLE.credit}, {STYLE.license}.
Names, tags and Korean names: {NAMES_CREDIT}
"""


if __name__ == "__main__":
    run_script(prepare, "Makes 100 pictures of a new style to fine-tune emoji-mini on.", "data/emoji-style")
