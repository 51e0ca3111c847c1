"""A study over several sites: equal to the pooled fit, whatever fails; no patient singled out."""

from __future__ import annotations

from dataclasses import astuple, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lifelines import CoxPHFitter
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import norm

from fusion import messages as m
from fusion.evaluation import (
    BrierSums,
    brier_sums,
    censoring_curve,
    concordance_index,
    integrated_brier_score,
    pair_counts,
    uno_pair_counts,
)
from fusion.federation import (
    LOCAL_ENCODERS,
    LOCAL_ONLY,
    PROTOCOL,
    Coordinator,
    FederationPlan,
    Fitted,
    InProcess,
    Outcome,
    QuorumNotMet,
    RoundRecord,
    SiteRows,
    SiteStudy,
    Split,
    run_federation,
    summarise,
)
from fusion.federation.site import MAX_SUMS_PER_FIT
from fusion.late import FusionModel, fusion_inputs, linear_inputs
from fusion.privacy import MinimumCounts
from fusion.survival import fit_cox, interval_sums, moments
from tests.strategies import messages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RUN = "1" * 64
N_RADIOLOGY, N_CLINICAL = 6, 4
SUMS = {
    "radiology": tuple(f"r{i}" for i in range(N_RADIOLOGY)),
    "clinical": tuple(f"c{i}" for i in range(N_CLINICAL)),
}
PLAN = FederationPlan(
    run=RUN,
    protocol="2" * 64,
    modalities=("pathology", "radiology", "clinical"),
    sums=SUMS,
    encoder_ridge={"radiology": 0.02, "clinical": 0.05},
    fusion_ridge=0.01,
    n_folds=3,
    edges_days=(180.0, 365.0, 730.0, 1095.0, 1825.0),
    horizon_days=1095.0,
)
EASY = replace(
    PLAN,
    minimum=MinimumCounts(
        patients=20, events=5, patients_per_input=1, cell=1, test_events=3, pooled_patients=50
    ),
)


def _rows(n: int, seed: int, *, train: float = 0.7, absent: float = 0.2) -> SiteRows:
    """Rows of a site; `absent` of its patients lack radiology, half as many lack a slide."""
    rng = np.random.default_rng(seed)
    radiology = rng.normal(size=(n, N_RADIOLOGY)) * 2.0 + seed
    clinical = rng.normal(size=(n, N_CLINICAL)) + 50.0
    pathology = rng.normal(size=n)
    log_hazard = (
        (radiology - seed) @ np.linspace(-0.3, 0.3, N_RADIOLOGY)
        + clinical @ np.linspace(0.0, 0.5, N_CLINICAL)
        + 0.4 * pathology
    )
    died = np.ceil(rng.exponential(900.0 * np.exp(log_hazard.mean() - log_hazard)))
    lost = np.ceil(rng.uniform(200.0, 2500.0, n))
    event, time = died <= lost, np.minimum(died, lost)
    lacking = rng.random(n) < absent
    own = radiology[:, 0] * 0.3 + rng.normal(size=n)
    radiology[lacking] = own[lacking] = np.nan
    pathology[rng.random(n) < absent / 2] = np.nan
    k = int(n * train)

    def split(values: np.ndarray) -> Split:
        return Split(values[:k], values[k:])

    return SiteRows(
        cohort=f"{seed:064x}",
        train=Outcome(event[:k], time[:k]),
        test=Outcome(event[k:], time[k:]),
        folds=rng.integers(0, PLAN.n_folds, k),
        tables={"radiology": split(radiology), "clinical": split(clinical)},
        local={
            "pathology": split(pathology),
            "radiology": split(own),
            "clinical": split(clinical[:, -1] + rng.normal(size=n)),
        }
        if k
        else {},
    )


def _large() -> dict[str, SiteRows]:
    """Three sites that train, one without scans, and one that only tests."""
    no_scans = _rows(300, 2)
    no_scans.tables.pop("radiology")
    no_scans.local.pop("radiology")
    return {"site-01": _rows(450, 1), "site-02": no_scans, "site-03": _rows(400, 3),
            "site-04": _rows(60, 4, train=0.0)}  # fmt: skip


def _small() -> dict[str, SiteRows]:
    return {f"site-0{i}": _rows(n, i) for i, n in enumerate((210, 160, 140), 1)}


def _raise(error: Exception) -> None:
    raise error


def _studies(rows: dict[str, SiteRows], plan: FederationPlan) -> dict[str, SiteStudy]:
    return {site: SiteStudy(plan, found, on_error=_raise) for site, found in rows.items()}


def _run(rows: dict[str, SiteRows], plan: FederationPlan) -> Fitted:
    return run_federation(plan, InProcess(_studies(rows, plan)))


class Pooled:
    """The same study on all rows in one place, written without messages."""

    def __init__(self, rows: dict[str, SiteRows], plan: FederationPlan, *, folds: bool) -> None:
        self.plan, self.folds = plan, folds
        self.sites = {s: r for s, r in rows.items() if len(r.train)}
        self.encoders = {x: self.encode(x) for x in plan.sums}

    def encode(self, modality: str) -> dict[str, Any]:
        having = [s for s, r in self.sites.items() if modality in r.tables]
        table = np.concatenate([self.sites[s].tables[modality].train for s in having])
        stratum = np.repeat(np.arange(len(having)), [len(self.sites[s].train) for s in having])
        event = np.concatenate([self.sites[s].train.event for s in having])
        time = np.concatenate([self.sites[s].train.time for s in having])
        fold = np.concatenate([self.sites[s].folds for s in having])
        seen = moments(table)
        x = linear_inputs(table, seen.mean, seen.scale)
        present = ~np.isnan(x).all(axis=1)

        def fit(rows: np.ndarray) -> np.ndarray:
            ridge = self.plan.encoder_ridge[modality]
            return fit_cox(
                x[rows], event[rows], time[rows], strata=stratum[rows], ridge=ridge
            ).candidate

        coefficients = fit(present)
        scores = x @ coefficients
        if self.folds:
            for k in range(self.plan.n_folds):
                scores[fold == k] = x[fold == k] @ fit(present & (fold != k))
        column = {s: scores[stratum == i] for i, s in enumerate(having)}
        return {"coefficients": coefficients, "columns": column, "mean": seen.mean,
                "scale": seen.scale}  # fmt: skip

    def columns(self, arm: str) -> dict[str, np.ndarray]:
        found = {}
        for site, rows in self.sites.items():
            nothing = np.full(len(rows.train), np.nan)
            parts = []
            for modality in self.plan.modalities:
                local = rows.local[modality].train if modality in rows.local else nothing
                shared = arm == PROTOCOL and modality in self.plan.sums
                parts.append(
                    self.encoders[modality]["columns"].get(site, nothing) if shared else local
                )
            found[site] = np.column_stack(parts)
        return found

    def fusion(self, arm: str) -> dict[str, np.ndarray]:
        columns = np.concatenate(list(self.columns(arm).values()))
        seen = moments(columns)
        x = fusion_inputs(columns, seen.mean, seen.scale)
        event = np.concatenate([r.train.event for r in self.sites.values()])
        time = np.concatenate([r.train.time for r in self.sites.values()])
        strata = np.repeat(np.arange(len(self.sites)), [len(r.train) for r in self.sites.values()])
        fit = fit_cox(x, event, time, strata=strata, ridge=self.plan.fusion_ridge)
        return {"x": x, "event": event, "time": time, "strata": strata, "mean": seen.mean,
                "scale": seen.scale, "coefficients": fit.candidate,
                "covariance": fit.covariance}  # fmt: skip


def _lifelines(pooled: dict[str, np.ndarray], ridge: float) -> np.ndarray:
    names = [f"x{i}" for i in range(pooled["x"].shape[1])]
    frame = pd.DataFrame(pooled["x"], columns=names)
    spread = frame.std(ddof=1)
    varying = [x for x in names if spread[x] > 1e-12]
    frame = frame[varying].assign(
        event=pooled["event"], time=pooled["time"], strata=pooled["strata"]
    )
    # lifelines penalises coefficients of inputs that it scales itself.
    model = CoxPHFitter(penalizer=(ridge / spread[varying] ** 2).to_numpy())
    model.fit(frame, "time", "event", strata="strata", fit_options={"precision": 1e-14})
    return np.asarray(model.params_.reindex(names).fillna(0.0))


def _assert_equals_pooled(fitted: Fitted, rows: dict[str, SiteRows], plan: FederationPlan) -> None:
    folds = {e.cross_fitted for e in fitted.encoders.values()} == {True}
    pooled = Pooled(rows, plan, folds=folds)
    for modality, encoder in fitted.encoders.items():
        expected = pooled.encoders[modality]
        for name in ("coefficients", "mean", "scale"):
            assert_allclose(getattr(encoder, name), expected[name], atol=1e-8)
    assert set(fitted.models) == {PROTOCOL, LOCAL_ENCODERS}
    for arm, model in fitted.models.items():
        expected = pooled.fusion(arm)
        for name in ("coefficients", "mean", "scale", "covariance"):
            assert_allclose(getattr(model, name), expected[name], atol=1e-8)
        assert_allclose(model.coefficients, _lifelines(expected, plan.fusion_ridge), atol=1e-7)
        log_hazard = expected["x"] @ expected["coefficients"]
        events, exposure = interval_sums(
            log_hazard, expected["event"], expected["time"], model.edges_days
        )
        assert_allclose(model.hazard_per_day, events / exposure, rtol=1e-7)
        cuts = log_hazard.mean() + log_hazard.std(ddof=1) * norm.ppf([1 / 3, 2 / 3])
        assert_allclose(fitted.groups[arm], cuts, atol=1e-8)
    assert fitted.n_patients == sum(len(r.train) for r in pooled.sites.values())
    assert max(fitted.fit_rounds.values()) <= 10


@pytest.fixture(scope="module")
def large() -> tuple[dict[str, SiteRows], dict[str, SiteStudy], Fitted]:
    rows = _large()
    studies = _studies(rows, PLAN)
    return rows, studies, run_federation(PLAN, InProcess(studies))


def test_with_cross_fitting_the_federation_equals_pooling(large: Any) -> None:
    rows, studies, fitted = large
    assert all(encoder.cross_fitted for encoder in fitted.encoders.values())
    _assert_equals_pooled(fitted, rows, PLAN)
    pooled = Pooled(rows, PLAN, folds=True)
    for site, columns in pooled.columns(PROTOCOL).items():
        assert_allclose(studies[site].columns(PROTOCOL).train, columns, atol=1e-8)


def test_where_folds_are_small_the_federation_equals_pooling_without_them() -> None:
    rows = _small()
    plan = replace(PLAN, minimum=MinimumCounts(cell=1))
    fitted = _run(rows, plan)
    assert not any(encoder.cross_fitted for encoder in fitted.encoders.values())
    _assert_equals_pooled(fitted, rows, plan)


def test_the_order_of_sites_does_not_matter(large: Any) -> None:
    rows, _, fitted = large
    again = _run(dict(reversed(rows.items())), PLAN)
    for arm, model in fitted.models.items():
        assert_allclose(again.models[arm].coefficients, model.coefficients, atol=1e-10)
        assert_allclose(again.models[arm].hazard_per_day, model.hazard_per_day, rtol=1e-9)
    assert _figures(summarise(again, PLAN)) == pytest.approx(_figures(summarise(fitted, PLAN)))


def _figures(results: dict[str, Any]) -> list[float]:
    return [r.concordance.value for r in results.values()] + [
        r.brier.value for r in results.values() if r.brier
    ]


def test_who_takes_part_is_told_with_reasons(large: Any) -> None:
    _, _, fitted = large
    by_name = {s.site: s for s in fitted.sites}
    assert by_name["site-02"].contributes == ("pathology", "clinical")
    assert by_name["site-01"].contributes == PLAN.modalities
    external = by_name["site-04"]
    assert (external.trains, external.n_train, external.contributes) == (False, 0, ())
    assert external.n_test == 60
    assert "site-04" in fitted.evaluations


def test_every_round_is_told(large: Any) -> None:
    rows, _, fitted = large
    told: list[RoundRecord] = []
    run_federation(PLAN, InProcess(_studies(rows, PLAN)), on_round=told.append)
    assert [r.number for r in told] == list(range(1, len(told) + 1))
    assert [r.stage for r in told] == [r.stage for r in fitted.rounds]
    assert all(r.bytes_sent > 0 and r.bytes_received > 0 for r in told)


def test_a_site_below_its_minimum_stays_out_and_the_run_goes_on() -> None:
    rows = _small() | {"site-09": _rows(40, 9)}
    plan = replace(PLAN, minimum=MinimumCounts(cell=1))
    fitted = _run(rows, plan)
    small = fitted.sites[-1]
    assert (small.trains, small.n_train, small.n_train_events) == (False, 0, 0)
    _assert_equals_pooled(fitted, {s: r for s, r in rows.items() if s != "site-09"}, plan)


def test_a_site_whose_own_encoders_failed_still_trains() -> None:
    rows = _small()
    rows["site-02"].local.clear()
    plan = replace(PLAN, minimum=MinimumCounts(cell=1))
    fitted = _run(rows, plan)
    assert [s.code for s in fitted.sites] == ["", "", ""]
    _assert_equals_pooled(fitted, rows, plan)


class Flaky:
    """Carries messages to sites, and loses or spoils what one of them says from some round on."""

    def __init__(
        self,
        studies: dict[str, SiteStudy],
        site: str,
        at: Callable[[m.Message, int], bool],
        spoil: Callable[[bytes], bytes | None] = lambda _: None,
    ) -> None:
        self._inner, self._site, self._at, self._spoil = InProcess(studies), site, at, spoil
        self._n_sums, self.spoiled = 0, 0

    @property
    def sites(self) -> tuple[str, ...]:
        return self._inner.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        request = m.decode(payload)
        self._n_sums += isinstance(request, m.AskSums)
        replies = self._inner.ask(payload, sites)
        if self._site in replies and self._at(request, self._n_sums):
            self.spoiled += 1
            spoiled = self._spoil(replies.pop(self._site))
            if spoiled is not None:
                replies[self._site] = spoiled
        return replies


@pytest.mark.parametrize("round_of_sums", [1, 3, 5])
def test_a_site_lost_while_encoders_are_fitted_leaves_the_fit_of_the_others(
    round_of_sums: int,
) -> None:
    rows = _small()
    plan = replace(PLAN, minimum=MinimumCounts(cell=1))
    transport = Flaky(_studies(rows, plan), "site-02", lambda _, n: n >= round_of_sums)
    fitted = run_federation(plan, transport)
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
    alone = fit_cox(x, *outcome, strata=strata, ridge=plan.encoder_ridge["clinical"])
    assert_allclose(encoder.coefficients, alone.candidate, atol=1e-8)
    assert fitted.n_patients == sum(len(r.train) for r in left.values())


def test_a_site_lost_before_anything_was_agreed_leaves_the_study_of_the_others() -> None:
    rows = _small()
    plan = replace(PLAN, minimum=MinimumCounts(cell=1))
    transport = Flaky(
        _studies(rows, plan), "site-02", lambda request, _: isinstance(request, m.AskMoments)
    )
    fitted = run_federation(plan, transport)
    _assert_equals_pooled(fitted, {s: r for s, r in rows.items() if s != "site-02"}, plan)


def test_when_the_only_site_with_a_modality_leaves_the_others_go_on() -> None:
    rows = _small()
    for site in ("site-01", "site-03"):
        rows[site].tables.pop("radiology")
    plan = replace(PLAN, minimum=MinimumCounts(cell=1))
    transport = Flaky(_studies(rows, plan), "site-02", lambda _, n: n >= 3)
    fitted = run_federation(plan, transport)
    assert set(fitted.encoders) == {"clinical"}
    assert fitted.sites[1].code == "unreachable"
    assert LOCAL_ONLY in summarise(fitted, plan)


OTHER_SHAPES = {
    m.Description: lambda r: replace(r, contributes=np.ones(9, bool), cross_fits=np.ones(9, bool)),
    m.DesignMoments: lambda r: replace(r, n=r.n[:1], mean=r.mean[:1], m2=r.m2[:1]),
    m.Sums: lambda r: replace(
        r, gradient=r.gradient[:, :1], information=r.information[:, :1, :1]
    ),
    m.Edges: lambda r: replace(r, releasable=np.ones(9, bool)),
    m.Intervals: lambda r: replace(r, events=r.events[:, :0], exposure=r.exposure[:, :0]),
    m.Evaluation: lambda r: replace(r, life_table=r.life_table[:, :1]),
    m.Done: lambda r: r,
}
SPOILED = {
    "noise": lambda _: b"\x00noise",
    "cut": lambda payload: payload[:-1],
    "empty": lambda _: b"",
    "another type": lambda _: m.encode(m.Edges(np.ones(2, dtype=bool))),
    "a request": lambda _: m.encode(m.AskEdges(RUN, 1, np.ones(2))),
    "another shape": lambda payload: m.encode(
        OTHER_SHAPES[type(m.decode(payload))](m.decode(payload))  # type: ignore[index, operator]
    ),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
@pytest.mark.parametrize(
    "kind",
    [m.Describe, m.AskMoments, m.AskSums, m.AskEdges, m.AskIntervals, m.AskEvaluation],
    ids=lambda kind: kind.__name__,
)
def test_a_site_that_answers_nonsense_leaves_and_the_run_goes_on(
    kind: type, spoil: Callable[[bytes], bytes]
) -> None:
    rows = _small()
    transport = Flaky(
        _studies(rows, EASY), "site-02", lambda request, _: isinstance(request, kind), spoil
    )
    fitted = run_federation(EASY, transport)
    assert transport.spoiled > 0
    code = {s.site: s.code for s in fitted.sites}["site-02"]
    assert code in ("unreadable_reply", "unexpected_reply")
    assert "site-02" not in fitted.evaluations
    assert summarise(fitted, EASY)[PROTOCOL].concordance is not None


class _Broken(dict):  # type: ignore[type-arg]
    """A site's tables on a disk that fails, with a patient in the error's text."""

    def __getitem__(self, key: str) -> Split:
        raise OSError("cannot read /data/patients/DOE_JANE_1954/ct.h5")


def test_what_goes_wrong_at_a_site_leaves_as_a_code() -> None:
    rows = _small()
    rows["site-02"] = replace(rows["site-02"], tables=_Broken(rows["site-02"].tables))
    seen: list[Exception] = []
    studies = {s: SiteStudy(EASY, r, on_error=seen.append) for s, r in rows.items()}
    reply = studies["site-02"].answer(m.encode(m.Describe(RUN, EASY.protocol, EASY.modalities)))
    assert m.decode(reply) == m.Refused("site_error")
    assert b"DOE" not in reply
    assert isinstance(seen[0], OSError)
    fitted = run_federation(EASY, InProcess(studies))
    assert [s.code for s in fitted.sites] == ["", "site_error", ""]


def test_too_few_sites_or_patients_are_no_quorum() -> None:
    with pytest.raises(QuorumNotMet, match="found 1, needed at least 2"):
        _run({"site-01": _rows(400, 1)}, PLAN)
    with pytest.raises(QuorumNotMet, match="found none above the minimum of 50"):
        _run({"site-01": _rows(60, 1), "site-02": _rows(50, 2)}, PLAN)
    with pytest.raises(QuorumNotMet, match="needed 500"):
        _run(_small(), replace(PLAN, minimum=MinimumCounts(pooled_patients=500)))
    with pytest.raises(QuorumNotMet):
        run_federation(
            replace(EASY, minimum=EASY.minimum.model_copy(update={"pooled_patients": 250})),
            Flaky(_studies(_small(), EASY), "site-01", lambda _, n: n == 2),
        )


def test_another_run_or_protocol_is_refused() -> None:
    study = SiteStudy(PLAN, _rows(300, 1))
    describe = m.Describe(RUN, PLAN.protocol, PLAN.modalities)
    other_run = study.answer(m.encode(replace(describe, run="3" * 64)))
    assert m.decode(other_run) == m.Refused("wrong_run")
    for change in ({"protocol": "3" * 64}, {"modalities": ("radiology",)}):
        refused = study.answer(m.encode(replace(describe, **change)))
        assert m.decode(refused) == m.Refused("wrong_protocol")
    with pytest.raises(QuorumNotMet):
        run_federation(replace(PLAN, protocol="3" * 64), InProcess(_studies(_small(), PLAN)))


class Asker:
    """A coordinator by hand."""

    def __init__(self, rows: SiteRows, plan: FederationPlan = PLAN) -> None:
        self.plan = plan
        self.study = SiteStudy(plan, rows)

    def __call__(self, request: m.Message) -> m.Message:
        return m.decode(self.study.answer(m.encode(request)))

    def code(self, request: m.Message) -> str:
        reply = self(request)
        assert isinstance(reply, m.Refused), reply
        return reply.code

    def scaled(self) -> Asker:
        """Agree on scales, and on encoders without folds."""
        for designs in (tuple(self.plan.sums), self.plan.arms):
            found = self(m.AskMoments(RUN, 1, designs))
            assert isinstance(found, m.DesignMoments)
            scale = np.where(found.m2 > 0, np.sqrt(found.m2 / np.maximum(found.n, 1)), 1.0)
            assert self(m.SetScaling(RUN, 2, designs, found.mean, scale)) == m.Done()
            if designs == tuple(self.plan.sums):
                encoders = m.SetEncoders(RUN, 3, designs, np.full((2, N_RADIOLOGY), 0.1))
                assert self(encoders) == m.Done()
        return self

    def intervals(self, **change: Any) -> m.AskIntervals:
        ask = m.AskIntervals(
            RUN, 9, self.plan.arms, np.array(self.plan.edges_days), np.full((2, 6), 0.1)
        )
        return replace(ask, **change)

    def evaluation(self, **change: Any) -> m.AskEvaluation:
        ask = m.AskEvaluation(
            RUN, 9, self.plan.arms, np.array(self.plan.edges_days), np.full((2, 6), 0.1),
            np.full((2, 5), 1e-3), np.tile([-0.5, 0.5], (2, 1)), self.plan.horizon_days,
        )  # fmt: skip
        return replace(ask, **change)


def _sums_of(*fits: str, width: int = N_RADIOLOGY, value: float = 0.0) -> m.AskSums:
    return m.AskSums(RUN, 5, fits, np.full((len(fits), width), value))


def test_fits_over_small_folds_are_refused_whoever_asks() -> None:
    ask = Asker(_rows(150, 1)).scaled()
    assert isinstance(ask(_sums_of("radiology")), m.Sums)
    for fold in ("radiology/0", "radiology/2"):
        assert ask.code(_sums_of(fold)) == "fold_too_small"
        assert ask.code(_sums_of("radiology", fold)) == "fold_too_small"
    fresh = Asker(_rows(150, 1))
    moments_ = fresh(m.AskMoments(RUN, 1, ("radiology",)))
    assert isinstance(moments_, m.DesignMoments)
    fresh(m.SetScaling(RUN, 1, ("radiology",), moments_.mean, np.ones((1, N_RADIOLOGY))))
    # Scores that are zero outside one fold would give that fold's moments.
    with_folds = ("radiology", *PLAN.fold_fits("radiology"))
    marked = m.SetEncoders(RUN, 3, with_folds, np.eye(4, N_RADIOLOGY))
    assert fresh.code(marked) == "fold_too_small"


def test_a_site_below_its_minimum_gives_no_training_sum() -> None:
    ask = Asker(_rows(40, 1, train=0.6))
    description = ask(m.Describe(RUN, PLAN.protocol, PLAN.modalities))
    assert isinstance(description, m.Description)
    assert not description.trains
    assert (description.n_train, description.n_train_events) == (0, 0)
    for arm in PLAN.arms:
        assert ask.code(m.AskMoments(RUN, 1, (arm,))) == "below_minimum_patients"
    found = ask(m.AskMoments(RUN, 1, tuple(SUMS)))
    assert isinstance(found, m.DesignMoments)
    assert not found.n.any()
    ones = np.ones((4, N_RADIOLOGY))
    ask(m.SetScaling(RUN, 2, (*SUMS, *PLAN.arms), ones, ones))
    sums = ask(_sums_of("radiology"))
    assert isinstance(sums, m.Sums)
    assert not sums.n_patients.any()
    assert not sums.information.any()
    assert ask.code(_sums_of(PROTOCOL)) == "below_minimum_patients"
    assert ask.code(m.AskEdges(RUN, 1, np.array(PLAN.edges_days))) == "below_minimum_patients"
    assert ask.code(ask.intervals()) == "small_cell"


def test_a_modality_of_few_patients_is_absent_from_every_sum() -> None:
    rows = _rows(300, 1)
    rows.tables["radiology"].train[3:] = np.nan
    rows.local["pathology"].train[1:] = np.nan
    plan = replace(PLAN, minimum=MinimumCounts())
    ask = Asker(rows, plan)
    ones = np.ones((2, N_RADIOLOGY))
    ask(m.SetScaling(RUN, 1, tuple(SUMS), 0 * ones, ones))
    ask(m.SetEncoders(RUN, 1, tuple(SUMS), 0.1 * ones))
    found = ask(m.AskMoments(RUN, 1, (*SUMS, *plan.arms)))
    assert isinstance(found, m.DesignMoments)
    present = found.n[found.n > 0]
    assert present.size
    assert present.min() >= plan.minimum.patients
    assert not found.mean[found.n == 0].any()
    assert not found.m2[found.n == 0].any()
    ask(m.SetScaling(RUN, 1, plan.arms, np.zeros((2, 3)), np.ones((2, 3))))
    sums = ask(_sums_of(PROTOCOL))
    assert isinstance(sums, m.Sums)
    assert not sums.information[0, :2].any()


def test_a_flag_that_few_patients_raise_is_down() -> None:
    rows = _rows(300, 1, absent=0.0)
    rows.local["pathology"].train[:3] = np.nan
    ask = Asker(rows).scaled()
    sums = ask(_sums_of(PROTOCOL, LOCAL_ENCODERS))
    assert isinstance(sums, m.Sums)
    assert not sums.information[:, 3:].any()
    rows.local["pathology"].train[:20] = np.nan
    assert Asker(rows).scaled()(_sums_of(PROTOCOL)).information[0, 3, 3] > 0  # type: ignore[union-attr]


def test_all_arms_stand_on_the_same_patients() -> None:
    rows = _rows(300, 1)
    rows.local["radiology"].train[:30] = np.nan
    rows.local["clinical"].train[:30] = np.nan
    rows.local["pathology"].train[:30] = np.nan
    rows.tables["clinical"].train[:2] = np.nan  # two have nothing at all
    rows.tables["radiology"].train[:2] = np.nan
    ask = Asker(rows).scaled()
    sums = ask(_sums_of(*PLAN.arms))
    description = ask(m.Describe(RUN, PLAN.protocol, PLAN.modalities))
    assert isinstance(sums, m.Sums)
    assert isinstance(description, m.Description)
    n = len(rows.train) - 2
    assert sums.n_patients.tolist() == [n, n]
    assert description.n_train == n
    intervals = ask(ask.intervals(edges_days=np.array(PLAN.edges_days[-1:])))
    assert isinstance(intervals, m.Intervals)
    assert intervals.risk[:, 0].tolist() == [n, n]


MALFORMED = {
    "design that is none": m.AskMoments(RUN, 1, ("radiology", "genome")),
    "fold as a design": m.AskMoments(RUN, 1, ("radiology/0",)),
    "design twice": m.AskMoments(RUN, 1, ("radiology", "radiology")),
    "scaling of no design": m.SetScaling(RUN, 1, ("genome",), np.ones((1, 3)), np.ones((1, 3))),
    "scaling too narrow": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 2)), np.ones((1, 2))),
    "scaling too wide": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 9)), np.ones((1, 9))),
    "scale of zero": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 3)), np.zeros((1, 3))),
    "scale below zero": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 3)), -np.ones((1, 3))),
    "fit that is none": _sums_of("genome"),
    "alias of an arm": _sums_of("protocol/0"),
    "fold beyond the last": _sums_of("radiology/3"),
    "fold below the first": _sums_of("radiology/-1"),
    "fold spelt otherwise": _sums_of("radiology/00"),
    "fold of a fold": _sums_of("radiology/0/1"),
    "fit twice": _sums_of("radiology", "radiology"),
    "coefficients too few": _sums_of("radiology", width=2),
    "coefficients too many": _sums_of("radiology", width=500_000),
    "no coefficients": _sums_of("radiology", width=0),
    "encoder of an arm": m.SetEncoders(RUN, 1, (PROTOCOL,), np.ones((1, 6))),
    "encoder of one fold": m.SetEncoders(RUN, 1, ("radiology", "radiology/1"), np.ones((2, 6))),
    "encoder of folds only": m.SetEncoders(RUN, 1, PLAN.fold_fits("radiology"), np.ones((3, 6))),
    "edges off the grid": m.AskEdges(RUN, 1, np.array([181.0, 365.0, 730.0, 1095.0, 1825.0])),
    "fewer edges": m.AskEdges(RUN, 1, np.array([365.0, 1825.0])),
    "no edges": m.AskEdges(RUN, 1, np.zeros(0)),
    "a reply": m.Done(),
}
GRID = np.array(PLAN.edges_days)
INTERVALS = {
    "edges unsorted": {"edges_days": GRID[::-1].copy()},
    "edges negative": {"edges_days": GRID - 1000},
    "edge off the grid": {"edges_days": np.array([180.0, 181.0, 1825.0])},
    "edges without the last": {"edges_days": GRID[:-1]},
    "an edge twice": {"edges_days": GRID[[0, 0, 4]]},
    "finer grid": {"edges_days": np.arange(1.0, 1826.0)},
    "no edges": {"edges_days": np.zeros(0)},
    "an arm twice": {"arms": (PROTOCOL, PROTOCOL)},
    "one arm": {"arms": (PROTOCOL,), "coefficients": np.ones((1, 6))},
    "arm that is none": {"arms": (PROTOCOL, "genome")},
    "coefficients too few": {"coefficients": np.ones((2, 5))},
}
EVALUATIONS = INTERVALS | {
    "hazard below zero": {"hazard_per_day": -np.ones((2, 5))},
    "cut too many": {"groups": np.tile(np.arange(50.0), (2, 1))},
    "cuts unsorted": {"groups": np.tile([0.5, -0.5], (2, 1))},
    "horizon of one's own": {"horizon_days": 1094.0},
    "coefficients that overflow": {"coefficients": np.full((2, 6), 1e308)},
}


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker(_rows(300, 1)).scaled()


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED.keys())
def test_requests_outside_the_plan_are_refused(asker: Asker, request_: m.Message) -> None:
    assert asker.code(request_) == "malformed_request"


def _with_hazard(change: dict[str, Any]) -> dict[str, Any]:
    n = len(change.get("edges_days", GRID))
    n_arms = len(change.get("arms", PLAN.arms))
    fitting = {
        "hazard_per_day": np.full((n_arms, n), 1e-3), "groups": np.tile([-0.5, 0.5], (n_arms, 1))
    }  # fmt: skip
    return fitting | change


@pytest.mark.parametrize("change", INTERVALS.values(), ids=INTERVALS.keys())
def test_intervals_outside_the_plan_are_refused(asker: Asker, change: dict[str, Any]) -> None:
    assert asker.code(asker.intervals(**change)) == "malformed_request"


@pytest.mark.parametrize("change", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_evaluations_outside_the_plan_are_refused(change: dict[str, Any]) -> None:
    ask = Asker(_rows(300, 1)).scaled()
    assert ask.code(ask.evaluation(**_with_hazard(change))) == "malformed_request"


def test_nothing_is_answered_before_scales_are_agreed() -> None:
    ask = Asker(_rows(300, 1))
    assert ask.code(_sums_of("radiology")) == "malformed_request"
    assert ask.code(ask.intervals(edges_days=GRID[-1:])) == "malformed_request"
    assert ask.code(ask.evaluation()) == "malformed_request"


@settings(max_examples=150, deadline=None)
@given(request_=messages())
def test_whatever_is_asked_a_site_answers_with_a_message(request_: m.Message) -> None:
    if hasattr(request_, "run"):
        request_ = replace(request_, run=RUN)
    reply = m.decode(SITE.answer(m.encode(request_)))
    assert isinstance(reply, m.Refused | m.Done | m.DesignMoments | m.Description)


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=300))
def test_noise_to_a_site_is_a_malformed_request(payload: bytes) -> None:
    assert m.decode(SITE.answer(payload)) == m.Refused("malformed_request")


SITE = SiteStudy(PLAN, _rows(300, 1))


def test_subtracting_intervals_or_models_is_refused() -> None:
    """Two grids, cut points or coefficient vectors differ by the few patients in between."""
    ask = Asker(_rows(300, 1), EASY).scaled()
    coarse = ask.intervals(edges_days=GRID[[1, 4]])
    first = ask(coarse)
    assert isinstance(first, m.Intervals)
    assert isinstance(ask(replace(coarse, round=12)), m.Intervals)  # a network may ask again
    assert ask.code(ask.intervals(edges_days=GRID[[2, 4]])) == "already_answered"
    moved = replace(coarse, coefficients=coarse.coefficients + 1e-9)
    assert ask.code(moved) == "already_answered"
    once = ask.evaluation()
    assert isinstance(ask(once), m.Evaluation)
    assert isinstance(ask(once), m.Evaluation)
    shifted = replace(once, groups=once.groups + 1e-3)
    assert ask.code(shifted) == "already_answered"
    again = m.SetScaling(RUN, 3, (PROTOCOL,), np.ones((1, 3)), np.ones((1, 3)))
    assert ask.code(again) == "already_answered"
    encoders = m.SetEncoders(RUN, 3, tuple(SUMS), np.full((2, N_RADIOLOGY), 0.3))
    assert ask.code(encoders) == "already_answered"


def test_a_site_gives_a_fit_no_more_sums_than_newton_needs() -> None:
    ask = Asker(_rows(300, 1)).scaled()
    for k in range(MAX_SUMS_PER_FIT):
        assert isinstance(ask(_sums_of("clinical", width=4, value=k / 99)), m.Sums)
    assert ask.code(_sums_of("clinical", width=4, value=0.7)) == "rounds_spent"
    assert ask.code(_sums_of("clinical", "radiology")) == "rounds_spent"
    assert isinstance(ask(_sums_of("radiology")), m.Sums)


@pytest.mark.parametrize("size", [1e2, 1e5, 1e300, 1.7e308])
def test_coefficients_that_single_out_a_patient_get_nothing(size: float) -> None:
    ask = Asker(_rows(300, 1)).scaled()
    reply = ask(_sums_of("radiology", PROTOCOL, value=size))
    assert isinstance(reply, m.Sums)
    assert (reply.log_likelihood <= -1e99).all()
    assert not reply.gradient.any()
    assert not reply.information.any()
    singled = ask.intervals(edges_days=GRID[-1:], coefficients=np.full((2, 6), size))
    assert ask.code(singled) == "small_cell"


def test_intervals_with_a_small_cell_are_refused() -> None:
    rows = _rows(100, 1)
    rows.train.time[rows.train.event & (rows.train.time <= 180)] += 180  # nobody dies early
    ask = Asker(rows).scaled()
    edges = ask(m.AskEdges(RUN, 8, GRID))
    assert isinstance(edges, m.Edges)
    assert not edges.releasable[0]
    assert ask.code(ask.intervals()) == "small_cell"
    kept = GRID[np.append(edges.releasable, True)]
    released = Asker(rows).scaled()(ask.intervals(edges_days=kept))
    assert isinstance(released, m.Intervals)
    assert released.events.min() >= PLAN.minimum.cell
    late = replace(rows, train=Outcome(rows.train.event, rows.train.time + 5000))
    ask = Asker(late).scaled()
    assert ask.code(ask.intervals(edges_days=GRID[-1:])) == "small_cell"


def test_evaluation_equals_direct_figures_on_all_test_rows(large: Any) -> None:
    rows, studies, fitted = large
    results = summarise(fitted, PLAN)
    assert set(results) == {PROTOCOL, LOCAL_ENCODERS, LOCAL_ONLY}
    for arm, model in fitted.models.items():
        direct, uno = {}, {}
        for site, found in rows.items():
            columns = np.column_stack(
                [_test_column(found, arm, x, fitted) for x in PLAN.modalities]
            )
            log_hazard = model.predict(columns)
            outcome = (found.test.event, found.test.time)
            direct[site] = pair_counts(log_hazard, *outcome)
            curve = censoring_curve(
                np.concatenate([found.train.event, outcome[0]]),
                np.concatenate([found.train.time, outcome[1]]),
            )
            uno[site] = uno_pair_counts(log_hazard, *outcome, curve, PLAN.horizon_days)
        result = results[arm]
        for told, counts in ((result.concordance, direct), (result.uno, uno)):
            expected = astuple(concordance_index(list(counts.values())))
            assert astuple(told) == pytest.approx(expected)
        for site, counts in direct.items():
            assert result.by_site[site].value == pytest.approx(concordance_index(counts).value)
    assert results[PROTOCOL].concordance.value > results[LOCAL_ONLY].concordance.value
    assert set(results[LOCAL_ONLY].by_site) == {"site-01", "site-02", "site-03"}
    own = studies["site-01"].own_model()
    assert isinstance(own, FusionModel)


def _test_column(rows: SiteRows, arm: str, modality: str, fitted: Fitted) -> np.ndarray:
    nothing = np.full(len(rows.test), np.nan)
    if arm == PROTOCOL and modality in PLAN.sums:
        table = rows.tables.get(modality)
        return nothing if table is None else fitted.encoders[modality].log_hazard(table.test)
    return rows.local[modality].test if modality in rows.local else nothing


def test_tables_with_a_small_cell_cross_as_zeros(large: Any) -> None:
    rows, _, fitted = large
    n_intervals = len(fitted.models[PROTOCOL].edges_days)
    seen_small = False
    for evaluation in fitted.evaluations.values():
        for table in evaluation.life_table:
            counts = table.reshape(PLAN.n_risk_groups, n_intervals, 3)
            beyond = (counts[..., 0] - counts[..., 1] - counts[..., 2])[:, -1]
            cells = np.concatenate([counts.ravel(), beyond])
            assert not ((cells > 0) & (cells < PLAN.minimum.cell)).any()
            seen_small |= not cells.any()
        for table in evaluation.calibration:
            n, died = table.reshape(7, PLAN.n_risk_groups)[:2]
            cells = np.concatenate([n, died, n - died])
            assert not ((cells > 0) & (cells < PLAN.minimum.cell)).any()
    assert seen_small
    easy = _run(rows, replace(PLAN, minimum=MinimumCounts(cell=1)))
    result = summarise(easy, PLAN)[PROTOCOL]
    assert result.survival is not None
    assert result.calibration is not None
    assert (np.diff(result.survival.value, axis=1) <= 0).all()
    assert result.log_rank is not None
    assert result.log_rank.p_value < 1e-4
    assert result.brier is not None
    assert result.null_brier is not None
    assert result.brier.value < result.null_brier.value


def test_risk_groups_that_differ_by_a_few_patients_are_told_once() -> None:
    rows = _rows(900, 1, absent=0.0)
    plan = replace(PLAN, minimum=MinimumCounts(cell=2))
    slides_only = np.tile([1.0, 0, 0, 0, 0, 0], (2, 1))  # the same column in both arms

    def tables(shift: float) -> np.ndarray:
        ask = Asker(rows, plan).scaled()
        cuts = np.array([[-0.5, 0.5], [-0.5, 0.5 + shift]])
        reply = ask(
            ask.evaluation(
                coefficients=slides_only, groups=cuts, edges_days=GRID[-1:],
                hazard_per_day=np.full((2, 1), 1e-3),
            )
        )  # fmt: skip
        assert isinstance(reply, m.Evaluation)
        return reply.life_table.any(axis=1)

    assert tables(0.0).tolist() == [True, True]
    assert tables(0.005).tolist() == [True, False]  # one patient lies in between
    assert tables(0.05).tolist() == [True, True]


def test_brier_sums_of_single_times_stay_at_the_site(large: Any) -> None:
    rows, studies, fitted = large
    model = fitted.models[PROTOCOL]
    for site, evaluation in fitted.evaluations.items():
        k = len(model.edges_days)
        assert (np.ptp(evaluation.brier[:, :k], axis=1) == 0).all()
        found = rows[site]
        columns = np.column_stack(
            [_test_column(found, PROTOCOL, x, fitted) for x in PLAN.modalities]
        )
        outcome = (found.test.event, found.test.time)
        curve = censoring_curve(
            np.concatenate([found.train.event, outcome[0]]),
            np.concatenate([found.train.time, outcome[1]]),
        )
        survival = model.predict_survival_function(columns, model.edges_days)
        sums = brier_sums(survival, *outcome, model.edges_days, curve)
        sent = BrierSums.from_vector(evaluation.brier[0], n_times=k)
        found_score = integrated_brier_score(sent, model.edges_days)
        expected = integrated_brier_score(sums, model.edges_days)
        assert astuple(found_score) == pytest.approx(astuple(expected))
        assert studies[site].rows is found


def test_few_test_events_give_no_evaluation() -> None:
    rows = _rows(300, 1)
    rows.test.event[:] = False
    rows.test.event[: PLAN.minimum.test_events - 1] = True
    ask = Asker(rows).scaled()
    description = ask(m.Describe(RUN, PLAN.protocol, PLAN.modalities))
    assert isinstance(description, m.Description)
    assert (description.n_test, description.n_test_events) == (0, 0)
    assert ask.code(ask.evaluation()) == "below_minimum_events"


def test_a_run_without_any_evaluation_still_has_models() -> None:
    rows = _small()
    for found in rows.values():
        found.test.event[:] = False
    fitted = _run(rows, replace(PLAN, minimum=MinimumCounts(cell=1)))
    assert fitted.evaluations == {}
    result = summarise(fitted, PLAN)[PROTOCOL]
    assert (result.concordance, result.brier, result.survival) == (None, None, None)


def test_without_shared_encoders_there_is_one_arm() -> None:
    plan = replace(EASY, sums={}, encoder_ridge={})
    fitted = _run(_small(), plan)
    assert set(fitted.models) == {PROTOCOL}
    assert fitted.encoders == {}
    assert set(summarise(fitted, plan)) == {PROTOCOL, LOCAL_ONLY}


def test_the_coordinator_can_be_run_stage_by_stage() -> None:
    coordinator = Coordinator(EASY, InProcess(_studies(_small(), EASY)))
    coordinator.describe()
    assert coordinator.roster == coordinator.reachable == ("site-01", "site-02", "site-03")
    encoders = coordinator.fit_encoders()
    fusion = coordinator.fit_fusion()
    fitted = coordinator.fitted(encoders, fusion, coordinator.evaluate(fusion))
    whole = _run(_small(), EASY)
    for arm, model in whole.models.items():
        assert_array_equal(fitted.models[arm].coefficients, model.coefficients)
