"""What runs at either end of a start-up kit, and the site's party that a job opens.

A party is one service of the federation engine, restarted when it dies. Its engine's own log stays
in the kit; what an operator reads are the few lines of this file.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.provision import (
    ADMIN,
    CONSORTIUM_FILE,
    COORDINATOR,
    ProvisionError,
    read_party,
    set_home,
    settle,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

READY: Final = "ready for sites"
CONNECTED: Final = "connected to the coordinator"
_ENGINE_LOG: Final = "engine.log"
_LOCK: Final = "service.lock"
_POLL_S: Final = 0.2
_STOP_S: Final = 5.0
_RESTART_S: Final = 2.0
_MAX_RESTARTS: Final = 5
_RESTARTS_WITHIN_S: Final = 300.0
# What the engine's log says, and what we say; the first that fits wins.
_MILESTONES: Final = {
    COORDINATOR: (
        ("Server started", READY),
        ("Client: New client ", "a site connected"),
        ("started to run, status changed to RUNNING", "job started"),
        ("Failed to run the Job", "job failed to start; see log.txt in the kit"),
    ),
    "site": (
        ("Successfully registered client", CONNECTED),
        ("Launched job", "job started"),
        ("child worker process finished", "job ended"),
    ),
}


class PartyFailed(RuntimeError):
    """A party that could not be started, or dies again and again."""


def open_party(kit: Path) -> Callable[[bytes], bytes]:
    """Give the function that answers the coordinator's requests at the site of this kit.

    The engine's job at a site finds this function by the entry point ``site`` of the group
    ``consilium.federation``.

    Raises
    ------
    infra.provision.ProvisionError
        If the kit does not say where the site's files are.
    """
    party = read_party(kit)
    if party["home"] is None:
        raise ProvisionError(
            "kit: found no folder of the site's files, needed one; start with --site-home DIR"
        )
    # In the job's process, and only there: the site's flow takes seconds to import.
    from flows.gate import open_site
    from fusion.federation.consortium import read_consortium

    consortium = read_consortium(kit / CONSORTIUM_FILE)
    return open_site(Path(party["home"]), party["name"], consortium)


class Party:
    """One service of the engine, from a kit.

    Parameters
    ----------
    kit
        Start-up kit of a site or of the coordinator.
    say
        Takes each line for the operator.
    """

    def __init__(self, kit: Path, say: Callable[[str], None]) -> None:
        self._kit = kit.resolve()
        self._name = str(read_party(kit)["name"])
        if self._name == ADMIN:
            raise ProvisionError(
                "kit: found the admin's, needed a site's or the coordinator's; the admin's is for "
                "`consilium study run --federation flare`"
            )
        self._say = lambda line: say(f"{time.strftime('%H:%M:%S')} {self._name}: {line}")

    def run(self, stop: threading.Event) -> int:
        """Keep the service running until ``stop``; 0 then, 1 if it dies again and again."""
        settle(self._kit)
        with _only_one(self._kit):
            _end_left_over(self._kit)
            return self._keep_running(stop)

    def _keep_running(self, stop: threading.Event) -> int:
        restarts: list[float] = []
        while not stop.is_set():
            self._say("starting")
            status = self._run_once(stop)
            if stop.is_set() or (self._kit / "shutdown.fl").exists():
                break
            now = time.monotonic()
            restarts = [at for at in restarts if now - at < _RESTARTS_WITHIN_S] + [now]
            if len(restarts) > _MAX_RESTARTS:
                self._say(f"ended with status {status} too often; see {_ENGINE_LOG} in the kit")
                return 1
            self._say(f"ended with status {status}; starting again")
            stop.wait(_RESTART_S)
        self._say("stopped")
        return 0

    def _run_once(self, stop: threading.Event) -> int:
        engine_log = self._kit / _ENGINE_LOG
        engine_log.touch(mode=0o600)
        with engine_log.open("ab") as output:
            service = subprocess.Popen(
                _command(self._kit, self._name),
                cwd=self._kit,
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to us alone, and we stop it
                umask=0o077,
            )
        try:
            log = _Tail(self._kit / "log.txt")
            while service.poll() is None and not stop.wait(_POLL_S):
                self._report(log)
            self._report(log)
        finally:
            _stop(service)
        return service.returncode

    def _report(self, log: _Tail) -> None:
        kind = COORDINATOR if self._name == COORDINATOR else "site"
        for line in log.lines():
            said = next((said for seen, said in _MILESTONES[kind] if seen in line), None)
            if said is not None:
                self._say(said)


class _Tail:
    """Lines that are added to a file from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        if not self._path.exists():
            return []
        if self._path.stat().st_size < self._at:  # the log was rotated
            self._at = 0
        with self._path.open("rb") as file:
            file.seek(self._at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._at += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()


def _command(kit: Path, name: str) -> list[str]:
    module, settings, more = "client.client_train", "fed_client.json", [f"uid={name}"]
    if name == COORDINATOR:
        module, settings, more = "server.server_train", "fed_server.json", []
    return [
        *(sys.executable, "-W", "ignore", "-u", "-m", f"nvflare.private.fed.app.{module}"),
        *("-m", str(kit), "-s", settings),
        *("--set", "secure_train=true", "org=consilium", "config_folder=config"),
        *("heart_beat_interval=5", *more),
    ]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONSAFEPATH": "1",  # nothing is imported from the kit
        "PYTHONWARNINGS": "ignore",
        "MALLOC_ARENA_MAX": "2",
        "OPENBLAS_NUM_THREADS": os.environ.get("OPENBLAS_NUM_THREADS", "1"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # After the server's job process ended, it waits so long for word from each site's.
        "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "5",
    }


def _stop(service: subprocess.Popen[bytes]) -> None:
    """End a service and the job processes it started, by their ids."""
    jobs = _children(service.pid)
    service.terminate()
    try:
        service.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        service.kill()
        service.wait()
    for job in jobs:
        with suppress(ProcessLookupError):
            os.kill(job, signal.SIGKILL)


@contextmanager
def _only_one(kit: Path) -> Iterator[None]:
    """Let no second party run from a kit; a party that is killed lets go of it."""
    with (kit / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ProvisionError(
                "kit: found its party running already, needed it stopped; end that one first"
            ) from None
        yield


def is_running(kit: Path) -> bool:
    """Whether a party runs from this kit, on this machine."""
    try:
        with (kit / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _end_left_over(kit: Path) -> None:
    """End what a party that was killed left running: of two services of a site, neither works."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if os.fsencode(kit) in words and any(x.startswith(b"nvflare.private.") for x in words):
                os.kill(int(process.name), signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Ids of a process's children; elsewhere than on Linux none: they end when they miss it."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += [int(child) for child in listed.read_text().split()]
    return found


def run_party(kit: Path, *, say: Callable[[str], None], site_home: Path | None = None) -> int:
    """Run a kit's service in the foreground until Ctrl-C or SIGTERM; give the exit status.

    Parameters
    ----------
    kit
        Start-up kit.
    say
        Takes each line for the operator.
    site_home
        Folder with ``study.toml`` and the site's files; noted in the kit.

    Raises
    ------
    infra.provision.ProvisionError
        If the folder is no kit of a service.
    """
    if site_home is not None:
        set_home(kit, site_home)
    party = Party(kit, say)
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return party.run(stop)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def start_parties(
    kits: Mapping[str, Path], *, logs: Path, timeout_s: float = 90.0
) -> Iterator[dict[str, int]]:
    """Run the coordinator and the sites of a simulated consortium as processes of their own.

    They are all connected when the block begins, and stopped when it ends, or when this process
    dies.

    Parameters
    ----------
    kits
        Start-up kit per party, as provisioned; the admin's is passed over.
    logs
        Folder for one log per party.

    Yields
    ------
    dict
        Process id per party.

    Raises
    ------
    PartyFailed
        If a party is not connected in time.
    """
    logs.mkdir(parents=True, exist_ok=True)
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name in kits.keys() - {ADMIN}:
            running[name] = _start_process(kits[name], logs / f"{name}.log")
        _wait_until_connected(running, logs, time.monotonic() + timeout_s)
        yield {name: process.pid for name, process in running.items()}
    finally:
        _stop_processes(list(running.values()))


def _start_process(kit: Path, log: Path) -> subprocess.Popen[bytes]:
    log.unlink(missing_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "flows.parties", str(kit)],
            stdin=subprocess.PIPE,  # closed when this process dies, which ends the party
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
        )


def _wait_until_connected(
    running: Mapping[str, subprocess.Popen[bytes]], logs: Path, deadline: float
) -> None:
    waited = set(running)
    while waited:
        for name in tuple(waited):
            needed = READY if name == COORDINATOR else CONNECTED
            if needed in (logs / f"{name}.log").read_text():
                waited.discard(name)
            elif running[name].poll() is not None or time.monotonic() > deadline:
                raise PartyFailed(f"{name}: did not connect; see its log and its kit's log.txt")
        time.sleep(0.1)


def _stop_processes(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.stdin is not None:
            process.stdin.close()
    deadline = time.monotonic() + 2 * _STOP_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main() -> int:
    """Run one party until standard input closes, as :func:`start_parties` starts it."""
    parser = argparse.ArgumentParser(prog="flows.parties")
    parser.add_argument("kit", type=Path)
    kit = parser.parse_args().kit

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        return run_party(kit, say=say)
    except ProvisionError as error:
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
