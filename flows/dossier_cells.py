"""Counts that a page for everybody may show: small cells hidden, and others that would tell them.

A site lets its counts leave under minimum counts; its coordinator may read them in the record of a
run. A dossier is read by many more, and so shows no cell below the protocol's smallest one: neither
patients, nor those with the event, nor those without it, nor any of these by subtraction from a
total that stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

State = Literal["", "small", "beside"]


@dataclass(frozen=True)
class Hidden:
    """What of a table of patients with events is hidden; empty for a cell that may be shown.

    Attributes
    ----------
    patients, events
        One state per row: ``small`` for a count below the smallest cell, ``beside`` for one that
        would give such a count away.
    totals
        Of all patients, and of all events.
    """

    patients: tuple[State, ...]
    events: tuple[State, ...]
    totals: tuple[State, State]


def hidden_cells(rows: Sequence[tuple[int, int]], *, least: int) -> Hidden:
    """Say which counts of rows that add up to a total are hidden.

    Parameters
    ----------
    rows
        Patients, and events among them; no patients where a site told nothing.
    least
        Smallest count that may be shown.
    """
    patients, total = _guarded(
        [(n,) for n, _ in rows], [_of_size(n, least) for n, _ in rows], least
    )
    own = [
        "beside" if state else _of_events(*row, least)
        for row, state in zip(rows, patients, strict=True)
    ]
    cells = [(events, n - events) for n, events in rows]
    events, total_events = _guarded(cells, own, least)
    return Hidden(tuple(patients), tuple(events), (total, total or total_events))


def _of_size(n: int, least: int) -> State:
    return "small" if 0 < n < least else ""


def _of_events(n: int, n_events: int, least: int) -> State:
    """State of a cell of events whose patients are shown."""
    if n == 0:
        return ""
    if n_events < least:
        return "small" if least > 1 else ""
    return "beside" if 0 < n - n_events < least else ""


def _guarded(
    cells: Sequence[tuple[int, ...]], states: Sequence[str], least: int
) -> tuple[list[State], State]:
    """Hide more cells, smallest first, until the total gives no hidden one away."""
    found: list[State] = list(states)  # type: ignore[arg-type]
    while _tells(cells, found, least):
        shown = [i for i, state in enumerate(found) if not state and cells[i][0]]
        if not shown:
            return found, "beside"
        found[min(shown, key=lambda i: (min(cells[i]), i))] = "beside"
    return found, ""


def _tells(cells: Sequence[tuple[int, ...]], states: Sequence[State], least: int) -> bool:
    kept = [cell for cell, state in zip(cells, states, strict=True) if state]
    if not kept:
        return False
    return len(kept) == 1 or any(0 < sum(of_kind) < least for of_kind in zip(*kept, strict=True))
