"""What a site keeps of its patients' risks: where it is, who may read it, and how it goes."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from modalities.files import replacing

if TYPE_CHECKING:
    import pandas as pd

FOLDER: Final = "predictions"
TABLE: Final = "predictions.csv"
BOARD: Final = "board"
_WRITTEN: Final = "written.json"
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST: Final = 60


def write_predictions(table: pd.DataFrame, target: Path, *, home: Path) -> None:
    """Write a table of risks, readable by its owner alone, and remember where it is.

    Parameters
    ----------
    home
        Folder of the site, which must find the table again when a patient withdraws.
    """
    # Remembered first: a table that nobody knows of could never be withdrawn.
    _remember(home, target.resolve())
    with replacing(target) as temporary:
        temporary.chmod(0o600)
        table.to_csv(temporary)


def written_predictions(home: Path) -> list[Path]:
    """List the tables of risks that a site ever wrote and that still exist."""
    try:
        listed = json.loads((home / FOLDER / _WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        listed = []
    known = {Path(x) for x in listed if isinstance(x, str)}
    return sorted(path for path in known | set((home / FOLDER).glob("*.csv")) if path.is_file())


def _remember(home: Path, target: Path) -> None:
    private_folder(home / FOLDER)
    known = {str(target), *map(str, written_predictions(home))}
    with replacing(home / FOLDER / _WRITTEN) as temporary:
        temporary.chmod(0o600)
        temporary.write_text(json.dumps(sorted(known)), encoding="utf-8")


def private_folder(folder: Path) -> Path:
    """Make a folder that only its owner may enter."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def board_page(home: Path, patient_id: str) -> Path:
    """Give the page of one patient; two pseudonyms never share one, whatever is in them."""
    return home / BOARD / f"{page_stem(patient_id)}.html"


def page_stem(patient_id: str) -> str:
    """Turn a pseudonym into a name that every file system takes, with no path in it.

    Examples
    --------
    >>> page_stem("p-001")
    'p-001'
    """
    plain = _UNSAFE.sub("_", patient_id)[:_LONGEST]
    if plain and plain == patient_id:
        return plain
    return f"{plain}.{hashlib.sha256(patient_id.encode(errors='replace')).hexdigest()[:12]}"


def forget_patient(home: Path, patient_id: str) -> int:
    """Delete the page of a patient, and every table of risks that lists the patient.

    Returns
    -------
    int
        How many files are gone.
    """
    gone = [board_page(home, patient_id)]
    gone += [x for x in written_predictions(home) if _lists(x, patient_id)]
    return sum(_removed(path) for path in gone)


def _lists(path: Path, patient_id: str) -> bool:
    """Whether a table names a patient; one saved anew in another form counts by its bytes."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            if "patient_id" in (table.fieldnames or ()):
                return any(row["patient_id"] == patient_id for row in table)
    except (UnicodeDecodeError, csv.Error):
        pass
    content = path.read_bytes()
    codings = ("utf-8", "latin-1", "utf-16-le")
    return any(patient_id.encode(x, errors="replace") in content for x in codings)


def _removed(path: Path) -> bool:
    existed = path.is_file()
    path.unlink(missing_ok=True)
    return existed
