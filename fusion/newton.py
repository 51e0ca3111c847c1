"""Sums of a log-likelihood and its derivatives, and the Newton method that fits a model from them.

A site's sums add to the consortium's, so that fitting them is fitting the pooled rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]

MAX_ROUNDS = 25
# What the model still promises, per patient: below it the next step moves no coefficient by 1e-9.
TOLERANCE = 1e-18
# A candidate keeps this share of the rise that its slope promised, or the step is shortened, to
# this share of itself at the least.
_LEAST_SHARE = 0.1
_MAX_SWEEPS = 1000
_SINGULAR = "Newton fit: the information matrix is singular; raise the ridge or drop an input"


class ConvergenceError(ArithmeticError):
    """A fit that did not converge: separated data without ridge, or sums that are no such sums."""


@dataclass(frozen=True)
class LikelihoodSums:
    """Log-likelihood of some patients with its derivatives at one coefficient vector.

    Attributes
    ----------
    log_likelihood
        Summed over the patients (Cox: over the strata's partial likelihoods).
    gradient
        (p,) its gradient.
    information
        (p, p) its negative Hessian, positive semi-definite.
    n_patients, n_events
        How many patients and observed events stand behind the sums.
    """

    log_likelihood: float
    gradient: Floats
    information: Floats
    n_patients: int
    n_events: int

    def __add__(self, other: LikelihoodSums) -> LikelihoodSums:
        return LikelihoodSums(
            self.log_likelihood + other.log_likelihood,
            self.gradient + other.gradient,
            self.information + other.information,
            self.n_patients + other.n_patients,
            self.n_events + other.n_events,
        )


@dataclass(frozen=True)
class _Point:
    """Penalised mean log-likelihood at some coefficients, and derivatives of its smooth part."""

    at: Floats  # (p,) coefficients
    away: Floats  # (p,) the same, less the centre
    objective: float
    gradient: Floats
    information: Floats

    @property
    def is_finite(self) -> bool:
        values = (self.objective, self.gradient, self.information)
        return all(bool(np.isfinite(x).all()) for x in values)


@dataclass
class NewtonFit:
    r"""One penalised fit, advanced by the sums that sites send at :attr:`candidate`.

    It maximises the mean log-likelihood less
    :math:`\sum_j \lambda_j d_j^2 / 2 + \mu_j |d_j|`, where :math:`d` is the distance of the
    coefficients from ``centre``.

    Attributes
    ----------
    ridge, l1
        Penalties per patient :math:`\lambda` and :math:`\mu`, of each coefficient or (p,); 0 for
        none.
    centre
        (p,) coefficients that the penalties pull toward; zeros where None.
    start
        (p,) where to begin; the centre where None.
    candidate
        (p,) where the next sums are needed; the solution once :attr:`converged`.
    accepted
        (p,) coefficients of the best sums so far; None before the first.
    objective
        Penalised mean log-likelihood there.
    covariance
        (p, p) inverse of the penalised information at the solution, of all patients together; zero
        for coefficients that the L1 penalty holds at the centre and for inputs that never vary.
    rounds
        How many sums were used.

    Raises
    ------
    ValueError
        If a penalty is negative or not finite, or a vector is not (p,).

    Notes
    -----
    Each accepted point gives a quadratic model of the smooth part, whose maximum less the L1 part
    is the next candidate: proximal Newton [1]_. Without L1 the step is bent by the change of the
    information along the step before, Chebyshev's correction [2]_, which saves rounds where the
    curvature falls as the fit improves. A candidate that falls short is drawn back to the maximum
    of the cubic through values and slopes at both ends [3]_. An input with neither slope nor
    curvature, as of a modality that nobody has, stays where it is.

    References
    ----------
    .. [1] Lee JD, Sun Y, Saunders MA. Proximal Newton-type methods for minimizing composite
       functions. SIAM Journal on Optimization 2014;24:1420-1443.
    .. [2] Gutiérrez JM, Hernández MA. A family of Chebyshev-Halley type methods in Banach spaces.
       Bulletin of the Australian Mathematical Society 1997;55:113-130.
    .. [3] Nocedal J, Wright SJ. Numerical Optimization, 2nd ed. Springer 2006, equation 3.59.
    """

    n_inputs: int
    ridge: float | Floats = 0.0
    l1: float | Floats = 0.0
    centre: Floats | None = None
    start: Floats | None = None
    candidate: Floats = field(default_factory=lambda: np.zeros(0))
    accepted: Floats | None = None
    objective: float = -np.inf
    step: Floats = field(default_factory=lambda: np.zeros(0))
    covariance: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    rounds: int = 0
    n_patients: int = 0
    n_events: int = 0
    converged: bool = False
    _here: _Point | None = None

    def __post_init__(self) -> None:
        p = self.n_inputs
        self._ridge, self._l1 = _penalty("ridge", self.ridge, p), _penalty("l1", self.l1, p)
        self._centre = _vector("centre", np.zeros(p) if self.centre is None else self.centre, p)
        if self.candidate.size == 0:
            start = self._centre if self.start is None else self.start
            self.candidate = _vector("start", start, p)

    def restart(self) -> None:
        """Keep the coefficients, forget the objective: other patients now stand behind it."""
        if self.accepted is not None:
            self.candidate = self.accepted
        self.accepted, self.objective, self.converged = None, -np.inf, False
        self._here = None

    def advance(self, sums: LikelihoodSums) -> None:
        """Take the sums at :attr:`candidate`: accept it and step on, or shorten the step.

        Raises
        ------
        ConvergenceError
            If the sums are not finite, the information is singular, or rounds run out.
        """
        self.rounds += 1
        if self.rounds > MAX_ROUNDS:
            raise ConvergenceError(
                f"Newton fit: no convergence in {MAX_ROUNDS} rounds; raise the ridge"
            )
        point = self._penalised(sums)
        if self._here is not None and not self._improves(self._here, point):
            self._shorten(self._here, point)
        elif not point.is_finite:
            raise ConvergenceError("Newton fit: the log-likelihood at the start is not finite")
        else:
            self.n_patients, self.n_events = sums.n_patients, sums.n_events
            self._accept(point)

    def _penalised(self, sums: LikelihoodSums) -> _Point:
        n = sums.n_patients
        if n == 0 or sums.n_events == 0:
            raise ConvergenceError("Newton fit: found no events, needed at least one")
        away = self.candidate - self._centre
        penalty = 0.5 * self._ridge @ away**2 + self._l1 @ np.abs(away)
        return _Point(
            self.candidate,
            away,
            sums.log_likelihood / n - float(penalty),
            sums.gradient / n - self._ridge * away,
            sums.information / n + np.diag(self._ridge),
        )

    def _improves(self, here: _Point, point: _Point) -> bool:
        needed = _LEAST_SHARE * self._rise(here, self.step) - 1e-12 * abs(here.objective)
        return point.is_finite and point.objective - here.objective >= needed

    def _rise(self, here: _Point, step: Floats) -> float:
        """Say what a step promises to first order."""
        lasso = self._l1 @ (np.abs(here.away + step) - np.abs(here.away))
        return float(here.gradient @ step - lasso)

    def _accept(self, point: _Point) -> None:
        self.accepted, self.objective = self.candidate, point.objective
        step, inverse = _model_maximum(point, self._l1)
        self.covariance = inverse / self.n_patients
        before, self._here = self._here, point
        # Where the likelihood rises for ever, it promises little for a long step.
        is_near = np.abs(step).max() <= 1e-3 * (1.0 + np.abs(self.candidate).max())
        if is_near and self._rise(point, step) <= TOLERANCE:
            self.converged = True
            return
        self.step = step
        if before is not None and not self._l1.any():
            self.step = step + _bend(before, point, step, inverse)
        self.candidate = point.at + self.step

    def _shorten(self, here: _Point, point: _Point) -> None:
        share = _LEAST_SHARE
        if point.is_finite:
            slope = float((point.gradient - self._l1 * np.sign(point.away)) @ self.step)
            rise = self._rise(here, self.step)
            share = _cubic_maximum(rise, point.objective - here.objective, slope)
        self.step = share * self.step
        # Where no smaller step helps, the objective is flat to rounding.
        self.converged = float(np.abs(self.step).max()) < 1e-12
        self.candidate = here.at if self.converged else here.at + self.step


def _vector(name: str, value: ArrayLike, p: int) -> Floats:
    vector = np.asarray(value, dtype=np.float64)
    if vector.shape != (p,) or not np.isfinite(vector).all():
        raise ValueError(f"{name}: found shape {vector.shape}, needed ({p},), all finite")
    return vector


def _penalty(name: str, value: ArrayLike, p: int) -> Floats:
    strength = np.asarray(value, dtype=np.float64)
    vector = _vector(name, np.full(p, strength) if strength.ndim == 0 else strength, p)
    if (vector < 0).any():
        raise ValueError(f"{name}: found a negative penalty, needed 0 or more")
    return vector


def _cubic_maximum(slope_here: float, gained: float, slope_there: float) -> float:
    """Share of a step at which the cubic through both ends is largest, between 0.1 and 0.9."""
    bend = slope_here + slope_there - 3.0 * gained
    root = math.sqrt(max(bend * bend - slope_here * slope_there, 0.0))
    share = 1.0 - (slope_there - root - bend) / (slope_there - slope_here - 2.0 * root)
    # In this order a share that is not a number becomes the least.
    return min(max(_LEAST_SHARE, share), 1.0 - _LEAST_SHARE)


def _bend(before: _Point, point: _Point, step: Floats, inverse: Floats) -> Floats:
    """Chebyshev's correction of a Newton step, at most half as long in the information's norm."""
    move = point.away - before.away
    pulled = point.information @ move
    along = float(pulled @ step) / max(float(pulled @ move), np.finfo(float).tiny)
    shift = 0.5 * along * inverse @ ((before.information - point.information) @ step)
    size = float(np.sqrt(shift @ point.information @ shift))
    most = 0.5 * float(np.sqrt(step @ point.information @ step))
    return np.asarray(shift if size <= most else shift * (most / size))


def _model_maximum(point: _Point, l1: Floats) -> tuple[Floats, Floats]:
    """Step to the maximum of the model at a point, and the (p, p) inverse on what it moves."""
    curvature = np.diag(point.information)
    idle = (curvature <= 1e-24 * curvature.max()) & (np.abs(point.gradient) <= 1e-12)
    if not (curvature[~idle] > 0).all():
        raise ConvergenceError(_SINGULAR)
    if not l1.any():
        inverse = _inverse(point.information, ~idle)
        return inverse @ point.gradient, inverse
    away = _shrunk(point, l1, idle)
    return away - point.away, _inverse(point.information, ~idle & ((away != 0) | (l1 == 0)))


def _shrunk(point: _Point, l1: Floats, idle: Bools) -> Floats:
    """Distance from the centre at the model's maximum, by coordinate descent."""
    information, curvature = point.information, np.diag(point.information)
    away = np.where(idle & (l1 > 0), 0.0, point.away)
    slope = point.gradient - information @ (away - point.away)
    for _ in range(_MAX_SWEEPS):
        for j in np.flatnonzero(~idle):
            free = slope[j] + curvature[j] * away[j]
            change = np.sign(free) * max(abs(free) - l1[j], 0.0) / curvature[j] - away[j]
            if change != 0.0:
                slope -= information[:, j] * change
                away[j] += change
        exact = _exact_on_support(point, away, l1, idle)
        if exact is not None:
            return exact
    return away


def _exact_on_support(point: _Point, away: Floats, l1: Floats, idle: Bools) -> Floats | None:
    """Solve for the coefficients that are not at the centre; None unless all others may stay."""
    on = ~idle & ((away != 0) | (l1 == 0))
    pull = point.gradient + point.information @ point.away - l1 * np.sign(away)
    exact = np.where(on, 0.0, away)
    try:
        exact[on] = np.linalg.solve(point.information[np.ix_(on, on)], pull[on])
    except np.linalg.LinAlgError:
        return None
    slope = point.gradient - point.information @ (exact - point.away)
    same_side = (np.sign(exact) == np.sign(away)) | (l1 == 0)
    may_stay = np.abs(slope) <= l1 * (1.0 + 1e-12) + 1e-15
    return exact if (same_side & (on | idle | may_stay)).all() else None


def _inverse(information: Floats, kept: Bools) -> Floats:
    """Inverse of the kept rows and columns, zero elsewhere."""
    inverse = np.zeros_like(information)
    if kept.any():
        block = np.ix_(kept, kept)
        scale = np.sqrt(np.diag(information)[kept])
        # Rounding hides an exact singularity from a solver: look at the spectrum instead, of a
        # matrix that does not depend on the inputs' units.
        values, vectors = np.linalg.eigh(information[block] / np.outer(scale, scale))
        if not values[0] > 1e-13 * values[-1]:
            raise ConvergenceError(_SINGULAR)
        root = vectors / scale[:, None] / np.sqrt(values)
        inverse[block] = root @ root.T
    return inverse
