"""Caption-image datasets for training: rows on disk to batches of tensors, for both stages and the store of tokens.

Reads parquet or an imagefolder with metadata. An item depends on (seed, epoch, row) alone, never on a worker's state, so
a resumed run meets the same pictures. Rows that cannot be used are skipped and named in the batch.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from .image_processing_dalle import DalleImageProcessor, convert_to_rgb
from .tokenization_dalle import bpe_dropout, encode_captions


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
            pictures beside a `metadata.jsonl` (or .csv), in the folder itself or in one named by the split.
        dataset_name (`str`, *optional*): a data set's name on the Hub; one of the two must be given.
        split (`str`): the split's name.
        image_column (`str`): left encoded if it holds pictures.

    Raises:
        OSError: if there is nothing to read there.
        ValueError: if not exactly one source is given.
    """
    if (train_data_dir is None) == (dataset_name is None):
        raise ValueError("Give exactly one of `train_data_dir` and `dataset_name`.")
    if dataset_name is not None:
        rows = datasets.load_dataset(dataset_name, split=split)
    else:
        rows = _load_folder(Path(train_data_dir), split)
    if image_column in rows.column_names and isinstance(rows.features[image_column], datasets.Image):
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
    return rows


def _load_folder(folder: Path, split: str) -> datasets.Dataset:
    parquet = sorted(str(path) for path in (*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")))
    if parquet:
        return datasets.load_dataset("parquet", data_files={split: parquet}, split=split)
    for candidate in (folder / split, folder):
        if any((candidate / f"metadata.{ending}").is_file() for ending in ("jsonl", "csv", "parquet")):
            return datasets.load_dataset("imagefolder", data_dir=str(candidate), split="train")
    raise OSError(
        f"Found neither {split}.parquet, {split}-*.parquet nor pictures with a metadata.jsonl or metadata.csv in"
        f" {folder}. Is the path right, and has the data been prepared?"
    )


class RandomCrop:
    """
    The paper's augmentation (appendix A.1 and B.2): square crop, area resize, crop to size, flip.

    Args:
        size (`int`): side of the result, in pixels.
        resize_range (`tuple[float, float]`): side after resizing / `size`, drawn uniformly; never above the crop's own
            side, so nothing is enlarged (unless the picture is smaller than `size`). Stage 1: (9/8, 12/8); stage 2: (1, 9/8).
        crop_range (`tuple[float, float]`): where the first square crop lies, as a share of the slack. Stage 1: (0, 1);
            stage 2: (3/8, 5/8).
        do_flip (`bool`): mirrors half of the pictures. Stage 1 only, since a picture may contain text.
    """

    def __init__(
        self,
        size: int,
        resize_range: tuple[float, float],
        crop_range: tuple[float, float] = (0, 1),
        do_flip: bool = False,
    ):
        for name, (low, high), top in (("resize_range", resize_range, None), ("crop_range", crop_range, 1)):
            if low > high or low < (1 if top is None else 0) or (top is not None and high > top):
                limits = "1 <= low <= high" if top is None else "0 <= low <= high <= 1"
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
    Pictures, or the tokens precomputed from them, with a caption; indexed by `(epoch, row)`.

    An item is a dict of `caption` (str) and `pixel_values` (3 x size x size in [0, 1]) or `image_tokens` (N longs); a row
    that cannot be used is `{"skipped": reason}`.

    Args:
        rows (`datasets.Dataset`): from [`load_rows`].
        seed (`int`): of all random choices: crop, which caption, which stored view, caption dropout.
        image_processor ([`DalleImageProcessor`]): prepares pictures where there is no `augmentation`.
        augmentation (`Callable`, *optional*): picture and `np.random.Generator` to pixels, e.g. [`RandomCrop`].
        image_column, caption_column (`str`): names; a caption may be a string or a list of strings, of which one is
            drawn (the first where `is_training` is `False`). `caption_column=None` reads no captions.
        tokens_column (`str`, *optional*): reads stored tokens, a list of views of N tokens, instead of pictures; a view
            is drawn (the first, unaugmented, where `is_training` is `False`).
        caption_dropout (`float`): share of captions emptied.
        is_training (`bool`): `False` makes every choice the first.
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
        for column in (caption_column, tokens_column or image_column):
            if column is not None and column not in rows.column_names:
                raise ValueError(f"The data has no column {column!r}; it has {sorted(rows.column_names)}.")
        self.rows, self.seed, self.image_processor, self.augmentation = rows, seed, image_processor, augmentation
        self.image_column, self.caption_column, self.tokens_column = image_column, caption_column, tokens_column
        self.caption_dropout, self.is_training = caption_dropout, is_training

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        rng = np.random.default_rng((self.seed, epoch, index))
        row, item = self.rows[index], {}
        try:
            if self.caption_column is not None:
                item["caption"] = self._choose_caption(row[self.caption_column], rng)
            if self.tokens_column is not None:
                views = row[self.tokens_column]
                item["image_tokens"] = torch.tensor(views[rng.integers(len(views)) if self.is_training else 0])
            else:
                item["pixel_values"] = self._read_pixels(row[self.image_column], rng)
        except (ValueError, OSError, SyntaxError) as error:  # SyntaxError: Pillow's for some broken PNGs
            return {"skipped": f"row {index}: {error}"}
        return item

    def _choose_caption(self, captions: str | list[str] | None, rng: np.random.Generator) -> str:
        captions = [captions] if isinstance(captions, str) or captions is None else captions
        captions = [caption for caption in captions if isinstance(caption, str) and caption.strip()]
        if not captions:
            raise ValueError("no caption")
        if not self.is_training:
            return captions[0]
        caption = captions[rng.integers(len(captions))]
        return "" if rng.random() < self.caption_dropout else caption

    def _read_pixels(self, image: dict | Image.Image | None, rng: np.random.Generator) -> torch.Tensor:
        if image is None:
            raise ValueError("no picture")
        if isinstance(image, dict):
            image = Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"])
        image = convert_to_rgb(image)
        if self.augmentation is not None and self.is_training:
            return self.augmentation(image, rng)
        return self.image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]


class EpochBatchSampler(Sampler):
    """
    An endless stream of batches of `(epoch, row)`: each epoch a new permutation of all rows, cut into batches across the
    epochs' borders. Process r of P takes every P-th batch, so the processes' union is the whole stream.

    Args:
        num_rows (`int`): of the data set.
        batch_size (`int`): a process.
        seed (`int`): of the permutations.
        start_batch (`int`): batches of this process to pass over: where a resumed run goes on.
        process_index, num_processes (`int`): this process among all.
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
    `attention_mask` (B x text_length) where a tokenizer is given, `caption_dropped` (B booleans) and `skipped` (reasons).

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
        skipped = [item["skipped"] for item in items if "skipped" in item]
        items = [item for item in items if "skipped" not in item]
        if not items:
            raise ValueError(f"No row of a batch of {len(skipped)} could be used: {'; '.join(skipped[:3])}.")
        batch = {"skipped": skipped}
        for key in ("pixel_values", "image_tokens"):
            if key in items[0]:
                batch[key] = torch.stack([item[key] for item in items])
        if self.tokenizer is not None:
            captions = [item["caption"] for item in items]
            with bpe_dropout(self.tokenizer, self.bpe_dropout):
                batch.update(encode_captions(self.tokenizer, captions, self.text_length))
            batch["caption_dropped"] = torch.tensor([caption == "" for caption in captions])
        return batch
