"""Gates: what passes, what fails, what does not apply, and that nothing passes by absence."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from flows.gates import (
    Champion,
    Figure,
    GateInput,
    GateResult,
    Quorum,
    all_gates,
    all_pass,
    difference,
    epsilon_of_run,
    failed,
    figure,
    gates_digest,
    gates_table,
)
from flows.policy import POLICY_FILE, PolicyError, read_policy, rules_of
from flows.protocol import GateSection
from flows.record_values import record_values
from fusion.federation.private_fitting import schedule
from tests.simulated_record import bare_record, full_record, study_protocol

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.border

AT = datetime(2026, 11, 2, tzinfo=UTC)


def values(record: Any = None) -> dict[str, Any]:
    written = record_values(record or full_record(), created=AT)
    return json.loads(json.dumps(written, allow_nan=False))


RECORD = values()


def arm(**changes: Any) -> dict[str, Any]:
    """Give a copy of the record with figures of the protocol's arm replaced."""
    record = json.loads(json.dumps(RECORD))
    record["results"]["arms"]["protocol"] |= changes
    return record


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "standard_error": (high - low) / 3.92, "low": low, "high": high}


def of(name: str, record: dict[str, Any] | None = None, **options: Any) -> GateResult:
    given_input = GateInput(RECORD if record is None else record, **options)
    return next(x for x in all_gates(given_input) if x.name == name)


def good(**options: Any) -> GateInput:
    return GateInput(RECORD, **{"signature_fault": "", **options})


def test_a_good_simulated_run_passes_with_reasons_for_what_does_not_apply() -> None:
    results = all_gates(good())
    assert all_pass(results)
    assert {x.name for x in results if x.passed is None} == {
        "champion", "membership_audit", "privacy_budget", "minimum_counts", "approvals",
    }  # fmt: skip
    assert all(x.sentence for x in results)


def test_a_run_of_patients_data_without_figures_fails_wherever_a_figure_is_needed() -> None:
    results = all_gates(GateInput(values(bare_record())))
    assert set(failed(results)) == {
        "test_events", "concordance", "calibration_slope", "observed_expected",
        "leave_one_site_out", "signature", "approvals",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["concordance", "calibration_slope", "observed_expected"])
@pytest.mark.parametrize("key", ["value", "standard_error", "low", "high"])
def test_a_figure_with_a_part_missing_fails(name: str, key: str) -> None:
    broken = {**RECORD["results"]["arms"]["protocol"][name], key: None}
    found = of(name, arm(**{name: broken}))
    assert found.passed is False
    assert "found no such figure" in found.sentence


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=4))
def test_whatever_stands_for_a_figure_is_one_or_nothing(found: Any) -> None:
    assert figure(found) is None
    assert figure({"value": found, "standard_error": 0.1, "low": 0.1, "high": 0.2}) is None or (
        isinstance(found, float | bool)
    )


def test_the_lower_end_of_the_interval_counts_for_concordance() -> None:
    assert of("concordance", arm(concordance=interval(0.62, 0.5, 0.74))).passed
    assert of("concordance", arm(concordance=interval(0.62, 0.499, 0.741))).passed is False


@pytest.mark.parametrize(
    ("slope", "passed"),
    [
        (interval(0.75, 0.6, 0.9), True),  # within bounds, though surely below 1
        (interval(0.6, 0.1, 1.1), True),  # cannot be told from 1
        (interval(0.6, 0.3, 0.9), False),
        (interval(1.6, 1.2, 2.0), False),
    ],
)
def test_a_slope_is_within_bounds_or_cannot_be_told_from_one(
    slope: dict[str, float], passed: bool
) -> None:
    assert of("calibration_slope", arm(calibration_slope=slope)).passed is passed


@pytest.mark.parametrize(
    ("ratio", "passed"), [(0.66, False), (0.67, True), (1.5, True), (2, False)]
)
def test_events_are_neither_far_more_nor_far_fewer_than_expected(
    ratio: float, passed: bool
) -> None:
    found = of("observed_expected", arm(observed_expected=interval(ratio, ratio / 2, ratio * 2)))
    assert found.passed is passed


def champion(value: float, *, error: float = 0.02, same: bool = True) -> Champion:
    low, high = value - 1.96 * error, value + 1.96 * error
    return Champion(3, Figure(value, error, low, high), same_evaluation=same)


@pytest.mark.parametrize(
    ("other", "passed"),
    [
        (champion(0.73), True),
        (champion(0.7549), True),  # 0.0198 better: within what may be lost
        (champion(0.7552), False),
        (champion(0.74, error=1e-4), True),
    ],
)
def test_a_champion_may_be_better_by_little(other: Champion, passed: bool) -> None:
    assert of("champion", champion=other).passed is passed


def test_a_small_loss_that_is_sure_fails_too() -> None:
    record = arm(concordance=interval(0.73, 0.7298, 0.7302))
    assert of("champion", record, champion=champion(0.74, error=1e-4)).passed is False


def test_a_comparison_on_other_snapshots_says_so() -> None:
    assert "on the same snapshots" in of("champion", champion=champion(0.7)).sentence
    assert "on other snapshots" in of("champion", champion=champion(0.7, same=False)).sentence


def test_a_champion_without_a_figure_is_no_reason_to_pass() -> None:
    assert of("champion", champion=Champion(3, None, same_evaluation=False)).passed is False


def test_a_difference_has_the_interval_of_independent_figures() -> None:
    found = difference(Figure(0.7, 0.03, 0, 1), Figure(0.6, 0.04, 0, 1))
    assert (found.value, found.standard_error) == pytest.approx((0.1, 0.05))
    assert (found.low, found.high) == pytest.approx((0.1 - 0.098, 0.1 + 0.098), abs=1e-4)


def test_leaving_sites_out_needs_the_worst_and_all() -> None:
    assert of("leave_one_site_out").passed
    record = json.loads(json.dumps(RECORD))
    record["results"]["left_out"][1]["concordance"] = interval(0.49, 0.4, 0.6)
    assert of("leave_one_site_out", record).passed is False
    record["results"]["left_out_pooled"] = None
    assert of("leave_one_site_out", record).found == "none"


@pytest.mark.parametrize(
    ("data", "sums", "passed"),
    [
        ("simulated", "plain", None),
        ("public", "plain", None),
        ("patients", "plain", False),
        ("patients", "secure_sum", None),
    ],
)
def test_the_policy_says_where_leaving_sites_out_may_be_missing(
    data: str, sums: str, passed: bool | None
) -> None:
    record = json.loads(json.dumps(RECORD))
    record["protocol"]["evaluation"]["leave_one_site_out"] = False
    record["protocol"]["study"]["data"] = data
    record["protocol"]["federation"]["sums"] = sums
    record["protocol"]["privacy"]["cell"] = 10
    assert of("leave_one_site_out", record).passed is passed


def networks() -> dict[str, Any]:
    """Give a record of patients' data whose radiology network is shared as weights."""
    record = json.loads(json.dumps(RECORD))
    protocol = study_protocol(
        study={"name": "lung-os", "data": "patients", "horizon_days": 730, "grid_days": (365, 730)},
        encoder={"radiology": {"sharing": "weights", "model": "mlp"}},
        federation={"sums": "secure_sum"},
        evaluation={},
        privacy={},
    )
    return record | {"protocol": protocol.values(), "lowered_minimums": []}


def test_networks_need_every_site_s_own_passed_audit() -> None:
    record = networks()
    sites = ("site-01", "site-02", "site-03")
    passed = {"radiology": dict.fromkeys(sites, True)}
    assert of("membership_audit", record).passed is False
    assert of("membership_audit", record, audits=passed).passed
    assert of("membership_audit", record, enforced=True).passed
    one = {"radiology": {**passed["radiology"], "site-02": False}}
    found = of("membership_audit", record, audits=one, enforced=True)
    assert found.passed is False
    assert "radiology at site-02" in found.sentence


def test_a_run_s_releases_spend_its_budget_and_no_more() -> None:
    record = json.loads(json.dumps(RECORD))
    protocol = study_protocol(differential_privacy={"epsilon": 3.0}, evaluation={})
    found = of("privacy_budget", record | {"protocol": protocol.values()})
    assert found.passed
    assert found.found == pytest.approx(3.0, rel=0.02)


@pytest.mark.parametrize("epsilon", [0.5, 3.0])
def test_what_a_run_spends_is_that_of_all_its_releases_together(epsilon: float) -> None:
    """Precisions of Gaussian releases add; Balle and Wang (2018), theorem 8, gives the rest."""
    protocol = study_protocol(differential_privacy={"epsilon": epsilon}, evaluation={})
    plan = protocol.plan("a" * 64)
    of = schedule(plan.budget, plan.private_fits)
    n_steps = of.steps * len(of.fits)
    noise = (1 / of.opening**2 + n_steps / of.step**2 + 1 / of.baseline**2) ** -0.5

    def too_much(spent: float) -> float:
        ends = (0.5 / noise - spent * noise, -0.5 / noise - spent * noise)
        return float(norm.cdf(ends[0]) - np.exp(spent) * norm.cdf(ends[1]) - plan.budget.delta)

    known = brentq(too_much, 0.0, 50.0, xtol=1e-9)
    record = RECORD | {"protocol": protocol.values()}
    assert epsilon_of_run(record) == pytest.approx(known, rel=0.01)


def test_minimum_counts_are_not_lowered_for_patients_data() -> None:
    record = json.loads(json.dumps(RECORD))
    assert of("minimum_counts", record).passed is None  # simulated, and it says so
    record["protocol"]["study"]["data"] = "patients"
    assert of("minimum_counts", record).passed is False
    assert of("minimum_counts", record | {"lowered_minimums": []}).passed
    assert of("minimum_counts", record | {"lowered_minimums": None}).passed is False


def test_approvals_reach_the_quorum() -> None:
    assert of("approvals", approvals=Quorum(3, 3)).passed
    assert of("approvals", approvals=Quorum(2, 3)).passed is False


def test_thresholds_are_the_study_s_own_where_it_gives_them() -> None:
    policy = read_policy()
    assert rules_of(study_protocol(), policy) == policy.gates
    own = rules_of(study_protocol(gates={"min_sites": 4}), policy)
    assert own == policy.gates.model_copy(update={"min_sites": 4})
    assert of("sites", rules=own).passed is False


def test_the_digest_is_of_what_was_found() -> None:
    results = all_gates(good())
    assert gates_digest(results) == gates_digest(all_gates(good()))
    other = all_gates(good(champion=champion(0.7)))
    assert gates_digest(results) != gates_digest(other)


def test_the_table_shows_each_gate_and_names_what_failed() -> None:
    results = all_gates(GateInput(RECORD))
    table = gates_table(results)
    assert table.count("\n| ") == len(results) + 1
    assert "| signature | **failed** |" in table
    assert "- signature: the model has no signature" in table


def test_the_policy_s_defaults_are_the_protocol_s() -> None:
    assert read_policy().gates == GateSection()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gates": 3}, "needed YAML with gates"),
        ({"promotion": {"quorum": 0}}, "promotion.quorum"),
        ({"monitoring": {"max_shif": 1}}, "monitoring.max_shif"),
    ],
)
def test_a_faulty_policy_is_named(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    policy = yaml.safe_load(POLICY_FILE.read_text())
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(policy | change))
    with pytest.raises(PolicyError, match=sentence):
        read_policy(tmp_path / "registry.yaml")


def test_a_missing_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="found none beside the package"):
        read_policy(tmp_path / "registry.yaml")
