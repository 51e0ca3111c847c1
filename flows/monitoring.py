"""The monthly flow that evaluates the model in use again, and says where it drifts."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, Literal

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed

from flows.champion_check import Again, alarms, evaluate_again, registered_model
from flows.described import Slug, described
from flows.gates import cohorts_of
from flows.links import linked
from flows.mlflow_store import OWNER_TAGS, client_of
from flows.model_signing import ModelNotTrusted
from flows.noted_tags import EVALUATION, note_tags
from flows.policy import read_policy
from flows.progress import RoundProgress
from flows.promotable import (
    CHAMPION,
    COHORTS_TAG,
    EVALUATION_TAG,
    aliases_of,
    find,
    model_digest,
    protocol_of,
    read_record,
    statement_fault,
)
from flows.registry import model_name
from flows.sealed import log_to, sealed
from infra.settings import Workspace
from modalities.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from prefect.client.schemas import State

    from flows.champion_check import Registered
    from flows.gates import Figure

LAST_TAG: Final = "consilium.last_evaluation"
ALARMS_TAG: Final = "consilium.last_evaluation_alarms"
ON_TAG: Final = "consilium.evaluated_cohorts"
ALARM: Final = "Alarm"
_ENCODERS, _NETWORKS = "encoders.json", "networks.json"
_MISSING: Final = "missing/"
_NOT_A_KEY: Final = re.compile(r"[^\w\-. :/]")


@flow(
    name="evaluate-champion", flow_run_name="evaluate-{study}", persist_result=False,
    log_prints=False,
)  # fmt: skip
@described
@sealed
def evaluate_champion(
    study: Slug, sites: list[Slug], federation: Literal["memory", "flare"] = "memory"
) -> State[Any]:
    """Evaluate the model in use on what its sites have released since it was last evaluated.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    sites
        Opaque names of the sites that take part; all below the folder where none is named, and
        those of the consortium's kits over flare.
    federation
        memory: all sites are in this process; flare: they are reached over the engine.
    """
    workspace = Workspace()
    log_to(workspace.root)
    client, name = client_of(workspace.mlflow_uri), model_name(study)
    version = aliases_of(client, name).get(CHAMPION)
    if version is None:
        return Completed(name="Skipped", message="no model is in use")
    champion = find(client, name, version)
    model = read_registered(workspace, client, champion)
    seen = _seen(champion, model)
    found = check_champion(workspace, model, seen, sites=sites, federation=federation)
    if found is None:
        return Completed(name="Skipped", message="no site has a new snapshot")
    before = missing_before(client, champion)
    raised = alarms(found, read_policy().monitoring, missing_before=before)
    text = to_markdown(found, raised, version=version)
    create_markdown_artifact(text, key="evaluation", description="The model in use, today")
    track_evaluation(workspace, champion, found, raised, text)
    if raised:
        return Failed(name=ALARM, message=f"alarms: {', '.join(raised)}")
    return Completed(message="no alarm")


@task(name="check-champion", cache_policy=NO_CACHE, persist_result=False)
@sealed
def check_champion(
    workspace: Workspace, model: Registered, seen: str, *, sites: list[str], federation: str
) -> Again | None:
    """Reach the sites and evaluate; None where the cohorts are those that were ``seen``."""
    protocol = protocol_of(workspace, model.record)
    names = tuple(sites) or tuple(workspace.site_names())
    with linked(federation, workspace, protocol, names) as link:
        plan = protocol.plan(link.run_key())
        link.open(plan)
        with RoundProgress(protocol.study.name) as progress:
            return evaluate_again(
                plan,
                link,
                model,
                unless=lambda cohorts: fingerprint(cohorts) == seen,
                on_round=progress.advance,
            )


def read_registered(
    workspace: Workspace, client: MlflowClient, champion: ModelVersion
) -> Registered:
    """Read a version's model back from its run's artifacts, as the coordinator signed them.

    Raises
    ------
    flows.model_signing.ModelNotTrusted
        If the model, or anything of the run that is read, is not what the coordinator signed.
    flows.decisions.PromotionRefused
        If the run has no record.
    """
    record = read_record(client, champion.run_id)
    parts = {name: _artifact(client, champion, name) for name in (_ENCODERS, _NETWORKS)}
    _, signed, fault = model_digest(workspace, champion.name, int(champion.version))
    fault = fault or statement_fault(
        client, champion, record, model=signed, root=workspace.root, beside=parts
    )
    if fault:
        raise ModelNotTrusted(fault)
    return registered_model(record, parts[_ENCODERS], parts[_NETWORKS])


def _artifact(client: MlflowClient, champion: ModelVersion, name: str) -> Any:
    from mlflow.exceptions import MlflowException

    with TemporaryDirectory() as folder:
        try:
            return json.loads(
                Path(client.download_artifacts(champion.run_id, name, folder)).read_bytes()
            )
        except (MlflowException, OSError, ValueError):
            raise ModelNotTrusted(
                f"{name}: found none that can be read, needed it as it was signed; restore it "
                "from a backup"
            ) from None


def _seen(champion: ModelVersion, model: Registered) -> str:
    """Fingerprint of the cohorts that the model was last evaluated on."""
    return champion.tags.get(ON_TAG) or fingerprint(cohorts_of(model.record))


def missing_before(client: MlflowClient, champion: ModelVersion) -> dict[str, float]:
    """Share of patients without each modality, as the last evaluation found it."""
    runs = _evaluations(client, champion, "attributes.status = 'FINISHED'")
    metrics = runs[0].data.metrics if runs else {}
    return {
        key.removeprefix(_MISSING): value
        for key, value in metrics.items()
        if key.startswith(_MISSING)
    }


def _evaluations(client: MlflowClient, champion: ModelVersion, more: str) -> list[Any]:
    experiment = client.get_run(champion.run_id).info.experiment_id
    asked = f"tags.`{EVALUATION_TAG}` = '{champion.version}' and {more}"
    found = client.search_runs([experiment], asked, order_by=["attributes.start_time DESC"])
    return list(found)


@task(name="track-evaluation", cache_policy=NO_CACHE, persist_result=False)
@sealed
def track_evaluation(
    workspace: Workspace,
    champion: ModelVersion,
    found: Again,
    raised: Mapping[str, str],
    text: str,
) -> None:
    """Log an evaluation as a run of its own, and note it on the version.

    One that was killed half-way is removed and logged anew.
    """
    from mlflow.entities import Metric

    client, cohorts = client_of(workspace.mlflow_uri), fingerprint(found.cohorts)
    for left in _evaluations(client, champion, f"tags.`{COHORTS_TAG}` = '{cohorts}'"):
        client.delete_run(left.info.run_id)
    now = datetime.now(UTC)
    run_name = f"evaluation-{champion.version}-{now:%Y%m}"
    tags = {**OWNER_TAGS, EVALUATION_TAG: champion.version, COHORTS_TAG: cohorts}
    experiment = client.get_run(champion.run_id).info.experiment_id
    run_id = client.create_run(experiment, tags=tags, run_name=run_name).info.run_id
    at_ms = round(now.timestamp() * 1000)
    metrics = [Metric(k, v, at_ms, 0) for k, v in evaluation_metrics(found).items()]
    client.log_batch(run_id, metrics)
    client.log_text(run_id, text, "evaluation.md")
    client.set_terminated(run_id)
    noted = {ON_TAG: cohorts, ALARMS_TAG: ",".join(raised) or "none", LAST_TAG: run_name}
    for key, value in noted.items():
        client.set_model_version_tag(champion.name, champion.version, key, value)
    about = {"model": champion.name, "version": int(champion.version)}
    note_tags(workspace.root, EVALUATION, noted, **about, cohorts=cohorts, alarms=list(raised))


def evaluation_metrics(found: Again) -> dict[str, float]:
    """Figures of an evaluation as MLflow's metrics."""
    values: dict[str, float] = {
        "event_rate": found.event_rate,
        "event_rate_then": found.event_rate_then,
        "n_sites": float(len(found.cohorts) - len(found.codes)),
    }
    for name, now in found.now.items():
        values |= _parts(name, now)
    if found.loss is not None:
        values |= _parts("concordance_loss", found.loss)
    for site, at_site in found.by_site.items():
        values |= _parts(f"{site}/concordance", at_site)
    values |= {f"{_MISSING}{x}": share for x, share in found.missing.items()}
    for one in found.shifts:
        if one.shift is not None and one.spread_ratio is not None:
            name = _NOT_A_KEY.sub("_", one.name)
            values |= {f"shift/{name}": one.shift, f"spread_ratio/{name}": one.spread_ratio}
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _parts(name: str, of: Figure) -> dict[str, float]:
    return {
        name: of.value,
        f"{name}_standard_error": of.standard_error,
        f"{name}_low": of.low,
        f"{name}_high": of.high,
    }


def to_markdown(found: Again, raised: Mapping[str, str], *, version: int) -> str:
    """Write an evaluation as a page: alarms first, then figures then and now, then inputs."""
    lines = [f"# Version {version}, evaluated again", ""]
    lines += [f"- **{sentence}**" for sentence in raised.values()] or ["No alarm."]
    lines += ["", "| figure | when registered | now |", "| --- | --- | --- |"]
    names = dict.fromkeys([*found.then, *found.now])
    lines += [
        f"| {x.replace('_', ' ')} | {_text(found.then.get(x))} | {_text(found.now.get(x))} |"
        for x in names
    ]
    lines += [f"| share with an event | {found.event_rate_then:.1%} | {found.event_rate:.1%} |"]
    lines += ["", "| modality | patients without it |", "| --- | --- |"]
    lines += [
        f"| {x} | {'not told' if math.isnan(share) else f'{share:.1%}'} |"
        for x, share in found.missing.items()
    ]
    lines += ["", *_most_moved(found)]
    if found.codes:
        left = ", ".join(f"{site} ({code})" for site, code in sorted(found.codes.items()))
        lines += ["", f"Did not take part: {left}."]
    return "\n".join(lines) + "\n"


def _most_moved(found: Again) -> list[str]:
    told = [x for x in found.shifts if x.shift is not None and x.spread_ratio is not None]
    if not told:
        return ["Nothing is told of the inputs' means under a privacy budget."]
    most = sorted(told, key=lambda x: -abs(x.shift or 0.0))[:12]
    rows = [f"| {x.name} | {x.shift:+.3f} | {x.spread_ratio:.3f} |" for x in most]
    return [
        "The inputs that moved most, in standard deviations of when the model was fitted. An input "
        "that each site standardises for itself moves at no site; its own log tells of the raw "
        "values.",
        "",
        "| input | shift of the mean | spread now over then |",
        "| --- | --- | --- |",
        *rows,
    ]


def _text(of: Figure | None) -> str:
    return "hidden" if of is None else f"{of.value:.3f} ({of.low:.3f} to {of.high:.3f})"
