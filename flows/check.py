"""Look at a site's raw inputs without extracting anything: one sentence per input at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modalities.clinical import ClinicalSpec, read_registry
from modalities.cohort import DataError, Exclusion, ManifestRow, read_manifest
from modalities.omics import OmicsSpec, extract_counts
from modalities.pathology import PathologySpec, check_slide
from modalities.radiology import RadiologySpec, check_scan
from modalities.tabular import read_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flows.protocol import ModalitySpec, StudyProtocol
    from infra.settings import SiteSettings


def check_site(
    settings: SiteSettings,
    protocol: StudyProtocol,
    *,
    advance: Callable[[int], None] | None = None,
) -> list[Exclusion]:
    """Say of every input whether the study could use it.

    Parameters
    ----------
    advance
        Called with the number of inputs just looked at.

    Returns
    -------
    list
        What would be set aside, and why; empty if all is well.

    Raises
    ------
    DataError
        If the manifest or the registry itself cannot be read.
    """
    spec = protocol.modality[protocol.clinical]
    if not isinstance(spec, ClinicalSpec):
        raise TypeError("clinical: needed a ClinicalSpec")
    registry, faults = read_registry(settings.path(settings.clinical), spec)
    names = [x for x in protocol.modalities if x != protocol.clinical]
    rows, unusable = read_manifest(settings.path(settings.manifest), names)
    faults += unusable
    for name in names:
        mine = [row for row in rows if row.modality == name]
        faults += _check_modality(name, protocol.modality[name], mine, advance)
    listed = {row.patient_id for row in rows}
    known = set(registry.patient_ids) | {f.patient_id for f in faults}
    faults += [
        Exclusion(
            x, protocol.clinical, "no_registry_row", "the registry has no row for this patient"
        )
        for x in sorted(listed - known)
    ]
    return faults


def _check_modality(
    name: str,
    spec: ModalitySpec,
    rows: list[ManifestRow],
    advance: Callable[[int], None] | None,
) -> list[Exclusion]:
    if not isinstance(spec, PathologySpec | RadiologySpec):
        return _check_files(name, spec, rows)
    faults = []
    for row in rows:
        try:
            _check_row(row, spec)
        except DataError as fault:
            faults.append(Exclusion(row.patient_id, name, fault.code, str(fault)))
        if advance is not None:
            advance(1)
    return faults


def _check_row(row: ManifestRow, spec: PathologySpec | RadiologySpec) -> None:
    if isinstance(spec, PathologySpec):
        check_slide(row.path, spec)
    elif row.mask_path is None:
        raise DataError("missing_mask", "mask_path is empty, needed the scan's mask")
    else:
        check_scan(row.path, row.mask_path, spec, roi=row.roi)


def _check_files(name: str, spec: ModalitySpec, rows: list[ManifestRow]) -> list[Exclusion]:
    by_file: dict[Path, list[str]] = {}
    for row in rows:
        by_file.setdefault(row.path, []).append(row.patient_id)
    faults: list[Exclusion] = []
    for path, patients in by_file.items():
        try:
            if isinstance(spec, OmicsSpec):
                _, found = extract_counts(path, spec, patient_ids=patients, modality=name)
            else:
                _, found = read_table(path, spec, modality=name)  # type: ignore[arg-type]
        except DataError as fault:
            found = [Exclusion(p, name, fault.code, str(fault)) for p in patients]
        faults += [f for f in found if f.patient_id in set(patients)]
    return faults
