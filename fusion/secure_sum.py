"""Pairwise masks: a coordinator adds what sites send, and learns nothing but the total.

Every two sites agree on a key; in each round the one adds a stream of it to its values and the
other subtracts the same stream, so that all masks cancel in the sum over the whole roster and in
no smaller one. No party ever reveals a key or a seed: when a site is lost the attempt is abandoned,
and another begins with new keys. Whoever could call a site both alive and lost, and be handed the
seeds of the one and the keys of the other, would unmask it; here there is nothing to hand out. All
other sites together with the coordinator do learn a site's values.

Values are in fixed point modulo 2**128, in two 64-bit words with steps of 2**-64. One word with
steps of 2**-32 holds ten digits either side of the point: sums of squares of volumes do not fit,
and those of millimolar values lose all their digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from fusion.keys import Agreement, KeyFault, canonical_json, expand, key_stream, verify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.keys import SigningKey
    from fusion.privacy import Refusal

    Floats = NDArray[np.float64]
    Words = NDArray[np.uint64]

_STEPS: Final = 2.0**64
# The total of a roster stays within what 2**128 can tell apart from its negative.
_LARGEST_TOTAL: Final = 2.0**62


class MaskRefused(ValueError):
    """A mask that would hide too little, or serve twice; ``code`` is what may be told of it."""

    def __init__(self, code: Refusal, sentence: str) -> None:
        super().__init__(f"secure sum: {sentence}")
        self.code: Refusal = code


@dataclass(frozen=True)
class MaskContext:
    """What the keys of one attempt at a run are bound to; the roster's order does not matter.

    Parameters
    ----------
    study, protocol, run
        Name of the study, fingerprint of its protocol, name of the run.
    attempt
        From 1; another whenever masks no longer cancel.
    roster
        Names of all sites whose values are added.
    """

    study: str
    protocol: str
    run: str
    attempt: int
    roster: tuple[str, ...]

    def bound(self, *more: object) -> bytes:
        """Canonical JSON of the context and what else belongs to it."""
        values = [self.study, self.protocol, self.run, self.attempt, sorted(self.roster), *more]
        return canonical_json(values)


class Masker:
    """A site's end of one attempt: an ephemeral key, and masks that serve once each.

    Parameters
    ----------
    site
        This site's name.
    key
        Its signing key, which vouches for the ephemeral one.
    trusted
        Public signing key of every site of the consortium, from the site's own file.
    minimum_roster
        Sites below which it hides nothing; the site's own demand, never a message's.

    Raises
    ------
    MaskRefused
        ``roster_too_small``; ``roster_changed`` if this site is not in the roster or a name is
        there twice; ``bad_key`` if a site of it is unknown.
    """

    def __init__(
        self,
        context: MaskContext,
        *,
        site: str,
        key: SigningKey,
        trusted: Mapping[str, str],
        minimum_roster: int = 3,
    ) -> None:
        roster = set(context.roster)
        if len(roster) < minimum_roster:
            raise MaskRefused(
                "roster_too_small", f"found {len(roster)} sites, needed {minimum_roster}"
            )
        if site not in roster or len(roster) < len(context.roster):
            raise MaskRefused("roster_changed", "needed each site once, this one among them")
        if not roster <= set(trusted):
            raise MaskRefused("bad_key", "found a site whose key is not known here")
        self._context, self._site, self._key = context, site, key
        self._trusted = {name: trusted[name] for name in roster}
        self._own = Agreement()
        self._pairs: dict[str, bytes] | None = None
        self._round = 0

    def __reduce__(self) -> NoReturn:
        raise TypeError("secure sum: a masker's keys are never copied or written")

    def __repr__(self) -> str:
        return f"Masker(site={self._site!r}, attempt={self._context.attempt})"

    @property
    def certificate(self) -> tuple[bytes, bytes]:
        """32-byte ephemeral public key, and the 64-byte signature that makes it this site's."""
        public = self._own.public
        return public, self._key.sign(self._certified(self._site, public))

    def _certified(self, site: str, public: bytes) -> bytes:
        return self._context.bound("certificate", site, public.hex())

    def agree(self, publics: Mapping[str, bytes], signatures: Mapping[str, bytes]) -> None:
        """Check every site's certificate, and agree with each other site on a key; once only.

        Raises
        ------
        MaskRefused
            ``roster_changed`` if not exactly the roster's keys are there; ``bad_key`` if a
            signature is not its site's for this very attempt, or nobody can agree with a key;
            ``mask_spent`` the second time.
        """
        if self._pairs is not None:
            raise MaskRefused("mask_spent", "found keys once more, needed a new attempt")
        if not set(publics) == set(signatures) == set(self._trusted):
            raise MaskRefused("roster_changed", "needed the keys of exactly the roster's sites")
        for site, public in publics.items():
            signed = self._certified(site, public)
            if not verify(self._trusted[site], signatures[site], signed):
                raise MaskRefused("bad_key", "found a key that its site did not sign for this")
        if publics[self._site] != self._own.public:
            raise MaskRefused("bad_key", "found another key in this site's own name")
        self._pairs = {s: self._shared(s, public) for s, public in publics.items()
                       if s != self._site}  # fmt: skip

    def _shared(self, peer: str, public: bytes) -> bytes:
        info = self._context.bound("pair", *sorted((self._site, peer)))
        try:
            return self._own.shared_key(public, info=info)
        except KeyFault:
            raise MaskRefused("bad_key", "found a key that agrees with everybody") from None

    def mask(self, values: Floats, *, round: int, label: str = "") -> Words:
        """Hide values behind this round's masks.

        Parameters
        ----------
        values
            (n,) this site's.
        round
            Above that of every earlier call.
        label
            What is summed; binds the masks.

        Returns
        -------
        numpy.ndarray
            (n, 2) words, the high one first; uniform to whoever lacks the keys.

        Raises
        ------
        MaskRefused
            ``bad_key`` before keys are agreed on, ``mask_spent`` for a round that is not new,
            ``overflow`` for a value that is not finite or too large; nothing is spent then.
        """
        if self._pairs is None:
            raise MaskRefused("bad_key", "needed keys to be agreed on first")
        if round <= self._round:
            raise MaskRefused("mask_spent", f"found round {round}, needed above {self._round}")
        high, low = _fixed_point(values, n_sites=len(self._trusted))
        self._round = round
        for peer, key in sorted(self._pairs.items()):
            n = len(low)
            stream = key_stream(expand(key, info=canonical_json([round, label])), 2 * n)
            if self._site < peer:
                _add(high, low, stream[:n], stream[n:])
            else:
                _subtract(high, low, stream[:n], stream[n:])
        return np.column_stack([high, low])


def unmask(masked: Mapping[str, Words], *, roster: Sequence[str]) -> Floats:
    """(n,) sums over the roster of what its sites masked in one round.

    Raises
    ------
    MaskRefused
        ``roster_changed`` if not every site of the roster is there, or shapes differ.
    """
    if set(masked) != set(roster) or len({words.shape for words in masked.values()}) != 1:
        raise MaskRefused("roster_changed", "needed one masked vector of every site, all alike")
    first, *others = masked.values()
    high, low = first[:, 0].copy(), first[:, 1].copy()
    for words in others:
        _add(high, low, words[:, 0], words[:, 1])
    return np.asarray(high.view(np.int64).astype(np.float64) + low.astype(np.float64) / _STEPS)


def _fixed_point(values: Floats, *, n_sites: int) -> tuple[Words, Words]:
    """High and low words of (n,) values, modulo 2**128 with steps of 2**-64."""
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all() or (np.abs(values) * n_sites >= _LARGEST_TOTAL).any():
        raise MaskRefused("overflow", "found a value that is not finite, or too large to add")
    whole = np.floor(values)
    part = values - whole
    whole += part >= 1.0  # a tiny negative number less its floor rounds to one
    part[part >= 1.0] = 0.0
    return whole.astype(np.int64).view(np.uint64), (part * _STEPS).astype(np.uint64)


def _add(high: Words, low: Words, more_high: Any, more_low: Any) -> None:
    low += more_low
    high += more_high
    high += low < more_low


def _subtract(high: Words, low: Words, less_high: Any, less_low: Any) -> None:
    high -= less_high
    high -= low < less_low
    low -= less_low
