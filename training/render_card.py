"""Renders a model's card from what was measured: `python training/render_card.py model_cards/emoji-mini`.

The folder holds report.json with its pictures (by `evaluate.py`) and facts.yaml, what no measurement gives; README.md
is written beside them, and with `--checkpoint` into the model's own folder too, with the pictures that it shows. What
a card says stands in `model_cards/template.md`, how it is filled in `hf_dalle.model_card`.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_dalle.model_card import render_model_card


TEMPLATE = Path(__file__).parents[1] / "model_cards" / "template.md"

# What a published card may not be without. Each is words, but the data sets, which are rows of these columns.
REQUIRED_FACTS = (
    *("license", "language", "tags", "model_id", "data_set", "summary", "draws_well", "draws_badly"),
    *("training", "data", "intended_use", "limits", "biases", "license_note", "data_sets"),
)
DATA_SET_COLUMNS = ("name", "url", "by", "use", "license", "license_url")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Folder with report.json, its pictures and facts.yaml.")
    parser.add_argument("--checkpoint", type=Path, help="Folder of the model: gets the card and its pictures too.")
    args = parser.parse_args(argv)
    if args.checkpoint is not None and not args.checkpoint.is_dir():
        raise OSError(f"--checkpoint {args.checkpoint} is not a folder.")
    card = render_folder(args.folder)
    pictures = list_pictures(card)
    for name in pictures:
        if not (args.folder / name).is_file():
            raise OSError(f"The card shows {name}, which is not in {args.folder}: run evaluate.py again.")
    for folder in filter(None, (args.folder, args.checkpoint)):
        card.save(folder / "README.md")
        print(f"Written to {folder / 'README.md'}.")
    if args.checkpoint is not None:
        for name in pictures:
            (args.checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.folder / name, args.checkpoint / name)


def render_folder(folder: Path) -> ModelCard:
    """
    The card of a folder of `model_cards/`.

    Raises:
        OSError: if report.json or facts.yaml is missing.
        ValueError: if one of them is damaged, or facts.yaml lacks something; all that it lacks is named.
    """
    facts = read_facts(folder / "facts.yaml")
    evaluations = [take_evaluation(folder, **given) for given in facts.pop("evaluations", None) or []]
    if evaluations and not (folder / "report.json").is_file():
        report = evaluations[0]["report"]
    else:
        report = read_report(folder / "report.json")
    report["evaluations"] = [{key: part for key, part in each.items() if key != "report"} for each in evaluations]
    return render_model_card(report, TEMPLATE, facts)


def take_evaluation(folder: Path, report: str, model: str, pictures: list[str] | None = None) -> dict:
    """
    What a card takes of the report of an `evaluation: pictures`.

    Args:
        folder (`Path`): of the card.
        report (`str`): path of the report.json from there.
        model (`str`): the model's name in it.
        pictures (`list[str]`, *optional*): keys of the report's pictures that the card shows.

    Returns:
        `dict`: name, date, data and `results` of this model, `pictures` by words, `figures` of each measurement, which
        the facts may quote, and `report`, what else the evaluation knows of the model: for a card that has no report
        of its own.
    """
    path = folder / report
    read = read_report(path)
    try:
        entry, data = read["models"][model], read["data"]
        shown = {key: (Path(report).parent / read["pictures"][key]).as_posix() for key in pictures or []}
        results = [result for result in read["results"] if result["model"] == model]
        figures = {name: measured["figures"] for name, measured in read["measurements"].items()}
        head = {name: read[name] for name in ("name", "evaluated", "seed")}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has no {error} of an `evaluation: pictures` of the model {model!r}.") from error
    about = {"name": model, "evaluated": head["evaluated"], "model": entry.get("parts", {})}
    return {
        **head,
        "data_set": {"id": data["data_set_id"], "name": data["data_set_name"] or head["name"]},
        "results": results,
        "pictures": shown,
        "figures": figures,
        "report": {**about, **({"training": entry["training"]} if "training" in entry else {})},
    }


def read_report(path: Path) -> dict:
    """What evaluate.py measured."""
    if not path.is_file():
        raise OSError(f"There is no {path}: make it with evaluate.py.")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(report, dict):
        raise ValueError(f"{path} must hold an object; got {type(report).__name__}.")
    return report


def read_facts(path: Path) -> dict:
    """What no measurement gives, whole."""
    if not path.is_file():
        raise OSError(f"There is no {path}: write it after model_cards/emoji-mini/facts.yaml.")
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold `key: value` lines; got {type(facts).__name__}.")
    _check_shapes(facts, path)
    missing = [f"`{name}`" for name in REQUIRED_FACTS if not facts.get(name)]
    for number, evaluation in enumerate(facts.get("evaluations") or [], start=1):
        missing += [f"`{name}` of evaluation {number}" for name in ("report", "model") if not evaluation.get(name)]
    missing += [f"`{name}` of `data_set`" for name in ("id", "name") if not (facts.get("data_set") or {}).get(name)]
    for number, row in enumerate(facts.get("data_sets") or [], start=1):
        absent = [name for name in DATA_SET_COLUMNS if not row.get(name)]
        missing += [f"`{name}` of data set {number} ({row.get('name', 'no name')})" for name in absent]
    experiments = facts.get("experiments") or {}
    num_columns = len(experiments.get("columns") or [])
    for number, row in enumerate(experiments.get("rows") or [], start=1):
        if len(row) != num_columns:
            missing.append(f"{num_columns} cells in row {number} of `experiments` (it has {len(row)})")
    if missing:
        raise ValueError(f"{path} is not complete. It lacks {', '.join(missing)}.")
    return facts


def _check_shapes(facts: dict, path: Path) -> None:
    """Raises a `ValueError` for a fact that is not of the kind that the card goes through."""
    experiments = facts.get("experiments") or {}
    kinds = [("`data_set`", facts.get("data_set"), dict), ("`tags`", facts.get("tags"), list)]
    kinds += [("`evaluations`", facts.get("evaluations"), list)]
    kinds += [("`data_sets`", facts.get("data_sets"), list), ("`experiments`", experiments, dict)]
    if isinstance(facts.get("data_sets"), list):
        kinds += [(f"row {i} of `data_sets`", row, dict) for i, row in enumerate(facts["data_sets"], start=1)]
    if isinstance(experiments, dict):
        columns, rows = (experiments.get(name) or [] for name in ("columns", "rows"))
        kinds += [("`columns` of `experiments`", columns, list), ("`rows` of `experiments`", rows, list)]
        if isinstance(rows, list):
            kinds += [(f"row {i} of `experiments`", row, list) for i, row in enumerate(rows, start=1)]
    if isinstance(facts.get("evaluations"), list):
        kinds += [(f"row {i} of `evaluations`", row, dict) for i, row in enumerate(facts["evaluations"], start=1)]
    for what, value, kind in kinds:
        if value is not None and not isinstance(value, kind):
            words = "`key: value` lines" if kind is dict else "a list"
            raise ValueError(f"{path}: {what} must be {words}; got {value!r}.")


def list_pictures(card: ModelCard) -> list[str]:
    """Files that the card shows, in its text or its widget, each once."""
    shown = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card.text)
    shown += [entry["output"]["url"] for entry in card.data.get("widget", []) if "output" in entry]
    return list(dict.fromkeys(shown))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"render_card.py: {error}")
