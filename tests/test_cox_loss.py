"""The loss of networks: its invariances, and the formula written apart from it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.cox_loss import TrainingDiverged, cox_loss, outcome
from fusion.survival import cox_sums
from tests.simulated import simulate_survival


@given(seed=st.integers(0, 10_000), constant=st.floats(-20, 20), tied=st.booleans())
@settings(max_examples=30, deadline=None)
def test_loss_ignores_order_and_constants(seed: int, constant: float, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    log_hazard = torch.from_numpy(rng.normal(size=30))
    event, time = simulate_survival(np.zeros(30), rng, round_days=400.0 if tied else 1e-6)
    event[0] = True
    strata = rng.integers(0, 3, 30)
    order = rng.permutation(30)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Ties in")
        loss = cox_loss(log_hazard, outcome(event, time, strata=strata))
        moved = cox_loss(
            log_hazard[order] + constant, outcome(event[order], time[order], strata=strata[order])
        )
    torch.testing.assert_close(moved, loss, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("round_days", [1e-6, 300.0], ids=["no ties", "ties"])
@pytest.mark.parametrize("with_strata", [False, True])
@pytest.mark.filterwarnings("ignore:Ties in")
def test_loss_and_gradient_match_an_independent_formula(
    round_days: float, with_strata: bool
) -> None:
    rng = np.random.default_rng(7)
    x, beta = rng.normal(size=(60, 4)), rng.normal(size=4)
    event, time = simulate_survival(x @ beta, rng, round_days=round_days)
    strata = rng.integers(0, 3, 60) if with_strata else None
    weights = torch.from_numpy(beta).requires_grad_()
    loss = cox_loss(torch.from_numpy(x) @ weights, outcome(event, time, strata=strata))
    loss.backward()
    sums = cox_sums(x, event, time, beta, strata=strata)
    np.testing.assert_allclose(loss.item(), -sums.log_likelihood / 60, rtol=1e-5)
    np.testing.assert_allclose(weights.grad.numpy(), -sums.gradient / 60, atol=1e-5)


@pytest.mark.parametrize("censored_first", [True, False])
def test_patient_censored_on_the_day_of_an_event_was_at_risk(censored_first: bool) -> None:
    event = np.array([False, True]) if censored_first else np.array([True, False])
    loss = cox_loss(torch.zeros(2), outcome(event, np.array([5.0, 5.0])))
    np.testing.assert_allclose(float(loss), np.log(2) / 2, rtol=1e-6)


def test_loss_that_is_not_finite_has_a_name() -> None:
    of = outcome([True, True, False], [1.0, 2.0, 3.0])
    with pytest.raises(TrainingDiverged, match="log hazard: found"):
        cox_loss(torch.tensor([0.0, torch.nan, 1.0]), of)
