"""The flows that look after a site: are its inputs sound, do its models keep their secrets.

What they show on their pages names no patient and no file: modalities, codes, counts, verdicts.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed

from flows.check import check_site
from flows.described import Slug, described
from flows.identity import public_key
from flows.progress import Progress
from flows.sealed import note, sealed
from flows.serve import SHARED
from flows.site import open_site
from fusion.audit import LOG_FILE, verify_log
from modalities.cohort import DataError, read_manifest

if TYPE_CHECKING:
    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings
    from modalities.cohort import Exclusion

LOG = "log"


@task(name="check-inputs", cache_policy=NO_CACHE, persist_result=False)
@sealed
def check_inputs(settings: SiteSettings, protocol: StudyProtocol) -> list[Exclusion]:
    """Look at every raw input, and list those that would be set aside."""
    rows, _ = read_manifest(settings.path(settings.manifest), protocol.modalities)
    with Progress(f"{settings.name}: check", total=len(rows)) as progress:
        return check_site(settings, protocol, advance=progress.advance)


@flow(name="check-data", flow_run_name="check-{site}", persist_result=False, log_prints=False)
@described
@sealed
def check_data(study: Slug, site: Slug) -> dict[str, int]:
    """Count the raw inputs that would be set aside, and why, without extracting anything.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    site
        Opaque name of the site.

    Returns
    -------
    dict
        Inputs by modality and code, as ``pathology: unreadable``.
    """
    settings, protocol = open_site(study, site)
    faults = check_inputs(settings, protocol)
    counts = Counter((fault.modality, fault.code) for fault in faults)
    least = 1 if _server_is_here() else protocol.privacy.cell
    create_table_artifact(
        table=[
            {"modality": modality, "why": code, "inputs": n if n >= least else f"below {least}"}
            for (modality, code), n in sorted(counts.items())
        ],
        key=f"check-{site}",
        description=f"What would be set aside: {'nothing' if not counts else 'see site check'}",
    )
    return {f"{modality}: {code}": n for (modality, code), n in sorted(counts.items())}


def _server_is_here() -> bool:
    """Whether Prefect's server is the site's own: a shared one is told no small count."""
    if SHARED in os.environ:  # it may be reached through a tunnel from this machine
        return False
    host = urlsplit(os.environ.get("PREFECT_API_URL", "")).hostname
    return host in (None, "127.0.0.1", "localhost", "::1")


@task(name="verify-log", cache_policy=NO_CACHE, persist_result=False)
@sealed
def verify_site_log(settings: SiteSettings) -> str:
    """Hold the site's signed log against itself: ``whole``, ``none yet``, or what is wrong."""
    log, public = settings.path(LOG_FILE), public_key(settings.home)
    if not log.is_file():
        return "none yet"
    if public is None:
        return "no key"
    fault = verify_log(log, public=public)
    return "whole" if fault is None else f"{fault.fault} at entry {fault.number}"


@task(name="attack-models", cache_policy=NO_CACHE, persist_result=False)
@sealed
def attack_models(settings: SiteSettings, protocol: StudyProtocol) -> dict[str, str]:
    """Guess from each model who was trained on: it passes, fails, or why it was not tried."""
    # It imports the networks, which no other flow of this file needs.
    from flows.membership import FUSION, audit_site, planned_models

    names = (*protocol.modalities, FUSION)
    try:
        with Progress(f"{settings.name}: audit", total=planned_models(protocol)) as progress:
            results = audit_site(settings, protocol, advance=progress.advance)
    except DataError as fault:
        note(fault)
        return dict.fromkeys(names, f"not audited: {fault.code}")
    found = {result.name: "passes" if result.passes else "fails" for result in results}
    return {name: found.get(name, "not audited") for name in names}


@flow(name="audit-privacy", flow_run_name="audit-{site}", persist_result=False, log_prints=False)
@described
@sealed
def audit_privacy(study: Slug, site: Slug) -> Any:
    """Attack the site's own models and verify its signed log; say what passes and what fails.

    Fails where the log is not whole, or a network whose weights the study shares did not pass.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    site
        Opaque name of the site.

    Returns
    -------
    dict
        A verdict by model, and one of the log.
    """
    settings, protocol = open_site(study, site)
    verdicts = {LOG: verify_site_log(settings), **attack_models(settings, protocol)}
    create_table_artifact(
        table=[{"what": name, "verdict": verdict} for name, verdict in verdicts.items()],
        key=f"audit-{site}",
        description="The log, and what each model tells of who was trained on",
    )
    bad = [name for name in protocol.audited() if verdicts[name] != "passes"]
    if verdicts[LOG] not in ("whole", "none yet"):
        bad.insert(0, LOG)
    return Failed(message=f"look at: {', '.join(bad)}") if bad else verdicts
