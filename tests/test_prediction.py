"""Risks of a site's patients: those of the study itself, and of people nobody trained on."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import stat
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import httpx
import mudata as md
import numpy as np
import pandas as pd
import pytest

from flows import cli
from flows.identity import identity, public_key
from flows.model_signing import ModelNotTrusted, sign_model
from flows.prediction import (
    NO_ENCODER,
    NO_MODALITY,
    SCORED,
    counts,
    predict_cohort,
    survival_interval,
)
from flows.prediction_files import (
    board_page,
    forget_patient,
    page_stem,
    write_predictions,
    written_predictions,
)
from flows.protocol import load_protocol
from flows.registered_model import (
    PredictionRefused,
    StudyModel,
    export_model,
    find_version,
    open_model,
)
from flows.scoring import MAX_BODY_BYTES, scoring_app
from flows.services import HOST, free_port
from flows.snapshots import COHORT, withdraw
from flows.version_files import ExportRefused, VersionFiles, exported, write_export
from fusion.federation.consortium import COORDINATOR
from fusion.keys import SigningKey
from infra.settings import STUDY_FILE, Workspace
from tests.site_folders import at_hospital
from tests.small_trial import SITES, cohort_of, patients, prepare, run, settings_at

if TYPE_CHECKING:
    from mudata import MuData

    from flows.prediction import Prediction

RISK = "risk_by_730_days"
ADDRESS = "http://127.0.0.1:5001"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study of three sites, the last too small to train."""
    root = tmp_path_factory.mktemp("trial")
    prepare(root)
    run(root)
    return root


@pytest.fixture(scope="module")
def model(trial: Path) -> StudyModel:
    return open_model(Workspace(root=trial), "small")


@pytest.fixture
def copied(trial: Path, tmp_path: Path) -> Path:
    """The sites again, to change; the registry stays where it is."""
    for site in SITES:
        shutil.copytree(trial / site, tmp_path / site)
    shutil.copy(trial / STUDY_FILE, tmp_path)
    return tmp_path


def score(
    root: Path, model: StudyModel, site: str = "site-01", path: Path | None = None
) -> Prediction:
    settings = settings_at(root, site)
    return predict_cohort(settings, model, settings.path(COHORT) if path is None else path)


def write(cohort: MuData, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), md.set_options(pull_on_update=False):
        warnings.simplefilter("ignore")
        cohort.write_h5mu(path)
    return path


def new_patients(root: Path, folder: Path, n: int = 12) -> tuple[MuData, Path]:
    """A cohort of people whom no training ever saw, and where it will be."""
    study = load_protocol(root / STUDY_FILE)
    table = patients(1, n, first=500)
    return cohort_of(table, study, folder / "features"), folder / "new.h5mu"


@pytest.mark.parametrize("site", SITES)
def test_test_patients_get_what_the_study_said_of_them(
    trial: Path, model: StudyModel, site: str
) -> None:
    said = pd.read_csv(
        settings_at(trial, site).path("runs", model.run[:12], "patients.csv"), index_col=0
    )
    said = said[said["split"] == "test"]
    assert len(said) > 10
    found = score(trial, model, site).table.loc[said.index]
    assert set(found["in_study"]) == {"test"}
    columns = ["log_hazard", "standard_error", RISK, *said.filter(like="contribution_").columns]
    assert len(columns) == 7
    np.testing.assert_allclose(found[columns], said[columns], atol=1e-8, rtol=0)
    assert said["contribution_gait"].nunique() > 5 or site == "site-03"


def test_patients_are_told_apart_by_what_they_were_to_the_study(
    trial: Path, model: StudyModel
) -> None:
    found = score(trial, model).table
    split = pd.read_csv(
        settings_at(trial, "site-01").path("runs", model.run[:12], "patients.csv"), index_col=0
    )["split"]
    assert (found["in_study"] == split.loc[found.index]).all()
    assert set(score(trial, model, "site-03").table["in_study"]) == {"test"}


def test_people_never_seen_are_scored_with_any_subset_of_modalities(
    trial: Path, model: StudyModel, tmp_path: Path
) -> None:
    cohort, path = new_patients(trial, tmp_path)
    whole = score(trial, model, path=write(cohort, path))
    assert set(whole.table["in_study"]) == {"no"}
    assert set(whole.table["status"]) == {SCORED}
    complete = whole.table.index[whole.table["lacking"] == ""]
    assert len(complete) > 1
    table = patients(1, 12, first=500).loc[complete[:1]]
    for kept in (["age", "treatment=b"], ["hb", "crp", "wbc"], ["speed", "sway"], ["tile"]):
        one = table.copy()
        one[[x for x in table.columns[:8] if x not in kept]] = np.nan
        alone = cohort_of(one, load_protocol(trial / STUDY_FILE), tmp_path / "features")
        found = score(trial, model, path=write(alone, tmp_path / "one.h5mu"))
        assert list(found.table["status"]) == [SCORED]
        at = np.flatnonzero(~np.isnan(found.columns[0]))
        # Who else is scored, and which other modalities there are, changes no modality's value.
        beside = whole.columns[whole.table.index == complete[0]][0]
        np.testing.assert_allclose(found.columns[0, at], beside[at], rtol=1e-9)
        errors = [x.table.loc[complete[0], "standard_error"] for x in (found, whole)]
        assert errors[0] > errors[1]


def test_who_has_no_modality_is_listed_without_a_risk(
    trial: Path, model: StudyModel, tmp_path: Path
) -> None:
    table = patients(1, 6, first=700)
    table.loc[table.index[0], list(table.columns[:8])] = np.nan
    cohort = cohort_of(table, load_protocol(trial / STUDY_FILE), tmp_path / "features")
    empty = table.index[0]
    with_row = cohort.mod["clinical"].to_df()
    assert empty not in with_row.index
    blank = cohort.mod["clinical"][:1].copy()
    blank.obs_names, blank.X = [empty], np.full((1, 2), np.nan, dtype=np.float32)
    tables = {**cohort.mod, "clinical": ad.concat([cohort.mod["clinical"], blank])}
    tables["clinical"].uns = cohort.mod["clinical"].uns
    with md.set_options(pull_on_update=False):
        whole = md.MuData(tables)
    whole.uns = dict(cohort.uns)
    found = score(trial, model, path=write(whole, tmp_path / "blank.h5mu")).table
    assert found.loc[empty, "status"] == NO_MODALITY
    assert np.isnan(found.loc[empty, ["log_hazard", RISK, "survival_365"]].astype(float)).all()
    assert found.loc[empty, "lacking"] == "blood, clinical, gait, slides"
    assert (found["status"] == SCORED).sum() == len(found) - 1 == 5


def test_patients_without_an_outcome_are_scored(
    trial: Path, model: StudyModel, tmp_path: Path
) -> None:
    cohort, path = new_patients(trial, tmp_path)
    before = score(trial, model, path=write(cohort, path)).table
    cohort.obs = cohort.obs.drop(columns=["event", "time_days", "split", "fold_unit"])
    after = score(trial, model, path=write(cohort, path)).table
    pd.testing.assert_frame_equal(before, after)


def test_intervals_hold_the_value_and_survival_falls(trial: Path, model: StudyModel) -> None:
    table = score(trial, model).table
    assert (table[f"{RISK}_low"] < table[RISK]).all()
    assert (table[RISK] < table[f"{RISK}_high"]).all()
    np.testing.assert_allclose(table[RISK], 1.0 - table["survival_730"])
    curves = table[["survival_365", "survival_730", "survival_1095"]].to_numpy()
    assert (np.diff(curves) <= 0).all()
    hazard, error = np.array([0.3]), np.array([0.2])
    low, value, high = survival_interval(model.fusion, hazard, error, [730.0])
    ratio = np.log(np.log(low) / np.log(value))
    np.testing.assert_allclose(ratio, 1.96 * 0.2, rtol=1e-4)
    np.testing.assert_allclose(np.log(np.log(value) / np.log(high)), 1.96 * 0.2, rtol=1e-4)


def test_far_inputs_are_flagged_and_rare_levels_are_not(
    trial: Path, model: StudyModel, tmp_path: Path
) -> None:
    cohort, path = new_patients(trial, tmp_path)
    blood = cohort.mod["blood"]
    values = np.array(blood.X)
    values[0, 1] = 4000.0
    blood.X = values
    clinical = cohort.mod["clinical"]
    ages = np.array(clinical.X)
    ages[1, 0] = -300.0
    clinical.X = ages
    found = score(trial, model, path=write(cohort, path))
    flagged = found.table["extrapolates"]
    assert "blood: crp" in flagged[blood.obs_names[0]]
    assert "clinical: age" in flagged[clinical.obs_names[1]]
    assert "treatment" not in " ".join(flagged)
    assert counts(found)["n_extrapolated"] == 2


def test_a_cohort_of_another_protocol_or_other_columns_is_refused(
    trial: Path, model: StudyModel, tmp_path: Path
) -> None:
    cohort, path = new_patients(trial, tmp_path)
    cohort.uns["protocol_fingerprint"] = "f" * 64
    with pytest.raises(PredictionRefused, match="made under protocol ffffffffffff, needed"):
        score(trial, model, path=write(cohort, path))
    cohort, path = new_patients(trial, tmp_path)
    cohort.mod["blood"].var_names = ["hb", "crp", "weight"]
    with pytest.raises(PredictionRefused, match="blood: found no column wbc"):
        score(trial, model, path=write(cohort, path))
    path.write_bytes(b"nothing")
    with pytest.raises(PredictionRefused, match="no readable cohort"):
        score(trial, model, path=path)
    with pytest.raises(PredictionRefused, match="no such file"):
        score(trial, model, path=tmp_path / "absent.h5mu")


def test_without_the_sites_own_encoders_their_modalities_count_as_missing(
    copied: Path, model: StudyModel, tmp_path: Path
) -> None:
    shutil.rmtree(copied / "site-01" / "encoders")
    found = score(copied, model)
    at = [model.fusion.modalities.index(x) for x in ("gait", "slides")]
    assert np.isnan(found.columns[:, at]).all()
    assert found.has[:, at].any(axis=0).all()
    assert any("gait counts as missing" in note for note in found.notes)
    one = patients(1, 1, first=900)
    one[["age", "treatment=b", "hb", "crp", "wbc", "tile"]] = np.nan
    one["speed"], one["sway"] = 1.0, 2.0
    study = load_protocol(copied / STUDY_FILE)
    path = write(cohort_of(one, study, tmp_path / "features"), tmp_path / "one.h5mu")
    assert list(score(copied, model, path=path).table["status"]) == [NO_ENCODER]


def test_another_encoder_than_the_models_is_used_with_a_word_of_it(
    copied: Path, model: StudyModel
) -> None:
    about = copied / "site-01" / "encoders" / "gait" / "encoder.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "key": "0" * 64}))
    found = score(copied, model)
    assert any("gait: this site's own encoder was trained on another" in x for x in found.notes)
    np.testing.assert_array_equal(found.columns, score(copied, model).columns)


def test_without_its_snapshot_a_site_says_what_its_scale_is_of(
    copied: Path, model: StudyModel
) -> None:
    before = score(copied, model)
    shutil.rmtree(copied / "site-01" / "snapshots")
    found = score(copied, model)
    assert any("released no cohort" in note for note in found.notes)
    assert set(found.table["in_study"]) == {"unknown"}
    np.testing.assert_allclose(found.columns, before.columns)  # the draft is the same here


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, 1), ("small-fusion", 1), ("small-fusion@candidate", 1), ("small-fusion/1", 1),
        ("models:/small-fusion/1", 1), ("models:/small-fusion@candidate", 1),
        ("small-fusion/2", None), ("small-fusion@champion", None), ("other", None),
        ("a/b/c", None), ("", None), ("../x", None),
    ],
)  # fmt: skip
def test_models_are_named_as_people_name_them(
    trial: Path, text: str | None, found: int | None
) -> None:
    from flows.mlflow_store import client_of

    client = client_of(Workspace(root=trial).mlflow_uri)
    if found is None:
        with pytest.raises(PredictionRefused, match="needed a"):
            find_version(client, text, "small")
    else:
        assert int(find_version(client, text, "small").version) == found


@pytest.mark.border
@pytest.mark.parametrize(
    ("name", "old"), [("protocol.json", '"overall survival"'), ("encoders.json", "1")]
)
def test_what_was_changed_beside_the_model_is_refused(trial: Path, name: str, old: str) -> None:
    (file,) = (trial / "artifacts").rglob(name)
    before = file.read_text()
    assert old in before
    try:
        changed = before.replace('"overall survival"', '"another endpoint"')
        file.write_text(changed if changed != before else before.replace("1", "2", 1))
        with pytest.raises(PredictionRefused, match="found a protocol or encoders beside it"):
            open_model(Workspace(root=trial), "small")
    finally:
        file.write_text(before)
    open_model(Workspace(root=trial), "small")


def test_a_folder_without_a_registry_is_a_sentence(copied: Path) -> None:
    with pytest.raises(PredictionRefused, match=r"found no mlflow\.db"):
        open_model(Workspace(root=copied), "small")


def ask(model: StudyModel, body: object, **headers: str) -> httpx.Response:
    """Post to the scoring server without a network; what is no text goes as JSON."""

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(scoring_app(model, port=5001))
        async with httpx.AsyncClient(transport=transport, base_url=ADDRESS) as client:
            content = body if isinstance(body, str) else json.dumps(body)
            kinds = {"content-type": "application/json", **headers}
            return await client.post("/invocations", content=content, headers=kinds)

    return asyncio.run(post())


def rows(model: StudyModel, *data: list[float | None]) -> dict[str, object]:
    return {"dataframe_split": {"columns": list(model.fusion.modalities), "data": list(data)}}


def test_http_answers_what_the_process_answers(model: StudyModel) -> None:
    data = [[0.1, -0.4, 0.3, 1.2], [0.5, None, 0.0, None], [None, None, None, None]]
    answer = ask(model, rows(model, *data))
    assert answer.status_code == 200
    said = pd.DataFrame(answer.json()["predictions"]).astype(float)
    frame = pd.DataFrame(data, columns=list(model.fusion.modalities), dtype=float)
    pd.testing.assert_frame_equal(said, model.pyfunc.predict(frame))
    assert said.loc[2].isna().all()


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "null", "[]", "{}", '{"dataframe_split": 1}', '{"dataframe_split": {}}',
        '{"dataframe_split": {"columns": ["other"], "data": [[1]]}}',
        '{"dataframe_split": {"columns": ["blood", "clinical", "gait", "slides"], '
        '"data": [["p1-secret", 1, 2, 3]]}}',
        '{"dataframe_split": {"columns": ["blood", "clinical", "gait", "slides"], '
        '"data": [[1, 2]]}}',
        '{"inputs": {"p1-secret": [1]}}',
        '{"messages": [{"role": "user", "content": "p1-secret"}]}',
        '{"dataframe_split": {"columns": ["blood", "clinical", "gait", "slides"], '
        '"data": [[1e999, 1, 2, 3]]}}',
    ],
)  # fmt: skip
def test_malformed_requests_get_a_sentence_and_nothing_else(model: StudyModel, body: str) -> None:
    answer = ask(model, body)
    assert answer.status_code == 400
    assert list(answer.json()) == ["error"]
    assert answer.json()["error"].startswith("body: found no table that the model reads, needed {")
    for leak in ("Traceback", "/work", "site-packages", ".py", "p1-secret", "mlflow"):
        assert leak not in answer.text


def test_requests_of_another_kind_are_refused(model: StudyModel) -> None:
    right = rows(model, [0.0, 0.0, 0.0, 0.0])
    assert ask(model, right, host="evil.example").status_code == 400
    assert ask(model, right, **{"content-type": "text/csv"}).status_code == 415
    assert ask(model, "x" * (MAX_BODY_BYTES + 1)).status_code == 413


@pytest.mark.slow
def test_the_server_listens_here_scores_and_ends_on_ctrl_c(
    trial: Path, model: StudyModel, tmp_path: Path
) -> None:
    port = free_port()
    command = ["predict", "--serve", "--root", str(trial), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", "from flows.cli import main; main()", *command],
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://{HOST}:{port}", trust_env=False, timeout=60) as client:
            _wait_for(client, server)
            right = client.post("/invocations", json=rows(model, [0.0, 0.5, None, 1.0]))
            frame = pd.DataFrame([[0.0, 0.5, np.nan, 1.0]], columns=list(model.fusion.modalities))
            said = pd.DataFrame(right.json()["predictions"])
            pd.testing.assert_frame_equal(said, model.pyfunc.predict(frame))
            wrong = client.post("/invocations", json={"dataframe_split": {"columns": ["x"]}})
            assert wrong.status_code == 400
            assert client.get("/docs").status_code == 404
    finally:
        server.send_signal(signal.SIGINT)
        code = server.wait(60)
    assert code in (0, 130)
    assert "Traceback" not in (tmp_path / "log").read_text()


def _wait_for(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None
        try:
            if client.get("/ping").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("no answer")


def consilium(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["consilium", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_the_command_writes_for_the_site_alone(
    trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, path = new_patients(trial, tmp_path)
    write(cohort, path)
    out = tmp_path / "risks.csv"
    code, said, _ = consilium(
        monkeypatch, capsys,
        "predict", str(path), "--site", "site-01", "--root", str(trial), "--out", str(out),
        "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(said) == {
        "model": "small-fusion", "version": 1, "site": "site-01", "out": str(out),
        "n_patients": 12, "n_scored": 12, "n_no_modality": 0, "n_no_encoder": 0,
        "n_extrapolated": 0, "notes": [],
    }  # fmt: skip
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert list(pd.read_csv(out)["patient_id"]) == list(cohort.obs_names)
    assert out in written_predictions(trial / "site-01")
    code, _, error = consilium(monkeypatch, capsys, "predict", str(path), "--root", str(trial))
    assert code == 2
    assert "name one" in error
    other = trial / "site-02" / COHORT
    code, _, error = consilium(
        monkeypatch, capsys, "predict", str(other), "--site", "site-01", "--root", str(trial)
    )
    assert code == 2
    assert "for a cohort of site-02" in error


@pytest.fixture(scope="module")
def export(trial: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as the coordinator exports it, in a place of its own."""
    out = tmp_path_factory.mktemp("export") / "small-1.zip"
    found, written = export_model(Workspace(root=trial), "small", "small-fusion@candidate", out=out)
    assert (found.title, written) == ("small-fusion version 1", out)
    return out


@pytest.fixture
def hospital(trial: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site by itself, without any registry, in its working folder."""
    for name in ("CONSILIUM_TRACKING_URI", "CONSILIUM_MODEL_KEYS"):
        monkeypatch.delenv(name, raising=False)
    home = at_hospital(trial, "site-01", tmp_path / "data", study="small")
    monkeypatch.chdir(home)
    return home


def test_a_site_without_a_registry_scores_by_the_exported_file(
    model: StudyModel, export: Path, hospital: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = {path for path in hospital.rglob("*") if path.is_file()}
    shutil.copy(export, hospital / "lung.zip")
    code, said, error = consilium(monkeypatch, capsys, "predict", "--model", "lung.zip")
    assert (code, error) == (0, "")
    assert said.startswith("small-fusion version 1: 90 of 90 patients scored")
    table = pd.read_csv(hospital / "predictions/predictions.csv", index_col=0)
    by_registry = predict_cohort(
        Workspace(root=hospital).site("site-01"), model, hospital / COHORT
    ).table
    np.testing.assert_allclose(table["log_hazard"], by_registry["log_hazard"], atol=1e-12)
    assert (table["in_study"] == by_registry["in_study"]).all()
    patient = str(table.index[0])
    code, said, error = consilium(monkeypatch, capsys, "board", patient, "--model", "lung.zip")
    assert (code, error) == (0, "")
    assert "(candidate)" in board_page(hospital, patient).read_text()
    made = {path for path in hospital.rglob("*") if path.is_file()} - before
    assert {path.relative_to(hospital).parts[0] for path in made} == {
        "lung.zip", "predictions", "board"
    }  # fmt: skip


def test_without_a_registry_or_a_file_a_site_is_told_of_both(
    hospital: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = consilium(monkeypatch, capsys, "predict", "--model", "small-fusion@candidate")
    assert code == 2
    assert "name its server in CONSILIUM_TRACKING_URI, or the file with --model" in error
    code, _, error = consilium(monkeypatch, capsys, "predict", "--model", "lung.zip")
    assert (code, error) == (
        2,
        "consilium: --model: found no file lung.zip, needed one that `consilium model export` "
        "wrote\n",
    )
    assert not (hospital / "mlflow.db").exists()


def test_the_same_version_is_exported_to_the_same_bytes_by_the_coordinator_alone(
    trial: Path, export: Path, hospital: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code, said, _ = consilium(monkeypatch, capsys, "model", "export", "--root", str(trial))
    assert (code, said) == (0, "wrote small-fusion-1.zip: small-fusion version 1 (candidate)\n")
    assert Path("small-fusion-1.zip").read_bytes() == export.read_bytes()
    command = ("model", "export", "--root", str(trial))
    assert "--force replaces it" in consilium(monkeypatch, capsys, *command)[2]
    assert consilium(monkeypatch, capsys, *command, "--force")[0] == 0
    assert "ends in .zip" in consilium(monkeypatch, capsys, *command, "--out", "model")[2]
    assert str(trial).encode() not in b"".join(archive_of(export).values())
    code, _, error = consilium(monkeypatch, capsys, "model", "export", "small-fusion-1.zip")
    assert code == 2
    assert "found no key of the coordinator in this folder" in error


def archive_of(export: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(export) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: dict[str, bytes], path: Path) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def a_bit_flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.border
def test_one_changed_byte_of_any_exported_file_is_refused(export: Path, hospital: Path) -> None:
    workspace, whole = Workspace(root=hospital), archive_of(export)
    open_model(workspace, "small", zipped(whole, hospital / "again.zip"))
    assert {"version.json", "run/protocol.json", "model/artifacts/fusion.json"} <= set(whole)
    for name, content in whole.items():
        harmed = {**whole, name: a_bit_flipped(content)}
        with pytest.raises((ExportRefused, ModelNotTrusted, PredictionRefused), match="found"):
            open_model(workspace, "small", zipped(harmed, hospital / "harmed.zip"))


@pytest.mark.border
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model/signature.json": None}, "no whole export"),
        ({"run/lineage.json": None}, "no whole export"),
        ({"run/more.json": b"{}"}, "no whole export"),
        ({"model/more.py": b"raise SystemExit"}, "more.py added"),
        ({"model/../../escaped.py": b""}, "no whole export"),
        ({"/escaped.py": b""}, "no whole export"),
        ({"model/registered_model_meta": b"{}"}, "no whole export"),
        ({"version.json": b"[]"}, "no whole export"),
        ({"version.json": b"{}"}, "no whole export"),
    ],
)
def test_files_added_to_or_missing_from_an_export_are_refused(
    export: Path, hospital: Path, changes: dict[str, bytes | None], told: str
) -> None:
    files: dict[str, bytes | None] = {**archive_of(export), **changes}
    kept = {name: content for name, content in files.items() if content is not None}
    path = zipped(kept, hospital / "harmed.zip")
    with pytest.raises((ExportRefused, ModelNotTrusted), match=told):
        open_model(Workspace(root=hospital), "small", path)
    assert not list(hospital.parent.rglob("escaped.py"))


@pytest.mark.border
def test_an_export_of_half_a_file_or_of_nothing_is_refused(export: Path, hospital: Path) -> None:
    for content in (export.read_bytes()[:-200], b"", b"PK\x05\x06" + bytes(18)):
        (hospital / "harmed.zip").write_bytes(content)
        with pytest.raises(ExportRefused, match="no whole export"):
            open_model(Workspace(root=hospital), "small", str(hospital / "harmed.zip"))


@pytest.mark.border
def test_an_export_of_another_coordinator_or_study_is_refused(
    trial: Path, export: Path, hospital: Path, tmp_path: Path
) -> None:
    with pytest.raises(PredictionRefused, match="small-fusion of study small, needed one of other"):
        open_model(Workspace(root=hospital), "other", str(export))
    stranger = SigningKey(b"s" * 32)
    kit = hospital / "kits/site-01/consortium.json"
    mine = kit.read_bytes()
    own = public_key(trial / COORDINATOR)
    assert own is not None
    kit.write_bytes(mine.replace(own.encode(), stranger.public.encode()))
    with pytest.raises(ExportRefused, match=f"signed by {own[:12]}, needed the study's coord"):
        open_model(Workspace(root=hospital), "small", str(export))
    kit.unlink()
    with pytest.raises(ExportRefused, match=r"found no key to trust.*start-up kit below kits/"):
        open_model(Workspace(root=hospital), "small", str(export))
    kit.write_bytes(mine)
    # A stranger may sign the label anew, but not what it is the label of.
    found, _ = unpacked(export, {own}, tmp_path / "theirs")
    write_export(replace(found, version=2), tmp_path / "theirs.zip", stranger)
    with pytest.raises(ExportRefused, match=f"signed by {stranger.public[:12]}"):
        open_model(Workspace(root=hospital), "small", str(tmp_path / "theirs.zip"))


@pytest.mark.border
def test_parts_of_two_runs_are_no_model_though_the_coordinator_signed_both(
    trial: Path, export: Path, hospital: Path, tmp_path: Path
) -> None:
    """Each part is signed; that they belong together is said by the lineage alone."""
    key = identity(trial / COORDINATOR)
    found, folder = unpacked(export, {key.public}, tmp_path / "two")
    sign_model(folder / "model", key, study="small", run="f" * 64)
    write_export(found, tmp_path / "two.zip", key)
    with pytest.raises(PredictionRefused, match="that it was not made with"):
        open_model(Workspace(root=hospital), "small", str(tmp_path / "two.zip"))


def unpacked(export: Path, trusted: set[str], into: Path) -> tuple[VersionFiles, Path]:
    into.mkdir()
    return exported(export, trusted, into), into


def test_a_withdrawn_patient_leaves_no_risk_and_no_page(
    copied: Path, model: StudyModel, tmp_path: Path
) -> None:
    settings = settings_at(copied, "site-01")
    found = score(copied, model).table
    gone, stays = found.index[0], found.index[1]
    mine, others = tmp_path / "elsewhere" / "mine.csv", settings.path("predictions", "others.csv")
    write_predictions(found, mine, home=settings.home)
    write_predictions(found.drop(index=gone), others, home=settings.home)
    for patient in (gone, stays):
        page = board_page(settings.home, patient)
        page.parent.mkdir(exist_ok=True)
        page.write_text("page")
    draft = shutil.copy(settings.path(COHORT), tmp_path / "before.h5mu")
    withdraw(settings, gone)
    assert not mine.exists()
    assert others.exists()
    assert not board_page(settings.home, gone).exists()
    assert board_page(settings.home, stays).exists()
    again = predict_cohort(settings, model, Path(draft))
    assert gone not in again.table.index
    assert stays in again.table.index
    assert "1 withdrawn patients are left out" in again.notes


@pytest.mark.parametrize(
    "hostile", ["../../etc/passwd", "<script>alert(1)</script>", "a/b", "..", "", "x" * 300, "ü\0"]
)
def test_a_pseudonym_never_becomes_a_path(hostile: str, tmp_path: Path) -> None:
    page = board_page(tmp_path, hostile)
    assert page.resolve().parent == (tmp_path / "board").resolve()
    assert page.name.isascii()
    assert set("/<>\0").isdisjoint(page.name)
    assert len(page.name) < 100
    assert page_stem(hostile) != page_stem(hostile + "_")


def test_names_stay_readable_and_apart() -> None:
    assert page_stem("p-001_B") == "p-001_B"
    assert page_stem("p 1") != page_stem("p/1") != page_stem("p_1")


def test_forgetting_somebody_unknown_removes_nothing(tmp_path: Path) -> None:
    table = pd.DataFrame({"risk": [0.5]}, index=pd.Index(["p1"], name="patient_id"))
    write_predictions(table, tmp_path / "predictions" / "risks.csv", home=tmp_path)
    assert forget_patient(tmp_path, "p2") == 0
    assert forget_patient(tmp_path, "p1") == 1
    assert written_predictions(tmp_path) == []


@pytest.mark.border
@pytest.mark.parametrize(
    "content",
    [b"patient_id;risk\np1;0,5\n", "patient_id,ort\np1,K\u00f6ln\n".encode("latin-1"),
     "patient_id\trisk\np1\t0,5\n".encode("utf-16")],
)  # fmt: skip
def test_a_table_that_was_saved_anew_in_another_form_is_withdrawn(
    content: bytes, tmp_path: Path
) -> None:
    table = pd.DataFrame({"risk": [0.5]}, index=pd.Index(["p1"], name="patient_id"))
    target = tmp_path / "predictions" / "risks.csv"
    write_predictions(table, target, home=tmp_path)
    target.write_bytes(content)
    assert forget_patient(tmp_path, "x9") == 0
    assert forget_patient(tmp_path, "p1") == 1
