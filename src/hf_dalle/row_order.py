"""The order in which rows are met: a permutation an epoch of rows by number, blocks of rows in sequence for streams.

Both are pure functions of (seed, epoch, process), so a position is a few numbers, and a run that goes on from one
meets the same rows. Here too what a stream asks of shards, and those of `datasets`; tar shards are `tar_shards`'
subject, what becomes of a row `data`'s.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import datasets
import numpy as np
from torch.utils.data import Sampler


MAX_EMPTY_EPOCHS = 1000  # of one lane; shards are dealt anew each epoch, so even a lane of few soon gets rows
BLOCK_ORDER = 2  # keeps the blocks' random numbers apart from those of items


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


class Shards(Protocol):
    """Rows that are read in sequence, shard by shard: [`DatasetShards`] or [`~hf_dalle.tar_shards.TarShards`]."""

    @property
    def num_shards(self) -> int:
        """How many shards there are."""

    @property
    def column_names(self) -> list[str]:
        """What a row may hold."""

    def read(self, shard: int, start: int = 0) -> Iterator[dict | ValueError]:
        """The rows of a shard from row `start` on; in the place of one that cannot be read, the error."""

    def name_row(self, shard: int, row: int) -> str:
        """What to call a row."""

    def select_columns(self, column_names: list[str]) -> "Shards":
        """The same rows with fewer columns."""


class DatasetShards:
    """
    The shards of a streaming `datasets` set. Going on inside a shard reads the rows before again, undecoded.

    Args:
        rows (`datasets.IterableDataset`): from `load_dataset(..., streaming=True)`.
        name (`str`): what to call it.
    """

    def __init__(self, rows: datasets.IterableDataset, name: str):
        self.rows, self.name = rows, name
        self.column_names = rows.column_names or sorted(next(iter(rows.take(1)), {}))

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    @property
    def features(self) -> datasets.Features:
        return self.rows.features or {}

    def name_row(self, shard: int, row: int) -> str:
        return f"{self.name}, shard {shard}/{row}"

    def select_columns(self, column_names: list[str]) -> "DatasetShards":
        shards = copy.copy(self)
        shards.rows, shards.column_names = self.rows.select_columns(column_names), column_names
        return shards

    def read(self, shard: int, start: int = 0) -> Iterator[dict]:
        """The rows of a shard from row `start` on. Raises an `OSError` where the source does not give them."""
        rows = self.rows.shard(self.num_shards, shard)
        try:
            # `iter`, since `__iter__` would deal the one shard out to the loader's workers once more.
            batches = rows.iter(batch_size=1)
            for batch in itertools.islice(batches, start, None):
                yield {column: values[0] for column, values in batch.items()}
        except Exception as error:  # each file system and format has errors of its own
            raise OSError(
                f"Shard {shard} of {self.name} cannot be read ({error}). Once it can, the same command goes on."
            ) from error


class Lane:
    """
    One of the ways along which a stream is read, one a worker of each process: endless, each row of its share once an
    epoch.

    Each epoch all shards are dealt out anew in an order of their own; where there are fewer shards than lanes, each
    lane reads them all and keeps every `num_lanes`-th row. So the lanes' union is each row once an epoch. Lanes do not
    wait for one another: one whose shards were short begins its next epoch while others finish theirs. A lane's rows
    are cut into blocks of `block_size` (the last of an epoch is shorter), read at once and given out shuffled.

    Args:
        shards ([`Shards`]): what is read.
        seed (`int`): of the orders.
        block_size (`int`): rows that are held at a time.
        lane, num_lanes (`int`): this one among all.

    Raises:
        ValueError: if no row comes in very many epochs.
    """

    def __init__(self, shards: Shards, seed: int = 0, block_size: int = 1, lane: int = 0, num_lanes: int = 1):
        self.shards, self.seed, self.block_size = shards, seed, block_size
        self.lane, self.num_lanes = lane, num_lanes

    def read(self, position: dict[str, int] | None = None) -> Iterator[tuple[tuple[int, ...], Any, dict[str, int]]]:
        """
        From `position` on (`None`: from the start): the row's (epoch, shard, row), the row or the `ValueError` that
        came in its place, and the position after it.

        A position names the epoch, the number of the block, the place where the block begins (which of this epoch's
        shards, which row of it) and how many rows of the block were given out.
        """
        position = dict(position or {"epoch": 0, "block": 0, "shard": 0, "row": 0, "given": 0})
        num_empty_epochs = 0
        while num_empty_epochs < MAX_EMPTY_EPOCHS:
            num_rows = 0
            rows = self._read_epoch(position["epoch"], position["shard"], position["row"])
            while block := list(itertools.islice(rows, self.block_size)):
                num_rows += len(block)
                key = (self.seed, position["epoch"], self.lane, position["block"], BLOCK_ORDER)
                order = np.random.default_rng(key).permutation(len(block))
                for given in range(position["given"], len(block)):
                    _, row_key, row = block[order[given]]
                    yield row_key, row, {**position, "given": given + 1}
                (place, (_, _, last), _) = block[-1]
                position |= {"block": position["block"] + 1, "shard": place, "row": last + 1, "given": 0}
            num_empty_epochs = 0 if num_rows or position["block"] else num_empty_epochs + 1
            position = {"epoch": position["epoch"] + 1, "block": 0, "shard": 0, "row": 0, "given": 0}
        raise ValueError("The data set has no rows to train on.")

    def _read_epoch(self, epoch: int, first: int, start: int) -> Iterator[tuple[int, tuple[int, ...], Any]]:
        """From row `start` of this lane's `first` shard on: its place among the lane's shards, key, row."""
        order = np.random.default_rng((self.seed, epoch)).permutation(self.shards.num_shards)
        is_by_rows = len(order) < self.num_lanes
        turn = (self.lane + epoch) % self.num_lanes  # whoever gets one more shard this epoch gets it no more the next
        own = order if is_by_rows else order[turn :: self.num_lanes]
        for place in range(first, len(own)):
            shard = int(own[place])
            for row, content in enumerate(self.shards.read(shard, start), start):
                if not is_by_rows or (row + shard) % self.num_lanes == turn:
                    yield place, (epoch, shard, row), content
            start = 0
