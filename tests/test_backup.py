"""Backups of a party: made while it works, checked to the byte, restored into nothing else."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest

from flows.identity import identity, public_key
from flows.mlflow_store import client_of
from flows.model_signing import load_signed
from flows.prefect_api import PrefectApi
from flows.registry import track_study
from flows.services import prefect_server
from fusion.federation.consortium import COORDINATOR
from infra.backup import SUMS, BackupError, back_up, main, restore, verify
from infra.settings import Workspace
from tests.postgres import postgres_program, postgres_server
from tests.simulated_record import full_record

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = Path(__file__).resolve().parents[1] / "infra" / "scripts"
SECRETS = {
    "site.toml", "identity.key", "identity-next.key", "coordinator/identity.key",
    "kits/site-a/startup/client.key", "kits/authority/bladder/state/cert.json",
    "services/prefect.auth", ".mlflow/credentials",
}  # fmt: skip
KEPT = {
    "study.toml", "manifest.csv", "cohort.h5mu", "identity.pub", "identity-20260101.pub",
    "audit.jsonl", "answered.jsonl", "artifacts/1/model/data", "features/pathology/a.h5",
    "coordinator/approvals/site-a.json", "prefect/results/abc",
}  # fmt: skip
PASSING = {
    "services.json", "logs/consilium.log", "kits/site-a/service.lock", "services/serve.lock",
    "site.lock", ".partial-cohort-x.h5mu", "features/.partial-y/a.h5",
}  # fmt: skip
DATABASES = ("mlflow.db", "prefect/prefect.db")


@pytest.fixture
def party(tmp_path: Path) -> Path:
    root = tmp_path / "party"
    for name in SECRETS | KEPT | PASSING:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
        path.chmod(0o600)
    for name in DATABASES:
        (root / name).parent.mkdir(exist_ok=True)
        with closing(sqlite3.connect(root / name)) as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("CREATE TABLE one (n INTEGER)")
            database.execute("CREATE TABLE two (n INTEGER)")
            database.commit()
    return root


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def writing_to(path: Path) -> Iterator[list[int]]:
    """Write the same number into both tables of a database, over and over."""
    stop, written = threading.Event(), [0]

    def write() -> None:
        with closing(sqlite3.connect(path, timeout=30)) as database:
            while not stop.is_set():
                number = written[0] + 1
                database.execute("INSERT INTO one VALUES (?)", (number,))
                database.execute("INSERT INTO two VALUES (?)", (number,))
                database.commit()
                written[0] = number

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield written
    finally:
        stop.set()
        thread.join()


def rows(path: Path) -> tuple[list[int], list[int]]:
    with closing(sqlite3.connect(path)) as database:
        one, two = (
            [n for (n,) in database.execute(f"SELECT n FROM {table} ORDER BY n")]
            for table in ("one", "two")
        )
    return one, two


def test_a_backup_of_databases_that_are_written_to_is_of_one_moment(
    party: Path, tmp_path: Path
) -> None:
    with writing_to(party / "mlflow.db") as written, writing_to(party / "prefect/prefect.db"):
        while written[0] < 50:
            time.sleep(0.01)
        at_least = written[0]
        backup = back_up(party, tmp_path / "backups")
    restore(backup, tmp_path / "again")
    one, two = rows(tmp_path / "again" / "mlflow.db")
    assert one == two == list(range(1, len(one) + 1))
    assert len(one) >= at_least
    one, two = rows(tmp_path / "again" / "prefect" / "prefect.db")
    assert one == two


def test_everything_but_keys_and_what_passes_is_kept(party: Path, tmp_path: Path) -> None:
    backup = back_up(party, tmp_path / "backups")
    restore(backup, tmp_path / "again")
    assert names(tmp_path / "again") == KEPT | set(DATABASES)
    for name in KEPT:
        assert (tmp_path / "again" / name).read_bytes() == (party / name).read_bytes()
    for path in backup.rglob("*"):
        assert "content of site.toml" not in (path.read_text("latin-1") if path.is_file() else "")


def test_keys_are_kept_where_asked(party: Path, tmp_path: Path) -> None:
    backup = back_up(party, tmp_path / "backups", with_keys=True)
    restore(backup, tmp_path / "again")
    assert names(tmp_path / "again") == KEPT | SECRETS | set(DATABASES)
    assert stat.S_IMODE((tmp_path / "again" / "identity.key").stat().st_mode) == 0o600


def test_features_may_be_left_out(party: Path, tmp_path: Path) -> None:
    backup = back_up(party, tmp_path / "backups", with_features=False)
    assert not [name for name in names(backup) if "features" in name]


def test_a_backup_is_its_owners_alone(party: Path, tmp_path: Path) -> None:
    backup = back_up(party, tmp_path / "backups", with_keys=True)
    assert stat.S_IMODE(backup.stat().st_mode) == 0o700


@pytest.mark.parametrize("fault", ["changed", "removed", "added", "no sums"])
def test_a_backup_that_is_not_as_it_was_made_is_not_restored(
    party: Path, tmp_path: Path, fault: str
) -> None:
    backup = back_up(party, tmp_path / "backups")
    victim = backup / "files" / "cohort.h5mu"
    if fault == "changed":
        victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    elif fault == "removed":
        victim.unlink()
    elif fault == "added":
        victim.with_name("more").write_text("")
    else:
        (backup / SUMS).unlink()
    with pytest.raises(BackupError, match=r"cohort.h5mu|files/more|SHA256SUMS"):
        restore(backup, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_link_in_a_backup_is_not_followed(party: Path, tmp_path: Path) -> None:
    backup = back_up(party, tmp_path / "backups")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("of somebody else")
    (backup / "files" / "kits").symlink_to(tmp_path / "outside")
    with pytest.raises(BackupError, match="is a link: files/kits"):
        restore(backup, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_holds_anything_is_not_written_to(party: Path, tmp_path: Path) -> None:
    backup = back_up(party, tmp_path / "backups")
    with pytest.raises(BackupError, match="needed an empty one"):
        restore(backup, party)
    (tmp_path / "empty").mkdir()
    restore(backup, tmp_path / "empty")
    assert names(tmp_path / "empty") == KEPT | set(DATABASES)
    assert not list(tmp_path.glob(".partial-*"))


def test_a_backup_that_fails_leaves_nothing(
    party: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        back_up(party, tmp_path / "backups")
    assert not list((tmp_path / "backups").iterdir())


def test_a_file_that_goes_meanwhile_is_left_out(
    party: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copy2

    def gone(source: Path, target: Path) -> None:
        if source.name == "cohort.h5mu":
            raise FileNotFoundError
        real(source, target)

    monkeypatch.setattr(shutil, "copy2", gone)
    verify(back_up(party, tmp_path / "backups"))


def test_what_cannot_be_backed_up_is_said(party: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupError, match="needed a party's folder"):
        back_up(tmp_path, tmp_path / "backups")
    with pytest.raises(BackupError, match="needed one outside"):
        back_up(party, party / "backups")


def test_a_database_that_is_damaged_is_not_taken_for_a_backup(party: Path, tmp_path: Path) -> None:
    path = party / "mlflow.db"
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=DELETE")
        database.executemany("INSERT INTO one VALUES (?)", [(n,) for n in range(5000)])
        database.commit()
    content = bytearray(path.read_bytes())
    content[4096:12288] = os.urandom(8192)
    path.write_bytes(content)
    assert main(["save", str(party), str(tmp_path / "backups")]) == 2
    assert not list((tmp_path / "backups").iterdir())


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / name), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_scripts_save_and_restore(party: Path, tmp_path: Path) -> None:
    saved = script("backup.sh", str(party), str(tmp_path / "backups"), "--with-keys")
    assert saved.returncode == 0, saved.stderr
    done = script("restore.sh", saved.stdout.strip(), str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "again") == KEPT | SECRETS | set(DATABASES)
    refused = script("restore.sh", saved.stdout.strip(), str(tmp_path / "again"))
    assert refused.returncode == 2
    assert refused.stderr == "restore: found something in the folder, needed an empty one\n"


@pytest.mark.slow
def test_databases_of_a_server_are_saved_and_restored(party: Path, tmp_path: Path) -> None:
    assert postgres_program("pg_dump") is not None
    made = ("consilium_prefect", "consilium_mlflow", "consilium_mlflow_auth")
    with postgres_server(tmp_path, databases=made) as url:
        base = url.rpartition("/")[0]
        for name in made:
            with psycopg.connect(f"{base}/{name}") as connection:
                connection.execute("CREATE TABLE runs (name text)")
                connection.execute("INSERT INTO runs VALUES (%s)", (name,))
        stop = threading.Event()

        def write() -> None:
            with psycopg.connect(f"{base}/consilium_mlflow") as connection:
                while not stop.is_set():
                    connection.execute("INSERT INTO runs VALUES ('more')")
                    connection.commit()

        thread = threading.Thread(target=write)
        thread.start()
        try:
            saved = script(
                "backup.sh", str(party), str(tmp_path / "backups"), CONSILIUM_DATABASE_URL=url
            )
        finally:
            stop.set()
            thread.join()
        assert saved.returncode == 0, saved.stderr
        backup = Path(saved.stdout.strip())
        password = urlsplit(url).password
        assert password
        assert password not in "".join(p.read_text("latin-1") for p in backup.glob("*.*"))

        with pytest.raises(BackupError, match="found tables in consilium_mlflow"):
            restore(backup, tmp_path / "again", database_url=url)
        with pytest.raises(BackupError, match="needed CONSILIUM_DATABASE_URL"):
            restore(backup, tmp_path / "again")
        assert not (tmp_path / "again").exists()

    (tmp_path / "second").mkdir()
    with postgres_server(tmp_path / "second", databases=()) as url:
        done = script(
            "restore.sh", str(backup), str(tmp_path / "again"), CONSILIUM_DATABASE_URL=url
        )
        assert done.returncode == 0, done.stderr
        base = url.rpartition("/")[0]
        for name in made:
            with psycopg.connect(f"{base}/{name}") as connection:
                found = connection.execute("SELECT name FROM runs LIMIT 1").fetchone()
                assert found == (name,)
        assert names(tmp_path / "again") == KEPT | set(DATABASES)


RUN = """
import os, sys
from pathlib import Path
from flows.services import client_settings, prefect_server

home = Path(sys.argv[1])
with prefect_server(home) as server:
    os.environ.update(client_settings(server.api_url, home))
    server.wait_ready()
    from prefect import flow, task
    from prefect.artifacts import create_markdown_artifact
    from prefect.context import get_run_context

    @task
    def look(number: int) -> int:
        return number

    @flow(flow_run_name="study-{study}")
    def study(study: str) -> str:
        assert [look(x) for x in range(3)] == [0, 1, 2]
        create_markdown_artifact("| a table |", key="results")
        return str(get_run_context().flow_run.id)

    print(study("lung"))
"""


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A coordinator's folder in which Prefect and MLflow did real work; and Prefect's run."""
    root = tmp_path_factory.mktemp("worked") / "coordinator"
    root.mkdir()
    (root / "study.toml").write_text("[study]\n")
    track_study(
        full_record(),
        tracking_uri=Workspace(root=root).mlflow_uri,
        artifact_root=root / "artifacts",
        key=identity(root / COORDINATOR),
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(root / "prefect")],
        env={k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root, done.stdout.split()[-1]


def registered_in(root: Path) -> dict[str, Any]:
    """What MLflow says of the registered version and its run."""
    client = client_of(Workspace(root=root).mlflow_uri)
    version = client.get_model_version_by_alias("lung-os-fusion", "candidate")
    run = client.get_run(version.run_id)
    return {
        "version": version.version, "tags": version.tags, "run": run.info.run_id,
        "metrics": run.data.metrics, "params": run.data.params,
    }  # fmt: skip


@contextmanager
def logging_to(uri: str) -> Iterator[None]:
    """Write runs to MLflow over and over, as a study does that goes on during a backup."""
    client, stop = client_of(uri), threading.Event()
    experiment = client.create_experiment("meanwhile")

    def write() -> None:
        while not stop.is_set():
            run = client.create_run(experiment).info.run_id
            client.log_metric(run, "one", 1.0)
            client.log_metric(run, "two", 1.0)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@pytest.mark.slow
def test_what_prefect_and_mlflow_know_is_there_in_another_place(
    worked: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real schemas, read by the programs that they belong to; the first folder is gone by then."""
    for name in ("PREFECT_API_URL", "CONSILIUM_TRACKING_URI", "CONSILIUM_MODEL_KEYS"):
        monkeypatch.delenv(name, raising=False)
    first, run = worked
    before = registered_in(first)
    with logging_to(Workspace(root=first).mlflow_uri):
        backup = back_up(first, tmp_path / "backups")
    first.rename(tmp_path / "gone")
    again = tmp_path / "again"
    restore(backup, again)
    after = registered_in(again)
    assert after == before
    assert after["tags"]["consilium.signed_by"] == public_key(again / COORDINATOR)
    assert len(after["metrics"]) > 10
    model = load_signed("models:/lung-os-fusion@candidate", Workspace(root=again))
    assert model.unwrap_python_model().model.modalities
    with prefect_server(again / "prefect") as server:
        server.wait_ready()
        api = PrefectApi(server.api_url)
        (kept,) = api.post("/flow_runs/filter", {})
        assert (kept["id"], kept["name"], kept["state_type"]) == (run, "study-lung", "COMPLETED")
        assert len(api.post("/task_runs/filter", {})) == 3
        (artifact,) = api.post("/artifacts/filter", {})
        assert (artifact["key"], artifact["data"]) == ("results", "| a table |")
