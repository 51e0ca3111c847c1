"""One study over many sites: what a site answers, what the coordinator makes of the answers.

The messages are bytes on every transport, the in-process one included, so that nothing can cross
in a test or a simulation that could not cross between hospitals.
"""

from fusion.federation.alarms import SiteAlarm
from fusion.federation.bounds import BoundsBroken
from fusion.federation.conversation import QuorumNotMet, RoundRecord, SiteOutcome
from fusion.federation.coordinator import (
    Coordinator,
    Encoders,
    Fitted,
    FusionFit,
    leave_one_site_out,
    run_federation,
)
from fusion.federation.plan import (
    LOCAL_ENCODERS,
    LOCAL_ONLY,
    PERSONALISED,
    PROTOCOL,
    RESERVED_NAMES,
    AveragingPlan,
    FederationPlan,
    without,
)
from fusion.federation.results import (
    ArmResult,
    LeftOutSite,
    StudyResults,
    SubgroupResult,
    TreatmentResult,
    summarise,
)
from fusion.federation.rows import Outcome, SharedNetwork, SiteRows, Split
from fusion.federation.site import SiteStudy
from fusion.federation.transport import FederationLost, InProcess, Transport

__all__ = [
    "LOCAL_ENCODERS",
    "LOCAL_ONLY",
    "PERSONALISED",
    "PROTOCOL",
    "RESERVED_NAMES",
    "ArmResult",
    "AveragingPlan",
    "BoundsBroken",
    "Coordinator",
    "Encoders",
    "FederationLost",
    "FederationPlan",
    "Fitted",
    "FusionFit",
    "InProcess",
    "LeftOutSite",
    "Outcome",
    "QuorumNotMet",
    "RoundRecord",
    "SharedNetwork",
    "SiteAlarm",
    "SiteOutcome",
    "SiteRows",
    "SiteStudy",
    "Split",
    "StudyResults",
    "SubgroupResult",
    "Transport",
    "TreatmentResult",
    "leave_one_site_out",
    "run_federation",
    "summarise",
    "without",
]
