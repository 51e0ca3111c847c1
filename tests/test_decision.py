from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter

from fusion import evaluation as ev

THRESHOLDS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
HORIZON = 400.0


def make_site(seed, n=200, *, last=1500.0):
    """Predicted risk at the horizon, event and time of one site, without ties."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    death = rng.exponential(600 * np.exp(-0.8 * x))
    censored = rng.uniform(100, last, n) if np.isfinite(last) else np.inf
    risk = 1 - np.exp(-HORIZON / 600 * np.exp(0.8 * x))
    return risk, death <= censored, np.minimum(death, censored)


def sums_of(risk, event, time, *, thresholds=THRESHOLDS, cell=1, horizon=HORIZON):
    return ev.decision_sums(
        risk, event, time, thresholds=thresholds, horizon=horizon,
        censoring=ev.censoring_curve(event, time), cell=cell,
    )  # fmt: skip


def uncensored(seed, n=200):
    return make_site(seed, n, last=np.inf)


def test_without_censoring_it_is_the_textbook_formula():
    risk, event, time = uncensored(0)
    found = ev.net_benefit(sums_of(risk, event, time), THRESHOLDS)
    dead = time <= HORIZON
    for k, t in enumerate(THRESHOLDS):
        treated = risk >= t
        worth = np.mean(treated & dead) - np.mean(treated & ~dead) * t / (1 - t)
        assert found.model.value[k] == pytest.approx(worth)
        everybody = dead.mean() - (1 - dead.mean()) * t / (1 - t)
        assert found.treat_all.value[k] == pytest.approx(everybody)
        assert found.gain.value[k] == pytest.approx(worth - everybody)
        of_each = treated * np.where(dead, 1.0, -t / (1 - t))
        error = of_each.std() / np.sqrt(len(risk))
        assert found.model.standard_error[k] == pytest.approx(error)
        gains = (treated - 1.0) * np.where(dead, 1.0, -t / (1 - t))
        assert found.gain.standard_error[k] == pytest.approx(gains.std() / np.sqrt(len(risk)))
        assert found.model.high[k] - worth == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.n_patients.tolist() == [200.0] * 6


def test_with_censoring_the_weights_are_those_of_lifelines():
    sites = [make_site(seed) for seed in range(3)]
    true, false, total = np.zeros(6), np.zeros(6), 0.0
    for risk, event, time in sites:
        fitted = KaplanMeierFitter().fit(time, ~event)
        dead, alive = event & (time <= HORIZON), time > HORIZON
        weight = np.zeros(len(time))
        weight[dead] = 1 / fitted.predict(time[dead]).to_numpy()
        weight[alive] = 1 / fitted.predict(HORIZON)
        treated = risk >= THRESHOLDS[:, None]
        true += treated @ (weight * dead)
        false += treated @ (weight * alive)
        total += weight.sum()
        assert weight.sum() == pytest.approx(len(time))  # nobody is lost to the weights
    found = ev.net_benefit([sums_of(*site) for site in sites], THRESHOLDS)
    expected = (true - false * THRESHOLDS / (1 - THRESHOLDS)) / total
    np.testing.assert_allclose(found.model.value, expected, rtol=1e-10)


def test_treating_everybody_is_worth_the_kaplan_meier_risk():
    risk, event, time = make_site(1)
    found = ev.net_benefit(sums_of(risk, event, time), THRESHOLDS)
    dying = 1 - KaplanMeierFitter().fit(time, event).predict(HORIZON)
    expected = dying - (1 - dying) * THRESHOLDS / (1 - THRESHOLDS)
    np.testing.assert_allclose(found.treat_all.value, expected, rtol=1e-10)


def test_below_the_lowest_risk_nothing_is_released():
    risk, event, time = make_site(1)
    assert not sums_of(np.maximum(risk, 0.2), event, time, thresholds=[0.2]).n_patients.any()


def bands(risk, event, time, kept, also_cut=()):
    """Patients, events and survivors between consecutive cuts."""
    edges = np.concatenate([[-np.inf], np.sort([*kept, *also_cut]), [np.inf]])
    place = np.searchsorted(edges, risk, side="right") - 1
    who = (np.ones_like(event), event & (time <= HORIZON), time > HORIZON)
    return np.array([np.bincount(place[w], minlength=len(edges) - 1) for w in who])


@given(st.integers(0, 10**6), st.integers(20, 300), st.integers(1, 30))
@settings(max_examples=80)
def test_no_difference_of_released_sums_tells_of_a_few(seed, n, cell):
    site = make_site(seed, n)
    thresholds = np.linspace(0.05, 0.95, 19)
    flags = ev.releasable_thresholds(*site, thresholds=thresholds, horizon=HORIZON, cell=cell)
    if flags.any():
        patients, *parts = bands(*site, thresholds[flags])
        assert patients.min() >= cell
        for counts in parts:
            assert ((counts == 0) | (counts >= cell)).all()
    sums = sums_of(*site, thresholds=thresholds, cell=cell)
    assert not sums.to_vector().reshape(9, -1)[:, ~flags].any()
    if ev.censoring_curve(*site[1:]).covers(HORIZON):
        assert (sums.n_patients[flags] == n).all()


def test_thresholds_are_dropped_from_the_left_until_enough_lie_between():
    risk = np.repeat([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65], [20, 4, 4, 4, 20, 20, 3])
    event = np.zeros(len(risk), dtype=bool)
    time = np.full(len(risk), 500.0)
    flags = ev.releasable_thresholds(
        risk, event, time, thresholds=THRESHOLDS, horizon=HORIZON, cell=10
    )
    assert flags.tolist() == [True, False, False, True, True, False]


def test_cuts_of_other_tables_count_as_released():
    risk, event, time = make_site(3, 600)
    options = {"thresholds": THRESHOLDS, "horizon": HORIZON, "cell": 10}
    alone = ev.releasable_thresholds(risk, event, time, **options)
    cuts = [THRESHOLDS[alone][0] + 0.01, 0.8]
    beside = ev.releasable_thresholds(risk, event, time, **options, also_cut=cuts)
    assert not beside[np.argmax(alone)]  # a few patients lie between it and the first cut
    assert beside.any()
    patients, *parts = bands(risk, event, time, THRESHOLDS[beside], cuts)
    assert patients.min() >= 10
    for counts in parts:
        assert ((counts == 0) | (counts >= 10)).all()
    kept = sums_of(risk, event, time, cell=10).only(beside)
    assert (kept.n_patients > 0).tolist() == beside.tolist()


def test_each_threshold_speaks_for_the_sites_that_released_it():
    sites = [make_site(0, 400), make_site(1, 60)]
    parts = [sums_of(*site, cell=10) for site in sites]
    lacking = (parts[0].n_patients > 0) & (parts[1].n_patients == 0)
    assert lacking.any()
    found, alone = ev.net_benefit(parts, THRESHOLDS), ev.net_benefit(parts[0], THRESHOLDS)
    np.testing.assert_array_equal(found.model.value[lacking], alone.model.value[lacking])
    assert found.n_patients[lacking].tolist() == [400.0] * int(lacking.sum())
    np.testing.assert_array_equal(
        found.model.value, ev.net_benefit(reduce(add, parts), THRESHOLDS).model.value
    )


def test_a_threshold_that_nobody_released_has_no_figure():
    found = ev.net_benefit(sums_of(*make_site(0, 15), cell=10), THRESHOLDS)
    for estimates in (found.model, found.treat_all, found.gain):
        assert np.isnan(estimates.value).all()
        assert np.isnan(estimates.low).all()
    assert not found.n_patients.any()


def test_a_site_that_is_not_followed_to_the_horizon_adds_nothing():
    site = make_site(0, last=300.0)
    assert not sums_of(*site).to_vector().any()


def test_no_thresholds_are_no_sums():
    sums = sums_of(*make_site(0), thresholds=[])
    assert sums.to_vector().size == 0
    assert ev.net_benefit(sums, []).n_patients.size == 0


def test_sums_survive_the_journey():
    sums = sums_of(*make_site(0))
    there = ev.DecisionSums.from_vector(sums.to_vector(), n_thresholds=6)
    assert there.true_positives.tolist() == sums.true_positives.tolist()
    assert there.to_vector().tolist() == sums.to_vector().tolist()


def test_interval_covers_the_true_net_benefit():
    truth = ev.net_benefit(sums_of(*uncensored(10**6, 200_000), thresholds=[0.4]), [0.4])
    found = [
        ev.net_benefit(sums_of(*make_site(seed, 150), thresholds=[0.4]), [0.4])
        for seed in range(300)
    ]
    for name in ("model", "treat_all", "gain"):
        true = getattr(truth, name).value[0]
        figures = [getattr(one, name) for one in found]
        covered = [f.low[0] <= true <= f.high[0] for f in figures]
        assert 0.91 <= np.mean(covered) <= 0.995


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("thresholds", {"thresholds": [0.5, 0.2]}),
        ("thresholds", {"thresholds": [0.0, 0.2]}),
        ("thresholds", {"thresholds": [0.2, 1.0]}),
        ("thresholds", {"thresholds": [np.nan]}),
        ("thresholds", {"thresholds": 0.3}),
        ("horizon", {"horizon": 0.0}),
    ],
)
def test_bad_options_are_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        sums_of(*make_site(0), **options)


def test_bad_rows_are_named():
    risk, event, time = make_site(0)
    for bad in (risk + 1, np.where(risk > 0.5, np.nan, risk), risk[1:]):
        with pytest.raises(ValueError, match=r"^risk: found"):
            sums_of(bad, event, time)
    with pytest.raises(ValueError, match=r"^thresholds: found 1, needed 6"):
        ev.net_benefit(sums_of(risk, event, time), [0.3])
    with pytest.raises(ValueError, match=r"^shown: found 2 flags, needed 6"):
        sums_of(risk, event, time).only([True, False])
    with pytest.raises(ValueError, match=r"^also_cut: found"):
        ev.releasable_thresholds(
            risk, event, time, thresholds=[0.3], horizon=HORIZON, cell=1, also_cut=[2.0]
        )
