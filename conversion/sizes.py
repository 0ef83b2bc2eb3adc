"""Sizes that a checkpoint does not say, from the names and shapes of its weights. Reading weights is not done here."""

import re
from collections.abc import Mapping

import torch

from .safe_load import StoredTensor


MAX_NUMBER = 1000  # the deepest published model has 64 layers; one is built for each number that a file names


def find_shape(tensors: Mapping[str, StoredTensor], name: str, num_dims: int = 2) -> torch.Size:
    """
    The shape of a weight that every checkpoint of the family has.

    Args:
        tensors (`Mapping[str, StoredTensor]`): the source's.
        name (`str`): of the weight.
        num_dims (`int`): how many dimensions it must have.

    Raises:
        ValueError: if it is not there, or has another number of dimensions.
    """
    if name not in tensors:
        some = ", ".join(list(tensors)[:5]) or "none"
        raise ValueError(f"The source has no weights {name!r}, so it is of another family. Its names begin: {some}.")
    shape = tensors[name].shape
    if len(shape) != num_dims:
        raise ValueError(f"{name} is of shape {tuple(shape)}; expected {num_dims} dimensions.")
    return shape


def count_numbered(tensors: Mapping[str, StoredTensor], pattern: str) -> int:
    """
    How many different numbers the first group of `pattern` matches at the beginning of the names.

    Raises:
        ValueError: if there are more than any model has.
    """
    number = len({found[1] for name in tensors if (found := re.match(pattern, name))})
    if number > MAX_NUMBER:
        raise ValueError(
            f"The names of the weights count {number} layers or blocks by {pattern}; at most {MAX_NUMBER}."
        )
    return number
