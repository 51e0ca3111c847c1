"""A site's own encoders, and what its MLflow shows of them, against what the site signed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import yaml  # type: ignore[import-untyped]

from flows.identity import public_key
from flows.lineage_items import Item
from flows.mlflow_store import client_of, model_id_of
from flows.model_signing import ModelNotTrusted, verify_model
from flows.site_registry import (
    ABOUT,
    CARD,
    CURVE,
    REGISTERED,
    RUNS,
    STORE,
    curve_metrics,
    encoder_folder,
    registered_encoders,
    site_tracking_uri,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mlflow import MlflowClient

    from flows.model_signing import ModelSignature
    from flows.site_registry import SiteEncoder
    from infra.settings import SiteSettings

_LISTED: Final = ("cohort", "modality", "weights")
_OURS: Final = "consilium."


def check_site_models(settings: SiteSettings) -> Iterator[Item]:
    """Check the encoders in a site's own registry, and its pages, against the site's signature."""
    encoders = registered_encoders(settings)
    if not encoders and settings.path(RUNS, REGISTERED).is_file():
        yield Item(settings.name, f"{RUNS}/{REGISTERED}", "changed", why="it cannot be read")
    if not encoders:
        return
    own, client = public_key(settings.home), None
    if settings.path(RUNS, STORE).is_file():
        client = client_of(site_tracking_uri(settings))
    else:
        yield Item(settings.name, f"{RUNS}/{STORE}", "missing")
    for encoder in encoders:
        folder = encoder_folder(settings, encoder)
        if folder is None:
            yield Item(settings.name, _title(encoder), "missing")
            continue
        try:
            signed = verify_model(folder, [own] if own else [])
        except ModelNotTrusted as error:
            yield Item(settings.name, _title(encoder), "changed", why=str(error))
            continue
        said = _said(folder, signed)
        if _listed(encoder) != {x: said.get(x) for x in _listed(encoder)}:
            why = f"what it says of {_title(encoder)} was not signed"
            yield Item(settings.name, f"{RUNS}/{REGISTERED}", "changed", why=why)
        elif client is not None:
            yield from _shown_items(settings, client, encoder, folder, said)


def _title(encoder: SiteEncoder) -> str:
    return f"{encoder.name} version {encoder.version}"


def _said(folder: Path, signed: ModelSignature) -> dict[str, str]:
    """Tags of an encoder's version, as its signed files have them."""
    metadata = yaml.safe_load((folder / ABOUT).read_text(encoding="utf-8"))["metadata"]
    own = {f"{_OURS}signed_by": signed.signed_by, f"{_OURS}signature": signed.signature}
    return {str(k): str(v) for k, v in metadata.items()} | own


def _listed(encoder: SiteEncoder) -> dict[str, str]:
    """Give what the site's list says of an encoder, by the tags that say the same."""
    found = {f"{_OURS}{x}": str(getattr(encoder, x)) for x in _LISTED}
    return found | {f"{_OURS}encoder_key": encoder.key}


def _shown_items(
    settings: SiteSettings,
    client: MlflowClient,
    encoder: SiteEncoder,
    folder: Path,
    said: Mapping[str, str],
) -> Iterator[Item]:
    """Hold what the site's MLflow shows of a version against the encoder's signed files."""
    from mlflow.exceptions import MlflowException

    name = _title(encoder)
    try:
        version = client.get_model_version(encoder.name, str(encoder.version))
    except MlflowException:
        yield Item(settings.name, f"{name} in the registry", "missing")
        return
    tags = {k: v for k, v in version.tags.items() if k.startswith(_OURS)}
    for tag in sorted({*tags, *said}):
        if tags.get(tag) != said.get(tag):
            yield Item(settings.name, f"tag {tag} of {name}", "changed")
    if version.description != (folder / CARD).read_text(encoding="utf-8"):
        yield Item(settings.name, f"description of {name}", "changed")
    if model_id_of(version) != encoder.model_id:
        yield Item(settings.name, f"model of {name}", "changed")
    curve = curve_metrics(folder / CURVE, version.run_id, encoder.model_id)
    wanted = sorted((x.key, x.step, x.value) for x in curve)
    keys = client.get_run(version.run_id).data.metrics
    shown = [
        (x.key, x.step, x.value)
        for key in keys
        for x in client.get_metric_history(version.run_id, key)
    ]
    if sorted(shown) != wanted:
        yield Item(settings.name, f"training curve of {name}", "changed")
