"""Which weights Muon updates and how far, and image tokens hidden in training; off by default."""

import pytest
import torch
from arguments import TrainArguments, parse_arguments
from optimizers import make_optimizers
from tiny_training import build_home, build_prior_settings, losses, run, write_settings
from train_prior import PriorStage


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
    with pytest.raises(ValueError, match="checkpoint-40 is damaged, or of a run with .* other settings"):
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
        ({"optimizer": "muon", "mixed_precision": "fp16"}, "`optimizer: muon` does not go with fp16"),
        ({"image_token_dropout": 1.5}, "`image_token_dropout` is 1.5; expected a number in \\[0, 1\\]"),
        ({"muon_learning_rate": -1}, "`muon_learning_rate` is -1.0; expected a number from 0"),
    ],
)
def test_wrong_settings_are_refused(home, tmp_path, settings, words):
    with pytest.raises(ValueError, match=words):
        build_stage(home, tmp_path / "run", **settings)
