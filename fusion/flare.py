"""Carries the federation's bytes over NVIDIA FLARE; the only file that imports it.

The relay in the server's job and the executor at a site know nothing but bytes: what they mean is
decided by the process that runs the study, and by each site's own party. No code travels with a
job, nothing is pickled, and only fixed codes leave a site when it fails.
"""

from __future__ import annotations

import fcntl
import json
import math
import secrets
import shutil
import tempfile
import threading
import time
from contextlib import redirect_stdout
from importlib.metadata import entry_points
from io import StringIO
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Self

from nvflare.apis.controller_spec import Task
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.impl.controller import Controller
from nvflare.apis.job_launcher_spec import JobReturnCode
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection

    from nvflare.apis.client import Client as FlareClient
    from nvflare.apis.controller_spec import ClientTask
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.signal import Signal
    from nvflare.fuel.flare_api.flare_api import Session

    from fusion.federation.transport import FederationLost

    Party = Callable[[bytes], bytes]

ASK: Final = "ask"
ECHO: Final = "echo"
# A message of 64 MiB and its envelope. Written out, because to import fusion.messages takes most of
# a second that the server's job has better use for.
LARGEST_PAYLOAD: Final = 64 * 1024 * 1024 + 64 * 1024
JOB_NAME: Final = "consilium"
_END: Final = "end"
_PAYLOAD: Final = "payload"
_RELAY_FILE: Final = "relay-{}.json"
_LARGEST_HEADER: Final = 256 * 1024
_POLL_S: Final = 0.02
_GRACE_S: Final = 30.0
_END_S: Final = 5.0
_GONE_S: Final = 5.0
_ENDED: Final = ("FINISHED", "FAILED")
_FAULTS: Final = (OSError, EOFError, AuthenticationError, ValueError, KeyError, TypeError)


def _lost(sentence: str) -> FederationLost:
    from fusion.federation.transport import FederationLost  # as slow to import

    return FederationLost(f"federation: {sentence}")


def _send(end: Connection, header: Mapping[str, Any], *bodies: bytes) -> None:
    end.send_bytes(json.dumps(header).encode())
    for body in bodies:
        end.send_bytes(body)


def _receive(end: Connection) -> dict[str, Any]:
    header = json.loads(end.recv_bytes(_LARGEST_HEADER))
    if not isinstance(header, dict):
        raise ValueError("relay: needed an object")
    return header


def _payload(shareable: Any) -> bytes | None:
    """Bytes of a task or reply that is exactly as this file writes it, else None."""
    if not isinstance(shareable, Shareable) or shareable.get_return_code() != ReturnCode.OK:
        return None
    payload = shareable.get(_PAYLOAD)
    if not isinstance(payload, bytes) or len(payload) > LARGEST_PAYLOAD:
        return None
    return payload


def _shareable(payload: bytes) -> Shareable:
    found = Shareable()
    found[_PAYLOAD] = payload
    return found


class CoordinatorRelay(Controller):
    """Server's side of a job: hands requests of the study's process to sites, and replies back.

    It connects to the study's process at the address in a private file of the coordinator's kit,
    and ends with it.

    Parameters
    ----------
    relay
        Which file, as hex digits.
    """

    def __init__(self, relay: str) -> None:
        super().__init__(task_check_period=_POLL_S)
        self._relay = f"{int(relay, 16):032x}"

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Need nothing before the job."""

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Leave nothing behind."""

    def process_result_of_unknown_task(
        self, client: FlareClient, task_name: str, client_task_id: str, result: Shareable,
        fl_ctx: FLContext,
    ) -> None:  # fmt: skip
        """Drop a reply that comes after its round."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Serve the study's process until it ends the job, or is gone."""
        # At the end the engine would import torch, 6 s, to clean up downloads of tensors.
        self.communicator._cleanup_inflight_tensor_downloads = lambda fl_ctx: None
        try:
            with self._connect(fl_ctx) as study:
                _send(study, {"sites": self._connected()})
                while not abort_signal.triggered:
                    if study.poll(0.2) and not self._serve(study, abort_signal, fl_ctx):
                        break
        except _FAULTS as fault:
            self.log_warning(fl_ctx, f"the study's process is gone: {type(fault).__name__}")

    def _connect(self, fl_ctx: FLContext) -> Connection:
        kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
        where = json.loads((kit / _RELAY_FILE.format(self._relay)).read_text())
        return Client(where["address"], "AF_UNIX", authkey=bytes.fromhex(where["authkey"]))

    def _connected(self) -> list[str]:
        return [client.name for client in self._engine.get_clients()]

    def _serve(self, study: Connection, abort_signal: Signal, fl_ctx: FLContext) -> bool:
        request = _receive(study)
        if request["kind"] == _END:
            return False
        payload = study.recv_bytes(LARGEST_PAYLOAD)
        replies = self._round(request, payload, lambda: study.poll() or abort_signal.triggered)
        if abort_signal.triggered:
            return False
        _send(study, {"id": request["id"], "sites": list(replies)}, *replies.values())
        return True

    def _round(
        self, request: Mapping[str, Any], payload: bytes, stop: Callable[[], bool]
    ) -> dict[str, bytes]:
        """Let these sites answer; one that does not within the time is absent."""
        targets = [
            name
            for name in self._connected()
            if name in request["sites"] and not self.get_client_disconnect_time(name)
        ]
        waited, replies, arrived = set(targets), dict[str, bytes](), threading.Event()

        def keep(client_task: ClientTask, fl_ctx: FLContext) -> None:
            reply = _payload(client_task.result)
            client_task.result = None
            if reply is not None:
                replies[client_task.client.name] = reply
            waited.discard(client_task.client.name)
            if not waited:
                arrived.set()

        task = Task(
            name=ECHO if request["kind"] == ECHO else ASK,
            data=_shareable(payload),
            timeout=max(1, math.ceil(float(request["timeout_s"]))),
            result_received_cb=keep,
        )
        if targets:
            with self._engine.new_context() as fl_ctx:
                self.broadcast(task, fl_ctx, targets=targets, min_responses=len(targets))
                self._wait(task, waited, arrived, stop)
                if waited:
                    self.cancel_task(task, fl_ctx=fl_ctx)
        return dict(replies)

    def _wait(
        self, task: Task, waited: set[str], arrived: threading.Event, stop: Callable[[], bool]
    ) -> None:
        while not arrived.wait(_POLL_S) and task.completion_status is None:
            gone = [self.get_client_disconnect_time(name) for name in tuple(waited)]
            if stop() or (gone and all(gone)):
                return


class SiteJobLauncher(ClientProcessJobLauncher):
    """Starts a site's job process, whose death leaves the others' job alone.

    The engine would end the whole job with it; here the site is absent and the quorum decides.
    """

    def launch_job(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> ProcessHandle:
        """Start the process."""
        return _SiteProcess(process_adapter=super().launch_job(job_meta, fl_ctx).adapter)


class _SiteProcess(ProcessHandle):
    def poll(self) -> int:
        code: int = super().poll()
        return JobReturnCode.UNKNOWN if code == JobReturnCode.EXECUTION_ERROR else code


class SiteExecutor(Executor):
    """Site's side of a job: one process over all rounds, which asks the site's own party."""

    def __init__(self) -> None:
        super().__init__()
        self._party: Party | None = None
        self._claim: IO[str] | None = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Open the site's party when the job begins, and let go of it at the end."""
        if event_type == EventType.START_RUN:
            kit = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
            try:
                # A process of an aborted job may still be at an answer: two must not be.
                self._claim = _claim(kit / "party.lock", within_s=_GRACE_S)
                self._party = _open_party(kit)
            except Exception:  # noqa: BLE001  (text of an error must not leave the site)
                self.log_exception(fl_ctx, "the site's party could not be opened")
        elif event_type == EventType.END_RUN and self._claim is not None:
            self._party = None
            self._claim.close()

    def execute(
        self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal
    ) -> Shareable:
        """Answer one request; whatever goes wrong crosses as a fixed code."""
        payload = _payload(shareable)
        if payload is None:
            return make_reply(ReturnCode.BAD_TASK_DATA)
        if task_name == ECHO:
            return _shareable(payload)
        return _shareable(self._answer(payload, fl_ctx))

    def _answer(self, payload: bytes, fl_ctx: FLContext) -> bytes:
        try:
            if self._party is None:
                raise RuntimeError("the site's party is not open")
            reply = self._party(payload)
            if len(reply) > LARGEST_PAYLOAD:
                raise ValueError("reply: found more bytes than may cross")
        except Exception:  # noqa: BLE001  (text of an error must not leave the site)
            self.log_exception(fl_ctx, "the site's party failed")
            return _refusal()
        return reply


def _claim(path: Path, *, within_s: float) -> IO[str]:
    """Hold a lock until the file is closed or the process is gone.

    Raises
    ------
    BlockingIOError
        If another process holds it all that time.
    """
    deadline = time.monotonic() + within_s
    path.touch(mode=0o600)
    file = path.open("w")
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise
            time.sleep(0.1)
        else:
            return file


def _refusal() -> bytes:
    from fusion.messages import Refused, encode

    return encode(Refused("site_error"))


def _open_party(kit: Path) -> Party:
    """Give the function that answers at this site, from the installation's entry point."""
    found = next(iter(entry_points(group="consilium.federation", name="site")))
    party: Party = found.load()(kit)
    return party


class FlareTransport:
    """A job of the engine as the study's process sees it: a transport of bytes.

    Parameters
    ----------
    kit_admin, kit_coordinator
        Start-up kits on this machine; the coordinator's is running.
    sites
        Sites to ask.
    timeout_s
        Longest wait for a site's answer.
    start_timeout_s
        Longest wait for each of the server, all the sites, and the job. Sites that are not
        connected by then are left out of the job.
    """

    def __init__(
        self,
        kit_admin: Path,
        kit_coordinator: Path,
        sites: Sequence[str],
        timeout_s: float,
        *,
        start_timeout_s: float = 120.0,
    ) -> None:
        self._admin, self._kit = kit_admin.resolve(), kit_coordinator.resolve()
        self._sites = tuple(sites)
        self._timeout_s, self._start_timeout_s = timeout_s, start_timeout_s
        self._session: Session | None = None
        self._relay: Connection | None = None
        self._job: str | None = None
        self._round = 0
        self._lock = threading.Lock()
        self._claim: IO[str] | None = None

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""
        return self._sites

    @property
    def job(self) -> str | None:
        """The engine's name of the job that runs."""
        return self._job

    def __enter__(self) -> Self:
        self._claim_kit()
        try:
            self._begin()
        except BaseException:
            self._finish()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def resubmit(self) -> None:
        """End what is left of the job and begin a new one.

        Raises
        ------
        FederationLost
            If the engine cannot be reached, or the job does not begin.
        """
        self._end_job()
        self._close_session()  # it does not survive the server
        self._begin()

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Send one request to these sites; one that does not answer in time is absent.

        Raises
        ------
        FederationLost
            If the job is gone.
        ValueError
            If the request is larger than may cross.
        """
        return self._exchange(ASK, payload, sites)

    def echo(self, n_bytes: int, sites: Sequence[str]) -> float:
        """Seconds of one round in which each site gives back so many bytes of ours, no data.

        Raises
        ------
        FederationLost
            If the job is gone, or no site gave back what it was sent.
        """
        sent = secrets.token_bytes(n_bytes)
        begun = time.perf_counter()
        found = self._exchange(ECHO, sent, sites)
        took = time.perf_counter() - begun
        if not found or any(reply != sent for reply in found.values()):
            raise _lost("an echo did not come back as it was sent")
        return took

    def _exchange(self, kind: str, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        if len(payload) > LARGEST_PAYLOAD:
            raise ValueError(
                f"request: found {len(payload)} bytes, needed at most {LARGEST_PAYLOAD}"
            )
        with self._lock:
            relay = self._relay
            if relay is None:
                raise _lost("no job is running; submit one")
            try:
                return self._ask_relay(relay, kind, payload, sites)
            except _FAULTS:
                self._hang_up()
                raise _lost(
                    "the server's job process is gone; the run can be resumed with a new job"
                ) from None

    def _ask_relay(
        self, relay: Connection, kind: str, payload: bytes, sites: Sequence[str]
    ) -> dict[str, bytes]:
        self._round += 1
        _send(
            relay,
            {"id": self._round, "kind": kind, "sites": list(sites), "timeout_s": self._timeout_s},
            payload,
        )
        if not relay.poll(self._timeout_s + _GRACE_S):
            raise EOFError
        header = _receive(relay)
        if header["id"] != self._round or not set(header["sites"]) <= set(sites):
            raise ValueError("relay: found an answer to another question")
        return {site: relay.recv_bytes(LARGEST_PAYLOAD) for site in header["sites"]}

    def _claim_kit(self) -> None:
        try:
            self._claim = _claim(self._kit / "study.lock", within_s=0.0)
        except BlockingIOError:
            raise _lost(
                "another study is running from the coordinator's kit; wait for its end"
            ) from None

    def _begin(self) -> None:
        from fusion.federation.transport import FederationLost  # see _lost

        try:
            self._submit(self._connected_session())
        except FederationLost:
            raise
        except Exception as fault:
            raise _lost(
                f"the server did not take the job ({type(fault).__name__}); see the log of the "
                "coordinator's kit"
            ) from fault

    def _submit(self, session: Session) -> None:
        _clear(session)
        present = _wait_for_sites(session, self._sites, self._start_timeout_s)
        if not present:
            raise _lost(
                f"found none of the sites connected within {self._start_timeout_s:g} "
                "s; start them with `consilium federation start --kit KIT`"
            )
        name, folder = secrets.token_hex(16), Path(tempfile.mkdtemp(prefix="consilium-"))
        where = self._kit / _RELAY_FILE.format(name)
        try:
            address, key = str(folder / "relay"), secrets.token_bytes(32)
            with Listener(address, "AF_UNIX", authkey=key) as listener:
                _write_private(where, {"address": address, "authkey": key.hex()})
                _write_job(folder / "job", name, present)
                self._job = session.submit_job(str(folder / "job"))
                self._relay = self._accept(listener, session)
        finally:
            where.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _connected_session(self) -> Session:
        deadline = time.monotonic() + self._start_timeout_s
        while self._session is None:
            try:
                self._session = _open_session(self._admin)
            except Exception as fault:
                if time.monotonic() > deadline:
                    raise _lost(
                        "found no server that answers; start it with `consilium "
                        "federation start --kit COORDINATOR`"
                    ) from fault
                time.sleep(0.5)
        return self._session

    def _accept(self, listener: Listener, session: Session) -> Connection:
        """Wait for the relay of the job, as long as the job may still begin."""
        deadline = time.monotonic() + self._start_timeout_s
        found: list[Connection] = []

        def accept() -> None:
            try:
                found.append(listener.accept())
            except (OSError, EOFError, AuthenticationError):
                return

        waiting = threading.Thread(target=accept, daemon=True)
        waiting.start()
        while waiting.is_alive() and time.monotonic() < deadline and self._job_may_run(session):
            waiting.join(1.0)
        if not found or not found[0].poll(max(0.0, deadline - time.monotonic())):
            raise _lost("the job did not begin; see the log of the coordinator's kit")
        _receive(found[0])
        return found[0]

    def _job_may_run(self, session: Session) -> bool:
        try:
            return not str(session.get_job_status(self._job)).startswith(_ENDED)
        except Exception:  # noqa: BLE001  (a status that cannot be had says nothing yet)
            return True

    def _hang_up(self) -> None:
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def _end_job(self) -> None:
        """Ask the relay to end the job; one that does not is aborted."""
        ended = self._job is None or self._dismiss()
        self._hang_up()
        if not ended and self._session is not None:
            try:
                _clear(self._session)
            except Exception:  # noqa: BLE001  (a server that is gone runs no job)
                self._close_session()
        self._job = None

    def _dismiss(self) -> bool:
        """Whether the relay hung up in answer, after which the engine ends the job by itself."""
        if self._relay is None:
            return False
        try:
            _send(self._relay, {"kind": _END})
            return self._relay.poll(_END_S)
        except OSError:
            return False

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            try:
                session.close()
            except Exception:  # noqa: BLE001  (closed either way)
                return

    def _finish(self) -> None:
        self._end_job()
        self._close_session()
        if self._claim is not None:
            self._claim.close()
            self._claim = None


def disable_site(kit_admin: Path, site: str) -> None:
    """Let the server turn a site away from now on, restarts included, and end the job that runs.

    A new job begins without the site.

    Raises
    ------
    fusion.federation.transport.FederationLost
        If the server cannot be reached or does not do it.
    """
    try:
        session = _open_session(kit_admin.resolve())
        try:
            session.disable_client(site)
            _clear(session)
        finally:
            session.close()
    except Exception as fault:
        raise _lost(f"the server did not shut out {site}: {type(fault).__name__}") from fault


def _open_session(kit: Path) -> Session:
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    admin = json.loads((kit / "startup" / "fed_admin.json").read_text())["admin"]
    with redirect_stdout(StringIO()):  # it prints that it connects
        return new_secure_session(admin["username"], str(kit), timeout=5.0, auto_login_max_tries=1)


def _wait_for_sites(session: Session, sites: Sequence[str], timeout_s: float) -> list[str]:
    """Names of those connected, as soon as all are or when the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        connected = {client.name for client in session.get_connected_client_list()}
        present = [site for site in sites if site in connected]
        if len(present) == len(sites) or time.monotonic() > deadline:
            return present
        time.sleep(0.3)


def _clear(session: Session) -> None:
    """Abort jobs that have not ended, and wait until they have."""
    deadline, asked, gone = time.monotonic() + _GRACE_S, set[str](), set[str]()
    while time.monotonic() < deadline:
        running = {
            job["job_id"]
            for job in session.list_jobs()
            if not str(job.get("status")).startswith(_ENDED)
        } - gone
        if not running:
            return
        for job in running - asked:
            asked.add(job)
            try:
                session.abort_job(job)
            except Exception:  # noqa: BLE001  (a server that died lists jobs it no longer runs)
                gone.add(job)
        time.sleep(0.3)


def _write_private(path: Path, value: Mapping[str, Any]) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps(value))


def _write_job(folder: Path, relay: str, sites: Sequence[str]) -> None:
    """Write a job that names our two classes and carries nothing else."""
    server = {
        "format_version": 2,
        "server": {"task_request_interval": _POLL_S},
        "dead_client_grace_period": _GONE_S,
        "workflows": [
            {
                "id": "relay",
                "path": f"{CoordinatorRelay.__module__}.{CoordinatorRelay.__name__}",
                "args": {"relay": relay},
            }
        ],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    client = {
        "format_version": 2,
        "executors": [
            {
                "tasks": [ASK, ECHO],
                "executor": {"path": f"{SiteExecutor.__module__}.{SiteExecutor.__name__}"},
            }
        ],
        "components": [],
        "task_data_filters": [],
        "task_result_filters": [],
    }
    meta = {
        "name": JOB_NAME,
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"app": ["server", *sites]},
    }
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    (config / "config_fed_server.json").write_text(json.dumps(server))
    (config / "config_fed_client.json").write_text(json.dumps(client))
    (folder / "meta.json").write_text(json.dumps(meta))
