"""``consilium model``: a registered model as one file, for sites that reach no registry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import Force, Root, UsageError, opened, say

model_app = typer.Typer(help="Registered models as files.", no_args_is_help=True)


@model_app.callback()
def _group() -> None:
    """Keep the command's name while it is the only one."""


@model_app.command("export")
def export(
    model: Annotated[
        str | None,
        typer.Argument(
            help="NAME, NAME@ALIAS or NAME/VERSION; by default the champion of the folder's study, "
            "or else the candidate."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write; by default NAME-VERSION.zip.")
    ] = None,
    root: Root = Path(),
    force: Force = False,
) -> None:
    """Write a model into one file that the coordinator signs; sites give it to `predict --model`.

    It holds what everybody with an account of the registry may read: coefficients, shared encoders,
    protocol, model card. Whoever changes a byte of it makes it useless.
    """
    from flows.registered_model import export_model

    if out is not None and out.suffix != ".zip":
        raise UsageError(f"--out: found {out.name}, needed a name that ends in .zip")
    workspace, protocol = opened(root)
    found, written = export_model(workspace, protocol.study.name, model, out=out, replace=force)
    known_as = f" ({', '.join(found.aliases)})" if found.aliases else ""
    say(f"wrote {written}: {found.title}{known_as}")


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    app.add_typer(model_app, name="model")
