"""The one entry to training: `accelerate launch training/train.py CONFIG.yaml [--option value ...]`.

The YAML names the stage, "dvae" or "prior". What a stage computes lives in the file of its name, the loop in
`loop.py`.
"""

import logging
import sys
from pathlib import Path

import loop
import torch
import train_dvae
import train_prior
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration, set_seed
from arguments import DVAEArguments, TrainArguments, parse_arguments


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    _check_tracker(args.report_to)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or processes that torchrun starts would not join
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
    )
    if args.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("`mixed_precision: fp16` needs an accelerator; a CPU trains with 'no' or 'bf16'.")
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.WARNING)  # which else tells of each file of each checkpoint
    set_seed(args.seed, device_specific=True)
    stage = train_dvae.DVAEStage(args) if isinstance(args, DVAEArguments) else train_prior.PriorStage(args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.report_to is not None:
        accelerator.init_trackers("hf-dalle", config=_flatten(args))
    loop.run(args, accelerator, stage)


def _check_tracker(name: str | None) -> None:
    # Accelerate passes over a tracker that is not installed without a word.
    available = [str(tracker) for tracker in get_available_trackers()]
    if name is not None and name not in available:
        raise ValueError(
            f"`report_to` is {name!r}, which is not installed (or no tracker that Accelerate knows); it may be"
            f" {', '.join([*available, 'none'])}."
        )


def _flatten(args: TrainArguments) -> dict:
    """Settings as the numbers and strings that trackers take."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in vars(args).items()}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
