"""The parties of a study and their public keys: one file, the same at every party."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fusion.keys import canonical_json, digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

COORDINATOR: Final = "coordinator"
CONSORTIUM_FILE: Final = "consortium.json"
PARTY_NAME: Final = re.compile(r"[a-z][a-z0-9-]{0,39}")
HEX_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_FIELDS: Final = {"study", "coordinator", "sites", "quorum", "revoked"}
_MAX_SITES: Final = 1000


@dataclass(frozen=True)
class Consortium:
    """Who takes part in a study, each known by an Ed25519 public key of 64 hex digits.

    Parameters
    ----------
    study
        Name of the study.
    coordinator
        Public key.
    sites
        Public key per name.
    quorum
        Sites that must have approved a study before any of them runs it.
    revoked
        Public keys that count for nothing any more.

    Raises
    ------
    ValueError
        If a name or a key is none, a key stands for two parties, or the quorum is impossible.
    """

    study: str
    coordinator: str
    sites: Mapping[str, str]
    quorum: int
    revoked: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    def public(self, party: str) -> str:
        """Public key of the coordinator or of a site.

        Raises
        ------
        ValueError
            If there is no such party, or its key was revoked.
        """
        key = self.coordinator if party == COORDINATOR else self.sites.get(party)
        if key is None:
            raise ValueError("party: found one that the consortium does not list")
        if key in self.revoked:
            raise ValueError(f"{party}: found a revoked key, needed one that is in force")
        return key

    def knows(self, party: str) -> bool:
        """Whether this is a party whose key is in force."""
        try:
            self.public(party)
        except ValueError:
            return False
        return True

    def to_bytes(self) -> bytes:
        """Canonical JSON, the file's content."""
        values = {
            "study": self.study,
            "coordinator": self.coordinator,
            "sites": dict(self.sites),
            "quorum": self.quorum,
            "revoked": list(self.revoked),
        }
        return canonical_json(values)

    def digest(self) -> str:
        """SHA-256 over :meth:`to_bytes` as 64 hex digits."""
        return digest(self.to_bytes())


def read_consortium(path: Path) -> Consortium:
    """Read a ``consortium.json``, which must be exactly what :meth:`Consortium.to_bytes` writes.

    A final newline is allowed.

    Raises
    ------
    ValueError
        If the file is missing or written in another way, or a value is impossible.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path.name}: found no such file; it comes with the kit") from None
    except OSError:
        raise ValueError(f"{path.name}: needed a readable file") from None
    values = _values(data, source=path.name)
    try:
        found = Consortium(**{**values, "revoked": tuple(values["revoked"])})
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None
    if data.removesuffix(b"\n") != found.to_bytes():
        raise ValueError(f"{path.name}: needed canonical JSON, as the kit holds it")
    return found


def _values(data: bytes, *, source: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{source}: needed JSON") from None
    if not isinstance(values, dict) or set(values) != _FIELDS:
        raise ValueError(f"{source}: needed exactly the keys {', '.join(sorted(_FIELDS))}")
    if not isinstance(values["revoked"], list) or not isinstance(values["sites"], dict):
        raise ValueError(f"{source}: needed an object of sites and a list of revoked keys")
    return values


def _check(consortium: Consortium) -> None:
    sites, quorum = consortium.sites, consortium.quorum
    if not matches(PARTY_NAME, consortium.study):
        raise ValueError("study: needed lower-case letters, digits and hyphens, a letter first")
    if not 2 <= len(sites) <= _MAX_SITES:
        raise ValueError(f"sites: found {len(sites)}, needed 2 to {_MAX_SITES}")
    if COORDINATOR in sites or not all(matches(PARTY_NAME, name) for name in sites):
        raise ValueError(
            "sites: needed names of lower-case letters, digits and hyphens, a letter first, other "
            f"than {COORDINATOR}"
        )
    parties = [consortium.coordinator, *sites.values()]
    if not all(matches(HEX_DIGEST, key) for key in (*parties, *consortium.revoked)):
        raise ValueError("public keys: needed 64 hex digits each")
    if len(set(parties)) < len(parties) or len(set(consortium.revoked)) < len(consortium.revoked):
        raise ValueError("public keys: found one twice, needed each party's own")
    if type(quorum) is not int or not 1 <= quorum <= len(sites):
        raise ValueError(f"quorum: needed a whole number from 1 to the {len(sites)} sites")


def matches(pattern: re.Pattern[str], value: object) -> bool:
    """Whether a value that may be anything is text of this form."""
    return isinstance(value, str) and pattern.fullmatch(value) is not None
