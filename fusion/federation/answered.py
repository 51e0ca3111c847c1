"""What a site has answered before, kept on its disk: no run's name and no restart buys more.

A coordinator may name runs as it likes, and end and begin them. What counts is kept by what is
answered about: the protocol, the cohort, and the roster. The very same request again costs nothing,
because it tells nothing new; that is how a run that was killed goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from fusion.keys import canonical_json, digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CHECK: Final = 16


class LedgerDamaged(RuntimeError):
    """A ledger that does not read as it was written; nothing is answered until it is restored."""


@dataclass
class Book:
    """Answers about one protocol, cohort and roster; see :meth:`AnswerLedger.open`."""

    key: str
    ledger: AnswerLedger
    spent: dict[str, set[str]] = field(default_factory=dict)

    def spend(self, asked: Sequence[tuple[str, str, int]]) -> bool:
        """Count requests, on the disk before this returns; False, and none counted, if one is over.

        Parameters
        ----------
        asked
            Per request the name of its counter, its digest, and how many different ones the
            counter allows; one that was counted before costs nothing.
        """
        new: dict[str, set[str]] = {}
        for counter, request, most in asked:
            seen = self.spent.setdefault(counter, set())
            fresh = new.setdefault(counter, set())
            if request not in seen:
                fresh.add(request)
            if fresh and len(seen | fresh) > most:
                return False
        entries = [
            {"book": self.key, "counter": counter, "request": request}
            for counter, fresh in new.items()
            for request in sorted(fresh)
        ]
        if entries:
            self.ledger.write(entries)
        for counter, fresh in new.items():
            self.spent[counter] |= fresh
        return True


class AnswerLedger:
    """A site's append-only record of what it answered.

    Each line holds a digest of itself and of the line before. A last line that was not finished is
    dropped: its answer never left, because every line is on the disk before the answer leaves.

    Parameters
    ----------
    path
        File; None keeps the record in memory only, for simulation.

    Raises
    ------
    LedgerDamaged
        If a line is not as it was written, or another process has the file open.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._books: dict[str, Book] = {}
        self._last, self._end = "", 0
        self._file: Any = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        # Unbuffered: what a full disk did not take must not be written when there is room again.
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            _lock(descriptor)
            self._read()
        except BaseException:
            self._file.close()
            raise
        _keep_name(path)

    def open(self, key: str) -> Book:
        """Give the record of one protocol, cohort and roster, all in its key."""
        return self._books.setdefault(key, Book(key, self))

    def close(self) -> None:
        """Let another process have the file; nothing can be counted here any more."""
        if self._file is not None:
            self._file.close()

    def write(self, entries: Sequence[dict[str, str]]) -> None:
        """Put entries on the disk before their answer leaves.

        Raises
        ------
        OSError, ValueError
            If the disk does not take them, or the ledger is closed; nothing may leave then.
        """
        last, lines = self._last, []
        for entry in entries:
            lines.append(canonical_json(entry | {"check": _check(last, entry)}))
            last = digest(lines[-1])
        if self._file is not None:
            self._append(b"".join(line + b"\n" for line in lines))
        self._last = last

    def _append(self, data: bytes) -> None:
        self._cut_to_end()  # again, if it did not work when the disk was full
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._cut_to_end()
            raise
        self._end += len(data)

    def _cut_to_end(self) -> None:
        self._file.truncate(self._end)
        self._file.seek(self._end)

    def _read(self) -> None:
        *lines, torn = self._file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            self._take(line, number)
            self._end += len(line) + 1
        if torn:
            self._cut_to_end()

    def _take(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            check = entry.pop("check")
            if check != _check(self._last, entry):
                raise ValueError
            book = self.open(entry["book"])
            book.spent.setdefault(entry["counter"], set()).add(entry["request"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise LedgerDamaged(
                f"ledger of answers: found line {number} other than it was written, needed it "
                "whole; restore it from a backup, or ask the oversight board"
            ) from None
        self._last = digest(line)


def _lock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LedgerDamaged(
            "ledger of answers: found another process at it, needed this site's only one"
        ) from None


def _keep_name(path: Path) -> None:
    """Put the name of a file that may be new on the disk too."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(last: str, entry: dict[str, str]) -> str:
    return digest(last.encode() + canonical_json(entry))[:_CHECK]
