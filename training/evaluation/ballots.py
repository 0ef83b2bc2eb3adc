"""Which voter is asked for which caption, whose picture is on the left, and what of a voter's answer is taken.

Voters and ballots carry a keyed digest, so that nobody can make up either. What is kept lives in `votes.py`.
"""

import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evaluation.votes import ANSWERS, NEITHER, Study, VoteFile


MAC_LENGTH = 32  # hexadecimal digits, 128 bits


@dataclass(frozen=True)
class Ballot:
    """One caption before one voter: whose picture is on the left and on the right, and the token that answers it."""

    row: str
    left: str
    right: str
    token: str


class Ballots:
    """
    Gives captions to voters so that each caption gets `num_voters` different ones, and takes the answers.

    Captions that have the most votes come first, so that they are complete early; among equals each voter has an order
    of their own. All that is random of a voter and a caption hangs on the key: it is the same after a new start. A
    caption that is open before a voter counts as voted on for `lease_seconds`; an answer that comes later is kept all
    the same, and the caption may then have more votes than asked for.

    Args:
        study ([`Study`]), file ([`VoteFile`]): what is voted on, and into what.
        key (`bytes`): secret, as `load_key` gives it.
        max_votes (`int`): captions a voter is asked for.
        lease_seconds (`float`, *optional*, defaults to 900): how long an open caption waits for its answer.
        clock (`Callable`, *optional*): gives seconds.
    """

    def __init__(
        self,
        study: Study,
        file: VoteFile,
        key: bytes,
        max_votes: int,
        lease_seconds: float = 900,
        clock: Callable[[], float] = time.time,
    ):
        if max_votes < 1:
            raise ValueError(f"`max_votes` is {max_votes}; expected a number from 1.")
        self.study, self.file, self.key = study, file, key
        self.max_votes, self.lease_seconds, self.clock = max_votes, lease_seconds, clock
        self.leases: dict[str, tuple[str, float]] = {}  # of a voter, the open row and until when
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Hexadecimal digits by which a browser tells this study's voter from another's."""
        return self._digest("name")[:12]

    def admit(self) -> str:
        """The token of a new voter, for their browser to keep."""
        return self._sign(secrets.token_hex(8), "voter")

    def is_voter(self, token: Any) -> bool:
        """Whether the token is one that `admit` gave."""
        return isinstance(token, str) and self._split(token, "voter") is not None

    def progress(self, token: str) -> tuple[int, int]:
        """How many captions this voter has answered, and of how many."""
        return len(self.file.rows_of.get(self._voter(token), ())), min(self.max_votes, len(self.study.captions))

    def ask(self, token: str) -> Ballot | None:
        """
        What the voter is to be shown: the caption that is open before them, or the next; `None` when there is none.

        Raises:
            ValueError: if the voter's token is not ours.
        """
        voter, now = self._voter(token), self.clock()
        with self._lock:
            self.file.refresh()
            row = self._choose(voter, now)
            if row is None:
                return None
            self.leases[voter] = (row, now + self.lease_seconds)
        left, right = self._order(voter, row)
        return Ballot(row, left, right, self._sign(f"{now:.2f}|{row}", f"ballot|{voter}"))

    def answer(self, token: str, ballot: str, **answers: str) -> bool:
        """
        Takes a voter's answers to a ballot.

        Args:
            token, ballot (`str`): of the voter, and of what they were shown.
            answers (`str`): for each question one of `ANSWERS`.

        Returns:
            `bool`: whether the vote is new; the first answer of a voter to a caption stands.

        Raises:
            ValueError: if a token is not ours, or an answer none of the question's.
            OSError: if the vote could not be written; it may be repeated.
        """
        voter = self._voter(token)
        shown = self._split(ballot, f"ballot|{voter}") if isinstance(ballot, str) else None
        if shown is None:
            raise ValueError("This ballot was not given to this voter.")
        wrong = [name for name, allowed in ANSWERS.items() if answers.get(name) not in allowed]
        if wrong or answers.keys() - ANSWERS.keys():
            raise ValueError(f"`{(wrong or sorted(answers))[0]}` is not answered by one of its answers.")
        asked, row = shown.split("|", 1)
        if row not in self.study.captions:
            raise ValueError("This ballot is of another study.")
        sides = dict(zip(("left", "right"), self._order(voter, row), strict=True), neither=NEITHER)
        vote = {"row": row, "voter": voter, "left": sides["left"]}
        vote |= {name: sides[answers[name]] for name in ANSWERS}
        is_new = self.file.append({**vote, "seconds": round(max(0.0, self.clock() - float(asked)), 1)})
        with self._lock:
            if self.leases.get(voter, ("", 0))[0] == row:
                del self.leases[voter]
        return is_new

    def _choose(self, voter: str, now: float) -> str | None:
        done = self.file.rows_of.get(voter, set())
        self.leases = {of: lease for of, lease in self.leases.items() if lease[1] > now}
        if voter in self.leases and self.leases[voter][0] not in done:
            return self.leases[voter][0]
        if len(done) >= self.max_votes:
            return None
        open_before_others = Counter(row for of, (row, _) in self.leases.items() if of != voter)
        taken = {row: self.file.num_votes[row] + open_before_others[row] for row in self.study.captions}
        rows = [row for row, number in taken.items() if number < self.study.num_voters and row not in done]
        most = max((taken[row] for row in rows), default=0)
        return min(
            (row for row in rows if taken[row] == most), key=partial(self._digest, "order", voter), default=None
        )

    def _order(self, voter: str, row: str) -> tuple[str, str]:
        """Whose picture is on the left, and whose on the right, before this voter."""
        first, second = self.study.models
        return (first, second) if self._digest("left", voter, row)[0] in "02468ace" else (second, first)

    def _digest(self, *parts: str) -> str:
        """Of the parts under the key: hexadecimal digits that nobody else can know."""
        return hmac.new(self.key, json.dumps(parts).encode(), hashlib.sha256).hexdigest()

    def _sign(self, text: str, purpose: str) -> str:
        """The text, after its keyed digest."""
        return self._digest("token", purpose, text)[:MAC_LENGTH] + text

    def _split(self, token: str, purpose: str) -> str | None:
        """The text of a token of ours, else `None`."""
        text = token[MAC_LENGTH:]
        return text if hmac.compare_digest(self._sign(text, purpose).encode(), token.encode()) else None

    def _voter(self, token: str) -> str:
        voter = self._split(token, "voter") if isinstance(token, str) else None
        if voter is None:
            raise ValueError("This voter is not known here.")
        return voter


def load_key(path: str | Path) -> bytes:
    """The secret in this file, which is made where there is none; readable by its owner only."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.touch(mode=0o600)
        beside.write_bytes(secrets.token_bytes(32))
        try:
            os.link(beside, path)  # whole, and of two processes that begin together, the first's
        except FileExistsError:
            pass
        finally:
            beside.unlink()
    key = path.read_bytes()
    if len(key) != 32:
        raise ValueError(f"{path} must hold a secret of 32 bytes; it has {len(key)}. Without it, a new one is made.")
    return key
