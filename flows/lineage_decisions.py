"""What tags and aliases say of gates, decisions and evaluations, against the audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flows.identity import public_key
from flows.lineage_items import COORDINATOR, NOT_THERE, Item, differences
from flows.noted_tags import (
    EVALUATION,
    GATES,
    PROMOTED,
    REJECTED,
    as_noted,
    known_digests,
)
from fusion.audit import LOG_FILE, AuditError, read_entries, verify_log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from flows.lineage import Lineage
    from fusion.audit import Entry

_CHAMPION, _CHALLENGER = "champion", "challenger"
_KINDS: Final = ((GATES,), (PROMOTED, REJECTED), (EVALUATION,))


def check_decisions(found: Lineage) -> Iterator[Item]:
    """Hold tags of gates, decisions and evaluations, and the aliases, against the audit log."""
    home = found.workspace.root / COORDINATOR
    tags = as_noted(found.version.tags)
    claimed = sorted({_CHAMPION, _CHALLENGER}.intersection(found.aliases))
    public, log = public_key(home), home / LOG_FILE
    if public is None or not (log.is_file() or tags or claimed):
        if tags or claimed:
            why = "the coordinator's audit log is not here, to hold them against"
            yield Item(COORDINATOR, "gates and decisions", "elsewhere", why=why)
        return
    if not log.is_file():
        yield Item(COORDINATOR, "audit log", "missing")
        return
    fault = verify_log(log, public=public)
    if fault is not None:
        yield Item(COORDINATOR, "audit log", "changed", why=fault.sentence)
        return
    try:
        entries = [x for x in read_entries(log) if x.about.get("model") == found.version.name]
    except AuditError as error:
        yield Item(COORDINATOR, "audit log", "changed", why=str(error))
        return
    yield from _tag_items(found, entries, tags)
    yield from _alias_items(found, entries)


def _tag_items(found: Lineage, entries: Sequence[Entry], tags: dict[str, str]) -> Iterator[Item]:
    wanted: dict[str, str] = {}
    for kinds in _KINDS:
        last = _last(entries, kinds, version=int(found.version.version))
        wanted |= known_digests(last.get("tags"))
    faults = list(differences("tag {} of the version", tags, wanted))
    yield from faults
    if wanted and not faults:
        yield Item(COORDINATOR, "tags of gates and decisions, as the audit log has them", "whole")


def _alias_items(found: Lineage, entries: Sequence[Entry]) -> Iterator[Item]:
    """Check that the model in use is the last one that was promoted, and a challenger passed."""
    mine = int(found.version.version)
    promoted = _last(entries, (PROMOTED,)).get("version")
    if _CHAMPION in found.aliases and promoted != mine:
        why = f"the audit log has version {promoted or 'none'} as the last one promoted"
        yield Item(COORDINATOR, f"alias {_CHAMPION}", "changed", why=why)
    elif promoted == mine and _CHAMPION not in found.aliases:
        why = "the audit log has this version as the last one promoted"
        yield Item(COORDINATOR, f"alias {_CHAMPION}", "missing", why=why)
    gates = _last(entries, (GATES,), version=mine)
    if _CHALLENGER in found.aliases and not gates.get("passed"):
        yield Item(COORDINATOR, f"alias {_CHALLENGER}", "changed", why=NOT_THERE)


def _last(entries: Sequence[Entry], kinds: Sequence[str], **about: Any) -> dict[str, Any]:
    mine = (dict(x.about) for x in reversed(entries) if x.kind in kinds)
    return next((x for x in mine if about.items() <= x.items()), {})
