"""What tests of runs that end early share: processes that start in no time, forked from one that has imported all.

Each is a process of its own, in a group of its own, that can be killed; several may be ranks of one run.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

from tiny_training import ROOT, write_settings
from tqdm import tqdm


def call_in_process(function, args: tuple, output: Path, environment: dict[str, str]) -> None:
    """In the new process: `function(*args)`, with what it prints in a file."""
    os.setsid()
    with output.open("a") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
    os.environ.update(environment)
    tqdm.set_lock(
        threading.RLock()
    )  # by default one of all that were forked: a process killed with it stops the others
    function(*args)


def run_script(argv: list[str]) -> None:
    """`training/train.py` as a user starts it."""
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def fork(
    function, *args, output: Path, environment: dict[str, str] | None = None, preload: str = "train"
) -> multiprocessing.Process:
    """
    Starts `function(*args)` of a test module; `exitcode` is the signal's number, negative, where one ended it. What
    the first call says to `preload` is imported once for all.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    rooms = [str(ROOT / room) for room in ("src", "training", "tests")]
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*rooms, *([before] if before else [])])  # the server's, read once
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    process = context.Process(target=call_in_process, args=(function, args, output, environment or {}))
    process.start()
    return process


def fork_run(settings: dict, *options: str, environment: dict[str, str] | None = None) -> multiprocessing.Process:
    """Starts `train.py` with these settings; its output is in `OUTPUT_DIR.txt`."""
    argv = [str(ROOT / "training" / "train.py"), str(write_settings(settings)), *options]
    return fork(run_script, argv, output=Path(settings["output_dir"]).with_suffix(".txt"), environment=environment)


def make_ranks(num_processes: int) -> list[dict[str, str]]:
    """The environment that torchrun gives each of its processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]


def fork_ranks(settings: dict, num_processes: int, *options: str) -> list[multiprocessing.Process]:
    """Starts the ranks of one run."""
    return [fork_run(settings, *options, environment=environment) for environment in make_ranks(num_processes)]


def finish(*processes: multiprocessing.Process, timeout: float = 300) -> list[int]:
    """Waits for the end of each; gives their exit codes. None outlives it."""
    deadline = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return codes


def wait_until(is_so, *processes: multiprocessing.Process, timeout: float = 300) -> None:
    """Waits for `is_so()` while the processes run."""
    deadline = time.monotonic() + timeout
    while not is_so():
        assert all(process.is_alive() for process in processes), [process.exitcode for process in processes]
        assert time.monotonic() < deadline
        time.sleep(0.005)
