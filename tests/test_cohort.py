from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modalities.cohort import (
    DataError,
    Exclusion,
    assemble,
    assign_splits,
    cohort_digest,
    feature_table,
    keyed_unit,
    read_cohort,
    read_cohort_digest,
    read_manifest,
    rows_of,
    validate_cohort,
    write_cohort,
    write_exclusions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData

MODALITIES = ("pathology", "radiology")
IDS = ("p1", "p2", "p3", "p4")


def manifest(folder: Path, *rows: str, header: str = "patient_id,modality,path") -> Path:
    path = folder / "manifest.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    (folder / "a.tif").touch()
    (folder / "b.tif").touch()
    return path


def table(ids: Sequence[str], name: str = "x", fill: float = 1.0) -> AnnData:
    return feature_table(
        ids,
        [f"{name}{i}" for i in range(2)],
        np.full((len(ids), 2), fill),
        input_digests=[f"digest of {x}" for x in ids],
        spec_fingerprint=f"spec of {name}",
    )


def outcome(ids: Sequence[str] = IDS, **columns: Any) -> pd.DataFrame:
    n = len(ids)
    values = {
        "event": [i % 2 == 0 for i in range(n)],
        "time_days": [100.5 + i for i in range(n)],
        "split": ["train" if i % 3 else "test" for i in range(n)],
        "fold_unit": [i / n for i in range(n)],
    }
    return pd.DataFrame(values | columns, index=pd.Index(ids, dtype=str))


def cohort(outcomes: pd.DataFrame | None = None, **tables: AnnData) -> Any:
    tables = tables or {"pathology": table(["p3", "p1"]), "clinical": table(IDS, "c")}
    return assemble(
        tables, outcome() if outcomes is None else outcomes, protocol_fingerprint="protocol"
    )


def test_a_manifest_is_read_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "mask.nii").touch()
    path = manifest(
        tmp_path,
        "001, pathology ,a.tif,,",
        "p2,radiology,b.tif,mask.nii,GTV",
        "p2,genomics,nowhere,,",
        f"p3,pathology,{tmp_path / 'a.tif'},,",
        header="patient_id,modality,path,mask_path,roi",
    )
    rows, exclusions = read_manifest(path, MODALITIES)
    assert not exclusions
    assert [(r.patient_id, r.modality, r.path, r.mask_path, r.roi) for r in rows] == [
        ("001", "pathology", tmp_path / "a.tif", None, None),
        ("p2", "radiology", tmp_path / "b.tif", tmp_path / "mask.nii", "GTV"),
        ("p3", "pathology", tmp_path / "a.tif", None, None),
    ]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (",pathology,a.tif,,", "no_patient_id"),
        ("p1,pathology,,,", "missing_file"),
        ("p1,pathology,nowhere.tif,,", "missing_file"),
        ("p1,pathology," + "long" * 200 + ",,", "missing_file"),
        ("p1,radiology,a.tif,nowhere.nii,", "missing_file"),
    ],
)
def test_each_fault_of_a_row_sets_one_input_aside(tmp_path: Path, row: str, code: str) -> None:
    header = "patient_id,modality,path,mask_path,roi"
    path = manifest(tmp_path, "p0,pathology,a.tif,,", "", row, header=header)
    rows, exclusions = read_manifest(path, MODALITIES)
    assert [r.patient_id for r in rows] == ["p0"]
    assert [e.code for e in exclusions] == [code]
    reason = exclusions[0].reason
    assert reason.startswith("manifest line 4: ")
    assert "nowhere" not in reason
    assert str(tmp_path) not in reason


def test_a_repeated_input_is_set_aside_in_all_its_rows(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        "p1,pathology,a.tif",
        "p1,pathology,a.tif",
        "p1,pathology,b.tif",
        "p2,pathology,a.tif",
    )
    rows, exclusions = read_manifest(path, MODALITIES)
    assert [(r.patient_id, r.path.name) for r in rows] == [("p1", "b.tif"), ("p2", "a.tif")]
    assert [e.code for e in exclusions] == ["duplicate_row"] * 2


@pytest.mark.parametrize("ending", ["", ","])
def test_commas_at_the_end_of_rows_change_nothing(tmp_path: Path, ending: str) -> None:
    rows, exclusions = read_manifest(
        manifest(tmp_path, f"p1,pathology,a.tif{ending}", f"p2,pathology,b.tif{ending}"), MODALITIES
    )
    assert [r.patient_id for r in rows] == ["p1", "p2"]
    assert not exclusions


def test_a_manifest_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = manifest(tmp_path, "p1,pathology,a.tif", header="\ufeffpatient_id,modality,path")
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    rows, exclusions = read_manifest(path, MODALITIES)
    assert [r.patient_id for r in rows] == ["p1"]
    assert not exclusions


def test_an_empty_manifest_has_no_rows(tmp_path: Path) -> None:
    assert read_manifest(manifest(tmp_path), MODALITIES) == ([], [])


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "missing_manifest"),
        (b"", "unreadable_manifest"),
        (b"\xff\xfe\x00", "unreadable_manifest"),
        (b"patient_id,modality,path\np1,pathology,a,b.tif\n", "unreadable_manifest"),
        (b"patient_id,modality,path\np1,pathology,a\np1,pathology,a,b,c\n", "unreadable_manifest"),
        (b"patient_id;modality;path\n", "missing_column"),
        (b"patient_id,path\np1,a.tif\n", "missing_column"),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    tmp_path: Path, content: bytes | None, code: str
) -> None:
    path = tmp_path / "manifest.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_manifest(path, MODALITIES)
    assert error.value.code == code
    assert str(tmp_path) not in str(error.value)
    assert "\n" not in str(error.value)


def test_exclusions_are_written_sorted_and_once(tmp_path: Path) -> None:
    faults = [Exclusion("p2", "omics", "c", "x, y"), Exclusion("p1", "omics", "c", 'a "b"')]
    write_exclusions([*faults, faults[0]], tmp_path / "excluded.csv")
    found = pd.read_csv(tmp_path / "excluded.csv", dtype=str)
    assert found.to_dict("records") == [asdict(faults[1]), asdict(faults[0])]
    write_exclusions([], tmp_path / "excluded.csv")
    assert (tmp_path / "excluded.csv").read_text() == "patient_id,modality,code,reason\n"


@pytest.mark.parametrize(
    ("ids", "names", "shape", "code"),
    [
        (["a", "a"], ["x"], (2, 1), "duplicate"),
        (["a", "b"], ["x", "x"], (2, 2), "duplicate"),
        (["a"], ["x"], (2, 1), "shape"),
        (["a"], ["x"], (1, 2), "shape"),
    ],
)
def test_a_feature_table_is_checked(
    ids: list[str], names: list[str], shape: tuple[int, int], code: str
) -> None:
    with pytest.raises(DataError) as error:
        feature_table(ids, names, np.zeros(shape), input_digests=ids, spec_fingerprint="spec")
    assert error.value.code == code


def test_keyed_units_are_uniform_and_hang_on_secret_purpose_and_patient() -> None:
    ids = [f"p{i}" for i in range(4000)]
    units = np.array([keyed_unit(b"secret", "split", x) for x in ids])
    assert ((units >= 0) & (units < 1)).all()
    counts = np.histogram(units, bins=20, range=(0, 1))[0]
    assert ((counts - 200.0) ** 2 / 200).sum() < 43.8  # chi-square, 19 degrees: p > 0.001
    for secret, purpose in ((b"other", "split"), (b"secret", "fold")):
        other = np.array([keyed_unit(secret, purpose, x) for x in ids])
        assert abs(np.corrcoef(units, other)[0, 1]) < 0.06
    assert keyed_unit(b"secret", "split", "p1") == units[1]
    assert keyed_unit(b"s", "a", "b\0c") != keyed_unit(b"s", "a\0b", "d")


@given(
    st.lists(st.text(min_size=1, max_size=4), unique=True, max_size=30),
    st.integers(0, 30),
    st.binary(min_size=1),
    st.floats(0.06, 0.59),
)
def test_an_assignment_is_for_ever(
    ids: list[str], n_before: int, secret: bytes, fraction: float
) -> None:
    before = ids[:n_before]
    splits = assign_splits(before, secret=b"first", test_fraction=0.3, known={})
    known = dict(zip(before, splits, strict=True))
    after = dict(
        zip(
            ids, assign_splits(ids, secret=secret, test_fraction=fraction, known=known), strict=True
        )
    )
    assert {x: after[x] for x in before} == known
    assert set(after.values()) <= {"train", "test"}


def test_the_share_of_test_patients_is_as_asked() -> None:
    ids = [f"p{i}" for i in range(3000)]
    splits = assign_splits(ids, secret=b"secret", test_fraction=0.3, known={})
    assert np.mean([s == "test" for s in splits]) == pytest.approx(0.3, abs=0.03)


def test_patients_without_a_modality_stay_and_those_without_an_outcome_go() -> None:
    found = cohort(
        outcome(("p2", "p1", "gone")), pathology=table(["p1", "p9"]), clinical=table(["p2"], "c")
    )
    assert list(found.obs_names) == ["p2", "p1"]
    assert rows_of(found, "pathology").tolist() == [-1, 0]
    assert rows_of(found, "clinical").tolist() == [0, -1]
    assert rows_of(found, "omics").tolist() == [-1, -1]


def test_a_cohort_reads_back_as_written(tmp_path: Path) -> None:
    features = table(["p3", "p1"])
    features.X[0, 0] = np.nan
    features.obs["bag"] = ["pathology/a.h5;pathology/b.h5", "pathology/c.h5"]
    written = cohort(pathology=features, clinical=table(IDS, "x"))  # names repeat over modalities
    path = tmp_path / "cohort.h5mu"
    write_cohort(written, path)
    found = read_cohort(path)
    pd.testing.assert_frame_equal(
        found.obs[["event", "time_days", "split", "fold_unit"]],
        outcome(), check_names=False, check_dtype=False,
    )  # fmt: skip
    assert found.obs["event"].dtype == bool
    assert set(found.mod) == {"pathology", "clinical"}
    for name, modality in written.mod.items():
        np.testing.assert_array_equal(found.mod[name].X, modality.X)
        assert list(found.mod[name].obs_names) == list(modality.obs_names)
        assert list(found.mod[name].var_names) == list(modality.var_names)
    assert list(found.mod["pathology"].obs["bag"]) == list(features[["p1", "p3"]].obs["bag"])
    assert found.uns["protocol_fingerprint"] == "protocol"
    assert cohort_digest(found) == found.uns["cohort_digest"] == written.uns["cohort_digest"]
    assert read_cohort_digest(path) == written.uns["cohort_digest"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        ({"time_days": [1.0, 0.0, 2.0, 3.0]}, "outcome"),
        ({"time_days": [1.0, np.nan, 2.0, 3.0]}, "outcome"),
        ({"time_days": [1.0, np.inf, 2.0, 3.0]}, "outcome"),
        ({"event": [0, 1, 0, 1]}, "outcome"),
        ({"split": ["train", "Test", "train", "test"]}, "split"),
    ],
)
def test_a_cohort_that_breaks_its_contract_is_refused(columns: dict[str, Any], code: str) -> None:
    with pytest.raises(DataError) as error:
        cohort(outcome(**columns))
    assert error.value.code == code


def test_an_empty_cohort_is_refused() -> None:
    with pytest.raises(DataError) as error:
        cohort(outcome(("p8", "p9")))
    assert error.value.code == "empty_cohort"


def test_a_modality_without_digests_is_refused() -> None:
    found = cohort()
    del found.mod["clinical"].obs["input_digest"]
    with pytest.raises(DataError) as error:
        validate_cohort(found)
    assert error.value.code == "digest"


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(4)), st.permutations(range(2)))
def test_the_digest_does_not_see_the_order_of_rows(rows: list[int], slides: list[int]) -> None:
    ids, bags = [IDS[i] for i in rows], [("p3", "p1")[i] for i in slides]
    found = cohort(outcome().loc[ids], clinical=table(ids, "c"), pathology=table(bags))
    assert list(found.obs_names) == ids
    assert cohort_digest(found) == cohort_digest(cohort())


def test_the_digest_sees_every_outcome_input_and_spec() -> None:
    digests = [cohort_digest(cohort())]
    for column, value in (("event", False), ("time_days", 100.25), ("split", "train")):
        changed = outcome()
        changed.loc["p1", column] = value
        digests.append(cohort_digest(cohort(changed)))
    other_input, other_spec = table(["p3", "p1"]), table(["p3", "p1"])
    other_input.obs.loc["p3", "input_digest"] = "another"
    other_spec.uns["spec_fingerprint"] = "another"
    clinical = table(IDS, "c")
    for pathology in (other_input, other_spec, table(["p3"]), table(["p3", "p2"])):
        digests.append(cohort_digest(cohort(pathology=pathology, clinical=clinical)))
    digests.append(cohort_digest(cohort(radiology=table(["p3", "p1"]), clinical=clinical)))
    digests.append(cohort_digest(cohort(outcome(IDS[:3]))))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_a_damaged_cohort_is_one_sentence(tmp_path: Path, share: float) -> None:
    path = tmp_path / "cohort.h5mu"
    write_cohort(cohort(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for read in (read_cohort, read_cohort_digest):
        with pytest.raises(DataError) as error:
            read(path)
        assert error.value.code == "damaged_cohort"
        assert str(tmp_path) not in str(error.value)


def test_a_missing_or_foreign_cohort_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "cohort.h5mu"
    for read in (read_cohort, read_cohort_digest):
        with pytest.raises(DataError, match="found none"):
            read(path)
    table(IDS).write_h5ad(path)
    for read in (read_cohort, read_cohort_digest):
        with pytest.raises(DataError, match="damaged"):
            read(path)


def test_a_misspelt_modality_is_set_aside_and_a_foreign_one_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "manifest.csv").write_text(
        "patient_id,modality,path\na,radiolgy,ct\nb,Radiology,ct\nc,genomics,ct\nd,radiology,ct\n"
    )
    rows, exclusions = read_manifest(tmp_path / "manifest.csv", ["radiology", "omics"])
    assert [row.patient_id for row in rows] == ["d"]
    found = {(e.patient_id, e.modality, e.code) for e in exclusions}
    assert found == {(x, "radiology", "unknown_modality") for x in "ab"}
    assert "did you mean radiology?" in exclusions[0].reason
