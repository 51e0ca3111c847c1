"""Scans of a cohort to a table of radiomic features; one bad scan never stops the rest."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np

from modalities.cohort import DataError, Exclusion, feature_table
from modalities.files import digest_path, fingerprint, replacing
from modalities.radiology.features import extract_volume, feature_names
from modalities.radiology.masks import mask_on, read_mask
from modalities.radiology.volumes import read_grid, read_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.radiology.spec import RadiologySpec

_MODALITY = "radiology"
_MANIFEST_COLUMNS = ("patient_id", "path", "mask_path")


@dataclass(frozen=True)
class ScanRow:
    """One patient's scan and region, with the digest of both from `scan_digest`."""

    patient_id: str
    image: Path
    mask: Path
    roi: str | None
    input_digest: str


def scan_digest(image: Path, mask: Path, *, roi: str | None = None) -> str:
    """Digest of a scan, its mask and the region asked for, as 64 hex digits.

    Raises
    ------
    DataError
        ``missing_file``.
    """
    try:
        parts = [digest_path(image), digest_path(mask)]
    except OSError:  # its text names the file
        raise DataError(
            "missing_file",
            "scan or mask: found nothing readable at its path, needed both; correct the manifest",
        ) from None
    return fingerprint([*parts, roi])


def check_scan(image: Path, mask: Path, spec: RadiologySpec, *, roi: str | None = None) -> None:
    """Check a scan without reading its voxels: headers, geometry and size of the region.

    Raises
    ------
    DataError
        With a code of `read_volume` or `read_mask`.
    """
    mask_on(mask, read_grid(image), spec, roi)


def extract_scan(
    image: Path, mask: Path, spec: RadiologySpec, *, roi: str | None = None
) -> NDArray[np.float64]:
    """Radiomic features of one region of one scan.

    Parameters
    ----------
    image
        File, or folder with one DICOM series.
    mask
        Label map or structure set.
    spec
        Settings.
    roi
        Region of this structure set, in place of the spec's.

    Returns
    -------
    (p,) finite values in the order of `feature_names`.

    Raises
    ------
    DataError
        With a code of `read_volume`, `read_mask` or `extract_volume`; ``extraction_failed`` for
        anything that a library did not foresee.
    """
    try:
        volume = read_volume(image)
        return extract_volume(volume, read_mask(mask, volume, spec, roi=roi), spec)
    except DataError:
        raise
    except Exception:  # noqa: BLE001 - three libraries in C, and one bad scan must not stop a cohort
        raise DataError(
            "extraction_failed",
            "scan: found something that the feature library cannot handle, needed a common volume "
            "and region; open both in a viewer",
        ) from None


def extract_scans(
    rows: Sequence[ScanRow],
    spec: RadiologySpec,
    *,
    modality: str = _MODALITY,
    advance: Callable[[int], None] | None = None,
) -> tuple[ad.AnnData, list[Exclusion]]:
    """Radiomic features of many patients.

    Parameters
    ----------
    rows
        One scan per patient.
    spec
        Settings.
    modality
        Name written into exclusions.
    advance
        Called with 1 after every scan.

    Returns
    -------
    Table of the patients that could be used (n, p), float32; the others with their reason.

    Raises
    ------
    DataError
        ``duplicate_patient`` if a patient has two rows.
    """
    return _extract_rows(rows, spec, {}, modality=modality, advance=advance)


def read_scan_manifest(path: Path) -> tuple[list[ScanRow], list[Exclusion]]:
    """Read the scans that a manifest lists, and the patients whose files are missing.

    The CSV has the columns ``patient_id``, ``path``, ``mask_path`` and, where wanted, ``roi`` and
    ``modality``; rows of another modality than radiology are left out. Paths are relative to the
    folder of the CSV.

    Raises
    ------
    DataError
        ``missing_file``, ``bad_manifest`` or ``duplicate_patient``.
    """
    rows: list[ScanRow] = []
    excluded: list[Exclusion] = []
    for entry in _manifest_entries(path):
        patient_id, roi = entry["patient_id"], entry.get("roi") or None
        image, mask = path.parent / entry["path"], path.parent / entry["mask_path"]
        try:
            digest = scan_digest(image, mask, roi=roi)
        except DataError as error:
            excluded.append(Exclusion(patient_id, _MODALITY, error.code, str(error)))
        else:
            rows.append(ScanRow(patient_id, image, mask, roi, digest))
    _check_patients([row.patient_id for row in rows] + [row.patient_id for row in excluded])
    return rows, excluded


def extract(
    source: Path,
    out: Path,
    spec: RadiologySpec,
    *,
    mask: Path | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Exclusion]:
    """Write the radiomic features of one scan, or of every scan in a manifest.

    Parameters
    ----------
    source
        A scan, with ``mask``; or a manifest, as `read_scan_manifest` reads it.
    out
        A file ``*.h5ad``; or a folder for ``radiology.h5ad``, ``radiology.csv`` and
        ``excluded.csv``. Rows of an earlier table are kept where neither their input nor the spec
        changed.
    spec
        Settings.
    mask
        Label map or structure set of a single scan.
    advance
        Called with 1 after every scan, kept ones included.

    Returns
    -------
    Patients set aside, with their reasons.

    Raises
    ------
    DataError
        With a code of `read_scan_manifest`; ``missing_mask`` for a scan without a mask.
    """
    rows, missing = _rows(source, mask)
    table_file = out if out.suffix == ".h5ad" else out / f"{_MODALITY}.h5ad"
    known = _known_features(table_file, spec)
    table, failed = _extract_rows(rows, spec, known, advance=advance)
    excluded = sorted(missing + failed, key=lambda exclusion: exclusion.patient_id)
    with replacing(table_file) as temporary:
        table.write_h5ad(temporary)
    if table_file != out:
        _write_tables(out, table, excluded)
    return excluded


def _extract_rows(
    rows: Sequence[ScanRow],
    spec: RadiologySpec,
    known: Mapping[tuple[str, str], NDArray[np.floating]],
    *,
    modality: str = _MODALITY,
    advance: Callable[[int], None] | None = None,
) -> tuple[ad.AnnData, list[Exclusion]]:
    _check_patients([row.patient_id for row in rows])
    used: list[ScanRow] = []
    values: list[NDArray[np.floating]] = []
    excluded: list[Exclusion] = []
    for row in rows:
        try:
            found = known.get((row.patient_id, row.input_digest))
            if found is None:
                found = extract_scan(row.image, row.mask, spec, roi=row.roi)
            used.append(row)
            values.append(found)
        except DataError as error:
            excluded.append(Exclusion(row.patient_id, modality, error.code, str(error)))
        if advance is not None:
            advance(1)
    names = feature_names(spec)
    table = feature_table(
        [row.patient_id for row in used],
        names,
        np.reshape(np.array(values, dtype=np.float64), (len(used), len(names))),
        input_digests=[row.input_digest for row in used],
        spec_fingerprint=spec.fingerprint(),
    )
    return table, excluded


def _check_patients(patient_ids: Sequence[str]) -> None:
    if (repeated := len(patient_ids) - len(set(patient_ids))) > 0:
        raise DataError(
            "duplicate_patient",
            f"patients: found {repeated} more rows than patients, needed one scan per patient; "
            "keep the one at diagnosis",
        )


def _rows(source: Path, mask: Path | None) -> tuple[list[ScanRow], list[Exclusion]]:
    if source.suffix.lower() == ".csv":
        return read_scan_manifest(source)
    if mask is None:
        raise DataError(
            "missing_mask", "mask: found none, needed a label map or structure set with the scan"
        )
    name = source.name.split(".")[0]
    return [ScanRow(name, source, mask, None, scan_digest(source, mask))], []


def _manifest_entries(path: Path) -> Iterator[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.DictReader(stream))
    except OSError:
        raise DataError("missing_file", "manifest: found no file, needed a CSV") from None
    except (UnicodeDecodeError, csv.Error):
        raise DataError("bad_manifest", "manifest: found no text, needed a UTF-8 CSV") from None
    for line in lines:
        entry = {key: (value or "").strip() for key, value in line.items() if key is not None}
        if entry.get("modality", _MODALITY) != _MODALITY:
            continue
        if absent := [column for column in _MANIFEST_COLUMNS if not entry.get(column)]:
            raise DataError(
                "bad_manifest",
                f"manifest: found a row without {', '.join(absent)}, needed the columns "
                f"{', '.join(_MANIFEST_COLUMNS)} filled in; correct it",
            )
        yield entry


def _known_features(
    table_file: Path, spec: RadiologySpec
) -> dict[tuple[str, str], NDArray[np.floating]]:
    """Rows of an earlier table by patient and input digest, if it was made by the same spec."""
    if not table_file.is_file():
        return {}
    try:
        table = ad.read_h5ad(table_file)
        digests = table.obs["input_digest"].astype(str)
        if table.uns.get("spec_fingerprint") != spec.fingerprint():
            return {}
    except (OSError, KeyError, ValueError):  # not a table of ours: made anew
        return {}
    return dict(zip(zip(table.obs_names, digests, strict=True), np.asarray(table.X), strict=True))


def _write_tables(folder: Path, table: ad.AnnData, excluded: Sequence[Exclusion]) -> None:
    with replacing(folder / f"{_MODALITY}.csv") as temporary:
        table.to_df().to_csv(temporary, index_label="patient_id")
    with (
        replacing(folder / "excluded.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as stream,
    ):
        writer = csv.writer(stream)
        writer.writerow(("patient_id", "modality", "code", "reason"))
        writer.writerows((e.patient_id, e.modality, e.code, e.reason) for e in excluded)
