"""A site's rows as a network reads them whose weights the consortium averages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.encoder_inputs import take
from fusion.encoder_spec import random_projection
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from flows.inputs import SiteInputs
    from flows.protocol import StudyProtocol
    from fusion.encoder_inputs import Inputs
    from fusion.encoder_spec import EncoderSpec

    Floats = NDArray[np.float64]


@dataclass
class NetworkRows:
    """One modality of one site, prepared; see :class:`fusion.federation.SharedNetwork`.

    Attributes
    ----------
    at
        (n_train + n_test,) which prepared patient each row is, -1 for one without the modality;
        training rows first.
    values
        Table or bags of the patients who have the modality.
    event, time
        (n_train,) outcome.
    """

    spec: EncoderSpec
    at: NDArray[np.intp]
    values: Inputs
    event: NDArray[np.bool_]
    time: Floats
    _losses: dict[bytes, Any] = field(default_factory=dict)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(n_train + n_test,) which rows have the modality."""
        return self.at >= 0

    def loss_gradient(self, weights: Floats, rows: NDArray[np.intp]) -> tuple[float, Floats]:
        """Mean loss per event over these training rows, and its gradient."""
        # Torch takes seconds to import, and only networks need it.
        from fusion.shared_networks import SharedLoss

        key = rows.tobytes()
        if key not in self._losses:
            values = take(self.values, self.at[rows])
            self._losses[key] = SharedLoss(self.spec, values, self.event[rows], self.time[rows])
        loss, gradient = self._losses[key](weights)
        return float(loss), gradient

    def log_hazard(self, weights: Floats) -> Floats:
        """(n_train + n_test,) log hazards, NaN where the modality is absent."""
        from fusion.shared_networks import shared_log_hazard

        found = np.full(len(self.at), np.nan)
        found[self.present] = shared_log_hazard(self.spec, weights, self.values)[
            self.at[self.present]
        ]
        return found


def shared_networks(inputs: SiteInputs, protocol: StudyProtocol) -> dict[str, NetworkRows]:
    """Prepare every modality whose network is shared and that the site has."""
    found = {}
    order = np.concatenate([np.flatnonzero(inputs.train), np.flatnonzero(~inputs.train)])
    for name, spec in protocol.encoder.items():
        if spec.sharing == "weights" and name in inputs.modalities:
            of = inputs.modalities[name]
            whole = np.full(len(inputs.time), -1, dtype=np.intp)
            whole[of.rows] = np.arange(len(of.rows))
            train = inputs.train[of.rows]
            found[name] = NetworkRows(
                spec=spec,
                at=whole[order],
                values=_prepared(of.values, spec, train=train),
                event=inputs.event[inputs.train],
                time=inputs.time[inputs.train],
            )
    return found


def _prepared(values: Inputs, spec: EncoderSpec, *, train: NDArray[np.bool_]) -> Inputs:
    """Tables come harmonised; tiles are projected alike everywhere, then standardised by site."""
    if isinstance(values, np.ndarray):
        return np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    bags: Sequence[NDArray[Any]] = values
    dim = bags[0].shape[1]
    if dim < spec.n_components:
        raise DataError(
            "too_few_dimensions",
            f"n_components: found {spec.n_components}, needed at most the {dim} dimensions of the "
            "tile embeddings",
        )
    axes = random_projection(dim, spec.n_components, spec.projection_seed)
    projected = [np.asarray(bag, dtype=np.float64) @ axes for bag in bags]
    seen = [bag for bag, used in zip(projected, train, strict=True) if used] or projected
    mean = np.mean([bag.mean(axis=0) for bag in seen], axis=0)
    spread = np.sqrt(np.mean([((bag - mean) ** 2).mean(axis=0) for bag in seen], axis=0))
    scale = np.where(spread > 0, spread, 1.0)
    return [(bag - mean) / scale for bag in projected]
