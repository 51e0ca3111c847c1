from __future__ import annotations

import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index

from infra.settings import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from fusion.federation import Fitted

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
    events = {site: counted["events"] for site, counted in found["sites"].items()}
    assert found["federated"]["events_by_site"] == events
    assert found["n_folds"] == 2
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
    for arm in ("federated", "pooled"):
        assert found[arm]["mean"] == found[arm]["pooled_test"]["value"]
        assert found[arm]["sd"] is None
    assert found["n_folds"] == 1
    table.loc[held_out, "E"] = 1 - table.loc[held_out, "E"]
    table[held_out].to_csv(test, index=False)
    other = printed("tcga_brca", train, "--test", test)
    assert other["max_coefficient_gap"] == found["max_coefficient_gap"]


def test_an_index_column_and_known_patients_of_a_test_file_do_no_harm(
    brca: Path, tmp_path: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    table = pd.read_csv(brca)
    held_out = table.index % 4 == 1
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    table[~held_out].to_csv(train)
    table[held_out].to_csv(test, index=False)
    found = printed("tcga_brca", train, "--test", test)
    again = pd.concat([table[held_out], table[~held_out].tail(5)])
    again = pd.concat([again, again.head(3).assign(T=0)])
    again.to_csv(test)
    other = printed("tcga_brca", train, "--test", test)
    assert other["federated"] == found["federated"]
    assert other["excluded"] == {"no follow-up": 1 + 3, "also in the first file": 5}


def test_a_small_site_has_its_figure_too(
    brca: Path, tmp_path: Path, printed: Callable[..., dict[str, Any]]
) -> None:
    table = pd.read_csv(brca)
    at = table.index[table["region"] == "Canada"]
    table.loc[at[:3], ["E", "T"]] = [[1, 100.0], [1, 200.0], [0, 300.0]]
    held_out = (table.index % 3 == 0) | (table["region"] == "Canada")
    train, test = tmp_path / "train.csv", tmp_path / "test.csv"
    table[~held_out].to_csv(train, index=False)
    table[held_out].to_csv(test, index=False)
    arm = printed("tcga_brca", train, "--test", test)["federated"]
    assert arm["events_by_site"]["Canada"] == 2
    assert set(arm["by_site"]) == {"Canada", "South", "West"}
    assert arm["site_mean"] == pytest.approx(np.mean(list(arm["by_site"].values())), abs=1e-5)


def test_mean_and_sd_are_over_folds(brca: Path, load: Callable[[str], ModuleType]) -> None:
    tcga, cross_validation, figures = map(load, ("tcga_brca", "cross_validation", "figures"))
    table = tcga.read_patients(brca)
    patients, protocol = table.patients, tcga.protocol_of(table.columns, seed=0)
    splits = cross_validation.cross_validation(patients, n_folds=3, repeats=1, seed=0)
    scored = cross_validation.run_splits(patients, protocol, splits)
    found = figures.report(patients, protocol, scored, arms=["federated"])

    def lifelines(one: Any, log_hazard: np.ndarray) -> float:
        rows = one.rows
        return float(concordance_index(patients.time[rows], -log_hazard, patients.event[rows]))

    expected = [lifelines(one, one.arms["federated"]) for one in scored]
    local = [np.mean([lifelines(one, x) for x in one.local.values()]) for one in scored]
    for arm, values in (("federated", expected), ("local", local)):
        assert found[arm]["mean"] == pytest.approx(np.mean(values), abs=2e-6)
        assert found[arm]["sd"] == pytest.approx(np.std(values, ddof=1), abs=2e-6)
    assert found["n_folds"] == 3


def test_concordance_over_all_pairs_is_that_of_lifelines(
    brca: Path, load: Callable[[str], ModuleType]
) -> None:
    tcga, cross_validation, figures = map(load, ("tcga_brca", "cross_validation", "figures"))
    table = tcga.read_patients(brca)
    patients, protocol = table.patients, tcga.protocol_of(table.columns, seed=0)
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
    patients = load("tcga_brca").read_patients(brca).patients
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


def test_a_larger_consortium_costs_in_proportion_and_no_patient_is_sent(
    printed: Callable[..., dict[str, Any]], load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(load("federation"), "_FEW_PATIENTS", 200)
    monkeypatch.setattr(load("federation"), "_MANY_PATIENTS", 280)
    monkeypatch.setattr(load("federation"), "rounds_against_fedavg", lambda **_: {})
    found = printed(
        "federation", "--sites", "5,10", "--patients", 200, "--inputs", 12, "--repeats", 1
    )
    few, many = found["by_sites"]["5"], found["by_sites"]["10"]
    assert few["cross_fitted"] == many["cross_fitted"] == []
    assert few["bytes_to_a_site_and_round"] == pytest.approx(
        many["bytes_to_a_site_and_round"], rel=0.1
    )
    assert found["log_log_slope"]["bytes"] == pytest.approx(1.0, abs=0.15)
    assert many["max_coefficient_gap"] < 1e-6
    assert many["share_of_true_concordance"] > 0.95
    assert many["agreement_with_truth"] > few["agreement_with_truth"] > 0.8
    counted = found["bytes_by_patients"]
    assert counted["200"]["bytes_from_a_site_and_round"] == pytest.approx(
        counted["280"]["bytes_from_a_site_and_round"], rel=0.05
    )


def test_newton_needs_fewer_rounds_than_fedavg(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load("fedavg"), "MAX_ROUNDS", 60)
    monkeypatch.setattr(load("fedavg"), "LEARNING_RATES", (0.1, 0.3, 0.7))
    found = load("fedavg").rounds_against_fedavg(seed=0, n_sites=4, n_patients=100, n_inputs=4)
    newton, fedavg = found["newton"], found["fedavg"]
    assert newton["1e-06"] <= 5
    one = [fedavg["1 local epochs"][x]["rounds"] for x in ("0.01", "0.001", "1e-06")]
    assert one == sorted(one)
    assert newton["0.001"] < one[1]
    # Local steps head for each site's own optimum, and stop short of the consortium's.
    assert fedavg["5 local epochs"]["1e-06"]["rounds"] is None
    assert fedavg["5 local epochs"]["smallest_gap"] > 1e-6


def test_one_epoch_of_fedavg_is_a_step_along_the_pooled_gradient(
    load: Callable[[str], ModuleType],
) -> None:
    fedavg = load("fedavg")
    sites = fedavg.simulate(3, 40, n_inputs=2, seed=1)
    (moved,) = islice(fedavg.fedavg(sites, fedavg.LocalSteps(1, 0.5)), 1)
    per_event = sum(len(s.time) for s in sites) / sum(s.event.sum() for s in sites)
    at, width = np.zeros(2), 1e-6
    gradient = [
        (fedavg.objective(sites, at + width * e) - fedavg.objective(sites, at - width * e))
        / (2 * width)
        for e in np.eye(2)
    ]
    np.testing.assert_allclose(moved, 0.5 * per_event * np.array(gradient), atol=1e-8)


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


def test_a_night_of_timers_costs_what_is_new(
    printed: Callable[..., dict[str, Any]], load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without servers and processes: that the stubbed site works, and the figures are about it."""
    module, extracted = load("orchestration"), []
    from flows import extraction

    def connect(_: object, root: Path) -> None:
        monkeypatch.setenv("CONSILIUM_ROOT", str(root))

    def night(root: Path) -> Any:
        before = len(extracted)
        with module.timers(slide=0.0, scan=0.0, counts=0.0):
            batch = extraction.extract_batch
            with monkeypatch.context() as patched:
                patched.setattr(
                    "flows.extraction.extract_batch",
                    lambda one, *more: extracted.append(one) or batch(one, *more),
                )
                module.by_loop(root)
        return module.Timed(9.0, 3.0, sum(len(one.rows) for one in extracted[before:]))

    monkeypatch.setattr(module, "prefect_server", lambda _: nullcontext(SimpleNamespace(
        wait_ready=lambda: None
    )))  # fmt: skip
    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(module, "by_flow", module.by_loop)
    monkeypatch.setattr(module, "night", night)
    found = printed("orchestration", "--patients", 6, "--milliseconds", 1, "--repeat", 1)
    assert sorted((one.modality, len(one.rows)) for one in extracted) == [
        ("omics", 7), ("pathology", 1), ("radiology", 1),
    ]  # fmt: skip
    assert {"overhead", "unchanged_s", "one_new_patient_ratio"} <= set(found)
    assert found["unchanged_s"] == found["one_new_patient_s"] == 9.0
    assert found["one_new_patient_ratio"] == 0.0
    assert found["timers_alone_s"] == 0.007
    assert found["cpu_s"] == {"unchanged": 3.0, "one_new_patient": 3.0}
    assert found["extracted"] == {"unchanged": [0], "one_new_patient": [9]}


@pytest.mark.slow
def test_nights_are_timed_on_a_server_and_in_processes_of_their_own() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "orchestration.py"), "--json"]
    options = ["--patients", "4", "--milliseconds", "20", "--repeat", "1"]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=540, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["benchmark"], found["patients"]) == ("orchestration", 4)
    # A slide, a scan, and the file of counts with all five.
    assert found["extracted"] == {"unchanged": [0], "one_new_patient": [7]}
    assert min(found["cpu_s"].values()) > 0
    raw = found["raw"]
    assert set(raw) == {
        "cold_flow_s", "by_flow_s", "by_loop_s", "unchanged_s", "one_new_patient_s",
    }  # fmt: skip
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in raw.values())
    (flow_s,), (loop_s,) = raw["by_flow_s"], raw["by_loop_s"]
    assert min(flow_s, loop_s) >= found["timers_alone_s"] == 0.1
    assert found["overhead"] == pytest.approx(flow_s / loop_s - 1, abs=0.02)
    assert [found["unchanged_s"], found["one_new_patient_s"]] == [
        raw["unchanged_s"][0], raw["one_new_patient_s"][0],
    ]  # fmt: skip
    added_s = found["one_new_patient_s"] - found["unchanged_s"]
    assert found["one_new_patient_ratio"] == pytest.approx(added_s / 6, abs=0.01)
    assert found["targets"] == {"overhead": 0.05, "unchanged_s": 20, "one_new_patient_s": 32}


def test_waiting_is_shared_out_between_threads(load: Callable[[str], ModuleType]) -> None:
    alone = load("orchestration").timers_alone
    assert alone(64, 0.0) == 0.0
    assert alone(64, 1.0) == 65.0  # 1, then 64 and 64 on two threads
    assert alone(500, 1.0) == pytest.approx(500.5, abs=64)


def test_the_cost_of_a_secure_sum_is_measured_end_to_end(
    printed: Callable[..., dict[str, Any]],
) -> None:
    found = printed("secure_sum", "--sites", 4, "--values", 2000, "--repeat", 1)
    times = {
        "site_cpu_s", "slowest_site_cpu_s", "agree_cpu_s", "mask_cpu_s", "coordinator_cpu_s",
        "cipher_alone_cpu_s",
    }  # fmt: skip
    about = {"benchmark": "secure_sum", "sites": 4, "values": 2000, "bytes_from_a_site": 32_000}
    assert about.items() <= found.items()
    errors = {"largest_relative_error", "largest_error_below_1"}
    assert found.keys() == about.keys() | times | errors
    assert all(isinstance(found[name], float) for name in times)
    assert found["largest_relative_error"] < 1e-8
    assert found["largest_error_below_1"] < 1e-8


def test_fewer_sites_than_hide_a_value_are_refused(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SystemExit) as ending:
        load("secure_sum").main(["--sites", "2"])
    assert ending.value.code == 2


def test_what_tells_of_bad_sites_is_counted_beside_what_is_held_against_honest_ones(
    load: Callable[[str], ModuleType], printed: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    benchmark = load("bad_sites")
    lies = {x: benchmark.LIES[x] for x in ("gradient x-1", "everything x1.2")}
    for name, kept in (
        ("LIES", lies), ("ONLY_CHECKED", {}), ("PLANS", {"one strength": {}}),
        ("WRONG", {"tables x100": benchmark.WRONG["tables x100"]}),
        ("HONEST", {"ties": benchmark.HONEST["ties"]}),
    ):  # fmt: skip
        monkeypatch.setattr(benchmark, name, kept)
    found = printed("bad_sites", "--consortia", 1, "--honest", 1)
    flipped, slight = (found["sums"][name] for name in lies)
    assert {x["by"]["bounds"] for x in flipped.values()} == {1}
    assert {x["latest_round"] for x in flipped.values()} == {2}
    assert slight["cox, plain"]["caught"] == 1
    assert slight["discrete, secure_sum"] == {"caught": 0, "by": {}, "latest_round": None}
    unit = found["rows"]["tables x100"]
    assert (unit["self_check"], unit["left"], unit["secure_sum_left"]) == (0, 1, 0)
    honest = found["honest"]
    assert (honest["runs"], honest["evaluations"], honest["bounds_broken"]) == (2, 6, 0)
    assert found["honest_self_checks"] == {"sites": 3, "stopped": 0}
    assert set(found["time_reversed_seen_by_a_good_encoder"]) == {"280", "700"}


def test_the_cost_of_the_engine_is_that_of_a_run_held_against_one_process(
    load: Callable[[str], ModuleType], printed: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from flows.links import InMemory
    from flows.protocol import load_protocol
    from tests.federated import prepare_site

    class Echoed(InMemory):
        def time_engine(self, fitted: Fitted) -> dict[str, float]:
            return {"engine_round_s": 0.5}

    def prepare(root: Path, sites: tuple[str, ...]) -> None:
        for site in sites:
            prepare_site(Workspace(root=root).site(site), load_protocol(root / "study.toml"))

    module = load("engine")
    monkeypatch.setattr(module.os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "start_parties", lambda *_, **__: nullcontext())
    monkeypatch.setattr(module, "set_up_federation", lambda *_: {})
    monkeypatch.setattr(
        "flows.links.linked",
        lambda kind, workspace, protocol, _: nullcontext(
            Echoed(workspace, protocol, workspace.site_names())
        ),
    )
    found = printed("engine", "--repeat", 1)
    assert (found["benchmark"], found["sites"], found["patients"]) == ("engine", 3, 300)
    assert 10 <= found["rounds"] == len(found["round_s"]) < 20
    assert found["engine_round_s"] == 0.5
    assert found["ratio"] == pytest.approx(found["median_round_s"] / 0.5, rel=1e-3)
    assert {"submit_to_result_s", "submit_to_first_round_s", "targets"} <= found.keys()
    assert found["max_coefficient_gap"] == 0.0


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_torch_thread")
def test_slides_are_read_and_embedded_as_by_openslide(
    printed: Callable[..., dict[str, Any]],
) -> None:
    found = printed(
        "pathology", "--make", 2000, "--encoder", "test_resnet", "--tiles", 8, "--repeats", 1,
        "--no-memory", "--json",
    )  # fmt: skip
    assert found["max_pixel_difference"] == 0
    assert found["tissue_grid_is_the_same_every_time"]
    assert found["figures"]["reader"] == "jpeg_tiff"
    assert found["min_cosine"] > 0.99
    assert set(found["targets"]) <= set(found["ratios"])
    assert all(x > 0 for x in found["ratios"].values())
    assert found["n_tiles"] > 30
    assert found["rss_ratio_30k_over_6k"] is None
    cpu = found["figures"]["cpu_ms_per_tile"]
    assert found["ratios"]["raw_read_20x"] == pytest.approx(
        cpu["raw_20x_ours"] / cpu["raw_20x_openslide"], abs=1e-3
    )
