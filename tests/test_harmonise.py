"""Location and scale of a site: exact arithmetic, and its price."""

from __future__ import annotations

import json
import typing

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.preprocessing import StandardScaler

from modalities.cohort import DataError
from modalities.harmonise import Harmonisation, SiteScaler, fit_site_scaler

if typing.TYPE_CHECKING:
    from pathlib import Path

TABLES = hnp.arrays(
    np.float64,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=8),
    elements=st.one_of(st.floats(-1e6, 1e6, width=32), st.just(float("nan"))),
)


def test_mean_and_sample_deviation_by_hand() -> None:
    scaler = fit_site_scaler([[1.0, 10.0], [2.0, np.nan], [6.0, 14.0]])
    np.testing.assert_allclose(scaler.mean, [3.0, 12.0], rtol=1e-15)
    np.testing.assert_allclose(scaler.scale, [np.sqrt(7.0), np.sqrt(8.0)], rtol=1e-15)


def test_columns_without_spread_are_not_stretched() -> None:
    values = np.array([[0.1, np.nan, np.nan], [0.1, np.nan, 5.0], [0.1, np.nan, np.nan]])
    scaler = fit_site_scaler(values)
    assert scaler.mean.tolist() == [0.1, 0.0, 5.0]
    assert scaler.scale.tolist() == [1.0, 1.0, 1.0]
    np.testing.assert_array_equal(scaler.transform(values)[:, 0], 0.0)


@given(values=TABLES)
def test_agrees_with_numpy(values: np.ndarray) -> None:
    scaler = fit_site_scaler(values)
    for column, mean, scale in zip(values.T, scaler.mean, scaler.scale, strict=True):
        present = column[~np.isnan(column)]
        expected_mean = present.mean() if present.size else 0.0
        spread = np.unique(present).size > 1
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-9, atol=1e-9)
        if spread and scale != 1.0:
            np.testing.assert_allclose(scale, present.std(ddof=1), rtol=1e-6)
        elif not spread:
            assert scale == 1.0


@given(values=TABLES)
def test_inverse_undoes_transform(values: np.ndarray) -> None:
    scaler = fit_site_scaler(values)
    restored = scaler.inverse_transform(scaler.transform(values))
    np.testing.assert_allclose(restored, values, rtol=1e-9, atol=1e-9 * 1e6)


@given(values=TABLES, data=st.data())
def test_order_of_patients_does_not_matter(values: np.ndarray, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(values))))
    one, two = fit_site_scaler(values), fit_site_scaler(values[order])
    np.testing.assert_allclose(one.mean, two.mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.scale, two.scale, rtol=1e-6)


@given(shift=st.floats(-1e3, 1e3), stretch=st.floats(0.1, 10))
def test_a_machine_that_shifts_and_stretches_is_undone(shift: float, stretch: float) -> None:
    truth = np.random.default_rng(0).normal(size=(30, 3))
    seen = shift + stretch * truth
    np.testing.assert_allclose(
        fit_site_scaler(seen).transform(seen), fit_site_scaler(truth).transform(truth), atol=1e-9
    )


def test_a_true_difference_between_sites_is_lost_too() -> None:
    rng = np.random.default_rng(0)
    young, old = rng.normal(50, 5, size=(200, 1)), rng.normal(70, 5, size=(200, 1))
    difference = fit_site_scaler(old).transform(old).mean() - (
        fit_site_scaler(young).transform(young).mean()
    )
    assert abs(difference) < 1e-12


def test_large_means_keep_their_spread() -> None:
    values = 1e9 + np.arange(5.0)[:, None]
    np.testing.assert_allclose(fit_site_scaler(values).scale, [np.sqrt(2.5)], rtol=1e-15)


def test_no_rows_give_the_identity() -> None:
    scaler = fit_site_scaler(np.empty((0, 2)))
    assert scaler.mean.tolist() == [0.0, 0.0]
    assert scaler.scale.tolist() == [1.0, 1.0]
    assert scaler.transform(np.empty((0, 2))).shape == (0, 2)


def test_json_restores_every_bit() -> None:
    scaler = fit_site_scaler(np.random.default_rng(1).normal(size=(9, 4)))
    restored = SiteScaler.from_dict(json.loads(json.dumps(scaler.to_dict())))
    np.testing.assert_array_equal(restored.mean, scaler.mean)
    np.testing.assert_array_equal(restored.scale, scaler.scale)


def test_frozen_down_to_the_arrays() -> None:
    mean = np.zeros(2)
    scaler = SiteScaler(mean=mean, scale=np.ones(2))
    mean[0] = 7.0
    assert scaler.mean.tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="read-only"):
        scaler.mean[0] = 1.0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ({"mean": [0.0]}, "not_a_scaler"),
        ({"mean": [0.0], "scale": ["x"]}, "not_a_scaler"),
        ({"mean": [0.0], "scale": [1.0, 2.0]}, "shape"),
        ({"mean": 0.0, "scale": 1.0}, "shape"),
        ({"mean": [float("nan")], "scale": [1.0]}, "not_finite"),
        ({"mean": [0.0], "scale": [float("inf")]}, "not_finite"),
        ({"mean": [0.0], "scale": [0.0]}, "scale_not_positive"),
        ({"mean": [0.0], "scale": [-1.0]}, "scale_not_positive"),
    ],
)
def test_a_broken_scaler_is_refused(data: dict[str, object], code: str) -> None:
    with pytest.raises(DataError) as caught:
        SiteScaler.from_dict(data)
    assert caught.value.code == code


def test_wrong_tables_are_refused() -> None:
    scaler = SiteScaler(mean=np.zeros(2), scale=np.ones(2))
    for values in (np.zeros(2), np.zeros((3, 1))):
        with pytest.raises(DataError, match="needed"):
            scaler.transform(values)
        with pytest.raises(DataError, match="needed"):
            scaler.inverse_transform(values)
    with pytest.raises(DataError, match="shape"):
        fit_site_scaler(np.zeros(3))
    with pytest.raises(DataError, match="infinite"):
        fit_site_scaler([[np.inf], [1.0]])


def test_harmonisation_choices() -> None:
    assert typing.get_args(Harmonisation) == ("none", "site")


def test_real_blood_values_agree_with_scikit_learn(shared_data: Path) -> None:
    values = pd.read_csv(shared_data / "hancock_hnscc" / "blood.csv", index_col=0).to_numpy()
    ours = fit_site_scaler(values)
    reference = StandardScaler().fit(values)
    n = (~np.isnan(values)).sum(axis=0)
    np.testing.assert_allclose(ours.mean, reference.mean_, rtol=1e-12)
    np.testing.assert_allclose(ours.scale, np.sqrt(reference.var_ * n / (n - 1)), rtol=1e-10)
