"""A withdrawn patient on a site's disk, from its raw files through its nights."""

from __future__ import annotations

import csv
import re
import shutil
from typing import TYPE_CHECKING

import anndata as ad
import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.demo import write_consortium
from flows.extraction import collect
from flows.protocol import load_protocol
from flows.site import ASSIGNMENTS, assemble_cohort, extract_site_batch, list_inputs
from flows.site import read_site_registry as read_site
from flows.site_turns import turn
from flows.snapshots import COHORT, record_run, released, withdraw
from flows.terminal import UsageError
from infra.settings import STUDY_FILE, Workspace
from modalities.cohort import DataError, Exclusion, read_cohort, write_exclusions

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

pytestmark = pytest.mark.border
SITE = "site-01"


def night(settings: SiteSettings, study: StudyProtocol) -> list[Exclusion]:
    """Prepare the site as the flow does, without its server."""
    registry, excluded = read_site.fn(settings, study)
    works, unlisted = list_inputs.fn(settings, study)
    for work in works:
        for at in range(len(work.pending)):
            excluded += extract_site_batch.fn(work, at, "")
    tables = {w.modality: table for w in works if (table := collect(w)) is not None}
    write_exclusions([*excluded, *unlisted], settings.path("excluded.csv"))
    assemble_cohort.fn(settings, study, registry, tables)
    return excluded


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small consortium of tables after its first night."""
    root = tmp_path_factory.mktemp("prepared") / "consortium"
    write_consortium(root, (60, 40), seed=5, tables_only=True)
    night(Workspace(root=root).site(SITE), load_protocol(root / STUDY_FILE))
    return root


@pytest.fixture
def root(prepared: Path, tmp_path: Path) -> Path:
    shutil.copytree(prepared, tmp_path / "consortium")
    return tmp_path / "consortium"


@pytest.fixture
def study(root: Path) -> StudyProtocol:
    return load_protocol(root / STUDY_FILE)


@pytest.fixture
def site(root: Path, study: StudyProtocol) -> SiteSettings:
    """With a snapshot that went into a run, and what the run left."""
    settings = Workspace(root=root).site(SITE)
    ids = list(read_cohort(settings.path(COHORT)).obs_names)
    for run in ("a" * 64, "b" * 64):
        table = settings.path("runs", run[:12], "patients.csv")
        table.parent.mkdir(parents=True)
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["patient_id", "log_hazard"], *([x, 0.1] for x in ids)])
    record_run(settings, released(settings, study).number, "a" * 64)
    return settings


@pytest.fixture
def patient(site: SiteSettings) -> str:
    """Somebody who has every modality."""
    cohort = read_cohort(site.path(COHORT))
    return next(x for x in cohort.obs_names if all(x in t.obs_names for t in cohort.mod.values()))


def files_with(settings: SiteSettings, patient_id: str) -> set[str]:
    """Files made by us that name a patient; those that we read are the hospital's own."""
    own = {settings.path(settings.manifest), settings.path(settings.clinical)}
    own |= set(settings.path("raw").rglob("*"))
    with settings.path(settings.manifest).open(newline="") as file:
        own |= {settings.path(row["path"]) for row in csv.DictReader(file)}
    found = [x for x in settings.home.rglob("*") if x.is_file() and x not in own]
    named = {x for x in found if patient_id in x.name or patient_id.encode() in x.read_bytes()}
    return {str(x.relative_to(settings.home)) for x in named}


def test_nothing_of_a_withdrawn_patients_features_or_risks_is_left(
    site: SiteSettings, patient: str
) -> None:
    before = files_with(site, patient)
    suffixes = {x.rpartition(".")[2] for x in before}
    assert {"h5mu", "h5ad", "csv"} <= suffixes
    assert len([x for x in before if x.startswith("runs/")]) == 2
    done = withdraw(site, patient)
    assert done.runs == ("a" * 64,)
    # Who was ever assigned to which split is no feature, and must stay for ever.
    assert files_with(site, patient) <= {ASSIGNMENTS, "excluded.csv"}


def test_every_night_afterwards_sets_the_patient_aside_as_withdrawn(
    site: SiteSettings, study: StudyProtocol, patient: str
) -> None:
    withdraw(site, patient)
    for path in (site.manifest, site.clinical):
        assert patient in site.path(path).read_text()  # the hospital's lists are its own
    for _ in range(2):
        excluded = night(site, study)
        reasons = {(x.modality, x.code) for x in excluded if x.patient_id == patient}
        assert reasons == {(study.clinical, "withdrawn")}
        assert patient not in read_cohort(site.path(COHORT)).obs_names
        assert files_with(site, patient) <= {ASSIGNMENTS, "excluded.csv"}
        with pytest.raises(DataError, match="found fewer than 10 patients who differ"):
            released(site, study)


def test_the_others_stay_as_they_were(
    site: SiteSettings, study: StudyProtocol, patient: str
) -> None:
    before = read_cohort(site.path(COHORT))
    withdraw(site, patient)
    night(site, study)
    after = read_cohort(site.path(COHORT))
    assert list(after.obs_names) == [x for x in before.obs_names if x != patient]
    kept = before.obs.loc[after.obs_names]
    for column in ("event", "time_days", "split", "fold_unit"):
        assert (after.obs[column] == kept[column]).all()
    for name, table in after.mod.items():
        was = before.mod[name][table.obs_names].X
        assert ((was == table.X) | (table.X != table.X)).all()


def test_a_patient_nobody_ever_listed_is_one_sentence(site: SiteSettings) -> None:
    with pytest.raises(DataError) as refusal:
        withdraw(site, "p-0000-of-nowhere")
    text = str(refusal.value)
    assert refusal.value.code == "unknown_patient"
    assert "nowhere" not in text
    assert text.count(".") == 0
    assert released(site, load_protocol(site.home.parent / STUDY_FILE)).number == 1


def consilium(*arguments: str, root: Path) -> Result:
    return CliRunner().invoke(app, ["site", *arguments, "--root", str(root)])


def test_the_command_withdraws_and_names_the_runs_that_the_patient_was_in(
    site: SiteSettings, root: Path, patient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", "")  # restored afterwards: commands set it
    done = consilium("withdraw", patient, "--site", SITE, root=root)
    assert done.exit_code == 0, done.output
    removed, run, waits = done.output.splitlines()
    assert re.fullmatch(r"withdrawn: [1-9]\d* files removed", removed)
    assert run == f"made with this patient among others: run {'a' * 12}"
    assert waits.startswith("this site takes part again when enough other patients")
    assert patient not in done.output
    assert files_with(site, patient) <= {ASSIGNMENTS, "excluded.csv"}
    again = consilium("withdraw", patient, "--site", SITE, root=root)
    assert (again.exit_code, again.output.splitlines()[0]) == (0, "withdrawn: 0 files removed")


def test_the_command_withdraws_nobody_whom_it_cannot_tell(
    site: SiteSettings, root: Path, patient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONSILIUM_ROOT", "")
    before = files_with(site, patient)
    unsaid = consilium("withdraw", patient, root=root)
    assert isinstance(unsaid.exception, UsageError)
    assert str(unsaid.exception).startswith("site: found 2 (site-01, site-02), name one")
    unknown = consilium("withdraw", "p-nowhere", "--site", SITE, root=root)
    assert isinstance(unknown.exception, DataError)
    assert unknown.output == ""
    assert files_with(site, patient) == before


def written_behind(settings: SiteSettings, patient_id: str) -> None:
    """Withdraw a patient while a night is at work, which then writes what it had read before."""
    files = [*settings.path("features").glob("*.h5ad"), settings.path(COHORT)]
    before = {file: file.read_bytes() for file in files}
    withdraw(settings, patient_id)
    for file, content in before.items():
        file.write_bytes(content)


def features_hold(settings: SiteSettings, patient_id: str) -> bool:
    tables = [ad.read_h5ad(file) for file in settings.path("features").glob("*.h5ad")]
    assert tables
    return any(patient_id in table.obs_names for table in tables)


def test_what_a_night_writes_behind_a_withdrawal_is_gone_when_it_ends(root: Path) -> None:
    settings = Workspace(root=root).site(SITE)
    patient_id = str(read_cohort(settings.path(COHORT)).obs_names[0])
    with turn(settings):
        written_behind(settings, patient_id)
        assert features_hold(settings, patient_id)
    assert not features_hold(settings, patient_id)
    assert not settings.path(COHORT).exists()


def test_what_a_killed_night_wrote_behind_a_withdrawal_is_gone_when_the_next_begins(
    root: Path,
) -> None:
    settings, study = Workspace(root=root).site(SITE), load_protocol(root / STUDY_FILE)
    patient_id = str(read_cohort(settings.path(COHORT)).obs_names[0])
    written_behind(settings, patient_id)
    with turn(settings):
        assert not features_hold(settings, patient_id)
        night(settings, study)
    # Dealt with once: what the night wrote stays.
    assert settings.path(COHORT).exists()
    with turn(settings):
        pass
    assert patient_id not in read_cohort(settings.path(COHORT)).obs_names
