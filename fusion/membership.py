r"""Can a model tell who it was trained on? An attack by a site on its own training rows.

The attacker of a likelihood-ratio attack [1]_ knows a patient's inputs and outcome, the training
procedure with its seed, and other patients, and asks whether this patient was trained on. The site
plays that attacker: it trains many models on random halves of its rows, and learns per patient how
log hazards are distributed over models that saw her and over models that did not. Models come in
pairs of complementary halves, so that every patient is inside one model and outside the other of
each pair. A pair is attacked with what all other pairs taught, never with itself: left in, a
model's complement would tell which half it is.

The statistic is the log hazard rather than a loss, because it keeps the direction in which a
patient pulled the model. A Cox model's log hazards are known up to a constant, and who holds the
weights may scale them at will, so each model's log hazards are centred and scaled first. A ridge
therefore hides nobody by making log hazards small: it shrinks a patient's pull and what would cover
it alike. Only many patients per free weight do.

An audit judges models of half the site's patients, in which each stands out more than in a model of
all of them; there it errs to the safe side. It attacks finished models by their log hazards. It
does not attack the updates of single rounds, which a coordinator sees without a secure sum, and a
cleverer attack may find more.

References
----------
.. [1] Carlini N, Chien S, Nasr M, et al. Membership inference attacks from first principles. IEEE
   Symposium on Security and Privacy 2022: 1897-1914.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fusion.averaging import AveragedFit, LocalSteps, local_update
from fusion.encoder_inputs import take
from fusion.late import survival_outcome
from fusion.survival import check_outcome

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from numpy.typing import ArrayLike, NDArray

    from fusion.encoder_inputs import Floats, Inputs
    from fusion.encoder_spec import EncoderSpec
    from fusion.federation import AveragingPlan
    from fusion.late import CoxFusion, GatedFusion, LogisticHazardFusion

    Bools = NDArray[np.bool_]
    Rows = NDArray[np.intp]
    Fit: TypeAlias = Callable[[Rows], Floats]

MAX_AUC: Final = 0.60
"""Largest area under the attack's curve at which weights may be shared."""
MIN_MODELS: Final = 64
"""Fewest models of an audit that lets anything pass: few teach an attack little."""
_MIN_PAIRS: Final = 4
_MIN_PATIENTS: Final = 20
_FPR: Final = 0.05
_N_REPLICATES: Final = 400
# A patient's own spread over some dozen models is rough; so many more of average spread join it.
_PRIOR_MODELS: Final = 10.0


@dataclass(frozen=True)
class MembershipResult:
    """How well an attack tells who was trained on; 0.5 and 0.05 are what a coin does.

    Attributes
    ----------
    name
        What was attacked: a modality's encoder, or the fusion model.
    n_patients, n_events
        Who could have been trained on; each model saw a half.
    n_models
        Models trained; half of them saw a given patient.
    auc, auc_low, auc_high
        Area under the curve of the likelihood-ratio attack, with its 95% interval.
    tpr_at_5_fpr, tpr_low, tpr_high
        Share of members found where 5% of the others are taken for members, with its 95% interval.
    loss_auc, loss_auc_low, loss_auc_high
        The same area of the simplest attack, which takes well-fitted patients for members.
    """

    name: str
    n_patients: int
    n_events: int
    n_models: int
    auc: float
    auc_low: float
    auc_high: float
    tpr_at_5_fpr: float
    tpr_low: float
    tpr_high: float
    loss_auc: float
    loss_auc_low: float
    loss_auc_high: float

    @property
    def passes(self) -> bool:
        """Whether weights may be shared: neither attack is above 0.60, and enough models say so."""
        return self.n_models >= MIN_MODELS and max(self.auc, self.loss_auc) <= MAX_AUC

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class ModelPairs:
    """What pairs of models, each of two complementary halves of n patients, say of all of them.

    Attributes
    ----------
    log_hazard
        (pairs, 2, n) by the model of the half and by that of its complement.
    half
        (pairs, n) True for the patients in the half.
    """

    log_hazard: Floats
    half: Bools

    def __post_init__(self) -> None:
        pairs, n = self.half.shape
        if self.log_hazard.shape != (pairs, 2, n) or pairs < _MIN_PAIRS:
            raise ValueError(
                f"log hazards: found shape {self.log_hazard.shape}, needed (pairs, 2, n) with "
                f"at least {_MIN_PAIRS} pairs and the halves' {self.half.shape}"
            )
        if not np.isfinite(self.log_hazard).all():
            raise ValueError("log hazards: found a value that is not finite, needed all finite")

    def split(self, values: Floats) -> tuple[Floats, Floats]:
        """(pairs, n) of (pairs, 2, n) values: by the model that saw a patient, and by the other."""
        one, other = values[:, 0], values[:, 1]
        return np.where(self.half, one, other), np.where(self.half, other, one)


@dataclass(frozen=True)
class Effort:
    """What an audit may cost.

    Attributes
    ----------
    n_models
        To train, an even number; the more, the sharper the attack.
    time_budget_s
        Seconds after which no further pair is begun; eight models are trained whatever they cost.
    """

    n_models: int = 128
    time_budget_s: float = np.inf

    def __post_init__(self) -> None:
        if self.n_models < 2 * _MIN_PAIRS or self.n_models % 2:
            raise ValueError(
                f"n_models: found {self.n_models}, needed an even number of at least "
                f"{2 * _MIN_PAIRS}"
            )
        if not self.time_budget_s > 0:
            raise ValueError(f"time_budget_s: found {self.time_budget_s}, needed above 0")


def audit(
    fit: Fit,
    event: ArrayLike,
    time: ArrayLike,
    *,
    name: str,
    seed: int,
    effort: Effort,
    advance: Callable[[int], object] = lambda n_models: None,
) -> MembershipResult:
    """Attack a training procedure on the patients it is given.

    Parameters
    ----------
    fit
        From the rows to train on to the (n,) log hazard of all patients by that model; higher is
        worse. The same rows must give the same result: the attacker knows the seed.
    event, time
        (n,) True where observed; days from the landmark.
    name
        Of what is attacked.
    seed
        Of halves and intervals.
    effort
        How many models to train, and in what time.
    advance
        Told how many more models are done.

    Raises
    ------
    ValueError
        If there are under 20 patients, shapes disagree, or too few models could be trained.
    """
    events, times = check_outcome(event, time)
    if len(events) < _MIN_PATIENTS:
        raise ValueError(f"patients: found {len(events)}, needed at least {_MIN_PATIENTS} to audit")
    deadline = monotonic() + effort.time_budget_s
    halves: list[Bools] = []
    found: list[tuple[Floats, Floats]] = []
    for at in range(effort.n_models // 2):
        if len(found) >= _MIN_PAIRS and monotonic() >= deadline:
            break
        half = _half(events, seed=seed, at=at)
        # A fit that did not converge on a half takes its complement with it.
        with suppress(ArithmeticError):
            found.append((fit(np.flatnonzero(half)), fit(np.flatnonzero(~half))))
            halves.append(half)
        advance(2)
    if len(found) < _MIN_PAIRS:
        raise ValueError(
            f"membership audit of {name}: found {len(found)} pairs of halves that could be trained "
            f"on, needed at least {_MIN_PAIRS}; audit with more patients or events"
        )
    pairs = ModelPairs(np.asarray(found, dtype=np.float64), np.asarray(halves))
    return summarise(pairs, events, times, name=name, seed=seed)


def _half(event: Bools, *, seed: int, at: int) -> Bools:
    """(n,) True for a random half of the patients and, but for one, of the events."""
    rng = np.random.default_rng([seed, 12, at])
    dealt = np.lexsort((rng.random(len(event)), ~event))
    half = np.zeros(len(event), dtype=bool)
    half[dealt[int(rng.integers(2)) :: 2]] = True
    return half


def summarise(
    pairs: ModelPairs, event: Bools, time: Floats, *, name: str, seed: int
) -> MembershipResult:
    """Attack models that are trained, by likelihood ratios and by losses.

    Parameters
    ----------
    event, time
        (n,) outcome.
    name, seed
        As in :func:`audit`.
    """
    expected = expected_events(pairs.log_hazard, event, time)
    pull = np.asarray(event - expected.mean(axis=(0, 1)))
    members, others = pairs.split(_standardised(pairs.log_hazard))
    found = attack_curve(*likelihood_ratios(members, others, pull), seed)
    # Half the squared deviance residual, Therneau, Grambsch and Fleming 1990.
    loss = expected - event - np.log(np.where(event, expected, 1.0))
    simple = attack_curve(*pairs.split(-loss), seed)
    return MembershipResult(
        name=name,
        n_patients=len(event),
        n_events=int(event.sum()),
        n_models=2 * len(pairs.half),
        auc=found.auc,
        auc_low=found.auc_low,
        auc_high=found.auc_high,
        tpr_at_5_fpr=found.tpr,
        tpr_low=found.tpr_low,
        tpr_high=found.tpr_high,
        loss_auc=simple.auc,
        loss_auc_low=simple.auc_low,
        loss_auc_high=simple.auc_high,
    )


def _standardised(log_hazard: Floats) -> Floats:
    """Centre and scale each model's log hazards over the patients; a constant becomes zeros."""
    centred = log_hazard - log_hazard.mean(axis=-1, keepdims=True)
    scale = centred.std(axis=-1, keepdims=True)
    return np.asarray(np.divide(centred, scale, out=np.zeros_like(centred), where=scale > 1e-12))


def likelihood_ratios(inside: Floats, outside: Floats, pull: Floats) -> tuple[Floats, Floats]:
    r"""Score each pair by what the other pairs teach; higher says that the model saw the patient.

    Parameters
    ----------
    inside, outside
        (pairs, n) log hazards by the model of each pair that saw a patient, and by the one that did
        not.
    pull
        (n,) martingale residuals: where a patient should draw her log hazard, up to one factor.

    Returns
    -------
    members, others
        (pairs, n) log likelihood ratios of ``inside`` and of ``outside``.

    Notes
    -----
    Few models tell a patient's shift :math:`\delta_i` between the two roughly. It is drawn toward
    :math:`a r_i`, with :math:`r_i` the pull and :math:`a` fitted to all patients, by the share of
    its variance about that line which its standard error explains. Variances are likewise drawn
    toward those of all patients.
    """
    (seen, seen_variance), (unseen, unseen_variance) = map(_left_out_moments, (inside, outside))
    error = (seen_variance + unseen_variance) / (len(inside) - 1)
    half_shift = _shrunken(seen - unseen, error, pull) / 2.0
    middle = (seen + unseen) / 2.0

    def _ratio(values: Floats) -> Floats:
        member = _log_density(values, middle + half_shift, seen_variance)
        return member - _log_density(values, middle - half_shift, unseen_variance)

    return _ratio(inside), _ratio(outside)


def _shrunken(shift: Floats, error: Floats, pull: Floats) -> Floats:
    """(pairs, n) shifts with their error variances, drawn toward the line through the pulls."""
    squares = float(pull @ pull)
    line = np.outer(shift @ pull / squares, pull) if squares > 0 else np.zeros_like(shift)
    about = np.maximum(((shift - line) ** 2 - error).mean(axis=1, keepdims=True), 0.0)
    return np.asarray(line + about / (about + error) * (shift - line))


def _left_out_moments(values: Floats) -> tuple[Floats, Floats]:
    """(pairs, n) mean and variance of each patient's values in all pairs but one."""
    pairs = len(values)
    away = values - values.mean(axis=0)
    mean = values - away * (pairs / (pairs - 1))
    squares = (away**2).sum(axis=0) - away**2 * (pairs / (pairs - 1))
    average = np.maximum(squares, 0.0).mean(axis=1, keepdims=True) / (pairs - 2)
    variance = (_PRIOR_MODELS * average + squares) / (_PRIOR_MODELS + pairs - 2)
    # Models that say the same of everyone have no variance, and tell nothing.
    return mean, np.maximum(variance, 1e-12)


def _log_density(values: Floats, mean: Floats, variance: Floats) -> Floats:
    return np.asarray(-0.5 * ((values - mean) ** 2 / variance + np.log(variance)))


def expected_events(log_hazard: Floats, event: Bools, time: Floats) -> Floats:
    """(..., n) events expected of each patient in her time, given the baseline that suits a model.

    Parameters
    ----------
    log_hazard
        (..., n) by each model.
    event, time
        (n,) outcome; the baseline is Breslow's, of all n patients [1]_.

    References
    ----------
    .. [1] Breslow N. Contribution to the discussion of Cox DR. JRSS B 1972;34:216-217.
    """
    order = np.argsort(time, kind="stable")
    times, events = time[order], event[order]
    shifted = log_hazard[..., order] - log_hazard.max(axis=-1, keepdims=True)
    hazard = np.exp(np.maximum(shifted, -600.0))
    at_risk = np.cumsum(hazard[..., ::-1], axis=-1)[..., ::-1]
    at_risk = at_risk[..., np.searchsorted(times, times, side="left")]
    until = np.searchsorted(times, times, side="right") - 1
    found = np.empty_like(hazard)
    found[..., order] = hazard * np.cumsum(events / at_risk, axis=-1)[..., until]
    return found


@dataclass(frozen=True)
class AttackCurve:
    """Area, and true-positive rate at a false-positive rate of 5%, with 95% intervals."""

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float


def attack_curve(members: Floats, others: Floats, seed: int) -> AttackCurve:
    """Receiver operating characteristic of an attack's scores, pooled over patients and models.

    Parameters
    ----------
    members, others
        (pairs, n) score of each patient by the model that saw her and by the one that did not;
        higher says that it did.
    seed
        Of the intervals, which resample patients and pairs of models at once [1]_: scores of one
        patient are alike, and so are those of one model. They are wide rather than narrow.

    References
    ----------
    .. [1] Owen AB. The pigeonhole bootstrap. Annals of Applied Statistics 2007;1:386-411.
    """
    curve = _Curve(members, others)
    pairs, n = members.shape
    rng = np.random.default_rng([seed, 13])
    again = np.array(
        [
            curve(np.outer(_times_drawn(rng, pairs), _times_drawn(rng, n)))
            for _ in range(_N_REPLICATES)
        ]
    )
    (auc, tpr), (low, high) = curve(np.ones((pairs, n))), np.quantile(again, (0.025, 0.975), axis=0)
    return AttackCurve(auc, float(low[0]), float(high[0]), tpr, float(low[1]), float(high[1]))


def _times_drawn(rng: np.random.Generator, n: int) -> Floats:
    return rng.multinomial(n, np.full(n, 1.0 / n)).astype(np.float64)


class _Curve:
    """Scores in falling order, to be weighed again and again."""

    def __init__(self, members: Floats, others: Floats) -> None:
        scores = np.concatenate([members.ravel(), others.ravel()])
        self.order = np.argsort(-scores, kind="stable")
        self.is_member = self.order < members.size
        self.at = self.order % members.size
        # Equal scores are one step of the curve, whatever order they came in.
        falls = np.diff(scores[self.order]) < 0
        self.ends = np.flatnonzero(np.append(falls, True))

    def __call__(self, weights: Floats) -> tuple[float, float]:
        """Area and true-positive rate where observations count by (pairs, n) weights."""
        each = weights.ravel()[self.at]
        found = np.cumsum(np.where(self.is_member, each, 0.0))[self.ends]
        false = np.cumsum(np.where(self.is_member, 0.0, each))[self.ends]
        tpr, fpr = np.append(0.0, found / found[-1]), np.append(0.0, false / false[-1])
        area = np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1])) / 2.0
        return float(area), float(np.interp(_FPR, fpr, tpr))


def encoder_fit(
    inputs: Inputs, event: ArrayLike, time: ArrayLike, spec: EncoderSpec, *, n_steps: int, seed: int
) -> Fit:
    """Training of an encoder at its site, its hyperparameters chosen before.

    Parameters
    ----------
    inputs, event, time
        Of n patients, as in :func:`fusion.training.fit_encoder`.
    spec
        With the hyperparameters that were chosen, as :attr:`FittedEncoder.chosen` has them; an
        attacker reads them off the encoder. Of several ridge strengths the default is used.
    n_steps
        Steps of a network after its linear start.
    seed
        Of weights and dropout.
    """
    # Torch takes seconds to import, and only networks need it.
    from fusion.cox_loss import outcome, training_mode
    from fusion.encoders import prepare, raw_log_hazard
    from fusion.learner import Learner, training_rows
    from fusion.networks import frozen
    from fusion.tuning import LinearFits

    events, times = check_outcome(event, time)
    chosen = spec.model_copy(update={"ridge": (spec.default_ridge,)})

    def _fit(rows: Rows) -> Floats:
        own, survival = take(inputs, rows), outcome(events[rows], times[rows])
        with training_mode():
            preparation = prepare(own, chosen)
            data = training_rows(own, preparation, chosen)
            linear = LinearFits(data.rows, survival, l1_ratio=chosen.l1_ratio)
            start = linear.expanded(linear.fit(np.arange(len(rows)), chosen.default_ridge))
            learner = Learner(data, survival, chosen, start, seed)
            for _ in range(n_steps):
                learner.step()
            networks = [frozen(network.cpu()) for network in learner.networks]
            return raw_log_hazard(networks, preparation, inputs)

    return _fit


def shared_fit(
    inputs: Inputs, event: ArrayLike, time: ArrayLike, spec: EncoderSpec, plan: AveragingPlan
) -> Fit:
    """Training of a network whose weights are shared, by a site on its own.

    Beside other sites its patients count for less, so that alone is the worst case.

    Parameters
    ----------
    inputs, event, time
        Of n patients, prepared as in :class:`fusion.shared_networks.SharedLoss`.
    plan
        Of the protocol: rounds, steps, and the weights that training begins from.
    """
    # Torch takes seconds to import, and only networks need it.
    from fusion.shared_networks import SharedLoss, shared_log_hazard

    events, times = check_outcome(event, time)
    steps = LocalSteps(plan.local_steps, plan.learning_rate, plan.proximal)

    def _fit(rows: Rows) -> Floats:
        loss = SharedLoss(spec, take(inputs, rows), events[rows], times[rows])
        training = AveragedFit(plan.start, plan.rule, max_rounds=plan.rounds)
        while not training.converged:
            update = local_update(loss, training.candidate, steps, n_events=loss.n_events)
            training.advance([update])
        return shared_log_hazard(spec, training.candidate, inputs)

    return _fit


def fusion_fit(
    columns: Floats,
    event: ArrayLike,
    time: ArrayLike,
    estimator: Callable[[], CoxFusion | LogisticHazardFusion | GatedFusion],
) -> Fit:
    """Training of the fusion model by a site on its own, from the log hazards of its encoders.

    Parameters
    ----------
    columns
        (n, m) out-of-fold log hazards, NaN where absent; every patient has some.
    event, time
        (n,) outcome.
    estimator
        Makes one of :data:`fusion.late.ESTIMATORS`, not yet fitted.
    """
    y = survival_outcome(event, time)

    def _fit(rows: Rows) -> Floats:
        return estimator().fit(columns[rows], y[rows]).predict(columns)

    return _fit
