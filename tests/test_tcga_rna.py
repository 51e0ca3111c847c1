from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
XENA_ZERO = np.log2(0.001)


def write_tcga(
    folder: Path,
    *,
    seed: int = 0,
    n: int = 240,
    n_sources: int = 12,
    n_genes: int = 300,
    n_sets: int = 12,
    lacking: float = 0.05,
) -> dict[str, Path]:
    """Files of a made-up cohort: few factors move many sets, hospitals differ, half is censored."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, n_sources + 1) ** 0.9
    source = rng.choice(n_sources, n, p=share / share.sum())
    ids = [f"TCGA-{chr(65 + c // 10)}{c % 10}-A{i:03d}" for i, c in enumerate(source)]
    age, stage = rng.normal(68, 10, n), rng.choice([2, 3, 4], n)
    factors = rng.normal(size=(n, 8))
    activity = 0.42 * factors @ rng.normal(size=(8, n_sets)) + 0.6 * rng.normal(size=(n, n_sets))
    most = min(60, n_genes // 4)
    members = [
        rng.choice(n_genes, rng.integers(most // 4, most), replace=False) for _ in range(n_sets)
    ]
    logs = rng.normal(4, 2.5, n_genes) + rng.normal(0, 1, (n, n_genes))
    logs += rng.normal(0, 0.3, (n_sources, n_genes))[source]
    for pathway, genes in enumerate(members):
        logs[:, genes] += 0.6 * activity[:, [pathway]] * rng.uniform(0.2, 1.0, len(genes))
    counts = np.where(rng.random(logs.shape) < 0.02, 0.0, 2**logs)
    hazard = 0.4 * (factors[:, 0] - factors[:, 1]) + 0.4 * ((age - 68) / 10 + (stage - 3) / 0.8)
    time = 1200 * rng.exponential(np.exp(-hazard))
    censored = 30 + rng.exponential(1000, n)
    genes = [f"GENE{i}" for i in range(n_genes)]
    rna = pd.DataFrame(np.log2(counts + 0.001), index=ids, columns=genes)
    roman = {2: "Stage II", 3: "Stage IIIA", 4: "Stage IV"}
    paths = {name: folder / f"{name}.csv" for name in ("rna", "metadata", "sets", "clinical")}
    rna[rng.random(n) >= lacking].to_csv(paths["rna"])
    pd.DataFrame(
        {
            "case_id": ids,
            "slide_id": [f"{x}-01Z-00-DX1.svs" for x in ids],
            "age": age.round(),
            "survival_months": np.minimum(time, censored) / 30.4375 + 0.1,
            "censorship": (time > censored).astype(int),
            "is_female": rng.integers(0, 2, n),
            "oncotree_code": "BLCA",
            "train": 1.0,
        }
    ).to_csv(paths["metadata"])
    pd.DataFrame(
        {f"SET_{k}": pd.Series([genes[i] for i in x]) for k, x in enumerate(members)}
    ).to_csv(paths["sets"], index=False)
    pd.DataFrame(
        {"case_id": ids, "stage": [roman[x] for x in stage], "grade": "High Grade"}
    ).to_csv(paths["clinical"], index=False)
    return paths


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Import a benchmark as `python benchmarks/NAME.py` would."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def tables(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("tcga_tables")


@pytest.fixture
def tcga(tmp_path: Path) -> dict[str, Path]:
    return write_tcga(tmp_path)


@pytest.fixture
def printed(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    def run(paths: dict[str, Path], *arguments: object) -> dict[str, Any]:
        line = [paths["rna"], paths["metadata"], "--gene-sets", paths["sets"], *arguments]
        status = load("tcga_rna").main([str(x) for x in line])
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return dict(json.loads(out))

    return run


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_every_arm_of_late_fusion_is_printed(
    tcga: dict[str, Path], printed: Callable[..., dict[str, Any]]
) -> None:
    found = printed(tcga, "--clinical", tcga["clinical"], "--folds", 2, "--n-sites", 3)
    assert len(found["sites"]) == 3
    assert all(site["trains"] for site in found["sites"].values())
    assert found["clinical_columns"] == ["age", "female", "stage"]  # every grade is the same
    assert found["outcome"] == {"time": "survival_months", "event": "censorship"}
    assert found["expression"].startswith("log2(x + 0.001)")
    assert found["pathway_scores"] == {"used": 12, "dropped": {"too few genes": 0, "smallest": 0}}
    assert found["by_modality"]["omics"]["patients"] < found["by_modality"]["clinical"]["patients"]
    assert found["by_modality"]["clinical"]["patients"] == 240
    assert found["n_folds"] == 2
    assert found["federated"]["mean"] == pytest.approx(found["pooled"]["mean"], abs=0.02)
    assert found["federated"]["mean"] > found["local"]["mean"]
    assert found["max_coefficient_gap"] < 1e-6
    assert found["lowered_minimums"]


def test_scores_are_as_many_as_the_smallest_site_can_train(
    tmp_path: Path,
    load: Callable[[str], ModuleType],
    printed: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(load("tcga_rna"), "run_splits", lambda *study: seen.append(study))
    monkeypatch.setattr(load("tcga_rna"), "report", lambda *_, **__: {})
    paths = write_tcga(tmp_path, n=150, n_sets=50)
    found = printed(paths, "--folds", 4, "--n-sites", 5)
    ((patients, protocol, splits),) = seen
    has = ~np.isnan(patients.tables["omics"]).all(axis=1)
    trained = [
        (s.train & has & (patients.site == x)).sum() for s in splits for x in set(patients.site)
    ]
    assert patients.tables["omics"].shape[1] == min(trained) < 44
    assert found["pathway_scores"]["dropped"]["smallest"] == 50 - min(trained)
    assert protocol.encoder["omics"].max_inputs == min(trained)


def test_rna_is_read_whichever_way_round(tables: ModuleType, tmp_path: Path) -> None:
    upright = write(tmp_path / "a.csv", ",TP53,EGFR\nTCGA-AA-0001,1.5,-2\nTCGA-BB-0002,0,3\n")
    lying = write(
        tmp_path / "b.csv", "Hugo_Symbol,Entrez,TCGA-AA-0001-01,TCGA.BB.0002.01A\n"
        "TP53,7157,1.5,0\nEGFR,1956,-2,3\n",
    )  # fmt: skip
    second = write(
        tmp_path / "c.csv",
        ",case_id,TP53|7157,EGFR_rnaseq\n0,TCGA-AA-0001,1.5,-2\n1,TCGA-BB-0002,0,3\n",
    )
    expected = pd.DataFrame(
        {"TP53": [1.5, 0.0], "EGFR": [-2.0, 3.0]}, index=["TCGA-AA-0001", "TCGA-BB-0002"]
    )
    for path in (upright, lying, second):
        found = tables.read_rna(path)
        pd.testing.assert_frame_equal(found.values, expected, check_names=False)
        assert found.scale == "as in the file"


def test_of_several_samples_the_first_primary_tumour_is_taken(
    tables: ModuleType, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "rna.csv",
        "sample,TP53\nTCGA-AA-0001-11,1\nTCGA-AA-0001-01,2\nTCGA-AA-0001-01,3\n"
        "TCGA-BB-0002-06,4\nTCGA-BB-0002-11,5\nNORMAL-7,6\n",
    )
    found = tables.read_rna(path)
    assert found.values["TP53"].to_dict() == {"TCGA-AA-0001": 2.0, "TCGA-BB-0002": 4.0}
    assert found.other_samples == 3


def test_a_gene_named_twice_is_averaged(tables: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "rna.csv", ",TP53,EGFR,TP53\nTCGA-AA-0001,1,9,\nTCGA-BB-0002,2,9,4\n")
    assert tables.read_rna(path).values["TP53"].tolist() == [1.0, 3.0]


def test_a_gene_that_was_not_found_counts_zero(tables: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "rna.csv", f",A,B\nTCGA-AA-0001,-9.9658,{np.log2(7.001)}\n")
    found = tables.read_rna(path)
    np.testing.assert_allclose(found.values.to_numpy(), [[0.0, 3.0]], atol=1e-4)
    assert "log2(x + 1)" in found.scale


@pytest.mark.parametrize(
    ("header", "first", "second"),
    [
        ("case_id,survival_months,censorship", "2.0,0", "4,1"),
        ("case_id,survival_days,event", "60.875,1", "121.75,0"),
        ("_PATIENT,OS,OS.time,patient", "1,60.875,TCGA-AA-0001", "0,121.75,TCGA-BB-0002"),
        ("case_id,OS_MONTHS,OS_STATUS", "2,1:DECEASED", "4,0:LIVING"),
        ("case_id,survival_months,vital_status", "2,Dead", "4,Alive"),
        ("case_id,survival_months_dss,survival_months,censorship", "9,2,0", "9,4,1.0"),
    ],
)  # fmt: skip
def test_outcome_is_read_by_known_names(
    header: str, first: str, second: str, tables: ModuleType, tmp_path: Path
) -> None:
    rows = [f"TCGA-AA-0001,{first}", f"TCGA-AA-0001,{first}", f"TCGA-BB-0002,{second}"]
    path = write(tmp_path / "metadata.csv", "\n".join([header, *rows]))
    found, _ = tables.read_outcome(path, columns=tables.OutcomeColumns())
    assert found["event"].to_dict() == {"TCGA-AA-0001": True, "TCGA-BB-0002": False}
    np.testing.assert_allclose(found["time"], [60.875, 121.75])


def test_outcome_is_read_by_names_given(tables: ModuleType, tmp_path: Path) -> None:
    path = write(tmp_path / "metadata.csv", "case_id,pfi,months\nTCGA-AA-0001,1,1\nTCGA-B1-2,0,x")
    columns = tables.OutcomeColumns(time="months", event="pfi")
    assert tables.read_outcome(path, columns=columns)[0]["event"].tolist() == [True]
    columns = tables.OutcomeColumns(time="months", censored="pfi")
    assert tables.read_outcome(path, columns=columns)[0]["event"].tolist() == [False]


def test_patients_without_outcome_are_left_out(tables: ModuleType, tmp_path: Path) -> None:
    path = write(
        tmp_path / "metadata.csv",
        "case_id,survival_days,event\nTCGA-AA-0001,0,1\nTCGA-AA-0002,,1\nTCGA-AA-0003,5,\n"
        "TCGA-AA-0004,5,0\n",
    )
    found, _ = tables.read_outcome(path, columns=tables.OutcomeColumns())
    assert found.index.tolist() == ["TCGA-AA-0004"]


@pytest.mark.parametrize(
    ("column", "cells", "expected"),
    [
        ("ajcc_pathologic_tumor_stage", ["Stage IIIA", "Stage I", "[Not Available]", "Stage X"],
         {"stage": [3, 1, np.nan, np.nan]}),
        ("stage", ["3.0", "IV", "0", "N/A"], {"stage": [3, 4, np.nan, np.nan]}),
        ("stage", ["Stage IVB", "Stage IB2", "I/II NOS", "Stage 0"],
         {"stage": [4, 1, np.nan, np.nan]}),
        ("histological_grade", ["High Grade", "Low Grade", "GX", ""],
         {"grade": [3, 1, np.nan, np.nan]}),
        ("grade", ["G3", "G1", "2", "GB"], {"grade": [3, 1, 2, np.nan]}),
        ("gender", ["FEMALE", "MALE", "", "female"], {"female": [1, 0, np.nan, 1]}),
        ("is_female", ["1.0", "0.0", "1", "0"], {"female": [1, 0, 1, 0]}),
        ("age", ["67", "n/a", "70.5", ""], {"age": [67, np.nan, 70.5, np.nan]}),
        ("age", ["67", "67", "67", "67"], {}),
        ("slide_id", ["a", "b", "c", "d"], {}),
    ],
)  # fmt: skip
def test_covariates_become_numbers(
    column: str, cells: list[str], expected: dict[str, list[float]], tables: ModuleType,
    tmp_path: Path,
) -> None:  # fmt: skip
    rows = [f"TCGA-AA-000{i},{cell}" for i, cell in enumerate(cells)]
    path = write(tmp_path / "clinical.csv", "\n".join([f"case_id,{column}", *rows]))
    found = tables.read_covariates([path])
    assert list(found) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)


def test_gene_sets_are_read_in_each_form(tables: ModuleType, tmp_path: Path) -> None:
    wide = write(tmp_path / "a.csv", ",S1,S2\n0,TP53,EGFR\n1,KRAS,\n2,TP53,nan\n")
    long = write(tmp_path / "b.csv", "gene,set\nTP53,S1\nEGFR,S2\nKRAS,S1\n")
    gmt = write(tmp_path / "c.gmt", "S1\tabout\tTP53\tKRAS\nS2\tabout\tEGFR\n")
    for path in (wide, long, gmt):
        assert tables.read_gene_sets(path) == {"S1": ("TP53", "KRAS"), "S2": ("EGFR",)}


def test_the_smallest_sets_are_dropped_whatever_the_values(tables: ModuleType) -> None:
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(30)]
    expression = pd.DataFrame(rng.normal(size=(4, 30)), columns=genes)
    sets = {"few": tuple(genes[:4]), "gone": ("X",) * 9, "b": tuple(genes[:8]),
            "a": tuple(genes[8:16]), "most": tuple(genes)}  # fmt: skip
    scores, dropped = tables.pathway_scores(expression, sets, most=2, fewest_genes=5)
    assert list(scores) == ["a", "most"]
    assert dropped == {"too few genes": 2, "smallest": 1}
    np.testing.assert_allclose(scores["most"], expression.mean(axis=1))


def test_no_patient_changes_the_score_of_another(
    load: Callable[[str], ModuleType], tables: ModuleType, tcga: dict[str, Path]
) -> None:
    expression = tables.read_rna(tcga["rna"]).values
    sets = tables.read_gene_sets(tcga["sets"])
    whole, _ = tables.pathway_scores(expression, sets, most=44, fewest_genes=5)
    part, _ = tables.pathway_scores(expression.tail(9), sets, most=44, fewest_genes=5)
    pd.testing.assert_frame_equal(whole.tail(9), part)


@given(sizes=st.lists(st.integers(1, 60), min_size=3, max_size=30), n_sites=st.integers(2, 3))
def test_packing_keeps_every_source_once(sizes: list[int], n_sites: int) -> None:
    sys.path.insert(0, str(BENCHMARKS))
    pack_sites = importlib.import_module("tcga_tables").pack_sites
    sys.path.remove(str(BENCHMARKS))
    codes = [f"{i:02d}" for i, size in enumerate(sizes) for _ in range(size)]
    groups = pack_sites(codes, n_sites)
    members = [code for group in groups.values() for code in group]
    assert sorted(members) == sorted(set(codes))
    assert len(groups) == n_sites
    patients = [sum(sizes[int(code)] for code in group) for group in groups.values()]
    assert patients == sorted(patients, reverse=True)
    assert groups == pack_sites(codes[::-1], n_sites)
    # The two smallest were merged last: taken apart again, none of the others was smaller.
    assert min(patients) >= min(sizes)


def test_the_largest_source_stays_alone(tables: ModuleType) -> None:
    groups = tables.pack_sites([*["AA"] * 9, *["BB"] * 3, *["CC"] * 2, "DD"], 2)
    assert groups == {"site_1": ("AA",), "site_2": ("BB", "CC", "DD")}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rna", "patient,TP53\nP1,1\n", "rna.csv: needed TCGA barcodes"),
        ("rna", ",TP53\nTCGA-AA-0001,\n", "found no number"),
        ("rna", ",GENEX\nTCGA-AA-0001,1\n", "gene sets: found none with 5 genes"),
        ("metadata", "case_id,age\nTCGA-AA-0001,3\n",
         "metadata.csv: found columns case_id, age, needed a column for the time: survival_days"),
        ("metadata", "case_id,survival_days\nTCGA-AA-0001,3\n", "needed a column for the event"),
        ("metadata", "id,event,survival_days\nP1,1,3\n", "found columns id, event, survival_days"),
        ("metadata", "case_id,event,survival_days\nTCGA-AA-0001,,3\n", "found no patient with"),
        ("metadata", "case_id,event,survival_days\nTCGA-AA-0001,1,3\n", "found none that varies"),
        ("sets", "\n", "sets.csv: found no gene set"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_one_sentence_and_status_2(
    name: str, text: str, said: str, tcga: dict[str, Path], request: pytest.FixtureRequest
) -> None:  # fmt: skip
    load, capsys = request.getfixturevalue("load"), request.getfixturevalue("capsys")
    write(tcga[name], text)
    line = [tcga["rna"], tcga["metadata"], "--gene-sets", tcga["sets"]]
    assert load("tcga_rna").main([str(x) for x in line]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert "TCGA-AA" not in err
    assert str(tcga[name].parent) not in err


def test_missing_files_and_too_many_sites_are_refused(tables: ModuleType, tmp_path: Path) -> None:
    for read in (tables.read_rna, tables.read_gene_sets):
        with pytest.raises(DataError, match=r"x\.csv: found no such file"):
            read(tmp_path / "x.csv")
    with pytest.raises(DataError, match="found 1 tissue source sites, needed at least 2"):
        tables.pack_sites(["AA", "AA"], 2)
