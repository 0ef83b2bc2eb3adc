"""Caption-image datasets for training: rows on disk to batches of tensors, for both stages and the store of tokens.

Reads parquet, an imagefolder with metadata, WebDataset tar shards, or any set that `datasets` can stream. An item
depends on (seed, epoch, row) alone, never on a worker's state, so a resumed run meets the same pictures; their order
is `row_order`'s, items of rows in sequence `streams`'. Rows that cannot be used are skipped and named in the batch.
"""

import glob
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .image_processing_dalle import DalleImageProcessor, convert_to_rgb
from .row_order import DatasetShards, Shards
from .tar_shards import TarRows, TarShards
from .tokenization_dalle import BpeDropout, encode_captions


logger = logging.get_logger(__name__)

MAX_BROKEN_ROWS = 1000  # as many one after the other are no accident
MERGES = 1  # keeps the random numbers of BPE dropout apart from those of the item


def load_rows(
    train_data_dir: str | None = None,
    dataset_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
    streaming: bool = False,
) -> datasets.Dataset | TarRows | Shards:
    """
    Opens one split of a caption-image set. Pictures stay encoded bytes until an item is read.

    Args:
        train_data_dir (`str`, *optional*): a folder with `{split}.parquet` or `{split}-*.parquet`; with tar shards
            `{split}.tar`, `{split}-*.tar` or `{split}/*.tar` (or `*.tar`, which then is the split "train"); or an
            imagefolder: pictures beside a `metadata.jsonl` (or .csv, .parquet), in a folder named by the split, or in
            the folder itself (which then is the split "train", unless its sub-folders are named by splits). Or a
            pattern of tar shards, `/data/*.tar` or `/data/{split}-*.tar`.
        dataset_name (`str`, *optional*): a data set's name on the Hub; one of the two must be given.
        split (`str`): the split's name, or several joined by `+`, as of a data set of the Hub, so of parquet files.
        image_column (`str`): left encoded if it holds pictures.
        streaming (`bool`): read in sequence, shard by shard, nothing downloaded, converted or indexed before.

    Returns:
        `datasets.Dataset` or [`~hf_dalle.tar_shards.TarRows`], rows by number; or where `streaming` shards,
        [`~hf_dalle.row_order.DatasetShards`] or [`~hf_dalle.tar_shards.TarShards`].

    Raises:
        OSError: if there is nothing to read there, or it is damaged.
        ValueError: if not exactly one source is given.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError("Give exactly one of `train_data_dir` and `dataset_name`.")
    try:
        if dataset_name is not None:
            rows = datasets.load_dataset(dataset_name, split=split, streaming=streaming)
        else:
            rows = _load_folder(Path(train_data_dir), split, streaming)
    except (ValueError, DatasetsError) as error:
        reason = error.__cause__ or error
        raise OSError(f"Split {split!r} of {train_data_dir or dataset_name} cannot be read: {reason}") from error
    if not isinstance(rows, TarRows | TarShards):
        if isinstance((rows.features or {}).get(image_column), datasets.Image):
            rows = rows.cast_column(image_column, datasets.Image(decode=False))
        if streaming:
            rows = DatasetShards(rows, name=f"{train_data_dir or dataset_name}")
    return rows


def _load_folder(folder: Path, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset | TarRows:
    parts = {part: (*folder.glob(f"{part}.parquet"), *folder.glob(f"{part}-*.parquet")) for part in split.split("+")}
    if any(parts.values()):
        missing = [part for part, paths in parts.items() if not paths]
        if missing:
            raise OSError(f"Of {split} there is neither {missing[0]}.parquet nor {missing[0]}-*.parquet in {folder}.")
        parquet, name = [path for paths in parts.values() for path in sorted(map(str, paths))], next(iter(parts))
        _check_complete(parquet)
        return datasets.load_dataset("parquet", data_files={name: parquet}, split=name, streaming=streaming)
    tars = _find_tars(folder, split)
    if tars:
        _check_complete(map(str, tars))
        return TarShards(tars) if streaming else TarRows(tars)
    if _has_metadata(folder / split):
        pictures = {split: str(folder / split / "**")}
        return datasets.load_dataset("imagefolder", data_files=pictures, split=split, streaming=streaming)
    if _has_metadata(folder):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), split=split, streaming=streaming)
    raise OSError(
        f"Found neither {split}.parquet, {split}-*.parquet, tar shards nor pictures with a metadata.jsonl or"
        f" metadata.csv in {folder}. Is the path right, and has the data been prepared?"
    )


def _check_complete(paths: Iterable[str]) -> None:
    """Names the shards that are missing where the names tell how many there are, `train-00000-of-00002.parquet`."""
    counted = [match.groups() for match in map(re.compile(r"(.*)-(\d+)-of-(\d+)\.(\w+)").fullmatch, paths) if match]
    found = {(name, int(index), num_shards, ending) for name, index, num_shards, ending in counted}
    for name, num_shards, ending in sorted({(name, *rest) for name, _, *rest in found}):
        for index in range(int(num_shards)):
            if (name, index, num_shards, ending) not in found:
                raise ValueError(f"shard {name}-{index:0{len(num_shards)}}-of-{num_shards}.{ending} is missing")


def _find_tars(folder: Path, split: str) -> list[Path]:
    """Tar shards of a split in a folder, or where `folder` is a pattern, those that fit it."""
    if "*" in str(folder):
        if "{split}" not in str(folder) and split != "train":
            raise ValueError("a pattern without {split} is the split 'train'")
        names = glob.glob(str(folder).replace("{split}", split), recursive=True)
        wrong = [path for path in names if not path.endswith(".tar")]
        if wrong:
            raise ValueError(f"{wrong[0]} is no .tar file, of which a pattern has to be")
        return sorted(map(Path, names))
    patterns = [f"{split}.tar", f"{split}-*.tar", f"{split}/*.tar"]
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return found or (sorted(folder.glob("*.tar")) if split == "train" else [])


def _has_metadata(folder: Path) -> bool:
    return any((folder / f"metadata.{ending}").is_file() for ending in ("jsonl", "csv", "parquet"))


class RandomCrop:
    """
    The paper's augmentation (appendix A.2 and B.2): square crop, area resize, crop to size, flip.

    Args:
        size (`int`): side of the result, in pixels.
        resize_range (`tuple[float, float]`): side after resizing / `size`, drawn uniformly, at least 1; never above
            the crop's own side, so nothing is enlarged (unless the picture is smaller than `size`). Stage 1:
            (9/8, 12/8); stage 2: (1, 9/8).
        crop_range (`tuple[float, float]`): where the first square crop lies, as a share of the slack. Stage 1: (0, 1);
            stage 2: (3/8, 5/8).
        do_flip (`bool`): mirrors half of the pictures. Stage 1 only, since a picture may contain text.

    Raises:
        ValueError: for a range that is empty or too wide.
    """

    def __init__(
        self,
        size: int,
        resize_range: tuple[float, float],
        crop_range: tuple[float, float] = (0, 1),
        do_flip: bool = False,
    ):
        for name, (low, high), least, most in (
            ("resize_range", resize_range, 1, np.inf),
            ("crop_range", crop_range, 0, 1),
        ):
            if not least <= low <= high <= most or high == np.inf:
                limits = f"{least} <= low <= high" + (f" <= {most}" if most < np.inf else "")
                raise ValueError(f"`{name}` is {[low, high]}; expected two numbers with {limits}.")
        self.size, self.resize_range, self.crop_range, self.do_flip = size, resize_range, crop_range, do_flip

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """One RGB picture to 3 x size x size in [0, 1]."""
        side = min(image.size)
        left, top = (round((length - side) * rng.uniform(*self.crop_range)) for length in image.size)
        low, high = (max(self.size, min(side, round(ratio * self.size))) for ratio in self.resize_range)
        resized = int(rng.integers(low, high + 1))
        image = image.resize((resized, resized), Image.Resampling.BOX, box=(left, top, left + side, top + side))
        left, top = (int(rng.integers(0, resized - self.size + 1)) for _ in range(2))
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # H x W x 3 -> 3 x H x W
        if self.do_flip and rng.random() < 0.5:
            pixels = pixels.flip(2)
        return pixels.float() / 255


class CaptionImageReader:
    """
    What becomes of a row: pictures, or the tokens precomputed from them, with a caption.

    An item is a dict of `caption` (str), `pixel_values` (3 x size x size in [0, 1]) or `image_tokens` (N longs), and
    `key`, the ints that all its random choices follow from: seed, epoch and the row's place.

    Args:
        rows (`datasets.Dataset`, `TarRows` or `Shards`): from [`load_rows`].
        seed (`int`): of all random choices: crop, which caption, which stored view, what of the caption is left out.
        image_processor ([`DalleImageProcessor`]): prepares pictures where there is no `augmentation`.
        augmentation (`Callable`, *optional*): picture and `np.random.Generator` to pixels, e.g. [`RandomCrop`].
        image_column, caption_column (`str`): names; a caption may be a string or a list of strings, of which one is
            drawn (the first where `is_training` is `False`). `caption_column=None` reads no captions.
        tokens_column (`str`, *optional*): reads stored tokens, a list of views of N tokens, instead of pictures; one
            is drawn (the first, unaugmented, where `is_training` is `False`).
        caption_dropout (`float`): share of captions emptied.
        caption_word_dropout (`float`): at most this share of a caption's words is left out, at random; one stays.
        is_training (`bool`): `False` makes every choice the first.

    Raises:
        ValueError: for a column that is missing, or one of tokens that holds something else.
    """

    def __init__(
        self,
        rows: datasets.Dataset | TarRows | Shards,
        seed: int = 0,
        image_processor: DalleImageProcessor | None = None,
        augmentation: Callable[[Image.Image, np.random.Generator], torch.Tensor] | None = None,
        image_column: str = "image",
        caption_column: str | None = "captions",
        tokens_column: str | None = None,
        caption_dropout: float = 0.0,
        caption_word_dropout: float = 0.0,
        is_training: bool = True,
    ):
        columns = [column for column in (caption_column, tokens_column or image_column) if column is not None]
        for column in columns:
            if column not in rows.column_names:
                raise ValueError(f"The data has no column {column!r}; it has {sorted(rows.column_names)}.")
        if tokens_column is not None:
            _check_tokens(tokens_column, getattr(rows, "features", {}).get(tokens_column))
        self.rows: Any = rows.select_columns(columns)  # the others are not read
        self.seed, self.image_processor, self.augmentation = seed, image_processor, augmentation
        self.image_column, self.caption_column, self.tokens_column = image_column, caption_column, tokens_column
        self.caption_dropout, self.caption_word_dropout = caption_dropout, caption_word_dropout
        self.is_training = is_training

    def read_all(self) -> Iterator[tuple[int | str, dict | ValueError]]:
        """The name of each row with its item or, where the row cannot be used, the error, in order."""
        raise NotImplementedError

    def make_item(self, row: dict, *place: int) -> dict:
        """The item of a row at (epoch, row) or (epoch, shard, row); a `ValueError` says what is wrong with it."""
        key = (self.seed, *place)
        rng = np.random.default_rng(key)
        item: dict[str, Any] = {"key": key}
        if self.caption_column is not None:
            item["caption"] = self._choose_caption(row[self.caption_column], rng)
        if self.tokens_column is not None:
            views = row[self.tokens_column]
            if not views:
                raise ValueError("no tokens")
            item["image_tokens"] = torch.tensor(views[rng.integers(len(views)) if self.is_training else 0])
        else:
            item["pixel_values"] = self._read_pixels(row[self.image_column], rng)
        return item

    def _choose_caption(self, captions: str | list[str] | None, rng: np.random.Generator) -> str:
        captions = captions if isinstance(captions, list) else [captions]
        captions = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
        if not captions:
            raise ValueError("no caption")
        if not self.is_training:
            return captions[0]
        caption = captions[rng.integers(len(captions))]
        if rng.random() < self.caption_dropout:
            return ""
        return self._drop_words(caption, rng) if self.caption_word_dropout else caption

    def _drop_words(self, caption: str, rng: np.random.Generator) -> str:
        """Each word goes with the same probability, which is drawn for each caption; an empty one means no caption."""
        words, share = caption.split(), self.caption_word_dropout * rng.random()
        is_kept = rng.random(len(words)) >= share
        is_kept[rng.integers(len(words))] = True
        return " ".join(word for word, stays in zip(words, is_kept, strict=True) if stays)

    def _read_pixels(self, image: dict | bytes | Image.Image | None, rng: np.random.Generator) -> torch.Tensor:
        image = open_picture(image)
        if self.augmentation is not None and self.is_training:
            return self.augmentation(image, rng)
        return self.image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


class CaptionImageDataset(CaptionImageReader, Dataset):
    """
    Items of [`CaptionImageReader`] by number: indexed by `(epoch, row)`, or by row in epoch 0.

    An item has `skipped` too, which is empty but where the row cannot be used: then the next that can stands in for
    it, so that batches keep their size, and `skipped` names the row asked for, with the reason. Rows have their number
    for a name, those of tar shards `shard.tar/key`.
    """

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, first = key if isinstance(key, tuple) else (0, key)
        skipped: dict[int | str, str] = {}
        for num_broken in range(min(len(self), MAX_BROKEN_ROWS)):
            try:
                return {**self.read_row((first + num_broken) % len(self), epoch), "skipped": skipped}
            except ValueError as error:
                # Those in between are named when it is their turn: a row in a run of broken ones counts once an epoch.
                skipped = skipped or {self.name_row(first): str(error)}
        reason = next(iter(skipped.values()), "there is none")
        raise ValueError(f"{num_broken + 1} rows in succession cannot be used; row {first}: {reason}.")

    def read_row(self, index: int, epoch: int = 0) -> dict:
        """The item of this very row, without `skipped`; a `ValueError` says what is wrong with it."""
        return self.make_item(self.rows[index], epoch, index)

    def read_all(self) -> Iterator[tuple[int | str, dict | ValueError]]:
        """The name of each row with its item of epoch 0 or, where the row cannot be used, the error, in order."""
        for index in range(len(self)):
            yield self.name_row(index), catch_error(self.read_row, index)

    def draw_items(self, num_items: int) -> list[dict]:
        """Some random rows' items, or all where there are not as many; the same ones each time."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed))
        return [self[index] for index in order[:num_items].tolist()]

    def name_row(self, index: int) -> int | str:
        return self.rows.name_row(index) if isinstance(self.rows, TarRows) else index

    def describe(self) -> str:
        return f"{len(self):,} rows"


def catch_error(read: Callable[..., dict], *args) -> dict | ValueError:
    """What `read` gives, or the `ValueError` that it raises."""
    try:
        return read(*args)
    except ValueError as error:
        return error


def _check_tokens(name: str, feature: object) -> None:
    tokens = getattr(getattr(feature, "feature", None), "feature", None)
    if not str(getattr(tokens, "dtype", None)).startswith("int"):
        raise ValueError(f"Column {name!r} holds no tokens, which are lists of views, each a list of ints; {feature}.")


def open_picture(image: dict | bytes | Image.Image | None) -> Image.Image:
    """
    A picture as a column holds it, encoded (a dict of `bytes` or `path`, or the bytes), to RGB.

    Raises:
        ValueError: if there is none, or it cannot be decoded.
    """
    encoded = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
    if not encoded:
        raise ValueError("no picture")
    try:
        if not isinstance(encoded, Image.Image):
            encoded = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
        return convert_to_rgb(encoded)
    except UnidentifiedImageError as error:  # whose words name an address in memory
        raise ValueError("broken picture (of no format that Pillow knows)") from error
    except Exception as error:  # broken bytes make Pillow's decoders raise almost anything
        raise ValueError(f"broken picture ({error})") from error


class CaptionImageCollator:
    """
    Items of [`CaptionImageReader`] to a batch: `pixel_values` or `image_tokens` stacked, captions as `input_ids` and
    `attention_mask` (B x text_length) and `caption_dropped` (B booleans) where a tokenizer is given, `row_ids` (B x 2,
    epoch and row, or B x 3, epoch, shard and row in it) and `skipped`, the reason for each row passed over.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): none leaves captions out.
        text_length (`int`, *optional*): text positions of the prior.
        bpe_dropout (`float`): share of the tokenizer's merges skipped, in training; drawn from the items' keys.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_length: int | None = None,
        bpe_dropout: float = 0.0,
    ):
        self.tokenizer, self.text_length = tokenizer, text_length
        self.bpe_dropout = BpeDropout(tokenizer, bpe_dropout) if bpe_dropout else None

    def __call__(self, items: list[dict]) -> dict:
        batch = {"skipped": {row: reason for item in items for row, reason in item.get("skipped", {}).items()}}
        for key in ("pixel_values", "image_tokens"):
            if key in items[0]:
                batch[key] = torch.stack([item[key] for item in items])
        if "key" in items[0]:
            batch["row_ids"] = torch.tensor([item["key"][1:] for item in items])
        if self.tokenizer is not None:
            captions = [item["caption"] for item in items]
            seeds = [(*item["key"], MERGES) for item in items] if self.bpe_dropout else None
            batch.update(encode_captions(self.tokenizer, captions, self.text_length, self.bpe_dropout, seeds))
            batch["caption_dropped"] = torch.tensor([caption == "" for caption in captions])
        return batch


def read_in_order(
    dataset: CaptionImageReader,
    batch_size: int,
    collator: CaptionImageCollator,
    max_samples: int | None = None,
) -> Iterator[dict]:
    """
    Batches of a validation set: each usable row once, or the first `max_samples` of them. A row that cannot be used is
    left out, with a warning.

    Raises:
        ValueError: if no row can be used.
    """
    items, num_items, num_rows = [], 0, 0
    for name, item in dataset.read_all():
        num_rows += 1
        if isinstance(item, ValueError):
            logger.warning_once(f"Skipped row {name} of the validation data: {item}")
            continue
        items.append(item)
        num_items += 1
        if len(items) == batch_size:
            yield collator(items)
            items = []
        if num_items == max_samples:
            break
    if items:
        yield collator(items)
    if not num_items:
        raise ValueError(f"None of the {num_rows} rows of the validation data can be used.")
