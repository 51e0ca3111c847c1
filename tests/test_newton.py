"""Newton's method: optima, penalties, steps that fall short, and how few rounds it needs."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from numpy.testing import assert_allclose
from scipy.optimize import minimize
from sksurv.linear_model import CoxnetSurvivalAnalysis, CoxPHSurvivalAnalysis
from sksurv.util import Surv
from statsmodels.duration.hazard_regression import PHReg

from fusion.newton import MAX_ROUNDS, ConvergenceError, LikelihoodSums, NewtonFit
from fusion.survival import cox_sums, fit_cox
from tests.strategies import Survival

if TYPE_CHECKING:
    from numpy.typing import NDArray

RIDGES = [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0]


def _rows(n: int = 200, p: int = 4, *, n_times: int = 60, seed: int = 0) -> Survival:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    died = rng.exponential(n_times / 2 * np.exp(-x @ np.linspace(-0.6, 0.7, p)))
    lost = rng.uniform(1, n_times, n)
    time = np.ceil(np.minimum(died, lost))
    return Survival(x, died <= lost, time, rng.integers(0, 3, n))


def _consortium(seed: int) -> Survival:
    """Scaled inputs, some of them flags, ties, sites, and down to one event in twenty patients.

    At least 20 events, and five patients an input: what a site demands before a sum leaves it.
    """
    rng = np.random.default_rng(seed)
    p = int(rng.integers(2, 41))
    n = int(rng.integers(max(60, 5 * p), 601))
    x = rng.normal(size=(n, p))
    flags = int(rng.integers(0, p + 1))
    x[:, :flags] = rng.random((n, flags)) < rng.uniform(0.1, 0.9, flags)
    x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    beta = rng.normal(size=p) * rng.uniform(0, 1) / np.sqrt(p)
    died = rng.exponential(np.exp(-x @ beta))
    # The quantile at which patients are lost leaves 20 events or more.
    ends = np.sort(died)[int(rng.uniform(20 / n, 0.9) * n)]
    event, last = died <= ends, np.minimum(died, ends)
    cuts = np.quantile(last, np.linspace(0, 1, int(rng.integers(3, 200))))
    time = np.searchsorted(cuts, last) + 1.0
    return Survival(x, event, time, rng.integers(0, rng.integers(1, 6), n))


def _fit(rows: Survival, **penalty: object) -> NewtonFit:
    fit = NewtonFit(n_inputs=rows.inputs.shape[1], **penalty)
    while not fit.converged:
        fit.advance(cox_sums(rows.inputs, rows.event, rows.time, fit.candidate, strata=rows.strata))
    return fit


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ridge=st.sampled_from(RIDGES))
def test_a_stratified_fit_needs_ten_rounds_at_most(seed: int, ridge: float) -> None:
    rows = _consortium(seed)
    fit = fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata, ridge=ridge)
    assert fit.rounds <= 10
    at = cox_sums(rows.inputs, rows.event, rows.time, fit.candidate, strata=rows.strata)
    # The fit stops where a step gains 1e-18, which leaves a steeper slope the harder it is bent.
    slope = at.gradient / len(rows.time) - ridge * fit.candidate
    assert np.abs(slope).max() <= 2e-9 * np.sqrt(1.0 + ridge)
    for x in (fit.candidate, fit.covariance):
        assert np.isfinite(x).all()


def _lifelines(rows: Survival, ridge: float) -> NDArray[np.float64]:
    names = [f"x{i}" for i in range(rows.inputs.shape[1])]
    frame = pd.DataFrame(rows.inputs, columns=names).assign(
        time=rows.time, event=rows.event, strata=rows.strata
    )
    # lifelines penalises coefficients of inputs that it scales itself; undo its scale.
    penalizer = (ridge / frame[names].std(ddof=1) ** 2).to_numpy()
    model = CoxPHFitter(penalizer=penalizer).fit(
        frame, "time", "event", strata="strata",
        fit_options={"precision": 1e-14, "max_steps": 100},
    )  # fmt: skip
    return model.params_.to_numpy()


@pytest.mark.parametrize(("seed", "ridge"), list(enumerate(RIDGES)))
def test_a_fit_is_lifelines_fit_of_the_pooled_rows(seed: int, ridge: float) -> None:
    rows = _consortium(seed)
    fit = fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata, ridge=ridge)
    assert_allclose(fit.candidate, _lifelines(rows, ridge), atol=1e-9)


def test_a_fit_is_scikit_survivals_with_ridge() -> None:
    rows = _rows(n_times=20)
    for per_patient in (0.0, 0.03):
        theirs = CoxPHSurvivalAnalysis(
            alpha=per_patient * len(rows.time), ties="efron", tol=1e-12
        ).fit(rows.inputs, Surv.from_arrays(rows.event, rows.time))
        ours = fit_cox(rows.inputs, rows.event, rows.time, ridge=per_patient)
        assert_allclose(ours.candidate, theirs.coef_, atol=1e-8)


def test_a_fit_without_ridge_is_statsmodels() -> None:
    rows = _rows(n_times=20)
    theirs = PHReg(
        rows.time, rows.inputs, status=rows.event.astype(int), strata=rows.strata, ties="efron"
    ).fit()
    ours = fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata)
    assert_allclose(ours.candidate, theirs.params, atol=1e-7)
    assert_allclose(np.sqrt(np.diag(ours.covariance)), theirs.bse, rtol=1e-6)
    assert ours.rounds < 10


def test_a_ridge_of_each_coefficient_pulls_toward_the_centre() -> None:
    rows = _rows()
    ridge, centre = np.array([0.0, 0.02, 0.5, 1e4]), np.array([9.0, 0.5, -0.3, 0.25])

    def loss(beta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        at = cox_sums(rows.inputs, rows.event, rows.time, beta, strata=rows.strata)
        away, n = beta - centre, len(rows.time)
        return (
            -at.log_likelihood / n + 0.5 * float(ridge @ away**2),
            -at.gradient / n + ridge * away,
        )

    fit = _fit(rows, ridge=ridge, centre=centre)
    theirs = minimize(loss, np.zeros(4), jac=True, method="BFGS", options={"gtol": 1e-10})
    assert_allclose(fit.candidate, theirs.x, atol=1e-7)
    assert_allclose(fit.objective, -theirs.fun, rtol=1e-12)
    assert abs(fit.candidate[3] - 0.25) < 1e-3
    assert abs(fit.candidate[0] - 9.0) > 5.0


def test_a_fit_begins_where_it_is_told() -> None:
    rows = _rows()
    cold = fit_cox(rows.inputs, rows.event, rows.time, ridge=0.01)
    begun = NewtonFit(n_inputs=4, start=cold.candidate + 1e-4)
    assert_allclose(begun.candidate, cold.candidate + 1e-4)
    warm = fit_cox(rows.inputs, rows.event, rows.time, ridge=0.01, start=begun.candidate)
    assert_allclose(warm.candidate, cold.candidate, atol=1e-9)
    assert warm.rounds < cold.rounds
    assert_allclose(NewtonFit(n_inputs=2, centre=np.ones(2)).candidate, 1.0)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ridge": -1.0}, "ridge: found a negative penalty"),
        ({"l1": np.array([0.1, -0.1])}, "l1: found a negative penalty"),
        ({"ridge": np.ones(3)}, "ridge: found shape"),
        ({"l1": np.nan}, "all finite"),
        ({"centre": np.ones(1)}, "centre: found shape"),
        ({"start": np.array([np.inf, 0.0])}, "start: .* all finite"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NewtonFit(n_inputs=2, **options)


def _tie_free(seed: int, n: int, p: int) -> Survival:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    beta = np.zeros(p)
    beta[:4] = [0.8, -0.6, 0.5, 0.3]
    died, lost = rng.exponential(np.exp(-x @ beta)), rng.exponential(2, n)
    return Survival(x, died <= lost, np.minimum(died, lost) + 1e-9, rng.integers(0, 3, n))


@pytest.mark.parametrize(("n", "p"), [(200, 8), (150, 40), (100, 120)])
@pytest.mark.parametrize(("strength", "l1_ratio"), [(0.1, 1.0), (0.05, 0.5), (0.02, 0.9)])
def test_elastic_net_is_scikit_survivals(n: int, p: int, strength: float, l1_ratio: float) -> None:
    rows = _tie_free(p, n, p)
    theirs = CoxnetSurvivalAnalysis(
        alphas=[strength], l1_ratio=l1_ratio, tol=1e-12, max_iter=10**6
    ).fit(rows.inputs, Surv.from_arrays(rows.event, rows.time))
    ours = fit_cox(
        rows.inputs, rows.event, rows.time,
        ridge=strength * (1 - l1_ratio), l1=strength * l1_ratio,
    )  # fmt: skip
    assert_allclose(ours.candidate, theirs.coef_[:, 0], atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ridge=st.sampled_from([1e-3, 0.03, 1.0]),
    l1=st.sampled_from([1e-3, 0.01, 0.05, 10.0]),
)
def test_elastic_net_meets_its_optimality_conditions(seed: int, ridge: float, l1: float) -> None:
    rows = _consortium(seed)
    rng = np.random.default_rng(seed)
    p = rows.inputs.shape[1]
    centre = np.where(rng.random(p) < 0.3, rng.normal(size=p), 0.0)
    lasso = np.where(rng.random(p) < 0.2, 0.0, l1)  # some are not penalised
    fit = _fit(rows, ridge=ridge, l1=lasso, centre=centre)
    away = fit.candidate - centre
    away[np.abs(away) < 1e-14] = 0.0
    at = cox_sums(rows.inputs, rows.event, rows.time, fit.candidate, strata=rows.strata)
    slope = at.gradient / len(rows.time) - ridge * away
    moved = away != 0.0
    assert_allclose(slope[moved], (lasso * np.sign(away))[moved], atol=1e-8)
    assert (np.abs(slope[~moved]) <= lasso[~moved] + 1e-8).all()
    assert_allclose(fit.covariance[~moved], 0.0)
    kept = np.ix_(moved, moved)
    information = (at.information + len(rows.time) * ridge * np.eye(p))[kept]
    assert_allclose(fit.covariance[kept] @ information, np.eye(moved.sum()), atol=1e-6)
    if l1 == 10.0:
        assert not moved[lasso > 0].any()


def test_lasso_with_a_pattern_of_few_inputs_leaves_the_others_at_zero() -> None:
    rows = _tie_free(3, 400, 30)
    fit = fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata, l1=0.1)
    assert (fit.candidate[:3] != 0).all()
    assert (fit.candidate[4:] == 0).sum() >= 24


@pytest.mark.parametrize("penalty", [{}, {"ridge": 0.01}, {"l1": 0.01}])
def test_an_input_that_never_varies_stays_where_it_is(penalty: dict[str, float]) -> None:
    rows = _rows()
    x = np.column_stack([np.zeros(200), rows.inputs, np.full(200, 0.1)])
    fit = fit_cox(x, rows.event, rows.time, strata=rows.strata, **penalty)
    alone = fit_cox(rows.inputs, rows.event, rows.time, strata=rows.strata, **penalty)
    assert_allclose(fit.candidate[[0, 5]], 0.0, atol=1e-15)
    assert_allclose(fit.candidate[1:5], alone.candidate, atol=1e-9)
    if "ridge" not in penalty:
        assert_allclose(fit.covariance[[0, 5]], 0.0)
        assert_allclose(fit.covariance[1:5, 1:5], alone.covariance, rtol=1e-6)
    started = NewtonFit(n_inputs=6, start=np.full(6, 0.2))
    started.advance(cox_sums(x, rows.event, rows.time, started.candidate))
    assert_allclose(started.candidate[[0, 5]], 0.2)


def test_units_of_an_input_do_not_decide_what_is_singular() -> None:
    rows = _rows()
    units = np.array([1e-6, 1.0, 1e5, 1e-3])
    fit = fit_cox(rows.inputs * units, rows.event, rows.time)
    alone = fit_cox(rows.inputs, rows.event, rows.time)
    assert_allclose(fit.candidate * units, alone.candidate, rtol=1e-7)


def _unruly() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One outlying row whose weight makes the first Newton step far too long."""
    rng = np.random.default_rng(1)
    x = np.append(rng.normal(size=60), 60.0)[:, None]
    time = np.append(rng.permutation(60) + 2.0, 1.0)
    return x, np.ones(61, dtype=bool), time


@pytest.mark.parametrize("l1", [0.0, 1e-4])
def test_a_step_that_does_not_improve_is_shortened(l1: float) -> None:
    x, event, time = _unruly()
    fit = NewtonFit(n_inputs=1, l1=l1)
    fit.candidate = np.array([-0.8])
    objectives, shortened = [], 0
    while not fit.converged:
        before = fit.accepted
        step = np.abs(fit.step).max(initial=np.inf if before is None else 0.0)
        fit.advance(cox_sums(x, event, time, fit.candidate))
        if before is not None and fit.accepted is before and not fit.converged:
            shortened += 1
            assert_allclose(fit.candidate, before + fit.step)
            assert 0.09 * step < np.abs(fit.step).max() < 0.91 * step
        else:
            objectives.append(fit.objective)
    assert shortened > 0
    assert all(b >= a - 1e-11 * abs(a) for a, b in pairwise(objectives))
    at = cox_sums(x, event, time, fit.candidate)
    assert_allclose(at.gradient / 61, l1 * np.sign(fit.candidate), atol=1e-7)


def test_sums_of_a_candidate_far_out_draw_the_step_back() -> None:
    fit = NewtonFit(n_inputs=1, ridge=0.1)
    fit.advance(LikelihoodSums(-30.0, np.ones(1), np.eye(1), 10, 5))
    kept = fit.accepted
    for far in (np.nan, -1e100, -np.inf, -1e300):
        step = float(fit.step[0])
        fit.advance(LikelihoodSums(far, np.zeros(1), np.zeros((1, 1)), 10, 5))
        assert fit.accepted is kept
        assert_allclose(fit.step, 0.1 * step)


@pytest.mark.parametrize("n", [40, 41, 97])
def test_singular_information_is_said_plainly(n: int) -> None:
    rows = _rows(n)
    rng = np.random.default_rng(n)
    x = np.column_stack([rows.inputs[:, :2], rows.inputs[:, :2] @ rng.normal(size=2)])
    with pytest.raises(ConvergenceError, match=r"singular; raise the ridge or drop an input"):
        fit_cox(x, rows.event, rows.time)
    twice = np.column_stack([rows.inputs, rows.inputs[:, 0]])
    with pytest.raises(ConvergenceError, match="singular"):
        fit_cox(twice, rows.event, rows.time)
    assert fit_cox(x, rows.event, rows.time, ridge=0.01).converged


def test_a_slope_without_curvature_is_singular() -> None:
    sums = LikelihoodSums(-9.0, np.ones(2), np.diag([1.0, 0.0]), 9, 5)
    for l1 in (0.0, 0.01):
        with pytest.raises(ConvergenceError, match="singular"):
            NewtonFit(n_inputs=2, l1=l1).advance(sums)


@pytest.mark.parametrize("n", [40, 400])
@pytest.mark.parametrize("noise_inputs", [0, 2])
def test_separated_patients_need_a_ridge(n: int, noise_inputs: int) -> None:
    time = np.arange(1.0, n + 1.0)
    noise = np.random.default_rng(0).normal(size=(n, noise_inputs))
    x = np.column_stack([-time / 10.0, noise])  # who is worse dies first, always
    event = np.ones(n, dtype=bool)
    with pytest.raises(ConvergenceError, match="raise the ridge"):
        fit_cox(x, event, time)
    assert fit_cox(x, event, time, ridge=0.01).converged
    assert n > 40 or fit_cox(x, event, time, l1=0.01).converged


def test_no_events_and_endless_fits_are_errors() -> None:
    with pytest.raises(ConvergenceError, match="no events"):
        fit_cox(np.ones((5, 1)), np.zeros(5), np.ones(5))
    with pytest.raises(ConvergenceError, match="no events"):
        NewtonFit(n_inputs=1).advance(LikelihoodSums(0.0, np.zeros(1), np.zeros((1, 1)), 0, 0))
    fit = NewtonFit(n_inputs=1)
    for k in range(MAX_ROUNDS):
        fit.advance(LikelihoodSums(float(k), np.ones(1), np.eye(1), 9, 5))
    with pytest.raises(ConvergenceError, match=f"{MAX_ROUNDS} rounds"):
        fit.advance(LikelihoodSums(99.0, np.ones(1), np.eye(1), 9, 5))
    for bad in (
        LikelihoodSums(np.nan, np.zeros(1), np.eye(1), 9, 5),
        LikelihoodSums(-1.0, np.full(1, np.nan), np.eye(1), 9, 5),
        LikelihoodSums(-1.0, np.zeros(1), np.full((1, 1), np.inf), 9, 5),
    ):
        with pytest.raises(ConvergenceError, match="at the start"):
            NewtonFit(n_inputs=1).advance(bad)


@pytest.mark.parametrize("l1", [0.0, 0.02])
def test_a_restarted_fit_ends_at_the_optimum_of_who_remains(l1: float) -> None:
    rows = _rows()
    fit = NewtonFit(n_inputs=4, ridge=0.01, l1=l1)
    for _ in range(3):
        fit.advance(cox_sums(rows.inputs, rows.event, rows.time, fit.candidate, strata=rows.strata))
    kept = fit.accepted
    fit.restart()
    assert fit.candidate is kept
    fit.restart()  # a second site leaves before any sums came
    assert fit.candidate is kept
    here = rows.strata != 0
    left = Survival(rows.inputs[here], rows.event[here], rows.time[here], rows.strata[here])
    while not fit.converged:
        fit.advance(cox_sums(left.inputs, left.event, left.time, fit.candidate, strata=left.strata))
    alone = fit_cox(left.inputs, left.event, left.time, strata=left.strata, ridge=0.01, l1=l1)
    assert_allclose(fit.candidate, alone.candidate, atol=1e-9)
    assert (fit.n_patients, fit.n_events) == (len(left.time), left.event.sum())


def test_the_accepted_coefficients_are_the_candidate_that_was_asked_for() -> None:
    rows = _rows()
    fit = NewtonFit(n_inputs=4)
    while not fit.converged:
        asked = fit.candidate
        fit.advance(cox_sums(rows.inputs, rows.event, rows.time, asked))
        assert fit.accepted is asked
    assert fit.candidate is asked
