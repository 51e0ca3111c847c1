"""Where the tiles of a slide lie, before any is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modalities.cohort import DataError
from modalities.pathology.overview import thumbnail
from modalities.pathology.reader import check_whole, open_slide
from modalities.pathology.tiles import Geometry, spread, tile_coords, tile_geometry
from modalities.pathology.tissue import find_tissue, overview_downsample

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from modalities.pathology.overview import Overview
    from modalities.pathology.reader import Slide
    from modalities.pathology.spec import PathologySpec


@dataclass(frozen=True)
class Plan:
    """Tiles of one slide and the tissue that they cover.

    Parameters
    ----------
    coords
        (n, 2) upper left corners at level 0.
    mask
        (h, w) tissue, in pixels of ``overview``.
    """

    coords: NDArray[np.int64]
    geometry: Geometry
    mask: NDArray[np.bool_]
    overview: Overview


def check_slide(path: Path, spec: PathologySpec, *, tabled_mpp: float | None = None) -> None:
    """Check that a slide opens, has a scale, is whole and holds tissue, without encoding it.

    Raises
    ------
    DataError
        ``missing_file``, ``not_a_slide``, ``missing_resolution``, ``unreadable_slide``,
        ``too_coarse`` or ``no_tissue``.
    """
    with open_slide(path, tabled_mpp=tabled_mpp) as slide:
        plan_slide(slide, spec)


def plan_slide(slide: Slide, spec: PathologySpec) -> Plan:
    """Find the tissue of a slide and lay the grid over it.

    Raises
    ------
    DataError
        ``unreadable_slide``, ``too_coarse`` or ``no_tissue``.
    """
    geometry = tile_geometry(spec, slide.mpp)
    check_whole(slide)
    overview = thumbnail(slide, overview_downsample(slide.size_px, slide.mpp))
    mask = find_tissue(overview, slide.mpp, method=spec.tissue)
    coords = tile_coords(
        slide.size_px,
        geometry,
        mask,
        overview.downsample,
        min_tissue_fraction=spec.min_tissue_fraction,
    )
    if not len(coords):
        raise DataError(
            "no_tissue",
            f"slide: found tissue on {mask.mean():.1%} of it and no tile with enough, needed one "
            f"tile with {spec.min_tissue_fraction:.0%}; check the scan or lower the fraction",
        )
    return Plan(spread(coords, spec.max_tiles), geometry, mask, overview)
