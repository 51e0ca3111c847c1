"""Pairwise masks: the coordinator learns the sites' total and nothing about any one of them.

Every two sites of a run agree on a key; from it both draw the same words, which one adds to its
values and the other subtracts. What a single site sends is uniform noise; in the total all masks
cancel. There is no dropout recovery: no message in which a site reveals a key, so a coordinator
that claims a site dropped while holding its masked values can ask nobody for what would unmask
them. When a site drops out, the attempt is abandoned and another starts with fresh keys.

Values are fixed-point numbers of two 64-bit words, modulo 2^128 with a resolution of 2^-64. One
word would have to choose: raw second moments of laboratory values reach 1e12 and more, sums of
small features 1e-6, and both must keep eight digits in one vector. Carries pass from the low word
to the high one; words masked apart would tell how many carries the total holds.

Not covered: all other sites and the coordinator together learn the rest, by subtraction; so does
whoever sees totals of the same values over two rosters; a total is exact and may tell about
patients by itself; a site that lies about its values spoils the total unnoticed here.

References
----------
Bonawitz et al. (2017), Practical secure aggregation for privacy-preserving machine learning, CCS;
the masks of its section 4.1, without secret sharing. X25519: RFC 7748, HKDF: RFC 5869,
ChaCha20: RFC 8439.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

import numpy as np

from fusion.keys import Agreement, KeyFault, canonical_json, expand, key_stream, verify

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.keys import SigningKey
    from fusion.privacy import Refusal

    Words = NDArray[np.uint64]

# With two sites, each would know the other's values from the total.
MINIMUM_ROSTER: Final = 3
# Totals stay below it in size: a quarter of what 64 signed bits hold, so sums cannot wrap.
LIMIT: Final = 2.0**62
# Zeros masked after a vector's last value: masks that do not cancel leave one with odds of 2^-128.
GUARDS: Final = 1
_FRACTION_BITS: Final = 64
# Values that are masked at a time; their words, and those of one stream, fit into the cache.
_BLOCK: Final = 1 << 14


class MaskRefused(ValueError):
    """What a site does not mask, or a coordinator cannot unmask.

    Parameters
    ----------
    code
        The refusal that may leave the site; the text stays.
    """

    def __init__(self, code: Refusal, text: str) -> None:
        super().__init__(f"secure sum: {text}")
        self.code = code


@dataclass(frozen=True)
class MaskContext:
    """What the keys of one attempt are bound to; the roster is kept in order of its names.

    Attributes
    ----------
    protocol
        Its fingerprint.
    run
        Identifier of the run.
    attempt
        Counts up within the run, each time with new keys.
    roster
        Every site that is in the sum.
    """

    study: str
    protocol: str
    run: str
    attempt: int
    roster: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "roster", tuple(sorted(self.roster)))


class Masker:
    """A site's end of the masks of one attempt.

    Its ephemeral key exists in memory only and goes once the sites agreed: the object can be
    neither pickled nor copied.

    Parameters
    ----------
    site
        This site's name, one of the roster.
    key
        Its own signing key.
    trusted
        Public signing key of every site, 64 hex digits each, from the site's own files.
    minimum_roster
        Sites below which this one masks nothing; the site's own, never from a message, and no
        less than 3.

    Raises
    ------
    MaskRefused
        If the roster is too small, names a site twice or leaves this one out, or a member has no
        trusted key of its own.
    """

    def __init__(
        self,
        context: MaskContext,
        *,
        site: str,
        key: SigningKey,
        trusted: Mapping[str, str],
        minimum_roster: int = MINIMUM_ROSTER,
    ) -> None:
        _check_roster(context.roster, site, needed=max(minimum_roster, MINIMUM_ROSTER))
        self._trusted = _trusted_keys(context.roster, trusted)
        if self._trusted[site] != key.public:
            raise MaskRefused("bad_key", "found another key of this site than the trusted one")
        self._context, self._site = context, site
        self._agreement: Agreement | None = Agreement()
        self._public = self._agreement.public
        self._signature = key.sign(_statement(context, site, self._public))
        self._pair_keys: dict[str, bytes] = {}
        self._last_round = -1
        self._spending = threading.Lock()

    @property
    def certificate(self) -> tuple[bytes, bytes]:
        """32 bytes of public X25519 key, 64 of Ed25519 signature over it and the context."""
        return self._public, self._signature

    def agree(self, publics: Mapping[str, bytes], signatures: Mapping[str, bytes]) -> None:
        """Check every site's certificate and agree with each peer on a key, once.

        Parameters
        ----------
        publics, signatures
            Per site of the roster, this one included, the halves of its certificate.

        Raises
        ------
        MaskRefused
            If keys were agreed on before, the sites are not exactly the roster, or a certificate
            is not of that site in this attempt.
        """
        if self._agreement is None:
            raise MaskRefused("mask_spent", "found keys for an attempt that has them already")
        if not set(publics) == set(signatures) == set(self._context.roster):
            raise MaskRefused("roster_changed", "found keys of other sites than the roster's")
        for site, trusted in self._trusted.items():
            stated = _statement(self._context, site, publics[site])
            if not verify(trusted, signatures[site], stated):
                raise MaskRefused("bad_key", f"found a key that {site} did not sign for this run")
        if publics[self._site] != self._public:
            raise MaskRefused("bad_key", "found an earlier key of this site")
        self._pair_keys = self._agreed(self._agreement, publics)
        self._agreement = None

    def _agreed(self, agreement: Agreement, publics: Mapping[str, bytes]) -> dict[str, bytes]:
        peers = [site for site in self._context.roster if site != self._site]
        try:
            return {
                peer: agreement.shared_key(publics[peer], info=self._pair_info(peer, publics))
                for peer in peers
            }
        except KeyFault:
            raise MaskRefused("bad_key", "found a key that agrees with everybody") from None

    def _pair_info(self, peer: str, publics: Mapping[str, bytes]) -> bytes:
        """Bind a pair's key to the attempt, both public keys and who of the two adds."""
        adds, subtracts = sorted((self._site, peer))
        return canonical_json(
            {
                "kind": "mask_pair",
                **asdict(self._context),
                "adds": [adds, publics[adds].hex()],
                "subtracts": [subtracts, publics[subtracts].hex()],
            }
        )

    def mask(self, values: NDArray[np.float64], *, round: int, label: str = "") -> Words:
        """Hide one round's values; a round that was masked, or an earlier one, never is again.

        Parameters
        ----------
        values
            (n,) finite, each times the number of sites below 2^62 in size.
        round
            From 0, higher than any before.
        label
            What the values are; masks of different labels do not cancel.

        Returns
        -------
        numpy.ndarray
            (n + GUARDS, 2) high and low word of each value and of the guards, uniform to whoever
            lacks the keys.

        Raises
        ------
        MaskRefused
            If no keys were agreed on, a value is too large or not finite, or the round is spent;
            the first two spend nothing.
        """
        if not self._pair_keys:
            raise MaskRefused("bad_key", "found no keys, needed those of every site")
        checked = np.append(self._checked(values), np.zeros(GUARDS))
        self._spend(round)
        words = np.empty((checked.size, 2), dtype=np.uint64)
        for number, block in enumerate(_blocks(checked.size)):
            info = canonical_json({"round": round, "label": label, "block": number})
            high, low = _encoded(checked[block])
            for peer, key in self._pair_keys.items():
                stream = key_stream(expand(key, info=info), 2 * high.size)
                combine = _add if self._site < peer else _subtract
                combine(high, low, stream[: high.size], stream[high.size :])
            words[block, 0], words[block, 1] = high, low
        return words

    def _checked(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.asarray(values, dtype=np.float64)
        if found.ndim != 1:
            raise ValueError(f"secure sum: found values of shape {found.shape}, needed (n,)")
        largest = max(float(found.max(initial=0.0)), -float(found.min(initial=0.0)))
        if not largest * len(self._context.roster) < LIMIT:  # neither is NaN below anything
            raise MaskRefused("overflow", "found a value that is not finite or too large to add up")
        return found

    def _spend(self, round: int) -> None:
        with self._spending:
            if round <= self._last_round:
                raise MaskRefused(
                    "mask_spent",
                    f"found round {round}, needed one after {self._last_round}: start an attempt",
                )
            self._last_round = round

    def __repr__(self) -> str:
        return f"Masker({self._context.run!r}, attempt={self._context.attempt}, {self._site!r})"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a masker cannot be pickled or copied: its key stays where it was made")


def unmask(masked: Mapping[str, Words], *, roster: Sequence[str]) -> NDArray[np.float64]:
    """Add up what every site of the roster masked in one round.

    Parameters
    ----------
    masked
        Per site (n + GUARDS, 2) words of :meth:`Masker.mask`.

    Returns
    -------
    numpy.ndarray
        (n,) totals, each to about 5e-20 per site and the 16 digits of a float.

    Raises
    ------
    MaskRefused
        If a site is missing, too many or named twice, or the masks do not cancel: they are of
        different rounds, labels or attempts.
    ValueError
        If the words have not all the same shape.
    """
    if set(masked) != set(roster) or len(set(roster)) != len(roster):
        raise MaskRefused("roster_changed", "found words of other sites than the roster's")
    all_words = list(masked.values())
    if len({x.shape for x in all_words}) != 1 or any(not _are_words(x) for x in all_words):
        raise ValueError("secure sum: found words of other shapes, needed (n, 2) from every site")
    totals = np.empty(len(all_words[0]), dtype=np.float64)
    guard = -1
    for block in _blocks(totals.size):
        high, low = all_words[0][block].T.copy()
        for words in all_words[1:]:
            _add(high, low, words[block, 0], words[block, 1])
        totals[block] = _decoded(high, low)
        guard = int(high[-1]) | int(low[-1])
    if guard or (np.abs(totals) >= LIMIT).any():
        raise MaskRefused("bad_key", "found masks that do not cancel, needed those of one round")
    return totals[:-GUARDS]


def _are_words(found: Words) -> bool:
    return found.dtype == np.uint64 and found.ndim == 2 and found.shape[1] == 2 and len(found) > 0


def _check_roster(roster: tuple[str, ...], site: str, *, needed: int) -> None:
    if len(set(roster)) < needed:
        raise MaskRefused("roster_too_small", f"found {len(set(roster))} sites, needed {needed}")
    if len(set(roster)) < len(roster) or site not in roster:
        raise MaskRefused("roster_changed", f"found a roster that does not hold {site} once")


def _trusted_keys(roster: tuple[str, ...], trusted: Mapping[str, str]) -> dict[str, str]:
    """Keep the roster's keys; one party under two names would make a roster of three one of two."""
    keys = {site: trusted[site] for site in roster if site in trusted}
    if len(set(keys.values())) < len(roster):
        raise MaskRefused("bad_key", "found a site without a trusted key that is its alone")
    return keys


def _statement(context: MaskContext, site: str, public: bytes) -> bytes:
    """Write what a site signs; its kind keeps that from passing for anything else it signs."""
    return canonical_json(
        {"kind": "mask_key", **asdict(context), "site": site, "public": public.hex()}
    )


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, _BLOCK):
        yield slice(start, min(start + _BLOCK, n))


def _encoded(values: NDArray[np.float64]) -> tuple[Words, Words]:
    """High and low words in two's complement, cut off towards 0 at 2^-64.

    The fraction of the magnitude is exact and at most 1 - 2^-53, so its word cannot round up to
    2^64; from the floor of a small negative value it would lose all digits.
    """
    fraction, whole = np.modf(values)
    high = whole.astype(np.int64).view(np.uint64)
    low = np.ldexp(np.abs(fraction), _FRACTION_BITS).astype(np.uint64)
    negative = fraction < 0
    np.negative(low, out=low, where=negative)
    negative &= low != 0
    high -= negative
    return high, low


def _decoded(high: Words, low: Words) -> NDArray[np.float64]:
    """Nearest floats, by magnitude: high and low word of a small negative total would cancel."""
    negative = high >> np.uint64(63) != 0
    np.negative(low, out=low, where=negative)
    np.invert(high, out=high, where=negative)
    high += negative & (low == 0)
    size = high.astype(np.float64) + np.ldexp(low.astype(np.float64), -_FRACTION_BITS)
    return np.where(negative, -size, size)


def _add(high: Words, low: Words, other_high: Words, other_low: Words) -> None:
    low += other_low
    high += other_high
    high += low < other_low  # the low word wrapped


def _subtract(high: Words, low: Words, other_high: Words, other_low: Words) -> None:
    high -= other_high
    high -= low < other_low
    low -= other_low
