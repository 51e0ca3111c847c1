from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from flows.cli import app
from flows.explain import ExplanationRefused, _told, explain_slide, find_encoder
from flows.extraction import bag_path
from flows.loading import load_inputs
from flows.mlflow_store import client_of
from flows.protocol import load_protocol
from flows.site_registry import (
    encoder_folder,
    register_encoders,
    registered_encoders,
    site_tracking_uri,
)
from flows.snapshots import released, withdraw
from infra.settings import STUDY_FILE
from modalities.cohort import DataError, ManifestRow, read_cohort, rows_of
from modalities.files import digest_path
from modalities.pathology import read_bag, reader
from modalities.pathology.bags import Bag, write_bag
from tests.slides_on_disk import scene, write_slide
from tests.small_trial import DIM, prepare, settings_at

if TYPE_CHECKING:
    from pathlib import Path

    from infra.settings import SiteSettings

SITE = "site-01"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trial")
    prepare(root, {SITE: 90})
    return root


@pytest.fixture
def site(trained: Path, tmp_path: Path) -> SiteSettings:
    shutil.copytree(trained / SITE, tmp_path / SITE)
    shutil.copy(trained / STUDY_FILE, tmp_path)
    return settings_at(tmp_path, SITE)


def features(path: Path, n_tiles: int = 12, *, dim: int = DIM, **marks: str) -> Path:
    """Overlapping tiles, so that their side is not their step."""
    rng = np.random.default_rng(3)
    coords = np.array([(x * 256, y * 256) for x in range(4) for y in range(3)])[:n_tiles]
    bag = Bag(coords, rng.normal(size=(n_tiles, dim)).astype(np.float32))
    attrs = {"patch_size_level0": 512, "level0_width": 4096, "level0_height": 2048}
    write_bag(path, bag, coords_attrs=attrs, file_attrs=marks)
    return path


def test_a_map_is_the_networks_attention_in_pixels_of_the_slide(
    site: SiteSettings, tmp_path: Path
) -> None:
    protocol = load_protocol(tmp_path / STUDY_FILE)
    path = features(tmp_path / "s1.h5")
    made = explain_slide(site, protocol, path, modality="slides", out=tmp_path / "out")
    encoder, bag = find_encoder(site, "slides", None), read_bag(path)
    expected = encoder.attention([bag.features])[0]
    found = json.loads(made.outlines.read_text())["features"]
    assert made.n_tiles == len(found) == 12
    corners = np.array([tile["geometry"]["coordinates"][0] for tile in found])
    np.testing.assert_array_equal(corners[:, 0], bag.coords)
    np.testing.assert_array_equal(corners[:, 2], bag.coords + 512)
    np.testing.assert_array_equal(corners[:, 4], corners[:, 0])
    measured = [tile["properties"]["measurements"] for tile in found]
    np.testing.assert_allclose([x["Attention"] for x in measured], expected)
    np.testing.assert_allclose([x["Attention to even"] for x in measured], 12 * expected)
    assert sum(x["Attention"] for x in measured) == pytest.approx(1.0)
    with Image.open(made.picture) as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    assert made.picture.stat().st_mode & 0o077 == 0


def test_a_slide_is_embedded_where_the_site_has_no_features_of_it(
    site: SiteSettings, tmp_path: Path
) -> None:
    text = (tmp_path / STUDY_FILE).read_text()
    tiny = 'kind = "pathology"\nencoder = "test_efficientnet"\npretrained = false\n'
    (tmp_path / STUDY_FILE).write_text(text.replace('kind = "pathology"\n', tiny))
    protocol = load_protocol(tmp_path / STUDY_FILE)
    disc = write_slide(tmp_path / "disc.tif", scene())
    # The network was trained on tiles of another dimension: that is said, not guessed at.
    with pytest.raises(DataError, match=rf"needed \(n_tiles, {DIM}\)"):
        explain_slide(site, protocol, disc, modality="slides", out=tmp_path / "out")
    made_now, spec = tmp_path / "out" / "disc.h5", protocol.modality["slides"].fingerprint()
    for other in ((spec, "another slide"), ("another spec", digest_path(disc))):
        features(made_now, spec_fingerprint=other[0], input_digest=other[1])
        with pytest.raises(DataError, match=rf"needed \(n_tiles, {DIM}\)"):
            explain_slide(site, protocol, disc, modality="slides", out=tmp_path / "out")
    before = made_now.stat().st_mtime_ns
    with pytest.raises(DataError, match="needed"):
        explain_slide(site, protocol, disc, modality="slides", out=tmp_path / "out")
    assert made_now.stat().st_mtime_ns == before


@pytest.mark.parametrize("shown_from", [(0, 0), (70, 30)])
def test_what_the_site_extracted_is_used(
    site: SiteSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown_from: tuple[int, int]
) -> None:
    monkeypatch.setattr(reader.Slide, "shown_from", shown_from)  # a scanner's bounds
    protocol = load_protocol(tmp_path / STUDY_FILE)
    spec = protocol.modality["slides"]
    disc = write_slide(tmp_path / "disc.tif", scene())
    site.path("manifest.csv").write_text(f"patient_id,modality,path\np1-000,slides,{disc}\n")
    row = ManifestRow("p1-000", "slides", disc, None, None)
    bag = features(bag_path(row, site.path("features", "slides")))
    tiles = read_bag(bag)
    write_bag(
        bag, tiles, coords_attrs={"patch_size_level0": 224},
        file_attrs={"spec_fingerprint": spec.fingerprint(), "input_digest": digest_path(disc)},
    )  # fmt: skip
    made = explain_slide(site, protocol, disc, modality="slides", out=tmp_path / "out")
    assert made.n_tiles == 12
    found = json.loads(made.outlines.read_text())["features"]
    corners = np.array([tile["geometry"]["coordinates"][0][0] for tile in found])
    np.testing.assert_array_equal(corners, tiles.coords - shown_from)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "disc-attention.geojson", "disc-attention.png",
    ]  # fmt: skip
    # Another slide in its place is not shown below the map of the one that was extracted.
    write_slide(disc, scene(600))
    with pytest.raises(Exception, match=rf"needed \(n_tiles, {DIM}\)"):
        explain_slide(site, protocol, disc, modality="slides", out=tmp_path / "out")


def test_a_withdrawn_patient_is_not_explained(site: SiteSettings, tmp_path: Path) -> None:
    protocol = load_protocol(tmp_path / STUDY_FILE)
    disc = write_slide(tmp_path / "disc.tif", scene())
    site.path("manifest.csv").write_text(f"patient_id,modality,path\np1-000,slides,{disc}\n")
    kept = site.path("explained", "disc-attention.png")
    kept.parent.mkdir()
    kept.touch()
    withdraw(site, "p1-000")
    assert not kept.exists()
    with pytest.raises(ExplanationRefused, match="withdrawn"):
        explain_slide(site, protocol, disc, modality="slides", out=tmp_path / "out")


def test_registering_an_encoder_keeps_maps_in_the_sites_own_store(
    site: SiteSettings, tmp_path: Path
) -> None:
    protocol = load_protocol(tmp_path / STUDY_FILE)
    cohort = load_inputs(site, protocol).cohort
    assert register_encoders(site, protocol, cohort) == 2
    client = client_of(site_tracking_uri(site))
    (version,) = client.search_model_versions("name = 'small-slides-encoder'")
    kept = {x.path for x in client.list_artifacts(version.run_id, "attention")}
    assert kept == {
        f"attention/{name}-attention{suffix}"
        for name in ("highest", "middle", "lowest") for suffix in (".png", ".geojson")
    }  # fmt: skip
    assert len(list(site.path("runs", "artifacts").rglob("*-attention.png"))) == 3
    path = features(tmp_path / "s1.h5")
    named = [
        explain_slide(site, protocol, path, modality="slides", model=x, out=tmp_path / str(i))
        for i, x in enumerate(
            [None, "small-slides-encoder", "small-slides-encoder/1", "encoders/slides"]
        )
    ]
    assert len({x.outlines.read_bytes() for x in named}) == 1
    with pytest.raises(ExplanationRefused, match="small-slides-encoder"):
        explain_slide(
            site, protocol, path, modality="slides", model="small-slides-encoder/9", out=tmp_path
        )
    (one,) = [x for x in registered_encoders(site) if x.modality == "slides"]
    folder = encoder_folder(site, one)
    assert folder is not None
    with (folder / "encoder.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ExplanationRefused, match="found no whole encoder"):
        find_encoder(site, "slides", "small-slides-encoder")
    weights = site.path("encoders", "slides", "encoder.safetensors")
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # of one number
    weights.write_bytes(content)
    with pytest.raises(ExplanationRefused, match="other than those that this site registered"):
        find_encoder(site, "slides", None)


def test_maps_are_kept_of_the_highest_and_the_lowest_log_hazard(
    site: SiteSettings, tmp_path: Path
) -> None:
    snapshot = released(site, load_protocol(tmp_path / STUDY_FILE))
    cohort = read_cohort(snapshot.cohort)
    rows = np.flatnonzero(rows_of(cohort, "slides") >= 0)
    log_hazard = np.load(site.path("encoders", "slides", "log_hazard.npy"))
    told = {name: (who, bag) for name, who, bag in _told(site, cohort, snapshot.features, "slides")}
    assert list(told) == ["highest", "middle", "lowest"]
    for name, at in (("highest", log_hazard.argmax()), ("lowest", log_hazard.argmin())):
        patient_id, bag = told[name]
        assert patient_id == cohort.obs_names[rows[at]]
        assert bag == snapshot.features / cohort.mod["slides"].obs["bag"][patient_id]


def test_a_network_without_attention_says_so(site: SiteSettings) -> None:
    with pytest.raises(ExplanationRefused, match="reads the mean of a patient's tiles"):
        find_encoder(site, "gait", None)
    shutil.rmtree(site.path("encoders"))
    with pytest.raises(ExplanationRefused, match="run `consilium site train`"):
        find_encoder(site, "slides", None)


def test_the_command_writes_below_the_site(
    site: SiteSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = features(tmp_path / "s1.h5")
    told = run_command(["explain", "pathology", "--slide", str(path), "--root", str(tmp_path)])
    assert told == 0
    assert "12 tiles" in capsys.readouterr().out
    assert (site.home / "explained" / "s1-attention.png").is_file()
    assert site.path("explained").stat().st_mode & 0o077 == 0


def run_command(arguments: list[str]) -> Any:
    return app(arguments, standalone_mode=False) or 0
