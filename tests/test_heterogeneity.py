from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from scipy.stats import chi2
from statsmodels.stats.meta_analysis import combine_effects

from fusion import evaluation as ev
from fusion.newton import LikelihoodSums
from fusion.survival import cox_sums, fit_cox

BETA = np.array([0.6, -0.3])


def make_site(seed, n=400, *, beta=BETA):
    """Inputs (n, p), event and time without ties."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, len(beta)))
    death = rng.exponential(600 * np.exp(-inputs @ np.asarray(beta)))
    censored = rng.uniform(50, 1500, n)
    return inputs, death <= censored, np.minimum(death, censored)


def common_fit(sites, ridge=0.0):
    columns = [np.concatenate(part) for part in zip(*sites, strict=True)]
    strata = np.repeat(np.arange(len(sites)), [len(site[1]) for site in sites])
    return fit_cox(*columns, strata=strata, ridge=ridge).candidate


def compare(sites, ridge=0.0, **options):
    beta = common_fit(sites, ridge)
    return ev.heterogeneity(beta, [cox_sums(*site, beta) for site in sites], **options)


def scalar_site(estimate, variance=1.0, n_events=50):
    """Sums at coefficient 0 of a site whose step leads to the estimate."""
    gradient, information = np.array([estimate / variance]), np.array([[1.0 / variance]])
    return LikelihoodSums(-1.0, gradient, information, 100, n_events)


def exact_fits(sites):
    """Each site's own coefficients and variances by lifelines, (n_sites, p) each."""
    fits = []
    for inputs, event, time in sites:
        rows = pd.DataFrame(inputs).assign(event=event, time=time)
        fit = CoxPHFitter().fit(
            rows, "time", "event", fit_options={"precision": 1e-10, "step_size": 1.0}
        )
        fits.append((fit.params_, np.diagonal(fit.variance_matrix_)))
    return np.array(fits).swapaxes(0, 1)


def test_one_steps_lead_to_the_sites_own_fits():
    sites = [make_site(seed, beta=(0.4 + 0.1 * seed, -0.3)) for seed in range(4)]
    found = compare(sites)
    estimates, variances = exact_fits(sites)
    np.testing.assert_allclose(found.estimates, estimates, atol=0.02)
    np.testing.assert_allclose(found.standard_errors, np.sqrt(variances), rtol=0.05)


def test_figures_are_those_of_a_meta_analysis():
    sites = [make_site(seed, beta=(0.3 + 0.2 * seed, -0.3)) for seed in range(5)]
    found = compare(sites)
    for j in range(2):
        # statsmodels: DerSimonian and Laird
        reference = combine_effects(
            found.estimates[:, j], found.standard_errors[:, j] ** 2, method_re="chi2"
        )
        assert found.statistic[j] == pytest.approx(reference.q, rel=1e-10)
        assert found.tau_squared[j] == pytest.approx(max(reference.tau2, 0.0), abs=1e-12)
        assert found.i_squared[j] == pytest.approx(max(reference.i2, 0.0), abs=1e-12)
        assert found.p_value[j] == pytest.approx(chi2.sf(reference.q, 4), rel=1e-9)
    assert found.degrees_of_freedom.tolist() == [4.0, 4.0]
    assert found.i_squared[0] > 0.5


def test_figures_are_close_to_a_meta_analysis_of_the_sites_own_fits():
    sites = [make_site(seed, beta=(0.3 + 0.1 * seed, -0.3)) for seed in range(5)]
    found = compare(sites)
    for j, (estimates, variances) in enumerate(
        zip(*exact_fits(sites).transpose(0, 2, 1), strict=True)
    ):
        reference = combine_effects(estimates, variances, method_re="chi2")
        assert found.statistic[j] == pytest.approx(reference.q, rel=0.1, abs=0.1)


@pytest.mark.parametrize(
    ("n_sites", "q", "figures"),
    [(135, 179.9, (26, 7, 40)), (33, 39.5, (19, 0, 48)), (55, 55.9, (3, 0, 28))],
)
def test_published_intervals_of_i_squared(n_sites, q, figures):
    # Higgins et al., BMJ 327 (2003) 557-560, in percent
    estimates = np.linspace(-1.0, 1.0, n_sites)
    estimates *= np.sqrt(q / (estimates @ estimates))
    found = ev.heterogeneity([0.0], [scalar_site(x) for x in estimates])
    assert found.statistic[0] == pytest.approx(q)
    percent = [found.i_squared[0], found.i_squared_low[0], found.i_squared_high[0]]
    assert np.round(np.multiply(percent, 100)).tolist() == pytest.approx(figures, abs=0.5)


def test_equal_sites_differ_by_nothing():
    site = make_site(0)
    found = compare([site, site, site])
    np.testing.assert_allclose(found.statistic, 0.0, atol=1e-12)
    np.testing.assert_allclose(found.p_value, 1.0)
    assert found.i_squared.tolist() == found.tau_squared.tolist() == [0.0, 0.0]
    assert found.test.statistic == pytest.approx(0.0, abs=1e-9)
    assert found.test.p_value == pytest.approx(1.0)


def test_joint_test_is_the_interaction_with_the_site():
    """The score test of inputs times site, all rows together."""
    sites = [make_site(seed, beta=(0.4 + 0.2 * seed, -0.3)) for seed in range(3)]
    beta = common_fit(sites)
    rows = [np.zeros((400, 3, 2)) for _ in sites]
    for k, (inputs, _, _) in enumerate(sites):
        rows[k][:, k] = inputs
    event, time = (np.concatenate([site[c] for site in sites]) for c in (1, 2))
    sums = cox_sums(
        np.concatenate(rows).reshape(-1, 6), event, time, np.tile(beta, 3),
        strata=np.repeat(range(3), 400),
    )  # fmt: skip
    expected = sums.gradient @ np.linalg.solve(sums.information, sums.gradient)
    found = ev.heterogeneity(beta, [cox_sums(*site, beta) for site in sites]).test
    assert found.statistic == pytest.approx(expected, rel=1e-9)
    assert found.degrees_of_freedom == 4
    assert found.p_value == pytest.approx(chi2.sf(expected, 4), rel=1e-6)


def test_a_ridge_is_no_difference_between_sites():
    sites = [make_site(seed, n=1500) for seed in range(3)]
    plain, ridged = compare(sites), compare(sites, ridge=0.05)
    np.testing.assert_allclose(ridged.statistic, plain.statistic, rtol=0.15, atol=0.1)
    assert ridged.test.statistic == pytest.approx(plain.test.statistic, rel=0.15)
    beta = common_fit(sites, 0.05)
    sums = [cox_sums(*site, beta) for site in sites]
    uncentred = sum(s.gradient @ np.linalg.solve(s.information, s.gradient) for s in sums)
    assert uncentred > 4 * ridged.test.statistic  # the ridge moves every site's gradient


def without(site, column):
    inputs = site[0].copy()
    inputs[:, column] = 0.0
    return inputs, *site[1:]


def test_a_site_without_the_modality_says_nothing_about_it():
    sites = [make_site(seed) for seed in range(4)]
    lacking = [without(sites[0], 1), *sites[1:]]
    found = compare(lacking)
    assert np.isnan(found.estimates[0, 1])
    assert np.isnan(found.standard_errors[0, 1])
    assert np.isfinite(found.estimates[0, 0])
    assert found.degrees_of_freedom.tolist() == [3.0, 2.0]
    assert found.test.degrees_of_freedom == 3 + 2
    beta = common_fit(lacking)
    others = ev.heterogeneity(beta, [cox_sums(*site, beta) for site in sites[1:]])
    assert found.statistic[1] == pytest.approx(others.statistic[1])
    assert found.tau_squared[1] == pytest.approx(others.tau_squared[1])


def test_an_indicator_that_is_one_for_all_is_no_information():
    sites = [make_site(seed) for seed in range(3)]
    inputs = sites[0][0].copy()
    inputs[:, 1] = 1.0
    found = compare([(inputs, *sites[0][1:]), *sites[1:]])
    assert np.isnan(found.estimates[0, 1])
    assert found.degrees_of_freedom.tolist() == [2.0, 1.0]


def test_inputs_that_a_site_cannot_tell_apart_have_no_estimate():
    sites = [make_site(seed, beta=(0.5, -0.3, 0.2)) for seed in range(3)]
    inputs = sites[0][0].copy()
    inputs[:, 2] = inputs[:, 1]
    found = compare([(inputs, *sites[0][1:]), *sites[1:]])
    assert np.isnan(found.estimates[0]).tolist() == [False, True, True]
    assert found.degrees_of_freedom.tolist() == [2.0, 1.0, 1.0]
    assert found.test.degrees_of_freedom == 2 + 3 + 3 - 3


def with_own_constant(site):
    """Sums of a Poisson regression at coefficients (log rate, *BETA), and the exact own optimum."""
    inputs, event, time = site
    rows = np.column_stack([np.ones(len(event)), inputs])

    def at(beta):
        rate = np.exp(rows @ beta) * time / 600
        gradient, information = rows.T @ (event - rate), (rows.T * rate) @ rows
        return LikelihoodSums(0.0, gradient, information, len(event), int(event.sum()))

    beta = np.append(0.0, BETA)
    for _ in range(30):
        sums = at(beta)
        beta = beta + np.linalg.solve(sums.information, sums.gradient)
    return at, beta, np.linalg.inv(sums.information)


def test_first_coefficients_are_each_sites_own():
    parts = [with_own_constant(make_site(seed)) for seed in range(4)]
    start = np.array([0.1, 0.55, -0.35])
    sums = [at(start) for at, _, _ in parts]
    found = ev.heterogeneity(start, sums, first=1)
    assert found.estimates.shape == (4, 2)
    np.testing.assert_allclose(found.estimates, [own[1:] for _, own, _ in parts], atol=0.05)
    errors = [np.sqrt(np.diagonal(covariance)[1:]) for *_, covariance in parts]
    np.testing.assert_allclose(found.standard_errors, errors, rtol=0.15)
    # the same as comparing all coefficients, as far as one site's estimate goes
    whole = ev.heterogeneity(start, sums)
    np.testing.assert_allclose(found.estimates, whole.estimates[:, 1:])
    np.testing.assert_allclose(found.statistic, whole.statistic[1:])
    assert found.test.degrees_of_freedom == 6
    assert whole.test.degrees_of_freedom == 9
    # a site whose constant differs does not differ in what is compared
    inputs, event, time = make_site(3)
    moved = [*sums[:3], with_own_constant((inputs, event, 1.5 * time))[0](start)]
    assert ev.heterogeneity(start, moved, first=1).test.p_value > 0.05
    assert ev.heterogeneity(start, moved).test.p_value < 0.01


def test_columns_name_what_a_site_informs():
    sites = [make_site(seed) for seed in range(3)]
    found = compare(sites, columns=[(0, 1), (0,), (0, 1)])
    assert np.isnan(found.estimates).tolist() == [[False] * 2, [False, True], [False] * 2]
    assert found.degrees_of_freedom.tolist() == [2.0, 1.0]
    with pytest.raises(ValueError, match=r"^columns: found 1, needed 3"):
        compare(sites, columns=[(0,)])


def test_two_sites_that_agree_have_no_interval():
    agree = ev.heterogeneity([0.0], [scalar_site(0.1), scalar_site(-0.1)])
    assert agree.statistic[0] == pytest.approx(0.02)
    assert agree.i_squared.tolist() == [0.0]
    assert np.isnan([agree.i_squared_low[0], agree.i_squared_high[0]]).all()
    differ = ev.heterogeneity([0.0], [scalar_site(2.0), scalar_site(-2.0)])
    assert differ.statistic[0] == pytest.approx(8.0)
    assert differ.i_squared[0] == pytest.approx(7 / 8)
    assert differ.i_squared_low[0] < 7 / 8 < differ.i_squared_high[0]
    assert differ.tau_squared[0] == pytest.approx(7.0)


def test_one_site_has_nothing_to_be_compared_with():
    found = compare([make_site(0)])
    for values in (found.statistic, found.p_value, found.i_squared, found.tau_squared):
        assert np.isnan(values).all()
    assert found.degrees_of_freedom.tolist() == [0.0, 0.0]
    assert np.isfinite(found.estimates).all()
    assert (found.test.degrees_of_freedom, np.isnan(found.test.p_value)) == (0, True)


def test_a_site_without_events_says_nothing():
    sites = [make_site(seed) for seed in range(3)]
    nobody = (sites[2][0], np.zeros(400, dtype=bool), sites[2][2])
    found = compare([*sites[:2], nobody])
    assert np.isnan(found.estimates[2]).all()
    assert found.degrees_of_freedom.tolist() == [1.0, 1.0]
    two = compare(sites[:2])
    np.testing.assert_allclose(found.statistic, two.statistic, rtol=1e-6)


def test_separated_sites_stay_finite():
    inputs, event, time = make_site(0, n=60)
    separated = (-np.column_stack([time, inputs[:, 1]]) / 1000, event, time)
    found = compare([separated, make_site(1)], ridge=0.1)
    assert np.isfinite(found.statistic).all()
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_result_is_written_as_json():
    sites = [make_site(seed) for seed in range(2)]
    found = compare([without(sites[0], 1), sites[1]])
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert read["statistic"] == [pytest.approx(found.statistic[0]), None]
    assert read["estimates"][0] == [pytest.approx(found.estimates[0, 0]), None]
    assert read["test"]["degrees_of_freedom"] == 1


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(0.01, 10)), min_size=2, max_size=12),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_figures_keep_their_ranges_and_do_not_depend_on_the_order(drawn, random):
    found = ev.heterogeneity([0.0], [scalar_site(*site) for site in drawn])
    assert found.statistic[0] >= 0.0
    assert 0.0 <= found.p_value[0] <= 1.0
    assert found.tau_squared[0] >= 0.0
    if len(drawn) > 2:
        assert 0.0 <= found.i_squared_low[0] <= found.i_squared[0] <= found.i_squared_high[0] < 1.0
    random.shuffle(drawn)
    again = ev.heterogeneity([0.0], [scalar_site(*site) for site in drawn])
    assert again.statistic[0] == pytest.approx(found.statistic[0], abs=1e-9)
    # with one coefficient, the joint test is Cochran's Q
    assert found.test.statistic == pytest.approx(found.statistic[0], abs=1e-9)


def simulated_p_values(spread, n_runs, n=150):
    rng = np.random.default_rng(1)
    found = []
    for run in range(n_runs):
        shifts = rng.normal(0.0, spread, (6, 2))
        sites = [make_site(6 * run + k, n=n, beta=BETA + shifts[k]) for k in range(6)]
        result = compare(sites, ridge=0.01)
        found.append([*result.p_value, result.test.p_value])
    return np.array(found)


def test_the_level_is_held_and_differences_are_found():
    level = (simulated_p_values(0.0, 200) < 0.05).mean(axis=0)
    assert (level > 0.005).all()
    assert (level < 0.1).all()
    power = (simulated_p_values(0.4, 40) < 0.05).mean(axis=0)
    assert (power > 0.8).all()


def test_likelihood_ratio_of_exact_fits():
    sites = [make_site(seed, beta=(0.4 + 0.15 * seed, -0.3)) for seed in range(3)]
    beta = common_fit(sites)
    common = [cox_sums(*site, beta) for site in sites]
    own = [cox_sums(*site, common_fit([site])) for site in sites]
    found = ev.likelihood_ratio(own, common)
    logs = [
        CoxPHFitter().fit(pd.DataFrame(x).assign(event=e, time=t), "time", "event").log_likelihood_
        for x, e, t in sites
    ]
    expected = 2 * (sum(logs) - sum(s.log_likelihood for s in common))
    assert found.statistic == pytest.approx(expected, abs=1e-5)
    assert found.degrees_of_freedom == 4
    assert found.p_value == pytest.approx(chi2.sf(expected, 4), rel=1e-4)
    score = ev.heterogeneity(beta, common).test
    assert found.statistic == pytest.approx(score.statistic, rel=0.1)


def test_likelihood_ratio_is_not_moved_by_a_small_ridge():
    sites = [make_site(seed, n=800) for seed in range(3)]

    def ratio(ridge):
        beta = common_fit(sites, ridge)
        own = [cox_sums(*site, common_fit([site], ridge)) for site in sites]
        return ev.likelihood_ratio(own, [cox_sums(*site, beta) for site in sites]).statistic

    assert ratio(0.01) == pytest.approx(ratio(0.0), rel=0.05, abs=0.05)


def test_likelihood_ratio_with_one_site_has_nothing_to_compare():
    sums = cox_sums(*make_site(0), BETA)
    assert np.isnan(ev.likelihood_ratio([sums], [sums]).statistic)


def test_bad_sums_are_named():
    good = cox_sums(*make_site(0), BETA)
    bad = LikelihoodSums(0.0, np.array([np.nan, 0.0]), np.eye(2), 400, 100)
    with pytest.raises(ValueError, match=r"^gradient: found a missing"):
        ev.heterogeneity(BETA, [good, bad])
    with pytest.raises(ValueError, match=r"^gradient: found shape \(2,\), needed \(3,\)"):
        ev.heterogeneity(np.zeros(3), [good])
    with pytest.raises(ValueError, match=r"^sums: found none"):
        ev.heterogeneity(BETA, [])
    with pytest.raises(ValueError, match=r"^sums: found none"):
        ev.likelihood_ratio([], [])
    with pytest.raises(ValueError, match=r"^coefficients: found"):
        ev.heterogeneity([np.inf, 0.0], [good])
    with pytest.raises(ValueError, match=r"^own: found other patients"):
        ev.likelihood_ratio([good], [bad])
