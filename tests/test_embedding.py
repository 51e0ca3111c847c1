from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest

from flows import embedding
from flows.check import _check_row
from flows.embedding import Means, SlideInput, embed_slides, means_of
from flows.extraction import Ledger, bag_path, collect, extract_batch, plan_modality
from infra.settings import SiteSettings
from modalities.cohort import DataError, ManifestRow
from modalities.files import digest_path
from modalities.pathology import PathologySpec, WrongWeights, read_bag
from tests.slides_on_disk import Averages, code_of, scene, write_slide

if TYPE_CHECKING:
    from pathlib import Path

SPEC = PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")
WEIGHTS = "a" * 64


def settings(home: Path, **more: Any) -> SiteSettings:
    return SiteSettings(name="site-01", home=home, secret="s" * 32, **more)


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """As TRIDENT writes them, of an encoder that cannot run here."""
    path = tmp_path / "raw" / "features_conch_v15" / "s1.h5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        file["features"] = np.random.default_rng(0).normal(size=(4, 768)).astype(np.float32)
        file["coords"] = np.arange(8).reshape(4, 2) * 1024
    return path


def test_features_made_elsewhere_join_the_cohort(tmp_path: Path, features: Path) -> None:
    spec = PathologySpec(encoder="conch_v15", tile_px=512)
    rows = [ManifestRow("p1", "slides", features, None, None)]

    def planned() -> Any:
        return plan_modality(
            "slides", spec, rows, features=tmp_path / "features",
            ledger=Ledger(tmp_path / "digests.json"), secret=b"s" * 32, batch_size=8,
        )  # fmt: skip

    work = planned()
    assert extract_batch(work.pending[0], spec, work.features) == []
    table = collect(work)
    assert table is not None
    bag = bag_path(rows[0], work.features / "slides")
    np.testing.assert_allclose(table.X[0], read_bag(features).features.mean(axis=0), atol=1e-6)
    with h5py.File(bag, "r") as file:
        assert file.attrs["input_digest"] == digest_path(features)
        assert file.attrs["spec_fingerprint"] == spec.fingerprint()
    assert planned().pending == ()
    with h5py.File(features, "r+") as file:
        file["features"][0] = 0.0
    assert len(planned().pending) == 1


def test_a_check_looks_at_features_made_elsewhere(features: Path) -> None:
    row = ManifestRow("p1", "slides", features, None, None)
    _check_row(row, PathologySpec(encoder="conch_v15", tile_px=512))
    with pytest.raises(DataError) as error:
        _check_row(row, PathologySpec(encoder="conch_v1", tile_px=512))
    assert code_of(error) == "other_encoder"


def test_slides_and_features_of_one_batch_are_set_aside_one_by_one(
    tmp_path: Path, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str | None] = []

    def load(spec: PathologySpec, weights: Path | None, device: str | None) -> Averages:
        loaded.append(device)
        return Averages()

    monkeypatch.setattr(embedding, "_loaded", load)
    monkeypatch.setattr(embedding, "found_devices", lambda: ("cuda:0", "cuda:1"))
    disc = write_slide(tmp_path / "disc.tif", scene())
    (tmp_path / "text.svs").write_text("no slide")
    paths = [disc, tmp_path / "text.svs", features, disc, disc]
    inputs = [
        SlideInput(f"p{i}", path, digest_path(path), tmp_path / f"{i}.h5", {"key": str(i)})
        for i, path in enumerate(paths)
    ]
    inputs.append(SlideInput("p9", paths[1], inputs[1].digest, inputs[1].bag, {"key": "1"}))
    excluded = embed_slides(inputs, SPEC, "slides", Means(slots=2))
    assert {(x.patient_id, x.code) for x in excluded} == {
        ("p1", "not_a_slide"), ("p9", "not_a_slide"), ("p2", "other_encoder"),
    }  # fmt: skip
    assert set(loaded) <= {"cuda:0", "cuda:1"}
    for i in (0, 3, 4):
        with h5py.File(tmp_path / f"{i}.h5", "r") as file:
            assert file.attrs["key"] == str(i)


def test_a_batch_that_is_tried_again_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Averages):
        n_left, n_batches = 20, 0

        def embed(self, tiles: np.ndarray) -> np.ndarray:
            self.n_left -= 1
            self.n_batches += 1
            if self.n_left == 0:
                raise OSError("a disk that is away")
            return super().embed(tiles)

    encoder = Failing()
    monkeypatch.setattr(embedding, "_loaded", lambda *arguments: encoder)
    disc = write_slide(tmp_path / "disc.tif", scene())
    spec = SPEC.model_copy(update={"tile_px": 64, "max_tiles": 60})
    inputs = [
        SlideInput(f"p{i}", disc, digest_path(disc), tmp_path / f"{i}.h5", {"key": str(i)})
        for i in range(2)
    ]
    with pytest.raises(OSError, match="away"):
        embed_slides(inputs, spec, "slides")
    assert embed_slides(inputs, spec, "slides") == []
    assert encoder.n_batches == 2 * 15 + 1  # the one that failed; none was embedded twice
    again = [SlideInput(x.patient_id, x.path, x.digest, x.bag, {"key": "new"}) for x in inputs]
    assert embed_slides(again, spec, "slides") == []
    assert encoder.n_batches == 4 * 15 + 1


def test_a_site_names_weights_that_the_study_pins(tmp_path: Path) -> None:
    site = settings(tmp_path, weights={"slides": "models/uni.bin"}, gpu_slots=3)
    pinned = PathologySpec(encoder="uni_v1", weights_sha256=WEIGHTS)
    assert means_of(site, "slides", pinned) == Means(3, tmp_path / "models/uni.bin")
    assert means_of(site, "others", pinned) == Means(3)
    with pytest.raises(WrongWeights, match="no weights_sha256 in the study"):
        means_of(site, "slides", PathologySpec(encoder="uni_v1"))
