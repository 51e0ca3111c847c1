"""Encoders of one modality: preparation of inputs, scoring, and form as bytes.

An encoder turns one modality of one patient (a row of a table, or a bag of tiles) into one
standardised log hazard. Training is in :mod:`fusion.training`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from fusion.encoder_inputs import as_bags, as_table, checked_bags, evenly
from fusion.encoder_spec import EncoderSpec
from fusion.networks import GatedAttention, build_network, frozen, reproducible_torch
from fusion.survival import moments
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from fusion.encoder_inputs import Bags, Floats, Inputs
    from fusion.networks import Network
    from fusion.survival import Moments

_METADATA_KEY = "consilium_encoder"
_FORMAT = 2
_CHUNK_TILES = 4096


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
        (p, k) applied last: the tile components; None keeps the p columns of a table.
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


def standardisation(columns: Moments) -> Preparation:
    """Make the preparation of a table from the moments of its p raw columns."""
    variance = np.divide(
        columns.m2, columns.n - 1, out=np.zeros_like(columns.m2), where=columns.n > 1
    )
    spread = np.sqrt(variance)
    varies = spread > 1e-12 * np.maximum(1.0, np.abs(columns.mean))
    # A gain of 0 keeps a column that never varied in training out of every later score.
    gain = np.divide(1.0, spread, out=np.zeros_like(spread), where=varies)
    return Preparation(columns.mean, gain)


def tile_components(bags: Bags, spec: EncoderSpec) -> Preparation:
    """Principal components of tiles, each scaled to unit variance over the training tiles.

    Every bag weighs the same, however many tiles it has.

    Raises
    ------
    DataError
        If a bag is empty, not finite, or of another dimension.
    """
    sampled = [evenly(bag, spec.max_tiles) for bag in checked_bags(bags)]
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


def prepare(inputs: Inputs, spec: EncoderSpec) -> Preparation:
    """Learn the preparation of ``spec`` from training rows.

    Raises
    ------
    DataError
        If the inputs are not what the model reads.
    """
    if not spec.reads_tiles:
        return standardisation(moments(as_table(inputs)))
    return tile_components(as_bags(inputs), spec)


@dataclass(frozen=True, eq=False)
class FittedEncoder:
    """A trained encoder with its preparation and the scale of its own training rows.

    Attributes
    ----------
    spec
        What it was trained by.
    preparation
        Learned from its training rows.
    chosen
        The spec with the hyperparameters that inner folds chose, and one ridge strength.
    networks
        One, or an ensemble whose log hazards are averaged; in evaluation mode, without gradients,
        on the CPU.
    centre, scale
        Mean and standard deviation of the raw log hazards of its training rows.
    n_patients, n_events
        Of the training rows.
    n_steps
        AdamW steps taken after the linear start.
    history
        Plain values: which hyperparameters were tried in which order, their losses on inner folds
        by number of steps, which was chosen, and whether the time budget ended the list early.
    """

    spec: EncoderSpec
    chosen: EncoderSpec
    preparation: Preparation
    networks: tuple[Network, ...]
    centre: float
    scale: float
    n_patients: int
    n_events: int
    n_steps: int
    history: dict[str, Any]

    def log_hazard(self, inputs: Inputs) -> Floats:
        """(n,) standardised log hazard; higher is worse, 0 is the mean training patient.

        A patient's value does not depend, beyond rounding, on who else is in ``inputs``.

        Raises
        ------
        DataError
            If the inputs are not of the kind and width of the training inputs.
        """
        if self.spec.reads_tiles:
            inputs = as_bags(inputs)  # one bag alone must not pass for a table of patients
        with reproducible_torch(), torch.no_grad():
            raw = raw_log_hazard(self.networks, self.preparation, inputs)
        return (raw - self.centre) / self.scale

    def attention(self, bags: Bags) -> tuple[Floats, ...]:
        """(n_tiles,) weights of each bag's tiles, which sum to one; an ensemble's mean.

        Raises
        ------
        ValueError
            If the model has no attention.
        """
        networks = [one for one in self.networks if isinstance(one, GatedAttention)]
        if not networks:
            raise ValueError(f"attention: found model {self.spec.model}, needed gated_attention")
        with reproducible_torch(), torch.no_grad():
            return tuple(
                weights.double().numpy()
                for _, weights in _scored_bags(networks, self.preparation, bags)
            )

    def to_bytes(self) -> bytes:
        """Safetensors of all weights, with spec and sizes as JSON in the metadata; no code."""
        tensors = {
            f"network.{at}.{name}": weights.numpy()
            for at, network in enumerate(self.networks)
            for name, weights in network.state_dict().items()
        }
        tensors |= {"mean": self.preparation.mean, "gain": self.preparation.gain}
        if self.preparation.basis is not None:
            tensors["basis"] = self.preparation.basis
        about = {
            "format": _FORMAT,
            "spec": self.spec.model_dump(mode="json"),
            "chosen": self.chosen.model_dump(mode="json"),
            "centre": self.centre,
            "scale": self.scale,
            "n_patients": self.n_patients,
            "n_events": self.n_events,
            "n_steps": self.n_steps,
            "history": self.history,
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

    format: Literal[2]
    spec: EncoderSpec
    chosen: EncoderSpec
    centre: float
    scale: float = Field(gt=0.0)
    n_patients: int = Field(ge=0)
    n_events: int = Field(ge=0)
    n_steps: int = Field(ge=0)
    history: dict[str, Any]


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
    networks = tuple(
        _network(preparation.n_outputs, about.chosen, _member(tensors, at))
        for at in range(about.chosen.ensemble)
    )
    if len(tensors) != sum(len(network.state_dict()) for network in networks):
        raise ValueError("weights of other networks than the spec's")
    fields = {name: getattr(about, name) for name in _About.model_fields if name != "format"}
    return FittedEncoder(preparation=preparation, networks=networks, **fields)


def _member(tensors: dict[str, NDArray[Any]], at: int) -> dict[str, torch.Tensor]:
    prefix = f"network.{at}."
    return {
        name.removeprefix(prefix): torch.from_numpy(values)
        for name, values in tensors.items()
        if name.startswith(prefix)
    }


def _network(n_inputs: int, spec: EncoderSpec, state: dict[str, torch.Tensor]) -> Network:
    network = build_network(n_inputs, spec, torch.Generator())
    if any(state[name].dtype != own.dtype for name, own in network.state_dict().items()):
        raise ValueError("network has another dtype")
    network.load_state_dict(state)
    return frozen(network)


def raw_log_hazard(networks: Sequence[Network], preparation: Preparation, inputs: Inputs) -> Floats:
    """(n,) mean log hazard of the networks before centring and scaling."""
    attention = [one for one in networks if isinstance(one, GatedAttention)]
    if attention:
        scored = [hazard for hazard, _ in _scored_bags(attention, preparation, inputs)]
        return torch.cat(scored).double().numpy()
    rows = patient_inputs(preparation, inputs)
    each = [network(rows.to(network.head.dtype)) for network in networks]
    return torch.stack(each).mean(dim=0).double().numpy()


def patient_inputs(preparation: Preparation, inputs: Inputs) -> torch.Tensor:
    """(n, k) float64 network inputs, one row per patient; the map is affine, so bags pool first."""
    return preparation(as_table(inputs))


def _scored_bags(
    networks: Sequence[GatedAttention], preparation: Preparation, inputs: Inputs
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Log hazard (1,) and attention (n_tiles,) of one bag at a time, so that none needs padding."""
    for bag in checked_bags(as_bags(inputs), preparation.n_inputs):
        tiles = preparation(bag).float().unsqueeze(0)
        mask = torch.ones(tiles.shape[:2], dtype=torch.bool)
        each = [network(tiles, mask) for network in networks]
        hazard = torch.stack([hazard for hazard, _ in each]).mean(dim=0)
        yield hazard, torch.stack([weights for _, weights in each]).mean(dim=0).squeeze(0)
