"""``consilium federation``: start-up kits of a study, and what runs from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from infra.provision import Keys, ProvisionError, Server, provision, revoke

federation_app = typer.Typer(
    help="Run a study between machines: start-up kits, and the parties' services.",
    no_args_is_help=True,
)
_PUBLIC_KEY = re.compile(r"[0-9a-f]{64}")

Out = Annotated[Path, typer.Option("--out", help="Folder for the kits; private.")]
KeyFolder = Annotated[
    Path | None,
    typer.Option("--keys", help="Folder with SITE.pub of each site; else those below the study."),
]


@federation_app.command("provision")
def provision_kits(
    study: Annotated[Path, typer.Argument(help="The study.toml.")],
    sites: Annotated[str, typer.Option(help="Names of the sites, as a,b,c.")],
    out: Out = Path("kits"),
    host: Annotated[str, typer.Option(help="Where sites reach the coordinator.")] = "localhost",
    port: Annotated[int, typer.Option(help="The coordinator's one open port.")] = 8002,
    keys: KeyFolder = None,
    quorum: Annotated[
        int | None, typer.Option(min=1, help="Sites that must approve the study; else all.")
    ] = None,
    valid_days: Annotated[int, typer.Option(min=1, help="Days that certificates last.")] = 360,
) -> None:
    """Write one start-up kit per site, one for the coordinator and one for the admin.

    Each kit goes to its party by a safe way: it holds the party's private key of the engine.
    """
    from flows.identity import identity
    from flows.protocol import load_protocol

    protocol, root = load_protocol(study), study.resolve().parent
    names = [name.strip() for name in sites.split(",") if name.strip()]
    if quorum is not None and quorum > len(names):
        raise ProvisionError(f"--quorum: found {quorum}, needed at most the {len(names)} sites")
    found = {name: _site_key(name, root, keys) for name in names}
    kits = provision(
        protocol.study.name,
        Keys(identity(root / "coordinator").public, found, quorum=quorum or len(names)),
        out=out.resolve(),
        server=Server(host, port),
        homes={name: root for name in names if (root / name).is_dir()},
        valid_days=valid_days,
    )
    for name, kit in kits.items():
        typer.echo(f"{name}: {kit}")


@federation_app.command()
def start(
    kit: Annotated[Path, typer.Option(help="Start-up kit of a site or of the coordinator.")],
    site_home: Annotated[
        Path | None,
        typer.Option(help="Folder with study.toml and the site's files; noted in the kit."),
    ] = None,
) -> None:
    """Run a party in the foreground until Ctrl-C, and start it again when it dies."""
    from flows.parties import run_party

    raise typer.Exit(run_party(kit, say=typer.echo, site_home=site_home))


@federation_app.command("revoke")
def revoke_site(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    kits: Annotated[Path, typer.Option(help="Folder with the kits.")] = Path("kits"),
) -> None:
    """Shut a site out: the running coordinator drops it, and its key counts no more.

    The consortium changes by this, so every other site approves the study again.
    """
    from fusion.flare import disable_site

    disable_site(kits / "admin", site)
    changed = revoke(kits, site)
    typer.echo(f"{site}: shut out; give every site the new {changed.name}, to be approved again")


def _site_key(name: str, root: Path, folder: Path | None) -> str:
    """Public key of a site: as it sent it, or made here where its files are on this machine."""
    if folder is None and (root / name / "site.toml").is_file():
        from flows.identity import identity

        return identity(root / name).public
    path = root / name / "identity.pub" if folder is None else folder / f"{name}.pub"
    try:
        key = path.read_text().strip()
    except OSError:
        raise ProvisionError(
            f"{name}: found no public key, needed {path.name}; ask the site for its identity.pub, "
            "which `consilium site key` prints"
        ) from None
    if not _PUBLIC_KEY.fullmatch(key):
        raise ProvisionError(f"{path.name}: found no public key, needed 64 hex digits")
    return key
