"""The monthly evaluation of the model in use: when it runs, what it leaves, whom it believes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

from flows import monitoring
from flows.gates import cohorts_of
from flows.identity import identity
from flows.lineage import opened_lineage
from flows.lineage_check import FAULTS, check_lineage
from flows.links import InMemory
from flows.mlflow_store import client_of
from flows.monitoring import ALARMS_TAG, LAST_TAG, ON_TAG, evaluate_champion
from flows.prefect_api import PrefectApi
from flows.promotable import CHAMPION, COHORTS_TAG, EVALUATION_TAG, evaluation_on
from flows.protocol import load_protocol
from flows.records import StudyRecord
from flows.registry import track_study
from flows.report_files import write_report
from flows.sealed import SiteError
from flows.services import client_settings, prefect_server
from fusion.federation import run_federation, summarise
from fusion.federation.consortium import COORDINATOR
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.files import fingerprint
from tests.hospitals import leave_draft, patients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

NAME = "small-fusion"
SITES = {"site-01": 200, "site-02": 160}
STUDY = """\
[study]
name = "small"
data = "simulated"
horizon_days = 730
grid_days = [365, 730]

[modality.clinical]
kind = "clinical"
numeric = ["age", "weight"]

[modality.blood]
kind = "tabular"
columns = ["hb", "crp", "wbc"]

[encoder.blood]
harmonise = "none"

[privacy]
patients_per_input = 3
"""


def leave_cohort(root: Path, site: str, *, more: int = 0, moved: float = 0.0) -> None:
    """Write a site's draft; ``more`` patients came since, and all blood counts moved."""
    workspace = Workspace(root=root)
    number = list(SITES).index(site) + 1
    came = patients(more, number, first=SITES[site])
    table = pd.concat([patients(SITES[site], number), came])
    table.loc[:, ["hb", "crp", "wbc"]] += moved
    leave_draft(workspace.site(site), table, load_protocol(workspace.study_file))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a study that was run over its sites, its version in use; made once."""
    root = tmp_path_factory.mktemp("made")
    (root / STUDY_FILE).write_text(STUDY)
    for site in SITES:
        (root / site).mkdir()
        (root / site / SITE_FILE).write_text(f'name = "{site}"\nsecret = "{site:.<40}"\n')
        leave_cohort(root, site)
    workspace = Workspace(root=root, tracking_uri=None)
    study = load_protocol(workspace.study_file)
    link = InMemory(workspace, study, tuple(SITES))
    plan = study.plan(link.run_key())
    link.open(plan)
    fitted = run_federation(plan, link)
    record = StudyRecord(plan.run, study, fitted, summarise(fitted), "c0ffee" * 6 + "c0de")
    created = datetime(2026, 11, 2, tzinfo=UTC)
    track_study(
        record,
        tracking_uri=workspace.mlflow_uri,
        artifact_root=root / "artifacts",
        report=write_report(record, root / "runs" / plan.run[:12], created=created),
        key=identity(root / COORDINATOR),
    )
    client_of(workspace.mlflow_uri).set_registered_model_alias(NAME, CHAMPION, "1")
    return root


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy to be evaluated in; MLflow keeps its artifacts in the first folder."""
    for name in ("CONSILIUM_TRACKING_URI", "CONSILIUM_MODEL_KEYS", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "copy"
    shutil.copytree(made, root, ignore=shutil.ignore_patterns("artifacts", "runs"))
    monkeypatch.setenv("CONSILIUM_ROOT", str(root))
    # Without a server tasks are their bodies.
    for task in ("check_champion", "track_evaluation"):
        monkeypatch.setattr(monitoring, task, getattr(monitoring, task).fn)
    return Workspace(root=root)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Text of every artifact that the flow makes."""
    texts: list[str] = []

    def keep(text: str, *, key: str, description: str) -> None:
        assert key == "evaluation"
        texts.append(text)

    monkeypatch.setattr(monitoring, "create_markdown_artifact", keep)
    return texts


def evaluate(sites: tuple[str, ...] = ()) -> tuple[str, str, str]:
    """Run the flow's body; give the type, the name and the message of the state it ends in."""
    state: Any = evaluate_champion.fn("small", list(sites))
    return state.type.value, state.name, state.message


def champion_of(client: MlflowClient) -> ModelVersion:
    return client.get_model_version(NAME, "1")


def evaluations(client: MlflowClient) -> list[Any]:
    experiment = client.get_run(champion_of(client).run_id).info.experiment_id
    found = client.search_runs([experiment], f"tags.`{EVALUATION_TAG}` = '1'")
    return list(found)


def text_of(client: MlflowClient, run: Any, folder: Path) -> str:
    folder.mkdir()
    path = client.download_artifacts(run.info.run_id, "evaluation.md", str(folder))
    return Path(path).read_text()


def test_cohorts_that_were_seen_are_skipped_saying_so(study: Workspace, shown: list[str]) -> None:
    assert evaluate() == ("COMPLETED", "Skipped", "no site has a new snapshot")
    assert shown == []
    client = client_of(study.mlflow_uri)
    assert evaluations(client) == []
    assert ON_TAG not in champion_of(client).tags


def test_fewer_patients_than_a_snapshot_needs_are_no_news(
    study: Workspace, shown: list[str]
) -> None:
    leave_cohort(study.root, "site-01", more=9)
    assert evaluate()[1] == "Skipped"
    assert shown == []


def test_without_a_champion_there_is_nothing_to_do(study: Workspace, shown: list[str]) -> None:
    client_of(study.mlflow_uri).delete_registered_model_alias(NAME, CHAMPION)
    assert evaluate() == ("COMPLETED", "Skipped", "no model is in use")
    assert shown == []


def test_new_cohorts_are_evaluated_once_and_noted(
    study: Workspace, shown: list[str], tmp_path: Path
) -> None:
    leave_cohort(study.root, "site-01", more=40)
    assert evaluate() == ("COMPLETED", "Completed", "no alarm")
    client = client_of(study.mlflow_uri)
    (run,), version = evaluations(client), champion_of(client)
    (text,) = shown
    assert text == text_of(client, run, tmp_path / "kept")
    assert text.startswith("# Version 1, evaluated again\n\nNo alarm.\n")
    metrics = run.data.metrics
    row = next(x for x in text.splitlines() if x.startswith("| concordance |"))
    assert f"{metrics['concordance']:.3f} ({metrics['concordance_low']:.3f} to" in row
    assert metrics["concordance"] != pytest.approx(then_of(client)["concordance"], abs=1e-9)
    assert (metrics["n_sites"], metrics["missing/blood"]) == (2.0, 0.0)
    assert run.info.status == "FINISHED"
    assert version.tags[LAST_TAG] == run.info.run_name
    assert version.tags[ALARMS_TAG] == "none"
    assert version.tags[ON_TAG] == run.data.tags[COHORTS_TAG]
    found = evaluation_on(client, version, version.tags[ON_TAG])  # as the gates compare with it
    assert found is not None
    assert found.value == metrics["concordance"]
    # The sites' own digests of today, and none of the run that made the model.
    record = json.loads(one(study, "record.json").read_text())
    assert version.tags[ON_TAG] != fingerprint(cohorts_of(record))
    assert evaluate() == ("COMPLETED", "Skipped", "no site has a new snapshot")
    assert len(evaluations(client)) == len(shown) == 1


def then_of(client: MlflowClient) -> dict[str, float]:
    metrics = client.get_run(champion_of(client).run_id).data.metrics
    return {"concordance": metrics["federated/concordance"]}


def test_what_drifted_ends_the_run_as_an_alarm_that_names_it(
    study: Workspace, shown: list[str]
) -> None:
    for site in SITES:
        leave_cohort(study.root, site, moved=25.0)
    kind, name, message = evaluate()
    assert (kind, name) == ("FAILED", monitoring.ALARM)
    codes = message.removeprefix("alarms: ").split(", ")
    assert "input_shift" in codes
    assert "**inputs: found blood, blood/crp, blood/hb, blood/wbc moved by more" in shown[0]
    client = client_of(study.mlflow_uri)
    (run,) = evaluations(client)
    assert champion_of(client).tags[ALARMS_TAG] == ",".join(codes)
    assert run.data.metrics["shift/blood/hb"] > 1.0
    assert abs(run.data.metrics["shift/clinical/age"]) < 0.05


def lineage_faults(study: Workspace) -> set[tuple[str, str]]:
    """What of the coordinator's is not as it was."""
    with opened_lineage(study) as found:
        items = check_lineage(found)
    return {(x.name, x.state) for x in items if x.party == COORDINATOR and x.state in FAULTS}


def test_an_alarm_cannot_be_taken_back_in_the_registry(study: Workspace, shown: list[str]) -> None:
    for site in SITES:
        leave_cohort(study.root, site, moved=25.0)
    assert evaluate()[1] == monitoring.ALARM
    by_hand = {("alias champion", "changed")}  # no promotion is in the audit log of this folder
    assert lineage_faults(study) == by_hand
    client = client_of(study.mlflow_uri)
    client.set_model_version_tag(NAME, "1", ALARMS_TAG, "none")
    assert lineage_faults(study) == by_hand | {(f"tag {ALARMS_TAG} of the version", "changed")}
    client.delete_model_version_tag(NAME, "1", ALARMS_TAG)
    assert lineage_faults(study) == by_hand | {(f"tag {ALARMS_TAG} of the version", "missing")}
    # The next evaluation is noted in its turn.
    leave_cohort(study.root, "site-01", more=40)
    evaluate()
    assert lineage_faults(study) == by_hand


def test_a_modality_that_went_missing_since_the_evaluation_before_is_an_alarm(
    study: Workspace, shown: list[str]
) -> None:
    leave_cohort(study.root, "site-01", more=40)
    assert evaluate()[1] == "Completed"
    workspace, protocol = study, load_protocol(study.study_file)
    table = patients(SITES["site-02"], 2)
    table.loc[table.index[::2], ["hb", "crp", "wbc"]] = np.nan
    leave_draft(workspace.site("site-02"), table, protocol)
    assert "missing_modality" in evaluate()[2]
    assert "patients without a modality: found blood (0% to" in shown[1]
    assert len(evaluations(client_of(study.mlflow_uri))) == 2


def test_an_evaluation_that_was_killed_is_logged_anew(
    study: Workspace, shown: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    leave_cohort(study.root, "site-01", more=40)
    client = client_of(study.mlflow_uri)
    with monkeypatch.context() as patch:
        patch.setattr("mlflow.MlflowClient.set_terminated", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate()
    (left,) = evaluations(client)
    assert evaluate()[1] == "Completed"
    (run,) = evaluations(client)
    assert run.info.run_id != left.info.run_id


def one(study: Workspace, name: str) -> Path:
    """File of the version's run, where MLflow keeps it."""
    client = client_of(study.mlflow_uri)
    uri = client.get_run(champion_of(client).run_id).info.artifact_uri
    return Path(uri.removeprefix("file://")) / name


def model_file(study: Workspace, name: str) -> Path:
    root = one(study, "record.json").parents[2]
    (found,) = root.glob(f"models/*/artifacts/{name}")
    return found


@pytest.fixture
def spoiled(study: Workspace) -> Iterator[Any]:
    """Change a file of the version, for the length of a test."""
    before: list[tuple[Path, bytes]] = []

    def spoil(path: Path, old: str, new: str) -> None:
        content = path.read_bytes()
        before.append((path, content))
        assert old.encode() in content
        path.write_bytes(content.replace(old.encode(), new.encode(), 1))

    yield spoil
    for path, content in before:
        path.write_bytes(content)


@pytest.mark.border
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("record.json", '"coefficient": ', '"coefficient": 1'),
        ("record.json", '"n_test_events": ', '"n_test_events": 1'),
        ("record.json", "{", "["),
        ("encoders.json", '"coefficients": [', '"coefficients": [ '),
        ("networks.json", "{}", '{"x": [1.0]}'),
        ("networks.json", "{}", "{"),
        ("lineage.json", '"study": "small"', '"study": "smell"'),
    ],
)
def test_what_the_coordinator_did_not_sign_is_not_evaluated(
    study: Workspace, shown: list[str], spoiled: Any, *, name: str, old: str, new: str
) -> None:
    leave_cohort(study.root, "site-01", more=40)
    spoiled(one(study, name), old, new)
    with pytest.raises(SiteError) as raised:
        evaluate()
    assert str(raised.value) in {
        "evaluate_champion:ModelNotTrusted", "evaluate_champion:promotion_refused",
    }  # fmt: skip
    assert str(raised.value.cause).startswith(f"{name}: found ")
    # Nobody was asked anything, and nothing was noted.
    assert shown == evaluations(client_of(study.mlflow_uri)) == []
    assert not list(study.root.glob("site-01/snapshots/0002"))
    log = (study.root / "logs" / "consilium.log").read_text()
    assert f"{name}: found " in log


@pytest.mark.border
def test_a_model_that_somebody_else_signed_is_not_evaluated(
    study: Workspace, shown: list[str], spoiled: Any
) -> None:
    spoiled(model_file(study, "signature.json"), '"signed_by": "', '"signed_by": "00')
    with pytest.raises(SiteError, match="evaluate_champion:ModelNotTrusted"):
        evaluate()
    shutil.rmtree(study.root / COORDINATOR)  # another key is made, which signed nothing
    with pytest.raises(SiteError, match="evaluate_champion:ModelNotTrusted"):
        evaluate()
    assert shown == []


SCRIPT = """
from flows.monitoring import evaluate_champion
for _ in range(2):
    state = evaluate_champion("small", [], return_state=True)
    print(state.name, state.message, sep=": ")
"""


@pytest.mark.slow
def test_prefect_shows_the_evaluation_on_the_runs_page(study: Workspace, tmp_path: Path) -> None:
    leave_cohort(study.root, "site-01", more=40)
    home = tmp_path / "prefect"
    with prefect_server(home) as server:
        server.wait_ready()
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False,
            env={**os.environ, **client_settings(server.api_url, home)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [
            "Completed: no alarm", "Skipped: no site has a new snapshot",
        ]  # fmt: skip
        api = PrefectApi(server.api_url)
        runs = api.post("/flow_runs/filter", {"sort": "START_TIME_ASC"})
        assert [(x["name"], x["state"]["name"]) for x in runs] == [
            ("evaluate-small", "Completed"), ("evaluate-small", "Skipped"),
        ]  # fmt: skip
        artifacts = api.post("/artifacts/filter", {})
        (page,) = [x for x in artifacts if x["key"] == "evaluation"]
        assert page["flow_run_id"] == runs[0]["id"]
        assert page["data"].startswith("# Version 1, evaluated again\n\nNo alarm.\n")
        tasks = api.post("/task_runs/filter", {})
        assert {x["name"].rsplit("-", 1)[0] for x in tasks} == {
            "check-champion", "track-evaluation",
        }  # fmt: skip
        told = json.dumps([runs, artifacts, tasks])
        assert not [x for x in (str(study.root), "p1-0001") if x in told]
