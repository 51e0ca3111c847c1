from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from flows import extraction
from flows.demo import demo_protocol
from flows.extraction import Ledger, ModalityWork, collect, extract_batch, plan_modality
from flows.extraction_keys import MadeFrom, code_version, recipe
from flows.protocol import ModalitySpec, read_protocol_text
from modalities.cohort import Exclusion, ManifestRow, assemble, read_manifest
from modalities.omics import OmicsSpec
from modalities.pathology import Bag, PathologySpec, read_bag
from modalities.synthetic import simulate
from modalities.tabular import TabularSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

SPECS: dict[str, ModalitySpec] = dict(
    read_protocol_text(demo_protocol(tables_only=False), source="demo.toml").modality
) | {"pathology": PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")}
RAW = ("pathology", "radiology", "omics")
SECRET = b"a secret of the site, of 32 bytes"


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consortium")
    simulate(folder, (6,), seed=1, workers=1)
    return folder / "site-01"


@pytest.fixture(scope="module")
def extracted(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Raw files and finished features of a site."""
    site = tmp_path_factory.mktemp("extracted") / "site-01"
    shutil.copytree(simulated, site)
    for name in RAW:
        work = plan(site, name)
        for batch in work.pending:
            assert extract_batch(batch, work.spec, work.features) == []
        assert collect(work) is not None
    return site


@pytest.fixture
def site(extracted: Path, tmp_path: Path) -> Iterator[Path]:
    """The same site; bags are named by their slides' path, so that it lies in the same place."""
    shutil.copytree(extracted, tmp_path / "kept")
    yield extracted
    shutil.rmtree(extracted)
    shutil.move(tmp_path / "kept", extracted)


def rows_of(site: Path, name: str) -> list[ManifestRow]:
    rows, exclusions = read_manifest(site / "manifest.csv", RAW)
    assert not exclusions
    return [row for row in rows if row.modality == name]


def plan(
    site: Path, name: str, rows: list[ManifestRow] | None = None, *,
    size: int = 2, spec: ModalitySpec | None = None, secret: bytes = SECRET,
) -> ModalityWork:  # fmt: skip
    ledger = Ledger(site / "features" / "digests.json")
    work = plan_modality(
        name, spec or SPECS[name], rows_of(site, name) if rows is None else rows,
        features=site / "features", ledger=ledger, secret=secret, batch_size=size,
    )  # fmt: skip
    ledger.save()
    return work


def pending(work: ModalityWork) -> list[str]:
    return [row.patient_id for batch in work.pending for row in batch.rows]


def extract(work: ModalityWork) -> list[Exclusion]:
    return [fault for b in work.pending for fault in extract_batch(b, work.spec, work.features)]


def touch_later(path: Path) -> None:
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


@pytest.mark.parametrize("name", RAW)
def test_a_second_plan_has_nothing_to_do(extracted: Path, name: str) -> None:
    work = plan(extracted, name)
    table = collect(work)
    assert work.pending == ()
    assert table is not None
    assert sorted(table.obs_names) == sorted(row.patient_id for row in work.rows)
    assert np.isfinite(table.X).all()


def test_batches_have_the_size_asked_for(simulated: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(simulated, site)
    n = len(rows_of(site, "pathology"))
    work = plan(site, "pathology", size=4)
    assert [len(b.rows) for b in work.pending] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    assert len(plan(site, "omics", size=1).pending) == 1  # one file, read once


def test_a_changed_slide_alone_is_done_again(site: Path) -> None:
    before = collect(plan(site, "pathology"))
    row, other = rows_of(site, "pathology")[:2]
    shutil.copy(other.path, row.path)
    work = plan(site, "pathology")
    assert pending(work) == [row.patient_id]
    stale = collect(work)
    assert stale is not None
    assert row.patient_id not in stale.obs_names
    assert extract(work) == []
    after = collect(work)
    assert after is not None
    assert before is not None
    changed = (after[before.obs_names].X != before.X).any(axis=1)
    assert list(before.obs_names[changed]) == [row.patient_id]
    np.testing.assert_array_equal(after[row.patient_id].X, after[other.patient_id].X)


def test_a_changed_mask_alone_is_done_again(site: Path) -> None:
    row = next(r for r in rows_of(site, "radiology") if str(r.mask_path).endswith(".dcm"))
    assert row.mask_path is not None
    row.mask_path.write_bytes(row.mask_path.read_bytes() + b"\0")
    assert pending(plan(site, "radiology")) == [row.patient_id]


def test_a_slice_that_came_is_seen_by_the_ledger(site: Path) -> None:
    row = next(r for r in rows_of(site, "radiology") if r.path.is_dir())
    (row.path / "zzz.dcm").write_bytes(b"not yet whole")
    assert pending(plan(site, "radiology")) == [row.patient_id]


def test_another_region_of_a_mask_alone_is_done_again(extracted: Path) -> None:
    rows = rows_of(extracted, "radiology")
    at = next(i for i, row in enumerate(rows) if str(row.mask_path).endswith(".dcm"))
    rows[at] = replace(rows[at], roi="GTV*")
    assert pending(plan(extracted, "radiology", rows)) == [rows[at].patient_id]


def fewer_genes() -> dict[str, tuple[str, ...]]:
    spec = SPECS["omics"]
    assert isinstance(spec, OmicsSpec)
    name = next(iter(spec.gene_sets))
    return dict(spec.gene_sets) | {name: spec.gene_sets[name][1:]}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pathology", {"stride_px": 200}),
        ("radiology", {"bin_width": 10.0}),
        ("omics", {"target_sum": 1e5}),
        ("omics", {"gene_sets": fewer_genes()}),
    ],
)
def test_another_spec_does_everything_again(
    extracted: Path, name: str, change: dict[str, Any]
) -> None:
    work = plan(extracted, name, spec=SPECS[name].model_copy(update=change))
    assert len(pending(work)) == len(work.rows)
    assert collect(work) is None


@pytest.mark.parametrize("name", ["pathology", "radiology"])
def test_a_kill_between_batches_keeps_what_was_done(
    simulated: Path, tmp_path: Path, name: str
) -> None:
    site = tmp_path / "site"
    shutil.copytree(simulated, site)
    work = plan(site, name)
    assert extract_batch(work.pending[0], work.spec, work.features) == []
    again = plan(site, name)
    done = [row.patient_id for row in work.pending[0].rows]
    assert sorted(done + pending(again)) == sorted(pending(work))
    table = collect(again)
    assert table is not None
    assert sorted(table.obs_names) == sorted(done)


@pytest.mark.parametrize("name", ["pathology", "radiology"])
def test_a_faulty_input_is_set_aside_and_tried_again(site: Path, name: str) -> None:
    row = next(r for r in rows_of(site, name) if r.path.is_file())
    good = row.path.read_bytes()
    row.path.write_bytes(good[: len(good) // 3])
    for _ in range(2):
        work = plan(site, name)
        assert pending(work) == [row.patient_id]
        faults = extract(work)
        assert [(f.patient_id, f.modality) for f in faults] == [(row.patient_id, name)]
        assert row.patient_id not in faults[0].reason
        table = collect(plan(site, name))
        assert table is not None
        assert row.patient_id not in table.obs_names
        assert table.n_obs == len(work.rows) - 1
    row.path.write_bytes(good)
    assert extract(plan(site, name)) == []
    assert pending(plan(site, name)) == []


def test_an_input_that_vanished_is_a_fault_of_one_patient(site: Path) -> None:
    rows = rows_of(site, "pathology")
    rows[0].path.unlink()
    work = plan(site, "pathology", rows)
    assert [(f.patient_id, f.code) for f in work.faults] == [
        (rows[0].patient_id, "unreadable_file")
    ]
    assert pending(work) == []
    assert len(work.rows) == len(rows) - 1


@pytest.mark.parametrize("name", RAW)
def test_a_patient_who_left_the_manifest_leaves_the_table(extracted: Path, name: str) -> None:
    rows = rows_of(extracted, name)
    work = plan(extracted, name, rows[1:])
    table = collect(work)
    assert table is not None
    assert sorted(table.obs_names) == sorted(row.patient_id for row in rows[1:])
    assert collect(plan(extracted, name, [])) is None
    whole = collect(plan(extracted, name))
    assert whole is not None
    assert whole.n_obs == len(rows)


def test_slides_of_a_patient_make_one_bag_even_of_one_name(site: Path) -> None:
    first, second = rows_of(site, "pathology")[:2]
    folder = site / "raw" / "again"
    folder.mkdir()
    twin = folder / first.path.name
    shutil.copy(second.path, twin)
    work = plan(site, "pathology", [*rows_of(site, "pathology"), replace(first, path=twin)])
    assert pending(work) == [first.patient_id]
    assert extract(work) == []
    table = collect(work)
    assert table is not None
    bags = table.obs.loc[first.patient_id, "bag"].split(";")
    assert len(set(bags)) == 2
    tiles = np.concatenate([read_bag(site / "features" / x).features for x in bags])
    np.testing.assert_allclose(
        table[first.patient_id].X[0], tiles.mean(axis=0, dtype=np.float64), rtol=1e-6
    )


def test_several_scans_of_a_patient_are_none(extracted: Path) -> None:
    rows = rows_of(extracted, "radiology")
    work = plan(extracted, "radiology", [*rows, replace(rows[0], path=rows[1].path)])
    assert [(f.patient_id, f.code) for f in work.faults] == [(rows[0].patient_id, "several_inputs")]
    assert rows[0].patient_id not in [row.patient_id for row in work.rows]


def test_a_scan_without_mask_is_a_fault(extracted: Path) -> None:
    rows = rows_of(extracted, "radiology")
    work = plan(extracted, "radiology", [replace(rows[0], mask_path=None), *rows[1:]])
    assert [(f.patient_id, f.code) for f in work.faults] == [(rows[0].patient_id, "missing_mask")]


def test_the_ledger_reads_a_file_again_only_when_it_looks_changed(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    digest = extraction._digest

    def count(row: ManifestRow, spec: ModalitySpec) -> str:
        read.append(row.patient_id)
        return str(digest(row, spec))

    monkeypatch.setattr("flows.extraction._digest", count)
    row = rows_of(site, "pathology")[0]
    plan(site, "pathology")
    assert read == []
    touch_later(row.path)
    assert pending(plan(site, "pathology")) == []  # the same bytes
    assert read == [row.patient_id]
    row.path.write_bytes(row.path.read_bytes() + b"\0")
    assert pending(plan(site, "pathology")) == [row.patient_id]
    (site / "features" / "digests.json").write_text("{broken")
    read.clear()
    assert pending(plan(site, "pathology")) == [row.patient_id]
    assert len(read) == len(rows_of(site, "pathology"))


def test_the_tiles_beside_an_mrxs_slide_count(tmp_path: Path) -> None:
    slide = tmp_path / "a.mrxs"
    slide.write_text("index")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0001.dat").write_text("tiles")
    row = ManifestRow("p1", "pathology", slide, None, None)
    first = Ledger(tmp_path / "digests.json").digest(row, SPECS["pathology"])
    ledger = Ledger(tmp_path / "digests.json")
    ledger.digest(row, SPECS["pathology"])
    (tmp_path / "a" / "Data0001.dat").write_text("other tiles")
    assert ledger.digest(row, SPECS["pathology"]) != first


def blood(site: Path, **tables: dict[str, float]) -> list[ManifestRow]:
    rows = []
    for name, content in tables.items():
        path = site / f"{name}.csv"
        path.write_text("patient_id,hb\n" + "".join(f"{k},{v}\n" for k, v in content.items()))
        rows += [ManifestRow(k, "blood", path, None, None) for k in content]
    return rows


def test_tables_in_several_files_are_one_modality(tmp_path: Path) -> None:
    spec = TabularSpec(columns=("hb",))
    rows = blood(tmp_path, ward={"p1": 1, "p2": 2}, clinic={"p3": 3})
    rows.append(replace(rows[0], patient_id="p9"))
    work = plan(tmp_path, "blood", rows, spec=spec)
    faults = extract(work)
    assert [(f.patient_id, f.code) for f in faults] == [("p9", "missing_in_file")]
    table = collect(work)
    assert table is not None
    assert dict(zip(table.obs_names, table.X[:, 0], strict=True)) == {"p1": 1, "p2": 2, "p3": 3}
    (tmp_path / "clinic.csv").write_text("patient_id\np3\n")
    work = plan(tmp_path, "blood", rows[:-1], spec=spec)
    assert [(f.patient_id, f.code) for f in extract(work)] == [("p3", "missing_column")]
    table = collect(work)
    assert table is not None
    assert list(table.obs_names) == ["p1", "p2"]


COUNTS = OmicsSpec(gene_sets={"b": ("G1", "G2"), "a": ("G3", "G4", "G5", "G6")})
TABLES: dict[str, ModalitySpec] = {
    "omics": COUNTS,
    "named": TabularSpec(columns=("hb", "crp")),
    "unnamed": TabularSpec(),
}
A_FILE_EACH = {"one": ("p1",), "two": ("p2",), "three": ("p3",)}
ONE_FILE = {"all": ("p1", "p2", "p3")}


def write_counts(path: Path, patients: Iterable[str]) -> None:
    rng = [np.random.default_rng(int(x[1:])) for x in patients]
    genes = [f"G{i}" for i in range(6 if "p4" in patients else 9)]  # another panel
    counts = np.array([x.integers(200, 900, size=len(genes)) for x in rng], dtype=np.float64)
    obs, var = pd.DataFrame(index=list(patients)), pd.DataFrame(index=genes)
    ad.AnnData(counts, obs=obs, var=var).write_h5ad(path)


def write_blood(path: Path, patients: Iterable[str], more: str = "") -> None:
    path.write_text(f"patient_id,hb,crp{more}\n" + "".join(
        f"{x},{x[1:]}.5,{'' if x == 'p2' else 7}{',3' if more else ''}\n" for x in patients
    ))  # fmt: skip


def tables(site: Path, name: str, files: Mapping[str, Sequence[str]]) -> list[ManifestRow]:
    """Write files of patients; give their rows of the manifest."""
    write = write_counts if name == "omics" else write_blood
    rows = []
    for stem, patients in files.items():
        path = site / f"{stem}.{'h5ad' if name == 'omics' else 'csv'}"
        write(path, patients)
        rows += [ManifestRow(x, name, path, None, None) for x in patients]
    return rows


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """Files that an extractor reads, each with the patients that come out of it."""
    seen: list[tuple[str, tuple[str, ...]]] = []

    def watched(read: Callable[..., Any]) -> Callable[..., Any]:
        def count(path: Path, *arguments: Any, **options: Any) -> Any:
            table, faults = read(path, *arguments, **options)
            seen.append((path.stem, tuple(table.obs_names)))
            return table, faults

        return count

    for reader in ("extract_counts", "read_table"):
        monkeypatch.setattr(f"flows.extraction.{reader}", watched(getattr(extraction, reader)))
    return seen


def same_as_read_anew(
    site: Path, tmp_path: Path, name: str, rows: list[ManifestRow], spec: ModalitySpec
) -> None:
    """Compare what a site collects with a full extraction into an empty folder."""
    tmp_path.mkdir()
    works = [
        plan_modality(
            name, spec, rows, features=at / "features", ledger=Ledger(at / "digests.json"),
            secret=SECRET, batch_size=size,
        )
        for at, size in ((site, 2), (tmp_path / "anew", 2), (tmp_path / "at-once", 99))
    ]  # fmt: skip
    assert pending(works[0]) == []
    found = [collect(work) for work in works if extract(work) == []]
    assert len(found) == 3
    for table in found[1:]:
        assert found[0] is not None
        assert table is not None
        assert found[0].uns["spec_fingerprint"] == table.uns["spec_fingerprint"]
        np.testing.assert_array_equal(found[0].X, table.X)
        for ours, theirs in ((found[0].obs, table.obs), (found[0].var, table.var)):
            pd.testing.assert_frame_equal(ours.astype(str), theirs.astype(str))


@pytest.mark.parametrize("name", TABLES)
def test_one_new_patient_in_a_file_of_their_own_is_one_file(
    name: str, tmp_path: Path, calls: list[tuple[str, tuple[str, ...]]]
) -> None:
    site, spec = tmp_path / "site", TABLES[name]
    site.mkdir()
    rows = tables(site, name, A_FILE_EACH)
    assert [len(b.rows) for b in plan(site, name, rows, spec=spec).pending] == [2, 1]
    assert extract(plan(site, name, rows, spec=spec)) == []
    assert [x for x, _ in calls] == list(A_FILE_EACH)
    calls.clear()
    rows += tables(site, name, {"four": ("p4",)})
    work = plan(site, name, rows, spec=spec)
    assert pending(work) == ["p4"]
    assert extract(work) == []
    assert calls == [("four", ("p4",))]
    same_as_read_anew(site, tmp_path / "other", name, rows, spec)


@pytest.mark.parametrize("name", TABLES)
def test_one_new_patient_in_a_shared_file_is_that_file_and_no_other(
    name: str, tmp_path: Path, calls: list[tuple[str, tuple[str, ...]]]
) -> None:
    site, spec = tmp_path / "site", TABLES[name]
    site.mkdir()
    rows = tables(site, name, ONE_FILE | {"ward": ("p7", "p8")})
    assert [len(b.rows) for b in plan(site, name, rows, spec=spec).pending] == [3, 2]
    assert extract(plan(site, name, rows, spec=spec)) == []
    calls.clear()
    rows = tables(site, name, {"all": ("p1", "p2", "p3", "p4")}) + rows[3:]
    touch_later(rows[0].path)
    work = plan(site, name, rows, spec=spec)
    assert pending(work) == ["p1", "p2", "p3", "p4"]
    assert extract(work) == []
    assert calls == [("all", ("p1", "p2", "p3", "p4"))]
    same_as_read_anew(site, tmp_path / "other", name, rows, spec)


@pytest.mark.parametrize("name", TABLES)
def test_a_row_new_to_the_manifest_reads_the_file_that_has_it(
    name: str, tmp_path: Path, calls: list[tuple[str, tuple[str, ...]]]
) -> None:
    site, spec = tmp_path / "site", TABLES[name]
    site.mkdir()
    rows = tables(site, name, ONE_FILE | {"ward": ("p7", "p8")})
    assert extract(plan(site, name, rows[1:], spec=spec)) == []
    calls.clear()
    work = plan(site, name, rows, spec=spec)
    assert extract(work) == []
    assert calls == [("all", ("p1", "p2", "p3"))]
    same_as_read_anew(site, tmp_path / "other", name, rows, spec)


def test_columns_that_files_decide_are_those_of_the_files_as_they_are(tmp_path: Path) -> None:
    site, spec = tmp_path / "site", TabularSpec()
    site.mkdir()
    rows = tables(site, "unnamed", {"one": ("p1", "p2"), "two": ("p3",), "three": ("p5",)})
    write_blood(site / "two.csv", ("p3",), more=",aa")
    write_blood(site / "three.csv", ("p5",), more=",gone")
    assert extract(plan(site, "unnamed", rows, spec=spec)) == []
    table = collect(plan(site, "unnamed", rows, spec=spec))
    assert table is not None
    assert list(table.var_names) == ["aa", "crp", "gone", "hb"]
    write_blood(site / "two.csv", ("p3",))
    rows = rows[:-1]  # who had the column "gone" left the manifest
    work = plan(site, "unnamed", rows, spec=spec)
    assert pending(work) == ["p3"]
    assert extract(work) == []
    table = collect(work)
    assert table is not None
    assert list(table.var_names) == ["crp", "hb"]
    same_as_read_anew(site, tmp_path / "other", "unnamed", rows, spec)


def test_a_modality_whose_every_input_is_faulty_is_absent(tmp_path: Path) -> None:
    rows = blood(tmp_path, ward={"p1": 1, "p2": 2})
    (tmp_path / "ward.csv").write_text("")
    work = plan(tmp_path, "blood", rows, spec=TabularSpec(columns=("hb",)))
    assert {f.patient_id for f in extract(work)} == {"p1", "p2"}
    assert collect(work) is None
    rows = blood(tmp_path, ward={"p1": 1, "p2": 2})
    work = plan(tmp_path, "blood", rows, spec=TabularSpec(columns=("hb",)))
    assert extract(work) == []
    assert collect(work) is not None


def test_a_damaged_feature_table_is_made_again(site: Path) -> None:
    work = plan(site, "radiology")
    work.table_path.write_bytes(work.table_path.read_bytes()[:5000])
    assert len(pending(plan(site, "radiology"))) == len(work.rows)


def test_features_are_tables_of_their_spec(extracted: Path) -> None:
    for name in RAW:
        table = ad.read_h5ad(extracted / "features" / f"{name}.h5ad")
        assert table.uns["spec_fingerprint"] == SPECS[name].fingerprint()
        assert pd.Index(table.obs_names).is_unique


@pytest.mark.parametrize("name", ["radiology", "pathology"])
def test_one_new_patient_is_one_input_whoever_is_there(
    site: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newcomer alone is measured, embedded and averaged; bags of others are not even read."""
    rows = rows_of(site, name)
    bags = {p: p.stat().st_mtime_ns for p in (site / "features" / name).rglob("*.h5")}
    known = collect(plan(site, name, rows))
    assert known is not None
    twin = rows[0].path.with_name(f"twin-{rows[0].path.name}")
    (shutil.copytree if twin.suffix == "" else shutil.copy)(rows[0].path, twin)
    read: list[Path] = []

    def count(path: Path) -> Bag:
        read.append(path)
        return read_bag(path)

    monkeypatch.setattr("flows.extraction.read_bag", count)
    work = plan(site, name, [*rows, replace(rows[0], patient_id="new", path=twin)])
    assert pending(work) == ["new"]
    assert extract(work) == []
    table = collect(work)
    assert table is not None
    assert len(read) == (name == "pathology")
    assert {p: p.stat().st_mtime_ns for p in bags} == bags
    np.testing.assert_array_equal(table[known.obs_names].X, known.X)
    np.testing.assert_array_equal(table["new"].X, table[rows[0].patient_id].X)


@pytest.mark.parametrize("name", RAW)
def test_another_extractors_code_does_everything_again_and_half_done_it_continues(
    site: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pending(plan(site, name)) == []
    monkeypatch.setattr("flows.extraction_keys.code_version", lambda _: "e" * 64)
    work = plan(site, name)
    assert sorted(pending(work)) == sorted(row.patient_id for row in work.rows)
    assert collect(work) is None
    assert extract_batch(work.pending[0], work.spec, work.features) == []
    again = plan(site, name)
    done = [row.patient_id for row in work.pending[0].rows]
    assert sorted(pending(again) + done) == sorted(pending(work))
    table = collect(again)
    assert table is not None
    assert sorted(table.obs_names) == sorted(done)
    if name != "pathology":
        assert set(table.obs["code_version"]) == {"e" * 64}


def test_features_of_before_there_were_keys_are_kept_and_mix_with_new_ones(site: Path) -> None:
    path = site / "features" / "radiology.h5ad"
    table = ad.read_h5ad(path)
    del table.obs["cache_key"], table.obs["code_version"]
    table.write_h5ad(path)
    rows = rows_of(site, "radiology")
    assert pending(plan(site, "radiology")) == []
    new = replace(rows[0], patient_id="new")
    work = plan(site, "radiology", [*rows, new])
    assert pending(work) == ["new"]
    assert extract(work) == []
    work = plan(site, "radiology", [*rows, new])
    assert pending(work) == []
    found = collect(work)
    assert found is not None
    assert found.n_obs == len(rows) + 1
    keys = found.obs["cache_key"].astype(str)
    assert (keys != "").tolist() == [x == "new" for x in found.obs_names]


@pytest.mark.parametrize("name", RAW)
def test_another_sites_secret_vouches_for_nothing(site: Path, name: str) -> None:
    rows = rows_of(site, name)
    work = plan(site, name, secret=b"the secret of another site")
    assert sorted(pending(work)) == sorted(row.patient_id for row in rows)
    made = {x.source for x in work.made if x is not None}
    assert made
    assert not any(x.key in made for x in work.made if x is not None)
    assert collect(work) is None
    assert extract(work) == []
    table = collect(work)
    assert table is not None
    assert table.n_obs == len(rows)
    assert len(pending(plan(site, name))) == len(rows)


def test_a_table_is_read_again_under_another_spec_secret_or_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = TabularSpec(columns=("hb",))
    rows = blood(tmp_path, ward={"p1": 1, "p2": 2})
    assert extract(plan(tmp_path, "blood", rows, spec=spec)) == []
    assert pending(plan(tmp_path, "blood", rows, spec=spec)) == []
    other = plan(tmp_path, "blood", rows, spec=TabularSpec(columns=("hb",), patient_id="who"))
    assert pending(other) == ["p1", "p2"]
    other = plan(tmp_path, "blood", rows, spec=spec, secret=b"the secret of another site")
    assert pending(other) == ["p1", "p2"]
    monkeypatch.setattr("flows.extraction_keys.code_version", lambda _: "e" * 64)
    assert pending(plan(tmp_path, "blood", rows, spec=spec)) == ["p1", "p2"]


def test_a_keyed_table_says_what_else_it_is_made_of(extracted: Path) -> None:
    table = ad.read_h5ad(extracted / "features" / "radiology.h5ad")
    now = recipe(SPECS["radiology"], SECRET)
    for source, code, key in table.obs[["source_digest", "code_version", "cache_key"]].to_numpy():
        assert (code, key) == (now.code, now.key(source))
    made = MadeFrom("a", now.spec, now.code, now.key("a"))
    assert now.why_stale(None, "a") == "new"
    assert now.why_stale(made, "a") is None
    assert now.why_stale(made, "b") == "input"
    assert now.why_stale(replace(made, spec="other"), "a") == "protocol"
    assert replace(now, code="other").why_stale(made, "a") == "code"
    assert replace(now, secret=b"other").why_stale(made, "a") == "secret"
    assert str(SECRET) not in repr(now)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two extractors, to be edited."""
    code_version.cache_clear()
    monkeypatch.setattr("flows.extraction_keys._ROOT", tmp_path)
    (tmp_path / "modalities" / "one").mkdir(parents=True)
    (tmp_path / "modalities" / "one" / "a.py").write_text('"""One."""\nX = 1\n')
    (tmp_path / "modalities" / "two.py").write_text("Y = 1\n")
    yield tmp_path / "modalities"
    code_version.cache_clear()


@pytest.mark.parametrize(
    ("text", "is_same"),
    [
        ('"""Two lines,\n\nbetter said."""\n# why\nX = (1)\n', True),
        ("X = 2\n", False),
        ("X = 1\nY = 'text'\n", False),
        ("X = 1.0\n", False),
        ("X = True\n", False),
        ('def f():\n    """Said."""\n    return 1\n', False),
    ],
)
def test_code_counts_by_what_it_does(sources: Path, text: str, is_same: bool) -> None:
    one, two = code_version("modalities/one"), code_version("modalities/two")
    (sources / "one" / "a.py").write_text(text)
    code_version.cache_clear()
    assert (code_version("modalities/one") == one) is is_same
    assert code_version("modalities/two") == two
    (sources / "one" / "b.py").write_text("Z = 1\n")
    code_version.cache_clear()
    assert code_version("modalities/one") != one


def test_each_extractor_has_code_of_its_own() -> None:
    codes = {name: recipe(SPECS[name], SECRET).code for name in RAW}
    codes["blood"] = recipe(TabularSpec(columns=("hb",)), SECRET).code
    assert len(set(codes.values())) == 4


def test_a_cohorts_digest_sees_the_code_that_made_its_features(extracted: Path) -> None:
    table = collect(plan(extracted, "radiology"))
    assert table is not None
    n = table.n_obs
    outcome = pd.DataFrame(
        {"event": [True] * n, "time_days": [9.0] * n, "split": "train", "fold_unit": 0.5},
        index=table.obs_names,
    )
    digests = set()
    for code in ("one", "two"):
        table.obs["code_version"] = code
        cohort = assemble({"radiology": table}, outcome, protocol_fingerprint="p")
        digests.add(cohort.uns["cohort_digest"])
    assert len(digests) == 2
