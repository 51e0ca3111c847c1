"""Which level of which variable a patient belongs to, as the protocol asks for it."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from modalities.clinical import ClinicalSpec

    Floats = NDArray[np.float64]

UNKNOWN = -1.0


def level_names(spec: ClinicalSpec, variable: str, cuts: Sequence[float]) -> tuple[str, ...]:
    """Names of a variable's levels, in the order of their codes.

    Parameters
    ----------
    variable
        Column of the registry.
    cuts
        Increasing bounds between the levels of a numeric column; a bound belongs to the level
        above it. Empty for a column whose levels the spec lists.

    Raises
    ------
    ValueError
        If the registry has no such column, or bounds and kind of column do not go together.
    """
    if variable in spec.numeric:
        if not cuts or list(cuts) != sorted(set(cuts)):
            raise ValueError(
                f"{variable}: found bounds {list(cuts)}, needed at least one, increasing, as the "
                "column is numeric"
            )
        between = [f"{a:g} to {b:g}" for a, b in pairwise(cuts)]
        return (f"below {cuts[0]:g}", *between, f"{cuts[-1]:g} and above")
    levels = {**spec.ordinal, **spec.categorical}.get(variable)
    if levels is None:
        raise ValueError(f"{variable}: found no such column among the clinical covariates")
    if cuts:
        raise ValueError(
            f"{variable}: found bounds {list(cuts)}, needed none, as its levels are listed"
        )
    return levels


def level_codes(
    spec: ClinicalSpec, covariates: Floats, variable: str, cuts: Sequence[float]
) -> Floats:
    """(n,) code of each patient's level, from 0; -1 where it is unknown.

    Parameters
    ----------
    covariates
        (n, p) coded covariates in the order of the spec's feature names, NaN where missing.
    """
    names = spec.feature_names
    if variable in spec.categorical:
        at = [names.index(f"{variable}={level}") for level in spec.categorical[variable][1:]]
        indicators = covariates[:, at]
        known = ~np.isnan(indicators).any(axis=1)
        codes = np.nan_to_num(indicators) @ np.arange(1.0, len(at) + 1)
        return np.where(known, codes, UNKNOWN)
    values = covariates[:, names.index(variable)]
    known = ~np.isnan(values)
    codes = np.searchsorted(np.asarray(cuts), values, side="right") if cuts else values
    return np.where(known, codes, UNKNOWN).astype(np.float64)
