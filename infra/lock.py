"""Of a lock of everything, the part that runs: what development alone needs is left out."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import TYPE_CHECKING, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_BLOCK: Final = re.compile(
    r"^(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==.*(?:\n[ \t].*)*\n?", re.MULTILINE
)


def blocks(lock: str) -> dict[str, str]:
    """Take a lock with hashes apart: the lines of each package by its name."""
    return {canonicalize_name(found["name"]): found.group() for found in _BLOCK.finditer(lock)}


def needed(
    package: str, requirements_of: Callable[[str], Iterable[str]], known: Mapping[str, str]
) -> set[str]:
    """Names of all packages that a package needs to run here, itself left out.

    Parameters
    ----------
    requirements_of
        Gives the requirements of a package as its metadata name them.
    known
        Packages of the lock; what is not in it is not needed on this machine.
    """
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(package), "")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in requirements_of(name):
            part = Requirement(text)
            if part.marker is not None and not part.marker.evaluate({"extra": extra}):
                continue
            other = canonicalize_name(part.name)
            if other in known:
                found.add(other)
                waiting += [(other, ""), *((other, one) for one in part.extras)]
    return found


def runtime_lock(lock: str, package: str = "consilium") -> str:
    """Give the blocks of a lock that an installed package needs, in the lock's order."""
    known = blocks(lock)
    wanted = needed(package, _requirements_of, known)
    return "".join(block for name, block in known.items() if name in wanted)


def _requirements_of(name: str) -> list[str]:
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return []


if __name__ == "__main__":
    sys.stdout.write(runtime_lock(Path(sys.argv[1]).read_text()))
