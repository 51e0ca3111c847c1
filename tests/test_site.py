"""What a site refuses: whatever its plan does not need, and whatever singles a patient out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from fusion import messages as m
from fusion.federation import (
    LOCAL_ENCODERS,
    PROTOCOL,
    AveragingPlan,
    Outcome,
    SiteRows,
    SiteStudy,
)
from fusion.federation.plan import CALIBRATION_SLOPE
from fusion.federation.site import MAX_SUMS_PER_FIT
from fusion.privacy import MinimumCounts
from tests.consortium import (
    DETAILED,
    EASY,
    GRID,
    N_RADIOLOGY,
    PLAN,
    RUN,
    SUMS,
    Asker,
    LinearNetwork,
    ask_sums,
    site_rows,
)
from tests.strategies import messages

pytestmark = pytest.mark.border

pytestmark = pytest.mark.border

N_ARMS = len(PLAN.arms)
NETWORKED = replace(
    PLAN,
    sums={"clinical": SUMS["clinical"]},
    encoder_ridge={"clinical": (0.05,)},
    networks={"radiology": AveragingPlan(np.zeros(N_RADIOLOGY), rounds=3, local_steps=2)},
)

DISCRETE = replace(PLAN, fusion_model="logistic_hazard")


def networked_rows(n: int = 300, seed: int = 1) -> SiteRows:
    rows = site_rows(n, seed)
    table = rows.tables.pop("radiology")
    rows.networks["radiology"] = LinearNetwork(
        np.concatenate([table.train, table.test]) - seed, rows.train
    )
    return rows


def test_fits_over_small_folds_are_refused_whoever_asks() -> None:
    ask = Asker(site_rows(150, 1)).scaled()
    assert isinstance(ask(ask_sums("radiology")), m.Sums)
    for fold in ("radiology/0", "radiology/2"):
        assert ask.code(ask_sums(fold)) == "fold_too_small"
        assert ask.code(ask_sums("radiology", fold)) == "fold_too_small"
    fresh = Asker(site_rows(150, 1))
    moments_ = fresh(m.AskMoments(RUN, 1, ("radiology",)))
    assert isinstance(moments_, m.DesignMoments)
    fresh(m.SetScaling(RUN, 1, ("radiology",), moments_.mean, np.ones((1, N_RADIOLOGY))))
    # Scores that are zero outside one fold would give that fold's moments.
    with_folds = ("radiology", *PLAN.fold_fits("radiology"))
    marked = m.SetEncoders(RUN, 3, with_folds, np.eye(4, N_RADIOLOGY))
    assert fresh.code(marked) == "fold_too_small"


def test_networks_over_small_folds_are_refused() -> None:
    # A network has no inputs to count, so that only the patients of a fold decide.
    ask = Asker(networked_rows(150), NETWORKED)
    folds = NETWORKED.fold_fits("radiology")
    whole = m.AskUpdates(RUN, 1, ("radiology",), np.zeros((1, N_RADIOLOGY)), 0.0)
    assert isinstance(ask(whole), m.Updates)
    one = m.AskUpdates(RUN, 1, folds[:1], np.zeros((1, N_RADIOLOGY)), 0.0)
    assert ask.code(one) == "fold_too_small"
    marked = m.SetNetworks(RUN, 3, ("radiology", *folds), np.eye(4, N_RADIOLOGY))
    assert ask.code(marked) == "fold_too_small"


def test_a_site_below_its_minimum_gives_no_training_sum() -> None:
    ask = Asker(site_rows(40, 1, train=0.6))
    description = ask(m.Describe(RUN, PLAN.protocol, PLAN.modalities, True))
    assert isinstance(description, m.Description)
    assert not description.trains
    assert (description.n_train, description.n_train_events) == (0, 0)
    for arm in PLAN.arms:
        assert ask.code(m.AskMoments(RUN, 1, (arm,))) == "below_minimum_patients"
    found = ask(m.AskMoments(RUN, 1, tuple(SUMS)))
    assert isinstance(found, m.DesignMoments)
    assert not found.n.any()
    ones = np.ones((2 + N_ARMS, N_RADIOLOGY))
    ask(m.SetScaling(RUN, 2, (*SUMS, *PLAN.arms), ones, ones))
    sums = ask(ask_sums("radiology"))
    assert isinstance(sums, m.Sums)
    assert not sums.n_patients.any()
    assert not sums.information.any()
    assert ask.code(ask_sums(PROTOCOL)) == "below_minimum_patients"
    assert ask.code(m.AskEdges(RUN, 1, GRID)) == "below_minimum_patients"
    assert ask.code(ask.intervals()) == "below_minimum_patients"


def test_a_site_below_its_minimum_trains_no_network() -> None:
    rows = networked_rows(40)
    ask = Asker(rows, NETWORKED)
    reply = ask(m.AskUpdates(RUN, 1, ("radiology",), np.ones((1, N_RADIOLOGY)), 0.0))
    assert isinstance(reply, m.Updates)
    assert not reply.n_patients.any()
    assert not reply.weights.any()
    assert not reply.loss.any()


def test_a_modality_of_few_patients_is_absent_from_every_sum() -> None:
    rows = site_rows(300, 1)
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
    ask(m.SetScaling(RUN, 1, plan.arms, np.zeros((N_ARMS, 3)), np.ones((N_ARMS, 3))))
    sums = ask(ask_sums(PROTOCOL))
    assert isinstance(sums, m.Sums)
    assert not sums.information[0, :2].any()


def test_products_of_few_patients_stay_at_the_site() -> None:
    plan = replace(PLAN, components={"radiology": 2})
    rows = site_rows(300, 1)
    ask = Asker(rows, plan).study
    assert ask.designs.reduces("radiology")
    rows.tables["radiology"].train[55:] = np.nan
    few = Asker(rows, replace(plan, minimum=MinimumCounts(patients=20, patients_per_input=8)))
    description = few(m.Describe(RUN, plan.protocol, plan.modalities, True))
    assert isinstance(description, m.Description)
    assert description.contributes.all()
    assert not description.reduces.any()
    zero, one = np.zeros((1, N_RADIOLOGY)), np.ones((1, N_RADIOLOGY))
    few(m.SetScaling(RUN, 1, ("radiology",), zero, one))
    reply = few(m.AskProducts(RUN, 2, ("radiology",)))
    assert isinstance(reply, m.Products)
    assert not reply.products.any()
    assert not reply.n.any()


def test_a_flag_that_few_patients_raise_is_down() -> None:
    rows = site_rows(300, 1, absent=0.0)
    rows.local["pathology"].train[:3] = np.nan
    ask = Asker(rows).scaled()
    sums = ask(ask_sums(*PLAN.arms))
    assert isinstance(sums, m.Sums)
    assert not sums.information[:, 3:].any()
    rows.local["pathology"].train[:20] = np.nan
    assert Asker(rows).scaled()(ask_sums(PROTOCOL)).information[0, 3, 3] > 0  # type: ignore[union-attr]


def test_all_arms_stand_on_the_same_patients() -> None:
    rows = site_rows(300, 1)
    for column in rows.local.values():
        column.train[:30] = np.nan
    rows.tables["clinical"].train[:2] = np.nan  # two have nothing at all
    rows.tables["radiology"].train[:2] = np.nan
    ask = Asker(rows).scaled().gridded(GRID[-1])
    sums = ask(ask_sums(*PLAN.arms))
    description = ask(m.Describe(RUN, PLAN.protocol, PLAN.modalities, True))
    assert isinstance(sums, m.Sums)
    assert isinstance(description, m.Description)
    n = len(rows.train) - 2
    assert sums.n_patients.tolist() == [n] * N_ARMS
    assert description.n_train == n
    intervals = ask(ask.intervals())
    assert isinstance(intervals, m.Intervals)
    assert intervals.risk[:, 0].tolist() == [n] * N_ARMS


MALFORMED = {
    "design that is none": m.AskMoments(RUN, 1, ("radiology", "genome")),
    "fold as a design": m.AskMoments(RUN, 1, ("radiology/0",)),
    "design twice": m.AskMoments(RUN, 1, ("radiology", "radiology")),
    "scaling of no design": m.SetScaling(RUN, 1, ("genome",), np.ones((1, 3)), np.ones((1, 3))),
    "scaling too narrow": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 2)), np.ones((1, 2))),
    "scaling too wide": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 9)), np.ones((1, 9))),
    "scale of zero": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 3)), np.zeros((1, 3))),
    "scale below zero": m.SetScaling(RUN, 1, (PROTOCOL,), np.ones((1, 3)), -np.ones((1, 3))),
    "products without a PCA": m.AskProducts(RUN, 1, ("radiology",)),
    "components without a PCA": m.SetComponents(RUN, 1, ("radiology",), np.ones((1, 6, 2))),
    "fit that is none": ask_sums("genome"),
    "alias of an arm": ask_sums("protocol/0"),
    "fold beyond the last": ask_sums("radiology/3"),
    "fold below the first": ask_sums("radiology/-1"),
    "fold spelt otherwise": ask_sums("radiology/00"),
    "fold of a fold": ask_sums("radiology/0/1"),
    "fit twice": ask_sums("radiology", "radiology"),
    "strength beyond the last": ask_sums("radiology/try-1-0"),
    "group beyond the last": ask_sums("radiology/try-0-5"),
    "trial of an arm that is none": ask_sums("local_encoders/try-0-0"),
    "coefficients too few": ask_sums("radiology", width=2),
    "coefficients too many": ask_sums("radiology", width=500_000),
    "no coefficients": ask_sums("radiology", width=0),
    "slope before any evaluation": ask_sums(CALIBRATION_SLOPE, width=1),
    "encoder of an arm": m.SetEncoders(RUN, 1, (PROTOCOL,), np.ones((1, 6))),
    "encoder of one fold": m.SetEncoders(RUN, 1, ("radiology", "radiology/1"), np.ones((2, 6))),
    "encoder of folds only": m.SetEncoders(RUN, 1, PLAN.fold_fits("radiology"), np.ones((3, 6))),
    "update of no network": m.AskUpdates(RUN, 1, ("radiology",), np.ones((1, 6)), 0.0),
    "update of a linear model": m.AskUpdates(RUN, 1, (PROTOCOL,), np.ones((1, 6)), 0.0),
    "penalty below zero": m.AskUpdates(RUN, 1, ("radiology",), np.ones((1, 6)), -1.0),
    "no network": m.SetNetworks(RUN, 1, ("radiology",), np.ones((1, 6))),
    "gates of a linear model": m.SetNetworks(RUN, 1, (PROTOCOL,), np.ones((1, 6))),
    "edges off the grid": m.AskEdges(RUN, 1, np.array([181.0, 365.0, 730.0, 1095.0, 1825.0])),
    "fewer edges": m.AskEdges(RUN, 1, np.array([365.0, 1825.0])),
    "no edges": m.AskEdges(RUN, 1, np.zeros(0)),
    "grid unsorted": m.SetGrid(RUN, 1, GRID[::-1].copy()),
    "grid negative": m.SetGrid(RUN, 1, GRID - 1000),
    "grid of one's own": m.SetGrid(RUN, 1, np.array([180.0, 181.0, 1825.0])),
    "grid without the last": m.SetGrid(RUN, 1, GRID[:-1]),
    "an edge twice": m.SetGrid(RUN, 1, GRID[[0, 0, 4]]),
    "finer grid": m.SetGrid(RUN, 1, np.arange(1.0, 1826.0)),
    "grid of no edges": m.SetGrid(RUN, 1, np.zeros(0)),
    "a reply": m.Done(),
}
INTERVALS: dict[str, dict[str, Any]] = {
    "an arm twice": {"arms": (PROTOCOL,) * N_ARMS},
    "one arm": {"arms": (PROTOCOL,), "coefficients": np.ones((1, 6))},
    "an arm that is none": {"arms": (*PLAN.arms[:-1], "genome")},
    "arms in another order": {"arms": PLAN.arms[::-1]},
    "coefficients too few": {"coefficients": np.ones((N_ARMS, 5))},
}
EVALUATIONS: dict[str, dict[str, Any]] = INTERVALS | {
    "baseline below zero": {"baseline": -np.ones((N_ARMS, 5))},
    "baseline on another grid": {"baseline": np.ones((N_ARMS, 4))},
    "cut too many": {"groups": np.tile(np.arange(50.0), (N_ARMS, 1))},
    "cuts unsorted": {"groups": np.tile([0.5, -0.5], (N_ARMS, 1))},
    "coefficients that overflow": {"coefficients": np.full((N_ARMS, 6), 1e308)},
    "coefficients too few": {
        "coefficients": np.ones((N_ARMS, 5)),
        "between_site_variance": np.zeros(5),
    },
    "variance below zero": {"between_site_variance": np.full(6, -0.1)},
}


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker(site_rows(300, 1)).scaled()


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED.keys())
def test_requests_outside_the_plan_are_refused(asker: Asker, request_: m.Message) -> None:
    assert asker.code(request_) == "malformed_request"


def _arms_fitting(change: dict[str, Any]) -> dict[str, Any]:
    """The change, with as many rows elsewhere as it has arms."""
    n = len(change.get("arms", PLAN.arms))
    return {"baseline": np.full((n, 5), 1e-3), "groups": np.tile([-0.5, 0.5], (n, 1))} | change


@pytest.mark.parametrize("change", INTERVALS.values(), ids=INTERVALS.keys())
def test_intervals_outside_the_plan_are_refused(asker: Asker, change: dict[str, Any]) -> None:
    assert asker.code(asker.intervals(**change)) == "malformed_request"


@pytest.mark.parametrize("change", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_evaluations_outside_the_plan_are_refused(change: dict[str, Any]) -> None:
    ask = Asker(site_rows(300, 1)).scaled()
    assert ask.code(ask.evaluation(**_arms_fitting(change))) == "malformed_request"


@pytest.mark.parametrize(
    "axes",
    [np.zeros((6, 2)), np.eye(6, 2) * 2.0, np.eye(6)[:, [0, 0]], np.full((6, 2), 1e200)],
    ids=["zero", "long", "twice", "overflow"],
)
def test_axes_that_are_not_orthonormal_are_refused(axes: np.ndarray) -> None:
    ask = Asker(site_rows(300, 1), replace(PLAN, components={"radiology": 2}))
    assert ask.code(m.SetComponents(RUN, 1, ("radiology",), axes[None])) == "malformed_request"


def test_nothing_is_answered_before_scales_are_agreed() -> None:
    ask = Asker(site_rows(300, 1))
    assert ask.code(ask_sums("radiology")) == "malformed_request"
    assert ask.code(ask.evaluation()) == "malformed_request"
    assert ask.gridded(GRID[-1]).code(ask.intervals()) == "malformed_request"


SITE = SiteStudy(PLAN, site_rows(300, 1))
RICH = SiteStudy(replace(NETWORKED, **DETAILED, leave_one_site_out=True), networked_rows())


@settings(max_examples=150, deadline=None)
@given(request_=messages(), study=st.sampled_from([SITE, RICH]))
def test_whatever_is_asked_a_site_answers_with_a_message(
    request_: m.Message, study: SiteStudy
) -> None:
    if hasattr(request_, "run"):
        request_ = replace(request_, run=RUN)
    reply = m.decode(study.answer(m.encode(request_)))
    assert isinstance(reply, m.Refused | m.Done | m.DesignMoments | m.Description)


@settings(max_examples=100, deadline=None)
@given(payload=st.binary(max_size=300))
def test_noise_to_a_site_is_a_malformed_request(payload: bytes) -> None:
    assert m.decode(SITE.answer(payload)) == m.Refused("malformed_request")


def test_subtracting_intervals_or_models_is_refused() -> None:
    """Two grids, cut points or coefficient vectors differ by the few patients in between."""
    ask = Asker(site_rows(300, 1), EASY).scaled().gridded(*GRID[[1, 4]])
    assert ask.code(m.SetGrid(RUN, 4, GRID[[4]])) == "already_answered"
    assert ask.code(m.SetGrid(RUN, 4, GRID[[2, 4]])) == "malformed_request"
    assert ask(m.SetGrid(RUN, 12, GRID[[1, 4]])) == m.Done()  # a network may ask again
    once = ask.intervals()
    first = ask(once)
    assert isinstance(first, m.Intervals)
    assert first.events.shape == (N_ARMS, 2)
    assert isinstance(ask(replace(once, round=12)), m.Intervals)
    moved = replace(once, coefficients=once.coefficients + 1e-9)
    assert ask.code(moved) == "already_answered"
    evaluation = ask.evaluation()
    assert isinstance(ask(evaluation), m.Evaluation)
    assert isinstance(ask(replace(evaluation, round=13)), m.Evaluation)
    for change in (
        {"groups": evaluation.groups + 1e-3},
        {"baseline": evaluation.baseline * 1.001},
        {"between_site_variance": evaluation.between_site_variance + 1.0},
    ):
        assert ask.code(replace(evaluation, **change)) == "already_answered"
    again = m.SetScaling(RUN, 3, (PROTOCOL,), np.ones((1, 3)), np.ones((1, 3)))
    assert ask.code(again) == "already_answered"
    encoders = m.SetEncoders(RUN, 3, tuple(SUMS), np.full((2, N_RADIOLOGY), 0.3))
    assert ask.code(encoders) == "already_answered"


def test_axes_are_set_once() -> None:
    plan = replace(PLAN, components={"radiology": 2})
    ask = Asker(site_rows(300, 1), plan)
    ask(m.SetScaling(RUN, 1, ("radiology",), np.zeros((1, 6)), np.ones((1, 6))))
    axes = np.eye(6, 2)[None]
    assert ask(m.SetComponents(RUN, 1, ("radiology",), axes)) == m.Done()
    assert isinstance(ask(ask_sums("radiology", width=2)), m.Sums)
    assert ask(m.SetComponents(RUN, 2, ("radiology",), axes)) == m.Done()
    assert ask.code(m.SetComponents(RUN, 2, ("radiology",), axes[:, ::-1])) == "already_answered"


def test_a_site_gives_a_fit_no_more_sums_than_newton_needs() -> None:
    ask = Asker(site_rows(300, 1)).scaled()
    for k in range(MAX_SUMS_PER_FIT):
        assert isinstance(ask(ask_sums("clinical", width=4, value=k / 99)), m.Sums)
    assert ask.code(ask_sums("clinical", width=4, value=0.7)) == "rounds_spent"
    assert ask.code(ask_sums("clinical", "radiology")) == "rounds_spent"
    assert isinstance(ask(ask_sums("radiology")), m.Sums)


def test_a_site_trains_a_network_no_longer_than_the_plan_says() -> None:
    ask = Asker(networked_rows(), NETWORKED)
    for k in range(NETWORKED.networks["radiology"].rounds + 10):
        request = m.AskUpdates(RUN, 1, ("radiology",), np.full((1, N_RADIOLOGY), k / 99), 0.0)
        assert isinstance(ask(request), m.Updates)
    assert ask.code(request) == "rounds_spent"


def test_an_update_is_what_gradient_steps_give() -> None:
    rows = networked_rows()
    network = rows.networks["radiology"]
    start = np.linspace(-0.1, 0.1, N_RADIOLOGY)
    reply = Asker(rows, NETWORKED)(m.AskUpdates(RUN, 1, ("radiology",), start[None], 0.0))
    assert isinstance(reply, m.Updates)
    present = np.flatnonzero(network.present[: len(rows.train)])
    expected, losses = start, []
    for _ in range(2):
        loss, gradient = network.loss_gradient(expected, present)
        losses.append(loss)
        expected = expected - 0.1 * gradient
    assert_allclose(reply.weights[0], expected, rtol=1e-12)
    assert reply.loss[0] == losses[0]
    assert reply.n_patients[0] == len(present)
    assert reply.n_events[0] == rows.train.event[present].sum()


def test_networks_are_set_once() -> None:
    ask = Asker(networked_rows(), NETWORKED)
    once = m.SetNetworks(RUN, 1, ("radiology",), np.ones((1, N_RADIOLOGY)))
    assert ask(once) == m.Done()
    assert ask(replace(once, round=7)) == m.Done()
    assert ask.code(replace(once, weights=once.weights * 1.1)) == "already_answered"


@pytest.mark.parametrize("size", [1e307, 1.7e308])
def test_weights_that_are_not_finite_do_not_leave(size: float) -> None:
    ask = Asker(networked_rows(), NETWORKED)
    request = m.AskUpdates(RUN, 1, ("radiology",), np.full((1, N_RADIOLOGY), size), 0.0)
    assert isinstance(ask(request), m.Refused)


@pytest.mark.parametrize("size", [1e2, 1e5, 1e300, 1.7e308])
def test_coefficients_that_single_out_a_patient_get_nothing(size: float) -> None:
    ask = Asker(site_rows(300, 1)).scaled().gridded(GRID[-1])
    reply = ask(ask_sums("radiology", PROTOCOL, value=size))
    assert isinstance(reply, m.Sums)
    assert (reply.log_likelihood <= -1e11).all()
    assert not reply.gradient.any()
    assert not reply.information.any()
    singled = ask.intervals(coefficients=np.full((N_ARMS, 6), size))
    assert ask.code(singled) == "small_cell"


def _dying_late(n: int, seed: int) -> SiteRows:
    rows = site_rows(n, seed)
    rows.train.time[rows.train.event & (rows.train.time <= 180)] += 180  # nobody dies early
    return rows


def test_a_grid_with_a_small_cell_is_refused() -> None:
    rows = _dying_late(100, 1)
    ask = Asker(rows).scaled()
    edges = ask(m.AskEdges(RUN, 8, GRID))
    assert isinstance(edges, m.Edges)
    assert not edges.releasable[0]
    assert ask.code(m.SetGrid(RUN, 8, GRID)) == "small_cell"
    released = Asker(rows).scaled().gridded()(ask.intervals())
    assert isinstance(released, m.Intervals)
    assert released.events.shape[1] < len(GRID)
    assert released.events.min() >= PLAN.minimum.cell
    late = replace(rows, train=Outcome(rows.train.event, rows.train.time + 5000))
    assert Asker(late).scaled().code(m.SetGrid(RUN, 8, GRID[-1:])) == "small_cell"


def test_no_interval_leaves_before_a_grid_is_agreed() -> None:
    """The protocol's grid may hold small cells; nobody may pass over the agreement on it."""
    ask = Asker(_dying_late(100, 1)).scaled()
    assert ask.code(ask.intervals()) == "malformed_request"
    assert ask.code(m.SetGrid(RUN, 8, GRID)) == "small_cell"
    assert ask.code(ask.intervals()) == "malformed_request"
    discrete = Asker(_dying_late(200, 1), DISCRETE).scaled()
    assert discrete.code(ask_sums(PROTOCOL, width=11)) == "malformed_request"
    sums = discrete.gridded()(ask_sums(PROTOCOL, width=6 + len(discrete.study.plan.edges_days)))
    assert isinstance(sums, m.Sums)


def test_few_test_events_give_no_evaluation() -> None:
    rows = site_rows(300, 1)
    rows.test.event[:] = False
    rows.test.event[: PLAN.minimum.test_events - 1] = True
    ask = Asker(rows).scaled()
    description = ask(m.Describe(RUN, PLAN.protocol, PLAN.modalities, True))
    assert isinstance(description, m.Description)
    assert (description.n_test, description.n_test_events) == (0, 0)
    assert ask.code(ask.evaluation()) == "below_minimum_events"
    assert ask.code(ask_sums(CALIBRATION_SLOPE, width=1)) == "malformed_request"


@pytest.mark.parametrize("alpha", [50.0, 60.0])
def test_log_odds_that_single_out_a_patient_get_nothing(alpha: float) -> None:
    """Where all but one are sure to die within an interval, one is left in the information."""
    rows = site_rows(300, 1, absent=0.0)
    column = rows.local["pathology"].train
    column[0] = column.min() - 8.0
    rows.train.event[0] = True
    ask = Asker(rows, replace(DISCRETE, minimum=EASY.minimum)).scaled().gridded(GRID[-1])
    at = np.array([[alpha, 6.0, 0, 0, 0, 0, 0]])
    reply = ask(m.AskSums(RUN, 5, (PROTOCOL,), at))
    assert isinstance(reply, m.Sums)
    information = reply.information[0, :2, :2]
    if information.any():
        mean = information[0, 1] / information[0, 0]
        assert information[1, 1] / information[0, 0] - mean**2 > 0.01


def test_local_encoders_stay_out_of_the_protocols_arm() -> None:
    rows = site_rows(300, 1)
    ask = Asker(rows).scaled()
    columns = ask.study.columns(PROTOCOL).train
    assert_allclose(columns[:, 0], rows.local["pathology"].train)
    own = ask.study.columns(LOCAL_ENCODERS).train
    assert_allclose(own[:, 1], rows.local["radiology"].train)
    assert not np.allclose(columns[:, 2], own[:, 2])
