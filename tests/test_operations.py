"""Flows that look after a site, run without a server: what they say, and that it names nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import State

from flows import operations, skips
from flows.approvals import FOLDER as APPROVALS
from flows.demo import set_up_federation, write_consortium
from flows.federated import KITS, FederationRefused
from flows.identity import identity
from flows.operations import LOG, audit_privacy, check_data, verify_site_log
from flows.protocol import load_protocol
from flows.sealed import SiteError
from flows.skips import (
    SKIPPED,
    NothingToDo,
    missing_approvals,
    skipped,
    spent_budgets,
    waiting_sites,
)
from flows.study import StudyOutcome, run_study
from fusion.audit import LOG_FILE, AuditLog
from fusion.federation import QuorumNotMet
from fusion.federation.consortium import COORDINATOR
from infra.settings import Workspace
from modalities.cohort import Exclusion

STUDY = "demo-tables"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    write_consortium(folder, (60, 40, 40), seed=1, tables_only=True)
    return folder


@pytest.fixture
def root(tmp_path: Path, written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("CONSILIUM_ROOT", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    # Without a server tasks are their bodies.
    for name in ("check_inputs", "verify_site_log", "attack_models"):
        monkeypatch.setattr(operations, name, getattr(operations, name).fn)
    return tmp_path


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Every artifact that a flow makes."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(operations, "create_table_artifact", lambda **given: made.append(given))
    return made


def faults(n: int) -> list[Exclusion]:
    few = [Exclusion("anna-muster", "clinical", "missing_outcome", "of /data/anna")]
    return few + [
        Exclusion(f"patient-{i}", "pathology", "unreadable", f"/data/{i}.svs") for i in range(n)
    ]


def test_a_sound_site_has_nothing_set_aside(root: Path, shown: list[dict[str, Any]]) -> None:
    assert check_data.fn(STUDY, "site-01") == {}
    assert shown[0]["table"] == []


def test_what_would_be_set_aside_is_counted_by_code(
    root: Path, shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "check_inputs", lambda settings, protocol: faults(12))
    found = check_data.fn(STUDY, "site-01")
    assert found == {"clinical: missing_outcome": 1, "pathology: unreadable": 12}
    assert [row["inputs"] for row in shown[0]["table"]] == [1, 12]
    told = json.dumps(shown)
    assert not [x for x in ("anna", "patient-", "/data", str(root)) if x in told]


@pytest.mark.border
@pytest.mark.parametrize(
    "where",
    [
        {"PREFECT_API_URL": "https://hub.example.org/api"},
        {"PREFECT_API_URL": "http://127.0.0.1:4200/api", "CONSILIUM_SHARED_PREFECT": "true"},
    ],
)
def test_a_shared_server_is_told_no_small_count(
    root: Path, shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, where: dict[str, str]
) -> None:
    study = (root / "study.toml").read_text()
    (root / "study.toml").write_text(study.replace("cell = 1", "cell = 10"))
    least = load_protocol(root / "study.toml").privacy.cell
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(operations, "check_inputs", lambda settings, protocol: faults(12))
    check_data.fn(STUDY, "site-01")
    assert [row["inputs"] for row in shown[0]["table"]] == [f"below {least}", 12]


def test_an_unknown_site_ends_in_a_code_alone(root: Path, shown: list[dict[str, Any]]) -> None:
    with pytest.raises(SiteError) as raised:
        check_data.fn(STUDY, "site-09")
    assert str(raised.value) == "check_data:SettingsError"
    assert not shown


def test_the_logs_verdict_names_the_first_wrong_entry(root: Path) -> None:
    settings = Workspace().site("site-01")
    assert verify_site_log.fn(settings) == "none yet"
    log = AuditLog(settings.path(LOG_FILE), party="site-01", key=identity(settings.home))
    for number in range(3):
        log.append("answered", number=number)
    assert verify_site_log.fn(settings) == "whole"
    lines = settings.path(LOG_FILE).read_text().splitlines(keepends=True)
    settings.path(LOG_FILE).write_text(lines[0] + lines[1].replace('"number":1', '"number":7'))
    assert verify_site_log.fn(settings).startswith("edited at entry ")


def test_an_audit_says_verdicts_and_fails_for_what_is_shared(
    root: Path, shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = {"pathology": "fails", "radiology": "passes"}
    monkeypatch.setattr(operations, "attack_models", lambda settings, protocol: verdicts)
    assert audit_privacy.fn(STUDY, "site-01") == {LOG: "none yet", **verdicts}
    assert {row["what"]: row["verdict"] for row in shown[0]["table"]} == {
        LOG: "none yet",
        **verdicts,
    }
    monkeypatch.setattr(
        "flows.protocol.StudyProtocol.audited", lambda self: ("pathology", "radiology")
    )
    state = audit_privacy.fn(STUDY, "site-01")
    assert isinstance(state, State)
    assert (state.name, state.message) == ("Failed", "look at: pathology")


def test_a_site_that_cannot_be_audited_says_so(
    root: Path, shown: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = audit_privacy.fn(STUDY, "site-01")  # there is no cohort yet
    assert set(found.values()) == {"none yet", "not audited: missing_cohort"}


def test_missing_approvals_are_counted_and_named(root: Path) -> None:
    workspace, protocol = Workspace(), load_protocol(root / "study.toml")
    assert missing_approvals(workspace, protocol) is None  # without kits the run says what to do
    set_up_federation(root, workspace.site_names())
    assert (root / KITS).is_dir()
    assert missing_approvals(workspace, protocol) is None
    (root / COORDINATOR / APPROVALS / "site-02.json").unlink()
    found = missing_approvals(workspace, protocol)
    assert found is not None
    assert "found 2 of this protocol and code, needed 3; missing from site-02" in found


def test_sites_that_wait_are_told_from_those_that_fail() -> None:
    assert waiting_sites({}) is None
    assert waiting_sites({"b": "withdrawn", "a": "not_approved"}) == "a: not_approved, b: withdrawn"
    assert waiting_sites({"a": "not_approved", "b": "unreachable"}) is None
    assert spent_budgets(["", ""]) is None
    assert spent_budgets(["budget_spent", ""]) == "privacy budget: spent at 1 of 2 sites"


@pytest.fixture
def study(root: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run of a study whose federation is what the test says."""
    ends: SimpleNamespace = SimpleNamespace(with_=None)

    def run(*given: Any) -> StudyOutcome:
        ends.given = given
        if isinstance(ends.with_, Exception):
            raise ends.with_
        return ends.with_

    monkeypatch.setattr("flows.study._run", run)
    return ends


def deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skips, "deployment", SimpleNamespace(id="1"))


def outcome(*, reused: bool) -> StudyOutcome:
    return StudyOutcome(summary={"run": "0123456789abcdef"}, table=None, reused=reused)  # type: ignore[arg-type]


def test_a_run_of_the_same_cohorts_is_skipped(study: SimpleNamespace) -> None:
    study.with_ = outcome(reused=True)
    state = run_study.fn(STUDY, [], "memory")
    assert (state.name, state.data) == (SKIPPED, study.with_)
    assert state.is_completed()
    assert "no new snapshot: run 0123456789ab" in state.message
    assert study.given[2] == ("site-01", "site-02", "site-03")
    study.with_ = outcome(reused=False)
    assert run_study.fn(STUDY, ["site-01"], "memory") is study.with_
    assert study.given[2] == ("site-01",)


def test_a_run_that_waits_is_skipped_where_deployed_and_said_at_a_terminal(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    cause = FederationRefused("sites: too few", codes={"a": "not_approved"})
    study.with_ = NothingToDo("a: not_approved", cause)
    with pytest.raises(SiteError) as raised:
        run_study.fn(STUDY, [], "memory")
    assert raised.value.cause is cause
    deployed(monkeypatch)
    state = run_study.fn(STUDY, [], "memory")
    assert (state.name, state.message) == (SKIPPED, "a: not_approved")


def test_a_run_without_approvals_asks_no_site(
    study: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    set_up_federation(root, Workspace().site_names())
    (root / COORDINATOR / APPROVALS / "site-02.json").unlink()
    study.with_ = AssertionError("not to be run")
    deployed(monkeypatch)
    state = run_study.fn(STUDY, [], "flare")
    assert state.name == SKIPPED
    assert "site-02" in state.message


def test_a_spent_budget_is_told_from_other_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows import study as flow

    codes = ["budget_spent", "budget_spent"]

    class Asked:
        def __init__(self, *given: Any, **more: Any) -> None:
            outcomes = {str(i): SimpleNamespace(code=code) for i, code in enumerate(codes)}
            self.talk = SimpleNamespace(outcomes=outcomes)

    def fail(coordinator: Any) -> None:
        raise SiteError("describe_sites:QuorumNotMet", QuorumNotMet("too few"))

    monkeypatch.setattr(flow, "Coordinator", Asked)
    monkeypatch.setattr(flow, "describe_sites", fail)
    progress, folder = SimpleNamespace(advance=None), Path("runs")
    with pytest.raises(NothingToDo, match="spent at 2 of 2 sites"):
        flow._stages(None, None, progress, folder)  # type: ignore[arg-type]
    codes = ["unreachable"]
    with pytest.raises(SiteError, match="QuorumNotMet"):
        flow._stages(None, None, progress, folder)  # type: ignore[arg-type]


def test_a_skipped_state_gives_its_caller_the_outcome() -> None:
    state = skipped("no new snapshot", "the outcome")
    assert state.is_completed()
    assert (state.name, state.message, state.data) == (SKIPPED, "no new snapshot", "the outcome")
