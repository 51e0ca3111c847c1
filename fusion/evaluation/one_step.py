"""One Newton step from a given point: the optimum that a score and its information point to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fusion.evaluation.sums import Flags, Floats

# Of an information scaled to unit diagonal: a direction below it has no estimate worth the name.
_SINGULAR = 1e-8
# Share of a coordinate in such directions up to which it is still determined by the others.
_UNDETERMINED = 1e-6


@dataclass(frozen=True, eq=False)
class OneStep:
    """Where one Newton step leads, and what it gains.

    Attributes
    ----------
    step, variance
        (p,) step to the optimum and the variance of where it ends; NaN for a coordinate that the
        information does not determine: constant, or a combination of others.
    gain
        Twice the log-likelihood gained, to second order.
    rank
        Number of directions that the information determines.
    """

    step: Floats
    variance: Floats
    gain: float
    rank: int


def one_step(gradient: Floats, information: Floats, informed: Flags) -> OneStep:
    """Newton step on the coordinates flagged as informed; the others stay where they are.

    Parameters
    ----------
    gradient, information
        (p,) and (p, p), the latter positive semi-definite.
    informed
        (p,) True for coordinates with information, whose diagonal entry is positive.
    """
    step, variance = np.full((2, gradient.size), np.nan)
    if not informed.any():
        return OneStep(step, variance, 0.0, 0)
    score, among = gradient[informed], information[np.ix_(informed, informed)]
    scale = 1.0 / np.sqrt(np.diagonal(among))
    values, vectors = np.linalg.eigh(among * np.outer(scale, scale))
    kept = values > _SINGULAR * values[-1]
    inverse = (vectors[:, kept] / values[kept]) @ vectors[:, kept].T * np.outer(scale, scale)
    determined = (vectors[:, ~kept] ** 2).sum(axis=1) <= _UNDETERMINED
    step[informed] = np.where(determined, inverse @ score, np.nan)
    variance[informed] = np.where(determined, np.diagonal(inverse), np.nan)
    return OneStep(step, variance, float(score @ inverse @ score), int(kept.sum()))
