"""Which weights Muon updates and how far, which do not decay; schedules and gradient scales as the settings say."""

import pytest
import torch
from arguments import DVAEArguments, PriorArguments, TrainArguments, parse_arguments
from optimizers import exempt_from_decay, make_gradient_scaler, make_optimizers, make_schedules
from tiny import build_dvae, build_prior
from tiny_training import build_home, build_prior_settings, dvae_settings, losses, run, write_settings
from train_prior import PriorStage

from hf_dalle.gradient_scaling import GlobalGradientScaler, GradientScaler, ResblockGradientScaler
from hf_dalle.optimization import BoundedAdamW


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_home(tmp_path_factory.mktemp("optimizers"))


def build_stage(home, folder, **settings):
    return PriorStage(parse_arguments([str(write_settings(build_prior_settings(home, folder, **settings)))]))


@pytest.mark.parametrize("is_tied", [True, False])
def test_muon_gets_the_matrices_of_the_layers(home, tmp_path, is_tied):
    model = {**build_prior_settings(home, tmp_path)["model"], "tie_word_embeddings": is_tied}
    stage = build_stage(home, tmp_path / "run", optimizer="muon", model=model)
    adamw, muon = make_optimizers(stage.args, stage.parameter_groups())
    names = {parameter: name for name, parameter in stage.model.named_parameters()}
    parts = [[names[p] for group in optimizer.param_groups for p in group["params"]] for optimizer in (adamw, muon)]
    matrices = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2"]
    assert sorted(parts[1]) == sorted(f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in matrices)
    assert sorted(parts[0] + parts[1]) == sorted(names.values())
    assert type(adamw) is torch.optim.AdamW and type(muon) is torch.optim.Muon
    assert (adamw.defaults["lr"], muon.defaults["lr"]) == (0.01, 5e-3)
    assert adamw.defaults["weight_decay"] == muon.defaults["weight_decay"] == 4.5e-2


def test_adamw_gets_all_by_default(home, tmp_path):
    stage = build_stage(home, tmp_path / "run")
    [optimizer] = make_optimizers(stage.args, stage.parameter_groups())
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 1
    assert len(optimizer.param_groups[0]["params"]) == len(list(stage.model.parameters()))


@pytest.mark.parametrize("shape", [(64, 64), (16, 64), (64, 16)])
def test_an_update_of_muon_has_the_same_size_for_all_shapes(shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    args = TrainArguments(output_dir="x", train_data_dir="x")
    args.muon_learning_rate = 0.1
    [muon] = make_optimizers(args, [{"params": [weight], "is_muon": True}])
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1000
    muon.step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.02, rel=0.15)


def test_muon_trains_and_follows_the_schedule(home, tmp_path):
    settings = {"max_train_steps": 40, "optimizer": "muon", "muon_learning_rate": 0.02, "lr_warmup_steps": 9}
    log = run(build_prior_settings(home, tmp_path / "run", **settings, lr_min_ratio=0.5))
    assert losses(log)[40] < 0.7 * losses(log)[5]
    folder = tmp_path / "run" / "checkpoint-40"
    states = [torch.load(folder / name, weights_only=True) for name in ("optimizer.bin", "optimizer_1.bin")]
    assert [state["param_groups"][0]["lr"] for state in states] == pytest.approx([0.005, 0.01], rel=1e-2)
    with pytest.raises(ValueError, match="checkpoint-40 is of a run with .* other settings"):
        run(build_prior_settings(home, tmp_path / "run", **{**settings, "optimizer": "adamw"}))


def test_image_tokens_are_hidden_from_later_states_only(home, tmp_path):
    stage = build_stage(home, tmp_path / "run", image_token_dropout=1.0)
    config, seen = stage.model.config, []
    stage.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    image_tokens = torch.arange(config.num_image_tokens).repeat(512, 1) % config.image_vocab_size
    text = torch.full((512, config.text_length), 5)
    batch = {"input_ids": text, "attention_mask": torch.ones_like(text), "image_tokens": image_tokens}
    batch["caption_dropped"] = torch.zeros(512, dtype=torch.bool)
    whole = stage.model.join_stream(text, batch["attention_mask"], image_tokens)["input_ids"]
    torch.manual_seed(0)
    for is_training in (True, False):
        stage.compute_loss(stage.model.train(is_training), batch, step=0)
    assert torch.equal(seen[0]["labels"], whole) and torch.equal(seen[1]["labels"], whole)
    assert torch.equal(seen[1]["input_ids"], whole)
    is_hidden = seen[0]["input_ids"] != whole
    assert not is_hidden[:, : config.text_length + 1].any()
    assert (seen[0]["input_ids"][is_hidden] == config.image_start_token_id).all()
    share = is_hidden[:, config.text_length + 1 :].float().mean(dim=1)  # a share a picture, uniform from 0 to 1
    assert share.mean().item() == pytest.approx(0.5, abs=0.05) and share.std().item() > 0.25


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optimizer": "sgd"}, "`optimizer` is 'sgd'; expected"),
        ({"image_token_dropout": 1.5}, "`image_token_dropout` is 1.5; expected a number in \\[0, 1\\]"),
        ({"muon_learning_rate": -1}, "`muon_learning_rate` is -1.0; expected a number from 0"),
    ],
)
def test_wrong_settings_are_refused(home, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        build_stage(home, tmp_path / "run", **settings)


# ------------------------------------------------------------------------------------------------ what does not decay


def list_undecayed(model, groups):
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: group.get("weight_decay") for group in groups for p in group["params"]}
    assert found.keys() == set(names.values()) and set(found.values()) <= {None, 0.0}
    return {name for name, decay in found.items() if decay == 0.0}


@pytest.mark.parametrize("is_tied", [True, False])
def test_gains_biases_and_embeddings_do_not_decay_where_asked(is_tied):
    prior = build_prior(tie_word_embeddings=is_tied)
    undecayed = list_undecayed(prior, exempt_from_decay(prior, [{"params": list(prior.parameters())}]))
    expected = {name for name, _ in prior.named_parameters() if name.endswith("bias") or "norm" in name}
    expected |= {name for name, _ in prior.named_parameters() if "embed" in name}
    assert undecayed == expected and "model.norm.weight" in expected and len(expected) > 20
    dvae = build_dvae()
    parts = [{"params": list(dvae.decoder.parameters())}, {"params": list(dvae.encoder.parameters()), "lr": 0.5}]
    groups = exempt_from_decay(dvae, parts)
    assert list_undecayed(dvae, groups) == {name for name, _ in dvae.named_parameters() if name.endswith("bias")}
    assert [group.get("lr") for group in groups] == [None, None, 0.5, 0.5]


def test_settings_of_decay_bound_and_muon_together(home, tmp_path):
    settings = {"use_no_decay_groups": True, "adam_max_second_moment": 5.0, "optimizer": "muon"}
    stage = build_stage(home, tmp_path / "run", **settings)
    adamw, muon = make_optimizers(stage.args, stage.parameter_groups())
    assert type(adamw) is BoundedAdamW and adamw.max_second_moment == 5.0
    # The matrices are Muon's, but for the head.
    assert [group["weight_decay"] for group in adamw.param_groups] == [4.5e-2, 0.0]
    assert adamw.param_groups[0]["params"] == [stage.model.lm_head.weight]
    assert [group["weight_decay"] for group in muon.param_groups] == [4.5e-2]


# ------------------------------------------------------------------------------------------- schedules and float16


def make_arguments(kind=PriorArguments, **settings):
    parts = {"dvae": "x", "tokenizer": "x"} if kind is PriorArguments else {}
    return kind(output_dir="x", train_data_dir="x", **parts, **settings)


def test_optimizers_share_a_plateau():
    args = make_arguments(lr_scheduler="reduce_lr_on_plateau", lr_plateau_steps=2, lr_max_halvings=1)
    optimizers = [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr) for lr in (0.5, 2.0)]
    schedules, plateau = make_schedules(args, optimizers)
    for step in range(1, 9):
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        plateau.observe(1.0, step)
    assert plateau.halvings == [5] and plateau.max_halvings == 1
    assert [schedule.get_last_lr() for schedule in schedules] == [[0.25], [1.0]]
    assert make_schedules(make_arguments(), optimizers)[1] is None


def test_the_cosine_may_end_before_the_run():
    """Stage 1 of the paper: over 1.2 of 3 million updates."""
    args = make_arguments(DVAEArguments, max_train_steps=30, lr_decay_steps=12, lr_min_ratio=0.0125)
    [schedule], _ = make_schedules(args, [torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)])
    rates = [1e-4 * schedule.lr_lambdas[0](step) for step in range(30)]
    assert rates[:12] == sorted(rates[:12], reverse=True) and rates[6] == pytest.approx((1e-4 + 1.25e-6) / 2)
    assert rates[12:] == pytest.approx([1.25e-6] * 18)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "`lr_warmup_steps` does nothing with .* constant`: use"),
        ({"lr_scheduler": "constant_with_warmup", "lr_min_ratio": 0.1}, "`lr_min_ratio` does nothing with "),
        ({"lr_scheduler": "reduce_lr_on_plateau", "lr_decay_steps": 9}, "`lr_decay_steps` does nothing with "),
        ({"adam_max_second_moment": 0.0}, "`adam_max_second_moment` is 0.0; expected a number above 0"),
        ({"ema_update_steps": 0}, "`ema_update_steps` is 0; expected a number from 1"),
        ({"lr_plateau_threshold": 1.0}, "`lr_plateau_threshold` is 1.0; expected a number in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        make_arguments(**settings)


def test_float16_has_the_scaler_of_its_stage():
    prior, dvae, fp16 = build_prior(), build_dvae(), {"mixed_precision": "fp16"}
    assert type(make_gradient_scaler(make_arguments(**fp16), prior)) is ResblockGradientScaler
    assert type(make_gradient_scaler(make_arguments(**fp16, gradient_scaling="global"), prior)) is GlobalGradientScaler
    assert type(make_gradient_scaler(make_arguments(DVAEArguments, **fp16), dvae)) is GlobalGradientScaler
    for precision in ("no", "bf16"):
        assert type(make_gradient_scaler(make_arguments(mixed_precision=precision), prior)) is GradientScaler


# The paper's recipe, but for its sizes; with this threshold each window of two updates is a plateau.
RECIPE = {"lr_scheduler": "reduce_lr_on_plateau", "lr_plateau_steps": 2, "lr_plateau_threshold": 0.9}
RECIPE |= {"lr_warmup_steps": 3, "adam_max_second_moment": 5.0, "ema_update_steps": 5, "bpe_dropout": 0.1}


@pytest.mark.parametrize("stage", ["prior", "dvae"])
def test_training_in_float16_is_near_that_in_float32_and_goes_on(home, tmp_path, stage):
    """On a CPU too, where Accelerate would train in float32 without a word."""

    def train(name, num_steps, **settings):
        settings |= {"max_train_steps": 12, "logging_steps": 1, "checkpointing_steps": 6}
        settings |= {"lr_min_ratio": 0.0, "checkpoints_total_limit": None}
        if stage == "prior":
            settings = build_prior_settings(home, tmp_path / name, **settings, **RECIPE)
        else:
            constant = {"lr_scheduler": "constant", "learning_rate": 1e-3}
            settings = dvae_settings(home / "data", tmp_path / name, **settings, **constant)
        log = run(settings, "--max_train_steps", str(num_steps))
        return list(losses(log).values()), list(losses(log, "lr").values())

    expected, rates = train("float32", 12)
    found = train("float16", 12, mixed_precision="fp16")
    assert len(expected) == 12 and found[0] == pytest.approx(expected, rel=2e-2) and found[0] != expected
    train("resumed", 6, mixed_precision="fp16")
    assert train("resumed", 12, mixed_precision="fp16") == found
    if stage == "prior":
        # Windows end after updates 5, 7, ...; what is found after update 7 counts from its next but one.
        halvings = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
        warmup = [0.25, 0.5, 0.75] + [1.0] * 9
        assert rates == pytest.approx([0.01 * ratio * 0.5**n for ratio, n in zip(warmup, halvings, strict=True)])
