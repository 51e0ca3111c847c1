"""How well a risk model does, from sums over each site's test patients.

Figures come in pairs of pure functions: a *site statistic* turns rows into sums, and a
*combination* turns the sums, added over sites, into figures with 95 % intervals. Pairs of patients
are formed within a site only, and pooled. ``log_hazard`` is higher for worse prognosis, ``event``
is True where the event was observed, times are in days from the landmark.

Intervals take the censoring curve of a site as known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import chdtrc, chdtri, expit, logit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    SumsT = TypeVar("SumsT", bound=DataclassInstance)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

_TIED_LOG_HAZARD = 1e-8  # scikit-survival's tolerance
_PAIRS_AT_ONCE = 1_000_000
_TAIL = 0.025
_Z = 1.959963984540054
# Two exact powers of two: sums of squares of pair counts grow with the cube of a site's size, and a
# secure sum in fixed point holds 31 bits before the point.
_PAIR_UNIT = 2.0**10
_SQUARE_UNIT = _PAIR_UNIT**2


class NoComparablePairs(ValueError):
    """No pair of patients whose order of events is known, hence no concordance."""


@dataclass(frozen=True)
class Estimate:
    """One figure with its standard error and 95 % interval."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Estimates:
    """Figures of equal shape with standard errors and 95 % intervals; NaN for no patients."""

    value: Floats
    standard_error: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True, eq=False)
class CensoringCurve:
    """Kaplan-Meier curve of still being followed. It holds every patient's time: never send it.

    Parameters
    ----------
    time
        (k,) distinct times of follow-up, increasing, in days.
    probability
        (k,) probability of not being censored up to and including each time.
    """

    time: Floats = field(repr=False)
    probability: Floats = field(repr=False)

    def at(self, time: ArrayLike) -> Floats:
        """Probability of not being censored by ``time``; the last value is carried forward."""
        return _step(self.time, self.probability, np.asarray(time, dtype=np.float64))

    def covers(self, time: ArrayLike) -> Flags:
        """Whether status at ``time`` is known: someone is followed longer, or the last one died."""
        asked = np.asarray(time, dtype=np.float64)
        if self.time.size == 0:
            return np.zeros(asked.shape, dtype=np.bool_)
        return np.asarray((asked < self.time[-1]) | (self.probability[-1] > 0.0))


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
        return _added(self, other)

    def to_vector(self) -> Floats:
        """(9,) numbers, pairs in units of 1,024 and their squares in units of 1,024 squared."""
        return _flat(self) / _PAIR_COUNT_UNITS

    @classmethod
    def from_vector(cls, vector: ArrayLike) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        scaled = _unflat(vector, (_PAIR_COUNT_UNITS.shape,))[0] * _PAIR_COUNT_UNITS
        return cls(*scaled.tolist())


_PAIR_COUNT_UNITS = np.array([_PAIR_UNIT] * 4 + [1.0] * 2 + [_SQUARE_UNIT] * 3)


@dataclass(frozen=True, eq=False)
class BrierSums:
    """Weighted squared errors of predicted survival at each time of a grid.

    Parameters
    ----------
    squared_errors
        (n_times,) sums over patients.
    n_patients
        (n_times,) patients counted; none of a site whose follow-up ends before that time.
    integral, integral_square
        (1,) sums over patients, and over their squares, of the error averaged over the grid, at
        sites followed through the whole grid.
    """

    squared_errors: Floats
    n_patients: Floats
    integral: Floats
    integral_square: Floats

    def __add__(self, other: Self) -> Self:
        return _added(self, other)

    def to_vector(self) -> Floats:
        """(2 n_times + 2,) numbers."""
        return _flat(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_times: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*_unflat(vector, ((n_times,), (n_times,), (1,), (1,))))


@dataclass(frozen=True, eq=False)
class LifeTable:
    """Patients by group and interval.

    Parameters
    ----------
    counts
        (n_groups, n_intervals, 3): at risk at the interval's start, events, censored.
    """

    counts: Floats

    def __add__(self, other: Self) -> Self:
        return _added(self, other)

    def to_vector(self) -> Floats:
        """(n_groups * n_intervals * 3,) numbers."""
        return _flat(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int, n_intervals: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*_unflat(vector, ((n_groups, n_intervals, 3),)))


@dataclass(frozen=True, eq=False)
class LogRankSums:
    """Log-rank numerator and its variance; their sum over sites is the test stratified by site.

    Parameters
    ----------
    observed_minus_expected
        (n_groups,) events beyond those expected if groups did not differ.
    variance
        (n_groups, n_groups) hypergeometric covariance.
    """

    observed_minus_expected: Floats
    variance: Floats

    def __add__(self, other: Self) -> Self:
        return _added(self, other)

    def to_vector(self) -> Floats:
        """(n_groups + n_groups ** 2,) numbers."""
        return _flat(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*_unflat(vector, ((n_groups,), (n_groups, n_groups))))


@dataclass(frozen=True)
class LogRankTest:
    """Chi-squared test that groups have the same survival."""

    statistic: float
    degrees_of_freedom: int
    p_value: float


@dataclass(frozen=True, eq=False)
class CalibrationSums:
    """Predicted and observed events by the horizon, each field (n_groups,).

    Parameters
    ----------
    n_patients, n_events
        Patients, and events seen by the horizon, unweighted.
    predicted
        Sum of the predicted risks.
    weight, observed
        Sums of the censoring weights of patients whose status at the horizon is known, and of those
        with the event.
    weight_square, observed_square
        The same with squared weights.
    """

    n_patients: Floats
    n_events: Floats
    predicted: Floats
    weight: Floats
    observed: Floats
    weight_square: Floats
    observed_square: Floats

    def __add__(self, other: Self) -> Self:
        return _added(self, other)

    def to_vector(self) -> Floats:
        """(7 n_groups,) numbers."""
        return _flat(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*_unflat(vector, ((n_groups,),) * 7))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Mean predicted risk (n_groups,) beside the observed one; NaN for an empty group."""

    predicted: Floats
    observed: Estimates


@dataclass(frozen=True)
class ObservedExpected:
    """Events seen, and the sum of predicted cumulative hazards over the same follow-up."""

    observed: float
    expected: float
    n_patients: float

    def __add__(self, other: Self) -> Self:
        return _added(self, other)

    def to_vector(self) -> Floats:
        """(3,) numbers."""
        return _flat(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*_unflat(vector, ((3,),))[0].tolist())


def censoring_curve(event: ArrayLike, time: ArrayLike) -> CensoringCurve:
    """Kaplan-Meier curve of censoring at one site; an event precedes a censoring on the same day.

    Parameters
    ----------
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.

    Raises
    ------
    ValueError
        If an argument has a missing value or another length.
    """
    event, time = _outcome(event, time)
    return CensoringCurve(*_kaplan_meier(event, time, of="censoring"))


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
    event, time = _outcome(event, time)
    first = np.flatnonzero(event)
    return _count_pairs(
        _values(log_hazard, "log_hazard", time.shape),
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
    event, time = _outcome(event, time)
    if not tau > 0.0:
        raise ValueError(f"tau: found {tau}, needed a positive number of days")
    first = np.flatnonzero(event & (time < tau) & (censoring.at(time) > 0.0))
    return _count_pairs(
        _values(log_hazard, "log_hazard", time.shape),
        first,
        _inverse_probability(censoring, time[first]) ** 2,
        _later(event, time),
    )


def auc_pair_counts(
    log_hazard: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    censoring: CensoringCurve,
    horizon: float,
) -> PairCounts:
    """Pairs of one site for the cumulative/dynamic AUC: events by the horizon against survivors.

    A site that follows nobody past the horizon has no pair.

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
    event, time = _outcome(event, time)
    _check_horizon(horizon)
    survives = time > horizon
    first = np.flatnonzero(event & ~survives & survives.any())
    at_horizon = _inverse_probability(censoring, np.full(min(first.size, 1), horizon)).sum()
    return _count_pairs(
        _values(log_hazard, "log_hazard", time.shape),
        first,
        _inverse_probability(censoring, time[first]) * at_horizon,
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
    pooled = _pooled(counts)
    if not pooled.comparable > 0.0:
        raise NoComparablePairs(
            f"concordance: found no comparable pair among {pooled.n_patients:g} patients with "
            f"{pooled.n_events:g} events, needed at least one"
        )
    value = (pooled.concordant + 0.5 * pooled.tied) / pooled.comparable
    spread = pooled.sum_cc - 2.0 * value * pooled.sum_cp + value**2 * pooled.sum_pp
    error = np.sqrt(max(spread, 0.0)) / pooled.comparable
    low, high = _logit_interval(np.array(value), np.array(error), np.array(pooled.n_events))
    return Estimate(float(value), float(error), float(low), float(high))


def brier_sums(
    survival: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    times: ArrayLike,
    censoring: CensoringCurve,
) -> BrierSums:
    """Weighted squared errors of predicted survival at one site.

    Parameters
    ----------
    survival
        (n, n_times) predicted probability of surviving past each time.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    times
        (n_times,) increasing grid, in days.
    censoring
        Curve of the same site.

    Raises
    ------
    ValueError
        If an argument has a missing value, another shape, or a probability outside 0 to 1.

    References
    ----------
    Graf et al., Statistics in Medicine 18 (1999) 2529-2545.
    """
    event, time = _outcome(event, time)
    times = _increasing(times, "times")
    survival = _probabilities(survival, "survival", (time.size, times.size))
    covered = censoring.covers(times)
    follow_up = censoring.at(time)
    dead = (event & (follow_up > 0.0))[:, None] & (time[:, None] <= times) & covered
    alive = (time[:, None] > times) & covered
    dead_weight = 1.0 / np.where(follow_up > 0.0, follow_up, 1.0)
    alive_weight = 1.0 / np.where(covered, censoring.at(times), 1.0)
    errors = (
        survival**2 * dead * dead_weight[:, None] + (1.0 - survival) ** 2 * alive * alive_weight
    )
    average = errors @ _averaging(times) * covered.all()
    return BrierSums(
        squared_errors=errors.sum(axis=0),
        n_patients=np.where(covered, float(time.size), 0.0),
        integral=np.array([average.sum()]),
        integral_square=np.array([average @ average]),
    )


def null_brier_sums(
    event: ArrayLike, time: ArrayLike, times: ArrayLike, censoring: CensoringCurve
) -> BrierSums:
    """Errors at one site of giving everybody the site's own Kaplan-Meier curve, for reference.

    Parameters
    ----------
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    times
        (n_times,) increasing grid, in days.
    censoring
        Curve of the same site.

    Raises
    ------
    ValueError
        If an argument has a missing value or another shape.
    """
    event, time = _outcome(event, time)
    times = _increasing(times, "times")
    survival = _step(*_kaplan_meier(event, time, of="event"), times)
    return brier_sums(np.tile(survival, (time.size, 1)), event, time, times, censoring)


def brier_score(sums: BrierSums | Sequence[BrierSums]) -> Floats:
    """Mean squared error at each time (n_times,), lower is better; NaN where nobody is followed."""
    pooled = _pooled(sums)
    return _ratio(pooled.squared_errors, pooled.n_patients)


def integrated_brier_score(sums: BrierSums | Sequence[BrierSums], times: ArrayLike) -> Estimate:
    """Brier score averaged over the grid by the trapezoid rule; lower is better.

    The standard error rests on the patients of sites followed through the whole grid.

    Parameters
    ----------
    sums
        Sums of the same grid, added up or one per site.
    times
        (n_times,) increasing grid of at least two times, in days.

    Raises
    ------
    ValueError
        If the grid has fewer than two times, another length, or a time that no site is followed to.
    """
    pooled = _pooled(sums)
    times = _increasing(times, "times")
    if times.size < 2 or times.shape != pooled.n_patients.shape:
        raise ValueError(
            f"times: found {times.size} with sums at {pooled.n_patients.size} times, "
            "needed the same number, and at least two"
        )
    if not pooled.n_patients.all():
        raise ValueError(
            "times: found one to which no patient is followed, needed a grid within the follow-up"
        )
    value = float(brier_score(pooled) @ _averaging(times))
    n_patients = float(pooled.n_patients[-1])
    mean = float(pooled.integral[0]) / n_patients
    spread = max(float(pooled.integral_square[0]) / n_patients - mean**2, 0.0)
    error = float(np.sqrt(spread / n_patients))
    factor = float(np.exp(_Z * error / value)) if value > 0.0 else 1.0
    return Estimate(value, error, value / factor, value * factor)


def life_table(
    event: ArrayLike, time: ArrayLike, group: ArrayLike, edges: ArrayLike, n_groups: int
) -> LifeTable:
    """Patients of one site at risk, with the event and censored, by group and interval.

    An interval holds its upper edge but not its lower one, except that the first holds both. Longer
    follow-up than the last edge is cut there.

    Parameters
    ----------
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    group
        (n,) number of the risk group, from 0.
    edges
        (n_intervals + 1,) increasing, in days.
    n_groups
        Number of groups, empty ones included.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or lies outside its range.
    """
    event, time = _outcome(event, time)
    edges = _increasing(edges, "edges")
    group = _groups(group, time.shape, n_groups)
    if edges.size < 2 or (time.size and time.min() < edges[0]):
        raise ValueError("edges: needed at least two, the first no later than any time")
    interval = np.maximum(np.searchsorted(edges, time, side="left") - 1, 0)
    cell = group * edges.size + interval  # the last interval stands for follow-up past the grid
    events, censored = (
        np.bincount(cell[who], minlength=n_groups * edges.size).reshape(n_groups, edges.size)
        for who in (event, ~event)
    )
    at_risk = (events + censored)[:, ::-1].cumsum(axis=1)[:, ::-1]
    counts = np.stack([at_risk, events, censored], axis=2)[:, :-1]
    return LifeTable(counts.astype(np.float64))


def survival_from_life_table(table: LifeTable | Sequence[LifeTable]) -> Estimates:
    """Actuarial survival at the end of each interval, (n_groups, n_intervals).

    Patients censored in an interval count half in it. Standard errors are Greenwood's, intervals on
    the log-log scale; where survival is 0 or 1 there is none and both bounds equal it.

    Parameters
    ----------
    table
        Life tables on the same grid, added up or one per site.

    References
    ----------
    Cutler and Ederer, Journal of Chronic Diseases 8 (1958) 699-712.
    """
    at_risk, events = _exposed(_pooled(table))
    alive = at_risk - events
    survival: Floats = np.cumprod(_ratio(alive, at_risk), axis=1, dtype=np.float64)
    terms = np.divide(events, at_risk * alive, out=np.zeros_like(events), where=at_risk * alive > 0)
    error = survival * np.sqrt(np.cumsum(terms, axis=1))
    inner = (survival > 0.0) & (survival < 1.0)
    safe = np.where(inner, survival, 0.5)
    factor = np.exp(np.where(inner, _Z * error / (safe * -np.log(safe)), 0.0))
    return Estimates(
        value=survival,
        standard_error=error,
        low=np.where(inner, safe**factor, survival),
        high=np.where(inner, safe ** (1.0 / factor), survival),
    )


def log_rank_sums(table: LifeTable) -> LogRankSums:
    """Log-rank numerator and variance of one site, events of an interval counting as tied.

    Parameters
    ----------
    table
        Life table of one site; a pooled one gives the test without strata.

    References
    ----------
    Mantel, Cancer Chemotherapy Reports 50 (1966) 163-170.
    """
    at_risk, events = _exposed(table)
    n, d = at_risk.sum(axis=0), events.sum(axis=0)
    share = np.divide(at_risk, n, out=np.zeros_like(at_risk), where=n > 0)
    # a single patient at risk says nothing about groups
    factor = np.divide(d * (n - d), n - 1.0, out=np.zeros_like(n), where=n > 1.0)
    covariance = np.diag(share @ factor) - (share * factor) @ share.T
    return LogRankSums((events - share * d).sum(axis=1), covariance)


def log_rank_test(sums: LogRankSums | Sequence[LogRankSums]) -> LogRankTest:
    """Whether groups differ in survival, stratified by site.

    Parameters
    ----------
    sums
        One per site, or added up.

    Raises
    ------
    ValueError
        If no site has an event while two groups are at risk.
    """
    pooled = _pooled(sums)
    # one direction is always empty, and sums in fixed point carry errors of about 1e-9
    tolerance = 1e-6
    rank = int(np.linalg.matrix_rank(pooled.variance, rtol=tolerance, hermitian=True))
    if rank == 0 or not np.trace(pooled.variance) > tolerance:
        raise ValueError("sums: found no event while two groups are at risk, needed at least one")
    inverse = np.linalg.pinv(pooled.variance, rcond=tolerance, hermitian=True)
    excess = pooled.observed_minus_expected
    statistic = float(excess @ inverse @ excess)
    return LogRankTest(statistic, rank, float(chdtrc(rank, statistic)))


def calibration_sums(
    survival_at_horizon: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    group: ArrayLike,
    *,
    horizon: float,
    censoring: CensoringCurve,
    n_groups: int,
) -> CalibrationSums:
    """Predicted and observed events of one site by the horizon, by group of predicted risk.

    A site whose follow-up ends before the horizon adds nothing.

    Parameters
    ----------
    survival_at_horizon
        (n,) predicted probability of surviving past the horizon.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    group
        (n,) number of the group, from 0.
    horizon
        Days.
    censoring
        Curve of the same site.
    n_groups
        Number of groups, empty ones included.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or lies outside its range.
    """
    event, time = _outcome(event, time)
    _check_horizon(horizon)
    risk = 1.0 - _probabilities(survival_at_horizon, "survival_at_horizon", time.shape)
    group = _groups(group, time.shape, n_groups)
    dead = event & (time <= horizon)
    weight = np.zeros(time.shape)
    covered = bool(censoring.covers(horizon))
    if covered:
        known = dead | (time > horizon)
        weight[known] = _inverse_probability(censoring, np.minimum(time[known], horizon))
    per_patient = [np.ones(time.shape), dead, risk, weight, weight * dead]
    per_patient += [weight**2, weight**2 * dead]
    sums = np.zeros((len(per_patient), n_groups))
    for row, values in zip(sums, per_patient, strict=True):
        np.add.at(row, group, values * covered)
    return CalibrationSums(*sums)


def calibration(sums: CalibrationSums | Sequence[CalibrationSums]) -> Calibration:
    """Mean predicted risk and observed risk by the horizon, by group.

    The observed risk is the weighted share of events among patients of known status, its interval
    on the logit scale, or exact binomial for a group in which nobody or everybody had the event.

    Parameters
    ----------
    sums
        Sums of the same groups, added up or one per site.
    """
    pooled = _pooled(sums)
    observed = np.minimum(_ratio(pooled.observed, pooled.weight), 1.0)
    spread = pooled.observed_square * (1.0 - 2.0 * observed) + pooled.weight_square * observed**2
    error = _ratio(np.sqrt(np.maximum(spread, 0.0)), pooled.weight)
    patients = _ratio(pooled.weight**2, pooled.weight_square)  # Kish's effective number
    low, high = _logit_interval(observed, error, patients)
    return Calibration(
        predicted=_ratio(pooled.predicted, pooled.n_patients),
        observed=Estimates(observed, error, low, high),
    )


def observed_expected(cumulative_hazard: ArrayLike, event: ArrayLike) -> ObservedExpected:
    """Observed and expected events of one site, for calibration in the large.

    Parameters
    ----------
    cumulative_hazard
        (n,) predicted cumulative hazard up to the earlier of the patient's time and the horizon.
    event
        (n,) True where the event was observed within that follow-up.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or a hazard is negative.
    """
    event = _flags(event, "event")
    hazard = _values(cumulative_hazard, "cumulative_hazard", event.shape)
    if (hazard < 0.0).any():
        raise ValueError("cumulative_hazard: found a negative value, needed zero or more")
    return ObservedExpected(float(event.sum()), float(hazard.sum()), float(event.size))


def observed_expected_ratio(sums: ObservedExpected | Sequence[ObservedExpected]) -> Estimate:
    """Observed over expected events, with the exact Poisson interval; 1 is calibrated.

    Above 1 the model predicts too few events.

    Parameters
    ----------
    sums
        One per site, or added up.

    Raises
    ------
    ValueError
        If no event is expected.
    """
    pooled = _pooled(sums)
    if not pooled.expected > 0.0:
        raise ValueError(f"expected: found {pooled.expected:g} events, needed more than none")
    seen = max(pooled.observed, 0.0)
    low = chdtri(2.0 * seen, 1.0 - _TAIL) / 2.0 if seen > 0.0 else 0.0
    high = chdtri(2.0 * (seen + 1.0), _TAIL) / 2.0
    figures = np.array([seen, np.sqrt(seen), low, high]) / pooled.expected
    return Estimate(*figures.tolist())


def hide_small_cells(counts: ArrayLike, minimum: int) -> Floats:
    """Replace every cell below the minimum, zero included, by NaN.

    For tables shown without totals; with totals use `complementary_hidden`.

    Parameters
    ----------
    counts
        Counts, of any shape.
    minimum
        Smallest count shown.

    Raises
    ------
    ValueError
        If a count is negative or missing, or the minimum is below one.
    """
    counts = _counts(counts, minimum)
    return np.where(counts < minimum, np.nan, counts)


def complementary_hidden(counts: ArrayLike, minimum: int) -> tuple[Flags, Flags]:
    """Which cells to hide, and which totals to show, so that no subtraction gives a small cell.

    In each column, total minus shown cells must stand for at least two sites with a count and reach
    the minimum: beyond the small cells the smallest others are hidden until it does, or the total
    where no cell would remain. What a site learns by taking its own count from a total is not
    considered.

    Parameters
    ----------
    counts
        (n_sites, n_columns) or (n_sites,).
    minimum
        Smallest count shown.

    Returns
    -------
    hidden
        Shape of ``counts``, True where hidden.
    total_shown
        (n_columns,) or scalar, True where the column's total may be shown.

    Raises
    ------
    ValueError
        If a count is negative or missing, or the minimum is below one.
    """
    counts = _counts(counts, minimum)
    columns = counts.reshape(counts.shape[0], math.prod(counts.shape[1:]))
    parts = [_hide_column(column, minimum) for column in columns.T]
    hidden = np.array([part[0] for part in parts], dtype=np.bool_).reshape(columns.shape[::-1]).T
    shown = np.array([part[1] for part in parts], dtype=np.bool_)
    return hidden.reshape(counts.shape), shown.reshape(counts.shape[1:])


def visible_sites(n_events: Mapping[str, int], *, min_events: int) -> tuple[frozenset[str], bool]:
    """Sites whose own figures may be shown, and whether the pooled figure may be.

    Parameters
    ----------
    n_events
        Test events of each site.
    min_events
        Smallest number of events behind a shown figure.

    Returns
    -------
    shown
        Names of the sites.
    total_shown
        Whether the figure over all sites is shown; see `complementary_hidden`.

    Raises
    ------
    ValueError
        If a count is negative, or the minimum is below one.
    """
    names = sorted(n_events)
    counts = np.array([n_events[name] for name in names], dtype=np.float64)
    hidden, total_shown = complementary_hidden(counts, min_events)
    shown = frozenset(name for name, hide in zip(names, hidden, strict=True) if not hide)
    return shown, bool(total_shown)


def _hide_column(counts: Floats, minimum: int) -> tuple[Flags, bool]:
    small = counts < minimum
    hidden = small.copy()
    for cell in np.argsort(counts, kind="stable"):
        if _nothing_to_subtract(counts[hidden], minimum):
            break
        hidden[cell] = True
    if _nothing_to_subtract(counts[hidden], minimum) and (small.all() or not hidden.all()):
        return hidden, counts.size > 0
    return small, False


def _nothing_to_subtract(hidden_counts: Floats, minimum: int) -> bool:
    if hidden_counts.size == 0:
        return True
    return bool(np.count_nonzero(hidden_counts) >= 2 and hidden_counts.sum() >= minimum)


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
    """Pairs of each patient of ``first`` with those that ``second`` flags, by blocks of rows."""
    involved = np.zeros((3, log_hazard.size))  # concordant, discordant, tied pairs of each patient
    step = max(1, _PAIRS_AT_ONCE // max(log_hazard.size, 1))
    for start in range(0, first.size, step):
        rows, heavy = first[start : start + step], weight[start : start + step]
        for kind, pairs in enumerate(_sorted_pairs(log_hazard, rows, second(rows))):
            involved[kind, rows] += pairs.sum(axis=1) * heavy
            involved[kind] += heavy @ pairs
    c, p = involved[0] + 0.5 * involved[2], involved.sum(axis=0)
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


def _sorted_pairs(
    log_hazard: Floats, rows: Indices, comparable: Flags
) -> tuple[Flags, Flags, Flags]:
    with np.errstate(over="ignore"):  # an infinite gap has the right sign
        gap = log_hazard[rows, None] - log_hazard
    tied = comparable & (np.abs(gap) <= _TIED_LOG_HAZARD)
    concordant = comparable & (gap > _TIED_LOG_HAZARD)
    return concordant, comparable & ~tied & ~concordant, tied


def _kaplan_meier(
    event: Flags, time: Floats, *, of: Literal["event", "censoring"]
) -> tuple[Floats, Floats]:
    distinct, index = np.unique(time, return_inverse=True)
    leaving = np.bincount(index, minlength=distinct.size).astype(np.float64)
    drops = np.bincount(index[event], minlength=distinct.size).astype(np.float64)
    at_risk = leaving[::-1].cumsum()[::-1]
    if of == "censoring":
        at_risk, drops = at_risk - drops, leaving - drops
    ratio = np.divide(drops, at_risk, out=np.zeros_like(drops), where=drops > 0.0)
    return distinct, np.cumprod(1.0 - ratio)


def _step(knots: Floats, values: Floats, at: Floats) -> Floats:
    """Right-continuous step function that is 1 before its first knot."""
    padded = np.concatenate(([1.0], values))
    return np.asarray(padded[np.searchsorted(knots, at, side="right")])


def _inverse_probability(censoring: CensoringCurve, time: Floats) -> Floats:
    probability = censoring.at(time)
    if (probability <= 0.0).any():
        raise ValueError(
            "censoring: found probability zero at an event, needed the curve of the "
            "same site, or a horizon within its follow-up"
        )
    return 1.0 / probability


def _averaging(times: Floats) -> Floats:
    """Weights of the trapezoid rule, over the length of the grid; zero for a single time."""
    gaps = np.diff(times)
    weights = np.zeros(times.size)
    weights[:-1] += gaps / 2.0
    weights[1:] += gaps / 2.0
    return weights / max(gaps.sum(), np.finfo(np.float64).tiny)


def _exposed(table: LifeTable) -> tuple[Floats, Floats]:
    """Effective patients at risk and events, each (n_groups, n_intervals)."""
    at_risk, events, censored = np.moveaxis(table.counts, 2, 0)
    return at_risk - censored / 2.0, events


def _ratio(top: Floats, bottom: Floats) -> Floats:
    missing = np.full(np.shape(bottom), np.nan)
    return np.asarray(np.divide(top, bottom, out=missing, where=np.asarray(bottom) > 0.0))


def _logit_interval(value: Floats, error: Floats, trials: Floats) -> tuple[Floats, Floats]:
    inner = (value > 0.0) & (value < 1.0)
    safe = np.where(inner, value, 0.5)
    half = np.where(inner, _Z * error / (safe * (1.0 - safe)), 0.0)
    reach = _TAIL ** (1.0 / np.fmax(trials, 1.0))
    low = np.where(inner, expit(logit(safe) - half), np.where(value >= 1.0, reach, value))
    high = np.where(inner, expit(logit(safe) + half), np.where(value <= 0.0, 1.0 - reach, value))
    return low, high


def _added(first: SumsT, second: SumsT) -> SumsT:
    if type(first) is not type(second):
        raise TypeError(
            f"sums: found {type(second).__name__}, needed {type(first).__name__} to add"
        )
    parts: list[Any] = []
    for part in fields(first):
        one, other = getattr(first, part.name), getattr(second, part.name)
        if np.shape(one) != np.shape(other):
            raise ValueError(
                f"{part.name}: found shape {np.shape(other)}, needed {np.shape(one)} to add"
            )
        parts.append(one + other)
    return type(first)(*parts)


def _pooled(sums: SumsT | Sequence[SumsT]) -> SumsT:
    if not isinstance(sums, Sequence):
        return sums
    if not sums:
        raise ValueError("sums: found none, needed those of at least one site")
    pooled: SumsT = reduce(add, sums)
    return pooled


def _flat(sums: DataclassInstance) -> Floats:
    parts = [np.ravel(getattr(sums, part.name)) for part in fields(sums)]
    return np.concatenate(parts).astype(np.float64)


def _unflat(vector: ArrayLike, shapes: Sequence[tuple[int, ...]]) -> list[Floats]:
    sizes = [math.prod(shape) for shape in shapes]
    flat = _values(vector, "vector", (sum(sizes),))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _outcome(event: ArrayLike, time: ArrayLike) -> tuple[Flags, Floats]:
    event = _flags(event, "event")
    time = _values(time, "time", event.shape)
    if (time < 0.0).any():
        raise ValueError("time: found a negative value, needed days from the landmark")
    return event, time


def _flags(values: ArrayLike, name: str) -> Flags:
    found = np.asarray(values)
    if found.ndim != 1:
        raise ValueError(f"{name}: found shape {found.shape}, needed one value per patient")
    if not np.isin(found, (0, 1)).all():
        raise ValueError(f"{name}: found something other than true and false, needed only these")
    return found.astype(np.bool_)


def _values(values: ArrayLike, name: str, shape: tuple[int, ...]) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != shape:
        raise ValueError(f"{name}: found shape {found.shape}, needed {shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: found a missing or infinite value, needed finite ones")
    return found


def _probabilities(values: ArrayLike, name: str, shape: tuple[int, ...]) -> Floats:
    found = _values(values, name, shape)
    if ((found < 0.0) | (found > 1.0)).any():
        raise ValueError(f"{name}: found a value outside 0 to 1, needed probabilities")
    return found


def _increasing(values: ArrayLike, name: str) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"{name}: found shape {found.shape}, needed a list of days")
    if not (np.isfinite(found).all() and (np.diff(found) > 0.0).all() and found[0] >= 0.0):
        raise ValueError(f"{name}: needed finite, increasing days, none negative")
    return found


def _groups(group: ArrayLike, shape: tuple[int, ...], n_groups: int) -> Indices:
    found = _values(group, "group", shape)
    if not ((found >= 0) & (found < n_groups) & (found == np.floor(found))).all():
        raise ValueError(f"group: found a number outside 0 to {n_groups - 1}, needed whole ones")
    return found.astype(np.intp)


def _counts(counts: ArrayLike, minimum: int) -> Floats:
    found = np.atleast_1d(np.asarray(counts, dtype=np.float64))
    if not (np.isfinite(found) & (found >= 0.0)).all():
        raise ValueError("counts: found a negative or missing value, needed counts")
    if minimum < 1:
        raise ValueError(f"minimum: found {minimum}, needed at least 1")
    return found


def _check_horizon(horizon: float) -> None:
    if not 0.0 < horizon < np.inf:
        raise ValueError(f"horizon: found {horizon}, needed a positive number of days")
