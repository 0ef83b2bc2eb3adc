"""Stored work of an evaluation: by its own key alone, the same in any number of processes, whole or not there."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation import stored
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_evaluation import build_home, make_evaluation


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("home"))


def test_stored_work_is_taken_up_only_by_its_own_key(home, tmp_path):
    evaluation, calls = make_evaluation(home, tmp_path / "out"), []

    def square(rows):
        calls.append(rows)
        return {"squares": torch.tensor(rows) ** 2, "rows": np.array(rows)}

    def compute(key, rows=range(7), size=3):
        return evaluation.compute("squares", key, rows, square, size, "squares")["squares"].tolist()

    expected = [row * row for row in range(7)]
    assert compute({"a": 1}) == expected and calls == [[0, 1, 2], [3, 4, 5], [6]]
    assert compute({"a": 1}) == expected and len(calls) == 3
    for other in (({"a": 2},), ({"a": 1}, range(7), 4)):
        assert compute(*other) == expected
    assert len(calls) == 3 + 3 + 2 and compute({"a": 1}, range(1, 7)) == expected[1:]
    assert len(calls) == 8 + 2
    with pytest.raises(ValueError, match="`squares` has 1 entries for 3 rows"):
        evaluation.compute("few", {}, range(3), lambda rows: {"squares": torch.zeros(1)}, 3, "few")


@hypothesis_settings(max_examples=20, deadline=None)
@given(
    rows=st.lists(st.integers(0, 1000), max_size=12),
    size=st.integers(1, 9),
    num_processes=st.integers(1, 4),
    data=st.data(),
)
def test_shards_are_the_rows_whoever_computes_them(rows, size, num_processes, data):
    with tempfile.TemporaryDirectory() as folder:
        work = stored.Shards(Path(folder), {}, rows, size)
        missing = work.list_missing()
        shares = [missing[process::num_processes] for process in range(num_processes)]
        for number in data.draw(st.permutations([number for share in shares for number in share])):
            work.write(number, {"x": np.array(work.rows_of(number)), "y": torch.tensor(work.rows_of(number)) / 3})
        assert not work.list_missing() and [row for number in missing for row in work.rows_of(number)] == rows
        read = stored.Shards(Path(folder), {}, rows, size).read()
        if rows:
            assert read["x"].tolist() == rows and torch.equal(torch.from_numpy(read["y"]), torch.tensor(rows) / 3)


def test_a_cut_shard_is_computed_again(tmp_path):
    work = stored.Shards(tmp_path, {"a": 1}, range(5), 2)
    for number in work.list_missing():
        work.write(number, {"x": np.array(work.rows_of(number))})
    whole = work.path(1).read_bytes()
    work.path(1).write_bytes(whole[: len(whole) // 2])
    assert work.list_missing() == [1]
    work.write(1, {"x": np.array([2, 3])})
    assert work.read()["x"].tolist() == [0, 1, 2, 3, 4]
