"""The flow that promotes a version: gates, a wait for people's signed decisions, the alias moved.

The flow may be killed and run again at any point: what it does to the registry and to the audit log
is done once, and a decision that Prefect hands over again is checked again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run as this_run
from prefect.states import Completed, Failed
from pydantic import Field

from flows.decisions import (
    NO_REASON,
    Request,
    Signed,
    Tally,
    deciders_of,
    kept_reason,
    tally,
    write_request,
)
from flows.described import Slug, described
from flows.dossier import refresh_dossier
from flows.gates import (
    GateResult,
    all_gates,
    all_pass,
    failed,
    gates_digest,
    gates_table,
    shown,
)
from flows.identity import identity
from flows.mlflow_store import client_of
from flows.noted_tags import GATES, PROMOTED, REJECTED, digests_of, note_tags, of_decision
from flows.policy import read_policy
from flows.promotable import (
    CHALLENGER,
    CHAMPION,
    DECIDED_TAG,
    NO_CHAMPION,
    PREVIOUS_TAG,
    REJECTED_TAG,
    Case,
    aliases_of,
    open_case,
)
from flows.registry import model_name
from flows.sealed import SiteError, log_to, note, sealed
from flows.skips import skipped
from fusion.audit import LOG_FILE, AuditLog
from fusion.federation.consortium import COORDINATOR
from fusion.keys import canonical_json, digest
from infra.settings import Workspace

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mlflow import MlflowClient
    from prefect.client.schemas import State

    from flows.decisions import Fault

GATES_FAILED: Final = "GatesFailed"
_DAY_S: Final = 86_400


class Decision(RunInput):
    """What the waiting flow is answered; `consilium approve` fills it in and signs it."""

    decision: Literal["approve", "reject"] = Field(description="signed by `consilium approve`")
    reason: str = Field(
        default=NO_REASON, pattern=r"^[a-z_]{1,40}$", description="code, for a rejection"
    )
    reason_digest: str = Field(default="", pattern=r"^([0-9a-f]{64})?$")
    approver: str = Field(pattern=r"^[0-9a-f]{64}$", description="public key of who decides")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$", description="of the whole decision")


@flow(
    name="promote", flow_run_name="promote-{study}-{version}", persist_result=False,
    log_prints=False,
)  # fmt: skip
@described
@sealed
def promote(study: Slug, version: int) -> State[Any]:
    """Check a version against the gates, wait for people's decision, and make it the champion.

    Ends as ``Skipped`` where another run waits for a decision over the same version.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    version
        Number of the version of the study's model.
    """
    workspace = Workspace()
    log_to(workspace.root)
    flow_run = _flow_run_id()
    other = under_way(study, version, flow_run)
    if other is not None:
        return skipped(f"run {other[:8]} decides over this version already")
    case = open_version(workspace, study, version, flow_run)
    results = all_gates(case.given)
    request = request_of(case, results, flow_run=flow_run)
    table = gates_table(results)
    _publish(table)
    record_gates(workspace, case, results)
    if not all_pass(results):
        return Failed(name=GATES_FAILED, message=f"gates: {', '.join(failed(results))}")
    write_request(workspace.root, request, table)
    found = settle(request, workspace, ask=_ask)
    finish(workspace, case, request, found)
    try:
        renew_dossier(workspace, case)
    except SiteError as error:  # the decision stands; `consilium dossier` writes it again
        note(error.cause)
    return Completed(name="Promoted" if found.outcome == "approve" else "Rejected")


def settle(
    request: Request, workspace: Workspace, *, ask: Callable[[int, str, float], Signed]
) -> Tally:
    """Ask for decisions until they come to an outcome; each is noted in the audit log, once.

    Parameters
    ----------
    ask
        Given the number of the decision, from 0, what became of the one before, and the seconds
        that people have, gives the next one.
    """
    policy = read_policy().promotion
    decisions: list[Signed] = []
    said = ""
    while True:
        decisions.append(ask(len(decisions), said, policy.timeout_days * _DAY_S))
        deciders = deciders_of(workspace.root)
        found = tally(request, decisions, deciders=deciders, policy=policy)
        last = len(decisions) - 1
        fault = found.faults.get(last)
        note_decision(workspace.root, request, decisions[last], number=last, fault=fault)
        if found.outcome is not None:
            return found
        said = (
            f"The last answer was refused: {fault}."
            if fault
            else f"{len(found.counted)} of {policy.quorum} approvals are there."
        )


def _ask(number: int, said: str, seconds: float) -> Signed:
    """Let the flow wait for its next decision; a run that was resumed gets what it was given."""
    described = (
        "Run `consilium approve` at the coordinator, which shows the gates, signs the decision and "
        f"sends it. {said}"
    )
    given = suspend_flow_run(
        wait_for_input=Decision.with_initial_data(description=described.strip()),
        timeout=round(seconds),
        key=f"decision-{number}",
    )
    return Signed(
        given.decision, given.reason, given.reason_digest, given.approver, given.signature
    )


@task(name="look-for-another", cache_policy=NO_CACHE, persist_result=False)
@sealed
def under_way(study: str, version: int, flow_run: str) -> str | None:
    """Find another run of this flow that has begun to decide over a version and not ended."""
    unfinished = ("SCHEDULED", "PENDING", "RUNNING", "PAUSED")
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_filter=FlowFilter.model_validate({"name": {"any_": ["promote"]}}),
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": unfinished}}}),
            sort=FlowRunSort.START_TIME_ASC,
            limit=200,
        )
    asked = {"study": study, "version": version}
    ids = [str(run.id) for run in found if run.run_count and run.parameters == asked]
    return next((other for other in ids if other != flow_run), None)


def _flow_run_id() -> str:
    return str(this_run.id or "")


def _publish(table: str) -> None:
    create_markdown_artifact(table, key="gates", description="What the version reached")


def request_of(case: Case, results: Sequence[GateResult], *, flow_run: str) -> Request:
    """State what is decided over."""
    return Request(case.study, case.version, case.model, case.run, gates_digest(results), flow_run)


@task(name="open-version", cache_policy=NO_CACHE, persist_result=False)
@sealed
def open_version(workspace: Workspace, study: str, version: int, flow_run: str) -> Case:
    """Read what the gates look at."""
    return open_case(workspace, study, version, flow_run=flow_run)


@task(name="record-gates", cache_policy=NO_CACHE, persist_result=False)
@sealed
def record_gates(workspace: Workspace, case: Case, results: Sequence[GateResult]) -> None:
    """Tag a version with what its gates found, and make it the challenger where none failed."""
    client, name = client_of(workspace.mlflow_uri), model_name(case.study)
    tags = {f"gate.{x.name}": x.word for x in results}
    tags |= {f"gate.{x.name}.found": shown(x.found)[:500] for x in results}
    tags["consilium.gates"] = gates_digest(results)
    for key, value in tags.items():
        client.set_model_version_tag(name, str(case.version), key, value)
    about = {"model": name, "version": case.version, "passed": all_pass(results)}
    note_tags(workspace.root, GATES, tags, **about)
    aliases = aliases_of(client, name)
    if all_pass(results) and aliases.get(CHAMPION) != case.version:
        client.set_registered_model_alias(name, CHALLENGER, str(case.version))
    elif aliases.get(CHALLENGER) == case.version:
        client.delete_registered_model_alias(name, CHALLENGER)


@task(name="finish-promotion", cache_policy=NO_CACHE, persist_result=False)
@sealed
def finish(workspace: Workspace, case: Case, request: Request, found: Tally) -> None:
    """Move the alias, or say why not; then the audit log."""
    client = client_of(workspace.mlflow_uri)
    if found.outcome == "approve":
        approve_version(client, case, found, flow_run=request.flow_run)
    else:
        last = found.counted[-1]
        text = kept_reason(workspace.root, request.flow_run, last.reason_digest)
        reject_version(client, case, last, text=text, flow_run=request.flow_run)
    kind, name = PROMOTED if found.outcome == "approve" else REJECTED, model_name(case.study)
    # Read back: a run that was killed after it wrote them does not write them again.
    tags = client.get_model_version(name, str(case.version)).tags
    _append_once(
        workspace.root,
        kind,
        {"flow_run": request.flow_run},
        model=name,
        version=case.version,
        digest=case.model,
        gates=request.gates,
        by=[signed.approver for signed in found.counted],
        tags=digests_of(of_decision(tags)),
    )


@task(name="renew-dossier", cache_policy=NO_CACHE, persist_result=False)
@sealed
def renew_dossier(workspace: Workspace, case: Case) -> None:
    """Write who decided into the version's dossier."""
    refresh_dossier(workspace, case.study, case.version)


def approve_version(client: MlflowClient, case: Case, found: Tally, *, flow_run: str) -> None:
    """Make a version the champion, and remember which one was before; the same again is nothing."""
    name, version = model_name(case.study), str(case.version)
    aliases = aliases_of(client, name)
    if aliases.get(CHAMPION) != case.version:
        before = aliases.get(CHAMPION)
        tags = {
            PREVIOUS_TAG: NO_CHAMPION if before is None else str(before),
            DECIDED_TAG: flow_run,
            "approved_by": ",".join(signed.approver for signed in found.counted),
            "approved_at": now_text(),
            "decision_signature": ",".join(signed.signature for signed in found.counted),
        }
        for key, value in tags.items():
            client.set_model_version_tag(name, version, key, value)
        client.set_registered_model_alias(name, CHAMPION, version)
    if aliases.get(CHALLENGER) == case.version:
        client.delete_registered_model_alias(name, CHALLENGER)


def reject_version(
    client: MlflowClient, case: Case, signed: Signed, *, text: str, flow_run: str
) -> None:
    """Tag a version with why it was turned down; it is no challenger any more."""
    name, version = model_name(case.study), str(case.version)
    tags = {
        "consilium.rejected_by": signed.approver,
        "consilium.rejected_at": now_text(),
        "decision_signature": signed.signature,
        **({"consilium.rejected_reason": text} if text else {}),
        DECIDED_TAG: flow_run,
        REJECTED_TAG: signed.reason,
    }
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    if aliases_of(client, name).get(CHALLENGER) == case.version:
        client.delete_registered_model_alias(name, CHALLENGER)


def now_text() -> str:
    """Time of now as tags hold it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def note_decision(
    root: Path, request: Request, signed: Signed, *, number: int, fault: Fault | None
) -> None:
    """Write to the audit log what was decided and by which key, or why it did not count; once."""
    _append_once(
        root,
        "promotion_decision",
        {"flow_run": request.flow_run, "number": number},
        version=request.version,
        decision=signed.decision,
        reason=signed.reason,
        approver=signed.approver,
        counts=fault is None,
        fault=fault or "",
        request=digest(canonical_json(vars(request))),
        signature=[signed.signature[:64], signed.signature[64:]],
    )


def _append_once(root: Path, kind: str, known: dict[str, Any], **about: Any) -> None:
    """Append an entry unless one of this kind with these values is there: a rerun repeats none."""
    home = root / COORDINATOR
    log = AuditLog(home / LOG_FILE, party=COORDINATOR, key=identity(home))
    try:
        with log.held():
            entries = (e.about for e in log.entries() if e.kind == kind)
            if not any(known.items() <= dict(about_of).items() for about_of in entries):
                log.append(kind, **known, **about)
    finally:
        log.close()
