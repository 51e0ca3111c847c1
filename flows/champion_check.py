"""A registered model evaluated again, on what its sites have released since.

The messages are those of a study run: the sites are told the model's own encoders and coefficients
in place of newly fitted ones, so that nothing is fitted and nothing new can cross. At a site each
such evaluation counts as an answer about the snapshot, as those of study runs do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flows.gates import Figure, arm_figure, difference
from fusion import messages as m
from fusion.evaluation import heterogeneity
from fusion.federation import PROTOCOL, Coordinator, summarise
from fusion.federation.conversation import add
from fusion.federation.coordinator import Encoders, FusionFit
from fusion.late import CoxModel, GatedModel, LinearEncoder, LogisticHazardModel
from fusion.newton import LikelihoodSums
from fusion.survival import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from flows.policy import MonitoringPolicy
    from fusion.evaluation import Estimate
    from fusion.federation import FederationPlan, StudyResults, Transport
    from fusion.federation.conversation import Conversation, RoundRecord
    from fusion.late import FusionModel

    Floats = NDArray[np.float64]

FIGURES: Final = ("concordance", "observed_expected", "calibration_slope", "uno", "auc")


@dataclass(frozen=True)
class Registered:
    """A model as its run left it, every arm of it.

    Attributes
    ----------
    models
        Per arm of the plan.
    groups
        Cuts of the log hazard between risk groups.
    record
        The run's ``record.json``.
    """

    encoders: Mapping[str, LinearEncoder]
    networks: Mapping[str, Floats]
    models: Mapping[str, FusionModel]
    groups: tuple[float, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Shift:
    """How one input differs from when the model was fitted.

    Attributes
    ----------
    name
        ``modality/column``, or a modality for its log hazard.
    shift
        Of the mean, in the standard deviation of then; None where too few patients have it now.
    spread_ratio
        Standard deviation now over then.
    """

    name: str
    shift: float | None
    spread_ratio: float | None


@dataclass(frozen=True)
class Again:
    """What the evaluation found.

    Attributes
    ----------
    cohorts
        Digest per site, under its own secret, of what it evaluated on.
    now, then
        Figures of the protocol's model on test patients, by name; absent where hidden.
    by_site
        Concordance now, per site that may tell it.
    missing
        Share of training patients without each modality; NaN under a privacy budget.
    event_rate, event_rate_then
        Share of test patients with an event, over sites that tell both counts.
    codes
        Per site that did not take part to the end, why.
    """

    cohorts: dict[str, str]
    now: dict[str, Figure]
    then: dict[str, Figure]
    by_site: dict[str, Figure]
    shifts: tuple[Shift, ...]
    missing: dict[str, float]
    event_rate: float
    event_rate_then: float
    codes: dict[str, str] = field(default_factory=dict)

    @property
    def loss(self) -> Figure | None:
        """Concordance then less now; its patients are partly the same, the interval is too wide."""
        pair = self.then.get("concordance"), self.now.get("concordance")
        return None if None in pair else difference(*pair)  # type: ignore[arg-type]


def registered_model(
    record: Mapping[str, Any], encoders: Mapping[str, Any], networks: Mapping[str, Any]
) -> Registered:
    """Read a model back from what its run logged.

    Parameters
    ----------
    encoders, networks
        The artifacts ``encoders.json`` and ``networks.json``.
    """
    return Registered(
        encoders={name: LinearEncoder.from_dict(dict(x)) for name, x in encoders.items()},
        networks={name: np.array(weights) for name, weights in networks.items()},
        models={arm: _model(values) for arm, values in record["models"].items()},
        groups=tuple(record["risk_groups"]["cuts"]),
        record=record,
    )


def _model(values: Mapping[str, Any]) -> FusionModel:
    beta = np.array([term["coefficient"] for term in values["terms"]])
    of_any: dict[str, Any] = {
        "modalities": tuple(values["modalities"]),
        "mean": np.array(values["mean"]),
        "scale": np.array(values["scale"]),
        "coefficients": beta,
        "covariance": np.zeros((len(beta), len(beta))),  # nothing here asks for errors
        "edges_days": np.array(values["edges_days"]),
    }
    if "alpha" in values:
        return LogisticHazardModel(**of_any, alpha=np.array(values["alpha"]))
    of_any["hazard_per_day"] = np.array(values["hazard_per_day"])
    if "weights" in values:
        return GatedModel(**of_any, weights=np.array(values["weights"]), hidden=values["hidden"])
    return CoxModel(**of_any)


def evaluate_again(
    plan: FederationPlan,
    transport: Transport,
    model: Registered,
    *,
    unless: Callable[[dict[str, str]], bool] = lambda cohorts: False,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Again | None:
    """Evaluate a model on what the sites release now.

    Parameters
    ----------
    unless
        Given the cohorts' digests, says that this was done before: then nothing more is asked.
    on_round
        Called after every round.

    Returns
    -------
    Again or None
        None where ``unless`` said so.

    Raises
    ------
    fusion.federation.QuorumNotMet
        If too few sites or patients take part.
    """
    coordinator = Coordinator(plan, transport, on_round=on_round)
    coordinator.describe()
    cohorts = {s: o.cohort for s, o in coordinator.talk.outcomes.items() if o.cohort}
    if unless(cohorts):
        return None
    shifts, missing = _tell(coordinator.talk, model)
    fusion = _fusion(model)
    evaluations = coordinator.evaluate(fusion)
    slope = coordinator.calibration_slope(tuple(evaluations))
    encoders = Encoders(dict(model.encoders), dict(model.networks))
    fitted = coordinator.fitted(encoders, fusion, evaluations, slope)
    now = summarise(fitted)
    return Again(
        cohorts=cohorts,
        now=_figures(now),
        then={x: f for x in FIGURES if (f := arm_figure(model.record, x)) is not None},
        by_site=_by_site(now),
        shifts=shifts,
        missing=missing,
        event_rate=_rate([(s.n_test_events, s.n_test) for s in fitted.sites]),
        event_rate_then=_rate(
            [(s["n_test_events"], s["n_test"]) for s in model.record["sites"] if not s["code"]]
        ),
        codes={s.site: s.code for s in fitted.sites if s.code},
    )


def _tell(talk: Conversation, model: Registered) -> tuple[tuple[Shift, ...], dict[str, float]]:
    """Give the sites the model's encoders, grid and scales; learn how their inputs are now."""
    plan, main = talk.plan, model.models[PROTOCOL]
    shared = [x for x in plan.sums if x in model.encoders]
    shifts: list[Shift] = []
    if shared and not plan.private:
        now = _moments(talk, shared)
        for row, name in enumerate(shared):
            encoder = model.encoders[name]
            shifts += _shifts(now, row, encoder.mean, encoder.scale,
                              names=[f"{name}/{x}" for x in encoder.inputs])  # fmt: skip
        _set_scaling(talk, {x: (model.encoders[x].mean, model.encoders[x].scale) for x in shared})
    if shared:
        _set_encoders(talk, [model.encoders[x] for x in shared])
    _set_networks(talk, model, main)
    if plan.private:
        return tuple(shifts), dict.fromkeys(plan.modalities, math.nan)
    fused = _moments(talk, [PROTOCOL])
    shifts += _shifts(fused, 0, main.mean, main.scale, names=plan.modalities)
    n_train = sum(talk.outcomes[s].n_train for s in talk.roster)
    shares = [float(min(max(1.0 - n / n_train, 0.0), 1.0)) for n in fused.n[0]]
    _set_grid(talk, main.edges_days)
    _set_scaling(
        talk, {arm: (model.models[arm].mean, model.models[arm].scale) for arm in plan.arms}
    )
    return tuple(shifts), dict(zip(plan.modalities, shares, strict=False))


def _moments(talk: Conversation, designs: Sequence[str]) -> Moments:
    ask = m.AskMoments(talk.plan.run, talk.number, tuple(designs))
    replies = talk.collect_all(ask, m.DesignMoments, stage="drift")
    talk.round_done()
    return add([Moments(r.n, r.mean, r.m2) for r in replies.values()])


def _shifts(
    now: Moments, row: int, mean: Floats, scale: Floats, *, names: Sequence[str]
) -> list[Shift]:
    found = []
    for at, name in enumerate(names):
        told = now.n[row, at] > 1 and scale[at] > 0
        shift = (now.mean[row, at] - mean[at]) / scale[at] if told else None
        ratio = now.scale[row, at] / scale[at] if told else None
        found.append(
            Shift(
                name,
                None if shift is None else float(shift),
                None if ratio is None else float(ratio),
            )
        )
    return found


def _set_scaling(talk: Conversation, scaling: Mapping[str, tuple[Floats, Floats]]) -> None:
    width = max(len(mean) for mean, _ in scaling.values())
    means, scales = np.zeros((len(scaling), width)), np.ones((len(scaling), width))
    for row, (mean, scale) in enumerate(scaling.values()):
        means[row, : len(mean)], scales[row, : len(scale)] = mean, scale
    talk.tell(
        m.SetScaling(talk.plan.run, talk.number, tuple(scaling), means, scales), stage="scaling"
    )


def _set_encoders(talk: Conversation, encoders: Sequence[LinearEncoder]) -> None:
    plan, beta = talk.plan, {x.modality: x.coefficients for x in encoders}
    reduced = {x: _axes(beta[x], plan.components[x]) for x in beta if x in plan.components}
    if reduced:
        shape = np.array([axes.shape for axes in reduced.values()]).max(axis=0)
        padded = np.zeros((len(reduced), *shape))
        for row, (name, axes) in enumerate(reduced.items()):
            padded[row, : axes.shape[0], : axes.shape[1]] = axes
            beta[name] = axes.T @ beta[name]
        talk.tell(
            m.SetComponents(plan.run, talk.number, tuple(reduced), padded), stage="components"
        )
    talk.tell(m.SetEncoders(plan.run, talk.number, tuple(beta), _stacked(beta)), stage="encoders")


def _axes(coefficients: Floats, k: int) -> Floats:
    """(p, k) orthonormal axes that hold the coefficients' direction, so that nothing is lost."""
    start = np.eye(len(coefficients))[:, :k].copy()
    if np.any(coefficients):
        most = int(np.abs(coefficients).argmax())
        start = np.eye(len(coefficients))[:, [i for i in range(len(coefficients)) if i != most]]
        start = np.column_stack([coefficients, start])[:, :k]
    return np.asarray(np.linalg.qr(start)[0])


def _set_networks(talk: Conversation, model: Registered, main: FusionModel) -> None:
    weights = {x: w for x, w in model.networks.items() if x in talk.plan.networks}
    if isinstance(main, GatedModel):
        weights[PROTOCOL] = main.weights
    if weights:
        talk.tell(
            m.SetNetworks(talk.plan.run, talk.number, tuple(weights), _stacked(weights)),
            stage="networks",
        )


def _set_grid(talk: Conversation, edges_days: Floats) -> None:
    talk.tell(m.SetGrid(talk.plan.run, talk.number, edges_days), stage="grid")
    talk.require_quorum()
    talk.plan = replace(talk.plan, edges_days=tuple(edges_days.tolist()))


def _stacked(rows: Mapping[str, Floats]) -> Floats:
    found = np.zeros((len(rows), max(len(x) for x in rows.values())))
    for at, row in enumerate(rows.values()):
        found[at, : len(row)] = row
    return found


def _fusion(model: Registered) -> FusionFit:
    main, totals = model.models[PROTOCOL], model.record["totals"]
    p = len(main.coefficients)
    nothing = LikelihoodSums(0.0, np.zeros(p), np.zeros((p, p)), 0, 0)
    return FusionFit(
        models=dict(model.models),
        groups=dict.fromkeys(model.models, model.groups),
        # Sites shrink no coefficients of their own toward a model that is in use already.
        heterogeneity=heterogeneity(main.coefficients, [nothing]),
        n_patients=totals["n_fitted"],
        n_events=totals["n_fitted_events"],
        ridge=0.0,
    )


def _figures(results: StudyResults) -> dict[str, Figure]:
    arm = results.arms.get(PROTOCOL)
    found = {} if arm is None else {x: _figure(getattr(arm, x)) for x in FIGURES}
    return {name: x for name, x in found.items() if x is not None}


def _figure(estimate: Estimate | None) -> Figure | None:
    if estimate is None:
        return None
    parts = (estimate.value, estimate.standard_error, estimate.low, estimate.high)
    return Figure(*parts) if all(map(math.isfinite, parts)) else None


def _by_site(results: StudyResults) -> dict[str, Figure]:
    arm = results.arms.get(PROTOCOL)
    found = {} if arm is None else {s: _figure(x) for s, x in arm.by_site.items()}
    return {site: x for site, x in found.items() if x is not None}


def _rate(counts: Sequence[tuple[int, int]]) -> float:
    n = sum(n for _, n in counts)
    return sum(events for events, _ in counts) / n if n else math.nan


def alarms(
    found: Again, policy: MonitoringPolicy, *, missing_before: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Say by code what people should look at, one sentence each.

    Parameters
    ----------
    missing_before
        Shares of the evaluation before; none are compared with where there was none.
    """
    raised = {
        "input_shift": _beyond(found, policy),
        "missing_modality": _more_missing(found, missing_before or {}, policy),
        "event_rate": _other_rate(found, policy),
        "concordance": _lost(found, policy),
        "observed_expected": _off(found, policy),
    }
    return {code: sentence for code, sentence in raised.items() if sentence}


def _beyond(found: Again, policy: MonitoringPolicy) -> str:
    moved = [x for x in found.shifts if x.shift is not None and abs(x.shift) > policy.max_shift]
    low, high = 1.0 / policy.max_spread_ratio, policy.max_spread_ratio
    spread = [x for x in found.shifts if x.spread_ratio is not None]
    wide = [x for x in spread if not low <= (x.spread_ratio or 1.0) <= high]
    names = sorted({x.name for x in (*moved, *wide)})
    if not names:
        return ""
    some = ", ".join(names[:8]) + (" and others" if len(names) > 8 else "")
    return (
        f"inputs: found {some} moved by more than {policy.max_shift:g} standard deviations, or "
        f"with a spread that changed by more than {policy.max_spread_ratio:g} times"
    )


def _more_missing(found: Again, before: Mapping[str, float], policy: MonitoringPolicy) -> str:
    changed = [
        f"{x} ({before[x]:.0%} to {share:.0%})"
        for x, share in found.missing.items()
        if x in before and abs(share - before[x]) > policy.max_missing_change
    ]
    if not changed:
        return ""
    return f"patients without a modality: found {', '.join(changed)} since the last evaluation"


def _other_rate(found: Again, policy: MonitoringPolicy) -> str:
    change = found.event_rate - found.event_rate_then
    if not abs(change) > policy.max_event_rate_change:
        return ""
    return (
        f"events among test patients: found {found.event_rate:.0%}, was {found.event_rate_then:.0%}"
    )


def _lost(found: Again, policy: MonitoringPolicy) -> str:
    loss = found.loss
    if loss is None:
        return "concordance: found none now or then, needed both to say that it holds"
    if loss.value <= policy.max_concordance_loss:
        return ""
    return (
        f"concordance: found a loss of {loss.value:.3f} ({loss.low:.3f} to {loss.high:.3f}), "
        f"needed at most {policy.max_concordance_loss:g}"
    )


def _off(found: Again, policy: MonitoringPolicy) -> str:
    ratio, low, high = (
        found.now.get("observed_expected"),
        policy.min_observed_expected,
        policy.max_observed_expected,
    )
    if ratio is None:
        return "observed over expected events: found none, needed it to say that it holds"
    if low <= ratio.value <= high:
        return ""
    return f"observed over expected events: found {ratio.value:.2f}, needed {low:g} to {high:g}"
