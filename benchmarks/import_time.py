"""What `import hf_dalle` takes beyond what a script with torch, transformers and diffusers imports anyway.

`python benchmarks/import_time.py` starts processes in turns and compares their processor time, which busy cores
disturb less than the clock's. What models take lives in the other scripts.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys

from timing import Figure, format_figures


LIBRARIES = """
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin, ResNetModel
"""
UNCOLLECTED = "import gc\ngc.disable()\n"  # one run of the collector over the libraries' objects outlasts our modules
CONTENDERS = {
    "libraries": LIBRARIES,
    "ours": f"{LIBRARIES}\nimport hf_dalle",
    "libraries, uncollected": f"{UNCOLLECTED}{LIBRARIES}",
    "ours, uncollected": f"{UNCOLLECTED}{LIBRARIES}\nimport hf_dalle",
}
GOAL = 0.3  # seconds


def parse_arguments(args: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_rounds", type=int, default=7, help="rounds, in each of which both take turns")
    return parser.parse_args(args)


def measure_processor_seconds(code: str) -> float:
    """Of a new Python process that runs `code`: seconds of the processor, its own and the system's for it."""
    # an installed package has its bytecode beside it: the first process writes what is missing
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main(args: list[str] | None = None) -> None:
    """Prints the table; see `--help`."""
    args = parse_arguments(args)
    for code in CONTENDERS.values():
        measure_processor_seconds(code)  # files come from the disk, bytecode is written
    rounds = [
        {name: measure_processor_seconds(code) for name, code in CONTENDERS.items()} for _ in range(args.num_rounds)
    ]
    libraries = statistics.median(seconds["libraries"] for seconds in rounds)
    ours, uncollected = (
        statistics.median(seconds[f"ours{case}"] - seconds[f"libraries{case}"] for seconds in rounds)
        for case in ("", ", uncollected")
    )
    figures = [
        Figure("torch, transformers, diffusers, seconds", libraries),
        Figure("import hf_dalle, seconds", ours, f"{GOAL:.2f}"),
        Figure("the same without garbage collection", uncollected),
    ]
    print(format_figures(figures))


if __name__ == "__main__":
    main()
