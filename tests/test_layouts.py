from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pytest

from modalities import pathology
from modalities.cohort import DataError
from modalities.pathology import Manner, PathologySpec, layouts
from modalities.pathology.devices import extract_over
from modalities.pathology.export import bag_as_anndata, export_bag
from modalities.pathology.pipeline import SlideJob
from tests.slides_on_disk import Averages, code_of, scene, with_hole, write_slide

SPEC = PathologySpec(encoder="uni_v1", tile_px=256)
TINY = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")
TRIDENT: dict[str, Any] = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "slide",
    "savetodir": "/somewhere/else",
    "level0_width": 40_000,
    "level0_height": 30_000,
}
COORDS = np.array([[0, 0], [512, 0], [0, 512]])


@pytest.fixture(scope="module")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tif", scene())


def features_file(
    path: Path,
    *,
    dim: int = 1024,
    attrs: dict[str, Any] | None = None,
    batched: bool = False,
    dtype: str = "f4",
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    features = np.random.default_rng(1).normal(size=(len(COORDS), dim)).astype(dtype)
    with h5py.File(path, "w") as file:
        file["features"] = features[None] if batched else features
        file["coords"] = COORDS[None] if batched else COORDS
        file["coords"].attrs.update(attrs or {})
    return path


def imported(path: Path, out: Path, spec: PathologySpec = SPEC) -> dict[str, Any]:
    n_tiles = pathology.import_features(path, out, spec, input_digest="d", marks={"code": "c"})
    assert n_tiles == len(COORDS)
    with h5py.File(out, "r") as file, h5py.File(path, "r") as before:
        np.testing.assert_array_equal(file["features"][()], np.squeeze(before["features"][()]))
        np.testing.assert_array_equal(file["coords"][()], COORDS)
        assert file["features"].dtype == np.float32
        return {**file.attrs, **file["coords"].attrs}


@pytest.mark.parametrize("batched", [False, True])
def test_features_of_trident_are_used_as_they_are(tmp_path: Path, batched: bool) -> None:
    path = tmp_path / "20x_256px_0px_overlap" / "features_uni_v1" / "slide.h5"
    features_file(path, attrs=TRIDENT, batched=batched, dtype="f2")
    found = imported(path, tmp_path / "bag.h5")
    assert found.items() >= TRIDENT.items()
    assert (found["encoder"], found["code"], found["input_digest"]) == ("uni_v1", "c", "d")
    assert pathology.is_current(
        tmp_path / "bag.h5", input_digest="d", spec_fingerprint=SPEC.fingerprint()
    )
    pathology.check_features(path, SPEC)


@pytest.mark.parametrize(
    ("attrs", "side_px"),
    [
        ({}, None),
        ({"patch_size": 256, "patch_level": 0}, 256),
        ({"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0)}, 1024),
        ({"patch_size": 256, "patch_level": 0, "custom_downsample": 2}, 512),
        ({"patch_size": 256, "patch_level": 1}, None),
        (TRIDENT, 512),
    ],
)
def test_features_of_clam_are_used_with_the_size_of_their_tiles(
    tmp_path: Path, attrs: dict[str, Any], side_px: int | None
) -> None:
    path = features_file(tmp_path / "h5_files" / "slide.h5", attrs=attrs)
    assert layouts.read_grid(path).side_px == side_px
    assert imported(path, tmp_path / "bag.h5").get("patch_size_level0") == side_px


def test_coordinates_alone_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "patches.h5", "w") as file:
        file["coords"] = COORDS
        file["coords"].attrs.update(TRIDENT)
    grid = layouts.read_grid(tmp_path / "patches.h5")
    np.testing.assert_array_equal(grid.coords, COORDS)
    assert (grid.side_px, grid.side_um) == (512, 128.0)
    for bad in (tmp_path / "none.h5", tmp_path / "text.h5"):
        if bad.name == "text.h5":
            bad.write_text("coords")
        with pytest.raises(DataError):
            layouts.read_grid(bad)


@pytest.mark.parametrize(
    ("where", "dim", "attrs", "code"),
    [
        ("features_uni_v2", 1024, TRIDENT, "other_encoder"),
        ("features_uni_v1", 1536, TRIDENT, "other_encoder"),
        ("features_uni_v1", 1024, TRIDENT | {"target_magnification": 10}, "other_scale"),
        ("features_uni_v1", 1024, TRIDENT | {"patch_size": 512}, "other_scale"),
    ],
)
def test_features_of_something_else_are_refused(
    tmp_path: Path, where: str, dim: int, attrs: dict[str, Any], code: str
) -> None:
    path = features_file(tmp_path / where / "secret-name.h5", dim=dim, attrs=attrs)
    with pytest.raises(DataError) as error:
        imported(path, tmp_path / "bag.h5")
    assert code_of(error) == code
    assert "secret-name" not in str(error.value)
    assert not (tmp_path / "bag.h5").exists()


@pytest.mark.parametrize(
    ("marks", "code"),
    [
        ({"weights_sha256": "a" * 64, "stain": "none"}, None),
        ({"weights_sha256": "", "stain": "none"}, None),
        ({"weights_sha256": "b" * 64, "stain": "none"}, "other_encoder"),
        ({"weights_sha256": "a" * 64, "stain": "macenko"}, "other_stain"),
    ],
)
def test_features_of_this_package_made_otherwise_are_refused(
    tmp_path: Path, marks: dict[str, str], code: str | None
) -> None:
    spec = SPEC.model_copy(update={"weights_sha256": "a" * 64})
    path = features_file(tmp_path / "s.h5", attrs=TRIDENT)
    with h5py.File(path, "r+") as file:
        file.attrs.update({"encoder": "uni_v1", **marks})
    if code is None:
        imported(path, tmp_path / "bag.h5", spec)
        return
    with pytest.raises(DataError) as error:
        imported(path, tmp_path / "bag.h5", spec)
    assert code_of(error) == code


@pytest.mark.parametrize(
    ("coords", "dim", "code"),
    [
        (np.array([[0, 0], [np.nan, 0], [0, 512]]), 1024, "unreadable_bag"),
        (np.array([[0, 0], [0.5, 0], [0, 512]]), 1024, "unreadable_bag"),
        (COORDS.astype("f8"), 1024, None),
        (COORDS, 0, "shape"),
        (COORDS[:2], 1024, "shape"),
    ],
)
def test_coordinates_are_whole_numbers_of_every_tile(
    tmp_path: Path, coords: np.ndarray, dim: int, code: str | None
) -> None:
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["coords"] = coords
        file["features"] = np.ones((3, dim), "f2")
    if code is None:
        np.testing.assert_array_equal(pathology.read_bag(path).coords, COORDS)
        return
    with pytest.raises(DataError) as error:
        pathology.read_bag(path)
    assert code_of(error) == code


def test_features_of_an_encoder_that_cannot_run_here_are_used(tmp_path: Path) -> None:
    spec = PathologySpec(encoder="conch_v1.5", tile_px=512)
    path = features_file(
        tmp_path / "features_conch_v15" / "slide.h5", dim=768, attrs=TRIDENT | {"patch_size": 512}
    )
    assert imported(path, tmp_path / "bag.h5", spec)["encoder"] == "conch_v15"


def test_the_folders_are_tridents(tmp_path: Path, disc: Path) -> None:
    spec = TINY.model_copy(update={"stride_px": 112})
    manner = Manner(layout="trident", export="anndata")
    (outcome,) = pathology.extract(disc, tmp_path, spec, manner=manner)
    below = "20x_224px_112px_overlap"
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {
        "outcomes.csv",
        "contours/disc.jpg",
        "contours_geojson/disc.geojson",
        "thumbnails/disc.jpg",
        f"{below}/patches/disc_patches.h5",
        f"{below}/features_test_efficientnet/disc.h5",
        f"{below}/features_test_efficientnet/disc.h5ad",
    }
    grid = layouts.read_grid(tmp_path / below / "patches" / "disc_patches.h5")
    bag = tmp_path / below / "features_test_efficientnet" / "disc.h5"
    np.testing.assert_array_equal(grid.coords, pathology.read_bag(bag).coords)
    assert grid.attrs["overlap"] == 112
    assert len(grid.coords) == outcome.n_tiles
    outline = json.loads((tmp_path / "contours_geojson" / "disc.geojson").read_text())
    assert outline["type"] == "FeatureCollection"
    before = bag.stat().st_mtime_ns
    (again,) = pathology.extract(disc, tmp_path, spec, manner=manner)
    assert again.reason == "unchanged"
    assert bag.stat().st_mtime_ns == before


def test_a_hub_name_makes_one_folder(tmp_path: Path) -> None:
    spec = PathologySpec(encoder="hf-hub:owner/name", tile_mpp=0.4)
    bag = layouts.places(tmp_path, "s", spec, "trident").bag
    assert str(bag.relative_to(tmp_path)) == "25x_224px_0px_overlap/features_hf-hub-owner-name/s.h5"


@pytest.mark.parametrize("form", ["anndata", "zarr"])
def test_a_bag_is_exported_with_places_and_quality(tmp_path: Path, form: Any) -> None:
    path = with_hole(write_slide(tmp_path / "hole.tif", scene()), 5)
    pathology.extract_slide(path, tmp_path / "hole.h5", TINY, Averages())
    target = export_bag(tmp_path / "hole.h5", form)
    table = ad.read_h5ad(target) if form == "anndata" else ad.read_zarr(target)
    bag = pathology.read_bag(tmp_path / "hole.h5")
    np.testing.assert_array_equal(table.X, bag.features)
    np.testing.assert_array_equal(table.obsm["spatial"], bag.coords + 112)
    np.testing.assert_array_equal(table.obs[["x", "y"]], bag.coords)
    assert {"blur", "pen", "white", "decoded", "good"} <= set(table.obs)
    assert table.obs["decoded"].all()
    assert table.uns["tiles"]["spec_fingerprint"] == TINY.fingerprint()
    before = target.stat().st_mtime_ns
    assert export_bag(tmp_path / "hole.h5", form).stat().st_mtime_ns == before
    (tmp_path / "hole.h5").touch()
    assert export_bag(tmp_path / "hole.h5", form).stat().st_mtime_ns > before
    assert not list(tmp_path.glob(".partial*"))


def test_a_kill_while_an_export_is_replaced_leaves_no_half(
    tmp_path: Path, disc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TINY.model_copy(update={"max_tiles": 8})
    pathology.extract_slide(disc, tmp_path / "s.h5", spec, Averages())
    first = export_bag(tmp_path / "s.h5", "zarr")
    pathology.extract_slide(disc, tmp_path / "s.h5", TINY, Averages())

    class Killed(BaseException):
        pass

    def half(path: Path, **options: object) -> None:
        for file in sorted(Path(path).rglob("*"))[::2]:
            if file.is_file():
                file.unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            export_bag(tmp_path / "s.h5", "zarr")
    bag = pathology.read_bag(tmp_path / "s.h5")
    np.testing.assert_array_equal(
        ad.read_zarr(export_bag(tmp_path / "s.h5", "zarr")).X, bag.features
    )
    assert first == tmp_path / "s.zarr"


def test_a_bag_of_another_tool_is_exported_without_quality(tmp_path: Path) -> None:
    table = bag_as_anndata(features_file(tmp_path / "x.h5", attrs=TRIDENT))
    assert list(table.obs) == ["x", "y"]
    np.testing.assert_array_equal(table.obsm["spatial"], COORDS + 256)


def test_slides_are_shared_out_over_devices(tmp_path: Path, disc: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    both = threading.Barrier(2)

    class Waits(Averages):
        """Goes on once the other device has begun as well."""

        met = False

        def embed(self, tiles: np.ndarray) -> np.ndarray:
            if not self.met:
                both.wait(timeout=60)
                self.met = True
            return super().embed(tiles)

    def jobs(out: Path) -> list[SlideJob]:
        return [SlideJob(disc, out / f"{i}.h5") for i in range(5)]

    loaded = []

    def load(device: str | None) -> Averages:
        loaded.append(device)
        return Averages() if device is None else Waits()

    alone = list(extract_over([None], jobs(one), TINY, load))
    shared = list(extract_over(["a", "b"], jobs(two), TINY, load))
    assert sorted(map(str, loaded)) == ["None", "a", "b"]
    assert sorted(job.out_h5.name for job, _ in shared) == [f"{i}.h5" for i in range(5)]
    assert {outcome.outcome for _, outcome in [*alone, *shared]} == {"done"}
    for i in range(5):
        assert (one / f"{i}.h5").read_bytes() == (two / f"{i}.h5").read_bytes()


def test_an_interruption_ends_all_devices_after_a_batch(tmp_path: Path, disc: Path) -> None:
    begun = threading.Barrier(2)
    release = threading.Event()

    class Slow(Averages):
        n_batches = 0

        def embed(self, tiles: np.ndarray) -> np.ndarray:
            self.n_batches += 1
            if self.n_batches == 1:
                begun.wait(60)
                if self is encoders["a"]:
                    raise KeyboardInterrupt
                release.wait(60)
            return super().embed(tiles)

    encoders = {"a": Slow(), "b": Slow()}
    jobs = [SlideJob(disc, tmp_path / f"{i}.h5") for i in range(4)]
    threading.Timer(0.5, release.set).start()
    with pytest.raises(KeyboardInterrupt):
        list(extract_over(["a", "b"], jobs, TINY.model_copy(update={"tile_px": 64}), encoders.get))
    assert encoders["b"].n_batches <= 3
    assert not list(tmp_path.glob("*.h5"))
    assert list(tmp_path.glob("*.h5.partial"))


def test_an_encoder_that_does_not_load_ends_all_devices(tmp_path: Path, disc: Path) -> None:
    def load(device: str | None) -> Averages:
        raise pathology.MissingWeights("encoder: none here")

    jobs = [SlideJob(disc, tmp_path / f"{i}.h5") for i in range(3)]
    with pytest.raises(pathology.MissingWeights, match="none here"):
        list(extract_over(["a", "b"], jobs, TINY, load))
