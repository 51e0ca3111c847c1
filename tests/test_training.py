"""Training: the loss, what a fit sees, what it depends on, and how well it ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sksurv.linear_model import CoxnetSurvivalAnalysis, CoxPHSurvivalAnalysis
from sksurv.metrics import concordance_index_censored

from fusion.encoder_inputs import pool_bags
from fusion.encoder_spec import EncoderSpec
from fusion.survival import fit_cox
from fusion.training import TooFewEvents, TrainingDiverged, cross_fit, fit_encoder, fold_seed
from modalities.cohort import DataError
from tests.simulated import simulate_bags, simulate_survival, simulate_table

MODELS = ["linear", "mlp", "gated_attention", "mean_pooling"]


def _inputs_for(model: str, n: int, seed: int) -> tuple[object, np.ndarray, np.ndarray]:
    return (
        simulate_bags(n, seed)
        if model in ("gated_attention", "mean_pooling")
        else simulate_table(n, seed)
    )


def _concordance(event: np.ndarray, time: np.ndarray, log_hazard: np.ndarray) -> float:
    return float(concordance_index_censored(event, time, log_hazard)[0])


def _ridge_reference(
    train: np.ndarray, event: np.ndarray, time: np.ndarray, test: np.ndarray, ridge: float
) -> np.ndarray:
    """Return scikit-survival's ridge Cox scores; its alpha is the ridge times the patients."""
    survival = np.array(list(zip(event, time, strict=True)), dtype=[("event", "?"), ("time", "f8")])
    mean, scale = train.mean(axis=0), train.std(axis=0, ddof=1)
    model = CoxPHSurvivalAnalysis(alpha=ridge * len(train), ties="efron")
    return model.fit((train - mean) / scale, survival).predict((test - mean) / scale)


@pytest.mark.parametrize("round_days", [1.0, 200.0])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 1.0])
def test_linear_encoder_is_the_newton_estimate(round_days: float, ridge: float) -> None:
    rng = np.random.default_rng(8)
    table = rng.normal(5.0, 3.0, size=(75, 16))
    event, time = simulate_survival((table[:, 0] - 5) / 3, rng, round_days=round_days)
    strata = rng.integers(0, 2, 75)
    encoder = fit_encoder(table, event, time, EncoderSpec(ridge=ridge), strata=strata, seed=0)
    standardised = (table - table.mean(axis=0)) / table.std(axis=0, ddof=1)
    newton = fit_cox(standardised, event, time, strata=strata, ridge=ridge).candidate
    np.testing.assert_allclose(encoder.networks[0].head.numpy(), newton, atol=1e-7)


@pytest.mark.parametrize("ridge", [0.02, 0.3])
def test_linear_encoder_is_the_ridge_model_of_scikit_survival(ridge: float) -> None:
    table, event, time = simulate_table(120, seed=21)
    encoder = fit_encoder(table, event, time, EncoderSpec(ridge=ridge), seed=0)
    expected = _ridge_reference(table, event, time, table, ridge)
    raw = encoder.log_hazard(table) * encoder.scale
    np.testing.assert_allclose(raw, expected - expected.mean(), atol=1e-5)


@pytest.mark.parametrize(("strength", "l1_ratio"), [(0.05, 0.5), (0.05, 1.0), (0.15, 0.9)])
def test_linear_encoder_is_the_elastic_net_of_scikit_survival(
    strength: float, l1_ratio: float
) -> None:
    rng = np.random.default_rng(22)
    table = rng.normal(size=(150, 12))
    hazard = table[:, :3] @ np.array([0.9, -0.7, 0.5])
    event, time = simulate_survival(hazard, rng, round_days=1e-9)  # no ties: it is Breslow's
    encoder = fit_encoder(
        table, event, time, EncoderSpec(ridge=strength, l1_ratio=l1_ratio), seed=0
    )
    survival = np.array(list(zip(event, time, strict=True)), dtype=[("event", "?"), ("time", "f8")])
    standardised = (table - table.mean(axis=0)) / table.std(axis=0, ddof=1)
    reference = CoxnetSurvivalAnalysis(
        alphas=[strength], l1_ratio=l1_ratio, normalize=False, tol=1e-14, max_iter=1_000_000
    ).fit(standardised, survival)
    found = encoder.networks[0].head.numpy()
    np.testing.assert_allclose(found, reference.coef_[:, 0], atol=1e-6)
    assert (found == 0.0).any()


def test_elastic_net_chooses_its_strength_and_drops_what_says_nothing() -> None:
    table, event, time = simulate_table(200, seed=23)
    table = np.column_stack([table, np.random.default_rng(1).normal(size=(200, 30))])
    encoder = fit_encoder(table, event, time, EncoderSpec(l1_ratio=0.9), seed=0)
    head = encoder.networks[0].head.numpy()
    assert (head[:4] != 0.0).all()
    assert (head[4:] == 0.0).sum() >= 12
    assert len(encoder.history["tried"]) > 1


def test_ensemble_averages_networks_of_different_seeds() -> None:
    table, event, time = simulate_table(80, seed=24)
    spec = EncoderSpec(model="mlp", ridge=0.1, ensemble=3, max_steps=10, patience=10)
    encoder = fit_encoder(table, event, time, spec, seed=0)
    assert len({network.hidden.weight[0, 0].item() for network in encoder.networks}) == 3
    alone = [replace(encoder, networks=(network,)) for network in encoder.networks]
    mean = np.mean([one.log_hazard(table) for one in alone], axis=0)
    np.testing.assert_allclose(encoder.log_hazard(table), mean, atol=1e-5)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_choice_inside_a_fold_never_sees_the_output_fold(model: str) -> None:
    table, event, time = simulate_table(90, seed=25)
    folds = np.arange(90) % 3
    spec = EncoderSpec(model=model, max_steps=10)
    clean = cross_fit(table, event, time, folds, spec, seed=1)
    own = folds == 2
    table[own], time[own] = 50.0, 1.0
    poisoned = cross_fit(table, event, time, folds, spec, seed=1)
    assert poisoned.encoders[2].history == clean.encoders[2].history
    assert poisoned.encoders[0].history != clean.encoders[0].history


@pytest.mark.parametrize("model", ["gated_attention", "mean_pooling"])
def test_bags_of_one_tile_are_enough(model: str) -> None:
    bags, event, time = simulate_bags(50, seed=26, dim=8)
    single = [bag[:1] for bag in bags]
    spec = EncoderSpec(model=model, max_steps=10, n_components=4)
    assert np.isfinite(fit_encoder(single, event, time, spec, seed=0).log_hazard(single)).all()


@pytest.mark.parametrize("n", [80, 150, 300])
@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_table_encoders_rank_as_well_as_ridge_cox(model: str, n: int) -> None:
    table, event, time = simulate_table(n + 600, seed=n)
    spec = EncoderSpec(model=model)
    encoder = fit_encoder(table[:n], event[:n], time[:n], spec, seed=1)
    reference = _ridge_reference(table[:n], event[:n], time[:n], table[n:], spec.default_ridge)
    found = _concordance(event[n:], time[n:], encoder.log_hazard(table[n:]))
    assert found > _concordance(event[n:], time[n:], reference) - 0.02
    assert found > 0.65


@pytest.mark.parametrize("n", [60, 110])
@pytest.mark.parametrize("model", ["gated_attention", "mean_pooling"])
def test_tile_encoders_rank_as_well_as_ridge_cox_on_pooled_components(model: str, n: int) -> None:
    bags, event, time = simulate_bags(n + 400, seed=n)
    spec = EncoderSpec(model=model)
    encoder = fit_encoder(bags[:n], event[:n], time[:n], spec, seed=1)
    pooled = pool_bags(bags)
    centred = pooled - pooled[:n].mean(axis=0)
    axes = np.linalg.svd(centred[:n], full_matrices=False)[2][: spec.n_components]
    components = centred @ axes.T
    reference = _ridge_reference(
        components[:n], event[:n], time[:n], components[n:], spec.default_ridge
    )
    found = _concordance(event[n:], time[n:], encoder.log_hazard(bags[n:]))
    assert found > _concordance(event[n:], time[n:], reference) - 0.02
    assert found > 0.65


def test_mlp_learns_what_no_linear_model_can() -> None:
    rng = np.random.default_rng(9)
    table = rng.normal(size=(600, 3))
    event, time = simulate_survival(1.5 * np.abs(table[:, 0]), rng)
    train = slice(0, 300)
    spec = EncoderSpec(model="mlp", max_steps=300)
    mlp = fit_encoder(table[train], event[train], time[train], spec, seed=0)
    assert mlp.n_steps > 0
    assert _concordance(event[300:], time[300:], mlp.log_hazard(table[300:])) > 0.62


def test_attention_finds_the_tiles_that_matter() -> None:
    rng = np.random.default_rng(10)
    factor = rng.normal(size=300)
    event, time = simulate_survival(1.5 * factor, rng)
    bags, marked = [], []
    for value in factor:
        on = np.arange(10) < 2
        tiles = rng.normal(size=(10, 4))
        tiles[:, 0] = np.where(on, value, 2 * rng.normal(size=10))
        tiles[:, 1] = np.where(on, 2.0, -0.5)
        bags.append(tiles)
        marked.append(on)
    spec = EncoderSpec(model="gated_attention", n_components=4, max_steps=200)
    encoder = fit_encoder(bags[:200], event[:200], time[:200], spec, seed=0)
    pooled = fit_encoder(
        bags[:200],
        event[:200],
        time[:200],
        spec.model_copy(update={"model": "mean_pooling"}),
        seed=0,
    )
    found, plain = (
        _concordance(event[200:], time[200:], e.log_hazard(bags[200:])) for e in (encoder, pooled)
    )
    assert found > plain + 0.05
    weights = encoder.attention(bags[200:])
    share = np.mean([w[on].sum() for w, on in zip(weights, marked[200:], strict=True)])
    assert share > 0.5  # of which a fifth by chance


@pytest.mark.parametrize("model", MODELS)
def test_fit_depends_on_its_arguments_only(model: str) -> None:
    inputs, event, time = _inputs_for(model, 50, seed=11)
    spec = EncoderSpec(model=model, max_steps=15)
    threads = torch.get_num_threads()
    first = fit_encoder(inputs, event, time, spec, seed=5).to_bytes()
    try:
        torch.set_num_threads(2)
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(99)
        before = torch.random.get_rng_state()
        with torch.no_grad():
            again = fit_encoder(inputs, event, time, spec, seed=5)
        assert torch.equal(before, torch.random.get_rng_state())
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
    assert again.to_bytes() == first


def test_seed_matters_to_networks() -> None:
    bags, event, time = simulate_bags(60, seed=12)
    spec = EncoderSpec(model="gated_attention", max_steps=5, patience=5, ridge=1.0)
    states = {
        fit_encoder(bags, event, time, spec, seed=s).networks[0].signal.weight[0, 0].item()
        for s in range(3)
    }
    assert len(states) == 3


@pytest.mark.parametrize("model", MODELS)
def test_out_of_fold_scores_never_depend_on_the_own_fold(model: str) -> None:
    inputs, event, time = _inputs_for(model, 60, seed=13)
    folds = np.arange(60) % 3
    spec = EncoderSpec(model=model, max_steps=10, min_events=5)
    clean = cross_fit(inputs, event, time, folds, spec, seed=2)
    own = np.flatnonzero(folds == 1)
    poisoned_event, poisoned_time = event.copy(), time.copy()
    # Within the fold the first column now tells the outcome, which is made up as well.
    poisoned_event[own], poisoned_time[own] = True, np.arange(1, len(own) + 1)
    poisoned = [np.array(row, copy=True) for row in inputs]
    for rank, row in enumerate(own):
        poisoned[row][..., 0] = 100.0 - rank
    if isinstance(inputs, np.ndarray):
        poisoned = np.array(poisoned)
    leaking = cross_fit(poisoned, poisoned_event, poisoned_time, folds, spec, seed=2)
    assert leaking.encoders[1].to_bytes() == clean.encoders[1].to_bytes()
    assert leaking.encoders[0].to_bytes() != clean.encoders[0].to_bytes()
    np.testing.assert_array_equal(
        leaking.out_of_fold[own],
        clean.encoders[1].log_hazard([poisoned[i] for i in own])
        if not isinstance(poisoned, np.ndarray)
        else clean.encoders[1].log_hazard(poisoned[own]),
    )


def test_cross_fit_is_one_fit_per_fold_and_finds_no_signal_in_noise() -> None:
    rng = np.random.default_rng(14)
    table = rng.normal(size=(150, 30))
    event, time = simulate_survival(np.zeros(150), rng)
    folds = rng.permutation(150) % 5
    spec = EncoderSpec(ridge=0.01)
    fitted = cross_fit(table, event, time, folds, spec, seed=4)
    assert len(fitted.encoders) == 5
    train = folds != 2
    alone = fit_encoder(table[train], event[train], time[train], spec, seed=fold_seed(4, 2))
    np.testing.assert_array_equal(fitted.out_of_fold[~train], alone.log_hazard(table[~train]))
    assert abs(_concordance(event, time, fitted.out_of_fold) - 0.5) < 0.08
    inside = fit_encoder(table, event, time, spec, seed=4).log_hazard(table)
    assert _concordance(event, time, inside) > 0.65  # what a leak would look like


def test_missing_cells_and_columns_without_variation_do_no_harm() -> None:
    table, event, time = simulate_table(120, seed=15)
    holes = table.copy()
    holes[np.random.default_rng(0).random(table.shape) < 0.1] = np.nan
    odd = np.column_stack([holes, np.full(120, 7.0), np.full(120, np.nan)])
    for model in ("linear", "mlp"):
        spec = EncoderSpec(model=model, max_steps=20)
        scored = fit_encoder(odd, event, time, spec, seed=0).log_hazard(odd)
        assert np.isfinite(scored).all()
        assert _concordance(event, time, scored) > 0.65
    linear = fit_encoder(odd, event, time, EncoderSpec(), seed=0)
    shifted = odd.copy()
    shifted[:, -2:] = 1e9
    np.testing.assert_array_equal(linear.log_hazard(shifted), linear.log_hazard(odd))


def test_inputs_without_any_variation_give_everyone_zero() -> None:
    _, event, time = simulate_table(60, seed=16)
    encoder = fit_encoder(np.ones((60, 3)), event, time, EncoderSpec(), seed=0)
    np.testing.assert_array_equal(encoder.log_hazard(np.full((4, 3), 8.0)), np.zeros(4))


def test_separated_data_need_a_ridge() -> None:
    time = np.arange(1.0, 41.0)
    rows, event = -time[:, None], np.ones(40, bool)
    with pytest.raises(TrainingDiverged, match="no finite optimum"):
        fit_encoder(rows, event, time, EncoderSpec(ridge=0.0), seed=0)
    either = fit_encoder(rows, event, time, EncoderSpec(ridge=(0.0, 0.1)), seed=0)
    assert either.chosen.ridge == (0.1,)
    assert [trial["loss"] is None for trial in either.history["tried"]] == [False, True]


def test_outliers_do_not_derail_the_linear_start() -> None:
    table, event, time = simulate_table(90, seed=17)
    table = np.sinh(4 * table)
    scored = fit_encoder(table, event, time, EncoderSpec(ridge=0.001), seed=0).log_hazard(table)
    assert np.isfinite(scored).all()


@pytest.mark.parametrize("n_events", [0, 9])
def test_too_few_events_are_refused(n_events: int) -> None:
    event = np.arange(50) < n_events
    with pytest.raises(TooFewEvents, match=f"found {n_events}, needed at least 10"):
        fit_encoder(np.ones((50, 2)), event, np.arange(1.0, 51.0), EncoderSpec(), seed=0)


def test_inputs_that_disagree_are_refused() -> None:
    table, event, time = simulate_table(50, seed=18)
    spec = EncoderSpec()
    with pytest.raises(ValueError, match="found 49 patients, needed 50"):
        fit_encoder(table[:49], event, time, spec, seed=0)
    with pytest.raises(ValueError, match="strata: found shape"):
        fit_encoder(table, event, time, spec, strata=[1, 2], seed=0)
    with pytest.raises(ValueError, match="folds: found 1"):
        cross_fit(table, event, time, np.zeros(50), spec, seed=0)
    with pytest.raises(ValueError, match="folds and inputs"):
        cross_fit(table, event, time, np.zeros(49), spec, seed=0)
    with pytest.raises(DataError):
        fit_encoder(table, event, time, EncoderSpec(model="gated_attention"), seed=0)


@pytest.mark.parametrize("model", MODELS)
def test_sharing_changes_nothing_in_what_a_site_trains(model: str) -> None:
    inputs, event, time = _inputs_for(model, 50, seed=19)
    specs = [
        EncoderSpec(model=model, max_steps=10, max_inputs=4, sharing=sharing)
        for sharing in ("local", "sums")
    ]
    local, shared = (fit_encoder(inputs, event, time, spec, seed=0) for spec in specs)
    np.testing.assert_array_equal(shared.log_hazard(inputs), local.log_hazard(inputs))


def test_linear_model_reads_bags_by_their_means() -> None:
    bags, event, time = simulate_bags(60, seed=19, dim=20)
    by_bags = fit_encoder(bags, event, time, EncoderSpec(), seed=0)
    by_table = fit_encoder(pool_bags(bags), event, time, EncoderSpec(), seed=0)
    np.testing.assert_array_equal(by_bags.log_hazard(bags), by_table.log_hazard(pool_bags(bags)))


def test_bags_longer_than_the_limit_are_thinned_in_training_only() -> None:
    bags, event, time = simulate_bags(60, seed=20)
    spec = EncoderSpec(model="gated_attention", max_tiles=3, max_steps=10, patience=5)
    encoder = fit_encoder(bags, event, time, spec, seed=0)
    assert [len(w) for w in encoder.attention(bags[:3])] == [len(bag) for bag in bags[:3]]
