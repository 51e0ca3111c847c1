"""Tissue against glass, on a thumbnail."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter
from skimage.filters import threshold_otsu
from skimage.measure import find_contours, label, regionprops

if TYPE_CHECKING:
    from numpy.typing import NDArray

THUMBNAIL_MPP = 8.0
# Small pieces still get a usable outline, huge ones a thumbnail that fits in memory.
_THUMBNAIL_SIDE_PX = (256, 4096)

# Otsu splits whatever it gets: bounds keep it from halving a slide full of tissue, and from
# finding tissue in the noise of bare glass.
_SATURATION_BOUNDS = (0.06, 0.15)
# Saturation of nearly black pixels (pen, edges of the scan) is noise.
_DARKEST = 30
_SMALLEST_SIDE_UM = 50.0


def thumbnail_downsample(size_px: tuple[int, int], mpp: float) -> float:
    """Downsample of the thumbnail for a slide of ``size_px`` (width, height) at ``mpp``."""
    longest = max(size_px)
    fewest, most = _THUMBNAIL_SIDE_PX
    return max(1.0, longest / most, min(THUMBNAIL_MPP / mpp, longest / fewest))


def tissue_mask(rgb: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Where a thumbnail shows tissue, by Otsu's threshold on its smoothed saturation.

    Parameters
    ----------
    rgb
        (h, w, 3) thumbnail.
    mpp
        Its scale, in micrometres per pixel; specks below 50 micrometres square are dropped.

    Returns
    -------
    numpy.ndarray
        (h, w) mask, all False on bare glass.
    """
    saturation = _saturation(rgb)
    low, high = _SATURATION_BOUNDS
    threshold = low if np.ptp(saturation) == 0 else threshold_otsu(saturation) / 255
    mask = saturation > np.clip(threshold, low, high) * 255
    return _without_specks(mask, (_SMALLEST_SIDE_UM / mpp) ** 2)


def tissue_outline(mask: NDArray[np.bool_], downsample: float) -> dict[str, Any]:
    """GeoJSON feature collection of tissue polygons, holes included, in level-0 pixels.

    QuPath opens it as annotations.
    """
    pieces = regionprops(label(mask, connectivity=2))
    return {
        "type": "FeatureCollection",
        "features": [_feature(piece.image, piece.bbox[:2], downsample) for piece in pieces],
    }


def _saturation(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    brightest = rgb.max(axis=2).astype(np.float32)
    chroma = brightest - rgb.min(axis=2)
    share = np.where(brightest < _DARKEST, 0, chroma / np.maximum(brightest, 1))
    image = Image.fromarray((share * 255).round().astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.MedianFilter(3)), dtype=np.uint8)


def _without_specks(mask: NDArray[np.bool_], smallest_px: float) -> NDArray[np.bool_]:
    pieces = label(mask, connectivity=2)
    large = np.bincount(pieces.ravel()) >= smallest_px
    large[0] = False
    kept: NDArray[np.bool_] = large[pieces]
    return kept


def _feature(
    piece: NDArray[np.bool_], corner: tuple[int, int], downsample: float
) -> dict[str, Any]:
    # One ring of background closes every contour; the longest way round is the outer ring.
    contours = find_contours(np.pad(piece, 1).astype(np.float32), 0.5, fully_connected="high")
    contours.sort(key=_area, reverse=True)
    # Pixel (0, 0) of the padded piece has its centre half a pixel before the piece's corner.
    rings = [(ring - 0.5 + corner)[:, ::-1] * downsample for ring in contours]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [r.round(1).tolist() for r in rings]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tissue"}},
    }


def _area(ring: NDArray[np.float64]) -> float:
    y, x = ring.T
    return float(abs(np.dot(x[:-1], y[1:]) - np.dot(x[1:], y[:-1])) / 2)
