"""What a site asks of its own rows before they contribute to anything; nothing of it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from fusion.survival import moments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from fusion.evaluation import PairCounts
    from fusion.federation.rows import Outcome, SiteRows

    Floats = NDArray[np.float64]

# One-sided: chance stops one honest site of 700 whose own models know nothing.
_STOPS: Final = 3.0
# Features with long tails, not yet on a log scale, reach 100 in honest tables.
_FARTHEST_SD: Final = 300.0
_MOST_DUPLICATES: Final = 0.2
_LEAST_VALUES: Final = 5


def self_check(rows: SiteRows) -> str | None:
    """Say what is wrong with a site's own training rows, before they contribute to anything.

    Parameters
    ----------
    rows
        With ``local`` out-of-fold on the training rows; their mean over the modalities, each
        standardised, is what must not be below chance.

    Returns
    -------
    str or None
        One sentence for the site's own log, with no patient in it; nothing of it leaves. None
        where nothing is wrong, or too little is there to tell.
    """
    if len(rows.train) == 0:
        return None
    return (
        _outcome_fault(rows.train)
        or next((w for x, t in rows.tables.items() if (w := table_fault(x, t.train))), None)
        or _duplicates_fault(rows)
        or model_fault([x.train for x in rows.local.values()], rows.train)
    )


def _outcome_fault(train: Outcome) -> str | None:
    if not (np.isfinite(train.time).all() and (train.time > 0).all()):
        return "time: found a value that is not finite and positive, needed days > 0"
    if len(train) > 1 and np.ptp(train.time) == 0:
        return "time: found the same for every patient, needed days to event or last contact"
    if not train.event.any():
        return "event: found it observed for no patient; look at how it is coded and linked"
    return None


def table_fault(modality: str, table: Floats) -> str | None:
    """Say what is wrong with an (n, p) table whose absent cells are NaN, or None.

    A value stands out when it lies more than 300 standard deviations of all other values from
    their mean: another unit, or a code for an absent one. Inputs of fewer than five different
    values are left alone.
    """
    if np.isinf(table).any():
        return f"{modality}: found an infinite value, needed finite ones or none"
    told = [column[~np.isnan(column)] for column in table.T]
    known = [values for values in told if len(values) >= _LEAST_VALUES]
    if known and all(np.ptp(values) == 0 for values in known):
        return f"{modality}: found that no input varies, needed patients that differ"
    for at, values in enumerate(told):
        if len(np.unique(values)) >= _LEAST_VALUES and _farthest(values) > _FARTHEST_SD:
            return (
                f"{modality}: found a value of input {at} more than {_FARTHEST_SD:.0f} standard "
                "deviations from all others; look at its unit"
            )
    return None


def _farthest(values: Floats) -> float:
    """How far the most extreme value is from the mean of all others, in their deviations."""
    out = int(np.abs(values - values.mean()).argmax())
    others = np.delete(values, out)
    spread = float(others.std())
    return abs(float(values[out] - others.mean())) / spread if spread > 0 else 0.0


def _duplicates_fault(rows: SiteRows) -> str | None:
    parts = [x.train for x in rows.tables.values()] + [x.train for x in rows.local.values()]
    columns = [rows.train.event, rows.train.time, *parts]
    table = np.column_stack([np.nan_to_num(x, nan=-np.inf) for x in columns])
    share = 1.0 - len(np.unique(table, axis=0)) / len(table)
    if share <= _MOST_DUPLICATES:
        return None
    return (
        f"rows: found {share:.0%} to be copies of others, needed at most {_MOST_DUPLICATES:.0%}; "
        "look at how patients are joined"
    )


def model_fault(columns: Sequence[Floats], train: Outcome) -> str | None:
    """Say so where models together put patients in the reverse order of their outcomes.

    Parameters
    ----------
    columns
        (n,) log hazards of each modality, higher is worse, NaN where absent: of the site's own
        encoders, out-of-fold, or of the consortium's once they are set. Each is standardised.
    train
        Outcome of the same patients.
    """
    if not columns:
        return None
    stacked = np.column_stack(columns)
    seen = moments(stacked)
    log_hazard = np.nan_to_num((stacked - seen.mean) / seen.scale).sum(axis=1)
    return below_chance(log_hazard, train.event, train.time)


def below_chance(log_hazard: ArrayLike, event: ArrayLike, time: ArrayLike) -> str | None:
    """Say so where those at higher hazard lived significantly longer: an outcome turned round.

    Parameters
    ----------
    log_hazard
        (n,) higher is worse, of a model that did not see these outcomes.
    event, time
        (n,) outcome.
    """
    from fusion.evaluation import pair_counts  # evaluation is only needed with rows at hand

    values = np.asarray(log_hazard, dtype=np.float64)
    known = ~np.isnan(values)
    counts = pair_counts(values[known], np.asarray(event)[known], np.asarray(time)[known])
    z = z_from_chance(counts)
    if not z < -_STOPS:
        return None
    return (
        f"outcome: found that patients at higher predicted hazard lived longer (z = {z:.1f}); "
        "look at the coding of event and time, and at the linkage of outcomes to inputs"
    )


def z_from_chance(counts: PairCounts) -> float:
    """Concordance less one half, in standard errors; 0 where there is no pair."""
    from fusion.evaluation import concordance_index

    if not counts.comparable > 0:
        return 0.0
    found = concordance_index(counts)
    # The jackknife sees no spread at 0 and 1. Ranks against chance have about this one.
    least = 1.0 / (3.0 * np.sqrt(counts.n_events))
    return (found.value - 0.5) / max(found.standard_error, least)
