"""``consilium extract``: each extractor alone, without study, site or server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from flows.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modalities.cohort import Exclusion

extract_app = typer.Typer(help="Raw data to features, one modality alone.", no_args_is_help=True)
_OUT = Console()
Spec = TypeVar("Spec")

Out = Annotated[Path, typer.Option("--out", help="Folder, or for tables a file ending in .h5ad.")]
Study = Annotated[
    Path | None, typer.Option("--study", help="Take the settings from this study.toml.")
]
Names = Annotated[str, typer.Option(help="Column names, separated by commas.")]


def _say(text: str) -> None:
    _OUT.print(text, markup=False, highlight=False, soft_wrap=True)


def _from_study(study: Path, kind: type[Spec]) -> Spec:
    from flows.protocol import load_protocol
    from flows.terminal import UsageError

    found = [s for s in load_protocol(study).modality.values() if isinstance(s, kind)]
    if len(found) != 1:
        raise UsageError(
            f"--study: found {len(found)} modalities of this kind in {study.name}, needed one"
        )
    return found[0]


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _report(exclusions: Sequence[Exclusion], n_done: int, out: Path) -> None:
    for fault in exclusions:
        _say(f"set aside: {fault.patient_id}: {fault.code}: {fault.reason}")
    _say(f"{n_done} done, {len(exclusions)} set aside; features in {out}")
    if n_done == 0:
        raise typer.Exit(2)


@extract_app.command()
def pathology(
    source: Annotated[Path, typer.Argument(help="A slide, a folder of slides, or a manifest CSV.")],
    out: Out,
    encoder: Annotated[str, typer.Option(help="A timm or hf-hub: name.")] = "tf_efficientnet_lite0",
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels.")] = 224,
    tile_mpp: Annotated[float, typer.Option(help="Micrometres per pixel of a tile.")] = 0.5,
    study: Study = None,
) -> None:
    """Turn slides into bags of tile embeddings (HDF5) and tissue outlines (GeoJSON)."""
    from modalities.pathology import PathologySpec, check_encoder_name, extract, find_slides

    if study is not None:
        spec = _from_study(study, PathologySpec)
    else:
        check_encoder_name(encoder)
        spec = _spec(PathologySpec, encoder=encoder, tile_px=tile_px, tile_mpp=tile_mpp)
    with Progress("extract pathology", total=len(find_slides(source))) as progress:
        outcomes = extract(source, out, spec, advance=progress.advance)
    for outcome in outcomes:
        what = f"{outcome.code}: {outcome.reason}" if outcome.code else f"{outcome.n_tiles} tiles"
        _say(f"{outcome.slide}: {outcome.outcome}, {what}")
    _say(f"features, outlines and outcomes.csv in {out}")


@extract_app.command()
def radiology(
    source: Annotated[
        Path, typer.Argument(help="A scan (file or DICOM folder) with --mask, or a manifest CSV.")
    ],
    out: Out,
    mask: Annotated[Path | None, typer.Option(help="Mask or structure set of a scan.")] = None,
    roi: Annotated[str, typer.Option(help="Region in a structure set.")] = "GTV*",
    bin_width: Annotated[float, typer.Option(help="Grey levels per bin.")] = 25.0,
    spacing_mm: Annotated[
        str, typer.Option(help="Resample to, as 2,2,2; 'as-acquired' keeps the scan's.")
    ] = "2,2,2",
    study: Study = None,
) -> None:
    """Turn scans with masks into radiomic features (pyradiomics)."""
    from modalities.radiology import RadiologySpec, extract

    if study is not None:
        spec = _from_study(study, RadiologySpec)
    else:
        spacing = None if spacing_mm == "as-acquired" else tuple(_list(spacing_mm))
        spec = _spec(RadiologySpec, roi=roi, bin_width=bin_width, spacing_mm=spacing)
    with Progress("extract radiology", total=0) as progress:
        exclusions = extract(source, out, spec, mask=mask, advance=progress.advance)
    _report(exclusions, _n_rows(out, "radiology"), out)


@extract_app.command()
def omics(
    source: Annotated[Path, typer.Argument(help="Raw counts, .h5ad, one row per patient.")],
    out: Out,
    gene_sets: Annotated[
        Path | None, typer.Option(help="Pathways as GMT: name, description, genes, by tabs.")
    ] = None,
    panel: Annotated[str, typer.Option(help="Genes instead of pathways, by commas.")] = "",
    study: Study = None,
) -> None:
    """Turn counts into pathway scores or a normalised gene panel."""
    from flows.terminal import UsageError
    from modalities.omics import OmicsSpec, extract

    if study is not None:
        spec = _from_study(study, OmicsSpec)
    elif gene_sets is not None:
        spec = _spec(OmicsSpec, gene_sets=_read_gmt(gene_sets))
    elif panel:
        spec = _spec(OmicsSpec, output="panel", panel=_list(panel))
    else:
        raise UsageError("omics: found none of --gene-sets, --panel and --study, needed one")
    table, exclusions = extract(source, out, spec)
    _report(exclusions, table.n_obs, out)


@extract_app.command()
def clinical(
    source: Annotated[Path, typer.Argument(help="Registry export, CSV.")],
    out: Out,
    numeric: Names = "",
    ordinal: Annotated[
        list[str] | None, typer.Option(help="As 'stage=I|II|III|IV', lowest first; repeatable.")
    ] = None,
    categorical: Annotated[
        list[str] | None, typer.Option(help="As 'sex=female|male', reference first; repeatable.")
    ] = None,
    event: Annotated[str, typer.Option(help="Column: 1 observed, 0 censored.")] = "event",
    time: Annotated[str, typer.Option(help="Column of days.")] = "time_days",
    study: Study = None,
) -> None:
    """Turn registry rows into covariates and outcome."""
    from modalities.clinical import ClinicalSpec, extract

    if study is not None:
        spec = _from_study(study, ClinicalSpec)
    else:
        spec = _spec(
            ClinicalSpec,
            numeric=_list(numeric),
            ordinal=_levels(ordinal or []),
            categorical=_levels(categorical or []),
            event=event,
            time=time,
        )
    registry, exclusions = extract(source, out, spec)
    _report(exclusions, registry.covariates.n_obs, out)


@extract_app.command()
def tabular(
    source: Annotated[Path, typer.Argument(help="CSV with a column patient_id.")],
    out: Out,
    columns: Names = "",
    patient_id: Annotated[str, typer.Option(help="Column of pseudonyms.")] = "patient_id",
) -> None:
    """Turn any per-patient table into a modality; all numeric columns unless named."""
    from modalities.tabular import TabularSpec, extract

    spec = _spec(TabularSpec, columns=_list(columns), patient_id=patient_id)
    table, exclusions = extract(source, out, spec)
    if not columns:
        _say(f"columns: {', '.join(table.var_names)}; leave out an outcome with --columns")
    _report(exclusions, table.n_obs, out)


def _spec(kind: type[Spec], **values: object) -> Spec:
    from pydantic import ValidationError

    from flows.protocol import describe_errors
    from flows.terminal import UsageError

    try:
        return kind(**values)
    except ValidationError as error:
        raise UsageError(describe_errors(error, source="option")) from None


def _levels(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    from flows.terminal import UsageError

    found = {}
    for text in texts:
        column, equals, levels = text.partition("=")
        if not equals or not column:
            raise UsageError(f"levels: found {text!r}, needed COLUMN=first|second|...")
        found[column] = tuple(level.strip() for level in levels.split("|"))
    return found


def _read_gmt(path: Path) -> dict[str, tuple[str, ...]]:
    from flows.terminal import UsageError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UsageError(f"--gene-sets: {path.name} is missing or no text, needed GMT") from None
    parts = [line.split("\t") for line in lines if line.strip()]
    if not parts or min(map(len, parts)) < 3:
        raise UsageError(
            f"--gene-sets: {path.name}: needed on each line a name, a description and genes, "
            "separated by tabs"
        )
    return {name: tuple(gene for gene in genes if gene) for name, _, *genes in parts}


def _n_rows(out: Path, name: str) -> int:
    import anndata as ad

    path = out if out.suffix == ".h5ad" else out / f"{name}.h5ad"
    return int(ad.read_h5ad(path, backed="r").n_obs) if path.is_file() else 0
