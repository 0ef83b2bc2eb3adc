"""The card that a published model carries, rendered from measured figures.

Its words and their order are the template's (`model_cards/` of the repository), its figures `training/evaluate.py`'s.
The card of a pipeline that has none, and the way to the Hub, are `publishing.py`'s.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id, yaml_dump
from jinja2.sandbox import SandboxedEnvironment

from .publishing import CARD_TAGS


# Of a run's settings, those that say where it ran and not what it did.
UNPUBLISHED_SETTINGS = ("output_dir", "resume_from_checkpoint", "report_to", "evaluation_log", "push_to_hub")
LOCAL_START = "a checkpoint in a folder"  # an `init_from` that means nothing elsewhere


def render_model_card(
    report: dict, template: str | Path, facts: dict | None = None, model_id: str | None = None
) -> ModelCard:
    """
    Renders a model card whose figures all come from a report; what the report or the facts lack is left out.

    Args:
        report (`dict`):
            What `training/evaluate.py` writes as report.json, or only its `"name"` and `"training"` part; with
            `"evaluations"`, what `training/render_card.py` took of reports of any model's pictures.
        template (`str` or `Path`):
            File of a jinja template. It gets `report`, `facts`, `settings` (of each stage, without folders of the
            machine), `kind` ("pipeline", "dvae" or "lora"), `name`, `model_id`, `prompts` and `local_start`, which
            stands for an `init_from` that is such a folder.
        facts (`dict`, *optional*):
            What no measurement gives: licence, data sets, uses, limits. Its strings are templates of `report` too.
        model_id (`str`, *optional*):
            What the card's code loads: a folder or a repository on the Hub. By default the facts' own, or the name.

    Returns:
        `huggingface_hub.ModelCard`: metadata with a model-index of the measured figures, and text.

    Raises:
        OSError: if there is no such template.
        ValueError: if the template or the facts ask for what the report does not have.
    """
    text = Path(template).read_text(encoding="utf-8")
    try:
        facts = _fill(facts or {}, report)
        name = report.get("name") or "dalle"
        context = {
            "report": report,
            "facts": facts,
            "settings": {
                stage: publish_settings(run["settings"]) for stage, run in _list_runs(report) if "settings" in run
            },
            "kind": _find_kind(report),
            "name": name,
            "model_id": model_id or facts.get("model_id") or name,
            "prompts": _list_prompts(report),
            "local_start": LOCAL_START,
        }
        body = _compile(text).render(context)
        metadata = _make_card_data(context)
    except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The card cannot be rendered by {template}: {reason}. The report and the facts must have what it asks"
            " for."
        ) from error
    body = re.sub(r"\n{3,}", "\n\n", body.strip())  # missing parts leave empty lines
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{body}\n")


@lru_cache(maxsize=128)  # most of the time of a card goes into this
def _compile(text: str) -> jinja2.Template:
    # Of facts and templates that may be somebody else's, none gets at more than values.
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= _FILTERS
    return environment.from_string(text)


def _fill(value: Any, report: dict) -> Any:
    """The facts with every string rendered: words may quote the report's figures, and so need none of their own."""
    if isinstance(value, dict):
        return {key: _fill(part, report) for key, part in value.items()}
    if isinstance(value, list):
        return [_fill(part, report) for part in value]
    return _compile(value).render(report=report) if isinstance(value, str) else value


def _list_runs(report: dict) -> list[tuple[str, dict]]:
    return list((report.get("training") or {}).items())


def publish_settings(settings: dict) -> dict:
    """
    A run's settings for anybody's eyes, as reports and cards show them; doing it again changes nothing.

    Args:
        settings (`dict`): as the YAML file says them.

    Returns:
        `dict`: without token, without where the run wrote to and where it is published; of an absolute path the last
        part alone, or [`LOCAL_START`] where that would read like the name of a repository to start from.
    """
    shown = {}
    for key, value in settings.items():
        if key in UNPUBLISHED_SETTINGS or key.startswith("hub_"):
            continue
        for path in (PurePosixPath, PureWindowsPath):
            if isinstance(value, str) and (path(value).is_absolute() or value.startswith("~")):
                value = path(value).name if key != "init_from" else LOCAL_START
        shown[key] = value
    return shown


def _find_kind(report: dict) -> str:
    runs = dict(_list_runs(report))
    if (runs.get("prior", {}).get("settings") or {}).get("lora_rank"):
        return "lora"
    parts = {*runs, *(report.get("model") or {})}
    return "dvae" if "dvae" in parts and "prior" not in parts else "pipeline"


def _list_prompts(report: dict) -> list[str]:
    """The captions of the sample grid: the evaluation's, or those that were drawn at each validation."""
    if "samples" in report:
        return report["samples"]["prompts"]
    settings = dict(_list_runs(report)).get("prior", {}).get("settings") or {}
    return settings.get("validation_prompts") or []


def _make_card_data(context: dict) -> ModelCardData:
    report, facts, kind = context["report"], context["facts"], context["kind"]
    results = _list_results(report, facts)
    found = {run["settings"]["dataset_name"] for _, run in _list_runs(report) if _names_dataset(run)}
    pictures = (report.get("pictures") or {}).get("widget") or []
    widget = [{"text": prompt} for prompt in context["prompts"]]
    for entry, picture in zip(widget, pictures, strict=False):
        entry["output"] = {"url": picture}
    tags = [*CARD_TAGS, *(["lora"] if kind == "lora" else []), *facts.get("tags", [])]
    return ModelCardData(
        license=facts.get("license"),
        language=facts.get("language"),
        library_name="diffusers",
        pipeline_tag=None if kind == "dvae" else "text-to-image",
        tags=tags,
        base_model=facts.get("base_model") or _find_base_model(context["settings"]),
        datasets=facts.get("datasets") or sorted(found) or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        widget=widget if widget and kind != "dvae" else None,
        model_name=context["name"] if results else None,
        eval_results=results or None,
    )


def _find_base_model(settings: dict) -> str | None:
    """The repository that the prior started from."""
    start = settings.get("prior", {}).get("init_from")
    if start is None or start == LOCAL_START or Path(start).exists():
        return None
    try:
        validate_repo_id(start)
    except HFValidationError:
        return None
    return start


def _names_dataset(run: dict) -> bool:
    return bool((run.get("settings") or {}).get("dataset_name"))


def _list_results(report: dict, facts: dict) -> list[EvalResult]:
    """The model-index: what was measured on pictures that trained nothing."""
    data_set = facts.get("data_set") or {"id": "unpublished", "name": "the data that the card describes"}
    results = []

    def add(task: str, title: str, split: str, kind: str, name: str, value: float, data_set: dict = data_set):
        dataset = {"dataset_type": data_set["id"], "dataset_name": data_set["name"], "dataset_split": split}
        metric = {"metric_type": kind, "metric_name": name, "metric_value": round(value, 4)}
        results.append(EvalResult(task_type=task, task_name=title, **dataset, **metric))

    for split, measured in (report.get("splits") or {}).items():
        if not _is_held_out(split):
            continue
        for side, rows in (measured.get("sides") or {}).items():
            for key, kind, name in _DRAWN_FIGURES if "drawn" in rows else ():
                name = f"{name} of drawn pictures at {side} x {side}"
                add("text-to-image", "Pictures from captions", split, kind, name, rows["drawn"][key]["value"])
        if "image_loss" in measured:
            name = "image loss, nats a token"
            add("text-to-image", "Pictures from captions", split, "cross-entropy", name, measured["image_loss"])
    for split, measured in (report.get("dvae") or {}).items():
        if _is_held_out(split):
            task = ("image-to-image", "Reconstruction by the dVAE", split)
            add(*task, "psnr", "PSNR, dB", measured["psnr"]["value"])
            add(*task, "perplexity", "perplexity of the codes", measured["perplexity"])
    for evaluation in report.get("evaluations") or []:
        for result in evaluation["results"]:
            title = result.get("task_name", "Pictures from captions")
            metric = (result["split"], result["metric_type"], result["metric_name"], result["value"])
            add(result["task"], title, *metric, evaluation["data_set"])
    return results


def _is_held_out(split: str) -> bool:
    return split == "validation" or split.startswith("test")


_DRAWN_FIGURES = [
    ("recall@1", "recall", "recall@1"),
    ("recall@5", "recall", "recall@5"),
    ("style", "accuracy", "style accuracy"),
]


def _format_interval(figure: dict, digits: int) -> str:
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _format_share_interval(figure: dict) -> str:
    value, low, high = (f"{100 * figure[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} % [{low}, {high}]"


def _format_count(number: float | str) -> str:
    if isinstance(number, str) or number < 1e6:
        return number if isinstance(number, str) else f"{number:,}"
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def _format_duration(hours: float) -> str:
    minutes = max(1, round(60 * hours))
    return f"{hours:.1f} hours" if hours >= 1.5 else f"{minutes} minute{'s' if minutes > 1 else ''}"


def _format_tally(names: Iterable[str]) -> str:
    return ", ".join(f"{number} x {name}" for name, number in Counter(names).items())


_FILTERS: dict[str, Callable[..., str]] = {
    "number": lambda number: f"{number:,}",
    "figure": lambda value, digits: f"{value:,.{digits}f}",
    "interval": _format_interval,
    "share": lambda value: f"{100 * value:.1f} %",
    "share_interval": _format_share_interval,
    "count": _format_count,
    "megabytes": lambda size: f"{size / 1e6:.1f} MB",
    "duration": _format_duration,
    "nats": lambda num_states: f"{math.log(num_states):.2f}",
    "tally": _format_tally,
    "cell": lambda value: str(value).replace("|", "\\|").replace("\n", " ").strip(),
    "json": lambda value: json.dumps(value, ensure_ascii=False),
    "yaml": lambda value: yaml_dump(value, sort_keys=False).strip(),
}
