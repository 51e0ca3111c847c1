"""Read RNA, outcome, covariates and gene sets of TCGA as public survival benchmarks lay them out.

Nothing here looks at more than one patient at a time, except which columns vary at all.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

GeneSets = dict[str, tuple[str, ...]]

DAYS_PER_MONTH: Final = 365.25 / 12
# Known names, the first that a file has is taken; case and the marks _ . - and space do not count.
PATIENT: Final = ("case_id", "patient_id", "bcr_patient_barcode", "submitter_id", "patient",
                  "slide_id", "sample", "barcode")  # fmt: skip
TIME: Final = ("survival_days", "os_days", "OS.time", "time_days", "survival_months",
               "overall_survival_months", "os_months")  # fmt: skip
EVENT: Final = ("event", "OS", "OS_status", "vital_status")
CENSORED: Final = ("censorship", "censored")
COVARIATES: Final[Mapping[str, tuple[str, ...]]] = {
    "age": ("age", "age_at_index", "age_at_initial_pathologic_diagnosis", "age_at_diagnosis"),
    "female": ("is_female", "gender", "sex"),
    "stage": ("stage", "ajcc_pathologic_tumor_stage", "ajcc_pathologic_stage",
              "pathologic_stage", "tumor_stage"),
    "grade": ("grade", "histological_grade", "neoplasm_histologic_grade", "tumor_grade"),
}  # fmt: skip
_BARCODE = re.compile(r"TCGA[-.](?P<site>[A-Z0-9]{2})[-.][A-Z0-9]{4}(?:[-.](?P<sample>\d{2}))?.*")
_PATIENT_LENGTH = len("TCGA-XX-XXXX")
_PRIMARY_TUMOUR = "01"
_YES = frozenset({"1", "1.0", "true", "yes", "dead", "deceased", "1:deceased"})
_NO = frozenset({"0", "0.0", "false", "no", "alive", "living", "0:living"})
_FEMALE = {"1": 1.0, "1.0": 1.0, "female": 1.0, "f": 1.0, "true": 1.0,
           "0": 0.0, "0.0": 0.0, "male": 0.0, "m": 0.0, "false": 0.0}  # fmt: skip
_STAGE = re.compile(r"(?:stage\s*)?(?P<stage>iv|iii|ii|i|[1-4])(?:\.0)?\s*[abcs]?[0-9]?")
_ROMAN = {"i": 1.0, "ii": 2.0, "iii": 3.0, "iv": 4.0}
_GRADE = {"low grade": 1.0, "low": 1.0, "high grade": 3.0, "high": 3.0}
_GRADED = re.compile(r"g?(?P<grade>[1-4])(?:\.0)?")
# What Xena writes where nothing was counted: log2(0 + 0.001).
_XENA_OFFSET = 0.001
_SUFFIX = re.compile(r"(?:\|.*|_rnaseq)$")


@dataclass(frozen=True)
class Rna:
    """Expression by patient: ``values`` (n, g) as logarithms, NaN for missing.

    Attributes
    ----------
    other_samples
        How many further samples of a patient were left out.
    scale
        What the values are, in words.
    """

    values: pd.DataFrame
    other_samples: int
    scale: str


@dataclass(frozen=True)
class OutcomeColumns:
    """Names of columns that a file has instead of the known ones."""

    time: str | None = None
    event: str | None = None
    censored: str | None = None


def patient_of(barcode: str) -> str:
    """Patient's part of a barcode, ``TCGA-XX-XXXX``; empty where the text is no barcode."""
    if _BARCODE.fullmatch(barcode) is None:
        return ""
    return barcode[:_PATIENT_LENGTH].replace(".", "-")


def tissue_source_site(patient: str) -> str:
    """Two characters of a barcode that say which hospital sent the tissue."""
    return patient.split("-")[1]


def read_rna(path: Path) -> Rna:
    """Expression with patients in rows, whichever way round the file has them.

    Of a patient's samples the first primary tumour is taken, else the first; rows of one gene are
    averaged. Values that are log2(x + 0.001) become log2(x + 1), so that a gene that was not
    found does not outweigh those that were.

    Raises
    ------
    DataError
        If the file is missing or no table, or barcodes stand neither in a column nor the header.
    """
    header, table = _read(path)
    column = _barcode_column(table)
    if column is not None:
        barcodes = table.pop(column).astype(str).tolist()
        table.columns = pd.Index(header).delete(column)
    elif any(patient_of(x) for x in header):
        barcodes = [x for x in header if patient_of(x)]
        names = next((c for c in table.columns if not _is_number(table[c])), table.columns[0])
        genes = table[names].astype(str)
        table = table.loc[:, [bool(patient_of(x)) for x in header]].set_axis(genes, axis=0).T
    else:
        raise DataError(
            "no_barcodes", f"{path.name}: needed TCGA barcodes in a column or in the header"
        )
    table = table.loc[:, [str(x).strip() != "" for x in table.columns]]
    return _one_row_each(table, barcodes)


def _read(path: Path) -> tuple[list[str], pd.DataFrame]:
    """Header as it is written, repeated names included, and the rows below it."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline()
        mark = "\t" if first.count("\t") > first.count(",") else ","
        header = next(csv.reader([first], delimiter=mark))
        table = pd.read_csv(path, sep=mark, header=None, skiprows=1, low_memory=False)
    except FileNotFoundError:
        raise DataError("missing_file", f"{path.name}: found no such file, needed a CSV") from None
    except (OSError, ValueError, StopIteration):
        raise DataError("unreadable", f"{path.name}: needed a CSV table in UTF-8") from None
    if table.shape[1] == len(header) + 1:  # a header without a name for the row names
        header = ["", *header]
    if table.shape[1] != len(header):
        raise DataError("unreadable", f"{path.name}: needed as many names as columns")
    return header, table


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column)


def _barcode_column(table: pd.DataFrame) -> int | None:
    for name in table.columns:
        if not _is_number(table[name]):
            is_barcode = [bool(patient_of(x)) for x in table[name].astype(str)]
            if np.mean(is_barcode) > 0.5:
                return int(name)
    return None


def _one_row_each(table: pd.DataFrame, barcodes: Sequence[str]) -> Rna:
    is_text = [i for i, kind in enumerate(table.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
    values = table.set_axis(range(table.shape[1]), axis=1)
    values[is_text] = values[is_text].apply(pd.to_numeric, errors="coerce")
    values = values.astype(np.float64)
    values.columns = pd.Index([_SUFFIX.sub("", str(x).strip()) for x in table.columns])
    values = values.loc[:, ~values.isna().all(axis=0).to_numpy()]
    if values.empty:
        raise DataError("empty", "expression table: found no number, needed one per gene")
    if values.columns.has_duplicates:
        values = values.T.groupby(level=0, sort=False).mean().T
    chosen = _primary_first(barcodes)
    values = values.iloc[list(chosen.values())].set_axis(list(chosen), axis=0)
    n_samples = sum(bool(patient_of(x)) for x in barcodes)
    values, scale = _as_log(values.replace([np.inf, -np.inf], np.nan))
    return Rna(values, n_samples - len(chosen), scale)


def _primary_first(barcodes: Sequence[str]) -> dict[str, int]:
    """Per patient which row stands for them."""
    chosen: dict[str, int] = {}
    primary: set[str] = set()
    for row, barcode in enumerate(barcodes):
        found = _BARCODE.fullmatch(barcode)
        if found is None:
            continue
        patient = patient_of(barcode)
        is_primary = found["sample"] == _PRIMARY_TUMOUR
        if patient not in chosen or (is_primary and patient not in primary):
            chosen[patient] = row
        if is_primary:
            primary.add(patient)
    return chosen


def _as_log(values: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    if abs(float(np.nanmin(values.to_numpy())) - np.log2(_XENA_OFFSET)) > 0.01:
        return values, "as in the file"
    count = np.exp2(values) - _XENA_OFFSET
    return np.log2(np.maximum(count, 0.0) + 1.0), "log2(x + 0.001) turned into log2(x + 1)"


def read_outcome(path: Path, *, columns: OutcomeColumns) -> tuple[pd.DataFrame, dict[str, str]]:
    """By patient ``event`` and ``time`` in days, and which columns they were read from.

    A file with a row per slide gives each patient's first row. A time is in months where its
    column's name says so. Patients without an outcome, or with a time of 0, are left out.

    Raises
    ------
    DataError
        If the file is missing, has no patient, or lacks a column for the time or the event.
    """
    table = _by_patient(path)
    time = _named(table, (columns.time,) if columns.time else TIME)
    event, observed = _event_column(table, columns)
    if time is None or event is None:
        what, known = ("time", TIME) if time is None else ("event", (*EVENT, *CENSORED))
        raise DataError(
            "missing_column",
            f"{path.name}: found {_shown(table)}, needed a column for the {what}: {_list(known)}, "
            "or its name on the command line",
        )
    happened = _flags(table[event])
    days = _numbers(table[time]) * (DAYS_PER_MONTH if "month" in _plain(time) else 1.0)
    known_outcome = happened.notna() & (days > 0) & np.isfinite(days)
    outcome = pd.DataFrame({"event": happened == observed, "time": days})[known_outcome]
    if outcome.empty:
        raise DataError("no_outcome", f"{path.name}: found no patient with a time and an event")
    return outcome, {"time": time, "event": event}


def _event_column(table: pd.DataFrame, columns: OutcomeColumns) -> tuple[str | None, float]:
    """Column that tells the event, and its value where the event was observed."""
    if columns.event or columns.censored:
        found = _named(table, (columns.event or columns.censored,))
        return found, 1.0 if columns.event else 0.0
    event = _named(table, EVENT)
    return (event, 1.0) if event else (_named(table, CENSORED), 0.0)


def read_covariates(paths: Sequence[Path]) -> pd.DataFrame:
    """By patient age, sex, stage and grade as numbers, as far as the files have them.

    The first file that has a column is taken. A column that does not vary is left out.
    """
    tables = [_by_patient(path) for path in paths]
    found = {}
    for name, known in COVARIATES.items():
        for table in tables:
            column = _named(table, known)
            if column is not None and name not in found:
                found[name] = _CODED[name](table[column])
    covariates = pd.DataFrame(found)
    return covariates.loc[:, covariates.nunique() > 1]


def _by_patient(path: Path) -> pd.DataFrame:
    """Cells as text, the first row of each patient, by patient."""
    header, table = _read(path)
    text = table.astype(object).where(table.notna(), None)
    text.columns = pd.Index(header)
    text = text.loc[:, ~text.columns.duplicated()]
    column = next((c for c in _matches(text, PATIENT) if _holds_barcodes(text[c])), None)
    if column is None:
        raise DataError(
            "missing_column",
            f"{path.name}: found {_shown(text)}, needed TCGA barcodes in one of {_list(PATIENT)}",
        )
    patients = [patient_of(str(x)) for x in text[column]]
    text.index = pd.Index(patients)
    return text[(text.index != "") & ~text.index.duplicated()]


def _holds_barcodes(column: pd.Series) -> bool:
    return any(patient_of(str(x)) for x in column)


def _plain(name: str) -> str:
    return re.sub(r"[\s_.\-]", "", name).lower()


def _matches(table: pd.DataFrame, known: Sequence[str]) -> list[str]:
    by_plain = {_plain(str(column)): str(column) for column in reversed(table.columns)}
    return [by_plain[_plain(name)] for name in known if _plain(name) in by_plain]


def _named(table: pd.DataFrame, known: Sequence[str | None]) -> str | None:
    return next(iter(_matches(table, [x for x in known if x])), None)


def _shown(table: pd.DataFrame) -> str:
    names = [str(x) for x in table.columns if str(x).strip()]
    return f"columns {_list(names[:12])}{' and others' if len(names) > 12 else ''}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _text(column: pd.Series) -> pd.Series:
    return column.map(lambda x: "" if x is None else str(x).strip().lower())


def _flags(column: pd.Series) -> pd.Series:
    return _text(column).map(lambda x: 1.0 if x in _YES else 0.0 if x in _NO else np.nan)


def _numbers(column: pd.Series) -> pd.Series:
    return pd.to_numeric(column, errors="coerce").astype(np.float64)


def _female(column: pd.Series) -> pd.Series:
    return _text(column).map(lambda x: _FEMALE.get(x, np.nan))


def _stages(column: pd.Series) -> pd.Series:
    def stage(text: str) -> float:
        found = _STAGE.fullmatch(text)
        return np.nan if found is None else _ROMAN.get(found["stage"]) or float(found["stage"])

    return _text(column).map(stage)


def _grades(column: pd.Series) -> pd.Series:
    def grade(text: str) -> float:
        found = _GRADED.fullmatch(text)
        return _GRADE.get(text, np.nan) if found is None else float(found["grade"])

    return _text(column).map(grade)


_CODED: Final = {"age": _numbers, "female": _female, "stage": _stages, "grade": _grades}


def read_gene_sets(path: Path) -> GeneSets:
    """Read sets of genes: a column each, a row each (``.gmt``), or pairs of set and gene.

    Raises
    ------
    DataError
        If the file is missing or holds no set.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, delimiter="\t" if path.suffix == ".gmt" else ","))
    except FileNotFoundError:
        raise DataError("missing_file", f"{path.name}: found no such file, needed a CSV") from None
    except (OSError, ValueError, csv.Error):
        raise DataError("unreadable", f"{path.name}: needed a CSV table in UTF-8") from None
    sets = {name: tuple(dict.fromkeys(genes)) for name, genes in _sets(path, rows).items() if genes}
    if not sets:
        raise DataError("empty", f"{path.name}: found no gene set, needed at least one")
    return sets


def _sets(path: Path, rows: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    if path.suffix == ".gmt":  # name, description, genes
        return {row[0]: _genes(row[2:]) for row in rows if len(row) > 2}
    header, below = (rows[0], rows[1:]) if rows else ((), ())
    if sorted(map(_plain, header)) in (["gene", "set"], ["gene", "geneset"], ["gene", "pathway"]):
        at = [_plain(x) for x in header].index("gene")
        sets: dict[str, list[str]] = {}
        for row in below:
            sets.setdefault(row[1 - at], []).extend(_genes(row[at : at + 1]))
        return sets
    return {
        name: _genes([row[column] for row in below if column < len(row)])
        for column, name in enumerate(header)
        if name.strip() and not name.startswith("Unnamed")
    }


def _genes(cells: Sequence[str]) -> list[str]:
    return [x.strip() for x in cells if x.strip() and x.strip().lower() != "nan"]


def pack_sites(codes: Sequence[str], n_sites: int) -> dict[str, tuple[str, ...]]:
    """Merge tissue source sites, always the two smallest, until ``n_sites`` groups remain.

    Parameters
    ----------
    codes
        (n,) tissue source site of each patient.

    Returns
    -------
    dict
        Codes of each group; the largest is ``site_1``.

    Raises
    ------
    DataError
        If there are fewer codes than groups.
    """
    names, counts = np.unique(np.asarray(codes, dtype=str), return_counts=True)
    groups: list[tuple[int, tuple[str, ...]]] = [
        (int(n), (str(name),)) for name, n in zip(names, counts, strict=True)
    ]
    if len(groups) < n_sites:
        raise DataError(
            "too_few_sites",
            f"--n-sites: found {len(groups)} tissue source sites, needed at least {n_sites}",
        )
    while len(groups) > n_sites:
        groups.sort()
        (n, few), (more, others) = groups[:2]
        groups[:2] = [(n + more, tuple(sorted(few + others)))]
    ordered = sorted(groups, key=lambda group: (-group[0], group[1]))
    return {f"site_{i + 1}": found for i, (_, found) in enumerate(ordered)}


def pathway_scores(
    expression: pd.DataFrame, sets: GeneSets, *, most: int, fewest_genes: int
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Mean of each set's genes, per patient: the score of a study's own omics modality.

    Parameters
    ----------
    expression
        (n, g) logarithms by patient.
    most, fewest_genes
        How many sets are kept, those of the most genes present, and how many genes a set needs.

    Returns
    -------
    scores
        (n, p), columns in order of their names.
    dropped
        How many sets had too few genes, and how many were beyond ``most``.

    Raises
    ------
    DataError
        If no set has enough of its genes.
    """
    members = {name: [x for x in genes if x in expression] for name, genes in sets.items()}
    enough = {name: genes for name, genes in members.items() if len(genes) >= fewest_genes}
    if not enough:
        raise DataError(
            "no_genes",
            f"gene sets: found none with {fewest_genes} genes of the expression table, needed "
            "the same gene symbols in both",
        )
    largest = sorted(enough, key=lambda name: (-len(enough[name]), name))[:most]
    scores = {name: expression[enough[name]].mean(axis=1) for name in sorted(largest)}
    return pd.DataFrame(scores), {
        "too few genes": len(sets) - len(enough),
        "smallest": len(enough) - len(largest),
    }


def in_order(table: pd.DataFrame, patients: pd.Index) -> NDArray[np.float64]:
    """(n, p) rows of these patients, NaN for who is not in the table."""
    return table.reindex(patients).to_numpy(dtype=np.float64)
