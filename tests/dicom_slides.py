"""DICOM slides as scanners write them: a series of levels, tiled, in JPEG."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import JPEGBaseline8Bit, VLWholeSlideMicroscopyImageStorage, generate_uid

if TYPE_CHECKING:
    from pathlib import Path

TILE_PX = 128
# What no output may hold.
IDENTIFIERS = {
    "PatientName": "Zzyzx^Quentin",
    "PatientID": "MRN-7730915",
    "PatientBirthDate": "19470229",
    "AccessionNumber": "ACC-5519",
    "ContainerIdentifier": "S22-90871-A1",
    "ReferringPhysicianName": "Qwghlm^Root",
    "InstitutionName": "Xanth Hospital",
}
# Stands in the folder of the same person's slide, and is none.
OTHER_CLASS = "1.2.840.10008.5.1.4.1.1.2"


def write_series(
    folder: Path, picture: np.ndarray, *, levels: int = 2, mpp: float = 0.5, series: str = "one"
) -> list[Path]:
    """Write a series, each level half of the one before; its files from the finest on."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        write_level(
            folder / f"{series}-{level}.dcm", picture[:: 2**level, :: 2**level],
            mpp=mpp * 2**level, series=series, resampled=level > 0,
        )
        for level in range(levels)
    ]  # fmt: skip


def write_level(
    path: Path, picture: np.ndarray, *, mpp: float = 0.5, series: str = "one",
    resampled: bool = False, sop_class: str = VLWholeSlideMicroscopyImageStorage,
) -> Path:  # fmt: skip
    frames = [_jpeg(tile) for tile in tiles_of(picture)]
    image = _image(picture, mpp, len(frames))
    image.ImageType = ["DERIVED" if resampled else "ORIGINAL", "PRIMARY", "VOLUME"]
    image.ImageType.append("RESAMPLED" if resampled else "NONE")
    for name, value in IDENTIFIERS.items():
        setattr(image, name, value)
    image.SOPClassUID = sop_class
    image.SOPInstanceUID = generate_uid(entropy_srcs=[series, str(mpp), "instance"])
    image.SeriesInstanceUID = generate_uid(entropy_srcs=[series])
    image.StudyInstanceUID = generate_uid(entropy_srcs=["study"])
    image.PixelData = encapsulate(frames)
    image["PixelData"].VR = "OB"
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = sop_class
    meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID
    meta.TransferSyntaxUID = JPEGBaseline8Bit
    image.file_meta = meta
    image.save_as(path, enforce_file_format=True)
    return path


def decoded(picture: np.ndarray) -> np.ndarray:
    """The picture as its stored tiles decode."""
    height, width, _ = picture.shape
    across = -(-width // TILE_PX)
    tiles = [np.array(Image.open(BytesIO(_jpeg(tile)))) for tile in tiles_of(picture)]
    rows = [np.hstack(tiles[i : i + across]) for i in range(0, len(tiles), across)]
    return np.vstack(rows)[:height, :width]


def tiles_of(picture: np.ndarray) -> list[np.ndarray]:
    """Tiles row by row, filled up at the right and lower edge."""
    height, width, _ = picture.shape
    below, right = -height % TILE_PX, -width % TILE_PX
    full = np.pad(picture, ((0, below), (0, right), (0, 0)), mode="edge")
    return [
        full[y : y + TILE_PX, x : x + TILE_PX]
        for y in range(0, height, TILE_PX)
        for x in range(0, width, TILE_PX)
    ]


def _jpeg(tile: np.ndarray) -> bytes:
    stream = BytesIO()
    Image.fromarray(tile).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def _image(picture: np.ndarray, mpp: float, n_frames: int) -> Dataset:
    image = Dataset()
    image.Modality = "SM"
    image.SamplesPerPixel, image.PlanarConfiguration, image.PixelRepresentation = 3, 0, 0
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.PhotometricInterpretation = "YBR_FULL_422"
    image.Rows = image.Columns = TILE_PX
    image.NumberOfFrames = n_frames
    image.TotalPixelMatrixRows, image.TotalPixelMatrixColumns = picture.shape[:2]
    image.TotalPixelMatrixFocalPlanes = 1
    image.DimensionOrganizationType = "TILED_FULL"
    image.OpticalPathSequence = _sequence(OpticalPathIdentifier="1", ObjectiveLensPower="20")
    measures = _sequence(PixelSpacing=[mpp / 1000, mpp / 1000], SliceThickness=0.001)
    image.SharedFunctionalGroupsSequence = _sequence(PixelMeasuresSequence=measures)
    image.LossyImageCompression = "01"
    return image


def _sequence(**values: Any) -> Sequence:
    item = Dataset()
    for name, value in values.items():
        setattr(item, name, value)
    return Sequence([item])
