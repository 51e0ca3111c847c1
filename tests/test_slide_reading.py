from __future__ import annotations

import dataclasses
import struct
from typing import TYPE_CHECKING

import numpy as np
import openslide
import pytest
import simplejpeg
from PIL import Image
from tifffile import TiffFile, TiffWriter

from modalities import pathology
from modalities.cohort import DataError
from modalities.pathology import (
    PathologySpec,
    cutting,
    jpeg_tiff,
    overview,
    planning,
    reader,
    reading,
    tiff_index,
    workers,
)
from tests.slides_on_disk import (
    code_of,
    overwrite,
    real_slide,
    scene,
    stored_tile,
    touching,
    with_hole,
    write_slide,
)

if TYPE_CHECKING:
    from pathlib import Path

SPEC = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")


@pytest.fixture
def cmu(shared_data: Path) -> Path:
    return real_slide(shared_data)


def read(
    path: Path, *, openslide_only: bool = False, **fields: object
) -> tuple[np.ndarray, cutting.Tiles, str]:
    """Corners, tiles and the name of the reader, for the tiles that a spec asks for."""
    spec = SPEC.model_copy(update=fields)
    with reader.open_slide(path) as slide:
        coords = planning.plan_slide(slide, spec).coords
        if openslide_only:
            slide.__dict__["index"] = None
        with reading.tile_reader(slide, tile_px=spec.tile_px, mpp=spec.tile_mpp) as found:
            return coords, in_batches(found, coords, spec), found.name


def in_batches(found: cutting.TileReader, coords: np.ndarray, spec: PathologySpec) -> cutting.Tiles:
    scale = {"tile_px": spec.tile_px, "mpp": spec.tile_mpp}
    found.expect(coords, **scale)
    parts = [found.read_tiles(coords[i : i + 5], **scale) for i in range(0, len(coords), 5)]
    return cutting.Tiles(*(np.concatenate(x) for x in zip(*parts, strict=True)))


def box_of(path: Path, number: int) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a stored tile."""
    with TiffFile(path) as file:
        page = file.pages[0]
        columns = -(-page.imagewidth // page.tilewidth)
        left, top = number % columns * page.tilewidth, number // columns * page.tilelength
        return left, top, left + page.tilewidth, top + page.tilelength


def test_tiles_have_the_same_physical_size_on_every_scanner(tmp_path: Path) -> None:
    at_half = write_slide(tmp_path / "half.tif", scene(1000), mpp=0.5, compression="deflate")
    fine = np.kron(scene(1000), np.ones((2, 2, 1), dtype=np.uint8))
    at_quarter = write_slide(tmp_path / "quarter.tif", fine, mpp=0.25, compression="deflate")
    (coarse, one, _), (fine, two, _) = (read(path) for path in (at_half, at_quarter))
    np.testing.assert_array_equal(2 * coarse, fine)
    assert np.abs(one.pixels.astype(int) - two.pixels).mean() < 1.0


def test_a_pyramid_level_serves_where_it_has_the_scale(tmp_path: Path) -> None:
    fine = np.kron(scene(1000), np.ones((2, 2, 1), dtype=np.uint8))
    flat = write_slide(tmp_path / "flat.tif", fine, mpp=0.25, compression="deflate")
    pyramid = write_slide(tmp_path / "p.tif", fine, mpp=0.25, levels=2, compression="deflate")
    with reader.open_slide(pyramid) as slide:
        assert slide.info.level_for(2.0) == (1, 2.0)
        assert slide.info.level_for(1.9) == (0, 1.0)
        assert slide.info.level_for(0.4) == (0, 1.0)
    (one, from_flat, _), (two, from_pyramid, _) = read(flat), read(pyramid)
    np.testing.assert_array_equal(one, two)
    assert np.abs(from_flat.pixels.astype(int) - from_pyramid.pixels).mean() < 1.0


@pytest.mark.parametrize("mpp", [0.2, 0.2522, 0.3, 0.499, 0.5, 0.7])
def test_tiles_equal_single_reads_with_pillow(tmp_path: Path, mpp: float) -> None:
    picture = scene(1000)
    path = write_slide(tmp_path / "slide.tif", picture, mpp=mpp, compression="deflate")
    coords, found, _ = read(path, max_tiles=6)
    field_px = round(224 * 0.5 / mpp)
    for (x, y), tile in zip(coords, found.pixels, strict=True):
        field = Image.fromarray(picture[y : y + field_px, x : x + field_px])
        expected = np.asarray(field.resize((224, 224), Image.Resampling.BICUBIC))
        # Two implementations with their own fixed-point weights.
        assert np.abs(tile.astype(int) - expected).max() <= 2


def test_a_coarser_slide_is_not_blown_up(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "coarse.tif", scene(), mpp=1.0)
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, SPEC)
    assert code_of(error) == "too_coarse"


YCBCR = {"photometric": "ycbcr", "subsampling": (2, 2)}


@pytest.mark.parametrize("options", [{}, YCBCR, {"photometric": "ycbcr", "subsampling": (2, 1)}])
@pytest.mark.parametrize("mpp", [0.5, 0.25, 0.2522])
@pytest.mark.parametrize("levels", [1, 3])
def test_stored_jpeg_tiles_show_openslides_pixels(
    tmp_path: Path, options: dict[str, object], mpp: float, levels: int
) -> None:
    picture = scene(1990)  # the last stored tiles are cut off by the edges
    path = write_slide(tmp_path / "s.tif", picture, mpp=mpp, levels=levels, **options)
    coords, found, name = read(path, tissue="none", min_tissue_fraction=0.0)
    same, expected, _ = read(path, openslide_only=True, tissue="none", min_tissue_fraction=0.0)
    assert name == "jpeg_tiff"
    assert found.decoded.all()
    np.testing.assert_array_equal(coords, same)
    np.testing.assert_array_equal(found.pixels, expected.pixels)


@pytest.mark.parametrize("fields", [{}, {"tile_mpp": 1.0}, {"stride_px": 100}, {"tile_px": 100}])
def test_a_real_slide_shows_openslides_pixels(cmu: Path, fields: dict[str, object]) -> None:
    coords, found, name = read(cmu, **fields)
    _, expected, other = read(cmu, openslide_only=True, **fields)
    assert (name, other) == ("jpeg_tiff", "openslide")
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    if not fields:
        with openslide.OpenSlide(cmu) as handle:
            shown = [handle.read_region(xy, 0, (224, 224)).convert("RGB") for xy in coords]
        np.testing.assert_array_equal(found.pixels, np.stack([np.asarray(x) for x in shown]))


def test_each_stored_tile_is_decoded_once(cmu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    plain = reading.StoredReader._decoded

    def counting(self: object, i: int) -> np.ndarray | None:
        decoded.append(i)
        return plain(self, i)

    with reader.open_slide(cmu) as slide:
        spec = SPEC.model_copy(update={"tissue": "none"})
        coords = planning.plan_slide(slide, spec).coords
        with reading.tile_reader(slide, tile_px=224, mpp=0.5) as found:
            monkeypatch.setattr(reading.StoredReader, "_decoded", counting)
            in_batches(found, coords, spec)
            assert found._stored._kept == {}
    assert len(decoded) == len(set(decoded)) == 9 * 13  # the last column holds no whole tile


@pytest.mark.parametrize("which", [range(16), [10], [15]], ids=["all", "middle", "last"])
@pytest.mark.parametrize("n_pixels", [1, 65536])
def test_a_reader_that_shows_other_pixels_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: list[int], n_pixels: int
) -> None:
    path = write_slide(tmp_path / "s.tif", scene(), photometric="ycbcr")
    plain = reading.StoredReader._decoded

    def redder(self: object, i: int) -> np.ndarray | None:
        pixels = plain(self, i)
        if pixels is not None and i in which:
            pixels.reshape(-1, 3)[:n_pixels, 0] ^= 1
        return pixels

    monkeypatch.setattr(reading.StoredReader, "_decoded", redder)
    _, found, name = read(path)
    assert name == "openslide"
    assert found.decoded.all()


@pytest.mark.parametrize(("refused", "reader_name"), [([0], "jpeg_tiff"), ([0, 15], "openslide")])
def test_a_reader_that_refuses_what_openslide_shows_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: list[int], reader_name: str
) -> None:
    path = write_slide(tmp_path / "s.tif", scene())
    plain = reading.StoredReader._decoded

    def choosy(self: object, i: int) -> np.ndarray | None:
        return None if i in refused else plain(self, i)

    monkeypatch.setattr(reading.StoredReader, "_decoded", choosy)
    assert read(path)[2] == reader_name


def test_a_stored_picture_of_another_size_is_damage(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(), compressionargs={"level": 95})
    at, n_bytes = stored_tile(path, 5)
    small = simplejpeg.encode_jpeg(np.full((64, 64, 3), 90, dtype=np.uint8), colorspace="RGB")
    assert len(small) < n_bytes
    with TiffFile(path) as file:
        tag = file.pages[0].tags["TileByteCounts"]
        kind = {3: "<H", 4: "<I", 16: "<Q"}[int(tag.dtype)]
    overwrite(path, at, small)
    overwrite(path, tag.valueoffset + 5 * struct.calcsize(kind), struct.pack(kind, len(small)))
    coords, found, name = read(path, tissue="none", tile_px=64)
    hit = touching(coords, 64, box_of(path, 5))
    assert name == "jpeg_tiff"
    np.testing.assert_array_equal(found.decoded, ~hit)


def test_of_two_pages_of_one_size_none_is_taken_for_the_level(tmp_path: Path) -> None:
    with reader.open_slide(write_slide(tmp_path / "s.tif", scene())) as slide:
        index = slide.index
        assert index is not None
        assert jpeg_tiff.stored_tiles(slide, 0) is index.jpeg_levels[0]
        slide.__dict__["index"] = dataclasses.replace(index, jpeg_levels=2 * index.jpeg_levels)
        assert jpeg_tiff.stored_tiles(slide, 0) is None


def test_a_slide_of_rules_of_its_own_is_read_through_openslide(tmp_path: Path) -> None:
    tags = [(271, "s", 0, "Hamamatsu", True), (65420, "I", 1, 1, True)]
    path = write_slide(tmp_path / "s.tif", scene(), extratags=tags)
    assert tiff_index.read_index(path) is None
    assert tiff_index.read_index(write_slide(tmp_path / "t.tif", scene())) is not None


@pytest.mark.parametrize(
    ("number", "page", "is_whole"), [(3, 0, True), (15, 0, False), (3, 1, False)]
)
def test_the_last_pixels_tell_whether_a_slide_without_an_index_is_whole(
    tmp_path: Path, number: int, page: int, is_whole: bool
) -> None:
    path = with_hole(write_slide(tmp_path / "s.tif", scene(), levels=2), number, page)
    with reader.open_slide(path) as slide:
        reader.check_whole(slide)
        slide.__dict__["index"] = None
        if is_whole:
            reader.check_whole(slide)
            return
        with pytest.raises(DataError) as error:
            reader.check_whole(slide)
        assert code_of(error) == "unreadable_slide"


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("n_items", [0, 1, 2, 10])
def test_threads_give_results_in_the_order_of_the_items(n_threads: int, n_items: int) -> None:
    threads = workers.Workers(n_threads)
    assert threads.map(lambda x: x * x, range(n_items)) == [x * x for x in range(n_items)]
    threads.close()


APERIO = {
    "description": "Aperio Image Library v12\n1000x1000|AppMag = 20|MPP = 0.5",
    "metadata": None,
}


@pytest.mark.parametrize(
    ("compression", "options"), [("deflate", {}), ("lzw", {}), ("aperio_jp2000_rgb", APERIO)]
)
def test_other_formats_are_read_through_openslide(
    tmp_path: Path, compression: str, options: dict[str, object]
) -> None:
    path = write_slide(tmp_path / "s.svs", scene(), compression=compression, **options)
    _, found, name = read(path)
    assert name == "openslide"
    assert found.decoded.all()


def test_a_level_with_an_odd_downsample_is_still_read_directly(tmp_path: Path) -> None:
    """There OpenSlide starts between two pixels and blends them; the stored ones are right."""
    rng = np.random.default_rng(1)
    fine = np.asarray(Image.fromarray(scene(500)).resize((2051, 2049)))
    noise = rng.normal(0, 12, fine.shape)
    fine = (fine + noise).clip(0, 255).astype(np.uint8)
    coarse = np.ascontiguousarray(fine[: 2 * 1024 : 2, : 2 * 1024 : 2])
    path = tmp_path / "s.tif"
    with TiffWriter(path) as writer:
        for level, picture in enumerate((fine, coarse)):
            writer.write(
                picture, tile=(256, 256), compression="jpeg", photometric="rgb",
                resolution=(4e4, 4e4), resolutionunit="CENTIMETER", subfiletype=int(level > 0),
            )  # fmt: skip
    coords, found, name = read(path)
    with reader.open_slide(path) as slide:
        level, downsample = slide.info.level_for(2.0)
        assert (level, downsample == 2.0) == (1, False)
    assert name == "jpeg_tiff"
    with TiffFile(path) as file:
        stored = file.pages[1].asarray()
    for (x, y), tile in zip(np.rint(coords / downsample).astype(int), found.pixels, strict=True):
        np.testing.assert_array_equal(tile, stored[y : y + 224, x : x + 224])


def test_tiles_never_scanned_are_what_openslide_says(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1000))
    with TiffFile(path) as file:
        tag = file.pages[0].tags["TileByteCounts"]
        at = tag.valueoffset + 5 * {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
    overwrite(path, at, bytes({3: 2, 4: 4, 16: 8}[int(tag.dtype)]))
    coords, found, name = read(path, tissue="none")
    _, expected, _ = read(path, tissue="none", openslide_only=True)
    assert name == "jpeg_tiff"
    assert found.decoded.all()
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    inside = touching(coords, 224, box_of(path, 5))
    assert (found.pixels[inside] == 255).any()


def _damage(path: Path, kind: str, picture: np.ndarray) -> Path:
    if kind == "text":
        path.write_text("patient,slide\n" * 40)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no scale":
        write_slide(path, picture, mpp=None)
    elif kind == "blank":
        write_slide(path, np.full_like(picture, 244))
    return path


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("text", "not_a_slide"),
        ("empty", "not_a_slide"),
        ("no scale", "missing_resolution"),
        ("blank", "no_tissue"),
        ("absent", "missing_file"),
    ],
)
def test_a_bad_slide_has_its_code_and_tells_no_path(tmp_path: Path, kind: str, code: str) -> None:
    path = _damage(tmp_path / "P0017.tif", kind, scene(600))
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, SPEC)
    assert code_of(error) == code
    assert "P0017" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("levels", [1, 3])
def test_a_slide_that_broke_off_is_unreadable(tmp_path: Path, share: float, levels: int) -> None:
    whole = write_slide(tmp_path / "whole.tif", scene(), levels=levels).read_bytes()
    path = tmp_path / "cut.tif"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, SPEC)
    assert code_of(error) == "unreadable_slide"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_real_slide_that_broke_off_is_unreadable(tmp_path: Path, cmu: Path, share: float) -> None:
    whole = cmu.read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, SPEC)
    assert code_of(error) == "unreadable_slide"


def test_a_slide_whose_directories_come_first_is_seen_to_have_broken_off(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(), levels=2)  # OpenSlide reads all of the last
    pathology.check_slide(path, SPEC)
    with TiffFile(path) as file:
        tag = file.pages[0].tags["TileOffsets"]
        kind = {4: "<I", 16: "<Q"}[int(tag.dtype)]
    at = tag.valueoffset + 15 * struct.calcsize(kind)
    overwrite(path, at, struct.pack(kind, path.stat().st_size - 8))
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, SPEC)
    assert code_of(error) == "unreadable_slide"


def spoil(path: Path, number: int, how: str) -> None:
    """Damage one stored tile."""
    at, n_bytes = stored_tile(path, number)
    middle = at + n_bytes // 2
    if how == "zeroed":
        overwrite(path, at, bytes(n_bytes))
    elif how == "half":
        overwrite(path, middle, bytes(n_bytes - n_bytes // 2))
    elif how == "few bytes":
        overwrite(path, middle, bytes(20))
    elif how == "no end":
        overwrite(path, at + n_bytes - 2, bytes(2))
    elif how == "early end":
        overwrite(path, middle, b"\xff\xd9")


@pytest.mark.parametrize("how", ["zeroed", "half", "few bytes", "no end", "early end"])
@pytest.mark.parametrize("openslide_only", [False, True])
def test_a_damaged_tile_is_marked_and_no_other_differs(
    tmp_path: Path, cmu: Path, how: str, openslide_only: bool
) -> None:
    path = tmp_path / "slide.svs"
    path.write_bytes(cmu.read_bytes())
    coords, whole, _ = read(path)
    # In the middle of the tissue: 24th and 44th of 10 columns of stored tiles.
    number = max((24, 44, 63), key=lambda i: touching(coords, 224, box_of(path, i)).sum())
    spoil(path, number, how)
    found_coords, found, name = read(path, openslide_only=openslide_only)
    assert name == ("openslide" if openslide_only else "jpeg_tiff")
    common = (found_coords[:, None] == coords[None]).all(axis=2)
    assert common.any(axis=0).all()
    hit = touching(found_coords, 224, box_of(path, number))
    assert 2 <= hit.sum() <= 6
    np.testing.assert_array_equal(found.decoded, ~hit)
    assert (found.pixels[hit] == 0).all()
    at = common.argmax(axis=1)[~hit]
    assert common[~hit].any(axis=1).all()
    np.testing.assert_array_equal(found.pixels[~hit], whole.pixels[at])


def test_a_flipped_byte_is_seen(tmp_path: Path, cmu: Path) -> None:
    """OpenSlide shows garbage here without a word."""
    path = tmp_path / "slide.svs"
    path.write_bytes(cmu.read_bytes())
    at, n_bytes = stored_tile(path, 43)
    overwrite(path, at + n_bytes // 2, bytes([cmu.read_bytes()[at + n_bytes // 2] ^ 0x55]))
    coords, found, _ = read(path)
    hit = touching(coords, 224, box_of(path, 43))
    assert hit.any()
    np.testing.assert_array_equal(found.decoded, ~hit)


def test_a_damaged_overview_is_read_from_a_finer_level(tmp_path: Path) -> None:
    whole = write_slide(tmp_path / "whole.tif", scene(2000), levels=5)
    broken = tmp_path / "broken.tif"
    broken.write_bytes(whole.read_bytes())
    with_hole(broken, 0, page=4)
    with reader.open_slide(whole) as one, reader.open_slide(broken) as two:
        expected, found = (overview.thumbnail(x, 16.0) for x in (one, two))
    assert not found.unread.any()
    assert np.abs(found.rgb.astype(int) - expected.rgb).mean() < 8  # levels are not means


def test_what_is_damaged_at_every_level_is_left_unread(tmp_path: Path) -> None:
    path = with_hole(write_slide(tmp_path / "s.tif", scene(1000)), 5)
    with reader.open_slide(path) as slide:
        found = overview.thumbnail(slide, 4.0)
        again = overview.thumbnail(slide, 4.0)
    expected = np.zeros((250, 250), dtype=bool)
    expected[64:128, 64:128] = True
    np.testing.assert_array_equal(found.unread, expected)
    np.testing.assert_array_equal(found.rgb, again.rgb)
    with reader.open_slide(path) as slide:
        touched = overview.thumbnail(slide, 7.0)  # stored tiles end within its pixels
    assert touched.unread[36:74, 36:74].all()
    assert touched.unread.sum() == 38 * 38


@pytest.mark.parametrize("options", [{}, YCBCR])
@pytest.mark.parametrize("downsample", [4.0, 8.0, 16.0, 24.0])
def test_an_overview_of_a_flat_slide_is_what_openslide_shows_in_small(
    tmp_path: Path, options: dict[str, object], downsample: float
) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1100), **{"tile": (128, 128), **options})
    with reader.open_slide(path) as slide:
        direct = overview.scaled_overview(slide, 0, int(downsample))
        found = overview.thumbnail(slide, downsample)
        slide.__dict__["index"] = None
        expected = overview.thumbnail(slide, downsample)
    assert direct is not None
    np.testing.assert_array_equal(found.rgb, direct.rgb)
    assert found.rgb.shape == expected.rgb.shape
    assert found.downsample == expected.downsample == downsample
    assert not found.unread.any()
    assert np.abs(found.rgb.astype(int) - expected.rgb).mean() < 1


def test_damage_of_a_flat_slide_is_seen_in_small(tmp_path: Path) -> None:
    path = with_hole(write_slide(tmp_path / "s.tif", scene(1100), tile=(128, 128)), 25)
    with reader.open_slide(path) as slide:
        assert overview.scaled_overview(slide, 0, 16) is not None
        found = overview.thumbnail(slide, 16.0)
        slide.__dict__["index"] = None
        expected = overview.thumbnail(slide, 16.0)
    assert found.unread.sum() == 8 * 8
    np.testing.assert_array_equal(found.unread, expected.unread)


def test_an_overview_in_small_that_shows_something_else_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1100), tile=(128, 128))
    plain = overview._SmallTiles._tile

    def redder(self: object, i: int) -> np.ndarray | None:
        pixels = plain(self, i)
        return None if pixels is None else np.roll(pixels, 1, axis=2)

    monkeypatch.setattr(overview._SmallTiles, "_tile", redder)
    with reader.open_slide(path) as slide:
        assert overview.scaled_overview(slide, 0, 16) is None


def test_a_slide_of_which_no_sample_is_whole_is_read_through_openslide(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1000))
    for number in range(16):
        with_hole(path, number)
    _, found, name = read(path)
    assert name == "openslide"
    assert not found.decoded.any()
