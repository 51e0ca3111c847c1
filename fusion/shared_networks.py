"""The site's end of a network that the consortium trains by averaging its weights.

Weights travel as one flat vector in float64: first the (k,) linear weights, then, of a network,
layer by layer in the order in which it declares them, each weight matrix row by row before its
bias. For ``mlp`` the layers are hidden (hidden, k) and out (1, hidden); for ``gated_attention``
signal and gate (hidden, k) each, and out (1, hidden).

Inputs come prepared alike at every site: a table standardised by the consortium's moments, or bags
mapped by one fixed projection and scaled. Nothing here is drawn at random but the first weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.func import functional_call

from fusion.cox_loss import cox_loss, outcome, training_mode
from fusion.encoder_inputs import as_bags, as_table, checked_bags, evenly
from fusion.networks import GatedAttention, build_network, pad_bags, reproducible_torch

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from fusion.encoder_inputs import Floats, Inputs
    from fusion.encoder_spec import EncoderSpec
    from fusion.networks import Network


def n_weights(spec: EncoderSpec, n_inputs: int) -> int:
    """Length of the flat vector of ``spec``'s network for k inputs per row or tile."""
    return sum(p.numel() for p in _network(spec, n_inputs).parameters())


def initial_weights(
    spec: EncoderSpec, n_inputs: int, *, seed: int, head: ArrayLike | None = None
) -> Floats:
    """Flat weights that every site draws alike from one seed.

    Parameters
    ----------
    n_inputs
        Inputs k per row or tile.
    seed
        Of the protocol.
    head
        (k,) linear weights to start from, such as those of an encoder fitted from sums; None
        starts at zero, where everyone's log hazard is zero.

    Raises
    ------
    ValueError
        If ``head`` is not (k,) and finite.
    """
    network = _network(spec, n_inputs, seed=seed)
    with torch.no_grad():
        if head is not None:
            network.head.copy_(torch.from_numpy(_checked(head, n_inputs, "head")))
        return torch.cat([p.reshape(-1) for p in network.parameters()]).numpy()


def shared_log_hazard(spec: EncoderSpec, weights: ArrayLike, inputs: Inputs) -> Floats:
    """(n,) log hazard by a shared network; higher is worse, and the scale is the network's own.

    Parameters
    ----------
    weights
        Flat, of :func:`n_weights`.
    inputs
        (n, k) prepared table, where NaN counts as the mean, 0; or n prepared bags of (n_tiles, k),
        of which every tile is read.

    Raises
    ------
    ValueError
        If weights are not finite or not of the length that the inputs need.
    DataError
        If the inputs are empty, infinite or of the wrong kind.
    """
    with reproducible_torch(), torch.no_grad():
        if spec.model == "gated_attention":
            bags = [torch.from_numpy(_float64(bag)) for bag in checked_bags(as_bags(inputs))]
            flat = _Flat(spec, bags[0].shape[1])
            vector = flat.vector(weights)
            scored = [flat.log_hazard(vector, pad_bags([bag])) for bag in bags]
            return torch.cat(scored).numpy()
        rows = _rows(inputs)
        flat = _Flat(spec, rows.shape[1])
        return flat.log_hazard(flat.vector(weights), (rows,)).numpy()


class SharedLoss:
    """Loss of a site's rows under the shared network, and its gradient.

    The loss is the negative Efron partial log-likelihood per event, plus half of ``ridge`` times
    patients per event times the squared norm of the linear weights, and ``spec.weight_decay`` times
    that for all other weights. So the ridge keeps its meaning, per patient, and averaging sites'
    losses by their events gives the loss of all rows, stratified by site.

    Parameters
    ----------
    spec
        Of the protocol; its dropout and ensemble play no part here.
    inputs
        As in :func:`shared_log_hazard`; of a bag at most ``spec.max_tiles`` tiles are read.
    event, time
        (n,) True where observed; days from the landmark.
    ridge
        Penalty per patient; None takes the spec's default strength.
    strata
        (n,) labels; risk sets never span two of them.

    Raises
    ------
    ValueError
        If no event was observed, or lengths disagree.
    DataError
        If the inputs are empty, infinite or of the wrong kind.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        inputs: Inputs,
        event: ArrayLike,
        time: ArrayLike,
        *,
        ridge: float | None = None,
        strata: ArrayLike | None = None,
    ) -> None:
        self._survival = outcome(event, time, strata=strata)
        if len(inputs) != len(self._survival):
            raise ValueError(f"inputs: found {len(inputs)} patients, needed {len(self._survival)}")
        if self._survival.n_events == 0:
            raise ValueError("events: found none, needed at least one for a loss")
        self._batch = _batch(spec, inputs)
        self._flat = _Flat(spec, self._batch[0].shape[-1])
        self._per_event = len(self._survival) / self._survival.n_events
        self._ridge = spec.default_ridge if ridge is None else ridge
        self._decay = spec.weight_decay

    @property
    def n_events(self) -> int:
        """Observed events, by which averages over sites are weighted."""
        return self._survival.n_events

    def __call__(self, weights: ArrayLike) -> tuple[float, Floats]:
        """Loss and its gradient, of the length of the flat ``weights``.

        The gradient is rounded as float32 rounds log hazards, to about 1e-7 of its size.

        Raises
        ------
        ValueError
            If weights are not finite or of another length.
        TrainingDiverged
            If a log hazard or the loss is not finite.
        """
        with training_mode():
            vector = self._flat.vector(weights).requires_grad_()
            predicted = self._flat.log_hazard(vector, self._batch)
            fit = cox_loss(predicted, self._survival) * self._per_event
            loss = fit + self._penalty(vector)
            (gradient,) = torch.autograd.grad(loss, vector)
        return float(loss.detach()), gradient.numpy()

    def _penalty(self, vector: torch.Tensor) -> torch.Tensor:
        head, rest = vector[: self._flat.n_inputs], vector[self._flat.n_inputs :]
        squares = head.square().sum() + self._decay * rest.square().sum()
        return 0.5 * self._ridge * self._per_event * squares


class _Flat:
    """A network as a function of one flat vector."""

    def __init__(self, spec: EncoderSpec, n_inputs: int) -> None:
        self.n_inputs = n_inputs
        self.network = _network(spec, n_inputs)
        self.shapes = {name: p.shape for name, p in self.network.named_parameters()}
        self.n_weights = sum(shape.numel() for shape in self.shapes.values())

    def vector(self, weights: ArrayLike) -> torch.Tensor:
        return torch.from_numpy(_checked(weights, self.n_weights, "weights"))

    def log_hazard(self, vector: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        named = {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        predicted = functional_call(self.network, named, batch)
        hazard = predicted[0] if isinstance(self.network, GatedAttention) else predicted
        return torch.as_tensor(hazard)


def _network(spec: EncoderSpec, n_inputs: int, *, seed: int = 0) -> Network:
    with reproducible_torch():
        network = build_network(n_inputs, spec, torch.Generator().manual_seed(seed))
        return network.double()


def _checked(values: ArrayLike, length: int, name: str) -> Floats:
    array = np.array(values, dtype=np.float64)
    if array.shape != (length,):
        raise ValueError(f"{name}: found shape {array.shape}, needed ({length},)")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: found a value that is not finite, needed all finite")
    return array


def _float64(values: ArrayLike) -> Floats:
    return np.ascontiguousarray(values, dtype=np.float64)


def _rows(inputs: Inputs) -> torch.Tensor:
    return torch.from_numpy(np.nan_to_num(as_table(inputs), nan=0.0))


def _batch(spec: EncoderSpec, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    if spec.model != "gated_attention":
        return (_rows(inputs),)
    bags = checked_bags(as_bags(inputs))
    return pad_bags([torch.from_numpy(_float64(evenly(bag, spec.max_tiles))) for bag in bags])


__all__ = ["SharedLoss", "initial_weights", "n_weights", "shared_log_hazard"]
