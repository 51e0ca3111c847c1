"""Fits from sums: which ridge is chosen, and that what is fitted is the pooled estimate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fusion import messages as m
from fusion.discrete import fit_logistic_hazard
from fusion.federation import (
    PROTOCOL,
    Coordinator,
    FederationPlan,
    InProcess,
    QuorumNotMet,
    SiteRows,
    run_federation,
)
from fusion.federation.plan import site_groups
from fusion.newton import ConvergenceError
from fusion.survival import cox_sums
from tests.consortium import (
    ANY_CELL,
    EASY,
    Flaky,
    Overheard,
    Pooled,
    Stacked,
    run,
    site_rows,
    small,
    studies_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRENGTHS = (0.001, 0.03, 0.3, 3.0)
CHOOSING = replace(
    EASY,
    encoder_ridge={"radiology": STRENGTHS, "clinical": STRENGTHS},
    fusion_ridge=(0.003, 0.05, 0.6),
    minimum=EASY.minimum.model_copy(update={"patients_per_input": 5}),
)


def _held_out(rows: Stacked, ridge: float, groups: NDArray[np.intp]) -> float:
    """Log-likelihood of each group of strata at coefficients fitted to the others."""
    of_row, total = groups[rows.strata], 0.0
    for group in np.unique(groups):
        try:
            beta = rows.at(of_row != group).cox(ridge)
        except ConvergenceError:
            return -np.inf
        left = rows.at(of_row == group)
        sums = cox_sums(left.x, left.event, left.time, beta, strata=left.strata)
        total += sums.log_likelihood
    return total


def _chosen(rows: Stacked, strengths: tuple[float, ...], groups: list[int]) -> tuple[int, float]:
    """Index of the best strength, and the penalty of all patients together that it stands for."""
    of_site = np.array(groups)
    best = int(np.argmax([_held_out(rows, ridge, of_site) for ridge in strengths]))
    of_row = of_site[rows.strata]
    share = np.mean([(of_row != g).mean() for g in np.unique(of_site)])
    return best, strengths[best] * share


def _present(rows: Stacked) -> Stacked:
    return rows.at(~np.isnan(rows.x).all(axis=1))


@pytest.mark.parametrize("n_sites", [3, 7])
def test_the_ridge_is_the_best_for_sites_that_a_fit_never_saw(n_sites: int) -> None:
    sizes = (210, 160, 140, 130, 120, 90, 80)[:n_sites]
    rows = small(*sizes)
    rows["site-02"].tables.pop("radiology")
    fitted = run(rows, CHOOSING)
    trained = [len(r.train) for r in rows.values()]
    pooled = Pooled(rows, CHOOSING, folds=False, ridge=fitted.ridge)
    best = set()
    for modality in CHOOSING.sums:
        behind = _present(pooled.table(modality)[0])
        having = [trained[int(s[-1]) - 1] for s in pooled.having(modality)]
        index, expected = _chosen(behind, STRENGTHS, site_groups(having))
        assert fitted.ridge[modality] == pytest.approx(expected, rel=1e-12)
        best.add(index)
    arm, _ = pooled.fusion_rows(PROTOCOL)
    index, expected = _chosen(arm, CHOOSING.fusion_ridge, site_groups(trained))
    assert fitted.ridge[PROTOCOL] == pytest.approx(expected, rel=1e-12)
    assert_allclose(
        fitted.encoders["clinical"].coefficients,
        pooled.table("clinical")[0].cox(fitted.ridge["clinical"]),
        atol=1e-8,
    )
    assert best != {0}


def test_the_ridge_never_depends_on_test_rows() -> None:
    rows, other = small(), small()
    for found in other.values():
        found.test.event[:] = ~found.test.event
        found.test.time[:] = found.test.time[::-1].copy()
        for table in found.tables.values():
            table.test[:] *= -3.0
    fitted, again = run(rows, CHOOSING), run(other, CHOOSING)
    assert again.ridge == fitted.ridge
    for arm, model in fitted.models.items():
        assert_array_equal(again.models[arm].coefficients, model.coefficients)


def _stages(rows: dict[str, SiteRows], plan: FederationPlan) -> tuple[dict[str, float], set[str]]:
    fitted = run(rows, plan)
    return fitted.ridge, {r.stage for r in fitted.rounds}


def test_a_single_strength_is_taken_as_it_is() -> None:
    ridge, stages = _stages(small(), EASY)
    assert ridge == {"radiology": 0.02, "clinical": 0.05, PROTOCOL: 0.01}
    assert not {"encoder_ridge", "fusion_ridge"} & stages


def test_a_single_contributing_site_takes_the_middle_strength() -> None:
    rows = small()
    for site in ("site-01", "site-03"):
        rows[site].tables.pop("radiology")
    plan = replace(CHOOSING, encoder_ridge={"radiology": (0.001, 0.07, 5.0), "clinical": STRENGTHS})
    ridge, stages = _stages(rows, plan)
    assert ridge["radiology"] == 0.07
    assert ridge["clinical"] not in STRENGTHS  # of all patients together
    assert "encoder_ridge" in stages


def test_a_strength_without_a_maximum_is_never_chosen() -> None:
    """At all sites but one an input separates the patients: without a ridge it has no maximum."""
    rows = small(210, 160, 140)
    for site in ("site-01", "site-02"):
        train = rows[site].train
        rows[site].tables["clinical"].train[:, 0] = 60.0 - train.time / 100.0
        train.event[:] = True
    plan = replace(CHOOSING, encoder_ridge={"radiology": (0.02,), "clinical": (0.0, 0.1, 1.0)})
    fitted = run(rows, plan)
    assert fitted.ridge["clinical"] > 0.0
    everywhere = replace(plan, encoder_ridge={"radiology": (0.02,), "clinical": (0.0, 1e-9)})
    rows["site-03"].train.event[:] = True
    rows["site-03"].tables["clinical"].train[:, 0] = 60.0 - rows["site-03"].train.time / 100.0
    with pytest.raises(ConvergenceError):
        run(rows, everywhere)


@pytest.mark.parametrize("ridge", [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0])
def test_coefficients_are_the_pooled_ones_in_few_rounds(ridge: float) -> None:
    rows = small()
    plan = replace(
        ANY_CELL, encoder_ridge={"radiology": (ridge,), "clinical": (ridge,)}, fusion_ridge=(ridge,)
    )
    fitted = run(rows, plan)
    assert max(fitted.fit_rounds.values()) <= 10
    pooled = Pooled(rows, plan, folds=False)
    for modality, encoder in fitted.encoders.items():
        expected = _present(pooled.table(modality)[0]).lifelines(ridge)
        assert_allclose(encoder.coefficients, expected, atol=1e-9)
    for arm, model in fitted.models.items():
        expected = pooled.fusion_rows(arm)[0].lifelines(ridge)
        assert_allclose(model.coefficients, expected, atol=1e-8)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_an_elastic_net_is_the_pooled_one(share: float) -> None:
    rows = small()
    plan = replace(
        ANY_CELL, encoder_ridge={"radiology": (0.08,), "clinical": (0.02,)},
        l1_ratio={"radiology": share},
    )  # fmt: skip
    fitted = run(rows, plan)
    behind = _present(Pooled(rows, plan, folds=False).table("radiology")[0])
    expected = behind.cox(0.08 * (1 - share), 0.08 * share)
    found = fitted.encoders["radiology"].coefficients
    assert_allclose(found, expected, atol=1e-9)
    if share == 1.0:
        assert 0 < (found == 0).sum() < len(found)
        # A coefficient at zero has a slope within the penalty, any other exactly at its edge.
        sums = cox_sums(behind.x, behind.event, behind.time, found, strata=behind.strata)
        slope = np.abs(sums.gradient / sums.n_patients)
        assert (slope[found == 0] <= 0.08).all()
        assert_allclose(slope[found != 0], 0.08, atol=1e-9)


def test_a_logistic_hazard_is_the_pooled_one() -> None:
    rows = small()
    plan = replace(ANY_CELL, fusion_model="logistic_hazard")
    fitted = run(rows, plan)
    pooled = Pooled(rows, plan, folds=False)
    for arm, model in fitted.models.items():
        behind, _ = pooled.fusion_rows(arm)
        expected = fit_logistic_hazard(
            behind.x, behind.event, behind.time,
            edges_days=model.edges_days, strata=behind.strata, ridge=0.01,
        ).candidate  # fmt: skip
        k = len(model.edges_days)
        assert_allclose(model.baseline, expected[:k], atol=1e-8)
        assert_allclose(model.coefficients, expected[k:], atol=1e-8)
        assert fitted.fit_rounds[arm] <= 12
    assert fitted.models[PROTOCOL].kind == "logistic_hazard"
    assert set(fitted.evaluations) == set(rows)


def test_a_reduced_encoder_is_that_of_the_pooled_components() -> None:
    rows = small(300, 250, 200)
    for found in rows.values():  # two directions stand out
        table = found.tables["radiology"].train
        table[:, 1] = table[:, 0] + 0.3 * table[:, 1]
        table[:, 3] = table[:, 2] + 0.5 * table[:, 3]
    plan = replace(ANY_CELL, components={"radiology": 2})
    fitted = run(rows, plan)
    behind = _present(Pooled(rows, ANY_CELL, folds=False).table("radiology")[0])
    axes = np.linalg.svd(behind.x, full_matrices=False)[2][:2].T
    reduced = replace(behind, x=behind.x @ axes)
    found = fitted.encoders["radiology"]
    assert_allclose(found.coefficients, axes @ reduced.cox(0.02), atol=1e-8)
    assert len(found.inputs) == len(found.coefficients) == 6


def test_a_site_of_few_patients_means_a_random_projection_for_all() -> None:
    rows = small(300, 250, 200)
    rows["site-03"].tables["radiology"].train[30:] = np.nan
    plan = replace(
        ANY_CELL,
        components={"radiology": 2},
        minimum=ANY_CELL.minimum.model_copy(update={"patients": 20, "events": 5,
                                                    "patients_per_input": 6}),
    )  # fmt: skip
    transport = Overheard(InProcess(studies_of(rows, plan)))
    coordinator = Coordinator(plan, transport)
    fitted = coordinator.run()
    assert coordinator.talk.reduces == {"pathology": False, "radiology": False, "clinical": False}
    assert not [x for x, _ in transport.heard if isinstance(x, m.AskProducts)]
    (told,) = [x for x, _ in transport.heard if isinstance(x, m.SetComponents)]
    behind = _present(Pooled(rows, ANY_CELL, folds=False).table("radiology")[0])
    reduced = replace(behind, x=behind.x @ told.axes[0])
    found = fitted.encoders["radiology"].coefficients
    assert_allclose(found, told.axes[0] @ reduced.cox(0.02), atol=1e-8)
    principal = np.linalg.svd(behind.x, full_matrices=False)[2][:2].T
    assert not np.allclose(np.abs(told.axes[0]), np.abs(principal), atol=0.05)


def test_large_sites_come_first_and_groups_stay_even() -> None:
    assert site_groups([10, 20]) == [1, 0]
    assert site_groups([100, 10, 10, 10, 10, 10]) == [0, 1, 2, 3, 4, 1]
    sizes = np.random.default_rng(0).integers(50, 500, 23)
    groups = np.array(site_groups(sizes.tolist()))
    filled = np.bincount(groups, weights=sizes)
    assert len(filled) == 5
    assert filled.max() - filled.min() <= sizes.max()
    assert site_groups([0, 0, 0]) == [0, 1, 2]


@pytest.mark.parametrize("round_of_sums", [1, 2, 3])
def test_a_site_lost_while_the_ridge_is_chosen_leaves_the_choice_to_the_others(
    round_of_sums: int,
) -> None:
    transport = Flaky(studies_of(small(), CHOOSING), "site-02", lambda _, n: n >= round_of_sums)
    fitted = run_federation(CHOOSING, transport)
    assert [s.code for s in fitted.sites] == ["", "unreachable", ""]
    assert set(fitted.encoders) == set(CHOOSING.sums)
    assert np.isfinite(fitted.models[PROTOCOL].coefficients).all()


def test_one_of_two_sites_lost_while_the_ridge_is_chosen_ends_in_words_or_goes_on() -> None:
    """The fit that leaves the remaining site out has nobody behind it any more."""
    rows = {"site-01": site_rows(210, 1), "site-02": site_rows(160, 2)}
    transport = Flaky(studies_of(rows, CHOOSING), "site-02", lambda _, n: n >= 2)
    fitted: Any = None
    try:
        fitted = run_federation(CHOOSING, transport)
    except QuorumNotMet:
        return
    assert [s.code for s in fitted.sites] == ["", "unreachable"]
    assert np.isfinite(fitted.models[PROTOCOL].coefficients).all()
