"""A whole study without servers: tables in, fitted models and their comparison out.

For benchmarks and for repeating a comparison over many seeds; the statistics are the same code that
the flows run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from flows.inputs import site_inputs, site_rows, train_local
from flows.protocol import load_protocol
from flows.reference import Consortium, compare
from fusion.federation import InProcess, SiteStudy, run_federation
from modalities.clinical import read_registry
from modalities.cohort import assemble, assign_splits, keyed_unit, read_manifest
from modalities.files import fingerprint
from modalities.synthetic import read_truth
from modalities.tabular import TabularSpec, read_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flows.inputs import SiteInputs
    from flows.protocol import StudyProtocol
    from flows.records import Reference
    from fusion.federation import Fitted
    from infra.settings import SiteSettings, Workspace


def fit_in_memory(
    protocol: StudyProtocol, inputs: Mapping[str, SiteInputs]
) -> tuple[Consortium, Fitted]:
    """Train every site's encoders and run the federation over all sites in this process.

    Raises
    ------
    fusion.federation.QuorumNotMet
        If too few sites or patients remain.
    """
    local = {
        site: {
            name: train_local(found, name, protocol.encoder[name], seed=protocol.study.seed)
            for name in (protocol.modalities if found.trains else ())
        }
        for site, found in inputs.items()
    }
    plan = protocol.plan(fingerprint([protocol.fingerprint(), sorted(inputs)]))
    studies = {
        site: SiteStudy(plan, site_rows(found, local[site], protocol))
        for site, found in inputs.items()
    }
    fitted = run_federation(plan, InProcess(studies))
    return Consortium(protocol, inputs, studies, local), fitted


def run_in_memory(
    protocol: StudyProtocol,
    inputs: Mapping[str, SiteInputs],
    *,
    true_log_hazard: Mapping[str, Mapping[str, float]] | None = None,
) -> tuple[Fitted, Reference]:
    """Fit as :func:`fit_in_memory`, then compare the arms on the same test patients."""
    consortium, fitted = fit_in_memory(protocol, inputs)
    return fitted, compare(consortium, fitted, true_log_hazard=true_log_hazard)


def read_workspace(
    workspace: Workspace,
) -> tuple[StudyProtocol, dict[str, SiteInputs], Mapping[str, Mapping[str, float]]]:
    """Read a simulated consortium of tables: protocol, every site's inputs, the true hazards."""
    protocol = load_protocol(workspace.study_file)
    inputs = {site: read_tables(workspace.site(site), protocol) for site in workspace.site_names()}
    return protocol, inputs, read_truth(workspace.root).log_hazard


def read_tables(settings: SiteSettings, protocol: StudyProtocol) -> SiteInputs:
    """Read one site whose modalities are all tables, without writing a cohort."""
    registry, _ = read_registry(
        settings.path(settings.clinical),
        protocol.modality[protocol.clinical],  # type: ignore[arg-type]
    )
    tables = {protocol.clinical: registry.covariates}
    rows, _ = read_manifest(settings.path(settings.manifest), protocol.modalities)
    for name, spec in protocol.modality.items():
        if isinstance(spec, TabularSpec):
            found = {row.patient_id: row.path for row in rows if row.modality == name}
            if not found:
                continue
            table, _ = read_table(next(iter(found.values())), spec, modality=name)
            tables[name] = table[table.obs_names.isin(found)].copy()
    ids = list(registry.patient_ids)
    outcome = pd.DataFrame(
        {
            "event": np.asarray(registry.event, dtype=bool),
            "time_days": registry.time_days,
            "split": assign_splits(
                ids, secret=settings.key, test_fraction=protocol.study.test_fraction, known={}
            ),
            "fold_unit": [keyed_unit(settings.key, "fold", x) for x in ids],
        },
        index=pd.Index(ids, dtype=str),
    )
    cohort = assemble(tables, outcome, protocol_fingerprint=protocol.fingerprint())
    return site_inputs(
        cohort, protocol, site=settings.name, features=settings.home, secret=settings.key
    )
