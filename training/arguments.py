"""The settings of a training run: one dataclass a stage, with what is refused of them.

Names are those of diffusers' training scripts. How a YAML file and the command line become one of these lives in
`settings_file.py`, the order of a run in `loop.py`, what a stage computes in `train_*.py`.
"""

from dataclasses import dataclass, field
from typing import Literal

from settings_file import parse_settings


@dataclass
class TrainArguments:
    """What all stages share."""

    output_dir: str = field(
        default="", metadata={"help": "Checkpoints, logs, pictures and the finished model go here."}
    )
    train_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of parquet files or tar shards, an imagefolder, or a pattern, *.tar."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the Hub, instead of a folder."})
    streaming: bool = field(
        default=False, metadata={"help": "Read shard after shard, nothing downloaded, converted or indexed before."}
    )
    shuffle_buffer_size: int = field(
        default=1000, metadata={"help": "With streaming: rows a worker holds to shuffle."}
    )
    train_split: str = "train"
    validation_split: str | None = field(default=None, metadata={"help": "Split to validate on; none: no validation."})
    image_column: str = "image"
    caption_column: str = field(
        default="captions",
        metadata={"help": "Strings, or lists of strings to choose from; of tar shards: txt, or a key of the .json."},
    )
    max_skipped_share: float = field(
        default=0.1,
        metadata={"help": "The run ends if more of the rows than this, of 1,000 at least, cannot be used."},
    )
    model: dict = field(default_factory=dict, metadata={"help": "Arguments of the model's configuration (JSON)."})
    resize_range: list[float] | None = field(
        default=None, metadata={"help": "Augmentation: resized side / size; none: the whole centre square as it is."}
    )
    crop_range: list[float] | None = field(
        default=None, metadata={"help": "Augmentation: place of the square crop; none: the paper's for the stage."}
    )
    do_random_flip: bool = field(default=False, metadata={"help": "Augmentation: mirror half of the pictures."})
    train_batch_size: int = field(default=8, metadata={"help": "Pictures a process and forward pass."})
    eval_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_train_steps: int = field(default=1000, metadata={"help": "Updates in all."})
    learning_rate: float = 1e-4
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup", "reduce_lr_on_plateau"] = field(
        default="cosine", metadata={"help": "reduce_lr_on_plateau: halved where the training loss flattens."}
    )
    lr_min_ratio: float = field(
        default=0.0, metadata={"help": "Last learning rate / peak; a cosine (or a line) leads there."}
    )
    lr_warmup_steps: int = 0
    lr_decay_steps: int | None = field(
        default=None, metadata={"help": "Updates until the cosine (or line) ends, warm-up counted; none: the run's."}
    )
    lr_plateau_steps: int = field(default=5000, metadata={"help": "Updates whose mean loss is compared with before."})
    lr_plateau_threshold: float = field(default=1e-3, metadata={"help": "A relative fall below this is a plateau."})
    lr_max_halvings: int = field(default=5, metadata={"help": "On plateaus, at most."})
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-4
    adam_epsilon: float = 1e-8
    adam_max_second_moment: float | None = field(
        default=None,
        metadata={"help": "Bound of Adam's running second moment (the paper's prior: 5); none: no bound."},
    )
    use_no_decay_groups: bool = field(
        default=False, metadata={"help": "No weight decay of gains, biases and embeddings; the paper decays all."}
    )
    max_grad_norm: float | None = field(default=None, metadata={"help": "Global norm to clip at; none: no clipping."})
    max_nonfinite_updates: int = field(
        default=10,
        metadata={
            "help": "An update whose loss or gradient is no number is skipped; the run ends at so many in a row."
        },
    )
    use_ema: bool = field(default=True, metadata={"help": "Validate and save the moving average of the weights."})
    ema_decay: float = 0.999
    ema_update_steps: int = field(
        default=1, metadata={"help": "Updates between those of the average (the paper's prior: 25, with decay 0.99)."}
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_scaling: Literal["global"] = field(default="global", metadata={"help": "With fp16: one loss scale."})
    seed: int = 0
    dataloader_num_workers: int = 0
    checkpointing_steps: int = field(default=500, metadata={"help": "Updates between checkpoints."})
    checkpoints_total_limit: int | None = field(
        default=2, metadata={"help": "Older checkpoints are deleted; none: all are kept."}
    )
    resume_from_checkpoint: str | None = field(
        default="latest", metadata={"help": "'latest' (or from the start if there is none), a path, or none."}
    )
    max_validation_samples: int | None = field(
        default=None, metadata={"help": "Validate on the first so many rows of the split; none: on all."}
    )
    validation_steps: int = field(default=500, metadata={"help": "Updates between validations."})
    eval_on_start: bool = field(default=False, metadata={"help": "Validate before the first update too."})
    logging_steps: int = 10
    report_to: str | None = field(default="tensorboard", metadata={"help": "A tracker of Accelerate; none: no other."})
    weights_dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the finished model on disk; it loads as float32."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Publish the finished model, with a card."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository; none: output_dir's name, yours."})
    hub_token: str | None = field(default=None, metadata={"help": "Of the Hub; none: `hf auth login`, or HF_TOKEN."})
    hub_private_repo: bool = field(default=False, metadata={"help": "Make a new repository private."})

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("`output_dir` is missing: name the folder for checkpoints and the finished model.")
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("Give exactly one of `train_data_dir` and `dataset_name`.")
        for is_right, words, names in _RANGES:
            for name in names:
                value = getattr(self, name, None)
                if value is not None and not is_right(value):
                    raise ValueError(f"`{name}` is {value}; expected a number {words}.")
        for name in ("resize_range", "crop_range"):
            if getattr(self, name) is not None and len(getattr(self, name)) != 2:
                raise ValueError(f"`{name}` is {getattr(self, name)}; expected two numbers, low and high.")
        if self.resize_range is None and (self.crop_range is not None or self.do_random_flip):
            raise ValueError("`crop_range` and `do_random_flip` do nothing without `resize_range`, e.g. [1.0, 1.0].")
        if self.lr_warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("`lr_warmup_steps` does nothing with `lr_scheduler: constant`: use constant_with_warmup.")
        for name in ("lr_min_ratio", "lr_decay_steps"):
            if getattr(self, name) and self.lr_scheduler not in ("cosine", "linear"):
                raise ValueError(f"`{name}` does nothing with `lr_scheduler: {self.lr_scheduler}`.")
        if not self.push_to_hub and (self.hub_model_id or self.hub_token or self.hub_private_repo):
            raise ValueError("`hub_model_id`, `hub_token` and `hub_private_repo` do nothing without `push_to_hub`.")


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
    pixel_l1_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of |error| of decoded pixels; above 0, pixel errors take the likelihood's place."},
    )
    pixel_l2_weight: float = field(default=0.0, metadata={"help": "The same of the squared error."})
    codebook_revival_share: float | None = field(
        default=None,
        metadata={"help": "With 'nearest': codes with less than this share of the mean use start anew; none: never."},
    )
    codebook_revival_steps: int = field(default=100, metadata={"help": "Updates between such revivals."})
    encoder_lr_ratio: float = field(
        default=1.0, metadata={"help": "Encoder's learning rate / decoder's; 1 is the paper."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "Reconstructions in the validation grid."})


@dataclass
class PriorArguments(TrainArguments):
    """Stage 2 (paper, section 2.2 and appendix B)."""

    dvae: str = field(default="", metadata={"help": "Folder of the trained dVAE; a pipeline to start from has one."})
    tokenizer: str = field(
        default="",
        metadata={"help": "Folder of the tokenizer (train_tokenizer.py); a pipeline to start from has one."},
    )
    init_from: str | None = field(
        default=None,
        metadata={"help": "Fine-tune this pipeline, or this prior alone: a folder or a repository of the Hub."},
    )
    lora_rank: int | None = field(
        default=None, metadata={"help": "Train LoRA adapters of this rank; none: all weights. Needs init_from."}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapters' product is scaled by lora_alpha / lora_rank; none: by 1."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "On what goes into the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get an adapter (q_proj, fc1, ...); none: all linear ones."}
    )
    tokens_column: str | None = field(
        default=None, metadata={"help": "Column of precomputed tokens (precompute_image_tokens.py) to read instead."}
    )
    caption_dropout: float = field(default=0.1, metadata={"help": "Share of captions emptied, for guidance."})
    caption_word_dropout: float = field(
        default=0.0, metadata={"help": "Up to this share of a caption's words is left out; the share varies."}
    )
    attn_implementation: Literal["sdpa", "eager"] = field(
        default="sdpa",
        metadata={"help": "Of the prior in training; on short streams in bf16 on a CPU eager is quicker."},
    )
    bpe_dropout: float = field(default=0.1, metadata={"help": "Share of BPE merges skipped in training."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Keep each layer's input only and compute the rest again: less memory."}
    )
    power_sgd_rank: int | None = field(
        default=None,
        metadata={"help": "Processes send factors of gradients, of this rank; 0: the paper's by width; none: all."},
    )
    image_token_dropout: float = field(
        default=0.0,
        metadata={"help": "Image tokens hidden from later states, of a picture a share from 0 to this; 0: the paper."},
    )
    optimizer: Literal["adamw", "muon"] = field(
        default="adamw", metadata={"help": "adamw: the paper; muon: the layers' matrices by Muon, the rest by AdamW."}
    )
    muon_learning_rate: float = field(default=5e-3, metadata={"help": "Of the matrices with `optimizer: muon`."})
    gradient_scaling: Literal["resblock", "global"] = field(
        default="resblock", metadata={"help": "With fp16: a scale for each resblock (the paper), or one loss scale."}
    )
    adam_beta2: float = 0.96
    adam_weight_decay: float = 4.5e-2
    max_grad_norm: float | None = field(default=4.0, metadata={"help": "Global norm to clip at; none: no clipping."})
    learning_rate: float = 4.5e-4
    validation_prompts: list[str] | None = field(default=None, metadata={"help": "Captions drawn at each validation."})
    num_validation_images: int = field(default=4, metadata={"help": "Pictures a validation caption."})
    generation: dict = field(
        default_factory=dict, metadata={"help": "Default sampling arguments saved with the model (JSON)."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("dvae", "tokenizer"):
            if not getattr(self, name) and self.init_from is None:
                raise ValueError(f"`{name}` is missing: name the folder of the trained {name}.")
        if self.lora_rank is not None and self.init_from is None:
            raise ValueError("`lora_rank` needs `init_from`: adapters change a model that is trained already.")
        if self.lora_rank is None and (self.lora_alpha or self.lora_dropout or self.lora_target_modules):
            raise ValueError("`lora_alpha`, `lora_dropout` and `lora_target_modules` do nothing without `lora_rank`.")
        if self.tokens_column is not None and self.resize_range is not None:
            raise ValueError("`resize_range` does nothing to stored tokens: precompute_image_tokens.py augments them.")
        if self.caption_dropout == 0 and not all(prompt.strip() for prompt in self.validation_prompts or ()):
            raise ValueError("One of `validation_prompts` is empty, which needs a `caption_dropout` above 0.")


@dataclass
class RerankerArguments(TrainArguments):
    """The contrastive model that candidates are ranked by (paper, section 2.6); defaults are CLIP's."""

    tokenizer: str = field(default="", metadata={"help": "Folder of the captions' tokenizer, the prior's."})
    dvae: str | None = field(default=None, metadata={"help": "Folder of the dVAE whose reconstructions are seen too."})
    reconstruction_share: float = field(
        default=0.5, metadata={"help": "With `dvae`: of the training pictures so many pass through it."}
    )
    distortion: float = field(
        default=0.0,
        metadata={"help": "How far training pictures are turned, stretched, moved, recoloured, covered; 1 is far."},
    )
    negatives_column: str | None = field(
        default=None, metadata={"help": "Rows equal here are no negatives of each other; none: those of one caption."}
    )
    caption_word_dropout: float = field(
        default=0.0, metadata={"help": "Up to this share of a caption's words is left out; the share varies."}
    )
    learning_rate: float = 5e-4
    adam_beta2: float = 0.98
    adam_epsilon: float = 1e-6
    adam_weight_decay: float = 0.2
    use_no_decay_groups: bool = True
    num_validation_images: int = field(default=8, metadata={"help": "Captions in the grid of pictures found."})

    def __post_init__(self):
        super().__post_init__()
        if not self.tokenizer:
            raise ValueError("`tokenizer` is missing: name the folder of the tokenizer that the prior has.")
        if self.push_to_hub:
            raise ValueError("A reranker goes to the Hub in its pipeline: see add_reranker.py, and leave out this.")
        if self.negatives_column is not None and self.streaming:
            raise ValueError("`negatives_column` needs rows by number: leave out `streaming`.")


STAGES = {"dvae": DVAEArguments, "prior": PriorArguments, "reranker": RerankerArguments}

_RANGES = [
    (
        lambda value: value >= 1,
        "from 1",
        (
            *("train_batch_size", "eval_batch_size", "gradient_accumulation_steps", "max_train_steps"),
            *("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "logging_steps"),
            *("num_validation_images", "lora_rank", "codebook_revival_steps"),
            *("shuffle_buffer_size", "max_validation_samples", "max_nonfinite_updates"),
            *("ema_update_steps", "lr_decay_steps", "lr_plateau_steps", "lr_max_halvings"),
        ),
    ),
    (
        lambda value: value >= 0,
        "from 0",
        (
            *("learning_rate", "muon_learning_rate", "lr_warmup_steps", "adam_weight_decay", "seed"),
            "dataloader_num_workers",
            *("temperature_anneal_steps", "kl_weight", "kl_weight_warmup_steps", "encoder_lr_ratio"),
            *("pixel_l1_weight", "pixel_l2_weight", "power_sgd_rank", "distortion"),
        ),
    ),
    (
        lambda value: value > 0,
        "above 0",
        (
            *("adam_epsilon", "adam_max_second_moment", "max_grad_norm", "lora_alpha"),
            *("temperature_start", "temperature_end"),
        ),
    ),
    (
        lambda value: 0 <= value < 1,
        "in [0, 1)",
        (
            *("adam_beta1", "adam_beta2", "ema_decay", "caption_dropout", "caption_word_dropout", "bpe_dropout"),
            *("lora_dropout", "codebook_revival_share", "lr_plateau_threshold"),
        ),
    ),
    (
        lambda value: 0 <= value <= 1,
        "in [0, 1]",
        ("lr_min_ratio", "image_token_dropout", "max_skipped_share", "reconstruction_share"),
    ),
]


def parse_arguments(argv: list[str]) -> TrainArguments:
    """The dataclass of the stage that `CONFIG.yaml [--option value ...]` names, by [`parse_settings`]."""
    return parse_settings(argv, STAGES, "train.py")
