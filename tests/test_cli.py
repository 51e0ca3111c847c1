from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk

from flows.cli import main
from flows.demo import write_consortium
from flows.protocol import load_protocol

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [x for x in os.environ if x.startswith(("CONSILIUM_", "PREFECT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("CONSILIUM_ROOT", "")  # restored afterwards: commands set it
    monkeypatch.chdir(tmp_path)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["consilium", *map(str, arguments)])
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        assert isinstance(status, int)
        return status, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("consortium")
    write_consortium(folder, (30, 30), seed=0, tables_only=True)
    return folder


def sentence(found: tuple[int, str, str]) -> str:
    """The one line of a refusal."""
    status, out, err = found
    assert (status, out) == (2, ""), found
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert err.startswith("consilium: ")
    return err.removeprefix("consilium: ").strip()


def test_a_study_is_written_and_checked(run: Call, tmp_path: Path) -> None:
    assert run("study", "init", "lung-os")[0] == 0
    status, out, _ = run("study", "check")
    assert status == 0
    assert out.startswith("lung-os: valid, fingerprint ")
    assert len(out.split()[-1]) == 64
    assert "use --force" in sentence(run("study", "init", "other"))
    assert run("study", "init", "other", "--force")[0] == 0
    assert run("study", "check")[1].startswith("other: valid")
    assert "study.name: needed lower-case" in sentence(run("study", "init", "Lung OS", "--force"))
    assert run("study", "check")[1].startswith("other: valid")


@pytest.mark.parametrize(
    ("options", "sums", "epsilon"), [((), "plain", 0.0), (("--strict",), "secure_sum", 3.0)]
)
def test_a_strict_study_masks_its_sums_and_adds_noise_and_another_does_neither(
    run: Call, tmp_path: Path, options: tuple[str, ...], sums: str, epsilon: float
) -> None:
    assert run("study", "init", "lung-os", *options)[0] == 0
    study = load_protocol(tmp_path / "study.toml")
    assert (study.federation.sums, study.differential_privacy.epsilon) == (sums, epsilon)
    assert study.privacy.lowered() == ()


def test_a_faulty_study_is_one_sentence(run: Call, tmp_path: Path) -> None:
    assert "found no such file" in sentence(run("study", "check"))
    run("study", "init", "lung-os")
    text = (tmp_path / "study.toml").read_text()
    (tmp_path / "study.toml").write_text(text.replace("horizon_days", "horizon_years", 1))
    status, _, err = run("study", "check")
    assert status == 2
    assert "study.horizon_years: unknown key; did you mean horizon_days?" in err
    (tmp_path / "study.toml").write_text(text.replace("fusion]", "fusions]", 1))
    assert "fusions: unknown key" in sentence(run("study", "check"))


def test_lowered_minimums_are_printed(run: Call, consortium: Path) -> None:
    out = run("study", "check", consortium / "study.toml")[1]
    assert "lowered minimum: cell 1 (default 10)" in out


def test_a_site_is_written_privately_and_never_replaced_by_accident(
    run: Call, tmp_path: Path
) -> None:
    assert run("site", "init", "berlin")[0] == 0
    first = (tmp_path / "site.toml").read_text()
    assert (tmp_path / "site.toml").stat().st_mode & 0o777 == 0o600
    (tmp_path / "manifest.csv").write_text("mine")
    assert "use --force" in sentence(run("site", "init", "berlin"))
    assert (tmp_path / "site.toml").read_text() == first
    status, out, err = run("site", "init", "berlin", "--force")
    assert status == 0
    second = (tmp_path / "site.toml").read_text()
    secrets = [
        line.split('"')[1] for t in (first, second) for line in t.splitlines() if "secret =" in line
    ]
    assert len(set(secrets)) == 2
    assert not any(secret in out + err for secret in secrets)
    assert (tmp_path / "site.toml").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "manifest.csv").read_text() == "mine"
    assert "needed lower-case" in sentence(run("site", "init", "St. Mary", "--force"))


def test_a_site_check_exits_by_what_it_found(run: Call, consortium: Path) -> None:
    status, out, _ = run("site", "check", "site-01", "--root", consortium)
    assert status == 0
    assert out.endswith(" inputs, 0 would be set aside\n")
    status, out, _ = run("site", "check", "site-01", "--root", consortium, "--json")
    assert (status, json.loads(out)) == (0, [])
    assert "found 2 (site-01, site-02), name one" in sentence(
        run("site", "check", "--root", consortium)
    )
    assert "found no rome" in sentence(run("site", "check", "rome", "--root", consortium))


def test_a_site_check_names_patient_and_reason(run: Call, tmp_path: Path) -> None:
    write_consortium(tmp_path, (8,), seed=0, tables_only=True)
    clinical = tmp_path / "site-01" / "clinical.csv"
    table = pd.read_csv(clinical, dtype=str)
    table.loc[0, "time_days"] = "-3"
    table.to_csv(clinical, index=False)
    status, out, _ = run("site", "check")
    assert status == 1
    assert f"{table.loc[0, 'patient_id']}  clinical  time_not_positive: time_days" in out
    status, out, _ = run("site", "check", "--json")
    assert status == 1
    assert [x["code"] for x in json.loads(out)] == ["time_not_positive"]
    clinical.unlink()
    assert sentence(run("site", "check"))


def test_a_simulation_is_written_once(run: Call, tmp_path: Path) -> None:
    arguments = ("simulate", tmp_path / "c", "--sites", "5,4", "--tables-only")
    status, out, _ = run(*arguments)
    assert (status, out.split(";")[0]) == (0, "9 patients at site-01, site-02")
    assert run(*arguments)[0] == 0
    assert "found one with other parameters" in sentence(run(*arguments, "--seed", "1"))
    (tmp_path / "file").touch()
    assert sentence(run("simulate", tmp_path / "file" / "c", "--sites", "5", "--tables-only"))


@pytest.mark.parametrize("sites", ["many", "0", "-3", "10,,10", "", "1e3"])
def test_sites_are_counts(run: Call, tmp_path: Path, sites: str) -> None:
    found = sentence(run("simulate", tmp_path / "c", f"--sites={sites}"))
    assert found == f"--sites: found {sites!r}, needed patients per site, as 160,110,90,40"
    assert not (tmp_path / "c").exists()


def test_seeds_need_tables(run: Call) -> None:
    assert sentence(run("demo", "--seeds", "3")).startswith("--seeds: found it without")


def test_one_site_has_nothing_to_federate(run: Call, tmp_path: Path) -> None:
    write_consortium(tmp_path, (8,), seed=0, tables_only=True)
    assert sentence(run("study", "run")).startswith("sites: found 1 below the folder, needed at")
    assert not (tmp_path / "prefect").exists()


def test_an_unknown_option_is_a_usage_error(run: Call) -> None:
    status, _, err = run("study", "check", "--nonsense")
    assert status == 2
    assert "Traceback" not in err


def test_a_table_is_extracted_alone(run: Call, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("patient_id,hb,wbc\np1,1,2\np2,x,3\np3,2,\n")
    status, out, _ = run("extract", "tabular", "t.csv", "--out", "f", "--columns", "hb,wbc")
    assert status == 0
    assert "set aside: p2: " in out
    assert "2 done, 1 set aside" in out
    assert sentence(run("extract", "tabular", "no.csv", "--out", "f"))
    found = sentence(run("extract", "tabular", "t.csv", "--out", "f", "--columns", "hb,hb"))
    assert found.startswith("--columns: needed distinct")


def test_a_registry_is_extracted_alone(run: Call, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text(
        "patient_id,event,time_days,age,sex\np1,1,9,50,f\np2,0,8,60,m\n"
    )
    options = ("--numeric", "age", "--categorical", "sex=f|m")
    status, out, _ = run("extract", "clinical", "r.csv", "--out", "f", *options)
    assert (status, "2 done, 0 set aside" in out) == (0, True)
    assert "needed COLUMN=" in sentence(
        run("extract", "clinical", "r.csv", "--out", "f", "--categorical", "sex")
    )
    assert "found none" in sentence(run("extract", "clinical", "r.csv", "--out", "f"))


def test_counts_are_extracted_alone(run: Call, tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(500, (4, 6)).astype(np.float32)
    names = pd.DataFrame(index=[f"G{i}" for i in range(6)])
    ids = pd.DataFrame(index=[f"p{i}" for i in range(4)])
    ad.AnnData(counts, obs=ids, var=names).write_h5ad(tmp_path / "rna.h5ad")
    (tmp_path / "sets.gmt").write_text("pathway\tabout\tG0\tG1\n")
    status, out, _ = run("extract", "omics", "rna.h5ad", "--out", "f", "--gene-sets", "sets.gmt")
    assert (status, "4 done, 0 set aside" in out) == (0, True)
    assert run("extract", "omics", "rna.h5ad", "--out", "g", "--panel", "G0,G3")[0] == 0
    assert "found none of" in sentence(run("extract", "omics", "rna.h5ad", "--out", "f"))
    (tmp_path / "bad.gmt").write_text("pathway G0\n")
    assert "separated by tabs" in sentence(
        run("extract", "omics", "rna.h5ad", "--out", "f", "--gene-sets", "bad.gmt")
    )
    assert sentence(run("extract", "omics", "sets.gmt", "--out", "f", "--panel", "G0"))


def test_a_scan_is_extracted_alone(run: Call, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sitk.WriteImage(sitk.GetImageFromArray(rng.normal(0, 9, (12, 12, 12))), "ct.nii.gz")
    region = np.zeros((12, 12, 12), np.uint8)
    region[3:9, 3:9, 3:9] = 1
    sitk.WriteImage(sitk.GetImageFromArray(region), "mask.nii.gz")
    options = ("--out", "f", "--spacing-mm", "as-acquired")
    status, out, _ = run("extract", "radiology", "ct.nii.gz", "--mask", "mask.nii.gz", *options)
    assert (status, "1 done, 0 set aside" in out) == (0, True)
    assert sentence(run("extract", "radiology", "ct.nii.gz", *options))
    status, out, _ = run("extract", "radiology", "ct.nii.gz", "--mask", "no.nii.gz", *options)
    assert "Traceback" not in out
    found = sentence(run("extract", "radiology", "ct.nii.gz", *options, "--spacing-mm", "2,2"))
    assert found.startswith("--spacing-mm")


def test_extracting_from_nothing_is_one_sentence(run: Call, tmp_path: Path) -> None:
    assert sentence(run("extract", "pathology", "slides", "--out", "f"))
    found = sentence(run("extract", "pathology", "slides", "--out", "f", "--tile-px", "3"))
    assert found.startswith("--tile-px: input should be greater")


SLOW_IMPORTS = """
import sys
sys.argv = ["consilium", *sys.argv[1:]]
try:
    from flows.cli import main
    main()
finally:
    slow = {"torch", "prefect", "mlflow", "scanpy", "SimpleITK", "timm"} & set(sys.modules)
    print("slow:", *sorted(slow))
"""


@pytest.mark.parametrize("arguments", [("--help",), ("extract", "--help"), ("site", "--help")])
def test_help_imports_nothing_slow(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SLOW_IMPORTS, *arguments],
        capture_output=True, text=True, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.endswith("slow:\n")
    assert "Usage" in done.stdout


@pytest.mark.slow
def test_too_small_sites_are_one_sentence(tmp_path: Path, consortium: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "study", "run", "--json",
         "--root", str(consortium)],
        capture_output=True, text=True, cwd=tmp_path, timeout=400, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("consilium: ")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_an_unknown_tile_encoder_is_one_sentence(run: Call, tmp_path: Path) -> None:
    run("study", "init", "lung-os")
    text = (tmp_path / "study.toml").read_text()
    (tmp_path / "study.toml").write_text(text.replace("tf_efficientnet_lite0", "resnet18x"))
    assert "modality.pathology.encoder: encoder: found 'resnet18x'" in sentence(
        run("study", "check")
    )
    found = sentence(run("extract", "pathology", ".", "--out", "f", "--encoder", "resnet18x"))
    assert "close names are resnet18" in found
