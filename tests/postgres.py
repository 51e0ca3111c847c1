"""A PostgreSQL server of a test's own: made for it, reached on loopback, gone with it."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_USER = "consilium"
_START_S = 60.0
# Nothing of a test's database must outlive a power cut.
_QUICK = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


def postgres_program(name: str) -> str | None:
    """Path of one of PostgreSQL's programs, or None where it is not installed."""
    found = shutil.which(name)
    if found is not None:
        return found
    by_version = sorted(
        Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda p: float(p.parts[4])
    )
    return str(by_version[-1]) if by_version else None


@contextmanager
def postgres_server(
    tmp: Path, *, databases: Sequence[str] = ("prefect", "mlflow"), max_connections: int = 100
) -> Iterator[str]:
    """Run a server and give the address of its database ``consilium``.

    It listens on the loopback address only, with a password. Its user owns the server, so that
    further databases can be made. It ends with the block, or with this process.

    Parameters
    ----------
    tmp
        Gets ``postgres.log``; the data lie elsewhere, since the server never runs as root.
    databases
        Made beside ``consilium``; replace the last part of the address by their name.
    max_connections
        Of all clients together.

    Yields
    ------
    str
        As ``postgresql://consilium:PASSWORD@127.0.0.1:PORT/consilium``.
    """
    initdb, postgres = postgres_program("initdb"), postgres_program("postgres")
    if initdb is None or postgres is None:
        raise RuntimeError("found no initdb and postgres, needed PostgreSQL's server installed")
    password, port = secrets.token_hex(16), _free_port()
    folder = Path(tempfile.mkdtemp(prefix="consilium-postgres-", dir="/tmp"))
    try:
        _initialise(initdb, folder, password)
        command = [postgres, "-D", str(folder / "data"), "-k", str(folder), "-h", "127.0.0.1"]
        settings = (*_QUICK, f"port={port}", f"max_connections={max_connections}")
        command += [word for setting in settings for word in ("-c", setting)]
        url = f"postgresql://{_USER}:{password}@127.0.0.1:{port}"
        with _running([*_as_owner(ends_with_us=True), *command], folder, tmp / "postgres.log") as p:
            _wait(f"{url}/postgres", p)
            _create(f"{url}/postgres", (_USER, *databases))
            yield f"{url}/{_USER}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _as_owner(*, ends_with_us: bool = False) -> list[str]:
    """Words before a command that run it as somebody else than root."""
    ending = ["--pdeathsig", "INT"] if ends_with_us else []
    if os.geteuid() != 0:
        return ["setpriv", *ending] if ending else []
    owner = _owner()
    ids = [f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
    return ["setpriv", *ids, *ending]


def _owner() -> pwd.struct_passwd:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _initialise(initdb: str, folder: Path, password: str) -> None:
    secret = folder / "password"
    secret.write_text(password)
    if os.geteuid() == 0:
        for path in (folder, secret):
            os.chown(path, _owner().pw_uid, _owner().pw_gid)
    command = [initdb, "-D", str(folder / "data"), "-U", _USER, "-A", "scram-sha-256"]
    done = subprocess.run(
        [*_as_owner(), *command, f"--pwfile={secret}", "-E", "UTF8", "--locale=C", "--no-sync"],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"initdb failed: {done.stderr or done.stdout}")


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "TZ": "UTC"}


@contextmanager
def _running(command: list[str], folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)  # do not wait for clients to leave
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(10)


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def _create(url: str, databases: Sequence[str]) -> None:
    with closing(psycopg.connect(url, autocommit=True)) as connection:
        for name in databases:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
