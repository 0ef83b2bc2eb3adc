"""The recipes of training/configs for data at scale, each run three updates on data of its format, made small.

What they say of the paper is held against its numbers; how they parse is `test_training_arguments.py`'s.
"""

import inspect
import math
import re

import download_images
import precompute_image_tokens
import pytest
import train_tokenizer
import yaml
from picture_server import serve
from test_precompute_shards import write_tar
from tiny_training import MODEL, ROOT, encode_picture, list_rows, losses, run

from hf_dalle import DalleDVAE, DALLEPipeline, DallePriorConfig


CONFIGS = ROOT / "training" / "configs"
NAMES = ("cc3m_dvae", "cc3m_prior_1.2b", "dalle_12b_dvae", "dalle_12b")
SMALL = {
    "max_train_steps": 3,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "checkpointing_steps": 3,
    "validation_steps": 3,
    "logging_steps": 1,
    "dataloader_num_workers": 0,
    "shuffle_buffer_size": 8,
    "report_to": "none",
}
PRIOR = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Data as the recipes' commands make it: a list of addresses, downloaded, and tar shards of `img2dataset`."""
    folder = tmp_path_factory.mktemp("recipes")
    pairs = [(row["captions"][0], encode_picture(row["image"].resize((24, 24)), "JPEG")) for row in list_rows()]
    with serve() as server:
        server.pictures |= {f"{index}.jpg": content for index, (_, content) in enumerate(pairs)}
        for split, rows in (("train", pairs), ("validation", pairs[:4])):
            lines = [f"{caption}\t{server.url}/{index}.jpg\n" for index, (caption, _) in enumerate(rows)]
            lines.insert(2, f"a picture that is gone\t{server.url}/404\n")
            (folder / f"{split}.tsv").write_text("".join(lines))
            options = ("--url_list", folder / f"{split}.tsv", "--output_dir", folder / "cc3m", "--split", split)
            download_images.main([*map(str, options), "--rows_per_shard", "11", "--allow_local_addresses"])
    for index in range(3):
        write_tar(folder / "pairs" / f"{index:05d}.tar", list_rows()[index::3])
    captions = str(folder / "cc3m" / "train-*.parquet")
    options = ("--vocab_size", "300", "--text_length", "8", "--caption_column", "caption")
    train_tokenizer.main(["--train_data", captions, *options, "--output_dir", str(folder / "tokenizer")])
    return folder


def run_recipe(name, home, **changes):
    """Three updates of a recipe: its settings but for places and sizes."""
    settings = {**read(name), **SMALL, "output_dir": str(home / name), **changes}
    log = run(settings)
    assert sorted(losses(log)) == [1, 2, 3] and all(map(math.isfinite, losses(log).values()))
    return log


def precompute(home, dvae):
    folders = ("--dvae", dvae, "--train_data_dir", home / "cc3m", "--output_dir", home / "tokens")
    options = ("--splits", "train", "validation", "--num_views", "4", "--rows_per_shard", "8")
    precompute_image_tokens.main([*map(str, folders), *options])


def test_conceptual_captions(home):
    """From the list of addresses to a pipeline, by the commands in the recipes' comments."""
    log = run_recipe("cc3m_dvae", home, train_data_dir=str(home / "cc3m"), model=MODEL)
    assert "validation_psnr" in log[-1]
    precompute(home, home / "cc3m_dvae")
    assert len(list((home / "tokens").glob("train-*.parquet"))) == 3
    places = {"train_data_dir": home / "tokens", "dvae": home / "cc3m_dvae", "tokenizer": home / "tokenizer"}
    sizes = {"model": PRIOR, "validation_prompts": ["red and blue"], "num_validation_images": 1}
    log = run_recipe("cc3m_prior_1.2b", home, **{key: str(value) for key, value in places.items()}, **sizes)
    assert "validation_image_loss" in log[-1]
    assert DALLEPipeline.from_pretrained(home / "cc3m_prior_1.2b").prior.config.attention_types == ["row", "conv"]


def test_the_papers(home):
    """Both stages in float16, from tar shards read in sequence."""
    tars = str(home / "pairs" / "*.tar")
    run_recipe("dalle_12b_dvae", home, train_data_dir=tars, model={**MODEL, "logit_laplace_eps": 0.1})
    sizes = {"model": {**read("dalle_12b")["model"], **PRIOR}, "validation_prompts": ["red and blue"]}
    places = {"train_data_dir": tars, "dvae": str(home / "dalle_12b_dvae"), "tokenizer": str(home / "tokenizer")}
    run_recipe("dalle_12b", home, **places, **sizes, num_validation_images=1)
    config = DALLEPipeline.from_pretrained(home / "dalle_12b").prior.config
    assert config.attention_types == ["row", "conv"] and config.conv_kernel_size == 11


def test_the_numbers_are_the_papers():
    stage_1, stage_2 = read("dalle_12b_dvae"), read("dalle_12b")
    for settings, num_gpus, batch_size, num_updates in ((stage_1, 64, 512, 3_000_000), (stage_2, 1024, 1024, 430_000)):
        assert settings["train_batch_size"] * num_gpus == batch_size and settings["max_train_steps"] == num_updates
    assert {key: stage_1[key] for key in ("learning_rate", "kl_weight", "temperature_end")} == {
        "learning_rate": 1e-4,
        "kl_weight": 6.6,
        "temperature_end": 1 / 16,
    }
    assert stage_1["learning_rate"] * stage_1["lr_min_ratio"] == pytest.approx(1.25e-6)
    assert stage_1["lr_decay_steps"] == 1_200_000
    defaults = {name: value.default for name, value in inspect.signature(DalleDVAE).parameters.items()}  # the released
    assert {name: tuple(value) if isinstance(value, list) else value for name, value in stage_1["model"].items()} == {
        name: defaults[name] for name in stage_1["model"]
    }
    config = DallePriorConfig(**stage_2["model"])
    paper = DallePriorConfig.from_preset("12b")
    assert config.to_dict() == paper.to_dict()
    assert DallePriorConfig(**read("cc3m_prior_1.2b")["model"]).to_dict() == DallePriorConfig().to_dict()
    names = (
        "adam_beta1",
        "adam_beta2",
        "adam_weight_decay",
        "adam_max_second_moment",
        "max_grad_norm",
        "learning_rate",
    )
    assert [stage_2[name] for name in names] == [0.9, 0.96, 4.5e-2, 5.0, 4.0, 4.5e-4]
    assert (stage_2["ema_decay"], stage_2["ema_update_steps"], stage_2["lr_max_halvings"]) == (0.99, 25, 5)


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_comments_name_what_there_is(name):
    text = (CONFIGS / f"{name}.yaml").read_text().replace("\\\n#", "")
    for path in re.findall(r"training/[\w./]+\.(?:py|yaml)", text):
        assert (ROOT / path).is_file(), path
    for script, options in re.findall(r"training/(\w+)\.py((?:\s+(?:--)?[\w./'*{}-]+)*)", text):
        if script in ("download_images", "filter_captions", "precompute_image_tokens", "train_tokenizer"):
            source = (ROOT / "training" / f"{script}.py").read_text()
            for option in re.findall(r"--\w+", options):
                assert f'"{option}"' in source, f"{script}.py {option}"
