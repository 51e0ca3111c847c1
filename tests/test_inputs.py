from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from flows.inputs import (
    LocalEncoder,
    folds_of,
    harmonised,
    keyed_digest,
    may_train,
    shared_table,
    site_inputs,
    site_rows,
    train_local,
)
from flows.protocol import read_protocol
from fusion.encoder_spec import EncoderSpec
from modalities.cohort import assemble, feature_table
from modalities.pathology.bags import Bag, write_bag

if TYPE_CHECKING:
    from pathlib import Path

    from mudata import MuData

    from flows.inputs import SiteInputs
    from flows.protocol import StudyProtocol

N, DIM = 60, 6
IDS = [f"p{i:02d}" for i in range(N)]
BLOOD = IDS[5:]
SLIDES = IDS[::2]


def protocol(**minimums: int) -> StudyProtocol:
    return read_protocol(
        {
            "study": {
                "name": "small", "data": "simulated", "horizon_days": 730,
                "grid_days": [365, 730],
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": ["age"]},
                "blood": {"kind": "tabular", "columns": ["hb", "wbc", "crp"]},
                "pathology": {"kind": "pathology"},
            },
            "encoder": {
                "blood": {"max_inputs": 2},
                "pathology": {"sharing": "sums", "max_inputs": 2, "max_steps": 0},
            },
            "privacy": {"patients": 20, "events": 5, "patients_per_input": 2} | minimums,
        }
    )  # fmt: skip


def features(ids: list[str], names: list[str], values: np.ndarray) -> Any:
    return feature_table(ids, names, values, input_digests=ids, spec_fingerprint="spec")


def cohort(folder: Path, *, poison: float = 0.0) -> MuData:
    """Site of 60 patients; ``poison`` is added to every feature of test rows."""
    rng = np.random.default_rng(0)
    split = np.where(np.arange(N) % 4 == 3, "test", "train")
    extra = dict(zip(IDS, np.where(split == "test", poison, 0.0), strict=True))
    age = rng.normal(60, 10, (N, 1)) + np.array([[extra[x]] for x in IDS])
    blood = rng.normal(5, 2, (len(BLOOD), 3)) + np.array([[extra[x]] for x in BLOOD])
    slides = features(SLIDES, ["mean_0"], np.zeros((len(SLIDES), 1)))
    for patient_id in SLIDES:
        for part in "ab":
            tiles = (rng.normal(0, 1, (4, DIM)) + extra[patient_id]).astype(np.float32)
            bag = Bag(np.zeros((4, 2), np.int64), tiles)
            write_bag(
                folder / f"pathology/{patient_id}{part}.h5", bag, coords_attrs={}, file_attrs={}
            )
    slides.obs["bag"] = [f"pathology/{x}a.h5;pathology/{x}b.h5" for x in SLIDES]
    outcome = pd.DataFrame(
        {
            "event": rng.random(N) < 0.7,
            "time_days": rng.exponential(500, N) + 1,
            "split": split,
            "fold_unit": np.arange(N) / N,
        },
        index=pd.Index(IDS),
    )
    tables = {
        "clinical": features(IDS, ["age"], age),
        "blood": features(BLOOD, ["hb", "wbc", "crp"], blood),
        "pathology": slides,
    }
    return assemble(tables, outcome, protocol_fingerprint="protocol")


def read(folder: Path, study: StudyProtocol | None = None, *, poison: float = 0.0) -> SiteInputs:
    found = cohort(folder, poison=poison)
    return site_inputs(found, study or protocol(), site="site-01", features=folder, secret=b"key")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> SiteInputs:
    return read(tmp_path_factory.mktemp("features"))


def test_inputs_are_in_the_order_of_the_cohort(inputs: SiteInputs) -> None:
    assert inputs.patient_ids.tolist() == IDS
    assert inputs.trains
    assert inputs.train.sum() == 45
    assert inputs.modalities["blood"].rows.tolist() == list(range(5, N))
    assert inputs.modalities["pathology"].rows.tolist() == list(range(0, N, 2))
    bags = inputs.modalities["pathology"].values
    assert {np.shape(bag) for bag in bags} == {(8, DIM)}
    assert np.bincount(inputs.folds).tolist() == [12] * 5
    assert inputs.outcome(inputs.train).event.shape == (45,)


def test_the_digest_that_leaves_is_keyed(inputs: SiteInputs, tmp_path: Path) -> None:
    digest = str(cohort(tmp_path).uns["cohort_digest"])
    assert inputs.cohort == keyed_digest(b"key", digest)
    assert inputs.cohort not in (digest, keyed_digest(b"other", digest))


def test_training_rows_do_not_feel_the_test_rows(inputs: SiteInputs, tmp_path: Path) -> None:
    poisoned = read(tmp_path, poison=1e4)
    for name in ("blood", "clinical", "pathology"):
        clean, dirty = (
            x.spread(name, shared_table(x, name, protocol())) for x in (inputs, poisoned)
        )
        np.testing.assert_array_equal(clean.train, dirty.train)
        shown = np.isfinite(clean.test).all(axis=1)
        assert (clean.test != dirty.test)[shown].all()


def test_tables_are_standardised_by_their_training_rows(inputs: SiteInputs) -> None:
    found = inputs.modalities["blood"]
    assert isinstance(found.values, np.ndarray)
    training = found.values[inputs.train[found.rows]]
    np.testing.assert_allclose(training.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(training.std(axis=0, ddof=1), 1, rtol=1e-12)
    clinical = inputs.modalities["clinical"].values
    assert isinstance(clinical, np.ndarray)
    assert clinical.mean() > 50  # age means the same everywhere


def test_a_site_without_training_rows_is_scaled_by_all_of_them() -> None:
    values = np.random.default_rng(1).normal(9, 3, (30, 2))
    none = np.zeros(30, dtype=bool)
    found = harmonised(values, EncoderSpec(harmonise="site"), train=none)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_array_equal(
        harmonised(values, EncoderSpec(harmonise="none"), train=none), values
    )


@pytest.mark.parametrize("minimums", [{"patients": 46}, {"events": 45}, {"patients_per_input": 8}])
def test_below_a_minimum_every_patient_is_a_test_patient(
    tmp_path: Path, minimums: dict[str, int]
) -> None:
    study = protocol(**minimums)
    found = read(tmp_path, study)
    assert not found.trains
    blood = found.modalities["blood"].values
    assert isinstance(blood, np.ndarray)
    np.testing.assert_allclose(blood.mean(axis=0), 0, atol=1e-12)
    rows = site_rows(found, {}, study)
    assert len(rows.train.time) == 0
    assert len(rows.test.time) == N
    assert rows.tables["pathology"].train.shape == (0, 2)
    assert rows.tables["pathology"].test.shape == (N, 2)


def test_minimums_count_two_inputs_per_modality() -> None:
    event = np.ones(29, dtype=bool)
    assert not may_train(event, protocol(patients_per_input=5))
    assert may_train(np.ones(30, dtype=bool), protocol(patients_per_input=5))


def test_folds_cut_the_unit_interval() -> None:
    units = np.array([0.0, 0.19, 0.2, 0.999999, np.nextafter(1, 0)])
    assert folds_of(units, 5).tolist() == [0, 0, 1, 4, 4]


def test_spread_leaves_others_missing(inputs: SiteInputs) -> None:
    rows = inputs.modalities["pathology"].rows
    spread = inputs.spread("pathology", np.arange(len(rows), dtype=float))
    assert (spread.train.shape, spread.test.shape) == ((45,), (15,))
    whole = np.full(N, np.nan)
    whole[inputs.train], whole[~inputs.train] = spread.train, spread.test
    np.testing.assert_array_equal(whole[rows], np.arange(len(rows)))
    assert np.isnan(np.delete(whole, rows)).all()


def test_what_is_shared_of_slides_is_their_projected_mean(inputs: SiteInputs) -> None:
    study = protocol()
    found = inputs.modalities["pathology"]
    means = np.stack([np.mean(bag, axis=0, dtype=np.float64) for bag in found.values])
    projection = study.projection("pathology", DIM)
    assert projection is not None
    projected = means @ projection
    train = projected[inputs.train[found.rows]]
    expected = (projected - train.mean(axis=0)) / train.std(axis=0, ddof=1)
    shared = shared_table(inputs, "pathology", study)
    assert shared.shape == (len(found.rows), 2)
    np.testing.assert_allclose(shared, expected, rtol=1e-9)


def test_rows_of_a_site_have_the_shapes_of_the_plan(inputs: SiteInputs) -> None:
    study = protocol()
    blood = np.arange(len(BLOOD), dtype=float)
    local = {
        "blood": LocalEncoder(object(), blood),  # type: ignore[arg-type]
        "clinical": LocalEncoder(None, np.zeros(N), "too few"),
    }
    rows = site_rows(inputs, local, study)
    assert {name: x.train.shape for name, x in rows.tables.items()} == {
        name: (45, len(names)) for name, names in study.sums_inputs().items()
    }
    assert set(rows.local) == {"blood"}
    assert rows.local["blood"].train.shape == (45,)
    assert len(rows.folds) == 45
    assert rows.cohort == inputs.cohort


def test_a_modality_that_nobody_has_is_left_out(inputs: SiteInputs) -> None:
    found = train_local(inputs, "radiology", EncoderSpec(), seed=0)
    assert found.encoder is None
    assert found.reason == "no patient has it"


def test_too_few_events_are_a_reason(inputs: SiteInputs) -> None:
    found = train_local(inputs, "blood", EncoderSpec(min_events=60), seed=0)
    assert found.encoder is None
    assert np.isnan(found.log_hazard).all()
    assert "events" in found.reason
    assert not any(x in found.reason for x in IDS)


@pytest.mark.parametrize("modality", ["blood", "pathology"])
def test_training_scores_out_of_fold_and_tests_by_the_refit(
    inputs: SiteInputs, modality: str
) -> None:
    spec = protocol().encoder[modality].model_copy(update={"min_events": 4})
    found = train_local(inputs, modality, spec, seed=0)
    assert found.encoder is not None, found.reason
    refit = found.encoder.log_hazard(inputs.modalities[modality].values)
    train = inputs.train[inputs.modalities[modality].rows]
    assert np.isfinite(found.log_hazard).all()
    np.testing.assert_array_equal(found.log_hazard[~train], refit[~train])
    assert (found.log_hazard[train] != refit[train]).all()
    again = train_local(inputs, modality, spec, seed=0)
    np.testing.assert_array_equal(found.log_hazard, again.log_hazard)


def registered(**evaluation: Any) -> tuple[MuData, StudyProtocol]:
    """Six patients, the last without any registry row."""
    study = read_protocol(
        {
            "study": {
                "name": "small", "data": "simulated", "horizon_days": 730,
                "grid_days": [365, 730],
            },
            "modality": {
                "clinical": {
                    "kind": "clinical", "numeric": ["age"], "ordinal": {"stage": ["I", "II"]},
                    "categorical": {"therapy": ["none", "radio", "chemo"]},
                },
                "blood": {"kind": "tabular", "columns": ["hb"]},
            },
            "evaluation": evaluation,
            "privacy": {"patients": 3, "events": 2, "patients_per_input": 1},
        }
    )  # fmt: skip
    ids = [f"p{i}" for i in range(6)]
    names = list(study.feature_names("clinical"))
    of_name = {
        "age": [49.9, 50.0, 69.0, 70.0, np.nan],
        "stage": [0.0, 1.0, np.nan, 1.0, 0.0],
        "therapy=radio": [0.0, 1.0, 0.0, np.nan, 0.0],
        "therapy=chemo": [0.0, 0.0, 1.0, np.nan, 0.0],
    }
    clinical = np.column_stack([of_name[x] for x in names])
    outcome = pd.DataFrame(
        {
            "event": np.arange(6) % 2 == 0,
            "time_days": np.arange(1.0, 7.0),
            "split": ["train", "test", "train", "test", "train", "train"],
            "fold_unit": np.arange(6) / 6,
        },
        index=pd.Index(ids),
    )
    tables = {
        "clinical": features(ids[:5], names, clinical),
        "blood": features(ids, ["hb"], np.arange(6.0)[:, None]),
    }
    return assemble(tables, outcome, protocol_fingerprint="protocol"), study


def test_levels_are_coded_and_what_is_unknown_has_a_code_of_its_own(tmp_path: Path) -> None:
    cohort_, study = registered(subgroups={"age": [50, 70], "stage": []}, treatment="therapy")
    found = site_inputs(cohort_, study, site="site-01", features=tmp_path, secret=b"key")
    assert study.subgroups() == {
        "age": ("below 50", "50 to 70", "70 and above"), "stage": ("I", "II"),
    }  # fmt: skip
    assert found.subgroups["age"].tolist() == [0, 1, 1, 2, -1, -1]
    assert found.subgroups["stage"].tolist() == [0, 1, -1, 1, 0, -1]
    assert found.treatment is not None
    assert found.treatment.tolist() == [0, 1, 2, -1, 0, -1]
    rows = site_rows(found, {}, study)
    assert rows.subgroups["age"].train.tolist() == [0, 1, -1, -1]
    assert rows.subgroups["age"].test.tolist() == [1, 2]
    assert rows.treatment is not None
    assert rows.treatment.test.tolist() == [1, -1]


def test_where_nothing_is_asked_nothing_is_coded(tmp_path: Path) -> None:
    cohort_, study = registered()
    found = site_inputs(cohort_, study, site="site-01", features=tmp_path, secret=b"key")
    assert (dict(found.subgroups), found.treatment) == ({}, None)
    assert site_rows(found, {}, study).treatment is None


def test_a_site_without_a_registry_table_codes_nothing(tmp_path: Path) -> None:
    cohort_, study = registered(subgroups={"stage": []}, treatment="therapy")
    del cohort_.mod["clinical"]
    found = site_inputs(cohort_, study, site="site-01", features=tmp_path, secret=b"key")
    assert (dict(found.subgroups), found.treatment) == ({}, None)
