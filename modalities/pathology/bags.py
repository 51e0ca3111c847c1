"""Bags of tile embeddings on disk, under the names that TRIDENT gives them."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from modalities.cohort import DataError
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.partial import PartialBag

_CHUNK_TILES = 512


@dataclass(frozen=True)
class Bag:
    """The tiles of one slide.

    Parameters
    ----------
    coords
        (n_tiles, 2) int64, upper left corners at level 0, x then y.
    features
        (n_tiles, dim) float32, finite.
    """

    coords: NDArray[np.int64]
    features: NDArray[np.float32]


def write_bag(
    out_h5: Path, bag: Bag, *, coords_attrs: Mapping[str, Any], file_attrs: Mapping[str, Any]
) -> None:
    """Write a bag atomically; the same bag always gives the same bytes."""
    with _new_bag(out_h5, coords_attrs, file_attrs) as file:
        _column(file, "coords", bag.coords)
        _column(file, "features", bag.features)


def write_finished(
    out_h5: Path,
    partial: PartialBag,
    columns: Mapping[str, NDArray[Any]],
    *,
    coords_attrs: Mapping[str, Any],
    file_attrs: Mapping[str, Any],
) -> None:
    """Write a bag atomically from all rows of a partial one, a block at a time.

    Parameters
    ----------
    columns
        Of every tile of the grid: ``coords``, ``kept`` and whatever else is known; all go into the
        group ``tiles``. The kept ones, in the same order, make up the bag.
    """
    coords, kept = columns["coords"], columns["kept"]
    with _new_bag(out_h5, coords_attrs, file_attrs) as file:
        _column(file, "coords", coords[kept])
        first = next(partial.blocks())["features"]
        shape = (int(np.count_nonzero(kept)), first.shape[1])
        chunks = (min(_CHUNK_TILES, shape[0]), shape[1])
        features = file.create_dataset(
            "features", shape, np.float32, chunks=chunks, fletcher32=True
        )
        at = done = 0
        for block in partial.blocks():
            rows = block["features"][kept[at : at + len(block)]]
            features[done : done + len(rows)] = rows
            at, done = at + len(block), done + len(rows)
        for name, values in columns.items():
            _column(file, f"tiles/{name}", values)


@contextmanager
def _new_bag(
    out_h5: Path, coords_attrs: Mapping[str, Any], file_attrs: Mapping[str, Any]
) -> Iterator[h5py.File]:
    # A cache for a few chunks, so that rows that are not aligned to them are cheap as well.
    with replacing(out_h5) as temporary, new_file(temporary, rdcc_nbytes=1 << 25) as file:
        yield file
        file["coords"].attrs.update(coords_attrs)
        file.attrs.update(file_attrs)


class _Output(FileIO):
    """A file that goes on where the disk is full, and tells of it in the end.

    HDF5 cannot let go of a file after a write that failed: it crashes on closing it.
    """

    fault: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        try:
            fcntl.flock(self, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as HDF5 does, but before truncating
        except BlockingIOError:
            self.close()
            raise
        except OSError:
            pass  # a disk that knows no locks
        self.truncate(0)

    def write(self, content: Any, /) -> int:
        rest = memoryview(content)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.fault = self.fault or error
        return len(content)

    def truncate(self, size: int | None = None, /) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.fault = self.fault or error
            return size or 0


@contextmanager
def new_file(path: Path, **options: Any) -> Iterator[h5py.File]:
    """Create an HDF5 file.

    Raises
    ------
    BlockingIOError
        If another process writes it.
    OSError
        At the end, where not all of it could be written.
    """
    with _Output(path) as output:
        with h5py.File(output, "w", **options) as file:
            yield file
        if output.fault is not None:
            raise output.fault


def _column(file: h5py.File, name: str, values: NDArray[Any]) -> None:
    chunks = (min(_CHUNK_TILES, len(values)), *values.shape[1:])
    # The checksum turns silent damage on disk into an error on reading.
    file.create_dataset(name, data=values, chunks=chunks, fletcher32=True)


def read_bag(path: Path) -> Bag:
    """Read a bag written here or by TRIDENT, with ``features`` (n, dim) or (1, n, dim).

    Raises
    ------
    DataError
        ``missing_file``, ``unreadable_bag``, ``shape``, ``no_tissue`` or ``non_finite``.
    """
    if not path.exists():
        raise DataError("missing_file", "bag: found no file, needed an HDF5 of tile embeddings")
    try:
        with h5py.File(path, "r") as file:
            coords = whole_numbers(file["coords"][()])
            features = np.asarray(file["features"][()], dtype=np.float32)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError):
        raise DataError(
            "unreadable_bag",
            "bag: found a damaged file or no numeric 'coords' and 'features', needed both; "
            "extract the slide again",
        ) from None
    bag = Bag(_without_batch_axis(coords), _without_batch_axis(features))
    _check(bag)
    return bag


def read_marks(path: Path, names: Iterable[str]) -> dict[str, str] | None:
    """Read attributes of a bag's file, without its tiles; None where it is missing or not whole.

    Parameters
    ----------
    names
        Of the attributes; those that it lacks are left out.
    """
    try:
        with h5py.File(path, "r") as file:
            if not 0 < len(file["coords"]) == len(file["features"]):
                return None
            return {x: str(file.attrs[x]) for x in names if x in file.attrs}
    except (OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError):
        return None


def count_tiles(path: Path) -> int:
    """Count the tiles of a bag that is whole."""
    with h5py.File(path, "r") as file:
        return len(file["coords"])


def is_foreign(path: Path) -> bool:
    """Whether an HDF5 file stands there that this package did not write."""
    try:
        with h5py.File(path, "r") as file:
            return "spec_fingerprint" not in file.attrs
    except (OSError, RuntimeError):
        return False


def is_current(out_h5: Path, *, input_digest: str, spec_fingerprint: str) -> bool:
    """Whether ``out_h5`` is whole and was made from this input under this spec."""
    expected = {"input_digest": input_digest, "spec_fingerprint": spec_fingerprint}
    return read_marks(out_h5, expected) == expected


def whole_numbers(values: NDArray[Any]) -> NDArray[np.int64]:
    """Give coordinates as integers.

    Raises
    ------
    ValueError
        If one is NaN or between two, which a cast would hide.
    """
    numbers = np.rint(values)
    if not np.isfinite(numbers).all() or not np.array_equal(numbers, values):
        raise ValueError("no whole numbers")
    return np.asarray(numbers, dtype=np.int64)


def _without_batch_axis(values: NDArray[Any]) -> NDArray[Any]:
    return values[0] if values.ndim == 3 and values.shape[0] == 1 else values


def _check(bag: Bag) -> None:
    n_tiles, shape = len(bag.coords), bag.features.shape
    if bag.coords.shape != (n_tiles, 2) or shape[:-1] != (n_tiles,) or shape[-1] == 0:
        raise DataError(
            "shape",
            f"bag: found coords {bag.coords.shape} and features {bag.features.shape}, "
            "needed (n, 2) and (n, dim)",
        )
    if n_tiles == 0:
        raise DataError("no_tissue", "bag: found no tile, needed at least one")
    if not np.isfinite(bag.features).all():
        raise DataError(
            "non_finite", "bag: found NaN or infinity in features, needed finite values"
        )
