"""Where features stand on the disk, and features that other tools made.

Formats only: names of folders, files, datasets and attributes as TRIDENT and CLAM use them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import h5py
import numpy as np

from modalities.cohort import DataError
from modalities.files import replacing
from modalities.pathology.bags import read_bag, read_marks, whole_numbers, write_bag
from modalities.pathology.encoder_names import canonical_name, known_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.bags import Bag
    from modalities.pathology.spec import PathologySpec

Layout = Literal["plain", "trident"]

SUFFIXES = frozenset({".h5", ".hdf5"})
# Magnifications are bins of about this width; a side that is off by more is another side.
_TOLERANCE = 1.15
_FEATURES = re.compile(r"features_(.+)")


@dataclass(frozen=True)
class Places:
    """Where what is made of one slide goes.

    Parameters
    ----------
    bag
        Coordinates and features.
    outline
        Tissue as GeoJSON.
    picture
        The slide in small with that outline.
    thumbnail
        The slide in small alone; None writes none.
    coords
        Coordinates alone; None writes none.
    """

    bag: Path
    outline: Path
    picture: Path
    thumbnail: Path | None = None
    coords: Path | None = None


def places(out: Path, name: str, spec: PathologySpec, layout: Layout) -> Places:
    """Give where what is made of the slide ``name`` goes below ``out``."""
    if layout == "plain":
        bag = out / f"{name}.h5"
        return Places(bag, bag.with_suffix(".geojson"), bag.with_suffix(".jpg"))
    below = out / trident_folder(spec)
    return Places(
        bag=below / f"features_{file_name(spec.encoder)}" / f"{name}.h5",
        outline=out / "contours_geojson" / f"{name}.geojson",
        picture=out / "contours" / f"{name}.jpg",
        thumbnail=out / "thumbnails" / f"{name}.jpg",
        coords=below / "patches" / f"{name}_patches.h5",
    )


def trident_folder(spec: PathologySpec) -> str:
    """Name the folder of one grid as TRIDENT does.

    Examples
    --------
    >>> from modalities.pathology import PathologySpec
    >>> trident_folder(PathologySpec(tile_px=256, stride_px=128))
    '20x_256px_128px_overlap'
    """
    stride_px = spec.tile_px if spec.stride_px is None else spec.stride_px
    return f"{10 / spec.tile_mpp:.4g}x_{spec.tile_px}px_{spec.tile_px - stride_px}px_overlap"


def file_name(encoder: str) -> str:
    """Give an encoder's name without what a file's name cannot hold."""
    return re.sub(r"[^\w.-]+", "-", encoder)


def write_coords(bag: Path, out_h5: Path) -> None:
    """Write the coordinates of a bag into a file of their own, with their attributes."""
    with h5py.File(bag, "r") as file:
        coords, attrs = file["coords"][()], dict(file["coords"].attrs)
    with replacing(out_h5) as temporary, h5py.File(temporary, "w") as file:
        file["coords"] = coords
        file["coords"].attrs.update(attrs)


@dataclass(frozen=True)
class Grid:
    """Tiles that another tool laid over a slide.

    Parameters
    ----------
    coords
        (n, 2) upper left corners at level 0.
    side_px
        Side of a tile at level 0; None where the file does not say.
    side_um
        In micrometres, as far as magnifications tell; None where the file does not say.
    attrs
        As they stand in the file.
    """

    coords: NDArray[np.int64]
    side_px: int | None
    side_um: float | None
    attrs: Mapping[str, Any]


def read_grid(path: Path) -> Grid:
    """Read the coordinates in a file of TRIDENT, of CLAM or of this package, with or without
    features.

    Raises
    ------
    DataError
        ``missing_file`` or ``unreadable_bag``.
    """  # noqa: D205
    if not path.is_file():
        raise DataError("missing_file", "tiles: found no file, needed an HDF5 with 'coords'")
    try:
        with h5py.File(path, "r") as file:
            coords = whole_numbers(file["coords"][()])
            attrs = {str(k): v for k, v in file["coords"].attrs.items()}
        coords = coords[0] if coords.ndim == 3 and len(coords) == 1 else coords
        if coords.ndim != 2 or coords.shape[1] != 2:
            raise ValueError("no rows of x and y")
        return Grid(coords, _side_px(attrs), _side_um(attrs), attrs)
    except (OSError, KeyError, RuntimeError, TypeError, ValueError):
        raise DataError(
            "unreadable_bag",
            "tiles: found a damaged file or no numeric (n, 2) 'coords', needed those of TRIDENT or "
            "CLAM; make it again",
        ) from None


def is_features(path: Path) -> bool:
    """Whether a path is that of features, rather than of a slide."""
    return path.suffix.lower() in SUFFIXES


def check_features(path: Path, spec: PathologySpec) -> None:
    """Check that features made elsewhere are those that ``spec`` asks for.

    Raises
    ------
    DataError
        As ``import_features``.
    """
    _fitting(path, spec)


def import_features(
    path: Path, out_h5: Path, spec: PathologySpec, *, input_digest: str, marks: Mapping[str, str]
) -> int:
    """Write features that were made elsewhere as a bag, as they are.

    Parameters
    ----------
    path
        HDF5 with ``coords`` and ``features``, as TRIDENT, CLAM and this package write them.
    input_digest
        Digest of that file.
    marks
        Further attributes of the bag, by which its maker recognises it.

    Returns
    -------
    int
        Number of tiles.

    Raises
    ------
    DataError
        ``missing_file``, ``unreadable_bag``, ``shape``, ``no_tissue`` or ``non_finite``; and
        ``other_encoder``, ``other_scale`` or ``other_stain`` where the file tells of an encoder, of
        tiles or of a normalisation that are not those of ``spec``.
    """
    bag, grid = _fitting(path, spec)
    attrs = dict(grid.attrs)
    if grid.side_px is not None:
        attrs["patch_size_level0"] = grid.side_px
    file_attrs = {
        **marks,
        "input_digest": input_digest,
        "spec_fingerprint": spec.fingerprint(),
        "encoder": spec.encoder,
        "imported": True,
    }
    write_bag(out_h5, bag, coords_attrs=attrs, file_attrs=file_attrs)
    return len(bag.coords)


def _fitting(path: Path, spec: PathologySpec) -> tuple[Bag, Grid]:
    bag, grid = read_bag(path), read_grid(path)
    _check_encoder(path, bag, spec)
    _check_recipe(path, spec)
    side_um = spec.tile_px * spec.tile_mpp
    if grid.side_um is not None and not 1 / _TOLERANCE < grid.side_um / side_um < _TOLERANCE:
        raise DataError(
            "other_scale",
            f"features: found tiles of about {grid.side_um:.0f} micrometres, needed "
            f"{side_um:.0f}; list features of such tiles, or change tile_px and tile_mpp of the "
            "study",
        )
    return bag, grid


def _check_encoder(path: Path, bag: Bag, spec: PathologySpec) -> None:
    found = _encoder_of(path)
    if found is not None and canonical_name(found) != spec.encoder:
        raise DataError(
            "other_encoder",
            f"features: found those of {canonical_name(found)!r}, needed those of "
            f"{spec.encoder!r}; list the right files",
        )
    known, dim = known_encoder(spec.encoder), bag.features.shape[1]
    if known is not None and dim != known.dim:
        raise DataError(
            "other_encoder",
            f"features: found {dim} numbers per tile, needed the {known.dim} of {spec.encoder!r}; "
            "list the right files",
        )


def _check_recipe(path: Path, spec: PathologySpec) -> None:
    """Compare what this package notes of how it made features; other tools note nothing of it."""
    marks = read_marks(path, ["weights_sha256", "stain"]) or {}
    weights, stain = marks.get("weights_sha256", ""), marks.get("stain", spec.stain)
    if weights and spec.weights_sha256 and weights != spec.weights_sha256:
        raise DataError(
            "other_encoder",
            f"features: found those of weights {weights[:8]}, needed those of "
            f"{spec.weights_sha256[:8]}; extract the slide with the study's",
        )
    if stain != spec.stain:
        raise DataError(
            "other_stain",
            f"features: found those of a slide with stain {stain!r}, needed {spec.stain!r}; "
            "extract the slide as the study says",
        )


def _encoder_of(path: Path) -> str | None:
    """Name of the encoder as noted in the file, or else in the name of TRIDENT's folder."""
    with h5py.File(path, "r") as file:
        noted = file.attrs.get("encoder")
    if isinstance(noted, str) and noted:
        return noted
    folder = _FEATURES.fullmatch(path.parent.name)
    return None if folder is None else folder[1]


def _side_px(attrs: Mapping[str, Any]) -> int | None:
    """Side of a tile at level 0: noted by TRIDENT; a level's pixels and its downsample by CLAM."""
    noted = _number(attrs, "patch_size_level0")
    if noted is not None:
        return round(noted)
    side, downsample = _number(attrs, "patch_size"), _number(attrs, "downsample")
    if side is None or (downsample is None and attrs.get("patch_level") not in {0, None}):
        return None
    custom = _number(attrs, "custom_downsample") or 1.0
    return round(side * (downsample or 1.0) * custom)


def _side_um(attrs: Mapping[str, Any]) -> float | None:
    side, power = _number(attrs, "patch_size"), _number(attrs, "target_magnification")
    return None if side is None or power is None else side * 10 / power


def _number(attrs: Mapping[str, Any], name: str) -> float | None:
    """First of one or several positive numbers."""
    try:
        found = float(np.ravel(attrs[name])[0])
    except (KeyError, IndexError, TypeError, ValueError):
        return None
    return found if found > 0 else None
