"""What encoders read: a table, or a bag of tiles per patient; no torch here, so quick to import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

Floats: TypeAlias = NDArray[np.float64]
Table: TypeAlias = NDArray[np.floating[Any]]
"""(n, p) one row per patient; NaN marks a missing cell."""
Bags: TypeAlias = "Sequence[NDArray[np.floating[Any]]]"
"""n bags, one per patient, each (n_tiles, dim) with at least one tile."""
Inputs: TypeAlias = "Table | Bags"

_Tiles = TypeVar("_Tiles", NDArray[Any], "torch.Tensor")


def pool_bags(bags: Bags) -> Floats:
    """(n, dim) mean of each bag's tiles.

    Raises
    ------
    DataError
        If a bag is empty, not finite, or of another dimension.
    """
    return np.stack([bag.mean(axis=0, dtype=np.float64) for bag in checked_bags(bags)])


def as_table(inputs: Inputs) -> Floats:
    """(n, p) table in float64 of a table, or of bags through :func:`pool_bags`.

    Raises
    ------
    DataError
        If a cell is infinite, or there is no row or no column.
    """
    table = _table(inputs)
    if table is None:
        return pool_bags(as_bags(inputs))
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


def as_bags(inputs: Inputs) -> Bags:
    """Return bags, told from a table by their type.

    Raises
    ------
    DataError
        If the inputs are a table.
    """
    if _table(inputs) is not None:
        raise DataError("shape", "inputs: found a table, needed bags of tiles for this model")
    return cast("Bags", inputs)


def checked_bags(bags: Bags, dim: int | None = None) -> Iterator[NDArray[np.floating[Any]]]:
    """Yield one bag after the other, each of them checked.

    Parameters
    ----------
    dim
        Columns that every bag must have; None takes the first bag's.

    Raises
    ------
    DataError
        If there is no bag, or one is empty, not finite, or of another dimension.
    """
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
