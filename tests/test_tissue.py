from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path
from PIL import Image, ImageFilter
from pydantic import ValidationError
from scipy import ndimage
from skimage.filters import threshold_otsu

from modalities.pathology import PathologySpec, overview, tiles, tissue
from tests.slides_on_disk import scene


def test_blank_and_black_hold_no_tissue() -> None:
    rng = np.random.default_rng(0)
    noisy_glass = rng.normal(240, 3, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    nearly_black = rng.integers(0, 12, (200, 200, 3), dtype=np.uint8)
    for rgb in (np.full((200, 200, 3), 255, np.uint8), noisy_glass, nearly_black):
        assert not tissue.otsu_mask(rgb, 8.0).any()


def test_a_slide_full_of_tissue_is_not_halved() -> None:
    picture = scene(1000)[200:800, 200:800]
    assert tissue.otsu_mask(picture, 4.0).mean() > 0.95


def test_the_mask_finds_the_disc() -> None:
    mask = tissue.otsu_mask(scene(250), 8.0)
    assert mask.mean() == pytest.approx(math.pi * 0.45**2, rel=0.02)


def test_specks_are_dropped() -> None:
    rgb = np.full((100, 100, 3), 240, np.uint8)
    rgb[10:14, 10:14] = (180, 80, 150)
    assert not tissue.otsu_mask(rgb, 8.0).any()


def test_the_outline_keeps_area_and_holes() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 20:70] = True
    mask[20:30, 30:40] = False
    (feature,) = json.loads(tissue.outline_text(mask, 16.0))["features"]
    outer, hole = (np.array(ring) for ring in feature["geometry"]["coordinates"])
    assert (outer[0] == outer[-1]).all()
    np.testing.assert_allclose(outer.min(axis=0), (20 * 16, 10 * 16), atol=8)
    np.testing.assert_allclose(outer.max(axis=0), (70 * 16, 50 * 16), atol=8)
    np.testing.assert_allclose(hole.min(axis=0), (30 * 16, 20 * 16), atol=8)


@settings(max_examples=60, deadline=None)
@given(
    mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=4, max_side=30)),
    downsample=st.floats(1, 20),
    tile_px=st.integers(32, 100),
    mpp=st.floats(0.2, 0.7),
    fraction=st.floats(0, 1),
)
def test_the_grid_covers_tissue_once(
    mask: np.ndarray, downsample: float, tile_px: int, mpp: float, fraction: float
) -> None:
    size_px = (int(mask.shape[1] * downsample), int(mask.shape[0] * downsample))
    geometry = tiles.tile_geometry(PathologySpec(tile_px=tile_px), mpp)
    coords = tiles.tile_coords(size_px, geometry, mask, downsample, min_tissue_fraction=fraction)
    side = geometry.field_px
    assert abs(side * mpp - tile_px * 0.5) <= mpp / 2 + 1e-9
    covered = np.zeros(size_px, dtype=np.uint8)
    for x, y in coords:
        assert 0 <= x <= size_px[0] - side
        assert 0 <= y <= size_px[1] - side
        covered[x : x + side, y : y + side] += 1
    assert covered.max(initial=0) <= 1
    whole = tiles.tile_coords(
        size_px, geometry, np.ones_like(mask), downsample, min_tissue_fraction=fraction
    )
    kept = {tuple(xy) for xy in coords}
    for x, y in whole:
        left, top = (
            min(round(v / downsample), n - 1) for v, n in ((x, mask.shape[1]), (y, mask.shape[0]))
        )
        right, bottom = (
            max(round((v + side) / downsample), first + 1) for v, first in ((x, left), (y, top))
        )
        share = mask[top:bottom, left:right]
        assert ((x, y) in kept) == (share.any() and share.mean() >= fraction)


@given(n_tiles=st.integers(0, 200), max_tiles=st.integers(1, 250))
def test_a_spread_is_even_and_ordered(n_tiles: int, max_tiles: int) -> None:
    coords = np.arange(2 * n_tiles).reshape(-1, 2)
    kept = tiles.spread(coords, max_tiles)
    assert len(kept) == min(n_tiles, max_tiles)
    steps = np.diff(kept[:, 0]) // 2
    assert len(steps) == 0 or (steps.min() >= 1 and steps.max() - steps.min() <= 1)
    np.testing.assert_array_equal(tiles.spread(coords, None), coords)


def test_overlapping_tiles_step_by_the_stride() -> None:
    geometry = tiles.tile_geometry(PathologySpec(stride_px=112), 0.5)
    mask = np.ones((10, 10), dtype=bool)
    coords = tiles.tile_coords((1000, 1000), geometry, mask, 100.0, min_tissue_fraction=0.5)
    assert geometry == tiles.Geometry(224, 112)
    assert len(coords) == 7 * 7


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    mask = np.zeros((40, 40), dtype=bool)
    mask[10:20, 10:20] = mask[20:30, 20:30] = True
    mask[35:38, 2:9] = True
    features = json.loads(tissue.outline_text(mask, 4.0))["features"]
    assert [len(f["geometry"]["coordinates"]) for f in features] == [1, 1]


@settings(max_examples=40, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=25)))
def test_an_outline_drawn_again_is_the_mask(mask: np.ndarray) -> None:
    """The centre of every pixel lies inside the polygons exactly where the mask is true."""
    rings = [
        Path(ring)
        for feature in json.loads(tissue.outline_text(mask, 10.0))["features"]
        for ring in feature["geometry"]["coordinates"]
    ]
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    centres = (np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) * 10
    crossed = np.zeros(mask.size, dtype=int)
    for ring in rings:
        crossed += ring.contains_points(centres)
    np.testing.assert_array_equal(crossed % 2 == 1, mask.ravel())


def test_the_median_is_that_of_pillow() -> None:
    values = np.random.default_rng(3).integers(0, 256, (37, 41), dtype=np.uint8)
    expected = Image.fromarray(values).filter(ImageFilter.MedianFilter(3))
    np.testing.assert_array_equal(tissue._median(values), np.asarray(expected))


def test_saturation_is_that_of_its_definition() -> None:
    rgb = np.random.default_rng(4).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    high, low = rgb.max(axis=2).astype(float), rgb.min(axis=2).astype(float)
    expected = np.where(high < 30, 0, np.rint(255 * (high - low) / np.maximum(high, 1)))
    np.testing.assert_array_equal(tissue._saturation(rgb), expected)


def test_what_cannot_be_read_counts_as_tissue() -> None:
    glass = np.full((100, 100, 3), 240, np.uint8)
    unread = np.zeros((100, 100), dtype=bool)
    unread[40:60, 40:60] = True
    seen = overview.Overview(glass, 16.0, unread)
    np.testing.assert_array_equal(tissue.find_tissue(seen, 0.5, method="otsu"), unread)
    assert tissue.find_tissue(seen, 0.5, method="none").all()


def test_further_methods_go_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError, match="needed one of none, otsu"):
        PathologySpec(tissue="left_half")

    def left_half(rgb: np.ndarray, mpp: float) -> np.ndarray:
        mask = np.zeros(rgb.shape[:2], dtype=bool)
        mask[:, : rgb.shape[1] // 2] = True
        return mask

    monkeypatch.setitem(tissue.METHODS, "left_half", left_half)
    seen = overview.Overview(scene(100), 16.0, np.zeros((100, 100), dtype=bool))
    found = tissue.find_tissue(seen, 0.5, method=PathologySpec(tissue="left_half").tissue)
    assert found[:, :50].all()
    assert not found[:, 50:].any()


def test_the_picture_shows_the_outline_where_tissue_ends() -> None:
    seen = overview.Overview(scene(250), 4.0, np.zeros((250, 250), dtype=bool))
    mask = tissue.find_tissue(seen, 2.0, method="otsu")
    picture = np.asarray(tissue.outlined(seen, mask))
    drawn = (picture != seen.rgb).any(axis=2)
    rim = ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_erosion(mask, iterations=2)
    assert drawn.sum() > 2 * math.pi * 0.4 * 250
    assert not (drawn & ~rim).any()


def test_a_tall_overview_is_treated_like_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands leave no trace, and the threshold is Otsu's own."""
    picture = scene(600)
    whole = tissue._median(tissue._saturation(picture))
    np.testing.assert_array_equal(tissue._smoothed_saturation(picture), whole)
    high = tissue._SATURATION_BOUNDS[1]
    monkeypatch.setattr(tissue, "_SATURATION_BOUNDS", (0.0, 1.0))
    expected = whole > threshold_otsu(whole)
    assert threshold_otsu(whole) / 255 > high
    np.testing.assert_array_equal(tissue.otsu_mask(picture, 50.0), expected)


def test_the_outline_of_a_huge_mask_covers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = np.zeros((301, 203), dtype=bool)
    mask[31:90, 41:150] = mask[200:301, 150:203] = True
    monkeypatch.setattr(tissue, "_OUTLINE_PX", 20_000)
    features = json.loads(tissue.outline_text(mask, 8.0))["features"]
    rings = [np.array(feature["geometry"]["coordinates"][0]) for feature in features]
    boxes = [(ring.min(axis=0), ring.max(axis=0)) for ring in rings]
    for (low, high), (left, top, right, bottom) in zip(
        boxes, [(41, 31, 150, 90), (150, 200, 203, 301)], strict=True
    ):
        np.testing.assert_allclose(low, (8 * left, 8 * top), atol=16)
        np.testing.assert_allclose(high, (8 * right, 8 * bottom), atol=16)
