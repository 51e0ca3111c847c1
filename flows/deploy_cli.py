"""``consilium deploy``: what runs when, on this party's own server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Json, Root, UsageError, opened, print_json, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.deployments import Applied


def deploy(
    root: Root = Path(),
    only_list: Annotated[
        bool, typer.Option("--list", help="Say what would be deployed, and when it would run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Put the flows of this folder's party on its running server, each with its times.

    What was deployed before is brought up to date, and nothing else is touched. A schedule that
    you switched off in Prefect's page stays off.
    """
    from flows.lost_runs import watch_for_silence
    from flows.serve import client_environment, running
    from infra.settings import load_services

    services = running(root)
    if services is None and not only_list:
        raise UsageError(
            "deploy: found no services running for this folder, needed them; start `consilium "
            "serve` there first"
        )
    if services is not None:  # before Prefect is imported
        os.environ.update(client_environment(services, root))
    workspace, _ = opened(root)
    from flows.deployments import Applied, apply, next_run, wanted_deployments

    wanted = wanted_deployments(workspace)
    if only_list or services is None:
        _show([Applied(one, next_run(one)) for one in wanted], as_json=as_json)
        return
    from flows.prefect_api import PrefectApi

    api = PrefectApi(services.prefect_api, services.prefect_auth)
    if services.is_shared:  # on a party's own server `consilium serve` does it
        watch_for_silence(api, silence_s=load_services().silence_s, deployed_only=True)
    _show(apply(wanted, pool=services.pool, api=api), as_json=as_json)
    if not as_json:
        say(f"look at them: {services.prefect_api.removesuffix('/api')}/deployments")


def _show(found: Sequence[Applied], *, as_json: bool) -> None:
    if as_json:
        print_json(
            [
                {
                    "deployment": one.wanted.full_name,
                    "cron": one.wanted.cron,
                    "timezone": one.wanted.timezone,
                    "next_run": None if one.next_run is None else one.next_run.isoformat(),
                }
                for one in found
            ]
        )
        return
    width = max(len(one.wanted.full_name) for one in found)
    for one in found:
        say(f"{one.wanted.full_name:{width}}  {_when(one)}")


def _when(one: Applied) -> str:
    if one.next_run is None:
        return "started by hand"
    if not one.active:
        return "switched off in Prefect's page"
    return f"next {one.next_run:%Y-%m-%d %H:%M} {one.wanted.timezone} ({one.wanted.cron})"


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("deploy")(deploy)
