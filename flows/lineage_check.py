"""What of a version's lineage still is as it was: everything reachable is computed anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from flows.lineage import find_snapshot, last_cohort
from flows.lineage_decisions import check_decisions
from flows.lineage_encoders import check_site_models
from flows.lineage_inputs import assignment_item, input_items, manifest_item
from flows.lineage_items import COORDINATOR, FAULTS, NOT_THERE, Item, item_values
from flows.lineage_logged import check_shown
from flows.model_signing import (
    ModelNotTrusted,
    model_faults,
    read_signature,
    trusted_keys,
)
from flows.provenance import LINEAGE_FILE, LineageError
from flows.site_digests import DIGESTS, altered, is_recorded
from flows.snapshots import FEATURES, FOLDER, snapshot_state
from flows.versions import CODE, git_commit, lock_digest, source_digest
from fusion.keys import digest, verify
from infra.settings import STUDY_FILE, SettingsError
from modalities.files import digest_path

__all__ = ["FAULTS", "Item", "check_lineage", "check_site", "item_values"]

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from flows.lineage import Lineage
    from flows.lineage_items import State
    from flows.protocol import StudyProtocol
    from flows.provenance import Provenance
    from infra.settings import SiteSettings

_INPUT: Final = "input_digest"
_DOSSIER: Final = "dossier/"  # it is written anew with every decision


def check_lineage(found: Lineage) -> list[Item]:
    """Compute everything of a version's lineage anew that this machine can reach."""
    try:
        said = found.statement
    except LineageError as error:
        state: State = "changed" if (found.run / LINEAGE_FILE).is_file() else "missing"
        return [Item(COORDINATOR, LINEAGE_FILE, state, why=str(error))]
    items = [
        *_statement_items(found, said),
        *_model_items(found, said),
        *_artifact_items(found, said),
        *check_shown(found, said),
        *check_decisions(found),
        *_folder_items(found, said),
        *_code_items(said),
    ]
    for site in said.cohorts:
        items += _site_items(found, site)
    return items


def _statement_items(found: Lineage, said: Provenance) -> Iterator[Item]:
    try:
        keys = trusted_keys(found.workspace.root)
    except ModelNotTrusted as error:
        yield Item(COORDINATOR, "consortium.json", "changed", why=str(error))
        keys = frozenset()
    if not said.is_signed():
        yield Item(COORDINATOR, LINEAGE_FILE, "changed", why="its signature is not over this text")
    elif keys and said.signed_by not in keys:
        why = "it is signed by a key that is not the coordinator's"
        yield Item(COORDINATOR, LINEAGE_FILE, "changed", why=why)
    else:
        why = "" if keys else "no key of the coordinator is here to hold its signature against"
        yield Item(COORDINATOR, LINEAGE_FILE, "whole", why=why)


def _model_items(found: Lineage, said: Provenance) -> Iterator[Item]:
    try:
        signed = read_signature(found.model)
    except ModelNotTrusted as error:
        yield Item(COORDINATOR, "model: signature.json", "changed", why=str(error))
        return
    if digest(signed.text()) != said.model or not verify(
        signed.signed_by, bytes.fromhex(signed.signature), signed.text()
    ):
        yield Item(COORDINATOR, "model: signature.json", "changed")
    for name, state in model_faults(found.model, signed).items():
        yield Item(COORDINATOR, f"model: {name}", "missing" if state == "missing" else "changed")
    yield Item(COORDINATOR, f"model: {len(signed.files)} files read", "whole")


def _artifact_items(found: Lineage, said: Provenance) -> Iterator[Item]:
    for name, expected in said.artifacts.items():
        yield Item(COORDINATOR, f"artifact {name}", _state(found.run / name, expected))
    there = {x.relative_to(found.run).as_posix() for x in found.run.rglob("*") if x.is_file()}
    for name in sorted(there - {*said.artifacts, LINEAGE_FILE}):
        if not name.startswith(_DOSSIER):
            yield Item(COORDINATOR, f"artifact {name}", "changed", why=NOT_THERE)


def _folder_items(found: Lineage, said: Provenance) -> Iterator[Item]:
    """Check the protocol, and the run's own folder, which people read."""
    root = found.workspace.root
    study = root / STUDY_FILE
    if not said.protocol_file:
        yield Item(COORDINATOR, STUDY_FILE, "elsewhere")
    else:
        yield Item(COORDINATOR, STUDY_FILE, _state(study, said.protocol_file))
    for name in ("record.json", "report.html"):
        path = root / "runs" / said.run[:12] / name
        if name in said.artifacts and path.is_file():
            file = path.relative_to(root).as_posix()
            yield Item(COORDINATOR, file, _state(path, said.artifacts[name]))


def _code_items(said: Provenance) -> Iterator[Item]:
    if git_commit() != said.commit:
        why = "the version was made with another release than this one"
        yield Item(COORDINATOR, "code", "elsewhere", why=why)
        return
    same: dict[bool, State] = {True: "whole", False: "changed"}
    yield Item(COORDINATOR, "code", same[source_digest(*CODE) == said.code])
    yield Item(COORDINATOR, "locked dependencies", same[lock_digest() == said.lock])


def _site_items(found: Lineage, site: str) -> Iterator[Item]:
    try:
        here = site in found.workspace.site_names()
        settings = found.workspace.site(site) if here else None
    except SettingsError as error:
        yield Item(site, "site.toml", "changed", why=str(error))
        return
    if settings is None:
        yield Item(site, "cohort and inputs", "elsewhere")
        return
    yield from check_site_files(settings)
    yield from _cohort_items(settings, found.statement.cohorts[site], lambda: found.protocol)
    yield from check_site_models(settings)


def check_site(settings: SiteSettings, protocol: StudyProtocol) -> list[Item]:
    """Compute a site's own part anew, where the coordinator's registry is out of reach."""
    items = [*check_site_files(settings), *check_site_models(settings)]
    try:
        cohort = last_cohort(settings)
    except LineageError as error:
        return [*items, Item(settings.name, "encoders", "elsewhere", why=str(error))]
    return [*items, *_cohort_items(settings, cohort, lambda: protocol)]


def check_site_files(settings: SiteSettings) -> Iterator[Item]:
    """Read every file that a site wrote anew: its draft, its snapshots, its encoders."""
    if not is_recorded(settings):
        why = "nothing is recorded of its files; run `consilium site prepare` with this release"
        yield Item(settings.name, DIGESTS, "missing", why=why)
        return
    faults = altered(settings)
    for number, (name, state) in enumerate(faults.items(), start=1):
        # A bag has the name of its slide.
        shown = name if not name.endswith(".h5") else f"slide features {number}"
        yield Item(settings.name, shown, "missing" if state == "missing" else "changed", name)
    if not faults:
        yield Item(settings.name, "cohort, assignments, snapshots, features and encoders", "whole")


def _cohort_items(
    settings: SiteSettings, keyed: str, read: Callable[[], StudyProtocol]
) -> Iterator[Item]:
    snapshot = find_snapshot(settings, keyed)
    if snapshot is None:
        withdrawn = snapshot_state(settings).n_forbidden > 0
        state: State = "elsewhere" if withdrawn else "missing"
        why = "a patient withdrew" if withdrawn else "no snapshot has the digest of this version"
        yield Item(settings.name, "cohort of this version", state, why=why)
        return
    number, cohort = snapshot
    yield Item(settings.name, f"cohort of this version, snapshot {number}", "whole")
    folder = settings.path(FOLDER, f"{number:04d}")
    yield assignment_item(settings, cohort)
    yield manifest_item(settings, cohort, folder)
    try:
        protocol = read()
    except LineageError as error:
        yield Item(settings.name, "raw inputs", "elsewhere", why=str(error))
        return
    yield from input_items(settings, protocol, cohort, folder / FEATURES)


def _state(path: Path, expected: str) -> State:
    if not path.is_file():
        return "missing"
    return "whole" if digest_path(path) == expected else "changed"
