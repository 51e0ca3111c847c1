r"""Noise that hides any one patient behind a sum, and the account of what was ever released.

The only file that touches the accounting library. One release is a sum over patients, each of whom
adds a vector no longer than ``clip_norm``, plus Gaussian noise of standard deviation
``noise_multiplier * clip_norm`` on every coordinate.

Clipped vectors are rounded toward zero to whole units of :math:`2^{-32}` of the clip norm, and the
noise is a normal variate rounded to the same units. Units add without rounding, so that the release
is exactly the rounding of a sum with continuous noise: the last bits of floating-point noise, which
give sums away [1]_, are not there, and the formulas of the continuous mechanism hold as they are.

References
----------
.. [1] Mironov I. On significance of the least significant bits for differential privacy.
   CCS 2012, 650-661.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import secrets
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fusion.keys import canonical_json, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Units = NDArray[np.int64]

UNITS: Final = 2**32
MAX_NOISE_MULTIPLIER: Final = 2.0**20
_MAX_EPSILON: Final = 1e6
# Bits of a normal variate after the point: what is beyond changes no probability of a rounded one
# by more than a factor of 1 + 2^-80.
_BITS: Final = 128
# Rounding errors of a norm stay far inside this margin.
_MARGIN: Final = 1.0 - 2.0**-40
# A calibrated multiplier is this much above the exact one, so that its own releases always fit.
_SLACK: Final = 1.0 + 1e-9
_NOTHING: Final = "0" * 64
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class Budget(BaseModel):
    """How much noisy sums of one study may tell of a patient; smaller protects more."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epsilon: float = Field(
        default=0.0, ge=0.0, le=_MAX_EPSILON, description="privacy loss; 0 for sums as they are"
    )
    delta: float = Field(default=1e-5, gt=0.0, le=1e-2, description="chance of a larger loss")
    clip_norm: float = Field(
        default=2.0, ge=1e-3, le=1e3, description="longest gradient that one patient adds to a sum"
    )

    @property
    def is_on(self) -> bool:
        """Whether noise is added at all."""
        return self.epsilon > 0.0


def noise_multiplier(epsilon: float, delta: float, n_releases: int = 1) -> float:
    """Noise per clip norm with which this many releases together stay within a budget.

    Parameters
    ----------
    epsilon, delta
        Of all releases together, for one patient's vector being in the sums or not.
    n_releases
        Of equal noise, each of which may depend on those before.

    Raises
    ------
    ValueError
        If there is no such number.

    References
    ----------
    Balle and Wang, ICML 2018 (arXiv 1805.06530), whose condition is exact; k Gaussian releases are
    one of a k-th of the variance.
    """
    if not (0.0 < epsilon <= _MAX_EPSILON and 0.0 < delta < 1.0 and n_releases >= 1):
        raise ValueError(
            f"noise: found epsilon {epsilon}, delta {delta}, {n_releases} releases, needed epsilon "
            f"above 0 and at most {_MAX_EPSILON:g}, delta between 0 and 1, at least one release"
        )
    from dp_accounting import get_sigma_gaussian  # slow to import, and for few

    return float(get_sigma_gaussian(epsilon, delta)) * _SLACK * math.sqrt(n_releases)


def epsilon_spent(releases: Iterable[tuple[float, int]], delta: float) -> float:
    """Privacy loss of releases together; higher tells more of a patient.

    Parameters
    ----------
    releases
        Noise multiplier, and how many releases had it.
    delta
        Chance of a larger loss.
    """
    precision = sum(n / multiplier**2 for multiplier, n in releases)
    if precision == 0.0:
        return 0.0
    from dp_accounting import get_epsilon_gaussian  # slow to import, and for few

    return float(get_epsilon_gaussian(1.0 / math.sqrt(precision), delta))


def clipped_units(vectors: ArrayLike, clip_norm: float) -> Units:
    """Shorten each row to the clip norm, and write it in whole units of ``clip_norm / UNITS``.

    Parameters
    ----------
    vectors
        (n, p) what each patient adds; finite.

    Returns
    -------
    numpy.ndarray
        (n, p) whole numbers, rounded toward zero; no row is longer than ``UNITS``, exactly.

    Raises
    ------
    ValueError
        If a value is not finite.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    if not np.isfinite(rows).all():
        raise ValueError("noisy sum: found a value that is not finite, needed all finite")
    # Of a row that is too long to square, nothing is left.
    with np.errstate(over="ignore"):
        norms = np.linalg.norm(rows, axis=1)
    longest = clip_norm * _MARGIN
    share = longest / np.maximum(norms, longest)
    return np.trunc(rows * (share / clip_norm)[:, None] * UNITS).astype(np.int64)


def gaussian_noise(n: int, *, scale: float) -> Units:
    """(n,) normal variates of this standard deviation, rounded to whole numbers.

    They come from the operating system's cryptographic source by exact rejection [1]_ in whole
    numbers, without a logarithm or an exponential being computed.

    References
    ----------
    .. [1] Karney CFF. Sampling exactly from the normal distribution. ACM Transactions on
       Mathematical Software 2016;42:3.
    """
    if not 0.0 < scale <= MAX_NOISE_MULTIPLIER * UNITS:
        raise ValueError(f"noise: found scale {scale}, needed one above 0, of a possible budget")
    numerator, denominator = float(scale).as_integer_ratio()
    half = denominator << _BITS
    found = []
    for _ in range(n):
        size = _half_normal() * numerator
        signed = size if secrets.randbits(1) else -size
        found.append((2 * signed + half) // (2 * half))  # the nearest whole number
    return np.array(found, dtype=np.int64)


def _half_normal() -> int:
    """Absolute normal variate in units of 2^-128."""
    while True:
        whole = 0
        while _happens(1, 2):
            whole += 1
        if not _happens(whole * (whole - 1), 2):
            continue
        rest = secrets.randbits(_BITS)
        if _happens(rest * ((whole << (_BITS + 1)) + rest), 1 << (2 * _BITS + 1)):
            return (whole << _BITS) + rest


def _happens(numerator: int, denominator: int) -> bool:
    """Give True with probability exp(-numerator / denominator), exactly."""
    while numerator > denominator:
        if not _happens_below_one(1, 1):
            return False
        numerator -= denominator
    return _happens_below_one(numerator, denominator)


def _happens_below_one(numerator: int, denominator: int) -> bool:
    """Do the same for a ratio of at most 1; von Neumann's method."""
    k = 1
    while secrets.randbelow(denominator * k) < numerator:
        k += 1
    return k % 2 == 1


def noisy_sum(vectors: ArrayLike, *, clip_norm: float, noise_multiplier: float) -> Floats:
    """(p,) sum of rows, each clipped, with Gaussian noise on every coordinate.

    Parameters
    ----------
    vectors
        (n, p) what each patient adds.
    noise_multiplier
        Standard deviation of the noise per clip norm.
    """
    units = clipped_units(vectors, clip_norm)
    noise = gaussian_noise(units.shape[1], scale=noise_multiplier * UNITS)
    return np.asarray((units.sum(axis=0) + noise) * (clip_norm / UNITS))


class BudgetSpent(RuntimeError):
    """A release that would tell more of the patients than their site allows."""

    code: Final = "budget_spent"


class LedgerDamaged(RuntimeError):
    """A ledger that is not as it was written: nobody knows what was released."""


@dataclass(frozen=True)
class Charge:
    """One release: the request that it answered, its noise, and what was made for it."""

    request: str
    noise_multiplier: float
    n_releases: int
    kept: bytes


class PrivacyLedger:
    """Everything that was ever released with noise about a site's patients.

    There is one for all protocols, runs and restarts of a site. A release stands here, on disk,
    before it leaves, together with what leaves: the same request again costs nothing and gets the
    same bytes, so that noise cannot be averaged out.

    Parameters
    ----------
    path
        File of one release per line, mode 0600; None to keep them in memory, for simulation.
    epsilon, delta
        What all releases together may tell of a patient.

    Notes
    -----
    Each line holds the checksum of the one before, and a second file beside it those of the last
    line. A last line that a killed process left unfinished was never answered for, and is dropped.

    The noise of a release may depend on releases before it: sums of precisions are a valid filter
    for adaptively chosen Gaussian releases [1]_.

    References
    ----------
    .. [1] Smith A, Thakurta A. Fully adaptive composition for Gaussian differential privacy.
       arXiv 2210.17520.
    """

    def __init__(self, path: Path | None, *, epsilon: float, delta: float) -> None:
        self._path, self._epsilon, self._delta = path, epsilon, delta
        self._lock = threading.Lock()
        self._in_memory: list[Charge] = []
        self._checksum = _NOTHING
        self.spent()

    @property
    def _head(self) -> Path:
        assert self._path is not None
        return self._path.with_name(self._path.name + ".head")

    def spent(self) -> float:
        """Epsilon of everything released so far, at the ledger's delta.

        Raises
        ------
        LedgerDamaged
            If a line was changed or lost.
        """
        with self._held() as (charges, _):
            return _spent(charges, self._delta)

    def kept(self, request: str) -> bytes | None:
        """Give what was made for a request, or None if it was never answered."""
        with self._held() as (charges, _):
            return _kept(charges, request)

    def release(
        self,
        request: str,
        make: Callable[[], bytes],
        *,
        noise_multiplier: float,
        n_releases: int = 1,
    ) -> bytes:
        """Charge a release, once, and give what it is.

        Parameters
        ----------
        request
            64 hex digits that stand for everything the release depends on but its noise.
        make
            Draws the noise; called at most once, and only within the budget.
        noise_multiplier, n_releases
            Of the sums in it, together.

        Returns
        -------
        bytes
            From ``make``, or from when the same request was answered before.

        Raises
        ------
        BudgetSpent
            If all releases with this one would exceed the budget.
        LedgerDamaged
            If a line was changed or lost.
        OSError
            If it cannot be written; nothing was released then.
        """
        if not 0.0 < noise_multiplier <= MAX_NOISE_MULTIPLIER or n_releases < 1:
            raise ValueError("release: needed noise above 0 and at least one sum")
        if not _DIGEST.fullmatch(request):
            raise ValueError("request: needed 64 hex digits")
        with self._held() as (charges, keep):
            known = _kept(charges, request)
            if known is not None:
                return known
            asked = Charge(request, float(noise_multiplier), n_releases, b"")
            after = _spent([*charges, asked], self._delta)
            if not after <= self._epsilon:
                raise BudgetSpent(
                    f"privacy budget: found epsilon {after:.3g} with this release, needed at most "
                    f"{self._epsilon:g}; nothing more leaves about these patients"
                )
            made = make()
            keep(Charge(request, float(noise_multiplier), n_releases, made))
            return made

    @contextmanager
    def _held(self) -> Iterator[tuple[list[Charge], Callable[[Charge], None]]]:
        """Give all charges and a way to add one, while no other thread or process can."""
        with self._lock:
            if self._path is None:
                yield self._in_memory, self._in_memory.append
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                charges, end = self._read(file)
                yield charges, lambda charge: self._append(file, end, charge, len(charges) + 1)
            finally:
                os.close(file)

    def _read(self, file: int) -> tuple[list[Charge], int]:
        """Read all whole lines, and where they end."""
        content = _whole_content(file)
        end = content.rfind(b"\n") + 1
        charges, checksums = [], [_NOTHING]
        for number, line in enumerate(content[:end].split(b"\n")[:-1], 1):
            charge, checksum = _read_line(line, number=number, previous=checksums[-1])
            charges.append(charge)
            checksums.append(checksum)
        self._require_head(checksums)
        self._checksum = checksums[-1]
        return charges, end

    def _require_head(self, checksums: list[str]) -> None:
        """Refuse a ledger that is shorter than it was, or another one."""
        try:
            number, checksum = json.loads(self._head.read_bytes())
        except FileNotFoundError:
            # A killed process may have left the first line without it.
            number, checksum = 0, _NOTHING
            if len(checksums) > 2:
                raise _damaged(len(checksums) - 1) from None
        except (ValueError, TypeError):
            raise _damaged(len(checksums) - 1) from None
        if number >= len(checksums) or checksums[number] != checksum:
            raise _damaged(min(number, len(checksums)))

    def _append(self, file: int, end: int, charge: Charge, number: int) -> None:
        line = _line(charge, number=number, previous=self._checksum)
        os.ftruncate(file, end)
        try:
            if os.pwrite(file, line, end) != len(line):
                raise OSError("privacy ledger: the disk is full")
        except OSError:
            os.ftruncate(file, end)
            raise
        os.fsync(file)
        self._write_head(number, json.loads(line)["checksum"])

    def _write_head(self, number: int, checksum: str) -> None:
        made = self._head.with_name(self._head.name + ".new")
        with made.open("wb") as stream:
            stream.write(canonical_json([number, checksum]))
            stream.flush()
            os.fsync(stream.fileno())
        made.replace(self._head)
        folder = os.open(self._head.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _spent(charges: Iterable[Charge], delta: float) -> float:
    return epsilon_spent(((c.noise_multiplier, c.n_releases) for c in charges), delta)


def _kept(charges: Iterable[Charge], request: str) -> bytes | None:
    return next((c.kept for c in charges if c.request == request), None)


def _whole_content(file: int) -> bytes:
    parts, start = [], 0
    while part := os.pread(file, 1 << 20, start):
        parts.append(part)
        start += len(part)
    return b"".join(parts)


def _line(charge: Charge, *, number: int, previous: str) -> bytes:
    values: dict[str, Any] = {
        "number": number,
        "request": charge.request,
        "noise_multiplier": charge.noise_multiplier,
        "n_releases": charge.n_releases,
        "kept": charge.kept.hex(),
        "previous": previous,
    }
    checksum = digest(canonical_json(values))
    return canonical_json(values | {"checksum": checksum}) + b"\n"


def _read_line(line: bytes, *, number: int, previous: str) -> tuple[Charge, str]:
    try:
        values = json.loads(line)
        charge = Charge(
            values["request"],
            values["noise_multiplier"],
            values["n_releases"],
            bytes.fromhex(values["kept"]),
        )
        if _line(charge, number=number, previous=previous) != line + b"\n":
            raise ValueError("not as it was written")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _damaged(number) from None
    return charge, values["checksum"]


def _damaged(number: int) -> LedgerDamaged:
    return LedgerDamaged(
        f"privacy ledger: line {number} is not as it was written, or lines after it are gone; "
        "nothing is released until the whole ledger is restored"
    )
