"""A registered model read back whole: the fusion model, shared encoders, and its protocol."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flows.mlflow_store import SQLITE, client_of, database_of
from flows.protocol import ProtocolError, read_protocol
from flows.provenance import LINEAGE_FILE, read_provenance
from fusion.late import LinearEncoder
from modalities.files import digest_path, fingerprint

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel
    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol
    from fusion.late import FusionModel
    from infra.settings import Workspace

    Floats = NDArray[np.float64]

CHAMPION: Final = "champion"
_URI: Final = "models:/"
_NAMED: Final = re.compile(r"([^/@:]+)(?:@([^/@]+)|/([0-9]{1,9}))?")
_ENCODERS, _NETWORKS, _PROTOCOL = "encoders.json", "networks.json", "protocol.json"


class PredictionRefused(ValueError):
    """A model, a cohort or a patient that no risk can be given for; the message says why."""


@dataclass(frozen=True)
class StudyModel:
    """One version of a study's model, ready to score a site's patients.

    Attributes
    ----------
    aliases
        Under which the registry knows the version now, sorted.
    run
        Of the study, as sites remember it.
    registered_ms
        When it was registered, in milliseconds since 1970.
    protocol
        Of the run that made it, whatever the folder's study.toml says today.
    fingerprint
        Of that protocol, as the run wrote it; later versions of ours may know more keys.
    fusion
        The fusion model itself.
    encoders, networks
        What the consortium shares: linear encoders, and flat weights of networks.
    pyfunc
        The model as MLflow serves it.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run: str
    registered_ms: int
    protocol: StudyProtocol
    fingerprint: str
    fusion: FusionModel
    encoders: dict[str, LinearEncoder]
    networks: dict[str, Floats]
    pyfunc: PyFuncModel

    @property
    def title(self) -> str:
        """Name and version, as a person writes them."""
        return f"{self.name} version {self.version}"


def open_model(workspace: Workspace, study: str, model: str | None = None) -> StudyModel:
    """Find a registered model, and read it with everything that scoring needs.

    Parameters
    ----------
    study
        Whose model is meant where ``model`` names none.
    model
        ``name``, ``name@alias``, ``name/version``, either after ``models:/``; by default the
        champion, or else the candidate.

    Raises
    ------
    PredictionRefused
        If there is none, or its parts do not belong together.
    """
    client = _client(workspace)
    found = find_version(client, model, study)
    encoders, networks, protocol = _shared_parts(client, found, workspace)
    pyfunc = _load(f"{_URI}{found.name}/{found.version}", workspace)
    fusion: FusionModel = pyfunc.unwrap_python_model().model
    if fusion.modalities != protocol.modalities:
        raise PredictionRefused(
            "model: found other modalities than its protocol's, needed the same; register it again"
        )
    return StudyModel(
        name=str(found.name),
        version=int(found.version),
        aliases=tuple(sorted(found.aliases)),
        run=str(found.tags.get("consilium.run", "")),
        registered_ms=int(found.creation_timestamp),
        protocol=protocol,
        fingerprint=str(found.tags["consilium.protocol"]),
        fusion=fusion,
        encoders=encoders,
        networks=networks,
        pyfunc=pyfunc,
    )


def find_version(client: MlflowClient, model: str | None, study: str) -> ModelVersion:
    """Find the version that a person means.

    Raises
    ------
    PredictionRefused
        If the text names no model, or the registry has none of that name, alias or version.
    """
    from flows.registry import CANDIDATE, model_name  # its figures take a second to import

    text = model_name(study) if model is None else model.removeprefix(_URI)
    parts = _NAMED.fullmatch(text)
    if parts is None:
        raise PredictionRefused(
            f"--model: found {text!r}, needed a name, name@alias or name/version"
        )
    name, alias, version = parts.groups()
    if version is not None:
        found = _or_none(lambda: client.get_model_version(name, str(int(version))))
    else:
        aliases = (alias,) if alias else (CHAMPION, CANDIDATE)
        tried = (_aliased(client, name, one) for one in aliases)
        found = next((one for one in tried if one is not None), None)
    if found is None:
        raise PredictionRefused(
            f"model: found no {text} in the registry, needed a registered model; run the study, "
            "or name one as `consilium ui` shows it"
        )
    return found


def _aliased(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    return _or_none(lambda: client.get_model_version_by_alias(name, alias))


def _or_none(ask: Any) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        missing = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        if error.error_code not in missing:
            raise
        return None


def _client(workspace: Workspace) -> MlflowClient:
    uri = workspace.mlflow_uri
    if uri.startswith(SQLITE) and not database_of(uri).is_file():
        raise PredictionRefused(
            "registry: found no mlflow.db in the folder, needed the registry of the study; name "
            "its server in CONSILIUM_TRACKING_URI"
        )
    return client_of(uri)


def _load(uri: str, workspace: Workspace) -> PyFuncModel:
    """Load a model that the coordinator signed; nothing else of ours loads one to predict."""
    from flows.model_signing import load_signed

    return load_signed(uri, workspace)


def _shared_parts(
    client: MlflowClient, found: ModelVersion, workspace: Workspace
) -> tuple[dict[str, LinearEncoder], dict[str, Floats], StudyProtocol]:
    """Read what the version's run keeps beside the model."""
    from mlflow.exceptions import MlflowException

    try:
        with TemporaryDirectory() as folder:
            for name in (_ENCODERS, _NETWORKS, _PROTOCOL, LINEAGE_FILE):
                client.download_artifacts(found.run_id, name, folder)
            signed = _are_signed(Path(folder), workspace)
            values = {
                name: json.loads((Path(folder) / name).read_text())
                for name in (_ENCODERS, _NETWORKS, _PROTOCOL)
            }
        encoders = {k: LinearEncoder.from_dict(v) for k, v in values[_ENCODERS].items()}
        networks = {k: np.array(v, dtype=np.float64) for k, v in values[_NETWORKS].items()}
        protocol = read_protocol(values[_PROTOCOL], source=_PROTOCOL)
    except (MlflowException, OSError, ValueError, TypeError, KeyError, ProtocolError):
        raise PredictionRefused(
            "model: found its run without readable encoders and protocol, needed them as the "
            "study wrote them; run the study again"
        ) from None
    made = signed and fingerprint(values[_PROTOCOL]) == found.tags.get("consilium.protocol")
    sums = protocol.sums_inputs()
    if not made or any(sums.get(x) != encoder.inputs for x, encoder in encoders.items()):
        raise PredictionRefused(
            "model: found a protocol or encoders beside it that it was not made with, needed those "
            "of its run; `consilium lineage verify` says what changed"
        )
    return encoders, networks, protocol


def _are_signed(folder: Path, workspace: Workspace) -> bool:
    """Whether the coordinator signed these very files, as the version's lineage says."""
    from flows.model_signing import trusted_keys

    said = read_provenance(folder / LINEAGE_FILE)
    return (
        said.is_signed()
        and said.signed_by in trusted_keys(workspace.root)
        and all(
            digest_path(folder / name) == said.artifacts.get(name)
            for name in (_ENCODERS, _NETWORKS, _PROTOCOL)
        )
    )
