"""Figures of a federated evaluation equal those of all test rows at hand, and hide small cells."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from numpy.testing import assert_allclose

from fusion import messages as m
from fusion.evaluation import (
    BrierSums,
    DecisionSums,
    Estimate,
    auc_pair_counts,
    brier_sums,
    censoring_curve,
    concordance_difference,
    concordance_index,
    heterogeneity,
    integrated_brier_score,
    observed_expected,
    observed_expected_ratio,
    pair_counts,
    pair_cross,
    treatment_comparison,
    treatment_sums,
    uno_pair_counts,
)
from fusion.federation import (
    LOCAL_ENCODERS,
    LOCAL_ONLY,
    PERSONALISED,
    PROTOCOL,
    FederationPlan,
    Fitted,
    InProcess,
    SiteRows,
    SiteStudy,
    StudyResults,
    run_federation,
    summarise,
    without,
)
from fusion.late import CoxModel
from fusion.privacy import MinimumCounts
from fusion.survival import cox_sums, cumulative_hazard
from tests.consortium import (
    DETAILED,
    GRID,
    PLAN,
    Asker,
    Pooled,
    large,
    run,
    site_rows,
    studies_of,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fusion.evaluation import CensoringCurve, PairCounts

    Floats = NDArray[np.float64]

TOLD = replace(
    PLAN, **DETAILED, minimum=MinimumCounts(patients=30, events=10, cell=1, test_events=3)
)


@dataclass(frozen=True)
class Study:
    """A run with all its rows at hand."""

    plan: FederationPlan
    rows: dict[str, SiteRows]
    studies: dict[str, SiteStudy]
    fitted: Fitted
    results: StudyResults

    def log_hazard(self, site: str, arm: str) -> Floats:
        """(n_test,) by the arm's model."""
        found = self.rows[site]
        columns = [_column(found, arm, x, self.fitted) for x in self.plan.modalities]
        model = self.fitted.models[arm]
        known = self.fitted.models[PROTOCOL].predict(np.column_stack(columns))
        x = np.nan_to_num(np.column_stack(columns) - model.mean) / model.scale
        flags = np.isnan(np.column_stack(columns))
        expected = x @ model.coefficients[:3] + flags @ model.coefficients[3:]
        assert np.isfinite(known).any()
        return np.asarray(expected)

    def censoring(self, site: str) -> CensoringCurve:
        found = self.rows[site]
        return censoring_curve(
            np.concatenate([found.train.event, found.test.event]),
            np.concatenate([found.train.time, found.test.time]),
        )

    def pairs(self, arm: str, *, auc: bool = False) -> dict[str, PairCounts]:
        counts = {}
        for site, found in self.rows.items():
            outcome, x = (found.test.event, found.test.time), self.log_hazard(site, arm)
            counts[site] = (
                auc_pair_counts(x, *outcome, self.censoring(site), self.plan.horizon_days)
                if auc
                else pair_counts(x, *outcome)
            )
        return counts

    def expected(self, site: str) -> tuple[Floats, NDArray[np.bool_]]:
        """(n_test,) cumulative hazard until the end or the horizon, and events by then."""
        model, test = self.fitted.models[PROTOCOL], self.rows[site].test
        until = np.minimum(test.time, self.plan.horizon_days)
        at = cumulative_hazard(model.baseline, model.edges_days, until)
        hazard = np.exp(self.log_hazard(site, PROTOCOL)) * at
        return hazard, test.event & (test.time <= self.plan.horizon_days)


def _column(rows: SiteRows, arm: str, modality: str, fitted: Fitted) -> Floats:
    nothing = np.full(len(rows.test), np.nan)
    if arm == without(modality):
        return nothing
    if arm != LOCAL_ENCODERS and modality in PLAN.sums:
        table = rows.tables.get(modality)
        return nothing if table is None else fitted.encoders[modality].log_hazard(table.test)
    return rows.local[modality].test if modality in rows.local else nothing


def _study(plan: FederationPlan) -> Study:
    rows = large()
    studies = studies_of(rows, plan)
    fitted = run_federation(plan, InProcess(studies))
    return Study(plan, rows, studies, fitted, summarise(fitted))


@pytest.fixture(scope="module")
def study() -> Study:
    return _study(TOLD)


@pytest.fixture(scope="module")
def guarded() -> Study:
    """The same study under the minimum counts for patients' data."""
    return _study(replace(PLAN, **DETAILED))


def _same(found: Estimate | None, expected: Estimate) -> None:
    assert found is not None
    assert astuple(found) == pytest.approx(astuple(expected), rel=1e-6, abs=1e-9)


ARMS = (PROTOCOL, *(without(x) for x in PLAN.modalities))


@pytest.mark.parametrize("arm", ARMS)
def test_concordance_and_auc_are_those_of_all_rows(study: Study, arm: str) -> None:
    result, direct = study.results.arms[arm], study.pairs(arm)
    _same(result.concordance, concordance_index(list(direct.values())))
    _same(result.auc, concordance_index(list(study.pairs(arm, auc=True).values())))
    uno = [
        uno_pair_counts(
            study.log_hazard(s, arm), found.test.event, found.test.time, study.censoring(s),
            study.plan.horizon_days,
        )
        for s, found in study.rows.items()
    ]  # fmt: skip
    _same(result.uno, concordance_index(uno))
    for site, counts in direct.items():
        assert result.by_site[site].value == pytest.approx(concordance_index(counts).value)


@pytest.mark.parametrize("arm", ARMS[1:])
def test_differences_are_on_the_same_pairs(study: Study, arm: str) -> None:
    first, other = study.pairs(PROTOCOL), study.pairs(arm)
    cross = [
        pair_cross(*(study.log_hazard(s, x) for x in (PROTOCOL, arm)), r.test.event, r.test.time)
        for s, r in study.rows.items()
    ]
    expected = concordance_difference(list(first.values()), list(other.values()), cross)
    _same(study.results.arms[arm].difference, expected)
    assert study.results.arms[PROTOCOL].difference is None


def test_each_modality_is_told_alone(study: Study) -> None:
    for modality in PLAN.modalities:
        counts = []
        for rows in study.rows.values():
            column = _column(rows, PROTOCOL, modality, study.fitted)
            has = ~np.isnan(column)
            if has.any():
                counts.append(pair_counts(column[has], rows.test.event[has], rows.test.time[has]))
        _same(study.results.alone[modality], concordance_index(counts))


def test_an_external_site_has_no_arm_of_its_own(study: Study) -> None:
    assert set(study.results.arms[PROTOCOL].by_site) == set(study.rows)
    training = {"site-01", "site-02", "site-03"}
    for arm in (LOCAL_ENCODERS, LOCAL_ONLY, PERSONALISED):
        assert set(study.results.arms[arm].by_site) == training
    arms = study.results.arms
    assert arms[PROTOCOL].concordance.value > arms[LOCAL_ONLY].concordance.value  # type: ignore[union-attr]
    assert isinstance(study.studies["site-01"].own_model(), CoxModel)
    assert study.studies["site-04"].own_model() is None


def test_observed_and_expected_are_those_of_all_rows(study: Study) -> None:
    parts = {s: observed_expected(*study.expected(s)) for s in study.rows}
    result = study.results.arms[PROTOCOL]
    _same(result.observed_expected, observed_expected_ratio(list(parts.values())))
    for site, part in parts.items():
        _same(result.observed_expected_by_site[site], observed_expected_ratio(part))


def test_the_calibration_slope_is_that_of_a_cox_model_of_the_test_rows(study: Study) -> None:
    frame = pd.concat(
        pd.DataFrame(
            {"x": study.log_hazard(s, PROTOCOL), "event": r.test.event, "time": r.test.time,
             "site": s}
        )
        for s, r in study.rows.items()
    )  # fmt: skip
    model = CoxPHFitter().fit(
        frame, "time", "event", strata="site", fit_options={"precision": 1e-14}
    )
    slope = study.results.arms[PROTOCOL].calibration_slope
    assert slope is not None
    assert slope.value == pytest.approx(model.params_["x"], abs=1e-8)
    assert slope.standard_error == pytest.approx(model.standard_errors_["x"], rel=1e-6)
    assert study.results.arms[LOCAL_ENCODERS].calibration_slope is None


def test_subgroups_are_those_of_all_rows(study: Study) -> None:
    assert [(r.variable, r.level) for r in study.results.subgroups] == [
        ("sex", "female"), ("sex", "male"), ("stage", "I"), ("stage", "II"), ("stage", "III"),
    ]  # fmt: skip
    for result in study.results.subgroups:
        level = float(TOLD.subgroups[result.variable].index(result.level))
        pairs, sums = [], []
        for site, rows in study.rows.items():
            own = rows.subgroups[result.variable].test == level
            hazard, seen = study.expected(site)
            if seen[own].sum() < TOLD.minimum.test_events:
                continue
            score = study.log_hazard(site, PROTOCOL)[own]
            pairs.append(pair_counts(score, seen[own], rows.test.time[own]))
            sums.append(observed_expected(hazard[own], seen[own]))
        _same(result.concordance, concordance_index(pairs))
        _same(result.observed_expected, observed_expected_ratio(sums))
        assert result.n_patients == sum(c.n_patients for c in pairs)


def test_net_benefit_is_that_of_all_rows(study: Study) -> None:
    found = study.results.net_benefit
    assert found is not None
    model = study.fitted.models[PROTOCOL]
    at_horizon = cumulative_hazard(model.baseline, model.edges_days, np.array([1095.0]))[0]
    for at, threshold in enumerate(TOLD.thresholds):
        gained = weighed = 0.0
        n = 0
        for site, rows in study.rows.items():
            sent = DecisionSums.from_vector(
                study.fitted.evaluations[site].decision, n_thresholds=len(TOLD.thresholds)
            )
            if not sent.n_patients[at]:
                continue
            test = rows.test
            risk = 1.0 - np.exp(-np.exp(study.log_hazard(site, PROTOCOL)) * at_horizon)
            dead, alive = test.event & (test.time <= 1095.0), test.time > 1095.0
            kept = study.censoring(site).at(np.where(dead, test.time, 1095.0))
            weight = np.where(dead | alive, 1.0 / kept, 0.0)
            treated = risk >= threshold
            odds = threshold / (1.0 - threshold)
            gained += (weight * treated * (dead - odds * alive)).sum()
            weighed += weight.sum()
            n += len(test)
        assert found.n_patients[at] == n > 0
        assert found.model.value[at] == pytest.approx(gained / weighed, abs=1e-9)


def test_treatments_are_compared_as_on_all_rows(study: Study) -> None:
    sums = []
    for site, rows in study.rows.items():
        assert rows.treatment is not None
        group = np.searchsorted(study.fitted.groups[PROTOCOL], study.log_hazard(site, PROTOCOL))
        edges = np.append(0.0, study.fitted.plan.edges_days)
        sums.append(
            treatment_sums(rows.test.event, rows.test.time, group, rows.treatment.test, edges,
                           shape=(3, 2), cell=1)
        )  # fmt: skip
    expected = treatment_comparison(sums)
    assert [r.group for r in study.results.treatment] == [0, 1, 2]
    for result, direct in zip(study.results.treatment, expected, strict=True):
        assert result.log_rank is not None
        assert direct.log_rank is not None
        assert astuple(result.log_rank) == pytest.approx(astuple(direct.log_rank))
        assert result.survival is not None
        assert direct.survival is not None
        assert_allclose(result.survival.value, direct.survival.value, atol=1e-12)
        assert result.hazard_ratio is not None
        assert direct.hazard_ratio is not None
        assert_allclose(result.hazard_ratio.value, direct.hazard_ratio.value)


def test_without_a_comparison_nothing_is_told_of_treatments() -> None:
    plan = replace(TOLD, subgroups={}, treatments=(), thresholds=())
    results = summarise(run(large(), plan))
    assert (results.subgroups, results.treatment, results.net_benefit) == ((), (), None)


@pytest.mark.border
def test_a_site_without_a_record_of_a_variable_tells_nothing_of_it() -> None:
    rows = large()
    rows["site-03"].subgroups.pop("sex")
    rows["site-03"] = replace(rows["site-03"], treatment=None)
    fitted = run(rows, TOLD)
    told = fitted.evaluations["site-03"]
    assert not told.subgroup_pairs[:2].any()
    assert told.subgroup_pairs[2:].any()
    assert not told.treatment.any()
    assert fitted.evaluations["site-01"].subgroup_pairs.any(axis=1).all()


@pytest.mark.border
def test_tables_with_a_small_cell_cross_as_zeros(guarded: Study) -> None:
    plan, n_intervals = guarded.fitted.plan, len(guarded.fitted.plan.edges_days)
    cell, seen_small = plan.minimum.cell, False

    def has_small(counts: Floats) -> bool:
        return bool(((counts > 0) & (counts < cell)).any())

    for evaluation in guarded.fitted.evaluations.values():
        for table in evaluation.life_table:
            counts = table.reshape(PLAN.n_risk_groups, n_intervals, 3)
            beyond = (counts[..., 0] - counts[..., 1] - counts[..., 2])[:, -1]
            cells = np.concatenate([counts.ravel(), beyond])
            assert not has_small(cells)
            seen_small |= not cells.any()
        for table in evaluation.calibration:
            n, died = table.reshape(7, PLAN.n_risk_groups)[:2]
            assert not has_small(np.concatenate([n, died, n - died]))
        for pairs in (evaluation.subgroup_pairs, evaluation.alone):
            assert not has_small(pairs[:, 4])
        by_treatment = evaluation.treatment.reshape(-1)[: 3 * 2 * n_intervals * 3]
        assert not has_small(by_treatment)
    assert seen_small


@pytest.mark.border
def test_hidden_figures_are_none_and_shown_ones_order_the_groups(
    study: Study, guarded: Study
) -> None:
    result = study.results.arms[PROTOCOL]
    assert result.survival is not None
    assert result.calibration is not None
    assert (np.diff(result.survival.value, axis=1) <= 0).all()
    assert result.log_rank is not None
    assert result.log_rank.p_value < 1e-4
    assert result.brier is not None
    assert result.null_brier is not None
    assert result.brier.value < result.null_brier.value
    hidden = guarded.results
    assert hidden.arms[PROTOCOL].survival is None
    assert hidden.arms[PROTOCOL].log_rank is None
    shown = zip(hidden.subgroups, study.results.subgroups, strict=True)
    assert all(some.n_patients < every.n_patients for some, every in shown)
    assert all(r.survival is None or np.isnan(r.survival.value).all() for r in hidden.treatment)


@pytest.mark.border
def test_subgroups_that_part_the_patients_almost_alike_are_told_once() -> None:
    """The few between female of one column and male of another follow by subtraction."""
    for swapped in (False, True):
        rows = site_rows(900, 1, absent=0.0)
        codes = rows.subgroups["sex"].test.copy()
        other = 1.0 - codes if swapped else codes.copy()
        other[:3] = 1.0 - other[:3]
        rows.subgroups["gender"] = replace(rows.subgroups["sex"], test=other)
        plan = replace(PLAN, subgroups={"sex": ("f", "m"), "gender": ("a", "b")})
        ask = Asker(rows, plan).scaled().gridded()
        reply = ask(ask.evaluation())
        assert isinstance(reply, m.Evaluation)
        assert reply.subgroup_pairs[:2].any(axis=1).all()
        assert not reply.subgroup_pairs[2:].any()


@pytest.mark.border
def test_risk_groups_that_differ_by_a_few_patients_are_told_once() -> None:
    rows = site_rows(900, 1, absent=0.0)
    plan = replace(PLAN, minimum=MinimumCounts(cell=2))
    slides_only = np.tile([1.0, 0, 0, 0, 0, 0], (5, 1))  # the same column in both main arms

    def tables(shift: float) -> list[bool]:
        ask = Asker(rows, plan).scaled().gridded(GRID[-1])
        cuts = np.tile([-0.5, 0.5], (5, 1))
        cuts[1, 1] += shift
        reply = ask(ask.evaluation(coefficients=slides_only, groups=cuts))
        assert isinstance(reply, m.Evaluation)
        return list(reply.life_table.any(axis=1).tolist())

    assert tables(0.0) == [True, True]
    assert tables(0.005) == [True, False]  # one patient lies in between
    assert tables(0.05) == [True, True]


@pytest.mark.border
def test_brier_sums_of_single_times_stay_at_the_site(guarded: Study) -> None:
    model = guarded.fitted.models[PROTOCOL]
    for site, evaluation in guarded.fitted.evaluations.items():
        k = len(model.edges_days)
        assert (np.ptp(evaluation.brier[:, :k], axis=1) == 0).all()
        test = guarded.rows[site].test
        at = cumulative_hazard(model.baseline, model.edges_days, model.edges_days)
        survival = np.exp(-np.exp(guarded.log_hazard(site, PROTOCOL))[:, None] * at)
        curve = guarded.censoring(site)
        sums = brier_sums(survival, test.event, test.time, model.edges_days, curve)
        sent = BrierSums.from_vector(evaluation.brier[0], n_times=k)
        found = integrated_brier_score(sent, model.edges_days)
        expected = integrated_brier_score(sums, model.edges_days)
        assert astuple(found) == pytest.approx(astuple(expected))


def test_heterogeneity_is_that_of_each_sites_rows(study: Study) -> None:
    pooled = Pooled(study.rows, TOLD, folds=_folds(study.fitted))
    behind, _ = pooled.fusion_rows(PROTOCOL)
    beta = study.fitted.models[PROTOCOL].coefficients
    sums = []
    for stratum in np.unique(behind.strata):
        part = behind.at(behind.strata == stratum)
        sums.append(cox_sums(part.x, part.event, part.time, beta))
    expected = heterogeneity(beta, sums)
    found: Any = study.results.heterogeneity
    for name in ("statistic", "p_value", "i_squared", "tau_squared", "estimates"):
        assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5)
    assert found.test.p_value == pytest.approx(expected.test.p_value, abs=1e-6)


def _folds(fitted: Fitted) -> bool:
    found = {e.cross_fitted for e in fitted.encoders.values()}
    assert len(found) == 1
    return found == {True}
