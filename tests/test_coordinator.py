"""A study over several sites equals the pooled fit, whatever fails on the way."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from fusion import messages as m
from fusion.federation import (
    LOCAL_ENCODERS,
    LOCAL_ONLY,
    PERSONALISED,
    PROTOCOL,
    Coordinator,
    FederationPlan,
    Fitted,
    InProcess,
    QuorumNotMet,
    RoundRecord,
    SiteRows,
    SiteStudy,
    Split,
    StudyResults,
    run_federation,
    summarise,
    without,
)
from fusion.late import linear_inputs
from fusion.privacy import MinimumCounts
from fusion.survival import fit_cox, interval_sums
from tests.consortium import (
    ANY_CELL,
    EASY,
    PLAN,
    RUN,
    Flaky,
    Pooled,
    large,
    run,
    site_rows,
    small,
    studies_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def assert_equals_pooled(fitted: Fitted, rows: dict[str, SiteRows], plan: FederationPlan) -> None:
    folds = {e.cross_fitted for e in fitted.encoders.values()} == {True}
    pooled = Pooled(rows, plan, folds=folds)
    for modality, encoder in fitted.encoders.items():
        expected = pooled.encoders[modality]
        for name in ("coefficients", "mean", "scale"):
            assert_allclose(getattr(encoder, name), expected[name], atol=1e-8)
    assert set(fitted.models) == {PROTOCOL, LOCAL_ENCODERS, *(without(x) for x in plan.modalities)}
    for arm, model in fitted.models.items():
        behind, seen = pooled.fusion_rows(arm)
        fit = fit_cox(
            behind.x, behind.event, behind.time, strata=behind.strata, ridge=plan.fusion_ridge[0]
        )
        assert_allclose(model.coefficients, fit.candidate, atol=1e-8)
        assert_allclose(model.covariance, fit.covariance, atol=1e-8)
        assert_allclose(model.mean, seen.mean, atol=1e-8)
        assert_allclose(model.scale, np.where(seen.scale > 0, seen.scale, 1.0), atol=1e-8)
        assert_allclose(model.coefficients, behind.lifelines(plan.fusion_ridge[0]), atol=1e-7)
        log_hazard = behind.x @ fit.candidate
        events, exposure = interval_sums(log_hazard, behind.event, behind.time, model.edges_days)
        assert_allclose(model.baseline, events / exposure, rtol=1e-7)
        cuts = log_hazard.mean() + log_hazard.std(ddof=1) * norm.ppf([1 / 3, 2 / 3])
        assert_allclose(fitted.groups[arm], cuts, atol=1e-8)
    assert fitted.n_patients == sum(len(r.train) for r in pooled.sites.values())
    assert max(fitted.fit_rounds.values()) <= 10


Study = tuple[dict[str, SiteRows], dict[str, SiteStudy], Fitted]


@pytest.fixture(scope="module")
def study() -> Study:
    rows = large()
    studies = studies_of(rows, PLAN)
    return rows, studies, run_federation(PLAN, InProcess(studies))


def test_with_cross_fitting_the_federation_equals_pooling(study: Study) -> None:
    rows, studies, fitted = study
    assert all(encoder.cross_fitted for encoder in fitted.encoders.values())
    assert_equals_pooled(fitted, rows, PLAN)
    pooled = Pooled(rows, PLAN, folds=True)
    for site, columns in pooled.columns(PROTOCOL).items():
        assert_allclose(studies[site].columns(PROTOCOL).train, columns, atol=1e-8)


def test_where_folds_are_small_the_federation_equals_pooling_without_them() -> None:
    rows = small()
    fitted = run(rows, ANY_CELL)
    assert not any(encoder.cross_fitted for encoder in fitted.encoders.values())
    assert_equals_pooled(fitted, rows, ANY_CELL)


def test_the_order_of_sites_does_not_matter(study: Study) -> None:
    rows, _, fitted = study
    again = run(dict(reversed(rows.items())), PLAN)
    for arm, model in fitted.models.items():
        assert_allclose(again.models[arm].coefficients, model.coefficients, atol=1e-10)
        assert_allclose(again.models[arm].baseline, model.baseline, rtol=1e-9)
    assert _figures(summarise(again)) == pytest.approx(_figures(summarise(fitted)))


def _figures(results: StudyResults) -> list[float]:
    found = list(results.arms.values())
    return [r.concordance.value for r in found if r.concordance] + [
        r.brier.value for r in found if r.brier
    ]


def test_who_takes_part_is_told_with_reasons(study: Study) -> None:
    _, _, fitted = study
    by_name = {s.site: s for s in fitted.sites}
    assert by_name["site-02"].contributes == ("pathology", "clinical")
    assert by_name["site-01"].contributes == PLAN.modalities
    external = by_name["site-04"]
    assert (external.trains, external.n_train, external.contributes) == (False, 0, ())
    assert external.n_test == 60
    assert "site-04" in fitted.evaluations


def test_every_round_is_told(study: Study) -> None:
    rows, _, fitted = study
    told: list[RoundRecord] = []
    run_federation(PLAN, InProcess(studies_of(rows, PLAN)), on_round=told.append)
    assert [r.number for r in told] == list(range(1, len(told) + 1))
    assert [r.stage for r in told] == [r.stage for r in fitted.rounds]
    assert all(r.bytes_sent > 0 and r.bytes_received > 0 for r in told)


@pytest.mark.border
def test_a_site_below_its_minimum_stays_out_and_the_run_goes_on() -> None:
    rows = small() | {"site-09": site_rows(40, 9)}
    fitted = run(rows, ANY_CELL)
    of_small = fitted.sites[-1]
    assert (of_small.trains, of_small.n_train, of_small.n_train_events) == (False, 0, 0)
    assert_equals_pooled(fitted, {s: r for s, r in rows.items() if s != "site-09"}, ANY_CELL)


def test_a_site_whose_own_encoders_failed_still_trains() -> None:
    rows = small()
    rows["site-02"].local.clear()
    fitted = run(rows, ANY_CELL)
    assert [s.code for s in fitted.sites] == ["", "", ""]
    assert_equals_pooled(fitted, rows, ANY_CELL)


@pytest.mark.border
@pytest.mark.parametrize("round_of_sums", [1, 3, 5])
def test_a_site_lost_while_encoders_are_fitted_leaves_the_fit_of_the_others(
    round_of_sums: int,
) -> None:
    rows = small()
    transport = Flaky(studies_of(rows, ANY_CELL), "site-02", lambda _, n: n >= round_of_sums)
    fitted = run_federation(ANY_CELL, transport)
    assert transport.spoiled == 1
    assert [s.code for s in fitted.sites] == ["", "unreachable", ""]
    left = {s: r for s, r in rows.items() if s != "site-02"}
    # Means and scales were agreed with it; the ridge knows the scale, so compare on that scale.
    table = np.concatenate([r.tables["clinical"].train for r in left.values()])
    encoder = fitted.encoders["clinical"]
    x = linear_inputs(table, encoder.mean, encoder.scale)
    outcome = [np.concatenate([getattr(r.train, k) for r in left.values()])
               for k in ("event", "time")]  # fmt: skip
    strata = np.repeat([0, 1], [len(r.train) for r in left.values()])
    alone = fit_cox(x, *outcome, strata=strata, ridge=ANY_CELL.encoder_ridge["clinical"][0])
    assert_allclose(encoder.coefficients, alone.candidate, atol=1e-8)
    assert fitted.n_patients == sum(len(r.train) for r in left.values())


@pytest.mark.border
def test_a_site_lost_before_anything_was_agreed_leaves_the_study_of_the_others() -> None:
    rows = small()
    transport = Flaky(
        studies_of(rows, ANY_CELL), "site-02", lambda request, _: isinstance(request, m.AskMoments)
    )
    fitted = run_federation(ANY_CELL, transport)
    assert_equals_pooled(fitted, {s: r for s, r in rows.items() if s != "site-02"}, ANY_CELL)


@pytest.mark.border
def test_when_the_only_site_with_a_modality_leaves_the_others_go_on() -> None:
    rows = small()
    for site in ("site-01", "site-03"):
        rows[site].tables.pop("radiology")
    transport = Flaky(studies_of(rows, ANY_CELL), "site-02", lambda _, n: n >= 3)
    fitted = run_federation(ANY_CELL, transport)
    assert set(fitted.encoders) == {"clinical"}
    assert fitted.sites[1].code == "unreachable"
    assert LOCAL_ONLY in summarise(fitted).arms


OTHER_SHAPES: dict[type, Callable[[Any], m.Message]] = {
    m.Description: lambda r: replace(
        r, contributes=np.ones(9, bool), cross_fits=np.ones(9, bool), reduces=np.ones(9, bool)
    ),
    m.DesignMoments: lambda r: replace(r, n=r.n[:1], mean=r.mean[:1], m2=r.m2[:1]),
    m.Products: lambda r: replace(r, products=r.products[:, :1, :1]),
    m.Sums: lambda r: replace(r, gradient=r.gradient[:, :1], information=r.information[:, :1, :1]),
    m.Edges: lambda r: replace(r, releasable=np.ones(9, bool)),
    m.Intervals: lambda r: replace(r, events=r.events[:, :0], exposure=r.exposure[:, :0]),
    m.Evaluation: lambda r: replace(r, life_table=r.life_table[:, :1]),
    m.Done: lambda r: m.Edges(np.ones(1, dtype=bool)),
}
SPOILED: dict[str, Callable[[bytes], bytes]] = {
    "noise": lambda _: b"\x00noise",
    "cut": lambda payload: payload[:-1],
    "empty": lambda _: b"",
    "another type": lambda _: m.encode(m.Edges(np.ones(2, dtype=bool))),
    "a request": lambda _: m.encode(m.AskEdges(RUN, 1, np.ones(2))),
    "another shape": lambda payload: m.encode(
        OTHER_SHAPES[type(m.decode(payload))](m.decode(payload))
    ),
}


@pytest.mark.border
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
@pytest.mark.parametrize(
    "kind",
    [m.Describe, m.AskMoments, m.AskProducts, m.SetComponents, m.AskSums, m.AskEdges, m.SetGrid,
     m.AskIntervals, m.AskEvaluation],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_a_site_that_answers_nonsense_leaves_and_the_run_goes_on(
    kind: type, spoil: Callable[[bytes], bytes]
) -> None:
    rows = small()
    plan = replace(EASY, components={"radiology": 3})
    transport = Flaky(
        studies_of(rows, plan), "site-02", lambda request, _: isinstance(request, kind), spoil
    )
    fitted = run_federation(plan, transport)
    assert transport.spoiled > 0
    code = {s.site: s.code for s in fitted.sites}["site-02"]
    assert code in ("unreadable_reply", "unexpected_reply")
    assert "site-02" not in fitted.evaluations
    assert summarise(fitted).arms[PROTOCOL].concordance is not None


class _Broken(dict):  # type: ignore[type-arg]
    """A site's tables on a disk that fails, with a patient in the error's text."""

    def __getitem__(self, key: str) -> Split:
        raise OSError("cannot read /data/patients/DOE_JANE_1954/ct.h5")


@pytest.mark.border
def test_what_goes_wrong_at_a_site_leaves_as_a_code() -> None:
    rows = small()
    rows["site-02"] = replace(rows["site-02"], tables=_Broken(rows["site-02"].tables))
    seen: list[Exception] = []
    studies = {s: SiteStudy(EASY, r, on_error=seen.append) for s, r in rows.items()}
    describe = m.Describe(RUN, EASY.protocol, EASY.modalities, True)
    reply = studies["site-02"].answer(m.encode(describe))
    assert m.decode(reply) == m.Refused("site_error")
    assert b"DOE" not in reply
    assert isinstance(seen[0], OSError)
    fitted = run_federation(EASY, InProcess(studies))
    assert [s.code for s in fitted.sites] == ["", "site_error", ""]


@pytest.mark.border
def test_too_few_sites_or_patients_are_no_quorum() -> None:
    with pytest.raises(QuorumNotMet, match="found 1, needed at least 2"):
        run({"site-01": site_rows(400, 1)}, PLAN)
    with pytest.raises(QuorumNotMet, match="found none above the minimum of 50"):
        run({"site-01": site_rows(60, 1), "site-02": site_rows(50, 2)}, PLAN)
    with pytest.raises(QuorumNotMet, match="needed 500"):
        run(small(), replace(PLAN, minimum=MinimumCounts(pooled_patients=500)))
    with pytest.raises(QuorumNotMet):
        run_federation(
            replace(EASY, minimum=EASY.minimum.model_copy(update={"pooled_patients": 250})),
            Flaky(studies_of(small(), EASY), "site-01", lambda _, n: n == 2),
        )


@pytest.mark.border
def test_only_where_nobody_ever_passed_are_patients_said_to_be_too_few() -> None:
    class Gone(InProcess):
        """Sites of which none is reached any more from some request on."""

        def __init__(self, first: type) -> None:
            super().__init__(studies_of(small(), EASY))
            self.first, self.is_gone = first, False

        def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
            self.is_gone |= isinstance(m.decode(payload), self.first)
            return {} if self.is_gone else super().ask(payload, sites)

    for first in (m.Describe, m.AskMoments, m.AskSums, m.AskIntervals):
        for plan, needed in ((EASY, "1"), (replace(EASY, min_sites=2), "2")):
            with pytest.raises(QuorumNotMet) as error:
                run_federation(plan, Gone(first))
            assert str(error.value) == (
                f"training sites: found 0 left, needed {needed}; see why the others left, or add "
                "sites"
            )


@pytest.mark.border
def test_another_run_or_protocol_is_refused() -> None:
    study = SiteStudy(PLAN, site_rows(300, 1))
    describe = m.Describe(RUN, PLAN.protocol, PLAN.modalities, True)
    other_run = study.answer(m.encode(replace(describe, run="3" * 64)))
    assert m.decode(other_run) == m.Refused("wrong_run")
    for change in ({"protocol": "3" * 64}, {"modalities": ("radiology",)}):
        refused = study.answer(m.encode(replace(describe, **change)))
        assert m.decode(refused) == m.Refused("wrong_protocol")
    with pytest.raises(QuorumNotMet):
        run_federation(replace(PLAN, protocol="3" * 64), InProcess(studies_of(small(), PLAN)))


def test_without_shared_encoders_there_is_no_arm_of_local_ones() -> None:
    plan = replace(EASY, sums={}, encoder_ridge={})
    fitted = run(small(), plan)
    ablations = {without(x) for x in plan.modalities}
    assert set(fitted.models) == {PROTOCOL, *ablations}
    assert fitted.encoders == {}
    assert set(summarise(fitted).arms) == {PROTOCOL, LOCAL_ONLY, PERSONALISED, *ablations}


def test_a_single_modality_is_not_left_out() -> None:
    plan = replace(
        EASY, modalities=("clinical",), sums={"clinical": PLAN.sums["clinical"]},
        encoder_ridge={"clinical": (0.05,)},
    )  # fmt: skip
    fitted = run(small(), plan)
    assert set(fitted.models) == {PROTOCOL, LOCAL_ENCODERS}


def test_the_coordinator_can_be_run_stage_by_stage() -> None:
    coordinator = Coordinator(EASY, InProcess(studies_of(small(), EASY)))
    coordinator.describe()
    assert coordinator.talk.roster == ("site-01", "site-02", "site-03")
    assert coordinator.talk.reachable == coordinator.talk.roster
    encoders = coordinator.fit_encoders()
    fusion = coordinator.fit_fusion()
    fitted = coordinator.fitted(encoders, fusion, coordinator.evaluate(fusion), None)
    whole = run(small(), EASY)
    for arm, model in whole.models.items():
        assert_array_equal(fitted.models[arm].coefficients, model.coefficients)


def test_a_run_without_any_evaluation_still_has_models() -> None:
    rows = small()
    for found in rows.values():
        found.test.event[:] = False
    fitted = run(rows, ANY_CELL)
    assert fitted.evaluations == {}
    assert fitted.calibration_slope is None
    results = summarise(fitted)
    assert results.arms == {}
    assert set(fitted.models) == set(ANY_CELL.arms)
