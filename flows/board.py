"""The page of one patient for a treatment board: made at the site, kept at the site."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from flows.board_page import render
from flows.prediction import SCORED, predict_cohort, survival_interval
from flows.prediction_files import BOARD, board_page, private_folder
from flows.registered_model import PredictionRefused
from flows.snapshots import COHORT, is_withdrawn
from flows.tile_maps import tile_map
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from flows.prediction import Prediction
    from flows.registered_model import StudyModel
    from flows.tile_maps import TileMap
    from infra.settings import SiteSettings

    Floats = NDArray[np.float64]

_FEWEST_BESIDE: Final = 20
_STEPS: Final = 120


@dataclass(frozen=True)
class BoardPatient:
    """Everything that a patient's page shows.

    Attributes
    ----------
    row
        Of the patient in the table of :func:`flows.prediction.predict_cohort`.
    columns, parts, has
        (m,) log hazard of each modality, its part of the patient's, and whether there is an input.
    times_days, survival
        (t,) from 0, and the lower end, value and upper end of survival then.
    usual
        (t,) survival of the middle patient of ``beside``; None where there are too few.
    beside
        Log hazards of the site's patients that the model was trained on, or evaluated on at a site
        that does not train.
    beside_trained
        Which of the two.
    tiles
        Map of the largest slide; None without one.
    """

    patient_id: str
    site: str
    model: StudyModel
    made: datetime
    row: pd.Series
    columns: Floats
    parts: Floats
    has: NDArray[np.bool_]
    times_days: Floats
    survival: tuple[Floats, Floats, Floats]
    usual: Floats | None
    beside: Floats
    beside_trained: bool
    notes: tuple[str, ...]
    tiles: TileMap | None

    @property
    def rank(self) -> float | None:
        """Share of the patients beside whose risk is lower; None where too few are known."""
        if len(self.beside) < _FEWEST_BESIDE:
            return None
        return float(np.mean(self.beside < self.row["log_hazard"]))


def write_boards(
    settings: SiteSettings,
    model: StudyModel,
    *,
    patients: Sequence[str] | None = None,
    cohort: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> tuple[list[Path], int]:
    """Write a page per patient below ``board`` at the site, for its own eyes.

    Parameters
    ----------
    patients
        Pseudonyms; by default everybody in the cohort who can be scored.
    cohort
        By default the site's own.
    advance
        Called with 1 after each page.

    Returns
    -------
    tuple
        The pages, and how many patients of ``patients`` have no modality that can be scored.

    Raises
    ------
    PredictionRefused
        If a patient that is asked for was withdrawn, or is not in the cohort.
    """
    if patients is not None and any(is_withdrawn(settings, patients).values()):
        raise PredictionRefused(
            "patient: found one who was withdrawn, needed one who takes part; nothing may be said "
            "of this patient any more"
        )
    path = settings.path(COHORT) if cohort is None else cohort
    found = predict_cohort(settings, model, path, only=patients)
    beside, trained = patients_beside(settings, model)
    scored = np.flatnonzero(found.table["status"] == SCORED)
    if patients is not None and len(scored) < len(patients):
        raise PredictionRefused(
            "patient: found one without any modality that the model can read, needed at least one"
        )
    private_folder(settings.path(BOARD))
    pages = []
    for at in scored:
        shown = _patient(settings, model, found, int(at), beside=(beside, trained))
        pages.append(_write(settings, shown))
        if advance is not None:
            advance(1)
    return pages, len(found.table) - len(scored)


def _write(settings: SiteSettings, shown: BoardPatient) -> Path:
    target = board_page(settings.home, shown.patient_id)
    with replacing(target) as temporary:
        temporary.chmod(0o600)
        temporary.write_text(render(shown), encoding="utf-8")
    return target


def _patient(
    settings: SiteSettings,
    model: StudyModel,
    found: Prediction,
    at: int,
    *,
    beside: tuple[Floats, bool],
) -> BoardPatient:
    row, columns = found.table.iloc[at], found.columns[at : at + 1]
    times = np.linspace(0.0, max(model.protocol.study.grid_days), _STEPS + 1)
    hazard, error = (np.array([row[x]]) for x in ("log_hazard", "standard_error"))
    low, value, high = survival_interval(model.fusion, hazard, error, times)
    usual = None
    if len(beside[0]) >= _FEWEST_BESIDE:
        middle = np.array([np.median(beside[0])])
        usual = survival_interval(model.fusion, middle, np.zeros(1), times)[1][0]
    patient_id = str(found.table.index[at])
    return BoardPatient(
        patient_id=patient_id,
        site=settings.name,
        model=model,
        made=datetime.now(UTC),
        row=row,
        columns=columns[0],
        parts=model.fusion.contributions(columns)[0],
        has=~np.isnan(columns[0]),
        times_days=times,
        survival=(low[0], value[0], high[0]),
        usual=usual,
        beside=beside[0],
        beside_trained=beside[1],
        notes=found.notes,
        tiles=tile_map(found.scorer, patient_id),
    )


def patients_beside(settings: SiteSettings, model: StudyModel) -> tuple[Floats, bool]:
    """Read what the run said of the site's patients in training, or else in evaluation.

    Returns
    -------
    tuple
        (n,) log hazards, none where the site has no table of the run; and whether they are of
        patients in training.
    """
    path = settings.path("runs", model.run[:12], "patients.csv")
    if not path.is_file():
        return np.zeros(0), True
    table = pd.read_csv(path, usecols=["split", "log_hazard"]).dropna()
    trained = bool((table["split"] == "train").any())
    kept = table[table["split"] == ("train" if trained else "test")]
    return kept["log_hazard"].to_numpy(dtype=np.float64), trained
