"""Slides as OpenSlide reads them: opening, levels, regions."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

import openslide
from PIL import Image

from modalities.cohort import DataError
from modalities.pathology.scale import Scale, slide_scale
from modalities.pathology.slide_files import slide_stem
from modalities.pathology.tiff_index import TiffIndex, cut_short, read_index

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


_LEVEL_TOLERANCE = 1.01
# Of its own pixels, by which a level may end before or after level 0.
_LEVEL_OFF_PX = 2.0
_CACHE_BYTES = 1 << 25
_USUAL_STORED_PX = 256
# A disk takes 255 bytes, of which a temporary name beside a slide's own needs some.
_LONGEST_NAME = 200
_BOUNDS = (
    openslide.PROPERTY_NAME_BOUNDS_X, openslide.PROPERTY_NAME_BOUNDS_Y,
    openslide.PROPERTY_NAME_BOUNDS_WIDTH, openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
)  # fmt: skip


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
        # A DICOM header's own values stay out: they tell who the patient is.
        self.properties: Mapping[str, str] = {
            name: value for name, value in handle.properties.items() if name[:6] != "dicom."
        }
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

    @property
    def shown_from(self) -> tuple[int, int]:
        """Where at level 0 the part begins that viewers show: they crop to a scanner's bounds."""
        try:
            x, y, width, height = (int(self.properties[name]) for name in _BOUNDS)
        except (KeyError, ValueError):
            return 0, 0
        # One side alone is left as it is, which is how QuPath counts.
        is_cropped = width != self.size_px[0] and height != self.size_px[1]
        return (x, y) if is_cropped else (0, 0)

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
        ``long_name``, ``missing_file``, ``not_a_slide``, ``missing_resolution`` or
        ``unreadable_slide``.
    """
    if len(os.fsencode(slide_stem(path))) > _LONGEST_NAME:
        raise DataError(
            "long_name",
            f"slide: found a name that is too long for the files made of it, needed at most "
            f"{_LONGEST_NAME} bytes; rename it",
        )
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
        n_bytes = slide.path.stat().st_size
        if not slide.index.is_sound or slide.index.n_bytes_needed > n_bytes:
            raise unreadable()
        return
    try:
        for number, level in enumerate(slide.info.levels):
            side = min(16, *level.size_px)
            slide.region(number, (level.size_px[0] - side, level.size_px[1] - side), (side, side))
    except Undecodable:
        raise unreadable() from None


def open_bytes(path: Path) -> int:
    """Open a slide for ``read_bytes``; the caller closes it.

    Raises
    ------
    Undecodable
        If it is no longer there.
    """
    try:
        return os.open(path, os.O_RDONLY)
    except OSError:
        raise Undecodable("slide: found a file that no longer opens") from None


def read_bytes(file: int, n_bytes: int, at: int) -> bytes:
    """Read bytes of a slide; fewer where it ends before.

    Raises
    ------
    Undecodable
        If its disk does not give them: one that is away for a moment is no damage.
    """
    try:
        return os.pread(file, n_bytes, at)
    except OSError:
        raise Undecodable("slide: found bytes that cannot be read") from None


def unreadable() -> DataError:
    """Error of a slide whose pixels cannot be read."""
    return DataError(
        "unreadable_slide",
        "slide: found damaged or missing image data, needed a whole file; copy it again "
        "from the scanner",
    )


def _levels(handle: openslide.OpenSlide) -> tuple[Level, ...]:
    """Levels up to the first that does not show what level 0 shows."""
    sizes = zip(handle.level_dimensions, handle.level_downsamples, strict=True)
    levels = [Level((size[0], size[1]), float(down)) for size, down in sizes]
    return tuple(takewhile(lambda level: _covers(level, levels[0].size_px), levels))


def _covers(level: Level, size_px: tuple[int, int]) -> bool:
    # OpenSlide takes the mean of both axes for the downsample. In a level that is filled up to
    # whole tiles, or cropped, it is neither, and what is read is not what stands there.
    ends = zip(level.size_px, size_px, strict=True)
    return all(abs(end - whole / level.downsample) <= _LEVEL_OFF_PX for end, whole in ends)


def _unsupported(path: Path) -> DataError:
    if cut_short(path):
        return unreadable()
    return DataError(
        "not_a_slide",
        "slide: found a file that OpenSlide does not read, needed a whole-slide image "
        "such as SVS, NDPI, MRXS, DICOM or a tiled TIFF; convert it",
    )
