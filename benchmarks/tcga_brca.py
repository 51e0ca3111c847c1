"""Federated ridge Cox model of clinical columns at six sites: TCGA-BRCA as FLamby splits it.

The sites are the regions of the table. Without ``--test`` every patient is held out once per
repeat; with it, models are fitted on the first file and scored on the second.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cross_validation import (
    Figures,
    Patients,
    Split,
    cross_validation,
    numbers,
    options,
    read_text,
    run,
    run_splits,
)
from figures import report

from flows.protocol import StudyProtocol, read_protocol
from modalities.cohort import DataError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

_OUTCOME = ("E", "T")
_ABOUT = ("region", "pid")
# The default of every table encoder, stated here because the figures depend on it.
_RIDGE = 0.1


def protocol_of(columns: Sequence[str], *, seed: int) -> StudyProtocol:
    """Study one clinical modality with all columns, shared as sums.

    The minimum counts are lowered for public data, as far as five of the six regions need it to
    train; the sixth has two events.
    """
    encoder = {"model": "linear", "sharing": "sums", "harmonise": "none"}
    return read_protocol(
        {
            "study": {
                "name": "tcga-brca",
                "data": "public",
                "horizon_days": 1825,
                "grid_days": [365, 730, 1095, 1825, 3650],
                "seed": seed,
            },
            "modality": {"clinical": {"kind": "clinical", "numeric": list(columns)}},
            "encoder": {
                "clinical": {
                    **encoder, "max_inputs": len(columns), "ridge": _RIDGE, "min_events": 4,
                }
            },
            "privacy": {"events": 5, "cell": 5, "patients_per_input": 2},
        }
    )  # fmt: skip


def read_patients(
    path: Path, columns: Sequence[str] | None = None
) -> tuple[Patients, list[str], int]:
    """Patients of a table, the names of its covariates, and how many have no follow-up.

    Parameters
    ----------
    columns
        Covariates that the table must have; None takes every column that is no outcome.

    Raises
    ------
    DataError
        If the file is missing, or is no table with these columns and a number in every cell.
    """
    text = read_text(path, [*_ABOUT, *_OUTCOME, *(columns or ())])
    names = list(columns or text.columns.drop([*_ABOUT, *_OUTCOME]))
    table = numbers(text, [*names, *_OUTCOME], source=path.name)
    if not names or table.isna().to_numpy().any() or text["region"].isna().any():
        raise DataError(
            "missing_value",
            f"{path.name}: found no covariate or an empty cell, needed a full table",
        )
    # Nobody is at risk with them at any event, so that no fit and no pair of patients sees them.
    followed = (table["T"] > 0).to_numpy()
    patients = Patients(
        site=text["region"].to_numpy(dtype=str)[followed],
        event=(table["E"] > 0).to_numpy()[followed],
        time=table["T"].to_numpy()[followed],
        tables={"clinical": table[names].to_numpy()[followed]},
    )
    return patients, names, int((~followed).sum())


def with_test_file(patients: Patients, test: Patients) -> tuple[Patients, list[Split]]:
    """Training patients and those of a second file, in one order, with the split between them."""
    both = Patients(
        site=np.concatenate([patients.site, test.site]),
        event=np.concatenate([patients.event, test.event]),
        time=np.concatenate([patients.time, test.time]),
        tables={
            name: np.concatenate([table, test.tables[name]])
            for name, table in patients.tables.items()
        },
    )
    return both, [Split(0, np.arange(len(both.time)) < len(patients.time))]


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    patients, columns, without_follow_up = read_patients(arguments.table)
    validation: Figures = {"test": "second file"}
    if arguments.test is None:
        names = ("folds", "repeats", "seed")
        validation = {"test": "cross-validation"} | {x: getattr(arguments, x) for x in names}
        splits = cross_validation(
            patients, n_folds=arguments.folds, repeats=arguments.repeats, seed=arguments.seed
        )
    else:
        test, _, more = read_patients(arguments.test, columns)
        without_follow_up += more
        patients, splits = with_test_file(patients, test)
    protocol = protocol_of(columns, seed=arguments.seed)
    scored = run_splits(patients, protocol, splits)
    return {
        "benchmark": "tcga_brca",
        "validation": validation,
        "excluded": {"no follow-up": without_follow_up},
        **report(patients, protocol, scored, arms=("federated", "pooled")),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = options("Federated ridge Cox model on TCGA-BRCA's clinical columns, region by region.")
    parser.add_argument("table", type=Path, metavar="PATH.csv", help="region, pid, columns, E, T")
    parser.add_argument("--test", type=Path, metavar="FILE", help="fit on PATH.csv, score FILE")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
