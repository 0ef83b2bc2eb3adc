"""WebDataset tar shards: rows by number and in sequence alike, found in folders, damaged, missing."""

import io
import json
import multiprocessing
import tarfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import draw_picture, encode_picture, list_rows
from tiny_shards import make_samples, write_shards, write_tar

from hf_dalle import DalleImageProcessor
from hf_dalle.data import CaptionImageDataset, load_rows, open_picture
from hf_dalle.streams import open_dataset
from hf_dalle.tar_shards import TarRows, TarShards, find_samples


def open_rows(folder, streaming=False, **kwargs):
    rows = load_rows(str(folder), streaming=streaming)
    processor = DalleImageProcessor(size=16)
    return open_dataset(rows, image_processor=processor, caption_column="txt", is_training=False, **kwargs)


def test_rows_by_number_and_in_sequence_are_what_was_written(tmp_path):
    write_shards(tmp_path, (7, 5, 8))
    by_number, in_sequence = open_rows(tmp_path), open_rows(tmp_path, streaming=True)
    assert len(by_number) == 20 and in_sequence.rows.num_shards == 3
    assert by_number.describe() == "20 rows" and in_sequence.describe() == "3 shards, read in sequence"
    streamed = [item for _, item in in_sequence.read_all()]
    for (_, item), other, row, sample in zip(by_number.read_all(), streamed, list_rows(), make_samples(), strict=True):
        assert item["caption"] == other["caption"] == row["captions"][0]
        picture = open_picture(sample[1]["jpg"])
        [expected] = by_number.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
        assert torch.equal(item["pixel_values"], expected) and torch.equal(other["pixel_values"], expected)
    assert by_number.name_row(8) == "00001.tar/000000008" and in_sequence.rows.name_row(1, 1) == "00001.tar/1"


def test_columns_are_endings_and_keys_of_the_json(tmp_path):
    png, webp = encode_picture(draw_picture("red", "blue")), encode_picture(draw_picture("red", "blue"), "WEBP")
    samples = [
        ("a/1.x", {"png": png, "json": b'{"caption": "one"}', "txt": b"eins"}),
        ("a/2", {"WebP": webp, "json": b'{"caption": "two", "size": [1, 2]}', "cls": b"\xff"}),
        ("b/2", {"png": png, "txt": "zwei \u00fc".encode()}),
        ("c", {"json": b"[1]"}),
    ]
    shard = write_tar(tmp_path / "train-0.tar", samples)
    rows = TarRows([shard])
    names = {"caption", "cls", "image", "json", "png", "size", "txt", "webp", "x.png", "x.json", "x.txt"}
    assert set(rows.column_names) == names
    captions = [row["caption"] for row in rows.select_columns(["caption"])]
    assert captions == [None, "two", None, None]  # the first is key a/1 with endings x.png, x.json, x.txt
    assert [row["txt"] for row in rows] == [None, None, "zwei \u00fc", None]
    assert rows[1]["image"] == {"bytes": webp, "path": "a/2.WebP"} and rows[1]["cls"] == b"\xff"
    assert rows[2]["image"]["bytes"] == rows[2]["png"]["bytes"] == png and rows[3]["image"] is None
    assert list(TarShards([shard]).read(0)) == list(rows)
    with pytest.raises(ValueError, match=r"no column 'captions'; it has \['caption', 'cls'"):
        CaptionImageDataset(rows)
    with pytest.raises(ValueError, match="holds no tokens"):
        CaptionImageDataset(rows, caption_column="txt", tokens_column="size")


def test_rows_that_cannot_be_used_name_what_is_wrong(tmp_path):
    picture = encode_picture(draw_picture("red", "blue"))
    whole = {"png": picture, "txt": b"red", "json": b'{"caption": "red"}'}
    broken = [
        ({**whole, "txt": b"\xff"}, "broken .txt"),
        ({**whole, "json": b"{"}, "broken .json"),
        ({"txt": b"red", "json": whole["json"]}, "no picture"),
        ({**whole, "png": picture[:50]}, "broken picture"),
    ]
    write_tar(tmp_path / "train.tar", [("whole", whole), *((f"{n}", files) for n, (files, _) in enumerate(broken))])
    for column in ("txt", "caption"):
        datasets = [
            open_dataset(load_rows(str(tmp_path), streaming=streaming), image_processor=DalleImageProcessor(size=16),
                         caption_column=column)
            for streaming in (False, True)
        ]  # fmt: skip
        for dataset in datasets:
            results = [result for _, result in dataset.read_all()]
            assert isinstance(results[0], dict)
            for (_, reason), result in zip(broken, results[1:], strict=True):
                if ("json" in reason and column == "txt") or (".txt" in reason and column == "caption"):
                    assert isinstance(result, dict)  # what is not asked for need not be whole
                else:
                    assert isinstance(result, ValueError) and reason in str(result)


@pytest.mark.parametrize(
    "names, pattern",
    [
        (["train.tar", "validation.tar"], ""),
        (["train-00000-of-00001.tar", "validation-00000-of-00001.tar"], ""),
        (["train/a.tar", "validation/b.tar"], ""),
        (["x-train.tar", "x-validation.tar"], "x-{split}*.tar"),
    ],
)
def test_splits_of_tar_shards(tmp_path, names, pattern):
    write_tar(tmp_path / names[0], make_samples(0, 3))
    write_tar(tmp_path / names[1], make_samples(3, 4))
    for streaming in (False, True):
        found = [
            load_rows(str(tmp_path / pattern), split=split, streaming=streaming) for split in ("train", "validation")
        ]
        assert [len(rows.paths) for rows in found] == [1, 1]
        assert [rows.paths[0] for rows in found] == [tmp_path / name for name in names]


def test_folders_and_patterns_without_the_splits_name(tmp_path):
    write_shards(tmp_path / "cc3m", (2, 2))
    assert len(load_rows(str(tmp_path / "cc3m"))) == len(load_rows(str(tmp_path / "c*" / "*.tar"))) == 4
    for source in ("cc3m", "cc3m/*.tar"):
        with pytest.raises(OSError, match="validation"):
            load_rows(str(tmp_path / source), split="validation")
    (tmp_path / "cc3m" / "00000.parquet").write_bytes(b"")
    with pytest.raises(OSError, match="00000.parquet is no .tar file"):
        load_rows(str(tmp_path / "cc3m" / "*"))
    with pytest.raises(OSError, match="Found neither"):
        load_rows(str(tmp_path / "cc3m" / "x*.tar"))


# -------------------------------------------------------------------------------------------------- damaged shards


def list_keys(content):
    found = list(find_samples(io.BytesIO(content)))
    return [key for key, _, end in found if end >= 0], [key for key, _, end in found if end < 0]


def test_a_shard_cut_anywhere_loses_the_rest_and_says_so(tmp_path):
    content = write_tar(tmp_path / "a.tar", make_samples(0, 4)).read_bytes()
    whole, damaged = list_keys(content)
    assert len(whole) == 4 and damaged == []
    _, _, last_end = list(find_samples(io.BytesIO(content)))[-1]
    for length in [*range(0, last_end, 700), last_end - 1, last_end]:
        some, damaged = list_keys(content[:length])
        assert some == whole[: len(some)] and len(damaged) == 1, length
        if some != whole[:-1]:
            assert len(content[:length]) < last_end - 512
    assert list_keys(content[: last_end + 512]) == (whole, [])  # one of the two zero blocks at the end is enough


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 30), st.binary(min_size=1, max_size=600).filter(lambda garbage: any(garbage[:512])))
def test_garbage_in_a_shard_never_passes_for_its_end(block, garbage):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(8):
            member = tarfile.TarInfo(f"{number}.txt")
            member.size = 600
            tar.addfile(member, io.BytesIO(b"x" * 600))
    content = bytearray(file.getvalue())
    start = block * 512
    content[start : start + len(garbage)] = garbage
    found = list(find_samples(io.BytesIO(bytes(content[: len(file.getvalue())]))))
    keys = [key for key, _, end in found if end >= 0]
    assert len(keys) == 8 or found[-1][2] < 0


def test_a_damaged_shard_is_one_broken_row(tmp_path, caplog):
    first, second = write_shards(tmp_path, (6, 6))
    content = first.read_bytes()
    _, start, end = list(find_samples(io.BytesIO(content)))[3]
    first.write_bytes(content[: (start + end) // 2])
    with caplog.at_level("WARNING"):
        rows = open_rows(tmp_path)
    results = dict(rows.read_all())
    assert list(results) == [f"00000.tar/00000000{n}" for n in range(4)] + [f"00001.tar/{n:09d}" for n in range(6, 12)]
    broken = [name for name, result in results.items() if isinstance(result, ValueError)]
    assert broken == ["00000.tar/000000003"] and "ends early" in str(results[broken[0]])
    streamed = list(open_rows(tmp_path, streaming=True).read_all())
    assert [name for name, result in streamed if isinstance(result, ValueError)] == ["00000.tar/3"]
    assert len(streamed) == len(rows) == 10


def test_the_index_is_made_anew_when_a_shard_changes(tmp_path):
    [shard] = write_shards(tmp_path, (3,))
    rows = open_rows(tmp_path)
    assert len(rows) == 3
    write_tar(shard, make_samples(0, 5))
    assert len(open_rows(tmp_path)) == 5
    write_tar(shard, make_samples(0, 1))  # under the feet of the first
    with pytest.raises(ValueError, match="damaged"):
        rows.read_row(2)


def open_at_once(folder, barrier, queue):
    barrier.wait()
    queue.put(TarRows(sorted(folder.glob("*.tar"))).index.cache_files)


def test_processes_that_start_together_share_one_index(tmp_path):
    write_shards(tmp_path, (7, 5, 8))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    processes = [context.Process(target=open_at_once, args=(tmp_path, barrier, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    files = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert files[0] == files[1] == files[2] and len(files[0]) == 1


def test_no_tar_file_and_missing_ones_are_errors(tmp_path):
    first, second = write_shards(tmp_path, (3, 3))
    rows, stream = open_rows(tmp_path), open_rows(tmp_path, streaming=True)
    second.unlink()
    with pytest.raises(OSError, match="Shard .*00001.tar cannot be opened.*goes on"):
        rows.read_row(4)
    with pytest.raises(OSError, match="Shard .*00001.tar cannot be opened"):
        list(stream.read_all())
    for content in (b"no tar file at all" * 100, b"", write_tar(tmp_path / "empty", []).read_bytes()):
        first.write_bytes(content)
        for streaming in (False, True):
            with pytest.raises(OSError, match="tar file"):
                load_rows(str(tmp_path), streaming=streaming)


def test_long_names_and_folders_in_a_shard(tmp_path):
    picture, key = encode_picture(draw_picture("red", "blue")), "x" * 150
    for tar_format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "train.tar", "w", format=tar_format) as tar:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            for name, content in (
                (f"{key}.png", picture),
                (f"{key}.txt", b"red"),
                ("README", b"words"),
                ("z.png", picture),
            ):
                tar.addfile(folder)
                member = tarfile.TarInfo(f"folder/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        rows = TarRows([tmp_path / "train.tar"])
        assert [(row["txt"], row["image"]["bytes"]) for row in rows] == [("red", picture), (None, picture)]
        assert json.dumps(rows.column_names) == '["image", "png", "txt"]'
