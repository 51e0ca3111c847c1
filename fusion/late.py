"""The late-fusion model: a log hazard per modality in, a log hazard and a survival curve out."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.survival import Moments, cumulative_hazard, fit_cox, interval_sums, moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]


def fusion_inputs(columns: ArrayLike, mean: Floats, scale: Floats) -> Floats:
    """Design of the fusion model: standardised log hazards, then one missingness flag each.

    Parameters
    ----------
    columns
        (n, m) log hazard per modality, higher is worse; NaN where the patient lacks the modality.
    mean, scale
        (m,) consortium moments of the values that are present.

    Returns
    -------
    numpy.ndarray
        (n, 2 m): an absent modality counts as average risk (0) and raises its flag (1).
    """
    values = np.asarray(columns, dtype=np.float64)
    absent = np.isnan(values)
    standardised = (np.where(absent, 0.0, values) - mean) / scale
    return np.hstack([np.where(absent, 0.0, standardised), absent.astype(np.float64)])


def linear_inputs(table: ArrayLike, mean: Floats, scale: Floats) -> Floats:
    """Standardise a table; a missing cell takes the mean, a row of missing cells stays missing."""
    values = np.asarray(table, dtype=np.float64)
    standardised = (values - mean) / scale
    absent = np.isnan(values)
    return np.where(absent & ~absent.all(axis=1, keepdims=True), 0.0, standardised)


@dataclass(frozen=True)
class LinearEncoder:
    """A consortium's linear Cox encoder of one table modality.

    Attributes
    ----------
    inputs
        (p,) names of the columns, in order.
    mean, scale
        (p,) consortium moments of the columns.
    coefficients
        (p,) log hazard ratio per standard deviation.
    cross_fitted
        Whether the log hazards that the fusion model was fitted on were out-of-fold.
    """

    modality: str
    inputs: tuple[str, ...]
    mean: Floats
    scale: Floats
    coefficients: Floats
    cross_fitted: bool

    def log_hazard(self, table: ArrayLike) -> Floats:
        """(n,) log hazards of an (n, p) table; higher is worse, NaN where a row is missing."""
        return np.asarray(linear_inputs(table, self.mean, self.scale) @ self.coefficients)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return _plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinearEncoder:
        """Inverse of :meth:`to_dict`."""
        arrays = {k: np.array(values[k]) for k in ("mean", "scale", "coefficients")}
        return cls(**{**values, **arrays, "inputs": tuple(values["inputs"])})


@dataclass(frozen=True)
class FusionModel:
    """Late-fusion Cox model, stratified by site, with a consortium baseline on the protocol's grid.

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

    modalities: tuple[str, ...]
    mean: Floats
    scale: Floats
    coefficients: Floats
    covariance: Floats
    edges_days: Floats
    hazard_per_day: Floats

    def predict(self, columns: ArrayLike) -> Floats:
        """(n,) log hazards from (n, m) modality log hazards; higher is worse, NaN is absent."""
        return np.asarray(fusion_inputs(columns, self.mean, self.scale) @ self.coefficients)

    def predict_standard_error(self, columns: ArrayLike) -> Floats:
        """(n,) standard error of the log hazard from the uncertainty of the coefficients."""
        x = fusion_inputs(columns, self.mean, self.scale)
        return np.sqrt(np.einsum("ij,jk,ik->i", x, self.covariance, x))

    def predict_survival_function(self, columns: ArrayLike, times_days: ArrayLike) -> Floats:
        """(n, t) probability of surviving beyond each time, in days from the landmark."""
        hazard = cumulative_hazard(self.hazard_per_day, self.edges_days, times_days)
        return np.exp(-np.exp(self.predict(columns))[:, None] * hazard)

    def to_json(self) -> str:
        """Write the model as JSON, numbers at full precision."""
        return json.dumps(_plain(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> FusionModel:
        """Inverse of :meth:`to_json`."""
        values = json.loads(text)
        arrays = {k: np.array(v) for k, v in values.items() if k != "modalities"}
        return cls(modalities=tuple(values["modalities"]), **arrays)


def _plain(instance: Any) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(instance).items()
    }


def baseline_hazard(events: ArrayLike, exposure: ArrayLike) -> Floats:
    """(..., k) maximum-likelihood hazard per day of a piecewise-exponential baseline.

    Parameters
    ----------
    events
        (..., k) observed events per interval, summed over sites.
    exposure
        (..., k) sum of ``exp(log_hazard)`` times days at risk.
    """
    n, days = np.asarray(events, dtype=np.float64), np.asarray(exposure, dtype=np.float64)
    return np.asarray(np.divide(n, days, out=np.zeros_like(n), where=days > 0))


def fit_late_fusion(
    columns: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    *,
    modalities: Sequence[str],
    edges_days: ArrayLike,
    ridge: float,
    strata: ArrayLike | None = None,
) -> FusionModel:
    """Fit the fusion model to rows in one place: a site's own model, or the pooled reference.

    Parameters
    ----------
    columns
        (n, m) modality log hazards, out-of-fold, NaN where absent.
    event, time, strata
        As in :func:`fusion.survival.cox_sums`.
    edges_days
        (k,) right ends of the baseline's intervals.
    ridge
        Penalty per patient on the mean log-likelihood.
    """
    seen: Moments = moments(columns)
    x = fusion_inputs(columns, seen.mean, seen.scale)
    fit = fit_cox(x, event, time, strata=strata, ridge=ridge)
    events, exposure = interval_sums(x @ fit.candidate, event, time, edges_days)
    return FusionModel(
        modalities=tuple(modalities),
        mean=seen.mean,
        scale=seen.scale,
        coefficients=fit.candidate,
        covariance=fit.covariance,
        edges_days=np.asarray(edges_days, dtype=np.float64),
        hazard_per_day=baseline_hazard(events, exposure),
    )
