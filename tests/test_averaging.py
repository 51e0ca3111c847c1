"""Averaging of weights: properties of a round, against pooled rows and against Newton's method."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.testing import assert_allclose, assert_array_equal

from fusion.averaging import AveragedFit, LocalSteps, WeightsUpdate, local_update
from fusion.late import gated_log_hazard, gated_loss_gradient, initial_gated_weights
from fusion.late.gated import GATE_DECAY
from fusion.newton import ConvergenceError
from fusion.survival import cox_sums, fit_cox

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    LossGradient = Callable[[Floats], tuple[float, Floats]]

RIDGE = 0.02
WEIGHTS = st.floats(-1e6, 1e6)


class Site:
    """Rows of one simulated site, and its ridge Cox loss per event."""

    def __init__(self, n: int, seed: int, shift: float = 0.0) -> None:
        rng = np.random.default_rng(seed)
        mix = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.3, 0.3, 0.9]])
        self.inputs = rng.normal(size=(n, 3)) @ mix.T
        died = rng.exponential(900 * np.exp(-self.inputs @ [0.8 + shift, -0.5, 0.3]))
        lost = rng.uniform(100, 2500, n)
        self.event = died <= lost
        self.time = np.ceil(np.minimum(died, lost) / 30) * 30

    def loss_gradient(self, weights: Floats) -> tuple[float, Floats]:
        sums = cox_sums(self.inputs, self.event, self.time, weights)
        n, d = sums.n_patients, sums.n_events
        loss = (0.5 * n * RIDGE * float(weights @ weights) - sums.log_likelihood) / d
        return loss, (n * RIDGE * weights - sums.gradient) / d

    def update(self, weights: Floats, steps: LocalSteps) -> WeightsUpdate:
        counts = {"n_patients": len(self.event), "n_events": int(self.event.sum())}
        return local_update(self.loss_gradient, weights, steps, **counts)


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return [Site(90, 1), Site(150, 2, 0.6), Site(60, 3, -0.4)]


def _pooled(sites: Sequence[Site]) -> tuple[Floats, Floats, Floats, Floats]:
    return (
        np.concatenate([s.inputs for s in sites]),
        np.concatenate([s.event for s in sites]),
        np.concatenate([s.time for s in sites]),
        np.repeat(np.arange(len(sites)), [len(s.event) for s in sites]),
    )


def _update(weights: Floats, loss: float = 1.0, n_events: int = 10) -> WeightsUpdate:
    return WeightsUpdate(np.asarray(weights, dtype=np.float64), loss, 2 * n_events, n_events)


def _train(sites: Sequence[Site], fit: AveragedFit, steps: LocalSteps) -> AveragedFit:
    while not fit.converged:
        fit.advance([s.update(fit.candidate, steps) for s in sites])
    return fit


@settings(max_examples=60, deadline=None)
@given(
    weights=arrays.arrays(np.float64, 4, elements=WEIGHTS),
    start=arrays.arrays(np.float64, 4, elements=WEIGHTS),
    events=st.lists(st.integers(1, 10**6), min_size=1, max_size=6),
)
def test_equal_updates_average_to_themselves(
    weights: Floats, start: Floats, events: list[int]
) -> None:
    fit = AveragedFit(candidate=start)
    fit.advance([_update(weights, n_events=n) for n in events])
    assert_array_equal(fit.candidate, weights)


@settings(max_examples=60, deadline=None)
@given(
    weights=arrays.arrays(np.float64, (5, 3), elements=WEIGHTS),
    events=st.lists(st.integers(1, 10**6), min_size=5, max_size=5),
    order=st.permutations(range(5)),
    rule=st.sampled_from(["fedavg", "fedprox", "fedadam"]),
)
def test_the_order_of_sites_changes_no_bit(
    weights: Floats, events: list[int], order: list[int], rule: str
) -> None:
    updates = [
        _update(w, loss, n)
        for w, loss, n in zip(weights, np.linspace(0.1, 3, 5), events, strict=True)
    ]
    one = AveragedFit(candidate=np.zeros(3), rule=rule)  # type: ignore[arg-type]
    other = AveragedFit(candidate=np.zeros(3), rule=rule)  # type: ignore[arg-type]
    one.advance(updates)
    other.advance([updates[i] for i in order])
    assert one.candidate.tobytes() == other.candidate.tobytes()
    assert one.objective == other.objective


def test_sites_count_by_their_events() -> None:
    fit = AveragedFit(candidate=np.zeros(2))
    fit.advance([_update([1.0, 4.0], 2.0, 30), _update([5.0, 0.0], 6.0, 10)])
    assert_array_equal(fit.candidate, [2.0, 3.0])
    assert fit.objective == 3.0


def test_one_local_step_a_round_is_the_pooled_stratified_gradient_step(sites: list[Site]) -> None:
    inputs, event, time, strata = _pooled(sites)
    at, rate = np.array([0.3, -0.2, 0.5]), 0.7
    sums = cox_sums(inputs, event, time, at, strata=strata)
    pooled = at + rate * (sums.gradient - len(event) * RIDGE * at) / event.sum()
    fit = AveragedFit(candidate=at)
    fit.advance([s.update(at, LocalSteps(1, rate)) for s in sites])
    assert_allclose(fit.candidate, pooled, rtol=0, atol=1e-14)
    penalty = 0.5 * len(event) * RIDGE * at @ at
    assert_allclose(fit.objective, (penalty - sums.log_likelihood) / event.sum(), rtol=1e-13)


def test_gated_sites_step_along_the_gradient_of_all_rows(sites: list[Site]) -> None:
    rng = np.random.default_rng(5)
    absent = [(rng.random(s.inputs.shape) < 0.2).astype(float) for s in sites]
    x = [np.hstack([s.inputs * (1 - a), a]) for s, a in zip(sites, absent, strict=True)]
    start = initial_gated_weights(rng.normal(size=6), hidden=2) + 0.1 * rng.normal(size=29)
    losses: list[LossGradient] = [
        lambda w, x=x, s=s: gated_loss_gradient(w, x, s.event, s.time, hidden=2, ridge=RIDGE)  # type: ignore[misc]
        for x, s in zip(x, sites, strict=True)
    ]
    fit = AveragedFit(candidate=start)
    fit.advance(
        [
            local_update(f, start, LocalSteps(1, 0.1), n_events=int(s.event.sum()))
            for f, s in zip(losses, sites, strict=True)
        ]
    )
    _, event, time, strata = _pooled(sites)

    def pooled_loss(w: Floats) -> float:
        log_hazard = gated_log_hazard(w, np.concatenate(x), hidden=2)
        sums = cox_sums(log_hazard[:, None], event, time, np.ones(1), strata=strata)
        penalty = np.where(np.arange(29) < 6, RIDGE, GATE_DECAY) @ w**2
        return float(0.5 * len(event) * penalty - sums.log_likelihood) / event.sum()

    slope = [(pooled_loss(start + e) - pooled_loss(start - e)) / 2e-5 for e in 1e-5 * np.eye(29)]
    assert_allclose(fit.objective, pooled_loss(start), rtol=1e-13)
    assert_allclose((start - fit.candidate) / 0.1, slope, rtol=0, atol=1e-8)


def test_averaging_needs_many_times_the_rounds_of_newton(sites: list[Site]) -> None:
    inputs, event, time, strata = _pooled(sites)
    newton = fit_cox(inputs, event, time, strata=strata, ridge=RIDGE)
    best = -newton.objective * len(event) / event.sum()
    fit = AveragedFit(candidate=np.zeros(3), max_rounds=2000, tol=1e-15)
    rounds = None
    while not fit.converged:
        fit.advance([s.update(fit.candidate, LocalSteps(1, 0.5)) for s in sites])
        if rounds is None and fit.objective - best < 1e-12:
            rounds = fit.rounds
    assert_allclose(fit.candidate, newton.candidate, atol=1e-5)
    assert rounds is not None
    assert rounds > 10 * newton.rounds
    assert fit.best_objective >= best - 1e-13


def test_many_local_steps_stall_short_of_the_optimum(sites: list[Site]) -> None:
    inputs, event, time, strata = _pooled(sites)
    newton = fit_cox(inputs, event, time, strata=strata, ridge=RIDGE)
    best = -newton.objective * len(event) / event.sum()

    def gap(steps: LocalSteps) -> float:
        fit = AveragedFit(candidate=np.zeros(3), max_rounds=150, tol=1e-15)
        return _train(sites, fit, steps).best_objective - best

    free, pulled = gap(LocalSteps(20, 0.3)), gap(LocalSteps(20, 0.3, proximal=1.0))
    assert free > 1e-5
    assert pulled < free


@pytest.mark.parametrize("rule", ["fedavg", "fedprox", "fedadam"])
def test_every_rule_lowers_the_loss_and_returns_its_best(sites: list[Site], rule: str) -> None:
    fit = AveragedFit(candidate=np.zeros(3), rule=rule, max_rounds=60)  # type: ignore[arg-type]
    seen = []
    while not fit.converged:
        seen.append(fit.candidate)
        fit.advance([s.update(fit.candidate, LocalSteps(3, 0.3, 0.01)) for s in sites])
    losses = [
        sum(s.event.sum() * s.loss_gradient(w)[0] for s in sites)
        / sum(s.event.sum() for s in sites)
        for w in seen
    ]
    assert_array_equal(fit.candidate, seen[int(np.argmin(losses))])
    assert_allclose(fit.best_objective, min(losses), rtol=1e-12)
    assert min(losses) < losses[0] - 0.05


def test_adam_at_the_server_follows_its_formula() -> None:
    fit = AveragedFit(
        candidate=np.array([1.0, -1.0]), rule="fedadam",
        server_learning_rate=0.1, beta1=0.9, beta2=0.99, tau=0.01,
    )  # fmt: skip
    mean, square, at = np.zeros(2), np.full(2, 0.01**2), np.array([1.0, -1.0])
    for target in ([2.0, -1.5], [1.0, 0.0], [3.0, 3.0]):
        along = np.array(target) - at
        mean = 0.9 * mean + 0.1 * along
        square = 0.99 * square + 0.01 * along**2
        at = at + 0.1 * mean / (np.sqrt(square) + 0.01)
        fit.advance([_update(target)])
        assert_allclose(fit.candidate, at, rtol=1e-14)


def test_a_proximal_step_is_pulled_back() -> None:
    def loss_gradient(w: Floats) -> tuple[float, Floats]:
        return float(w.sum()), np.ones(2)

    start = np.array([1.0, 2.0])
    free = local_update(loss_gradient, start, LocalSteps(2, 0.1))
    assert_allclose(free.weights, start - 0.2)
    pulled = local_update(loss_gradient, start, LocalSteps(2, 0.1, proximal=0.5))
    assert_allclose(pulled.weights, start - 0.1 - 0.1 * (1 - 0.5 * 0.1))
    assert free.loss == pulled.loss == 3.0


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
@pytest.mark.parametrize("killed_after", [0, 1, 7, 19])
def test_a_killed_run_goes_on_bit_by_bit(sites: list[Site], rule: str, killed_after: int) -> None:
    def new() -> AveragedFit:
        return AveragedFit(candidate=np.zeros(3), rule=rule, max_rounds=20)  # type: ignore[arg-type]

    steps, fit = LocalSteps(2, 0.4), new()
    for _ in range(killed_after):
        fit.advance([s.update(fit.candidate, steps) for s in sites])
    kept = json.loads(json.dumps(fit.state(), allow_nan=False))
    resumed = _train(sites, AveragedFit.from_state(kept), steps)
    whole = _train(sites, new(), steps)
    assert resumed.candidate.tobytes() == whole.candidate.tobytes()
    assert resumed.state() == whole.state()
    assert AveragedFit.from_state(whole.state()).converged


def test_it_ends_when_nothing_has_improved_for_a_while() -> None:
    fit = AveragedFit(candidate=np.zeros(1), max_rounds=100, patience=3, tol=0.01)
    for loss in (1.0, 0.5, 0.499, 0.7, 0.6):
        assert not fit.converged
        fit.advance([_update(fit.candidate + 1, loss)])
    assert fit.converged
    assert fit.rounds == 5
    # The lowest loss was at the third candidate, though too little below the second to go on.
    assert_array_equal(fit.candidate, [2.0])
    assert fit.best_objective == 0.499


def test_small_gains_that_add_up_are_gains() -> None:
    fit = AveragedFit(candidate=np.zeros(1), max_rounds=30, patience=3, tol=0.01)
    for round_ in range(29):
        fit.advance([_update(fit.candidate, 1.0 - 0.005 * round_)])
    assert not fit.converged


def test_one_round_only_judges_the_start() -> None:
    fit = AveragedFit(candidate=np.ones(2), max_rounds=1)
    fit.advance([_update([5.0, 5.0], 0.3)])
    assert fit.converged
    assert_array_equal(fit.candidate, [1.0, 1.0])


def test_restarting_keeps_weights_and_forgets_the_objective() -> None:
    fit = AveragedFit(candidate=np.zeros(2), max_rounds=10)
    fit.advance([_update([1.0, 1.0], 0.1)])
    fit.restart()
    assert_array_equal(fit.candidate, [1.0, 1.0])
    assert fit.rounds == 1
    fit.advance([_update([2.0, 2.0], 5.0)])
    # The loss of the sites that are left is higher, and is the best that they have.
    assert_array_equal(fit.best, [1.0, 1.0])
    assert fit.best_objective == 5.0


@pytest.mark.parametrize(
    "bad",
    [_update([np.nan, 0.0]), _update([0.0, np.inf]), _update([0.0, 0.0], np.nan)],
    ids=["nan", "infinite", "loss"],
)
def test_an_update_that_is_not_finite_is_refused(bad: WeightsUpdate) -> None:
    fit = AveragedFit(candidate=np.zeros(2))
    fit.advance([_update([1.0, 1.0])])
    before = fit.state()
    with pytest.raises(ConvergenceError, match="not finite"):
        fit.advance([_update([1.0, 1.0]), bad])
    assert fit.state() == before


def test_updates_without_events_or_of_another_network_are_refused() -> None:
    fit = AveragedFit(candidate=np.zeros(2))
    with pytest.raises(ConvergenceError, match="no update with events"):
        fit.advance([])
    with pytest.raises(ConvergenceError, match="no update with events"):
        fit.advance([_update([1.0, 1.0], n_events=0)])
    with pytest.raises(ValueError, match=r"shape \(3,\), needed \(2,\)"):
        fit.advance([_update([1.0, 1.0, 1.0])])
    fit.advance([_update([1.0, 1.0]), _update([9.0, 9.0], n_events=0)])
    assert_array_equal(fit.candidate, [1.0, 1.0])


def test_steps_that_run_away_are_said_to(sites: list[Site]) -> None:
    def cubic(w: Floats) -> tuple[float, Floats]:
        with np.errstate(over="ignore", invalid="ignore"):
            return float((w**4).sum()), 4 * w**3

    with pytest.raises(ConvergenceError, match="lower the learning rate"):
        local_update(cubic, np.full(2, 10.0), LocalSteps(50, 1.0))
    with pytest.raises(ConvergenceError, match="not finite"):
        local_update(lambda w: (np.nan, w), np.ones(2), LocalSteps(1, 1.0))


@pytest.mark.parametrize("change", [{"steps": 0}, {"learning_rate": 0.0}, {"proximal": -1.0}])
def test_steps_that_make_no_sense_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="local steps: found"):
        LocalSteps(**{"steps": 1, "learning_rate": 0.1, **change})  # type: ignore[arg-type]


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="rule: found fedmean"):
        AveragedFit(candidate=np.zeros(2), rule="fedmean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_rounds 0"):
        AveragedFit(candidate=np.zeros(2), max_rounds=0)
    with pytest.raises(ValueError, match="found a state of"):
        AveragedFit.from_state({"weights": [1.0]})
