"""Prefect and MLflow servers of one machine: started below a folder, stopped with their parent."""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from flows import service_programs
from flows.service_programs import MARK, STOP_S, end_marked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

HOST = service_programs.HOST
_KEPT_LOG_BYTES = 5_000_000
_POLL_S = 0.1
_FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}  # a server that idles keeps what its threads took


class ServiceError(RuntimeError):
    """A server that did not start, or ended on its own."""


@dataclass(frozen=True)
class Server:
    """A server that is starting, or runs.

    Attributes
    ----------
    name
        What it is, for messages.
    api_url
        Where its clients connect.
    process
        Its process, or None for a server that someone else runs.
    """

    name: str
    api_url: str
    process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """What a browser opens."""
        return self.api_url.removesuffix("/api")

    def wait_ready(self, timeout_s: float = 120) -> None:
        """Wait until the server answers.

        Raises
        ------
        ServiceError
            If it ended, or does not answer within ``timeout_s``.
        """
        deadline = time.monotonic() + timeout_s
        while not self.answers():
            self.check_running()
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{self.name}: found no answer after {timeout_s:g} s, needed one; its log says "
                    "why, and a busy machine may need more time"
                )
            time.sleep(_POLL_S)

    def check_running(self) -> None:
        """Raise when the process ended on its own.

        Raises
        ------
        ServiceError
            If it did; a server that someone else runs is not looked at.
        """
        code = None if self.process is None else self.process.poll()
        if code is not None:
            raise ServiceError(
                f"{self.name}: found it ended with code {code}, needed it running; read its log"
            )

    def answers(self) -> bool:
        """Say whether it answers that it is well."""
        own = [] if self.process is None else [urllib.request.ProxyHandler({})]
        opener = urllib.request.build_opener(*own)  # a proxy cannot reach this machine's loopback
        try:
            with opener.open(f"{self.api_url.rstrip('/')}/health", timeout=5) as answer:
                return bool(answer.status == http.HTTPStatus.OK)
        except (OSError, http.client.HTTPException):
            return False


@contextmanager
def prefect_server(home: Path, *, port: int | None = None) -> Iterator[Server]:
    """Start Prefect's API server and stop it at the end; use that of ``PREFECT_API_URL`` if set.

    The block is entered as soon as the process exists: do other work while it boots, then call
    :meth:`Server.wait_ready`. It listens on the loopback address only, has no user interface and
    runs no scheduler. It ends with the block, and also when this process is killed.

    Parameters
    ----------
    home
        Folder of its database (``prefect.db``), results and log (``server.log``); made if absent.
    port
        Where it listens; by default any free port.

    Raises
    ------
    ServiceError
        If ``port`` is taken.
    """
    given = os.environ.get("PREFECT_API_URL")
    if given:
        yield Server("the Prefect server of PREFECT_API_URL", given)
        return
    chosen = free_port(port)
    if port not in (None, chosen):
        raise ServiceError(f"Prefect server: found port {port} taken, needed a free one")
    with _prefect(home, port=chosen, mode="api", log=home / "server.log") as server:
        yield server


def client_settings(api_url: str, home: Path) -> dict[str, str]:
    """Give the environment variables that flows need, to be set before Prefect is imported.

    Nothing of a log reaches the server. The terminal stays quiet: a failure ends the command with
    one sentence, and its traceback stands in the local log.

    Parameters
    ----------
    api_url
        :attr:`Server.api_url`.
    home
        Folder of Prefect's own files and of the results that flows keep.
    """
    settings = {
        **_private(home),
        "PREFECT_API_URL": api_url,
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_ENABLED": "false",
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    }
    if urlsplit(api_url).hostname in (HOST, "localhost", "::1"):
        settings |= _direct_loopback()
    return settings


def _direct_loopback() -> dict[str, str]:
    """Keep requests to this machine off a proxy, which could not reach it."""
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    hosts = ",".join(filter(None, [direct, HOST, "localhost"]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def open_ui(
    root: Path,
    *,
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    announce: Callable[[str], None] = typer.echo,
) -> None:
    """Show a folder's flow runs and models in Prefect's and MLflow's pages, until Ctrl-C.

    Both servers listen on the loopback address only. Their logs are below ``root/logs``.

    Parameters
    ----------
    root
        Folder of a demo or study: has ``mlflow.db`` and ``prefect/``.
    prefect_port, mlflow_port
        Where to listen; a taken port is replaced by a free one, and the text says so.
    announce
        Gets each line of text.

    Raises
    ------
    ServiceError
        If the folder has no ``mlflow.db``, or a server ends.
    """
    root = root.resolve()
    if not (root / "mlflow.db").is_file():
        raise ServiceError(
            "ui: found no mlflow.db in this folder, needed one that a study wrote; run "
            "`consilium demo` first, or name its folder"
        )
    (root / "logs").mkdir(exist_ok=True)
    with _interrupted_by_sigterm(), ExitStack() as stack:
        port = _announced_port("Prefect", prefect_port, announce)
        prefect = _prefect(root / "prefect", port=port, mode="ui", log=root / "logs/prefect.log")
        servers = [stack.enter_context(prefect)]
        port = _announced_port("MLflow", mlflow_port, announce)
        servers.append(stack.enter_context(_mlflow(root, port=port, log=root / "logs/mlflow.log")))
        announce("starting; the first time takes longer")
        for server in servers:
            server.wait_ready()
            announce(f"{server.name}: {server.address}")
        announce("press Ctrl-C to stop both")
        _watch(servers)


def free_port(wanted: int | None = None) -> int:
    """Give ``wanted`` if nothing listens there on the loopback address, else any free port."""
    for port in (wanted or 0, 0):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ServiceError("ports: found no free one on the loopback address, needed one")


def _announced_port(name: str, wanted: int, announce: Callable[[str], None]) -> int:
    port = free_port(wanted)
    if port != wanted:
        announce(f"{name}: port {wanted} is taken, so {port} is used")
    return port


def _watch(servers: Sequence[Server]) -> None:
    try:
        while True:
            time.sleep(5 * _POLL_S)
            for server in servers:
                server.check_running()
    except KeyboardInterrupt:
        return


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        return  # asked to stop before the servers were up
    finally:
        signal.signal(signal.SIGTERM, before)


def _private(home: Path) -> dict[str, str]:
    home = home.resolve()
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": str(home / "results"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
    }


@contextmanager
def _prefect(
    home: Path, *, port: int, mode: str, log: Path, more: Mapping[str, str] | None = None
) -> Iterator[Server]:
    home.mkdir(parents=True, exist_ok=True)
    address = f"http://{HOST}:{port}"
    settings = {
        **_private(home),
        "PREFECT_SERVER_API_HOST": HOST,
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_UI_API_URL": f"{address}/api",
        "PREFECT_SERVER_UI_ENABLED": str(mode == "ui").lower(),
        "PREFECT_SERVER_UI_V2_ENABLED": "false",  # its pages call out
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home.resolve() / "ui"),
        **_FEW_ARENAS,
        **(more or {}),
    }
    arguments = ["prefect", mode, str(port)]
    with _child(arguments, settings=settings, cwd=home, log=log) as process:
        yield Server("Prefect server", f"{address}/api", process)


@contextmanager
def _mlflow(
    root: Path,
    *,
    port: int,
    log: Path,
    database_url: str | None = None,
    artifacts: str | None = None,
) -> Iterator[Server]:
    """Run MLflow's server over the store in a folder; whatever it is told names no password."""
    hosts = f"{HOST}:{port},localhost:{port}"
    settings = {
        "MLFLOW_BACKEND_STORE_URI": database_url or f"sqlite:///{root / 'mlflow.db'}",
        "MLFLOW_SERVER_ALLOWED_HOSTS": hosts,
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{x}" for x in hosts.split(",")),
        "MLFLOW_SERVER_X_FRAME_OPTIONS": "DENY",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_AI_GATEWAY": "false",
        "DO_NOT_TRACK": "true",
        **_FEW_ARENAS,
    }
    arguments = [
        *("mlflow", str(port), "--workers", "1"),
        # Whoever reaches this server gets files through it, wherever they lie.
        *("--default-artifact-root", "mlflow-artifacts:/"),
        *("--artifacts-destination", artifacts or str(root / "artifacts")),
    ]
    with _child(arguments, settings=settings, cwd=log.parent, log=log) as process:
        yield Server("MLflow server", f"http://{HOST}:{port}", process)


@contextmanager
def _child(
    arguments: Sequence[str], *, settings: Mapping[str, str], cwd: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a service in a process group of its own, which ends with the block or with us.

    The user's own Prefect and MLflow settings are left out, or they could move the database away
    from the folder; so is the password of the databases, which only their servers are given. The
    working folder is not searched for modules.
    """
    ours = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PREFECT_", "MLFLOW_")) and name != "CONSILIUM_DATABASE_URL"
    }
    mark = settings.get(MARK) or secrets.token_hex(16)
    with _appended(log) as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.service_programs", *arguments],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env={
                **ours,
                **_direct_loopback(),
                **settings,
                **{MARK: mark, "PYTHONSAFEPATH": "1"},
            },
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _stop(process, mark)


def _appended(log: Path) -> IO[bytes]:
    """Open a log at its end; a long one is put aside first, in place of the one before it."""
    if log.is_file() and log.stat().st_size > _KEPT_LOG_BYTES:
        log.replace(log.with_name(f"{log.name}.1"))
    return log.open("ab")


def _stop(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a service with all that it started, be it dead itself already."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=1.5 * STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        end_marked(mark)
        if process.stdin is not None:
            process.stdin.close()
