from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.metrics import concordance_index_censored

from fusion import evaluation as ev
from fusion.privacy import MinimumCounts

MINIMUM = MinimumCounts()


def make_site(seed, n=300, shares=(0.5, 0.3, 0.2)):
    """Log hazard, expected events, event by day 400, time and level of one site."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n)
    death = rng.exponential(600 * np.exp(-0.8 * x))
    time = np.minimum(death, rng.uniform(100, 1500, n))
    seen = (death <= time) & (time <= 400.0)
    expected = np.exp(0.8 * x) * np.minimum(time, 400.0) / 600
    return x, expected, seen, time, rng.choice(len(shares), n, p=shares)


def sums_of(site, *, n_groups=3, minimum=MINIMUM):
    return ev.subgroup_sums(*site, n_groups=n_groups, minimum=minimum)


def levels(with_event, without, unknown=(0, 0)):
    """Site with so many patients with and without event in each level, in random order."""
    sizes = [*zip(with_event, without, strict=True), unknown]
    number = [*range(len(with_event)), -1]
    level = np.repeat(np.repeat(number, 2), np.ravel(sizes))
    event = np.repeat(np.tile([True, False], len(sizes)), np.ravel(sizes))
    order = np.random.default_rng(0).permutation(len(level))
    rng = np.random.default_rng(1)
    x, time = rng.normal(size=len(level)), rng.uniform(1, 400, len(level))
    return x, np.exp(x) * time, event[order], time, level[order]


def shown(with_event, without, unknown=(0, 0)):
    sums = sums_of(levels(with_event, without, unknown), n_groups=len(with_event))
    flags = sums.expected.any(axis=1)
    np.testing.assert_array_equal(flags, sums.pairs.any(axis=1))
    return "".join("abcdef"[k] for k in np.flatnonzero(flags))


def test_figures_are_those_of_the_rows_of_a_level():
    sites = [make_site(seed) for seed in range(3)]
    found = ev.subgroup_figures([sums_of(site) for site in sites])
    for k, level in enumerate(found):
        own = [[column[site[4] == k] for column in site[:4]] for site in sites]
        assert level.n_patients == sum(len(part[0]) for part in own)
        assert level.n_events == sum(part[2].sum() for part in own)
        ratio = level.n_events / sum(part[1].sum() for part in own)
        assert level.observed_expected.value == pytest.approx(ratio)
        pairs = [concordance_index_censored(e, t, x) for x, _, e, t in own]
        concordant = sum(p[1] + p[3] / 2 for p in pairs)
        expected = concordant / sum(sum(p[1:4]) for p in pairs)
        assert level.concordance.value == pytest.approx(expected)
        assert level.concordance.low < expected < level.concordance.high


@pytest.mark.parametrize(
    ("with_event", "without", "unknown", "expected"),
    [
        ((40, 30), (50, 60), (0, 0), "ab"),
        ((40, 9, 30), (50, 60, 70), (0, 0), "c"),  # 9 events hide b, and b's 9 hide a
        ((40, 9, 30), (50, 8, 50), (0, 0), "a"),  # c is smaller than a here
        ((40, 30), (50, 9), (0, 0), ""),  # 9 without event; nobody else to hide them
        ((40, 30), (50, 60), (0, 3), "b"),  # 3 of unknown level would follow
        ((40, 30), (50, 60), (12, 15), "ab"),
        ((40, 30), (50, 60), (12, 9), "b"),
        ((40, 6, 7, 30), (50, 20, 20, 60), (0, 0), "ad"),  # b and c stand for each other
        ((40, 0, 30), (50, 0, 60), (0, 0), "ac"),  # an empty level hides nobody
        ((5, 4), (50, 60), (0, 0), ""),
    ],
)
def test_small_levels_are_hidden_and_do_not_follow(with_event, without, unknown, expected):
    assert shown(with_event, without, unknown) == expected


@given(
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=6),
    st.tuples(st.integers(0, 25), st.integers(0, 25)),
    st.integers(1, 12),
    st.integers(1, 12),
)
@settings(max_examples=150)
def test_no_hidden_patients_follow_from_the_totals(sizes, unknown, cell, test_events):
    minimum = MinimumCounts(cell=cell, test_events=test_events)
    sums = sums_of(levels(*zip(*sizes, strict=True), unknown), n_groups=len(sizes), minimum=minimum)
    seen, _, patients = sums.expected.T
    told = patients > 0
    assert (seen[told] >= test_events).all()
    assert ((patients - seen)[told] >= cell).all()
    if told.any():
        totals = np.sum([*sizes, unknown], axis=0)
        left = totals - [seen.sum(), (patients - seen).sum()]
        assert left.sum() == 0 or left.min() >= cell
    assert not sums.pairs[~told].any()


def test_a_level_that_no_site_released_has_no_figure():
    figures = ev.subgroup_figures([sums_of(make_site(k, 150, (0.5, 0.45, 0.05))) for k in range(2)])
    assert figures[2] == ev.SubgroupFigures(0, 0, None, None)
    assert figures[0].n_patients > 0


def test_sums_add_up_and_survive_the_journey():
    parts = [sums_of(make_site(seed)) for seed in range(3)]
    assert ev.subgroup_figures(parts) == ev.subgroup_figures(reduce(add, parts))
    there = ev.SubgroupSums.from_vector(parts[0].to_vector(), n_groups=3)
    np.testing.assert_array_equal(there.pairs, parts[0].pairs)
    np.testing.assert_array_equal(there.expected, parts[0].expected)


def test_an_empty_site_has_sums():
    nobody = np.zeros(0)
    sums = sums_of((nobody, nobody, nobody.astype(bool), nobody, nobody))
    assert not sums.to_vector().any()


@pytest.mark.parametrize(
    ("place", "name", "bad"),
    [(0, "log_hazard", np.nan), (1, "expected", np.inf), (3, "time", -1.0), (4, "group", 3.0),
     (4, "group", -2.0), (4, "group", 0.5)],
)  # fmt: skip
def test_bad_rows_are_named(place, name, bad):
    site = [*make_site(0)]
    site[place] = np.where(np.arange(300) == 7, bad, site[place])
    with pytest.raises(ValueError, match=rf"^{name}: found"):
        sums_of(site)
