from __future__ import annotations

import csv
import json
import math
from typing import TYPE_CHECKING

import h5py
import numpy as np
import openslide
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pydantic import ValidationError
from skimage import data as pictures
from tifffile import TiffFile, TiffWriter

from modalities import pathology
from modalities.cohort import DataError
from modalities.pathology import PathologySpec, network, reader, tiles, tissue

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from modalities.pathology.network import TileEncoder

# A network of timm's own tests: random weights, 160 px, a millisecond a tile.
TINY = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")
SIDE_PX = 1000


def scene(side_px: int = SIDE_PX) -> np.ndarray:
    """A disc of tissue on glass, the same picture at every size."""
    rng = np.random.default_rng(7)
    coarse = rng.normal((190, 110, 165), 25, (50, 50, 3)).clip(0, 255).astype(np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC))
    y, x = (np.mgrid[:side_px, :side_px] + 0.5) / side_px - 0.5
    picture[x**2 + y**2 > 0.45**2] = 243
    return picture


def write_slide(
    path: Path,
    picture: np.ndarray,
    *,
    mpp: float | None = 0.5,
    levels: int = 1,
    compression: str = "jpeg",
) -> Path:
    per_cm = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
    with TiffWriter(path) as writer:
        for level in range(levels):
            writer.write(
                np.ascontiguousarray(picture[:: 2**level, :: 2**level]),
                tile=(256, 256),
                compression=compression,
                photometric="rgb",
                resolution=per_cm if level == 0 else None,
                resolutionunit="CENTIMETER" if per_cm and level == 0 else None,
                subfiletype=int(level > 0),
            )
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small batches lose more to waiting threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny() -> TileEncoder:
    return pathology.load_tile_encoder(TINY)


@pytest.fixture(scope="session")
def default() -> TileEncoder:
    return pathology.load_tile_encoder(PathologySpec(precision="fp32"))


@pytest.fixture(scope="session")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tif", scene())


@pytest.fixture
def cmu(shared_data: Path) -> Path:
    path = shared_data / "slide_cmu1_small" / "cmu_small_region.svs"
    if not path.is_file():
        pytest.skip("real slide not found: CONSILIUM_DATA has no slide_cmu1_small")
    return path


def code_of(error: pytest.ExceptionInfo[DataError]) -> str:
    return error.value.code


def attrs_of(path: Path) -> tuple[dict[str, object], dict[str, object]]:
    with h5py.File(path, "r") as file:
        return dict(file["coords"].attrs), dict(file.attrs)


def test_the_fingerprint_follows_every_field() -> None:
    specs = [
        PathologySpec(),
        PathologySpec(encoder="resnet18"),
        PathologySpec(tile_mpp=0.25),
        PathologySpec(max_tiles=10),
    ]
    assert len({spec.fingerprint() for spec in specs}) == len(specs)
    assert PathologySpec().fingerprint() == PathologySpec(tile_px=224).fingerprint()


@pytest.mark.parametrize(
    "fields", [{"tile_px": 0}, {"tile_mpp": math.nan}, {"min_tissue_fraction": 1.1}, {"mpp": 0.5}]
)
def test_a_spec_refuses_what_makes_no_sense(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        PathologySpec(**fields)


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.25),
        ({"openslide.mpp-x": "0,25", "openslide.mpp-y": "0,25"}, 0.25),
        ({"openslide.objective-power": "40"}, 0.25),
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
    assert reader.slide_mpp(properties) == pytest.approx(mpp)


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
        reader.slide_mpp(properties)
    assert code_of(error) == "missing_resolution"


def test_tiles_have_the_same_physical_size_on_every_scanner(tmp_path: Path) -> None:
    at_half = write_slide(tmp_path / "half.tif", scene(1000), mpp=0.5, compression="deflate")
    fine = np.kron(scene(1000), np.ones((2, 2, 1), dtype=np.uint8))
    at_quarter = write_slide(tmp_path / "quarter.tif", fine, mpp=0.25, compression="deflate")
    coords, pixels = zip(*(_tiles(path) for path in (at_half, at_quarter)), strict=True)
    np.testing.assert_array_equal(2 * coords[0], coords[1])
    assert np.abs(pixels[0].astype(int) - pixels[1]).mean() < 1.0


def test_a_pyramid_level_serves_where_it_has_the_scale(tmp_path: Path) -> None:
    fine = np.kron(scene(1000), np.ones((2, 2, 1), dtype=np.uint8))
    flat = write_slide(tmp_path / "flat.tif", fine, mpp=0.25, compression="deflate")
    pyramid = write_slide(tmp_path / "p.tif", fine, mpp=0.25, levels=2, compression="deflate")
    with reader.open_slide(pyramid) as slide:
        assert slide.level_for(2.0) == (1, 2.0)
    one, two = _tiles(flat), _tiles(pyramid)
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1].astype(int) - two[1]).mean() < 1.0


@pytest.mark.parametrize("mpp", [0.2, 0.3, 0.499, 0.5, 0.7])
def test_tiles_equal_single_reads_with_pillow(tmp_path: Path, mpp: float) -> None:
    picture = scene(1000)
    path = write_slide(tmp_path / "slide.tif", picture, mpp=mpp, compression="deflate")
    coords, pixels = _tiles(path, max_tiles=6)
    field_px = round(224 * 0.5 / mpp)
    for (x, y), tile in zip(coords, pixels, strict=True):
        field = Image.fromarray(picture[y : y + field_px, x : x + field_px])
        expected = np.asarray(field.resize((224, 224), Image.Resampling.LANCZOS))
        # A tile cut from a strip sees its neighbours at the rim of the filter.
        assert np.abs(tile[4:-4, 4:-4].astype(int) - expected[4:-4, 4:-4]).max() <= 1


def test_a_coarser_slide_is_not_blown_up(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "coarse.tif", scene(), mpp=1.0)
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, TINY)
    assert code_of(error) == "too_coarse"


def _tiles(path: Path, **fields: int) -> tuple[np.ndarray, np.ndarray]:
    spec = PathologySpec(**fields)
    with reader.open_slide(path) as slide:
        geometry = tiles.tile_geometry(spec, slide.mpp)
        rgb, downsample = reader.thumbnail(
            slide, tissue.thumbnail_downsample(slide.size_px, slide.mpp)
        )
        mask = tissue.tissue_mask(rgb, slide.mpp * downsample)
        coords = tiles.spread(
            tiles.tile_coords(slide.size_px, geometry, mask, downsample, min_tissue_fraction=0.5),
            spec.max_tiles,
        )
        batches = tiles.read_tiles(slide, coords, geometry.field_px, tile_px=224, batch_tiles=4)
        return coords, np.concatenate(list(batches))


def test_blank_and_black_hold_no_tissue() -> None:
    rng = np.random.default_rng(0)
    noisy_glass = rng.normal(240, 3, (200, 200, 3)).clip(0, 255).astype(np.uint8)
    nearly_black = rng.integers(0, 12, (200, 200, 3), dtype=np.uint8)
    for rgb in (np.full((200, 200, 3), 255, np.uint8), noisy_glass, nearly_black):
        assert not tissue.tissue_mask(rgb, 8.0).any()


def test_a_slide_full_of_tissue_is_not_halved() -> None:
    picture = scene(1000)[200:800, 200:800]
    assert tissue.tissue_mask(picture, 4.0).mean() > 0.95


def test_the_mask_finds_the_disc() -> None:
    mask = tissue.tissue_mask(scene(250), 8.0)
    assert mask.mean() == pytest.approx(math.pi * 0.45**2, rel=0.02)


def test_specks_are_dropped() -> None:
    rgb = np.full((100, 100, 3), 240, np.uint8)
    rgb[10:14, 10:14] = (180, 80, 150)
    assert not tissue.tissue_mask(rgb, 8.0).any()


def test_the_outline_keeps_area_and_holes() -> None:
    mask = np.zeros((60, 80), dtype=bool)
    mask[10:50, 20:70] = True
    mask[20:30, 30:40] = False
    (feature,) = tissue.tissue_outline(mask, 16.0)["features"]
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


def test_overlapping_tiles_step_by_the_stride(disc: Path) -> None:
    with reader.open_slide(disc) as slide:
        geometry = tiles.tile_geometry(PathologySpec(stride_px=112), slide.mpp)
        mask = np.ones((10, 10), dtype=bool)
        coords = tiles.tile_coords(slide.size_px, geometry, mask, 100.0, min_tissue_fraction=0.5)
    assert geometry == tiles.Geometry(224, 112)
    assert len(coords) == 7 * 7


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
        pathology.check_slide(path, TINY)
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
        pathology.check_slide(path, TINY)
    assert code_of(error) == "unreadable_slide"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_real_slide_that_broke_off_is_unreadable(tmp_path: Path, cmu: Path, share: float) -> None:
    whole = cmu.read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError) as error:
        pathology.check_slide(path, TINY)
    assert code_of(error) == "unreadable_slide"


def test_a_hole_in_the_middle_is_found_by_the_extractor(tmp_path: Path, tiny: TileEncoder) -> None:
    path = write_slide(tmp_path / "hole.tif", scene(2000), levels=2, mpp=0.5)
    with TiffFile(path) as file:
        page = file.pages[0]
        offset, length = page.dataoffsets[27], page.databytecounts[27]
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(length))
    with pytest.raises(DataError) as error:
        pathology.extract_slide(path, tmp_path / "hole.h5", TINY, tiny)
    assert code_of(error) == "unreadable_slide"
    assert [p.name for p in tmp_path.iterdir()] == ["hole.tif"]


def test_the_default_weights_know_a_cat(default: TileEncoder) -> None:
    """An independent check of the renamed weights: ImageNet's classes 281-285 are cats."""
    assert (default.dim, default.size_px) == (1280, 224)
    assert default.mean == default.std == (0.5, 0.5, 0.5)
    cat = Image.fromarray(pictures.chelsea()).crop((80, 0, 380, 300)).resize((224, 224))
    embedding = torch.from_numpy(default.embed(np.asarray(cat)[None]))
    state = torch.load(network._packaged_weights(), map_location="cpu", weights_only=True)
    scores = embedding @ state["_fc.weight"].T + state["_fc.bias"]
    assert 281 <= int(scores.argmax()) <= 285


def test_embedding_is_timms_own_pooled_feature(default: TileEncoder) -> None:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    model = network._default_model().eval()
    transform = timm.data.create_transform(
        input_size=224, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, is_training=False
    )
    images = torch.stack([transform(Image.fromarray(tile)) for tile in pixels])
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True).numpy()
    np.testing.assert_allclose(default.embed(pixels), expected, atol=1e-4)


def test_embeddings_do_not_depend_on_batches(tiny: TileEncoder) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (tiny.batch_tiles + 5, 224, 224, 3), dtype=np.uint8)
    together = tiny.embed(pixels)
    assert together.shape == (len(pixels), tiny.dim)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together[-2:], tiny.embed(pixels[-2:]), atol=1e-4)
    assert tiny.embed(pixels[:0]).shape == (0, tiny.dim)


def test_random_weights_are_the_same_everywhere() -> None:
    state = torch.random.get_rng_state()
    one, two = (pathology.load_tile_encoder(TINY) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    pixels = np.full((1, 224, 224, 3), 90, dtype=np.uint8)
    np.testing.assert_array_equal(one.embed(pixels), two.embed(pixels))


@pytest.mark.parametrize(("least", "settled"), [(-1.0, "bf16"), (1.1, "fp32")])
def test_auto_keeps_bf16_only_where_it_agrees(
    monkeypatch: pytest.MonkeyPatch, least: float, settled: str
) -> None:
    monkeypatch.setattr(network, "_has_native_bf16", lambda device: True)
    monkeypatch.setattr(network, "_LEAST_COSINE", least)
    encoder = pathology.load_tile_encoder(TINY.model_copy(update={"precision": "auto"}))
    features = encoder.embed(np.zeros((2, 224, 224, 3), dtype=np.uint8))
    assert encoder.precision == settled
    assert features.dtype == np.float32


def test_auto_is_fp32_where_bf16_is_not_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_has_native_bf16", lambda device: False)
    spec = TINY.model_copy(update={"precision": "auto"})
    assert pathology.load_tile_encoder(spec).precision == "fp32"


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet18", "resnet18.a1_in1k", "hf-hub:owner/name"]
)
def test_known_encoder_names_pass(name: str) -> None:
    pathology.check_encoder_name(name)


@pytest.mark.parametrize("name", ["resnet_18", "hf-hub:only-a-name", "local-dir:/tmp/x", "??"])
def test_an_unknown_encoder_is_named_with_close_ones(name: str) -> None:
    with pytest.raises(pathology.UnknownEncoder, match="needed a timm model name") as error:
        pathology.load_tile_encoder(PathologySpec(encoder=name))
    assert isinstance(error.value, ValueError)
    if name == "resnet_18":
        assert "resnet18" in str(error.value)


@pytest.mark.parametrize(
    "cause", [OSError("https://host.example/x"), RuntimeError("No pretrained weights exist")]
)
def test_weights_that_cannot_be_fetched_are_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, cause: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise cause

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(pathology.MissingWeights, match="'resnet18'") as error:
        pathology.load_tile_encoder(PathologySpec(encoder="resnet18"))
    assert "host.example" not in str(error.value)
    assert error.value.__suppress_context__


def test_a_bag_on_disk_has_tridents_names(tmp_path: Path, disc: Path, tiny: TileEncoder) -> None:
    n_tiles = pathology.extract_slide(disc, tmp_path / "disc.h5", TINY, tiny)
    coords, file = attrs_of(tmp_path / "disc.h5")
    assert coords == {
        "patch_size": 224,
        "patch_size_level0": 224,
        "level0_magnification": 20,
        "target_magnification": 20,
        "overlap": 0,
        "name": "disc",
        "savetodir": ".",
        "level0_width": SIDE_PX,
        "level0_height": SIDE_PX,
    }
    assert file["slide_mpp"] == pytest.approx(0.5)
    assert file["encoder"] == TINY.encoder
    assert file["precision"] == "fp32"
    assert file["input_digest"] == pathology.digest_slide(disc)
    bag = pathology.read_bag(tmp_path / "disc.h5")
    assert bag.coords.shape == (n_tiles, 2)
    assert bag.coords.dtype == np.int64
    assert bag.features.shape == (n_tiles, tiny.dim)
    assert bag.features.dtype == np.float32
    outline = json.loads((tmp_path / "disc.geojson").read_text())
    assert outline["type"] == "FeatureCollection"
    rings = [np.array(r) for f in outline["features"] for r in f["geometry"]["coordinates"]]
    assert all((ring[0] == ring[-1]).all() and len(ring) >= 4 for ring in rings)
    assert all(ring.min() >= -8 and ring.max() <= SIDE_PX + 8 for ring in rings)


def test_two_runs_write_the_same_bytes(tmp_path: Path, disc: Path, tiny: TileEncoder) -> None:
    for folder in ("one", "two"):
        pathology.extract_slide(disc, tmp_path / folder / "disc.h5", TINY, tiny)
    for name in ("disc.h5", "disc.geojson"):
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_tridents_batched_features_are_read(tmp_path: Path) -> None:
    path = tmp_path / "features.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = np.arange(8).reshape(4, 2)
        file["features"] = np.ones((1, 4, 3), dtype=np.float16)
    bag = pathology.read_bag(path)
    assert bag.features.shape == (4, 3)
    assert bag.features.dtype == np.float32


@pytest.mark.parametrize(
    ("datasets", "code"),
    [
        ({"features": np.ones((2, 3))}, "unreadable_bag"),
        ({"coords": np.ones((3, 2)), "features": np.ones((2, 3))}, "shape"),
        ({"coords": np.ones((2, 2)), "features": np.full((2, 3), np.nan)}, "non_finite"),
        ({"coords": np.ones((0, 2)), "features": np.ones((0, 3))}, "no_tissue"),
    ],
)
def test_a_bag_that_is_not_one_is_refused(
    tmp_path: Path, datasets: dict[str, np.ndarray], code: str
) -> None:
    with h5py.File(tmp_path / "bag.h5", "w") as file:
        for name, values in datasets.items():
            file[name] = values
    with pytest.raises(DataError) as error:
        pathology.read_bag(tmp_path / "bag.h5")
    assert code_of(error) == code


def test_is_current_never_raises(tmp_path: Path, disc: Path, tiny: TileEncoder) -> None:
    path = tmp_path / "disc.h5"
    made_from = {"input_digest": "a" * 64, "spec_fingerprint": TINY.fingerprint()}
    assert not pathology.is_current(path, **made_from)
    pathology.extract_slide(disc, path, TINY, tiny, input_digest="a" * 64)
    assert pathology.is_current(path, **made_from)
    assert not pathology.is_current(path, **{**made_from, "input_digest": "b" * 64})
    assert not pathology.is_current(path, **{**made_from, "spec_fingerprint": "b" * 64})
    whole = path.read_bytes()
    for share in (0.0, 0.01, 0.3, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert not pathology.is_current(path, **made_from)
    with h5py.File(path, "w") as file:
        file.attrs.update(made_from)
        file["coords"] = 3
    assert not pathology.is_current(path, **made_from)


def test_silent_damage_to_features_is_an_error(
    tmp_path: Path, disc: Path, tiny: TileEncoder
) -> None:
    path = tmp_path / "disc.h5"
    pathology.extract_slide(disc, path, TINY, tiny)
    content = bytearray(path.read_bytes())
    at = content.find(pathology.read_bag(path).features[1].tobytes())
    content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        pathology.read_bag(path)
    assert code_of(error) == "unreadable_bag"


def test_one_bad_slide_does_not_stop_the_rest(tmp_path: Path) -> None:
    source, out = tmp_path / "slides", tmp_path / "out"
    (source / "more").mkdir(parents=True)
    write_slide(source / "a.tif", scene())
    _damage(source / "b.tif", "text", scene(600))
    write_slide(source / "more" / "c.tif", scene(600))
    write_slide(source / "more" / "A.tiff", scene(600))
    (source / "notes.txt").write_text("not a slide")
    ticks: list[int] = []
    outcomes = pathology.extract(source, out, TINY, advance=ticks.append)
    assert {(o.slide, o.outcome, o.code) for o in outcomes} == {
        ("a", "done", ""),
        ("b", "failed", "not_a_slide"),
        ("A", "failed", "duplicate_name"),
        ("c", "done", ""),
    }
    assert sum(ticks) == 4
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["a.h5", "a.geojson", "c.h5", "c.geojson", "outcomes.csv"]
    )
    with (out / "outcomes.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["slide", "outcome", "code", "reason", "n_tiles"]
    assert [int(r["n_tiles"]) for r in rows] == [o.n_tiles for o in outcomes]


def test_only_what_changed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "slides", tmp_path / "out"
    source.mkdir()
    for name in "ab":
        write_slide(source / f"{name}.tif", scene(600))
    first = pathology.extract(source, out, TINY)
    with monkeypatch.context() as patch:
        patch.setattr("modalities.pathology.slides.load_tile_encoder", None)
        again = pathology.extract(source, out, TINY)
    assert [o.outcome for o in again] == ["unchanged", "unchanged"]
    assert [o.n_tiles for o in again] == [o.n_tiles for o in first]
    write_slide(source / "a.tif", scene(700))
    assert [o.outcome for o in pathology.extract(source, out, TINY)] == ["done", "unchanged"]
    other = TINY.model_copy(update={"max_tiles": 2})
    changed = pathology.extract(source, out, other)
    assert [(o.outcome, o.n_tiles) for o in changed] == [("done", 2), ("done", 2)]


def test_a_manifest_names_slides_relative_to_itself(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", scene(600))
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(
        "patient_id,modality,path\np1,pathology,a.tif\np1,radiology,ct\np2,pathology,gone.tif\n"
    )
    outcomes = pathology.extract(manifest, tmp_path / "out", TINY)
    assert [(o.slide, o.code) for o in outcomes] == [("a", ""), ("gone", "missing_file")]


@pytest.mark.parametrize(
    ("content", "code"),
    [("patient_id\np1\n", "manifest"), ("path\n", "no_slides"), ("path\n\xff", "manifest")],
)
def test_a_manifest_without_paths_is_refused(tmp_path: Path, content: str, code: str) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as error:
        pathology.find_slides(manifest)
    assert code_of(error) == code


def test_a_folder_without_slides_is_refused(tmp_path: Path) -> None:
    for source, code in ((tmp_path, "no_slides"), (tmp_path / "typo", "missing_file")):
        with pytest.raises(DataError) as error:
            pathology.extract(source, tmp_path / "out", TINY)
        assert code_of(error) == code


def test_the_data_folder_of_a_slide_counts_in_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "s.mrxs"
    path.write_bytes(b"index")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "Data0001.dat").write_bytes(b"one")
    before = pathology.digest_slide(path)
    (tmp_path / "s" / "Data0001.dat").write_bytes(b"two")
    assert pathology.digest_slide(path) != before


def test_a_real_slide(tmp_path: Path, cmu: Path, tiny: TileEncoder) -> None:
    pathology.check_slide(cmu, TINY)
    n_tiles = pathology.extract_slide(cmu, tmp_path / "cmu.h5", TINY, tiny)
    bag = pathology.read_bag(tmp_path / "cmu.h5")
    coords, file = attrs_of(tmp_path / "cmu.h5")
    assert file["slide_mpp"] == pytest.approx(0.499)
    assert coords["level0_magnification"] == 20
    # About a third of the 9 x 13 tiles of this slide hold tissue.
    assert 30 <= n_tiles <= 55
    with openslide.OpenSlide(cmu) as handle:
        pixels = np.stack(
            [
                np.array(handle.read_region(xy, 0, (224, 224)).convert("RGB"))
                for xy in bag.coords[:5]
            ]
        )
    np.testing.assert_allclose(bag.features[:5], tiny.embed(pixels), atol=1e-4)


def test_a_real_slide_through_the_default_encoder(
    tmp_path: Path, cmu: Path, default: TileEncoder
) -> None:
    spec = PathologySpec(max_tiles=4, precision="fp32")
    assert pathology.extract_slide(cmu, tmp_path / "cmu.h5", spec, default) == 4
    assert pathology.read_bag(tmp_path / "cmu.h5").features.shape == (4, 1280)
