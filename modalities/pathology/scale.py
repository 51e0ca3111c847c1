"""Micrometres per pixel of a slide: from the slide itself, or from a table beside it."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import openslide

from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

Source = Literal["stated", "objective", "tiff", "table"]

# Scanners lie between about 0.1 and 10; a TIFF left at 72 or 300 dpi claims 353 or 85.
PLAUSIBLE_MPP = (0.05, 10.0)


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
    user says of a slide that does not know.

    Raises
    ------
    DataError
        ``missing_resolution``.
    """
    found: list[tuple[Source, float]] = [
        ("stated", _stated_mpp(properties)),
        ("objective", _objective_mpp(properties)),
        ("tiff", _tiff_mpp(properties)),
        ("table", math.nan if tabled_mpp is None else tabled_mpp),
    ]
    for source, mpp in found:
        if PLAUSIBLE_MPP[0] <= mpp <= PLAUSIBLE_MPP[1]:
            return Scale(mpp, source)
    raise DataError(
        "missing_resolution",
        "slide: found no plausible resolution, needed micrometres per pixel between "
        f"{PLAUSIBLE_MPP[0]} and {PLAUSIBLE_MPP[1]}; name it in a CSV with columns wsi,mpp, or "
        "export the slide again with its resolution",
    )


class MppTable:
    """Micrometres per pixel that a user states for slides which do not know their own.

    Parameters
    ----------
    by_name
        Per file name, with or without its suffix.
    """

    def __init__(self, by_name: Mapping[str, float]) -> None:
        self._by_name = dict(by_name)

    def of(self, slide: Path) -> float | None:
        """Give what the table says of a slide; None where it is not in it."""
        return self._by_name.get(slide.name, self._by_name.get(slide.stem))


def read_mpp_table(path: Path) -> MppTable:
    """Read a CSV with the columns ``wsi`` and ``mpp``.

    Raises
    ------
    DataError
        ``mpp_table``, if it is not one, or a value is no plausible resolution.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        table = {row["wsi"].strip(): float(row["mpp"]) for row in rows}
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
    if not all(least <= mpp <= most for mpp in table.values()):
        raise DataError(
            "mpp_table",
            f"mpp table: found a value outside {least} to {most}, needed micrometres per pixel",
        )
    return MppTable({Path(name).name: mpp for name, mpp in table.items()})


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
