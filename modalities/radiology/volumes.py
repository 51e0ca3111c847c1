"""Volumes of scans: single files and folders of DICOM slices, with their place in the patient."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import SimpleITK as sitk
    from numpy.typing import NDArray

FRAME_KEY = "frame_of_reference"
"""Metadata key under which a volume keeps its DICOM frame of reference, for structure sets."""

_GZIP_CHUNK_BYTES = 1 << 20
_GAP_TOLERANCE_MM = 0.1
_GAP_TOLERANCE = 0.2  # of a slice gap; a missing slice is off by a third or more
_TILT_TOLERANCE = 0.01  # sideways drift per slice, as a part of the gap
_HEADER_TAGS = [
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "SamplesPerPixel",
]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie in the patient.

    ``direction`` is (3, 3), row-major: column i is the unit vector of axis i (x, y, z).
    """

    size: tuple[int, ...]
    spacing_mm: tuple[float, ...]
    origin_mm: tuple[float, ...]
    direction: tuple[float, ...]
    frame: str = ""

    def axes_mm(self) -> NDArray[np.float64]:
        """(3, 3) matrix that takes voxel indices (x, y, z) to millimetres from the origin."""
        return np.reshape(self.direction, (3, 3)) * np.asarray(self.spacing_mm)

    def place(self, image: sitk.Image) -> None:
        """Give ``image`` this position, spacing and orientation."""
        image.SetSpacing(self.spacing_mm)
        image.SetOrigin(self.origin_mm)
        image.SetDirection(self.direction)


@dataclass(frozen=True)
class _Slice:
    """Header of a DICOM slice.

    ``layout`` is rows, columns, channels, row and column spacing, and the two unit vectors.
    """

    path: Path
    series: str
    frame: str
    layout: NDArray[np.float64]
    position_mm: NDArray[np.float64]


def grid_of(image: Any) -> Grid:
    """Geometry of an image, or of a reader that has read a header."""
    has_frame = image.HasMetaDataKey(FRAME_KEY)
    return Grid(
        tuple(image.GetSize()),
        tuple(image.GetSpacing()),
        tuple(image.GetOrigin()),
        tuple(image.GetDirection()),
        image.GetMetaData(FRAME_KEY) if has_frame else "",
    )


def read_volume(path: Path) -> sitk.Image:
    """Read a scan from a file (NIfTI, NRRD, ...) or from a folder that holds one DICOM series.

    DICOM slices are ordered by their position, and their rescale slope and intercept are applied,
    so that CT is in Hounsfield units. Other files in such a folder are ignored where their name
    shows that they are not DICOM.

    Raises
    ------
    DataError
        ``missing_file``; ``not_a_scan`` if no volume can be read; ``several_series``;
        ``irregular_slices`` if slices are missing, doubled, tilted or of several sizes;
        ``not_finite`` if a voxel is NaN or infinite.
    """
    import SimpleITK as sitk

    _check_exists(path)
    volume = _read_series(path) if path.is_dir() else read_file(path, code="not_a_scan")
    if not np.isfinite(sitk.GetArrayViewFromImage(volume)).all():
        raise DataError(
            "not_finite", "scan: found NaN or infinite voxels, needed finite ones; export it again"
        )
    return volume


def read_grid(path: Path) -> Grid:
    """Geometry of a scan from its headers alone; raises as `read_volume` does.

    Voxels are not read, hence neither is their finiteness checked.
    """
    _check_exists(path)
    return _scan_series(path)[1] if path.is_dir() else grid_of(open_file(path, code="not_a_scan"))


def open_file(path: Path, *, code: str) -> sitk.ImageFileReader:
    """Read the header of a volume in a single file; raise `DataError` with ``code`` otherwise."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # its text names the file
        raise _unreadable(code) from None
    dimension, channels = reader.GetDimension(), reader.GetNumberOfComponents()
    if dimension != 3 or channels != 1:
        raise DataError(
            code,
            f"image: found {dimension} dimensions and {channels} channels, needed 3 and 1; "
            "give one scalar volume",
        )
    return reader


def read_file(path: Path, *, code: str) -> sitk.Image:
    """Read a volume from a single file; raise `DataError` with ``code`` if that fails."""
    reader = open_file(path, code=code)
    try:
        _check_whole(reader, path)
        return reader.Execute()
    except (RuntimeError, OSError, EOFError, zlib.error):
        raise _unreadable(code) from None


def _check_whole(reader: sitk.ImageFileReader, path: Path) -> None:
    # the NIfTI reader takes a cut-off file for a volume whose rest is empty
    packed = path.suffix.lower() == ".gz"
    found_bytes = _unpacked_bytes(path) if packed else path.stat().st_size
    if (path.with_suffix("") if packed else path).suffix.lower() == ".nii":
        voxels = math.prod(reader.GetSize())
        needed_bytes = voxels * int(reader.GetMetaData("bitpix")) // 8
        if found_bytes < needed_bytes + int(float(reader.GetMetaData("vox_offset"))):
            raise EOFError


def _unpacked_bytes(path: Path) -> int:
    with gzip.open(path) as stream:
        return sum(len(chunk) for chunk in iter(lambda: stream.read(_GZIP_CHUNK_BYTES), b""))


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise DataError(
            "missing_file", "scan: found nothing at its path, needed a file or a folder of slices"
        )


def _unreadable(code: str) -> DataError:
    return DataError(
        code,
        "image: found a file that cannot be read as a volume or is cut off, needed a whole NIfTI, "
        "NRRD or DICOM file; export it again",
    )


def _read_series(folder: Path) -> sitk.Image:
    import SimpleITK as sitk

    files, grid = _scan_series(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(file) for file in files])
    # slices of one series may have rescale slopes, and so pixel types, of their own
    reader.SetOutputPixelType(sitk.sitkFloat32)
    try:
        volume = reader.Execute()
    except RuntimeError:
        raise _unreadable("not_a_scan") from None
    grid.place(volume)
    if grid.frame:
        volume.SetMetaData(FRAME_KEY, grid.frame)
    return volume


def _scan_series(folder: Path) -> tuple[list[Path], Grid]:
    """Slices of the one series in ``folder`` in the order of their position, and their grid."""
    files = sorted(file for file in folder.iterdir() if _may_be_dicom(file))
    slices = [found for file in files if (found := _slice_of(file)) is not None]
    series = {found.series for found in slices}
    if len(series) > 1:
        raise DataError(
            "several_series",
            f"DICOM folder: found {len(series)} series, needed one; give each its own folder",
        )
    if len(slices) < 2:
        raise DataError(
            "not_a_scan",
            f"DICOM folder: found {len(slices)} slices, needed two or more; "
            "export the whole series",
        )
    order, grid = _series_grid(slices)
    return [slices[i].path for i in order], grid


def _may_be_dicom(path: Path) -> bool:
    suffix = path.suffix.lower()
    named_so = suffix in {"", ".dcm", ".ima"} or suffix[1:].isdigit()
    return path.is_file() and named_so and path.name[0] != "." and path.name != "DICOMDIR"


def _slice_of(path: Path) -> _Slice | None:
    """Read the header of a slice; None for a DICOM object that is no image."""
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
        if "Image Storage" not in header.file_meta.MediaStorageSOPClassUID.name:
            return None
        layout = [
            *(header.Rows, header.Columns, header.SamplesPerPixel),
            *header.PixelSpacing,
            *header.ImageOrientationPatient,
        ]
        return _Slice(
            path=path,
            series=str(header.SeriesInstanceUID),
            frame=str(header.get("FrameOfReferenceUID", "")),
            layout=np.reshape(np.array(layout, dtype=float), 11),
            position_mm=np.reshape(np.array(header.ImagePositionPatient, dtype=float), 3),
        )
    except (InvalidDicomError, AttributeError, EOFError, KeyError, OSError, TypeError, ValueError):
        raise DataError(
            "not_a_scan",
            "DICOM folder: found a file that is cut off or no slice with a place in the patient, "
            "needed slices only; remove it or export the series again",
        ) from None


def _series_grid(slices: Sequence[_Slice]) -> tuple[list[int], Grid]:
    first = slices[0].layout
    if not all(np.allclose(first, other.layout, rtol=0, atol=1e-3) for other in slices):
        raise _irregular("sizes or orientations that differ")
    rows, columns, channels, row_mm, column_mm = first[:5].tolist()
    if channels != 1:
        raise DataError("not_a_scan", "DICOM folder: found colour images, needed a scan")
    across, down = np.reshape(first[5:], (2, 3))
    normal = np.cross(across, down)
    positions = np.array([found.position_mm for found in slices])  # (n, 3)
    order = np.argsort(positions @ normal, kind="stable")
    gap_mm = _even_gap_mm(positions[order], normal)
    grid = Grid(
        size=(int(columns), int(rows), len(slices)),
        spacing_mm=(column_mm, row_mm, gap_mm),
        origin_mm=tuple(positions[order[0]].tolist()),
        direction=tuple(np.column_stack([across, down, normal]).ravel().tolist()),
        frame=slices[0].frame,
    )
    return order.tolist(), grid


def _even_gap_mm(positions: NDArray[np.float64], normal: NDArray[np.float64]) -> float:
    """Distance between neighbours of (n, 3) ordered positions, if it is one and the same."""
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    gap_mm = float(step @ normal)
    if gap_mm <= 0 or np.linalg.norm(step - gap_mm * normal) > _TILT_TOLERANCE * gap_mm:
        raise _irregular("slices at one position or along a tilted line")
    expected = positions[0] + np.arange(len(positions))[:, None] * step
    off_mm = np.linalg.norm(positions - expected, axis=1).max()
    if off_mm > min(_GAP_TOLERANCE_MM, _GAP_TOLERANCE * gap_mm):
        raise _irregular("missing or doubled slices, or unequal gaps")
    return gap_mm


def _irregular(found: str) -> DataError:
    return DataError(
        "irregular_slices",
        f"DICOM folder: found {found}, needed one stack of evenly spaced slices; "
        "export the whole series, or resample it",
    )
