"""What a run shows while it trains: the progress bar, rows of figures and pictures, in files and in trackers.

When a row is due is decided in `loop.py`; what its figures mean lives in `train_dvae.py` and `train_prior.py`.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from arguments import TrainArguments
from PIL import Image
from tqdm.auto import tqdm


logger = get_logger(__name__)


class Reporter:
    """
    The bar, `metrics.jsonl`, `validation/*.png` and the trackers of one run.

    What cannot be written, on a full disk say, is kept and tried again with the next row; training goes on.
    """

    def __init__(self, args: TrainArguments, accelerator: Accelerator):
        self.accelerator, self.output_dir = accelerator, Path(args.output_dir)
        self.max_train_steps = args.max_train_steps
        self.meter = Meter(accelerator.device)
        self.unwritten_rows: list[str] = []
        self.unwritten_pictures: dict[Path, Image.Image] = {}

    def start(self, step: int, is_concluded: bool = True) -> None:
        """
        Opens the bar at update `step`; rows of later updates, which a killed run left, are taken away, and that of
        this one where it is still to be written.
        """
        self.bar = tqdm(
            total=self.max_train_steps, initial=step, disable=not self.accelerator.is_main_process, unit="step"
        )
        path = self.output_dir / "metrics.jsonl"
        if self.accelerator.is_main_process and path.is_file():
            rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
            beside = self.output_dir / ".metrics.jsonl"
            beside.write_text(
                "".join(f"{row}\n" for row in rows if json.loads(row)["step"] < step + is_concluded and step)
            )
            beside.replace(path)

    def add(self, logs: dict[str, Any], num_pictures: int = 0) -> None:
        """Adds numbers of one batch or update to the row to come; `num_pictures` are those of all processes."""
        self.meter.add(logs, num_pictures)

    def advance(self) -> None:
        """One update is done."""
        self.bar.update()

    def read(self) -> dict[str, float]:
        """The means since the last reading, over all processes (all of which call this), on the bar too."""
        values = self.meter.read()
        shown = {name: f"{value:.4g}" for name, value in values.items() if name.endswith("loss")}
        shown["pictures/s"] = f"{values['pictures_per_second']:.3g}"
        self.bar.set_postfix({**shown, "memory": f"{values['memory_gb']:.3g} GB"})
        return values

    def write(self, step: int, values: dict[str, float]) -> None:
        """One row: `values` of update `step`."""
        self._try(lambda: self.accelerator.log(values, step=step))
        if self.accelerator.is_main_process:
            self.unwritten_rows.append(json.dumps({"step": step, **values}) + "\n")
            self._write_what_is_kept()

    def write_pictures(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Pictures of a validation, on the main process."""
        for name, picture in pictures.items():
            self.unwritten_pictures[self.output_dir / "validation" / f"{name}-{step:07d}.png"] = picture
            for tracker in self.accelerator.trackers:
                self._try(lambda tracker=tracker, name=name, shown=picture: send_picture(tracker, name, shown, step))
        self._write_what_is_kept()

    def _write_what_is_kept(self) -> None:
        path = self.output_dir / "metrics.jsonl"
        if self.unwritten_rows and self._try(lambda: append_whole(path, "".join(self.unwritten_rows))):
            self.unwritten_rows.clear()
        for path, picture in list(self.unwritten_pictures.items()):
            if self._try(lambda path=path, picture=picture: save_whole(path, picture)):
                del self.unwritten_pictures[path]

    def _try(self, write) -> bool:
        try:
            write()
        except OSError as error:
            logger.warning_once(f"What the run shows cannot be written; it is kept and tried again later. ({error})")
            return False
        return True

    def restart_clock(self) -> None:
        """Leaves out what passed since the last reading: validations and checkpoints are not training."""
        self.meter.restart_clock()

    def close(self) -> None:
        self._write_what_is_kept()
        self.bar.close()

    def state_dict(self) -> dict:
        """This process's part of the row to come, exactly: a run that goes on logs what one never stopped would."""
        return self.meter.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.meter.load_state_dict(state)

    def add_state_dict(self, state: dict) -> None:
        """Adds that of a process which is there no more."""
        self.meter.add_state_dict(state)


class Meter:
    """Means of what was logged since the last reading over all processes, pictures a second, memory of a process."""

    def __init__(self, device: torch.device | None = None):
        self.device = device or torch.device("cpu")
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
        """The row: means by name, `pictures_per_second` of all processes, `memory_gb` of the one that takes most."""
        own = {key: (float(value), self.counts[key]) for key, value in self.sums.items()}
        totals, memory = {}, []
        for logged, num_bytes in gather_object([(own, read_memory(self.device))]):
            memory.append(num_bytes)
            for key, pair in logged.items():
                totals.setdefault(key, []).append(pair)
        values = {}
        for key, pairs in totals.items():
            sums, counts = zip(*pairs, strict=True)
            values[key] = sum(sums) / sum(counts)
        values["pictures_per_second"] = self.pictures / max(time.perf_counter() - self.started, 1e-9)
        values["memory_gb"] = max(memory) / 1e9
        self.sums, self.counts = {}, {}
        self.restart_clock()
        return values

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])

    def add_state_dict(self, state: dict) -> None:
        for key, value in state["sums"].items():
            self.sums[key] = self.sums.get(key, 0) + value
            self.counts[key] = self.counts.get(key, 0) + state["counts"][key]


def read_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took so far on an accelerator that counts them, else what the process has now."""
    if device.type != "cpu":
        count = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        if count is not None:
            return count(device)
    return psutil.Process().memory_info().rss


def tracker_options(args: TrainArguments) -> dict[str, dict]:
    """What trackers of Accelerate are started with: a run that goes on adds to what it has shown so far."""
    return {"trackio": {"name": Path(args.output_dir).resolve().name, "resume": "allow"}}


def send_picture(tracker: Any, name: str, picture: Image.Image, step: int) -> None:
    """To one tracker of Accelerate, where it takes pictures."""
    name = f"validation/{name}"
    if tracker.name == "tensorboard":
        array = np.asarray(picture.convert("RGB"))[None]  # H x W x 3 -> 1 x H x W x 3
        tracker.log_images({name: array}, step=step, dataformats="NHWC")
    elif tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(picture)}, step=step)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({name: picture if tracker.name == "aim" else [picture]}, step=step)


def append_whole(path: Path, text: str) -> None:
    """Appends all of `text`, or nothing and raises an `OSError`."""
    with path.open("ab", buffering=0) as file:
        start, rest = file.tell(), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(start)
            raise


def save_whole(path: Path, picture: Image.Image) -> None:
    """Writes beside and then renames: a picture under its name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    try:
        picture.save(beside, "PNG")
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    beside.replace(path)
