"""Which counts and figures may be shown, so that none tells of a few patients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike

    from fusion.evaluation.sums import Flags, Floats


def hide_small_cells(counts: ArrayLike, minimum: int) -> Floats:
    """Replace every cell below the minimum, zero included, by NaN.

    For tables shown without totals; with totals use `complementary_hidden`.

    Parameters
    ----------
    counts
        Counts, of any shape.
    minimum
        Smallest count shown.

    Raises
    ------
    ValueError
        If a count is negative or missing, or the minimum is below one.
    """
    counts = _counts(counts, minimum)
    return np.where(counts < minimum, np.nan, counts)


def complementary_hidden(counts: ArrayLike, minimum: int) -> tuple[Flags, Flags]:
    """Which cells to hide, and which totals to show, so that no subtraction gives a small cell.

    In each column, total minus shown cells must stand for at least two sites with a count and reach
    the minimum: beyond the small cells the smallest others are hidden until it does, or the total
    where no cell would remain. What a site learns by taking its own count from a total is not
    considered.

    Parameters
    ----------
    counts
        (n_sites, n_columns) or (n_sites,).
    minimum
        Smallest count shown.

    Returns
    -------
    hidden
        Shape of ``counts``, True where hidden.
    total_shown
        (n_columns,) or scalar, True where the column's total may be shown.

    Raises
    ------
    ValueError
        If a count is negative or missing, or the minimum is below one.
    """
    counts = _counts(counts, minimum)
    columns = counts.reshape(counts.shape[0], math.prod(counts.shape[1:]))
    parts = [_hide_column(column, minimum) for column in columns.T]
    hidden = np.array([part[0] for part in parts], dtype=np.bool_).reshape(columns.shape[::-1]).T
    shown = np.array([part[1] for part in parts], dtype=np.bool_)
    return hidden.reshape(counts.shape), shown.reshape(counts.shape[1:])


def visible_sites(n_events: Mapping[str, int], *, min_events: int) -> tuple[frozenset[str], bool]:
    """Sites whose own figures may be shown, and whether the pooled figure may be.

    Parameters
    ----------
    n_events
        Test events of each site.
    min_events
        Smallest number of events behind a shown figure.

    Returns
    -------
    shown
        Names of the sites.
    total_shown
        Whether the figure over all sites is shown; see `complementary_hidden`.

    Raises
    ------
    ValueError
        If a count is negative, or the minimum is below one.
    """
    names = sorted(n_events)
    counts = np.array([n_events[name] for name in names], dtype=np.float64)
    hidden, total_shown = complementary_hidden(counts, min_events)
    shown = frozenset(name for name, hide in zip(names, hidden, strict=True) if not hide)
    return shown, bool(total_shown)


def _hide_column(counts: Floats, minimum: int) -> tuple[Flags, bool]:
    small = counts < minimum
    hidden = small.copy()
    for cell in np.argsort(counts, kind="stable"):
        if _nothing_to_subtract(counts[hidden], minimum):
            break
        hidden[cell] = True
    if _nothing_to_subtract(counts[hidden], minimum) and (small.all() or not hidden.all()):
        return hidden, counts.size > 0
    return small, False


def _nothing_to_subtract(hidden_counts: Floats, minimum: int) -> bool:
    if hidden_counts.size == 0:
        return True
    return bool(np.count_nonzero(hidden_counts) >= 2 and hidden_counts.sum() >= minimum)


def _counts(counts: ArrayLike, minimum: int) -> Floats:
    found = np.atleast_1d(np.asarray(counts, dtype=np.float64))
    if not (np.isfinite(found) & (found >= 0.0)).all():
        raise ValueError("counts: found a negative or missing value, needed counts")
    if minimum < 1:
        raise ValueError(f"minimum: found {minimum}, needed at least 1")
    return found
