from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from flows.services import (
    Server,
    ServiceError,
    client_settings,
    free_port,
    open_ui,
    prefect_server,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

FLOW = """
from prefect import flow, task

@task
def double(x):
    return 2 * x

@flow
def consortium():
    return double.submit(21).result()

assert consortium() == 42
"""
PARENT = """
import sys, time
from pathlib import Path
from flows.services import prefect_server

with prefect_server(Path(sys.argv[1])) as server:
    print(server.process.pid, flush=True)
    time.sleep(60)
"""
UI = """
import sys
from pathlib import Path
from flows.services import open_ui

open_ui(Path(sys.argv[1]), prefect_port=int(sys.argv[2]), mlflow_port=int(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def _no_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [x for x in os.environ if x.startswith(("PREFECT_", "MLFLOW_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_taken_port_is_never_given(taken_port: int) -> None:
    assert free_port(taken_port) != taken_port
    free = free_port()
    assert free_port(free) == free


def test_a_taken_port_is_refused_before_anything_starts(tmp_path: Path, taken_port: int) -> None:
    with pytest.raises(ServiceError, match=f"{taken_port} taken"):
        prefect_server(tmp_path / "prefect", port=taken_port).__enter__()
    assert not (tmp_path / "prefect").exists()


def test_a_server_of_the_user_is_used_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with prefect_server(tmp_path / "prefect") as server:
        assert server.api_url == "http://127.0.0.1:9/api"
        assert server.process is None
        with pytest.raises(ServiceError, match="no answer after 0 s"):
            server.wait_ready(timeout_s=0)
    assert not (tmp_path / "prefect").exists()


def test_a_server_that_ends_is_named_with_its_code() -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    process.wait()
    server = Server("some server", f"http://127.0.0.1:{free_port()}/api", process)
    with pytest.raises(ServiceError, match="some server: found it ended with code 3"):
        server.wait_ready()


def test_client_settings_keep_results_below_home_and_logs_off_the_server(tmp_path: Path) -> None:
    settings = client_settings("http://127.0.0.1:4200/api", tmp_path)
    assert settings["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert settings["PREFECT_LOGGING_TO_API_ENABLED"] == "false"
    for name in ("PREFECT_HOME", "PREFECT_RESULTS_LOCAL_STORAGE_PATH"):
        assert Path(settings[name]).is_relative_to(tmp_path)


def test_loopback_bypasses_a_proxy_and_keeps_the_users_exceptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "hospital.example")
    own = client_settings("http://127.0.0.1:4200/api", tmp_path)
    assert own["NO_PROXY"] == own["no_proxy"] == "hospital.example,127.0.0.1,localhost"
    assert "NO_PROXY" not in client_settings("https://flows.hospital.example/api", tmp_path)


def test_settings_of_a_client_are_known_to_prefect(tmp_path: Path) -> None:
    code = (
        "import prefect.settings as s; c = s.get_current_settings(); "
        "print(c.home, c.results.local_storage_path, c.logging.to_api.enabled, c.logging.level, "
        "c.server.ephemeral.enabled, c.api.url)"
    )
    settings = client_settings("http://127.0.0.1:4200/api", tmp_path)
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert printed == [
        *(str(tmp_path), str(tmp_path / "results"), "False", "CRITICAL", "False"),
        "http://127.0.0.1:4200/api",
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_server_ends_when_its_parent_does(tmp_path: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "prefect")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(how)
        parent.wait(timeout=20)
    _wait(lambda: not _runs(child), timeout_s=20)


def test_ui_needs_a_folder_with_a_study(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match=r"found no mlflow\.db"):
        open_ui(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_flow_run_and_its_task_are_recorded(tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    with prefect_server(home) as server:
        server.wait_ready()
        done = subprocess.run(
            [sys.executable, "-c", FLOW],
            env={**os.environ, **client_settings(server.api_url, home)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert not done.stdout
        assert not done.stderr
        assert [x["state_type"] for x in _filter(server, "flow_runs")] == ["COMPLETED"]
        _wait(lambda: bool(_filter(server, "task_runs")), timeout_s=30)
        assert _filter(server, "logs") == []
    assert (home / "prefect.db").is_file()
    assert not (tmp_path / "mlruns").exists()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{server.api_url}/health", timeout=5)


@pytest.mark.slow
def test_ui_answers_on_both_pages_and_stops_when_asked(tmp_path: Path, taken_port: int) -> None:
    (tmp_path / "mlflow.db").touch()
    command = [sys.executable, "-c", UI, str(tmp_path), str(free_port()), str(taken_port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ui:
        assert ui.stdout is not None
        said = [ui.stdout.readline().strip() for _ in range(5)]
        addresses = [x.split(": ")[1] for x in said[2:4]]
        pages = [_read(address) for address in addresses]
        ui.send_signal(signal.SIGTERM)
        assert ui.wait(timeout=30) == 0
    assert f"port {taken_port} is taken" in said[0]
    assert ["Prefect" in pages[0], "MLflow" in pages[1]] == [True, True]
    for address in addresses:
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(address, timeout=5)


def _read(address: str) -> str:
    request = urllib.request.Request(address, headers={"Accept": "text/html"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200
        return str(answer.read().decode())


def _filter(server: Server, what: str) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"{server.api_url}/{what}/filter",
        data=b"{}",
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.load(answer)
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie that nobody reaped has ended
    return not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def _wait(condition: Any, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
