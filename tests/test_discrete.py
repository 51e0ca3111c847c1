"""Discrete-time hazards, against person-interval rows and other packages' fits of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.optimize import minimize, minimize_scalar

from fusion.discrete import (
    SITE_PRECISION,
    at_risk_and_events,
    fit_logistic_hazard,
    hazard_sums,
    survival_from_log_odds,
)
from fusion.newton import ConvergenceError, LikelihoodSums, NewtonFit
from tests.strategies import Survival, survival

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

EDGES = np.array([5.0, 12.0, 25.0, 45.0])


def _rows(n: int = 300, p: int = 3, *, n_sites: int = 4, seed: int = 0) -> Survival:
    """Sites that differ in their level of risk."""
    rng = np.random.default_rng(seed)
    x, site = rng.normal(size=(n, p)), rng.integers(0, n_sites, n)
    level = np.linspace(-0.8, 0.8, n_sites)[site]
    died = rng.exponential(40 * np.exp(-x @ np.linspace(-0.6, 0.7, p) - level))
    lost = rng.uniform(1, 90, n)
    return Survival(x, died <= lost, np.ceil(np.minimum(died, lost)), site)


def _expanded(rows: Survival, edges: Floats) -> tuple[list[int], list[int], Floats]:
    """Patient, interval and outcome of each person-interval, one patient after the other."""
    patients, intervals, outcomes = [], [], []
    for i, (event, time) in enumerate(zip(rows.event, rows.time, strict=True)):
        for j, right in enumerate(edges):
            left = edges[j - 1] if j > 0 else 0.0
            if time <= left:
                break
            ends_here = time <= right
            if ends_here and not event and time < (left + right) / 2:
                break
            patients.append(i)
            intervals.append(j)
            outcomes.append(float(ends_here and event))
    return patients, intervals, np.array(outcomes)


def _design(rows: Survival, edges: Floats) -> tuple[Floats, Floats, Floats]:
    """Rows of interval dummies with inputs, of site dummies, and outcomes."""
    patients, intervals, outcome = _expanded(rows, edges)
    sites = np.eye(int(rows.strata.max()) + 1)[rows.strata[patients]]
    return np.column_stack([np.eye(len(edges))[intervals], rows.inputs[patients]]), sites, outcome


def _value(design: Floats, outcome: Floats, theta: Floats) -> float:
    log_odds = design @ theta
    return float(outcome @ log_odds - np.sum(np.log1p(np.exp(log_odds))))


def _sums(rows: Survival, theta: Floats, **options: object) -> LikelihoodSums:
    return hazard_sums(
        rows.inputs, rows.event, rows.time, theta,
        edges_days=options.pop("edges", EDGES), strata=rows.strata, **options,
    )  # fmt: skip


def _fit(rows: Survival, **options: object) -> NewtonFit:
    return fit_logistic_hazard(
        rows.inputs, rows.event, rows.time, edges_days=EDGES, strata=rows.strata, **options
    )


@settings(max_examples=40, deadline=None)
@given(rows=survival(), theta=st.lists(st.floats(-2, 2), min_size=7, max_size=7))
def test_sums_without_site_terms_are_those_of_person_intervals(
    rows: Survival, theta: list[float]
) -> None:
    found = _sums(rows, np.array(theta), site_precision=None)
    design, _, outcome = _design(rows, EDGES)
    at = np.array(theta)
    hazard = 1 / (1 + np.exp(-design @ at)) if len(outcome) else np.zeros(0)
    assert_allclose(found.log_likelihood, _value(design, outcome, at), atol=1e-10)
    assert_allclose(found.gradient, design.T @ (outcome - hazard), atol=1e-10)
    weight = hazard * (1 - hazard)
    assert_allclose(found.information, (design * weight[:, None]).T @ design, atol=1e-10)
    assert (found.n_patients, found.n_events) == (len(rows.time), outcome.sum())


@settings(max_examples=25, deadline=None)
@given(
    rows=survival(min_size=20),
    theta=st.lists(st.floats(-3, 3), min_size=7, max_size=7),
    precision=st.sampled_from([1e-3, 1.0, SITE_PRECISION, 1e4]),
)
def test_a_site_term_is_at_its_own_maximum(
    rows: Survival, theta: list[float], precision: float
) -> None:
    found = _sums(rows, np.array(theta), site_precision=precision)
    design, sites, outcome = _design(rows, EDGES)
    best = 0.0
    for site in sites.T.astype(bool):

        def loss(own: float, here: NDArray[np.bool_] = site) -> float:
            log_odds = design[here] @ np.array(theta) + own
            value = outcome[here] @ log_odds - np.logaddexp(0.0, log_odds).sum()
            return float(precision / 2 * own**2 - value)

        best -= minimize_scalar(loss, bounds=(-60, 60), options={"xatol": 1e-10}).fun
    assert_allclose(found.log_likelihood, best, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", [0.5, SITE_PRECISION])
def test_derivatives_of_the_profile_are_derivatives(precision: float) -> None:
    rows, h = _rows(), 1e-5
    theta = np.array([-2.0, -1.5, -1.0, -1.2, 0.3, -0.2, 0.6])
    at = _sums(rows, theta, site_precision=precision)
    for j, direction in enumerate(np.eye(7) * h):
        up = _sums(rows, theta + direction, site_precision=precision)
        down = _sums(rows, theta - direction, site_precision=precision)
        slope = (up.log_likelihood - down.log_likelihood) / (2 * h)
        assert_allclose(slope, at.gradient[j], rtol=1e-6)
        assert_allclose(-(up.gradient - down.gradient) / (2 * h), at.information[j], rtol=1e-5)


def test_a_term_of_one_site_far_from_the_others_is_found() -> None:
    """Newton's first inner step would leave for a flat part of the likelihood."""
    rows = Survival(np.zeros((50, 0)), np.ones(50, bool), np.full(50, 3.0), np.zeros(50, int))
    for level in (-40.0, 40.0):
        found = _sums(rows, np.full(4, level), site_precision=0.01)
        own = np.linspace(-100, 100, 2_000_001)
        value = -50 * np.logaddexp(0.0, -(level + own)) - 0.005 * own**2
        assert_allclose(found.log_likelihood, value.max(), rtol=1e-6, atol=1e-12)


def test_a_fit_without_penalties_is_statsmodels_with_a_dummy_per_site() -> None:
    rows = _rows(600)
    design, sites, outcome = _design(rows, EDGES)
    plain = sm.GLM(outcome, design, family=sm.families.Binomial()).fit(tol=1e-14)
    ours = _fit(rows, site_precision=None)
    assert_allclose(ours.candidate, plain.params, atol=1e-8)
    assert_allclose(np.sqrt(np.diag(ours.covariance)), plain.bse, rtol=1e-5)
    with_sites = np.column_stack([design, sites[:, 1:]])
    theirs = sm.GLM(outcome, with_sites, family=sm.families.Binomial()).fit(tol=1e-14)
    free = _fit(rows, site_precision=1e-7)
    assert_allclose(free.candidate[4:], theirs.params[4:7], atol=1e-6)
    assert_allclose(np.sqrt(np.diag(free.covariance))[4:], theirs.bse[4:7], rtol=1e-5)
    assert np.abs(free.candidate[4:] - plain.params[4:]).max() > 0.01


@pytest.mark.parametrize("ridge", [0.0, 0.003, 0.1, 10.0])
@pytest.mark.parametrize("precision", [SITE_PRECISION, 0.5])
def test_sums_over_sites_lead_to_the_joint_fit_of_the_pooled_rows(
    ridge: float, precision: float
) -> None:
    rows = _rows(400, seed=3)
    fit = NewtonFit(n_inputs=7, ridge=np.repeat([0.0, ridge], [4, 3]))
    while not fit.converged:
        parts = [
            hazard_sums(
                rows.inputs[here], rows.event[here], rows.time[here], fit.candidate,
                edges_days=EDGES, site_precision=precision,
            )
            for here in (rows.strata == site for site in range(4))
        ]  # fmt: skip
        fit.advance(parts[0] + parts[1] + parts[2] + parts[3])
    assert fit.rounds <= 12
    joint, gaps = _joint(rows, ridge, precision)
    assert_allclose(fit.candidate, joint[:7], atol=1e-8)
    pooled = _fit(rows, ridge=ridge, site_precision=precision)
    assert_allclose(fit.candidate, pooled.candidate, atol=1e-9)
    assert_allclose(fit.covariance, gaps[:7, :7], rtol=1e-6)


def _joint(rows: Survival, ridge: float, precision: float) -> tuple[Floats, Floats]:
    """Optimum in all coefficients and site terms together, and the inverse information there."""
    design, sites, outcome = _design(rows, EDGES)
    whole = np.column_stack([design, sites])
    penalty = np.repeat([0.0, ridge * len(rows.time), precision], [4, 3, 4])

    def loss(theta: Floats) -> tuple[float, Floats]:
        hazard = 1 / (1 + np.exp(-whole @ theta))
        return (
            0.5 * float(penalty @ theta**2) - _value(whole, outcome, theta),
            penalty * theta - whole.T @ (outcome - hazard),
        )

    def curvature(theta: Floats) -> Floats:
        hazard = 1 / (1 + np.exp(-whole @ theta))
        return (whole * (hazard * (1 - hazard))[:, None]).T @ whole + np.diag(penalty)

    found = minimize(
        loss, np.zeros(11), jac=True, hess=curvature, method="trust-exact",
        options={"gtol": 1e-10},
    ).x  # fmt: skip
    found = found - np.linalg.solve(curvature(found), loss(found)[1])
    return found, np.linalg.inv(curvature(found))


def _consortium(seed: int) -> tuple[Survival, Floats]:
    """Scaled inputs, sites and ties, and two to eight intervals with an event in each."""
    rng = np.random.default_rng(seed)
    p = int(rng.integers(1, 31))
    n = int(rng.integers(max(60, 5 * p), 601))
    x = rng.normal(size=(n, p))
    site = rng.integers(0, rng.integers(1, 7), n)
    level = rng.normal(size=7)[site] / 2
    died = rng.exponential(np.exp(-x @ rng.normal(size=p) / np.sqrt(p) - level))
    ends = np.sort(died)[int(rng.uniform(20 / n, 0.9) * n)]
    event, time = died <= ends, np.minimum(died, ends) * rng.uniform(0.5, 1.0, n)
    edges = np.quantile(time[event], np.linspace(0, 1, int(rng.integers(3, 10)))[1:])
    return Survival(x, event, time, site), edges


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ridge=st.sampled_from([0.003, 0.03, 1.0, 100.0]),
    precision=st.sampled_from([SITE_PRECISION, None]),
)
def test_a_fit_needs_twelve_rounds_at_most(
    seed: int, ridge: float, precision: float | None
) -> None:
    rows, edges = _consortium(seed)
    fit = fit_logistic_hazard(
        rows.inputs, rows.event, rows.time,
        edges_days=edges, strata=rows.strata, ridge=ridge, site_precision=precision,
    )  # fmt: skip
    assert fit.rounds <= 12
    at = _sums(rows, fit.candidate, edges=edges, site_precision=precision)
    away = np.concatenate([np.zeros(len(edges)), ridge * fit.candidate[len(edges) :]])
    assert_allclose(at.gradient / len(rows.time), away, atol=1e-9)


def test_a_site_with_higher_risk_does_not_move_the_others_effects() -> None:
    rows = _rows(4000, n_sites=2, seed=1)
    rng = np.random.default_rng(1)
    # The input tells the site, not the patient, and the site's level is what differs.
    told = np.where(rng.random(4000) < 0.7, rows.strata, 1 - rows.strata)
    confounded = Survival((told - 0.5)[:, None], rows.event, rows.time, rows.strata)
    with_sites, without = (
        _fit(confounded, site_precision=0.5),
        _fit(confounded, site_precision=None),
    )
    assert without.candidate[4] > 0.3
    assert abs(with_sites.candidate[4]) < 0.12


def test_censored_patients_count_from_the_midpoint_of_an_interval() -> None:
    time = [2.4, 2.5, 5.0, 5.1, 8.5, 60.0, 2.4, 60.0]
    event = [0, 0, 0, 0, 0, 0, 1, 1]
    at_risk, events = at_risk_and_events(event, time, EDGES)
    assert_allclose(at_risk, [7, 3, 2, 2])
    assert_allclose(events, [1, 0, 0, 0])


@settings(max_examples=30, deadline=None)
@given(rows=survival())
def test_counts_are_those_of_person_intervals(rows: Survival) -> None:
    at_risk, events = at_risk_and_events(rows.event, rows.time, EDGES)
    _, intervals, outcome = _expanded(rows, EDGES)
    assert_allclose(at_risk, np.bincount(intervals, minlength=4))
    assert_allclose(events, np.bincount(intervals, outcome, minlength=4))


@settings(max_examples=40, deadline=None)
@given(
    alpha=st.lists(st.floats(-20, 20), min_size=4, max_size=4),
    log_hazard=st.lists(st.floats(-5, 5), min_size=1, max_size=4),
    times=st.lists(st.floats(0, 200), min_size=1, max_size=5),
)
def test_survival_equals_brute_force(
    alpha: list[float], log_hazard: list[float], times: list[float]
) -> None:
    def slow(score: float, t: float) -> float:
        total, left = 0.0, 0.0
        for j, right in enumerate(EDGES):
            last = j == len(EDGES) - 1
            lasted = max(t - left, 0.0) if last else min(max(t - left, 0.0), right - left)
            hazard = np.exp(alpha[j] + score) / (1 + np.exp(alpha[j] + score))
            total += np.log1p(-min(hazard, 1 - 1e-16)) * lasted / (right - left)
            left = right
        return float(np.exp(total))

    found = survival_from_log_odds(alpha, log_hazard, EDGES, times)
    expected = [[slow(score, t) for t in times] for score in log_hazard]
    assert_allclose(found, expected, atol=1e-9)
    assert ((found >= 0) & (found <= 1)).all()
    rising = survival_from_log_odds(alpha, [0.0, 1.0], EDGES, sorted(times))
    assert (np.diff(rising, axis=1) <= 0).all()
    assert (rising[1] <= rising[0]).all()


def test_survival_of_everybody_is_the_life_table_at_the_edges() -> None:
    rows = _rows()
    fit = fit_logistic_hazard(
        np.zeros((300, 0)), rows.event, rows.time, edges_days=EDGES, site_precision=None
    )
    at_risk, events = at_risk_and_events(rows.event, rows.time, EDGES)
    expected = np.cumprod(1 - events / at_risk)
    assert_allclose(survival_from_log_odds(fit.candidate, [0.0], EDGES, EDGES)[0], expected)
    alone = fit_logistic_hazard(
        np.zeros((300, 0)), rows.event, rows.time, edges_days=EDGES
    )  # one site: its own term has nothing to tell
    assert_allclose(alone.candidate, fit.candidate, atol=1e-7)


def test_rows_that_reach_no_interval_add_nothing_but_their_number() -> None:
    found = hazard_sums(np.ones((3, 1)), [0, 0, 0], [1.0, 2.0, 0.5], np.zeros(5), edges_days=EDGES)
    assert_allclose(found.gradient, 0.0)
    assert_allclose(found.information, 0.0)
    assert (found.log_likelihood, found.n_patients, found.n_events) == (0.0, 3, 0)


def test_what_cannot_be_fitted_is_refused() -> None:
    rows = _rows()
    outcome = (rows.event, rows.time)
    for edges in ([], [5.0, 5.0], [0.0, 5.0], [5.0, np.inf], [5.0, np.nan], [[5.0]]):
        with pytest.raises(ValueError, match="edges_days: needed"):
            at_risk_and_events(*outcome, edges)
    with pytest.raises(ValueError, match=r"found shape \(300, 3\), needed \(300, p\)"):
        hazard_sums(rows.inputs, *outcome, np.zeros(5), edges_days=EDGES)
    with pytest.raises(ValueError, match="finite"):
        hazard_sums(rows.inputs * np.nan, *outcome, np.zeros(7), edges_days=EDGES)
    for precision in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="site_precision: found"):
            _fit(rows, site_precision=precision)
    for edges, n in (([10.0, 80.0, 900.0], 1), ([0.1, 0.2, 30.0, 800.0, 900.0], 4)):
        with pytest.raises(ValueError, match=f"found {n} intervals without an event or a survivor"):
            fit_logistic_hazard(rows.inputs, *outcome, edges_days=edges)
    with pytest.raises(ValueError, match="days > 0"):
        hazard_sums(rows.inputs, rows.event, -rows.time, np.zeros(7), edges_days=EDGES)


def test_separated_and_collinear_rows_need_a_ridge() -> None:
    rows = _rows()
    told = np.column_stack([rows.inputs, np.where(rows.event, 1.0, -1.0)])
    twice = np.column_stack([rows.inputs, rows.inputs[:, 0]])
    for x in (told, twice, np.ones((300, 1))):
        bad = Survival(x, rows.event, rows.time, rows.strata)
        with pytest.raises(ConvergenceError, match="raise the ridge"):
            _fit(bad)
        assert _fit(bad, ridge=0.01).converged


def test_a_patient_of_extreme_risk_leaves_the_sums_finite() -> None:
    rows = _rows()
    for size in (1e2, 1e4, 1e6):
        found = _sums(rows, np.full(7, size))
        assert np.isfinite([found.log_likelihood, *found.gradient]).all()
        assert np.isfinite(found.information).all()
