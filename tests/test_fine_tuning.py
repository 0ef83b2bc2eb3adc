"""Training the prior from a checkpoint: what `init_from` brings, how such a run goes on, LoRA, and a style's data.

What a finished adapter does in a pipeline is in `test_lora_dalle.py`.
"""

import io
import shutil
from pathlib import Path

import datasets
import prepare_style
import pytest
import torch
import yaml
from arguments import PriorArguments
from hub_server import HubServer, client_environment, run_client
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from prepare_emoji import SPLIT_FILE, read_split
from safetensors.torch import load_file
from tiny_training import (
    MODEL,
    ROOT,
    VALIDATION,
    list_steps,
    losses,
    read_log,
    run,
    write_data,
    write_tokenizer,
)
from train_prior import PriorStage
from transformers import AutoTokenizer

from hf_dalle import DalleDVAE, DalleImageProcessor, DALLEPipeline, DallePriorConfig, DallePriorForCausalLM


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_types": ["full", "row"]}
DROPOUTS = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "embedding_dropout": 0.2}


def build_checkpoint(folder, tokenizer, seed=0):
    """Saves a pipeline of random weights, in halves and with defaults of its own; the seed is the prior's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dvae = DalleDVAE(**MODEL)
        torch.manual_seed(seed)
        fixed = {"text_vocab_size": len(tokenizer), "text_length": 8, "image_grid_size": dvae.image_grid_size}
        prior = DallePriorForCausalLM(
            DallePriorConfig(**SIZES, **fixed, image_vocab_size=16, caption_dropout=0.1, initializer_range=0.2)
        )
    prior.generation_config.update(guidance_scale=2.5)
    image_processor = DalleImageProcessor(size=dvae.config.sample_size)
    pipe = DALLEPipeline(prior=prior.eval(), dvae=dvae, tokenizer=tokenizer, image_processor=image_processor)
    pipe.to(torch.float16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data, a tokenizer and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("fine_tuning")
    write_data(folder / "data")
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(folder / "tokenizer"))
    build_checkpoint(folder / "checkpoint", tokenizer)
    build_checkpoint(folder / "other", tokenizer, seed=1)
    return folder


def build_settings(home, output_dir, **settings):
    return {
        "stage": "prior",
        "output_dir": str(output_dir),
        "train_data_dir": str(home / "data"),
        "init_from": str(home / "checkpoint"),
        "bpe_dropout": 0.0,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 0.01,
        "ema_decay": 0.5,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        **settings,
    }


def build_stage(home, **settings):
    settings = build_settings(home, "nowhere", **settings)
    return PriorStage(PriorArguments(**{name: value for name, value in settings.items() if name != "stage"}))


def load_prior(folder):
    return DALLEPipeline.from_pretrained(folder, dtype=torch.float32).prior


def compute_logits(prior):
    stream = prior.join_stream(torch.arange(8)[None], None, torch.arange(16)[None])
    with torch.no_grad():
        return prior.eval()(stream["input_ids"][:, :-1]).logits


def is_equal(weights, others):
    assert weights.keys() == others.keys()
    return all(torch.equal(value, others[name]) for name, value in weights.items())


# -------------------------------------------------------------------------------------------------- what is started


@pytest.mark.parametrize("kind", ["pipeline", "prior", "pipeline on the Hub", "prior on the Hub"])
def test_a_run_starts_as_its_checkpoint(home, kind):
    start = home / "checkpoint" if kind.startswith("pipeline") else home / "checkpoint" / "prior"
    parts = {}
    if kind.startswith("prior"):
        parts = {"dvae": str(home / "checkpoint" / "dvae"), "tokenizer": str(home / "tokenizer")}
    if kind.endswith("Hub"):  # as the cache has it after a download
        name = kind.split()[0]
        cached = Path(HF_HUB_CACHE, f"models--me--{name}")
        shutil.copytree(start, cached / "snapshots" / ("0" * 40))
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        start = f"me/{name}"
    stage = build_stage(home, init_from=str(start), **parts, lora_rank=2)
    assert {parameter.dtype for parameter in stage.model.parameters()} == {torch.float32}
    assert torch.equal(compute_logits(stage.model), compute_logits(load_prior(home / "checkpoint")))
    assert is_equal(stage.dvae.state_dict(), DalleDVAE.from_pretrained(home / "checkpoint" / "dvae").state_dict())
    assert (
        stage.tokenizer("red and blue").input_ids
        == AutoTokenizer.from_pretrained(home / "tokenizer")("red and blue").input_ids
    )


def test_the_settings_of_the_first_training_and_one_line_more(home):
    first = {"model": {**SIZES, **DROPOUTS}, "dvae": str(home / "checkpoint" / "dvae")}
    stage = build_stage(home, **first, tokenizer=str(home / "tokenizer"), caption_dropout=0.3, generation={"top_k": 7})
    config, defaults = stage.model.config, stage.model.generation_config
    assert (config.hidden_dropout, config.attention_dropout, config.embedding_dropout) == (0.2, 0.2, 0.2)
    assert config.caption_dropout == 0.3 and defaults.top_k == 7 and defaults.guidance_scale == 2.5
    assert not stage.model.train()(torch.zeros(1, 8, dtype=torch.long)).logits.equal(
        stage.model(torch.zeros(1, 8, dtype=torch.long)).logits
    )
    assert torch.equal(compute_logits(stage.model), compute_logits(load_prior(home / "checkpoint")))


def test_updates_change_the_weights_and_the_first_validation_is_before_them(home, tmp_path):
    prompts = {"validation_prompts": ["red and blue"], "num_validation_images": 2, "eval_on_start": True}
    log = run(build_settings(home, tmp_path / "run", **VALIDATION, **prompts, max_train_steps=40))
    assert [row["step"] for row in log] == list(range(41))
    before = build_stage(home, **VALIDATION).validate(load_prior(home / "checkpoint"))[0]
    assert {name: log[0][name] for name in before} == pytest.approx(before)
    assert log[-1]["validation_loss"] < log[0]["validation_loss"] - 1
    pictures = [tmp_path / "run" / "validation" / f"samples-{step:07d}.png" for step in (0, 20, 40)]
    assert sorted((tmp_path / "run" / "validation").iterdir()) == pictures
    assert Image.open(pictures[0]).tobytes() != Image.open(pictures[2]).tobytes()
    tuned, start = load_prior(tmp_path / "run"), load_prior(home / "checkpoint")
    assert tuned.generation_config.guidance_scale == 2.5
    for name, value in tuned.named_parameters():
        assert not torch.equal(value, start.get_parameter(name)), name


def test_a_learning_rate_of_none_changes_nothing(home, tmp_path):
    run(build_settings(home, tmp_path / "run", learning_rate=0.0))
    assert is_equal(load_prior(tmp_path / "run").state_dict(), load_prior(home / "checkpoint").state_dict())


# ------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 2, "lora_dropout": 0.3}], ids=["all", "lora"])
def test_a_run_goes_on_from_its_own_checkpoint(home, tmp_path, lora):
    lasting = {"model": DROPOUTS, "checkpoints_total_limit": None, **lora}
    whole = run(build_settings(home, tmp_path / "whole", **lasting))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    other = {"init_from": str(home / "other"), "eval_on_start": True}
    settings = build_settings(home, tmp_path / "resumed", **lasting)
    if lora:  # whose base stays what it is: another one would go unused
        with pytest.raises(ValueError, match="The base of .*checkpoint-2 is not `init_from`: choose another `output_"):
            run({**settings, **other})
    resumed = run(settings if lora else {**settings, **other})
    assert list_steps(tmp_path / "resumed") == [2, 4]
    assert [row["step"] for row in resumed] == [3, 4]
    for row, expected in zip(resumed, whole[2:], strict=True):
        clock = {"pictures_per_second": 0, "memory_gb": 0}
        assert {**row, **clock} == {**expected, **clock}
    for path in (tmp_path / "whole" / "checkpoint-4").glob("*.safetensors"):
        assert is_equal(load_file(path), load_file(tmp_path / "resumed" / "checkpoint-4" / path.name))
    finished = [path for path in (tmp_path / "whole").glob("**/*.safetensors") if "checkpoint-" not in str(path)]
    assert len(finished) == (1 if lora else 2)
    for path in finished:
        other = tmp_path / "resumed" / path.relative_to(tmp_path / "whole")
        assert "dvae" in str(path) or is_equal(load_file(path), load_file(other))


def test_the_row_before_the_first_update_is_logged_once(home, tmp_path):
    settings = build_settings(home, tmp_path / "run", **VALIDATION, eval_on_start=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0, "validation_loss": 9.9}\n{"step": 1, "loss": 1.0}\n')
    assert [row["step"] for row in run(settings)] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in run(settings)] == [0, 1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def adapter(home):
    """The folder of a run that trained adapters of some layers."""
    lora = {"lora_rank": 3, "lora_alpha": 6, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "fc2"]}
    prompts = {"validation_prompts": ["red and blue"], "num_validation_images": 2, "eval_on_start": True}
    settings = {**VALIDATION, **lora, **prompts, "max_train_steps": 40, "checkpointing_steps": 40}
    run(build_settings(home, home / "adapter", **settings, learning_rate=0.03))
    return home / "adapter"


def test_lora_learns_with_adapters_alone(home, adapter):
    log = read_log(adapter)
    assert losses(log, "validation_image_loss")[40] < losses(log, "validation_image_loss")[0] - 0.5
    weights = load_file(adapter / "checkpoint-40" / "model.safetensors")
    start = load_prior(home / "checkpoint").state_dict()
    trained = {name for name in weights if ".lora_" in name}
    layers = [f"model.layers.{i}.{kind}" for i in range(2) for kind in ("self_attn.q_proj", "mlp.fc2")]
    assert trained == {f"{layer}.lora_{matrix}.default.weight" for layer in layers for matrix in "AB"}
    frozen = {name.replace(".base_layer", ""): value for name, value in weights.items() if name not in trained}
    assert is_equal(frozen, start)
    names = [f"samples-{step:07d}.png" for step in (0, 20, 40)]
    assert sorted(path.name for path in (adapter / "validation").iterdir()) == names


def test_lora_ends_in_an_adapter_that_a_pipeline_loads(home, adapter):
    assert [path.name for path in adapter.glob("*.safetensors")] == ["pytorch_lora_weights.safetensors"]
    assert not (adapter / "model_index.json").exists() and not (adapter / "prior").exists()
    averages = torch.load(adapter / "checkpoint-40" / "custom_checkpoint_2.pkl", weights_only=True)["shadow_params"]
    saved, live = (
        load_file(adapter / path) for path in ("pytorch_lora_weights.safetensors", "checkpoint-40/model.safetensors")
    )
    names = [name for name in live if ".lora_" in name]
    assert len(averages) == len(saved) == len(names) == 8
    assert all(any(torch.equal(average, value) for value in saved.values()) for average in averages)
    assert not any(torch.equal(live[name], saved[f"prior.{name.replace('.default', '')}"]) for name in names)
    pipe = DALLEPipeline.from_pretrained(home / "checkpoint", dtype=torch.float32)
    pipe.load_lora_weights(adapter)
    config = pipe.prior.peft_config["default_0"]
    assert (config.r, config.lora_alpha) == (3, 6)
    stage = build_stage(home, **VALIDATION)
    after = stage.validate(pipe.prior)[0]
    last = read_log(adapter)[-1]
    assert {name: last[name] for name in after} == pytest.approx(after, rel=1e-4)


def test_lora_without_an_average_and_in_halves(home, tmp_path):
    run(build_settings(home, tmp_path / "run", lora_rank=2, use_ema=False, weights_dtype="float16"))
    saved = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    live = load_file(tmp_path / "run" / "checkpoint-4" / "model.safetensors")
    assert len(saved) == 2 * 6 * 2  # matrices, linear layers a block, blocks
    for name, value in saved.items():
        layer, _, matrix = name.removeprefix("prior.").removesuffix(".weight").rpartition(".")
        assert torch.equal(value, live[f"{layer}.{matrix}.default.weight"].half()), name


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": None}, "`dvae` is missing: name the folder of the trained dvae"),
        ({"init_from": None, "lora_rank": 2, "dvae": "x", "tokenizer": "y"}, "`lora_rank` needs `init_from`"),
        ({"lora_rank": 0}, "`lora_rank` is 0; expected a number from 1"),
        ({"lora_alpha": 2.0}, "do nothing without `lora_rank`"),
        ({"lora_rank": 2, "lora_target_modules": ["q_prj"]}, "unknown key `q_prj`. Did you mean `q_proj`"),
        ({"lora_rank": 2, "lora_target_modules": ["lm_head"]}, "unknown key `lm_head`"),
        ({"init_from": "nowhere"}, "`init_from` is nowhere, no folder and not to be downloaded: "),
        ({"init_from": "not a name"}, "`init_from` is not a name, no folder and not to be downloaded: "),
        ({"init_from": "{home}/data", "dvae": "x", "tokenizer": "y"}, "`dvae` is x, which cannot be loaded"),
        (
            {"init_from": "{home}/data", "dvae": "{home}/checkpoint/dvae", "tokenizer": "{home}/tokenizer"},
            "`init_from` names {home}/data, which cannot be loaded",
        ),
        ({"init_from": "{home}/checkpoint/prior"}, "`dvae` is missing: {home}/checkpoint/prior is no pipeline but a"),
        ({"output_dir": "{home}/checkpoint"}, "would write over its start"),
        (
            {"init_from": "{home}/checkpoint/prior", "output_dir": "{home}/checkpoint", "dvae": "x", "tokenizer": "y"},
            "would write over its start",
        ),
        ({"init_from": "{home}/damaged"}, "`init_from` names {home}/damaged/prior, which cannot be loaded: "),
        ({"model": {"hidden_size": 64}}, "`model` asks for hidden_size 64, but the checkpoint has 32. Leave it out"),
        ({"model": {"attention_types": ["row", "full"]}}, "asks for attention_types"),
        ({"model": {"hiden_dropout": 0.1}}, "unknown key `hiden_dropout`. Did you mean `hidden_dropout`"),
        ({"model": {"hidden_dropout": 2.0}}, "`hidden_dropout` must be between 0 and 1"),
        ({"dvae": "{home}/large"}, "The parts do not fit: `dvae.image_grid_size` is 8, but `prior.config.image_grid_"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(home, tmp_path, changes, words):
    if not (home / "large").exists():
        DalleDVAE(**{**MODEL, "sample_size": 32}).save_pretrained(home / "large")
        shutil.copytree(home / "checkpoint", home / "damaged")
        weights = home / "damaged" / "prior" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    changes = yaml.safe_load(yaml.safe_dump(changes).replace("{home}", str(home)))
    settings = {**build_settings(home, tmp_path / "run"), **changes}
    settings = {name: value for name, value in settings.items() if name != "stage"}
    with pytest.raises((ValueError, OSError)) as error:
        PriorStage(PriorArguments(**settings))
    assert words.replace("{home}", str(home)) in str(error.value)


# ------------------------------------------------------------------------------------------------------------ data


def test_the_style_teaches_known_concepts_and_shows_others(tmp_path):
    rows = read_split(SPLIT_FILE)
    chosen = prepare_style.choose_concepts(rows, {row.hexcode for row in rows})
    train, validation = ({row.hexcode for row in chosen[split]} for split in ("train", "validation"))
    assert len(train) == 100 and len(validation) == 32 and not train & validation
    trained = [row.hexcode for row in rows if row.split == "train"]
    assert all(trained.count(hexcode) >= 4 for hexcode in train | validation)
    again = prepare_style.choose_concepts(rows[::-1], {row.hexcode for row in rows})
    assert again == chosen
    with pytest.raises(ValueError, match="2 concepts are known and drawn, but 132 are needed"):
        prepare_style.choose_concepts(rows, set(sorted(train)[:2]))


def test_the_recipe_draws_concepts_that_it_does_not_train():
    rows = read_split(SPLIT_FILE)
    drawn = {row.hexcode for row in rows}  # more than the set has: the choice below is a superset's
    recipe = yaml.safe_load((ROOT / "training" / "configs" / "emoji_mini_lora.yaml").read_text())
    names = {prompt.removeprefix("a high contrast style emoji of ") for prompt in recipe["validation_prompts"]}
    assert names <= {row.name for row in rows}
    chosen = prepare_style.choose_concepts(rows, drawn)
    assert not names & {row.name for row in chosen["train"]}


@pytest.mark.slow
def test_the_real_style(tmp_path):
    for _ in range(2):
        prepare_style.prepare(tmp_path / "style", ROOT / "data" / "npm", size=32)
        train, validation = (
            datasets.Dataset.from_parquet(str(tmp_path / "style" / f"{split}.parquet"), cache_dir=tmp_path / "cache")
            for split in ("train", "validation")
        )
    assert len(train) == 100 and len(validation) == 32
    assert not set(train["name"]) & set(validation["name"])
    assert train[0]["captions"][0] == f"a high contrast style emoji of {train[0]['name']}"
    picture = Image.open(io.BytesIO(train.cast_column("image", datasets.Image(decode=False))[0]["image"]["bytes"]))
    assert picture.size == (32, 32)
    assert picture.convert("L").convert("RGB").tobytes() == picture.convert("RGB").tobytes()
    recipe = yaml.safe_load((ROOT / "training" / "configs" / "emoji_mini_lora.yaml").read_text())
    for prompt in recipe["validation_prompts"]:
        assert prompt.removeprefix("a high contrast style emoji of ") not in train["name"]


CLIENT = f"""
import sys
sys.path.insert(0, {str(ROOT / "training")!r})
from arguments import PriorArguments
from finetune_prior import find_start, load_prior
from hf_dalle import DALLEPipeline

args = find_start(PriorArguments(output_dir="x", train_data_dir="y", init_from="me/tiny"))
load_prior(args)
pipe = DALLEPipeline.from_pretrained("me/tiny")
pipe.load_lora_weights("me/style")
try:
    pipe.load_lora_weights("me/tiny")
except OSError as error:
    print(error)
print(pipe.get_active_adapters(), args.dvae.endswith("dvae"), args.tokenizer.endswith("tokenizer"))
"""


@pytest.mark.slow
def test_checkpoints_and_adapters_come_from_the_hub(home, adapter, tmp_path):
    with HubServer() as hub:
        hub.add_folder("me/tiny", home / "checkpoint")
        shutil.copytree(adapter, tmp_path / "style", ignore=shutil.ignore_patterns("checkpoint-*", "logs"))
        hub.add_folder("me/style", tmp_path / "style")
        output = run_client(CLIENT, client_environment(hub, tmp_path / "home"))
    assert "The adapter pytorch_lora_weights.safetensors of me/tiny cannot be loaded: " in output
    assert "['default_0'] True True" in output
