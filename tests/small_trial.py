"""A small trial on disk, run to a registered and signed model: what a site scores patients with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flows.identity import identity
from flows.links import InMemory
from flows.loading import load_inputs
from flows.patients import patient_table, write_patient_table
from flows.protocol import load_protocol
from flows.records import StudyRecord
from flows.registry import Registered, track_study
from flows.site import train_site_encoder
from flows.snapshots import COHORT
from fusion.federation import PROTOCOL, run_federation, summarise
from fusion.federation.consortium import COORDINATOR
from infra.settings import SITE_FILE, STUDY_FILE, Workspace
from modalities.cohort import assemble, feature_table, write_cohort
from modalities.pathology.bags import Bag, write_bag

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mudata import MuData

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

STUDY = """
[study]
name = "small"
endpoint = "overall survival"
data = "simulated"
horizon_days = 730
grid_days = [365, 730, 1095]

[modality.clinical]
kind = "clinical"
numeric = ["age"]
categorical = { treatment = ["a", "b"] }
[modality.blood]
kind = "tabular"
columns = ["hb", "crp", "wbc"]
[modality.gait]
kind = "tabular"
columns = ["speed", "sway"]
[modality.slides]
kind = "pathology"

[encoder.clinical]
ridge = 0.1
[encoder.blood]
model = "linear"
sharing = "sums"
ridge = 0.1
[encoder.gait]
model = "linear"
sharing = "local"
ridge = 0.1
[encoder.slides]
model = "gated_attention"
sharing = "local"
ridge = 0.1
n_components = 4
hidden = 4
max_steps = 10
inner_folds = 2

[fusion]
ridge = 0.01
folds = 2

[privacy]
patients = 20
events = 8
test_events = 4
cell = 1
patients_per_input = 2
pooled_patients = 40
snapshot = 10
"""
SITES = {"site-01": 90, "site-02": 70, "site-03": 14}
DIM = 12


def settings_at(root: Path, site: str) -> SiteSettings:
    return Workspace(root=root).site(site)


def patients(site: int, n: int, *, first: int = 0) -> pd.DataFrame:
    """Rows indexed by pseudonym: outcome, split, every value; NaN where a modality is absent."""
    rng = np.random.default_rng([site, first])
    names = ["age", "treatment=b", "hb", "crp", "wbc", "speed", "sway", "tile"]
    values = rng.normal(size=(n, len(names)))
    values[:, 1] = values[:, 1] > 0.4
    hazard = values @ np.array([0.5, 0.3, 0.4, 0.4, 0.0, 0.5, 0.0, 0.5])
    died, lost = rng.exponential(600 * np.exp(-hazard)), rng.uniform(300, 1800, n)
    for columns in (slice(2, 5), slice(5, 7), slice(7, 8)):
        values[rng.random(n) < 0.2, columns] = np.nan
    values[:, :7] = values[:, :7] * 3.0 + site  # every site has a level of its own
    values[:, 1] = (values[:, 1] - site) / 3.0
    ids = [f"p{site}-{i:03d}" for i in range(first, first + n)]
    table = pd.DataFrame(values, columns=names, index=pd.Index(ids))
    table["event"], table["time_days"] = died <= lost, np.ceil(np.minimum(died, lost))
    table["split"] = np.where(np.arange(n) % 4 == 3, "test", "train")
    table["fold_unit"] = rng.random(n)
    return table


def cohort_of(table: pd.DataFrame, study: StudyProtocol, features: Path) -> MuData:
    """Join the rows as a site does; bags of tiles are written below ``features``."""
    tables = {}
    for name in ("clinical", "blood", "gait"):
        names = list(study.feature_names(name))
        known = table[names].dropna(how="all")
        if len(known):
            tables[name] = feature_table(
                list(known.index), names, known.to_numpy(),
                input_digests=[f"{name} {x} {row}" for x, row in known.T.to_dict().items()],
                spec_fingerprint=study.modality[name].fingerprint(),
            )  # fmt: skip
    tiles = table["tile"].dropna()
    if len(tiles):
        tables["slides"] = feature_table(
            list(tiles.index), ["n_tiles"], np.full((len(tiles), 1), 12.0),
            input_digests=[f"slide {x} {v}" for x, v in tiles.items()],
            spec_fingerprint=study.modality["slides"].fingerprint(),
        )  # fmt: skip
        tables["slides"].obs["bag"] = [_bag(features, x, v) for x, v in tiles.items()]
    outcome = table[["event", "time_days", "split", "fold_unit"]]
    return assemble(tables, outcome, protocol_fingerprint=study.fingerprint())


def _bag(features: Path, patient: object, level: float) -> str:
    reference = f"slides/{patient}-0123abcd.h5"
    rng = np.random.default_rng(int(1e6 * abs(level)))
    tiles = rng.normal(size=(12, DIM))
    tiles[:, 0] = 3.0 * level + rng.normal(size=12)
    coords = np.array([(x * 512, y * 512) for x in range(4) for y in range(3)], dtype=np.int64)
    about: dict[str, Any] = {"patch_size_level0": 512}
    bag = Bag(coords, tiles.astype(np.float32))
    write_bag(features / reference, bag, coords_attrs=about, file_attrs={})
    return reference


def prepare(root: Path, sites: Mapping[str, int] = SITES) -> StudyProtocol:
    """Write study and sites, each with its cohort and its own encoders."""
    (root / STUDY_FILE).write_text(STUDY)
    study = load_protocol(root / STUDY_FILE)
    for number, (site, n) in enumerate(sites.items(), start=1):
        (root / site).mkdir()
        (root / site / SITE_FILE).write_text(f'name = "{site}"\nsecret = "{site:.<40}"\n')
        (root / site / "manifest.csv").write_text("patient_id,modality,path\n")
        settings = settings_at(root, site)
        table = patients(number, n)
        write_cohort(cohort_of(table, study, settings.path("features")), settings.path(COHORT))
        _train(settings, study)
    return study


def _train(settings: SiteSettings, study: StudyProtocol) -> None:
    inputs = load_inputs(settings, study)
    for name in ("gait", "slides") if inputs.trains else ():  # the consortium fits the others
        assert train_site_encoder.fn(settings, study, inputs, name) == ""


def run(root: Path) -> Registered:
    """Run the study over all sites in this process, as the flow does, and register its model."""
    workspace = Workspace(root=root)
    study = load_protocol(workspace.study_file)
    link = InMemory(workspace, study, tuple(SITES))
    key = link.run_key()
    plan = study.plan(key)
    link.open(plan)
    fitted = run_federation(plan, link)
    consortium = link.consortium()
    assert consortium is not None
    for site, part in consortium.studies.items():
        table = patient_table(
            consortium.inputs[site], part, fitted.models[PROTOCOL],
            horizon_days=plan.horizon_days,
        )  # fmt: skip
        target = workspace.site(site).path("runs", key[:12], "patients.csv")
        write_patient_table(table, target)
    record = StudyRecord(key, study, fitted, summarise(fitted), "c0ffee" * 6 + "c0de")
    return track_study(
        record,
        tracking_uri=workspace.mlflow_uri,
        artifact_root=root / "artifacts",
        key=identity(root / COORDINATOR),
    )
