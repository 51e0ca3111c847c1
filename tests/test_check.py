from __future__ import annotations

import shutil
import tomllib
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import tifffile

from flows.check import check_site, without_registry
from flows.demo import demo_protocol, write_consortium
from flows.extraction import Ledger, collect, extract_batch, plan_modality
from flows.protocol import read_protocol
from flows.site_cli import _print_faults
from infra.settings import Workspace
from modalities.clinical import read_registry
from modalities.cohort import DataError, ManifestRow, assemble, read_manifest
from modalities.pathology import MissingWeights, load_tile_encoder

if TYPE_CHECKING:
    from pathlib import Path

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings
    from modalities.cohort import Exclusion

N = 16


@pytest.fixture(scope="module")
def protocol() -> StudyProtocol:

    values = tomllib.loads(demo_protocol(tables_only=False))
    values["modality"]["pathology"] |= {
        "encoder": "test_efficientnet", "pretrained": False, "precision": "fp32",
    }  # fmt: skip
    return read_protocol(values)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consortium")
    write_consortium(folder, (N,), seed=1)
    return folder


@pytest.fixture
def site(simulated: Path, tmp_path: Path) -> SiteSettings:
    shutil.copytree(simulated, tmp_path / "copy")
    return Workspace(root=tmp_path / "copy").site("site-01")


def rows_of(site: SiteSettings, modality: str) -> list[ManifestRow]:
    return read_manifest(site.path(site.manifest), [modality])[0]


def codes(faults: list[Exclusion]) -> dict[str, str]:
    for fault in faults:
        assert fault.reason
        assert "\n" not in fault.reason
        assert "/" not in fault.reason.replace("TPM or FPKM", "").replace("and/or", "")
        assert not fault.patient_id or fault.patient_id not in fault.reason
    return {fault.patient_id: fault.code for fault in faults}


def slide(path: Path, **tags: object) -> None:
    picture = np.full((512, 512, 3), 200, np.uint8)
    tifffile.imwrite(path, picture, photometric="rgb", tile=(256, 256), compression="jpeg", **tags)


def test_a_simulated_site_is_without_fault(site: SiteSettings, protocol: StudyProtocol) -> None:
    seen: list[int] = []
    assert check_site(site, protocol, advance=seen.append) == []
    assert sum(seen) == len(rows_of(site, "pathology")) + len(rows_of(site, "radiology"))


def break_slides(site: SiteSettings) -> dict[str, str]:
    cut, text, scaleless, gone = rows_of(site, "pathology")[:4]
    cut.path.write_bytes(cut.path.read_bytes()[:5000])
    text.path.write_text("not a slide")
    slide(scaleless.path)
    gone.path.unlink()
    return dict(
        zip(
            (row.patient_id for row in (cut, text, scaleless, gone)),
            ("unreadable_slide", "not_a_slide", "missing_resolution", "missing_file"),
            strict=True,
        )
    )


def break_masks(site: SiteSettings) -> dict[str, str]:
    rows = [r for r in rows_of(site, "radiology") if str(r.mask_path).endswith(".nii.gz")]
    other, empty, voxel, *_ = rows
    for row, kind in ((other, "other"), (empty, "empty"), (voxel, "voxel")):
        mask = sitk.ReadImage(str(row.mask_path))
        values = np.zeros_like(sitk.GetArrayFromImage(mask))
        if kind == "voxel":
            values[tuple(n // 2 for n in values.shape)] = 1
        new = sitk.GetImageFromArray(values)
        new.CopyInformation(mask)
        if kind == "other":
            new.SetSpacing([2 * x for x in mask.GetSpacing()])
        sitk.WriteImage(new, str(row.mask_path))
    return {row.patient_id: "" for row in (other, empty, voxel)}


def break_counts(site: SiteSettings) -> dict[str, str]:
    row = rows_of(site, "omics")[0]
    counts = ad.read_h5ad(row.path)
    values = np.asarray(counts.X.toarray() if hasattr(counts.X, "toarray") else counts.X, float)
    ids = list(counts.obs_names)
    values[0, 0] = -1
    values[1] = np.log1p(values[1])
    obs = pd.DataFrame(index=pd.Index(list(counts.obs_names)))
    ad.AnnData(values, obs=obs, var=pd.DataFrame(index=counts.var_names)).write_h5ad(row.path)
    with h5py.File(row.path, "r+") as file:
        file["obs/_index"][3] = file["obs/_index"][2]
    return dict.fromkeys(ids[:4], "")


def break_registry(site: SiteSettings) -> dict[str, str]:
    path = site.path(site.clinical)
    table = pd.read_csv(path, dtype=str)
    table.loc[0, "time_days"] = ""
    table.loc[1, "time_days"] = "-3"
    table.loc[2, "time_days"] = "two years"
    table.loc[3, "event"] = "deceased"
    table.loc[5, "patient_id"] = table.loc[4, "patient_id"]
    lost = pd.read_csv(path, dtype=str).loc[5, "patient_id"]
    table.to_csv(path, index=False)
    ids = table["patient_id"]
    return {
        ids[0]: "missing_time", ids[1]: "time_not_positive", ids[2]: "time_not_a_number",
        ids[3]: "event_not_binary", ids[4]: "", lost: "no_registry_row",
    }  # fmt: skip


BREAKS = {
    "slides": break_slides,
    "masks": break_masks,
    "counts": break_counts,
    "registry": break_registry,
}


@pytest.mark.parametrize("kind", BREAKS)
def test_every_bad_input_is_one_sentence_for_its_patient(
    site: SiteSettings, protocol: StudyProtocol, kind: str
) -> None:
    expected = BREAKS[kind](site)
    faults = check_site(site, protocol)
    found = codes(faults)
    assert set(found) == set(expected)
    assert len(faults) == len(expected)
    assert {x: code for x, code in found.items() if expected[x]} == {
        x: code for x, code in expected.items() if code
    }


def test_bad_inputs_do_not_stop_the_cohort(site: SiteSettings, protocol: StudyProtocol) -> None:
    broken = {name: BREAKS[name](site) for name in ("slides", "masks", "counts")}
    rows, unusable = read_manifest(site.path(site.manifest), ["pathology", "radiology", "omics"])
    found = codes(unusable)
    tables = {}
    for name in ("pathology", "radiology", "omics"):
        work = plan_modality(
            name, protocol.modality[name], [r for r in rows if r.modality == name],
            features=site.path("features"), ledger=Ledger(site.path("digests.json")),
            secret=site.key, batch_size=50,
        )  # fmt: skip
        faults = [f for b in work.pending for f in extract_batch(b, work.spec, work.features)]
        found |= codes([*work.faults, *faults])
        tables[name] = collect(work)
        assert tables[name] is not None
    assert set(found) == {x for ids in broken.values() for x in ids}
    spec = protocol.modality["clinical"]
    registry, _ = read_registry(site.path(site.clinical), spec)  # type: ignore[arg-type]
    ids = list(registry.patient_ids)
    outcome = pd.DataFrame(
        {
            "event": registry.event, "time_days": registry.time_days, "split": "train",
            "fold_unit": 0.5,
        },
        index=pd.Index(ids),
    )  # fmt: skip
    cohort = assemble(
        {**tables, "clinical": registry.covariates},
        outcome,
        protocol_fingerprint="protocol",  # type: ignore[dict-item]
    )
    assert cohort.n_obs == N
    for name, modality in (("slides", "pathology"), ("masks", "radiology"), ("counts", "omics")):
        assert not set(broken[name]) & set(cohort.mod[modality].obs_names)
        assert cohort.mod[modality].n_obs > 3


def test_a_scan_too_many_is_told_before_extraction(
    site: SiteSettings, protocol: StudyProtocol
) -> None:
    first, second = rows_of(site, "radiology")[:2]
    with site.path(site.manifest).open("a") as manifest:
        manifest.write(f"{first.patient_id},radiology,{second.path},{second.mask_path},GTV\n")
    assert codes(check_site(site, protocol)) == {first.patient_id: "several_inputs"}


def test_weights_that_are_not_here_are_told_once(
    site: SiteSettings,
    protocol: StudyProtocol,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = protocol.modality["pathology"]
    spec = asked.model_copy(update={"encoder": "uni_v1", "pretrained": True})
    other = protocol.model_copy(update={"modality": {**protocol.modality, "pathology": spec}})
    slides = rows_of(site, "pathology")
    (fault,) = check_site(site, other)
    assert (fault.patient_id, fault.modality, fault.code) == ("", "pathology", "missing_weights")
    with pytest.raises(MissingWeights) as error:
        load_tile_encoder(spec)
    assert fault.reason == str(error.value)
    _print_faults([fault], n_inputs=len(slides))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"pathology  missing_weights: {fault.reason}"
    assert told[1].endswith(" inputs, 0 would be set aside; faults of no single input: 1")

    unpinned = site.model_copy(update={"weights": {"pathology": tmp_path / "mine.bin"}})
    assert codes(check_site(unpinned, other)) == {"": "wrong_weights"}

    # Of features alone nothing is embedded.
    bag = tmp_path / "features_uni_v1" / "a.h5"
    bag.parent.mkdir()
    with h5py.File(bag, "w") as file:
        file["coords"], file["features"] = np.zeros((3, 2), int), np.ones((3, 1024), np.float32)
    manifest = site.path(site.manifest)
    rows = [x for x in manifest.read_text().splitlines() if ",pathology," not in x]
    lines = [f"{x.patient_id},pathology,{bag},," for x in slides]
    manifest.write_text("\n".join([*rows, *lines]) + "\n")
    assert check_site(site, other) == []


def test_a_file_for_all_that_is_damaged_sets_aside_everyone(
    site: SiteSettings, protocol: StudyProtocol
) -> None:
    rows = rows_of(site, "omics")
    rows[0].path.write_bytes(rows[0].path.read_bytes()[:3000])
    assert set(codes(check_site(site, protocol))) == {row.patient_id for row in rows}


@pytest.mark.parametrize("name", ["manifest.csv", "clinical.csv"])
def test_without_its_lists_a_site_cannot_be_checked(
    site: SiteSettings, protocol: StudyProtocol, name: str
) -> None:
    site.path(name).unlink()
    with pytest.raises(DataError) as error:
        check_site(site, protocol)
    assert str(site.home) not in str(error.value)


def test_patients_without_registry_row_are_told_once(tmp_path: Path) -> None:
    rows = [ManifestRow(x, "omics", tmp_path, None, None) for x in ("b", "a", "b", "c")]
    found = without_registry(rows, {"c"}, "clinical")
    assert [(f.patient_id, f.code) for f in found] == [
        ("a", "no_registry_row"), ("b", "no_registry_row"),
    ]  # fmt: skip
