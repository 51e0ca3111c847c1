"""``consilium extract``: each extractor alone, without study, site or server."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from flows.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modalities.cohort import Exclusion
    from modalities.pathology import PathologySpec

extract_app = typer.Typer(help="Raw data to features, one modality alone.", no_args_is_help=True)
_OUT = Console()
Spec = TypeVar("Spec")

Out = Annotated[Path, typer.Option("--out", help="Folder, or for tables a file ending in .h5ad.")]
Study = Annotated[
    Path | None, typer.Option("--study", help="Take the settings from this study.toml.")
]
_TYPED = "COMMANDLINE"
_OF_SPEC = frozenset({
    "encoder", "tile_px", "tile_mpp", "stride_px", "min_tissue", "max_tiles", "tissue",
    "only_good", "stain", "precision",
})  # fmt: skip
_ODD_OPTIONS = {
    "stride_px": "--stride",
    "min_tissue_fraction": "--min-tissue",
    "weights_sha256": "--weights",
}

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


class Layouts(StrEnum):
    """Where features of slides go."""

    plain = "plain"
    trident = "trident"


class Exports(StrEnum):
    """What bags are written as besides."""

    anndata = "anndata"
    zarr = "zarr"


class Stains(StrEnum):
    """How stain is normalised."""

    none = "none"
    macenko = "macenko"
    reinhard = "reinhard"


class Precisions(StrEnum):
    """What encoders compute in."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Compilers(StrEnum):
    """What compiles an encoder for the processor."""

    none = "none"
    inductor = "inductor"
    openvino = "openvino"


def _list_encoders(wanted: bool) -> None:
    if wanted:
        from flows.encoder_table import encoder_table

        # Into a file or a pipe goes one line per encoder.
        wide = _OUT if _OUT.is_terminal else Console(width=400)
        wide.print(encoder_table(wide.width), highlight=False)
        _say(
            "dim: length of an embedding; million: parameters; tiles: as the authors recommend, in "
            "pixels at micrometres per pixel"
        )
        _say("not run here: needs its authors' own code; features made elsewhere can join a study")
        _say("besides: any name that timm knows, and hf-hub:owner/name")
        raise typer.Exit


@extract_app.command()
def pathology(
    ctx: typer.Context,
    source: Annotated[
        Path,
        typer.Argument(help="A slide, a folder (with what is below it), or a manifest CSV."),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write to, and to go on in.")],
    encoder: Annotated[
        str, typer.Option(help="A name that --list-encoders shows, a timm or hf-hub: name.")
    ] = "tf_efficientnet_lite0",
    weights: Annotated[
        Path | None, typer.Option(help="File of its weights: safetensors or PyTorch's own.")
    ] = None,
    tile_px: Annotated[
        int | None, typer.Option(help="Side of a tile in pixels; by default the encoder's own.")
    ] = None,
    tile_mpp: Annotated[
        float | None,
        typer.Option(help="Micrometres per pixel of a tile; by default the encoder's own."),
    ] = None,
    stride_px: Annotated[
        int | None,
        typer.Option("--stride", help="Step of the grid in tile pixels; a smaller one overlaps."),
    ] = None,
    min_tissue: Annotated[
        float, typer.Option("--min-tissue", help="Least share of a tile that is tissue.")
    ] = 0.5,
    max_tiles: Annotated[int | None, typer.Option(help="At most so many, spread evenly.")] = None,
    tissue: Annotated[str, typer.Option(help="How tissue is found: otsu, or none.")] = "otsu",
    only_good: Annotated[
        bool, typer.Option("--only-good", help="Leave out blurred, inked and empty tiles.")
    ] = False,
    stain: Annotated[Stains, typer.Option(help="Normalisation of the stain.")] = Stains.none,
    precision: Annotated[
        Precisions, typer.Option(help="auto: the fastest that agrees with fp32.")
    ] = Precisions.auto,
    compiler: Annotated[
        Compilers, typer.Option("--compile", help="Compile for the processor; pays for many tiles.")
    ] = Compilers.none,
    mpp_csv: Annotated[
        Path | None, typer.Option(help="CSV with the columns wsi,mpp for slides without a scale.")
    ] = None,
    layout: Annotated[
        Layouts, typer.Option(help="plain: side by side; trident: in the folders of that tool.")
    ] = Layouts.plain,
    to: Annotated[
        Exports | None, typer.Option(help="Write each slide's features as AnnData besides.")
    ] = None,
    thumbnails: Annotated[
        bool, typer.Option(help="Write each slide in small, with the outline of its tissue.")
    ] = True,
    study: Study = None,
    list_encoders: Annotated[
        bool,
        typer.Option(
            "--list-encoders",
            is_eager=True,
            callback=_list_encoders,
            help="Show the encoders that are known by name.",
        ),
    ] = False,
) -> None:
    """Turn slides into bags of tile embeddings (HDF5) and tissue outlines (GeoJSON)."""
    from flows.slide_progress import SlideProgress
    from modalities.pathology import Manner, check_encoder_name, extract, find_slides

    _check_folder(out)
    if study is not None:
        spec = _slides_of_study(study, ctx, weights)
    else:
        check_encoder_name(encoder)
        spec = _slide_spec(
            encoder, weights, tile_px=tile_px, tile_mpp=tile_mpp, stride_px=stride_px,
            min_tissue_fraction=min_tissue, max_tiles=max_tiles, tissue=tissue,
            only_good=only_good, stain=stain.value, precision=precision.value,
        )  # fmt: skip
    manner = Manner(
        layout=layout.value,
        export=None if to is None else to.value,
        pictures=thumbnails,
        weights=weights,
        compiler=compiler.value,
    )
    with SlideProgress(len(find_slides(source))) as progress:
        outcomes = extract(
            source, out, spec, mpp_table=mpp_csv, manner=manner,
            advance=progress.advance, watch=progress.watch,
        )  # fmt: skip
    for outcome in outcomes:
        tiles = f"{outcome.n_tiles} tiles" if outcome.outcome != "failed" else ""
        what = f"{outcome.code}: {outcome.reason}" if outcome.code else outcome.reason
        _say(f"{outcome.slide}: {', '.join(x for x in (outcome.outcome, tiles, what) if x)}")
    _say(f"features, outlines and outcomes.csv in {out}")


def _check_folder(out: Path) -> None:
    from flows.terminal import UsageError

    if out.exists() and not out.is_dir():
        raise UsageError(f"--out: found a file {out.name}, needed a folder; name another")


def _slides_of_study(study: Path, ctx: typer.Context, weights: Path | None) -> PathologySpec:
    """Take the spec of a study, beside which nothing may ask for other features in silence."""
    from flows.terminal import UsageError
    from modalities.pathology import PathologySpec, WrongWeights

    typed = [x for x in ctx.params if getattr(ctx.get_parameter_source(x), "name", "") == _TYPED]
    others = sorted(_as_option(x) for x in {*typed} & _OF_SPEC)
    if others:
        raise UsageError(
            f"--study: found {', '.join(others)} beside it, needed the study's settings alone; "
            "leave out the one or the other"
        )
    spec = _from_study(study, PathologySpec)
    if weights is not None and spec.weights_sha256 is None:
        raise WrongWeights(
            "weights: found a file beside --study and no weights_sha256 in the study, needed it "
            "there, so that features tell what made them; ask the study lead"
        )
    return spec


def _as_option(name: str) -> str:
    """Give an option as it is typed, from the name of a parameter or of a field of a spec."""
    return _ODD_OPTIONS.get(name, f"--{name.replace('_', '-')}")


def _slide_spec(encoder: str, weights: Path | None, **fields: Any) -> PathologySpec:
    """Make the spec of the options, with the encoder's own tiles where none are asked for."""
    from flows.terminal import UsageError
    from modalities.files import digest_path
    from modalities.pathology import PathologySpec
    from modalities.pathology.encoder_names import known_encoder

    if weights is not None and not weights.is_file():
        raise UsageError(f"--weights: found no file {weights.name}, needed one; check the path")
    known = known_encoder(encoder)
    if known is not None:
        own = {"tile_px": known.tile_px, "tile_mpp": known.mpp}
        fields = own | {k: v for k, v in fields.items() if v is not None}
    given = {k: v for k, v in fields.items() if v is not None}
    digest = None if weights is None else digest_path(weights)
    return _spec(PathologySpec, encoder=encoder, weights_sha256=digest, **given)


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
        text = describe_errors(error, source="option")
        options = re.sub(r"^option: (\w+)", lambda x: _as_option(x[1]), text, flags=re.MULTILINE)
        raise UsageError(options) from None


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
