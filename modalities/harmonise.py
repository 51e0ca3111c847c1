"""Site effects: a table centred and scaled by the site that made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

Harmonisation = Literal["none", "site"]
"""``site``: every site transforms its own rows with its own `SiteScaler`; ``none``: as they are."""


@dataclass(frozen=True, eq=False)
class SiteScaler:
    """Location and scale of each feature at one site.

    Parameters
    ----------
    mean
        (p,) what is subtracted.
    scale
        (p,) what the rest is divided by, above 0.

    Raises
    ------
    DataError
        If shapes disagree, a value is not finite, or a scale is not above 0.
    """

    mean: NDArray[np.float64]
    scale: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("mean", "scale"):
            values = np.array(getattr(self, name), dtype=np.float64)  # a copy nobody else holds
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        if self.mean.ndim != 1 or self.mean.shape != self.scale.shape:
            raise DataError(
                "shape",
                f"scaler: found mean {self.mean.shape} and scale {self.scale.shape}, needed two "
                "vectors of one length; fit it again",
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scale).all()):
            raise DataError("not_finite", "scaler: found NaN or infinity; fit it again")
        if (self.scale <= 0).any():
            raise DataError(
                "scale_not_positive", "scaler: found a scale of 0 or below; fit it again"
            )

    def transform(self, values: ArrayLike) -> NDArray[np.float64]:
        """``(values - mean) / scale`` for (n, p) values; NaN stays NaN.

        Raises
        ------
        DataError
            If ``values`` is not (n, p).
        """
        return (self._checked(values) - self.mean) / self.scale

    def inverse_transform(self, values: ArrayLike) -> NDArray[np.float64]:
        """``values * scale + mean`` for (n, p) values: what `transform` was given.

        Raises
        ------
        DataError
            If ``values`` is not (n, p).
        """
        return self._checked(values) * self.scale + self.mean

    def to_dict(self) -> dict[str, list[float]]:
        """Plain lists for JSON, from which `from_dict` restores every bit."""
        return {"mean": self.mean.tolist(), "scale": self.scale.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Scaler from what `to_dict` wrote.

        Raises
        ------
        DataError
            If a part is missing or not a list of numbers, or as the class itself.
        """
        try:
            mean, scale = (np.array(data[k], dtype=np.float64) for k in ("mean", "scale"))
        except (KeyError, TypeError, ValueError):
            raise DataError(
                "not_a_scaler", "scaler: needed number lists mean and scale; fit it again"
            ) from None
        return cls(mean=mean, scale=scale)

    def _checked(self, values: ArrayLike) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] != self.mean.size:
            raise DataError(
                "shape",
                f"features: found shape {array.shape}, needed (n, {self.mean.size}); use the "
                "table that the scaler was fitted on",
            )
        return array


def fit_site_scaler(values: ArrayLike) -> SiteScaler:
    """Mean and standard deviation of each feature over the rows of one site.

    Scanners, stains and laboratories shift and stretch the same measurement differently at each
    site. Here each site computes this scaler on its own rows, without any outcome, applies it to
    its own rows, and keeps it: nothing crosses the border, a site with no labels can take part,
    and a site that joins later changes nothing for the others.

    The price: a *true* difference between sites goes with the technical one. After the transform
    every site has mean 0 and standard deviation 1, so a hospital that treats the older or sicker
    patients looks like any other in this modality, and absolute risk has to be recalibrated there.
    Patients are placed relative to their own site, so it asks for a sample large enough to stand
    for it, and for the stored scaler, not a refitted one, when new patients arrive. Use it for
    measurements whose level depends on the machine, not for age or stage.

    Parameters
    ----------
    values
        (n, p) features; NaN is passed over column by column.

    Returns
    -------
    scaler
        With the sample standard deviation (n - 1). A column without two different values keeps
        its spread: scale 1 and its constant as mean, or 0 where all of it is NaN.

    Raises
    ------
    DataError
        If ``values`` is not (n, p) or holds an infinite value.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2:
        raise DataError("shape", f"features: found shape {array.shape}, needed (n, p)")
    if np.isinf(array).any():
        raise DataError(
            "not_finite", "features: found an infinite value, needed numbers or NaN; correct it"
        )
    present = ~np.isnan(array)
    n = present.sum(axis=0)
    # Counted from a value of the column, so that a constant one has deviation 0 exactly.
    origin = np.where(present, array, -np.inf).max(axis=0, initial=-np.inf)
    origin = np.where(n > 0, origin, 0.0)
    shifted = np.where(present, array - origin, 0.0)
    shift = shifted.sum(axis=0) / np.maximum(n, 1)
    squares = np.where(present, shifted - shift, 0.0) ** 2
    deviation = np.sqrt(squares.sum(axis=0) / np.maximum(n - 1, 1))
    return SiteScaler(mean=origin + shift, scale=np.where(deviation > 0, deviation, 1.0))
