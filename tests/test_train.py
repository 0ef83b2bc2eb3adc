"""Tiny real runs of `training/train.py`: both stages learn, end in what a user loads, and go on after a kill."""

import math
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from arguments import PriorArguments
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_training import (
    MODEL,
    dvae_settings,
    list_rows,
    losses,
    prior_settings,
    read_log,
    run,
    start,
    write_data,
    write_parquet,
    write_tokenizer,
)
from train_prior import PriorStage

from hf_dalle import DalleDVAE, DalleImageProcessor, DALLEPipeline, DallePriorForCausalLM
from hf_dalle.optimization import cosine_anneal


VALIDATION = {"validation_split": "validation", "validation_steps": 20}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a tokenizer and a trained dVAE."""
    folder = tmp_path_factory.mktemp("training")
    write_data(folder / "data")
    write_tokenizer(folder / "tokenizer")
    settings = dvae_settings(folder / "data", folder / "dvae", **VALIDATION, initial_kl_per_token=2.5)
    run({**settings, "weights_dtype": "float16", "report_to": "tensorboard", "resize_range": [1.0, 1.0]})
    return folder


def build_prior_settings(home, output_dir, **settings):
    return prior_settings(home / "data", home / "dvae", home / "tokenizer", output_dir, **settings)


@pytest.fixture(scope="module")
def prior(home):
    """The folder of a trained pipeline."""
    prompts = ["red and blue", "white beside green", ""]
    settings = build_prior_settings(home, home / "prior", **VALIDATION, validation_prompts=prompts)
    model = {**settings["model"], "hidden_dropout": 0.1, "tie_word_embeddings": True}
    run({**settings, "model": model, "weights_dtype": "float16", "generation": {"top_k": 9}, "max_grad_norm": None})
    return home / "prior"


def read_events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "hf-dalle"))
    events.Reload()
    return events


# ------------------------------------------------------------------------------------------------- what runs end in


def test_the_dvae_learns(home):
    log = read_log(home / "dvae")
    loss, psnr = losses(log), losses(log, "validation_psnr")
    assert loss[60] < loss[5] - 1
    assert psnr[60] > psnr[20] + 1 and psnr[60] > 12
    assert losses(log, "validation_nll")[60] < losses(log, "validation_nll")[20]
    assert losses(log, "validation_perplexity")[60] > 3
    assert losses(log, "temperature")[60] < 0.1 < losses(log, "temperature")[5]


def test_the_vq_vae_learns(home, tmp_path):
    model = {**MODEL, "quantizer": "nearest", "codebook_dim": 8}
    log = run(dvae_settings(home / "data", tmp_path / "run", **VALIDATION, model=model, initial_kl_per_token=1.0))
    psnr = losses(log, "validation_psnr")
    assert losses(log)[60] < losses(log)[5] - 1 and psnr[60] > psnr[20] + 1 and psnr[60] > 12
    assert all(value == pytest.approx(math.log(16)) for value in losses(log, "kl_per_token").values())
    dvae = DalleDVAE.from_pretrained(tmp_path / "run")
    assert not torch.equal(dvae.codebook.codes, DalleDVAE(**model).codebook.codes)


def test_the_prior_learns(prior):
    log = read_log(prior)
    assert losses(log)[60] < losses(log)[5] / 2
    for name in ("text_loss", "caption_loss", "image_loss"):
        assert losses(log, name)[60] < losses(log, name)[5], name
        assert losses(log, f"validation_{name}")[60] < losses(log, f"validation_{name}")[20], name
    last = log[-1]
    assert last["validation_loss"] == pytest.approx(
        last["validation_text_loss"] / 8 + last["validation_image_loss"] * 7 / 8
    )


def test_a_finished_dvae_loads_as_float32(home):
    dvae, processor = DalleDVAE.from_pretrained(home / "dvae"), DalleImageProcessor.from_pretrained(home / "dvae")
    weights = load_file(home / "dvae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float16}
    assert {value.dtype for value in dvae.state_dict().values()} == {torch.float32}
    picture = list_rows()[5]["image"]
    pixel_values = processor.preprocess(picture)["pixel_values"]
    decoded = dvae.decode(dvae.encode(pixel_values).tokens).sample
    assert (decoded - pixel_values).square().mean() < 0.1


@pytest.mark.parametrize("pipeline_class", [DALLEPipeline, DiffusionPipeline])
def test_a_finished_pipeline_loads_as_float32_and_draws(prior, pipeline_class):
    pipe = pipeline_class.from_pretrained(prior)
    pipe.set_progress_bar_config(disable=True)
    for part, file in (("prior", "model.safetensors"), ("dvae", "diffusion_pytorch_model.safetensors")):
        stored = load_file(prior / part / file)
        assert {value.dtype for value in stored.values()} == {torch.float16}
        loaded = getattr(pipe, part).state_dict()
        assert {value.dtype for value in loaded.values()} == {torch.float32}
        assert all(torch.equal(loaded[name], value.float()) for name, value in stored.items())
    assert "lm_head.weight" not in load_file(prior / "prior" / "model.safetensors")  # tied: stored once
    assert DALLEPipeline.from_pretrained(prior, dtype=torch.float16).prior.dtype == torch.float16
    assert DallePriorForCausalLM.from_pretrained(prior / "prior").dtype == torch.float32
    assert pipe.prior.config.caption_dropout == 0.1 and pipe.prior.generation_config.top_k == 9
    drawn = pipe(["red and blue", ""], generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in drawn] == [(16, 16)] * 2


def test_what_is_validated_and_saved_is_the_moving_average(home, tmp_path):
    log = run(dvae_settings(home / "data", tmp_path / "run", **VALIDATION, max_train_steps=10))
    dvae = DalleDVAE.from_pretrained(tmp_path / "run")
    averages = torch.load(tmp_path / "run" / "checkpoint-10" / "custom_checkpoint_2.pkl", weights_only=True)
    live = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors")
    for (name, value), average in zip(dvae.named_parameters(), averages["shadow_params"], strict=True):
        assert torch.equal(value, average) and not torch.equal(value, live[name])
    pixel_values = DalleImageProcessor(size=16).preprocess([row["image"] for row in list_rows()[::4]])["pixel_values"]
    tokens = dvae.encode(pixel_values).tokens
    error = (dvae.decode(tokens).sample - pixel_values).square().flatten(1).mean(1)
    assert log[-1]["validation_psnr"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-5)
    shares = torch.bincount(tokens.flatten()) / tokens.numel()
    assert log[-1]["validation_perplexity"] == pytest.approx(torch.special.entr(shares).sum().exp().item(), rel=1e-5)
    log = run(dvae_settings(home / "data", tmp_path / "plain", use_ema=False, max_train_steps=10))
    live = load_file(tmp_path / "plain" / "checkpoint-10" / "model.safetensors")
    dvae = DalleDVAE.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(value, live[name]) for name, value in dvae.state_dict().items())


def test_each_update_follows_the_schedules(home, tmp_path):
    settings = dvae_settings(home / "data", tmp_path / "run", max_train_steps=8, logging_steps=1, lr_warmup_steps=3)
    log = run({**settings, "temperature_anneal_steps": 6, "kl_weight": 2.0, "kl_weight_warmup_steps": 4})
    for update, row in enumerate(log):
        assert row["temperature"] == cosine_anneal(update, 1.0, 1 / 16, 6)
        assert row["kl_weight"] == cosine_anneal(update, 0.0, 2.0, 4)
        ratio = (update + 1) / 4 if update < 3 else cosine_anneal(update - 3, 1.0, 0.1, 5)
        assert row["lr"] == pytest.approx(0.03 * ratio)


def test_dropped_captions_teach_the_picture_alone(home):
    stage = PriorStage(PriorArguments(**{k: v for k, v in build_prior_settings(home, "x").items() if k != "stage"}))
    text, tokens = stage.tokenizer(["red and blue"] * 2, padding="max_length", return_tensors="pt"), torch.ones(2, 16)
    batch = {"input_ids": text.input_ids, "attention_mask": text.attention_mask, "image_tokens": tokens.long()}
    both, none, one = (
        stage.compute_loss(stage.model.eval(), {**batch, "caption_dropped": torch.tensor(dropped)}, 0)
        for dropped in ([False, False], [True, True], [True, False])
    )
    assert both[1].keys() == {"text_loss", "caption_loss", "image_loss"} and none[1].keys() == {"image_loss"}
    assert none[0].item() == pytest.approx(7 / 8 * none[1]["image_loss"].item())
    assert one[1]["text_loss"].item() == pytest.approx(both[1]["text_loss"].item())  # of the other row, which is equal


def test_figures_and_pictures_are_written(home, prior):
    for folder, name, size in ((home / "dvae", "reconstructions", (16 * 5, 32)), (prior, "samples", (16 * 4, 48))):
        log = read_log(folder)
        assert [row["step"] for row in log] == list(range(5, 61, 5))  # one row a step
        assert {"loss", "lr", "grad_norm", "pictures_per_second", "skipped_rows"} - log[0].keys() <= {"grad_norm"}
        names = [f"{name}-{step:07d}.png" for step in (20, 40, 60)]
        assert sorted(path.name for path in (folder / "validation").iterdir()) == names
        assert {Image.open(folder / "validation" / path).size for path in names} == {size}
    events, log = read_events(home / "dvae"), read_log(home / "dvae")
    for key in ("loss", "validation_psnr"):
        scalars = {event.step: event.value for event in events.Scalars(key)}
        assert scalars == pytest.approx(losses(log, key), rel=1e-6)
    assert len(events.Images("validation/reconstructions")) > 0


def test_the_grid_shows_pictures_above_their_reconstructions(home):
    grid = np.asarray(Image.open(home / "dvae" / "validation" / "reconstructions-0000060.png")).astype(int)
    pictures = [np.asarray(row["image"]) for row in list_rows()[::4]]
    assert np.array_equal(grid[:16], np.concatenate(pictures, axis=1))
    assert np.abs(grid[16:] - grid[:16]).mean() < 40


# ------------------------------------------------------------------------------------------------------ going on


def kill_after(process, checkpoint, timeout=120):
    """Ends a process without warning once a checkpoint is there; nobody can clean up after it."""
    deadline = time.monotonic() + timeout
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def build_resumed_settings(stage, home, output_dir):
    """Runs whose every update draws random numbers: gumbel noise, dropout of states and captions, crops, views."""
    settings = {"max_train_steps": 80, "checkpointing_steps": 4, "logging_steps": 3, "validation_split": "validation",
                "validation_steps": 40, "gradient_accumulation_steps": 2, "resize_range": [1.0, 1.5],
                "train_batch_size": 5, "dataloader_num_workers": 0}  # fmt: skip
    if stage == "dvae":
        return dvae_settings(home / "data", output_dir, **settings, initial_kl_per_token=2.0)
    settings = build_prior_settings(home, output_dir, **settings)
    model = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "embedding_dropout": 0.2}
    return {**settings, "model": {**settings["model"], **model}}


@pytest.fixture(scope="module")
def killed(home):
    """Both stages, killed after a checkpoint; the two processes run side by side."""
    settings = {stage: build_resumed_settings(stage, home, home / f"killed-{stage}") for stage in ("dvae", "prior")}
    processes = {stage: start(settings[stage]) for stage in settings}
    for stage, process in processes.items():
        kill_after(process, home / f"killed-{stage}" / "checkpoint-8")
    return settings


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_a_killed_run_goes_on_bit_for_bit(home, killed, stage):
    folder = home / f"killed-{stage}"
    last = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
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
        for name in row.keys() - {"pictures_per_second", "train_perplexity"}:
            assert row[name] == expected[name], (row["step"], name)
    assert [path.name for path in folder.glob(".checkpoint*")] == []
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-76", "checkpoint-80"]
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


def test_checkpoints_of_another_model_or_damaged_are_refused(home, short):
    run(short)
    with pytest.raises(ValueError, match="checkpoint-6 is damaged, or of a run with another model"):
        run({**short, "model": {**MODEL, "decoder_in_channels": 8}})
    with pytest.raises(ValueError, match="checkpoint-6 is damaged, or of a run with another model"):
        run({**build_prior_settings(home, "x"), "output_dir": short["output_dir"]})
    with pytest.raises(ValueError, match="checkpoint-6 is damaged, or of a run with .* other settings"):
        run({**short, "use_ema": False})
    for name, size in (("optimizer.bin", 1000), ("model.safetensors", 1000), ("custom_checkpoint_2.pkl", 0)):
        path = Path(short["output_dir"], "checkpoint-6", name)
        whole = path.read_bytes()
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="checkpoint-6 is damaged"):
            run(short)
        path.write_bytes(whole)


# ------------------------------------------------------------------------------------------- ways to the same losses


@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_accumulated_batches_are_one_batch(home, tmp_path, stage):
    """2 x 4 pictures give the losses of 8."""
    settings = {"max_train_steps": 6, "logging_steps": 1, "learning_rate": 0.003, "report_to": "none"}
    build = build_prior_settings if stage == "prior" else None
    logs = []
    for batch_size, steps in ((8, 1), (4, 2)):
        batches = {"train_batch_size": batch_size, "gradient_accumulation_steps": steps, **settings}
        if build is not None:
            logs.append(run(build(home, tmp_path / str(steps), **batches, caption_dropout=0.0)))
        else:
            # VQ-VAE draws no noise, and a codebook that stands still is the same for both halves
            model = {**MODEL, "quantizer": "nearest", "codebook_dim": 8, "codebook_decay": 1.0}
            logs.append(run(dvae_settings(home / "data", tmp_path / str(steps), **batches, model=model)))
    for name in ("loss", "grad_norm", "text_loss", "image_loss", "nll"):
        assert losses(logs[1], name) == pytest.approx(losses(logs[0], name), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dvae", "prior"])
def test_two_processes_are_one_of_the_doubled_batch(home, tmp_path, stage):
    """Two gloo ranks of 4 pictures give the losses of 8, with the codebook's moving averages taken over both."""
    settings = {"max_train_steps": 6, "checkpointing_steps": 4, "logging_steps": 1, **VALIDATION}
    if stage == "prior":
        build = lambda name, **kwargs: build_prior_settings(home, tmp_path / name, caption_dropout=0.0, **kwargs)  # noqa: E731
    else:
        model = {**MODEL, "quantizer": "nearest", "codebook_dim": 8}
        build = lambda name, **kwargs: dvae_settings(home / "data", tmp_path / name, model=model, **kwargs)  # noqa: E731
    settings = {**settings, "learning_rate": 0.003}
    one = run(build("one", **settings, train_batch_size=8))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2")
    process = start(build("two", **settings, train_batch_size=4), launcher=launcher)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    two = read_log(tmp_path / "two")
    assert len(two) == len(one) == 6
    for name in ("loss", "grad_norm", "text_loss", "image_loss", "nll", "commitment_loss", "validation_loss"):
        assert losses(two, name) == pytest.approx(losses(one, name), abs=1e-5)
    # and they go on together
    process = start(build("two", **settings, train_batch_size=4), "--max_train_steps", "8", launcher=launcher)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and [row["step"] for row in read_log(tmp_path / "two")] == list(range(1, 9)), output


@pytest.mark.parametrize("stage", ["dvae", "vq-vae", "prior"])
def test_bfloat16(home, tmp_path, stage):
    settings = {"max_train_steps": 4, "logging_steps": 1, "mixed_precision": "bf16", **VALIDATION}
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


def test_workers_change_nothing(home, tmp_path):
    settings = {"max_train_steps": 4, "logging_steps": 1, "resize_range": [1.0, 1.5]}
    logs = []
    for num_workers in (0, 2):
        output_dir = tmp_path / str(num_workers)
        logs.append(run(build_prior_settings(home, output_dir, **settings, dataloader_num_workers=num_workers)))
    assert losses(logs[0]) == losses(logs[1])


# ------------------------------------------------------------------------------------------------ warned and refused


def test_a_codebook_out_of_use_is_warned_of(home, tmp_path, caplog):
    model = {**MODEL, "vocab_size": 64}
    settings = dvae_settings(home / "data", tmp_path / "run", model=model, max_train_steps=30, validation_steps=15)
    log = run({**settings, "encoder_lr_ratio": 1})  # from random weights, so fast, all cells agree on a few codes
    assert losses(log, "train_perplexity")[30] < 6.4
    [warning, *_] = [record.message for record in caplog.records if "perplexity is" in record.message]
    assert "of 64 codes" in warning and "`kl_weight`" in warning and "`initial_kl_per_token`" in warning
    caplog.clear()
    run({**settings, "output_dir": str(tmp_path / "other"), "initial_kl_per_token": 3.5, "learning_rate": 0.001})
    assert "perplexity is" not in caplog.text


def test_skipped_rows_are_counted_and_named(home, tmp_path, caplog):
    rows = list_rows()[:8]
    rows[2]["captions"], rows[5]["image"] = [], b"broken"
    write_parquet(tmp_path / "data" / "train.parquet", rows)
    write_parquet(tmp_path / "data" / "validation.parquet", rows[4:7])
    settings = build_prior_settings(home, tmp_path / "run", max_train_steps=6, logging_steps=2, train_batch_size=1)
    settings |= {"train_data_dir": str(tmp_path / "data"), **VALIDATION, "gradient_accumulation_steps": 4}
    log = run(settings)
    assert log[-1]["skipped_rows"] == 2
    named = [record.message for record in caplog.records if "Skipped" in record.message]
    assert sum("row 2 of the training data" in message and "no caption" in message for message in named) == 1
    assert sum("row 5 of the training data" in message and "broken picture" in message for message in named) == 1
    write_parquet(tmp_path / "data" / "train.parquet", [rows[2], rows[5]])
    with pytest.raises(ValueError, match="2 rows in succession cannot be used"):
        run({**settings, "output_dir": str(tmp_path / "none")})


def test_a_loss_that_is_no_number_ends_the_run(home, tmp_path):
    settings = dvae_settings(home / "data", tmp_path / "run", learning_rate=1e6, max_train_steps=50, logging_steps=1)
    with pytest.raises(ValueError, match="The loss is (nan|inf|-inf) at update .*Lower `learning_rate`"):
        run({**settings, "checkpointing_steps": 1})
    newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert all(value.isfinite().all() for value in load_file(newest / "model.safetensors").values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"report_to": "wandb"}, "`report_to` is 'wandb', which is not installed"),
        ({"report_to": "carrier pigeon"}, "may be tensorboard, none"),
        ({"mixed_precision": "fp16"}, "fp16` needs an accelerator"),
        ({"model": {"hiden_size": 8}}, "unknown key `hiden_size`. Did you mean `hidden_size`?"),
        ({"model": {"hidden_size": 8.5}}, "A value in `model` does not fit"),
        ({"model": {"hidden_size": 9}}, "must divide `hidden_size`"),
        ({"model": {"text_length": 99}}, "`model` asks for text_length 99.* give 8"),
        ({"generation": {"temprature": 1}}, "unknown key `temprature`. Did you mean `temperature`?"),
        ({"generation": {"top_p": 2}}, "`top_p` is 2"),
        ({"train_data_dir": "nowhere"}, "in nowhere. Is the path right"),
        ({"validation_split": "test"}, "neither test.parquet"),
        ({"caption_column": "text"}, "no column 'text'"),
        ({"dvae": "nowhere"}, "`dvae` is nowhere, which cannot be loaded"),
        ({"tokenizer": "nowhere"}, "`tokenizer` is nowhere, which cannot be loaded"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(home, tmp_path, changes, words):
    settings = build_prior_settings(home, tmp_path / "run")
    with pytest.raises((ValueError, OSError), match=f"(?s){words}"):
        run({**settings, **changes})
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_the_dvae_is_named(home, tmp_path):
    for model, words in (({"sample_sise": 16}, "Did you mean `sample_size`"), ({"vocab_size": "x"}, "wrong type")):
        with pytest.raises(ValueError, match=words):
            run(dvae_settings(home / "data", tmp_path / "run", model=model))


def test_the_script_says_what_is_wrong_in_one_line(tmp_path):
    process = start({"stage": "dvae", "output_dir": str(tmp_path / "run"), "learning_rat": 1})
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("train.py: ") and "Did you mean `learning_rate`?" in output
    assert "Traceback" not in output
