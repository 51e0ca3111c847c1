from __future__ import annotations

import os
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from flows import extraction
from flows.demo import demo_protocol
from flows.extraction import Ledger, ModalityWork, collect, extract_batch, plan_modality
from flows.protocol import ModalitySpec, read_protocol_text
from modalities.cohort import Exclusion, ManifestRow, read_manifest
from modalities.pathology import PathologySpec, read_bag
from modalities.synthetic import simulate
from modalities.tabular import TabularSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SPECS: dict[str, ModalitySpec] = dict(
    read_protocol_text(demo_protocol(tables_only=False), source="demo.toml").modality
) | {"pathology": PathologySpec(encoder="test_efficientnet", pretrained=False, precision="fp32")}
RAW = ("pathology", "radiology", "omics")


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
    size: int = 2, spec: ModalitySpec | None = None,
) -> ModalityWork:  # fmt: skip
    ledger = Ledger(site / "features" / "digests.json")
    work = plan_modality(
        name, spec or SPECS[name], rows_of(site, name) if rows is None else rows,
        features=site / "features", ledger=ledger, batch_size=size,
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


def test_another_spec_does_everything_again(extracted: Path) -> None:
    spec = SPECS["radiology"].model_copy(update={"bin_width": 10.0})
    work = plan(extracted, "radiology", spec=spec)
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
