"""Two processes that prepare or train one site take turns, and a killed one holds nobody up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flows.site import prepare_site, train_site
from flows.site_turns import turn
from infra.settings import Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pytest

# Reads a number, and writes the next one: what is read meanwhile by another is lost.
COUNTING = """
import os, sys, time
from pathlib import Path
from flows.site_turns import turn
from infra.settings import Workspace

settings = Workspace().site("site-01")
for _ in range(int(sys.argv[1])):
    with turn(settings):
        number = int(settings.path("number").read_text())
        time.sleep(0.002)
        settings.path("number").write_text(str(number + 1))
"""
HOLDING = """
import sys, time
from flows.site_turns import turn
from infra.settings import Workspace

with turn(Workspace().site("site-01")):
    print("at work", flush=True)
    time.sleep(600)
"""
WAITING = (
    "site-01: found another process that prepares or trains this site; waiting for it to end\n"
)


def process(root: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "CONSILIUM_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextmanager
def at_work(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has its turn at the site, for longer than any test takes."""
    with process(root, HOLDING) as holding:
        try:
            assert holding.stdout is not None
            assert holding.stdout.readline() == "at work\n"
            yield holding
        finally:
            holding.kill()


def a_site(root: Path) -> Path:
    (root / "site.toml").write_text(f'name = "site-01"\nsecret = "{"s" * 40}"\n')
    return root


def test_what_two_processes_write_in_turns_is_all_there(tmp_path: Path) -> None:
    root = a_site(tmp_path)
    (root / "number").write_text("0")
    both = [process(root, COUNTING, "100") for _ in range(2)]
    told = [one.communicate(timeout=60)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    assert (root / "number").read_text() == "200"
    assert set("".join(told).splitlines()) <= {WAITING.strip()}


def test_who_waits_says_so_and_goes_on_when_the_other_is_killed(tmp_path: Path) -> None:
    root = a_site(tmp_path)
    (root / "number").write_text("0")
    with at_work(root) as holding, process(root, COUNTING, "1") as waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == WAITING
        assert (root / "number").read_text() == "0"
        holding.send_signal(signal.SIGKILL)
        assert waiting.wait(60) == 0
    assert (root / "number").read_text() == "1"


def test_an_interrupted_wait_ends_at_once(tmp_path: Path) -> None:
    root = a_site(tmp_path)
    (root / "number").write_text("0")
    with at_work(root), process(root, COUNTING, "1") as waiting:
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == WAITING
        waiting.terminate()
        assert waiting.wait(60) == -signal.SIGTERM
    assert (root / "number").read_text() == "0"


def test_an_undisturbed_site_says_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Workspace(root=a_site(tmp_path)).site("site-01")
    for _ in range(2):
        with turn(settings):
            pass
    assert capsys.readouterr() == ("", "")


def test_both_flows_that_write_a_site_wait_for_their_turn() -> None:
    from flows.site_turns import in_turn

    for flow in (prepare_site, train_site):
        wrapped, found = flow.fn, []
        while hasattr(wrapped, "__wrapped__"):
            found.append(wrapped.__code__)
            wrapped = wrapped.__wrapped__
        assert in_turn(lambda study, site: None).__code__ in found
