"""An audit that finds who was trained on where that can be told, and finds nothing where not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve
from sksurv.linear_model.coxph import BreslowEstimator

from fusion.averaging import AveragedFit, LocalSteps, local_update
from fusion.encoder_spec import EncoderSpec
from fusion.federation import AveragingPlan
from fusion.late import CoxFusion, fit_late_fusion
from fusion.membership import (
    MAX_AUC,
    MIN_MODELS,
    Effort,
    MembershipResult,
    ModelPairs,
    attack_curve,
    audit,
    encoder_fit,
    expected_events,
    fusion_fit,
    likelihood_ratios,
    shared_fit,
    summarise,
)
from fusion.newton import ConvergenceError
from tests.simulated import simulate_bags, simulate_survival, simulate_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Rows = NDArray[np.intp]

pytestmark = pytest.mark.border

SMALL = Effort(n_models=16)
FULL = Effort(n_models=MIN_MODELS)
LINEAR = EncoderSpec(ridge=0.1)
OVERFITTED = EncoderSpec(model="mlp", ridge=0.001, dropout=0.0, weight_decay=0.0, hidden=16)


def table(n: int, n_inputs: int, seed: int = 3) -> tuple[Floats, NDArray[np.bool_], Floats]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, n_inputs))
    weights = np.resize([0.8, -0.6, 0.5], 3)
    event, time = simulate_survival(values[:, :3] @ weights, rng)
    return values, event, time


def random_labels(n: int, n_inputs: int, seed: int = 4) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Rows whose outcome has nothing to do with their inputs."""
    values, event, time = table(n, n_inputs, seed)
    shuffled = np.random.default_rng(seed).permutation(n)
    return values, event[shuffled], time[shuffled]


def noise_pairs(seed: int, pairs: int = 16, n: int = 30) -> ModelPairs:
    """Log hazards that do not depend on the halves; patients and models each have their own."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(pairs, 2, n)) + rng.normal(size=(pairs, 2, 1)) + rng.normal(size=n)
    return ModelPairs(values, rng.permuted(np.tile(np.arange(n) < n // 2, (pairs, 1)), axis=1))


def test_an_overfitted_encoder_fails() -> None:
    values, event, time = table(100, 50)
    fit = encoder_fit(values, event, time, OVERFITTED, n_steps=80, seed=0)
    result = audit(fit, event, time, name="mlp", seed=1, effort=SMALL)
    assert result.auc_low > 0.75 > MAX_AUC
    assert result.tpr_low > 0.10
    assert not result.passes
    # Not because too few models say so.
    assert not replace(result, n_models=MIN_MODELS).passes


def test_an_encoder_that_memorised_random_labels_fails() -> None:
    values, event, time = random_labels(100, 50)
    fit = encoder_fit(values, event, time, LINEAR, n_steps=0, seed=0)
    result = audit(fit, event, time, name="linear", seed=1, effort=FULL)
    assert result.auc_low > 0.75
    assert not result.passes


def test_random_labels_pass_with_many_patients_per_input_and_fail_with_few() -> None:
    def result(n: int) -> MembershipResult:
        values, event, time = random_labels(n, 6)
        fit = encoder_fit(values, event, time, LINEAR, n_steps=0, seed=0)
        assert fit(np.arange(n)).std() > 0.01  # it passes though it says something of everyone
        return audit(fit, event, time, name="linear", seed=1, effort=FULL)

    many, few = result(600), result(60)
    assert many.passes
    assert many.auc_high < MAX_AUC
    assert few.auc_low > many.auc_high
    assert not few.passes


def test_models_that_never_saw_the_patients_are_told_from_nothing() -> None:
    values, event, time = table(120, 10)
    others = table(120, 10, seed=99)

    def fit(rows: Rows) -> Floats:
        # Which others is drawn anew: were it told by these rows, one's label would tell another's.
        drawn = np.random.default_rng(rows.astype(np.uint32)).permutation(120)[: len(rows)]
        both = [
            np.concatenate([part[drawn], own])
            for part, own in zip(others, (values, event, time), strict=True)
        ]
        model = encoder_fit(both[0], both[1], both[2], LINEAR, n_steps=0, seed=0)
        return model(np.arange(len(rows)))[len(rows) :]

    result = audit(fit, event, time, name="others", seed=1, effort=FULL)
    assert result.auc_low < 0.5 < result.auc_high
    assert result.tpr_low < 0.05 < result.tpr_high
    assert result.loss_auc_low < 0.5 < result.loss_auc_high
    assert result.auc_high - result.auc_low < 0.1
    assert result.passes


def test_a_ridge_hides_nobody() -> None:
    values, event, time = table(100, 50)
    strong = EncoderSpec(ridge=100.0)
    fit = encoder_fit(values, event, time, strong, n_steps=0, seed=0)
    result = audit(fit, event, time, name="linear", seed=1, effort=FULL)
    assert result.loss_auc < 0.52  # whoever reads losses only would let it pass
    assert result.auc_low > 0.7
    assert not result.passes


def test_a_model_that_says_nothing_is_a_coin_and_passes() -> None:
    _, event, time = table(40, 3)
    result = audit(lambda rows: np.zeros(40), event, time, name="zero", seed=1, effort=FULL)
    assert (result.auc, result.auc_low, result.auc_high) == (0.5, 0.5, 0.5)
    assert_allclose([result.tpr_at_5_fpr, result.tpr_low, result.tpr_high], 0.05)
    assert result.passes


def test_a_loss_attack_alone_can_fail_a_model() -> None:
    _, event, time = table(40, 3)
    result = audit(lambda rows: np.zeros(40), event, time, name="zero", seed=1, effort=FULL)
    assert not replace(result, loss_auc=0.61).passes
    assert not replace(result, auc=0.61).passes
    assert replace(result, auc=MAX_AUC, loss_auc=MAX_AUC).passes


def test_too_few_models_let_nothing_pass() -> None:
    _, event, time = table(40, 3)
    brief = Effort(n_models=MIN_MODELS, time_budget_s=1e-9)
    counted: list[int] = []
    result = audit(
        lambda rows: np.zeros(40), event, time, name="z", seed=1, effort=brief,
        advance=counted.append,
    )  # fmt: skip
    assert result.n_models == sum(counted) == 8
    assert result.auc == 0.5
    assert not result.passes


@pytest.mark.parametrize("shift", [0.0, 0.4, 1.5])
def test_the_attack_reaches_what_a_known_shift_allows(shift: float) -> None:
    rng = np.random.default_rng(5)
    towards = rng.choice([-1.0, 1.0], size=200)
    outside = rng.normal(size=(200, 200))
    inside = rng.normal(size=(200, 200)) + shift * towards
    scores = likelihood_ratios(inside, outside, rng.normal(size=200))
    found = attack_curve(*scores, seed=0)
    assert abs(found.auc - norm.cdf(shift / np.sqrt(2))) < 0.01
    assert abs(found.tpr - norm.cdf(shift + norm.ppf(0.05))) < 0.015


def test_known_pulls_sharpen_an_attack_of_few_models() -> None:
    rng = np.random.default_rng(6)
    pull = rng.normal(size=300)
    outside = rng.normal(size=(8, 300))
    inside = rng.normal(size=(8, 300)) + 0.4 * pull
    told = attack_curve(*likelihood_ratios(inside, outside, pull), seed=0)
    untold = attack_curve(*likelihood_ratios(inside, outside, rng.normal(size=300)), seed=0)
    assert told.auc > untold.auc + 0.03


def test_the_attack_is_no_better_than_chance_on_noise_however_few_models() -> None:
    found = []
    for seed in range(40):
        pairs = noise_pairs(seed, pairs=4)
        rng = np.random.default_rng(seed)
        scores = likelihood_ratios(*pairs.split(pairs.log_hazard), rng.normal(size=30))
        found.append(attack_curve(*scores, seed=0).auc)
    assert abs(np.mean(found) - 0.5) < 3 * np.std(found) / np.sqrt(len(found))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    _, event, time = table(30, 3)
    held = np.zeros(3)
    for seed in range(40):
        found = summarise(noise_pairs(seed), event, time, name="noise", seed=seed)
        held += [
            found.auc_low <= 0.5 <= found.auc_high,
            found.tpr_low <= 0.05 <= found.tpr_high,
            found.loss_auc_low <= 0.5 <= found.loss_auc_high,
        ]
    assert (held >= 0.9 * 40).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=10, deadline=None)
def test_the_curve_is_that_of_scikit_learn(seed: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    members = np.round(rng.normal(0.5, 1.0, size=(4, 15)), digits % 3)  # ties
    others = np.round(rng.normal(size=(4, 15)), digits % 3)
    found = attack_curve(members, others, seed=0)
    is_member = np.repeat([1, 0], 60)
    scores = np.concatenate([members.ravel(), others.ravel()])
    assert_allclose(found.auc, roc_auc_score(is_member, scores))
    fpr, tpr, _ = roc_curve(is_member, scores, drop_intermediate=False)
    assert_allclose(found.tpr, np.interp(0.05, fpr, tpr))
    assert found.auc_low <= found.auc <= found.auc_high


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=5, deadline=None)
def test_constants_order_and_names_of_halves_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = noise_pairs(seed)
    _, event, time = table(30, 3, seed=7)
    time = time + rng.random(30)
    plain = summarise(pairs, event, time, name="x", seed=0)
    other = ModelPairs(pairs.log_hazard + rng.normal(size=(16, 2, 1)), pairs.half)
    assert_allclose(summarise(other, event, time, name="x", seed=0).auc, plain.auc, atol=1e-9)
    swapped = ModelPairs(pairs.log_hazard[:, ::-1], ~pairs.half)
    assert summarise(swapped, event, time, name="x", seed=0).auc == pytest.approx(plain.auc)
    order = rng.permutation(30)
    moved = ModelPairs(pairs.log_hazard[:, :, order], pairs.half[:, order])
    permuted = summarise(moved, event[order], time[order], name="x", seed=0)
    assert_allclose([permuted.auc, permuted.loss_auc], [plain.auc, plain.loss_auc], atol=1e-9)


def test_expected_events_are_breslows() -> None:
    values, event, time = simulate_table(80, 2)
    log_hazard = values[:, :2] @ np.array([0.7, -0.4])
    time = np.ceil(time / 50) * 50  # ties
    found = expected_events(np.stack([log_hazard, log_hazard + 9.0]), event, time)
    reference = BreslowEstimator().fit(log_hazard, event, time).cum_baseline_hazard_
    assert_allclose(found[0], reference(time) * np.exp(log_hazard), rtol=1e-10)
    assert_allclose(found[1], found[0], rtol=1e-10)
    assert_allclose(found.sum(axis=1), event.sum())


def test_expected_events_outlast_a_diverged_model() -> None:
    _, event, time = table(30, 3)
    log_hazard = np.where(np.arange(30) % 2, 5000.0, -5000.0)
    assert np.isfinite(expected_events(log_hazard[None], event, time)).all()


@pytest.mark.parametrize("spec", [LINEAR, EncoderSpec(model="mlp", max_steps=20)])
def test_an_encoder_is_trained_as_its_site_trains_it(spec: EncoderSpec) -> None:
    from fusion.training import fit_encoder

    values, event, time = simulate_table(80, 1)
    values[3, 2] = np.nan
    encoder = fit_encoder(values, event, time, spec, seed=5)
    again = encoder_fit(
        values, event, time, encoder.chosen, n_steps=encoder.n_steps, seed=5
    )(np.arange(80))  # fmt: skip
    assert_allclose((again - encoder.centre) / encoder.scale, encoder.log_hazard(values))


def test_attention_is_trained_on_bags() -> None:
    bags, event, time = simulate_bags(40, 0, dim=12)
    spec = EncoderSpec(model="gated_attention", n_components=3, hidden=4, ridge=0.1)
    fit = encoder_fit(bags, event, time, spec, n_steps=3, seed=0)
    half = np.arange(0, 40, 2)
    assert fit(half).shape == (40,)
    assert not np.allclose(fit(half), fit(half + 1))


def test_shared_weights_are_trained_as_a_consortium_of_one() -> None:
    from fusion.shared_networks import SharedLoss, initial_weights, shared_log_hazard

    values, event, time = simulate_table(60, 1)
    spec = EncoderSpec(model="mlp", sharing="weights", hidden=3)
    plan = AveragingPlan(initial_weights(spec, 10, seed=0), rounds=4, local_steps=2)
    rows = np.arange(0, 60, 2)
    found = shared_fit(values, event, time, spec, plan)(rows)
    training = AveragedFit(plan.start, max_rounds=4)
    while not training.converged:
        loss = SharedLoss(spec, values[rows], event[rows], time[rows])
        steps = LocalSteps(2, plan.learning_rate)
        update = local_update(
            loss, training.candidate, steps, n_patients=30, n_events=loss.n_events
        )
        training.advance([update])
    assert_allclose(found, shared_log_hazard(spec, training.candidate, values))
    assert np.ptp(found) > 0


def test_the_fusion_model_is_the_one_of_rows_in_one_place() -> None:
    values, event, time = simulate_table(80, 1)
    columns = values[:, :2].copy()
    columns[::5, 1] = np.nan
    names, edges = ("a", "b"), (365.0, 730.0)
    fit = fusion_fit(
        columns, event, time, lambda: CoxFusion(modalities=names, edges_days=edges, ridge=0.1)
    )
    rows = np.arange(0, 80, 2)
    model = fit_late_fusion(
        columns[rows], event[rows], time[rows], modalities=names, edges_days=edges, ridge=0.1
    )
    assert_allclose(fit(rows), model.predict(columns))


def test_the_same_seed_gives_the_same_result_and_each_half_its_events() -> None:
    values, event, time = table(60, 5)
    halves: list[Rows] = []

    def fit(rows: Rows) -> Floats:
        halves.append(rows)
        return encoder_fit(values, event, time, LINEAR, n_steps=0, seed=0)(rows)

    run: Callable[[int], MembershipResult] = lambda seed: audit(  # noqa: E731
        fit, event, time, name="x", seed=seed, effort=SMALL
    )
    first = run(1)
    assert run(1) == first
    assert run(2) != first
    for one, other in zip(halves[::2], halves[1::2], strict=True):
        assert sorted([*one, *other]) == list(range(60))
        assert abs(int(event[one].sum()) - int(event[other].sum())) <= 1
        assert len(one) == 30
    assert len({rows.tobytes() for rows in halves}) == 32


def test_halves_that_cannot_be_fitted_are_left_out_with_their_complements() -> None:
    _, event, time = table(40, 3)
    calls = 0

    def fit(rows: Rows) -> Floats:
        nonlocal calls
        calls += 1
        if calls in (2, 5):
            raise ConvergenceError("separated")
        return np.random.default_rng(calls).normal(size=40)

    assert audit(fit, event, time, name="x", seed=1, effort=SMALL).n_models == 12


def test_an_audit_without_models_says_so() -> None:
    _, event, time = table(40, 3)

    def fit(rows: Rows) -> Floats:
        raise ConvergenceError("separated")

    with pytest.raises(ValueError, match="blood: found 0 pairs"):
        audit(fit, event, time, name="blood", seed=1, effort=SMALL)


def test_bad_input_is_refused() -> None:
    _, event, time = table(40, 3)

    def zero(rows: Rows) -> Floats:
        return np.zeros(40)

    with pytest.raises(ValueError, match="found 19, needed at least 20"):
        audit(zero, event[:19], time[:19], name="x", seed=1, effort=SMALL)
    with pytest.raises(ValueError, match="even number"):
        Effort(n_models=9)
    with pytest.raises(ValueError, match="even number"):
        Effort(n_models=6)
    with pytest.raises(ValueError, match="time_budget_s"):
        Effort(time_budget_s=0.0)
    with pytest.raises(ValueError, match="finite"):
        audit(lambda rows: zero(rows) + np.nan, event, time, name="x", seed=1, effort=SMALL)
    with pytest.raises(ValueError, match=r"needed \(pairs, 2, n\)"):
        audit(lambda rows: np.zeros(39), event, time, name="x", seed=1, effort=SMALL)
