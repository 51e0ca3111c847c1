"""``consilium lineage``: where a model comes from, and whether all of that still is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.tree import Tree
from typer.core import TyperGroup

from flows.terminal import OUT, Json, Root, print_json, say, workspace_at

if TYPE_CHECKING:
    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings, Workspace

_SHOWN = 3
_SHORT = 16


class _ShowByDefault(TyperGroup):
    """A group whose command ``show`` may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = [x for x in args if x in self.commands]
        if named:
            args = [named[0], *(x for x in args if x != named[0])]
        elif not {"-h", "--help"} & set(args):
            args = ["show", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


lineage_app = typer.Typer(
    cls=_ShowByDefault,
    help="Where a model comes from, back to the digests of the raw inputs.",
)
Model = Annotated[
    str | None,
    typer.Argument(help="name, name@alias or name/version; the study's newest version."),
]


@lineage_app.command(hidden=True)
def show(model: Model = None, root: Root = Path(), as_json: Json = False) -> None:
    """Print the whole tree of a version: run, protocol, code, encoders, cohorts, inputs."""
    from flows.lineage import lineage_values, opened_lineage, site_values

    workspace = workspace_at(root)
    if _is_site_alone(workspace, model):
        settings, protocol = _site_of(workspace)
        values = site_values(settings, protocol.study.name)
        tree = Tree(f"{protocol.study.name}: what this site has of it")
        _add_site(tree, values)
    else:
        with opened_lineage(workspace, model) as found:
            values = lineage_values(found)
        tree = lineage_tree(values)
    if as_json:
        print_json(values)
    else:
        OUT.print(tree)


@lineage_app.command()
def verify(model: Model = None, root: Root = Path(), as_json: Json = False) -> None:
    """Compute everything that this machine can reach anew; exit 1 naming what changed."""
    from flows.lineage import opened_lineage
    from flows.lineage_check import FAULTS, check_lineage, check_site, item_values

    workspace = workspace_at(root)
    if _is_site_alone(workspace, model):
        settings, protocol = _site_of(workspace)
        items, title = check_site(settings, protocol), settings.name
    else:
        with opened_lineage(workspace, model) as found:
            items = check_lineage(found)
            title = f"{found.version.name} version {found.version.version}"
    faults = [item for item in items if item.state in FAULTS]
    if as_json:
        print_json({"model": title, "whole": not faults, "items": item_values(items)})
    else:
        for item in items:
            say(item.sentence())
        say(f"{title}: {f'{len(faults)} not as they were' if faults else 'whole'}")
    raise typer.Exit(1 if faults else 0)


def _is_site_alone(workspace: Workspace, model: str | None) -> bool:
    """Whether this is a site's own folder, from where the coordinator's registry is not reached."""
    from infra.settings import SITE_FILE

    root = workspace.root
    alone = workspace.tracking_uri is None and not (root / "mlflow.db").is_file()
    return model is None and alone and (root / SITE_FILE).is_file()


def _site_of(workspace: Workspace) -> tuple[SiteSettings, StudyProtocol]:
    from flows.protocol import load_protocol

    (name,) = workspace.site_names()
    return workspace.site(name), load_protocol(workspace.study_file)


def lineage_tree(values: dict[str, Any]) -> Tree:
    """Draw a version's lineage; inputs by number, never by name."""
    aliases = f" ({', '.join(values['aliases'])})" if values["aliases"] else ""
    tree = Tree(f"{values['model']} version {values['version']}{aliases}")
    run = tree.add(f"run {values['run'][:12]}  MLflow run {values['mlflow_run']}")
    run.add(f"protocol  {values['protocol'][:_SHORT]}")
    run.add(f"code      {values['commit'][:12]}  sources {values['code'][:_SHORT]}")
    run.add(f"lock      {values['lock'][:_SHORT]}")
    run.add(f"signed by {values['signed_by'][:_SHORT] or 'nobody'}")
    encoders = run.add("encoders")
    for name, of in values["encoders"].items():
        encoders.add(f"{name}: {of[:_SHORT] if of != 'local' else 'local, at each site'}")
    for site in values["sites"]:
        _add_site(tree, site)
    return tree


def _add_site(tree: Tree, site: dict[str, Any]) -> None:
    if not site["here"]:
        tree.add(f"{site['site']}  {site['role']}  cohort {site['cohort'][:_SHORT]}  elsewhere")
        return
    branch = tree.add(f"{site['site']}  {site['role']}  cohort {site['cohort'][:_SHORT]}")
    cohort = branch.add(f"snapshot {site['snapshot']}")
    for name, of in site["modalities"].items():
        inputs = of["inputs"]
        part = cohort.add(f"{name}: {of['patients']} patients, raw inputs: {len(inputs)}")
        for number, digest in enumerate(inputs[:_SHOWN], start=1):
            part.add(f"input {number}  {digest[:_SHORT]}")
        if len(inputs) > _SHOWN:
            part.add(f"and {len(inputs) - _SHOWN} more; --json names all")
    for encoder in site["own_encoders"]:
        branch.add(
            f"{encoder['name']} version {encoder['version']}  weights {encoder['weights'][:_SHORT]}"
        )
