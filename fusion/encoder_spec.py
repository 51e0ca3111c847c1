"""What the protocol says about one modality's encoder; no torch here, so quick to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from numpy.typing import NDArray


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


def random_projection(n_inputs: int, n_outputs: int, seed: int) -> NDArray[np.float64]:
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
