"""Turn the log hazards of many splits into the figures that a benchmark prints."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fusion.evaluation import NoComparablePairs, PairCounts, concordance_index, pair_counts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cross_validation import Figures, Patients, Scored
    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol

    Floats = NDArray[np.float64]

_DIGITS = 6


def report(
    patients: Patients, protocol: StudyProtocol, scored: Sequence[Scored], *, arms: Sequence[str]
) -> Figures:
    """Give what a benchmark prints: who took part, how each arm does, how the fits went.

    ``mean`` and ``sd`` are over splits, each with the concordance of all pairs of its test
    patients. For the other figures pairs are formed between test patients of one split, and added
    over the splits of a repeat, in which every patient is scored once. With several repeats,
    estimates and their intervals are averaged, so that repeating narrows no interval. Data are
    public, so that every site with a comparable pair has its figure, however few its events.
    """
    training = {site for one in scored for site in one.training_sites}
    repeats = [[s for s in scored if s.repeat == r] for r in sorted({s.repeat for s in scored})]
    found: Figures = {
        "sites": {site: _site_counts(patients, site, training) for site in _names(patients)},
        "lowered_minimums": list(protocol.privacy.lowered()),
        "ridge_per_patient": {
            "encoders": {name: protocol.encoder[name].ridge for name in protocol.modalities},
            "fusion": protocol.fusion.ridge,
            "chosen": _chosen(scored),
        },
    }
    for arm in arms:
        found[arm] = _figures(patients, repeats, partial(_of_arm, arm=arm))
    found["local"] = _local_figures(patients, repeats)
    if len(protocol.modalities) > 1:
        found["by_modality"] = {
            name: _modality_figures(patients, repeats, name) for name in protocol.modalities
        }
    return found | {
        "n_folds": len(scored),
        "cross_fitted": sorted({m for one in scored for m in one.cross_fitted}),
        "rounds": max(one.rounds for one in scored),
        "max_coefficient_gap": max(one.max_coefficient_gap for one in scored),
    }


def _chosen(scored: Sequence[Scored]) -> Figures:
    """Per fit, in how many splits the federation chose which penalty."""
    found: dict[str, Counter[str]] = {}
    for one in scored:
        for name, ridge in one.ridge.items():
            found.setdefault(name, Counter())[f"{ridge:.2g}"] += 1
    return {name: dict(sorted(n.items(), key=lambda x: float(x[0]))) for name, n in found.items()}


def _of_arm(one: Scored, arm: str) -> Floats:
    return one.arms[arm]


def _names(patients: Patients) -> list[str]:
    return sorted(set(patients.site.tolist()))


def _site_counts(patients: Patients, site: str, training: set[str]) -> Figures:
    rows = patients.site == site
    return {
        "patients": int(rows.sum()),
        "events": int(patients.event[rows].sum()),
        "trains": site in training,
    }


def _figures(
    patients: Patients, repeats: Sequence[Sequence[Scored]], pick: Callable[[Scored], Floats]
) -> Figures:
    """Concordance over all pairs, over pairs within sites, and as the mean over sites."""
    pooled = [[_pairs(patients, s, pick(s)) for s in splits] for splits in repeats]
    return {
        **_over_folds([_value([pairs]) for of in pooled for pairs in of]),
        "pooled_test": _estimate(pooled),
        **_within_sites(patients, repeats, pick),
    }


def _within_sites(
    patients: Patients, repeats: Sequence[Sequence[Scored]], pick: Callable[[Scored], Floats]
) -> Figures:
    by_site = {
        site: [[_pairs(patients, s, pick(s), site=site) for s in splits] for splits in repeats]
        for site in _names(patients)
    }
    within = [[p for of in by_site.values() for p in of[r]] for r in range(len(repeats))]
    estimates = {site: _estimate(pairs) for site, pairs in by_site.items()}
    values = {site: e["value"] for site, e in estimates.items() if e}
    return {
        "within_site": _estimate(within),
        "site_mean": _mean(list(values.values())),
        "by_site": values,
        "events_by_site": {
            site: sum(int(p.n_events) for p in of[0]) for site, of in by_site.items()
        },
    }


def _over_folds(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean over folds and their standard deviation (ddof 1), None for a single one."""
    found = [x for x in values if x is not None]
    sd = round(float(np.std(found, ddof=1)), _DIGITS) if len(found) > 1 else None
    return {"mean": _mean(found), "sd": sd}


def _pairs(
    patients: Patients, one: Scored, log_hazard: Floats, *, site: str | None = None
) -> PairCounts:
    scored = ~np.isnan(log_hazard)
    if site is not None:
        scored &= patients.site[one.rows] == site
    rows = one.rows[scored]
    return pair_counts(log_hazard[scored], patients.event[rows], patients.time[rows])


def _value(pairs: Sequence[PairCounts]) -> float | None:
    estimate = _estimate([pairs])
    return estimate["value"] if estimate else None


def _estimate(repeats: Sequence[Sequence[PairCounts]]) -> dict[str, float] | None:
    """Mean over the repeats that have a comparable pair."""
    found = []
    for pairs in repeats:
        try:
            found.append(concordance_index(pairs))
        except NoComparablePairs:
            continue
    if not found:
        return None
    return {
        name: round(float(np.mean([getattr(e, name) for e in found])), _DIGITS)
        for name in ("value", "standard_error", "low", "high")
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), _DIGITS) if values else None


def _local_figures(patients: Patients, repeats: Sequence[Sequence[Scored]]) -> Figures:
    """Each site's own model: on the test patients of all sites, and on its own.

    The first is a mean over the models, of their concordance over all pairs and within sites;
    ``mean`` and ``sd`` are of that mean, over folds.
    """
    trained = {site for splits in repeats for one in splits for site in one.local}

    def of_model(site: str) -> Figures:
        return _figures(patients, repeats, lambda s: s.local.get(site, _nothing(s)))

    models = {site: of_model(site) for site in sorted(trained)}
    folds = [_mean_of_models(patients, one) for splits in repeats for one in splits]
    return {
        **_over_folds(folds),
        "pooled_test": _by_model(models, "pooled_test"),
        "within_all_sites": _by_model(models, "within_site"),
        "own": _within_sites(patients, repeats, lambda s: _own_log_hazard(patients, s)),
        "no_local_model": [site for site in _names(patients) if site not in trained],
    }


def _mean_of_models(patients: Patients, one: Scored) -> float | None:
    values = [_value([_pairs(patients, one, x)]) for x in one.local.values()]
    return _mean([x for x in values if x is not None])


def _by_model(models: Mapping[str, Figures], figure: str) -> Figures:
    values = {site: found[figure]["value"] for site, found in models.items() if found[figure]}
    return {"value": _mean(list(values.values())), "by_model": values}


def _nothing(one: Scored) -> Floats:
    return np.full(len(one.rows), np.nan)


def _own_log_hazard(patients: Patients, one: Scored) -> Floats:
    """(n_test,) log hazard of each patient by the model of the patient's own site."""
    found = _nothing(one)
    for site, log_hazard in one.local.items():
        own = patients.site[one.rows] == site
        found[own] = log_hazard[own]
    return found


def _modality_figures(
    patients: Patients, repeats: Sequence[Sequence[Scored]], name: str
) -> Figures:
    """One modality alone, on the patients who have it."""
    found = _figures(patients, repeats, lambda s: s.modalities[name])
    has = ~np.isnan(patients.tables[name]).all(axis=1)
    kept = {key: found[key] for key in ("mean", "sd", "within_site", "pooled_test")}
    return {"patients": int(has.sum()), **kept}
