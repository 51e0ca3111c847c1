"""Honest sums never break a bound, whatever the rows; sums that no rows have do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from fusion import messages as m
from fusion.discrete import hazard_sums
from fusion.evaluation import pair_counts
from fusion.federation import FederationPlan, SiteOutcome
from fusion.federation.bounds import (
    Behind,
    Fault,
    Watch,
    broken_total,
    consistency_fault,
    description_fault,
    evaluation_fault,
    intervals_fault,
    is_stationary,
    log_likelihood_at_zero,
    moments_fault,
    other_units,
)
from fusion.newton import LikelihoodSums, NewtonFit
from fusion.survival import cox_sums, fit_cox, interval_sums, moments
from tests.consortium import EASY
from tests.strategies import Survival, survival

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

pytestmark = pytest.mark.border

THREE = replace(EASY, modalities=("a", "b", "c"), sums={"x": ("1", "2", "3")}, encoder_ridge={})
EDGES = np.array([10.0, 30.0, 80.0])
BEHIND = Behind(100, 40, 1, 100, 100, exact=True, every_event=True)


@dataclass
class Known:
    plan: FederationPlan
    outcomes: dict[str, SiteOutcome]


def watch_over(*rows: Survival, plan: FederationPlan = THREE) -> Watch:
    """Watch over sites that said how many patients and events they have."""
    outcomes = {
        f"site-{i}": SiteOutcome(
            f"site-{i}", n_train=len(x.time), n_train_events=int(x.event.sum()), trains=True,
            contributes=("x",), n_test=len(x.time), n_test_events=int(x.event.sum()),
        )
        for i, x in enumerate(rows)
    }  # fmt: skip
    return Watch(Known(plan, outcomes))


def cox(rows: Survival, beta: Floats) -> LikelihoodSums:
    return cox_sums(rows.inputs, rows.event, rows.time, beta)


def simulated(seed: int = 0, n: int = 120) -> Survival:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    time = np.ceil(rng.exponential(500.0 * np.exp(-x @ [0.8, -0.4, 0.0])))
    lost = np.ceil(rng.uniform(100.0, 2000.0, n))
    return Survival(x, time <= lost, np.minimum(time, lost), np.zeros(n, dtype=np.int64))


def newton_path(rows: Survival, change: Callable[[LikelihoodSums], LikelihoodSums]) -> str | None:
    """Fit to changed sums beside an honest site's, and give the first bound that is broken."""
    watch, fit = watch_over(rows), NewtonFit(n_inputs=3, ridge=0.01)
    beside = simulated(99)
    for _ in range(12):
        sums = change(cox(rows, fit.candidate))
        reason = watch.check(("site-0",), "x", fit.candidate, sums)
        if reason is not None:
            return reason
        fit.advance(sums + cox(beside, fit.candidate))
        if fit.converged:
            return None
    return None


LIES: dict[str, tuple[Callable[[LikelihoodSums], LikelihoodSums], set[str]]] = {
    "gradient x100": (lambda s: replace(s, gradient=100 * s.gradient), {"gradient_too_long"}),
    "gradient x1e6": (lambda s: replace(s, gradient=1e6 * s.gradient), {"gradient_too_long"}),
    "gradient x1.2": (
        lambda s: replace(s, gradient=1.2 * s.gradient), {"not_concave", "curvature_disagrees"},
    ),
    "gradient flipped": (lambda s: replace(s, gradient=-s.gradient), {"not_concave"}),
    "no gradient": (lambda s: replace(s, gradient=0 * s.gradient), {"not_concave"}),
    "information flipped": (
        lambda s: replace(s, information=-s.information), {"information_indefinite"},
    ),
    "information x100": (
        lambda s: replace(s, information=100 * s.information),
        {"curvature_disagrees", "log_likelihood_impossible"},
    ),
    "log-likelihood x2": (
        lambda s: replace(s, log_likelihood=2 * s.log_likelihood), {"log_likelihood_impossible"},
    ),
    "log-likelihood flipped": (
        lambda s: replace(s, log_likelihood=-s.log_likelihood), {"log_likelihood_impossible"},
    ),
    "all x1.5": (
        lambda s: LikelihoodSums(
            1.5 * s.log_likelihood, 1.5 * s.gradient, 1.5 * s.information, s.n_patients, s.n_events
        ),
        {"log_likelihood_impossible"},
    ),
    "not a number": (lambda s: replace(s, gradient=np.nan * s.gradient), {"not_finite"}),
    "twice as many": (lambda s: replace(s, n_patients=2 * s.n_patients), {"counts_disagree"}),
    "nobody": (lambda s: replace(s, n_patients=0, n_events=0), {"counts_disagree"}),
    "lowest at zero": (
        lambda s: replace(
            s, log_likelihood=-1e12, gradient=0 * s.gradient, information=0 * s.information
        ),
        {"log_likelihood_impossible"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_sums_that_no_rows_have_break_a_bound(name: str) -> None:
    change, reasons = LIES[name]
    for seed in range(20):
        assert newton_path(simulated(seed), change) in reasons


def test_a_fit_to_honest_sums_breaks_none() -> None:
    for seed in range(20):
        assert newton_path(simulated(seed), lambda s: s) is None


STEPS = st.lists(st.floats(-3.0, 3.0), min_size=3, max_size=3).map(np.array)
SHAPES: dict[str, Callable[[Floats], Floats]] = {
    "as they are": lambda x: x,
    "collinear": lambda x: x[:, [0, 0, 0]] * [1.0, 2.0, 1.0 + 1e-9],
    "constant": lambda x: np.column_stack([x[:, 0], np.ones(len(x)), np.zeros(len(x))]),
    "one stands out": lambda x: x + 30.0 * (np.arange(len(x)) == 0)[:, None],
    "flags": lambda x: (x > 0).astype(float),
    "small": lambda x: 1e-7 * x,
}


@settings(max_examples=150, deadline=None)
@given(survival(), st.lists(STEPS, min_size=1, max_size=5), st.sampled_from(sorted(SHAPES)))
def test_no_rows_break_a_bound_at_any_coefficients(
    rows: Survival, path: list[Floats], shape: str
) -> None:
    """Ties, separation, collinear and constant inputs: inequalities, not statistics."""
    rows = rows._replace(inputs=SHAPES[shape](rows.inputs))
    watch, short = watch_over(rows), [0.01 * x for x in path]
    for beta in [np.zeros(3), *path, *short, *short[::-1]]:
        assert watch.check(("site-0",), "x", beta, cox(rows, beta)) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(survival(), min_size=2, max_size=4), st.lists(STEPS, min_size=1, max_size=4),
)  # fmt: skip
def test_no_total_of_honest_sites_breaks_a_bound(sites: list[Survival], path: list[Floats]) -> None:
    watch = watch_over(*sites)
    names = tuple(watch.known.outcomes)
    for beta in [np.zeros(3), *path, *[0.01 * x for x in path]]:
        parts = [cox(x, beta) for x in sites]
        total = sum(parts[1:], start=parts[0])
        assert watch.check(names, "x", beta, total) is None
        if len(names) > 2:  # a site leaves: what all said at 0 still binds the others
            assert watch.check(names[1:], "x", beta, sum(parts[2:], start=parts[1])) is None


@settings(max_examples=60, deadline=None)
@given(survival(), st.lists(st.floats(-2.0, 2.0), min_size=9, max_size=9))
def test_no_rows_break_a_bound_of_the_discrete_model(rows: Survival, step: list[float]) -> None:
    plan = replace(THREE, fusion_model="logistic_hazard", edges_days=tuple(EDGES))
    spread = np.maximum(rows.inputs.std(axis=0), 1e-9)
    flags = (rows.inputs > 1.0).astype(float)
    x = np.hstack([(rows.inputs - rows.inputs.mean(axis=0)) / spread, flags])
    watch = watch_over(rows, plan=plan)
    for share in (0.0, 1.0, 0.9, 0.01, 0.011):
        theta = share * np.array(step)
        sums = hazard_sums(x, rows.event, rows.time, theta, edges_days=EDGES)
        if sums.n_events:
            assert watch.check(("site-0",), "protocol", theta, sums) is None


def test_bounds_at_zero_are_reached() -> None:
    """All events first, or all censored first, is as far as a log-likelihood can be."""
    n, d = 30, 12
    time, first = np.arange(1.0, n + 1), np.arange(n) < d
    for event, expected in ((first, 0), (first[::-1], 1)):
        found = cox_sums(np.zeros((n, 1)), event, time, [0.0]).log_likelihood
        assert found == pytest.approx(log_likelihood_at_zero(n, d)[expected])


@pytest.mark.parametrize("reach", [1e-8, 0.1, 2.0, 20.0])
def test_mean_curvature_lies_where_the_ends_allow(reach: float) -> None:
    from fusion.federation.bounds import _turn_between

    start, end = 2.0, 2.0 * np.exp(0.4 * reach)
    low, high = _turn_between(start, end, reach)
    highest = quad(
        lambda t: min(start * np.exp(reach * t), end * np.exp(reach * (1 - t))), 0, 1, limit=200
    )[0]
    lowest = quad(
        lambda t: max(start * np.exp(-reach * t), end * np.exp(-reach * (1 - t))), 0, 1, limit=200
    )[0]
    assert high == pytest.approx(highest, rel=1e-6)
    assert low == pytest.approx(lowest, rel=1e-6)


def test_without_a_reach_only_concavity_is_asked() -> None:
    rows = simulated()
    here, there = np.zeros(3), np.array([0.2, 0.0, 0.0])
    first, second = cox(rows, here), cox(rows, there)
    wide = replace(second, information=1000 * second.information)
    assert consistency_fault((here, first), (there, wide), np.inf) is None
    assert consistency_fault((here, first), (there, wide), 0.1) == "curvature_disagrees"


def test_what_was_said_while_a_penalty_is_chosen_binds_the_fit() -> None:
    rows, watch = simulated(), watch_over(simulated())
    beta = np.array([0.3, 0.0, 0.0])
    said = cox(rows, beta)
    assert watch.check(("site-0",), "x/try-0-1", np.zeros(3), cox(rows, np.zeros(3))) is None
    assert watch.check(("site-0",), "x/try-0-1", beta, said) is None
    other = replace(said, log_likelihood=said.log_likelihood - 0.1)
    assert watch.check(("site-0",), "x", beta, other) is not None
    fold = cox(rows._replace(event=rows.event & (rows.inputs[:, 0] < 1)), beta)
    assert watch.check(("site-0",), "x/1", beta, fold) is None


def test_sums_that_one_patient_outweighs_pass_beside_others() -> None:
    rows = simulated()
    watch, beta = watch_over(rows, rows), np.array([9.0, 0.0, 0.0])
    lowest = LikelihoodSums(-1e12, np.zeros(3), np.zeros((3, 3)), len(rows.time), rows.event.sum())
    assert watch.check(("site-0",), "x", beta, lowest) is None
    assert watch.check(("site-0", "site-1"), "x", beta, lowest + cox(rows, beta)) is None


@pytest.mark.parametrize(("ridge", "l1"), [(0.0, 0.0), (0.05, 0.0), (0.02, 0.08)])
def test_a_fit_is_stationary_unless_a_site_held_it_back(ridge: float, l1: float) -> None:
    rows = simulated()
    fit = fit_cox(rows.inputs, rows.event, rows.time, ridge=ridge, l1=l1)
    assert is_stationary(fit, cox(rows, fit.candidate))
    held = NewtonFit(n_inputs=3, ridge=ridge, l1=l1)
    held.advance(cox(rows, held.candidate))
    while not held.converged:
        n, d = len(rows.time), int(rows.event.sum())
        held.advance(LikelihoodSums(-1e12, np.zeros(3), np.zeros((3, 3)), n, d))
    assert not is_stationary(held, cox(rows, held.candidate))


def _moments(x: Floats) -> m.DesignMoments:
    found = moments(x)
    return m.DesignMoments(found.n[None], found.mean[None], found.m2[None])


MOMENT_LIES: list[Callable[[m.DesignMoments], m.DesignMoments]] = [
    lambda r: replace(r, n=r.n * 2),
    lambda r: replace(r, n=r.n - 0.5),
    lambda r: replace(r, m2=-r.m2),
    lambda r: replace(r, n=np.ones_like(r.n)),
]


def test_moments_are_of_as_many_patients_as_there_are() -> None:
    honest = _moments(np.random.default_rng(0).normal(size=(100, 3)))
    assert moments_fault(honest, BEHIND) is None
    for lie in MOMENT_LIES:
        assert moments_fault(lie(honest), BEHIND) == "moments_impossible"


def test_a_site_with_another_unit_is_found_among_three() -> None:
    rng = np.random.default_rng(1)
    replies = {f"site-{i}": _moments(rng.normal(size=(80, 3)) + i) for i in range(3)}
    assert other_units(replies) == {}
    replies["site-1"] = _moments(rng.normal(size=(80, 3)) * [1.0, 1000.0, 1.0])
    assert set(other_units(replies)) == {"site-1"}
    del replies["site-0"]
    assert other_units(replies) == {}


INTERVAL_LIES: dict[str, Callable[[m.Intervals], m.Intervals]] = {
    "counts_disagree": lambda r: replace(r, events=r.events * 100),
    "exposure_impossible": lambda r: replace(r, exposure=r.exposure * 1e6),
}


def _intervals(rows: Survival) -> tuple[m.Intervals, Behind]:
    log_hazard = rows.inputs @ [0.8, -0.4, 0.0]
    edges = np.array([200.0, 500.0, 1500.0])
    events, exposure = interval_sums(log_hazard, rows.event, rows.time, edges)
    risk = moments(log_hazard[:, None])
    n, d = len(rows.time), int(rows.event.sum())
    reply = m.Intervals(events[None], exposure[None], np.column_stack([risk.n, risk.mean, risk.m2]))
    return reply, Behind(n, d, 1, n, n, exact=True, every_event=True)


def test_exposure_falls_and_events_are_those_there_are() -> None:
    reply, behind = _intervals(simulated())
    edges = (200.0, 500.0, 1500.0)
    assert intervals_fault(reply, behind, edges) is None
    for reason, lie in INTERVAL_LIES.items():
        assert intervals_fault(lie(reply), behind, edges) == reason
    rising = replace(reply, exposure=reply.exposure[:, ::-1])
    assert intervals_fault(rising, behind, edges) == "exposure_impossible"
    half = replace(reply, events=reply.events + 0.5)
    assert intervals_fault(half, behind, edges) == "counts_disagree"
    fewer = replace(reply, risk=reply.risk * [0.5, 1.0, 1.0])
    assert intervals_fault(fewer, behind, edges) == "counts_disagree"


PAIR_LIES: list[Callable[[Floats], Floats]] = [
    lambda v: v * 100.0,
    lambda v: v * np.array([1, 1, 1, 2, 1, 1, 1, 1, 1]),
    lambda v: v * np.array([-1, 1, 1, 1, 1, 1, 1, 1, 1]),
    lambda v: v * np.array([1, 1, 1, 1, 1, 1, 1, 1, 0.01]),
    lambda v: v * np.array([1, 1, 1, 1, 1, 1, 5, 1, 1]),
    lambda v: v + np.array([0, 0, 0, 0, 1, 0, 0, 0, 0]),
]


def _evaluation(pairs: Floats, n: int, d: int) -> Any:
    empty: dict[str, Any] = dict.fromkeys(m.Evaluation.__dataclass_fields__, np.zeros(0))
    return m.Evaluation(**{**empty, "n_test": n, "n_test_events": d, "pairs": pairs[None]})


@settings(max_examples=60, deadline=None)
@given(survival())
def test_pairs_are_of_the_test_patients_there_are(rows: Survival) -> None:
    counts = pair_counts(rows.inputs[:, 0].round(1), rows.event, rows.time)
    n, d = len(rows.time), int(rows.event.sum())
    outcome = SiteOutcome("site-0", n_test=n, n_test_events=d)
    assert evaluation_fault(_evaluation(counts.to_vector(), n, d), outcome) is None
    other = _evaluation(counts.to_vector(), n + 1, d)
    assert evaluation_fault(other, outcome) == "counts_disagree"


@pytest.mark.parametrize("lie", PAIR_LIES)
def test_pairs_that_no_patients_form_are_refused(lie: Callable[[Floats], Floats]) -> None:
    rows = simulated()
    counts = pair_counts(rows.inputs[:, 0], rows.event, rows.time)
    n, d = len(rows.time), int(rows.event.sum())
    outcome = SiteOutcome("site-0", n_test=n, n_test_events=d)
    found = evaluation_fault(_evaluation(lie(counts.to_vector()), n, d), outcome)
    assert found == "pairs_impossible"


def test_a_site_has_no_more_events_than_patients() -> None:
    none = np.zeros(3, dtype=bool)
    honest = m.Description("0" * 64, 50, 20, 10, 0, True, none, none, none)
    assert description_fault(honest) is None
    for lie in ({"n_train_events": 51}, {"n_test_events": 11}, {"trains": False}, {"n_train": -1}):
        assert description_fault(replace(honest, **lie)) == "counts_disagree"


def test_a_broken_total_is_one_sentence() -> None:
    said = str(broken_total(Fault("clinical", "not_concave")))
    assert "clinical" in said
    assert "not concave" in said
    assert "\n" not in said
