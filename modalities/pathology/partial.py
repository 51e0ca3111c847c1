"""Rows of a bag that is being made, on the disk: what stands there outlives a kill.

An HDF5 file whose size and structure are fixed before the first row, so that writing a row changes
nothing else and the file opens after a kill at any moment. A row counts once its checksum is right;
which rows are there needs no other note.
"""

from __future__ import annotations

import os
import zlib
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from modalities.cohort import DataError
from modalities.files import naming
from modalities.pathology.bags import new_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.quality import Quality

    Rows = NDArray[np.void]

BLOCK_ROWS = 512
_PRECISION = "S8"


class PartialBag:
    """Rows so far, one per tile of the grid.

    Parameters
    ----------
    path
        Of a file that ``open_partial`` made.

    Attributes
    ----------
    n_done
        Rows that stand, from the first on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = h5py.File(path, "r+", locking="best-effort")
        self._dataset = self._file["rows"]
        self.n_done = self._count()

    @property
    def is_open(self) -> bool:
        """Whether it was not closed yet."""
        return bool(self._file)

    @property
    def precision(self) -> str | None:
        """Precision that the rows were embedded in; None before the first."""
        return self._dataset[0]["precision"].decode() if self.n_done else None

    def append(
        self,
        features: NDArray[np.float32],
        quality: Quality,
        decoded: NDArray[np.bool_],
        *,
        precision: str,
    ) -> None:
        """Add rows after those that stand.

        Parameters
        ----------
        features
            (n, dim) embeddings; what stands there for a tile that was not decoded is not kept.
        """
        self.write(self.n_done, features, quality, decoded, precision=precision)

    def write(
        self,
        at: int,
        features: NDArray[np.float32],
        quality: Quality,
        decoded: NDArray[np.bool_],
        *,
        precision: str,
    ) -> None:
        """Write rows from the ``at``-th on, in place of those that stand there."""
        rows = np.zeros(len(features), dtype=self._dataset.dtype)
        rows["features"] = np.where(decoded[:, None], features, 0)
        rows["blur"], rows["pen"], rows["white"] = quality
        rows["decoded"] = decoded
        rows["precision"] = precision.encode()
        rows["check"] = _checks(rows, at)
        try:
            with naming(self._path):
                self._dataset[at : at + len(rows)] = rows
                self._file.flush()
        except OSError:
            _abandon(self._file)
            raise
        self.n_done = max(self.n_done, at + len(rows))

    def restart(self, n_rows: int) -> None:
        """Let only the first ``n_rows`` stand."""
        self.n_done = min(self.n_done, n_rows)

    def blocks(self) -> Iterator[Rows]:
        """Yield the rows in order, some at a time."""
        for at in range(0, self.n_done, BLOCK_ROWS):
            yield self._dataset[at : min(at + BLOCK_ROWS, self.n_done)]

    def columns(self, *names: str) -> dict[str, NDArray[Any]]:
        """Give whole columns that are not features."""
        found: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
        for block in self.blocks():
            for name in names:
                found[name].append(block[name].copy())
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def damaged(self, n_rows: int) -> dict[int, NDArray[np.bool_]]:
        """Which tiles were decoded, of every ``n_rows`` rows that not all of them were of."""
        if not self.n_done:
            return {}
        decoded = self.columns("decoded")["decoded"]
        parts = {at: decoded[at : at + n_rows] for at in range(0, len(decoded), n_rows)}
        return {at: part for at, part in parts.items() if not part.all()}

    def close(self) -> None:
        """Close the file and leave it."""
        self._file.close()

    def remove(self) -> None:
        """Close the file and delete it."""
        self.close()
        self._path.unlink(missing_ok=True)

    def _count(self) -> int:
        n_done = 0
        for at in range(0, len(self._dataset), BLOCK_ROWS):
            block = self._dataset[at : at + BLOCK_ROWS]
            stands = block["check"] == _checks(block, at)
            if not stands.all():
                return n_done + int(np.argmin(stands))
            n_done += len(block)
        return n_done


def open_partial(path: Path, *, key: str, n_rows: int, dim: int) -> PartialBag:
    """Open the partial bag at ``path``, or begin one where there is none of this key.

    Parameters
    ----------
    key
        Of all that the rows depend on.

    Raises
    ------
    DataError
        ``in_progress``, where another process writes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if not _is_of(path, key, n_rows, dim):
            _create(path, key=key, n_rows=n_rows, dim=dim)
        with naming(path):
            return PartialBag(path)
    except BlockingIOError:
        raise DataError(
            "in_progress",
            "slide: found another run that writes its features, needed to be the only one; "
            "wait for it",
        ) from None


def forget_partial(path: Path) -> None:
    """Delete the partial bag of one that is whole, unless another process writes it."""
    try:
        with h5py.File(path, "r+", locking="best-effort"):
            pass
    except (BlockingIOError, FileNotFoundError):
        return
    except OSError:
        pass  # no HDF5 any more
    path.unlink(missing_ok=True)


def _row(dim: int) -> np.dtype[np.void]:
    numbers = [(name, "<f4") for name in ("blur", "pen", "white")]
    return np.dtype(
        [
            ("features", "<f4", (dim,)),
            *numbers,
            ("decoded", "?"),
            ("precision", _PRECISION),
            ("check", "<u4"),
        ]
    )


def _checks(rows: Rows, first: int) -> NDArray[np.uint32]:
    """(n,) checksums of rows at their places, so that neither zeros nor another's row pass."""
    n_bytes = rows.dtype.itemsize - rows.dtype["check"].itemsize
    content = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    checks = [zlib.crc32(row[:n_bytes].data, first + i + 1) for i, row in enumerate(content)]
    return np.array(checks, dtype=np.uint32)


def _create(path: Path, *, key: str, n_rows: int, dim: int) -> None:
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with naming(path), new_file(path) as file:
        file.create_dataset("rows", shape=(n_rows,), dtype=_row(dim), dcpl=layout)
        file.attrs["key"] = key


def _abandon(file: h5py.File) -> None:
    """Close a file that cannot be written.

    HDF5 holds on to what it could not write, tries again when the interpreter ends, and crashes.
    Here it writes that to nowhere.
    """
    nowhere = os.memfd_create("unwritten")
    os.dup2(nowhere, file.id.get_vfd_handle())
    os.close(nowhere)
    file.close()


def _is_of(path: Path, key: str, n_rows: int, dim: int) -> bool:
    try:
        with h5py.File(path, "r", locking="best-effort") as file:
            rows = file["rows"]
            return bool(
                file.attrs["key"] == key and rows.shape == (n_rows,) and rows.dtype == _row(dim)
            )
    except BlockingIOError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError):
        return False
