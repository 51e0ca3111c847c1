"""What a site has done, what waits and what was set aside, read from its own disk.

No server is needed, and no raw input is read: a file is new or changed where its size or time of
modification is, as the nightly run sees it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

from flows.check import without_registry
from flows.extraction import Ledger, features_of, one_input_each
from flows.extraction_keys import recipe
from flows.inputs import keyed_digest
from flows.loading import about_encoder, encoder_parts
from flows.nights import read_night
from flows.snapshots import COHORT, FOLDER, is_withdrawn, snapshot_state
from flows.standing import approval, budget, certificates, next_runs
from modalities.clinical import read_registry
from modalities.cohort import (
    DataError,
    Exclusion,
    read_cohort_digest,
    read_exclusions,
    read_manifest,
    read_patient_ids,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from flows.protocol import ModalitySpec, StudyProtocol
    from infra.settings import SiteSettings
    from modalities.clinical import Registry
    from modalities.cohort import ManifestRow

EXCLUDED: Final = "excluded.csv"
_CHANGES: Final = {
    "input": "the raw input changed or was moved",
    "protocol": "the study's settings for it changed",
    "code": "the program that extracts it changed",
    "secret": "its features were made under another secret of the site",
}
_ENCODER_CHANGES: Final = {
    "cohort": "the released cohort changed",
    "protocol": "the study changed",
    "code": "this program changed",
}


@dataclass
class ModalityStatus:
    """Counts of one modality's inputs.

    Attributes
    ----------
    done
        Inputs whose features are current.
    pending
        Inputs without features yet.
    changed
        Inputs to be done again, by reason.
    excluded
        Inputs, or patients, set aside, with the reason of each.
    """

    done: int = 0
    pending: int = 0
    changed: Counter[str] = field(default_factory=Counter)
    excluded: list[Exclusion] = field(default_factory=list)

    def by_code(self) -> list[dict[str, Any]]:
        """Per code the number set aside, and the sentence that is said most often."""
        reasons: dict[str, Counter[str]] = defaultdict(Counter)
        for one in self.excluded:
            reasons[one.code][one.reason] += 1
        return [
            {"code": code, "n": said.total(), "reason": said.most_common(1)[0][0]}
            for code, said in sorted(reasons.items())
        ]


def site_status(
    root: Path,
    settings: SiteSettings,
    protocol: StudyProtocol,
    modalities: Mapping[str, ModalityStatus],
) -> dict[str, Any]:
    """Give a site's state as counts and sentences, in plain values; no patient is named.

    Parameters
    ----------
    root
        Folder of the study, where services and kits are.
    modalities
        From :func:`modality_states`.
    """
    snapshot, number = _snapshot(settings)
    night = read_night(settings)
    return {
        "site": settings.name,
        "study": protocol.study.name,
        "modalities": {name: _as_values(found) for name, found in modalities.items()},
        "last_night": None if night is None else asdict(night),
        "snapshot": snapshot,
        "encoders": encoder_states(settings, protocol, snapshot=number),
        "approval": approval(settings, protocol),
        "privacy_budget": budget(settings, protocol),
        "next_runs": next_runs(root),
        "certificates": certificates(root / "kits" / settings.name),
    }


def _as_values(found: ModalityStatus) -> dict[str, Any]:
    return {
        "done": found.done,
        "pending": found.pending,
        "changed": {_CHANGES[why]: n for why, n in sorted(found.changed.items())},
        "excluded": found.by_code(),
    }


def modality_states(settings: SiteSettings, protocol: StudyProtocol) -> dict[str, ModalityStatus]:
    """Sort every input of a site into done, pending, changed and set aside.

    Raises
    ------
    DataError
        If manifest or registry cannot be read at all.
    """
    names = [x for x in protocol.modalities if x != protocol.clinical]
    rows, faults = read_manifest(settings.path(settings.manifest), names)
    gone = is_withdrawn(settings, {row.patient_id for row in rows})
    listed = [row for row in rows if not gone[row.patient_id]]
    last_time = {(e.patient_id, e.modality): e for e in read_exclusions(settings.path(EXCLUDED))}
    ledger = Ledger(settings.path("features", "digests.json"))
    states = {}
    for name in names:
        kept = [x for x in faults if x.modality == name]
        found = one_input_each([x for x in listed if x.modality == name], protocol.modality[name],
                               name, kept)  # fmt: skip
        view = _View(settings, name, protocol.modality[name], ledger, last_time)
        states[name] = view.sorted_out(found, kept)
    states[protocol.clinical] = _registry_state(settings, protocol, listed)
    return {name: states[name] for name in protocol.modalities}


@dataclass(frozen=True)
class _View:
    """One modality of a site as it is on the disk."""

    settings: SiteSettings
    modality: str
    spec: ModalitySpec
    ledger: Ledger
    last_time: dict[tuple[str, str], Exclusion]

    def sorted_out(self, rows: Sequence[ManifestRow], faults: list[Exclusion]) -> ModalityStatus:
        now = recipe(self.spec, self.settings.key)
        state = ModalityStatus(excluded=faults)
        made = features_of(self.modality, self.spec, rows, self.settings.path("features"))
        for row, found in zip(rows, made, strict=True):
            digest = self._digest(row)
            aside = self.last_time.get((row.patient_id, self.modality))
            why = now.why_stale(found, "" if digest is None else digest)
            if why is None:
                state.done += 1
            elif digest is not None and aside is not None and why in {"new", "input"}:
                state.excluded.append(aside)  # tried as it is now
            elif why == "new":
                state.pending += 1
            else:
                state.changed[why] += 1
        return state

    def _digest(self, row: ManifestRow) -> str | None:
        try:
            return self.ledger.known(row, self.spec)
        except OSError:
            return None


def _registry_state(
    settings: SiteSettings, protocol: StudyProtocol, rows: Iterable[ManifestRow]
) -> ModalityStatus:
    spec = protocol.modality[protocol.clinical]
    registry, excluded = read_registry(settings.path(settings.clinical), spec)  # type: ignore[arg-type]
    aside = [*excluded, *_withdrawn(settings, registry, protocol.clinical)]
    known = {*registry.patient_ids, *(e.patient_id for e in excluded)}
    aside += without_registry(rows, known, protocol.clinical)
    try:
        prepared = read_patient_ids(settings.path(COHORT))
    except DataError:
        prepared = frozenset()
    usable = set(registry.patient_ids) - {e.patient_id for e in aside}
    return ModalityStatus(
        done=len(usable & prepared), pending=len(usable - prepared), excluded=aside
    )


def _withdrawn(settings: SiteSettings, registry: Registry, modality: str) -> list[Exclusion]:
    gone = is_withdrawn(settings, registry.patient_ids)
    reason = "the patient was withdrawn"
    return [Exclusion(x, modality, "withdrawn", reason) for x, found in gone.items() if found]


def _snapshot(settings: SiteSettings) -> tuple[dict[str, Any], int]:
    try:
        found = snapshot_state(settings)
    except DataError as fault:
        return {"fault": str(fault)}, 0
    return asdict(found), found.last


def encoder_states(
    settings: SiteSettings, protocol: StudyProtocol, *, snapshot: int
) -> dict[str, dict[str, Any]]:
    """Say whether each encoder belongs to cohort, protocol and code as they are now.

    Parameters
    ----------
    snapshot
        Number of the last snapshot; 0 where there is none.

    Returns
    -------
    dict
        Per modality ``state`` (``none``, ``current``, ``stale`` or ``left out``), and ``why``.
    """
    try:
        digest = read_cohort_digest(settings.path(FOLDER, f"{snapshot:04d}", COHORT))
        cohort = keyed_digest(settings.key, digest)
    except DataError:
        cohort = ""
    now = encoder_parts(cohort, protocol)
    return {
        name: _encoder_state(about_encoder(settings.path("encoders", name)), now)
        for name in protocol.modalities
    }


def _encoder_state(about: dict[str, Any] | None, now: dict[str, str]) -> dict[str, Any]:
    if about is None:
        return {"state": "none", "why": ["not trained yet"]}
    made = about.get("made_from")
    if not isinstance(made, dict):
        return {"state": "stale", "why": ["made by an older version of this program"]}
    changed = [_ENCODER_CHANGES[x] for x in now if made.get(x) != now[x]]
    if changed:
        return {"state": "stale", "why": changed}
    if not about["trained"]:
        return {"state": "left out", "why": [str(about["reason"])]}
    return {"state": "current", "why": []}
