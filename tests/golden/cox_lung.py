"""Make ``cox_lung.json``: Efron fits of lifelines' lung data, by statsmodels' PHReg, by sex.

Run in this folder with ``python cox_lung.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

from lifelines.datasets import load_lung
from statsmodels.duration.hazard_regression import PHReg

COLUMNS = ["time", "status", "age", "ph.ecog", "sex"]


def main() -> None:
    """Fit, and keep rows and figures side by side."""
    frame = load_lung()[COLUMNS].dropna().astype(int)
    fit = PHReg(
        frame["time"], frame[["age", "ph.ecog"]], status=frame["status"],
        strata=frame["sex"], ties="efron",
    ).fit()  # fmt: skip
    golden = {
        "columns": COLUMNS,
        "rows": frame.to_numpy().tolist(),
        "coefficients": fit.params.tolist(),
        "standard_errors": fit.bse.tolist(),
        "log_likelihood": float(fit.llf),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
