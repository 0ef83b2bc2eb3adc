"""The loop of training: a killed run goes on bit for bit, and batches, processes and workers change no loss.

What a run ends in, and what it refuses, is in `test_train.py`.
"""

import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_processes import finish, fork_run, wait_until
from tiny_training import (
    MODEL,
    VALIDATION,
    build_home,
    build_prior_settings,
    dvae_settings,
    list_steps,
    losses,
    read_log,
    run,
    start,
)

from hf_dalle import DalleDVAE, sparse_attention


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("loop"))


# ------------------------------------------------------------------------------------------------------ going on


def kill_at_random_moments(settings, num_kills=5):
    """
    Starts the run as often and ends it without warning, so that it cannot clean up after itself: once while it starts,
    then a moment after it got some updates further, which is in a batch, a step or amid a checkpoint's files.
    """
    folder, rng = Path(settings["output_dir"]), random.Random(settings["stage"])
    for number in range(num_kills):
        process = fork_run(settings)
        goal = max(list_steps(folder), default=0) + rng.choice((4, 8))
        if number:
            wait_until(lambda goal=goal: max(list_steps(folder), default=0) >= goal, process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert finish(process) == [-signal.SIGKILL]


def build_resumed_settings(stage, home, output_dir):
    """
    Every update draws random numbers: gumbel noise, dropout of states, captions, image tokens and merges, crops. The
    prior's has gradient scales, a rate that plateaus halve and an average at intervals besides.
    """
    settings = {"max_train_steps": 80, "checkpointing_steps": 4, "logging_steps": 3, "validation_split": "validation",
                "validation_steps": 40, "gradient_accumulation_steps": 2, "resize_range": [1.0, 1.5],
                "train_batch_size": 5, "dataloader_num_workers": 0}  # fmt: skip
    if stage == "dvae":
        return dvae_settings(home / "data", output_dir, **settings, initial_kl_per_token=2.0)
    settings = build_prior_settings(home, output_dir, **settings)
    model = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "embedding_dropout": 0.2}
    choices = {"optimizer": "muon", "muon_learning_rate": 0.02, "image_token_dropout": 0.5, "bpe_dropout": 0.3}
    choices |= {"mixed_precision": "fp16", "ema_update_steps": 5, "max_grad_norm": 0.5}
    choices |= {"lr_scheduler": "reduce_lr_on_plateau", "lr_plateau_steps": 6, "lr_plateau_threshold": 0.2}
    return {**settings, **choices, "model": {**settings["model"], **model}}


@pytest.fixture(scope="module")
def killed(home):
    """Both stages, killed five times; the two runs go side by side."""
    settings = {stage: build_resumed_settings(stage, home, home / f"killed-{stage}") for stage in ("dvae", "prior")}
    with ThreadPoolExecutor() as pool:
        list(pool.map(kill_at_random_moments, settings.values()))
    return settings


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_a_killed_run_goes_on_bit_for_bit(home, killed, stage):
    folder = home / f"killed-{stage}"
    last = list_steps(folder)[-1]
    assert 8 <= last < 80 and not (folder / "model_index.json").exists() and not (folder / "config.json").exists()
    (folder / ".checkpoint-44").mkdir(exist_ok=True)  # what is left of a checkpoint that the kill cut short
    (folder / ".checkpoint-44" / "model.safetensors").write_bytes(b"half")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 77, "loss": 1.0}\n{"step": 78, "lo')  # rows past the checkpoint, the last cut short
    if stage == "dvae":
        launcher = (sys.executable, "-m", "accelerate.commands.launch")  # with no file of settings for this machine
        process = start(killed[stage], launcher=launcher)
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
        assert f"Going on from {folder / f'checkpoint-{last}'}, update {last} of 80" in output
        assert "80/80" in output and "loss=" in output  # the progress bar
        resumed = read_log(folder)
    else:
        resumed = run(killed[stage])
    whole = run(build_resumed_settings(stage, home, home / f"whole-{stage}"))
    steps = [row["step"] for row in resumed]
    assert steps == sorted(set(steps)) == [step for step in range(1, 81) if step % 3 == 0 or step % 4 == 0]
    for row, expected in zip(resumed, whole, strict=True):
        assert row.keys() == expected.keys()
        for name in row.keys() - {"pictures_per_second", "memory_gb"}:
            assert row[name] == expected[name], (row["step"], name)
    assert [path.name for path in folder.glob(".checkpoint*")] == []
    assert list_steps(folder) == [76, 80]
    for path in ("checkpoint-80/model.safetensors", "**/*model.safetensors"):
        for mine, other in zip(*(sorted(root.glob(path)) for root in (folder, home / f"whole-{stage}")), strict=True):
            mine, other = load_file(mine), load_file(other)
            assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.fixture
def short(home, tmp_path):
    """Settings of a run of 6 updates with a checkpoint each 2."""
    settings = {"max_train_steps": 6, "checkpointing_steps": 2, "logging_steps": 1, "learning_rate": 0.001}
    return dvae_settings(home / "data", tmp_path / "run", **settings)


def test_a_finished_run_starts_again_and_trains_nothing(short):
    log = run(short)
    checkpoint = Path(short["output_dir"], "checkpoint-6", "model.safetensors")
    written = checkpoint.stat().st_mtime_ns
    Path(short["output_dir"], "config.json").unlink()
    assert run(short) == log and checkpoint.stat().st_mtime_ns == written
    assert DalleDVAE.from_pretrained(short["output_dir"]).config.vocab_size == 16  # saved again
    assert run(short, "--max_train_steps", "3") == log  # less than what is done


def test_a_longer_run_goes_on_with_new_settings(short):
    log = run(short)
    longer = run(short, "--max_train_steps", "9", "--learning_rate", "0.5", "--lr_min_ratio", "1")
    assert longer[:6] == log and [row["step"] for row in longer] == list(range(1, 10))
    assert {row["lr"] for row in longer[6:]} == {0.5}
    state = torch.load(Path(short["output_dir"], "checkpoint-9", "optimizer.bin"), weights_only=True)
    assert [group["lr"] for group in state["param_groups"]] == [0.5, 0.005]  # encoder_lr_ratio


def test_a_run_goes_on_from_a_checkpoint_that_is_named(short, tmp_path):
    log = run(short, "--checkpoints_total_limit", "none")
    assert len(list(Path(short["output_dir"]).glob("checkpoint-*"))) == 3
    named = ("--resume_from_checkpoint", str(Path(short["output_dir"], "checkpoint-2")))
    other = run({**short, "output_dir": str(tmp_path / "other")}, *named)
    assert losses(other) == {step: loss for step, loss in losses(log).items() if step > 2}
    with pytest.raises(ValueError, match="checkpoint-6 is of an earlier run.*starts at update 2"):
        run(short, *named)
    with pytest.raises(ValueError, match="checkpoint-6 is of an earlier run.*starts at update 0"):
        run(short, "--resume_from_checkpoint", "none")
    with pytest.raises(OSError, match="nowhere, which is not a folder"):
        run(short, "--resume_from_checkpoint", "nowhere")
    assert read_log(short["output_dir"]) == log  # nothing was lost


def test_checkpoints_of_another_model_or_of_other_settings_are_refused(home, short):
    run(short)
    with pytest.raises(ValueError, match="checkpoint-6 is of a run with another model"):
        run({**short, "model": {**MODEL, "decoder_in_channels": 8}})
    with pytest.raises(ValueError, match="checkpoint-6 is of a run with another model"):
        run({**build_prior_settings(home, "x"), "output_dir": short["output_dir"], "train_batch_size": 16})
    with pytest.raises(ValueError, match="checkpoint-6 is of a run with .* other settings"):
        run({**short, "use_ema": False})


def test_a_damaged_checkpoint_is_passed_over_and_its_updates_done_again(short, caplog):
    log = run(short)
    path = Path(short["output_dir"], "checkpoint-6", "optimizer.bin")
    path.write_bytes(path.read_bytes()[:1000])
    again = run(short)
    assert "checkpoint-6 is damaged (optimizer.bin has 1000 bytes" in caplog.text
    assert losses(again) == losses(log) and list_steps(Path(short["output_dir"])) == [4, 6]


def test_a_checkpoint_of_an_older_version_is_gone_on_from(short):
    """Without a manifest and the objects that are named since; its place in the data is the number of its updates."""
    log = run(short, "--checkpoints_total_limit", "none")
    folder = Path(short["output_dir"])
    for step in (4, 6):
        shutil.rmtree(folder / f"checkpoint-{step}")
    for path in (folder / "checkpoint-2" / "manifest.json", *(folder / "checkpoint-2").glob("*.pt")):
        path.unlink()
    progress = folder / "checkpoint-2" / "custom_checkpoint_0.pkl"
    torch.save({"step": torch.load(progress, weights_only=True)["step"]}, progress)
    assert losses(run(short)) == losses(log)


# ------------------------------------------------------------------------------------------- ways to the same losses


def build_noiseless_settings(stage, home, output_dir, model=None):
    """Runs that draw no random numbers but the order of the rows."""
    settings = {"max_train_steps": 6, "checkpointing_steps": 4, "logging_steps": 1, "learning_rate": 0.003}
    if stage == "prior":
        return build_prior_settings(home, output_dir, **settings, **VALIDATION, caption_dropout=0.3)
    model = {**MODEL, "quantizer": "nearest", "codebook_dim": 8, **(model or {})}
    return dvae_settings(home / "data", output_dir, **settings, **VALIDATION, model=model)


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_accumulated_batches_are_one_batch(home, tmp_path, stage):
    """2 x 4 pictures give the losses of 8."""
    logs = []
    for batch_size, steps in ((8, 1), (4, 2)):
        # VQ-VAE draws no noise, and a codebook that stands still is the same for both halves
        settings = build_noiseless_settings(stage, home, tmp_path / str(steps), {"codebook_decay": 1.0})
        logs.append(run({**settings, "train_batch_size": batch_size, "gradient_accumulation_steps": steps}))
    for name in ("loss", "grad_norm", "image_loss", "nll"):  # text_loss is a mean over what each batch kept
        assert losses(logs[1], name) == pytest.approx(losses(logs[0], name), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_two_processes_are_one_of_the_doubled_batch(home, tmp_path, stage):
    """Two gloo ranks of 4 pictures give the losses of 8, with the codebook's moving averages taken over both."""
    one = run({**build_noiseless_settings(stage, home, tmp_path / "one"), "train_batch_size": 8})
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    settings = {**build_noiseless_settings(stage, home, tmp_path / "two"), "train_batch_size": 4}
    process = start(settings, launcher=launcher)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    two = read_log(tmp_path / "two")
    assert len(two) == len(one) == 6
    for name in ("loss", "grad_norm", "image_loss", "nll", "commitment_loss", "validation_loss"):
        assert losses(two, name) == pytest.approx(losses(one, name), abs=1e-5)
    # and they go on together
    process = start(settings, "--max_train_steps", "8", launcher=launcher)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and [row["step"] for row in read_log(tmp_path / "two")] == list(range(1, 9)), output


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", ["dvae", "vq-vae", "prior"])
def test_half_precision(home, tmp_path, stage, precision):
    settings = {"max_train_steps": 4, "logging_steps": 1, "mixed_precision": precision, **VALIDATION}
    if stage == "prior":
        settings = build_prior_settings(home, tmp_path / "run", **settings, validation_prompts=["red and blue"])
    else:
        model = MODEL if stage == "dvae" else {**MODEL, "quantizer": "nearest", "codebook_dim": 8}
        settings = dvae_settings(home / "data", tmp_path / "run", **settings, model=model)
    half = run(settings)
    full = run({**settings, "mixed_precision": "no", "output_dir": str(tmp_path / "full")})
    assert losses(half)[1] == pytest.approx(losses(full)[1], rel=0.05)
    assert losses(half) != losses(full)
    weights = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"attn_implementation": "eager"}])
def test_less_memory_and_less_work_give_the_same_losses(home, tmp_path, monkeypatch, changes):
    """Layers computed again in the backward pass; attention in blocks (which so few states would not get) or dense."""
    monkeypatch.setattr(sparse_attention, "_CALL_OVERHEAD", -1_000_000)
    logs = []
    for name, other in (("plain", {}), ("other", changes)):
        settings = build_noiseless_settings("prior", home, tmp_path / name)
        model = {**settings["model"], "attention_types": ["row", "column", "conv"], "num_hidden_layers": 3}
        logs.append(run({**settings, "model": model, **other}))
    for name in ("loss", "grad_norm", "text_loss", "image_loss", "validation_loss"):
        assert losses(logs[1], name) == pytest.approx(losses(logs[0], name), abs=1e-5)


def test_workers_change_nothing(home, tmp_path):
    settings = {"max_train_steps": 4, "logging_steps": 1, "resize_range": [1.0, 1.5]}
    logs = []
    for num_workers in (0, 2):
        output_dir = tmp_path / str(num_workers)
        logs.append(run(build_prior_settings(home, output_dir, **settings, dataloader_num_workers=num_workers)))
    assert losses(logs[0]) == losses(logs[1])
