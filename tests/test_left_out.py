"""A study without each of its sites in turn: what is fitted there, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fusion import messages as m
from fusion.evaluation import concordance_index, pair_counts
from fusion.federation import (
    PROTOCOL,
    Fitted,
    InProcess,
    SiteRows,
    SiteStudy,
    leave_one_site_out,
    run_federation,
    summarise,
)
from tests.consortium import (
    ANY_CELL,
    DETAILED,
    PLAN,
    RUN,
    Overheard,
    Pooled,
    site_rows,
    small,
    studies_of,
)

ALLOWED = replace(ANY_CELL, leave_one_site_out=True)
SIZES = (260, 210, 190)


def _left_out(
    rows: dict[str, SiteRows], plan: object = ALLOWED
) -> tuple[Fitted, dict[tuple[str, ...], Fitted | str], Overheard]:
    assert not isinstance(plan, str)
    transport = Overheard(InProcess(studies_of(rows, plan)))  # type: ignore[arg-type]
    fitted = run_federation(plan, transport)  # type: ignore[arg-type]
    transport.heard.clear()
    found = leave_one_site_out(plan, transport, fitted.sites)  # type: ignore[arg-type]
    return fitted, found, transport


@pytest.fixture(scope="module")
def left_out() -> tuple[Fitted, dict[tuple[str, ...], Fitted | str], Overheard]:
    return _left_out(small(*SIZES) | {"site-09": site_rows(60, 9, train=0.0)})


def _fitted(found: Fitted | str) -> Fitted:
    assert isinstance(found, Fitted), found
    return found


def test_what_is_fitted_is_the_study_of_the_other_sites(
    left_out: tuple[Fitted, dict[tuple[str, ...], Fitted | str], Overheard],
) -> None:
    whole, found, _ = left_out
    rows = small(*SIZES)
    assert set(found) == {("site-01",), ("site-02",), ("site-03",)}
    for (site,), of in found.items():
        fitted = _fitted(of)
        others = {s: r for s, r in rows.items() if s != site}
        pooled = Pooled(others, ANY_CELL, folds=False)
        for modality, encoder in fitted.encoders.items():
            expected = pooled.encoders[modality]["coefficients"]
            assert_allclose(encoder.coefficients, expected, atol=1e-8)
        behind, _ = pooled.fusion_rows(PROTOCOL)
        assert_allclose(fitted.models[PROTOCOL].coefficients, behind.cox(0.01), atol=1e-8)
        assert fitted.n_patients == whole.n_patients - len(rows[site].train)


def test_the_site_is_evaluated_on_all_its_patients_without_its_own_encoders(
    left_out: tuple[Fitted, dict[tuple[str, ...], Fitted | str], Overheard],
) -> None:
    whole, found, _ = left_out
    rows = small(*SIZES)
    results = summarise(whole, found)
    assert [r.site for r in results.left_out] == ["site-01", "site-02", "site-03"]
    pairs = []
    for result in results.left_out:
        fitted, of = _fitted(found[(result.site,)]), rows[result.site].as_external()
        assert result.n_patients == len(of.test) == SIZES[int(result.site[-1]) - 1]
        columns = np.full((len(of.test), 3), np.nan)  # slides are read by an encoder of its own
        for at, modality in ((1, "radiology"), (2, "clinical")):
            columns[:, at] = fitted.encoders[modality].log_hazard(of.tables[modality].test)
        score = fitted.models[PROTOCOL].predict(columns)
        pairs.append(pair_counts(score, of.test.event, of.test.time))
        assert result.concordance is not None
        assert result.concordance.value == pytest.approx(concordance_index(pairs[-1]).value)
        assert result.observed_expected is not None
    assert results.left_out_pooled is not None
    assert results.left_out_pooled.value == pytest.approx(concordance_index(pairs).value)


def test_the_site_left_out_gives_no_sum_of_its_training_rows(
    left_out: tuple[Fitted, dict[tuple[str, ...], Fitted | str], Overheard],
) -> None:
    runs = ALLOWED.left_out_runs
    heard = left_out[2].heard
    assert len({request.run for request, _ in heard}) == 3  # type: ignore[union-attr]
    by_size = ["site-01", "site-02", "site-03"]  # the largest is left out first
    for request, replies in heard:
        site = by_size[runs.index(request.run)]  # type: ignore[union-attr]
        if isinstance(request, m.Describe):
            assert request.trains == (site not in replies)
        training = m.AskMoments | m.AskEdges | m.AskIntervals
        if isinstance(request, training):
            assert site not in replies
        if isinstance(request, m.AskSums) and request.fits != ("calibration_slope",):
            assert site not in replies


def test_the_training_outcomes_of_the_site_left_out_change_no_coefficient() -> None:
    rows, changed = small(*SIZES), small(*SIZES)
    outcome = changed["site-02"].train
    outcome.time[:] = outcome.time[::-1].copy()
    outcome.event[:] = ~outcome.event
    (_, first, _), (_, second, _) = _left_out(rows), _left_out(changed)
    own, other = _fitted(first[("site-02",)]), _fitted(second[("site-02",)])
    for arm, model in own.models.items():
        assert_array_equal(other.models[arm].coefficients, model.coefficients)
        assert_array_equal(other.models[arm].baseline, model.baseline)
    assert not np.allclose(
        _fitted(first[("site-01",)]).models[PROTOCOL].coefficients,
        _fitted(second[("site-01",)]).models[PROTOCOL].coefficients,
    )


def test_left_out_runs_work_where_the_study_merged_its_grid() -> None:
    """The study's own run agreed on fewer edges; each of these agrees on its own."""
    rows = small(*SIZES)
    for found in rows.values():
        early = found.train.event & (found.train.time <= 180)
        found.train.time[early] += 180
    plan = replace(PLAN, leave_one_site_out=True)
    whole, found, _ = _left_out(rows, plan)
    assert len(whole.plan.edges_days) < len(PLAN.edges_days)
    for of in found.values():
        assert np.isfinite(_fitted(of).models[PROTOCOL].coefficients).all()


def test_these_runs_are_refused_where_the_plan_does_not_allow_them() -> None:
    study = SiteStudy(ANY_CELL, site_rows(260, 1))
    assert ANY_CELL.left_out_runs == ()
    for run in ALLOWED.left_out_runs:
        ask = m.Describe(run, PLAN.protocol, PLAN.modalities, False)
        assert m.decode(study.answer(m.encode(ask))) == m.Refused("wrong_run")


def test_in_the_studys_own_run_every_site_takes_part_as_it_is() -> None:
    for plan in (ANY_CELL, ALLOWED):
        study = SiteStudy(plan, site_rows(260, 1))
        ask = m.Describe(RUN, PLAN.protocol, PLAN.modalities, False)
        assert m.decode(study.answer(m.encode(ask))) == m.Refused("malformed_request")


def test_a_site_says_whether_it_trains_before_it_gives_any_sum() -> None:
    """Else its training patients could be evaluated by a model that saw them."""
    study = SiteStudy(ALLOWED, site_rows(260, 1))
    run = ALLOWED.left_out_runs[0]
    ask = m.encode(m.AskMoments(run, 1, ("clinical",)))
    assert m.decode(study.answer(ask)) == m.Refused("malformed_request")
    describe = m.Describe(run, PLAN.protocol, PLAN.modalities, False)
    described = m.decode(study.answer(m.encode(describe)))
    assert isinstance(described, m.Description)
    assert (described.trains, described.n_test) == (False, 260)
    moments = m.decode(study.answer(ask))
    assert isinstance(moments, m.DesignMoments)
    assert not moments.n.any()
    again = replace(describe, trains=True)
    assert m.decode(study.answer(m.encode(again))) == m.Refused("already_answered")


def test_these_runs_tell_less() -> None:
    plan = replace(ALLOWED, **DETAILED)
    part = plan.left_out_plan(plan.left_out_runs[0])
    assert (part.subgroups, part.treatments, part.thresholds) == ({}, (), ())
    assert part.left_out_runs == ()
    assert part.run in plan.left_out_runs
    assert len(set(plan.left_out_runs)) == len(plan.left_out_runs) == 10


def test_more_sites_than_runs_are_left_out_in_groups() -> None:
    plan = replace(
        ALLOWED, minimum=ANY_CELL.minimum.model_copy(update={"patients": 30, "events": 10})
    )
    rows = {f"site-{i:02d}": site_rows(90, i) for i in range(12)}
    _, found, _ = _left_out(rows, plan)
    assert len(found) == 10
    assert sorted(x for group in found for x in group) == sorted(rows)
    results = summarise(run_federation(plan, InProcess(studies_of(rows, plan))), found)
    assert [r.site for r in results.left_out] == sorted(rows)
    assert all(r.code or r.concordance is not None for r in results.left_out)


def test_why_nothing_was_fitted_is_told() -> None:
    plan = replace(ALLOWED, minimum=ANY_CELL.minimum.model_copy(update={"pooled_patients": 300}))
    whole, found, _ = _left_out(small(*SIZES), plan)
    assert found[("site-01",)] == "QuorumNotMet"
    results = summarise(whole, found)
    assert results.left_out[0].code == "QuorumNotMet"
    assert results.left_out[0].concordance is None
