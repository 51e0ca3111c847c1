"""Bulk RNA counts to pathway scores or a gene panel, one patient at a time."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, Self

import anndata as ad
import h5py
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from modalities.cohort import DataError, Exclusion, feature_table
from modalities.files import fingerprint
from modalities.tabular import write_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
    from pathlib import Path

    from numpy.typing import NDArray

EXTRACTOR_VERSION = 1
"""Raised when the same counts and spec would give other features."""

_DAMAGE = (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError)
"""What h5py and anndata raise for a file that is damaged or laid out in another way."""

_BLOCK_ROWS = 128  # 128 patients of 60,000 genes are 60 MB in float64
_LOG_CEILING = 50.0  # log2 of 1e15: no logged expression is above it
_INDEX_ENCODINGS = frozenset({"string-array", "nullable-string-array", "array", "categorical"})
_REASONS = {
    "not_finite": "counts: found NaN or infinity, needed a whole number for every gene; "
    "write 0 where nothing was counted",
    "negative_counts": "counts: found negative values, needed raw counts; give them as X or as "
    "layer 'counts'",
    "already_logged": "counts: found fractions and no value above 50, as after a logarithm, needed "
    "raw counts; give them as X or as layer 'counts'",
    "not_counts": "counts: found values that are not whole numbers, needed raw counts; round "
    "expected counts, and do not use TPM or FPKM",
}


class OmicsSpec(BaseModel):
    """How counts become features."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gene_sets: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="Pathway to its genes, named as in the counts' var."
    )
    output: Literal["pathways", "panel"] = Field(
        default="pathways", description="One feature per pathway, or one per gene of the panel."
    )
    panel: tuple[str, ...] = Field(default=(), description="Genes, if output is panel.")
    target_sum: float = Field(
        default=1e4, gt=0, allow_inf_nan=False, description="Counts per patient after scaling."
    )
    min_total_counts: int = Field(
        default=1000, ge=1, description="Patients with fewer counts over all genes are set aside."
    )
    min_genes_found: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Fraction of a pathway's genes (or of the panel) that the file must have.",
    )

    @model_validator(mode="after")
    def _genes_are_given(self) -> Self:
        if not _wanted(self):
            raise ValueError("gene_sets: found none, needed at least one pathway")
        for name, genes in (*_wanted(self).items(), *self.gene_sets.items()):
            if not name or not genes or "" in genes or len(set(genes)) != len(genes):
                raise ValueError(f"{name or 'gene_sets'}: needed a name and distinct, named genes")
        return self

    @property
    def features(self) -> dict[str, tuple[str, ...]]:
        """Feature to the genes it is the mean of: pathways by name, or panel genes as given.

        Sorting keeps the order a function of the fingerprint, which does not see the order in
        which a mapping was written.
        """
        if self.output == "panel":
            return {gene: (gene,) for gene in self.panel}
        return {name: self.gene_sets[name] for name in sorted(self.gene_sets)}

    def fingerprint(self) -> str:
        """SHA-256 of the spec and of the extractor's version."""
        return fingerprint({"extractor": EXTRACTOR_VERSION, "spec": self.model_dump(mode="json")})


@dataclass(frozen=True)
class _Counts:
    """An open counts matrix, with the names of its rows and columns."""

    matrix: Any  # dense HDF5 dataset or CSR matrix, (n, g)
    patient_ids: tuple[str, ...]
    genes: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """Which columns of the counts make which feature."""

    used: NDArray[np.intp]  # (u,) columns of the counts
    used_genes: tuple[str, ...]  # (u,)
    members: tuple[NDArray[np.intp], ...]  # p arrays of positions in `used`, maybe empty


@dataclass(frozen=True)
class _Scored:
    """One patient's features (p,) and the digest of what they were made from."""

    features: NDArray[np.float64]
    digest: str


def extract_counts(
    path: Path,
    spec: OmicsSpec,
    *,
    patient_ids: Sequence[str] | None = None,
    input_digest: str | None = None,
    modality: str = "omics",
) -> tuple[ad.AnnData, list[Exclusion]]:
    """Pathway scores, or a panel of genes, from raw bulk RNA counts.

    Counts are scaled to ``spec.target_sum`` per patient and ``log(1 + x)`` is taken; a pathway's
    score is the mean of that over the genes of the pathway that the file has. A panel gene that
    the file lacks is NaN.

    Nothing is estimated across patients: no centring or scaling of genes, no control genes drawn
    from the cohort (as scanpy's ``score_genes`` does). So a new patient changes nobody else's
    features and they can be computed one patient at a time. Differences of level between genes
    and sites stay in; standardisation and `modalities.harmonise` come later. Pathways of which
    two sites measured different genes differ in level by that too: ``var["genes_found"]`` tells.

    Parameters
    ----------
    path
        ``.h5ad`` file: patients in rows with their ids as ``obs_names``, genes in columns, raw
        counts in ``layers["counts"]`` or else in ``X``, dense or sparse.
    spec
        Genes, scaling and minimums.
    patient_ids
        Patients to extract, in this order; all in the file by default.
    input_digest
        Digest to write for every patient. By default each patient's is that of their own used
        counts and total, so that others in the same file do not make it look changed.
    modality
        Name written to the exclusions.

    Returns
    -------
    table
        (n, p) float32, with ``var["genes_found"]`` and ``var["genes_wanted"]``.
    exclusions
        Patients who are absent or repeated, or whose counts cannot be used.

    Raises
    ------
    DataError
        If the fault is the file's: it cannot be read, has too few of a pathway's genes, has a
        needed gene twice, or holds no patient's raw counts (``already_logged``, ``not_counts``).
    """
    with _open(path) as file:
        counts = _read_counts(file)
        plan = _plan(counts.genes, spec)
        wanted = dict.fromkeys(counts.patient_ids if patient_ids is None else patient_ids)
        rows, exclusions = _locate(wanted, counts.patient_ids, modality)
        scored, faults = _score(counts, rows, plan=plan, spec=spec)
    _check_any_raw(faults, n_rows=len(rows))
    exclusions += [Exclusion(patient_id, modality, *fault) for patient_id, fault in faults.items()]
    kept = {patient_id: scored[patient_id] for patient_id in wanted if patient_id in scored}
    return _table(kept, plan, spec, input_digest), exclusions


def extract(
    source: Path,
    out: Path,
    spec: OmicsSpec,
    *,
    patient_ids: Sequence[str] | None = None,
    modality: str = "omics",
) -> tuple[ad.AnnData, list[Exclusion]]:
    """Read the counts ``source`` and write features to ``out`` as `write_table` does.

    Raises
    ------
    DataError
        As `extract_counts`.
    """
    table, exclusions = extract_counts(source, spec, patient_ids=patient_ids, modality=modality)
    write_table(table, out, exclusions, name=modality)
    return table, exclusions


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise DataError(
            "missing_file", "counts: found no file, needed .h5ad; correct its path"
        ) from None
    except OSError:
        raise _not_anndata("a damaged file or another format") from None


def _read_counts(file: h5py.File) -> _Counts:
    where = "layers/counts" if "layers/counts" in file else "X"
    if where not in file:
        raise _not_anndata("neither X nor a layer 'counts'")
    counts = _Counts(
        matrix=_matrix(file[where]),
        patient_ids=_names(file, "obs"),
        genes=_names(file, "var"),
    )
    if counts.matrix.shape != (len(counts.patient_ids), len(counts.genes)):
        raise _not_anndata("counts whose shape is not that of obs and var")
    if not np.issubdtype(counts.matrix.dtype, np.number):
        raise _not_anndata("counts that are not numbers")
    return counts


def _names(file: h5py.File, axis: str) -> tuple[str, ...]:
    """Names along an axis, without reading its other columns."""
    try:
        index = file[axis][file[axis].attrs["_index"]]
        if index.attrs["encoding-type"] in _INDEX_ENCODINGS:
            return tuple(map(str, ad.io.read_elem(index)))
    except _DAMAGE:
        pass
    raise _not_anndata(f"no names in {axis}") from None


def _matrix(element: h5py.Dataset | h5py.Group) -> Any:
    if isinstance(element, h5py.Dataset):
        return element
    try:
        backed = ad.io.sparse_dataset(element)
        if backed.format == "csr":
            return backed
        matrix = backed.to_memory()
        matrix.check_format(full_check=True)
    except _DAMAGE:
        raise _not_anndata("a sparse matrix that does not hold together") from None
    return matrix.tocsr()  # by rows, as it is read


def _not_anndata(found: str) -> DataError:
    return DataError(
        "not_anndata",
        f"counts: found {found}, needed a whole .h5ad file; write it again with a current anndata",
    )


def _plan(genes: Sequence[str], spec: OmicsSpec) -> _Plan:
    features = spec.features
    wanted = sorted({gene for members in features.values() for gene in members})
    copies = Counter(genes)
    for gene in wanted:
        if copies[gene] > 1:
            raise DataError(
                "duplicate_genes",
                f"gene {gene!r}: found {copies[gene]} columns, needed one; sum or drop the others",
            )
    found = tuple(gene for gene in wanted if copies[gene])
    _check_found(set(found), spec)
    column = {gene: i for i, gene in enumerate(genes)}
    position = {gene: i for i, gene in enumerate(found)}
    return _Plan(
        used=np.array([column[gene] for gene in found], dtype=np.intp),
        used_genes=found,
        members=tuple(
            np.array([position[g] for g in members if g in position], dtype=np.intp)
            for members in features.values()
        ),
    )


def _check_found(found: Set[str], spec: OmicsSpec) -> None:
    for name, genes in _wanted(spec).items():
        n_found = len(found & set(genes))
        if n_found < spec.min_genes_found * len(genes):
            raise DataError(
                "genes_missing",
                f"{name}: found {n_found} of its {len(genes)} genes, needed "
                f"{spec.min_genes_found:.0%}; name genes as the study does (symbols, or Ensembl "
                "ids with or without version), or ask the study to drop it",
            )


def _wanted(spec: OmicsSpec) -> dict[str, tuple[str, ...]]:
    """Return the groups of genes that a file must have enough of."""
    return {"panel": spec.panel} if spec.output == "panel" else spec.gene_sets


def _locate(
    wanted: Iterable[str], present: Sequence[str], modality: str
) -> tuple[dict[str, int], list[Exclusion]]:
    """Row of each wanted patient who is in the file exactly once."""
    row = {patient_id: i for i, patient_id in enumerate(present)}
    copies = Counter(present)
    rows: dict[str, int] = {}
    exclusions = []
    for patient_id in wanted:
        fault = _id_fault(patient_id, copies[patient_id])
        if fault is None:
            rows[patient_id] = row[patient_id]
        else:
            exclusions.append(Exclusion(patient_id, modality, *fault))
    return rows, exclusions


def _id_fault(patient_id: str, n_rows: int) -> tuple[str, str] | None:
    if not patient_id:
        return "missing_id", "patient id: found a row without one; add it to obs_names"
    if n_rows == 0:
        return "missing_in_file", "counts: found no row for this patient; add it or wait for it"
    if n_rows > 1:
        return "duplicate_id", f"counts: found {n_rows} rows for this patient; keep the right one"
    return None


def _score(
    counts: _Counts, rows: Mapping[str, int], *, plan: _Plan, spec: OmicsSpec
) -> tuple[dict[str, _Scored], dict[str, tuple[str, str]]]:
    """Features of each patient whose counts can be used, and the reason for each other one."""
    scored: dict[str, _Scored] = {}
    faults: dict[str, tuple[str, str]] = {}
    for patients, block in _blocks(counts.matrix, rows):
        found = _faults(block, spec.min_total_counts)
        faults.update({p: f for p, f in zip(patients, found, strict=True) if f is not None})
        usable = block[[fault is None for fault in found]]
        digests = _digests(usable, plan)
        features = _features(usable, plan, spec.target_sum)
        kept = [p for p in patients if p not in faults]
        scored.update(zip(kept, map(_Scored, features, digests), strict=True))
    return scored, faults


def _blocks(
    matrix: Any, rows: Mapping[str, int]
) -> Iterator[tuple[list[str], NDArray[np.float64]]]:
    """Read counts (k, g) of the wanted patients, a few at a time in the order of the file."""
    ordered = sorted(rows.items(), key=itemgetter(1))
    for _, group in groupby(ordered, key=lambda item: item[1] // _BLOCK_ROWS):
        patients, numbers = zip(*group, strict=True)
        block = _dense(matrix, numbers[0], numbers[-1] + 1)
        yield list(patients), block[np.array(numbers) - numbers[0]].astype(np.float64)


def _dense(matrix: Any, start: int, stop: int) -> NDArray[Any]:
    try:
        block = matrix[start:stop]
        if isinstance(block, np.ndarray):
            return block
        block.check_format(full_check=True)  # toarray would write outside its memory
        return block.toarray()
    except _DAMAGE:
        raise _not_anndata("counts that cannot be read to the end") from None


def _faults(block: NDArray[np.float64], min_total_counts: int) -> list[tuple[str, str] | None]:
    """Why each row cannot be used, None where it can."""
    finite: NDArray[np.bool_] = np.isfinite(block)
    values = np.where(finite, block, 0.0)
    fractional = (values != np.floor(values)).any(axis=1)
    totals = values.sum(axis=1)
    codes = np.select(
        [
            ~finite.all(axis=1),
            (values < 0).any(axis=1),
            fractional & (values.max(axis=1, initial=0.0) <= _LOG_CEILING),
            fractional,
            totals < min_total_counts,
        ],
        ["not_finite", "negative_counts", "already_logged", "not_counts", "low_counts"],
        default="",
    )
    return [
        (code, _reason(code, total, min_total_counts)) if code else None
        for code, total in zip(codes.tolist(), totals.tolist(), strict=True)
    ]


def _reason(code: str, total: float, min_total_counts: int) -> str:
    if code != "low_counts":
        return _REASONS[code]
    return (
        f"counts: found {total:.0f} over all genes, needed at least {min_total_counts}; check the "
        "sample's quality or sequence it again"
    )


def _digests(block: NDArray[np.float64], plan: _Plan) -> list[str]:
    """SHA-256 of all that each row's features depend on; it stays at the site."""
    names = hashlib.sha256("\0".join(plan.used_genes).encode())
    used = np.column_stack([block.sum(axis=1), block[:, plan.used]]).astype("<f8")
    digests = []
    for row in used:
        digest = names.copy()
        digest.update(row.tobytes())
        digests.append(digest.hexdigest())
    return digests


def _features(block: NDArray[np.float64], plan: _Plan, target_sum: float) -> NDArray[np.float64]:
    """Features (k, p) of counts (k, g)."""
    import scanpy as sc  # takes seconds, which the command line's help should not

    # In float64: scanpy would scale whole numbers in single precision.
    scaled = ad.AnnData(block.copy())
    sc.pp.normalize_total(scaled, target_sum=target_sum)
    logged = sc.pp.log1p(scaled.X[:, plan.used])  # (k, u)
    missing = np.full(len(block), np.nan)
    return np.column_stack(
        [logged[:, members].mean(axis=1) if members.size else missing for members in plan.members]
    )


def _check_any_raw(faults: Mapping[str, tuple[str, str]], *, n_rows: int) -> None:
    """Raise if every row read is fractional: then the file, not the patient, is at fault."""
    codes = [code for code, _ in faults.values() if code in ("already_logged", "not_counts")]
    if codes and len(codes) == n_rows:
        code = "not_counts" if "not_counts" in codes else "already_logged"
        raise DataError(code, _REASONS[code])


def _table(
    scored: Mapping[str, _Scored], plan: _Plan, spec: OmicsSpec, input_digest: str | None
) -> ad.AnnData:
    features = spec.features
    table = feature_table(
        list(scored),
        list(features),
        np.array([s.features for s in scored.values()]).reshape(len(scored), len(features)),
        input_digests=[input_digest or s.digest for s in scored.values()],
        spec_fingerprint=spec.fingerprint(),
    )
    table.var["genes_found"] = [members.size for members in plan.members]
    table.var["genes_wanted"] = [len(genes) for genes in features.values()]
    return table
