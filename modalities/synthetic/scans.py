"""Scans: chest CT with one tumour, as a DICOM series with structure set or as two NIfTI files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import binary_fill_holes, gaussian_filter

from modalities.synthetic.dicom import write_series, write_structure_set
from modalities.synthetic.nifti import write_nifti
from modalities.synthetic.truth import SCAN_STREAM, patient_rng, site_rng

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ROI = "GTV"
SIDE_PX = 48

_SLICES = (20, 25)
_IN_PLANE_MM = (0.8, 0.9, 1.0)
_BETWEEN_MM = (2.0, 2.5)
_N_WAVES = 16
_LUNG_HU, _SOFT_TISSUE_HU = -820.0, 40.0


@dataclass(frozen=True)
class Scanner:
    """What one site's CT does to every scan.

    Attributes
    ----------
    spacing_mm
        Voxel size along x, y and z.
    blur_mm
        Standard deviation of the reconstruction kernel within a slice.
    noise_hu
        Standard deviation of the noise.
    """

    spacing_mm: tuple[float, float, float]
    blur_mm: float
    noise_hu: float


def site_scanner(seed: int, site: int) -> Scanner:
    """Draw the scanner of one site."""
    rng = site_rng(seed, site, stream=SCAN_STREAM)
    in_plane = float(rng.choice(_IN_PLANE_MM))
    spacing = (in_plane, in_plane, float(rng.choice(_BETWEEN_MM)))
    return Scanner(spacing, float(rng.uniform(0.4, 0.9)), float(rng.uniform(6.0, 14.0)))


@dataclass(frozen=True)
class Scan:
    """One CT and its tumour.

    Attributes
    ----------
    volume
        (slices, rows, columns) Hounsfield units.
    mask
        (slices, rows, columns) True inside the tumour.
    spacing_mm
        Voxel size along x, y and z.
    """

    volume: NDArray[np.int16]
    mask: NDArray[np.bool_]
    spacing_mm: tuple[float, float, float]


def draw_scan(observed: NDArray[np.float64], scanner: Scanner, rng: np.random.Generator) -> Scan:
    """Draw the chest around one tumour.

    Parameters
    ----------
    observed
        (3,) size, heterogeneity (of density inside the tumour) and spicularity (of its outline), in
        standard deviations.
    scanner
        Scanner of the site.
    rng
        The patient's own random stream.
    """
    size, heterogeneity, spicularity = np.clip(observed, -2.5, 2.5)
    shape = (int(rng.integers(*_SLICES)), SIDE_PX, SIDE_PX)
    spacing = np.array(scanner.spacing_mm[::-1])
    position = _position_mm(shape, spacing, rng.normal(0.0, 0.5, 3))
    mask = _tumour(position, 10.5 * np.exp(0.16 * size), 0.09 * np.exp(0.45 * spicularity), rng)
    texture = _field(rng, shape, 1.8 / spacing)
    # The phase of the contrast agent says nothing of prognosis.
    density = (
        _SOFT_TISSUE_HU + rng.normal(0.0, 15.0) + 16.0 * np.exp(0.42 * heterogeneity) * texture
    )
    volume = np.where(mask, density, _chest(position, rng, shape, spacing)).astype(np.float32)
    volume = gaussian_filter(volume, np.array([0.3, 1.0, 1.0]) * scanner.blur_mm / spacing)
    volume += scanner.noise_hu * _field(rng, shape, np.array([0.0, 0.5, 0.5]))
    return Scan(np.round(volume).clip(-1024, 3071).astype(np.int16), mask, scanner.spacing_mm)


def _position_mm(
    shape: tuple[int, int, int], spacing: NDArray[np.float64], centre: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(3, slices, rows, columns) millimetres from the tumour's centre along z, y and x."""
    axes = [(np.arange(n) - (n - 1) / 2.0) * mm for n, mm in zip(shape, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    return (grid - centre[:, None, None, None]).astype(np.float32)


def _field(
    rng: np.random.Generator, shape: tuple[int, int, int], sigma_px: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Smooth Gaussian noise with unit variance."""
    smooth = gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma_px, mode="wrap")
    return smooth / smooth.std()


def _tumour(
    position: NDArray[np.float32], radius_mm: float, roughness: float, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Star-shaped body whose radius varies with direction by a sum of waves on the sphere."""
    direction = rng.standard_normal((_N_WAVES, 3))
    direction *= rng.uniform(5.0, 9.0, (_N_WAVES, 1)) / np.linalg.norm(direction, axis=1)[:, None]
    phase = rng.uniform(0.0, 2.0 * np.pi, _N_WAVES).astype(np.float32)
    distance = np.linalg.norm(position, axis=0)
    near = distance < 1.5 * radius_mm
    unit = position[:, near] / np.maximum(distance[near], 1e-3)
    angle = np.einsum("wk,kn->wn", direction.astype(np.float32), unit) + phase[:, None]
    wave = np.cos(angle).sum(axis=0) * np.sqrt(2.0 / _N_WAVES)
    mask = np.zeros(distance.shape, dtype=np.bool_)
    mask[near] = distance[near] < radius_mm * np.clip(1.0 + roughness * wave, 0.45, 1.5)
    for number in np.flatnonzero(mask.any(axis=(1, 2))):
        mask[number] = binary_fill_holes(mask[number])
    # The largest tumours end where the field of view does, one voxel within it.
    return np.pad(mask[1:-1, 1:-1, 1:-1], 1)


def _chest(
    position: NDArray[np.float32],
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    spacing: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Lung with vessels, and the chest wall on one side."""
    vessels = _field(rng, shape, np.array([2.5, 1.2, 1.2]) / spacing)
    lung = _LUNG_HU + 30.0 * vessels + 600.0 * np.clip(vessels - 2.0, 0.0, 1.0)
    turn = rng.uniform(0.0, 2.0 * np.pi)
    depth = position[1] * np.sin(turn) + position[2] * np.cos(turn)
    return np.where(depth > 17.0, _SOFT_TISSUE_HU, lung).astype(np.float32)


def is_dicom(patient: int) -> bool:
    """Whether a patient's scan is a DICOM series: every other one, by index within the site."""
    return patient % 2 == 0


def scan_paths(patient: int, patient_id: str) -> tuple[str, str]:
    """Paths of a patient's scan and mask, relative to the site's folder."""
    if is_dicom(patient):
        return f"raw/scans/{patient_id}/ct", f"raw/scans/{patient_id}/rtstruct.dcm"
    return f"raw/scans/{patient_id}_ct.nii.gz", f"raw/scans/{patient_id}_gtv.nii.gz"


def write_scan(
    folder: Path, patient_id: str, observed: NDArray[np.float64], *, seed: int, key: tuple[int, int]
) -> None:
    """Write one scan that shows the observed radiology factors, with the same bytes every time.

    The mask is written last: where it lies, the scan is whole.

    Parameters
    ----------
    folder
        The site's folder.
    patient_id
        Pseudonym.
    observed
        (3,) size, heterogeneity and spicularity, in standard deviations.
    seed
        Seed of the simulation.
    key
        Indices of the site and of the patient.
    """
    scan = draw_scan(
        observed, site_scanner(seed, key[0]), patient_rng(seed, *key, stream=SCAN_STREAM)
    )
    volume_path, mask_path = (folder / path for path in scan_paths(key[1], patient_id))
    if is_dicom(key[1]):
        name = f"{seed}/{patient_id}"
        series = write_series(volume_path, scan.volume, scan.spacing_mm, name, patient_id)
        write_structure_set(mask_path, scan.mask, series, ROI)
    else:
        write_nifti(volume_path, scan.volume, scan.spacing_mm)
        write_nifti(mask_path, scan.mask.astype(np.uint8), scan.spacing_mm)
