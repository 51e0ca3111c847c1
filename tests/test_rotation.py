"""A party's new key: its log goes on, its old signatures count no more; a site that leaves."""

from __future__ import annotations

import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from flows import identity as module
from flows.approvals import Statement, approve, check_approvals
from flows.federation_cli import federation_app
from flows.identity import KEY_FILE, NEXT_FILE, former_keys, identity, public_key, rotate
from flows.site_cli import site_app
from fusion.audit import (
    KEY_CHANGED,
    KEY_TAKEN,
    LOG_FILE,
    AuditError,
    AuditLog,
    read_entries,
    verify_log,
)
from fusion.federation.consortium import COORDINATOR, Consortium, read_consortium
from fusion.keys import KeyFault, SigningKey
from infra.provision import Keys, ProvisionError, consortium_bytes, rekey, revoke

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.border

SITES = ("site-a", "site-b", "site-c")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    identity(tmp_path)
    return tmp_path


def log_of(home: Path, *, key: SigningKey | None = None, party: str = "site-a") -> AuditLog:
    return AuditLog(home / LOG_FILE, party=party, key=key or identity(home))


def write(home: Path, *kinds: str) -> None:
    log = log_of(home)
    for kind in kinds:
        log.append(kind)
    log.close()


def test_a_new_key_takes_the_place_of_the_old_one(home: Path) -> None:
    old = identity(home)
    done = rotate(home, party="site-a")
    assert (done.old, done.new) == (old.public, identity(home).public)
    assert public_key(home) == done.new != done.old
    assert former_keys(home) == (done.old,)
    assert stat.S_IMODE((home / KEY_FILE).stat().st_mode) == 0o600
    assert old.to_bytes() not in b"".join(p.read_bytes() for p in home.iterdir())


def test_each_former_key_is_kept_once(home: Path) -> None:
    first = rotate(home, party="site-a")
    second = rotate(home, party="site-a")
    assert set(former_keys(home)) == {first.old, second.old}
    assert second.old == first.new


def test_a_party_without_a_key_has_none_to_replace(tmp_path: Path) -> None:
    with pytest.raises(KeyFault, match="found none to replace"):
        rotate(tmp_path, party="site-a")
    assert not list(tmp_path.iterdir())


def test_the_log_goes_on_under_the_new_key(home: Path) -> None:
    write(home, "one", "two")
    heads = {entry.number: entry.head for entry in read_entries(home / LOG_FILE)}
    rotate(home, party="site-a")
    write(home, "three")
    rotate(home, party="site-a")
    write(home, "four")
    entries = read_entries(home / LOG_FILE)
    kinds = [entry.kind for entry in entries]
    changed = ["key_changed", "key_taken"]
    assert kinds == ["one", "two", *changed, "three", *changed, "four"]
    public = identity(home).public
    assert verify_log(home / LOG_FILE, public=public, witnesses=heads) is None


def test_only_the_last_key_vouches_for_a_log(home: Path) -> None:
    write(home, "one")
    done = rotate(home, party="site-a")
    write(home, "two")
    fault = verify_log(home / LOG_FILE, public=done.old)
    assert fault is not None
    assert (fault.fault, fault.number) == ("edited", 3)


@pytest.mark.parametrize(("number", "named"), [(1, 1), (2, 1), (3, 3), (4, 4)])
def test_an_edited_line_is_found_on_either_side_of_the_change(
    home: Path, number: int, named: int
) -> None:
    """Without the line of the change, the second one, nothing vouches for what came before it."""
    write(home, "one")
    rotate(home, party="site-a")
    write(home, "two")
    lines = (home / LOG_FILE).read_bytes().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(b'"number"', b'"nunber"')
    (home / LOG_FILE).write_bytes(b"".join(lines))
    fault = verify_log(home / LOG_FILE, public=identity(home).public)
    assert fault is not None
    assert (fault.fault, fault.number) == ("edited", named)


def test_the_new_key_cannot_write_what_came_before_it(home: Path) -> None:
    """Whoever steals only the new key cannot rewrite the past, which the old key signed."""
    write(home, "one")
    rotate(home, party="site-a")
    whole = (home / LOG_FILE).read_bytes().splitlines(keepends=True)
    (home / LOG_FILE).unlink()
    write(home, "one")
    forged = (home / LOG_FILE).read_bytes()
    (home / LOG_FILE).write_bytes(forged + b"".join(whole[1:]))
    fault = verify_log(home / LOG_FILE, public=identity(home).public)
    assert fault is not None


@pytest.mark.parametrize("stolen", ["nobody's", "former"])
def test_a_log_that_only_says_it_was_handed_over_is_not_the_partys(
    home: Path, tmp_path: Path, stolen: str
) -> None:
    """Whoever has any other key can write a log that ends with a change to the party's own."""
    former = identity(home)
    rotate(home, party="site-a")
    key = SigningKey.generate() if stolen == "nobody's" else former
    forged = tmp_path / "forged.jsonl"
    log = AuditLog(forged, party="site-a", key=key)
    log.append("fitted")
    log.append(KEY_CHANGED, old=key.public, new=identity(home).public)
    log.close()
    fault = verify_log(forged, public=identity(home).public)
    assert fault is not None
    assert fault.fault == "edited"


def test_a_party_that_runs_on_with_the_old_key_cannot_add(home: Path) -> None:
    running = log_of(home)
    running.append("one")
    rotate(home, party="site-a")
    with pytest.raises(AuditError, match="key was changed while it ran"):
        running.append("two")
    assert verify_log(home / LOG_FILE, public=identity(home).public) is None


@pytest.mark.parametrize("at", ["_hand_over", "_keep_public"])
def test_a_change_that_was_cut_off_goes_on(
    home: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home, "one")
    old = identity(home).public
    real = getattr(module, at)

    def cut(*arguments: object) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, at, cut)
        with pytest.raises(KeyboardInterrupt):
            rotate(home, party="site-a")
    waiting = (home / NEXT_FILE).read_bytes()
    done = rotate(home, party="site-a")
    assert done.old == old
    assert identity(home).to_bytes() == waiting
    assert former_keys(home) == (old,)
    write(home, "two")
    kinds = [entry.kind for entry in read_entries(home / LOG_FILE)]
    assert kinds == ["one", "key_changed", "key_taken", "two"]
    assert verify_log(home / LOG_FILE, public=done.new) is None


def test_a_change_cut_between_its_two_entries_goes_on(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home, "one")
    real = AuditLog._write

    def cut(log: AuditLog, kind: str, about: dict[str, Any]) -> None:
        if kind == KEY_TAKEN:
            raise KeyboardInterrupt
        real(log, kind, about)

    with monkeypatch.context() as patched:
        patched.setattr(AuditLog, "_write", cut)
        with pytest.raises(KeyboardInterrupt):
            rotate(home, party="site-a")
    assert [entry.kind for entry in read_entries(home / LOG_FILE)] == ["one", KEY_CHANGED]
    assert verify_log(home / LOG_FILE, public=identity(home).public) is None
    done = rotate(home, party="site-a")
    assert verify_log(home / LOG_FILE, public=done.new) is None


class Parties:
    """Three sites and a coordinator with keys, and the kits that list them."""

    def __init__(self, root: Path) -> None:
        self.root, self.kits = root, root / "kits"
        self.homes = {name: root / name for name in (*SITES, COORDINATOR)}
        keys = {name: identity(home).public for name, home in self.homes.items()}
        coordinator = keys.pop(COORDINATOR)
        for name in (*SITES, COORDINATOR, "admin"):
            (self.kits / name).mkdir(parents=True)
            (self.kits / name / "consortium.json").write_bytes(
                consortium_bytes("bladder", Keys(coordinator, keys, quorum=3))
            )

    @property
    def consortium(self) -> Consortium:
        found = {read_consortium(f).to_bytes() for f in self.kits.glob("*/consortium.json")}
        assert len(found) == 1
        return read_consortium(self.kits / "site-a" / "consortium.json")

    def statement(self) -> Statement:
        digest = "0" * 64
        return Statement("bladder", digest, digest, self.consortium.digest(), digest)

    def refusal(self, keys: dict[str, SigningKey], site: str = "site-a") -> str | None:
        statement = self.statement()
        found = [approve(statement, name, key) for name, key in keys.items()]
        return check_approvals(statement, found, site=site, consortium=self.consortium)

    def present(self) -> dict[str, SigningKey]:
        return {name: identity(self.homes[name]) for name in SITES}


@pytest.fixture
def parties(tmp_path: Path) -> Parties:
    return Parties(tmp_path)


def test_after_rekey_the_old_signature_is_refused_and_the_new_one_accepted(
    parties: Parties,
) -> None:
    before, old = parties.consortium, identity(parties.homes["site-b"])
    assert parties.refusal(parties.present()) is None
    new = rotate(parties.homes["site-b"], party="site-b").new
    rekey(parties.kits, "site-b", new)
    after = parties.consortium
    assert (after.sites["site-b"], after.revoked) == (new, (old.public,))
    assert after.digest() != before.digest()
    assert parties.refusal(parties.present()) is None
    assert parties.refusal({**parties.present(), "site-b": old}) == "not_approved"


def test_the_command_takes_the_file_that_the_site_sends(parties: Parties) -> None:
    new = rotate(parties.homes["site-b"], party="site-b").new
    pub = parties.homes["site-b"] / "identity.pub"
    command = ["rekey", "site-b", "--pub", str(pub), "--kits", str(parties.kits)]
    done = CliRunner().invoke(federation_app, command)
    assert done.exit_code == 0, done.output
    assert "approves the study again" in done.output
    assert parties.consortium.sites["site-b"] == new
    assert isinstance(CliRunner().invoke(federation_app, command).exception, ProvisionError)


def test_the_coordinator_changes_its_own_key(parties: Parties) -> None:
    old = parties.consortium.coordinator
    command = ["rekey", COORDINATOR, "--kits", str(parties.kits), "--root", str(parties.root)]
    done = CliRunner().invoke(federation_app, command)
    assert done.exit_code == 0, done.output
    assert parties.consortium.coordinator == public_key(parties.homes[COORDINATOR]) != old
    assert parties.consortium.revoked == (old,)


def test_the_coordinator_keeps_its_key_where_there_are_no_kits(parties: Parties) -> None:
    old = public_key(parties.homes[COORDINATOR])
    command = ["rekey", COORDINATOR, "--kits", str(parties.root / "none"), "--root"]
    done = CliRunner().invoke(federation_app, [*command, str(parties.root)])
    assert isinstance(done.exception, ProvisionError)
    assert public_key(parties.homes[COORDINATOR]) == old


def test_a_key_that_cannot_be_put_in_place_is_named(parties: Parties) -> None:
    known = parties.consortium
    for party, key, message in (
        ("site-b", known.sites["site-b"], "found its present key"),
        ("site-b", known.sites["site-c"], "another party has"),
        ("site-b", "key", "needed 64 hex digits"),
        ("site-z", "a" * 64, "no such site"),
    ):
        with pytest.raises(ProvisionError, match=message):
            rekey(parties.kits, party, key)
    assert parties.consortium == known
    asked = CliRunner().invoke(federation_app, ["rekey", "site-b", "--kits", str(parties.kits)])
    assert "needed --pub" in str(asked.exception)


def test_a_site_that_is_shut_out_counts_no_more_and_the_others_go_on(parties: Parties) -> None:
    keys = parties.present()
    revoke(parties.kits, "site-c")
    after = parties.consortium
    assert not after.knows("site-c")
    assert after.quorum == 2  # three could never be reached again
    assert parties.refusal(keys, "site-c") == "not_approved"
    assert parties.refusal({name: keys[name] for name in ("site-a", "site-b")}) is None
    assert parties.refusal({name: keys[name] for name in ("site-a", "site-c")}) == "not_approved"
    with pytest.raises(ProvisionError, match="found the coordinator"):
        revoke(parties.kits, COORDINATOR)


def test_a_site_that_was_shut_out_comes_back_with_a_new_key_only(parties: Parties) -> None:
    revoked = parties.consortium.sites["site-c"]
    revoke(parties.kits, "site-c")
    with pytest.raises(ProvisionError, match="present key"):
        rekey(parties.kits, "site-c", revoked)
    rekey(parties.kits, "site-c", rotate(parties.homes["site-c"], party="site-c").new)
    assert parties.consortium.knows("site-c")
    assert parties.consortium.revoked == (revoked,)


def test_a_statement_of_the_old_consortium_is_refused(parties: Parties) -> None:
    statement = parties.statement()
    revoke(parties.kits, "site-c")
    approvals = [approve(statement, name, key) for name, key in parties.present().items()]
    now = replace(statement, consortium=parties.consortium.digest())
    for one in (statement, now):
        found = check_approvals(one, approvals, site="site-a", consortium=parties.consortium)
        assert found == "not_approved"


def test_a_site_changes_its_key_by_command(tmp_path: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(site_app, ["init", "site-a", "--root", str(tmp_path)]).exit_code == 0
    assert runner.invoke(site_app, ["key", "--root", str(tmp_path)]).exit_code == 0
    old = public_key(tmp_path)
    done = runner.invoke(site_app, ["key", "--rotate", "--root", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert public_key(tmp_path) != old
    assert former_keys(tmp_path) == (old,)
