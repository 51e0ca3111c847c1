"""How a model does in each level of one variable, with small levels hidden at the site."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from fusion.evaluation.absolute_risk import (
    ObservedExpected,
    observed_expected,
    observed_expected_ratio,
)
from fusion.evaluation.pairs import NoComparablePairs, PairCounts, concordance_index, pair_counts
from fusion.evaluation.sums import (
    Estimate,
    Flags,
    Floats,
    Indices,
    added,
    checked_levels,
    checked_outcome,
    checked_values,
    flattened,
    pool,
    unflattened,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from fusion.privacy import MinimumCounts

_N_PAIRS, _N_EXPECTED = 9, 3


@dataclass(frozen=True, eq=False)
class SubgroupSums:
    """Sums within each level of one variable; a row of zeros for a level that is hidden.

    Parameters
    ----------
    pairs
        (n_groups, 9) vectors of :class:`PairCounts`, pairs formed within the level.
    expected
        (n_groups, 3) vectors of :class:`ObservedExpected`.
    """

    pairs: Floats
    expected: Floats

    def __add__(self, other: Self) -> Self:
        return added(self, other)

    def to_vector(self) -> Floats:
        """(12 n_groups,) numbers."""
        return flattened(self)

    @classmethod
    def from_vector(cls, vector: ArrayLike, *, n_groups: int) -> Self:
        """Invert `to_vector`; ValueError for another length or a value that is not finite."""
        return cls(*unflattened(vector, ((n_groups, _N_PAIRS), (n_groups, _N_EXPECTED))))


@dataclass(frozen=True)
class SubgroupFigures:
    """One level, over the sites that released it; None where there is no figure.

    Attributes
    ----------
    n_patients, n_events
        Patients and events behind the figures.
    concordance
        Harrell's, of pairs within site and level; higher is better.
    observed_expected
        Observed over expected events; 1 is calibrated, above 1 too few are predicted.
    """

    n_patients: int
    n_events: int
    concordance: Estimate | None
    observed_expected: Estimate | None


def subgroup_sums(
    log_hazard: ArrayLike,
    expected: ArrayLike,
    event: ArrayLike,
    time: ArrayLike,
    group: ArrayLike,
    *,
    n_groups: int,
    minimum: MinimumCounts,
) -> SubgroupSums:
    """Pairs, and observed and expected events, of one site within each level of one variable.

    A level is hidden if it has fewer than ``minimum.test_events`` events, or if its patients or
    those without an event are fewer than ``minimum.cell``. Because the site's totals are known, the
    smallest further levels are hidden until the hidden patients together, those of unknown level
    included, are none or at least ``minimum.cell`` with and without event.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse.
    expected
        (n,) predicted cumulative hazard up to the earlier of the patient's time and the horizon.
    event
        (n,) True where the event was observed by the horizon; later ones count as not observed, so
        that observed and expected events cover the same days.
    time
        (n,) days to event or censoring.
    group
        (n,) number of the level, from 0; -1 where unknown.
    n_groups
        Number of levels, empty ones included.
    minimum
        Smallest counts that may leave.

    Raises
    ------
    ValueError
        If an argument has a missing value, another length, or lies outside its range.
    """
    event, time = checked_outcome(event, time)
    x = checked_values(log_hazard, "log_hazard", time.shape)
    hazard = checked_values(expected, "expected", time.shape)
    level = checked_levels(group, "group", time.shape, n_groups)
    pairs, sums = np.zeros((n_groups, _N_PAIRS)), np.zeros((n_groups, _N_EXPECTED))
    for shown in np.flatnonzero(~_hidden(level, event, n_groups, minimum)):
        own = level == shown
        pairs[shown] = pair_counts(x[own], event[own], time[own]).to_vector()
        sums[shown] = observed_expected(hazard[own], event[own]).to_vector()
    return SubgroupSums(pairs, sums)


def subgroup_figures(
    sums: SubgroupSums | Sequence[SubgroupSums],
) -> tuple[SubgroupFigures, ...]:
    """Concordance and calibration in the large of each level, over the sites that released it.

    Levels are described, not compared: another case mix alone changes a concordance.

    Parameters
    ----------
    sums
        Sums of the same levels, added up or one per site.
    """
    pooled = pool(sums)
    return tuple(_figures(*rows) for rows in zip(pooled.pairs, pooled.expected, strict=True))


def _hidden(level: Indices, event: Flags, n_groups: int, minimum: MinimumCounts) -> Flags:
    """(n_groups,) which levels to hide."""
    with_event, without = (  # of unknown level first
        np.bincount(level[who] + 1, minlength=n_groups + 1) for who in (event, ~event)
    )
    patients = with_event + without
    hidden = (with_event < minimum.test_events) | (np.minimum(patients, without) < minimum.cell)
    hidden[0] = True
    for smallest in np.argsort(patients, kind="stable"):
        together = with_event[hidden].sum(), without[hidden].sum()
        if sum(together) == 0 or min(together) >= minimum.cell:
            break
        hidden[smallest] = True
    return np.asarray(hidden[1:])


def _figures(pairs: Floats, expected: Floats) -> SubgroupFigures:
    counts, seen = PairCounts.from_vector(pairs), ObservedExpected.from_vector(expected)
    try:
        concordance = concordance_index(counts)
    except NoComparablePairs:
        concordance = None
    return SubgroupFigures(
        n_patients=round(seen.n_patients),
        n_events=round(seen.observed),
        concordance=concordance,
        observed_expected=observed_expected_ratio(seen) if seen.expected > 0.0 else None,
    )
