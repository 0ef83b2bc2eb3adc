"""The one entry to training: `accelerate launch training/train.py CONFIG.yaml [--option value ...]`.

The YAML names the stage, "dvae" or "prior". What a stage computes lives in the file of its name, the loop in `loop.py`.
"""

import logging
import sys
from pathlib import Path

import loop
import train_dvae
import train_prior
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from arguments import DVAEArguments, TrainArguments, parse_arguments


def main(argv: list[str]) -> None:
    args = parse_arguments(argv)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
    )
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    set_seed(args.seed, device_specific=True)
    if args.report_to is not None:
        accelerator.init_trackers("hf-dalle", config=_flatten(args))
    stage = train_dvae.DVAEStage(args) if isinstance(args, DVAEArguments) else train_prior.PriorStage(args)
    loop.run(args, accelerator, stage)


def _flatten(args: TrainArguments) -> dict:
    """Settings as the numbers and strings that trackers take."""
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in vars(args).items()}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
