"""People's votes between two models' pictures: what is asked, and the file that the votes are kept in.

A vote is a line of JSON that is appended, and on the disk before its voter is thanked; of a voter it holds a random
number, and nothing else. Who is asked what is decided in `ballots.py`, what the votes say counted in `vote_counts.py`.
"""

import fcntl
import json
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path


NEITHER = "neither"
# The paper's questions. Realism is a choice of two; of the match of caption and picture, neither is an answer too.
ANSWERS = {"realism": ("left", "right"), "match": ("left", "right", NEITHER)}
VOTE_KEYS = ("row", "voter", "left", *ANSWERS, "seconds")


@dataclass(frozen=True)
class Study:
    """
    What people vote on.

    Args:
        name (`str`): of the study.
        models (`tuple[str, str]`): whose pictures are compared.
        captions (`dict[str, str]`): by the row's id.
        num_voters (`int`): voters a caption; the paper's five. Odd, so that realism has a majority.
        fingerprint (`str`): of the pictures' bytes.
    """

    name: str
    models: tuple[str, str]
    captions: dict[str, str]
    num_voters: int = 5
    fingerprint: str = ""

    def __post_init__(self):
        if len(set(self.models)) != 2 or NEITHER in self.models:
            raise ValueError(f"A study has two models of different names, none of them {NEITHER!r}: {self.models}.")
        if self.num_voters < 1 or self.num_voters % 2 == 0:
            raise ValueError(f"`num_voters` is {self.num_voters}; expected an odd number: then there is a majority.")
        if not self.captions:
            raise ValueError("A study needs captions; there is none.")


# --------------------------------------------------------------------------------------------------------- the file


class VoteFile:
    """
    The votes of a study, JSON lines, of which the first is the study itself.

    Lines are appended under a lock and synced, so several threads and processes may vote into one file. A line that a
    crash cut is closed by the next vote and skipped by readers.

    Args:
        path (`str` or `Path`): goes on where it was, or is begun.
        study ([`Study`]): what is voted on.

    Raises:
        ValueError: if the file holds votes of another study, or is no file of votes.
        OSError: if it cannot be written.
    """

    def __init__(self, path: str | Path, study: Study):
        self.path, self.study = Path(path), study
        self.rows_of: dict[str, set[str]] = defaultdict(set)  # of each voter, the rows answered
        self.num_votes: Counter[str] = Counter()  # of each row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self._lock, self._size_read = threading.Lock(), 0
        try:
            with self._locked():
                self._begin()
                self._read_on()
        except (ValueError, OSError):
            self.close()
            raise

    def append(self, vote: dict) -> bool:
        """
        Writes a vote down; it is on the disk when this returns.

        Returns:
            `bool`: whether it is new; a voter's second vote on a row is not written.

        Raises:
            OSError: if it could not be written, as on a full disk; the same call may be repeated.
        """
        with self._locked():
            size = os.fstat(self._descriptor).st_size
            if os.pread(self._descriptor, 1, size - 1) != b"\n":
                self._write(b"\n")  # after what a crash cut
            self._read_on()
            if vote["row"] in self.rows_of[vote["voter"]]:
                return False
            self._write(_encode(vote))
            self._read_on()
            return True

    def refresh(self) -> None:
        """Takes up what other processes have written."""
        with self._lock:
            self._read_on()

    def close(self) -> None:
        os.close(self._descriptor)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def _begin(self) -> None:
        """Writes the first line where it is not there, or was cut; else it must be this study's."""
        first = _encode(asdict(self.study))
        with self.path.open("rb") as file:
            found = file.read(len(first))
        if len(found) < len(first) and first.startswith(found):
            os.ftruncate(self._descriptor, 0)
            self._write(first)
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)  # the file's name, too
            os.close(folder)
        elif found != first:
            before, words = read_study(self.path), []
            for name in (field.name for field in fields(Study)):
                old, new = getattr(before, name), getattr(self.study, name)
                if old != new:
                    words.append(name if name in ("captions", "fingerprint") else f"{name} ({old!r}, now {new!r})")
            raise ValueError(
                f"{self.path} holds votes of another study; different: {', '.join(words)}. Votes on other captions"
                " or pictures are not counted together: name another file."
            )

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def _read_on(self) -> None:
        with self.path.open("rb") as file:
            file.seek(self._size_read)
            whole = file.read().rpartition(b"\n")
        for line in whole[0].split(b"\n")[0 if self._size_read else 1 :]:  # the first line is the study
            vote = _parse(line)
            if vote is not None and vote.keys() >= {"row", "voter"}:
                self.num_votes[vote["row"]] += vote["row"] not in self.rows_of[vote["voter"]]
                self.rows_of[vote["voter"]].add(vote["row"])
        self._size_read += len(whole[0]) + len(whole[1])


def read_study(path: str | Path) -> Study:
    """
    The study that a file of votes begins with.

    Raises:
        ValueError: if the file is none of votes.
    """
    with Path(path).open("rb") as file:
        line = file.readline()
    given = _parse(line) or {}
    try:
        return Study(**{**given, "models": tuple(given["models"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no file of votes: it must begin with the study, as `vote.py` writes it."
        ) from error


def read_votes(path: str | Path) -> tuple[Study, list[dict], int]:
    """
    The study, its votes in the order of the file, and how many lines were cut by a crash.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is none of votes, or a line is whole but no vote of the study.
    """
    study, votes, num_cut = read_study(path), [], 0
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[1:], start=2):
        vote = _parse(line)
        if vote is not None:
            if not _is_vote(vote, study):
                raise ValueError(f"{path}, line {number}: {line.decode()!r} is no vote of the study {study.name!r}.")
            votes.append(vote)
        elif line:
            num_cut += 1
    return study, votes, num_cut


def _encode(record: dict) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _parse(line: bytes) -> dict | None:
    """The object of a line; `None` where it was cut. No beginning of an object is itself JSON."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_vote(vote: dict, study: Study) -> bool:
    models = {*study.models}
    return (
        vote.keys() == {*VOTE_KEYS}
        and all(isinstance(value, str) for name, value in vote.items() if name != "seconds")
        and vote["row"] in study.captions
        and vote["left"] in models
        and vote["realism"] in models
        and vote["match"] in {*models, NEITHER}
        and isinstance(vote["seconds"], int | float)
    )
