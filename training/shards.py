"""Parquet shards that several processes make together: whose is which, and files that are whole or not there at all.

What goes into a shard is the scripts': `download_images.py`, `filter_captions.py`, `precompute_image_tokens.py`,
`prepare_*.py`.
A shard's settings are kept inside it, so that a run that goes on never mixes two recipes; the rows that it could not
take are named in a file beside it.
"""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq


RECORD = b"hf_dalle"  # the key of a shard's settings among the metadata of its schema


def read_rank() -> tuple[int, int]:
    """
    This process's number and how many there are, as `torchrun` and `accelerate launch` tell by the environment. No
    process waits for another, so none has to join a group.
    """
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_share(num_shards: int) -> range:
    """The shards of this process. They follow from its number alone, so that none is done twice or by nobody."""
    index, count = read_rank()
    return range(index, num_shards, count)


def name_shards(split: str, num_shards: int) -> list[str]:
    """`{split}-00000-of-00002.parquet` and so on; a split of one shard is plain `{split}.parquet`."""
    if num_shards == 1:
        return [f"{split}.parquet"]
    return [f"{split}-{index:05d}-of-{num_shards:05d}.parquet" for index in range(num_shards)]


def check_division(folder: Path, split: str, names: list[str]) -> None:
    """Refuses a folder with shards of `split` that are not among `names`: readers would take both."""
    is_shard = re.compile(rf"{re.escape(split)}(-\d{{5}}-of-\d{{5}})?\.parquet")
    others = sorted({path.name for path in folder.glob("*.parquet") if is_shard.fullmatch(path.name)} - {*names})
    if others:
        raise ValueError(
            f"{folder} holds {others[0]}, but this run makes {names[0]}{' and on' if len(names) > 1 else ''}: delete"
            " the old shards, take their number of rows a shard, or choose another --output_dir."
        )


def is_finished(path: Path, record: dict) -> bool:
    """
    Whether a shard is there and whole. One whose end is missing is not.

    Raises:
        ValueError: if it is there, but was made from something else or with other settings than `record` says.
    """
    if not path.is_file():
        return False
    try:
        metadata = pq.read_schema(path).metadata or {}
    except pa.ArrowInvalid:
        return False
    found = json.loads(metadata.get(RECORD, b"{}"))
    if found != record:
        keys = [key for key in {**found, **record} if found.get(key) != record.get(key)]
        was = ", ".join(f"{key} {found.get(key)}, now {record.get(key)}" for key in keys)
        raise ValueError(f"{path} is of other settings ({was}): delete it, or choose another --output_dir.")
    return True


def add_record(schema: pa.Schema, record: dict) -> pa.Schema:
    """The schema of a shard that [`is_finished`] knows again."""
    return schema.with_metadata({**(schema.metadata or {}), RECORD: json.dumps(record)})


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """
    A name beside `path` to write to, which takes its place once the block is through and the disk has it. A process
    that is killed leaves it behind, hidden, and the next one to make this shard writes over it.
    """
    beside = path.with_name(f".{path.name}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_split(examples: list[dict], features: datasets.Features, path: Path) -> None:
    """Writes a split of so few rows that they are all in memory; the file appears whole or not at all."""
    with written_beside(path) as beside:
        datasets.Dataset.from_list(examples, features=features).to_parquet(beside)


def skipped_file(shard: Path) -> Path:
    """Where the rows that a shard could not take are named."""
    return shard.with_suffix(".skipped.jsonl")


def write_skipped(shard: Path, rows: list[dict]) -> None:
    """A JSON line a row, with its "reason"; no file if there are none. To be written before the shard is."""
    path = skipped_file(shard)
    if not rows:
        path.unlink(missing_ok=True)
        return
    with written_beside(path) as beside:
        beside.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")


def sum_up(folder: Path, names: list[str]) -> tuple[int, Counter, int]:
    """Rows in the finished shards, whoever made them, rows skipped by reason, and how many shards are not finished."""
    num_rows, skipped, num_unfinished = 0, Counter(), 0
    for path in (folder / name for name in names):
        if not path.is_file():
            num_unfinished += 1
            continue
        num_rows += pq.read_metadata(path).num_rows
        if skipped_file(path).is_file():
            lines = skipped_file(path).read_text(encoding="utf-8").splitlines()
            skipped.update(json.loads(line)["reason"] for line in lines)
    return num_rows, skipped, num_unfinished


def in_order(pool: ThreadPoolExecutor, work: Callable, rows: Iterable, window: int) -> Iterator:
    """The results of `work` on all rows in their order, with never more than `window` under way or waiting."""
    rows, waiting = iter(rows), deque()
    while True:
        for row in islice(rows, window - len(waiting)):
            waiting.append(pool.submit(work, row))
        if not waiting:
            return
        yield waiting.popleft().result()
