"""``consilium predict`` and ``consilium board``: a registered model, at one site's patients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import ERR, Json, Root, UsageError, only_site, opened, print_json, say
from infra.settings import SITE_FILE

if TYPE_CHECKING:
    from flows.registered_model import StudyModel
    from infra.settings import Workspace

Model = Annotated[
    str | None,
    typer.Option(
        help="NAME, NAME@ALIAS or NAME/VERSION of the registry, or a .zip file of `consilium model "
        "export`; by default the champion of the folder's study, or else the candidate."
    ),
]
SiteName = Annotated[str | None, typer.Option("--site", help="Site; if there are several.")]


def predict(
    cohort: Annotated[
        Path | None, typer.Argument(help="Cohort to score; by default the site's cohort.h5mu.")
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Table to write; by default predictions/predictions.csv at the site."),
    ] = None,
    site: SiteName = None,
    root: Root = Path(),
    serve: Annotated[
        bool, typer.Option("--serve", help="Score over HTTP on this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of --serve.")] = 5001,
    as_json: Json = False,
) -> None:
    """Give the risk of every patient of a cohort, at the site; nothing of it leaves."""
    workspace, protocol = opened(root)
    if serve:
        if cohort is not None or out is not None:
            raise UsageError("--serve: found a cohort or --out with it, needed neither")
        from flows.scoring import serve_model

        serve_model(_opened_model(workspace, protocol.study.name, model), port=port, announce=say)
        return
    from flows.prediction import counts, predict_cohort
    from flows.prediction_files import FOLDER, TABLE, write_predictions

    name = _site_of(workspace, cohort, site)
    settings = workspace.site(name)
    path = settings.path("cohort.h5mu") if cohort is None else cohort.resolve()
    target = settings.path(FOLDER, TABLE) if out is None else out.resolve()
    if target.is_dir():
        raise UsageError(f"--out: found the folder {target}, needed a file, such as risks.csv")
    found = _opened_model(workspace, protocol.study.name, model)
    done = predict_cohort(settings, found, path)
    write_predictions(done.table, target, home=settings.home)
    told = {"model": found.name, "version": found.version, "site": name, "out": str(target)}
    numbers = counts(done)
    if as_json:
        print_json({**told, **numbers, "notes": list(done.notes)})
        return
    for note in done.notes:
        ERR.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    say(
        f"{found.title}: {numbers['n_scored']} of {numbers['n_patients']} patients scored, "
        f"{numbers['n_extrapolated']} with inputs far from those trained on"
    )
    say(f"wrote {target}; for research only, and for this site alone")


def board(
    patient: Annotated[
        str | None, typer.Argument(help="Pseudonym of the patient, as in the cohort.")
    ] = None,
    everybody: Annotated[bool, typer.Option("--all", help="A page for every patient.")] = False,
    model: Model = None,
    cohort: Annotated[
        Path | None, typer.Option(help="Cohort to look in; by default the site's cohort.h5mu.")
    ] = None,
    site: SiteName = None,
    root: Root = Path(),
) -> None:
    """Write a patient's page for the treatment board, at the site; nothing of it leaves."""
    if (patient is None) != everybody:
        raise UsageError("board: needed either a patient or --all")
    workspace, protocol = opened(root)
    from flows.board import write_boards

    settings = workspace.site(_site_of(workspace, cohort, site))
    found = _opened_model(workspace, protocol.study.name, model)
    pages, n_without = write_boards(
        settings,
        found,
        patients=None if patient is None else [patient],
        cohort=None if cohort is None else cohort.resolve(),
    )
    if n_without:
        say(f"{n_without} patients have no modality that the model can read, and no page")
    say(f"wrote {pages[0]}" if patient else f"wrote {len(pages)} pages below {settings.home}/board")


def _opened_model(workspace: Workspace, study: str, model: str | None) -> StudyModel:
    from flows.registered_model import open_model

    return open_model(workspace, study, model)


def _site_of(workspace: Workspace, cohort: Path | None, site: str | None) -> str:
    """Name of the site that is meant: the one named, the one that holds the cohort, the only one.

    A cohort is never scored by the encoders of another site because of a slip.
    """
    holding = _holding_site(workspace, cohort)
    if site is not None and holding is not None and site != holding:
        raise UsageError(f"--site: found {site} for a cohort of {holding}, needed the same site")
    return only_site(workspace, site or holding)


def _holding_site(workspace: Workspace, cohort: Path | None) -> str | None:
    if cohort is None:
        return None
    for folder in cohort.resolve().parents:
        if (folder / SITE_FILE).is_file():
            names = {workspace.site(x).home.resolve(): x for x in workspace.site_names()}
            return names.get(folder)
    return None


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.command("predict")(predict)
    app.command("board")(board)
