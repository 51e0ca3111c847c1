"""The federation engine between real processes: what it carries, and what it must not."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from typer.testing import CliRunner

from flows.federation_cli import federation_app
from flows.parties import start_parties
from fusion.federation.consortium import read_consortium
from fusion.messages import MAX_BYTES, Refused, decode
from infra.provision import CLASSES, CONSORTIUM_FILE, Keys, Server, provision, read_party
from tests.federated import children, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fusion.flare import FlareTransport

pytestmark = pytest.mark.border

SITES = ("site-a", "site-b", "site-c")
TESTS = Path(__file__).parent
TIMEOUT_S = 6.0
_LISTENS = "0A"
STAND_IN = importlib.util.spec_from_file_location("echo_party", TESTS / "echo_party.py")
assert STAND_IN is not None
assert STAND_IN.loader is not None
echo_party = importlib.util.module_from_spec(STAND_IN)
STAND_IN.loader.exec_module(echo_party)


def keys() -> Keys:
    return Keys("f" * 64, {s: f"{i:064x}" for i, s in enumerate(SITES)}, quorum=2)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def descendants(pid: int) -> set[int]:
    """Ids of a process and of all that it started, themselves or through others."""
    return {pid}.union(*(descendants(child) for child in children(pid)))


def listening(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Addresses and ports on which processes listen."""
    links = [link for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir()]
    held = set[str]()
    for link in links:
        with suppress(OSError):  # closed meanwhile
            held.add(str(link.readlink()))
    found = set()
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == _LISTENS and f"socket:[{rest[5]}]" in held:
                host, port = local.split(":")
                words = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                packed = struct.pack(f"={len(words)}I", *words)  # the kernel writes its own order
                found.add((socket.inet_ntop(family, packed), int(port, 16)))
    return found


@dataclass
class Loopback:
    """A coordinator and three sites on this machine; the coordinator's own guards are open."""

    kits: dict[str, Path]
    port: int
    pids: dict[str, int]

    def service(self, party: str) -> int:
        return children(self.pids[party])[0]

    def job(self, party: str) -> int:
        assert eventually(lambda: bool(children(self.service(party))))
        return max(children(self.service(party)))  # an aborted job's may still be there

    def log(self, party: str = "coordinator") -> str:
        files = ("log.txt", "engine.log")
        return "".join((self.kits[party] / name).read_text() for name in files)


def open_guards(kit: Path) -> None:
    """Let a coordinator's server do what an attacker would: sites must refuse by themselves."""
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text())
    path.write_text(json.dumps(resources | {"class_list_enforcement_mode": "warn"}))
    rights = kit / "local" / "authorization.json"
    policy = json.loads(rights.read_text())
    policy["permissions"]["lead"] = dict.fromkeys(policy["permissions"]["lead"], "any")
    rights.write_text(json.dumps(policy))


@pytest.fixture(scope="module")
def loopback() -> Iterator[Loopback]:
    # Not pytest's folder: its name may hold what the engine cannot use.
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        out, port = Path(folder), free_port()
        echo_party.install(out / "party")
        patch.setenv("PYTHONPATH", str(out / "party"))
        kits = provision("engine", keys(), out=out / "kits", server=Server(port=port))
        open_guards(kits["coordinator"])
        with start_parties(kits, logs=out / "logs") as pids:
            yield Loopback(kits, port, pids)


def transport_of(loopback: Loopback) -> FlareTransport:
    from fusion.flare import FlareTransport

    return FlareTransport(
        loopback.kits["admin"], loopback.kits["coordinator"], SITES, timeout_s=TIMEOUT_S
    )


@pytest.fixture(scope="module")
def refusals(loopback: Loopback) -> dict[str, str]:
    """How jobs ended that are not ours to run; before any of ours, as one runs at a time."""
    return {name: submit(loopback, change) for name, change in HOSTILE_JOBS.items()}


@pytest.fixture(scope="module")
def engine(loopback: Loopback, refusals: dict[str, str]) -> Iterator[FlareTransport]:
    assert refusals
    with transport_of(loopback) as opened:
        yield opened


def submit(loopback: Loopback, change: Callable[[Path], None]) -> str:
    from fusion import flare

    name, key = "ab" * 16, b"k" * 32
    with (
        tempfile.TemporaryDirectory() as folder,
        Listener(f"{folder}/relay", "AF_UNIX", authkey=key) as study,
        session_of(loopback) as session,
    ):
        where = loopback.kits["coordinator"] / f"relay-{name}.json"
        where.write_text(json.dumps({"address": f"{folder}/relay", "authkey": key.hex()}))
        held: list[Any] = []  # or the relay would end the job before any site has looked at it
        threading.Thread(target=lambda: held.append(study.accept()), daemon=True).start()
        flare._write_job(Path(folder) / "job", name, SITES)
        change(Path(folder) / "job")
        job = session.submit_job(f"{folder}/job")
        ended = ("FINISHED", "FAILED")
        assert eventually(lambda: str(session.get_job_status(job)).startswith(ended), 60)
        where.unlink()
        return f"{session.get_job_status(job)} {session.get_job_meta(job)}"


@contextmanager
def session_of(loopback: Loopback) -> Iterator[Any]:
    from fusion import flare

    session = flare._open_session(loopback.kits["admin"])
    try:
        yield session
    finally:
        session.close()


def _edit(job: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    path = job / "app" / "config" / name
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


def with_other_class(job: Path) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["components"] = [
            {"id": "x", "path": "subprocess.Popen", "args": {"args": ["touch", str(PLANTED)]}}
        ]

    _edit(job, "config_fed_client.json", edit)


def with_code(job: Path) -> None:
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "sitecustomize.py").write_text(f"open({str(PLANTED)!r}, 'w')")


PLANTED = Path(tempfile.gettempdir()) / f"consilium-planted-{os.getpid()}"
HOSTILE_JOBS = {"another class": with_other_class, "code": with_code}


@pytest.mark.slow
def test_a_site_runs_no_class_but_ours(loopback: Loopback, refusals: dict[str, str]) -> None:
    assert not refusals["another class"].startswith("FINISHED:COMPLETED")
    logs = [f.read_text() for f in loopback.kits["site-a"].glob("*/log.txt")]
    assert any("'subprocess.Popen'" in log and "is not in allow_list" in log for log in logs)
    assert not PLANTED.exists()


@pytest.mark.slow
def test_a_site_runs_no_code_that_a_job_carries(refusals: dict[str, str]) -> None:
    assert refusals["code"].startswith("FINISHED:FAILED_TO_RUN")
    for site in SITES:
        assert re.search(rf"{site}: [^']*BYOC not permitted", refusals["code"])
    assert not PLANTED.exists()


@pytest.mark.slow
def test_requests_reach_the_sites_and_replies_come_back(engine: FlareTransport) -> None:
    assert engine.sites == SITES
    assert engine.ask(b"hello", SITES) == {s: f"{s}:hello".encode() for s in SITES}
    assert engine.ask(b"one", ("site-c",)) == {"site-c": b"site-c:one"}
    assert engine.ask(b"x", ("site-a", "nobody")) == {"site-a": b"site-a:x"}
    assert 0 < engine.echo(8000, SITES) < TIMEOUT_S


@pytest.mark.slow
def test_sites_only_reach_out_and_listen_to_nobody_but_themselves(
    loopback: Loopback, engine: FlareTransport
) -> None:
    assert set(engine.ask(b"x", SITES)) == set(SITES)
    for site in SITES:
        everyone = descendants(loopback.pids[site])
        assert {loopback.service(site), loopback.job(site)} < everyone
        assert {host for host, _ in listening(everyone)} <= {"127.0.0.1", "::1"}
    coordinators = listening(descendants(loopback.pids["coordinator"]))
    assert loopback.port in {port for _, port in coordinators}
    with socket.create_server(("0.0.0.0", 0)) as open_to_all:  # one would be seen
        assert open_to_all.getsockname() in listening([os.getpid()])


@pytest.mark.slow
def test_a_message_as_large_as_may_cross_crosses_and_a_larger_one_does_not(
    engine: FlareTransport,
) -> None:
    from fusion.flare import LARGEST_PAYLOAD

    engine.echo(LARGEST_PAYLOAD, ("site-a",))
    with pytest.raises(ValueError, match=r"found \d+ bytes, needed at most"):
        engine.ask(bytes(LARGEST_PAYLOAD + 1), ("site-a",))
    reply = engine.ask(b"too much", ("site-a",))["site-a"]
    assert decode(reply) == Refused("site_error")


@pytest.mark.slow
def test_a_failing_site_sends_a_code_and_its_log_stays_at_the_site(
    loopback: Loopback, engine: FlareTransport
) -> None:
    replies = engine.ask(b"fail", SITES)
    assert {s: decode(r) for s, r in replies.items()} == dict.fromkeys(SITES, Refused("site_error"))
    marker = echo_party.MARKER.encode()

    def holds_marker(kit: Path) -> bool:
        return any(marker in f.read_bytes() for f in kit.rglob("*") if f.is_file())

    assert eventually(lambda: all(holds_marker(loopback.kits[s]) for s in SITES))
    time.sleep(3)  # the engine's own streaming of logs, were it on, sends within 2 s
    assert not holds_marker(loopback.kits["coordinator"])
    assert not holds_marker(loopback.kits["admin"])


@pytest.mark.slow
def test_the_admin_reads_nothing_at_a_site(loopback: Loopback, engine: FlareTransport) -> None:
    from nvflare.fuel.flare_api.api_spec import AuthorizationError

    assert engine.job is not None
    with session_of(loopback) as session:
        for read in (
            lambda: session.cat_target("site-a", file="log.txt"),
            lambda: session.tail_target_log("site-a"),
            lambda: session.ls_target("site-a"),
            lambda: session.grep_target("site-a", pattern="a", file="log.txt"),
        ):
            with pytest.raises(AuthorizationError):
                read()
        shown = [
            session.show_errors(engine.job, "client", ["site-a"]),
            session.show_stats(engine.job, "client", ["site-a"]),
            session.get_client_env(["site-a"]),
            session.report_resources("client", ["site-a"]),
        ]
    assert echo_party.MARKER not in json.dumps(shown, default=str)
    assert "not authorized" in json.dumps(shown[2:], default=str)


def copied_kit(loopback: Loopback, folder: Path) -> Path:
    """Another kit of the first site, which has not run yet."""
    unused = shutil.ignore_patterns("*.txt", "*.log", "*-*-*")
    return Path(shutil.copytree(loopback.kits["site-a"], folder / "copied", ignore=unused))


@dataclass
class Said:
    """What a party printed, once it has ended."""

    output: str = ""


@contextmanager
def party_of(kit: Path) -> Iterator[Said]:
    """Run a party from a kit, as long as the block lasts."""
    said = Said()
    with subprocess.Popen(
        [sys.executable, "-m", "flows.parties", str(kit)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as party:  # fmt: skip
        try:
            yield said
        finally:
            said.output, _ = party.communicate()


def handshake(loopback: Loopback, certificate: Path | None, key: Path | None = None) -> bytes:
    """What the server says to an HTTP/2 greeting: nothing, to one it does not know."""
    context = ssl.create_default_context(cafile=loopback.kits["site-a"] / "startup" / "rootCA.pem")
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
    with (
        suppress(ssl.SSLError, ConnectionError),
        socket.create_connection(("127.0.0.1", loopback.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as wrapped,
    ):
        wrapped.settimeout(5)
        wrapped.sendall(greeting)
        return wrapped.recv(100)
    return b""


def refused_with(
    loopback: Loopback, reason: str, certificate: Path | None, key: Path | None
) -> None:
    before = loopback.log().count(reason)
    assert handshake(loopback, certificate, key) == b""
    assert eventually(lambda: loopback.log().count(reason) > before, 5)


@pytest.mark.slow
def test_a_known_certificate_is_let_in(loopback: Loopback) -> None:
    startup = loopback.kits["site-a"] / "startup"
    assert handshake(loopback, startup / "client.crt", startup / "client.key")


@pytest.mark.slow
def test_no_certificate_is_refused_and_logged(loopback: Loopback) -> None:
    refused_with(loopback, "PEER_DID_NOT_RETURN_A_CERTIFICATE", None, None)


@pytest.mark.slow
def test_a_certificate_of_another_authority_is_refused_and_logged(
    loopback: Loopback, tmp_path: Path
) -> None:
    other = provision("engine", keys(), out=tmp_path / "kits", server=Server(port=loopback.port))
    startup = other["site-a"] / "startup"
    refused_with(
        loopback, "unable to get local issuer", startup / "client.crt", startup / "client.key"
    )


@pytest.mark.slow
def test_a_site_does_not_speak_to_a_coordinator_of_another_authority(
    loopback: Loopback, tmp_path: Path
) -> None:
    port = free_port()
    theirs = provision("engine", keys(), out=tmp_path / "kits", server=Server(port=port))
    site = copied_kit(loopback, tmp_path)
    settings = site / "startup" / "fed_client.json"
    misled = settings.read_text().replace(f"localhost:{loopback.port}", f"localhost:{port}")
    assert misled != settings.read_text()
    settings.write_text(misled)
    rogue = {"coordinator": theirs["coordinator"]}
    with start_parties(rogue, logs=tmp_path / "logs"), party_of(site) as party:
        log = site / "engine.log"
        refused = "CERTIFICATE_VERIFY_FAILED"
        assert eventually(lambda: log.exists() and refused in log.read_text())
    assert "connected to the coordinator" not in party.output
    heard = "".join(x.read_text() for x in theirs["coordinator"].glob("*log*"))
    assert "New client" not in heard


@pytest.mark.slow
def test_an_expired_certificate_is_refused_and_logged(loopback: Loopback, tmp_path: Path) -> None:
    state = loopback.kits["site-a"].parent / "authority" / "engine" / "state" / "cert.json"
    authority = json.loads(state.read_text())
    signer = serialization.load_pem_private_key(authority["root_pri_key"].encode(), None)
    startup = loopback.kits["site-a"] / "startup"
    valid = x509.load_pem_x509_certificate((startup / "client.crt").read_bytes())
    now = datetime.now(UTC)
    expired = (
        x509.CertificateBuilder()
        .subject_name(valid.subject)
        .issuer_name(valid.issuer)
        .public_key(valid.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=9))
        .not_valid_after(now - timedelta(days=1))
    )
    for extension in valid.extensions:
        expired = expired.add_extension(extension.value, critical=extension.critical)
    certificate = tmp_path / "expired.crt"
    signed = expired.sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    refused_with(loopback, "certificate has expired", certificate, startup / "client.key")


@pytest.mark.slow
def test_another_sites_certificate_under_ones_own_name_is_refused_and_logged(
    loopback: Loopback, tmp_path: Path
) -> None:
    impostor = copied_kit(loopback, tmp_path)
    for name in ("client.crt", "client.key"):
        shutil.copy(loopback.kits["site-b"] / "startup" / name, impostor / "startup" / name)
    said = "authenticated as 'site-b' but claimed endpoint 'site-a'"
    assert said not in loopback.log()
    with party_of(impostor) as party:
        assert eventually(lambda: said in loopback.log())
    assert "connected to the coordinator" not in party.output


@pytest.mark.slow
def test_a_site_that_hangs_is_absent(engine: FlareTransport) -> None:
    begun = time.monotonic()
    assert set(engine.ask(b"hang at site-b", SITES)) == {"site-a", "site-c"}
    assert time.monotonic() - begun < TIMEOUT_S + 5
    engine.resubmit()
    assert set(engine.ask(b"x", SITES)) == set(SITES)


@pytest.mark.slow
def test_a_killed_job_process_of_a_site_leaves_it_absent(
    loopback: Loopback, engine: FlareTransport
) -> None:
    os.kill(loopback.job("site-b"), signal.SIGKILL)
    begun = time.monotonic()
    assert set(engine.ask(b"x", SITES)) == {"site-a", "site-c"}
    assert time.monotonic() - begun < TIMEOUT_S + 5
    assert set(engine.ask(b"x", ("site-a", "site-c"))) == {"site-a", "site-c"}
    engine.resubmit()
    assert set(engine.ask(b"x", SITES)) == set(SITES)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["job", "service"])
def test_a_killed_server_ends_the_job_with_one_sentence_and_a_new_one_begins(
    loopback: Loopback, engine: FlareTransport, victim: str
) -> None:
    from fusion.federation.transport import FederationLost

    os.kill(getattr(loopback, victim)("coordinator"), signal.SIGKILL)

    def ask_on() -> None:
        for _ in range(5):
            engine.ask(b"x", SITES)

    with pytest.raises(FederationLost, match=r"^federation: the server's job process is gone"):
        ask_on()
    engine.resubmit()
    assert set(engine.ask(b"x", SITES)) == set(SITES)


@pytest.mark.slow
def test_a_killed_site_comes_back_for_the_next_job(
    loopback: Loopback, engine: FlareTransport
) -> None:
    service = loopback.service("site-c")
    os.kill(service, signal.SIGKILL)
    assert eventually(lambda: children(loopback.pids["site-c"]) not in ([], [service]))
    assert {"site-a", "site-b"} <= set(engine.ask(b"x", SITES))
    engine.resubmit()
    assert set(engine.ask(b"x", SITES)) == set(SITES)


@pytest.mark.slow
def test_a_job_ends_with_the_process_that_runs_the_study(
    loopback: Loopback, engine: FlareTransport
) -> None:
    job = loopback.job("coordinator")
    engine._hang_up()  # as the system does when the process dies
    assert eventually(lambda: not Path(f"/proc/{job}").exists())


@pytest.mark.slow
def test_a_kit_serves_one_study_at_a_time(loopback: Loopback, engine: FlareTransport) -> None:
    from fusion.federation.transport import FederationLost

    assert engine.sites
    with pytest.raises(FederationLost, match="another study is running"), transport_of(loopback):
        pass


@pytest.mark.slow
def test_a_site_that_was_revoked_takes_no_part_nor_after_the_server_was_started_again(
    loopback: Loopback, engine: FlareTransport
) -> None:
    from fusion.federation.transport import FederationLost

    engine.resubmit()
    kits = loopback.kits["admin"].parent
    done = CliRunner().invoke(federation_app, ["revoke", "site-b", "--kits", str(kits)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("site-b: shut out; give every site the new consortium.json")
    consortium = read_consortium(loopback.kits["coordinator"] / CONSORTIUM_FILE)
    assert consortium.revoked == (keys().sites["site-b"],)
    with pytest.raises(FederationLost):
        engine.ask(b"x", SITES)
    refused = "Reject disabled client registration: site-b"
    for party in ("site-b", "coordinator"):
        before = loopback.log().count(refused)
        os.kill(loopback.service(party), signal.SIGKILL)  # a service is started again
        assert eventually(lambda before=before: loopback.log().count(refused) > before, 60)
        assert eventually(lambda: connected(loopback) == {"site-a", "site-c"}, 60)


def connected(loopback: Loopback) -> set[str]:
    """Sites that the server knows now; none while it is not there."""
    try:
        with session_of(loopback) as session:
            return {client.name for client in session.get_connected_client_list()}
    except Exception:  # noqa: BLE001  (whatever the engine raises where nobody answers)
        return set()


def test_kits_name_the_classes_that_there_are_and_no_limit_is_below_a_message() -> None:
    from fusion import flare

    named = {f"{c.__module__}.{c.__name__}" for c in (flare.CoordinatorRelay, flare.SiteExecutor)}
    assert named == set(CLASSES)
    assert flare.LARGEST_PAYLOAD == MAX_BYTES + 64 * 1024 == echo_party.LARGEST


def test_nothing_that_crosses_is_pickled() -> None:
    import nvflare

    from fusion import flare

    assert nvflare.__file__ is not None
    package = Path(nvflare.__file__).parent
    carriers = [
        f
        for part in ("apis", "fuel/f3", "fuel/utils/fobs", "fuel/hci", "private")
        for f in (package / part).rglob("*.py")
    ]
    assert len(carriers) > 100
    imports = re.compile(r"^\s*(import|from) (pickle|dill|cloudpickle|marshal|shelve)\b", re.M)
    assert not [f.name for f in carriers if imports.search(f.read_text())]
    # A connection pickles in send and recv, and only there.
    assert not re.search(r"\.(send|recv)\(", inspect.getsource(flare))


def test_a_job_is_two_files_of_settings(tmp_path: Path) -> None:
    from fusion import flare

    flare._write_job(tmp_path / "job", "ab" * 16, SITES)
    files = {f.relative_to(tmp_path / "job").as_posix() for f in tmp_path.rglob("*") if f.is_file()}
    config = "app/config/config_fed_"
    assert files == {"meta.json", f"{config}server.json", f"{config}client.json"}


@pytest.mark.parametrize("relay", ["../../etc/passwd", "", "relay"])
def test_a_relay_reads_no_file_but_its_own(relay: str) -> None:
    from fusion import flare

    with pytest.raises(ValueError, match="invalid literal"):
        flare.CoordinatorRelay(relay)


def test_no_server_is_one_clear_sentence(tmp_path: Path) -> None:
    from fusion.federation.transport import FederationLost
    from fusion.flare import FlareTransport

    kits = provision("engine", keys(), out=tmp_path / "kits", server=Server(port=free_port()))
    assert read_party(kits["admin"])["name"] == "admin"
    with (
        pytest.raises(FederationLost, match="found no server that answers"),
        FlareTransport(
            kits["admin"], kits["coordinator"], SITES, timeout_s=1.0, start_timeout_s=0.5
        ),
    ):
        pass
