"""What a request must be under the approved plan, and what a reply must be to its request.

A site answers what the plan needs and nothing else: free choice of fits, intervals or groups would
let a coordinator subtract one sum from another until a few patients remain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusion import messages as m

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fusion.federation.plan import FederationPlan

    Floats = NDArray[np.float64]

_PAIR_SUMS = 9
_LIFE_SUMS = 3
_CALIBRATION_SUMS = 7


def is_within(request: m.Message, plan: FederationPlan) -> bool:
    """Whether the plan provides for this request, in its names, shapes and grid."""
    check = _REQUESTS.get(type(request))
    return check is None or bool(check(request, plan))


def is_reply_to(request: m.Message, reply: m.Message, plan: FederationPlan) -> bool:
    """Whether a reply has the shape that its request calls for, and counts that can be counts."""
    check = _REPLIES.get(type(reply))
    return check is None or bool(check(request, reply, plan))


def _one_of_each(names: Sequence[str], known: Sequence[str]) -> bool:
    return len(set(names)) == len(names) and set(names) <= set(known)


def _moments(request: m.AskMoments, plan: FederationPlan) -> bool:
    return _one_of_each(request.designs, plan.designs)


def _scaling(request: m.SetScaling, plan: FederationPlan) -> bool:
    if not _one_of_each(request.designs, plan.designs):
        return False
    widths = [plan.n_inputs(design) for design in request.designs]
    return request.mean.shape[1] == max(widths) and all(
        (row[:p] > 0).all() for row, p in zip(request.scale, widths, strict=True)
    )


def _fits(fits: Sequence[str], coefficients: Floats, plan: FederationPlan) -> bool:
    return _one_of_each(fits, plan.fits) and coefficients.shape[1] == max(
        plan.n_coefficients(fit) for fit in fits
    )


def _cox_sums(request: m.AskSums, plan: FederationPlan) -> bool:
    return _fits(request.fits, request.coefficients, plan)


def _encoders(request: m.SetEncoders, plan: FederationPlan) -> bool:
    named = set(request.fits)
    # The encoder of all patients, with every fold's or with none: a lone fold marks its patients.
    for modality in {fit.partition("/")[0] for fit in named}:
        folds = set(plan.fold_fits(modality))
        if not {modality} <= named & set(plan.sums) or named & folds not in (set(), folds):
            return False
    return _fits(request.fits, request.coefficients, plan)


def _edges(request: m.AskEdges, plan: FederationPlan) -> bool:
    return request.edges_days.tolist() == list(plan.edges_days)


def _of_grid(edges_days: Floats, plan: FederationPlan) -> bool:
    edges = edges_days.tolist()
    return edges == [x for x in plan.edges_days if x in edges] and edges[-1:] == [
        plan.edges_days[-1]
    ]


def _intervals(request: m.AskIntervals, plan: FederationPlan) -> bool:
    return (
        request.arms == plan.arms
        and request.coefficients.shape[1] == plan.n_fusion_inputs
        and _of_grid(request.edges_days, plan)
    )


def _evaluation(request: m.AskEvaluation, plan: FederationPlan) -> bool:
    return (
        request.arms == plan.arms
        and request.coefficients.shape[1] == plan.n_fusion_inputs
        and _of_grid(request.edges_days, plan)
        and bool((request.hazard_per_day >= 0).all())
        and request.groups.shape[1] == plan.n_risk_groups - 1
        and bool((np.diff(request.groups, axis=1) > 0).all())
        and request.horizon_days == plan.horizon_days
    )


_REQUESTS: dict[type, Any] = {
    m.AskMoments: _moments,
    m.SetScaling: _scaling,
    m.AskSums: _cox_sums,
    m.SetEncoders: _encoders,
    m.AskEdges: _edges,
    m.AskIntervals: _intervals,
    m.AskEvaluation: _evaluation,
}


def _described(request: m.Describe, reply: m.Description, plan: FederationPlan) -> bool:
    return len(reply.contributes) == len(plan.modalities)


def _design_moments(request: m.AskMoments, reply: m.DesignMoments, plan: FederationPlan) -> bool:
    shape = (len(request.designs), max(plan.n_inputs(x) for x in request.designs))
    return reply.n.shape == shape and bool((reply.n >= 0).all() and (reply.m2 >= 0).all())


def _sums(request: m.AskSums, reply: m.Sums, plan: FederationPlan) -> bool:
    return reply.gradient.shape == request.coefficients.shape and bool(
        (reply.n_events >= 0).all() and (reply.n_patients >= reply.n_events).all()
    )


def _releasable(request: m.AskEdges, reply: m.Edges, plan: FederationPlan) -> bool:
    return len(reply.releasable) == len(request.edges_days) - 1


def _interval_sums(request: m.AskIntervals, reply: m.Intervals, plan: FederationPlan) -> bool:
    shape = (len(request.arms), len(request.edges_days))
    if reply.events.shape != shape or reply.risk.shape != (shape[0], 3):
        return False
    sums = (reply.events, reply.exposure, reply.risk[:, [0, 2]])
    return all(bool((x >= 0).all()) for x in sums)


def _evaluated(request: m.AskEvaluation, reply: m.Evaluation, plan: FederationPlan) -> bool:
    n_arms, n_edges = len(request.arms), len(request.edges_days)
    return (
        reply.pairs.shape in ((n_arms, _PAIR_SUMS), (n_arms + 1, _PAIR_SUMS))
        and reply.brier.shape == (n_arms + 1, 2 * n_edges + 2)
        and reply.life_table.shape == (n_arms, plan.n_risk_groups * n_edges * _LIFE_SUMS)
        and reply.calibration.shape == (n_arms, plan.n_risk_groups * _CALIBRATION_SUMS)
    )


_REPLIES: dict[type, Any] = {
    m.Description: _described,
    m.DesignMoments: _design_moments,
    m.Sums: _sums,
    m.Edges: _releasable,
    m.Intervals: _interval_sums,
    m.Evaluation: _evaluated,
}
