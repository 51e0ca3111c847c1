"""A version's lineage: what it says, and that one changed byte of anything is found by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.lineage import LineageError, lineage_values, opened_lineage
from flows.lineage_check import FAULTS, Item, check_lineage
from flows.mlflow_store import client_of
from flows.model_signing import sign_model
from flows.protocol import load_protocol
from flows.provenance import read_provenance
from flows.site_registry import register_encoders
from flows.snapshots import withdraw
from fusion.keys import SigningKey
from infra.settings import Workspace
from tests.lineages import SITES, cohort_of, prepare, register, write_study

pytestmark = pytest.mark.border

NAME = "lung-os-fusion"
OTHER = SigningKey(b"o" * 32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a study with a registered version, made once."""
    root = tmp_path_factory.mktemp("made") / "study"
    workspace = write_study(root)
    protocol = load_protocol(workspace.study_file)
    for site in SITES:
        settings = workspace.site(site)
        assert register_encoders(settings, protocol, cohort_of(settings, protocol)) == 3
    register(workspace)
    return root


@pytest.fixture
def study(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy, to be harmed; MLflow's database still names the first folder."""
    monkeypatch.delenv("CONSILIUM_TRACKING_URI", raising=False)
    shutil.copytree(made, tmp_path / "copy")
    return Workspace(root=tmp_path / "copy")


def verify(study: Workspace) -> list[Item]:
    with opened_lineage(study) as found:
        return check_lineage(found)


def faults(study: Workspace) -> set[tuple[str, str, str]]:
    return {(x.party, x.name, x.state) for x in verify(study) if x.state in FAULTS}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def one(study: Workspace, pattern: str) -> Path:
    """First file of a pattern."""
    return sorted(study.root.glob(pattern))[0]


def test_a_whole_lineage_has_no_fault(study: Workspace) -> None:
    items = verify(study)
    assert [x for x in items if x.state in FAULTS] == []
    assert {x.party for x in items if x.state == "elsewhere"} == {"site-03", "site-04"}
    assert {(x.party, x.name) for x in items} >= {
        (site, name)
        for site in SITES
        for name in ("clinical", "cohort of this version, snapshot 1", "radiology: 1 file read")
    }


@pytest.mark.parametrize(
    ("pattern", "party", "named"),
    [
        ("study.toml", "coordinator", "study.toml"),
        ("artifacts/*/*/artifacts/encoders.json", "coordinator", "artifact encoders.json"),
        ("artifacts/*/*/artifacts/networks.json", "coordinator", "artifact networks.json"),
        ("artifacts/*/*/artifacts/protocol.json", "coordinator", "artifact protocol.json"),
        ("artifacts/*/*/artifacts/report.html", "coordinator", "artifact report.html"),
        ("artifacts/*/*/artifacts/figures/*.png", "coordinator", "artifact figures/"),
        ("artifacts/*/*/artifacts/lineage.json", "coordinator", "lineage.json"),
        ("artifacts/*/models/*/artifacts/MLmodel", "coordinator", "model: MLmodel"),
        ("artifacts/*/models/*/artifacts/artifacts/*", "coordinator", "model: artifacts/fusion"),
        ("artifacts/*/models/*/artifacts/*.py", "coordinator", "model: fusion_pyfunc.py"),
        ("artifacts/*/models/*/artifacts/signature.json", "coordinator", "model: signature"),
        ("runs/*/record.json", "coordinator", "record.json"),
        ("site-01/cohort.h5mu", "site-01", "cohort.h5mu"),
        ("site-02/snapshots/0001/cohort.h5mu", "site-02", "snapshots/0001/cohort.h5mu"),
        ("site-01/features/radiology.h5ad", "site-01", "features/radiology.h5ad"),
        ("site-01/radiology.csv", "site-01", "radiology: file 1 of 1"),
        ("site-02/pathology.csv", "site-02", "pathology: file 1 of 1"),
        ("site-01/encoders/radiology/*.safetensors", "site-01", "encoders/radiology/encoder"),
        ("site-01/encoders/clinical/log_hazard.npy", "site-01", "encoders/clinical/log_haz"),
        ("site-01/encoders/clinical/encoder.json", "site-01", "encoders/clinical/encoder.json"),
        ("site-02/runs/artifacts/*/models/*/artifacts/*.safetensors", "site-02", "lung-os-"),
        ("site-02/runs/artifacts/*/models/*/artifacts/README.md", "site-02", "lung-os-"),
        ("site-01/digests.json", "site-01", ""),
    ],
)
def test_one_changed_byte_is_found_by_name(
    study: Workspace, pattern: str, party: str, named: str
) -> None:
    flip(one(study, pattern))
    found = faults(study)
    assert [x for x in found if x[0] == party and named in x[1]], found
    assert {x[0] for x in found} == {party}


@pytest.mark.parametrize("at", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_it_does_not_matter_which_byte_of_a_cohort(study: Workspace, at: float) -> None:
    path = study.root / "site-01" / "cohort.h5mu"
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 0x40
    path.write_bytes(data)
    assert ("site-01", "cohort.h5mu", "changed") in faults(study)


def test_a_changed_outcome_in_the_registry_is_found(study: Workspace) -> None:
    path = study.root / "site-01" / "clinical.csv"
    table = pd.read_csv(path)
    table.loc[3, "time_days"] += 1
    table.to_csv(path, index=False)
    (item,) = [x for x in verify(study) if x.state in FAULTS]
    assert (item.party, item.name, item.state) == ("site-01", "clinical", "changed")
    assert item.why.startswith("1 row")


@pytest.mark.parametrize(
    ("pattern", "party", "named"),
    [
        ("artifacts/*/*/artifacts/lineage.json", "coordinator", "lineage.json"),
        ("artifacts/*/*/artifacts/encoders.json", "coordinator", "artifact encoders.json"),
        ("artifacts/*/models/*/artifacts/conda.yaml", "coordinator", "model: conda.yaml"),
        ("site-01/cohort.h5mu", "site-01", "cohort.h5mu"),
        ("site-01/radiology.csv", "site-01", "radiology: raw inputs"),
        ("site-01/digests.json", "site-01", "digests.json"),
    ],
)
def test_a_missing_file_is_found_by_name(
    study: Workspace, pattern: str, party: str, named: str
) -> None:
    one(study, pattern).unlink()
    items = [x for x in verify(study) if x.party == party and x.name == named]
    # A raw input that the site no longer has cannot be compared; anything else must be there.
    assert [x.state for x in items] == ["elsewhere" if "raw" in named else "missing"]


def test_an_added_file_in_the_model_is_found(study: Workspace) -> None:
    (one(study, "artifacts/*/models/*/artifacts/MLmodel").parent / "more.py").write_text("")
    assert faults(study) == {("coordinator", "model: more.py", "changed")}


def test_a_tag_that_somebody_edited_is_found(study: Workspace) -> None:
    client = client_of(study.mlflow_uri)
    client.set_model_version_tag(NAME, "1", "consilium.protocol", "0" * 64)
    named = "tag consilium.protocol of the version"
    assert faults(study) == {("coordinator", named, "changed")}


def test_somebody_else_cannot_sign_it_all_anew(study: Workspace) -> None:
    folder = one(study, "artifacts/*/models/*/artifacts/MLmodel").parent
    sign_model(folder, OTHER)
    assert ("coordinator", "model: signature.json", "changed") in faults(study)


def test_other_code_of_the_same_commit_is_found_and_another_release_is_not_judged(
    study: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.lineage_check.source_digest", lambda *_: "0" * 64)
    assert faults(study) == {("coordinator", "code", "changed")}
    monkeypatch.setattr("flows.lineage_check.git_commit", lambda: "1.0")
    assert faults(study) == set()


def test_a_site_that_prepares_again_without_news_stays_whole(study: Workspace) -> None:
    settings = study.site("site-01")
    prepare(settings, load_protocol(study.study_file))
    assert faults(study) == set()


def test_a_night_does_not_bless_what_was_changed_before_it(study: Workspace) -> None:
    settings = study.site("site-01")
    path = settings.path("features", "radiology.h5ad")
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0")

    old = settings.path("digests.json").stat().st_mtime_ns - 10**10
    os.utime(path, ns=(old, old))
    prepare(settings, load_protocol(study.study_file))
    assert ("site-01", "features/radiology.h5ad", "changed") in faults(study)


def test_a_study_that_got_another_name_is_the_changed_item(study: Workspace) -> None:
    path = study.study_file
    path.write_text(path.read_text().replace("lung-os", "lunh-os"))
    assert ("coordinator", "study.toml", "changed") in faults(study)


def test_a_site_alone_verifies_its_own_part(study: Workspace, tmp_path: Path) -> None:
    home = study.root / "site-01"
    shutil.copy(study.study_file, home / "study.toml")
    alone = Workspace(root=home)
    code, told = invoke(alone)
    assert code == 0
    assert "lung-os-radiology-encoder version 1" in told
    code, told = invoke(alone, "verify")
    assert code == 0, told
    flip(home / "encoders" / "clinical" / "encoder.safetensors")
    code, told = invoke(alone, "verify")
    assert code == 1
    assert "encoders/clinical/encoder.safetensors: changed" in told


def test_after_a_withdrawal_nothing_is_missed(study: Workspace) -> None:
    settings = study.site("site-01")
    withdraw(settings, "site-01-003")
    assert not list(settings.home.rglob("*.safetensors"))
    items = [x for x in verify(study) if x.party == "site-01"]
    assert [x for x in items if x.state in FAULTS] == []
    assert "a patient withdrew" in {x.why for x in items}


def test_the_tree_goes_back_to_the_inputs_and_names_no_file(study: Workspace) -> None:
    with opened_lineage(study) as found:
        values = lineage_values(found)
        assert found.aliases == ("candidate",)
    assert (values["model"], values["version"]) == (NAME, 1)
    assert len(values["lock"]) == len(values["code"]) == len(values["signed_by"]) == 64
    assert set(values["encoders"]) == {"clinical", "pathology", "radiology"}
    assert "local" in values["encoders"].values()
    sites = {x["site"]: x for x in values["sites"]}
    assert [x for x, of in sites.items() if of["here"]] == list(SITES)
    assert sites["site-04"]["role"] == "external"
    table = sites["site-01"]["modalities"]["radiology"]
    assert table["patients"] == 24
    assert len(table["inputs"]) == 1
    assert {x["version"] for x in sites["site-01"]["own_encoders"]} == {1}
    text = json.dumps(values)
    assert "site-01-0" not in text  # patients
    assert ".csv" not in text
    assert str(study.root) not in text


def test_what_is_signed_tells_only_what_may_leave(study: Workspace) -> None:
    path = one(study, "artifacts/*/*/artifacts/lineage.json")
    said = read_provenance(path)
    assert said.is_signed()
    assert set(said.cohorts) == {"site-01", "site-02", "site-03", "site-04"}
    protocol = load_protocol(study.study_file)
    assert said.cohorts["site-01"] == cohort_of(study.site("site-01"), protocol)
    assert "safetensors" not in path.read_text()


@pytest.mark.parametrize("model", [None, NAME, f"{NAME}@candidate", f"models:/{NAME}/1"])
def test_a_version_is_found_by_each_of_its_names(study: Workspace, model: str | None) -> None:
    with opened_lineage(study, model) as found:
        assert int(found.version.version) == 1


@pytest.mark.parametrize("model", ["other-fusion", f"{NAME}@champion", f"{NAME}/7", "a@b@c"])
def test_a_version_that_is_not_there_is_refused(study: Workspace, model: str) -> None:
    with pytest.raises(LineageError, match="model: found"), opened_lineage(study, model):
        raise AssertionError("unreachable")


def test_a_folder_without_a_registry_says_so(tmp_path: Path) -> None:
    with (
        pytest.raises(LineageError, match=r"found no mlflow\.db"),
        opened_lineage(Workspace(root=tmp_path)),
    ):
        raise AssertionError("unreachable")


def invoke(study: Workspace, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["lineage", *arguments, "--root", str(study.root)])
    return done.exit_code, done.output


def test_the_command_ends_with_1_and_names_what_changed(
    study: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", str(study.root))
    code, told = invoke(study)
    assert code == 0
    assert "snapshot 1" in told
    code, told = invoke(study, "verify", NAME)
    assert (code, "whole" in told) == (0, True)
    flip(study.root / "site-02" / "radiology.csv")
    code, told = invoke(study, "verify")
    assert code == 1
    assert "site-02: radiology: file 1 of 1 (radiology.csv): changed" in told
    code, told = invoke(study, "verify", "--json")
    values = json.loads(told)
    assert (code, values["whole"]) == (1, False)
    assert ".csv" not in told


@pytest.mark.slow
def test_the_demo_s_model_is_whole_until_a_byte_of_it_changes(tmp_path: Path) -> None:
    root = tmp_path / "demo"
    consilium = Path(sys.executable).with_name("consilium")

    def status(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [consilium, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        return done.returncode, done.stdout + done.stderr

    code, told = status("demo", "--tables-only", "--sites", "150,110,30", "--out", str(root))
    assert code == 0, told
    code, told = status("lineage", "verify", "--root", str(root))
    assert code == 0, told
    for pattern, named in (
        ("site-03/cohort.h5mu", "site-03: cohort.h5mu: changed"),
        ("site-01/encoders/radiology/encoder.safetensors", "encoder.safetensors: changed"),
        ("study.toml", "study.toml: changed"),
    ):
        path = next(root.glob(pattern))
        whole = path.read_bytes()
        flip(path)
        code, told = status("lineage", "verify", "--root", str(root))
        assert code == 1
        assert named in told
        path.write_bytes(whole)
