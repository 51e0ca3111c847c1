"""DICOM slides: a series of files is one slide, and nothing of its headers gets out."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest

from flows.extraction import Ledger
from modalities import pathology
from modalities.cohort import DataError, ManifestRow
from modalities.pathology import PathologySpec, SlideJob, find_slides, slide_files
from modalities.pathology.reader import open_slide
from modalities.pathology.reading import tile_reader
from modalities.pathology.scale import MppTable
from tests.dicom_slides import IDENTIFIERS, OTHER_CLASS, TILE_PX, decoded, write_level, write_series
from tests.slides_on_disk import Averages, code_of, column, overwrite, scene, touching

if TYPE_CHECKING:
    from pathlib import Path

    from modalities.pathology import SlideOutcome

SPEC = PathologySpec(tile_px=100, encoder="test_efficientnet", pretrained=False, precision="fp32")
PICTURE = scene(900)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one slide in two levels, with a scan of the same person in it."""
    folder = tmp_path_factory.mktemp("dicom") / "biopsy"
    write_series(folder, PICTURE)
    write_level(folder / "a_scan.dcm", PICTURE[:TILE_PX, :TILE_PX], sop_class=OTHER_CLASS)
    return folder


@pytest.fixture
def slide(written: Path, tmp_path: Path) -> Path:
    """The finest level of a copy of its own."""
    return shutil.copytree(written, tmp_path / written.name) / "one-0.dcm"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of two series."""
    folder = tmp_path_factory.mktemp("two")
    write_series(folder, PICTURE)
    write_series(folder, PICTURE[::-1], series="two")
    return folder


def frame_of(path: Path, number: int) -> tuple[int, int]:
    """Where a stored tile stands in the file, and its length."""
    content, at = path.read_bytes(), 0
    for _ in range(number + 1):
        at = content.index(b"\xff\xd8\xff", at + 1)
    return at, content.index(b"\xff\xd9", at) + 2 - at


def test_tiles_are_those_that_are_stored(written: Path) -> None:
    corners = np.array([[0, 0], [300, 260], [800, 800]])
    picture = decoded(PICTURE)
    with open_slide(written / "one-1.dcm") as slide:  # any file of it stands for all
        assert not IDENTIFIERS.keys() & {x.removeprefix("dicom.") for x in slide.properties}
        assert slide.info.size_px == (900, 900)
        assert [level.downsample for level in slide.info.levels] == [1, 2]
        assert (slide.mpp, slide.scale.source) == (0.5, "stated")
        with tile_reader(slide, tile_px=100, mpp=0.5) as reader:
            tiles, is_whole = reader.read_tiles(corners, tile_px=100, mpp=0.5)
        with tile_reader(slide, tile_px=100, mpp=1.0) as reader:
            coarse, _ = reader.read_tiles(corners[:1], tile_px=100, mpp=1.0)
    assert is_whole.all()
    for tile, (x, y) in zip(tiles, corners, strict=True):
        np.testing.assert_array_equal(tile, picture[y : y + 100, x : x + 100])
    np.testing.assert_array_equal(coarse[0], decoded(PICTURE[::2, ::2])[:100, :100])


def test_a_folder_gives_one_slide_per_series_and_nothing_of_its_headers(
    written: Path, two: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(written, source / "biopsy")
    shutil.copytree(two, source / "flat")
    (source / "flat" / "one-1.dcm").write_bytes(b"")
    found = pathology.extract(source, out, SPEC)
    assert [(x.slide, x.outcome) for x in found] == [
        ("biopsy", "done"), ("one-0", "done"), ("two-0", "done"),
    ]  # fmt: skip
    assert pathology.extract(source, out, SPEC)[0].reason == "unchanged"
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(files) == {"outcomes.csv"} | {
        f"{name}.{kind}"
        for name in ("biopsy", "one-0", "two-0")
        for kind in ("h5", "geojson", "jpg")
    }
    said = [*files.values(), caplog.text.encode(), *(x.encode() for x in capfd.readouterr())]
    with h5py.File(out / "biopsy.h5") as file:
        assert file.attrs["slide_mpp"] == 0.5
        assert file["coords"].attrs["name"] == "biopsy"
        said.append(repr([dict(file.attrs), dict(file["coords"].attrs)]).encode())
    for value in IDENTIFIERS.values():
        assert not any(value.encode() in content for content in said)


def test_files_that_are_no_slide_are_not_looked_at_as_one(written: Path, tmp_path: Path) -> None:
    shutil.copy(written / "a_scan.dcm", tmp_path)
    (tmp_path / "torn.dcm").write_bytes(bytes(200))
    with pytest.raises(DataError, match=r"\.czi, .*\.vmu, or \.dcm of a whole slide") as error:
        find_slides(tmp_path)
    assert code_of(error) == "no_slides"


def test_a_slide_is_found_by_its_header_whatever_its_files_are_called(
    written: Path, tmp_path: Path
) -> None:
    for name, level in (("1.2.840.20", "one-0.dcm"), ("IMG00001", "one-1.dcm")):
        shutil.copy(written / level, tmp_path / name)
    assert find_slides(tmp_path) == [tmp_path / "1.2.840.20"]
    assert slide_files(tmp_path / "IMG00001") == [tmp_path / "IMG00001", tmp_path / "1.2.840.20"]


def test_files_of_one_series_in_a_manifest_are_one_slide(two: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    listed = [two / f"{name}.dcm" for name in ("two-1", "one-0", "two-0", "one-1", "missing")]
    manifest.write_text("path\n" + "".join(f"{path}\n" for path in listed))
    assert find_slides(manifest) == [listed[0], listed[1], listed[4]]


def test_a_series_without_others_beside_it_has_the_name_of_its_folder(
    slide: Path, two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [SlideJob(path, path).name for path in (slide, two / "one-1.dcm", slide.parent / "no")]
    assert names == ["biopsy", "one-1", "no"]
    assert MppTable({"biopsy": 0.3}).of(slide) == 0.3
    monkeypatch.chdir(slide.parent)
    assert SlideJob(slide.relative_to(slide.parent), slide).name == "biopsy"
    (slide.parent / "one-1.dcm").unlink()
    assert SlideJob(slide, slide).name == "one-0"


def test_the_digest_covers_the_series_whichever_of_its_files_is_named(
    slide: Path, two: Path
) -> None:
    other = slide.parent / "one-1.dcm"
    before = pathology.digest_slide(slide)
    assert pathology.digest_slide(other) == before == pathology.digest_slide(two / "one-1.dcm")
    shutil.copy(two / "two-0.dcm", slide.parent)
    assert slide_files(slide) == [slide, other]
    other.rename(slide.parent / "a.bin")
    assert pathology.digest_slide(slide) == before
    at, _ = frame_of(slide.parent / "a.bin", 3)
    overwrite(slide.parent / "a.bin", at + 300, b"\0")
    assert pathology.digest_slide(slide) != before


def test_a_site_sees_that_another_file_of_a_series_changed(slide: Path, tmp_path: Path) -> None:
    row = ManifestRow("p1", "pathology", slide, None, None)
    ledger = Ledger(tmp_path / "digests.json")
    digest = ledger.digest(row, SPEC)
    assert ledger.known(row, SPEC) == digest
    os.utime(slide.parent / "one-1.dcm", ns=(1, 1))
    assert ledger.known(row, SPEC) is None
    assert ledger.digest(row, SPEC) == digest


class Changing(Averages):
    """Has a byte of a file changed once the reading has begun."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        at, _ = frame_of(self.path, 3)
        overwrite(self.path, at + 300, b"\0")
        return super().embed(tiles)


def extracted(path: Path, encoder: Averages) -> SlideOutcome:
    return pathology.extract_slide(path, path.with_suffix(".h5"), SPEC, encoder)


def test_a_level_that_changes_while_another_is_read_leaves_no_rows(slide: Path) -> None:
    with pytest.raises(DataError) as error:
        extracted(slide, Changing(slide.parent / "one-1.dcm"))
    assert code_of(error) == "changed_slide"
    assert not slide.with_suffix(".h5").exists()


def test_a_damaged_frame_is_marked_and_no_other(slide: Path) -> None:
    across = -(-900 // TILE_PX)
    at, n_bytes = frame_of(slide, 3 * across + 4)
    overwrite(slide, at, bytes(n_bytes))
    assert extracted(slide, Averages()).outcome == "partial"
    bag, left, top = slide.with_suffix(".h5"), 4 * TILE_PX, 3 * TILE_PX
    tiles = column(bag, "tiles/coords")
    damaged = touching(tiles, 100, (left, top, left + TILE_PX, top + TILE_PX))
    assert damaged.any()
    np.testing.assert_array_equal(column(bag, "tiles/decoded"), ~damaged)


@pytest.mark.parametrize("level", [0, 1])
def test_a_file_that_broke_off_in_a_copy_is_set_aside(slide: Path, level: int) -> None:
    path = slide.parent / f"one-{level}.dcm"
    os.truncate(path, path.stat().st_size * 2 // 3)
    with pytest.raises(DataError) as error:
        extracted(slide, Averages())
    assert code_of(error) == "unreadable_slide"


@pytest.mark.parametrize("suffix", [".vms", ".vmu"])
def test_the_parts_that_a_key_file_names_count(tmp_path: Path, suffix: str) -> None:
    for name in ("a.jpg", "b.jpg", "unnamed.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    path = tmp_path / f"s{suffix}"
    path.write_text(
        "[Virtual Microscope Specimen]\r\nImageFile=b.jpg\r\nMapFile = a.jpg\r\nX=../y\r\n"
    )
    assert slide_files(path) == [path, tmp_path / "a.jpg", tmp_path / "b.jpg"]
    before = pathology.digest_slide(path)
    (tmp_path / "unnamed.jpg").write_bytes(b"other")
    assert pathology.digest_slide(path) == before
    (tmp_path / "a.jpg").write_bytes(b"other")
    assert pathology.digest_slide(path) != before
