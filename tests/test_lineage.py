"""A version's lineage: what it says, and that one changed byte of anything is found by name."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pandas as pd
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.identity import identity
from flows.lineage import LineageError, find_snapshot, lineage_values, opened_lineage
from flows.lineage_check import FAULTS, Item, check_lineage, check_site_files
from flows.lineage_decisions import check_decisions
from flows.lineage_encoders import check_site_models
from flows.lineage_inputs import assignment_item, manifest_item
from flows.lineage_logged import check_shown
from flows.mlflow_store import client_of
from flows.model_signing import sign_model
from flows.protocol import load_protocol
from flows.provenance import read_provenance
from flows.site_registry import register_encoders
from flows.snapshots import withdraw
from fusion.audit import AuditLog
from fusion.keys import SigningKey
from infra.settings import Workspace
from tests.lineages import SITES, cohort_of, prepare, promote, register, write_study

pytestmark = pytest.mark.border

if TYPE_CHECKING:
    from infra.settings import SiteSettings

NAME = "lung-os-fusion"
OTHER = SigningKey(b"o" * 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a study with a registered version, made once."""
    root = tmp_path_factory.mktemp("made") / "study"
    workspace = write_study(root)
    protocol = load_protocol(workspace.study_file)
    for site in SITES:
        settings = workspace.site(site)
        assert register_encoders(settings, protocol, cohort_of(settings, protocol)) == 3
    register(workspace)
    promote(workspace)
    return root


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy, to be harmed; MLflow's database still names the first folder."""
    monkeypatch.delenv("CONSILIUM_TRACKING_URI", raising=False)
    shutil.copytree(made, tmp_path / "copy")
    return Workspace(root=tmp_path / "copy")


def verify(study: Workspace) -> list[Item]:
    with opened_lineage(study) as found:
        return check_lineage(found)


def faults(study: Workspace) -> set[tuple[str, str, str]]:
    return {(x.party, x.name, x.state) for x in verify(study) if x.state in FAULTS}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def one(study: Workspace, pattern: str) -> Path:
    """First file of a pattern."""
    return sorted(study.root.glob(pattern))[0]


def test_a_whole_lineage_has_no_fault(study: Workspace) -> None:
    items = verify(study)
    assert [x for x in items if x.state in FAULTS] == []
    assert {x.party for x in items if x.state == "elsewhere"} == {"site-03", "site-04"}
    assert {(x.party, x.name) for x in items} >= {
        (site, name)
        for site in SITES
        for name in (
            "clinical", "cohort of this version, snapshot 1", "radiology: 1 file read", "manifest",
            "assignments of this version's patients",
        )
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pattern", "party", "named"),
    [
        ("study.toml", "coordinator", "study.toml"),
        ("artifacts/*/*/artifacts/encoders.json", "coordinator", "artifact encoders.json"),
        ("artifacts/*/*/artifacts/networks.json", "coordinator", "artifact networks.json"),
        ("artifacts/*/*/artifacts/protocol.json", "coordinator", "artifact protocol.json"),
        ("artifacts/*/*/artifacts/logged.json", "coordinator", "artifact logged.json"),
        ("artifacts/*/*/artifacts/model_card.md", "coordinator", "artifact model_card.md"),
        ("coordinator/audit.jsonl", "coordinator", "audit log"),
        ("artifacts/*/*/artifacts/report.html", "coordinator", "artifact report.html"),
        ("artifacts/*/*/artifacts/figures/*.png", "coordinator", "artifact figures/"),
        ("artifacts/*/*/artifacts/lineage.json", "coordinator", "lineage.json"),
        ("artifacts/*/models/*/artifacts/MLmodel", "coordinator", "model: MLmodel"),
        ("artifacts/*/models/*/artifacts/artifacts/*", "coordinator", "model: artifacts/fusion"),
        ("artifacts/*/models/*/artifacts/*.py", "coordinator", "model: fusion_pyfunc.py"),
        ("artifacts/*/models/*/artifacts/signature.json", "coordinator", "model: signature"),
        ("runs/*/record.json", "coordinator", "record.json"),
        ("site-01/cohort.h5mu", "site-01", "cohort.h5mu"),
        ("site-02/snapshots/0001/cohort.h5mu", "site-02", "snapshots/0001/cohort.h5mu"),
        ("site-01/features/radiology.h5ad", "site-01", "features/radiology.h5ad"),
        ("site-01/radiology.csv", "site-01", "radiology: file 1 of 1"),
        ("site-02/pathology.csv", "site-02", "pathology: file 1 of 1"),
        ("site-01/encoders/radiology/*.safetensors", "site-01", "encoders/radiology/encoder"),
        ("site-01/encoders/clinical/log_hazard.npy", "site-01", "encoders/clinical/log_haz"),
        ("site-01/encoders/clinical/encoder.json", "site-01", "encoders/clinical/encoder.json"),
        ("site-02/runs/artifacts/*/models/*/artifacts/*.safetensors", "site-02", "lung-os-"),
        ("site-02/runs/artifacts/*/models/*/artifacts/README.md", "site-02", "lung-os-"),
        ("site-01/digests.json", "site-01", ""),
        ("site-01/manifest.csv", "site-01", "manifest"),
        ("site-02/assignments.csv", "site-02", "assignments"),
        ("site-01/snapshots/0001/rows.json", "site-01", "snapshots/0001/rows.json"),
    ],
)
def test_one_changed_byte_is_found_by_name(
    study: Workspace, pattern: str, party: str, named: str
) -> None:
    flip(one(study, pattern))
    found = faults(study)
    assert [x for x in found if x[0] == party and named in x[1]], found
    assert {x[0] for x in found} == {party}


@pytest.mark.parametrize("at", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_it_does_not_matter_which_byte_of_a_cohort(study: Workspace, at: float) -> None:
    path = study.root / "site-01" / "cohort.h5mu"
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x40
    path.write_bytes(data)
    assert ("site-01", "cohort.h5mu", "changed") in faults(study)


@pytest.mark.parametrize("name", ["manifest.csv", "assignments.csv", "digests.json"])
def test_no_byte_of_a_list_is_changed_unseen(study: Workspace, name: str) -> None:
    path = study.root / "site-01" / name
    whole = path.read_bytes()
    spread = Random(0).sample(range(len(whole)), 25)
    header, last = range(0, 40, 4), (len(whole) - 1,)
    settings = study.site("site-01")
    keyed = cohort_of(settings, load_protocol(study.study_file))
    known = find_snapshot(settings, keyed)
    assert known is not None
    folder = settings.path("snapshots", f"{known[0]:04d}")

    def items() -> list[Item]:
        lists = (assignment_item(settings, known[1]), manifest_item(settings, known[1], folder))
        return [*check_site_files(settings), *lists]

    assert {x.state for x in items()} == {"whole"}
    for at in {*spread, *header, *last}:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = {x.name for x in items() if x.state in FAULTS}
        assert any(x.startswith(name.removesuffix(".csv")) for x in found), (at, found)


def test_a_flipped_split_is_told_of_by_what_it_is(study: Workspace) -> None:
    path = study.root / "site-01" / "assignments.csv"
    table = pd.read_csv(path, dtype=str)
    table.loc[5, "split"] = "train" if table.loc[5, "split"] == "test" else "test"
    table.to_csv(path, index=False)
    items = [x for x in verify(study) if x.state in FAULTS]
    assert {(x.party, x.name, x.state) for x in items} == {
        ("site-01", "assignments.csv", "changed"),
        ("site-01", "assignments of this version's patients", "changed"),
    }
    assert items[-1].why == "1 patient is not assigned as this version had it"


def come(settings: SiteSettings, *ids: str) -> None:
    """Add patients to a site's registry, tables and manifest."""
    home = settings.home
    registry = pd.read_csv(home / "clinical.csv")
    more = registry.head(len(ids)).assign(patient_id=ids)
    pd.concat([registry, more]).to_csv(home / "clinical.csv", index=False)
    for name in ("pathology", "radiology"):
        table = pd.read_csv(home / f"{name}.csv")
        more = table.head(len(ids)).assign(patient_id=ids)
        pd.concat([table, more]).to_csv(home / f"{name}.csv", index=False)
    with (home / "manifest.csv").open("a") as manifest:
        manifest.writelines(f"{x},{m},{m}.csv,,\n" for x in ids for m in ("pathology", "radiology"))


def test_a_manifest_that_grew_is_told_of_and_no_fault(study: Workspace) -> None:
    settings = study.site("site-01")
    with settings.path("manifest.csv").open("a") as manifest:
        manifest.write("site-01-003,pathology,pathology.csv,,\nnew-one,radiology,radiology.csv,,\n")
    assert faults(study) == set()
    (item,) = [x for x in verify(study) if (x.party, x.name) == ("site-01", "manifest")]
    assert item.state == "grown"
    assert item.why.startswith("2 rows came since")
    (other,) = [x for x in verify(study) if (x.party, x.name) == ("site-02", "manifest")]
    assert other.state == "whole"


def test_growing_nights_raise_no_false_alarm(study: Workspace) -> None:
    settings, protocol = study.site("site-01"), load_protocol(study.study_file)
    before = settings.path("assignments.csv").read_text()
    for night in range(3):
        come(settings, f"site-01-{100 + night}")
        prepare(settings, protocol)
    assert faults(study) == set()
    assert settings.path("assignments.csv").read_text() > before
    assert len(list(settings.path("snapshots").glob("[0-9]*"))) == 1
    come(settings, *(f"site-01-{200 + i}" for i in range(12)))
    prepare(settings, protocol)
    cohort_of(settings, protocol)  # cuts the next snapshot
    assert len(list(settings.path("snapshots").glob("[0-9]*"))) == 2
    assert faults(study) == set()
    items = {x.name: x for x in verify(study) if x.party == "site-01" and x.state == "grown"}
    assert set(items) == {"manifest", "pathology: file 1 of 1", "radiology: file 1 of 1"}
    assert items["manifest"].why.startswith("30 rows came since")
    # A value of the version's own is found in what grew, too.
    table = pd.read_csv(settings.path("radiology.csv"))
    table.loc[4, "entropy"] += 0.001
    table.to_csv(settings.path("radiology.csv"), index=False)
    assert faults(study) == {("site-01", "radiology: file 1 of 1", "changed")}


def test_a_night_does_not_bless_a_split_that_was_flipped_before_it(study: Workspace) -> None:
    settings, protocol = study.site("site-01"), load_protocol(study.study_file)
    come(settings, "site-01-100")  # waits in the draft, and is in no snapshot yet
    prepare(settings, protocol)
    path = settings.path("assignments.csv")
    whole = path.read_text()
    for new, old in (("train", "test"), ("test", "train")):
        path.write_text(whole.replace(f"site-01-100,{old}", f"site-01-100,{new}"))
    assert path.read_text() != whole
    come(settings, "site-01-101")
    prepare(settings, protocol)
    assert ("site-01", "assignments.csv", "changed") in faults(study)
    path.write_text(whole)  # from the backup; who came since is assigned as before
    prepare(settings, protocol)
    assert "site-01-101" in path.read_text()
    assert ("site-01", "assignments.csv", "changed") not in faults(study)


def test_a_night_that_was_killed_raises_no_false_alarm(study: Workspace) -> None:
    settings, protocol = study.site("site-01"), load_protocol(study.study_file)
    come(settings, "site-01-100")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.site.remember_draft", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, protocol)
    assert "site-01-100" in settings.path("assignments.csv").read_text()
    prepare(settings, protocol)
    assert faults(study) == set()


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("site-01-007,radiology,radiology.csv,,\n", "", "1 input is not listed"),
        ("site-01-007,radiology,radiology.csv", "site-01-007,radiology,elsewhere.csv", "1 input"),
        ("site-01-007,radiology", "site-01-008,radiology", "1 input is not listed"),
        ("site-01-007,radiology,radiology.csv,,", "site-01-007,radiology,radiology.csv,,x", "1 in"),
        ("patient_id,modality,path,mask_path,roi", "patient_id,modality,path,mask_path,roe", "48 "),
        ("patient_id", "patient_ie", "48 inputs are not listed"),
    ],
)
def test_a_row_behind_the_version_that_changed_is_found(
    study: Workspace, old: str, new: str, why: str
) -> None:
    path = study.root / "site-01" / "manifest.csv"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    (item,) = [x for x in verify(study) if (x.party, x.name) == ("site-01", "manifest")]
    assert item.state == "changed"
    assert item.why.startswith(why)


def test_a_changed_outcome_in_the_registry_is_found(study: Workspace) -> None:
    path = study.root / "site-01" / "clinical.csv"
    table = pd.read_csv(path)
    table.loc[3, "time_days"] += 1
    table.to_csv(path, index=False)
    (item,) = [x for x in verify(study) if x.state in FAULTS]
    assert (item.party, item.name, item.state) == ("site-01", "clinical", "changed")
    assert item.why.startswith("1 row")


@pytest.mark.parametrize(
    ("pattern", "party", "named"),
    [
        ("artifacts/*/*/artifacts/lineage.json", "coordinator", "lineage.json"),
        ("artifacts/*/*/artifacts/encoders.json", "coordinator", "artifact encoders.json"),
        ("artifacts/*/models/*/artifacts/conda.yaml", "coordinator", "model: conda.yaml"),
        ("site-01/cohort.h5mu", "site-01", "cohort.h5mu"),
        ("site-01/radiology.csv", "site-01", "radiology: raw inputs"),
        ("site-01/digests.json", "site-01", "digests.json"),
        ("site-01/manifest.csv", "site-01", "manifest"),
        ("site-01/assignments.csv", "site-01", "assignments.csv"),
        ("site-01/snapshots/0001/rows.json", "site-01", "snapshots/0001/rows.json"),
        ("artifacts/*/*/artifacts/logged.json", "coordinator", "artifact logged.json"),
    ],
)
def test_a_missing_file_is_found_by_name(
    study: Workspace, pattern: str, party: str, named: str
) -> None:
    one(study, pattern).unlink()
    items = [x for x in verify(study) if x.party == party and x.name == named]
    # A raw input that the site no longer has cannot be compared; anything else must be there.
    assert [x.state for x in items] == ["elsewhere" if "raw" in named else "missing"]


def test_an_added_artifact_is_found(study: Workspace) -> None:
    one(study, "artifacts/*/*/artifacts/record.json").with_name("better.html").write_text("")
    assert faults(study) == {("coordinator", "artifact better.html", "changed")}


def test_an_added_file_in_the_model_is_found(study: Workspace) -> None:
    (one(study, "artifacts/*/models/*/artifacts/MLmodel").parent / "more.py").write_text("")
    assert faults(study) == {("coordinator", "model: more.py", "changed")}


def test_a_tag_that_somebody_edited_is_found(study: Workspace) -> None:
    client = client_of(study.mlflow_uri)
    client.set_model_version_tag(NAME, "1", "consilium.protocol", "0" * 64)
    named = "tag consilium.protocol of the version"
    assert faults(study) == {("coordinator", named, "changed")}


PARENT = "(SELECT run_uuid FROM runs WHERE name LIKE 'study-%')"
CHILD = "(SELECT run_uuid FROM runs WHERE name LIKE 'round-03-%')"
FIGURE = "'federated/concordance'"


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("UPDATE model_versions SET description = description || '.'", "description of the ver"),
        ("UPDATE model_version_tags SET value = '1' WHERE key = 'consilium.code'",
         "tag consilium.code of the version"),
        ("UPDATE model_version_tags SET value = 'site-01' WHERE key = 'consilium.sites'",
         "tag consilium.sites of the version"),
        ("DELETE FROM model_version_tags WHERE key = 'consilium.lowered_minimums'",
         "tag consilium.lowered_minimums of the version"),
        ("INSERT INTO model_version_tags (name, version, key, value) "
         "VALUES ('lung-os-fusion', 1, 'consilium.audited', 'yes')",
         "tag consilium.audited of the version"),
        (f"UPDATE tags SET value = 'patients' WHERE key = 'consilium.data' AND run_uuid = {PARENT}",
         "tag consilium.data of the run"),
        (f"UPDATE tags SET value = 'other' WHERE key = 'mlflow.user' AND run_uuid = {PARENT}",
         "tag mlflow.user of the run"),
        ("UPDATE params SET value = '730' WHERE key = 'study.horizon_days'",
         "parameter study.horizon_days of the run"),
        (f"UPDATE latest_metrics SET value = value + 1e-9 WHERE key = {FIGURE}",
         "metric federated/concordance of the run"),
        (f"UPDATE metrics SET value = value + 1e-9 WHERE key = {FIGURE}",
         "history of metric federated/concordance"),
        ("UPDATE metrics SET timestamp = timestamp + 1 WHERE key = 'n_events'",
         "history of metric n_events"),
        ("UPDATE metrics SET value = value / 2 WHERE key = 'objective/fusion' AND step = 10",
         "history of metric objective/fusion"),
        (f"UPDATE logged_model_metrics SET metric_value = 0.9 WHERE metric_name = {FIGURE}",
         "metric federated/concordance of the model"),
        (f"DELETE FROM logged_model_metrics WHERE metric_name = {FIGURE}",
         "metric federated/concordance of the model"),
        ("UPDATE logged_model_metrics SET metric_value = 0.9 "
         "WHERE metric_name = 'site-02/federated/concordance'",
         "metric site-02/federated/concordance on site-02 of the model"),
        ("UPDATE logged_model_params SET param_value = '1' WHERE param_key = 'gates.min_sites'",
         "parameter gates.min_sites of the model"),
        ("UPDATE logged_model_tags SET tag_value = '1' WHERE tag_key = 'consilium.code'",
         "tag consilium.code of the model"),
        (f"UPDATE latest_metrics SET value = 2 WHERE key = 'n_sites' AND run_uuid = {CHILD}",
         "round 3 of the run"),
        (f"UPDATE metrics SET value = 2 WHERE key = 'n_sites' AND run_uuid = {CHILD}",
         "round 3 of the run"),
        (f"UPDATE params SET value = 'fusion' WHERE key = 'stage' AND run_uuid = {CHILD}",
         "round 3 of the run"),
        (f"UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = {CHILD}",
         "round 3 of the run"),
        ("UPDATE datasets SET dataset_source = replace(dataset_source, 'site-02', 'site-09') "
         "WHERE name = 'site-02'", "data set site-02 of the run"),
        ("UPDATE input_tags SET value = 'training'", "data set site-04 of the run"),
        ("UPDATE model_version_tags SET value = 'passed' WHERE key = 'gate.approvals'",
         "tag gate.approvals of the version"),
        ("UPDATE model_version_tags SET value = '0.9' WHERE key = 'gate.concordance.found'",
         "tag gate.concordance.found of the version"),
        ("DELETE FROM model_version_tags WHERE key = 'gate.minimum_counts'",
         "tag gate.minimum_counts of the version"),
        ("UPDATE model_version_tags SET value = 'x' || substr(value, 2) WHERE key = 'approved_by'",
         "tag approved_by of the version"),
        ("UPDATE model_version_tags SET value = '2026-01-01T00:00:00Z' WHERE key = 'approved_at'",
         "tag approved_at of the version"),
        ("UPDATE model_version_tags SET value = '2' WHERE key = 'consilium.previous_champion'",
         "tag consilium.previous_champion of the version"),
        ("INSERT INTO model_version_tags (name, version, key, value) "
         "VALUES ('lung-os-fusion', 1, 'consilium.rejected', 'other')",
         "tag consilium.rejected of the version"),
        ("DELETE FROM registered_model_aliases WHERE alias = 'champion'", "alias champion"),
        ("UPDATE registered_model_aliases SET alias = 'challenger' WHERE alias = 'champion'",
         "alias champion"),
    ],
)  # fmt: skip
def test_what_mlflow_shows_is_held_against_what_was_signed(
    study: Workspace, sql: str, named: str
) -> None:
    with sqlite3.connect(study.root / "mlflow.db") as database:
        assert database.execute(sql).rowcount > 0
    database.close()
    with opened_lineage(study) as lineage:
        items = [*check_shown(lineage, lineage.statement), *check_decisions(lineage)]
    found = {x.name for x in items if x.state in FAULTS}
    assert found, sql
    assert all(name.startswith(named) for name in found), found


def test_the_command_names_what_mlflow_shows_otherwise(study: Workspace) -> None:
    client = client_of(study.mlflow_uri)
    client.update_model_version(NAME, "1", "A better model than it is.")
    code, told = invoke(study, "verify")
    assert code == 1
    assert "coordinator: description of the version: changed" in told
    assert f"{NAME} version 1: 1 not as they were" in told


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("UPDATE model_version_tags SET value = '0' WHERE key = 'consilium.cohort'",
         "tag consilium.cohort of lung-os-"),
        ("UPDATE model_versions SET description = replace(description, 'never', 'always')",
         "description of lung-os-"),
        ("UPDATE metrics SET value = value + 1e-9 WHERE step = 0", "training curve of lung-os-"),
        ("DELETE FROM model_versions WHERE name LIKE '%radiology%'", "lung-os-radiology-encoder"),
    ],
)  # fmt: skip
def test_what_a_site_s_own_mlflow_shows_is_held_against_what_it_signed(
    study: Workspace, sql: str, named: str
) -> None:
    with sqlite3.connect(study.root / "site-01" / "runs" / "mlflow.db") as database:
        assert database.execute(sql).rowcount > 0
    database.close()
    found = {x.name for x in check_site_models(study.site("site-01")) if x.state in FAULTS}
    assert found, sql
    assert all(name.startswith(named) for name in found), found


@pytest.mark.parametrize("at", range(0, 1000, 125))
def test_the_list_of_a_site_s_encoders_is_held_against_them(study: Workspace, at: int) -> None:
    path = study.root / "site-01" / "runs" / "encoders.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    found = {x.name for x in check_site_models(study.site("site-01")) if x.state in FAULTS}
    if whole[at : at + 1].isspace():
        return
    assert any("encoder" in x for x in found), whole[at - 20 : at + 20]


def test_notes_that_people_add_in_mlflow_are_no_faults(study: Workspace) -> None:
    client = client_of(study.mlflow_uri)
    run_id = client.get_model_version(NAME, "1").run_id
    client.set_tag(run_id, "mlflow.note.content", "looked at in May")
    client.set_model_version_tag(NAME, "1", "discussed", "tumour board")
    assert faults(study) == set()


def test_a_version_that_nobody_promoted_cannot_be_made_to_look_so(study: Workspace) -> None:
    (study.root / "coordinator" / "audit.jsonl").unlink()
    assert faults(study) == {("coordinator", "audit log", "missing")}
    log = AuditLog(
        study.root / "coordinator" / "audit.jsonl", party="coordinator",
        key=identity(study.root / "coordinator"),
    )  # fmt: skip
    log.append("started")
    log.close()
    found = faults(study)
    assert ("coordinator", "alias champion", "changed") in found
    assert ("coordinator", "tag approved_by of the version", "changed") in found


def test_an_edited_audit_log_is_found_by_name(study: Workspace) -> None:
    log = study.root / "coordinator" / "audit.jsonl"
    log.write_text(log.read_text().replace('"counts":true', '"counts":false', 1))
    assert faults(study) == {("coordinator", "audit log", "changed")}


def test_elsewhere_than_at_the_coordinator_decisions_are_not_judged(study: Workspace) -> None:
    shutil.rmtree(study.root / "coordinator")
    items = [x for x in verify(study) if x.name == "gates and decisions"]
    assert [x.state for x in items] == ["elsewhere"]


def test_figures_that_mlflow_shows_are_those_of_the_signed_record(study: Workspace) -> None:
    record = json.loads(one(study, "artifacts/*/*/artifacts/record.json").read_text())
    logged = json.loads(one(study, "artifacts/*/*/artifacts/logged.json").read_text())
    figures = {x["key"]: x["value"] for x in logged["metrics"]}
    arms = record["results"]["arms"]
    for arm, key in (("protocol", "federated"), ("local_only", "local_only")):
        for part, end in (("value", ""), ("low", "_low"), ("high", "_high")):
            assert figures[f"{key}/concordance{end}"] == arms[arm]["concordance"][part]
    assert figures["n_patients"] == record["totals"]["n_fitted"]
    assert (
        figures["site-02/federated/concordance"]
        == (arms["protocol"]["by_site"]["site-02"]["value"])
    )
    assert logged["tags"]["consilium.protocol"] == record["protocol_fingerprint"]
    assert logged["tags"]["consilium.code"] == record["code_version"]


def test_somebody_else_cannot_sign_it_all_anew(study: Workspace) -> None:
    folder = one(study, "artifacts/*/models/*/artifacts/MLmodel").parent
    sign_model(folder, OTHER)
    assert ("coordinator", "model: signature.json", "changed") in faults(study)


def test_other_code_of_the_same_commit_is_found_and_another_release_is_not_judged(
    study: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.lineage_check.source_digest", lambda *_: "0" * 64)
    assert faults(study) == {("coordinator", "code", "changed")}
    monkeypatch.setattr("flows.lineage_check.git_commit", lambda: "1.0")
    assert faults(study) == set()


def test_a_site_that_prepares_again_without_news_stays_whole(study: Workspace) -> None:
    settings = study.site("site-01")
    prepare(settings, load_protocol(study.study_file))
    assert faults(study) == set()


def test_a_night_does_not_bless_what_was_changed_before_it(study: Workspace) -> None:
    settings = study.site("site-01")
    path = settings.path("features", "radiology.h5ad")
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")

    old = settings.path("digests.json").stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    prepare(settings, load_protocol(study.study_file))
    assert ("site-01", "features/radiology.h5ad", "changed") in faults(study)


def test_a_study_that_got_another_name_is_the_changed_item(study: Workspace) -> None:
    path = study.study_file
    path.write_text(path.read_text().replace("lung-os", "lunh-os"))
    assert ("coordinator", "study.toml", "changed") in faults(study)


def test_a_site_alone_verifies_its_own_part(study: Workspace, tmp_path: Path) -> None:
    home = study.root / "site-01"
    shutil.copy(study.study_file, home / "study.toml")
    alone = Workspace(root=home)
    code, told = invoke(alone)
    assert code == 0
    assert "lung-os-radiology-encoder version 1" in told
    code, told = invoke(alone, "verify")
    assert code == 0, told
    flip(home / "encoders" / "clinical" / "encoder.safetensors")
    code, told = invoke(alone, "verify")
    assert code == 1
    assert "encoders/clinical/encoder.safetensors: changed" in told


def test_after_a_withdrawal_nothing_is_missed(study: Workspace) -> None:
    settings = study.site("site-01")
    withdraw(settings, "site-01-003")
    assert not list(settings.home.rglob("*.safetensors"))
    items = [x for x in verify(study) if x.party == "site-01"]
    assert [x for x in items if x.state in FAULTS] == []
    assert "a patient withdrew" in {x.why for x in items}


def test_the_tree_goes_back_to_the_inputs_and_names_no_file(study: Workspace) -> None:
    with opened_lineage(study) as found:
        values = lineage_values(found)
        assert found.aliases == ("candidate", "champion")
    assert (values["model"], values["version"]) == (NAME, 1)
    assert len(values["lock"]) == len(values["code"]) == len(values["signed_by"]) == 64
    assert set(values["encoders"]) == {"clinical", "pathology", "radiology"}
    assert "local" in values["encoders"].values()
    sites = {x["site"]: x for x in values["sites"]}
    assert [x for x, of in sites.items() if of["here"]] == list(SITES)
    assert sites["site-04"]["role"] == "external"
    table = sites["site-01"]["modalities"]["radiology"]
    assert table["patients"] == 24
    assert len(table["inputs"]) == 1
    assert {x["version"] for x in sites["site-01"]["own_encoders"]} == {1}
    text = json.dumps(values)
    assert "site-01-0" not in text  # patients
    assert ".csv" not in text
    assert str(study.root) not in text


def test_what_is_signed_tells_only_what_may_leave(study: Workspace) -> None:
    path = one(study, "artifacts/*/*/artifacts/lineage.json")
    said = read_provenance(path)
    assert said.is_signed()
    assert set(said.cohorts) == {"site-01", "site-02", "site-03", "site-04"}
    protocol = load_protocol(study.study_file)
    assert said.cohorts["site-01"] == cohort_of(study.site("site-01"), protocol)
    assert "safetensors" not in path.read_text()


@pytest.mark.parametrize("model", [None, NAME, f"{NAME}@candidate", f"models:/{NAME}/1"])
def test_a_version_is_found_by_each_of_its_names(study: Workspace, model: str | None) -> None:
    with opened_lineage(study, model) as found:
        assert int(found.version.version) == 1


@pytest.mark.parametrize("model", ["other-fusion", f"{NAME}@challenger", f"{NAME}/7", "a@b@c"])
def test_a_version_that_is_not_there_is_refused(study: Workspace, model: str) -> None:
    with pytest.raises(LineageError, match="model: found"), opened_lineage(study, model):
        raise AssertionError("unreachable")


def test_a_folder_without_a_registry_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(LineageError, match=r"found no mlflow\.db"),
        opened_lineage(Workspace(root=tmp_path)),
    ):
        raise AssertionError("unreachable")


def invoke(study: Workspace, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["lineage", *arguments, "--root", str(study.root)])
    return done.exit_code, done.output


def test_the_command_ends_with_1_and_names_what_changed(
    study: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", str(study.root))
    code, told = invoke(study)
    assert code == 0
    assert "snapshot 1" in told
    code, told = invoke(study, "verify", NAME)
    assert (code, "whole" in told) == (0, True)
    flip(study.root / "site-02" / "radiology.csv")
    code, told = invoke(study, "verify")
    assert code == 1
    assert "site-02: radiology: file 1 of 1 (radiology.csv): changed" in told
    code, told = invoke(study, "verify", "--json")
    values = json.loads(told)
    assert (code, values["whole"]) == (1, False)
    assert ".csv" not in told


@pytest.mark.slow
def test_the_demo_s_model_is_whole_until_a_byte_of_it_changes(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    consilium = Path(sys.executable).with_name("consilium")

    def status(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [consilium, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        return done.returncode, done.stdout + done.stderr

    code, told = status("demo", "--tables-only", "--sites", "150,110,30", "--out", str(root))
    assert code == 0, told
    code, told = status("lineage", "verify", "--root", str(root))
    assert code == 0, told
    for pattern, named in (
        ("site-03/cohort.h5mu", "site-03: cohort.h5mu: changed"),
        ("site-01/encoders/radiology/encoder.safetensors", "encoder.safetensors: changed"),
        ("study.toml", "study.toml: changed"),
    ):
        path = next(root.glob(pattern))
        whole = path.read_bytes()
        flip(path)
        code, told = status("lineage", "verify", "--root", str(root))
        assert code == 1
        assert named in told
        path.write_bytes(whole)
