"""Secure sums in a conversation: a site's keys and masked replies, the coordinator's totals."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fusion import messages as m
from fusion.federation.designs import NotReleased
from fusion.federation.totals import flatten
from fusion.keys import canonical_json, digest
from fusion.secure_sum import MaskContext, Masker, MaskRefused

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fusion.federation.answered import Book
    from fusion.federation.plan import FederationPlan
    from fusion.keys import SigningKey


# Rosters that the same moments are told to: their totals differ by whole sites' moments, each of
# which passes the minimum counts by itself.
MAX_ROSTERS: Final = 3


@dataclass(frozen=True)
class SiteIdentity:
    """Who a site is, and whom it believes.

    Attributes
    ----------
    site
        Its name.
    key
        Its own signing key.
    trusted
        Public key of every site of the consortium, from the site's own file.
    """

    site: str
    key: SigningKey
    trusted: Mapping[str, str]


class SiteMasks:
    """A site's end of the secure sums of one run.

    Parameters
    ----------
    identity
        None at a site that has no key: it then takes part in no secure sum.
    book
        Remembers over all runs what was answered for which roster.
    """

    def __init__(self, identity: SiteIdentity | None, book: Book) -> None:
        self._identity, self._book = identity, book
        self._masker: Masker | None = None
        self._attempt, self._round = 0, 0
        self._roster: tuple[str, ...] = ()

    def key(self, request: m.AskKey, plan: FederationPlan) -> m.Key:
        """Make a new key for an attempt; keys of an earlier one are gone with it."""
        if self._identity is None:
            raise NotReleased("bad_key")
        if request.attempt <= self._attempt:
            raise NotReleased("mask_spent")
        self._attempt, self._roster = request.attempt, tuple(sorted(request.roster))
        context = MaskContext(plan.study, plan.protocol, plan.run, request.attempt, self._roster)
        self._masker = None
        with _codes():
            self._masker = Masker(
                context,
                site=self._identity.site,
                key=self._identity.key,
                trusted=self._identity.trusted,
            )
            public, signature = self._masker.certificate
        return m.Key(_bytes(public), _bytes(signature))

    def agree(self, request: m.SetKeys) -> m.Done:
        """Check the other sites' keys and agree with each on a mask of this attempt."""
        if self._masker is None or request.attempt != self._attempt:
            raise NotReleased("bad_key")
        if tuple(sorted(request.roster)) != self._roster:
            raise NotReleased("roster_changed")
        with _codes():
            self._masker.agree(
                {s: x.tobytes() for s, x in zip(request.roster, request.publics, strict=True)},
                {s: x.tobytes() for s, x in zip(request.roster, request.signatures, strict=True)},
            )
        return m.Done()

    def require_fresh(self, request: Any, *, private: bool) -> None:
        """Refuse coefficients that were answered for another roster, and rounds gone by.

        The difference of the two totals would be the sums of the sites in which the rosters differ.
        """
        if self._masker is None:
            raise NotReleased("bad_key")
        if request.round <= self._round:
            raise NotReleased("mask_spent")
        roster = digest(canonical_json(self._roster))
        if private:  # each site's noise hides its patients from whatever is subtracted
            self._round = request.round
            return
        # What has no coefficients is told to a few rosters, so that a run outlives a lost site.
        designs = getattr(request, "designs", ())
        asked = [(f"{type(request).__name__}: {x}", roster, MAX_ROSTERS) for x in designs]
        asked += [(name, roster, 1) for name in _asked_of(request)]
        if not self._book.spend(asked):
            raise NotReleased("roster_changed")
        self._round = request.round

    def hide(self, request: Any, reply: m.Message) -> m.Masked:
        """Mask a reply's sums; they cross in no other form."""
        assert self._masker is not None
        with _codes():
            words = self._masker.mask(
                flatten(reply), round=request.round, label=type(request).__name__
            )
        return m.Masked(words)


def _asked_of(request: Any) -> list[str]:
    """Name each fit with the coefficients that it is evaluated at."""
    at = getattr(request, "coefficients", getattr(request, "weights", None))
    if at is None:
        return []
    names = getattr(request, "fits", None) or request.arms
    return [
        digest(canonical_json([type(request).__name__, name, row.tolist()]))
        for name, row in zip(names, at, strict=True)
    ]


def _bytes(raw: bytes) -> m.Bytes:
    return np.frombuffer(raw, dtype=np.uint8)


@contextmanager
def _codes() -> Iterator[None]:
    """Turn a refusal of the masks into the site's."""
    try:
        yield
    except MaskRefused as refusal:
        raise NotReleased(refusal.code) from None
