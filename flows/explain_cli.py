"""``consilium explain``: where a site's own models look, made and kept at the site."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Json, Root, UsageError, only_site, opened, print_json, say

if TYPE_CHECKING:
    from flows.protocol import StudyProtocol

explain_app = typer.Typer(help="Where a site's own models look.", no_args_is_help=True)


@explain_app.callback()
def explain() -> None:
    """Where a site's own models look; nothing of it leaves the site."""


@explain_app.command()
def pathology(
    slide: Annotated[Path, typer.Option(help="A slide, or an .h5 of its features.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="NAME or NAME/VERSION in the site's own registry, or a folder with an encoder; by "
            "default what the site trained last."
        ),
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Modality of slides; if the study has several.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; by default explained at the site.")
    ] = None,
    site: Annotated[str | None, typer.Option(help="Site; if there are several.")] = None,
    root: Root = Path(),
    as_json: Json = False,
) -> None:
    """Write the attention over a slide's tiles, as a picture and as GeoJSON for QuPath."""
    workspace, protocol = opened(root)
    from flows.explain import FOLDER, explain_slide
    from flows.prediction_files import private_folder

    settings = workspace.site(only_site(workspace, site))
    if not slide.exists():
        raise UsageError(f"--slide: found no {slide.name}, needed a slide or its features")
    target = private_folder(settings.path(FOLDER)) if out is None else out.resolve()
    made = explain_slide(
        settings, protocol, slide, modality=_modality(protocol, modality), model=model, out=target
    )
    if as_json:
        found = {"picture": str(made.picture), "geojson": str(made.outlines)}
        print_json({"n_tiles": made.n_tiles, **found})
        return
    say(f"{made.n_tiles} tiles: wrote {made.picture} and {made.outlines}; for this site alone")


def _modality(protocol: StudyProtocol, wanted: str | None) -> str:
    from modalities.pathology import PathologySpec

    known = [x for x, spec in protocol.modality.items() if isinstance(spec, PathologySpec)]
    found = [x for x in known if wanted in {None, x}]
    if len(found) != 1:
        raise UsageError(
            f"--modality: found {wanted or 'none'}, needed one of the study's with slides: "
            f"{', '.join(known) or 'it has none'}"
        )
    return found[0]
