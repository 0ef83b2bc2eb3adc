"""Caption-image items from shards that are read in sequence, where there are too many rows to number, or far away.

What an item is, is `data`'s subject; in which order rows come, `row_order`'s.
"""

import itertools
from collections.abc import Iterator

import datasets

from .data import MAX_BROKEN_ROWS, CaptionImageDataset, CaptionImageReader, catch_error
from .row_order import DatasetShards, Lane, Shards
from .tar_shards import TarRows, TarShards


class CaptionImageStream(CaptionImageReader):
    """
    Items of [`CaptionImageReader`] from shards, read in sequence along lanes ([`~hf_dalle.row_order.Lane`]).

    An item has `skipped` too: the names (`shard/row`) of the rows before it in its lane that could not be used, with
    the reasons.

    Args:
        rows (`Shards`): from [`load_rows`] where `streaming`.
        shuffle_buffer_size (`int`): rows a lane holds, still encoded, to shuffle.
        kwargs: those of [`CaptionImageReader`].
    """

    def __init__(self, rows: Shards, shuffle_buffer_size: int = 1000, **kwargs):
        super().__init__(rows, **kwargs)
        self.shuffle_buffer_size = shuffle_buffer_size

    def read_lane(
        self, lane: int = 0, num_lanes: int = 1, position: dict[str, int] | None = None
    ) -> Iterator[tuple[dict, dict[str, int]]]:
        """Endless items of a lane from `position` on, each with the position after it."""
        skipped: dict[str, str] = {}
        num_broken = 0
        rows = Lane(self.rows, self.seed, self.shuffle_buffer_size, lane, num_lanes)
        for place, row, after in rows.read(position):
            item = catch_error(self._make_read_item, row, *place)
            if isinstance(item, ValueError):
                name = self.rows.name_row(*place[1:])
                skipped[name] = str(item)
                num_broken += 1
                if num_broken == MAX_BROKEN_ROWS:
                    raise ValueError(f"{num_broken} rows in succession cannot be used; {name}: {item}.")
                continue
            yield {**item, "skipped": skipped}, after
            skipped, num_broken = {}, 0

    def read_all(self) -> Iterator[tuple[str, dict | ValueError]]:
        """The name of each row with its item of epoch 0 or, where the row cannot be used, the error, in order."""
        for shard in range(self.rows.num_shards):
            for index, row in enumerate(self.rows.read(shard)):
                yield self.rows.name_row(shard, index), catch_error(self._make_read_item, row, 0, shard, index)

    def draw_items(self, num_items: int) -> list[dict]:
        """The first items of a lane of its own, at most one epoch's."""
        epoch = itertools.takewhile(lambda pair: pair[1]["epoch"] == 0, self.read_lane())
        return [item for item, _ in itertools.islice(epoch, num_items)]

    def _make_read_item(self, row: dict | ValueError, *place: int) -> dict:
        if isinstance(row, ValueError):
            raise row
        return self.make_item(row, *place)

    def describe(self) -> str:
        return f"{self.rows.num_shards:,} shards, read in sequence"


def open_dataset(rows: datasets.Dataset | TarRows | Shards, shuffle_buffer_size: int = 1000, **kwargs):
    """The [`CaptionImageDataset`] of rows by number, or the [`CaptionImageStream`] of shards."""
    if isinstance(rows, TarShards | DatasetShards):
        return CaptionImageStream(rows, shuffle_buffer_size, **kwargs)
    return CaptionImageDataset(rows, **kwargs)
