"""Caption-image datasets for training: rows on disk to batches of tensors, for both stages and the store of tokens.

Reads parquet or an imagefolder with metadata. An item depends on (seed, epoch, row) alone, never on a worker's state,
so a resumed run meets the same pictures. Rows that cannot be used are skipped and named in the batch.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .image_processing_dalle import DalleImageProcessor, convert_to_rgb
from .tokenization_dalle import bpe_dropout, encode_captions


logger = logging.get_logger(__name__)

MAX_BROKEN_ROWS = 1000  # as many one after the other are no accident


def load_rows(
    train_data_dir: str | None = None,
    dataset_name: str | None = None,
    split: str = "train",
    image_column: str = "image",
) -> datasets.Dataset:
    """
    Opens one split of a caption-image set. Pictures stay encoded bytes until an item is read.

    Args:
        train_data_dir (`str`, *optional*): a folder with `{split}.parquet` or `{split}-*.parquet`, or an imagefolder:
            pictures beside a `metadata.jsonl` (or .csv, .parquet), in a folder named by the split, or in the folder
            itself (which then is the split "train", unless its sub-folders are named by splits).
        dataset_name (`str`, *optional*): a data set's name on the Hub; one of the two must be given.
        split (`str`): the split's name.
        image_column (`str`): left encoded if it holds pictures.

    Raises:
        OSError: if there is nothing to read there, or it is damaged.
        ValueError: if not exactly one source is given.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError("Give exactly one of `train_data_dir` and `dataset_name`.")
    try:
        if dataset_name is not None:
            rows = datasets.load_dataset(dataset_name, split=split)
        else:
            rows = _load_folder(Path(train_data_dir), split)
    except (ValueError, DatasetsError) as error:
        reason = error.__cause__ or error
        raise OSError(f"Split {split!r} of {train_data_dir or dataset_name} cannot be read: {reason}") from error
    if image_column in rows.column_names and isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return rows


def _load_folder(folder: Path, split: str) -> datasets.Dataset:
    parquet = sorted(str(path) for path in (*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")))
    if parquet:
        return datasets.load_dataset("parquet", data_files={split: parquet}, split=split)
    if _has_metadata(folder / split):
        pictures = {split: str(folder / split / "**")}
        return datasets.load_dataset("imagefolder", data_files=pictures, split=split)
    if _has_metadata(folder):
        return datasets.load_dataset("imagefolder", data_dir=str(folder), split=split)
    raise OSError(
        f"Found neither {split}.parquet, {split}-*.parquet nor pictures with a metadata.jsonl or metadata.csv in"
        f" {folder}. Is the path right, and has the data been prepared?"
    )


def _has_metadata(folder: Path) -> bool:
    return any((folder / f"metadata.{ending}").is_file() for ending in ("jsonl", "csv", "parquet"))


class RandomCrop:
    """
    The paper's augmentation (appendix A.1 and B.2): square crop, area resize, crop to size, flip.

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


class CaptionImageDataset(Dataset):
    """
    Pictures, or the tokens precomputed from them, with a caption; indexed by `(epoch, row)`, or by row in epoch 0.

    An item is a dict of `caption` (str), `pixel_values` (3 x size x size in [0, 1]) or `image_tokens` (N longs), and
    `skipped`, which is empty but where the row cannot be used: then the next that can stands in for it, so that
    batches keep their size, and `skipped` gives the reason for each row passed over.

    Args:
        rows (`datasets.Dataset`): from [`load_rows`].
        seed (`int`): of all random choices: crop, which caption, which stored view, caption dropout.
        image_processor ([`DalleImageProcessor`]): prepares pictures where there is no `augmentation`.
        augmentation (`Callable`, *optional*): picture and `np.random.Generator` to pixels, e.g. [`RandomCrop`].
        image_column, caption_column (`str`): names; a caption may be a string or a list of strings, of which one is
            drawn (the first where `is_training` is `False`). `caption_column=None` reads no captions.
        tokens_column (`str`, *optional*): reads stored tokens, a list of views of N tokens, instead of pictures; one
            is drawn (the first, unaugmented, where `is_training` is `False`).
        caption_dropout (`float`): share of captions emptied.
        is_training (`bool`): `False` makes every choice the first.

    Raises:
        ValueError: for a column that is missing, or one of tokens that holds something else.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        seed: int = 0,
        image_processor: DalleImageProcessor | None = None,
        augmentation: Callable[[Image.Image, np.random.Generator], torch.Tensor] | None = None,
        image_column: str = "image",
        caption_column: str | None = "captions",
        tokens_column: str | None = None,
        caption_dropout: float = 0.0,
        is_training: bool = True,
    ):
        columns = [column for column in (caption_column, tokens_column or image_column) if column is not None]
        for column in columns:
            if column not in rows.column_names:
                raise ValueError(f"The data has no column {column!r}; it has {sorted(rows.column_names)}.")
        if tokens_column is not None:
            _check_tokens(tokens_column, rows.features[tokens_column])
        self.rows = rows.select_columns(columns)  # the others are not read
        self.seed, self.image_processor, self.augmentation = seed, image_processor, augmentation
        self.image_column, self.caption_column, self.tokens_column = image_column, caption_column, tokens_column
        self.caption_dropout, self.is_training = caption_dropout, is_training

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, first = key if isinstance(key, tuple) else (0, key)
        skipped = {}
        for index in range(first, first + min(len(self), MAX_BROKEN_ROWS)):
            index = index % len(self)
            try:
                return {**self.read_row(index, epoch), "skipped": skipped}
            except ValueError as error:
                skipped[index] = str(error)
        raise ValueError(f"{len(skipped)} rows in succession cannot be used; row {first}: {skipped[first]}.")

    def read_row(self, index: int, epoch: int = 0) -> dict:
        """The item of this very row, without `skipped`; a `ValueError` says what is wrong with it."""
        rng = np.random.default_rng((self.seed, epoch, index))
        row, item = self.rows[index], {}
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
        return "" if rng.random() < self.caption_dropout else caption

    def _read_pixels(self, image: dict | bytes | Image.Image | None, rng: np.random.Generator) -> torch.Tensor:
        image = open_picture(image)
        if self.augmentation is not None and self.is_training:
            return self.augmentation(image, rng)
        return self.image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


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


class EpochBatchSampler(Sampler):
    """
    An endless stream of batches of `(epoch, row)`: each epoch a new permutation of all rows, cut into batches across
    the epochs' borders. Process r of P takes every P-th batch, so the processes' union is the whole stream.

    Args:
        num_rows (`int`): of the data set.
        batch_size (`int`): a process.
        seed (`int`): of the permutations.
        start_batch (`int`): batches of this process to pass over: where a resumed run goes on.
        process_index, num_processes (`int`): this process among all.

    Raises:
        ValueError: if there are no rows.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        seed: int = 0,
        start_batch: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        if num_rows < 1:
            raise ValueError("The data set has no rows to train on.")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.start_batch, self.process_index, self.num_processes = start_batch, process_index, num_processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, epoch, order = self.start_batch, -1, None
        while True:
            first = (batch * self.num_processes + self.process_index) * self.batch_size
            keys = []
            for position in range(first, first + self.batch_size):
                if position // self.num_rows != epoch:
                    epoch = position // self.num_rows
                    order = np.random.default_rng((self.seed, epoch)).permutation(self.num_rows)
                keys.append((epoch, int(order[position % self.num_rows])))
            yield keys
            batch += 1


class CaptionImageCollator:
    """
    Items of [`CaptionImageDataset`] to a batch: `pixel_values` or `image_tokens` stacked, captions as `input_ids` and
    `attention_mask` (B x text_length) and `caption_dropped` (B booleans) where a tokenizer is given, and `skipped`,
    the reason for each row passed over.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): none leaves captions out.
        text_length (`int`, *optional*): text positions of the prior.
        bpe_dropout (`float`): share of the tokenizer's merges skipped, in training.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_length: int | None = None,
        bpe_dropout: float = 0.0,
    ):
        self.tokenizer, self.text_length, self.bpe_dropout = tokenizer, text_length, bpe_dropout

    def __call__(self, items: list[dict]) -> dict:
        batch = {"skipped": {row: reason for item in items for row, reason in item.get("skipped", {}).items()}}
        for key in ("pixel_values", "image_tokens"):
            if key in items[0]:
                batch[key] = torch.stack([item[key] for item in items])
        if self.tokenizer is not None:
            captions = [item["caption"] for item in items]
            with bpe_dropout(self.tokenizer, self.bpe_dropout):
                batch.update(encode_captions(self.tokenizer, captions, self.text_length))
            batch["caption_dropped"] = torch.tensor([caption == "" for caption in captions])
        return batch


def read_in_order(dataset: CaptionImageDataset, batch_size: int, collator: CaptionImageCollator) -> Iterator[dict]:
    """
    Batches of a validation set: each usable row once. A row that cannot be used is left out, with a warning.

    Raises:
        ValueError: if no row can be used.
    """
    items, num_items = [], 0
    for index in range(len(dataset)):
        try:
            items.append(dataset.read_row(index))
        except ValueError as error:
            logger.warning_once(f"Skipped row {index} of the validation data: {error}")
            continue
        num_items += 1
        if len(items) == batch_size:
            yield collator(items)
            items = []
    if items:
        yield collator(items)
    if not num_items:
        raise ValueError(f"None of the {len(dataset)} rows of the validation data can be used.")
