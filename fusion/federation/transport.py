"""How bytes reach the sites: an interface, and the transport that stays in this process."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fusion.federation.site import SiteStudy


class FederationLost(RuntimeError):
    """The engine's job is gone, or could not begin; the run can go on with a new job."""


class Transport(Protocol):
    """Carries one request to several sites and brings their replies, knowing neither."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites that can be asked."""

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Send one request to these sites; one that cannot be reached is absent from the result."""


class InProcess:
    """Calls each site's study in this process, with the same bytes that a network would carry."""

    def __init__(self, studies: Mapping[str, SiteStudy]) -> None:
        self._studies = dict(studies)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in the order given."""
        return tuple(self._studies)

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        """Let the sites answer side by side; array arithmetic runs outside the interpreter lock."""
        with ThreadPoolExecutor(max_workers=max(1, min(len(sites), 8))) as pool:
            return dict(
                zip(sites, pool.map(lambda s: self._studies[s].answer(payload), sites), strict=True)
            )
