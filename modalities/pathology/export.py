"""Bags of tiles as AnnData: tiles are observations, their places and quality stand beside them."""

from __future__ import annotations

import warnings
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Literal

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from modalities.files import replacing
from modalities.pathology.bags import read_bag

if TYPE_CHECKING:
    from pathlib import Path

Export = Literal["anndata", "zarr"]

SUFFIX: Final = {"anndata": ".h5ad", "zarr": ".zarr"}
_OF_GRID: Final = frozenset({"coords", "kept"})


def bag_as_anndata(path: Path) -> ad.AnnData:
    """Read a bag with one observation per tile that has features.

    ``obs`` holds the upper left corner at level 0 and what was found of the tile's quality,
    ``obsm["spatial"]`` the middle of the tile at level 0, ``uns["tiles"]`` all attributes.

    Raises
    ------
    DataError
        As ``read_bag``.
    """
    bag = read_bag(path)
    with h5py.File(path, "r") as file:
        attrs = {**file.attrs, **file["coords"].attrs}
        columns = _columns(file, len(bag.coords))
    obs = pd.DataFrame(
        {"x": bag.coords[:, 0], "y": bag.coords[:, 1], **columns},
        index=np.arange(len(bag.coords)).astype(str),
    )
    var = pd.DataFrame(index=[f"feature_{i}" for i in range(bag.features.shape[1])])
    table = ad.AnnData(bag.features, obs=obs, var=var)
    half = float(attrs.get("patch_size_level0", 0)) / 2
    table.obsm["spatial"] = bag.coords + half
    table.uns["tiles"] = {str(name): _plain(value) for name, value in attrs.items()}
    return table


def export_bag(bag: Path, form: Export) -> Path:
    """Write a bag beside itself as AnnData, unless a newer such file is there already.

    Returns
    -------
    pathlib.Path
        A file ending in ``.h5ad``, or a folder ending in ``.zarr``.
    """
    target = bag.with_suffix(SUFFIX[form])
    if target.exists() and target.stat().st_mtime_ns >= bag.stat().st_mtime_ns:
        return target
    table = bag_as_anndata(bag)
    if form == "anndata":
        with replacing(target) as temporary:
            temporary.unlink()
            table.write_h5ad(temporary)
        return target
    with TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
        written = target.parent / folder / target.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats to come, which fewer tools read
            table.write_zarr(written)
        if target.exists():
            # Out of sight first: what a kill leaves of a folder would be younger than its bag.
            target.rename(written.parent / "old")
        written.rename(target)
    return target


def _columns(file: h5py.File, n_tiles: int) -> dict[str, Any]:
    """Quality of the tiles of the bag, which are the kept ones of the grid, in order."""
    if "tiles" not in file:
        return {}
    grid = {name: np.asarray(values[()]) for name, values in file["tiles"].items()}
    kept = grid["kept"].astype(bool)
    if np.count_nonzero(kept) != n_tiles:
        return {}
    return {name: values[kept] for name, values in grid.items() if name not in _OF_GRID}


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
