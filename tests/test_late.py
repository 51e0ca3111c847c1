"""The fusion model: its inputs, what it predicts, and how it is kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_allclose, assert_array_equal

from fusion.late import (
    FusionModel,
    LinearEncoder,
    baseline_hazard,
    fit_late_fusion,
    fusion_inputs,
    linear_inputs,
)
from fusion.survival import fit_cox, interval_sums

FINITE = st.floats(allow_nan=False, allow_infinity=False)
MODALITIES = ("pathology", "radiology", "clinical")


def _columns(n: int = 120, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(n, 3)) * [1.0, 3.0, 0.2] + [0.0, 5.0, -1.0]
    columns[rng.random(columns.shape) < 0.2] = np.nan
    columns[0] = np.nan
    return columns


def _outcome(columns: np.ndarray, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    died = rng.exponential(900 * np.exp(-np.nan_to_num(columns[:, 0])))
    lost = rng.uniform(200, 2500, len(columns))
    return died <= lost, np.ceil(np.minimum(died, lost))


def _model(seed: int = 0, **change: object) -> FusionModel:
    columns = _columns(seed=seed)
    return fit_late_fusion(
        columns, *_outcome(columns), modalities=MODALITIES,
        edges_days=(365.0, 1095.0, 2500.0), ridge=0.02, **change,
    )  # fmt: skip


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
def test_an_encoder_is_kept_bit_by_bit(values: np.ndarray, *, cross_fitted: bool) -> None:
    encoder = LinearEncoder("omics", ("a", "b", "c", "d"), *values, cross_fitted=cross_fitted)
    kept = LinearEncoder.from_dict(json.loads(json.dumps(encoder.to_dict())))
    assert (kept.modality, kept.inputs, kept.cross_fitted) == (
        "omics", encoder.inputs, cross_fitted,
    )  # fmt: skip
    for name in ("mean", "scale", "coefficients"):
        assert getattr(kept, name).tobytes() == getattr(encoder, name).tobytes()


@settings(max_examples=50, deadline=None)
@given(
    vectors=arrays.arrays(np.float64, (4, 4), elements=FINITE),
    matrix=arrays.arrays(np.float64, (4, 4), elements=FINITE),
)
def test_a_model_is_kept_bit_by_bit(vectors: np.ndarray, matrix: np.ndarray) -> None:
    mean, scale, edges, hazard = vectors
    model = FusionModel(("a", "b"), mean[:2], scale[:2], mean, matrix, edges, hazard)
    kept = FusionModel.from_json(model.to_json())
    assert kept.modalities == model.modalities
    for name in ("mean", "scale", "coefficients", "covariance", "edges_days", "hazard_per_day"):
        assert getattr(kept, name).tobytes() == getattr(model, name).tobytes()
        assert getattr(kept, name).shape == getattr(model, name).shape


def test_predictions_follow_the_formula_patient_by_patient() -> None:
    model, columns = _model(), _columns(seed=7)
    times = np.array([0.0, 100.0, 365.0, 2000.0, 4000.0])
    log_hazard, errors = model.predict(columns), model.predict_standard_error(columns)
    survival = model.predict_survival_function(columns, times)
    for i, row in enumerate(columns):
        x = [0.0 if np.isnan(v) else (v - model.mean[j]) / model.scale[j]
             for j, v in enumerate(row)] + [float(np.isnan(v)) for v in row]  # fmt: skip
        assert_allclose(log_hazard[i], np.dot(x, model.coefficients), atol=1e-12)
        variance = sum(x[a] * model.covariance[a, b] * x[b] for a in range(6) for b in range(6))
        assert_allclose(errors[i], np.sqrt(variance), rtol=1e-10)
        for k, t in enumerate(times):
            left, cumulative = 0.0, 0.0
            for right, hazard in zip([365.0, 1095.0, np.inf], model.hazard_per_day, strict=True):
                cumulative += hazard * max(0.0, min(t, right) - left)
                left = right
            assert_allclose(survival[i, k], np.exp(-np.exp(log_hazard[i]) * cumulative))


def test_survival_falls_with_time_and_with_log_hazard() -> None:
    model, columns = _model(), _columns(seed=7)
    survival = model.predict_survival_function(columns, np.linspace(0, 4000, 50))
    assert_array_equal(survival[:, 0], 1.0)
    assert (np.diff(survival, axis=1) < 0).all()
    by_risk = survival[np.argsort(model.predict(columns))]
    assert (np.diff(by_risk[:, 1:], axis=0) <= 0).all()
    assert ((survival > 0) & (survival <= 1)).all()


def test_the_fit_is_a_cox_fit_with_its_own_baseline() -> None:
    columns = _columns()
    event, time = _outcome(columns)
    strata = np.arange(len(time)) % 2
    model = _model(strata=strata)
    x = fusion_inputs(columns, np.nanmean(columns, axis=0), np.nanstd(columns, axis=0, ddof=1))
    fit = fit_cox(x, event, time, strata=strata, ridge=0.02)
    assert_allclose(model.coefficients, fit.candidate, atol=1e-10)
    assert_allclose(model.covariance, fit.covariance, rtol=1e-8)
    # At the maximum, the baseline gives as many events in each interval as were seen.
    events, exposure = interval_sums(model.predict(columns), event, time, model.edges_days)
    assert_allclose(model.hazard_per_day * exposure, events)


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


@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_an_interval_in_which_nobody_was_at_risk_has_no_hazard(shape: tuple[int, ...]) -> None:
    exposure = np.zeros(shape)
    exposure[..., 0] = 10.0
    found = baseline_hazard(np.ones(shape), exposure)
    assert_array_equal(found[..., 0], 0.1)
    assert_array_equal(found[..., 1:], 0.0)
