"""The settings of a training run: one dataclass a stage, read from a YAML file that command-line options override.

Names are those of diffusers' training scripts. The order of a run lives in `loop.py`, what a stage computes in
`train_dvae.py` and `train_prior.py`.
"""

import difflib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser


class JsonDict(dict):
    """A dict that the command line gives as JSON."""

    def __init__(self, value: str | dict = ()):
        super().__init__(json.loads(value) if isinstance(value, str) else value)


@dataclass
class TrainArguments:
    """What both stages share."""

    output_dir: str = field(
        default="", metadata={"help": "Checkpoints, logs, pictures and the finished model go here."}
    )
    train_data_dir: str | None = field(default=None, metadata={"help": "Folder of parquet files or an imagefolder."})
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of a folder."})
    train_split: str = "train"
    validation_split: str | None = field(default=None, metadata={"help": "Split to validate on; none: no validation."})
    image_column: str = "image"
    caption_column: str = field(default="captions", metadata={"help": "Strings, or lists of strings to choose from."})
    model: JsonDict = field(default_factory=JsonDict, metadata={"help": "Arguments of the model's configuration."})
    resize_range: list[float] | None = field(
        default=None, metadata={"help": "Augmentation: resized side / size; none: the whole centre square as it is."}
    )
    crop_range: list[float] | None = field(default=None, metadata={"help": "Augmentation: place of the square crop."})
    do_random_flip: bool = field(default=False, metadata={"help": "Augmentation: mirror half of the pictures."})
    train_batch_size: int = field(default=8, metadata={"help": "Pictures a process and forward pass."})
    eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_train_steps: int = field(default=1000, metadata={"help": "Updates in all."})
    learning_rate: float = 1e-4
    lr_min_ratio: float = field(default=0.0, metadata={"help": "Last learning rate / peak; a cosine leads there."})
    lr_warmup_steps: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = field(default=None, metadata={"help": "Global norm to clip at; none: no clipping."})
    use_ema: bool = field(default=True, metadata={"help": "Validate and save the moving average of the weights."})
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = 0
    dataloader_num_workers: int = 0
    checkpointing_steps: int = field(default=500, metadata={"help": "Updates between checkpoints."})
    checkpoints_total_limit: int | None = field(default=2, metadata={"help": "Older checkpoints are deleted."})
    resume_from_checkpoint: str | None = field(
        default="latest", metadata={"help": "'latest' (or from the start if there is none), a path, or 'none'."}
    )
    validation_steps: int = field(default=500, metadata={"help": "Updates between validations."})
    logging_steps: int = 10
    report_to: str | None = field(default="tensorboard", metadata={"help": "A tracker of Accelerate, or 'none'."})
    weights_dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the finished model on disk; it loads as float32."}
    )

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("`output_dir` is missing: name the folder for checkpoints and the finished model.")
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("Give exactly one of `train_data_dir` and `dataset_name`.")
        for name in ("train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_train_steps",
                     "checkpointing_steps", "validation_steps", "logging_steps"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected at least 1.")
        for name in ("resize_range", "crop_range"):
            if getattr(self, name) is not None and len(getattr(self, name)) != 2:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected two numbers, low and high.")
        for name in ("report_to", "resume_from_checkpoint", "validation_split"):
            if getattr(self, name) in ("none", ""):
                setattr(self, name, None)


@dataclass
class DVAEArguments(TrainArguments):
    """Stage 1 (paper, section 2.1 and appendix A.2)."""

    temperature_start: float = 1.0
    temperature_end: float = 1 / 16
    temperature_anneal_steps: int = 150_000
    kl_weight: float = field(default=6.6, metadata={"help": "beta, reached after kl_weight_warmup_steps."})
    kl_weight_warmup_steps: int = 5_000
    min_log_b: float | None = field(
        default=None, metadata={"help": "Floor under the likelihood's ln b in the loss; none is the paper."}
    )
    initial_kl_per_token: float | None = field(
        default=None,
        metadata={
            "help": "Start from a codebook clustered from the data, this sharp (nats); none: random, the paper."
        },
    )
    encoder_lr_ratio: float = field(
        default=1.0, metadata={"help": "Encoder's learning rate / decoder's; 1 is the paper."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "Reconstructions in the validation grid."})


@dataclass
class PriorArguments(TrainArguments):
    """Stage 2 (paper, section 2.2 and appendix B)."""

    dvae: str = field(default="", metadata={"help": "Folder of the trained dVAE."})
    tokenizer: str = field(default="", metadata={"help": "Folder of the tokenizer (train_tokenizer.py)."})
    tokens_column: str | None = field(
        default=None, metadata={"help": "Column of precomputed tokens (precompute_image_tokens.py) to read instead."}
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of captions emptied, for guidance."})
    attn_implementation: Literal["sdpa", "eager"] = field(
        default="sdpa", metadata={"help": "Of the prior in training; on short streams in bf16 on a CPU eager is quicker."}
    )
    bpe_dropout: float = field(default=0.1, metadata={"help": "Share of BPE merges skipped in training."})
    adam_beta2: float = 0.96
    adam_weight_decay: float = 4.5e-2
    max_grad_norm: float | None = 4.0
    learning_rate: float = 4.5e-4
    validation_prompts: list[str] | None = field(default=None, metadata={"help": "Captions drawn at each validation."})
    num_validation_images: int = field(default=4, metadata={"help": "Pictures a validation caption."})
    generation: JsonDict = field(
        default_factory=JsonDict, metadata={"help": "Default sampling arguments saved with the model."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("dvae", "tokenizer"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is missing: name the folder of the trained {name}.")
        for name in ("caption_dropout", "bpe_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected a share in [0, 1).")


STAGES = {"dvae": DVAEArguments, "prior": PriorArguments}


def parse_arguments(argv: list[str]) -> TrainArguments:
    """
    Reads `CONFIG.yaml [--option value ...]` into the dataclass of the stage that the YAML names.

    Raises:
        ValueError: for an unknown stage or key (named, with the nearest right one) or a value that does not fit.
        OSError: if the file cannot be read.
    """
    if not argv or argv[0].startswith("-"):
        raise ValueError(f"Usage: train.py CONFIG.yaml [--option value ...]; got {' '.join(argv) or 'nothing'}.")
    values = _read_yaml(Path(argv[0]))
    stage = values.pop("stage", None)
    if stage not in STAGES:
        raise ValueError(f"{argv[0]} says `stage: {stage}`; expected one of {', '.join(STAGES)}.")
    names = [item.name for item in fields(STAGES[stage])]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
            hint = f" Did you mean `{near[0]}`?" if near else f" Known keys: {', '.join(names)}."
            raise ValueError(f"{argv[0]} has an unknown key `{key}`.{hint}")
    # The file's values become options in front of the user's, so argparse checks both in one way and the last one wins.
    options = [token for key, value in values.items() if value is not None for token in _as_option(key, value)]
    parser = HfArgumentParser(STAGES[stage], prog="train.py", allow_abbrev=False, exit_on_error=False)
    arguments, unknown = parser.parse_args_into_dataclasses(
        options + argv[1:], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        near = difflib.get_close_matches(unknown[0].lstrip("-"), names, n=1, cutoff=0.5)
        raise ValueError(f"Unknown option {unknown[0]}." + (f" Did you mean --{near[0]}?" if near else ""))
    return arguments


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `key: value` lines; got {type(values).__name__}.")
    return values


def _as_option(key: str, value) -> list[str]:
    if isinstance(value, dict):
        return [f"--{key}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value}"]
