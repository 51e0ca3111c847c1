"""A slide in coarse, to find the tissue on."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from modalities.pathology.jpeg_tiff import sample_boxes, stored_tiles
from modalities.pathology.reader import Undecodable, open_bytes, read_bytes
from modalities.pathology.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from modalities.pathology.reader import Slide
    from modalities.pathology.tiff_index import StoredTiles

    Pixels = NDArray[np.uint8]
    Missing = NDArray[np.bool_]

_BAND_PX = 1 << 20
# Scales at which a JPEG decodes faster than in full, and from how many tiles or pixels on that
# matters.
_SCALES = (8, 4, 2)
_FEWEST_STORED = 64
_FEWEST_PIXELS = 1 << 22
# A mean over pixels before and after rounding, and before and after clipping, differ a little.
_MEAN_ERROR = 3.0


class Overview(NamedTuple):
    """A slide in coarse.

    Parameters
    ----------
    rgb
        (h, w, 3) pixels.
    downsample
        Level-0 pixels per pixel.
    unread
        (h, w) where the slide is damaged and ``rgb`` says nothing.
    """

    rgb: NDArray[np.uint8]
    downsample: float
    unread: NDArray[np.bool_]


def thumbnail(slide: Slide, downsample: float) -> Overview:
    """Overview at about ``downsample``.

    Read in bands, so that a slide without a pyramid never stands in memory as a whole. A damaged
    piece is read from the next finer level; what is damaged there too stays unread.

    Where the level at hand is much too fine and tiled JPEG, its tiles are decoded in small.
    """
    number, level_downsample = slide.info.level_for(downsample)
    factor = max(1, round(downsample / level_downsample))
    direct = scaled_overview(slide, number, factor)
    if direct is not None:
        return direct
    width, height = slide.info.levels[number].size_px
    rows = factor * max(1, _BAND_PX // (width * factor))
    found = _blank(width, height, factor, level_downsample)
    for top in range(0, height, rows):
        band, missing = _band(slide, number, (0, top), (width, min(rows, height - top)))
        _put(found, top // factor, band.reduce(factor), missing, factor)
    return found


def scaled_overview(slide: Slide, level: int, factor: int) -> Overview | None:
    """Overview of a level at ``factor``, from JPEG tiles decoded in small.

    None where the level is stored otherwise, is small, or where samples decoded so do not show
    what OpenSlide shows.
    """
    stored = stored_tiles(slide, level)
    scales = [x for x in _SCALES if factor % x == 0]
    if stored is None or not scales or not stored.counts.all():
        return None
    scale, is_small = scales[0], len(stored.counts) < _FEWEST_STORED
    if is_small and math.prod(stored.size_px) < _FEWEST_PIXELS:
        return None
    if any(side % scale for side in stored.tile_px):
        return None
    file, workers = open_bytes(slide.path), Workers()
    try:
        small = _SmallTiles(file, stored, scale)
        if not small.show_the_same(slide, level):
            return None
        found = _blank(*stored.size_px, factor, slide.info.levels[level].downsample)
        small.reduce_into(found, factor // scale, workers)
    finally:
        workers.close()
        os.close(file)
    return found


class _SmallTiles:
    """Stored tiles of a level, each decoded at a fraction of its size."""

    def __init__(self, file: int, stored: StoredTiles, scale: int) -> None:
        self._file = file
        self._stored = stored
        self._scale = scale
        self._tile_px = (stored.tile_px[0] // scale, stored.tile_px[1] // scale)

    def show_the_same(self, slide: Slide, level: int) -> bool:
        """Whether samples are the means of what OpenSlide shows."""
        width, height = self._stored.tile_px
        columns, _ = self._stored.grid
        n_same = 0
        for x, y, w, h in sample_boxes(self._stored):
            if x % width or y % height:
                continue
            found = self._tile(y // height * columns + x // width)
            try:
                region = slide.region(level, (x, y), (w, h))
            except Undecodable:
                continue
            if found is None:
                return False
            whole = (slice(0, h // self._scale), slice(0, w // self._scale))
            shown = np.asarray(region.reduce(self._scale), dtype=np.float64)[whole]
            if shown.size and np.abs(found[whole] - shown).mean() > _MEAN_ERROR:
                return False
            n_same += 1
        return n_same > 0

    def reduce_into(self, found: Overview, factor: int, workers: Workers) -> None:
        """Fill an overview with means over ``factor`` small pixels square."""
        columns, rows = self._stored.grid
        _, tile_rows = self._tile_px
        width, height = (n // self._scale for n in self._stored.size_px)
        rim = [int(n % self._scale > 0) for n in self._stored.size_px]
        at_once = factor // math.gcd(tile_rows, factor)  # rows of tiles that end with a cell
        for first in range(0, rows, at_once):
            n_rows = min(at_once, rows - first)
            tiles = workers.map(self._tile, range(first * columns, (first + n_rows) * columns))
            band, missing = self._joined(tiles, columns)
            # Beyond the edge a stored tile is filled up, with what one should not look at.
            kept = (slice(0, height - first * tile_rows), slice(0, width))
            edges = ((0, rim[1] * (first + n_rows == rows)), (0, rim[0]))
            band = np.pad(band[kept], (*edges, (0, 0)), mode="edge")
            missing = np.pad(missing[kept], edges, mode="edge")
            reduced = Image.fromarray(band).reduce(factor)
            _put(found, first * tile_rows // factor, reduced, missing, factor)

    def _joined(self, tiles: list[Pixels | None], columns: int) -> tuple[Pixels, Missing]:
        tile_width, tile_height = self._tile_px
        n_rows = len(tiles) // columns
        band = np.zeros((n_rows, tile_height, columns, tile_width, 3), dtype=np.uint8)
        missing = np.zeros(band.shape[:-1], dtype=bool)
        for i, tile in enumerate(tiles):
            if tile is None:
                missing[i // columns, :, i % columns] = True
            else:
                band[i // columns, :, i % columns] = tile
        size = (n_rows * tile_height, columns * tile_width)
        return band.reshape(*size, 3), missing.reshape(size)

    def _tile(self, i: int) -> Pixels | None:
        stored = self._stored
        stream = read_bytes(self._file, int(stored.counts[i]), int(stored.offsets[i]))
        try:
            tile: Pixels = simplejpeg.decode_jpeg(
                stored.header + stream[2:],
                min_width=self._tile_px[0],
                min_height=self._tile_px[1],
                min_factor=self._scale,
                strict=True,
            )
        except ValueError:
            return None
        return tile if tile.shape == (*self._tile_px[::-1], 3) else None


def _blank(width: int, height: int, factor: int, downsample: float) -> Overview:
    """Overview to be filled, of a level of that size and downsample."""
    size = (-(-height // factor), -(-width // factor))
    rgb = np.zeros((*size, 3), dtype=np.uint8)
    return Overview(rgb, downsample * factor, np.zeros(size, dtype=bool))


def _put(
    found: Overview, top: int, band: Image.Image, missing: Missing | None, factor: int
) -> None:
    rows = slice(top, top + band.height)
    found.rgb[rows] = np.asarray(band)
    if missing is not None:
        found.unread[rows] = _any_in_cells(missing, factor, found.unread[rows].shape)


def _band(
    slide: Slide, level: int, xy: tuple[int, int], size_px: tuple[int, int]
) -> tuple[Image.Image, NDArray[np.bool_] | None]:
    """Band of a level, and which of its pixels (h, w) could not be read; None for none."""
    try:
        return slide.region(level, xy, size_px), None
    except Undecodable:
        pass
    band = Image.new("RGB", size_px)
    missing = np.zeros(size_px[::-1], dtype=bool)
    for left, top, right, bottom in _pieces(slide.stored_px(level), xy, size_px):
        piece = _piece(slide, level, (left, top), (right - left, bottom - top))
        at = (left - xy[0], top - xy[1])
        if piece is None:
            missing[at[1] : bottom - xy[1], at[0] : right - xy[0]] = True
        else:
            band.paste(piece, at)
    return band, missing


def _pieces(
    stored_px: tuple[int, int], xy: tuple[int, int], size_px: tuple[int, int]
) -> Iterator[tuple[int, int, int, int]]:
    """Yield the parts of a region that lie in one stored piece each."""
    across, down = (
        sorted({first, first + n, *range(first - first % step + step, first + n, step)})
        for first, n, step in zip(xy, size_px, stored_px, strict=True)
    )
    for top, bottom in pairwise(down):
        for left, right in pairwise(across):
            yield left, top, right, bottom


def _piece(
    slide: Slide, level: int, xy: tuple[int, int], size_px: tuple[int, int]
) -> Image.Image | None:
    try:
        return slide.region(level, xy, size_px)
    except Undecodable:
        if level == 0:
            return None
    levels = slide.info.levels
    ratio = levels[level].downsample / levels[level - 1].downsample
    corner = (math.floor(xy[0] * ratio), math.floor(xy[1] * ratio))
    finer = (max(1, round(size_px[0] * ratio)), max(1, round(size_px[1] * ratio)))
    piece = _piece(slide, level - 1, corner, finer)
    return None if piece is None else piece.resize(size_px, Image.Resampling.BOX)


def _any_in_cells(missing: Missing, factor: int, shape: tuple[int, ...]) -> Missing:
    """Whether any pixel is missing in each cell of ``factor`` pixels square."""
    padded = np.zeros((shape[0] * factor, shape[1] * factor), dtype=bool)
    padded[: missing.shape[0], : missing.shape[1]] = missing
    cells = padded.reshape(shape[0], factor, shape[1], factor)
    return np.asarray(cells.any(axis=(1, 3)))
