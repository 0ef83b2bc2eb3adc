"""Tests of training/prepare_emoji.py and what it draws by, on tiny packages in the sets' own formats; the slow one
makes the real data.
"""

import csv
import io
import json
import shutil
import sys
import tarfile
from pathlib import Path

import datasets
import emoji_drawings
import emoji_sets
import numpy as np
import prepare_emoji
import pytest
from PIL import Image


REPO = Path(__file__).parents[1]
SHAPES = {
    "arrow-left": '<path fill="#f00" d="M0 0h8v16H0z"/>',  # the left half is red
    "heart": '<path fill="#0f0" d="M0 0h16v8H0z"/>',  # the upper half is green
    "twin": '<path fill="#0f0" d="M0 0h16v8H0z"/>',
    "heart-dark": '<path fill="#010" d="M0 0h16v8H0z"/>',
    "flag": '<path fill="#00f" d="M0 0h16v16H0z"/>',
    "wide": '<path fill="#00f" d="M0 0h16v8H0z"/>',
}
ICON_SET = {
    "prefix": "tiny",
    "width": 16,
    "height": 16,
    "icons": {name: {"body": body} for name, body in SHAPES.items()},
    "aliases": {
        "arrow-right": {"parent": "arrow-left", "hFlip": True},
        "arrow-left-again": {"parent": "arrow-right", "hFlip": True},
        "arrow-up": {"parent": "arrow-left", "rotate": 1},
        "arrow-down": {"parent": "arrow-up", "rotate": 2},
        "arrow-down-too": {"parent": "arrow-up", "hFlip": True},
        "arrow-up-too": {"parent": "arrow-down", "rotate": 2, "vFlip": True},
        "heart-upside-down": {"parent": "heart", "vFlip": True},
        "lost": {"parent": "nowhere"},
        "loop": {"parent": "loop"},
    },
}
ICON_SET["icons"]["wide"]["height"] = 8
CHARS = {
    "2764": "heart",  # emojibase: 2764-FE0F
    "2764-1f3ff": "heart-dark",
    "1f448": "arrow-left",
    "1f449": "arrow-right",
    "1f441-1f5e8": "wide",  # emojibase: with FE0F and ZWJ
    "1f49a": "twin",  # draws what 2764 draws
    "1f1f0-1f1f7": "flag",
    "1f3ff": "flag",
    "1f1e6": "flag",
}
GROUPS = {"groups": {"0": "smileys-emotion", "1": "people-body", "2": "component", "9": "flags"}}
ENTRIES = [  # hexcode, order, group, English name, Korean name, tags
    ("1F49A", 9, 0, "green heart", "초록색 하트", ["green"]),
    ("2764-FE0F", 1, 0, "red heart", "빨간색 하트", ["emotion", "heart", "love", "red", "x", "y", "z"]),
    ("1F448", 2, 1, "backhand index pointing left", "왼쪽을 가리키는 손등", ["finger"]),
    ("1F449", 3, 1, "backhand index pointing right", "오른쪽을 가리키는 손등", []),
    ("1F441-FE0F-200D-1F5E8-FE0F", 4, 0, "eye in speech bubble", "말풍선 속 눈", ["witness"]),
    ("1F1F0-1F1F7", 5, 9, "flag: South Korea", "깃발: 대한민국", ["flag"]),
    ("1F3FF", 6, 2, "dark skin tone", "검은색 피부", []),
    ("1F1E6", None, None, "regional indicator A", "지역 기호 A", []),
]
CONCEPTS = ("2764-FE0F", "1F448", "1F449", "1F441-FE0F-200D-1F5E8-FE0F")


def pack(folder, package, version, files, manifest=None):
    """Writes a .tgz as `npm pack` does."""
    manifest = manifest or {"name": package, "version": version}
    files = {"package.json": json.dumps(manifest).encode()} | files
    with tarfile.open(folder / f"{package.removeprefix('@').replace('/', '-')}-{version}.tgz", "w:gz") as archive:
        for path, data in files.items():
            member = tarfile.TarInfo(f"package/{path}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def encode_webp(color):
    """A transparent picture with a filled square in the middle, 32 x 33."""
    image = Image.new("RGBA", (32, 33), (0, 0, 0, 0))
    image.paste(color, (8, 8, 24, 24))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


def pack_names(folder):
    def entry(hexcode, order, group, label, tags):
        skins = [{"hexcode": f"{hexcode}-1F3FF", "label": f"{label}: dark skin tone", "order": 99, "group": group}]
        placed = {} if order is None else {"order": order, "group": group}
        return {"hexcode": hexcode, "label": label, "tags": tags, "skins": skins} | placed

    files = {
        "en/data.json": [entry(h, order, group, en, tags) for h, order, group, en, _, tags in ENTRIES],
        "ko/data.json": [entry(h, order, group, ko, tags) for h, order, group, _, ko, tags in ENTRIES],
        "meta/groups.json": GROUPS,
    }
    files = {path: json.dumps(content).encode() for path, content in files.items()}
    pack(folder, *emoji_sets.NAMES_PACKAGE, files)


@pytest.fixture
def cache_dir(tmp_path):
    """All packages, as if fetched before; those of the further sets tell no emoji (as theirs do not)."""
    folder = tmp_path / "npm"
    folder.mkdir()
    pack_names(folder)
    icons = {"icons.json": json.dumps(ICON_SET).encode(), "chars.json": json.dumps(CHARS).encode()}
    webps = {hexcode: encode_webp((index * 40, 0, 200, 255)) for index, hexcode in enumerate(CHARS)}
    webps["1f49a"] = webps["2764"]
    webps = {f"assets/{hexcode}.webp": data for hexcode, data in webps.items()}
    for emoji_set in emoji_sets.EMOJI_SETS:
        pack(folder, emoji_set.package, emoji_set.version, webps if emoji_set.style == "fluent-3d" else icons)
    for emoji_set in emoji_sets.MORE_EMOJI_SETS:
        pack(folder, emoji_set.package, emoji_set.version, icons | {"chars.json": b"{}"})
    return folder


@pytest.fixture
def split_file(tmp_path):
    """The pictures that the packages above must give: four concepts of five styles, each concept in another split."""
    names = {entry[0]: entry[3] for entry in ENTRIES}
    rows = [
        (hexcode, emoji_set.style, split, names[hexcode])
        for hexcode, split in zip(CONCEPTS, prepare_emoji.SPLITS, strict=True)
        for emoji_set in emoji_sets.EMOJI_SETS
    ]
    return write_split(tmp_path / "split.csv", rows)


@pytest.fixture
def more_file(tmp_path):
    """One picture each of the further sets, of a concept that is in `train`."""
    rows = [("2764-FE0F", emoji_set.style, "heart", "red heart") for emoji_set in emoji_sets.MORE_EMOJI_SETS]
    return write_more(tmp_path / "more.csv", rows)


def write_split(path, rows):
    return write_csv(path, [("hexcode", "style", "split", "name"), *rows])


def write_more(path, rows):
    return write_csv(path, [("hexcode", "style", "icon", "name"), *rows])


def write_csv(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def read_rows(output_dir, split):
    return list(datasets.Dataset.from_parquet(str(output_dir / f"{split}.parquet"), cache_dir=output_dir / "cache"))


def draw(name, size=16):
    return emoji_drawings.draw_icon(emoji_drawings.resolve_icon(ICON_SET, name), size)


def test_hexcodes_lose_case_variation_selectors_and_joiners():
    assert emoji_sets.normalize_hexcode("1f441-fe0f-200d-1f5e8-fe0f") == "1F441-1F5E8"
    assert emoji_sets.normalize_hexcode("0023-FE0F-20E3") == "0023-20E3"
    assert emoji_sets.normalize_hexcode("1F994") == "1F994"


def test_caption_forms():
    phrases = [emoji_set.phrase for emoji_set in emoji_sets.EMOJI_SETS]
    assert phrases == ["a noto", "a twemoji", "an outlined openmoji", "a flat fluent", "a glossy 3d"]
    first = "a glossy 3d style emoji of hedgehog"
    tags = ["animal", "hedgehog", "spiny", "b", "c", "d", "e", "f"]
    assert prepare_emoji.make_captions("a glossy 3d", "hedgehog", tags) == [
        first,
        f"{first}, animal, spiny, b, c, d, e",
    ]
    assert prepare_emoji.make_captions("a glossy 3d", "hedgehog", ["hedgehog"]) == [first]


def test_aliases_flip_and_turn():
    red, white = (255, 0, 0), (255, 255, 255)

    def sides(name):
        image = draw(name)
        return [image.getpixel(point) == red for point in ((2, 8), (13, 8), (8, 2), (8, 13))]

    assert draw("arrow-left").getpixel((2, 8)) == red and draw("arrow-left").getpixel((13, 8)) == white
    assert sides("arrow-left")[:2] == sides("arrow-left-again")[:2] == [True, False]
    assert sides("arrow-right")[:2] == [False, True]
    # A quarter turn clockwise takes the left side up.
    assert sides("arrow-up")[2:] == [True, False]
    # Iconify flips before it turns, wherever in the chain of aliases each stands.
    assert sides("arrow-down")[2:] == sides("arrow-down-too")[2:] == [False, True]
    assert sides("arrow-up-too") == sides("arrow-up")
    assert draw("heart").getpixel((8, 2)) == draw("heart-upside-down").getpixel((8, 13)) == (0, 255, 0)
    assert draw("arrow-left-again").tobytes() == draw("arrow-left").tobytes()


@pytest.mark.parametrize("name", ["lost", "loop", "unheard-of"])
def test_an_alias_to_nowhere_is_refused(name):
    with pytest.raises(ValueError, match=f"no icon behind the name '{name if name != 'lost' else 'nowhere'}'"):
        emoji_drawings.resolve_icon(ICON_SET, name)


def test_pictures_are_whole_centred_and_on_white():
    wide = draw("wide")
    assert wide.size == (16, 16) and wide.mode == "RGB"
    assert [wide.getpixel((8, y)) == (0, 0, 255) for y in (2, 5, 10, 13)] == [False, True, True, False]
    webp = emoji_drawings.draw_webp(encode_webp((200, 0, 0, 255)), 33)
    assert webp.size == (33, 33) and webp.mode == "RGB"
    assert webp.getpixel((0, 0)) == webp.getpixel((32, 32)) == (255, 255, 255)
    assert webp.getpixel((16, 16)) == (200, 0, 0)


def test_prepare_joins_pictures_names_and_splits(tmp_path, cache_dir, split_file, more_file):
    assert prepare_emoji.prepare(tmp_path / "out", cache_dir, 24, split_file, more_file)
    for hexcode, split in zip(CONCEPTS, prepare_emoji.SPLITS, strict=True):
        rows = read_rows(tmp_path / "out", split)
        assert [(row["hexcode"], row["style"]) for row in rows] == [(hexcode, s.style) for s in emoji_sets.EMOJI_SETS]
        assert all(row["image"].size == (24, 24) and row["image"].format == "PNG" for row in rows)
    train = read_rows(tmp_path / "out", "train")
    first = "an outlined openmoji style emoji of red heart"
    assert train[2]["captions"] == [first, f"{first}, emotion, heart, love, red, x, y"]
    assert train[4]["caption_ko"] == "반짝이는 3d 스타일 빨간색 하트 이모지"
    assert train[0]["name"] == "red heart" and train[0]["group"] == "smileys-emotion"
    pointing_right = read_rows(tmp_path / "out", "test_style")[0]
    assert pointing_right["captions"] == ["a noto style emoji of backhand index pointing right"]
    assert pointing_right["image"].convert("RGB").getpixel((20, 12)) == (255, 0, 0)
    more = read_rows(tmp_path / "out", "train_more")
    assert [row["style"] for row in more] == [emoji_set.style for emoji_set in emoji_sets.MORE_EMOJI_SETS]
    assert more[0]["captions"][0] == "a blob noto style emoji of red heart"
    assert more[0]["image"].tobytes() == train[0]["image"].tobytes()
    readme = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    sets = (*emoji_sets.EMOJI_SETS, *emoji_sets.MORE_EMOJI_SETS)
    assert all(s.credit in readme and s.license in readme and s.version in readme for s in sets)


def test_two_runs_give_equal_bytes_and_a_whole_one_stays(tmp_path, cache_dir, split_file, more_file, capsys):
    def files(name):
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    for name in ("one", "two"):
        assert prepare_emoji.prepare(tmp_path / name, cache_dir, 24, split_file, more_file)
    assert files("one") == files("two")
    capsys.readouterr()
    assert not prepare_emoji.prepare(tmp_path / "one", tmp_path / "no-cache", 24, split_file, more_file)
    assert "holds all 25 pictures already" in capsys.readouterr().out
    # Another size, and a file that was cut, are made again.
    assert prepare_emoji.prepare(tmp_path / "one", cache_dir, 16, split_file, more_file)
    assert read_rows(tmp_path / "one", "train")[0]["image"].size == (16, 16)
    (tmp_path / "two" / "train.parquet").write_bytes(files("two")["train.parquet"][:-100])
    assert prepare_emoji.prepare(tmp_path / "two", cache_dir, 24, split_file, more_file)


def test_skin_tones_flags_and_components_are_dropped(cache_dir):
    names = emoji_sets.fetch_package(*emoji_sets.NAMES_PACKAGE, cache_dir)
    assert [concept.hexcode for concept in emoji_sets.read_concepts(names)] == [*CONCEPTS, "1F49A"]


def test_of_equal_pictures_the_first_in_order_stays(cache_dir):
    concepts = emoji_sets.read_concepts(emoji_sets.fetch_package(*emoji_sets.NAMES_PACKAGE, cache_dir))
    for emoji_set in emoji_sets.EMOJI_SETS:
        files = emoji_sets.fetch_package(emoji_set.package, emoji_set.version, cache_dir)
        drawings = emoji_drawings.read_drawings(emoji_set, files)
        # At 1 pixel all look alike, yet the choice is made at one size for all.
        for size in (1, 24):
            assert list(emoji_drawings.draw_pictures(emoji_set.style, drawings, concepts, size)) == list(CONCEPTS)


def test_other_pictures_than_the_splits_are_refused(tmp_path, cache_dir, split_file, more_file):
    with open(split_file, encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    surplus = write_split(tmp_path / "surplus.csv", rows[1:])
    with pytest.raises(ValueError, match=r"0 missing.*1 that it does not have, such as \[\('2764-FE0F', 'noto'\)\]"):
        prepare_emoji.prepare(tmp_path / "out", cache_dir, 24, surplus, more_file)
    missing = write_split(tmp_path / "missing.csv", [*rows, ("1F49A", "noto", "train", "green heart")])
    with pytest.raises(ValueError, match=r"1 missing, such as \[\('1F49A', 'noto'\)\], and 0 that"):
        prepare_emoji.prepare(tmp_path / "out", cache_dir, 24, missing, more_file)
    assert not (tmp_path / "out").exists()


def test_a_bad_split_file_or_size_is_refused(tmp_path, cache_dir, split_file, more_file):
    row = ("2764-FE0F", "noto", "train", "red heart")
    with pytest.raises(ValueError, match="names 1 pictures more than once"):
        prepare_emoji.read_split(write_split(tmp_path / "twice.csv", [row, row]))
    with pytest.raises(ValueError, match="expected a style of"):
        prepare_emoji.read_split(write_split(tmp_path / "style.csv", [("2764-FE0F", "blob", "train", "red heart")]))
    row = ("2764-FE0F", "noto", "heart", "red heart")
    with pytest.raises(ValueError, match="expected a style of"):
        prepare_emoji.read_more(write_more(tmp_path / "more_style.csv", [row]), [])
    kept_back = prepare_emoji.SplitRow("2764-FE0F", "noto", "test_compose", "red heart")
    with pytest.raises(ValueError, match="is of test_compose, which no style may train"):
        prepare_emoji.read_more(write_more(tmp_path / "kept.csv", [("2764-FE0F", "fxemoji", *row[2:])]), [kept_back])
    more = ("2764-FE0F", "fxemoji", *row[2:])
    with pytest.raises(ValueError, match=r"names 1 pictures more than once, such as \[\('2764-FE0F', 'fxemoji'\)\]"):
        prepare_emoji.read_more(write_more(tmp_path / "more_twice.csv", [more, more]), [])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        prepare_emoji.prepare(tmp_path / "out", cache_dir, 0, split_file, more_file)


def test_a_package_of_another_version_or_a_damaged_one_is_refused(tmp_path):
    pack(tmp_path, "emojibase-data", "17.0.0", {}, {"name": "emojibase-data", "version": "16.0.0"})
    with pytest.raises(ValueError, match="holds emojibase-data 16.0.0, expected emojibase-data 17.0.0: delete it"):
        emoji_sets.fetch_package("emojibase-data", "17.0.0", tmp_path)
    path = tmp_path / "emojibase-data-17.0.0.tgz"
    for damaged in (path.read_bytes()[:-40], b"", b"not a package"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no whole npm package.*delete it and run again"):
            emoji_sets.fetch_package("emojibase-data", "17.0.0", tmp_path)


def test_a_broken_picture_is_named(cache_dir):
    with pytest.raises(ValueError, match="the noto picture of 2764-FE0F cannot be drawn"):
        icon_set = ICON_SET | {"icons": {"heart": {"body": "<path"}}, "aliases": {}}
        files = {"icons.json": json.dumps(icon_set), "chars.json": json.dumps({"2764": "heart"})}
        drawings = emoji_drawings.read_drawings(emoji_sets.EMOJI_SETS[0], files)
        concepts = [emoji_sets.Concept("2764-FE0F", "하트", (), "smileys-emotion")]
        emoji_drawings.draw_pictures("noto", drawings, concepts, 24)


def test_without_npm_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=r"npm.*was not found: install Node.js.*npm pack emojibase-data@17.0.0.*copy"):
        emoji_sets.fetch_package("emojibase-data", "17.0.0", tmp_path / "npm")


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_without_network_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm-cache"))
    with pytest.raises(OSError, match=r"(?s)npm could not fetch emojibase-data@17.0.0.*Check the network"):
        emoji_sets.fetch_package("emojibase-data", "17.0.0", tmp_path / "npm")
    assert not list((tmp_path / "npm").iterdir())


def test_without_resvg_the_error_says_what_to_do(tmp_path, cache_dir, split_file, more_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(OSError, match="pip install resvg-py"):
        prepare_emoji.prepare(tmp_path / "out", cache_dir, 24, split_file, more_file)


@pytest.mark.slow
def test_the_real_data(tmp_path):
    """Fetches the real packages where `data/npm` does not hold them (about 45 MB)."""
    assert prepare_emoji.prepare(tmp_path, REPO / "data" / "npm")
    rows = {split: read_rows(tmp_path, split) for split in (*prepare_emoji.SPLITS, "train_more")}
    counts = {split: len(rows[split]) for split in rows}
    assert counts == {"train": 7559, "validation": 69, "test_style": 302, "test_compose": 124, "train_more": 4141}
    hedgehog = next(row for row in rows["train"] if row["hexcode"] == "1F994")
    assert hedgehog["captions"][0].endswith(" style emoji of hedgehog") and "고슴도치" in hedgehog["caption_ko"]

    def shrink(row):
        return np.asarray(row["image"].convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255

    # No further set trains a concept of test_compose, or nearly a picture that is held out.
    held_out = {}
    for row in (*rows["validation"], *rows["test_style"], *rows["test_compose"]):
        held_out.setdefault(row["hexcode"], []).append(row)
    assert not {row["hexcode"] for row in rows["train_more"]} & {row["hexcode"] for row in rows["test_compose"]}
    for row in rows["train_more"]:
        for other in held_out.get(row["hexcode"], ()):
            assert np.sqrt(np.mean((shrink(row) - shrink(other)) ** 2)) >= 0.08, (row["hexcode"], row["style"])
