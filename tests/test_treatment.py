from __future__ import annotations

from functools import reduce
from itertools import pairwise
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from scipy.stats import chi2

from fusion import evaluation as ev
from fusion.survival import cox_sums

EDGES = np.array([0.0, 200.0, 500.0, 1000.0])


def make_site(seed, n=1500, *, effect=-0.5, n_levels=2, day=0.0):
    """Event, time, risk group and treatment; treatment is given more often to the worse group."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 2, n)
    treatment = (rng.random(n) < 0.3 + 0.3 * group).astype(int)
    if n_levels == 3:
        treatment += treatment * rng.integers(0, 2, n)
    death = rng.exponential(800 * np.exp(-0.9 * group - effect * treatment))
    time = np.minimum(death, rng.uniform(100, 2500, n))
    return death <= time, np.ceil(time / day) * day if day else time, group, treatment


def sums_of(site, *, edges=EDGES, shape=(2, 2), cell=10):
    return ev.treatment_sums(*site, edges, shape=shape, cell=cell)


def released(sums):
    """(n_groups,) whether anything of the risk group is told."""
    return sums.patients.any(axis=(1, 2)) | sums.counts.any(axis=(1, 2, 3))


@pytest.mark.parametrize("day", [0.0, 30.0])
@pytest.mark.parametrize("group", [0, 1])
def test_the_test_is_the_log_rank_test_of_the_rows(group, day):
    site = make_site(0, 300, day=day)
    found = ev.treatment_comparison(sums_of(site))[group]
    event, time, _, treatment = (column[site[2] == group] for column in site)
    one, two = treatment == 0, treatment == 1
    within = event & (time <= EDGES[-1])
    expected = logrank_test(
        np.minimum(time[one], EDGES[-1]), np.minimum(time[two], EDGES[-1]), within[one], within[two]
    )
    assert found.log_rank.statistic == pytest.approx(expected.test_statistic, rel=1e-9)
    assert found.log_rank.p_value == pytest.approx(expected.p_value, rel=1e-6)
    assert found.n_patients.tolist() == [one.sum(), two.sum()]
    assert found.n_events.tolist() == [within[one].sum(), within[two].sum()]


def test_survival_is_close_to_kaplan_meier():
    site = make_site(0, 4000)
    for group, found in enumerate(ev.treatment_comparison(sums_of(site))):
        for k in range(2):
            own = (site[2] == group) & (site[3] == k)
            curve = KaplanMeierFitter().fit(site[1][own], site[0][own]).predict(EDGES[1:])
            np.testing.assert_allclose(found.survival.value[k], curve, atol=0.02)


@pytest.mark.parametrize("n_levels", [2, 3])
def test_hazard_ratios_are_the_first_step_of_a_cox_model(n_levels):
    """Stratified by site, from no effect."""
    sites = [make_site(seed, 600, n_levels=n_levels) for seed in range(3)]
    parts = [sums_of(site, edges=[0.0, 9999.0], shape=(2, n_levels), cell=1) for site in sites]
    found = ev.treatment_comparison(parts)
    for group in (0, 1):
        sums = reduce(
            add,
            [
                cox_sums(
                    np.eye(n_levels)[treatment[g == group]][:, 1:],
                    event[g == group], time[g == group], np.zeros(n_levels - 1),
                )
                for event, time, g, treatment in sites
            ],
        )  # fmt: skip
        step = np.linalg.solve(sums.information, sums.gradient)
        error = np.sqrt(np.diagonal(np.linalg.inv(sums.information)))
        ratios = found[group].hazard_ratio
        np.testing.assert_allclose(ratios.value[1:], np.exp(step), rtol=1e-9)
        np.testing.assert_allclose(ratios.high[1:], np.exp(step + 1.959964 * error), rtol=1e-6)
        np.testing.assert_allclose(ratios.low[1:], np.exp(step - 1.959964 * error), rtol=1e-6)
        np.testing.assert_allclose(ratios.standard_error[1:], np.exp(step) * error)
        assert (ratios.value[0], ratios.low[0], ratios.high[0]) == (1.0, 1.0, 1.0)
        statistic = sums.gradient @ step
        assert found[group].log_rank.statistic == pytest.approx(statistic)
        p_value = chi2.sf(found[group].log_rank.statistic, n_levels - 1)
        assert found[group].log_rank.p_value == pytest.approx(p_value)


def test_two_treatments_are_compared_by_petos_formula():
    sums = sums_of(make_site(1, 4000))
    for group, found in enumerate(ev.treatment_comparison(sums)):
        excess, variance = sums.observed_minus_expected[group, 1], sums.variance[group, 1, 1]
        assert found.hazard_ratio.value[1] == pytest.approx(np.exp(excess / variance))
        assert found.log_rank.statistic == pytest.approx(excess**2 / variance)


def test_the_effect_is_recovered():
    sites = [make_site(seed, 4000, effect=-0.3) for seed in range(3)]
    for found in ev.treatment_comparison([sums_of(site) for site in sites]):
        ratio = found.hazard_ratio
        assert ratio.low[1] < np.exp(-0.3) < ratio.high[1]
        assert ratio.high[1] < 1.0


def test_sites_are_strata():
    """Sites that differ in level and in use of the treatment show no effect of it."""
    rng = np.random.default_rng(0)
    parts = []
    for scale, share in ((2000.0, 0.7), (400.0, 0.2)):
        death = rng.exponential(scale, 3000)
        treatment = (rng.random(3000) < share).astype(int)
        parts.append(sums_of((death < 3000, death, np.zeros(3000), treatment), shape=(1, 2)))
    (found,) = ev.treatment_comparison(parts)
    assert found.log_rank.p_value > 0.01
    rows = ev.LifeTable(parts[0].counts[0] + parts[1].counts[0])
    assert ev.log_rank_test(ev.log_rank_sums(rows)).p_value < 1e-6


def counted(site, shape=(2, 2), edges=EDGES):
    """Every count of the tables, those of unknown treatment first, and those beyond the grid."""
    event, time, group, treatment = site
    found = []
    for g in range(shape[0]):
        of_group = []
        for level in range(-1, shape[1]):
            own = (group == g) & (treatment == level)
            for low, high in pairwise(edges):
                within = own & (time <= high) & ((time > low) | (low == 0))
                at_risk = own & ((time > low) | (low == 0))
                of_group += [at_risk.sum(), (within & event).sum(), (within & ~event).sum()]
            of_group.append((own & (time > edges[-1])).sum())
        found.append(of_group)
    return np.array(found)


def totalled(site):
    """Patients, events within the grid and others, (2, 3, 3), those of unknown treatment first."""
    event, time, group, treatment = site
    seen = event & (time <= EDGES[-1])
    return np.array(
        [
            [[own.sum(), (own & seen).sum(), (own & ~seen).sum()] for own in of_group]
            for of_group in ([(group == g) & (treatment == k) for k in (-1, 0, 1)] for g in (0, 1))
        ]
    )


def is_small(counts, cell):
    return bool(((counts > 0) & (counts < cell)).any())


@given(st.integers(0, 10**6), st.integers(0, 500), st.integers(1, 12), st.floats(0, 0.3))
@settings(max_examples=60)
def test_tables_and_sums_with_a_small_cell_are_hidden(seed, n, cell, unknown):
    event, time, group, treatment = make_site(seed, n)
    treatment[np.random.default_rng(seed).random(n) < unknown] = -1
    site = event, time, group, treatment
    sums, counts = sums_of(site, cell=cell), counted(site)
    totals = totalled(site)
    for g in range(2):
        if is_small(counts[g], cell):
            assert not sums.counts[g].any()
        else:
            known = counts[g].reshape(3, 10)[1:, :9].reshape(2, 3, 3)
            np.testing.assert_array_equal(sums.counts[g], known)
        if is_small(totals[g], cell):
            assert not released(sums)[g]
            assert not sums.variance[g].any()
        else:
            np.testing.assert_array_equal(sums.patients[g], totals[g, 1:, :2])


def test_a_few_of_unknown_treatment_hide_their_risk_group():
    event, time, group, treatment = make_site(2, 4000)
    assert released(sums_of((event, time, group, treatment))).all()
    treatment[np.flatnonzero(group == 1)[:3]] = -1
    assert released(sums_of((event, time, group, treatment))).tolist() == [True, False]


def test_what_nobody_released_has_no_figure():
    parts = [sums_of(make_site(seed, 30)) for seed in range(2)]
    for found in ev.treatment_comparison(parts):
        assert found.survival is found.log_rank is found.hazard_ratio is None
        assert not found.n_patients.any()


def test_sites_too_small_for_a_table_still_compare():
    parts = [sums_of(make_site(seed, 300)) for seed in range(2)]
    for found in ev.treatment_comparison(parts):
        assert found.survival is None
        assert found.log_rank.p_value < 0.5
        assert np.isfinite(found.hazard_ratio.value).all()


def test_a_treatment_that_nobody_had_has_no_ratio():
    event, time, group, treatment = make_site(3, 4000)
    sums = sums_of((event, time, group, treatment * 2), shape=(2, 3))
    two = sums_of((event, time, group, treatment))
    for found, other in zip(
        ev.treatment_comparison(sums), ev.treatment_comparison(two), strict=True
    ):
        assert np.isnan(found.hazard_ratio.value).tolist() == [False, True, False]
        assert found.hazard_ratio.value[2] == pytest.approx(other.hazard_ratio.value[1])
        assert found.log_rank.degrees_of_freedom == 1
        assert np.isnan(found.survival.value[1]).all()


def test_without_the_reference_there_is_no_ratio():
    event, time, group, treatment = make_site(3, 4000)
    sums = sums_of((event, time, group, treatment + 1), shape=(2, 3))
    for found in ev.treatment_comparison(sums):
        assert np.isnan(found.hazard_ratio.value).all()
        assert found.log_rank.degrees_of_freedom == 1


def test_a_single_treatment_has_a_curve_and_no_test():
    event, time, group, treatment = make_site(4)
    for found in ev.treatment_comparison(sums_of((event, time, group, 0 * treatment))):
        assert found.log_rank is None
        assert np.isfinite(found.survival.value[0]).all()
        assert np.isnan(found.hazard_ratio.value).all()


def test_sums_add_up_and_survive_the_journey():
    sums = sums_of(make_site(0))
    vector = sums.to_vector()
    assert vector.shape == (2 * 2 * (3 * 3 + 3 + 2),)
    there = ev.TreatmentSums.from_vector(vector, n_groups=2, n_levels=2, n_intervals=3)
    np.testing.assert_array_equal(there.counts, sums.counts)
    np.testing.assert_array_equal(there.patients, sums.patients)
    np.testing.assert_array_equal(there.variance, sums.variance)
    twice = ev.treatment_comparison([sums, sums])[0]
    assert twice.n_patients.tolist() == (2 * ev.treatment_comparison(sums)[0].n_patients).tolist()
    with pytest.raises(ValueError, match=r"^vector: found shape"):
        ev.TreatmentSums.from_vector(vector, n_groups=2, n_levels=3, n_intervals=3)


@pytest.mark.parametrize(
    ("place", "name", "bad"),
    [(0, "event", 2.0), (1, "time", np.nan), (2, "group", -1.0), (3, "treatment", 2.0),
     (3, "treatment", -2.0)],
)  # fmt: skip
def test_bad_rows_are_named(place, name, bad):
    site = [*make_site(0)]
    site[place] = np.where(np.arange(1500) == 7, bad, site[place])
    with pytest.raises(ValueError, match=rf"^{name}: found"):
        sums_of(site)
