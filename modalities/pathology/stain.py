"""Stain normalisation: one slide's colours brought to those of a reference.

Fitted once per slide, on a sample of its tissue, so that tiles of a slide stay comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np

from modalities.cohort import DataError
from modalities.pathology.quality import is_ink

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Pixels = NDArray[np.uint8]
    Reference = tuple[tuple[float, ...], ...]

Method = Literal["macenko", "reinhard"]

# Per dye, haematoxylin first, its optical density in red, green and blue (a unit vector) and the
# 99th percentile of its amount: Macenko's, as most stain tools have them. Means, then standard
# deviations, of Reinhard's three channels: measured on a public H&E slide.
REFERENCES: Final[dict[str, Reference]] = {
    "macenko": ((0.5626, 0.7201, 0.4062, 1.9705), (0.2159, 0.8012, 0.5581, 1.0308)),
    "reinhard": ((-1.742, -0.201, 0.064), (0.883, 0.212, 0.051)),
}

_GLASS = 240.0
_LEAST_DENSITY = 0.15
_FEWEST_PIXELS = 500
_PERCENTILES = (1.0, 99.0)
_SAMPLED_STEP_PX = 4

# Cone responses and opponent channels (Ruderman, Cronin and Chiao, 1998; Reinhard et al., 2001).
_LMS = np.array(
    [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], dtype=np.float64
)
_OPPONENT = np.diag(1 / np.sqrt([3.0, 6.0, 2.0])) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])


class Normaliser(Protocol):
    """Turns the colours of one slide's tiles into the reference's."""

    @property
    def fitted(self) -> Reference:
        """What was measured on the slide, in the form of a reference."""

    def __call__(self, tiles: Pixels) -> Pixels:
        """Normalise tiles (n, tile_px, tile_px, 3)."""


def measure(tiles: Pixels, method: Method) -> Reference:
    """Measure the stain of tissue tiles (n, h, w, 3); a reference is what a slide gave here.

    Pen is left out: a little of it would pass for a dye.

    References
    ----------
    Macenko and others, A method for normalizing histology slides for quantitative analysis, 2009.
    Reinhard and others, Color transfer between images, 2001.

    Raises
    ------
    DataError
        ``stain``, where there is too little stained tissue.
    """
    pixels = tiles[:, ::_SAMPLED_STEP_PX, ::_SAMPLED_STEP_PX].reshape(-1, 3)
    density = _density(pixels)
    stained = (density > _LEAST_DENSITY).all(axis=1) & ~is_ink(pixels.astype(np.int16))
    if np.count_nonzero(stained) < _FEWEST_PIXELS:
        raise _too_little()
    if method == "macenko":
        return _measure_dyes(density[stained])
    return _measure_opponents(pixels[stained])


def normaliser(tiles: Pixels, method: Method, reference: Reference | None) -> Normaliser:
    """Fit the normalisation of one slide.

    Parameters
    ----------
    tiles
        (n, h, w, 3) a sample of the slide's tissue.
    reference
        As ``measure`` gives it; None takes the method's own.

    Raises
    ------
    DataError
        ``stain``, where there is too little stained tissue.
    """
    fitted = measure(tiles, method)
    target = REFERENCES[method] if reference is None else reference
    if method == "macenko":
        return _dyes(fitted, target)
    return _moved_opponents(fitted, target)


@dataclass(frozen=True)
class _Dyes:
    """A linear map of optical densities: amounts of two dyes, in the reference's colours.

    Parameters
    ----------
    tables
        (3, 3, 256) what a grey value of each channel in, in the second place, contributes to each
        channel out, as a factor: sums of densities are products of light.
    """

    fitted: Reference
    tables: NDArray[np.float32]

    def __call__(self, tiles: Pixels) -> Pixels:
        """Normalise tiles (n, tile_px, tile_px, 3)."""
        normal = np.empty_like(tiles)
        for tile, out in zip(tiles, normal, strict=True):
            for i, (red, green, blue) in enumerate(self.tables):
                light = red[tile[..., 0]] * green[tile[..., 1]] * blue[tile[..., 2]]
                out[..., i] = _bytes(light)
        return normal


@dataclass(frozen=True)
class _Opponents:
    """Means and spreads of opponent channels, moved to the reference's.

    Parameters
    ----------
    map, offset
        (3, 3) and (3,) from logarithms of cone responses to those of the reference.
    """

    fitted: Reference
    map: Floats
    offset: NDArray[np.float32]

    def __call__(self, tiles: Pixels) -> Pixels:
        """Normalise tiles (n, tile_px, tile_px, 3)."""
        normal = np.empty_like(tiles)
        for tile, out in zip(tiles, normal, strict=True):
            moved = _mixed(self.map, _log_cones(tile)) + self.offset[:, None, None]
            out[:] = np.moveaxis(_bytes(255 * _mixed(np.linalg.inv(_LMS), np.exp(moved))), 0, -1)
        return normal


def _density(pixels: Pixels) -> Floats:
    return _DENSITY[pixels].astype(np.float64)


_DENSITY: Final[NDArray[np.float32]] = -np.log((np.arange(256) + 1) / _GLASS).astype(np.float32)


def _measure_dyes(density: Floats) -> Reference:
    _, axes = np.linalg.eigh(np.cov(density, rowvar=False))
    plane = axes[:, [2, 1]]
    plane *= np.where(plane[0] < 0, -1.0, 1.0)
    projected = density @ plane
    angles = np.percentile(np.arctan2(projected[:, 1], projected[:, 0]), _PERCENTILES)
    dyes = np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T
    dyes = dyes[np.argsort(-dyes[:, 0])]  # haematoxylin absorbs more red
    if not np.isfinite(dyes).all() or abs(np.linalg.det(dyes @ dyes.T)) < 1e-6:
        raise _too_little()
    amounts = np.percentile(density @ np.linalg.pinv(dyes), _PERCENTILES[1], axis=0)
    if (amounts <= 0).any():
        raise _too_little()
    return tuple((*map(float, dye), float(n)) for dye, n in zip(dyes, amounts, strict=True))


def _dyes(fitted: Reference, target: Reference) -> _Dyes:
    own, wanted = np.array(fitted), np.array(target)
    scaled = wanted[:, :3] * (wanted[:, 3:] / own[:, 3:])
    density_map = scaled.T @ np.linalg.pinv(own[:, :3].T)
    tables = np.exp(-density_map[..., None] * _DENSITY).astype(np.float32)
    tables[:, 0] *= _GLASS
    return _Dyes(fitted, tables)


def _measure_opponents(pixels: Pixels) -> Reference:
    channels = _mixed(_OPPONENT, _log_cones(pixels)).astype(np.float64)
    spread = channels.std(axis=1)
    if (spread < 1e-6).any():
        raise _too_little()
    return tuple(map(float, channels.mean(axis=1))), tuple(map(float, spread))


def _moved_opponents(fitted: Reference, target: Reference) -> _Opponents:
    (mean, spread), (to_mean, to_spread) = np.array(fitted), np.array(target)
    back = np.linalg.inv(_OPPONENT)
    scale = to_spread / spread
    return _Opponents(
        fitted,
        back @ np.diag(scale) @ _OPPONENT,
        (back @ (to_mean - scale * mean)).astype(np.float32),
    )


def _log_cones(pixels: Pixels) -> NDArray[np.float32]:
    """(3, ...) logarithms of the cone responses to pixels (..., 3)."""
    light = np.moveaxis(np.maximum(pixels, 1), -1, 0).astype(np.float32)
    return np.log(_mixed(_LMS / 255, light))


def _mixed(matrix: NDArray[np.floating], channels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Matrix times channels (3, ...); by hand, since a product so thin wakes every thread."""
    rows = matrix.astype(np.float32)
    return np.stack([r * channels[0] + g * channels[1] + b * channels[2] for r, g, b in rows])


def _bytes(values: NDArray[np.float32]) -> Pixels:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _too_little() -> DataError:
    return DataError(
        "stain",
        "slide: found too little stained tissue to fit its colours, needed two dyes; "
        "check the slide or set stain to none",
    )
