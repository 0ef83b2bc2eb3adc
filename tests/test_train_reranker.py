"""Stage `reranker` at a tiny size: it learns, ends in what a pipeline ranks by, and any number of processes agree."""

import math
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import PartialState
from add_reranker import add_reranker, main
from arguments import RerankerArguments
from describe_run import describe_model
from estimates import Machines, estimate
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from tiny import build_pipeline, build_reranker, build_tokenizer
from tiny_processes import finish, fork_ranks, fork_run, wait_until
from tiny_training import (
    VALIDATION,
    build_untrained_home,
    list_rows,
    list_steps,
    losses,
    read_log,
    run,
    write_parquet,
)
from train_reranker import RerankerCollator, RerankerStage, group_values, make_processor, rank_own, tokenize
from transformers import AutoModel, AutoProcessor, CLIPModel, CLIPProcessor, VisionTextDualEncoderModel

from hf_dalle import DalleImageTower, DALLEPipeline
from hf_dalle.losses import contrastive_loss
from hf_dalle.model_card import render_model_card
from hf_dalle.reranking import score_images


PART = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"projection_dim": 16, "text_config": PART, "vision_config": {**PART, "patch_size": 4}}
TOWER = {"model_type": "hf_dalle_image_tower", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
TOWER_SIZES = {**SIZES, "vision_config": {**TOWER, "layer_type": "basic"}, "attn_implementation": "eager"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return build_untrained_home(tmp_path_factory.mktemp("reranker"))


def reranker_settings(home, output_dir, **settings):
    return {
        "stage": "reranker",
        "output_dir": str(output_dir),
        "train_data_dir": str(home / "data"),
        "tokenizer": str(home / "tokenizer"),
        "model": {**SIZES, "vision_config": {**SIZES["vision_config"], "image_size": 16}},
        "train_batch_size": 20,
        "max_train_steps": 60,
        "learning_rate": 0.005,
        "ema_decay": 0.9,
        "logging_steps": 5,
        "report_to": "none",
        **settings,
    }


def build_stage(home, **settings):
    settings = reranker_settings(home, "nowhere", **settings)
    return RerankerStage(RerankerArguments(**{name: value for name, value in settings.items() if name != "stage"}))


@pytest.fixture(scope="module")
def trained(home):
    """The folder of a reranker that has seen each picture 60 times."""
    settings = reranker_settings(home, home / "trained", **VALIDATION, weights_dtype="float16")
    run({**settings, "num_validation_images": 3})
    return home / "trained"


# ------------------------------------------------------------------------------------------------- what a run ends in


def test_the_reranker_learns(trained):
    log = read_log(trained)
    assert losses(log)[60] < losses(log)[5] / 2 < math.log(20)
    for name in ("recall@1", "image_recall@1"):
        assert losses(log, f"validation_{name}")[60] > max(0.5, losses(log, f"validation_{name}")[20] - 0.01), name
    assert "validation_reconstruction_recall@1" not in log[-1]
    assert losses(log, "validation_loss")[60] < losses(log, "validation_loss")[20]
    grids = sorted((trained / "validation").iterdir())
    assert [path.name for path in grids] == [f"found-{step:07d}.png" for step in (20, 40, 60)]
    assert Image.open(grids[-1]).size == (6 * 16, 3 * 16)


def test_a_finished_reranker_is_transformers_own(trained):
    model, processor = AutoModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert type(model) is CLIPModel and type(processor) is CLIPProcessor and model.dtype == torch.float32
    stored = load_file(trained / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert all(torch.equal(value, stored[name].float()) for name, value in model.state_dict().items())
    rows = list_rows()
    own = [score_images(model, processor, row["captions"][0], [other["image"] for other in rows]) for row in rows]
    ranks = [(scores >= scores[index]).sum() for index, scores in enumerate(own)]
    assert np.mean([rank == 1 for rank in ranks]) > 0.5
    with pytest.raises(ValueError, match=r"push|Hub in its pipeline"):
        build_stage(trained.parent, push_to_hub=True)


def test_it_goes_into_a_pipeline_and_ranks_there(trained, tmp_path, capsys):
    parts = {
        "reranker": CLIPModel.from_pretrained(trained),
        "reranker_processor": AutoProcessor.from_pretrained(trained),
    }
    expected = build_pipeline(**parts)
    for saved in (build_pipeline(), build_pipeline(**build_reranker())):  # without one, and with another
        saved.save_pretrained(tmp_path / "pipe")
        main([str(trained), str(tmp_path / "pipe")])
        size = sum(path.stat().st_size for path in (tmp_path / "pipe").rglob("*") if path.is_file())
        assert f"it has {size / 1e6:.1f} MB" in capsys.readouterr().out
        assert (tmp_path / "pipe/reranker/model.safetensors").read_bytes() == (
            trained / "model.safetensors"
        ).read_bytes()
        assert not list((tmp_path / "pipe").rglob("*.new"))
        pipe = DALLEPipeline.from_pretrained(tmp_path / "pipe")
        pipe.set_progress_bar_config(disable=True)
        outputs = [
            each(
                ["red and blue"] * 2,
                num_candidates=5,
                num_images_per_prompt=2,
                generator=torch.Generator().manual_seed(1),
            )
            for each in (pipe, expected)
        ]
        assert torch.equal(outputs[0].scores, outputs[1].scores) and len(outputs[0].images) == 4
    described = describe_model(tmp_path / "pipe")
    assert described["num_parameters"]["reranker"] == parts["reranker"].num_parameters()
    for places, words in (
        ((tmp_path, tmp_path / "pipe"), "no model's folder"),
        ((trained, trained), "no model_index.json"),
    ):
        with pytest.raises(OSError, match=words):
            add_reranker(*places)


def test_a_reranker_that_cannot_be_loaded_leaves_the_pipeline_as_it_was(trained, tmp_path):
    build_pipeline(**build_reranker()).save_pretrained(tmp_path / "pipe")
    shutil.copytree(trained, tmp_path / "broken", ignore=shutil.ignore_patterns("checkpoint-*", "validation"))
    weights = (trained / "model.safetensors").read_bytes()
    (tmp_path / "broken" / "model.safetensors").write_bytes(weights[: len(weights) // 2])

    def read_all():
        return {path: path.read_bytes() for path in (tmp_path / "pipe").rglob("*") if path.is_file()}

    before = read_all()
    with pytest.raises(ValueError, match="cannot be loaded with this reranker, and stays as it is"):
        add_reranker(tmp_path / "broken", tmp_path / "pipe")
    assert read_all() == before and not list((tmp_path / "pipe").rglob("*.new"))


def test_a_resnet_learns_and_goes_into_a_pipeline(home, tmp_path):
    settings = {"model": {**TOWER_SIZES, "vision_config": {**TOWER_SIZES["vision_config"], "image_size": 16}}}
    folder = tmp_path / "trained"
    run(
        reranker_settings(
            home, folder, **{**settings, **VALIDATION, "max_train_steps": 120, "weights_dtype": "float16"}
        )
    )
    log = read_log(folder)
    assert losses(log)[120] < losses(log)[5] / 2 and losses(log, "validation_recall@1")[120] > 0.5
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert type(model) is VisionTextDualEncoderModel and type(model.vision_model) is DalleImageTower
    stored = load_file(folder / "model.safetensors")
    assert {str(value.dtype) for value in stored.values()} == {"torch.float16", "torch.int64"}  # batches counted
    assert all(torch.equal(value, stored[name].to(value.dtype)) for name, value in model.state_dict().items())
    rows = list_rows()
    own = [score_images(model, processor, row["captions"][0], [other["image"] for other in rows]) for row in rows]
    assert np.mean([(scores >= scores[index]).sum() == 1 for index, scores in enumerate(own)]) > 0.5
    build_pipeline().save_pretrained(tmp_path / "pipe")
    add_reranker(folder, tmp_path / "pipe")
    pipe = DALLEPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    output = pipe(
        "red and blue", num_candidates=4, num_images_per_prompt=2, generator=torch.Generator().manual_seed(1)
    )
    expected = score_images(model, processor, "red and blue", output.images)
    torch.testing.assert_close(output.scores.flatten(), expected, atol=1e-4, rtol=1e-4)
    template = Path(__file__).parents[1] / "model_cards" / "template.md"
    card = render_model_card({"name": "ours", "model": describe_model(tmp_path / "pipe")}, template)
    assert "| reranker | ResNet and CLIP: pictures 1, 1 blocks, 8, 16 wide; captions 2 layers, 16 wide |" in card.text


@pytest.mark.parametrize("sizes", [SIZES, TOWER_SIZES], ids=["clip", "resnet"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(home, tmp_path, sizes):
    settings = {"checkpointing_steps": 5, "max_train_steps": 20, "caption_word_dropout": 0.5, "train_batch_size": 8}
    settings |= {"dvae": str(home / "dvae"), "resize_range": [1.0, 1.0], "model": sizes, "distortion": 1.0}
    whole = reranker_settings(home, tmp_path / "whole", **settings)
    killed = reranker_settings(home, tmp_path / "killed", **settings)
    process = fork_run(killed)
    wait_until(lambda: 5 in list_steps(tmp_path / "killed"), process)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert finish(fork_run(killed), fork_run(whole)) == [0, 0]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_two_processes_have_the_loss_and_the_gradients_of_one(home, tmp_path):
    shared = {"max_train_steps": 6, "logging_steps": 1, "lr_scheduler": "constant", "learning_rate": 0.01}
    one = reranker_settings(home, tmp_path / "one", **shared, train_batch_size=10)
    two = reranker_settings(home, tmp_path / "two", **shared, train_batch_size=5)
    assert finish(fork_run(one), *fork_ranks(two, 2)) == [0, 0, 0]
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    for name in ("loss", "grad_norm", "logit_scale"):
        assert losses(logs[0], name) == pytest.approx(losses(logs[1], name), rel=1e-4), name
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        if not name.endswith(
            "k_proj.bias"
        ):  # which changes no attention: its gradient is rounding, made large by Adam
            torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=1e-3)


# ------------------------------------------------------------------------------------------------------ loss and data


@settings(deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_the_loss_is_that_of_its_definition(seed, groups):
    generator = torch.Generator().manual_seed(seed)
    images, texts = (F.normalize(torch.randn(len(groups), 3, generator=generator).double(), dim=1) for _ in "ab")
    terms = []
    for one, other in ((images, texts), (texts, images)):
        for row in range(len(groups)):
            kept = [k for k in range(len(groups)) if k == row or groups[k] != groups[row]]
            logits = [7 * float(one[row] @ other[k]) for k in kept]
            terms.append(math.log(sum(map(math.exp, logits))) - logits[kept.index(row)])
    loss = contrastive_loss(images, texts, torch.tensor(7.0).double(), torch.tensor(groups))
    assert loss.item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)


def test_the_loss_is_transformers_where_all_are_negatives(trained):
    model, processor = CLIPModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    rows = list_rows()[:6]
    inputs = processor(
        text=[row["captions"][0] for row in rows],
        images=[row["image"] for row in rows],
        padding=True,
        return_tensors="pt",
    )
    output = model(**inputs, return_loss=True)
    own = contrastive_loss(output.image_embeds, output.text_embeds, model.logit_scale.exp(), torch.arange(6))
    torch.testing.assert_close(own, output.loss)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 5), st.integers(1, 3))
def test_ranks_are_those_of_sorting(seed, num_queries, num_more, chunk_size):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-2, 3, (num_queries + num_more, 2), generator=generator).double()
    queries = torch.randint(-2, 3, (num_queries, 2), generator=generator).double()
    groups = torch.randint(0, 4, (num_queries + num_more,), generator=generator)
    ranks = rank_own(queries, keys, groups[:num_queries], groups, chunk_size)
    for row in range(num_queries):
        own = queries[row] @ keys[row]
        nearer = [k for k in range(len(keys)) if groups[k] != groups[row] and queries[row] @ keys[k] >= own]
        assert ranks[row] == 1 + len(nearer)


def test_training_sees_what_the_processor_makes(home):
    stage = build_stage(home)
    for side in (16, 48):
        noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
        made = stage.processor(
            text=["red and blue"], images=[Image.fromarray(noise)], padding=True, return_tensors="pt"
        )
        seen = (stage.image_processor.preprocess(Image.fromarray(noise))["pixel_values"] - 0.5) / 0.5
        torch.testing.assert_close(made["pixel_values"], seen, atol=1e-6, rtol=0)
    batch = stage.collator([{**stage.train_dataset[0], "caption": "red and blue"}])
    assert torch.equal(batch["input_ids"], made["input_ids"]) and batch["pixel_values"].max() <= 1


def test_captions_end_where_clip_reads_them(tmp_path):
    processor = make_processor(build_tokenizer(), 16)
    end = processor.tokenizer.eos_token_id
    processor.save_pretrained(tmp_path)
    for tokenizer in (processor.tokenizer, AutoProcessor.from_pretrained(tmp_path).tokenizer):
        assert end == len(build_tokenizer()) == len(tokenizer) - 1 and tokenizer.model_max_length == 13
        batch = tokenize(tokenizer, ["a red fox", "zq " * 40, "<|endoftext|> is text"])
        assert ((batch["input_ids"] == end).sum(1) == 1).all() and batch["input_ids"].shape[1] == 13
        lengths = batch["attention_mask"].sum(1)
        assert [row[length - 1] for row, length in zip(batch["input_ids"].tolist(), lengths, strict=True)] == [end] * 3
        plain = build_tokenizer()("a red fox")["input_ids"]
        assert batch["input_ids"][0].tolist()[: lengths[0]] == [*plain, end]


def test_rows_of_a_group_are_no_negatives(home, tmp_path):
    rows = [{**row, "concept": row["captions"][0].split()[0]} for row in list_rows()]
    write_parquet(tmp_path / "train.parquet", rows)
    stage = build_stage(home, train_data_dir=str(tmp_path), negatives_column="concept")
    groups = stage.collator([stage.train_dataset[index] for index in range(20)])["groups"]
    names = [row["concept"] for row in rows]
    assert (groups[:, None] == groups).tolist() == [[one == other for other in names] for one in names]
    plain = RerankerCollator(stage.processor.tokenizer)
    items = [{**stage.train_dataset[index], "caption": caption} for index, caption in enumerate("aba")]
    assert (plain(items)["groups"][:, None] == plain(items)["groups"])[0].tolist() == [True, False, True]
    assert torch.equal(group_values(["a", 3]), group_values(["a", 3])) and group_values([]).shape == (0,)
    assert plain(items)["row_ids"][:, 1].tolist() == [0, 1, 2]


def test_a_share_of_the_pictures_is_reconstructed(home):
    PartialState(cpu=True)
    for share in (0.0, 0.5, 1.0):
        stage = build_stage(home, dvae=str(home / "dvae"), model=SIZES, reconstruction_share=share)
        pixels = torch.rand(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        through = stage._reconstruct(pixels)
        with torch.random.fork_rng(devices=[]):
            seen = stage._reconstruct_some(pixels)
        is_through = (seen != pixels).flatten(1).any(1)
        assert share == pytest.approx(is_through.float().mean().item(), abs=0.25) and (is_through.all() or share < 1)
        torch.testing.assert_close(seen[is_through], through[is_through])
        assert torch.equal(seen[~is_through], pixels[~is_through])


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer": ""}, "`tokenizer` is missing"),
        ({"tokenizer": "nowhere"}, "`tokenizer` is nowhere, which cannot be loaded"),
        ({"dvae": "nowhere"}, "`dvae` is nowhere, which cannot be loaded"),
        ({"model": {"text_confg": {}}}, "unknown key `text_confg`. Did you mean `text_config`?"),
        ({"model": {**SIZES, "text_config": {"hiden_size": 8}}}, "`text_config` of `model` has an unknown key"),
        ({"model": {**SIZES, "text_config": {**PART, "vocab_size": 9}}}, "`model` asks for vocab_size 9"),
        ({"model": {**SIZES, "text_config": {**PART, "hidden_size": 7}}}, "A value in `model` does not fit"),
        (
            {"model": {**SIZES, "vision_config": {"model_type": "resnet"}}},
            "is 'resnet'; expected one of clip_vision_m",
        ),
        (
            {"model": {**SIZES, "vision_config": {**TOWER, "patch_size": 4}}},
            "`vision_config` of `model` has an unknown key `patch_size`",
        ),
        ({"model": {**SIZES, "vision_config": {**TOWER, "depths": "deep"}}}, "A value in `model` does not fit"),
        ({"distortion": -0.5}, "`distortion` is -0.5; expected a number from 0"),
        ({"reconstruction_share": 1.5}, "`reconstruction_share` is 1.5; expected a number in"),
        ({"negatives_column": "style"}, "no column 'style'"),
        ({"negatives_column": "style", "streaming": True}, "needs rows by number"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(home, tmp_path, changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        run(reranker_settings(home, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("sizes", [SIZES, TOWER_SIZES], ids=["clip", "resnet"])
def test_the_dry_run_counts_its_parts(home, sizes):
    settings = reranker_settings(home, "nowhere", dvae=str(home / "dvae"), model=sizes, train_batch_size=4)
    args = RerankerArguments(**{name: value for name, value in settings.items() if name != "stage"})
    plan, stage = estimate(args, Machines()), RerankerStage(args)
    num_parameters = stage.model.num_parameters()
    assert plan["model"] == {"parameters": num_parameters, "of these trained": num_parameters}
    memory = plan["memory a device, bytes"]
    assert memory["weights"] >= 4 * num_parameters and memory["EMA"] == 4 * num_parameters
    assert memory["dVAE"] == sum(value.nbytes for value in stage.dvae.state_dict().values())
    assert memory["activations"] > 0 and plan["an update"]["pictures"] == 4
    assert plan["data"]["rows found"] == 20


@pytest.mark.parametrize("name", ["emoji_mini_reranker", "emoji_mini_reranker_resnet"])
def test_the_recipes_run_on_pictures_of_another_size(home, tmp_path, name):
    recipe = yaml.safe_load((Path(__file__).parents[1] / "training" / "configs" / f"{name}.yaml").read_text())
    places = {part: str(home / part) for part in ("dvae", "tokenizer")} | {"train_data_dir": str(home / "data")}
    small = {"train_split": "train", "validation_split": None, "train_batch_size": 4, "max_train_steps": 3}
    small |= {"logging_steps": 1, "lr_warmup_steps": 1, "report_to": "none", "output_dir": str(tmp_path / "run")}
    run({**recipe, **places, **small})
    assert all(math.isfinite(loss) for loss in losses(read_log(tmp_path / "run")).values())
    is_resnet = "model_type" in recipe["model"]["vision_config"]
    expected = VisionTextDualEncoderModel if is_resnet else CLIPModel
    assert type(AutoModel.from_pretrained(tmp_path / "run")) is expected and is_resnet == name.endswith("resnet")
