"""What keeps a party's service running, and ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows import parties
from flows.parties import Party, PartyFailed, open_party, run_party, start_parties
from infra.provision import ProvisionError

SLEEPS = "import time; time.sleep(60)"
CONNECTS = (
    "import time, pathlib; pathlib.Path('log.txt').open('a').write("
    "'x - Successfully registered client:site-a for project p\\nServer started\\n'); time.sleep(60)"
)
DIES = "raise SystemExit(3)"


def make_kit(folder: Path, name: str = "site-a", home: str | None = None) -> Path:
    (folder / "local").mkdir(parents=True)
    (folder / "local" / "resources.json").write_text('{"components": []}')
    (folder / "party.json").write_text(json.dumps({"name": name, "home": home}))
    return folder


def running(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    command = [sys.executable, "-c", program]
    monkeypatch.setattr(parties, "_command", lambda kit, name: command)
    monkeypatch.setattr(parties, "_RESTART_S", 0.01)


def eventually(holds: object, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    assert callable(holds)
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_in_thread(party: Party, stop: threading.Event) -> tuple[threading.Thread, list[int]]:
    status: list[int] = []
    thread = threading.Thread(target=lambda: status.append(party.run(stop)))
    thread.start()
    return thread, status


def test_a_service_that_dies_is_started_again_and_given_up_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(monkeypatch, DIES)
    said: list[str] = []
    assert Party(make_kit(tmp_path / "kit"), said.append).run(threading.Event()) == 1
    assert sum("starting again" in line for line in said) == 5
    assert said[-1].endswith("ended with status 3 too often; see engine.log in the kit")


def test_a_service_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {!r}], "
    program = child.format(SLEEPS) + "start_new_session=True); print(p.pid, flush=True); p.wait()"
    running(monkeypatch, program)
    kit, stop = make_kit(tmp_path / "kit"), threading.Event()
    thread, status = run_in_thread(Party(kit, lambda line: None), stop)
    eventually(lambda: (kit / "engine.log").exists() and (kit / "engine.log").read_text().strip())
    pid = int((kit / "engine.log").read_text())
    stop.set()
    thread.join()
    assert status == [0]
    assert (kit / "engine.log").stat().st_mode & 0o077 == 0
    eventually(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_operator_reads_milestones_not_the_engines_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(monkeypatch, CONNECTS)
    said: list[str] = []
    stop = threading.Event()
    kit = make_kit(tmp_path / "kit")
    (kit / "log.txt").write_text("Successfully registered client, of an earlier run\n")
    thread, _ = run_in_thread(Party(kit, said.append), stop)
    eventually(lambda: any("connected to the coordinator" in line for line in said))
    stop.set()
    thread.join()
    assert [line.split(": ", 1)[1] for line in said] == [
        "starting", "connected to the coordinator", "stopped",
    ]  # fmt: skip


def test_a_log_that_was_rotated_is_read_from_its_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("old\n")
    tail = parties._Tail(log)
    assert tail.lines() == []
    log.write_text("old\nnew\nhalf")
    assert tail.lines() == ["new"]
    log.write_text("again\n")
    assert tail.lines() == ["again"]


def test_a_signal_stops_a_party_and_handlers_are_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(monkeypatch, SLEEPS)
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    kit = make_kit(tmp_path / "kit")
    assert run_party(kit, say=lambda line: None, site_home=tmp_path) == 0
    assert signal.getsignal(signal.SIGTERM) is before
    assert json.loads((kit / "party.json").read_text())["home"] == str(tmp_path)


def test_the_admins_kit_is_no_service(tmp_path: Path) -> None:
    with pytest.raises(ProvisionError, match="found the admin's"):
        Party(make_kit(tmp_path / "kit", "admin"), lambda line: None)


def test_a_kit_without_a_home_opens_no_site(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    with pytest.raises(ProvisionError, match="--site-home DIR"):
        open_party(kit)


def test_a_party_that_cannot_connect_is_named_and_nothing_is_left_running(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    with (
        pytest.raises(PartyFailed, match=r"^site-a: did not connect"),
        start_parties({"site-a": kit}, logs=tmp_path / "logs", timeout_s=1.0),
    ):
        pass
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(kit) not in listed.stdout


def test_parties_end_when_the_process_that_started_them_dies(tmp_path: Path) -> None:
    kit = make_kit(tmp_path / "kit")
    party = subprocess.Popen(
        [sys.executable, "-m", "flows.parties", str(kit)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    assert party.stdin is not None
    eventually(lambda: (kit / "engine.log").exists())
    party.stdin.close()  # as the system does when the process dies
    assert party.wait(20) == 0
