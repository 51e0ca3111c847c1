"""Commands beside `consilium serve`: they join its servers, and start none of their own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from flows import serve
from flows.cli import app
from flows.serve import Services
from flows.terminal import _join_services

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FOUND = Services("http://127.0.0.1:1/api", "consilium:x", "http://127.0.0.1:2", "consilium", 3, "u")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing that a command sets outlive its test."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "CONSILIUM_"))}
    monkeypatch.setattr(os, "environ", kept)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Path]:
    """A folder for which `consilium serve` runs, as far as others can tell."""
    with serve._locked(tmp_path):
        serve._publish(tmp_path, FOUND)
        yield tmp_path


def test_what_is_typed_beside_the_services_uses_them(served: Path) -> None:
    _join_services(served)
    assert os.environ["PREFECT_API_URL"] == FOUND.prefect_api
    assert os.environ["PREFECT_API_AUTH_STRING"] == FOUND.prefect_auth
    assert os.environ["CONSILIUM_TRACKING_URI"] == "u"


def test_what_the_user_chose_stays(served: Path) -> None:
    os.environ["CONSILIUM_TRACKING_URI"] = "https://consilium.example.org"
    _join_services(served)
    assert os.environ["CONSILIUM_TRACKING_URI"] == "https://consilium.example.org"
    os.environ["PREFECT_API_URL"] = "http://elsewhere.example/api"
    _join_services(served)
    assert os.environ["PREFECT_API_URL"] == "http://elsewhere.example/api"


def test_without_services_nothing_is_set(tmp_path: Path) -> None:
    before = dict(os.environ)
    _join_services(tmp_path)
    assert os.environ == before


def test_pages_of_a_served_folder_are_those_that_are_served(served: Path) -> None:
    done = CliRunner().invoke(app, ["ui", str(served)])
    assert (done.exit_code, done.output.splitlines()) == (
        0,
        [
            "Prefect: http://127.0.0.1:1",
            "MLflow: http://127.0.0.1:2",
            "`consilium serve` runs for this folder; these are its pages",
        ],
    )
    assert not (served / "prefect").exists()
