"""How well a risk model does, from sums over each site's test patients.

Figures come in pairs of pure functions: a *site statistic* turns rows into sums, and a
*combination* turns the sums, added over sites, into figures with 95 % intervals. Pairs of patients
are formed within a site only, and pooled. ``log_hazard`` is higher for worse prognosis, ``event``
is True where the event was observed, times are in days from the landmark.

Intervals take the censoring curve of a site as known.
"""

from fusion.evaluation.absolute_risk import (
    BrierSums,
    Calibration,
    CalibrationSums,
    ObservedExpected,
    brier_score,
    brier_sums,
    calibration,
    calibration_sums,
    integrated_brier_score,
    null_brier_sums,
    observed_expected,
    observed_expected_ratio,
)
from fusion.evaluation.censoring import (
    CensoringCurve,
    censoring_curve,
)
from fusion.evaluation.decision import (
    DecisionSums,
    NetBenefit,
    decision_sums,
    net_benefit,
    releasable_thresholds,
)
from fusion.evaluation.heterogeneity import (
    Heterogeneity,
    HomogeneityTest,
    heterogeneity,
    likelihood_ratio,
)
from fusion.evaluation.life_tables import (
    LifeTable,
    LogRankSums,
    LogRankTest,
    life_table,
    log_rank_sums,
    log_rank_test,
    survival_from_life_table,
)
from fusion.evaluation.pairs import (
    NoComparablePairs,
    PairCounts,
    auc_pair_counts,
    concordance_difference,
    concordance_index,
    pair_counts,
    pair_cross,
    uno_pair_counts,
)
from fusion.evaluation.small_cells import (
    complementary_hidden,
    hide_small_cells,
    visible_sites,
)
from fusion.evaluation.subgroups import (
    SubgroupFigures,
    SubgroupSums,
    subgroup_figures,
    subgroup_sums,
)
from fusion.evaluation.sums import (
    Estimate,
    Estimates,
)
from fusion.evaluation.treatment import (
    TreatmentComparison,
    TreatmentSums,
    treatment_comparison,
    treatment_sums,
)

__all__ = [
    "BrierSums",
    "Calibration",
    "CalibrationSums",
    "CensoringCurve",
    "DecisionSums",
    "Estimate",
    "Estimates",
    "Heterogeneity",
    "HomogeneityTest",
    "LifeTable",
    "LogRankSums",
    "LogRankTest",
    "NetBenefit",
    "NoComparablePairs",
    "ObservedExpected",
    "PairCounts",
    "SubgroupFigures",
    "SubgroupSums",
    "TreatmentComparison",
    "TreatmentSums",
    "auc_pair_counts",
    "brier_score",
    "brier_sums",
    "calibration",
    "calibration_sums",
    "censoring_curve",
    "complementary_hidden",
    "concordance_difference",
    "concordance_index",
    "decision_sums",
    "heterogeneity",
    "hide_small_cells",
    "integrated_brier_score",
    "life_table",
    "likelihood_ratio",
    "log_rank_sums",
    "log_rank_test",
    "net_benefit",
    "null_brier_sums",
    "observed_expected",
    "observed_expected_ratio",
    "pair_counts",
    "pair_cross",
    "releasable_thresholds",
    "subgroup_figures",
    "subgroup_sums",
    "survival_from_life_table",
    "treatment_comparison",
    "treatment_sums",
    "uno_pair_counts",
    "visible_sites",
]
