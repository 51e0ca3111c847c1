"""Fusion models as they are registered, loaded and predicted with: one interface, three kinds."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, runtime_checkable

import numpy as np

from fusion.discrete import survival_from_log_odds
from fusion.late.gated import gates, unpack
from fusion.late.inputs import checked_columns, fusion_inputs, plain_values
from fusion.survival import cumulative_hazard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


@runtime_checkable
class FusionModel(Protocol):
    """What every kind of fusion model tells; see :mod:`fusion.late` for absent modalities.

    Attributes
    ----------
    kind
        ``cox``, ``logistic_hazard`` or ``gated``.
    modalities
        (m,) names of the columns it expects, in order.
    mean, scale
        (m,) consortium moments of the modality log hazards.
    coefficients
        (2 m,) log hazard ratio per standard deviation of each modality, then of its absence.
    covariance
        (2 m, 2 m) of the coefficients, from the penalised information.
    edges_days
        (k,) right ends of the baseline's intervals.
    baseline
        (k,) of the baseline at log hazard 0: hazard per day, or log odds of a discrete model.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    kind: ClassVar[str]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the columns."""

    @property
    def mean(self) -> Floats:
        """(m,) mean of each column."""

    @property
    def scale(self) -> Floats:
        """(m,) standard deviation of each column."""

    @property
    def coefficients(self) -> Floats:
        """(2 m,) of the standardised columns, then of the absence flags."""

    @property
    def covariance(self) -> Floats:
        """(2 m, 2 m) of the coefficients."""

    @property
    def edges_days(self) -> Floats:
        """(k,) right ends of the intervals."""

    @property
    def baseline(self) -> Floats:
        """(k,) hazard per day or log odds in each interval."""

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log hazards from (n, m) modality log hazards; higher is worse."""

    def predict_standard_error(self, columns: ArrayLike) -> Floats:
        """(n,) standard error of the log hazard; wider where modalities are absent."""

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days from the landmark."""

    def contributions(self, columns: ArrayLike) -> Floats:
        """(n, m) part of each modality in the log hazard; they sum to :meth:`predict`."""

    def to_json(self) -> str:
        """Write the model as JSON, numbers at full precision."""


@dataclass(frozen=True)
class CoxModel:
    """Linear Cox model, stratified by site, with a consortium baseline on the protocol's grid.

    Attributes
    ----------
    modalities
        (m,) names of the columns it expects.
    mean, scale
        (m,) consortium moments of the modality log hazards.
    coefficients
        (2 m,) log hazard ratio per standard deviation of each modality, then of its absence.
    covariance
        (2 m, 2 m) of the coefficients, from the penalised information.
    edges_days
        (k,) right ends of the baseline's intervals, after merging small cells.
    hazard_per_day
        (k,) baseline hazard in each interval, at log hazard 0.
    """

    kind: ClassVar[str] = "cox"

    modalities: tuple[str, ...]
    mean: Floats
    scale: Floats
    coefficients: Floats
    covariance: Floats
    edges_days: Floats
    hazard_per_day: Floats

    def __post_init__(self) -> None:
        _check_shapes(self)

    @property
    def baseline(self) -> Floats:
        """(k,) hazard per day in each interval."""
        return self.hazard_per_day

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log hazards from (n, m) modality log hazards; higher is worse."""
        return _linear_log_hazard(self, columns)

    def predict_standard_error(self, columns: ArrayLike) -> Floats:
        """(n,) standard error of the log hazard; wider where modalities are absent."""
        x, known = _design(self, columns)
        return _standard_error(self, x, known, self.coefficients[: len(self.modalities)])

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days from the landmark."""
        return _proportional_survival(
            self.predict(columns), self.hazard_per_day, self.edges_days, times_days
        )

    def contributions(self, columns: ArrayLike) -> Floats:
        """(n, m) part of each modality in the log hazard; they sum to :meth:`predict`."""
        return _linear_contributions(self, columns)

    def to_json(self) -> str:
        """Write the model as JSON, numbers at full precision."""
        return _to_json(self)


@dataclass(frozen=True)
class LogisticHazardModel:
    """Discrete-time model: the log odds of an event within an interval, given survival until it.

    Its :meth:`predict` is the log odds ratio, the same in every interval. With narrow intervals it
    is the log hazard ratio of a Cox model; with wide ones it is somewhat larger.

    Attributes
    ----------
    modalities, mean, scale
        As in :class:`CoxModel`.
    coefficients
        (2 m,) log odds ratio per standard deviation of each modality, then of its absence.
    covariance
        (2 m, 2 m) of the coefficients, from the penalised information.
    edges_days
        (k,) right ends of the intervals; the first begins at 0.
    alpha
        (k,) log odds of an event in each interval, at log hazard 0.
    """

    kind: ClassVar[str] = "logistic_hazard"

    modalities: tuple[str, ...]
    mean: Floats
    scale: Floats
    coefficients: Floats
    covariance: Floats
    edges_days: Floats
    alpha: Floats

    def __post_init__(self) -> None:
        _check_shapes(self)

    @property
    def baseline(self) -> Floats:
        """(k,) log odds of an event in each interval."""
        return self.alpha

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log odds ratios from (n, m) modality log hazards; higher is worse."""
        return _linear_log_hazard(self, columns)

    def predict_standard_error(self, columns: ArrayLike) -> Floats:
        """(n,) standard error of the log odds ratio; wider where modalities are absent."""
        x, known = _design(self, columns)
        return _standard_error(self, x, known, self.coefficients[: len(self.modalities)])

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days from the landmark."""
        log_odds, times = self.predict(columns), np.asarray(times_days, dtype=np.float64)
        survival = np.full((len(log_odds), len(times)), np.nan)
        known = ~np.isnan(log_odds)
        survival[known] = survival_from_log_odds(
            self.alpha, log_odds[known], self.edges_days, times
        )
        return survival

    def contributions(self, columns: ArrayLike) -> Floats:
        """(n, m) part of each modality in the log odds ratio; they sum to :meth:`predict`."""
        return _linear_contributions(self, columns)

    def to_json(self) -> str:
        """Write the model as JSON, numbers at full precision."""
        return _to_json(self)


@dataclass(frozen=True)
class GatedModel:
    """Cox model in which a small network weighs the modalities; see :mod:`fusion.late.gated`.

    Attributes
    ----------
    modalities, mean, scale
        As in :class:`CoxModel`.
    coefficients
        (2 m,) of the linear Cox model that the network started from.
    covariance
        (2 m, 2 m) of these coefficients. What the gates add to the uncertainty is not known.
    edges_days, hazard_per_day
        (k,) as in :class:`CoxModel`.
    weights
        Flat weights of the network, its own linear coefficients first.
    hidden
        Hidden units.
    """

    kind: ClassVar[str] = "gated"

    modalities: tuple[str, ...]
    mean: Floats
    scale: Floats
    coefficients: Floats
    covariance: Floats
    edges_days: Floats
    hazard_per_day: Floats
    weights: Floats
    hidden: int

    def __post_init__(self) -> None:
        _check_shapes(self)
        unpack(self.weights, len(self.modalities), self.hidden)

    @property
    def baseline(self) -> Floats:
        """(k,) hazard per day in each interval."""
        return self.hazard_per_day

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log hazards from (n, m) modality log hazards; higher is worse."""
        return np.asarray(self.contributions(columns).sum(axis=1))

    def predict_standard_error(self, columns: ArrayLike) -> Floats:
        """(n,) standard error of the log hazard; wider where modalities are absent.

        The gates are taken as known, so that it is on the narrow side.
        """
        m = len(self.modalities)
        x, known = _design(self, columns)
        gated = np.hstack([gates(self.weights, x, self.hidden) * x[:, :m], x[:, m:]])
        return _standard_error(self, gated, known, self.weights[:m])

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days from the landmark."""
        return _proportional_survival(
            self.predict(columns), self.hazard_per_day, self.edges_days, times_days
        )

    def contributions(self, columns: ArrayLike) -> Floats:
        """(n, m) part of each modality, weighted by its gate; they sum to :meth:`predict`."""
        m = len(self.modalities)
        x, known = _design(self, columns)
        parts = unpack(self.weights, m, self.hidden)
        of_modality = gates(self.weights, x, self.hidden) * x[:, :m] * parts.beta
        return np.where(known[:, None], of_modality + x[:, m:] * parts.delta, np.nan)

    def to_json(self) -> str:
        """Write the model as JSON, numbers at full precision."""
        return _to_json(self)


_KINDS: Final[Mapping[str | None, type[CoxModel | LogisticHazardModel | GatedModel]]] = {
    model.kind: model for model in (CoxModel, LogisticHazardModel, GatedModel)
}


def read_model(text: str) -> FusionModel:
    """Read any kind of fusion model from JSON; one that names no kind is a Cox model.

    Raises
    ------
    ValueError
        If the text is no JSON object, its kind is unknown, or its values are not that kind's.
    """
    values = json.loads(text)
    kind = values.pop("kind", CoxModel.kind) if isinstance(values, dict) else None
    model = _KINDS.get(kind)
    if model is None:
        known = ", ".join(str(x) for x in _KINDS)
        raise ValueError(f"fusion model: found kind {kind!r}, needed one of {known}")
    names = {x.name for x in fields(model)}
    if set(values) != names:
        raise ValueError(
            f"fusion model {kind}: found {', '.join(sorted(values))}, needed "
            f"{', '.join(sorted(names))}"
        )
    arrays: dict[str, Any] = {
        k: np.array(v) if isinstance(v, list) else v for k, v in values.items()
    }
    return model(**arrays | {"modalities": tuple(values["modalities"])})


def _to_json(model: FusionModel) -> str:
    values = {"kind": model.kind, **plain_values(model)}
    return json.dumps(values, sort_keys=True, allow_nan=False)


def _check_shapes(model: FusionModel) -> None:
    m, k = len(model.modalities), len(model.edges_days)
    needed = {
        "mean": (m,),
        "scale": (m,),
        "coefficients": (2 * m,),
        "covariance": (2 * m, 2 * m),
        "baseline": (k,),
    }
    for name, shape in needed.items():
        found = np.shape(getattr(model, name))
        if found != shape:
            raise ValueError(f"fusion model, {name}: found shape {found}, needed {shape}")


def _design(model: FusionModel, columns: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """(n, 2 m) fusion inputs, and which of the (n,) patients have any modality at all."""
    values = checked_columns(columns, len(model.modalities))
    known = np.asarray(~np.isnan(values).all(axis=1))
    return fusion_inputs(values, model.mean, model.scale), known


def _linear_log_hazard(model: FusionModel, columns: ArrayLike) -> Floats:
    x, known = _design(model, columns)
    return np.where(known, x @ model.coefficients, np.nan)


def _linear_contributions(model: FusionModel, columns: ArrayLike) -> Floats:
    x, known = _design(model, columns)
    parts = (x * model.coefficients).reshape(len(x), 2, len(model.modalities)).sum(axis=1)
    return np.where(known[:, None], parts, np.nan)


def _standard_error(
    model: FusionModel, x: Floats, known: NDArray[np.bool_], beta: Floats
) -> Floats:
    """See :mod:`fusion.late`: uncertainty of the coefficients, and of what was not measured."""
    m = len(beta)
    estimation = np.einsum("ij,jk,ik->i", x, model.covariance, x)
    unmeasured = x[:, m:] @ (beta**2 + np.diag(model.covariance)[:m])
    return np.where(known, np.sqrt(estimation + unmeasured), np.nan)


def _proportional_survival(
    log_hazard: Floats, hazard_per_day: Floats, edges_days: Floats, times_days: ArrayLike
) -> Floats:
    hazard = cumulative_hazard(hazard_per_day, edges_days, times_days)
    return np.exp(-np.exp(log_hazard)[:, None] * hazard)
