"""Turn the log hazards of many splits into the figures that a benchmark prints."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fusion.evaluation import NoComparablePairs, PairCounts, concordance_index, pair_counts
from fusion.privacy import MinimumCounts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cross_validation import Figures, Patients, Scored
    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol

    Floats = NDArray[np.float64]

_DIGITS = 6
_FEWEST_EVENTS = MinimumCounts().test_events


def report(
    patients: Patients, protocol: StudyProtocol, scored: Sequence[Scored], *, arms: Sequence[str]
) -> Figures:
    """Give what a benchmark prints: who took part, how each arm does, how the fits went.

    Pairs are formed between test patients of one split, and added over the splits of a repeat, in
    which every patient is scored once. With several repeats, estimates and their intervals are
    averaged, so that repeating narrows no interval. A site with fewer test events than a study
    asks for has no figure of its own.
    """
    training = {site for one in scored for site in one.training_sites}
    repeats = [[s for s in scored if s.repeat == r] for r in sorted({s.repeat for s in scored})]
    found: Figures = {
        "sites": {site: _site_counts(patients, site, training) for site in _names(patients)},
        "lowered_minimums": list(protocol.privacy.lowered()),
        "ridge_per_patient": {
            "encoders": {name: protocol.encoder[name].ridge for name in protocol.modalities},
            "fusion": protocol.fusion.ridge,
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
        "cross_fitted": sorted({m for one in scored for m in one.cross_fitted}),
        "rounds": max(one.rounds for one in scored),
        "max_coefficient_gap": max(one.max_coefficient_gap for one in scored),
    }


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
    by_site = {
        site: [[_pairs(patients, s, pick(s), site=site) for s in splits] for splits in repeats]
        for site in _names(patients)
    }
    within = [[p for of in by_site.values() for p in of[r]] for r in range(len(repeats))]
    estimates = {
        site: _estimate(pairs, fewest_events=_FEWEST_EVENTS) for site, pairs in by_site.items()
    }
    return {
        "pooled_test": _estimate([[_pairs(patients, s, pick(s)) for s in x] for x in repeats]),
        "within_site": _estimate(within),
        "site_mean": _mean([e["value"] for e in estimates.values() if e]),
        "by_site": {site: e["value"] if e else None for site, e in estimates.items()},
    }


def _pairs(
    patients: Patients, one: Scored, log_hazard: Floats, *, site: str | None = None
) -> PairCounts:
    scored = ~np.isnan(log_hazard)
    if site is not None:
        scored &= patients.site[one.rows] == site
    rows = one.rows[scored]
    return pair_counts(log_hazard[scored], patients.event[rows], patients.time[rows])


def _estimate(
    repeats: Sequence[Sequence[PairCounts]], *, fewest_events: int = 1
) -> dict[str, float] | None:
    found = []
    for pairs in repeats:
        if sum(p.n_events for p in pairs) < fewest_events:
            return None
        try:
            found.append(concordance_index(pairs))
        except NoComparablePairs:
            return None
    return {
        name: round(float(np.mean([getattr(e, name) for e in found])), _DIGITS)
        for name in ("value", "standard_error", "low", "high")
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), _DIGITS) if values else None


def _local_figures(patients: Patients, repeats: Sequence[Sequence[Scored]]) -> Figures:
    """Each site's own model: on the test patients of all sites, and on its own.

    The first is a mean over the models, of their concordance over all pairs and within sites.
    """
    trained = {site for splits in repeats for one in splits for site in one.local}

    def of_model(site: str) -> Figures:
        return _figures(patients, repeats, lambda s: s.local.get(site, _nothing(s)))

    models = {site: of_model(site) for site in sorted(trained)}
    own = _figures(patients, repeats, lambda s: _own_log_hazard(patients, s))
    values = {
        name: {site: found[name]["value"] for site, found in models.items() if found[name]}
        for name in ("pooled_test", "within_site")
    }
    return {
        "pooled_test": {
            "value": _mean(list(values["pooled_test"].values())),
            "by_model": values["pooled_test"],
        },
        "within_all_sites": {
            "value": _mean(list(values["within_site"].values())),
            "by_model": values["within_site"],
        },
        **{name: own[name] for name in ("within_site", "site_mean", "by_site")},
        "no_local_model": [site for site in _names(patients) if site not in trained],
    }


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
    kept = {key: found[key] for key in ("within_site", "pooled_test")}
    return {"patients": int(has.sum()), **kept}
