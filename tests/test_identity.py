"""A party's signing key: made once, where the party is, for nobody else's eyes."""

from __future__ import annotations

import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flows.identity import KEY_FILE, PUBLIC_FILE, identity, public_key
from fusion.keys import KeyFault, verify

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "site-01"


def test_a_key_is_made_once_and_stays(home: Path) -> None:
    assert public_key(home) is None
    first = identity(home)
    assert identity(home).to_bytes() == first.to_bytes() == (home / KEY_FILE).read_bytes()
    assert verify(first.public, identity(home).sign(b"text"), b"text")
    assert sorted(x.name for x in home.iterdir()) == [KEY_FILE, PUBLIC_FILE]


def test_two_parties_have_two_keys(tmp_path: Path) -> None:
    assert identity(tmp_path / "a").public != identity(tmp_path / "b").public


@pytest.mark.border
def test_only_the_owner_may_read_the_key(home: Path) -> None:
    identity(home)
    assert stat.S_IMODE((home / KEY_FILE).stat().st_mode) == 0o600


@pytest.mark.border
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_that_others_may_touch_is_not_used(home: Path, mode: int) -> None:
    kept = identity(home).to_bytes()
    (home / KEY_FILE).chmod(mode)
    with pytest.raises(KeyFault, match="needed mode 600") as fault:
        identity(home)
    assert kept.hex() not in str(fault.value)
    assert str(home) not in str(fault.value)
    assert (home / KEY_FILE).read_bytes() == kept


@pytest.mark.border
@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 33, b"6b" * 32])
def test_a_damaged_key_is_never_replaced_by_a_new_one(home: Path, content: bytes) -> None:
    identity(home)
    (home / KEY_FILE).write_bytes(content)
    with pytest.raises(KeyFault, match=f"found {len(content)} bytes, needed 32"):
        identity(home)
    assert (home / KEY_FILE).read_bytes() == content


@pytest.mark.parametrize("content", [None, "", "0" * 64 + "\n", "elsewhere"])
def test_the_public_half_is_always_that_of_the_key(home: Path, content: str | None) -> None:
    key = identity(home)
    assert (home / PUBLIC_FILE).read_text() == key.public + "\n"
    if content is None:
        (home / PUBLIC_FILE).unlink()
    else:
        (home / PUBLIC_FILE).write_text(content)
    assert identity(home).public == key.public == public_key(home)


@pytest.mark.border
def test_of_processes_that_race_all_have_the_same_key(home: Path) -> None:
    script = (
        "import sys, time, pathlib; from flows.identity import identity; print(flush=True)\n"
        "time.sleep(max(0, float(sys.stdin.readline()) - time.time()))\n"
        "print(identity(pathlib.Path(sys.argv[1])).public)"
    )
    command = [sys.executable, "-c", script, str(home)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racing = [subprocess.Popen(command, **pipes) for _ in range(3)]  # type: ignore[call-overload]
    for process in racing:
        process.stdout.readline()  # everything is imported
    found = {process.communicate("0\n", timeout=60)[0].strip() for process in racing}
    assert found == {public_key(home)}
    assert sorted(x.name for x in home.iterdir()) == [KEY_FILE, PUBLIC_FILE]


def test_a_disk_that_fails_leaves_no_half_a_key(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("flows.identity.os.fsync", fails)
        with pytest.raises(OSError, match="full"):
            identity(home)
    assert list(home.iterdir()) == []
    assert identity(home).public == public_key(home)
