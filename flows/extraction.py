"""Raw inputs of a site to feature tables, incrementally: what did not change is not done again."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np

from flows.embedding import ONE_SLIDE, Means, SlideInput, embed_slides
from flows.extraction_keys import CODE, KEY, SOURCE, MadeFrom, Recipe, recipe
from flows.protocol import kind_of
from modalities.cohort import DataError, Exclusion, ManifestRow, feature_table
from modalities.files import digest_path, fingerprint, replacing
from modalities.omics import OmicsSpec, extract_counts
from modalities.pathology import PathologySpec, digest_slide, read_bag, read_marks, slide_files
from modalities.radiology import RadiologySpec, ScanRow, extract_scans, scan_digest
from modalities.tabular import TabularSpec, read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from flows.protocol import ModalitySpec

    Advance = Callable[[int], None]

# Batches of one modality add rows to the same table.
_TABLE = threading.Lock()


@dataclass(frozen=True)
class Batch:
    """Inputs of one modality that one task extracts; ``digests`` go with ``rows``."""

    modality: str
    number: int
    rows: tuple[ManifestRow, ...]
    digests: tuple[str, ...]
    recipe: Recipe


class Ledger:
    """Digests of raw inputs, remembered by size and modification time.

    A nightly run over terabytes of slides then reads directory entries only. A file changed in
    place within its clock's resolution and to the same size goes unseen, as with any such index.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, list[str]] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def digest(self, row: ManifestRow, spec: ModalitySpec) -> str:
        """Digest of one row's raw input.

        Raises
        ------
        DataError
            If it cannot be read.
        """
        key = _where(row, spec)
        signature = _signature(row, spec)
        known = self._known.get(key)
        if known is None or known[0] != signature:
            known = [signature, _digest(row, spec)]
            self._known[key] = known
        return known[1]

    def known(self, row: ManifestRow, spec: ModalitySpec) -> str | None:
        """Digest of a row's raw input; None where it is new or looks changed, as nothing is read.

        Raises
        ------
        OSError
            If it is not there.
        """
        known = self._known.get(_where(row, spec))
        return known[1] if known is not None and known[0] == _signature(row, spec) else None

    def save(self) -> None:
        """Write the ledger."""
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(self._known))


def _where(row: ManifestRow, spec: ModalitySpec) -> str:
    return "\0".join(map(str, (kind_of(spec), row.path, row.mask_path, row.roi)))


def _signature(row: ManifestRow, spec: ModalitySpec) -> str:
    paths = slide_files(row.path) if isinstance(spec, PathologySpec) else [row.path]
    if row.mask_path is not None:
        paths.append(row.mask_path)
    files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
    stats = [(str(f), f.stat()) for f in files]
    return fingerprint([[name, s.st_size, s.st_mtime_ns] for name, s in stats])


def _digest(row: ManifestRow, spec: ModalitySpec) -> str:
    if isinstance(spec, PathologySpec):
        return digest_slide(row.path)
    if isinstance(spec, RadiologySpec):
        if row.mask_path is None:
            raise DataError("missing_mask", "mask_path is empty, needed the scan's mask")
        return scan_digest(row.path, row.mask_path, roi=row.roi)
    return digest_path(row.path)


@dataclass(frozen=True)
class ModalityWork:
    """What one modality of a site needs: which inputs are pending, and where features go.

    Attributes
    ----------
    rows, digests
        Every readable input with its digest.
    pending
        Batches still to do.
    faults
        Inputs that could not even be read.
    recipe
        How features are made now.
    made
        What the features of each of ``rows`` were made from, when this was planned.
    """

    modality: str
    spec: ModalitySpec
    features: Path
    rows: tuple[ManifestRow, ...]
    digests: tuple[str, ...]
    pending: tuple[Batch, ...]
    faults: tuple[Exclusion, ...]
    recipe: Recipe
    made: tuple[MadeFrom | None, ...]

    @property
    def table_path(self) -> Path:
        """The modality's feature table."""
        return self.features / f"{self.modality}.h5ad"


def plan_modality(
    modality: str,
    spec: ModalitySpec,
    rows: Iterable[ManifestRow],
    *,
    features: Path,
    ledger: Ledger,
    secret: bytes,
    batch_size: int,
) -> ModalityWork:
    """Find which inputs of a modality are new, changed, or were set aside last time.

    All are pending under another spec, or where the extractor's own code is another.
    """
    readable: list[ManifestRow] = []
    digests: list[str] = []
    faults: list[Exclusion] = []
    for row in one_input_each(rows, spec, modality, faults):
        try:
            digests.append(ledger.digest(row, spec))
            readable.append(row)
        except DataError as fault:
            faults.append(Exclusion(row.patient_id, modality, fault.code, str(fault)))
        except OSError:
            faults.append(
                Exclusion(row.patient_id, modality, "unreadable_file", "the file cannot be read")
            )
    now = recipe(spec, secret)
    done = features_of(modality, spec, readable, features)
    inputs = list(zip(readable, digests, strict=True))
    stale = [
        row
        for (row, digest), made in zip(inputs, done, strict=True)
        if now.why_stale(made, digest) is not None
    ]
    batches = tuple(
        Batch(modality, i, tuple(r for r, _ in part), tuple(d for _, d in part), now)
        for i, part in enumerate(_shared_out(inputs, stale, spec, size=batch_size), start=1)
    )
    return ModalityWork(
        modality, spec, features, tuple(readable), tuple(digests), batches, tuple(faults), now,
        tuple(done),
    )  # fmt: skip


def _shared_out(
    inputs: Sequence[tuple[ManifestRow, str]],
    stale: Sequence[ManifestRow],
    spec: ModalitySpec,
    *,
    size: int,
) -> list[list[tuple[ManifestRow, str]]]:
    """Share stale inputs out into batches of at most ``size``.

    Of a file with many patients all come along where one is stale, and none is parted from the
    others: which columns it has, and whether it is at fault as a whole, all its rows decide.
    """
    if isinstance(spec, OmicsSpec | TabularSpec):
        again: dict[Path, list[tuple[ManifestRow, str]]] = {row.path: [] for row in stale}
        for row, digest in inputs:
            if row.path in again:
                again[row.path].append((row, digest))
        groups = list(again.values())
    else:
        waiting = set(stale)
        groups = [[x] for x in inputs if x[0] in waiting]
    batches: list[list[tuple[ManifestRow, str]]] = []
    for group in groups:
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1] += group
        else:
            batches.append(group)
    return batches


def one_input_each(
    rows: Iterable[ManifestRow], spec: ModalitySpec, modality: str, faults: list[Exclusion]
) -> list[ManifestRow]:
    """Slides of a patient make one bag; of anything else a patient has one."""
    if isinstance(spec, PathologySpec):
        return list(rows)
    by_patient: dict[str, list[ManifestRow]] = {}
    for row in rows:
        by_patient.setdefault(row.patient_id, []).append(row)
    for patient_id, found in by_patient.items():
        if len(found) > 1:
            reason = f"found {len(found)} inputs, needed one; keep one row in the manifest"
            faults.append(Exclusion(patient_id, modality, "several_inputs", reason))
    return [found[0] for found in by_patient.values() if len(found) == 1]


def features_of(
    modality: str, spec: ModalitySpec, rows: Sequence[ManifestRow], features: Path
) -> list[MadeFrom | None]:
    """Find what the features of each input were made from; None where there are none."""
    if isinstance(spec, PathologySpec):
        return [_bag_made_from(bag_path(row, features / modality)) for row in rows]
    table = _read_table(features / f"{modality}.h5ad")
    made = {} if table is None else _rows_made_from(table)
    return [made.get(row.patient_id) for row in rows]


def _bag_made_from(path: Path) -> MadeFrom | None:
    marks = read_marks(path, ("input_digest", "spec_fingerprint", CODE, KEY))
    if marks is None or not {"input_digest", "spec_fingerprint"} <= set(marks):
        return None
    source, spec = marks["input_digest"], marks["spec_fingerprint"]
    return MadeFrom(source, spec, marks.get(CODE, ""), marks.get(KEY, ""))


def _rows_made_from(table: ad.AnnData) -> dict[str, MadeFrom]:
    spec, obs = str(table.uns.get("spec_fingerprint")), _marked(table.obs)
    marks = zip(*(obs[x].astype(str) for x in (SOURCE, CODE, KEY)), strict=True)
    return {
        patient_id: MadeFrom(source, spec, code, key)
        for patient_id, (source, code, key) in zip(obs.index, marks, strict=True)
    }


def _marked(obs: pd.DataFrame) -> pd.DataFrame:
    """Give rows of before there were keys the empty ones."""
    return obs.assign(**{x: "" for x in (CODE, KEY) if x not in obs})


def bag_path(row: ManifestRow, bags: Path) -> Path:
    """File of one slide's features in the folder of its modality."""
    # Two slides of one name in different folders must not share a bag; a moved site keeps its own.
    return bags / f"{row.path.stem}-{fingerprint(os.path.relpath(row.path, bags))[:8]}.h5"


def extract_batch(
    batch: Batch, spec: ModalitySpec, features: Path, *, means: Means = ONE_SLIDE
) -> list[Exclusion]:
    """Extract one batch and keep its features; what cannot be used is returned, not raised.

    Parameters
    ----------
    means
        What slides are embedded with.
    """
    if isinstance(spec, PathologySpec):
        slides = _slide_inputs(batch, features / batch.modality)
        return embed_slides(slides, spec, batch.modality, means)
    if isinstance(spec, RadiologySpec):
        table, exclusions = _measure_scans(batch, spec)
    else:
        table, exclusions = _read_tables(batch, spec)
    source = dict(zip([r.patient_id for r in batch.rows], batch.digests, strict=True))
    table.obs[SOURCE] = [source[x] for x in table.obs_names]
    table.obs[CODE] = batch.recipe.code
    table.obs[KEY] = [batch.recipe.key(source[x]) for x in table.obs_names]
    _add_rows(table, features / f"{batch.modality}.h5ad", spec)
    return exclusions


def _slide_inputs(batch: Batch, bags: Path) -> list[SlideInput]:
    return [
        SlideInput(
            row.patient_id,
            row.path,
            digest,
            bag_path(row, bags),
            {CODE: batch.recipe.code, KEY: batch.recipe.key(digest)},
        )
        for row, digest in zip(batch.rows, batch.digests, strict=True)
    ]


def _measure_scans(batch: Batch, spec: RadiologySpec) -> tuple[ad.AnnData, list[Exclusion]]:
    scans = [
        ScanRow(row.patient_id, row.path, row.mask_path, row.roi, digest)
        for row, digest in zip(batch.rows, batch.digests, strict=True)
        if row.mask_path is not None
    ]
    return extract_scans(scans, spec, modality=batch.modality)


def _read_tables(batch: Batch, spec: ModalitySpec) -> tuple[ad.AnnData, list[Exclusion]]:
    """Read whole-file modalities, one file after the other."""
    by_file: dict[Path, list[str]] = {}
    for row in batch.rows:
        by_file.setdefault(row.path, []).append(row.patient_id)
    tables, exclusions = [], []
    for path, patients in by_file.items():
        try:
            table, faults = read_file(path, patients, spec, batch.modality)
        except DataError as fault:
            exclusions += [Exclusion(p, batch.modality, fault.code, str(fault)) for p in patients]
            continue
        tables.append(table)
        exclusions += faults
    if not tables:
        none = np.zeros((0, 0))
        empty = feature_table([], [], none, input_digests=[], spec_fingerprint=spec.fingerprint())
        return empty, exclusions
    return _stack(tables), exclusions


def read_file(
    path: Path, patients: Sequence[str], spec: ModalitySpec, modality: str
) -> tuple[ad.AnnData, list[Exclusion]]:
    """Read the rows of some patients from a file that holds many.

    Raises
    ------
    DataError
        If the file as a whole cannot be used.
    """
    if isinstance(spec, OmicsSpec):
        return extract_counts(path, spec, patient_ids=patients, modality=modality)
    if not isinstance(spec, TabularSpec):
        raise TypeError(f"spec: found {type(spec).__name__}, needed one that reads whole files")
    table, exclusions = read_table(path, spec, modality=modality)
    wanted, found = set(patients), set(table.obs_names) | {e.patient_id for e in exclusions}
    missing = [
        Exclusion(p, modality, "missing_in_file", "the table has no row for this patient")
        for p in patients
        if p not in found
    ]
    kept = [e for e in exclusions if e.patient_id in wanted]
    return table[table.obs_names.isin(wanted)].copy(), kept + missing


def _stack(tables: Sequence[ad.AnnData]) -> ad.AnnData:
    stacked = ad.concat(tables, join="outer", merge="first", fill_value=np.nan)
    stacked.uns["spec_fingerprint"] = tables[0].uns["spec_fingerprint"]
    return stacked


def _read_features(path: Path, spec: ModalitySpec) -> ad.AnnData | None:
    """Read a feature table, or None where there is none of this spec."""
    table = _read_table(path)
    same = table is not None and table.uns.get("spec_fingerprint") == spec.fingerprint()
    return table if same else None


def _read_table(path: Path) -> ad.AnnData | None:
    try:
        return ad.read_h5ad(path)
    except (OSError, KeyError, ValueError):
        return None


def _add_rows(table: ad.AnnData, path: Path, spec: ModalitySpec) -> None:
    with _TABLE:
        before = _read_features(path, spec)
        if before is not None and before.n_obs:
            kept = before[~before.obs_names.isin(table.obs_names)].copy()
            kept.obs = _marked(kept.obs)
            table = _stack([table, kept]) if table.n_obs else kept  # what files say now counts
        _write_features(table[np.sort(table.obs_names)].copy() if table.n_obs else table, path)


def _write_features(table: ad.AnnData, path: Path) -> None:
    with replacing(path) as temporary:
        temporary.unlink()
        table.write_h5ad(temporary)


def collect(work: ModalityWork) -> ad.AnnData | None:
    """Give a modality's table for the patients in the manifest, or None if nobody has any.

    Features of a patient who left the manifest stay on disk but not in the cohort.
    """
    if isinstance(work.spec, PathologySpec):
        table = _collect_bags(work, work.spec)
    else:
        table = _read_features(work.table_path, work.spec)
    if table is None or table.n_obs == 0:
        return None
    if isinstance(work.spec, PathologySpec):
        return table
    made = _rows_made_from(table)
    current = [
        row.patient_id
        for row, digest in zip(work.rows, work.digests, strict=True)
        if work.recipe.why_stale(made.get(row.patient_id), digest) is None
    ]
    if not current:
        return None
    return _as_if_read_at_once(table[table.obs_names.isin(current)].copy(), work)


def _as_if_read_at_once(table: ad.AnnData, work: ModalityWork) -> ad.AnnData:
    """Give a table that rows were added to what one of all its rows would have."""
    if isinstance(work.spec, TabularSpec) and not work.spec.columns:
        # Files decide the columns: those of rows that are gone would stay, in an order of history.
        held = [x for x, empty in zip(table.var_names, _is_empty(table), strict=True) if not empty]
        table = table[:, sorted(held)].copy()
    if len({row.path for row in work.rows}) > 1:
        table.var = table.var[[]]  # how many genes were found is then said of some patients only
    return table


def _is_empty(table: ad.AnnData) -> NDArray[np.bool_]:
    """(p,) whether nobody has a value."""
    return np.isnan(np.asarray(table.X)).all(axis=0)


def _collect_bags(work: ModalityWork, spec: PathologySpec) -> ad.AnnData | None:
    """Mean embedding and bag references per patient; kept on disk until a slide changes."""
    bags = work.features / work.modality
    fresh: dict[str, list[tuple[Path, str]]] = {}
    for row, digest, known in zip(work.rows, work.digests, work.made, strict=True):
        path = bag_path(row, bags)
        was_current = work.recipe.why_stale(known, digest) is None and path.is_file()
        made = known if was_current else _bag_made_from(path)
        if made is not None and work.recipe.why_stale(made, digest) is None:
            fresh.setdefault(row.patient_id, []).append((path, made.key or digest))
    source = {p: fingerprint([[b.name, d] for b, d in found]) for p, found in fresh.items()}
    before = _read_features(work.table_path, spec)
    if before is not None and _same(before, source):
        return before
    if not fresh:
        return None
    means = _mean_embeddings(fresh, {} if before is None else _unchanged(before, source))
    if not means:
        return None
    table = feature_table(
        list(means),
        [f"mean_{i}" for i in range(len(next(iter(means.values()))))],
        np.stack(list(means.values())),
        input_digests=[source[p] for p in means],
        spec_fingerprint=spec.fingerprint(),
    )
    table.obs[SOURCE] = [source[p] for p in means]
    table.obs["bag"] = [";".join(f"{work.modality}/{b.name}" for b, _ in fresh[p]) for p in means]
    _write_features(table, work.table_path)
    return table


def _unchanged(table: ad.AnnData, source: Mapping[str, str]) -> dict[str, NDArray[np.floating]]:
    """Rows of the patients whose slides are as they were: their bags need no reading."""
    rows = zip(table.obs_names, table.obs[SOURCE].astype(str), np.asarray(table.X), strict=True)
    return {patient_id: row for patient_id, made, row in rows if source.get(patient_id) == made}


def _mean_embeddings(
    bags: Mapping[str, Sequence[tuple[Path, str]]], known: Mapping[str, NDArray[np.floating]]
) -> dict[str, NDArray[np.floating]]:
    """Per patient the (dim,) mean over tiles, read only where it is not known."""
    found = {p: known[p] if p in known else _mean_embedding(x) for p, x in bags.items()}
    return {p: mean for p, mean in found.items() if mean is not None}


def _mean_embedding(bags: Sequence[tuple[Path, str]]) -> NDArray[np.float64] | None:
    """(dim,) mean over a patient's tiles; None, and the bag is made anew, where one is damaged."""
    tiles = []
    for path, _ in bags:
        try:
            tiles.append(read_bag(path).features)
        except DataError:
            path.unlink(missing_ok=True)
            return None
    return np.asarray(np.concatenate(tiles).mean(axis=0, dtype=np.float64))


def _same(table: ad.AnnData, source: Mapping[str, str]) -> bool:
    return dict(zip(table.obs_names, table.obs[SOURCE].astype(str), strict=True)) == dict(source)
