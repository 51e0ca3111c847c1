"""What commands share: where they print, how they refuse, how they find a folder's study."""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infra.settings import SITE_FILE, Workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from flows.protocol import StudyProtocol
    from flows.summary import Run

OUT = Console()
ERR = Console(stderr=True)

Root = Annotated[Path, typer.Option("--root", help="Folder with study.toml and the site or sites.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Site = Annotated[str | None, typer.Argument(help="Site; may be left out if there is one.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


class UsageError(ValueError):
    """A command that cannot be carried out as typed."""


def opened(root: Path) -> tuple[Workspace, StudyProtocol]:
    """Open the study of a folder, which flows then find by name."""
    from flows.protocol import load_protocol

    workspace = workspace_at(root)
    return workspace, load_protocol(workspace.study_file)


def workspace_at(root: Path) -> Workspace:
    """Point at a folder, and at the registry that its coordinator's services serve."""
    from flows.serve import running

    os.environ["CONSILIUM_ROOT"] = str(root.resolve())
    if "CONSILIUM_TRACKING_URI" not in os.environ and not (root / SITE_FILE).is_file():
        services = running(root)
        if services is not None:
            os.environ["CONSILIUM_TRACKING_URI"] = services.tracking_uri
    return Workspace()


def only_site(workspace: Workspace, site: str | None) -> str:
    """Name of the site that is meant: the one named, or the only one."""
    names = workspace.site_names()
    if site is None and len(names) != 1:
        raise UsageError(f"site: found {len(names)} ({', '.join(names) or 'none'}), name one")
    return site or names[0]


def write_new(path: Path, text: str, *, force: bool, private: bool = False) -> None:
    """Write a file that is not there yet, or may be replaced."""
    from modalities.files import replacing

    if path.exists() and not force:
        raise UsageError(f"{path.name}: found one already; use --force to replace it")
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o600 if private else 0o644)
    say(f"wrote {path}")


@contextmanager
def serving(root: Path, *, as_json: bool = False) -> Iterator[Run]:
    """Start Prefect's server before anything slow is imported: it boots while we work.

    Where ``consilium serve`` runs for the folder, its server is used: two servers on one database
    file would lock it for one another, and the run would be on no page.
    """
    from flows.services import prefect_server
    from flows.summary import Run, Stopwatch

    watch = Stopwatch()
    _join_services(root)
    with prefect_server(root / "prefect") as server:
        yield Run(server, watch, silent if as_json else say)


def _join_services(root: Path) -> None:
    from flows.serve import client_environment, running

    services = None if "PREFECT_API_URL" in os.environ else running(root)
    if services is not None:
        chosen = {k: v for k, v in os.environ.items() if k == "CONSILIUM_TRACKING_URI"}
        os.environ.update(client_environment(services, root) | chosen)


def connected(root: Path, run: Run) -> None:
    """Point flows at a folder and its server, and wait for that."""
    from flows.demo import connect

    connect(run.server, root)
    run.server.wait_ready()


def say(text: str) -> None:
    """Print one line as it is."""
    OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def silent(text: str) -> None:
    """Print nothing, where the output is for a program."""
    del text


def print_json(value: Any) -> None:
    """Print one JSON value and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
