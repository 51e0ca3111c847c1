"""How long a site follows its patients, and the weights that make up for those it loses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from fusion.evaluation.sums import Flags, Floats, checked_outcome

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


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
        return step_at(self.time, self.probability, np.asarray(time, dtype=np.float64))

    def covers(self, time: ArrayLike) -> Flags:
        """Whether status at ``time`` is known: someone is followed longer, or the last one died."""
        asked = np.asarray(time, dtype=np.float64)
        if self.time.size == 0:
            return np.zeros(asked.shape, dtype=np.bool_)
        return np.asarray((asked < self.time[-1]) | (self.probability[-1] > 0.0))


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
    event, time = checked_outcome(event, time)
    return CensoringCurve(*kaplan_meier(event, time, of="censoring"))


def kaplan_meier(
    event: Flags, time: Floats, *, of: Literal["event", "censoring"]
) -> tuple[Floats, Floats]:
    """Distinct times and the Kaplan-Meier curve of events or of censoring at them."""
    distinct, index = np.unique(time, return_inverse=True)
    leaving = np.bincount(index, minlength=distinct.size).astype(np.float64)
    drops = np.bincount(index[event], minlength=distinct.size).astype(np.float64)
    at_risk = leaving[::-1].cumsum()[::-1]
    if of == "censoring":
        at_risk, drops = at_risk - drops, leaving - drops
    ratio = np.divide(drops, at_risk, out=np.zeros_like(drops), where=drops > 0.0)
    return distinct, np.cumprod(1.0 - ratio)


def step_at(knots: Floats, values: Floats, at: Floats) -> Floats:
    """Right-continuous step function that is 1 before its first knot."""
    padded = np.concatenate(([1.0], values))
    return np.asarray(padded[np.searchsorted(knots, at, side="right")])


def inverse_probability(censoring: CensoringCurve, time: Floats) -> Floats:
    """Weights of patients still followed at ``time``; ValueError where the curve is zero."""
    probability = censoring.at(time)
    if (probability <= 0.0).any():
        raise ValueError(
            "censoring: found probability zero at an event, needed the curve of the "
            "same site, or a horizon within its follow-up"
        )
    return 1.0 / probability
