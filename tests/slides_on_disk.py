"""Slides that the tests of the slide extractor share, and an encoder that costs nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
from PIL import Image
from tifffile import TiffFile, TiffWriter

if TYPE_CHECKING:
    from pathlib import Path

    from modalities.cohort import DataError

SIDE_PX = 1000


def scene(side_px: int = SIDE_PX) -> np.ndarray:
    """A disc of tissue on glass, the same picture at every size."""
    return _scene(side_px).copy()


@lru_cache(maxsize=8)
def _scene(side_px: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    coarse = rng.normal((190, 110, 165), 25, (50, 50, 3)).clip(0, 255).astype(np.uint8)
    picture = np.array(Image.fromarray(coarse).resize((side_px, side_px), Image.Resampling.BICUBIC))
    y, x = (np.mgrid[:side_px, :side_px] + 0.5) / side_px - 0.5
    picture[x**2 + y**2 > 0.45**2] = 243
    return picture


def write_slide(
    path: Path,
    picture: np.ndarray,
    *,
    mpp: float | None = 0.5,
    levels: int = 1,
    compression: str = "jpeg",
    **options: Any,
) -> Path:
    per_cm = None if mpp is None else (1e4 / mpp, 1e4 / mpp)
    with TiffWriter(path) as writer:
        for level in range(levels):
            writer.write(
                np.ascontiguousarray(picture[:: 2**level, :: 2**level]),
                **{"tile": (256, 256), "photometric": "rgb", **options},
                compression=compression,
                resolution=per_cm if level == 0 else None,
                resolutionunit="CENTIMETER" if per_cm and level == 0 else None,
                subfiletype=int(level > 0),
            )
    return path


def stored_tile(path: Path, number: int, page: int = 0) -> tuple[int, int]:
    """Where a stored tile stands in the file, and its length."""
    with TiffFile(path) as file:
        found = file.pages[page]
        return found.dataoffsets[number], found.databytecounts[number]


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(content)


def with_hole(path: Path, number: int, page: int = 0) -> Path:
    """Zero the bytes of one stored tile."""
    at, n_bytes = stored_tile(path, number, page)
    overwrite(path, at, bytes(n_bytes))
    return path


def touching(coords: np.ndarray, side_px: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """Which tiles at ``coords`` touch a box (left, top, right, bottom)."""
    x, y = coords.T
    left, top, right, bottom = box
    return (x < right) & (x + side_px > left) & (y < bottom) & (y + side_px > top)


def real_slide(folder: Path) -> Path:
    path = folder / "slide_cmu1_small" / "cmu_small_region.svs"
    if not path.is_file():
        pytest.skip("real slide not found: CONSILIUM_DATA has no slide_cmu1_small")
    return path


def code_of(error: pytest.ExceptionInfo[DataError]) -> str:
    return error.value.code


def column(path: Path, name: str) -> np.ndarray:
    with h5py.File(path, "r") as file:
        return np.asarray(file[name])


class Averages:
    """Mean and spread of each channel, in place of a network."""

    name = "averages"
    dim = 6
    precision = "fp32"

    def __init__(self, batch_tiles: int = 4) -> None:
        self.batch_tiles = batch_tiles

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        values = tiles.astype(np.float64)
        means, spreads = values.mean(axis=(1, 2)), values.std(axis=(1, 2))
        return np.concatenate([means, spreads], axis=1).astype(np.float32)


def embed_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whole folders be embedded as averages, without loading a network."""
    monkeypatch.setattr(
        "modalities.pathology.slides.load_tile_encoder", lambda *_, **__: Averages()
    )
