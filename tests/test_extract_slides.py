"""``consilium extract pathology`` as it is typed, and what it shows on the way."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest
import timm
from rich.console import Console
from safetensors.torch import save_file

from flows.cli import main
from flows.demo import demo_protocol
from flows.slide_progress import SlideProgress
from modalities.files import digest_path
from modalities.pathology import TileCount
from modalities.pathology.encoder_names import KNOWN_ENCODERS
from tests.slides_on_disk import scene, with_hole, write_slide

if TYPE_CHECKING:
    from pathlib import Path

Call = Callable[..., tuple[int, str, str]]
TINY = ("--encoder", "test_efficientnet")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(
            sys, "argv", ["consilium", "extract", "pathology", *map(str, arguments)]
        )
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        assert isinstance(status, int)
        return status, *capfd.readouterr()

    return call


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    path = tmp_path / "mine.safetensors"
    save_file(model.state_dict(), path)
    return path


def outcomes(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "outcomes.csv").open(encoding="utf-8") as stream:
        return {row["slide"]: row for row in csv.DictReader(stream)}


def test_slides_are_done_or_set_aside_with_a_reason(
    run: Call, tmp_path: Path, weights: Path
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    write_slide(slides / "a.tif", scene())
    with_hole(write_slide(slides / "b.tif", scene()), 5)
    (slides / "c.svs").write_text("no slide")
    write_slide(slides / "d.tif", scene(), mpp=None)
    write_slide(slides / "e.tif", scene(), mpp=None)
    (tmp_path / "mpp.csv").write_text("wsi,mpp\ne.tif,0.5\n")
    options = ("--weights", weights, "--mpp-csv", "mpp.csv", "--stride", "112", "--max-tiles", "9",
               "--min-tissue", "0.7", "--to", "anndata", "--no-thumbnails")  # fmt: skip
    status, out, err = run("slides", "--out", "f", *TINY, *options)
    assert (status, err) == (0, "")
    found = outcomes(tmp_path / "f")
    assert {k: (v["outcome"], v["code"]) for k, v in found.items()} == {
        "a": ("done", ""),
        "b": ("partial", "damaged_tiles"),
        "c": ("failed", "not_a_slide"),
        "d": ("failed", "missing_resolution"),
        "e": ("done", ""),
    }
    assert "a: done, 9 tiles\n" in out
    assert "c: failed, not_a_slide: slide: found a file" in out
    assert sorted(p.name for p in (tmp_path / "f").glob("a.*")) == ["a.geojson", "a.h5", "a.h5ad"]
    with h5py.File(tmp_path / "f" / "a.h5", "r") as file:
        assert file.attrs["weights_sha256"] == digest_path(weights)
        assert file["coords"].attrs["overlap"] == 112
        assert np.isfinite(file["features"][()]).all()
    assert "a: done, 9 tiles, unchanged" in run("slides", "--out", "f", *TINY, *options)[1]


def test_what_cannot_be_done_as_typed_is_one_sentence(run: Call, tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tif", scene())
    (tmp_path / "bad.pth").write_text("no weights")
    for options, sentence in (
        (("--encoder", "conch_v15"), "'conch_v15' needs "),
        (("--encoder", "uni_v3"), "close names are uni_v"),
        (("--weights", "none.pth"), "--weights: found no file none.pth"),
        ((*TINY, "--weights", "bad.pth"), "does not read as tensors"),
        (("--min-tissue", "2"), "consilium: --min-tissue: input should be less than or equal to 1"),
        (("--stride", "0"), "consilium: --stride: input should be greater"),
        (("--tile-px", "8"), "consilium: --tile-px: input should be greater"),
        (("--tissue", "hest"), "consilium: --tissue: found 'hest', needed one of none, otsu"),
        (("--encoder", "UNI_V3"), "close names are uni_v"),
        (("--encoder", "h-optimus-2"), "close names are hoptimus"),
        (("--out", "bad.pth"), "--out: found a file bad.pth, needed a folder"),
        (("--mpp-csv", "none.csv"), "mpp table: found no CSV"),
    ):
        status, out, err = run("a.tif", "--out", "f", *options)
        assert (status, out) == (2, ""), err
        assert sentence in err
        assert err.startswith("consilium: ")
        assert err.count("\n") == 1
        assert "Traceback" not in err


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path, text = tmp_path / "study.toml", demo_protocol(tables_only=False)
    assert 'encoder = "tf_efficientnet_lite0"\n' in text
    path.write_text(text.replace('"tf_efficientnet_lite0"', '"test_efficientnet"'))
    return path


def test_beside_a_study_nothing_of_it_is_left_out_in_silence(
    run: Call, tmp_path: Path, study: Path, weights: Path
) -> None:
    write_slide(tmp_path / "a.tif", scene())
    for options, sentence in (
        (("--stride", "112", *TINY), "--study: found --encoder, --stride beside it, needed "),
        (("--weights", weights), "weights: found a file beside --study and no weights_sha256"),
    ):
        status, out, err = run("a.tif", "--out", "f", "--study", study, *options)
        assert (status, out) == (2, ""), err
        assert sentence in err
        assert err.count("\n") == 1
    pinned = f'encoder = "test_efficientnet"\nweights_sha256 = "{digest_path(weights)}"'
    study.write_text(study.read_text().replace('encoder = "test_efficientnet"', pinned))
    status, out, err = run("a.tif", "--out", "f", "--study", study, "--weights", weights)
    assert (status, err) == (0, ""), err


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_the_encoders_are_listed(run: Call, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setattr("flows.extract_cli._OUT", Console(force_terminal=True, width=int(columns)))
    status, out, _ = run("--list-encoders")
    assert status == 0
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in out.splitlines()]
    for known in KNOWN_ENCODERS:
        assert any(line.startswith(f"{known.name} ") for line in lines), known.name
    assert "://" not in out
    assert "…" not in out  # nothing is cut off
    assert max(len(line.rstrip()) for line in lines[:-3]) <= int(columns)


def test_an_encoders_own_tiles_are_cut_unless_others_are_asked_for() -> None:
    from flows.extract_cli import _slide_spec

    own = _slide_spec("conch_v1", None, tile_px=None, tile_mpp=None)
    assert (own.tile_px, own.tile_mpp) == (512, 0.5)
    asked = _slide_spec("ctranspath", None, tile_px=224, tile_mpp=None)
    assert (asked.tile_px, asked.tile_mpp) == (224, 1.0)
    other = _slide_spec("resnet18", None, tile_px=None, tile_mpp=None)
    assert (other.tile_px, other.tile_mpp) == (224, 0.5)


def test_progress_counts_tiles_and_expects_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    progress = SlideProgress(4)
    progress.watch(TileCount("a", 60, 100))  # 60 of an earlier run
    now = 110.0
    progress.watch(TileCount("a", 100, 100))
    assert (progress.n_done, progress.tiles_per_s) == (100, 4.0)
    assert progress.n_expected == 400
    progress.advance(1)
    assert progress.description == "slide 2 of 4"
    progress.watch(TileCount("b", 10, 300))
    assert progress.n_expected == 800
    progress.advance(3)
    assert (progress.n_expected, progress.description) == (400, "slide 4 of 4")
