"""Slides as OpenSlide reads them: opening, physical scale, regions, thumbnails."""

from __future__ import annotations

import math
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from os import SEEK_CUR
from typing import TYPE_CHECKING

import numpy as np
import openslide
from PIL import Image

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

SUFFIXES = frozenset(
    {".bif", ".czi", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"}
)

# Scanners lie between about 0.1 and 10; a TIFF left at 72 or 300 dpi claims 353 or 85.
_PLAUSIBLE_MPP = (0.05, 10.0)
_BAND_PX = 1 << 24
_LEVEL_TOLERANCE = 1.01
_MOST_DIRECTORIES = 1000


@dataclass(frozen=True)
class _TiffLayout:
    """Where the first offset stands and how wide offsets, counts and entries are."""

    first: int
    offset: str
    count: str
    entry_bytes: int


_TIFF_LAYOUTS = {
    b"II*\0": _TiffLayout(4, "<I", "<H", 12),
    b"MM\0*": _TiffLayout(4, ">I", ">H", 12),
    b"II+\0": _TiffLayout(8, "<Q", "<Q", 20),
    b"MM\0+": _TiffLayout(8, ">Q", ">Q", 20),
}


@dataclass(frozen=True)
class Slide:
    """An open slide and its scale at level 0."""

    handle: openslide.OpenSlide
    mpp: float

    @property
    def size_px(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        width, height = self.handle.dimensions
        return width, height

    def level_for(self, downsample: float) -> tuple[int, float]:
        """Find the coarsest level at least as fine as ``downsample``, and its own downsample.

        Levels a hair too coarse count, since scanners round the sizes of their levels.
        """
        level = self.handle.get_best_level_for_downsample(downsample * _LEVEL_TOLERANCE)
        return level, float(self.handle.level_downsamples[level])

    def read(self, xy: tuple[int, int], level: int, size_px: tuple[int, int]) -> Image.Image:
        """RGB region of ``size_px`` level pixels from ``xy`` at level 0; no data is background."""
        region = self.handle.read_region(xy, level, size_px)
        alpha = region.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return region.convert("RGB")
        colour = self.handle.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
        ground = Image.new("RGB", region.size, f"#{colour}")
        ground.paste(region, mask=alpha)
        return ground


@contextmanager
def open_slide(path: Path) -> Iterator[Slide]:
    """Open a slide; any failure of OpenSlide inside the block becomes a ``DataError``.

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
        with openslide.OpenSlide(path) as handle:
            yield Slide(handle, slide_mpp(handle.properties))
    except openslide.OpenSlideUnsupportedFormatError:
        raise _unsupported(path) from None
    except openslide.OpenSlideError:
        raise _unreadable() from None


def check_ends(slide: Slide) -> None:
    """Decode the last pixels of every level, which a copy that broke off lacks.

    Raises
    ------
    openslide.OpenSlideError
        If they cannot be read; ``open_slide`` turns it into a ``DataError``.
    """
    width, height = slide.size_px
    for level, (level_width, level_height) in enumerate(slide.handle.level_dimensions):
        side = min(16, level_width, level_height)
        scale = slide.handle.level_downsamples[level]
        xy = (math.floor(width - side * scale), math.floor(height - side * scale))
        slide.handle.read_region((max(xy[0], 0), max(xy[1], 0)), level, (side, side))


def thumbnail(slide: Slide, downsample: float) -> tuple[NDArray[np.uint8], float]:
    """RGB overview (h, w, 3) at about ``downsample``, and the downsample that it has exactly.

    Read in bands, so that a slide without a pyramid never stands in memory as a whole.
    """
    level, level_downsample = slide.level_for(downsample)
    factor = max(1, round(downsample / level_downsample))
    width, height = slide.handle.level_dimensions[level]
    rows = factor * max(1, _BAND_PX // (width * factor))
    bands = []
    for top in range(0, height, rows):
        size_px = (width, min(rows, height - top))
        band = slide.read((0, round(top * level_downsample)), level, size_px)
        bands.append(np.asarray(band.reduce(factor), dtype=np.uint8))
    return np.concatenate(bands), level_downsample * factor


def slide_mpp(properties: Mapping[str, str]) -> float:
    """Micrometres per pixel at level 0, from the first source that gives a plausible value.

    In turn: the stated resolution, the objective's power, the TIFF's own resolution.

    Raises
    ------
    DataError
        ``missing_resolution``.
    """
    for mpp in (_stated_mpp(properties), _objective_mpp(properties), _tiff_mpp(properties)):
        if _PLAUSIBLE_MPP[0] <= mpp <= _PLAUSIBLE_MPP[1]:
            return mpp
    raise DataError(
        "missing_resolution",
        "slide: found no plausible resolution, needed micrometres per pixel between "
        f"{_PLAUSIBLE_MPP[0]} and {_PLAUSIBLE_MPP[1]}; export the slide again with its resolution",
    )


def _stated_mpp(properties: Mapping[str, str]) -> float:
    x = _number(properties, openslide.PROPERTY_NAME_MPP_X)
    y = _number(properties, openslide.PROPERTY_NAME_MPP_Y)
    return math.sqrt(x * y)


def _objective_mpp(properties: Mapping[str, str]) -> float:
    # An objective of 20x gives 0.5 micrometres per pixel on every common scanner camera.
    powers = [
        _number(properties, name)
        for name in (openslide.PROPERTY_NAME_OBJECTIVE_POWER, "aperio.AppMag")
    ]
    return 10 / next((power for power in powers if power > 0), math.nan)


def _tiff_mpp(properties: Mapping[str, str]) -> float:
    unit_um = {"centimeter": 1e4, "inch": 25_400.0}.get(
        properties.get("tiff.ResolutionUnit", ""), math.nan
    )
    x, y = (_number(properties, f"tiff.{axis}Resolution") for axis in "XY")
    return unit_um / math.sqrt(x * y) if x > 0 and y > 0 else math.nan


def _number(properties: Mapping[str, str], name: str) -> float:
    # Some exports write a decimal comma.
    try:
        value = float(properties.get(name, "nan").replace(",", "."))
    except ValueError:
        return math.nan
    return value if value > 0 else math.nan


def _unreadable() -> DataError:
    return DataError(
        "unreadable_slide",
        "slide: found damaged or missing image data, needed a whole file; copy it again "
        "from the scanner",
    )


def _unsupported(path: Path) -> DataError:
    if _tiff_cut_short(path):
        return _unreadable()
    return DataError(
        "not_a_slide",
        "slide: found a file that OpenSlide does not read, needed a whole-slide image "
        "such as SVS, NDPI, MRXS or a tiled TIFF; convert it",
    )


def _tiff_cut_short(path: Path) -> bool:
    """Whether a file begins as a TIFF and its chain of directories leads past its end.

    Scanners write the directories last, so that OpenSlide calls a slide that broke off during
    a copy an unknown format.
    """
    try:
        with path.open("rb") as stream:
            layout = _TIFF_LAYOUTS.get(stream.read(4))
            return layout is not None and _chain_breaks(stream, layout)
    except OSError:
        return False


def _chain_breaks(stream: BinaryIO, layout: _TiffLayout) -> bool:
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
