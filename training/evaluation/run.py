"""The order of an evaluation of pictures, and what its measurements stand on: rows, models, processes, stored work.

First everything is checked, then pictures are drawn, then measured in the order of the YAML file, and the report is
written again after each. What a measurement computes lives in the module of its name.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from arguments import check_names, parse_arguments
from diffusers import DiffusionPipeline
from evaluation_log import log_run
from report import save_png
from tqdm.auto import tqdm

import hf_dalle  # noqa: F401, diffusers then knows DALLEPipeline
from evaluation import pictures, report, stored
from evaluation.examples import draw_examples
from evaluation.inspection import SHARD_SIZE, check_model_pictures, inspect_rows, inspect_store, sum_up
from evaluation.models import Model, load_pipeline
from evaluation.settings import EvaluationArguments, read_settings
from hf_dalle.model_card import publish_settings


logger = logging.getLogger(__name__)

MEASUREMENTS = ("fidelity", "overlap", "elb", "reranking", "shapes", "safety")


class Evaluation:
    """
    What a measurement gets: rows, models, this process among all, and work that is stored as it is done.

    Attributes:
        args ([`EvaluationArguments`]), rows ([`Rows`]), models (`dict[str, Model]`), seed (`int`), device.
        folder, work_dir (`Path`): `output_dir`, where plots and pages go, and its folder of stored work.
        is_main (`bool`), num_processes, process_index (`int`).
        notes (`list[str]`): warnings, which the report repeats.
    """

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator):
        self.args, self.accelerator, self.seed = args, accelerator, args.seed
        self.is_main, self.device = accelerator.is_main_process, accelerator.device
        self.num_processes, self.process_index = accelerator.num_processes, accelerator.process_index
        self.folder = Path(args.output_dir)
        self.work_dir, self.notes = self.folder / "work", []
        self._loaded: tuple[str, DiffusionPipeline] | None = None
        self.rows = self.on_main_first(lambda: pictures.choose_rows(args))
        self.rows.fingerprint = self.from_main(lambda: pictures.fingerprint_rows(self.rows, self.progress))
        self.models = {given.name: Model(self, given) for given in args.list_models()}

    # ---------------------------------------------------------------------------------------------------- processes

    def share(self, items: Sequence) -> Sequence:
        """This process's part of items that all processes hold alike."""
        return items[self.process_index :: self.num_processes]

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def from_main(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on the main process (anything that pickles), on all; so are its errors."""
        value = error = None
        if self.is_main:
            try:
                value = function()
            except (ValueError, OSError) as caught:
                error = caught
        value, error = broadcast_object_list([value, error])
        if error is not None:
            raise error
        return value

    def on_main_first(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on each process; the main one calls it before the others, who find what it made."""
        values = []
        self.from_main(lambda: values.append(function()))
        return values[0] if self.is_main else function()

    def progress(self, items: Iterable, words: str, total: int | None = None, unit: str = "batch") -> tqdm:
        """The items under a progress bar, which the main process shows."""
        return tqdm(items, desc=words, total=total, unit=unit, disable=not self.is_main)

    def warn(self, words: str) -> None:
        """Says something on the screen and in the report, once."""
        if words not in self.notes:
            self.notes.append(words)
            if self.is_main:
                logger.warning(words)

    # --------------------------------------------------------------------------------------------------- stored work

    def compute(
        self,
        name: str,
        key: dict,
        rows: Sequence[int],
        function: Callable[[list[int]], dict[str, np.ndarray]],
        shard_size: int,
        words: str,
    ) -> dict[str, np.ndarray]:
        """
        Arrays with an entry for each row, computed a shard at a time by all processes, each shard once for ever.

        A run that goes on after a kill computes the shards that are missing. Shards hang on `rows` and `shard_size`
        alone, so the arrays are the same for any number of processes. All processes must call it alike.

        Args:
            name (`str`): of the kind of work, as "fidelity-features".
            key (`dict`): all that the arrays follow from but the rows, JSON: `model.key`, the network, the radius.
            rows (`Sequence[int]`): of `evaluation.rows`, or any numbers.
            function (`Callable`): of a shard's rows to arrays whose first axis is theirs.
            shard_size (`int`): rows a shard.
            words (`str`): of the progress bar.

        Returns:
            `dict[str, np.ndarray]`: in the order of `rows`, on all processes.
        """
        key = {"rows": self.rows.fingerprint, **key}
        work = stored.Shards(self.work_dir / name, key, rows, shard_size)
        missing = self.from_main(work.list_missing)
        for number in self.progress(self.share(missing), words, unit="shard"):
            work.write(number, function(work.rows_of(number)))
        self.wait()
        return work.read()

    def load_pipeline(self, model: Model) -> DiffusionPipeline:
        """A model's pipeline; another one's memory is given free first."""
        if self._loaded is None or self._loaded[0] != model.name:
            self._loaded = None
            self._loaded = (model.name, load_pipeline(model.folder, model.given.dtype, self.device))
        return self._loaded[1]

    def draw(self, model: Model) -> None:
        """Draws what is missing of a pipeline's pictures; all processes must call it."""
        batches = self.from_main(lambda: pictures.list_batches(model.store, self.args.batch_size))
        own = self.progress(self.share(batches), f"{model.name}: drawing")
        for _ in pictures.draw_missing(model.store, own, model.pipeline, model.generation, self.seed):
            pass
        self.wait()


def main(argv: list[str]) -> None:
    """Runs the evaluation that a YAML file describes, on all processes."""
    args = parse_arguments(argv, EvaluationArguments, "evaluate.py")
    measurements = load_measurements(args.measure)
    evaluation = Evaluation(args, make_accelerator())
    run_evaluation(evaluation, measurements)


def make_accelerator() -> Accelerator:
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or processes that torchrun starts would not join
        # The others wait while one draws its last batch, or the main process does the sums.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )


def load_measurements(measure: dict) -> dict[str, tuple[ModuleType, Any]]:
    """By name the module of each measurement and its settings; what is wrong with them is found first of all."""
    check_names(measure, MEASUREMENTS, "`measure`")
    loaded = {}
    for name, given in measure.items():
        module = importlib.import_module(f"evaluation.{name}")
        loaded[name] = (module, read_settings(module.Settings, given, f"`measure`, {name}"))
    return loaded


def run_evaluation(evaluation: Evaluation, measurements: dict[str, tuple[ModuleType, Any]]) -> dict:
    """
    Checks, logs what touches a test split, draws, measures, in this order.

    Returns:
        `dict`: the report, as report.json holds it, on the main process.
    """
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
    return summary


def _log(evaluation: Evaluation) -> None:
    args, checkpoints = evaluation.args, (model.digest for model in evaluation.models.values())
    log_run(args.evaluation_log, args.splits, checkpoints, seed=args.seed, evaluation=args.name)


def _look_at_given(evaluation: Evaluation, summary: dict) -> None:
    """Inspects what is there before anything is drawn: the rows' own pictures, and folders."""
    rows = evaluation.rows
    found = evaluation.compute(
        "inspection", {"of": "rows"}, rows.references, inspect_rows(rows), SHARD_SIZE, "real pictures: reading"
    )
    names = [rows.ids[index] for index in rows.references]
    summary["data"]["pictures"] = sum_up(found, names, "the data's own pictures")
    for model in evaluation.models.values():
        if not model.is_drawn:
            _look_at(evaluation, summary, model)


def _look_at(evaluation: Evaluation, summary: dict, model: Model) -> None:
    found = evaluation.compute(
        *("inspection", {"of": model.key}, range(len(model.store)), inspect_store(model)),
        *(SHARD_SIZE, f"{model.name}: reading"),
    )
    seen = sum_up(found, [path.name for path in model.store.paths], f"the pictures of {model.name}")
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
