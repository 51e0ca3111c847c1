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
    from fusion.newton import LikelihoodSums, NewtonFit

Alarm = Literal["worse_than_own", "below_chance", "unlike_the_others", "unlike_in_training"]

# One-sided: of the model at a site, and of a site among others.
_TELLS: Final = 2.33
_STANDS_OUT: Final = 3.0
# What a site reads of itself; of the others it knows nothing.
_OWN_WORDS: Final[dict[Alarm, str]] = {
    "below_chance": "those at higher hazard by the consortium's model lived longer",
    "worse_than_own": "the consortium's model orders them worse than this site's own",
}


@dataclass(frozen=True)
class SiteAlarm:
    """What a site's test rows say against the consortium's model there, or against the site.

    Attributes
    ----------
    reason
        ``worse_than_own``: the site's own model orders its patients better; ``below_chance``: those
        at higher hazard lived longer; ``unlike_the_others``: the model does much worse than at the
        other sites together; ``unlike_in_training``: risk varies in its training rows not as the
        other sites' model says.
    z
        In standard errors; the further below zero, the surer.
    """

    site: str
    reason: Alarm
    z: float


def holdout_gain(
    plan: FederationPlan, evaluations: Mapping[str, m.Evaluation], *, over: str = LOCAL_ONLY
) -> Estimate | None:
    """Concordance of the consortium's model less that of another arm, pooled over test rows.

    Above 0 the consortium's is the better one. None where no site tells of both.

    Parameters
    ----------
    over
        One of the plan's ``scored``; the models of the sites alone, unless told otherwise.
    """
    from fusion.evaluation import PairCounts, concordance_difference

    row = plan.scored.index(over)
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


def own_warnings(plan: FederationPlan, evaluation: m.Evaluation) -> list[str]:
    """Say to a site alone where the consortium's model fails on its own held-out rows.

    Parameters
    ----------
    evaluation
        Of this site.

    Returns
    -------
    list of str
        One sentence per alarm, with no patient in it, for the site's own log.
    """
    return [
        f"held-out patients: found that {_OWN_WORDS[alarm.reason]} (z = {alarm.z:.1f}); look at "
        "the coding of event and time, at the units of the inputs, and at how patients are joined"
        for alarm in site_alarms(plan, {"": evaluation})
    ]


def slope_alarms(
    fit: NewtonFit, by_site: Mapping[str, LikelihoodSums], *, first: int = 0
) -> tuple[SiteAlarm, ...]:
    r"""Alarms from the training sums of each site; in plain mode only, since a total has no sites.

    Asks of each site whether its patients' risks vary as the others' model says: whether the
    calibration slope there is 1. With :math:`g` and :math:`I` the site's sums at the solution and
    :math:`H` the others' penalised information, one Newton step back gives the others' solution
    :math:`b - H^{-1}g`, and another from there the site's slope along it.

    Parameters
    ----------
    fit
        Converged, without L1.
    by_site
        Sums of each site at its coefficients.
    first
        Coefficients before those of the inputs, which are a site's own matter.
    """
    behind = {s: x for s, x in by_site.items() if x.n_events > 0}
    if len(behind) < 2:
        return ()
    z = {site: _slope_z(fit, behind, site, first) for site in behind}
    return tuple(SiteAlarm(s, "unlike_in_training", x) for s, x in z.items() if x < -_STANDS_OUT)


def surest(alarms: Sequence[SiteAlarm]) -> tuple[SiteAlarm, ...]:
    """Keep one alarm for each site and reason: of several fits, that of which it is surest."""
    found: dict[tuple[str, Alarm], SiteAlarm] = {}
    for alarm in sorted(alarms, key=lambda x: x.z):
        found.setdefault((alarm.site, alarm.reason), alarm)
    return tuple(sorted(found.values(), key=lambda x: x.site))


def _slope_z(fit: NewtonFit, behind: Mapping[str, LikelihoodSums], site: str, first: int) -> float:
    here = behind[site]
    everyone = sum(x.n_patients for x in behind.values())
    others = np.diag(np.full(fit.n_inputs, 1e-9) + everyone * np.asarray(fit.ridge))
    for other, sums in behind.items():
        others = others + (sums.information if other != site else 0.0)
    inverse = np.linalg.pinv(others)
    without = fit.candidate - inverse @ here.gradient
    gradient = here.gradient + here.information @ inverse @ here.gradient
    along = np.where(np.arange(fit.n_inputs) < first, 0.0, without)
    pulled = here.information @ along
    variance = float(along @ pulled + pulled @ inverse @ pulled)
    return float(along @ gradient) / float(np.sqrt(variance)) if variance > 0 else 0.0


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
