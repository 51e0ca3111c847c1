"""What a site has answered before, kept on its disk: no run's name and no restart buys more.

A coordinator may name runs as it likes, and end and begin them. What counts is kept by what is
answered about: the protocol, the cohort, and the roster. The very same request again costs nothing,
because it tells nothing new; that is how a run that was killed goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fusion.keys import canonical_json, digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_CHECK: Final = 16
_POLL_S: Final = 0.05


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

        Raises
        ------
        OSError, LedgerDamaged
            If the disk does not take it; nothing may leave then.
        """
        with self.ledger.lock:
            return self._spend(asked)

    def _spend(self, asked: Sequence[tuple[str, str, int]]) -> bool:
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
    wait_s
        How long to wait for a process that has the file open and may be ending.

    Raises
    ------
    LedgerDamaged
        If a line is not as it was written, or another process keeps the file open.
    """

    def __init__(self, path: Path | None = None, *, wait_s: float = 10.0) -> None:
        self.lock = threading.Lock()
        self._books: dict[str, Book] = {}
        self._last = ""
        self._is_kept, self._file = path is not None, -1
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(self._file, 0o600)
            _hold(self._file, wait_s)
            self._read()
            _sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def open(self, key: str) -> Book:
        """Give the record of one protocol, cohort and roster, all in its key."""
        return self._books.setdefault(key, Book(key, self))

    def close(self) -> None:
        """Let another process have the file; from now on nothing can be counted in it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()

    def write(self, entries: Sequence[dict[str, str]]) -> None:
        """Put entries on the disk before their answer leaves.

        Raises
        ------
        OSError
            If the disk does not take them; nothing may leave then.
        LedgerDamaged
            If the ledger was closed.
        """
        last, lines = self._last, []
        for entry in entries:
            lines.append(canonical_json(entry | {"check": _check(last, entry)}))
            last = digest(lines[-1])
        if self._is_kept:
            self._append(b"".join(line + b"\n" for line in lines))
        self._last = last

    def _append(self, content: bytes) -> None:
        if self._file < 0:
            raise LedgerDamaged("ledger of answers: found it closed, needed it open")
        at = os.lseek(self._file, 0, os.SEEK_END)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            # What is half there must not stand before the next line.
            try:
                os.ftruncate(self._file, at)
            except OSError:
                self.close()
            raise

    def _read(self) -> None:
        with os.fdopen(os.dup(self._file), "rb") as file:
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            self._take(line, number)
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))

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


def _check(last: str, entry: dict[str, str]) -> str:
    return digest(last.encode() + canonical_json(entry))[:_CHECK]


def _hold(file: int, wait_s: float) -> None:
    """Lock the file for this process; one that was killed lets go of it by itself."""
    until = time.monotonic() + wait_s
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        if time.monotonic() >= until:
            raise LedgerDamaged(
                "ledger of answers: found another process at it, needed this site's only one"
            )
        time.sleep(_POLL_S)


def _sync_folder(folder: Path) -> None:
    """Put a new file's name on the disk too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
