"""Checkpoints of a run: which there are and are whole, writing one beside and then renaming it, going on from one.

When one is due is decided in `loop.py`; what is in the finished model's folder lives with each stage.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from arguments import TrainArguments
from interruptions import Votes
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


logger = get_logger(__name__)

MANIFEST = "manifest.json"  # sizes and hashes of all other files; checkpoints of older versions have none
READ_ERRORS = (RuntimeError, ValueError, KeyError, OSError, EOFError, SafetensorError, pickle.UnpicklingError)
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError, CheckpointException)


class Checkpoints:
    """
    The checkpoints of one run, in its `output_dir`. All processes call each method.

    One holds what `accelerator.prepare` and `register_for_checkpointing` were given (model, optimizers, schedules),
    the random number generators of each process, and the objects below: their `state_dict()`, which is made of plain
    containers, numbers, strings and tensors.

    Args:
        args (`TrainArguments`): of the run.
        accelerator (`Accelerator`): of the run.
        votes (`Votes`): by which an error of one process becomes that of all.
        shared (`dict[str, Any]`): objects whose state is the same on all processes.
        per_process (`dict[str, Any]`): objects of which each process has a state of its own.
            Where the number of processes is another, "data" is given the state of process 0, and finds its place or
            refuses it. Of the others those that have an `add_state_dict(state)` are given the states of all processes
            then, on the main one; the rest start anew.
    """

    def __init__(
        self,
        args: TrainArguments,
        accelerator: Accelerator,
        votes: Votes,
        shared: dict[str, Any],
        per_process: dict[str, Any],
    ):
        self.args, self.accelerator, self.votes = args, accelerator, votes
        self.output_dir = Path(args.output_dir)
        self.shared, self.per_process = shared, per_process

    @property
    def num_pictures(self) -> int:
        """Pictures an update, of all processes."""
        args = self.args
        return self.accelerator.num_processes * args.train_batch_size * args.gradient_accumulation_steps

    # ------------------------------------------------------------------------------------------------- writing one

    def save(self, step: int) -> None:
        """
        Writes beside and then renames, so that a checkpoint under its final name is whole; so are those deleted.

        Raises:
            OSError: if it cannot be written, on all processes. What was written is removed; others stay as they are.
        """
        beside = self.output_dir / f".checkpoint-{step}"
        # Before the first file: some states are made by all processes together, and a full disk may stop one.
        states = {name: item.state_dict() for name, item in self.shared.items()}
        _, error = self.votes.attempt(lambda: self._write(beside, states), WRITE_ERRORS)
        if error is None:
            names = sorted({name for own in gather_object([_list_files(beside)]) for name in own})
            hashes, error = self.votes.attempt(lambda: self._hash_own_share(beside, names), WRITE_ERRORS)
        if error is None:
            hashes = dict(gather_object(hashes))
            _, error = self.votes.attempt(lambda: self._finish(beside, step, hashes), WRITE_ERRORS)
        if error is not None:
            if self.accelerator.is_main_process:
                shutil.rmtree(beside, ignore_errors=True)
            raise OSError(f"The checkpoint of update {step} could not be written to {self.output_dir}: {error}")
        _, error = self.votes.attempt(self._delete_oldest, (OSError,))
        if error is not None:
            logger.warning(f"An older checkpoint could not be deleted: {error}")

    def _write(self, beside: Path, states: dict[str, dict]) -> None:
        beside.mkdir(parents=True, exist_ok=True)
        self.accelerator.save_state(str(beside))
        if self.accelerator.is_main_process:
            for name, state in states.items():
                torch.save(state, beside / f"{name}.pt")
        for name, item in self.per_process.items():
            torch.save(item.state_dict(), beside / f"{name}_{self.accelerator.process_index}.pt")

    def _hash_own_share(self, folder: Path, names: list[str]) -> list[tuple[str, list]]:
        """Name, size and hash of this process's share of the files, which are on the disk then."""
        return [(name, hash_file(folder / name, is_synced=True)) for name in self._own_share(names)]

    def _own_share(self, items: list) -> list:
        return items[self.accelerator.process_index :: self.accelerator.num_processes]

    def _finish(self, beside: Path, step: int, hashes: dict[str, list]) -> None:
        if not self.accelerator.is_main_process:
            return
        manifest = {
            "step": step,
            "num_processes": self.accelerator.num_processes,
            "num_pictures": self.num_pictures,
            "files": hashes,
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (beside / MANIFEST, *(path for path in beside.rglob("*") if path.is_dir()), beside):
            _sync(path)
        beside.rename(self.output_dir / f"checkpoint-{step}")
        _sync(self.output_dir)

    def _delete_oldest(self) -> None:
        if self.accelerator.is_main_process and self.args.checkpoints_total_limit is not None:
            for old in list_checkpoints(self.output_dir)[: -self.args.checkpoints_total_limit]:
                shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    # ----------------------------------------------------------------------------------------------- going on from one

    def find(self) -> Path | None:
        """
        The checkpoint to go on from: the one that `resume_from_checkpoint` names, else the newest that is whole.
        Newer ones that are damaged are put aside, with a warning.

        Raises:
            OSError: if the one named is not there.
            ValueError: if it is damaged, or if all are.
        """
        if self.args.resume_from_checkpoint is None:
            return None
        if self.args.resume_from_checkpoint != "latest":
            folder = Path(self.args.resume_from_checkpoint)
            if not folder.is_dir():
                raise OSError(f"`resume_from_checkpoint` names {folder}, which is not a folder.")
            fault = self._find_fault(folder)
            if fault is not None:
                raise ValueError(f"{folder} is damaged ({fault}): name another in `resume_from_checkpoint`.")
            return folder
        # As the main process sees them: a shared file system may show others what was there a while ago.
        found, faults = gather_object([list_checkpoints(self.output_dir)])[0], []
        while found and (fault := self._find_fault(found[-1])) is not None:
            faults.append((found.pop(), fault))
        if faults and not found:
            words = "; ".join(f"{folder} ({fault})" for folder, fault in faults)
            raise ValueError(f"No checkpoint is whole: {words}. Delete them to start anew.")
        for folder, fault in faults:
            aside = folder.with_name(f"damaged-{folder.name}")
            logger.warning(f"{folder} is damaged ({fault}): passed over, and put aside as {aside.name}.")
            if self.accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
        self.accelerator.wait_for_everyone()
        return found[-1] if found else None

    def newest_step(self) -> int:
        """Of the checkpoints that are there; 0 if there are none."""
        found = gather_object([list_checkpoints(self.output_dir)])[0]
        return step_of(found[-1]) if found else 0

    def _find_fault(self, folder: Path) -> str | None:
        """What is wrong with the files of a checkpoint; each process looks at its share."""
        faults = []
        try:
            manifest = read_manifest(folder)
            for name, (size, digest) in self._own_share(sorted(manifest["files"].items()) if manifest else []):
                path = folder / name
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    faults.append(f"{name} " + ("is missing" if found is None else f"has {found} bytes, not {size}"))
                elif hash_file(path) != [size, digest]:
                    faults.append(f"the bytes of {name} have changed")
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{MANIFEST}: {error}")
        return next(iter(gather_object(faults)), None)

    def load(self, folder: Path) -> None:
        """
        Goes on from a checkpoint that is whole.

        Raises:
            ValueError: if it does not fit the run.
        """
        manifest = read_manifest(folder)
        if manifest is not None:
            self._check_number_of_pictures(folder, manifest)
        try:
            for path in sorted(folder.glob("custom_checkpoint_*.pkl")):
                # Accelerate unpickles these whatever they say: what is more than tensors and numbers is refused first.
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            self.accelerator.load_state(str(folder))
        except READ_ERRORS as error:
            damaged = "" if manifest else "damaged, or "
            raise ValueError(
                f"{folder} is {damaged}of a run with another model or other settings: choose another `output_dir`, or"
                f" name another checkpoint in `resume_from_checkpoint`. ({str(error)[:300]})"
            ) from error
        if manifest is None:
            return
        for name, item in self.shared.items():
            self._load_part(folder / f"{name}.pt", item.load_state_dict)
        for name, item in self.per_process.items():
            if manifest["num_processes"] == self.accelerator.num_processes:
                self._load_part(folder / f"{name}_{self.accelerator.process_index}.pt", item.load_state_dict)
            elif name == "data":
                self._load_part(folder / f"{name}_0.pt", item.load_state_dict)
            elif self.accelerator.is_main_process and hasattr(item, "add_state_dict"):
                for index in range(manifest["num_processes"]):
                    self._load_part(folder / f"{name}_{index}.pt", item.add_state_dict)

    def _load_part(self, path: Path, load: Callable[[dict], None]) -> None:
        if not path.is_file():
            logger.warning(f"{path.parent} has no {path.name}, from before that was in use: it starts anew.")
            return
        try:
            load(torch.load(path, map_location="cpu", weights_only=True))
        except READ_ERRORS as error:
            raise ValueError(f"{path} does not fit the settings of this run: {error}") from error

    def _check_number_of_pictures(self, folder: Path, manifest: dict) -> None:
        expected = manifest["num_pictures"]
        if expected == self.num_pictures:
            return
        num_processes, batch_size = self.accelerator.num_processes, self.args.train_batch_size
        steps, rest = divmod(expected, num_processes * batch_size)
        change = f"set `gradient_accumulation_steps: {steps}`"
        if rest or not steps:
            change = f"choose a number of processes and a `train_batch_size` whose product divides {expected}"
        raise ValueError(
            f"{folder} is of a run with {expected} pictures an update, and this one has {self.num_pictures}:"
            f" {num_processes} processes x `train_batch_size` {batch_size} x `gradient_accumulation_steps`"
            f" {self.args.gradient_accumulation_steps}. To go on in the same order, {change}."
        )

    def clean(self) -> None:
        """Takes away half a checkpoint that a killed run left."""
        if self.accelerator.is_main_process:
            for path in self.output_dir.glob(".checkpoint-*"):
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()


def _list_files(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The number of updates in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def read_manifest(folder: Path) -> dict | None:
    """What a checkpoint says of itself; `None` for one of an older version."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else None


def hash_file(path: Path, is_synced: bool = False) -> list:
    """Size and SHA-256 of a file; with `is_synced` it is on the disk when this returns."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if is_synced:
            os.fsync(file.fileno())
        return [file.tell(), digest]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def settings_of_today(optimizers: list, schedules: list) -> Iterator[None]:
    """A checkpoint brings the optimizers' settings of its day; after the block those from before it hold again."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    yield
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, today in zip(groups, settings, strict=True):
        group.update(today)
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, ratio in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["lr"] = group["initial_lr"] * ratio(schedule.last_epoch)
