"""What may cut a run short between two updates, and how all processes come to know it: signals, and votes.

What is saved then, and when, is decided in `loop.py`.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator


# What schedulers send before they kill: SIGTERM (also on preemption), SIGUSR1 (Slurm's `--signal=USR1@300`).
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# A scheduler that signals every process of a job reaches a worker of torchrun twice: torchrun passes its own on.
SECONDS_OF_COPIES = 10


class Stopped(Exception):
    """The run was asked to end by a signal, and has: all is saved."""

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        super().__init__(signal.Signals(signal_number).name)

    def end_process(self) -> None:
        """Ends as the signal does by default, which a shell shows as 128 + its number: 143 for SIGTERM."""
        sys.stdout.flush()
        signal.signal(self.signal_number, signal.SIG_DFL)
        os.kill(os.getpid(), self.signal_number)


class StopSignals:
    """
    Notes the first of `STOP_SIGNALS` while the block lasts, in `received` (0: none). Of those that follow, the first
    within 10 seconds is taken for torchrun's copy; any other ends the process at once.
    """

    def __enter__(self) -> "StopSignals":
        self.received, self._ending, self._before = 0, None, {}
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received == 0:
            self.received, self._ending = number, time.monotonic() + SECONDS_OF_COPIES
            return
        is_copy = self._ending is not None and time.monotonic() < self._ending
        self._ending = None
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, signal.SIG_DFL)
        if not is_copy:
            os.kill(os.getpid(), number)


def heed_parent_alone(worker_id: int = 0) -> None:
    """
    For the workers of a loader (`worker_init_fn`): of the stop signals only those of the process that started them end
    them. One to all processes of a job must not take away the batches of the update that is to be finished.
    """
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # also for the thread, which then takes them
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo(STOP_SIGNALS).si_pid != os.getppid():
        pass
    os._exit(0)


class Votes:
    """Lets each process know what any of them has noted, by a group of their own that no accelerator waits for."""

    def __init__(self, accelerator: Accelerator):
        is_alone = accelerator.num_processes == 1 or not torch.distributed.is_initialized()
        self.group = None if is_alone else torch.distributed.new_group(backend="gloo")

    def highest(self, value: int) -> int:
        """The highest value of all processes, all of which must call it."""
        if self.group is None:
            return value
        value = torch.tensor(value)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX, group=self.group)
        return value.item()

    def attempt(
        self, call: Callable[[], Any], errors: tuple[type[BaseException], ...]
    ) -> tuple[Any, Exception | None]:
        """What `call` returns, and the error if it raised one of `errors` on any process: a ValueError or OSError."""
        result, failure = None, None
        try:
            result = call()
        except errors as error:
            words = str(error).strip() or type(error).__name__
            if "Traceback" in words:  # of a loader's worker: the error's kind and words come last
                words = words.splitlines()[-1].split(": ", 1)[-1]
            failure = isinstance(error, ValueError), words
        if not self.highest(int(failure is not None)):
            return result, None
        failures = [failure]
        if self.group is not None:
            failures = [None] * torch.distributed.get_world_size(self.group)
            torch.distributed.all_gather_object(failures, failure, group=self.group)
        is_value_error, words = next(failure for failure in failures if failure is not None)
        return result, (ValueError if is_value_error else OSError)(words)
