"""Where a site stands with others: its approval, budget, certificates, and what runs next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import read_approvals
from flows.gate import PRIVACY, own_limits, privacy_ledger, settings_digest
from flows.serve import running
from flows.versions import CODE, source_digest
from fusion.differential_privacy import LedgerDamaged

if TYPE_CHECKING:
    from pathlib import Path

    from flows.approvals import Approval
    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

_MANY: Final = 200


def approval(settings: SiteSettings, protocol: StudyProtocol) -> dict[str, Any]:
    """Say who signed the study as it is here, and what changed since this site did."""
    try:
        found = {one.site: one for one in read_approvals(settings.path(APPROVALS))}
    except ValueError as fault:
        return {"signed": False, "why": [str(fault)], "sites": []}
    own = found.get(settings.name)
    why = ["not signed here yet"] if own is None else _changed(own, settings, protocol)
    sites = [
        site for site, one in found.items() if one.statement.protocol == protocol.fingerprint()
    ]
    return {"signed": not why, "why": why, "sites": sorted(sites)}


def _changed(own: Approval, settings: SiteSettings, protocol: StudyProtocol) -> list[str]:
    signed = own.statement
    limits = settings_digest(own_limits(settings, protocol))
    now = {
        "the study": (signed.protocol, protocol.fingerprint()),
        "this program": (signed.code, source_digest(*CODE)),
        "the site's own limits": (signed.settings, limits),
    }
    return [f"{what} changed since it was signed" for what, (a, b) in now.items() if a != b]


def budget(settings: SiteSettings, protocol: StudyProtocol) -> dict[str, Any] | None:
    """Epsilon of a site's privacy budget, what is spent and left; None without a budget."""
    if not protocol.differential_privacy.is_on:
        return None
    given = protocol.differential_privacy.epsilon
    epsilon = given if settings.epsilon is None else settings.epsilon
    try:
        # A ledger is written when it is opened, and looking should leave no file.
        ledger = privacy_ledger(settings, protocol) if settings.path(PRIVACY).is_file() else None
        spent = 0.0 if ledger is None else ledger.spent()
    except LedgerDamaged as fault:
        return {"epsilon": epsilon, "fault": str(fault)}
    return {"epsilon": epsilon, "spent": spent, "left": max(0.0, epsilon - spent)}


def certificates(kit: Path) -> list[dict[str, Any]]:
    """Days that each certificate of a kit still counts; empty without a kit."""
    if not kit.is_dir():
        return []
    from flows.certificates import certificates_of
    from fusion.keys import KeyFault
    from infra.provision import ProvisionError

    try:
        return [
            {"name": one.name, "days_left": one.days_left, "sentence": one.sentence()}
            for one in certificates_of(kit)
        ]
    except (KeyFault, ProvisionError) as fault:
        return [{"name": "kit", "days_left": None, "sentence": str(fault)}]


def next_runs(root: Path) -> dict[str, Any]:
    """Say when each deployment runs next, where ``consilium serve`` runs for this folder."""
    services = running(root)
    if services is None:
        return {"services": "not running", "runs": {}}
    from flows.prefect_api import PrefectApi
    from flows.services import ServiceError

    api = PrefectApi(services.prefect_api, services.prefect_auth)
    try:
        names = {x["id"]: x["name"] for x in api.post("/deployments/filter", {"limit": _MANY})}
        scheduled = api.post(
            "/flow_runs/filter",
            {
                "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
                "sort": "EXPECTED_START_TIME_ASC",
                "limit": _MANY,
            },
        )
    except ServiceError as fault:
        return {"services": str(fault), "runs": {}}
    runs: dict[str, str] = {}
    for run in scheduled:
        name = names.get(run["deployment_id"])
        if name is not None:
            runs.setdefault(name, run["expected_start_time"])
    return {"services": "running", "runs": runs}
