"""Federated ridge Cox model of clinical columns at six sites: TCGA-BRCA as FLamby splits it.

The sites are the regions of the table. Without ``--test`` every patient is held out once per
repeat; with it, models are fitted on the first file and scored on the second.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
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

    from numpy.typing import NDArray

_OUTCOME = ("E", "T")
_ABOUT = ("region", "pid")
_UNNAMED = re.compile(r"(Unnamed: ?\d+)?(\.\d+)?")  # an index that was written along


def protocol_of(columns: Sequence[str], *, seed: int) -> StudyProtocol:
    """Study one clinical modality with all columns, shared as sums, with the defaults of a study.

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
            "encoder": {"clinical": {**encoder, "max_inputs": len(columns), "min_events": 4}},
            "privacy": {"events": 5, "cell": 5, "patients_per_input": 2},
        }
    )


@dataclass(frozen=True)
class Table:
    """A table as FLamby writes it.

    Attributes
    ----------
    patients
        Those with follow-up.
    columns
        Names of the covariates.
    ids
        (n,) pseudonym of each patient.
    without_follow_up
        How many rows were left out, because nobody is at risk with them at any event.
    """

    patients: Patients
    columns: tuple[str, ...]
    ids: NDArray[np.str_]
    without_follow_up: int


def read_patients(path: Path, columns: Sequence[str] | None = None) -> Table:
    """Read a table; a column without a name, as an index is written, is no covariate.

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
    others = [x for x in text.columns.drop([*_ABOUT, *_OUTCOME]) if not _UNNAMED.fullmatch(x)]
    names = list(columns or others)
    table = numbers(text, [*names, *_OUTCOME], source=path.name)
    if not names or table.isna().to_numpy().any() or text["region"].isna().any():
        raise DataError(
            "missing_value",
            f"{path.name}: found no covariate or an empty cell, needed a full table",
        )
    followed = (table["T"] > 0).to_numpy()
    patients = Patients(
        site=text["region"].to_numpy(dtype=str)[followed],
        event=(table["E"] > 0).to_numpy()[followed],
        time=table["T"].to_numpy()[followed],
        tables={"clinical": table[names].to_numpy()[followed]},
    )
    ids = text["pid"].to_numpy(dtype=str)[followed]
    return Table(patients, tuple(names), ids, int((~followed).sum()))


def with_test_file(train: Table, test: Table) -> tuple[Patients, list[Split], int]:
    """Both files' patients, the split between them, and how many of the test were in training.

    Raises
    ------
    DataError
        If nobody is left to test.
    """
    new = ~np.isin(test.ids, train.ids)
    if not new.any():
        raise DataError(
            "overlap", "test file: found only patients of the first file, needed others"
        )
    first, second = train.patients, test.patients
    both = Patients(
        site=np.concatenate([first.site, second.site[new]]),
        event=np.concatenate([first.event, second.event[new]]),
        time=np.concatenate([first.time, second.time[new]]),
        tables={
            name: np.concatenate([table, second.tables[name][new]])
            for name, table in first.tables.items()
        },
    )
    return both, [Split(0, np.arange(len(both.time)) < len(first.time))], int((~new).sum())


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    table = read_patients(arguments.table)
    patients, excluded = table.patients, {"no follow-up": table.without_follow_up}
    validation: Figures = {"test": "second file"}
    if arguments.test is None:
        chosen = {name: getattr(arguments, name) for name in ("folds", "repeats", "seed")}
        validation = {"test": "cross-validation", **chosen}
        splits = cross_validation(
            patients, n_folds=arguments.folds, repeats=arguments.repeats, seed=arguments.seed
        )
    else:
        test = read_patients(arguments.test, table.columns)
        patients, splits, known = with_test_file(table, test)
        excluded["no follow-up"] += test.without_follow_up
        excluded["also in the first file"] = known
    protocol = protocol_of(table.columns, seed=arguments.seed)
    scored = run_splits(patients, protocol, splits)
    return {
        "benchmark": "tcga_brca",
        "validation": validation,
        "excluded": excluded,
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
