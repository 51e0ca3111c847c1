"""What a site is told of its own state, from its disk alone."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from flows import standing
from flows.cli import main
from flows.demo import write_consortium
from flows.extraction import collect
from flows.loading import encoder_parts
from flows.nights import Night, read_night, write_night
from flows.protocol import load_protocol
from flows.serve import Services
from flows.services import ServiceError
from flows.site import _keep, assemble_cohort, extract_site_batch, list_inputs
from flows.site import read_site_registry as read_site
from flows.site_status import encoder_states, modality_states, site_status
from flows.snapshots import released, withdraw
from infra.settings import STUDY_FILE, Workspace
from modalities.cohort import DataError, write_exclusions

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flows.protocol import StudyProtocol
    from flows.site_status import ModalityStatus
    from infra.settings import SiteSettings

SITE, N = "site-01", 60


def night(settings: SiteSettings, study: StudyProtocol) -> None:
    """Prepare the site as the flow does, without its server."""
    registry, excluded = read_site.fn(settings, study)
    works, unlisted = list_inputs.fn(settings, study)
    for work in works:
        excluded += work.faults
        for at in range(len(work.pending)):
            excluded += extract_site_batch.fn(work, at, "")
    tables = {w.modality: table for w in works if (table := collect(w)) is not None}
    write_exclusions([*excluded, *unlisted], settings.path("excluded.csv"))
    assemble_cohort.fn(settings, study, registry, tables)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written") / "consortium"
    write_consortium(root, (N, 40), seed=5, tables_only=True)
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """Tables of a site that nobody prepared yet."""
    return shutil.copytree(written, tmp_path / "consortium")


@pytest.fixture
def site(root: Path) -> SiteSettings:
    return Workspace(root=root).site(SITE)


@pytest.fixture
def study(root: Path) -> StudyProtocol:
    return load_protocol(root / STUDY_FILE)


def counts(state: ModalityStatus) -> tuple[int, int, dict[str, int], int]:
    return state.done, state.pending, dict(state.changed), len(state.excluded)


def listed(site: SiteSettings, modality: str) -> int:
    manifest = pd.read_csv(site.path("manifest.csv"), dtype=str)
    return int((manifest["modality"] == modality).sum())


def rewrite(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    change(table).to_csv(path, index=False)
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_before_and_after_the_first_night(site: SiteSettings, study: StudyProtocol) -> None:
    before = modality_states(site, study)
    assert list(before) == list(study.modalities)
    for name, state in before.items():
        n = N if name == "clinical" else listed(site, name)
        assert counts(state) == (0, n, {}, 0)
    night(site, study)
    for name, state in modality_states(site, study).items():
        n = N if name == "clinical" else listed(site, name)
        assert counts(state) == (n, 0, {}, 0)


def test_looking_changes_nothing_and_reads_no_input(
    site: SiteSettings, study: StudyProtocol, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(site, study)
    rewrite(site.path("omics.csv"), lambda table: table.iloc[1:])

    def fail(*_: Any) -> str:
        raise AssertionError("an input was read")

    monkeypatch.setattr("flows.extraction._digest", fail)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    site_status(root, site, study, modality_states(site, study))
    after = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert before == after


def test_a_changed_input_a_new_patient_and_another_program_are_told_apart(
    site: SiteSettings, study: StudyProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(site, study)
    n = {name: listed(site, name) for name in ("omics", "radiology", "pathology")}
    rewrite(site.path("omics.csv"), lambda table: table.iloc[::-1])
    newcomer = {"patient_id": "new", "modality": "radiology", "path": "radiology.csv"}
    rewrite(
        site.path("manifest.csv"), lambda t: pd.concat([t, pd.DataFrame([newcomer])]).fillna("")
    )
    states = modality_states(site, study)
    assert counts(states["omics"]) == (0, 0, {"input": n["omics"]}, 0)
    assert counts(states["radiology"]) == (n["radiology"], 1, {}, 0)
    assert counts(states["pathology"]) == (n["pathology"], 0, {}, 0)
    assert [one["code"] for one in states["clinical"].by_code()] == ["no_registry_row"]
    monkeypatch.setattr("flows.extraction_keys.code_version", lambda _: "e" * 64)
    states = modality_states(site, study)
    assert counts(states["pathology"]) == (0, 0, {"code": n["pathology"]}, 0)


def test_who_was_set_aside_is_told_with_the_reason_until_the_input_changes(
    site: SiteSettings, study: StudyProtocol
) -> None:
    omics = pd.read_csv(site.path("omics.csv"), dtype=str)["patient_id"]
    rewrite(site.path("omics.csv"), lambda table: table.iloc[3:])
    rewrite(site.path("clinical.csv"), lambda t: t.assign(time_days=["-5", *t["time_days"][1:]]))
    night(site, study)
    states = modality_states(site, study)
    assert counts(states["omics"]) == (len(omics) - 3, 0, {}, 3)
    assert {one.patient_id for one in states["omics"].excluded} == set(omics[:3])
    found = states["omics"].by_code()
    assert [(x["code"], x["n"]) for x in found] == [("missing_in_file", 3)]
    assert found[0]["reason"] == "the table has no row for this patient"
    assert counts(states["clinical"]) == (N - 1, 0, {}, 1)
    rewrite(site.path("omics.csv"), lambda table: table.iloc[1:])
    assert counts(modality_states(site, study)["omics"])[1:] == (3, {"input": len(omics) - 3}, 0)


def test_a_withdrawn_patient_waits_for_nothing(site: SiteSettings, study: StudyProtocol) -> None:
    night(site, study)
    released(site, study)
    who = pd.read_csv(site.path("clinical.csv"), dtype=str)["patient_id"][0]
    withdraw(site, who)
    states = modality_states(site, study)
    assert [e.patient_id for e in states["clinical"].excluded] == [who]
    assert states["clinical"].by_code()[0]["code"] == "withdrawn"
    assert all(state.pending == 0 for x, state in states.items() if x != "clinical")


def test_an_encoder_says_what_made_it_stale(
    site: SiteSettings, study: StudyProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    night(site, study)
    assert encoder_states(site, study, snapshot=0)["omics"]["state"] == "none"
    snapshot = released(site, study)
    from flows.inputs import LocalEncoder
    from flows.loading import load_inputs

    inputs = load_inputs(site, study)
    about = {"key": "k", "made_from": encoder_parts(inputs.cohort, study)}
    left_out = LocalEncoder(None, inputs.modalities["omics"].values[:, 0], "too few events")
    _keep(site.path("encoders", "omics"), about, left_out)

    def state(study: StudyProtocol = study) -> dict[str, Any]:
        return encoder_states(site, study, snapshot=snapshot.number)["omics"]

    assert state() == {"state": "left out", "why": ["too few events"]}
    other = study.model_copy(update={"study": study.study.model_copy(update={"seed": 9})})
    assert state(other) == {"state": "stale", "why": ["the study changed"]}
    monkeypatch.setattr("flows.loading.source_digest", lambda *_: "e" * 64)
    assert state() == {"state": "stale", "why": ["this program changed"]}
    assert encoder_states(site, study, snapshot=7)["omics"]["why"] == [
        "the released cohort changed", "this program changed",
    ]  # fmt: skip


def test_the_last_night_is_kept_as_counts(site: SiteSettings) -> None:
    assert read_night(site) is None
    last = Night("2026-01-01T01:00:00+00:00", "2026-01-01T02:00:00+00:00", 60, 5, 1)
    write_night(site, last)
    assert read_night(site) == last
    site.path("last_night.json").write_text("{")
    assert read_night(site) is None


def test_a_budget_is_counted_down(site: SiteSettings, study: StudyProtocol) -> None:
    assert standing.budget(site, study) is None
    given = study.differential_privacy.model_copy(update={"epsilon": 3.0})
    private = study.model_copy(update={"differential_privacy": given})
    assert standing.budget(site, private) == {"epsilon": 3.0, "spent": 0.0, "left": 3.0}
    assert not site.path("privacy.jsonl").exists()
    site.path("privacy.jsonl").write_text("damaged\n")
    assert "fault" in (standing.budget(site, private) or {})


def test_damage_is_a_sentence_of_its_own_part(
    root: Path, site: SiteSettings, study: StudyProtocol
) -> None:
    night(site, study)
    released(site, study)
    site.path("snapshots", "ledger.json").write_text("{")
    site.path("approvals").mkdir()
    site.path("approvals", "site-01.json").write_text("{")
    with pytest.raises(DataError, match="restore it from a backup"):
        modality_states(site, study)  # nobody knows who was withdrawn
    shutil.rmtree(site.path("snapshots"))
    found = site_status(root, site, study, modality_states(site, study))
    assert found["approval"]["signed"] is False
    assert len(found["approval"]["why"]) == 1
    (root / "kits" / SITE).mkdir(parents=True)
    found = site_status(root, site, study, modality_states(site, study))
    assert found["certificates"][0]["days_left"] is None


class _Api:
    """A Prefect server with two deployments, one of them scheduled twice."""

    def __init__(self, *_: Any) -> None:
        pass

    def post(self, path: str, body: Any) -> Any:
        del body
        if path == "/deployments/filter":
            return [{"id": "a", "name": "prepare-site"}, {"id": "b", "name": "check-data"}]
        times = [("a", "2026-01-02"), ("a", "2026-01-03"), (None, "2026-01-01")]
        return [{"deployment_id": x, "expected_start_time": when} for x, when in times]


def test_the_next_runs_are_those_of_the_running_services(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert standing.next_runs(tmp_path) == {"services": "not running", "runs": {}}
    services = Services("http://127.0.0.1:1/api", None, "", "consilium", 1, "")
    monkeypatch.setattr(standing, "running", lambda _: services)
    monkeypatch.setattr("flows.prefect_api.PrefectApi", _Api)
    assert standing.next_runs(tmp_path)["runs"] == {"prepare-site": "2026-01-02"}

    def fail(*_: Any) -> None:
        raise ServiceError("Prefect server: found no answer")

    monkeypatch.setattr(_Api, "post", fail)
    assert standing.next_runs(tmp_path)["services"] == "Prefect server: found no answer"


def test_the_command_names_patients_only_where_asked(
    root: Path, site: SiteSettings, study: StudyProtocol,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rewrite(site.path("omics.csv"), lambda table: table.iloc[1:])
    night(site, study)
    who = modality_states(site, study)["omics"].excluded[0].patient_id
    monkeypatch.setenv("CONSILIUM_ROOT", str(root))

    def call(*options: str) -> str:
        command = ["consilium", "site", "status", SITE, "--root", str(root), *options]
        monkeypatch.setattr(sys, "argv", command)
        with suppress(SystemExit):
            main()
        return capsys.readouterr().out

    page = call()
    assert "missing_in_file: the table has no row for this patient" in page
    assert "run `consilium site prepare`" in page
    found = json.loads(call("--json"))
    assert found["modalities"]["omics"]["excluded"][0]["n"] == 1
    assert who not in page
    assert who not in json.dumps(found)
    assert f"{who}  omics  missing_in_file" in call("--patients")
    assert json.loads(call("--json", "--patients"))["patients"][0]["patient_id"] == who


def test_the_command_needs_no_server_and_no_slow_import(root: Path) -> None:
    import subprocess

    code = (
        "import sys\n"
        f"sys.argv = ['consilium', 'site', 'status', '{SITE}', '--root', {str(root)!r}, '--json']\n"
        "from flows.cli import app\n"
        "app(standalone_mode=False)\n"
        "print([x for x in ('prefect', 'mlflow', 'torch', 'timm') if x in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "[]"
