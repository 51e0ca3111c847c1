"""A site's rows as a shared network reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from flows.inputs import ModalityInputs, SiteInputs
from flows.protocol import StudyProtocol, read_protocol
from flows.shared import shared_networks
from fusion.encoder_spec import random_projection
from fusion.shared_networks import SharedLoss, initial_weights, shared_log_hazard
from modalities.cohort import DataError

N, DIM = 40, 5
BLOOD = np.arange(2, N)
SLIDES = np.arange(0, N, 2)


def protocol(**slides: Any) -> StudyProtocol:
    network = {"sharing": "weights", "hidden": 3, "dropout": 0.0}
    return read_protocol(
        {
            "study": {
                "name": "small", "data": "simulated", "horizon_days": 730,
                "grid_days": [365, 730],
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": ["age"]},
                "blood": {"kind": "tabular", "columns": ["hb", "crp"]},
                "pathology": {"kind": "pathology"},
            },
            "encoder": {
                "blood": {"model": "mlp", **network},
                "pathology": {
                    "model": "gated_attention", "n_components": 3, "projection_seed": 7,
                    **network, **slides,
                },
            },
        }
    )  # fmt: skip


def inputs(*, shift: float = 0.0) -> SiteInputs:
    """A site of 40 patients, two without blood, half without slides; ``shift`` moves test rows."""
    rng = np.random.default_rng(0)
    train = rng.permutation(np.arange(N) < 28)
    blood = rng.normal(size=(len(BLOOD), 2))
    blood[3, 1] = np.nan
    bags = [
        (rng.normal(2.0, 3.0, size=(int(rng.integers(2, 6)), DIM)) + (not train[i]) * shift).astype(
            np.float32
        )
        for i in SLIDES
    ]
    return SiteInputs(
        site="site-01",
        cohort="0" * 64,
        patient_ids=np.array([f"p{i}" for i in range(N)]),
        event=rng.random(N) < 0.7,
        time=np.ceil(rng.exponential(500, N)),
        train=train,
        folds=np.zeros(N, dtype=np.int64),
        modalities={
            "blood": ModalityInputs(BLOOD, blood), "pathology": ModalityInputs(SLIDES, bags),
        },
    )  # fmt: skip


@pytest.mark.parametrize("modality", ["blood", "pathology"])
def test_rows_are_those_of_the_patients_training_rows_first(modality: str) -> None:
    found, study = inputs(), protocol()
    network = shared_networks(found, study)[modality]
    order = np.concatenate([np.flatnonzero(found.train), np.flatnonzero(~found.train)])
    has = np.isin(order, found.modalities[modality].rows)
    assert_array_equal(network.present, has)
    spec = study.encoder[modality]
    weights = initial_weights(spec, 3 if modality == "pathology" else 2, seed=0) + 0.3
    scores = network.log_hazard(weights)
    assert scores.shape == (N,)
    assert_array_equal(np.isnan(scores), ~has)
    direct = shared_log_hazard(spec, weights, network.values)
    at = {int(row): i for i, row in enumerate(found.modalities[modality].rows)}
    for row, patient in enumerate(order):
        if has[row]:
            assert scores[row] == direct[at[int(patient)]]


@pytest.mark.parametrize("modality", ["blood", "pathology"])
def test_the_loss_is_that_of_the_rows_asked_for(modality: str) -> None:
    found, study = inputs(), protocol()
    network = shared_networks(found, study)[modality]
    rows = np.flatnonzero(network.present[: found.train.sum()])[1:]
    patients = np.flatnonzero(found.train)[rows]
    spec = study.encoder[modality]
    weights = initial_weights(spec, 3 if modality == "pathology" else 2, seed=1) + 0.2
    at = [list(found.modalities[modality].rows).index(x) for x in patients]
    values = (
        network.values[at]
        if isinstance(network.values, np.ndarray)
        else [network.values[i] for i in at]
    )
    expected = SharedLoss(spec, values, found.event[patients], found.time[patients])(weights)
    for _ in range(2):
        loss, gradient = network.loss_gradient(weights, rows)
        assert loss == expected[0]
        assert_array_equal(gradient, expected[1])
    other, _ = network.loss_gradient(weights, rows[:-3])
    assert other != loss


def test_tiles_are_projected_alike_and_standardised_by_training_patients() -> None:
    found, study = inputs(), protocol()
    values = shared_networks(found, study)["pathology"].values
    axes = random_projection(DIM, 3, 7)
    bags = [np.asarray(bag, dtype=float) @ axes for bag in found.modalities["pathology"].values]
    seen = [bag for bag, i in zip(bags, SLIDES, strict=True) if found.train[i]]
    # Every patient counts alike, however many tiles.
    mean = np.mean([bag.mean(axis=0) for bag in seen], axis=0)
    spread = np.sqrt(np.mean([((bag - mean) ** 2).mean(axis=0) for bag in seen], axis=0))
    for bag, own in zip(bags, values, strict=True):
        assert_allclose(own, (bag - mean) / spread, atol=1e-12)


def test_training_rows_do_not_feel_the_test_rows() -> None:
    clean, moved = (shared_networks(inputs(shift=x), protocol())["pathology"] for x in (0.0, 50.0))
    train = inputs().train[SLIDES]
    for used, own, other in zip(train, clean.values, moved.values, strict=True):
        assert np.array_equal(own, other) == used


def test_a_missing_cell_counts_as_average() -> None:
    values = shared_networks(inputs(), protocol())["blood"].values
    assert isinstance(values, np.ndarray)
    assert values[3, 1] == 0.0
    assert np.isfinite(values).all()


def test_only_what_is_shared_and_at_the_site_is_prepared() -> None:
    study = protocol()
    assert set(shared_networks(inputs(), study)) == {"blood", "pathology"}
    assert set(shared_networks(inputs(), protocol(sharing="local"))) == {"blood"}
    found = inputs()
    without = {k: v for k, v in found.modalities.items() if k == "pathology"}
    assert set(shared_networks(SiteInputs(**{**vars(found), "modalities": without}), study)) == {
        "pathology"
    }


def test_too_few_dimensions_are_named() -> None:
    with pytest.raises(DataError, match="n_components: found 6, needed at most the 5 dimensions"):
        shared_networks(inputs(), protocol(n_components=6))
