"""Survival of risk groups: life tables, actuarial curves and the log-rank test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy.special import chdtrc

from fusion.evaluation.sums import (
    Estimates,
    Floats,
    Z,
    added,
    checked_days,
    checked_groups,
    checked_outcome,
    flattened,
    pool,
    ratio,
    unflattened,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


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
        return added(self, other)

    def to_vector(self) -> Floats:
        """(n_groups * n_intervals * 3,) numbers."""
        return flattened(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int, n_intervals: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((n_groups, n_intervals, 3),)))


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
        return added(self, other)

    def to_vector(self) -> Floats:
        """(n_groups + n_groups ** 2,) numbers."""
        return flattened(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((n_groups,), (n_groups, n_groups))))


@dataclass(frozen=True)
class LogRankTest:
    """Chi-squared test that groups have the same survival."""

    statistic: float
    degrees_of_freedom: int
    p_value: float


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
    event, time = checked_outcome(event, time)
    edges = checked_days(edges, "edges")
    group = checked_groups(group, time.shape, n_groups)
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
    at_risk, events = _exposed(pool(table))
    alive = at_risk - events
    survival: Floats = np.cumprod(ratio(alive, at_risk), axis=1, dtype=np.float64)
    terms = np.divide(events, at_risk * alive, out=np.zeros_like(events), where=at_risk * alive > 0)
    error = survival * np.sqrt(np.cumsum(terms, axis=1))
    inner = (survival > 0.0) & (survival < 1.0)
    safe = np.where(inner, survival, 0.5)
    factor = np.exp(np.where(inner, Z * error / (safe * -np.log(safe)), 0.0))
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
    pooled = pool(sums)
    # one direction is always empty, and sums in fixed point carry errors of about 1e-9
    tolerance = 1e-6
    rank = int(np.linalg.matrix_rank(pooled.variance, rtol=tolerance, hermitian=True))
    if rank == 0 or not np.trace(pooled.variance) > tolerance:
        raise ValueError("sums: found no event while two groups are at risk, needed at least one")
    inverse = np.linalg.pinv(pooled.variance, rcond=tolerance, hermitian=True)
    excess = pooled.observed_minus_expected
    statistic = float(excess @ inverse @ excess)
    return LogRankTest(statistic, rank, float(chdtrc(rank, statistic)))


def _exposed(table: LifeTable) -> tuple[Floats, Floats]:
    """Effective patients at risk and events, each (n_groups, n_intervals)."""
    at_risk, events, censored = np.moveaxis(table.counts, 2, 0)
    return at_risk - censored / 2.0, events
