"""From slides on disk to bags on disk, one bad slide never stopping the rest."""

from __future__ import annotations

import csv
import os
from contextlib import closing
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from modalities.cohort import DataError
from modalities.files import replacing
from modalities.pathology.devices import extract_over, found_devices
from modalities.pathology.encoder import check_encoder_name, load_tile_encoder
from modalities.pathology.layouts import places, write_coords
from modalities.pathology.pipeline import (
    SlideJob,
    SlideOutcome,
    extract_slides,
)
from modalities.pathology.scale import MppTable, read_mpp_table
from modalities.pathology.slide_files import (
    SUFFIXES,
    each_once,
    slide_name,
    slide_stem,
    slides_among,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

    from modalities.pathology.encoder import Compiler
    from modalities.pathology.export import Export
    from modalities.pathology.layouts import Layout, Places
    from modalities.pathology.network import TileEncoder
    from modalities.pathology.pipeline import Encoder, Watch
    from modalities.pathology.spec import PathologySpec


@dataclass(frozen=True)
class Manner:
    """How slides are extracted and where results go, whatever is extracted.

    Parameters
    ----------
    layout
        ``plain`` puts all of a slide side by side; ``trident`` into the folders of that tool.
    export
        Write each bag as AnnData as well.
    pictures
        Write the slide in small, with the outline of its tissue.
    weights
        File of the encoder's weights; None takes those of its source.
    compiler
        As for :func:`load_tile_encoder`.
    devices
        To embed on; None takes all GPUs, or else the processor.
    """

    layout: Layout = "plain"
    export: Export | None = None
    pictures: bool = True
    weights: Path | None = None
    compiler: Compiler = "none"
    devices: Sequence[str | None] | None = None


USUAL = Manner()


def extract_slide(
    path: Path,
    out_h5: Path,
    spec: PathologySpec,
    encoder: Encoder,
    *,
    input_digest: str | None = None,
    marks: Mapping[str, str] | None = None,
) -> SlideOutcome:
    """Write the bag of one slide, and its tissue outline beside it as GeoJSON.

    Parameters
    ----------
    input_digest
        Digest of the slide where it is known already; None computes it.
    marks
        Further attributes of the file, by which its maker recognises it.

    Raises
    ------
    DataError
        As ``check_slide``, or ``few_good_tiles``, ``stain``, ``non_finite`` or ``in_progress``;
        nothing is written then.
    """
    job = SlideJob(path, out_h5, input_digest=input_digest, marks=marks or {})
    ((_, outcome),) = extract_slides([job], spec, lambda: encoder)
    if outcome.outcome == "failed":
        raise DataError(outcome.code, outcome.reason)
    return outcome


def extract(
    source: Path,
    out: Path,
    spec: PathologySpec,
    *,
    mpp_table: Path | None = None,
    manner: Manner = USUAL,
    advance: Callable[[int], None] | None = None,
    watch: Watch | None = None,
) -> list[SlideOutcome]:
    """Extract every slide of ``source`` into ``out``, skipping what has not changed.

    Writes ``<slide>.h5``, ``<slide>.geojson`` and ``<slide>.jpg`` per slide, and ``outcomes.csv``.

    Parameters
    ----------
    source
        As for ``find_slides``.
    mpp_table
        CSV with the columns ``wsi`` and ``mpp``, for slides that do not know their resolution.
    manner
        Where results go, and on what they are computed.
    advance
        Called with 1 after every slide.
    watch
        Called after every batch of tiles.

    Raises
    ------
    DataError
        If ``source`` or ``mpp_table`` itself cannot be used.
    UnknownEncoder, MissingWeights, WrongWeights, MissingCompiler
        If the encoder cannot be loaded.
    """
    check_encoder_name(spec.encoder)
    slides = find_slides(source)
    tabled = MppTable({}) if mpp_table is None else read_mpp_table(mpp_table)

    def load(device: str | None) -> TileEncoder:
        return load_tile_encoder(
            spec, weights=manner.weights, device=device, compiler=manner.compiler
        )

    repeated = _repeated_names(slides)
    to_do = [path for i, path in enumerate(slides) if i not in repeated]
    where = {path: places(out, slide_stem(path), spec, manner.layout) for path in to_do}
    jobs = [_job(path, where[path], manner, tabled.of(path)) for path in to_do]
    devices = found_devices() if manner.devices is None else manner.devices
    found: dict[Path, SlideOutcome] = {}
    outcomes: list[SlideOutcome] = []
    with closing(extract_over(devices, jobs, spec, load, watch=watch)) as ended:
        for job, outcome in ended:
            if outcome.outcome != "failed":
                _write_more(where[job.path], manner)
            found[job.path] = outcome
            # After every slide, so that whoever looks in after days, or a kill, sees how far it is.
            outcomes = _in_order(slides, repeated, found)
            _write_outcomes(out / "outcomes.csv", outcomes)
            if advance is not None:
                advance(1)
    if advance is not None:
        advance(len(repeated))
    return outcomes


def _job(path: Path, where: Places, manner: Manner, tabled_mpp: float | None) -> SlideJob:
    return SlideJob(
        path,
        where.bag,
        tabled_mpp=tabled_mpp,
        reuse=True,
        outline=where.outline,
        picture=where.picture if manner.pictures else None,
        thumbnail=where.thumbnail if manner.pictures else None,
    )


def _write_more(where: Places, manner: Manner) -> None:
    """Write what other tools read, from a bag that is whole."""
    if where.coords is not None:
        write_coords(where.bag, where.coords)
    if manner.export is not None:
        from modalities.pathology.export import export_bag  # pandas takes a while to import

        export_bag(where.bag, manner.export)


def find_slides(source: Path) -> list[Path]:
    """Paths of the slides that ``source`` names.

    Parameters
    ----------
    source
        A slide; a folder, searched recursively by known suffixes, where the DICOM files of one
        series are one slide; or a manifest CSV with a column ``path``, relative to the manifest,
        of which only rows of modality ``pathology`` count where there is a column ``modality``.

    Raises
    ------
    DataError
        ``missing_file``, ``manifest`` or ``no_slides``.
    """
    if not source.exists():
        raise DataError("missing_file", "source: found nothing there, needed slides; check it")
    if source.is_dir():
        slides = slides_among(_files_below(source))
    elif source.suffix.lower() == ".csv":
        slides = _manifest_slides(source)
    else:
        slides = [source]
    if not slides:
        raise DataError(
            "no_slides",
            f"source: found no slide, needed at least one ({', '.join(sorted(SUFFIXES))}, or .dcm "
            "of a whole slide); check it",
        )
    return slides


def _files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder, also by way of links to folders, which rglob passes over."""
    seen = set()
    for here, folders, names in os.walk(folder, followlinks=True):
        place = Path(here)
        if place.resolve() in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(place.resolve())
        folders.sort()
        yield from (place / name for name in names)


def _repeated_names(slides: Iterable[Path]) -> set[int]:
    """Places of the slides whose name an earlier one has, which would share its bag."""
    seen: set[str] = set()
    repeated = set()
    for i, path in enumerate(slides):
        name = slide_stem(path).casefold()
        if name in seen:
            repeated.add(i)
        seen.add(name)
    return repeated


def _in_order(
    slides: Sequence[Path], repeated: Collection[int], found: Mapping[Path, SlideOutcome]
) -> list[SlideOutcome]:
    """List the outcomes so far in the order of the slides."""
    ended = [(i, path) for i, path in enumerate(slides) if i in repeated or path in found]
    return [_duplicate(path) if i in repeated else found[path] for i, path in ended]


def _duplicate(path: Path) -> SlideOutcome:
    reason = "slide: found an earlier slide of this name; rename one"
    return SlideOutcome(slide_name(path), "failed", "duplicate_name", reason)


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
    # A slide may be listed once per finding; it is the same slide.
    return each_once(manifest.parent / path for path in paths if path)


def _write_outcomes(path: Path, outcomes: Sequence[SlideOutcome]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(field.name for field in fields(SlideOutcome))
        writer.writerows(astuple(outcome) for outcome in outcomes)
