"""The log of runs that look at test pictures: lines of JSON, written before anything of them is measured.

Both kinds of `evaluate.py` keep it, so that a card can say how often, and by which checkpoints, they were looked at.
"""

import datetime
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path


def list_test_splits(splits: Sequence[str]) -> list[str]:
    """Those whose name begins with "test"."""
    return [split for split in splits if split.startswith("test")]


def check_log(splits: Sequence[str], path: str | None) -> None:
    """Refuses to measure a test split without a log."""
    found = list_test_splits(splits)
    if found and path is None:
        raise ValueError(f"`evaluation_log` is missing, but {found[0]} is measured: runs are logged.")


def log_run(path: str | None, splits: Sequence[str], checkpoints: Iterable[str], **about: int | str) -> list[dict]:
    """
    Adds a line for each checkpoint to the log, if a test split is measured.

    Args:
        path (`str`, *optional*): of the log, which is made where there is none.
        splits (`list[str]`): that are measured; test splits are named in the line.
        checkpoints (`Iterable[str]`): their digests; the same one twice is one line.
        about: what else the lines say.

    Returns:
        `list[dict]`: all lines of the log.

    Raises:
        OSError: if it cannot be written.
    """
    found = list_test_splits(splits)
    if found:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with Path(path).open("a", encoding="utf-8") as file:
            for checkpoint in dict.fromkeys(checkpoints):
                run = {"date": datetime.date.today().isoformat(), "checkpoint": checkpoint, "splits": found}
                file.write(json.dumps({**run, **about}) + "\n")
    if path is None or not Path(path).is_file():
        return []
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def digest_checkpoint(folder: Path) -> str:
    """12 digits of the weights of a DALL-E's prior and dVAE: the same whatever else lies in its folder."""
    digest = hashlib.sha256()
    for part in ("prior", "dvae"):
        for weights in sorted((folder / part).glob("*.safetensors")):
            with weights.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)  # goes on in the one digest
    return digest.hexdigest()[:12]
