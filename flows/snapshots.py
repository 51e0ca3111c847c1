"""The lock on a site's cohort: what it releases changes by many patients, or not at all.

Extraction grows a draft every night. Training and studies read a frozen copy of it, a snapshot, and
a new one is cut only when at least ``privacy.snapshot`` patients came, left or changed since every
snapshot that the site ever contributed, to whatever roster: the difference of two sums over two
snapshots is then a sum over as many patients. Whoever asks again after one patient came is
answered from the same copy, and learns nothing.

Patients are compared by who they are, by outcome and split, and by the values of their features.
The values depend on the protocol, and another protocol changes everybody's; who is there and how
they fared does not. That part is therefore compared by itself too: under a new protocol with one
patient more, the snapshot is cut of the patients and outcomes of the old one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modalities.cohort import (
    DataError,
    cohort_digest,
    read_cohort,
    read_cohort_digest,
    validate_cohort,
    write_cohort,
)
from modalities.files import fingerprint, replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

COHORT: Final = "cohort.h5mu"
FOLDER: Final = "snapshots"
FEATURES: Final = "features"
_LEDGER: Final = "ledger.json"
_OUTCOME: Final = ("event", "time_days", "split", "fold_unit")


@dataclass(frozen=True)
class Released:
    """A frozen cohort that may take part.

    Attributes
    ----------
    number
        Of the snapshot, from 1.
    cohort
        Its ``cohort.h5mu``.
    features
        Folder that its bag references count from.
    waiting
        Patients of the draft that came, left or changed since, too few to be released; at least
        one, and fewer than the protocol's ``privacy.snapshot``, or 0.
    """

    number: int
    cohort: Path
    features: Path
    waiting: int = 0


@dataclass(frozen=True)
class Withdrawal:
    """What became of a patient's data.

    Attributes
    ----------
    n_files_removed
        Files that held features of this patient and no longer exist.
    snapshots
        Numbers of the snapshots that are never used again.
    runs
        Runs whose model was made with the patient among others.
    """

    n_files_removed: int
    snapshots: tuple[int, ...]
    runs: tuple[str, ...]


@dataclass(frozen=True)
class _Snapshot:
    """One line of the ledger: ``patients`` maps a keyed id to keyed outcome and values."""

    number: int
    protocol: str
    draft: str
    patients: dict[str, list[str]]
    rosters: list[list[str]] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    forbidden: bool = False


@dataclass
class _Ledger:
    path: Path
    snapshots: list[_Snapshot]
    withdrawn: list[str]

    @classmethod
    def read(cls, settings: SiteSettings) -> _Ledger:
        path = settings.path(FOLDER, _LEDGER)
        if not path.exists():
            return cls(path, [], [])
        try:
            values = json.loads(path.read_text())
            found = [_Snapshot(**x) for x in values["snapshots"]]
            return cls(path, found, list(values["withdrawn"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                "damaged_ledger",
                f"{FOLDER}/{_LEDGER}: found it damaged, needed the record of what was released; "
                "restore it from a backup: without it nothing may be released",
            ) from None

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            values = {
                "snapshots": [asdict(x) for x in self.snapshots],
                "withdrawn": self.withdrawn,
            }
            temporary.write_text(json.dumps(values))
            temporary.chmod(0o600)

    def update(self, number: int, **change: Any) -> None:
        self.snapshots = [replace(x, **change) if x.number == number else x for x in self.snapshots]
        self.save()


def released(
    settings: SiteSettings, protocol: StudyProtocol, *, roster: tuple[str, ...] = ()
) -> Released:
    """Give the snapshot that may take part now; cut one where enough patients differ.

    Parameters
    ----------
    roster
        Names of the sites whose sums it may go into; none for training at the site.

    Raises
    ------
    DataError
        If there is no draft, it is damaged or of another protocol, a patient was withdrawn from the
        last snapshot, or too few patients differ to release any cohort under this protocol.
    """
    ledger, least = _Ledger.read(settings), protocol.privacy.snapshot
    draft = read_cohort_digest(settings.path(COHORT))
    known = [x for x in ledger.snapshots if not x.forbidden and x.draft == draft]
    if known and _is_whole(settings, known[-1]) and known[-1] == ledger.snapshots[-1]:
        return _used(settings, ledger, known[-1], roster)
    cohort = read_cohort(settings.path(COHORT))
    if str(cohort.uns["protocol_fingerprint"]) != protocol.fingerprint():
        raise DataError(
            "other_protocol",
            "cohort: found one of another protocol; run `consilium site prepare` again",
        )
    patients = _keyed_patients(settings.key, cohort)
    chosen = _choose(ledger, patients, protocol.fingerprint(), least)
    if isinstance(chosen, _Snapshot):
        waiting = len(_differing(chosen.patients, patients))
        return replace(_used(settings, ledger, chosen, roster), waiting=waiting)
    if chosen is not None:
        cohort = _frozen_again(settings, cohort, ledger.snapshots[chosen - 1], least)
        patients = _keyed_patients(settings.key, cohort)
    snapshot = _cut(settings, ledger, cohort, patients, draft)
    return _used(settings, ledger, snapshot, roster)


def _choose(
    ledger: _Ledger, patients: dict[str, list[str]], protocol: str, least: int
) -> _Snapshot | int | None:
    """Say what to release: an old snapshot, its patients under this protocol, or the draft."""
    near = [x for x in ledger.snapshots if 0 < len(_differing(x.patients, patients)) < least]
    near_people = [
        x
        for x in ledger.snapshots
        if 0 < len(_differing(x.patients, patients, facts_only=True)) < least
    ]
    same = [x for x in ledger.snapshots if x.patients == patients]
    if not near and not near_people and not same:
        return None
    last = (same or near or near_people)[-1]
    if last.forbidden:
        raise DataError(
            "withdrawn",
            f"cohort: found fewer than {least} patients who differ from a snapshot from which one "
            f"was withdrawn, needed at least {least} before this site takes part again",
        )
    if same and not near and not near_people and same[-1].protocol == protocol:
        return same[-1]
    return last if last.protocol == protocol else last.number


def _differing(
    one: Mapping[str, list[str]], other: Mapping[str, list[str]], *, facts_only: bool = False
) -> set[str]:
    """Keyed ids of patients who are in one only, or differ; the values do not count as facts."""
    n = 1 if facts_only else 2
    return {
        x for x in {*one, *other}
        if x not in one or x not in other or one[x][:n] != other[x][:n]
    }  # fmt: skip


def _frozen_again(
    settings: SiteSettings, cohort: MuData, snapshot: _Snapshot, least: int
) -> MuData:
    """Features of the draft under a new protocol, patients and outcomes of an old snapshot."""
    old = read_cohort(_folder(settings, snapshot.number) / COHORT)
    missing = [x for x in old.obs_names if x not in set(cohort.obs_names)]
    if missing:
        raise DataError(
            "cohort_locked",
            f"cohort: found that fewer than {least} patients left since snapshot "
            f"{snapshot.number}, needed them or at least {least} who differ before another "
            "protocol is run",
        )
    again = cohort[old.obs_names.to_numpy()].copy()
    for column in _OUTCOME:
        again.obs[column] = old.obs[column].to_numpy()
    validate_cohort(again)
    again.uns["cohort_digest"] = cohort_digest(again)
    return again


def _cut(
    settings: SiteSettings,
    ledger: _Ledger,
    cohort: MuData,
    patients: dict[str, list[str]],
    draft: str,
) -> _Snapshot:
    """Freeze a cohort with the bags that it refers to; the ledger knows of it last."""
    number = 1 + max((x.number for x in ledger.snapshots), default=0)
    folder = _folder(settings, number)
    shutil.rmtree(folder, ignore_errors=True)  # of a cut that was killed
    for reference in _bags(cohort.mod.values()):
        target = folder / FEATURES / reference
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(settings.path(FEATURES, reference), target)
    folder.mkdir(parents=True, exist_ok=True)
    write_cohort(cohort, folder / COHORT)
    snapshot = _Snapshot(number, str(cohort.uns["protocol_fingerprint"]), draft, patients)
    ledger.snapshots.append(snapshot)
    ledger.save()
    return snapshot


def _used(
    settings: SiteSettings, ledger: _Ledger, snapshot: _Snapshot, roster: tuple[str, ...]
) -> Released:
    names = sorted(roster)
    if roster and names not in snapshot.rosters:
        ledger.update(snapshot.number, rosters=[*snapshot.rosters, names])
    if not _is_whole(settings, snapshot):
        raise DataError(
            "damaged_snapshot",
            f"{FOLDER}: found snapshot {snapshot.number} without its cohort, needed it; restore "
            "it from a backup",
        )
    folder = _folder(settings, snapshot.number)
    return Released(snapshot.number, folder / COHORT, folder / FEATURES)


def record_run(settings: SiteSettings, number: int, run: str) -> None:
    """Remember that a snapshot went into a run."""
    ledger = _Ledger.read(settings)
    found = next(x for x in ledger.snapshots if x.number == number)
    if run not in found.runs:
        ledger.update(number, runs=[*found.runs, run])


def is_withdrawn(settings: SiteSettings, patient_ids: Iterable[str]) -> dict[str, bool]:
    """Say of each patient whether it was withdrawn, for ever."""
    withdrawn = set(_Ledger.read(settings).withdrawn)
    return {x: _keyed(settings.key, "patient", x) in withdrawn for x in patient_ids}


def withdraw(settings: SiteSettings, patient_id: str) -> Withdrawal:
    """Delete a patient's features at once, and never take the patient in again.

    Snapshots that hold the patient are deleted and never used again, and so are this site's
    encoders. What was asked for is on the disk before anything is deleted, and a second call ends
    what a killed first one began.

    Raises
    ------
    DataError
        If no cohort of this site ever held such a patient.
    """
    ledger = _Ledger.read(settings)
    keyed = _keyed(settings.key, "patient", patient_id)
    holding = [x for x in ledger.snapshots if keyed in x.patients]
    if keyed not in ledger.withdrawn:
        if not holding and not _is_in_draft(settings, patient_id):
            raise DataError(
                "unknown_patient",
                "patient: found nobody of this pseudonym in the site's cohorts, needed one as the "
                "manifest writes it",
            )
        ledger.withdrawn.append(keyed)
    ledger.snapshots = [
        replace(x, forbidden=True) if keyed in x.patients else x for x in ledger.snapshots
    ]
    ledger.save()
    removed = sum(_remove(_folder(settings, x.number)) for x in holding)
    if holding:
        removed += _remove(settings.path("encoders"))
    removed += _remove_features(settings, patient_id)
    runs = sorted({run for x in holding for run in x.runs})
    for run in runs:
        removed += _remove(settings.path("runs", run[:12], "patients.csv"))
    return Withdrawal(removed, tuple(x.number for x in holding), tuple(runs))


def _is_in_draft(settings: SiteSettings, patient_id: str) -> bool:
    path = settings.path(COHORT)
    return path.is_file() and patient_id in set(read_cohort(path).obs_names)


def _remove_features(settings: SiteSettings, patient_id: str) -> int:
    """Take a patient out of the draft: bags first, then the rows that name them."""
    import anndata as ad

    removed = 0
    for path in sorted(settings.path(FEATURES).glob("*.h5ad")):
        table = ad.read_h5ad(path)
        if patient_id not in table.obs_names:
            continue
        for reference in _bags([table[[patient_id]]]):
            bag = settings.path(FEATURES, reference)
            removed += sum(_remove(x) for x in (bag, bag.with_suffix(".geojson")))
        kept = table[table.obs_names != patient_id].copy()
        with replacing(path) as temporary:
            temporary.unlink()
            kept.write_h5ad(temporary)
    # The next `site prepare` writes the draft again, without the patient.
    return removed + _remove(settings.path(COHORT))


def _remove(path: Path) -> int:
    if path.is_dir():
        n_files = sum(1 for x in path.rglob("*") if x.is_file())
        shutil.rmtree(path)
        return n_files
    if path.exists():
        path.unlink()
        return 1
    return 0


def _folder(settings: SiteSettings, number: int) -> Path:
    return settings.path(FOLDER, f"{number:04d}")


def _is_whole(settings: SiteSettings, snapshot: _Snapshot) -> bool:
    return (_folder(settings, snapshot.number) / COHORT).is_file()


def _bags(tables: Iterable[AnnData]) -> list[str]:
    """List references to slides' bags, below the folder of features."""
    return [
        reference
        for table in tables
        if "bag" in table.obs
        for text in table.obs["bag"]
        for reference in str(text).split(";")
    ]


def _link(source: Path, target: Path) -> None:
    """Share a file that is only ever replaced, never changed; copy it to another disk."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise DataError(
            "missing_bag", "features: found a slide's bag missing; run `consilium site prepare`"
        ) from None
    except OSError:
        shutil.copyfile(source, target)


def _keyed(secret: bytes, purpose: str, text: str) -> str:
    return hmac.new(secret, f"snapshot {purpose}\0{text}".encode(), hashlib.sha256).hexdigest()


def _keyed_patients(secret: bytes, cohort: MuData) -> dict[str, list[str]]:
    """Per keyed id the keyed facts (outcome, split, fold) and the keyed values of all features."""
    values: dict[str, list[object]] = {x: [] for x in cohort.obs_names}
    for name, table in sorted(cohort.mod.items()):
        dense = table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)
        bags = table.obs["input_digest"].astype(str) if "bag" in table.obs else [""] * len(dense)
        spec = str(table.uns["spec_fingerprint"])
        for patient, row, bag in zip(table.obs_names, dense, bags, strict=True):
            if patient in values:
                row = np.ascontiguousarray(row, dtype="<f8") + 0.0  # one zero
                values[patient].append([name, spec, bag, hashlib.sha256(row.tobytes()).hexdigest()])
    facts = zip(*(cohort.obs[column].tolist() for column in _OUTCOME), strict=True)
    return {
        _keyed(secret, "patient", x): [
            _keyed(secret, "facts", fingerprint([x, list(fact)])),
            _keyed(secret, "values", fingerprint([x, values[x]])),
        ]
        for x, fact in zip(cohort.obs_names, facts, strict=True)
    }
