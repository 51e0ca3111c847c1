"""Look at a site's raw inputs without extracting anything: one sentence per input at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flows.embedding import means_of
from flows.extraction import one_input_each, read_file
from modalities.clinical import ClinicalSpec, read_registry
from modalities.cohort import DataError, Exclusion, ManifestRow, read_manifest
from modalities.pathology import (
    MissingWeights,
    PathologySpec,
    UnknownEncoder,
    WrongWeights,
    check_encoder,
    check_features,
    check_slide,
    is_features,
)
from modalities.radiology import RadiologySpec, check_scan

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path

    from flows.protocol import ModalitySpec, StudyProtocol
    from infra.settings import SiteSettings

_OF_ENCODERS = {
    UnknownEncoder: "unknown_encoder",
    MissingWeights: "missing_weights",
    WrongWeights: "wrong_weights",
}


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
        What would be set aside, and why; empty if all is well. What keeps all slides from being
        embedded is there once, without a patient.

    Raises
    ------
    DataError
        If the manifest or the registry itself cannot be read.
    """
    clinical = protocol.modality[protocol.clinical]
    if not isinstance(clinical, ClinicalSpec):
        raise TypeError("clinical: needed a ClinicalSpec")
    registry, faults = read_registry(settings.path(settings.clinical), clinical)
    known = {*registry.patient_ids, *(f.patient_id for f in faults)}
    names = [x for x in protocol.modalities if x != protocol.clinical]
    rows, unusable = read_manifest(settings.path(settings.manifest), names)
    faults += unusable
    for name in names:
        spec, mine = protocol.modality[name], [row for row in rows if row.modality == name]
        mine = one_input_each(mine, spec, name, faults)
        if isinstance(spec, PathologySpec):
            faults += _check_encoder(name, spec, mine, settings)
        faults += _check_modality(name, spec, mine, advance)
    return faults + without_registry(rows, known, protocol.clinical)


def without_registry(
    rows: Iterable[ManifestRow], known: Collection[str], modality: str
) -> list[Exclusion]:
    """Set aside the patients of a manifest whom the registry does not know."""
    listed = {row.patient_id for row in rows}
    reason = "the registry has no row for this patient"
    return [Exclusion(x, modality, "no_registry_row", reason) for x in sorted(listed - set(known))]


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


def _check_encoder(
    name: str, spec: PathologySpec, rows: list[ManifestRow], settings: SiteSettings
) -> list[Exclusion]:
    if all(is_features(row.path) for row in rows):
        return []  # nothing is to be embedded
    try:
        check_encoder(spec, weights=means_of(settings, name, spec).weights)
    except tuple(_OF_ENCODERS) as fault:
        return [Exclusion("", name, _OF_ENCODERS[type(fault)], str(fault))]
    return []


def _check_row(row: ManifestRow, spec: PathologySpec | RadiologySpec) -> None:
    if isinstance(spec, PathologySpec):
        check = check_features if is_features(row.path) else check_slide
        check(row.path, spec)
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
            _, found = read_file(path, patients, spec, name)
        except DataError as fault:
            found = [Exclusion(p, name, fault.code, str(fault)) for p in patients]
        faults += found
    return faults
