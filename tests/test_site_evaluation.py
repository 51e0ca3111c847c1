"""What a site tells of its test rows, and what a coordinator cannot get by subtraction."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fusion import messages as m
from fusion.discrete import SITE_PRECISION, at_risk_and_events
from fusion.federation import PROTOCOL, leave_one_site_out, run_federation, summarise
from fusion.federation.plan import CALIBRATION_SLOPE, FederationPlan
from fusion.federation.rows import Outcome, Split
from fusion.federation.transport import InProcess
from fusion.privacy import MinimumCounts
from tests.consortium import ANY_CELL, GRID, PLAN, RUN, Asker, run, site_rows, small, studies_of

if TYPE_CHECKING:
    from fusion.federation.rows import SiteRows

pytestmark = pytest.mark.border

SLIDES_ONLY = np.tile([1.0, 0, 0, 0, 0, 0], (len(PLAN.arms), 1))


def _outlying(n: int = 300) -> SiteRows:
    """Rows whose first test patient's slide stands out among all others."""
    rows = site_rows(n, 1, absent=0.0)
    test = rows.local["pathology"].test
    test[0] = test.max() + 40.0
    return rows


def test_a_patient_who_carries_the_weights_is_in_no_weighted_sum() -> None:
    ask = Asker(_outlying(), ANY_CELL).scaled().gridded(GRID[-1])
    reply = ask(ask.evaluation(coefficients=SLIDES_ONLY))
    assert isinstance(reply, m.Evaluation)
    assert not reply.observed_expected[0].any()
    assert not reply.brier[0].any()
    assert not reply.life_table[0].any()
    assert not reply.decision.any()
    assert reply.pairs[0].any()  # ranks tell nothing of how far out a patient is
    assert reply.brier[-1].any()


# Of one risk group: events and censored of each interval, and who is followed beyond the grid.
LEAVERS: dict[str, tuple[list[int], list[int], int]] = {
    "nobody few": ([12, 14], [11, 10], 15),
    "nobody censored": ([12, 14], [0, 0], 15),
    "3 censored": ([12, 14], [11, 3], 15),
    "3 beyond the grid": ([12, 14], [11, 10], 3),
    "3 at risk, 1 of them censored": ([12, 0], [11, 1], 2),
    "3 events": ([12, 3], [11, 10], 15),
}


def _with_leavers(*groups: str) -> tuple[SiteRows, list[float]]:
    """Rows whose test patients leave as said, with one slide's value per risk group; its edges."""
    edges, event, time, slide = [GRID[1], GRID[-1]], [], [], []
    for group, name in enumerate(groups):
        died, lost, beyond = LEAVERS[name]
        days = [x - 1.0 for x in (*edges, *edges)] + [edges[-1] + 1.0]
        counts = (*died, *lost, beyond)
        event += list(np.repeat([True, True, False, False, False], counts))
        time += list(np.repeat(days, counts))
        slide += [group - 1.0] * sum(counts)
    rows = site_rows(900, 1, absent=0.0)
    n = len(time)
    train = rows.local["pathology"].train
    local = {"pathology": Split(train, train.mean() + train.std(ddof=1) * np.array(slide))}
    test = Outcome(np.array(event), np.array(time))
    tables = {
        k: replace(x, test=x.test[np.arange(n) % len(x.test)]) for k, x in rows.tables.items()
    }
    subgroups = {k: replace(x, test=x.test[:n]) for k, x in rows.subgroups.items()}
    rows = replace(
        rows, test=test, tables=tables, local=local, subgroups=subgroups, treatment=None
    )  # fmt: skip
    return rows, edges


@pytest.mark.parametrize("few", LEAVERS)
def test_no_cell_of_few_is_told_whether_they_die_are_lost_or_outlive_the_grid(few: str) -> None:
    """Whoever is at risk leaves in some way, so that no other cell of a life table can be small."""
    rows, edges = _with_leavers("nobody few", few, "nobody few")
    ask = Asker(rows, replace(PLAN, minimum=MinimumCounts())).scaled().gridded(*edges)
    reply = ask(ask.evaluation(coefficients=SLIDES_ONLY))
    assert isinstance(reply, m.Evaluation)
    life = reply.life_table[0].reshape(3, len(edges), 3)
    if not few.startswith("nobody"):
        assert not life.any()
        return
    died, lost, beyond = LEAVERS[few]
    assert life[1, :, 1].tolist() == died
    assert life[1, :, 2].tolist() == lost
    assert life[1, -1, 0] == died[-1] + lost[-1] + beyond


def test_groups_that_are_another_arms_but_for_a_few_are_told_once() -> None:
    """Cuts that number the groups otherwise must not hide that they are almost the same."""
    rows = site_rows(900, 1, absent=0.0)
    ask = Asker(rows, replace(PLAN, minimum=MinimumCounts(cell=2))).scaled().gridded(GRID[-1])
    cuts = np.tile([-0.5, 0.5], (len(PLAN.arms), 1))
    scores = ask.study.test_log_hazard(PROTOCOL, SLIDES_ONLY[0])
    cuts[1] = (-1e6, np.sort(scores[scores > -0.5])[:2].mean())  # one patient lies in between
    reply = ask(ask.evaluation(coefficients=SLIDES_ONLY, groups=cuts))
    assert isinstance(reply, m.Evaluation)
    assert reply.life_table[0].any()
    assert not reply.life_table[1].any()


def test_modalities_that_almost_the_same_patients_have_are_told_once() -> None:
    rows = site_rows(600, 1)
    slides = rows.local["pathology"].test
    lacking = np.isnan(rows.tables["radiology"].test).all(axis=1)
    slides[:] = np.where(lacking, np.nan, np.nan_to_num(slides))
    slides[np.flatnonzero(~lacking)[0]] = np.nan
    ask = Asker(rows, replace(PLAN, minimum=MinimumCounts(cell=5))).scaled().gridded(GRID[-1])
    reply = ask(ask.evaluation())
    assert isinstance(reply, m.Evaluation)
    told = dict(zip(PLAN.modalities, reply.alone.any(axis=1).tolist(), strict=True))
    assert told == {"pathology": True, "radiology": False, "clinical": True}


def test_tries_of_one_penalty_are_counted_together() -> None:
    plan = replace(PLAN, fusion_ridge=(0.01, 0.1))
    ask = Asker(site_rows(300, 1), plan).scaled()
    names = plan.try_fits(PROTOCOL)
    at = np.zeros((1, 6))
    given = 0
    while isinstance(ask(m.AskSums(RUN, 5, (names[given % len(names)],), at)), m.Sums):
        given += 1
        assert given < 1000
    assert given == 15 * len(names) < 35 * len(names)
    assert replace(PLAN, fusion_ridge=(0.1,)).try_fits(PROTOCOL) == ()


ALLOWED = replace(ANY_CELL, leave_one_site_out=True)


def _part(ask: Asker, run_name: str, *, trains: bool) -> m.Message:
    return ask(m.Describe(run_name, PLAN.protocol, PLAN.modalities, trains))


def test_a_site_is_left_out_of_one_run_only() -> None:
    ask = Asker(site_rows(300, 1), ALLOWED)
    first, second = ALLOWED.left_out_runs[:2]
    assert isinstance(_part(ask, first, trains=False), m.Description)
    assert isinstance(_part(ask, first, trains=False), m.Description)
    assert _part(ask, second, trains=False) == m.Refused("already_answered")
    assert isinstance(_part(ask, second, trains=True), m.Description)


def test_left_out_runs_tell_of_pairs_and_events_at_the_site_left_out_alone() -> None:
    transport = InProcess(studies_of(small(260, 210, 190), ALLOWED))
    fitted = run_federation(ALLOWED, transport)
    found = leave_one_site_out(ALLOWED, transport, fitted.sites)
    for (site,), of in found.items():
        assert not isinstance(of, str)
        assert set(of.evaluations) == {site}
        assert of.calibration_slope is None
        told = of.evaluations[site]
        assert told.pairs[0].any()
        assert told.auc[0].any()
        assert told.observed_expected[0].any()
        hidden = (
            told.life_table, told.calibration, told.brier, told.alone, told.uno, told.cross,
            told.pairs[1:], told.auc[1:], told.observed_expected[1:],
        )  # fmt: skip
        assert not any(x.any() for x in hidden)
        assert not [r for r in of.rounds if r.stage == "calibration"]


def test_patients_with_nothing_but_local_modalities_are_not_told_by_leaving_out() -> None:
    rows = site_rows(300, 1, absent=0.0)
    for table in rows.tables.values():
        table.test[:3] = np.nan
    ask = Asker(rows, replace(ALLOWED, minimum=MinimumCounts(cell=5)))
    name = ALLOWED.left_out_runs[0]
    assert _part(ask, name, trains=False) == m.Refused("small_cell")
    assert isinstance(_part(Asker(site_rows(300, 1, absent=0.0), ALLOWED), name, trains=False),
                      m.Description)  # fmt: skip


def _slope_study(plan: FederationPlan, rows: dict[str, SiteRows]) -> tuple[float, float] | None:
    fitted = run(rows, plan)
    slope = summarise(fitted).arms[PROTOCOL].calibration_slope
    assert not [s for s in fitted.sites if s.code]
    return None if slope is None else (slope.value, slope.standard_error)


def test_the_slope_is_that_of_the_sites_that_can_tell_it() -> None:
    rows = small(260, 210, 190)
    whole = _slope_study(ANY_CELL, rows)
    for column in rows["site-01"].tables.values():
        column.test[0] = np.nanmax(column.test) + 60.0
    without = _slope_study(ANY_CELL, rows)
    assert whole is not None
    assert without is not None
    assert without[0] != whole[0]
    assert without[1] > whole[1] > 0.0
    for site in ("site-02", "site-03"):
        for column in rows[site].tables.values():
            column.test[0] = np.nanmax(column.test) + 60.0
    assert _slope_study(ANY_CELL, rows) is None


def test_the_slope_of_a_discrete_time_model_is_on_its_own_scale() -> None:
    """One coefficient, the model's log odds of the intervals, a free intercept of each site."""
    plan = replace(ANY_CELL, fusion_model="logistic_hazard")
    rows = small(260, 210, 190)
    studies = studies_of(rows, plan)
    fitted = run_federation(plan, InProcess(studies))
    model = fitted.models[PROTOCOL]
    assert fitted.calibration_slope is not None
    edges = np.array(fitted.plan.edges_days)

    def lost(slope: float) -> float:
        total = 0.0
        for study in studies.values():
            test = study.designs.test
            score = slope * study.test_log_hazard(PROTOCOL, model.coefficients)

            def of_site(own: float, score=score, test=test) -> float:  # type: ignore[no-untyped-def]
                value = SITE_PRECISION / 2 * own**2
                for event, time, x in zip(test.event, test.time, score, strict=True):
                    at_risk, died = at_risk_and_events([event], [time], edges)
                    odds = model.baseline + x + own
                    value += float(np.sum(at_risk * np.logaddexp(0.0, odds) - died * odds))
                return value

            total += minimize_scalar(of_site, bounds=(-3, 3), method="bounded").fun
        return total

    best = minimize_scalar(lost, bracket=(0.5, 1.0), tol=1e-6)
    assert fitted.calibration_slope.value == pytest.approx(best.x, abs=1e-3)


def test_the_slope_is_refused_in_left_out_runs() -> None:
    part = ALLOWED.left_out_plan(ALLOWED.left_out_runs[0])
    assert CALIBRATION_SLOPE not in part.fits
    assert CALIBRATION_SLOPE in ALLOWED.fits
