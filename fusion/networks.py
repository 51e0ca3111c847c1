"""Networks from prepared inputs to a log hazard, and torch held still while one is used."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fusion.encoder_spec import EncoderSpec

# Torch's thread count and default dtype belong to the whole process: one fit or scoring at a time.
_TORCH_STATE = threading.RLock()


def pad_bags(bags: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, n_tiles, k) tiles padded with zeros to the longest bag, and the (n, n_tiles) mask."""
    tiles = nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    lengths = torch.tensor([len(bag) for bag in bags])
    return tiles, torch.arange(tiles.shape[1]) < lengths[:, None]


def _layer(n_in: int, n_out: int, generator: torch.Generator | None) -> nn.Linear:
    """Layer drawn from a generator of its own, or of zeros: the global one stays untouched."""
    layer = nn.utils.skip_init(nn.Linear, n_in, n_out)
    with torch.no_grad():
        layer.bias.zero_()
        if generator is None:
            layer.weight.zero_()
        else:
            bound = n_in**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
    return layer


def _dropped(units: torch.Tensor, rate: float, generator: torch.Generator | None) -> torch.Tensor:
    """Drop units when a generator is given, in training, and keep all of them otherwise."""
    if generator is None or rate == 0.0:
        return units
    kept = torch.rand(units.shape, generator=generator, device=generator.device) >= rate
    return units * kept.to(units.device) / (1.0 - rate)


class LinearCox(nn.Module):
    """Log hazard linear in its inputs: (n, k) to (n,)."""

    def __init__(self, n_inputs: int) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(n_inputs, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the (n,) log hazard."""
        return inputs @ self.head


class Mlp(nn.Module):
    """Linear log hazard plus one hidden layer that starts at zero: (n, k) to (n,)."""

    def __init__(self, n_inputs: int, spec: EncoderSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(n_inputs))
        self.hidden = _layer(n_inputs, spec.hidden, generator)
        self.out = _layer(spec.hidden, 1, None)
        self.rate = spec.dropout

    def forward(
        self, inputs: torch.Tensor, *, dropout: torch.Generator | None = None
    ) -> torch.Tensor:
        """Return the (n,) log hazard; units are dropped when a generator is given."""
        units = _dropped(torch.tanh(self.hidden(inputs)), self.rate, dropout)
        return inputs @ self.head + self.out(units).squeeze(-1)


class GatedAttention(nn.Module):
    """Linear log hazard of an attention-weighted mean of tiles, starting as the plain mean.

    References
    ----------
    .. [1] Ilse M, Tomczak J, Welling M. Attention-based deep multiple instance learning. ICML 2018.
    """

    def __init__(self, n_inputs: int, spec: EncoderSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.zeros(n_inputs))
        self.signal = _layer(n_inputs, spec.hidden, generator)
        self.gate = _layer(n_inputs, spec.hidden, generator)
        self.out = _layer(spec.hidden, 1, None)
        self.rate = spec.dropout

    def attention(
        self, tiles: torch.Tensor, mask: torch.Tensor, *, dropout: torch.Generator | None = None
    ) -> torch.Tensor:
        """(n, n_tiles) weights that sum to one per bag and are zero on padding.

        Parameters
        ----------
        tiles
            (n, n_tiles, k) prepared tiles, padded to one length.
        mask
            (n, n_tiles) True on tiles, False on padding.
        dropout
            Units are dropped when a generator is given.
        """
        units = torch.tanh(self.signal(tiles)) * torch.sigmoid(self.gate(tiles))
        logits = self.out(_dropped(units, self.rate, dropout)).squeeze(-1)
        return torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=1)

    def forward(
        self, tiles: torch.Tensor, mask: torch.Tensor, *, dropout: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the (n,) log hazard and the (n, n_tiles) attention weights."""
        weights = self.attention(tiles, mask, dropout=dropout)
        pooled = torch.bmm(weights.unsqueeze(1), tiles).squeeze(1)
        return pooled @ self.head, weights


Network: TypeAlias = LinearCox | Mlp | GatedAttention


def build_network(n_inputs: int, spec: EncoderSpec, generator: torch.Generator) -> Network:
    """Untrained network of ``spec`` for ``n_inputs`` prepared inputs per row or tile."""
    if spec.model == "mlp":
        return Mlp(n_inputs, spec, generator)
    if spec.model == "gated_attention":
        return GatedAttention(n_inputs, spec, generator)
    return LinearCox(n_inputs)


def frozen(network: Network) -> Network:
    """Return the network in evaluation mode and without gradients."""
    return network.eval().requires_grad_(requires_grad=False)


@contextmanager
def reproducible_torch() -> Iterator[None]:
    """One thread and torch's own defaults while it lasts, one caller at a time; then as before."""
    with _TORCH_STATE:
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
