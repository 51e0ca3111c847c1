"""``consilium promote`` and ``consilium approve``: ask for a promotion, and decide over it."""

from __future__ import annotations

import time as clock
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from flows.terminal import Json, Root, UsageError, opened, print_json, say

if TYPE_CHECKING:
    from flows.decisions import Request, Signed
    from flows.prefect_api import PrefectApi
    from flows.serve import Services

FLOW: Final = "promote"
_WAIT_S: Final = 180.0
_POLL_S: Final = 1.0
_DECIDING: Final = ("PENDING", "RUNNING", "SCHEDULED")
# A run is shown as waiting a moment before its form is there.
_FORM_TRIES: Final = 5

Run = Annotated[
    str | None,
    typer.Argument(help="Run that waits: its name, or the first characters of its id; all shown."),
]


@dataclass(frozen=True)
class Waiting:
    """A promotion that waits for a decision."""

    run: str
    name: str
    since: str
    state: str


def promote(
    version: Annotated[
        int | None, typer.Argument(help="Version of the study's model; the newest by default.")
    ] = None,
    root: Root = Path(),
    as_json: Json = False,
) -> None:
    """Start the promotion of a version: gates first, then it waits for `consilium approve`."""
    workspace, protocol = opened(root)
    services = _services(workspace.root)
    api = _api(services)
    from flows.promotable import newest_version

    study, store = protocol.study.name, services.tracking_uri
    workspace = workspace.model_copy(update={"tracking_uri": store})
    number = newest_version(workspace, study) if version is None else version
    deployment = _deployment(api, study)
    started = api.post(
        f"/deployments/{deployment}/create_flow_run",
        {"parameters": {"study": study, "version": number}},
    )
    if as_json:
        print_json({"run": started["id"], "name": started["name"], "version": number})
        return
    say(f"started {started['name']}, run {started['id'][:8]}, for version {number}")
    say("when its gates are passed it waits; then: consilium approve " + started["id"][:8])


def approve(
    run: Run = None,
    reject: Annotated[
        str | None,
        typer.Option("--reject", help="Turn the version down, for a reason of the policy's list."),
    ] = None,
    reason: Annotated[
        str, typer.Option("--reason", help="A few words beside it; they stay with the model.")
    ] = "",
    root: Root = Path(),
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Folder of the identity that signs; the coordinator's."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Sign a decision over a promotion that waits, and let it go on; list them without RUN."""
    workspace, _ = opened(root)
    api = _api(_services(workspace.root))
    found = waiting(api)
    if run is None:
        _print_waiting(found, as_json=as_json)
        return
    chosen = _chosen(found, run)
    request, table = _shown_request(workspace.root, chosen)
    signed = _sign(workspace.root, request, key, reject=reject, reason=reason)
    if not as_json:
        _print_request(request, table, signed)
    _resume(api, chosen.run, signed)
    state = _await_decision(api, chosen.run)
    said = {"run": chosen.run, "version": request.version, "state": state["name"]}
    if as_json:
        print_json(said)
        return
    say(_outcome(state))


def waiting(api: PrefectApi) -> list[Waiting]:
    """Promotions that wait for a decision, the oldest first."""
    asked = {
        "flows": {"name": {"any_": [FLOW]}},
        "flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}},
        "sort": "EXPECTED_START_TIME_ASC",
        "limit": 100,
    }
    return [
        Waiting(x["id"], x["name"], str(x["state"]["timestamp"])[:19], x["state"]["name"])
        for x in api.post("/flow_runs/filter", asked)
    ]


def _services(root: Path) -> Services:
    from flows.serve import running

    services = running(root)
    if services is None:
        raise UsageError(
            "services: found none running for this folder, needed them; start them with `consilium "
            "serve`, and deploy the flows with `consilium deploy`"
        )
    return services


def _api(services: Services) -> PrefectApi:
    from flows.prefect_api import PrefectApi

    return PrefectApi(services.prefect_api, services.prefect_auth)


def _deployment(api: PrefectApi, study: str) -> str:
    asked = {
        "flows": {"name": {"any_": [FLOW]}},
        "deployments": {"name": {"any_": [study]}},
    }
    found = api.post("/deployments/filter", asked)
    if not found:
        raise UsageError(
            "deployment promote: found none on the server, needed it; run `consilium deploy`"
        )
    return str(found[0]["id"])


def _chosen(found: list[Waiting], run: str) -> Waiting:
    matching = [x for x in found if x.run.startswith(run.lower()) or x.name == run]
    if len(matching) != 1:
        known = ", ".join(f"{x.run[:8]} ({x.name})" for x in found) or "none"
        raise UsageError(
            f"run: found {len(matching)} waiting that begin with {run!r}, needed one; waiting: "
            f"{known}"
        )
    return matching[0]


def _shown_request(root: Path, chosen: Waiting) -> tuple[Request, str]:
    from flows.decisions import DecisionRefused, read_request

    request, table = read_request(root, chosen.run)
    if request.flow_run != chosen.run:
        raise DecisionRefused("promotion: found the request of another run, needed this one's")
    return request, table


def _sign(
    root: Path, request: Request, key: Path | None, *, reject: str | None, reason: str
) -> Signed:
    """Sign, unless it is plain already that the flow would refuse it."""
    from flows.decisions import (
        NO_REASON,
        DecisionRefused,
        deciders_of,
        fault_of,
        keep_reason,
        sign_decision,
    )
    from flows.identity import KEY_FILE, identity
    from flows.policy import read_policy
    from fusion.federation.consortium import COORDINATOR

    policy, home = read_policy().promotion, root / COORDINATOR if key is None else key
    if not (home / KEY_FILE).is_file():
        raise DecisionRefused(f"--key: found no {KEY_FILE} in that folder, needed an identity")
    if reject is not None and reject not in policy.reasons:
        raise DecisionRefused(
            f"--reject: found {reject!r}, needed one of {', '.join(policy.reasons)}"
        )
    signed = sign_decision(
        request,
        "approve" if reject is None else "reject",
        identity(home),
        reason=reject or NO_REASON,
        text=reason,
    )
    fault = fault_of(signed, request, deciders=deciders_of(root), policy=policy)
    if fault is not None:
        raise DecisionRefused(
            f"--key: found the key {signed.approver[:12]}, which may not decide, needed one of a "
            "site, of the coordinator, or of coordinator/approvers.json"
        )
    if reason:
        keep_reason(root, request.flow_run, reason)
    return signed


def _resume(api: PrefectApi, run: str, signed: Signed) -> None:
    from flows.decisions import DecisionRefused, form_values

    for left in reversed(range(_FORM_TRIES)):
        answer = api.post(f"/flow_runs/{run}/resume", {"run_input": form_values(signed)})
        if answer["status"] == "ACCEPT":
            return
        reason = str((answer.get("details") or {}).get("reason") or "no reason given")
        if left and "schema not found" in reason:
            clock.sleep(_POLL_S)
            continue
        raise DecisionRefused(f"run {run[:8]}: the server refused to let it go on: {reason}")


def _await_decision(api: PrefectApi, run: str) -> dict[str, Any]:
    deadline = clock.monotonic() + _WAIT_S
    while True:
        state: dict[str, Any] = api.get(f"/flow_runs/{run}")["state"]
        if state["type"] not in _DECIDING or clock.monotonic() > deadline:
            return state
        clock.sleep(_POLL_S)


def _outcome(state: dict[str, Any]) -> str:
    if state["type"] == "COMPLETED":
        return f"done: {state['name'].lower()}"
    if state["type"] == "PAUSED":
        return "it waits again: more approvals are needed, or this one was refused; see its page"
    if state["type"] in _DECIDING:
        return f"the decision is sent; the run is {state['name'].lower()}, see its page"
    return f"the run ended as {state['name'].lower()}; see its page and logs/consilium.log"


def _print_waiting(found: list[Waiting], *, as_json: bool) -> None:
    if as_json:
        print_json([vars(x) for x in found])
        return
    if not found:
        say("no promotion waits for a decision")
    for one in found:
        say(f"{one.run[:8]}  {one.name}  waits since {one.since}")


def _print_request(request: Request, table: str, signed: Signed) -> None:
    say(f"{request.study}-fusion version {request.version}, model {request.model[:12]}")
    say(f"study run {request.run[:12]}")
    say(table.rstrip())
    say(f"{signed.decision}, signed by {signed.approver}")


def register(app: typer.Typer) -> None:
    """Add the two commands."""
    app.command()(promote)
    app.command()(approve)
