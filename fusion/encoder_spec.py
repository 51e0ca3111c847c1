"""What the protocol says about one modality's encoder; no torch here, so quick to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:
    from numpy.typing import NDArray


class EncoderSpec(BaseModel):
    """What the protocol says about one modality's encoder; the same at every site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["linear", "mlp", "gated_attention", "mean_pooling"] = Field(
        default="linear",
        description="What a site trains: linear and mlp read tables, the others bags of tiles.",
    )
    sharing: Literal["local", "sums", "weights"] = Field(
        default="local",
        description="local: the encoder never leaves its site; sums: beside it the consortium fits "
        "a linear encoder of the table, or of the projected mean of a bag, by federated Newton; "
        "weights: beside it the consortium trains one network whose weights sites average.",
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
    components: int | None = Field(
        default=None,
        ge=1,
        le=512,
        description="With sharing sums: principal components kept by a federated PCA of the "
        "(projected) inputs, where every site has five patients per input; empty for no PCA.",
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
    hidden: int = Field(default=32, ge=1, le=512, description="Hidden units of mlp and attention.")
    dropout: float = Field(
        default=0.25, ge=0.0, lt=1.0, description="Share of hidden units dropped in a step."
    )
    learning_rate: float = Field(
        default=0.01,
        gt=0.0,
        le=1.0,
        description="Step size of AdamW, and of the coordinator with fedadam.",
    )
    weight_decay: float = Field(
        default=0.1,
        ge=0.0,
        le=10.0,
        description="AdamW's decay of all weights but the linear ones; with sharing weights, their "
        "penalty as a share of the ridge.",
    )
    ridge: tuple[Annotated[float, Field(ge=0.0, le=100.0)], ...] = Field(
        default=(0.01, 0.03, 0.1, 0.3, 1.0),
        min_length=1,
        max_length=32,
        description="Penalties of the linear weights per patient, on the mean log-likelihood, "
        "increasing. Several: chosen by cross-validation, never on test data.",
    )
    l1_ratio: float = Field(
        default=0.0,
        ge=0.0,
        le=1.0,
        description="Share of the penalty that is absolute values (elastic net), for linear "
        "models only; 0 is the ridge, 1 the lasso.",
    )
    max_steps: int = Field(
        default=400, ge=0, le=10_000, description="Most AdamW steps; 0 keeps the linear start."
    )
    patience: int = Field(
        default=100,
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
    ensemble: int = Field(
        default=1,
        ge=1,
        le=20,
        description="Networks of different seeds whose log hazards are averaged.",
    )
    time_budget_s: float = Field(
        default=600.0,
        gt=0.0,
        le=86_400.0,
        description="Seconds after which a site tries no further hyperparameters, of each fit.",
    )
    averaging: Literal["fedavg", "fedprox", "fedadam"] = Field(
        default="fedavg", description="With sharing weights: how sites' updates are combined."
    )
    rounds: int = Field(
        default=40, ge=1, le=500, description="With sharing weights: rounds of averaging."
    )
    local_steps: int = Field(
        default=5, ge=1, le=1000, description="With sharing weights: steps of a site in a round."
    )
    local_learning_rate: float = Field(
        default=0.3,
        gt=0.0,
        le=10.0,
        description="With sharing weights: length of a site's gradient step, times the gradient of "
        "its mean loss per event.",
    )
    proximal: float = Field(
        default=0.01,
        ge=0.0,
        le=100.0,
        description="With averaging fedprox: pull of a site's steps towards the shared weights.",
    )
    harmonise: Literal["none", "site"] = Field(
        default="site", description="Whether site effects are removed before the encoder."
    )

    @field_validator("ridge", mode="before")
    @classmethod
    def _one_or_several(cls, ridge: Any) -> Any:
        is_number = isinstance(ridge, int | float) and not isinstance(ridge, bool)
        return (ridge,) if is_number else ridge

    @field_validator("ridge")
    @classmethod
    def _increasing(cls, ridge: tuple[float, ...]) -> tuple[float, ...]:
        if list(ridge) != sorted(set(ridge)):
            raise ValueError(f"found {list(ridge)}, needed increasing penalties, each once")
        return ridge

    @model_validator(mode="after")
    def _parts_agree(self) -> EncoderSpec:
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("inputs: found repeated names, needed unique ones")
        if self.l1_ratio > 0.0 and not self.is_linear:
            raise ValueError(
                f"l1_ratio: found {self.l1_ratio:g} with model {self.model}, needed 0, or model "
                "linear or mean_pooling"
            )
        if self.l1_ratio > 0.0 and self.sharing == "weights":
            raise ValueError(
                f"l1_ratio: found {self.l1_ratio:g} with sharing weights, needed 0; an elastic net "
                "is shared as sums"
            )
        self._check_counts()
        return self

    def _check_counts(self) -> None:
        if self.ensemble > 1 and (self.is_linear or self.sharing == "weights"):
            raise ValueError(
                f"ensemble: found {self.ensemble}, needed 1: a linear model has nothing to "
                "average, and weights are shared of one network"
            )
        if self.components is not None and self.sharing != "sums":
            raise ValueError(
                f"components: found {self.components} with sharing {self.sharing}, needed sums"
            )
        if self.components is not None and self.components > self.max_inputs:
            raise ValueError(
                f"components: found {self.components}, needed at most max_inputs, {self.max_inputs}"
            )

    @property
    def reads_tiles(self) -> bool:
        """Whether the model reads bags of tiles rather than one row per patient."""
        return self.model in ("gated_attention", "mean_pooling")

    @property
    def is_linear(self) -> bool:
        """Whether the log hazard is linear in a table, or in the mean of a bag."""
        return self.model in ("linear", "mean_pooling")

    @property
    def default_ridge(self) -> float:
        """Penalty tried first, and used where none is chosen: the middle one, or just above."""
        return self.ridge[len(self.ridge) // 2]


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
