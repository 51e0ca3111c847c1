"""The governance dossier of a model version: what an oversight board reads, made from its run.

Everything in it follows from its facts (``facts.json``): the part of the run's record that a
dossier may show, the versions and approvals around the run, and the list of materials. It can so be
written again at any time, and compared; see :mod:`flows.dossier_check`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from flows.bill_of_materials import to_cyclonedx
from flows.dossier_card import card_part, history_part, materials_part
from flows.dossier_claim import claim_part, tripod_part, tripod_values
from flows.dossier_facts import UNREGISTERED, Approvals, Surroundings, Version, facts_of
from flows.dossier_page import markdown, page
from flows.dossier_statements import data_part, privacy_part
from flows.record_values import record_values
from flows.report_files import RECORD
from flows.shown import Shown
from modalities.cohort import DataError
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flows.dossier_facts import Facts
    from flows.records import StudyRecord
    from infra.settings import Workspace

FOLDER: Final = "dossier"
PAGE, FACTS, MATERIALS = "dossier.html", "facts.json", "bom.cdx.json"
_FILES: Final = {
    "summary": "model_card.md", "tripod": "tripod_ai.md", "claim": "claim.md", "data": "data.md",
    "privacy": "privacy.md", "history": "history.md",
}  # fmt: skip


@dataclass(frozen=True)
class Dossier:
    """Where a dossier was written, and of which version it is."""

    page: Path
    version: str


def write_dossier(
    record: StudyRecord,
    folder: Path,
    *,
    history: Sequence[Version] = (),
    approvals: Approvals | None = None,
    version: str = UNREGISTERED,
) -> Path:
    """Write the dossier of a finished run to ``folder``, and give its page.

    Parameters
    ----------
    folder
        ``dossier`` below the run's folder, where its ``record.json`` is.
    history
        Versions of the model, newest first.
    approvals
        Of the study by its sites.
    version
        Number of this run's version.
    """
    made = datetime.now(UTC)
    beside = folder.parent / RECORD
    # Where the run is on disk, the dossier is of what stands there.
    values = read_record(folder.parent) if beside.is_file() else record_values(record, created=made)
    around = Surroundings(_moment(made), version, history, approvals or Approvals())
    return write_facts(facts_of(values, around), folder)


def write_facts(facts: Facts, folder: Path) -> Path:
    """Write every file of a dossier from its facts, and give its page."""
    for name, text in files_of(facts).items():
        with replacing(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / PAGE


def files_of(facts: Facts) -> dict[str, str]:
    """Text of every file of a dossier, by name; the same facts give the same text."""
    shown = Shown(facts)
    parts = [
        card_part(shown), data_part(shown), privacy_part(shown), tripod_part(shown),
        claim_part(shown), materials_part(shown), history_part(shown),
    ]  # fmt: skip
    model = facts["dossier"]["model"]
    found = {
        _FILES[part.anchor]: markdown(part, title=model) for part in parts if part.anchor in _FILES
    }
    listed = to_cyclonedx(
        facts["dossier"]["materials"], run=facts["run"], created=facts["created"], model=model
    )
    return found | {
        PAGE: page(facts, parts),
        FACTS: _json(facts),
        MATERIALS: listed,
        "tripod_ai.json": _json(tripod_values(shown)),
    }


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _moment(at: datetime) -> str:
    return at.isoformat(timespec="seconds")


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record of a finished run.

    Raises
    ------
    modalities.cohort.DataError
        If there is none, or it cannot be read.
    """
    try:
        values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "no_record", f"{RECORD}: found none in the run's folder; run the study again"
        ) from None
    except (OSError, ValueError):
        raise DataError("wrong_record", f"{RECORD}: found no valid JSON") from None
    if not isinstance(values, dict) or "run" not in values:
        raise DataError("wrong_record", f"{RECORD}: found no record, needed one of a run")
    return values


def refresh_dossier(workspace: Workspace, study: str, version: str | int | None = None) -> Dossier:
    """Write a version's dossier anew with today's history and approvals, here and in the registry.

    Parameters
    ----------
    study
        Name of the study.
    version
        Of its registered model; by default the newest.

    Raises
    ------
    modalities.cohort.DataError
        If there is no such version, or its run's record is nowhere.
    """
    from flows.dossier_history import approvals_of_study, versions_of
    from flows.mlflow_store import client_of

    client = client_of(workspace.mlflow_uri)
    history, registrations = versions_of(workspace, study, client=client)
    wanted = None if version is None else str(version)
    found = next((x for x in registrations if wanted in (None, x.version)), None)
    if found is None:
        names = ", ".join(x.version for x in registrations) or "none"
        raise DataError(
            "no_version",
            f"{study}-fusion: found no version {version or ''}, needed one of: {names}",
        )
    folder = _run_folder(workspace, client, run=found.run, run_id=found.run_id)
    values = read_record(folder)
    approvals = approvals_of_study(workspace.root, values["protocol_fingerprint"])
    around = Surroundings(_moment(datetime.now(UTC)), found.version, history, approvals)
    target = write_facts(facts_of(values, around), folder / FOLDER)
    client.log_artifacts(found.run_id, str(target.parent), FOLDER)
    return Dossier(target, found.version)


def _run_folder(workspace: Workspace, client: Any, *, run: str, run_id: str) -> Path:
    """Folder of a run below the workspace; where it is gone, made from the registry's record."""
    folder = workspace.root / "runs" / run[:12]
    if run and not (folder / RECORD).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            client.download_artifacts(run_id, RECORD, str(folder))
        except Exception:  # noqa: BLE001  (a store's own kinds, and those of its network)
            raise DataError(
                "no_record", f"{RECORD}: found none of version's run, here or in the registry"
            ) from None
    return folder


__all__ = [
    "FACTS", "FOLDER", "MATERIALS", "PAGE", "Approvals", "Dossier", "Version", "files_of",
    "read_record", "refresh_dossier", "write_dossier", "write_facts",
]  # fmt: skip
