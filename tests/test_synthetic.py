"""The simulated consortium: files that readers open, a truth of known strength, restarts."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import numpy as np
import openslide
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.draw import polygon2mask
from sksurv.metrics import concordance_index_censored

from modalities.files import digest_path
from modalities.synthetic import GENE_SETS, SITE_FILES, consortium, read_truth, simulate
from modalities.synthetic.counts import draw_counts
from modalities.synthetic.scans import draw_scan, site_scanner
from modalities.synthetic.slides import draw_slide, site_stain
from modalities.synthetic.tables import draw_tables
from modalities.synthetic.truth import (
    FACTORS,
    MODALITIES,
    SCAN_STREAM,
    SLIDE_STREAM,
    WEIGHTS,
    draw_patients,
    patient_rng,
)

ROOT = Path(__file__).resolve().parents[1]
SITES = [5, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consortium")
    simulate(folder, SITES, seed=3, workers=1)
    return folder


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _manifest(site: Path, modality: str) -> list[dict[str, str]]:
    return [row for row in _rows(site / "manifest.csv") if row["modality"] == modality]


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_path(path) for path in files}


def _dicom_row(site: Path) -> dict[str, str]:
    return next(row for row in _manifest(site, "radiology") if row["path"].endswith("/ct"))


def test_two_runs_and_two_processes_write_the_same_bytes(folder, tmp_path):
    simulate(tmp_path, SITES, seed=3, workers=2)
    assert _digests(tmp_path) == _digests(folder)


def test_another_seed_writes_another_consortium(folder, tmp_path):
    simulate(tmp_path, [1], seed=4, tables_only=True)
    assert read_truth(tmp_path).log_hazard["site-01"] != read_truth(folder).log_hazard["site-01"]


def test_patients_do_not_depend_on_how_many_there_are(folder, tmp_path):
    simulate(tmp_path, [3], seed=3, workers=1)
    smaller, larger = _digests(tmp_path / "site-01" / "raw"), _digests(folder / "site-01" / "raw")
    images = {name: digest for name, digest in smaller.items() if name != "rna.h5ad"}
    assert images
    assert images.items() <= larger.items()
    counts = ad.read_h5ad(tmp_path / "site-01" / "raw" / "rna.h5ad")
    same = ad.read_h5ad(folder / "site-01" / "raw" / "rna.h5ad")[counts.obs_names]
    np.testing.assert_array_equal(counts.X.toarray(), same.X.toarray())
    for name in ("clinical.csv", "manifest.csv"):
        rows = _rows(folder / "site-01" / name)
        assert all(row in rows for row in _rows(tmp_path / "site-01" / name))


@given(site=st.integers(0, 40), indices=st.lists(st.integers(0, 500), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_drawing_together_equals_drawing_alone(site, indices):
    together = draw_patients(1, site, indices)
    for place, index in enumerate(indices):
        alone = draw_patients(1, site, [index])
        assert alone.log_hazard[0] == pytest.approx(together.log_hazard[place], abs=1e-12)
        assert alone.time_days[0] == together.time_days[place]
        assert alone.patient_ids[0] == together.patient_ids[place]


def test_streams_of_patients_and_purposes_differ():
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    first = {patient_rng(*key, stream=stream).random() for key in keys for stream in range(5)}
    assert len(first) == 20


def test_slides_open_with_resolution_and_levels(folder):
    rows = _manifest(folder / "site-01", "pathology")
    for row in rows:
        with openslide.OpenSlide(folder / "site-01" / row["path"]) as slide:
            assert slide.level_count >= 2
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
            image = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
        tissue = (image.min(axis=2) < 215).mean()
        assert 0.3 < tissue < 0.7
        assert image[:20, :20].min() > 225


def test_slides_show_their_factors():
    def darkness(cellularity: float, lymphocytes: float) -> float:
        rng = patient_rng(0, 0, 0, stream=SLIDE_STREAM)
        image = draw_slide(np.array([cellularity, lymphocytes]), site_stain(0, 0), rng)
        return float((image[..., 0] < 110).mean())

    assert darkness(-1.5, 0.0) < darkness(0.0, 0.0) < darkness(1.5, 0.0)
    assert darkness(0.0, -1.5) < darkness(0.0, 1.5)


def test_sites_stain_differently():
    stains = [site_stain(0, site) for site in range(3)]
    assert len({tuple(np.round(stain.haematoxylin, 3)) for stain in stains}) == 3


def test_dicom_series_is_read_and_agrees_with_its_structure_set(folder):
    site = folder / "site-01"
    row = _dicom_row(site)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(site / row["path"])))
    image = reader.Execute()
    volume = sitk.GetArrayFromImage(image)
    assert 20 <= len(volume) <= 24
    assert volume.shape[1:] == (48, 48)
    assert -1024 <= volume.min() < -700
    structures = pydicom.dcmread(site / row["mask_path"])
    assert structures.StructureSetROISequence[0].ROIName == row["roi"] == "GTV"
    mask = _rasterised(structures, image)
    assert mask.sum() > 100
    assert volume[mask].mean() > -200 > volume[~mask].mean()


def _rasterised(structures: pydicom.Dataset, image: sitk.Image) -> np.ndarray:
    mask = np.zeros(image.GetSize()[::-1], dtype=bool)
    for contour in structures.ROIContourSequence[0].ContourSequence:
        assert contour.ContourGeometricType == "CLOSED_PLANAR"
        points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
        assert len(points) == contour.NumberOfContourPoints >= 3
        indices = np.array([image.TransformPhysicalPointToContinuousIndex(p) for p in points])
        plane = round(indices[0, 2])
        assert np.allclose(indices[:, 2], plane, atol=0.01)
        mask[plane] |= polygon2mask(mask.shape[1:], indices[:, 1::-1])
    return mask


def test_contours_rasterise_to_the_drawn_mask(folder):
    site = folder / "site-01"
    row = _dicom_row(site)
    patients = draw_patients(3, 0, range(SITES[0]))
    place = patients.patient_ids.index(row["patient_id"])
    rng = patient_rng(3, 0, place, stream=SCAN_STREAM)
    scan = draw_scan(patients.observed["radiology"][place], site_scanner(3, 0), rng)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(site / row["path"])))
    image = reader.Execute()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), scan.volume)
    assert image.GetSpacing() == pytest.approx(scan.spacing_mm)
    mask = _rasterised(pydicom.dcmread(site / row["mask_path"]), image)
    overlap = 2.0 * (mask & scan.mask).sum() / (mask.sum() + scan.mask.sum())
    assert overlap > 0.99


def test_dicom_files_are_valid_deidentified_and_refer_to_each_other(folder):
    site = folder / "site-01"
    row = _dicom_row(site)
    structures = pydicom.dcmread(site / row["mask_path"])
    images = [pydicom.dcmread(path) for path in sorted((site / row["path"]).iterdir())]
    uids = [image.SOPInstanceUID for image in images]
    assert len(set(uids)) == len(uids)
    for number, image in enumerate(images):
        assert image.file_meta.MediaStorageSOPInstanceUID == image.SOPInstanceUID
        assert image.SOPClassUID == pydicom.uid.CTImageStorage
        assert image.InstanceNumber == number + 1
        assert image.SOPInstanceUID.is_valid
        assert image.pixel_array.shape == (48, 48)
    for dataset in (structures, *images):
        assert dataset.PatientID == row["patient_id"]
        assert dataset.PatientIdentityRemoved == "YES"
        assert not any(
            element.VR in ("DA", "TM", "DT", "PN") and element.value for element in dataset
        )
        assert not any(element.tag.is_private for element in dataset)
    frame = structures.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == images[0].SeriesInstanceUID
    assert [item.ReferencedSOPInstanceUID for item in series.ContourImageSequence] == uids
    for contour in structures.ROIContourSequence[0].ContourSequence:
        assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID in uids


def test_nifti_scan_and_mask_are_read_on_one_grid(folder):
    site = folder / "site-01"
    row = next(row for row in _manifest(site, "radiology") if row["path"].endswith(".nii.gz"))
    volume = sitk.ReadImage(str(site / row["path"]))
    mask = sitk.ReadImage(str(site / row["mask_path"]))
    assert volume.GetPixelID() == sitk.sitkInt16
    assert volume.GetDirection() == pytest.approx(np.eye(3).ravel())
    for which in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(volume, which)() == pytest.approx(getattr(mask, which)())
    inside = sitk.GetArrayFromImage(mask).astype(bool)
    values = sitk.GetArrayFromImage(volume)
    assert values[inside].mean() > -200 > values[~inside].mean()


@pytest.mark.parametrize("observed", [(-2.5, -2.5, -2.5), (2.5, 2.5, 2.5), (-2.5, 0.0, 2.5)])
@pytest.mark.parametrize("site", [0, 1, 2])
def test_extreme_tumours_stay_inside_the_scan_and_are_not_tiny(observed, site):
    rng = patient_rng(0, site, 0, stream=SCAN_STREAM)
    scan = draw_scan(np.array(observed), site_scanner(0, site), rng)
    assert scan.mask.sum() > 200
    assert scan.mask.sum() == scan.mask[1:-1, 1:-1, 1:-1].sum()


def test_counts_are_integers_of_the_patients_who_have_them(folder):
    site = folder / "site-01"
    table = ad.read_h5ad(site / "raw" / "rna.h5ad")
    rows = _manifest(site, "omics")
    assert list(table.obs_names) == [row["patient_id"] for row in rows]
    assert {row["path"] for row in rows} == {"raw/rna.h5ad"}
    values = table.X.toarray()
    assert np.issubdtype(values.dtype, np.integer)
    assert values.min() >= 0
    genes = [gene for names in GENE_SETS.values() for gene in names]
    assert len(set(genes)) == len(genes)
    assert set(genes) <= set(table.var_names)
    assert all(15 <= len(names) <= 20 for names in GENE_SETS.values())


def test_pathways_follow_their_factor():
    patients = draw_patients(0, 0, range(150))
    counts = draw_counts(0, patients)
    columns = [int(gene.removeprefix("GENE")) - 1 for gene in GENE_SETS["proliferation"]]
    score = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e5)[:, columns].mean(axis=1)
    assert np.corrcoef(score, patients.observed["omics"][:, 0])[0, 1] > 0.6


def test_clinical_table(folder):
    rows = _rows(folder / "site-01" / "clinical.csv")
    assert [row["patient_id"] for row in rows] == [f"S01-{n:04d}" for n in range(1, SITES[0] + 1)]
    for row in rows:
        assert row["event"] in "01"
        assert int(row["time_days"]) >= 1
        assert row["sex"] in ("female", "male")
        assert row["stage"] in ("I", "II", "III", "IV")
        assert row["treatment"] in ("surgery", "chemoradiation", "immunotherapy")


def test_manifest_names_what_lies_there_and_at_most_one_modality_is_missing(folder):
    for site, n in zip(("site-01", "site-02"), SITES, strict=True):
        rows = _rows(folder / site / "manifest.csv")
        for row in rows:
            assert (folder / site / row["path"]).exists()
            assert not row["mask_path"] or (folder / site / row["mask_path"]).is_file()
        have = [sum(row["patient_id"] == name for row in rows) for name in _ids(folder / site)]
        assert len(have) == n
        assert set(have) <= {2, 3}


def _ids(site: Path) -> list[str]:
    return [row["patient_id"] for row in _rows(site / "clinical.csv")]


def test_no_temporary_file_is_left(folder):
    assert not list(folder.rglob(".*"))
    assert set(SITE_FILES) >= {"manifest.csv", "clinical.csv", "raw/rna.h5ad"}


def test_truth_is_what_was_drawn(folder):
    truth = read_truth(folder)
    assert truth.seed == 3
    assert set(truth.factors) == {name for names in FACTORS.values() for name in names}
    assert dict(truth.weights) == dict(WEIGHTS)
    assert list(truth.log_hazard) == ["site-01", "site-02"]
    drawn = draw_patients(3, 1, range(SITES[1]))
    assert list(truth.log_hazard["site-02"].values()) == drawn.log_hazard.tolist()


def test_a_folder_without_truth_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no readable truth"):
        read_truth(tmp_path)


@pytest.fixture(scope="module")
def many():
    return [draw_patients(0, site, range(1000)) for site in range(4)]


def _concordance(sites, scores) -> float:
    values = [
        concordance_index_censored(patients.event, patients.time_days, score)[0]
        for patients, score in zip(sites, scores, strict=True)
    ]
    return float(np.mean(values))


def test_the_true_hazard_ranks_as_designed(many):
    assert 0.77 < _concordance(many, [p.log_hazard for p in many]) < 0.83


@pytest.mark.parametrize("modality", MODALITIES)
def test_each_modality_alone_ranks_as_designed(many, modality):
    weights = np.array([WEIGHTS[name] for name in FACTORS[modality]])
    seen = [patients.observed[modality] @ weights for patients in many]
    assert 0.58 < _concordance(many, seen) < 0.68


def test_clinical_covariates_alone_rank_as_designed(many):
    weights = np.array([WEIGHTS[name] for names in FACTORS.values() for name in names])
    rest = [patients.log_hazard - patients.factors @ weights for patients in many]
    assert 0.57 < _concordance(many, rest) < 0.68


def test_events_and_missing_modalities_are_as_frequent_as_designed(many):
    event = np.concatenate([p.event & (p.time_days <= 5 * 365.25) for p in many])
    assert 0.55 < event.mean() < 0.65
    missing = np.concatenate([p.missing for p in many])
    assert (missing >= 0).mean() == pytest.approx(0.25, abs=0.02)
    assert np.bincount(missing[missing >= 0], minlength=3).min() > 250


def test_feature_tables_hold_the_factors(many):
    tables = draw_tables(0, many[0])
    assert [tables[modality].shape[1] for modality in MODALITIES] == [12, 12, 8]
    for modality, values in tables.items():
        design = np.column_stack([values, np.ones(len(values))])
        factors = many[0].observed[modality]
        fitted = design @ np.linalg.lstsq(design, factors, rcond=None)[0]
        for fit, factor in zip(fitted.T, factors.T, strict=True):
            assert np.corrcoef(fit, factor)[0, 1] > 0.6


def test_tables_only(tmp_path):
    truth = simulate(tmp_path, [40, 20], seed=1, tables_only=True)
    assert truth == read_truth(tmp_path)
    site = tmp_path / "site-01"
    assert sorted(path.name for path in site.iterdir()) == sorted(
        ["clinical.csv", "manifest.csv", "omics.csv", "pathology.csv", "radiology.csv"]
    )
    for modality in MODALITIES:
        listed = _manifest(site, modality)
        rows = _rows(site / f"{modality}.csv")
        assert {row["path"] for row in listed} == {f"{modality}.csv"}
        assert [row["patient_id"] for row in listed] == [row["patient_id"] for row in rows]
        assert np.isfinite([float(row[name]) for row in rows for name in list(row)[1:]]).all()


class _PowerCut(Exception):
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_run_finishes_with_the_same_bytes(folder, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(consortium, "_CHUNK", 2)

    def fail(_: int) -> None:
        raise _PowerCut

    with pytest.raises(_PowerCut):
        simulate(tmp_path, SITES, seed=3, workers=workers, advance=fail)
    assert json.loads((tmp_path / "simulation.json").read_text())["finished"] is False
    assert not (tmp_path / "truth.json").exists()
    done: list[int] = []
    simulate(tmp_path, SITES, seed=3, workers=1, advance=done.append)
    assert sum(done) == sum(SITES)
    assert _digests(tmp_path) == _digests(folder)


_PROGRAM = """
import sys
from pathlib import Path
from modalities.synthetic import simulate
if __name__ == "__main__":
    simulate(Path(sys.argv[1]), [40], seed=3, workers=2)
"""


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_finishes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = subprocess.Popen([sys.executable, program, folder], env=environment)
    while not list(folder.rglob("*.tif")):
        time.sleep(0.05)
    running.kill()
    running.wait()
    time.sleep(2.0)
    before = _digests(folder)
    time.sleep(1.0)
    assert _digests(folder) == before
    assert not (folder / "truth.json").exists()
    simulate(folder, [40], seed=3, workers=1)
    simulate(whole, [40], seed=3, workers=1)
    assert _digests(folder) == _digests(whole)


def test_half_a_series_and_a_killed_write_are_mended(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    site = tmp_path / "site-01"
    row = _dicom_row(site)
    (site / row["mask_path"]).unlink()
    (site / row["path"] / "007.dcm").unlink()
    (site / row["path"] / ".partial-008-x1y2z3ab.dcm").write_bytes(b"half")
    marker = tmp_path / "simulation.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "finished": False}) + "\n")
    simulate(tmp_path, SITES, seed=3, workers=1)
    assert _digests(tmp_path) == _digests(folder)


def test_finished_work_is_not_done_again(folder, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("written again")

    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(consortium, "ProcessPoolExecutor", refuse)
    monkeypatch.setattr(consortium, "_write_text", refuse)
    done: list[int] = []
    again = simulate(folder, SITES, seed=3, workers=2, advance=done.append)
    assert again == read_truth(folder)
    assert sum(done) == sum(SITES)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("change", [{"seed": 4}, {"sites": [5, 4]}, {"tables_only": True}])
def test_a_folder_with_another_simulation_is_refused(folder, change):
    arguments = {"sites": SITES, "seed": 3, "workers": 1, **change}
    with pytest.raises(ValueError, match="other parameters") as caught:
        simulate(folder, arguments.pop("sites"), **arguments)
    assert str(folder) not in str(caught.value)


def test_a_folder_with_foreign_sites_is_refused(tmp_path):
    (tmp_path / "site-01").mkdir()
    with pytest.raises(ValueError, match="no simulation wrote"):
        simulate(tmp_path, [2], tables_only=True)


@pytest.mark.parametrize(
    ("sites", "options", "field"),
    [
        ([], {}, "sites"),
        ([3, 0], {}, "sites"),
        ([3], {"seed": -1}, "seed"),
        ([3], {"workers": 0}, "workers"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, sites, options, field):
    with pytest.raises(ValueError, match=f"^{field}: found"):
        simulate(tmp_path / "new", sites, **options)
    assert not (tmp_path / "new").exists()
