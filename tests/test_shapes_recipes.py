"""The recipes of the shapes model, by the commands in their comments, on few rows for few updates, to a report."""

import evaluate
import precompute_image_tokens
import prepare_shapes
import pytest
import train_tokenizer
import yaml
from test_prepare_shapes import NUM_ROWS
from tiny_evaluation import read_report, write_config
from tiny_training import ROOT, losses, run
from transformers import AutoTokenizer

from hf_dalle import DALLEPipeline
from hf_dalle.data import load_rows


CONFIGS = ROOT / "training" / "configs"
FEW = {
    "max_train_steps": 2,
    "train_batch_size": 4,
    "checkpointing_steps": 2,
    "validation_steps": 2,
    "logging_steps": 1,
}


def read(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def train(name, home, **changes):
    settings = {**read(name), **FEW, "output_dir": str(home / name), "mixed_precision": "no", "report_to": "none"}
    log = run({**settings, **changes})
    assert sorted(losses(log)) == [1, 2]
    return log


@pytest.mark.slow
def test_from_nothing_to_the_report(tmp_path):
    data, tokens, tokenizer = tmp_path / "data", tmp_path / "tokens", tmp_path / "tokenizer"
    prepare_shapes.prepare(data, {**NUM_ROWS, "train": 400}, size=read("shapes_dvae")["model"]["sample_size"])
    log = train("shapes_dvae", tmp_path, train_data_dir=str(data))
    assert "validation_psnr" in log[-1]
    folders = ["--dvae", str(tmp_path / "shapes_dvae"), "--train_data_dir", str(data), "--output_dir", str(tokens)]
    precompute_image_tokens.main([*folders, "--splits", "train", "validation"])
    text = (CONFIGS / "shapes_prior.yaml").read_text()
    sizes = text.partition("--vocab_size ")[2].split()[:3]  # of the command in its comment
    train_tokenizer.main(
        ["--train_data", str(data / "train.parquet"), "--output_dir", str(tokenizer), "--vocab_size", *sizes]
    )
    places = {"train_data_dir": str(tokens), "dvae": str(tmp_path / "shapes_dvae"), "tokenizer": str(tokenizer)}
    few = {"validation_prompts": read("shapes_prior")["validation_prompts"][:1], "num_validation_images": 1}
    train("shapes_prior", tmp_path, **places, **few)
    train("shapes_prior_end", tmp_path, train_data_dir=str(tokens), init_from=str(tmp_path / "shapes_prior"), **few)
    checkpoint = tmp_path / "shapes_prior_end"
    parts = ("prior", "dvae", "tokenizer", "image_processor")
    assert sum(path.stat().st_size for part in parts for path in (checkpoint / part).rglob("*")) < 7.7e6
    assert DALLEPipeline.from_pretrained(checkpoint).prior.generation_config.guidance_scale == 1.25

    settings = {**read("eval_shapes"), "output_dir": str(tmp_path / "evaluation"), "data_dir": str(data)}
    settings["evaluation_log"] = str(tmp_path / "evaluations.jsonl")
    settings |= {"num_captions": 2, "batch_size": 2}
    (model,) = settings["models"]
    names = {"dvae": "shapes_dvae", "prior": "shapes_prior_end"}
    model["training"] = {
        stage: {"config": str(CONFIGS / f"{name}.yaml"), "run": str(tmp_path / name)} for stage, name in names.items()
    }
    model["pipeline"] = str(checkpoint)
    evaluate.main([str(write_config(settings))])
    figures = read_report(tmp_path / "evaluation")["measurements"]["shapes"]["figures"]
    assert all(split["all"]["right"]["value"] == 1 for split in figures["real"].values())


def test_captions_fit_the_text_positions(tmp_path):
    prepare_shapes.prepare(tmp_path, {**NUM_ROWS, "train": 400}, size=32)
    text_length = int((CONFIGS / "shapes_prior.yaml").read_text().partition("--text_length ")[2].split()[0])
    captions = [
        text
        for split in prepare_shapes.SPLITS
        for row in load_rows(str(tmp_path), split=split)
        for text in row["captions"]
    ]
    command = ["--train_data", str(tmp_path / "train.parquet"), "--vocab_size", "384"]
    train_tokenizer.main([*command, "--text_length", str(text_length), "--output_dir", str(tmp_path / "tokenizer")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert max(map(len, tokenizer(captions, truncation=False)["input_ids"])) <= text_length
