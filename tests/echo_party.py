"""A site's party for tests of the engine: no data, and faults on request."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MARKER = "Mustermann-0815-1957"
LARGEST = 64 * 1024 * 1024 + 64 * 1024
ENTRY_POINTS = "[consilium.federation]\nsite = echo_party:open_party\n"
METADATA = "Metadata-Version: 2.1\nName: echo-party\nVersion: 0\n"


def open_party(kit: Path) -> Callable[[bytes], bytes]:
    """Answer with the name of the kit's folder and the request; or fail in the way it names."""

    def answer(payload: bytes) -> bytes:
        if payload == b"fail":
            raise RuntimeError(f"patient {MARKER} has no outcome")
        if payload == b"too much":
            return bytes(LARGEST + 1)
        if payload == b"hang at site-b" and kit.name == "site-b":
            time.sleep(30)
        return kit.name.encode() + b":" + payload

    return answer


def install(folder: Path) -> None:
    """Make this file the party of every site whose PYTHONPATH begins with the folder."""
    from pathlib import Path

    package = folder / "echo_party-0.dist-info"
    package.mkdir(parents=True)
    (package / "entry_points.txt").write_text(ENTRY_POINTS)
    (package / "METADATA").write_text(METADATA)
    (folder / "echo_party.py").write_text(Path(__file__).read_text())
