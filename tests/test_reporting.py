"""What a run shows: rows that a full disk cannot lose, trackers that get pictures, figures of the machine."""

import json
import resource
import signal
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from reporting import Meter, Reporter, append_whole, read_memory, save_whole, send_picture, tracker_options
from tiny_training import read_log


@pytest.fixture
def reporter(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    made = Reporter(SimpleNamespace(output_dir=str(tmp_path), max_train_steps=5), Accelerator(cpu=True))
    made.start(0)
    yield made
    made.bar.close()


@pytest.fixture
def file_limit():
    """Sets how long a file may get, as a full disk would."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda number: resource.setrlimit(resource.RLIMIT_FSIZE, (number, old[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, old)
    signal.signal(signal.SIGXFSZ, handler)


def test_rows_wait_until_the_disk_has_room(reporter, tmp_path, file_limit):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    reporter.write(1, {"loss": 1.0})
    file_limit(60)
    reporter.write(2, {"loss": 2.0, "words": "x" * 100})
    reporter.write_pictures(2, {"samples": picture})
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.0}]  # and nothing of the second row
    assert list((tmp_path / "validation").iterdir()) == []
    file_limit(10**6)
    reporter.write(3, {"loss": 3.0})
    assert [row["step"] for row in read_log(tmp_path)] == [1, 2, 3]
    shown = Image.open(tmp_path / "validation" / "samples-0000002.png")
    assert np.array_equal(np.asarray(shown), np.asarray(picture))
    assert reporter.unwritten_rows == [] and reporter.unwritten_pictures == {}


def test_what_was_never_written_is_written_at_the_end(reporter, tmp_path, file_limit):
    file_limit(0)
    reporter.write(1, {"loss": 1.0})
    file_limit(10**6)
    reporter.close()
    assert read_log(tmp_path) == [{"step": 1, "loss": 1.0}]


@given(rows=st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=5), limit=st.integers(0, 120))
def test_a_file_gets_all_of_a_text_or_nothing(tmp_path_factory, rows, limit):
    path, whole = tmp_path_factory.mktemp("file") / "log", b""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        for row in rows:
            data = row.encode("utf-8", "replace")
            try:
                append_whole(path, data.decode())
            except OSError:
                assert len(whole) + len(data) > limit
            else:
                whole += data
            assert path.read_bytes() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(OSError):
        save_whole(tmp_path / "a.png", Image.new("HSV", (4, 4)))  # a mode that no PNG has
    assert list(tmp_path.iterdir()) == []


def test_rows_say_what_the_machine_does(reporter):
    reporter.add({"loss": torch.tensor(1.0), "grad_norm": 3.0}, num_pictures=4)
    reporter.add({"loss": 2.0}, num_pictures=4)
    values = reporter.read()
    assert values["loss"] == 1.5 and values["grad_norm"] == 3.0
    assert values["pictures_per_second"] > 0 and 0.05 < values["memory_gb"] < 100
    assert read_memory(torch.device("cpu")) > 5e7
    shown = reporter.bar.postfix
    assert "loss=1.5" in shown and "pictures/s=" in shown and "GB" in shown and "grad_norm" not in shown


def test_half_a_row_goes_on_bit_for_bit():
    values = torch.rand(20, generator=torch.Generator().manual_seed(0))
    whole, first, second = Meter(), Meter(), Meter()
    for index, value in enumerate(values):
        whole.add({"loss": value})
        if index == 7:
            second.load_state_dict(first.state_dict())
        (first if index < 7 else second).add({"loss": value})
    assert second.read()["loss"] == whole.read()["loss"]


def test_pictures_go_to_trackers_that_take_them():
    sent, picture = [], Image.new("RGB", (4, 2), "red")
    takes = SimpleNamespace(name="wandb", log_images=lambda values, step: sent.append((values, step)))
    send_picture(takes, "samples", picture, step=3)
    send_picture(SimpleNamespace(name="mlflow"), "samples", picture, step=3)  # which Accelerate sends none to
    assert sent == [({"validation/samples": [picture]}, 3)]


def test_trackio_keeps_a_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("trackio")
    args = SimpleNamespace(output_dir=str(tmp_path / "kites"), max_train_steps=2)
    Path(args.output_dir).mkdir()
    for step in (1, 2):  # started again after the first update
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, log_with="trackio")
        accelerator.init_trackers("hf-dalle", config={"seed": 0}, init_kwargs=tracker_options(args))
        reporter = Reporter(args, accelerator)
        reporter.start(step - 1)
        reporter.write(step, {"loss": 0.5 / step})
        reporter.write_pictures(step, {"samples": Image.new("RGB", (4, 4), "red")})
        reporter.close()
        accelerator.end_training()
    with sqlite3.connect(tmp_path / "trackio" / "hf-dalle.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    rows = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    shown = [(name, step, metrics["loss"]) for name, step, metrics in rows if "loss" in metrics]
    assert shown == [("kites", 1, 0.5), ("kites", 2, 0.25)]  # one run, gone on with
    assert [step for _, step, metrics in rows if "validation/samples" in metrics] == [1, 2]
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2
