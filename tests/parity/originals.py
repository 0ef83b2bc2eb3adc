"""Runs scripts of `scripts/` in the environment of the originals, which `make test-parity` makes.

A script there builds an original with random weights and writes a checkpoint as it does, and what it gives as
reference.safetensors or reference.json; the tests here convert and compare. Nothing of theirs is imported here.
"""

import json
import os
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
VARIABLE = "HF_DALLE_PARITY_PYTHON"
MAX_SECONDS = 900


@lru_cache
def find_python() -> str | None:
    """The interpreter of the originals' environment: the variable's, or that of `make test-parity`."""
    found = os.environ.get(VARIABLE) or str(ROOT / ".venv-parity" / "bin" / "python")
    return found if Path(found).is_file() else None


def find_older(version: str) -> str:
    """The folder of another dalle-pytorch beside that interpreter; skips the test where there is none."""
    folder = Path(find_python() or "").parents[1] / f"dalle-pytorch-{version}" if find_python() else None
    if folder is None or not folder.is_dir():
        pytest.skip(f"dalle-pytorch {version} is not installed beside the originals: run `make test-parity`")
    return str(folder)


def run_original(script: str, folder: Path, *packages: str, **options) -> Path:
    """
    Runs a script, or skips the test where the environment is missing.

    Args:
        script (`str`): name of a file in `scripts/`, without its suffix.
        folder (`Path`): where it writes; made if it is not there.
        packages (`str`): folders of packages in place of those that are installed.
        options: what the script gets, as JSON.

    Returns:
        `Path`: `folder`.
    """
    python = find_python()
    if python is None:
        pytest.skip(f"the originals are not installed: run `make test-parity`, or set {VARIABLE} to their interpreter")
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (*packages, here / "shims", ROOT, ROOT / "src")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [python, str(here / "scripts" / f"{script}.py"), str(folder), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MAX_SECONDS)
    assert done.returncode == 0, f"{script} failed in the originals' environment:\n{done.stdout}\n{done.stderr}"
    return folder


def load_reference(folder: Path) -> dict:
    """The tensors that a script wrote as reference.safetensors."""
    return load_file(folder / "reference.safetensors")
