"""Choice of hyperparameters by inner folds of a site's training rows, within a time budget.

The linear model comes first: its ridge strength is chosen, and networks start from it. Networks
then move away from that start for as many steps as the inner folds support, which may be none: with
a hundred patients it is hard to beat, and a network that cannot beat it should equal it.

Candidates are tried in a fixed order and the budget only ends the list early, so that the number
of candidates tried settles the choice.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusion.cox_loss import TrainingDiverged
from fusion.learner import Learner
from fusion.newton import ConvergenceError
from fusion.survival import cox_sums, fit_cox

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from fusion.cox_loss import Outcome
    from fusion.encoder_inputs import Floats
    from fusion.encoder_spec import EncoderSpec
    from fusion.learner import TrainingRows

# Looking at the inner folds costs as much as a step, and neighbouring steps hardly differ.
_LOOK_EVERY = 5
CRITERION = "negative cross-validated Cox partial log-likelihood per event, lower is better"


class LinearFits:
    """Penalised linear Cox models of some of the same n patients.

    With more inputs than patients and no absolute-value penalty the fits take place in the row
    space, which holds the optimum, and cost what n inputs cost.
    """

    def __init__(self, rows: torch.Tensor, survival: Outcome, *, l1_ratio: float) -> None:
        self.rows, self.l1_ratio = rows.numpy(), l1_ratio
        self.basis: Floats | None = None
        if self.rows.shape[1] > len(self.rows) and l1_ratio == 0.0:
            _, values, axes = np.linalg.svd(self.rows, full_matrices=False)
            self.basis = axes[values > 1e-10 * max(values[0], 1e-300)].T
            self.rows = self.rows @ self.basis
        self.event = survival.event.numpy()
        self.time = survival.order.numpy().astype(np.float64) + 1.0
        self.strata = None if survival.strata is None else survival.strata.numpy()

    def fit(
        self, patients: NDArray[np.int64], strength: float, start: Floats | None = None
    ) -> Floats:
        """(r,) coefficients of the fit to some patients, from ``start`` if given.

        Raises
        ------
        TrainingDiverged
            If there is no finite optimum.
        """
        x = self.rows[patients]
        varies = x.min(axis=0, initial=np.inf) < x.max(axis=0, initial=-np.inf)
        found = np.zeros(x.shape[1])
        if not varies.any():
            return found
        try:
            fitted = fit_cox(
                x[:, varies],
                self.event[patients],
                self.time[patients],
                strata=self._strata(patients),
                ridge=strength * (1.0 - self.l1_ratio),
                l1=strength * self.l1_ratio,
                start=None if start is None else start[varies],
            )
        except ConvergenceError:
            raise TrainingDiverged(
                f"linear Cox model: found no finite optimum with ridge {strength:g}, needed one; "
                "raise ridge or drop inputs that repeat others"
            ) from None
        found[varies] = fitted.candidate
        return found

    def expanded(self, coefficients: Floats) -> Floats:
        """(p,) coefficients of the original inputs."""
        return coefficients if self.basis is None else self.basis @ coefficients

    def loss_beyond(self, log_hazard: Floats, patients: NDArray[np.int64]) -> float:
        """Loss of all patients less that of ``patients``: cross-validated partial likelihood.

        Held-out patients are so compared with everyone at risk, not with each other only, of whom
        there are too few [1]_.

        References
        ----------
        .. [1] Verweij PJM, van Houwelingen HC. Cross-validation in survival analysis. Statistics
           in Medicine 1993;12:2305-2314.
        """
        everyone = np.arange(len(self.event))
        return self._loss(log_hazard, everyone) - self._loss(log_hazard, patients)

    def _loss(self, log_hazard: Floats, patients: NDArray[np.int64]) -> float:
        column = np.asarray(log_hazard[patients], dtype=np.float64)[:, None]
        event, time = self.event[patients], self.time[patients]
        sums = cox_sums(column, event, time, [1.0], strata=self._strata(patients))
        return -sums.log_likelihood

    def _strata(self, patients: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return None if self.strata is None else self.strata[patients]


@dataclass(frozen=True, eq=False)
class Trial:
    """Hyperparameters and how their fits did on the inner folds.

    Attributes
    ----------
    spec
        With one ridge strength.
    model
        ``linear`` for the linear model that a network starts from, otherwise the spec's.
    n_steps
        AdamW steps with the least loss, perhaps 0.
    losses
        By number of steps, as :data:`CRITERION` says; empty if a fit diverged.
    """

    spec: EncoderSpec
    model: str
    n_steps: int = 0
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """The least loss; infinite if a fit diverged."""
        return self.losses.get(self.n_steps, math.inf)

    def record(self) -> dict[str, Any]:
        """Plain values for the training record."""
        names = (
            ()
            if self.model in ("linear", "mean_pooling")
            else ("hidden", "dropout", "weight_decay")
        )
        return {
            "model": self.model,
            **{name: getattr(self.spec, name) for name in names},
            "ridge": self.spec.default_ridge,
            "n_steps": self.n_steps,
            "loss": self.loss if self.losses else None,
            "loss_by_step": [[step, loss] for step, loss in self.losses.items()],
        }


@dataclass(frozen=True, eq=False)
class Choice:
    """What the inner folds chose.

    Attributes
    ----------
    spec
        The protocol's, with the hyperparameters chosen and one ridge strength.
    n_steps
        AdamW steps after the linear start.
    history
        Plain values: what was tried in which order, the inner losses, and whether the budget ended
        the list early.
    """

    spec: EncoderSpec
    n_steps: int
    history: dict[str, Any]


def choose(
    data: TrainingRows, survival: Outcome, linear: LinearFits, spec: EncoderSpec, *, seed: int
) -> Choice:
    """Choose the ridge strength and, of a network, its size, decay, dropout and steps.

    Raises
    ------
    TrainingDiverged
        If no candidate could be fitted on the inner folds.
    """
    without_steps = spec.is_linear or spec.max_steps == 0
    if without_steps and len(spec.ridge) == 1:
        return Choice(spec, 0, _history([], 0, spec, is_cut=False))
    search = _Search(data, survival, linear, spec, seed)
    search.try_linear()
    if not without_steps:
        search.try_networks()
    return search.choice()


class _Search:
    """Trials so far, and what they need of each inner fold."""

    def __init__(
        self,
        data: TrainingRows,
        survival: Outcome,
        linear: LinearFits,
        spec: EncoderSpec,
        seed: int,
    ) -> None:
        self.data, self.survival, self.linear = data, survival, linear
        self.spec, self.seed = spec, seed
        folds = inner_folds(survival, spec.inner_folds, seed)
        self.inner = [np.flatnonzero(folds != fold) for fold in range(spec.inner_folds)]
        self.starts: dict[float, list[Floats]] = {}
        self.trials: list[Trial] = []
        self.deadline = monotonic() + spec.time_budget_s
        self.is_cut = False

    def _is_late(self) -> bool:
        self.is_cut = self.is_cut or monotonic() >= self.deadline
        return self.is_cut

    def try_linear(self) -> None:
        """Try the default ridge, then stronger ones, or else weaker ones, while the loss falls.

        Along the strengths the loss has one minimum but for noise, and weak ones cost most.
        """
        at = self.spec.ridge.index(self.spec.default_ridge)
        self._try_ridge(self.spec.ridge[at])
        default = self._best_position()
        self._descend(self.spec.ridge[at + 1 :])
        if self._best_position() == default:
            self._descend(self.spec.ridge[:at][::-1])

    def _descend(self, strengths: tuple[float, ...]) -> None:
        for strength in strengths:
            before = self._best_position()
            if self._is_late():
                return
            self._try_ridge(strength)
            if self._best_position() == before:
                return

    def _try_ridge(self, strength: float) -> None:
        candidate = self.spec.model_copy(update={"ridge": (strength,)})
        model = self.spec.model if self.spec.is_linear else "linear"
        trial = Trial(candidate, model)
        with suppress(TrainingDiverged):
            starts = self._fit_inner(strength)
            trial = Trial(candidate, model, 0, {0: self._linear_loss(starts)})
        self.trials.append(trial)

    def _fit_inner(self, strength: float) -> list[Floats]:
        near = next(reversed(self.starts.values()), [None] * len(self.inner))
        found = [
            self.linear.fit(patients, strength, start)
            for patients, start in zip(self.inner, near, strict=True)
        ]
        self.starts[strength] = found
        return found

    def _linear_loss(self, starts: list[Floats]) -> float:
        rows = self.linear.rows
        return self._mean_loss(rows @ coefficients for coefficients in starts)

    def _mean_loss(self, log_hazards: Iterable[Floats]) -> float:
        """Inner loss per event of log hazards of all patients, one set per inner fold."""
        beyond = [
            self.linear.loss_beyond(log_hazard, patients)
            for log_hazard, patients in zip(log_hazards, self.inner, strict=True)
        ]
        return math.fsum(beyond) / self.survival.n_events

    def try_networks(self) -> None:
        """Try networks that start from the best linear model; the first whatever it costs."""
        start = self._best()
        for position, candidate in enumerate(network_candidates(start.spec)):
            if position > 0 and self._is_late():
                return
            try:
                self.trials.append(self._network_trial(candidate, start.loss))
            except TrainingDiverged:
                self.trials.append(Trial(candidate, candidate.model))

    def _network_trial(self, candidate: EncoderSpec, start_loss: float) -> Trial:
        learners = []
        starts = self.starts[candidate.default_ridge]
        for patients, start in zip(self.inner, starts, strict=True):
            rows = torch.from_numpy(patients)
            own, survival = self.data.at(rows), self.survival.at(rows)
            learners.append(
                Learner(own, survival, candidate, self.linear.expanded(start), self.seed)
            )
        losses, best = {0: start_loss}, 0
        for step in range(1, candidate.max_steps + 1):
            for one in learners:
                one.step()
            if step % _LOOK_EVERY:
                continue
            losses[step] = self._network_loss(learners)
            if losses[step] < losses[best]:
                best = step
            elif step - best >= candidate.patience:
                break
        return Trial(candidate, candidate.model, best, losses)

    def _network_loss(self, learners: list[Learner]) -> float:
        return self._mean_loss(one.log_hazard(self.data).double().numpy() for one in learners)

    def _best_position(self) -> int:
        return min(range(len(self.trials)), key=lambda at: self.trials[at].loss)

    def _best(self) -> Trial:
        best = self.trials[self._best_position()]
        if not math.isfinite(best.loss):
            raise TrainingDiverged(
                "linear Cox model: found no finite optimum on inner folds, needed one; raise "
                "ridge or drop inputs that repeat others"
            )
        return best

    def choice(self) -> Choice:
        best, at = self._best(), self._best_position()
        history = _history(self.trials, at, self.spec, is_cut=self.is_cut)
        return Choice(best.spec, best.n_steps, history)


def _history(
    trials: list[Trial], chosen: int, spec: EncoderSpec, *, is_cut: bool
) -> dict[str, Any]:
    return {
        "criterion": CRITERION,
        "n_inner_folds": spec.inner_folds,
        "tried": [trial.record() for trial in trials],
        "chosen": chosen,
        "cut_by_budget": is_cut,
    }


def network_candidates(spec: EncoderSpec) -> list[EncoderSpec]:
    """Give the networks to try: the spec's own first, then more and less freedom."""
    dropout, decay = max(spec.dropout, 0.5), min(10 * spec.weight_decay, 10.0)
    changes: list[dict[str, float]] = [
        {},
        {"dropout": dropout, "weight_decay": decay},
        {"dropout": dropout, "hidden": min(2 * spec.hidden, 512)},
    ]
    candidates = [spec.model_copy(update=change) for change in changes]
    return list(dict.fromkeys(candidates))


def inner_folds(survival: Outcome, n_folds: int, seed: int) -> NDArray[np.int64]:
    """(n,) fold of each patient: events, and strata within them, are dealt evenly."""
    n = len(survival)
    shuffle = np.random.default_rng([seed, 2]).random(n)
    strata = np.zeros(n) if survival.strata is None else survival.strata.numpy()
    dealt = np.lexsort((shuffle, strata, ~survival.event.numpy()))
    folds = np.empty(n, dtype=np.int64)
    folds[dealt] = np.arange(n) % n_folds
    return folds
