"""Regions of interest: label maps and DICOM structure sets, on the grid of their scan."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from modalities.cohort import DataError
from modalities.radiology.volumes import Grid, grid_of, read_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    import SimpleITK as sitk
    from numpy.typing import NDArray

    from modalities.radiology.spec import RadiologySpec

_GRID_TOLERANCE_VOXELS = 0.1
_PLANE_TOLERANCE_SLICES = 0.25
_DICOM_MAGIC = b"DICM"
_STRUCTURE_SET_UID = "1.2.840.10008.5.1.4.1.1.481.3"


def read_mask(
    path: Path, volume: sitk.Image, spec: RadiologySpec, *, roi: str | None = None
) -> sitk.Image:
    """Read a region of interest as an image of 0 and 1 on the grid of ``volume``.

    A label map must lie on the same grid as the volume. Contours of a DICOM structure set are
    filled slice by slice: a voxel belongs if its centre lies inside an odd number of contours, so
    that inner contours are holes.

    Parameters
    ----------
    path
        Label map in a file, or a structure set.
    volume
        The scan, from `read_volume`.
    spec
        Names the label of a label map, and the region of a structure set.
    roi
        Region of this structure set, in place of the spec's.

    Raises
    ------
    DataError
        ``missing_file``; ``not_a_mask``; ``mask_geometry`` if it does not fit the volume;
        ``missing_roi``, ``ambiguous_roi`` or ``sparse_contours`` in a structure set;
        ``empty_mask``; ``mask_too_small``.
    """
    return mask_on(path, grid_of(volume), spec, roi)


def mask_on(path: Path, grid: Grid, spec: RadiologySpec, roi: str | None) -> sitk.Image:
    """Do the work of `read_mask`, where only the geometry of the scan is known."""
    import SimpleITK as sitk

    if not path.is_file():
        raise DataError("missing_file", "mask: found no file at its path, needed one")
    structures = _structure_set(path)
    if structures is None:
        inside = _label_map(path, grid, spec.label)
    else:
        inside = _fill(_contours(structures, roi or spec.roi, grid), grid)
    check_voxels(int(np.count_nonzero(inside)), spec)
    mask = sitk.GetImageFromArray(inside.astype(np.uint8))
    grid.place(mask)
    return mask


def check_voxels(voxels: int, spec: RadiologySpec) -> None:
    """Raise `DataError` if a region has no voxels, or fewer than the spec needs."""
    if voxels == 0:
        raise DataError("empty_mask", "mask: found no voxel of the region, needed a drawn region")
    if voxels < spec.min_voxels:
        raise DataError(
            "mask_too_small",
            f"mask: found {voxels} voxels, needed {spec.min_voxels}; "
            "leave the scan out, or lower min_voxels for the whole study",
        )


def _label_map(path: Path, grid: Grid, label: int) -> NDArray[np.bool_]:
    import SimpleITK as sitk

    image = read_file(path, code="not_a_mask")
    check_same_grid(grid_of(image), grid)
    inside: NDArray[np.bool_] = sitk.GetArrayViewFromImage(image) == label  # (z, y, x)
    return inside


def check_same_grid(mask: Grid, scan: Grid) -> None:
    """Raise `DataError` if two grids differ by more than a tenth of a voxel at any corner."""
    if mask.size != scan.size:
        raise DataError(
            "mask_geometry",
            f"mask: found size {mask.size}, needed {scan.size} as the scan; draw it on this scan",
        )
    ends = np.vstack([np.zeros(3), np.diag(np.asarray(scan.size) - 1.0)])  # (4, 3) voxel indices
    apart_mm = (
        ends @ mask.axes_mm().T
        + mask.origin_mm
        - ends @ scan.axes_mm().T
        - np.asarray(scan.origin_mm)
    )
    off_mm = float(np.linalg.norm(apart_mm, axis=1).max())
    if off_mm > _GRID_TOLERANCE_VOXELS * min(scan.spacing_mm):
        raise DataError(
            "mask_geometry",
            f"mask: found corners {off_mm:.2f} mm from the scan's, needed the same place, spacing "
            "and orientation; resample the mask onto the scan",
        )


def _structure_set(path: Path) -> Any:
    """Return the structure set in a DICOM file, or None if the file is something else."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    with path.open("rb") as stream:
        if stream.read(132)[128:] != _DICOM_MAGIC:
            return None
    try:
        found = pydicom.dcmread(path, stop_before_pixels=True)
        return found if found.get("SOPClassUID") == _STRUCTURE_SET_UID else None
    except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, TypeError):
        raise _broken_structures() from None


def _contours(structures: Any, wanted: str, grid: Grid) -> list[NDArray[np.float64]]:
    """Find the closed contours of one region, each (n, 3) in millimetres."""
    try:
        region = _region(structures, wanted)
        _check_frame(str(region.get("ReferencedFrameOfReferenceUID", "")), grid.frame)
        drawn = [
            contour
            for item in structures.ROIContourSequence
            if item.ReferencedROINumber == region.ROINumber
            for contour in item.get("ContourSequence") or ()
        ]
        return [
            np.reshape(np.asarray(contour.ContourData, dtype=float), (-1, 3))
            for contour in drawn
            if str(contour.ContourGeometricType).startswith("CLOSED")
        ]
    except DataError:
        raise
    except (AttributeError, EOFError, KeyError, TypeError, ValueError):
        raise _broken_structures() from None


def _region(structures: Any, wanted: str) -> Any:
    regions = list(structures.StructureSetROISequence)
    pattern = wanted.strip().casefold()
    names = [str(region.get("ROIName", "")).strip().casefold() for region in regions]
    matches = [i for i, name in enumerate(names) if name == pattern]
    matches = matches or [i for i, name in enumerate(names) if fnmatchcase(name, pattern)]
    # region names are free text and may hold a name: they stay out of the message
    if not matches:
        raise DataError(
            "missing_roi",
            f"structure set: found {len(regions)} regions, none of the asked name, needed one; "
            "give its name in the column roi",
        )
    if len(matches) > 1:
        raise DataError(
            "ambiguous_roi",
            f"structure set: found {len(matches)} regions of the asked name, needed exactly one; "
            "give its full name in the column roi",
        )
    return regions[matches[0]]


def _check_frame(region_frame: str, scan_frame: str) -> None:
    if region_frame and scan_frame and region_frame != scan_frame:
        raise DataError(
            "mask_geometry",
            "structure set: found another frame of reference than the scan's, needed the same; "
            "give the structure set that was drawn on this scan",
        )


def _fill(contours: Iterable[NDArray[np.float64]], grid: Grid) -> NDArray[np.bool_]:
    """(z, y, x) voxels whose centres lie inside an odd number of contours."""
    from skimage.draw import polygon

    columns, rows, slices = grid.size
    inside = np.zeros((slices, rows, columns), dtype=np.bool_)
    to_index = np.linalg.inv(grid.axes_mm())
    distinct = {contour.tobytes(): contour for contour in contours}  # a doubled one is no hole
    drawn = set()
    for points_mm in distinct.values():
        index = (points_mm - np.asarray(grid.origin_mm)) @ to_index.T  # (n, 3) as x, y, z
        k = _slice_of(index, grid)
        drawn.add(k)
        filled = polygon(index[:, 1], index[:, 0], shape=(rows, columns))
        inside[k][filled] ^= True
    _check_every_slice(sorted(drawn))
    return inside


def _slice_of(index: NDArray[np.float64], grid: Grid) -> int:
    k = round(float(index[:, 2].mean()))
    if np.abs(index[:, 2] - k).max() > _PLANE_TOLERANCE_SLICES:
        raise DataError(
            "mask_geometry",
            "structure set: found a contour between the slices of the scan, needed contours on "
            "them; give the structure set that was drawn on this scan",
        )
    upper = np.asarray(grid.size)
    if (index < -1).any() or (index > upper).any() or not 0 <= k < grid.size[2]:
        raise DataError(
            "mask_geometry",
            "structure set: found a contour outside the scan, needed all inside; "
            "give the structure set that was drawn on this scan",
        )
    return k


def _check_every_slice(drawn: list[int]) -> None:
    # three slices and never two neighbours: drawn on every n-th slice, to be filled in by eye
    if len(drawn) > 2 and int(np.diff(drawn).min()) > 1:
        raise DataError(
            "sparse_contours",
            "structure set: found contours on every second slice or fewer, needed every slice; "
            "interpolate the contours where they were drawn",
        )


def _broken_structures() -> DataError:
    return DataError(
        "not_a_mask",
        "structure set: found a file that is cut off or lacks its regions, needed a whole DICOM "
        "RTSTRUCT; export it again",
    )
