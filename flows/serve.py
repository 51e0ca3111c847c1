"""One party's services on this machine: Prefect server, worker and MLflow server, kept running."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.databases import databases_of, make_databases
from flows.keeping import Kept, keep
from flows.lost_runs import (
    HEARTBEAT_S,
    end_lost_runs,
    end_stuck_runs,
    speak_for_waiting,
    watch_for_silence,
)
from flows.prefect_api import PrefectApi
from flows.service_programs import MARK, end_marked
from flows.services import (
    HOST,
    Server,
    ServiceError,
    _announced_port,
    _child,
    _interrupted_by_sigterm,
    _mlflow,
    _prefect,
    client_settings,
)
from infra.settings import SITE_FILE, STUDY_FILE, load_services, load_site
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flows.databases import Databases
    from infra.settings import ServiceSettings

SERVICES_FILE = "services.json"
AUTH_FILE = "services/prefect.auth"
POOL = "consilium"
SHARED = "CONSILIUM_SHARED_PREFECT"
_LOCK = "services/serve.lock"


@dataclass(frozen=True)
class Services:
    """Where a party's running services are.

    Attributes
    ----------
    prefect_api
        Address of Prefect's API.
    prefect_auth
        What its clients prove themselves with, as ``user:password``; None where it asks nothing.
    mlflow
        Address of MLflow's pages and API.
    pool
        Work pool of the worker.
    pid
        Process of ``consilium serve``.
    tracking_uri
        What clients on this machine give MLflow: the served database file, or the server.
    """

    prefect_api: str
    prefect_auth: str | None
    mlflow: str
    pool: str
    pid: int
    tracking_uri: str

    @property
    def is_shared(self) -> bool:
        """Whether other parties use the Prefect server, too."""
        return self.pool != POOL


def running(root: Path) -> Services | None:
    """Read where the services of a folder are; None where ``consilium serve`` does not run."""
    root = root.resolve()
    if not (root / SERVICES_FILE).is_file() or not _is_locked(root):
        return None
    try:
        return Services(**json.loads((root / SERVICES_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def client_environment(services: Services, root: Path) -> dict[str, str]:
    """Give what a client needs in its environment before Prefect is imported.

    Parameters
    ----------
    services
        From :func:`running`.
    root
        Folder of the party.
    """
    root = root.resolve()
    auth = services.prefect_auth
    return {
        **client_settings(services.prefect_api, root / "prefect"),
        **({} if auth is None else {"PREFECT_API_AUTH_STRING": auth}),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "CONSILIUM_ROOT": str(root),
        "CONSILIUM_TRACKING_URI": services.tracking_uri,
        **({SHARED: "true"} if services.is_shared else {}),
    }


def store_folder(root: Path) -> Path:
    """Folder of the MLflow store that a party serves: a site's own, or the consortium's.

    Raises
    ------
    infra.settings.SettingsError
        If the site's settings cannot be read.
    """
    root = root.resolve()
    if (root / SITE_FILE).is_file():
        return load_site(root / SITE_FILE).home / "runs"
    return root


def serve(
    root: Path,
    *,
    settings: ServiceSettings | None = None,
    hub: str | None = None,
    announce: Callable[[str], None],
) -> None:
    """Run a party's services until Ctrl-C or SIGTERM, and restart one that ends on its own.

    All listen on the loopback address only, and end with this process, however it ends. Logs are
    below ``root/logs``, what Prefect knows below ``root/prefect``.

    Parameters
    ----------
    root
        Folder with ``study.toml`` or ``site.toml``.
    settings
        Ports, database and workers; from the environment by default.
    hub
        Address of a Prefect server that parties share. The worker then asks there for runs of
        the pool ``consilium-NAME``, and whoever controls that server can run any program here.
    announce
        Gets each line of text.

    Raises
    ------
    ServiceError
        If a service does not start, ends again and again, or runs already for this folder.
    """
    root = root.resolve()
    settings = load_services() if settings is None else settings
    _check_folder(root, settings)
    with _locked(root), _interrupted_by_sigterm(), ExitStack() as stack:
        (root / "logs").mkdir(mode=0o700, exist_ok=True)
        found, kept = _planned(root, settings, hub, announce)
        announce("starting; the first time takes longer")
        for service in kept:
            stack.enter_context(service)
        for service in kept:
            service.ready()
            announce(service.line)
        stack.callback((root / SERVICES_FILE).unlink, missing_ok=True)
        _publish(root, found)
        if hub is None:
            announce(f"password for Prefect's page: in {AUTH_FILE}")
        announce("press Ctrl-C to stop")
        keep(kept, announce=announce, also=partial(_each_half_minute, found))


def _each_half_minute(found: Services) -> None:
    api = PrefectApi(found.prefect_api, found.prefect_auth)
    speak_for_waiting(api, found.pool)
    end_stuck_runs(api, found.pool)


def _check_folder(root: Path, settings: ServiceSettings) -> None:
    if not any((root / name).is_file() for name in (STUDY_FILE, SITE_FILE)):
        raise ServiceError(
            f"serve: found neither {STUDY_FILE} nor {SITE_FILE} in this folder, needed one; name "
            "the folder of a site or coordinator with --root"
        )
    if settings.database_url is None and settings.workers > 1:
        raise ServiceError(
            f"CONSILIUM_WORKERS: found {settings.workers} with SQLite, which several workers "
            "would lock for one another, needed 1, or PostgreSQL in CONSILIUM_DATABASE_URL"
        )


def _planned(
    root: Path, settings: ServiceSettings, hub: str | None, announce: Callable[[str], None]
) -> tuple[Services, list[Kept]]:
    """Choose ports and say how each service starts, workers last."""
    url = None if settings.database_url is None else settings.database_url.get_secret_value()
    databases = None
    if url is not None:
        databases = databases_of(url)
        make_databases(url)
    found, kept = _planned_prefect(root, settings, hub, databases, announce)
    folder = store_folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    port = _announced_port("MLflow", settings.mlflow_port, announce)
    mlflow = f"http://{HOST}:{port}"
    # What a site's flows log has one writer, and stays a file of the site's.
    is_site = (root / SITE_FILE).is_file()
    database = None if databases is None or is_site else databases.mlflow
    ours = database is None and settings.artifacts is None
    tracking = f"sqlite:///{folder / 'mlflow.db'}" if ours else mlflow
    found = replace(found, mlflow=mlflow, tracking_uri=tracking)
    log = root / "logs/mlflow.log"
    start = partial(
        _mlflow,
        folder,
        port=port,
        log=log,
        database_url=database,
        artifacts=settings.artifacts,
    )
    kept.append(Kept("MLflow", start, line=f"MLflow: {mlflow}"))
    # On a shared server `consilium deploy` has silent runs looked for.
    settle = None if hub else _settling(found, settings)
    for at in range(settings.workers):
        name = f"worker {at + 1}" if settings.workers > 1 else "worker"
        plan = _WorkerPlan(
            name=f"{_party(root)}-{at + 1}",
            limit=settings.worker_limit,
            settle=settle,
            log=root / f"logs/{name.replace(' ', '-')}.log",
        )
        start_worker = partial(_worker, root, found, plan)
        line = f"{name}: pool {found.pool}, ready"
        kept.append(Kept(name, start_worker, line=line, asked=False))
    return found, kept


def _planned_prefect(
    root: Path,
    settings: ServiceSettings,
    hub: str | None,
    databases: Databases | None,
    announce: Callable[[str], None],
) -> tuple[Services, list[Kept]]:
    found = Services("", None, "", POOL, os.getpid(), "")
    if hub is not None:
        auth = settings.prefect_auth and settings.prefect_auth.get_secret_value()
        pool = f"{POOL}-{_party(root)}"
        api = hub.rstrip("/") + ("" if urlsplit(hub).path.strip("/") else "/api")
        PrefectApi(api, auth or None).post("/work_pools/filter", {})  # before anything starts
        announce(f"Prefect: {api}, shared; whoever controls it can run any program here")
        return replace(found, prefect_api=api, prefect_auth=auth or None, pool=pool), []
    port = _announced_port("Prefect", settings.prefect_port, announce)
    address = f"http://{HOST}:{port}"
    auth = _auth_string(root)
    start = partial(
        _prefect,
        root / "prefect",
        port=port,
        mode="ui",
        log=root / "logs/prefect.log",
        more=_server_settings(root, auth, databases),
    )
    found = replace(found, prefect_api=f"{address}/api", prefect_auth=auth)
    return found, [Kept("Prefect", start, line=f"Prefect: {address}")]


def _server_settings(root: Path, auth: str, databases: Databases | None) -> dict[str, str]:
    file = f"sqlite+aiosqlite:///{root / 'prefect' / 'prefect.db'}"
    return {
        "PREFECT_API_DATABASE_CONNECTION_URL": file if databases is None else databases.prefect,
        **({} if databases is None else databases.prefect_environment),
        "PREFECT_SERVER_API_AUTH_STRING": auth,
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_LOGGING_LEVEL": "WARNING",
    }


def _auth_string(root: Path) -> str:
    """Read what clients of our Prefect server prove themselves with; made once, for this user."""
    file = root / AUTH_FILE
    if not file.is_file():
        with replacing(file) as temporary:
            temporary.write_text(f"{POOL}:{secrets.token_urlsafe(24)}\n", encoding="utf-8")
            temporary.chmod(0o600)
    return file.read_text(encoding="utf-8").strip()


def _party(root: Path) -> str:
    return load_site(root / SITE_FILE).name if (root / SITE_FILE).is_file() else "coordinator"


def _settling(found: Services, settings: ServiceSettings) -> Callable[[], None]:
    """Give what to do before a worker starts: runs that nobody works on any more are settled.

    Of several workers the others may be at work when one starts anew, so it is done only once.
    """
    done = False

    def settle() -> None:
        nonlocal done
        api = PrefectApi(found.prefect_api, found.prefect_auth)
        watch_for_silence(api, silence_s=settings.silence_s)
        if settings.workers == 1 or not done:
            end_lost_runs(api, found.pool)
        done = True

    return settle


@dataclass(frozen=True)
class _WorkerPlan:
    name: str
    limit: int
    settle: Callable[[], None] | None
    log: Path


@dataclass(frozen=True)
class _Worker(Server):
    """A worker: ready when the Prefect server has heard from it."""

    found: Services = field(kw_only=True)
    plan: _WorkerPlan = field(kw_only=True)
    since: float = 0.0

    def wait_ready(self, timeout_s: float = 120) -> None:
        if self.plan.settle is not None:
            self.plan.settle()
        self._begin()
        super().wait_ready(timeout_s)

    def _begin(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def answers(self) -> bool:
        return self.plan.name in _online(self.found, since=self.since)


def _online(found: Services, *, since: float = 0.0) -> list[str]:
    """Names of the pool's workers that the server has heard from lately, and after a moment."""
    api = PrefectApi(found.prefect_api, found.prefect_auth)
    try:
        workers = api.post(f"/work_pools/{found.pool}/workers/filter", {})
    except ServiceError:
        return []
    return [
        worker["name"]
        for worker in workers
        if worker["status"] == "ONLINE"
        and datetime.fromisoformat(worker["last_heartbeat_time"]).timestamp() > since
    ]


@contextmanager
def _worker(root: Path, found: Services, plan: _WorkerPlan) -> Iterator[Server]:
    """Run a process worker; its runs have its environment, and what they print stays in its log."""
    mark = sha256(f"{root} {plan.name}".encode()).hexdigest()
    end_marked(mark)  # runs that outlived a killed worker and its parent
    settings = {
        **client_environment(found, root),
        MARK: mark,
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_WORKER_QUERY_SECONDS": "5",
    }
    arguments = ["worker", found.pool, plan.name, str(plan.limit)]
    log = plan.log
    since = time.time() if plan.settle else 0.0  # another machine's clock may differ
    with _child(arguments, settings=settings, cwd=log.parent, log=log) as process:
        yield _Worker("worker", found.prefect_api, process, found=found, plan=plan, since=since)


def health(root: Path) -> dict[str, bool]:
    """Ask a folder's running services how they are; empty where none run."""
    found = running(root)
    if found is None:
        return {}
    try:
        PrefectApi(found.prefect_api, found.prefect_auth).post("/work_pools/filter", {})
        prefect = True
    except ServiceError:
        prefect = False
    return {
        "Prefect": prefect,
        "MLflow": Server("MLflow server", found.mlflow).answers(),
        "worker": bool(_online(found)),
    }


def _is_locked(root: Path) -> bool:
    try:
        with (root / _LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Keep a second ``consilium serve`` out of this folder; the lock ends with this process."""
    (root / _LOCK).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (root / _LOCK).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ServiceError(
                "serve: found it running for this folder already, needed only one; see "
                "`consilium serve --check`"
            ) from None
        yield


def _publish(root: Path, services: Services) -> None:
    with replacing(root / SERVICES_FILE) as temporary:
        temporary.write_text(json.dumps(asdict(services), indent=1))
        temporary.chmod(0o600)
