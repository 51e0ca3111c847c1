"""Registry exports: covariates by level, and an outcome that is never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modalities.clinical import ClinicalSpec, Registry, extract, read_registry
from modalities.cohort import DataError, Exclusion

if TYPE_CHECKING:
    from pathlib import Path

SPEC = ClinicalSpec(
    numeric=("age",),
    ordinal={"stage": ("I", "II", "III")},
    categorical={"sex": ("female", "male")},
)
HEADER = "patient_id,event,time_days,age,stage,sex"


def _read(
    folder: Path, *rows: str, spec: ClinicalSpec = SPEC, header: str = HEADER
) -> tuple[Registry, list[Exclusion]]:
    path = folder / "clinical.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return read_registry(path, spec)


def _codes(exclusions: list[Exclusion]) -> dict[str, str]:
    return {e.patient_id: e.code for e in exclusions}


def test_covariates_and_outcome(tmp_path: Path) -> None:
    registry, exclusions = _read(
        tmp_path, "001,1,100,60,II,male", "002,0,20.5,71.5,I,female", "003,true,1,NA,,", ""
    )
    assert registry.patient_ids == ("001", "002", "003")
    assert list(registry.covariates.var_names) == ["age", "stage", "sex=male"]
    np.testing.assert_array_equal(
        registry.covariates.X, [[60, 1, 1], [71.5, 0, 0], [np.nan, np.nan, np.nan]]
    )
    assert registry.event.dtype == np.bool_
    assert registry.event.tolist() == [True, False, True]
    assert registry.time_days.dtype == np.float64
    assert registry.time_days.tolist() == [100, 20.5, 1]
    assert registry.covariates.uns["spec_fingerprint"] == SPEC.fingerprint()
    assert exclusions == []


@pytest.mark.parametrize(
    ("cell", "event"),
    [("1", True), ("0", False), ("1.0", True), ("0.0", False), ("TRUE", True), ("False", False)],
)
def test_event_forms(tmp_path: Path, cell: str, event: bool) -> None:
    registry, _ = _read(tmp_path, f"a,{cell},10,60,I,male")
    assert registry.event.tolist() == [event]


@pytest.mark.parametrize(
    ("cell", "code", "found"),
    [
        ("", "missing_event", "nothing"),
        ("NA", "missing_event", "nothing"),
        ("2", "event_not_binary", "'2'"),
        ("-1", "event_not_binary", "a number"),
        ("0.5", "event_not_binary", "a number"),
        ("dead", "event_not_binary", "'dead'"),
        ("yes", "event_not_binary", "'yes'"),
        ("died, see Dr Muster", "event_not_binary", "text"),
    ],
)
def test_event_is_never_guessed(tmp_path: Path, cell: str, code: str, found: str) -> None:
    registry, exclusions = _read(tmp_path, f'a,"{cell}",10,60,I,male', "b,1,10,60,I,male")
    assert registry.patient_ids == ("b",)
    assert _codes(exclusions) == {"a": code}
    assert f"event: found {found}, needed 1" in exclusions[0].reason


@pytest.mark.parametrize(
    ("cell", "code", "found"),
    [
        ("", "missing_time", "nothing"),
        ("NA", "missing_time", "nothing"),
        ("NaN", "time_not_finite", "nan"),
        ("inf", "time_not_finite", "'inf'"),
        ("-Infinity", "time_not_finite", "an infinite value"),
        ("1e400", "time_not_finite", "'1e400'"),
        ("0", "time_not_positive", "0 days"),
        ("-3", "time_not_positive", "-3 days"),
        ("long", "time_not_a_number", "'long'"),
        ("2020-01-31", "time_not_a_number", "a date"),
        ("12,5", "time_not_a_number", "a decimal comma"),
        ("until she moved", "time_not_a_number", "text"),
    ],
)
def test_time_is_never_guessed(tmp_path: Path, cell: str, code: str, found: str) -> None:
    registry, exclusions = _read(tmp_path, f'a,1,"{cell}",60,I,male', "b,1,10,60,I,male")
    assert registry.patient_ids == ("b",)
    assert _codes(exclusions) == {"a": code}
    assert f"time_days: found {found}, needed" in exclusions[0].reason


def test_bad_covariates_and_ids(tmp_path: Path) -> None:
    registry, exclusions = _read(
        tmp_path,
        "age,1,10,old,I,male",
        "far,1,10,inf,I,male",
        "stage,1,10,60,IV,male",
        "capitals,1,10,60,I,Male",
        "twice,1,10,60,I,male",
        "twice,0,12,60,I,male",
        ",0,12,60,I,male",
        "good,0,12,60,I,male",
    )
    assert registry.patient_ids == ("good",)
    assert _codes(exclusions) == {
        "age": "not_a_number",
        "far": "not_finite",
        "stage": "unknown_level",
        "capitals": "unknown_level",
        "twice": "duplicate_id",
        "": "missing_id",
    }
    assert len(exclusions) == 6
    reasons = {e.patient_id: e.reason for e in exclusions}
    assert reasons["stage"].startswith("stage: found another value, needed one of I, II, III;")
    assert "other capitals" in reasons["capitals"]


def test_landmark(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"landmark_days": 30.0})
    registry, exclusions = _read(
        tmp_path,
        "early,1,29,60,I,male",
        "on_it,1,30,60,I,male",
        "later,0,30.5,60,I,male",
        spec=spec,
    )
    assert registry.patient_ids == ("later",)
    assert registry.time_days.tolist() == [0.5]
    assert _codes(exclusions) == {"early": "before_landmark", "on_it": "before_landmark"}
    assert spec.fingerprint() != SPEC.fingerprint()


def test_levels_win_over_missing_markers_and_numbers_match_as_numbers(tmp_path: Path) -> None:
    spec = ClinicalSpec(
        ordinal={"pt": ("0", "1", "2")}, categorical={"therapy": ("none", "chemo", "radio")}
    )
    registry, exclusions = _read(
        tmp_path,
        "a,1,10,1.0,none",
        "b,1,10,2,radio",
        "c,1,10,,NA",
        spec=spec,
        header="patient_id,event,time_days,pt,therapy",
    )
    assert list(registry.covariates.var_names) == ["pt", "therapy=chemo", "therapy=radio"]
    np.testing.assert_array_equal(
        registry.covariates.X, [[1, 0, 0], [2, 0, 1], [np.nan, np.nan, np.nan]]
    )
    assert not exclusions


def test_column_order_follows_the_fingerprint() -> None:
    one = ClinicalSpec(ordinal={"b": ("0", "1"), "a": ("0", "1")})
    two = ClinicalSpec(ordinal={"a": ("0", "1"), "b": ("0", "1")})
    assert one.fingerprint() == two.fingerprint()
    assert one.feature_names == two.feature_names == ("a", "b")


@pytest.mark.parametrize("column", ["event", "time_days", "age", "stage", "sex", "patient_id"])
def test_missing_column_is_named(tmp_path: Path, column: str) -> None:
    header = HEADER.replace(column, "other")
    with pytest.raises(DataError, match=repr(column)) as caught:
        _read(tmp_path, "a,1,10,60,I,male", header=header)
    assert caught.value.code == "missing_column"


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "missing_file"), (b"", "empty_file"), (b"\x1f\x8b\x08\xff", "not_csv")],
)
def test_a_file_that_is_no_registry_is_refused(
    tmp_path: Path, content: bytes | None, code: str
) -> None:
    path = tmp_path / "clinical.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_registry(path, SPEC)
    assert caught.value.code == code
    assert str(tmp_path) not in str(caught.value)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "clinical.csv"
    path.write_text(f"{HEADER}\na,1,10,60,I,male\nb,0,12,6")
    with pytest.raises(DataError) as caught:
        read_registry(path, SPEC)
    assert caught.value.code == "ragged_row"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"numeric": ("age", "age")},
        {"numeric": ("event",)},
        {"numeric": ("patient_id",)},
        {"numeric": ("sex=male",), "categorical": {"sex": ("female", "male")}},
        {"ordinal": {"stage": ("I",)}},
        {"ordinal": {"stage": ("1", "1.0")}},
        {"categorical": {"sex": ("female", "")}},
        {"numeric": ("age",), "landmark_days": -1},
        {"numeric": ("age",), "landmark_days": float("nan")},
        {"numeric": ("age",), "label": "event"},
    ],
)
def test_spec_refuses_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ClinicalSpec.model_validate(fields)


@pytest.mark.parametrize(
    ("row", "changed"),
    [
        ("a,1.0,10.0,60.0,II,male", False),
        ("a,0,10,60,II,male", True),
        ("a,1,11,60,II,male", True),
        ("a,1,10,,II,male", True),
        ("a,1,10,60,II,female", True),
    ],
)
def test_digest_sees_a_changed_row(tmp_path: Path, row: str, changed: bool) -> None:
    def digest(line: str) -> str:
        registry, _ = _read(tmp_path, line, "b,1,10,60,I,male")
        return str(registry.covariates.obs["input_digest"].iloc[0])

    assert (digest(row) != digest("a,1,10,60,II,male")) is changed


_ROWS = st.tuples(
    st.sampled_from(["0", "1", "true", "dead", ""]),
    st.sampled_from(["0", "5", "10.5", "x", ""]),
    st.sampled_from(["60", "", "old"]),
    st.sampled_from(["I", "III", "V", ""]),
    st.sampled_from(["male", "female", "m"]),
).map(",".join)


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(_ROWS, min_size=1, max_size=8), data=st.data())
def test_order_of_patients_changes_order_only(
    tmp_path_factory: pytest.TempPathFactory, cells: list[str], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("c")
    rows = [f"p{i},{line}" for i, line in enumerate(cells)]
    one, out_one = _read(folder, *rows)
    two, out_two = _read(folder, *data.draw(st.permutations(rows)))
    order = [two.patient_ids.index(p) for p in one.patient_ids]
    assert set(out_one) == set(out_two)
    assert len(order) == len(two.patient_ids)
    assert len(order) + len(out_one) == len(cells)
    np.testing.assert_array_equal(one.covariates.X, two.covariates.X[order])
    np.testing.assert_array_equal(one.event, two.event[order])
    np.testing.assert_array_equal(one.time_days, two.time_days[order])
    assert bool(np.all(one.time_days > 0))


def test_extract_writes_outcome_and_covariates(tmp_path: Path) -> None:
    source = tmp_path / "clinical.csv"
    source.write_text(f"{HEADER}\n001,1,100,60,II,male\n002,dead,5,60,II,male\n")
    registry, exclusions = extract(source, tmp_path / "out", SPEC)
    stored = ad.read_h5ad(tmp_path / "out" / "clinical.h5ad")
    assert stored.obs["event"].tolist() == [True]
    assert stored.obs["time_days"].tolist() == [100.0]
    assert "event" not in registry.covariates.obs
    assert (tmp_path / "out" / "clinical.csv").read_text() == (
        "patient_id,event,time_days,age,stage,sex=male\n001,True,100.0,60.0,1.0,1.0\n"
    )
    assert pd.read_csv(tmp_path / "out" / "excluded.csv")["code"].tolist() == ["event_not_binary"]
    assert len(exclusions) == 1


def test_no_patient_left_is_still_a_registry(tmp_path: Path) -> None:
    registry, exclusions = _read(tmp_path, "a,1,0,60,I,male")
    assert registry.covariates.shape == (0, 3)
    assert registry.event.shape == registry.time_days.shape == (0,)
    assert len(exclusions) == 1


def test_real_registry_equals_pandas(shared_data: Path) -> None:
    path = shared_data / "tcga_brca_clinical" / "train.csv"
    reference = pd.read_csv(path)
    regions = tuple(sorted(reference["region"].unique()))
    spec = ClinicalSpec(
        numeric=("age_at_index",),
        ordinal={"ajcc_pathologic_t_T2": ("0", "1")},
        categorical={"region": regions},
        event="E",
        time="T",
        patient_id="pid",
        landmark_days=30.0,
    )
    registry, exclusions = read_registry(path, spec)
    kept = reference[reference["T"] > 30]
    assert registry.patient_ids == tuple(kept["pid"])
    np.testing.assert_array_equal(registry.event, kept["E"].to_numpy() == 1)
    np.testing.assert_array_equal(registry.time_days, kept["T"].to_numpy() - 30)
    indicators = pd.get_dummies(kept["region"])[list(regions[1:])].to_numpy()
    expected = np.column_stack(
        [kept["age_at_index"], kept["ajcc_pathologic_t_T2"], indicators]
    ).astype(np.float32)
    np.testing.assert_array_equal(registry.covariates.X, expected)
    codes = pd.Series([e.code for e in exclusions]).value_counts().to_dict()
    n_zero = int((reference["T"] <= 0).sum())
    assert codes.get("time_not_positive", 0) == n_zero
    assert codes["before_landmark"] == len(reference) - len(kept) - n_zero


def test_real_registry_with_the_event_in_words_is_set_aside(shared_data: Path) -> None:
    path = shared_data / "hancock_hnscc" / "targets.csv"
    spec = ClinicalSpec(
        numeric=("rfs_event",), event="survival_status", time="days_to_last_information"
    )
    registry, exclusions = read_registry(path, spec)
    assert registry.patient_ids == ()
    assert {e.code for e in exclusions} == {"event_not_binary"}
    assert len(exclusions) == len(pd.read_csv(path))
