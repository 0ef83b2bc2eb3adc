"""The loader of a run: what real processes with real workers give out, where they go on, which rows were skipped."""

import copy
import itertools
import json
import multiprocessing
import os
import socket
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from loading import SkippedRows, make_loader
from tiny import build_tokenizer
from tiny_data import list_rows, write_parquet
from tiny_shards import make_samples, write_shards, write_tar

from hf_dalle.data import CaptionImageCollator, RandomCrop, load_rows
from hf_dalle.streams import open_dataset


@pytest.fixture(autouse=True)
def accelerator():
    return Accelerator(cpu=True)


KINDS = ["parquet", "tar", "tar stream", "parquet stream"]


def write_rows(folder, kind):
    """20 rows in three shards, of which row 3 and 11 are broken."""
    if "tar" in kind:
        samples = make_samples()
        samples[3][1]["jpg"], samples[11][1]["txt"] = b"broken", b" "
        for index, (first, last) in enumerate(((0, 7), (7, 12), (12, 20))):
            write_tar(folder / f"{index:05d}.tar", samples[first:last])
    else:
        rows = list_rows()
        rows[3]["image"], rows[11]["captions"] = b"broken", [" "]
        for index, (first, last) in enumerate(((0, 7), (7, 12), (12, 20))):
            write_parquet(folder / f"train-{index:05d}-of-00003.parquet", rows[first:last])


def build_stage(folder, kind, **kwargs):
    rows = load_rows(str(folder), streaming="stream" in kind)
    column = "txt" if "tar" in kind else "captions"
    dataset = open_dataset(
        rows, 4, augmentation=RandomCrop(8, (1, 2)), caption_column=column, caption_dropout=0.2, **kwargs
    )
    return SimpleNamespace(train_dataset=dataset, collator=CaptionImageCollator(build_tokenizer(), 12))


def make_args(batch_size=3, num_workers=0, seed=0):
    return SimpleNamespace(train_batch_size=batch_size, dataloader_num_workers=num_workers, seed=seed)


def take(loader, num_batches):
    return list(itertools.islice(loader, num_batches))


def assert_equal(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key], key


# ----------------------------------------------------------------------------------------------- the union is the set


def count_rows(folder, kind, num_workers, process_index, num_processes, num_batches, queue):
    """One process of a run: (epoch, row) of each item it gave out, and the rows it passed over."""
    loader = make_loader(make_args(2, num_workers), build_stage(folder, kind), process_index, num_processes)
    rows, skipped = Counter(), set()
    for batch in take(loader, num_batches):
        rows.update(map(tuple, batch["row_ids"].tolist()))
        skipped |= set(batch["skipped"])
    queue.put((rows, skipped))


def choose(quick, others):
    """Cases of every test run, and those that only `make test-slow` runs."""
    others = [pytest.param(*case, marks=pytest.mark.slow) for case in others if case not in quick]
    return [pytest.param(*case) for case in quick] + others


@pytest.mark.parametrize(
    "kind, num_processes, num_workers",
    choose(
        [("tar", 2, 0), ("tar", 1, 2), ("tar stream", 3, 2), ("tar stream", 2, 1), ("parquet stream", 3, 0)],
        [(kind, *counts) for kind in KINDS for counts in ((1, 0), (1, 2), (2, 0), (2, 2), (3, 0), (3, 1), (3, 2))],
    ),
)
def test_processes_and_workers_together_meet_each_row_once_an_epoch(tmp_path, kind, num_processes, num_workers):
    write_rows(tmp_path, kind)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    own = [(index, num_processes, 60 // num_processes, queue) for index in range(num_processes)]
    processes = [context.Process(target=count_rows, args=(tmp_path, kind, num_workers, *args)) for args in own]
    for process in processes:
        process.start()
    results = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    met = sum((rows for rows, _ in results), Counter())
    rows_of = {epoch: Counter({row: n for row, n in met.items() if row[0] == epoch}) for epoch in range(3)}
    if "stream" in kind:
        # Lanes do not wait for one another: the first epochs are whole, of the last some lanes have done a part.
        places = [(shard, row) for shard, size in enumerate((7, 5, 8)) for row in range(size)]
        whole = {place for place in places if place not in ((0, 3), (1, 4))}
        assert all(count == 1 for count in met.values())
        for epoch in range(3):
            assert {row[1:] for row in rows_of[epoch]} == whole, epoch
    else:
        for epoch in range(3):  # the row after a broken one stands in for it
            assert rows_of[epoch] == Counter([(epoch, row + (row in (3, 11))) for row in range(20)])
    assert len(set().union(*(skipped for _, skipped in results))) == 2


# --------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize(
    "kind, num_workers",
    choose([*((kind, 0) for kind in KINDS), ("tar stream", 2), ("parquet", 2)], [("tar", 2), ("parquet stream", 2)]),
)
def test_a_run_that_goes_on_gives_the_same_batches(tmp_path, kind, num_workers):
    write_rows(tmp_path, kind)
    stage, args = build_stage(tmp_path, kind), make_args(num_workers=num_workers)
    whole = take(make_loader(args, stage, 1, 2), 12)
    first = make_loader(args, stage, 1, 2)
    state = first.state_dict()
    for num_batches in (5, 2, 1):  # from odd and even places; each run is given less than its workers have prepared
        loader = make_loader(args, stage, 1, 2)
        loader.load_state_dict(state)
        start = 12 - len(whole)
        batches = iter(loader)
        assert_equal(take(batches, num_batches), whole[:num_batches])
        whole = whole[num_batches:]
        torch.save(loader.state_dict(), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert start + num_batches == 12 - len(whole)


def test_the_global_order_does_not_depend_on_the_number_of_processes(tmp_path):
    write_rows(tmp_path, "parquet")
    stage = build_stage(tmp_path, "parquet")

    def gather(batch_size, num_processes, num_batches, state=None):
        loaders = [make_loader(make_args(batch_size), stage, index, num_processes) for index in range(num_processes)]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        parts = [take(loader, num_batches) for loader in loaders]
        rows = [row for turn in zip(*parts, strict=True) for batch in turn for row in batch["row_ids"].tolist()]
        return rows, loaders[-1].state_dict()

    whole, _ = gather(6, 1, 6)
    some, state = gather(3, 2, 4)
    rest, _ = gather(2, 3, 2, state)
    assert some == whole[:24] and rest == whole[24:]
    loader = make_loader(make_args(5), stage)
    with pytest.raises(ValueError, match="24 pictures, which are no whole number of batches of 5"):
        loader.load_state_dict(state)
    loader = make_loader(make_args(6), stage)
    loader.skip_batches(4)
    assert [row for batch in take(loader, 2) for row in batch["row_ids"].tolist()] == whole[24:]


def test_a_stream_goes_on_only_where_its_lanes_are_the_same(tmp_path, caplog):
    write_rows(tmp_path, "tar stream")
    stage = build_stage(tmp_path, "tar stream")
    loader = make_loader(make_args(), stage, 0, 2)
    take(loader, 2)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="number of processes is 3, but was 2"):
        make_loader(make_args(), stage, 0, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="`dataloader_num_workers` is 2, but was 0.*make it 0"):
        make_loader(make_args(num_workers=2), stage, 0, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="cannot be gone on from"):
        make_loader(make_args(), stage, 0, 2).skip_batches(3)
    by_number = build_stage(tmp_path, "tar")
    with pytest.raises(ValueError, match="was a stream"):
        make_loader(make_args(), by_number).load_state_dict(state)
    with pytest.raises(ValueError, match="was no stream"):
        make_loader(make_args(), stage).load_state_dict(make_loader(make_args(), by_number).state_dict())
    write_tar(tmp_path / "00003.tar", make_samples(0, 1))
    with pytest.raises(ValueError, match="number of shards is 4, but was 3"):
        make_loader(make_args(), build_stage(tmp_path, "tar stream"), 0, 2).load_state_dict(state)
    longer = make_loader(make_args(), build_stage(tmp_path, "tar"))
    longer.load_state_dict(make_loader(make_args(), by_number).state_dict())
    assert "has 21 rows, but had 20" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["tar", "tar stream"])
def test_a_shard_that_goes_missing_is_an_os_error_that_names_it(tmp_path, kind, num_workers):
    write_shards(tmp_path, (7, 5, 8))
    stage = build_stage(tmp_path, kind)
    loader = make_loader(make_args(num_workers=num_workers), stage)
    batches = iter(loader)
    expected = take(make_loader(make_args(), stage), 30)
    given = take(batches, 1)
    (tmp_path / "00001.tar").rename(tmp_path / "away")
    with pytest.raises(OSError, match="Shard .*00001.tar cannot be opened"):
        for batch in itertools.islice(batches, 40):
            given.append(batch)
    state = loader.state_dict()
    (tmp_path / "away").rename(tmp_path / "00001.tar")
    loader = make_loader(make_args(num_workers=num_workers), stage)
    loader.load_state_dict(state)
    if num_workers:  # other lanes than without
        expected = take(make_loader(make_args(num_workers=num_workers), stage), 30)
    assert_equal(given + take(loader, 5), expected[: len(given) + 5])


# ----------------------------------------------------------------------------------------------------- skipped rows


def watch(skipped, batches):
    """Batches of (rows skipped, number of rows met)."""
    made = ({"row_ids": torch.zeros(1), "skipped": dict(rows), "num_rows": num_rows} for rows, num_rows in batches)
    return list(skipped.watch(made))


def read_names(folder):
    return [json.loads(line) for line in (folder / "skipped_rows.jsonl").read_text().splitlines()]


def test_skipped_rows_are_named_once_also_after_going_on(tmp_path, accelerator, caplog):
    skipped = SkippedRows(tmp_path)
    batches = watch(skipped, [({7: "no picture"}, 2), ({}, 2), ({"a.tar/3": "no caption", 7: "no picture"}, 2)])
    assert [batch.keys() for batch in batches] == [{"row_ids"}] * 3
    assert skipped.gather(accelerator) == 2 and skipped.gather(accelerator) == 2
    state = skipped.state_dict()
    watch(skipped, [({9: "no caption"}, 2), ({7: "no picture"}, 2)])
    assert skipped.gather(accelerator) == 3
    expected = [{"row": 7, "reason": "no picture"}, {"row": "a.tar/3", "reason": "no caption"}]
    assert read_names(tmp_path) == [*expected, {"row": 9, "reason": "no caption"}]
    with (tmp_path / "skipped_rows.jsonl").open("a") as file:
        file.write('{"row": 12, "rea')  # killed while it wrote
    again = SkippedRows(tmp_path)
    again.load_state_dict(torch.load(save(state, tmp_path), weights_only=True))
    assert again.gather(accelerator) == 2 and read_names(tmp_path) == expected
    watch(again, [({9: "no caption"}, 2), ({7: "no picture"}, 2)])
    assert again.gather(accelerator) == 3 and again.state_dict() == skipped.state_dict()
    assert read_names(tmp_path) == [*expected, {"row": 9, "reason": "no caption"}]
    before = copy.deepcopy(again.state_dict())
    watch(again, [({11: "no picture"}, 2)])
    again.load_state_dict(before)  # of an update that is not made after all
    again.collect(accelerator)
    assert again.state_dict() == before
    anew = SkippedRows(tmp_path)
    assert anew.gather(accelerator) == 0 and read_names(tmp_path) == []
    assert sum("Skipped row 7 of the training data: no picture" in line.message for line in caplog.records) == 2


def test_rows_that_a_full_disk_kept_out_are_named_later(tmp_path, accelerator):
    skipped, folder = SkippedRows(tmp_path / "run"), tmp_path / "run"  # not there: nothing can be written
    watch(skipped, [({7: "no picture"}, 2)])
    assert skipped.gather(accelerator) == 1 and not folder.exists()
    again = SkippedRows(folder)
    again.load_state_dict(torch.load(save(skipped.state_dict(), tmp_path), weights_only=True))
    folder.mkdir()
    for one in (skipped, again):
        watch(one, [({7: "no picture", 9: "no caption"}, 2)])
        assert one.gather(accelerator) == 2 and one.gather(accelerator) == 2
        assert read_names(folder) == [{"row": 7, "reason": "no picture"}, {"row": 9, "reason": "no caption"}]
        (folder / "skipped_rows.jsonl").unlink()
    assert skipped.state_dict() == again.state_dict()


def save(state, folder):
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_too_many_skipped_rows_end_the_run(tmp_path, accelerator):
    skipped = SkippedRows(tmp_path, max_share=0.1, min_rows=50)
    watch(skipped, [({row: "no picture"}, 2) for row in range(20)])
    assert skipped.gather(accelerator) == 20  # half of them, but too few to tell
    watch(skipped, [({}, 160)])
    assert skipped.gather(accelerator) == 20  # 20 of 200: not more than the share
    watch(skipped, [({20: "no picture"}, 2)])
    with pytest.raises(ValueError, match="21 of 202 rows met could not be used.*`max_skipped_share` is 0.1"):
        skipped.gather(accelerator)
    assert len(read_names(tmp_path)) == 21


def share_a_file(folder, index, port, queue):
    """One of two processes that skip rows: what it counts, and the words with which it ends."""
    AcceleratorState._reset_state(reset_partial_state=True)  # forked: the parent was alone
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator, skipped = Accelerator(cpu=True), SkippedRows(folder, max_share=0.5, min_rows=20)
    watch(skipped, [({index: "own", 7: "of both"}, 2)])
    num_rows, state = skipped.gather(accelerator), skipped.state_dict()
    watch(skipped, [({index: "again"}, 1) for _ in range(8)])
    try:
        skipped.gather(accelerator)
    except ValueError as error:
        queue.put((accelerator.num_processes, num_rows, state, str(error)))


def test_processes_share_one_file_and_end_together(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=share_a_file, args=(tmp_path, index, port, queue)) for index in range(2)]
    for process in processes:
        process.start()
    one, other = [queue.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert one == other and one[:2] == (2, 3) and "20 of 20 rows met" in one[-1]
    counts = {"num_named": 3, "num_skipped": 4, "num_rows": 4, "since": {"rows": {}, "num_skipped": 0, "num_rows": 0}}
    counts |= {"unwritten": {}}
    assert one[2] == {"num_bytes": (tmp_path / "skipped_rows.jsonl").stat().st_size, **counts}
    assert sorted((line["row"], line["reason"]) for line in read_names(tmp_path)) == [
        (0, "own"),
        (1, "own"),
        (7, "of both"),
    ]
