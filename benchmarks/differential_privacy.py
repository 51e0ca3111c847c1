"""What noise costs: concordance of a fusion model fitted from noisy sums, against one without.

Each seed draws the patients of five sites and new ones, fits a Cox model stratified by site to the
former, and the same inputs from noisy sums within each budget, and compares both on the latter.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from cross_validation import Figures, run, whole

from fusion.differential_privacy import Budget, PrivacyLedger, noise_multiplier
from fusion.evaluation import concordance_index, pair_counts
from fusion.federation import private_fitting as private
from fusion.federation.plan import PROTOCOL
from fusion.federation.rows import Outcome
from fusion.survival import fit_cox

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

EPSILONS = (10.0, 3.0, 1.0, 0.5)
DELTA = 1e-5
EDGES_DAYS = (365.0, 730.0, 1095.0, 1825.0, 2500.0)
_NEW_PATIENTS = 2000
_RIDGE = 0.01
_CORRELATION = 0.3
# With several fits in a study, each has a share of the budget.
_OTHER_FITS = ("encoder_1", "encoder_2")


@dataclass(frozen=True)
class Rows:
    """One site's rows: ``inputs`` (n, p) and their outcome."""

    inputs: Floats
    outcome: Outcome


def simulate(n_sites: int, n_patients: int, *, n_inputs: int, seed: int) -> tuple[list[Rows], Rows]:
    """Draw patients of some sites, all together ``n_patients``, and new ones of a further site.

    Inputs go together somewhat; the log hazard has standard deviation 1.
    """
    rng = np.random.default_rng(seed)
    together = np.full((n_inputs, n_inputs), _CORRELATION) + (1 - _CORRELATION) * np.eye(n_inputs)
    effects = rng.normal(size=n_inputs)
    effects /= np.sqrt(effects @ together @ effects)
    sizes = [len(x) for x in np.array_split(np.arange(n_patients), n_sites)]

    def rows(n: int) -> Rows:
        x = rng.multivariate_normal(np.zeros(n_inputs), together, n)
        level = rng.normal(0, 0.4)
        days = 1000 * (rng.exponential(size=n) * np.exp(-level - x @ effects)) ** (1 / 1.2) + 1
        censored = rng.uniform(300, 2500, n)
        return Rows(x, Outcome(days <= censored, np.minimum(days, censored)))

    return [rows(n) for n in sizes], rows(_NEW_PATIENTS)


def fit_noisily(
    sites: Sequence[Rows], plan: private.Schedule
) -> tuple[private.PrivateFit, list[float]]:
    """Fit from noisy sums, and give what each site's ledger then says was spent."""
    budget = plan.budget
    ledgers = [PrivacyLedger(None, epsilon=budget.epsilon, delta=budget.delta) for _ in sites]
    ends = [
        private.SitePrivacy(
            plan, ledger, label=("benchmark",), outcome=site.outcome, edges_days=EDGES_DAYS
        )
        for site, ledger in zip(sites, ledgers, strict=True)
    ]
    n_events, n = sum(end.opening() for end in ends), sum(len(s.outcome) for s in sites)
    scaled = [_standardised(site.inputs) for site in sites]

    def ask(number: int, at: Mapping[str, Floats]) -> dict[str, private.Stepped]:
        gradients = [
            end.step(PROTOCOL, number, at[PROTOCOL], inputs=x, outcome=site.outcome)
            for end, x, site in zip(ends, scaled, sites, strict=True)
        ]
        return {PROTOCOL: private.Stepped(sum(gradients), n, n_events, len(sites))}

    fit = private.PrivateFit(sites[0].inputs.shape[1], ridge=_RIDGE)
    private.fit_privately(ask, {PROTOCOL: fit}, plan)
    for end, x in zip(ends, scaled, strict=True):
        end.intervals(fit.coefficients, x)
    return fit, [ledger.spent() for ledger in ledgers]


def _standardised(inputs: Floats) -> Floats:
    mean, scale = private.own_scaling(inputs)
    return np.asarray((inputs - mean) / scale)


def one_seed(arguments: argparse.Namespace, seed: int) -> dict[str, float]:
    """Concordance on new patients without noise, and what each budget loses of it."""
    sites, new = simulate(arguments.sites, arguments.patients, n_inputs=arguments.inputs, seed=seed)
    fit = fit_cox(
        np.vstack([_standardised(s.inputs) for s in sites]),
        np.concatenate([s.outcome.event for s in sites]),
        np.concatenate([s.outcome.time for s in sites]),
        strata=np.repeat(np.arange(len(sites)), [len(s.outcome) for s in sites]),
        ridge=_RIDGE,
    )
    found = {"without_noise": _concordance(new, fit.candidate)}
    for epsilon in EPSILONS:
        budget = Budget(epsilon=epsilon, delta=DELTA, clip_norm=arguments.clip_norm)
        for name, fits in (("", ()), ("_of_three_fits", _OTHER_FITS)):
            plan = private.schedule(budget, (PROTOCOL, *fits))
            noisy, spent = fit_noisily(sites, plan)
            found[f"{epsilon:g}{name}"] = found["without_noise"] - _concordance(
                new, noisy.coefficients
            )
            assert max(spent) <= epsilon
    for epsilon in (x for x in EPSILONS if x <= private.ONE_SHOT_EPSILON):
        budget = Budget(epsilon=epsilon, delta=DELTA, clip_norm=arguments.clip_norm)
        noisy, _ = fit_noisily(sites, private.schedule(budget, (PROTOCOL,), steps=4))
        found[f"{epsilon:g}_four_steps"] = found["without_noise"] - _concordance(
            new, noisy.coefficients
        )
    return found


def _concordance(new: Rows, coefficients: Floats) -> float:
    scores = new.inputs @ coefficients
    return concordance_index(pair_counts(scores, new.outcome.event, new.outcome.time)).value


def study(arguments: argparse.Namespace) -> Figures:
    """Run all seeds and summarise them."""
    seeds = [one_seed(arguments, seed) for seed in range(arguments.seeds)]
    losses = [name for name in seeds[0] if name != "without_noise"]
    return {
        "benchmark": "differential_privacy",
        "sites": arguments.sites,
        "patients": arguments.patients,
        "inputs": arguments.inputs,
        "clip_norm": arguments.clip_norm,
        "delta": DELTA,
        "without_noise": _summary([x["without_noise"] for x in seeds]),
        "loss_by_epsilon": {name: _summary([x[name] for x in seeds]) for name in losses},
        "steps": {f"{x:g}": private.n_steps(x) for x in EPSILONS},
        "noise_multiplier_of_one_release": {
            f"{x:g}": round(noise_multiplier(x, DELTA), 4) for x in EPSILONS
        },
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    low, median, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"median": round(median, 4), "p10": round(low, 4), "p90": round(high, 4)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = argparse.ArgumentParser(description="Concordance lost to noise, by epsilon.")
    parser.add_argument("--sites", type=whole(1), default=5, help="that train")
    parser.add_argument("--patients", type=whole(50), default=500, help="of all sites together")
    parser.add_argument("--inputs", type=whole(1), default=4, help="of the fusion model")
    parser.add_argument("--clip-norm", type=float, default=2.0, help="of a patient's gradient")
    parser.add_argument("--seeds", type=whole(1), default=20, help="of the patients, not of noise")
    parser.add_argument("--json", action="store_true", help="the only form there is")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
