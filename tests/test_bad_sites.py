"""Sites that send wrong sums or wrong rows: who catches which, and who does not.

``docs/bad-sites.md`` has the table that these tests hold to.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fusion import messages as m
from fusion.federation import (
    PROTOCOL,
    Coordinator,
    FederationPlan,
    Fitted,
    InProcess,
    Outcome,
    SiteRows,
    SiteStudy,
    Split,
    run_federation,
    summarise,
)
from fusion.federation.alarms import (
    SiteAlarm,
    holdout_gain,
    own_warnings,
    site_alarms,
    slope_alarms,
)
from fusion.federation.bounds import BoundsBroken, is_stationary, other_units
from fusion.federation.conversation import add
from fusion.federation.self_check import model_fault, self_check
from fusion.newton import ConvergenceError
from tests.consortium import EASY, Flaky, Overheard, run, site_rows, studies_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from fusion.federation.fitting import Fit

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

pytestmark = pytest.mark.border

BAD = "site-02"
SECURE = replace(EASY, secure_sum=True)
DISCRETE = replace(EASY, fusion_model="logistic_hazard")
SHOWN = (PROTOCOL, "radiology", "clinical")


class Counted(InProcess):
    """Counts requests for sums."""

    n_sums = 0

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        self.n_sums += isinstance(m.decode(payload), m.AskSums)
        return super().ask(payload, sites)


class Kept(Coordinator):
    """A coordinator whose fits a test looks at, and the request after which a site left."""

    def __init__(self, plan: FederationPlan, studies: dict[str, SiteStudy]) -> None:
        transport = Counted(studies)

        def left(_: object) -> None:
            if not self.caught and any(o.code for o in self.talk.outcomes.values()):
                self.caught = transport.n_sums

        super().__init__(plan, transport, on_round=left)
        self.fits: dict[str, Fit] = {}
        self.caught = 0

    def _fit(self, fits: Any, *, stage: str) -> None:
        super()._fit(fits, stage=stage)
        self.fits |= fits

    @property
    def alarms(self) -> set[str]:
        """Sites that the training sums of some model raise an alarm of."""
        return {x.site for name in SHOWN for x in self.training_alarms(name)}

    def training_alarms(self, name: str) -> tuple[SiteAlarm, ...]:
        return slope_alarms(self.fits[name].newton, self.fits[name].by_site)


def three(seed: int, *sizes: int) -> dict[str, SiteRows]:
    return {
        f"site-0{i}": site_rows(n, 10 * seed + i)
        for i, n in enumerate(sizes or (210, 160, 140), start=1)
    }


def lying(studies: dict[str, SiteStudy], lie: Any, *, to: type = m.AskSums) -> dict[str, SiteStudy]:
    """Let one site change its replies of a kind before they are written, or masked."""
    honest = studies[BAD]._answers[to]
    studies[BAD]._answers[to] = lambda request: lie(honest(request), request)
    return studies


def _scaled(factor: float, *names: str) -> Any:
    return lambda r, _: replace(r, **{x: factor * getattr(r, x) for x in names})


LIES: dict[str, Any] = {
    "gradient x100": _scaled(100.0, "gradient"),
    "gradient x1e6": _scaled(1e6, "gradient"),
    "gradient flipped": _scaled(-1.0, "gradient"),
    "gradient x1.2": _scaled(1.2, "gradient"),
    "information flipped": _scaled(-1.0, "information"),
    "information x100": _scaled(100.0, "information"),
    "everything x100": _scaled(100.0, "gradient", "information", "log_likelihood"),
    "everything x1e6": _scaled(1e6, "gradient", "information", "log_likelihood"),
    "counts x3": lambda r, _: replace(r, n_patients=3 * r.n_patients, n_events=3 * r.n_events),
}


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("plan", [EASY, DISCRETE], ids=["cox", "discrete"])
def test_a_site_that_sends_wrong_sums_leaves_the_model_of_the_others(
    name: str, plan: FederationPlan
) -> None:
    """The model is that of a run in which its reply of that round was lost."""
    rows = three(1)
    coordinator = Kept(plan, lying(studies_of(rows, plan), LIES[name]))
    fitted = coordinator.run()
    at = coordinator.caught
    assert at > 0
    assert {s.site: s.code for s in fitted.sites if s.code} == {BAD: "not_within_bounds"}
    without = run_federation(plan, Flaky(studies_of(rows, plan), BAD, lambda _, n: n == at))
    for arm, model in without.models.items():
        assert_allclose(fitted.models[arm].coefficients, model.coefficients, atol=1e-10)


@pytest.mark.parametrize("name", LIES)
def test_a_secure_sum_with_wrong_parts_ends_the_run_in_one_sentence(name: str) -> None:
    rows = three(1, 260, 240, 250)
    coordinator = Kept(SECURE, lying(studies_of(rows, SECURE), LIES[name]))
    with pytest.raises(BoundsBroken, match="no patients can have") as broken:
        coordinator.run()
    assert str(broken.value).count("\n") == 0
    assert BAD not in str(broken.value)


# What is told beside the sums of a fit: the request, what is changed, and whether it is added up.
OTHER_LIES: dict[str, tuple[type, Any, bool]] = {
    "more events than patients": (
        m.Describe, lambda r, _: replace(r, n_train_events=r.n_train + 1), False,
    ),
    "moments of more patients": (m.AskMoments, lambda r, _: replace(r, n=3 * r.n), True),
    "events x100": (m.AskIntervals, lambda r, _: replace(r, events=100 * r.events), True),
    "exposure x1e6": (m.AskIntervals, lambda r, _: replace(r, exposure=1e6 * r.exposure), True),
    "pairs x3": (m.AskEvaluation, lambda r, _: replace(r, pairs=3 * r.pairs), False),
    "more test patients": (m.AskEvaluation, lambda r, _: replace(r, n_test=r.n_test + 1), False),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_LIES)
def test_a_site_that_tells_something_else_that_cannot_be_leaves(name: str) -> None:
    to, lie, _ = OTHER_LIES[name]
    rows = three(1)
    fitted = run_federation(EASY, InProcess(lying(studies_of(rows, EASY), lie, to=to)))
    assert {s.site: s.code for s in fitted.sites if s.code} == {BAD: "not_within_bounds"}
    assert set(fitted.evaluations) == set(rows) - {BAD}


@pytest.mark.parametrize("name", OTHER_LIES)
def test_under_a_secure_sum_what_is_added_up_ends_the_run_and_what_is_not_the_sites_part(
    name: str,
) -> None:
    to, lie, added = OTHER_LIES[name]
    rows = three(1, 260, 240, 250, 230)
    transport = InProcess(lying(studies_of(rows, SECURE), lie, to=to))
    if added:
        with pytest.raises(BoundsBroken, match="no patients can have"):
            run_federation(SECURE, transport)
        return
    fitted = run_federation(SECURE, transport)
    assert {s.site: s.code for s in fitted.sites if s.code} == {BAD: "not_within_bounds"}


def test_a_site_whose_tables_are_in_another_unit_leaves_before_scales_are_agreed() -> None:
    rows = three(1)
    others = run({s: r for s, r in rows.items() if s != BAD}, EASY)
    rows[BAD] = _tables(rows[BAD], lambda x: 1000.0 * x)
    fitted = run(rows, EASY)
    assert {s.site: s.code for s in fitted.sites if s.code} == {BAD: "not_within_bounds"}
    for arm, model in others.models.items():
        assert_allclose(fitted.models[arm].coefficients, model.coefficients, atol=1e-8)


@pytest.mark.parametrize("plan", [EASY, DISCRETE, SECURE], ids=["cox", "discrete", "secure"])
def test_honest_sites_are_never_caught(plan: FederationPlan) -> None:
    rows = three(2, 260, 240, 250)
    rows["site-02"].tables.pop("radiology")
    rows["site-02"].local.pop("radiology")
    coordinator = Kept(plan, studies_of(rows, plan))
    fitted = coordinator.run()
    assert [s.code for s in fitted.sites] == ["", "", ""]
    for arm, model in run(rows, plan).models.items():
        assert_array_equal(fitted.models[arm].coefficients, model.coefficients)
    for fit in coordinator.fits.values():
        assert is_stationary(fit.newton, add(list(fit.by_site.values())))


def test_not_a_number_never_leaves_a_site() -> None:
    """The schema lets only finite values be written: a site's own error, and its code."""
    rows = three(1)
    studies = lying(studies_of(rows, EASY), _scaled(np.nan, "gradient"))
    studies[BAD]._on_error = None
    fitted = run_federation(EASY, InProcess(studies))
    assert {s.site: s.code for s in fitted.sites if s.code} == {BAD: "malformed_request"}


def test_not_a_number_never_gets_into_a_secure_sum() -> None:
    rows = three(1, 260, 240, 250, 230)
    studies = lying(studies_of(rows, SECURE), _scaled(np.nan, "gradient"))
    studies[BAD]._on_error = None
    fitted = Kept(SECURE, studies).run()
    assert [s.site for s in fitted.sites if s.code] == [BAD]
    assert all(np.isfinite(x.coefficients).all() for x in fitted.models.values())


def test_a_site_that_lets_no_step_pass_is_seen_at_the_end() -> None:
    """It says at every step that one patient outweighs its sums: no model comes of it unseen."""

    def lowest(reply: m.Sums, request: m.AskSums) -> m.Sums:
        if not request.coefficients.any():
            return reply
        return replace(
            reply, log_likelihood=0 * reply.log_likelihood - 1e12,
            gradient=0 * reply.gradient, information=0 * reply.information,
        )  # fmt: skip

    for plan in (EASY, SECURE):
        rows = three(1, 260, 240, 250)
        with pytest.raises(ConvergenceError, match="ended off its maximum"):
            Kept(plan, lying(studies_of(rows, plan), lowest)).run()


# Rows that are wrong rather than sums.


def _outcomes(rows: SiteRows, change: Any) -> SiteRows:
    n = len(rows.train)
    event, time = change(
        np.concatenate([rows.train.event, rows.test.event]),
        np.concatenate([rows.train.time, rows.test.time]),
    )
    return replace(
        rows, train=Outcome(event[:n], time[:n]), test=Outcome(event[n:], time[n:])
    )  # fmt: skip


def _tables(rows: SiteRows, change: Callable[[Floats], Floats]) -> SiteRows:
    tables = {k: Split(change(x.train), change(x.test)) for k, x in rows.tables.items()}
    return replace(rows, tables=tables)


def _permuted(event: Flags, time: Floats) -> tuple[Flags, Floats]:
    order = np.random.default_rng(0).permutation(len(event))
    return event[order], time[order]


def _noisy(event: Flags, time: Floats) -> tuple[Flags, Floats]:
    wrong = np.random.default_rng(0).random(len(event)) < 0.1
    return event ^ wrong, time


def _reversed(event: Flags, time: Floats) -> tuple[Flags, Floats]:
    return event, time.max() + time.min() - time


def _one_wild_row(values: Floats) -> Floats:
    wild = values.copy()
    wild[3] *= 1e6
    return wild


SHUFFLED: dict[str, Any] = {
    "events inverted": partial(_outcomes, change=lambda event, time: (~event, time)),
    "time reversed": partial(_outcomes, change=_reversed),
    "outcomes permuted": partial(_outcomes, change=_permuted),
    "inputs negated": partial(_tables, change=lambda x: -x),
}


@pytest.mark.parametrize("name", SHUFFLED)
def test_rows_of_another_disease_are_seen_in_the_training_sums_of_the_site(name: str) -> None:
    for seed in (1, 2, 3):
        rows = three(seed)
        rows[BAD] = SHUFFLED[name](rows[BAD])
        coordinator = Kept(EASY, studies_of(rows, EASY))
        fitted = coordinator.run()
        assert BAD in coordinator.alarms
        told = {x.site: x.z for x in fitted.alarms if x.reason == "unlike_in_training"}
        assert set(told) == coordinator.alarms
        shown = [x for name in SHOWN for x in coordinator.training_alarms(name)]
        assert told[BAD] == min(x.z for x in shown if x.site == BAD)


def test_honest_sites_raise_no_alarm() -> None:
    for seed in (1, 2, 3):
        coordinator = Kept(EASY, studies_of(three(seed), EASY))
        fitted = coordinator.run()
        assert coordinator.alarms == set()
        assert fitted.alarms == ()
        gain = holdout_gain(EASY, fitted.evaluations)
        assert gain is not None
        assert gain.value > -2.33 * gain.standard_error
        assert summarise(fitted).holdout_gain == gain


def turned_round(plan: FederationPlan, warned: list[str] | None = None) -> Fitted:
    """Run a study in which time at one of three large sites runs backwards."""
    rows = three(1, 500, 500, 500)
    rows[BAD] = SHUFFLED["time reversed"](rows[BAD])
    studies = studies_of(rows, plan)
    for site, study in studies.items():
        study._on_warning = None if warned is None else partial(_note, warned, site)
    return run_federation(plan, InProcess(studies))


def _note(warned: list[str], site: str, sentence: str) -> None:
    warned.append(f"{site}: {sentence}")


def test_under_a_secure_sum_test_rows_of_another_disease_raise_the_alarm() -> None:
    fitted = turned_round(SECURE)
    assert {(x.site, x.reason) for x in fitted.alarms} >= {(BAD, "unlike_the_others")}
    assert {x.site for x in fitted.alarms} == {BAD}
    assert all(isinstance(x, SiteAlarm) and x.z < -2.33 for x in fitted.alarms)
    assert fitted.alarms == site_alarms(SECURE, fitted.evaluations)
    assert summarise(fitted).alarms == fitted.alarms


def test_where_sums_are_plain_alarms_of_training_rows_and_of_held_out_rows_are_both_told() -> None:
    fitted = turned_round(EASY)
    of_tests = site_alarms(EASY, fitted.evaluations)
    of_sums = fitted.alarms[: -len(of_tests)]
    assert fitted.alarms[-len(of_tests) :] == of_tests
    assert BAD in {x.site for x in of_tests}
    assert BAD in {x.site for x in of_sums}
    assert {x.reason for x in of_sums} == {"unlike_in_training"}


@pytest.mark.parametrize("plan", [EASY, SECURE], ids=["plain", "secure"])
def test_a_site_tells_its_own_log_that_the_model_does_not_fit_its_rows(
    plan: FederationPlan,
) -> None:
    """Held-out rows and the consortium's encoders; what crosses is the same, warned or not."""
    warned: list[str] = []
    fitted = turned_round(plan, warned)
    assert {x.partition(": ")[0] for x in warned} == {BAD}
    assert sum("by the consortium's model lived longer (z = -" in x for x in warned) == 1
    assert sum("at higher predicted hazard lived longer (z = -" in x for x in warned) == 1
    assert all("\n" not in x for x in warned)
    silent = turned_round(plan)
    for site, evaluation in silent.evaluations.items():
        assert m.encode(evaluation) == m.encode(fitted.evaluations[site])


def test_a_site_whose_own_model_is_better_is_told_so() -> None:
    """Outcomes of a disease with the opposite risks: a model of its own learns them."""
    rows = three(1, 500, 500, 500)
    rows[BAD] = SHUFFLED["time reversed"](rows[BAD])
    fitted = run(rows, SECURE)
    own = [x.reason for x in site_alarms(SECURE, {"": fitted.evaluations[BAD]})]
    assert "worse_than_own" in own
    assert len(own_warnings(SECURE, fitted.evaluations[BAD])) == len(own)


def test_permuted_rows_pass_a_secure_sum_and_move_a_model_of_many_sites_little() -> None:
    """Not caught: sums of wrong rows are sums of rows. What five honest sites say outweighs it."""
    rows = three(1, 300, 300, 300, 300, 300, 300)
    honest = run(rows, SECURE).models[PROTOCOL].coefficients
    rows[BAD] = SHUFFLED["outcomes permuted"](rows[BAD])
    fitted = Kept(SECURE, studies_of(rows, SECURE)).run()
    moved = np.abs(fitted.models[PROTOCOL].coefficients - honest).max()
    assert 0.0 < moved < 0.5


def test_label_noise_and_a_slight_overweight_in_a_total_are_not_caught() -> None:
    rows = three(1, 260, 240, 250)
    slight = _scaled(1.1, "gradient", "information", "log_likelihood")
    Kept(SECURE, lying(studies_of(rows, SECURE), slight)).run()
    rows[BAD] = _outcomes(rows[BAD], _noisy)
    assert self_check(rows[BAD]) is None
    coordinator = Kept(EASY, studies_of(rows, EASY))
    fitted = coordinator.run()
    assert [s.code for s in fitted.sites] == ["", "", ""]
    assert BAD not in coordinator.alarms


def test_another_unit_is_seen_in_the_moments_of_three_sites() -> None:
    rows = three(1)
    rows[BAD] = _tables(rows[BAD], lambda x: 1000.0 * x)
    ask = m.encode(m.AskMoments(EASY.run, 1, tuple(EASY.sums)))
    replies = InProcess(studies_of(rows, EASY)).ask(ask, tuple(rows))
    found: dict[str, Any] = {s: m.decode(r) for s, r in replies.items()}
    assert set(other_units(found)) == {BAD}


# A site that looks at itself.


def knowing(seed: int = 1, n: int = 400) -> SiteRows:
    """Rows whose own encoders, fitted before anything went wrong, know something."""
    rows = site_rows(n, seed)
    table = rows.tables["clinical"]
    risk = np.linspace(0.0, 0.5, 4)
    return replace(
        rows, local={"clinical": Split(table.train @ risk, table.test @ risk)}
    )  # fmt: skip


def _with_train(rows: SiteRows, event: Flags, time: Floats) -> SiteRows:
    return replace(rows, train=Outcome(event, time))


def _twice(rows: SiteRows) -> SiteRows:
    def twice(x: Split) -> Split:
        return Split(np.concatenate([x.train[:60], x.train[:60]]), x.test)

    train = rows.train
    return replace(
        rows,
        train=Outcome(np.tile(train.event[:60], 2), np.tile(train.time[:60], 2)),
        folds=np.tile(rows.folds[:60], 2),
        tables={k: twice(x) for k, x in rows.tables.items()},
        local={k: twice(x) for k, x in rows.local.items()},
    )


FAULTS: dict[str, tuple[Callable[[SiteRows], SiteRows], str]] = {
    "time reversed": (SHUFFLED["time reversed"], "lived longer"),
    "no event": (lambda r: _with_train(r, r.train.event & False, r.train.time), "no patient"),
    "same time": (lambda r: _with_train(r, r.train.event, 0 * r.train.time + 9), "same for every"),
    "no time": (lambda r: _with_train(r, r.train.event, np.nan * r.train.time), "not finite"),
    "negative time": (lambda r: _with_train(r, r.train.event, -r.train.time), "positive"),
    "infinite input": (lambda r: _tables(r, lambda x: x + np.inf), "infinite"),
    "constant inputs": (lambda r: _tables(r, lambda x: 0 * x + 3), "no input varies"),
    "one wild row": (lambda r: _tables(r, _one_wild_row), "standard deviations"),
    "copies": (_twice, "copies"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_site_that_looks_at_itself_finds_what_is_wrong(name: str) -> None:
    change, said = FAULTS[name]
    sentence = self_check(change(knowing(n=1000)))
    assert sentence is not None
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("name", FAULTS)
def test_a_site_that_finds_something_wrong_takes_no_part_and_tells_its_own_log_alone(
    name: str,
) -> None:
    change, said = FAULTS[name]
    rows = three(1) | {BAD: change(knowing(n=1000))}
    studies = studies_of(rows, EASY)
    logged: list[Exception] = []
    studies[BAD]._on_error = logged.append
    heard = Overheard(InProcess(studies))
    fitted = run_federation(EASY, heard)
    assert {s.site: s.code for s in fitted.sites if s.code} == {BAD: "not_within_bounds"}
    assert len(logged) == 1
    assert said in str(logged[0])
    of_site = [replies[BAD] for _, replies in heard.heard if BAD in replies]
    assert of_site == [m.Refused("not_within_bounds")]


def test_a_site_finds_nothing_wrong_in_honest_rows() -> None:
    for seed in range(12):
        assert self_check(site_rows(160, seed)) is None
        assert self_check(knowing(seed)) is None
    assert self_check(site_rows(60, 1, train=0.0)) is None
    bare = replace(site_rows(160, 1), local={}, tables={})
    assert self_check(bare) is None
    assert (
        self_check(_tables(knowing(), lambda x: np.where(np.arange(x.shape[1]) < 2, np.nan, x)))
        is None
    )


def test_the_consortiums_encoders_show_a_site_that_its_outcomes_are_turned_round() -> None:
    """Its own encoders learned the wrong outcomes, so that only the others' can tell."""
    rows = three(1, 700, 500, 700)
    rows[BAD] = SHUFFLED["time reversed"](rows[BAD])
    studies = studies_of(rows, EASY)
    Kept(EASY, studies).run()
    for site, study in studies.items():
        columns = list(study.designs.columns(PROTOCOL).train[:, 1:].T)
        assert (model_fault(columns, rows[site].train) is not None) == (site == BAD)


def test_a_fit_of_one_site_has_no_others_to_be_unlike() -> None:
    coordinator = Kept(EASY, studies_of(three(1), EASY))
    coordinator.run()
    fit = coordinator.fits[PROTOCOL]
    assert slope_alarms(fit.newton, {BAD: fit.by_site[BAD]}) == ()


def test_without_test_rows_nobody_gains_or_alarms() -> None:
    fitted: Fitted = run(three(1), EASY)
    assert holdout_gain(EASY, {}) is None
    assert site_alarms(EASY, {}) == ()
    alone = {BAD: fitted.evaluations[BAD]}
    assert all(x.reason != "unlike_the_others" for x in site_alarms(EASY, alone))
