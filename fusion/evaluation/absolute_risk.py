"""Predicted against observed risk: Brier score, calibration, observed over expected events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from scipy.special import chdtri

from fusion.evaluation.censoring import CensoringCurve, inverse_probability, kaplan_meier, step_at
from fusion.evaluation.sums import (
    TAIL,
    Estimate,
    Estimates,
    Floats,
    Z,
    added,
    check_horizon,
    checked_days,
    checked_flags,
    checked_groups,
    checked_outcome,
    checked_values,
    flattened,
    logit_interval,
    pool,
    ratio,
    unflattened,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike


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
        return added(self, other)

    def to_vector(self) -> Floats:
        """(2 n_times + 2,) numbers."""
        return flattened(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_times: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((n_times,), (n_times,), (1,), (1,))))


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
        return added(self, other)

    def to_vector(self) -> Floats:
        """(7 n_groups,) numbers."""
        return flattened(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((n_groups,),) * 7))


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
        return added(self, other)

    def to_vector(self) -> Floats:
        """(3,) numbers."""
        return flattened(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((3,),))[0].tolist())


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
    event, time = checked_outcome(event, time)
    times = checked_days(times, "times")
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
    event, time = checked_outcome(event, time)
    times = checked_days(times, "times")
    survival = step_at(*kaplan_meier(event, time, of="event"), times)
    return brier_sums(np.tile(survival, (time.size, 1)), event, time, times, censoring)


def brier_score(sums: BrierSums | Sequence[BrierSums]) -> Floats:
    """Mean squared error at each time (n_times,), lower is better; NaN where nobody is followed."""
    pooled = pool(sums)
    return ratio(pooled.squared_errors, pooled.n_patients)


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
    pooled = pool(sums)
    times = checked_days(times, "times")
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
    factor = float(np.exp(Z * error / value)) if value > 0.0 else 1.0
    return Estimate(value, error, value / factor, value * factor)


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
    event, time = checked_outcome(event, time)
    check_horizon(horizon)
    risk = 1.0 - _probabilities(survival_at_horizon, "survival_at_horizon", time.shape)
    group = checked_groups(group, time.shape, n_groups)
    dead = event & (time <= horizon)
    weight = np.zeros(time.shape)
    covered = bool(censoring.covers(horizon))
    if covered:
        known = dead | (time > horizon)
        weight[known] = inverse_probability(censoring, np.minimum(time[known], horizon))
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
    pooled = pool(sums)
    observed = np.minimum(ratio(pooled.observed, pooled.weight), 1.0)
    spread = pooled.observed_square * (1.0 - 2.0 * observed) + pooled.weight_square * observed**2
    error = ratio(np.sqrt(np.maximum(spread, 0.0)), pooled.weight)
    patients = ratio(pooled.weight**2, pooled.weight_square)  # Kish's effective number
    low, high = logit_interval(observed, error, patients)
    return Calibration(
        predicted=ratio(pooled.predicted, pooled.n_patients),
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
    event = checked_flags(event, "event")
    hazard = checked_values(cumulative_hazard, "cumulative_hazard", event.shape)
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
    pooled = pool(sums)
    if not pooled.expected > 0.0:
        raise ValueError(f"expected: found {pooled.expected:g} events, needed more than none")
    seen = max(pooled.observed, 0.0)
    low = chdtri(2.0 * seen, 1.0 - TAIL) / 2.0 if seen > 0.0 else 0.0
    high = chdtri(2.0 * (seen + 1.0), TAIL) / 2.0
    figures = np.array([seen, np.sqrt(seen), low, high]) / pooled.expected
    return Estimate(*figures.tolist())


def _averaging(times: Floats) -> Floats:
    """Weights of the trapezoid rule, over the length of the grid; zero for a single time."""
    gaps = np.diff(times)
    weights = np.zeros(times.size)
    weights[:-1] += gaps / 2.0
    weights[1:] += gaps / 2.0
    return weights / max(gaps.sum(), np.finfo(np.float64).tiny)


def _probabilities(values: ArrayLike, name: str, shape: tuple[int, ...]) -> Floats:
    found = checked_values(values, name, shape)
    if ((found < 0.0) | (found > 1.0)).any():
        raise ValueError(f"{name}: found a value outside 0 to 1, needed probabilities")
    return found
