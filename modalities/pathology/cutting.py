"""Tiles of a fixed physical size from the pixels of one level."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modalities.pathology.reader import SlideInfo


# Of a level, in all tiles that are cut from it at once.
_MOST_PIXELS = 1 << 24
# As many as a processor's cache holds.
_AT_ONCE = 4


class Tiles(NamedTuple):
    """Pixels of tiles.

    Parameters
    ----------
    pixels
        (n, tile_px, tile_px, 3) red, green and blue; zeros where a tile was not decoded.
    decoded
        (n,) whether all stored pixels of the tile were accepted by the decoder.
    """

    pixels: NDArray[np.uint8]
    decoded: NDArray[np.bool_]


class TileReader(Protocol):
    """A way to read the tiles of an open slide.

    Attributes
    ----------
    name
        ``openslide`` or ``jpeg_tiff``.
    info
        Scale and levels of the slide.
    """

    name: str
    info: SlideInfo

    def expect(self, xy: NDArray[np.int64], *, tile_px: int, mpp: float) -> None:
        """Announce the tiles that will be read, in their order.

        What none of them needs any more can be forgotten at once.
        """

    def read_tiles(self, xy: NDArray[np.int64], *, tile_px: int, mpp: float) -> Tiles:
        """Read tiles of ``tile_px`` square pixels of ``mpp`` micrometres.

        Parameters
        ----------
        xy
            (n, 2) upper left corners at level 0.
        """

    def close(self) -> None:
        """Let go of what the reader holds."""


@dataclass(frozen=True)
class Cut:
    """Which level tiles are cut from, and how large they are there.

    Parameters
    ----------
    side_px
        Side of a tile in pixels of the level.
    last
        Furthest corner (x, y) of a tile that is wholly inside the level.
    """

    level: int
    downsample: float
    side_px: int
    tile_px: int
    last: tuple[int, int]

    def corners(self, xy: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n, 2) upper left corners in pixels of the level, of corners at level 0."""
        # Corner and side are rounded each; beyond the level there is nothing to be seen.
        return np.minimum(np.rint(xy / self.downsample).astype(np.int64), self.last)

    def at_once(self, most: int) -> int:
        """Limit how many tiles are in the works at once, for the sake of memory."""
        return max(1, min(most, _MOST_PIXELS // self.side_px**2))


def cut(info: SlideInfo, *, tile_px: int, mpp: float) -> Cut:
    """How to cut tiles of ``tile_px`` square pixels of ``mpp`` micrometres from a slide.

    From the coarsest level that is fine enough. Corners and sides are whole pixels of that level,
    so that no pixel is blended before the one resampling; a side is off by half of one at most.
    """
    field_px = side_at_level_0(tile_px, mpp, info.mpp)
    level, downsample = info.level_for(field_px / tile_px)
    side_px = max(1, round(field_px / downsample))
    width, height = (max(n - side_px, 0) for n in info.levels[level].size_px)
    return Cut(level, downsample, side_px, tile_px, (width, height))


def side_at_level_0(tile_px: int, mpp: float, slide_mpp: float) -> int:
    """Side at level 0 of ``tile_px`` pixels of ``mpp`` micrometres, in whole pixels."""
    return max(1, round(tile_px * mpp / slide_mpp))


def resampled(regions: NDArray[np.uint8], tile_px: int) -> NDArray[np.uint8]:
    """Bring regions (n, side, side, 3) to (n, tile_px, tile_px, 3).

    Bicubic with a support as wide as the output pixel, which leaves no aliases at any ratio.
    """
    if regions.shape[1] == tile_px:
        return regions
    # torch has the one fast resampler at hand; it takes seconds to import and waits until needed.
    import torch

    tiles = np.empty((len(regions), tile_px, tile_px, 3), dtype=np.uint8)
    for at in range(0, len(regions), _AT_ONCE):
        planes = torch.from_numpy(regions[at : at + _AT_ONCE]).permute(0, 3, 1, 2)
        resized = torch.nn.functional.interpolate(
            planes, size=(tile_px, tile_px), mode="bicubic", antialias=True
        )
        tiles[at : at + _AT_ONCE] = resized.permute(0, 2, 3, 1).numpy()
    return tiles
