"""What a source is made of: which file of a folder holds the checkpoint, and what of the file are the weights.

How a file is read is `safe_load.py`'s, what its keys mean, `families/`'.
"""

from pathlib import Path
from typing import Any


BESIDE = "entries of the file beside the weights, which only training needs"
# What PyTorch Lightning writes beside the weights: keys of a dict, and numbers that are not looked at.
LIGHTNING_CLASSES = [
    *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    *("pytorch_lightning.callbacks.early_stopping.EarlyStopping", "pytorch_lightning.utilities.parsing.AttributeDict"),
]


def find_file(source: Path, suffixes: tuple[str, ...]) -> Path:
    """The file that `source` is, or the only one of these suffixes in a folder; `OSError` if there is none."""
    if source.is_file():
        return source
    found = sorted(path for path in source.glob("*") if path.suffix in suffixes) if source.is_dir() else []
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise OSError(f"{source} must be a checkpoint ({', '.join(suffixes)}) or a folder with one; found: {names}.")
    return found[0]


def take_weights(content: Any) -> Any:
    """The state dict of a checkpoint of PyTorch Lightning, or what is one itself."""
    return content.get("state_dict", content) if type(content) is dict else content


def list_beside(content: Any, used: tuple[str, ...] = ("state_dict",)) -> list[str]:
    """The entries of a checkpoint beside those that are used; none of a dict that is a state dict itself."""
    is_state_dict = type(content) is not dict or used[-1] not in content
    return [] if is_state_dict else [str(key)[:100] for key in content if key not in used]
