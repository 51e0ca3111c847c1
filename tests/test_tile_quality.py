from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pydantic import ValidationError
from scipy import ndimage

from modalities.cohort import DataError
from modalities.pathology import PathologySpec, planning, quality, reader, reading, stain
from tests.slides_on_disk import code_of, real_slide

if TYPE_CHECKING:
    from pathlib import Path

# Optical densities (natural logarithm) of two dyes, as unit vectors.
DYES = np.array([[0.65, 0.70, 0.29], [0.27, 0.93, 0.24]])
DYES /= np.linalg.norm(DYES, axis=1, keepdims=True)


def mixtures(amounts: np.ndarray, dyes: np.ndarray = DYES, glass: float = 240.0) -> np.ndarray:
    """Pixels (..., 3) of amounts (..., 2) of two dyes, by Beer and Lambert's law."""
    return np.rint(glass * np.exp(-(amounts @ dyes)) - 1).clip(0, 255).astype(np.uint8)


def stained(seed: int = 0, n: int = 6) -> np.ndarray:
    """Tiles (n, 64, 64, 3), some pixels of one dye alone, some of both, some of none."""
    rng = np.random.default_rng(seed)
    amounts = rng.gamma(2.0, 0.5, (n, 64, 64, 2)) + 0.3
    kind = rng.integers(0, 4, (n, 64, 64))
    amounts[kind == 0, 0] = 0
    amounts[kind == 1, 1] = 0
    amounts[kind == 2] = 0
    return mixtures(amounts)


@pytest.fixture(scope="session")
def real_tiles(shared_data: Path) -> np.ndarray:
    with reader.open_slide(real_slide(shared_data)) as slide:
        coords = planning.plan_slide(slide, PathologySpec()).coords
        with reading.tile_reader(slide, tile_px=224, mpp=0.5) as found:
            return found.read_tiles(coords, tile_px=224, mpp=0.5).pixels


def judge(tiles: np.ndarray) -> quality.Quality:
    return quality.tile_quality(tiles, np.ones(len(tiles), dtype=bool))


def flat(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((1, 224, 224, 3), colour, dtype=np.uint8)


@pytest.mark.parametrize(
    ("colour", "pen", "white"),
    [
        ((30, 60, 170), 1, 0),  # blue pen
        ((20, 120, 60), 1, 0),  # green pen
        ((15, 15, 20), 1, 0),  # black pen
        ((243, 242, 244), 0, 1),  # glass
        ((120, 70, 150), 0, 0),  # haematoxylin
        ((230, 130, 170), 0, 0),  # eosin
        ((170, 40, 50), 0, 0),  # blood
    ],
)
def test_colours_are_told_apart(colour: tuple[int, int, int], pen: int, white: int) -> None:
    found = judge(flat(colour))
    assert (found.pen, found.white, found.blur) == (pen, white, 1)


def test_shares_count_pixels() -> None:
    tile = flat((200, 120, 170))
    tile[:, :112, :112] = (30, 60, 170)
    tile[:, 112:, :112] = 245
    found = judge(tile)
    assert found.pen == pytest.approx(0.25)
    assert found.white == pytest.approx(0.25)


def test_blur_follows_the_variance_of_the_laplacian() -> None:
    rng = np.random.default_rng(5)
    tiles = rng.integers(100, 160, (4, 224, 224, 3), dtype=np.uint8)
    found = judge(tiles).blur
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    for tile, blur in zip(tiles, found, strict=True):
        laplacian = ndimage.convolve(tile[..., 1].astype(float), kernel)[1:-1:8, 1:-1]
        assert blur == pytest.approx(100 / (100 + laplacian.var()), rel=1e-4)


@pytest.mark.parametrize("side", [32, 33, 100, 224, 512])
def test_any_size_of_tile_is_judged(side: int) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    assert all(np.isfinite(x).all() and x.shape == (2,) for x in judge(tiles))
    assert all(x.shape == (0,) for x in judge(tiles[:0]))


def test_real_tissue_is_good_and_its_blurred_copy_is_not(real_tiles: np.ndarray) -> None:
    spec, decoded = PathologySpec(), np.ones(len(real_tiles), dtype=bool)
    sharp = judge(real_tiles)
    assert quality.is_good(sharp, decoded, spec).all()
    before = sharp.blur
    for radius in (1, 2, 4):
        blurred = np.stack(
            [
                np.asarray(Image.fromarray(x).filter(ImageFilter.GaussianBlur(radius)))
                for x in real_tiles
            ]
        )
        found = judge(blurred)
        assert (found.blur > before).all()
        before = found.blur
    assert not quality.is_good(found, decoded, spec).any()
    assert not quality.is_good(sharp, ~decoded, spec).any()


def test_macenko_finds_the_dyes_of_a_mixture() -> None:
    fitted = np.array(stain.measure(stained(), "macenko"))
    assert np.sum(fitted[:, :3] * DYES, axis=1) == pytest.approx([1, 1], abs=2e-3)


def published_macenko(tile: np.ndarray, fitted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Amounts by least squares, scaled, shown in the reference's dyes, one pixel at a time."""
    density = -np.log((tile.reshape(-1, 3).astype(float) + 1) / 240)
    amounts, *_ = np.linalg.lstsq(fitted[:, :3].T, density.T, rcond=None)
    amounts *= (target[:, 3] / fitted[:, 3])[:, None]
    shown = 240 * np.exp(-(target[:, :3].T @ amounts).T)
    return shown.clip(0, 255).reshape(tile.shape)


def test_macenko_is_the_published_method() -> None:
    tiles = stained()
    normalise = stain.normaliser(tiles, "macenko", None)
    fitted, target = np.array(normalise.fitted), np.array(stain.REFERENCES["macenko"])
    for tile, found in zip(tiles, normalise(tiles), strict=True):
        assert np.abs(found - published_macenko(tile, fitted, target)).max() <= 0.51


def published_reinhard(tile: np.ndarray, fitted: np.ndarray, target: np.ndarray) -> np.ndarray:
    """By way of the channels l, alpha, beta of Ruderman and others, in float64."""
    to_lms = np.array(
        [[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]]
    )
    to_lab = np.diag([1 / 3**0.5, 1 / 6**0.5, 1 / 2**0.5]) @ [[1, 1, 1], [1, 1, -2], [1, -1, 0]]
    lms = tile.reshape(-1, 3).clip(1).astype(float) / 255 @ to_lms.T
    lab = np.log(lms) @ to_lab.T
    moved = (lab - fitted[0]) / fitted[1] * target[1] + target[0]
    shown = 255 * np.exp(moved @ np.linalg.inv(to_lab).T) @ np.linalg.inv(to_lms).T
    return shown.clip(0, 255).reshape(tile.shape)


def test_reinhard_is_the_published_method() -> None:
    tiles = stained()
    normalise = stain.normaliser(tiles, "reinhard", None)
    fitted, target = np.array(normalise.fitted), np.array(stain.REFERENCES["reinhard"])
    for tile, found in zip(tiles, normalise(tiles), strict=True):
        assert np.abs(found - published_reinhard(tile, fitted, target)).max() <= 0.52


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_a_slide_normalised_to_itself_stays(real_tiles: np.ndarray, method: stain.Method) -> None:
    own = stain.measure(real_tiles, method)
    found = stain.normaliser(real_tiles, method, own)(real_tiles)
    difference = np.abs(found.astype(int) - real_tiles)
    # Macenko keeps what two dyes can say of three channels.
    assert difference.mean() < (12 if method == "macenko" else 0.6)


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
def test_two_laboratories_come_closer(method: stain.Method) -> None:
    rng = np.random.default_rng(1)
    amounts = rng.gamma(2.0, 0.5, (4, 64, 64, 2)) + 0.2
    other = np.array([[0.75, 0.60, 0.28], [0.20, 0.90, 0.38]])
    tiles = [mixtures(amounts), mixtures(0.7 * amounts, other)]
    apart = np.abs(tiles[0].astype(int) - tiles[1]).mean()
    one, two = (stain.normaliser(x, method, None)(x).astype(int) for x in tiles)
    assert np.abs(one - two).mean() < 0.35 * apart


@pytest.mark.parametrize("method", ["macenko", "reinhard"])
@pytest.mark.parametrize("colour", [(243, 243, 243), (200, 120, 170)])
def test_a_slide_without_two_dyes_is_refused(
    method: stain.Method, colour: tuple[int, int, int]
) -> None:
    tiles = np.full((4, 64, 64, 3), colour, dtype=np.uint8)
    with pytest.raises(DataError) as error:
        stain.normaliser(tiles, method, None)
    assert code_of(error) == "stain"


@pytest.mark.parametrize(
    "fields",
    [
        {"stain": "none", "stain_reference": ((0.0,) * 3,) * 2},
        {"stain": "macenko", "stain_reference": ((0.0,) * 3,) * 2},
        {"stain": "reinhard", "stain_reference": ((0.0,) * 3,) * 3},
        {"stain": "vahadane"},
    ],
)
def test_a_reference_has_the_shape_of_its_method(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PathologySpec(**fields)
    reference = stain.REFERENCES["reinhard"]
    assert PathologySpec(stain="reinhard", stain_reference=reference).stain_reference == reference
