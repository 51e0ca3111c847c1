from __future__ import annotations

import csv
import json
import math
from typing import TYPE_CHECKING

import h5py
import numpy as np
import openslide
import pytest
import torch
from pydantic import ValidationError

from modalities import pathology
from modalities.cohort import DataError
from modalities.pathology import PathologySpec
from tests.slides_on_disk import (
    SIDE_PX,
    code_of,
    real_slide,
    scene,
    write_slide,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from modalities.pathology.network import TileEncoder

# A network of timm's own tests: random weights, 160 px, a millisecond a tile.
TINY = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")


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


@pytest.fixture
def cmu(shared_data: Path) -> Path:
    return real_slide(shared_data)


@pytest.fixture(scope="session")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tif", scene())


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


def test_a_bag_on_disk_has_tridents_names(tmp_path: Path, disc: Path, tiny: TileEncoder) -> None:
    n_tiles = pathology.extract_slide(disc, tmp_path / "disc.h5", TINY, tiny).n_tiles
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
    (source / "b.tif").write_text("patient,slide\n" * 40)
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
        [f"{x}.{y}" for x in "ac" for y in ("h5", "geojson", "jpg")] + ["outcomes.csv"]
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
    assert [(o.outcome, o.reason) for o in again] == [("done", "unchanged")] * 2
    assert [o.n_tiles for o in again] == [o.n_tiles for o in first]
    write_slide(source / "a.tif", scene(700))
    assert [o.reason for o in pathology.extract(source, out, TINY)] == ["", "unchanged"]
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


def test_a_slide_that_is_listed_twice_is_one_slide(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_text("path,note\r\na.svs,1\r\n\r\na.svs,2\r\n")
    assert pathology.find_slides(tmp_path / "manifest.csv") == [tmp_path / "a.svs"]


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
    n_tiles = pathology.extract_slide(cmu, tmp_path / "cmu.h5", TINY, tiny).n_tiles
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
    assert pathology.extract_slide(cmu, tmp_path / "cmu.h5", spec, default).n_tiles == 4
    assert pathology.read_bag(tmp_path / "cmu.h5").features.shape == (4, 1280)
