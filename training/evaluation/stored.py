"""Arrays that are computed a shard at a time and kept: each shard is whole or not there, whoever was killed.

The folder's name follows from all that the arrays follow from, so that work of other settings is never taken up.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch


class Shards:
    """
    Arrays with an entry a row, in files of `shard_size` rows.

    Args:
        folder (`Path`): of all work of this kind; gets a folder for this key.
        key (`dict`): all that the arrays follow from but the rows' numbers, JSON.
        rows (`Sequence[int]`): the rows' numbers.
        shard_size (`int`): rows a file.
    """

    def __init__(self, folder: Path, key: dict, rows: Sequence[int], shard_size: int):
        self.rows, self.shard_size = [int(row) for row in rows], shard_size
        record = {**key, "row_numbers": make_digest(self.rows), "num_rows": len(rows), "shard_size": shard_size}
        self.folder, self.record = folder / make_digest(record)[:16], record

    def __len__(self) -> int:
        return -(-len(self.rows) // self.shard_size)

    def rows_of(self, number: int) -> list[int]:
        """The rows of a shard."""
        return self.rows[number * self.shard_size : (number + 1) * self.shard_size]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def list_missing(self) -> list[int]:
        """Shards that are not there, or cut; says in the folder what it is of."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "key.json").write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")
        return [number for number in range(len(self)) if not zipfile.is_zipfile(self.path(number))]

    def write(self, number: int, arrays: dict[str, np.ndarray | torch.Tensor]) -> None:
        """Writes a shard beside and then renames it."""
        arrays = {name: _to_numpy(array) for name, array in arrays.items()}
        for name, array in arrays.items():
            if len(array) != len(self.rows_of(number)):
                raise ValueError(f"`{name}` has {len(array)} entries for {len(self.rows_of(number))} rows.")
        beside = self.path(number).with_suffix(f".{os.getpid()}.tmp")
        with beside.open("wb") as file:
            np.savez(file, **arrays)
        beside.replace(self.path(number))

    def read(self) -> dict[str, np.ndarray]:
        """All shards, in the rows' order."""
        parts = []
        for number in range(len(self)):
            with np.load(self.path(number), allow_pickle=False) as file:
                parts.append(dict(file))
        return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else {})}


def _to_numpy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    return array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


def make_digest(value: object) -> str:
    """Of anything that is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
