from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
BLOOD = ("Hemoglobin [Mass/volume] in Blood", "Platelets [#/volume] in Blood")


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Import a benchmark as `python benchmarks/NAME.py` would."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture
def printed(
    load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    def run(name: str, *arguments: object) -> dict[str, Any]:
        assert load(name).main([str(x) for x in arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return dict(json.loads(out))

    return run


def _outcome(hazard: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    time = rng.exponential(1500 * np.exp(-hazard)) + 1
    censored = rng.uniform(200, 4000, len(time))
    return time <= censored, np.minimum(time, censored).round() + 1


@pytest.fixture
def brca(tmp_path: Path) -> Path:
    """Table like the real one: age unscaled, an indicator that only one site has, a tiny site."""
    rng = np.random.default_rng(1)
    n = 330
    region = np.repeat(["West", "South", "Canada"], [160, 160, 10])
    age, stage = rng.normal(60, 12, n), rng.integers(0, 2, n)
    event, time = _outcome(0.05 * (age - 60) + stage, rng)
    event[-8:] = False
    time[0] = 0
    table = pd.DataFrame(
        {
            "region": region,
            "pid": [f"P{i}" for i in range(n)],
            "age_at_index": age.round(),
            "stage_Stage IIIC": stage,
            "race_asian": (region == "South") & (rng.random(n) < 0.05),
            "always": 1,
            "E": event,
            "T": time,
        }
    )
    path = tmp_path / "brca.csv"
    table.astype({"race_asian": int, "E": float}).to_csv(path, index=False)
    return path


@pytest.fixture
def hancock(tmp_path: Path) -> Path:
    """Folder like the real one: patients who lack a modality, a site of two, rare categories."""
    rng = np.random.default_rng(2)
    n = 272
    ids = [f"{i:03d}" for i in range(n)]
    place = np.r_[np.zeros(2, int), np.tile([1, 2], 135)]
    haemoglobin, nodes = rng.normal(14, 1.5, n), rng.poisson(2, n)
    event, time = _outcome(-0.5 * (haemoglobin - 14) + 0.3 * nodes, rng)
    report = {
        column: rng.integers(0, 2, n)
        for column in (
            "perinodal_invasion", "lymphovascular_invasion_L", "vascular_invasion_V",
            "perineural_invasion_Pn", "carcinoma_in_situ", "resection_status_carcinoma_in_situ",
        )
    } | {
        "primary_tumor_site": place,
        "grading": rng.integers(0, 4, n),
        "hpv_association_p16": rng.integers(0, 3, n),
        "resection_status": rng.integers(0, 4, n),
        "histologic_type": rng.choice([0, 3, 4, 5], n, p=[0.01, 0.3, 0.5, 0.19]),
        "number_of_positive_lymph_nodes": nodes,
        "infiltration_depth_in_mm": rng.gamma(2, 4, n),
        "pT_stage": rng.integers(0, 9, n),
        "pN_stage": rng.integers(0, 10, n),
    }  # fmt: skip
    clinical = {
        "sex": rng.integers(0, 2, n),
        "primarily_metastasis": np.where(rng.random(n) < 0.1, np.nan, 0),
        "smoking_status": rng.integers(0, 4, n),
        "age_at_initial_diagnosis": rng.integers(40, 80, n),
    }
    tables = {
        "clinical": clinical,
        "pathological": report,
        "blood": {BLOOD[0]: haemoglobin, BLOOD[1]: rng.normal(250, 60, n)},
        "tma_cell_density": {
            x: rng.gamma(1, 500, n) for x in ("cd3_z", "cd3_inv", "cd8_z", "cd8_inv")
        },
        "targets": {
            "recurrence": np.where(event, "yes", "no"),
            "survival_status": np.where(event, "deceased", "living"),
            "days_to_last_information": time.astype(int),
        },
    }
    for name, columns in tables.items():
        table = pd.DataFrame({"patient_id": ids, **columns})
        lacking = (
            table.index % 10 == 0 if name in ("blood", "tma_cell_density") else table.index < 0
        )
        table[~lacking].to_csv(tmp_path / f"{name}.csv", index=False)
    np.savez(
        tmp_path / "he_embeddings.npz",
        patient_id=np.array(ids[3:]),
        embedding=rng.normal(size=(n - 3, 20)).astype(np.float32),
    )
    return tmp_path


def _values(found: dict[str, Any]) -> list[float]:
    arms = [found[arm] for arm in ("federated", "pooled")]
    return [arm[x]["value"] for arm in arms for x in ("pooled_test", "within_site")]


def test_brca_prints_every_arm(brca: Path, printed: Callable[..., dict[str, Any]]) -> None:
    found = printed("tcga_brca", brca, "--folds", 2)
    assert found["excluded"] == {"no follow-up": 1}
    assert found["sites"]["Canada"]["trains"] is False
    assert found["sites"]["West"]["patients"] == 159
    assert found["local"]["no_local_model"] == ["Canada"]
    assert found["federated"]["by_site"]["Canada"] is None  # 2 events
    assert [x.split()[0] for x in found["lowered_minimums"]] == [
        "events", "patients_per_input", "cell",
    ]  # fmt: skip
    assert min(_values(found)) > 0.6
    assert found["max_coefficient_gap"] < 1e-6
    assert found["rounds"] <= 10
    # One modality shared as sums: pooling the rows can add nothing.
    assert found["federated"]["pooled_test"] == pytest.approx(found["pooled"]["pooled_test"])


def test_brca_is_the_same_again_and_another_with_another_seed(
    brca: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    first, again, other = (
        printed("tcga_brca", brca, "--folds", 2, "--seed", seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first["federated"] != other["federated"]


def test_brca_fits_one_file_and_scores_another(
    brca: Path, tmp_path: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    table = pd.read_csv(brca)
    held_out = table.index % 4 == 0
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    table[~held_out].to_csv(train, index=False)
    table[held_out].iloc[:, ::-1].to_csv(test, index=False)  # columns are found by name
    found = printed("tcga_brca", train, "--test", test)
    assert found["validation"] == {"test": "second file"}
    assert min(_values(found)) > 0.6
    table.loc[held_out, "E"] = 1 - table.loc[held_out, "E"]
    table[held_out].to_csv(test, index=False)
    other = printed("tcga_brca", train, "--test", test)
    assert other["max_coefficient_gap"] == found["max_coefficient_gap"]


def test_concordance_over_all_pairs_is_that_of_lifelines(
    brca: Path, load: Callable[[str], ModuleType]
) -> None:
    tcga, cross_validation, figures = map(load, ("tcga_brca", "cross_validation", "figures"))
    patients, columns, _ = tcga.read_patients(brca)
    protocol = tcga.protocol_of(columns, seed=0)
    splits = cross_validation.cross_validation(patients, n_folds=2, repeats=1, seed=0)
    (scored,) = cross_validation.run_splits(patients, protocol, splits[:1])
    found = figures.report(patients, protocol, [scored], arms=["federated"])
    rows, log_hazard = scored.rows, scored.arms["federated"]
    assert sorted(rows) == np.flatnonzero(~splits[0].train).tolist()
    expected = concordance_index(patients.time[rows], -log_hazard, patients.event[rows])
    assert found["federated"]["pooled_test"]["value"] == pytest.approx(expected, abs=1e-6)


def test_folds_hold_everyone_out_once_and_share_out_the_events(
    brca: Path, load: Callable[[str], ModuleType]
) -> None:
    patients = load("tcga_brca").read_patients(brca)[0]
    splits = load("cross_validation").cross_validation(patients, n_folds=5, repeats=2, seed=3)
    for repeat in (0, 1):
        held_out = np.array([~s.train for s in splits if s.repeat == repeat])
        assert (held_out.sum(axis=0) == 1).all()
        for site in set(patients.site):
            events = held_out.astype(int) @ ((patients.site == site) & patients.event).astype(int)
            assert np.ptp(events) <= 1


@pytest.mark.parametrize("sites", ["tumour_site", "random"])
def test_hancock_prints_every_arm_and_modality(
    sites: str, hancock: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    found = printed("hancock", hancock, "--folds", 2, "--sites", sites, "--n-sites", 2)
    assert "pseudo-sites of one institution" in found["consortium"]
    assert found["excluded"] == {"pseudo-site too small": 2 if sites == "tumour_site" else 0}
    assert len(found["sites"]) == 2
    assert set(found["by_modality"]) == {
        "blood", "cell_density", "clinical", "he_embedding", "pathology_report",
    }  # fmt: skip
    assert found["by_modality"]["blood"]["patients"] < found["by_modality"]["clinical"]["patients"]
    assert min(_values(found)) > 0.6
    assert found["by_modality"]["blood"]["within_site"]["value"] > 0.6
    assert found["max_coefficient_gap"] < 1e-6
    assert found["rounds"] <= 10


def test_no_outcome_is_among_the_inputs(hancock: Path, load: Callable[[str], ModuleType]) -> None:
    module = load("hancock")
    before = module.read_tables(hancock, sites="random")
    targets = pd.read_csv(hancock / "targets.csv", dtype=str)
    targets["recurrence"] = "unknown"
    targets["survival_status"] = "living"
    targets.to_csv(hancock / "targets.csv", index=False)
    after = module.read_tables(hancock, sites="random")
    for name, table in before.items():
        pd.testing.assert_frame_equal(table, after[name])


def test_codes_are_not_read_as_sizes(hancock: Path, load: Callable[[str], ModuleType]) -> None:
    codes = pd.read_csv(hancock / "pathological.csv", dtype={"patient_id": str})
    table = load("hancock").read_tables(hancock, sites="random")["pathology_report"]
    hpv_related = (codes["grading"] == 3).to_numpy()
    assert table["grade"].isna().to_numpy().tolist() == hpv_related.tolist()
    assert set(table["t_stage"].dropna()) <= {0, 1, 2, 3, 4}
    assert set(table["n_stage"].dropna()) == {0, 1, 2, 3}
    assert set(table.filter(like="tumour_site").sum(axis=1)) <= {0.0, 1.0}
    sites = load("hancock").read_tables(hancock, sites="tumour_site")["pathology_report"]
    assert list(sites.filter(like="tumour_site").columns) == []


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("tcga_brca", lambda p: p.unlink(), "brca.csv: found no such file"),
        ("tcga_brca", lambda p: p.write_text("region,pid,E\nWest,P1,0\n"), "column 'T'"),
        ("tcga_brca", lambda p: p.write_text("region,pid,age,E,T\n"), "found no row"),
        ("tcga_brca", lambda p: p.write_text("region,pid,age,E,T\nW,P,old,0,9\n"), "column 'age'"),
        ("tcga_brca", lambda p: p.write_text("region,pid,age,E,T\nW,P,,0,9\n"), "an empty cell"),
        ("hancock", lambda p: (p / "blood.csv").unlink(), "blood.csv: found no such file"),
        ("hancock", lambda p: (p / "he_embeddings.npz").unlink(), "he_embeddings.npz: found no"),
        ("hancock", lambda p: (p / "he_embeddings.npz").write_bytes(b"PK"), "an archive"),
        (
            "hancock",
            lambda p: (p / "targets.csv").write_text("patient_id,survival_status\n1,gone\n"),
            "column 'days_to_last_information'",
        ),
    ],
)
def test_what_cannot_run_is_one_sentence_and_status_2(
    name: str, damage: Callable[[Path], object], said: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue({"tcga_brca": "brca", "hancock": "hancock"}[name])
    load, capsys = request.getfixturevalue("load"), request.getfixturevalue("capsys")
    damage(path)
    assert load(name).main([str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert str(path.parent) not in err


def test_impossible_options_are_refused(
    brca: Path, load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        load("tcga_brca").main([str(brca), "--folds", "1"])
    assert "found '1', needed a number from 2" in capsys.readouterr().err


@pytest.mark.slow
def test_six_regions_gain_from_each_other(
    shared_data: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    found = printed("tcga_brca", shared_data / "tcga_brca_clinical" / "train.csv")
    _consortium_gains(found)
    assert found["federated"]["pooled_test"] == pytest.approx(found["pooled"]["pooled_test"])


@pytest.mark.slow
@pytest.mark.parametrize("sites", ["tumour_site", "random"])
def test_pseudo_sites_gain_from_each_other(
    sites: str, shared_data: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    found = printed("hancock", shared_data / "hancock_hnscc", "--sites", sites)
    _consortium_gains(found)
    within = [found[arm]["within_site"]["value"] for arm in ("federated", "pooled")]
    assert within[0] == pytest.approx(within[1], abs=0.02)


def _consortium_gains(found: dict[str, Any]) -> None:
    federated, local = found["federated"], found["local"]
    assert federated["pooled_test"]["value"] > local["pooled_test"]["value"] + 0.03
    assert federated["within_site"]["value"] > local["within_all_sites"]["value"] + 0.03
    assert federated["pooled_test"]["value"] > 0.65
    assert found["max_coefficient_gap"] <= 1e-6
    assert found["rounds"] <= 10
