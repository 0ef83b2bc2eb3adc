"""How the benchmarks measure: rounds in which contenders take turns, medians, ratios, memory bandwidth, tables.

What is timed lives in the scripts beside this file; the contenders that other projects made live in `peers.py`.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass
class Figure:
    """
    A row of a script's table.

    Args:
        name (`str`): what was measured.
        measured (`str` or `float`): a float is a ratio and printed with two decimals.
        goal (`str` or `float`): what is to be reached, at most.
        bound (`str`): what keeps it from being lower.
    """

    name: str
    measured: str | float
    goal: str | float = ""
    bound: str = ""


def add_timing_arguments(parser: argparse.ArgumentParser, num_rounds: int = 5) -> None:
    """The options that every timed script has."""
    parser.add_argument("--num_threads", type=int, default=None, help="threads of torch; by default its own choice")
    parser.add_argument("--num_rounds", type=int, default=num_rounds, help="rounds, in each of which all take turns")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, not how fast")


def set_threads(num_threads: int | None) -> int:
    """Sets torch's threads where a number is given; returns how many there are."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()


def time_in_turns(
    contenders: dict[str, Callable[[], object]], num_rounds: int = 5, num_warmups: int = 1
) -> dict[str, list[float]]:
    """
    Times functions in rounds, each once a round, so that what slows the machine for a while slows all of them.

    Args:
        contenders (`dict[str, Callable]`): functions without arguments, by name.
        num_rounds (`int`): how often each is timed.
        num_warmups (`int`): how often each runs before that, untimed.

    Returns:
        `dict[str, list[float]]`: seconds, one a round, for each name.
    """
    for _ in range(num_warmups):
        for contender in contenders.values():
            contender()
    seconds = {name: [] for name in contenders}
    is_collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whose turn it is
    try:
        for _ in range(num_rounds):
            for name, contender in contenders.items():
                start = time.perf_counter()
                contender()
                seconds[name].append(time.perf_counter() - start)
            gc.collect()
    finally:
        if is_collecting:
            gc.enable()
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over rounds of the ratio of two contenders' seconds in the same round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def measure_bandwidth(num_bytes: int = 2**29, num_rounds: int = 5) -> float:
    """Bytes a second at which all threads read memory: the best of some sums over a tensor that no cache holds."""
    values = torch.ones(num_bytes // 4)
    values.sum()
    best = 0.0
    for _ in range(num_rounds):
        start = time.perf_counter()
        values.sum()
        best = max(best, 4 * len(values) / (time.perf_counter() - start))
    return best


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def format_figures(figures: Sequence[Figure]) -> str:
    """The figures of a script as a markdown table."""

    def show(value: str | float) -> str:
        return value if isinstance(value, str) else f"{value:.2f}"

    rows = [(figure.name, show(figure.measured), show(figure.goal), figure.bound) for figure in figures]
    return format_table(("figure", "measured", "reach", "bound"), rows)


def format_bytes(num_bytes: float) -> str:
    """A number of bytes with three digits or so: 1.24 GB is 1.24e9 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes < 1000 * size else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes:.0f} B"
