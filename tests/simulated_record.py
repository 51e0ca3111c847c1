"""Records of made-up runs that several test files share: one with every figure, one with few."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flows.protocol import StudyProtocol, read_protocol
from flows.records import Reference, StudyRecord
from fusion import messages as m
from fusion.evaluation import (
    Calibration,
    Estimate,
    Estimates,
    Heterogeneity,
    HomogeneityTest,
    LogRankTest,
    NetBenefit,
)
from fusion.federation import (
    LOCAL_ENCODERS,
    LOCAL_ONLY,
    PROTOCOL,
    ArmResult,
    Fitted,
    RoundRecord,
    SiteOutcome,
)
from fusion.federation.alarms import SiteAlarm
from fusion.federation.plan import PERSONALISED, without
from fusion.federation.results import (
    LeftOutSite,
    StudyResults,
    SubgroupResult,
    TreatmentResult,
)
from fusion.late import CoxModel, LinearEncoder

GRID_DAYS = (365.0, 730.0, 1095.0, 1825.0)
RUN = "a1" * 32
MODALITIES = ("clinical", "pathology", "radiology")
N_GROUPS = 3


def study_protocol(**sections: Any) -> StudyProtocol:
    return read_protocol(
        {
            "study": {
                "name": "lung-os", "data": "simulated", "horizon_days": 1095,
                "grid_days": GRID_DAYS,
            },
            "modality": {
                "pathology": {"kind": "pathology"},
                "radiology": {"kind": "tabular", "columns": ["volume", "entropy"]},
                "clinical": {
                    "kind": "clinical", "numeric": ["age"],
                    "categorical": {"sex": ["female", "male"], "therapy": ["surgery", "both"]},
                },
            },
            "evaluation": {
                "subgroups": {"sex": [], "age": [60.5]}, "treatment": "therapy",
                "leave_one_site_out": True,
            },
            "privacy": {"cell": 1},
            **sections,
        }
    )  # fmt: skip


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value, half / 1.96, value - half, value + half)


def estimates(value: Any, half: float = 0.05) -> Estimates:
    values = np.asarray(value, dtype=np.float64)
    return Estimates(values, np.full(values.shape, half / 1.96), values - half, values + half)


def sites() -> tuple[SiteOutcome, ...]:
    return (
        SiteOutcome("site-01", "c1" * 32, 210, 121, 90, 54, trains=True, contributes=MODALITIES),
        SiteOutcome("site-02", "c2" * 32, 126, 71, 54, 30, trains=True, contributes=MODALITIES),
        SiteOutcome(
            "site-03", "c3" * 32, 98, 50, 42, 22, trains=True, contributes=("clinical", "radiology")
        ),
        SiteOutcome("site-04", "c4" * 32, 0, 0, 60, 33),
        SiteOutcome("site-05", code="below_minimum_events"),
    )  # fmt: skip


def cox_model() -> CoxModel:
    return CoxModel(
        modalities=MODALITIES,
        mean=np.array([0.0113, -0.021, 0.1 / 3]),
        scale=np.array([0.7071, 1.0, 0.93]),
        coefficients=np.array([0.412, 0.203, 0.633, 0.0, 0.151, -0.082]),
        covariance=np.diag([0.0061, 0.0078, 0.0054, 0.02, 0.031, 0.028]),
        edges_days=np.array(GRID_DAYS),
        hazard_per_day=np.array([4.1e-4, 4.8e-4, 5.3e-4, 5.0e-4]),
    )


def linear_encoder(name: str, inputs: tuple[str, ...], *, cross_fitted: bool) -> LinearEncoder:
    n = len(inputs)
    return LinearEncoder(
        modality=name, inputs=inputs, mean=np.linspace(1.5, 60.25, n), scale=np.linspace(2, 9.5, n),
        coefficients=np.linspace(-0.31, 0.42, n), cross_fitted=cross_fitted,
    )  # fmt: skip


def evaluation(plan: Any, n_test: int) -> m.Evaluation:
    """Give one site's sums with a life table of its own and zeros elsewhere."""
    hints = {f: s.__metadata__[0].dims for f, s in m._HINTS["Evaluation"].items() if s is not int}
    k = len(plan.edges_days)
    sizes = {
        "scored": len(plan.scored), "pair_sums": 9, "modalities": 3, "main_arms": 2,
        "predicted": 3, "brier_sums": 2 * k + 2, "life_cells": N_GROUPS * k * 3,
        "calibration_cells": 7 * N_GROUPS, "expected_sums": 3, "levels": plan.n_levels,
        "thresholds": len(plan.thresholds), "decision_sums": 9, "groups": N_GROUPS,
        "treatment_cells": 2 * k * 3,
    }  # fmt: skip
    arrays = {name: np.zeros([sizes[dim] for dim in dims]) for name, dims in hints.items()}
    life = np.zeros((N_GROUPS, k, 3))
    life[:, :, 0] = np.rint(np.outer([n_test / 3] * N_GROUPS, np.linspace(1, 0.2, k)))
    arrays["life_table"][0] = life.ravel()
    return m.Evaluation(n_test=n_test, n_test_events=n_test // 2, **arrays)


def rounds() -> tuple[RoundRecord, ...]:
    stages = [
        "describe",
        "encoder_ridge",
        *["encoders"] * 6,
        *["fusion"] * 5,
        "baseline",
        "evaluation",
    ]
    return tuple(
        RoundRecord(
            i + 1, stage, 3, 8 if stage == "encoders" else 5,
            math.nan if stage in ("describe", "evaluation", "baseline") else -2.5 - 0.5 ** (i - 1),
            5_000 + 100 * i, 48_000 + 10 * i, 0.031,
        )
        for i, stage in enumerate(stages)
    )  # fmt: skip


def heterogeneity() -> Heterogeneity:
    own = np.array(
        [
            [0.44, 0.17, 0.71, math.nan, 0.2, -0.1],
            [0.35, 0.25, 0.52, math.nan, 0.1, -0.05],
            [0.41, math.nan, 0.66, math.nan, math.nan, -0.12],
        ]
    )
    p = own.shape[1]
    known = np.isfinite(own).sum(axis=0) >= 2
    return Heterogeneity(
        *(np.where(known, x, math.nan) for x in (np.full(p, 1.83), np.full(p, 2.0),
          np.full(p, 0.401), np.full(p, 0.12), np.full(p, 0.0), np.full(p, 0.74),
          np.full(p, 0.0031))),
        estimates=own, standard_errors=np.where(np.isfinite(own), 0.15, math.nan),
        test=HomogeneityTest(9.41, 8, 0.309),
    )  # fmt: skip


def results() -> StudyResults:
    training, k = ("site-01", "site-02", "site-03"), len(GRID_DAYS)

    def by_site(shift: float, *, external: bool = False) -> dict[str, Estimate]:
        names = (*training, "site-04") if external else training
        return {x: estimate(0.74 - 0.01 * i - shift, 0.07) for i, x in enumerate(names)}

    protocol = ArmResult(
        arm=PROTOCOL, concordance=estimate(0.7351, 0.034), by_site=by_site(0.0, external=True),
        uno=estimate(0.7213, 0.036), auc=estimate(0.7812, 0.041), brier=estimate(0.1713, 0.012),
        null_brier=estimate(0.2134, 0.011), observed_expected=Estimate(1.043, 0.09, 0.88, 1.23),
        observed_expected_by_site={x: estimate(1.01, 0.22) for x in (*training, "site-04")},
        calibration_slope=Estimate(0.871, 0.1, 0.675, 1.067),
        survival=estimates(np.clip(1 - np.outer([0.08, 0.14, 0.22], np.arange(1, k + 1)), 0, 1)),
        log_rank=LogRankTest(41.27, 2, 1.1e-9),
        calibration=Calibration(
            np.array([0.211, 0.404, 0.667]), estimates([0.235, 0.43, math.nan], 0.08)
        ),
    )  # fmt: skip
    others = {
        LOCAL_ENCODERS: ArmResult(
            LOCAL_ENCODERS, estimate(0.7112), by_site(0.02), estimate(0.024, 0.02)
        ),
        **{
            without(x): ArmResult(without(x), estimate(0.72 - 0.02 * i), by_site(0.02),
                                  estimate(0.004 + 0.02 * i, 0.012))
            for i, x in enumerate(MODALITIES)
        },
        LOCAL_ONLY: ArmResult(LOCAL_ONLY, estimate(0.6713), by_site(0.06), estimate(0.062, 0.04)),
        PERSONALISED: ArmResult(
            PERSONALISED, estimate(0.7361), by_site(0.0), estimate(-0.003, 0.011)
        ),
    }  # fmt: skip
    benefit = np.array([0.31, 0.24, 0.17, 0.11, math.nan])
    return StudyResults(
        arms={PROTOCOL: protocol, **others},
        alone={"clinical": estimate(0.662), "pathology": None, "radiology": estimate(0.691)},
        subgroups=(
            SubgroupResult("age", "below 60.5", 112, 51, estimate(0.74), estimate(1.1, 0.3)),
            SubgroupResult("age", "60.5 and above", 134, 88, estimate(0.71), estimate(0.97, 0.2)),
            SubgroupResult("sex", "female", 120, 66, estimate(0.73), estimate(1.02, 0.25)),
            SubgroupResult("sex", "male", 0, 0, None, None),
        ),
        net_benefit=NetBenefit(
            np.array([0.1, 0.2, 0.3, 0.4, 0.5]), estimates(benefit, 0.04),
            estimates(benefit - [0.01, 0.03, 0.07, 0.12, 0.2], 0.04),
            estimates([0.01, 0.03, 0.07, 0.12, math.nan], 0.02),
            np.array([246.0, 246.0, 204.0, 204.0, 0.0]),
        ),
        treatment=tuple(
            TreatmentResult(
                g, estimates([[0.9, 0.8, 0.7, 0.6], [0.85, 0.72, 0.6, 0.5]]) if g else None,
                LogRankTest(2.1, 1, 0.147) if g else None,
                Estimates(np.array([1.0, 0.81]), np.array([0.0, 0.1]), np.array([1.0, 0.61]),
                          np.array([1.0, 1.08])) if g else None,
            )
            for g in range(N_GROUPS)
        ),
        heterogeneity=heterogeneity(),
        left_out=(
            LeftOutSite("site-01", 300, 175, estimate(0.712), estimate(0.75), estimate(0.95, 0.15)),
            LeftOutSite("site-02", 180, 101, estimate(0.731), estimate(0.77), estimate(1.2, 0.2)),
            LeftOutSite("site-03", 0, 0, None, None, None, code="below_minimum_patients"),
        ),
        left_out_pooled=estimate(0.719, 0.03),
        ridge={"clinical": 0.03, "radiology": 0.1, PROTOCOL: 0.01},
        alarms=(
            SiteAlarm("site-02", "worse_than_own", -2.61),
            SiteAlarm("site-03", "unlike_in_training", -3.42),
        ),
    )  # fmt: skip


def reference() -> Reference:
    arms = {"federated": 0.7351, "federated_local_encoders": 0.71, "pooled": 0.7402,
            "true_hazard": 0.8111}  # fmt: skip
    return Reference(
        concordance={arm: estimate(value) for arm, value in arms.items()},
        by_site={"pooled": {"site-01": estimate(0.75)}},
        local={f"site-0{i}": estimate(0.64 + i / 100) for i in (1, 2, 3)},
        local_mean=0.6611,
        max_coefficient_gap=2.9e-9,
    )


def full_record() -> StudyRecord:
    """Give a run in which every part of a report has something to show."""
    protocol = study_protocol()
    plan = protocol.plan(RUN)
    cox, found = cox_model(), results()
    fitted = Fitted(
        plan=plan,
        sites=sites(),
        models=dict.fromkeys(plan.arms, cox),
        encoders={
            "clinical": linear_encoder("clinical", ("age", "sex=male"), cross_fitted=True),
            "radiology": linear_encoder("radiology", ("volume", "entropy"), cross_fitted=False),
        },
        networks={},
        groups=dict.fromkeys(plan.main_arms, (-0.41, 0.37)),
        heterogeneity=found.heterogeneity,
        evaluations={s.site: evaluation(plan, s.n_test) for s in sites() if s.n_test},
        calibration_slope=found.arms[PROTOCOL].calibration_slope,
        alarms=found.alarms,
        fit_rounds={"clinical": 6, "radiology/0": 5, PROTOCOL: 5},
        ridge=found.ridge,
        rounds=rounds(),
        n_patients=434,
        n_events=242,
    )  # fmt: skip
    return StudyRecord(
        RUN, protocol, fitted, found, "0f" * 20, reference(), {"federation": 3.21, "load": 0.4}
    )


def bare_record() -> StudyRecord:
    """Give a run on patients' data of which nothing but the fit could be released."""
    protocol = study_protocol(
        study={
            "name": "lung-os", "data": "patients", "horizon_days": 730, "grid_days": (365, 730)
        },
        evaluation={"thresholds": []},
        privacy={},
    )  # fmt: skip
    plan = protocol.plan(RUN)
    full = full_record()
    hidden = tuple(
        SiteOutcome(s.site, s.cohort, s.n_train, s.n_train_events, trains=s.trains)
        for s in sites()[:2]
    )
    fitted = Fitted(
        **{**vars(full.fitted), "plan": plan, "sites": hidden, "encoders": {}, "evaluations": {},
           "calibration_slope": None, "rounds": (), "fit_rounds": {}}
    )  # fmt: skip
    return StudyRecord(RUN, protocol, fitted, StudyResults(arms={}), "0.1.0")
