"""De-identified DICOM: a CT series and the structure set that outlines its tumour."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from pydicom import dcmwrite
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    RTStructureSetStorage,
)
from skimage.measure import find_contours

from modalities.files import replacing
from modalities.synthetic.nifti import origin_mm

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_INTERCEPT_HU = -1024
# Encoding a data set takes the library milliseconds. A series is encoded once, without its pixels,
# and what differs between its images is written over these values of equal width.
_POSITION = "+9999.999\\+9999.999\\+9999.999"
_NUMBER = b"\x20\x00\x13\x00IS\x04\x009999"
_PIXEL_DATA = b"\xe0\x7f\x10\x00OW\x00\x00"
_DETACHED_STUDY = UID("1.2.840.10008.3.1.2.3.1")


@dataclass(frozen=True)
class Series:
    """What a structure set must know of the images that it refers to."""

    name: str
    patient_id: str
    image_uids: tuple[UID, ...]
    origin_mm: tuple[float, float, float]
    spacing_mm: tuple[float, float, float]


def _uid(*parts: str) -> UID:
    """Derive an identifier from names, so that the same simulation has the same identifiers."""
    digest = int(hashlib.sha256("/".join(parts).encode()).hexdigest(), 16)
    # All of the same length, and within the 128 bits that follow 2.25.
    return UID(f"2.25.{10**38 + digest % 10**38}")


def _study(name: str, patient_id: str) -> Dataset:
    """Attributes of patient, study and equipment; what would identify is empty or absent."""
    study = Dataset()
    study.PatientName = ""
    study.PatientID = patient_id
    study.PatientBirthDate = ""
    study.PatientSex = ""
    study.PatientIdentityRemoved = "YES"
    study.DeidentificationMethod = "Simulated; no person behind it"
    study.StudyInstanceUID = _uid(name, "study")
    study.StudyDate = ""
    study.StudyTime = ""
    study.StudyID = ""
    study.AccessionNumber = ""
    study.ReferringPhysicianName = ""
    study.FrameOfReferenceUID = _uid(name, "frame")
    study.PositionReferenceIndicator = ""
    study.Manufacturer = "Simulated"
    return study


def _encoded(dataset: Dataset) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta = meta
    buffer = BytesIO()
    dcmwrite(buffer, _as_encoded(dataset), enforce_file_format=True)
    return buffer.getvalue()


def _write(target: Path, content: bytes) -> None:
    with replacing(target) as temporary:
        temporary.write_bytes(content)


def _as_encoded(dataset: Dataset) -> Dataset:
    """Mark a dataset as holding explicit little-endian bytes, so that raw elements stay raw."""
    dataset.set_original_encoding(
        is_implicit_vr=False, is_little_endian=True, character_encoding="iso8859"
    )
    return dataset


def _raw(keyword: str, vr: str, value: bytes) -> RawDataElement:
    """Element already encoded, which spares the library a conversion of every single number."""
    padded = value + b" " * (len(value) % 2)
    return RawDataElement(
        Tag(keyword), vr, len(padded), padded, 0, is_implicit_VR=False, is_little_endian=True
    )


def write_series(
    folder: Path,
    volume: NDArray[np.int16],
    spacing_mm: tuple[float, float, float],
    name: str,
    patient_id: str,
) -> Series:
    """Write one axial CT image per slice, from feet to head.

    Parameters
    ----------
    folder
        Folder of the series.
    volume
        (slices, rows, columns) Hounsfield units.
    spacing_mm
        Voxel size along x, y and z.
    name
        What all identifiers are derived from.
    patient_id
        Pseudonym, the only identity in the files.
    """
    x, y, z = origin_mm(volume.shape, spacing_mm)
    template = _encoded(_image(volume.shape, spacing_mm, name, patient_id))
    uids = tuple(_uid(name, "image", str(number)) for number in range(len(volume)))
    stored = (volume.astype(np.int32) - _INTERCEPT_HU).astype("<u2")
    for number, uid in enumerate(uids):
        position = f"{x:+09.3f}\\{y:+09.3f}\\{z + number * spacing_mm[2]:+09.3f}"
        content = (
            template.replace(_uid(name).encode(), uid.encode())
            .replace(_POSITION.encode(), position.encode())
            .replace(_NUMBER, _NUMBER[:-4] + b"%04d" % (number + 1))
        )
        pixels = stored[number].tobytes()
        header = _PIXEL_DATA + len(pixels).to_bytes(4, "little")
        _write(folder / f"{number + 1:03d}.dcm", content + header + pixels)
    return Series(name, patient_id, uids, (x, y, z), spacing_mm)


def _image(
    shape: tuple[int, ...], spacing_mm: tuple[float, float, float], name: str, patient_id: str
) -> Dataset:
    """Describe a series, with values of a fixed width where its images differ."""
    image = _study(name, patient_id)
    image.SOPClassUID = CTImageStorage
    image.SOPInstanceUID = _uid(name)
    image.InstanceNumber = _NUMBER[-4:].decode()
    image.ImagePositionPatient = _POSITION
    image.ImageType = ["DERIVED", "PRIMARY", "AXIAL"]
    image.Modality = "CT"
    image.SeriesInstanceUID = _uid(name, "series")
    image.SeriesNumber = 1
    image.AcquisitionNumber = 1
    image.BodyPartExamined = "CHEST"
    image.BurnedInAnnotation = "NO"
    image.PatientPosition = "HFS"
    image.KVP = 120
    image.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    image.PixelSpacing = [spacing_mm[1], spacing_mm[0]]
    image.SliceThickness = spacing_mm[2]
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Rows, image.Columns = shape[1:]
    image.BitsAllocated = 16
    image.BitsStored = 16
    image.HighBit = 15
    image.PixelRepresentation = 0
    image.RescaleSlope = 1
    image.RescaleIntercept = _INTERCEPT_HU
    image.RescaleType = "HU"
    return image


def write_structure_set(target: Path, mask: NDArray[np.bool_], series: Series, roi: str) -> None:
    """Write the outline of ``mask`` as closed planar contours of one region.

    Parameters
    ----------
    target
        The RTSTRUCT to write.
    mask
        (slices, rows, columns) True inside the region; slices must have no holes.
    series
        The images that the contours lie on.
    roi
        Name of the region.
    """
    structures = _study(series.name, series.patient_id)
    structures.SOPClassUID = RTStructureSetStorage
    structures.SOPInstanceUID = _uid(series.name, "structures")
    structures.Modality = "RTSTRUCT"
    structures.SeriesInstanceUID = _uid(series.name, "structure series")
    structures.SeriesNumber = 2
    structures.OperatorsName = ""
    structures.StructureSetLabel = roi
    structures.StructureSetDate = ""
    structures.StructureSetTime = ""
    structures.ApprovalStatus = "UNAPPROVED"
    structures.ReferencedFrameOfReferenceSequence = [_frame(series)]
    structures.StructureSetROISequence = [_region(series, roi)]
    structures.ROIContourSequence = [_contours(mask, series)]
    structures.RTROIObservationsSequence = [_observation()]
    _write(target, _encoded(structures))


def _reference(uid: UID) -> Dataset:
    reference = Dataset()
    reference.ReferencedSOPClassUID = CTImageStorage
    reference.ReferencedSOPInstanceUID = uid
    return reference


def _frame(series: Series) -> Dataset:
    images = Dataset()
    images.SeriesInstanceUID = _uid(series.name, "series")
    images.ContourImageSequence = [_reference(uid) for uid in series.image_uids]
    study = Dataset()
    study.ReferencedSOPClassUID = _DETACHED_STUDY
    study.ReferencedSOPInstanceUID = _uid(series.name, "study")
    study.RTReferencedSeriesSequence = [images]
    frame = Dataset()
    frame.FrameOfReferenceUID = _uid(series.name, "frame")
    frame.RTReferencedStudySequence = [study]
    return frame


def _region(series: Series, roi: str) -> Dataset:
    region = Dataset()
    region.ROINumber = 1
    region.ReferencedFrameOfReferenceUID = _uid(series.name, "frame")
    region.ROIName = roi
    region.ROIGenerationAlgorithm = "AUTOMATIC"
    return region


def _observation() -> Dataset:
    observation = Dataset()
    observation.ObservationNumber = 1
    observation.ReferencedROINumber = 1
    observation.RTROIInterpretedType = "GTV"
    observation.ROIInterpreter = ""
    return observation


def _contours(mask: NDArray[np.bool_], series: Series) -> Dataset:
    region = _as_encoded(Dataset())
    region.ReferencedROINumber = 1
    region.ROIDisplayColor = [255, 0, 0]
    region.ContourSequence = [
        _contour(outline, number, series)
        for number, plane in enumerate(mask)
        if plane.any()
        for outline in find_contours(np.pad(plane, 1).astype(np.float64), 0.5)
    ]
    return region


def _contour(outline: NDArray[np.float64], number: int, series: Series) -> Dataset:
    """One contour; ``outline`` is (n, 2) rows and columns on the padded plane, its ends equal."""
    (x, y, z), (dx, dy, dz) = series.origin_mm, series.spacing_mm
    row, column = (outline[:-1] - 1.0).T
    points = np.stack([x + column * dx, y + row * dy, np.full(len(row), z + number * dz)], axis=1)
    contour = _as_encoded(Dataset())
    contour.ContourImageSequence = [_reference(series.image_uids[number])]
    contour.ContourGeometricType = "CLOSED_PLANAR"
    contour.NumberOfContourPoints = len(points)
    text = "\\".join([f"{value:.2f}" for value in points.ravel().tolist()])
    contour[Tag("ContourData")] = _raw("ContourData", "DS", text.encode())
    return contour
