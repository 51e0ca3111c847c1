"""A patient's page for the treatment board: what it says, who may read it, that it is one page."""

from __future__ import annotations

import base64
import dataclasses
import re
import shutil
import stat
from html.parser import HTMLParser
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from flows.board import patients_beside, write_boards
from flows.board_figures import attention_figure, contributions_figure, shares_figure
from flows.prediction import predict_cohort
from flows.protocol import load_protocol
from flows.registered_model import PredictionRefused, StudyModel, open_model
from flows.snapshots import COHORT, withdraw
from flows.tile_maps import TileMap, tile_map
from fusion.encoders import FittedEncoder
from infra.settings import STUDY_FILE, Workspace
from modalities.cohort import write_cohort
from modalities.pathology import read_bag
from modalities.pathology.bags import Bag, write_bag
from modalities.synthetic.slides import SLIDE_PX, write_slide
from tests.small_trial import SITES, cohort_of, patients, prepare, run, settings_at

if TYPE_CHECKING:
    from pathlib import Path

    from flows.site_scoring import SiteScorer
    from infra.settings import SiteSettings

HOSTILE = "<script>alert('x')</script>&../../p"
SITE = "site-01"


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trial")
    prepare(root)
    run(root)
    return root


@pytest.fixture(scope="module")
def model(trial: Path) -> StudyModel:
    return open_model(Workspace(root=trial), "small")


@pytest.fixture
def copied(trial: Path, tmp_path: Path) -> Path:
    for site in SITES:
        shutil.copytree(trial / site, tmp_path / site)
    shutil.copy(trial / STUDY_FILE, tmp_path)
    return tmp_path


class Read(HTMLParser):
    """Text of a page, its tags, and everything it would fetch."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.said, self.tags, self.fetched = [], [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [v or "" for k, v in attrs if k in {"src", "href", "action", "srcset"}]

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.said).split())


def with_slide(root: Path, model: StudyModel) -> str:
    """Pseudonym of somebody who has every modality."""
    settings = settings_at(root, SITE)
    table = predict_cohort(settings, model, settings.path(COHORT)).table
    return str(table.index[(table["lacking"] == "") & (table["in_study"] == "test")][0])


def test_a_page_says_the_risk_and_stands_alone(copied: Path, model: StudyModel) -> None:
    settings, patient = settings_at(copied, SITE), with_slide(copied, model)
    (page,), n_without = write_boards(settings, model, patients=[patient])
    assert (page, n_without) == (settings.path("board", f"{patient}.html"), 0)
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert stat.S_IMODE(page.parent.stat().st_mode) == 0o700
    found = predict_cohort(settings, model, settings.path(COHORT)).table.loc[patient]
    read = Read(page.read_text())
    assert f"{100 * found['risk_by_730_days']:.0f} %" in read.text
    assert f"Surviving {100 * found['survival_365']:.0f} %" in read.text
    assert "Research only" in read.text
    assert "small-fusion version 1 (candidate)" in read.text
    assert "evaluated on this patient" in read.text
    assert "No modality is missing" in read.text
    assert "own network, which the model reads" in read.text
    beside, trained = patients_beside(settings, model)
    assert trained
    percent = round(100 * float(np.mean(beside < found["log_hazard"])))
    assert f"Higher risk than {percent} of 100" in read.text
    assert "script" not in read.tags
    assert len([x for x in read.fetched if x.startswith("data:image/")]) == 3
    assert all(x.startswith("data:image/") for x in read.fetched)


def test_missing_modalities_are_said_plainly(copied: Path, model: StudyModel) -> None:
    settings = settings_at(copied, SITE)
    table = predict_cohort(settings, model, settings.path(COHORT)).table
    lacking = table.index[(table["lacking"] == "slides")][0]
    (page,), _ = write_boards(settings, model, patients=[str(lacking)])
    read = Read(page.read_text())
    assert "Missing: slides." in read.text
    assert len([x for x in read.fetched if x.startswith("data:image/")]) == 2


def test_a_hostile_pseudonym_is_text_and_no_path(
    copied: Path, model: StudyModel, tmp_path: Path
) -> None:
    settings = settings_at(copied, SITE)
    table = patients(1, 2, first=800)
    table.index = [HOSTILE, "p1"]
    table.loc[HOSTILE, "tile"] = np.nan
    table.loc["p1", "tile"] = np.nan
    path = tmp_path / "hostile.h5mu"
    write_cohort(cohort_of(table, load_protocol(copied / STUDY_FILE), tmp_path), path)
    (page,), _ = write_boards(settings, model, patients=[HOSTILE], cohort=path)
    assert page.parent == settings.path("board")
    text = page.read_text()
    assert "<script" not in text
    assert HOSTILE in Read(text).text
    assert "took no part in making the model" in text


def test_everybody_gets_a_page_and_a_site_that_trains_nothing_too(
    copied: Path, model: StudyModel
) -> None:
    settings = settings_at(copied, "site-03")
    pages, n_without = write_boards(settings, model)
    assert len(pages) + n_without == SITES["site-03"]
    read = Read(pages[0].read_text())
    assert "Too few patients of this hospital took part" in read.text
    assert "gait counts as missing" in read.text.lower()


def test_withdrawn_and_unknown_patients_have_no_page(copied: Path, model: StudyModel) -> None:
    settings, patient = settings_at(copied, SITE), with_slide(copied, model)
    (page,), _ = write_boards(settings, model, patients=[patient])
    with pytest.raises(PredictionRefused, match="found nobody of this pseudonym"):
        write_boards(settings, model, patients=["nobody"])
    kept = shutil.copy(settings.path(COHORT), copied / "kept.h5mu")
    withdraw(settings, patient)
    assert not page.exists()
    with pytest.raises(PredictionRefused, match="was withdrawn"):
        write_boards(settings, model, patients=[patient], cohort=copied / kept)


def let_look(settings: SiteSettings) -> None:
    """Let the site's own network weigh tiles, of which it has learned nothing from so few."""
    path = settings.path("encoders", "slides", "encoder.safetensors")
    encoder = FittedEncoder.from_bytes(path.read_bytes())
    for network in encoder.networks:
        network.out.weight.normal_(generator=torch.Generator().manual_seed(1))
    path.write_bytes(encoder.to_bytes())


def test_attention_is_that_of_the_network_over_the_patients_tiles(
    copied: Path, model: StudyModel
) -> None:
    settings, patient = settings_at(copied, SITE), with_slide(copied, model)
    let_look(settings)
    found = predict_cohort(settings, model, settings.path(COHORT), only=[patient])
    tiles = tile_map(found.scorer, patient)
    assert tiles is not None
    assert tiles.attention is not None
    assert not tiles.is_even
    assert tiles.share is None  # the model reads the network, not a mean of tiles
    assert tiles.overview is None  # its slide is not there
    np.testing.assert_allclose(tiles.attention.sum(), 1.0, rtol=1e-6)
    bag = read_bag(found.scorer.features / found.scorer.cohort.mod["slides"].obs["bag"][patient])
    encoder = found.scorer.own_encoder("slides")
    assert encoder is not None
    np.testing.assert_allclose(tiles.attention, encoder.attention([bag.features])[0])
    np.testing.assert_array_equal(tiles.coords, bag.coords)
    assert (tiles.side_px, tiles.size_px) == (512.0, (2048.0, 1536.0))
    _beside_a_smaller_slide(found.scorer, patient, bag)


def _beside_a_smaller_slide(scorer: SiteScorer, patient: str, bag: Bag) -> None:
    """The larger of two slides is shown, with the weights of its own tiles among those of both."""
    small = Bag(bag.coords[:5], -bag.features[:5])
    write_bag(scorer.features / "small.h5", small, coords_attrs={}, file_attrs={})
    known = scorer.cohort.mod["slides"].obs["bag"].astype(str)
    scorer.cohort.mod["slides"].obs["bag"] = known.where(
        known.index != patient, "small.h5;" + known
    )
    tiles, encoder = tile_map(scorer, patient), scorer.own_encoder("slides")
    assert tiles is not None
    assert encoder is not None
    assert tiles.n_slides == 2
    np.testing.assert_array_equal(tiles.coords, bag.coords)
    both = encoder.attention([np.concatenate([small.features, bag.features])])[0]
    np.testing.assert_allclose(tiles.attention, both[5:])
    assert np.abs(both[: len(bag.coords)] - both[5:]).max() > 1e-3  # or nothing is shown


def leave_slide(root: Path, patient: str) -> Path:
    """Draw a patient's slide, list it, and cut the patient's bag from it: twelve tiles."""
    home = settings_at(root, SITE).home
    slide = home / "slides" / f"{patient}.tif"
    slide.parent.mkdir(exist_ok=True)
    write_slide(slide, np.array([1.0, -0.5]), seed=3, key=(0, 7))
    (home / "manifest.csv").write_text(
        f"patient_id,modality,path,mask_path,roi\n{patient},slides,slides/{patient}.tif,,\n"
    )
    path = home / "features" / "slides" / f"{patient}-0123abcd.h5"
    old = read_bag(path)
    coords = np.array([(256 + x * 128, y * 128) for x in range(4) for y in range(3)])
    noted: dict[str, Any] = {
        "patch_size_level0": 128, "level0_width": SLIDE_PX, "level0_height": SLIDE_PX,
    }  # fmt: skip
    bag = Bag(coords.astype(np.int64), old.features)
    write_bag(path, bag, coords_attrs=noted, file_attrs={})
    return slide


def mapped(root: Path, model: StudyModel, patient: str) -> TileMap:
    settings = settings_at(root, SITE)
    scorer = predict_cohort(settings, model, settings.path(COHORT), only=[patient]).scorer
    found = tile_map(scorer, patient)
    assert found is not None
    return found


def test_behind_the_tiles_lies_the_patients_own_slide(copied: Path, model: StudyModel) -> None:
    patient = with_slide(copied, model)
    slide = leave_slide(copied, patient)
    tiles = mapped(copied, model, patient)
    whole = tifffile.imread(slide, level=0)  # read by another library than ours
    assert whole.shape == (SLIDE_PX, SLIDE_PX, 3)
    expected = np.asarray(Image.fromarray(whole).reduce(2), dtype=np.float64)
    assert tiles.overview is not None
    assert tiles.overview.shape == expected.shape
    assert np.abs(tiles.overview - expected).mean() < 4.0
    for turned in (expected[::-1], expected[:, ::-1], np.rot90(expected), expected[..., ::-1]):
        assert np.abs(tiles.overview - turned).mean() > 10.0
    tissue = expected.mean(axis=2) < 200.0
    assert 0.2 < tissue.mean() < 0.9
    assert tiles.overview[tissue].mean() < tiles.overview[~tissue].mean() - 30.0
    assert (tiles.size_px, tiles.side_px) == ((SLIDE_PX, SLIDE_PX), 128.0)


def pixels(address: str) -> np.ndarray:
    """(h, w, 3) of a drawn map."""
    return np.asarray(Image.open(BytesIO(an_image(address))).convert("RGB"), dtype=np.float64)


def test_the_drawn_map_shows_the_slide_in_its_place_and_the_tiles_over_it(
    copied: Path, model: StudyModel
) -> None:
    patient = with_slide(copied, model)
    leave_slide(copied, patient)
    tiles = mapped(copied, model, patient)
    assert tiles.overview is not None
    # Clear colours: the middle of this palette is grey.
    tiles = dataclasses.replace(tiles, attention=np.repeat([0.0, 1 / 6], 6))
    drawn = pixels(attention_figure(tiles))
    empty = pixels(attention_figure(dataclasses.replace(tiles, overview=None)))
    rows, columns = (np.flatnonzero((drawn != empty).any(axis=(1 - at, 2))) for at in (0, 1))
    inside = drawn[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    # Two tiles around the four by three: all columns and five rows of 128 pixels. Each tile is four
    # by four blocks here, the outermost of which hold the frame.
    blocks = [shrunk(x, (32, 20)) for x in (inside.mean(axis=2), tiles.overview[:320].mean(axis=2))]
    colour = shrunk(np.ptp(inside, axis=2), (32, 20))
    assert colour[1:12, 8:24].mean() > 20.0  # the tiles have colours
    bare = np.ones((20, 32), dtype=bool)
    bare[:13, 7:25] = bare[[0, -1]] = bare[:, [0, -1]] = False
    assert colour[bare].mean() < 2.0  # the slide around them is pale and grey
    grey, slide = (x[bare] for x in blocks)
    assert np.corrcoef(grey, slide)[0, 1] > 0.95
    assert np.median(np.abs(grey - (255.0 - 0.6 * (255.0 - slide)))) < 3.0
    for turned in (blocks[1][::-1], blocks[1][:, ::-1]):
        assert np.corrcoef(grey, turned[bare])[0, 1] < 0.9


def shrunk(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mean of blocks of a grey image, ``size`` of them as (width, height)."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


@pytest.mark.parametrize("fault", ["listed twice", "another's", "damaged", "unlisted"])
def test_without_the_patients_one_slide_the_map_stands_on_nothing(
    copied: Path, model: StudyModel, fault: str
) -> None:
    patient = with_slide(copied, model)
    slide = leave_slide(copied, patient)
    manifest = settings_at(copied, SITE).path("manifest.csv")
    header, row = manifest.read_text().splitlines()
    if fault == "damaged":
        slide.write_bytes(slide.read_bytes()[:2000])
    elif fault == "listed twice":
        other = slide.with_name("again") / slide.name
        other.parent.mkdir()
        shutil.copy(slide, other)
        more = row.replace("slides/", "slides/again/", 1)
        manifest.write_text("\n".join([header, row, more]) + "\n")
    else:
        rows = {"another's": row.replace(patient, "p1-999", 1), "unlisted": ""}
        manifest.write_text("\n".join([header, rows[fault]]) + "\n")
    tiles = mapped(copied, model, patient)
    assert tiles.overview is None
    assert an_image(attention_figure(tiles)).startswith(b"\x89PNG")


def test_the_page_of_a_patient_with_a_slide_shows_it(copied: Path, model: StudyModel) -> None:
    settings, patient = settings_at(copied, SITE), with_slide(copied, model)
    (page,), _ = write_boards(settings, model, patients=[patient])
    before = Read(page.read_text()).fetched
    leave_slide(copied, patient)
    (page,), _ = write_boards(settings, model, patients=[patient])
    (shown,) = [x for x in Read(page.read_text()).fetched if x.startswith("data:image/png")]
    assert shown == attention_figure(mapped(copied, model, patient))
    assert shown not in before


def an_image(address: str) -> bytes:
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return base64.b64decode(content)


@pytest.mark.parametrize("n", [1, 2, 60])
def test_maps_of_any_number_of_tiles_are_drawn(n: int) -> None:
    coords = np.array([(512 * (i % 8), 512 * (i // 8)) for i in range(n)], dtype=np.int64)
    tiles = TileMap(
        modality="slides", coords=coords, side_px=512.0, size_px=(4096.0, 4096.0),
        share=np.linspace(-1.0, 1.0, n), attention=np.full(n, 1.0 / n),
        attention_is_the_models=False, n_slides=1,
        overview=np.full((40, 40, 3), 200, dtype=np.uint8) if n > 2 else None,
    )  # fmt: skip
    assert tiles.is_even
    for draw in (shares_figure, attention_figure):
        assert an_image(draw(tiles)).startswith(b"\x89PNG")


def test_names_of_modalities_in_a_figure_are_no_markup() -> None:
    parts, has = np.array([0.0, -900.0, 5.0]), np.array([False, True, True])
    svg = contributions_figure(["<b>$x_1$", "b", "c"], parts, has, spread=np.full(3, 0.1))
    assert re.search("<b>", svg) is None
