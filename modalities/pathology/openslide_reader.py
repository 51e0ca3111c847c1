"""Tiles through OpenSlide, for every format that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from modalities.pathology.cutting import Tiles, cut, resampled
from modalities.pathology.reader import Undecodable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from modalities.pathology.cutting import Cut
    from modalities.pathology.lost_parts import LostParts
    from modalities.pathology.reader import Slide
    from modalities.pathology.workers import Workers

_STRIP_TILES = 8


class OpenSlideReader:
    """Reads neighbours in a row in one go.

    Parameters
    ----------
    workers
        Threads that read.
    lost
        Parts of the level that are lost without OpenSlide's saying so.
    """

    name = "openslide"

    def __init__(self, slide: Slide, workers: Workers, lost: LostParts | None = None) -> None:
        self.info = slide.info
        self._slide = slide
        self._workers = workers
        self._lost = lost

    def expect(self, xy: NDArray[np.int64], *, tile_px: int, mpp: float) -> None:
        """Nothing is kept, so nothing is forgotten."""

    def read_tiles(self, xy: NDArray[np.int64], *, tile_px: int, mpp: float) -> Tiles:
        """Read tiles; see ``TileReader``."""
        how = cut(self.info, tile_px=tile_px, mpp=mpp)
        corners = how.corners(xy)
        strips = list(_strips(corners, 2 * how.side_px, how.at_once(_STRIP_TILES)))
        read = self._workers.map(lambda part: self._read(corners[part], how), strips)
        if not read:
            return Tiles(np.empty((0, tile_px, tile_px, 3), np.uint8), np.empty(0, bool))
        pixels, decoded = (np.concatenate(x) for x in zip(*read, strict=True))
        if self._lost is not None:
            decoded &= ~self._lost.under(corners, how.side_px)
            pixels[~decoded] = 0
        return Tiles(pixels, decoded)

    def close(self) -> None:
        """Let go of what was asked beside OpenSlide; the slide closes itself."""
        if self._lost is not None:
            self._lost.close()

    def _read(self, strip: NDArray[np.int64], how: Cut) -> Tiles:
        side = how.side_px
        left, top = (int(v) for v in strip[0])
        size_px = (int(strip[-1, 0]) - left + side, side)
        try:
            region = np.asarray(self._slide.region(how.level, (left, top), size_px))
        except Undecodable:
            return self._read_singly(strip, how)
        fields = np.stack([region[:, x - left : x - left + side] for x in strip[:, 0]])
        return Tiles(resampled(fields, how.tile_px), np.ones(len(strip), dtype=bool))

    def _read_singly(self, strip: NDArray[np.int64], how: Cut) -> Tiles:
        side = how.side_px
        fields = np.zeros((len(strip), side, side, 3), dtype=np.uint8)
        decoded = np.ones(len(strip), dtype=bool)
        for i, (x, y) in enumerate(strip.tolist()):
            try:
                fields[i] = np.asarray(self._slide.region(how.level, (x, y), (side, side)))
            except Undecodable:
                decoded[i] = False
        return Tiles(resampled(fields, how.tile_px), decoded)


def _strips(corners: NDArray[np.int64], gap_px: int, most: int) -> Iterator[slice]:
    """Yield runs of tiles of one row from left to right, without wide gaps and not too long."""
    begin = 0
    for i in range(1, len(corners)):
        step_x, step_y = corners[i] - corners[i - 1]
        if step_y != 0 or not 0 <= step_x <= gap_px or i - begin == most:
            yield slice(begin, i)
            begin = i
    if len(corners):
        yield slice(begin, len(corners))
