"""Of all processes that prepare or train one site, one works at a time; the others wait."""

from __future__ import annotations

import fcntl
import functools
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

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
    would undo what the other had added.
    """
    with settings.path(LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.stderr.write(
                f"{settings.name}: found another process that prepares or trains this site; "
                "waiting for it to end\n"
            )
            sys.stderr.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_turn(work: Callable[[str, str], R]) -> Callable[[str, str], R]:
    """Let a flow of a study and a site work only in its turn."""

    @functools.wraps(work)
    def waiting(study: str, site: str) -> R:
        with turn(Workspace().site(site)):
            return work(study, site)

    return waiting
