"""A registered model read back whole: the fusion model, shared encoders, and its protocol."""

from __future__ import annotations

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from flows.identity import KEY_FILE, identity
from flows.mlflow_store import SQLITE, client_of, database_of
from flows.model_signing import keys_of, load_folder, read_signature
from flows.protocol import ProtocolError, read_protocol
from flows.provenance import LINEAGE_FILE, LineageError, read_provenance
from flows.version_files import (
    ENCODERS,
    NETWORKS,
    PROTOCOL,
    RUN_FILES,
    SUFFIX,
    exported,
    fetched,
    write_export,
)
from fusion.federation.consortium import COORDINATOR
from fusion.keys import digest
from fusion.late import LinearEncoder
from modalities.files import digest_path, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel
    from numpy.typing import NDArray

    from flows.protocol import StudyProtocol
    from flows.provenance import Provenance
    from flows.version_files import VersionFiles
    from fusion.late import FusionModel
    from infra.settings import Workspace

    Floats = NDArray[np.float64]

CHAMPION: Final = "champion"
_URI: Final = "models:/"
_NAMED: Final = re.compile(r"([^/@:]+)(?:@([^/@]+)|/([0-9]{1,9}))?")


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
    """Find a model of the study, and read it with everything that scoring needs.

    Parameters
    ----------
    study
        Whose model it must be.
    model
        ``name``, ``name@alias``, ``name/version``, either after ``models:/``, or the path of a file
        that ``consilium model export`` wrote; by default the champion, or else the candidate.

    Raises
    ------
    PredictionRefused
        If there is none, it is of another study, or its parts do not belong together.
    flows.model_signing.ModelNotTrusted
        If it is altered, unsigned or signed by somebody else.
    """
    with _opened(workspace, study, model) as (found, _):
        return found


def export_model(
    workspace: Workspace,
    study: str,
    model: str | None = None,
    *,
    out: Path | None = None,
    replace: bool = False,
) -> tuple[StudyModel, Path]:
    """Write a model into one signed file, for sites that reach no registry.

    Parameters
    ----------
    model
        As :func:`open_model` takes it.
    out
        By default ``NAME-VERSION.zip`` in the working folder.
    replace
        Whether a file of that name may be replaced.

    Returns
    -------
    StudyModel, Path
        What was written, and where.

    Raises
    ------
    PredictionRefused, flows.model_signing.ModelNotTrusted
        If the folder is not the coordinator's, or the model would not load here.
    """
    if not (workspace.root / COORDINATOR / KEY_FILE).is_file():
        raise PredictionRefused(
            "model export: found no key of the coordinator in this folder, needed it to sign the "
            "file; export the model at the coordinator"
        )
    key = identity(workspace.root / COORDINATOR)
    with _opened(workspace, study, model) as (found, files):
        target = Path(f"{found.name}-{found.version}{SUFFIX}") if out is None else out
        if target.exists() and not replace:
            raise PredictionRefused(
                f"model export: found {target.name} already, needed a new name; --force replaces it"
            )
        write_export(files, target, key)
    return found, target


@contextmanager
def _opened(
    workspace: Workspace, study: str, model: str | None
) -> Iterator[tuple[StudyModel, VersionFiles]]:
    keys = keys_of(workspace)
    with TemporaryDirectory() as folder:
        files = _version_files(workspace, study, model, keys=keys, into=Path(folder))
        pyfunc = load_folder(files.model, keys)
        said = _statement(files, study, keys)
        encoders, networks, protocol = _shared_parts(files.run, said)
        fusion: FusionModel = pyfunc.unwrap_python_model().model
        if fusion.modalities != protocol.modalities:
            raise PredictionRefused(
                "model: found other modalities than its protocol's, needed the same; register it "
                "again"
            )
        found = StudyModel(
            name=files.name,
            version=files.version,
            aliases=files.aliases,
            run=said.run,
            registered_ms=files.registered_ms,
            protocol=protocol,
            fingerprint=said.protocol,
            fusion=fusion,
            encoders=encoders,
            networks=networks,
            pyfunc=pyfunc,
        )
        yield found, files


def _version_files(
    workspace: Workspace, study: str, model: str | None, *, keys: frozenset[str], into: Path
) -> VersionFiles:
    if model is not None and model.endswith(SUFFIX):
        return exported(Path(model), keys, into)
    with registry_answering():
        client = _client(workspace)
        return fetched(workspace, client, find_version(client, model, study), into)


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
            "registry: found no mlflow.db in the folder, needed the registry of the study, or a "
            "file of its model; name its server in CONSILIUM_TRACKING_URI, or the file with --model"
        )
    # MLflow would wait for minutes for a server that is not there.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    return client_of(uri)


@contextmanager
def registry_answering() -> Iterator[None]:
    """Say in one sentence why a registry, or its files, cannot be read.

    Raises
    ------
    PredictionRefused
        In place of whatever MLflow and its libraries raise.
    """
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    try:
        yield
    except FileNotFoundError:
        raise _unreadable() from None
    except (MlflowException, RequestException) as error:
        raise PredictionRefused(_registry_fault(error)) from None


def _registry_fault(error: Exception) -> str:
    told = str(error)
    answer = getattr(error, "response", None)
    code = str(getattr(error, "error_code", "") if answer is None else answer.status_code)
    if code in ("UNAUTHENTICATED", "401") or "error code 401" in told:
        return (
            "registry: found no account that it lets in, needed one of it; set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or write ~/.mlflow/credentials"
        )
    if code in ("PERMISSION_DENIED", "403") or "error code 403" in told:
        return (
            "registry: found no right of this account to read the model, needed READ on it and on "
            "its experiment; ask the coordinator for both, or for the model as a file"
        )
    if "CERTIFICATE_VERIFY_FAILED" in told:
        return (
            "registry: found a certificate of an authority that is not trusted here, needed one "
            "that is; name the file of authorities in CONSILIUM_CA_FILE, or in REQUESTS_CA_BUNDLE "
            "where that is set"
        )
    if code in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "404"):
        return str(_unreadable())
    return (
        "registry: found no answer at the address of CONSILIUM_TRACKING_URI, needed its server; "
        "check address, network and proxy"
    )


def _unreadable() -> PredictionRefused:
    return PredictionRefused(
        "model: found its run without readable encoders and protocol, needed them as the study "
        "wrote them; run the study again"
    )


def _statement(files: VersionFiles, study: str, keys: frozenset[str]) -> Provenance:
    """Read what the coordinator signed of a version, and hold the version's files against it."""
    from flows.registry import model_name

    try:
        said = read_provenance(files.run / LINEAGE_FILE)
    except LineageError:
        raise _unreadable() from None
    beside = [name for name in RUN_FILES if name != LINEAGE_FILE]
    as_signed = (
        said.is_signed()
        and said.signed_by in keys
        and said.model == digest(read_signature(files.model).text())
        and all(digest_path(files.run / x) == said.artifacts.get(x) for x in beside)
    )
    if not as_signed:
        raise _of_something_else()
    if (said.study, files.name) != (study, model_name(study)):
        raise PredictionRefused(
            f"model: found {files.name} of study {said.study}, needed one of {study}, the study of "
            "this folder"
        )
    return said


def _of_something_else() -> PredictionRefused:
    return PredictionRefused(
        "model: found a protocol or encoders beside it that it was not made with, needed those of "
        "its run; `consilium lineage verify` says what changed"
    )


def _shared_parts(
    run: Path, said: Provenance
) -> tuple[dict[str, LinearEncoder], dict[str, Floats], StudyProtocol]:
    """Read what the version's run keeps beside the model."""
    try:
        values = {x: json.loads((run / x).read_text()) for x in (ENCODERS, NETWORKS, PROTOCOL)}
        encoders = {k: LinearEncoder.from_dict(v) for k, v in values[ENCODERS].items()}
        networks = {k: np.array(v, dtype=np.float64) for k, v in values[NETWORKS].items()}
        protocol = read_protocol(values[PROTOCOL], source=PROTOCOL)
    except (OSError, ValueError, TypeError, KeyError, ProtocolError):
        raise _unreadable() from None
    sums = protocol.sums_inputs()
    made = fingerprint(values[PROTOCOL]) == said.protocol
    if not made or any(sums.get(x) != encoder.inputs for x, encoder in encoders.items()):
        raise _of_something_else()
    return encoders, networks, protocol
