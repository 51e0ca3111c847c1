"""The fastest way to read a slide's tiles that shows the same pixels as OpenSlide."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from modalities.pathology.cutting import cut
from modalities.pathology.jpeg_tiff import (
    JpegTiffReader,
    StoredReader,
    proves_itself,
    stored_tiles,
)
from modalities.pathology.lost_parts import LostParts
from modalities.pathology.openslide_reader import OpenSlideReader
from modalities.pathology.tiff_index import of_size
from modalities.pathology.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modalities.pathology.cutting import TileReader
    from modalities.pathology.reader import Slide


@contextmanager
def tile_reader(
    slide: Slide, *, tile_px: int, mpp: float, n_threads: int | None = None
) -> Iterator[TileReader]:
    """Open the reader for tiles of ``tile_px`` square pixels of ``mpp`` micrometres.

    A tiled JPEG TIFF is read directly where that has shown OpenSlide's own pixels on samples of
    this very slide; anything else through OpenSlide. The reader's name says which.

    Parameters
    ----------
    n_threads
        That decode; None takes one per processor, at most eight.
    """
    workers = Workers(n_threads)
    try:
        level = cut(slide.info, tile_px=tile_px, mpp=mpp).level
        reader = _direct_reader(slide, level, workers) or _openslide_reader(slide, level, workers)
        try:
            yield reader
        finally:
            reader.close()
    finally:
        workers.close()


def _openslide_reader(slide: Slide, level: int, workers: Workers) -> OpenSlideReader:
    levels = () if slide.index is None else slide.index.jpeg2000_levels
    stored = of_size(levels, slide.info.levels[level].size_px)
    lost = None if stored is None else LostParts(slide.path, stored, workers)
    return OpenSlideReader(slide, workers, lost)


def _direct_reader(slide: Slide, level: int, workers: Workers) -> JpegTiffReader | None:
    stored = stored_tiles(slide, level)
    if stored is None:
        return None
    reader = StoredReader(slide, level, stored, workers)
    with ExitStack() as stack:
        stack.callback(reader.close)
        if not proves_itself(slide, level, reader, stored):
            return None
        stack.pop_all()
    return JpegTiffReader(slide, reader, workers)
