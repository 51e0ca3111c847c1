"""Any per-patient table as a modality; also how every table of a site is read and written."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from modalities.cohort import DataError, Exclusion, feature_table
from modalities.files import fingerprint, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData

EXTRACTOR_VERSION = 1
"""Raised when the same table and spec would give other features."""

_MISSING = frozenset({"", ".", "na", "n/a", "nan", "null", "none"})
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_KINDS = {
    "an infinite value": re.compile(r"[+-]?inf(inity)?", re.IGNORECASE),
    "a decimal comma": re.compile(r"[+-]?\d+,\d+"),
    "a date": re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}.*"),
}
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class TabularSpec(BaseModel):
    """Which columns of a table are features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: tuple[str, ...] = Field(
        default=(),
        description="Feature columns in order; empty takes every numeric column. A study names "
        "them, so that all sites have the same ones and the outcome is not among them.",
    )
    patient_id: str = Field(
        default="patient_id", min_length=1, description="Column of the pseudonyms."
    )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        names = (self.patient_id, *self.columns)
        if len(set(names)) != len(names) or "" in names:
            raise ValueError("columns: needed distinct, non-empty names other than patient_id")
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the spec and of the extractor's version."""
        return fingerprint({"extractor": EXTRACTOR_VERSION, "spec": self.model_dump(mode="json")})


def read_table(path: Path, spec: TabularSpec, *, modality: str) -> tuple[AnnData, list[Exclusion]]:
    """Numeric features of every patient in a CSV file, one row per patient.

    Everything is read as text, so that pseudonyms such as ``001`` stay as they are. An empty cell
    and the usual markers (``NA``, ``nan``, ``null``, ``.``) become NaN. A patient with text or an
    infinite value in a feature column, without any value, or with several rows is set aside, and
    the others go on; their features do not depend on who else is in the file.

    With ``spec.columns`` empty, a column is numeric if more than half of its non-missing cells
    are numbers; text in the remaining cells sets those patients aside.

    Parameters
    ----------
    path
        CSV file: UTF-8, commas, one header row.
    spec
        Which columns are features.
    modality
        Name written to the exclusions.

    Returns
    -------
    table
        (n, p) features in the order of the file, with the digest of each patient's used values.
    exclusions
        One per patient set aside.

    Raises
    ------
    DataError
        If the file cannot be read, a column is missing, or no column is numeric.
    """
    rows, exclusions = read_patient_rows(
        path, columns=spec.columns, patient_id=spec.patient_id, modality=modality
    )
    columns = spec.columns or _numeric_columns(rows.values(), patient_id=spec.patient_id)
    kept: dict[str, list[float]] = {}
    for patient_id, row in rows.items():
        try:
            kept[patient_id] = _numbers(row, columns)
        except DataError as fault:
            exclusions.append(Exclusion(patient_id, modality, fault.code, str(fault)))
    table = feature_table(
        list(kept),
        columns,
        np.array(list(kept.values()), dtype=np.float64).reshape(len(kept), len(columns)),
        input_digests=[used_digest(dict(zip(columns, v, strict=True))) for v in kept.values()],
        spec_fingerprint=spec.fingerprint(),
    )
    return table, exclusions


def extract(
    source: Path, out: Path, spec: TabularSpec, *, modality: str = "tabular"
) -> tuple[AnnData, list[Exclusion]]:
    """Read the table ``source`` and write its features to ``out`` as `write_table` does.

    Raises
    ------
    DataError
        As `read_table`.
    """
    table, exclusions = read_table(source, spec, modality=modality)
    write_table(table, out, exclusions, name=modality)
    return table, exclusions


def read_patient_rows(
    path: Path, *, columns: Sequence[str], patient_id: str, modality: str
) -> tuple[dict[str, dict[str, str]], list[Exclusion]]:
    """Rows of a CSV file as text, one per patient, keyed by pseudonym in the order of the file.

    Cells are stripped of surrounding blanks and empty lines are passed over. A pseudonym with
    several rows is set aside whole, once; so is each row without a pseudonym.

    Parameters
    ----------
    path
        CSV file: UTF-8 (a byte-order mark is fine), commas, one header row.
    columns
        Names that the header must have beside ``patient_id``.
    patient_id
        Name of the column of pseudonyms.
    modality
        Name written to the exclusions.

    Raises
    ------
    DataError
        If the file is absent, empty, not a CSV file, has a row of another length than its header,
        or lacks a column.
    """
    header, lines = _parse(_text(path))
    for name in (patient_id, *columns):
        if name not in header:
            raise DataError(
                "missing_column",
                f"table: found {len(header)} columns without {name!r}, needed it; add the column "
                "or correct its name, capitals included",
            )
    rows = [dict(zip(header, line, strict=True)) for _, line in lines]
    ids = [row[patient_id] for row in rows]
    exclusions = [
        Exclusion("", modality, "missing_id", f"line {number}: found no patient id; add one")
        for (number, _), name in zip(lines, ids, strict=True)
        if is_missing(name)
    ]
    counts = Counter(name for name in ids if not is_missing(name))
    exclusions += [_repeated(name, modality, n) for name, n in counts.items() if n > 1]
    return {n: row for n, row in zip(ids, rows, strict=True) if counts[n] == 1}, exclusions


def is_missing(cell: str) -> bool:
    """Whether a cell is empty or one of the usual markers of a missing value."""
    return cell.casefold() in _MISSING


def is_number(cell: str) -> bool:
    """Whether a cell is a finite decimal number; digit grouping and ``inf`` are not."""
    return _NUMBER.fullmatch(cell) is not None and math.isfinite(float(cell))


def number(cell: str, column: str) -> float:
    """Value of a cell that should hold a number, NaN where it is missing.

    Raises
    ------
    DataError
        If the cell holds anything else; the message tells the kind of what was found, not the
        text itself, which may be a name typed into the wrong column.
    """
    if is_missing(cell):
        return math.nan
    if not is_number(cell):
        kind = kind_of(cell)
        code = "not_finite" if kind == "an infinite value" else "not_a_number"
        raise DataError(
            code, f"{column}: found {kind}, needed a number; correct the cell or leave it empty"
        )
    if abs(float(cell)) > _FLOAT32_MAX:
        raise DataError(
            "not_finite",
            f"{column}: found a number beyond single precision, needed at most "
            f"{_FLOAT32_MAX:.1e}; correct the cell or leave it empty",
        )
    return float(cell)


def kind_of(cell: str) -> str:
    """Name what a cell holds in words that cannot identify anyone: "a date", "text"..."""
    if is_missing(cell):
        return "nothing"
    if _NUMBER.fullmatch(cell):
        return "a number" if is_number(cell) else "an infinite value"
    return next((kind for kind, form in _KINDS.items() if form.fullmatch(cell)), "text")


def used_digest(values: Mapping[str, float | None]) -> str:
    """SHA-256 of a patient's used values by column, NaN counted as none; it stays at the site."""
    return fingerprint(
        {
            column: None if value is None or math.isnan(value) else value
            for column, value in values.items()
        }
    )


def write_table(
    table: AnnData, out: Path, exclusions: Sequence[Exclusion], *, name: str
) -> tuple[Path, ...]:
    """Write a feature table for people and programs.

    Each file is replaced whole, so that a kill leaves the old one or the new one.

    Parameters
    ----------
    table
        (n, p) features; n may be 0.
    out
        An ``.h5ad`` file for the table alone, or a folder for ``<name>.h5ad``, the same as
        ``<name>.csv`` and the patients set aside as ``excluded.csv``.
    exclusions
        Patients set aside.
    name
        Name of the files in a folder, usually the modality.

    Returns
    -------
    paths
        What was written.
    """
    if out.suffix == ".h5ad":
        _write_h5ad(table, out)
        return (out,)
    h5ad, flat, excluded = out / f"{name}.h5ad", out / f"{name}.csv", out / "excluded.csv"
    _write_h5ad(table, h5ad)
    features = pd.DataFrame(np.asarray(table.X), index=table.obs_names, columns=table.var_names)
    outcome = table.obs.drop(columns="input_digest", errors="ignore")
    _write_csv(pd.concat([outcome, features], axis=1).rename_axis("patient_id").reset_index(), flat)
    columns = ["patient_id", "modality", "code", "reason"]
    _write_csv(pd.DataFrame([vars(e) for e in exclusions], columns=columns), excluded)
    return h5ad, flat, excluded


def _write_h5ad(table: AnnData, target: Path) -> None:
    with replacing(target) as path:
        # The default would turn the caller's columns into categories.
        table.write_h5ad(path, convert_strings_to_categoricals=False)


def _write_csv(frame: pd.DataFrame, target: Path) -> None:
    with replacing(target) as path:
        frame.to_csv(path, index=False)


def _text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            "missing_file", "table: found no file, needed a CSV file; correct its path"
        ) from None
    except OSError:
        raise DataError(
            "unreadable_file",
            "table: found something that cannot be read, needed a CSV file; check its path and "
            "its permissions",
        ) from None
    except UnicodeDecodeError:
        raise _not_csv("bytes that are not UTF-8") from None
    if "\0" in text:
        raise _not_csv("a binary file")
    return text


def _parse(text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and each non-empty row with its line number."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    except csv.Error:
        raise _not_csv(f"broken quoting up to line {reader.line_num}") from None
    lines = [(number, line) for number, line in lines if any(line)]
    if len(lines) < 2:
        raise DataError(
            "empty_file",
            f"table: found {len(lines)} lines, needed a header and at least one patient; export "
            "it again",
        )
    header = lines[0][1]
    _check_header(header)
    for line_number, line in lines[1:]:
        if len(line) != len(header):
            raise DataError(
                "ragged_row",
                f"table: found {len(line)} cells on line {line_number}, needed {len(header)} as "
                "in the header; quote cells that hold commas, or export the file again",
            )
    return header, lines[1:]


def _check_header(header: Sequence[str]) -> None:
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise _not_csv("another separator than the comma")
    repeated = [name for name, n in Counter(header).items() if n > 1 and name]
    if repeated:
        raise DataError(
            "duplicate_column",
            f"table: found column {repeated[0]!r} more than once, needed distinct names; rename "
            "or drop one",
        )


def _not_csv(found: str) -> DataError:
    return DataError(
        "not_csv",
        f"table: found {found}, needed a CSV file in UTF-8 with commas between cells; export it "
        "again in that form",
    )


def _repeated(patient_id: str, modality: str, n: int) -> Exclusion:
    reason = f"patient id: found {n} rows, needed one; keep the right one"
    return Exclusion(patient_id, modality, "duplicate_id", reason)


def _numeric_columns(rows: Iterable[Mapping[str, str]], *, patient_id: str) -> tuple[str, ...]:
    balance: Counter[str] = Counter()
    for row in rows:
        for column, cell in row.items():
            if column not in ("", patient_id) and not is_missing(cell):
                balance[column] += 1 if is_number(cell) else -1
    columns = tuple(column for column, surplus in balance.items() if surplus > 0)
    if not columns:
        raise DataError(
            "no_features",
            "table: found no numeric column beside the patient id, needed at least one; name the "
            "columns or check the export",
        )
    return columns


def _numbers(row: Mapping[str, str], columns: Sequence[str]) -> list[float]:
    values = [number(row[column], column) for column in columns]
    if all(map(math.isnan, values)):
        raise DataError(
            "all_missing",
            f"features: found none of {len(columns)} values, needed at least one; fill them in or "
            "drop the row",
        )
    return values
