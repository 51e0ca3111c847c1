"""A study over the federation engine, encrypted and masked: the very model of one process."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flows.gate import PRIVACY
from fusion import messages as m
from fusion.differential_privacy import Budget, PrivacyLedger
from fusion.federation import PROTOCOL, QuorumNotMet, run_federation
from infra.settings import STUDY_FILE, Workspace
from tests import federated, test_canary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
    assert first["max_coefficient_gap"] <= 1e-6  # to an independent fit of all rows
    assert len(first["round_s"]) == first["messages"]
    assert first["engine_round_s"] > 0
    assert (first["reused"], again["reused"]) == (False, True)
    assert again["run"] == first["run"]
    assert again["coefficients"] == first["coefficients"]


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Run the demonstration over the engine as people type it; give its folder and its JSON."""
    with federated.plain_folder() as folder:
        done = subprocess.run(
            [
                *(sys.executable, "-W", "ignore", "-c", "from flows.cli import main; main()"),
                *("demo", "--tables-only", "--federation", "flare", "--json"),
                *("--sites", ",".join(map(str, federated.SIZES)), "--out", str(folder / "demo")),
            ],
            capture_output=True, text=True, timeout=500, check=False, cwd=folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        yield folder / "demo", json.loads(done.stdout)


def test_the_demonstration_over_the_engine_is_that_of_one_process(
    demo: tuple[Path, dict[str, Any]],
) -> None:
    from flows.links import InMemory
    from flows.protocol import load_protocol
    from flows.reference import max_coefficient_gap

    root, said = demo
    workspace, protocol = Workspace(root=root), load_protocol(root / STUDY_FILE)
    inside = InMemory(workspace, protocol, tuple(workspace.site_names()))
    plan = protocol.plan(inside.run_key())
    inside.open(plan)
    expected = run_federation(plan, inside)
    consortium = inside.consortium()
    assert consortium is not None
    assert said["run"] == plan.run
    np.testing.assert_allclose(
        said["coefficients"], expected.models[PROTOCOL].coefficients, atol=1e-8, rtol=0
    )
    gap = max_coefficient_gap(consortium, expected)
    assert abs(said["max_coefficient_gap"] - gap) <= 1e-8


def test_the_demonstration_over_the_engine_tells_its_rounds_and_that_sums_were_secure(
    demo: tuple[Path, dict[str, Any]],
) -> None:
    _, said = demo
    assert (said["federation"], said["sums"], said["n_training_sites"]) == (
        "flare", "secure_sum", 3,
    )  # fmt: skip
    assert len(said["round_s"]) == said["messages"] >= 30
    assert all(isinstance(x, float) for x in (*said["round_s"], said["engine_round_s"]))
    assert {"simulate", "prepare", "train", "connect", "study", "total"} <= said["wall_s"].keys()


def test_a_budget_is_spent_once_over_the_engine_and_the_next_run_gets_nothing(
    parties: Loopback,
) -> None:
    budget = Budget(epsilon=3.0)
    noisy = f"[differential_privacy]\nepsilon = {budget.epsilon}\n"
    with federated.another_study(parties, more=noisy) as study, study.link() as link:
        plan = study.protocol.plan(link.run_key())
        first = run_federation(plan, link)
        ledgers = [study.root / site / PRIVACY for site in parties.sites]
        for path in ledgers:
            spent = PrivacyLedger(path, epsilon=budget.epsilon, delta=budget.delta).spent()
            assert 2.9 < spent <= budget.epsilon
        kept = [path.read_bytes() for path in ledgers]
        link.again(plan.run)  # in new processes
        again = run_federation(plan, link)
        with pytest.raises(QuorumNotMet):
            run_federation(study.protocol.plan("e" * 64), link)
        assert [path.read_bytes() for path in ledgers] == kept
    assert set(first.models) == set(again.models)
    for arm, model in first.models.items():
        np.testing.assert_allclose(
            again.models[arm].coefficients, model.coefficients, atol=1e-10, rtol=0
        )
