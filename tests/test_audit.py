from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.audit_cli import audit_app
from flows.terminal import UsageError
from fusion.audit import (
    HEAD_SEEN,
    LOG_FILE,
    NOTHING,
    AuditError,
    AuditLog,
    joined_witnesses,
    party_of,
    read_entries,
    verify_log,
    witnesses_of,
)
from fusion.keys import SigningKey, canonical_json, digest, verify

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.border

ROOT = Path(__file__).resolve().parents[1]
KEY, OTHER_KEY = SigningKey(bytes(range(32))), SigningKey(bytes(range(1, 33)))
N = 6


def opened(path: Path, *, party: str = "site-01", key: SigningKey = KEY) -> AuditLog:
    return AuditLog(path, party=party, key=key)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """File of a log with N entries."""
    log = opened(tmp_path / "site-01" / LOG_FILE)
    for number in range(1, N + 1):
        log.append("request", round=number, message="ask_sums", fits=["a", "b"], last=number == N)
    return tmp_path / "site-01" / LOG_FILE


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines()


def rewrite(path: Path, lines: list[bytes]) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in lines))


def fault_of(path: Path, witnesses: dict[int, str] | None = None) -> tuple[int, str] | None:
    found = verify_log(path, public=KEY.public, witnesses=witnesses)
    if found is None:
        return None
    assert found.sentence.startswith(f"entry {found.number} ")
    return found.number, found.fault


def resigned(line: bytes, key: SigningKey = KEY, **changes: Any) -> bytes:
    values = {**json.loads(line), **changes}
    del values["signature"]
    return canonical_json({**values, "signature": key.sign(canonical_json(values)).hex()})


def test_an_entry_is_a_signed_line_that_holds_the_digest_of_the_one_before(path: Path) -> None:
    previous = NOTHING
    for number, line in enumerate(lines_of(path), 1):
        values = json.loads(line)
        signature = bytes.fromhex(values.pop("signature"))
        assert verify(KEY.public, signature, canonical_json(values))
        assert (values["number"], values["previous"]) == (number, previous)
        assert values["about"] == {
            "fits": ["a", "b"], "last": number == N, "message": "ask_sums", "round": number,
        }  # fmt: skip
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", values["at"])
        previous = digest(line)
    assert opened(path).position == (N, previous)
    assert fault_of(path) is None


def test_only_its_owner_may_read_it(path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    opened(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_log_goes_on_where_it_was(path: Path) -> None:
    log = opened(path)
    before = log.head
    head = log.append("reply", code="")
    log.close()
    again = opened(path)
    assert again.head == head
    (entry,) = again.entries(after=N)
    assert (entry.number, entry.kind, entry.previous, entry.head) == (N + 1, "reply", before, head)
    assert again.entries(after=N + 1) == []
    assert again.entries() == read_entries(path)
    assert again.party == party_of(path) == "site-01"


@pytest.mark.parametrize(
    "value",
    ["Patient", "a b", "é", "x" * 101, "a\nb", 1.5, None, ["ok", "NO"], [[1]], {"a": 1}, 2**64,
     b"x", [0] * 1001],
    ids=str,
)  # fmt: skip
def test_free_text_and_numbers_that_may_be_measurements_are_not_logged(
    path: Path, value: Any
) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="audit entry: about: needed"):
        opened(path).append("request", about=value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["Kind", "", "a" * 41, "1st"])
def test_names_are_short_and_lower_case(path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="needed short names"):
        opened(path).append(name)
    with pytest.raises(ValueError, match="party: needed"):
        opened(path, party=name)


@pytest.mark.border
@given(number=st.integers(0, N - 1), at=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_is_an_edited_entry(
    tmp_path_factory: pytest.TempPathFactory, number: int, at: float, mask: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "changed-byte"
    source, copy = folder / LOG_FILE, folder / "copy.jsonl"
    if not source.exists():
        log = opened(source)
        for i in range(N):
            log.append("request", round=i)
    lines = lines_of(source)
    line = bytearray(lines[number])
    line[int(at * len(line))] ^= mask
    lines[number] = bytes(line)
    rewrite(copy, lines)
    assert fault_of(copy) == (number + 1, "edited")


@pytest.mark.border
def test_an_edited_entry_is_named_though_its_chain_was_mended(path: Path) -> None:
    lines, previous = lines_of(path), None
    for at in range(2, N):  # by somebody with another key
        changes = {"about": {"round": 99}} if at == 2 else {"previous": previous}
        lines[at] = resigned(lines[at], OTHER_KEY, **changes)
        previous = digest(lines[at])
    rewrite(path, lines)
    assert fault_of(path) == (3, "edited")


@pytest.mark.border
def test_a_dropped_entry_is_named(path: Path) -> None:
    lines = lines_of(path)
    for at in range(N - 1):
        rewrite(path, lines[:at] + lines[at + 1 :])
        assert fault_of(path) == (at + 1, "dropped")


@pytest.mark.border
def test_two_swapped_entries_are_named(path: Path) -> None:
    lines = lines_of(path)
    for at in range(N - 1):
        rewrite(path, [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]])
        assert fault_of(path) == (at + 1, "reordered")


@pytest.mark.border
def test_an_entry_that_stands_twice_is_named(path: Path) -> None:
    lines = lines_of(path)
    rewrite(path, [*lines[:4], lines[1], *lines[4:]])
    assert fault_of(path) == (2, "reordered")


@pytest.fixture
def forked(path: Path, tmp_path: Path) -> tuple[list[bytes], list[bytes]]:
    """Lines of two continuations of the same four entries."""
    lines = lines_of(path)
    other = tmp_path / "other.jsonl"
    rewrite(other, lines[:4])
    log = opened(other)
    for number in range(5, N + 1):
        log.append("request", round=number, message="another")
    return lines, lines_of(other)


@pytest.mark.border
def test_a_log_with_two_continuations_is_named_where_they_part(
    path: Path, forked: tuple[list[bytes], list[bytes]]
) -> None:
    ours, theirs = forked
    rewrite(path, ours + theirs[4:])  # one after the other
    assert fault_of(path) == (5, "forked")
    rewrite(path, [*ours[:5], theirs[5]])  # the end of one behind the beginning of the other
    assert fault_of(path) == (5, "forked")


@pytest.mark.border
def test_a_continuation_that_another_party_did_not_see_is_named(
    path: Path, forked: tuple[list[bytes], list[bytes]]
) -> None:
    ours, theirs = forked
    seen = {number: digest(ours[number - 1]) for number in (2, 4, 5, 6)}
    assert fault_of(path, seen) is None
    rewrite(path, theirs)
    assert fault_of(path) is None  # whole by itself: its owner signed it all
    assert fault_of(path, seen) == (5, "forked")
    assert fault_of(path, {1: "", **seen}) == (1, "forked")


@pytest.mark.border
def test_a_truncated_log_is_named_by_what_another_party_saw(path: Path) -> None:
    lines = lines_of(path)
    seen = {N: digest(lines[-1])}
    for kept in range(N):
        rewrite(path, lines[:kept])
        assert fault_of(path) is None
        assert fault_of(path, seen) == (kept + 1, "truncated")


@pytest.mark.border
def test_a_log_of_another_party_is_no_log_of_this_one(path: Path) -> None:
    found = verify_log(path, public=OTHER_KEY.public)
    assert found is not None
    assert (found.number, found.fault) == (1, "edited")
    with pytest.raises(AuditError, match=f"entry {N} was signed with another key"):
        opened(path, key=OTHER_KEY)


@pytest.mark.border
@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: [*lines[:2], *lines[3:]],
        lambda lines: [*lines[:2], lines[2].replace(b"ask_sums", b"ask_more"), *lines[3:]],
        lambda lines: [*lines[:2], b"{}", *lines[3:]],
        lambda lines: [*lines[:2], b"[]", *lines[3:]],
        lambda lines: [*lines[:2], b"[" * 100_000, *lines[3:]],
        lambda lines: [*lines[:2], resigned(lines[2], number="3"), *lines[3:]],
        lambda lines: [*lines[:2], resigned(lines[2], number=True), *lines[3:]],
        lambda lines: [*lines[:2], resigned(lines[2], at="now"), *lines[3:]],
        lambda lines: [*lines[:2], resigned(lines[2], party=3), *lines[3:]],
        lambda lines: [*lines[:2], resigned(lines[2], about=[]), *lines[3:]],
        lambda lines: [*lines[:2], resigned(lines[2], previous="0"), *lines[3:]],
        lambda lines: [*lines[:2], lines[2].replace(b'"signature":"', b'"signature":"x'),
                       *lines[3:]],
    ],
)  # fmt: skip
def test_nothing_is_added_to_a_broken_log(
    path: Path, spoil: Callable[[list[bytes]], list[bytes]]
) -> None:
    rewrite(path, spoil(lines_of(path)))
    before = path.read_bytes()
    with pytest.raises(AuditError, match=r"entry [34] does not follow the one before it"):
        opened(path)
    assert path.read_bytes() == before
    found = fault_of(path)
    assert found is not None
    assert found[0] == 3


@pytest.mark.border
@given(kept=st.floats(0, 1, exclude_min=True, exclude_max=True))
@settings(max_examples=30, deadline=None)
def test_a_line_left_half_written_is_dropped_and_that_is_logged(
    tmp_path_factory: pytest.TempPathFactory, kept: float
) -> None:
    path = tmp_path_factory.mktemp("torn") / LOG_FILE
    log = opened(path)
    log.append("request", round=1)
    head = log.append("request", round=2)
    whole = path.stat().st_size
    log.append("request", round=3)
    log.close()
    torn = max(1, int(kept * (path.stat().st_size - whole)))
    os.truncate(path, whole + torn)
    assert fault_of(path, {2: head}) is None
    repaired = opened(path)
    (entry,) = repaired.entries(after=2)
    assert (entry.kind, entry.about, entry.previous) == ("repaired", {"dropped_bytes": torn}, head)
    repaired.append("request", round=3)
    assert fault_of(path) is None


WRITER = """
import sys
from pathlib import Path
from fusion.audit import AuditLog
from fusion.keys import SigningKey
log = AuditLog(Path(sys.argv[1]), party="site-01", key=SigningKey(bytes(range(32))))
for i in range(int(sys.argv[2])):
    print(log.append("request", round=i, writer=sys.argv[3]), flush=True)
"""


def writer(path: Path, n: int, name: str = "one") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(n), name],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.border
def test_what_was_logged_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    with writer(path, 10**9) as process:
        assert process.stdout is not None
        heads = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        heads += [line.strip() for line in process.stdout if line.endswith("\n")]
    log = opened(path)
    found = [entry.head for entry in log.entries() if entry.kind == "request"]
    assert found[: len(heads)] == heads
    log.append("request", round=0)
    assert fault_of(path) is None


@pytest.mark.border
def test_two_processes_and_several_threads_write_one_chain(tmp_path: Path) -> None:
    path = tmp_path / LOG_FILE
    log = opened(path)
    processes = [writer(path, 25, name) for name in ("one", "two")]

    def append() -> None:
        for i in range(25):
            log.append("request", round=i, writer="thread")

    threads = [threading.Thread(target=append) for _ in range(2)]
    for thread in threads:
        thread.start()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    for thread in threads:
        thread.join()
    assert len(log.entries()) == 100
    assert fault_of(path) is None


def test_entries_that_are_added_together_stay_together(path: Path) -> None:
    log, other = opened(path), opened(path)
    with log.held():
        log.append("first")
        thread = threading.Thread(target=other.append, args=("between",))
        thread.start()
        log.append("second")
    thread.join()
    assert [e.kind for e in other.entries(after=N)] == ["first", "second", "between"]


@pytest.mark.border
def test_a_full_disk_leaves_the_log_as_it_was(path: Path) -> None:
    log = opened(path)
    before, head = path.read_bytes(), log.head
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (0, 10, 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room, hard))
            with pytest.raises(OSError, match=r"No space left|File too large"):
                log.append("request", round=7)
            assert path.read_bytes() == before
            assert log.head == head
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append("request", round=7)
    assert fault_of(path) is None


@pytest.mark.border
def test_a_log_that_was_cut_or_replaced_while_in_use_is_noticed(path: Path) -> None:
    log = opened(path)
    whole = path.read_bytes()
    os.truncate(path, len(whole) - len(lines_of(path)[-1]) - 1)
    with pytest.raises(AuditError, match="cut or replaced"):
        log.append("request", round=7)
    path.write_bytes(whole)
    log.append("request", round=7)
    path.rename(path.with_name("aside.jsonl"))
    with pytest.raises(AuditError, match="cut or replaced"):
        log.append("request", round=8)
    path.write_bytes(whole)
    with pytest.raises(AuditError, match="cut or replaced"):
        log.append("request", round=8)


def test_what_others_saw_is_read_from_their_logs(tmp_path: Path, path: Path) -> None:
    heads = [digest(line) for line in lines_of(path)]
    theirs = opened(tmp_path / "theirs.jsonl", party="coordinator", key=OTHER_KEY)
    for number in (2, 5):
        theirs.append(HEAD_SEEN, party="site-01", number=number, head=heads[number - 1])
    theirs.append(HEAD_SEEN, party="site-02", number=1, head=heads[0])
    theirs.append(HEAD_SEEN, party="site-01", number=0, head=NOTHING)
    seen = witnesses_of(tmp_path / "theirs.jsonl", "site-01")
    assert seen == {2: heads[1], 5: heads[4]}
    assert fault_of(path, seen) is None
    # One party that saw two entries of a number, or two that saw one each, prove a fork.
    assert joined_witnesses([seen, {5: heads[0], 6: heads[5]}]) == {**seen, 5: "", 6: heads[5]}
    theirs.append(HEAD_SEEN, party="site-01", number=2, head=heads[2])
    assert fault_of(path, witnesses_of(tmp_path / "theirs.jsonl", "site-01")) == (2, "forked")


@pytest.fixture
def parties(tmp_path: Path, path: Path) -> Path:
    """Folder of a site and a coordinator that saw the site's fourth and last entry."""
    theirs = tmp_path / "coordinator" / LOG_FILE
    log = opened(theirs, party="coordinator", key=OTHER_KEY)
    for number in (4, N):
        head = digest(lines_of(path)[number - 1])
        log.append(HEAD_SEEN, party="site-01", number=number, head=head)
    path.with_name("identity.pub").write_text(KEY.public + "\n")
    theirs.with_name("identity.pub").write_text(OTHER_KEY.public + "\n")
    return tmp_path


def verified(*arguments: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(audit_app, ["verify", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output.strip()


def test_the_command_says_that_a_log_is_whole(parties: Path, path: Path) -> None:
    head = digest(lines_of(path)[-1])
    whole = (0, f"site-01: {N} entries, head {head}, whole")
    assert verified(path) == verified(path.parent) == whole
    path.with_name("identity.pub").unlink()
    assert verified(path, "--public", KEY.public) == whole
    with pytest.raises(UsageError, match=r"found no identity\.pub beside it"):
        verified(path)


@pytest.mark.border
def test_the_command_holds_logs_against_one_another(parties: Path, path: Path) -> None:
    theirs = parties / "coordinator" / LOG_FILE
    status, text = verified("--root", parties)
    assert status == 0
    assert [line.split(" ", 1)[0] for line in text.splitlines()] == ["coordinator:", "site-01:"]
    rewrite(path, lines_of(path)[:5])
    assert verified(path)[0] == 0
    truncated = f"site-01: truncated: entry 6 is missing: another party saw the log up to entry {N}"
    status, text = verified(path, "--against", theirs)
    assert (status, text.splitlines()[0]) == (1, truncated)
    status, text = verified("--root", parties)
    assert (status, text.splitlines()[1]) == (1, truncated)
    rewrite(path, [])
    assert verified("--root", parties)[1].splitlines()[1].startswith("site-01: truncated: entry 1 ")


@pytest.mark.border
def test_a_witness_that_was_edited_itself_counts_for_nothing(parties: Path, path: Path) -> None:
    theirs = parties / "coordinator" / LOG_FILE
    rewrite(theirs, [line.replace(b'"number":4', b'"number":3') for line in lines_of(theirs)])
    status, text = verified(path, "--against", theirs)
    assert status == 1
    assert "site-01: 6 entries" in text
    assert "coordinator: edited: entry 1 " in text


def test_the_command_speaks_json(parties: Path, path: Path) -> None:
    status, text = verified("--root", parties, "--json")
    found = json.loads(text)
    assert (status, found["whole"]) == (0, True)
    assert found["logs"][1] == {
        "party": "site-01", "entries": N, "head": digest(lines_of(path)[-1]), "fault": None,
    }  # fmt: skip
    lines = lines_of(path)
    rewrite(path, lines[:2] + lines[3:])
    status, text = verified("--root", parties, "--json")
    found = json.loads(text)
    assert (status, found["whole"]) == (1, False)
    assert (found["logs"][1]["fault"]["number"], found["logs"][1]["fault"]["fault"]) == (
        3, "dropped",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nowhere.jsonl",), "found no such log"),
        (("--root", "."), "found none in the folder"),
        (("a", "--root", "."), "needed one of them"),
        (("--public", "00"), "need the path of one log"),
    ],
)
def test_the_command_says_what_it_needs(
    arguments: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=text):
        verified(*arguments)
