from __future__ import annotations

import csv
from dataclasses import fields
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lifelines.statistics import multivariate_logrank_test
from scipy.special import expit
from sksurv.compare import compare_survival
from sksurv.metrics import (
    brier_score as sksurv_brier_score,
)
from sksurv.metrics import (
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
)
from sksurv.metrics import (
    integrated_brier_score as sksurv_integrated_brier_score,
)
from sksurv.nonparametric import (
    CensoringDistributionEstimator,
    kaplan_meier_estimator,
)
from sksurv.util import Surv

from fusion import evaluation as ev

EXACT = {"rel": 1e-12, "abs": 1e-12}
TAU = 700.0
TIMES = np.array([30.0, 100.0, 250.0, 400.0, 700.0])


def make_site(seed, n=60, *, strength=0.8, day=1.0, offset=0.0):
    """Rows of one site: log_hazard, event, time with ties when `day` is coarse."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    death = rng.exponential(600 * np.exp(-strength * x - offset))
    censored = rng.uniform(50, 1500, n)
    time = np.ceil(np.minimum(death, censored) / day) * day
    return x.round(1), death <= censored, time


def uno(x, event, time, tau=TAU):
    return ev.uno_pair_counts(x, event, time, ev.censoring_curve(event, time), tau)


def auc(x, event, time, horizon=400.0):
    return ev.auc_pair_counts(x, event, time, ev.censoring_curve(event, time), horizon)


def brier(survival, event, time, times=TIMES):
    return ev.brier_sums(survival, event, time, times, ev.censoring_curve(event, time))


def survival_of(x, times=TIMES):
    return np.exp(-np.outer(np.exp(0.8 * x), times) / 600)


def calibrate(x, event, time, *, horizon=400.0, n_groups=3):
    return ev.calibration_sums(
        survival_of(x, np.array([horizon]))[:, 0],
        event,
        time,
        np.digitize(x, [-0.5, 0.5]),
        horizon=horizon,
        censoring=ev.censoring_curve(event, time),
        n_groups=n_groups,
    )


def table_of(x, event, time, edges=(0, 100, 300, 700, 1500), n_groups=3):
    return ev.life_table(event, time, np.digitize(x, [-0.5, 0.5]), edges, n_groups)


SITE_STATISTICS = {
    "pairs": ev.pair_counts,
    "uno": uno,
    "auc": auc,
    "brier": lambda x, e, t: brier(survival_of(x), e, t),
    "life table": table_of,
    "log rank": lambda x, e, t: ev.log_rank_sums(table_of(x, e, t)),
    "calibration": calibrate,
    "observed": lambda x, e, t: ev.observed_expected(np.exp(x) * t / 600, e),
}
SHAPES = {
    "brier": {"n_times": 5},
    "life table": {"n_groups": 3, "n_intervals": 4},
    "log rank": {"n_groups": 3},
    "calibration": {"n_groups": 3},
}


def assert_same(first, second, rel=1e-12):
    assert type(first) is type(second)
    for part in fields(first):
        np.testing.assert_allclose(
            getattr(first, part.name), getattr(second, part.name), rtol=rel, atol=rel
        )


@st.composite
def rows(draw, max_size=25):
    n = draw(st.integers(1, max_size))
    column = lambda values: np.array(draw(st.lists(values, min_size=n, max_size=n)))  # noqa: E731
    return (
        column(st.integers(-5, 5)) / 2,
        column(st.booleans()),
        column(st.integers(1, 15)) * 50.0,
    )


@pytest.mark.parametrize("day", [1.0, 60.0, 400.0])
@pytest.mark.parametrize("seed", range(4))
def test_harrell_equals_scikit_survival(seed, day):
    x, event, time = make_site(seed, day=day)
    counts = ev.pair_counts(x, event, time)
    value, concordant, discordant, tied, _ = concordance_index_censored(event, time, x)
    assert (counts.concordant, counts.discordant, counts.tied) == (concordant, discordant, tied)
    assert ev.concordance_index(counts).value == pytest.approx(value, **EXACT)
    assert counts.n_patients == len(x)
    assert counts.n_events == event.sum()


@given(rows())
def test_harrell_equals_scikit_survival_with_any_ties(site):
    x, event, time = site
    counts = ev.pair_counts(x, event, time)
    assume(len(x) > 1 and counts.comparable)
    expected = concordance_index_censored(event, time, x)
    assert (counts.concordant, counts.discordant, counts.tied) == expected[1:4]


def test_risks_closer_than_the_tolerance_are_tied():
    counts = ev.pair_counts([0.0, 0.9e-8, 1.0], [True, False, False], [1.0, 2.0, 3.0])
    assert (counts.concordant, counts.discordant, counts.tied) == (0.0, 1.0, 1.0)


def test_counts_by_hand():
    # pairs (earlier, later): (0,1) concordant, (0,2) tied, (2,1): same day, event before censoring
    counts = ev.pair_counts([1.0, 0.0, 1.0], [True, False, True], [5.0, 9.0, 9.0])
    assert counts == ev.PairCounts(
        concordant=2.0, discordant=0.0, tied=1.0, comparable=3.0, n_patients=3.0, n_events=2.0,
        sum_cc=1.5**2 + 2.0**2 + 1.5**2, sum_cp=2 * (1.5 + 2.0 + 1.5), sum_pp=12.0,
    )  # fmt: skip


def test_many_rows_are_counted_in_blocks(monkeypatch):
    x, event, time = make_site(1, n=150, day=30.0)
    whole = ev.pair_counts(x, event, time), uno(x, event, time), auc(x, event, time)
    monkeypatch.setattr("fusion.evaluation.pairs._PAIRS_AT_ONCE", 400)
    parts = ev.pair_counts(x, event, time), uno(x, event, time), auc(x, event, time)
    for one, other in zip(whole, parts, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("day", [1.0, 60.0])
@pytest.mark.parametrize("tau", [150.0, 700.0, np.inf])
@pytest.mark.parametrize("seed", range(3))
def test_uno_equals_scikit_survival(seed, day, tau):
    x, event, time = make_site(seed, day=day)
    outcome = Surv.from_arrays(event, time)
    expected = concordance_index_ipcw(outcome, outcome, x, tau=None if np.isinf(tau) else tau)[0]
    assert ev.concordance_index(uno(x, event, time, tau)).value == pytest.approx(expected, **EXACT)


def test_uno_without_censoring_is_harrell():
    x, _, time = make_site(2)
    event = np.ones(len(x), dtype=bool)
    assert_same(uno(x, event, time, np.inf), ev.pair_counts(x, event, time))


@pytest.mark.parametrize("seed", range(5))
def test_censoring_curve_equals_scikit_survival(seed):
    _, event, time = make_site(seed, day=60.0)
    reference = CensoringDistributionEstimator().fit(Surv.from_arrays(event, time))
    asked = np.linspace(0.0, time.max(), 40)
    curve = ev.censoring_curve(event, time)
    np.testing.assert_allclose(curve.at(asked), reference.predict_proba(asked), rtol=1e-13)


def test_the_censoring_curve_is_not_printed():
    curve = ev.censoring_curve([True, False], [12.0, 34.0])
    assert repr(curve) == "CensoringCurve()"


@pytest.mark.parametrize("horizon", [100.0, 400.0, 900.0])
@pytest.mark.parametrize("seed", range(3))
def test_auc_equals_scikit_survival(seed, horizon):
    x, event, time = make_site(seed, day=10.0)
    outcome = Surv.from_arrays(event, time)
    expected = cumulative_dynamic_auc(outcome, outcome, x, [horizon])[1]
    found = ev.concordance_index(auc(x, event, time, horizon)).value
    assert found == pytest.approx(expected, **EXACT)


def test_auc_has_no_pair_past_the_follow_up():
    x, event, time = make_site(0)
    counts = auc(x, event, time, horizon=5000.0)
    assert counts.comparable == 0.0
    assert counts.n_patients == len(x)


@pytest.mark.parametrize("day", [1.0, 10.0])
@pytest.mark.parametrize("seed", range(3))
def test_brier_equals_scikit_survival(seed, day):
    x, event, time = make_site(seed, n=120, day=day)
    outcome = Surv.from_arrays(event, time)
    survival = survival_of(x)
    _, expected = sksurv_brier_score(outcome, outcome, survival, TIMES)
    sums = brier(survival, event, time)
    np.testing.assert_allclose(ev.brier_score(sums), expected, rtol=1e-12)
    figure = ev.integrated_brier_score(sums, TIMES)
    assert figure.value == pytest.approx(
        sksurv_integrated_brier_score(outcome, outcome, survival, TIMES), **EXACT
    )
    assert figure.low < figure.value < figure.high


def test_null_brier_equals_scikit_survival():
    _, event, time = make_site(5, n=120)
    outcome = Surv.from_arrays(event, time)
    knots, survival = kaplan_meier_estimator(event, time)
    curve = np.concatenate(([1.0], survival))[np.searchsorted(knots, TIMES, side="right")]
    _, expected = sksurv_brier_score(outcome, outcome, np.tile(curve, (120, 1)), TIMES)
    sums = ev.null_brier_sums(event, time, TIMES, ev.censoring_curve(event, time))
    np.testing.assert_allclose(ev.brier_score(sums), expected, rtol=1e-12)


def test_brier_counts_a_site_only_as_far_as_it_is_followed():
    short, long = make_site(1), make_site(2, n=80)
    short = short[0], short[1] & (short[2] < 300.0), np.minimum(short[2], 300.0)
    parts = [brier(survival_of(x), e, t) for x, e, t in (short, long)]
    assert parts[0].n_patients.tolist() == [60.0, 60.0, 60.0, 0.0, 0.0]
    assert parts[0].squared_errors[3:].tolist() == [0.0, 0.0]
    assert parts[0].integral.item() == 0.0
    pooled = ev.brier_score(parts)
    np.testing.assert_allclose(pooled[3:], ev.brier_score(parts[1])[3:])
    assert np.isnan(ev.brier_score(parts[0])[-1])
    with pytest.raises(ValueError, match=r"^times: found one to which no patient"):
        ev.integrated_brier_score(parts[0], TIMES)
    assert ev.integrated_brier_score(parts, TIMES).standard_error == pytest.approx(
        ev.integrated_brier_score(parts[1], TIMES).standard_error
    )


def test_brier_is_the_plain_mean_when_everybody_died():
    x, _, time = make_site(3)
    event = np.ones(len(x), dtype=bool)
    times = np.array([100.0, 1e5])
    survival = survival_of(x, times)
    expected = np.mean(((time[:, None] > times) - survival) ** 2, axis=0)
    np.testing.assert_allclose(ev.brier_score(brier(survival, event, time, times)), expected)


def test_integrated_brier_error_is_that_of_a_mean_without_censoring():
    x, _, time = make_site(3)
    survival = survival_of(x)
    errors = ((time[:, None] > TIMES) - survival) ** 2
    average = np.trapezoid(errors, TIMES, axis=1) / (TIMES[-1] - TIMES[0])
    sums = brier(survival, np.ones(len(x), dtype=bool), time)
    figure = ev.integrated_brier_score(sums, TIMES)
    assert figure.value == pytest.approx(average.mean())
    assert figure.standard_error == pytest.approx(average.std() / np.sqrt(len(x)))


@pytest.mark.parametrize("grid", [[100.0], [1.0, 2.0], [30.0, 100.0, 100.0, 400.0, 700.0]])
def test_integrated_brier_needs_the_grid_of_the_sums(grid):
    x, event, time = make_site(0)
    with pytest.raises(ValueError, match=r"^times"):
        ev.integrated_brier_score(brier(survival_of(x), event, time), grid)


def leave_one_out_error(statistic, site):
    """Jackknife of the concordance by refitting without each patient."""
    keep = ~np.eye(len(site[0]), dtype=bool)
    values = [ev.concordance_index(statistic(*(c[k] for c in site))).value for k in keep]
    return np.sqrt((len(values) - 1) * np.var(values))


@pytest.mark.parametrize("seed", range(4))
def test_standard_error_is_the_jackknife(seed):
    site = make_site(seed, n=120)
    found = ev.concordance_index(ev.pair_counts(*site)).standard_error
    assert found == pytest.approx(leave_one_out_error(ev.pair_counts, site), rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_standard_error_over_sites_is_the_jackknife(seed):
    sites = [make_site(seed * 10 + k, n=50 + 20 * k) for k in range(3)]
    counts = [ev.pair_counts(*site) for site in sites]
    values = []
    for k, site in enumerate(sites):
        others = [c for j, c in enumerate(counts) if j != k]
        for keep in ~np.eye(len(site[0]), dtype=bool):
            part = ev.pair_counts(*(column[keep] for column in site))
            values.append(ev.concordance_index([*others, part]).value)
    expected = np.sqrt((len(values) - 1) * np.var(values))
    assert ev.concordance_index(counts).standard_error == pytest.approx(expected, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("statistic", [ev.pair_counts, uno, auc])
def test_standard_error_agrees_with_the_bootstrap(statistic):
    sites = [make_site(k, n=90 + 60 * k) for k in range(3)]
    rng = np.random.default_rng(0)

    def resampled(site):
        pick = rng.integers(0, len(site[0]), len(site[0]))
        return statistic(*(column[pick] for column in site))

    values = [ev.concordance_index([resampled(s) for s in sites]).value for _ in range(1500)]
    found = ev.concordance_index([statistic(*s) for s in sites]).standard_error
    # known censoring weights make Uno's and the AUC's error a little too large
    assert found == pytest.approx(np.std(values), rel=0.08 if statistic is ev.pair_counts else 0.15)


@pytest.mark.slow
def test_interval_covers_the_true_concordance():
    def sites(seed, n):
        return [make_site(seed * 3 + k, n=n, offset=0.3 * k) for k in range(3)]

    truth = ev.concordance_index([ev.pair_counts(*s) for s in sites(10**6, 6000)]).value
    figures = [
        ev.concordance_index([ev.pair_counts(*s) for s in sites(seed, 40)]) for seed in range(600)
    ]
    assert 0.93 <= np.mean([f.low <= truth <= f.high for f in figures]) <= 0.98


def two_models(seed, n=100):
    """Site with log hazards of two models that share much: a, b, event, time."""
    x, event, time = make_site(seed, n=n)
    noise = np.random.default_rng(seed + 1000).normal(size=(2, n))
    return x + 0.5 * noise[0], x + 1.0 * noise[1], event, time


def difference(sites):
    return ev.concordance_difference(
        [ev.pair_counts(a, event, time) for a, _, event, time in sites],
        [ev.pair_counts(b, event, time) for _, b, event, time in sites],
        [ev.pair_cross(*site) for site in sites],
    )


@pytest.mark.parametrize("seed", range(3))
def test_error_of_a_difference_over_sites_is_the_jackknife(seed):
    sites = [two_models(seed * 10 + k, n=60 + 20 * k) for k in range(3)]
    a, b = ([ev.pair_counts(site[model], *site[2:]) for site in sites] for model in (0, 1))
    values = []
    for k, site in enumerate(sites):
        for keep in ~np.eye(len(site[0]), dtype=bool):
            parts = [
                ev.pair_counts(site[model][keep], site[2][keep], site[3][keep]) for model in (0, 1)
            ]
            values.append(
                ev.concordance_index([*a[:k], parts[0], *a[k + 1 :]]).value
                - ev.concordance_index([*b[:k], parts[1], *b[k + 1 :]]).value
            )
    found = difference(sites)
    assert found.standard_error == pytest.approx(
        np.sqrt((len(values) - 1) * np.var(values)), rel=0.03
    )
    assert found.value == pytest.approx(
        ev.concordance_index(a).value - ev.concordance_index(b).value
    )
    apart = [ev.concordance_index(counts).standard_error for counts in (a, b)]
    assert found.standard_error < 0.8 * np.hypot(*apart)
    assert found.high - found.value == pytest.approx(1.959964 * found.standard_error, rel=1e-6)


@pytest.mark.slow
def test_error_of_a_difference_agrees_with_the_bootstrap():
    sites = [two_models(k, n=100 + 50 * k) for k in range(3)]
    rng = np.random.default_rng(0)

    def resampled(site):
        pick = rng.integers(0, len(site[0]), len(site[0]))
        return tuple(column[pick] for column in site)

    values = [difference([resampled(site) for site in sites]).value for _ in range(1000)]
    assert difference(sites).standard_error == pytest.approx(np.std(values), rel=0.1)


def test_equal_models_do_not_differ():
    a, _, event, time = two_models(0)
    found = difference([(a, 2.0 * a - 1.0, event, time)])
    assert found == ev.Estimate(0.0, 0.0, 0.0, 0.0)


@given(rows(), st.integers(0, 100))
def test_a_difference_turns_its_sign_with_the_models(site, seed):
    x, event, time = site
    other = np.random.default_rng(seed).permutation(x)
    assume(ev.pair_counts(*site).comparable)
    one, turned = difference([(x, other, event, time)]), difference([(other, x, event, time)])
    assert one.value == pytest.approx(-turned.value)
    assert one.standard_error == pytest.approx(turned.standard_error, abs=1e-9)


def test_the_cross_sum_is_in_the_unit_of_the_squares():
    x, _, event, time = two_models(0)
    assert ev.pair_cross(x, x, event, time) == ev.pair_counts(x, event, time).to_vector()[6]
    assert ev.pair_cross([], [], [], []) == 0.0


def test_a_difference_needs_the_same_patients():
    a, b, event, time = two_models(0)
    fewer = ev.pair_counts(b[1:], event[1:], time[1:])
    with pytest.raises(ValueError, match=r"^counts_b: found other patients"):
        ev.concordance_difference(ev.pair_counts(a, event, time), fewer, 0.0)
    nobody = ev.pair_counts([], [], [])
    with pytest.raises(ev.NoComparablePairs):
        ev.concordance_difference(nobody, nobody, 0.0)


def test_interval_is_symmetric_on_the_logit_scale():
    figure = ev.concordance_index(ev.pair_counts(*make_site(0)))
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    middle = (logit(figure.low) + logit(figure.high)) / 2
    assert expit(middle) == pytest.approx(figure.value)
    half = 1.959963984540054 * figure.standard_error / (figure.value * (1 - figure.value))
    assert logit(figure.high) - middle == pytest.approx(half)


@pytest.mark.parametrize(("sign", "low", "high"), [(-1, 0.025 ** (1 / 3), 1), (1, 0, None)])
def test_perfect_order_gets_the_binomial_interval(sign, low, high):
    time = np.array([1.0, 2.0, 3.0, 4.0])
    figure = ev.concordance_index(ev.pair_counts(sign * time, [True, True, True, False], time))
    assert figure.value == (1.0 if sign < 0 else 0.0)
    assert figure.low == pytest.approx(low)
    assert figure.high == pytest.approx(1 - 0.025 ** (1 / 3) if high is None else high)


def test_tied_predictions_are_chance_without_spread():
    _, event, time = make_site(0)
    figure = ev.concordance_index(ev.pair_counts(np.zeros(60), event, time))
    assert (figure.value, figure.low, figure.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("event", "time"),
    [([False] * 3, [1.0, 2.0, 3.0]), ([True] * 3, [5.0] * 3), ([True], [5.0]), ([], [])],
    ids=["no events", "all events at one time", "one patient", "nobody"],
)
def test_no_comparable_pairs(event, time):
    counts = ev.pair_counts(np.arange(len(time)), event, time)
    assert counts.comparable == 0.0
    with pytest.raises(ev.NoComparablePairs, match="no comparable pair"):
        ev.concordance_index(counts)
    with pytest.raises(ValueError, match="no comparable pair"):
        ev.concordance_index(uno(np.arange(len(time)), event, time))


def test_a_site_without_pairs_changes_nothing_but_the_count_of_patients():
    whole = ev.pair_counts(*make_site(0))
    nothing = ev.pair_counts([1.0, 2.0], [False, False], [3.0, 4.0])
    assert ev.concordance_index([whole, nothing]) == ev.concordance_index(whole)


def test_no_sums_at_all():
    with pytest.raises(ValueError, match=r"^sums: found none"):
        ev.concordance_index([])


@given(rows(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_order_of_patients_does_not_matter(site, random):
    order = list(range(len(site[0])))
    random.shuffle(order)
    for statistic in SITE_STATISTICS.values():
        assert_same(statistic(*site), statistic(*(c[order] for c in site)), rel=1e-10)


@given(rows())
def test_turned_predictions_turn_the_concordance(site):
    x, event, time = site
    assume(ev.pair_counts(*site).comparable)
    one = ev.concordance_index(ev.pair_counts(x, event, time))
    other = ev.concordance_index(ev.pair_counts(-x, event, time))
    assert other.value == pytest.approx(1.0 - one.value)
    assert other.standard_error == pytest.approx(one.standard_error)
    assert (1.0 - other.high, 1.0 - other.low) == pytest.approx((one.low, one.high))


def brute_force_pairs(sites):
    """Pairs of the concatenated rows that share a site."""
    site_of = np.concatenate([np.full(len(s[0]), k) for k, s in enumerate(sites)])
    x, event, time = (np.concatenate(column) for column in zip(*sites, strict=True))
    concordant = comparable = 0.0
    for i in np.flatnonzero(event):
        for j in np.flatnonzero(site_of == site_of[i]):
            if time[j] > time[i] or (time[j] == time[i] and not event[j]):
                comparable += 1
                concordant += (x[i] > x[j]) + 0.5 * (x[i] == x[j])
    return concordant, comparable


@given(st.lists(rows(max_size=10), min_size=1, max_size=4))
@settings(max_examples=50)
def test_sites_add_up_to_pairs_within_site(sites):
    pooled = reduce(add, [ev.pair_counts(*site) for site in sites])
    concordant, comparable = brute_force_pairs(sites)
    assert (pooled.concordant + 0.5 * pooled.tied, pooled.comparable) == (concordant, comparable)


@given(st.lists(rows(max_size=10), min_size=2, max_size=4))
@settings(max_examples=50)
def test_life_tables_and_calibration_in_the_large_of_sites_are_those_of_all_rows(sites):
    together = [np.concatenate(column) for column in zip(*sites, strict=True)]
    for name in ("life table", "observed"):
        parts = [SITE_STATISTICS[name](*site) for site in sites]
        assert_same(reduce(add, parts), SITE_STATISTICS[name](*together), rel=1e-10)


@pytest.mark.parametrize("name", SITE_STATISTICS)
def test_sums_travel_as_vectors(name):
    first, second = (SITE_STATISTICS[name](*make_site(seed, day=10.0)) for seed in (0, 1))
    vector = first.to_vector()
    assert vector.dtype == np.float64
    assert vector.ndim == 1
    restored = type(first).from_vector(vector, **SHAPES.get(name, {}))
    assert_same(restored, first)
    added = type(first).from_vector(vector + second.to_vector(), **SHAPES.get(name, {}))
    assert_same(added, first + second)
    vector[0] = np.nan
    with pytest.raises(ValueError, match=r"^vector"):
        type(first).from_vector(vector, **SHAPES.get(name, {}))
    with pytest.raises(ValueError, match=r"^vector"):
        type(first).from_vector(vector[1:], **SHAPES.get(name, {}))


def test_pair_counts_of_a_large_site_fit_a_fixed_point_sum():
    n = 5000
    counts = ev.pair_counts(np.arange(n), np.ones(n, dtype=bool), np.arange(n))
    assert counts.sum_pp > 2.0**31
    assert np.abs(counts.to_vector()).max() < 2.0**20
    assert ev.PairCounts.from_vector(counts.to_vector()) == counts


def test_unlike_sums_do_not_add():
    pairs = ev.pair_counts(*make_site(0))
    with pytest.raises(TypeError, match="needed PairCounts"):
        pairs + ev.observed_expected([1.0], [True])  # type: ignore[operator]
    x, event, time = make_site(0)
    with pytest.raises(ValueError, match=r"^counts: found shape"):
        table_of(x, event, time) + table_of(x, event, time, edges=(0, 100))


def test_life_table_by_hand():
    event = [True, False, True, False, True]
    table = ev.life_table(event, [0.0, 10.0, 10.5, 20.0, 99.0], [0, 0, 0, 0, 2], [0, 10, 20], 3)
    assert table.counts.tolist() == [
        [[4, 1, 1], [2, 1, 1]],
        [[0, 0, 0], [0, 0, 0]],
        [[1, 0, 0], [1, 0, 0]],
    ]
    curves = ev.survival_from_life_table(table)
    first = 1 - 1 / 3.5
    second = first * (1 - 1 / 1.5)
    np.testing.assert_allclose(curves.value[0], [first, second])
    greenwood = np.cumsum([1 / (3.5 * 2.5), 1 / (1.5 * 0.5)])
    np.testing.assert_allclose(
        curves.standard_error[0], np.array([first, second]) * np.sqrt(greenwood)
    )
    assert np.isnan(curves.value[1]).all()
    assert curves.value[2].tolist() == curves.low[2].tolist() == [1.0, 1.0]


def site_on_fine_grid():
    """Site whose events and censorings share no interval, so that grouping loses nothing."""
    x, event, time = make_site(7, n=150, day=20.0)
    time = np.where(event, time, time + 10.0)
    edges = np.unique(np.concatenate(([0.0], time)))
    return x, event, time, edges


def test_survival_equals_kaplan_meier_on_a_fine_grid():
    x, event, time, edges = site_on_fine_grid()
    group = np.digitize(x, [0.0])
    curves = ev.survival_from_life_table(ev.life_table(event, time, group, edges, 2))
    for k in range(2):
        own = group == k
        knots, survival, interval = kaplan_meier_estimator(
            event[own], time[own], conf_type="log-log"
        )
        at = np.searchsorted(edges, knots) - 1
        inner = (survival < 1.0) & (survival > 0.0)
        np.testing.assert_allclose(curves.value[k][at], survival, rtol=1e-12)
        np.testing.assert_allclose(curves.low[k][at][inner], interval[0][inner], rtol=1e-10)
        np.testing.assert_allclose(curves.high[k][at][inner], interval[1][inner], rtol=1e-10)


def test_survival_of_a_group_that_dies_out_is_zero():
    table = ev.life_table([True, True], [5.0, 15.0], [0, 0], [0, 10, 20, 30], 1)
    curve = ev.survival_from_life_table(table)
    np.testing.assert_array_equal(curve.value, [[0.5, 0.0, np.nan]])
    assert curve.low[0, 1] == curve.high[0, 1] == curve.standard_error[0, 1] == 0.0


@pytest.mark.parametrize("cuts", [[0.0], [-0.5, 0.5]])
def test_log_rank_equals_scikit_survival_on_a_fine_grid(cuts):
    x, event, time, edges = site_on_fine_grid()
    group = np.digitize(x, cuts)
    table = ev.life_table(event, time, group, edges, len(cuts) + 1)
    found = ev.log_rank_test(ev.log_rank_sums(table))
    statistic, p_value = compare_survival(Surv.from_arrays(event, time), group)
    assert found.statistic == pytest.approx(statistic, rel=1e-9)
    assert found.p_value == pytest.approx(p_value, rel=1e-7)
    assert found.degrees_of_freedom == len(cuts)
    other = multivariate_logrank_test(time, group, event)
    assert found.statistic == pytest.approx(other.test_statistic, rel=1e-9)


def test_log_rank_over_sites_adds_numerators_and_variances():
    sums = [ev.log_rank_sums(table_of(*make_site(seed, offset=seed))) for seed in range(3)]
    assert ev.log_rank_test(sums) == ev.log_rank_test(reduce(add, sums))
    for part in sums:
        assert part.observed_minus_expected.sum() == pytest.approx(0.0, abs=1e-12)
        np.testing.assert_allclose(part.variance.sum(axis=0), 0.0, atol=1e-12)


def test_log_rank_ignores_an_empty_group():
    x, event, time = make_site(0)
    two = ev.log_rank_sums(ev.life_table(event, time, x > 0, [0, 100, 500], 2))
    three = ev.log_rank_sums(ev.life_table(event, time, 2 * (x > 0), [0, 100, 500], 3))
    assert ev.log_rank_test(three).statistic == pytest.approx(ev.log_rank_test(two).statistic)
    assert ev.log_rank_test(three).degrees_of_freedom == 1


@pytest.mark.parametrize(
    ("event", "group"), [([False, False, False], [0, 1, 1]), ([True, True, False], [0, 0, 0])]
)
def test_log_rank_needs_events_and_two_groups(event, group):
    sums = ev.log_rank_sums(ev.life_table(event, [1.0, 2.0, 3.0], group, [0, 5], 2))
    with pytest.raises(ValueError, match=r"^sums: found no event"):
        ev.log_rank_test(sums)


@pytest.mark.slow
def test_log_rank_holds_its_level_over_sites_that_differ():
    rng = np.random.default_rng(0)

    def p_value():
        sums = []
        for offset in (0.0, 1.0, 2.0):
            _, event, time = make_site(int(rng.integers(2**31)), n=60, strength=0, offset=offset)
            group = rng.random(60) < 0.3 + 0.2 * offset  # groups differ in site mix only
            table = ev.life_table(event, time, group, np.arange(0, 1600, 100), 2)
            sums.append(ev.log_rank_sums(table))
        return ev.log_rank_test(sums).p_value

    assert 0.03 <= np.mean([p_value() < 0.05 for _ in range(800)]) <= 0.075


def test_calibration_without_censoring_is_the_share_of_events():
    x, _, time = make_site(0, n=200)
    event = np.ones(200, dtype=bool)
    found = ev.calibration(calibrate(x, event, time))
    group = np.digitize(x, [-0.5, 0.5])
    risk = 1 - survival_of(x, np.array([400.0]))[:, 0]
    for k in range(3):
        share = np.mean(time[group == k] <= 400.0)
        n = np.sum(group == k)
        assert found.predicted[k] == pytest.approx(risk[group == k].mean())
        assert found.observed.value[k] == pytest.approx(share)
        assert found.observed.standard_error[k] == pytest.approx(np.sqrt(share * (1 - share) / n))


def test_calibration_of_one_group_is_kaplan_meier():
    _, event, time = make_site(4, n=300)  # no ties between events and censorings at this seed
    time = np.where(event, time, time + 0.5)
    sums = ev.calibration_sums(
        np.full(300, 0.5), event, time, np.zeros(300), horizon=400.0,
        censoring=ev.censoring_curve(event, time), n_groups=1,
    )  # fmt: skip
    knots, survival = kaplan_meier_estimator(event, time)
    expected = 1.0 - survival[np.searchsorted(knots, 400.0, side="right") - 1]
    assert ev.calibration(sums).observed.value[0] == pytest.approx(expected, rel=1e-12)
    assert sums.observed[0] / 300 == pytest.approx(expected, rel=1e-12)


def test_calibration_intervals_and_empty_groups():
    parts = [calibrate(*make_site(seed), n_groups=4) for seed in range(3)]
    found = ev.calibration(parts)
    observed = found.observed
    assert np.isnan([found.predicted[3], observed.value[3], observed.low[3]]).all()
    assert (observed.low[:3] < observed.value[:3]).all()
    assert (observed.value[:3] < observed.high[:3]).all()
    assert reduce(add, parts).n_events.sum() == sum(
        np.sum(e & (t <= 400)) for _, e, t in map(make_site, range(3))
    )


def test_calibration_of_a_group_without_events_has_an_upper_bound():
    sums = ev.calibration_sums(
        np.full(20, 0.9), np.zeros(20, dtype=bool), np.full(20, 500.0), np.zeros(20),
        horizon=400.0, censoring=ev.censoring_curve([False], [500.0]), n_groups=1,
    )  # fmt: skip
    observed = ev.calibration(sums).observed
    assert (observed.value[0], observed.low[0]) == (0.0, 0.0)
    assert observed.high[0] == pytest.approx(1 - 0.025 ** (1 / 20))


def test_calibration_skips_a_site_that_is_not_followed_to_the_horizon():
    x, event, time = make_site(0)
    assert not calibrate(x, event & (time < 300), np.minimum(time, 300)).to_vector().any()


@pytest.mark.slow
def test_calibration_intervals_cover_the_true_risk():
    truth = 1 - np.exp(-400 / 600)
    covered = []
    for seed in range(600):
        _, event, time = make_site(seed, n=100, strength=0.0)
        sums = ev.calibration_sums(
            np.full(100, 0.5), event, time, np.zeros(100), horizon=400.0,
            censoring=ev.censoring_curve(event, time), n_groups=1,
        )  # fmt: skip
        observed = ev.calibration(sums).observed
        covered.append(observed.low[0] <= truth <= observed.high[0])
    assert 0.93 <= np.mean(covered) <= 0.99


def test_observed_over_expected():
    sums = ev.observed_expected([0.5, 1.5, 2.0], [True, False, True])
    assert sums == ev.ObservedExpected(2.0, 4.0, 3.0)
    ratio = ev.observed_expected_ratio([sums, sums])
    assert ratio.value == 0.5
    # exact Poisson limits of 4 events: 1.0899 and 10.2416
    assert (ratio.low * 8, ratio.high * 8) == pytest.approx((1.0899, 10.2416), abs=1e-4)


def test_no_observed_event_still_has_an_upper_bound():
    ratio = ev.observed_expected_ratio(ev.observed_expected([1.0], [False]))
    assert (ratio.value, ratio.low) == (0.0, 0.0)
    assert ratio.high == pytest.approx(-np.log(0.025))
    with pytest.raises(ValueError, match=r"^expected: found 0"):
        ev.observed_expected_ratio(ev.observed_expected([0.0], [False]))


X, EVENT, TIME = make_site(0, n=5)
CURVE = ev.censoring_curve(EVENT, TIME)
BAD = {
    "not a number": lambda a: np.where(np.arange(len(a)) == 1, np.nan, a),
    "too short": lambda a: a[:-1],
    "two columns": lambda a: np.stack([a, a]),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize(
    ("name", "statistic", "sites"),
    [
        ("log_hazard", lambda a: ev.pair_counts(a, EVENT, TIME), X),
        ("time", lambda a: ev.pair_counts(X, EVENT, a), TIME),
        ("log_hazard", lambda a: ev.uno_pair_counts(a, EVENT, TIME, CURVE, 10.0), X),
        ("log_hazard_b", lambda a: ev.pair_cross(X, a, EVENT, TIME), X),
        ("time", lambda a: ev.auc_pair_counts(X, EVENT, a, CURVE, 10.0), TIME),
        ("time", lambda a: ev.censoring_curve(EVENT, a), TIME),
        ("group", lambda a: ev.life_table(EVENT, TIME, a, [0, 9], 1), np.zeros(5)),
        ("cumulative_hazard", lambda a: ev.observed_expected(a, EVENT), TIME),
        ("time", lambda a: ev.null_brier_sums(EVENT, a, [9.0], CURVE), TIME),
        ("survival", lambda a: ev.brier_sums(a.T[:, None], EVENT, TIME, [9.0], CURVE), X * 0),
    ],
)
def test_bad_rows_are_named(name, statistic, sites, fault):
    with pytest.raises(ValueError, match=rf"^{name}: found"):
        statistic(BAD[fault](sites.astype(float)))


@pytest.mark.parametrize("event", [[1.0, np.nan], [0, 2], ["a", "b"], [[True], [False]]])
def test_bad_events_are_named(event):
    with pytest.raises(ValueError, match=r"^event: found"):
        ev.pair_counts([0.0, 1.0], event, [1.0, 2.0])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("time", lambda: ev.censoring_curve([True], [-1.0])),
        ("tau", lambda: ev.uno_pair_counts(X, EVENT, TIME, CURVE, 0.0)),
        ("tau", lambda: ev.uno_pair_counts(X, EVENT, TIME, CURVE, np.nan)),
        ("horizon", lambda: ev.auc_pair_counts(X, EVENT, TIME, CURVE, np.inf)),
        ("horizon", lambda: calibrate(X, EVENT, TIME, horizon=np.nan)),
        ("survival", lambda: brier(np.full((5, 5), 1.1), EVENT, TIME)),
        ("times", lambda: brier(np.ones((5, 2)), EVENT, TIME, [2.0, 1.0])),
        ("times", lambda: brier(np.ones((5, 0)), EVENT, TIME, [])),
        ("edges", lambda: ev.life_table(EVENT, TIME, np.zeros(5), [1e6, 2e6], 1)),
        ("edges", lambda: ev.life_table(EVENT, TIME, np.zeros(5), [0, np.nan], 1)),
        ("group", lambda: ev.life_table(EVENT, TIME, np.ones(5), [0, 9], 1)),
        ("group", lambda: ev.life_table(EVENT, TIME, np.full(5, 0.5), [0, 9], 1)),
        ("cumulative_hazard", lambda: ev.observed_expected([-1.0], [True])),
        ("counts", lambda: ev.hide_small_cells([-1.0], 5)),
        ("counts", lambda: ev.visible_sites({"a": -1}, min_events=10)),
        ("minimum", lambda: ev.visible_sites({"a": 1}, min_events=0)),
    ],
)
def test_values_out_of_range_are_named(name, call):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call()


def test_an_event_without_weight_starts_no_pair():
    # the curve is zero at day 9, when the last two leave
    event, time = np.array([True, True, False]), np.array([3.0, 9.0, 9.0])
    x = np.array([3.0, 2.0, 1.0])
    assert uno(x, event, time, tau=100.0) == uno(x, event, time, tau=9.0)
    assert uno(x, event, time, tau=100.0).n_events == 1.0


def test_the_curve_of_another_site_is_refused_where_it_has_ended():
    curve = ev.censoring_curve([False], [50.0])
    with pytest.raises(ValueError, match=r"^censoring: found probability zero"):
        ev.auc_pair_counts([1.0, 0.0], [True, False], [60.0, 90.0], curve, 70.0)


def test_single_patients_and_empty_sites_have_sums():
    for n in (0, 1):
        x, event, time = np.zeros(n), np.ones(n, dtype=bool), np.full(n, 5000.0)
        for statistic in SITE_STATISTICS.values():
            assert np.isfinite(statistic(x, event, time).to_vector()).all()


@pytest.mark.parametrize(
    ("n_events", "shown", "total_shown"),
    [
        ({}, "", False),
        ({"a": 50, "b": 60}, "ab", True),
        ({"a": 4, "b": 50, "c": 60}, "c", True),  # b hides a
        ({"a": 4, "b": 50}, "b", False),  # no other to hide a
        ({"a": 4, "b": 7, "c": 60}, "c", True),
        ({"a": 4, "b": 5, "c": 60, "d": 70}, "d", True),  # 9 events would follow by subtraction
        ({"a": 4, "b": 5, "c": 60}, "c", False),
        ({"a": 0, "b": 50, "c": 60, "d": 70}, "d", True),  # total - c - d would be b's alone
        ({"a": 4, "b": 9}, "", True),
        ({"a": 4, "b": 5}, "", False),
        ({"a": 0, "b": 9}, "", False),
        ({"a": 9}, "", False),
        ({"a": 10}, "a", True),
    ],
)
def test_visible_sites(n_events, shown, total_shown):
    assert ev.visible_sites(n_events, min_events=10) == (frozenset(shown), total_shown)


@given(
    st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.integers(0, 60), max_size=8),
    st.integers(1, 25),
)
@settings(max_examples=300)
def test_no_hidden_figure_follows_from_the_shown_ones(n_events, minimum):
    shown, total_shown = ev.visible_sites(n_events, min_events=minimum)
    hidden = {site: n for site, n in n_events.items() if site not in shown}
    assert all(n_events[site] >= minimum for site in shown)
    if total_shown and hidden:
        difference = sum(n_events.values()) - sum(n_events[site] for site in shown)
        assert difference >= minimum
        assert difference not in hidden.values()
    if not total_shown:  # then nothing is hidden beyond the small ones
        assert all(n < minimum for n in hidden.values())


def test_tables_of_sites_by_column():
    counts = np.array([[4, 20, 3], [30, 30, 12], [40, 40, 15], [50, 50, 5]])
    hidden, total_shown = ev.complementary_hidden(counts, 10)
    assert hidden.T.tolist() == [
        [True, True, False, False],
        [False] * 4,
        [True, True, False, True],
    ]
    assert total_shown.tolist() == [True, True, True]
    small = ev.hide_small_cells(counts, 10)
    assert np.isnan(small).sum() == 3
    assert small[1].tolist() == [30.0, 30.0, 12.0]


def test_real_sites_pool_to_pairs_within_site(shared_data):
    path = shared_data / "tcga_brca_clinical" / "train.csv"
    if not path.is_file():
        pytest.skip("TCGA-BRCA clinical table not found in the folder of real data")
    with path.open() as lines:
        table = list(csv.DictReader(lines))
    region = np.array([row["region"] for row in table])
    x, event, time = (
        np.array([float(row[name]) for row in table]) for name in ("age_at_index", "E", "T")
    )
    sites = [(x[s], event[s] == 1, time[s]) for s in (region == name for name in np.unique(region))]
    compared = 0
    for site in sites:
        horizon = float(np.quantile(site[2], 0.7))
        dynamic = auc(*site, horizon)
        if not dynamic.comparable:
            continue  # a small region without an event by the horizon
        compared += 1
        outcome = Surv.from_arrays(site[1], site[2])
        expected = concordance_index_censored(site[1], site[2], site[0])[0]
        found = ev.concordance_index(ev.pair_counts(*site)).value
        assert found == pytest.approx(expected, **EXACT)
        expected = concordance_index_ipcw(outcome, outcome, site[0], tau=horizon)[0]
        found = ev.concordance_index(uno(*site, horizon)).value
        assert found == pytest.approx(expected, **EXACT)
        expected = cumulative_dynamic_auc(outcome, outcome, site[0], [horizon])[1]
        assert ev.concordance_index(dynamic).value == pytest.approx(expected, **EXACT)
    assert compared >= 4
    pooled = ev.concordance_index([ev.pair_counts(*site) for site in sites])
    concordant, comparable = brute_force_pairs(sites)
    assert pooled.value == pytest.approx(concordant / comparable, **EXACT)
    assert 0.5 < pooled.low < pooled.high < 0.9
