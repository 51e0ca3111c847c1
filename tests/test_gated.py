"""The gated fusion network: its start, its derivatives, and what it is able to learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from numpy.testing import assert_allclose, assert_array_equal

from fusion.late import (
    CoxFusion,
    GatedFusion,
    GatedModel,
    fusion_inputs,
    gated_log_hazard,
    gated_loss_gradient,
    initial_gated_weights,
    n_gated_weights,
    survival_outcome,
)
from fusion.late.gated import gates, unpack
from fusion.survival import cox_sums, fit_cox, interval_sums
from tests.strategies import Survival, survival

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MODALITIES = ("pathology", "radiology", "clinical")
EDGES = (365.0, 1095.0, 2500.0)


def _design(n: int = 150, seed: int = 0) -> Floats:
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(n, 3))
    columns[rng.random((n, 3)) < 0.25] = np.nan
    return fusion_inputs(columns, np.zeros(3), np.ones(3))


def _outcome(x: Floats, seed: int = 1) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    died, lost = rng.exponential(900 * np.exp(-x[:, 0])), rng.uniform(200, 2500, len(x))
    return died <= lost, np.ceil(np.minimum(died, lost) / 20)


def _weights(hidden: int, seed: int = 2) -> Floats:
    rng = np.random.default_rng(seed)
    start = initial_gated_weights(rng.normal(size=6), hidden=hidden, seed=seed)
    return start + 0.4 * rng.normal(size=len(start))


def _interaction(n: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Columns of which the first speaks only where the second is high, and their outcome."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(n, 3))
    log_hazard = 1.5 * columns[:, 0] * (columns[:, 1] > 0) + 0.4 * columns[:, 2]
    died, lost = rng.exponential(900 * np.exp(-log_hazard)), rng.uniform(200, 2500, n)
    return columns, died <= lost, np.ceil(np.minimum(died, lost))


@pytest.mark.parametrize("hidden", [1, 4, 7])
def test_it_starts_as_the_linear_model_bit_by_bit(hidden: int) -> None:
    x, coefficients = _design(), np.random.default_rng(3).normal(size=6)
    start = initial_gated_weights(coefficients, hidden=hidden)
    assert len(start) == n_gated_weights(3, hidden)
    assert_array_equal(gates(start, x, hidden), 1.0)
    linear = x[:, :3] @ coefficients[:3] + x[:, 3:] @ coefficients[3:]
    assert_array_equal(gated_log_hazard(start, x, hidden), linear)


def test_at_the_start_its_loss_and_gradient_are_the_linear_models() -> None:
    x = _design()
    event, time = _outcome(x)
    fit = fit_cox(x, event, time, ridge=0.03)
    start = initial_gated_weights(fit.candidate, hidden=4)
    loss, gradient = gated_loss_gradient(start, x, event, time, hidden=4, ridge=0.03, decay=0.0)
    assert_allclose(loss, -fit.objective * len(event) / event.sum(), rtol=1e-12)
    # The linear part is at its optimum; what is left to gain lies in the gates.
    assert_allclose(gradient[:6], 0.0, atol=1e-9)
    assert np.abs(unpack(gradient, 3, 4).w2).max() > 1e-4
    assert_array_equal(unpack(gradient, 3, 4).w1, 0.0)


def test_the_parts_are_views_of_the_flat_vector_in_order() -> None:
    flat = np.arange(float(n_gated_weights(2, 3)))
    parts = unpack(flat, 2, 3)
    shapes = [(2,), (2,), (3, 4), (3,), (2, 3), (2,)]
    assert [part.shape for part in parts] == shapes
    assert_array_equal(np.concatenate([part.ravel() for part in parts]), flat)
    parts.b2[:] = -1.0
    assert_array_equal(flat[-2:], -1.0)


def test_a_gate_of_a_hand_worked_patient() -> None:
    # One modality, one hidden unit: tanh(0.5 x 2 + 0) and a gate of 2 sigma(3 tanh(1) - 1).
    flat = np.array([0.8, 0.3, 0.5, 0.0, 0.0, 3.0, -1.0])
    gate = 2 / (1 + np.exp(1 - 3 * np.tanh(1.0)))
    x = np.array([[2.0, 0.0], [0.0, 1.0]])
    assert_allclose(gates(flat, x, 1)[0], gate)
    assert_allclose(gated_log_hazard(flat, x, 1), [gate * 0.8 * 2.0, 0.3])


@pytest.mark.parametrize("hidden", [1, 4])
def test_the_gradient_is_that_of_torchs_own_network_and_torchsurvs_loss(hidden: int) -> None:
    import torch

    from fusion.cox_loss import cox_loss, outcome, training_mode

    x = _design()
    event, time = _outcome(x)
    assert len(np.unique(time[event])) < event.sum()
    flat = _weights(hidden)
    found = gated_loss_gradient(flat, x, event, time, hidden=hidden, ridge=0.1, decay=0.2)
    with training_mode():
        weights = torch.tensor(flat, requires_grad=True)
        sizes = [3, 3, hidden * 6, hidden, 3 * hidden, 3]
        beta, delta, w1, b1, w2, b2 = torch.split(weights, sizes)
        inputs = torch.from_numpy(x)
        units = torch.tanh(inputs @ w1.reshape(hidden, 6).T + b1)
        gate = 2 * torch.sigmoid(units @ w2.reshape(3, hidden).T + b2)
        log_hazard = (gate * inputs[:, :3]) @ beta + inputs[:, 3:] @ delta
        penalty = 0.1 * weights[:6].square().sum() + 0.2 * weights[6:].square().sum()
        loss = (cox_loss(log_hazard, outcome(event, time)) + penalty / 2) * len(x) / event.sum()
        loss.backward()
    # torchsurv sums in float32.
    assert_allclose(found[0], loss.item(), rtol=1e-6)
    assert_allclose(found[1], weights.grad.numpy(), atol=2e-6)


@settings(max_examples=25, deadline=None)
@given(rows=survival(n_inputs=4))
def test_the_gradient_is_the_slope_of_the_loss(rows: Survival) -> None:
    flat = np.random.default_rng(0).normal(size=n_gated_weights(2, 2))

    def loss(w: Floats) -> float:
        return gated_loss_gradient(w, rows.inputs, rows.event, rows.time, hidden=2, ridge=0.1)[0]

    steps = 1e-5 * np.eye(len(flat))
    slope = [(loss(flat + step) - loss(flat - step)) / 2e-5 for step in steps]
    found = gated_loss_gradient(flat, rows.inputs, rows.event, rows.time, hidden=2, ridge=0.1)
    assert_allclose(found[1], slope, atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(rows=survival(n_inputs=4))
def test_the_order_of_patients_does_not_matter(rows: Survival) -> None:
    flat = np.random.default_rng(0).normal(size=n_gated_weights(2, 3))
    order = np.random.default_rng(1).permutation(len(rows.time))
    one = gated_loss_gradient(flat, rows.inputs, rows.event, rows.time, hidden=3)
    other = gated_loss_gradient(
        flat, rows.inputs[order], rows.event[order], rows.time[order], hidden=3
    )
    assert_allclose(one[0], other[0], rtol=1e-12)
    assert_allclose(one[1], other[1], atol=1e-10)


def test_weights_that_overflow_have_no_finite_loss() -> None:
    x = _design()
    event, time = _outcome(x)
    flat = np.full(n_gated_weights(3, 2), 1e308)
    loss, gradient = gated_loss_gradient(flat, x, event, time, hidden=2)
    assert np.isnan(loss)
    assert np.isnan(gradient).all()


def test_weights_and_inputs_that_do_not_fit_are_refused() -> None:
    x = _design()
    event, time = _outcome(x)
    with pytest.raises(ValueError, match=r"found shape \(5,\), needed \(49,\) for 3 modalities"):
        gated_log_hazard(np.zeros(5), x, 4)
    with pytest.raises(ValueError, match="fusion inputs: found 5"):
        gated_log_hazard(np.zeros(49), x[:, :5], 4)
    with pytest.raises(ValueError, match="gated fusion: found no events"):
        gated_loss_gradient(np.zeros(49), x, np.zeros_like(event), time, hidden=4)


def test_under_a_strong_decay_it_stays_the_linear_model() -> None:
    columns, event, time = _interaction(300, 0)
    y = survival_outcome(event, time)
    linear = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.02).fit(columns, y)
    gated = GatedFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.02, decay=100.0)
    gated.fit(columns, y)
    assert_allclose(gated.predict(columns), linear.predict(columns), atol=1e-4)
    assert_array_equal(gated.model_.coefficients, linear.model_.coefficients)
    times = [100.0, 1000.0, 3000.0]
    assert_allclose(
        gated.predict_survival_function(columns, times),
        linear.predict_survival_function(columns, times),
        atol=1e-4,
    )


def test_it_learns_whom_a_modality_speaks_for() -> None:
    columns, event, time = _interaction(600, 1)
    new, new_event, new_time = _interaction(1500, 2)
    y = survival_outcome(event, time)
    linear = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.02).fit(columns, y)
    gated = GatedFusion(
        modalities=MODALITIES, edges_days=EDGES, ridge=0.02, decay=(0.003, 0.01, 0.1)
    ).fit(columns, y)

    def held_out(log_hazard: Floats) -> float:
        found = cox_sums(log_hazard[:, None], new_event, new_time, np.ones(1))
        return found.log_likelihood / found.n_events

    assert gated.decay_ < 0.1
    assert held_out(gated.predict(new)) > held_out(linear.predict(new)) + 0.05
    x = fusion_inputs(new, gated.model_.mean, gated.model_.scale)
    first = gates(gated.model_.weights, x, gated.hidden)[:, 0]
    assert first[new[:, 1] > 1].mean() > 1.5 * first[new[:, 1] < -1].mean()


def test_training_lowers_the_loss_and_its_baseline_explains_the_events() -> None:
    columns, event, time = _interaction(300, 3)
    strata = np.arange(300) % 3
    gated = GatedFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.02, decay=0.01, hidden=3)
    model = gated.fit(columns, survival_outcome(event, time), strata=strata).model_
    x = fusion_inputs(columns, model.mean, model.scale)

    def loss(weights: Floats) -> float:
        parts = [
            (event[strata == s].sum() / event.sum())
            * gated_loss_gradient(
                weights, x[strata == s], event[strata == s], time[strata == s],
                hidden=3, ridge=0.02, decay=0.01,
            )[0]
            for s in range(3)
        ]  # fmt: skip
        return float(sum(parts))

    assert loss(model.weights) < loss(initial_gated_weights(model.coefficients, hidden=3)) - 0.01
    events, exposure = interval_sums(model.predict(columns), event, time, EDGES)
    assert_allclose(model.hazard_per_day * exposure, events)


def test_a_gated_model_of_untrained_gates_predicts_as_its_cox_model() -> None:
    columns, event, time = _interaction(100, 4)
    columns[::7, 1] = np.nan
    linear = CoxFusion(modalities=MODALITIES, edges_days=EDGES, ridge=0.02)
    cox = linear.fit(columns, survival_outcome(event, time)).model_
    gated = GatedModel(
        cox.modalities, cox.mean, cox.scale, cox.coefficients, cox.covariance, cox.edges_days,
        cox.hazard_per_day, initial_gated_weights(cox.coefficients, hidden=2), 2,
    )  # fmt: skip
    assert_allclose(gated.predict(columns), cox.predict(columns), atol=1e-14)
    assert_allclose(gated.contributions(columns), cox.contributions(columns), atol=1e-14)
    assert_allclose(
        gated.predict_standard_error(columns), cox.predict_standard_error(columns), rtol=1e-12
    )
