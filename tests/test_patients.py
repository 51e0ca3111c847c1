"""What a site keeps of its own patients: on its own disk, for its own eyes."""

from __future__ import annotations

import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from flows.inputs import SiteInputs
from flows.patients import patient_table, write_patient_table
from fusion.federation import PROTOCOL, Fitted, InProcess, SiteStudy, run_federation
from tests.consortium import ANY_CELL, small, studies_of

if TYPE_CHECKING:
    from pathlib import Path

SITE = "site-01"


@pytest.fixture(scope="module", params=["cox", "logistic_hazard", "gated"])
def fit(request: pytest.FixtureRequest) -> tuple[SiteInputs, SiteStudy, Fitted]:
    rows = small()
    found = rows[SITE]
    for split in (*found.tables.values(), *found.local.values()):
        split.test[3] = np.nan  # one test patient has no modality at all
    plan = replace(ANY_CELL, fusion_model=request.param, **_gates(request.param))
    studies = studies_of(rows, plan)
    fitted = run_federation(plan, InProcess(studies))
    n_train, n_test = len(found.train), len(found.test)
    # The cohort's order is not that of the split.
    train = np.random.default_rng(0).permutation(np.arange(n_train + n_test) < n_train)
    inputs = SiteInputs(
        site=SITE,
        cohort="0" * 64,
        patient_ids=np.array([f"p{i:03d}" for i in range(n_train + n_test)]),
        event=np.zeros(n_train + n_test, dtype=bool),
        time=np.ones(n_train + n_test),
        train=train,
        folds=np.zeros(n_train + n_test, dtype=np.int64),
        modalities={},
    )
    return inputs, studies[SITE], fitted


def _gates(model: str) -> dict[str, object]:
    from fusion.federation import AveragingPlan
    from fusion.late.gated import initial_gated_weights

    if model != "gated":
        return {}
    start = initial_gated_weights(np.zeros(6), hidden=2)
    return {"gating": AveragingPlan(start, rounds=4, local_steps=2), "gating_hidden": 2}


def test_each_patient_has_a_risk_and_its_parts(
    fit: tuple[SiteInputs, SiteStudy, Fitted],
) -> None:
    inputs, study, fitted = fit
    model = fitted.models[PROTOCOL]
    table = patient_table(inputs, study, model, horizon_days=1095.0)
    assert list(table.columns) == [
        "split", "log_hazard", "standard_error", "risk_by_1095_days",
        "contribution_pathology", "contribution_radiology", "contribution_clinical",
    ]  # fmt: skip
    assert table.index.name == "patient_id"
    assert list(table.index) == list(inputs.patient_ids)
    assert (table["split"] == np.where(inputs.train, "train", "test")).all()
    parts = table.filter(like="contribution_").sum(axis=1, min_count=3)
    np.testing.assert_allclose(parts, table["log_hazard"], atol=1e-12)
    of_test = table[~inputs.train]
    assert of_test.drop(columns="split").iloc[3].isna().all()
    known = table["log_hazard"].notna()
    assert known.sum() == len(table) - 1
    assert table["risk_by_1095_days"][known].between(0.0, 1.0).all()
    assert (
        table["log_hazard"][known].corr(table["risk_by_1095_days"][known], method="spearman")
        > 0.999
    )
    columns = study.columns(PROTOCOL)
    np.testing.assert_allclose(table.loc[inputs.train, "log_hazard"], model.predict(columns.train))
    np.testing.assert_allclose(of_test["log_hazard"], model.predict(columns.test))
    surviving = model.predict_survival_function(columns.test, [1095.0])[:, 0]
    np.testing.assert_allclose(of_test["risk_by_1095_days"], 1.0 - surviving)


def test_only_the_site_can_read_its_file(tmp_path: Path) -> None:
    table = pd.DataFrame({"risk": [0.25]}, index=pd.Index(["p1"], name="patient_id"))
    target = tmp_path / "runs" / "patients.csv"
    for _ in range(2):
        write_patient_table(table, target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o600
    pd.testing.assert_frame_equal(pd.read_csv(target, index_col="patient_id"), table)
    assert [x.name for x in target.parent.iterdir()] == ["patients.csv"]
