"""Of all processes that prepare or train one site, one works at a time; the others wait."""

from __future__ import annotations

import fcntl
import functools
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

from flows.snapshots import withdraw_again
from infra.settings import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from infra.settings import SiteSettings

R = TypeVar("R")

LOCK: Final = "site.lock"


@contextmanager
def turn(settings: SiteSettings) -> Iterator[None]:
    """Wait until no other process prepares or trains the site; a killed one lets go at once.

    Features and cohort are read, added to and written anew: of two writers at once, the last one
    would undo what the other had added. A patient may be withdrawn at any moment: what was written
    behind a withdrawal is deleted when the turn ends, or, after a kill, when the next one begins.
    """
    with settings.path(LOCK).open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(
                f"{settings.name}: found another process that prepares or trains this site; "
                "waiting for it to end\n"
            )
            sys.stderr.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        _settle_withdrawals(settings, file)
        try:
            yield
        finally:
            _settle_withdrawals(settings, file)


def _settle_withdrawals(settings: SiteSettings, file: BinaryIO) -> None:
    """Delete what was written behind a withdrawal; the lock's file counts those dealt with."""
    file.seek(0)
    text = file.read()
    before = int(text) if text.isdigit() else 0
    now = withdraw_again(settings, after=before)
    if now != before:
        file.truncate(0)
        file.write(str(now).encode())
        file.flush()


def in_turn(work: Callable[[str, str], R]) -> Callable[[str, str], R]:
    """Let a flow of a study and a site work only in its turn."""

    @functools.wraps(work)
    def waiting(study: str, site: str) -> R:
        with turn(Workspace().site(site)):
            return work(study, site)

    return waiting
