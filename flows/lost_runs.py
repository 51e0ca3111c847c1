"""Runs whose process is gone: an automation of Prefect's finds them, and so does a restart."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flows.prefect_api import PrefectApi

HEARTBEAT_S = 30
SILENT_S = 90
AUTOMATION = "Mark silent runs as crashed"
_LOST = "Crashed: its process ended without a word. A retry continues where it stopped."
# Whatever a run says for itself, or is done to it, ends the wait for its next heartbeat.
_SIGNS = (
    *("heartbeat", "Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Paused"),
    *("Suspended", "Scheduled", "AwaitingRetry", "Late", "Pending", "Skipped", "RolledBack"),
    "waiting",
)


def watch_for_silence(api: PrefectApi) -> None:
    """Make or renew the automation that marks a run crashed after 90 s without a heartbeat.

    A run that waits for a person has ended its process, see :func:`speak_for_waiting`.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    wanted = _automation()
    by_name = {"automations": {"name": {"any_": [AUTOMATION]}}}
    found = api.post("/automations/filter", by_name)
    if not found:
        api.post("/automations/", wanted)
    for automation in found:
        api.put(f"/automations/{automation['id']}", wanted)


def end_lost_runs(api: PrefectApi, pool: str) -> int:
    """Settle the runs of a pool without any live worker, and give their count.

    What ran is crashed, what only waited for its process waits again, and what was being stopped
    is stopped.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    lost = api.post(
        "/flow_runs/filter",
        {
            "flow_runs": {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}},
            "work_pools": {"name": {"any_": [pool]}},
        },
    )
    for run in lost:
        state: dict[str, Any] = {
            "RUNNING": {"type": "CRASHED", "name": "Crashed", "message": _LOST},
            "PENDING": {"type": "SCHEDULED", "name": "Scheduled"},
            "CANCELLING": {"type": "CANCELLED", "name": "Cancelled"},
        }[run["state_type"]]
        api.post(f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return len(lost)


def speak_for_waiting(api: PrefectApi) -> None:
    """Give a sign for each run that began to wait for a person; call it every half minute.

    Its process has ended, and a last heartbeat may reach the server after the news of that: the
    automation would wait for another one in vain.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    now = datetime.now(UTC)
    paused = {"flow_runs": {"state": {"type": {"any_": ["PAUSED"]}}}}
    signs = [
        {
            "id": str(uuid.uuid4()),
            "event": "prefect.flow-run.waiting",
            "occurred": now.isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run['id']}"},
        }
        for run in api.post("/flow_runs/filter", paused)
        if now - datetime.fromisoformat(run["state"]["timestamp"]) < timedelta(seconds=2 * SILENT_S)
    ]
    if signs:
        api.post("/events", signs)


def _automation() -> dict[str, Any]:
    return {
        "name": AUTOMATION,
        "description": f"A run that sent no heartbeat for {SILENT_S} s lost its process.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",
            "match": {"prefect.resource.id": ["prefect.flow-run.*"]},
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.heartbeat"],
            "expect": [f"prefect.flow-run.{sign}" for sign in _SIGNS],
            "threshold": 1,
            "within": SILENT_S,
        },
        "actions": [
            {"type": "change-flow-run-state", "state": "CRASHED", "name": "Crashed",
             "message": _LOST},
        ],
    }  # fmt: skip
