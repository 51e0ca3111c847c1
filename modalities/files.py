"""Files on a site's disk: digests, fingerprints of specs, writes that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK_BYTES = 1 << 20
_PREFIX = ".partial-"
_ERRNO = re.compile(r"errno = (\d+)")
_RANDOM = 8  # characters that tempfile adds


def fingerprint(value: Any) -> str:
    """SHA-256 over canonical JSON (sorted keys, no spaces), as 64 hex digits.

    Parameters
    ----------
    value
        Anything ``json`` can write; floats keep their shortest round-trip form.

    Raises
    ------
    ValueError
        If a float is NaN or infinite, which canonical JSON cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_path(path: Path) -> str:
    """SHA-256 of a file's bytes, or of a folder's names and bytes, as 64 hex digits.

    A folder's digest covers every file below it in sorted order, each with its relative name, so
    that a DICOM series has one digest and a renamed slice changes it.

    Raises
    ------
    FileNotFoundError
        If nothing is at ``path``.
    """
    whole = hashlib.sha256()
    if not path.is_dir():
        _feed(whole, path)
        return whole.hexdigest()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        part = hashlib.sha256()
        _feed(part, file)
        whole.update(f"{file.relative_to(path).as_posix()}\0{part.hexdigest()}\n".encode())
    return whole.hexdigest()


def _feed(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; rename it onto ``target`` if the block ends well.

    A kill at any moment leaves the old file or the new one, never half of one; after an exception
    the temporary file is removed and ``target`` is as it was. The temporary name keeps the suffix
    of ``target``, which some writers read.

    Examples
    --------
    >>> with replacing(Path("table.csv")) as path:  # doctest: +SKIP
    ...     frame.to_csv(path)
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f"{_PREFIX}{target.stem}-", suffix=target.suffix
    )
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(target):
            yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a write that fails, on a full disk say, name the file that it was for.

    Python names files that do not open, but none that it cannot write to; HDF5 hides what the
    system said in a long text, and not always in an ``OSError``.

    Raises
    ------
    OSError
        With its number and ``path``, where what was raised has a number and no path.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        told = _ERRNO.search(str(error))
        number = int(told[1]) if told else getattr(error, "errno", None)
        if number is None or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None


def sweep(folder: Path) -> None:
    """Remove what a killed :func:`replacing` left below a folder that nobody else is writing."""
    for file in folder.rglob(f"{_PREFIX}*"):
        if file.is_file():
            file.unlink(missing_ok=True)


def sweep_beside(target: Path) -> None:
    """Remove what a killed :func:`replacing` left of one file that nobody else is writing."""
    start = len(_PREFIX) + len(target.stem) + 1
    for file in target.parent.glob(f"{_PREFIX}{escape(target.stem)}-*{target.suffix}"):
        if len(file.stem) == start + _RANDOM:
            file.unlink(missing_ok=True)
