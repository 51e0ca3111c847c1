"""Which rows and columns stand behind a sum: absent modalities, arms that leave one out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fusion import messages as m
from fusion.federation import (
    PERSONALISED,
    PROTOCOL,
    InProcess,
    SiteStudy,
    run_federation,
    summarise,
    without,
)
from fusion.federation.site_evaluation import hazard_at, personal_coefficients
from fusion.survival import cox_sums, cumulative_hazard
from tests.consortium import (
    ANY_CELL,
    EASY,
    PLAN,
    Asker,
    Pooled,
    large,
    run,
    site_rows,
    small,
    studies_of,
)

if TYPE_CHECKING:
    from fusion.federation.designs import SiteDesigns

pytestmark = pytest.mark.border

MODALITIES = PLAN.modalities


@pytest.mark.parametrize("left_out", MODALITIES)
def test_an_ablation_is_the_fit_without_the_modality(left_out: str) -> None:
    rows = small()
    fitted = run(rows, ANY_CELL)
    at = MODALITIES.index(left_out)
    kept = [x for x in range(6) if x % 3 != at]
    model = fitted.models[without(left_out)]
    assert_allclose(model.coefficients[[at, 3 + at]], 0.0, atol=1e-20)
    behind, _ = Pooled(rows, ANY_CELL, folds=False).fusion_rows(PROTOCOL)
    reduced = replace(behind, x=behind.x[:, kept])
    assert_allclose(model.coefficients[kept], reduced.cox(0.01), atol=1e-8)
    assert_allclose(model.coefficients[kept], reduced.lifelines(0.01), atol=1e-8)


def test_a_patient_with_one_modality_has_a_risk_and_one_with_none_has_not() -> None:
    rows = small()
    found = rows["site-01"]
    n = len(found.test)
    for modality in ("pathology", "radiology"):
        found.local[modality].test[:2] = np.nan
    found.tables["radiology"].test[:2] = np.nan
    found.local["clinical"].test[0] = np.nan  # the first has nothing at all
    found.tables["clinical"].test[0] = np.nan
    studies = studies_of(rows, EASY)
    fitted = run_federation(EASY, InProcess(studies))
    study = studies["site-01"]
    assert study.designs.tested.tolist() == [False] + [True] * (n - 1)
    told = next(s for s in fitted.sites if s.site == "site-01")
    assert told.n_test == fitted.evaluations["site-01"].n_test == n - 1
    assert told.n_test_events == found.test.event[1:].sum()
    model = fitted.models[PROTOCOL]
    risk = model.predict(study.columns(PROTOCOL).test)
    assert np.isnan(risk[0])
    assert np.isfinite(risk[1:]).all()
    assert_allclose(study.test_log_hazard(PROTOCOL, model.coefficients), risk[1:], atol=1e-12)


def test_a_training_patient_with_nothing_stands_behind_no_sum() -> None:
    rows = small()
    for split in (*rows["site-01"].local.values(), *rows["site-01"].tables.values()):
        split.train[:4] = np.nan
    fitted = run(rows, ANY_CELL)
    assert fitted.n_patients == sum(len(r.train) for r in rows.values()) - 4
    assert fitted.sites[0].n_train == len(rows["site-01"].train) - 4


@pytest.mark.parametrize("lacking", MODALITIES)
def test_a_site_that_lacks_a_modality_takes_part(lacking: str) -> None:
    rows = small()
    rows["site-02"].tables.pop(lacking, None)
    rows["site-02"].local.pop(lacking)
    fitted = run(rows, ANY_CELL)
    assert [s.code for s in fitted.sites] == ["", "", ""]
    assert fitted.sites[1].contributes == tuple(x for x in MODALITIES if x != lacking)
    behind, _ = Pooled(rows, ANY_CELL, folds=False).fusion_rows(PROTOCOL)
    having_some = behind.at(behind.x[:, 3:].sum(axis=1) < 3)
    assert_allclose(fitted.models[PROTOCOL].coefficients, having_some.cox(0.01), atol=1e-8)
    assert "site-02" in fitted.evaluations


def test_an_external_site_with_no_modality_of_the_model_takes_nothing_from_the_others() -> None:
    """It has scans only, of which no site trained an encoder."""
    rows = small()
    for found in rows.values():
        found.tables.pop("radiology")
    external = site_rows(90, 8, train=0.0, absent=0.0)
    external.tables.pop("clinical")
    rows["site-09"] = external
    fitted = run(rows, ANY_CELL)
    assert [s.code for s in fitted.sites] == ["", "", "", "modality_absent"]
    assert fitted.calibration_slope is not None
    assert set(fitted.evaluations) == {"site-01", "site-02", "site-03"}
    assert "site-09" not in summarise(fitted).arms[PROTOCOL].by_site


def _scaled() -> SiteDesigns:
    return Asker(site_rows(500, 1)).scaled().study.designs


def test_without_differences_between_sites_the_personal_model_is_the_consortiums() -> None:
    designs = _scaled()
    beta = np.linspace(-0.4, 0.4, 6)
    found = personal_coefficients(designs, beta, np.zeros(6))
    assert found is not None
    # A variance of zero is held at one in a million, so that the own data moves it a little.
    assert_allclose(found, beta, atol=1e-3)


def test_with_large_differences_it_is_the_sites_own_estimate() -> None:
    designs = _scaled()
    inputs, outcome = designs.design(PROTOCOL)
    moving = np.ptp(inputs, axis=0) > 0
    found = personal_coefficients(designs, np.zeros(6), np.full(6, 1e8))
    assert found is not None
    sums = cox_sums(inputs, outcome.event, outcome.time, found)
    assert_allclose(sums.gradient, 0.0, atol=1e-5)
    assert np.abs(found[moving]).max() > 0.1


@pytest.mark.parametrize("variance", [0.01, 0.3])
def test_the_personal_model_is_the_maximum_of_the_penalised_likelihood(variance: float) -> None:
    designs = _scaled()
    inputs, outcome = designs.design(PROTOCOL)
    centre, tau_squared = np.linspace(-0.4, 0.4, 6), np.full(6, variance)
    tau_squared[1] = 10 * variance
    found = personal_coefficients(designs, centre, tau_squared)
    assert found is not None
    sums = cox_sums(inputs, outcome.event, outcome.time, found)
    assert_allclose(sums.gradient - (found - centre) / tau_squared, 0.0, atol=1e-6)
    assert np.abs(found - centre).max() > 1e-3


def test_the_personal_model_of_a_discrete_model_moves_its_inputs_only() -> None:
    plan = replace(ANY_CELL, fusion_model="logistic_hazard")
    fitted = run(small(300, 250, 200), plan)
    results = summarise(fitted)
    assert set(results.arms[PERSONALISED].by_site) == {"site-01", "site-02", "site-03"}


def test_a_hazard_between_edges_is_linear_in_time() -> None:
    edges = np.array([100.0, 300.0, 1000.0])
    per_day = np.array([0.002, 0.001, 0.0])
    times = np.array([0.0, 50.0, 100.0, 200.0, 999.0, 5000.0])
    at_edges = np.tile(cumulative_hazard(per_day, edges, edges), (len(times), 1))
    found = hazard_at(at_edges, edges, times)
    assert_allclose(found, [0.0, 0.1, 0.2, 0.3, 0.4, 0.4], atol=1e-12)
    assert_allclose(found, cumulative_hazard(per_day, edges, times), atol=1e-12)


def test_out_of_fold_scores_of_a_fold_never_saw_it() -> None:
    """Other outcomes in one fold leave that fold's own scores as they are."""
    rows = large()
    studies = studies_of(rows, PLAN)
    fitted = run_federation(PLAN, InProcess(studies))
    changed = large()
    for found in changed.values():
        in_fold = found.folds == 1
        found.train.time[in_fold] = found.train.time[in_fold][::-1].copy()
    again = studies_of(changed, PLAN)
    other = run_federation(PLAN, InProcess(again))
    assert not np.allclose(
        fitted.encoders["clinical"].coefficients, other.encoders["clinical"].coefficients
    )
    for site in ("site-01", "site-03"):
        own, moved = (x[site].columns(PROTOCOL).train[:, 2] for x in (studies, again))
        in_fold = rows[site].folds == 1
        assert_allclose(moved[in_fold], own[in_fold], atol=1e-9)
        assert not np.allclose(moved[~in_fold], own[~in_fold], atol=1e-9)


def test_a_site_is_its_rows_alone() -> None:
    """As external, all of a site's rows are test rows and nothing of its own is left."""
    rows = site_rows(100, 1)
    found = rows.as_external()
    assert len(found.train) == len(found.folds) == 0
    assert len(found.test) == 100
    assert_array_equal(found.test.time, np.concatenate([rows.train.time, rows.test.time]))
    assert found.local == {}
    assert found.tables["clinical"].test.shape == (100, 4)
    assert found.subgroups["sex"].test.shape == (100,)
    assert found.treatment is not None
    assert found.treatment.test.shape == (100,)
    study = SiteStudy(PLAN, found)
    reply = m.decode(study.answer(m.encode(m.Describe(PLAN.run, PLAN.protocol, MODALITIES, True))))
    assert isinstance(reply, m.Description)
    assert not reply.trains
