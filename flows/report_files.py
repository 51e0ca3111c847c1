"""Record, figures and report of a run as files, and the report written anew from them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from flows.figures import figure_svgs
from flows.record_values import record_values
from flows.report_page import render
from modalities.cohort import DataError
from modalities.files import replacing

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from flows.records import StudyRecord

RECORD, REPORT, FIGURES = "record.json", "report.html", "figures"


def write_report(record: StudyRecord, folder: Path, *, created: datetime) -> Path:
    """Write ``record.json``, ``figures/<name>.svg`` and ``report.html`` of a run; give the last.

    Parameters
    ----------
    folder
        Of the run; made where it does not exist.
    created
        When the run ended, with its time zone.
    """
    values, figures = record_values(record, created=created), figure_svgs(record)
    for name, svg in figures.items():
        _write(folder / FIGURES / f"{name}.svg", svg)
    _write(folder / RECORD, json.dumps(values, indent=1, allow_nan=False) + "\n")
    _write(folder / REPORT, render(values, figures))
    return folder / REPORT


def render_again(folder: Path) -> str:
    """Write the report of a finished run anew from its record and figures, as text.

    Raises
    ------
    modalities.cohort.DataError
        If the folder holds no record, or one that this version cannot show.
    """
    values = _read_record(folder / RECORD)
    figures = {
        path.stem: path.read_text(encoding="utf-8")
        for path in sorted((folder / FIGURES).glob("*.svg"))
    }
    try:
        return render(values, figures)
    except ValueError as error:
        raise DataError("wrong_record", str(error)) from None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "no_record", f"{path.name}: found none in the run's folder; run the study again"
        ) from None
    except ValueError:
        raise DataError("wrong_record", f"{path.name}: found no valid JSON") from None
    if not isinstance(values, dict):
        raise DataError("wrong_record", f"{path.name}: found no record, needed one of a run")
    return values


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
