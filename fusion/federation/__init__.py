"""One study over many sites: what a site answers, what the coordinator makes of the answers.

The messages are bytes on every transport, the in-process one included, so that nothing can cross
in a test or a simulation that could not cross between hospitals.
"""

from fusion.federation.coordinator import (
    Coordinator,
    Fitted,
    FusionFit,
    QuorumNotMet,
    RoundRecord,
    SiteOutcome,
    run_federation,
)
from fusion.federation.plan import LOCAL_ENCODERS, LOCAL_ONLY, PROTOCOL, FederationPlan
from fusion.federation.results import ArmResult, summarise
from fusion.federation.rows import Outcome, SiteRows, Split
from fusion.federation.site import SiteStudy
from fusion.federation.transport import InProcess, Transport

__all__ = [
    "LOCAL_ENCODERS",
    "LOCAL_ONLY",
    "PROTOCOL",
    "ArmResult",
    "Coordinator",
    "FederationPlan",
    "Fitted",
    "FusionFit",
    "InProcess",
    "Outcome",
    "QuorumNotMet",
    "RoundRecord",
    "SiteOutcome",
    "SiteRows",
    "SiteStudy",
    "Split",
    "Transport",
    "run_federation",
    "summarise",
]
