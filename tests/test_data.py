"""Data sets of captions and pictures: what is read, drawn, skipped and refused, and in which order."""

import itertools
import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import build_tokenizer
from tiny_data import draw_picture, encode_picture, list_rows, write_parquet
from torch.utils.data import DataLoader

from hf_dalle import DalleImageProcessor, encode_captions
from hf_dalle.data import (
    CaptionImageCollator,
    CaptionImageDataset,
    RandomCrop,
    load_rows,
    open_picture,
    read_in_order,
)
from hf_dalle.row_order import EpochBatchSampler


def write_imagefolder(folder, rows):
    """Pictures beside a metadata.jsonl; a row whose picture is `None` names a file that is not there."""
    folder.mkdir(parents=True)
    lines = []
    for index, row in enumerate(rows):
        if row["image"] is not None:
            (folder / f"{index}.png").write_bytes(encode_picture(row["image"]))
        lines.append(json.dumps({"file_name": f"{index}.png", "captions": row["captions"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def build_dataset(rows, **kwargs):
    """A data set of rows in memory, pictures as PIL's, bytes or `None`, prepared at 16 x 16."""
    images = [encode_picture(row["image"]) if isinstance(row["image"], Image.Image) else row["image"] for row in rows]
    table = {"image": [image and {"bytes": image, "path": None} for image in images]}
    table["captions"] = [row["captions"] for row in rows]
    features = {"image": datasets.Image(decode=False), "captions": datasets.List(datasets.Value("string"))}
    rows = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    return CaptionImageDataset(rows, image_processor=DalleImageProcessor(size=16), **kwargs)


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("layout", ["parquet", "shards", "imagefolder", "flat imagefolder"])
def test_parquet_and_imagefolder_read_alike(tmp_path, layout):
    rows = list_rows()[:4]
    if layout == "parquet":
        write_parquet(tmp_path / "train.parquet", rows)
        write_parquet(tmp_path / "validation.parquet", rows[:1])
    elif layout == "shards":
        write_parquet(tmp_path / "train-00000-of-00002.parquet", rows[:2])
        write_parquet(tmp_path / "train-00001-of-00002.parquet", rows[2:])
    elif layout == "imagefolder":
        write_imagefolder(tmp_path / "train", rows)
        write_imagefolder(tmp_path / "validation", rows[:1])
    else:
        write_imagefolder(tmp_path / "pictures_for_a_test", rows)  # a name from which `datasets` would guess a split
        tmp_path = tmp_path / "pictures_for_a_test"
    loaded = load_rows(str(tmp_path))
    dataset = CaptionImageDataset(loaded, image_processor=DalleImageProcessor(size=16), is_training=False)
    assert len(dataset) == 4
    for item, row in zip(dataset, rows, strict=False):
        expected = torch.from_numpy(np.array(row["image"])).permute(2, 0, 1) / 255
        assert torch.equal(item["pixel_values"], expected)
        assert item["caption"] == row["captions"][0] and item["skipped"] == {}
    if layout in ("parquet", "imagefolder"):
        assert len(load_rows(str(tmp_path), split="validation")) == 1
    else:
        with pytest.raises(OSError, match="validation"):
            load_rows(str(tmp_path), split="validation")


def test_splits_joined_by_plus_are_read_one_after_the_other(tmp_path):
    rows = list_rows()[:4]
    write_parquet(tmp_path / "train.parquet", rows[:1])
    write_parquet(tmp_path / "more-00000-of-00002.parquet", rows[1:3])
    write_parquet(tmp_path / "more-00001-of-00002.parquet", rows[3:])
    for split, expected in (("train+more", rows), ("more+train", [*rows[1:], rows[0]])):
        loaded = load_rows(str(tmp_path), split=split)
        assert [row["captions"] for row in loaded] == [row["captions"] for row in expected]
    with pytest.raises(OSError, match=r"Of train\+less there is neither less.parquet nor less-\*.parquet"):
        load_rows(str(tmp_path), split="train+less")


def test_captions_may_be_strings(tmp_path):
    rows = [{"image": draw_picture("red", "green"), "text": "red and green"}]
    write_parquet(tmp_path / "train.parquet", rows)
    processor = DalleImageProcessor(size=16)
    dataset = CaptionImageDataset(load_rows(str(tmp_path)), image_processor=processor, caption_column="text")
    assert dataset[0]["caption"] == "red and green"
    without = CaptionImageDataset(load_rows(str(tmp_path)), image_processor=processor, caption_column=None)
    assert without[0].keys() == {"pixel_values", "key", "skipped"}


def test_one_of_several_captions_is_drawn_in_training_only():
    rows = list_rows()[:1]
    drawn = [build_dataset(rows)[epoch, 0]["caption"] for epoch in range(40)]
    assert set(drawn) == set(rows[0]["captions"])
    assert {build_dataset(rows, is_training=False)[epoch, 0]["caption"] for epoch in range(9)} == {"red and green"}


def test_other_columns_are_not_read(tmp_path):
    rows = [{"image": draw_picture("red", "blue"), "captions": ["a"], "other": {"bytes": b"no", "path": None}}]
    features = datasets.Features(
        image=datasets.Image(), captions=datasets.List(datasets.Value("string")), other=datasets.Image()
    )
    rows[0]["image"] = {"bytes": encode_picture(rows[0]["image"]), "path": None}
    table = datasets.Dataset.from_list(rows, features=features)
    dataset = CaptionImageDataset(table.cast_column("image", datasets.Image(decode=False)), caption_column="captions",
                                  image_processor=DalleImageProcessor(size=16))  # fmt: skip
    assert dataset[0]["pixel_values"].shape == (3, 16, 16)


# --------------------------------------------------------------------------------------------------------- errors


def test_missing_and_damaged_folders_are_named(tmp_path):
    with pytest.raises(OSError, match="nowhere.*prepared"):
        load_rows(str(tmp_path / "nowhere"))
    write_parquet(tmp_path / "train.parquet", list_rows())
    whole = (tmp_path / "train.parquet").read_bytes()
    for damaged in (whole[:-100], b"PAR1" + b"\x07" * 300 + whole[304:], b""):
        (tmp_path / "train.parquet").write_bytes(damaged)
        with pytest.raises(OSError, match="(?s)'train'.*cannot be read"):
            load_rows(str(tmp_path))
    write_parquet(tmp_path / "train.parquet", list_rows())
    (tmp_path / "train.parquet").rename(tmp_path / "train-00001-of-00003.parquet")
    with pytest.raises(OSError, match="train-00000-of-00003.parquet is missing"):
        load_rows(str(tmp_path))
    for sources in ({}, {"train_data_dir": "a", "dataset_name": "b"}):
        with pytest.raises(ValueError, match="exactly one"):
            load_rows(**sources)


def test_missing_columns_are_named():
    rows = datasets.Dataset.from_dict({"picture": [1], "text": ["a"]})
    with pytest.raises(ValueError, match=r"no column 'captions'; it has \['picture', 'text'\]"):
        CaptionImageDataset(rows)
    with pytest.raises(ValueError, match="no column 'image'"):
        CaptionImageDataset(rows, caption_column="text")
    with pytest.raises(ValueError, match="no column 'image_tokens'"):
        CaptionImageDataset(rows, caption_column="text", tokens_column="image_tokens")
    with pytest.raises(ValueError, match="'text' holds no tokens"):
        CaptionImageDataset(rows, caption_column="text", tokens_column="text")


def list_broken_rows():
    """Whole rows at 0 and 6; what is wrong with the others."""
    rows = list_rows()[:7]
    picture = rows[0]["image"]
    rows[1]["image"] = encode_picture(picture)[:60]  # cut short
    rows[2]["image"] = b"not a picture"
    rows[3]["image"] = None
    rows[4]["captions"] = [None, "  "]
    rows[5]["image"] = encode_picture(picture.convert("I"), "TIFF")
    return rows, {1: "broken picture", 2: "broken picture", 3: "no picture", 4: "no caption", 5: "broken picture"}


def test_a_broken_row_gives_way_to_the_next_whole_one():
    rows, reasons = list_broken_rows()
    dataset = build_dataset(rows)
    assert dataset[0]["skipped"] == {} and dataset[3, 6]["skipped"] == {}
    for row, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            dataset.read_row(row)
        item = dataset[2, row]
        assert item["skipped"].keys() == {row} and reason in item["skipped"][row]
        assert torch.equal(item["pixel_values"], dataset[2, 6]["pixel_values"])
        assert item["caption"] == dataset[2, 6]["caption"]
        assert item["skipped"] == dataset[1, row]["skipped"]  # the same words each time, so that it counts once
        assert item["key"] == (0, 2, 6)  # the row's that stands in
    batch = CaptionImageCollator()([dataset[0], dataset[3], dataset[1]])
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["skipped"].keys() == {1, 3}
    assert batch["row_ids"].tolist() == [[0, 0], [0, 6], [0, 6]]


def test_the_last_row_gives_way_to_the_first():
    rows = list_rows()[:3]
    rows[2]["captions"] = []
    item = build_dataset(rows)[2]
    assert item["skipped"] == {2: "no caption"} and item["caption"] in rows[0]["captions"]


def test_only_broken_rows_are_an_error():
    rows = [{"image": b"no", "captions": ["a"]}] * 3
    with pytest.raises(ValueError, match="3 rows in succession cannot be used; row 1: broken picture"):
        build_dataset(rows)[1]


def test_validation_leaves_broken_rows_out():
    rows, _ = list_broken_rows()
    dataset, collator = build_dataset(rows, is_training=False), CaptionImageCollator(build_tokenizer(), 12)
    batches = list(read_in_order(dataset, 1, collator))
    assert [len(batch["input_ids"]) for batch in batches] == [1, 1]
    [batch] = read_in_order(dataset, 5, collator)
    assert torch.equal(batch["pixel_values"], torch.stack([dataset[index]["pixel_values"] for index in (0, 6)]))
    with pytest.raises(ValueError, match="None of the 5 rows"):
        list(read_in_order(build_dataset(rows[1:6], is_training=False), 2, collator))
    some = read_in_order(build_dataset(list_rows(), is_training=False), 4, collator, max_samples=6)
    assert [len(batch["input_ids"]) for batch in some] == [4, 2]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "TIFF"]), st.data())
def test_broken_bytes_are_an_error_of_one_kind(image_format, data):
    encoded = bytearray(encode_picture(draw_picture("red", "blue"), image_format))
    for _ in range(data.draw(st.integers(0, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    encoded = bytes(encoded[: data.draw(st.integers(0, len(encoded)))])
    try:
        assert open_picture({"bytes": encoded, "path": None}).mode == "RGB"
    except ValueError as error:
        assert "picture" in str(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_absurd_size_is_broken_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses twice as many
    with pytest.raises(ValueError, match="broken picture .*exceeds limit"):
        open_picture(encode_picture(draw_picture("red", "blue")))


# -------------------------------------------------------------------------------------------------------- cropping


def draw_index_picture(width, height):
    """A picture whose pixels tell where they are: red the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8))


def test_random_crop_by_definition():
    """Square crop, area resize to a side in the range, crop to size, flip: each from the pixels that come out."""
    crop = RandomCrop(8, (9 / 8, 12 / 8), do_flip=True)
    rng = np.random.default_rng(0)
    lefts, sides, flips, offsets = [], set(), [], set()
    for _ in range(400):
        pixels = crop(draw_index_picture(240, 96), rng) * 255
        assert pixels.shape == (3, 8, 8) and pixels.dtype == torch.float32
        step = (pixels[1, -1, 0] - pixels[1, 0, 0]).item() / 7  # rows of the original in one: 96 / resized side
        side = round(96 / step)
        sides.add(side)
        is_flipped = bool(pixels[0, 0, 0] > pixels[0, 0, -1])
        flips.append(is_flipped)
        offsets.add((side, round((pixels[1, 0, 0].item() - (step - 1) / 2) / step)))  # a mean over `step` rows
        lefts.append(pixels[0].min().item())
    assert sides == {9, 10, 11, 12}
    assert offsets == {(side, top) for side in sides for top in range(side - 8 + 1)}
    assert 150 < sum(flips) < 250
    assert min(lefts) < 20 and max(lefts) > 144  # the square lies anywhere in the 144 columns of slack


def test_random_crop_near_the_centre():
    """Stage 2: the square crop's offset lies between 3/8 and 5/8 of the slack; nothing is mirrored."""
    crop, rng = RandomCrop(8, (1, 1), crop_range=(3 / 8, 5 / 8)), np.random.default_rng(0)
    crops = torch.stack([crop(draw_index_picture(88, 8), rng) * 255 for _ in range(200)])
    lefts = crops[:, 0].amin(dim=(1, 2)).round()
    assert lefts.min() == 30 and lefts.max() == 50  # of 80
    assert (crops[:, 0, :, 1:] > crops[:, 0, :, :-1]).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 100))
def test_random_crop_never_enlarges(width, height, seed):
    size = 16
    crop, picture = RandomCrop(size, (1, 1.5)), draw_index_picture(width, height)
    pixels = crop(picture, np.random.default_rng(seed)) * 255
    assert pixels.shape == (3, size, size)
    if min(width, height) >= size:
        # neighbouring pixels are at least one pixel of the original apart
        assert (pixels[0].diff(dim=1) > 0.45).all() and (pixels[0, :, -1] - pixels[0, :, 0] > size - 2).all()


def test_items_depend_on_seed_epoch_and_row_alone():
    rows, crop = list_rows()[:6], RandomCrop(8, (1, 2), do_flip=True)

    def build(seed):
        return build_dataset(rows, seed=seed, augmentation=crop, caption_dropout=0.5)

    one, two = build(0), build(0)
    assert two[3, 4] and two[0]  # what was read before does not matter
    for epoch, row in itertools.product(range(3), range(6)):
        assert one[epoch, row]["caption"] == two[epoch, row]["caption"]
        assert torch.equal(one[epoch, row]["pixel_values"], two[epoch, row]["pixel_values"])
    others = [one[0, row]["pixel_values"] for row in range(6)]
    for other in ([one[1, row] for row in range(6)], [build(1)[0, row] for row in range(6)]):
        assert any(not torch.equal(a, b["pixel_values"]) for a, b in zip(others, other, strict=True))
    plain = build_dataset(rows, augmentation=crop, is_training=False)
    assert plain[0]["pixel_values"].shape == (3, 16, 16)  # no crop: the processor's whole square


@pytest.mark.parametrize("ranges", [{"resize_range": (0.5, 1)}, {"resize_range": (1.2, 1.1)}, {"crop_range": (0, 2)},
                                    {"crop_range": (-1, 0)}, {"resize_range": (1, np.nan)},
                                    {"resize_range": (1, np.inf)}])  # fmt: skip
def test_ranges_are_checked(ranges):
    with pytest.raises(ValueError, match=next(iter(ranges))):
        RandomCrop(8, **{"resize_range": (1, 1), **ranges})


# --------------------------------------------------------------------------------------------------------- batches


def test_workers_give_the_same_batches():
    rows = list_rows()[:6]
    rows[2]["captions"] = []
    dataset = build_dataset(rows, augmentation=RandomCrop(8, (1, 2)), caption_dropout=0.3)
    collator = CaptionImageCollator(build_tokenizer(), 12)
    batches = {}
    for num_workers in (0, 2):
        loader = DataLoader(
            dataset, batch_sampler=EpochBatchSampler(6, 4), collate_fn=collator, num_workers=num_workers
        )
        batches[num_workers] = list(itertools.islice(loader, 5))
    for one, other in zip(*batches.values(), strict=True):
        assert one.keys() == other.keys() and one["skipped"] == other["skipped"]
        assert all(torch.equal(one[key], other[key]) for key in one if key != "skipped")


def test_caption_dropout_empties_its_share():
    dataset = build_dataset(list_rows(), caption_dropout=0.1)
    captions = [dataset[epoch, row]["caption"] for epoch in range(20) for row in range(20)]
    assert 0.06 < captions.count("") / len(captions) < 0.14
    tokenizer = build_tokenizer()
    batch = CaptionImageCollator(tokenizer, 12)([{"caption": "a red fox"}, {"caption": ""}])
    assert batch["caption_dropped"].tolist() == [False, True]
    assert batch["attention_mask"][1].tolist() == [1] + [0] * 11  # start-of-text and pads
    plain = build_dataset(list_rows(), caption_dropout=0.9, is_training=False)
    assert all(item["caption"] for item in (plain[row] for row in range(20)))


def test_caption_word_dropout_leaves_words_out_in_order_but_never_all():
    words = [f"word{number}" for number in range(10)]
    rows = [{**row, "captions": [" ".join(words)]} for row in list_rows()]
    dataset = build_dataset(rows, caption_word_dropout=0.6)
    captions = [dataset[epoch, row]["caption"].split() for epoch in range(20) for row in range(20)]
    assert all(caption and caption == sorted(caption) for caption in captions)
    shares = [1 - len(caption) / len(words) for caption in captions]
    assert 0.26 < sum(shares) / len(shares) < 0.34  # shares from 0 to 0.6, each as likely
    assert any(share >= 0.5 for share in shares) and any(share == 0 for share in shares)
    one_word = build_dataset([{**row, "captions": ["word"]} for row in rows], caption_word_dropout=0.9)
    assert {one_word[epoch, row]["caption"] for epoch in range(9) for row in range(20)} == {"word"}
    plain = build_dataset(rows, caption_word_dropout=0.9, is_training=False)
    assert plain[0]["caption"].split() == words


def test_bpe_dropout_is_in_the_collator_that_asks_for_it_alone():
    tokenizer = build_tokenizer()
    items = [{"caption": "a glossy 3d style emoji of hedgehog", "key": (0, 0, row)} for row in range(20)]
    expected = encode_captions(tokenizer, [items[0]["caption"]], 40)["input_ids"][0]
    whole = CaptionImageCollator(tokenizer, 40)(items)["input_ids"]
    assert (whole == expected).all()
    dropped = CaptionImageCollator(tokenizer, 40, bpe_dropout=0.5)(items)["input_ids"]
    assert len(torch.unique(dropped, dim=0)) > 10
    again = CaptionImageCollator(tokenizer, 40, bpe_dropout=0.5)(items[::-1])["input_ids"]
    assert torch.equal(again.flip(0), dropped)  # each from its own key
    assert torch.equal(CaptionImageCollator(tokenizer, 40)(items)["input_ids"], whole)


def test_views_of_stored_tokens():
    table = {"captions": ["a", "b", "c"], "image_tokens": [[[1, 2], [3, 4]], [], None]}
    rows = datasets.Dataset.from_dict(table)
    dataset = CaptionImageDataset(rows, tokens_column="image_tokens")
    drawn = [tuple(dataset[epoch, 0]["image_tokens"].tolist()) for epoch in range(30)]
    assert set(drawn) == {(1, 2), (3, 4)} and dataset[0]["image_tokens"].dtype == torch.int64
    first = CaptionImageDataset(rows, tokens_column="image_tokens", is_training=False)
    assert {tuple(first[epoch, 0]["image_tokens"].tolist()) for epoch in range(9)} == {(1, 2)}
    assert dataset[1]["skipped"] == {1: "no tokens"} and dataset[2]["skipped"] == {2: "no tokens"}
    batch = CaptionImageCollator()([first[0], first[0]])
    assert batch["image_tokens"].tolist() == [[1, 2], [1, 2]]
