"""The coordinator's side of a study: asks, adds up, and fits; it never sees a row."""

from __future__ import annotations

import time as clock
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy.special import ndtri

from fusion import messages as m
from fusion.federation.checks import is_reply_to
from fusion.federation.plan import PROTOCOL, FederationPlan
from fusion.late import FusionModel, LinearEncoder, baseline_hazard
from fusion.newton import LikelihoodSums, NewtonFit
from fusion.survival import Moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.federation.transport import Transport

    Floats = NDArray[np.float64]

Reply = TypeVar("Reply")


class QuorumNotMet(RuntimeError):
    """Too few sites or patients to fit a consortium's model."""


@dataclass(frozen=True)
class RoundRecord:
    """One round as the coordinator saw it."""

    number: int
    stage: str
    n_sites: int
    n_fits: int
    objective: float
    bytes_sent: int
    bytes_received: int
    seconds: float


@dataclass(frozen=True)
class SiteOutcome:
    """How one site took part: its counts, and why it did not where it did not."""

    site: str
    cohort: str = ""
    n_train: int = 0
    n_train_events: int = 0
    n_test: int = 0
    n_test_events: int = 0
    trains: bool = False
    contributes: tuple[str, ...] = ()
    code: str = ""


@dataclass(frozen=True)
class FusionFit:
    """The fusion model of every arm.

    Attributes
    ----------
    models
        Per arm.
    groups
        Per arm, the cuts of the log hazard between risk groups.
    n_patients, n_events
        Behind the protocol arm's fit.
    """

    models: dict[str, FusionModel]
    groups: dict[str, tuple[float, ...]]
    n_patients: int
    n_events: int


@dataclass(frozen=True)
class Fitted:
    """What a run of the federation ends with.

    Attributes
    ----------
    models
        One fusion model per arm.
    encoders
        The consortium's linear encoder of each modality shared as sums.
    evaluations
        Per site that could release one, its evaluation sums.
    fit_rounds
        Per fit, how many sums it took to converge.
    """

    sites: tuple[SiteOutcome, ...]
    models: dict[str, FusionModel]
    encoders: dict[str, LinearEncoder]
    groups: dict[str, tuple[float, ...]]
    evaluations: dict[str, m.Evaluation]
    fit_rounds: dict[str, int]
    rounds: tuple[RoundRecord, ...]
    n_patients: int
    n_events: int


@dataclass
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

    Notes
    -----
    A site that refuses or cannot be reached leaves the roster with its code and the run goes on
    without it; fits under way keep their coefficients and start over from them, because other
    patients now stand behind their objective.
    """

    plan: FederationPlan
    transport: Transport
    on_round: Callable[[RoundRecord], None] | None = None
    rounds: list[RoundRecord] = field(default_factory=list)
    outcomes: dict[str, SiteOutcome] = field(default_factory=dict)
    fit_rounds: dict[str, int] = field(default_factory=dict)
    _cross_fits: dict[str, bool] = field(default_factory=dict)

    @property
    def roster(self) -> tuple[str, ...]:
        """Sites that train, in a fixed order."""
        return tuple(s for s, o in self.outcomes.items() if o.trains and not o.code)

    @property
    def reachable(self) -> tuple[str, ...]:
        """Sites that train or evaluate."""
        return tuple(s for s, o in self.outcomes.items() if not o.code)

    def _ask(
        self, request: m.Message, expected: type[Reply], sites: Sequence[str], *, stage: str
    ) -> dict[str, Reply]:
        payload = m.encode(request)
        started = clock.perf_counter()
        raw = self.transport.ask(payload, sites)
        replies: dict[str, Reply] = {}
        for site in sites:
            reply = _read(raw.get(site))
            if isinstance(reply, expected) and is_reply_to(request, reply, self.plan):
                replies[site] = reply
            else:
                self._drop(site, reply)
        self.rounds.append(
            RoundRecord(
                number=len(self.rounds) + 1,
                stage=stage,
                n_sites=len(replies),
                n_fits=len(getattr(request, "fits", ())),
                objective=float("nan"),
                bytes_sent=len(payload) * len(sites),
                bytes_received=sum(map(len, raw.values())),
                seconds=clock.perf_counter() - started,
            )
        )
        return replies

    def _drop(self, site: str, reply: object) -> None:
        code = reply.code if isinstance(reply, m.Refused) else "unexpected_reply"
        known = self.outcomes.get(site, SiteOutcome(site))
        self.outcomes[site] = SiteOutcome(**{**known.__dict__, "code": code})

    def _round_done(self, objective: float = float("nan")) -> None:
        last = self.rounds[-1]
        self.rounds[-1] = RoundRecord(**{**last.__dict__, "objective": objective})
        if self.on_round is not None:
            self.on_round(self.rounds[-1])

    @property
    def _number(self) -> int:
        return len(self.rounds) + 1

    def describe(self) -> None:
        """Learn which sites take part, with which modalities.

        Raises
        ------
        QuorumNotMet
            With fewer than two sites, no site above its minimum counts, or too few patients.
        """
        sites = self.transport.sites
        if len(sites) < 2:
            raise QuorumNotMet(
                f"sites: found {len(sites)}, needed at least 2; one site has nothing to federate"
            )
        request = m.Describe(self.plan.run, self.plan.protocol, self.plan.modalities)
        replies = self._ask(request, m.Description, sites, stage="describe")
        for site, reply in replies.items():
            self.outcomes[site] = SiteOutcome(
                site=site,
                cohort=reply.cohort,
                n_train=reply.n_train,
                n_train_events=reply.n_train_events,
                n_test=reply.n_test,
                n_test_events=reply.n_test_events,
                trains=reply.trains,
                contributes=self._named(reply.contributes),
            )
        self.outcomes = {s: self.outcomes[s] for s in sites}
        self._round_done()
        self._require_quorum()
        for modality in self.plan.sums:
            at = self.plan.modalities.index(modality)
            taking_part = [r for r in replies.values() if r.trains and r.contributes[at]]
            self._cross_fits[modality] = bool(taking_part) and all(
                r.cross_fits[at] for r in taking_part
            )

    def _named(self, flags: NDArray[np.bool_]) -> tuple[str, ...]:
        return tuple(x for x, flag in zip(self.plan.modalities, flags, strict=True) if flag)

    def _require_quorum(self) -> None:
        minimum = self.plan.minimum
        if not self.roster:
            raise QuorumNotMet(
                f"training sites: found none above the minimum of {minimum.patients} patients and "
                f"{minimum.events} events after the split; add patients or sites"
            )
        total = sum(self.outcomes[s].n_train for s in self.roster)
        if total < minimum.pooled_patients:
            raise QuorumNotMet(
                f"training patients: found {total} over {len(self.roster)} sites, needed "
                f"{minimum.pooled_patients}; add patients or sites"
            )

    def scale(self, designs: Sequence[str], *, stage: str) -> dict[str, tuple[Floats, Floats]]:
        """Agree on mean and standard deviation of each design's inputs, once for the run.

        Returns
        -------
        dict
            Per design its (p,) mean and (p,) scale over the present training values of all sites.
        """
        ask = m.AskMoments(self.plan.run, self._number, tuple(designs))
        replies = self._ask(ask, m.DesignMoments, self.roster, stage=stage)
        self._round_done()
        self._require_quorum()
        total = _add([Moments(r.n, r.mean, r.m2) for r in replies.values()])
        tell = m.SetScaling(
            self.plan.run, self._number, tuple(designs), total.mean, _ones_for_zero(total.scale)
        )
        self._ask(tell, m.Done, self.reachable, stage=stage)
        self._round_done()
        widths = [self.plan.n_inputs(d) for d in designs]
        return {
            design: (tell.mean[row, :p], tell.scale[row, :p])
            for row, (design, p) in enumerate(zip(designs, widths, strict=True))
        }

    def fit(self, fits: Mapping[str, NewtonFit], *, stage: str) -> None:
        """Advance independent Newton fits together, one message a round, until all converged.

        Raises
        ------
        QuorumNotMet
            If every site has left.
        fusion.survival.ConvergenceError
            If a fit has no finite maximum.

        Notes
        -----
        An encoder whose last site with the modality has left stays unconverged.
        """
        while active := {name: fit for name, fit in fits.items() if self._goes_on(name, fit)}:
            roster = self.roster
            request = m.AskSums(self.plan.run, self._number, tuple(active), _stack(active.values()))
            replies = self._ask(request, m.Sums, roster, stage=stage)
            self._require_quorum()
            if self.roster != roster:
                for fit in fits.values():
                    fit.restart()
                self._round_done()
                continue
            for row, fit in enumerate(active.values()):
                fit.advance(_add([_row(r, row, fit.n_inputs) for r in replies.values()]))
            self._round_done(float(np.mean([fit.objective for fit in active.values()])))
        self.fit_rounds |= {name: fit.rounds for name, fit in fits.items() if fit.converged}

    def _goes_on(self, name: str, fit: NewtonFit) -> bool:
        """Whether a fit needs more sums, and a site still has the modality."""
        return not fit.converged and (
            name in self.plan.arms or name.partition("/")[0] in self._offered
        )

    @property
    def _offered(self) -> set[str]:
        return {x for s in self.roster for x in self.outcomes[s].contributes}

    def fit_encoders(self) -> dict[str, LinearEncoder]:
        """Fit the consortium's linear encoders, with out-of-fold fits where every site allows.

        A modality with no site that may contribute it is left out.
        """
        modalities = [x for x in self.plan.sums if x in self._offered]
        if not modalities:
            return {}
        scaling = self.scale(modalities, stage="encoder_moments")
        fits: dict[str, NewtonFit] = {}
        for modality in modalities:
            names = (modality, *self._folds_of(modality))
            for name in names:
                fits[name] = NewtonFit(
                    n_inputs=self.plan.n_inputs(modality), ridge=self.plan.encoder_ridge[modality]
                )
        self.fit(fits, stage="encoders")
        modalities = [x for x in modalities if fits[x].converged]
        fits = {name: fit for name, fit in fits.items() if name.partition("/")[0] in modalities}
        if not modalities:
            return {}
        tell = m.SetEncoders(self.plan.run, self._number, tuple(fits), _stack(fits.values()))
        self._ask(tell, m.Done, self.reachable, stage="encoders_ready")
        self._round_done()
        return {
            modality: LinearEncoder(
                modality=modality,
                inputs=self.plan.sums[modality],
                mean=scaling[modality][0],
                scale=scaling[modality][1],
                coefficients=fits[modality].candidate,
                cross_fitted=self._cross_fits[modality],
            )
            for modality in modalities
        }

    def _folds_of(self, modality: str) -> tuple[str, ...]:
        return self.plan.fold_fits(modality) if self._cross_fits[modality] else ()

    def fit_fusion(self) -> FusionFit:
        """Fit the fusion model of every arm, its baseline hazard and its risk groups."""
        arms = self.plan.arms
        scaling = self.scale(arms, stage="fusion_moments")
        fits = {
            arm: NewtonFit(n_inputs=self.plan.n_fusion_inputs, ridge=self.plan.fusion_ridge)
            for arm in arms
        }
        self.fit(fits, stage="fusion")
        edges, hazard, risk = self._baseline(fits)
        models = {
            arm: FusionModel(
                modalities=self.plan.modalities,
                mean=scaling[arm][0],
                scale=scaling[arm][1],
                coefficients=fits[arm].candidate,
                covariance=fits[arm].covariance,
                edges_days=edges,
                hazard_per_day=hazard[row],
            )
            for row, arm in enumerate(arms)
        }
        cuts = ndtri(np.arange(1, self.plan.n_risk_groups) / self.plan.n_risk_groups)
        groups = {
            arm: tuple(float(x) for x in risk.mean[row] + cuts * risk.scale[row])
            for row, arm in enumerate(arms)
        }
        of_protocol = fits[PROTOCOL]
        return FusionFit(models, groups, of_protocol.n_patients, of_protocol.n_events)

    def _baseline(self, fits: Mapping[str, NewtonFit]) -> tuple[Floats, Floats, Moments]:
        """Merge the grid until every site passes, then estimate the hazard on it."""
        grid = np.array(self.plan.edges_days)
        replies = self._ask(
            m.AskEdges(self.plan.run, self._number, grid), m.Edges, self.roster, stage="baseline"
        )
        self._round_done()
        self._require_quorum()
        kept = np.logical_and.reduce([r.releasable for r in replies.values()])
        edges = grid[np.append(kept, True)]
        ask = m.AskIntervals(self.plan.run, self._number, tuple(fits), edges, _stack(fits.values()))
        sums = self._ask(ask, m.Intervals, self.roster, stage="baseline")
        self._round_done()
        self._require_quorum()
        hazard = baseline_hazard(
            sum(r.events for r in sums.values()), sum(r.exposure for r in sums.values())
        )
        return edges, hazard, _add([Moments(*r.risk.T) for r in sums.values()])

    def evaluate(self, fusion: FusionFit) -> dict[str, m.Evaluation]:
        """Collect evaluation sums on every site's test rows, external sites included."""
        models = fusion.models
        first = next(iter(models.values()))
        ask = m.AskEvaluation(
            run=self.plan.run,
            round=self._number,
            arms=tuple(models),
            edges_days=first.edges_days,
            coefficients=np.array([x.coefficients for x in models.values()]),
            hazard_per_day=np.array([x.hazard_per_day for x in models.values()]),
            groups=np.array([fusion.groups[arm] for arm in models]),
            horizon_days=float(self.plan.horizon_days),
        )
        asked = tuple(s for s in self.reachable if self.outcomes[s].n_test > 0)
        replies = self._ask(ask, m.Evaluation, asked, stage="evaluation")
        self._round_done()
        return replies

    def fitted(
        self,
        encoders: dict[str, LinearEncoder],
        fusion: FusionFit,
        evaluations: dict[str, m.Evaluation],
    ) -> Fitted:
        """Put together what the run ends with."""
        return Fitted(
            sites=tuple(self.outcomes.values()),
            models=fusion.models,
            encoders=encoders,
            groups=fusion.groups,
            evaluations=evaluations,
            fit_rounds=dict(self.fit_rounds),
            rounds=tuple(self.rounds),
            n_patients=fusion.n_patients,
            n_events=fusion.n_events,
        )


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
    fusion.survival.ConvergenceError
        If a fit has no finite maximum.
    """
    coordinator = Coordinator(plan, transport, on_round=on_round)
    coordinator.describe()
    encoders = coordinator.fit_encoders()
    fusion = coordinator.fit_fusion()
    return coordinator.fitted(encoders, fusion, coordinator.evaluate(fusion))


SumsT = TypeVar("SumsT", LikelihoodSums, Moments)


def _add(parts: Sequence[SumsT]) -> SumsT:
    # In the roster's order: floating-point sums are then the same in every run.
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _read(payload: bytes | None) -> m.Message:
    if payload is None:
        return m.Refused("unreachable")
    try:
        return m.decode(payload)
    except m.MessageError:
        return m.Refused("unreadable_reply")


def _row(reply: m.Sums, row: int, p: int) -> LikelihoodSums:
    return LikelihoodSums(
        float(reply.log_likelihood[row]),
        reply.gradient[row, :p],
        reply.information[row, :p, :p],
        int(reply.n_patients[row]),
        int(reply.n_events[row]),
    )


def _stack(fits: object) -> Floats:
    """(fits, p) candidates padded with zeros to the widest."""
    vectors = [fit.candidate for fit in fits]  # type: ignore[attr-defined]
    stacked = np.zeros((len(vectors), max(map(len, vectors))))
    for row, vector in enumerate(vectors):
        stacked[row, : len(vector)] = vector
    return stacked


def _ones_for_zero(scale: Floats) -> Floats:
    return np.where(scale > 0, scale, 1.0)
