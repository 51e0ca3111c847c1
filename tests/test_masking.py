"""Secure sums in a whole run: the same model, and a coordinator that sees totals only."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fusion import messages as m
from fusion.federation import (
    InProcess,
    QuorumNotMet,
    SiteStudy,
    run_federation,
)
from fusion.federation.bounds import BoundsBroken
from fusion.federation.plan import AveragingPlan
from fusion.late.gated import initial_gated_weights
from tests.consortium import (
    EASY,
    PLAN,
    RUN,
    Flaky,
    Overheard,
    identities_of,
    large,
    small,
    studies_of,
)

pytestmark = pytest.mark.border

SECURE = replace(PLAN, secure_sum=True)


def secure_run(rows, plan=SECURE):
    heard = Overheard(InProcess(studies_of(rows, plan)))
    return run_federation(plan, heard), heard


@pytest.mark.parametrize("model", ["cox", "logistic_hazard"])
def test_secure_sums_give_the_model_of_plain_ones(model):
    plan = replace(PLAN, fusion_model=model, components={"radiology": 3})
    plain = run_federation(plan, InProcess(studies_of(large(), plan)))
    secure, _ = secure_run(large(), replace(plan, secure_sum=True))
    for arm, found in plain.models.items():
        masked = secure.models[arm]
        np.testing.assert_allclose(masked.coefficients, found.coefficients, atol=1e-8)
        np.testing.assert_allclose(masked.baseline, found.baseline, atol=1e-8)
        np.testing.assert_allclose(masked.covariance, found.covariance, atol=1e-8)
        np.testing.assert_allclose(secure.groups[arm], plain.groups[arm], atol=1e-8)
    for modality, encoder in plain.encoders.items():
        np.testing.assert_allclose(
            secure.encoders[modality].coefficients, encoder.coefficients, atol=1e-8
        )
    assert (secure.n_patients, secure.n_events) == (plain.n_patients, plain.n_events)
    assert plain.evaluations.keys() == secure.evaluations.keys()


def test_networks_averaged_behind_masks_are_those_of_plain_averages():
    start = initial_gated_weights(np.zeros(6), hidden=PLAN.gating_hidden)
    gating = AveragingPlan(start=start, rounds=4, learning_rate=0.1)
    plan = replace(PLAN, fusion_model="gated", gating=gating)
    plain = run_federation(plan, InProcess(studies_of(large(), plan)))
    secure, _ = secure_run(large(), replace(plan, secure_sum=True))
    np.testing.assert_allclose(
        secure.models["protocol"].weights, plain.models["protocol"].weights, atol=1e-8
    )


@pytest.mark.border
def test_the_coordinator_hears_of_no_site_alone_what_models_are_fitted_from():
    _, heard = secure_run(large())
    alone = (m.DesignMoments, m.Products, m.Updates, m.Intervals, m.PrivateSteps)
    masked = []
    for request, replies in heard.heard:
        for reply in replies.values():
            assert not isinstance(reply, alone)
            if isinstance(reply, m.Sums):  # of test rows, each site's own, by design
                assert request.fits == ("calibration_slope",)
        masked += [replies] if any(isinstance(r, m.Masked) for r in replies.values()) else []
    assert len(masked) > 5
    words = np.concatenate([r.words.ravel() for of in masked for r in of.values()])
    bits = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 5.0 * 0.5 / np.sqrt(words.size * 64)


@pytest.mark.border
def test_rounds_and_attempts_only_rise_and_differ():
    _, heard = secure_run(large())
    rounds = [
        request.round
        for request, replies in heard.heard
        if any(isinstance(r, m.Masked) for r in replies.values())
    ]
    assert all(a < b for a, b in pairwise(rounds))


def test_the_penalty_is_chosen_from_totals_by_effective_coefficients():
    ridges = (1e-4, 1e-2, 1.0, 100.0)
    plan = replace(SECURE, fusion_ridge=ridges, encoder_ridge=dict.fromkeys(PLAN.sums, ridges))
    fitted, _ = secure_run(large(), plan)
    assert all(found in (1e-4, 1e-2) for found in fitted.ridge.values())


def test_penalty_by_information_is_akaikes():
    ridges = (1e-3, 0.1, 10.0)
    plan = replace(SECURE, fusion_ridge=ridges)
    fitted, heard = secure_run(large(), plan)
    assert fitted.ridge["protocol"] in ridges
    tried = {
        fit for request, _ in heard.heard if isinstance(request, m.AskSums) for fit in request.fits
        if "try" in fit
    }  # fmt: skip
    assert tried == {f"protocol/try-{i}-0" for i in range(3)}


@pytest.mark.border
def test_a_site_that_leaves_ends_the_attempt_and_no_coefficients_are_asked_of_two_rosters():
    rows = small(260, 240, 250, 240)
    plan = replace(EASY, secure_sum=True)
    flaky = Flaky(studies_of(rows, plan), "site-02", lambda ask, n: n >= 3)
    heard = Overheard(flaky)
    fitted = run_federation(plan, heard)
    left = {o.site: o.code for o in fitted.sites}
    assert left["site-02"] == "unreachable"
    asked: dict[bytes, set[frozenset[str]]] = {}
    for request, replies in heard.heard:
        masked = any(isinstance(x, m.Masked) for x in replies.values())
        if masked and isinstance(request, m.AskSums):
            for fit, row in zip(request.fits, request.coefficients, strict=True):
                asked.setdefault(fit.encode() + row.tobytes(), set()).add(frozenset(replies))
    with_02 = {k for k, of in asked.items() if any("site-02" in x for x in of)}
    without_02 = {k for k, of in asked.items() if any("site-02" not in x for x in of)}
    assert with_02
    assert without_02
    # What both have seen was asked once with everybody, and lost with the site that left.
    again = with_02 & without_02
    assert not again
    plain = replace(plan, secure_sum=False)
    honest = run_federation(plain, Flaky(studies_of(rows, plain), "site-02", lambda ask, n: n >= 3))
    for arm, model in honest.models.items():
        np.testing.assert_allclose(fitted.models[arm].coefficients, model.coefficients, atol=1e-8)


@pytest.mark.border
def test_a_reply_lost_on_the_way_is_asked_for_again_under_new_keys():
    rows, plan = small(260, 240, 250), replace(EASY, secure_sum=True)
    lost = []

    def once(ask, n):
        return isinstance(ask, m.AskSums) and n == 3 and not lost and not lost.append(n)

    heard = Overheard(Flaky(studies_of(rows, plan), "site-02", once))
    fitted = run_federation(plan, heard)
    assert lost
    assert all(not o.code for o in fitted.sites)
    attempts = {r.attempt for r, _ in heard.heard if isinstance(r, m.AskKey)}
    assert attempts == {1, 2}
    whole = run_federation(plan, InProcess(studies_of(rows, plan)))
    np.testing.assert_allclose(
        fitted.models["protocol"].coefficients,
        whole.models["protocol"].coefficients,
        atol=1e-10,
    )


@pytest.mark.border
def test_two_sites_are_too_few_for_a_secure_sum():
    plan = replace(EASY, secure_sum=True)
    with pytest.raises(QuorumNotMet, match=r"found 2 left, needed 3 for a secure sum"):
        run_federation(plan, InProcess(studies_of(small(200, 200), plan)))


class Hand:
    """A coordinator by hand, against one site of three."""

    def __init__(self):
        rows = small(260, 240, 250)
        self.studies = {
            s: SiteStudy(SECURE, rows[s], identity=i) for s, i in identities_of(rows).items()
        }
        self.roster = tuple(self.studies)

    def ask(self, request, site="site-01"):
        return m.decode(self.studies[site].answer(m.encode(request)))

    def code(self, request, site="site-01"):
        reply = self.ask(request, site)
        assert isinstance(reply, m.Refused), reply
        return reply.code

    def keyed(self, attempt=1, roster=None):
        roster = roster or self.roster
        keys = [self.ask(m.AskKey(RUN, attempt, roster), s) for s in roster]
        told = m.SetKeys(
            RUN, attempt, roster,
            np.array([k.public for k in keys]), np.array([k.signature for k in keys]),
        )  # fmt: skip
        return told

    def moments(self, number):
        return m.AskMoments(RUN, number, ("clinical",))


@pytest.mark.border
def test_without_keys_a_site_tells_no_sum():
    hand = Hand()
    assert hand.code(hand.moments(1)) == "bad_key"
    hand.ask(m.AskKey(RUN, 1, hand.roster))
    assert hand.code(hand.moments(1)) == "bad_key"


@pytest.mark.border
@pytest.mark.parametrize(
    ("roster", "code"),
    [
        (("site-01", "site-02"), "roster_too_small"),
        (("site-01",), "roster_too_small"),
        (("site-01", "site-02", "site-09"), "bad_key"),
        (("site-02", "site-03", "site-09"), "roster_changed"),
    ],
)
def test_a_roster_that_hides_nobody_is_refused(roster, code):
    hand = Hand()
    assert hand.code(m.AskKey(RUN, 1, roster)) == code


@pytest.mark.border
def test_an_attempt_and_a_round_serve_once():
    hand = Hand()
    told = hand.keyed()
    assert hand.ask(told) == m.Done()
    assert isinstance(hand.ask(hand.moments(4)), m.Masked)
    assert hand.code(hand.moments(4)) == "mask_spent"
    assert hand.code(hand.moments(3)) == "mask_spent"
    assert hand.code(m.AskKey(RUN, 1, hand.roster)) == "mask_spent"


@pytest.mark.border
def test_a_swapped_key_is_refused():
    hand = Hand()
    told = hand.keyed()
    swapped = replace(told, publics=told.publics[[1, 0, 2]])
    assert hand.code(swapped) == "bad_key"
    flipped = told.publics.copy()
    flipped[1, 0] ^= 1
    other = Hand()
    again = other.keyed()
    assert other.code(replace(again, publics=flipped)) == "bad_key"


@pytest.mark.border
def test_the_roster_of_the_keys_is_the_one_that_was_announced():
    hand = Hand()
    told = hand.keyed()
    part = replace(
        told, roster=told.roster[:2], publics=told.publics[:2], signatures=told.signatures[:2]
    )
    assert hand.code(part) == "roster_changed"


@pytest.mark.border
def test_a_sum_of_masks_and_slope_in_one_request_is_refused():
    hand = Hand()
    hand.ask(hand.keyed())
    ask = m.AskSums(RUN, 7, ("clinical", "calibration_slope"), np.zeros((2, 4)))
    assert hand.code(ask) == "malformed_request"


@pytest.mark.border
def test_a_total_that_no_sums_can_have_ends_the_run_in_one_sentence():
    rows, plan = small(260, 240, 250), replace(EASY, secure_sum=True)

    def spoil(payload):
        reply = m.decode(payload)
        return m.encode(m.Masked(reply.words + np.uint64(2**62)))

    flaky = Flaky(
        studies_of(rows, plan), "site-02", lambda ask, n: isinstance(ask, m.AskMoments), spoil
    )
    with pytest.raises((BoundsBroken, QuorumNotMet)) as caught:
        run_federation(plan, flaky)
    assert "\n" not in str(caught.value)
