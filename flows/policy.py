"""What ``mlflow/registry.yaml`` says: thresholds of the gates, who decides, when to look again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flows.protocol import GateSection

if TYPE_CHECKING:
    from flows.protocol import StudyProtocol

POLICY_FILE: Final = Path(__file__).resolve().parents[1] / "mlflow" / "registry.yaml"


class PolicyError(ValueError):
    """A ``registry.yaml`` that is missing or says what it cannot."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Absence = Literal["fail", "not_apply"]


class LeftOutAbsence(_Section):
    """What a study without leave-one-site-out gets at that gate, by its data."""

    patients: Absence = "fail"
    public: Absence = "not_apply"
    simulated: Absence = "not_apply"
    secure_sum: Absence = "not_apply"


class ApprovalsAbsence(_Section):
    """What a study without kits gets at the gate of approvals, by its data."""

    patients: Absence = "fail"
    public: Absence = "not_apply"
    simulated: Absence = "not_apply"


class WhereNotAsked(_Section):
    """What gates do whose figure could not be asked for."""

    leave_one_site_out: LeftOutAbsence = LeftOutAbsence()
    approvals: ApprovalsAbsence = ApprovalsAbsence()


class PromotionPolicy(_Section):
    """Who decides, until when, and why a model may be turned down."""

    quorum: int = Field(default=1, ge=1, le=100)
    timeout_days: float = Field(default=30.0, gt=0, le=365)
    reasons: tuple[str, ...] = Field(default=("other",), min_length=1, max_length=50)


class MonitoringPolicy(_Section):
    """When the evaluation of a champion asks people to look."""

    max_shift: float = Field(default=0.25, gt=0)
    max_spread_ratio: float = Field(default=1.5, gt=1)
    max_missing_change: float = Field(default=0.1, gt=0, le=1)
    max_event_rate_change: float = Field(default=0.1, gt=0, le=1)
    max_concordance_loss: float = Field(default=0.05, ge=0, le=1)
    min_observed_expected: float = Field(default=0.67, gt=0, le=1)
    max_observed_expected: float = Field(default=1.5, ge=1)


class Policy(_Section):
    """What ``mlflow/registry.yaml`` says beside names and aliases."""

    gates: GateSection = GateSection()
    where_not_asked: WhereNotAsked = WhereNotAsked()
    promotion: PromotionPolicy = PromotionPolicy()
    monitoring: MonitoringPolicy = MonitoringPolicy()


def read_policy(path: Path = POLICY_FILE) -> Policy:
    """Read the policy of gates, promotion and monitoring.

    Raises
    ------
    PolicyError
        If the file is missing or says what it cannot.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        gates = {name: gate["default"] for name, gate in values["gates"].items()}
        parts = {name: values[name] for name in ("where_not_asked", "promotion", "monitoring")}
        return Policy(gates=GateSection(**gates), **parts)
    except FileNotFoundError:
        raise PolicyError(
            f"mlflow/{path.name}: found none beside the package, needed it for the gates; install "
            "the project from its checkout"
        ) from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        text = error.errors()[0]["msg"].lower()
        raise PolicyError(f"mlflow/{path.name}: {where}: {text}") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise PolicyError(
            f"mlflow/{path.name}: needed YAML with gates, where_not_asked, promotion, monitoring"
        ) from None


def rules_of(protocol: StudyProtocol, policy: Policy) -> GateSection:
    """Thresholds of a study: those it gives itself, the policy's for the others."""
    given = {name: getattr(protocol.gates, name) for name in protocol.gates.model_fields_set}
    return GateSection(**{**policy.gates.model_dump(), **given})
