"""Micrometres per pixel of a slide: from the slide itself, or from a table beside it."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import openslide

from modalities.cohort import DataError
from modalities.pathology.slide_files import slide_stem

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Source = Literal["stated", "objective", "tiff", "table"]

# Scanners lie between about 0.1 and 10; a TIFF left at 72 or 300 dpi claims 353 or 85.
PLAUSIBLE_MPP = (0.05, 10.0)
# Of the longer side of a pixel to the shorter; scanners' own differ in the third digit.
_MOST_UNEVEN = 1.02


@dataclass(frozen=True)
class Scale:
    """Micrometres per pixel at level 0, and where they are known from.

    Parameters
    ----------
    source
        ``stated`` by the scanner, from the ``objective``, the ``tiff`` resolution or the user's
        ``table``.
    """

    mpp: float
    source: Source


def slide_scale(properties: Mapping[str, str], tabled_mpp: float | None = None) -> Scale:
    """Scale at level 0, from the first source that gives a plausible value.

    In turn: the stated resolution, the objective's power, the TIFF's own resolution, and what the
    user says of a slide that does not know. A slide that states pixels which are not square does
    not know either: one of its two numbers may be wrong, and nothing says which.

    Raises
    ------
    DataError
        ``missing_resolution``.
    """
    sides = _stated_sides(properties)
    uneven = max(sides) > _MOST_UNEVEN * min(sides)
    found: list[tuple[Source, float]] = [
        ("stated", math.sqrt(math.prod(sides))),
        ("objective", _objective_mpp(properties)),
        ("tiff", _tiff_mpp(properties)),
        ("table", math.nan if tabled_mpp is None else tabled_mpp),
    ]
    for source, mpp in found[-1:] if uneven else found:
        if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
            return Scale(mpp, source)
    which = "pixels that are not square" if uneven else "no plausible resolution"
    raise DataError(
        "missing_resolution",
        f"slide: found {which}, needed micrometres per pixel between "
        f"{PLAUSIBLE_MPP[0]} and {PLAUSIBLE_MPP[1]}; name it in a CSV with columns wsi,mpp, or "
        "export the slide again with its resolution",
    )


class MppTable:
    """Micrometres per pixel that a user states for slides which do not know their own.

    Parameters
    ----------
    by_name
        Per file name, with or without its suffix, or per name of a DICOM series.
    """

    def __init__(self, by_name: Mapping[str, float]) -> None:
        self._by_name = dict(by_name)

    def of(self, slide: Path) -> float | None:
        """Give what the table says of a slide; None where it is not in it."""
        return next((self._by_name[x] for x in _names(slide) if x in self._by_name), None)


def _names(slide: Path) -> Iterator[str]:
    yield slide.name
    yield slide.stem
    yield slide_stem(slide)


def read_mpp_table(path: Path) -> MppTable:
    """Read a CSV with the columns ``wsi`` and ``mpp``.

    Raises
    ------
    DataError
        ``mpp_table``, if it is not one, a value is no plausible resolution, or a slide has two.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        table = [(Path(row["wsi"].strip()).name, float(row["mpp"])) for row in rows]
    except (
        OSError,
        UnicodeDecodeError,
        csv.Error,
        KeyError,
        ValueError,
        AttributeError,
        TypeError,
    ):
        raise DataError(
            "mpp_table",
            "mpp table: found no CSV with a slide and a number in every row, needed the columns "
            "'wsi' and 'mpp'",
        ) from None
    least, most = PLAUSIBLE_MPP
    if not all(least <= mpp <= most for _, mpp in table):
        raise DataError(
            "mpp_table",
            f"mpp table: found a value outside {least} to {most}, needed micrometres per pixel",
        )
    by_name = dict(table)
    if any(by_name[name] != mpp for name, mpp in table):
        raise DataError(
            "mpp_table", "mpp table: found two values for one slide, needed one; take one out"
        )
    return MppTable(by_name)


def _stated_sides(properties: Mapping[str, str]) -> tuple[float, float]:
    x, y = openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y
    return _number(properties, x), _number(properties, y)


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
    is_square = max(x, y) <= _MOST_UNEVEN * min(x, y)
    return unit_um / math.sqrt(x * y) if is_square else math.nan


def _number(properties: Mapping[str, str], name: str) -> float:
    # Some exports write a decimal comma.
    try:
        value = float(properties.get(name, "nan").replace(",", "."))
    except ValueError:
        return math.nan
    return value if value > 0 else math.nan
