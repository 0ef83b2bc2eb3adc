"""A function of a test in several processes that talk by gloo, forked: they need not import what the test has."""

import os
from collections.abc import Callable

import torch
import torch.multiprocessing as mp
from tiny_processes import make_ranks


def run_ranks(function: Callable, *arguments, num_processes: int = 2) -> None:
    """Runs `function(*arguments)` in each with the environment that torchrun gives; raises what one of them raises."""
    environments = make_ranks(num_processes)
    mp.start_processes(_start, (function, arguments, environments), num_processes, start_method="fork")


def _start(rank: int, function: Callable, arguments: tuple, environments: list[dict[str, str]]) -> None:
    torch.set_num_threads(1)  # a forked process cannot use its parent's threads
    os.environ.update(environments[rank])
    function(*arguments)
