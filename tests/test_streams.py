"""Items of streams: what is read, skipped and drawn, and where a lane goes on. The order is test_row_order's."""

import itertools

import datasets
import pytest
import torch
from tiny import build_tokenizer
from tiny_data import encode_picture, list_rows, write_parquet
from tiny_shards import make_samples, write_shards, write_tar

from hf_dalle import DalleImageProcessor
from hf_dalle.data import CaptionImageCollator, CaptionImageDataset, RandomCrop, load_rows, read_in_order
from hf_dalle.streams import CaptionImageStream, open_dataset


def open_stream(folder, **kwargs):
    kwargs = {"image_processor": DalleImageProcessor(size=16), "caption_column": "txt", **kwargs}
    return open_dataset(load_rows(str(folder), streaming=True), **kwargs)


def test_the_kind_of_rows_decides(tmp_path):
    write_shards(tmp_path / "tars", (3, 2))
    write_parquet(tmp_path / "table" / "train.parquet", list_rows())
    for folder, caption in (("tars", "txt"), ("table", "captions")):
        for streaming, kind in ((False, CaptionImageDataset), (True, CaptionImageStream)):
            rows = load_rows(str(tmp_path / folder), streaming=streaming)
            assert type(open_dataset(rows, caption_column=caption)) is kind


@pytest.mark.parametrize("source", ["parquet", "imagefolder", "tar", "name"])
def test_every_source_streams_the_rows_it_holds(tmp_path, source):
    rows = list_rows()[:9]
    name, column = None, "captions"
    if source == "tar":
        write_tar(tmp_path / "train.tar", make_samples(0, 9))
        column = "txt"
    elif source == "imagefolder":
        lines = []
        for index, row in enumerate(rows):
            (tmp_path / f"{index}.png").write_bytes(encode_picture(row["image"]))
            lines.append(f'{{"file_name": "{index}.png", "captions": ["{row["captions"][0]}"]}}')
        (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    else:
        write_parquet(tmp_path / "train-00000-of-00002.parquet", rows[:5])
        write_parquet(tmp_path / "train-00001-of-00002.parquet", rows[5:])
        name = str(tmp_path) if source == "name" else None  # a folder is a data set's name to `datasets`
    shards = load_rows(None if name else str(tmp_path), name, streaming=True)
    stream = CaptionImageStream(shards, 4, caption_column=column, image_processor=DalleImageProcessor(size=16))
    items = [item for item, _ in itertools.islice(stream.read_lane(), 9)]
    assert {item["caption"] for item in items} <= {caption for row in rows for caption in row["captions"]}
    assert len({item["key"] for item in items}) == 9
    in_order = [item for _, item in stream.read_all()]
    assert [item["caption"] in row["captions"] for item, row in zip(in_order, rows, strict=True)] == [True] * 9


def test_items_depend_on_seed_epoch_and_place_alone(tmp_path):
    write_shards(tmp_path, (7, 5, 8))
    kwargs = {"augmentation": RandomCrop(8, (1, 2), do_flip=True), "caption_dropout": 0.3}
    items = {}
    for size, lane in itertools.product((1, 6, 100), range(2)):
        for item, after in open_stream(tmp_path, shuffle_buffer_size=size, **kwargs).read_lane(lane, 2):
            if after["epoch"] == 2:
                break
            other = items.setdefault(item["key"], item)
            assert other["caption"] == item["caption"] and torch.equal(other["pixel_values"], item["pixel_values"])
    assert len(items) == 40
    again = [items[0, 1, 1, row] for row in range(5)], [items[0, 0, 1, row] for row in range(5)]
    assert any(not torch.equal(one["pixel_values"], two["pixel_values"]) for one, two in zip(*again, strict=True))


def test_broken_rows_are_passed_over_and_named_before_the_next_item(tmp_path):
    samples = make_samples(0, 8)
    for index in (0, 3, 4):
        samples[index][1]["jpg"] = b"broken"
    write_tar(tmp_path / "train.tar", samples)
    stream = open_stream(tmp_path, shuffle_buffer_size=1)
    read = list(itertools.islice(stream.read_lane(), 10))
    skipped = [list(item["skipped"]) for item, _ in read]
    assert skipped == [["train.tar/0"], [], ["train.tar/3", "train.tar/4"], [], []] * 2
    assert all("broken picture" in reason for item, _ in read for reason in item["skipped"].values())
    assert [item["key"][-1] for item, _ in read] == [1, 2, 5, 6, 7] * 2
    # what lies between two items is met again by whoever goes on from the first
    again = list(itertools.islice(stream.read_lane(position=read[1][1]), 8))
    for (item, _), (other, _) in zip(again, read[2:], strict=True):
        assert item["key"] == other["key"] and item["skipped"] == other["skipped"]
    collator = CaptionImageCollator(build_tokenizer(), 12)
    batch = collator([item for item, _ in read[:4]])
    assert batch["skipped"].keys() == {"train.tar/0", "train.tar/3", "train.tar/4"}
    assert batch["row_ids"].tolist() == [[0, 0, 1], [0, 0, 2], [0, 0, 5], [0, 0, 6]]
    batches = read_in_order(open_stream(tmp_path, is_training=False), 3, collator, max_samples=4)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]


def test_a_stream_of_broken_rows_alone_is_an_error_not_a_hang(tmp_path):
    write_tar(tmp_path / "train.tar", [("a", {"jpg": b"broken", "txt": b"a"})])
    with pytest.raises(ValueError, match="1000 rows in succession cannot be used; train.tar/0: broken picture"):
        next(open_stream(tmp_path).read_lane())


def test_drawn_items_are_of_one_epoch_and_the_same_each_time(tmp_path):
    write_shards(tmp_path, (7, 5))
    stream = open_stream(tmp_path, shuffle_buffer_size=5)
    assert len({item["key"] for item in stream.draw_items(8)}) == 8 and len(stream.draw_items(99)) == 12
    assert [item["key"] for item in stream.draw_items(8)] == [item["key"] for item in stream.draw_items(8)]


def test_stored_tokens_are_streamed(tmp_path):
    for shard in range(2):
        table = {"captions": ["a", "b"], "image_tokens": [[[shard, 1], [shard, 2]], [[shard, 3], [shard, 4]]]}
        datasets.Dataset.from_dict(table).to_parquet(tmp_path / f"train-{shard:05d}-of-00002.parquet")
    rows = load_rows(str(tmp_path), streaming=True)
    stream = open_dataset(rows, shuffle_buffer_size=3, tokens_column="image_tokens", is_training=False)
    tokens = [item["image_tokens"].tolist() for item, _ in itertools.islice(stream.read_lane(), 4)]
    assert sorted(tokens) == [[0, 1], [0, 3], [1, 1], [1, 3]]
    with pytest.raises(ValueError, match="'captions' holds no tokens"):
        open_dataset(load_rows(str(tmp_path), streaming=True), tokens_column="captions")
