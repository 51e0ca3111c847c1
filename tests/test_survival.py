"""Survival sums, and fits by them, against slow formulas and against other packages."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter, PiecewiseExponentialFitter
from numpy.testing import assert_allclose
from statsmodels.duration.hazard_regression import PHReg

from fusion.late import baseline_hazard
from fusion.survival import (
    Moments,
    check_outcome,
    cox_sums,
    cumulative_hazard,
    fit_cox,
    interval_sums,
    moments,
)
from tests.strategies import Survival, survival

if TYPE_CHECKING:
    from fusion.newton import LikelihoodSums

GOLDEN = Path(__file__).parent / "golden" / "cox_lung.json"


def _rows(n: int = 200, p: int = 4, *, n_times: int = 60, seed: int = 0) -> Survival:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    died = rng.exponential(n_times / 2 * np.exp(-x @ np.linspace(-0.6, 0.7, p)))
    lost = rng.uniform(1, n_times, n)
    time = np.ceil(np.minimum(died, lost))
    return Survival(x, died <= lost, time, rng.integers(0, 3, n))


def _efron(rows: Survival, beta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Textbook loops over strata, event times and tied events."""
    p = len(beta)
    value, gradient, information = 0.0, np.zeros(p), np.zeros((p, p))
    for label in set(rows.strata.tolist()):
        here = rows.strata == label
        x, event, time = rows.inputs[here], rows.event[here], rows.time[here]
        for t in sorted(set(time[event].tolist())):
            tied = [i for i in range(len(time)) if event[i] and time[i] == t]
            for part in range(len(tied)):
                s0, s1, s2 = 0.0, np.zeros(p), np.zeros((p, p))
                for i in range(len(time)):
                    if time[i] >= t:
                        share = 1.0 - part / len(tied) * (i in tied)
                        weight = share * np.exp(x[i] @ beta)
                        s0 += weight
                        s1 += weight * x[i]
                        s2 += weight * np.outer(x[i], x[i])
                value += x[tied[part]] @ beta - np.log(s0)
                gradient += x[tied[part]] - s1 / s0
                information += s2 / s0 - np.outer(s1, s1) / s0**2
    return value, gradient, information


@settings(max_examples=25, deadline=None)
@given(rows=survival(max_size=25), beta=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_sums_equal_the_textbook(rows: Survival, beta: list[float]) -> None:
    sums = cox_sums(rows.inputs, rows.event, rows.time, beta, strata=rows.strata)
    value, gradient, information = _efron(rows, np.array(beta))
    assert_allclose(sums.log_likelihood, value, rtol=1e-10, atol=1e-10)
    assert_allclose(sums.gradient, gradient, rtol=1e-9, atol=1e-9)
    assert_allclose(sums.information, information, rtol=1e-9, atol=1e-9)
    assert (sums.n_patients, sums.n_events) == (len(rows.time), rows.event.sum())


def test_derivatives_are_derivatives() -> None:
    rows = _rows(n_times=15)
    beta, h = np.array([0.3, -0.2, 0.1, 0.5]), 1e-5

    def at(point: np.ndarray) -> LikelihoodSums:
        return cox_sums(rows.inputs, rows.event, rows.time, point, strata=rows.strata)

    for j, direction in enumerate(np.eye(4) * h):
        up, down = at(beta + direction), at(beta - direction)
        slope = (up.log_likelihood - down.log_likelihood) / (2 * h)
        assert_allclose(slope, at(beta).gradient[j], rtol=1e-6)
        bend = -(up.gradient - down.gradient) / (2 * h)
        assert_allclose(bend, at(beta).information[j], rtol=1e-5, atol=1e-5)


def test_without_ties_efron_is_breslow() -> None:
    rows = _rows()
    time = rows.time + np.linspace(0.0, 0.9, len(rows.time))
    beta = np.array([0.4, -0.3, 0.2, 0.1])
    weight = np.exp(rows.inputs @ beta)
    at_risk = time[None, :] >= time[rows.event, None]
    breslow = (rows.inputs @ beta)[rows.event].sum() - np.log(at_risk @ weight).sum()
    found = cox_sums(rows.inputs, rows.event, time, beta).log_likelihood
    assert_allclose(found, breslow, rtol=1e-12)
    ours = fit_cox(rows.inputs, rows.event, time).candidate
    theirs = PHReg(time, rows.inputs, status=rows.event.astype(int), ties="breslow").fit()
    assert_allclose(ours, theirs.params, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(rows=survival(), seed=st.integers(0, 99), constant=st.floats(-50, 50))
def test_order_and_origin_of_inputs_do_not_matter(
    rows: Survival, seed: int, constant: float
) -> None:
    beta = np.array([0.5, -1.0, 0.2])
    first = cox_sums(rows.inputs, rows.event, rows.time, beta, strata=rows.strata)
    order = np.random.default_rng(seed).permutation(len(rows.time))
    second = cox_sums(
        rows.inputs[order] + constant, rows.event[order], rows.time[order], beta,
        strata=rows.strata[order],
    )  # fmt: skip
    assert_allclose(first.log_likelihood, second.log_likelihood, rtol=1e-9, atol=1e-9)
    assert_allclose(first.gradient, second.gradient, atol=1e-8)
    assert_allclose(first.information, second.information, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(rows=survival())
def test_sums_of_sites_are_the_sums_of_all_rows_within_sites(rows: Survival) -> None:
    beta = np.array([0.5, -1.0, 0.2])
    whole = cox_sums(rows.inputs, rows.event, rows.time, beta, strata=rows.strata)
    parts = [
        cox_sums(rows.inputs[here], rows.event[here], rows.time[here], beta)
        for here in (rows.strata == label for label in np.unique(rows.strata))
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert_allclose(total.log_likelihood, whole.log_likelihood, rtol=1e-12)
    assert_allclose(total.gradient, whole.gradient, atol=1e-12)
    assert_allclose(total.information, whole.information, atol=1e-12)
    assert (total.n_patients, total.n_events) == (whole.n_patients, whole.n_events)
    assert np.linalg.eigvalsh(whole.information)[0] > -1e-9


def test_sums_stay_finite_where_weights_underflow() -> None:
    rows = _rows()
    for size in (1e2, 1e3, 1e5):
        sums = cox_sums(rows.inputs, rows.event, rows.time, np.full(4, size))
        exact = _log_likelihood_in_logs(rows, np.full(4, size))
        assert np.isfinite([*sums.gradient, *sums.information.ravel()]).all()
        assert sums.log_likelihood <= exact + 1e-9 * abs(exact)


def _log_likelihood_in_logs(rows: Survival, beta: np.ndarray) -> float:
    log_hazard = rows.inputs @ beta
    total = 0.0
    for t in np.unique(rows.time[rows.event]):
        tied = rows.event & (rows.time == t)
        for part in range(tied.sum()):
            share = np.where(tied, 1.0 - part / tied.sum(), 1.0)[rows.time >= t]
            terms = log_hazard[rows.time >= t] + np.log(share)
            total -= terms.max() + np.log(np.exp(terms - terms.max()).sum())
        total += log_hazard[tied].sum()
    return total


def test_fit_equals_lifelines_with_strata_and_ridge() -> None:
    rows = _rows()
    x = (rows.inputs - rows.inputs.mean(axis=0)) / rows.inputs.std(axis=0, ddof=1)
    frame = pd.DataFrame(x, columns=list("abcd")).assign(
        time=rows.time, event=rows.event, strata=rows.strata
    )
    for ridge in (0.0, 0.05):
        model = CoxPHFitter(penalizer=ridge).fit(
            frame, "time", "event", strata="strata", fit_options={"precision": 1e-14}
        )
        fit = fit_cox(x, rows.event, rows.time, strata=rows.strata, ridge=ridge)
        assert_allclose(fit.candidate, model.params_, atol=1e-9)
        if ridge == 0.0:
            assert_allclose(fit.covariance, model.variance_matrix_, rtol=1e-6)
            assert_allclose(fit.objective * len(x), model.log_likelihood_, rtol=1e-9)


def test_fit_equals_golden_values() -> None:
    golden = json.loads(GOLDEN.read_text())
    rows = np.array(golden["rows"])
    fit = fit_cox(rows[:, 2:4], rows[:, 1], rows[:, 0], strata=rows[:, 4])
    assert_allclose(fit.candidate, golden["coefficients"], atol=1e-7)
    assert_allclose(np.sqrt(np.diag(fit.covariance)), golden["standard_errors"], rtol=1e-6)
    assert_allclose(fit.objective * len(rows), golden["log_likelihood"], rtol=1e-9)


@pytest.mark.parametrize(
    ("event", "time", "reason"),
    [
        ([1, 0], [1.0], "needed one"),
        ([[1]], [[1.0]], "needed one"),
        ([1], [0.0], "days > 0"),
        ([1], [np.nan], "days > 0"),
        ([1], [np.inf], "days > 0"),
    ],
)
def test_impossible_outcomes_are_refused(event: object, time: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_outcome(event, time)


def test_impossible_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="needed \\(2, 1\\)"):
        cox_sums(np.ones((2, 2)), [1, 0], [1.0, 2.0], [0.0])
    with pytest.raises(ValueError, match="finite"):
        cox_sums([[np.nan], [1.0]], [1, 0], [1.0, 2.0], [0.0])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    n_parts=st.integers(1, 5),
    centre=st.sampled_from([0.0, 1e-9, 1e6, 1e9]),
    absent=st.floats(0, 1),
)
def test_merged_moments_are_numpys(seed: int, n_parts: int, centre: float, absent: float) -> None:
    rng = np.random.default_rng(seed)
    values = centre + rng.normal(size=(30, 3))
    values[rng.random(values.shape) < absent] = np.nan
    values[:2] = centre + rng.normal(size=(2, 3))
    parts = [moments(part) for part in np.array_split(values, n_parts)]
    for order in (parts, parts[::-1]):
        total = order[0]
        for part in order[1:]:
            total = total + part
        assert_allclose(total.n, (~np.isnan(values)).sum(axis=0))
        assert_allclose(total.mean, np.nanmean(values, axis=0), rtol=1e-12)
        assert_allclose(total.scale, np.nanstd(values, axis=0, ddof=1), rtol=1e-6)


def test_moments_of_nothing_and_of_constants() -> None:
    empty = moments(np.full((4, 2), np.nan))
    assert_allclose([empty.n, empty.mean, empty.m2], 0.0)
    assert_allclose(empty.scale, 1.0)
    same = moments(np.full((4, 2), 1e6 + 0.1))
    assert_allclose(same.scale, 1.0)
    assert_allclose((same + empty).mean, same.mean)
    assert_allclose(Moments(np.ones(1), np.ones(1), np.zeros(1)).scale, 1.0)


@settings(max_examples=40, deadline=None)
@given(rows=survival(), n_edges=st.integers(1, 6))
def test_interval_sums_equal_brute_force(rows: Survival, n_edges: int) -> None:
    edges = np.unique(np.linspace(1, rows.time.max() * 0.8 + 1, n_edges).round(1))
    log_hazard = rows.inputs[:, 0]
    events, exposure = interval_sums(log_hazard, rows.event, rows.time, edges)
    for k, (left, right) in enumerate(pairwise([0.0, *edges])):
        inside = [left < t <= right for t in rows.time]
        assert events[k] == sum(e and i for e, i in zip(rows.event, inside, strict=True))
        days = [max(0.0, min(t, right) - left) for t in rows.time]
        assert_allclose(exposure[k], np.sum(np.exp(log_hazard) * days))


@settings(max_examples=40, deadline=None)
@given(hazard=st.lists(st.floats(0, 2), min_size=1, max_size=5), times=st.lists(st.floats(0, 99)))
def test_cumulative_hazard_equals_brute_force(hazard: list[float], times: list[float]) -> None:
    edges = np.arange(1, len(hazard) + 1) * 7.0

    def slow(t: float) -> float:
        ends = [*edges[:-1], np.inf]
        return sum(h * max(0.0, min(t, right) - left) for h, left, right in
                   zip(hazard, [0.0, *edges[:-1]], ends, strict=True))  # fmt: skip

    found = cumulative_hazard(hazard, edges, times)
    assert_allclose(found, [slow(t) for t in times], atol=1e-12)


def test_piecewise_baseline_equals_lifelines() -> None:
    rows = _rows(400)
    breaks = [5.5, 12.5, 25.5]  # on no time: lifelines counts an event at a break to the right
    events, exposure = interval_sums(
        np.zeros(400), rows.event, rows.time, [*breaks, rows.time.max()]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lifelines' optimiser divides by zero on its way
        theirs = PiecewiseExponentialFitter(breaks).fit(rows.time, rows.event)
    assert_allclose(1.0 / baseline_hazard(events, exposure), theirs.params_, rtol=1e-4)
