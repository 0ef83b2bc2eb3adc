"""Writes what an evaluation measured: report.json, report.md, and each model's model-index for a card.

The sections are the measurements' own; what is here says of which data, models and settings they are.
"""

import datetime
import json
import math
import platform
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump
from report_parts import make_table

import hf_dalle
from evaluation.frame import Evaluation
from evaluation.inspection import describe_sizes
from evaluation.pictures import write_whole


# What the paper says of its own model on these data (section 3 and Fig. 9; zero-shot, 512 candidates reranked).
PAPER = {
    "none": "",
    "coco": """\
The paper (Zero-Shot Text-to-Image Generation, 2021; zero-shot, the best of 512 candidates by a contrastive model) on
30,000 captions of MS-COCO: FID within 2 of the best of AttnGAN, DM-GAN and DF-GAN without blur, best by about 6 at
radius 1; best IS from radius 2. 21 % of the validation pictures overlap the training pictures. Against DF-GAN, by
best-of-five votes on 1,000 captions: more realistic 90.0 %, better match of the caption 93.3 %.""",
    "cub": """\
The paper (Zero-Shot Text-to-Image Generation, 2021; zero-shot, the best of 512 candidates by a contrastive model) on
CUB: about 40 points of FID behind the best of AttnGAN, DM-GAN and DF-GAN. 12 % of the pictures overlap the training
pictures.""",
}
CAPTIONS = {
    "first": "the first caption of each picture",
    "random": "one caption of each picture, drawn at random by the seed",
    "all": "every caption that is unique",
}
DATA_KEYS = ("data_dir", "dataset_name", "data_set_id", "data_set_name", "captions", "num_captions")


def describe_evaluation(evaluation: Evaluation) -> dict:
    """The report before anything is measured."""
    args, rows = evaluation.args, evaluation.rows
    data = {name: getattr(args, name) for name in DATA_KEYS}
    if args.data_dir is not None and Path(args.data_dir).is_absolute():
        data["data_dir"] = Path(args.data_dir).name
    splits = {
        split: {
            "num_captions": len(rows.of_split(split)),
            "num_pictures": sum(rows.splits[row] == split for row in rows.references),
        }
        for split in args.splits
    }
    return {
        "name": args.name,
        "evaluation": args.evaluation,
        "evaluated": datetime.date.today().isoformat(),
        "seed": args.seed,
        "batch_size": args.batch_size,
        "versions": {
            "hf_dalle": hf_dalle.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "paper": args.paper,
        "data": {**data, "splits": splits, "fingerprint": rows.fingerprint},
        "models": {name: model.describe() for name, model in evaluation.models.items()},
        "measurements": {},
        "results": [],
        "pictures": {},
        "notes": [],
    }


def write_report(folder: Path, report: dict, sections: list[str]) -> None:
    """
    Writes report.json, report.md and model-index-MODEL.yaml, each whole or not at all.

    Args:
        folder (`Path`): where to.
        report (`dict`): of [`describe_evaluation`], with what was measured.
        sections (`list[str]`): of the measurements so far, in Markdown.
    """
    write_whole(folder / "report.json", json.dumps(make_plain(report), indent=1, allow_nan=False) + "\n")
    write_whole(folder / "report.md", "\n\n".join([describe_head(report), *sections]).strip() + "\n")
    for name in report["models"]:
        results = list_eval_results(report, name)
        if results:
            index = {"model-index": eval_results_to_model_index(name, results)}
            write_whole(folder / f"model-index-{name}.yaml", yaml_dump(index, sort_keys=False))


def make_plain(value: Any) -> Any:
    """Figures as JSON takes them: numpy's as numbers, what is no number as null."""
    if isinstance(value, dict):
        return {str(key): make_plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [make_plain(part) for part in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_eval_results(report: dict, model: str) -> list[EvalResult]:
    """A model's figures as a card's model-index takes them."""
    data = report["data"]
    return [
        EvalResult(
            task_type=result["task"],
            task_name=result.get("task_name", "Pictures from captions"),
            dataset_type=data["data_set_id"],
            dataset_name=data["data_set_name"] or report["name"],
            dataset_split=result["split"],
            metric_type=result["metric_type"],
            metric_name=result["metric_name"],
            metric_value=round(result["value"], 4),
        )
        for result in report["results"]
        if result["model"] == model and math.isfinite(result["value"])
    ]


def is_held_out(split: str) -> bool:
    """Whether the captions of a split trained nothing, by its name."""
    return split == "validation" or split.startswith("test")


def describe_head(report: dict) -> str:
    """What was compared on what."""
    data = report["data"]
    source = data["data_set_name"] or data["dataset_name"] or data["data_dir"]
    counts = [
        f"{split['num_captions']:,} captions of {split['num_pictures']:,} pictures of `{name}`"
        for name, split in data["splits"].items()
    ]
    chosen = "" if data["num_captions"] is None else f", so many of each split chosen by seed {report['seed']}"
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    parts = [
        f"# {report['name']}, measured on {report['evaluated']}",
        PAPER[report["paper"]],
        f"Data: {source}: {', '.join(counts)}; {CAPTIONS[data['captions']]}{chosen}."
        f"{_describe_drawing(report)} Versions: {versions}.",
        "## Models\n"
        + make_table(["", "what it is", "drawn with"], [_describe_model(*item) for item in report["models"].items()]),
        _describe_pictures(report),
        "![Rows spread evenly: the real picture and each model's](examples.png)"
        if "examples" in report["pictures"]
        else "",
        "\n".join(["## To keep in mind", *(f"- {note}" for note in report["notes"])]) if report["notes"] else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _describe_drawing(report: dict) -> str:
    if not any("generation" in model and "pictures" in model for model in report["models"].values()):
        return ""
    return (
        f" One picture is drawn a caption, from seed {report['seed']} and the row's id, in batches of"
        f" {report['batch_size']}."
    )


def _describe_model(name: str, model: dict) -> list[str]:
    words = f"{model['kind']} `{model['source']}`, files `{model['fingerprint'][:12]}`"
    if "generation" not in model:
        return [name, words, "as they were given"]
    settings = {**model.get("parts", {}).get("generation", {}), **model["generation"]}
    shown = ", ".join(f"{key} {value}" for key, value in settings.items()) or "the pipeline's defaults"
    return [name, words, f"{shown}; {model['dtype']}"]


def _describe_pictures(report: dict) -> str:
    named = {"real pictures": report["data"], **report["models"]}
    rows = [
        [
            *(name, f"{one['pictures']['num_pictures']:,}", describe_sizes(one["pictures"])),
            *(one["pictures"][f"num_{what}"] for what in ("transparent", "grey", "flat", "repeated")),
        ]
        for name, one in named.items()
        if "pictures" in one
    ]
    head = ["", "pictures", "size", "transparent", "grey", "of one colour", "repeat another"]
    return "## Pictures\n" + make_table(head, rows) if rows else ""
