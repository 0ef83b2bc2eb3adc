"""What cuts a run short and costs no update: signals, losses that are no numbers, full disks, shards that are gone.

Kills without warning are in `test_loop.py`, damaged checkpoints in `test_checkpointing.py`.
"""

import contextlib
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
import train_dvae
from interruptions import Stopped, StopSignals
from safetensors.torch import load_file
from tiny_processes import finish, fork, fork_run, make_ranks, run_script, wait_until
from tiny_shards import write_shards
from tiny_training import (
    MODEL,
    ROOT,
    VALIDATION,
    dvae_settings,
    list_steps,
    losses,
    read_log,
    run,
    write_data,
    write_settings,
)


VQ_VAE = {**MODEL, "quantizer": "nearest", "codebook_dim": 8}  # draws no noise, keeps averages in buffers
CLOCK = {"pictures_per_second", "memory_gb"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("interruptions")
    write_data(home / "data")
    return home


def build_settings(home, output_dir, **settings):
    """Of 8 updates, each of two batches, with rows, validations and checkpoints that do not fall together."""
    shared = {"max_train_steps": 8, "logging_steps": 3, "checkpointing_steps": 4, "learning_rate": 0.003}
    shared |= {**VALIDATION, "validation_steps": 2, "train_batch_size": 4, "gradient_accumulation_steps": 2}
    return dvae_settings(home / "data", output_dir, **{**shared, "resize_range": [1.0, 1.5], **settings})


def drop_clock(log):
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in log]


@pytest.fixture(scope="module")
def whole(home):
    """The log of a run that nothing interrupts."""
    return drop_clock(run(build_settings(home, home / "whole")))


class Stage(train_dvae.DVAEStage):
    """A dVAE's stage to which something happens in the first batch of an update."""

    happens = staticmethod(lambda stage, batch, step: None)

    def compute_loss(self, model, batch, step):
        if not model.training:
            return super().compute_loss(model, batch, step)
        type(self).happens(self, batch, step)
        return super().compute_loss(model, batch, step)


@pytest.fixture
def happening(monkeypatch):
    """Takes what happens: a function of (stage, batch, step)."""

    @contextlib.contextmanager
    def let_happen(function):
        with monkeypatch.context() as patch:
            patch.setattr(Stage, "happens", staticmethod(function))
            patch.setattr(train_dvae, "DVAEStage", Stage)
            yield

    return let_happen


# ---------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("step", [1, 2, 4, 5, 8])
def test_a_signal_costs_nothing(home, whole, tmp_path, happening, step):
    """It arrives within update 1, 2, ...: with nothing due after it, a validation, a checkpoint, all at the end."""
    settings = build_settings(home, tmp_path / "run")

    def send(stage, batch, now):
        if now == step - 1:
            signal.raise_signal(signal.SIGTERM)

    with happening(send), pytest.raises(Stopped) as stopped:
        run(settings)
    assert stopped.value.signal_number == signal.SIGTERM
    assert list_steps(tmp_path / "run")[-1] == step
    assert not (tmp_path / "run" / "config.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def cut(stage, batch, now):
        if now == step:  # what was due after the last update is done by now, and done again by the next run
            raise KeyboardInterrupt

    with happening(cut), contextlib.suppress(KeyboardInterrupt):
        run(settings)
    assert drop_clock(run(settings)) == whole
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_a_real_process_ends_as_schedulers_understand(home, tmp_path, number, num_workers):
    """In a process that starts others by a server, as Python 3.14 does: the loader's workers must not be such."""
    settings = build_settings(home, tmp_path / "run", max_train_steps=10000, dataloader_num_workers=num_workers)
    settings |= {"validation_split": None, "validation_steps": 5000, "logging_steps": 1}
    process = fork_run({**settings, "checkpointing_steps": 5000})
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), process)
    os.killpg(process.pid, number)  # the loader's workers get it too, as from Slurm
    assert finish(process) == [-number], (tmp_path / "run.txt").read_text()[-2000:]
    [step] = list_steps(tmp_path / "run")
    assert (
        step % 5000 and f"Stopped after update {step}; the same command goes on" in (tmp_path / "run.txt").read_text()
    )
    log = run(settings, "--max_train_steps", str(step + 1), "--dataloader_num_workers", "0")
    assert [row["step"] for row in log][-1] == step + 1


def hold_signals():
    with StopSignals() as signals:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        print("received", signals.received, flush=True)
        signal.raise_signal(signal.SIGTERM)
        print("never", flush=True)


def test_torchruns_copy_of_a_signal_is_passed_over_and_the_next_ends_at_once(tmp_path):
    process = fork(hold_signals, output=tmp_path / "out.txt")
    assert finish(process) == [-signal.SIGTERM]
    assert (tmp_path / "out.txt").read_text() == f"received {signal.SIGTERM.value}\n"


# ----------------------------------------------------------------------------------------------- several processes


def run_where_it_happens(argv, kind, rank, step):
    """The script, in a process to which something happens if it is this rank, in this update."""

    def happen(stage, batch, now):
        if int(os.environ["RANK"]) != rank or now != step:
            return
        if kind == "nan":
            batch["pixel_values"].fill_(torch.nan)
        elif kind == "signal":
            signal.raise_signal(signal.SIGTERM)
        else:
            stage.train_dataset.make_item = raise_missing

    Stage.happens, train_dvae.DVAEStage = staticmethod(happen), Stage
    run_script(argv)


def raise_missing(*args):
    raise OSError("Shard 00007.tar cannot be opened.")


def fork_where_it_happens(settings, kind, step=5):
    argv = [str(ROOT / "training" / "train.py"), str(write_settings(settings))]
    output = Path(settings["output_dir"]).with_suffix(".txt")
    return [
        fork(run_where_it_happens, argv, kind, 1, step, output=output, environment=environment)
        for environment in make_ranks(2)
    ]


@pytest.fixture(scope="module")
def noiseless(home):
    """Settings of one process, and its log: 8 pictures an update."""
    settings = build_settings(home, home / "noiseless", model={**VQ_VAE, "codebook_decay": 1.0}, resize_range=None)
    return settings, run(settings)


@pytest.mark.parametrize(("kind", "codes"), [("signal", [-signal.SIGTERM] * 2), ("shard", [1, 1])])
def test_what_happens_to_one_process_ends_all_after_the_same_update(noiseless, tmp_path, kind, codes):
    """Two ranks of 4 pictures; then one of 4 twice goes on where they stopped, in the same order."""
    settings, expected = noiseless
    two = {**settings, "output_dir": str(tmp_path / "run"), "gradient_accumulation_steps": 1}
    ranks = fork_where_it_happens(two, kind)
    assert finish(*ranks) == codes, (tmp_path / "run.txt").read_text()[-3000:]
    step = 6 if kind == "signal" else list_steps(tmp_path / "run")[-1]
    assert list_steps(tmp_path / "run") == ([4, 6] if kind == "signal" else [4, step]) and step in (5, 6)
    if kind == "shard":
        assert "train.py: Shard 00007.tar cannot be opened." in (tmp_path / "run.txt").read_text()
    with pytest.raises(ValueError, match="8 pictures an update.*`gradient_accumulation_steps: 2`"):
        run(two)
    log = run({**two, "gradient_accumulation_steps": 2})
    for name in ("loss", "grad_norm", "nll", "commitment_loss", "validation_psnr"):
        assert losses(log, name) == pytest.approx(losses(expected, name), abs=1e-5), name


def test_a_loss_of_one_process_that_is_no_number_is_skipped_by_all(noiseless, tmp_path):
    settings = {**noiseless[0], "output_dir": str(tmp_path / "run"), "gradient_accumulation_steps": 1}
    ranks = fork_where_it_happens(settings, "nan")
    assert finish(*ranks) == [0, 0], (tmp_path / "run.txt").read_text()[-3000:]
    assert losses(read_log(tmp_path / "run"), "skipped_updates") == {3: 0, 4: 0, 6: 1, 8: 1}


@pytest.mark.slow
def test_torchrun_passes_the_signal_on(home, tmp_path):
    import subprocess
    import sys

    settings = build_settings(home, tmp_path / "run", max_train_steps=10000, checkpointing_steps=5000)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [str(ROOT / "training" / "train.py"), str(write_settings(settings))]
    with (tmp_path / "out.txt").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 1  # torchrun's own, whatever its workers' are
    [step] = list_steps(tmp_path / "run")
    assert f"Stopped after update {step}" in (tmp_path / "out.txt").read_text()


# ------------------------------------------------------------------------------------------------ no numbers, no room


def test_an_update_that_is_no_number_changes_nothing_but_the_count(home, tmp_path, happening):
    """Its codebook's averages neither; and no checkpoint is written before the next that is one."""
    seen = {}

    def spoil(stage, batch, step):
        # As the update finds it: the first of its batches changes the codebook's averages.
        seen.setdefault(step, {name: value.clone() for name, value in stage.model.state_dict().items()})
        if step == 3:
            batch["pixel_values"].fill_(torch.nan)

    settings = build_settings(home, tmp_path / "run", model=VQ_VAE, checkpointing_steps=1, logging_steps=1)
    with happening(spoil):
        log = run({**settings, "checkpoints_total_limit": None})
    assert all(torch.equal(value, seen[4][name]) for name, value in seen[3].items())
    assert not all(torch.equal(value, seen[5][name]) for name, value in seen[4].items())
    assert list_steps(tmp_path / "run") == [1, 2, 3, 5, 6, 7, 8]
    assert losses(log, "skipped_updates") == {step: int(step > 3) for step in range(1, 9)}
    assert set(losses(log)) == {1, 2, 3, 5, 6, 7, 8}  # a row of no other update has no loss


def test_a_signal_in_an_update_that_is_no_number_ends_the_run_after_the_next_that_is(home, tmp_path, happening):
    sent = []

    def spoil(stage, batch, step):
        if step in (4, 5):
            batch["pixel_values"].fill_(torch.nan)
        if step == 4 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))

    with happening(spoil), pytest.raises(Stopped):
        run(build_settings(home, tmp_path / "run", checkpointing_steps=20))
    assert list_steps(tmp_path / "run") == [7]


def test_updates_that_stay_no_numbers_end_the_run_with_the_batch(home, tmp_path, happening):
    settings = build_settings(home, tmp_path / "run", max_nonfinite_updates=3, checkpointing_steps=2)
    whole = drop_clock(run({**settings, "output_dir": str(tmp_path / "whole")}))
    batches = []

    def spoil(stage, batch, step):
        if step >= 4:
            batch["pixel_values"].fill_(torch.inf)
            batches.append(batch)

    with happening(spoil), pytest.raises(ValueError, match="(?s)loss is .* at update 7, and 3 updates .*same command"):
        run(settings)
    assert list_steps(tmp_path / "run") == [2, 4]
    [path] = (tmp_path / "run").glob("nonfinite-batch-*")
    saved = load_file(path)
    assert path.name == "nonfinite-batch-7-0.safetensors" and saved.keys() == batches[-1].keys() > {"row_ids"}
    assert torch.equal(saved["row_ids"], torch.cat([batch["row_ids"] for batch in batches[-2:]]))
    assert saved["pixel_values"].shape == (8, 3, 16, 16)
    assert drop_clock(run(settings)) == whole


@contextlib.contextmanager
def full_disk(num_bytes=20_000):
    """No file grows beyond this, as on a disk that is nearly full; what is small still fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_does_not_fit_is_taken_away_and_tried_again(home, whole, tmp_path, happening, caplog):
    settings = build_settings(home, tmp_path / "run", checkpointing_steps=2)
    fills = {2: contextlib.ExitStack()}

    def fill(stage, batch, step):
        if step in fills and not (tmp_path / "run" / "full").exists():
            (tmp_path / "run" / "full").touch()
            fills[2].enter_context(full_disk())
        if step == 4:
            assert list_steps(tmp_path / "run") == [2] and not list((tmp_path / "run").glob(".checkpoint-*"))
            fills[2].close()

    with happening(fill), fills[2]:
        run(settings)
    assert "The checkpoint of update 4 could not be written" in caplog.text
    assert "That of 2 stays the newest" in caplog.text and list_steps(tmp_path / "run") == [6, 8]


def test_a_disk_that_stays_full_ends_the_run(home, tmp_path, happening):
    settings = build_settings(home, tmp_path / "run", checkpointing_steps=1, max_train_steps=9)

    def fill(stage, batch, step):
        if step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        words = "checkpoint of update 5 could not be written.* That of 2 stays the newest: make room"
        with happening(fill), pytest.raises(OSError, match=f"(?s){words}"):
            run(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list_steps(tmp_path / "run") == [1, 2] and not list((tmp_path / "run").glob(".checkpoint-*"))
    assert run(settings)[-1]["step"] == 9


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_is_gone_ends_the_run_after_a_checkpoint(tmp_path, happening, num_workers):
    shards = write_shards(tmp_path / "data", (10, 10), "train-{:05d}.tar")
    settings = build_settings(tmp_path, tmp_path / "run", **{"validation_split": None, "validation_steps": 20})
    settings |= {"dataloader_num_workers": num_workers, "logging_steps": 1}
    whole = drop_clock(run({**settings, "output_dir": str(tmp_path / "whole")}))

    def take_away(stage, batch, step):
        if step == 1 and shards[1].exists():
            shards[1].rename(tmp_path / "away")

    words = "^Shard .*train-00001.tar cannot be opened"
    with happening(take_away), pytest.raises(OSError, match=words):
        run(settings)
    [step] = list_steps(tmp_path / "run")
    assert 1 <= step < 4 and not (tmp_path / "run" / "config.json").exists()
    (tmp_path / "away").rename(shards[1])
    assert drop_clock(run(settings)) == whole
