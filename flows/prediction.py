"""What a registered model says of a site's patients: scored at the site, for its own eyes only.

A patient is scored as the study scored its test patients: the site's location and scale come from
the rows that the site brought to the model's run, shared encoders are those of the run, and local
ones are the site's own.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from flows.registered_model import PredictionRefused
from flows.site_scoring import SiteScorer, find_basis
from flows.snapshots import is_withdrawn
from fusion.discrete import survival_from_log_odds
from fusion.late import LogisticHazardModel
from fusion.survival import cumulative_hazard
from modalities.pathology import PathologySpec

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mudata import MuData
    from numpy.typing import ArrayLike, NDArray

    from flows.protocol import StudyProtocol
    from flows.registered_model import StudyModel
    from flows.site_scoring import Basis
    from fusion.late import FusionModel
    from infra.settings import SiteSettings

    Floats = NDArray[np.float64]

SCORED: Final = "scored"
NO_MODALITY: Final = "no modality"
NO_ENCODER: Final = "no modality with an encoder"
_NORMAL_95: Final = 1.959963984540054


@dataclass(frozen=True)
class Prediction:
    """Risks of a site's patients, and what was made of their inputs.

    Attributes
    ----------
    table
        One row per patient; see :func:`predict_cohort`.
    columns
        (n, m) log hazard of each modality as the model reads it, NaN where absent.
    has
        (n, m) which patients have an input of which modality, whether it could be encoded or not.
    scorer
        What encoded the patients, with the site's own encoders.
    notes
        What a reader of the risks should know, in sentences that name no patient.
    """

    table: pd.DataFrame
    columns: Floats
    has: NDArray[np.bool_]
    scorer: SiteScorer
    notes: tuple[str, ...] = ()


def read_patients(path: Path, model: StudyModel) -> MuData:
    """Read a cohort to be scored; its patients need no outcome.

    Raises
    ------
    PredictionRefused
        If it cannot be read, was made under another protocol, or has other columns.
    """
    import mudata as md

    if not path.is_file():
        raise PredictionRefused(
            "cohort: found no such file, needed a cohort.h5mu; run `consilium site prepare`"
        )
    try:
        with warnings.catch_warnings(), md.set_options(pull_on_update=False):
            warnings.simplefilter("ignore")
            cohort = md.read_h5mu(path)
            made_under = str(cohort.uns.get("protocol_fingerprint", ""))
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError):
        raise PredictionRefused(
            "cohort: found a file that is no readable cohort, needed one as `consilium site "
            "prepare` writes it"
        ) from None
    wanted = model.fingerprint
    if made_under != wanted:
        raise PredictionRefused(
            f"cohort: found one made under protocol {made_under[:12] or 'of no name'}, needed "
            f"{wanted[:12]}, that of {model.title}; prepare the site under the model's study.toml"
        )
    if not cohort.obs_names.is_unique:
        raise PredictionRefused("cohort: found repeated patient ids, needed each patient once")
    for name in model.protocol.modalities:
        _check_columns(cohort, name, model.protocol)
    return cohort


def _check_columns(cohort: MuData, name: str, protocol: StudyProtocol) -> None:
    if name not in cohort.mod:
        return
    table = cohort.mod[name]
    if isinstance(protocol.modality[name], PathologySpec):
        if table.n_obs and "bag" not in table.obs:
            raise PredictionRefused(f"cohort: {name}: found no tiles, needed a bag per patient")
        return
    lacking = [x for x in protocol.encoder_inputs(name) if x not in table.var_names]
    if lacking:
        raise PredictionRefused(
            f"cohort: {name}: found no column {lacking[0]}, needed the {len(lacking)} that the "
            "model reads and the cohort lacks; extract it under the model's study.toml"
        )


def predict_cohort(
    settings: SiteSettings, model: StudyModel, path: Path, *, only: Sequence[str] | None = None
) -> Prediction:
    """Score the patients of a cohort at a site.

    Parameters
    ----------
    path
        A ``cohort.h5mu``; bags of tiles are in the folder ``features`` beside it, or in the site's.
    only
        Pseudonyms of those to score; by default everybody.

    Returns
    -------
    Prediction
        Its ``table`` is indexed by patient id: ``status`` (scored, or why not), ``in_study``
        (whether the model was fitted on the patient: train, test, no, or unknown), ``log_hazard``
        (higher is worse) and its ``standard_error``; ``risk_by_DAYS_days`` of the event by the
        horizon, with ``_low`` and ``_high``; ``survival_DAYS`` at each time of the grid, with the
        same; per modality ``contribution_NAME``, its part of the log hazard; ``lacking``, the
        modalities that the patient has no input of; ``extrapolates``, inputs further than 5
        standard deviations from those that were trained on. Intervals hold the model's
        coefficients and unmeasured modalities to be uncertain, and its baseline to be known.

    Raises
    ------
    PredictionRefused
        If the cohort is not one that the model can read, or one of ``only`` is not in it.
    """
    cohort = read_patients(path, model)
    gone = is_withdrawn(settings, cohort.obs_names)
    notes = []
    if any(gone.values()):
        notes.append(f"{sum(gone.values())} withdrawn patients are left out")
        cohort = _subset(cohort, [x for x in cohort.obs_names if not gone[x]])
    if cohort.n_obs == 0:
        raise PredictionRefused("cohort: found no patient, needed at least one to score")
    beside = path.parent / "features"
    features = beside if beside.is_dir() else settings.path("features")
    basis, said = find_basis(settings, model, cohort, features)
    if only is not None:
        cohort = _subset(cohort, _known(only, cohort))
    scorer = SiteScorer(settings, model, basis, cohort, features)
    columns = np.column_stack([scorer.column(x) for x in model.fusion.modalities])
    has = np.column_stack([scorer.present(x) for x in model.fusion.modalities])
    table = _risks(model, columns, cohort.obs_names)
    table.insert(0, "status", _status(columns, has))
    table.insert(1, "in_study", _in_study(cohort, basis))
    table["lacking"] = [_names(model, ~row) for row in has]
    table["extrapolates"] = scorer.extrapolations(columns)
    return Prediction(table, columns, has, scorer, (*notes, *said, *scorer.notes))


def _known(only: Sequence[str], cohort: MuData) -> list[str]:
    ids = set(cohort.obs_names)
    if not ids.issuperset(only):
        raise PredictionRefused(
            "patient: found nobody of this pseudonym in the cohort, needed one as the cohort "
            "writes it, with the patient's inputs prepared"
        )
    return list(only)


def _subset(cohort: MuData, ids: Sequence[str]) -> MuData:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cohort[np.array(ids, dtype=object)].copy()


def _names(model: StudyModel, picked: NDArray[np.bool_]) -> str:
    return ", ".join(x for x, one in zip(model.fusion.modalities, picked, strict=True) if one)


def _status(columns: Floats, has: NDArray[np.bool_]) -> list[str]:
    scored = np.asarray(~np.isnan(columns).all(axis=1))
    some = np.asarray(has.any(axis=1))
    return [
        SCORED if one else NO_ENCODER if any_input else NO_MODALITY
        for one, any_input in zip(scored, some, strict=True)
    ]


def _in_study(cohort: MuData, basis: Basis) -> list[str]:
    if not basis.of_run:
        return ["unknown"] * cohort.n_obs
    train = set(basis.cohort.obs_names[basis.fit]) if basis.trains else set()
    known = set(basis.cohort.obs_names)
    return ["train" if x in train else "test" if x in known else "no" for x in cohort.obs_names]


def _risks(model: StudyModel, columns: Floats, ids: Sequence[str]) -> pd.DataFrame:
    study, fusion = model.protocol.study, model.fusion
    table = pd.DataFrame(index=pd.Index(ids, name="patient_id"))
    log_hazard, error = fusion.predict(columns), fusion.predict_standard_error(columns)
    table["log_hazard"], table["standard_error"] = log_hazard, error
    horizon = np.array([study.horizon_days])
    low, value, high = survival_interval(fusion, log_hazard, error, horizon)
    risk = f"risk_by_{study.horizon_days:g}_days"
    table[risk] = 1.0 - value[:, 0]
    table[f"{risk}_low"], table[f"{risk}_high"] = 1.0 - high[:, 0], 1.0 - low[:, 0]
    grid = np.array(study.grid_days)
    low, value, high = survival_interval(fusion, log_hazard, error, grid)
    for at, days in enumerate(grid):
        table[f"survival_{days:g}"] = value[:, at]
        table[f"survival_{days:g}_low"] = low[:, at]
        table[f"survival_{days:g}_high"] = high[:, at]
    for name, part in zip(fusion.modalities, fusion.contributions(columns).T, strict=True):
        table[f"contribution_{name}"] = part
    return table


def survival_interval(
    model: FusionModel, log_hazard: Floats, standard_error: Floats, times_days: ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """(n, t) survival at each time: lower end of the 95 % interval, value, upper end.

    The interval is that of the log hazard, carried over; the baseline counts as known.
    """
    width = _NORMAL_95 * standard_error
    worse, value, better = (
        _survival(model, hazard, times_days)
        for hazard in (log_hazard + width, log_hazard, log_hazard - width)
    )
    return worse, value, better


def _survival(model: FusionModel, log_hazard: Floats, times_days: ArrayLike) -> Floats:
    times = np.asarray(times_days, dtype=np.float64)
    if isinstance(model, LogisticHazardModel):
        survival = np.full((len(log_hazard), len(times)), np.nan)
        known = ~np.isnan(log_hazard)
        survival[known] = survival_from_log_odds(
            model.alpha, log_hazard[known], model.edges_days, times
        )
        return survival
    hazard = cumulative_hazard(model.baseline, model.edges_days, times)
    return np.asarray(np.exp(-np.exp(log_hazard)[:, None] * hazard))


def counts(prediction: Prediction) -> dict[str, int]:
    """Count patients by what became of them."""
    status = Counter(prediction.table["status"])
    return {
        "n_patients": len(prediction.table),
        "n_scored": status[SCORED],
        "n_no_modality": status[NO_MODALITY],
        "n_no_encoder": status[NO_ENCODER],
        "n_extrapolated": int((prediction.table["extrapolates"] != "").sum()),
    }
