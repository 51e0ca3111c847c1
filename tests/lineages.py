"""A small study on a disk, from raw tables to a signed version, without servers and training."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from flows.decisions import sign_decision
from flows.extraction import collect
from flows.gates import all_gates, all_pass
from flows.identity import identity
from flows.inputs import keyed_digest
from flows.loading import encoder_key
from flows.promotable import open_case
from flows.promotion import finish, record_gates, request_of, settle
from flows.protocol import load_protocol
from flows.registry import track_study
from flows.report_files import write_report
from flows.site import (
    assemble_cohort,
    extract_site_batch,
    list_inputs,
    read_site_registry,
)
from flows.site_digests import remember
from flows.snapshots import released
from flows.versions import git_commit
from fusion.federation.consortium import COORDINATOR
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.cohort import MANIFEST_COLUMNS, read_cohort_digest
from tests.simulated_record import MODALITIES, full_record

if TYPE_CHECKING:
    from pathlib import Path

    from flows.protocol import StudyProtocol
    from flows.records import StudyRecord
    from infra.settings import SiteSettings

SITES = ("site-01", "site-02")
STUDY = """\
# A study of tables.
[study]
name = "lung-os"
data = "simulated"
horizon_days = 1095
grid_days = [365, 730, 1095, 1825]

[modality.clinical]
kind = "clinical"
numeric = ["age"]

[modality.clinical.categorical]
sex = ["female", "male"]
therapy = ["surgery", "both"]

[modality.pathology]
kind = "tabular"
columns = ["p0", "p1"]

[modality.radiology]
kind = "tabular"
columns = ["volume", "entropy"]

[evaluation]
treatment = "therapy"
leave_one_site_out = true

[evaluation.subgroups]
sex = []
age = [60.5]

[privacy]
cell = 1
"""


def write_study(root: Path, sites: tuple[str, ...] = SITES) -> Workspace:
    """Write a study with sites that prepared, and trained encoders of their own."""
    root.mkdir(parents=True, exist_ok=True)
    (root / STUDY_FILE).write_text(STUDY)
    workspace = Workspace(root=root, tracking_uri=None)
    protocol = load_protocol(workspace.study_file)
    for number, site in enumerate(sites):
        write_raw(root / site, site, seed=number)
        settings = workspace.site(site)
        prepare(settings, protocol)
        leave_encoders(settings, protocol)
    return workspace


def write_raw(home: Path, site: str, *, seed: int, n: int = 24) -> None:
    """Write a site's settings, registry, tables and manifest."""
    rng = np.random.default_rng(seed)
    home.mkdir()
    (home / SITE_FILE).write_text(f'name = "{site}"\nsecret = "{site.ljust(32, "x")}"\n')
    ids = [f"{site}-{i:03d}" for i in range(n)]
    registry = pd.DataFrame({"patient_id": ids})
    registry["time_days"] = rng.integers(30, 2000, n)
    registry["event"] = rng.integers(0, 2, n)
    registry["age"] = rng.integers(40, 80, n)
    registry["sex"] = rng.choice(["female", "male"], n)
    registry["therapy"] = rng.choice(["surgery", "both"], n)
    registry.to_csv(home / "clinical.csv", index=False)
    rows = []
    for name, columns in (("pathology", ["p0", "p1"]), ("radiology", ["volume", "entropy"])):
        table = pd.DataFrame(rng.normal(size=(n, 2)).round(3), columns=columns)
        table.insert(0, "patient_id", ids)
        table.to_csv(home / f"{name}.csv", index=False)
        rows += [(x, name, f"{name}.csv", "", "") for x in ids]
    manifest = pd.DataFrame(rows, columns=list(MANIFEST_COLUMNS))
    manifest.to_csv(home / "manifest.csv", index=False)


def prepare(settings: SiteSettings, protocol: StudyProtocol) -> None:
    """Do what a night does, without Prefect."""
    registry, _ = read_site_registry.fn(settings, protocol)
    works, _ = list_inputs.fn(settings, protocol)
    for work in works:
        for at in range(len(work.pending)):
            assert not extract_site_batch.fn(work, at, "")
    tables = {work.modality: table for work in works if (table := collect(work)) is not None}
    assert assemble_cohort.fn(settings, protocol, registry, tables) > 0


def cohort_of(settings: SiteSettings, protocol: StudyProtocol) -> str:
    """Keyed digest of the site's snapshot."""
    return keyed_digest(settings.key, read_cohort_digest(released(settings, protocol).cohort))


def leave_encoders(settings: SiteSettings, protocol: StudyProtocol) -> str:
    """Write what training leaves, with made-up weights; give the cohort's keyed digest."""
    cohort = cohort_of(settings, protocol)
    for modality in protocol.modalities:
        folder = settings.path("encoders", modality)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "log_hazard.npy", np.zeros(3))
        (folder / "encoder.safetensors").write_bytes(f"{settings.name} {modality}".encode() * 9)
        tried = [{"model": "linear", "loss_by_step": [[0, 1.5], [1, 1.25]]}]
        (folder / "training_curve.json").write_text(json.dumps({"tried": tried}))
        key = encoder_key(cohort, protocol, modality)
        about = {"key": key, "reason": "", "trained": True}
        (folder / "encoder.json").write_text(json.dumps(about))
        remember(settings, folder.iterdir())
    return cohort


def record_over(workspace: Workspace) -> StudyRecord:
    """Give a made-up record whose sites and protocol are those of the folder."""
    record = full_record()
    protocol = load_protocol(workspace.study_file)
    assert set(protocol.modalities) == set(MODALITIES)
    sites = tuple(
        dataclasses.replace(site, cohort=cohort_of(workspace.site(site.site), protocol))
        if site.site in SITES
        else site
        for site in record.fitted.sites
    )
    fitted = dataclasses.replace(record.fitted, sites=sites)
    return dataclasses.replace(record, protocol=protocol, fitted=fitted, code_version=git_commit())


def promote(workspace: Workspace) -> None:
    """Let the version pass its gates and a person approve it, without Prefect."""
    case = open_case(workspace, "lung-os", 1)
    results = all_gates(case.given)
    assert all_pass(results), [x.sentence for x in results if x.passed is False]
    record_gates.fn(workspace, case, results)
    request = request_of(case, results, flow_run="f0e1d2c3-0000-4000-8000-000000000001")
    key = identity(workspace.root / COORDINATOR)
    found = settle(request, workspace, ask=lambda *_: sign_decision(request, "approve", key))
    finish.fn(workspace, case, request, found)


def register(workspace: Workspace) -> None:
    """Write the run's folder, and register its model."""
    record = record_over(workspace)
    created = pd.Timestamp("2026-03-01T12:00:00Z").to_pydatetime()
    report = write_report(record, workspace.root / "runs" / record.run[:12], created=created)
    track_study(
        record,
        tracking_uri=workspace.mlflow_uri,
        artifact_root=workspace.root / "artifacts",
        report=report,
        key=identity(workspace.root / COORDINATOR),
        study_file=workspace.study_file,
    )
