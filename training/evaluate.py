"""The one entry to measuring: `python training/evaluate.py CONFIG.yaml [--option value ...]` writes report and plots.

The YAML names the kind, `evaluation: concepts` (`evaluate_concepts.py`) or `evaluation: pictures` (`evaluation/`),
which several processes share where `accelerate launch` or `torchrun` starts them.
"""

import sys
from pathlib import Path

import evaluate_concepts
from evaluation import run
from settings_file import read_yaml


KINDS = {"concepts": evaluate_concepts.main, "pictures": run.main}


def main(argv: list[str]) -> None:
    """Runs the evaluation that the YAML file names."""
    if not argv or argv[0].startswith("-"):
        print(
            "Usage: evaluate.py CONFIG.yaml [--option value ...]; `evaluate.py CONFIG.yaml --help` lists the options."
        )
        if argv and argv[0] in ("-h", "--help"):
            return
        raise ValueError("There is no settings file.")
    kind = read_yaml(Path(argv[0])).get("evaluation")
    if str(kind) not in KINDS:
        raise ValueError(f"{argv[0]} says `evaluation: {kind}`; expected one of {', '.join(KINDS)}.")
    KINDS[kind](argv)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {error}")
