from __future__ import annotations

import subprocess
import sys

import pytest

from flows import progress
from flows.progress import Progress

CODE = """
import sys
from flows.progress import Progress
with Progress("check", total=2) as bar:
    bar.advance(2)
assert "prefect" not in sys.modules
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    found: list[object] = []
    monkeypatch.setattr(progress, "_create_artifact", lambda label: found.append(label) or label)
    monkeypatch.setattr(progress, "_update_artifact", lambda _, percent: found.append(percent))
    return found


def test_progress_counts_to_a_hundred(told: list[object]) -> None:
    with Progress("site-01: extract", total=4) as bar:
        for n in (1, 0, 3):
            bar.advance(n)
    assert told == ["site-01: extract", 25.0, 25.0, 100.0]


def test_work_of_unknown_size_shows_nothing(told: list[object]) -> None:
    with Progress("extract", total=0) as bar:
        bar.advance(1)
    assert told == []


def test_an_exception_passes_through(told: list[object]) -> None:
    def fail() -> None:
        with Progress("extract", total=1):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()


def test_without_a_flow_prefect_is_not_imported() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
