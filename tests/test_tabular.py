"""Tables: strict reading as text, one reason per patient set aside, whole files out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modalities.cohort import DataError, Exclusion
from modalities.tabular import (
    TabularSpec,
    extract,
    kind_of,
    number,
    read_patient_rows,
    read_table,
    write_table,
)

if TYPE_CHECKING:
    from pathlib import Path

SPEC = TabularSpec(columns=("a", "b"))


def _csv(folder: Path, text: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def _codes(exclusions: list[Exclusion]) -> dict[str, str]:
    return {e.patient_id: e.code for e in exclusions}


def test_reads_values_in_the_order_of_the_file_and_keeps_ids_as_text(tmp_path: Path) -> None:
    path = _csv(tmp_path, "b,patient_id,a,note\n2,002,1.5,x\n-4e1,001,.5,y\n")
    table, exclusions = read_table(path, SPEC, modality="blood")
    assert list(table.obs_names) == ["002", "001"]
    assert list(table.var_names) == ["a", "b"]
    np.testing.assert_array_equal(table.X, np.array([[1.5, 2], [0.5, -40]], dtype=np.float32))
    assert table.uns["spec_fingerprint"] == SPEC.fingerprint()
    assert exclusions == []


@pytest.mark.parametrize("marker", ["", "NA", "nan", "N/A", "null", "None", ".", "  "])
def test_missing_markers_become_nan(tmp_path: Path, marker: str) -> None:
    table, exclusions = read_table(
        _csv(tmp_path, f"patient_id,a,b\n1,{marker},3\n"), SPEC, modality="blood"
    )
    assert np.isnan(table.X[0, 0])
    assert table.X[0, 1] == 3
    assert not exclusions


def test_bad_patients_are_set_aside_and_the_others_go_on(tmp_path: Path) -> None:
    rows = [
        "patient_id,a,b",
        "good,1,2",
        "words,high,2",
        'comma,"1,5",2',
        "dated,2020-01-31,2",
        "endless,inf,2",
        "overflow,1e999,2",
        "too_big,1e39,2",
        "grouped,1_000,2",
        "empty,,NA",
        "twice,1,2",
        "twice,1,2",
        ",1,2",
    ]
    table, exclusions = read_table(_csv(tmp_path, "\n".join(rows)), SPEC, modality="blood")
    assert list(table.obs_names) == ["good"]
    assert _codes(exclusions) == {
        "words": "not_a_number",
        "comma": "not_a_number",
        "dated": "not_a_number",
        "endless": "not_finite",
        "overflow": "not_finite",
        "too_big": "not_finite",
        "grouped": "not_a_number",
        "empty": "all_missing",
        "twice": "duplicate_id",
        "": "missing_id",
    }
    assert len(exclusions) == 10
    assert {e.modality for e in exclusions} == {"blood"}


def test_reasons_name_column_and_kind_but_neither_patient_nor_cell(tmp_path: Path) -> None:
    path = _csv(tmp_path, "patient_id,a,b\nP17,Erika Muster,1\nP18,31.12.1950,1\nP19,1,1\n")
    _, exclusions = read_table(path, SPEC, modality="blood")
    assert exclusions[0].reason.startswith("a: found text, needed a number")
    assert exclusions[1].reason.startswith("a: found a date, needed a number")
    for exclusion in exclusions:
        for secret in ("P1", "Erika", "1950", str(tmp_path)):
            assert secret not in exclusion.reason


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "empty_file"),
        ("\n\n", "empty_file"),
        ("patient_id,a,b\n", "empty_file"),
        ("patient_id,a\n1,2\n", "missing_column"),
        ("Patient_ID,a,b\n1,2,3\n", "missing_column"),
        ("patient_id;a;b\n1;2;3\n", "not_csv"),
        ("patient_id\ta\tb\n1\t2\t3\n", "not_csv"),
        ("patient_id,a,b\n1,2\n", "ragged_row"),
        ("patient_id,a,b\n1,2,5,3\n", "ragged_row"),
        ("patient_id,a,b,a\n1,2,5,3\n", "duplicate_column"),
        ('patient_id,a,b\n1,2,"5\n', "not_csv"),
        ("patient_id,a,b\nM\xfcller,2,5\n".encode("latin-1"), "not_csv"),
        (b"\x89PNG\r\n\0\0", "not_csv"),
        (b"patient_id,a,b\n1,\0,2\n", "not_csv"),
    ],
)
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, content: str | bytes, code: str
) -> None:
    path = _csv(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_table(path, SPEC, modality="blood")
    assert caught.value.code == code
    assert str(tmp_path) not in str(caught.value)


def test_absent_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no file") as caught:
        read_table(tmp_path / "none.csv", SPEC, modality="blood")
    assert caught.value.code == "missing_file"
    with pytest.raises(DataError) as caught:
        read_table(tmp_path, SPEC, modality="blood")
    assert caught.value.code == "unreadable_file"


def test_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'b'"):
        read_table(_csv(tmp_path, "patient_id,a\n1,2\n"), SPEC, modality="blood")


def test_spreadsheet_exports_are_read(tmp_path: Path) -> None:
    text = '\ufeffpatient_id,a,b\r\n"1", 2 ,3\r\n,,\r\n\r\n2,4,5\r\n'
    table, exclusions = read_table(_csv(tmp_path, text), SPEC, modality="blood")
    np.testing.assert_array_equal(table.X, [[2, 3], [4, 5]])
    assert not exclusions


def test_without_columns_numeric_ones_are_taken(tmp_path: Path) -> None:
    text = "patient_id,a,word,stray,never\n1,1,x,4,\n2,2,y,5,\n3,,3,oops,\n"
    table, exclusions = read_table(_csv(tmp_path, text), TabularSpec(), modality="t")
    assert list(table.var_names) == ["a", "stray"]
    assert list(table.obs_names) == ["1", "2"]
    assert _codes(exclusions) == {"3": "not_a_number"}


def test_no_numeric_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_table(_csv(tmp_path, "patient_id,a\n1,x\n"), TabularSpec(), modality="t")
    assert caught.value.code == "no_features"


def test_digest_sees_used_values_only(tmp_path: Path) -> None:
    def digests(text: str) -> list[str]:
        table, _ = read_table(_csv(tmp_path, text), SPEC, modality="t")
        return list(table.obs["input_digest"])

    before = digests("patient_id,a,b,note\n1,1,2,x\n2,3,,x\n")
    assert digests("note,b,a,patient_id\ny,2.0,1.0,1\nz,NA,3,2\n") == before
    after = digests("patient_id,a,b\n1,1,2.5\n2,3,\n")
    assert after[0] != before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"columns": ("a", "a")},
        {"columns": ("patient_id",)},
        {"columns": ("",)},
        {"patient_id": ""},
        {"column": ("a",)},
    ],
)
def test_spec_refuses_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TabularSpec.model_validate(fields)


def test_fingerprint_follows_the_spec() -> None:
    assert SPEC.fingerprint() == TabularSpec(columns=("a", "b")).fingerprint()
    assert SPEC.fingerprint() != TabularSpec(columns=("b", "a")).fingerprint()


@given(value=st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_number_reads_what_python_writes(value: float) -> None:
    assert number(repr(value), "a") == value


@given(text=st.text(max_size=8))
def test_number_accepts_plain_finite_numbers_or_raises(text: str) -> None:
    kind = kind_of(text)
    if kind == "nothing":
        assert math.isnan(number(text, "a"))
    elif kind == "a number":
        assert math.isfinite(number(text, "a"))
    else:
        with pytest.raises(DataError, match=f"found {kind}"):
            number(text, "a")


_CELLS = st.one_of(st.floats(-1e6, 1e6, width=32).map(repr), st.sampled_from(["", "NA", "word"]))


@settings(max_examples=50, deadline=None)
@given(cells=st.lists(st.tuples(_CELLS, _CELLS), min_size=1, max_size=8), data=st.data())
def test_order_of_patients_changes_order_only(
    tmp_path_factory: pytest.TempPathFactory,
    cells: list[tuple[str, str]],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("t")
    rows = [f"p{i},{a},{b}" for i, (a, b) in enumerate(cells)]
    shuffled = data.draw(st.permutations(rows))
    one, out_one = read_table(
        _csv(folder, "\n".join(["patient_id,a,b", *rows])), SPEC, modality="t"
    )
    two, out_two = read_table(
        _csv(folder, "\n".join(["patient_id,a,b", *shuffled])), SPEC, modality="t"
    )
    assert set(out_one) == set(out_two)
    assert set(one.obs_names) == set(two.obs_names)
    np.testing.assert_array_equal(one.X, two[one.obs_names].X)
    assert list(one.obs["input_digest"]) == list(two[one.obs_names].obs["input_digest"])


def test_rows_as_text(tmp_path: Path) -> None:
    rows, exclusions = read_patient_rows(
        _csv(tmp_path, "id,x\n01, hi \n02,\n"), columns=["x"], patient_id="id", modality="m"
    )
    assert rows == {"01": {"id": "01", "x": "hi"}, "02": {"id": "02", "x": ""}}
    assert exclusions == []


def test_extract_writes_a_folder(tmp_path: Path) -> None:
    source = _csv(tmp_path, "patient_id,a,b\n001,15.3999996185,\n002,x,1\n")
    table, exclusions = extract(source, tmp_path / "out", SPEC, modality="blood")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "blood.h5ad",
        "blood.csv",
        "excluded.csv",
    }
    stored = ad.read_h5ad(tmp_path / "out" / "blood.h5ad")
    np.testing.assert_array_equal(stored.X, table.X)
    assert list(stored.obs["input_digest"]) == list(table.obs["input_digest"])
    assert (tmp_path / "out" / "blood.csv").read_text() == "patient_id,a,b\n001,15.4,\n"
    excluded = pd.read_csv(tmp_path / "out" / "excluded.csv", dtype=str)
    assert excluded.to_dict("records") == [vars(exclusions[0])]


def test_extract_writes_one_file(tmp_path: Path) -> None:
    source = _csv(tmp_path, "patient_id,a,b\n001,1,2\n")
    extract(source, tmp_path / "new" / "blood.h5ad", SPEC, modality="blood")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["blood.h5ad"]


def test_no_patient_left_is_still_a_table(tmp_path: Path) -> None:
    source = _csv(tmp_path, "patient_id,a,b\n001,x,2\n")
    table, exclusions = extract(source, tmp_path / "out", SPEC, modality="blood")
    assert table.shape == (0, 2)
    assert ad.read_h5ad(tmp_path / "out" / "blood.h5ad").shape == (0, 2)
    assert len(exclusions) == 1


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _csv(tmp_path, "patient_id,a,b\n001,1,2\n")
    table, _ = read_table(source, SPEC, modality="blood")
    out = tmp_path / "blood.h5ad"
    out.write_bytes(b"old")

    def broken(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(ad.AnnData, "write_h5ad", broken)
    with pytest.raises(OSError, match="disk full"):
        write_table(table, out, [], name="blood")
    assert out.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {"table.csv", "blood.h5ad"}


def test_real_blood_values_equal_those_of_pandas(shared_data: Path) -> None:
    path = shared_data / "hancock_hnscc" / "blood.csv"
    table, exclusions = read_table(path, TabularSpec(), modality="blood")
    reference = pd.read_csv(path, dtype={"patient_id": str}).set_index("patient_id")
    complete = reference.dropna(how="all")
    assert table.obs_names[0] == "001"
    assert list(table.obs_names) == list(complete.index)
    assert list(table.var_names) == list(complete.columns)
    np.testing.assert_array_equal(table.X, complete.to_numpy(dtype=np.float32))
    assert {e.code for e in exclusions} <= {"all_missing"}
    assert len(exclusions) == len(reference) - len(complete)
