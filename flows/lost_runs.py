"""Runs whose process is gone: an automation of Prefect's finds them, and so does a restart."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.prefect_api import PrefectApi

HEARTBEAT_S = 30
SILENT_S = 90
STUCK_S = 600
AUTOMATION = "Mark silent runs as crashed"
SILENT = "Crashed: it gave no sign of life any more. A retry continues where it stopped."
_LOST = "Crashed: its process ended without a word. A retry continues where it stopped."
_TAG = {"prefect.resource.id": "prefect.tag.consilium", "prefect.resource.role": "tag"}
# Whatever a run says for itself, or is done to it, ends the wait for its next heartbeat.
_SIGNS = (
    *("heartbeat", "Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Paused"),
    *("Suspended", "Scheduled", "AwaitingRetry", "Late", "Pending", "Skipped", "RolledBack"),
    "waiting",
)


def watch_for_silence(
    api: PrefectApi, *, silence_s: int = SILENT_S, deployed_only: bool = False
) -> None:
    """Make or renew the automation that marks a run crashed that sends no heartbeat any more.

    A run that waits for a person has ended its process, see :func:`speak_for_waiting`.

    Parameters
    ----------
    silence_s
        Seconds without a heartbeat, of one every 30.
    deployed_only
        Leave runs of anything but our deployments alone: on a server that others use, too.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    keep_automation(api, _automation(silence_s, _TAG if deployed_only else {}))


def keep_automation(api: PrefectApi, wanted: Mapping[str, Any]) -> None:
    """Make an automation, or renew the one of its name where that says something else.

    One that is renewed forgets which runs it was waiting for, so that it must not be renewed just
    because a worker starts anew: that is when a run may have been lost.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    found = api.post("/automations/filter", {"automations": {"name": {"any_": [wanted["name"]]}}})
    if not found:
        api.post("/automations/", wanted)
    for automation in found:
        if not _says(automation, wanted):
            api.put(f"/automations/{automation['id']}", wanted)


def _says(found: Any, wanted: Any) -> bool:
    """Whether a server's answer says all that is wanted, in whatever order; it may say more."""
    if isinstance(wanted, dict):
        more = isinstance(found, dict) and (bool(wanted) or not found)
        return more and all(key in found and _says(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list) and isinstance(found, list):
        same = len(found) == len(wanted)
        return same and all(any(_says(x, value) for x in found) for value in wanted)
    return bool(found == wanted)


def end_lost_runs(api: PrefectApi, pool: str) -> int:
    """Settle the runs of a pool without any live worker, and give their count.

    What ran is crashed, what only waited for its process waits again, and what was being stopped
    is stopped.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    return _settle(api, _in(api, pool, "RUNNING", "PENDING", "CANCELLING"))


def end_stuck_runs(api: PrefectApi, pool: str) -> int:
    """Settle the runs of a pool that wait for their process, or for its end, for ten minutes.

    Their worker was killed; they send no heartbeat that could fail to come.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    now = datetime.now(UTC)
    waiting = _in(api, pool, "PENDING", "CANCELLING")
    return _settle(api, [run for run in waiting if _age_s(run, now) > STUCK_S])


def _in(api: PrefectApi, pool: str, *states: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.post(
        "/flow_runs/filter",
        {
            "flow_runs": {"state": {"type": {"any_": list(states)}}},
            "work_pools": {"name": {"any_": [pool]}},
        },
    )
    return found


def _age_s(run: dict[str, Any], now: datetime) -> float:
    """Seconds for which a run is in its state."""
    return (now - datetime.fromisoformat(run["state"]["timestamp"])).total_seconds()


def _settle(api: PrefectApi, lost: list[dict[str, Any]]) -> int:
    for run in lost:
        state: dict[str, Any] = {
            "RUNNING": {"type": "CRASHED", "name": "Crashed", "message": _LOST},
            "PENDING": {"type": "SCHEDULED", "name": "Scheduled"},
            "CANCELLING": {"type": "CANCELLED", "name": "Cancelled"},
        }[run["state_type"]]
        api.post(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return len(lost)


def speak_for_waiting(api: PrefectApi, pool: str) -> None:
    """Give a sign for each run that began to wait for a person; call it every half minute.

    Its process has ended, and a last heartbeat may reach the server after the news of that: the
    automation would wait for another one in vain.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    now = datetime.now(UTC)
    signs = [
        {
            "id": str(uuid.uuid4()),
            "event": "prefect.flow-run.waiting",
            "occurred": now.isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run['id']}"},
            "related": [_TAG],
        }
        for run in _in(api, pool, "PAUSED")
        if _age_s(run, now) < 2 * SILENT_S
    ]
    if signs:
        api.post("/events", signs)


def _automation(silence_s: int, related: dict[str, str]) -> dict[str, Any]:
    return {
        "name": AUTOMATION,
        "description": f"A run that sent no heartbeat for {silence_s} s lost its process.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
            "match_related": related,
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            "expect": [f"prefect.flow-run.{sign}" for sign in _SIGNS],
            "threshold": 1,
            "within": silence_s,
        },
        "actions": [
            {"type": "change-flow-run-state", "state": "CRASHED", "name": "Crashed",
             "message": SILENT},
        ],
    }  # fmt: skip
