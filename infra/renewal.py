"""A new certificate for one party, signed by the authority that signed the others.

The engine keeps the authority's key and every certificate in one state file, and makes a
certificate for whoever has none there: so one entry is left out of a copy, the engine runs on the
copy, and what it made for that party is taken. Nobody else's certificate changes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from infra.provision import (
    ADMIN,
    AUTHORITY,
    CONSORTIUM_FILE,
    COORDINATOR,
    STUDY_USER,
    ProvisionError,
    Server,
    make_private,
    narrow,
    run_engine,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTUP: Final = "startup"
_STATE: Final = Path("state") / "cert.json"


def renew(kits: Path, party: str, *, authority_days: int) -> Path:
    """Give a party a new certificate and key of the engine; the folder to send to it.

    What is written is the ``startup`` folder of the party's kit, which replaces the one that the
    party has while its service is stopped. Its identity key, its approvals and the other parties'
    kits stay as they are.

    Parameters
    ----------
    kits
        Folder that :func:`infra.provision.provision` wrote, with its ``authority``.
    party
        A site, ``coordinator`` or ``admin``.
    authority_days
        Days for which the authority was made: its whole life, not what is left of it.

    Returns
    -------
    Path
        Folder ``startup`` of the party's kit here.

    Raises
    ------
    ProvisionError
        If the folder has no authority, no kit lists the party, or the engine fails.
    """
    study, sites, server = _provisioned(kits)
    if party not in {*sites, COORDINATOR, ADMIN}:
        raise ProvisionError(f"{party}: found no such party in {CONSORTIUM_FILE}")
    state = kits / AUTHORITY / study / _STATE
    if not state.is_file():
        raise ProvisionError(
            f"{AUTHORITY}: found none in the folder of the kits, needed the one that signed them"
        )
    subject = {COORDINATOR: server.host, ADMIN: STUDY_USER}.get(party, party)
    with tempfile.TemporaryDirectory(prefix=".renewal-", dir=kits) as scratch:
        copy = Path(scratch) / AUTHORITY / study / _STATE
        copy.parent.mkdir(parents=True)
        known = json.loads(state.read_text())
        known.pop(subject, None)
        copy.write_text(json.dumps(known))
        made = run_engine(
            study, sites, Path(scratch) / AUTHORITY, server=server, valid_days=authority_days
        )
        fresh = narrow(made / subject, party)
        startup = _put(fresh / STARTUP, kits / party)
        copy.replace(state)
        make_private(kits / AUTHORITY)
    return startup


def _put(fresh: Path, kit: Path) -> Path:
    """Move a folder into a kit, in place of the one that is there."""
    kit.mkdir(exist_ok=True, mode=0o700)
    target, before = kit / STARTUP, kit / f".{STARTUP}-before"
    shutil.rmtree(before, ignore_errors=True)
    if target.exists():
        target.rename(before)
    fresh.rename(target)
    make_private(target)
    shutil.rmtree(before, ignore_errors=True)
    return target


def _provisioned(kits: Path) -> tuple[str, tuple[str, ...], Server]:
    """Study, sites and server's address, as the coordinator's kit has them."""
    kit = kits / COORDINATOR
    try:
        consortium = json.loads((kit / CONSORTIUM_FILE).read_text())
        engine = json.loads((kit / STARTUP / "fed_server.json").read_text())
        host, _, port = engine["servers"][0]["service"]["target"].rpartition(":")
        return consortium["study"], tuple(sorted(consortium["sites"])), Server(host, int(port))
    except (OSError, ValueError, KeyError, IndexError):
        raise ProvisionError(
            f"kits: found no kit of the {COORDINATOR} in the folder, needed the one that "
            "`consilium federation provision` wrote"
        ) from None


def certificates(kit: Path) -> Iterator[Path]:
    """Yield a kit's certificates: its own, and that of the authority."""
    yield from sorted((kit / STARTUP).glob("*.crt"))
    yield from sorted((kit / STARTUP).glob("*.pem"))
