"""The coordinator's side of a study: asks, adds up, and fits; it never sees a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtri

from fusion import messages as m
from fusion.averaging import AveragedFit
from fusion.encoder_spec import random_projection
from fusion.evaluation import Estimate, heterogeneity
from fusion.federation.alarms import SiteAlarm, site_alarms, slope_alarms, surest
from fusion.federation.bounds import BoundsBroken, is_stationary
from fusion.federation.conversation import (
    Conversation,
    QuorumNotMet,
    RoundRecord,
    SiteOutcome,
    add,
)
from fusion.federation.fitting import (
    Fit,
    choose_ridges,
    fit_by_averaging,
    fit_from_sums,
    stack,
    sums_of,
)
from fusion.federation.plan import CALIBRATION_SLOPE, PROTOCOL, FederationPlan
from fusion.federation.private_fitting import PrivateFit, PrivateTalk, fit_privately, schedule
from fusion.late import (
    CoxModel,
    GatedModel,
    LinearEncoder,
    LogisticHazardModel,
    baseline_hazard,
)
from fusion.late.gated import initial_gated_weights
from fusion.newton import ConvergenceError, LikelihoodSums, NewtonFit
from fusion.survival import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.evaluation import Heterogeneity
    from fusion.federation.fitting import Checkpoint
    from fusion.federation.plan import AveragingPlan
    from fusion.federation.transport import Transport
    from fusion.late import FusionModel

    Floats = NDArray[np.float64]

_Z = 1.959963984540054


@dataclass(frozen=True)
class Encoders:
    """The consortium's encoders.

    Attributes
    ----------
    linear
        Of each modality shared as sums.
    networks
        Flat weights of each modality's network.
    ridge
        Penalty per patient of each linear encoder.
    """

    linear: dict[str, LinearEncoder] = field(default_factory=dict)
    networks: dict[str, Floats] = field(default_factory=dict)
    ridge: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FusionFit:
    """The fusion model of every arm.

    Attributes
    ----------
    models
        Per arm.
    groups
        Per arm, the cuts of the log hazard between risk groups.
    heterogeneity
        Of the coefficients of the protocol's inputs between sites.
    n_patients, n_events
        Behind the protocol arm's fit.
    ridge
        Its penalty per patient.
    """

    models: dict[str, FusionModel]
    groups: dict[str, tuple[float, ...]]
    heterogeneity: Heterogeneity
    n_patients: int
    n_events: int
    ridge: float


@dataclass(frozen=True)
class Fitted:
    """What a run of the federation ends with.

    Attributes
    ----------
    plan
        With the grid that the run agreed on.
    models
        One fusion model per arm.
    encoders
        The consortium's linear encoder of each modality shared as sums.
    networks
        Flat weights of each network shared by averaging.
    evaluations
        Per site that could release one, its evaluation sums.
    calibration_slope
        Of the protocol's arm, on the test patients of all sites.
    alarms
        What people should look at: sites where the model fails, or that are unlike the others.
    fit_rounds
        Per fit, how many sums it took to converge.
    ridge
        Penalty per patient of each linear encoder, and of the fusion model as ``protocol``.
    """

    plan: FederationPlan
    sites: tuple[SiteOutcome, ...]
    models: dict[str, FusionModel]
    encoders: dict[str, LinearEncoder]
    networks: dict[str, Floats]
    groups: dict[str, tuple[float, ...]]
    heterogeneity: Heterogeneity
    evaluations: dict[str, m.Evaluation]
    calibration_slope: Estimate | None
    alarms: tuple[SiteAlarm, ...]
    fit_rounds: dict[str, int]
    ridge: dict[str, float]
    rounds: tuple[RoundRecord, ...]
    n_patients: int
    n_events: int


class Coordinator:
    """Runs one study over a transport, stage by stage.

    Parameters
    ----------
    plan
        What every party approved.
    transport
        How bytes reach the sites.
    on_round
        Called after every round, for progress and tracking.
    left_out
        Sites that take part as if they had never trained.
    checkpoint
        Where the state of networks under training is kept.
    """

    def __init__(
        self,
        plan: FederationPlan,
        transport: Transport,
        *,
        on_round: Callable[[RoundRecord], None] | None = None,
        left_out: frozenset[str] = frozenset(),
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.talk = Conversation(plan, transport, on_round, left_out)
        self.fit_rounds: dict[str, int] = {}
        self._alarms: tuple[SiteAlarm, ...] = ()
        self._private: PrivateTalk | None = None
        self._checkpoint = checkpoint

    @property
    def plan(self) -> FederationPlan:
        """What every party approved, on the grid that the run agreed on."""
        return self.talk.plan

    def describe(self) -> None:
        """Learn which sites take part, with which modalities; see :meth:`Conversation.describe`."""
        self.talk.describe()

    def _fit(self, fits: Mapping[str, Fit], *, stage: str) -> None:
        fit_from_sums(self.talk, fits, stage=stage)
        for name, fit in fits.items():
            total = list(fit.by_site.values())
            if fit.newton.converged and total and not is_stationary(fit.newton, add(total)):
                raise ConvergenceError(
                    f"{name}: ended off its maximum, needed sums that lead there: a site says at "
                    "every step that one patient outweighs its sums; its own log may say why"
                )
        self.fit_rounds |= {n: fit.newton.rounds for n, fit in fits.items() if fit.newton.converged}

    def _look_at(self, fits: Mapping[str, Fit], *, first: int = 0) -> None:
        """Keep the alarms that the sites' own sums of some fits raise."""
        for fit in fits.values():
            self._alarms += slope_alarms(fit.newton, fit.by_site, first=first)

    def fit_encoders(self) -> Encoders:
        """Fit the consortium's encoders, with out-of-fold fits where every site allows.

        A modality with no site that may contribute it is left out.
        """
        linear, ridge = self._fit_linear()
        return Encoders(linear, self._train_networks(), ridge)

    def _fit_linear(self) -> tuple[dict[str, LinearEncoder], dict[str, float]]:
        offered = [x for x in self.plan.sums if x in self.talk.offered]
        if not offered:
            return {}, {}
        if self.plan.private:
            return self._fit_linear_privately(offered)
        scaling = self.talk.scale(offered, stage="encoder_moments")
        axes = self._reduce([x for x in offered if x in self.plan.components])
        ridge = choose_ridges(self.talk, offered, self._new_encoder, stage="encoder_ridge")
        fits = {
            name: Fit(self._new_encoder(modality, ridge[modality]))
            for modality in offered
            for name in (modality, *self._folds_of(modality))
        }
        self._fit(fits, stage="encoders")
        fitted = [x for x in offered if fits[x].newton.converged]
        self._look_at({x: fits[x] for x in fitted if not self.plan.l1_ratio.get(x)})
        found = {n: f.newton for n, f in fits.items() if n.partition("/")[0] in fitted}
        if not fitted:
            return {}, {}
        coefficients = stack([newton.candidate for newton in found.values()])
        self.talk.tell(
            m.SetEncoders(self.plan.run, self.talk.number, tuple(found), coefficients),
            stage="encoders_ready",
        )
        encoders = {
            modality: LinearEncoder(
                modality=modality,
                inputs=self.plan.sums[modality],
                mean=scaling[modality][0],
                scale=scaling[modality][1],
                coefficients=_unreduced(axes.get(modality), found[modality].candidate),
                cross_fitted=self.talk.cross_fits[modality],
            )
            for modality in fitted
        }
        return encoders, {x: ridge[x] for x in fitted}

    def _fit_linear_privately(
        self, offered: Sequence[str]
    ) -> tuple[dict[str, LinearEncoder], dict[str, float]]:
        """Fit whole encoders of columns that each site has standardised for itself."""
        axes = self._reduce([x for x in offered if x in self.plan.components])
        fits = self._fit_privately(offered, stage="encoders")
        self.talk.tell(
            m.SetEncoders(
                self.plan.run,
                self.talk.number,
                tuple(fits),
                stack([fit.coefficients for fit in fits.values()]),
            ),
            stage="encoders_ready",
        )
        encoders = {
            x: LinearEncoder(
                modality=x,
                inputs=self.plan.sums[x],
                mean=np.zeros(self.plan.n_inputs(x)),
                scale=np.ones(self.plan.n_inputs(x)),
                coefficients=_unreduced(axes.get(x), fit.coefficients),
                cross_fitted=False,
            )
            for x, fit in fits.items()
        }
        return encoders, {x: fit.ridge for x, fit in fits.items()}

    def _fit_privately(self, names: Sequence[str], *, stage: str) -> dict[str, PrivateFit]:
        """Fit from noisy sums; the penalty is the middle one, since choosing one would cost."""
        if self._private is None:
            self._private = PrivateTalk(self.talk, stage=stage)
            self._private.open()
        self._private.stage = stage
        plan = schedule(self.plan.budget, self.plan.private_fits)
        fits = {
            x: PrivateFit(
                self.plan.n_coefficients(x),
                ridge=self.plan.ridges(x)[len(self.plan.ridges(x)) // 2],
            )
            for x in names
        }
        fit_privately(self._private, fits, plan)
        self.fit_rounds |= dict.fromkeys(fits, plan.steps)
        return fits

    def _new_encoder(self, modality: str, ridge: float) -> NewtonFit:
        share = self.plan.l1_ratio.get(modality, 0.0)
        return NewtonFit(
            n_inputs=self.plan.n_coefficients(modality), ridge=ridge * (1 - share), l1=ridge * share
        )

    def _folds_of(self, modality: str) -> tuple[str, ...]:
        return self.plan.fold_fits(modality) if self.talk.cross_fits[modality] else ()

    def _reduce(self, modalities: Sequence[str]) -> dict[str, Floats]:
        """(p, k) axes of a PCA over all sites, or of a random projection where a site refuses."""
        if not modalities:
            return {}
        allowed = [x for x in modalities if self.talk.reduces[x] and not self.plan.private]
        axes = {
            x: random_projection(self.plan.n_inputs(x), self.plan.components[x], 0)
            for x in modalities
        }
        if allowed:
            ask = m.AskProducts(self.plan.run, self.talk.number, tuple(allowed))
            replies = self.talk.collect_all(ask, m.Products, stage="components")
            self.talk.round_done()
            products = add([r.products for r in replies.values()])
            for row, x in enumerate(allowed):
                p = self.plan.n_inputs(x)
                axes[x] = _principal_axes(products[row, :p, :p], self.plan.components[x])
        shape = np.array([a.shape for a in axes.values()]).max(axis=0)
        padded = np.zeros((len(axes), *shape))
        for row, of in enumerate(axes.values()):
            padded[row, : of.shape[0], : of.shape[1]] = of
        self.talk.tell(
            m.SetComponents(self.plan.run, self.talk.number, tuple(axes), padded),
            stage="components",
        )
        return axes

    def _train_networks(self) -> dict[str, Floats]:
        offered = [x for x in self.plan.networks if x in self.talk.offered]
        fits = {
            name: _averaged(self.plan.networks[x], self.plan.networks[x].start)
            for x in offered
            for name in (x, *self._folds_of(x))
        }
        if not fits:
            return {}
        self._average(fits, stage="networks")
        trained = {n: f for n, f in fits.items() if fits[n.partition("/")[0]].converged}
        if trained:
            self._tell_networks(trained)
        return {x: fits[x].candidate for x in offered if x in trained}

    def _average(self, fits: dict[str, AveragedFit], *, stage: str, ridge: float = 0.0) -> None:
        fit_by_averaging(self.talk, fits, stage=stage, ridge=ridge, checkpoint=self._checkpoint)

    def _tell_networks(self, fits: Mapping[str, AveragedFit]) -> None:
        weights = stack([fit.candidate for fit in fits.values()])
        self.talk.tell(
            m.SetNetworks(self.plan.run, self.talk.number, tuple(fits), weights), stage="networks"
        )

    def fit_fusion(self) -> FusionFit:
        """Fit the fusion model of every arm, its baseline hazard and its risk groups."""
        if self.plan.private:
            return self._fit_fusion_privately()
        edges = self.talk.agree_on_grid()
        arms = self.plan.arms
        scaling = self.talk.scale(arms, stage="fusion_moments")
        ridge = choose_ridges(self.talk, [PROTOCOL], self._new_fusion, stage="fusion_ridge")
        fits = {arm: Fit(self._new_fusion(arm, ridge[PROTOCOL])) for arm in arms}
        self._fit(fits, stage="fusion")
        gated = self._train_gates(fits[PROTOCOL].newton.candidate, ridge[PROTOCOL])
        hazard, risk = self._baseline({arm: self._slopes(fit) for arm, fit in fits.items()})
        gates = {PROTOCOL: gated}
        models = {
            arm: self._model(
                fits[arm].newton.candidate,
                fits[arm].newton.covariance,
                {"mean": scaling[arm][0], "scale": scaling[arm][1], "edges_days": edges},
                hazard[row],
                gates.get(arm),
            )
            for row, arm in enumerate(arms)
        }
        groups = self._groups(risk, arms)
        fit = fits[PROTOCOL]
        self._look_at({PROTOCOL: fit}, first=self.plan.n_baseline)
        return FusionFit(
            models=models,
            groups=groups,
            heterogeneity=self._heterogeneity(fit),
            n_patients=fit.newton.n_patients,
            n_events=fit.newton.n_events,
            ridge=ridge[PROTOCOL],
        )

    def _fit_fusion_privately(self) -> FusionFit:
        found = self._fit_privately([PROTOCOL], stage="fusion")[PROTOCOL]
        hazard, risk = self._baseline({PROTOCOL: found.coefficients})
        n = len(self.plan.modalities)
        scaling = {
            "mean": np.zeros(n),
            "scale": np.ones(n),
            "edges_days": np.array(self.plan.edges_days),
        }
        p, events = found.n_inputs, round(found.n_events)
        nothing = LikelihoodSums(0.0, np.zeros(p), np.zeros((p, p)), int(found.n_patients), events)
        model = self._model(found.coefficients, found.covariance, scaling, hazard[0], None)
        return FusionFit(
            models={PROTOCOL: model},
            groups=self._groups(risk, (PROTOCOL,)),
            heterogeneity=heterogeneity(found.coefficients, [nothing]),
            n_patients=int(found.n_patients),
            n_events=events,
            ridge=found.ridge,
        )

    def _groups(self, risk: Moments, arms: Sequence[str]) -> dict[str, tuple[float, ...]]:
        """Per arm the cuts of the log hazard between risk groups, at normal quantiles."""
        cuts = ndtri(np.arange(1, self.plan.n_risk_groups) / self.plan.n_risk_groups)
        return {
            arm: tuple(float(x) for x in risk.mean[row] + cuts * risk.scale[row])
            for row, arm in enumerate(arms)
        }

    def _new_fusion(self, arm: str, ridge: float) -> NewtonFit:
        free = np.zeros(self.plan.n_baseline)
        penalised = np.full(self.plan.n_fusion_inputs, ridge)
        return NewtonFit(
            n_inputs=self.plan.n_coefficients(arm), ridge=np.concatenate([free, penalised])
        )

    def _slopes(self, fit: Fit) -> Floats:
        return fit.newton.candidate[self.plan.n_baseline :]

    def _train_gates(self, coefficients: Floats, ridge: float) -> Floats | None:
        if self.plan.gating is None or self.plan.fusion_model != "gated":
            return None
        start = initial_gated_weights(coefficients, hidden=self.plan.gating_hidden)
        fits = {PROTOCOL: _averaged(self.plan.gating, start)}
        self._average(fits, stage="gates", ridge=ridge)
        self._tell_networks(fits)
        return fits[PROTOCOL].candidate

    def _model(
        self,
        coefficients: Floats,
        covariance: Floats,
        scaling: dict[str, Floats],
        hazard: Floats,
        gates: Floats | None,
    ) -> FusionModel:
        k = self.plan.n_baseline
        of_arm: dict[str, Any] = {
            "modalities": self.plan.modalities,
            "coefficients": coefficients[k:],
            "covariance": covariance[k:, k:],
            **scaling,
        }
        if k:
            return LogisticHazardModel(**of_arm, alpha=coefficients[:k])
        if gates is not None:
            hidden = self.plan.gating_hidden
            return GatedModel(**of_arm, hazard_per_day=hazard, weights=gates, hidden=hidden)
        return CoxModel(**of_arm, hazard_per_day=hazard)

    def _heterogeneity(self, fit: Fit) -> Heterogeneity:
        """Of the inputs' coefficients; the baseline is each site's own matter."""
        of_sites = list(fit.by_site.values())
        return heterogeneity(fit.newton.candidate, of_sites, first=self.plan.n_baseline)

    def _baseline(self, coefficients: Mapping[str, Floats]) -> tuple[Floats, Moments]:
        """(arms, k) hazard per day in each interval, and the moments of each arm's log hazard."""
        ask = m.AskIntervals(
            self.plan.run,
            self.talk.number,
            tuple(coefficients),
            np.array(list(coefficients.values())),
        )
        sums = self.talk.collect_all(ask, m.Intervals, stage="baseline")
        self.talk.round_done()
        hazard = baseline_hazard(
            sum(r.events for r in sums.values()), sum(r.exposure for r in sums.values())
        )
        return hazard, add([Moments(*r.risk.T) for r in sums.values()])

    def evaluate(self, fusion: FusionFit) -> dict[str, m.Evaluation]:
        """Collect evaluation sums on every site's test rows, external sites included."""
        models = fusion.models
        ask = m.AskEvaluation(
            run=self.plan.run,
            round=self.talk.number,
            arms=tuple(models),
            coefficients=np.array([x.coefficients for x in models.values()]),
            baseline=np.array([x.baseline for x in models.values()]),
            groups=np.array([fusion.groups[arm] for arm in models]),
            between_site_variance=np.nan_to_num(fusion.heterogeneity.tau_squared, nan=0.0),
        )
        outcomes = self.talk.outcomes
        asked = tuple(
            s
            for s in self.talk.reachable
            if outcomes[s].n_test > 0 and (s in self.talk.left_out or not self.plan.brief)
        )
        replies = self.talk.ask(ask, m.Evaluation, asked, stage="evaluation")
        self.talk.round_done()
        return replies

    def calibration_slope(self, evaluated: Sequence[str]) -> Estimate | None:
        """Model of the test patients on the protocol's log hazard alone, by site.

        It is a Cox model stratified by site, or the discrete-time model with its own log odds of
        the intervals and a free intercept of each site.

        Returns
        -------
        Estimate or None
            Its coefficient, 1 where predictions are neither too extreme nor too alike; None where
            no site can tell or it has no finite maximum.
        """
        fit = NewtonFit(n_inputs=1, start=np.ones(1))
        asked = tuple(evaluated)
        try:
            while asked and not fit.converged:
                at = fit.candidate[None, :]
                ask = m.AskSums(self.plan.run, self.talk.number, (CALIBRATION_SLOPE,), at)
                # Whoever cannot tell the slope has taken part in all the rest, and stays.
                replies = self.talk.ask(ask, m.Sums, asked, stage="calibration", forgiving=True)
                self.talk.round_done()
                if len(replies) < len(asked):
                    asked = tuple(replies)
                    fit.restart()
                    continue
                fit.advance(add([sums_of(r, 0, 1) for r in replies.values()]))
        except ConvergenceError:
            return None
        if not fit.converged or not fit.covariance[0, 0] > 0.0:
            return None
        value, error = float(fit.candidate[0]), float(np.sqrt(fit.covariance[0, 0]))
        return Estimate(value, error, value - _Z * error, value + _Z * error)

    def fitted(
        self,
        encoders: Encoders,
        fusion: FusionFit,
        evaluations: dict[str, m.Evaluation],
        calibration_slope: Estimate | None,
    ) -> Fitted:
        """Put together what the run ends with."""
        return Fitted(
            plan=self.plan,
            sites=tuple(self.talk.outcomes.values()),
            models=fusion.models,
            encoders=encoders.linear,
            networks=encoders.networks,
            groups=fusion.groups,
            heterogeneity=fusion.heterogeneity,
            evaluations=evaluations,
            calibration_slope=calibration_slope,
            alarms=(*surest(self._alarms), *site_alarms(self.plan, evaluations)),
            fit_rounds=dict(self.fit_rounds),
            ridge=encoders.ridge | {PROTOCOL: fusion.ridge},
            rounds=tuple(self.talk.rounds),
            n_patients=fusion.n_patients,
            n_events=fusion.n_events,
        )

    def run(self) -> Fitted:
        """Go through all stages; see :func:`run_federation`."""
        self.describe()
        encoders = self.fit_encoders()
        fusion = self.fit_fusion()
        evaluations = self.evaluate(fusion)
        slope = None if self.plan.brief else self.calibration_slope(tuple(evaluations))
        return self.fitted(encoders, fusion, evaluations, slope)


def run_federation(
    plan: FederationPlan,
    transport: Transport,
    *,
    on_round: Callable[[RoundRecord], None] | None = None,
) -> Fitted:
    """Run a whole study: describe, encoders, fusion, baseline, evaluation.

    Raises
    ------
    QuorumNotMet
        If too few sites or patients remain at any stage.
    fusion.newton.ConvergenceError
        If a fit has no finite maximum.
    """
    return Coordinator(plan, transport, on_round=on_round).run()


def leave_one_site_out(
    plan: FederationPlan, transport: Transport, sites: Sequence[SiteOutcome]
) -> dict[tuple[str, ...], Fitted | str]:
    """Repeat the study without each training site, and evaluate it there on all of its patients.

    With more training sites than runs, sites are left out in groups.

    Parameters
    ----------
    plan
        Whose approved protocol allows it.
    sites
        Of the study's own run.

    Returns
    -------
    dict
        Per group of sites, what was fitted without them, or why nothing was.
    """
    training = [s for s in sites if s.trains and not s.code]
    runs = plan.left_out_runs[: len(training)]
    groups: list[list[str]] = [[] for _ in runs]
    for at, site in enumerate(sorted(training, key=lambda s: -s.n_train)):
        groups[at % len(runs)].append(site.site)
    found: dict[tuple[str, ...], Fitted | str] = {}
    for run, group in zip(runs, groups, strict=True):
        coordinator = Coordinator(plan.left_out_plan(run), transport, left_out=frozenset(group))
        try:
            found[tuple(group)] = coordinator.run()
        except (QuorumNotMet, ConvergenceError, BoundsBroken) as error:
            found[tuple(group)] = type(error).__name__
    return found


def _averaged(plan: AveragingPlan, start: Floats) -> AveragedFit:
    return AveragedFit(candidate=np.asarray(start), rule=plan.rule, max_rounds=plan.rounds)


def _unreduced(axes: Floats | None, coefficients: Floats) -> Floats:
    return coefficients if axes is None else axes @ coefficients


def _principal_axes(products: Floats, k: int) -> Floats:
    """(p, k) leading eigenvectors, each with its largest entry positive."""
    axes = np.linalg.eigh(products)[1][:, ::-1][:, :k]
    largest = axes[np.abs(axes).argmax(axis=0), np.arange(k)]
    return np.asarray(axes * np.where(largest < 0, -1.0, 1.0))
