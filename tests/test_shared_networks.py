"""Networks shared by averaging weights: flat weights, the loss and its gradient, the hazard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.encoder_spec import EncoderSpec
from fusion.shared_networks import SharedLoss, initial_weights, n_weights, shared_log_hazard
from fusion.survival import cox_sums, fit_cox
from modalities.cohort import DataError
from tests.simulated import simulate_survival

MODELS = ["linear", "mlp", "gated_attention", "mean_pooling"]
K = 4


def _spec(model: str, **fields: object) -> EncoderSpec:
    return EncoderSpec(
        model=model, sharing="weights", hidden=3, weight_decay=0.5, ridge=0.2, **fields
    )


def _rows(model: str, n: int = 30, seed: int = 0) -> tuple[object, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if model in ("gated_attention", "mean_pooling"):
        inputs: object = [rng.normal(size=(rng.integers(1, 6), K)) for _ in range(n)]
    else:
        inputs = rng.normal(size=(n, K))
    event, time = simulate_survival(rng.normal(size=n), rng, round_days=100.0)
    event[0] = True
    return inputs, event, time


def _weights(spec: EncoderSpec, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n_weights(spec, K))


def _reference_loss(
    spec: EncoderSpec, weights: np.ndarray, rows: tuple[object, np.ndarray, np.ndarray]
) -> float:
    inputs, event, time = rows
    hazard = shared_log_hazard(spec, weights, inputs)
    log_likelihood = cox_sums(hazard[:, None], event, time, [1.0]).log_likelihood
    squares = (weights[:K] ** 2).sum() + spec.weight_decay * (weights[K:] ** 2).sum()
    return float((-log_likelihood + 0.5 * len(event) * spec.default_ridge * squares) / event.sum())


@pytest.mark.parametrize("model", MODELS)
def test_gradient_equals_finite_differences(model: str) -> None:
    spec, rows = _spec(model), _rows(model)
    weights = _weights(spec)
    loss, gradient = SharedLoss(spec, *rows)(weights)
    np.testing.assert_allclose(loss, _reference_loss(spec, weights, rows), rtol=1e-6)
    step = 1e-5
    for at in range(len(weights)):
        move = np.zeros_like(weights)
        move[at] = step
        slope = _reference_loss(spec, weights + move, rows) - _reference_loss(
            spec, weights - move, rows
        )
        np.testing.assert_allclose(gradient[at], slope / (2 * step), atol=2e-6)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("linear", K),
        ("mean_pooling", K),
        ("mlp", K + 3 * K + 3 + 3 + 1),
        ("gated_attention", K + 2 * (3 * K + 3) + 3 + 1),
    ],
)
def test_flat_weights_have_a_known_length_and_come_from_their_seed(
    model: str, expected: int
) -> None:
    spec = _spec(model)
    first = initial_weights(spec, K, seed=4)
    assert n_weights(spec, K) == expected
    assert (first.shape, first.dtype) == ((expected,), np.dtype(np.float64))
    np.testing.assert_array_equal(first, initial_weights(spec, K, seed=4))
    assert expected == K or not np.array_equal(first, initial_weights(spec, K, seed=5))
    np.testing.assert_array_equal(first[:K], np.zeros(K))


def test_mlp_weights_lie_in_the_documented_order() -> None:
    spec, (inputs, _, _) = _spec("mlp"), _rows("mlp")
    weights = _weights(spec)
    head, hidden, bias, out, shift = np.split(weights, np.cumsum([K, 3 * K, 3, 3]))
    expected = inputs @ head + np.tanh(inputs @ hidden.reshape(3, K).T + bias) @ out + shift
    np.testing.assert_allclose(shared_log_hazard(spec, weights, inputs), expected, atol=1e-12)


def test_attention_weights_lie_in_the_documented_order() -> None:
    spec, (bags, _, _) = _spec("gated_attention"), _rows("gated_attention")
    weights = _weights(spec)
    head, signal, signal_bias, gate, gate_bias, out, _ = np.split(
        weights, np.cumsum([K, 3 * K, 3, 3 * K, 3, 3])
    )
    expected = []
    for bag in bags:
        units = np.tanh(bag @ signal.reshape(3, K).T + signal_bias)
        units /= 1 + np.exp(-(bag @ gate.reshape(3, K).T + gate_bias))
        share = np.exp(units @ out)
        expected.append(share @ bag @ head / share.sum())
    np.testing.assert_allclose(shared_log_hazard(spec, weights, bags), expected, atol=1e-12)


@pytest.mark.parametrize("model", MODELS)
def test_start_from_given_linear_weights_is_that_linear_model(model: str) -> None:
    spec, (inputs, _, _) = _spec(model), _rows(model)
    head = np.arange(1.0, K + 1)
    found = shared_log_hazard(spec, initial_weights(spec, K, seed=1, head=head), inputs)
    means = inputs if isinstance(inputs, np.ndarray) else np.stack([b.mean(0) for b in inputs])
    np.testing.assert_allclose(found, means @ head, atol=1e-12)


@given(seed=st.integers(0, 500), strength=st.floats(0.01, 2.0))
@settings(max_examples=15, deadline=None)
def test_linear_loss_has_the_newton_estimate_as_its_minimum(seed: int, strength: float) -> None:
    inputs, event, time = _rows("linear", seed=seed)
    newton = fit_cox(inputs, event, time, ridge=strength).candidate
    _, gradient = SharedLoss(_spec("linear"), inputs, event, time, ridge=strength)(newton)
    np.testing.assert_allclose(gradient, np.zeros(K), atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_losses_of_sites_averaged_by_events_are_the_stratified_loss_of_all_rows(
    model: str,
) -> None:
    spec = _spec(model)
    sites = [_rows(model, n, seed) for n, seed in ((25, 1), (40, 2), (30, 3))]
    losses = [SharedLoss(spec, *rows) for rows in sites]
    weights = _weights(spec)
    shares = np.array([loss.n_events for loss in losses], dtype=float)
    shares /= shares.sum()
    averaged = sum(share * loss(weights)[1] for share, loss in zip(shares, losses, strict=True))
    inputs = [patient for rows in sites for patient in rows[0]]
    pooled = SharedLoss(
        spec,
        np.array(inputs) if model in ("linear", "mlp") else inputs,
        np.concatenate([rows[1] for rows in sites]),
        np.concatenate([rows[2] for rows in sites]),
        strata=np.repeat([0, 1, 2], [25, 40, 30]),
    )
    np.testing.assert_allclose(averaged, pooled(weights)[1], atol=1e-6)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_missing_cells_count_as_the_mean(model: str) -> None:
    spec, (inputs, event, time) = _spec(model), _rows(model)
    holes, filled = inputs.copy(), inputs.copy()
    holes[::3, 1], filled[::3, 1] = np.nan, 0.0
    weights = _weights(spec)
    np.testing.assert_array_equal(
        shared_log_hazard(spec, weights, holes), shared_log_hazard(spec, weights, filled)
    )
    one, other = (SharedLoss(spec, x, event, time)(weights) for x in (holes, filled))
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1], other[1])


@pytest.mark.parametrize("model", MODELS)
def test_each_patient_is_scored_alone(model: str) -> None:
    spec, (inputs, _, _) = _spec(model), _rows(model)
    weights = _weights(spec)
    together = shared_log_hazard(spec, weights, inputs)
    alone = [shared_log_hazard(spec, weights, inputs[at : at + 1])[0] for at in range(6)]
    np.testing.assert_allclose(alone, together[:6], atol=1e-12)


def test_long_bags_are_thinned_in_the_loss_only() -> None:
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(9, K)) for _ in range(20)]
    _, event, time = _rows("gated_attention", 20)
    spec = _spec("gated_attention", max_tiles=3)
    weights = _weights(spec)
    thin = [bag[[0, 4, 8]] for bag in bags]
    assert SharedLoss(spec, bags, event, time)(weights)[0] == pytest.approx(
        SharedLoss(spec, thin, event, time)(weights)[0], rel=1e-12
    )
    assert not np.allclose(
        shared_log_hazard(spec, weights, bags), shared_log_hazard(spec, weights, thin)
    )


@pytest.mark.parametrize("n_events", [0, 1])
def test_a_loss_needs_an_event(n_events: int) -> None:
    inputs, _, time = _rows("linear")
    event = np.arange(30) < n_events
    if n_events == 0:
        with pytest.raises(ValueError, match="events: found none"):
            SharedLoss(_spec("linear"), inputs, event, time)
    else:
        loss, gradient = SharedLoss(_spec("linear"), inputs, event, time)(np.zeros(K))
        assert np.isfinite([loss, *gradient]).all()


def test_weights_and_inputs_that_disagree_are_refused() -> None:
    spec, (inputs, event, time) = _spec("mlp"), _rows("mlp")
    loss = SharedLoss(spec, inputs, event, time)
    with pytest.raises(ValueError, match=r"weights: found shape \(4,\), needed \(23,\)"):
        loss(np.zeros(4))
    with pytest.raises(ValueError, match="weights: found a value that is not finite"):
        loss(np.full(23, np.nan))
    with pytest.raises(ValueError, match="weights: found shape"):
        shared_log_hazard(spec, np.zeros(23), inputs[:, :3])
    with pytest.raises(ValueError, match="head: found shape"):
        initial_weights(spec, K, seed=0, head=[1.0])
    with pytest.raises(ValueError, match="found 29 patients, needed 30"):
        SharedLoss(spec, inputs[:29], event, time)
    with pytest.raises(DataError):
        SharedLoss(_spec("gated_attention"), inputs, event, time)


def test_steps_downhill_learn_what_no_linear_model_can() -> None:
    rng = np.random.default_rng(9)
    table = rng.normal(size=(400, 3))
    event, time = simulate_survival(1.5 * np.abs(table[:, 0]), rng)
    spec = EncoderSpec(model="mlp", sharing="weights", ridge=0.1)
    loss = SharedLoss(spec, table, event, time)
    weights = initial_weights(spec, 3, seed=0)
    first, _ = loss(weights)
    for _ in range(150):
        weights = weights - 0.5 * loss(weights)[1]
    assert loss(weights)[0] < first - 0.1
    hazard = shared_log_hazard(spec, weights, table)
    assert np.corrcoef(hazard, np.abs(table[:, 0]))[0, 1] > 0.8
