"""What a finished run says: figures with intervals, from the sums that sites released."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.evaluation import (
    BrierSums,
    Calibration,
    CalibrationSums,
    DecisionSums,
    Estimate,
    Estimates,
    LifeTable,
    LogRankTest,
    NoComparablePairs,
    ObservedExpected,
    PairCounts,
    SubgroupSums,
    TreatmentSums,
    calibration,
    concordance_index,
    integrated_brier_score,
    log_rank_sums,
    log_rank_test,
    net_benefit,
    observed_expected_ratio,
    subgroup_figures,
    survival_from_life_table,
    treatment_comparison,
)
from fusion.federation.alarms import holdout_gain
from fusion.federation.plan import LOCAL_ONLY, PROTOCOL, FederationPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.evaluation import Heterogeneity, LogRankSums, NetBenefit
    from fusion.federation.alarms import SiteAlarm
    from fusion.federation.coordinator import Fitted
    from fusion.messages import Evaluation

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ArmResult:
    """How one arm does on the test patients; None where no site could release the figure.

    Attributes
    ----------
    concordance
        Harrell's, within site, pooled over comparable pairs; higher is better.
    by_site
        The same for each site that released it.
    difference
        Concordance of the protocol's arm less this arm's on the same pairs; None for itself.
    uno
        Uno's concordance up to the horizon.
    auc
        Cumulative/dynamic AUC at the horizon.
    brier, null_brier
        Integrated Brier score of the arm, and of each site's Kaplan-Meier curve; lower is better.
    observed_expected
        Events by the horizon over those expected: calibration in the large; 1 is calibrated.
    observed_expected_by_site
        The same for each site that released it.
    calibration_slope
        Log hazard ratio of the arm's log hazard on the test patients, stratified by site; 1 is
        calibrated, below 1 the predictions are too extreme.
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
    difference: Estimate | None = None
    uno: Estimate | None = None
    auc: Estimate | None = None
    brier: Estimate | None = None
    null_brier: Estimate | None = None
    observed_expected: Estimate | None = None
    observed_expected_by_site: dict[str, Estimate] = field(default_factory=dict)
    calibration_slope: Estimate | None = None
    survival: Estimates | None = None
    log_rank: LogRankTest | None = None
    calibration: Calibration | None = None


@dataclass(frozen=True)
class SubgroupResult:
    """The protocol's arm in one level of one variable, over the sites that could release it."""

    variable: str
    level: str
    n_patients: int
    n_events: int
    concordance: Estimate | None
    observed_expected: Estimate | None


@dataclass(frozen=True)
class TreatmentResult:
    """Treatments compared within one risk group; not randomised, so no causal effect.

    Attributes
    ----------
    group
        Risk group, from 0 for the lowest.
    survival
        (n_levels, n_intervals) at the grid's edges.
    log_rank
        Test that the treatments do not differ, stratified by site.
    hazard_ratio
        (n_levels,) of each level against the first.
    """

    group: int
    survival: Estimates | None
    log_rank: LogRankTest | None
    hazard_ratio: Estimates | None


@dataclass(frozen=True)
class LeftOutSite:
    """The study fitted without one site, on all patients of that site: external validity.

    Attributes
    ----------
    code
        Why there is no figure, where there is none.
    """

    site: str
    n_patients: int
    n_events: int
    concordance: Estimate | None
    auc: Estimate | None
    observed_expected: Estimate | None
    code: str = ""


@dataclass(frozen=True)
class StudyResults:
    """Everything a run says, from released sums.

    Attributes
    ----------
    arms
        Per arm of the plan, and for the sites' own and personalised models.
    alone
        Per modality, the concordance of its own log hazard in the protocol's arm.
    heterogeneity
        Of the fusion coefficients between sites; log hazards of modalities first, then flags.
    left_out
        Leave-one-site-out, in the order of the sites; ``left_out_pooled`` over all of them.
    ridge
        Penalty per patient of each encoder in sums, and of the fusion model as ``protocol``.
    alarms
        Sites where the model fails, or that are unlike the others, for people to look at.
    """

    arms: dict[str, ArmResult]
    alone: dict[str, Estimate | None] = field(default_factory=dict)
    subgroups: tuple[SubgroupResult, ...] = ()
    net_benefit: NetBenefit | None = None
    treatment: tuple[TreatmentResult, ...] = ()
    heterogeneity: Heterogeneity | None = None
    left_out: tuple[LeftOutSite, ...] = ()
    left_out_pooled: Estimate | None = None
    ridge: dict[str, float] = field(default_factory=dict)
    alarms: tuple[SiteAlarm, ...] = ()

    @property
    def holdout_gain(self) -> Estimate | None:
        """Concordance of the consortium's model less that of the sites' own, on held-out rows."""
        own = self.arms.get(LOCAL_ONLY)
        return None if own is None else own.difference


def summarise(
    fitted: Fitted, left_out: Mapping[tuple[str, ...], Fitted | str] | None = None
) -> StudyResults:
    """Turn the sums of a run into its figures.

    Parameters
    ----------
    left_out
        What :func:`fusion.federation.leave_one_site_out` found.
    """
    plan, released = fitted.plan, fitted.evaluations
    arms = {arm: _arm_result(arm, fitted) for arm in plan.scored}
    of_sites, pooled = _left_out(left_out or {})
    return StudyResults(
        arms={arm: found for arm, found in arms.items() if found.concordance is not None},
        alone={
            modality: _concordance([e.alone[at] for e in released.values()])
            for at, modality in enumerate(plan.modalities)
        },
        subgroups=_subgroups(plan, released),
        net_benefit=_net_benefit(plan, released),
        treatment=_treatment(plan, released),
        heterogeneity=fitted.heterogeneity,
        left_out=of_sites,
        left_out_pooled=pooled,
        ridge=fitted.ridge,
        alarms=fitted.alarms,
    )


def _arm_result(arm: str, fitted: Fitted) -> ArmResult:
    plan, row = fitted.plan, fitted.plan.scored.index(arm)
    released = {s: e for s, e in fitted.evaluations.items() if e.pairs[row].any()}
    found = ArmResult(
        arm=arm,
        concordance=_concordance([e.pairs[row] for e in released.values()]),
        by_site=_by_site({s: e.pairs[row] for s, e in released.items()}),
        difference=holdout_gain(plan, released, over=arm) if row else None,
        uno=_concordance([e.uno[row] for e in released.values()]),
        auc=_concordance([e.auc[row] for e in released.values()]),
        calibration_slope=fitted.calibration_slope if arm == PROTOCOL else None,
    )
    if arm not in plan.main_arms:
        return found
    return replace(found, **_tables(row, released, plan))


def _tables(row: int, released: dict[str, Evaluation], plan: FederationPlan) -> dict[str, Any]:
    """Give the figures that only the main arms have."""
    parts, edges = list(released.values()), np.array(plan.edges_days)
    n_groups, n_times = plan.n_risk_groups, len(edges)
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
    expected = {s: e.observed_expected[row] for s, e in released.items()}
    by_site = {s: _observed_expected([x]) for s, x in expected.items()}
    return {
        "brier": _brier([e.brier[row] for e in parts], edges),
        "null_brier": _brier([e.brier[-1] for e in parts], edges),
        "observed_expected": _observed_expected(list(expected.values())),
        "observed_expected_by_site": {s: x for s, x in by_site.items() if x is not None},
        "survival": survival_from_life_table(tables) if tables else None,
        "log_rank": _log_rank([log_rank_sums(t) for t in tables]),
        "calibration": calibration(cells) if cells else None,
    }


def _by_site(vectors: dict[str, Floats]) -> dict[str, Estimate]:
    found = {s: _concordance([v]) for s, v in vectors.items()}
    return {site: estimate for site, estimate in found.items() if estimate is not None}


def _concordance(vectors: Sequence[Floats]) -> Estimate | None:
    counts = [PairCounts.from_vector(v) for v in vectors if v.any()]
    try:
        return concordance_index(counts) if counts else None
    except NoComparablePairs:
        return None


def _observed_expected(vectors: Sequence[Floats]) -> Estimate | None:
    sums = [ObservedExpected.from_vector(v) for v in vectors if v.any()]
    if not sum(s.expected for s in sums) > 0.0:
        return None
    return observed_expected_ratio(sums)


def _log_rank(sums: Sequence[LogRankSums]) -> LogRankTest | None:
    try:
        return log_rank_test(sums) if sums else None
    except ValueError:  # no event while two groups are at risk
        return None


def _brier(vectors: Sequence[Floats], edges: Floats) -> Estimate | None:
    sums = [BrierSums.from_vector(v, n_times=len(edges)) for v in vectors if v.any()]
    if len(edges) < 2 or not any(s.n_patients.all() for s in sums):
        return None
    return integrated_brier_score([s for s in sums if s.n_patients.all()], edges)


def _subgroups(plan: FederationPlan, released: dict[str, Evaluation]) -> tuple[SubgroupResult, ...]:
    sums = [SubgroupSums(e.subgroup_pairs, e.subgroup_expected) for e in released.values()]
    names = [(variable, level) for variable, of in plan.subgroups.items() for level in of]
    if not sums:
        return tuple(SubgroupResult(*name, 0, 0, None, None) for name in names)
    return tuple(
        SubgroupResult(*name, x.n_patients, x.n_events, x.concordance, x.observed_expected)
        for name, x in zip(names, subgroup_figures(sums), strict=True)
    )


def _net_benefit(plan: FederationPlan, released: dict[str, Evaluation]) -> NetBenefit | None:
    n = len(plan.thresholds)
    sums = [DecisionSums.from_vector(e.decision, n_thresholds=n) for e in released.values()]
    if not any(s.n_patients.any() for s in sums):
        return None
    return net_benefit(sums, plan.thresholds)


def _treatment(
    plan: FederationPlan, released: dict[str, Evaluation]
) -> tuple[TreatmentResult, ...]:
    if not plan.treatments:
        return ()
    sums = [
        TreatmentSums.from_vector(
            e.treatment,
            n_groups=plan.n_risk_groups,
            n_levels=len(plan.treatments),
            n_intervals=len(plan.edges_days),
        )
        for e in released.values()
    ]
    return (
        tuple(
            TreatmentResult(group, found.survival, found.log_rank, found.hazard_ratio)
            for group, found in enumerate(treatment_comparison(sums))
        )
        if sums
        else ()
    )


def _left_out(
    found: Mapping[tuple[str, ...], Fitted | str],
) -> tuple[tuple[LeftOutSite, ...], Estimate | None]:
    """One result per site left out, and the concordance over all of them."""
    sites, pairs = [], []
    for group, fitted in found.items():
        for site in group:
            if isinstance(fitted, str):
                sites.append(LeftOutSite(site, 0, 0, None, None, None, code=fitted))
                continue
            evaluation = fitted.evaluations.get(site)
            if evaluation is None:
                code = next(s.code for s in fitted.sites if s.site == site)
                sites.append(
                    LeftOutSite(site, 0, 0, None, None, None, code=code or "below_minimum_events")
                )
                continue
            pairs.append(evaluation.pairs[0])
            sites.append(
                LeftOutSite(
                    site=site,
                    n_patients=evaluation.n_test,
                    n_events=evaluation.n_test_events,
                    concordance=_concordance([evaluation.pairs[0]]),
                    auc=_concordance([evaluation.auc[0]]),
                    observed_expected=_observed_expected([evaluation.observed_expected[0]]),
                )
            )
    return tuple(sorted(sites, key=lambda s: s.site)), _concordance(pairs)
