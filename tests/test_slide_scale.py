from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modalities.cohort import DataError
from modalities.pathology import scale, tiles
from tests.slides_on_disk import code_of


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.25),
        ({"openslide.mpp-x": "0,25", "openslide.mpp-y": "0,25"}, 0.25),
        ({"openslide.mpp-x": "0.400", "openslide.mpp-y": "0.405"}, 0.162**0.5),
        ({"openslide.objective-power": "40"}, 0.25),
        (
            {
                "openslide.objective-power": "40",
                "tiff.XResolution": "20000",
                "tiff.YResolution": "20000",
                "tiff.ResolutionUnit": "centimeter",
            },
            0.25,
        ),
        ({"aperio.AppMag": "20"}, 0.5),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0", "aperio.AppMag": "20"}, 0.5),
        (
            {
                "tiff.XResolution": "20000",
                "tiff.YResolution": "20000",
                "tiff.ResolutionUnit": "centimeter",
            },
            0.5,
        ),
        (
            {
                "tiff.XResolution": "101600",
                "tiff.YResolution": "101600",
                "tiff.ResolutionUnit": "inch",
            },
            0.25,
        ),
    ],
)
def test_scale_comes_from_the_first_plausible_source(
    properties: dict[str, str], mpp: float
) -> None:
    assert scale.slide_scale(properties).mpp == pytest.approx(mpp)


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"},  # 72 dpi, a default
        {"openslide.mpp-x": "nan", "openslide.mpp-y": "nan"},
        {"openslide.mpp-x": "0.5"},
        {"aperio.AppMag": "unknown"},
        {"tiff.XResolution": "1", "tiff.YResolution": "1", "tiff.ResolutionUnit": "none"},
    ],
)
def test_no_plausible_scale_is_refused(properties: dict[str, str]) -> None:
    with pytest.raises(DataError) as error:
        scale.slide_scale(properties)
    assert code_of(error) == "missing_resolution"


def test_what_a_user_states_counts_last() -> None:
    assert scale.slide_scale({}, 0.3) == scale.Scale(0.3, "table")
    stated = {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}
    assert scale.slide_scale(stated, 0.3) == scale.Scale(0.25, "stated")
    assert scale.slide_scale({"aperio.AppMag": "20"}, 0.3) == scale.Scale(0.5, "objective")


def test_a_table_names_slides_with_or_without_suffix(tmp_path: Path) -> None:
    path = tmp_path / "mpp.csv"
    path.write_text("wsi,mpp\na.svs,0.25\nb,0.5\nfolder/c.tif,1\n")
    table = scale.read_mpp_table(path)
    found = [table.of(Path(x)) for x in ("x/a.svs", "a.tif", "b.ndpi", "c.tif", "d.svs")]
    assert found == [0.25, None, 0.5, 1.0, None]


BAD_ROWS = ("a,fine", "a", "a,72", "a,nan")


@pytest.mark.parametrize(
    "content", ["slide,mpp\na,1\n", *(f"wsi,mpp\n{row}\n" for row in BAD_ROWS), None]
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "mpp.csv").write_text(content)
    with pytest.raises(DataError) as error:
        scale.read_mpp_table(tmp_path / "mpp.csv")
    assert code_of(error) == "mpp_table"


def test_the_grid_reaches_the_last_pixel_and_half_of_a_tile_is_enough() -> None:
    mask = np.zeros((4, 6), dtype=bool)
    mask[:, ::2] = True
    coords = tiles.tile_coords((30, 20), tiles.Geometry(10, 10), mask, 5.0, min_tissue_fraction=0.5)
    assert coords.tolist() == [[x, y] for y in (0, 10) for x in (0, 10, 20)]


def test_the_tiles_that_are_kept_of_many_are_from_all_over_the_slide() -> None:
    coords = np.arange(200).reshape(-1, 2)
    np.testing.assert_array_equal(tiles.spread(coords, 10), coords[::10])
