"""Slides: pyramidal TIFFs of one tissue section each, stained like haematoxylin and eosin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import tifffile
from PIL import Image
from scipy import fft
from scipy.ndimage import gaussian_filter, minimum_filter

from modalities.files import replacing
from modalities.synthetic.truth import SLIDE_STREAM, patient_rng, site_rng, study_rng

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

SLIDE_PX = 1024
SLIDE_MPP = 0.5

_COARSE = 8
_N_LEVELS = 3
_TIFF_TILE_PX = 256
_JPEG_QUALITY = 85
_SHADES = 128
_SHADE = 1.75 / _SHADES
_STAMP_PX = 28
_N_SHAPES = 48
_N_SIZES = 12

# Optical densities in red, green and blue: Macenko and others, 2009, as most stain tools have them.
_HAEMATOXYLIN = np.array([0.563, 0.720, 0.406])
_EOSIN = np.array([0.216, 0.801, 0.558])


@dataclass(frozen=True)
class Stain:
    """How one laboratory stains and one scanner sees: optical density per unit of each dye.

    Attributes
    ----------
    haematoxylin, eosin
        (3,) optical density in red, green and blue.
    white
        (3,) grey value of empty glass.
    """

    haematoxylin: NDArray[np.float64]
    eosin: NDArray[np.float64]
    white: NDArray[np.float64]


def site_stain(seed: int, site: int) -> Stain:
    """Draw the stain of one site."""
    rng = site_rng(seed, site, stream=SLIDE_STREAM)
    dyes = [
        _unit(dye + rng.normal(0.0, 0.05, 3)) * rng.uniform(0.85, 1.15)
        for dye in (_HAEMATOXYLIN, _EOSIN)
    ]
    return Stain(dyes[0], dyes[1], rng.uniform(238.0, 248.0, 3))


def _unit(vector: NDArray[np.float64]) -> NDArray[np.float64]:
    positive = np.maximum(vector, 0.02)
    return positive / np.linalg.norm(positive)


def write_slide(
    target: Path, observed: NDArray[np.float64], *, seed: int, key: tuple[int, int]
) -> None:
    """Write one slide that shows the observed pathology factors, with the same bytes every time.

    Parameters
    ----------
    target
        The TIFF to write: tiled, JPEG, three levels, resolution in pixels per centimetre.
    observed
        (2,) cellularity (how many tumour nuclei, and how large) and lymphocytes (how many, and how
        much stroma), each in standard deviations.
    seed
        Seed of the simulation.
    key
        Indices of the site and of the patient.
    """
    image = draw_slide(
        observed, site_stain(seed, key[0]), patient_rng(seed, *key, stream=SLIDE_STREAM)
    )
    with replacing(target) as temporary, tifffile.TiffWriter(temporary) as writer:
        for level in range(_N_LEVELS):
            reduced = Image.fromarray(image).reduce(2**level) if level else image
            writer.write(
                np.asarray(reduced),
                tile=(_TIFF_TILE_PX, _TIFF_TILE_PX),
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                photometric="rgb",
                subfiletype=int(level > 0),
                resolution=(1e4 / SLIDE_MPP / 2**level,) * 2,
                resolutionunit="centimeter",
                metadata=None,
                software=False,
                maxworkers=1,
            )


def draw_slide(
    observed: NDArray[np.float64], stain: Stain, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw one section.

    Parameters
    ----------
    observed
        (2,) cellularity and lymphocytes, in standard deviations.
    stain
        Stain of the site; each slide departs from it a little.
    rng
        The patient's own random stream.

    Returns
    -------
    image
        (1024, 1024, 3) red, green and blue.
    """
    cellularity, lymphocytes = np.clip(observed, -2.5, 2.5)
    tissue = _tissue(rng)
    stroma = _stroma(0.38 + 0.09 * lymphocytes, rng)
    inside = minimum_filter(tissue[_COARSE // 2 :: _COARSE, _COARSE // 2 :: _COARSE], 3)
    nests, between = inside * (1.0 - stroma), inside * (stroma + 0.08)
    haematoxylin = _stamped(
        [
            _Nuclei(nests, int(620 * np.exp(0.38 * cellularity)), 5.6 + 1.1 * cellularity, 0.80),
            _Nuclei(between, int(330 * np.exp(0.60 * lymphocytes)), 1.2, 1.30),
            _Nuclei(between, 140, 1.8, 0.90),
        ],
        rng,
    )
    packed = _shade(haematoxylin, _eosin(tissue, stroma, rng), _shades(stain, rng))
    turned = np.ascontiguousarray(np.rot90(packed, int(rng.integers(4))))
    return np.ascontiguousarray(turned.view(np.uint8).reshape(SLIDE_PX, SLIDE_PX, 4)[..., :3])


@lru_cache(maxsize=4)
def _texture(kind: int, sigma_px: tuple[float, float], size_px: int) -> NDArray[np.float32]:
    """(size, size) periodic Gaussian field with unit variance, the same in every process."""
    white = study_rng(0, stream=SLIDE_STREAM + kind).standard_normal((size_px, size_px))
    rows = fft.fftfreq(size_px)[:, None] * sigma_px[0]
    columns = fft.rfftfreq(size_px)[None, :] * sigma_px[1]
    smooth = fft.irfft2(fft.rfft2(white) * np.exp(-2.0 * np.pi**2 * (rows**2 + columns**2)))
    return (smooth / smooth.std()).astype(np.float32)


@lru_cache(maxsize=1)
def _eosin_fields() -> NDArray[np.float32]:
    """(2, 2048, 2048) eosin of the nests, and what stroma adds to it; periodic, twice each way.

    A window from a random origin is a fresh texture that costs no copy.
    """
    fibres = _texture(1, (1.6, 9.0), SLIDE_PX)
    grain = _texture(2, (1.2, 1.2), SLIDE_PX)
    nest = 0.42 + 0.05 * grain
    fibrous = np.maximum(0.58 + 0.12 * fibres + 0.03 * grain, 0.08)
    return np.tile(np.stack([nest, fibrous - nest]), (1, 2, 2))


@lru_cache(maxsize=1)
def _polar() -> tuple[NDArray[np.float32], NDArray[np.int16]]:
    """Distance from the centre in pixels and angle in 1/1024 turns, at half the resolution."""
    size = SLIDE_PX // 2
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2.0) * 2.0
    turn = np.floor(np.arctan2(y, x) / (2.0 * np.pi) * 1024.0).astype(np.int16) % 1024
    return np.hypot(x, y).astype(np.float32), turn


def _tissue(rng: np.random.Generator) -> NDArray[np.float32]:
    """(1024, 1024) share of tissue: one blob with an uneven outline and a soft edge."""
    distance, turn = _polar()
    angle = np.arange(1024) / 1024.0 * 2.0 * np.pi
    orders = np.arange(2, 14)[:, None]
    phase = rng.uniform(0.0, 2.0 * np.pi, (12, 1))
    waves = rng.normal(0.0, 0.09, (12, 1)) / orders**0.75 * np.cos(orders * angle + phase)
    radius = np.minimum(405.0 * (1.0 + waves.sum(axis=0)), 500.0).astype(np.float32)
    return _enlarged(np.clip((radius[turn] - distance) / 6.0, 0.0, 1.0))


def _enlarged(field: NDArray[np.float32]) -> NDArray[np.float32]:
    image = Image.fromarray(field).resize((SLIDE_PX, SLIDE_PX), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _stroma(share: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """(128, 128) share of stroma between nests of tumour."""
    field = _texture(0, (5.0, 5.0), SLIDE_PX // _COARSE)
    field = np.roll(field, rng.integers(len(field), size=2), axis=(0, 1))
    return np.clip((np.quantile(field, share) - field) * 4.0 + 0.5, 0.0, 1.0).astype(np.float32)


def _eosin(
    tissue: NDArray[np.float32], stroma: NDArray[np.float32], rng: np.random.Generator
) -> NDArray[np.float32]:
    """(1024, 1024) eosin: pale cytoplasm in the nests, dense wavy fibres in the stroma."""
    row, column = rng.integers(SLIDE_PX, size=2)
    nest, added = _eosin_fields()[:, row : row + SLIDE_PX, column : column + SLIDE_PX]
    eosin = added * _enlarged(stroma)
    eosin += nest
    eosin *= tissue
    return eosin


@dataclass(frozen=True)
class _Nuclei:
    """Nuclei of one kind: where they lie (coarse weights), how many, their size and darkness."""

    weight: NDArray[np.float32]
    count: int
    size: float
    darkness: float


@lru_cache(maxsize=1)
def _stamps() -> NDArray[np.float32]:
    """(12 sizes, 48 shapes, 28, 28) haematoxylin of one nucleus each, with chromatin and a rim."""
    rng = study_rng(0, stream=SLIDE_STREAM + 8)
    y, x = (np.mgrid[:_STAMP_PX, :_STAMP_PX] - (_STAMP_PX - 1) / 2.0).astype(np.float32)
    turn = rng.uniform(0.0, np.pi, (_N_SHAPES, 1, 1))
    stretch = rng.uniform(1.0, 1.45, (_N_SHAPES, 1, 1))
    along = (x * np.cos(turn) + y * np.sin(turn)) / np.sqrt(stretch)
    across = (y * np.cos(turn) - x * np.sin(turn)) * np.sqrt(stretch)
    distance = np.hypot(along, across)[None]
    radius = np.arange(_N_SIZES).reshape(-1, 1, 1, 1) * 0.8 + 2.8
    inside = np.clip(radius - distance + 0.5, 0.0, 1.0)
    rim = np.exp(-(((distance - radius + 1.0) / 1.2) ** 2))
    speckle = rng.normal(0.0, 0.45, (_N_SHAPES, _STAMP_PX, _STAMP_PX))
    chromatin = gaussian_filter(speckle, (0.0, 0.8, 0.8))[None]
    return (inside * (0.72 + 0.28 * rim + chromatin)).astype(np.float32)


def _stamped(kinds: Sequence[_Nuclei], rng: np.random.Generator) -> NDArray[np.float64]:
    """(1024, 1024) haematoxylin: one stamp per nucleus added to an empty canvas, all at once."""
    pixels, values = zip(*(_stamp(nuclei, rng) for nuclei in kinds), strict=True)
    flat, weights = np.concatenate(pixels), np.concatenate(values)
    canvas = np.bincount(flat, weights, minlength=SLIDE_PX**2).astype(np.float64, copy=False)
    return canvas.reshape(SLIDE_PX, SLIDE_PX)


def _stamp(
    nuclei: _Nuclei, rng: np.random.Generator
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Pixels that nuclei of one kind cover, flat, and the haematoxylin they add there."""
    n = nuclei.count
    size = np.clip(np.round(rng.normal(nuclei.size, 0.9, n)), 0, _N_SIZES - 1).astype(np.int64)
    # The radius of a size class s is 2.8 + 0.8 s pixels, stretched by 1.2 at most.
    width = _STAMP_PX if size.max() > 3 else _STAMP_PX // 2
    margin = (_STAMP_PX - width) // 2
    window = slice(margin, margin + width)
    darkness = np.maximum(rng.normal(nuclei.darkness, 0.12, n), 0.2).astype(np.float32)
    stamps = _stamps()[size, rng.integers(_N_SHAPES, size=n), window, window]
    offsets = (np.arange(width)[:, None] * SLIDE_PX + np.arange(width)).ravel()
    corners = _corners(nuclei.weight, n, width, rng) @ np.array([SLIDE_PX, 1])
    pixels = (corners[:, None] + offsets).astype(np.int32)
    return pixels.ravel(), (stamps * darkness[:, None, None]).ravel()


def _corners(
    weight: NDArray[np.float32], n: int, width: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(n, 2) corners of stamps whose middles fall where the coarse ``weight`` says."""
    cumulative = np.cumsum(weight, dtype=np.float64)
    drawn = np.searchsorted(cumulative, rng.uniform(0.0, cumulative[-1], n))
    coarse = np.stack(np.unravel_index(np.minimum(drawn, weight.size - 1), weight.shape), axis=1)
    middle = coarse * _COARSE + rng.integers(_COARSE, size=(n, 2))
    return np.clip(middle - width // 2, 0, SLIDE_PX - width)


def _shades(stain: Stain, rng: np.random.Generator) -> NDArray[np.uint32]:
    """(128 * 128,) colour of every pair of amounts of the two dyes, packed as bytes R, G, B, 0.

    Beer and Lambert's law once per shade spares an exponential per pixel. Nuclei leave less room
    for eosin.
    """
    steps = np.arange(_SHADES) * _SHADE
    left = 1.0 - 0.6 * np.minimum(steps, 1.0)[:, None]
    strength = rng.normal(1.0, 0.05, 2).clip(0.7, 1.3)
    density = (
        steps[:, None, None] * stain.haematoxylin * strength[0]
        + (steps * left)[:, :, None] * stain.eosin * strength[1]
    )
    table = np.zeros((_SHADES, _SHADES, 4), dtype=np.uint8)
    table[..., :3] = np.round(stain.white * 10.0**-density)
    return table.view(np.uint32).ravel()


def _shade(
    haematoxylin: NDArray[np.float64], eosin: NDArray[np.float32], shades: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """(1024, 1024) packed colours of the amounts of the two dyes."""
    most = (_SHADES - 1) * _SHADE
    index = (np.minimum(haematoxylin, most) * (1.0 / _SHADE)).astype(np.int32)
    index *= _SHADES
    index += (eosin * np.float32(1.0 / _SHADE)).astype(np.int32)
    return shades[index]
