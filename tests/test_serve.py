from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from flows import serve
from flows.cli import app
from flows.databases import databases_of, make_databases
from flows.demo import write_consortium
from flows.deployments import RETRY, retry_crashed
from flows.keeping import Kept
from flows.lost_runs import (
    AUTOMATION,
    SILENT,
    end_lost_runs,
    end_stuck_runs,
    speak_for_waiting,
    watch_for_silence,
)
from flows.prefect_api import PrefectApi
from flows.serve import Services, client_environment, health, running, store_folder
from flows.service_programs import MARK, end_marked, marked
from flows.services import Server, ServiceError, _prefect, free_port
from infra.settings import ServiceSettings, SettingsError, load_services
from tests.postgres import postgres_server
from tests.topology import PartyHere

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

FOUND = Services("http://127.0.0.1:1/api", "consilium:x", "http://127.0.0.1:2", "consilium", 3, "u")
NIGHTWORK = """
import os, time
from pathlib import Path
from prefect import flow
from prefect.runtime import flow_run

ROOT = Path(os.environ.get("CONSILIUM_ROOT", "."))

@flow(name="wait", persist_result=False)
def wait(n: int) -> None:
    print("written by the flow", flush=True)
    names = ("CONSILIUM_TRACKING_URI", "PREFECT_LOGGING_TO_API_ENABLED", "NO_PROXY",
             "PREFECT_RESULTS_LOCAL_STORAGE_PATH", "CONSILIUM_DATABASE_URL")
    (ROOT / "seen.txt").write_text("\\n".join(f"{x}={os.environ.get(x)}" for x in names))
    time.sleep(n)

@flow(name="meet", persist_result=False)
def meet(n: int) -> None:
    met = ROOT / "met"
    met.mkdir(exist_ok=True)
    (met / str(flow_run.id)).write_text(os.environ["CONSILIUM_SERVED_AS"])
    while len(list(met.iterdir())) < n:
        time.sleep(0.2)

@flow(name="hold", persist_result=False)
def hold(n: int) -> None:
    while not (ROOT / f"go-{n}").exists():
        time.sleep(0.2)
"""
DEPLOY = """
import asyncio, os, sys
from pathlib import Path
from flows.serve import client_environment, running

root, name = Path(sys.argv[1]), sys.argv[2]
found = running(root)
os.environ.update(client_environment(found, root))
import nightwork
from prefect import get_client
from prefect.deployments import run_deployment

async def deploy():
    async with get_client() as client:
        flow = await client.create_flow(getattr(nightwork, name))
        await client.create_deployment(
            flow_id=flow, name="night", work_pool_name=found.pool, entrypoint=f"nightwork.{name}",
            tags=["consilium"],
        )

asyncio.run(deploy())
for n in sys.argv[3:]:
    print(run_deployment(f"{name}/night", parameters={"n": int(n)}, timeout=0).id)
"""
# What a database, or whoever speaks with it, says when several are in each other's way.
COLLISIONS = ("deadlock", "operationalerror", "too many clients", "locked")


@pytest.fixture(autouse=True)
def _no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [x for x in os.environ if x.startswith(("PREFECT_", "MLFLOW_", "CONSILIUM_"))]:
        monkeypatch.delenv(name)


def a_site(folder: Path) -> Path:
    """Write a site's folder; its secret is a test's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "site.toml").write_text(f'name = "site-01"\nsecret = "{"s" * 40}"\n')
    return folder


def test_a_folder_without_running_services_has_none(tmp_path: Path) -> None:
    assert running(tmp_path) is None
    serve._publish(tmp_path, FOUND)
    assert running(tmp_path) is None, "a file that a killed process left"
    with serve._locked(tmp_path):
        assert running(tmp_path) == FOUND
        assert stat.S_IMODE((tmp_path / "services.json").stat().st_mode) == 0o600
    assert running(tmp_path) is None


def test_one_folder_is_served_only_once(tmp_path: Path) -> None:
    with serve._locked(tmp_path), pytest.raises(ServiceError, match="running for this folder"):
        serve._locked(tmp_path).__enter__()


def test_a_folder_of_nobody_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"neither study\.toml nor site\.toml"):
        serve.serve(tmp_path, settings=ServiceSettings(), announce=print)
    assert not list(tmp_path.iterdir())


def test_several_workers_need_postgresql(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="found 2 with SQLite"):
        serve.serve(a_site(tmp_path), settings=ServiceSettings(workers=2), announce=print)


def test_a_shared_server_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    hub = f"http://127.0.0.1:{free_port()}/api"
    with pytest.raises(ServiceError, match="Prefect server: found no answer"):
        serve.serve(a_site(tmp_path), settings=ServiceSettings(), hub=hub, announce=print)
    assert running(tmp_path) is None
    assert not list((tmp_path / "logs").iterdir())


def test_clients_are_told_where_the_server_is_and_how_to_prove_themselves(tmp_path: Path) -> None:
    told = client_environment(FOUND, tmp_path)
    assert told["PREFECT_API_URL"] == FOUND.prefect_api
    assert told["PREFECT_API_AUTH_STRING"] == FOUND.prefect_auth
    assert told["PREFECT_LOGGING_TO_API_ENABLED"] == "false"
    assert told["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert told["CONSILIUM_ROOT"] == str(tmp_path)
    assert told["CONSILIUM_TRACKING_URI"] == "u"
    assert "127.0.0.1" in told["NO_PROXY"]


def test_a_site_serves_its_own_store_and_a_coordinator_the_consortiums(tmp_path: Path) -> None:
    assert store_folder(tmp_path) == tmp_path
    assert store_folder(a_site(tmp_path / "a")) == tmp_path / "a/runs"


def test_the_password_is_made_once_for_this_user_only(tmp_path: Path) -> None:
    first = serve._auth_string(tmp_path)
    assert serve._auth_string(tmp_path) == first
    assert len(first.removeprefix("consilium:")) >= 32
    assert stat.S_IMODE((tmp_path / serve.AUTH_FILE).stat().st_mode) == 0o600
    assert serve._auth_string(tmp_path / "other") != first


def test_two_databases_are_named_after_the_given_one() -> None:
    found = databases_of("postgresql://u:p%40w@db:5433/site_01?sslmode=verify-full")
    assert found.prefect == "postgresql+asyncpg://u:p%40w@db:5433/site_01_prefect"
    assert found.mlflow == "postgresql+psycopg://u:p%40w@db:5433/site_01_mlflow?sslmode=verify-full"
    assert found.prefect_environment == {"PGSSLMODE": "verify-full"}
    assert "p%40w" not in repr(found)
    assert databases_of("postgres://u:p@db").prefect.endswith("/consilium_prefect")


@pytest.mark.parametrize("url", ["mysql://u:secret@db/x", "postgresql:///x", "secret"])
def test_an_address_of_no_postgresql_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ServiceError, match="CONSILIUM_DATABASE_URL") as refused:
        databases_of(url)
    assert "secret" not in str(refused.value)


def test_a_database_server_that_is_not_there_is_named_without_its_password() -> None:
    with pytest.raises(ServiceError, match="no PostgreSQL that lets us in") as refused:
        make_databases(f"postgresql://u:secret@127.0.0.1:{free_port()}/x")
    assert "secret" not in str(refused.value)


def test_an_impossible_setting_is_named_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONSILIUM_PREFECT_PORT", "4711x")
    with pytest.raises(SettingsError, match="CONSILIUM_PREFECT_PORT") as refused:
        load_services()
    assert "4711x" not in str(refused.value)
    assert load_services(prefect_port=5).prefect_port == 5


class FakeApi:
    """Answers searches from a table and remembers what it is told."""

    def __init__(self, found: dict[str, list[dict[str, Any]]]) -> None:
        self.found = found
        self.told: list[tuple[str, Any]] = []

    def post(self, path: str, body: Any) -> Any:
        if path.endswith("/filter"):
            return self.found.get(path, [])
        self.told.append((path, body))
        return {}

    put = post


def test_lost_runs_are_settled_by_what_they_were_doing() -> None:
    lost = [{"id": x.lower(), "state_type": x} for x in ("RUNNING", "PENDING", "CANCELLING")]
    api = FakeApi({"/flow_runs/filter": lost})
    assert end_lost_runs(api, "consilium") == 3  # type: ignore[arg-type]
    became = {path.split("/")[2]: body["state"]["type"] for path, body in api.told}
    assert became == {"running": "CRASHED", "pending": "SCHEDULED", "cancelling": "CANCELLED"}
    assert all(body["force"] for _, body in api.told)


def test_only_runs_that_wait_long_for_their_process_or_its_end_are_stuck() -> None:
    now = datetime.now(UTC)
    waiting = [
        {"id": f"{state}-{age_s}", "state_type": state,
         "state": {"timestamp": (now - timedelta(seconds=age_s)).isoformat()}}
        for state in ("PENDING", "CANCELLING") for age_s in (60, 601)
    ]  # fmt: skip
    api = FakeApi({"/flow_runs/filter": waiting})
    assert end_stuck_runs(api, "consilium") == 2  # type: ignore[arg-type]
    became = {path.split("/")[2]: body["state"]["type"] for path, body in api.told}
    assert became == {"PENDING-601": "SCHEDULED", "CANCELLING-601": "CANCELLED"}


def test_the_automation_is_made_once_and_renewed_after() -> None:
    new, old = FakeApi({}), FakeApi({"/automations/filter": [{"id": "a"}]})
    for api in (new, old):
        watch_for_silence(api)  # type: ignore[arg-type]
    assert [path for path, _ in new.told] == ["/automations/"]
    assert [path for path, _ in old.told] == ["/automations/a"]


def test_an_automation_that_says_the_same_is_left_to_its_waiting() -> None:
    wanted = FakeApi({})
    watch_for_silence(wanted)  # type: ignore[arg-type]
    known = json.loads(json.dumps(wanted.told[0][1])) | {"id": "a", "created": "then"}
    known["trigger"] |= {"id": "b", "expect": known["trigger"]["expect"][::-1]}
    known["actions"][0]["force"] = False
    same, limited, longer = (FakeApi({"/automations/filter": [known]}) for _ in range(3))
    watch_for_silence(same)  # type: ignore[arg-type]
    watch_for_silence(limited, deployed_only=True)  # type: ignore[arg-type]
    watch_for_silence(longer, silence_s=120)  # type: ignore[arg-type]
    assert same.told == []
    assert [path for path, _ in limited.told + longer.told] == ["/automations/a"] * 2
    known["trigger"]["match_related"] = {"prefect.resource.id": "prefect.tag.consilium"}
    watch_for_silence(same)  # type: ignore[arg-type]
    assert [path for path, _ in same.told] == ["/automations/a"]


def test_prefect_understands_the_automation() -> None:
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    api = FakeApi({})
    watch_for_silence(api)  # type: ignore[arg-type]
    read = AutomationCore.model_validate(api.told[0][1])
    trigger = read.trigger
    assert isinstance(trigger, EventTrigger)
    assert (read.name, trigger.posture) == (AUTOMATION, Posture.Proactive)
    assert trigger.within == timedelta(seconds=90)
    assert trigger.after == {"prefect.flow-run.heartbeat"}
    signs = {"heartbeat", "Suspended", "Completed", "waiting"}
    assert {f"prefect.flow-run.{x}" for x in signs} <= trigger.expect


@pytest.mark.parametrize(("tag", "is_ours"), [("consilium", True), ("somebody-elses", False)])
def test_silence_of_runs_of_others_on_a_shared_server_is_theirs(tag: str, is_ours: bool) -> None:
    from prefect.server.events.schemas.automations import EventTrigger
    from prefect.server.events.schemas.events import RelatedResource, Resource

    api = FakeApi({})
    watch_for_silence(api, deployed_only=True)  # type: ignore[arg-type]
    trigger = EventTrigger.model_validate(api.told[0][1]["trigger"])
    run = Resource.model_validate({"prefect.resource.id": "prefect.flow-run.x"})
    with_tag = {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
    related = [RelatedResource.model_validate(with_tag)]
    assert trigger.covers_resources(run, related) == is_ours


def test_only_a_run_that_has_just_begun_to_wait_gets_a_sign() -> None:
    now = datetime.now(UTC)
    waiting = [
        {"id": name, "state": {"timestamp": (now - timedelta(seconds=age_s)).isoformat()}}
        for name, age_s in (("new", 60), ("old", 600))
    ]
    api = FakeApi({"/flow_runs/filter": waiting})
    speak_for_waiting(api, "consilium")  # type: ignore[arg-type]
    (path, events), *more = api.told
    assert (path, more) == ("/events", [])
    assert [x["resource"]["prefect.resource.id"] for x in events] == ["prefect.flow-run.new"]


def test_a_prefect_server_that_is_not_there_is_one_sentence() -> None:
    api = PrefectApi(f"http://127.0.0.1:{free_port()}/api", "consilium:secret")
    with pytest.raises(ServiceError, match="found no answer") as refused:
        api.post("/flow_runs/filter", {})
    assert "secret" not in str(refused.value)


@contextmanager
def _short(code: int) -> Iterator[Server]:
    with subprocess.Popen([sys.executable, "-c", f"raise SystemExit({code})"]) as process:
        process.wait()
        yield _Quick("some service", "http://127.0.0.1:9", process)


class _Quick(Server):
    def wait_ready(self, timeout_s: float = 120) -> None:
        del timeout_s


def test_a_service_that_ends_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    said: list[str] = []
    monkeypatch.setattr("flows.keeping.time.sleep", pauses.append)
    with Kept("MLflow", lambda: _short(3)) as service:
        for _ in range(5):
            service.look(said.append)
        with pytest.raises(ServiceError) as given_up:
            service.look(said.append)
    assert "MLflow: found it ended 6 times in ten minutes" in str(given_up.value)
    assert pauses == [1, 2, 4, 8, 16]
    assert said[:2] == ["MLflow: ended with code 3; starting it again", "MLflow: ready again"]


class _Silent(_Quick):
    def answers(self) -> bool:
        return False


def test_a_service_that_stays_silent_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    said: list[str] = []
    clock = iter(range(0, 100_000, 31))
    monkeypatch.setattr("flows.keeping.time.sleep", lambda _: None)
    monkeypatch.setattr("flows.keeping.time.monotonic", lambda: float(next(clock)))

    @contextmanager
    def silent() -> Iterator[Server]:
        started.append(1)
        yield _Silent("some service", "http://127.0.0.1:9")

    with Kept("Prefect", silent) as service:
        service.ready()
        for _ in range(3):
            service.look(said.append)
        assert not said
        service.look(said.append)
    assert said == ["Prefect: does not answer; starting it again", "Prefect: ready again"]
    assert len(started) == 2


def test_a_process_that_left_its_group_and_parent_is_ended() -> None:
    mark = uuid.uuid4().hex
    code = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)'], start_new_session=True, stdout=-3, stderr=-3).pid)"
    )
    started = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, MARK: mark},
        capture_output=True,
        check=True,
    )
    pid = int(started.stdout)
    _until(lambda: marked(mark) == {pid})
    end_marked(mark)
    assert not marked(mark)
    assert not _lives(pid)


def test_check_says_that_nothing_runs_and_ends_with_1(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--check", "--root", str(tmp_path)])
    assert done.exit_code == 1
    assert "not running; start with `consilium serve`" in done.output


@dataclass
class Running:
    """A site's services, started by the command that people type."""

    root: Path
    process: subprocess.Popen[str]
    said: list[str]
    database_url: str = ""

    @property
    def services(self) -> Services:
        found = running(self.root)
        assert found is not None
        return found

    @property
    def api(self) -> PrefectApi:
        return PrefectApi(self.services.prefect_api, self.services.prefect_auth)

    def runs(self) -> dict[str, str]:
        """States of all runs, by their id."""
        return {x["id"]: x["state_type"] for x in self.api.post("/flow_runs/filter", {})}


# As a script starts what it goes on beside, with Ctrl-C ignored.
BEHIND = ("sh", "-c", "trap '' INT && exec \"$@\"", "sh")


@contextmanager
def serving(
    root: Path, *options: str, before: Sequence[str] = (), **environment: str
) -> Iterator[Running]:
    """Run ``consilium serve`` until the block ends; ports are any free ones."""
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    command = [sys.executable, "-c", "from flows.cli import main; main()", "serve", "--root"]
    process = subprocess.Popen(
        [*before, *command, str(root), *ports, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )
    try:
        said = []
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.strip())
            if "Ctrl-C" in line:
                break
        yield Running(root, process, said)
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = a_site(tmp_path_factory.mktemp("site"))
    (root / "nightwork.py").write_text(NIGHTWORK)
    with serving(root) as started:
        yield started


def deployed(root: Path, *values: int, flow: str = "wait") -> list[str]:
    """Deploy a flow to the running server, and ask for one run with each value."""
    done = subprocess.run(
        [sys.executable, "-c", DEPLOY, str(root), flow, *map(str, values)],
        env={**os.environ, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


@pytest.mark.slow
def test_starting_says_where_everything_is(site: Running) -> None:
    found = site.services
    assert site.said == [
        "starting; the first time takes longer",
        f"Prefect: {found.prefect_api.removesuffix('/api')}",
        f"MLflow: {found.mlflow}",
        "worker: pool consilium, ready",
        "password for Prefect's page: in services/prefect.auth",
        "press Ctrl-C to stop",
    ]
    assert (site.root / "services/prefect.auth").read_text().strip() == found.prefect_auth
    assert found.prefect_auth not in "".join(site.said)


@pytest.mark.slow
def test_both_pages_answer_and_load_nothing_from_elsewhere(site: Running) -> None:
    for address in (site.services.prefect_api.removesuffix("/api"), site.services.mlflow):
        status, headers, _ = _get(address, Accept="text/html")
        assert status == 200
        assert "default-src 'self'" in headers["content-security-policy"]
    status, _, body = _get(f"{site.services.prefect_api.removesuffix('/api')}/ui-settings")
    page = json.loads(body)
    assert (page["auth"], page["csrf_enabled"], page["flags"]) == ("BASIC", True, [])
    assert page["available_uis"] == ["v1"]
    assert page["api_url"] == site.services.prefect_api
    settings = site.api.get("/admin/settings")
    assert settings["server"]["analytics_enabled"] is False
    assert settings["server"]["ui"]["show_promotional_content"] is False


@pytest.mark.slow
def test_prefect_wants_its_password_and_mlflow_its_own_name(site: Running) -> None:
    api = site.services.prefect_api
    assert _get(f"{api}/admin/version")[0] == 401
    assert _get(f"{api}/admin/version", Authorization="Basic Og==")[0] == 401
    assert site.api.get("/admin/version")
    assert _get(site.services.mlflow, Host="elsewhere.example")[0] == 403


@pytest.mark.slow
def test_mlflows_assistant_is_not_there(site: Running) -> None:
    path = "/ajax-api/3.0/mlflow/assistant"
    for below in ("", "/providers", "/config"):
        assert _get(f"{site.services.mlflow}{path}{below}")[0] == 404
    assert _get(f"{site.services.mlflow}/version")[0] == 200


@pytest.mark.slow
def test_no_password_is_in_a_command_line(site: Running) -> None:
    secret = str(site.services.prefect_auth).encode()
    for process in _tree(site.process.pid):
        assert secret not in Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.mark.slow
def test_check_finds_all_well(site: Running) -> None:
    assert health(site.root) == {"Prefect": True, "MLflow": True, "worker": True}
    done = CliRunner().invoke(app, ["serve", "--check", "--root", str(site.root)])
    assert (done.exit_code, done.output) == (0, "Prefect: well\nMLflow: well\nworker: well\n")


@pytest.mark.slow
def test_idle_services_take_at_most_1_2_gb(site: Running) -> None:
    assert sum(_pss_kb(process) for process in _tree(site.process.pid)) <= 1_200_000


@pytest.mark.slow
def test_a_run_has_the_environment_of_its_worker_and_its_words_stay_here(site: Running) -> None:
    (run,) = deployed(site.root, 0)
    _until(lambda: site.runs()[run] == "COMPLETED", timeout_s=90)
    seen = dict(line.split("=", 1) for line in (site.root / "seen.txt").read_text().splitlines())
    assert seen["CONSILIUM_TRACKING_URI"] == f"sqlite:///{site.root / 'runs/mlflow.db'}"
    assert seen["PREFECT_LOGGING_TO_API_ENABLED"].lower() == "false"
    assert seen["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] == str(site.root / "prefect/results")
    assert seen["CONSILIUM_DATABASE_URL"] == "None"
    assert "127.0.0.1" in seen["NO_PROXY"]
    assert "written by the flow" in (site.root / "logs/worker.log").read_text()
    assert site.api.post("/logs/filter", {}) == []
    assert [x["name"] for x in site.api.post("/automations/filter", {})] == [AUTOMATION]


@pytest.mark.slow
def test_a_killed_service_is_started_again(site: Running) -> None:
    (mlflow,) = [x for x in _tree(site.process.pid) if "programs mlflow" in _command(x)]
    os.kill(mlflow, signal.SIGKILL)
    assert site.process.stdout is not None
    assert "MLflow: ended with code -9; starting it again" in site.process.stdout.readline()
    assert "MLflow: ready again" in site.process.stdout.readline()
    assert health(site.root)["MLflow"]


@pytest.mark.slow
def test_a_killed_worker_takes_its_run_with_it_and_the_run_is_crashed(site: Running) -> None:
    (run,) = deployed(site.root, 600)
    (engine,) = _engine(site.process.pid)
    _until(lambda: site.runs()[run] == "RUNNING", timeout_s=60)
    (worker,) = [x for x in _tree(site.process.pid) if "worker-process" in _command(x)]
    os.kill(worker, signal.SIGKILL)
    assert site.process.stdout is not None
    assert "worker: ended with code" in site.process.stdout.readline()
    assert "worker: ready again" in site.process.stdout.readline()
    assert not _lives(engine)
    assert site.runs()[run] == "CRASHED"


@pytest.mark.slow
def test_killing_serve_leaves_nothing_alive_and_the_next_settles_its_runs(site: Running) -> None:
    (run,) = deployed(site.root, 601)
    _until(lambda: site.runs()[run] == "RUNNING", timeout_s=60)
    everything = _tree(site.process.pid)
    site.process.kill()
    _until(lambda: not any(map(_lives, everything)), timeout_s=30)
    assert running(site.root) is None
    assert health(site.root) == {}
    with serving(site.root) as again:
        assert again.runs()[run] == "CRASHED"
        everything = _tree(again.process.pid)
        again.process.send_signal(signal.SIGINT)
        assert again.process.wait(timeout=60) == 0
    assert len(everything) == 5
    assert not any(map(_lives, everything))
    assert not (site.root / "services.json").exists()


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve a site with five workers of one run each, on PostgreSQL."""
    folder = tmp_path_factory.mktemp("five")
    root = a_site(folder / "site")
    (root / "nightwork.py").write_text(NIGHTWORK)
    with postgres_server(folder, databases=()) as url:
        settings = {"CONSILIUM_DATABASE_URL": url, "CONSILIUM_WORKER_LIMIT": "1"}
        settings["CONSILIUM_SILENCE_S"] = "45"
        with serving(root, "--workers", "5", before=BEHIND, **settings) as started:
            started.database_url = url
            yield started
        logs = list((root / "logs").glob("worker-*.log"))
        assert len(logs) == 5
        # They were asked to stop, and did, before they were made to.
        assert all(x.read_text().rstrip().endswith("stopped!") for x in logs)


@pytest.mark.slow
def test_five_workers_on_postgresql_share_the_work_and_lose_no_run(five: Running) -> None:
    root = five.root
    assert [x for x in five.said if "ready" in x] == [
        f"worker {at}: pool consilium, ready" for at in range(1, 6)
    ]
    assert five.services.tracking_uri == f"sqlite:///{root / 'runs/mlflow.db'}"
    # The first five end when five have begun: at no worker, which has one place, do two meet.
    wanted = deployed(root, *[5] * 8, flow="meet")
    _until(lambda: set(five.runs().values()) == {"COMPLETED"}, timeout_s=240)
    assert set(five.runs()) == set(wanted)
    workers = {run.name: run.read_text() for run in (root / "met").iterdir()}
    assert set(workers) == set(wanted)
    assert len(set(workers.values())) == 5
    secret = five.database_url.split(":")[2].split("@")[0]
    for process in _tree(five.process.pid):
        assert secret not in _command(process)
    logs = "".join(x.read_text() for x in _logs(root))
    assert "worker" in logs
    assert "database system is ready" in logs
    assert [x for x in COLLISIONS if x in logs.lower()] == []
    assert secret not in logs
    assert not (root / "prefect/prefect.db").exists()


def _logs(root: Path) -> list[Path]:
    """Logs of a site's services, and of PostgreSQL's server beside it."""
    return [*(root / "logs").glob("*.log"), *root.parent.glob("*.log")]


@pytest.mark.slow
def test_a_run_that_was_killed_with_its_worker_is_found_by_its_silence(five: Running) -> None:
    """The other workers live, so that nobody settles the lost run but the automation."""
    api, root = five.api, five.root
    retry_crashed(api)
    (run,) = deployed(root, 1, flow="hold")
    (engine,) = _engine(five.process.pid)
    of_run = {"any_resource": {"id": [f"prefect.flow-run.{run}"]}}
    asked = {"filter": {"event": {"name": ["prefect.flow-run.heartbeat"]}, **of_run}}
    _until(lambda: api.post("/events/filter", asked)["total"] > 0, timeout_s=60)
    for process in _above(engine, below=five.process.pid):
        os.kill(process, signal.SIGKILL)
    assert five.process.stdout is not None
    assert ": ended with code -9; starting it again" in five.process.stdout.readline()
    assert ": ready again" in five.process.stdout.readline()
    assert not _lives(engine)
    assert five.runs()[run] == "RUNNING"
    (root / "go-1").touch()
    _until(lambda: five.runs()[run] == "COMPLETED", timeout_s=240)
    states = api.get(f"/flow_run_states/?flow_run_id={run}")
    (crash,) = [x for x in states if x["type"] == "CRASHED"]
    assert crash["message"] == SILENT
    assert [x["type"] for x in states].count("RUNNING") == 2


def _above(process: int, *, below: int) -> list[int]:
    """Give a process and those above it, up to but without another one."""
    found = [process]
    while (parent := _parents()[found[-1]]) != below:
        found.append(parent)
    return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Run somebody else's Prefect server; give its address, and what it wants from clients."""
    root = tmp_path / "hub"
    auth = serve._auth_string(root)
    settings = serve._server_settings(root, auth, None)
    home, log = root / "prefect", root / "prefect.log"
    with _prefect(home, port=free_port(), mode="ui", log=log, more=settings) as server:
        server.wait_ready()
        yield server.api_url, auth


@pytest.mark.slow
def test_a_site_works_for_a_shared_server_and_tells_it_no_small_count(
    hub: tuple[str, str], tmp_path: Path
) -> None:
    url, auth = hub
    write_consortium(tmp_path, (60, 40), seed=1, tables_only=True)
    root = tmp_path / "site-01"
    study = (tmp_path / "study.toml").read_text()
    (root / "study.toml").write_text(study.replace("cell = 1", "cell = 10"))
    with (root / "manifest.csv").open("a") as manifest:
        manifest.write("site-01-0001,pathology,lost.csv,,\n")
    settings = {"CONSILIUM_PREFECT_AUTH": auth, "CONSILIUM_MLFLOW_PORT": str(free_port())}
    site = PartyHere(root, settings, ("--prefect-server", url))
    site.start()
    try:
        site.wait_ready()
        assert (site.services.prefect_api, site.services.pool) == (url, "consilium-site-01")
        site.consilium("deploy")
        run = site.begin("check-data/site-01")
        site.ends(run, "Completed")
        (told,) = json.loads(site.artifact(run, "check-site-01")["data"])
        assert told == {"modality": "pathology", "why": "missing_file", "inputs": "below 10"}
        assert site.api.get(f"/flow_runs/{run}")["work_pool_name"] == "consilium-site-01"
        automations = {x["name"]: x for x in site.api.post("/automations/filter", {})}
        assert {AUTOMATION, RETRY} <= set(automations)
        related = automations[AUTOMATION]["trigger"]["match_related"]
        assert related["prefect.resource.id"] == "prefect.tag.consilium"
    finally:
        site.stop()
    assert not (root / "logs/prefect.log").exists()


def _get(address: str, **headers: str) -> tuple[int, Any, bytes]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def _engine(parent: int) -> list[int]:
    """Wait for the run's own process."""

    def engines() -> list[int]:
        return [x for x in _tree(parent) if "prefect.engine" in _command(x)]

    _until(lambda: len(engines()) == 1, timeout_s=60)
    return engines()


def _tree(parent: int) -> list[int]:
    """Live processes that descend from one, itself first."""
    parents, tree = _parents(), [parent]
    for process_id in tree:
        tree += [x for x, its_parent in parents.items() if its_parent == process_id]
    return tree


def _parents() -> dict[int, int]:
    """Parent of every live process."""
    found = {}
    for process in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, its_parent = process.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                found[int(process.parent.name)] = int(its_parent)
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def _pss_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("Pss:"))


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _until(condition: Callable[[], bool], *, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
