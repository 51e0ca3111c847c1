"""What a request must be under the approved plan, and what a reply must be to its request.

A site answers what the plan needs and nothing else: free choice of fits, intervals or groups would
let a coordinator subtract one sum from another until a few patients remain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusion import messages as m
from fusion.federation.plan import PROTOCOL
from fusion.federation.totals import is_added, n_added
from fusion.secure_sum import GUARDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fusion.federation.plan import FederationPlan

    Floats = NDArray[np.float64]

# Sums of training rows to which nothing is added; with a privacy budget they are not given.
_NEVER_NOISY = (
    m.AskMoments, m.SetScaling, m.AskProducts, m.AskUpdates, m.SetNetworks, m.AskEdges, m.SetGrid,
)  # fmt: skip
_PAIR_SUMS = 9
_LIFE_SUMS = 3
_CALIBRATION_SUMS = 7
_EXPECTED_SUMS = 3
_DECISION_SUMS = 9


def is_within(request: m.Message, plan: FederationPlan) -> bool:
    """Whether the plan provides for this request, in its names, shapes and grid."""
    if plan.private and isinstance(request, _NEVER_NOISY):
        return False
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


def _products(request: m.AskProducts, plan: FederationPlan) -> bool:
    return _one_of_each(request.designs, tuple(plan.components))


def _components(request: m.SetComponents, plan: FederationPlan) -> bool:
    if not _one_of_each(request.designs, tuple(plan.components)):
        return False
    width = max(plan.n_inputs(design) for design in request.designs)
    return request.axes.shape[1:] == (width, max(plan.components[x] for x in request.designs))


def _sums_request(request: m.AskSums, plan: FederationPlan) -> bool:
    return _one_of_each(request.fits, plan.fits) and request.coefficients.shape[1] == max(
        plan.n_coefficients(fit) for fit in request.fits
    )


def _whole_or_folded(fits: Sequence[str], known: Sequence[str], plan: FederationPlan) -> bool:
    """Whether each encoder comes with every fold's or with none: a lone one marks its patients."""
    named = set(fits)
    if len(named) != len(fits):
        return False
    for modality in {fit.partition("/")[0] for fit in named}:
        folds = set(plan.fold_fits(modality))
        if not {modality} <= named & set(known) or named & folds not in (set(), folds):
            return False
    return named <= {*known, *(x for name in known for x in plan.fold_fits(name))}


def _encoders(request: m.SetEncoders, plan: FederationPlan) -> bool:
    return _whole_or_folded(request.fits, tuple(plan.sums), plan) and request.coefficients.shape[
        1
    ] == max(plan.n_coefficients(fit) for fit in request.fits)


def _updates(request: m.AskUpdates, plan: FederationPlan) -> bool:
    return (
        _one_of_each(request.fits, plan.network_fits)
        and request.weights.shape[1] == max(plan.n_weights(fit) for fit in request.fits)
        and request.ridge >= 0.0
    )


def _networks(request: m.SetNetworks, plan: FederationPlan) -> bool:
    known = (*plan.networks, *(x for x in plan.network_fits if x == PROTOCOL))
    return _whole_or_folded(request.fits, known, plan) and request.weights.shape[1] == max(
        plan.n_weights(fit) for fit in request.fits
    )


def _edges(request: m.AskEdges, plan: FederationPlan) -> bool:
    return request.edges_days.tolist() == list(plan.edges_days)


def _grid(request: m.SetGrid, plan: FederationPlan) -> bool:
    edges = request.edges_days.tolist()
    kept = [x for x in plan.edges_days if x in edges]
    return edges == kept and edges[-1:] == [plan.edges_days[-1]]


def _intervals(request: m.AskIntervals, plan: FederationPlan) -> bool:
    return request.arms == plan.arms and request.coefficients.shape[1] == plan.n_fusion_inputs


def _evaluation(request: m.AskEvaluation, plan: FederationPlan) -> bool:
    return (
        request.arms == plan.arms
        and request.coefficients.shape[1] == plan.n_fusion_inputs
        and request.baseline.shape[1] == len(plan.edges_days)
        and (plan.n_baseline > 0 or bool((request.baseline >= 0).all()))
        and request.groups.shape[1] == plan.n_risk_groups - 1
        and bool((np.diff(request.groups, axis=1) > 0).all())
        and bool((request.between_site_variance >= 0).all())
    )


def _roster(request: m.AskKey | m.SetKeys, plan: FederationPlan) -> bool:
    return plan.secure_sum and len(set(request.roster)) == len(request.roster)


def _steps(request: m.AskPrivateSteps, plan: FederationPlan) -> bool:
    if not (plan.private and _one_of_each(request.fits, plan.private_fits)):
        return False
    return request.coefficients.shape[1] == max(plan.n_coefficients(x) for x in request.fits)


_REQUESTS: dict[type, Any] = {
    m.AskKey: _roster,
    m.SetKeys: _roster,
    m.AskPrivateSteps: _steps,
    m.AskMoments: _moments,
    m.SetScaling: _scaling,
    m.AskProducts: _products,
    m.SetComponents: _components,
    m.AskSums: _sums_request,
    m.SetEncoders: _encoders,
    m.AskUpdates: _updates,
    m.SetNetworks: _networks,
    m.AskEdges: _edges,
    m.SetGrid: _grid,
    m.AskIntervals: _intervals,
    m.AskEvaluation: _evaluation,
}


def _described(request: m.Describe, reply: m.Description, plan: FederationPlan) -> bool:
    return len(reply.contributes) == len(plan.modalities) and (request.trains or not reply.trains)


def _design_moments(request: m.AskMoments, reply: m.DesignMoments, plan: FederationPlan) -> bool:
    shape = (len(request.designs), max(plan.n_inputs(x) for x in request.designs))
    return reply.n.shape == shape and bool((reply.n >= 0).all() and (reply.m2 >= 0).all())


def _product_sums(request: m.AskProducts, reply: m.Products, plan: FederationPlan) -> bool:
    width = max(plan.n_inputs(x) for x in request.designs)
    shape = (len(request.designs), width, width)
    return reply.products.shape == shape and bool((reply.n >= 0).all())


def _sums(request: m.AskSums, reply: m.Sums, plan: FederationPlan) -> bool:
    return reply.gradient.shape == request.coefficients.shape and bool(
        (reply.n_events >= 0).all() and (reply.n_patients >= reply.n_events).all()
    )


def _updated(request: m.AskUpdates, reply: m.Updates, plan: FederationPlan) -> bool:
    return reply.weights.shape == request.weights.shape and bool(
        (reply.n_events >= 0).all() and (reply.n_patients >= reply.n_events).all()
    )


def _releasable(request: m.AskEdges, reply: m.Edges, plan: FederationPlan) -> bool:
    return len(reply.releasable) == len(request.edges_days) - 1


def _interval_sums(request: m.AskIntervals, reply: m.Intervals, plan: FederationPlan) -> bool:
    shape = (len(request.arms), len(plan.edges_days))
    if reply.events.shape != shape or reply.risk.shape != (shape[0], 3):
        return False
    sums = (reply.events, reply.exposure, reply.risk[:, [0, 2]])
    return all(bool((x >= 0).all()) for x in sums)


def _evaluated(request: m.AskEvaluation, reply: m.Evaluation, plan: FederationPlan) -> bool:
    n_edges, n_main, n_groups = len(plan.edges_days), len(plan.main_arms), plan.n_risk_groups
    n_scored, n_treatments = len(plan.scored), len(plan.treatments)
    shapes = {
        "pairs": (n_scored, _PAIR_SUMS),
        "cross": (n_scored,),
        "alone": (len(plan.modalities), _PAIR_SUMS),
        "brier": (n_main + 1, 2 * n_edges + 2),
        "life_table": (n_main, n_groups * n_edges * _LIFE_SUMS),
        "calibration": (n_main, n_groups * _CALIBRATION_SUMS),
        "observed_expected": (n_main, _EXPECTED_SUMS),
        "subgroup_pairs": (plan.n_levels, _PAIR_SUMS),
        "subgroup_expected": (plan.n_levels, _EXPECTED_SUMS),
        "decision": (len(plan.thresholds) * _DECISION_SUMS,),
        "treatment": (n_groups * n_treatments * (n_edges * _LIFE_SUMS + 3 + n_treatments),),
    }
    return all(getattr(reply, name).shape == shape for name, shape in shapes.items())


def _masked(request: m.Message, reply: m.Masked, plan: FederationPlan) -> bool:
    return is_added(request) and len(reply.words) == n_added(request, plan) + GUARDS


def _stepped(request: m.AskPrivateSteps, reply: m.PrivateSteps, plan: FederationPlan) -> bool:
    return reply.gradient.shape == request.coefficients.shape


_REPLIES: dict[type, Any] = {
    m.Masked: _masked,
    m.PrivateSteps: _stepped,
    m.Description: _described,
    m.DesignMoments: _design_moments,
    m.Products: _product_sums,
    m.Sums: _sums,
    m.Updates: _updated,
    m.Edges: _releasable,
    m.Intervals: _interval_sums,
    m.Evaluation: _evaluated,
}
