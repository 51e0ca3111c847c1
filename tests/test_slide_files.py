"""What stands in the files of a slide, row by row, and in which order they appear."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from PIL import Image

from modalities import pathology
from modalities.cohort import DataError
from modalities.files import replacing
from modalities.pathology import (
    Manner,
    PathologySpec,
    SlideJob,
    partial,
    pipeline,
    spec,
    stain,
    tissue,
)
from modalities.pathology.bags import Bag, write_bag, write_finished
from modalities.pathology.overview import Overview
from modalities.pathology.pipeline import partial_path
from modalities.pathology.planning import plan_slide
from modalities.pathology.quality import Quality, is_good, tile_quality
from modalities.pathology.reader import open_slide
from modalities.pathology.reading import tile_reader
from tests.slides_on_disk import (
    Averages,
    code_of,
    column,
    embed_averages,
    scene,
    with_hole,
    write_slide,
)

if TYPE_CHECKING:
    from pathlib import Path

SPEC = PathologySpec(tile_px=64)


def appended(path: Path, n: int, n_rows: int) -> tuple[partial.PartialBag, np.ndarray]:
    """Partial bag of more rows than a block holds, and the features in it."""
    features = np.random.default_rng(2).normal(size=(n, 3)).astype(np.float32)
    share = np.linspace(0, 1, n, dtype=np.float32)
    bag = partial.open_partial(path, key="k", n_rows=n_rows, dim=3)
    for at in range(0, n, 16):
        part = slice(at, at + 16)
        shares = Quality(share[part], share[part], share[part])
        bag.append(features[part], shares, np.ones(len(share[part]), bool), precision="fp32")
    return bag, features


@pytest.mark.parametrize("n_whole", [0, partial.BLOCK_ROWS, 700, 1000])
def test_rows_beyond_a_block_stand_until_the_first_wrong_one(tmp_path: Path, n_whole: int) -> None:
    bag, features = appended(tmp_path / "p", 1000, 1100)
    bag.close()
    with h5py.File(tmp_path / "p", "r+") as file:
        row = file["rows"][n_whole]
        row["check"] ^= 1
        file["rows"][n_whole] = row
    bag = partial.open_partial(tmp_path / "p", key="k", n_rows=1100, dim=3)
    assert bag.n_done == n_whole
    found = [np.empty((0, 3)), *(block["features"] for block in bag.blocks())]
    np.testing.assert_array_equal(np.concatenate(found), features[:n_whole])


OTHER = {
    "marks": {"marks": {"code_version": "2"}},
    "slide": {"input_digest": "b" * 64},
    "spec": {"spec": SPEC.model_copy(update={"max_pen": 0.2})},
    "batches": {"encoder": Averages(batch_tiles=8)},
    "nothing": {},
}


@pytest.mark.parametrize("other", OTHER)
def test_rows_go_on_only_where_all_that_they_depend_on_is_the_same(
    tmp_path: Path, other: str
) -> None:
    """What stands there cannot come of this slide, so that it shows whether it was used."""
    path, out = write_slide(tmp_path / "s.tif", scene(600)), tmp_path / "s.h5"
    usual = {
        "marks": {"code_version": "1"}, "input_digest": "a" * 64, "spec": SPEC,
        "encoder": Averages(batch_tiles=4),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_finished", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            _extracted(path, out, usual)
    with h5py.File(partial_path(out), "r+") as file:
        rows = file["rows"][()]
        rows["features"] = 77
        rows["check"] = partial._checks(rows, 0)
        file["rows"][:] = rows
    _extracted(path, out, usual | OTHER[other])
    assert (column(out, "features") == 77).all() == (other == "nothing")


def _extracted(path: Path, out: Path, options: dict[str, Any]) -> None:
    rest = {x: options[x] for x in ("marks", "input_digest")}
    pathology.extract_slide(path, out, options["spec"], options["encoder"], **rest)


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_kept_rows_of_every_block_make_up_the_bag(tmp_path: Path) -> None:
    bag, features = appended(tmp_path / "p", 1100, 1100)
    coords = np.arange(2200).reshape(-1, 2)
    kept = np.random.default_rng(3).random(1100) < 0.7
    columns = {"coords": coords, "kept": kept, **bag.columns("blur")}
    write_finished(tmp_path / "a.h5", bag, columns, coords_attrs={}, file_attrs={})
    found = pathology.read_bag(tmp_path / "a.h5")
    np.testing.assert_array_equal(found.coords, coords[kept])
    np.testing.assert_array_equal(found.features, features[kept])
    blur = column(tmp_path / "a.h5", "tiles/blur")
    np.testing.assert_array_equal(blur, np.linspace(0, 1, 1100, dtype=np.float32))


def test_silent_damage_to_coordinates_is_an_error(tmp_path: Path) -> None:
    path, coords = tmp_path / "a.h5", np.arange(1000, 1020).reshape(-1, 2)
    write_bag(path, Bag(coords, np.ones((10, 3), np.float32)), coords_attrs={}, file_attrs={})
    content = bytearray(path.read_bytes())
    content[content.index(coords.tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        pathology.read_bag(path)
    assert code_of(error) == "unreadable_bag"


def test_a_bag_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    write_bag(
        path, Bag(np.zeros((1, 2), np.int64), np.ones((1, 3), np.float32)),
        coords_attrs={}, file_attrs={},
    )  # fmt: skip
    before = path.read_bytes()
    bag, _ = appended(tmp_path / "p", 20, 20)
    columns = {
        "coords": np.zeros((20, 2)), "kept": np.ones(20, bool), "odd": np.full(20, object())
    }  # fmt: skip
    with pytest.raises(TypeError):
        write_finished(path, bag, columns, coords_attrs={}, file_attrs={})
    assert path.read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.h5", "p"]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, seen = tmp_path / "a.txt", []
    plain = os.fsync

    def noting(descriptor: int) -> None:
        seen.append((target.exists(), os.fstat(descriptor).st_size))
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    with replacing(target) as temporary:
        temporary.write_text("whole")
    assert (False, 5) in seen
    assert target.read_text() == "whole"


def test_no_bag_appears_before_what_belongs_beside_it(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(600))
    (tmp_path / "s.geojson").mkdir()
    with pytest.raises(OSError, match=r"geojson"):
        pathology.extract_slide(path, tmp_path / "s.h5", SPEC, Averages())
    assert not (tmp_path / "s.h5").exists()


def test_the_fingerprint_follows_the_extractors_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SPEC.fingerprint()
    monkeypatch.setattr(spec, "EXTRACTOR_VERSION", spec.EXTRACTOR_VERSION + 1)
    assert SPEC.fingerprint() != before


def test_attributes_tell_level_0_from_the_tiles(tmp_path: Path) -> None:
    """On a wide slide of twice the resolution, of which every size differs from every other."""
    path = write_slide(tmp_path / "s.tif", scene(1000)[200:800], mpp=0.25)
    wanted = PathologySpec(tile_px=64, tile_mpp=0.5, stride_px=48)
    pathology.extract_slide(path, tmp_path / "s.h5", wanted, Averages())
    with h5py.File(tmp_path / "s.h5", "r") as file:
        assert dict(file["coords"].attrs) == {
            "patch_size": 64,
            "patch_size_level0": 128,
            "level0_magnification": 40,
            "target_magnification": 20,
            "overlap": 16,
            "name": "s",
            "savetodir": ".",
            "level0_width": 1000,
            "level0_height": 600,
        }
        coords = file["coords"][()]
    assert set(np.diff(np.unique(coords[:, 0]))) == {96}
    assert coords[:, 0].max() > 600 > coords[:, 1].max() + 127


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_stain_is_fitted_once_on_whole_tiles_of_all_the_slide(
    tmp_path: Path, method: stain.Method, is_damaged: bool
) -> None:
    picture = scene(1000)
    picture[:, 500:] = (picture[:, 500:] * (0.6, 0.9, 0.8)).astype(np.uint8)
    path = write_slide(tmp_path / "s.tif", picture)
    if is_damaged:
        with_hole(path, 5)
    reference = ((0.6, 0.7, 0.39, 1.5), (0.2, 0.8, 0.56, 1.1))
    if method == "reinhard":
        reference = ((-1.5, -0.1, 0.05), (0.7, 0.2, 0.04))
    wanted = PathologySpec(tile_px=112, stain=method, stain_reference=reference)
    pathology.extract_slide(path, tmp_path / "s.h5", wanted, Averages())
    with open_slide(path) as slide:
        coords = plan_slide(slide, wanted).coords
        with tile_reader(slide, tile_px=112, mpp=0.5) as reader:
            pixels, decoded = reader.read_tiles(coords, tile_px=112, mpp=0.5)
    assert len(coords) <= 64  # so that all of them are the sample
    assert decoded.all() != is_damaged
    normalise = stain.normaliser(pixels[decoded], method, reference)
    np.testing.assert_array_equal(
        column(tmp_path / "s.h5", "features"), Averages().embed(normalise(pixels[decoded]))
    )
    with h5py.File(tmp_path / "s.h5", "r") as file:
        np.testing.assert_array_equal(file.attrs["stain_fitted"], normalise.fitted)
    for name, expected in tile_quality(pixels, decoded)._asdict().items():  # of the slide as it is
        np.testing.assert_array_equal(column(tmp_path / "s.h5", f"tiles/{name}"), expected)


def test_a_slide_needs_as_many_good_tiles_as_are_asked_for(tmp_path: Path) -> None:
    picture = scene(600)
    picture[:300, :300] = (30, 60, 170)  # a blue pen
    path = write_slide(tmp_path / "s.tif", picture)
    pathology.extract_slide(path, tmp_path / "s.h5", SPEC, Averages())
    n_good = int(column(tmp_path / "s.h5", "tiles/good").sum())
    assert 0 < n_good < len(column(tmp_path / "s.h5", "tiles/good"))
    enough = SPEC.model_copy(update={"min_good_tiles": n_good})
    pathology.extract_slide(path, tmp_path / "s.h5", enough, Averages())
    more = SPEC.model_copy(update={"min_good_tiles": n_good + 1})
    with pytest.raises(DataError, match=f"found {n_good} of .*, needed {n_good + 1}") as error:
        pathology.extract_slide(path, tmp_path / "more.h5", more, Averages())
    assert code_of(error) == "few_good_tiles"


@pytest.mark.parametrize("name", Quality._fields)
def test_each_limit_of_a_good_tile_counts_by_itself(name: str) -> None:
    limits = PathologySpec(max_blur=0.5, max_pen=0.25, max_white=0.75)
    least = {x: np.zeros(3, dtype=np.float32) for x in Quality._fields}
    limit = getattr(limits, f"max_{name}")
    found = Quality(**least | {name: np.array([0.0, limit, limit + 0.01], dtype=np.float32)})
    assert is_good(found, np.ones(3, bool), limits).tolist() == [True, True, False]


def test_the_drawn_outline_lies_where_the_tissue_does() -> None:
    mask = np.zeros((100, 160), dtype=bool)
    mask[10:30, 100:150] = True
    seen = Overview(np.full((100, 160, 3), 240, np.uint8), 4.0, np.zeros_like(mask))
    y, x = np.nonzero((np.asarray(tissue.outlined(seen, mask)) != 240).any(axis=2))
    assert (abs(x.min() - 100) <= 1, abs(x.max() - 150) <= 1) == (True, True)
    assert (abs(y.min() - 10) <= 1, abs(y.max() - 30) <= 1) == (True, True)


def test_tiles_and_outline_lie_where_the_tissue_does(tmp_path: Path) -> None:
    """In pixels of level 0, although tissue is sought in an overview of rounded scale."""
    picture = np.full((1000, 1200, 3), 243, dtype=np.uint8)
    picture[576:832, 896:1152] = scene(600)[172:428, 172:428]
    path = write_slide(tmp_path / "s.tif", picture, compression="deflate")
    most = SPEC.model_copy(update={"min_tissue_fraction": 0.9, "min_good_tiles": 0})
    job = SlideJob(
        path, tmp_path / "s.h5", outline=tmp_path / "o.geojson",
        picture=tmp_path / "with.jpg", thumbnail=tmp_path / "without.jpg",
    )  # fmt: skip
    list(pathology.extract_slides([job], most, Averages))
    corners = [[x, y] for y in range(576, 832, 64) for x in range(896, 1152, 64)]
    assert column(tmp_path / "s.h5", "coords").tolist() == corners
    (tissue_found,) = json.loads((tmp_path / "o.geojson").read_text())["features"]
    ring = np.array(tissue_found["geometry"]["coordinates"][0])
    np.testing.assert_allclose(ring.min(axis=0), (896, 576), atol=8)
    np.testing.assert_allclose(ring.max(axis=0), (1152, 832), atol=8)
    drawn, bare = (
        np.asarray(Image.open(tmp_path / f"{x}.jpg").convert("RGB"), dtype=int)
        for x in ("with", "without")
    )
    line = np.abs(drawn - bare).max(axis=2) > 40
    assert line.sum() > 100
    greener = (drawn - bare)[line].mean(axis=0)
    assert greener[1] > greener[0] + 40


def test_outcomes_stand_in_the_order_of_the_slides_whichever_ends_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_slide(tmp_path / f"{name}.tif", scene(600))
    embed_averages(monkeypatch)
    another = threading.Event()
    shown: list[str] = []

    def wait(count: pathology.TileCount) -> None:
        assert count.slide != "a" or another.wait(60)

    def note(_: int) -> None:
        another.set()
        rows = (tmp_path / "out" / "outcomes.csv").read_text().splitlines()[1:]
        shown.append("".join(row[0] for row in rows))

    manner = Manner(devices=("x", "y"))
    found = pathology.extract(
        tmp_path, tmp_path / "out", SPEC, manner=manner, advance=note, watch=wait
    )
    assert [x.slide for x in found] == ["a", "b", "c"]
    assert shown[0] in {"b", "c"}
    assert all(list(x) == sorted(x) for x in shown)


def test_features_of_an_encoder_that_their_file_names_are_no_others(tmp_path: Path) -> None:
    path = tmp_path / "features_uni_v1" / "s.h5"
    path.parent.mkdir()
    bag = Bag(np.zeros((1, 2), np.int64), np.ones((1, 1024), np.float32))
    wanted = PathologySpec(encoder="uni_v1", tile_px=256)
    for encoder, fits in (("UNI", True), ("gpfm", False)):
        write_bag(path, bag, coords_attrs={}, file_attrs={"encoder": encoder})
        if fits:
            pathology.check_features(path, wanted)
            continue
        with pytest.raises(DataError, match="found those of 'gpfm'") as error:
            pathology.check_features(path, wanted)
        assert code_of(error) == "other_encoder"
