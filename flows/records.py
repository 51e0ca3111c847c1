"""What a finished study leaves behind, for the registry, the report and the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.protocol import StudyProtocol
    from fusion.evaluation import Estimate
    from fusion.federation import Fitted, StudyResults


@dataclass(frozen=True)
class Reference:
    """How the arms compare where the truth is known and rows may be pooled: simulation only.

    Every arm is scored on the same patients: all test patients of all sites.

    Attributes
    ----------
    concordance
        Per arm (``federated``, ``federated_local_encoders``, ``pooled``, ``true_hazard``) the
        consortium's estimate.
    by_site
        Per arm and site.
    local
        Per training site, the estimate of the model trained on that site's rows alone.
    local_mean
        Mean of ``local`` over sites.
    max_coefficient_gap
        Largest absolute difference between the federated fusion coefficients and those of an
        independent library's stratified Cox model on the pooled rows.
    """

    concordance: dict[str, Estimate]
    by_site: dict[str, dict[str, Estimate]]
    local: dict[str, Estimate]
    local_mean: float
    max_coefficient_gap: float


@dataclass(frozen=True)
class StudyRecord:
    """A study run: the protocol, what was fitted, what it is worth.

    Attributes
    ----------
    run
        64 hex digits: protocol, cohorts and code. Two runs with the same one are the same run.
    code_version
        Git commit where there is one, else the package's version.
    reference
        Present for simulated data only.
    """

    run: str
    protocol: StudyProtocol
    fitted: Fitted
    results: StudyResults
    code_version: str
    reference: Reference | None = None
    wall_s: dict[str, float] = field(default_factory=dict)
