"""Tiny real runs of `training/train.py`: both stages learn and end in what a user loads; what is refused, and how.

How a run goes on after a kill is in `test_loop.py`.
"""

import runpy
import sys

import numpy as np
import pytest
import torch
from arguments import DVAEArguments, PriorArguments
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_training import (
    MODEL,
    ROOT,
    VALIDATION,
    build_home,
    build_prior_settings,
    dvae_settings,
    list_rows,
    list_steps,
    losses,
    read_log,
    run,
    write_parquet,
)
from train_dvae import DVAEStage
from train_prior import PriorStage

from hf_dalle import DalleDVAE, DalleImageProcessor, DALLEPipeline, DallePriorForCausalLM
from hf_dalle.optimization import cosine_anneal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="module")
def prior(home):
    """The folder of a trained pipeline."""
    prompts = ["red and blue", "white beside green", ""]
    settings = build_prior_settings(home, home / "prior", **VALIDATION, validation_prompts=prompts)
    model = {**settings["model"], "hidden_dropout": 0.1, "tie_word_embeddings": True}
    settings |= {"model": model, "attn_implementation": "eager", "weights_dtype": "float16", "max_grad_norm": None}
    run({**settings, "generation": {"top_k": 9}})
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
    settings = {**VALIDATION, "codebook_revival_share": 0.1, "codebook_revival_steps": 10}
    log = run(dvae_settings(home / "data", tmp_path / "run", **settings, model=model))
    psnr = losses(log, "validation_psnr")
    assert losses(log)[60] < losses(log)[5] - 1 and psnr[60] > psnr[20] + 1 and psnr[60] > 12
    assert not {"kl_per_token", "temperature", "kl_weight"} & log[-1].keys()  # a constant, and of no use
    dvae = DalleDVAE.from_pretrained(tmp_path / "run")
    assert not torch.equal(dvae.codebook.codes, DalleDVAE(**model).codebook.codes)


def test_unused_codes_are_revived_on_schedule(home):
    model = {**MODEL, "quantizer": "nearest", "codebook_dim": 8}
    settings = dvae_settings(home / "data", "nowhere", codebook_revival_share=0.1, codebook_revival_steps=8)
    settings = {**settings, "model": model, "max_train_steps": 60}
    stage = DVAEStage(DVAEArguments(**{name: value for name, value in settings.items() if name != "stage"}))
    count, pixel_values = stage.model.codebook.ema_count, torch.rand(2, 3, 16, 16)

    def is_revived(step):
        count.fill_(1.0)[:3] = 0.0
        stage._revive_codes(pixel_values, step)
        return (count > 0).all().item()

    stage.model.train()
    # in the last fifth, from update 48 on, never: what comes onto a picture's cell there would end untrained
    assert [step for step in range(60) if is_revived(step)] == [8, 16, 24, 32, 40]
    stage.model.eval()
    assert not is_revived(8)


@pytest.mark.parametrize("quantizer", ["gumbel", "nearest"])
def test_the_dvae_learns_by_pixel_errors(home, tmp_path, quantizer):
    model = {**MODEL, "quantizer": quantizer, "codebook_dim": 8}
    settings = {**VALIDATION, "pixel_l1_weight": 2.0, "pixel_l2_weight": 10.0, "initial_kl_per_token": 2.5}
    log = run(dvae_settings(home / "data", tmp_path / "run", **settings, model=model))
    errors, psnr = losses(log, "pixel_loss"), losses(log, "validation_psnr")
    assert errors[60] < 0.7 * errors[5] and psnr[60] > psnr[20] + 1 and psnr[60] > 12
    assert not {"nll", "validation_nll"} & log[-1].keys()  # nothing trains the likelihood's scale
    row = log[-1]
    if quantizer == "gumbel":  # the KL stays in the loss, in nats a pixel channel: here 16 cells of 16 x 16 pixels
        num_cells = (16 // 4) ** 2 / (3 * 16**2)
        assert row["loss"] == pytest.approx(row["pixel_loss"] + row["kl_weight"] * row["kl_per_token"] * num_cells)
    else:
        assert row["loss"] == pytest.approx(row["pixel_loss"] + row["commitment_loss"])


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
    assert pipe.prior.config._attn_implementation == "sdpa"  # eager was this run's choice, not the model's
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
    with pytest.raises(ValueError, match="loss is (nan|inf|-inf) at update .*Lower `learning_rate`"):
        run({**settings, "checkpointing_steps": 1})
    newest = tmp_path / "run" / f"checkpoint-{list_steps(tmp_path / 'run')[-1]}" / "model.safetensors"
    assert all(value.isfinite().all() for value in load_file(newest).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"report_to": "wandb"}, "`report_to` is 'wandb', which is not installed"),
        ({"report_to": "carrier pigeon"}, "may be tensorboard, (trackio, )?none"),
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


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("train.py", ["nowhere.yaml"], "train.py: .*nowhere.yaml"),
        ("train.py", [], "train.py: There is no settings file. Usage"),
        (
            "precompute_image_tokens.py",
            ["--dvae", "nowhere", "--output_dir", "x"],
            "precompute_image_tokens.py: .*nowh",
        ),
        (
            "train_tokenizer.py",
            ["--train_data", "nowhere", "--output_dir", "x"],
            "train_tokenizer.py: No captions at 'nowhere'",
        ),
    ],
)
def test_the_scripts_say_what_is_wrong_without_a_trace(monkeypatch, script, options, words):
    monkeypatch.setattr(sys, "argv", [script, *options])
    with pytest.raises(SystemExit, match=f"(?s)^{words}"):
        runpy.run_path(str(ROOT / "training" / script), run_name="__main__")
