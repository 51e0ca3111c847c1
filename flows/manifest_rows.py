"""Which rows of a site's manifest its cohort was made from, as keyed digests that name nobody.

The manifest is the site's own and grows from night to night. What matters to a version are the rows
behind its snapshot: they are noted when a night begins, kept with the snapshot that is cut of its
cohort, and must still be in the manifest as they were.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Final

from flows.cohort_changes import keyed
from modalities.cohort import MANIFEST_COLUMNS
from modalities.files import fingerprint, replacing

if TYPE_CHECKING:
    from pathlib import Path

    from mudata import MuData

    from infra.settings import SiteSettings

    Rows = dict[str, list[str]]

ROWS: Final = "rows.json"
_FEATURES: Final = "features"


def read_rows(path: Path) -> list[dict[str, str]]:
    """Read a table of text, without spaces around its cells; no rows where there is no file.

    Raises
    ------
    ValueError, csv.Error
        If it is no such table.
    """
    rows = _cells(path) if path.is_file() else []
    return [{k: v.strip() for k, v in row.items() if isinstance(v, str)} for row in rows]


def _cells(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file, skipinitialspace=True, restval=""))


def note_rows(settings: SiteSettings) -> None:
    """Note the rows of the manifest that a night is about to work from."""
    noted = settings.path(_FEATURES, ROWS)
    try:
        rows = _digests(settings)
    except (OSError, ValueError, csv.Error):  # a night goes on with what it can read of it
        noted.unlink(missing_ok=True)
        return
    with replacing(noted) as temporary:
        temporary.write_text(json.dumps(rows))


def keep_rows(settings: SiteSettings, folder: Path) -> None:
    """Keep what was noted with a snapshot that is cut of the draft."""
    noted = settings.path(_FEATURES, ROWS)
    if noted.is_file():
        shutil.copyfile(noted, folder / ROWS)


def compare_rows(settings: SiteSettings, cohort: MuData, folder: Path) -> tuple[int, int] | None:
    """Hold the manifest against the rows behind a snapshot.

    Parameters
    ----------
    folder
        Of the snapshot.

    Returns
    -------
    tuple or None
        How many inputs of the cohort are not listed as they were, and how many rows came since;
        None where none were noted.

    Raises
    ------
    OSError, ValueError, csv.Error
        If the manifest cannot be read.
    """
    then = _read(folder / ROWS)
    if then is None:
        return None
    now = _digests(settings)
    mine = {
        _input(settings, patient_id, modality)
        for modality, table in cohort.mod.items()
        for patient_id in table.obs_names
    }
    gone, came = _less(then, now), _less(now, then)
    return sum(gone[x] > 0 for x in mine), came.total()


def _less(one: Rows, other: Rows) -> Counter[str]:
    """Count the rows of one listing that another does not have, by input."""
    return Counter(
        {x: (Counter(rows) - Counter(other.get(x, ()))).total() for x, rows in one.items()}
    )


def _digests(settings: SiteSettings) -> Rows:
    """Keyed digest of each row, by the keyed patient and modality whose input it lists."""
    found: Rows = defaultdict(list)
    for row in _cells(settings.path(settings.manifest)):
        # A column that is not there is another thing than one without a word.
        cells = fingerprint([row.get(column) for column in MANIFEST_COLUMNS])
        of = _input(settings, row.get("patient_id", ""), row.get("modality", ""))
        found[of].append(keyed(settings.key, "row", cells))
    return dict(found)


def _input(settings: SiteSettings, patient_id: str, modality: str) -> str:
    return keyed(settings.key, "input", fingerprint([patient_id, modality]))


def _read(path: Path) -> Rows | None:
    try:
        values = json.loads(path.read_bytes())
        return {str(x): [str(row) for row in rows] for x, rows in values.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
