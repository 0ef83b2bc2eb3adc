"""What a checkpoint's settings and the YAML beside it say: whatever a file holds in their place, an error has words.

Which settings there are, and what they mean, lives in `families/`.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .restricted_pickle import Name, Shell
from .safe_load import StoredTensor


MAX_COUNT = 2**31 - 1  # no size of a model is larger, and products of several still are numbers


def describe(value: Any) -> str:
    """A value in some words; never what a container nests, which may be endless."""
    if type(value) is int and value.bit_length() > 100:
        return f"a number of {value.bit_length()} bits"
    if type(value) in (int, float, bool, str, type(None)):
        return reprlib.repr(value)
    if type(value) in (Name, Shell):
        return f"a {reprlib.repr(value.name)}"
    return "a tensor" if type(value) is StoredTensor else f"a {type(value).__name__}"


def expect_dict(value: Any, what: str) -> dict[str, Any]:
    """`value`, which must be a dict of names; `ValueError` names `what` it should be."""
    if type(value) is not dict:
        raise ValueError(f"{what} is {describe(value)}; expected names and their values.")
    wrong = next((key for key in value if type(key) is not str), None)
    if wrong is not None or None in value:
        raise ValueError(f"{what} has the key {describe(wrong)}; expected names and their values.")
    return value


def expect_count(settings: Mapping[str, Any], name: str, where: str) -> int:
    """The whole number from 1 that a setting must be, as `hidden_size` of `hparams`."""
    value = settings.get(name)
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise ValueError(f"`{name}` of {where} is {describe(value)}; expected a whole number from 1 to {MAX_COUNT}.")
    return value


def expect_flag(settings: Mapping[str, Any], name: str, where: str) -> bool:
    """The truth value that a setting must be where it is there, else `False`, as which `None` counts too."""
    value = settings.get(name)
    if type(value) not in (bool, type(None)):
        raise ValueError(f"`{name}` of {where} is {describe(value)}; expected True or False.")
    return bool(value)


def expect_number(settings: Mapping[str, Any], name: str, where: str, default: float) -> float:
    """The finite number from 0 that a setting must be where it is there."""
    value = settings.get(name, default)
    if type(value) not in (int, float) or not (0 <= value <= MAX_COUNT and math.isfinite(value)):
        raise ValueError(f"`{name}` of {where} is {describe(value)}; expected a number from 0.")
    return value


def expect_names(settings: Mapping[str, Any], name: str, where: str, default: Sequence[str]) -> list[str]:
    """The names that a setting must list where it is there; `None` counts as not there."""
    value = settings.get(name)
    if value is None:
        return list(default)
    if type(value) not in (list, tuple) or not value or not all(type(part) is str for part in value):
        raise ValueError(f"`{name}` of {where} is {describe(value)}; expected a list of names.")
    return list(value)


def read_yaml(path: Path, *keys: str) -> Any:
    """
    What a YAML file holds under `keys`, one in the other; `None` where one of them is not there.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not YAML.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML's dates and numbers raise errors of their own, deep nests Python's.
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        words = reprlib.repr(" ".join(str(error).split()))
        raise ValueError(f"{path} is not a YAML file that can be read ({type(error).__name__}: {words}).") from error
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
