"""Alarms of held-out rows: rows that are rows, but not of this disease or not of these patients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from fusion.federation.plan import LOCAL_ONLY
from fusion.federation.self_check import z_from_chance

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fusion import messages as m
    from fusion.evaluation import Estimate, PairCounts
    from fusion.federation.plan import FederationPlan

Alarm = Literal["worse_than_own", "below_chance", "unlike_the_others"]

# One-sided: of the model at a site, and of a site among others.
_TELLS: Final = 2.33
_STANDS_OUT: Final = 3.0


@dataclass(frozen=True)
class SiteAlarm:
    """What a site's test rows say against the consortium's model there, or against the site.

    Attributes
    ----------
    reason
        ``worse_than_own``: the site's own model orders its patients better; ``below_chance``: those
        at higher hazard lived longer; ``unlike_the_others``: the model does much worse than at the
        other sites together.
    z
        In standard errors; the further below zero, the surer.
    """

    site: str
    reason: Alarm
    z: float


def holdout_gain(plan: FederationPlan, evaluations: Mapping[str, m.Evaluation]) -> Estimate | None:
    """Concordance of the consortium's model less that of the sites' own, pooled over test rows.

    Above 0 the consortium is worth it. None where no site tells of both.
    """
    from fusion.evaluation import PairCounts, concordance_difference

    row = plan.scored.index(LOCAL_ONLY)
    both = [e for e in evaluations.values() if e.pairs[0].any() and e.pairs[row].any()]
    if not both:
        return None
    try:
        return concordance_difference(
            [PairCounts.from_vector(e.pairs[0]) for e in both],
            [PairCounts.from_vector(e.pairs[row]) for e in both],
            [float(e.cross[row]) for e in both],
        )
    except ValueError:  # no comparable pair, or counts of other patients
        return None


def site_alarms(
    plan: FederationPlan, evaluations: Mapping[str, m.Evaluation]
) -> tuple[SiteAlarm, ...]:
    """Alarms of all sites, from what they released; a site can ask for its own alone.

    Each is a one-sided test at z = -2.33, but unlike the others at -3: one of a hundred honest
    sites raises it by chance, and so may one whose patients differ. An alarm stops nothing: it is
    for people to look at.
    """
    found: list[SiteAlarm] = []
    for site, evaluation in evaluations.items():
        others = [e for s, e in evaluations.items() if s != site]
        tested: list[tuple[Alarm, float, float]] = [
            ("below_chance", _chance_z(evaluation), -_TELLS),
            ("worse_than_own", _own_z(plan, site, evaluation), -_TELLS),
            ("unlike_the_others", _others_z(evaluation, others), -_STANDS_OUT),
        ]
        found += [SiteAlarm(site, reason, z) for reason, z, least in tested if z < least]
    return tuple(found)


def _pairs_of(evaluation: m.Evaluation) -> PairCounts:
    from fusion.evaluation import PairCounts

    return PairCounts.from_vector(evaluation.pairs[0])


def _chance_z(evaluation: m.Evaluation) -> float:
    return z_from_chance(_pairs_of(evaluation))


def _own_z(plan: FederationPlan, site: str, evaluation: m.Evaluation) -> float:
    gain = holdout_gain(plan, {site: evaluation})
    return gain.value / gain.standard_error if gain and gain.standard_error > 0 else 0.0


def _others_z(evaluation: m.Evaluation, others: Sequence[m.Evaluation]) -> float:
    from fusion.evaluation import NoComparablePairs, concordance_index

    try:
        here = concordance_index(_pairs_of(evaluation))
        there = concordance_index([_pairs_of(e) for e in others if e.pairs[0].any()])
    except (NoComparablePairs, ValueError):
        return 0.0
    error = float(np.hypot(here.standard_error, there.standard_error))
    return (here.value - there.value) / error if error > 0 else 0.0
