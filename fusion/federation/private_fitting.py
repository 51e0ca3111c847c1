r"""Fits from noisy sums: no patient's row can be told from what leaves a site.

A Cox score is no sum over patients, because risk sets couple them. What is fitted here is the
piecewise-exponential model [1]_ with the log hazard :math:`\alpha_{sk} + x_i^\top\beta` of patient
:math:`i` at site :math:`s` in interval :math:`k`, whose log-likelihood

.. math::

    \sum_i \sum_k e_{ik} (\alpha_{sk} + x_i^\top\beta)
      - t_{ik} \exp(\alpha_{sk} + x_i^\top\beta)

has a gradient to which each patient, with events :math:`e_{ik}` and days at risk :math:`t_{ik}`,
adds one vector: :math:`x_i (e_i - L_i)` for :math:`\beta` and :math:`e_{ik} - L_{ik}` for the
site's own :math:`\alpha_{sk}`. With narrow intervals it tends to the Cox model stratified by site.

What is protected
-----------------
A patient's row, as against a row that adds nothing, at the site's full noise: it hides the patient
from everyone else together, the other sites included. The site's :math:`\alpha` follows from its
noisy sums alone. Against an exchange of one row for another, epsilon is that of half the noise.

The guarantee is for the columns as given. It takes as known: the number of patients, the site's own
standardisation of its columns, its own local encoders (which never leave), and all that is not a
noisy sum, such as whether a site passes its minimum counts and its evaluation on test patients.

References
----------
.. [1] Holford TR. The analysis of rates and of survivorship using log-linear models. Biometrics
   1980;36:299-305.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from fusion import messages as m
from fusion.differential_privacy import BudgetSpent, noise_multiplier, noisy_sum
from fusion.federation.designs import NotReleased
from fusion.federation.fitting import stack
from fusion.federation.plan import PROTOCOL
from fusion.keys import canonical_json, digest
from fusion.survival import check_outcome, moments

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from fusion.differential_privacy import Budget, PrivacyLedger
    from fusion.federation.conversation import Conversation
    from fusion.federation.rows import Outcome

    Floats = NDArray[np.float64]

OPENING: Final = 0
ONE_SHOT_EPSILON: Final = 1.0
_OPENING_SHARE: Final = 0.08
_BASELINE_SHARE: Final = 0.12
_MOST_LOG_HAZARD: Final = 30.0
# Of the patients behind a fit, the least and the most that are taken to have an event, and of the
# grid's length, that they are followed for, whatever the noise says.
_LEAST_SHARE: Final = 0.05
# A site's intervals differ in their events: a step that is right for the average would be too long
# for the fullest.
_CAUTION: Final = 1.5
# Of a log hazard whose inputs are standardised, the variance lies here, whatever the noise says.
_RISK_VARIANCE: Final = (0.25, 4.0)
# Intervals of a site differ in their log hazards with about this standard deviation, and what the
# steps settle on is within this share of the events.
_INTERVAL_SPREAD: Final = 0.5
_SETTLED_WITHIN: Final = 0.2
# Clipping stretches coefficients by 2 to 10% in simulations; one step from no effect finds less
# than half.
_BIAS_OF_STEPS: Final = 0.15
_BIAS_OF_ONE_SHOT: Final = 1.5


@dataclass(frozen=True)
class Schedule:
    """How a study's budget is spent: which releases there are, and with how much noise each.

    Attributes
    ----------
    fits
        Encoders fitted from sums, each whole because folds would multiply the releases, and the
        fusion model.
    steps
        Releases of each fit; a single one is a score at no effect.
    opening, step, baseline
        Noise multiplier of the first release of a site (events and days at risk), of each step of
        each fit, and of the last release (baseline hazard and risk groups).
    """

    budget: Budget
    fits: tuple[str, ...]
    steps: int
    opening: float
    step: float
    baseline: float


def n_steps(epsilon: float) -> int:
    """Count the steps: one up to :data:`ONE_SHOT_EPSILON`, then two per epsilon, 4 to 20."""
    return 1 if epsilon <= ONE_SHOT_EPSILON else int(min(max(round(2.0 * epsilon), 4), 20))


def schedule(budget: Budget, fits: Sequence[str], *, steps: int | None = None) -> Schedule:
    """Split a budget: 8% of the precision for the opening, 12% for the baseline, the rest to fits.

    The precision of a release is one over its squared noise multiplier; precisions of releases add,
    exactly. Fits share alike, and so do the steps of a fit.

    Parameters
    ----------
    steps
        Of each fit; :func:`n_steps` where None.

    Raises
    ------
    ValueError
        If the budget is off or there is no fit.
    """
    if not fits:
        raise ValueError("private fits: found none, needed at least the fusion model")
    whole = noise_multiplier(budget.epsilon, budget.delta)
    steps = n_steps(budget.epsilon) if steps is None else steps
    each = (1.0 - _OPENING_SHARE - _BASELINE_SHARE) / (len(fits) * steps)
    return Schedule(
        budget=budget,
        fits=tuple(fits),
        steps=steps,
        opening=whole / _OPENING_SHARE**0.5,
        step=whole / each**0.5,
        baseline=whole / _BASELINE_SHARE**0.5,
    )


def own_scaling(columns: ArrayLike) -> tuple[Floats, Floats]:
    """(p,) mean and (p,) scale of a site's own columns, for itself: they never leave.

    Parameters
    ----------
    columns
        (n, p) training rows, or an external site's test rows; NaN marks an absent value.
    """
    found = moments(columns)
    return found.mean, found.scale


def cells(event: ArrayLike, time: ArrayLike, edges_days: ArrayLike) -> tuple[Floats, Floats]:
    """(n, k) ones where a patient's event is in an interval, and (n, k) days at risk in it.

    Follow-up beyond the last edge counts as censored there.
    """
    events, times = check_outcome(event, time)
    right = np.asarray(edges_days, dtype=np.float64)
    left = np.concatenate([[0.0], right[:-1]])
    inside = events[:, None] & (times[:, None] > left) & (times[:, None] <= right)
    return inside.astype(np.float64), np.clip(times[:, None] - left, 0.0, right - left)


@dataclass(frozen=True)
class Opening:
    """What a site's first noisy sum says, held between bounds that the number of patients sets.

    Attributes
    ----------
    n_events
        Number of events.
    log_rate
        Logarithm of the hazard per day.
    precision
        (k,) about how many events each interval holds, rather too many.
    """

    n_events: float
    log_rate: float
    precision: Floats

    @classmethod
    def read(cls, noisy: Floats, n_patients: int, length_days: float) -> Opening:
        """Make it of noisy events per interval, then days per interval in lengths of the grid."""
        k = len(noisy) // 2
        least = _LEAST_SHARE * n_patients
        n_events = float(np.clip(noisy[:k].sum(), least, n_patients))
        days = float(np.clip(noisy[k:].sum(), least, n_patients)) * length_days
        precision = _CAUTION * np.maximum(noisy[:k], n_events / k)
        return cls(n_events, float(np.log(n_events / days)), precision)

    def for_part(self, share: float) -> Opening:
        """Expect the same of a share of the patients."""
        return Opening(self.n_events * share, self.log_rate, self.precision * share)


def _kept_share(spread: ArrayLike, noise: ArrayLike) -> Floats:
    """Share of what is seen to be kept: its best guess, where it is spread like this about 0."""
    variance = np.square(spread)
    return np.asarray(variance / (variance + np.square(noise)))


class NoisySteps:
    """One site's end of one fit: gradients patient by patient, and the site's own intervals.

    Parameters
    ----------
    inputs
        (n, p) standardised.
    event, time
        (n,) outcome; time in days.
    edges_days
        (k,) right ends of the intervals.
    opening
        Of these patients.
    noise
        Standard deviation of the noise of a step; the more, the less an interval is moved by one.

    Attributes
    ----------
    events
        (n, k) ones where a patient's event is in an interval.
    path
        Per step taken, and first before any, (k,) log hazard per day of the site's intervals at
        zero inputs. They follow from noisy sums.
    """

    def __init__(
        self,
        inputs: Floats,
        event: ArrayLike,
        time: ArrayLike,
        *,
        edges_days: ArrayLike,
        opening: Opening,
        noise: float = 0.0,
    ) -> None:
        self._inputs = np.asarray(inputs, dtype=np.float64)
        self.events, self._days = cells(event, time, edges_days)
        self.precision = np.maximum(opening.precision, 1.0)
        self._gain = _kept_share(_INTERVAL_SPREAD, noise / self.precision)
        self.path = [np.full(self.events.shape[1], opening.log_rate)]

    @property
    def taken(self) -> int:
        """How many steps were taken."""
        return len(self.path) - 1

    @property
    def settled(self) -> Floats:
        """(k,) average of the intervals' log hazards over the last half of the steps."""
        return np.asarray(np.mean(self.path[1 + self.taken // 2 :], axis=0))

    def residuals(self, coefficients: Floats, alpha: Floats) -> Floats:
        """(n, k) events of each patient in each interval, less those that the model expects."""
        with np.errstate(over="ignore", invalid="ignore"):
            log_hazard = np.nan_to_num(self._inputs @ coefficients, nan=0.0)
        bounded = np.clip(log_hazard, -_MOST_LOG_HAZARD, _MOST_LOG_HAZARD)
        return np.asarray(self.events - np.exp(alpha + bounded[:, None]) * self._days)

    def gradients(self, coefficients: Floats) -> Floats:
        """(n, p + k) gradient of each patient, for the coefficients and for the intervals."""
        residual = self.residuals(coefficients, self.path[-1])
        return np.hstack([self._inputs * residual.sum(axis=1, keepdims=True), residual])

    def take(self, noisy: Floats) -> Floats:
        """(p,) part that leaves of a noisy sum of gradients; the site steps on by the rest."""
        p = self._inputs.shape[1]
        step = self._gain * noisy[p:] / self.precision
        self.path.append(self.path[-1] + np.clip(step, -1.0, 1.0))
        return noisy[:p]

    def step(self, coefficients: Floats, *, clip_norm: float, noise_multiplier: float) -> Floats:
        """(p,) noisy gradient at these coefficients, accounted for nowhere."""
        gradients = self.gradients(coefficients)
        return self.take(
            noisy_sum(gradients, clip_norm=clip_norm, noise_multiplier=noise_multiplier)
        )


class SitePrivacy:
    """One site's noisy answers in one run, each charged to the site's ledger before it leaves.

    Parameters
    ----------
    plan
        How the approved budget is spent.
    ledger
        The site's only one.
    label
        Of run and cohort: the same step of the same run on the same cohort is released once.
    outcome
        Of the patients behind the fusion model.
    edges_days
        (k,) right ends of the protocol's intervals.

    Notes
    -----
    A site that was restarted takes all steps before the one asked for from its ledger.
    """

    def __init__(
        self,
        plan: Schedule,
        ledger: PrivacyLedger,
        *,
        label: Sequence[str],
        outcome: Outcome,
        edges_days: ArrayLike,
    ) -> None:
        self._plan, self._ledger, self._label = plan, ledger, list(label)
        self._outcome = outcome
        self._edges = np.asarray(edges_days, dtype=np.float64)
        self._opened: Opening | None = None
        self._fits: dict[str, NoisySteps] = {}

    def opening(self) -> float:
        """Noisy number of events among the patients behind the fusion model.

        Raises
        ------
        NotReleased
            If the budget is spent.
        """
        return self._opening().n_events

    def step(
        self, fit: str, number: int, coefficients: Floats, *, inputs: Floats, outcome: Outcome
    ) -> Floats:
        """(p,) noisy gradient of a fit.

        Parameters
        ----------
        number
            Of the step, from 1.
        coefficients
            (p,) where it is.
        inputs, outcome
            (n, p) and (n,) of the patients behind the fit, the same in every step.

        Raises
        ------
        NotReleased
            If the budget is spent, the schedule has no such step, or the step was asked for before
            at other coefficients.
        """
        if fit not in self._plan.fits or not 1 <= number <= self._plan.steps:
            raise NotReleased("rounds_spent")
        state = self._state(fit, inputs, outcome)
        while state.taken < number - 1:
            kept = self._ledger.kept(self._request(fit, state.taken + 1))
            if kept is None:
                raise NotReleased("malformed_request")
            state.take(_read(kept)[1])
        noisy = self._release(
            fit, number, coefficients, lambda: state.gradients(coefficients), self._plan.step
        )
        return noisy[: len(coefficients)] if state.taken >= number else state.take(noisy)

    def intervals(self, coefficients: Floats, inputs: Floats) -> tuple[Floats, Floats, Floats]:
        """Noisy events and exposure per interval, and moments of the log hazard.

        Parameters
        ----------
        coefficients
            (p,) of the fusion model.
        inputs
            (n, p) fusion inputs of the patients behind it.

        Returns
        -------
        events, exposure
            (k,) events, and hazard-weighted days; not negative. What the steps settled on is
            corrected by how far observed and expected events differ, less where noise hides it.
        risk
            (3,) count, mean and summed squared deviations of the log hazard.
        """
        state = self._state(PROTOCOL, inputs, self._outcome)
        if state.taken < self._plan.steps:
            raise NotReleased("malformed_request")
        length, alpha = float(np.linalg.norm(coefficients)), state.settled
        halves = np.clip(inputs @ coefficients / max(2.0 * length, 1e-300), -2.0, 2.0)[:, None]

        def vectors() -> Floats:
            return np.hstack([state.residuals(coefficients, alpha), halves, halves**2])

        noisy = self._release("baseline", 0, coefficients, vectors, self._plan.baseline)
        expected, noise = state.precision / _CAUTION, self._noise(self._plan.baseline)
        more = noisy[:-2] * _kept_share(_SETTLED_WITHIN * expected, noise)
        n = len(inputs)
        mean, square = noisy[-2:] / n * (2.0, 4.0)
        variance = float(np.clip(square - mean**2, *_RISK_VARIANCE)) * length**2
        risk = np.array([n, mean * length, variance * n])
        return np.maximum(expected + more, 0.0), expected * np.exp(-alpha), risk

    def _noise(self, multiplier: float) -> float:
        return multiplier * self._plan.budget.clip_norm

    def _opening(self) -> Opening:
        if self._opened is None:
            n, length = len(self._outcome), float(self._edges[-1])

            def vectors() -> Floats:
                events, days = cells(self._outcome.event, self._outcome.time, self._edges)
                return np.hstack([events, days / length])

            noisy = self._release("opening", 0, np.zeros(0), vectors, self._plan.opening)
            self._opened = Opening.read(noisy, n, length)
        return self._opened

    def _state(self, fit: str, inputs: Floats, outcome: Outcome) -> NoisySteps:
        if fit not in self._fits:
            part = self._opening().for_part(len(outcome) / len(self._outcome))
            self._fits[fit] = NoisySteps(
                inputs,
                outcome.event,
                outcome.time,
                edges_days=self._edges,
                opening=part,
                noise=self._noise(self._plan.step),
            )
        return self._fits[fit]

    def _request(self, fit: str, number: int) -> str:
        return digest(canonical_json([*self._label, fit, number]))

    def _release(
        self,
        fit: str,
        number: int,
        coefficients: Floats,
        vectors: Callable[[], Floats],
        multiplier: float,
    ) -> Floats:
        clip_norm, at = self._plan.budget.clip_norm, hashlib.sha256(coefficients.tobytes()).digest()

        def make() -> bytes:
            noisy = noisy_sum(vectors(), clip_norm=clip_norm, noise_multiplier=multiplier)
            return at + noisy.astype("<f8").tobytes()

        try:
            kept = self._ledger.release(
                self._request(fit, number), make, noise_multiplier=multiplier
            )
        except BudgetSpent as spent:
            raise NotReleased(spent.code) from None
        asked_at, noisy = _read(kept)
        if asked_at != at:
            raise NotReleased("already_answered")
        return noisy


def _read(kept: bytes) -> tuple[bytes, Floats]:
    """Where a kept noisy sum was asked for, and what it was, the site's own part included."""
    return kept[:32], np.frombuffer(kept[32:], dtype="<f8").astype(np.float64)


@dataclass(frozen=True)
class Stepped:
    """What the sites answered to one step of one fit, together.

    Attributes
    ----------
    gradient
        (p,) sum over sites.
    n_patients, n_events
        About how many stand behind it.
    n_sites
        How many noises are in it.
    """

    gradient: Floats
    n_patients: float
    n_events: float
    n_sites: int


@dataclass
class PrivateFit:
    r"""One fit from noisy gradients, at the coordinator.

    Inputs are standardised, so that the information is about the number of events on every axis:
    that is the first curvature, and takes nothing from the budget. Where two gradients show more
    curvature along the step between them than noise explains, as inputs that go together do, it is
    raised along that step. Each step is one of Newton's method with this curvature and the ridge;
    the coefficients are the average over the last half of the steps, in which noise averages out.

    Attributes
    ----------
    ridge
        Penalty per patient.
    coefficients
        (p,) where the next gradient is needed; the estimate once all steps are taken.
    covariance
        (p, p) of the estimate:
        :math:`A^{-1} D A^{-1} + A^{-1} V A^{-1} / m + b^2 \hat\beta\hat\beta^\top` with
        curvature :math:`D`, penalised :math:`A`, noise variance :math:`V` of a step, :math:`m`
        steps averaged, and :math:`b` the share by which clipping stretches or few steps shrink the
        estimate: 0.15, or 1.5 for one shot. Taken from simulations; approximate, and rather too
        small for inputs that go together strongly.
    """

    n_inputs: int
    ridge: float = 0.0
    coefficients: Floats = field(default_factory=lambda: np.zeros(0))
    covariance: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    n_patients: float = 0.0
    n_events: float = 0.0
    _path: list[Floats] = field(default_factory=list)
    _extra: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    _before: tuple[Floats, Floats] | None = None

    def __post_init__(self) -> None:
        self.coefficients = np.zeros(self.n_inputs)
        self._extra = np.zeros((self.n_inputs, self.n_inputs))

    def advance(self, found: Stepped, *, noise: float) -> None:
        """Step on by a gradient; ``noise`` is the standard deviation of one site's noise."""
        self.n_patients, self.n_events = found.n_patients, found.n_events
        deviation = noise * found.n_sites**0.5
        self._learn_curvature(found.gradient, deviation)
        here, penalty = self.coefficients, self.n_patients * self.ridge
        self._before = (here, found.gradient)
        curvature = self._curvature + penalty * np.eye(self.n_inputs)
        self.coefficients = here + np.linalg.solve(curvature, found.gradient - penalty * here)
        self._path.append(self.coefficients)
        averaged = len(self._path) - len(self._path) // 2
        self._describe(np.asarray(np.linalg.inv(curvature)), deviation**2 / averaged)

    def finish(self) -> None:
        """Take the average over the last half of the steps as the estimate."""
        self.coefficients = np.asarray(np.mean(self._path[len(self._path) // 2 :], axis=0))
        bias = _BIAS_OF_STEPS if len(self._path) > 1 else _BIAS_OF_ONE_SHOT
        along = bias * self.coefficients
        self.covariance = self.covariance + np.outer(along, along)

    @property
    def _curvature(self) -> Floats:
        return self.n_events * np.eye(self.n_inputs) + self._extra

    def _learn_curvature(self, gradient: Floats, deviation: float) -> None:
        if self._before is None:
            return
        moved = self.coefficients - self._before[0]
        squared = float(moved @ moved)
        if squared == 0.0:
            return
        shown = float(moved @ (self._before[1] - gradient)) / squared
        doubt = deviation * (2.0 / squared) ** 0.5
        more = shown - doubt - float(moved @ self._curvature @ moved) / squared
        if more > 0.0:
            self._extra = self._extra + more / squared * np.outer(moved, moved)

    def _describe(self, inverse: Floats, noise_variance: float) -> None:
        of_scores = self._curvature + noise_variance * np.eye(self.n_inputs)
        self.covariance = inverse @ of_scores @ inverse


def fit_privately(
    ask: Callable[[int, Mapping[str, Floats]], Mapping[str, Stepped]],
    fits: Mapping[str, PrivateFit],
    plan: Schedule,
) -> None:
    """Advance all fits together through the steps of the schedule.

    Parameters
    ----------
    ask
        From the number of a step, from 1, and the coefficients of each fit to what sites answered.
    fits
        Changed in place.
    """
    for number in range(1, plan.steps + 1):
        found = ask(number, {name: fit.coefficients for name, fit in fits.items()})
        for name, fit in fits.items():
            fit.advance(found[name], noise=plan.step * plan.budget.clip_norm)
    for fit in fits.values():
        fit.finish()


@dataclass
class PrivateTalk:
    """Asks the sites of a conversation for noisy sums, in the clear or behind masks.

    Attributes
    ----------
    n_events
        Noisy number of events at all sites that began.
    """

    talk: Conversation
    stage: str = "private_steps"
    n_events: float = 0.0
    _began: dict[str, int] = field(default_factory=dict)

    def open(self) -> None:
        """Let every site begin, and learn about how many events there are.

        Raises
        ------
        QuorumNotMet
            If too few sites are left.
        """
        start = {PROTOCOL: np.zeros(self.talk.plan.n_coefficients(PROTOCOL))}
        self.n_events = float(self._total(OPENING, start)[0, 0])
        self._began = {s: self.talk.outcomes[s].n_train for s in self.talk.roster}

    def __call__(self, number: int, coefficients: Mapping[str, Floats]) -> dict[str, Stepped]:
        """Ask for one step of these fits; see :func:`fit_privately`."""
        total = self._total(number, coefficients)
        return {
            fit: self._stepped(fit, total[row, : len(beta)])
            for row, (fit, beta) in enumerate(coefficients.items())
        }

    def _total(self, number: int, coefficients: Mapping[str, Floats]) -> Floats:
        at = stack(list(coefficients.values()))
        request = m.AskPrivateSteps(
            self.talk.plan.run, self.talk.number, number, tuple(coefficients), at
        )
        replies = self.talk.collect_all(request, m.PrivateSteps, stage=self.stage)
        self.talk.round_done()
        return np.asarray(sum(reply.gradient for reply in replies.values()))

    def _stepped(self, fit: str, gradient: Floats) -> Stepped:
        outcomes = self.talk.outcomes
        behind = [s for s in self.talk.roster if fit == PROTOCOL or fit in outcomes[s].contributes]
        n_patients = sum(outcomes[s].n_train for s in behind)
        share = n_patients / sum(self._began.values())
        return Stepped(gradient, float(n_patients), self.n_events * share, len(behind))
