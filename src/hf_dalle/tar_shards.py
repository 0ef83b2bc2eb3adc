"""WebDataset tar shards: samples of a picture and its caption (`key.jpg`, `key.txt`, `key.json`), one after another.

By number with an index of where each sample lies, or in sequence without one. Which rows come when is `row_order`'s
subject, what becomes of a row that of `data`.
"""

import copy
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging


logger = logging.get_logger(__name__)

PICTURE_ENDINGS = ("jpg", "jpeg", "png", "webp")
INDEX_FEATURES = datasets.Features(
    shard=datasets.Value("int32"),
    key=datasets.Value("string"),
    start=datasets.Value("int64"),
    end=datasets.Value("int64"),  # -1: the shard is damaged from `start` on
)
INDEX_VERSION = 1  # an index of another version is not taken from the cache
DAMAGED = "the shard ends early or is damaged here"


class TarRows:
    """
    The samples of local tar shards as rows by number, in the shards' order.

    A row is a dict: `image` is the sample's picture of whichever ending (`bytes` and the file's name as `path`); each
    ending is a column too (`txt` and `json` as strings), and so is each key of the `.json`, where no ending is
    called alike. What a sample does not have is `None`.

    The first opening reads the headers of all shards; the index is kept in the cache of `datasets` and made anew when
    a shard's size or date changes. What follows a damaged place in a shard is one row, which cannot be read.

    Args:
        paths (`list[Path]`): the shards.

    Raises:
        OSError: if a shard cannot be opened, or no sample can be read.
    """

    def __init__(self, paths: list[Path]):
        self.paths = paths
        shards = [_stamp(path) for path in paths]
        if next(_list_samples(list(enumerate(shards)), INDEX_VERSION), None) is None:
            raise OSError(f"There are no samples in {paths[0]} ... Are these tar files?")
        # Hashed with the shards' sizes and dates: one index for each state of the files.
        self.index = datasets.Dataset.from_generator(
            _list_samples,
            features=INDEX_FEATURES,
            gen_kwargs={"shards": list(enumerate(shards)), "version": INDEX_VERSION},
        )
        for row in np.flatnonzero(self.index.data.column("end").to_numpy() < 0).tolist():
            logger.warning(f"{self.name_row(row)}: {DAMAGED}; what follows is lost.")
        self.column_names = _find_columns(partial(self._read_sample, row) for row in range(len(self)))
        if not self.column_names:
            raise OSError(f"None of the {len(self)} samples of {paths[0]} ... can be read. Are these tar files?")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict:
        """The row; a `ValueError` says what is wrong with it, an `OSError` that its shard is gone."""
        return make_row(self._read_sample(index), self.column_names)

    def select_columns(self, column_names: list[str]) -> "TarRows":
        rows = copy.copy(self)
        rows.column_names = column_names
        return rows

    def name_row(self, index: int) -> str:
        row = self.index[index]
        return f"{self.paths[row['shard']].name}/{row['key']}"

    def _read_sample(self, index: int) -> dict[str, tuple[str, bytes]]:
        row = self.index[index]
        with _open(self.paths[row["shard"]]) as file:
            return read_sample(file, row["start"], row["end"])


class TarShards:
    """
    The samples of local tar shards in sequence, shard by shard, without an index; the rows are those of [`TarRows`].

    Args:
        paths (`list[Path]`): the shards.

    Raises:
        OSError: if the first shard cannot be opened, or no sample of it can be read.
    """

    def __init__(self, paths: list[Path]):
        self.paths, self.column_names = paths, []
        with _open(paths[0]) as file:
            self.column_names = _find_columns(partial(read_sample, file, *span) for _, *span in find_samples(file))
        if not self.column_names:
            raise OSError(f"No sample of {paths[0]} can be read. Is it a tar file?")

    @property
    def num_shards(self) -> int:
        return len(self.paths)

    def name_row(self, shard: int, row: int) -> str:
        return f"{self.paths[shard].name}/{row}"

    def select_columns(self, column_names: list[str]) -> "TarShards":
        shards = copy.copy(self)
        shards.column_names = column_names
        return shards

    def read(self, shard: int, start: int = 0) -> Iterator[dict | ValueError]:
        """The rows of a shard from row `start` on; in the place of one that cannot be read, the error."""
        with _open(self.paths[shard]) as file:
            for _, first, end in itertools.islice(find_samples(file), start, None):
                try:
                    yield make_row(read_sample(file, first, end), self.column_names)
                except ValueError as error:
                    yield error


def find_samples(file: io.BufferedReader) -> Iterator[tuple[str, int, int]]:
    """
    Key, first byte and end of each sample of an open tar file: consecutive members with one name before the first dot.
    A damaged or cut file gives a last one whose end is -1, for the sample that the damage hits and all after it.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    key, start, end, offset = None, 0, 0, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                if tar.offset > size:
                    raise tarfile.ReadError("cut short")
                name = _split_name(member.name)
                if member.isfile() and name is not None:
                    if key is not None and name[0] != key:
                        yield key, start, end
                    if name[0] != key:
                        key, start = name[0], member.offset
                    end = tar.offset
                offset = tar.offset
                tar.members = []  # type: ignore[attr-defined]  # or it would keep them all
            file.seek(offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes garbage for the end
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, ValueError, EOFError, OverflowError):
        yield (key or f"byte {offset}"), (offset if key is None else start), -1
        return
    if key is not None:
        yield key, start, end


def read_sample(file: io.BufferedReader, start: int, end: int) -> dict[str, tuple[str, bytes]]:
    """
    The files of one sample: ending to name and content.

    Raises:
        ValueError: if they are not there (any more), or one ending comes twice.
    """
    if end < 0:
        raise ValueError(DAMAGED)
    file.seek(start)
    content, files = file.read(end - start), {}
    if len(content) < end - start:
        raise ValueError(DAMAGED)
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                name = _split_name(member.name)
                if not member.isfile() or name is None:
                    continue
                if name[1] in files:
                    raise ValueError(f"two files {member.name}")
                files[name[1]] = (member.name, tar.extractfile(member).read())
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{DAMAGED} ({error})") from error
    return files


def make_row(files: dict[str, tuple[str, bytes]], column_names: Iterable[str]) -> dict:
    """The columns of a sample; a `ValueError` says what cannot be read."""
    row, values = {}, None
    for column in column_names:
        ending = column
        if column == "image" and column not in files:
            ending = next((ending for ending in PICTURE_ENDINGS if ending in files), None)
        if ending in files:
            row[column] = _read_file(ending, *files[ending])
            continue
        if values is None:
            values = _read_json(files)
        row[column] = values.get(column)
    return row


def _read_file(ending: str, name: str, content: bytes) -> str | bytes | dict:
    if ending in PICTURE_ENDINGS:
        return {"bytes": content, "path": name}
    if ending not in ("txt", "json"):
        return content
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"broken .{ending} ({error})") from error


def _read_json(files: dict[str, tuple[str, bytes]]) -> dict:
    try:
        values = json.loads(files["json"][1]) if "json" in files else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken .json ({error})") from error
    return values if isinstance(values, dict) else {}


def _find_columns(readers: Iterator[Callable[[], dict]], num_samples: int = 8) -> list[str]:
    """The columns of the first samples, as far as they can be read."""
    columns = set()
    for read in itertools.islice(readers, num_samples):
        try:
            files = read()
            has_picture = any(ending in files for ending in PICTURE_ENDINGS)
            columns |= {*files, *(["image"] if has_picture else []), *_read_json(files)}
        except ValueError:
            continue
    return sorted(columns)


def _split_name(name: str) -> tuple[str, str] | None:
    """A member's key and ending: what comes before and after the first dot of its file name."""
    folder, slash, file_name = name.rpartition("/")
    key, dot, ending = file_name.partition(".")
    return (folder + slash + key, ending.lower()) if key and dot and ending else None


def _list_samples(shards: list[tuple[int, tuple[str, int, int]]], version: int) -> Iterator[dict]:
    for number, (path, _, _) in shards:
        with _open(Path(path)) as file:
            for key, start, end in find_samples(file):
                yield {"shard": number, "key": key, "start": start, "end": end}


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise _missing(path, error) from error
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise _missing(path, error) from error


def _missing(path: Path, error: OSError) -> OSError:
    return OSError(f"Shard {path} cannot be opened ({error.strerror}). Once it can, the same command goes on.")
