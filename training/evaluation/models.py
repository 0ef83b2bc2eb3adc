"""The models that an evaluation compares: any text-to-image pipeline of diffusers, or a folder of pictures.

What their pictures follow from is known by digests of their files, so that stored work is never another model's.
"""

import hashlib
import inspect
import json
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from describe_run import describe_model, describe_stage
from diffusers import DiffusionPipeline
from evaluation_log import digest_checkpoint
from settings_file import check_names

import hf_dalle  # noqa: F401, diffusers then knows DALLEPipeline
from evaluation import pictures
from evaluation.processes import Processes
from evaluation.settings import EvaluationArguments, ModelArguments


NEEDED = ("prompt", "generator", "output_type")  # arguments of a pipeline that draws from captions


class Model:
    """
    One model of the comparison.

    Args:
        given ([`ModelArguments`]), args ([`EvaluationArguments`]): the model's settings, and those of all.
        rows ([`Rows`]): with their fingerprint.
        processes ([`Processes`]): all of which make it.

    Attributes:
        name (`str`), store ([`PictureStore`]): its picture of each row, there once all are drawn.
        is_drawn (`bool`): whether a pipeline draws the pictures; else they were there.
        class_name (`str`, *optional*), is_dalle (`bool`): the pipeline's class, and whether it is a [`DALLEPipeline`].
        folder (`Path`): of the pipeline's files, or of the pictures.
        generation (`dict`): arguments of its drawing.
        fingerprint (`str`): of the pipeline's files or the folder's pictures.
        key (`dict`): what its pictures follow from, for `Evaluation.compute`.
        notes (`list[str]`): what may mislead in a folder.

    Raises:
        OSError: if there is no such pipeline or folder.
        ValueError: if the pipeline does not draw from captions, or a row has no picture.
    """

    def __init__(self, given: ModelArguments, args: EvaluationArguments, rows: pictures.Rows, processes: Processes):
        self.given, self.name, self.notes = given, given.name, []
        self.generation, self.is_drawn = given.generation, given.pipeline is not None
        self.class_name = None
        if self.is_drawn:
            self._take_pipeline(args, rows, processes)
        else:
            self._take_folder(rows, processes)

    def _take_pipeline(self, args: EvaluationArguments, rows: pictures.Rows, processes: Processes) -> None:
        self.folder = processes.on_main_first(lambda: find_pipeline(self.given.pipeline))
        self.class_name = check_pipeline(self.folder, self.generation)
        self.fingerprint = processes.from_main(lambda: hash_files(list_parts(self.folder)))
        self.key = {
            "pipeline": self.fingerprint,
            "generation": self.generation,
            "dtype": self.given.dtype,
            "seed": args.seed,
            "batch_size": args.batch_size,
            "rows": rows.fingerprint,
        }
        folder = Path(args.output_dir) / "pictures" / self.name
        self.store = processes.on_main_first(lambda: pictures.open_drawn(folder, rows, self.key))

    def _take_folder(self, rows: pictures.Rows, processes: Processes) -> None:
        self.folder = Path(self.given.images)
        self.store, self.notes = pictures.pair_folder(self.folder, rows)
        missing = self.store.missing()
        if missing:
            raise OSError(f"{self.folder} names {self.store.paths[missing[0]].name}, which is not there.")
        self.fingerprint = processes.from_main(lambda: hash_files(self.store.paths))
        self.key = {"images": self.fingerprint, "rows": rows.fingerprint}

    @property
    def is_dalle(self) -> bool:
        return self.class_name == "DALLEPipeline"

    @property
    def digest(self) -> str:
        """By which the log of evaluations knows it: of a DALL-E's weights, else of all that it is made of."""
        return digest_checkpoint(self.folder) if self.is_dalle else self.fingerprint[:12]

    def describe(self) -> dict:
        """What the report says of it."""
        source = self.given.pipeline or self.given.images
        source = Path(source).name if Path(source).is_absolute() else source
        described = {"kind": self.class_name or "pictures", "source": source, "fingerprint": self.fingerprint}
        if self.is_drawn:
            described |= {"generation": self.generation, "dtype": self.given.dtype, "seed": self.key["seed"]}
        if self.is_dalle:
            described["parts"] = describe_model(self.folder)
        stages = self.given.list_stages()
        if stages:
            described["training"] = {
                name: describe_stage(
                    *(name, Path(stage.config), Path(stage.run) if stage.run else None),
                    *(f"`training` of {self.name}, {name}", stage.num_processes),
                )
                for name, stage in stages.items()
            }
        return described


def find_pipeline(name: str) -> Path:
    """The folder of a pipeline that is one, or that the Hub has, downloaded."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(DiffusionPipeline.download(name))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise OSError(f"`pipeline` {name} is no folder, and the Hub does not give it: {reason}") from error
    if not (folder / "model_index.json").is_file():
        raise OSError(f"{folder} is no pipeline's folder: it has no model_index.json.")
    return folder


def check_pipeline(folder: Path, generation: dict) -> str:
    """The name of a pipeline's class; a `ValueError` where it does not draw from captions with these arguments."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
        raise ValueError(f"{folder} is a pipeline of class {name!r}, which diffusers {diffusers.__version__} has not.")
    known = list(inspect.signature(kind.__call__).parameters)
    lacking = [argument for argument in NEEDED if argument not in known]
    if lacking:
        raise ValueError(f"{name} takes no `{lacking[0]}`: it does not draw pictures from captions.")
    check_names(generation, known[1:], f"`generation` of the {name} in {folder}")
    return name


def load_pipeline(folder: Path, dtype: str, device: torch.device) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def list_parts(folder: Path) -> list[Path]:
    """The files that a pipeline is made of: not its card, nor the card's pictures."""
    index = folder / "model_index.json"
    parts = [name for name, value in json.loads(index.read_text(encoding="utf-8")).items() if isinstance(value, list)]
    return [index, *(path for name in sorted(parts) for path in sorted((folder / name).rglob("*")) if path.is_file())]


def hash_files(paths: Iterable[Path]) -> str:
    """A digest of the files' names and contents."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()[:32]
