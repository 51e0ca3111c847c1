"""How long a kit's certificates still count, said before it is too late."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from fusion.keys import certificate_dates, certificate_expiry
from infra.provision import AUTHORITY, ProvisionError, read_party
from infra.renewal import certificates, renew

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

WARN_DAYS: Final = 30
_AUTHORITY_FILE: Final = "rootCA.pem"


class CertificateExpired(ValueError):
    """A kit that no party would talk to any more; the message says what to do."""


@dataclass(frozen=True)
class Certificate:
    """One certificate of a kit.

    Parameters
    ----------
    name
        ``certificate`` of the party itself, or ``authority``, which signed everybody's.
    expires
        Last moment at which it counts.
    days_left
        Whole days until then; negative when it is past.
    """

    name: str
    expires: datetime
    days_left: int

    def sentence(self) -> str:
        """Say when it ends, and what to do about it where that is near."""
        text = f"{self.name}: counts until {self.expires:%Y-%m-%d}, {self.days_left} days from now"
        return text if self.days_left >= WARN_DAYS else f"{text}; {self.remedy()}"

    def remedy(self) -> str:
        """Say who does what for a new one."""
        if self.name == AUTHORITY:
            return "the coordinator makes all kits anew, in another folder"
        return (
            "the coordinator runs `consilium federation renew` for this party, and its new startup "
            "folder replaces the one in this kit"
        )


def certificates_of(kit: Path, *, now: datetime | None = None) -> list[Certificate]:
    """Read how long a kit's certificates count, the first to end first.

    Raises
    ------
    infra.provision.ProvisionError
        If the folder is no kit, or one without certificates.
    fusion.keys.KeyFault
        If a file is no certificate.
    """
    read_party(kit)
    moment = datetime.now(UTC) if now is None else now
    found = [_certificate(path, moment) for path in certificates(kit)]
    if not found:
        raise ProvisionError("kit: found no certificate in startup, needed the party's own")
    return sorted(found, key=lambda one: one.expires)


def check_certificates(
    kit: Path, *, say: Callable[[str], None], now: datetime | None = None
) -> None:
    """Say which certificates of a kit end within 30 days.

    Raises
    ------
    CertificateExpired
        If one has ended.
    """
    for found in certificates_of(kit, now=now):
        if found.days_left < 0:
            raise CertificateExpired(
                f"{found.name}: found one that counted until {found.expires:%Y-%m-%d}, needed one "
                f"that still does; {found.remedy()}"
            )
        if found.days_left < WARN_DAYS:
            say(found.sentence())


def renew_certificate(kits: Path, party: str) -> tuple[Path, Certificate]:
    """Make a party a new certificate; give its new ``startup`` folder, and what ends first there.

    Raises
    ------
    infra.provision.ProvisionError
        If there is no such party, or no authority in the folder.
    CertificateExpired
        If the authority itself has ended.
    """
    now = datetime.now(UTC)
    coordinator = kits / "coordinator" / "startup" / _AUTHORITY_FILE
    try:
        begins, ends = certificate_dates(coordinator.read_bytes())
    except OSError:
        raise ProvisionError(
            "kits: found no kit of the coordinator in the folder, needed the one that `consilium "
            "federation provision` wrote"
        ) from None
    authority = Certificate(AUTHORITY, ends, (ends - now).days)
    if authority.days_left < 0:
        raise CertificateExpired(f"{AUTHORITY}: found it ended; {authority.remedy()}")
    startup = renew(kits, party, authority_days=(ends - begins).days)
    found = [_certificate(path, now) for path in certificates(startup.parent)]
    return startup, min(found, key=lambda one: one.expires)


def _certificate(path: Path, now: datetime) -> Certificate:
    expires = certificate_expiry(path.read_bytes())
    name = AUTHORITY if path.name == _AUTHORITY_FILE else "certificate"
    return Certificate(name, expires, (expires - now).days)
