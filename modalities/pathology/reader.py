"""Slides as OpenSlide reads them: opening, physical scale, regions, overviews."""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import openslide
from PIL import Image

from modalities.cohort import DataError
from modalities.pathology.scale import Scale, slide_scale
from modalities.pathology.tiff_index import TiffIndex, cut_short, read_index

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SUFFIXES = frozenset(
    {".bif", ".czi", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"}
)

_BAND_PX = 1 << 22
_LEVEL_TOLERANCE = 1.01
_CACHE_BYTES = 1 << 25
_USUAL_STORED_PX = 256


class Undecodable(OSError):
    """Stored pixels of a slide that its decoder does not accept."""


@dataclass(frozen=True)
class Level:
    """One resolution of a slide.

    Parameters
    ----------
    size_px
        (width, height) in its own pixels.
    downsample
        Level-0 pixels per pixel.
    """

    size_px: tuple[int, int]
    downsample: float


@dataclass(frozen=True)
class SlideInfo:
    """Physical scale and resolutions of a slide.

    Parameters
    ----------
    mpp
        Micrometres per pixel at level 0.
    levels
        From the finest to the coarsest.
    """

    mpp: float
    levels: tuple[Level, ...]

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.levels[0].size_px

    def level_for(self, downsample: float) -> tuple[int, float]:
        """Find the coarsest level at least as fine as ``downsample``, and its own downsample.

        Levels a hair too coarse count, since scanners round the sizes of their levels.
        """
        fine = [x.downsample <= downsample * _LEVEL_TOLERANCE for x in self.levels]
        level = fine.index(False) - 1 if False in fine else len(fine) - 1
        return max(level, 0), self.levels[max(level, 0)].downsample


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


class Slide:
    """An open slide. Threads may share it: each reads through a handle of its own.

    Parameters
    ----------
    path
        The slide.
    scale
        Its physical scale.
    handle
        Of OpenSlide; closed with the slide.
    """

    def __init__(self, path: Path, scale: Scale, handle: openslide.OpenSlide) -> None:
        self.path = path
        self.scale = scale
        self.properties: Mapping[str, str] = dict(handle.properties)
        self.info = SlideInfo(scale.mpp, _levels(handle))
        self._cache = openslide.OpenSlideCache(_CACHE_BYTES)
        self._lock = threading.Lock()
        self._open: list[openslide.OpenSlide] = []
        self._own = threading.local()
        self._adopt(handle)

    @property
    def mpp(self) -> float:
        """Micrometres per pixel at level 0."""
        return self.info.mpp

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.info.size_px

    @cached_property
    def index(self) -> TiffIndex | None:
        """Where the slide's pixels stand in its file; None where it is no plain TIFF."""
        return read_index(self.path)

    def region(self, level: int, xy: tuple[int, int], size_px: tuple[int, int]) -> Image.Image:
        """RGB region of a level; where the slide has no data it is the slide's background.

        Parameters
        ----------
        xy, size_px
            Upper left corner and (width, height) in pixels of the level.

        Raises
        ------
        Undecodable
            If any of it is damaged. The next read is not affected.
        """
        downsample = self.info.levels[level].downsample
        at = (round(xy[0] * downsample), round(xy[1] * downsample))
        handle = self._handle()
        try:
            region = handle.read_region(at, level, size_px)
        except openslide.OpenSlideError:
            self._forget(handle)  # after one error a handle refuses everything
            raise Undecodable("slide: found damaged pixels") from None
        return self._on_background(region)

    def stored_px(self, level: int) -> tuple[int, int]:
        """(width, height) of the pieces in which a level is stored, as far as is known."""
        names = (f"openslide.level[{level}].tile-{axis}" for axis in ("width", "height"))
        width, height = (int(self.properties.get(x, _USUAL_STORED_PX)) for x in names)
        return width, height

    def close(self) -> None:
        """Close every handle."""
        with self._lock:
            while self._open:
                self._open.pop().close()

    def _handle(self) -> openslide.OpenSlide:
        handle: openslide.OpenSlide | None = getattr(self._own, "handle", None)
        if handle is None:
            try:
                handle = openslide.OpenSlide(self.path)
            except openslide.OpenSlideError:
                raise Undecodable("slide: found a file that no longer opens") from None
            self._adopt(handle)
        return handle

    def _adopt(self, handle: openslide.OpenSlide) -> None:
        handle.set_cache(self._cache)
        self._own.handle = handle
        with self._lock:
            self._open.append(handle)

    def _forget(self, handle: openslide.OpenSlide) -> None:
        self._own.handle = None
        with self._lock:
            self._open.remove(handle)
        handle.close()

    def _on_background(self, region: Image.Image) -> Image.Image:
        alpha = region.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return region.convert("RGB")
        colour = self.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        ground = Image.new("RGB", region.size, f"#{colour}")
        ground.paste(region, mask=alpha)
        return ground


@contextmanager
def open_slide(path: Path, *, tabled_mpp: float | None = None) -> Iterator[Slide]:
    """Open a slide; any failure of OpenSlide inside the block becomes a ``DataError``.

    Parameters
    ----------
    tabled_mpp
        Micrometres per pixel that the user states, for a slide that does not know.

    Raises
    ------
    DataError
        ``missing_file``, ``not_a_slide``, ``missing_resolution`` or ``unreadable_slide``.
    """
    if not path.exists():
        raise DataError(
            "missing_file", "slide: found no file, needed a whole-slide image; check the path"
        )
    try:
        handle = openslide.OpenSlide(path)
        try:
            scale = slide_scale(handle.properties, tabled_mpp)
        except DataError:
            handle.close()
            raise
        slide = Slide(path, scale, handle)
        try:
            yield slide
        finally:
            slide.close()
    except openslide.OpenSlideUnsupportedFormatError:
        raise _unsupported(path) from None
    except (openslide.OpenSlideError, Undecodable):
        raise unreadable() from None


def check_whole(slide: Slide) -> None:
    """Check that a slide did not break off during a copy.

    Of a TIFF its index says so; of anything else the last pixels of every level are decoded.

    Raises
    ------
    DataError
        ``unreadable_slide``.
    """
    if slide.index is not None:
        if slide.index.n_bytes_needed > slide.path.stat().st_size:
            raise unreadable()
        return
    try:
        for number, level in enumerate(slide.info.levels):
            side = min(16, *level.size_px)
            slide.region(number, (level.size_px[0] - side, level.size_px[1] - side), (side, side))
    except Undecodable:
        raise unreadable() from None


def thumbnail(slide: Slide, downsample: float) -> Overview:
    """Overview at about ``downsample``.

    Read in bands, so that a slide without a pyramid never stands in memory as a whole. A damaged
    piece is read from the next finer level; what is damaged there too stays unread.
    """
    number, level_downsample = slide.info.level_for(downsample)
    factor = max(1, round(downsample / level_downsample))
    width, height = slide.info.levels[number].size_px
    rows = factor * max(1, _BAND_PX // (width * factor))
    pixels, unread = [], []
    for top in range(0, height, rows):
        band, missing = _band(slide, number, (0, top), (width, min(rows, height - top)))
        reduced = np.asarray(band.reduce(factor), dtype=np.uint8)
        pixels.append(reduced)
        unread.append(_any_in_cells(missing, factor, reduced.shape[:2]))
    return Overview(np.concatenate(pixels), level_downsample * factor, np.concatenate(unread))


def unreadable() -> DataError:
    """Error of a slide whose pixels cannot be read."""
    return DataError(
        "unreadable_slide",
        "slide: found damaged or missing image data, needed a whole file; copy it again "
        "from the scanner",
    )


def _levels(handle: openslide.OpenSlide) -> tuple[Level, ...]:
    sizes = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    return tuple(Level((size[0], size[1]), float(down)) for size, down in sizes)


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


def _any_in_cells(
    missing: NDArray[np.bool_] | None, factor: int, shape: tuple[int, ...]
) -> NDArray[np.bool_]:
    """Whether any pixel is missing in each cell of ``factor`` pixels square."""
    if missing is None:
        return np.zeros(shape, dtype=bool)
    padded = np.zeros((shape[0] * factor, shape[1] * factor), dtype=bool)
    padded[: missing.shape[0], : missing.shape[1]] = missing
    cells = padded.reshape(shape[0], factor, shape[1], factor)
    return np.asarray(cells.any(axis=(1, 3)))


def _unsupported(path: Path) -> DataError:
    if cut_short(path):
        return unreadable()
    return DataError(
        "not_a_slide",
        "slide: found a file that OpenSlide does not read, needed a whole-slide image "
        "such as SVS, NDPI, MRXS or a tiled TIFF; convert it",
    )
