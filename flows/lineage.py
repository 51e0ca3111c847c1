"""Where a registered version comes from, followed back to the digests of each site's raw inputs."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any, Final

from flows.inputs import keyed_digest
from flows.mlflow_store import (
    SQLITE,
    RegistryError,
    artifacts_below,
    client_of,
    database_of,
    model_id_of,
    quietly_imported,
    tracking_at,
    version_at,
)
from flows.protocol import ProtocolError, load_protocol, read_protocol
from flows.provenance import LINEAGE_FILE, LineageError, read_provenance
from flows.site_registry import encoders_of, registered_encoders
from flows.snapshots import COHORT, FEATURES, FOLDER
from modalities.cohort import cohort_digest, read_cohort
from modalities.files import fingerprint
from modalities.pathology import read_marks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mudata import MuData

    from flows.protocol import StudyProtocol
    from flows.provenance import Provenance
    from infra.settings import SiteSettings, Workspace

FUSION: Final = "-fusion"
_MODELS: Final = "models:/"
_INPUT: Final = "input_digest"


@dataclass(frozen=True)
class Lineage:
    """One version of a model with everything of it that this machine can reach.

    Attributes
    ----------
    version
        As the registry knows it.
    aliases
        Names that point at it.
    run, model
        Folders of the run's artifacts and of the model; copies where a server keeps them.
    """

    workspace: Workspace
    client: MlflowClient
    version: ModelVersion
    aliases: tuple[str, ...]
    run: Path
    model: Path

    @cached_property
    def statement(self) -> Provenance:
        """What was signed at registration; raises :class:`LineageError` where it cannot be read."""
        return read_provenance(self.run / LINEAGE_FILE)

    @cached_property
    def protocol(self) -> StudyProtocol:
        """The protocol of the version, whatever the folder's ``study.toml`` says now."""
        try:
            return read_protocol(json.loads((self.run / "protocol.json").read_bytes()))
        except (OSError, ValueError):
            raise LineageError(
                "protocol.json: found no readable one with this version, needed that of its run; "
                "restore it from a backup"
            ) from None


@dataclass(frozen=True)
class SiteInputsFound:
    """What a version took from a site whose files are on this machine.

    Attributes
    ----------
    snapshot
        Number of the frozen cohort.
    inputs
        Per modality the digests of its raw inputs, sorted; of a registry one for all its rows.
    patients
        Per modality how many have it.
    encoders
        Per encoder that the site registered for itself, its version and the digest of its weights.
    """

    snapshot: int
    patients: dict[str, int]
    inputs: dict[str, list[str]]


@contextmanager
def opened_lineage(workspace: Workspace, model: str | None = None) -> Iterator[Lineage]:
    """Find a version and fetch what belongs to it.

    Parameters
    ----------
    model
        ``name``, ``name@alias`` or ``name/version``, either after ``models:/``; by default the
        newest version of the folder's study.

    Raises
    ------
    LineageError
        If there is none, or MLflow does not have its artifacts.
    """
    uri = workspace.mlflow_uri
    if uri.startswith(SQLITE) and not database_of(uri).is_file():
        raise LineageError(
            "registry: found no mlflow.db in the folder, needed that of a study's coordinator; "
            "name its server in CONSILIUM_TRACKING_URI"
        )
    client = client_of(uri)
    version = _version(client, workspace, model)
    with ExitStack() as stack:
        stack.enter_context(tracking_at(uri))
        run = artifacts_below(workspace.root, version.run_id) or _fetched(
            stack, f"runs:/{version.run_id}/"
        )
        folder = artifacts_below(workspace.root, "models", model_id_of(version)) or _fetched(
            stack, f"{_MODELS}{version.name}/{version.version}"
        )
        aliases = client.get_registered_model(version.name).aliases
        mine = sorted(x for x, of in aliases.items() if str(of) == str(version.version))
        yield Lineage(workspace, client, version, tuple(mine), run, folder)


def _fetched(stack: ExitStack, uri: str) -> Path:
    import shutil

    from mlflow.exceptions import MlflowException

    folder = mkdtemp()
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    try:
        artifacts = quietly_imported("mlflow.artifacts")
        return Path(artifacts.download_artifacts(uri, dst_path=folder))
    except (OSError, MlflowException):
        raise LineageError(
            "artifacts: found none of this version, needed those that its registration wrote; "
            "restore them from a backup"
        ) from None


def _version(client: MlflowClient, workspace: Workspace, model: str | None) -> ModelVersion:
    text = "" if model is None else model.removeprefix(_MODELS)
    if "@" in text or "/" in text:
        try:
            found = version_at(client, text)
        except RegistryError as error:
            raise LineageError(str(error)) from None
        return client.get_model_version(found.name, found.version)
    name = text or _study_model(workspace)
    found = _versions(client, name)
    if not found and not text:
        found = _versions(client, "")  # one changed byte of study.toml may be in the study's name
    if not found:
        raise LineageError(
            f"model: found no version of {name or 'any study'} in the registry, needed one; run "
            "`consilium study run`"
        )
    return max(found, key=lambda x: (x.creation_timestamp, int(x.version)))


def _versions(client: MlflowClient, name: str) -> list[ModelVersion]:
    """All versions of a model, or of every study's."""
    wanted = f"name = '{name}'" if name and "'" not in name else None
    return [
        x for x in client.search_model_versions(wanted) if x.name == name or x.name.endswith(FUSION)
    ]


def _study_model(workspace: Workspace) -> str:
    """Name the folder's model; nothing where ``study.toml`` cannot be read any more."""
    try:
        return f"{load_protocol(workspace.study_file).study.name}{FUSION}"
    except (ProtocolError, OSError):
        return ""


def lineage_values(found: Lineage) -> dict[str, Any]:
    """Give the whole tree as plain values; no path, and no name but those of study and sites."""
    said = found.statement
    return {
        "model": found.version.name,
        "version": int(found.version.version),
        "aliases": list(found.aliases),
        "run": said.run,
        "mlflow_run": found.version.run_id,
        "protocol": said.protocol,
        "commit": said.commit,
        "code": said.code,
        "lock": said.lock,
        "encoders": dict(said.encoders),
        "signed_by": said.signed_by,
        "signature": said.signature,
        "sites": [_site_values(found, site) for site in said.cohorts],
    }


def _site_values(found: Lineage, site: str) -> dict[str, Any]:
    said = found.statement
    role = "external" if site in said.external else "training"
    known = {"site": site, "role": role, "cohort": said.cohorts[site], "here": False}
    if site not in found.workspace.site_names():
        return known
    return known | _cohort_values(found.workspace.site(site), said.study, said.cohorts[site])


def _cohort_values(settings: SiteSettings, study: str, keyed: str) -> dict[str, Any]:
    inputs = site_inputs_of(settings, keyed)
    if inputs is None:
        return {}
    encoders = encoders_of(settings, study, keyed)
    return {
        "here": True,
        "snapshot": inputs.snapshot,
        "modalities": {
            name: {"patients": inputs.patients[name], "inputs": digests}
            for name, digests in inputs.inputs.items()
        },
        "own_encoders": [
            {"name": x.name, "version": x.version, "weights": x.weights} for x in encoders
        ],
    }


def site_values(settings: SiteSettings, study: str) -> dict[str, Any]:
    """Give a site's own part as plain values: its last encoders, their cohort, its raw inputs.

    Raises
    ------
    LineageError
        If the site registered no encoder yet.
    """
    known = {"site": settings.name, "role": "site", "here": False}
    cohort = last_cohort(settings)
    return known | {"cohort": cohort} | _cohort_values(settings, study, cohort)


def last_cohort(settings: SiteSettings) -> str:
    """Keyed digest of the cohort that the site's last registered encoder was trained on.

    Raises
    ------
    LineageError
        If there is none.
    """
    encoders = registered_encoders(settings)
    if not encoders:
        raise LineageError(
            "registry: found no encoder of this site, needed one; run `consilium site train`"
        )
    return encoders[-1].cohort


def site_inputs_of(settings: SiteSettings, keyed: str) -> SiteInputsFound | None:
    """Find what a site gave to a version, by the keyed digest of its cohort; None if not here."""
    found = find_snapshot(settings, keyed)
    if found is None:
        return None
    number, cohort = found
    features = settings.path(FOLDER, f"{number:04d}", FEATURES)
    return SiteInputsFound(
        snapshot=number,
        patients={name: int(table.n_obs) for name, table in cohort.mod.items()},
        inputs={name: input_digests(cohort, name, features) for name in sorted(cohort.mod)},
    )


def find_snapshot(settings: SiteSettings, keyed: str) -> tuple[int, MuData] | None:
    """Find the snapshot whose content has this keyed digest; computed anew, not as it says."""
    for path in sorted(settings.path(FOLDER).glob(f"[0-9]*/{COHORT}"), reverse=True):
        try:
            cohort = read_cohort(path)
        except Exception:  # noqa: BLE001
            continue  # readers raise what they like over a damaged file; its bytes are told apart
        if keyed_digest(settings.key, cohort_digest(cohort)) == keyed:
            return int(path.parent.name), cohort
    return None


def input_digests(cohort: MuData, modality: str, features: Path) -> list[str]:
    """Digests of the raw inputs behind one modality, each once, in an order that tells nothing."""
    obs = cohort.mod[modality].obs
    if "bag" in obs:
        bags = [x for text in obs["bag"].astype(str) for x in text.split(";")]
        marks = [read_marks(features / bag, [_INPUT]) or {} for bag in bags]
        return sorted(x.get(_INPUT, "") for x in marks)
    if "source_digest" in obs:
        return sorted(Counter(obs["source_digest"].astype(str)))
    return [fingerprint(sorted(obs["input_digest"].astype(str)))]
