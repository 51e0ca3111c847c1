"""Treatments compared within risk groups, from sums and life tables without small cells.

Patients were not randomised: who was given a treatment may differ in prognosis from who was not,
within a risk group too. The figures describe, they do not tell what a treatment does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from fusion.evaluation.life_tables import (
    LifeTable,
    LogRankSums,
    LogRankTest,
    life_table,
    log_rank_sums,
    log_rank_test,
    survival_from_life_table,
)
from fusion.evaluation.one_step import one_step
from fusion.evaluation.sums import (
    Estimates,
    Flags,
    Floats,
    Indices,
    Z,
    added,
    checked_groups,
    checked_levels,
    checked_outcome,
    flattened,
    pool,
    unflattened,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

# Sums in fixed point carry errors of about 1e-9.
_NO_INFORMATION = 1e-6
_STAY = np.array([1.0, -1.0, -1.0])  # at risk less events and censored: beyond the interval


@dataclass(frozen=True, eq=False)
class TreatmentSums:
    """Log-rank sums and life tables by risk group and treatment; zeros for what is hidden.

    Parameters
    ----------
    counts
        (n_groups, n_levels, n_intervals, 3): at risk at the interval's start, events, censored.
    patients
        (n_groups, n_levels, 2) patients, and events within the grid, behind the next two.
    observed_minus_expected
        (n_groups, n_levels) events within the grid beyond those expected if treatments did not
        differ, each at its own time. Over sites they add up to a test stratified by site.
    variance
        (n_groups, n_levels, n_levels) hypergeometric covariance.
    """

    counts: Floats
    patients: Floats
    observed_minus_expected: Floats
    variance: Floats

    def __add__(self, other: Self) -> Self:
        return added(self, other)

    def to_vector(self) -> Floats:
        """(n_groups * n_levels * (3 n_intervals + 3 + n_levels),) numbers, the fields in order."""
        return flattened(self)

    @classmethod
    def from_vector(
        cls, vector: ArrayLike, *, n_groups: int, n_levels: int, n_intervals: int
    ) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        tables = (n_groups, n_levels)
        shapes = ((*tables, n_intervals, 3), (*tables, 2), tables, (*tables, n_levels))
        return cls(*unflattened(vector, shapes))


@dataclass(frozen=True, eq=False)
class TreatmentComparison:
    """Treatments in one risk group, over the sites that released it; None where there is no figure.

    Attributes
    ----------
    n_patients, n_events
        (n_levels,) patients, and events within the grid, behind the test and the ratios.
    survival
        (n_levels, n_intervals) actuarial survival at the grid's edges, of the fewer sites that
        could release it.
    log_rank
        Test that the treatments do not differ, stratified by site.
    hazard_ratio
        (n_levels,) against the first level, which is 1; above 1 is worse. NaN where unknown.
    """

    n_patients: Floats
    n_events: Floats
    survival: Estimates | None
    log_rank: LogRankTest | None
    hazard_ratio: Estimates | None


def treatment_sums(
    event: ArrayLike,
    time: ArrayLike,
    group: ArrayLike,
    treatment: ArrayLike,
    edges: ArrayLike,
    *,
    shape: tuple[int, int],
    cell: int,
) -> TreatmentSums:
    """Log-rank sums and life tables of one site by risk group and treatment.

    The sums of a risk group cross as zeros if in any treatment the patients, those with an event
    within the grid, or those without are fewer than ``cell`` and not 0; its life table, if that
    holds for a count in it: at risk, events, censored or beyond the grid, in any interval. Patients
    of unknown treatment are left out, but counted alike, since they follow from the tables by risk
    group alone.

    Parameters
    ----------
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    group
        (n,) number of the risk group, from 0.
    treatment
        (n,) number of the treatment, from 0, the reference; -1 where unknown.
    edges
        (n_intervals + 1,) increasing, in days.
    shape
        Number of risk groups and of treatments, empty ones included.
    cell
        Smallest count that may leave.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or lies outside its range.
    """
    event, time = checked_outcome(event, time)
    n_levels = shape[1]
    risk_group = checked_groups(group, time.shape, shape[0])
    level = checked_levels(treatment, "treatment", time.shape, n_levels)
    strata = risk_group * (n_levels + 1) + level + 1  # of unknown treatment first
    counts = _counts(event, time, strata, edges, shape)
    patients = np.stack([counts[:, :, 0, 0], counts[..., 1].sum(axis=2)], axis=2)
    shown = _without_small_cell(counts, (counts[:, :, -1] * _STAY).sum(axis=2), cell=cell)
    told = _without_small_cell(patients, patients[:, :, 0] - patients[:, :, 1], cell=cell)
    seen, rank = _ranked(event, time, np.max(edges))
    at_events = _counts(seen, rank, strata, np.arange(rank.max(initial=0.0) + 2.0), shape)
    ranks = [log_rank_sums(LifeTable(of_group[1:])) for of_group in at_events]
    return TreatmentSums(
        counts=counts[:, 1:] * shown[:, None, None, None],
        patients=patients[:, 1:] * told[:, None, None],
        observed_minus_expected=np.array([r.observed_minus_expected for r in ranks])
        * told[:, None],
        variance=np.array([r.variance for r in ranks]) * told[:, None, None],
    )


def treatment_comparison(
    sums: TreatmentSums | Sequence[TreatmentSums],
) -> tuple[TreatmentComparison, ...]:
    """Survival by treatment, log-rank test and hazard ratios within each risk group.

    Hazard ratios take one step from no difference: with two treatments that is Peto's
    exp((O - E) / V), with more its joint form. They are pulled toward 1 where treatments differ
    much or one is rare.

    Parameters
    ----------
    sums
        Sums on the same grid, added up or one per site.

    References
    ----------
    Yusuf et al., Progress in Cardiovascular Diseases 27 (1985) 335-371.
    """
    pooled = pool(sums)
    tests = zip(pooled.observed_minus_expected, pooled.variance, strict=True)
    ranks = [LogRankSums(*test) for test in tests]
    parts = zip(pooled.counts, pooled.patients, ranks, strict=True)
    return tuple(_comparison(*of_group) for of_group in parts)


def _comparison(counts: Floats, patients: Floats, sums: LogRankSums) -> TreatmentComparison:
    return TreatmentComparison(
        n_patients=patients[:, 0],
        n_events=patients[:, 1],
        survival=survival_from_life_table(LifeTable(counts)) if counts.any() else None,
        log_rank=_log_rank(sums),
        hazard_ratio=_hazard_ratio(sums) if patients.any() else None,
    )


def _log_rank(sums: LogRankSums) -> LogRankTest | None:
    try:
        return log_rank_test(sums)
    except ValueError:  # no event while two treatments are at risk
        return None


def _hazard_ratio(sums: LogRankSums) -> Estimates:
    variance = sums.variance[1:, 1:]
    found = one_step(
        sums.observed_minus_expected[1:],
        variance,
        np.asarray(np.diagonal(variance) > _NO_INFORMATION),
    )
    known = sums.variance[0, 0] > _NO_INFORMATION  # the reference
    log_ratio = np.append(0.0 if known else np.nan, found.step)
    error = np.append(0.0 if known else np.nan, np.sqrt(found.variance))
    ratio = np.exp(log_ratio)
    half = Z * error
    return Estimates(ratio, ratio * error, np.exp(log_ratio - half), np.exp(log_ratio + half))


def _counts(
    event: Flags, time: Floats, strata: Indices, edges: ArrayLike, shape: tuple[int, int]
) -> Floats:
    """(n_groups, n_levels + 1, n_intervals, 3) life tables, those of unknown treatment first."""
    n_groups, n_levels = shape
    counts = life_table(event, time, strata, edges, n_groups * (n_levels + 1)).counts
    return counts.reshape(n_groups, n_levels + 1, *counts.shape[1:])


def _ranked(event: Flags, time: Floats, last: float) -> tuple[Flags, Floats]:
    """Events until the last day, and times as whole numbers.

    Events have odd ones and censorings of the same day the even ones after them, so that in a life
    table by these numbers nobody is censored in an interval with an event.
    """
    seen = event & (time <= last)
    _, rank = np.unique(np.minimum(time, last), return_inverse=True)
    return seen, np.asarray(2 * rank + np.where(seen, 1, 2), dtype=np.float64)


def _without_small_cell(*counts: Floats, cell: int) -> Flags:
    """(n_groups,) whether no count is below ``cell`` but 0."""
    cells = np.concatenate([part.reshape(len(part), -1) for part in counts], axis=1)
    return np.asarray(((cells <= 0.0) | (cells >= cell)).all(axis=1))
