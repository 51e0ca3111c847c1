"""Registry exports: covariates, and the outcome counted from the study's landmark."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from modalities.cohort import DataError, Exclusion, feature_table
from modalities.files import fingerprint
from modalities.tabular import (
    is_missing,
    is_number,
    kind_of,
    number,
    read_patient_rows,
    used_digest,
    write_table,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

EXTRACTOR_VERSION = 1
"""Raised when the same registry and spec would give other covariates or outcomes."""

_MODALITY = "clinical"
_EVENTS = {"true": True, "false": False}
_WORD = re.compile(r"\w{1,16}")


class ClinicalSpec(BaseModel):
    """Which columns of the registry are covariates and outcome, and what they may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    numeric: tuple[str, ...] = Field(default=(), description="Columns used as they are.")
    ordinal: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Column to its levels in order, which become 0, 1, 2...",
    )
    categorical: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Column to its levels; the first is the reference, each other one becomes an "
        "indicator column named column=level.",
    )
    event: str = Field(default="event", min_length=1, description="Column: 1 observed, 0 censored.")
    time: str = Field(default="time_days", min_length=1, description="Column: days from time zero.")
    patient_id: str = Field(
        default="patient_id", min_length=1, description="Column of the pseudonyms."
    )
    landmark_days: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Days after time zero from which time is counted; patients whose follow-up "
        "ended by then are not in the study.",
    )

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        covariates = (*self.numeric, *self.ordinal, *self.categorical)
        names = (self.patient_id, self.event, self.time, *covariates)
        if not covariates:
            raise ValueError("covariates: found none, needed at least one")
        if len(set(names)) != len(names) or "" in names:
            raise ValueError(
                "columns: needed distinct, non-empty names for ids, outcome, covariates"
            )
        if len(set(self.feature_names)) != len(self.feature_names):
            raise ValueError("covariates: needed distinct names once levels are added")
        return self

    @model_validator(mode="after")
    def _levels_are_distinct(self) -> Self:
        for column, levels in (*self.ordinal.items(), *self.categorical.items()):
            if len(levels) < 2 or len(_level_codes(levels)) != len(levels) or "" in levels:
                raise ValueError(f"{column}: needed at least two distinct, non-empty levels")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the registry must have beside the patient id."""
        return (self.event, self.time, *self.numeric, *self.ordinal, *self.categorical)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the covariates: numeric as given, then ordinal and categorical by name.

        Sorting keeps the order a function of the fingerprint, which does not see the order in
        which a mapping was written.
        """
        indicators = (
            f"{column}={level}"
            for column in sorted(self.categorical)
            for level in self.categorical[column][1:]
        )
        return (*self.numeric, *sorted(self.ordinal), *indicators)

    def fingerprint(self) -> str:
        """SHA-256 of the spec and of the extractor's version."""
        return fingerprint({"extractor": EXTRACTOR_VERSION, "spec": self.model_dump(mode="json")})


@dataclass(frozen=True, eq=False)
class Registry:
    """Covariates and outcome of the patients that can be used, rows in the same order.

    Parameters
    ----------
    covariates
        (n, p) table of `ClinicalSpec.feature_names`; NaN where the registry has no value.
    event
        (n,) True where the event was observed, False where the patient was censored.
    time_days
        (n,) days from the landmark to event or censoring, above 0.
    """

    covariates: AnnData
    event: NDArray[np.bool_]
    time_days: NDArray[np.float64]

    @property
    def patient_ids(self) -> tuple[str, ...]:
        """(n,) pseudonyms."""
        return tuple(self.covariates.obs_names)

    def without(self, patient_ids: Collection[str]) -> Registry:
        """Give the same registry less some patients."""
        kept = np.array([x not in patient_ids for x in self.patient_ids], dtype=bool)
        return Registry(self.covariates[kept].copy(), self.event[kept], self.time_days[kept])


@dataclass(frozen=True)
class _Patient:
    event: bool
    time_days: float
    covariates: tuple[float, ...]


def read_registry(path: Path, spec: ClinicalSpec) -> tuple[Registry, list[Exclusion]]:
    """Covariates and outcome from a registry's CSV export.

    Everything is read as text, so that pseudonyms such as ``001`` stay as they are. A missing
    covariate is NaN (in every indicator of a categorical one). A patient is set aside, and the
    others go on, if time or event is missing or of another kind, if a covariate holds text or a
    level that the spec does not list, if there are several rows, or if follow-up ended by the
    landmark. A listed level wins over a marker of missing values, so that ``none`` can be a level;
    levels that are numbers match as numbers (``1`` and ``1.0``).

    Parameters
    ----------
    path
        CSV file: UTF-8, commas, one header row, one row per patient.
    spec
        Columns, levels and landmark.

    Returns
    -------
    registry
        In the order of the file; may be empty.
    exclusions
        One per patient set aside, with the first reason found.

    Raises
    ------
    DataError
        If the file cannot be read as CSV or a column is missing.
    """
    rows, exclusions = read_patient_rows(
        path, columns=spec.columns, patient_id=spec.patient_id, modality=_MODALITY
    )
    patients: dict[str, _Patient] = {}
    for patient_id, row in rows.items():
        try:
            patients[patient_id] = _patient(row, spec)
        except DataError as fault:
            exclusions.append(Exclusion(patient_id, _MODALITY, fault.code, str(fault)))
    return _registry(patients, spec), exclusions


def extract(source: Path, out: Path, spec: ClinicalSpec) -> tuple[Registry, list[Exclusion]]:
    """Read the registry ``source`` and write covariates, ``event`` and ``time_days`` to ``out``.

    The outcome goes to ``obs`` of the ``.h5ad`` file, and `modalities.tabular.write_table` says
    which files there are.

    Raises
    ------
    DataError
        As `read_registry`.
    """
    registry, exclusions = read_registry(source, spec)
    table = registry.covariates.copy()
    table.obs["event"] = registry.event
    table.obs["time_days"] = registry.time_days
    write_table(table, out, exclusions, name=_MODALITY)
    return registry, exclusions


def _registry(patients: Mapping[str, _Patient], spec: ClinicalSpec) -> Registry:
    names = spec.feature_names
    rows = list(patients.values())
    covariates = feature_table(
        list(patients),
        names,
        np.array([p.covariates for p in rows], dtype=np.float64).reshape(len(rows), len(names)),
        input_digests=[_digest(p, names) for p in rows],
        spec_fingerprint=spec.fingerprint(),
    )
    return Registry(
        covariates=covariates,
        event=np.array([p.event for p in rows], dtype=np.bool_),
        time_days=np.array([p.time_days for p in rows], dtype=np.float64),
    )


def _digest(patient: _Patient, names: Sequence[str]) -> str:
    covariates = used_digest(dict(zip(names, patient.covariates, strict=True)))
    return fingerprint([patient.event, patient.time_days, covariates])


def _patient(row: Mapping[str, str], spec: ClinicalSpec) -> _Patient:
    return _Patient(
        event=_event(row[spec.event], spec.event),
        time_days=_time_days(row[spec.time], spec),
        covariates=tuple(_covariates(row, spec)),
    )


def _event(cell: str, column: str) -> bool:
    if is_missing(cell):
        raise DataError(
            "missing_event",
            f"{column}: found nothing, needed 1 (observed) or 0 (censored); fill it in",
        )
    known = _EVENTS.get(cell.casefold())
    if known is None and is_number(cell) and float(cell) in (0.0, 1.0):
        known = float(cell) == 1.0
    if known is None:
        found = repr(cell) if _WORD.fullmatch(cell) else kind_of(cell)
        raise DataError(
            "event_not_binary",
            f"{column}: found {found}, needed 1 or true (observed), 0 or false (censored); recode "
            "the column",
        )
    return known


def _time_days(cell: str, spec: ClinicalSpec) -> float:
    """Days from the landmark."""
    days = _days(cell, spec.time)
    if days <= 0:
        raise DataError(
            "time_not_positive",
            f"{spec.time}: found {days:g} days, needed more than 0; correct the dates behind it",
        )
    if days <= spec.landmark_days:
        raise DataError(
            "before_landmark",
            f"{spec.time}: found {days:g} days, needed more than the landmark of "
            f"{spec.landmark_days:g} days; nothing to do, the study starts later",
        )
    return days - spec.landmark_days


def _days(cell: str, column: str) -> float:
    if cell.casefold() == "nan":
        raise _time_fault("time_not_finite", column, "nan")
    if is_missing(cell):
        raise _time_fault("missing_time", column, "nothing")
    try:
        return number(cell, column)
    except DataError as fault:
        code = "time_not_finite" if fault.code == "not_finite" else "time_not_a_number"
        found = repr(cell) if _WORD.fullmatch(cell) else kind_of(cell)
        raise _time_fault(code, column, found) from None


def _time_fault(code: str, column: str, found: str) -> DataError:
    return DataError(
        code, f"{column}: found {found}, needed a number of days above 0; correct the cell"
    )


def _covariates(row: Mapping[str, str], spec: ClinicalSpec) -> Iterable[float]:
    """Values in the order of `ClinicalSpec.feature_names`."""
    for column in spec.numeric:
        yield number(row[column], column)
    for column in sorted(spec.ordinal):
        yield _level(row[column], column, spec.ordinal[column])
    for column in sorted(spec.categorical):
        levels = spec.categorical[column]
        code = _level(row[column], column, levels)
        for other in range(1, len(levels)):
            yield math.nan if math.isnan(code) else float(code == other)


def _level(cell: str, column: str, levels: Sequence[str]) -> float:
    """Position of a cell among the levels, NaN where it is missing."""
    code = _level_codes(levels).get(_level_key(cell))
    if code is not None:
        return float(code)
    if is_missing(cell):
        return math.nan
    alike = cell.casefold() in {level.casefold() for level in levels}
    found = "a level in other capitals" if alike else "another value"
    raise DataError(
        "unknown_level",
        f"{column}: found {found}, needed one of {', '.join(levels)}; recode the cell or leave "
        "it empty",
    )


def _level_codes(levels: Sequence[str]) -> dict[str, int]:
    return {_level_key(level): code for code, level in enumerate(levels)}


def _level_key(text: str) -> str:
    # Exports with gaps write whole numbers as 1.0, so numbers are compared as numbers.
    return repr(float(text)) if is_number(text) else text
