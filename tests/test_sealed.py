from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flows.sealed import SiteError, log_to, may_pass, note, sealed
from flows.services import client_settings, prefect_server
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CANARY = "canary-4f1d9b-patient-0815"


@pytest.fixture(autouse=True)
def _own_log() -> Iterator[None]:
    yield
    log = logging.getLogger("consilium.local")
    for handler in list(log.handlers):
        if not isinstance(handler, logging.NullHandler):
            log.removeHandler(handler)
            handler.close()


class Coded(Exception):
    """As other libraries' exceptions: with a code of any kind."""

    def __init__(self, code: object) -> None:
        super().__init__(CANARY)
        self.code = code


def failing(error: Exception) -> SiteError:
    @sealed
    def body() -> None:
        try:
            raise ValueError(CANARY)
        except ValueError as cause:
            raise error from cause

    with pytest.raises(SiteError) as found:
        body()
    return found.value


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (DataError("missing_resolution", CANARY), "body:missing_resolution"),
        (ValueError(CANARY), "body:ValueError"),
        (KeyError(CANARY), "body:KeyError"),
        (FileNotFoundError(2, "No such file", f"/data/{CANARY}"), "body:FileNotFoundError"),
        (Coded(CANARY), "body:Coded"),
        (Coded(f"{CANARY} and more"), "body:Coded"),
        (Coded(404), "body:Coded"),
        (Coded(lambda: CANARY), "body:Coded"),
    ],
)
def test_only_a_code_leaves(error: Exception, text: str) -> None:
    found = failing(error)
    assert str(found) == text
    assert found.__cause__ is None
    assert found.__context__ is None
    assert found.cause is error
    assert CANARY not in f"{found} {found!r} {found.args}"


def test_a_sealed_error_is_sealed_once() -> None:
    inner = SiteError("load:DataError", ValueError(CANARY))

    @sealed
    def outer() -> None:
        raise inner

    with pytest.raises(SiteError) as found:
        outer()
    assert found.value is inner


def test_values_pass_and_the_name_stays() -> None:
    @sealed
    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    assert double(21) == 42
    assert (double.__name__, double.__doc__) == ("double", "Twice.")


def test_a_pickled_error_is_the_code_alone() -> None:
    stored = pickle.dumps(failing(ValueError(CANARY)))
    assert CANARY.encode() not in stored
    found = pickle.loads(stored)
    assert isinstance(found, SiteError)
    assert str(found) == "body:ValueError"


def test_an_interrupt_is_not_sealed() -> None:
    @sealed
    def body() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()


def test_details_stay_in_the_local_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    failing(ValueError("before any log"))
    log_to(tmp_path / "a")
    failing(ValueError(CANARY))
    log_to(tmp_path / "b")
    log_to(tmp_path / "b")
    note(ValueError("elsewhere"))
    first, second = ((tmp_path / x / "logs" / "consilium.log").read_text() for x in ("a", "b"))
    assert CANARY in first
    assert "Traceback" in first
    assert second.count("ValueError: elsewhere") == 1
    assert CANARY not in second
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("consilium.local").propagate is False


class State:
    """What a retry condition reads of Prefect's state."""

    def __init__(self, data: object) -> None:
        self._data = data

    def result(self, *, raise_on_failure: bool) -> object:
        assert not raise_on_failure
        return self._data


@pytest.mark.parametrize(
    ("data", "again"),
    [
        (SiteError("x:OSError", OSError()), True),
        (SiteError("x:TimeoutError", TimeoutError()), True),
        (SiteError("x:bad", DataError("bad", "bad")), False),
        (SiteError("x:MemoryError", MemoryError()), False),
        (OSError(), False),
        (None, False),
    ],
)
def test_only_a_disk_or_network_is_tried_again(data: object, again: bool) -> None:
    assert may_pass(None, None, State(data)) is again  # type: ignore[arg-type]


FLOW = """
import sys
from pathlib import Path
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner
from flows.sealed import log_to, may_pass, sealed

CANARY, kind = sys.argv[1:3]
log_to(Path(sys.argv[3]))


class Broken(OSError):
    pass


def fail():
    try:
        raise ValueError(CANARY)
    except ValueError as cause:
        raise Broken(CANARY, CANARY) from cause


body = sealed(fail) if kind == "sealed" else fail
step = task(body, name="step", retries=1, retry_delay_seconds=0, retry_condition_fn=may_pass,
            cache_policy=NO_CACHE, persist_result=False)


@flow(name="site", persist_result=False, task_runner=ThreadPoolTaskRunner(max_workers=2))
def site():
    step.submit().result()


try:
    site()
except Exception as error:
    print(type(error).__name__)
"""


def forms(text: str) -> list[bytes]:
    raw = text.encode()
    shifted = [base64.b64encode(b"x" * i + raw)[4:-4] for i in range(3)]
    return [raw, raw.hex().encode(), json.dumps(text).encode()[1:-1], *shifted]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sealed", "open"])
def test_nothing_of_an_exception_reaches_the_server(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [x for x in os.environ if x.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    home, local = tmp_path / "prefect", tmp_path / "local"
    with prefect_server(home) as server:
        server.wait_ready()
        done = subprocess.run(
            [sys.executable, "-c", FLOW, CANARY, kind, str(local)],
            env={**os.environ, **client_settings(server.api_url, home)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.strip() == ("SiteError" if kind == "sealed" else "Broken")
    files = [file for file in home.rglob("*") if file.is_file()]
    assert any(file.name.startswith("prefect.db") for file in files)
    leaks = [
        f"{file.name}: {form!r}" for file in files for form in forms(CANARY)
        if form in file.read_bytes()
    ]  # fmt: skip
    if kind == "sealed":
        assert leaks == []
        assert CANARY in (local / "logs" / "consilium.log").read_text()
    else:
        assert leaks


@pytest.mark.slow
@pytest.mark.border
def test_a_failed_flow_tells_its_server_a_code_and_no_path(tmp_path: Path) -> None:
    code = """
from prefect import flow
from flows.described import Slug, described
from flows.sealed import SiteError, sealed

@flow(name="fails", persist_result=False)
@described
@sealed
def fails(site: Slug) -> int:
    raise OSError("/data/anna")

try:
    fails("site-01")
except SiteError as error:
    print(error, type(error.cause).__name__)
"""
    home = tmp_path / "prefect"
    with prefect_server(home) as server:
        server.wait_ready()
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **client_settings(server.api_url, home)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout.strip() == "fails:OSError OSError"
    told = b"".join(file.read_bytes() for file in home.glob("prefect.db*"))
    assert b"ended with fails:OSError" in told
    assert str(tmp_path).encode() not in told
    assert b"anna" not in told
