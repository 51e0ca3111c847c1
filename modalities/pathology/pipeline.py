"""Slides to bags: tiles are read in one thread, while another embeds and writes what was read.

The reading thread goes on to the next slide while this one's last tiles are embedded. How far it
may be ahead is bounded, so that neither a large slide nor a slow encoder fills the memory.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from PIL import Image

from modalities.cohort import DataError
from modalities.files import fingerprint, replacing, sweep_beside
from modalities.pathology.ahead import ahead
from modalities.pathology.bags import count_tiles, is_foreign, read_marks, write_finished
from modalities.pathology.partial import PartialBag, forget_partial, open_partial
from modalities.pathology.planning import Plan, plan_slide
from modalities.pathology.quality import Quality, is_good, tile_quality
from modalities.pathology.reader import open_slide, unreadable
from modalities.pathology.reading import tile_reader
from modalities.pathology.slide_files import changed_slide, digest_slide, slide_name, slide_state
from modalities.pathology.stain import normaliser
from modalities.pathology.tiles import spread
from modalities.pathology.tissue import outline_text, outlined

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from modalities.pathology.cutting import TileReader
    from modalities.pathology.reader import Slide
    from modalities.pathology.spec import PathologySpec
    from modalities.pathology.stain import Normaliser

    Watch = Callable[["TileCount"], None]

_BATCHES_AHEAD = 3
_BATCH_BYTES = 1 << 28
_STAIN_TILES = 64
_FEW_GOOD = "few_good_tiles"
_SCALE = ("slide_mpp", "slide_mpp_source")


class Encoder(Protocol):
    """What embeds tiles.

    Attributes
    ----------
    name, dim, batch_tiles
        Its name, the length of an embedding, and how many tiles it takes at once.
    precision
        ``auto`` until the first batch has settled it.
    """

    name: str
    dim: int
    batch_tiles: int
    precision: Any

    def embed(self, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embed tiles (n, tile_px, tile_px, 3) as (n, dim)."""


@dataclass(frozen=True)
class SlideOutcome:
    """What became of one slide, as a row of ``outcomes.csv``.

    Parameters
    ----------
    slide
        Name of the slide: of its file without the suffix, or of the folder of its DICOM series;
        it stays at the site.
    outcome
        ``partial`` where some tiles are damaged and have no embedding.
    code
        Of the ``DataError`` for a failed slide, ``damaged_tiles`` for a partial one, else empty.
    n_tiles
        With an embedding.
    """

    slide: str
    outcome: Literal["done", "partial", "failed"]
    code: str = ""
    reason: str = ""
    n_tiles: int = 0


@dataclass(frozen=True)
class TileCount:
    """How far a slide is.

    Parameters
    ----------
    slide
        Name of the slide.
    n_done, n_tiles
        Tiles so far, those of an earlier run included, and in all.
    """

    slide: str
    n_done: int
    n_tiles: int


@dataclass(frozen=True)
class SlideJob:
    """A slide to extract, and where its bag goes.

    Parameters
    ----------
    input_digest
        Of the slide, where it is known already.
    marks
        Further attributes of the bag, by which its maker recognises it.
    tabled_mpp
        Micrometres per pixel, for a slide that does not know.
    reuse
        Leave a bag as it is that was made of the same slide under the same spec, with these marks.
    outline
        Where the outline of the tissue goes; None puts it beside the bag.
    picture
        Where an overview with that outline goes, as JPEG; None writes none.
    thumbnail
        Where an overview without it goes, as JPEG; None writes none.
    """

    path: Path
    out_h5: Path
    input_digest: str | None = None
    marks: Mapping[str, str] = field(default_factory=dict)
    tabled_mpp: float | None = None
    reuse: bool = False
    outline: Path | None = None
    picture: Path | None = None
    thumbnail: Path | None = None

    @cached_property
    def name(self) -> str:
        """Name of the slide."""
        return slide_name(self.path)


@dataclass
class _Opened:
    """A slide whose tiles are being read, and the rows that are being written.

    Parameters
    ----------
    batch_tiles
        That are read and embedded together.
    beside
        Contents of the files beside the bag, which wait for it.
    """

    job: SlideJob
    encoder: Encoder
    batch_tiles: int
    coords: NDArray[np.int64]
    beside: dict[Path, bytes]
    partial: PartialBag
    file_attrs: dict[str, Any]
    coords_attrs: dict[str, Any]
    fault: DataError | None = None


@dataclass(frozen=True)
class _Batch:
    """Tiles from row ``at`` on."""

    slide: _Opened
    at: int
    pixels: NDArray[np.uint8]
    quality: Quality
    decoded: NDArray[np.bool_]


@dataclass(frozen=True)
class _Ended:
    """A slide is read to its end, or set aside with ``fault``, or was done before."""

    job: SlideJob
    slide: _Opened | None = None
    fault: DataError | None = None
    earlier: SlideOutcome | None = None


def extract_slides(
    jobs: Iterable[SlideJob],
    spec: PathologySpec,
    encoder: Callable[[], Encoder],
    *,
    watch: Watch | None = None,
) -> Iterator[tuple[SlideJob, SlideOutcome]]:
    """Extract slides one after the other, each in turn with what became of it.

    A bag appears when it is whole. Until then its rows stand in ``<bag>.partial``; the same job
    goes on from there after a kill, and ends with the same bytes.

    Parameters
    ----------
    encoder
        Gives the encoder; called when a slide needs it, in another thread.
    watch
        Called after every batch.

    Raises
    ------
    UnknownEncoder, MissingWeights
        If the encoder cannot be loaded.
    """
    reading = _Reading(spec, encoder)
    try:
        with ahead(reading.events(jobs), _BATCHES_AHEAD) as events:
            try:
                for event in events:
                    if isinstance(event, _Ended):
                        yield event.job, _outcome(event, spec)
                    elif event.slide.fault is None:
                        _embed(event)
                        reading.settled.set()
                        _tell(watch, event.slide)
            finally:
                reading.settled.set()
    finally:
        reading.close()


def _unforeseen(error: Exception) -> DataError:
    return DataError(
        "unreadable_slide",
        f"slide: found an error in reading it that nobody foresaw ({type(error).__name__}), needed "
        "none; try another copy of it, and report this with the kind of slide",
    )


def partial_path(out_h5: Path) -> Path:
    """Where the rows of a bag stand until it is whole."""
    return out_h5.with_name(f"{out_h5.name}.partial")


class _Reading:
    """The part of the thread that reads.

    Attributes
    ----------
    settled
        Set once the first batch is embedded, which settles the precision of all.
    """

    def __init__(self, spec: PathologySpec, encoder: Callable[[], Encoder]) -> None:
        self.settled = threading.Event()
        self._spec = spec
        self._encoder = encoder
        self._has_read = False
        self._partials: list[PartialBag] = []

    def close(self) -> None:
        """Let go of rows that were being written: the same process may go on with them."""
        for partial in self._partials:
            partial.close()

    def events(self, jobs: Iterable[SlideJob]) -> Generator[_Batch | _Ended, None, None]:
        """Yield the batches of every slide, and after each slide its end."""
        for job in jobs:
            try:
                yield from self._slide(job)
            except DataError as fault:
                yield _Ended(job, fault=fault)

    def _slide(self, job: SlideJob) -> Generator[_Batch | _Ended, None, None]:
        before = slide_state(job.path)
        digest = job.input_digest or digest_slide(job.path)
        earlier = _earlier(job, digest, self._spec) if job.reuse else None
        if earlier is not None:
            yield _Ended(job, earlier=earlier)
            return
        if is_foreign(job.out_h5):
            raise DataError(
                "foreign_file",
                "slide: found a file of another tool where its features would go, needed none; "
                "choose another folder with --out",
            )
        with open_slide(job.path, tabled_mpp=job.tabled_mpp) as slide:
            opened = self._open(job, slide, self._plan(slide), digest)
            fault = None
            try:
                yield from self._batches(opened, slide)
                if slide_state(job.path) not in {before, None} and digest_slide(job.path) != digest:
                    opened.fault = changed_slide()  # rows of two slides: none may stand
            except DataError as error:
                fault = error
            except OSError:  # whatever cannot be written has its own thread
                fault = unreadable()
            except Exception as error:  # noqa: BLE001 - four libraries, and a cohort goes on
                fault = _unforeseen(error)
            yield _Ended(job, slide=opened, fault=fault)

    def _plan(self, slide: Slide) -> Plan:
        try:
            return plan_slide(slide, self._spec)
        except DataError:
            raise
        except OSError:  # a slide that went away
            raise unreadable() from None
        except Exception as error:  # noqa: BLE001 - as in reading it
            raise _unforeseen(error) from None

    def _open(self, job: SlideJob, slide: Slide, plan: Plan, digest: str) -> _Opened:
        encoder, spec = self._encoder(), self._spec
        file_attrs = {
            **job.marks,
            "input_digest": digest,
            "spec_fingerprint": spec.fingerprint(),
            "encoder": encoder.name,
            "weights_sha256": spec.weights_sha256 or "",
            "slide_mpp": slide.mpp,
            "slide_mpp_source": slide.scale.source,
            "stain": spec.stain,
        }
        where = hashlib.sha256(plan.coords.tobytes()).hexdigest()
        batch_tiles = _batch_tiles(encoder, spec)
        key = fingerprint([file_attrs, where, batch_tiles])
        partial = open_partial(
            partial_path(job.out_h5), key=key, n_rows=len(plan.coords), dim=encoder.dim
        )
        self._partials = [x for x in self._partials if x.is_open] + [partial]
        sweep_beside(job.out_h5)  # nobody else writes it now
        self._agree_on_precision(partial, encoder)
        coords_attrs = _trident_attrs(slide, plan, spec)
        return _Opened(
            job,
            encoder,
            batch_tiles,
            plan.coords,
            _beside(job, plan, slide),
            partial,
            file_attrs,
            coords_attrs,
        )

    def _agree_on_precision(self, partial: PartialBag, encoder: Encoder) -> None:
        """Go on in the precision of the rows that stand, or else begin again."""
        if partial.precision is None:
            return
        if encoder.precision == "auto" and self._has_read:
            self.settled.wait()
        if encoder.precision == "auto":
            encoder.precision = partial.precision
        if encoder.precision != partial.precision:
            partial.restart(0)

    def _batches(self, opened: _Opened, slide: Slide) -> Generator[_Batch, None, None]:
        spec, size = self._spec, opened.batch_tiles
        coords, tile_px, mpp = opened.coords, spec.tile_px, spec.tile_mpp
        if opened.partial.n_done < len(coords):
            # The same batches, since an embedding may depend on its batch in the last digit.
            opened.partial.restart(opened.partial.n_done // size * size)
        n_done = opened.partial.n_done
        damaged = opened.partial.damaged(size)
        with tile_reader(slide, tile_px=tile_px, mpp=mpp) as reader:
            opened.file_attrs["reader"] = reader.name
            normalise = _normaliser(reader, coords, spec)
            if normalise is not None:
                opened.file_attrs["stain_fitted"] = np.array(normalise.fitted)
            reader.expect(coords[n_done:], tile_px=tile_px, mpp=mpp)
            for at in range(n_done, len(coords), size):
                batch = self._read(opened, reader, normalise, at)
                if not batch.decoded.all():
                    damaged[at] = batch.decoded
                yield batch
                if opened.fault is not None:
                    return
            yield from self._once_more(opened, reader, normalise, damaged)

    def _read(
        self, opened: _Opened, reader: TileReader, normalise: Normaliser | None, at: int
    ) -> _Batch:
        xy = opened.coords[at : at + opened.batch_tiles]
        pixels, decoded = reader.read_tiles(xy, tile_px=self._spec.tile_px, mpp=self._spec.tile_mpp)
        quality = tile_quality(pixels, decoded)
        if normalise is not None:
            pixels = normalise(pixels)
        self._has_read = True
        return _Batch(opened, at, pixels, quality, decoded)

    def _once_more(
        self,
        opened: _Opened,
        reader: TileReader,
        normalise: Normaliser | None,
        damaged: Mapping[int, NDArray[np.bool_]],
    ) -> Generator[_Batch, None, None]:
        """Read batches with damaged tiles again: a disk that was away for a while damages none."""
        if not damaged:
            return
        spec, size = self._spec, opened.batch_tiles
        again = np.concatenate([opened.coords[at : at + size] for at in damaged])
        reader.expect(again, tile_px=spec.tile_px, mpp=spec.tile_mpp)
        whole = True
        for at, before in damaged.items():
            batch = self._read(opened, reader, normalise, at)
            whole = whole and bool(batch.decoded.all())
            if not np.array_equal(batch.decoded, before):
                yield batch
        if not whole and digest_slide(opened.job.path) != opened.file_attrs["input_digest"]:
            raise unreadable()


def _batch_tiles(encoder: Encoder, spec: PathologySpec) -> int:
    """As many as the encoder takes; fewer where their pixels are many, since batches wait."""
    return max(1, min(encoder.batch_tiles, _BATCH_BYTES // (3 * spec.tile_px**2)))


def _normaliser(
    reader: TileReader, coords: NDArray[np.int64], spec: PathologySpec
) -> Normaliser | None:
    if spec.stain == "none":
        return None
    sample = spread(coords, _STAIN_TILES)
    pixels, decoded = reader.read_tiles(sample, tile_px=spec.tile_px, mpp=spec.tile_mpp)
    return normaliser(pixels[decoded], spec.stain, spec.stain_reference)


def _embed(batch: _Batch) -> None:
    slide = batch.slide
    # A damaged tile goes along, as zeros, so that the others' batch is what it would be without
    # damage; what comes of it is not kept.
    features = slide.encoder.embed(batch.pixels)
    if not np.isfinite(features[batch.decoded]).all():
        slide.fault = DataError(
            "non_finite",
            "slide: found NaN or infinity in its embeddings, needed finite values; "
            "set precision to fp32",
        )
        return
    precision = str(slide.encoder.precision)
    if slide.partial.precision not in {None, precision}:  # another thread has just settled it
        slide.fault = DataError(
            "precision", "slide: found two precisions in its embeddings, needed one; run it again"
        )
        return
    slide.partial.write(batch.at, features, batch.quality, batch.decoded, precision=precision)


def _tell(watch: Watch | None, slide: _Opened) -> None:
    if watch is not None:
        watch(TileCount(slide.job.name, slide.partial.n_done, len(slide.coords)))


def _outcome(ended: _Ended, spec: PathologySpec) -> SlideOutcome:
    name, slide = ended.job.name, ended.slide
    if ended.earlier is not None:
        return ended.earlier
    fault = ended.fault or (None if slide is None else slide.fault)
    if fault is None and slide is not None:
        try:
            return _finish(slide, spec)
        except DataError as error:
            fault = error
    # What could not be read now may be readable later, and that few tiles are good is found again
    # without embedding them.
    of_use = ended.fault is not None or (fault is not None and fault.code == _FEW_GOOD)
    if slide is not None and of_use and slide.partial.n_done:
        slide.partial.close()
    elif slide is not None:
        slide.partial.remove()
    if fault is None:
        raise TypeError("a slide ended without an outcome")
    return SlideOutcome(name, "failed", fault.code, str(fault))


def _finish(slide: _Opened, spec: PathologySpec) -> SlideOutcome:
    """Write what a slide gave, the bag last, so that a current bag has all that belongs to it."""
    job, partial = slide.job, slide.partial
    columns = partial.columns("blur", "pen", "white", "decoded")
    quality = Quality(columns["blur"], columns["pen"], columns["white"])
    good = is_good(quality, columns["decoded"], spec)
    kept = good if spec.only_good else columns["decoded"]
    _check_tiles(columns["decoded"], good, kept, spec)
    columns = {"coords": slide.coords, **columns, "good": good, "kept": kept}
    for path, content in slide.beside.items():
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    n_damaged = int(np.count_nonzero(~columns["decoded"]))
    file_attrs = {
        **slide.file_attrs, "precision": partial.precision or "", "n_damaged_tiles": n_damaged
    }  # fmt: skip
    write_finished(
        job.out_h5, partial, columns, coords_attrs=slide.coords_attrs, file_attrs=file_attrs
    )
    partial.remove()
    return _done(job.name, int(np.count_nonzero(kept)), n_damaged)


def _beside(job: SlideJob, plan: Plan, slide: Slide) -> dict[Path, bytes]:
    outline = outline_text(
        plan.mask, plan.overview.downsample, shown_from=slide.shown_from
    ).encode()
    found = {job.outline or job.out_h5.with_suffix(".geojson"): outline}
    if job.thumbnail is not None:
        found[job.thumbnail] = _jpeg(Image.fromarray(plan.overview.rgb))
    if job.picture is not None:
        found[job.picture] = _jpeg(outlined(plan.overview, plan.mask))
    return found


def _jpeg(picture: Image.Image) -> bytes:
    stream = BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return stream.getvalue()


def _check_tiles(
    decoded: NDArray[np.bool_],
    good: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    spec: PathologySpec,
) -> None:
    if not decoded.any():
        raise unreadable()
    n_good, least = int(np.count_nonzero(good)), spec.min_good_tiles
    if n_good < least or not kept.any():
        raise DataError(
            _FEW_GOOD,
            f"slide: found {n_good} of {len(good)} tiles without damage, blur, pen and bare glass, "
            f"needed {max(least, 1)}; scan it again or change the limits",
        )


def _done(name: str, n_tiles: int, n_damaged: int, reason: str = "") -> SlideOutcome:
    if not n_damaged:
        return SlideOutcome(name, "done", reason=reason, n_tiles=n_tiles)
    told = (
        f"slide: found {n_damaged} damaged tiles, needed none; they have no embedding; copy the "
        "slide again from the scanner"
    )
    return SlideOutcome(name, "partial", "damaged_tiles", told, n_tiles)


def _earlier(job: SlideJob, digest: str, spec: PathologySpec) -> SlideOutcome | None:
    """Outcome of a bag that is there already; None where it has to be made."""
    expected = {
        **job.marks, "input_digest": digest, "spec_fingerprint": spec.fingerprint()
    }  # fmt: skip
    marks = read_marks(job.out_h5, [*expected, "n_damaged_tiles", *_SCALE])
    if marks is None or not expected.items() <= marks.items() or _is_rescaled(job, marks):
        return None
    forget_partial(partial_path(job.out_h5))  # a kill may have come between the two
    n_damaged = int(marks.get("n_damaged_tiles", "0"))
    return _done(job.name, count_tiles(job.out_h5), n_damaged, "unchanged")


def _is_rescaled(job: SlideJob, marks: Mapping[str, str]) -> bool:
    """Whether the user's table now says another resolution than the one that it gave a bag."""
    mpp, source = (marks.get(name) for name in _SCALE)
    return source == "table" and job.tabled_mpp is not None and mpp != str(job.tabled_mpp)


def _trident_attrs(slide: Slide, plan: Plan, spec: PathologySpec) -> dict[str, Any]:
    width, height = slide.size_px
    stride_px = spec.tile_px if spec.stride_px is None else spec.stride_px
    return {
        "patch_size": spec.tile_px,
        "patch_size_level0": plan.geometry.field_px,
        "level0_magnification": round(10 / slide.mpp),
        "target_magnification": round(10 / spec.tile_mpp),
        "overlap": spec.tile_px - stride_px,
        "name": slide_name(slide.path),
        "savetodir": ".",
        "level0_width": width,
        "level0_height": height,
    }
