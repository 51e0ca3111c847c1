"""Append-only log of what a party did: signed lines, each holding the digest of the one before.

Nobody without the party's key can write a line, and whoever has it cannot take one back: the other
parties keep the digests ("heads") that they were shown, and :func:`verify_log` holds the log
against them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from fusion.keys import SIGNATURE_BYTES, canonical_json, digest, verify

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from fusion.keys import SigningKey

    Plain = str | int | bool

LOG_FILE: Final = "audit.jsonl"
NOTHING: Final = "0" * 64
HEAD_SEEN: Final = "head_seen"
KEY_CHANGED: Final = "key_changed"
KEY_TAKEN: Final = "key_taken"
_FIELDS: Final = {"number", "at", "party", "kind", "about", "previous", "signature"}
_AT: Final = "%Y-%m-%dT%H:%M:%SZ"
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_TEXT: Final = re.compile(r"[a-z0-9_.:/-]{0,100}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_SIGNATURE: Final = re.compile(rf"[0-9a-f]{{{2 * SIGNATURE_BYTES}}}")
_MAX_VALUES: Final = 1000


class AuditError(ValueError):
    """A log that nothing can be added to, because what is there is not as it was written."""


@dataclass(frozen=True)
class Entry:
    """One line of a log; ``head`` is its digest, which the next line holds as ``previous``."""

    number: int
    at: str
    party: str
    kind: str
    about: Mapping[str, Any]
    previous: str
    head: str


@dataclass(frozen=True)
class AuditFault:
    """The first entry of a log that is not as its party wrote it, and what came of it."""

    number: int
    fault: Literal["edited", "dropped", "reordered", "forked", "truncated"]
    sentence: str


class AuditLog:
    """One party's log, open for adding to; several processes may, one after the other.

    Parameters
    ----------
    path
        File of one entry per line; made with mode 0600 if absent.
    party
        Name of who writes.
    key
        Signs every entry.

    Raises
    ------
    ValueError
        If the party's name is none.
    AuditError
        If an entry does not follow the one before it, or another key signed the last one.

    Notes
    -----
    An entry is on disk when :meth:`append` returns. A last line that a killed process left
    unfinished was never answered for: it is dropped when the log is next used, and an entry of
    kind ``repaired`` says so.
    """

    def __init__(self, path: Path, *, party: str, key: SigningKey) -> None:
        if not _NAME.fullmatch(party):
            raise ValueError("party: needed a short name in lower case")
        self._path, self._party, self._key = path, party, key
        self._lock = threading.RLock()
        self._depth = 0
        self._starts: list[int] = []
        self._end, self._head = 0, NOTHING
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._close = weakref.finalize(self, os.close, self._file)
        os.fchmod(self._file, 0o600)
        _sync_folder(path.parent)
        with self.held():
            self._require_own_key()

    def close(self) -> None:
        """Let go of the file; nothing can be added any more."""
        self._close()

    @property
    def party(self) -> str:
        """Name of who writes."""
        return self._party

    @property
    def head(self) -> str:
        """Digest of the last entry, 64 zeros before the first."""
        return self.position[1]

    @property
    def position(self) -> tuple[int, str]:
        """Number and digest of the last entry."""
        with self.held():
            return len(self._starts), self._head

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes and threads from adding; what is added is on disk at the end."""
        with self._lock:
            self._depth += 1
            start = self._end
            try:
                if self._depth == 1:
                    fcntl.flock(self._file, fcntl.LOCK_EX)
                    start = self._catch_up()
                yield
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._let_go(sync=self._end > start)

    def _let_go(self, *, sync: bool) -> None:
        try:
            if sync:
                os.fsync(self._file)
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def append(self, kind: str, **about: Plain | Sequence[Plain]) -> str:
        """Add an entry and give its digest.

        Parameters
        ----------
        kind
            Short name of what happened.
        about
            Whole numbers, truth values, text of ``a-z 0-9 _ . : / -`` and lists of these; no
            patient id and no path, which is the caller's duty.

        Raises
        ------
        ValueError
            If a value is of another kind.
        AuditError
            If the file is not as this object left it.
        OSError
            If the disk is full; the log is then as before.
        """
        plain = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in about.items()
        }
        _check_about(kind, plain)
        with self.held():
            self._write(kind, plain)
            return self._head

    def hand_over(self, key: SigningKey) -> None:
        """Let another key sign from now on; the one so far signs that it does.

        Raises
        ------
        AuditError
            If the file is not as this object left it.
        """
        with self.held():
            self._write(KEY_CHANGED, {"old": self._key.public, "new": key.public})
            self._key = key
            self._write(KEY_TAKEN, {})

    def entries(self, *, after: int = 0) -> list[Entry]:
        """Entries with a higher number than ``after``, in order."""
        with self.held():
            if after >= len(self._starts):
                return []
            start = self._starts[after]
            return [_read_line(line) for line in self._read(start, self._end).splitlines()]

    def _write(self, kind: str, about: dict[str, Any]) -> None:
        values = {
            "number": len(self._starts) + 1,
            "at": datetime.now(UTC).strftime(_AT),
            "party": self._party,
            "kind": kind,
            "about": about,
            "previous": self._head,
        }
        values["signature"] = self._key.sign(canonical_json(values)).hex()
        line = canonical_json(values)
        try:
            if os.write(self._file, line + b"\n") != len(line) + 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path.name)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise
        self._take(line)

    def _catch_up(self) -> int:
        """Read what other processes added, repair what one left, and give the end before repair."""
        size = os.fstat(self._file).st_size
        if size < self._end or not self._is_still_there():
            raise AuditError(
                "audit log: found it cut or replaced while in use, needed every entry; "
                "start again after `consilium audit verify`"
            )
        *lines, rest = self._read(self._end, size).split(b"\n")
        if self._end and any(_is_change_from(line, self._key.public) for line in lines):
            raise AuditError(
                "audit log: found that this party's key was changed while it ran, needed the new "
                "one; start again"
            )
        for line in lines:
            self._take(line)
        end = self._end
        if rest:
            os.ftruncate(self._file, end)
            self._write("repaired", {"dropped_bytes": len(rest)})
        return end

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _take(self, line: bytes) -> None:
        number = len(self._starts) + 1
        try:
            entry = _read_line(line)
            follows = (entry.number, entry.previous) == (number, self._head)
        except AuditError:
            follows = False
        if not follows:
            raise AuditError(
                f"audit log: entry {number} does not follow the one before it; nothing is added "
                "until `consilium audit verify` says what happened"
            )
        self._starts.append(self._end)
        self._end += len(line) + 1
        self._head = entry.head

    def _require_own_key(self) -> None:
        if not self._starts:
            return
        line = self._read(self._starts[-1], self._end - 1)
        if not _is_signed(line, self._key.public):
            raise AuditError(
                f"audit log: entry {len(self._starts)} was signed with another key; move the log "
                "away to begin one of this key"
            )

    def _read(self, start: int, end: int) -> bytes:
        parts = []
        while start < end and (part := os.pread(self._file, end - start, start)):
            parts.append(part)
            start += len(part)
        return b"".join(parts)


def is_signed_by(path: Path, public: str) -> bool:
    """Whether the last whole entry of a log was signed with this key; an empty log is anyone's.

    Raises
    ------
    AuditError
        If that line is no entry.
    OSError
        If the file cannot be read.
    """
    lines = _whole_lines(path)
    if not lines:
        return True
    _read_line(lines[-1])
    return _is_signed(lines[-1], public)


def read_entries(path: Path) -> list[Entry]:
    """Read a log as it stands, an unfinished last line left out, without checking signatures.

    Raises
    ------
    AuditError
        If a line is no entry.
    OSError
        If the file cannot be read.
    """
    return [_read_line(line) for line in _whole_lines(path)]


def party_of(path: Path) -> str:
    """Whose log this is by its first entry, or nothing where that cannot be read.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    try:
        return next((_read_line(line).party for line in _whole_lines(path)), "")
    except AuditError:
        return ""


def verify_log(
    path: Path, *, public: str, witnesses: Mapping[int, str] | None = None
) -> AuditFault | None:
    """Name the first entry of a log that was edited, dropped, reordered, forked or truncated.

    Parameters
    ----------
    public
        Public key of the log's party, 64 hex digits; that of today where keys were changed.
    witnesses
        Digest of some entries by number, as other parties saw them (:func:`witnesses_of`).

    Returns
    -------
    AuditFault or None
        None if every entry is as its party signed it and follows the one before, and none that
        another party saw is missing or different.

    Raises
    ------
    OSError
        If the file cannot be read.

    Notes
    -----
    A party that rewrites its own log from some entry on signs every line of it anew; only what
    others saw tells, and only from the first entry that one of them saw. A last line without its
    end was never answered for and counts as absent. What came before a change of keys is vouched
    for by the entry of that change: if that one was edited, the first of them is named. A change
    counts once the new key has signed an entry after it.
    """
    lines = _whole_lines(path)
    keys = _signers(lines, public)
    entries = [_signed_entry(line, key) for line, key in zip(lines, keys, strict=True)]
    return _first_fault(entries, witnesses or {})


def witnesses_of(path: Path, party: str) -> dict[int, str]:
    """Read from another party's log which entries of ``party`` it saw: digest by number.

    An entry that was seen with two digests has an empty one, which no log can hold.

    Raises
    ------
    AuditError
        If a line is no entry.
    OSError
        If the file cannot be read.
    """
    seen = (e.about for e in read_entries(path) if e.kind == HEAD_SEEN)
    return joined_witnesses({a["number"]: a["head"]} for a in seen if _is_head_of(a, party))


def joined_witnesses(witnesses: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """Put together what several parties saw; where they differ stands an empty digest."""
    found: dict[int, str] = {}
    for mapping in witnesses:
        for number, head in mapping.items():
            if found.setdefault(number, head) != head:
                found[number] = ""
    return found


def _is_head_of(about: Mapping[str, Any], party: str) -> bool:
    number = about.get("number")
    known = about.get("party") == party and type(number) is int and number > 0
    return known and isinstance(about.get("head"), str)


def _first_fault(
    entries: Sequence[Entry | None], witnesses: Mapping[int, str]
) -> AuditFault | None:
    head = NOTHING
    for number, entry in enumerate(entries, 1):
        if entry is None:
            text = "is not as its party signed it: it was edited or put in by someone else"
            return _fault(number, "edited", text)
        if entry.number != number:
            return _misplaced(number, entry, entries)
        if entry.previous != head:
            # The next line speaks for another entry of that number than the one that is there.
            text = "is not the one after which the next was written: the log has two continuations"
            return _fault(max(number - 1, 1), "forked", text)
        head = entry.head
        if witnesses.get(number, head) != head:
            text = "is not the one that another party saw: the log forked here or before"
            return _fault(number, "forked", text)
    beyond = [number for number in witnesses if number > len(entries)]
    if beyond:
        text = f"is missing: another party saw the log up to entry {max(beyond)}"
        return _fault(len(entries) + 1, "truncated", text)
    return None


def _misplaced(number: int, entry: Entry, entries: Sequence[Entry | None]) -> AuditFault:
    if entry.number < number:
        first = entries[entry.number - 1]
        if first is not None and first.head == entry.head:
            return _fault(entry.number, "reordered", f"stands again in place of entry {number}")
        text = "is there twice and differs: the log has two continuations"
        return _fault(entry.number, "forked", text)
    if any(later is not None and later.number == number for later in entries[number:]):
        text = f"stands behind entry {entry.number}: entries were reordered"
        return _fault(number, "reordered", text)
    return _fault(number, "dropped", f"was dropped: entry {entry.number} stands in its place")


def _fault(number: int, fault: Any, text: str) -> AuditFault:
    return AuditFault(number, fault, f"entry {number} {text}")


def _whole_lines(path: Path) -> list[bytes]:
    with path.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        return stream.read().split(b"\n")[:-1]


def _signers(lines: Sequence[bytes], public: str) -> list[str]:
    """Key of each line: the party's own, and up to a change of keys the one that it names."""
    found: list[str] = []
    for line in reversed(lines):
        # A change counts by what the new key signed after it: anyone can write that it got a log.
        public = _key_before(line, public) if found else public
        found.append(public)
    return found[::-1]


def _key_before(line: bytes, public: str) -> str:
    try:
        entry = _read_line(line)
    except AuditError:
        return public
    changes = entry.kind == KEY_CHANGED and entry.about.get("new") == public
    old = entry.about.get("old")
    return old if changes and isinstance(old, str) else public


def _is_change_from(line: bytes, public: str) -> bool:
    try:
        entry = _read_line(line)
    except AuditError:
        return False
    return entry.kind == KEY_CHANGED and entry.about.get("old") == public


def _signed_entry(line: bytes, public: str) -> Entry | None:
    try:
        entry = _read_line(line)
    except AuditError:
        return None
    return entry if _is_signed(line, public) else None


def _is_signed(line: bytes, public: str) -> bool:
    values = json.loads(line)
    signature = bytes.fromhex(values.pop("signature"))
    return verify(public, signature, canonical_json(values))


def _read_line(line: bytes) -> Entry:
    try:
        values = json.loads(line)
        if set(values) != _FIELDS or canonical_json(values) != line:
            raise AuditError("audit log: found a line that is no entry")
        _check_entry(values)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise AuditError("audit log: found a line that is no entry") from None
    signature = values.pop("signature")
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        raise AuditError("audit log: found an entry without a signature")
    return Entry(**values, head=digest(line))


def _check_entry(values: dict[str, Any]) -> None:
    if type(values["number"]) is not int or values["number"] < 1:
        raise ValueError("number: needed one from 1")
    if not _NAME.fullmatch(values["party"]) or not _DIGEST.fullmatch(values["previous"]):
        raise ValueError("party, previous: needed a name and a digest")
    datetime.strptime(values["at"], _AT).replace(tzinfo=UTC)
    _check_about(values["kind"], values["about"])


def _check_about(kind: str, about: dict[str, Any]) -> None:
    if not _NAME.fullmatch(kind) or not all(_NAME.fullmatch(name) for name in about):
        raise ValueError("audit entry: needed short names in lower case")
    for name, value in about.items():
        values = value if isinstance(value, list) else [value]
        if len(values) > _MAX_VALUES or not all(_is_plain(one) for one in values):
            raise ValueError(
                f"audit entry: {name}: needed whole numbers, truth values or short text of "
                "lower-case letters, digits and _ . : / -"
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return _TEXT.fullmatch(value) is not None
    return isinstance(value, int) and abs(value) < 2**64


def _sync_folder(folder: Path) -> None:
    """Make a new file's name survive a power cut as its content does."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
