"""What a site wrote, byte for byte: the digest of each of its files, kept in ``digests.json``.

A cohort's own digest covers who is in it and from which inputs; a changed value in its tables it
does not see. Here every file that results rest on has its SHA-256 from the moment it was written:
the draft with its features, who is held out for testing, each snapshot, each encoder. Whoever may
write to the site's folder may write this file as well: it finds what changed by accident or in
passing, not what a person with all rights wants hidden.
"""

from __future__ import annotations

import fcntl
import json
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final

from flows.manifest_rows import note_rows
from modalities.files import digest_path, fingerprint, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from infra.settings import SiteSettings

DIGESTS: Final = "digests.json"
_LOCK: Final = ".digests.lock"
_COHORT: Final = "cohort.h5mu"
_ASSIGNMENTS: Final = "assignments.csv"
_FEATURES: Final = "features"
_TABLES: Final = (".h5ad", ".h5")
_WHOLE: Final = "whole"
_CLOCK_NS: Final = 1_000_000_000  # a file's time may lag behind the clock


@dataclass
class _Digests:
    """Per file below the site's home: size, time of change in ns, SHA-256.

    ``since_ns`` is when the first night began that did not end; ``doubted`` are files that a night
    adds to, and that were not as they were written when it began.
    """

    files: dict[str, list[int | str]] = field(default_factory=dict)
    since_ns: int | None = None
    doubted: list[str] = field(default_factory=list)


def begin_draft(settings: SiteSettings) -> None:
    """Note that features, cohort and assignments are about to be written, from which rows."""
    note_rows(settings)
    with _opened(settings) as known:
        if known.since_ns is None:
            known.since_ns = time.time_ns() - _CLOCK_NS
            entry, path = known.files.get(_ASSIGNMENTS), settings.path(_ASSIGNMENTS)
            is_whole = entry is None or (path.is_file() and digest_path(path) == entry[2])
            known.doubted = [] if is_whole else [_ASSIGNMENTS]


def remember_draft(settings: SiteSettings) -> None:
    """Digest what was written to features, cohort and assignments since :func:`begin_draft`.

    A file that changed before then keeps its old digest, so that the change is found.
    """
    with _opened(settings) as known:
        for path in _draft_files(settings):
            name, stat = _name(settings, path), path.stat()
            if name in known.doubted:  # what was changed before is in what the night wrote
                continue
            before = known.files.get(name)
            as_before = before is not None and before[:2] == [stat.st_size, stat.st_mtime_ns]
            before_us = known.since_ns is not None and stat.st_mtime_ns < known.since_ns
            if not as_before and (before is None or not before_us):
                known.files[name] = _entry(path)
        gone = [x for x in known.files if _is_draft(x) and not settings.path(x).exists()]
        for name in gone:
            del known.files[name]
        known.since_ns = None


def remember(settings: SiteSettings, paths: Iterable[Path]) -> None:
    """Digest files that were just written."""
    with _opened(settings) as known:
        seen = {tuple(entry[:2]): entry for entry in known.files.values()}
        for path in paths:
            stat = path.stat()
            # A bag that a snapshot shares with the draft need not be read again.
            shared = seen.get((stat.st_size, stat.st_mtime_ns)) if stat.st_nlink > 1 else None
            known.files[_name(settings, path)] = list(shared) if shared else _entry(path)


def forget_missing(settings: SiteSettings) -> None:
    """Drop the digests of files that were deleted on purpose, with their names."""
    with _opened(settings) as known:
        known.files = {x: of for x, of in known.files.items() if settings.path(x).exists()}


def is_recorded(settings: SiteSettings) -> bool:
    """Whether the site has digests of its files; one of an earlier release has none."""
    return settings.path(DIGESTS).is_file()


def altered(settings: SiteSettings, below: str = "") -> dict[str, str]:
    """Read every file anew, and say of each that is not as it was written what became of it.

    Parameters
    ----------
    below
        Only files whose name, relative to the site's home, begins so.

    Returns
    -------
    dict
        Name to ``changed`` or ``missing``.
    """
    known = _read(settings.path(DIGESTS))
    if known is None:
        return {DIGESTS: "changed"}
    found = {}
    for name, entry in sorted(known.files.items()):
        if not name.startswith(below):
            continue
        path = settings.path(name)
        if not path.is_file():
            found[name] = "missing"
        elif digest_path(path) != entry[2]:
            found[name] = "changed"
    return found


def recorded(settings: SiteSettings, below: str = "") -> dict[str, str]:
    """Give the SHA-256 of each file of the site as it was written."""
    known = _read(settings.path(DIGESTS)) or _Digests()
    return {name: str(x[2]) for name, x in known.files.items() if name.startswith(below)}


def _draft_files(settings: SiteSettings) -> list[Path]:
    found = [x for x in settings.path(_FEATURES).rglob("*") if x.suffix in _TABLES]
    whole = (settings.path(_COHORT), settings.path(_ASSIGNMENTS))
    return sorted(x for x in (*found, *whole) if x.is_file())


def _is_draft(name: str) -> bool:
    return name == _COHORT or name.startswith(f"{_FEATURES}/")


def _entry(path: Path) -> list[int | str]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, digest_path(path)]


def _name(settings: SiteSettings, path: Path) -> str:
    return path.relative_to(settings.home).as_posix()


def _read(path: Path) -> _Digests | None:
    try:
        values = json.loads(path.read_bytes())
        # One of an earlier release has no digest of its own.
        whole = values.pop(_WHOLE, None) in (None, fingerprint(values))
        found = _Digests(**values)
        whole = whole and all(len(entry) == 3 for entry in found.files.values())
    except FileNotFoundError:
        return _Digests()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    return found if whole else None


@contextmanager
def _opened(settings: SiteSettings) -> Iterator[_Digests]:
    path = settings.path(DIGESTS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with settings.path(_LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A damaged one is begun anew: it vouches for nothing any more.
        known = _read(path) or _Digests()
        yield known
        values = asdict(known)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(values | {_WHOLE: fingerprint(values)}))
