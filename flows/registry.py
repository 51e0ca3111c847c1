"""A finished study in MLflow: its run, its rounds, and a version of its model with its lineage."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.figures import figures
from flows.mlflow_store import (
    SQLITE,
    RegistryError,
    client_of,
    database_of,
    make_store,
    now_ms,
    quiet_mlflow,
    quietly_imported,
    tracking_at,
)
from flows.model_signing import sign_model
from flows.provenance import LINEAGE_FILE, provenance_of, signed, write_provenance
from flows.registry_values import (
    ARM_KEYS,
    COMPLETE_TAG,
    DIGEST_CHARACTERS,
    LOGGED,
    RUN_TAG,
    arm_key,
    logged_rounds,
    logged_values,
    metrics_of,
    owner_tags,
    params_of,
    run_name,
    run_tags,
    shortened,
)
from flows.report_files import RECORD
from flows.reports import is_external, results_table, to_markdown
from fusion.federation import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput
    from mlflow.entities.model_registry import ModelVersion

    from flows.provenance import Provenance
    from flows.records import StudyRecord
    from flows.registry_values import LoggedRound
    from fusion.federation import SiteOutcome
    from fusion.keys import SigningKey

__all__ = [
    "ARM_KEYS", "CANDIDATE", "Registered", "RegistryError", "arm_key", "find_version",
    "model_card", "model_name", "quiet_mlflow", "track_study",
]  # fmt: skip

CANDIDATE = "candidate"
CARD = "model_card.md"
_TEMPLATE = Path(__file__).resolve().parents[1] / "mlflow" / "model_card.md.template"


@dataclass(frozen=True)
class Registered:
    """Where a study's model is registered.

    Attributes
    ----------
    version
        Number of the version, from 1.
    run_id
        MLflow's id of the study's run.
    reused
        True if the same study run had been registered before and nothing was logged.
    """

    model_name: str
    version: int
    run_id: str
    reused: bool


def find_version(tracking_uri: str, study: str, run: str) -> Registered | None:
    """Look up the version that was registered for a study run, completely.

    Parameters
    ----------
    tracking_uri
        Database or server of MLflow.
    study
        Name of the study.
    run
        As in :class:`flows.records.StudyRecord`.
    """
    if tracking_uri.startswith(SQLITE) and not database_of(tracking_uri).exists():
        return None
    found = _version_of(client_of(tracking_uri), study, run)
    return _reused(found) if found is not None and COMPLETE_TAG in found.tags else None


def track_study(
    record: StudyRecord,
    *,
    tracking_uri: str,
    artifact_root: Path | None = None,
    report: Path | None = None,
    key: SigningKey | None = None,
    study_file: Path | None = None,
) -> Registered:
    """Log a finished study and register its model as ``<study>-fusion``, alias ``candidate``.

    The same study run is registered once: a second call finds it, a call after a kill half-way
    removes what was begun and starts over. Two calls at the same moment are not kept apart.

    Parameters
    ----------
    record
        What the study found.
    tracking_uri
        ``sqlite:////...`` for a file on this machine, or the address of an MLflow server.
    artifact_root
        Folder of the artifacts with a database; by default beside it. A server has its own.
    report
        The run's report, beside the record that it shows; both become artifacts.
    key
        Of the coordinator; signs model and lineage. Without it the version is kept but never loads.
    study_file
        The protocol, whose bytes become part of the lineage.

    Raises
    ------
    RegistryError
        If the template of the model card is missing from the installation.
    """
    card = model_card(record)
    make_store(tracking_uri)
    client = client_of(tracking_uri)
    found = _version_of(client, record.protocol.study.name, record.run)
    if found is not None:
        _point_candidate_at(client, found)
        return _reused(found)
    experiment = _experiment(client, record, tracking_uri, artifact_root)
    _remove_unfinished(client, experiment, record.run)
    extra = _Extra(key, study_file, report)
    run_id, model_id, tags = _log_study(client, experiment, record, card, extra)
    with tracking_at(tracking_uri):
        registered = _register(client, record, card, tags, run_id=run_id, model_id=model_id)
    _point_candidate_at(client, registered)
    return Registered(registered.name, int(registered.version), run_id, reused=False)


@dataclass(frozen=True)
class _Extra:
    """What a version has where it is the work of a real coordinator."""

    key: SigningKey | None
    study_file: Path | None
    report: Path | None


def model_name(study: str) -> str:
    """Name of a study's registered model."""
    return f"{study}-fusion"


def model_card(record: StudyRecord) -> str:
    """Render the model card, in Markdown, from the template beside the registry's policy.

    Raises
    ------
    RegistryError
        If the template is missing.
    """
    try:
        template = Template(_TEMPLATE.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RegistryError(
            f"mlflow/{_TEMPLATE.name}: found none beside the package, needed it for the model "
            "card; install the project from its checkout"
        ) from None
    study, fitted = record.protocol.study, record.fitted
    return template.substitute(
        model=model_name(study.name),
        endpoint=study.endpoint,
        data=study.data,
        n_sites=sum(s.trains and not s.code for s in fitted.sites),
        n_patients=fitted.n_patients,
        n_events=fitted.n_events,
        modalities=", ".join(record.protocol.modalities),
        grid=", ".join(f"{days:g}" for days in study.grid_days),
        run=record.run[:12],
        protocol=record.protocol.fingerprint()[:12],
        code=record.code_version[:12],
        package=installed_version("consilium"),
        results=to_markdown(results_table(record)),
    )


def _version_of(client: MlflowClient, study: str, run: str) -> ModelVersion | None:
    found = client.search_model_versions(
        f"name = '{model_name(study)}' and tags.`{RUN_TAG}` = '{run}'", max_results=1
    )
    return found[0] if found else None


def _reused(found: ModelVersion) -> Registered:
    return Registered(found.name, int(found.version), found.run_id, reused=True)


def _experiment(
    client: MlflowClient, record: StudyRecord, tracking_uri: str, artifact_root: Path | None
) -> str:
    study = record.protocol.study.name
    name = f"consilium/{study}"
    found = client.get_experiment_by_name(name)
    if found is None:
        location = None
        if tracking_uri.startswith(SQLITE):
            root = artifact_root or database_of(tracking_uri).parent / "artifacts"
            location = (root.absolute() / study).as_uri()
        return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _remove_unfinished(client: MlflowClient, experiment: str, run: str) -> None:
    mine = f"tags.`{RUN_TAG}` = '{run}'"
    for model in client.search_logged_models([experiment], filter_string=mine):
        client.delete_logged_model(model.model_id)
    while left := client.search_runs([experiment], filter_string=mine):
        for found in left:
            client.delete_run(found.info.run_id)


def _log_study(
    client: MlflowClient, experiment: str, record: StudyRecord, card: str, extra: _Extra
) -> tuple[str, str, dict[str, str]]:
    """Log run, model and rounds; give their ids and the tags that lineage adds to the version."""
    from mlflow.entities import LoggedModelOutput, Param

    tags = run_tags(record)
    params = params_of(record)
    ends_ms = now_ms()
    starts_ms = ends_ms - math.ceil(1000 * sum(r.seconds for r in record.fitted.rounds))
    run = client.create_run(experiment, start_time=starts_ms, tags=tags, run_name=run_name(record))
    run_id = run.info.run_id
    model = client.create_logged_model(
        experiment, model_name(record.protocol.study.name), run_id, tags=tags, params=params
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    metrics = metrics_of(record, run_id=run_id, model_id=model.model_id, timestamp_ms=ends_ms)
    rounds = logged_rounds(record, starts_ms=starts_ms)
    texts = {CARD: card, LOGGED: _json(logged_values(record, metrics, rounds))}
    lineage = _log_files(client, record, texts, extra, run_id=run_id, model_id=model.model_id)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_inputs(run_id, _dataset_inputs(record))
    client.log_batch(run_id, metrics, [Param(k, v) for k, v in params.items()])
    _log_rounds(client, experiment, rounds, tags=owner_tags(record), run_id=run_id)
    client.set_terminated(run_id, end_time=ends_ms)
    return run_id, model.model_id, lineage.tags()


def _log_files(
    client: MlflowClient,
    record: StudyRecord,
    texts: Mapping[str, str],
    extra: _Extra,
    *,
    run_id: str,
    model_id: str,
) -> Provenance:
    """Write and log the model and the run's artifacts, signed, with the statement over them.

    Parameters
    ----------
    texts
        Files to write as they are, by name.
    """
    with TemporaryDirectory() as folder:
        model, run = Path(folder) / "model", Path(folder) / "run"
        _save_model(model, record, run_id=run_id, model_id=model_id)
        names = {"study": record.protocol.study.name, "run": record.run}
        signature = None if extra.key is None else sign_model(model, extra.key, **names)
        client.log_model_artifacts(model_id, str(model))
        _save_artifacts(run, record, texts)
        for path in () if extra.report is None else (extra.report, extra.report.with_name(RECORD)):
            shutil.copy(path, run)
        lineage = provenance_of(record, study_file=extra.study_file, model=signature, artifacts=run)
        lineage = lineage if extra.key is None else signed(lineage, extra.key)
        write_provenance(lineage, run / LINEAGE_FILE)
        client.log_artifacts(run_id, str(run))
    return lineage


def _log_rounds(
    client: MlflowClient,
    experiment: str,
    rounds: Sequence[LoggedRound],
    *,
    tags: Mapping[str, str],
    run_id: str,
) -> None:
    """Log a child run per communication round."""
    from mlflow.entities import Metric, Param

    of_child = {**tags, "mlflow.parentRunId": run_id}
    for done in rounds:
        child = client.create_run(
            experiment, start_time=done.begins_ms, tags=of_child, run_name=done.name
        )
        client.log_batch(
            child.info.run_id,
            [Metric(k, v, done.ends_ms, done.number) for k, v in done.metrics.items()],
            [Param("stage", done.stage), Param("round", str(done.number))],
        )
        client.set_terminated(child.info.run_id, end_time=done.ends_ms)


def _dataset_inputs(record: StudyRecord) -> list[DatasetInput]:
    from mlflow.entities import DatasetInput, InputTag

    return [
        DatasetInput(
            dataset._to_mlflow_entity(),
            [InputTag("mlflow.data.context", "external" if is_external(site) else "training")],
        )
        for site, dataset in ((s, _dataset(s)) for s in record.fitted.sites if s.cohort)
    ]


def _dataset(site: SiteOutcome) -> Any:
    """Describe data that stay at a site: its name, and its cohort's digest under its own secret."""
    from mlflow.data.dataset_source import DatasetSource
    from mlflow.data.meta_dataset import MetaDataset

    class SiteSource(DatasetSource):
        @staticmethod
        def _get_source_type() -> str:
            return "consilium_site"

        def load(self) -> None:
            raise RegistryError(f"{site.site}: its cohort never leaves the site")

        @staticmethod
        def _can_resolve(raw_source: Any) -> bool:
            return False

        @classmethod
        def _resolve(cls, raw_source: Any) -> SiteSource:
            raise RegistryError("dataset: a cohort never leaves its site, so that none is found")

        def to_dict(self) -> dict[str, Any]:
            return {"site": site.site, "cohort": site.cohort}

        @classmethod
        def from_dict(cls, source_dict: Mapping[Any, Any]) -> SiteSource:
            return cls()

    return MetaDataset(SiteSource(), name=site.site, digest=site.cohort[:DIGEST_CHARACTERS])


def _save_artifacts(folder: Path, record: StudyRecord, texts: Mapping[str, str]) -> None:
    (folder / "figures").mkdir(parents=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    table = to_markdown(results_table(record))
    (folder / "results.md").write_text(table, encoding="utf-8")
    encoders = {name: encoder.to_dict() for name, encoder in record.fitted.encoders.items()}
    _write_json(folder / "encoders.json", encoders)
    networks = {name: weights.tolist() for name, weights in record.fitted.networks.items()}
    _write_json(folder / "networks.json", networks)
    _write_json(folder / "protocol.json", record.protocol.values())
    for name, figure in figures(record).items():
        figure.savefig(folder / "figures" / f"{name}.png", dpi=120)


def _write_json(path: Path, values: Any) -> None:
    path.write_text(_json(values), encoding="utf-8")


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def _save_model(folder: Path, record: StudyRecord, *, run_id: str, model_id: str) -> None:
    """Write the model as MLflow loads it: code, numbers, signature; no path of this machine."""
    pyfunc = quietly_imported("mlflow.pyfunc")
    from mlflow.models import Model

    from flows import fusion_pyfunc

    model = record.fitted.models[PROTOCOL]
    grid_days = record.protocol.study.grid_days
    fusion = folder.parent / "fusion.json"
    fusion.write_text(model.to_json(), encoding="utf-8")
    outputs = ["log_hazard", "log_hazard_se", *fusion_pyfunc.output_columns(grid_days)]
    pyfunc.save_model(
        path=str(folder),
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
        python_model=str(Path(fusion_pyfunc.__file__)),
        artifacts={"fusion": str(fusion)},
        model_config={"grid_days": list(grid_days)},
        signature=_signature(model.modalities, outputs),
        input_example=_input_example(model.modalities),
        pip_requirements=[f"{x}=={installed_version(x)}" for x in ("numpy", "pandas")],
        metadata={"consilium": installed_version("consilium"), RUN_TAG: record.run},
    )
    _forget_paths(folder)


def _signature(inputs: Sequence[str], outputs: Sequence[str]) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema

    return ModelSignature(*(Schema([ColSpec("double", x) for x in xs]) for xs in (inputs, outputs)))


def _input_example(modalities: Sequence[str]) -> Any:
    """Two made-up patients: one of average risk throughout, one who lacks the last of several."""
    import pandas as pd

    rows = {name: [0.0, 0.5] for name in modalities}
    if len(modalities) > 1:
        rows[modalities[-1]] = [0.0, math.nan]
    return pd.DataFrame(rows)


def _forget_paths(folder: Path) -> None:
    from mlflow.models import Model

    written = Model.load(str(folder))
    flavour = written.flavors["python_function"]
    flavour["model_code_path"] = Path(flavour["model_code_path"]).name
    for artifact in flavour["artifacts"].values():
        artifact["uri"] = artifact["path"]
    written.save(str(folder / "MLmodel"))


def _register(
    client: MlflowClient,
    record: StudyRecord,
    card: str,
    lineage: Mapping[str, str],
    *,
    run_id: str,
    model_id: str,
) -> ModelVersion:
    name = model_name(record.protocol.study.name)
    if not client.search_registered_models(f"name = '{name}'"):
        endpoint = record.protocol.study.endpoint
        client.create_registered_model(name, description=f"Late-fusion risk model for {endpoint}")
    return client.create_model_version(
        name,
        source=f"models:/{model_id}",
        run_id=run_id,
        model_id=model_id,
        tags={k: v for k, v in run_tags(record).items() if not k.startswith("mlflow.")}
        | dict(lineage),
        description=shortened(card),
    )


def _point_candidate_at(client: MlflowClient, found: ModelVersion) -> None:
    """Set the alias once: a later call must not take it back from a later candidate."""
    if COMPLETE_TAG not in found.tags:
        client.set_registered_model_alias(found.name, CANDIDATE, found.version)
        client.set_model_version_tag(found.name, found.version, COMPLETE_TAG, "true")
