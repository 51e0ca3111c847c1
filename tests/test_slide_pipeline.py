from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import itertools
import os
import random
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np
import openslide
import pytest

from modalities import pathology
from modalities.cohort import DataError
from modalities.pathology import PathologySpec, SlideJob, partial, pipeline, reader
from modalities.pathology.ahead import ahead
from modalities.pathology.quality import Quality
from modalities.synthetic.slides import write_slide as write_simulated
from tests.slides_on_disk import (
    Averages,
    code_of,
    column,
    embed_averages,
    real_slide,
    scene,
    touching,
    with_hole,
    write_slide,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
SPEC = PathologySpec(tile_px=64)


@pytest.fixture(scope="session")
def disc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_slide(tmp_path_factory.mktemp("slides") / "disc.tif", scene(), levels=3)


def extract(path: Path, out: Path, **options: object) -> pathology.SlideOutcome:
    encoder = options.pop("encoder", None) or Averages()
    return pathology.extract_slide(path, out, options.pop("spec", SPEC), encoder, **options)


class Interrupted(RuntimeError):
    pass


class Interrupting(Averages):
    """Stops the run after some batches."""

    def __init__(self, n_batches: int, **options: int) -> None:
        super().__init__(**options)
        self.n_left = n_batches

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        self.n_left -= 1
        if self.n_left < 0:
            raise Interrupted
        return super().embed(tiles)


def interrupt(path: Path, out: Path, n_batches: int, **options: object) -> None:
    with pytest.raises(Interrupted):
        extract(path, out, encoder=Interrupting(n_batches), **options)


class TestAhead:
    def test_items_come_in_order_and_errors_after_them(self) -> None:
        def items() -> Iterator[int]:
            yield from range(20)
            raise Interrupted

        found: list[int] = []
        with pytest.raises(Interrupted), ahead(items(), 3) as taken:
            found.extend(taken)
        assert found == list(range(20))

    def test_it_is_ahead_and_no_further_than_told(self) -> None:
        made: list[int] = []
        reached = threading.Event()

        def items() -> Iterator[int]:
            for i in range(50):
                made.append(i)
                if i == 4:
                    reached.set()
                yield i

        with ahead(items(), 3) as taken:
            assert next(taken) == 0
            assert reached.wait(10)  # one taken, three waiting, the fifth in hand
            time.sleep(0.3)
            assert len(made) == 5

    def test_leaving_early_closes_the_generator(self) -> None:
        closed = threading.Event()

        def items() -> Iterator[int]:
            try:
                yield from range(1000)
            finally:
                closed.set()

        before = threading.active_count()
        with ahead(items(), 2) as taken:
            next(taken)
        assert closed.is_set()
        assert threading.active_count() == before


def rows(n: int, dim: int = 3) -> tuple[np.ndarray, Quality, np.ndarray]:
    values = np.arange(n * dim, dtype=np.float32).reshape(n, dim) + 1
    share = np.linspace(0, 1, n, dtype=np.float32)
    return values, Quality(share, share, share), np.ones(n, dtype=bool)


class TestPartialBag:
    @pytest.mark.parametrize("n_damaged", [0, 1, 4, 5])
    def test_rows_stand_until_the_first_wrong_one(self, tmp_path: Path, n_damaged: int) -> None:
        path = tmp_path / "bag.partial"
        bag = partial.open_partial(path, key="k", n_rows=8, dim=3)
        assert (bag.n_done, bag.precision) == (0, None)
        bag.append(*rows(5), precision="bf16")
        bag.close()
        if n_damaged < 5:
            with h5py.File(path, "r+") as file:
                row = file["rows"][n_damaged]
                row["features"] += 1
                file["rows"][n_damaged] = row
        bag = partial.open_partial(path, key="k", n_rows=8, dim=3)
        assert bag.n_done == n_damaged
        assert bag.precision == ("bf16" if n_damaged else None)
        found = [block["features"] for block in bag.blocks()]
        standing = np.concatenate([np.empty((0, 3)), *found])
        np.testing.assert_array_equal(standing, rows(5)[0][:n_damaged])
        bag.remove()
        assert not path.exists()

    def test_a_row_at_another_place_does_not_stand(self, tmp_path: Path) -> None:
        path = tmp_path / "bag.partial"
        bag = partial.open_partial(path, key="k", n_rows=4, dim=3)
        bag.append(*rows(3), precision="fp32")
        bag.close()
        with h5py.File(path, "r+") as file:
            file["rows"][1] = file["rows"][2]
        assert partial.open_partial(path, key="k", n_rows=4, dim=3).n_done == 1

    @pytest.mark.parametrize("other", [{"key": "l"}, {"n_rows": 9}, {"dim": 4}])
    def test_rows_of_anything_else_are_begun_again(
        self, tmp_path: Path, other: dict[str, object]
    ) -> None:
        asked = {"key": "k", "n_rows": 8, "dim": 3}
        bag = partial.open_partial(tmp_path / "p", **asked)
        bag.append(*rows(5), precision="fp32")
        bag.close()
        assert partial.open_partial(tmp_path / "p", **{**asked, **other}).n_done == 0

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
    def test_a_file_that_broke_off_is_begun_again(self, tmp_path: Path, share: float) -> None:
        path = tmp_path / "p"
        asked = {"key": "k", "n_rows": 80, "dim": 3}
        bag = partial.open_partial(path, **asked)
        bag.append(*rows(50), precision="fp32")
        bag.close()
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        assert partial.open_partial(path, **asked).n_done == 0

    def test_one_run_at_a_time(self, tmp_path: Path) -> None:
        path = tmp_path / "p"
        asked = {"key": "k", "n_rows": 8, "dim": 3}
        partial.open_partial(path, **asked).close()
        with path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with pytest.raises(DataError) as error:
                partial.open_partial(path, **asked)
        assert code_of(error) == "in_progress"


SLOW = """
import sys, time
from pathlib import Path
from modalities.pathology import PathologySpec, extract_slide
from tests.slides_on_disk import Averages

class Slow(Averages):
    def embed(self, tiles):
        time.sleep(0.02)
        return super().embed(tiles)

extract_slide(Path(sys.argv[1]), Path(sys.argv[2]), PathologySpec(tile_px=64), Slow())
"""


def n_standing(path: Path) -> int:
    with h5py.File(path, "r") as file:
        return int(np.count_nonzero(file["rows"]["check"]))


def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, disc: Path
) -> None:
    extract(disc, tmp_path / "whole" / "disc.h5")
    out = tmp_path / "killed" / "disc.h5"
    unfinished = pipeline.partial_path(out)
    n_tiles = len(column(tmp_path / "whole" / "disc.h5", "coords"))
    standing = []
    for _ in range(3):
        run = subprocess.Popen([sys.executable, "-c", SLOW, str(disc), str(out)], cwd=ROOT)
        at_start = standing[-1] if standing else 0
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _has_more(unfinished, at_start):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.1))
        run.kill()
        assert run.wait() == -9
        standing.append(n_standing(unfinished))
    assert 0 < standing[0] < standing[1] < standing[2] < n_tiles
    assert not out.exists()
    counts: list[pathology.TileCount] = []
    ((_, outcome),) = pathology.extract_slides(
        [SlideJob(disc, out)], SPEC, Averages, watch=counts.append
    )
    assert (outcome.outcome, outcome.n_tiles) == ("done", n_tiles)
    assert counts[0].n_done > standing[2]
    assert [x.n_done for x in counts] == sorted({x.n_done for x in counts})
    for name in ("disc.h5", "disc.geojson"):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("whole", "killed"))
        assert one == two
    assert sorted(x.name for x in out.parent.iterdir()) == ["disc.geojson", "disc.h5"]


def _has_more(path: Path, n: int) -> bool:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return int(np.count_nonzero(file["rows"]["check"])) > n
    except OSError:
        return False


@pytest.mark.parametrize("n_batches", [0, 1, 7])
def test_a_run_goes_on_with_whole_batches(tmp_path: Path, disc: Path, n_batches: int) -> None:
    extract(disc, tmp_path / "a.h5")
    interrupt(disc, tmp_path / "b.h5", n_batches)
    # Half of the last batch is lost.
    if n_batches:
        with h5py.File(tmp_path / "b.h5.partial", "r+") as file:
            row = file["rows"][4 * n_batches - 2]
            row["check"] += 1
            file["rows"][4 * n_batches - 2] = row
    done: list[int] = []
    job = SlideJob(disc, tmp_path / "b.h5")
    list(pathology.extract_slides([job], SPEC, Averages, watch=lambda x: done.append(x.n_done)))
    assert done[0] == 4 * max(n_batches, 1)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


class Settling(Averages):
    """Settles its precision with the first batch, and embeds as it says."""

    def __init__(self, settles: str) -> None:
        super().__init__()
        self.precision = "auto"
        self._settles = settles

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        if self.precision == "auto":
            self.precision = self._settles
        return super().embed(tiles) * (1 if self.precision == "fp32" else 2)


@pytest.mark.parametrize("settles", ["fp32", "bf16"])
def test_rows_of_one_bag_have_one_precision(tmp_path: Path, disc: Path, settles: str) -> None:
    interrupt(disc, tmp_path / "a.h5", 3)
    bf16 = Settling("bf16")
    extract(disc, tmp_path / "b.h5", encoder=bf16)
    # Not settled yet: goes on as the rows say. Settled otherwise: begins again.
    encoder = Settling(settles)
    if settles == "bf16":
        encoder.precision = "bf16"
    extract(disc, tmp_path / "a.h5", encoder=encoder)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["precision"] == settles
    factor = 1 if settles == "bf16" else 2
    np.testing.assert_array_equal(
        factor * column(tmp_path / "a.h5", "features"), column(tmp_path / "b.h5", "features")
    )


def test_a_damaged_tile_has_no_embedding_and_no_other_differs(tmp_path: Path, disc: Path) -> None:
    extract(disc, tmp_path / "whole.h5")
    path = tmp_path / "disc.tif"
    path.write_bytes(disc.read_bytes())
    with_hole(path, 5)
    outcome = extract(path, tmp_path / "hole.h5")
    coords, hole = (column(tmp_path / x, "coords") for x in ("whole.h5", "hole.h5"))
    hit = touching(coords, 64, (256, 256, 512, 512))
    assert hit.sum() >= 16
    np.testing.assert_array_equal(hole, coords[~hit])
    np.testing.assert_array_equal(
        column(tmp_path / "hole.h5", "features"), column(tmp_path / "whole.h5", "features")[~hit]
    )
    assert (outcome.outcome, outcome.code) == ("partial", "damaged_tiles")
    assert outcome.n_tiles == len(hole)
    assert f"found {hit.sum()} damaged tiles" in outcome.reason
    np.testing.assert_array_equal(column(tmp_path / "hole.h5", "tiles/coords"), coords)
    for name in ("decoded", "kept"):
        np.testing.assert_array_equal(column(tmp_path / "hole.h5", f"tiles/{name}"), ~hit)
    assert not column(tmp_path / "hole.h5", "tiles/good")[hit].any()
    for name in ("blur", "pen", "white"):
        found, whole = (column(tmp_path / x, f"tiles/{name}") for x in ("hole.h5", "whole.h5"))
        np.testing.assert_array_equal(np.isnan(found), hit)
        np.testing.assert_array_equal(found[~hit], whole[~hit])
    assert pathology.read_bag(tmp_path / "hole.h5").coords.shape == hole.shape


def test_a_real_slide_with_one_zeroed_tile(tmp_path: Path, shared_data: Path) -> None:
    whole = real_slide(shared_data)
    path = tmp_path / "slide.svs"
    path.write_bytes(whole.read_bytes())
    with_hole(path, 44)
    spec = PathologySpec()
    extract(whole, tmp_path / "a.h5", spec=spec)
    outcome = extract(path, tmp_path / "b.h5", spec=spec)
    kept = {tuple(x): y for x, y in zip(*read(tmp_path / "a.h5"), strict=True)}
    hit = touching(np.array(list(kept)), 224, (4 * 240, 4 * 240, 5 * 240, 5 * 240))
    found = {tuple(x): y for x, y in zip(*read(tmp_path / "b.h5"), strict=True)}
    assert outcome.outcome == "partial"
    assert hit.any()
    assert list(found) == [x for x, is_hit in zip(kept, hit, strict=True) if not is_hit]
    assert all((kept[x] == y).all() for x, y in found.items())


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    return column(path, "coords"), column(path, "features")


def test_a_slide_without_one_whole_tile_is_unreadable(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", scene(1000), levels=2)
    for number in range(16):
        with_hole(path, number)
    with pytest.raises(DataError) as error:
        extract(path, tmp_path / "s.h5")
    assert code_of(error) == "unreadable_slide"
    assert [x.name for x in tmp_path.iterdir()] == ["s.tif"]


def test_what_becomes_of_each_slide_stands_in_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "slides", tmp_path / "out"
    source.mkdir()
    write_slide(source / "a.tif", scene(600))
    with_hole(write_slide(source / "b.tif", scene(1000)), 5)
    write_slide(source / "c.tif", scene(600), mpp=None)
    write_slide(source / "d.tif", scene(600), mpp=None)
    (tmp_path / "mpp.csv").write_text("wsi,mpp\nd.tif,0.5\na,0.25\n")
    embed_averages(monkeypatch)
    for _ in range(2):
        outcomes = pathology.extract(source, out, SPEC, mpp_table=tmp_path / "mpp.csv")
        assert [(x.slide, x.outcome, x.code) for x in outcomes] == [
            ("a", "done", ""),
            ("b", "partial", "damaged_tiles"),
            ("c", "failed", "missing_resolution"),
            ("d", "done", ""),
        ]
        with (out / "outcomes.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert list(rows[0]) == ["slide", "outcome", "code", "reason", "n_tiles"]
        assert [int(x["n_tiles"]) for x in rows] == [x.n_tiles for x in outcomes]
        assert outcomes[1].n_tiles > 0
        assert outcomes[1].reason == rows[1]["reason"] != ""
        with h5py.File(out / "d.h5") as file:
            assert (file.attrs["slide_mpp"], file.attrs["slide_mpp_source"]) == (0.5, "table")
        with h5py.File(out / "a.h5") as file:
            assert (file.attrs["slide_mpp"], file.attrs["slide_mpp_source"]) == (0.5, "stated")


def test_the_table_is_there_before_the_last_slide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_slide(tmp_path / f"{name}.tif", scene(600))
    embed_averages(monkeypatch)
    n_rows: list[int] = []

    def note(_: int) -> None:
        with (tmp_path / "out" / "outcomes.csv").open(newline="") as stream:
            n_rows.append(len(list(csv.DictReader(stream))))

    pathology.extract(tmp_path, tmp_path / "out", SPEC, advance=note)
    assert n_rows[:2] == [1, 2]


def test_the_next_slide_is_read_while_this_one_is_embedded(
    tmp_path: Path, disc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = write_slide(tmp_path / "second.tif", scene(600))
    opened = threading.Event()
    plain = pipeline.plan_slide

    def noting(slide: pathology.reader.Slide, spec: PathologySpec) -> object:
        plan = plain(slide, spec)
        if slide.path == second:
            opened.set()
        return plan

    class Waiting(Averages):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            assert opened.wait(20), "the next slide was not opened"
            return super().embed(tiles)

    monkeypatch.setattr(pipeline, "plan_slide", noting)
    jobs = [SlideJob(x, tmp_path / f"{x.stem}.h5") for x in (disc, second)]
    spec = SPEC.model_copy(update={"max_tiles": 6})
    found = [x.outcome for _, x in pathology.extract_slides(jobs, spec, Waiting)]
    assert found == ["done", "done"]


def test_memory_holds_few_batches_of_a_slide_of_any_size(tmp_path: Path, disc: Path) -> None:
    alive, most = [0], [0]
    plain = pipeline.tile_quality

    def counting(pixels: np.ndarray, decoded: np.ndarray) -> Quality:
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return plain(pixels, decoded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "tile_quality", counting)

        def told(count: pathology.TileCount) -> None:
            alive[0] -= 1
            time.sleep(0.01)

        job = SlideJob(disc, tmp_path / "a.h5")
        list(pathology.extract_slides([job], SPEC, Averages, watch=told))
    assert 2 <= most[0] <= pipeline._BATCHES_AHEAD + 2


@pytest.mark.parametrize(("tile_px", "expected"), [(224, 256), (1024, 85), (4096, 5)])
def test_a_batch_of_large_tiles_is_small(tile_px: int, expected: int) -> None:
    spec = PathologySpec(tile_px=tile_px)
    assert pipeline._batch_tiles(Averages(batch_tiles=256), spec) == expected


def test_an_error_of_the_encoder_ends_the_run_and_keeps_the_rows(
    tmp_path: Path, disc: Path
) -> None:
    before = threading.active_count()
    interrupt(disc, tmp_path / "a.h5", 2)
    assert threading.active_count() == before
    assert n_standing(tmp_path / "a.h5.partial") == 8


def test_rows_are_kept_where_the_disk_goes_away(
    tmp_path: Path, disc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(disc, tmp_path / "whole.h5")
    away = threading.Event()
    plain = os.pread

    def failing(*arguments: int) -> bytes:
        if away.is_set():
            raise OSError(errno.EIO, "the network is away")
        return plain(*arguments)

    class Losing(Averages):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            away.set()
            return super().embed(tiles)

    monkeypatch.setattr("modalities.pathology.jpeg_tiff.os.pread", failing)
    with pytest.raises(DataError) as error:
        extract(disc, tmp_path / "a.h5", encoder=Losing(batch_tiles=2))
    assert code_of(error) == "unreadable_slide"
    monkeypatch.undo()
    done = n_standing(tmp_path / "a.h5.partial")
    assert 0 < done < len(column(tmp_path / "whole.h5", "coords"))
    extract(disc, tmp_path / "a.h5", encoder=Averages(batch_tiles=2))
    np.testing.assert_array_equal(
        column(tmp_path / "a.h5", "features"), column(tmp_path / "whole.h5", "features")
    )


def fails_for_a_while(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Let OpenSlide fail on some of its reads, as on a disk of the network that is away."""
    plain, calls = openslide.OpenSlide.read_region, itertools.count()

    def failing(*arguments: object) -> object:
        if first <= next(calls) < last:
            raise openslide.OpenSlideError("cannot read")
        return plain(*arguments)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", failing)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_disk_that_comes_back_leaves_no_tile_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    slide = write_slide(tmp_path / "s.tif", scene(), compression="deflate")
    extract(slide, tmp_path / "whole.h5")
    with monkeypatch.context() as patch:
        fails_for_a_while(patch, 8, 40)
        if resumed:  # killed before the end, with rows that were taken for damaged
            interrupt(slide, tmp_path / "a.h5", 20)
            with h5py.File(tmp_path / "a.h5.partial") as file:
                assert not file["rows"]["decoded"][:60].all()
        else:
            outcome = extract(slide, tmp_path / "a.h5")
            assert (outcome.outcome, outcome.reason) == ("done", "")
    if resumed:
        assert extract(slide, tmp_path / "a.h5").outcome == "done"
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


@pytest.mark.parametrize("compression", ["deflate", "jpeg"])
def test_a_slide_that_goes_away_is_set_aside_and_gone_on_with(
    tmp_path: Path, disc: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    # One thread alone would read on through the handle that it has.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    slide = write_slide(tmp_path / "s.tif", scene(), compression=compression)
    extract(slide, tmp_path / "whole.h5")

    class Taking(Averages):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            with contextlib.suppress(FileNotFoundError):
                slide.rename(tmp_path / "away.tif")
            return super().embed(tiles)

    encoder = Taking()
    jobs = [SlideJob(slide, tmp_path / "a.h5"), SlideJob(disc, tmp_path / "b.h5")]
    first, second = (x for _, x in pathology.extract_slides(jobs, SPEC, lambda: encoder))
    assert second.outcome == "done"
    if compression == "deflate":  # the other way reads on through what is open already
        assert (first.outcome, first.code) == ("failed", "missing_file")
        assert not (tmp_path / "a.h5").exists()
        (tmp_path / "away.tif").rename(slide)
        assert extract(slide, tmp_path / "a.h5").outcome == "done"
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def test_a_slide_that_goes_away_before_it_is_read_is_set_aside(
    tmp_path: Path, disc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = write_slide(tmp_path / "s.tif", scene(300))
    plain = reader.openslide.OpenSlide

    def opening(path: Path) -> openslide.OpenSlide:
        opened = plain(path)
        slide.unlink(missing_ok=True)
        return opened

    monkeypatch.setattr(reader.openslide, "OpenSlide", opening)
    jobs = [SlideJob(slide, tmp_path / "a.h5"), SlideJob(disc, tmp_path / "b.h5")]
    found = [x for _, x in pathology.extract_slides(jobs, SPEC, Averages)]
    assert [x.code for x in found] == ["unreadable_slide", ""]


def test_a_full_disk_names_the_file_and_the_same_process_goes_on(
    tmp_path: Path, disc: Path
) -> None:
    extract(disc, tmp_path / "whole.h5")
    few, (soft, hard) = 4096, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (few // 4, few, 3 * few, 5 * few):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large") as error:
                extract(disc, tmp_path / "a.h5")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert Path(error.value.filename).name.startswith(("a.", ".partial-a"))
    extract(disc, tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert sorted(x.name for x in tmp_path.iterdir()) == [
        "a.geojson", "a.h5", "whole.geojson", "whole.h5"
    ]  # fmt: skip


def test_a_name_that_is_not_utf8_is_extracted(tmp_path: Path, disc: Path) -> None:
    name = os.fsdecode(b"sl\xe4ide")
    slide = tmp_path / f"{name}.tif"
    slide.write_bytes(disc.read_bytes())
    outcome = extract(slide, tmp_path / f"{name}.h5")
    assert (outcome.slide, outcome.outcome) == ("sl\\xe4ide", "done")
    with h5py.File(os.fsencode(tmp_path / f"{name}.h5")) as file:
        assert file["coords"].attrs["name"] == "sl\\xe4ide"


def test_what_a_kill_left_is_cleared_away(tmp_path: Path, disc: Path) -> None:
    interrupt(disc, tmp_path / "a.h5", 3)
    left = tmp_path / ".partial-a-0a1b_2c3.h5"
    others = [tmp_path / f".partial-{x}.h5" for x in ("a-b-0a1b_2c3", "b-0a1b_2c3")]
    for path in (left, *others):
        path.write_bytes(b"half of one")
    extract(disc, tmp_path / "a.h5")
    assert not left.exists()
    assert all(x.exists() for x in others)
    # Killed after the bag was there and before its rows were deleted.
    (tmp_path / "a.h5.partial").write_bytes((tmp_path / "a.h5").read_bytes())
    job = SlideJob(disc, tmp_path / "a.h5", reuse=True)
    ((_, outcome),) = pathology.extract_slides([job], SPEC, Averages)
    assert outcome.reason == "unchanged"
    assert not (tmp_path / "a.h5.partial").exists()


def test_a_bag_is_used_again_only_with_its_marks(tmp_path: Path, disc: Path) -> None:
    reasons = []
    for code in ("1", "1", "2"):
        job = SlideJob(disc, tmp_path / "a.h5", marks={"code": code}, reuse=True)
        ((_, outcome),) = pathology.extract_slides([job], SPEC, Averages)
        reasons.append(outcome.reason)
    assert reasons == ["", "unchanged", ""]


def test_a_file_of_another_tool_is_not_replaced(tmp_path: Path, disc: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["features"] = np.ones((2, 3))
    before = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(DataError) as error:
        extract(disc, tmp_path / "a.h5")
    assert code_of(error) == "foreign_file"
    assert (tmp_path / "a.h5").read_bytes() == before
    (tmp_path / "a.h5").write_bytes(before[:100])  # not whole, whoever wrote it
    assert extract(disc, tmp_path / "a.h5").outcome == "done"


def test_a_resolution_that_was_corrected_counts(tmp_path: Path) -> None:
    slide = write_slide(tmp_path / "s.tif", scene(600), mpp=None)
    found = []
    for mpp in (0.5, 0.5, 0.25, None):
        job = SlideJob(slide, tmp_path / "s.h5", tabled_mpp=mpp, reuse=True)
        ((_, outcome),) = pathology.extract_slides([job], SPEC, Averages)
        with h5py.File(tmp_path / "s.h5") as file:
            found.append((outcome.reason, float(file.attrs["slide_mpp"])))
    assert found == [("", 0.5), ("unchanged", 0.5), ("", 0.25), ("unchanged", 0.25)]


def test_a_bag_never_mixes_precisions(tmp_path: Path, disc: Path) -> None:
    class Changing(Averages):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            features = super().embed(tiles)
            self.precision = "bf16" if features.sum() else "fp32"
            return features

    encoder = Changing()
    extract(disc, tmp_path / "a.h5", encoder=encoder)
    interrupt(disc, tmp_path / "b.h5", 2)
    encoder.precision = "fp32"  # as the rows say, but the next batch says otherwise
    with pytest.raises(DataError) as error:
        extract(disc, tmp_path / "b.h5", encoder=encoder)
    assert code_of(error) == "precision"
    assert not (tmp_path / "b.h5.partial").exists()


def test_embeddings_that_are_no_numbers_set_the_slide_aside(tmp_path: Path, disc: Path) -> None:
    class Broken(Averages):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            return np.full((len(tiles), 6), np.nan, dtype=np.float32)

    with pytest.raises(DataError) as error:
        extract(disc, tmp_path / "a.h5", encoder=Broken())
    assert code_of(error) == "non_finite"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["plan_slide", "tile_quality"])
def test_an_error_that_nobody_foresaw_sets_one_slide_aside(
    tmp_path: Path, disc: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    failing, asked = getattr(pipeline, where), []

    def once(*given: object, **named: object) -> object:
        asked.append(given)
        if len(asked) == 1:
            raise np.linalg.LinAlgError(f"in {disc}")
        return failing(*given, **named)

    monkeypatch.setattr(pipeline, where, once)
    jobs = [pathology.SlideJob(disc, tmp_path / f"{name}.h5") for name in "ab"]
    first, second = (x for _, x in pathology.extract_slides(jobs, SPEC, Averages))
    assert (first.outcome, first.code) == ("failed", "unreadable_slide")
    assert "(LinAlgError)" in first.reason
    assert str(disc) not in first.reason
    assert second.outcome == "done"


def test_too_few_good_tiles_are_told_in_one_line(tmp_path: Path) -> None:
    blurred = write_slide(tmp_path / "s.tif", np.full((600, 600, 3), (200, 120, 170), np.uint8))
    with pytest.raises(DataError) as error:
        extract(blurred, tmp_path / "s.h5")
    assert code_of(error) == "few_good_tiles"
    assert "found 0 of 81 tiles" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="found 0 of 81 tiles"):  # without embedding them again
        extract(blurred, tmp_path / "s.h5", encoder=Interrupting(0))
    none_needed = SPEC.model_copy(update={"min_good_tiles": 0})
    assert extract(blurred, tmp_path / "s.h5", spec=none_needed).n_tiles == 81


def test_only_good_tiles_are_kept_where_asked(tmp_path: Path) -> None:
    picture = scene(1000)
    picture[300:700, 300:700] = (30, 60, 170)  # a blue pen
    path = write_slide(tmp_path / "s.tif", picture)
    every = extract(path, tmp_path / "all.h5")
    good = extract(path, tmp_path / "good.h5", spec=SPEC.model_copy(update={"only_good": True}))
    columns = {x: column(tmp_path / "all.h5", f"tiles/{x}") for x in ("coords", "pen", "good")}
    inked = touching(columns["coords"], 64, (350, 350, 650, 650))
    assert not columns["good"][inked].any()
    assert columns["pen"][inked].min() > 0.5
    assert every.n_tiles == len(columns["good"])
    assert good.n_tiles == columns["good"].sum() < every.n_tiles
    np.testing.assert_array_equal(
        column(tmp_path / "good.h5", "coords"), columns["coords"][columns["good"]]
    )
    assert good.outcome == "done"


@pytest.mark.parametrize("stain", ["macenko", "reinhard"])
def test_the_fitted_stain_is_recorded(tmp_path: Path, stain: str) -> None:
    write_simulated(tmp_path / "s.tif", np.zeros(2), seed=1, key=(0, 0))
    spec = PathologySpec(stain=stain)
    for name in ("one.h5", "two.h5"):
        extract(tmp_path / "s.tif", tmp_path / name, spec=spec)
    extract(tmp_path / "s.tif", tmp_path / "plain.h5", spec=PathologySpec())
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    with h5py.File(tmp_path / "one.h5") as file:
        assert file.attrs["stain"] == stain
        assert file.attrs["stain_fitted"].shape == ((2, 4) if stain == "macenko" else (2, 3))
    one, plain = (column(tmp_path / x, "features") for x in ("one.h5", "plain.h5"))
    assert one.shape == plain.shape
    assert np.abs(one - plain).mean() > 1


def test_a_resumed_slide_is_normalised_alike(tmp_path: Path) -> None:
    write_simulated(tmp_path / "s.tif", np.zeros(2), seed=1, key=(0, 0))
    spec = PathologySpec(stain="macenko", tile_px=112)
    extract(tmp_path / "s.tif", tmp_path / "a.h5", spec=spec)
    interrupt(tmp_path / "s.tif", tmp_path / "b.h5", 3, spec=spec)
    extract(tmp_path / "s.tif", tmp_path / "b.h5", spec=spec)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_a_picture_comes_where_it_is_asked_for(tmp_path: Path, disc: Path) -> None:
    job = SlideJob(disc, tmp_path / "disc.h5", picture=tmp_path / "disc.jpg")
    list(pathology.extract_slides([job], SPEC, Averages))
    assert sorted(x.name for x in tmp_path.iterdir()) == ["disc.geojson", "disc.h5", "disc.jpg"]
