"""The fusion model as a registry serves it; logged as code, so that nothing is unpickled.

In: one column per modality, its log hazard on the scale of its encoder, higher is worse, missing
where the patient lacks the modality. Out, per patient: ``log_hazard``, ``log_hazard_se`` (standard
error, wider where modalities are missing) and ``survival_<days>`` at each time of the study's grid;
all of them missing for a patient with no modality at all.

A model that is not as the study's coordinator signed it is not loaded, whoever loads it.
"""

from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import numpy as np
import pandas as pd

from flows.model_signing import keys_of_environment, verify_model
from fusion.late import FusionModel, read_model


class FusionPyfunc(mlflow.pyfunc.PythonModel):
    """Late-fusion model behind MLflow's ``predict``."""

    model: FusionModel
    grid_days: tuple[float, ...]

    def load_context(self, context: Any) -> None:
        """Read the model that was logged, and the study's time grid.

        Raises
        ------
        flows.model_signing.ModelNotTrusted
            If it is altered, unsigned, or signed by nobody whose key counts here.
        """
        fusion = Path(context.artifacts["fusion"])
        verify_model(fusion.parents[1], keys_of_environment())
        text = fusion.read_text(encoding="utf-8")
        self.model = read_model(text)
        self.grid_days = tuple(context.model_config["grid_days"])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Predict for each row; see the module for the columns.

        Raises
        ------
        ValueError
            If a modality has no column, or a log hazard is infinite.
        """
        missing = [x for x in self.model.modalities if x not in model_input.columns]
        if missing:
            raise ValueError(
                f"columns: found none for {', '.join(missing)}, needed one per modality; fill it "
                "with NaN where patients lack the modality"
            )
        columns = model_input[list(self.model.modalities)].to_numpy(dtype=np.float64)
        if np.isinf(columns).any():
            raise ValueError("log hazard: found an infinite one, needed finite values or NaN")
        survival = self.model.predict_survival_function(columns, self.grid_days)
        predicted = {
            "log_hazard": self.model.predict(columns),
            "log_hazard_se": self.model.predict_standard_error(columns),
            **dict(zip(output_columns(self.grid_days), survival.T, strict=True)),
        }
        return pd.DataFrame(predicted, index=model_input.index)


def output_columns(grid_days: tuple[float, ...]) -> tuple[str, ...]:
    """Names of the survival columns, ``survival_365`` for one year."""
    return tuple(f"survival_{days:g}" for days in grid_days)


mlflow.models.set_model(FusionPyfunc())
