"""The filter of captions: each rule's examples, what is written from parquet and tar shards, and the counts."""

import io
import json
import sys
import tarfile

import datasets
import hypothesis.strategies as st
import pyarrow.parquet as pq
import pytest
from boilerplate import PHRASES, remove_boilerplate
from filter_captions import find_fault, find_picture_fault, load_detector, main, parse_arguments
from hypothesis import given, settings
from PIL import Image
from tiny_training import encode_picture, write_parquet

from hf_dalle.data import load_rows


SQUARE = encode_picture(Image.new("RGB", (8, 8), "red"))
GOOD = "a red fox in the snow"
OPTIONS = parse_arguments(["--data_dir", "a", "--output_dir", "b"])


def write(folder, captions, images=None, name="train.parquet", column="caption"):
    images = images or [SQUARE] * len(captions)
    rows = [{"image": image, column: text} for image, text in zip(images, captions, strict=True)]
    write_parquet(folder / name, rows)
    return folder


def filter_captions(data, output_dir, *options):
    main(["--data_dir", str(data), "--output_dir", str(output_dir), *options])
    return json.loads((output_dir / "report.json").read_text())


def read(folder, column="caption", name="train.parquet"):
    return pq.read_table(folder / name)[column].to_pylist()


def write_tar(path, samples):
    """Samples, dicts from an ending to bytes, in the order of their keys, as `img2dataset` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, sample in samples.items():
            for ending, content in sample.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def list_members(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


# -------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize("phrase", PHRASES, ids=lambda phrase: phrase.name)
def test_each_phrase_has_a_caption_that_goes_and_one_that_stays(phrase):
    assert find_fault(OPTIONS, phrase.dropped) == f"boilerplate ({phrase.name})"
    assert find_fault(OPTIONS, phrase.kept) is None


@pytest.mark.parametrize(
    "date",
    [
        *("12 May 2010", "12th of May, 2010", "Saturday, May 12th, 2010", "Sat 12 May 2010", "May 2010", "sept. 2010"),
        *(
            "2010-05-12",
            "2010:05:12 14:05:33",
            "12.05.2010",
            "5/12/10",
            "20100512",
            "1912",
            "3rd June 1999 at 5:30 pm",
        ),
    ],
)
@pytest.mark.parametrize("phrase", ["photographed on {}", "{}", "This photo was taken in {}", "uploaded {}."])
def test_forms_of_dates(phrase, date):
    assert find_fault(OPTIONS, phrase.format(date)).startswith("boilerplate")


@pytest.mark.parametrize("caption", ["a disco of the 1980s era", "route 66 road sign", "may 12 protesters march"])
def test_numbers_that_are_no_dates(caption):
    assert remove_boilerplate(caption) == (caption, None)


def test_short_and_empty_captions():
    assert [find_fault(OPTIONS, text) for text in ("red fox", "a b", "12 ...", "", "a red fox")] == [
        *("too short", "too short", "no caption", "no caption"),
        None,
    ]


@pytest.mark.slow  # 8 CPU-seconds, most of them to load 75 languages
def test_language():
    pytest.importorskip("lingua")
    args = parse_arguments(["--data_dir", "a", "--output_dir", "b", "--language", "en"])
    english = (
        "a red fox in the snow",
        "golden retriever puppy",
        "the interior of the restaurant",
        "12 monkeys in hats",
    )
    assert [find_fault(args, text) for text in english] == [None] * 4
    others = ("un homme surfant sur une vague", "rote Rosen in einer Vase auf dem Tisch", "남자가 파도를 타고 있다")
    assert [find_fault(args, text) for text in others] == ["not en"] * 3
    assert [find_fault(OPTIONS, text) for text in others] == [None] * 3


def test_a_detector_that_is_missing_or_a_language_that_is_none(tmp_path, monkeypatch):
    write(tmp_path / "data", [GOOD])
    load_detector.cache_clear()
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "lingua", None)
        with pytest.raises(OSError, match="pip install lingua-language-detector"):
            filter_captions(tmp_path / "data", tmp_path / "left", "--language", "en")
    assert not (tmp_path / "left").exists()
    pytest.importorskip("lingua")
    with pytest.raises(ValueError, match="'english'; expected a code of two letters"):
        filter_captions(tmp_path / "data", tmp_path / "left", "--language", "english")


@pytest.mark.parametrize(
    ("size", "fault"), [((8, 8), None), ((16, 8), None), ((8, 17), "aspect ratio"), ((17, 8), "aspect ratio")]
)
def test_aspect_ratio_is_read_from_the_header(size, fault):
    encoded = encode_picture(Image.new("RGB", size))
    header = encoded[:60]  # a PNG's size stands in its first bytes; the pixels are not there
    assert find_picture_fault(OPTIONS, {"bytes": encoded}) == find_picture_fault(OPTIONS, {"bytes": header}) == fault


# -------------------------------------------------------------------------------------------------- what is written


CAPTIONS = st.sampled_from(
    [GOOD, "red", "", None, "IMG_1234.jpg", "photographed on 12 May 2010", "two dogs on a beach"]
)
IMAGES = st.sampled_from([SQUARE, b"broken", None, encode_picture(Image.new("RGB", (20, 4)))])


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.tuples(st.one_of(CAPTIONS, st.text(max_size=20)), IMAGES), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
)
def test_kept_and_dropped_are_all_in_order_and_nothing_goes_twice(tmp_path_factory, rows, batch_size):
    folder = tmp_path_factory.mktemp("filter")
    rows = [*rows, (GOOD, SQUARE)]
    captions, images = zip(*rows, strict=True)
    write(folder / "data", captions, images)
    options = ("--batch_size", str(batch_size))
    report = filter_captions(folder / "data", folder / "once", *options)
    assert report["num_kept"] + sum(report["dropped"].values()) == report["num_rows"] == len(rows)
    kept = [
        (text, image)
        for text, image in rows
        if text and find_fault(OPTIONS, text) is None and find_picture_fault(OPTIONS, {"bytes": image}) is None
    ]
    assert read(folder / "once") == [text for text, _ in kept]
    assert [image["bytes"] for image in read(folder / "once", "image")] == [image for _, image in kept]
    again = filter_captions(folder / "once", folder / "twice", *options)
    assert again["dropped"] == {} and again["num_kept"] == len(kept)
    assert pq.read_table(folder / "twice" / "train.parquet").equals(pq.read_table(folder / "once" / "train.parquet"))


def test_lists_of_captions_lose_those_that_are_nothing(tmp_path):
    captions = [[GOOD, "red"], ["IMG_1234.jpg", "red"], ["red", "two dogs on a beach", GOOD], []]
    write(tmp_path / "data", captions, column="captions")
    report = filter_captions(tmp_path / "data", tmp_path / "left", "--caption_column", "captions")
    assert read(tmp_path / "left", "captions") == [[GOOD], ["two dogs on a beach", GOOD]]
    assert report["dropped"] == {"boilerplate (file name)": 1, "no caption": 1}
    assert report["num_other_captions_dropped"] == 2


def test_shards_are_filtered_alike_by_any_number_of_processes_and_load(tmp_path, capsys):
    names = [f"train-{index:05d}-of-00003.parquet" for index in range(3)]
    for index, name in enumerate(names):
        write(tmp_path / "data", ["red", *[f"{GOOD} {index}"] * (index > 0)], name=name)  # nothing of the first stays
    reports = []
    for num_workers in (1, 2):
        output_dir = tmp_path / str(num_workers)
        reports.append(filter_captions(tmp_path / "data", output_dir, "--num_workers", str(num_workers)))
        assert sorted(path.name for path in output_dir.iterdir()) == ["report.json", *names]
    assert reports[0] == reports[1] and reports[0]["samples"] == {"too short": ["red"]}
    assert reports[0]["settings"]["min_words"] == 3
    assert "2 of 5 rows kept." in capsys.readouterr().out
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    rows = load_rows(str(tmp_path / "1"))
    assert rows["caption"][:] == [f"{GOOD} 1", f"{GOOD} 2"] and isinstance(rows.features["image"], datasets.Image)


def test_samples_are_the_same_whatever_the_shards(tmp_path):
    captions = [*(f"word{index}" for index in range(60)), GOOD, GOOD, GOOD]
    write(tmp_path / "one", captions)
    for index in range(3):
        write(tmp_path / "three", captions[index::3], name=f"train-{index:05d}-of-00003.parquet")
    one, three = (filter_captions(tmp_path / name, tmp_path / f"{name}-left") for name in ("one", "three"))
    assert one["samples"] == three["samples"] and len(set(one["samples"]["too short"])) == 20


def test_tar_shards(tmp_path):
    """As `img2dataset` writes them: three members a picture, a parquet file of metadata beside each shard."""
    samples = {}
    texts = [GOOD, "IMG_1234.jpg", "two dogs on a beach", GOOD]
    for index, text in enumerate(texts):
        image = encode_picture(Image.new("RGB", (30, 8) if index == 3 else (8, 8), "red"), "JPEG")
        values = {"caption": text, "url": "http://example.com/a.jpg", "width": 8, "height": 8, "status": "success"}
        samples[f"{index:09d}"] = {"jpg": image, "txt": text.encode(), "json": json.dumps(values).encode()}
    path = write_tar(tmp_path / "data" / "00000.tar", samples)
    write(tmp_path / "data", texts, name="00000.parquet")
    for column in ("txt", "caption"):
        output_dir = tmp_path / column
        report = filter_captions(tmp_path / "data", output_dir, "--caption_column", column)
        assert report["dropped"] == {"aspect ratio": 1, "boilerplate (file name)": 1} and report["num_kept"] == 2
        members = [part for part in list_members(path) if part[0].split(".")[0] in ("000000000", "000000002")]
        assert list_members(output_dir / "00000.tar") == members
        assert sorted(file.name for file in output_dir.iterdir()) == ["00000.tar", "report.json"]
    with pytest.raises(ValueError, match=r"No row is left \(no caption: 4\). Is --caption_column title right"):
        filter_captions(tmp_path / "data", tmp_path / "none", "--caption_column", "title")


@pytest.mark.parametrize("name", ["train.parquet", "train.tar"])
def test_what_is_damaged_or_in_the_way_is_named(tmp_path, name):
    data, output_dir = tmp_path / "data", tmp_path / "left"
    with pytest.raises(OSError, match="neither .tar nor .parquet"):
        filter_captions(tmp_path, output_dir)
    values = json.dumps({"caption": GOOD}).encode()
    samples = {str(index): {"png": SQUARE, "json": values} for index in range(9)}
    path = write_tar(data / name, samples) if name.endswith("tar") else write(data, [GOOD] * 9) / name
    with pytest.raises(ValueError, match="--output_dir is --data_dir"):
        filter_captions(data, data)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2 + 100])
    with pytest.raises(OSError, match=f"{name} is damaged"):
        filter_captions(data, output_dir)
    assert list(output_dir.iterdir()) == []  # no half a shard, no report
    path.write_bytes(whole)
    assert filter_captions(data, output_dir)["num_kept"] == 9
    (output_dir / f"old-{name}").write_bytes(whole)
    with pytest.raises(ValueError, match=f"holds old-{name}"):
        filter_captions(data, output_dir)
    if name == "train.parquet":
        with pytest.raises(ValueError, match="no column 'title'; it has image, caption"):
            filter_captions(data, tmp_path / "other", "--caption_column", "title")
