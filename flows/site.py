"""The flows of one site: raw inputs to a cohort, and the cohort to encoders that stay here.

Flows know the study and the site by name only, because parameters reach Prefect's server; what
tasks are given and return stays in this process.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event
from prefect.task_runners import ThreadPoolTaskRunner

from flows.check import without_registry
from flows.described import Slug, described
from flows.embedding import ONE_SLIDE, Means, means_of
from flows.extraction import Ledger, ModalityWork, collect, extract_batch, plan_modality
from flows.inputs import keyed_digest, train_local
from flows.loading import about_encoder, encoder_key, encoder_parts, load_inputs
from flows.nights import Night, write_night
from flows.progress import Progress
from flows.protocol import load_protocol
from flows.sealed import log_to, may_pass, sealed
from flows.site_digests import begin_draft, remember, remember_draft
from flows.site_registry import register_encoders, unregistered
from flows.site_turns import in_turn
from flows.skips import is_deployed
from flows.snapshots import ASSIGNMENTS, COHORT, is_withdrawn, released, snapshot_state
from infra.settings import SiteSettings, Workspace
from modalities.clinical import read_registry
from modalities.cohort import (
    Exclusion,
    assemble,
    assign_splits,
    keyed_unit,
    read_cohort_digest,
    read_manifest,
    write_cohort,
    write_exclusions,
)
from modalities.files import replacing, sweep

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from anndata import AnnData

    from flows.inputs import LocalEncoder, SiteInputs
    from flows.protocol import StudyProtocol
    from modalities.clinical import Registry

EXCLUDED = "excluded.csv"


@dataclass(frozen=True)
class Prepared:
    """Counts of a prepared cohort."""

    site: str
    n_patients: int
    n_excluded: int
    n_extracted: int


def open_site(study: str, site: str) -> tuple[SiteSettings, StudyProtocol]:
    """Find a site's settings and the study's protocol by name, through the workspace.

    Raises
    ------
    infra.settings.SettingsError, flows.protocol.ProtocolError
        If either cannot be read.
    ValueError
        If the workspace holds another study.
    """
    workspace = Workspace()
    protocol = load_protocol(workspace.study_file)
    if protocol.study.name != study:
        raise ValueError(f"study: found {protocol.study.name} in study.toml, needed {study}")
    settings = workspace.site(site)
    log_to(settings.home)
    return settings, protocol


@task(
    name="read-registry", retries=2, retry_delay_seconds=2, retry_condition_fn=may_pass,
    cache_policy=NO_CACHE, persist_result=False,
)  # fmt: skip
@sealed
def read_site_registry(
    settings: SiteSettings, protocol: StudyProtocol
) -> tuple[Registry, list[Exclusion]]:
    """Read covariates and outcome; rows that cannot be used are set aside."""
    spec = protocol.modality[protocol.clinical]
    registry, excluded = read_registry(settings.path(settings.clinical), spec)  # type: ignore[arg-type]
    withdrawn = is_withdrawn(settings, registry.patient_ids)
    excluded += [
        Exclusion(x, protocol.clinical, "withdrawn", "the patient was withdrawn")
        for x, gone in withdrawn.items()
        if gone
    ]
    return registry.without({x for x, gone in withdrawn.items() if gone}), excluded


@task(
    name="list-inputs", retries=2, retry_delay_seconds=2, retry_condition_fn=may_pass,
    cache_policy=NO_CACHE, persist_result=False,
)  # fmt: skip
@sealed
def list_inputs(
    settings: SiteSettings, protocol: StudyProtocol
) -> tuple[list[ModalityWork], list[Exclusion]]:
    """Read the manifest and find what is new or changed since the last time."""
    names = [x for x in protocol.modalities if x != protocol.clinical]
    rows, exclusions = read_manifest(settings.path(settings.manifest), names)
    withdrawn = is_withdrawn(settings, {row.patient_id for row in rows})
    rows = [row for row in rows if not withdrawn[row.patient_id]]
    sweep(settings.path("features"))
    begin_draft(settings)
    ledger = Ledger(settings.path("features", "digests.json"))
    works = [
        plan_modality(
            name,
            protocol.modality[name],
            [row for row in rows if row.modality == name],
            features=settings.path("features"),
            ledger=ledger,
            secret=settings.key,
            batch_size=settings.batch_size,
        )
        for name in names
    ]
    ledger.save()
    return works, exclusions


@task(
    name="extract-batch", task_run_name="{label}", retries=2, retry_delay_seconds=5,
    retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False,
)  # fmt: skip
@sealed
def extract_site_batch(
    work: ModalityWork, at: int, label: str, means: Means = ONE_SLIDE
) -> list[Exclusion]:
    """Extract one batch of one modality; ``label`` names modality and batch, no patient."""
    del label
    return extract_batch(work.pending[at], work.spec, work.features, means=means)


@task(name="assemble-cohort", cache_policy=NO_CACHE, persist_result=False)
@sealed
def assemble_cohort(
    settings: SiteSettings,
    protocol: StudyProtocol,
    registry: Registry,
    tables: Mapping[str, AnnData],
) -> int:
    """Join all modalities into ``cohort.h5mu``, assign new patients, and return the count."""
    ids = list(registry.patient_ids)
    splits = _assign(settings, ids, protocol)
    outcome = pd.DataFrame(
        {
            "event": np.asarray(registry.event, dtype=bool),
            "time_days": registry.time_days,
            "split": splits,
            "fold_unit": [keyed_unit(settings.key, "fold", x) for x in ids],
        },
        index=pd.Index(ids, dtype=str),
    )
    cohort = assemble(
        {**tables, protocol.clinical: registry.covariates},
        outcome,
        protocol_fingerprint=protocol.fingerprint(),
    )
    write_cohort(cohort, settings.path(COHORT))
    remember_draft(settings)
    return int(cohort.n_obs)


def _assign(settings: SiteSettings, ids: list[str], protocol: StudyProtocol) -> list[str]:
    """Assign new patients to train or test, and remember every assignment ever made."""
    path = settings.path(ASSIGNMENTS)
    known: dict[str, str] = {}
    if path.is_file():
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        known = dict(zip(table["patient_id"], table["split"], strict=True))
    splits = assign_splits(
        ids, secret=settings.key, test_fraction=protocol.study.test_fraction, known=known
    )
    merged = known | dict(zip(ids, splits, strict=True))
    if merged != known:
        with replacing(path) as temporary:
            pd.DataFrame(sorted(merged.items()), columns=["patient_id", "split"]).to_csv(
                temporary, index=False
            )
    return splits


@flow(
    name="prepare-site", flow_run_name="prepare-{site}", persist_result=False, log_prints=False,
    task_runner=ThreadPoolTaskRunner(max_workers=2),  # type: ignore[arg-type]
)  # fmt: skip
@described
@sealed
@in_turn
def prepare_site(study: Slug, site: Slug) -> Prepared:
    """Turn a site's raw inputs into its cohort, doing only what is new.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    site
        Opaque name of the site.
    """
    began = datetime.now(UTC)
    settings, protocol = open_site(study, site)
    registry, excluded = read_site_registry(settings, protocol)
    works, unlisted = list_inputs(settings, protocol)
    # Modalities take turns, so that array code and Python code of two of them run side by side.
    turns = sorted((at, i, work) for i, work in enumerate(works) for at in range(len(work.pending)))
    exclusions = [*excluded, *unlisted, *(fault for work in works for fault in work.faults)]
    known = {*registry.patient_ids, *(e.patient_id for e in excluded)}
    listed = [row for work in works for row in work.rows]
    exclusions += without_registry(listed, known, protocol.clinical)
    n_pending = sum(len(work.pending[at].rows) for at, _, work in turns)
    means = {work.modality: means_of(settings, work.modality, work.spec) for work in works}
    with Progress(f"{site}: extract", total=n_pending) as progress:
        futures = [
            (
                extract_site_batch.submit(
                    work, at, f"{work.modality}-{at + 1}", means[work.modality]
                ),
                work,
                at,
            )
            for at, _, work in turns
        ]
        for future, work, at in futures:
            exclusions += future.result()
            progress.advance(len(work.pending[at].rows))
    tables = {work.modality: table for work in works if (table := collect(work)) is not None}
    write_exclusions(exclusions, settings.path(EXCLUDED))
    n_patients = assemble_cohort(settings, protocol, registry, tables)
    n_excluded = len({(e.patient_id, e.modality) for e in exclusions})
    night = Night(_text(began), _text(datetime.now(UTC)), n_patients, n_pending, n_excluded)
    write_night(settings, night)
    if is_deployed() and _grew(settings, protocol):
        emit_event("consilium.cohort.grew", {"prefect.resource.id": f"consilium.site.{site}"})
    return Prepared(site=site, n_patients=n_patients, n_excluded=n_excluded, n_extracted=n_pending)


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds")


def _grew(settings: SiteSettings, protocol: StudyProtocol) -> bool:
    """Whether so many patients came, left or changed that another cohort may be released."""
    state = snapshot_state(settings)
    least = max(protocol.privacy.snapshot, int(settings.limits.get("snapshot", 1)))
    return state.last == 0 or (state.n_waiting or 0) >= least


@task(
    name="train-encoder", task_run_name="train-{modality}", cache_policy=NO_CACHE,
    persist_result=False,
)  # fmt: skip
@sealed
def train_site_encoder(
    settings: SiteSettings, protocol: StudyProtocol, inputs: SiteInputs, modality: str
) -> str:
    """Train one modality's encoder and keep it; return why it was left out, if it was."""
    trained = train_local(inputs, modality, protocol.encoder[modality], seed=protocol.study.seed)
    key = encoder_key(inputs.cohort, protocol, modality)
    about = {"key": key, "made_from": encoder_parts(inputs.cohort, protocol)}
    _keep(settings.path("encoders", modality), about, trained)
    remember(settings, settings.path("encoders", modality).iterdir())
    return trained.reason


def _keep(folder: Path, about: dict[str, Any], trained: LocalEncoder) -> None:
    """Write weights and scores, then the key that says they are whole."""
    (folder / "encoder.json").unlink(missing_ok=True)  # an older key must not vouch for these
    with replacing(folder / "log_hazard.npy") as temporary:
        np.save(temporary, trained.log_hazard)
    if trained.encoder is not None:
        with replacing(folder / "encoder.safetensors") as temporary:
            temporary.write_bytes(trained.encoder.to_bytes())
        with replacing(folder / "training_curve.json") as temporary:
            temporary.write_text(json.dumps(trained.encoder.history, indent=1))
    about |= {"reason": trained.reason, "trained": trained.encoder is not None}
    with replacing(folder / "encoder.json") as temporary:
        temporary.write_text(json.dumps(about))


@task(
    name="register-encoders", retries=2, retry_delay_seconds=5, retry_condition_fn=may_pass,
    cache_policy=NO_CACHE, persist_result=False,
)  # fmt: skip
@sealed
def register_site_encoders(settings: SiteSettings, protocol: StudyProtocol, cohort: str) -> int:
    """Keep newly trained encoders in the site's own registry, which never leaves the site."""
    return register_encoders(settings, protocol, cohort)


@flow(name="train-encoders", flow_run_name="train-{site}", persist_result=False, log_prints=False)
@described
@sealed
@in_turn
def train_site(study: Slug, site: Slug) -> dict[str, str]:
    """Train a site's own encoder of every modality; nothing of them leaves the site.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    site
        Opaque name of the site.

    Returns
    -------
    dict
        Per modality left out, the reason.
    """
    settings, protocol = open_site(study, site)
    cohort = keyed_digest(settings.key, read_cohort_digest(released(settings, protocol).cohort))
    known = {
        modality: about_encoder(settings.path("encoders", modality))
        for modality in protocol.modalities
    }
    left_out = {
        modality: str(about["reason"])
        for modality, about in known.items()
        if about is not None and about["key"] == encoder_key(cohort, protocol, modality)
    }
    pending = [modality for modality in protocol.modalities if modality not in left_out]
    if pending:
        left_out |= _train(settings, protocol, pending)
    if unregistered(settings, protocol, cohort):
        register_site_encoders(settings, protocol, cohort)
    return {modality: reason for modality, reason in left_out.items() if reason}


def _train(
    settings: SiteSettings, protocol: StudyProtocol, modalities: list[str]
) -> dict[str, str]:
    sweep(settings.path("encoders"))
    inputs = load_inputs(settings, protocol)
    if not inputs.trains:
        return dict.fromkeys(modalities, "the site is below its training minimum")
    reasons = {}
    with Progress(f"{settings.name}: train", total=len(modalities)) as progress:
        for modality in modalities:
            reasons[modality] = train_site_encoder(settings, protocol, inputs, modality)
            progress.advance(1)
    return reasons
