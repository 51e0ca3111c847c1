"""Choice of hyperparameters: which is taken, in which order, within which time."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import tuning
from fusion.cox_loss import Outcome, TrainingDiverged, outcome, training_mode
from fusion.encoder_spec import EncoderSpec
from fusion.encoders import standardisation
from fusion.learner import TrainingRows, training_rows
from fusion.survival import cox_sums, fit_cox, moments
from fusion.tuning import (
    Choice,
    LinearFits,
    choose,
    inner_folds,
    network_candidates,
)
from tests.simulated import simulate_survival, simulate_table

Rows = tuple[np.ndarray, np.ndarray, np.ndarray]


def _search_inputs(rows: Rows, spec: EncoderSpec) -> tuple[TrainingRows, Outcome, LinearFits]:
    table, event, time = rows
    data = training_rows(table, standardisation(moments(table)), spec)
    survival = outcome(event, time)
    return data, survival, LinearFits(data.rows, survival, l1_ratio=spec.l1_ratio)


def _choose(rows: Rows, spec: EncoderSpec, *, seed: int = 0) -> Choice:
    with training_mode():
        return choose(*_search_inputs(rows, spec), spec, seed=seed)


def _noise(n: int, n_columns: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, n_columns)), *simulate_survival(np.zeros(n), rng))


def test_ridge_is_the_one_with_the_least_cross_validated_loss() -> None:
    table, event, time = simulate_table(90, seed=3)
    spec = EncoderSpec(ridge=(0.01, 0.1, 1.0), inner_folds=3)
    choice = _choose((table, event, time), spec)
    x = (table - table.mean(axis=0)) / table.std(axis=0, ddof=1)
    folds = inner_folds(outcome(event, time), 3, 0)
    expected = {}
    for ridge in spec.ridge:
        loss = 0.0
        for fold in range(3):
            own = folds != fold
            beta = fit_cox(x[own], event[own], time[own], ridge=ridge).candidate
            loss -= cox_sums(x, event, time, beta).log_likelihood
            loss += cox_sums(x[own], event[own], time[own], beta).log_likelihood
        expected[ridge] = loss / event.sum()
    found = {trial["ridge"]: trial["loss"] for trial in choice.history["tried"]}
    assert len(found) > 1
    assert found == pytest.approx({ridge: expected[ridge] for ridge in found}, rel=1e-9)
    assert choice.spec.ridge == (min(expected, key=expected.__getitem__),)
    assert choice.history["tried"][choice.history["chosen"]]["ridge"] == choice.spec.ridge[0]


def test_noise_gets_a_strong_ridge_and_signal_a_weak_one() -> None:
    spec = EncoderSpec()
    assert _choose(_noise(60, 20, seed=1), spec).spec.ridge == (1.0,)
    assert _choose(simulate_table(600, seed=1), spec).spec.ridge[0] < 0.1


def test_one_ridge_of_a_linear_model_is_taken_without_a_search() -> None:
    choice = _choose(simulate_table(40, seed=2), EncoderSpec(ridge=0.2))
    assert (choice.spec.ridge, choice.history["tried"]) == ((0.2,), [])


@given(
    losses=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    diverged=st.sets(st.integers(0, 8)),
)
def test_ridges_are_tried_from_the_default_while_the_loss_falls(
    losses: list[int], diverged: set[int]
) -> None:
    strengths = tuple(float(2**i) for i in range(len(losses)))
    spec = EncoderSpec(ridge=(0.1, 1.0)).model_copy(update={"ridge": strengths})
    loss_of = {x: math.inf if i in diverged else float(losses[i]) for i, x in enumerate(strengths)}
    tried = _tried(spec, loss_of)
    default = strengths.index(spec.default_ridge)
    assert tried[0] == spec.default_ridge
    chosen = min(tried, key=loss_of.__getitem__)
    at = strengths.index(chosen)
    for side in (at - 1, at + 1):  # both neighbours of the choice are known to be no better
        if 0 <= side < len(strengths) and loss_of[chosen] < loss_of[spec.default_ridge]:
            assert loss_of[strengths[side]] >= loss_of[chosen]
            assert strengths[side] in tried
    is_stronger = [strengths.index(x) > default for x in tried[1:]]
    assert is_stronger == sorted(is_stronger, reverse=True)


def _tried(spec: EncoderSpec, loss_of: dict[float, float]) -> list[float]:
    """Strengths that a search tries if these were their losses."""
    data, survival, linear = _search_inputs(simulate_table(30, seed=0), spec)
    search = tuning._Search(data, survival, linear, spec, 0)
    search._linear_loss = lambda starts: loss_of[starts[0]]  # type: ignore[method-assign]
    search._fit_inner = lambda strength: [strength]  # type: ignore[method-assign]
    search.try_linear()
    return [trial.spec.ridge[0] for trial in search.trials]


@given(st.integers(1, 512), st.floats(0, 0.99), st.floats(0, 10))
def test_first_network_is_the_spec_itself_and_all_can_be_specs(
    hidden: int, dropout: float, decay: float
) -> None:
    spec = EncoderSpec(model="mlp", hidden=hidden, dropout=dropout, weight_decay=decay)
    candidates = network_candidates(spec)
    assert candidates[0] == spec
    for candidate in candidates:
        assert EncoderSpec.model_validate(candidate.model_dump()) == candidate
    assert len(set(candidates)) == len(candidates)


class _Clock:
    """A clock that moves on by a second whenever it is read."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def __call__(self) -> float:
        return float(next(self.ticks))


@pytest.mark.parametrize("budget_s", [1, 2, 100])
def test_budget_ends_the_list_early_and_changes_nothing_else(
    budget_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = simulate_table(70, seed=5)
    spec = EncoderSpec(model="mlp", max_steps=10)
    whole = _choose(rows, spec).history
    monkeypatch.setattr(tuning, "monotonic", _Clock())
    cut = _choose(rows, spec.model_copy(update={"time_budget_s": budget_s})).history
    n_linear = [trial["model"] for trial in cut["tried"]].index("mlp")
    assert cut["tried"][:n_linear] == whole["tried"][:n_linear]
    assert cut["cut_by_budget"] == (budget_s < 100)
    assert not whole["cut_by_budget"]
    models = [trial["model"] for trial in cut["tried"]]
    # The default network is fitted even if the linear models used all the time up.
    assert models == ["linear"] * n_linear + ["mlp"] * (len(models) - n_linear)
    assert "mlp" in models


def test_history_is_plain_and_holds_the_training_curves() -> None:
    spec = EncoderSpec(model="mlp", max_steps=10, ridge=(0.1, 0.3))
    choice = _choose(simulate_table(70, seed=6), spec)
    tried = choice.history["tried"]
    assert json.loads(json.dumps(choice.history)) == choice.history
    assert [trial["loss_by_step"][0][0] for trial in tried] == [0] * len(tried)
    assert [step for step, _ in tried[-1]["loss_by_step"]] == [0, 5, 10]
    for trial in tried:
        assert trial["loss"] == min(loss for _, loss in trial["loss_by_step"])
        assert [trial["n_steps"], trial["loss"]] in trial["loss_by_step"]


def test_a_network_is_taken_where_no_linear_model_can_rank() -> None:
    rng = np.random.default_rng(9)
    table = rng.normal(size=(200, 2))
    rows = (table, *simulate_survival(2 * np.abs(table[:, 0]), rng))
    choice = _choose(rows, EncoderSpec(model="mlp", ridge=0.1))
    assert choice.history["tried"][choice.history["chosen"]]["model"] == "mlp"
    assert choice.n_steps > 0


def test_more_inputs_than_patients_are_fitted_in_the_row_space() -> None:
    table, event, time = _noise(40, 70, seed=7)
    spec = EncoderSpec()
    data = training_rows(table, standardisation(moments(table)), spec)
    linear = LinearFits(data.rows, outcome(event, time), l1_ratio=0.0)
    assert linear.rows.shape[1] < 40
    some = np.arange(5, 40)
    found = linear.expanded(linear.fit(some, 0.1))
    direct = fit_cox(data.rows.numpy()[some], event[some], time[some], ridge=0.1).candidate
    np.testing.assert_allclose(found, direct, atol=1e-7)


@pytest.mark.parametrize("strength", [0.0, 0.1])
def test_constant_columns_get_no_coefficient(strength: float) -> None:
    table, event, time = simulate_table(80, seed=8)
    table = np.column_stack([table, np.full(80, 3.0), np.full(80, np.nan)])
    data = training_rows(table, standardisation(moments(table)), EncoderSpec())
    linear = LinearFits(data.rows, outcome(event, time), l1_ratio=0.0)
    found = linear.fit(np.arange(80), strength)
    np.testing.assert_array_equal(found[-2:], [0.0, 0.0])
    assert np.abs(found[:4]).min() > 0.1


def test_columns_that_repeat_others_need_a_ridge() -> None:
    table, event, time = simulate_table(80, seed=9)
    table = np.column_stack([table, table[:, 0]])
    with pytest.raises(TrainingDiverged, match="no finite optimum"):
        _choose((table, event, time), EncoderSpec(ridge=(0.0,), model="mlp"))
    assert _choose((table, event, time), EncoderSpec(ridge=(0.0, 0.1))).spec.ridge == (0.1,)


@pytest.mark.parametrize("seed", range(5))
def test_inner_folds_share_events_and_strata_evenly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    event, strata = rng.random(50) < 0.3, rng.integers(0, 4, 50)
    event[:4] = True
    folds = inner_folds(outcome(event, np.ones(50), strata=strata), 3, seed)
    for rows in (event, ~event, *(event & (strata == s) for s in range(4))):
        counts = np.bincount(folds[rows], minlength=3)
        assert counts.max() - counts.min() <= 1


@given(seed=st.integers(0, 1000), tied=st.booleans())
@settings(max_examples=15, deadline=None)
def test_search_ignores_the_scale_of_columns_and_of_time(seed: int, *, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(60, 4))
    event, time = simulate_survival(table[:, 0], rng, round_days=300.0 if tied else 1.0)
    event[:6] = True
    spec = EncoderSpec()
    one = _choose((table, event, time), spec)
    other = _choose((table * [1, 10, 1e-3, 1e4] + 7, event, 3 * time), spec)
    losses = [[trial["loss"] for trial in choice.history["tried"]] for choice in (one, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
