"""A consortium as it runs every day, on PostgreSQL: what is scheduled runs, and people see it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from flows.decisions import form_values, read_request, sign_decision
from flows.identity import identity
from fusion.audit import LOG_FILE, read_entries
from fusion.federation.consortium import COORDINATOR
from tests.postgres import postgres_program
from tests.test_canary import search_for
from tests.test_serve import COLLISIONS, _tree
from tests.topology import side_by_side, topology, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from playwright.sync_api import Browser

    from flows.prefect_api import PrefectApi
    from tests.topology import PartyHere, Topology

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STUDY = "demo-tables"
EVERY_MINUTE = "* * * * *"
N_CAME = 15
WIDTH_PX = 1600
# A folder that gets what the pages look like, for the documentation.
PICTURES = os.environ.get("CONSILIUM_PICTURES", "")


@pytest.fixture(scope="module")
def parties() -> Iterator[Topology]:
    with topology({"site": {"prepare-site": EVERY_MINUTE}, "coordinator": {}}, workers=3) as found:
        side_by_side(lambda party: party.consilium("deploy"), found.parties)
        yield found


def _ended(party: PartyHere, flow: str, how: str) -> list[dict[str, Any]]:
    """Runs of a flow that something else than people began, and that completed."""
    found = [r for r in party.runs(flow) if r["created_by"] and r["created_by"]["type"] == how]
    return [r for r in found if r["state_type"] == "COMPLETED"]


def _has_ended(party: PartyHere, flow: str, how: str, n: int) -> bool:
    return len(_ended(party, flow, how)) >= n


@pytest.fixture(scope="module")
def prepared(parties: Topology) -> Topology:
    """Every site after a night that began by itself, and the training that it began."""
    for site in parties.sites.values():
        assert until(partial(_has_ended, site, "prepare-site", "SCHEDULE", 1), 240), site.logs()
    side_by_side(_keep_the_files_times, list(parties.sites.values()))
    _require_trained(parties, 1)
    return parties


def _keep_the_files_times(site: PartyHere) -> None:
    del site.environment["CONSILIUM_SCHEDULES"]
    site.consilium("deploy")


def _require_trained(parties: Topology, n: int) -> None:
    """Wait until every site has trained so often because its cohort grew."""
    for site in parties.sites.values():
        assert until(partial(_has_ended, site, "train-encoders", "AUTOMATION", n), 240), site.logs()


@dataclass
class Begun:
    """A consortium, and the runs that were begun, by what they are for."""

    parties: Topology
    runs: dict[str, str] = field(default_factory=dict)
    at_sites: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> PartyHere:
        return self.parties.coordinator

    @property
    def sites(self) -> list[PartyHere]:
        return list(self.parties.sites.values())


@pytest.fixture(scope="module")
def studied(prepared: Topology) -> Begun:
    """After a study, during which one site was looked after, and runs of the other one failed."""
    begun = Begun(prepared)
    begun.runs["study"] = begun.home.begin(f"run-study/{STUDY}")
    one, other = begun.sites
    begun.at_sites["check-data"] = one.begin(f"check-data/{one.root.name}")
    with _with_another_registry(other, prepared.planted.texts[0]):
        for flow in ("check-data", "prepare-site"):
            begun.at_sites[f"failed {flow}"] = other.begin(f"{flow}/{other.root.name}")
        for flow in ("check-data", "prepare-site"):
            other.wait(begun.at_sites[f"failed {flow}"])
    begun.home.ends(begun.runs["study"], "Completed")
    return begun


@contextmanager
def _with_another_registry(site: PartyHere, identifier: str) -> Iterator[None]:
    """Let a registry lack a column, and have an identifier in its place and in its path."""
    settings, registry = site.root / "site.toml", (site.root / "clinical.csv").read_text()
    text = settings.read_text()
    (site.root / identifier).mkdir()
    other = registry.replace(",event,", f",{identifier},", 1)
    assert other != registry
    (site.root / identifier / "clinical.csv").write_text(other)
    settings.write_text(text.replace('"clinical.csv"', f'"{identifier}/clinical.csv"'))
    yield
    settings.write_text(text)


@pytest.fixture(scope="module")
def promoted(studied: Begun) -> Begun:
    """After two approvals of the first version; a second promotion of it was begun meanwhile."""
    home, runs, site = studied.home, studied.runs, studied.sites[0]
    studied.at_sites["audit-privacy"] = site.begin(f"audit-privacy/{site.root.name}")
    first = runs["promote"] = home.begin(f"promote/{STUDY}", version=1)
    state = home.wait(first, "PAUSED")
    assert state["name"] == "Suspended", (state, home.logs())
    runs["promote beside it"] = home.begin(f"promote/{STUDY}", version=1)
    runs["same study"] = home.begin(f"run-study/{STUDY}")
    assert "waits again" in home.consilium("approve", first)
    assert "done: promoted" in home.consilium("approve", first, "--key", site.root)
    home.ends(first, "Promoted")
    return studied


@pytest.fixture(scope="module")
def grown(promoted: Begun) -> Begun:
    """After another night that new patients came in: the champion's evaluation, and a study."""
    home, runs = promoted.home, promoted.runs
    runs["same champion"] = home.begin(f"evaluate-champion/{STUDY}")
    home.ends(runs["same champion"], "Skipped")
    for site in promoted.sites:
        site.grow(N_CAME)
        site.begin(f"prepare-site/{site.root.name}")
    _require_trained(promoted.parties, 2)
    runs["evaluation"] = home.begin(f"evaluate-champion/{STUDY}")
    home.wait(runs["evaluation"])
    runs["second study"] = home.begin(f"run-study/{STUDY}")
    home.ends(runs["second study"], "Completed")
    return promoted


@pytest.fixture(scope="module")
def rejected(grown: Begun, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """After the second version was turned down; a stranger's approval came before."""
    home = grown.home
    run = grown.runs["rejection"] = home.begin(f"promote/{STUDY}", version=2)
    waits = home.wait(run, "PAUSED")
    assert waits["name"] == "Suspended", (waits, home.logs())
    request, _ = read_request(home.root, run)
    stranger = identity(tmp_path_factory.mktemp("stranger"))
    values = form_values(sign_decision(request, "approve", stranger))
    answer = home.api.post(f"/flow_runs/{run}/resume", {"run_input": values})
    assert answer["status"] == "ACCEPT"
    assert until(lambda: _waits_anew(home, run, waits), 240), home.logs()
    told = home.consilium("approve", run, "--reject", "poor_calibration", "--reason", "two sites")
    assert "done: rejected" in told
    return grown


def _waits_anew(home: PartyHere, run: str, before: dict[str, Any]) -> bool:
    state = home.api.get(f"/flow_runs/{run}")["state"]
    assert state["type"] not in ("COMPLETED", "FAILED", "CRASHED"), state
    return bool(state["type"] == "PAUSED" and state["id"] != before["id"])


def test_a_scheduled_run_fires_at_every_site(prepared: Topology) -> None:
    for name, site in prepared.sites.items():
        assert {r["name"] for r in _ended(site, "prepare-site", "SCHEDULE")} == {f"prepare-{name}"}
        assert (site.root / "cohort.h5mu").is_file()


def test_encoders_are_trained_when_the_cohort_grew_and_nobody_asks(prepared: Topology) -> None:
    for name, site in prepared.sites.items():
        began = [r for r in site.runs("train-encoders") if r["state_type"] != "SCHEDULED"]
        assert {r["created_by"]["type"] for r in began} == {"AUTOMATION"}
        assert {r["name"] for r in began} == {f"train-{name}"}
        assert list(site.root.glob("encoders/*/encoder.safetensors"))


def test_a_study_runs_over_the_engine_and_its_model_is_promoted(promoted: Begun) -> None:
    home = promoted.home
    said = [json.loads(x.read_text())["summary"] for x in home.root.glob("runs/*/summary.json")]
    assert {x["federation"] for x in said} == {"flare"}
    champion = f"{STUDY}-fusion@champion"
    assert "champion" in home.consilium("lineage", champion)
    assert "whole" in home.consilium("lineage", "verify", champion)
    assert "stands" in home.consilium("dossier", champion, "--check")


def test_a_study_without_anything_new_is_skipped_and_says_why(promoted: Begun) -> None:
    state = promoted.home.ends(promoted.runs["same study"], "Skipped")
    assert state["message"].startswith("no new snapshot: run ")


def test_a_version_waits_for_one_decision_only(promoted: Begun) -> None:
    state = promoted.home.ends(promoted.runs["promote beside it"], "Skipped")
    first = promoted.runs["promote"]
    assert state["message"] == f"run {first[:8]} decides over this version already"


def test_a_site_is_looked_after(promoted: Begun) -> None:
    site = promoted.sites[0]
    checked, audited = (promoted.at_sites[x] for x in ("check-data", "audit-privacy"))
    site.ends(checked, "Completed")
    assert json.loads(site.artifact(checked, f"check-{site.root.name}")["data"]) == []
    site.wait(audited)
    verdicts = json.loads(site.artifact(audited, f"audit-{site.root.name}")["data"])
    said = {x["what"]: x["verdict"] for x in verdicts}
    assert said["log"] == "whole"
    assert said["fusion"] in ("passes", "fails")


def test_a_sites_run_that_fails_says_a_code(studied: Begun) -> None:
    site = studied.sites[1]
    for flow, task in {"check-data": "check_inputs", "prepare-site": "read_site_registry"}.items():
        state = site.ends(studied.at_sites[f"failed {flow}"], "Failed")
        assert state["message"] == f"ended with {task}:missing_column"


def test_the_champion_is_evaluated_again_on_what_is_new_only(grown: Begun) -> None:
    home, runs = grown.home, grown.runs
    same = home.ends(runs["same champion"], "Skipped")
    assert same["message"] == "no site has a new snapshot"
    state = home.wait(runs["evaluation"])
    assert state["name"] in ("Completed", "Alarm"), (state, home.logs())
    text = home.artifact(runs["evaluation"], "evaluation")["data"]
    assert "# Version 1, evaluated again" in text
    assert ("No alarm." in text) == (state["name"] == "Completed")


def test_a_version_is_rejected_and_an_unknown_key_counts_for_nothing(rejected: Begun) -> None:
    home, run = rejected.home, rejected.runs["rejection"]
    home.ends(run, "Rejected")
    entries = read_entries(home.root / COORDINATOR / LOG_FILE)
    decisions = [e.about for e in entries if e.kind == "promotion_decision"]
    found = [(x["decision"], x["counts"], x["fault"]) for x in decisions if x["flow_run"] == run]
    assert found == [("approve", False, "unknown_key"), ("reject", True, "")]
    tags = {x["key"]: x["value"] for x in _version(home, 2)["tags"]}
    assert tags["consilium.rejected"] == "poor_calibration"
    assert tags["consilium.rejected_reason"] == "two sites"
    asked = urlencode({"name": f"{STUDY}-fusion"})
    model = _mlflow(home, f"registered-models/get?{asked}")["registered_model"]
    aliases = {x["alias"]: x["version"] for x in model["aliases"]}
    assert aliases == {"champion": "1", "candidate": "2"}


def _version(home: PartyHere, number: int) -> dict[str, Any]:
    asked = urlencode({"name": f"{STUDY}-fusion", "version": number})
    found: dict[str, Any] = _mlflow(home, f"model-versions/get?{asked}")["model_version"]
    return found


def test_no_run_is_lost_and_no_database_in_the_way_of_several_workers(rejected: Begun) -> None:
    for party in rejected.parties.parties:
        found = [r for page in _pages(party.api, "flow_runs") for r in page]
        began = {r["id"]: r["state_type"] for r in found if r["state_type"] != "SCHEDULED"}
        assert set(began.values()) <= {"COMPLETED", "FAILED"}  # an alarm is a failure, too
        if party is rejected.home:
            assert set(began) == set(rejected.runs.values())
        told = party.whole_logs().lower()
        assert [x for x in COLLISIONS if x in told] == []


def test_an_idle_site_with_its_end_of_the_federation_takes_at_most_1_2_gb(rejected: Begun) -> None:
    for site in rejected.sites:
        assert site.process is not None
        assert site.federation is not None
        of_site = [*_tree(site.process.pid), *_tree(site.federation.pid)]
        assert sum(_rss_kb(process) for process in of_site) <= 1_200_000


def _rss_kb(process: int) -> int:
    """Memory of a process, with what it shares with others."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("Rss:"))


@pytest.mark.border
def test_what_the_servers_hold_names_no_patient_and_no_file(rejected: Begun) -> None:
    search = search_for(rejected.parties.planted)
    for party in rejected.parties.parties:
        told = [_dumped(party, server) for server in ("prefect", "mlflow")] + _answers(party)
        assert not set().union(*(search.in_bytes(text) for text in told))
    site, texts = rejected.sites[0], rejected.parties.planted.texts
    found = site.api.get(f"/deployments/name/check-data/{site.root.name}")
    site.api.post(f"/deployments/{found['id']}/create_flow_run", {"name": texts[0]})
    assert search.in_bytes(_dumped(site, "prefect")) == {texts[0]}
    run = _searched(site, "runs/search", "runs", experiment_ids=_experiments(site))[0]
    tag = {"run_id": run["info"]["run_id"], "key": "leaked", "value": texts[1]}
    _mlflow(site, "runs/set-tag", tag)
    assert search.in_bytes(_dumped(site, "mlflow")) == {texts[1]}
    found = set().union(*(search.in_bytes(text) for text in _answers(site)))
    assert found == {texts[0], texts[1]}


def _dumped(party: PartyHere, server: str) -> bytes:
    """Everything in one of a party's databases; what a site's own MLflow holds is a file."""
    files = sorted(party.root.glob("runs/mlflow.db*"))  # what was written last is in a second one
    if server == "mlflow" and files:
        return b"".join(file.read_bytes() for file in files)
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
    asked = ("flows", "flow_runs", "task_runs", "artifacts", "logs", "deployments", "work_pools",
             "automations")  # fmt: skip
    prefect = [page for name in asked for page in _pages(party.api, name)]
    of_model = {"experiment_ids": _experiments(party)}
    mlflow: dict[str, list[dict[str, Any]]] = {
        "experiments": _searched(party, "experiments/search", "experiments"),
        "models": _searched(party, "registered-models/search", "registered_models"),
        "versions": _searched(party, "model-versions/search", "model_versions"),
        "runs": _searched(party, "runs/search", "runs", **of_model),
        "logged": _searched(party, "logged-models/search", "models", **of_model),
    }
    assert all(mlflow.values()), {name: len(found) for name, found in mlflow.items()}
    told = [*prefect, *_events(party.api), *mlflow.values()]
    return [json.dumps(page).encode() for page in told]


def _pages(api: PrefectApi, name: str) -> Iterator[list[Any]]:
    at = 0
    while page := api.post(f"/{name}/filter", {"limit": 200, "offset": at}):
        yield page
        at += len(page)


def _events(api: PrefectApi) -> Iterator[dict[str, Any]]:
    """Every page of what happened, the newest first."""
    page, n = api.post("/events/filter", {"limit": 50}), 0
    total = page["total"]
    while True:
        yield page
        n += len(page["events"])
        if not page["next_page"]:
            break
        page = api.get(page["next_page"].partition("/api")[2])
    assert n >= total > 50


def _experiments(party: PartyHere) -> list[str]:
    found = _searched(party, "experiments/search", "experiments")
    return [x["experiment_id"] for x in found]


def _searched(party: PartyHere, path: str, key: str, **asked: Any) -> list[dict[str, Any]]:
    """Everything that a search of MLflow finds, page by page."""
    found: list[dict[str, Any]] = []
    of_page = {"max_results": 50}
    while True:
        if asked or key == "experiments":
            page = _mlflow(party, path, {**asked, **of_page})
        else:
            page = _mlflow(party, f"{path}?{urlencode(of_page)}")
        found += page.get(key, [])
        if not page.get("next_page_token"):
            return found
        of_page["page_token"] = page["next_page_token"]


def _mlflow(party: PartyHere, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask a party's MLflow server."""
    request = urllib.request.Request(
        f"{party.services.mlflow}/api/2.0/mlflow/{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium is not None, "found no Chromium, needed it to look at the pages"
    # The graph of a run is drawn in three dimensions.
    drawing = "--enable-unsafe-swiftshader" if PICTURES else "--disable-gpu"
    with sync_playwright() as play:
        found = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", drawing])
        yield found
        found.close()


class Reader:
    """A person at a browser: opens pages, reads them, and notes every address that was asked."""

    def __init__(self, browser: Browser, password: str | None) -> None:
        user, _, word = (password or ":").partition(":")
        self._page = browser.new_page(viewport={"width": WIDTH_PX, "height": 1100})
        self._page.on("request", lambda request: self.asked.add(urlsplit(request.url).hostname))
        self.asked: set[str | None] = set()
        self._auth = base64.b64encode(f"{user}:{word}".encode()).decode()
        self._has_password = password is not None

    def read(
        self, address: str, *seen: str, tab: str = "", picture: str = "", height_px: int = 1100
    ) -> str:
        """Text of a page, once all of this is on it."""
        self._page.set_viewport_size({"width": WIDTH_PX, "height": height_px})
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
            self._take(Path(PICTURES) / f"{picture}.png")
        told = self._page.inner_text("body")
        assert "/tmp/" not in told
        return told

    def link(self, text: str, part: str) -> str:
        """Where the page leads under a text, once an address with this part stands there."""
        found = self._page.locator(f'a[href*="{part}"]').filter(has_text=text).first
        found.wait_for(timeout=60_000)
        return found.get_attribute("href") or ""

    def _take(self, file: Path) -> None:
        """Keep what the page looks like once nothing moves, without what greets a newcomer."""
        self._page.wait_for_timeout(4_000)
        for button in self._page.get_by_role("button", name="Close", exact=True).all():
            button.click()
            self._page.wait_for_timeout(1_000)
        drawn = Image.open(io.BytesIO(self._page.screenshot())).convert("RGB")
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


@pytest.fixture
def flows_page(browser: Browser, rejected: Begun) -> Iterator[Reader]:
    """Look at the coordinator's Prefect pages."""
    reader = Reader(browser, rejected.home.services.prefect_auth)
    yield reader
    assert reader.asked <= {"127.0.0.1", None}


@pytest.fixture
def site_page(browser: Browser, rejected: Begun) -> Iterator[Reader]:
    """Look at a site's Prefect pages."""
    reader = Reader(browser, rejected.sites[0].services.prefect_auth)
    yield reader
    assert reader.asked <= {"127.0.0.1", None}


@pytest.fixture
def models_page(browser: Browser) -> Iterator[Reader]:
    """Look at MLflow's pages."""
    reader = Reader(browser, None)
    yield reader
    assert reader.asked <= {"127.0.0.1", None}


def test_browser_shows_what_runs_when_at_a_site(site_page: Reader, rejected: Begun) -> None:
    site = rejected.sites[0]
    shown = ("prepare-site", "train-encoders", "check-data", "audit-privacy", site.root.name,
             "At 01:17 AM every day", "only on Saturday")  # fmt: skip
    text = site_page.read(
        f"{_flows(site)}/deployments", *shown, picture="deployments", height_px=560
    )
    assert "upgrade" not in text.lower()


def test_browser_says_what_a_run_is_begun_with(site_page: Reader, rejected: Begun) -> None:
    site = rejected.sites[0]
    found = site.api.get(f"/deployments/name/prepare-site/{site.root.name}")
    page = f"{_flows(site)}/deployments/deployment/{found['id']}"
    site_page.read(page, "Parameters", "flows.site.prepare_site")
    said = ("Name of the study, as in the folder's study.toml.", "Opaque name of the site.")
    site_page.read(f"{page}/run", *said, picture="begin", height_px=820)


def test_browser_shows_a_studys_run_with_its_table(flows_page: Reader, rejected: Begun) -> None:
    home, run = rejected.home, rejected.runs["study"]
    page = f"{_flows(home)}/runs/flow-run/{run}"
    flows_page.read(page, f"study-{STUDY}", "results", tab="Artifacts", picture="run",
                    height_px=1160)  # fmt: skip
    table = f"{_flows(home)}/artifacts/artifact/{home.artifact(run, 'results')['id']}"
    flows_page.read(table, "Federated", *rejected.parties.sites, picture="results", height_px=650)


def test_browser_shows_the_gates_that_a_version_passed(flows_page: Reader, rejected: Begun) -> None:
    home, run = rejected.home, rejected.runs["promote"]
    table = f"{_flows(home)}/artifacts/artifact/{home.artifact(run, 'gates')['id']}"
    flows_page.read(table, "concordance", "signature", picture="gates", height_px=990)


def test_browser_shows_how_the_champion_does_today(flows_page: Reader, rejected: Begun) -> None:
    home, run = rejected.home, rejected.runs["evaluation"]
    table = f"{_flows(home)}/artifacts/artifact/{home.artifact(run, 'evaluation')['id']}"
    shown = ("when registered", "patients without it", "shift of the mean")
    flows_page.read(table, *shown, picture="evaluation", height_px=1520)


def test_browser_shows_model_and_version_with_card_aliases_tags_and_lineage(
    models_page: Reader, rejected: Begun
) -> None:
    home = rejected.home
    address = f"{home.services.mlflow}/#/models"
    page = f"{address}/{STUDY}-fusion"
    models_page.read(address, f"{STUDY}-fusion", "Version 2")
    models_page.read(page, "champion", "candidate", "Version 1", "Version 2")
    tags = ("consilium.protocol", "consilium.code", "consilium.signed_by", "gate.concordance")
    shown = ("What it is for", "champion", "Source Run", *tags)
    models_page.read(f"{page}/versions/1", *shown, picture="version", height_px=890)
    run = _mlflow(home, f"runs/get?run_id={_version(home, 1)['run_id']}")["run"]
    source = models_page.link(run["info"]["run_name"], f"/runs/{run['info']['run_id']}")
    logged = models_page.link(f"{STUDY}-fusion", "/models/m-")
    (site,) = [x["dataset"] for x in run["inputs"]["dataset_inputs"]
               if x["dataset"]["name"] == rejected.sites[0].root.name]  # fmt: skip
    shown = ("Datasets", f"{site['name']} ({site['digest']})", "federated/concordance")
    models_page.read(f"{home.services.mlflow}/{source}", *shown, picture="study", height_px=1000)
    metrics = {x["key"]: x["value"] for x in run["data"]["metrics"]}
    value = str(metrics["federated/concordance"])[:12]
    shown = ("About this logged model", "federated/concordance", value)
    models_page.read(f"{home.services.mlflow}/{logged}", *shown)


def _flows(party: PartyHere) -> str:
    return party.services.prefect_api.removesuffix("/api")
