"""Minimum counts, folds and cells below which a site keeps its sums."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion.privacy import MinimumCounts, outweighed, releasable_edges, saturated
from tests.strategies import Survival, survival

pytestmark = pytest.mark.border

GRID = np.array([10.0, 25.0, 40.0, 60.0])


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 60))
def test_a_sum_leaves_only_above_every_minimum(n: int, n_events: int, n_inputs: int) -> None:
    refusal = MinimumCounts().refuses(n_patients=n, n_events=n_events, n_inputs=n_inputs)
    assert (refusal is None) == (n >= 50 and n_events >= 20 and n >= 5 * n_inputs)


def test_the_reason_names_the_first_minimum_missed() -> None:
    minimum = MinimumCounts()
    assert minimum.refuses(n_patients=49, n_events=9, n_inputs=1) == "below_minimum_patients"
    assert minimum.refuses(n_patients=50, n_events=19, n_inputs=99) == "below_minimum_events"
    assert minimum.refuses(n_patients=50, n_events=20, n_inputs=11) == "too_many_inputs"


@given(
    folds=st.lists(st.integers(0, 2), max_size=60),
    seed=st.integers(0, 99),
    patients=st.integers(1, 12),
    events=st.integers(1, 6),
)
def test_cross_fitting_needs_every_fold_above_the_minimum(
    folds: list[int], seed: int, patients: int, events: int
) -> None:
    minimum = MinimumCounts(patients=patients, events=events)
    event = np.random.default_rng(seed).random(len(folds)) < 0.6
    fold = np.array(folds, dtype=np.int64)
    enough = all(
        (fold == k).sum() >= max(patients, 10) and event[fold == k].sum() >= events
        for k in range(3)
    )
    assert (minimum.refuses_folds(fold, event, n_folds=3, n_inputs=2) is None) == enough


def test_lowered_minimums_are_named_with_both_numbers() -> None:
    assert MinimumCounts().lowered() == ()
    assert MinimumCounts(patients=80, cell=12).lowered() == ()
    assert MinimumCounts(patients=8, cell=1).lowered() == (
        "patients 8 (default 50)",
        "cell 1 (default 10)",
    )


@pytest.mark.border
@pytest.mark.parametrize("name", MinimumCounts.model_fields)
def test_each_limit_is_lowered_in_the_direction_that_protects_less(name: str) -> None:
    value = getattr(MinimumCounts(), name)
    sign = -1 if name == "intervals" else 1  # more intervals tell more
    assert MinimumCounts(**{name: value + sign}).lowered() == ()
    lower = value - sign
    assert MinimumCounts(**{name: lower}).lowered() == (f"{name} {lower} (default {value})",)


_ANY_LIMITS = st.builds(
    MinimumCounts,
    **{
        name: st.integers(2, 12) if name == "intervals" else st.integers(1, 300)
        for name in MinimumCounts.model_fields
    },
)


@pytest.mark.border
@given(one=_ANY_LIMITS, other=_ANY_LIMITS, third=_ANY_LIMITS)
def test_the_strictest_of_limits_protects_as_much_as_each(
    one: MinimumCounts, other: MinimumCounts, third: MinimumCounts
) -> None:
    both = one.strictest(other)
    assert both == other.strictest(one)
    assert both.strictest(third) == one.strictest(other.strictest(third))
    assert both.strictest(one) == both == both.strictest(both)
    named = [{x.split()[0] for x in limits.lowered()} for limits in (both, one, other)]
    assert named[0] == named[1] & named[2]
    for n_patients, n_events, n_inputs in ((299, 250, 1), (60, 25, 5), (120, 80, 20), (10, 5, 1)):
        counts = {"n_patients": n_patients, "n_events": n_events, "n_inputs": n_inputs}
        allowed = both.refuses(**counts) is None
        assert allowed == (one.refuses(**counts) is None and other.refuses(**counts) is None)


@pytest.mark.parametrize(
    "change",
    [
        {"cell": 0}, {"patients": -1}, {"unknown": 3}, {"snapshot": 0}, {"intervals": 1},
        {"intervals": 13},
    ],
)  # fmt: skip
def test_impossible_minimums_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        MinimumCounts(**change)


def _cells(rows: Survival, edges: np.ndarray) -> list[int]:
    return [
        int((rows.event & (rows.time > left) & (rows.time <= right)).sum())
        for left, right in pairwise([0.0, *edges])
    ]


@settings(max_examples=150, deadline=None)
@given(
    sites=st.lists(survival(min_size=20, max_size=80), min_size=1, max_size=4),
    cell=st.integers(1, 8),
)
def test_edges_that_every_site_keeps_leave_no_small_cell(sites: list[Survival], cell: int) -> None:
    kept = [releasable_edges(s.event, s.time, GRID, cell=cell) for s in sites]
    edges = GRID[np.append(np.logical_and.reduce(kept), True)]
    for site in sites:
        if len(edges) > 1:
            assert min(_cells(site, edges)) >= cell
            assert all((site.time > edge).sum() >= cell for edge in edges[:-1])
        assert releasable_edges(site.event, site.time, edges, cell=cell).all()


def test_edges_by_hand() -> None:
    event = np.array([True] * 6 + [False] * 2)
    time = np.array([5.0, 10.0, 11.0, 30.0, 50.0, 59.0, 70.0, 80.0])
    assert releasable_edges(event, time, GRID, cell=1).tolist() == [True, True, True]
    assert releasable_edges(event, time, GRID, cell=2).tolist() == [True, False, True]
    assert releasable_edges(event, time, GRID, cell=3).tolist() == [False, True, False]
    assert releasable_edges(event, time, GRID, cell=4).tolist() == [False, False, False]
    assert releasable_edges(event, time, GRID[-1:], cell=1).tolist() == []


def test_one_patient_must_not_carry_a_weighted_sum() -> None:
    rng = np.random.default_rng(0)
    assert not outweighed(np.zeros(2))
    assert not outweighed(rng.normal(size=60))
    assert not outweighed(1.5 * rng.normal(size=60))
    assert outweighed(1000.0 * rng.normal(size=60))
    assert outweighed(np.append(np.zeros(9), 4.0))  # 54.6 of 63.6
    assert not outweighed(np.append(np.zeros(9), 3.0))  # 20.1 of 29.1
    assert outweighed(np.array([0.0, np.inf]))
    assert outweighed(np.array([0.0, np.nan]))
    assert not outweighed(np.zeros(0))


def test_an_interval_that_rests_on_one_patient_or_nobody_is_saturated() -> None:
    even = np.full((12, 3), 0.1)
    one = even.copy()
    one[1:, 2] = 0.001  # eleven others weigh 0.011
    nobody = even.copy()
    nobody[:, 0] = 0.01
    assert not saturated(even)
    assert saturated(one)
    assert saturated(nobody)
    assert saturated(np.zeros((0, 2)))
    # One event in a hundred patients, at its own odds: many small weights, none that stands out.
    assert not saturated(np.full((100, 1), 0.01 * 0.99))
