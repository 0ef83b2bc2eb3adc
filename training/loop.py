"""The order of a training run, the same for every stage: optimizer, EMA, resuming, logging, validation, checkpoints.

A stage (see `train_dvae.py`, `train_prior.py`) brings the model, the batches, the loss, the validation and the saving.
"""

import json
import shutil
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from arguments import TrainArguments
from diffusers.training_utils import EMAModel
from PIL import Image
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
        """The optimizer's groups; a group without "lr" gets the run's."""

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
    """Trains `stage` to the end of `args`, going on from its newest checkpoint, and saves the finished model."""
    output_dir = Path(args.output_dir)
    optimizer = torch.optim.AdamW(
        stage.parameter_groups(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    schedule = get_warmup_cosine_schedule(optimizer, args.lr_warmup_steps, args.max_train_steps, args.lr_min_ratio)
    model, optimizer = accelerator.prepare(stage.model, optimizer)
    parameters = list(accelerator.unwrap_model(model).parameters())
    ema = EMAModel(parameters, decay=args.ema_decay, foreach=True) if args.use_ema else None
    progress = Progress()
    accelerator.register_for_checkpointing(progress, schedule, *([ema] if ema else []))
    _resume(args, accelerator, output_dir)
    if ema:
        ema.to(accelerator.device)
    if accelerator.is_main_process:
        _drop_log_after(output_dir / "metrics.jsonl", progress.step)

    batches = _batches(args, accelerator, stage, progress.step)
    bar = tqdm(total=args.max_train_steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step")
    meter, skipped = Meter(), set()
    while progress.step < args.max_train_steps:
        logs = _update(args, accelerator, stage, model, optimizer, batches, progress.step, skipped)
        schedule.step()
        progress.step += 1
        if ema:
            ema.step(parameters)
        meter.add(logs, args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes)
        bar.update()
        is_last = progress.step == args.max_train_steps
        if progress.step % args.logging_steps == 0 or is_last:
            values = {"lr": schedule.get_last_lr()[0], "skipped_rows": len(skipped), **meter.read()}
            bar.set_postfix({key: f"{value:.4g}" for key, value in values.items() if key.endswith("loss")})
            _log(accelerator, output_dir, progress.step, values)
        if progress.step % args.validation_steps == 0 or is_last:
            with _averaged(ema, parameters):
                _validate(accelerator, stage, model, output_dir, progress.step)
            meter.restart_clock()
        if progress.step % args.checkpointing_steps == 0 or is_last:
            _save_checkpoint(args, accelerator, output_dir, progress.step)
            meter.restart_clock()
    bar.close()
    with _averaged(ema, parameters):
        if accelerator.is_main_process:
            stage.save(accelerator.unwrap_model(model), output_dir)
    accelerator.end_training()


def _update(args, accelerator, stage, model, optimizer, batches, step, skipped) -> dict[str, Any]:
    """One optimizer step over `gradient_accumulation_steps` batches; returns the last batch's numbers and the loss."""
    model.train()
    total = 0.0
    for index in range(args.gradient_accumulation_steps):
        batch = next(batches)
        for reason in set(batch.pop("skipped")) - skipped:
            skipped.add(reason)
            logger.warning(
                f"Skipped a row of the training data ({len(skipped)} so far): {reason}", main_process_only=False
            )
        batch = {key: value.to(accelerator.device, non_blocking=True) for key, value in batch.items()}
        is_last = index == args.gradient_accumulation_steps - 1
        with nullcontext() if is_last else accelerator.no_sync(model):
            with accelerator.autocast():
                loss, logs = stage.compute_loss(model, batch, step)
            accelerator.backward(loss / args.gradient_accumulation_steps)
        total += loss.detach()
    if args.max_grad_norm is not None:
        logs["grad_norm"] = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return {**logs, "loss": total / args.gradient_accumulation_steps}


def _batches(args, accelerator, stage, start_step):
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


class Meter:
    """Means of what the updates logged since the last reading, and pictures a second."""

    def __init__(self):
        self.restart_clock()
        self.sums, self.count, self.pictures = {}, 0, 0

    def restart_clock(self):
        """Leaves out what passed since the last reading: a validation is not training."""
        self.started, self.pictures = time.perf_counter(), 0

    def add(self, logs: dict[str, Any], num_pictures: int):
        for key, value in logs.items():
            self.sums[key] = self.sums.get(key, 0) + (value.detach() if torch.is_tensor(value) else value)
        self.count, self.pictures = self.count + 1, self.pictures + num_pictures

    def read(self) -> dict[str, float]:
        values = {key: float(value) / self.count for key, value in self.sums.items()}
        values["pictures_per_second"] = self.pictures / max(time.perf_counter() - self.started, 1e-9)
        self.sums, self.count = {}, 0
        self.restart_clock()
        return values


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


def _validate(accelerator, stage, model, output_dir, step):
    if accelerator.is_main_process:
        model.eval()
        with torch.no_grad():
            values, pictures = stage.validate(accelerator.unwrap_model(model))
        _log(accelerator, output_dir, step, values)
        for name, picture in pictures.items():
            path = output_dir / "validation" / f"{name}-{step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            for tracker in accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.writer.add_image(f"validation/{name}", _as_tensor(picture), step)
    accelerator.wait_for_everyone()


def _as_tensor(picture: Image.Image) -> torch.Tensor:
    # H x W x 3 bytes -> 3 x H x W
    width, height = picture.size
    return (
        torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
        .view(height, width, 3)
        .permute(2, 0, 1)
    )


def _log(accelerator, output_dir, step, values):
    accelerator.log(values, step=step)
    if accelerator.is_main_process:
        with (output_dir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _drop_log_after(path: Path, step: int):
    """A run that was killed logged updates past its last checkpoint; they will be done, and logged, again."""
    if path.is_file():
        rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
        path.write_text("".join(f"{row}\n" for row in rows if json.loads(row)["step"] <= step))


def checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _resume(args, accelerator, output_dir):
    if args.resume_from_checkpoint is None:
        return
    if args.resume_from_checkpoint == "latest":
        found = checkpoints(output_dir)
        if not found:
            return
        folder = found[-1]
    else:
        folder = Path(args.resume_from_checkpoint)
        if not folder.is_dir():
            raise OSError(f"`resume_from_checkpoint` names {folder}, which is not a folder.")
    logger.info(f"Going on from {folder}.")
    accelerator.load_state(str(folder))


def _save_checkpoint(args, accelerator, output_dir, step):
    """Writes beside and then renames, so that a checkpoint under its final name is whole."""
    final, beside = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}"
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        if args.checkpoints_total_limit:
            for old in checkpoints(output_dir)[: -args.checkpoints_total_limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
