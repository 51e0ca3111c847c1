"""A site's own models: its encoders as versions in an MLflow store that never leaves the site.

The store is ``runs/mlflow.db`` below the site's home. ``runs/encoders.json`` says which encoders
are in it, so that a night in which none was trained need not wait for MLflow.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from flows.identity import identity
from flows.loading import about_encoder, encoder_key
from flows.mlflow_store import (
    OWNER_TAGS,
    SQLITE,
    artifacts_below,
    client_of,
    make_store,
    model_id_of,
    now_ms,
    tracking_at,
)
from flows.model_signing import sign_model
from flows.protocol import kind_of
from flows.versions import CODE, git_commit, source_digest
from modalities.files import digest_path, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mlflow import MlflowClient
    from mlflow.entities import Metric

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

WEIGHTS: Final = "encoder.safetensors"
RUNS: Final = "runs"
STORE: Final = "mlflow.db"
REGISTERED: Final = "encoders.json"
CURVE, CARD, ABOUT = "training_curve.json", "README.md", "MLmodel"
_KEY_TAG: Final = "consilium.encoder_key"
_LIBRARIES: Final = ("numpy", "safetensors", "torch", "torchsurv")


@dataclass(frozen=True)
class SiteEncoder:
    """A version of an encoder in its site's own registry.

    Attributes
    ----------
    key
        What the encoder depends on, as :func:`flows.loading.encoder_key` gives it.
    cohort
        Digest of the cohort it was trained on, under the site's secret.
    weights
        SHA-256 of its weights.
    model_id
        Of the model in MLflow.
    """

    name: str
    version: int
    modality: str
    key: str
    cohort: str
    weights: str
    model_id: str


def encoder_name(study: str, modality: str) -> str:
    """Name of a site's registered encoder."""
    return f"{study}-{modality}-encoder"


def site_tracking_uri(settings: SiteSettings) -> str:
    """Address of the site's own store."""
    return f"{SQLITE}{settings.path(RUNS, STORE).resolve()}"


def registered_encoders(settings: SiteSettings) -> list[SiteEncoder]:
    """List every encoder that the site has registered, oldest first; MLflow is not asked."""
    try:
        values = json.loads(settings.path(RUNS, REGISTERED).read_bytes())
        return [SiteEncoder(**x) for x in values]
    except (OSError, ValueError, TypeError):
        return []


def encoder_folder(settings: SiteSettings, encoder: SiteEncoder) -> Path | None:
    """Folder of a registered encoder's files, with its signature; None where it was deleted."""
    return artifacts_below(settings.path(RUNS), "models", encoder.model_id)


def unregistered(settings: SiteSettings, protocol: StudyProtocol, cohort: str) -> dict[str, str]:
    """Find the encoders trained on a cohort that are not registered yet: modality and key."""
    known = {encoder.key for encoder in registered_encoders(settings)}
    found = {name: about_encoder(settings.path("encoders", name)) for name in protocol.modalities}
    return {
        name: str(about["key"])
        for name, about in found.items()
        if about is not None
        and about["trained"]
        and about["key"] == encoder_key(cohort, protocol, name)
        and about["key"] not in known
    }


def register_encoders(settings: SiteSettings, protocol: StudyProtocol, cohort: str) -> int:
    """Register the trained encoders that are not registered yet, and give how many there were.

    Parameters
    ----------
    cohort
        Keyed digest of the cohort that they were trained on.
    """
    new = unregistered(settings, protocol, cohort)
    if not new:
        return 0
    uri = site_tracking_uri(settings)
    make_store(uri)
    client = client_of(uri)
    with tracking_at(uri):
        experiment = _experiment(client, settings, protocol)
        for modality, key in new.items():
            of = (modality, key, cohort)
            done = _registered(client, protocol, of)
            done = done or _register(client, experiment, settings, protocol, of)
            _remember(settings, done)
    return len(new)


def encoder_card(settings: SiteSettings, protocol: StudyProtocol, tags: Mapping[str, str]) -> str:
    """Describe an encoder of the site's own, in Markdown; for people at the site."""
    modality = tags["consilium.modality"]
    spec = protocol.encoder[modality]
    lines = [
        f"# {encoder_name(protocol.study.name, modality)}",
        "",
        f"Encoder of {modality} ({kind_of(protocol.modality[modality])}) of {settings.name} in the "
        f"study {protocol.study.name}, trained here on this site's own patients. It gives a log "
        "hazard of each patient; higher is worse.",
        "",
        "**It never leaves this site.** Its weights were made from patients' data.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name.removeprefix('consilium.')} | {value} |" for name, value in tags.items()),
        "",
        "## Specification",
        "",
        "```json",
        json.dumps(spec.model_dump(mode="json"), indent=1, sort_keys=True),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _registered(
    client: MlflowClient, protocol: StudyProtocol, of: tuple[str, str, str]
) -> SiteEncoder | None:
    """Find a version that a killed process registered without noting it."""
    modality, key, cohort = of
    name = encoder_name(protocol.study.name, modality)
    found = client.search_model_versions(f"name = '{name}' and tags.`{_KEY_TAG}` = '{key}'")
    if not found:
        return None
    last = max(found, key=lambda x: int(x.version))
    weights = last.tags["consilium.weights"]
    return SiteEncoder(name, int(last.version), modality, key, cohort, weights, model_id_of(last))


def _register(
    client: MlflowClient,
    experiment: str,
    settings: SiteSettings,
    protocol: StudyProtocol,
    of: tuple[str, str, str],
) -> SiteEncoder:
    """Log one encoder with its training curve, sign it, and make it a version."""
    modality, key, cohort = of
    source = settings.path("encoders", modality)
    name = encoder_name(protocol.study.name, modality)
    weights = digest_path(source / WEIGHTS)
    tags = _tags(protocol, modality=modality, key=key, cohort=cohort, weights=weights)
    run = client.create_run(experiment, tags=OWNER_TAGS | tags, run_name=f"train-{modality}")
    model = client.create_logged_model(experiment, name, run.info.run_id, tags=tags)
    with TemporaryDirectory() as written:
        folder = Path(written)
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        if (source / CURVE).is_file():
            shutil.copyfile(source / CURVE, folder / CURVE)
        card = encoder_card(settings, protocol, tags)
        (folder / CARD).write_text(card, encoding="utf-8")
        _write_about(folder, run.info.run_id, model.model_id, tags)
        study = protocol.study.name
        signed = sign_model(folder, identity(settings.home), study=study, run=run.info.run_id)
        client.log_model_artifacts(model.model_id, str(folder))
    _log_maps(client, run.info.run_id, settings, protocol, modality)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_batch(
        run.info.run_id, curve_metrics(source / CURVE, run.info.run_id, model.model_id)
    )
    client.set_terminated(run.info.run_id)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name, description="This site's own; it never leaves.")
    version = client.create_model_version(
        name,
        source=f"models:/{model.model_id}",
        run_id=run.info.run_id,
        model_id=model.model_id,
        tags=tags
        | {"consilium.signed_by": signed.signed_by, "consilium.signature": signed.signature},
        description=card,
    )
    return SiteEncoder(
        name, int(version.version), modality, key, cohort, weights, str(model.model_id)
    )


def _log_maps(
    client: MlflowClient,
    run_id: str,
    settings: SiteSettings,
    protocol: StudyProtocol,
    modality: str,
) -> None:
    if kind_of(protocol.modality[modality]) == "pathology":
        from flows.explain import log_training_maps

        log_training_maps(client, run_id, settings, protocol, modality)


def _tags(
    protocol: StudyProtocol, *, modality: str, key: str, cohort: str, weights: str
) -> dict[str, str]:
    return {
        "consilium.study": protocol.study.name,
        "consilium.modality": modality,
        _KEY_TAG: key,
        "consilium.cohort": cohort,
        "consilium.weights": weights,
        "consilium.protocol": protocol.fingerprint(),
        "consilium.spec": protocol.modality[modality].fingerprint(),
        "consilium.code": git_commit(),
        "consilium.source": source_digest(*CODE),
        "consilium.libraries": ", ".join(f"{x} {installed_version(x)}" for x in _LIBRARIES),
    }


def _write_about(folder: Path, run_id: str, model_id: str, tags: Mapping[str, str]) -> None:
    """Write what MLflow shows of a model; no flavour, because it is loaded by the site's flows."""
    from mlflow.models import Model

    about = Model(run_id=run_id, model_id=model_id, model_uuid=model_id, metadata=dict(tags))
    about.save(str(folder / ABOUT))


def curve_metrics(path: Path, run_id: str, model_id: str) -> list[Metric]:
    """Losses by step, of each configuration that training tried."""
    from mlflow.entities import Metric

    try:
        tried = json.loads(path.read_bytes())["tried"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    at = now_ms()
    found = [
        Metric(f"loss/{number:02d}-{one.get('model', '')}", float(loss), at, int(step), model_id,
               run_id=run_id)
        for number, one in enumerate(tried, start=1)
        for step, loss in one.get("loss_by_step", [])
    ]  # fmt: skip
    return [metric for metric in found if math.isfinite(metric.value)][:1000]


def _experiment(client: MlflowClient, settings: SiteSettings, protocol: StudyProtocol) -> str:
    name = f"{settings.name}/{protocol.study.name}"
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    where = settings.path(RUNS, "artifacts", protocol.study.name).absolute()
    return str(client.create_experiment(name, artifact_location=where.as_uri()))


def _remember(settings: SiteSettings, done: SiteEncoder) -> None:
    known = [*registered_encoders(settings), done]
    with replacing(settings.path(RUNS, REGISTERED)) as temporary:
        temporary.write_text(json.dumps([vars(x) for x in known], indent=1) + "\n")


def encoders_of(settings: SiteSettings, study: str, cohort: str) -> Iterable[SiteEncoder]:
    """Give the encoders of a study that were trained on a cohort, the last of each modality."""
    mine = [x for x in registered_encoders(settings) if x.cohort == cohort]
    last = {x.modality: x for x in mine if x.name == encoder_name(study, x.modality)}
    return last.values()
