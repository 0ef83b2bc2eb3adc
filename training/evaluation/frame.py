"""What the measurements of an evaluation stand on: rows, models, processes, stored work.

In which order an evaluation goes is `run.py`'s; what a measurement computes lives in the module of its name.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from evaluation import pictures, stored
from evaluation.models import Model, load_pipeline
from evaluation.processes import Processes
from evaluation.settings import EvaluationArguments


logger = logging.getLogger(__name__)


class Evaluation(Processes):
    """
    What a measurement gets: rows, models, this process among all, and work that is stored as it is done.

    Attributes:
        args ([`EvaluationArguments`]), rows ([`Rows`]), models (`dict[str, Model]`), seed (`int`).
        folder, work_dir (`Path`): `output_dir`, where plots and pages go, and its folder of stored work.
        notes (`list[str]`): warnings, which the report repeats.
    """

    def __init__(self, args: EvaluationArguments, accelerator: Accelerator):
        super().__init__(accelerator)
        self.args, self.seed = args, args.seed
        self.folder = Path(args.output_dir)
        self.work_dir, self.notes = self.folder / "work", []
        self._loaded: tuple[str, DiffusionPipeline] | None = None
        self.rows = self.on_main_first(lambda: pictures.choose_rows(args))
        self.rows.fingerprint = self.from_main(lambda: pictures.fingerprint_rows(self.rows, self.progress))
        self.models = {given.name: Model(given, args, self.rows, self) for given in args.list_models()}
        for model in self.models.values():
            for note in model.notes:
                self.warn(f"{model.name}: {note}")

    def warn(self, words: str) -> None:
        """Says something on the screen and in the report, once."""
        if words not in self.notes:
            self.notes.append(words)
            if self.is_main:
                logger.warning(words)

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
        """A model's pipeline, silent, on this process's device; another one's memory is given free first."""
        if self._loaded is None or self._loaded[0] != model.name:
            self._loaded = None
            self._loaded = (model.name, load_pipeline(model.folder, model.given.dtype, self.device))
        return self._loaded[1]

    def draw(self, model: Model) -> None:
        """Draws what is missing of a pipeline's pictures; all processes must call it."""
        batches = self.from_main(lambda: pictures.list_batches(model.store, self.args.batch_size))
        own = self.progress(self.share(batches), f"{model.name}: drawing")
        pictures.draw_batches(model.store, own, lambda: self.load_pipeline(model), model.generation, self.seed)
        self.wait()
