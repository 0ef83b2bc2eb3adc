"""From the data that settings name to this process's batches: data sets, the loader, its position, skipped rows.

Order and content of rows are `hf_dalle.row_order`'s and `hf_dalle.data`'s; the run that uses them lives in `loop.py`.
"""

import copy
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from arguments import TrainArguments
from interruptions import heed_parent_alone
from reporting import append_whole
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_dalle import DalleImageProcessor
from hf_dalle.data import CaptionImageReader, RandomCrop, load_rows
from hf_dalle.row_order import EpochBatchSampler
from hf_dalle.streams import CaptionImageStream, open_dataset


logger = get_logger(__name__)

MAX_NAMED_ROWS = 100  # on the screen, by each process; the file names them all
MIN_ROWS_FOR_SHARE = 1000  # before so many rows were met, a share of skipped ones says little


def image_datasets(
    args: TrainArguments, image_processor: DalleImageProcessor, crop_range: tuple[float, float], **kwargs
) -> tuple[CaptionImageReader, CaptionImageReader | None]:
    """The training and the validation set that `args` name; `kwargs` go to both."""
    size = image_processor.size["height"]
    augmentation = None
    if args.resize_range is not None:
        augmentation = RandomCrop(size, args.resize_range, args.crop_range or crop_range, args.do_random_flip)
    columns = {"image_column": args.image_column, "image_processor": image_processor, "seed": args.seed, **kwargs}
    rows = load_rows(args.train_data_dir, args.dataset_name, args.train_split, args.image_column, args.streaming)
    train = open_dataset(rows, args.shuffle_buffer_size, augmentation=augmentation, **columns)
    if args.validation_split is None:
        return train, None
    rows = load_rows(args.train_data_dir, args.dataset_name, args.validation_split, args.image_column, args.streaming)
    return train, open_dataset(rows, is_training=False, **columns)


def read_column(rows: Any, name: str) -> list:
    """A column of any kind of rows that `load_rows` gives."""
    part = rows.select_columns([name])
    return part[name][:] if hasattr(part, "features") else [part[row][name] for row in range(len(part))]


def make_loader(
    args: TrainArguments, stage: Any, process_index: int = 0, num_processes: int = 1
) -> "RowLoader | StreamLoader":
    """The endless batches of one process from `stage.train_dataset`, with a position that checkpoints can hold."""
    kind = StreamLoader if isinstance(stage.train_dataset, CaptionImageStream) else RowLoader
    return kind(args, stage, process_index, num_processes)


class RowLoader:
    """
    Batches of rows by number ([`~hf_dalle.row_order.EpochBatchSampler`]): those of a collator, with "num_rows", how
    many rows were met for one.

    The position is how many batches this process has given out; those that workers have prepared do not count. It is
    the same for all processes, and with the same global batch it stands for the same place in the data whatever their
    number: give each the state of any.
    """

    def __init__(self, args: TrainArguments, stage: Any, process_index: int, num_processes: int):
        self.dataset, self.collator, self.seed = stage.train_dataset, stage.collator, args.seed
        self.batch_size, self.num_workers = args.train_batch_size, args.dataloader_num_workers
        self.process_index, self.num_processes = process_index, num_processes
        self.num_batches = 0

    def __iter__(self) -> Iterator[dict]:
        place = (self.num_batches, self.process_index, self.num_processes)
        sampler = EpochBatchSampler(len(self.dataset), self.batch_size, self.seed, *place)
        loader = _load(self.dataset, self.num_workers, batch_sampler=sampler, collate_fn=self.collator)
        for batch in loader:
            self.num_batches += 1
            yield {**batch, "num_rows": self.batch_size}

    def skip_batches(self, num_batches: int) -> None:
        """Goes to where this process will have given out so many batches."""
        self.num_batches = num_batches

    def state_dict(self) -> dict:
        return {
            "num_rows": len(self.dataset),
            "num_items": self.num_batches * self.num_processes * self.batch_size,
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            ValueError: if the place lies within a batch of all processes: then the global batch was another.
        """
        if "num_items" not in state:
            raise ValueError("The checkpoint's data was a stream: set `streaming: true`, as before.")
        if state["num_rows"] != len(self.dataset):
            logger.warning(
                f"The data has {len(self.dataset)} rows, but had {state['num_rows']} at the checkpoint: the rows of"
                " this epoch that were not met before are no longer known, and some will come twice or not at all."
            )
        self.num_batches, rest = divmod(state["num_items"], self.num_processes * self.batch_size)
        if rest:
            raise ValueError(
                f"The checkpoint has met {state['num_items']} pictures, which are no whole number of batches of"
                f" {self.batch_size} for {self.num_processes} processes: keep processes x `train_batch_size` x"
                " `gradient_accumulation_steps` as it was."
            )


class StreamLoader:
    """
    Batches of shards read in sequence, one lane ([`~hf_dalle.row_order.Lane`]) a worker of each process: those of a
    collator, with "num_rows", how many rows were met for one.

    Batch k comes from worker k mod `num_workers`. The position holds each worker's place after the last of its batches
    that was given out; those that workers have prepared do not count. It is this process's own, and of as many
    processes and workers.
    """

    def __init__(self, args: TrainArguments, stage: Any, process_index: int, num_processes: int):
        self.stream, self.collator, self.num_workers = stage.train_dataset, stage.collator, args.dataloader_num_workers
        self.batch_size = args.train_batch_size
        self.process_index, self.num_processes = process_index, num_processes
        self.num_batches = 0
        self.places = [None] * max(1, self.num_workers)

    def __iter__(self) -> Iterator[dict]:
        batches = _LaneBatches(self, list(self.places), self.num_batches)
        for batch in _load(batches, self.num_workers, batch_size=None):
            self.places[self.num_batches % len(self.places)] = batch.pop("place")
            self.num_batches += 1
            yield batch

    def skip_batches(self, num_batches: int) -> None:
        """Raises a `ValueError`, but for no batches: a stream has no numbers to go to."""
        if num_batches:
            raise ValueError("The checkpoint does not say where in the stream it was: it cannot be gone on from.")

    def state_dict(self) -> dict:
        return {
            "num_processes": self.num_processes,
            "num_workers": self.num_workers,
            "num_shards": self.stream.rows.num_shards,
            "shuffle_buffer_size": self.stream.shuffle_buffer_size,
            "num_batches": self.num_batches,
            "places": list(self.places),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        Raises:
            ValueError: for a state of other data, or of another number of processes or workers.
        """
        if "places" not in state:
            raise ValueError("The checkpoint's data was no stream: leave `streaming` out, as before.")
        names = {
            "num_processes": "the number of processes",
            "num_workers": "`dataloader_num_workers`",
            "shuffle_buffer_size": "`shuffle_buffer_size`",
            "num_shards": "the number of shards",
        }
        own = self.state_dict()
        for key, name in names.items():
            if state[key] != own[key]:
                raise ValueError(
                    f"{name[0].upper()}{name[1:]} is {own[key]}, but was {state[key]} at the checkpoint. A stream goes"
                    f" on only where it is the same, or rows would be repeated and left out: make it {state[key]}."
                )
        self.num_batches, self.places = state["num_batches"], list(state["places"])


class _LaneBatches(IterableDataset):
    """What a worker of a [`StreamLoader`] runs: batches of its lane, each with the lane's place after it."""

    def __init__(self, loader: StreamLoader, places: list[dict | None], num_batches: int):
        self.stream, self.collator, self.batch_size = loader.stream, loader.collator, loader.batch_size
        self.first_lane = loader.process_index * len(places)
        self.num_lanes = loader.num_processes * len(places)
        self.places, self.num_batches = places, num_batches

    def __iter__(self) -> Iterator[dict]:
        info = get_worker_info()
        # The loader asks worker 0 first; the lane whose turn it is stands there.
        worker = ((info.id if info else 0) + self.num_batches) % len(self.places)
        items = []
        for item, place in self.stream.read_lane(self.first_lane + worker, self.num_lanes, self.places[worker]):
            items.append(item)
            if len(items) == self.batch_size:
                num_rows = len(items) + sum(len(item["skipped"]) for item in items)
                yield {**self.collator(items), "num_rows": num_rows, "place": place}
                items = []


def _load(dataset: Any, num_workers: int, **kwargs) -> DataLoader:
    # A generator of its own: a loader must not draw from the one that dropout uses.
    settings = {"generator": torch.Generator(), "worker_init_fn": heed_parent_alone}
    if num_workers and sys.platform == "linux":
        # Also where Python's own way is another (from 3.14): a signal to all processes of the job would end the server
        # that starts workers, and them with it, before the update that is to be finished has its batches.
        settings["multiprocessing_context"] = "fork"
    return DataLoader(dataset, num_workers=num_workers, persistent_workers=num_workers > 0, **settings, **kwargs)


class SkippedRows:
    """
    The rows that could not be used: each named once, with the reason, in `skipped_rows.jsonl`; too many end the run.

    Its state is how far the file had come, the rows that a full disk kept out of it, and what this process has noted
    since: nothing after `collect`. A run that goes on cuts the file back, so that it equals that of a run that never
    stopped. What cannot be written is tried again at the next `collect`.

    Args:
        output_dir (`str` or `Path`): where the file goes.
        max_share (`float`): share of the rows met that may be skipped.
        min_rows (`int`): met before the share counts.
    """

    def __init__(self, output_dir: str | Path, max_share: float = 1.0, min_rows: int = MIN_ROWS_FOR_SHARE):
        self.path, self.max_share, self.min_rows = Path(output_dir) / "skipped_rows.jsonl", max_share, min_rows
        self.num_bytes, self.num_named, self.num_skipped, self.num_rows = 0, 0, 0, 0
        self.since = {"rows": {}, "num_skipped": 0, "num_rows": 0}
        self.unwritten: dict[int | str, str] = {}  # on the main process
        self._warned, self._named = set(), None

    def state_dict(self) -> dict:
        names = ("num_bytes", "num_named", "num_skipped", "num_rows", "since", "unwritten")
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, copy.deepcopy(value))

    def watch(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches without their "skipped" and "num_rows", which are noted."""
        for batch in batches:
            skipped, num_rows = batch.pop("skipped"), batch.pop("num_rows")
            self.since["rows"].update(skipped)
            self.since["num_skipped"] += len(skipped)
            self.since["num_rows"] += num_rows
            for row, reason in skipped.items():
                self._warn(row, reason)
            yield batch

    def _warn(self, row: int | str, reason: str) -> None:
        if row in self._warned or len(self._warned) > MAX_NAMED_ROWS:
            return
        self._warned.add(row)
        logger.warning(f"Skipped row {row} of the training data: {reason}", main_process_only=False)
        if len(self._warned) > MAX_NAMED_ROWS:
            logger.warning(f"Further ones are named in {self.path} alone.", main_process_only=False)

    def gather(self, accelerator: Accelerator) -> int:
        """
        `collect`, and a look at the share.

        Returns:
            `int`: how many rows have been skipped so far, each counted once.

        Raises:
            ValueError: on all processes, if they are more than `max_share` of the rows met.
        """
        self.collect(accelerator)
        share = self.num_skipped / max(self.num_rows, 1)
        if self.num_rows >= self.min_rows and share > self.max_share:
            raise ValueError(
                f"{self.num_skipped} of {self.num_rows} rows met could not be used, a share of {share:.2g};"
                f" `max_skipped_share` is {self.max_share}. {self.path} names them."
            )
        return self.num_named

    def collect(self, accelerator: Accelerator) -> None:
        """Writes what all processes have noted to the file; all processes must call it."""
        since, self.since = self.since, {"rows": {}, "num_skipped": 0, "num_rows": 0}
        all_since = gather_object([since])
        for one in all_since:
            self.num_skipped += one["num_skipped"]
            self.num_rows += one["num_rows"]
        if accelerator.is_main_process:
            self._write({row: reason for one in all_since for row, reason in one["rows"].items()})
        if any(one["rows"] for one in all_since):
            self.num_bytes, self.num_named = broadcast_object_list([self.num_bytes, self.num_named])

    def _write(self, rows: dict[int | str, str]) -> None:
        if self._named is None:  # the first time: what a killed run wrote after its checkpoint goes
            self._named = self._cut_back() | self.unwritten.keys()
        new = {row: reason for row, reason in rows.items() if row not in self._named}
        self._named.update(new)
        self.num_named += len(new)
        self.unwritten |= new
        if not self.unwritten:
            return
        lines = [json.dumps({"row": row, "reason": reason}) for row, reason in self.unwritten.items()]
        try:
            append_whole(self.path, "".join(f"{line}\n" for line in lines))
        except OSError as error:
            logger.warning_once(f"{self.path} cannot be written; its rows are kept and tried again later. ({error})")
            return
        self.unwritten, self.num_bytes = {}, self.path.stat().st_size

    def _cut_back(self) -> set[int | str]:
        """Cuts the file to `num_bytes`; gives the rows that it names then."""
        if not self.path.is_file():
            return set()
        with self.path.open("r+b") as file:
            file.truncate(min(self.num_bytes, self.path.stat().st_size))
            return {json.loads(line)["row"] for line in file}
