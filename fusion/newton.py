"""Sums of a log-likelihood and its derivatives, and the Newton method that fits a model from them.

A site's sums add to the consortium's, so that fitting them is fitting the pooled rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MAX_ROUNDS = 25
# Squared Newton decrement, per patient: below it the next step moves no coefficient by 1e-9.
TOLERANCE = 1e-18


class ConvergenceError(ArithmeticError):
    """A fit that did not converge: separated data without ridge, or sums that are no Cox sums."""


@dataclass(frozen=True)
class LikelihoodSums:
    """Partial log-likelihood of some patients with its derivatives at one coefficient vector.

    Attributes
    ----------
    log_likelihood
        Efron partial log-likelihood, summed over the strata.
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


@dataclass
class NewtonFit:
    """One penalised fit, advanced by the sums that sites send at :attr:`candidate`.

    It maximises the mean log-likelihood less ``ridge / 2`` times the squared norm of the
    coefficients. A step that does not improve the objective is halved.

    Attributes
    ----------
    ridge
        Penalty per patient; 0 for none.
    candidate
        (p,) where the next sums are needed; the solution once :attr:`converged`.
    covariance
        (p, p) inverse of the penalised information at the solution, of all patients together.
    rounds
        How many sums were used.
    """

    n_inputs: int
    ridge: float = 0.0
    candidate: Floats = field(default_factory=lambda: np.zeros(0))
    accepted: Floats | None = None
    objective: float = -np.inf
    step: Floats = field(default_factory=lambda: np.zeros(0))
    covariance: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    rounds: int = 0
    n_patients: int = 0
    n_events: int = 0
    converged: bool = False

    def __post_init__(self) -> None:
        if self.candidate.size == 0:
            self.candidate = np.zeros(self.n_inputs)

    def restart(self) -> None:
        """Keep the coefficients, forget the objective: other patients now stand behind it."""
        if self.accepted is not None:
            self.candidate = self.accepted
        self.accepted, self.objective, self.converged = None, -np.inf, False

    def advance(self, sums: LikelihoodSums) -> None:
        """Take the sums at :attr:`candidate`: accept it and step on, or halve the step.

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
        objective, gradient, information = self._penalised(sums)
        finite = np.isfinite(objective) and np.isfinite(information).all()
        if not finite or objective < self.objective - 1e-12 * abs(objective):
            self._halve()
            return
        self.accepted, self.objective = self.candidate, objective
        self.n_patients, self.n_events = sums.n_patients, sums.n_events
        inverse = _inverse(information)
        self.step = inverse @ gradient
        self.covariance = inverse / sums.n_patients
        if float(gradient @ self.step) <= TOLERANCE:
            self.converged = True
        else:
            self.candidate = self.accepted + self.step

    def _penalised(self, sums: LikelihoodSums) -> tuple[float, Floats, Floats]:
        n = sums.n_patients
        if n == 0 or sums.n_events == 0:
            raise ConvergenceError("Newton fit: found no events, needed at least one")
        at = self.candidate
        return (
            sums.log_likelihood / n - 0.5 * self.ridge * float(at @ at),
            sums.gradient / n - self.ridge * at,
            sums.information / n + self.ridge * np.eye(self.n_inputs),
        )

    def _halve(self) -> None:
        if self.accepted is None:
            raise ConvergenceError("Newton fit: the log-likelihood at the start is not finite")
        self.step = self.step / 2
        if float(np.abs(self.step).max()) < 1e-12:
            # No smaller step helps: the objective is flat to rounding here.
            self.candidate, self.converged = self.accepted, True
        else:
            self.candidate = self.accepted + self.step


def _inverse(information: Floats) -> Floats:
    # Rounding hides an exact singularity from a solver: look at the spectrum instead.
    values, vectors = np.linalg.eigh(information)
    if not values[0] > 1e-13 * values[-1]:
        raise ConvergenceError(
            "Newton fit: the information matrix is singular; raise the ridge or drop an input"
        )
    return np.asarray((vectors / values) @ vectors.T)
