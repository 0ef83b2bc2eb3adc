"""The order of a training run, the same for every stage: from the newest checkpoint through updates to a model.

A stage (see `train_dvae.py`, `train_prior.py`) brings the model, the data, the loss, the validation and the saving.
Here are no files (`checkpointing.py`, `reporting.py`), batches (`loading.py`), signals (`interruptions.py`).
"""

import copy
import math
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from arguments import TrainArguments
from checkpointing import Checkpoints, settings_of_today
from interruptions import Stopped, StopSignals, Votes
from loading import SkippedRows, make_loader
from machines import ShardedEMA, gather_model, is_sharded, make_power_sgd, use_autocast
from optimizers import make_gradient_scaler, make_optimizers, make_schedules
from PIL import Image
from reporting import Reporter
from safetensors.torch import save_file
from torch.utils.data import Dataset

from hf_dalle.data import CaptionImageCollator
from hf_dalle.power_sgd import SummedErrors


logger = get_logger(__name__)

# A full disk may be cleared while training goes on: what is lost by waiting is what a stop would lose. Not for ever.
MAX_FAILED_CHECKPOINTS = 3
# With gradient scales a skipped update of a finite loss is their way down: a resblock's from 2^13 to 2^7 takes 1,376.
MAX_OVERFLOWS = 1500


class Stage(Protocol):
    """What the loop asks of a stage; one that gathers nothing from batch to batch has no `state_dict`."""

    model: torch.nn.Module
    train_dataset: Dataset
    collator: CaptionImageCollator

    def parameter_groups(self) -> list[dict]:
        """Groups for `optimizers.make_optimizers`; a group without "lr" gets the run's."""

    def compute_loss(self, model: torch.nn.Module, batch: dict, step: int) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of one batch at one update, and numbers to log."""

    def validate(self, model: torch.nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        """Figures and pictures of the model as it stands."""

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Writes what a user loads."""

    def state_dict(self) -> dict:
        """What `compute_loss` gathers for the next validation, of this process."""

    def load_state_dict(self, state: dict) -> None:
        """Goes on from there."""


class Progress:
    """Where a run is, as an object that checkpoints can hold."""

    def __init__(self):
        self.step = 0  # updates done, those skipped among them
        self.learning_rate = 0.0  # of the last of them
        self.is_concluded = True  # whether what was due after it (row, validation) is done
        self.is_checkpoint_due = False  # one was held back while updates were skipped
        self.num_skipped = 0  # updates skipped in all
        self.num_nonfinite = 0  # of the last in succession: for a loss or gradient that is no number
        self.num_overflows = 0  # and for a gradient that was scaled too high

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict):
        vars(self).update(state)


def run(args: TrainArguments, accelerator: Accelerator, stage: Stage) -> None:
    """
    Trains `stage` to the end of `args`, going on from its newest checkpoint that is whole, and saves the model.

    Raises:
        Stopped: after a signal to stop; the last update is in a checkpoint.
        ValueError: for a checkpoint that does not fit, or too many updates in succession that could not be made.
        OSError: for a checkpoint that is not there or cannot be written, or data that is gone; what was done by then
            is in a checkpoint.
    """
    with StopSignals() as signals:
        Run(args, accelerator, stage, signals).train()


class Run:
    """One run: what trains, and what is done with it in which order."""

    def __init__(self, args: TrainArguments, accelerator: Accelerator, stage: Stage, signals: StopSignals):
        self.args, self.accelerator, self.stage, self.signals = args, accelerator, stage, signals
        self.output_dir, self.votes, self.saved_step = Path(args.output_dir), Votes(accelerator), None
        self.num_failed_checkpoints = 0  # in succession
        # 1. What makes an update.
        self.scaler = make_gradient_scaler(args, stage.model)
        self.optimizers = make_optimizers(args, stage.parameter_groups())
        self.schedules, self.plateau = make_schedules(args, self.optimizers)
        use_autocast(accelerator, stage.model)
        self.model, *self.optimizers = accelerator.prepare(stage.model, *self.optimizers)
        power_sgd = make_power_sgd(args, self.model, self.scaler)
        # A frozen model around an adapter has no average.
        own = accelerator.unwrap_model(self.model).parameters()
        self.parameters = [parameter for parameter in own if parameter.requires_grad]
        self.ema = ShardedEMA(self.parameters, decay=args.ema_decay, foreach=True) if args.use_ema else None
        # 2. What it is made of, and what is told of it.
        self.loader = make_loader(args, stage, accelerator.process_index, accelerator.num_processes)
        self.skipped_rows = SkippedRows(args.output_dir, args.max_skipped_share)
        self.reporter, self.progress = Reporter(args, accelerator), Progress()
        # 3. All that determines what comes next is in the checkpoints.
        registered = (self.progress, *self.schedules, self.ema)
        accelerator.register_for_checkpointing(*(item for item in registered if item is not None))
        summed_errors = SummedErrors(power_sgd) if power_sgd is not None else None
        shared = {"scaler": self.scaler, "plateau": self.plateau, "skipped_rows": self.skipped_rows}
        # The sum is loaded first; with as many processes as before, each one's own part then takes its place.
        shared |= {"power_sgd_sum": summed_errors}
        each = {"data": self.loader, "row": self.reporter, "power_sgd": power_sgd}
        each |= {"stage": stage if hasattr(stage, "state_dict") else None}
        states = ({name: item for name, item in items.items() if item is not None} for items in (shared, each))
        self.checkpoints = Checkpoints(args, accelerator, self.votes, *states)

    def train(self) -> None:
        """From the newest checkpoint to the saved model."""
        args, progress = self.args, self.progress
        # 1. Where it was.
        self._go_on()
        self.reporter.start(progress.step, progress.is_concluded)
        if args.eval_on_start and progress.step == 0:
            self.reporter.write(0, self._validate())
        self.reporter.restart_clock()
        if not progress.is_concluded:
            self._conclude()
        # 2. Updates, and what is due after some of them.
        with closing(self.skipped_rows.watch(iter(self.loader))) as self.batches:
            while progress.step < args.max_train_steps:
                self._update()
                self._stop_if_asked()
                if self._conclude():
                    self._stop_if_asked()
        self.reporter.close()
        # 3. The model.
        with self._averaged():
            model = gather_model(self.accelerator, self.model)
            if self.accelerator.is_main_process:
                self.stage.save(model, self.output_dir)
        self.accelerator.end_training()

    # ------------------------------------------------------------------------------------------------------ an update

    def _update(self) -> None:
        """One optimizer step over `gradient_accumulation_steps` batches, or none where a gradient is no number."""
        args, accelerator, progress = self.args, self.accelerator, self.progress
        self.model.train()
        before, batches, logged = _StateBefore(self), [], []
        for index in range(args.gradient_accumulation_steps):
            batches.append(self._read_batch(before))
            is_last = index == args.gradient_accumulation_steps - 1
            with nullcontext() if is_last else accelerator.no_sync(self.model):
                loss, logs = self.stage.compute_loss(self.model, batches[-1], progress.step)
                logged.append({**logs, "loss": loss.detach()})
                # All gradients of a loss that is no number are none either: so every process comes to know of it.
                loss = loss * torch.where(loss.isfinite(), 1.0, math.nan)
                accelerator.backward(self.scaler.scale_loss(loss) / args.gradient_accumulation_steps)
        is_finite, norm = self._clip_gradients()
        if is_finite:
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        if self.scaler.is_scaling:
            self.scaler.update()
        progress.learning_rate = self.optimizers[0].param_groups[0]["lr"]
        for schedule in self.schedules:
            schedule.step()
        progress.step, progress.is_concluded = progress.step + 1, False
        if self.ema is not None and progress.step % args.ema_update_steps == 0:
            self.ema.step(self.parameters)
        self.reporter.advance()
        if not is_finite:
            before.restore_buffers()
            self._count_skipped(batches, logged, norm)
            return
        progress.num_nonfinite = progress.num_overflows = 0
        self._log(logged)
        self.reporter.add({"grad_norm": norm})

    def _log(self, logged: list[dict[str, Any]]) -> None:
        for logs in logged:
            self.reporter.add(logs, self.args.train_batch_size * self.accelerator.num_processes)

    def _read_batch(self, before: "_StateBefore") -> dict[str, torch.Tensor]:
        """The next batch. Data that is gone, on whatever process, ends the run as it was before this update."""
        batch, error = self.votes.attempt(lambda: next(self.batches), (OSError, ValueError))
        if error is not None:
            before.restore()
            self._save_checkpoint(is_last=True)
            raise error
        return {key: value.to(self.accelerator.device, non_blocking=True) for key, value in batch.items()}

    def _clip_gradients(self) -> tuple[bool, float]:
        """Whether all gradients are finite, the same on all processes, and their norm before it was clipped."""
        if self.scaler.is_scaling and not self.scaler.unscale():
            return False, math.nan
        limit = math.inf if self.args.max_grad_norm is None else self.args.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards
        norm = float(norm)  # the one time an update is waited for
        return math.isfinite(norm), norm

    def _count_skipped(self, batches: list[dict], logged: list[dict[str, Any]], norm: float) -> None:
        """Ends the run, the batch saved, where skipping has not helped for so long that it will not."""
        progress, own_loss = self.progress, torch.stack([logs["loss"] for logs in logged]).mean().item()
        progress.num_skipped += 1
        if math.isfinite(own_loss):
            self._log(logged)
        wrong = [loss for loss in gather_object([own_loss]) if not math.isfinite(loss)]
        what = f"loss is {wrong[0]}" if wrong else f"grad_norm is {norm}"
        if self.scaler.is_scaling and not wrong:
            progress.num_overflows += 1
        else:
            progress.num_nonfinite += 1
            logger.warning(f"{what} at update {progress.step}, which is skipped ({progress.num_skipped} in all).")
        if progress.num_nonfinite < self.args.max_nonfinite_updates and progress.num_overflows < MAX_OVERFLOWS:
            return
        name = f"nonfinite-batch-{progress.step}-{self.accelerator.process_index}.safetensors"
        tensors = {key: torch.cat([batch[key] for batch in batches]).cpu().contiguous() for key in batches[0]}
        save_file(tensors, self.output_dir / name, {"step": str(progress.step), "loss": str(own_loss)})
        raise ValueError(
            f"{what} at update {progress.step}, and {max(progress.num_nonfinite, progress.num_overflows)} updates in"
            f" succession had to be skipped. Lower `learning_rate` or `max_grad_norm`, or lengthen `lr_warmup_steps`;"
            f" the last batch of each process is in {self.output_dir}/nonfinite-batch-*.safetensors. The same command"
            " goes on from the newest checkpoint, from before this."
        )

    # --------------------------------------------------------------------------------------------- between two updates

    def _conclude(self) -> bool:
        """What is due after an update: a row of the log, a validation, a checkpoint. Gives whether something was."""
        args, progress = self.args, self.progress
        is_last, values = progress.step == args.max_train_steps, {}
        is_due = progress.step % args.checkpointing_steps == 0 or is_last or progress.is_checkpoint_due
        # Weights that give no numbers must not push those out that do.
        is_checkpoint = is_due and (progress.num_nonfinite == 0 or is_last)
        progress.is_checkpoint_due = is_due and not is_checkpoint
        is_row = progress.step % args.logging_steps == 0 or is_checkpoint  # a checkpoint ends a row of the log
        is_validation = progress.step % args.validation_steps == 0 or is_last
        if is_row:
            values = {"lr": progress.learning_rate, **self.reporter.read()}
            values["skipped_rows"] = self.skipped_rows.gather(self.accelerator)
            values["skipped_updates"] = progress.num_skipped
            if self.plateau is not None and "loss" in values:
                self.plateau.observe(values["loss"], progress.step)
        if is_validation:
            values |= self._validate()
        if values:
            self.reporter.write(progress.step, values)
        progress.is_concluded = True
        if is_checkpoint:
            self._save_checkpoint(is_last)
        if is_row or is_validation:
            self.reporter.restart_clock()
        return is_row or is_validation

    def _stop_if_asked(self) -> None:
        """After a signal on any process: a checkpoint as things are, and the end."""
        number = self.votes.highest(self.signals.received)
        # An update that was no number has no checkpoint: the next that is one does, or too many end the run.
        if not number or self.progress.num_nonfinite:
            return
        self._save_checkpoint(is_last=True)
        self.reporter.close()
        self.accelerator.end_training()
        logger.info(f"Stopped after update {self.progress.step}; the same command goes on.")
        raise Stopped(number)

    def _save_checkpoint(self, is_last: bool) -> None:
        """One that cannot be written is tried again when the next is due; the last of a run has no next."""
        if self.saved_step == self.progress.step:
            return
        self.skipped_rows.collect(self.accelerator)
        try:
            self.checkpoints.save(self.progress.step)
        except OSError as error:
            self.num_failed_checkpoints += 1
            stays = (
                "There is none so far" if self.saved_step is None else f"That of {self.saved_step} stays the newest"
            )
            if is_last or self.num_failed_checkpoints == MAX_FAILED_CHECKPOINTS:
                raise OSError(f"{error}. {stays}: make room, and the same command goes on from there.") from error
            logger.warning(f"{error}. {stays}. Training goes on, and tries again when the next is due: make room.")
        else:
            self.saved_step, self.num_failed_checkpoints = self.progress.step, 0
            self.accelerator.wait_for_everyone()

    def _validate(self) -> dict[str, float]:
        """Writes the stage's pictures and returns its figures, on the main process; the others wait."""
        values, model = {}, self.accelerator.unwrap_model(self.model)
        is_main = self.accelerator.is_main_process
        with self._averaged():
            if is_main or is_sharded(model):  # a forward pass of a sharded model takes all processes
                model.eval()
                with torch.no_grad():
                    values, pictures = self.stage.validate(model)
            if is_main:
                self.reporter.write_pictures(self.progress.step, pictures)
        self.accelerator.wait_for_everyone()
        return values

    @contextmanager
    def _averaged(self):
        """The moving average in the model's place, while the block lasts."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    # ------------------------------------------------------------------------------------------------------- going on

    def _go_on(self) -> None:
        """Loads the checkpoint to go on from, if there is one."""
        folder = self.checkpoints.find()
        if folder is not None:
            # Only LoRA freezes weights; a checkpoint holds them too, and would put its own base in place of today's.
            frozen = [
                (weight, weight.detach().clone()) for weight in self.model.parameters() if not weight.requires_grad
            ]
            with settings_of_today(self.optimizers, self.schedules):
                self.checkpoints.load(folder)
            if not all(torch.equal(weight, today) for weight, today in frozen):
                raise ValueError(f"The base of {folder} is not `init_from`: choose another `output_dir`.")
            if not (folder / "manifest.json").is_file():  # of an older version, whose data was rows by number
                self.loader.skip_batches(self.progress.step * self.args.gradient_accumulation_steps)
            if folder.parent == self.output_dir:
                self.saved_step = self.progress.step
            logger.info(f"Going on from {folder}, update {self.progress.step} of {self.args.max_train_steps}.")
        newest = self.checkpoints.newest_step()
        if newest > self.progress.step:
            raise ValueError(
                f"{self.output_dir}/checkpoint-{newest} is of an earlier run, which one that starts at update"
                f" {self.progress.step} would get mixed up with. Delete it, or choose another `output_dir`."
            )
        self.checkpoints.clean()
        if self.ema is not None:
            self.ema.decay = self.args.ema_decay
            self.ema.to(self.accelerator.device)


class _StateBefore:
    """What an update changes before its step, for one that is not made: buffers, random numbers, place in the data."""

    def __init__(self, run: Run):
        self.buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
        self.cuda = torch.cuda.get_rng_state() if run.accelerator.device.type == "cuda" else None
        self.cpu = torch.get_rng_state()
        items = [run.loader, run.skipped_rows, *([run.stage] if hasattr(run.stage, "state_dict") else [])]
        self.states = [(item, copy.deepcopy(item.state_dict())) for item in items]

    def restore_buffers(self) -> None:
        """A codebook's moving averages, for one: what is no number must not stay in them."""
        for buffer, value in self.buffers:
            buffer.copy_(value)

    def restore(self) -> None:
        self.restore_buffers()
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)
        for item, state in self.states:
            item.load_state_dict(state)
