"""The order in which rows are met: permutations of rows by number, lanes of a stream, and going on inside both."""

import itertools
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_dalle.row_order import DatasetShards, EpochBatchSampler, Lane


# -------------------------------------------------------------------------------------------------- rows by number


def take(sampler, num_batches):
    return list(itertools.islice(sampler, num_batches))


@settings(max_examples=100, deadline=None)
@given(
    num_rows=st.integers(1, 12),
    batch_size=st.integers(1, 7),
    num_processes=st.integers(1, 3),
    start_batch=st.integers(0, 9),
    seed=st.integers(0, 3),
)
def test_batches_of_epochs(num_rows, batch_size, num_processes, start_batch, seed):
    def build(start=0, process=0, processes=num_processes):
        return EpochBatchSampler(num_rows, batch_size, seed, start, process, processes)

    # all processes' batches, in turn, are the one stream
    parts = [take(build(process=process), 20) for process in range(num_processes)]
    joined = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert joined == take(build(processes=1), 20 * num_processes)
    # each epoch is a permutation of the rows
    stream = [key for batch in joined for key in batch]
    for epoch in range(len(stream) // num_rows):
        keys = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert {key[0] for key in keys} == {epoch} and sorted(key[1] for key in keys) == list(range(num_rows))
    # starting later is passing over
    for process, part in enumerate(parts):
        assert take(build(start_batch, process), 5) == part[start_batch : start_batch + 5]


def test_epochs_and_seeds_differ():
    orders = {tuple(row for _, row in take(EpochBatchSampler(50, 50, seed), 3)[epoch])
              for seed in range(3) for epoch in range(3)}  # fmt: skip
    assert len(orders) == 9
    with pytest.raises(ValueError, match="no rows"):
        EpochBatchSampler(0, 1)


# ------------------------------------------------------------------------------------------------ rows in sequence


class ListShards:
    """Shards of some lengths, whose rows say what they are."""

    def __init__(self, sizes):
        self.sizes, self.num_shards = sizes, len(sizes)

    def read(self, shard, start=0):
        yield from ((shard, row) for row in range(start, self.sizes[shard]))


def read(lane, num_rows, position=None):
    return list(itertools.islice(lane.read(position), num_rows))


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    num_lanes=st.integers(1, 5),
    block_size=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_each_epoch_of_all_lanes_is_each_row_once(sizes, num_lanes, block_size, seed):
    shards, num_epochs, met = ListShards(sizes), 4, Counter()
    for lane in range(num_lanes):
        epochs = []
        for (epoch, *place), row, _ in Lane(shards, seed, block_size, lane, num_lanes).read():
            if epoch >= num_epochs:  # lanes do not wait for one another: each is read to the end of its own epochs
                break
            assert row == tuple(place)
            met[(epoch, *place)] += 1
            epochs.append(epoch)
        assert epochs == sorted(epochs)
    rows = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert met == Counter((epoch, *row) for epoch in range(num_epochs) for row in rows)


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(any),
    num_lanes=st.integers(1, 4),
    block_size=st.integers(1, 9),
    num_read=st.integers(1, 60),
)
def test_a_lane_goes_on_from_any_position(sizes, num_lanes, block_size, num_read):
    lane = Lane(ListShards(sizes), 1, block_size, num_lanes - 1, num_lanes)
    whole = read(lane, num_read + 20)
    assert read(lane, 20, whole[num_read - 1][2]) == whole[num_read:]
    assert all(type(value) is int for value in whole[num_read - 1][2].values())  # what a checkpoint can hold


def test_a_position_reads_one_block_again_and_no_more():
    opened = []

    class Watched(ListShards):
        def read(self, shard, start=0):
            for row in range(start, self.sizes[shard]):
                opened.append((shard, row))
                yield shard, row

    lane = Lane(Watched([50, 50, 50]), block_size=8)
    position = read(lane, 75)[-1][2]
    opened.clear()
    read(lane, 1, position)
    assert len(opened) == 8


def test_blocks_and_shards_are_shuffled_anew_each_epoch():
    lane = Lane(ListShards([16] * 6), block_size=8)
    orders = [[place[1:] for place, _, _ in read(lane, 288)][epoch * 96 : epoch * 96 + 96] for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(dict.fromkeys(shard for shard, _ in order)) for order in orders}) == 3
    in_blocks = [[row for _, row in order[:8]] for order in orders]
    assert len({tuple(block) for block in in_blocks}) == 3 and all(
        sorted(block) == list(range(8)) for block in in_blocks
    )
    assert [row for _, row in orders[0]] != [row for _, row, _ in read(Lane(ListShards([16] * 6), seed=1), 96)]


def test_an_empty_stream_is_an_error_not_a_hang():
    for sizes in ([], [0, 0]):
        with pytest.raises(ValueError, match="no rows"):
            next(Lane(ListShards(sizes)).read())


# ------------------------------------------------------------------------------------------- shards of `datasets`


def test_shards_of_a_streaming_data_set(tmp_path):
    for shard in range(3):
        rows = {"number": [10 * shard + row for row in range(4 + shard)], "other": [None] * (4 + shard)}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{shard}.parquet")
    files = sorted(str(path) for path in tmp_path.glob("*.parquet"))
    shards = DatasetShards(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True), "it")
    assert shards.num_shards == 3 and shards.column_names == ["number", "other"]
    shards = shards.select_columns(["number"])
    assert list(shards.read(2)) == [{"number": 20 + row} for row in range(6)]
    assert list(shards.read(1, 3)) == [{"number": 13}, {"number": 14}]
    assert shards.name_row(1, 3) == "it, shard 1/3"
    (tmp_path / "a.jsonl").write_text('{"b": 1, "a": 2}\n{"b": 3, "a": 4}')
    untyped = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True)
    shards_of_json = DatasetShards(untyped, "json")
    assert sorted(shards_of_json.column_names) == ["a", "b"]
    assert list(shards_of_json.select_columns(["b"]).read(0)) == [{"b": 1}, {"b": 3}]
    (tmp_path / "1.parquet").unlink()
    with pytest.raises(OSError, match="Shard 1 of it cannot be read"):
        list(shards.read(1))
