"""A finished study in MLflow: its run, its rounds, and a version of its model with its lineage."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.figures import figures
from flows.protocol import kind_of
from flows.report_files import RECORD
from flows.reports import is_external, results_table, to_markdown
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PERSONALISED, PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric
    from mlflow.entities.model_registry import ModelVersion

    from flows.records import StudyRecord
    from fusion.evaluation import Estimate
    from fusion.federation import RoundRecord, SiteOutcome

CANDIDATE = "candidate"
ARM_KEYS = {
    PROTOCOL: "federated",
    LOCAL_ENCODERS: "federated_local_encoders",
    LOCAL_ONLY: "local_only",
    PERSONALISED: "personalised",
}
_TEMPLATE = Path(__file__).resolve().parents[1] / "mlflow" / "model_card.md.template"
_RUN_TAG, _DONE_TAG = "consilium.run", "consilium.complete"
_MAX_DESCRIPTION = 5000  # the registry's column
_DIGEST_CHARACTERS = 32  # of at most 36 that MLflow keeps
_SQLITE = "sqlite:///"
_COMMIT = re.compile(r"[0-9a-f]{40}")


class RegistryError(RuntimeError):
    """A registry, or a part of the installation that it needs, that cannot be used."""


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


def quiet_mlflow() -> None:
    """Keep MLflow from calling home, from chatting, and from copying files it finds around it."""
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true",
        DO_NOT_TRACK="true",
        MLFLOW_UV_AUTO_DETECT="false",
        MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING="false",
        MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true",
        MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
    )
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


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
    if tracking_uri.startswith(_SQLITE) and not _database(tracking_uri).exists():
        return None
    found = _version_of(_client(tracking_uri), study, run)
    return _reused(found) if found is not None and _DONE_TAG in found.tags else None


def track_study(
    record: StudyRecord,
    *,
    tracking_uri: str,
    artifact_root: Path | None = None,
    report: Path | None = None,
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

    Raises
    ------
    RegistryError
        If the template of the model card is missing from the installation.
    """
    card = model_card(record)
    if tracking_uri.startswith(_SQLITE):
        _database(tracking_uri).parent.mkdir(parents=True, exist_ok=True)
    client = _client(tracking_uri)
    found = _version_of(client, record.protocol.study.name, record.run)
    if found is not None:
        _point_candidate_at(client, found)
        return _reused(found)
    experiment = _experiment(client, record, tracking_uri, artifact_root)
    _remove_unfinished(client, experiment, record.run)
    run_id, model_id = _log_study(client, experiment, record, card, report=report)
    with _tracking_at(tracking_uri):
        registered = _register(client, record, card, run_id=run_id, model_id=model_id)
    _point_candidate_at(client, registered)
    return Registered(registered.name, int(registered.version), run_id, reused=False)


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


def _client(tracking_uri: str) -> MlflowClient:
    quiet_mlflow()
    with _ignoring_warnings():
        from mlflow import MlflowClient

        # Importing MLflow sets its loggers up, once more to be kept quiet.
        quiet_mlflow()
        return MlflowClient(tracking_uri, tracking_uri)


@contextmanager
def _ignoring_warnings() -> Iterator[None]:
    # MLflow warns of its own type hints, and of its database library's, while it is imported.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _database(tracking_uri: str) -> Path:
    return Path(tracking_uri.removeprefix(_SQLITE))


def _version_of(client: MlflowClient, study: str, run: str) -> ModelVersion | None:
    found = client.search_model_versions(
        f"name = '{model_name(study)}' and tags.`{_RUN_TAG}` = '{run}'", max_results=1
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
        if tracking_uri.startswith(_SQLITE):
            root = artifact_root or _database(tracking_uri).parent / "artifacts"
            location = (root.absolute() / study).as_uri()
        return str(client.create_experiment(name, artifact_location=location))
    if found.lifecycle_stage != "active":
        client.restore_experiment(found.experiment_id)
    return str(found.experiment_id)


def _remove_unfinished(client: MlflowClient, experiment: str, run: str) -> None:
    mine = f"tags.`{_RUN_TAG}` = '{run}'"
    for model in client.search_logged_models([experiment], filter_string=mine):
        client.delete_logged_model(model.model_id)
    while left := client.search_runs([experiment], filter_string=mine):
        for found in left:
            client.delete_run(found.info.run_id)


def _log_study(
    client: MlflowClient, experiment: str, record: StudyRecord, card: str, *, report: Path | None
) -> tuple[str, str]:
    from mlflow.entities import LoggedModelOutput, Param

    tags = _run_tags(record)
    params = _params(record)
    now_ms = _now_ms()
    starts_ms = now_ms - math.ceil(1000 * sum(r.seconds for r in record.fitted.rounds))
    run = client.create_run(
        experiment, start_time=starts_ms, tags=tags, run_name=f"study-{record.run[:8]}"
    )
    run_id = run.info.run_id
    model = client.create_logged_model(
        experiment, model_name(record.protocol.study.name), run_id, tags=tags, params=params
    )
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with TemporaryDirectory() as folder:
        _save_model(Path(folder) / "model", record, run_id=run_id, model_id=model.model_id)
        client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
        _save_artifacts(Path(folder) / "run", record, card)
        for path in () if report is None else (report, report.with_name(RECORD)):
            shutil.copy(path, Path(folder) / "run")
        client.log_artifacts(run_id, str(Path(folder) / "run"))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_inputs(run_id, _dataset_inputs(record))
    metrics = _metrics(record, run_id=run_id, model_id=model.model_id, timestamp_ms=now_ms)
    client.log_batch(run_id, metrics, [Param(k, v) for k, v in params.items()])
    _log_rounds(client, experiment, record, run_id=run_id, starts_ms=starts_ms)
    client.set_terminated(run_id, end_time=now_ms)
    return run_id, model.model_id


def _log_rounds(
    client: MlflowClient, experiment: str, record: StudyRecord, *, run_id: str, starts_ms: int
) -> None:
    """Log a child run per communication round, at the times it took, one after another."""
    from mlflow.entities import Metric, Param

    tags = {**_owner_tags(record), "mlflow.parentRunId": run_id}
    ends_s = 0.0
    for done in record.fitted.rounds:
        begins_ms, ends_s = starts_ms + round(1000 * ends_s), ends_s + done.seconds
        ends_ms = starts_ms + round(1000 * ends_s)
        name = f"round-{done.number:02d}-{done.stage}"
        child = client.create_run(experiment, start_time=begins_ms, tags=tags, run_name=name)
        client.log_batch(
            child.info.run_id,
            [Metric(key, value, ends_ms, done.number) for key, value in _of_round(done).items()],
            [Param("stage", done.stage), Param("round", str(done.number))],
        )
        client.set_terminated(child.info.run_id, end_time=ends_ms)


def _of_round(done: RoundRecord) -> dict[str, float]:
    found = {
        "n_sites": float(done.n_sites),
        "n_fits": float(done.n_fits),
        "bytes_sent": float(done.bytes_sent),
        "bytes_received": float(done.bytes_received),
        "seconds": done.seconds,
        "objective": done.objective,
    }
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _owner_tags(record: StudyRecord) -> dict[str, str]:
    # MLflow would otherwise name the account and the script's path.
    return {
        _RUN_TAG: record.run,
        "mlflow.user": "consilium",
        "mlflow.source.name": "consilium",
        "mlflow.source.type": "JOB",
    }


def _run_tags(record: StudyRecord) -> dict[str, str]:
    study, fitted = record.protocol.study, record.fitted
    tags = {
        **_owner_tags(record),
        "consilium.protocol": record.protocol.fingerprint(),
        "consilium.code": record.code_version,
        "consilium.study": study.name,
        "consilium.data": study.data,
        "consilium.sites": ",".join(s.site for s in fitted.sites if s.trains and not s.code),
        "consilium.external_sites": ",".join(s.site for s in fitted.sites if is_external(s)),
        "consilium.rounds": str(max(fitted.fit_rounds.values(), default=0)),
        "consilium.lowered_minimums": "; ".join(record.protocol.privacy.lowered()),
    }
    if _COMMIT.fullmatch(record.code_version):
        tags["mlflow.source.git.commit"] = record.code_version
    return {key: value for key, value in tags.items() if value}


def _params(record: StudyRecord) -> dict[str, str]:
    """Flatten the protocol's settings; extractors' specs are in the artifact ``protocol.json``."""
    protocol = record.protocol
    found: dict[str, Any] = {}
    for section in ("study", "fusion", "federation", "evaluation", "privacy", "gates"):
        values = getattr(protocol, section).model_dump(mode="json")
        found |= {f"{section}.{key}": value for key, value in values.items()}
    for name in protocol.modalities:
        encoder = protocol.encoder[name]
        found[f"modality.{name}.kind"] = kind_of(protocol.modality[name])
        found[f"encoder.{name}.model"] = encoder.model
        found[f"encoder.{name}.sharing"] = encoder.sharing
        found[f"encoder.{name}.ridge"] = encoder.ridge
    return {key: _text(value) for key, value in found.items()}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_text(part)}" for key, part in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


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

    return MetaDataset(SiteSource(), name=site.site, digest=site.cohort[:_DIGEST_CHARACTERS])


def _metrics(record: StudyRecord, *, run_id: str, model_id: str, timestamp_ms: int) -> list[Metric]:
    from mlflow.entities import Metric

    digests = {s.site: s.cohort[:_DIGEST_CHARACTERS] for s in record.fitted.sites if s.cohort}
    own = [*_consortium_values(record).items(), *_reference_values(record).items()]
    metrics = [
        Metric(key, value, timestamp_ms, 0, model_id=model_id, run_id=run_id) for key, value in own
    ]
    for site, values in _site_values(record).items():
        of_data = {"dataset_name": site, "dataset_digest": digests[site]} if site in digests else {}
        metrics += [
            Metric(f"{site}/{key}", value, timestamp_ms, 0, model_id, run_id=run_id, **of_data)
            for key, value in values.items()
        ]
    metrics += [
        Metric(f"objective/{r.stage}", r.objective, timestamp_ms, r.number, run_id=run_id)
        for r in record.fitted.rounds
        if math.isfinite(r.objective)
    ]
    return [metric for metric in metrics if math.isfinite(metric.value)]


def arm_key(arm: str) -> str:
    """Name of an arm in metrics and tags."""
    return ARM_KEYS.get(arm, arm.replace(".", "_"))


def _consortium_values(record: StudyRecord) -> dict[str, float]:
    fitted = record.fitted
    found = {
        "n_patients": float(fitted.n_patients),
        "n_events": float(fitted.n_events),
        "n_test_events": float(sum(s.n_test_events for s in fitted.sites)),
        "n_training_sites": float(sum(s.trains and not s.code for s in fitted.sites)),
        "n_communications": float(len(fitted.rounds)),
        "bytes_sent": float(sum(r.bytes_sent for r in fitted.rounds)),
        "bytes_received": float(sum(r.bytes_received for r in fitted.rounds)),
        "federation_seconds": sum(r.seconds for r in fitted.rounds),
    }
    for arm, result in record.results.arms.items():
        scores = {
            "concordance": result.concordance,
            "uno_concordance": result.uno,
            "time_dependent_auc": result.auc,
            "concordance_difference": result.difference,
            "observed_expected": result.observed_expected,
            "calibration_slope": result.calibration_slope,
            "integrated_brier_score": result.brier,
            "integrated_brier_score_null": result.null_brier,
        }
        for name, estimate in scores.items():
            found |= _with_interval(f"{arm_key(arm)}/{name}", estimate)
        if result.log_rank is not None:
            found[f"{arm_key(arm)}/log_rank_p"] = result.log_rank.p_value
    found |= _with_interval("leave_one_site_out/concordance", record.results.left_out_pooled)
    for name, ridge in fitted.ridge.items():
        found[f"ridge/{name}"] = ridge
    return found


def _reference_values(record: StudyRecord) -> dict[str, float]:
    reference = record.reference
    if reference is None:
        return {}
    found = {
        "reference/local_mean/concordance": reference.local_mean,
        "reference/max_coefficient_gap": reference.max_coefficient_gap,
    }
    for arm, estimate in reference.concordance.items():
        found |= _with_interval(f"reference/{arm}/concordance", estimate)
    return found


def _site_values(record: StudyRecord) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for arm, result in record.results.arms.items():
        for site, estimate in result.by_site.items():
            values = found.setdefault(site, {})
            values |= _with_interval(f"{arm_key(arm)}/concordance", estimate)
    return found


def _with_interval(key: str, estimate: Estimate | None) -> dict[str, float]:
    if estimate is None:
        return {}
    return {key: estimate.value, f"{key}_low": estimate.low, f"{key}_high": estimate.high}


def _save_artifacts(folder: Path, record: StudyRecord, card: str) -> None:
    (folder / "figures").mkdir(parents=True)
    (folder / "model_card.md").write_text(card, encoding="utf-8")
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
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_model(folder: Path, record: StudyRecord, *, run_id: str, model_id: str) -> None:
    """Write the model as MLflow loads it: code, numbers, signature; no path of this machine."""
    with _ignoring_warnings():
        import mlflow.pyfunc

        from flows import fusion_pyfunc
    from mlflow.models import Model

    model = record.fitted.models[PROTOCOL]
    grid_days = record.protocol.study.grid_days
    fusion = folder.parent / "fusion.json"
    fusion.write_text(model.to_json(), encoding="utf-8")
    outputs = ["log_hazard", "log_hazard_se", *fusion_pyfunc.output_columns(grid_days)]
    mlflow.pyfunc.save_model(
        path=str(folder),
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
        python_model=str(Path(fusion_pyfunc.__file__)),
        artifacts={"fusion": str(fusion)},
        model_config={"grid_days": list(grid_days)},
        signature=_signature(model.modalities, outputs),
        input_example=_input_example(model.modalities),
        pip_requirements=[f"{x}=={installed_version(x)}" for x in ("numpy", "pandas")],
        metadata={"consilium": installed_version("consilium"), _RUN_TAG: record.run},
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
    client: MlflowClient, record: StudyRecord, card: str, *, run_id: str, model_id: str
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
        tags={k: v for k, v in _run_tags(record).items() if not k.startswith("mlflow.")},
        description=_shortened(card),
    )


def _shortened(card: str) -> str:
    if len(card) <= _MAX_DESCRIPTION:
        return card
    pointer = "\n\n(shortened; the whole card is the run's artifact model_card.md)\n"
    return card[: _MAX_DESCRIPTION - len(pointer)].rsplit("\n", 1)[0] + pointer


def _point_candidate_at(client: MlflowClient, found: ModelVersion) -> None:
    """Set the alias once: a later call must not take it back from a later candidate."""
    if _DONE_TAG not in found.tags:
        client.set_registered_model_alias(found.name, CANDIDATE, found.version)
        client.set_model_version_tag(found.name, found.version, _DONE_TAG, "true")


@contextmanager
def _tracking_at(tracking_uri: str) -> Iterator[None]:
    """Set the process's tracking address, which MLflow's database store asks for the new model."""
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
