"""A study over the federation engine, encrypted and masked: the very model of one process."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import numpy as np
import pytest

from fusion import messages as m
from tests import federated, test_canary

if TYPE_CHECKING:
    from tests.federated import Clean, Loopback
    from tests.test_canary import Finished

pytestmark = [pytest.mark.border, pytest.mark.slow]


@pytest.fixture(scope="module")
def parties(request: pytest.FixtureRequest) -> Loopback:
    return federated.shared(request.config, "parties", federated.running)


@pytest.fixture(scope="module")
def clean(request: pytest.FixtureRequest, parties: Loopback) -> Clean:
    return federated.shared(request.config, "clean", lambda: federated.undisturbed(parties))


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest) -> Finished:
    return federated.shared(request.config, "whole study", test_canary.whole_study)


def test_masked_sums_over_the_engine_give_the_coefficients_of_one_process(clean: Clean) -> None:
    gaps = []
    for arm, model in clean.over_engine.models.items():
        expected = clean.in_process.models[arm]
        gaps.append(float(np.abs(model.coefficients - expected.coefficients).max()))
        np.testing.assert_allclose(model.baseline, expected.baseline, atol=1e-8, rtol=0)
    for name, encoder in clean.over_engine.encoders.items():
        expected = clean.in_process.encoders[name]
        gaps.append(float(np.abs(encoder.coefficients - expected.coefficients).max()))
    print(f"largest gap {max(gaps):.2g} over {len(gaps)} fits")  # noqa: T201
    assert max(gaps) <= 1e-8
    assert clean.over_engine.evaluations.keys() == clean.in_process.evaluations.keys()


def test_every_round_is_recorded_with_its_seconds_and_bytes(clean: Clean) -> None:
    rounds = clean.rounds
    assert [r.number for r in rounds] == list(range(1, len(rounds) + 1))
    assert [r.stage for r in rounds] == [r.stage for r in clean.in_process.rounds]
    assert all(r.n_sites == 3 and r.seconds > 0 and r.bytes_received > 0 for r in rounds)
    median_s = statistics.median(r.seconds for r in rounds)
    print(  # noqa: T201
        f"{len(rounds)} rounds, {1 / median_s:.1f} a second; engine alone "
        f"{1 / clean.engine_round_s:.1f} a second"
    )


def test_only_totals_of_three_sites_reach_the_coordinator(clean: Clean) -> None:
    (heard,) = clean.overheard
    alone = (m.DesignMoments, m.Products, m.Updates, m.Intervals, m.PrivateSteps)
    replies = [reply for _, of_sites in heard for reply in of_sites.values()]
    assert not any(isinstance(reply, alone) for reply in replies)
    assert sum(isinstance(reply, m.Masked) for reply in replies) >= 3 * 15
    told = {x for r, of in heard if any(isinstance(y, m.Sums) for y in of.values()) for x in r.fits}  # type: ignore[union-attr]
    assert told <= {"calibration_slope"}  # of test rows, which are each site's own


def test_the_sites_files_never_leave_their_folders_open_to_others(parties: Loopback) -> None:
    private = [
        parties.root / site / name
        for site in parties.sites
        for name in ("identity.key", "answered.jsonl", "audit.jsonl")
    ]
    assert not [p.name for p in private if p.stat().st_mode & 0o077]


def test_a_run_has_the_same_name_over_the_engine_and_in_one_process(
    clean: Clean, parties: Loopback
) -> None:
    from flows.links import InMemory

    inside = InMemory(parties.workspace, parties.protocol, parties.sites)
    assert clean.run == inside.run_key()


def test_a_whole_study_over_the_engine_is_that_of_pooled_rows_and_not_done_twice(
    finished: Finished,
) -> None:
    first, again = finished.said
    assert (first["federation"], first["sums"]) == ("flare", "secure_sum")
    assert first["max_coefficient_gap"] <= 1e-6
    assert len(first["round_s"]) == first["messages"]
    assert first["engine_round_s"] > 0
    assert (first["reused"], again["reused"]) == (False, True)
    assert again["run"] == first["run"]
    assert again["coefficients"] == first["coefficients"]
