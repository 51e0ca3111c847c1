"""The coordinator's Compose file without containers: its services as processes of this machine.

Commands, variables and secrets are those of ``infra/compose/coordinator.yaml`` and of the scripts
beside it; only where things are is another: loopback ports for names, a folder for ``/data``.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from flows.services import free_port
from tests.postgres import postgres_program, postgres_server
from tests.topology import PartyHere, end, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

INFRA = Path(__file__).resolve().parents[1] / "infra"
SCRIPTS = INFRA / "scripts"
ADMIN = "anna"
_BIN = Path(sys.executable).parent
# What the proxy of the Compose file does: TLS outside, the same bytes inside.
_PROXY = """
import asyncio, ssl, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()

async def meet(reader, writer):
    to_reader, to_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer))

async def main():
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(sys.argv[3], sys.argv[4])
    server = await asyncio.start_server(meet, "127.0.0.1", int(sys.argv[1]), ssl=context)
    await server.serve_forever()

asyncio.run(main())
"""


def service(file: str, name: str) -> dict[str, Any]:
    """One service of a Compose file."""
    found: dict[str, Any] = yaml.safe_load((INFRA / "compose" / file).read_text())["services"][name]
    return found


@dataclass
class Composed:
    """A coordinator's services, and where each name of the Compose file leads here.

    Attributes
    ----------
    root
        What is mounted as ``/data``.
    address
        The registry as people reach it, over TLS.
    authority
        File of the authority that signed the proxy's certificate.
    """

    folder: Path
    root: Path
    database: str
    store: str
    port: int
    address: str
    secrets: Path
    authority: Path = field(init=False)
    coordinator: PartyHere = field(init=False)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def here(self, text: str) -> str:
        """Put what is here in place of what is in the containers."""
        mounted = {
            name: Path(of["file"]).name
            for name, of in yaml.safe_load((INFRA / "compose/coordinator.yaml").read_text())[
                "secrets"
            ].items()
        }
        for name, file in mounted.items():
            text = text.replace(f"/run/secrets/{name}", str(self.secrets / file))
        swapped = {
            "http://objects:8333": self.store,
            "--host=0.0.0.0": "--host=127.0.0.1",
            "--port=5000": f"--port={self.port}",
            "127.0.0.1:5000": f"127.0.0.1:{self.port}",
            "https://${STUDY_HOST:?}": self.address,
            "${STUDY_HOST:?}": self.address.removeprefix("https://"),
            "${CONSILIUM_TIMEZONE:-}": "",
            "${CONSILIUM_SCHEDULES:-}": "",
            "/run/consilium": str(self.folder),
        }
        for theirs, ours in swapped.items():
            text = text.replace(theirs, ours)
        return str(self.root) if text == "/data" else text

    def environment(self, name: str) -> dict[str, str]:
        """Give what a service's entry point gives its command."""
        asked = {
            k: self.here(v) for k, v in service("coordinator.yaml", name)["environment"].items()
        }
        code = "import json, os; print(json.dumps(dict(os.environ)))"
        done = subprocess.run(
            [str(INFRA / "docker/entrypoint.sh"), sys.executable, "-c", code],
            env={"PATH": f"{_BIN}:{os.environ['PATH']}", "HOME": str(self.folder), **asked},
            capture_output=True,
            text=True,
            check=True,
        )
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Run a service's command."""
        words = [self.here(word) for word in service("coordinator.yaml", name)["command"]]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                words,
                env=self.environment(name),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def ask(self, path: str, *, account: tuple[str, str] | None = None) -> tuple[int, bytes]:
        """Ask the registry as the proxy does."""
        headers = {}
        if account is not None:
            coded = base64.b64encode(":".join(account).encode()).decode()
            headers["Authorization"] = f"Basic {coded}"
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def log(self, name: str) -> str:
        """What a service wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def wait_for_registry(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until MLflow answers."""

        def answers() -> bool:
            assert process.poll() is None, self.log("mlflow")
            try:
                return self.ask("/health")[0] == 200
            except OSError:
                return False

        assert until(answers, 180), self.log("mlflow")

    def script(
        self, name: str, *words: str | Path, **given: str
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts that administrators type."""
        return subprocess.run(
            [str(SCRIPTS / name), *map(str, words)],
            env={**os.environ, "PYTHON": sys.executable, **given},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    @property
    def to_postgres(self) -> list[str]:
        """Words that run a further one where PostgreSQL is, in place of a container's."""
        account, _, place = self.database.removeprefix("postgresql://").partition("@")
        host, _, port = place.partition("/")[0].partition(":")
        program = postgres_program("pg_dump")
        assert program is not None
        return [
            "env", f"PATH={Path(program).parent}:{os.environ['PATH']}", f"PGHOST={host}",
            f"PGPORT={port}", f"PGPASSWORD={account.partition(':')[2]}",
        ]  # fmt: skip


@contextmanager
def composed(
    folder: Path, store: str, root: Path, *, dumps: Path | None = None
) -> Iterator[Composed]:
    """Start PostgreSQL, the registry with accounts, its proxy, and the coordinator's services.

    Parameters
    ----------
    store
        Address of the S3-compatible store.
    root
        The coordinator's folder, with its study.
    dumps
        Saved databases, put into the new ones before anything uses them.
    """
    with ExitStack() as stack:
        database = stack.enter_context(postgres_server(folder, databases=_databases()))
        port, tls = free_port(), free_port()
        made = folder / "secrets"
        address = f"https://localhost:{tls}"
        found = Composed(folder, root, database, store, port, address, made)
        stack.callback(lambda: end(found.processes))
        _write_secrets(found)
        found.authority = _certify(made)
        proxy = [sys.executable, "-c", _PROXY, str(tls), str(port)]
        proxy += [str(made / "tls.crt"), str(made / "tls.key")]
        found.processes.append(subprocess.Popen(proxy, start_new_session=True))
        if dumps is not None:
            done = found.script("container_databases.sh", "restore", dumps, *found.to_postgres)
            assert done.returncode == 0, done.stderr
        assert found.start("bucket").wait(120) == 0, found.log("bucket")
        # In the order of the file: of two at once, both would make MLflow's tables.
        found.wait_for_registry(found.start("mlflow"))
        names = ("CONSILIUM_PREFECT_PORT", "CONSILIUM_MLFLOW_PORT")
        ports = {name: str(free_port()) for name in names}
        found.coordinator = PartyHere(root, {**found.environment("services"), **ports})
        stack.callback(found.coordinator.stop)
        found.coordinator.start()
        found.coordinator.wait_ready()
        yield found


@contextmanager
def object_store(folder: Path) -> Iterator[str]:
    """An S3-compatible store in a process of its own."""
    port = free_port()
    with (folder / "objects.log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "moto.server",
                "-H",
                "127.0.0.1",
                "-p",
                str(port),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "objects.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
        yield address
    finally:
        end([process])


def _databases() -> list[str]:
    text = (INFRA / "compose/files/databases.sql").read_text()
    return [line.split()[2].rstrip(";") for line in text.splitlines() if line.startswith("CREATE")]


def _write_secrets(found: Composed) -> None:
    done = found.script("make_secrets.sh", found.secrets, ADMIN)
    assert done.returncode == 0, done.stderr
    password = (found.secrets / "postgres_password").read_text().strip()
    theirs, ours = (
        f"consilium:{password}@postgres:5432/consilium",
        found.database.partition("//")[2],
    )
    for path in found.secrets.iterdir():
        path.chmod(0o600)
        path.write_text(path.read_text().replace(theirs, ours))


def _certify(folder: Path) -> Path:
    """Write the proxy's certificate, by an authority that nobody knows; give the authority's."""
    authority, certificate = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    ours = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hospital")])
    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    )
    _write_certificate(folder / "authority.pem", ours, authority, (ours, authority), None)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    _write_certificate(folder / "tls.crt", name, certificate, (ours, authority), names)
    (folder / "tls.key").write_bytes(
        certificate.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return folder / "authority.pem"


def _write_certificate(
    path: Path,
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    by: tuple[x509.Name, ec.EllipticCurvePrivateKey],
    names: x509.SubjectAlternativeName | None,
) -> None:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(by[0])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    path.write_bytes(builder.sign(by[1], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))


def begun(home: Path, *words: str | Path, **given: str) -> subprocess.Popen[str]:
    """Start a command as a person does, in the folder of a party."""
    theirs = ("CONSILIUM_", "MLFLOW_", "PREFECT_", "REQUESTS_CA_BUNDLE")
    ours = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    return subprocess.Popen(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "from flows.cli import main; main()",
            *map(str, words),
        ],
        cwd=home,
        env={**ours, **given},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def consilium(home: Path, *words: str | Path, **given: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does, in the folder of a party."""
    with begun(home, *words, **given) as process:
        told, faults = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, told, faults)


def at_site(found: Composed, home: Path, **given: str) -> Mapping[str, str]:
    """Variables of the container in which a site runs `consilium predict` by the registry."""
    told = {"/data": str(home), "${CONSILIUM_TRACKING_URI:-}": found.address}
    environment = service("site.yaml", "federation")["environment"]
    return {**{k: told.get(v, v) for k, v in environment.items()}, **given}
