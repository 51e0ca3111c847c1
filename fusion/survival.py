"""Survival likelihoods as sums over patients, and fits of rows in one place by the same sums.

Everything a site computes here is a sum over its own patients; everything the coordinator computes
needs only such sums. Fitting pooled rows and fitting summed statistics is the same arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusion.newton import LikelihoodSums, NewtonFit

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Bools = NDArray[np.bool_]


def check_outcome(event: ArrayLike, time: ArrayLike) -> tuple[Bools, Floats]:
    """Return event and time as arrays, or say what is wrong with them.

    Parameters
    ----------
    event
        (n,) True where the event was observed.
    time
        (n,) days from the landmark, positive and finite.

    Raises
    ------
    ValueError
        If the shapes differ, or a time is not finite and positive.
    """
    events = np.asarray(event, dtype=bool)
    times = np.asarray(time, dtype=np.float64)
    if events.ndim != 1 or events.shape != times.shape:
        raise ValueError(
            f"event and time: found shapes {events.shape} and {times.shape}, needed one (n,)"
        )
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise ValueError("time: found a value that is not finite and positive, needed days > 0")
    return events, times


def cox_sums(
    inputs: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    coefficients: ArrayLike,
    *,
    strata: ArrayLike | None = None,
) -> LikelihoodSums:
    r"""Efron partial log-likelihood, gradient and information of a (stratified) Cox model.

    Parameters
    ----------
    inputs
        (n, p) covariates, finite.
    event, time
        (n,) outcome, as in :func:`check_outcome`.
    coefficients
        (p,) log hazard ratios at which to evaluate.
    strata
        (n,) labels; risk sets never span two labels. None puts all patients into one stratum.

    Notes
    -----
    With :math:`d` events tied at a time, the :math:`l`-th of them sees the risk set's sums less
    :math:`l/d` of the tied events' sums [1]_. The information is
    :math:`X^\top \mathrm{diag}(w a) X - Z^\top Z`, where :math:`w_i = \exp(x_i^\top\beta)`,
    :math:`a_i` sums :math:`1/\phi` over the events that had patient :math:`i` at risk, and the rows
    of :math:`Z` are the weighted mean covariates at each event: no (n, p, p) array is built.

    References
    ----------
    .. [1] Efron B. The efficiency of Cox's likelihood function for censored data. JASA 1977;72:
       557-565.
    """
    x = np.asarray(inputs, dtype=np.float64)
    events, times = check_outcome(event, time)
    beta = np.asarray(coefficients, dtype=np.float64)
    if x.shape != (len(times), len(beta)):
        raise ValueError(f"inputs: found shape {x.shape}, needed {(len(times), len(beta))}")
    if not np.isfinite(x).all():
        raise ValueError("inputs: found a value that is not finite, needed all finite")
    total = LikelihoodSums(0.0, np.zeros(len(beta)), np.zeros((len(beta), len(beta))), 0, 0)
    labels = np.zeros(len(times), dtype=int) if strata is None else np.asarray(strata)
    for label in np.unique(labels):
        rows = labels == label
        total += _stratum_sums(x[rows], events[rows], times[rows], beta)
    return total


def _stratum_sums(x: Floats, event: Bools, time: Floats, beta: Floats) -> LikelihoodSums:
    order = np.argsort(time, kind="stable")
    # Nor does adding a constant to an input change it; one that never varies is then exactly zero.
    x, event, time = x[order] - x[order[0]], event[order], time[order]
    log_hazard = x @ beta
    # Adding a constant to every log hazard leaves the partial likelihood as it is.
    shift = log_hazard.max(initial=-np.inf)
    n_events = int(event.sum())
    if n_events == 0:
        return LikelihoodSums(0.0, np.zeros(len(beta)), np.zeros((len(beta),) * 2), len(time), 0)
    # A weight that underflowed would leave a risk set empty. The floor only lowers the likelihood,
    # so that a step this far out is halved like any other that does not improve.
    weight = np.exp(np.maximum(log_hazard - shift, -600.0))  # (n,)
    event_time = time[event]
    tied_first = np.searchsorted(event_time, event_time, side="left")  # (d,)
    n_tied = np.searchsorted(event_time, event_time, side="right") - tied_first
    fraction = (np.arange(n_events) - tied_first) / n_tied  # l/d of each event
    at_risk_from = np.searchsorted(time, event_time, side="left")

    def _at_event(values: Floats) -> Floats:
        risk_set = np.cumsum(values[::-1], axis=0)[::-1][at_risk_from]
        tied = np.add.reduceat(values[event], np.unique(tied_first), axis=0)
        tied = np.repeat(tied, n_tied[np.unique(tied_first)], axis=0)
        share = fraction if values.ndim == 1 else fraction[:, None]
        return np.asarray(risk_set - share * tied)

    phi = _at_event(weight)  # (d,)
    mean_inputs = _at_event(weight[:, None] * x) / phi[:, None]  # (d, p)
    until = np.searchsorted(event_time, time, side="right")
    exposure = np.concatenate([[0.0], np.cumsum(1.0 / phi)])[until]  # (n,) a_i before the tie term
    tie_share = np.add.reduceat(fraction / phi, np.unique(tied_first))
    exposure[event] -= np.repeat(tie_share, n_tied[np.unique(tied_first)])
    expected = weight * exposure
    return LikelihoodSums(
        float(np.sum(log_hazard[event] - shift) - np.sum(np.log(phi))),
        np.asarray(x[event].sum(axis=0) - expected @ x),
        np.asarray((x * expected[:, None]).T @ x - mean_inputs.T @ mean_inputs),
        len(time),
        n_events,
    )


def fit_cox(
    inputs: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    *,
    strata: ArrayLike | None = None,
    ridge: float | Floats = 0.0,
    l1: float | Floats = 0.0,
    start: Floats | None = None,
) -> NewtonFit:
    """Fit a stratified, penalised Cox model to rows in one place (a site's own, or pooled).

    Parameters
    ----------
    inputs
        (n, p) covariates, scaled alike so that one penalty suits all.
    event, time, strata
        As in :func:`cox_sums`.
    ridge, l1
        Penalties per patient on the mean log-likelihood: half of ``ridge`` times the squared
        coefficients, and ``l1`` times the absolute ones; a number, or (p,).
    start
        (p,) coefficients to begin from.

    Raises
    ------
    fusion.newton.ConvergenceError
        If there is no event, or no finite maximum.
    """
    x = np.asarray(inputs, dtype=np.float64)
    fit = NewtonFit(n_inputs=x.shape[1], ridge=ridge, l1=l1, start=start)
    while not fit.converged:
        fit.advance(cox_sums(x, event, time, fit.candidate, strata=strata))
    return fit


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per column, over the values that are present.

    Merging by Chan's formula loses no digits when means are large, unlike a sum of squares.
    """

    n: Floats  # (p,)
    mean: Floats  # (p,)
    m2: Floats  # (p,)

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        share = np.divide(other.n, n, out=np.zeros_like(n), where=n > 0)
        delta = other.mean - self.mean
        return Moments(n, self.mean + delta * share, self.m2 + other.m2 + delta**2 * self.n * share)

    @property
    def scale(self) -> Floats:
        """(p,) standard deviation (ddof = 1); 1 for a column that does not vary."""
        variance = np.divide(self.m2, self.n - 1, out=np.zeros_like(self.m2), where=self.n > 1)
        scale = np.sqrt(variance)
        return np.where(scale > 1e-12 * np.maximum(1.0, np.abs(self.mean)), scale, 1.0)


def moments(columns: ArrayLike) -> Moments:
    """Moments of each column of an (n, p) array; NaN marks an absent value."""
    values = np.asarray(columns, dtype=np.float64)
    present = ~np.isnan(values)
    n = present.sum(axis=0).astype(np.float64)
    filled = np.where(present, values, 0.0)
    mean = np.divide(filled.sum(axis=0), n, out=np.zeros_like(n), where=n > 0)
    m2 = (np.where(present, values - mean, 0.0) ** 2).sum(axis=0)
    return Moments(n, mean, m2)


def interval_sums(
    log_hazard: ArrayLike, event: ArrayLike, time: ArrayLike, edges_days: ArrayLike
) -> tuple[Floats, Floats]:
    """Events and hazard-weighted person-time per interval, for a piecewise-exponential baseline.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse.
    event, time
        (n,) outcome; time beyond the last edge counts as censored there.
    edges_days
        (k,) increasing right ends of the intervals; the first begins at 0.

    Returns
    -------
    events
        (k,) observed events in each interval.
    exposure
        (k,) sum of ``exp(log_hazard)`` times days at risk in each interval.
    """
    events, times = check_outcome(event, time)
    right = np.asarray(edges_days, dtype=np.float64)
    left = np.concatenate([[0.0], right[:-1]])
    at_risk_days = np.clip(times[:, None] - left, 0.0, right - left)  # (n, k)
    exposure = np.exp(np.asarray(log_hazard, dtype=np.float64)) @ at_risk_days
    cell = np.searchsorted(right, times, side="left")
    inside = events & (cell < len(right))
    return np.bincount(cell[inside], minlength=len(right)).astype(np.float64), exposure


def cumulative_hazard(hazard_per_day: ArrayLike, edges_days: ArrayLike, times: ArrayLike) -> Floats:
    """Cumulative hazard of a piecewise-constant hazard at each of ``times`` (days).

    Beyond the last edge the last interval's hazard goes on.
    """
    right = np.asarray(edges_days, dtype=np.float64)
    left = np.concatenate([[0.0], right[:-1]])
    width = np.concatenate([right[:-1] - left[:-1], [np.inf]])
    days = np.clip(np.asarray(times, dtype=np.float64)[..., None] - left, 0.0, width)
    return np.asarray(days @ np.asarray(hazard_per_day, dtype=np.float64))
