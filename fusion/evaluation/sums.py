"""What every figure shares: estimates, sums as vectors, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    SumsT = TypeVar("SumsT", bound=DataclassInstance)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.intp]

TAIL = 0.025
Z = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """One figure with its standard error and 95 % interval."""

    value: float
    standard_error: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Estimates:
    """Figures of equal shape with standard errors and 95 % intervals; NaN for no patients."""

    value: Floats
    standard_error: Floats
    low: Floats
    high: Floats


def added(first: SumsT, second: SumsT) -> SumsT:
    """Add two sets of sums field by field; they must be of one type and of equal shapes."""
    if type(first) is not type(second):
        raise TypeError(
            f"sums: found {type(second).__name__}, needed {type(first).__name__} to add"
        )
    parts: list[Any] = []
    for part in fields(first):
        one, other = getattr(first, part.name), getattr(second, part.name)
        if np.shape(one) != np.shape(other):
            raise ValueError(
                f"{part.name}: found shape {np.shape(other)}, needed {np.shape(one)} to add"
            )
        parts.append(one + other)
    return type(first)(*parts)


def pool(sums: SumsT | Sequence[SumsT]) -> SumsT:
    """Add up the sums of several sites; sums that are added up already pass through."""
    if not isinstance(sums, Sequence):
        return sums
    if not sums:
        raise ValueError("sums: found none, needed those of at least one site")
    pooled: SumsT = reduce(add, sums)
    return pooled


def flattened(sums: DataclassInstance) -> Floats:
    """All fields in their order, as one vector."""
    parts = [np.ravel(getattr(sums, part.name)) for part in fields(sums)]
    return np.concatenate(parts).astype(np.float64)


def unflattened(vector: ArrayLike, shapes: Sequence[tuple[int, ...]]) -> list[Floats]:
    """Cut a vector into parts of the given shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    flat = checked_values(vector, "vector", (sum(sizes),))
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def ratio(top: Floats, bottom: Floats) -> Floats:
    """Divide element by element; NaN where the divisor is not positive."""
    missing = np.full(np.shape(bottom), np.nan)
    return np.asarray(np.divide(top, bottom, out=missing, where=np.asarray(bottom) > 0.0))


def logit_interval(value: Floats, error: Floats, trials: Floats) -> tuple[Floats, Floats]:
    """95 % interval on the logit scale; exact binomial where the value is 0 or 1."""
    inner = (value > 0.0) & (value < 1.0)
    safe = np.where(inner, value, 0.5)
    half = np.where(inner, Z * error / (safe * (1.0 - safe)), 0.0)
    reach = TAIL ** (1.0 / np.fmax(trials, 1.0))
    low = np.where(inner, expit(logit(safe) - half), np.where(value >= 1.0, reach, value))
    high = np.where(inner, expit(logit(safe) + half), np.where(value <= 0.0, 1.0 - reach, value))
    return low, high


def checked_outcome(event: ArrayLike, time: ArrayLike) -> tuple[Flags, Floats]:
    """Events and days of one site, (n,) each; ValueError where they are not."""
    event = checked_flags(event, "event")
    time = checked_values(time, "time", event.shape)
    if (time < 0.0).any():
        raise ValueError("time: found a negative value, needed days from the landmark")
    return event, time


def checked_flags(values: ArrayLike, name: str) -> Flags:
    """One true or false per patient, (n,); ValueError for anything else."""
    found = np.asarray(values)
    if found.ndim != 1:
        raise ValueError(f"{name}: found shape {found.shape}, needed one value per patient")
    if not np.isin(found, (0, 1)).all():
        raise ValueError(f"{name}: found something other than true and false, needed only these")
    return found.astype(np.bool_)


def checked_values(values: ArrayLike, name: str, shape: tuple[int, ...]) -> Floats:
    """Finite numbers of the given shape; ValueError for anything else."""
    found = np.asarray(values, dtype=np.float64)
    if found.shape != shape:
        raise ValueError(f"{name}: found shape {found.shape}, needed {shape}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: found a missing or infinite value, needed finite ones")
    return found


def checked_days(values: ArrayLike, name: str) -> Floats:
    """Increasing days, none negative, at least one; ValueError for anything else."""
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"{name}: found shape {found.shape}, needed a list of days")
    if not (np.isfinite(found).all() and (np.diff(found) > 0.0).all() and found[0] >= 0.0):
        raise ValueError(f"{name}: needed finite, increasing days, none negative")
    return found


def checked_groups(group: ArrayLike, shape: tuple[int, ...], n_groups: int) -> Indices:
    """Group numbers from 0, (n,); ValueError for one outside the groups."""
    return _whole_numbers(group, "group", shape, lowest=0, highest=n_groups - 1)


def checked_levels(values: ArrayLike, name: str, shape: tuple[int, ...], n_levels: int) -> Indices:
    """Level numbers from 0, -1 where unknown, (n,); ValueError for one outside the levels."""
    return _whole_numbers(values, name, shape, lowest=-1, highest=n_levels - 1)


def _whole_numbers(
    values: ArrayLike, name: str, shape: tuple[int, ...], *, lowest: int, highest: int
) -> Indices:
    found = checked_values(values, name, shape)
    if not ((found >= lowest) & (found <= highest) & (found == np.floor(found))).all():
        raise ValueError(f"{name}: found a number outside {lowest} to {highest}, needed whole ones")
    return found.astype(np.intp)


def check_horizon(horizon: float) -> None:
    """Raise ValueError unless the horizon is a positive number of days."""
    if not 0.0 < horizon < np.inf:
        raise ValueError(f"horizon: found {horizon}, needed a positive number of days")
