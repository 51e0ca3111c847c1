"""The coordinator's end of a federation between machines: kits, engine, signatures, resumption."""

from __future__ import annotations

import statistics
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import approval_fields, read_approvals
from flows.identity import identity
from flows.versions import CODE, source_digest
from fusion import messages as m
from fusion.audit import LOG_FILE, AuditLog
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium
from fusion.federation.conversation import introduce
from fusion.federation.envelope import SignedTransport
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from flows.protocol import StudyProtocol
    from fusion.federation.consortium import Consortium
    from fusion.flare import FlareTransport
    from infra.settings import Workspace

KITS: Final = "kits"
_ECHOES: Final = 7


class FederationRefused(RuntimeError):
    """Sites that were asked to take part and none, or too few, of which does; says why.

    Attributes
    ----------
    codes
        Per site that was asked and does not, why not.
    """

    def __init__(self, text: str, *, codes: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.codes = dict(codes or {})


@dataclass
class Federation:
    """A running job of the federation engine, as a transport of signed envelopes.

    Attributes
    ----------
    codes
        Per site that does not take part, why not.
    """

    protocol: StudyProtocol
    consortium: Consortium
    engine: FlareTransport
    log: AuditLog
    home: Path
    codes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._signed = self._sign()

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""
        return self.engine.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Send one request to these sites, signed; see :class:`SignedTransport`."""
        return self._signed.ask(payload, sites)

    def _sign(self) -> SignedTransport:
        return SignedTransport(
            self.engine, key=identity(self.home), consortium=self.consortium, log=self.log
        )

    def run_key(self) -> str:
        """Introduce the run to every site, and name it by protocol, cohorts and code.

        Raises
        ------
        FederationRefused
            If fewer than two sites take part.
        """
        approvals = read_approvals(self.home / APPROVALS)
        protocol, code = self.protocol.fingerprint(), source_digest(*CODE)
        if not approvals:
            raise FederationRefused(
                f"{COORDINATOR}/{APPROVALS}: found none, needed the file that each site's "
                "`consilium site approve` wrote"
            )
        sites, settings, signatures = approval_fields(approvals)
        introduction = m.Introduce(
            protocol, code, self.consortium.digest(), sites, settings, signatures
        )
        cohorts, self.codes = introduce(self, introduction)
        if len(cohorts) < 2:
            why = ", ".join(f"{site} {code}" for site, code in sorted(self.codes.items()))
            raise FederationRefused(
                f"sites: found {len(cohorts)} that take part, needed at least 2 ({why}); see the "
                "logs of the sites",
                codes=self.codes,
            )
        return fingerprint([protocol, cohorts, code])

    def again(self) -> None:
        """Begin a new job after the last one was lost."""
        self.engine.resubmit()
        self._signed = self._sign()

    def time_engine(self, n_bytes: int) -> float:
        """Median seconds of rounds of the engine alone, with as many bytes both ways."""
        return statistics.median(self.engine.echo(n_bytes, self.sites) for _ in range(_ECHOES))


@contextmanager
def federation(workspace: Workspace, protocol: StudyProtocol) -> Iterator[Federation]:
    """Run a job of the federation engine from the coordinator's kit, and end it.

    Raises
    ------
    FederationRefused
        If the folder has no kits, or they are another study's.
    fusion.federation.transport.FederationLost
        If the engine cannot be reached.
    """
    from fusion.flare import FlareTransport  # the engine takes seconds to import

    kits = workspace.root / KITS
    kit = kits / COORDINATOR
    if not kit.is_dir():
        raise FederationRefused(
            f"{KITS}: found no start-up kits, needed those of the coordinator and of the admin; "
            "make them with `consilium federation provision`"
        )
    consortium = read_consortium(kit / CONSORTIUM_FILE)
    if consortium.study != protocol.study.name:
        raise FederationRefused(
            f"{KITS}: found those of {consortium.study}, needed {protocol.study.name}'s"
        )
    home = workspace.root / COORDINATOR
    log = AuditLog(home / LOG_FILE, party=COORDINATOR, key=identity(home))
    with FlareTransport(
        kits / "admin", kit, sites=tuple(sorted(consortium.sites)),
        timeout_s=protocol.federation.timeout_s,
    ) as engine:  # fmt: skip
        yield Federation(protocol, consortium, engine, log, home)
