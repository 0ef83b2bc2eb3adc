"""The one entry to training: `accelerate launch training/train.py CONFIG.yaml [--option value ...]`.

The YAML names the stage, "dvae", "prior" or "reranker". What a stage computes lives in the file of its name, the loop
in `loop.py`.
"""

import logging
import sys
from datetime import timedelta
from pathlib import Path

import dry_run
import loop
import machines
import render_card
import torch
import train_dvae
import train_prior
import train_reranker
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradScalerKwargs, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from arguments import DVAEArguments, PriorArguments, RerankerArguments, TrainArguments, parse_arguments
from describe_run import describe_training
from interruptions import Stopped
from reporting import tracker_options

from hf_dalle.model_card import render_model_card
from hf_dalle.publishing import check_token, list_files, prepare_repository, push_files


# What a run leaves beside the model: to go on from, and to watch it by.
UNPUBLISHED = ("*checkpoint-*/*", "logs/*", "validation/*", "*.jsonl", "nonfinite-batch-*")


def main(argv: list[str]) -> None:
    if dry_run.is_asked(argv):
        dry_run.main(argv)
        return
    args = parse_arguments(argv)
    _check_tracker(args.report_to)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or processes that torchrun starts would not join
        # float16 is `make_gradient_scaler`'s: Accelerate's puts a scale of its own on top, and on a CPU does nothing.
        mixed_precision="no" if args.mixed_precision == "fp16" else args.mixed_precision,
        # The others wait while the main process validates, longer than NCCL's ten minutes.
        kwargs_handlers=[GradScalerKwargs(enabled=False), InitProcessGroupKwargs(timeout=timedelta(hours=1))],
        log_with=args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=f"{args.output_dir}/logs"),
    )
    machines.check_launch(accelerator, args)
    logging.basicConfig(level=logging.INFO if accelerator.is_main_process else logging.ERROR)
    for name in ("accelerate", "httpx2"):  # they tell of each file of each checkpoint, of each request to the Hub
        logging.getLogger(name).setLevel(logging.WARNING)
    repo_id, is_pushing = None, args.push_to_hub and accelerator.is_main_process
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    if is_pushing:
        check_token(name, args.hub_token)
    set_seed(args.seed, device_specific=True)
    stage = _make_stage(args)
    if is_pushing:  # a refusal must not cost a training, nor data that cannot be read leave an empty repository
        repo_id = prepare_repository(name, args.hub_token, private=args.hub_private_repo or None)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.report_to is not None:
        accelerator.init_trackers("hf-dalle", config=_flatten(args), init_kwargs=tracker_options(args))
    loop.run(args, accelerator, stage)
    if repo_id is not None:
        print(f"Published: {_publish(args, repo_id, accelerator.num_processes)}")


def _make_stage(args: TrainArguments) -> train_dvae.DVAEStage | train_prior.PriorStage | train_reranker.RerankerStage:
    stages = {
        DVAEArguments: train_dvae.DVAEStage,
        PriorArguments: train_prior.PriorStage,
        RerankerArguments: train_reranker.RerankerStage,
    }
    return stages[type(args)](args)


def _publish(args: TrainArguments, repo_id: str, num_processes: int) -> str:
    """Pushes the finished model with its card and its last validation pictures; returns the commit's address."""
    folder = Path(args.output_dir)
    report = describe_training(args, num_processes)
    pictures = {f"{name}.png": folder / path for name, path in report["pictures"].items()}
    report |= {"name": repo_id.split("/")[-1], "pictures": {Path(name).stem: name for name in pictures}}
    files = {**pictures, **list_files(folder, ignore=UNPUBLISHED)}
    if "README.md" not in files:
        card = render_model_card(report, render_card.TEMPLATE, model_id=repo_id)
        files["README.md"] = str(card).encode()
    return push_files(files, repo_id, f"Trained for {args.max_train_steps} updates", token=args.hub_token)


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
    settings = {key: value for key, value in vars(args).items() if key != "hub_token"}
    return {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in settings.items()}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Stopped as stopped:
        stopped.end_process()
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: {error}")
