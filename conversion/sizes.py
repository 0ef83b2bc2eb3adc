"""Sizes that a checkpoint does not say, from the names and shapes of its weights. Reading weights is not done here."""

import re
from collections.abc import Mapping

import torch

from .safe_load import StoredTensor


def find_shape(tensors: Mapping[str, StoredTensor], name: str) -> torch.Size:
    """
    The shape of a weight that every checkpoint of the family has.

    Raises:
        ValueError: if it is not there.
    """
    if name not in tensors:
        some = ", ".join(list(tensors)[:5]) or "none"
        raise ValueError(f"The source has no weights {name!r}, so it is of another family. Its names begin: {some}.")
    return tensors[name].shape


def count_numbered(tensors: Mapping[str, StoredTensor], pattern: str) -> int:
    """How many different numbers the first group of `pattern` matches at the beginning of the names."""
    return len({found[1] for name in tensors if (found := re.match(pattern, name))})
