"""What a finished training run was, for its model's card: settings, updates, pictures, hours, last figures, sizes.

All of it is read back from what the run left in its folder. What the model is worth is measured by `evaluate.py`; how
a card is made of this lives in `render_card.py`.
"""

import json
import math
from pathlib import Path

from arguments import STAGES, TrainArguments
from safetensors import safe_open
from settings_file import list_defaults, read_yaml

from hf_dalle.model_card import publish_settings


# Numbers of the log that say how the run went, not what came of it.
RUNNING_FIGURES = (
    *("step", "lr", "skipped_rows", "skipped_updates", "grad_norm", "pictures_per_second", "memory_gb"),
    *("temperature", "kl_weight"),
)
GENERATION_DEFAULTS = ("guidance_scale", "temperature", "top_k", "top_p")


def describe_training(args: TrainArguments, num_processes: int = 1) -> dict:
    """
    The report of a run that has just ended, as far as training tells.

    Args:
        args (`TrainArguments`): settings of the run; its `output_dir` holds the model and the log.
        num_processes (`int`, *optional*, defaults to 1): how many trained together.

    Returns:
        `dict`: `"name"`, `"model"`, `"training"` and `"pictures"` of a report.json.

    Raises:
        OSError: if the run has left no log.
    """
    folder = Path(args.output_dir)
    stage = next(name for name, kind in STAGES.items() if type(args) is kind)
    defaults = list_defaults(type(args))
    changed = {name: value for name, value in vars(args).items() if value != defaults[name]}
    pictures = {}
    for path in sorted(folder.glob("validation/*-*.png")):  # steps have leading zeros: the last is the newest
        pictures[path.name.rpartition("-")[0]] = path.relative_to(folder).as_posix()
    return {
        "name": folder.resolve().name,
        "model": describe_model(folder),
        "training": {stage: describe_run({"stage": stage, **changed}, folder / "metrics.jsonl", num_processes)},
        "pictures": pictures,
    }


def describe_run(settings: dict, metrics: Path, num_processes: int = 1) -> dict:
    """
    One stage of a report's `"training"`.

    Args:
        settings (`dict`): as the YAML file says them, with `"stage"`.
        metrics (`Path`): the run's metrics.jsonl.
        num_processes (`int`, *optional*, defaults to 1): how many trained together.

    Returns:
        `dict`: the settings as [`publish_settings`] leaves them; `"updates"`; `"pictures"` seen in them, repeated ones
        too; `"hours"` of the updates, without validations; the `"final"` value of each figure of the log.

    Raises:
        OSError: if there is no log.
        ValueError: if it is empty.
    """
    if not metrics.is_file():
        raise OSError(f"There is no {metrics}: a finished run of train.py leaves one.")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise ValueError(f"{metrics} is empty: the run has not logged anything yet.")
    whole = {**list_defaults(STAGES[settings["stage"]]), **settings}
    pictures_an_update = whole["train_batch_size"] * whole["gradient_accumulation_steps"] * num_processes
    seconds, done, final = 0.0, 0, {}
    for row in rows:
        if "pictures_per_second" in row:
            seconds += (row["step"] - done) * pictures_an_update / row["pictures_per_second"]
            done = row["step"]
        final |= {name: value for name, value in row.items() if name not in RUNNING_FIGURES}
    return {
        "settings": publish_settings(settings),
        "updates": rows[-1]["step"],
        "pictures": rows[-1]["step"] * pictures_an_update,
        "hours": seconds / 3600,
        "final": final,
    }


def describe_stage(stage: str, config: Path, run: Path | None, where: str, num_processes: int = 1) -> dict:
    """
    One stage of a report's `"training"` from its YAML file, and where `run` is given, from what it left there.

    Args:
        stage (`str`): what the file must be of.
        config, run (`Path`): the settings, and the `output_dir`.
        where (`str`): for the error, the name of the setting that gives `config`.
        num_processes (`int`, *optional*, defaults to 1): how many trained together.

    Raises:
        OSError: if a file is missing.
        ValueError: if it is of another stage.
    """
    settings = read_yaml(config)
    if settings.get("stage") != stage:
        raise ValueError(f"{where} is {config}, which says `stage: {settings.get('stage')}`.")
    if run is None:
        return {"settings": publish_settings(settings)}
    return describe_run(settings, run / "metrics.jsonl", num_processes)


def describe_model(folder: Path) -> dict:
    """
    Configurations, parameters and bytes of a saved pipeline, or of a dVAE alone; what is not there is left out.

    Parameters are counted once, however many variants and shards hold them. The codes of a nearest-neighbour codebook
    count, though no gradient changes them: decoding needs them. Their moving averages serve training alone and do not.
    The bytes are those of every file of weights, each variant's too, and of the tokenizers.
    """
    model = {"num_parameters": {}}
    for part in ("prior", "dvae", "reranker"):
        path = folder / part / "config.json"
        if part == "dvae" and not (folder / "model_index.json").is_file():
            path = folder / "config.json"
        if path.is_file():
            model[part] = json.loads(path.read_text(encoding="utf-8"))
            model["num_parameters"][part] = _count_parameters(path.parent)
    path = folder / "prior" / "generation_config.json"
    if path.is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))
        model["generation"] = {name: generation[name] for name in GENERATION_DEFAULTS if name in generation}
    parts = [folder, *(folder / part for part in ("prior", "dvae", "tokenizer", "reranker", "reranker_processor"))]
    files = {path for part in parts for name in ("*.safetensors", "tokenizer*.json") for path in part.glob(name)}
    model["size_in_bytes"] = sum(path.stat().st_size for path in files)
    return model


def _count_parameters(folder: Path) -> int:
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            sizes |= {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return sum(size for name, size in sizes.items() if not name.rpartition(".")[2].startswith("ema_"))
