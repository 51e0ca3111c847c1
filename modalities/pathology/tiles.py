"""The grid of tiles over the tissue of a slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modalities.cohort import DataError
from modalities.pathology.cutting import side_at_level_0

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modalities.pathology.spec import PathologySpec

# A coarser slide would have its tiles blown up: the encoder would see blur and nobody would know.
_COARSEST = 1.5


@dataclass(frozen=True)
class Geometry:
    """Tiles of one slide in its own level-0 pixels.

    Parameters
    ----------
    field_px
        Side of a tile at level 0.
    stride_px
        Step of the grid at level 0.
    """

    field_px: int
    stride_px: int


def tile_geometry(spec: PathologySpec, mpp: float) -> Geometry:
    """Size and step of the tiles that ``spec`` asks of a slide at ``mpp``.

    Whole level-0 pixels, so that a side is off by half a level-0 pixel at most and neighbours
    never overlap.

    Raises
    ------
    DataError
        ``too_coarse`` if the slide has less than two thirds of the resolution asked for.
    """
    if mpp > _COARSEST * spec.tile_mpp:
        raise DataError(
            "too_coarse",
            f"slide: found {mpp:.3g} micrometres per pixel, needed at most "
            f"{_COARSEST * spec.tile_mpp:.3g}; scan it at a higher power or raise tile_mpp",
        )
    stride_px = spec.tile_px if spec.stride_px is None else spec.stride_px
    sides = (side_at_level_0(px, spec.tile_mpp, mpp) for px in (spec.tile_px, stride_px))
    return Geometry(*sides)


def tile_coords(
    size_px: tuple[int, int],
    geometry: Geometry,
    mask: NDArray[np.bool_],
    downsample: float,
    *,
    min_tissue_fraction: float,
) -> NDArray[np.int64]:
    """Upper left corners of the tiles with enough tissue, row by row.

    Parameters
    ----------
    size_px
        (width, height) of level 0; only tiles wholly inside count.
    mask
        (h, w) tissue mask, each pixel ``downsample`` level-0 pixels wide.

    Returns
    -------
    numpy.ndarray
        (n_tiles, 2) x and y at level 0.
    """
    xs, ys = (_starts(length, geometry) for length in size_px)
    left, right = _mask_span(xs, geometry.field_px, downsample, mask.shape[1])
    top, bottom = _mask_span(ys, geometry.field_px, downsample, mask.shape[0])
    tissue = np.empty((len(ys), len(xs)), dtype=np.int64)
    for row, (first, last) in enumerate(zip(top, bottom, strict=True)):
        # Tissue to the left of every column: two of these give what a tile holds.
        table = np.pad(mask[first:last].sum(axis=0, dtype=np.int64).cumsum(), (1, 0))
        tissue[row] = table[right] - table[left]
    fraction = tissue / np.outer(bottom - top, right - left)
    rows, columns = np.nonzero((fraction >= min_tissue_fraction) & (tissue > 0))
    return np.stack([xs[columns], ys[rows]], axis=1)


def spread(coords: NDArray[np.int64], max_tiles: int | None) -> NDArray[np.int64]:
    """At most ``max_tiles`` of ``coords``, evenly spaced along the grid's rows."""
    n_tiles = len(coords)
    if max_tiles is None or n_tiles <= max_tiles:
        return coords
    return coords[np.arange(max_tiles) * n_tiles // max_tiles]


def _starts(length_px: int, geometry: Geometry) -> NDArray[np.int64]:
    return np.arange(0, length_px - geometry.field_px + 1, geometry.stride_px, dtype=np.int64)


def _mask_span(
    starts: NDArray[np.int64], field_px: int, downsample: float, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first = np.minimum(np.rint(starts / downsample).astype(np.int64), length - 1)
    last = np.rint((starts + field_px) / downsample).astype(np.int64)
    return first, np.clip(last, first + 1, length)
