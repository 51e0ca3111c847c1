"""``consilium site status``: what a site has done, what waits, and what was set aside and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from flows.terminal import OUT, Json, Root, Site, only_site, opened, print_json, say

if TYPE_CHECKING:
    from collections.abc import Mapping

Patients = Annotated[
    bool, typer.Option("--patients", help="Name the patients set aside; for this terminal only.")
]


def site_status(
    site: Site = None, root: Root = Path(), patients: Patients = False, as_json: Json = False
) -> None:
    """Show what is done, pending and set aside, and how the site stands; nothing is changed."""
    from flows.site_status import modality_states
    from flows.site_status import site_status as status_of

    workspace, protocol = opened(root)
    settings = workspace.site(only_site(workspace, site))
    states = modality_states(settings, protocol)
    found = status_of(workspace.root, settings, protocol, states)
    aside = [one for state in states.values() for one in state.excluded]
    if as_json:
        print_json(found | ({"patients": [vars(one) for one in aside]} if patients else {}))
        return
    _print(found)
    for one in aside if patients else ():
        say(f"{one.patient_id}  {one.modality}  {one.code}: {one.reason}")


def _print(found: Mapping[str, Any]) -> None:
    table = Table("modality", "done", "pending", "changed", "set aside")
    for name, state in found["modalities"].items():
        aside = sum(one["n"] for one in state["excluded"])
        counts = (state["done"], state["pending"], sum(state["changed"].values()), aside)
        table.add_row(name, *map(str, counts))
    say(f"{found['site']}, study {found['study']}")
    OUT.print(table)
    for line in _sentences(found):
        say(line)


def _sentences(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, state in found["modalities"].items():
        lines += [f"{name}: {n} to do again: {why}" for why, n in state["changed"].items()]
        lines += [
            f"{name}: {one['n']} set aside: {one['code']}: {one['reason']}"
            for one in state["excluded"]
        ]
    lines += [_night(found["last_night"]), _snapshot(found["snapshot"])]
    lines += [
        f"encoder {name}: {' '.join([one['state'], *_brackets(one['why'])])}"
        for name, one in found["encoders"].items()
    ]
    lines += [_approval(found["approval"]), _budget(found["privacy_budget"])]
    runs = found["next_runs"]["runs"] or {"services": found["next_runs"]["services"]}
    lines += [f"next {name}: {when}" for name, when in runs.items()]
    return lines + [one["sentence"] for one in found["certificates"]]


def _brackets(why: list[str]) -> list[str]:
    return [f"({'; '.join(why)})"] if why else []


def _night(night: Mapping[str, Any] | None) -> str:
    if night is None:
        return "last night: none has ended yet; run `consilium site prepare`"
    return (
        f"last night: ended {night['ended']}, {night['n_patients']} patients, "
        f"{night['n_extracted']} inputs extracted, {night['n_excluded']} set aside"
    )


def _snapshot(state: Mapping[str, Any]) -> str:
    if "fault" in state:
        return f"snapshot: {state['fault']}"
    waiting = "nobody knows who waits" if state["n_waiting"] is None else str(state["n_waiting"])
    return (
        f"snapshot: number {state['last']} of {state['n_snapshots']}, {state['n_patients']} "
        f"patients; waiting for the next: {waiting}; withdrawn: {state['n_withdrawn']}"
    )


def _approval(state: Mapping[str, Any]) -> str:
    signed = "signed by this site" if state["signed"] else "; ".join(state["why"])
    others = ", ".join(state["sites"]) or "no site"
    return f"approval: {signed}; this study has the signatures of {others}"


def _budget(state: Mapping[str, Any] | None) -> str:
    if state is None:
        return "privacy budget: the study has none"
    if "fault" in state:
        return f"privacy budget: {state['fault']}"
    return (
        f"privacy budget: epsilon {state['left']:.3g} left of {state['epsilon']:.3g}, "
        f"{state['spent']:.3g} spent"
    )
