"""The processes of an evaluation: which this one is, and how all come to hold what the main one finds.

What they compute together, and how that is stored, is `frame.py`'s.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from tqdm.auto import tqdm


def make_accelerator() -> Accelerator:
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # said outright, or processes that torchrun starts would not join
        # The others wait while one draws its last batch, or the main process does the sums.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )


class Processes:
    """
    This process among all.

    Attributes:
        is_main (`bool`), num_processes, process_index (`int`), device.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.device, self.is_main = accelerator, accelerator.device, accelerator.is_main_process
        self.num_processes, self.process_index = accelerator.num_processes, accelerator.process_index

    def share(self, items: Sequence) -> Sequence:
        """This process's part of items that all processes hold alike."""
        return items[self.process_index :: self.num_processes]

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def from_main(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on the main process (anything that pickles), on all; so are its errors."""
        value = error = None
        if self.is_main:
            try:
                value = function()
            except (ValueError, OSError) as caught:
                error = caught
        value, error = broadcast_object_list([value, error])
        if error is not None:
            raise error
        return value

    def on_main_first(self, function: Callable[[], Any]) -> Any:
        """What `function` gives on each process; the main one calls it before the others, who find what it made."""
        values = []
        self.from_main(lambda: values.append(function()))
        return values[0] if self.is_main else function()

    def progress(self, items: Iterable, words: str, unit: str = "batch") -> tqdm:
        """The items under a progress bar, which the main process shows."""
        return tqdm(items, desc=words, unit=unit, disable=not self.is_main)
