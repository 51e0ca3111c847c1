"""A whole study whose models are fitted from noisy sums only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fusion import messages as m
from fusion.differential_privacy import Budget, PrivacyLedger
from fusion.federation import PROTOCOL, InProcess, QuorumNotMet, SiteStudy, run_federation
from tests.consortium import EASY, Overheard, identities_of, raise_, run, site_rows

NOISELESS = Budget(epsilon=1e5, clip_norm=50.0)
PRIVATE = replace(EASY, budget=Budget(epsilon=3.0))


def rows():
    return {f"site-0{i}": site_rows(600, i, absent=0.0) for i in (1, 2, 3)}


def studies(found, plan, folder=None):
    identities = identities_of(found)
    return {
        site: SiteStudy(
            plan,
            of_site,
            identity=identities[site],
            ledger=PrivacyLedger(
                None if folder is None else folder / f"{site}.jsonl",
                epsilon=plan.budget.epsilon,
                delta=plan.budget.delta,
            ),
            on_error=raise_,
        )
        for site, of_site in found.items()
    }


def private_run(found, plan, folder=None):
    heard = Overheard(InProcess(studies(found, plan, folder)))
    return run_federation(plan, heard), heard


@pytest.mark.parametrize("secure", [False, True])
def test_with_next_to_no_noise_patients_are_ordered_as_without(secure):
    found = rows()
    plan = replace(EASY, budget=NOISELESS, secure_sum=secure)
    fitted, heard = private_run(found, plan)
    honest = run(found, EASY)
    for site in found:
        study = heard.inner._studies[site]
        ours = study.test_log_hazard(PROTOCOL, fitted.models[PROTOCOL].coefficients)
        exact = SiteScores(found, honest).of(site)
        assert np.corrcoef(ours, exact)[0, 1] > 0.97
    survival = fitted.models[PROTOCOL].predict_survival_function(
        np.zeros((1, 3)), np.array([1095.0])
    )
    exact = honest.models[PROTOCOL].predict_survival_function(
        honest.models[PROTOCOL].mean[None], np.array([1095.0])
    )
    assert abs(survival[0, 0] - exact[0, 0]) < 0.1


class SiteScores:
    """Log hazards of an exact run on a site's test rows."""

    def __init__(self, found, fitted):
        from tests.consortium import studies_of

        self.studies = studies_of(found, EASY)
        self.fitted = run_federation(EASY, InProcess(self.studies))

    def of(self, site):
        model = self.fitted.models[PROTOCOL]
        return self.studies[site].test_log_hazard(PROTOCOL, model.coefficients)


@pytest.mark.border
def test_nothing_that_models_are_fitted_from_crosses_without_noise():
    _, heard = private_run(rows(), PRIVATE)
    exact = (m.DesignMoments, m.Products, m.Updates, m.Edges)
    for request, replies in heard.heard:
        for reply in replies.values():
            assert not isinstance(reply, exact)
            if isinstance(reply, m.Sums):
                assert request.fits == ("calibration_slope",)
            if isinstance(reply, m.Description):
                assert reply.n_train_events == 0
    assert sum(isinstance(r, m.AskPrivateSteps) for r, _ in heard.heard) > 4


@pytest.mark.border
@pytest.mark.parametrize(
    "request_",
    [
        m.AskMoments(EASY.run, 1, ("clinical",)),
        m.AskProducts(EASY.run, 1, ("clinical",)),
        m.AskSums(EASY.run, 1, ("clinical",), np.zeros((1, 4))),
        m.AskSums(EASY.run, 1, ("protocol",), np.zeros((1, 6))),
        m.AskEdges(EASY.run, 1, np.array(EASY.edges_days)),
        m.AskPrivateSteps(EASY.run, 1, 1, ("clinical/0",), np.zeros((1, 4))),
    ],
)
def test_sums_without_noise_are_refused_under_a_budget(request_):
    study = studies(rows(), PRIVATE)["site-01"]
    reply = m.decode(study.answer(m.encode(request_)))
    assert reply == m.Refused("malformed_request")


@pytest.mark.border
def test_a_run_spends_the_budget_and_the_next_one_is_refused(tmp_path):
    found = rows()
    first, _ = private_run(found, PRIVATE, tmp_path)
    again, _ = private_run(found, PRIVATE, tmp_path)
    np.testing.assert_array_equal(
        first.models[PROTOCOL].coefficients, again.models[PROTOCOL].coefficients
    )
    ledger = PrivacyLedger(tmp_path / "site-01.jsonl", epsilon=3.0, delta=PRIVATE.budget.delta)
    assert 2.9 < ledger.spent() <= 3.0
    with pytest.raises(QuorumNotMet):
        private_run(found, replace(PRIVATE, run="4" * 64), tmp_path)


@pytest.mark.border
def test_a_site_without_a_ledger_gives_no_noisy_sum():
    found = rows()
    study = SiteStudy(PRIVATE, found["site-01"])
    ask = m.AskPrivateSteps(PRIVATE.run, 1, 0, (PROTOCOL,), np.zeros((1, 6)))
    assert m.decode(study.answer(m.encode(ask))) == m.Refused("malformed_request")
