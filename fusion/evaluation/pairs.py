"""Discrimination: pairs of patients formed within a site, and the concordance they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from fusion.evaluation.censoring import CensoringCurve, inverse_probability
from fusion.evaluation.sums import (
    Estimate,
    Flags,
    Floats,
    Indices,
    Z,
    added,
    check_horizon,
    checked_outcome,
    checked_values,
    flattened,
    logit_interval,
    pool,
    unflattened,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike

_TIED_LOG_HAZARD = 1e-8  # scikit-survival's tolerance
_PAIRS_AT_ONCE = 1_000_000
# Two exact powers of two: sums of squares of pair counts grow with the cube of a site's size, and a
# secure sum in fixed point holds 31 bits before the point.
_PAIR_UNIT = 2.0**10
_SQUARE_UNIT = _PAIR_UNIT**2


class NoComparablePairs(ValueError):
    """No pair of patients whose order of events is known, hence no concordance."""


@dataclass(frozen=True)
class PairCounts:
    """Comparable pairs of patients, weighted where the figure asks for it.

    Parameters
    ----------
    concordant, discordant, tied, comparable
        Pairs in which the patient with the earlier event has the higher, the lower or the same
        log hazard, and their sum.
    n_patients, n_events
        Patients, and events that the figure looks at (before ``tau`` or by the horizon).
    sum_cc, sum_cp, sum_pp
        Sums over patients i of c_i^2, c_i p_i and p_i^2, where p_i is the comparable pairs that
        involve i and c_i the concordant ones plus half the tied ones.
    """

    concordant: float
    discordant: float
    tied: float
    comparable: float
    n_patients: float
    n_events: float
    sum_cc: float
    sum_cp: float
    sum_pp: float

    def __add__(self, other: Self) -> Self:
        return added(self, other)

    def to_vector(self) -> Floats:
        """(9,) numbers, pairs in units of 1,024 and their squares in units of 1,024 squared."""
        return flattened(self) / _PAIR_COUNT_UNITS

    @classmethod
    def from_vector(cls, vector: ArrayLike) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        scaled = unflattened(vector, (_PAIR_COUNT_UNITS.shape,))[0] * _PAIR_COUNT_UNITS
        return cls(*scaled.tolist())


_PAIR_COUNT_UNITS = np.array([_PAIR_UNIT] * 4 + [1.0] * 2 + [_SQUARE_UNIT] * 3)
_SAME_OF_BOTH = [3, 4, 5, 8]  # comparable, n_patients, n_events, sum_pp: whatever the model


def pair_counts(log_hazard: ArrayLike, event: ArrayLike, time: ArrayLike) -> PairCounts:
    """Pairs of one site for Harrell's concordance index.

    A pair is comparable when the earlier time is an event, or when an event and a censoring fall on
    the same day. Not for models whose risks cross: it sees one number per patient.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.

    Raises
    ------
    ValueError
        If an argument has a missing value or another length.

    References
    ----------
    Harrell et al., Statistics in Medicine 15 (1996) 361-387.
    """
    event, time = checked_outcome(event, time)
    first = np.flatnonzero(event)
    return _count_pairs(
        checked_values(log_hazard, "log_hazard", time.shape),
        first,
        np.ones(first.size),
        _later(event, time),
    )


def uno_pair_counts(
    log_hazard: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    censoring: CensoringCurve,
    tau: float,
) -> PairCounts:
    """Pairs of one site for Uno's concordance, weighted by the inverse squared censoring curve.

    Where the curve falls to zero on the day of the last event, that event has no weight and starts
    no pair, as if ``tau`` were that day.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    censoring
        Curve of the same site.
    tau
        Only events before this time start a pair, in days; infinity for all.

    Raises
    ------
    ValueError
        If an argument has a missing value or another length, or ``tau`` is not positive.

    References
    ----------
    Uno et al., Statistics in Medicine 30 (2011) 1105-1117.
    """
    event, time = checked_outcome(event, time)
    if not tau > 0.0:
        raise ValueError(f"tau: found {tau}, needed a positive number of days")
    first = np.flatnonzero(event & (time < tau) & (censoring.at(time) > 0.0))
    return _count_pairs(
        checked_values(log_hazard, "log_hazard", time.shape),
        first,
        inverse_probability(censoring, time[first]) ** 2,
        _later(event, time),
    )


def pair_cross(
    log_hazard_a: ArrayLike, log_hazard_b: ArrayLike, event: ArrayLike, time: ArrayLike
) -> float:
    """Sum up at one site what comparing two models' concordance needs beyond their pair counts.

    The sum over patients i of c_i c'_i, with c_i as in :class:`PairCounts` under the one model and
    c'_i under the other, in units of 1,024 squared as in :meth:`PairCounts.to_vector`.

    Parameters
    ----------
    log_hazard_a, log_hazard_b
        (n,) of the two models; higher is worse.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.

    Raises
    ------
    ValueError
        If an argument has a missing value or another length.
    """
    event, time = checked_outcome(event, time)
    first = np.flatnonzero(event)
    weight, later = np.ones(first.size), _later(event, time)
    concordant = [
        _concordant(_involved(checked_values(x, name, time.shape), first, weight, later))
        for x, name in ((log_hazard_a, "log_hazard_a"), (log_hazard_b, "log_hazard_b"))
    ]
    return float(concordant[0] @ concordant[1]) / _SQUARE_UNIT


def auc_pair_counts(
    log_hazard: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    censoring: CensoringCurve,
    horizon: float,
) -> PairCounts:
    """Pairs of one site for the time-dependent AUC: events by the horizon against survivors.

    The AUC is the cumulative/dynamic one, by `concordance_index`. A site that follows nobody past
    the horizon has no pair.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    censoring
        Curve of the same site.
    horizon
        Days.

    Raises
    ------
    ValueError
        If an argument has a missing value or another length, or the censoring curve is zero where
        it is needed.

    References
    ----------
    Hung and Chiang, Canadian Journal of Statistics 38 (2010) 8-26.
    """
    event, time = checked_outcome(event, time)
    check_horizon(horizon)
    survives = time > horizon
    first = np.flatnonzero(event & ~survives & survives.any())
    at_horizon = inverse_probability(censoring, np.full(min(first.size, 1), horizon)).sum()
    return _count_pairs(
        checked_values(log_hazard, "log_hazard", time.shape),
        first,
        inverse_probability(censoring, time[first]) * at_horizon,
        lambda rows: np.broadcast_to(survives, (rows.size, survives.size)),
    )


def concordance_index(counts: PairCounts | Sequence[PairCounts]) -> Estimate:
    """Share of concordant pairs, a tie counting one half; 0.5 is chance, higher is better.

    The variance is the infinitesimal jackknife of the ratio C = N / P: a patient's weight moves N
    by c_i and P by p_i, hence C by (c_i - C p_i) / P, and the variance is the sum of its squares.
    Where sites differ in concordance this also counts which site a patient came from, so that the
    interval is slightly wide. It is formed on the logit scale; at 0 or 1, where the jackknife sees
    no spread, it is the exact binomial one with the events as trials.

    Parameters
    ----------
    counts
        Pairs of Harrell's or Uno's concordance or of the AUC, added up or one per site.

    Raises
    ------
    NoComparablePairs
        If there is no comparable pair.
    """
    pooled = pool(counts)
    if not pooled.comparable > 0.0:
        raise NoComparablePairs(
            f"concordance: found no comparable pair among {pooled.n_patients:g} patients with "
            f"{pooled.n_events:g} events, needed at least one"
        )
    value = (pooled.concordant + 0.5 * pooled.tied) / pooled.comparable
    spread = pooled.sum_cc - 2.0 * value * pooled.sum_cp + value**2 * pooled.sum_pp
    error = np.sqrt(max(spread, 0.0)) / pooled.comparable
    low, high = logit_interval(np.array(value), np.array(error), np.array(pooled.n_events))
    return Estimate(float(value), float(error), float(low), float(high))


def concordance_difference(
    counts_a: PairCounts | Sequence[PairCounts],
    counts_b: PairCounts | Sequence[PairCounts],
    cross: float | Sequence[float],
) -> Estimate:
    """Concordance of one model less that of another on the same patients, from -1 to 1.

    Above 0 the first is better. The variance is the infinitesimal jackknife of the difference D,
    which a patient's weight moves by (c_i - c'_i - D p_i) / P; see `concordance_index`.

    Parameters
    ----------
    counts_a, counts_b
        Pairs for Harrell's concordance under the two models, added up or one per site.
    cross
        Of the same sites, from `pair_cross`, added up or one per site.

    Raises
    ------
    NoComparablePairs
        If there is no comparable pair.
    ValueError
        If the counts are not of the same patients.
    """
    a, b = pool(counts_a), pool(counts_b)
    of_a, of_b = (counts.to_vector()[_SAME_OF_BOTH] for counts in (a, b))
    if not np.allclose(of_a, of_b, rtol=1e-6, atol=1e-6):  # a secure sum in fixed point rounds
        raise ValueError("counts_b: found other patients than in counts_a, needed the same ones")
    value = concordance_index(a).value - concordance_index(b).value
    spread = a.sum_cc + b.sum_cc - 2.0 * _SQUARE_UNIT * float(np.sum(cross))
    spread += value**2 * a.sum_pp - 2.0 * value * (a.sum_cp - b.sum_cp)
    error = float(np.sqrt(max(spread, 0.0))) / a.comparable
    return Estimate(value, error, value - Z * error, value + Z * error)


def _later(event: Flags, time: Floats) -> Callable[[Indices], Flags]:
    """Who is known to outlive each of the given patients with an event, (n_rows, n)."""

    def outlives(rows: Indices) -> Flags:
        own = time[rows, None]
        return np.asarray((time > own) | ((time == own) & ~event))

    return outlives


def _count_pairs(
    log_hazard: Floats,
    first: Indices,
    weight: Floats,
    second: Callable[[Indices], Flags],
) -> PairCounts:
    """Pairs of each patient of ``first`` with those that ``second`` flags."""
    involved = _involved(log_hazard, first, weight, second)
    c, p = _concordant(involved), involved.sum(axis=0)
    concordant, discordant, tied = (involved.sum(axis=1) / 2.0).tolist()  # a pair involves two
    return PairCounts(
        concordant=concordant,
        discordant=discordant,
        tied=tied,
        comparable=float(p.sum() / 2.0),
        n_patients=float(log_hazard.size),
        n_events=float(first.size),
        sum_cc=float(c @ c),
        sum_cp=float(c @ p),
        sum_pp=float(p @ p),
    )


def _involved(
    log_hazard: Floats,
    first: Indices,
    weight: Floats,
    second: Callable[[Indices], Flags],
) -> Floats:
    """(3, n) concordant, discordant and tied pairs that involve each patient, by blocks of rows."""
    involved = np.zeros((3, log_hazard.size))
    step = max(1, _PAIRS_AT_ONCE // max(log_hazard.size, 1))
    for start in range(0, first.size, step):
        rows, heavy = first[start : start + step], weight[start : start + step]
        for kind, pairs in enumerate(_sorted_pairs(log_hazard, rows, second(rows))):
            involved[kind, rows] += pairs.sum(axis=1) * heavy
            involved[kind] += heavy @ pairs
    return involved


def _concordant(involved: Floats) -> Floats:
    """(n,) concordant pairs that involve each patient, a tie counting one half."""
    return np.asarray(involved[0] + 0.5 * involved[2])


def _sorted_pairs(
    log_hazard: Floats, rows: Indices, comparable: Flags
) -> tuple[Flags, Flags, Flags]:
    with np.errstate(over="ignore"):  # an infinite gap has the right sign
        gap = log_hazard[rows, None] - log_hazard
    tied = comparable & (np.abs(gap) <= _TIED_LOG_HAZARD)
    concordant = comparable & (gap > _TIED_LOG_HAZARD)
    return concordant, comparable & ~tied & ~concordant, tied
