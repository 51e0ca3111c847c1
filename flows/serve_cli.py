"""``consilium serve``: one party's services on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import Root, UsageError, say


def serve(
    root: Root = Path(),
    check: Annotated[
        bool, typer.Option("--check", help="Say how the running services are; exit 1 if not well.")
    ] = False,
    prefect_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Prefect's port; 4200 by default.")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="MLflow's port; 5000 by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=32, help="Worker processes; several need PostgreSQL.")
    ] = None,
    prefect_server: Annotated[
        str | None,
        typer.Option(
            help="Address of a Prefect server that parties share: none is started here, and the "
            "worker asks there, outwards only, for runs of the pool consilium-SITE. Whoever "
            "controls that server can then run any program on this machine with this account's "
            "rights, and sees names and times of all runs. Needs CONSILIUM_PREFECT_AUTH if the "
            "server wants a password.",
        ),
    ] = None,
) -> None:
    """Run this folder's Prefect server, worker and MLflow server until Ctrl-C.

    All listen on this machine only. Logs are in logs/. Files in the folder hold what they know, or
    the PostgreSQL server of CONSILIUM_DATABASE_URL.
    """
    from flows.serve import health
    from flows.serve import serve as run
    from infra.settings import load_services

    if check:
        _print_health(health(root))
        return
    given = {"prefect_port": prefect_port, "mlflow_port": mlflow_port, "workers": workers}
    settings = load_services(**{k: v for k, v in given.items() if v is not None})
    if settings.prefect_port == settings.mlflow_port:
        raise UsageError(
            f"--mlflow-port: found {settings.mlflow_port} for both pages, needed two ports"
        )
    run(root, settings=settings, hub=prefect_server, announce=say)


def _print_health(found: dict[str, bool]) -> None:
    if not found:
        say("not running; start with `consilium serve`")
        raise typer.Exit(1)
    for name, is_well in found.items():
        say(f"{name}: {'well' if is_well else 'does not answer; see logs/'}")
    raise typer.Exit(0 if all(found.values()) else 1)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("serve")(serve)
