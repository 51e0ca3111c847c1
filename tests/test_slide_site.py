"""What a site and a command line hand on to the slide extractor."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import h5py
import pytest
import timm
from safetensors.torch import save_file

from flows import embedding
from flows.cli import app
from flows.embedding import Means, SlideInput, embed_slides
from flows.protocol import load_protocol
from modalities.files import digest_path
from modalities.pathology import PathologySpec, read_bag
from tests.slides_on_disk import Averages, column, scene, write_slide
from tests.small_trial import STUDY

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np

SPEC = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")


class Counting(Averages):
    """Counts how many of its kind embed at once."""

    now = most = 0
    lock = threading.Lock()

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        with self.lock:
            Counting.now += 1
            Counting.most = max(self.most, self.now)
        time.sleep(0.02)
        with self.lock:
            Counting.now -= 1
        return super().embed(tiles)


@pytest.fixture
def slides(tmp_path: Path) -> Callable[[str], list[SlideInput]]:
    path = write_slide(tmp_path / "s.tif", scene())

    def inputs(name: str) -> list[SlideInput]:
        return [SlideInput("p", path, "d", tmp_path / f"{name}{i}.h5", {}) for i in range(3)]

    return inputs


def test_no_more_slides_are_embedded_at_once_than_a_site_allows(
    slides: Callable[[str], list[SlideInput]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on more GPUs, nor by two batches."""
    asked: list[tuple[Path | None, str | None]] = []

    def load(spec: PathologySpec, weights: Path | None, device: str | None) -> Counting:
        asked.append((weights, device))
        return Counting()

    monkeypatch.setattr(embedding, "_loaded", load)
    monkeypatch.setattr(embedding, "found_devices", lambda: ("cuda:0", "cuda:1"))
    weights = slides("a")[0].path
    batches = [
        threading.Thread(target=embed_slides, args=(slides(x), SPEC, "slides", Means(1, weights)))
        for x in "ab"
    ]
    for batch in batches:
        batch.start()
    for batch in batches:
        batch.join()
    assert Counting.most == 1
    assert asked == [(weights, "cuda:0")] * 2
    assert all(len(read_bag(x.bag).coords) for name in "ab" for x in slides(name))


def test_as_many_slides_are_embedded_at_once_as_a_site_allows(
    slides: Callable[[str], list[SlideInput]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on one device."""
    all_three = threading.Barrier(3)

    class Waiting(Averages):
        def embed(self, tiles: np.ndarray) -> np.ndarray:
            if not hasattr(self, "has_met"):
                all_three.wait(timeout=60)
                self.has_met = True
            return super().embed(tiles)

    monkeypatch.setattr(embedding, "_loaded", lambda *_: Waiting(32))
    monkeypatch.setattr(embedding, "found_devices", lambda: (None,))
    assert embed_slides(slides("a"), SPEC, "slides", Means(slots=3)) == []
    assert not all_three.broken


def told(*arguments: object) -> None:
    app(["extract", "pathology", *map(str, arguments)], standalone_mode=False)


def test_every_option_reaches_the_extractor(tmp_path: Path) -> None:
    model = timm.create_model("test_efficientnet", pretrained=False, num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    path = write_slide(tmp_path / "s.tif", scene())
    told(
        path, "--out", tmp_path / "f", "--encoder", "test_efficientnet",
        "--weights", tmp_path / "w.safetensors", "--tile-px", 96, "--tile-mpp", "0.75",
        "--stride", 80, "--min-tissue", "0.7", "--max-tiles", 20, "--tissue", "none",
        "--only-good", "--stain", "reinhard", "--precision", "bf16", "--layout", "trident",
    )  # fmt: skip
    spec = PathologySpec(
        encoder="test_efficientnet", weights_sha256=digest_path(tmp_path / "w.safetensors"),
        tile_px=96, tile_mpp=0.75, stride_px=80, min_tissue_fraction=0.7, max_tiles=20,
        tissue="none", only_good=True, stain="reinhard", precision="bf16",
    )  # fmt: skip
    bag = tmp_path / "f" / "13.33x_96px_16px_overlap" / "features_test_efficientnet" / "s.h5"
    with h5py.File(bag, "r") as file:
        assert file.attrs["spec_fingerprint"] == spec.fingerprint()
        assert file.attrs["precision"] == "bf16"
    assert 0 < len(column(bag, "coords")) < len(column(bag, "tiles/coords")) == 20


def test_a_study_says_all_of_how_its_slides_are_embedded(tmp_path: Path) -> None:
    mine = 'kind = "pathology"\nencoder = "test_efficientnet"\npretrained = false\ntile_px = 96\n'
    study = tmp_path / "study.toml"
    study.write_text(STUDY.replace('kind = "pathology"\n', mine))
    told(write_slide(tmp_path / "s.tif", scene()), "--out", tmp_path, "--study", study)
    spec = load_protocol(study).modality["slides"]
    with h5py.File(tmp_path / "s.h5", "r") as file:
        assert file.attrs["spec_fingerprint"] == spec.fingerprint()
        assert file["coords"].attrs["patch_size"] == 96
