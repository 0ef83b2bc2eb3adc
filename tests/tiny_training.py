"""What the tests of training share: settings of runs that take seconds, and runs. Their data is `tiny_data`'s."""

import json
import subprocess
import sys
from pathlib import Path

import torch
import train
import yaml
from accelerate.state import AcceleratorState, GradientState
from tiny_data import COLOURS, draw_picture, encode_picture, list_rows, write_parquet  # noqa: F401, for tests

from hf_dalle import DalleDVAE, DalleImageProcessor, train_tokenizer


ROOT = Path(__file__).parent.parent
VALIDATION = {"validation_split": "validation", "validation_steps": 20}
ATTENTION = ["full", "row"]
MODEL = {
    "sample_size": 16,
    "vocab_size": 16,
    "patch_size": 4,
    "encoder_block_out_channels": [64],
    "decoder_block_out_channels": [64],
    "decoder_in_channels": 64,
    "layers_per_block": 1,
}


def write_data(folder: Path) -> Path:
    """The whole set for training, every fourth of it for validation."""
    write_parquet(folder / "train.parquet", list_rows())
    write_parquet(folder / "validation.parquet", list_rows()[::4])
    return folder


def write_tokenizer(folder: Path) -> Path:
    captions = [caption for row in list_rows() for caption in row["captions"]]
    train_tokenizer(captions, vocab_size=300, text_length=8).save_pretrained(folder)
    return folder


def dvae_settings(data: Path, output_dir: Path, **settings) -> dict:
    return {
        "stage": "dvae",
        "output_dir": str(output_dir),
        "train_data_dir": str(data),
        "model": MODEL,
        "train_batch_size": 16,
        "max_train_steps": 60,
        "learning_rate": 0.03,
        "encoder_lr_ratio": 0.01,
        "lr_min_ratio": 0.1,
        "ema_decay": 0.9,
        "temperature_anneal_steps": 40,
        "kl_weight": 0.1,
        "kl_weight_warmup_steps": 0,
        "min_log_b": -1.0,
        "logging_steps": 5,
        "report_to": "none",
        **settings,
    }


def prior_settings(data: Path, dvae: Path, tokenizer: Path, output_dir: Path, **settings) -> dict:
    return {
        "stage": "prior",
        "output_dir": str(output_dir),
        "train_data_dir": str(data),
        "dvae": str(dvae),
        "tokenizer": str(tokenizer),
        "model": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_types": ATTENTION},
        "bpe_dropout": 0.0,
        "train_batch_size": 8,
        "max_train_steps": 60,
        "learning_rate": 0.01,
        "ema_decay": 0.9,
        "logging_steps": 5,
        "report_to": "none",
        **settings,
    }


def write_settings(settings: dict) -> Path:
    path = Path(settings["output_dir"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))
    return path


def run(settings: dict, *options: str) -> list[dict]:
    """Trains in this process; gives the log."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one process, one Accelerator: here are several
    GradientState._reset_state()
    with torch.random.fork_rng(devices=[]):
        train.main([str(write_settings(settings)), *options])
    return read_log(settings["output_dir"])


def start(settings: dict, *options: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen:
    """Starts the script as a process of its own, with a group of its own."""
    command = [*launcher, str(ROOT / "training" / "train.py"), str(write_settings(settings)), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, start_new_session=True, **pipes)


def read_log(folder: str | Path) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(log: list[dict], name: str = "loss") -> dict[int, float]:
    """The logged losses by step."""
    return {row["step"]: row[name] for row in log if name in row}


def list_steps(folder):
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def build_home(folder: Path) -> Path:
    """Data, a tokenizer and a trained dVAE."""
    write_data(folder / "data")
    write_tokenizer(folder / "tokenizer")
    settings = dvae_settings(folder / "data", folder / "dvae", **VALIDATION, initial_kl_per_token=2.5)
    run({**settings, "weights_dtype": "float16", "report_to": "tensorboard", "resize_range": [1.0, 1.0]})
    return folder


def build_untrained_home(folder: Path) -> Path:
    """Data, a tokenizer and a dVAE that was never trained: what costs no time."""
    write_data(folder / "data")
    write_tokenizer(folder / "tokenizer")
    with torch.random.fork_rng(devices=[]):
        torch.random.set_rng_state(torch.Generator().manual_seed(0).get_state())
        DalleDVAE(**MODEL).save_pretrained(folder / "dvae")
    DalleImageProcessor(size=MODEL["sample_size"]).save_pretrained(folder / "dvae")
    return folder


def build_prior_settings(home: Path, output_dir: Path, **settings) -> dict:
    return prior_settings(home / "data", home / "dvae", home / "tokenizer", output_dir, **settings)
