"""Stored tiles of which a disk has lost a part, where the decoder of their format says nothing.

A JPEG 2000 stream may end anywhere, so that its decoder shows what is left of it as if it were all.
A torn copy or a bad sector leaves zeros, which no such stream holds in that number.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from modalities.pathology.reader import open_bytes, read_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.tiff_index import StoredTiles
    from modalities.pathology.workers import Workers

_LOST = bytes(512)  # the smallest sector of a disk


class LostParts:
    """Which tiles of a level are not whole.

    Parameters
    ----------
    path
        Of the slide.
    stored
        Tiles of the level, none of whose streams may hold many zeros in a row.
    """

    def __init__(self, path: Path, stored: StoredTiles, workers: Workers) -> None:
        self._file = open_bytes(path)
        self._stored = stored
        self._workers = workers
        self._found: dict[int, bool] = {}

    def under(self, corners: NDArray[np.int64], side_px: int) -> NDArray[np.bool_]:
        """(n,) whether any stored tile under a region of that side has lost a part."""
        below = [self._stored.below((x, y, side_px, side_px)) for x, y in corners.tolist()]
        new = sorted({i for some in below for i in some} - self._found.keys())
        self._found.update(zip(new, self._workers.map(self._has_lost, new), strict=True))
        return np.array([any(self._found[i] for i in some) for some in below], dtype=bool)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _has_lost(self, i: int) -> bool:
        n_bytes, at = int(self._stored.counts[i]), int(self._stored.offsets[i])
        return _LOST in read_bytes(self._file, n_bytes, at)
