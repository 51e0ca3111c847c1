"""Why a run of a study has nothing to do: said on its page, as a state of its own name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from prefect.runtime import deployment
from prefect.states import Completed

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import read_approvals, sites_that_approved
from flows.federated import KITS
from flows.versions import CODE, source_digest
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from prefect.client.schemas.objects import State

    from flows.protocol import StudyProtocol
    from infra.settings import Workspace

SKIPPED: Final = "Skipped"
_BUDGET_SPENT: Final = "budget_spent"
# What a site answers while it waits for people or patients, and nothing is wrong.
_WAITING: Final = {"not_approved", "withdrawn", _BUDGET_SPENT}


class NothingToDo(RuntimeError):
    """A run that may not go on, and need not: its text is shown on the run's page.

    Attributes
    ----------
    cause
        The error itself, for a person at a terminal.
    """

    def __init__(self, reason: str, cause: Exception) -> None:
        super().__init__(reason)
        self.cause = cause


def is_deployed() -> bool:
    """Whether this run came from a deployment: nobody waits for it at a terminal."""
    return deployment.id is not None


def skipped(reason: str, data: object = None) -> State[Any]:
    """Give the state of a run that had nothing to do.

    Parameters
    ----------
    reason
        Names and counts only.
    data
        What the flow gives to whoever called it.
    """
    return Completed(name=SKIPPED, message=reason, data=data)


def missing_approvals(workspace: Workspace, protocol: StudyProtocol) -> str | None:
    """Say how many sites have not approved what would run now, or None where enough have."""
    path = workspace.root / KITS / COORDINATOR / CONSORTIUM_FILE
    if not path.is_file():
        return None  # the run itself says what to do about that
    consortium = read_consortium(path)
    approvals = read_approvals(workspace.root / COORDINATOR / APPROVALS)
    code = source_digest(*CODE)
    ours = [approval for approval in approvals if approval.statement.code == code]
    found = sites_that_approved(ours, protocol=protocol.fingerprint(), consortium=consortium)
    if len(found) >= consortium.quorum:
        return None
    missing = sorted(set(consortium.sites) - found)
    return (
        f"approvals: found {len(found)} of this protocol and code, needed {consortium.quorum}; "
        f"missing from {', '.join(missing)}"
    )


def waiting_sites(codes: Mapping[str, str]) -> str | None:
    """Say which sites wait, and for what; None where any other site does not answer.

    Parameters
    ----------
    codes
        Per site that does not take part, why not.
    """
    if not codes or not set(codes.values()) <= _WAITING:
        return None
    return ", ".join(f"{site}: {code}" for site, code in sorted(codes.items()))


def spent_budgets(codes: Collection[str]) -> str | None:
    """Say how many sites have spent their privacy budget, or None where none has."""
    n_spent = list(codes).count(_BUDGET_SPENT)
    return None if not n_spent else f"privacy budget: spent at {n_spent} of {len(codes)} sites"
