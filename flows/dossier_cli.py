"""``consilium dossier``: write or check what an oversight board reads of a model version."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import ERR, Json, Root, UsageError, opened, print_json, say

if TYPE_CHECKING:
    from flows.dossier_facts import Version

Model = Annotated[
    str | None,
    typer.Argument(help="Version, as lung-os-fusion/3, lung-os-fusion@champion or 3; the newest."),
]
Out = Annotated[
    Path | None, typer.Option(help="Copy the page to this file, or the whole to this folder.")
]
Check = Annotated[
    bool, typer.Option("--check", help="Write nothing; say what is wrong, and exit with 1.")
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(dossier)


def dossier(
    model: Model = None,
    root: Root = Path(),
    out: Out = None,
    check: Check = False,
    as_json: Json = False,
) -> None:
    """Write the governance dossier of a model version, or check the one that is there."""
    workspace, protocol = opened(root)
    if check and out is not None:
        raise UsageError("--out: found it with --check, needed one of them: a check writes nothing")
    from flows.dossier_history import find_registration, versions_of

    study = protocol.study.name
    versions, registrations = versions_of(workspace, study)
    found = find_registration(study, versions, registrations, model=model)
    if check:
        _check(workspace.root / "runs" / found.run[:12], versions, as_json=as_json)
        return
    from flows.dossier import refresh_dossier

    written = refresh_dossier(workspace, study, found.version)
    target = written.page if out is None else _copied(written.page, out)
    if as_json:
        print_json({"model": f"{study}-fusion", "version": written.version, "path": str(target)})
        return
    say(f"wrote {target}: the dossier of {study}-fusion version {written.version}")


def _copied(page: Path, out: Path) -> Path:
    """Copy the page to a file, or the whole dossier to a folder."""
    if out.suffix == ".html":
        if out.is_dir():
            raise UsageError(f"--out: found the folder {out}, needed a file, such as dossier.html")
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(page, out)
        return out
    if out.is_file():
        raise UsageError(f"--out: found the file {out}, needed a folder, or a name in .html")
    shutil.copytree(page.parent, out, dirs_exist_ok=True)
    return out / page.name


def _check(run: Path, versions: list[Version], *, as_json: bool) -> None:
    from flows.dossier import FOLDER
    from flows.dossier_check import check_dossier, dossier_warnings, history_faults

    folder = run / FOLDER
    faults = [*check_dossier(folder), *history_faults(folder, versions)]
    warnings = dossier_warnings(folder)
    if as_json:
        print_json({"faults": faults, "warnings": warnings})
    else:
        for warning in warnings:
            say(f"warning: {warning}")
        for fault in faults:
            ERR.print(f"fault: {fault}", markup=False, highlight=False, soft_wrap=True)
        if not faults:
            say(f"runs/{run.name}/{FOLDER}: stands: nothing empty, every number is the run's")
    if faults:
        raise typer.Exit(1)
