"""Slides that are not what one expects: wrong sizes, wrong scale, pen, links, huge tiles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tifffile import TiffFile, TiffWriter

from modalities import pathology
from modalities.cohort import DataError
from modalities.pathology import (
    PathologySpec,
    cutting,
    overview,
    planning,
    reader,
    reading,
    scale,
    slides,
    stain,
    tiff_index,
    tissue,
)
from tests.slides_on_disk import (
    Averages,
    code_of,
    overwrite,
    scene,
    stored_tile,
    touching,
    write_slide,
)

SPEC = PathologySpec(tile_px=128)


def write_levels(
    path: Path, pictures: list[np.ndarray], resolution: tuple[float, float] = (4e4, 4e4)
) -> Path:
    with TiffWriter(path) as writer:
        for i, picture in enumerate(pictures):
            writer.write(
                picture, tile=(256, 256), compression="jpeg", photometric="rgb",
                resolution=None if i else resolution,
                resolutionunit=None if i else "CENTIMETER", subfiletype=int(i > 0),
            )  # fmt: skip
    return path


def set_size(path: Path, tag_name: str, size: int) -> Path:
    with TiffFile(path) as file:
        tag = file.pages[0].tags[tag_name]
        kind = {3: 2, 4: 4}[int(tag.dtype)]
    overwrite(path, tag.valueoffset, size.to_bytes(kind, "little"))
    return path


def n_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_pixels_that_are_not_square_are_refused_unless_the_table_says_more(tmp_path: Path) -> None:
    path = write_levels(tmp_path / "s.tif", [scene(600)], (4e4, 2e4))
    with pytest.raises(DataError, match="not square") as error:
        pathology.check_slide(path, SPEC)
    assert code_of(error) == "missing_resolution"
    pathology.check_slide(path, SPEC, tabled_mpp=0.5)


@pytest.mark.parametrize("y", ["0.26", "300"])
def test_an_objective_does_not_mend_two_sides_that_differ(y: str) -> None:
    properties = {"openslide.mpp-x": "0.25", "openslide.mpp-y": y, "aperio.AppMag": "40"}
    with pytest.raises(DataError, match="not square"):
        scale.slide_scale(properties)
    assert scale.slide_scale(properties, 0.3) == scale.Scale(0.3, "table")


def test_a_tiffs_own_resolution_is_not_taken_where_its_sides_differ() -> None:
    properties = {
        "tiff.XResolution": "20000", "tiff.YResolution": "40000",
        "tiff.ResolutionUnit": "centimeter",
    }  # fmt: skip
    with pytest.raises(DataError, match="no plausible"):
        scale.slide_scale(properties)


@pytest.mark.parametrize(("second", "is_one"), [("a.svs,0.5", False), ("x/a.svs,0.25", True)])
def test_a_table_with_two_values_for_a_slide_is_refused(
    tmp_path: Path, second: str, is_one: bool
) -> None:
    path = tmp_path / "mpp.csv"
    path.write_text(f"wsi,mpp\na.svs,0.25\n{second}\n")
    if is_one:
        assert scale.read_mpp_table(path).of(tmp_path / "a.svs") == 0.25
        return
    with pytest.raises(DataError, match="two values"):
        scale.read_mpp_table(path)


def test_a_level_that_shows_another_part_is_not_read(tmp_path: Path) -> None:
    """One axis filled up to whole tiles: OpenSlide's downsample is the mean of both."""
    fine = np.kron(scene(900), np.ones((2, 2, 1), dtype=np.uint8))
    coarse = np.pad(scene(900), ((0, 124), (0, 0), (0, 0)), constant_values=243)
    flat = write_levels(tmp_path / "flat.tif", [fine])
    padded = write_levels(tmp_path / "padded.tif", [fine, coarse])
    found = []
    for path in (flat, padded):
        with (
            reader.open_slide(path) as slide,
            reading.tile_reader(slide, tile_px=128, mpp=0.47) as tiles,
        ):
            xy = np.array([[900, 1200]])  # tissue: glass looks the same anywhere
            found.append(tiles.read_tiles(xy, tile_px=128, mpp=0.47).pixels)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("tag", "size", "is_sound"),
    [("ImageWidth", 60_000, False), ("TileWidth", 65_520, False), ("TileLength", 12_288, True)],
)
def test_a_slide_whose_tiles_do_not_fit_its_size_fails_alone(
    tmp_path: Path, tag: str, size: int, is_sound: bool
) -> None:
    path = set_size(write_slide(tmp_path / "s.tif", scene(600)), tag, size)
    if tag == "TileWidth":
        set_size(path, "TileLength", 12_288)
    index = tiff_index.read_index(path)
    assert index is not None
    assert index.jpeg_levels == ()
    assert index.is_sound == is_sound
    if not is_sound:
        with pytest.raises(DataError) as error:
            pathology.check_slide(path, SPEC)
        assert code_of(error) == "unreadable_slide"
        return
    with reader.open_slide(path) as slide, reading.tile_reader(slide, tile_px=128, mpp=0.5) as x:
        assert x.name == "openslide"
        assert not x.read_tiles(np.array([[200, 200]]), tile_px=128, mpp=0.5).decoded.any()


@pytest.mark.parametrize("share", [0.05, 0.5, 0.93])
def test_zeros_in_a_jpeg_2000_tile_are_damage(tmp_path: Path, share: float) -> None:
    """OpenSlide shows the rest of it, blurred, without a word."""
    noise = np.random.default_rng(3).normal(0, 12, (1000, 1000, 3))
    path = write_slide(
        tmp_path / "s.svs", (scene(1000) + noise).clip(0, 255).astype(np.uint8),
        compression="aperio_jp2000_rgb", compressionargs={"level": 40}, metadata=None,
        description="Aperio Image Library v12\n1000x1000|AppMag = 20|MPP = 0.5",
    )  # fmt: skip
    xy = np.stack(np.meshgrid(*[np.arange(0, 900, 100)] * 2), axis=-1).reshape(-1, 2)
    found = []
    at, n_bytes = stored_tile(path, 5)
    for _ in range(2):
        with (
            reader.open_slide(path) as slide,
            reading.tile_reader(slide, tile_px=100, mpp=0.5) as x,
        ):
            found.append(x.read_tiles(xy, tile_px=100, mpp=0.5))
        overwrite(path, at + int(n_bytes * share), bytes(600))
    whole, torn = found
    hit = touching(xy, 100, (256, 256, 512, 512))
    assert whole.decoded.all()
    np.testing.assert_array_equal(torn.decoded, ~hit)
    np.testing.assert_array_equal(torn.pixels[~hit], whole.pixels[~hit])
    assert not torn.pixels[hit].any()


def test_a_slide_that_went_away_is_undecodable(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1100), tile=(128, 128))
    n_open = n_descriptors()
    with reader.open_slide(path) as slide:
        assert slide.index is not None
        path.unlink()
        with pytest.raises(reader.Undecodable):
            overview.scaled_overview(slide, 0, 16)
        with (
            pytest.raises(reader.Undecodable),
            reading.tile_reader(slide, tile_px=128, mpp=0.5, n_threads=1),
        ):
            pass
    assert n_descriptors() == n_open


def test_a_tile_at_the_rim_is_cut_from_inside_the_level() -> None:
    """Corner and side are rounded each, and could pass the edge by a pixel of glass."""
    levels = (reader.Level((48330, 48330), 1.0), reader.Level((24165, 24165), 2.0))
    how = cutting.cut(reader.SlideInfo(0.2522, levels), tile_px=256, mpp=1.0)
    field = cutting.side_at_level_0(256, 1.0, 0.2522)
    ((x, y),) = how.corners(np.array([[48330 - field] * 2]))
    assert (how.level, x + how.side_px, y + how.side_px) == (1, 24165, 24165)


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_wide_fields_are_read_few_at_a_time_and_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1500), compression=compression)
    found = []
    for most in (cutting._MOST_PIXELS, 3 * 256**2, 1):
        monkeypatch.setattr(cutting, "_MOST_PIXELS", most)
        with reader.open_slide(path) as slide:
            coords = planning.plan_slide(slide, SPEC.model_copy(update={"tile_mpp": 1.0})).coords
            with reading.tile_reader(slide, tile_px=128, mpp=1.0) as tiles:
                found.append(tiles.read_tiles(coords, tile_px=128, mpp=1.0).pixels)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_huge_stored_tile_is_sampled_and_decoded_in_small(tmp_path: Path) -> None:
    """Each band would have it decoded anew."""
    path = write_slide(tmp_path / "s.tif", scene(2200), tile=(2048, 2048))
    with reader.open_slide(path) as slide:
        direct = overview.scaled_overview(slide, 0, 16)
        slide.__dict__["index"] = None
        expected = overview.thumbnail(slide, 16.0)
    assert direct is not None
    assert np.abs(direct.rgb.astype(int) - expected.rgb).mean() < 1


def test_pen_does_not_hide_pale_tissue() -> None:
    picture = np.full((400, 400, 3), 243, dtype=np.uint8)
    picture[100:300, 100:300] = (228, 200, 222)
    alone = tissue.otsu_mask(picture, 8.0)
    assert alone[105:295, 105:295].all()
    picture[:60] = (30, 60, 170)
    found = tissue.otsu_mask(picture, 8.0)
    np.testing.assert_array_equal(found[70:], alone[70:])
    assert found[:55].all()


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_pen_does_not_pass_for_a_dye(method: stain.Method) -> None:
    tiles = np.array(Image.fromarray(scene(1000)).crop((300, 300, 700, 700)))[None]
    expected = stain.measure(tiles, method)
    inked = np.concatenate([tiles, np.full_like(tiles, (20, 140, 60))[:, :40]], axis=1)
    assert stain.measure(inked, method) == pytest.approx(np.array(expected), abs=1e-9)


class Replacing(Averages):
    """Has another slide put into the place of the one that is read."""

    def __init__(self, path: Path, other: Path) -> None:
        super().__init__()
        self.path, self.other = path, other

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        if self.other.exists():
            self.other.replace(self.path)
        return super().embed(tiles)


@pytest.mark.parametrize("is_same", [False, True])
def test_a_slide_that_is_replaced_while_it_is_read_leaves_no_rows(
    tmp_path: Path, is_same: bool
) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1000))
    other = write_slide(tmp_path / "other", scene(1000) if is_same else scene(1000)[::-1].copy())
    out = tmp_path / "s.h5"
    if is_same:
        assert other.read_bytes() == path.read_bytes()
        pathology.extract_slide(path, out, SPEC, Replacing(path, other))
        return
    with pytest.raises(DataError) as error:
        pathology.extract_slide(path, out, SPEC, Replacing(path, other))
    assert code_of(error) == "changed_slide"
    assert not list(tmp_path.glob("s.h5*"))
    pathology.extract_slide(path, out, SPEC, Averages())


def test_the_outline_beside_a_bag_counts_from_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide(tmp_path / "s.tif", scene(600))
    corners = []
    for shown_from in ((0, 0), (50, 20)):
        monkeypatch.setattr(reader.Slide, "shown_from", shown_from)
        pathology.extract_slide(path, tmp_path / "s.h5", SPEC, Averages())
        (feature,) = json.loads((tmp_path / "s.geojson").read_text())["features"]
        corners.append(np.array(feature["geometry"]["coordinates"][0]).min(axis=0))
    np.testing.assert_allclose(corners[0] - corners[1], (50, 20))


def test_an_outline_counts_from_where_a_viewer_begins(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:9, 10:15] = True
    corners = []
    for shown_from in ((0, 0), (70, 30)):
        features = json.loads(tissue.outline_text(mask, 10.0, shown_from=shown_from))["features"]
        corners.append(np.array(features[0]["geometry"]["coordinates"][0]).min(axis=0))
    np.testing.assert_allclose(corners[0] - corners[1], (70, 30))
    with reader.open_slide(write_slide(tmp_path / "s.tif", scene(600))) as slide:
        assert slide.shown_from == (0, 0)
        bounds = {"x": "70", "y": "30", "width": "500", "height": "400"}
        slide.properties = {f"openslide.bounds-{name}": value for name, value in bounds.items()}
        assert slide.shown_from == (70, 30)
        slide.properties["openslide.bounds-width"] = "600"
        assert slide.shown_from == (0, 0)


def test_a_slide_with_a_name_too_long_fails_alone(tmp_path: Path) -> None:
    path = write_slide(tmp_path / f"{'x' * 240}.tif", scene(600))
    with pytest.raises(DataError) as error:
        pathology.extract_slide(path, tmp_path / f"{path.stem}.h5", SPEC, Averages())
    assert code_of(error) == "long_name"
    assert "xxx" not in str(error.value)


def test_slides_are_found_behind_links_to_folders(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "no.png")
    store, study = tmp_path / "store", tmp_path / "study"
    (store / "one").mkdir(parents=True)
    study.mkdir()
    (store / "one" / "a.svs").touch()
    (study / "b.tif").touch()
    (study / "linked").symlink_to(store)
    (store / "one" / "back").symlink_to(study)
    found = slides.find_slides(study)
    assert [path.relative_to(study).as_posix() for path in found] == ["b.tif", "linked/one/a.svs"]
