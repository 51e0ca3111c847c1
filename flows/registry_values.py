"""What MLflow shows of a finished study: tags, parameters and metrics of its run and its model."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from flows.mlflow_store import OWNER_TAGS
from flows.protocol import kind_of
from flows.reports import is_external
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PERSONALISED, PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlflow.entities import Metric

    from flows.records import StudyRecord
    from fusion.evaluation import Estimate
    from fusion.federation import RoundRecord

ARM_KEYS: Final = {
    PROTOCOL: "federated",
    LOCAL_ENCODERS: "federated_local_encoders",
    LOCAL_ONLY: "local_only",
    PERSONALISED: "personalised",
}
RUN_TAG: Final = "consilium.run"
DIGEST_CHARACTERS: Final = 32  # of at most 36 that MLflow keeps
LOGGED: Final = "logged.json"
COMPLETE_TAG: Final = "consilium.complete"
_MAX_DESCRIPTION: Final = 5000  # the registry's column
_COMMIT = re.compile(r"[0-9a-f]{40}")


def round_values(done: RoundRecord) -> dict[str, float]:
    """Give what a communication round cost, and the objective it ended with."""
    found = {
        "n_sites": float(done.n_sites),
        "n_fits": float(done.n_fits),
        "bytes_sent": float(done.bytes_sent),
        "bytes_received": float(done.bytes_received),
        "seconds": done.seconds,
        "objective": done.objective,
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class LoggedRound:
    """A communication round as MLflow shows it: a run of its own below the study's.

    Attributes
    ----------
    begins_ms, ends_ms
        In milliseconds since 1970.
    """

    name: str
    stage: str
    number: int
    begins_ms: int
    ends_ms: int
    metrics: dict[str, float]


def logged_rounds(record: StudyRecord, *, starts_ms: int) -> list[LoggedRound]:
    """Give the rounds of a run at the times they took, one after another."""
    found, ends_s = [], 0.0
    for done in record.fitted.rounds:
        begins_ms, ends_s = starts_ms + round(1000 * ends_s), ends_s + done.seconds
        ends_ms = starts_ms + round(1000 * ends_s)
        name = f"round-{done.number:02d}-{done.stage}"
        found.append(
            LoggedRound(name, done.stage, done.number, begins_ms, ends_ms, round_values(done))
        )
    return found


def run_name(record: StudyRecord) -> str:
    """Name of a study's run in MLflow."""
    return f"study-{record.run[:8]}"


def logged_values(
    record: StudyRecord, metrics: Sequence[Metric], rounds: Sequence[LoggedRound]
) -> dict[str, Any]:
    """Give everything that is written to MLflow's tables, to be signed beside it.

    Whoever may write to its database could show other figures than the run had.
    """
    return {
        "name": run_name(record),
        "tags": run_tags(record),
        "params": params_of(record),
        "metrics": [
            {
                "key": x.key, "value": x.value, "step": x.step, "timestamp": x.timestamp,
                "of_model": x.model_id is not None, "dataset": x.dataset_name,
            }
            for x in metrics
        ],
        "rounds": [asdict(x) for x in rounds],
    }  # fmt: skip


def shortened(card: str) -> str:
    """Give as much of a model card as a version's description holds."""
    if len(card) <= _MAX_DESCRIPTION:
        return card
    pointer = "\n\n(shortened; the whole card is the run's artifact model_card.md)\n"
    return card[: _MAX_DESCRIPTION - len(pointer)].rsplit("\n", 1)[0] + pointer


def owner_tags(record: StudyRecord) -> dict[str, str]:
    """Whose run it is, without a name of an account or a path."""
    return {RUN_TAG: record.run, **OWNER_TAGS}


def run_tags(record: StudyRecord) -> dict[str, str]:
    """Names, digests and counts by which a run and its model are found and traced."""
    study, fitted = record.protocol.study, record.fitted
    tags = {
        **owner_tags(record),
        "consilium.protocol": record.protocol.fingerprint(),
        "consilium.code": record.code_version,
        "consilium.study": study.name,
        "consilium.data": study.data,
        "consilium.sites": ",".join(s.site for s in fitted.sites if s.trains and not s.code),
        "consilium.external_sites": ",".join(s.site for s in fitted.sites if is_external(s)),
        "consilium.rounds": str(max(fitted.fit_rounds.values(), default=0)),
        "consilium.lowered_minimums": "; ".join(record.protocol.privacy.lowered()),
    }
    if _COMMIT.fullmatch(record.code_version):
        tags["mlflow.source.git.commit"] = record.code_version
    return {key: value for key, value in tags.items() if value}


def params_of(record: StudyRecord) -> dict[str, str]:
    """Flatten the protocol's settings; extractors' specs are in the artifact ``protocol.json``."""
    protocol = record.protocol
    found: dict[str, Any] = {}
    for section in ("study", "fusion", "federation", "evaluation", "privacy", "gates"):
        values = getattr(protocol, section).model_dump(mode="json")
        found |= {f"{section}.{key}": value for key, value in values.items()}
    for name in protocol.modalities:
        encoder = protocol.encoder[name]
        found[f"modality.{name}.kind"] = kind_of(protocol.modality[name])
        found[f"encoder.{name}.model"] = encoder.model
        found[f"encoder.{name}.sharing"] = encoder.sharing
        found[f"encoder.{name}.ridge"] = encoder.ridge
    return {key: _text(value) for key, value in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(part)}" for key, part in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def metrics_of(
    record: StudyRecord, *, run_id: str, model_id: str, timestamp_ms: int
) -> list[Metric]:
    """Released figures as metrics of the logged model, a site's own beside its data set."""
    from mlflow.entities import Metric

    digests = {s.site: s.cohort[:DIGEST_CHARACTERS] for s in record.fitted.sites if s.cohort}
    own = [*consortium_values(record).items(), *_reference_values(record).items()]
    metrics = [
        Metric(key, value, timestamp_ms, 0, model_id=model_id, run_id=run_id) for key, value in own
    ]
    for site, values in _site_values(record).items():
        of_data = {"dataset_name": site, "dataset_digest": digests[site]} if site in digests else {}
        metrics += [
            Metric(f"{site}/{key}", value, timestamp_ms, 0, model_id, run_id=run_id, **of_data)
            for key, value in values.items()
        ]
    metrics += [
        Metric(f"objective/{r.stage}", r.objective, timestamp_ms, r.number, run_id=run_id)
        for r in record.fitted.rounds
        if math.isfinite(r.objective)
    ]
    return [metric for metric in metrics if math.isfinite(metric.value)]


def arm_key(arm: str) -> str:
    """Name of an arm in metrics and tags."""
    return ARM_KEYS.get(arm, arm.replace(".", "_"))


def consortium_values(record: StudyRecord) -> dict[str, float]:
    """Figures over all sites, by their name in MLflow."""
    fitted = record.fitted
    found = {
        "n_patients": float(fitted.n_patients),
        "n_events": float(fitted.n_events),
        "n_test_events": float(sum(s.n_test_events for s in fitted.sites)),
        "n_training_sites": float(sum(s.trains and not s.code for s in fitted.sites)),
        "n_communications": float(len(fitted.rounds)),
        "bytes_sent": float(sum(r.bytes_sent for r in fitted.rounds)),
        "bytes_received": float(sum(r.bytes_received for r in fitted.rounds)),
        "federation_seconds": sum(r.seconds for r in fitted.rounds),
    }
    for arm, result in record.results.arms.items():
        scores = {
            "concordance": result.concordance,
            "uno_concordance": result.uno,
            "time_dependent_auc": result.auc,
            "concordance_difference": result.difference,
            "observed_expected": result.observed_expected,
            "calibration_slope": result.calibration_slope,
            "integrated_brier_score": result.brier,
            "integrated_brier_score_null": result.null_brier,
        }
        for name, estimate in scores.items():
            found |= _with_interval(f"{arm_key(arm)}/{name}", estimate)
        if result.log_rank is not None:
            found[f"{arm_key(arm)}/log_rank_p"] = result.log_rank.p_value
    found |= _with_interval("leave_one_site_out/concordance", record.results.left_out_pooled)
    for name, ridge in fitted.ridge.items():
        found[f"ridge/{name}"] = ridge
    return found


def _reference_values(record: StudyRecord) -> dict[str, float]:
    reference = record.reference
    if reference is None:
        return {}
    found = {
        "reference/local_mean/concordance": reference.local_mean,
        "reference/max_coefficient_gap": reference.max_coefficient_gap,
    }
    for arm, estimate in reference.concordance.items():
        found |= _with_interval(f"reference/{arm}/concordance", estimate)
    return found


def _site_values(record: StudyRecord) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for arm, result in record.results.arms.items():
        for site, estimate in result.by_site.items():
            values = found.setdefault(site, {})
            values |= _with_interval(f"{arm_key(arm)}/concordance", estimate)
    return found


def _with_interval(key: str, estimate: Estimate | None) -> dict[str, float]:
    if estimate is None:
        return {}
    return {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}
