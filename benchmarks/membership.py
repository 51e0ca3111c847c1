"""What encoders and the fusion model tell of who was trained on, by kind and number of patients.

Prints one JSON object. Rows are simulated: ten columns of which four matter, or bags of about ten
tiles. Hyperparameters are a study's defaults, chosen on all rows as a site chooses them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from threadpoolctl import threadpool_limits

from fusion.encoder_spec import EncoderSpec
from fusion.federation import AveragingPlan
from fusion.late import CoxFusion
from fusion.membership import Effort, audit, encoder_fit, fusion_fit, shared_fit
from fusion.shared_networks import initial_weights
from fusion.training import cross_fit, fit_encoder

if TYPE_CHECKING:
    from fusion.encoder_inputs import Bags, Floats
    from fusion.membership import Fit

N_INPUTS: Final = 10
EDGES_DAYS: Final = (365.0, 730.0, 1095.0)
SPECS: Final = {
    "linear": EncoderSpec(),
    "mlp": EncoderSpec(model="mlp"),
    "gated_attention": EncoderSpec(model="gated_attention", n_components=8, hidden=16),
}


class Patients:
    """Simulated patients: (n, 10) ``table``, ``bags`` around it, ``event``, ``time`` in days."""

    def __init__(self, n: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.table: Floats = rng.normal(size=(n, N_INPUTS))
        self.bags: Bags = [
            row + rng.normal(size=(int(rng.integers(8, 13)), N_INPUTS)) for row in self.table
        ]
        hazard = np.exp(self.table[:, :4] @ np.array([0.8, -0.6, 0.5, 0.4]))
        days, censored = 1000 * rng.exponential(1 / hazard), rng.exponential(1500, n)
        self.event = days <= censored
        self.time = np.ceil(np.minimum(days, censored))

    def local(self, model: str, seed: int) -> Fit:
        """Training at the site, with the hyperparameters that the site chooses on all rows."""
        inputs, spec = self._read(model)
        encoder = fit_encoder(inputs, self.event, self.time, spec, seed=seed)
        return encoder_fit(
            inputs, self.event, self.time, encoder.chosen, n_steps=encoder.n_steps, seed=seed
        )

    def shared(self, model: str, seed: int) -> Fit:
        """Training by averaging weights, as a consortium of one."""
        inputs, spec = self._read(model)
        plan = AveragingPlan(
            initial_weights(spec, N_INPUTS, seed=seed),
            rounds=spec.rounds,
            local_steps=spec.local_steps,
            learning_rate=spec.local_learning_rate,
        )
        return shared_fit(inputs, self.event, self.time, spec, plan)

    def fusion(self, seed: int) -> Fit:
        """Fusion of the linear encoders of two halves of the columns."""
        folds = np.arange(len(self.time)) % 5
        columns = np.column_stack(
            [
                cross_fit(
                    self.table[:, part], self.event, self.time, folds, SPECS["linear"], seed=seed
                ).out_of_fold
                for part in (slice(0, 5), slice(5, 10))
            ]
        )
        return fusion_fit(
            columns,
            self.event,
            self.time,
            lambda: CoxFusion(modalities=("a", "b"), edges_days=EDGES_DAYS),
        )

    def _read(self, model: str) -> tuple[Any, EncoderSpec]:
        return (self.bags if SPECS[model].reads_tiles else self.table), SPECS[model]


def figures(patients: Patients, effort: Effort, seed: int) -> dict[str, Any]:
    """Audit each kind of model, and count the seconds that it takes."""
    targets = {
        **{f"{model}, local": patients.local(model, seed) for model in SPECS},
        **{f"{model}, weights": patients.shared(model, seed) for model in SPECS},
        "fusion": patients.fusion(seed),
    }
    found = {}
    for name, fit in targets.items():
        began = perf_counter()
        result = audit(fit, patients.event, patients.time, name=name, seed=seed, effort=effort)
        found[name] = {
            **{k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(result).items()},
            "passes": result.passes,
            "seconds": round(perf_counter() - began, 1),
        }
    return found


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", default="100,400")
    parser.add_argument("--models", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with threadpool_limits(limits=1):
        by_patients = {
            n: figures(Patients(int(n), given.seed), Effort(given.models), given.seed)
            for n in given.patients.split(",")
        }
    print(json.dumps(by_patients, indent=1))


if __name__ == "__main__":
    main()
