"""Tiles of a tiled JPEG TIFF, each stored tile decoded once.

OpenSlide draws every region anew, so that a stored tile is decoded for each tile that it touches,
and drawn through a canvas with an alpha channel. Here stored tiles are decoded by the same library
(libjpeg-turbo) and kept until no further tile needs them. The pixels are the same, which is tried
on every slide before this way is taken.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import numpy as np
import simplejpeg

from modalities.pathology.cutting import Tiles, cut, resampled
from modalities.pathology.reader import Undecodable, open_bytes, read_bytes
from modalities.pathology.tiff_index import of_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modalities.pathology.cutting import Cut
    from modalities.pathology.reader import Slide
    from modalities.pathology.tiff_index import StoredTiles
    from modalities.pathology.workers import Workers

    Pixels = NDArray[np.uint8]
    Box = tuple[int, int, int, int]

_CHUNK_TILES = 32
_AT_ONCE = 4
_MOST_BYTES = 1 << 28
_HEAVIEST = 4
_MOST_SAMPLED_PX = 1024
# OpenSlide blends neighbours where a pixel of a level starts between two of level 0; its weights
# have seven bits.
_BLEND_ERROR = 4
_MARGIN_PX = 2

# Not a stored tile: damaged, or never scanned.
_DAMAGED: Final = None


class StoredReader:
    """Decoded stored tiles of one level, and regions put together from them.

    Parameters
    ----------
    slide
        Asked for regions that touch the edge of the level or tiles that were never scanned, since
        formats differ in what stands there.
    """

    def __init__(self, slide: Slide, level: int, stored: StoredTiles, workers: Workers) -> None:
        self._slide = slide
        self._level = level
        self._stored = stored
        self._workers = workers
        self._all_scanned = bool(stored.counts.all())
        self._file = open_bytes(slide.path)
        self._kept: dict[int, Pixels | None] = {}
        # Buffers that are done with are decoded into again: new ones from many threads would leave
        # the memory in pieces.
        self._spare: list[Pixels] = []
        self._last_use: NDArray[np.int64] | None = None
        self._n_read = 0

    def expect(self, corners: NDArray[np.int64], side_px: int) -> None:
        """Note which of the coming tiles is the last that needs each stored tile."""
        columns, rows = self._stored.grid
        last_use = np.full(columns * rows, -1, dtype=np.int64)
        width, height = self._stored.tile_px
        first = corners // (width, height)
        last = (corners + side_px - 1) // (width, height)
        order = np.arange(len(corners))
        for down in range(int((last - first)[:, 1].max(initial=0)) + 1):
            for right in range(int((last - first)[:, 0].max(initial=0)) + 1):
                column, row = np.minimum(first + np.array([right, down]), last).T
                inside = (column < columns) & (row < rows)
                np.maximum.at(last_use, (row * columns + column)[inside], order[inside])
        self._last_use, self._n_read = last_use, 0

    def prepare(self, corners: NDArray[np.int64], size_px: tuple[int, int]) -> None:
        """Decode what the next regions need, from their corners (n, 2) and (width, height)."""
        wanted = {i for x, y in corners.tolist() for i in self._touched((x, y, *size_px))}
        missing = sorted(wanted - self._kept.keys())
        self._kept.update(zip(missing, self._workers.map(self._decoded, missing), strict=True))

    def fill(self, field: Pixels, xy: tuple[int, int]) -> bool:
        """Fill a prepared region (h, w, 3) from its corner on; False, and zeros, if damaged."""
        box = (*xy, field.shape[1], field.shape[0])
        touched = self._touched(box)
        if not touched:
            return self._fill_through_openslide(field, box)
        across, down = self._stored.tile_px
        columns, _ = self._stored.grid
        for i in touched:
            pixels = self._kept[i]
            if pixels is None:
                field[:] = 0
                return False
            left, top = i % columns * across - xy[0], i // columns * down - xy[1]
            into = field[max(top, 0) : top + down, max(left, 0) : left + across]
            rows, cells = into.shape[:2]
            into[:] = pixels[max(-top, 0) :, max(-left, 0) :][:rows, :cells]
        return True

    def forget(self, n_regions: int) -> None:
        """Take regions as read, and let go of what no further one needs."""
        self._n_read += n_regions
        last_use = self._last_use
        past = [i for i in self._kept if last_use is None or last_use[i] < self._n_read]
        width, height = self._stored.tile_px
        # The oldest go where a row of a very wide slide is too much; they are decoded again.
        past += list(self._kept)[: -max(1, _MOST_BYTES // (width * height * 3))]
        for i in past:
            pixels = self._kept.pop(i, None)
            if pixels is not None:
                self._spare.append(pixels)

    def close(self) -> None:
        """Close the file."""
        self._kept.clear()
        os.close(self._file)

    def _touched(self, box: Box) -> list[int]:
        """List the stored tiles that a box touches; none where it needs OpenSlide."""
        x, y, w, h = box
        width, height = self._stored.size_px
        if x < 0 or y < 0 or x + w > width or y + h > height:
            return []
        touched = self._stored.below(box)
        whole = self._all_scanned or all(self._stored.counts[i] > 0 for i in touched)
        return touched if whole else []

    def _decoded(self, i: int) -> Pixels | None:
        stream = read_bytes(self._file, int(self._stored.counts[i]), int(self._stored.offsets[i]))
        width, height = self._stored.tile_px
        try:
            buffer = self._spare.pop()
        except IndexError:
            buffer = np.empty((height, width, 3), dtype=np.uint8)
        try:
            # Its own start marker goes; the tables come first. Anything odd in a stream is an
            # error: OpenSlide overlooks a flipped byte.
            pixels = simplejpeg.decode_jpeg(
                self._stored.header + stream[2:], buffer=buffer, strict=True
            )
        except ValueError:  # a larger picture than the buffer, as well
            return _DAMAGED
        return buffer if pixels.shape == buffer.shape else _DAMAGED

    def _fill_through_openslide(self, field: Pixels, box: Box) -> bool:
        try:
            field[:] = np.asarray(self._slide.region(self._level, box[:2], box[2:]))
        except Undecodable:
            field[:] = 0
            return False
        return True


class JpegTiffReader:
    """Reads tiles from stored JPEG tiles; see ``TileReader``.

    Parameters
    ----------
    stored
        Of the one level that tiles are cut from.
    """

    name = "jpeg_tiff"

    def __init__(self, slide: Slide, stored: StoredReader, workers: Workers) -> None:
        self.info = slide.info
        self._stored = stored
        self._workers = workers

    def expect(self, xy: NDArray[np.int64], *, tile_px: int, mpp: float) -> None:
        """Note until when each stored tile is needed; see ``TileReader``."""
        how = cut(self.info, tile_px=tile_px, mpp=mpp)
        self._stored.expect(how.corners(xy), how.side_px)

    def read_tiles(self, xy: NDArray[np.int64], *, tile_px: int, mpp: float) -> Tiles:
        """Read tiles; see ``TileReader``."""
        how = cut(self.info, tile_px=tile_px, mpp=mpp)
        pixels = np.empty((len(xy), tile_px, tile_px, 3), dtype=np.uint8)
        decoded = np.empty(len(xy), dtype=bool)
        chunk = how.at_once(_CHUNK_TILES)
        for at in range(0, len(xy), chunk):
            part = slice(at, at + chunk)
            self._read(how.corners(xy[part]), how, Tiles(pixels[part], decoded[part]))
        return Tiles(pixels, decoded)

    def close(self) -> None:
        """Close the file."""
        self._stored.close()

    def _read(self, corners: NDArray[np.int64], how: Cut, into: Tiles) -> None:
        side, few = how.side_px, how.at_once(_AT_ONCE)

        def some(at: int) -> None:
            part = slice(at, at + few)
            pixels, decoded = into.pixels[part], into.decoded[part]
            same = side == how.tile_px
            fields = pixels if same else np.empty((len(pixels), side, side, 3), dtype=np.uint8)
            for i, (x, y) in enumerate(corners[part].tolist()):
                decoded[i] = self._stored.fill(fields[i], (x, y))
            if not same:
                pixels[:] = resampled(fields, how.tile_px)

        self._stored.prepare(corners, (side, side))
        self._workers.map(some, range(0, len(corners), few))
        self._stored.forget(len(corners))


def proves_itself(slide: Slide, level: int, reader: StoredReader, stored: StoredTiles) -> bool:
    """Whether stored tiles, decoded here, show what OpenSlide shows of the same level.

    Tried on the four corners, which are cut off at the edges, the middle, a crossing of four
    tiles, and the tiles with most bytes, which hold tissue. One that only this decoder refuses may
    be damage that OpenSlide overlooks; two are a peculiarity of the slide.
    """
    same = refused = 0
    for x, y, w, h in sample_boxes(stored):
        field = np.empty((h, w, 3), dtype=np.uint8)
        reader.prepare(np.array([[x, y]]), (w, h))
        decoded = reader.fill(field, (x, y))
        reader.forget(1)
        try:
            shown = np.asarray(slide.region(level, (x, y), (w, h)), dtype=np.uint8)
        except Undecodable:
            if decoded:
                return False
            continue
        if not decoded:
            refused += 1
        elif _same(field, shown, _shift(slide, level, (x, y))):
            same += 1
        else:
            return False
    return same > 0 and refused < 2


def stored_tiles(slide: Slide, level: int) -> StoredTiles | None:
    """Tiles of a level, known by its size; None where no tiled JPEG has it, or several have."""
    levels = () if slide.index is None else slide.index.jpeg_levels
    return of_size(levels, slide.info.levels[level].size_px)


def sample_boxes(stored: StoredTiles) -> list[Box]:
    """Boxes (x, y, width, height) that tell whether tiles are decoded as they should be."""
    columns, rows = stored.grid
    middle = (columns // 2, rows // 2)
    heaviest = np.argsort(stored.counts, kind="stable")[-_HEAVIEST:].tolist()
    tiles = {
        *((column, row) for column in (0, columns - 1) for row in (0, rows - 1)),
        middle,
        *((i % columns, i // columns) for i in heaviest),
    }
    width, height = stored.tile_px
    w, h = min(width, _MOST_SAMPLED_PX), min(height, _MOST_SAMPLED_PX)
    boxes = [(column * width, row * height, w, h) for column, row in sorted(tiles)]
    boxes.append((middle[0] * width - w // 2, middle[1] * height - h // 2, w, h))
    return [_inside(box, stored.size_px) for box in boxes]


def _inside(box: Box, size_px: tuple[int, int]) -> Box:
    x, y = max(box[0], 0), max(box[1], 0)
    return x, y, min(box[0] + box[2], size_px[0]) - x, min(box[1] + box[3], size_px[1]) - y


def _shift(slide: Slide, level: int, xy: tuple[int, int]) -> tuple[float, float]:
    """How far right and down of a pixel of the level OpenSlide starts, which counts in level 0."""
    downsample = slide.info.levels[level].downsample
    x, y = (round(v * downsample) / downsample - v for v in xy)
    return x, y


def _same(pixels: Pixels, shown: Pixels, shift: tuple[float, float]) -> bool:
    if shift == (0.0, 0.0):
        return bool(np.array_equal(pixels, shown))
    blended = pixels.astype(np.float64)
    for axis, by in ((1, shift[0]), (0, shift[1])):
        towards = np.roll(blended, -1 if by > 0 else 1, axis=axis)
        blended += abs(by) * (towards - blended)
    inner = (slice(_MARGIN_PX, -_MARGIN_PX),) * 2
    return bool(np.abs(blended[inner] - shown[inner]).max(initial=0.0) <= _BLEND_ERROR)
