"""What a dossier is made of: what it may show of a run's record, and what stands around it.

Everything that a dossier says follows from these facts, so that it can be written again and
compared.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

from flows.bill_of_materials import materials
from flows.dossier_cells import hidden_cells
from flows.dossier_statements import privacy_facts
from flows.protocol import GovernanceSection
from flows.shown import pointer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT: Final = 1
UNREGISTERED: Final = "not registered yet"
# Counts per patient group that are in no statement stay in the record.
_KEPT: Final = (
    "schema_version", "created", "run", "code_version", "software", "protocol",
    "protocol_fingerprint", "lowered_minimums", "fusion_kind", "sites", "totals", "models",
    "encoders", "networks", "results",
)  # fmt: skip
_RESULTS: Final = (
    "arms", "alone", "subgroups", "heterogeneity", "left_out_pooled", "treatment", "ridge",
    "net_benefit",
)  # fmt: skip
_COLUMNS: Final = (("n_train", "n_train_events"), ("n_test", "n_test_events"))
# Each is a total of its own over the same patients as a column, or some of them.
_BESIDE: Final = {
    "n_train": ("n_fitted", "n_fitted_events"),
    "n_test": ("n_external", "n_external_events"),
}
Facts = dict[str, Any]


@dataclass(frozen=True)
class Approvals:
    """Who agreed to what a run did.

    Attributes
    ----------
    sites
        Per site that approved: ``site``, ``protocol``, ``code``, ``signature`` (in words), ``same``
        (whether it is this run's protocol).
    quorum
        In words: how many sites had to approve.
    """

    sites: tuple[dict[str, str], ...] = ()
    quorum: str = "no start-up kits were made, so that no quorum is known"


@dataclass(frozen=True)
class Version:
    """A version of the registered model, in words, as its history shows it."""

    version: str
    date: str
    run: str
    aliases: str = "none"
    gates: str = "not computed"
    decision: str = "none yet"


@dataclass(frozen=True)
class Surroundings:
    """What a run's record does not know: versions, approvals, when the dossier was made."""

    made: str
    version: str = UNREGISTERED
    history: Sequence[Version] = ()
    approvals: Approvals = field(default_factory=Approvals)


def facts_of(record: Mapping[str, Any], around: Surroundings) -> Facts:
    """Assemble the facts of a dossier.

    Parameters
    ----------
    record
        The run's ``record.json``.
    """
    shown, hidden = shown_record(record)
    study = record["protocol"]["study"]["name"]
    return shown | {
        "dossier": {
            "format": FORMAT,
            "made": around.made,
            "model": f"{study}-fusion",
            "version": around.version,
            "history": [dict(vars(x)) for x in around.history],
            "approvals": list(around.approvals.sites),
            "quorum": around.approvals.quorum,
            "privacy": privacy_facts(record),
            "materials": materials(dict(record)),
            "hidden": hidden,
        }
    }


def shown_record(record: Mapping[str, Any]) -> tuple[Facts, dict[str, str]]:
    """Give what of a record a dossier may show, and which counts are hidden, by JSON pointer.

    A hidden count is None; its state is as in :class:`flows.dossier_cells.Hidden`.
    """
    shown = copy.deepcopy({key: record[key] for key in _KEPT if key in record})
    shown["results"] = {k: v for k, v in shown["results"].items() if k in _RESULTS}
    if shown["results"].get("net_benefit"):
        shown["results"]["net_benefit"].pop("n_patients", None)
    shown["protocol"].setdefault("governance", GovernanceSection().model_dump(mode="json"))
    hidden: dict[str, str] = {}
    least = int(shown["protocol"]["privacy"]["cell"])
    for column in _COLUMNS:
        hidden |= _hidden_of_sites(shown, column, least)
    hidden |= _hidden_of_levels(shown, least)
    for at in hidden:
        _forget(shown, at)
    return shown, hidden


def _hidden_of_sites(shown: Facts, column: tuple[str, str], least: int) -> dict[str, str]:
    rows = [(_count(site, column[0]), _count(site, column[1])) for site in shown["sites"]]
    found = hidden_cells(rows, least=least)
    at = {
        pointer("sites", i, name): state
        for name, states in zip(column, (found.patients, found.events), strict=True)
        for i, state in enumerate(states)
    }
    totals = shown["totals"]
    at |= {pointer("totals", x): state for x, state in zip(column, found.totals, strict=True)}
    for name, other, states in zip(
        column, _BESIDE[column[0]], (found.patients, found.events), strict=True
    ):
        gap = abs((totals[name] or 0) - (totals.get(other) or 0))
        # The same total tells nothing more; another one tells what is between the two.
        if at[pointer("totals", name)] or (gap and (any(states) or gap < least)):
            at[pointer("totals", other)] = "beside"
    return {key: state for key, state in at.items() if state}


def _hidden_of_levels(shown: Facts, least: int) -> dict[str, str]:
    """Hide small levels of subgroups, which add up to the test patients of the sites that told."""
    found: dict[str, str] = {}
    levels = list(enumerate(shown["results"].get("subgroups") or ()))
    for _, group in groupby(levels, key=lambda x: x[1]["variable"]):
        rows = list(group)
        counts = [(_count(x, "n_patients"), _count(x, "n_events")) for _, x in rows]
        states = hidden_cells(counts, least=least)
        for (i, _), of_patients, of_events in zip(
            rows, states.patients, states.events, strict=True
        ):
            found[pointer("results", "subgroups", i, "n_patients")] = of_patients
            found[pointer("results", "subgroups", i, "n_events")] = of_events
    return {key: state for key, state in found.items() if state}


def _count(site: Mapping[str, Any], name: str) -> int:
    return int(site.get(name) or 0)


def _forget(shown: Any, at: str) -> None:
    *way, last = at.split("/")[1:]
    for part in way:
        shown = shown[int(part)] if isinstance(shown, list) else shown[part]
    shown[last] = None
