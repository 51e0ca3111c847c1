from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from flows.demo import write_consortium
from flows.memory import read_tables, read_workspace, run_in_memory
from flows.protocol import load_protocol
from infra.settings import Workspace

if TYPE_CHECKING:
    from pathlib import Path

    from flows.records import Reference
    from fusion.federation import Fitted

SITES = (100, 90, 20)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consortium")
    write_consortium(folder, SITES, seed=3, tables_only=True)
    return folder


def run(root: Path) -> tuple[Fitted, Reference]:
    protocol, inputs, truth = read_workspace(Workspace(root=root))
    return run_in_memory(protocol, inputs, true_log_hazard=truth)


def test_a_workspace_of_tables_is_read_whole(root: Path) -> None:
    protocol, inputs, truth = read_workspace(Workspace(root=root))
    assert [len(x.time) for x in inputs.values()] == list(SITES)
    assert [x.trains for x in inputs.values()] == [True, True, False]
    for site, found in inputs.items():
        assert set(found.modalities) <= set(protocol.modalities)
        assert set(found.patient_ids) <= set(truth[site])


def test_two_runs_agree_bit_for_bit(root: Path) -> None:
    (fitted, reference), (again, same) = run(root), run(root)
    for arm, model in fitted.models.items():
        np.testing.assert_array_equal(model.coefficients, again.models[arm].coefficients)
    assert reference == same


def test_a_modality_that_a_site_lacks_is_left_out(tmp_path: Path) -> None:
    write_consortium(tmp_path, (20,), seed=3, tables_only=True)
    manifest = tmp_path / "site-01" / "manifest.csv"
    lines = [x for x in manifest.read_text().splitlines() if ",omics," not in x]
    manifest.write_text("\n".join(lines) + "\n")
    protocol = load_protocol(tmp_path / "study.toml")
    found = read_tables(Workspace(root=tmp_path).site("site-01"), protocol)
    assert "omics" not in found.modalities
    assert json.loads((tmp_path / "truth.json").read_text())
