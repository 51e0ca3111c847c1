"""What a site lists, and its raw inputs, against what a version was made from.

Lists and tables grow from night to night, and that is no fault: what counts is what the version
read of them.
"""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Final

from flows.extraction import Ledger, bag_path, read_file
from flows.lineage_items import Item, counted
from flows.manifest_rows import compare_rows, read_rows
from flows.snapshots import ASSIGNMENTS, FEATURES
from modalities.clinical import ClinicalSpec, read_registry
from modalities.cohort import DataError, read_manifest
from modalities.omics import OmicsSpec
from modalities.pathology import read_marks
from modalities.tabular import TabularSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from flows.lineage_items import State
    from flows.protocol import ModalitySpec, StudyProtocol
    from infra.settings import SiteSettings
    from modalities.cohort import ManifestRow

    Place = tuple[Path, Path | None]

_INPUT: Final = "input_digest"


def assignment_item(settings: SiteSettings, cohort: MuData) -> Item:
    """Hold who of a version's patients is held out for testing against the site's list."""
    name, path = "assignments of this version's patients", settings.path(ASSIGNMENTS)
    if not path.is_file():
        return Item(settings.name, name, "missing", ASSIGNMENTS)
    try:
        now = {row.get("patient_id"): row.get("split") for row in read_rows(path)}
    except (OSError, ValueError, csv.Error):
        return Item(settings.name, name, "changed", ASSIGNMENTS, "it cannot be read")
    n_changed = sum(now.get(x) != split for x, split in cohort.obs["split"].items())
    if not n_changed:
        return Item(settings.name, name, "whole", ASSIGNMENTS)
    why = f"{_are(n_changed, 'patient')} not assigned as this version had it"
    return Item(settings.name, name, "changed", ASSIGNMENTS, why)


def manifest_item(settings: SiteSettings, cohort: MuData, folder: Path) -> Item:
    """Hold the manifest's rows behind a version against the manifest, which may have grown."""
    path, name = settings.path(settings.manifest), "manifest"
    file = _relative(path, settings)
    if not path.is_file():
        return Item(settings.name, name, "missing", file)
    try:
        found = compare_rows(settings, cohort, folder)
    except (OSError, ValueError, csv.Error):
        return Item(settings.name, name, "changed", file, "it cannot be read")
    if found is None:
        why = "its rows were not noted when this version's snapshot was cut"
        return Item(settings.name, name, "elsewhere", file, why)
    n_changed, n_came = found
    if n_changed:
        why = f"{_are(n_changed, 'input')} not listed as when this version's snapshot was cut"
        return Item(settings.name, name, "changed", file, why)
    if n_came:
        why = f"{counted(n_came, 'row')} came since; those behind this version are as they were"
        return Item(settings.name, name, "grown", file, why)
    return Item(settings.name, name, "whole", file)


def _are(n: int, one: str) -> str:
    return f"{counted(n, one)} {'is' if n == 1 else 'are'}"


def input_items(
    settings: SiteSettings, protocol: StudyProtocol, cohort: MuData, features: Path
) -> Iterator[Item]:
    """Read raw inputs anew, byte for byte, and hold them against what the cohort was made from."""
    try:
        rows, _ = read_manifest(settings.path(settings.manifest), protocol.modalities)
    except DataError:  # the manifest is an item of its own
        rows = []
    for modality in sorted(cohort.mod):
        spec = protocol.modality[modality]
        if isinstance(spec, ClinicalSpec):
            yield _registry_item(settings, spec, cohort, modality)
        else:
            mine = [row for row in rows if row.modality == modality]
            known = _known_sources(cohort, modality, mine, settings, features)
            yield from _raw_items(settings, modality, spec, known, cohort.mod[modality])


def _registry_item(
    settings: SiteSettings, spec: ClinicalSpec, cohort: MuData, modality: str
) -> Item:
    path = settings.path(settings.clinical)
    if not path.is_file():
        return Item(settings.name, modality, "elsewhere")
    file = _relative(path, settings)
    try:
        registry, _ = read_registry(path, spec)
    except DataError as error:
        return Item(settings.name, modality, "changed", file, str(error))
    now = registry.covariates.obs["input_digest"].astype(str)
    then = cohort.mod[modality].obs["input_digest"].astype(str)
    n_changed = int((now.reindex(then.index) != then).sum())
    if n_changed:
        why = f"{_are(n_changed, 'row')} not as this version read"
        return Item(settings.name, modality, "changed", file, why)
    return Item(settings.name, modality, "whole", file)


def _known_sources(
    cohort: MuData,
    modality: str,
    rows: Sequence[ManifestRow],
    settings: SiteSettings,
    features: Path,
) -> list[tuple[ManifestRow, str]]:
    """Pair each raw input that the site still lists with the digest that it had."""
    obs = cohort.mod[modality].obs
    if "bag" not in obs:
        then = obs["source_digest"].astype(str) if "source_digest" in obs else obs["input_digest"]
        return [(row, str(then[row.patient_id])) for row in rows if row.patient_id in then.index]
    bags = {x for text in obs["bag"].astype(str) for x in text.split(";")}
    found = []
    for row in rows:
        name = f"{modality}/{bag_path(row, settings.path(FEATURES, modality)).name}"
        marks = read_marks(features / name, [_INPUT]) if name in bags else None
        if marks:
            found.append((row, marks[_INPUT]))
    return found


def _raw_items(
    settings: SiteSettings,
    modality: str,
    spec: ModalitySpec,
    known: Sequence[tuple[ManifestRow, str]],
    table: AnnData,
) -> Iterator[Item]:
    states = _states(settings, spec, known)
    for place, (state, _) in states.items():
        mine = table.obs_names.isin([row.patient_id for row, _ in known if _place(row) == place])
        if state == "changed" and _has_same_rows(place[0], spec, table[mine], modality):
            states[place] = ("grown", "what this version read of it is as it was")
    n_whole = sum(state == "whole" for state, _ in states.values())
    if n_whole:
        yield Item(settings.name, f"{modality}: {counted(n_whole, 'file')} read", "whole")
    for number, (place, (state, why)) in enumerate(sorted(states.items(), key=str), start=1):
        if state != "whole":
            name = f"{modality}: file {number} of {len(states)}"
            yield Item(settings.name, name, state, _relative(place[0], settings), why)
    if not states:
        yield Item(settings.name, f"{modality}: raw inputs", "elsewhere")


def _place(row: ManifestRow) -> Place:
    return row.path, row.mask_path


def _states(
    settings: SiteSettings, spec: ModalitySpec, known: Sequence[tuple[ManifestRow, str]]
) -> dict[Place, tuple[State, str]]:
    """Read each file anew, byte for byte, and say what became of it and why."""
    ledger = Ledger(settings.path(".nothing"))  # one that remembers nothing reads every byte
    states: dict[Place, tuple[State, str]] = {}
    for row, then in known:
        place = _place(row)
        try:
            state: State = "whole" if ledger.digest(row, spec) == then else "changed"
            why = ""
        except (OSError, DataError):
            state, why = "missing", "it cannot be read"
        if states.get(place, ("whole", ""))[0] == "whole":
            states[place] = (state, why)
    return states


def _has_same_rows(path: Path, spec: ModalitySpec, then: AnnData, modality: str) -> bool:
    """Whether a file of many patients, another one now, has the same of a version's patients."""
    if not isinstance(spec, OmicsSpec | TabularSpec):
        return False
    try:
        now, _ = read_file(path, list(then.obs_names), spec, modality)
    except DataError:
        return False
    digests = now.obs[_INPUT].astype(str).reindex(then.obs_names)
    return bool((digests == then.obs[_INPUT].astype(str)).all())


def _relative(path: Path, settings: SiteSettings) -> str:
    home = settings.home.resolve()
    path = path.resolve()
    return path.relative_to(home).as_posix() if path.is_relative_to(home) else path.name
