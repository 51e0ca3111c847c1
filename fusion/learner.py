"""Networks on their way: prepared rows of one site, a linear start, and AdamW steps from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from fusion.cox_loss import cox_loss
from fusion.encoder_inputs import evenly
from fusion.encoders import patient_inputs
from fusion.networks import GatedAttention, LinearCox, build_network, pad_bags

if TYPE_CHECKING:
    from fusion.cox_loss import Outcome
    from fusion.encoder_inputs import Floats, Inputs
    from fusion.encoder_spec import EncoderSpec
    from fusion.encoders import Preparation
    from fusion.networks import Network

_CUDA_FROM_CELLS = 1 << 25


@dataclass(frozen=True, eq=False)
class TrainingRows:
    """Prepared inputs of n patients.

    Attributes
    ----------
    rows
        (n, k) float64, one row each: what the linear start reads.
    batch
        What the network reads: (rows,), or (tiles, mask) padded to the longest bag.
    """

    rows: torch.Tensor
    batch: tuple[torch.Tensor, ...]

    def at(self, rows: torch.Tensor) -> TrainingRows:
        """Return the rows of some patients."""
        chosen = rows.to(self.batch[0].device)
        return TrainingRows(self.rows[rows], tuple(part[chosen] for part in self.batch))


def training_rows(inputs: Inputs, preparation: Preparation, spec: EncoderSpec) -> TrainingRows:
    """Prepare the inputs of training patients for ``spec``'s model."""
    if spec.model != "gated_attention":
        rows = patient_inputs(preparation, inputs)
        return TrainingRows(rows, (rows.float() if spec.model == "mlp" else rows,))
    tiles = [preparation(np.asarray(bag)) for bag in inputs]
    padded, mask = pad_bags([evenly(bag.float(), spec.max_tiles) for bag in tiles])
    large = padded.numel() >= _CUDA_FROM_CELLS and torch.cuda.is_available()
    device = torch.device("cuda" if large else "cpu")
    return TrainingRows(
        torch.stack([bag.mean(dim=0) for bag in tiles]), (padded.to(device), mask.to(device))
    )


def predict(
    network: Network, batch: tuple[torch.Tensor, ...], dropout: torch.Generator | None
) -> torch.Tensor:
    """(n,) log hazard on the CPU, where the loss adds up in one order every time."""
    if isinstance(network, LinearCox):
        return network(*batch)
    predicted = network(*batch, dropout=dropout)
    return (predicted[0] if isinstance(network, GatedAttention) else predicted).cpu()


def _generator(seed: int, *path: int, device: torch.device | None = None) -> torch.Generator:
    state = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator(device or "cpu").manual_seed(int(state >> np.uint64(1)))


class Learner:
    """The networks of one encoder: all begin at the linear start and step over all rows at once.

    Parameters
    ----------
    data, survival
        Of the n patients to train on.
    spec
        With one ridge strength, and as many networks as its ``ensemble``.
    start
        (k,) coefficients of the ridge Cox model on ``data.rows``.
    seed
        Of weights and dropout.
    """

    def __init__(
        self, data: TrainingRows, survival: Outcome, spec: EncoderSpec, start: Floats, seed: int
    ) -> None:
        self.data, self.survival = data, survival
        self.members = tuple(
            _Member(data, spec, start, (seed, member)) for member in range(spec.ensemble)
        )

    @property
    def networks(self) -> tuple[Network, ...]:
        """The networks as they are now."""
        return tuple(one.network for one in self.members)

    def step(self) -> None:
        """Move every network by one AdamW step, each against a loss of its own."""
        for one in self.members:
            one.step(self.data, self.survival)

    @torch.no_grad()
    def log_hazard(self, data: TrainingRows) -> torch.Tensor:
        """(n,) mean log hazard of the networks, without dropout."""
        each = [predict(network, data.batch, None) for network in self.networks]
        return torch.stack(each).mean(dim=0)


class _Member:
    """One network with its optimiser and its stream of dropped units."""

    def __init__(
        self, data: TrainingRows, spec: EncoderSpec, start: Floats, seed: tuple[int, int]
    ) -> None:
        self.ridge = spec.default_ridge
        self.network = build_network(data.rows.shape[1], spec, _generator(*seed, 0))
        with torch.no_grad():
            self.network.head.copy_(torch.from_numpy(start))
        device = data.batch[0].device
        self.network.to(device)
        self.dropout = _generator(*seed, 1, device=device)
        self.learning_rate, self.weight_decay = spec.learning_rate, spec.weight_decay

    @cached_property
    def optimiser(self) -> torch.optim.AdamW:
        """Made at the first step: its import takes seconds, and linear models take no step."""
        rest = [p for p in self.network.parameters() if p is not self.network.head]
        return torch.optim.AdamW(
            [
                # The ridge of the loss is all the shrinkage that the linear weights get.
                {"params": [self.network.head], "weight_decay": 0.0},
                {"params": rest, "weight_decay": self.weight_decay},
            ],
            lr=self.learning_rate,
            fused=True,
        )

    def step(self, data: TrainingRows, survival: Outcome) -> None:
        self.optimiser.zero_grad()
        predicted = predict(self.network, data.batch, self.dropout)
        penalty = 0.5 * self.ridge * self.network.head.square().sum().cpu()
        (cox_loss(predicted, survival) + penalty).backward()
        self.optimiser.step()
