"""The grid of tiles over the tissue of a slide, and their pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from modalities.pathology.reader import Slide
    from modalities.pathology.spec import PathologySpec

# A coarser slide would have its tiles blown up: the encoder would see blur and nobody would know.
_COARSEST = 1.5
_STRIP_PX = 8192


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
    scale = spec.tile_mpp / mpp
    stride_px = spec.tile_px if spec.stride_px is None else spec.stride_px
    return Geometry(max(1, round(spec.tile_px * scale)), max(1, round(stride_px * scale)))


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
    table = np.pad(mask.cumsum(0, dtype=np.int64).cumsum(1), ((1, 0), (1, 0)))
    tissue = (
        table[np.ix_(bottom, right)]
        - table[np.ix_(top, right)]
        - table[np.ix_(bottom, left)]
        + table[np.ix_(top, left)]
    )
    fraction = tissue / np.outer(bottom - top, right - left)
    rows, columns = np.nonzero((fraction >= min_tissue_fraction) & (tissue > 0))
    return np.stack([xs[columns], ys[rows]], axis=1)


def spread(coords: NDArray[np.int64], max_tiles: int | None) -> NDArray[np.int64]:
    """At most ``max_tiles`` of ``coords``, evenly spaced along the grid's rows."""
    n_tiles = len(coords)
    if max_tiles is None or n_tiles <= max_tiles:
        return coords
    return coords[np.arange(max_tiles) * n_tiles // max_tiles]


def read_tiles(
    slide: Slide, coords: NDArray[np.int64], field_px: int, *, tile_px: int, batch_tiles: int
) -> Iterator[NDArray[np.uint8]]:
    """Pixels of the tiles at ``coords``, in batches (<= batch_tiles, tile_px, tile_px, 3).

    Neighbours in a row are read in one go; each is then brought from ``field_px`` level-0
    pixels to ``tile_px``.
    """
    level, downsample = slide.level_for(field_px / tile_px)
    side = field_px / downsample
    if abs(side - tile_px) < 0.5:
        side = float(tile_px)  # less than half a pixel in a tile is not worth a resampling
    batch: list[NDArray[np.uint8]] = []
    for strip in _strips(coords, 2 * field_px, _STRIP_PX * downsample):
        for tile in _cut(slide, strip, level, downsample, side=side, tile_px=tile_px):
            batch.append(tile)
            if len(batch) == batch_tiles:
                yield np.stack(batch)
                batch = []
    if batch:
        yield np.stack(batch)


def _starts(length_px: int, geometry: Geometry) -> NDArray[np.int64]:
    return np.arange(0, length_px - geometry.field_px + 1, geometry.stride_px, dtype=np.int64)


def _mask_span(
    starts: NDArray[np.int64], field_px: int, downsample: float, length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    first = np.minimum(np.rint(starts / downsample).astype(np.int64), length - 1)
    last = np.rint((starts + field_px) / downsample).astype(np.int64)
    return first, np.clip(last, first + 1, length)


def _strips(
    coords: NDArray[np.int64], gap_px: float, width_px: float
) -> Iterator[NDArray[np.int64]]:
    """Yield runs of tiles of one row, without wide gaps and not too wide as a whole."""
    begin = 0
    for i in range(1, len(coords)):
        step_x, step_y = coords[i] - coords[i - 1]
        if step_y != 0 or step_x > gap_px or coords[i, 0] - coords[begin, 0] > width_px:
            yield coords[begin:i]
            begin = i
    yield coords[begin:]


def _cut(
    slide: Slide,
    strip: NDArray[np.int64],
    level: int,
    downsample: float,
    *,
    side: float,
    tile_px: int,
) -> Iterator[NDArray[np.uint8]]:
    x, y = (int(v) for v in strip[0])
    offsets = (strip[:, 0] - x) / downsample
    if side == tile_px:
        offsets = np.rint(offsets)
    width, height = math.ceil(offsets[-1] + side), math.ceil(side)
    region = slide.read((x, y), level, (width, height))
    for left in offsets:
        if side == tile_px:
            tile = region.crop((int(left), 0, int(left) + tile_px, tile_px))
        else:
            box = (left, 0, left + side, side)
            tile = region.resize((tile_px, tile_px), Image.Resampling.LANCZOS, box=box)
        yield np.asarray(tile, dtype=np.uint8)
