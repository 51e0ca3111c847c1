"""Decision curves: what treating by predicted risk is worth, beside treating all and nobody."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import numpy as np

from fusion.evaluation.censoring import CensoringCurve, inverse_probability
from fusion.evaluation.sums import (
    Estimates,
    Flags,
    Floats,
    Z,
    added,
    check_horizon,
    checked_flags,
    checked_outcome,
    checked_values,
    flattened,
    pool,
    ratio,
    unflattened,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

_SIGN = np.array([[1.0], [1.0], [-1.0]])  # of the benefit to whom `_strategies` count


@dataclass(frozen=True, eq=False)
class DecisionSums:
    """Patients at each threshold of predicted risk, (n_thresholds,); zeros where not released.

    Parameters
    ----------
    n_patients
        All patients of the sites that release the threshold.
    true_positives, false_positives
        Sums of the censoring weights of patients at or above the threshold with the event by the
        horizon, and without it.
    events, weight
        The same over patients at any risk: with the event, and of known status.
    true_positives_square, false_positives_square, events_square, weight_square
        The same with squared weights.
    """

    n_patients: Floats
    true_positives: Floats
    false_positives: Floats
    events: Floats
    weight: Floats
    true_positives_square: Floats
    false_positives_square: Floats
    events_square: Floats
    weight_square: Floats

    def __add__(self, other: Self) -> Self:
        return added(self, other)

    def to_vector(self) -> Floats:
        """(9 n_thresholds,) numbers."""
        return flattened(self)

    def only(self, shown: ArrayLike) -> Self:
        """Withhold every threshold that is not flagged, (n_thresholds,)."""
        flags = checked_flags(shown, "shown")
        if flags.shape != self.n_patients.shape:
            raise ValueError(f"shown: found {flags.size} flags, needed {self.n_patients.size}")
        return type(self)(*(getattr(self, part.name) * flags for part in fields(self)))

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_thresholds: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((n_thresholds,),) * 9))


@dataclass(frozen=True, eq=False)
class NetBenefit:
    """Net benefit per patient at each threshold, (n_thresholds,); NaN where nobody released it.

    Attributes
    ----------
    thresholds
        Risk at or above which a patient is treated.
    model, treat_all
        Of treating by the model, and of treating everybody; treating nobody is 0. Higher is better,
        at most the share of patients with the event.
    gain
        The model less treating everybody, its error that of the paired difference.
    n_patients
        Patients of the sites that released the threshold.
    """

    thresholds: Floats
    model: Estimates
    treat_all: Estimates
    gain: Estimates
    n_patients: Floats


def decision_sums(
    risk: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    *,
    thresholds: ArrayLike,
    horizon: float,
    censoring: CensoringCurve,
    cell: int,
) -> DecisionSums:
    """Weighted true and false positives of one site at each threshold that it can release.

    Which they are says `releasable_thresholds`. A site whose follow-up ends before the horizon adds
    nothing.

    Parameters
    ----------
    risk
        (n,) predicted probability of the event by the horizon.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    thresholds
        (n_thresholds,) increasing, above 0 and below 1; may be none.
    horizon
        Days.
    censoring
        Curve of the same site.
    cell
        Smallest count that may leave.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or lies outside its range.
    """
    released = releasable_thresholds(
        risk, event, time, thresholds=thresholds, horizon=horizon, cell=cell
    )
    event, time = checked_outcome(event, time)
    risk, cuts = _probabilities(risk, "risk"), _thresholds(thresholds)
    if not censoring.covers(horizon):
        return DecisionSums(*np.zeros((9, cuts.size)))
    dead, alive = event & (time <= horizon), time > horizon
    known = dead | alive
    weight = np.zeros(time.shape)
    weight[known] = inverse_probability(censoring, np.minimum(time[known], horizon))
    treated = risk >= cuts[:, None]
    everybody = np.ones_like(treated)
    per_threshold = [everybody.sum(axis=1).astype(np.float64)]
    for weights in (weight, weight**2):
        per_threshold += [treated @ (weights * dead), treated @ (weights * alive)]
        per_threshold += [everybody @ (weights * dead), everybody @ weights]
    return DecisionSums(*per_threshold).only(released)


def releasable_thresholds(
    risk: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    *,
    thresholds: ArrayLike,
    horizon: float,
    cell: int,
    also_cut: ArrayLike = (),
) -> Flags:
    """Say which thresholds one site can release without a small cell, (n_thresholds,).

    Walks from the left and keeps a threshold if the patients between it and the cut below, and
    between it and the cut above, number at least ``cell`` each, and if among either those with the
    event by the horizon, and those followed past it, are none or at least ``cell``. Cuts are the
    thresholds kept so far, and those of ``also_cut``. Differences of released sums then tell of no
    fewer patients.

    Parameters
    ----------
    risk
        (n,) predicted probability of the event by the horizon.
    event
        (n,) True where the event was observed.
    time
        (n,) days to event or censoring.
    thresholds
        (n_thresholds,) increasing, above 0 and below 1.
    horizon
        Days.
    cell
        Smallest count that may leave.
    also_cut
        Risks at which other released tables, such as those by risk group, cut the same patients.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or lies outside its range.
    """
    event, time = checked_outcome(event, time)
    check_horizon(horizon)
    risk, cuts = _probabilities(risk, "risk", time.shape), _thresholds(thresholds)
    status = np.stack([event & (time <= horizon), time > horizon])

    def passes(low: float, high: float) -> bool:
        within = (risk >= low) & (risk < high)
        counts = status[:, within].sum(axis=1)
        return bool(within.sum() >= cell and ((counts == 0) | (counts >= cell)).all())

    fixed = np.concatenate([[-np.inf], _probabilities(also_cut, "also_cut"), [np.inf]])
    kept = np.zeros(cuts.size, dtype=np.bool_)
    for i, cut in enumerate(cuts):
        below = np.append(fixed[fixed <= cut], cuts[:i][kept[:i]]).max()
        kept[i] = passes(below, cut) and passes(cut, fixed[fixed > cut].min())
    return kept


def net_benefit(sums: DecisionSums | Sequence[DecisionSums], thresholds: ArrayLike) -> NetBenefit:
    """Net benefit of the model and of treating everybody, with intervals on the plain scale.

    At threshold t it is the true positives less t / (1 - t) times the false positives, per patient,
    weighted for those lost before the horizon. Each threshold speaks for the sites that released
    it; the model and treating everybody are compared on the same patients.

    Parameters
    ----------
    sums
        Sums at the same thresholds, added up or one per site.
    thresholds
        (n_thresholds,) increasing, above 0 and below 1.

    Raises
    ------
    ValueError
        If the thresholds are of another number than the sums, or out of range.

    References
    ----------
    Vickers and Elkin, Medical Decision Making 26 (2006) 565-574; Vickers et al., BMC Medical
    Informatics and Decision Making 8 (2008) 53.
    """
    total, cuts = pool(sums), _thresholds(thresholds)
    if cuts.shape != total.weight.shape:
        raise ValueError(f"thresholds: found {cuts.size}, needed {total.weight.size} as the sums")
    odds = cuts / (1.0 - cuts)
    true, false, true_square, false_square = _strategies(total)
    value = ratio(true - odds * false, np.broadcast_to(total.weight, true.shape))
    linear = _SIGN * (true_square - odds * false_square)
    square = true_square + odds**2 * false_square
    spread = square - 2.0 * value * linear + value**2 * total.weight_square
    error = np.sqrt(np.maximum(spread, 0.0)) / np.where(total.weight > 0.0, total.weight, 1.0)
    figures = np.stack([value, error, value - Z * error, value + Z * error], axis=1)
    model, treat_all, gain = (Estimates(*of_strategy) for of_strategy in figures)
    return NetBenefit(cuts, model, treat_all, gain, total.n_patients)


def _strategies(total: DecisionSums) -> tuple[Floats, ...]:
    """Sum up true and false positives, and their squares, (3, n_thresholds) each.

    Of the model, of treating everybody, and of the first less the second: those whom only the
    second treats, with a negative sign but for the squares.
    """
    others = total.weight - total.events
    others_square = total.weight_square - total.events_square
    true = [total.true_positives, total.events]
    false = [total.false_positives, others]
    true_square = [total.true_positives_square, total.events_square]
    false_square = [total.false_positives_square, others_square]
    return (
        np.array([*true, true[0] - true[1]]),
        np.array([*false, false[0] - false[1]]),
        np.array([*true_square, true_square[1] - true_square[0]]),
        np.array([*false_square, false_square[1] - false_square[0]]),
    )


def _thresholds(values: ArrayLike) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    inside = found.ndim == 1 and bool(((found > 0.0) & (found < 1.0)).all())
    if not inside or not (np.diff(found) > 0.0).all():
        raise ValueError("thresholds: needed an increasing list of risks above 0 and below 1")
    return found


def _probabilities(values: ArrayLike, name: str, shape: tuple[int, ...] | None = None) -> Floats:
    found = np.asarray(values, dtype=np.float64)
    found = checked_values(found, name, (found.size,) if shape is None else shape)
    if ((found < 0.0) | (found > 1.0)).any():
        raise ValueError(f"{name}: found a value outside 0 to 1, needed probabilities")
    return found
