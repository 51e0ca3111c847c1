"""What runs when at a party: ``prefect.yaml``, filled in and applied to the party's own server."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import yaml  # type: ignore[import-untyped]

from flows.federated import KITS
from flows.lost_runs import keep_automation
from flows.protocol import load_protocol
from infra.settings import SITE_FILE, SettingsError, load_times

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from prefect import Flow
    from prefect.deployments.runner import RunnerDeployment

    from flows.prefect_api import PrefectApi
    from infra.settings import Workspace

    Kind = Literal["site", "coordinator"]

FILE: Final = "prefect.yaml"
RETRY: Final = "Retry crashed runs"
MAX_RUNS: Final = 3
"""How often a run is begun, its first time included, before a crash is left to people."""
RETRY_AFTER_S: Final = 15
_GOING_ON: Final = ("Scheduled", "AwaitingRetry", "Pending", "Running")

# Beside the packages in a checkout, within ours where installed from a wheel.
_PLACES: Final = (Path(__file__).resolve().parents[1] / FILE, Path(__file__).with_name(FILE))
_NAME: Final = re.compile(r"\{\{\s*\$(\w+)\s*\}\}")


class DeploymentError(RuntimeError):
    """Deployments that cannot be read or applied; says why."""


@dataclass(frozen=True)
class Wanted:
    """One deployment as its party wants it, with every name filled in.

    Attributes
    ----------
    flow
        Name of the flow.
    name
        Name of the site, or of the coordinator's study.
    entrypoint
        Module and function; the code is installed where it runs.
    cron, timezone
        When it runs; empty where people start it.
    spec
        Everything that ``prefect.yaml`` says of it.
    """

    flow: str
    name: str
    entrypoint: str
    cron: str
    timezone: str
    spec: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        """As Prefect names it: flow and deployment."""
        return f"{self.flow}/{self.name}"


@dataclass(frozen=True)
class Applied:
    """One deployment that stands on the server, or would.

    Attributes
    ----------
    next_run
        None where people start it.
    active
        Whether its schedule is on; people switch it off in Prefect's page.
    """

    wanted: Wanted
    next_run: datetime | None
    active: bool = True


def deployments_file() -> Path:
    """Find ``prefect.yaml``: in a checkout, or within an installed package.

    Raises
    ------
    DeploymentError
        If there is none.
    """
    for place in _PLACES:
        if place.is_file():
            return place
    raise DeploymentError(
        f"{FILE}: found none with the package, needed what it says of deployments; install "
        "consilium again"
    )


def wanted_deployments(workspace: Workspace) -> list[Wanted]:
    """List what a folder's party runs: a site, a coordinator, or a whole simulated consortium.

    Raises
    ------
    infra.settings.SettingsError, flows.protocol.ProtocolError
        If a file of the folder or a variable cannot be used.
    DeploymentError
        If ``prefect.yaml`` cannot be.
    """
    study = load_protocol(workspace.study_file).study.name
    sites = workspace.site_names()
    parties: list[tuple[Kind, str]] = [("site", site) for site in sites]
    if not (workspace.root / SITE_FILE).is_file():
        parties.append(("coordinator", ""))
    federation = "flare" if (workspace.root / KITS).is_dir() or not sites else "memory"
    specs = _read(deployments_file())
    wanted = [
        _wanted(_filled(spec, names))
        for kind, site in parties
        for names in [_names(study=study, site=site, federation=federation)]
        for spec in specs
        if kind in spec["tags"]
    ]
    return _timed(wanted)


def _names(*, study: str, site: str, federation: str) -> dict[str, str]:
    return {
        "CONSILIUM_STUDY": study,
        "CONSILIUM_SITE": site,
        "CONSILIUM_FEDERATION": federation,
    }


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["deployments"]
        return [spec for spec in found if {"entrypoint", "name", "tags"} <= set(spec)]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        raise DeploymentError(f"{FILE}: found no deployments in it, needed some") from None


def _filled(value: Any, names: Mapping[str, str]) -> Any:
    """Put names in place of what ``prefect deploy`` would take from its environment."""
    if isinstance(value, str):
        return _NAME.sub(lambda found: names[found[1]], value)
    if isinstance(value, dict):
        return {key: _filled(x, names) for key, x in value.items()}
    if isinstance(value, list):
        return [_filled(x, names) for x in value]
    return value


def _wanted(spec: dict[str, Any]) -> Wanted:
    schedule: dict[str, str] = next(iter(spec.get("schedules", ())), {})
    return Wanted(
        flow=str(_flow(spec["entrypoint"]).name),
        name=spec["name"],
        entrypoint=spec["entrypoint"],
        cron=schedule.get("cron", ""),
        timezone=schedule.get("timezone", ""),
        spec=spec,
    )


def _timed(wanted: list[Wanted]) -> list[Wanted]:
    """Put a party's own times in place of those of the file."""
    times = load_times()
    unknown = set(times.schedules) - {one.flow for one in wanted if one.cron}
    if unknown:
        raise SettingsError(
            f"CONSILIUM_SCHEDULES: found {', '.join(sorted(unknown))}, needed names of "
            f"{', '.join(sorted({one.flow for one in wanted if one.cron}))}"
        )
    return [
        replace(
            one,
            cron=times.schedules.get(one.flow, one.cron),
            timezone=times.timezone or one.timezone,
        )
        if one.cron
        else one
        for one in wanted
    ]


def _flow(entrypoint: str) -> Flow[..., Any]:
    module, name = entrypoint.rsplit(".", 1)
    try:
        return cast("Flow[..., Any]", getattr(import_module(module), name))
    except (ImportError, AttributeError):
        raise DeploymentError(
            f"{FILE}: found {entrypoint}, needed the place of a flow that is installed"
        ) from None


def as_deployment(wanted: Wanted, pool: str, *, active: bool = True) -> RunnerDeployment:
    """Give a deployment as Prefect's client takes it.

    Parameters
    ----------
    pool
        Work pool whose worker runs it.
    active
        Whether its schedule is on.

    Raises
    ------
    infra.settings.SettingsError
        If its time or time zone is none.
    """
    from prefect.deployments.runner import RunnerDeployment
    from prefect.types.entrypoint import EntrypointType
    from prefect.utilities.callables import parameter_schema
    from pydantic import ValidationError

    spec, flow = wanted.spec, _flow(wanted.entrypoint)
    try:
        schedules = _schedules(wanted, active=active)
    except (ValidationError, ValueError):
        raise SettingsError(
            f"CONSILIUM_SCHEDULES: {wanted.flow}: found {wanted.cron!r} in {wanted.timezone!r}, "
            "needed a time as in a crontab and a time zone as Europe/Berlin"
        ) from None
    limit = spec.get("concurrency_limit")
    options = {} if limit is None else {"collision_strategy": limit["collision_strategy"]}
    made = RunnerDeployment(
        name=wanted.name,
        flow_name=wanted.flow,
        description=spec["description"],
        version=flow.version,
        tags=spec["tags"],
        parameters=spec.get("parameters", {}),
        entrypoint=wanted.entrypoint,
        enforce_parameter_schema=spec.get("enforce_parameter_schema", True),
        work_pool_name=pool,
        schedules=schedules,
        concurrency_limit=None if limit is None else limit["limit"],
        concurrency_options=options or None,
        triggers=spec.get("triggers", []),
    )
    made._entrypoint_type = EntrypointType.MODULE_PATH
    made._parameter_openapi_schema = parameter_schema(flow)
    return made


def _schedules(wanted: Wanted, *, active: bool) -> list[Any]:
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.schedules import CronSchedule

    if not wanted.cron:
        return []
    slug = wanted.spec["schedules"][0]["slug"]
    schedule = CronSchedule(cron=wanted.cron, timezone=wanted.timezone)
    return [DeploymentScheduleCreate(schedule=schedule, slug=slug, active=active)]


def apply(wanted: Iterable[Wanted], *, pool: str, api: PrefectApi) -> list[Applied]:
    """Make or renew deployments on the server of the environment; others' stay as they are.

    Parameters
    ----------
    pool
        Work pool whose worker runs them.
    api
        The same server.

    Raises
    ------
    DeploymentError
        If the server refuses.
    flows.services.ServiceError
        If it cannot be reached.
    infra.settings.SettingsError
        If a time or time zone is none.
    """
    from prefect.deployments.runner import DeploymentApplyError

    off = _switched_off(api)
    made = [
        (Applied(one, next_run(one), active=active), as_deployment(one, pool, active=active))
        for one in wanted
        for active in [(one.entrypoint, one.name) not in off]
    ]
    for one, deployment in made:
        try:
            deployment.apply(work_pool_name=pool)
        except DeploymentApplyError as error:
            raise DeploymentError(
                f"{one.wanted.full_name}: the server refused it: {error}"
            ) from None
    retry_crashed(api)
    return [one for one, _ in made]


def _switched_off(api: PrefectApi) -> set[tuple[str, str]]:
    """Entrypoint and name of the deployments whose schedule people have switched off."""
    ours = {"deployments": {"tags": {"all_": ["consilium"]}}}
    return {
        (found["entrypoint"], found["name"])
        for found in api.post("/deployments/filter", ours)
        if found["schedules"] and not any(x["active"] for x in found["schedules"])
    }


def next_run(wanted: Wanted) -> datetime | None:
    """When a deployment runs next; None where people start it."""
    from prefect.server.schemas.schedules import CronSchedule

    if not wanted.cron:
        return None
    schedule = CronSchedule(cron=wanted.cron, timezone=wanted.timezone)
    return asyncio.run(schedule.get_dates(1))[0]


def retry_crashed(api: PrefectApi) -> None:
    """Make or renew the automation that begins a crashed run again, twice at most.

    What a run has done already lies on the party's disk and is recognised there, so that only
    what was interrupted is done again.

    Raises
    ------
    flows.services.ServiceError
        If the server refuses.
    """
    keep_automation(api, _retry_automation())


def _retry_automation() -> dict[str, Any]:
    return {
        "name": RETRY,
        "description": "A run whose process was lost goes on from what lies on the disk.",
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Proactive",  # at once, the worker still holds the lost run's place
            "match": {
                "prefect.resource.id": "prefect.flow-run.*",
                "prefect.run-count": [str(n) for n in range(1, MAX_RUNS)],
            },
            "match_related": {
                "prefect.resource.id": "prefect.tag.consilium",
                "prefect.resource.role": "tag",
            },
            "for_each": ["prefect.resource.id"],
            "after": ["prefect.flow-run.Crashed"],
            "expect": [f"prefect.flow-run.{state}" for state in _GOING_ON],
            "threshold": 1,
            "within": RETRY_AFTER_S,
        },
        "actions": [
            {"type": "change-flow-run-state", "state": "SCHEDULED", "name": "AwaitingRetry",
             "message": "Begun again after a crash."},
        ],
    }  # fmt: skip
