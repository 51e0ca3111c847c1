"""What a site tells of the arms on its test rows: sums, and tables without small cells."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion import messages as m
from fusion.discrete import hazard_sums, survival_from_log_odds
from fusion.evaluation import (
    BrierSums,
    PairCounts,
    auc_pair_counts,
    brier_sums,
    calibration_sums,
    censoring_curve,
    decision_sums,
    life_table,
    null_brier_sums,
    observed_expected,
    pair_counts,
    pair_cross,
    releasable_thresholds,
    subgroup_sums,
    treatment_sums,
    uno_pair_counts,
)
from fusion.federation.plan import PROTOCOL
from fusion.newton import ConvergenceError, NewtonFit
from fusion.privacy import outweighed
from fusion.survival import cox_sums, cumulative_hazard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fusion.evaluation import CensoringCurve
    from fusion.federation.designs import SiteDesigns
    from fusion.federation.plan import FederationPlan
    from fusion.federation.rows import Outcome

    Floats = NDArray[np.float64]

_N_PAIR_SUMS = 9
_N_EXPECTED_SUMS = 3
# A coefficient that does not differ between sites is held this tightly at the consortium's.
_LEAST_VARIANCE = 1e-6
# Of a site's log odds per interval about the consortium's: wide, but no interval without an event
# of the site's own is then without an optimum.
_BASELINE_VARIANCE = 1.0


def evaluate_site(
    request: m.AskEvaluation, designs: SiteDesigns, scored: Sequence[Floats | None]
) -> m.Evaluation:
    """Evaluate every arm, and the site's own and personalised models, on the site's test rows.

    Parameters
    ----------
    request
        Each arm's baseline and group boundaries.
    designs
        The site's rows and plan.
    scored
        (n_tested,) log hazards in the order of the plan's ``scored``, the first the protocol's arm;
        higher is worse, None where there is none.
    """
    plan, test, curve = designs.plan, designs.test, _censoring(designs)
    horizon = plan.horizon_days
    tables = [
        _arm_tables(request, row, test, x, plan=plan, curve=curve)
        for row, x in enumerate(scored[: len(plan.main_arms)])
    ]
    null = null_brier_sums(test.event, test.time, np.array(plan.edges_days), curve)
    shown = _apart(request, scored[: len(tables)], plan.minimum.cell)

    def of_each(count: Callable[[Floats], PairCounts]) -> Floats:
        return np.array([_no_pairs() if x is None else count(x).to_vector() for x in scored])

    evaluated = m.Evaluation(
        n_test=len(test),
        n_test_events=int(test.event.sum()),
        pairs=of_each(lambda x: pair_counts(x, test.event, test.time)),
        uno=of_each(lambda x: uno_pair_counts(x, test.event, test.time, curve, horizon)),
        auc=of_each(lambda x: auc_pair_counts(x, test.event, test.time, curve, horizon)),
        cross=np.array([_cross(scored[0], x, test) for x in scored]),
        alone=_alone(designs),
        brier=np.array([brier for brier, *_ in tables] + [_averaged(null)]),
        life_table=shown * np.array([life for _, life, _, _ in tables]),
        calibration=shown * np.array([cells for _, _, cells, _ in tables]),
        observed_expected=np.array([sums for *_, sums in tables]),
        **_details(request, designs, scored[0], curve=curve),
    )
    return _without_tables(evaluated) if plan.brief else evaluated


def _without_tables(evaluated: m.Evaluation) -> m.Evaluation:
    """Keep pairs and events of the protocol's arm; the rest as zeros."""
    kept = {"pairs", "auc", "observed_expected"}
    found: dict[str, Any] = {}
    for part in fields(evaluated):
        values = getattr(evaluated, part.name)
        if isinstance(values, np.ndarray):
            found[part.name] = np.zeros_like(values)
            if part.name in kept:
                found[part.name][0] = values[0]
    return replace(evaluated, **found)


def _censoring(designs: SiteDesigns) -> CensoringCurve:
    rows, test = designs.rows.train, designs.test
    return censoring_curve(
        np.concatenate([rows.event, test.event]), np.concatenate([rows.time, test.time])
    )


def _no_pairs() -> Floats:
    return np.zeros(_N_PAIR_SUMS)


def _cross(first: Floats | None, other: Floats | None, test: Outcome) -> float:
    if first is None or other is None:
        return 0.0
    return pair_cross(first, other, test.event, test.time)


def _alone(designs: SiteDesigns) -> Floats:
    """Pairs of each modality's own log hazard, among the patients who have it."""
    test, cell = designs.test, designs.plan.minimum.cell
    found, others = [], [np.ones(len(test), dtype=bool)]
    for column in designs.columns(PROTOCOL).test[designs.tested].T:
        has = ~np.isnan(column)
        # The few who lack it, or lack another one told, would follow by subtraction.
        apart = [int(np.sum(has != other)) for other in others]
        told = int(has.sum()) >= cell and not any(0 < n < cell for n in apart)
        others += [has] if told else []
        pairs = pair_counts(column[has], test.event[has], test.time[has]) if told else None
        found.append(_no_pairs() if pairs is None else pairs.to_vector())
    return np.array(found)


def _apart(
    request: m.AskEvaluation, log_hazard: Sequence[Floats | None], cell: int
) -> NDArray[np.bool_]:
    """(arms, 1) whose tables may leave: groups must not differ from another arm's by a few."""
    groups = [
        None if x is None else np.searchsorted(cuts, x)
        for cuts, x in zip(request.groups, log_hazard, strict=False)
    ]
    shown = np.ones((len(groups), 1), dtype=bool)
    for row, group in enumerate(groups):
        others = [x for x in groups[:row] if x is not None]
        shown[row] = group is not None and not any(_almost_alike(group, x, cell) for x in others)
    return shown


def hazard_at_edges(plan: FederationPlan, baseline: Floats, log_hazard: Floats) -> Floats:
    """(n, k) cumulative hazard of each patient at the edges of the grid.

    Parameters
    ----------
    baseline
        (k,) hazard per day at log hazard 0, or log odds of a discrete model.
    """
    edges = np.array(plan.edges_days)
    if plan.n_baseline:
        surviving = survival_from_log_odds(baseline, log_hazard, edges, edges)
        return np.asarray(-np.log(surviving))
    at_edges = cumulative_hazard(baseline, edges, edges)
    return np.asarray(np.exp(log_hazard)[:, None] * at_edges)


def hazard_at(at_edges: Floats, edges: Floats, times: Floats) -> Floats:
    """(n,) cumulative hazard at a time of each patient's own, linear between the edges.

    Parameters
    ----------
    at_edges
        (n, k) cumulative hazard at the k edges.
    times
        (n,) days; beyond the last edge counts as the last edge.
    """
    knots = np.append(0.0, edges)
    values = np.column_stack([np.zeros(len(at_edges)), at_edges])
    days = np.minimum(times, edges[-1])
    right = np.clip(np.searchsorted(knots, days, side="left"), 1, len(edges))
    rows = np.arange(len(days))
    share = (days - knots[right - 1]) / (knots[right] - knots[right - 1])
    low, high = values[rows, right - 1], values[rows, right]
    return np.asarray(low + share * (high - low))


def _expected(
    plan: FederationPlan, baseline: Floats, log_hazard: Floats, test: Outcome
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Cumulative hazards at the edges, until each patient's own end or the horizon, and events."""
    edges = np.array(plan.edges_days)
    at_edges = hazard_at_edges(plan, baseline, log_hazard)
    horizon = min(plan.horizon_days, edges[-1])
    expected = hazard_at(at_edges, edges, np.minimum(test.time, horizon))
    return at_edges, expected, test.event & (test.time <= horizon)


def _stands_out(log_hazard: Floats) -> bool:
    """Whether one patient carries a sum weighted by hazard, or by its inverse."""
    return outweighed(log_hazard) or outweighed(-log_hazard)


def _arm_tables(
    request: m.AskEvaluation,
    row: int,
    test: Outcome,
    log_hazard: Floats | None,
    *,
    plan: FederationPlan,
    curve: CensoringCurve,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Brier sums, life table, calibration, events seen and expected; small cells are zeros."""
    told = log_hazard is not None and not _stands_out(log_hazard)
    scores = log_hazard if log_hazard is not None else np.zeros(len(test))
    edges, cuts = np.array(plan.edges_days), request.groups[row]
    at_edges, expected, seen = _expected(plan, request.baseline[row], scores, test)
    group = np.searchsorted(cuts, scores)
    n_groups, cell = len(cuts) + 1, plan.minimum.cell
    life = life_table(test.event, test.time, group, np.append(0.0, edges), n_groups)
    at_horizon = hazard_at(at_edges, edges, np.full(len(test), plan.horizon_days))
    cells = calibration_sums(
        np.exp(-at_horizon),
        test.event,
        test.time,
        group,
        horizon=plan.horizon_days,
        censoring=curve,
        n_groups=n_groups,
    )
    brier = brier_sums(np.exp(-at_edges), test.event, test.time, edges, curve)
    by_group = np.stack([cells.n_patients, cells.n_events, cells.n_patients - cells.n_events])
    return (
        told * _averaged(brier),
        told * _without_small_cells(_with_survivors(life.counts), life.to_vector(), cell),
        told * _without_small_cells(by_group, cells.to_vector(), cell),
        told * observed_expected(expected, seen).to_vector(),
    )


def _details(
    request: m.AskEvaluation,
    designs: SiteDesigns,
    log_hazard: Floats | None,
    *,
    curve: CensoringCurve,
) -> dict[str, Floats]:
    """Give the protocol's arm by subgroup, by threshold of net benefit, and by treatment."""
    plan, test = designs.plan, designs.test
    told = log_hazard is not None and not _stands_out(log_hazard)
    scores = log_hazard if log_hazard is not None else np.zeros(len(test))
    _, expected, seen = _expected(plan, request.baseline[0], scores, test)
    pairs, sums = _by_subgroup(designs, scores, expected, seen)
    group = np.searchsorted(request.groups[0], scores)
    return {
        "subgroup_pairs": told * pairs,
        "subgroup_expected": told * sums,
        "decision": told * _by_threshold(request, designs, scores, curve),
        "treatment": told * _by_treatment(designs, group),
    }


def _by_threshold(
    request: m.AskEvaluation, designs: SiteDesigns, log_hazard: Floats, curve: CensoringCurve
) -> Floats:
    """Net benefit's sums, but of no threshold with a few patients between it and a risk group."""
    plan, test = designs.plan, designs.test
    asked: dict[str, Any] = {
        "thresholds": plan.thresholds,
        "horizon": plan.horizon_days,
        "cell": plan.minimum.cell,
    }
    risk = _risk(plan, request.baseline[0], log_hazard)
    found = decision_sums(risk, test.event, test.time, censoring=curve, **asked)
    cuts = _risk(plan, request.baseline[0], request.groups[0])
    shown = releasable_thresholds(risk, test.event, test.time, also_cut=cuts, **asked)
    return found.only(shown).to_vector()


def _risk(plan: FederationPlan, baseline: Floats, log_hazard: Floats) -> Floats:
    """(n,) probability of the event by the horizon."""
    at_edges = hazard_at_edges(plan, baseline, log_hazard)
    horizon = np.full(len(log_hazard), plan.horizon_days)
    return np.asarray(-np.expm1(-hazard_at(at_edges, np.array(plan.edges_days), horizon)))


def _by_subgroup(
    designs: SiteDesigns, log_hazard: Floats, expected: Floats, seen: NDArray[np.bool_]
) -> tuple[Floats, Floats]:
    """(levels, 9) pair counts and (levels, 3) events, of every variable one after the other."""
    plan, test, rows = designs.plan, designs.test, designs.rows
    unknown = np.full(len(test), -1.0)
    pairs, sums = [np.zeros((0, _N_PAIR_SUMS))], [np.zeros((0, _N_EXPECTED_SUMS))]
    told: list[Floats] = []
    for variable, levels in plan.subgroups.items():
        codes = (
            rows.subgroups[variable].test[designs.tested] if variable in rows.subgroups else unknown
        )
        found = subgroup_sums(
            log_hazard,
            expected,
            seen,
            test.time,
            codes,
            n_groups=len(levels),
            minimum=plan.minimum,
        )
        # Two variables that part the patients almost alike would tell of those few by subtraction.
        apart = not any(_almost_alike(codes, other, plan.minimum.cell) for other in told)
        told.append(codes)
        pairs.append(apart * found.pairs)
        sums.append(apart * found.expected)
    return np.concatenate(pairs), np.concatenate(sums)


def _almost_alike(codes: NDArray[Any], other: NDArray[Any], cell: int) -> bool:
    """Whether a level of one variable, or its complement, is one of another but for a few."""
    parts, others = (
        [x == level for level in np.unique(x) if level >= 0 and np.sum(x == level) >= cell]
        for x in (codes, other)
    )
    apart = [int(np.sum(part != of_other)) for part in parts for of_other in others]
    return any(0 < min(n, len(codes) - n) < cell for n in apart)


def _by_treatment(designs: SiteDesigns, group: NDArray[np.intp]) -> Floats:
    """Life tables by risk group and treatment, flattened; empty where none is compared."""
    plan, test = designs.plan, designs.test
    if not plan.treatments:
        return np.zeros(0)
    recorded = designs.rows.treatment
    unknown = np.full(len(test), -1.0)
    return treatment_sums(
        test.event,
        test.time,
        group,
        unknown if recorded is None else recorded.test[designs.tested],
        np.append(0.0, plan.edges_days),
        shape=(plan.n_risk_groups, len(plan.treatments)),
        cell=plan.minimum.cell,
    ).to_vector()


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


def personal_coefficients(
    designs: SiteDesigns, coefficients: Floats, between_site_variance: Floats
) -> Floats | None:
    """Shrink a site's own fusion coefficients toward the consortium's: empirical Bayes.

    The prior of each coefficient is normal about the consortium's, with the variance that the
    coefficient shows between sites; the posterior mode on the site's training rows is returned. A
    coefficient that does not differ between sites stays the consortium's.

    Parameters
    ----------
    coefficients
        (k + p,) of the consortium, those of the baseline first.
    between_site_variance
        (p,) of the coefficients of the inputs.

    Returns
    -------
    numpy.ndarray or None
        (p,) coefficients of the inputs; None where the fit has no finite maximum.
    """
    inputs, outcome = designs.design(PROTOCOL)
    n_baseline = designs.plan.n_baseline
    variance = np.concatenate([np.full(n_baseline, _BASELINE_VARIANCE), between_site_variance])
    fit = NewtonFit(
        n_inputs=len(coefficients),
        ridge=1.0 / (np.maximum(variance, _LEAST_VARIANCE) * len(outcome)),
        centre=coefficients,
        start=coefficients,
    )
    edges = np.array(designs.plan.edges_days)
    try:
        while not fit.converged:
            fit.advance(
                hazard_sums(inputs, outcome.event, outcome.time, fit.candidate, edges_days=edges)
                if n_baseline
                else cox_sums(inputs, outcome.event, outcome.time, fit.candidate)
            )
    except ConvergenceError:
        return None
    return fit.candidate[n_baseline:]
