"""Sites on a disk, from the draft that a night leaves to what a coordinator hears of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from flows.gate import ANSWERED, own_limits
from flows.inputs import LocalEncoder, site_rows
from flows.loading import load_inputs
from flows.protocol import StudyProtocol, read_protocol
from flows.snapshots import COHORT
from fusion.federation import InProcess, SiteStudy, run_federation
from fusion.federation.answered import AnswerLedger
from fusion.keys import canonical_json, digest
from infra.settings import SiteSettings
from modalities.cohort import assemble, feature_table, write_cohort
from tests.consortium import Overheard, raise_

if TYPE_CHECKING:
    from pathlib import Path

    from flows.inputs import SiteInputs

CLINICAL, BLOOD = ("age", "weight"), ("hb", "crp", "wbc")


def protocol(*blood: str, **section: Any) -> StudyProtocol:
    """A study of a registry and a blood count whose encoders are made of sums."""
    return read_protocol(
        {
            "study": {
                "name": "small", "data": "simulated", "horizon_days": 730,
                "grid_days": [365, 730],
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": list(CLINICAL)},
                "blood": {"kind": "tabular", "columns": list(blood or BLOOD)},
            },
            "privacy": {"patients_per_input": 3},
        } | section
    )  # fmt: skip


def patients(n: int, seed: int, *, first: int = 0) -> pd.DataFrame:
    """One row per patient, indexed by pseudonym: outcome, split and every feature."""
    rng = np.random.default_rng([seed, first])
    ids = [f"p{seed}-{i:04d}" for i in range(first, first + n)]
    values = rng.normal(size=(n, len(CLINICAL) + len(BLOOD)))
    died = rng.exponential(500.0 * np.exp(-values @ np.linspace(0.4, 0.1, values.shape[1])))
    lost = rng.uniform(200.0, 1500.0, n)
    table = pd.DataFrame(values * 10.0 + 50.0, columns=[*CLINICAL, *BLOOD], index=pd.Index(ids))
    table.insert(0, "event", died <= lost)
    table.insert(1, "time_days", np.ceil(np.minimum(died, lost)))
    table.insert(2, "split", np.where(np.arange(first, first + n) % 4 == 3, "test", "train"))
    table.insert(3, "fold_unit", rng.random(n))
    return table


def settings_at(root: Path, site: str, **limits: int) -> SiteSettings:
    return SiteSettings(name=site, home=root / site, secret=site.ljust(32, "."), limits=limits)


def leave_draft(settings: SiteSettings, table: pd.DataFrame, study: StudyProtocol) -> None:
    """Write the cohort that preparing a site under this protocol leaves.

    Who has no value of a modality at all lacks it.
    """
    tables = {}
    for name in ("clinical", "blood"):
        names = list(study.feature_names(name))
        known = table[names].dropna(how="all")
        tables[name] = feature_table(
            list(known.index),
            names,
            known.to_numpy(),
            input_digests=[f"{name} of {x}: {row}" for x, row in known.T.to_dict().items()],
            spec_fingerprint=study.modality[name].fingerprint(),
        )
    outcome = table[["event", "time_days", "split", "fold_unit"]]
    cohort = assemble(tables, outcome, protocol_fingerprint=study.fingerprint())
    write_cohort(cohort, settings.path(COHORT))


def local_columns(inputs: SiteInputs) -> dict[str, LocalEncoder]:
    """What encoders that were trained long ago say of each patient: one of its values."""
    return {
        name: LocalEncoder(None, np.asarray(found.values)[:, 0] / 10.0)
        for name, found in inputs.modalities.items()
    }


def take_part(
    settings: SiteSettings, study: StudyProtocol, run: str, roster: tuple[str, ...]
) -> tuple[SiteStudy, AnswerLedger]:
    """Bring up a site's part in a run from its disk, as its gate does."""
    inputs = load_inputs(settings, study, roster=roster)
    ledger = AnswerLedger(settings.path(ANSWERED))
    book = ledger.open(digest(canonical_json([study.fingerprint(), inputs.cohort, roster])))
    rows = site_rows(inputs, local_columns(inputs), study)
    plan = study.plan(run, minimum=own_limits(settings, study))
    return SiteStudy(plan, rows, book=book, on_error=raise_), ledger


def listen(sites: dict[str, SiteSettings], study: StudyProtocol, run: str) -> Overheard:
    """Run a study over sites, keeping everything that the coordinator hears."""
    roster = tuple(sorted(sites))
    parts = {site: take_part(settings, study, run, roster) for site, settings in sites.items()}
    heard = Overheard(InProcess({site: part for site, (part, _) in parts.items()}))
    try:
        run_federation(study.plan(run), heard)
    finally:
        for _, ledger in parts.values():
            ledger.close()
    return heard
