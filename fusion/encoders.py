"""Survival encoders: their spec, preparation of inputs, networks, scoring, and form as bytes.

An encoder turns one modality of one patient (a row of a table, or a bag of tiles) into one
standardised log hazard. Training is in :mod:`fusion.training`.
"""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy
from torch import nn

from fusion.survival import Moments, moments
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Floats: TypeAlias = NDArray[np.float64]
Table: TypeAlias = NDArray[np.floating[Any]]
"""(n, p) one row per patient; NaN marks a missing cell."""
Bags: TypeAlias = "Sequence[NDArray[np.floating[Any]]]"
"""n bags, one per patient, each (n_tiles, dim) with at least one tile."""
Inputs: TypeAlias = "Table | Bags"

_Tiles = TypeVar("_Tiles", NDArray[Any], torch.Tensor)

_METADATA_KEY = "consilium_encoder"
_FORMAT = 1
_CHUNK_TILES = 4096
# Torch's thread count and default dtype belong to the whole process: one fit or scoring at a time.
_TORCH_STATE = threading.RLock()


class EncoderSpec(BaseModel):
    """What the protocol says about one modality's encoder; the same at every site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["linear", "mlp", "gated_attention", "mean_pooling"] = Field(
        default="linear",
        description="What a site trains: linear and mlp read tables, the others bags of tiles.",
    )
    sharing: Literal["local", "sums"] = Field(
        default="local",
        description="local: the encoder never leaves its site; sums: beside it the consortium fits "
        "a linear encoder of the table, or of the projected mean of a bag, by federated Newton.",
    )
    inputs: tuple[str, ...] = Field(
        default=(), description="Names of the features used, in this order; empty means all."
    )
    max_inputs: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="Above it, with sharing sums, a random projection to this many comes first.",
    )
    projection_seed: int = Field(
        default=0,
        ge=0,
        lt=2**63,
        description="Seed of that projection; one for all sites and folds.",
    )
    n_components: int = Field(
        default=16, ge=1, le=512, description="Principal components kept of each tile."
    )
    max_tiles: int = Field(
        default=512,
        ge=1,
        le=100_000,
        description="Tiles of a bag that training reads, evenly spaced; scoring reads all.",
    )
    hidden: int = Field(default=16, ge=1, le=512, description="Hidden units of mlp and attention.")
    dropout: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Share of hidden units dropped in a step."
    )
    learning_rate: float = Field(default=0.01, gt=0.0, le=1.0, description="AdamW's step size.")
    weight_decay: float = Field(
        default=0.1,
        ge=0.0,
        le=10.0,
        description="AdamW's decay of all weights but the linear ones.",
    )
    ridge: float = Field(
        default=0.1,
        ge=0.0,
        le=100.0,
        description="Penalty of the linear weights per patient, on the mean log-likelihood.",
    )
    max_steps: int = Field(
        default=150, ge=0, le=10_000, description="Most AdamW steps; 0 keeps the linear start."
    )
    patience: int = Field(
        default=30,
        ge=1,
        le=10_000,
        description="Steps without a better inner loss before stopping.",
    )
    inner_folds: int = Field(
        default=3, ge=2, le=10, description="Inner folds that choose the number of steps."
    )
    min_events: int = Field(
        default=10, ge=4, le=10_000, description="Fewest observed events to train on."
    )
    harmonise: Literal["none", "site"] = Field(
        default="site", description="Whether site effects are removed before the encoder."
    )

    @model_validator(mode="after")
    def _check(self) -> EncoderSpec:
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("inputs: found repeated names, needed unique ones")
        return self

    @property
    def reads_tiles(self) -> bool:
        """Whether the model reads bags of tiles rather than one row per patient."""
        return self.model in ("gated_attention", "mean_pooling")


def random_projection(n_inputs: int, n_outputs: int, seed: int) -> Floats:
    """Projection with orthonormal columns that every site draws alike from one seed.

    A projected column of standardised inputs has variance one on average, so that one ridge suits
    projected and plain inputs.

    Parameters
    ----------
    n_inputs, n_outputs
        p and k of the (p, k) result; k at most p.
    seed
        Of the protocol, not of a fold.

    Raises
    ------
    ValueError
        If k is not between 1 and p.
    """
    if not 1 <= n_outputs <= n_inputs:
        raise ValueError(
            f"random projection: found {n_outputs} outputs, needed between 1 and {n_inputs}"
        )
    gaussian = np.random.default_rng(seed).standard_normal((n_inputs, n_outputs))
    q, r = np.linalg.qr(gaussian)
    # The factorisation leaves the signs open and linear algebra libraries choose differently.
    return np.asarray(q * np.where(np.diag(r) < 0, -1.0, 1.0))


def pool_bags(bags: Bags) -> Floats:
    """(n, dim) mean of each bag's tiles.

    Raises
    ------
    DataError
        If a bag is empty, not finite, or of another dimension.
    """
    return np.stack([bag.mean(axis=0, dtype=np.float64) for bag in _checked_bags(bags)])


def as_table(inputs: Inputs) -> Floats:
    """(n, p) table in float64 of a table, or of bags through :func:`pool_bags`.

    Raises
    ------
    DataError
        If a cell is infinite, or there is no row or no column.
    """
    table = _table(inputs)
    if table is None:
        return pool_bags(_bags(inputs))
    values = table.astype(np.float64)
    if 0 in values.shape:
        raise DataError("shape", f"table: found shape {values.shape}, needed rows and columns")
    if np.isinf(values).any():
        raise DataError(
            "not_finite", "table: found an infinite cell, needed finite ones or NaN for missing"
        )
    return values


def take(inputs: Inputs, rows: NDArray[np.integer[Any]]) -> Inputs:
    """Return the inputs of some patients, in the order of ``rows``."""
    table = _table(inputs)
    if table is not None:
        return table[rows]
    return [inputs[int(row)] for row in rows]


def _table(inputs: Inputs) -> Table | None:
    is_table = isinstance(inputs, np.ndarray) and inputs.ndim == 2 and inputs.dtype != object
    return cast("Table", inputs) if is_table else None


def _bags(inputs: Inputs) -> Bags:
    if _table(inputs) is not None:
        raise DataError("shape", "inputs: found a table, needed bags of tiles for this model")
    return cast("Bags", inputs)


def _checked_bags(bags: Bags, dim: int | None = None) -> Iterator[NDArray[np.floating[Any]]]:
    if len(bags) == 0:
        raise DataError("shape", "bags: found none, needed at least one")
    for item in bags:
        bag = np.asarray(item)
        if bag.ndim != 2 or 0 in bag.shape or (dim is not None and bag.shape[1] != dim):
            needed = f"(n_tiles, {dim})" if dim is not None else "(n_tiles, dim)"
            raise DataError(
                "shape", f"bag: found shape {bag.shape}, needed {needed} with at least one tile"
            )
        if not np.isfinite(bag).all():
            raise DataError(
                "not_finite", "bag: found a value that is not finite, needed all finite"
            )
        dim = bag.shape[1]
        yield bag


def evenly(bag: _Tiles, max_tiles: int) -> _Tiles:
    """Return the bag, or ``max_tiles`` of its tiles spread evenly over it."""
    if len(bag) <= max_tiles:
        return bag
    return bag[np.linspace(0, len(bag) - 1, max_tiles).round().astype(int)]


def pad_bags(bags: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, n_tiles, k) tiles padded with zeros to the longest bag, and the (n, n_tiles) mask."""
    tiles = nn.utils.rnn.pad_sequence(list(bags), batch_first=True)
    lengths = torch.tensor([len(bag) for bag in bags])
    return tiles, torch.arange(tiles.shape[1]) < lengths[:, None]


@dataclass(frozen=True, eq=False)
class Preparation:
    """Affine map from raw features to network inputs, learned from training rows only.

    Attributes
    ----------
    mean
        (p,) subtracted first; a missing cell becomes zero after that, the mean.
    gain
        (p,) multiplied next: one over the standard deviation, 0 for a column without variation.
    basis
        (p, k) applied last: tile components or a random projection; None keeps the p columns.
    """

    mean: Floats
    gain: Floats
    basis: Floats | None = None

    def __post_init__(self) -> None:
        if self.basis is not None:
            # A product's rounding follows the memory order, which bytes do not keep.
            object.__setattr__(self, "basis", np.array(self.basis, order="C"))

    @property
    def n_inputs(self) -> int:
        """Features per row that come in."""
        return len(self.mean)

    @property
    def n_outputs(self) -> int:
        """Network inputs per row that go out."""
        return self.n_inputs if self.basis is None else self.basis.shape[1]

    def __call__(self, rows: NDArray[np.floating[Any]]) -> torch.Tensor:
        """(n, k) float64 network inputs of (n, p) rows, be they patients or tiles."""
        if rows.ndim != 2 or rows.shape[1] != self.n_inputs:
            raise DataError(
                "shape", f"inputs: found shape {rows.shape}, needed (n, {self.n_inputs})"
            )
        chunks = [
            self._apply(rows[start : start + _CHUNK_TILES])
            for start in range(0, len(rows), _CHUNK_TILES)
        ]
        return torch.cat(chunks) if len(chunks) != 1 else chunks[0]

    def _apply(self, rows: NDArray[np.floating[Any]]) -> torch.Tensor:
        standardised = (rows.astype(np.float64) - self.mean) * self.gain
        values = torch.from_numpy(np.nan_to_num(standardised, copy=False, nan=0.0))
        return values if self.basis is None else values @ torch.from_numpy(self.basis)


def standardisation(columns: Moments, spec: EncoderSpec) -> Preparation:
    """Make the preparation of a table from its moments, which may be a consortium's.

    Parameters
    ----------
    columns
        Moments of the p raw columns; local or summed over sites.
    spec
        With ``sharing="sums"`` and p above ``max_inputs``, its random projection comes last.
    """
    n_inputs = len(columns.mean)
    variance = np.divide(columns.m2, columns.n - 1, out=np.zeros(n_inputs), where=columns.n > 1)
    spread = np.sqrt(variance)
    varies = spread > 1e-12 * np.maximum(1.0, np.abs(columns.mean))
    # A gain of 0 keeps a column that never varied in training out of every later score.
    gain = np.divide(1.0, spread, out=np.zeros(n_inputs), where=varies)
    projected = spec.sharing == "sums" and n_inputs > spec.max_inputs
    basis = (
        random_projection(n_inputs, spec.max_inputs, spec.projection_seed) if projected else None
    )
    return Preparation(columns.mean, gain, basis)


def tile_components(bags: Bags, spec: EncoderSpec) -> Preparation:
    """Principal components of tiles, each scaled to unit variance over the training tiles.

    Every bag weighs the same, however many tiles it has.

    Raises
    ------
    DataError
        If a bag is empty, not finite, or of another dimension.
    """
    sampled = [evenly(bag, spec.max_tiles) for bag in _checked_bags(bags)]
    mean = np.mean([bag.mean(axis=0, dtype=np.float64) for bag in sampled], axis=0)
    values, vectors = _principal_axes(sampled, mean, spec.n_components)
    return Preparation(mean, np.ones(len(mean)), vectors / np.sqrt(values))


def _principal_axes(
    bags: Sequence[NDArray[np.floating[Any]]], mean: Floats, n_components: int
) -> tuple[Floats, Floats]:
    """Variances (k,) and axes (p, k) of the bag-weighted tile covariance, largest first."""

    def _centred(bag: NDArray[np.floating[Any]]) -> torch.Tensor:
        return torch.from_numpy((bag - mean) / np.sqrt(len(bag) * len(bags)))

    # Of rows @ rows.T and rows.T @ rows, which share their eigenvalues, take the smaller one.
    if sum(map(len, bags)) <= len(mean):
        rows = torch.cat([_centred(bag) for bag in bags])
        values, left = _leading(rows @ rows.T, n_components)
        vectors = (rows.T @ left) / values.sqrt()
    else:
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for bag in bags:
            rows = _centred(bag)
            covariance.addmm_(rows.T, rows)
        values, vectors = _leading(covariance, n_components)
    axes = vectors.numpy()
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]
    return values.numpy(), np.asarray(axes * np.where(largest < 0, -1.0, 1.0))


def _leading(symmetric: torch.Tensor, n_components: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(symmetric)
    kept = int((values > 1e-9 * values[-1].clamp(min=1e-300)).sum())
    if kept == 0:
        raise DataError("no_variation", "bags: found tiles that are all alike, needed variation")
    k = min(n_components, kept)
    return values[-k:].flip(0), vectors[:, -k:].flip(1)


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


def prepare(inputs: Inputs, spec: EncoderSpec) -> Preparation:
    """Learn the preparation of ``spec`` from training rows.

    Raises
    ------
    DataError
        If the inputs are not what the model reads.
    """
    if not spec.reads_tiles:
        return standardisation(moments(as_table(inputs)), spec)
    return tile_components(_bags(inputs), spec)


@dataclass(frozen=True, eq=False)
class FittedEncoder:
    """A trained encoder with its preparation and the scale of its own training rows.

    Attributes
    ----------
    spec
        What it was trained by.
    preparation
        Learned from its training rows.
    network
        In evaluation mode, without gradients, on the CPU.
    centre, scale
        Mean and standard deviation of the raw log hazards of its training rows.
    n_patients, n_events
        Of the training rows.
    n_steps
        AdamW steps taken after the linear start.
    """

    spec: EncoderSpec
    preparation: Preparation
    network: Network
    centre: float
    scale: float
    n_patients: int
    n_events: int
    n_steps: int

    def log_hazard(self, inputs: Inputs) -> Floats:
        """(n,) standardised log hazard; higher is worse, 0 is the mean training patient.

        A patient's value does not depend, beyond rounding, on who else is in ``inputs``.

        Raises
        ------
        DataError
            If the inputs are not of the kind and width of the training inputs.
        """
        if self.spec.reads_tiles:
            inputs = _bags(inputs)  # one bag alone must not pass for a table of patients
        with reproducible_torch(), torch.no_grad():
            raw = raw_log_hazard(self.network, self.preparation, inputs)
        return (raw - self.centre) / self.scale

    def attention(self, bags: Bags) -> tuple[Floats, ...]:
        """(n_tiles,) weights of each bag's tiles, which sum to one.

        Raises
        ------
        ValueError
            If the model has no attention.
        """
        network = self.network
        if not isinstance(network, GatedAttention):
            raise ValueError(f"attention: found model {self.spec.model}, needed gated_attention")
        with reproducible_torch(), torch.no_grad():
            return tuple(
                weights.double().numpy()
                for _, weights in _scored_bags(network, self.preparation, bags)
            )

    def to_bytes(self) -> bytes:
        """Safetensors of all weights, with spec and sizes as JSON in the metadata; no code."""
        tensors = {f"network.{k}": v.numpy() for k, v in self.network.state_dict().items()}
        tensors |= {"mean": self.preparation.mean, "gain": self.preparation.gain}
        if self.preparation.basis is not None:
            tensors["basis"] = self.preparation.basis
        about = {
            "format": _FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "centre": self.centre,
            "scale": self.scale,
            "n_patients": self.n_patients,
            "n_events": self.n_events,
            "n_steps": self.n_steps,
        }
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        return safetensors_numpy.save(contiguous, metadata={_METADATA_KEY: json.dumps(about)})

    @classmethod
    def from_bytes(cls, data: bytes) -> FittedEncoder:
        """Read what :meth:`to_bytes` wrote; the result scores bit for bit alike.

        Raises
        ------
        ValueError
            If the bytes are damaged, of another format, or their parts disagree.
        """
        try:
            tensors = safetensors_numpy.load(data)
            about = _About.model_validate_json(_metadata(data))
            return _assemble(about, tensors)
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
            raise ValueError(
                "encoder: found bytes that are no encoder of this format, needed those that "
                "to_bytes wrote; train or fetch it again"
            ) from None


class _About(BaseModel):
    """The metadata of a saved encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    format: Literal[1]
    spec: EncoderSpec
    centre: float
    scale: float = Field(gt=0.0)
    n_patients: int = Field(ge=0)
    n_events: int = Field(ge=0)
    n_steps: int = Field(ge=0)


def _metadata(data: bytes) -> str:
    # Safetensors reads metadata from files only: its header is a length and that much JSON.
    length = int.from_bytes(data[:8], "little")
    return str(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA_KEY])


def _assemble(about: _About, tensors: dict[str, NDArray[Any]]) -> FittedEncoder:
    mean, gain, basis = tensors.pop("mean"), tensors.pop("gain"), tensors.pop("basis", None)
    preparation = Preparation(mean, gain, basis)
    if mean.ndim != 1 or gain.shape != mean.shape:
        raise ValueError("mean and gain disagree")
    if basis is not None and (basis.ndim != 2 or len(basis) != len(mean)):
        raise ValueError("basis disagrees with mean")
    arrays = [a for a in (mean, gain, basis) if a is not None]
    if any(a.dtype != np.float64 for a in arrays):
        raise ValueError("preparation is not in float64")
    if not all(np.isfinite(a).all() for a in (*arrays, *tensors.values())):
        raise ValueError("a weight is not finite")
    network = build_network(preparation.n_outputs, about.spec, torch.Generator())
    state = {name.removeprefix("network."): torch.from_numpy(a) for name, a in tensors.items()}
    if any(state[name].dtype != own.dtype for name, own in network.state_dict().items()):
        raise ValueError("network has another dtype")
    network.load_state_dict(state)
    fields = about.model_dump(exclude={"format", "spec"})
    return FittedEncoder(about.spec, preparation, frozen(network), **fields)


def frozen(network: Network) -> Network:
    """Return the network in evaluation mode and without gradients."""
    return network.eval().requires_grad_(requires_grad=False)


def raw_log_hazard(network: Network, preparation: Preparation, inputs: Inputs) -> Floats:
    """(n,) log hazard of the network before centring and scaling."""
    if isinstance(network, GatedAttention):
        scored = [hazard for hazard, _ in _scored_bags(network, preparation, inputs)]
        return torch.cat(scored).double().numpy()
    rows = patient_inputs(preparation, inputs)
    return network(rows.to(network.head.dtype)).double().numpy()


def patient_inputs(preparation: Preparation, inputs: Inputs) -> torch.Tensor:
    """(n, k) float64 network inputs, one row per patient; the map is affine, so bags pool first."""
    return preparation(as_table(inputs))


def _scored_bags(
    network: GatedAttention, preparation: Preparation, inputs: Inputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log hazard (1,) and attention (n_tiles,) of one bag at a time, so that none needs padding."""
    for bag in _checked_bags(_bags(inputs), preparation.n_inputs):
        tiles = preparation(bag).float().unsqueeze(0)
        hazard, weights = network(tiles, torch.ones(tiles.shape[:2], dtype=torch.bool))
        yield hazard, weights.squeeze(0)


def linear_encoder(
    spec: EncoderSpec,
    preparation: Preparation,
    coefficients: Floats,
    *,
    of_training: Moments,
    n_events: int,
) -> FittedEncoder:
    """Make an encoder of coefficients that were fitted from a consortium's sums.

    Parameters
    ----------
    spec
        With model ``linear``.
    preparation
        From :func:`standardisation` of the consortium's moments.
    coefficients
        (k,) of the prepared inputs.
    of_training
        Moments (1,) of the raw log hazards over all training rows, from which the output is
        centred and scaled.
    n_events
        Observed events among them.

    Raises
    ------
    ValueError
        If the model is not linear, or the number of coefficients is wrong.
    """
    if spec.model != "linear" or np.shape(coefficients) != (preparation.n_outputs,):
        raise ValueError(
            f"linear encoder: found model {spec.model} and coefficients of shape "
            f"{np.shape(coefficients)}, needed linear and ({preparation.n_outputs},)"
        )
    network = LinearCox(preparation.n_outputs)
    with torch.no_grad():
        network.head.copy_(torch.from_numpy(np.asarray(coefficients, dtype=np.float64)))
    return FittedEncoder(
        spec,
        preparation,
        frozen(network),
        centre=float(of_training.mean[0]),
        scale=float(of_training.scale[0]),
        n_patients=int(of_training.n[0]),
        n_events=n_events,
        n_steps=0,
    )
