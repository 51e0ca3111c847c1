"""The flow of the coordinator: one run of a study over its sites, to a registered model."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from prefect import flow, task
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.described import Slug, described
from flows.dossier import refresh_dossier
from flows.federated import FederationRefused
from flows.figures import figures
from flows.identity import identity
from flows.links import LOSSES, Link, linked
from flows.patients import patient_table, write_patient_table
from flows.progress import RoundProgress
from flows.protocol import load_protocol
from flows.records import StudyRecord
from flows.reference import compare
from flows.registry import Registered, find_version, track_study
from flows.report_files import REPORT, write_report
from flows.reports import ResultsTable, results_table, to_markdown
from flows.sealed import SiteError, log_to, may_pass, note, sealed
from flows.skips import (
    NothingToDo,
    is_deployed,
    missing_approvals,
    skipped,
    spent_budgets,
    waiting_sites,
)
from flows.summary import Stopwatch, summarise_record
from flows.versions import git_commit
from fusion.federation import (
    PROTOCOL,
    Coordinator,
    FederationLost,
    QuorumNotMet,
    leave_one_site_out,
    summarise,
)
from fusion.federation.consortium import COORDINATOR
from infra.settings import Workspace
from modalities.files import replacing
from modalities.synthetic import read_truth

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from flows.protocol import StudyProtocol
    from flows.records import Reference
    from flows.reference import Consortium
    from fusion.federation import Encoders, FederationPlan, Fitted, FusionFit, Transport


@dataclass(frozen=True)
class StudyOutcome:
    """What a run of a study says, ready to print: figures, table, registered version.

    Attributes
    ----------
    summary
        Plain values for JSON.
    table
        Concordance by site and arm, with notes.
    reused
        Whether an earlier run of the same protocol, cohorts and code already said it.
    """

    summary: dict[str, Any]
    table: ResultsTable
    reused: bool


@task(name="describe-sites", cache_policy=NO_CACHE, persist_result=False)
@sealed
def describe_sites(coordinator: Coordinator) -> None:
    """Learn which sites take part, with which modalities."""
    coordinator.describe()


@task(name="fit-encoders", cache_policy=NO_CACHE, persist_result=False)
@sealed
def fit_encoders(coordinator: Coordinator) -> Encoders:
    """Fit the encoders that the consortium shares."""
    return coordinator.fit_encoders()


@task(name="fit-fusion", cache_policy=NO_CACHE, persist_result=False)
@sealed
def fit_fusion(coordinator: Coordinator) -> FusionFit:
    """Fit the fusion model of every arm, with its baseline hazard."""
    return coordinator.fit_fusion()


@task(name="evaluate-models", cache_policy=NO_CACHE, persist_result=False)
@sealed
def evaluate_models(coordinator: Coordinator, encoders: Encoders, fusion: FusionFit) -> Fitted:
    """Collect evaluation sums at every site, external ones included."""
    evaluations = coordinator.evaluate(fusion)
    slope = coordinator.calibration_slope(tuple(evaluations))
    return coordinator.fitted(encoders, fusion, evaluations, slope)


@task(name="leave-sites-out", cache_policy=NO_CACHE, persist_result=False)
@sealed
def leave_sites_out(
    plan: FederationPlan, transport: Transport, fitted: Fitted
) -> dict[tuple[str, ...], Fitted | str]:
    """Repeat the study without each training site, and evaluate it there."""
    return leave_one_site_out(plan, transport, fitted.sites)


@task(name="write-patients", cache_policy=NO_CACHE, persist_result=False)
@sealed
def write_patients(consortium: Consortium, fitted: Fitted, workspace: Workspace, run: str) -> None:
    """Let every site keep what the model says of its own patients, on its own disk."""
    model = fitted.models[PROTOCOL]
    for site, study in consortium.studies.items():
        table = patient_table(
            consortium.inputs[site], study, model, horizon_days=fitted.plan.horizon_days
        )
        write_patient_table(table, workspace.site(site).path("runs", run[:12], "patients.csv"))


@task(name="compare-with-truth", cache_policy=NO_CACHE, persist_result=False)
@sealed
def compare_with_truth(consortium: Consortium, fitted: Fitted, root: Path) -> Reference:
    """Score the arms beside pooled rows and the true hazard; simulated and public data only."""
    truth = read_truth(root).log_hazard if (root / "truth.json").is_file() else None
    return compare(consortium, fitted, true_log_hazard=truth)


@task(
    name="register-model", retries=2, retry_delay_seconds=5, retry_condition_fn=may_pass,
    cache_policy=NO_CACHE, persist_result=False,
)  # fmt: skip
@sealed
def register_model(record: StudyRecord, workspace: Workspace, report: Path) -> Registered:
    """Log the run to MLflow, with its report, and register its model as a new version."""
    return track_study(
        record,
        tracking_uri=workspace.mlflow_uri,
        artifact_root=workspace.root / "artifacts",
        report=report,
        key=identity(workspace.root / COORDINATOR),
        study_file=workspace.study_file,
    )


@task(name="write-report", cache_policy=NO_CACHE, persist_result=False)
@sealed
def report_study(record: StudyRecord, folder: Path) -> Path:
    """Write the report of the run, with the record and the figures that it shows."""
    return write_report(record, folder, created=datetime.now(UTC))


@task(name="write-dossier", cache_policy=NO_CACHE, persist_result=False)
@sealed
def write_dossier(workspace: Workspace, study: str, registered: Registered) -> None:
    """Write the version's dossier beside the report, and to the registry."""
    refresh_dossier(workspace, study, registered.version)


@flow(name="run-study", flow_run_name="study-{study}", persist_result=False, log_prints=False)
@described
@sealed
def run_study(
    study: Slug, sites: list[Slug], federation: Literal["memory", "flare"] = "memory"
) -> Any:
    """Fit, evaluate and register one study over sites whose cohorts are prepared and trained.

    A run that has nothing to do ends in a state named ``Skipped``, which says why: an earlier run
    of the same cohorts stands, and it gives that one's outcome; or, where it comes from a
    deployment, approvals are missing or privacy budgets spent.

    Parameters
    ----------
    study
        Name of the study, as in the folder's study.toml.
    sites
        Opaque names of the sites that take part; all below the folder where none is named, and
        those of the consortium's kits over flare.
    federation
        memory: all sites are in this process; flare: they are reached over the engine.

    Returns
    -------
    StudyOutcome
        What this run or the earlier one says.
    """
    workspace = Workspace()
    log_to(workspace.root)
    protocol = load_protocol(workspace.study_file)
    waits = missing_approvals(workspace, protocol) if federation == "flare" else None
    if waits is not None and is_deployed():
        return skipped(waits)
    try:
        outcome = _run(workspace, protocol, tuple(sites or workspace.site_names()), federation)
    except NothingToDo as held:
        if is_deployed():
            return skipped(str(held))
        cause = held.cause
    else:
        # Prefect gives the caller what is in the state.
        return skipped(_unchanged(outcome), outcome) if outcome.reused else outcome
    raise cause


def _unchanged(outcome: StudyOutcome) -> str:
    return f"no new snapshot: run {outcome.summary['run'][:12]} is of the same cohorts and code"


def _run(
    workspace: Workspace, protocol: StudyProtocol, sites: tuple[str, ...], federation: str
) -> StudyOutcome:
    study = protocol.study.name
    watch = Stopwatch()
    with linked(federation, workspace, protocol, sites) as link:
        with watch.stage("introduce"):
            key = _introduced(link)
        folder = workspace.root / "runs" / key[:12]
        earlier = _finished(workspace, protocol, key, folder)
        if earlier is not None:
            return earlier
        plan = protocol.plan(key)
        with watch.stage("load"):
            open_link(link, plan)
        with watch.stage("federation"), RoundProgress(study) as progress:
            fitted = _federate(plan, link, progress, folder)
        left_out = None
        if plan.leave_one_site_out:
            with watch.stage("leave-one-site-out"):
                left_out = leave_sites_out(plan, link, fitted)
        engine_round_s = link.time_engine(fitted)
    consortium = link.consortium()
    reference = None
    if consortium is not None:
        write_patients(consortium, fitted, workspace, key)
        if protocol.study.data != "patients":
            with watch.stage("reference"):
                reference = compare_with_truth(consortium, fitted, workspace.root)
    record = StudyRecord(
        run=key,
        protocol=protocol,
        fitted=fitted,
        results=summarise(fitted, left_out),
        code_version=git_commit(),
        reference=reference,
        wall_s=dict(watch.wall_s),
    )
    with watch.stage("report"):
        report = report_study(record, folder)
    with watch.stage("registry"):
        registered = register_model(record, workspace, report)
    with watch.stage("dossier"):
        write_dossier(workspace, study, registered)
    outcome = StudyOutcome(
        summary=summarise_record(record, registered, workspace)
        | engine_round_s
        | {"federation": federation, "wall_s": watch.wall_s},
        table=results_table(record),
        reused=False,
    )
    _keep(outcome, folder)
    _publish(record, outcome)
    return outcome


def _introduced(link: Link) -> str:
    """Name the run after its sites were asked to take part, if they do."""
    try:
        return link.run_key()
    except FederationRefused as error:
        waits = waiting_sites(error.codes)
        if waits is None:
            raise
        raise NothingToDo(waits, error) from None


@task(name="load-sites", cache_policy=NO_CACHE, persist_result=False)
@sealed
def open_link(link: Link, plan: FederationPlan) -> None:
    """Bring up every site's part in the run, where the sites are in this process."""
    link.open(plan)


def _federate(plan: FederationPlan, link: Link, progress: RoundProgress, folder: Path) -> Fitted:
    """Go through all stages; where the engine's job is lost, begin again in a new one.

    The sites answer the same requests alike, so that the same model comes out.
    """
    for left in reversed(range(LOSSES + 1)):
        try:
            return _stages(plan, link, progress, folder)
        except SiteError as error:
            if not left or not isinstance(error.cause, FederationLost):
                raise
            note(error.cause)
        link.again(plan.run)
    raise AssertionError("unreachable")


def _stages(plan: FederationPlan, link: Link, progress: RoundProgress, folder: Path) -> Fitted:
    coordinator = Coordinator(
        plan,
        link,
        on_round=progress.advance,
        checkpoint=RoundFiles(folder / "rounds"),
    )
    try:
        describe_sites(coordinator)
        encoders = fit_encoders(coordinator)
        fusion = fit_fusion(coordinator)
        return evaluate_models(coordinator, encoders, fusion)
    except SiteError as error:
        spent = spent_budgets([one.code for one in coordinator.talk.outcomes.values()])
        if spent is None or not isinstance(error.cause, QuorumNotMet):
            raise
        raise NothingToDo(spent, error) from None


@dataclass(frozen=True)
class RoundFiles:
    """State of networks under training, a file per stage; a killed run goes on from there."""

    folder: Path

    def load(self, stage: str) -> dict[str, dict[str, Any]]:
        """State of each network of a stage as last saved; empty where there is none."""
        try:
            found: dict[str, dict[str, Any]] = json.loads(
                (self.folder / f"{stage}.json").read_text()
            )
        except (OSError, ValueError):
            return {}
        return found

    def save(self, stage: str, state: dict[str, dict[str, Any]]) -> None:
        """Keep the state of each network of a stage in place of the last one."""
        with replacing(self.folder / f"{stage}.json") as temporary:
            temporary.write_text(json.dumps(state))


def _keep(outcome: StudyOutcome, folder: Path) -> None:
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(to_markdown(outcome.table))
    with replacing(folder / "summary.json") as temporary:
        kept = {"summary": outcome.summary, "table": asdict(outcome.table)}
        temporary.write_text(json.dumps(kept, indent=1))


def _finished(
    workspace: Workspace, protocol: StudyProtocol, key: str, folder: Path
) -> StudyOutcome | None:
    """Read what an earlier run of the same key left, if its model version still exists."""
    try:
        kept = json.loads((folder / "summary.json").read_text())
        summary, table = kept["summary"], ResultsTable(**kept["table"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (folder / REPORT).is_file():
        return None
    if find_version(workspace.mlflow_uri, protocol.study.name, key) is None:
        return None
    return StudyOutcome(summary=summary | {"wall_s": {}}, table=table, reused=True)


def _publish(record: StudyRecord, outcome: StudyOutcome) -> None:
    """Show table and figures on the flow run's page."""
    create_markdown_artifact(
        to_markdown(outcome.table), key="results", description="Concordance by site"
    )
    for name, figure in figures(record).items():
        create_image_artifact(
            _data_uri(figure), key=name.replace("_", "-"), description=name.replace("_", " ")
        )


def _data_uri(figure: Figure) -> str:
    """Give a figure as text that a page shows without fetching anything."""
    image = BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()
