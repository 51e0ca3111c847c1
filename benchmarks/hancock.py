"""Multimodal late fusion over pseudo-sites: HANCOCK's head-and-neck patients of one institution.

Five modalities, all shared as sums: clinical, pathology report, blood, cell density on the tissue
microarray, and an embedding of its H&E stain. To try a consortium the institution is split, by the
place of the primary tumour or at random.
"""

from __future__ import annotations

import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from cross_validation import (
    Figures,
    Patients,
    cross_validation,
    numbers,
    options,
    read_text,
    run,
    run_splits,
    whole,
)
from figures import report

from flows.protocol import StudyProtocol, read_protocol
from modalities.cohort import DataError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_ID = "patient_id"
_COLUMNS: dict[str, tuple[str, ...]] = {
    "clinical": ("sex", "primarily_metastasis", "smoking_status", "age_at_initial_diagnosis"),
    "pathological": (
        "perinodal_invasion", "lymphovascular_invasion_L", "vascular_invasion_V",
        "perineural_invasion_Pn", "carcinoma_in_situ", "primary_tumor_site", "grading",
        "hpv_association_p16", "resection_status", "resection_status_carcinoma_in_situ",
        "histologic_type", "number_of_positive_lymph_nodes", "infiltration_depth_in_mm",
        "pT_stage", "pN_stage",
    ),
    "tma_cell_density": ("cd3_z", "cd3_inv", "cd8_z", "cd8_inv"),
}  # fmt: skip
_AS_THEY_ARE = (
    "perinodal_invasion", "lymphovascular_invasion_L", "vascular_invasion_V",
    "perineural_invasion_Pn", "carcinoma_in_situ", "infiltration_depth_in_mm",
)  # fmt: skip
# The files hold numbers of categories, in alphabetic order. Here 0 is in situ, 1 cannot be
# assessed, then T1, T1a, T1b, T2, T3, T4a, T4b.
_T_STAGE = {0: 0, 2: 1, 3: 1, 4: 1, 5: 2, 6: 3, 7: 4, 8: 4}
# 0 is not assessed, then N0, two codes of N1, N2, N2a, N2b, N2c, two codes of N3, as the counts of
# positive nodes confirm.
_N_STAGE = {1: 0, 2: 1, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3, 9: 3}
# Tumours associated with HPV are not graded (3); margins that cannot be assessed are 3 too.
_GRADE = {0: 1, 1: 2, 2: 3}
_MARGIN = {0: 0, 1: 1, 2: 2}
_FEWEST_AT_A_SITE = 10


def read_tables(folder: Path, *, sites: str) -> dict[str, pd.DataFrame]:
    """Per modality its coded table, by patient; no outcome or recurrence is among them.

    Raises
    ------
    DataError
        If a file or a column is missing, or a cell is no number.
    """
    codes = _read(folder / "pathological.csv", _COLUMNS["pathological"])
    density = _read(folder / "tma_cell_density.csv", _COLUMNS["tma_cell_density"])
    return {
        "clinical": _clinical(_read(folder / "clinical.csv", _COLUMNS["clinical"])),
        "pathology_report": _pathology_report(codes, with_site=sites == "random"),
        "blood": _read(folder / "blood.csv"),
        "cell_density": density.transform(np.log1p),
        "he_embedding": _read_embeddings(folder / "he_embeddings.npz"),
    }


def _read(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Columns of a file as numbers, by patient; all but the patient's where none are named."""
    text = read_text(path, [_ID, *columns])
    names = list(columns or text.columns.drop(_ID))
    if text[_ID].isna().any() or text[_ID].duplicated().any():
        raise DataError("duplicate", f"{path.name}: needed one row with an id per patient")
    return numbers(text, names, source=path.name).set_index(pd.Index(text[_ID]))


def _read_embeddings(path: Path) -> pd.DataFrame:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ids, values = arrays[_ID], arrays["embedding"]
    except FileNotFoundError:
        raise DataError("missing_file", f"{path.name}: found no such file, needed it") from None
    except KeyError:
        raise DataError(
            "missing_column", f"{path.name}: needed the arrays {_ID} and embedding"
        ) from None
    except (OSError, ValueError, zipfile.BadZipFile):
        raise DataError("unreadable", f"{path.name}: needed an archive of arrays") from None
    if values.ndim != 2 or len(ids) != len(values) or not np.isfinite(values).all():
        raise DataError("shape", f"{path.name}: needed one row of finite numbers per patient")
    names = [f"embedding_{i}" for i in range(values.shape[1])]
    return pd.DataFrame(values.astype(np.float64), index=pd.Index(ids.astype(str)), columns=names)


def _clinical(codes: pd.DataFrame) -> pd.DataFrame:
    smoking = codes["smoking_status"].where(codes["smoking_status"] < 3)  # 3 is unknown
    coded = codes[["sex", "primarily_metastasis", "age_at_initial_diagnosis"]].copy()
    for level in (1, 2):
        coded[f"smoking_status_{level}"] = _is(smoking, level)
    return coded


def _pathology_report(codes: pd.DataFrame, *, with_site: bool) -> pd.DataFrame:
    coded = codes[list(_AS_THEY_ARE)].copy()
    coded["positive_lymph_nodes_log"] = np.log1p(codes["number_of_positive_lymph_nodes"])
    coded["grade"] = codes["grading"].map(_GRADE)
    coded["t_stage"] = codes["pT_stage"].map(_T_STAGE)
    coded["n_stage"] = codes["pN_stage"].map(_N_STAGE)
    coded["nodes_not_assessed"] = _is(codes["pN_stage"], 0)
    coded["margin"] = codes["resection_status"].map(_MARGIN)
    coded["carcinoma_in_situ_at_margin"] = _is(codes["resection_status_carcinoma_in_situ"], 2)
    for name, column, levels in (
        ("hpv", "hpv_association_p16", (1, 2)),
        ("histology", "histologic_type", (3, 5)),  # against 4, the most frequent
        ("tumour_site", "primary_tumor_site", (1, 2, 3) if with_site else ()),
    ):
        for level in levels:
            coded[f"{name}_{level}"] = _is(codes[column], level)
    coded["histology_rare"] = _is(codes["histologic_type"].isin([3, 4, 5]), 0)
    return coded


def _is(column: pd.Series, level: int) -> pd.Series:
    return (column == level).astype(np.float64).where(column.notna())


def read_outcome(path: Path) -> pd.DataFrame:
    """By patient ``event``, whether the patient died, and ``time``, days to the last information.

    Raises
    ------
    DataError
        If a column is missing, a status is neither living nor deceased, or a time is not above 0.
    """
    text = read_text(path, ["survival_status"])
    days = _read(path, ["days_to_last_information"])["days_to_last_information"]
    if not text["survival_status"].isin(["living", "deceased"]).all():
        raise DataError("outcome", f"{path.name}: survival_status: needed living or deceased")
    if not (days > 0).all():
        raise DataError("outcome", f"{path.name}: days_to_last_information: needed days above 0")
    died = (text["survival_status"] == "deceased").to_numpy()
    return pd.DataFrame({"event": died, "time": days})


def pseudo_sites(
    folder: Path, ids: pd.Index, *, sites: str, n_sites: int, seed: int
) -> NDArray[np.str_]:
    """(n,) pseudo-site of each patient, empty where it would have too few."""
    if sites == "random":
        dealt = np.random.default_rng((seed, 2)).permutation(np.arange(len(ids)) % n_sites)
        return np.array([f"site_{i + 1}" for i in dealt])
    place = _read(folder / "pathological.csv", ["primary_tumor_site"])["primary_tumor_site"]
    codes = [f"tumour_site_{code:g}" for code in place.reindex(ids)]
    count = Counter(codes)
    return np.array([x if count[x] >= _FEWEST_AT_A_SITE else "" for x in codes])


def protocol_of(tables: Mapping[str, pd.DataFrame], *, seed: int) -> StudyProtocol:
    """Study five modalities shared as sums, with the defaults of a study where it has them.

    As there, measurements are harmonised by site and clinical facts are not. The report has a few
    inputs more than the default allows and is not projected. The minimum counts are lowered for
    public data, so that the smallest pseudo-site trains.
    """
    linear = {"model": "linear", "sharing": "sums"}
    facts = {**linear, "harmonise": "none", "max_inputs": 24}
    return read_protocol(
        {
            "study": {
                "name": "hancock",
                "data": "public",
                "horizon_days": 1825,
                "grid_days": [365, 730, 1095, 1825, 3650],
                "seed": seed,
            },
            "modality": {
                name: {"kind": "clinical", "numeric": list(table.columns)}
                if name == "clinical"
                else {"kind": "tabular", "columns": list(table.columns)}
                for name, table in tables.items()
            },
            "encoder": {
                name: facts
                if name in ("clinical", "pathology_report")
                else {**linear, "projection_seed": seed}
                for name in tables
            },
            "privacy": {"patients": 40, "events": 15, "patients_per_input": 3},
        }
    )


def study(arguments: argparse.Namespace) -> Figures:
    """Run the benchmark that the command line asks for."""
    outcome = read_outcome(arguments.folder / "targets.csv")
    tables = read_tables(arguments.folder, sites=arguments.sites)
    chosen = {name: getattr(arguments, name) for name in ("sites", "n_sites", "seed")}
    site = pseudo_sites(arguments.folder, outcome.index, **chosen)
    kept = outcome[site != ""]
    patients = Patients(
        site=site[site != ""],
        event=kept["event"].to_numpy(),
        time=kept["time"].to_numpy(),
        tables={name: table.reindex(kept.index).to_numpy() for name, table in tables.items()},
    )
    protocol = protocol_of(tables, seed=arguments.seed)
    validation = {name: getattr(arguments, name) for name in ("folds", "repeats", "seed")}
    splits = cross_validation(
        patients, n_folds=arguments.folds, repeats=arguments.repeats, seed=arguments.seed
    )
    scored = run_splits(patients, protocol, splits)
    by = "place of the primary tumour" if arguments.sites == "tumour_site" else "a seeded split"
    arms = ("federated", "federated_local_encoders", "pooled")
    return {
        "benchmark": "hancock",
        "consortium": f"pseudo-sites of one institution by {by}",
        "validation": {"test": "cross-validation", **validation},
        "excluded": {"pseudo-site too small": int((site == "").sum())},
        **report(patients, protocol, scored, arms=arms),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and print one JSON object."""
    parser = options("Federated late fusion of five modalities over pseudo-sites of HANCOCK.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of HANCOCK's tables")
    parser.add_argument(
        "--sites", choices=("tumour_site", "random"), default="tumour_site", help="how to split"
    )
    parser.add_argument("--n-sites", type=whole(2), default=5, help="of a random split")
    return run(parser, study, arguments)


if __name__ == "__main__":
    sys.exit(main())
