"""The cohort of one site: what an extractor returns, and the MuData that training reads."""

from __future__ import annotations

import hashlib
import hmac
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import mudata as md
import numpy as np
import pandas as pd

from modalities.files import fingerprint, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MANIFEST_COLUMNS = ("patient_id", "modality", "path", "mask_path", "roi")
EXCLUDED_COLUMNS = ("patient_id", "modality", "code", "reason")
TRAIN, TEST = "train", "test"


class DataError(ValueError):
    """One raw input that cannot be used; its patient is set aside and the rest goes on.

    Parameters
    ----------
    code
        Short lower-case name of the reason (``missing_resolution``); the only part that may leave
        the site.
    message
        One sentence: what, found, needed, what to do. No patient id and no path in it.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Exclusion:
    """A patient's input set aside, as a row of ``excluded.csv``."""

    patient_id: str
    modality: str
    code: str
    reason: str


@dataclass(frozen=True)
class ManifestRow:
    """One raw input of one patient, as the site lists it; paths are absolute."""

    patient_id: str
    modality: str
    path: Path
    mask_path: Path | None
    roi: str | None


def feature_table(
    patient_ids: Sequence[str],
    feature_names: Sequence[str],
    values: NDArray[np.floating],
    *,
    input_digests: Sequence[str],
    spec_fingerprint: str,
) -> ad.AnnData:
    """Per-patient features of one modality, remembering what they were made from.

    Parameters
    ----------
    patient_ids
        (n,) unique pseudonyms.
    feature_names
        (p,) unique names.
    values
        (n, p) features; NaN marks a value that the input does not have.
    input_digests
        (n,) digest of each patient's raw input.
    spec_fingerprint
        Fingerprint of the extractor's spec.

    Raises
    ------
    DataError
        If ids or names repeat, or shapes disagree.
    """
    shape = (len(patient_ids), len(feature_names))
    if np.shape(values) != shape or len(input_digests) != shape[0]:
        raise DataError(
            "shape",
            f"features: found shape {np.shape(values)} with {len(input_digests)} digests, "
            f"needed {shape}",
        )
    for what, names in (("patient ids", patient_ids), ("feature names", feature_names)):
        if len(set(names)) != len(names):
            raise DataError("duplicate", f"{what}: found repeated values, needed unique ones")
    return ad.AnnData(
        X=np.asarray(values, dtype=np.float32).reshape(shape),
        obs=pd.DataFrame(
            {"input_digest": list(input_digests)}, index=pd.Index(patient_ids, dtype=str)
        ),
        var=pd.DataFrame(index=pd.Index(feature_names, dtype=str)),
        uns={"spec_fingerprint": spec_fingerprint},
    )


def read_manifest(
    path: Path, modalities: Iterable[str]
) -> tuple[list[ManifestRow], list[Exclusion]]:
    """Read a site's list of raw inputs; relative paths count from the manifest's folder.

    Parameters
    ----------
    path
        CSV with the columns ``patient_id, modality, path`` and, for scans, ``mask_path`` and
        ``roi``.
    modalities
        Names that the study knows; rows of other modalities are passed over.

    Returns
    -------
    rows
        Usable rows in the order of the file.
    exclusions
        Rows without a patient id, that name a missing file, that repeat another row, or whose
        modality looks like a misspelt one of the study.

    Raises
    ------
    DataError
        If the file is missing, is no CSV table, or lacks a column.
    """
    table = _read_text_table(path)
    known = set(modalities)
    repeated = Counter(map(tuple, table[["patient_id", "modality", "path"]].to_numpy()))
    rows: list[ManifestRow] = []
    exclusions: list[Exclusion] = []
    for number, raw in enumerate(table.to_dict("records"), start=2):
        if raw["modality"] not in known:
            meant = get_close_matches(raw["modality"].lower(), sorted(known), n=1, cutoff=0.8)
            if meant:
                reason = f"manifest line {number}: no such modality; did you mean {meant[0]}?"
                found = Exclusion(raw["patient_id"], meant[0], "unknown_modality", reason)
                exclusions.append(found)
            continue
        row = ManifestRow(
            patient_id=raw["patient_id"],
            modality=raw["modality"],
            path=path.parent / raw["path"],
            mask_path=path.parent / raw["mask_path"] if raw["mask_path"] else None,
            roi=raw["roi"] or None,
        )
        copies = repeated[(raw["patient_id"], raw["modality"], raw["path"])]
        fault = _row_fault(row, raw["path"], copies=copies)
        if fault is None:
            rows.append(row)
        else:
            reason = f"manifest line {number}: {fault[1]}"
            exclusions.append(Exclusion(row.patient_id, row.modality, fault[0], reason))
    return rows, exclusions


def _read_text_table(path: Path) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # cells beyond the header
            # A comma at the end of each row must not turn patients into row names.
            table = pd.read_csv(
                path, dtype=str, keep_default_na=False, skipinitialspace=True,
                index_col=False, skip_blank_lines=False,
            )  # fmt: skip
    except FileNotFoundError:
        raise DataError(
            "missing_manifest", "manifest: found no file, needed a CSV; run `consilium site init`"
        ) from None
    except (ValueError, OSError, pd.errors.ParserWarning):
        raise DataError(
            "unreadable_manifest",
            "manifest: needed a CSV table in UTF-8, with no cell beyond the header's columns",
        ) from None
    for column in ("patient_id", "modality", "path"):
        if column not in table.columns:
            raise DataError("missing_column", f"manifest: needed a column {column}")
    return table.reindex(columns=list(MANIFEST_COLUMNS), fill_value="").apply(
        lambda column: column.str.strip()
    )


def _row_fault(row: ManifestRow, path: str, *, copies: int) -> tuple[str, str] | None:
    if not row.patient_id:
        return "no_patient_id", "patient_id is empty, needed a pseudonym"
    if not path or not _exists(row.path):
        return "missing_file", "path names no file or folder; correct the path or the row"
    if row.mask_path is not None and not _exists(row.mask_path):
        return "missing_file", "mask_path names no file; correct the path or the row"
    if copies > 1:
        return "duplicate_row", "the same input stands in several rows; keep one"
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def write_exclusions(exclusions: Iterable[Exclusion], path: Path) -> None:
    """Write ``excluded.csv``: patient, modality, code, reason, sorted, each once."""
    rows = sorted({tuple(asdict(e).values()) for e in exclusions})
    with replacing(path) as temporary:
        pd.DataFrame(rows, columns=list(EXCLUDED_COLUMNS)).to_csv(temporary, index=False)


def read_exclusions(path: Path) -> list[Exclusion]:
    """Read what :func:`write_exclusions` wrote; empty where there is no such file."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        rows = table[list(EXCLUDED_COLUMNS)].to_dict("records")
    except (OSError, ValueError, KeyError):
        return []
    return [Exclusion(**{str(k): v for k, v in row.items()}) for row in rows]


def keyed_unit(secret: bytes, purpose: str, patient_id: str) -> float:
    """Map a patient to [0, 1) by a hash under the site's secret, the same on every day."""
    digest = hmac.new(secret, f"{purpose}\0{patient_id}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def assign_splits(
    patient_ids: Sequence[str],
    *,
    secret: bytes,
    test_fraction: float,
    known: Mapping[str, str],
) -> list[str]:
    """Assign each patient to train or test, once and for ever.

    Parameters
    ----------
    patient_ids
        (n,) pseudonyms.
    secret
        The site's own; without it nobody can tell who was held out.
    test_fraction
        Expected share of test patients among those seen for the first time.
    known
        Assignments made before; they never change.
    """
    return [
        known.get(x) or (TEST if keyed_unit(secret, "split", x) < test_fraction else TRAIN)
        for x in patient_ids
    ]


def assemble(
    tables: Mapping[str, ad.AnnData],
    outcome: pd.DataFrame,
    *,
    protocol_fingerprint: str,
) -> md.MuData:
    """Join the modalities of one site into its cohort; patients who miss a modality stay in.

    Parameters
    ----------
    tables
        Per modality its :func:`feature_table`; bags add the column ``bag`` to ``obs``.
    outcome
        Indexed by patient id, with ``event`` (bool), ``time_days``, ``split`` (train or test) and
        ``fold_unit`` (in [0, 1), cut into folds when training). Patients without an outcome are
        left out; patients without any modality too.
    protocol_fingerprint
        Kept in ``.uns``, so that a cohort of another protocol is never trained on.

    Raises
    ------
    DataError
        If the cohort breaks its contract; see :func:`validate_cohort`.
    """
    kept = {
        name: table[table.obs_names.isin(outcome.index)].copy() for name, table in tables.items()
    }
    with _quiet_mudata():
        cohort = md.MuData(kept)
        seen = outcome.loc[[x for x in outcome.index if x in set(cohort.obs_names)]]
        cohort = cohort[seen.index.to_numpy()].copy() if len(seen) else cohort
    for column in ("event", "time_days", "split", "fold_unit"):
        cohort.obs[column] = seen[column].to_numpy()
    cohort.uns["protocol_fingerprint"] = protocol_fingerprint
    validate_cohort(cohort)
    cohort.uns["cohort_digest"] = cohort_digest(cohort)
    return cohort


@contextmanager
def _quiet_mudata() -> Iterator[None]:
    """Keep modality columns where they are; feature names may repeat between modalities."""
    with warnings.catch_warnings(), md.set_options(pull_on_update=False):
        warnings.simplefilter("ignore", UserWarning)
        yield


def validate_cohort(cohort: md.MuData) -> None:
    """Check the contract that training relies on.

    Raises
    ------
    DataError
        If there is no patient, ids repeat, an outcome is not sane, or a split or digest is missing.
    """
    obs = cohort.obs
    faults = {
        "empty_cohort": (cohort.n_obs == 0, "no patient with an outcome and a modality"),
        "duplicate": (not cohort.obs_names.is_unique, "repeated patient ids"),
        "outcome": (
            not (np.isfinite(obs["time_days"]) & (obs["time_days"] > 0)).all()
            or obs["event"].dtype != bool,
            "an event that is not true or false, or a time that is not days above 0",
        ),
        "split": (not obs["split"].isin([TRAIN, TEST]).all(), "a patient in neither split"),
        "digest": (
            any("input_digest" not in t.obs for t in cohort.mod.values()),
            "a modality without input digests",
        ),
    }
    for code, (broken, found) in faults.items():
        if broken:
            raise DataError(code, f"cohort: found {found}; run `consilium site check`")


def cohort_digest(cohort: md.MuData) -> str:
    """SHA-256 over ids, outcomes, splits, input digests, specs and code, whatever the row order.

    It confirms guessed rows, so it stays at the site; what leaves is its HMAC.
    """
    obs = cohort.obs.sort_index()
    # Whole days come back from a file as integers, which JSON writes otherwise.
    time_days = obs["time_days"].astype(float).tolist()
    rows = zip(obs.index, obs["event"].tolist(), time_days, obs["split"], strict=True)
    content = {
        "outcome": [list(row) for row in rows],
        "modalities": {
            name: {
                "spec": str(table.uns["spec_fingerprint"]),
                **{
                    column: sorted(table.obs[column].astype(str).items())
                    for column in ("input_digest", "code_version")
                    if column in table.obs
                },
            }
            for name, table in sorted(cohort.mod.items())
        },
    }
    return fingerprint(content)


def write_cohort(cohort: md.MuData, path: Path) -> None:
    """Write ``cohort.h5mu`` whole or not at all."""
    with replacing(path) as temporary, _quiet_mudata():
        temporary.unlink()
        cohort.write_h5mu(temporary)


def read_cohort(path: Path) -> md.MuData:
    """Read ``cohort.h5mu`` and check its contract.

    Raises
    ------
    DataError
        If the file is missing or damaged, or breaks the contract.
    """
    if not path.is_file():
        raise DataError("missing_cohort", "cohort: found none; run `consilium site prepare` first")
    try:
        with _quiet_mudata():
            cohort = md.read_h5mu(path)
        cohort.obs["event"] = cohort.obs["event"].astype(bool)
        cohort.obs["split"] = cohort.obs["split"].astype(str)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError):
        raise DataError("damaged_cohort", "cohort: the file is damaged; prepare it again") from None
    validate_cohort(cohort)
    return cohort


def read_cohort_digest(path: Path) -> str:
    """Read the digest that :func:`assemble` wrote, without reading the rows.

    Raises
    ------
    DataError
        If the file is missing or damaged.
    """
    if not path.is_file():
        raise DataError("missing_cohort", "cohort: found none; run `consilium site prepare` first")
    try:
        with h5py.File(path) as file:
            return str(file["uns/cohort_digest"].asstr()[()])
    except (OSError, KeyError, AttributeError, TypeError, RuntimeError):
        raise DataError("damaged_cohort", "cohort: the file is damaged; prepare it again") from None


def read_patient_ids(path: Path) -> frozenset[str]:
    """Read who is in a cohort, without the features.

    Raises
    ------
    DataError
        If the file is missing or damaged.
    """
    read_cohort_digest(path)
    try:
        with h5py.File(path) as file:
            return frozenset(ad.io.read_elem(file["obs"]).index.astype(str))
    except (OSError, KeyError, AttributeError, TypeError, ValueError, RuntimeError):
        raise DataError("damaged_cohort", "cohort: the file is damaged; prepare it again") from None


def rows_of(cohort: md.MuData, modality: str) -> NDArray[np.intp]:
    """(n,) row of each patient in a modality's table, -1 where the patient lacks it."""
    if modality not in cohort.mod:
        return np.full(cohort.n_obs, -1, dtype=np.intp)
    return np.asarray(cohort.mod[modality].obs_names.get_indexer(cohort.obs_names))
