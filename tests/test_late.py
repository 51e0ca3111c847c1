"""The fusion models: their inputs, what they predict, how they are fitted and kept."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_allclose, assert_array_equal

from fusion.discrete import fit_logistic_hazard, survival_from_log_odds
from fusion.late import (
    ESTIMATORS,
    RIDGES,
    CoxFusion,
    CoxModel,
    FusionModel,
    GatedFusion,
    LinearEncoder,
    LogisticHazardFusion,
    LogisticHazardModel,
    baseline_hazard,
    fit_late_fusion,
    fusion_inputs,
    linear_inputs,
    read_model,
    survival_outcome,
)
from fusion.newton import ConvergenceError
from fusion.survival import cox_sums, fit_cox, interval_sums

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FINITE = st.floats(allow_nan=False, allow_infinity=False)
MODALITIES = ("pathology", "radiology", "clinical")
EDGES = (365.0, 1095.0, 2500.0)
KINDS = ("cox", "logistic_hazard", "gated")
SUBSETS = list(chain.from_iterable(combinations(range(3), k) for k in range(4)))


def _columns(n: int = 160, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(n, 3)) * [1.0, 3.0, 0.2] + [0.0, 5.0, -1.0]
    columns[rng.random(columns.shape) < 0.2] = np.nan
    columns[np.isnan(columns).all(axis=1), 1] = 5.0
    columns[0] = np.nan
    columns[1:4] = np.where(np.eye(3, dtype=bool), np.nan, [0.5, 6.0, -0.9])
    return columns


def _outcome(columns: Floats, seed: int = 1) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    died = rng.exponential(900 * np.exp(-np.nan_to_num(columns[:, 0])))
    lost = rng.uniform(200, 2500, len(columns))
    return died <= lost, np.ceil(np.minimum(died, lost))


def _model(kind: str = "cox", seed: int = 0, **change: Any) -> FusionModel:
    columns = _columns(seed=seed)
    options = {"modalities": MODALITIES, "edges_days": EDGES, "ridge": 0.02, **change}
    return fit_late_fusion(columns, *_outcome(columns), model=kind, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> FusionModel:
    return _model(request.param)


def test_an_absent_modality_is_average_and_flagged() -> None:
    mean, scale = np.array([1.0, 10.0]), np.array([2.0, 5.0])
    found = fusion_inputs([[3.0, np.nan], [np.nan, np.nan], [1.0, 0.0]], mean, scale)
    assert_array_equal(found, [[1, 0, 0, 1], [0, 0, 1, 1], [0, -2, 0, 0]])


def test_a_missing_cell_is_average_but_a_missing_row_stays_missing() -> None:
    mean, scale = np.array([1.0, 10.0]), np.array([2.0, 5.0])
    found = linear_inputs([[3.0, np.nan], [np.nan, np.nan]], mean, scale)
    assert_array_equal(found, [[1.0, 0.0], [np.nan, np.nan]])
    encoder = LinearEncoder(
        "clinical", ("age", "stage"), mean, scale, np.array([0.5, 7.0]), cross_fitted=True
    )
    assert_array_equal(encoder.log_hazard([[3.0, np.nan], [np.nan, np.nan]]), [0.5, np.nan])


@settings(max_examples=50, deadline=None)
@given(values=arrays.arrays(np.float64, (3, 4), elements=FINITE), cross_fitted=st.booleans())
def test_an_encoder_is_kept_bit_by_bit(values: Floats, *, cross_fitted: bool) -> None:
    encoder = LinearEncoder("omics", ("a", "b", "c", "d"), *values, cross_fitted=cross_fitted)
    kept = LinearEncoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert (kept.modality, kept.inputs, kept.cross_fitted) == (
        "omics", encoder.inputs, cross_fitted,
    )  # fmt: skip
    for name in ("mean", "scale", "coefficients"):
        assert getattr(kept, name).tobytes() == getattr(encoder, name).tobytes()


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from([CoxModel, LogisticHazardModel]),
    vectors=arrays.arrays(np.float64, (4, 4), elements=FINITE),
    matrix=arrays.arrays(np.float64, (4, 4), elements=FINITE),
)
def test_a_model_is_kept_bit_by_bit(kind: Any, vectors: Floats, matrix: Floats) -> None:
    mean, scale, edges, hazard = vectors
    model = kind(("a", "b"), mean[:2], scale[:2], mean, matrix, edges, hazard)
    kept = read_model(model.to_json())
    assert type(kept) is kind
    assert kept.modalities == model.modalities
    for name in ("mean", "scale", "coefficients", "covariance", "edges_days", "baseline"):
        assert getattr(kept, name).tobytes() == getattr(model, name).tobytes()
        assert getattr(kept, name).shape == getattr(model, name).shape


def test_every_kind_is_read_back_and_predicts_the_same(model: FusionModel) -> None:
    kept, columns = read_model(model.to_json()), _columns(seed=7)
    assert isinstance(kept, FusionModel)
    assert (type(kept), kept.kind) == (type(model), model.kind)
    assert kept.predict(columns).tobytes() == model.predict(columns).tobytes()
    errors = kept.predict_standard_error(columns)
    assert errors.tobytes() == model.predict_standard_error(columns).tobytes()


def test_a_model_written_before_there_were_kinds_is_a_cox_model() -> None:
    values = json.loads(_model().to_json())
    del values["kind"]
    assert isinstance(read_model(json.dumps(values)), CoxModel)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "forest"}, "found kind 'forest', needed one of cox, logistic_hazard, gated"),
        ({"extra": 1}, "found .*extra.*, needed"),
        ({"mean": [0.0]}, r"mean: found shape \(1,\), needed \(3,\)"),
        ({"covariance": [[1.0]]}, r"covariance: found shape \(1, 1\), needed \(6, 6\)"),
        ({"edges_days": [1.0]}, r"baseline: found shape \(3,\), needed \(1,\)"),
        ({"kind": "gated"}, "fusion model gated: found .*, needed .*weights"),
    ],
)
def test_a_model_that_cannot_be_one_is_refused(change: dict[str, object], said: str) -> None:
    values = json.loads(_model().to_json()) | change
    with pytest.raises(ValueError, match=said):
        read_model(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "3", "null"])
def test_text_that_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"found kind None|Expecting value"):
        read_model(text)


def test_predictions_follow_the_formula_patient_by_patient() -> None:
    model, columns = _model(), _columns(seed=7)[1:]
    times = np.array([0.0, 100.0, 365.0, 2000.0, 4000.0])
    log_hazard, errors = model.predict(columns), model.predict_standard_error(columns)
    survival = model.predict_survival_function(columns, times)
    for i, row in enumerate(columns):
        absent = np.isnan(row)
        x = [0.0 if np.isnan(v) else (v - model.mean[j]) / model.scale[j]
             for j, v in enumerate(row)] + [float(v) for v in absent]  # fmt: skip
        assert_allclose(log_hazard[i], np.dot(x, model.coefficients), atol=1e-12)
        variance = sum(x[a] * model.covariance[a, b] * x[b] for a in range(6) for b in range(6))
        variance += sum(
            model.coefficients[j] ** 2 + model.covariance[j, j] for j in np.flatnonzero(absent)
        )
        assert_allclose(errors[i], np.sqrt(variance), rtol=1e-10)
        for k, t in enumerate(times):
            left, cumulative = 0.0, 0.0
            for right, hazard in zip([365.0, 1095.0, np.inf], model.baseline, strict=True):
                cumulative += hazard * max(0.0, min(t, right) - left)
                left = right
            assert_allclose(survival[i, k], np.exp(-np.exp(log_hazard[i]) * cumulative))


def test_contributions_of_a_hand_worked_patient() -> None:
    model = CoxModel(
        modalities=("pathology", "clinical"),
        mean=np.array([1.0, 10.0]),
        scale=np.array([2.0, 5.0]),
        coefficients=np.array([0.5, 0.2, 0.1, -0.3]),
        covariance=np.diag([0.01, 0.04, 0.02, 0.03]),
        edges_days=np.array([100.0]),
        hazard_per_day=np.array([0.001]),
    )
    columns = [[5.0, 0.0], [5.0, np.nan], [np.nan, np.nan]]
    # Two deviations above the mean at 0.5 each; two below at 0.2; an absent one gives its flag.
    expected = [[1.0, -0.4], [1.0, -0.3], [np.nan, np.nan]]
    assert_allclose(model.contributions(columns), expected, rtol=1e-14)
    assert_allclose(model.predict(columns), [0.6, 0.7, np.nan], rtol=1e-14)
    # 2^2 x 0.01 + 2^2 x 0.04; then 2^2 x 0.01 + 0.03 of the flag + 0.2^2 + 0.04 of what is absent.
    errors = [np.sqrt(0.2), np.sqrt(0.15), np.nan]
    assert_allclose(model.predict_standard_error(columns), errors, rtol=1e-14)
    survival = model.predict_survival_function(columns, [100.0])
    assert_allclose(survival[:2, 0], np.exp(-0.1 * np.exp([0.6, 0.7])), rtol=1e-14)


def test_contributions_sum_to_the_log_hazard(model: FusionModel) -> None:
    columns = _columns(seed=3)[1:]
    parts = model.contributions(columns)
    assert parts.shape == columns.shape
    assert_allclose(parts.sum(axis=1), model.predict(columns), atol=1e-13)


@pytest.mark.parametrize("present", SUBSETS, ids=str)
def test_whoever_has_some_modality_has_a_risk(model: FusionModel, present: tuple[int, ...]) -> None:
    columns = np.full((5, 3), np.nan)
    columns[:, present] = _columns(seed=9)[50:55][:, present]
    columns[np.ix_(range(5), present)] = np.nan_to_num(columns[:, present], nan=1.0)
    said = [
        model.predict(columns),
        model.predict_standard_error(columns),
        *model.predict_survival_function(columns, [100.0, 5000.0]).T,
        *model.contributions(columns).T,
    ]
    for values in said:
        assert np.isfinite(values).all() if present else np.isnan(values).all()


def test_uncertainty_widens_with_every_modality_that_is_absent(model: FusionModel) -> None:
    complete = np.random.default_rng(4).normal(size=(400, 3)) * model.scale + model.mean
    previous = {(0, 1, 2): float((model.predict_standard_error(complete) ** 2).mean())}
    for present in sorted((s for s in SUBSETS if 0 < len(s) < 3), key=len, reverse=True):
        columns = np.full_like(complete, np.nan)
        columns[:, present] = complete[:, present]
        variance = float((model.predict_standard_error(columns) ** 2).mean())
        fuller = [v for s, v in previous.items() if set(s) > set(present)]
        assert fuller
        assert variance > max(fuller)
        previous[present] = variance


def test_the_standard_error_covers_what_the_modality_would_have_said() -> None:
    model = _model()
    complete = np.random.default_rng(4).normal(size=(20_000, 3)) * model.scale + model.mean
    without = complete.copy()
    without[:, 0] = np.nan
    moved = model.predict(complete) - model.predict(without)
    known = np.diag(model.covariance)[0] + model.coefficients[0] ** 2
    assert_allclose(moved.std() ** 2 + np.diag(model.covariance)[0], known, rtol=0.03)


def test_survival_falls_with_time_and_with_log_hazard(model: FusionModel) -> None:
    columns = _columns(seed=7)[1:]
    survival = model.predict_survival_function(columns, np.linspace(0, 4000, 50))
    assert_array_equal(survival[:, 0], 1.0)
    assert (np.diff(survival, axis=1) < 0).all()
    by_risk = survival[np.argsort(model.predict(columns))]
    assert (np.diff(by_risk[:, 1:], axis=0) <= 1e-15).all()
    assert ((survival > 0) & (survival <= 1)).all()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (np.zeros((4, 2)), r"found shape \(4, 2\), needed \(n, 3\)"),
        (np.zeros(3), r"found shape \(3,\), needed \(n, 3\)"),
        (np.array([[0.0, np.inf, np.nan]]), "log hazard: found an infinite one"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    model: FusionModel, columns: Floats, said: str
) -> None:
    for ask in (model.predict, model.predict_standard_error, model.contributions):
        with pytest.raises(ValueError, match=said):
            ask(columns)


def test_the_fit_is_a_cox_fit_with_its_own_baseline() -> None:
    columns = _columns()
    event, time = _outcome(columns)
    strata = np.arange(len(time)) % 2
    model = _model(strata=strata)
    known = ~np.isnan(columns).all(axis=1)
    x = fusion_inputs(columns, np.nanmean(columns, axis=0), np.nanstd(columns, axis=0, ddof=1))
    fit = fit_cox(x[known], event[known], time[known], strata=strata[known], ridge=0.02)
    assert_allclose(model.coefficients, fit.candidate, atol=1e-10)
    assert_allclose(model.covariance, fit.covariance, rtol=1e-8)
    # At the maximum, the baseline gives as many events in each interval as were seen.
    log_hazard = model.predict(columns[known])
    events, exposure = interval_sums(log_hazard, event[known], time[known], model.edges_days)
    assert_allclose(model.baseline * exposure, events)


def test_the_estimator_agrees_with_lifelines() -> None:
    from lifelines import CoxPHFitter

    columns = _columns(300)[1:]
    event, time = _outcome(columns)
    strata = np.arange(len(time)) % 3
    found = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.05)
    found.fit(columns, survival_outcome(event, time), strata=strata)
    x = fusion_inputs(columns, found.model_.mean, found.model_.scale)
    names = [f"x{i}" for i in range(6)]
    frame = pd.DataFrame(x, columns=names).assign(event=event, time=time, strata=strata)
    # lifelines penalises coefficients of inputs that it scales itself; undo its scale.
    reference = CoxPHFitter(penalizer=(0.05 / frame[names].std(ddof=1) ** 2).to_numpy())
    reference.fit(
        frame, duration_col="time", event_col="event", strata="strata",
        fit_options={"precision": 1e-14, "max_steps": 100},
    )  # fmt: skip
    assert_allclose(found.model_.coefficients, reference.params_.to_numpy(), atol=1e-9)
    assert_allclose(
        np.sqrt(np.diag(found.model_.covariance)), reference.standard_errors_.to_numpy(), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_estimators_keep_scikit_survivals_conventions(kind: str) -> None:
    from sksurv.metrics import concordance_index_censored
    from sksurv.util import Surv

    columns = _columns(240)
    event, time = _outcome(columns)
    estimator = ESTIMATORS[kind](modalities=MODALITIES, edges_days=EDGES, ridge=0.05)
    y = Surv.from_arrays(event, time)
    assert estimator.fit(columns, y) is estimator
    assert estimator.ridge_ == 0.05
    known = ~np.isnan(columns).all(axis=1)
    log_hazard = estimator.predict(columns)
    assert np.isnan(log_hazard[~known]).all()
    # Higher is worse, as scikit-survival's estimate is.
    found = concordance_index_censored(event[known], time[known], log_hazard[known])[0]
    assert found > 0.65
    survival = estimator.predict_survival_function(columns, [365.0, 730.0])
    assert survival.shape == (240, 2)
    assert_array_equal(survival_outcome(event, time)["time"], y["time"])


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_no_modality_stands_in_no_fit(kind: str) -> None:
    columns = _columns()
    event, time = _outcome(columns)
    with_them = np.vstack([columns, np.full((30, 3), np.nan)])
    more = np.concatenate([event, np.ones(30, bool)]), np.concatenate([time, np.full(30, 10.0)])
    options = {"modalities": MODALITIES, "edges_days": EDGES, "ridge": 0.05, "model": kind}
    found = fit_late_fusion(with_them, *more, **options)  # type: ignore[arg-type]
    assert found.to_json() == fit_late_fusion(columns, event, time, **options).to_json()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_that_lacks_a_modality_fits_with_the_others(kind: str) -> None:
    columns, strata = _columns(240), np.repeat([0, 1, 2], 80)
    columns[strata == 1, 0] = np.nan
    event, time = _outcome(_columns(240))
    estimator = ESTIMATORS[kind](modalities=MODALITIES, edges_days=EDGES, ridge=0.05)
    model = estimator.fit(columns, survival_outcome(event, time), strata=strata).model_
    there = (strata == 1) & ~np.isnan(columns).all(axis=1)
    assert np.isfinite(model.predict(columns[there])).all()
    assert there.sum() > 70
    others = strata != 1
    alone = estimator.fit(
        columns[others], survival_outcome(event[others], time[others]), strata=strata[others]
    )
    # Its effect is learnt where it was measured.
    assert_allclose(model.coefficients[0], alone.model_.coefficients[0], atol=0.15)
    assert model.coefficients[0] > 0.2


def test_a_modality_that_nobody_has_changes_nothing() -> None:
    columns = _columns()
    event, time = _outcome(columns)
    columns[:, 1] = np.nan
    with_it = fit_late_fusion(
        columns, event, time, modalities=MODALITIES, edges_days=(2500.0,), ridge=0.02
    )
    without = fit_late_fusion(
        columns[:, [0, 2]], event, time, modalities=("pathology", "clinical"),
        edges_days=(2500.0,), ridge=0.02,
    )  # fmt: skip
    assert_allclose(with_it.coefficients[[0, 2, 3, 5]], without.coefficients, atol=1e-9)
    assert_allclose(with_it.coefficients[[1, 4]], 0.0, atol=1e-12)
    assert_allclose(with_it.predict(columns), without.predict(columns[:, [0, 2]]), atol=1e-9)
    # What nobody knows of it is the ridge's prior.
    assert_allclose(np.diag(with_it.covariance)[[1, 4]], 1 / (0.02 * _known(columns)), rtol=1e-9)


def _known(columns: Floats) -> int:
    return int((~np.isnan(columns).all(axis=1)).sum())


def test_the_discrete_model_is_the_discrete_fit() -> None:
    columns = _columns(300)[1:]
    event, time = _outcome(columns)
    strata = np.arange(len(time)) % 3
    found = LogisticHazardFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.05)
    model = found.fit(columns, survival_outcome(event, time), strata=strata).model_
    x = fusion_inputs(columns, model.mean, model.scale)
    fit = fit_logistic_hazard(x, event, time, edges_days=EDGES, strata=strata, ridge=0.05)
    assert_array_equal(np.concatenate([model.alpha, model.coefficients]), fit.candidate)
    assert_array_equal(model.covariance, fit.covariance[3:, 3:])
    expected = survival_from_log_odds(model.alpha, x @ model.coefficients, EDGES, [200.0, 900.0])
    found_survival = model.predict_survival_function(columns, [200.0, 900.0])
    assert_allclose(found_survival, expected, rtol=1e-13)


def test_intervals_without_events_are_merged() -> None:
    columns = _columns()
    event, time = _outcome(columns)
    time = np.where(time <= 30, 31.0, time)
    event &= time <= 1800
    # Nobody dies in the first two and in the sixth, and nobody is followed through the last.
    edges = (10.0, 20.0, 365.0, 1095.0, 1825.0, 2200.0, 9000.0)
    found = LogisticHazardFusion(modalities=MODALITIES, edges_days=edges, ridge=RIDGES)
    model = found.fit(columns, survival_outcome(event, time)).model_
    assert_array_equal(model.edges_days, [365.0, 1095.0, 2200.0])
    with pytest.raises(ConvergenceError, match="logistic hazard: found no interval"):
        found.fit(columns, survival_outcome(np.ones(len(event), bool), np.full(len(event), 5.0)))


def _held_out(rows: tuple[Floats, ...], folds: Floats, ridge: float) -> float:
    """Cross-validated partial likelihood by lifelines: of all rows, less that of those kept."""
    x, event, time, strata = rows
    total = 0.0
    for fold in np.unique(folds):
        kept = folds != fold
        beta = fit_cox(x[kept], event[kept], time[kept], strata=strata[kept], ridge=ridge).candidate
        whole = cox_sums(x, event, time, beta, strata=strata).log_likelihood
        part = cox_sums(x[kept], event[kept], time[kept], beta, strata=strata[kept])
        total += whole - part.log_likelihood
    return total


def test_the_ridge_is_the_best_for_strata_that_were_left_out() -> None:
    columns = _columns(150, seed=5)[1:]
    event, time = _outcome(columns, seed=6)
    strata = np.arange(len(time)) % 4
    found = CoxFusion(modalities=MODALITIES, edges_days=EDGES)
    found.fit(columns, survival_outcome(event, time), strata=strata)
    x = fusion_inputs(columns, found.model_.mean, found.model_.scale)
    # Whole strata are folds, so that the difference is each stratum's own partial likelihood.
    own = {
        ridge: sum(
            cox_sums(
                x[strata == s], event[strata == s], time[strata == s],
                fit_cox(
                    x[strata != s], event[strata != s], time[strata != s],
                    strata=strata[strata != s], ridge=ridge,
                ).candidate,
            ).log_likelihood
            for s in range(4)
        )
        for ridge in RIDGES
    }  # fmt: skip
    assert found.ridge_ == max(own, key=own.__getitem__)
    rows = (x, event, time, strata)
    for ridge in (RIDGES[0], RIDGES[-1]):
        assert_allclose(_held_out(rows, strata, ridge), own[ridge], rtol=1e-12)
    single = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=found.ridge_)
    same = single.fit(columns, survival_outcome(event, time), strata=strata)
    assert same.model_.to_json() == found.model_.to_json()


@pytest.mark.parametrize("kind", ["cox", "logistic_hazard"])
def test_noise_is_shrunken_and_signal_is_not(kind: str) -> None:
    rng = np.random.default_rng(11)
    columns = rng.normal(size=(200, 3))
    lost = rng.uniform(200, 2500, 200)
    noise, signal = rng.exponential(900, 200), rng.exponential(900 * np.exp(-2 * columns[:, 0]))
    chosen = []
    for died in (noise, signal):
        y = survival_outcome(died <= lost, np.ceil(np.minimum(died, lost)))
        estimator = ESTIMATORS[kind](modalities=MODALITIES, edges_days=EDGES)
        chosen.append(estimator.fit(columns, y).ridge_)
    assert chosen[0] == RIDGES[-1]
    assert chosen[1] <= 0.03


def test_of_equal_penalties_the_larger_is_taken() -> None:
    columns = np.full((40, 3), 2.0)
    event, time = np.arange(40) % 2 == 0, np.arange(1.0, 41.0)
    found = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=(0.1, 0.5, 0.2))
    assert found.fit(columns, survival_outcome(event, time)).ridge_ == 0.5


def test_the_choice_depends_on_the_arguments_alone() -> None:
    columns = _columns()
    y = survival_outcome(*_outcome(columns))
    first = CoxFusion(modalities=MODALITIES, edges_days=EDGES, seed=3).fit(columns, y)
    np.random.default_rng().random(5)
    again = CoxFusion(modalities=MODALITIES, edges_days=EDGES, seed=3).fit(columns, y)
    assert first.model_.to_json() == again.model_.to_json()


@pytest.mark.parametrize("estimator", [CoxFusion, LogisticHazardFusion, GatedFusion])
def test_one_event_is_enough_to_say_something(estimator: Any) -> None:
    columns, time = _columns(40), np.arange(1.0, 41.0)
    event = time == 20.0
    found = estimator(modalities=MODALITIES, edges_days=(15.0, 30.0, 35.0))
    found.fit(columns, survival_outcome(event, time))
    # A fold without the event has no fit: nothing speaks for a small penalty.
    assert found.ridge_ == RIDGES[-1]
    with pytest.raises(ConvergenceError, match="found no event in a patient with some modality"):
        found.fit(columns, survival_outcome(np.zeros(40, bool), time))
    with pytest.raises(ConvergenceError, match="found no event in a patient with some modality"):
        found.fit(np.full((40, 3), np.nan), survival_outcome(event, time))


@pytest.mark.parametrize("ridge", [(), -0.1, (0.1, np.nan), np.inf])
def test_a_penalty_that_makes_no_sense_is_refused(ridge: Any) -> None:
    columns = _columns()
    found = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=ridge)
    with pytest.raises(ValueError, match="penalty: found"):
        found.fit(columns, survival_outcome(*_outcome(columns)))


@pytest.mark.parametrize(
    "y",
    [
        np.zeros(160),
        np.zeros((160, 2)),
        [(True, 1.0)] * 160,
        np.zeros(160, dtype=[("time", float), ("event", bool)]),
        np.zeros(160, dtype=[("event", int), ("time", float)]),
        np.zeros(160, dtype=[("event", bool), ("time", float), ("more", float)]),
    ],
    ids=["plain", "two columns", "list", "order", "integer event", "three fields"],
)
def test_an_outcome_that_is_not_structured_is_refused(y: Any) -> None:
    found = CoxFusion(modalities=MODALITIES, edges_days=EDGES)
    with pytest.raises(ValueError, match=r"y: found .*, needed a structured array of event"):
        found.fit(_columns(), y)


def test_lengths_that_disagree_are_refused() -> None:
    columns = _columns()
    event, time = _outcome(columns)
    found = CoxFusion(modalities=MODALITIES, edges_days=EDGES)
    with pytest.raises(ValueError, match="y: found 159 patients, needed 160"):
        found.fit(columns, survival_outcome(event[1:], time[1:]))
    with pytest.raises(ValueError, match=r"strata: found shape \(3,\), needed \(160,\)"):
        found.fit(columns, survival_outcome(event, time), strata=[0, 1, 2])
    with pytest.raises(ValueError, match="time: found a value that is not finite and positive"):
        found.fit(columns, np.zeros(160, dtype=[("event", bool), ("time", float)]))


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_an_interval_in_which_nobody_was_at_risk_has_no_hazard(shape: tuple[int, ...]) -> None:
    exposure = np.zeros(shape)
    exposure[..., 0] = 10.0
    found = baseline_hazard(np.ones(shape), exposure)
    assert_array_equal(found[..., 0], 0.1)
    assert_array_equal(found[..., 1:], 0.0)


def test_importing_the_models_is_quick() -> None:
    code = (
        "import sys, fusion.late, fusion.averaging\n"
        "slow = {'torch', 'torchsurv', 'sksurv', 'pandas', 'scipy.optimize'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
