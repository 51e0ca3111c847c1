"""``consilium federation``: start-up kits of a study, and what runs from them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from infra.provision import COORDINATOR, Keys, ProvisionError, Server, provision, rekey, revoke
from infra.settings import SITE_FILE, load_site

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

Kits = Annotated[Path, typer.Option("--kits", help="Folder with the kits.")]
Kit = Annotated[
    Path | None,
    typer.Option(
        "--kit", help="Start-up kit; by default that of the folder's site, or the coordinator's."
    ),
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
    valid_days: Annotated[
        int,
        typer.Option(min=1, help="Days that the authority lasts; certificates last at most 360."),
    ] = 1800,
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
    kit: Kit = None,
    site_home: Annotated[
        Path | None,
        typer.Option(help="Folder with study.toml and the site's files; noted in the kit."),
    ] = None,
) -> None:
    """Run a party in the foreground until Ctrl-C, and start it again when it dies."""
    from flows.certificates import check_certificates
    from flows.parties import run_party

    own = _own_kit(kit, site_home or Path())
    check_certificates(own, say=typer.echo)
    raise typer.Exit(run_party(own, say=typer.echo, site_home=site_home))


@federation_app.command("check")
def check_kit(
    kit: Kit = None,
    running: Annotated[
        bool, typer.Option("--running", help="Whether its party runs on this machine, instead.")
    ] = False,
) -> None:
    """Say how long a kit's certificates count; exit 1 if one ends within 30 days.

    With --running, for health checks: exit 1 if no party runs from the kit.
    """
    from flows.certificates import WARN_DAYS, certificates_of

    if running:
        from flows.parties import is_running

        found = is_running(_own_kit(kit, Path()))
        typer.echo("running" if found else "not running")
        raise typer.Exit(0 if found else 1)
    certificates = certificates_of(_own_kit(kit, Path()))
    for one in certificates:
        typer.echo(one.sentence())
    raise typer.Exit(1 if certificates[0].days_left < WARN_DAYS else 0)


@federation_app.command("renew")
def renew_party(
    party: Annotated[str, typer.Argument(help="A site, coordinator or admin.")],
    kits: Kits = Path("kits"),
) -> None:
    """Make a party a new certificate before its old one ends; everyone else's stays.

    The party replaces its kit's startup folder by the new one, and starts its service again.
    """
    from flows.certificates import renew_certificate

    startup, first = renew_certificate(kits.resolve(), party)
    typer.echo(f"{party}: {first.sentence()}")
    typer.echo(f"{party}: give it {startup}, by a safe way: it holds a private key")


@federation_app.command("rekey")
def rekey_party(
    party: Annotated[str, typer.Argument(help="A site, or coordinator.")],
    pub: Annotated[
        Path | None,
        typer.Option(help="The site's new identity.pub; the coordinator's key is changed here."),
    ] = None,
    kits: Kits = Path("kits"),
    root: Annotated[Path, typer.Option(help="The coordinator's folder.")] = Path(),
) -> None:
    """Put a party's new key in place of its old one, which counts for nothing from then on.

    The consortium changes by this, so every site approves the study again.
    """
    if not any(kits.glob("*/consortium.json")):
        raise ProvisionError("kits: found none in the folder, needed those of the study")
    changed = rekey(kits, party, _new_key(party, pub, root))
    typer.echo(
        f"{party}: its new key is in force; give every party the new {changed.name}, and every "
        "site approves the study again"
    )


@federation_app.command("revoke")
def revoke_site(
    site: Annotated[str, typer.Argument(help="Name of the site.")],
    kits: Kits = Path("kits"),
) -> None:
    """Shut a site out: the running coordinator drops it, and its key counts no more.

    The consortium changes by this, so every other site approves the study again.
    """
    from fusion.flare import disable_site

    disable_site(kits / "admin", site)
    changed = revoke(kits, site)
    typer.echo(f"{site}: shut out; give every site the new {changed.name}, to be approved again")


def _own_kit(kit: Path | None, root: Path) -> Path:
    """Kit that is meant: the one named, or that of the party whose folder it is."""
    if kit is not None:
        return kit
    is_site = (root / SITE_FILE).is_file()
    return root / "kits" / (load_site(root / SITE_FILE).name if is_site else COORDINATOR)


def _new_key(party: str, pub: Path | None, root: Path) -> str:
    """Public key to put in place: the coordinator's is made here, a site sends its own."""
    if party == COORDINATOR:
        from flows.identity import rotate

        return rotate(root / COORDINATOR, party=COORDINATOR).new
    if pub is None:
        raise ProvisionError(
            f"{party}: needed --pub, the file identity.pub that the site has after `consilium site "
            "key --rotate`"
        )
    return _public_key(party, pub)


def _site_key(name: str, root: Path, folder: Path | None) -> str:
    """Public key of a site: as it sent it, or made here where its files are on this machine."""
    if folder is None and (root / name / "site.toml").is_file():
        from flows.identity import identity

        return identity(root / name).public
    return _public_key(
        name, root / name / "identity.pub" if folder is None else folder / f"{name}.pub"
    )


def _public_key(name: str, path: Path) -> str:
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
