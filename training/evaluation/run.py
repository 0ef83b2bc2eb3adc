"""The order of an evaluation of pictures.

First everything is checked, then pictures are drawn, then measured in the order of the YAML file, and the report is
written again after each. What a measurement stands on lives in `frame.py`, what it computes in the module of its name.
"""

import importlib
from dataclasses import asdict
from types import ModuleType
from typing import Any

from evaluation_log import log_run
from report_parts import save_png
from settings_file import check_names, parse_settings

from evaluation import report
from evaluation.examples import draw_examples
from evaluation.frame import Evaluation
from evaluation.inspection import check_model_pictures, inspect_model, inspect_rows, sum_up
from evaluation.models import Model
from evaluation.processes import make_accelerator
from evaluation.settings import EvaluationArguments, read_settings
from hf_dalle.model_card import publish_settings


MEASUREMENTS = ("fidelity", "overlap", "elb", "reranking", "shapes", "safety")


def main(argv: list[str]) -> None:
    """Runs the evaluation that a YAML file describes, on all processes."""
    args = parse_settings(argv, EvaluationArguments, "evaluate.py")
    measurements = load_measurements(args.measure)
    evaluation = Evaluation(args, make_accelerator())
    run_evaluation(evaluation, measurements)


def load_measurements(measure: dict) -> dict[str, tuple[ModuleType, Any]]:
    """By name the module of each measurement and its settings; what is wrong with them is found first of all."""
    check_names(measure, MEASUREMENTS, "`measure`")
    loaded = {}
    for name, given in measure.items():
        module = importlib.import_module(f"evaluation.{name}")
        loaded[name] = (module, read_settings(module.Settings, given, f"`measure`, {name}"))
    return loaded


def run_evaluation(evaluation: Evaluation, measurements: dict[str, tuple[ModuleType, Any]]) -> None:
    """Checks, logs what touches a test split, draws, measures, in this order."""
    summary = report.describe_evaluation(evaluation)
    evaluation.on_main_first(lambda: evaluation.folder.mkdir(parents=True, exist_ok=True))
    _look_at_given(evaluation, summary)
    for module, settings in measurements.values():
        module.check(evaluation, settings)
    evaluation.from_main(lambda: _log(evaluation))  # what can be wrong is found before, nothing is drawn yet
    if not measurements or any(getattr(module, "USES_PICTURES", True) for module, _ in measurements.values()):
        _draw_all(evaluation, summary)
    sections: list[str] = []
    _write(evaluation, summary, sections)
    for name, (module, settings) in measurements.items():
        figures = module.measure(evaluation, settings)
        if evaluation.is_main:
            summary["measurements"][name] = {"settings": publish_settings(asdict(settings)), "figures": figures}
            summary["pictures"] |= module.plot(figures, evaluation.folder)
            summary["results"] += module.list_results(figures)
            sections.append(module.describe(figures))
        _write(evaluation, summary, sections)


def _log(evaluation: Evaluation) -> None:
    args, checkpoints = evaluation.args, (model.digest for model in evaluation.models.values())
    log_run(args.evaluation_log, args.splits, checkpoints, seed=args.seed, evaluation=args.name)


def _look_at_given(evaluation: Evaluation, summary: dict) -> None:
    """Inspects what is there before anything is drawn: the rows' own pictures, and folders."""
    rows = evaluation.rows
    names = [rows.ids[index] for index in rows.references]
    summary["data"]["pictures"] = sum_up(inspect_rows(evaluation), names, "the data's own pictures")
    for model in evaluation.models.values():
        if not model.is_drawn:
            _look_at(evaluation, summary, model)


def _look_at(evaluation: Evaluation, summary: dict, model: Model) -> None:
    names = [path.name for path in model.store.paths]
    seen = sum_up(inspect_model(evaluation, model), names, f"the pictures of {model.name}")
    check_model_pictures(seen, model.name, evaluation.warn)
    summary["models"][model.name]["pictures"] = seen


def _draw_all(evaluation: Evaluation, summary: dict) -> None:
    for model in evaluation.models.values():
        if model.is_drawn:
            evaluation.draw(model)
            _look_at(evaluation, summary, model)
    if evaluation.is_main:
        save_png(draw_examples(evaluation), evaluation.folder / "examples.png")
        summary["pictures"]["examples"] = "examples.png"
    sizes = {name: tuple(one["pictures"]["sizes"][0][:2]) for name, one in summary["models"].items()}
    if len(set(sizes.values())) > 1:
        shown = ", ".join(f"{name} {width} x {height}" for name, (width, height) in sizes.items())
        evaluation.warn(
            f"The models' pictures are of different sizes ({shown}): a blur of one radius is not the same to them."
        )


def _write(evaluation: Evaluation, summary: dict, sections: list[str]) -> None:
    summary["notes"] = list(evaluation.notes)
    if evaluation.is_main:
        report.write_report(evaluation.folder, summary, sections)
