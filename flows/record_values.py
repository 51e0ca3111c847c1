"""A run as plain values: what ``record.json`` holds, and what the report may show."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from flows.figure_style import group_names
from fusion.evaluation import LifeTable
from fusion.federation import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from numpy.typing import NDArray

    from flows.records import StudyRecord
    from fusion.federation import RoundRecord, SiteOutcome
    from fusion.late import FusionModel

    Floats = NDArray[np.float64]

SCHEMA_VERSION = 1
# Whatever is not on this list stays out of record.json, and so out of the report.
KEYS = (
    "schema_version", "created", "run", "code_version", "software", "protocol",
    "protocol_fingerprint", "lowered_minimums", "fusion_kind", "sites", "totals", "models",
    "encoders", "networks", "site_coefficients", "risk_groups", "results", "communication",
    "reference", "wall_s",
)  # fmt: skip
TRAINING, EXTERNAL, LEFT = "training", "external", "left"
_Z = 1.959963984540054
_SOFTWARE = (
    "consilium", "numpy", "scipy", "pandas", "torch", "torchsurv", "scikit-survival", "anndata",
    "mudata", "matplotlib", "prefect", "mlflow",
)  # fmt: skip


def record_values(record: StudyRecord, *, created: datetime) -> dict[str, Any]:
    """Give everything that a run says as values that JSON holds; NaN becomes null.

    Sums released by single sites stay out, apart from the figures made of them. There is nothing
    about a patient in a record, and so nothing here.

    Parameters
    ----------
    created
        When the run ended, with its time zone.
    """
    fitted, protocol = record.fitted, record.protocol
    return {
        "schema_version": SCHEMA_VERSION,
        "created": created.isoformat(timespec="seconds"),
        "run": record.run,
        "code_version": record.code_version,
        "software": software_versions(),
        "protocol": plain(protocol.values()),
        "protocol_fingerprint": protocol.fingerprint(),
        "lowered_minimums": list(protocol.privacy.lowered()),
        "fusion_kind": protocol.fusion.model,
        "sites": [plain(site) | {"role": role_of(site)} for site in fitted.sites],
        "totals": _totals(record),
        "models": {
            arm: _model_values(model, horizon_days=protocol.study.horizon_days)
            for arm, model in fitted.models.items()
        },
        "encoders": plain(fitted.encoders),
        "networks": {name: len(weights) for name, weights in fitted.networks.items()},
        "site_coefficients": plain(site_ratios(record)),
        "risk_groups": _risk_groups(record),
        "results": plain(record.results),
        "communication": _communication(record),
        "reference": plain(record.reference),
        "wall_s": plain(record.wall_s),
    }


def plain(value: Any) -> Any:
    """Turn dataclasses, arrays and tuples into dictionaries and lists; NaN and infinity to None.

    Raises
    ------
    TypeError
        If JSON has no form for a value.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {part.name: plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"record: found {type(value).__name__}, needed a value that JSON holds")


def role_of(site: SiteOutcome) -> str:
    """Whether a site trained, was external validation, or left the study."""
    if site.code:
        return LEFT
    return TRAINING if site.trains else EXTERNAL


def at_risk(record: StudyRecord) -> Floats | None:
    """(n_groups, n_intervals) test patients at risk at each interval's start, over all sites.

    Returns
    -------
    numpy.ndarray or None
        None where no site released a life table.
    """
    result = record.results.arms.get(PROTOCOL)
    if result is None or result.survival is None:
        return None
    n_groups, n_intervals = result.survival.value.shape
    row = list(record.fitted.models).index(PROTOCOL)
    tables = [
        LifeTable.from_vector(e.life_table[row], n_groups=n_groups, n_intervals=n_intervals)
        for e in record.fitted.evaluations.values()
    ]
    return np.sum([table.counts[:, :, 0] for table in tables], axis=0)


def fusion_terms(model: FusionModel) -> list[dict[str, Any]]:
    """Give one row per modality, then one per modality's absence, with hazard or odds ratios.

    A term that never varied in training, as where nobody lacks a modality, has no weight: its
    ``varies`` is False and its standard error means nothing.
    """
    errors = np.sqrt(np.diag(model.covariance))
    absent = np.repeat([False, True], len(model.modalities))
    rows = zip((*model.modalities, *model.modalities), model.coefficients, errors, strict=True)
    return [
        {
            "modality": modality,
            "absent": bool(flag),
            "varies": bool(abs(beta) > 1e-12),
            "coefficient": float(beta),
            "standard_error": float(error),
            "ratio": _ratio(beta, error),
        }
        for (modality, beta, error), flag in zip(rows, absent, strict=True)
    ]


def _ratio(log_ratio: float, error: float) -> dict[str, float]:
    ends = np.exp([log_ratio, log_ratio - _Z * error, log_ratio + _Z * error])
    return dict(zip(("value", "low", "high"), ends.tolist(), strict=True))


def ratio_name(fusion_kind: str) -> str:
    """Name what the exponential of a fusion coefficient is."""
    return "odds ratio" if fusion_kind == "logistic_hazard" else "hazard ratio"


def site_ratios(record: StudyRecord) -> list[dict[str, Any]]:
    """Give each training site's own hazard or odds ratios, in the order of the terms.

    A ratio is None where a site does not inform the term; the list is empty where sites were not
    compared.
    """
    found = record.results.heterogeneity
    if found is None:
        return []
    return [
        {"site": site, "ratios": [_ratio_or_none(*term) for term in zip(*both, strict=True)]}
        for site, *both in zip(
            _training_sites(record, len(found.estimates)),
            found.estimates.tolist(),
            found.standard_errors.tolist(),
            strict=True,
        )
    ]


def _ratio_or_none(log_ratio: float, error: float) -> dict[str, float] | None:
    known = math.isfinite(log_ratio) and math.isfinite(error)
    return _ratio(log_ratio, error) if known else None


def _training_sites(record: StudyRecord, n_sites: int) -> tuple[str, ...]:
    # A site may leave after the fit; where it is unclear which rows are whose, they are numbered.
    stayed = tuple(s.site for s in record.fitted.sites if s.trains and not s.code)
    ever = tuple(s.site for s in record.fitted.sites if s.trains)
    for names in (stayed, ever):
        if len(names) == n_sites:
            return names
    return tuple(f"training site {i + 1}" for i in range(n_sites))


def software_versions() -> dict[str, str]:
    """Versions of this package and of those that its figures rest on, where installed."""
    found = {}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _totals(record: StudyRecord) -> dict[str, int]:
    sites = record.fitted.sites
    training = [s for s in sites if role_of(s) == TRAINING]
    external = [s for s in sites if role_of(s) == EXTERNAL]
    stayed = [*training, *external]
    return {
        "n_sites": len(sites),
        "n_taking_part": len(stayed),
        "n_training_sites": len(training),
        "n_external_sites": len(external),
        "n_left_sites": len(sites) - len(stayed),
        "n_hidden_sites": sum(not s.n_test for s in stayed),
        "n_fitted": record.fitted.n_patients,
        "n_fitted_events": record.fitted.n_events,
        "n_train": sum(s.n_train for s in training),
        "n_train_events": sum(s.n_train_events for s in training),
        "n_test": sum(s.n_test for s in stayed),
        "n_test_events": sum(s.n_test_events for s in stayed),
        "n_external": sum(s.n_test for s in external),
        "n_external_events": sum(s.n_test_events for s in external),
    }


def _model_values(model: FusionModel, *, horizon_days: float) -> dict[str, Any]:
    average = np.asarray(model.mean, dtype=np.float64)[None]
    edges = np.asarray(model.edges_days, dtype=np.float64)
    times = np.append(edges, horizon_days)
    survival = model.predict_survival_function(average, times)[0]
    kept = {
        part.name: plain(getattr(model, part.name))
        for part in fields(model)
        if part.name not in ("coefficients", "covariance")
    }
    return kept | {
        "terms": plain(fusion_terms(model)),
        "survival_at_average": plain(survival[:-1]),
        "survival_at_average_at_horizon": plain(survival[-1]),
    }


def _risk_groups(record: StudyRecord) -> dict[str, Any]:
    cuts = record.fitted.groups.get(PROTOCOL, ())
    counts = at_risk(record)
    return {
        "names": list(group_names(len(cuts) + 1)),
        "cuts": plain(cuts),
        "edges_days": plain(record.fitted.plan.edges_days),
        "at_risk": None if counts is None else np.rint(counts).astype(int).tolist(),
        "treatments": list(record.fitted.plan.treatments),
    }


def _communication(record: StudyRecord) -> dict[str, Any]:
    rounds = record.fitted.rounds
    return {
        "n_rounds": len(rounds),
        "most_fit_rounds": max(record.fitted.fit_rounds.values(), default=None),
        "fit_rounds": plain(record.fitted.fit_rounds),
        "bytes_sent": sum(r.bytes_sent for r in rounds),
        "bytes_received": sum(r.bytes_received for r in rounds),
        "seconds": sum(r.seconds for r in rounds),
        "stages": _stages(rounds),
    }


def _stages(rounds: Sequence[RoundRecord]) -> list[dict[str, Any]]:
    found = []
    for stage in dict.fromkeys(r.stage for r in rounds):
        of_stage = [r for r in rounds if r.stage == stage]
        found.append(
            {
                "stage": stage,
                "n_rounds": len(of_stage),
                "n_sites": max(r.n_sites for r in of_stage),
                "most_fits": max(r.n_fits for r in of_stage),
                "bytes_sent": sum(r.bytes_sent for r in of_stage),
                "bytes_received": sum(r.bytes_received for r in of_stage),
                "seconds": sum(r.seconds for r in of_stage),
            }
        )
    return found
