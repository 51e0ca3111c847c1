"""Tags of a version that tell of gates, decisions and evaluations, noted in the audit log.

They are written after a version was registered, so that its signed lineage cannot hold them. The
coordinator's audit log does: its entries are signed, and each holds the digest of the one before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flows.identity import identity
from fusion.audit import LOG_FILE, AuditLog
from fusion.federation.consortium import COORDINATOR
from fusion.keys import digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

GATES, EVALUATION = "gates", "evaluation"
PROMOTED, REJECTED = "promoted", "promotion_rejected"
_OF_GATES: Final = ("gate.", "consilium.gates")
_OF_DECISION: Final = (
    "approved_", "decision_", "consilium.rejected", "consilium.decided_in",
    "consilium.previous_champion",
)  # fmt: skip
_OF_EVALUATION: Final = ("consilium.last_evaluation", "consilium.evaluated_cohorts")
_CHARACTERS: Final = 32  # of a digest: an entry holds one per tag


def is_noted(name: str) -> bool:
    """Whether a tag is one that the audit log knows."""
    return name.startswith((*_OF_GATES, *_OF_DECISION, *_OF_EVALUATION))


def of_decision(tags: Mapping[str, str]) -> dict[str, str]:
    """Give those tags that a decision left."""
    return {name: value for name, value in tags.items() if name.startswith(_OF_DECISION)}


def digests_of(tags: Mapping[str, str]) -> list[str]:
    """Give tags as an audit log may hold them: each name with a digest of its value."""
    return [f"{name}:{_digest(value)}" for name, value in sorted(tags.items())]


def known_digests(noted: Any) -> dict[str, str]:
    """Read :func:`digests_of` back."""
    pairs = (str(x).rpartition(":") for x in noted or ())
    return {name: of for name, _, of in pairs if name}


def as_noted(tags: Mapping[str, str]) -> dict[str, str]:
    """Give tags with the digests of their values in the place of these."""
    return {name: _digest(value) for name, value in tags.items() if is_noted(name)}


def note_tags(root: Path, kind: str, tags: Mapping[str, str], **about: Any) -> None:
    """Write to the coordinator's audit log which tags a version has now; the same again is nothing.

    Parameters
    ----------
    about
        ``model`` and ``version``, and whatever else the entry tells.
    """
    home = root / COORDINATOR
    log = AuditLog(home / LOG_FILE, party=COORDINATOR, key=identity(home))
    entry = {**about, "tags": digests_of(tags)}
    which = {name: about[name] for name in ("model", "version")}
    try:
        with log.held():
            of_kind = [dict(e.about) for e in log.entries() if e.kind == kind]
            before = [x for x in of_kind if which.items() <= x.items()]
            if not before or before[-1] != entry:
                log.append(kind, **entry)
    finally:
        log.close()


def _digest(value: str) -> str:
    return digest(value.encode())[:_CHARACTERS]
