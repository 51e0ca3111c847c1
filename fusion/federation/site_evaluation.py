"""What a site tells of the arms on its test rows: sums, and tables without small cells."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fusion import messages as m
from fusion.evaluation import (
    brier_sums,
    calibration_sums,
    life_table,
    null_brier_sums,
    pair_counts,
    uno_pair_counts,
)
from fusion.survival import cumulative_hazard

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fusion.evaluation import BrierSums, CensoringCurve
    from fusion.federation.rows import Outcome

    Floats = NDArray[np.float64]


def evaluate_arms(
    request: m.AskEvaluation,
    test: Outcome,
    log_hazard: Sequence[Floats],
    own: Floats | None,
    *,
    curve: CensoringCurve,
    cell: int,
) -> m.Evaluation:
    """Evaluate every arm, and the site's own model in pairs only, on the site's test rows.

    Parameters
    ----------
    request
        Grid, horizon, and each arm's hazard and group boundaries.
    test
        Outcome of the (n_test,) rows.
    log_hazard
        (n_test,) of each arm, in the request's order; higher is worse.
    own
        (n_test,) of the site's own model; None where it has none.
    curve
        Censoring curve of the site.
    cell
        Smallest count that may leave; a table with a smaller one is zeros.
    """
    of_arms = [
        _arm_tables(request, row, test, x, curve=curve, cell=cell)
        for row, x in enumerate(log_hazard)
    ]
    ranked = [*log_hazard] if own is None else [*log_hazard, own]
    pairs = [pair_counts(x, test.event, test.time).to_vector() for x in ranked]
    uno = [
        uno_pair_counts(x, test.event, test.time, curve, request.horizon_days).to_vector()
        for x in ranked
    ]
    null = null_brier_sums(test.event, test.time, request.edges_days, curve)
    shown = _apart(request, log_hazard, cell)
    return m.Evaluation(
        n_test=len(test),
        n_test_events=int(test.event.sum()),
        pairs=np.array(pairs),
        uno=np.array(uno),
        brier=np.array([brier for brier, _, _ in of_arms] + [_averaged(null)]),
        life_table=shown * np.array([life for _, life, _ in of_arms]),
        calibration=shown * np.array([cells for _, _, cells in of_arms]),
    )


def _apart(request: m.AskEvaluation, log_hazard: Sequence[Floats], cell: int) -> NDArray[np.bool_]:
    """(arms, 1) whose tables may leave: groups must not differ from another arm's by a few."""
    groups = [np.searchsorted(c, x) for c, x in zip(request.groups, log_hazard, strict=True)]
    shown = np.ones((len(groups), 1), dtype=bool)
    for row, group in enumerate(groups):
        moved = [int((group != other).sum()) for other in groups[:row]]
        shown[row] = not any(0 < n < cell for n in moved)
    return shown


def _arm_tables(
    request: m.AskEvaluation,
    row: int,
    test: Outcome,
    log_hazard: Floats,
    *,
    curve: CensoringCurve,
    cell: int,
) -> tuple[Floats, Floats, Floats]:
    """Brier sums, life table and calibration of one arm; a table with a small cell is zeros."""
    edges, cuts = request.edges_days, request.groups[row]
    hazard = request.hazard_per_day[row]

    def surviving(times: Floats) -> Floats:
        expected = np.exp(log_hazard)[:, None] * cumulative_hazard(hazard, edges, times)
        return np.exp(-expected)

    group = np.searchsorted(cuts, log_hazard)
    n_groups = len(cuts) + 1
    life = life_table(test.event, test.time, group, np.append(0.0, edges), n_groups)
    cells = calibration_sums(
        surviving(np.array([request.horizon_days]))[:, 0],
        test.event,
        test.time,
        group,
        horizon=request.horizon_days,
        censoring=curve,
        n_groups=n_groups,
    )
    brier = brier_sums(surviving(edges), test.event, test.time, edges, curve)
    return (
        _averaged(brier),
        _without_small_cells(_with_survivors(life.counts), life.to_vector(), cell),
        _without_small_cells(
            np.stack([cells.n_patients, cells.n_events, cells.n_patients - cells.n_events]),
            cells.to_vector(),
            cell,
        ),
    )


def _without_small_cells(counts: Floats, vector: Floats, cell: int) -> Floats:
    small = (counts > 0) & (counts < cell)
    return np.zeros_like(vector) if small.any() else vector


def _averaged(brier: BrierSums) -> Floats:
    """Brier sums with the grid's average at every time: each time's own would tell its events."""
    average = np.full_like(brier.squared_errors, brier.integral[0])
    return replace(brier, squared_errors=average).to_vector()


def _with_survivors(counts: Floats) -> Floats:
    """Cells of a life table, with those that subtraction gives: at risk beyond the last edge."""
    at_risk, events, censored = np.moveaxis(counts, 2, 0)
    return np.concatenate([counts.ravel(), (at_risk - events - censored)[:, -1]])
