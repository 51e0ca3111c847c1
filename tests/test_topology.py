"""A consortium as it runs every day, on PostgreSQL: what is scheduled runs, and people see it."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect, sync_playwright

from tests.postgres import postgres_program
from tests.test_canary import search_for
from tests.topology import topology, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

    from tests.topology import PartyHere, Topology

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STUDY = "demo-tables"
EVERY_MINUTE = "* * * * *"
# A folder that gets what the pages look like, for the documentation.
PICTURES = os.environ.get("CONSILIUM_PICTURES", "")


@pytest.fixture(scope="module")
def parties() -> Iterator[Topology]:
    with topology({"site": {"prepare-site": EVERY_MINUTE}, "coordinator": {}}, workers=3) as found:
        for party in found.parties:
            party.consilium("deploy")
        yield found


def _prepared_once(site: PartyHere) -> bool:
    return any(r["state_type"] == "COMPLETED" for r in site.runs("prepare-site"))


@pytest.fixture(scope="module")
def prepared(parties: Topology) -> Topology:
    """Every site after a night that began by itself, and the training that followed."""
    for name, site in parties.sites.items():
        assert until(partial(_prepared_once, site), 240), site.logs()
        nightly = site.api.get(f"/deployments/name/prepare-site/{name}")
        site.api.post(f"/deployments/{nightly['id']}/pause_deployment", {})
        site.wait(site.begin(f"train-encoders/{name}"))
    return parties


@pytest.fixture(scope="module")
def studied(prepared: Topology) -> Topology:
    run = prepared.coordinator.begin(f"run-study/{STUDY}")
    state = prepared.coordinator.wait(run)
    assert state["name"] == "Completed", (state, prepared.coordinator.logs())
    return prepared


@pytest.fixture(scope="module")
def promoted(studied: Topology) -> Topology:
    run = studied.coordinator.begin(f"promote/{STUDY}", version=1)
    state = studied.coordinator.wait(run, "PAUSED")
    assert state["name"] == "Suspended", (state, studied.coordinator.logs())
    studied.coordinator.consilium("approve", run)
    state = studied.coordinator.wait(run)
    assert state["name"] == "Promoted", (state, studied.coordinator.logs())
    return studied


def test_a_scheduled_run_fires_at_every_site(prepared: Topology) -> None:
    for name, site in prepared.sites.items():
        scheduled = [r for r in site.runs("prepare-site") if r["auto_scheduled"]]
        assert any(r["state_type"] == "COMPLETED" for r in scheduled)
        assert {r["name"] for r in scheduled if r["state_type"] == "COMPLETED"} == {
            f"prepare-{name}"
        }
        assert (site.root / "cohort.h5mu").is_file()


def test_a_study_runs_over_the_engine_and_its_model_is_promoted(promoted: Topology) -> None:
    home = promoted.coordinator
    (summary,) = home.root.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["summary"]["federation"] == "flare"
    told = home.consilium("lineage")
    assert "champion" in told
    assert "whole" in home.consilium("lineage", "verify")


def test_a_study_without_anything_new_is_skipped_and_says_why(promoted: Topology) -> None:
    state = promoted.coordinator.wait(promoted.coordinator.begin(f"run-study/{STUDY}"))
    assert state["name"] == "Skipped"
    assert state["message"]


def test_no_run_is_lost_and_no_database_locked_by_several_workers(promoted: Topology) -> None:
    home = promoted.coordinator
    runs = [home.begin(f"promote/{STUDY}", version=99 + at) for at in range(6)]
    states = [home.wait(run) for run in runs]
    assert {state["type"] for state in states} == {"FAILED"}  # there are no such versions
    assert len({home.api.get(f"/flow_runs/{run}")["infrastructure_pid"] for run in runs}) == 6
    assert "locked" not in home.logs()


@pytest.mark.border
def test_what_the_servers_hold_names_no_patient_and_no_file(promoted: Topology) -> None:
    search = search_for(promoted.planted)
    for party in promoted.parties:
        told = [_dumped(party, server) for server in ("prefect", "mlflow")] + _answers(party)
        assert not set().union(*(search.in_bytes(text) for text in told))
    site = next(iter(promoted.sites.values()))
    leaked = promoted.planted.texts[0]
    found = site.api.get(f"/deployments/name/check-data/{site.root.name}")
    site.api.post(f"/deployments/{found['id']}/create_flow_run", {"name": leaked})
    assert search.in_bytes(_dumped(site, "prefect")) == {leaked}
    assert leaked in set().union(*(search.in_bytes(text) for text in _answers(site)))


def _dumped(party: PartyHere, server: str) -> bytes:
    """Everything in one of a party's databases; what a site's own MLflow holds is a file."""
    file = party.root / "runs/mlflow.db"
    if server == "mlflow" and file.is_file():
        return file.read_bytes()
    program = postgres_program("pg_dump")
    assert program is not None
    url = f"{party.environment['CONSILIUM_DATABASE_URL']}_{server}"
    done = subprocess.run(
        [program, "--data-only", "--inserts", url], capture_output=True, check=True
    )
    assert len(done.stdout) > 10_000
    return done.stdout


def _answers(party: PartyHere) -> list[bytes]:
    """What both servers answer to whoever asks for all they have."""
    asked = ("flow_runs", "task_runs", "artifacts", "logs", "deployments", "work_pools", "events")
    prefect = [json.dumps(party.api.post(f"/{name}/filter", {})).encode() for name in asked]
    address = f"{party.services.mlflow}/api/2.0/mlflow"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    mlflow = []
    for path in (
        "registered-models/search",
        "model-versions/search",
        "experiments/search?max_results=100",
    ):
        with opener.open(f"{address}/{path}", timeout=60) as answer:
            mlflow.append(answer.read())
    return prefect + mlflow


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium is not None, "found no Chromium, needed it to look at the pages"
    with sync_playwright() as play:
        found = play.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


class Reader:
    """A person at a browser: opens pages, reads them, and notes every address that was asked."""

    def __init__(self, browser: Browser, password: str | None) -> None:
        user, _, word = (password or ":").partition(":")
        self._page = browser.new_page(viewport={"width": 1440, "height": 1100})
        self._page.on("request", lambda request: self.asked.add(urlsplit(request.url).hostname))
        self.asked: set[str | None] = set()
        self._auth = base64.b64encode(f"{user}:{word}".encode()).decode()
        self._has_password = password is not None

    def read(self, address: str, *seen: str, tab: str = "", picture: str = "") -> str:
        """Text of a page, once all of this is on it."""
        if self._has_password:
            origin = "{0.scheme}://{0.netloc}".format(urlsplit(address))
            self._page.goto(origin)
            self._page.evaluate("x => localStorage.setItem('prefect-password', x)", self._auth)
        self._page.goto(address)
        if tab:
            self._page.get_by_text(tab, exact=True).first.click(timeout=60_000)
        for text in seen:
            expect(self._page.locator("body")).to_contain_text(text, timeout=60_000)
        if picture and PICTURES:
            self._page.screenshot(path=f"{PICTURES}/{picture}.png")
        return self._page.inner_text("body")


@pytest.fixture
def flows_page(browser: Browser, promoted: Topology) -> Iterator[Reader]:
    """Look at the coordinator's Prefect pages."""
    reader = Reader(browser, promoted.coordinator.services.prefect_auth)
    yield reader
    assert reader.asked <= {"127.0.0.1", None}


@pytest.fixture
def models_page(browser: Browser) -> Iterator[Reader]:
    """Look at MLflow's pages."""
    reader = Reader(browser, None)
    yield reader
    assert reader.asked <= {"127.0.0.1", None}


def test_browser_shows_what_runs_when_at_a_site(browser: Browser, promoted: Topology) -> None:
    name, site = next(iter(promoted.sites.items()))
    reader = Reader(browser, site.services.prefect_auth)
    flows = ("prepare-site", "train-encoders", "check-data", "audit-privacy")
    text = reader.read(
        f"{_flows(site)}/deployments", *flows, name, "Every minute", picture="deployments"
    )
    assert "upgrade" not in text.lower()
    assert reader.asked <= {"127.0.0.1", None}


def test_browser_shows_a_studys_run_with_its_table(flows_page: Reader, promoted: Topology) -> None:
    home = promoted.coordinator
    (run,) = [r for r in home.runs("run-study") if r["state_name"] == "Completed"]
    page = f"{_flows(home)}/runs/flow-run/{run['id']}"
    flows_page.read(page, f"study-{STUDY}", "results", tab="Artifacts", picture="run")
    table = f"{_flows(home)}/artifacts/artifact/{_artifact(home, run, 'results')}"
    flows_page.read(table, "Federated", *promoted.sites, picture="results")


def test_browser_shows_the_gates_that_a_version_passed(
    flows_page: Reader, promoted: Topology
) -> None:
    home = promoted.coordinator
    (run,) = [r for r in home.runs("promote") if r["state_name"] == "Promoted"]
    table = f"{_flows(home)}/artifacts/artifact/{_artifact(home, run, 'gates')}"
    flows_page.read(table, "concordance", "signature", picture="gates")


def test_browser_shows_model_and_version_with_card_aliases_tags_and_lineage(
    models_page: Reader, promoted: Topology
) -> None:
    address = f"{promoted.coordinator.services.mlflow}/#/models"
    page = f"{address}/{STUDY}-fusion"
    models_page.read(address, f"{STUDY}-fusion", "champion", picture="models")
    models_page.read(page, "champion", "candidate", "Version 1", picture="model")
    tags = ("consilium.protocol", "consilium.code", "consilium.signed_by", "gate.concordance")
    models_page.read(f"{page}/versions/1", "What it is for", "champion", *tags, picture="version")


def _flows(party: PartyHere) -> str:
    return party.services.prefect_api.removesuffix("/api")


def _artifact(party: PartyHere, run: dict[str, Any], key: str) -> str:
    """Id of something that a run published; a run that waited published it again."""
    asked = {"artifacts": {"flow_run_id": {"any_": [run["id"]]}, "key": {"any_": [key]}}}
    found = party.api.post("/artifacts/filter", asked)
    return str(found[-1]["id"])
