"""Late fusion of pathway scores and clinical columns over tissue source sites of one TCGA cohort.

The hospitals that sent tissue are packed into a few sites, the smallest together. RNA becomes one
score per gene set, as in a study's own omics modality, and is harmonised by site.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from cross_validation import (
    Figures,
    Patients,
    Split,
    cross_validation,
    options,
    run,
    run_splits,
    whole,
)
from figures import report
from tcga_tables import (
    OutcomeColumns,
    in_order,
    pack_sites,
    pathway_scores,
    read_covariates,
    read_gene_sets,
    read_outcome,
    read_rna,
    tissue_source_site,
)

from flows.protocol import StudyProtocol, read_protocol
from modalities.cohort import DataError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import NDArray

_MOST_SCORES = 44
_FEWEST_GENES = 5
# Forty scores and some three hundred patients want more shrinkage than a study's default tries.
_RIDGE = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Cohort:
    """Patients with an outcome and RNA or a clinical value, by patient.

    Attributes
    ----------
    outcome, covariates, expression
        ``expression`` holds those who have RNA only.
    about
        What was read and what was left out, for the printed figures.
    """

    outcome: pd.DataFrame
    covariates: pd.DataFrame
    expression: pd.DataFrame
    about: Figures


def protocol_of(scores: Sequence[str], covariates: Sequence[str], *, seed: int) -> StudyProtocol:
    """Study two modalities shared as sums, with the defaults of a study where it has them.

    As there, scores are harmonised by site and clinical facts are not. Scores are not projected:
    what a pathway means is kept. The minimum counts are lowered for public data, so that the
    smallest packed site trains.
    """
    linear = {"model": "linear", "sharing": "sums", "min_events": 4}
    return read_protocol(
        {
            "study": {
                "name": "tcga-rna",
                "data": "public",
                "horizon_days": 1095,
                "grid_days": [365, 730, 1095, 1825],
                "seed": seed,
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": list(covariates)},
                "omics": {"kind": "tabular", "columns": list(scores)},
            },
            "encoder": {
                "clinical": {**linear, "harmonise": "none"},
                "omics": {**linear, "max_inputs": len(scores), "ridge": _RIDGE},
            },
            "privacy": {"patients": 15, "events": 5, "cell": 5, "patients_per_input": 1},
        }
    )


def read_cohort(arguments: argparse.Namespace) -> Cohort:
    """Read the files that the command line names.

    Raises
    ------
    DataError
        If a file cannot be read, or no clinical column varies.
    """
    columns = OutcomeColumns(
        arguments.time_column, arguments.event_column, arguments.censored_column
    )
    outcome, read_from = read_outcome(arguments.metadata, columns=columns)
    rna = read_rna(arguments.rna)
    clinical = [arguments.clinical] if arguments.clinical else []
    covariates = read_covariates([*clinical, arguments.metadata])
    if covariates.empty:
        raise DataError("no_covariates", "clinical columns: found none that varies, needed age")
    covariates = covariates.dropna(how="all")
    takes_part = outcome.index.isin(rna.values.index) | outcome.index.isin(covariates.index)
    kept = outcome[takes_part].sort_index()
    return Cohort(
        outcome=kept,
        covariates=covariates,
        expression=rna.values[rna.values.index.isin(kept.index)],
        about={
            "outcome": read_from,
            "expression": rna.scale,
            "excluded": {
                "neither RNA nor clinical value": int((~takes_part).sum()),
                "RNA without outcome": int((~rna.values.index.isin(outcome.index)).sum()),
                "further samples": rna.other_samples,
            },
        },
    )


def packed(cohort: Cohort, n_sites: int) -> tuple[NDArray[np.str_], dict[str, tuple[str, ...]]]:
    """(n,) site of each patient, and the tissue source sites that each site is made of."""
    codes = [tissue_source_site(x) for x in cohort.outcome.index]
    groups = pack_sites(codes, n_sites)
    site_of = {code: site for site, members in groups.items() for code in members}
    return np.array([site_of[code] for code in codes]), groups


def fewest_training(patients: Patients, splits: Sequence[Split], has: NDArray[np.bool_]) -> int:
    """Count the training patients with a modality at the smallest site of any split."""
    return min(
        int((split.train & has & (patients.site == site)).sum())
        for split in splits
        for site in set(patients.site.tolist())
    )


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    cohort = read_cohort(arguments)
    site, groups = packed(cohort, arguments.n_sites)
    outcome = cohort.outcome
    patients = Patients(site, outcome["event"].to_numpy(), outcome["time"].to_numpy(), tables={})
    splits = cross_validation(
        patients, n_folds=arguments.folds, repeats=arguments.repeats, seed=arguments.seed
    )
    has_rna = outcome.index.isin(cohort.expression.index)
    # One training patient per input at every site, or the smallest would stay out of the sums.
    most = min(_MOST_SCORES, max(1, fewest_training(patients, splits, has_rna)))
    scores, dropped = pathway_scores(
        cohort.expression, read_gene_sets(arguments.gene_sets), most=most,
        fewest_genes=_FEWEST_GENES,
    )  # fmt: skip
    tables = {"clinical": cohort.covariates, "omics": scores}
    patients = replace(
        patients, tables={name: in_order(x, outcome.index) for name, x in tables.items()}
    )
    protocol = protocol_of(list(scores), list(cohort.covariates), seed=arguments.seed)
    scored = run_splits(patients, protocol, splits)
    chosen = {name: getattr(arguments, name) for name in ("folds", "repeats", "seed")}
    return {
        "benchmark": "tcga_rna",
        "consortium": f"{len(groups)} sites packed from tissue source sites, the smallest together",
        "tissue_source_sites": groups,
        "validation": {"test": "cross-validation", **chosen},
        **cohort.about,
        "clinical_columns": list(cohort.covariates),
        "pathway_scores": {"used": len(scores.columns), "dropped": dropped},
        **report(
            patients, protocol, scored, arms=("federated", "federated_local_encoders", "pooled")
        ),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = options("Federated late fusion of pathway scores and clinical columns of a TCGA set.")
    parser.add_argument("rna", type=Path, metavar="RNA.csv", help="patients by genes, logarithms")
    parser.add_argument("metadata", type=Path, metavar="METADATA.csv", help="patients' outcome")
    parser.add_argument(
        "--gene-sets", type=Path, metavar="FILE", required=True, help="a column per set, or .gmt"
    )
    parser.add_argument("--clinical", type=Path, metavar="FILE", help="stage, grade by case_id")
    parser.add_argument("--n-sites", type=whole(2), default=6, help="to pack tissue sources into")
    parser.add_argument("--time-column", metavar="NAME", help="days, or months if named so")
    parser.add_argument("--event-column", metavar="NAME", help="1 is an observed event")
    parser.add_argument("--censored-column", metavar="NAME", help="1 is censored")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
