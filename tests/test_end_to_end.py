"""The whole line on a small consortium of raw files: bad inputs, kills half-way, run twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.slow

SIZES = (46, 40, 10)
LOWERED = """
patients = 25
events = 10
patients_per_input = 3
test_events = 3
pooled_patients = 50
snapshot = 1
"""
_RUN = "from flows.cli import main; main()"


def consilium(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def study_run(root: Path) -> dict[str, Any]:
    return json.loads(consilium("study", "run", "--root", root, "--json").stdout)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files of three small sites, the last below its training minimum; never run."""
    root = tmp_path_factory.mktemp("raw") / "consortium"
    consilium("simulate", root, "--sites", ",".join(map(str, SIZES)), "--seed", "3")
    study = root / "study.toml"
    study.write_text(study.read_text().replace("[privacy]", "[privacy]" + LOWERED))
    return root


@pytest.fixture(scope="module")
def finished(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The same consortium after one uninterrupted run."""
    root = tmp_path_factory.mktemp("finished") / "consortium"
    shutil.copytree(raw, root)
    return root, study_run(root)


def test_a_run_ends_with_figures_and_a_registered_model(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, summary = finished
    assert summary["n_sites"] == 3
    assert summary["n_training_sites"] == 2
    assert summary["n_patients"] == sum(SIZES)
    assert summary["rounds"] <= 10
    assert summary["max_coefficient_gap"] <= 1e-6
    assert set(summary["concordance"]) == {
        "local_mean", "federated", "federated_local_encoders", "pooled", "true_hazard",
    }  # fmt: skip
    assert (summary["model_name"], summary["model_version"]) == ("demo-fusion", 1)


def test_a_run_ends_with_a_report_that_can_be_written_anew(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, summary = finished
    folder = root / "runs" / summary["run"][:12]
    page = (folder / "report.html").read_text()
    shown = re.search(r'data-key="/results/arms/protocol/concordance/value">([0-9.]+)<', page)
    record = json.loads((folder / "record.json").read_text())
    concordance = record["results"]["arms"]["protocol"]["concordance"]["value"]
    assert shown is not None
    assert float(shown[1]) == round(concordance, 3)
    again = tmp_path / "again.html"
    consilium("report", summary["run"], "--root", root, "--out", again)
    assert again.read_text() == page
    assert record["results"]["left_out"], "the demo's protocol leaves sites out"
    logged = list((root / "artifacts").rglob("report.html"))
    assert [path.read_text() for path in logged] == [page]


def test_a_dossier_of_images_stands_until_a_number_of_it_changes(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    root, summary = finished
    checked = consilium("dossier", "--check", "--root", root, "--json")
    assert json.loads(checked.stdout)["faults"] == []
    folder = root / "runs" / summary["run"][:12] / "dossier"
    claim = (folder / "claim.md").read_text()
    assert "pathology, radiology" in claim
    assert "does not apply" not in claim
    items = re.findall(r"^\| (\d+) \|", claim, flags=re.MULTILINE)
    assert items == [str(i) for i in range(1, 45)]
    card = folder / "model_card.md"
    text = card.read_text()
    said, other = (f"**Trained on**: {summary['n_train'] + i} (" for i in (0, 1))
    assert said in text
    card.write_text(text.replace(said, other))
    spoilt = consilium("dossier", "--check", "--root", root, "--json", check=False)
    card.write_text(text)
    assert spoilt.returncode == 1
    faults = json.loads(spoilt.stdout)["faults"]
    assert faults
    assert all(fault.startswith("model_card.md: ") for fault in faults)


def test_what_is_said_of_a_patient_stays_at_the_site(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    root, summary = finished
    run = summary["run"][:12]
    elsewhere = [
        path
        for folder in ("runs", "artifacts", "prefect", "logs")
        for path in (root / folder).rglob("*")
        if path.is_file()
    ] + list(root.glob("mlflow.db*"))
    for site in ("site-01", "site-02", "site-03"):
        target = root / site / "runs" / run / "patients.csv"
        table = pd.read_csv(target, dtype={"patient_id": str}, index_col="patient_id")
        registry = pd.read_csv(root / site / "clinical.csv", dtype=str)
        assert set(table.index) == set(registry["patient_id"])
        assert target.stat().st_mode & 0o077 == 0
        parts = table.filter(like="contribution_").sum(axis=1)
        np.testing.assert_allclose(parts, table["log_hazard"], atol=1e-9)
        ids = [x.encode() for x in table.index]
        leaks = [p.name for p in elsewhere if any(x in p.read_bytes() for x in ids)]
        assert not leaks


def test_nothing_is_done_twice(finished: tuple[Path, dict[str, Any]]) -> None:
    root, first = finished
    before = {f: f.stat().st_mtime_ns for f in root.glob("*/features/**/*") if f.is_file()}
    again = study_run(root)
    after = {f: f.stat().st_mtime_ns for f in root.glob("*/features/**/*") if f.is_file()}
    assert again["reused"]
    assert again["model_version"] == first["model_version"]
    assert again["coefficients"] == first["coefficients"]
    changed = {f.name for f in after if before.get(f) != after[f]}
    assert changed <= {"digests.json", "rows.json"}  # what was seen in this night, too


def test_a_fresh_process_predicts_from_the_registry(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    root, summary = finished
    code = """
import os, warnings
warnings.simplefilter("ignore")
import mlflow, numpy as np, pandas as pd
model = mlflow.pyfunc.load_model("models:/demo-fusion@candidate")
columns = ["clinical", "omics", "pathology", "radiology"]
rows = pd.DataFrame([[0.0] * 4, [1.0] * 4, [1.0, np.nan, np.nan, 1.0]], columns=columns)
print(model.predict(rows).to_json(orient="records"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "MLFLOW_TRACKING_URI": summary["tracking_uri"],
            "CONSILIUM_ROOT": str(root),  # whose signature to trust
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    survival = found[[c for c in found if c.startswith("survival_")]].to_numpy()
    assert survival.shape == (3, 4)
    assert ((survival > 0) & (survival <= 1)).all()
    assert (np.diff(survival, axis=1) <= 0).all()
    order = np.argsort(found["log_hazard"])
    assert (np.diff(survival[order], axis=0) <= 0).all()


_STAGES = {
    "while slides are embedded": "site-01/features/pathology/*.h5",
    "between two sites": "site-01/cohort.h5mu",
    "while encoders are trained": "site-01/encoders/clinical/encoder.json",
    "while the model is registered": "mlflow.db",
}


@pytest.mark.timeout(1500)
def test_killed_at_any_stage_it_continues_to_the_same_model(
    raw: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root = tmp_path / "consortium"
    shutil.copytree(raw, root)
    for sign in _STAGES.values():
        _run_until(root, sign)
    assert not list(root.glob("runs/*/summary.json"))
    summary = study_run(root)
    expected = finished[1]
    np.testing.assert_allclose(summary["coefficients"], expected["coefficients"], atol=1e-10)
    assert summary["concordance"] == pytest.approx(expected["concordance"], abs=1e-10)
    assert summary["model_version"] == 1
    assert not list(root.glob("*/features/**/.partial-*"))


def _run_until(root: Path, sign: str) -> None:
    """Start a run and kill it, group and all, as soon as a file shows that a stage was reached."""
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, "study", "run", "--root", str(root), "--json"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 420
    while not any(root.glob(sign)):
        assert process.poll() is None, f"the run ended before {sign}"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _corrupt(root: Path) -> dict[str, str]:
    """Break one input of several patients of the first site; return the code each should get."""
    site = root / "site-01"
    manifest = pd.read_csv(site / "manifest.csv", dtype=str, keep_default_na=False)
    slides = manifest[manifest["modality"] == "pathology"]
    scans = manifest[(manifest["modality"] == "radiology") & manifest["path"].str.endswith(".gz")]
    truncated, text, missing = slides["patient_id"].iloc[:3]
    whole = (site / slides["path"].iloc[0]).read_bytes()
    (site / slides["path"].iloc[0]).write_bytes(whole[: len(whole) // 2])
    (site / slides["path"].iloc[1]).write_text("not a slide")
    (site / slides["path"].iloc[2]).unlink()
    other, swapped = scans["patient_id"].iloc[0], scans.iloc[1]
    shutil.copy(site / swapped["mask_path"], site / scans["mask_path"].iloc[0])
    registry = pd.read_csv(site / "clinical.csv", dtype=str, keep_default_na=False)
    spoilt = [x for x in registry["patient_id"] if x not in {truncated, text, missing, other}]
    registry.loc[registry["patient_id"] == spoilt[0], "time_days"] = "-5"
    registry.loc[registry["patient_id"] == spoilt[1], "event"] = "dead"
    registry.loc[registry["patient_id"] == spoilt[2], "time_days"] = "two years"
    registry.to_csv(site / "clinical.csv", index=False)
    return {
        f"{truncated} pathology": "unreadable_slide",
        f"{text} pathology": "not_a_slide",
        f"{missing} pathology": "missing_file",
        f"{other} radiology": "mask_geometry",
        f"{spoilt[0]} clinical": "time_not_positive",
        f"{spoilt[1]} clinical": "event_not_binary",
        f"{spoilt[2]} clinical": "time_not_a_number",
    }


def test_bad_inputs_are_set_aside_one_by_one_and_the_rest_goes_on(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root = tmp_path / "consortium"
    shutil.copytree(finished[0], root)
    expected = _corrupt(root)
    check = consilium("site", "check", "site-01", "--root", root, "--json", check=False)
    assert check.returncode == 1
    said = {f"{f['patient_id']} {f['modality']}": f["code"] for f in json.loads(check.stdout)}
    assert said == expected
    summary = study_run(root)
    excluded = pd.read_csv(root / "site-01" / "excluded.csv", dtype=str)
    assert list(excluded.columns) == ["patient_id", "modality", "code", "reason"]
    found = dict(
        zip(excluded["patient_id"] + " " + excluded["modality"], excluded["code"], strict=True)
    )
    assert found == expected
    assert not excluded["reason"].str.contains("/").any()
    assert summary["n_patients"] == sum(SIZES) - 3


def test_no_site_above_its_minimum_is_one_sentence(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root = tmp_path / "consortium"
    shutil.copytree(finished[0], root)
    study = root / "study.toml"
    study.write_text(study.read_text().replace("patients = 25", "patients = 500"))
    done = consilium("study", "run", "--root", root, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().startswith("consilium: training sites: found none above")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
