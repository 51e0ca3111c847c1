"""Where the pixels of a TIFF slide stand in its file."""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from os import SEEK_CUR
from typing import TYPE_CHECKING

import numpy as np
import tifffile

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Any, BinaryIO

    from numpy.typing import NDArray

# What it remarks on odd tags names the file.
logging.getLogger("tifffile").addHandler(logging.NullHandler())

_MOST_DIRECTORIES = 1000
_MOST_TILE_PIXELS = 1 << 28
_JPEG, _RGB, _YCBCR = 7, 2, 6
_JPEG2000 = (33003, 33005, 34712)
_MALFORMED = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, struct.error
)  # fmt: skip


@dataclass(frozen=True)
class StoredTiles:
    """Tiles of one level of a TIFF.

    Parameters
    ----------
    size_px
        (width, height) of the level.
    tile_px
        (width, height) of a stored tile.
    offsets, counts
        (n,) where each tile stands in the file and its length in bytes, row by row; no bytes means
        that the tile was never scanned.
    header
        Bytes that stand before every tile's own JPEG stream, which lacks its tables.
    """

    size_px: tuple[int, int]
    tile_px: tuple[int, int]
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    header: bytes

    @property
    def grid(self) -> tuple[int, int]:
        """(columns, rows) of stored tiles."""
        columns, rows = (-(-n // tile) for n, tile in zip(self.size_px, self.tile_px, strict=True))
        return columns, rows

    def below(self, box: tuple[int, int, int, int]) -> list[int]:
        """Numbers of the tiles that a box (x, y, width, height) touches."""
        (x, y, w, h), (across, down), (columns, rows) = box, self.tile_px, self.grid
        return [
            row * columns + column
            for row in range(max(y // down, 0), min((y + h - 1) // down + 1, rows))
            for column in range(max(x // across, 0), min((x + w - 1) // across + 1, columns))
        ]


@dataclass(frozen=True)
class TiffIndex:
    """What a TIFF says of where its tiles stand.

    Parameters
    ----------
    n_bytes_needed
        End of the last stored tile of any level.
    is_sound
        Whether every tile of every level has a place in the file, and fits in memory.
    jpeg_levels
        Those of its levels that are tiled JPEG with eight bits in three channels.
    jpeg2000_levels
        Those that are tiled JPEG 2000.
    """

    n_bytes_needed: int
    is_sound: bool
    jpeg_levels: tuple[StoredTiles, ...]
    jpeg2000_levels: tuple[StoredTiles, ...] = ()


def read_index(path: Path) -> TiffIndex | None:
    """Read the index of a TIFF; None where the file is none, or one with rules of its own."""
    try:
        with tifffile.TiffFile(path) as file:
            if file.is_ndpi:  # stores offsets past 4 GiB in its own way
                return None
            pages = [page for page in file.pages if page.is_tiled]
            ends = [_end(page) for page in pages]
            jpeg = [_stored(page) for page in pages if _is_plain_jpeg(page)]
            jpeg2000 = [_stored(page) for page in pages if _is_jpeg2000(page)]
            is_sound = all(_is_sound(page) for page in pages)
    except _MALFORMED:
        return None
    return TiffIndex(max(ends), is_sound, tuple(jpeg), tuple(jpeg2000)) if ends else None


def of_size(levels: Iterable[StoredTiles], size_px: tuple[int, int]) -> StoredTiles | None:
    """Find the level of that (width, height); None where there is none, or several are."""
    found = [level for level in levels if level.size_px == size_px]
    return found[0] if len(found) == 1 else None


def cut_short(path: Path) -> bool:
    """Whether a file begins as a TIFF and its chain of directories leads past its end.

    Scanners write the directories last, so that OpenSlide calls a slide that broke off during
    a copy an unknown format.
    """
    try:
        with path.open("rb") as stream:
            layout = _LAYOUTS.get(stream.read(4))
            return layout is not None and _chain_breaks(stream, layout)
    except OSError:
        return False


@dataclass(frozen=True)
class _Layout:
    """Where the first offset stands and how wide offsets, counts and entries are."""

    first: int
    offset: str
    count: str
    entry_bytes: int


_LAYOUTS = {
    b"II*\0": _Layout(4, "<I", "<H", 12),
    b"MM\0*": _Layout(4, ">I", ">H", 12),
    b"II+\0": _Layout(8, "<Q", "<Q", 20),
    b"MM\0+": _Layout(8, ">Q", ">Q", 20),
}


def _end(page: Any) -> int:
    offsets, counts = (np.array(x, dtype=np.int64) for x in (page.dataoffsets, page.databytecounts))
    return int((offsets + counts)[counts > 0].max(initial=0))


def _n_tiles(page: Any) -> int:
    """Count the tiles of one plane, by the sizes that a page states."""
    columns, rows = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
    return int(columns * rows)


def _is_sound(page: Any) -> bool:
    # OpenSlide ends the whole process where it gets no memory for a tile.
    fits = page.tilewidth * page.tilelength <= _MOST_TILE_PIXELS
    return fits and min(len(page.dataoffsets), len(page.databytecounts)) >= _n_tiles(page)


def _lists_its_tiles(page: Any) -> bool:
    return {len(page.dataoffsets), len(page.databytecounts)} == {_n_tiles(page)}


def _is_jpeg2000(page: Any) -> bool:
    return page.compression in _JPEG2000 and _lists_its_tiles(page)


def _is_plain_jpeg(page: Any) -> bool:
    return (
        _lists_its_tiles(page)
        and page.compression == _JPEG
        and page.photometric in (_RGB, _YCBCR)
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and page.planarconfig == 1
        and page.imagedepth == 1
    )


def _stored(page: Any) -> StoredTiles:
    return StoredTiles(
        size_px=(page.imagewidth, page.imagelength),
        tile_px=(page.tilewidth, page.tilelength),
        offsets=np.array(page.dataoffsets, dtype=np.int64),
        counts=np.array(page.databytecounts, dtype=np.int64),
        header=_header(page.jpegtables, is_ycbcr=page.photometric == _YCBCR),
    )


def _header(tables: bytes | None, *, is_ycbcr: bool) -> bytes:
    # Adobe's marker tells a decoder what the TIFF says in a tag of its own: RGB or YCbCr.
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([is_ycbcr])
    # Tables are a stream of their own, between a start and an end.
    return b"\xff\xd8" + adobe + (b"" if not tables else tables[2:-2])


def _chain_breaks(stream: BinaryIO, layout: _Layout) -> bool:
    def take(code: str) -> int:
        value: int = struct.unpack(code, stream.read(struct.calcsize(code)))[0]
        return value

    stream.seek(layout.first)
    try:
        for _ in range(_MOST_DIRECTORIES):
            offset = take(layout.offset)
            if offset == 0:
                return False
            stream.seek(offset)
            stream.seek(take(layout.count) * layout.entry_bytes, SEEK_CUR)
    except struct.error:
        return True
    return False
