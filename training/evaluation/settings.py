"""The settings of an evaluation of pictures: what is compared, on which rows, and how each measurement is asked for.

The settings of a measurement are a dataclass of its own module; here they are only read.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from arguments import STAGES
from evaluation_log import check_log
from settings_file import build_settings, check_names


@dataclass
class ModelArguments:
    """One model of the comparison: a pipeline that draws, or a folder of pictures that are there."""

    name: str = ""
    pipeline: str | None = None
    images: str | None = None
    generation: dict = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    training: dict = field(default_factory=dict)  # by stage a StageArguments: for the model's card

    def __post_init__(self):
        if not re.fullmatch(r"[\w][\w .+@()=-]*", self.name) or self.name != self.name.strip():
            raise ValueError(
                f"`name` of a model is {self.name!r}; it names a folder and a row of tables: expected letters, digits,"
                " spaces and .+@()=-_, a letter or digit first."
            )
        if (self.pipeline is None) == (self.images is None):
            raise ValueError(f"Model {self.name!r}: give exactly one of `pipeline` and `images`.")
        if self.images is not None and (self.generation or self.dtype != "float32"):
            raise ValueError(f"Model {self.name!r}: `generation` and `dtype` do nothing to pictures that are there.")
        self.list_stages()
        reserved = {"prompt", "generator", "output_type", "num_images_per_prompt", "return_dict"} & {*self.generation}
        if reserved:
            raise ValueError(
                f"Model {self.name!r}: `generation` may not hold {sorted(reserved)}, which evaluate.py sets."
            )

    def list_stages(self) -> "dict[str, StageArguments]":
        """`training`, typed."""
        check_names(self.training, STAGES, f"`training` of {self.name}")
        where = f"`training` of {self.name}, "
        return {stage: read_settings(StageArguments, given, where + stage) for stage, given in self.training.items()}


@dataclass
class StageArguments:
    """Where a stage of a model's training is told of: its YAML file, and what it left behind."""

    config: str = ""
    run: str | None = None
    num_processes: int = 1

    def __post_init__(self):
        if not self.config or self.num_processes < 1:
            raise ValueError("Expected `config`, the YAML file of the training, and `num_processes` from 1.")


@dataclass
class EvaluationArguments:
    """The settings of `evaluation: pictures`."""

    evaluation: Literal["pictures"] = "pictures"
    name: str = field(default="", metadata={"help": "Of the evaluation, in the report."})
    output_dir: str = field(
        default="", metadata={"help": "Pictures, caches and the report go here; all processes must see it."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the rows, as training reads them."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of a folder."})
    data_set_id: str = field(default="unpublished", metadata={"help": "Of the data, in a card's model-index."})
    data_set_name: str = field(default="", metadata={"help": "Of the data, in words; none: `name`."})
    paper: Literal["none", "coco", "cub"] = field(
        default="none", metadata={"help": "The report opens with what the paper says of these data."}
    )
    splits: list[str] = field(default_factory=lambda: ["validation"], metadata={"help": "Whose rows are taken."})
    image_column: str = "image"
    caption_column: str = field(default="captions", metadata={"help": "Strings, or lists of strings."})
    id_column: str | None = field(
        default=None, metadata={"help": "Names rows and their pictures' files; none: SPLIT-000012 by place."}
    )
    captions: Literal["first", "random", "all"] = field(
        default="first",
        metadata={"help": "Of a picture's captions: the first; one at random; or all that are unique, a row each."},
    )
    num_captions: int | None = field(
        default=None, metadata={"help": "So many of each split, chosen at random by the seed; none: all."}
    )
    evaluation_log: str | None = field(
        default=None, metadata={"help": "JSON lines: a line a model for each run that touched a split named test..."}
    )
    seed: int = field(default=0, metadata={"help": "Of the choice of rows, the drawings, the intervals."})
    batch_size: int = field(
        default=32, metadata={"help": "Pictures drawn at a time; other sizes may differ in the last digits."}
    )
    models: list[dict] = field(
        default_factory=list, metadata={"help": "Of name, and pipeline (with generation, dtype) or images, each."}
    )
    measure: dict = field(default_factory=dict, metadata={"help": "By the measurement's name its settings."})

    def __post_init__(self):
        for name in ("name", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing.")
        if (self.data_dir is None) == (self.dataset_name is None):
            raise ValueError("Give exactly one of `data_dir` and `dataset_name`.")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"`splits` is {self.splits}; expected one or more, all different.")
        check_log(self.splits, self.evaluation_log)
        for name in ("num_captions", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a number from 1.")
        if self.seed < 0:
            raise ValueError(f"`seed` is {self.seed}; expected a number from 0.")
        if not self.models:
            raise ValueError("`models` is empty: name at least one pipeline, or one folder of pictures.")
        names = [model.name.casefold() for model in self.list_models()]
        if len(set(names)) < len(names):
            raise ValueError(f"`models` has names that are equal but for case: {names}.")

    def list_models(self) -> list[ModelArguments]:
        """`models`, typed."""
        return [
            read_settings(ModelArguments, model, f"`models`, number {i}") for i, model in enumerate(self.models, 1)
        ]


def read_settings(kind: type, given: dict | None, where: str) -> Any:
    """
    A dataclass from a part of the YAML file.

    Args:
        kind (`type`): the dataclass; fields of `int`, `float`, `str`, `bool`, `dict`, `Literal`, `list` of these, or
            one of these `| None`.
        given (`dict`, *optional*): its values; what is left out has the default.
        where (`str`): for errors, as "`measure`, fidelity".

    Raises:
        ValueError: for an unknown name (with the nearest known one), or a value that does not fit.
    """
    if given is not None and not isinstance(given, dict):
        raise ValueError(f"{where} is {given!r}; expected `key: value` lines.")
    try:
        return build_settings(kind, given or {}, where)
    except ValueError as error:
        raise ValueError(str(error) if where in str(error) else f"{where}: {error}") from error
