"""What the consortium's model says of each patient, for the site's own eyes only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from fusion.federation import PROTOCOL
from modalities.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from flows.inputs import SiteInputs
    from fusion.federation import SiteStudy
    from fusion.late import FusionModel

    Floats = NDArray[np.float64]


def patient_table(
    inputs: SiteInputs, study: SiteStudy, model: FusionModel, *, horizon_days: float
) -> pd.DataFrame:
    """One row per patient: predicted risk, and what each modality adds to it.

    Parameters
    ----------
    study
        The site's part in the run that fitted ``model``.
    horizon_days
        Time by which the risk is given.

    Returns
    -------
    pandas.DataFrame
        Indexed by patient id: ``split``, ``log_hazard`` (higher is worse), its
        ``standard_error``, ``risk_by_DAYS_days`` of the event by the horizon, and per modality
        ``contribution_NAME``, its part of the log hazard; missing for a patient without any
        modality. Training patients are scored by encoders that did not see them, where the study
        was cross-fitted.
    """
    columns = study.designs.model_columns(PROTOCOL)
    whole = np.full((len(inputs.time), len(model.modalities)), np.nan)
    whole[inputs.train], whole[~inputs.train] = columns.train, columns.test
    table = pd.DataFrame(index=pd.Index(inputs.patient_ids, name="patient_id"))
    table["split"] = np.where(inputs.train, "train", "test")
    table["log_hazard"] = model.predict(whole)
    table["standard_error"] = model.predict_standard_error(whole)
    surviving = model.predict_survival_function(whole, np.array([horizon_days]))
    table[f"risk_by_{horizon_days:g}_days"] = 1.0 - surviving[:, 0]
    for name, part in zip(model.modalities, model.contributions(whole).T, strict=True):
        table[f"contribution_{name}"] = part
    return table


def write_patient_table(table: pd.DataFrame, target: Path) -> None:
    """Write the table for the site's own use, readable by nobody else."""
    with replacing(target) as temporary:
        table.to_csv(temporary)
        temporary.chmod(0o600)
