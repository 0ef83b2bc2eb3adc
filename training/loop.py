"""The order of a training run, the same for every stage: optimizer, EMA, resuming, logging, validation, checkpoints.

A stage (see `train_dvae.py`, `train_prior.py`) brings the model, the batches, the loss, the validation and the saving.
"""

import json
import math
import pickle
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from arguments import TrainArguments
from diffusers.training_utils import EMAModel
from optimizers import make_optimizers
from PIL import Image
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_dalle.data import CaptionImageCollator, CaptionImageDataset, EpochBatchSampler
from hf_dalle.optimization import get_warmup_cosine_schedule


logger = get_logger(__name__)


class Stage(Protocol):
    """What the loop asks of a stage."""

    model: torch.nn.Module
    train_dataset: CaptionImageDataset
    collator: CaptionImageCollator

    def parameter_groups(self) -> list[dict]:
        """Groups for `optimizers.make_optimizers`; a group without "lr" gets the run's."""

    def compute_loss(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of one batch at one update, and numbers to log."""

    def validate(self, model: torch.nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Figures and pictures of the model as it stands."""

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Writes what a user loads."""


class Progress:
    """The number of updates done, as an object that checkpoints can hold."""

    def __init__(self):
        self.step = 0

    def state_dict(self) -> dict:
        return {"step": self.step}

    def load_state_dict(self, state: dict):
        self.step = state["step"]


def run(args: TrainArguments, accelerator: Accelerator, stage: Stage) -> None:
    """
    Trains `stage` to the end of `args`, going on from its newest checkpoint, and saves the finished model.

    Raises:
        ValueError: for a checkpoint that does not fit or is damaged, or a loss that is no longer a number.
        OSError: if a checkpoint that the settings name is not there.
    """
    output_dir = Path(args.output_dir)
    optimizers = make_optimizers(args, stage.parameter_groups())
    shape = (args.lr_warmup_steps, args.max_train_steps, args.lr_min_ratio)
    schedules = [get_warmup_cosine_schedule(optimizer, *shape) for optimizer in optimizers]
    model, *optimizers = accelerator.prepare(stage.model, *optimizers)
    # A frozen model around an adapter has no average.
    parameters = [parameter for parameter in accelerator.unwrap_model(model).parameters() if parameter.requires_grad]
    ema = EMAModel(parameters, decay=args.ema_decay, foreach=True) if args.use_ema else None
    progress = Progress()
    accelerator.register_for_checkpointing(progress, *schedules, *([ema] if ema else []))
    _resume(args, accelerator, model, optimizers, schedules, ema, progress)
    _clean(accelerator, output_dir, progress.step)
    if ema:
        ema.to(accelerator.device)

    if args.eval_on_start and progress.step == 0:
        _log(accelerator, output_dir, 0, _validate(accelerator, stage, model, output_dir, 0))
    skipped = {}
    batches = _report_skipped(_batches(args, accelerator, stage, progress.step), skipped)
    bar = tqdm(total=args.max_train_steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    meter = Meter()
    while progress.step < args.max_train_steps:
        _update(args, accelerator, stage, model, optimizers, batches, progress.step, meter)
        learning_rate = optimizers[0].param_groups[0]["lr"]
        for schedule in schedules:
            schedule.step()
        progress.step += 1
        if ema:
            ema.step(parameters)
        bar.update()
        is_last, values = progress.step == args.max_train_steps, {}
        is_checkpoint = progress.step % args.checkpointing_steps == 0 or is_last
        # A checkpoint ends a row of the log, so that a run that goes on from it logs the same rows.
        if progress.step % args.logging_steps == 0 or is_checkpoint:
            num_skipped = len(set(gather_object(list(skipped))))
            values = {"lr": learning_rate, **meter.read(), "skipped_rows": num_skipped}
            bar.set_postfix({key: f"{value:.4g}" for key, value in values.items() if key.endswith("loss")})
            _check_finite(accelerator, values, progress.step)
        if progress.step % args.validation_steps == 0 or is_last:
            with _averaged(ema, parameters):
                values |= _validate(accelerator, stage, model, output_dir, progress.step)
        if values:
            _log(accelerator, output_dir, progress.step, values)
        if is_checkpoint:
            _save_checkpoint(args, accelerator, output_dir, progress.step)
        if values:
            meter.restart_clock()
    bar.close()
    with _averaged(ema, parameters):
        if accelerator.is_main_process:
            stage.save(accelerator.unwrap_model(model), output_dir)
    accelerator.end_training()


def _update(args, accelerator, stage, model, optimizers, batches, step, meter) -> None:
    """One optimizer step over `gradient_accumulation_steps` batches; what it logs goes to `meter`."""
    model.train()
    for index in range(args.gradient_accumulation_steps):
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in next(batches).items()}
        is_last = index == args.gradient_accumulation_steps - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss, logs = stage.compute_loss(model, batch, step)
            accelerator.backward(loss / args.gradient_accumulation_steps)
        meter.add({**logs, "loss": loss}, args.train_batch_size * accelerator.num_processes)
    if args.max_grad_norm is not None:
        meter.add({"grad_norm": accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)})
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _batches(args, accelerator, stage, start_step) -> Iterator[dict]:
    """This process's endless batches, from the position that `start_step` updates have reached."""
    sampler = EpochBatchSampler(
        len(stage.train_dataset),
        args.train_batch_size,
        seed=args.seed,
        start_batch=start_step * args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    loader = DataLoader(
        stage.train_dataset,
        batch_sampler=sampler,
        collate_fn=stage.collator,
        num_workers=args.dataloader_num_workers,
        persistent_workers=args.dataloader_num_workers > 0,
        generator=torch.Generator(),  # of its own: a loader must not draw from the generator that dropout uses
    )
    return iter(loader)


def _report_skipped(batches: Iterator[dict], skipped: dict[int, str]) -> Iterator[dict]:
    """The batches, with the rows that had to be passed over named once and noted in `skipped`."""
    for batch in batches:
        for row, reason in batch.pop("skipped").items():
            if row not in skipped:
                skipped[row] = reason
                count = f"{len(skipped)} so far"
                logger.warning(f"Skipped row {row} of the training data ({count}): {reason}", main_process_only=False)
        yield batch


class Meter:
    """Means of what was logged since the last reading, over all processes, and pictures a second."""

    def __init__(self):
        self.sums, self.counts = {}, {}
        self.restart_clock()

    def restart_clock(self):
        """Leaves out what passed since the last reading: a validation is not training."""
        self.started, self.pictures = time.perf_counter(), 0

    def add(self, logs: dict[str, Any], num_pictures: int = 0):
        """Adds numbers, which may be tensors: they are not waited for."""
        for key, value in logs.items():
            value = value.detach() if torch.is_tensor(value) else value
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + 1
        self.pictures += num_pictures

    def read(self) -> dict[str, float]:
        own = {key: (float(value), self.counts[key]) for key, value in self.sums.items()}
        totals = {}
        for logged in gather_object([own]):
            for key, pair in logged.items():
                totals.setdefault(key, []).append(pair)
        values = {}
        for key, pairs in totals.items():
            sums, counts = zip(*pairs, strict=True)
            values[key] = sum(sums) / sum(counts)
        values["pictures_per_second"] = self.pictures / max(time.perf_counter() - self.started, 1e-9)
        self.sums, self.counts = {}, {}
        self.restart_clock()
        return values


def _check_finite(accelerator: Accelerator, values: dict[str, float], step: int):
    # With a loss scale (fp16) a batch that overflows is passed over; without one it has spoilt the weights.
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values.get(name, 0)) and accelerator.scaler is None:
            raise ValueError(
                f"{name} is {values[name]} at update {step}. Lower `learning_rate` or `max_grad_norm`, or lengthen"
                " `lr_warmup_steps`. The same command goes on from the newest checkpoint, from before this."
            )


@contextmanager
def _averaged(ema: EMAModel | None, parameters: list[torch.nn.Parameter]):
    """The moving average in the model's place, while the block lasts."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _validate(accelerator, stage, model, output_dir, step) -> dict[str, float]:
    """Writes the stage's pictures and returns its figures, on the main process; the others wait."""
    values = {}
    if accelerator.is_main_process:
        model.eval()
        with torch.no_grad():
            values, pictures = stage.validate(accelerator.unwrap_model(model))
        for name, picture in pictures.items():
            path = output_dir / "validation" / f"{name}-{step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    array = np.asarray(picture.convert("RGB"))
                    tracker.writer.add_image(f"validation/{name}", array, step, dataformats="HWC")
    accelerator.wait_for_everyone()
    return values


def _log(accelerator, output_dir, step, values):
    accelerator.log(values, step=step)
    if accelerator.is_main_process:
        with (output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _clean(accelerator: Accelerator, output_dir: Path, step: int):
    """Takes away what a killed run left: half a checkpoint, and logs of updates that will be done again."""
    if not accelerator.is_main_process:
        return
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path)
    path = output_dir / "metrics.jsonl"
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
        beside = output_dir / ".metrics.jsonl"
        beside.write_text("".join(f"{row}\n" for row in rows if json.loads(row)["step"] <= step and step))
        beside.replace(path)


def checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _resume(args, accelerator, model, optimizers, schedules, ema, progress):
    """Loads the checkpoint to go on from, if there is one."""
    found = checkpoints(Path(args.output_dir))
    if args.resume_from_checkpoint == "latest":
        folder = found[-1] if found else None
    else:
        folder = None if args.resume_from_checkpoint is None else Path(args.resume_from_checkpoint)
    if folder is not None:
        if not folder.is_dir():
            raise OSError(f"`resume_from_checkpoint` names {folder}, which is not a folder.")
        _load(folder, args, accelerator, model, optimizers, schedules, ema)
        logger.info(f"Going on from {folder}, update {progress.step} of {args.max_train_steps}.")
    if found and _step_of(found[-1]) > progress.step:
        raise ValueError(
            f"{found[-1]} is of an earlier run, which one that starts at update {progress.step} would get mixed up"
            " with. Delete it, or choose another `output_dir`."
        )


def _load(folder: Path, args, accelerator, model, optimizers, schedules, ema):
    # Only LoRA freezes weights; a checkpoint holds them too, and would put its own base in the place of today's.
    frozen = [(weight, weight.detach().clone()) for weight in model.parameters() if not weight.requires_grad]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        accelerator.load_state(str(folder))
    except (RuntimeError, ValueError, KeyError, OSError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder} is damaged, or of a run with another model or other settings: choose another `output_dir`, or"
            f" name another checkpoint in `resume_from_checkpoint`. ({str(error)[:300]})"
        ) from error
    if not all(torch.equal(weight, today) for weight, today in frozen):
        raise ValueError(f"The base of {folder} is not `init_from`: choose another `output_dir`.")
    # A checkpoint brings the optimizer's settings of its day; those of today hold.
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, today in zip(groups, settings, strict=True):
        group.update(today)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, ratio in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * ratio(schedule.last_epoch)
    if ema:
        ema.decay = args.ema_decay


def _save_checkpoint(args, accelerator, output_dir, step):
    """Writes beside and then renames, so that a checkpoint under its final name is whole; so are those deleted."""
    beside = output_dir / f".checkpoint-{step}"
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        beside.rename(output_dir / f"checkpoint-{step}")
        if args.checkpoints_total_limit is not None:
            for old in checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old.rename(old.with_name(f".{old.name}")))
    accelerator.wait_for_everyone()
