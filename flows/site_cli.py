"""``consilium site``: what one hospital does for itself."""

from __future__ import annotations

import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.status_cli import site_status
from flows.terminal import (
    Force,
    Json,
    Root,
    Site,
    UsageError,
    connected,
    only_site,
    opened,
    print_json,
    say,
    serving,
    write_new,
)
from infra.settings import SITE_FILE, Workspace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modalities.cohort import Exclusion

site_app = typer.Typer(help="Set up, check and prepare one site.", no_args_is_help=True)
site_app.command("status")(site_status)


@site_app.command("init")
def site_init(
    name: Annotated[str, typer.Argument(help="Opaque lower-case name, as site-01.")],
    root: Root = Path(),
    force: Force = False,
) -> None:
    """Write a site.toml with a new secret, and an empty manifest."""
    from flows.demo import template
    from modalities.cohort import MANIFEST_COLUMNS

    if not re.fullmatch(r"[a-z][a-z0-9-]{0,39}", name):
        raise UsageError(f"name: found {name!r}, needed lower-case letters, digits and hyphens")
    text = template("site.toml").format(name=name, secret=secrets.token_hex(32))
    write_new(root / SITE_FILE, text, force=force, private=True)
    if not (root / "manifest.csv").exists():
        write_new(root / "manifest.csv", ",".join(MANIFEST_COLUMNS) + "\n", force=False)


@site_app.command("check")
def site_check(
    site: Annotated[
        str | None, typer.Argument(help="Site; may be left out if there is one.")
    ] = None,
    root: Root = Path(),
    as_json: Json = False,
) -> None:
    """Look at every raw input and say in one sentence what is wrong with it; exit 1 if any is."""
    from flows.check import check_site
    from flows.progress import Progress
    from modalities.cohort import read_manifest

    workspace, protocol = opened(root)
    settings = workspace.site(only_site(workspace, site))
    rows, _ = read_manifest(settings.path(settings.manifest), protocol.modalities)
    with Progress("check", total=len(rows)) as progress:
        faults = check_site(settings, protocol, advance=progress.advance)
    if as_json:
        print_json([vars(fault) for fault in faults])
    else:
        _print_faults(faults, n_inputs=len(rows))
    raise typer.Exit(1 if faults else 0)


@site_app.command("key")
def site_key(
    site: Site = None,
    root: Root = Path(),
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Replace the pair by a new one; stop the party first.")
    ] = False,
) -> None:
    """Print the site's public key, for whoever makes the kits; the first time, make the pair."""
    from flows import identity

    found = Workspace(root=root.resolve())
    settings = found.site(only_site(found, site))
    if not rotate:
        say(identity.identity(settings.home).public)
        return
    say(identity.rotate(settings.home, party=settings.name).new)
    say(f"send {identity.PUBLIC_FILE} to the coordinator, for `consilium federation rekey`;")
    say("put the new consortium.json into your kit, and approve the study again; so does each site")


@site_app.command("approve")
def site_approve(
    site: Site = None,
    kit: Annotated[
        Path | None, typer.Option(help="The site's start-up kit; below kits/ by default.")
    ] = None,
    root: Root = Path(),
) -> None:
    """Sign the study as it is now: protocol, code, consortium, and this site's own limits.

    A site runs only what it has approved itself, once a quorum of the consortium has too.
    """
    from flows.gate import approve_at
    from fusion.federation.consortium import CONSORTIUM_FILE, read_consortium

    workspace, _ = opened(root)
    name = only_site(workspace, site)
    folder = root / "kits" / name if kit is None else kit
    try:
        consortium = read_consortium(folder / CONSORTIUM_FILE)
        approval = approve_at(root, name, consortium, say=say)
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise UsageError(str(error)) from None
    say(f"approved: send approvals/{approval.site}.json to the coordinator")


@site_app.command("withdraw")
def site_withdraw(
    patient: Annotated[str, typer.Argument(help="Pseudonym of the patient, as in the manifest.")],
    site: Annotated[str | None, typer.Option("--site", help="Site; if there are several.")] = None,
    root: Root = Path(),
) -> None:
    """Delete a patient's features at once, and never take the patient in again."""
    from flows.snapshots import withdraw

    workspace, _ = opened(root)
    done = withdraw(workspace.site(only_site(workspace, site)), patient)
    say(f"withdrawn: {done.n_files_removed} files removed")
    for run in done.runs:
        say(f"made with this patient among others: run {run[:12]}")
    if done.snapshots:
        say("this site takes part again when enough other patients came, left or changed")


@site_app.command("prepare")
def site_prepare(
    site: Annotated[
        str | None, typer.Argument(help="Site; may be left out if there is one.")
    ] = None,
    root: Root = Path(),
) -> None:
    """Turn a site's raw inputs into its cohort, doing only what is new."""
    workspace, protocol = opened(root)
    name = only_site(workspace, site)
    with serving(workspace.root) as run:
        connected(workspace.root, run)
        from flows.site import prepare_site

        done = prepare_site(protocol.study.name, name)
    say(
        f"{name}: {done.n_patients} patients, {done.n_extracted} inputs extracted, "
        f"{done.n_excluded} set aside (excluded.csv)"
    )


@site_app.command("train")
def site_train(
    site: Annotated[
        str | None, typer.Argument(help="Site; may be left out if there is one.")
    ] = None,
    root: Root = Path(),
) -> None:
    """Train a site's own encoders on its cohort."""
    workspace, protocol = opened(root)
    name = only_site(workspace, site)
    with serving(workspace.root) as run:
        connected(workspace.root, run)
        from flows.site import train_site
        from flows.snapshots import snapshot_state

        left_out = train_site(protocol.study.name, name)
    for modality in protocol.modalities:
        say(f"{name}: {modality}: {left_out.get(modality, 'trained')}")
    state = snapshot_state(workspace.site(name))
    say(
        f"{name}: snapshot {state.last} of {state.n_patients} patients; {state.n_waiting} who "
        "came, left or changed wait for the next"
    )


def _print_faults(faults: Sequence[Exclusion], *, n_inputs: int) -> None:
    for fault in faults:
        whose = f"{fault.patient_id}  " if fault.patient_id else ""
        say(f"{whose}{fault.modality}  {fault.code}: {fault.reason}")
    of_all = sum(not fault.patient_id for fault in faults)
    rest = f"; faults of no single input: {of_all}" if of_all else ""
    say(f"{n_inputs} inputs, {len(faults) - of_all} would be set aside{rest}")
