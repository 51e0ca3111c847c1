"""Who stands behind a sum: the minimum counts below which a site keeps its figures to itself."""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

Refusal = Literal[
    "below_minimum_patients",
    "below_minimum_events",
    "too_many_inputs",
    "fold_too_small",
    "modality_absent",
    "wrong_protocol",
    "wrong_run",
    "malformed_request",
    "already_answered",
    "rounds_spent",
    "small_cell",
    "site_error",
    "not_approved",
    "replayed",
    "bad_signature",
    "unknown_sender",
    "roster_too_small",
    "roster_changed",
    "bad_key",
    "mask_spent",
    "overflow",
    "budget_spent",
    "withdrawn",
    "not_within_bounds",
]


class MinimumCounts(BaseModel):
    """The counts that a site demands before a sum leaves it; the defaults hold for patients' data.

    Lower ones are for simulated and public data only and are printed wherever results are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    patients: int = Field(default=50, ge=1, description="training patients behind any sum")
    events: int = Field(default=20, ge=1, description="observed events behind any sum")
    patients_per_input: int = Field(default=5, ge=1, description="patients per input of a fit")
    cell: int = Field(default=10, ge=1, description="patients in any cell of a released table")
    test_events: int = Field(default=10, ge=1, description="test events behind any released metric")
    pooled_patients: int = Field(default=100, ge=1, description="training patients over all sites")
    snapshot: int = Field(
        default=10, ge=1, description="patients by which two cohorts that a site releases differ"
    )
    intervals: int = Field(default=5, ge=2, le=12, description="most intervals of the time grid")

    def lowered(self) -> tuple[str, ...]:
        """Name each limit that protects less than its default, with both numbers."""
        default = MinimumCounts()
        return tuple(
            f"{name} {value} (default {getattr(default, name)})"
            for name, value in self.model_dump().items()
            if self._protection(name) < default._protection(name)
        )

    def _protection(self, name: str) -> int:
        """Give a limit so that higher protects more."""
        value: int = getattr(self, name)
        return -value if name == "intervals" else value

    def strictest(self, other: MinimumCounts) -> MinimumCounts:
        """Of each limit the one that protects more: a site's own hold beside the protocol's."""
        return MinimumCounts(
            **{
                name: getattr(
                    self if self._protection(name) >= other._protection(name) else other, name
                )
                for name in MinimumCounts.model_fields
            }
        )

    def refuses(self, *, n_patients: int, n_events: int, n_inputs: int) -> Refusal | None:
        """Why a site keeps a sum over these patients to itself, or None if it may leave.

        The rule is the same for a difference of two released sums, which is a sum over the
        patients in which they differ.
        """
        if n_patients < self.patients:
            return "below_minimum_patients"
        if n_events < self.events:
            return "below_minimum_events"
        if n_patients < self.patients_per_input * n_inputs:
            return "too_many_inputs"
        return None

    def refuses_folds(
        self, folds: np.ndarray, event: np.ndarray, *, n_folds: int, n_inputs: int
    ) -> Refusal | None:
        """Why cross-fitting is refused: each fold is the difference of two released sums.

        Parameters
        ----------
        folds
            (n,) fold of each patient behind the fit, 0 to ``n_folds - 1``.
        event
            (n,) True where the event was observed.
        """
        patients = np.bincount(folds, minlength=n_folds)
        events = np.bincount(folds[event], minlength=n_folds)
        for n_patients, n_events in zip(patients, events, strict=True):
            if self.refuses(n_patients=n_patients, n_events=n_events, n_inputs=n_inputs):
                return "fold_too_small"
        return None


def outweighed(log_hazard: np.ndarray, *, share: float = 0.8) -> bool:
    """Whether one patient carries most of a sum weighted by hazard, or the hazards overflow.

    Such a sum tells that patient's values, however many patients stand behind it.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse.
    share
        Of all weight, above which one patient outweighs the others.
    """
    if log_hazard.size == 0 or not np.isfinite(log_hazard).all():
        return log_hazard.size > 0
    return bool(share * np.exp(log_hazard - log_hazard.max()).sum() < 1.0)


def saturated(weights: np.ndarray, *, share: float = 0.8, least: float = 0.2) -> bool:
    """Whether sums by interval rest on one patient, or on nobody, where others' odds are extreme.

    Parameters
    ----------
    weights
        (n, k) of each patient in each interval.
    share
        Of an interval's weight, above which one patient outweighs the others.
    least
        Weight of an interval that holds an event and a survivor at its own odds, with room.
    """
    total = weights.sum(axis=0)
    return bool((total < least).any() or (weights.max(axis=0, initial=0.0) > share * total).any())


def releasable_edges(
    event: np.ndarray, time: np.ndarray, edges_days: np.ndarray, *, cell: int
) -> np.ndarray:
    """Say which interior interval edges a site can release without a small cell.

    Walks from the left and keeps an edge when the interval that it closes, and all that follows up
    to the last edge, hold at least ``cell`` events each, and at least ``cell`` patients are still
    at risk beyond it. Edges that every site keeps leave cells that are unions of passing cells.

    Parameters
    ----------
    event, time
        (n,) outcome.
    edges_days
        (k,) increasing right ends of the intervals.

    Returns
    -------
    numpy.ndarray
        (k - 1,) True where the edge may stay; the last edge always stays.
    """
    kept = np.zeros(len(edges_days) - 1, dtype=bool)
    left = 0.0
    for i, right in enumerate(edges_days[:-1]):
        closed = int(np.sum(event & (time > left) & (time <= right)))
        following = int(np.sum(event & (time > right) & (time <= edges_days[-1])))
        if min(closed, following, int(np.sum(time > right))) >= cell:
            kept[i], left = True, right
    return kept
