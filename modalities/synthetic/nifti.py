"""NIfTI-1 files with the same bytes every time, which imaging libraries do not promise."""

from __future__ import annotations

import gzip
import struct
from typing import TYPE_CHECKING

import numpy as np

from modalities.files import replacing

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_TYPE_CODES = {"uint8": (2, 8), "int16": (4, 16)}
_HEADER_BYTES = 352


def origin_mm(shape: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> list[float]:
    """Position (left, posterior, superior) of the first voxel of a volume centred on the origin.

    Parameters
    ----------
    shape
        (slices, rows, columns).
    spacing_mm
        Voxel size along x, y and z.
    """
    return [-(n - 1) / 2.0 * mm for n, mm in zip(shape[::-1], spacing_mm, strict=True)]


def write_nifti(
    target: Path, volume: NDArray[np.generic], spacing_mm: tuple[float, float, float]
) -> None:
    """Write a volume whose axes point left, posterior and superior, centred on the origin.

    Parameters
    ----------
    target
        The ``.nii.gz`` to write.
    volume
        (slices, rows, columns) of int16 or uint8.
    spacing_mm
        Voxel size along x, y and z.
    """
    little = np.ascontiguousarray(volume, dtype=volume.dtype.newbyteorder("<"))
    content = _header(volume, spacing_mm) + little.tobytes()
    with replacing(target) as temporary:
        # The time of writing would otherwise enter the header of the compressed file.
        temporary.write_bytes(gzip.compress(content, compresslevel=4, mtime=0))


def _header(volume: NDArray[np.generic], spacing_mm: tuple[float, float, float]) -> bytes:
    """Header of the NIfTI-1 standard; the field offsets are those of its ``nifti1.h``."""
    header = bytearray(_HEADER_BYTES)
    x, y, z = origin_mm(volume.shape, spacing_mm)
    dx, dy, dz = spacing_mm
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *volume.shape[::-1], 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, *_TYPE_CODES[volume.dtype.name])
    struct.pack_into("<8f", header, 76, 1.0, dx, dy, dz, 0.0, 0.0, 0.0, 0.0)
    struct.pack_into("<3f", header, 108, float(_HEADER_BYTES), 1.0, 0.0)
    header[123] = 2  # millimetres
    # NIfTI's axes point right and anterior: half a turn about z, as quaternion and as matrix.
    struct.pack_into("<2h", header, 252, 1, 1)
    struct.pack_into("<6f", header, 256, 0.0, 0.0, 1.0, -x, -y, z)
    matrix = (-dx, 0.0, 0.0, -x, 0.0, -dy, 0.0, -y, 0.0, 0.0, dz, z)
    struct.pack_into("<12f", header, 280, *matrix)
    header[344:348] = b"n+1\0"
    return bytes(header)
