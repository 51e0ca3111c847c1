from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flows.demo import write_consortium
from flows.memory import fit_in_memory, read_workspace
from flows.reference import arm_log_hazard, compare, local_log_hazard, max_coefficient_gap
from flows.summary import comparison
from infra.settings import Workspace

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from flows.records import Reference
    from flows.reference import Consortium
    from fusion.federation import Fitted

ARMS = {"federated", "federated_local_encoders", "pooled"}


@pytest.fixture(scope="module")
def fit(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Consortium, Fitted, Mapping[str, Mapping[str, float]]]:
    folder = tmp_path_factory.mktemp("consortium")
    write_consortium(folder, (110, 100, 25), seed=5, tables_only=True)
    protocol, inputs, truth = read_workspace(Workspace(root=folder))
    return *fit_in_memory(protocol, inputs), truth


@pytest.fixture(scope="module")
def reference(
    fit: tuple[Consortium, Fitted, Mapping[str, Mapping[str, float]]],
) -> Reference:
    consortium, fitted, truth = fit
    return compare(consortium, fitted, true_log_hazard=truth)


def test_federated_coefficients_are_the_pooled_ones(fit, reference: Reference) -> None:
    consortium, fitted, _ = fit
    assert 0 <= reference.max_coefficient_gap < 1e-6
    assert reference.max_coefficient_gap == max_coefficient_gap(consortium, fitted)


def test_every_arm_scores_every_test_patient(fit) -> None:
    consortium, fitted, _ = fit
    arms = arm_log_hazard(consortium, fitted)
    assert set(arms) == ARMS
    for by_site in arms.values():
        assert list(by_site) == list(consortium.inputs)
        for site, scores in by_site.items():
            assert scores.shape == ((~consortium.inputs[site].train).sum(),)
            assert np.isfinite(scores).all()


def test_there_is_one_local_model_per_training_site(fit, reference: Reference) -> None:
    consortium = fit[0]
    training = [site for site, found in consortium.inputs.items() if found.trains]
    assert len(training) == 2
    assert list(reference.local) == training == list(local_log_hazard(consortium))
    values = [e.value for e in reference.local.values()]
    assert reference.local_mean == pytest.approx(np.mean(values))


def test_the_true_hazard_is_an_arm_only_where_known(fit, reference: Reference) -> None:
    assert set(reference.concordance) == ARMS | {"true_hazard"}
    assert set(compare(*fit[:2]).concordance) == ARMS
    assert reference.concordance["true_hazard"].value > 0.6
    assert all(0 < e.value < 1 for e in reference.concordance.values())


def test_a_modality_that_too_few_patients_have_anywhere_is_absent_from_every_arm(
    tmp_path: Path,
) -> None:
    write_consortium(tmp_path, (110, 100), seed=5, tables_only=True)
    protocol, inputs, _ = read_workspace(Workspace(root=tmp_path))
    for found in inputs.values():
        omics = found.modalities["omics"]
        found.modalities["omics"] = replace(omics, rows=omics.rows[:2], values=omics.values[:2])
    consortium, fitted = fit_in_memory(protocol, inputs)
    assert "omics" not in fitted.encoders
    for by_site in arm_log_hazard(consortium, fitted).values():
        assert all(np.isfinite(scores).all() for scores in by_site.values())
    assert compare(consortium, fitted).max_coefficient_gap < 1e-6


def test_a_comparison_is_plain_values(reference: Reference) -> None:
    found = comparison(reference)
    assert found["concordance"]["federated"] == reference.concordance["federated"].value
    assert set(found["intervals"]) == {
        *reference.concordance, *(f"local_{site}" for site in reference.local),
    }  # fmt: skip
