"""What is wrong with a tile: blur, pen ink, bare glass."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modalities.pathology.spec import PathologySpec

    Tiles = NDArray[np.uint8]
    Share = NDArray[np.float32]

# A tile is judged by a part of its pixels, about this many in each direction.
_SAMPLES = 28
# Variance of the Laplacian, in squared grey levels, that counts as half blurred: below all sharp
# tissue seen, above what a defocus of two pixels leaves of it.
_HALF_BLURRED = 100.0
_WHITE = 220
# Neither haematoxylin nor eosin lets more green through than red; blue and green pens do.
_INK_GREEN_OVER_RED = 20
_BLACKEST = 45


class Quality(NamedTuple):
    """Shares between 0 and 1, higher is worse; NaN for a tile that was not decoded.

    Parameters
    ----------
    blur
        (n,) 100 / (100 + variance of the Laplacian): 1 where there is no detail, 0 where it is
        sharp.
    pen
        (n,) pixels of the colour of a blue, green or black pen. Meant for H&E; a red pen looks like
        blood and is not told.
    white
        (n,) pixels as bright as glass.
    """

    blur: Share
    pen: Share
    white: Share


def tile_quality(tiles: Tiles, decoded: NDArray[np.bool_]) -> Quality:
    """Judge tiles (n, tile_px, tile_px, 3), of which only the ``decoded`` show anything."""
    step = max(1, tiles.shape[1] // _SAMPLES)
    sampled = tiles[:, step // 2 :: step, step // 2 :: step].astype(np.int16)
    red, green, blue = (sampled[..., i] for i in range(3))
    darkest = np.minimum(np.minimum(red, green), blue)
    ink = is_ink(sampled)
    variance = _laplacian_variance(tiles, step)
    shares = (
        _HALF_BLURRED / (_HALF_BLURRED + variance),
        ink.mean(axis=(1, 2), dtype=np.float32),
        (darkest >= _WHITE).mean(axis=(1, 2), dtype=np.float32),
    )
    return Quality(*(np.where(decoded, x, np.nan).astype(np.float32) for x in shares))


def is_ink(rgb: NDArray[np.int16]) -> NDArray[np.bool_]:
    """(...) whether pixels (..., 3) are of the colour of a blue, green or black pen."""
    red, green, blue = (rgb[..., i] for i in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    return np.asarray((green - red >= _INK_GREEN_OVER_RED) | (brightest <= _BLACKEST))


def is_good(quality: Quality, decoded: NDArray[np.bool_], spec: PathologySpec) -> NDArray[np.bool_]:
    """(n,) whether a tile was decoded and is within the limits of ``spec``."""
    return (
        decoded
        & (quality.blur <= spec.max_blur)
        & (quality.pen <= spec.max_pen)
        & (quality.white <= spec.max_white)
    )


def _laplacian_variance(tiles: Tiles, step: int) -> NDArray[np.float32]:
    """(n,) of the green channel at full resolution, on every ``step``-th row."""
    last = tiles.shape[1] - 1
    above, here, below = (
        tiles[:, i : last - 1 + i : step, :, 1].astype(np.int16) for i in range(3)
    )
    laplacian = (above + below)[..., 1:-1] + here[..., :-2] + here[..., 2:] - 4 * here[..., 1:-1]
    return laplacian.var(axis=(1, 2), dtype=np.float32)
