"""Rounds to the optimum of one objective: Newton's method from sums, and FedAvg.

Both fit the same ridge Cox model, stratified by site, to the same simulated rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fusion.averaging import AveragedFit, LocalSteps, local_update
from fusion.newton import NewtonFit
from fusion.survival import cox_sums, fit_cox

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.averaging import WeightsUpdate

    Floats = NDArray[np.float64]

# Shares of the gap in the objective between no effect at all and the optimum.
TOLERANCES: Final = (1e-2, 1e-3, 1e-6)
MAX_ROUNDS: Final = 200
LEARNING_RATES: Final = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
LOCAL_EPOCHS: Final = (1, 5)
_RIDGE: Final = 0.01
_CORRELATION: Final = 0.7
_SITE_EFFECT_SD: Final = 0.3


@dataclass(frozen=True)
class Rows:
    """One site's rows: ``inputs`` (n, p), ``event`` (n,), ``time`` (n,)."""

    inputs: Floats
    event: NDArray[np.bool_]
    time: Floats


def simulate(n_sites: int, n_patients: int, *, n_inputs: int, seed: int) -> list[Rows]:
    """Draw sites with correlated inputs, and effects that differ a little between sites."""
    rng = np.random.default_rng(seed)
    distance = np.abs(np.subtract.outer(np.arange(n_inputs), np.arange(n_inputs)))
    root = np.linalg.cholesky(_CORRELATION**distance)
    effects = rng.normal(0, 0.5, n_inputs)
    sites = []
    for _ in range(n_sites):
        x = rng.normal(size=(n_patients, n_inputs)) @ root.T
        own = effects + rng.normal(0, _SITE_EFFECT_SD, n_inputs)
        days = 1000 * rng.exponential(np.exp(-(x @ own))) + 1
        censored = rng.uniform(200, 4000, n_patients)
        sites.append(Rows(x, days <= censored, np.minimum(days, censored)))
    return sites


def objective(sites: Sequence[Rows], coefficients: Floats) -> float:
    """Mean log-likelihood of all patients less the ridge's penalty; higher is better."""
    sums = [cox_sums(s.inputs, s.event, s.time, coefficients) for s in sites]
    n = sum(s.n_patients for s in sums)
    penalty = 0.5 * _RIDGE * float(coefficients @ coefficients)
    return sum(s.log_likelihood for s in sums) / n - penalty


def newton(sites: Sequence[Rows]) -> Iterator[Floats]:
    """Coefficients after each round of Newton's method."""
    fit = NewtonFit(n_inputs=sites[0].inputs.shape[1], ridge=_RIDGE)
    while not fit.converged:
        parts = [cox_sums(s.inputs, s.event, s.time, fit.candidate) for s in sites]
        total = parts[0]
        for part in parts[1:]:
            total += part
        fit.advance(total)
        yield fit.candidate


def fedavg(sites: Sequence[Rows], steps: LocalSteps) -> Iterator[Floats]:
    """Coefficients after each round of FedAvg: full-batch steps at a site, then the mean.

    With one step a round goes along the gradient of the consortium's objective.
    """
    fit = AveragedFit(
        np.zeros(sites[0].inputs.shape[1]), max_rounds=MAX_ROUNDS + 1, patience=MAX_ROUNDS + 1
    )
    while True:
        fit.advance([_update(site, fit.candidate, steps) for site in sites])
        yield fit.candidate


def _update(site: Rows, weights: Floats, steps: LocalSteps) -> WeightsUpdate:
    n, n_events = len(site.time), int(site.event.sum())

    def loss_gradient(at: Floats) -> tuple[float, Floats]:
        sums = cox_sums(site.inputs, site.event, site.time, at)
        loss = -sums.log_likelihood + 0.5 * n * _RIDGE * float(at @ at)
        return loss / n_events, (n * _RIDGE * at - sums.gradient) / n_events

    return local_update(loss_gradient, weights, steps, n_patients=n, n_events=n_events)


def gaps(path: Iterator[Floats], sites: Sequence[Rows], *, best: float) -> list[float]:
    """Gap to the optimum after each round, as a share of that at no effect; 1 at the start.

    Ends at the tightest tolerance, after :data:`MAX_ROUNDS`, or where it is worse than no effect.
    """
    start = objective(sites, np.zeros(sites[0].inputs.shape[1]))
    found = [1.0]
    for coefficients in path:
        found.append((best - objective(sites, coefficients)) / (best - start))
        if not TOLERANCES[-1] < found[-1] < 1.0 or len(found) > MAX_ROUNDS:
            break
    return found


def rounds_to(found: Sequence[float], tolerance: float) -> int | None:
    """Count the rounds to a gap; None where it was not reached."""
    return next((i for i, gap in enumerate(found) if gap <= tolerance), None)


def rounds_against_fedavg(
    *, seed: int, n_sites: int = 10, n_patients: int = 200, n_inputs: int = 10
) -> dict[str, Any]:
    """Count the rounds of both to each of :data:`TOLERANCES`, FedAvg at its best step size."""
    sites = simulate(n_sites, n_patients, n_inputs=n_inputs, seed=seed)
    pooled = fit_cox(
        np.concatenate([s.inputs for s in sites]),
        np.concatenate([s.event for s in sites]),
        np.concatenate([s.time for s in sites]),
        strata=np.repeat(np.arange(n_sites), n_patients),
        ridge=_RIDGE,
    )
    best = objective(sites, pooled.candidate)
    by_newton = gaps(newton(sites), sites, best=best)
    return {
        "sites": n_sites,
        "patients_at_a_site": n_patients,
        "inputs": n_inputs,
        "most_rounds": MAX_ROUNDS,
        "newton": {f"{x:g}": rounds_to(by_newton, x) for x in TOLERANCES},
        "fedavg": {
            f"{epochs} local epochs": _at_best_rate(sites, epochs=epochs, best=best)
            for epochs in LOCAL_EPOCHS
        },
    }


def _at_best_rate(sites: Sequence[Rows], *, epochs: int, best: float) -> dict[str, Any]:
    """Fewest rounds over the step sizes, for each tolerance with the step size that suits it."""
    by_rate = {
        rate: gaps(fedavg(sites, LocalSteps(epochs, rate)), sites, best=best)
        for rate in LEARNING_RATES
    }
    return {f"{tolerance:g}": _fewest(by_rate, tolerance) for tolerance in TOLERANCES} | {
        "smallest_gap": min(min(found) for found in by_rate.values())
    }


def _fewest(by_rate: Mapping[float, Sequence[float]], tolerance: float) -> dict[str, Any]:
    rounds = {rate: rounds_to(found, tolerance) for rate, found in by_rate.items()}
    reached = {rate: n for rate, n in rounds.items() if n is not None}
    rate = min(reached, key=lambda x: (reached[x], x), default=None)
    return {"rounds": None if rate is None else reached[rate], "learning_rate": rate}
