"""A version of a study's model as the gates look at it: record, signature, champion, approvals."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import read_approvals, sites_that_approved
from flows.decisions import PromotionRefused
from flows.gates import (
    Champion,
    Figure,
    GateInput,
    Quorum,
    arm_figure,
    cohorts_of,
)
from flows.mlflow_store import RegistryError, client_of
from flows.policy import read_policy, rules_of
from flows.protocol import load_protocol, read_protocol
from flows.provenance import LINEAGE_FILE, read_provenance
from flows.registry import model_name
from flows.report_files import RECORD
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium
from fusion.keys import canonical_json, digest
from modalities.files import digest_path, fingerprint

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from flows.protocol import StudyProtocol
    from infra.settings import Workspace

CANDIDATE, CHALLENGER, CHAMPION = "candidate", "challenger", "champion"
EVALUATION_TAG: Final = "consilium.evaluation_of"
COHORTS_TAG: Final = "consilium.cohorts"
REJECTED_TAG: Final = "consilium.rejected"
DECIDED_TAG: Final = "consilium.decided_in"
PREVIOUS_TAG: Final = "consilium.previous_champion"
NO_CHAMPION: Final = "none"
_SIGNATURE_FILES: Final = {"signature.json", "registered_model_meta"}


@dataclass(frozen=True)
class Case:
    """A version that is to be promoted, with everything that the gates look at.

    Attributes
    ----------
    model
        Digest of its files.
    champion_version
        Of the model in use; None where there is none.
    """

    study: str
    version: int
    run: str
    model: str
    champion_version: int | None
    given: GateInput


def open_case(workspace: Workspace, study: str, version: int, *, flow_run: str = "") -> Case:
    """Read a version, its run's record, its signature, and the champion that it is compared with.

    Parameters
    ----------
    flow_run
        The promotion that asks: what it decided itself does not stand in its way when it is killed
        and runs again.

    Raises
    ------
    PromotionRefused
        If there is no such version, or it was decided over already.
    """
    client = client_of(workspace.mlflow_uri)
    name = model_name(study)
    found = find(client, name, version)
    aliases = aliases_of(client, name)
    if found.tags.get(DECIDED_TAG, flow_run) != flow_run:
        _refuse_decided(found, aliases)
    record = read_record(client, found.run_id)
    protocol = protocol_of(workspace, record)
    policy = read_policy()
    champion = aliases.get(CHAMPION)
    model, signed, fault = model_digest(workspace, name, version)
    fault = fault or statement_fault(client, found, record, model=signed, root=workspace.root)
    other = champion if champion != version else _champion_before(found)
    given = GateInput(
        record=record,
        rules=rules_of(protocol, policy),
        where_not_asked=policy.where_not_asked,
        champion=None if other is None else champion_of(client, name, other, record),
        audits=audits_of(workspace, protocol, record),
        enforced=_went_over_the_engine(workspace, str(record.get("run", ""))),
        signature_fault=fault,
        approvals=approvals_of_sites(workspace.root, record),
    )
    return Case(study, version, str(record["run"]), model, other, given)


def _refuse_decided(found: ModelVersion, aliases: Mapping[str, int]) -> None:
    name, version = found.name, int(found.version)
    if found.tags.get(REJECTED_TAG):
        raise PromotionRefused(
            f"{name} version {version}: found it rejected, needed one that was not; run the study "
            "again for a new version"
        )
    if aliases.get(CHAMPION) == version:
        raise PromotionRefused(
            f"{name} version {version}: found it in use already, needed another version"
        )


def _champion_before(found: ModelVersion) -> int | None:
    """Champion that this one followed: a promotion killed after the alias moved sees the same."""
    before = found.tags.get(PREVIOUS_TAG, NO_CHAMPION)
    return int(before) if before.isdigit() else None


def find(client: MlflowClient, name: str, version: int) -> ModelVersion:
    """Look a version up.

    Raises
    ------
    PromotionRefused
        If there is none.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, str(version))
    except MlflowException:
        raise PromotionRefused(
            f"{name}: found no version {version}, needed one that `consilium study run` registered"
        ) from None


def aliases_of(client: MlflowClient, name: str) -> dict[str, int]:
    """Version per alias of a model; none where there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = client.get_registered_model(name).aliases
    except MlflowException:
        return {}
    return {alias: int(version) for alias, version in aliases.items()}


def read_record(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """Read the record of a study's run from its artifacts.

    Raises
    ------
    PromotionRefused
        If it has none.
    """
    from mlflow.exceptions import MlflowException

    with TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, RECORD, folder)
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except (MlflowException, OSError, ValueError):
            record = None
    if not isinstance(record, dict):
        raise PromotionRefused(
            f"{RECORD}: found none among the run's artifacts, needed it for the gates; run the "
            "study again"
        )
    return record


def protocol_of(workspace: Workspace, record: Mapping[str, Any]) -> StudyProtocol:
    """Protocol of a run: as the folder's study.toml writes it, where that is still the same."""
    try:
        current = load_protocol(workspace.study_file)
    except ValueError:
        current = None
    if current is not None and current.fingerprint() == record["protocol_fingerprint"]:
        return current
    return read_protocol(dict(record["protocol"]), source=RECORD)


def champion_of(
    client: MlflowClient, name: str, version: int, record: Mapping[str, Any]
) -> Champion:
    """Figures of the model in use: on the candidate's snapshots where it was evaluated there."""
    found = find(client, name, version)
    cohorts = fingerprint(cohorts_of(record))
    evaluated = evaluation_on(client, found, cohorts)
    if evaluated is not None:
        return Champion(version, evaluated, same_evaluation=True)
    own = read_record(client, found.run_id)
    same = fingerprint(cohorts_of(own)) == cohorts
    return Champion(version, arm_figure(own, "concordance"), same_evaluation=same)


def evaluation_on(client: MlflowClient, found: ModelVersion, cohorts: str) -> Figure | None:
    """Concordance of a version as its newest evaluation on these cohorts found it, or None."""
    experiment = client.get_run(found.run_id).info.experiment_id
    runs = client.search_runs(
        [experiment],
        filter_string=f"tags.`{EVALUATION_TAG}` = '{found.version}' and "
        f"tags.`{COHORTS_TAG}` = '{cohorts}' and attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    keys = [f"concordance{x}" for x in ("", "_standard_error", "_low", "_high")]
    values = [run.data.metrics.get(key) for run in runs for key in keys]
    return Figure(*values) if values and None not in values else None


def audits_of(
    workspace: Workspace, protocol: StudyProtocol, record: Mapping[str, Any]
) -> dict[str, dict[str, bool]]:
    """Whether each network's audit passed, at the sites that are in this folder."""
    models, here = protocol.audited(), set(workspace.site_names())
    if not models or not here:
        return {}
    from flows.loading import encoder_key
    from flows.membership import may_share_weights

    cohorts = {s: x for s, x in cohorts_of(record).items() if s in here}
    return {
        model: {
            site: may_share_weights(
                workspace.site(site), protocol, model, encoder_key(cohort, protocol, model)
            )
            for site, cohort in cohorts.items()
        }
        for model in models
    }


def _went_over_the_engine(workspace: Workspace, run: str) -> bool:
    try:
        kept = json.loads((workspace.root / "runs" / run[:12] / "summary.json").read_text())
        return bool(kept["summary"]["federation"] == "flare")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def approvals_of_sites(root: Path, record: Mapping[str, Any]) -> Quorum | None:
    """How many sites approved the protocol of a run; None where no kits were provisioned."""
    path = root / "kits" / COORDINATOR / CONSORTIUM_FILE
    if not path.is_file():
        return None
    try:
        consortium = read_consortium(path)
        approvals = read_approvals(root / COORDINATOR / APPROVALS)
    except ValueError as error:
        raise PromotionRefused(str(error)) from None
    sites = sites_that_approved(
        approvals, protocol=str(record["protocol_fingerprint"]), consortium=consortium
    )
    return Quorum(len(sites), consortium.quorum)


def model_digest(workspace: Workspace, name: str, version: int) -> tuple[str, str, str]:
    """Digest of a version's files, of what is signed, and why that does not stand (else empty)."""
    from flows.model_signing import ModelNotTrusted, fetch_model, trusted_keys, verify_model

    with TemporaryDirectory() as copy:
        folder = fetch_model(f"models:/{name}/{version}", workspace, into=Path(copy))
        signed = fault = ""
        try:
            signed = digest(verify_model(folder, trusted_keys(workspace.root)).text())
        except ModelNotTrusted as error:
            fault = str(error)
        return folder_digest(folder), signed, fault


def statement_fault(
    client: MlflowClient,
    found: ModelVersion,
    record: Mapping[str, Any],
    *,
    model: str,
    root: Path,
    beside: Mapping[str, Any] | None = None,
) -> str:
    """Say why the coordinator's statement does not speak for a record and a model, else nothing.

    Whoever may write to the registry can put better figures, or another run's signed model, there.

    Parameters
    ----------
    model
        Digest of what the model's signature is over.
    beside
        What was read of other artifacts of the run, by name: the statement must speak for it, too.
    """
    from mlflow.exceptions import MlflowException

    from flows.model_signing import trusted_keys

    read = {RECORD: record, **(beside or {})}
    with TemporaryDirectory() as folder:
        try:
            said = read_provenance(
                Path(client.download_artifacts(found.run_id, LINEAGE_FILE, folder))
            )
            kept = {x: Path(client.download_artifacts(found.run_id, x, folder)) for x in read}
            changed = [
                name
                for name, path in kept.items()
                if digest_path(path) != said.artifacts.get(name)
                or fingerprint(json.loads(path.read_bytes())) != fingerprint(read[name])
            ]
        except (MlflowException, OSError, ValueError):
            return f"{LINEAGE_FILE}: found none that can be read, needed the signed one of the run"
    if not said.is_signed() or said.signed_by not in trusted_keys(root):
        return f"{LINEAGE_FILE}: found no signature of the coordinator, needed one over its text"
    made = (model_name(said.study), said.run, said.model)
    if made != (found.name, record.get("run"), model):
        return f"model: found one that is not of this run, needed that of its {LINEAGE_FILE}"
    for name in changed:
        return f"{name}: found it changed, needed it as it was signed; restore it from a backup"
    return ""


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and digests of a model's files, its signature left out."""
    files = {x.relative_to(folder).as_posix(): x for x in folder.rglob("*") if x.is_file()}
    kept = {name: digest_path(x) for name, x in files.items() if name not in _SIGNATURE_FILES}
    return digest(canonical_json(kept))


def newest_version(workspace: Workspace, study: str) -> int:
    """Look up which version has the alias ``candidate``.

    Raises
    ------
    flows.mlflow_store.RegistryError
        If the study has no registered model.
    """
    found = aliases_of(client_of(workspace.mlflow_uri), model_name(study)).get(CANDIDATE)
    if found is None:
        raise RegistryError(
            f"{model_name(study)}: found no candidate, needed one; run `consilium study run`"
        )
    return found
