"""Tissue against glass, on an overview."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import contourpy
import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.filters import threshold_otsu

from modalities.pathology.quality import is_ink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from modalities.pathology.overview import Overview

    Mask = NDArray[np.bool_]
    Method = Callable[[NDArray[np.uint8], float], Mask]

OVERVIEW_MPP = 8.0
# Small pieces still get a usable outline, huge ones an overview that fits in memory.
_OVERVIEW_SIDE_PX = (256, 4096)

# Otsu splits whatever it gets: bounds keep it from halving a slide full of tissue, and from
# finding tissue in the noise of bare glass.
_SATURATION_BOUNDS = (0.06, 0.15)
# Saturation of nearly black pixels (pen, edges of the scan) is noise.
_DARKEST = 30
_SMALLEST_SIDE_UM = 50.0
_BAND_ROWS = 256
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
_OUTLINE_PX = 1 << 20
# Halfway between the pixels of tissue and glass, a hair towards glass: pieces that touch at a
# corner are one.
_OUTLINE_AT = 0.49
_OUTLINE_COLOUR = (20, 160, 60)
_FEATURE = (
    '{"type":"Feature","geometry":{"type":"Polygon","coordinates":[RINGS]},'
    '"properties":{"objectType":"annotation","classification":{"name":"Tissue"}}}'
)

# Compared and exchanged in turn, these of nine values leave their median in the middle (Paeth,
# Graphics Gems, 1990).
_MEDIAN_STEPS = (
    *((1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3)),
    *((5, 8), (4, 7), (3, 6), (1, 4), (2, 5), (4, 7), (4, 2), (6, 4), (4, 2)),
)


def overview_downsample(size_px: tuple[int, int], mpp: float) -> float:
    """Downsample of the overview for a slide of ``size_px`` (width, height) at ``mpp``."""
    longest = max(size_px)
    fewest, most = _OVERVIEW_SIDE_PX
    return max(1.0, longest / most, min(OVERVIEW_MPP / mpp, longest / fewest))


def find_tissue(overview: Overview, mpp: float, *, method: str) -> Mask:
    """Where an overview shows tissue, by the method of that name.

    What could not be read counts as tissue, so that its tiles are named as damaged and not passed
    over.

    Parameters
    ----------
    mpp
        Micrometres per pixel of the slide at level 0.
    method
        One of ``METHODS``.

    Returns
    -------
    mask
        (h, w), all False on bare glass.
    """
    return METHODS[method](overview.rgb, mpp * overview.downsample) | overview.unread


def otsu_mask(rgb: NDArray[np.uint8], mpp: float) -> Mask:
    """Tissue by Otsu's threshold on smoothed saturation.

    Pen has no say in the threshold: it is so much more saturated that pale tissue beside it would
    count as glass. What is under it counts as tissue all the same, and its tiles say so.

    Parameters
    ----------
    rgb
        (h, w, 3) overview.
    mpp
        Its scale, in micrometres per pixel; specks below 50 micrometres square are dropped.

    Returns
    -------
    mask
        (h, w), all False on bare glass.
    """
    saturation = _smoothed_saturation(rgb)
    counts = _counts_without_ink(saturation, rgb)
    low, high = _SATURATION_BOUNDS
    is_flat = np.count_nonzero(counts) < 2
    threshold = low if is_flat else threshold_otsu(hist=(counts, np.arange(256))) / 255
    mask = saturation > np.clip(threshold, low, high) * 255
    return _without_specks(mask, (_SMALLEST_SIDE_UM / mpp) ** 2)


def whole_mask(rgb: NDArray[np.uint8], mpp: float) -> Mask:
    """Everything is tissue: every tile of the grid is kept."""
    return np.ones(rgb.shape[:2], dtype=bool)


METHODS: Final[dict[str, Method]] = {"otsu": otsu_mask, "none": whole_mask}
"""Ways to find tissue, by the name that a spec gives: (overview, its mpp) to a mask."""


def outline_text(mask: Mask, downsample: float, *, shown_from: tuple[int, int] = (0, 0)) -> str:
    """GeoJSON feature collection of tissue polygons, holes included, in level-0 pixels.

    QuPath opens it as annotations. The outline of a very large mask is drawn on a coarser one, each
    of whose pixels is tissue where any of four is.

    Parameters
    ----------
    shown_from
        Corner (x, y) at level 0 from which a viewer counts.
    """
    found = _polygons(mask, downsample)
    rings = ([json.dumps((r - shown_from).round(1).tolist()) for r in x] for x in found)
    features = (_FEATURE.replace("RINGS", ",".join(x)) for x in rings)
    return f'{{"type":"FeatureCollection","features":[{",".join(features)}]}}'


def outlined(overview: Overview, mask: Mask) -> Image.Image:
    """Overview with the outline of tissue drawn over it."""
    picture = Image.fromarray(overview.rgb)
    draw = ImageDraw.Draw(picture)
    width = max(1, max(picture.size) // 500)
    for ring in (ring for rings in _polygons(mask, 1.0) for ring in rings):
        draw.line(ring.ravel().tolist(), fill=_OUTLINE_COLOUR, width=width)
    return picture


def _saturation_table() -> NDArray[np.uint8]:
    """(256, 256) saturation by the brightest channel and the distance to the darkest."""
    brightest, chroma = np.arange(256)[:, None], np.arange(256)[None, :]
    share = np.minimum(chroma / np.maximum(brightest, 1), 1.0)
    return np.where(brightest < _DARKEST, 0, np.rint(255 * share)).astype(np.uint8)


_SATURATION = _saturation_table()


def _smoothed_saturation(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Saturation, its median over 3 by 3 pixels; in bands, for their intermediates are many."""
    smoothed = np.empty(rgb.shape[:2], dtype=np.uint8)
    for top in range(0, len(rgb), _BAND_ROWS):
        first, last = max(top - 1, 0), min(top + _BAND_ROWS + 1, len(rgb))
        band = _median(_saturation(rgb[first:last]))
        smoothed[top : top + _BAND_ROWS] = band[top - first : top - first + _BAND_ROWS]
    return smoothed


def _counts(values: NDArray[np.integer], n_kinds: int) -> NDArray[np.int64]:
    """(n_kinds,) how often each small number occurs; in bands, since they are widened to count."""
    counts = np.zeros(n_kinds, dtype=np.int64)
    for top in range(0, len(values), _BAND_ROWS):
        counts += np.bincount(values[top : top + _BAND_ROWS].ravel(), minlength=n_kinds)
    return counts


def _counts_without_ink(saturation: NDArray[np.uint8], rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(256,) how often each saturation occurs where there is no pen."""
    counts = np.zeros(256, dtype=np.int64)
    for top in range(0, len(rgb), _BAND_ROWS):
        band = slice(top, top + _BAND_ROWS)
        clear = ~is_ink(rgb[band].astype(np.int16))
        counts += np.bincount(saturation[band][clear], minlength=256)
    return counts


def _saturation(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    red, green, blue = (rgb[..., i] for i in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    darkest = np.minimum(np.minimum(red, green), blue)
    found: NDArray[np.uint8] = _SATURATION[brightest, brightest - darkest]
    return found


def _median(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Median over 3 by 3 pixels."""
    padded = np.pad(values, 1, mode="edge")
    height, width = values.shape
    nine = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
    for i, j in _MEDIAN_STEPS:
        nine[i], nine[j] = np.minimum(nine[i], nine[j]), np.maximum(nine[i], nine[j])
    return nine[4]


def _without_specks(mask: Mask, smallest_px: float) -> Mask:
    try:
        pieces, n_pieces = ndimage.label(mask, _EIGHT_NEIGHBOURS, output=np.uint16)
    except RuntimeError:  # more pieces than that can count
        pieces, n_pieces = ndimage.label(mask, _EIGHT_NEIGHBOURS)
    large = _counts(pieces, n_pieces + 1) >= smallest_px
    large[0] = False
    kept: Mask = large[pieces]
    return kept


def _polygons(mask: Mask, downsample: float) -> Iterator[list[NDArray[np.float64]]]:
    """Yield the rings (n, 2) of each piece, x then y, at level 0: outer, then holes."""
    while mask.size > _OUTLINE_PX:
        mask, downsample = _coarser(mask), 2 * downsample
    # A ring of background closes every outline.
    generator = contourpy.contour_generator(
        z=np.pad(mask, 1).astype(np.float64), fill_type=contourpy.FillType.OuterOffset
    )
    points, offsets = generator.filled(_OUTLINE_AT, np.inf)[:2]
    for piece, ends in zip(points, offsets, strict=True):
        # Pixel (0, 0) of the padded mask has its centre half a pixel before the mask's corner.
        rings = (piece - 0.5) * downsample
        yield [rings[a:b] for a, b in pairwise(ends)]


def _coarser(mask: Mask) -> Mask:
    """Mask of half the size, true where any of four pixels is."""
    rows, columns = (side + side % 2 for side in mask.shape)
    even = np.zeros((rows, columns), dtype=bool)
    even[: mask.shape[0], : mask.shape[1]] = mask
    halved = even[::2] | even[1::2]
    return np.asarray(halved[:, ::2] | halved[:, 1::2])
