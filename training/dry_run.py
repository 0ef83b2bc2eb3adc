"""`train.py CONFIG.yaml --dry-run`: what a run would take, printed before anything is held, trained or written.

For the processes at hand or for imagined ones. How the numbers come about lives in `estimates.py`.
"""

import argparse
import math
import os
from pathlib import Path

from arguments import TrainArguments, parse_arguments
from estimates import Machines, estimate
from settings_file import read_yaml


def main(argv: list[str]) -> None:
    """Prints the tables; `argv` is that of `train.py`, with `--dry-run` and the options of [`read_machines`]."""
    machines, rest = read_machines(argv)
    args = parse_arguments(rest)
    if int(os.environ.get("RANK", 0)) == 0:
        print(format_plan(args, machines, estimate(args, machines)))


def is_asked(argv: list[str]) -> bool:
    return "--dry-run" in argv or "--dry_run" in argv


def read_machines(argv: list[str]) -> tuple[Machines, list[str]]:
    """
    The imagined machines, and what of `argv` is left for the settings.

    Raises:
        ValueError: for numbers that make no machine, or a file of Accelerate's that this does not count.
    """
    parser = argparse.ArgumentParser(prog="train.py CONFIG.yaml --dry-run", add_help=False, allow_abbrev=False)
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--gpus_per_node", type=int)
    parser.add_argument("--sharding", choices=("ddp", "fsdp2", "hsdp"))
    parser.add_argument("--accelerate_config")
    parser.add_argument("--pictures_per_second", type=float)
    parser.add_argument("--device_tflops", type=float)
    given, rest = parser.parse_known_args(argv)
    values = {"num_processes": int(os.environ.get("WORLD_SIZE", 1))}
    if "LOCAL_WORLD_SIZE" in os.environ:
        values["gpus_per_node"] = int(os.environ["LOCAL_WORLD_SIZE"])
    if given.accelerate_config is not None:
        values |= read_accelerate_config(Path(given.accelerate_config))
    names = ("num_processes", "gpus_per_node", "sharding", "pictures_per_second", "device_tflops")
    values |= {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    machines = Machines(**values)
    for name in names:
        value = getattr(machines, name)
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"`{name}` is {value}; expected a number above 0.")
    if machines.num_machines > 1 and machines.num_processes % machines.gpus_per_node:
        raise ValueError(
            f"{machines.num_processes} processes do not fill machines of {machines.gpus_per_node}: `num_processes` is"
            " of all machines together, and all are alike."
        )
    return machines, rest


def read_accelerate_config(path: Path) -> dict:
    """What a file for `accelerate launch --config_file` says of the machines."""
    values = read_yaml(path)
    kind = str(values.get("distributed_type", "NO")).upper()
    fsdp = values.get("fsdp_config") or {}
    if kind == "FSDP" and str(fsdp.get("fsdp_version")) != "2" or kind not in ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        raise ValueError(
            f"{path} is for {kind}, which a dry run does not count: say `--sharding fsdp2` (or hsdp) and"
            " `--num_processes` in its place."
        )
    replicas = (values.get("parallelism_config") or {}).get("parallelism_config_dp_replicate_size", 1)
    sharding = "ddp" if kind != "FSDP" else "hsdp" if replicas > 1 else "fsdp2"
    num_processes = int(values.get("num_processes", 1))
    per_machine = max(num_processes // int(values.get("num_machines", 1)), 1)
    return {"num_processes": num_processes, "gpus_per_node": per_machine, "sharding": sharding}


# -------------------------------------------------------------------------------------------------------- printing


def format_plan(args: TrainArguments, machines: Machines, plan: dict[str, dict]) -> str:
    kind = {"ddp": "DDP", "fsdp2": "FSDP2 over all", "hsdp": "FSDP2 in a machine, copies over machines"}
    lines = [
        f"Dry run: {machines.num_processes} process(es), {machines.num_machines} machine(s),"
        f" {kind[machines.sharding] if machines.num_processes > 1 else 'no exchange'};"
        f" {args.train_batch_size} pictures a process, accumulated {args.gradient_accumulation_steps} times;"
        f" {args.max_train_steps:,} updates."
    ]
    for title, rows in plan.items():
        if not rows:
            continue
        lines += ["", title]
        if title == "notes":
            lines += [f"  {note}" for note in rows.values()]
            continue
        width = max(map(len, rows))
        lines += [f"  {name:<{width}}  {_format(value, 'bytes' in title)}" for name, value in rows.items()]
    lines += ["", "Memory is without the buffers of single operations; activations are traced as a CPU keeps them."]
    return "\n".join(lines)


def _format(value: float | str, is_bytes: bool) -> str:
    if isinstance(value, str):
        return value
    if is_bytes and value > 999:
        unit, size = next(pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if value >= pair[1])
        return f"{value / size:,.{max(0, 2 - int(math.log10(value / size)))}f} {unit}"
    return f"{value:,.3g}" if isinstance(value, float) and value < 1e3 or value >= 1e12 else f"{value:,.0f}"
