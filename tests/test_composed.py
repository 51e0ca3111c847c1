"""A coordinator as its Compose file has it: accounts, object store, TLS, backup and restoration."""

from __future__ import annotations

import json
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import boto3
import certifi
import pandas as pd
import pytest

from flows.demo import write_consortium
from flows.mlflow_store import client_of
from flows.registered_model import PredictionRefused, open_model
from infra.settings import Workspace
from tests.composed import ADMIN, Composed, at_site, begun, composed, consilium, object_store
from tests.site_folders import at_hospital
from tests.test_site_turns import WAITING, at_work

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

STUDY, SITE, SIZES = "demo-tables", "site-01", (110, 100)
MODEL = f"{STUDY}-fusion"
CANDIDATE = f"{MODEL}@candidate"
SECRET = "a-password-of-bert"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """Everything up, and a study run by hand beside `consilium serve`, as quickstarts invite to."""
    folder = tmp_path_factory.mktemp("composed")
    root = folder / "coordinator"
    with ExitStack() as stack:
        store = stack.enter_context(object_store(folder))
        write_consortium(root, SIZES, seed=3, tables_only=True)
        made = stack.enter_context(composed(folder, store, root))
        made.coordinator.consilium("study", "run", "--json")
        yield made


@pytest.fixture(scope="module")
def hospital(found: Composed) -> Path:
    return at_hospital(found.root, SITE, found.folder / "hospital", study=STUDY)


@pytest.fixture(scope="module")
def bert(found: Composed, hospital: Path) -> tuple[str, str]:
    """An account that may read, noted in the site's folder as MLflow reads it."""
    assert found.ask(f"{GET}?name={MODEL}", account=("bert", SECRET))[0] == 401
    done = found.script("add_reader.sh", STUDY, "bert", **administrator(found))
    assert done.returncode == 0, done.stderr
    password = done.stdout.split()[-1]
    assert done.stdout == f"bert may read {STUDY}; password {password}\n"
    again = found.script("add_reader.sh", STUDY, "bert", **administrator(found))
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"bert may read {STUDY}; the account was there; its password stays\n"
    note(hospital, "bert", password)
    return "bert", password


GET = "/api/2.0/mlflow/registered-models/get"


def administrator(found: Composed) -> dict[str, str]:
    return {
        "CONSILIUM_TRACKING_URI": found.address,
        "CONSILIUM_CA_FILE": str(found.authority),
        "MLFLOW_TRACKING_USERNAME": ADMIN,
        "MLFLOW_TRACKING_PASSWORD": (found.secrets / "mlflow_password").read_text().strip(),
    }


def note(home: Path, name: str, password: str) -> None:
    (home / ".mlflow").mkdir(exist_ok=True)
    text = f"[mlflow]\nmlflow_tracking_username = {name}\nmlflow_tracking_password = {password}\n"
    (home / ".mlflow/credentials").write_text(text)


def read_as(found: Composed, *accounts: tuple[str, str] | None) -> list[int]:
    return [found.ask(f"{GET}?name={MODEL}", account=one)[0] for one in accounts]


def test_an_account_has_the_rights_that_it_was_given_and_no_other(
    found: Composed, bert: tuple[str, str]
) -> None:
    told = administrator(found)
    admin = (ADMIN, told["MLFLOW_TRACKING_PASSWORD"])
    assert read_as(found, None, (ADMIN, "wrong"), admin, bert) == [401, 401, 200, 200]
    # The second account: made, and given nothing.
    opened = client_of(found.coordinator.services.mlflow)
    opened.create_registered_model("other-fusion")
    opened.create_experiment("consilium/other")
    done = found.script("add_reader.sh", "other", "cora", **told)
    assert done.returncode == 0, done.stderr
    cora = ("cora", done.stdout.split()[-1])
    assert read_as(found, cora) == [403]
    experiment = opened.get_experiment_by_name(f"consilium/{STUDY}").experiment_id
    runs = f"/api/2.0/mlflow/experiments/get?experiment_id={experiment}"
    assert [found.ask(runs, account=one)[0] for one in (bert, cora, None)] == [200, 403, 401]
    pages = "/ajax-api/2.0/mlflow/registered-models/search?max_results=50"
    seen = [json.loads(found.ask(pages, account=one)[1]) for one in (bert, cora)]
    assert [[x["name"] for x in one["registered_models"]] for one in seen] == [
        [MODEL], ["other-fusion"]
    ]  # fmt: skip


def test_who_may_read_may_not_write(found: Composed, bert: tuple[str, str]) -> None:
    name, password = bert
    told = administrator(found) | {
        "MLFLOW_TRACKING_USERNAME": name, "MLFLOW_TRACKING_PASSWORD": password
    }  # fmt: skip
    done = found.script("add_reader.sh", STUDY, "dora", **told)
    assert done.returncode == 2
    assert done.stderr.startswith("registry: found that bert may not do this")
    done = found.script("add_reader.sh", "none", "dora", **administrator(found))
    assert (done.returncode, done.stderr) == (
        2, "study none: found no model of it in the registry, needed one; run the study first\n"
    )  # fmt: skip


def test_models_lie_in_the_object_store_and_nowhere_else(found: Composed) -> None:
    s3 = boto3.client(
        "s3", endpoint_url=found.store, region_name="us-east-1",
        aws_access_key_id="x", aws_secret_access_key="x",
    )  # fmt: skip
    kept = {x["Key"] for x in s3.list_objects_v2(Bucket="mlflow")["Contents"]}
    for name in ("signature.json", "MLmodel", "lineage.json", "report.html"):
        assert [key for key in kept if key.endswith(f"/artifacts/{name}")], name
    assert not (found.root / "artifacts").exists()
    client = client_of(found.coordinator.services.mlflow)
    where = client.get_experiment_by_name(f"consilium/{STUDY}").artifact_location
    assert where.startswith("mlflow-artifacts:/")


def test_what_people_type_runs_on_the_server_that_serves_the_folder(found: Composed) -> None:
    """On PostgreSQL a second server would know of it, and no page would ever show the run."""
    home = found.coordinator
    for flow, n in (("run-study", 1), ("prepare-site", 2), ("train-encoders", 2)):
        assert [x["state_type"] for x in home.runs(flow)] == ["COMPLETED"] * n
    assert not (found.root / "prefect/server.log").exists()
    assert not (found.root / "prefect/prefect.db").exists()


def test_a_typed_command_waits_its_turn_and_goes_on_when_the_other_is_killed(
    found: Composed,
) -> None:
    home = found.coordinator
    command = begun(home.root, "site", "prepare", SITE, **home.environment)
    with at_work(found.root) as other, command as typed:
        assert typed.stderr is not None
        assert typed.stderr.readline() == WAITING
        other.send_signal(signal.SIGKILL)
        told, faults = typed.communicate(timeout=240)
    assert typed.returncode == 0, faults
    assert told.startswith(f"{SITE}: {SIZES[0]} patients, 0 inputs extracted")
    assert len(home.runs("prepare-site")) == 3


@pytest.fixture(scope="module")
def by_file(found: Composed, hospital: Path) -> pd.DataFrame:
    """Risks by the exported model, at a site that reaches no registry."""
    file = hospital / "model.zip"
    told = found.coordinator.consilium("model", "export", CANDIDATE, "--out", file)
    assert f"{MODEL} version 1 (candidate)" in told
    done = consilium(hospital, "predict", "--model", file.name)
    assert (done.returncode, done.stderr) == (0, "")
    table = pd.read_csv(hospital / "predictions/predictions.csv", index_col=0)
    (hospital / "predictions/predictions.csv").unlink()
    return table


def test_a_site_scores_by_the_registry_over_tls_as_by_the_file(
    found: Composed, hospital: Path, bert: tuple[str, str], by_file: pd.DataFrame
) -> None:
    told = dict(at_site(found, hospital, HOME=str(hospital)))
    told |= {"CONSILIUM_CA_FILE": str(found.authority), "MPLCONFIGDIR": str(found.folder)}
    before = {path.relative_to(hospital).parts[0] for path in hospital.rglob("*")}
    done = consilium(hospital, "predict", "--model", CANDIDATE, **told)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{MODEL} version 1: ")
    table = pd.read_csv(hospital / "predictions/predictions.csv", index_col=0)
    pd.testing.assert_frame_equal(table, by_file)
    patient = str(table.index[0])
    done = consilium(hospital, "board", patient, "--model", CANDIDATE, **told)
    assert done.returncode == 0, done.stderr
    assert f"{MODEL} version 1 (candidate)" in (hospital / f"board/{patient}.html").read_text()
    after = {path.relative_to(hospital).parts[0] for path in hospital.rglob("*")}
    assert after - before == {"board"}
    assert bert[1] not in done.stdout + done.stderr


LACKING = {
    "authority": "found a certificate of an authority that is not trusted here",
    "account": "found no account that it lets in",
    "right": "found no right of this account to read the model",
    "server": "found no answer at the address of CONSILIUM_TRACKING_URI",
}


@pytest.mark.parametrize("lacking", LACKING)
def test_what_a_site_lacks_to_read_the_registry_is_one_sentence(
    found: Composed, hospital: Path, bert: tuple[str, str], lacking: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    address, (name, password) = found.address, bert
    if lacking == "server":
        address = "https://localhost:1"
    elif lacking == "account":
        password = "wrong"
    elif lacking == "right":
        done = found.script("add_reader.sh", "other", "emma", **administrator(found))
        name, password = "emma", done.stdout.split()[-1]
    trusted = certifi.where() if lacking == "authority" else str(found.authority)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", trusted)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    with pytest.raises(PredictionRefused, match=f"^registry: {LACKING[lacking]}") as refused:
        open_model(Workspace(root=hospital, tracking_uri=address), STUDY, CANDIDATE)
    assert password not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def restored(
    found: Composed, bert: tuple[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composed]:
    """The same coordinator on another machine: its databases, its folder, the store as it was."""
    folder = tmp_path_factory.mktemp("restored")
    saved = found.script("container_databases.sh", "save", folder / "dumps", *found.to_postgres)
    assert saved.returncode == 0, saved.stderr
    saved = found.script("backup.sh", found.root, folder / "backups", "--with-keys")
    assert saved.returncode == 0, saved.stderr
    again = folder / "coordinator"
    done = found.script("restore.sh", saved.stdout.strip(), again)
    assert done.returncode == 0, done.stderr
    del bert
    with composed(folder, found.store, again, dumps=folder / "dumps") as made:
        yield made


def test_restored_databases_are_read_by_the_real_servers(
    found: Composed, restored: Composed, bert: tuple[str, str]
) -> None:
    for flow in ("run-study", "prepare-site", "train-encoders"):
        before, after = ({x["id"]: x["state_type"] for x in home.runs(flow)} for home in
                         (found.coordinator, restored.coordinator))  # fmt: skip
        assert before == after != {}
    assert read_as(restored, bert, ("cora", "wrong"), None) == [200, 401, 401]
    told = restored.coordinator.consilium("lineage", "verify")
    assert told.endswith(f"{MODEL} version 1: whole\n"), told


def test_a_restored_coordinator_goes_on(restored: Composed) -> None:
    told = json.loads(restored.coordinator.consilium("study", "run", "--json"))
    assert (told["reused"], told["model_version"]) == (True, 1)


def test_databases_that_hold_anything_are_not_written_to(
    found: Composed, restored: Composed
) -> None:
    dumps = restored.folder / "dumps"
    done = found.script("container_databases.sh", "restore", dumps, *found.to_postgres)
    assert done.returncode == 2
    assert "found tables in consilium_prefect, needed an empty database" in done.stderr
    with (dumps / "consilium_mlflow.dump").open("ab") as file:
        file.write(b"more")
    done = found.script("container_databases.sh", "restore", dumps, *found.to_postgres)
    assert done.returncode == 2
    assert "found a dump that was changed" in done.stderr
