"""Versions of a registered model and approvals of a study, as a dossier tells of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from flows.approvals import FOLDER as APPROVALS
from flows.approvals import read_approvals, sites_that_approved
from flows.dossier_facts import Approvals, Version
from flows.federated import KITS
from flows.mlflow_store import client_of
from flows.registry import model_name
from fusion.federation.consortium import CONSORTIUM_FILE, COORDINATOR, read_consortium
from modalities.cohort import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from flows.approvals import Approval
    from fusion.federation.consortium import Consortium
    from infra.settings import Workspace

_GATE: Final = "gate."
_FOUND: Final = ".found"
_REJECTED: Final = "rejected"


@dataclass(frozen=True)
class Registration:
    """Where a version's run is: its key, and MLflow's id of it."""

    version: str
    run: str
    run_id: str


def versions_of(
    workspace: Workspace, study: str, *, client: Any = None
) -> tuple[list[Version], list[Registration]]:
    """All versions of a study's model, newest first, in words and with where their runs are."""
    client = client or client_of(workspace.mlflow_uri)
    name = model_name(study)
    found = sorted(
        client.search_model_versions(f"name = '{name}'"), key=lambda x: int(x.version), reverse=True
    )
    model = client.get_registered_model(name) if found else None
    aliases: dict[str, list[str]] = {}
    for alias, version in sorted((model.aliases if model is not None else {}).items()):
        aliases.setdefault(str(version), []).append(alias)
    return (
        [_version(x, aliases.get(str(x.version), [])) for x in found],
        [
            Registration(str(x.version), x.tags.get("consilium.run", ""), str(x.run_id))
            for x in found
        ],
    )


def find_registration(
    study: str,
    versions: Sequence[Version],
    registrations: Sequence[Registration],
    *,
    model: str | None = None,
) -> Registration:
    """Find a version by number, by ``NAME/NUMBER`` or by ``NAME@ALIAS``; the newest without one.

    Parameters
    ----------
    versions, registrations
        As from :func:`versions_of`.

    Raises
    ------
    modalities.cohort.DataError
        If there is none such.
    """
    name = model_name(study)
    wanted = (model or "").removeprefix("models:/").removeprefix(name)
    for version, found in zip(versions, registrations, strict=True):
        named = {"", f"/{found.version}", found.version}
        if wanted in named | {f"@{alias}" for alias in version.aliases.split(", ")}:
            return found
    listed = ", ".join(f"{name}/{x.version}" for x in registrations) or "none; run the study first"
    raise DataError("no_version", f"model: found no {model or name} here, needed one of: {listed}")


def _version(found: Any, aliases: list[str]) -> Version:
    made = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return Version(
        version=str(found.version),
        date=made.strftime("%Y-%m-%d %H:%M UTC"),
        run=found.tags.get("consilium.run", "not told")[:12],
        aliases=", ".join(aliases) or "none",
        gates=gates_in_words(found.tags),
        decision=decision_in_words(found.tags),
    )


def gates_in_words(tags: Mapping[str, str]) -> str:
    """Sum up the tags that promotion leaves, one per gate."""
    gates = {
        key.removeprefix(_GATE): word
        for key, word in tags.items()
        if key.startswith(_GATE) and not key.endswith(_FOUND)
    }
    if not gates:
        return "not computed"
    failed = sorted(name.replace("_", " ") for name, word in gates.items() if word == "failed")
    n_passed = sum(word == "passed" for word in gates.values())
    n_other = len(gates) - n_passed - len(failed)
    parts = [f"{n_passed} passed"]
    parts += [f"failed: {', '.join(failed)}"] if failed else []
    parts += [f"{n_other} did not apply"] if n_other else []
    return "; ".join(parts)


def decision_in_words(tags: Mapping[str, str]) -> str:
    """Say who approved or turned down a version, as its tags hold it."""
    reason = _tag(tags, _REJECTED)
    if reason:
        by, at = _tag(tags, "rejected_by"), _tag(tags, "rejected_at")
        return f"rejected: {reason}{_by(by)}{_at(at)}"
    by = _tag(tags, "approved_by")
    return f"approved{_by(by)}{_at(_tag(tags, 'approved_at'))}" if by else "none yet"


def _tag(tags: Mapping[str, str], name: str) -> str:
    return tags.get(f"consilium.{name}") or tags.get(name, "")


def _by(name: str) -> str:
    return f" by {', '.join(name.split(','))}" if name else ""


def _at(moment: str) -> str:
    return f" at {moment}" if moment else ""


def approvals_of_study(root: Path, protocol: str) -> Approvals:
    """Approvals that lie with the coordinator, each with whether its signature stands.

    Parameters
    ----------
    root
        The coordinator's folder.
    protocol
        Fingerprint of the run's.
    """
    kit = root / KITS / COORDINATOR / CONSORTIUM_FILE
    folder = root / COORDINATOR / APPROVALS
    try:
        consortium = read_consortium(kit) if kit.is_file() else None
        found = read_approvals(folder) if folder.is_dir() else []
    except ValueError:  # the next run over the engine refuses it; a dossier says so and goes on
        return Approvals(quorum="unknown: the consortium's file or an approval cannot be read")
    sites = tuple(_approval(x, consortium, protocol) for x in found)
    if consortium is None:
        return Approvals(sites)
    return Approvals(sites, f"{consortium.quorum} of {len(consortium.sites)} sites")


def _approval(found: Approval, consortium: Consortium | None, protocol: str) -> dict[str, str]:
    signature = "not checked: the coordinator has no list of keys"
    if consortium is not None:
        protocol_signed = found.statement.protocol
        valid = sites_that_approved([found], protocol=protocol_signed, consortium=consortium)
        signature = "valid" if valid else "not valid in this consortium"
    return {
        "site": found.site,
        "protocol": found.statement.protocol,
        "code": found.statement.code,
        "same": "yes" if found.statement.protocol == protocol else "no, of another protocol",
        "signature": signature,
    }
