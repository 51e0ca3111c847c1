"""Start-up kits: who may read them, what an engine may do from them, whose keys they name."""

from __future__ import annotations

import json
import stat
from datetime import timedelta
from importlib.resources import files
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from typer.testing import CliRunner

from flows.federation_cli import federation_app
from fusion.federation.consortium import Consortium, read_consortium
from infra.provision import (
    CLASSES,
    Keys,
    ProvisionError,
    Server,
    consortium_bytes,
    provision,
    read_party,
    revoke,
    set_home,
    settle,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.border

COORDINATOR_KEY = "f" * 64
SITE_KEYS = {"site-a": "a" * 64, "site-b": "b" * 64}
KEYS = Keys(COORDINATOR_KEY, SITE_KEYS, quorum=2)


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("provisioned") / "kits"
    return provision(
        "bladder", KEYS, out=out, server=Server("fed.example.org", 9002),
        homes={"site-a": out.parent}, valid_days=30,
    )  # fmt: skip


def resources(kit: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((kit / "local" / "resources.json").read_text())
    return found


def test_there_is_a_kit_for_each_party(kits: dict[str, Path]) -> None:
    assert set(kits) == {"site-a", "site-b", "coordinator", "admin"}
    assert {read_party(kit)["name"] for kit in kits.values()} == set(kits)
    assert read_party(kits["site-a"])["home"] == str(kits["site-a"].parents[1])
    assert read_party(kits["site-b"])["home"] is None


def test_only_the_owner_reads_a_kit(kits: dict[str, Path]) -> None:
    folder = kits["admin"].parent
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)


def test_no_kit_holds_the_key_that_signs_certificates(kits: dict[str, Path]) -> None:
    state = json.loads(next(kits["admin"].parent.glob("authority/**/cert.json")).read_text())
    secret = "".join(state["root_pri_key"].split("\n")[1:3])
    assert len(secret) > 100
    for kit in kits.values():
        for file in (f for f in kit.rglob("*") if f.is_file()):
            assert secret not in file.read_text().replace("\n", "")


@pytest.mark.parametrize("party", ["site-a", "coordinator"])
def test_a_job_may_name_our_two_classes_only(kits: dict[str, Path], party: str) -> None:
    found = resources(kits[party])
    assert found["class_list_enforcement_mode"] == "enforce"
    assert found["class_allow_list"] == list(CLASSES)


@pytest.mark.parametrize("party", ["site-a", "coordinator"])
def test_no_log_is_streamed(kits: dict[str, Path], party: str) -> None:
    found = resources(kits[party])
    assert found["allow_log_streaming"] is False
    assert "logging" not in json.dumps(found["components"])


def test_sites_give_the_admin_no_right_but_to_begin_and_end_a_job(kits: dict[str, Path]) -> None:
    policy = json.loads((kits["site-a"] / "local" / "authorization.json").read_text())
    (rights,) = policy["permissions"].values()
    assert {name for name, who in rights.items() if who != "none"} == {"submit_job", "manage_job"}
    assert {"byoc", "shell_commands", "download_job", "view", "operate"} <= set(rights)


def test_a_job_must_be_signed(kits: dict[str, Path]) -> None:
    for party, name in (("site-a", "fed_client.json"), ("coordinator", "fed_server.json")):
        startup = json.loads((kits[party] / "startup" / name).read_text())
        assert startup["require_signed_jobs"] is True
        assert "mtls" in json.dumps(startup)


def test_sites_know_one_address_and_it_is_in_the_servers_certificate(
    kits: dict[str, Path],
) -> None:
    client = json.loads((kits["site-a"] / "startup" / "fed_client.json").read_text())
    assert client["servers"][0]["service"]["target"] == "fed.example.org:9002"
    crt = (kits["coordinator"] / "startup" / "server.crt").read_bytes()
    names = x509.load_pem_x509_certificate(crt).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "fed.example.org" in names.value.get_values_for_type(x509.DNSName)


def test_certificates_expire_when_asked(kits: dict[str, Path]) -> None:
    crt = (kits["site-a"] / "startup" / "client.crt").read_bytes()
    valid = x509.load_pem_x509_certificate(crt)
    assert valid.not_valid_after_utc - valid.not_valid_before_utc <= timedelta(days=30)


def test_every_kit_holds_the_same_consortium_as_the_federation_writes_it(
    kits: dict[str, Path],
) -> None:
    expected = Consortium("bladder", COORDINATOR_KEY, SITE_KEYS, quorum=2)
    assert consortium_bytes("bladder", KEYS) == expected.to_bytes()
    for kit in kits.values():
        assert read_consortium(kit / "consortium.json") == expected


def test_stores_are_inside_the_kit(kits: dict[str, Path]) -> None:
    assert "/tmp/nvflare" in json.dumps(resources(kits["coordinator"]))
    settle(kits["coordinator"])
    text = json.dumps(resources(kits["coordinator"]))
    assert "/tmp/nvflare" not in text
    assert text.count(f"{kits['coordinator']}/store/") == 2


def test_a_site_can_be_added_and_a_kit_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "kits"
    first = provision("bladder", KEYS, out=out)
    authority = (first["site-a"] / "startup" / "rootCA.pem").read_bytes()
    with pytest.raises(ProvisionError, match="site-a: found a kit, needed none"):
        provision("bladder", KEYS, out=out)
    for name in ("site-a", "site-b", "coordinator", "admin"):
        (out / name).rename(tmp_path / name)
    grown = Keys(COORDINATOR_KEY, {**SITE_KEYS, "site-c": "c" * 64}, quorum=2)
    second = provision("bladder", grown, out=out)
    assert (second["site-c"] / "startup" / "rootCA.pem").read_bytes() == authority
    kept = (tmp_path / "site-a" / "startup" / "client.crt").read_bytes()
    assert (second["site-a"] / "startup" / "client.crt").read_bytes() == kept


def test_a_revoked_key_is_in_every_consortium_file_here(tmp_path: Path) -> None:
    for name in ("coordinator", "admin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "consortium.json").write_bytes(consortium_bytes("bladder", KEYS))
    revoke(tmp_path, "site-b")
    for name in ("coordinator", "admin"):
        found = read_consortium(tmp_path / name / "consortium.json")
        assert found.knows("site-a")
        assert not found.knows("site-b")
    with pytest.raises(ProvisionError, match="no such site"):
        revoke(tmp_path, "site-z")


@pytest.mark.parametrize(
    ("study", "sites", "server", "message"),
    [
        ("Bladder", SITE_KEYS, Server(), "name: found 'Bladder'"),
        ("bladder", {"site-a": "a" * 64, "B/..": "b" * 64}, Server(), "name: found 'B/..'"),
        ("bladder", {"site-a": "a" * 64}, Server(), "sites: found 1, needed at least 2"),
        ("bladder", {**SITE_KEYS, "admin": "d" * 64}, Server(), "names another party"),
        ("bladder", SITE_KEYS, Server("a b"), "host: found 'a b'"),
        ("bladder", SITE_KEYS, Server(port=0), "port: found 0"),
    ],
)
def test_what_cannot_be_provisioned_is_said_in_one_sentence(
    tmp_path: Path, study: str, sites: dict[str, str], server: Server, message: str
) -> None:
    with pytest.raises(ProvisionError, match=message):
        provision(study, Keys(COORDINATOR_KEY, sites, quorum=1), out=tmp_path, server=server)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_kit_is_named(tmp_path: Path) -> None:
    for faulty in (None, "{", '{"name": 1, "home": null}', "[]"):
        if faulty is not None:
            (tmp_path / "party.json").write_text(faulty)
        with pytest.raises(ProvisionError, match="found no kit in the folder"):
            set_home(tmp_path, tmp_path)


def test_a_path_that_the_engine_would_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="a path with a space"):
        settle(tmp_path / "my kits")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    template = files("flows").joinpath("templates", "study.toml")
    (tmp_path / "study.toml").write_text(
        template.read_text().format(name="bladder", sums="plain", epsilon=0)
    )
    return tmp_path / "study.toml"


def test_a_site_without_a_key_is_asked_for_it(study: Path) -> None:
    asked = CliRunner().invoke(federation_app, ["provision", str(study), "--sites", "north,south"])
    assert isinstance(asked.exception, ProvisionError)
    assert "north: found no public key" in str(asked.exception)
    assert "`consilium site key`" in str(asked.exception)


def test_the_command_takes_the_keys_that_sites_sent(study: Path) -> None:
    sent, out = study.parent / "sent", study.parent / "kits"
    sent.mkdir()
    for name, key in (("north", "a" * 64), ("south", "b" * 64)):
        (sent / f"{name}.pub").write_text(key + "\n")
    command = ["provision", str(study), "--sites", "north,south", "--out", str(out)]
    done = CliRunner().invoke(federation_app, [*command, "--keys", str(sent)])
    assert done.exit_code == 0, done.output
    found = read_consortium(out / "north" / "consortium.json")
    assert dict(found.sites) == {"north": "a" * 64, "south": "b" * 64}
    assert found.quorum == 2
    assert found.coordinator == (study.parent / "coordinator" / "identity.pub").read_text().strip()


def test_a_faulty_key_or_quorum_is_said_in_one_sentence(study: Path) -> None:
    (study.parent / "north.pub").write_text("key")
    command = ["provision", str(study), "--sites", "north", "--keys", str(study.parent)]
    assert "north.pub: found no public key" in str(
        CliRunner().invoke(federation_app, command).exception
    )
    assert "--quorum: found 3" in str(
        CliRunner().invoke(federation_app, [*command, "--quorum", "3"]).exception
    )
