"""Networks and gates trained by averaging, over the messages of a study."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from fusion import messages as m
from fusion.federation import (
    PROTOCOL,
    AveragingPlan,
    Coordinator,
    FederationPlan,
    InProcess,
    SiteRows,
    SiteStudy,
    run_federation,
    summarise,
)
from fusion.late.gated import initial_gated_weights
from fusion.survival import cox_sums
from tests.consortium import (
    ANY_CELL,
    EASY,
    N_RADIOLOGY,
    SUMS,
    Flaky,
    LinearNetwork,
    Overheard,
    site_rows,
    small,
    studies_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

STEPS = AveragingPlan(np.zeros(N_RADIOLOGY), rounds=12, local_steps=1, learning_rate=0.1)
NETWORKED = replace(
    ANY_CELL,
    sums={"clinical": SUMS["clinical"]},
    encoder_ridge={"clinical": (0.05,)},
    networks={"radiology": STEPS},
)
GATED = replace(
    EASY,
    fusion_model="gated",
    gating=AveragingPlan(initial_gated_weights(np.zeros(6), hidden=3), rounds=6, local_steps=3),
    gating_hidden=3,
)


def _networked(rows: dict[str, SiteRows]) -> dict[str, SiteRows]:
    for at, found in enumerate(rows.values(), 1):
        table = found.tables.pop("radiology")
        values = (np.concatenate([table.train, table.test]) - at) / 2.0
        found.networks["radiology"] = LinearNetwork(values, found.train)
    return rows


def test_with_one_step_a_round_the_network_descends_the_pooled_loss() -> None:
    rows = _networked(small())
    fitted = run_federation(NETWORKED, InProcess(studies_of(rows, NETWORKED)))
    x, event, time, strata = [], [], [], []
    for at, found in enumerate(rows.values()):
        network = found.networks["radiology"]
        present = network.present[: len(found.train)]
        x.append(network.values[: len(found.train)][present])  # type: ignore[attr-defined]
        event.append(found.train.event[present])
        time.append(found.train.time[present])
        strata.append(np.full(present.sum(), at))
    pooled = [np.concatenate(of) for of in (x, event, time)]
    weights, best, lowest = np.zeros(N_RADIOLOGY), np.zeros(N_RADIOLOGY), np.inf
    for _ in range(STEPS.rounds):
        sums = cox_sums(*pooled, weights, strata=np.concatenate(strata))
        loss = -sums.log_likelihood / sums.n_events
        if loss < lowest:
            best, lowest = weights, loss
        weights = weights + 0.1 * sums.gradient / sums.n_events
    assert_allclose(fitted.networks["radiology"], best, atol=1e-12)
    assert np.abs(best).max() > 0.05
    assert set(fitted.encoders) == {"clinical"}


def test_a_shared_network_is_the_consortiums_at_every_site() -> None:
    rows = _networked(small())
    rows["site-09"] = _networked({"site-09": site_rows(70, 1, train=0.0)})["site-09"]
    studies = studies_of(rows, NETWORKED)
    transport = Overheard(InProcess(studies))
    fitted = run_federation(NETWORKED, transport)
    for site, found in rows.items():
        scores = found.networks["radiology"].log_hazard(fitted.networks["radiology"])
        column = studies[site].columns(PROTOCOL)
        assert_array_equal(column.train[:, 1], scores[: len(found.train)])
        assert_array_equal(column.test[:, 1], scores[len(found.train) :])
    told = [x for x, _ in transport.heard if isinstance(x, m.SetNetworks)]
    assert [x.fits for x in told] == [("radiology",)]
    concordance = summarise(fitted).alone["radiology"]
    assert concordance is not None
    assert concordance.value > 0.55
    assert [s.code for s in fitted.sites] == [""] * 4


def test_networks_are_out_of_fold_where_folds_are_large_enough() -> None:
    plan = replace(
        NETWORKED, minimum=NETWORKED.minimum.model_copy(update={"patients": 20, "events": 5})
    )
    rows = _networked(small(300, 280))
    studies = studies_of(rows, plan)
    fitted = run_federation(plan, InProcess(studies))
    whole = rows["site-01"].networks["radiology"].log_hazard(fitted.networks["radiology"])
    train = studies["site-01"].columns(PROTOCOL).train[:, 1]
    present = ~np.isnan(train)
    assert (train[present] != whole[: len(train)][present]).all()


def test_a_gated_study_runs_through() -> None:
    rows = small()
    studies = studies_of(rows, GATED)
    transport = Overheard(InProcess(studies))
    fitted = run_federation(GATED, transport)
    model = fitted.models[PROTOCOL]
    assert model.kind == "gated"
    asked = [x for x, _ in transport.heard if isinstance(x, m.AskUpdates)]
    assert {x.fits for x in asked} == {(PROTOCOL,)}
    assert {x.ridge for x in asked} == {0.01}
    assert_array_equal(asked[0].weights[0], initial_gated_weights(model.coefficients, hidden=3))
    told = [x for x, _ in transport.heard if isinstance(x, m.SetNetworks)]
    assert len(told) == 1
    assert_array_equal(told[0].weights[0], model.weights)  # type: ignore[attr-defined]
    for site, study in studies.items():
        columns = study.columns(PROTOCOL)
        score = study.test_log_hazard(PROTOCOL, model.coefficients)
        assert_allclose(score, model.predict(columns.test), atol=1e-12)
        assert site in fitted.evaluations
    results = summarise(fitted)
    assert results.arms[PROTOCOL].concordance is not None
    assert "personalised" not in results.arms  # gates have no coefficients to shrink


def test_gates_are_set_once_and_trained_no_longer_than_planned() -> None:
    study = SiteStudy(GATED, site_rows(300, 1))
    rounds = GATED.gating.rounds + 10  # type: ignore[union-attr]
    weights = GATED.gating.start[None]  # type: ignore[union-attr]

    def code(request: m.Message) -> str:
        reply = m.decode(study.answer(m.encode(request)))
        return reply.code if isinstance(reply, m.Refused) else ""

    designs = (*GATED.sums, PROTOCOL)
    shape = (3, N_RADIOLOGY)
    code(m.SetScaling(GATED.run, 1, designs, np.zeros(shape), np.ones(shape)))
    ask = m.AskUpdates(GATED.run, 1, (PROTOCOL,), weights, 0.1)
    assert [code(ask) for _ in range(rounds)] == [""] * rounds
    assert code(ask) == "rounds_spent"
    told = m.SetNetworks(GATED.run, 1, (PROTOCOL,), weights)
    assert code(told) == ""
    assert code(replace(told, weights=weights + 0.1)) == "already_answered"


@dataclass
class Kept:
    """A checkpoint that keeps what JSON would, and may end the run after some rounds."""

    dies_after: int = 10**6
    states: dict[str, str] = field(default_factory=dict)

    def load(self, stage: str) -> dict[str, dict[str, Any]]:
        return json.loads(self.states.get(stage, "{}"))  # type: ignore[no-any-return]

    def save(self, stage: str, state: dict[str, dict[str, Any]]) -> None:
        self.states[stage] = json.dumps(state)


class _Killed(Exception):
    pass


@dataclass
class _Dying:
    """Carries messages until it has carried so many requests for updates."""

    inner: InProcess
    updates_left: int

    @property
    def sites(self) -> tuple[str, ...]:
        return self.inner.sites

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        if isinstance(m.decode(payload), m.AskUpdates):
            if self.updates_left == 0:
                raise _Killed
            self.updates_left -= 1
        return self.inner.ask(payload, sites)


@pytest.mark.parametrize("rule", ["fedavg", "fedprox", "fedadam"])
@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_run_killed_in_training_ends_with_the_same_weights(after: int, rule: Any) -> None:
    averaging = replace(STEPS, rule=rule, rounds=8, local_steps=3, proximal=0.1)
    plan: FederationPlan = replace(NETWORKED, networks={"radiology": averaging})
    rows = _networked(small())
    whole = run_federation(plan, InProcess(studies_of(rows, plan)))
    kept = Kept()
    dying = _Dying(InProcess(studies_of(copy.deepcopy(rows), plan)), after)
    with pytest.raises(_Killed):
        Coordinator(plan, dying, checkpoint=kept).run()
    transport = Overheard(InProcess(studies_of(rows, plan)))
    again = Coordinator(plan, transport, checkpoint=kept).run()
    assert_array_equal(again.networks["radiology"], whole.networks["radiology"])
    assert_array_equal(again.models[PROTOCOL].coefficients, whole.models[PROTOCOL].coefficients)
    asked = [x for x, _ in transport.heard if isinstance(x, m.AskUpdates)]
    rounds = sum(r.stage == "networks" and r.n_fits > 0 for r in whole.rounds)
    assert len(asked) <= rounds - after


def test_a_site_lost_in_training_leaves_the_network_to_the_others() -> None:
    rows = _networked(small())
    transport = Flaky(
        studies_of(rows, NETWORKED), "site-02", lambda request, _: isinstance(request, m.AskUpdates)
    )
    fitted = run_federation(NETWORKED, transport)
    assert [s.code for s in fitted.sites] == ["", "unreachable", ""]
    left = _networked(small())
    left.pop("site-02")
    alone = run_federation(NETWORKED, InProcess(studies_of(left, NETWORKED)))
    assert_allclose(fitted.networks["radiology"], alone.networks["radiology"], atol=1e-12)


def test_steps_that_run_away_leave_the_best_weights_seen() -> None:
    averaging = replace(STEPS, learning_rate=1e200, local_steps=5)
    plan = replace(NETWORKED, networks={"radiology": averaging})
    rows = _networked(small())
    studies = {s: SiteStudy(plan, r) for s, r in rows.items()}
    fitted = run_federation(plan, InProcess(studies))
    assert_array_equal(fitted.networks["radiology"], STEPS.start)
