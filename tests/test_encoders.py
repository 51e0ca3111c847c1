"""Encoders: preparation, networks, scoring and the bytes they are kept as."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fusion.encoder_inputs import as_table, evenly, pool_bags, take
from fusion.encoder_spec import EncoderSpec, random_projection
from fusion.encoders import FittedEncoder, prepare, standardisation, tile_components
from fusion.networks import GatedAttention, pad_bags, reproducible_torch
from fusion.survival import moments
from fusion.training import fit_encoder
from modalities.cohort import DataError

N_PATIENTS = 40


def test_what_is_slow_to_import_waits_until_it_is_needed() -> None:
    code = """
import sys
import fusion.encoder_inputs, fusion.encoder_spec
print(*{"torch"} & set(sys.modules))
import fusion.training
print(*{"torchsurv", "torchmetrics", "torchvision"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def _outcome(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return rng.random(N_PATIENTS) < 0.6, np.ceil(rng.exponential(500, N_PATIENTS))


def _bags(rng: np.random.Generator, dim: int = 24) -> list[np.ndarray]:
    sizes = rng.integers(1, 7, N_PATIENTS)
    return [rng.normal(1.0, 2.0, (size, dim)).astype(np.float32) for size in sizes]


def _fitted(model: str, *, seed: int = 3) -> tuple[FittedEncoder, object]:
    rng = np.random.default_rng(seed)
    event, time = _outcome(rng)
    inputs: object = rng.normal(size=(N_PATIENTS, 6))
    linear = model in ("linear", "mean_pooling")
    if model in ("gated_attention", "mean_pooling"):
        inputs = _bags(rng)
    spec = EncoderSpec(
        model=model, n_components=5, max_steps=10, patience=10, ensemble=1 if linear else 2
    )
    return fit_encoder(inputs, event, time, spec, seed=seed), inputs


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "forest"},
        {"inputs": ("age", "age")},
        {"ridge": -1.0},
        {"ridge": True},
        {"ridge": ()},
        {"ridge": (0.3, 0.1)},
        {"ridge": (0.1, 0.1)},
        {"ridge": (0.1, 101.0)},
        {"l1_ratio": 1.1},
        {"l1_ratio": 0.5, "model": "mlp"},
        {"l1_ratio": 0.5, "sharing": "weights"},
        {"ensemble": 2},
        {"ensemble": 2, "model": "mlp", "sharing": "weights"},
        {"ensemble": 21, "model": "mlp"},
        {"components": 4},
        {"components": 17, "sharing": "sums"},
        {"averaging": "median"},
        {"rounds": 0},
        {"time_budget_s": 0.0},
        {"ridge": float("nan")},
        {"dropout": 1.0},
        {"min_events": 0},
        {"learning_rate": 0.0},
        {"epochs": 3},
    ],
)
def test_spec_refuses_what_cannot_be_trained(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EncoderSpec(**fields)


@pytest.mark.parametrize("ridge", [0.3, [0.3], 1, [0.1, 0.3, 2]])
def test_one_ridge_or_several_are_a_tuple(ridge: object) -> None:
    spec = EncoderSpec(ridge=ridge)
    assert spec.ridge == tuple(float(x) for x in np.atleast_1d(ridge))
    assert EncoderSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.default_ridge == spec.ridge[len(spec.ridge) // 2]


def test_every_field_of_the_spec_is_described() -> None:
    assert all(field.description for field in EncoderSpec.model_fields.values())


@given(st.integers(1, 40), st.data())
@settings(max_examples=25, deadline=None)
def test_random_projection_is_orthonormal_and_drawn_from_its_seed(
    p: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, p))
    seed = data.draw(st.integers(0, 2**31))
    first = random_projection(p, k, seed)
    np.testing.assert_allclose(first.T @ first, np.eye(k), atol=1e-12)
    np.testing.assert_array_equal(first, random_projection(p, k, seed))
    assert not np.allclose(np.abs(first), np.abs(random_projection(p, k, seed + 1))) or p == 1


@pytest.mark.parametrize("k", [0, 5])
def test_random_projection_refuses_more_outputs_than_inputs(k: int) -> None:
    with pytest.raises(ValueError, match="needed between 1 and 4"):
        random_projection(4, k, 0)


def test_table_is_standardised_by_present_cells_and_missing_ones_become_the_mean() -> None:
    table = np.array([[1.0, 5.0, np.nan], [3.0, 5.0, np.nan], [np.nan, 5.0, np.nan]])
    prepared = prepare(table, EncoderSpec())(np.array([[3.0, 9.0, 1.0], [np.nan, 5.0, np.nan]]))
    # Mean 2, standard deviation sqrt(2); a column that never varied says nothing, whatever comes.
    np.testing.assert_allclose(prepared.numpy(), [[1 / np.sqrt(2), 0, 0], [0, 0, 0]])


def test_summed_moments_of_two_sites_prepare_as_pooled_rows_do() -> None:
    table = np.random.default_rng(1).normal(3.0, 2.0, (40, 5))
    table[::7, 2] = np.nan
    summed = standardisation(moments(table[:15]) + moments(table[15:]))
    pooled = prepare(table, EncoderSpec())
    np.testing.assert_allclose(summed(table).numpy(), pooled(table).numpy(), atol=1e-12)


@pytest.mark.parametrize("n_patients", [4, 60], ids=["fewer tiles than dim", "more tiles than dim"])
def test_tile_components_match_the_singular_vectors(n_patients: int) -> None:
    rng = np.random.default_rng(2)
    bags = [rng.normal(size=(5, 30)) * np.linspace(1, 4, 30) for _ in range(n_patients)]
    tiles = np.concatenate(bags)
    centred = tiles - tiles.mean(axis=0)
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    expected = np.abs(centred @ axes[:3].T) / singular[:3] * np.sqrt(len(tiles))
    found = tile_components(bags, EncoderSpec(model="mean_pooling", n_components=3))(tiles)
    np.testing.assert_allclose(np.abs(found.numpy()), expected, atol=1e-6)
    np.testing.assert_allclose(found.numpy().std(axis=0), 1.0, atol=1e-9)


def test_every_bag_weighs_the_same_in_the_components() -> None:
    rng = np.random.default_rng(4)
    bags = [rng.normal(size=(6, 8)) for _ in range(5)]
    spec = EncoderSpec(model="mean_pooling", n_components=3)
    repeated = [np.repeat(bag, 1 + 9 * (i == 0), axis=0) for i, bag in enumerate(bags)]
    one, other = tile_components(bags, spec), tile_components(repeated, spec)
    np.testing.assert_allclose(one.mean, other.mean)
    np.testing.assert_allclose(one(bags[1]).numpy(), other(bags[1]).numpy(), atol=1e-9)


def test_components_are_at_most_the_rank() -> None:
    rng = np.random.default_rng(5)
    bags = [rng.normal(size=(1, 50)) for _ in range(6)]
    assert tile_components(bags, EncoderSpec(model="mean_pooling")).n_outputs == 5


def test_evenly_keeps_first_and_last() -> None:
    kept = evenly(np.arange(100)[:, None], 7)[:, 0]
    assert len(kept) == 7
    assert (kept[0], kept[-1]) == (0, 99)


@pytest.mark.parametrize(
    ("inputs", "code"),
    [
        (np.array([[np.inf, 1.0]]), "not_finite"),
        (np.empty((0, 3)), "shape"),
        ([], "shape"),
        ([np.empty((0, 4))], "shape"),
        ([np.ones((2, 4)), np.ones((2, 5))], "shape"),
        ([np.array([[1.0, np.nan]])], "not_finite"),
    ],
)
def test_unusable_inputs_are_refused_with_a_code(inputs: object, code: str) -> None:
    with pytest.raises(DataError) as caught:
        as_table(inputs)
    assert caught.value.code == code


def test_alike_tiles_have_no_components() -> None:
    with pytest.raises(DataError) as caught:
        tile_components([np.ones((3, 4))] * 5, EncoderSpec(model="mean_pooling"))
    assert caught.value.code == "no_variation"


def test_take_returns_the_patients_asked_for() -> None:
    bags = [np.full((2, 3), i) for i in range(4)]
    rows = np.array([3, 1])
    assert [int(bag[0, 0]) for bag in take(bags, rows)] == [3, 1]
    np.testing.assert_array_equal(take(pool_bags(bags), rows)[:, 0], [3, 1])


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    longer=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_attention_sums_to_one_and_ignores_padding(
    sizes: list[int], longer: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    network = GatedAttention(4, EncoderSpec(model="gated_attention", hidden=8), generator)
    with torch.no_grad():
        for weights in network.parameters():
            weights.normal_(generator=generator)
    bags = [torch.randn(size, 4, generator=generator) for size in sizes]
    extra = torch.full((longer, 4), 50.0)
    with torch.no_grad():
        hazard, weights = network(*pad_bags(bags))
        beside, _ = network(*pad_bags([*bags, extra]))
        tiles, mask = pad_bags(bags)
        poisoned, _ = network(torch.where(mask.unsqueeze(-1), tiles, 1e3), mask)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(sizes)))
    assert not weights[~mask].any()
    torch.testing.assert_close(beside[:-1], hazard)
    torch.testing.assert_close(poisoned, hazard)


def test_attention_of_a_fitted_encoder_sums_to_one_per_bag() -> None:
    encoder, bags = _fitted("gated_attention")
    weights = encoder.attention(bags)
    assert [len(w) for w in weights] == [len(bag) for bag in bags]
    np.testing.assert_allclose([w.sum() for w in weights], 1.0, atol=1e-6)
    linear, _ = _fitted("linear")
    with pytest.raises(ValueError, match="needed gated_attention"):
        linear.attention(bags)


@pytest.mark.parametrize("model", ["linear", "mlp", "gated_attention", "mean_pooling"])
def test_bytes_round_trip(model: str) -> None:
    encoder, inputs = _fitted(model)
    data = encoder.to_bytes()
    again = FittedEncoder.from_bytes(data)
    np.testing.assert_array_equal(again.log_hazard(inputs), encoder.log_hazard(inputs))
    assert again.to_bytes() == data
    assert (again.spec, again.chosen) == (encoder.spec, encoder.chosen)
    assert (again.history, again.n_steps) == (encoder.history, encoder.n_steps)
    assert (again.n_patients, again.n_events) == (encoder.n_patients, encoder.n_events)


@given(cut=st.floats(0, 1), at=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_are_refused_or_read_whole(cut: float, at: float, bit: int) -> None:
    data = _fitted_bytes()
    with pytest.raises(ValueError, match="bytes that are no encoder"):
        FittedEncoder.from_bytes(data[: int(cut * (len(data) - 1))])
    flipped = bytearray(data)
    flipped[int(at * (len(data) - 1))] ^= 1 << bit
    with suppress(ValueError):  # any other error, or a value that is not finite, fails the test
        encoder = FittedEncoder.from_bytes(bytes(flipped))
        assert np.isfinite(encoder.log_hazard(np.zeros((1, 6)))).all()


@cache
def _fitted_bytes() -> bytes:
    return _fitted("linear")[0].to_bytes()


def _with_metadata(data: bytes, **changes: object) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    about = json.loads(header["__metadata__"]["consilium_encoder"]) | changes
    header["__metadata__"]["consilium_encoder"] = json.dumps(about)
    written = json.dumps(header).encode()
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written + data[8 + length :]


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 1},
        {"scale": 0.0},
        {"scale": float("nan")},
        {"chosen": {"model": "mlp"}},
        {"chosen": {"model": "mlp", "ensemble": 3}},
        {"spec": {"model": "linear", "callback": "x"}},
        {"extra": 1},
    ],
)
def test_metadata_that_disagrees_is_refused(changes: dict[str, object]) -> None:
    assert FittedEncoder.from_bytes(_with_metadata(_fitted_bytes()))
    with pytest.raises(ValueError, match="bytes that are no encoder"):
        FittedEncoder.from_bytes(_with_metadata(_fitted_bytes(), **changes))


@pytest.mark.parametrize("model", ["linear", "mlp", "gated_attention", "mean_pooling"])
def test_output_is_standardised_on_training_rows_and_each_patient_scored_alone(model: str) -> None:
    encoder, inputs = _fitted(model)
    scored = encoder.log_hazard(inputs)
    np.testing.assert_allclose([scored.mean(), scored.std(ddof=1)], [0.0, 1.0], atol=1e-9)
    alone = [encoder.log_hazard(take(inputs, np.array([row])))[0] for row in range(5)]
    np.testing.assert_allclose(alone, scored[:5], atol=1e-5)


def test_wrong_kind_or_width_is_refused() -> None:
    attention, bags = _fitted("gated_attention")
    pooling, _ = _fitted("mean_pooling")
    linear, _ = _fitted("linear")
    for encoder, inputs in [
        (attention, bags[0]),
        (pooling, bags[0]),
        (attention, [np.ones((2, 3))]),
        (linear, np.ones((2, 7))),
    ]:
        with pytest.raises(DataError):
            encoder.log_hazard(inputs)


def test_torch_is_left_as_it_was_even_after_an_error() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suppress(KeyError), reproducible_torch():
            assert torch.get_num_threads() == 1
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
