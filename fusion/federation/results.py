"""What a finished run says: figures with intervals, from the sums that sites released."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusion.evaluation import (
    BrierSums,
    Calibration,
    CalibrationSums,
    Estimate,
    Estimates,
    LifeTable,
    LogRankTest,
    NoComparablePairs,
    PairCounts,
    calibration,
    concordance_index,
    integrated_brier_score,
    log_rank_sums,
    log_rank_test,
    survival_from_life_table,
)
from fusion.federation.plan import LOCAL_ONLY, FederationPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from fusion.federation.coordinator import Fitted
    from fusion.messages import Evaluation


@dataclass(frozen=True)
class ArmResult:
    """How one arm does on the test patients; None where no site could release the figure.

    Attributes
    ----------
    concordance
        Harrell's, within site, pooled over comparable pairs; higher is better.
    by_site
        The same for each site that released it.
    uno
        Uno's concordance up to the horizon.
    brier, null_brier
        Integrated Brier score of the arm, and of each site's Kaplan-Meier curve; lower is better.
    survival
        (n_groups, n_intervals) Kaplan-Meier survival at the grid's edges, by risk group from low
        to high.
    log_rank
        Test that the risk groups do not differ, stratified by site.
    calibration
        (n_groups,) predicted and observed risk at the horizon.
    """

    arm: str
    concordance: Estimate | None
    by_site: dict[str, Estimate]
    uno: Estimate | None
    brier: Estimate | None = None
    null_brier: Estimate | None = None
    survival: Estimates | None = None
    log_rank: LogRankTest | None = None
    calibration: Calibration | None = None


def summarise(fitted: Fitted, plan: FederationPlan) -> dict[str, ArmResult]:
    """Turn the sums of a run into one result per arm, and one for the sites' own models."""
    edges = next(iter(fitted.models.values())).edges_days
    released = fitted.evaluations
    results = {
        arm: _arm_result(arm, row, released, edges=edges, plan=plan)
        for row, arm in enumerate(fitted.models)
    }
    n_arms = len(fitted.models)
    own = {site: e for site, e in released.items() if len(e.pairs) > n_arms}
    if own:
        results[LOCAL_ONLY] = ArmResult(
            arm=LOCAL_ONLY,
            concordance=_concordance([PairCounts.from_vector(e.pairs[-1]) for e in own.values()]),
            by_site=_by_site({s: e.pairs[-1] for s, e in own.items()}),
            uno=_concordance([PairCounts.from_vector(e.uno[-1]) for e in own.values()]),
        )
    return results


def _arm_result(
    arm: str,
    row: int,
    released: dict[str, Evaluation],
    *,
    edges: NDArray[np.float64],
    plan: FederationPlan,
) -> ArmResult:
    n_groups, n_times = plan.n_risk_groups, len(edges)
    parts = list(released.values())
    tables = [
        LifeTable.from_vector(e.life_table[row], n_groups=n_groups, n_intervals=n_times)
        for e in parts
        if e.life_table[row].any()
    ]
    cells = [
        CalibrationSums.from_vector(e.calibration[row], n_groups=n_groups)
        for e in parts
        if e.calibration[row].any()
    ]
    return ArmResult(
        arm=arm,
        concordance=_concordance([PairCounts.from_vector(e.pairs[row]) for e in parts]),
        by_site=_by_site({s: e.pairs[row] for s, e in released.items()}),
        uno=_concordance([PairCounts.from_vector(e.uno[row]) for e in parts]),
        brier=_brier([e.brier[row] for e in parts], edges),
        null_brier=_brier([e.brier[-1] for e in parts], edges),
        survival=survival_from_life_table(tables) if tables else None,
        log_rank=log_rank_test([log_rank_sums(t) for t in tables]) if tables else None,
        calibration=calibration(cells) if cells else None,
    )


def _by_site(vectors: dict[str, NDArray[np.float64]]) -> dict[str, Estimate]:
    found = {s: _concordance([PairCounts.from_vector(v)]) for s, v in vectors.items()}
    return {site: estimate for site, estimate in found.items() if estimate is not None}


def _concordance(counts: Sequence[PairCounts]) -> Estimate | None:
    try:
        return concordance_index(counts) if counts else None
    except NoComparablePairs:
        return None


def _brier(vectors: Sequence[NDArray[np.float64]], edges: NDArray[np.float64]) -> Estimate | None:
    sums = [BrierSums.from_vector(v, n_times=len(edges)) for v in vectors]
    if len(edges) < 2 or not any(s.n_patients.all() for s in sums):
        return None
    return integrated_brier_score([s for s in sums if s.n_patients.all()], edges)
