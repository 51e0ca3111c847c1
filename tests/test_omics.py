"""Counts to pathway scores: golden values by hand and from scanpy, faults kept to one patient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import sparse

from modalities import omics
from modalities.cohort import DataError, Exclusion
from modalities.omics import OmicsSpec, extract, extract_counts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

GENES = ("TP53", "MYC", "EGFR", "KRAS", "ACTB")
SPEC = OmicsSpec(
    gene_sets={"growth": ("EGFR", "KRAS", "MYC"), "arrest": ("TP53", "CDKN1A")},
    min_total_counts=10,
)
COUNTS = np.array([[10, 0, 30, 20, 940], [5, 5, 5, 5, 0], [0, 100, 0, 0, 900]])


def _write(
    folder: Path,
    counts: Any,
    *,
    ids: tuple[str, ...] | None = None,
    genes: tuple[str, ...] = GENES,
    layer: Any = None,
) -> Path:
    names = ids or tuple(f"p{i}" for i in range(counts.shape[0]))
    table = ad.AnnData(
        counts,
        obs=pd.DataFrame(index=pd.Index(names, dtype=str)),
        var=pd.DataFrame(index=pd.Index(genes, dtype=str)),
        layers=None if layer is None else {"counts": layer},
    )
    path = folder / "counts.h5ad"
    table.write_h5ad(path)
    return path


def _codes(exclusions: list[Exclusion]) -> dict[str, str]:
    return {e.patient_id: e.code for e in exclusions}


def _expected(counts: NDArray[Any]) -> NDArray[np.float64]:
    """Arrest, then growth; CDKN1A is not in the file."""
    logged = np.log1p(counts * 1e4 / counts.sum(axis=1, keepdims=True))
    return np.column_stack([logged[:, 0], (logged[:, 1] + logged[:, 2] + logged[:, 3]) / 3])


def test_one_score_by_hand(tmp_path: Path) -> None:
    table, exclusions = extract_counts(_write(tmp_path, COUNTS), SPEC)
    assert list(table.var_names) == ["arrest", "growth"]
    # 10 of 1,000 counts are 100 of 10,000; 0, 30 and 20 are 0, 300 and 200.
    assert table["p0", "arrest"].X.item() == pytest.approx(np.log(101), rel=1e-6)
    growth = (np.log(1) + np.log(301) + np.log(201)) / 3
    assert table["p0", "growth"].X.item() == pytest.approx(growth, rel=1e-6)
    assert table.var["genes_found"].tolist() == [1, 3]
    assert table.var["genes_wanted"].tolist() == [2, 3]
    assert table.uns["spec_fingerprint"] == SPEC.fingerprint()
    assert exclusions == []


@pytest.mark.parametrize(
    "form",
    [
        np.asarray,
        sparse.csr_matrix,
        sparse.csc_matrix,
        lambda counts: counts.astype(np.float32),
        lambda counts: counts.astype(np.uint16),
        lambda counts: sparse.csr_matrix(counts.astype(np.float32)),
    ],
    ids=["dense", "csr", "csc", "float32", "uint16", "csr32"],
)
def test_storage_does_not_matter(tmp_path: Path, form: Callable[[Any], Any]) -> None:
    table, _ = extract_counts(_write(tmp_path, form(COUNTS)), SPEC)
    reference, _ = extract_counts(_write(tmp_path, COUNTS), SPEC)
    np.testing.assert_allclose(table.X, _expected(COUNTS), rtol=1e-6)
    np.testing.assert_array_equal(table.X, reference.X)
    assert list(table.obs["input_digest"]) == list(reference.obs["input_digest"])


def test_layer_counts_is_preferred_over_x(tmp_path: Path) -> None:
    path = _write(tmp_path, np.log1p(COUNTS), layer=COUNTS)
    table, _ = extract_counts(path, SPEC)
    np.testing.assert_allclose(table.X, _expected(COUNTS), rtol=1e-6)


def test_equal_to_scanpy_over_several_blocks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.5, 40, size=60), size=(300, 60))
    genes = tuple(f"g{i}" for i in range(60))
    path = _write(tmp_path, sparse.csr_matrix(counts), genes=genes)
    spec = OmicsSpec(gene_sets={"even": genes[::2], "few": genes[3:9]}, min_total_counts=1)
    table, exclusions = extract_counts(path, spec)

    reference = ad.read_h5ad(path)
    reference.X = reference.X.astype(np.float64)
    sc.pp.normalize_total(reference, target_sum=1e4)
    sc.pp.log1p(reference)
    for name, members in spec.gene_sets.items():
        expected = reference[:, list(members)].X.toarray().mean(axis=1)
        np.testing.assert_allclose(table[:, name].X[:, 0], expected, rtol=1e-6)
    assert not exclusions
    chosen, _ = extract_counts(path, spec, patient_ids=["p299", "p0", "p128", "p127"])
    assert list(chosen.obs_names) == ["p299", "p0", "p128", "p127"]
    np.testing.assert_array_equal(chosen.X, table[["p299", "p0", "p128", "p127"]].X)


def test_panel_has_one_column_per_gene_and_nan_for_absent_ones(tmp_path: Path) -> None:
    spec = OmicsSpec(output="panel", panel=("KRAS", "CDKN1A", "TP53"), min_total_counts=10)
    table, _ = extract_counts(_write(tmp_path, COUNTS), spec)
    assert list(table.var_names) == ["KRAS", "CDKN1A", "TP53"]
    logged = np.log1p(COUNTS * 1e4 / COUNTS.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(table[:, "KRAS"].X[:, 0], logged[:, 3], rtol=1e-6)
    assert np.isnan(table[:, "CDKN1A"].X).all()
    assert table.var["genes_found"].tolist() == [1, 0, 1]


def test_faults_of_a_patient_stay_with_the_patient(tmp_path: Path) -> None:
    good = COUNTS[0].astype(float)
    faulty = {
        "nan": np.where(np.arange(5) == 4, np.nan, good),
        "inf": np.where(np.arange(5) == 1, np.inf, good),
        "minus_inf": np.array([np.inf, -np.inf, 1, 1, 1000]),
        "negative": good - 1,
        "tpm": good * 1.5 + 0.25,
        "logged": np.log1p(good),
        "few": np.array([1.0, 2, 3, 3, 0]),
        "none": np.zeros(5),
    }
    path = _write(tmp_path, np.stack([good, *faulty.values(), good]), ids=("good", *faulty, "last"))
    table, exclusions = extract_counts(path, SPEC, modality="rna")
    assert list(table.obs_names) == ["good", "last"]
    np.testing.assert_allclose(table.X, _expected(np.stack([good, good])), rtol=1e-6)
    assert _codes(exclusions) == {
        "nan": "not_finite",
        "inf": "not_finite",
        "minus_inf": "not_finite",
        "negative": "negative_counts",
        "tpm": "not_counts",
        "logged": "already_logged",
        "few": "low_counts",
        "none": "low_counts",
    }
    assert "found 9 over all genes, needed at least 10" in exclusions[-2].reason
    assert {e.modality for e in exclusions} == {"rna"}


def test_absent_and_repeated_patients(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="not unique"):
        path = _write(tmp_path, COUNTS[[0, 1, 2, 0]], ids=("a", "b", "b", "c"))
    table, exclusions = extract_counts(path, SPEC, patient_ids=["c", "z", "b", "a", "c"])
    assert list(table.obs_names) == ["c", "a"]
    assert _codes(exclusions) == {"z": "missing_in_file", "b": "duplicate_id"}
    table, exclusions = extract_counts(path, SPEC)
    assert list(table.obs_names) == ["a", "c"]
    assert _codes(exclusions) == {"b": "duplicate_id"}
    table, exclusions = extract_counts(path, SPEC, patient_ids=["z"])
    assert table.shape == (0, 2)


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        (np.log1p(COUNTS * 7.0), "already_logged"),
        (COUNTS * 1e6 / COUNTS.sum(axis=1, keepdims=True) + 0.1, "not_counts"),
    ],
)
def test_a_file_without_raw_counts_is_refused_whole(
    tmp_path: Path, counts: NDArray[Any], code: str
) -> None:
    with pytest.raises(DataError, match="needed raw counts") as caught:
        extract_counts(_write(tmp_path, counts), SPEC)
    assert caught.value.code == code


def test_a_pathway_with_too_few_genes_is_refused(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"gene_sets": {"immune": ("CD8A", "CD4", "TP53")}})
    with pytest.raises(DataError, match=r"immune: found 1 of its 3 genes, needed 50%") as caught:
        extract_counts(_write(tmp_path, COUNTS), spec)
    assert caught.value.code == "genes_missing"
    panel = OmicsSpec(output="panel", panel=("CD8A", "CD4", "TP53"))
    with pytest.raises(DataError, match="panel: found 1 of its 3 genes"):
        extract_counts(_write(tmp_path, COUNTS), panel)


def test_a_repeated_gene_matters_only_where_it_is_used(tmp_path: Path) -> None:
    genes = ("TP53", "MYC", "EGFR", "KRAS", "KRAS")
    with pytest.warns(UserWarning, match="not unique"):
        path = _write(tmp_path, COUNTS, genes=genes)
    with pytest.raises(DataError, match="'KRAS': found 2 columns") as caught:
        extract_counts(path, SPEC)
    assert caught.value.code == "duplicate_genes"
    spec = SPEC.model_copy(update={"gene_sets": {"growth": ("EGFR", "MYC")}})
    assert extract_counts(path, spec)[0].shape == (3, 1)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _text(path: Path) -> None:
    path.write_text("gene,p1\nTP53,4\n")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _drop(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[name]

    return change


def _replace(name: str, values: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = values

    return change


def _no_encoding(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["obs"].attrs["_index"]


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _text,
        _empty,
        _drop("X"),
        _drop("obs"),
        _drop("var/_index"),
        _no_encoding,
        _replace("X", np.ones((3, 4))),
        _replace("X", np.array([["a"] * 5] * 3, dtype="S1")),
        _replace("obs", np.zeros(3)),
    ],
)
def test_a_file_that_is_no_anndata_is_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = _write(tmp_path, COUNTS)
    damage(path)
    with pytest.raises(DataError) as caught:
        extract_counts(path, SPEC)
    assert caught.value.code == "not_anndata"
    assert str(tmp_path) not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_a_sparse_matrix_that_points_outside_itself_is_refused(
    tmp_path: Path, form: Callable[[Any], Any]
) -> None:
    path = _write(tmp_path, form(COUNTS))
    with h5py.File(path, "r+") as file:
        file["X/indices"][0] = 10**6
    with pytest.raises(DataError, match=r"hold together|read to the end"):
        extract_counts(path, SPEC)


def test_a_damaged_block_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path, COUNTS)
    with h5py.File(path, "r+") as file:
        del file["X"]
        file.create_dataset("X", data=COUNTS, chunks=(1, 5), compression="gzip")
        chunk = file["X"].id.get_chunk_info(1)
    with path.open("r+b") as stream:
        stream.seek(chunk.byte_offset)
        stream.write(b"\xff" * chunk.size)
    with pytest.raises(DataError, match="read to the end") as caught:
        extract_counts(path, SPEC)
    assert caught.value.code == "not_anndata"


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        extract_counts(tmp_path / "none.h5ad", SPEC)
    assert caught.value.code == "missing_file"


def test_digests_are_of_the_patient_or_as_given(tmp_path: Path) -> None:
    def digests(counts: NDArray[Any], **options: Any) -> list[str]:
        table, _ = extract_counts(_write(tmp_path, counts), SPEC, **options)
        return list(table.obs["input_digest"])

    before = digests(COUNTS)
    assert len(set(before)) == 3
    changed = COUNTS.copy()
    changed[1, 4] = 1  # not a gene of any pathway, but of the library size
    after = digests(changed)
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert digests(COUNTS[:2]) == before[:2]
    assert digests(COUNTS, input_digest="f" * 64) == ["f" * 64] * 3


_COUNT_ROWS = st.lists(
    st.lists(st.integers(0, 10_000), min_size=5, max_size=5).filter(lambda row: sum(row) >= 10),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, deadline=None)
@given(rows=_COUNT_ROWS, data=st.data())
def test_scores_depend_on_nobody_else(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[int]], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("o")
    counts = np.array(rows)
    ids = tuple(f"p{i}" for i in range(len(rows)))
    table, _ = extract_counts(_write(folder, counts, ids=ids), SPEC)
    order = data.draw(st.permutations(range(len(rows))))
    some = order[: data.draw(st.integers(1, len(rows)))]
    other, _ = extract_counts(_write(folder, counts[some], ids=tuple(ids[i] for i in some)), SPEC)
    assert list(other.obs_names) == [ids[i] for i in some]
    np.testing.assert_array_equal(other.X, table.X[some])
    np.testing.assert_allclose(table.X, _expected(counts), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(rows=_COUNT_ROWS, depth=st.integers(2, 1000), data=st.data())
def test_sequencing_depth_and_order_of_genes_do_not_matter(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[list[int]],
    depth: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("o")
    counts = np.array(rows)
    table, _ = extract_counts(_write(folder, counts), SPEC)
    order = data.draw(st.permutations(range(5)))
    other, _ = extract_counts(
        _write(folder, counts[:, order] * depth, genes=tuple(GENES[i] for i in order)), SPEC
    )
    np.testing.assert_allclose(other.X, table.X, rtol=1e-6, atol=1e-7)


def test_block_size_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path, COUNTS)
    whole, _ = extract_counts(path, SPEC)
    monkeypatch.setattr(omics, "_BLOCK_ROWS", 2)
    parts, _ = extract_counts(path, SPEC)
    np.testing.assert_array_equal(parts.X, whole.X)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gene_sets": {"a": ()}},
        {"gene_sets": {"a": ("TP53", "TP53")}},
        {"gene_sets": {"": ("TP53",)}},
        {"output": "panel"},
        {"output": "panel", "panel": ("TP53", "TP53")},
        {"output": "genes", "panel": ("TP53",)},
        {"output": "panel", "panel": ("TP53",), "target_sum": 0},
        {"output": "panel", "panel": ("TP53",), "target_sum": float("inf")},
        {"output": "panel", "panel": ("TP53",), "min_total_counts": 0},
        {"output": "panel", "panel": ("TP53",), "min_genes_found": 1.1},
        {"output": "panel", "panel": ("TP53",), "genes": ("TP53",)},
    ],
)
def test_spec_refuses_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OmicsSpec.model_validate(fields)


def test_fingerprint_and_column_order_ignore_the_order_of_a_mapping() -> None:
    turned = SPEC.model_copy(update={"gene_sets": dict(reversed(SPEC.gene_sets.items()))})
    assert turned.fingerprint() == SPEC.fingerprint()
    assert list(turned.features) == list(SPEC.features)
    assert SPEC.model_copy(update={"target_sum": 1e6}).fingerprint() != SPEC.fingerprint()


def test_real_scaled_expression_is_no_count(tmp_path: Path) -> None:
    real = sc.datasets.pbmc68k_reduced()  # shipped with scanpy: X is centred and scaled
    path = tmp_path / "pbmc.h5ad"
    ad.AnnData(real.X, obs=real.obs[[]], var=real.var[[]]).write_h5ad(path)
    spec = OmicsSpec(gene_sets={"b": ("CD79A", "MS4A1")}, min_total_counts=1)
    table, exclusions = extract_counts(path, spec)
    assert table.n_obs == 0
    assert {e.code for e in exclusions} == {"negative_counts"}
    ad.AnnData(real.raw.X, obs=real.obs[[]], var=real.raw.var[[]]).write_h5ad(path)
    with pytest.raises(DataError) as caught:
        extract_counts(path, spec)
    assert caught.value.code == "already_logged"


def test_extract_writes_a_folder(tmp_path: Path) -> None:
    source = _write(tmp_path, COUNTS)
    table, _ = extract(source, tmp_path / "out", SPEC, patient_ids=["p1", "gone"])
    stored = ad.read_h5ad(tmp_path / "out" / "omics.h5ad")
    np.testing.assert_array_equal(stored.X, table.X)
    assert stored.var["genes_found"].tolist() == [1, 3]
    flat = pd.read_csv(tmp_path / "out" / "omics.csv")
    assert flat.columns.tolist() == ["patient_id", "arrest", "growth"]
    excluded = pd.read_csv(tmp_path / "out" / "excluded.csv")
    assert excluded[["patient_id", "modality", "code"]].to_numpy().tolist() == [
        ["gone", "omics", "missing_in_file"]
    ]
