"""From slides on disk to bags on disk, one bad slide never stopping the rest."""

from __future__ import annotations

import csv
from dataclasses import astuple, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from modalities.cohort import DataError
from modalities.files import digest_path, fingerprint, replacing
from modalities.pathology.bags import Bag, is_current, write_bag, write_outline
from modalities.pathology.encoder import check_encoder_name, load_tile_encoder
from modalities.pathology.reader import SUFFIXES, Slide, check_ends, open_slide, thumbnail
from modalities.pathology.tiles import Geometry, read_tiles, spread, tile_coords, tile_geometry
from modalities.pathology.tissue import thumbnail_downsample, tissue_mask, tissue_outline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.network import TileEncoder
    from modalities.pathology.spec import PathologySpec


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide, as a row of ``outcomes.csv``.

    Parameters
    ----------
    slide
        Name of the slide's file without its suffix; it stays at the site.
    code
        Code of the ``DataError`` for a failed slide, else empty.
    """

    slide: str
    outcome: Literal["done", "failed", "unchanged"]
    code: str = ""
    reason: str = ""
    n_tiles: int = 0


@dataclass(frozen=True)
class _Plan:
    """Where a slide's tiles lie."""

    coords: NDArray[np.int64]
    geometry: Geometry
    outline: dict[str, Any]


def check_slide(path: Path, spec: PathologySpec) -> None:
    """Check that a slide opens, has a scale, is whole and holds tissue, without encoding it.

    Raises
    ------
    DataError
        ``missing_file``, ``not_a_slide``, ``missing_resolution``, ``unreadable_slide``,
        ``too_coarse`` or ``no_tissue``.
    """
    with open_slide(path) as slide:
        _plan(slide, spec)


def extract_slide(
    path: Path,
    out_h5: Path,
    spec: PathologySpec,
    encoder: TileEncoder,
    *,
    input_digest: str | None = None,
    marks: Mapping[str, str] | None = None,
) -> int:
    """Write the bag of one slide, and its tissue outline beside it as GeoJSON.

    Parameters
    ----------
    input_digest
        Digest of the slide where it is known already; None computes it.
    marks
        Further attributes of the file, by which its maker recognises it.

    Returns
    -------
    int
        Number of tiles.

    Raises
    ------
    DataError
        As ``check_slide``; nothing is written then.
    """
    with open_slide(path) as slide:
        plan = _plan(slide, spec)
        features = _embed(slide, plan, spec, encoder)
        file_attrs = {
            **(marks or {}),
            "input_digest": input_digest or digest_slide(path),
            "spec_fingerprint": spec.fingerprint(),
            "encoder": encoder.name,
            "precision": encoder.precision,
            "slide_mpp": slide.mpp,
        }
        coords_attrs = _trident_attrs(slide, plan.geometry, spec, name=path.stem)
    write_outline(out_h5.with_suffix(".geojson"), plan.outline)
    # Last, so that a current bag always has its outline.
    bag = Bag(plan.coords, features)
    write_bag(out_h5, bag, coords_attrs=coords_attrs, file_attrs=file_attrs)
    return len(plan.coords)


def extract(
    source: Path, out: Path, spec: PathologySpec, *, advance: Callable[[int], None] | None = None
) -> list[SlideOutcome]:
    """Extract every slide of ``source`` into ``out``, skipping what has not changed.

    Writes ``<slide>.h5`` and ``<slide>.geojson`` per slide, and ``outcomes.csv``.

    Parameters
    ----------
    source
        As for ``find_slides``.
    advance
        Called with 1 after every slide.

    Raises
    ------
    DataError
        If ``source`` itself cannot be used.
    UnknownEncoder, MissingWeights
        If the encoder cannot be loaded.
    """
    check_encoder_name(spec.encoder)
    slides = find_slides(source)

    @cache
    def encoder() -> TileEncoder:
        return load_tile_encoder(spec)

    outcomes: list[SlideOutcome] = []
    seen: set[str] = set()
    for path in slides:
        outcomes.append(_outcome(path, out, spec, encoder, seen))
        seen.add(path.stem.casefold())
        if advance is not None:
            advance(1)
    _write_outcomes(out / "outcomes.csv", outcomes)
    return outcomes


def find_slides(source: Path) -> list[Path]:
    """Paths of the slides that ``source`` names.

    Parameters
    ----------
    source
        A slide; a folder, searched recursively by known suffixes; or a manifest CSV with a
        column ``path``, relative to the manifest, of which only rows of modality ``pathology``
        count where there is a column ``modality``.

    Raises
    ------
    DataError
        ``missing_file``, ``manifest`` or ``no_slides``.
    """
    if not source.exists():
        raise DataError("missing_file", "source: found nothing there, needed slides; check it")
    if source.is_dir():
        slides = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES)
    elif source.suffix.lower() == ".csv":
        slides = _manifest_slides(source)
    else:
        slides = [source]
    if not slides:
        raise DataError("no_slides", "source: found no slide, needed at least one; check it")
    return slides


def digest_slide(path: Path) -> str:
    """SHA-256 of a slide, with the data folder beside it where its format has one (MRXS).

    Raises
    ------
    DataError
        ``missing_file`` or ``unreadable_slide``.
    """
    data = path.with_suffix("")
    try:
        if path.suffix.lower() == ".mrxs" and data.is_dir():
            return fingerprint([digest_path(path), digest_path(data)])
        return digest_path(path)
    except FileNotFoundError:
        raise DataError("missing_file", "slide: found no file; check the path") from None
    except OSError:
        raise DataError(
            "unreadable_slide", "slide: found a file that cannot be read; check its permissions"
        ) from None


def _outcome(
    path: Path,
    out: Path,
    spec: PathologySpec,
    encoder: Callable[[], TileEncoder],
    seen: set[str],
) -> SlideOutcome:
    name = path.stem
    out_h5 = out / f"{name}.h5"
    try:
        if name.casefold() in seen:
            raise DataError(
                "duplicate_name", "slide: found an earlier slide of this name; rename one"
            )
        digest = digest_slide(path)
        if is_current(out_h5, input_digest=digest, spec_fingerprint=spec.fingerprint()):
            return SlideOutcome(name, "unchanged", n_tiles=_n_tiles(out_h5))
        n_tiles = extract_slide(path, out_h5, spec, encoder(), input_digest=digest)
        return SlideOutcome(name, "done", n_tiles=n_tiles)
    except DataError as error:
        return SlideOutcome(name, "failed", error.code, str(error))


def _plan(slide: Slide, spec: PathologySpec) -> _Plan:
    geometry = tile_geometry(spec, slide.mpp)
    check_ends(slide)
    rgb, downsample = thumbnail(slide, thumbnail_downsample(slide.size_px, slide.mpp))
    mask = tissue_mask(rgb, slide.mpp * downsample)
    coords = tile_coords(
        slide.size_px, geometry, mask, downsample, min_tissue_fraction=spec.min_tissue_fraction
    )
    if not len(coords):
        raise DataError(
            "no_tissue",
            f"slide: found tissue on {mask.mean():.1%} of it and no tile with enough, needed one "
            f"tile with {spec.min_tissue_fraction:.0%}; check the scan or lower the fraction",
        )
    return _Plan(spread(coords, spec.max_tiles), geometry, tissue_outline(mask, downsample))


def _embed(
    slide: Slide, plan: _Plan, spec: PathologySpec, encoder: TileEncoder
) -> NDArray[np.float32]:
    batches = read_tiles(
        slide,
        plan.coords,
        plan.geometry.field_px,
        tile_px=spec.tile_px,
        batch_tiles=encoder.batch_tiles,
    )
    features = np.concatenate([encoder.embed(tiles) for tiles in batches])
    if not np.isfinite(features).all():
        raise DataError(
            "non_finite",
            "slide: found NaN or infinity in its embeddings, needed finite values; "
            "set precision to fp32",
        )
    return features


def _trident_attrs(
    slide: Slide, geometry: Geometry, spec: PathologySpec, *, name: str
) -> dict[str, Any]:
    width, height = slide.size_px
    stride_px = spec.tile_px if spec.stride_px is None else spec.stride_px
    return {
        "patch_size": spec.tile_px,
        "patch_size_level0": geometry.field_px,
        "level0_magnification": round(10 / slide.mpp),
        "target_magnification": round(10 / spec.tile_mpp),
        "overlap": spec.tile_px - stride_px,
        "name": name,
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
    }


def _manifest_slides(manifest: Path) -> list[Path]:
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
    except (OSError, UnicodeDecodeError, csv.Error):
        raise DataError(
            "manifest", "manifest: found a file that does not read as CSV in UTF-8; save it so"
        ) from None
    wanted = [row for row in rows if row.get("modality", "pathology") == "pathology"]
    paths = [row.get("path") for row in wanted]
    if not all(paths):
        raise DataError("manifest", "manifest: found a row without a path, needed a column 'path'")
    return [manifest.parent / path for path in paths if path]


def _n_tiles(out_h5: Path) -> int:
    import h5py

    with h5py.File(out_h5, "r") as file:
        return len(file["coords"])


def _write_outcomes(path: Path, outcomes: Sequence[SlideOutcome]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(field.name for field in fields(SlideOutcome))
        writer.writerows(astuple(outcome) for outcome in outcomes)
