"""What the tests of `evaluation: pictures` share: data, a tiny checkpoint, settings, an evaluation to measure.

Their rows are `tiny_data`'s, with the columns that the judge reads.
"""

import json
from pathlib import Path

import yaml
from accelerate import Accelerator
from evaluation.frame import Evaluation
from evaluation.settings import EvaluationArguments
from tiny import build_pipeline
from tiny_data import list_rows, write_parquet


def write_rows(folder: Path, splits: tuple[str, ...] = ("train", "validation")) -> Path:
    """20 rows a split: a picture of two colours, two captions, and which and how."""
    for split in splits:
        rows = [
            {**row, "hexcode": row["captions"][0], "style": "plain", "number": number}
            for number, row in enumerate(list_rows())
        ]
        write_parquet(folder / f"{split}.parquet", rows)
    return folder


def build_home(folder: Path, **components) -> Path:
    """`data` and `checkpoint`, a tiny pipeline of random weights, in a folder."""
    write_rows(folder / "data")
    build_pipeline(**components).save_pretrained(folder / "checkpoint")
    return folder


def make_settings(home: Path, output_dir: Path, **settings) -> dict:
    """Of an evaluation of six rows of `home` by its checkpoint."""
    return {
        "evaluation": "pictures",
        "name": "tiny",
        "output_dir": str(output_dir),
        "data_dir": str(home / "data"),
        "evaluation_log": str(Path(output_dir).with_suffix(".jsonl")),
        "num_captions": 6,
        "batch_size": 2,
        "models": [{"name": "ours", "pipeline": str(home / "checkpoint")}],
        **settings,
    }


def make_evaluation(home: Path, output_dir: Path, **settings) -> Evaluation:
    """In this process, with nothing drawn yet: `evaluation.draw(model)` draws."""
    return Evaluation(EvaluationArguments(**make_settings(home, output_dir, **settings)), Accelerator(cpu=True))


def write_config(settings: dict) -> Path:
    """A YAML file beside the output folder."""
    path = Path(settings["output_dir"]).with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def read_report(output_dir: Path) -> dict:
    return json.loads((Path(output_dir) / "report.json").read_text())
