"""What a fusion model reads: standardised log hazards and absence flags, and linear encoders."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
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


def checked_columns(columns: ArrayLike, n_modalities: int) -> Floats:
    """(n, m) columns as float64, or say what is wrong with them.

    Raises
    ------
    ValueError
        If there is not one column per modality, or a log hazard is infinite.
    """
    values = np.asarray(columns, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] != n_modalities:
        raise ValueError(
            f"columns: found shape {values.shape}, needed (n, {n_modalities}), one log hazard per "
            "modality; fill a modality that patients lack with NaN"
        )
    if np.isinf(values).any():
        raise ValueError("log hazard: found an infinite one, needed finite values or NaN")
    return values


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
        return plain_values(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LinearEncoder:
        """Inverse of :meth:`to_dict`."""
        arrays = {k: np.array(values[k]) for k in ("mean", "scale", "coefficients")}
        return cls(**{**values, **arrays, "inputs": tuple(values["inputs"])})


def plain_values(instance: Any) -> dict[str, Any]:
    """Fields of a dataclass by name, arrays as lists."""
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
