"""Promotion: who may decide, that nothing else counts, and that a killed run does things once."""

from __future__ import annotations

import dataclasses
import json
import shutil
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import promotable, promotion
from flows.approvals import Statement, approve, sites_that_approved
from flows.champion_check import _axes, alarms, evaluate_again, registered_model
from flows.decisions import (
    DecisionRefused,
    PromotionRefused,
    Request,
    Signed,
    deciders_of,
    keep_reason,
    kept_reason,
    read_request,
    sign_decision,
    tally,
    write_request,
)
from flows.gates import GateInput, all_gates, cohorts_of
from flows.identity import identity
from flows.mlflow_store import artifacts_below, client_of, model_id_of
from flows.monitoring import evaluation_metrics, to_markdown
from flows.noted_tags import digests_of, of_decision
from flows.policy import MonitoringPolicy, PromotionPolicy
from flows.promotable import CHALLENGER, CHAMPION, Case, aliases_of
from flows.record_values import record_values
from flows.registry import track_study
from flows.report_files import write_report
from fusion.audit import LOG_FILE, read_entries
from fusion.federation import InProcess, SiteStudy, run_federation, summarise
from fusion.federation.consortium import COORDINATOR, Consortium
from fusion.keys import SigningKey
from infra.settings import Workspace
from tests.simulated_record import full_record
from tests.test_registry import site_rows, study_protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mlflow import MlflowClient

pytestmark = pytest.mark.border

RUN = "f0e1d2c3-0000-4000-8000-000000000001"
REQUEST = Request("lung", 1, "a" * 64, "b" * 64, "c" * 64, RUN)
BOARD, SITE, STRANGER = (SigningKey(bytes([i]) * 32) for i in (1, 2, 3))
DECIDERS = {BOARD.public: "board", SITE.public: "site-01"}
RECORD_GATES, FINISH = promotion.record_gates.fn, promotion.finish.fn
RENEW = promotion.renew_dossier.fn
POLICY = PromotionPolicy(quorum=1, reasons=("data_quality", "other"))


def counted(*decisions: Signed, quorum: int = 1, request: Request = REQUEST) -> Any:
    policy = POLICY.model_copy(update={"quorum": quorum})
    return tally(request, decisions, deciders=DECIDERS, policy=policy)


def approval(key: SigningKey = BOARD, request: Request = REQUEST) -> Signed:
    return sign_decision(request, "approve", key)


def rejection(key: SigningKey = BOARD, reason: str = "data_quality", text: str = "") -> Signed:
    return sign_decision(REQUEST, "reject", key, reason=reason, text=text)


def test_one_known_key_decides_where_one_is_enough() -> None:
    assert counted(approval()).outcome == "approve"
    assert counted(rejection()).outcome == "reject"


def test_a_stranger_s_key_counts_for_nothing() -> None:
    found = counted(approval(STRANGER))
    assert (found.outcome, found.faults) == (None, {0: "unknown_key"})


def test_a_quorum_is_of_different_keys_and_one_rejection_ends_it() -> None:
    assert counted(approval(), approval(), quorum=2).faults == {1: "already_decided"}
    assert counted(approval(), approval(SITE), quorum=2).outcome == "approve"
    assert counted(approval(), rejection(SITE), quorum=2).outcome == "reject"


def test_two_keys_of_one_party_are_one_voice() -> None:
    policy = POLICY.model_copy(update={"quorum": 2})
    deciders = dict.fromkeys((BOARD.public, SITE.public), COORDINATOR)
    found = tally(REQUEST, [approval(), approval(SITE)], deciders=deciders, policy=policy)
    assert (found.outcome, found.faults) == (None, {1: "already_decided"})


@pytest.mark.parametrize(
    "change",
    [
        {"study": "other"}, {"version": 2}, {"model": "d" * 64}, {"run": "d" * 64},
        {"gates": "d" * 64}, {"flow_run": "another"},
    ],
)  # fmt: skip
def test_a_decision_is_over_exactly_what_was_seen(change: dict[str, Any]) -> None:
    signed = approval(request=dataclasses.replace(REQUEST, **change))
    assert counted(signed).faults == {0: "wrong_signature"}


@pytest.mark.parametrize(
    "change",
    [
        {"decision": "reject", "reason": "other"}, {"reason_digest": "e" * 64},
        {"approver": SITE.public}, {"signature": "0" * 128}, {"signature": "zz"},
    ],
)  # fmt: skip
def test_a_changed_decision_does_not_count(change: dict[str, str]) -> None:
    found = counted(dataclasses.replace(approval(), **change))  # type: ignore[arg-type]
    assert (found.outcome, found.faults) == (None, {0: "wrong_signature"})


def test_reasons_are_those_of_the_policy_and_approvals_have_none() -> None:
    assert counted(rejection(reason="dislike")).faults == {0: "unknown_reason"}
    signed = sign_decision(REQUEST, "approve", BOARD, reason="other")
    assert counted(signed).faults == {0: "unknown_reason"}


@given(st.integers(0, 127), st.integers(1, 15))
def test_no_signature_but_the_one(at: int, shift: int) -> None:
    signed = approval()
    digits = list(signed.signature)
    digits[at] = f"{(int(digits[at], 16) + shift) % 16:x}"
    assert counted(dataclasses.replace(signed, signature="".join(digits))).outcome is None


@pytest.mark.parametrize("text", ["patient 12345", "born 1950", "a\nb", "x" * 201, "mail a@b"])
def test_a_reason_that_may_name_a_patient_is_refused(text: str) -> None:
    with pytest.raises(DecisionRefused, match="--reason"):
        rejection(text=text)


def test_a_kept_reason_is_what_was_signed_or_nothing(tmp_path: Path) -> None:
    signed = rejection(text="calibration at one site")
    keep_reason(tmp_path, RUN, "calibration at one site")
    assert kept_reason(tmp_path, RUN, signed.reason_digest) == "calibration at one site"
    (file,) = (tmp_path / COORDINATOR / "promotions").glob("*.txt")
    file.write_text("something else")
    assert kept_reason(tmp_path, RUN, signed.reason_digest) == ""
    assert kept_reason(tmp_path, RUN, "") == ""


def consortium(*, revoked: tuple[str, ...] = ()) -> Consortium:
    key = SigningKey(bytes([9]) * 32).public
    sites = {"site-01": SITE.public, "site-02": SigningKey(bytes([4]) * 32).public}
    return Consortium("lung", key, sites, quorum=2, revoked=revoked)


def test_those_may_decide_whom_the_consortium_and_the_board_s_file_list(tmp_path: Path) -> None:
    assert deciders_of(tmp_path) == {}
    own = identity(tmp_path / COORDINATOR).public
    assert deciders_of(tmp_path) == {own: COORDINATOR}
    kit = tmp_path / "kits" / COORDINATOR
    kit.mkdir(parents=True)
    (kit / "consortium.json").write_bytes(consortium(revoked=(SITE.public,)).to_bytes())
    board = tmp_path / COORDINATOR / "approvers.json"
    board.write_text(json.dumps({"board": BOARD.public}))
    found = deciders_of(tmp_path)
    assert found[BOARD.public] == "board"
    assert SITE.public not in found
    assert set(found.values()) == {"board", COORDINATOR, "site-02"}
    board.write_text(json.dumps({"Board": BOARD.public}))
    with pytest.raises(DecisionRefused, match=r"approvers\.json"):
        deciders_of(tmp_path)


def test_sites_approve_a_protocol_of_their_own_consortium() -> None:
    among = consortium()
    statement = Statement("lung", "1" * 64, "2" * 64, among.digest(), "3" * 64)
    signed = [approve(statement, "site-01", SITE), approve(statement, "site-02", STRANGER)]
    assert sites_that_approved(signed, protocol="1" * 64, consortium=among) == {"site-01"}
    assert sites_that_approved(signed, protocol="9" * 64, consortium=among) == set()


def test_a_request_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_request(tmp_path, REQUEST, "| gate |")
    assert read_request(tmp_path, RUN) == (REQUEST, "| gate |")
    with pytest.raises(DecisionRefused, match="found no request"):
        read_request(tmp_path, "another")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    values = record_values(full_record(), created=datetime(2026, 11, 2, tzinfo=UTC))
    return dict(json.loads(json.dumps(values)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def client(store: str, request: pytest.FixtureRequest) -> MlflowClient:
    found = client_of(store)
    if not found.search_registered_models("name = 'lung-fusion'"):
        found.create_registered_model("lung-fusion")
    for alias in aliases_of(found, "lung-fusion"):
        found.delete_registered_model_alias("lung-fusion", alias)
    return found


def new_version(client: MlflowClient, store: str, tmp_path: Path) -> int:
    made = client.create_model_version("lung-fusion", source=tmp_path.as_uri())
    return int(made.version)


def case_of(version: int, record: dict[str, Any], **options: Any) -> Case:
    gates = GateInput(record, **{"signature_fault": "", **options})
    return Case("lung", version, "b" * 64, "a" * 64, None, gates)


def workspace_of(tmp_path: Path, store: str) -> Workspace:
    return Workspace(root=tmp_path, tracking_uri=store)


def played(
    monkeypatch: pytest.MonkeyPatch, workspace: Workspace, case: Case, answers: list[Any]
) -> tuple[Any, list[str]]:
    """Run the flow's body, with a person's answers in place of Prefect's form."""
    said: list[str] = []

    def ask(number: int, text: str, seconds: float) -> Signed:
        said.append(text)
        request, _ = read_request(workspace.root, RUN)
        answer = answers[number]
        if isinstance(answer, BaseException):
            raise answer
        found: Signed = answer(request)
        return found

    monkeypatch.setattr(promotion, "Workspace", lambda: workspace)
    monkeypatch.setattr(promotion, "log_to", lambda folder: None)
    monkeypatch.setattr(promotion, "_flow_run_id", lambda: RUN)
    monkeypatch.setattr(promotion, "_publish", lambda table: None)
    monkeypatch.setattr(promotion, "under_way", lambda study, version, flow_run: None)
    monkeypatch.setattr(promotion, "open_version", lambda *given: case)
    monkeypatch.setattr(promotion, "record_gates", RECORD_GATES)
    monkeypatch.setattr(promotion, "finish", FINISH)
    # No report was written here: the decision must stand without its dossier.
    monkeypatch.setattr(promotion, "renew_dossier", RENEW)
    monkeypatch.setattr(promotion, "_ask", ask)
    return promotion.promote.fn("lung", case.version), said


def approving(key: SigningKey) -> Callable[[Request], Signed]:
    return lambda request: sign_decision(request, "approve", key)


def tags_of(client: MlflowClient, version: int) -> dict[str, str]:
    return dict(client.get_model_version("lung-fusion", str(version)).tags)


def kinds(root: Path) -> list[str]:
    return [entry.kind for entry in read_entries(root / COORDINATOR / LOG_FILE)]


def test_an_approved_version_is_the_champion_and_remembers_the_one_before(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, store: str, tmp_path: Path,
    record: dict[str, Any],
) -> None:  # fmt: skip
    before, version = new_version(client, store, tmp_path), new_version(client, store, tmp_path)
    client.set_registered_model_alias("lung-fusion", CHAMPION, str(before))
    key, workspace = identity(tmp_path / COORDINATOR), workspace_of(tmp_path, store)
    answers = [approving(STRANGER), approving(key)]
    state, said = played(monkeypatch, workspace, case_of(version, record), answers)
    assert (state.type.value, state.name) == ("COMPLETED", "Promoted")
    assert said == ["", "The last answer was refused: unknown_key."]
    assert aliases_of(client, "lung-fusion") == {CHAMPION: version}
    tags = tags_of(client, version)
    assert tags["approved_by"] == key.public
    assert tags["consilium.previous_champion"] == str(before)
    assert tags["gate.concordance"] == "passed"
    # The process ends while people think: the flow begins anew and is handed the same answers.
    played(monkeypatch, workspace, case_of(version, record), answers)
    assert tags_of(client, version) == tags
    assert kinds(tmp_path) == ["gates", "promotion_decision", "promotion_decision", "promoted"]


def test_a_rejected_version_keeps_why_and_is_no_challenger(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, store: str, tmp_path: Path,
    record: dict[str, Any],
) -> None:  # fmt: skip
    version = new_version(client, store, tmp_path)
    key, workspace = identity(tmp_path / COORDINATOR), workspace_of(tmp_path, store)
    keep_reason(tmp_path, RUN, "too few women")

    def reject(request: Request) -> Signed:
        assert aliases_of(client, "lung-fusion") == {CHALLENGER: version}
        return sign_decision(
            request, "reject", key, reason="unfair_to_a_subgroup", text="too few women"
        )

    state, _ = played(monkeypatch, workspace, case_of(version, record), [reject])
    assert (state.type.value, state.name) == ("COMPLETED", "Rejected")
    tags = tags_of(client, version)
    assert tags["consilium.rejected"] == "unfair_to_a_subgroup"
    assert tags["consilium.rejected_reason"] == "too few women"
    assert aliases_of(client, "lung-fusion") == {}
    assert kinds(tmp_path) == ["gates", "promotion_decision", "promotion_rejected"]
    noted = read_entries(tmp_path / COORDINATOR / LOG_FILE)[-1].about["tags"]
    assert noted == digests_of(of_decision(tags))
    assert {"consilium.rejected", "consilium.rejected_reason", "decision_signature"} <= {
        x.rpartition(":")[0] for x in noted
    }


def test_a_failed_gate_ends_it_with_its_name_and_asks_nobody(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, store: str, tmp_path: Path,
    record: dict[str, Any],
) -> None:  # fmt: skip
    version = new_version(client, store, tmp_path)
    case = case_of(version, record, signature_fault="model: found x changed")
    state, said = played(monkeypatch, workspace_of(tmp_path, store), case, [])
    assert (state.type.value, state.name) == ("FAILED", "GatesFailed")
    assert state.message == "gates: signature"
    assert said == []
    assert tags_of(client, version)["gate.signature"] == "failed"
    assert aliases_of(client, "lung-fusion") == {}
    (entry,) = read_entries(tmp_path / COORDINATOR / LOG_FILE)
    assert (entry.kind, entry.about["passed"]) == ("gates", False)


def test_a_promotion_beside_one_of_the_same_version_is_skipped_and_touches_nothing(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, store: str, tmp_path: Path
) -> None:
    version, other = new_version(client, store, tmp_path), "0badc0de-0000-4000-8000-000000000002"
    monkeypatch.setattr(promotion, "Workspace", lambda: workspace_of(tmp_path, store))
    monkeypatch.setattr(promotion, "_flow_run_id", lambda: RUN)
    monkeypatch.setattr(promotion, "under_way", lambda *asked: other)
    state: Any = promotion.promote.fn("lung", version)
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert state.message == "run 0badc0de decides over this version already"
    assert tags_of(client, version) == {}
    assert not (tmp_path / COORDINATOR).exists()


@pytest.mark.parametrize(
    ("parameters", "run_count", "run", "found"),
    [
        ({"study": "lung", "version": 1}, 1, "another", "another"),
        ({"study": "lung", "version": 1}, 2, RUN, None),
        ({"study": "lung", "version": 1}, 0, "not begun", None),
        ({"study": "lung", "version": 2}, 1, "another", None),
    ],
)
def test_another_promotion_is_one_of_the_same_version_that_has_begun(
    monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], run_count: int, run: str,
    found: str | None,
) -> None:  # fmt: skip
    known = SimpleNamespace(id=run, parameters=parameters, run_count=run_count)

    class Client:
        def __enter__(self) -> Any:
            return SimpleNamespace(read_flow_runs=lambda **asked: [known])

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(promotion, "get_client", lambda **given: Client())
    assert promotion.under_way.fn("lung", 1, RUN) == found


def test_a_kill_between_alias_and_log_leaves_nothing_undone(
    monkeypatch: pytest.MonkeyPatch, client: MlflowClient, store: str, tmp_path: Path,
    record: dict[str, Any],
) -> None:  # fmt: skip
    version = new_version(client, store, tmp_path)
    key, workspace = identity(tmp_path / COORDINATOR), workspace_of(tmp_path, store)
    append = promotion._append_once

    def killed(root: Path, kind: str, known: dict[str, Any], **about: Any) -> None:
        if kind == "promoted":
            raise KeyboardInterrupt
        append(root, kind, known, **about)

    monkeypatch.setattr(promotion, "_append_once", killed)
    with pytest.raises(KeyboardInterrupt):
        played(monkeypatch, workspace, case_of(version, record), [approving(key)])
    assert aliases_of(client, "lung-fusion") == {CHAMPION: version}
    monkeypatch.setattr(promotion, "_append_once", append)
    played(monkeypatch, workspace, case_of(version, record), [approving(key)])
    assert kinds(tmp_path) == ["gates", "promotion_decision", "promoted"]
    assert tags_of(client, version)["consilium.previous_champion"] == "none"


@pytest.mark.parametrize(
    ("tags", "aliases", "sentence"),
    [
        ({"consilium.rejected": "other"}, {}, "found it rejected"),
        ({}, {CHAMPION: 3}, "in use already"),
    ],
)
def test_what_another_promotion_decided_stands(
    tags: dict[str, str], aliases: dict[str, int], sentence: str
) -> None:
    found: Any = SimpleNamespace(name="lung-fusion", version="3", tags=tags)
    with pytest.raises(PromotionRefused, match=sentence):
        promotable._refuse_decided(found, aliases)


def signature_gate(workspace: Workspace, version: int) -> str:
    return promotable.open_case(workspace, "lung-os", version).given.signature_fault


@pytest.mark.border
@pytest.mark.slow
def test_the_registry_alone_cannot_make_a_version_look_better(tmp_path: Path) -> None:
    """Whoever may write to MLflow can change a run's record, and put another signed model there."""
    workspace, made = Workspace(root=tmp_path), datetime(2026, 11, 2, tzinfo=UTC)
    runs = [dataclasses.replace(full_record(), run=letter * 64) for letter in "ab"]
    for number, run in enumerate(runs, start=1):
        found = track_study(
            run,
            tracking_uri=workspace.mlflow_uri,
            artifact_root=tmp_path / "artifacts",
            report=write_report(run, tmp_path / "runs" / run.run[:12], created=made),
            key=identity(tmp_path / COORDINATOR),
        )
        assert found.version == number
        assert signature_gate(workspace, number) == ""
    client = client_of(workspace.mlflow_uri)
    first, second = (client.get_model_version("lung-os-fusion", str(x)) for x in (1, 2))
    models = [artifacts_below(tmp_path, "models", model_id_of(x)) for x in (first, second)]
    (record,) = tmp_path.glob(f"artifacts/*/{first.run_id}/artifacts/record.json")
    values = json.loads(record.read_text())
    values["totals"]["n_test_events"] += 100
    record.write_text(json.dumps(values))
    assert "record.json: found it changed" in signature_gate(workspace, 1)
    assert models[0] is not None
    assert models[1] is not None
    shutil.rmtree(models[1])
    shutil.copytree(models[0], models[1])
    assert "not of this run" in signature_gate(workspace, 2)


@pytest.fixture(scope="module")
def study() -> tuple[Any, Any, dict[str, Any]]:
    """Run a small study, and give its plan, its rows and what it logs."""
    rng = np.random.default_rng(0)
    protocol = study_protocol()
    rows = {"site-01": site_rows(rng, 300), "site-02": site_rows(rng, 180)}
    rows["site-03"] = site_rows(rng, 60, external=True)
    plan = protocol.plan("a" * 64)
    fitted = run_federation(plan, InProcess({s: SiteStudy(plan, x) for s, x in rows.items()}))
    from flows.records import StudyRecord

    made = StudyRecord("a" * 64, protocol, fitted, summarise(fitted), "0" * 40)
    values = record_values(made, created=datetime(2026, 11, 2, tzinfo=UTC))
    encoders = {name: encoder.to_dict() for name, encoder in fitted.encoders.items()}
    return plan, rows, {"record": json.loads(json.dumps(values)), "encoders": encoders}


def again(study: tuple[Any, Any, dict[str, Any]], **options: Any) -> Any:
    plan, rows, logged = study
    sites = InProcess({s: SiteStudy(plan, x) for s, x in rows.items()})
    return evaluate_again(plan, sites, registered_model(**logged, networks={}), **options)


def test_a_model_evaluated_again_on_the_same_rows_gives_the_same_figures(
    study: tuple[Any, Any, dict[str, Any]],
) -> None:
    found = again(study)
    assert set(found.now) == set(found.then) >= {"concordance", "observed_expected"}
    for name, now in found.now.items():
        then = dataclasses.astuple(found.then[name])
        assert dataclasses.astuple(now) == pytest.approx(then, rel=1e-6), name
    assert found.cohorts == cohorts_of(study[2]["record"])
    of_inputs = [x for x in found.shifts if "/" in x.name]
    assert max(abs(x.shift or 0.0) for x in of_inputs) < 1e-9
    assert alarms(found, MonitoringPolicy()) == {}
    assert "No alarm." in to_markdown(found, {}, version=1)
    assert evaluation_metrics(found)["concordance_loss"] == pytest.approx(0.0, abs=1e-9)


def test_nothing_is_asked_where_the_cohorts_are_known(
    study: tuple[Any, Any, dict[str, Any]],
) -> None:
    seen: list[dict[str, str]] = []
    rounds: list[Any] = []
    found = again(study, unless=lambda x: not seen.append(x), on_round=rounds.append)
    assert found is None
    assert [x.stage for x in rounds] == ["describe"]
    assert seen == [cohorts_of(study[2]["record"])]


def test_moved_inputs_raise_an_alarm_that_names_them(
    study: tuple[Any, Any, dict[str, Any]],
) -> None:
    plan, rows, logged = study
    moved = {}
    for site, of_site in rows.items():
        table = of_site.tables["clinical"]
        shifted = dataclasses.replace(table, train=table.train + 1.0, test=table.test + 1.0)
        moved[site] = dataclasses.replace(of_site, tables=of_site.tables | {"clinical": shifted})
    found = again((plan, moved, logged))
    raised = alarms(found, MonitoringPolicy(), missing_before={"blood": 0.9})
    assert {"input_shift", "missing_modality"} <= set(raised)
    assert "clinical/age" in raised["input_shift"]
    assert "blood" not in raised["input_shift"]
    text = to_markdown(found, raised, version=1)
    assert raised["input_shift"] in text


def test_a_lost_concordance_and_hidden_figures_raise_alarms(
    study: tuple[Any, Any, dict[str, Any]],
) -> None:
    found = again(study)
    then = found.then["concordance"]
    worse = dataclasses.replace(then, value=then.value - 0.06)
    raised = alarms(dataclasses.replace(found, now={"concordance": worse}), MonitoringPolicy())
    assert set(raised) == {"concordance", "observed_expected"}
    other = dataclasses.replace(found, event_rate=found.event_rate_then + 0.11)
    assert set(alarms(other, MonitoringPolicy())) == {"event_rate"}


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.data())
def test_axes_hold_the_coefficients_whole(values: list[float], data: st.DataObject) -> None:
    beta = np.array(values)
    k = data.draw(st.integers(1, len(beta)))
    axes = _axes(beta, k)
    assert np.allclose(axes.T @ axes, np.eye(k), atol=1e-10)
    assert np.allclose(axes @ (axes.T @ beta), beta, atol=1e-9)


def test_the_gates_of_a_case_are_deterministic(record: dict[str, Any]) -> None:
    case = case_of(1, record)
    first = promotion.request_of(case, all_gates(case.given), flow_run=RUN)
    assert first == promotion.request_of(case, all_gates(case.given), flow_run=RUN)
