"""Certificates of kits: warned of before they end, refused after, renewed one by one."""

from __future__ import annotations

import shutil
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from flows import certificates as module
from flows.certificates import (
    WARN_DAYS,
    CertificateExpired,
    certificates_of,
    check_certificates,
    renew_certificate,
)
from flows.cli import _sentence
from flows.federation_cli import federation_app
from flows.parties import _only_one
from fusion.keys import KeyFault, certificate_dates, certificate_expiry
from infra.provision import Keys, ProvisionError, Server, provision, read_party

pytestmark = pytest.mark.border

KEYS = Keys("f" * 64, {"site-a": "a" * 64, "site-b": "b" * 64}, quorum=2)
STARTUPS = {"site-a": "client", "coordinator": "server", "admin": "client"}


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("certificates") / "kits"
    provision("bladder", KEYS, out=out, server=Server("fed.example.org", 9002))
    return out


def certificate(kits: Path, party: str) -> x509.Certificate:
    path = kits / party / "startup" / f"{STARTUPS[party]}.crt"
    return x509.load_pem_x509_certificate(path.read_bytes())


def days_later(kits: Path, days: float) -> datetime:
    """Moment that lies so many days after the end of the site's certificate."""
    return certificate(kits, "site-a").not_valid_after_utc + timedelta(days=days)


def told(kit: Path, now: datetime) -> list[str]:
    said: list[str] = []
    check_certificates(kit, say=said.append, now=now)
    return said


def test_dates_are_those_of_the_certificate(kits: Path) -> None:
    pem = (kits / "site-a" / "startup" / "client.crt").read_bytes()
    found = x509.load_pem_x509_certificate(pem)
    assert certificate_dates(pem) == (found.not_valid_before_utc, found.not_valid_after_utc)
    assert certificate_expiry(pem) == found.not_valid_after_utc
    for faulty in (b"", b"text", pem[:200]):
        with pytest.raises(KeyFault, match="found bytes that are none"):
            certificate_expiry(faulty)


def test_the_authority_outlasts_what_it_signs(kits: Path) -> None:
    own, authority = certificates_of(kits / "site-a")
    assert (own.name, authority.name) == ("certificate", "authority")
    assert 358 <= own.days_left <= 360
    assert 1798 <= authority.days_left <= 1800


def test_nothing_is_said_while_there_is_time(kits: Path) -> None:
    assert told(kits / "site-a", datetime.now(UTC)) == []
    assert told(kits / "site-a", days_later(kits, -WARN_DAYS - 0.5)) == []


@pytest.mark.parametrize(("before", "left"), [(29.5, 29), (1.5, 1), (0.5, 0)])
def test_what_ends_soon_is_said_with_its_remedy(kits: Path, before: float, left: int) -> None:
    (line,) = told(kits / "site-a", days_later(kits, -before))
    assert f"{left} days from now" in line
    assert "`consilium federation renew`" in line


def test_what_has_ended_is_refused(kits: Path) -> None:
    with pytest.raises(CertificateExpired, match="needed one that still does") as fault:
        told(kits / "site-a", days_later(kits, 0.1))
    assert str(kits) not in str(fault.value)
    assert _sentence(fault.value) == str(fault.value)


def test_a_party_is_not_started_with_an_ended_certificate(
    kits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return days_later(kits, 1)

    def fail(*_: object, **__: object) -> int:
        raise AssertionError("it was started")

    monkeypatch.setattr(module, "datetime", Later)
    monkeypatch.setattr("flows.parties.run_party", fail)
    done = CliRunner().invoke(federation_app, ["start", "--kit", str(kits / "site-a")])
    assert isinstance(done.exception, CertificateExpired)


def test_the_command_says_how_long(kits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(federation_app, ["check", "--kit", str(kits / "coordinator")])
    assert done.exit_code == 0, done.output
    assert "certificate: counts until " in done.output
    assert "authority: counts until " in done.output
    monkeypatch.setattr(module, "WARN_DAYS", 10_000)
    done = CliRunner().invoke(federation_app, ["check", "--kit", str(kits / "coordinator")])
    assert done.exit_code == 1
    assert "makes all kits anew" in done.output


def test_a_party_finds_its_own_kit_below_its_folder(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that files for containers and pages for people name no site."""
    home = tmp_path / "data"
    shutil.copytree(kits / "site-a", home / "kits" / "site-a")
    (home / "site.toml").write_text(f'name = "site-a"\nsecret = "{"s" * 40}"\n')
    monkeypatch.chdir(home)
    done = CliRunner().invoke(federation_app, ["check"])
    assert done.exit_code == 0, done.output
    assert "certificate: counts until " in done.output
    with _only_one(home / "kits" / "site-a"):
        assert CliRunner().invoke(federation_app, ["check", "--running"]).exit_code == 0
    started: list[tuple[Path, Path | None]] = []

    def run_party(kit: Path, *, say: object, site_home: Path | None) -> int:
        del say
        started.append((kit, site_home))
        return 0

    monkeypatch.setattr("flows.parties.run_party", run_party)
    monkeypatch.chdir(tmp_path)
    command = ["start", "--site-home", str(home)]
    assert CliRunner().invoke(federation_app, command).exit_code == 0
    assert started == [(home / "kits" / "site-a", home)]
    monkeypatch.chdir(kits.parent)
    assert CliRunner().invoke(federation_app, ["start"]).exit_code == 0
    assert started[1] == (Path("kits/coordinator"), None)


def test_a_health_check_asks_whether_the_party_runs(kits: Path) -> None:
    command = ["check", "--running", "--kit", str(kits / "site-a")]
    assert CliRunner().invoke(federation_app, command).exit_code == 1
    with _only_one(kits / "site-a"):
        assert CliRunner().invoke(federation_app, command).exit_code == 0
    done = CliRunner().invoke(federation_app, command)
    assert (done.exit_code, done.output) == (1, "not running\n")


def test_a_folder_that_is_no_kit_is_named(tmp_path: Path, kits: Path) -> None:
    with pytest.raises(ProvisionError, match="found no kit"):
        certificates_of(tmp_path)
    (tmp_path / "party.json").write_bytes((kits / "site-a" / "party.json").read_bytes())
    with pytest.raises(ProvisionError, match="found no certificate"):
        certificates_of(tmp_path)


@pytest.mark.parametrize("party", ["site-a", "coordinator", "admin"])
def test_a_renewed_certificate_is_another_of_the_same_authority(kits: Path, party: str) -> None:
    before = {name: certificate(kits, name) for name in STARTUPS}
    authority = (kits / party / "startup" / "rootCA.pem").read_bytes()
    rest = sorted(p.name for p in (kits / party / "startup").iterdir())
    startup, first = renew_certificate(kits, party)
    assert startup == kits / party / "startup"
    assert first.days_left >= 358
    after = {name: certificate(kits, name) for name in STARTUPS}
    assert {name for name in STARTUPS if before[name] != after[name]} == {party}
    assert after[party].subject == before[party].subject
    assert after[party].public_key() != before[party].public_key()
    assert (startup / "rootCA.pem").read_bytes() == authority
    assert sorted(p.name for p in startup.iterdir()) == rest
    after[party].verify_directly_issued_by(x509.load_pem_x509_certificate(authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = STARTUPS[party]
    context.load_cert_chain(startup / f"{name}.crt", startup / f"{name}.key")
    assert read_party(kits / party)["name"] == party
    assert {p.stat().st_mode & 0o077 for p in (startup, *startup.iterdir())} == {0}
    assert not list(kits.glob(".*"))


def shake_hands(server: Path, client: Path) -> str:
    """Let two kits meet over mutual TLS; give the name that the server read from the client."""
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(server / "startup/server.crt", server / "startup/server.key")
    accepting.load_verify_locations(server / "startup/rootCA.pem")
    accepting.verify_mode = ssl.CERT_REQUIRED
    asking = ssl.create_default_context(cafile=client / "startup/rootCA.pem")
    asking.load_cert_chain(client / "startup/client.crt", client / "startup/client.key")
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        asking.wrap_bio(back, there, server_hostname="fed.example.org"),
        accepting.wrap_bio(there, back, server_side=True),
    ]
    done: set[int] = set()
    while len(done) < 2:
        for number, side in enumerate(sides):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
                done.add(number)
    subject = dict(pair for (pair,) in sides[1].getpeercert()["subject"])
    return str(subject["commonName"])


def test_parties_meet_whether_renewed_or_not(kits: Path, tmp_path: Path) -> None:
    for name in ("coordinator", "site-a"):
        shutil.copytree(kits / name, tmp_path / name)
        renew_certificate(kits, name)
    for server in (kits, tmp_path):
        for client in (kits, tmp_path):
            assert shake_hands(server / "coordinator", client / "site-a") == "site-a"
    stranger = provision("bladder", KEYS, out=tmp_path / "others", server=Server("fed.example.org"))
    with pytest.raises(ssl.SSLError):
        shake_hands(kits / "coordinator", stranger["site-a"])


def test_a_kit_that_was_sent_away_is_renewed_too(kits: Path, tmp_path: Path) -> None:
    sent = tmp_path / "site-b"
    (kits / "site-b").rename(sent)
    done = CliRunner().invoke(federation_app, ["renew", "site-b", "--kits", str(kits)])
    assert done.exit_code == 0, done.output
    assert [p.name for p in (kits / "site-b").iterdir()] == ["startup"]
    kept = (sent / "startup" / "client.crt").read_bytes()
    assert (kits / "site-b" / "startup" / "client.crt").read_bytes() != kept


def test_what_cannot_be_renewed_is_said_in_one_sentence(kits: Path, tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="found no such party"):
        renew_certificate(kits, "site-z")
    with pytest.raises(ProvisionError, match="found no kit of the coordinator"):
        renew_certificate(tmp_path, "site-a")
    (kits / "authority").rename(tmp_path / "authority")
    try:
        with pytest.raises(ProvisionError, match="authority: found none"):
            renew_certificate(kits, "site-a")
    finally:
        (tmp_path / "authority").rename(kits / "authority")
