from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modalities.files import digest_path, fingerprint, replacing, sweep

if TYPE_CHECKING:
    from pathlib import Path

KILLED = """
import os, signal, sys
from pathlib import Path
from modalities.files import replacing

with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=3), PLAIN, min_size=2))
def test_a_fingerprint_does_not_see_the_order_of_keys(value: dict[str, object]) -> None:
    assert fingerprint(value) == fingerprint(dict(reversed(value.items())))


def test_a_fingerprint_is_that_of_canonical_json() -> None:
    # printf '%s' '{"a":[1,2.5],"b":"x"}' | sha256sum
    expected = "5cefae54a95b31dc660d6cbbb2198f0811fc70ee37b1cc85b1989870cd293ffb"
    assert fingerprint({"b": "x", "a": [1, 2.5]}) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_a_fingerprint_of_no_number_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"value": value})


def test_a_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert digest_path(path) == ("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    with pytest.raises(FileNotFoundError):
        digest_path(tmp_path / "absent")


def test_a_folders_digest_sees_names_and_bytes_and_nothing_else(tmp_path: Path) -> None:
    series = tmp_path / "series"
    (series / "deep").mkdir(parents=True)
    (series / "1.dcm").write_bytes(b"one")
    (series / "deep" / "2.dcm").write_bytes(b"two")
    seen = [digest_path(series)]
    os.utime(series / "1.dcm", (0, 0))
    assert digest_path(series) == seen[0]
    (series / "1.dcm").rename(series / "3.dcm")
    seen.append(digest_path(series))
    (series / "3.dcm").write_bytes(b"0ne")
    seen.append(digest_path(series))
    (series / "3.dcm").unlink()
    seen.append(digest_path(series))
    assert len(set(seen)) == len(seen)
    series.rename(tmp_path / "moved")
    assert digest_path(tmp_path / "moved") == seen[-1]


def test_a_block_that_ends_well_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "table.csv"
    for text in ("old", "new"):
        with replacing(target) as temporary:
            assert temporary.suffix == ".csv"
            temporary.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")

    def fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_leaves_the_old_file_and_sweep_removes_the_rest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "table.csv"
    target.parent.mkdir()
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old"
    assert len(list(target.parent.iterdir())) == 2
    sweep(tmp_path)
    assert list(target.parent.iterdir()) == [target]
