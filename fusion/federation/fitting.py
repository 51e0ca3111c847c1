"""Fits that the coordinator advances together from the sites' sums, one message a round for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fusion import messages as m
from fusion.averaging import AveragedFit, WeightsUpdate
from fusion.federation.conversation import add
from fusion.federation.plan import MAX_TRY_ROUNDS, PROTOCOL, site_groups
from fusion.newton import ConvergenceError, LikelihoodSums, NewtonFit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from fusion.federation.conversation import Conversation

    Floats = NDArray[np.float64]


class Checkpoint(Protocol):
    """Where the state of a long fit is kept, so that a killed run goes on from there."""

    def load(self, stage: str) -> dict[str, dict[str, Any]]:
        """State of each fit of a stage as last saved; empty where there is none."""

    def save(self, stage: str, state: dict[str, dict[str, Any]]) -> None:
        """Keep the state of each fit of a stage in place of the last one."""


@dataclass
class Fit:
    """A Newton fit with the sites whose sums it leaves out.

    Attributes
    ----------
    left_out
        Sites whose sums are not added; they are held out of the fit.
    by_site
        Per site its sums at the accepted coefficients.
    is_try
        Whether it only helps to choose a penalty, as every fit that leaves sites out does.
    failed
        Whether such a fit has no finite maximum; any other raises.
    """

    newton: NewtonFit
    left_out: frozenset[str] = frozenset()
    is_try: bool = False
    by_site: dict[str, LikelihoodSums] = field(default_factory=dict)
    failed: bool = False

    @property
    def informative(self) -> float:
        r"""Log-likelihood less the effective number of coefficients; higher is better.

        The latter is :math:`\mathrm{tr}\{H (H + n\lambda)^{-1}\}` over coefficients off the centre.
        """
        if self.failed or not self.newton.converged:
            return -np.inf
        sums = add(list(self.by_site.values()))
        return sums.log_likelihood - float(np.trace(sums.information @ self.newton.covariance))

    @property
    def held_out(self) -> float:
        """Log-likelihood of the sites left out, at coefficients that never saw them."""
        if self.failed or not self.newton.converged:
            return -np.inf
        return sum(self.by_site[s].log_likelihood for s in self.left_out if s in self.by_site)

    def take(self, parts: Mapping[str, LikelihoodSums]) -> None:
        """Advance by the sums of every site at the candidate."""
        asked = self.newton.candidate
        inside = [sums for site, sums in parts.items() if site not in self.left_out]
        if not inside:  # the sites that it was fitted to have left
            self.failed = True
            return
        try:
            self.newton.advance(add(inside))
        except ConvergenceError:
            if not self.is_try:
                raise
            self.failed = True
        if self.newton.accepted is asked:
            self.by_site = dict(parts)
        given_up = self.newton.rounds >= MAX_TRY_ROUNDS and not self.newton.converged
        self.failed |= self.is_try and given_up


def fit_from_sums(talk: Conversation, fits: Mapping[str, Fit], *, stage: str) -> None:
    """Advance independent fits together until all have converged.

    Raises
    ------
    QuorumNotMet
        If every site has left.
    fusion.newton.ConvergenceError
        If a fit has no finite maximum.

    Notes
    -----
    When a site leaves, fits keep their coefficients and start over from them, because other
    patients now stand behind their objective. An encoder whose last site with the modality has left
    stays unconverged.
    """
    while active := {name: fit for name, fit in fits.items() if _goes_on(talk, name, fit)}:
        roster = talk.roster
        coefficients = stack([fit.newton.candidate for fit in active.values()])
        request = m.AskSums(talk.plan.run, talk.number, tuple(active), coefficients)
        replies = talk.collect(request, m.Sums, stage=stage)
        if talk.roster != roster or not replies:
            for fit in fits.values():
                fit.newton.restart()
                if talk.plan.secure_sum:
                    fit.newton.candidate = elsewhere(fit.newton.candidate)
            talk.round_done()
            continue
        for row, fit in enumerate(active.values()):
            fit.take({s: sums_of(r, row, fit.newton.n_inputs) for s, r in replies.items()})
        reached = [fit.newton.objective for fit in fits.values() if not fit.failed]
        whole = bool(reached) and np.isfinite(reached).all()
        talk.round_done(float(np.mean(reached)) if whole else float("nan"))


def elsewhere(coefficients: Floats) -> Floats:
    """(p,) coefficients near these, at which no roster has given sums yet.

    The totals of two rosters at the same coefficients differ by the sums of single sites.
    """
    if coefficients.any():
        return np.asarray(coefficients * (1.0 - 2.0**-6))
    return np.full(len(coefficients), 2.0**-10)


def _goes_on(talk: Conversation, name: str, fit: Fit) -> bool:
    """Whether a fit needs more sums, and a site still has the modality."""
    if fit.newton.converged or fit.failed:
        return False
    design = name.partition("/")[0]
    return design not in talk.plan.sums or design in talk.offered


def sums_of(reply: m.Sums, row: int, p: int) -> LikelihoodSums:
    """Take one fit of p coefficients from a reply that holds several, padded to the widest."""
    return LikelihoodSums(
        float(reply.log_likelihood[row]),
        reply.gradient[row, :p],
        reply.information[row, :p, :p],
        int(reply.n_patients[row]),
        int(reply.n_events[row]),
    )


def stack(vectors: Sequence[Floats]) -> Floats:
    """(fits, p) vectors padded with zeros to the widest."""
    stacked = np.zeros((len(vectors), max(map(len, vectors))))
    for row, vector in enumerate(vectors):
        stacked[row, : len(vector)] = vector
    return stacked


def choose_ridges(
    talk: Conversation,
    designs: Iterable[str],
    new_fit: Callable[[str, float], NewtonFit],
    *,
    stage: str,
) -> dict[str, float]:
    r"""Choose each design's penalty by the partial likelihood of sites that a fit never saw.

    Sites are dealt into at most five groups. Every strength is fitted without each group, and
    judged by :math:`\sum_g \ell_g(\hat\beta_{-g})`, the log-likelihood of each group's own patients
    at coefficients of the others: the cross-validated partial likelihood with sites as folds. It
    needs no further sums and no split of a site's patients, and looks for what holds between sites.
    Of equal strengths the larger one is taken. A penalty is per patient and the chosen fit has more
    of them than those that chose it: what is kept is the penalty of all patients together. With a
    single contributing site, or a single strength, the middle one is taken as it is.

    Under a secure sum nobody is ever left out of a total. Strengths are then judged by the
    log-likelihood of all patients less the effective number of coefficients, which the
    cross-validated partial likelihood tends to.

    Parameters
    ----------
    new_fit
        From a design and a strength to a fit that has not begun.

    References
    ----------
    Verweij and van Houwelingen, Statistics in Medicine 12 (1993) 2305-2314.
    """
    plan = talk.plan
    if plan.secure_sum:
        return _ridges_by_information(talk, designs, new_fit, stage=stage)
    groups = {d: _groups(talk, d) for d in designs}
    chosen = {d: plan.ridges(d)[len(plan.ridges(d)) // 2] for d in groups}
    tried = {d: of for d, of in groups.items() if len(of) > 1 and len(plan.ridges(d)) > 1}
    fits = {
        plan.try_fit(design, strength, group): Fit(new_fit(design, ridge), left_out, is_try=True)
        for design, of in tried.items()
        for strength, ridge in enumerate(plan.ridges(design))
        for group, left_out in enumerate(of)
    }
    fit_from_sums(talk, fits, stage=stage)
    for design, of in tried.items():
        held_out = [
            sum(fits[plan.try_fit(design, strength, group)].held_out for group in range(len(of)))
            for strength in range(len(plan.ridges(design)))
        ]
        if np.isfinite(held_out).any():
            best = max(range(len(held_out)), key=lambda i: (held_out[i], plan.ridges(design)[i]))
            share = np.mean(
                [_share_left(fits[plan.try_fit(design, best, g)]) for g in range(len(of))]
            )
            chosen[design] = float(plan.ridges(design)[best] * share)
    return chosen


def _ridges_by_information(
    talk: Conversation,
    designs: Iterable[str],
    new_fit: Callable[[str, float], NewtonFit],
    *,
    stage: str,
) -> dict[str, float]:
    plan = talk.plan
    tried = {d: plan.ridges(d) for d in designs}
    fits = {
        (design, ridge): Fit(new_fit(design, ridge), is_try=True)
        for design, strengths in tried.items()
        for ridge in strengths
        if len(strengths) > 1
    }
    names = {
        plan.try_fit(design, tried[design].index(ridge), 0): fit
        for (design, ridge), fit in fits.items()
    }
    fit_from_sums(talk, names, stage=stage)
    chosen = {d: of[len(of) // 2] for d, of in tried.items()}
    for design, strengths in tried.items():
        of_design = [r for r in strengths if (design, r) in fits]
        reached = [r for r in of_design if np.isfinite(fits[design, r].informative)]
        if reached:
            chosen[design] = max(reached, key=lambda r: (fits[design, r].informative, r))
    return chosen


def _share_left(fit: Fit) -> float:
    """Share of the patients that a fit did not leave out."""
    everyone = sum(sums.n_patients for sums in fit.by_site.values())
    return fit.newton.n_patients / everyone if everyone else 1.0


def _groups(talk: Conversation, design: str) -> list[frozenset[str]]:
    """Training sites that stand behind a design, in groups of about equal size."""
    behind = [
        s
        for s in talk.roster
        if design not in talk.plan.sums or design in talk.outcomes[s].contributes
    ]
    group_of = site_groups([talk.outcomes[s].n_train for s in behind])
    return [
        frozenset(s for s, g in zip(behind, group_of, strict=True) if g == group)
        for group in sorted(set(group_of))
    ]


def fit_by_averaging(
    talk: Conversation,
    fits: dict[str, AveragedFit],
    *,
    stage: str,
    ridge: float = 0.0,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Train networks by averaging the sites' weights, all in one message a round.

    Parameters
    ----------
    fits
        Per network, changed in place.
    ridge
        Penalty per patient of a gated fusion model's linear weights; a modality's network has that
        of its spec.
    checkpoint
        Where each round's state is kept; a run that was killed goes on from the last one.

    Raises
    ------
    QuorumNotMet
        If every site has left.
    fusion.newton.ConvergenceError
        If weights are no longer finite.
    """
    if checkpoint is not None:
        fits |= {
            name: AveragedFit.from_state(state)
            for name, state in checkpoint.load(stage).items()
            if name in fits
        }
    while active := {name: fit for name, fit in fits.items() if _is_trained(talk, name, fit)}:
        weights, roster = stack([fit.candidate for fit in active.values()]), talk.roster
        request = m.AskUpdates(talk.plan.run, talk.number, tuple(active), weights, ridge)
        replies = talk.collect(request, m.Updates, stage=stage)
        if talk.roster != roster or not replies:  # the best loss so far is of other patients
            for fit in fits.values():
                fit.restart()
                if talk.plan.secure_sum:
                    fit.candidate = elsewhere(fit.candidate)
            talk.round_done()
            continue
        for row, fit in enumerate(active.values()):
            updates = [_update(r, row, len(fit.candidate)) for r in replies.values()]
            fit.advance([x for x in updates if x.n_events > 0])
        talk.round_done(float(np.mean([fit.objective for fit in active.values()])))
        if checkpoint is not None:
            checkpoint.save(stage, {name: fit.state() for name, fit in fits.items()})


def _is_trained(talk: Conversation, name: str, fit: AveragedFit) -> bool:
    design = name.partition("/")[0]
    return not fit.converged and (design == PROTOCOL or design in talk.offered)


def _update(reply: m.Updates, row: int, n_weights: int) -> WeightsUpdate:
    return WeightsUpdate(
        weights=reply.weights[row, :n_weights],
        loss=float(reply.loss[row]),
        n_patients=int(reply.n_patients[row]),
        n_events=int(reply.n_events[row]),
    )
