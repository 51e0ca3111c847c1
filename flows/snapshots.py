"""The lock on a site's cohort: what it releases changes by many patients, or not at all.

Extraction grows a draft every night. Training and studies read a frozen copy of it, a snapshot, and
a new one is cut only when at least ``privacy.snapshot`` patients came, left or changed since every
snapshot that the site ever contributed, to whatever roster: the difference of two sums over two
snapshots is then a sum over as many patients. Whoever asks again after one patient came is
answered from the same copy, and learns nothing.

What depends on the protocol plays no part in that: under a new protocol with one patient more, the
snapshot is cut of the patients and outcomes of the old one, and a column that a few patients
changed stays as it was, see :mod:`flows.cohort_changes`. Who asks the same under two protocols
learns nothing either.

As many stand behind the difference in each modality, too. Of ten who came fewer may be held out.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flows.cohort_changes import (
    FewChanged,
    differing,
    few_behind_a_sum,
    keyed,
    keyed_patients,
    settled,
)
from flows.manifest_rows import keep_rows, read_rows
from flows.prediction_files import forget_patient
from flows.site_digests import forget_missing, remember
from modalities.cohort import DataError, read_cohort, read_cohort_digest, write_cohort
from modalities.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from anndata import AnnData
    from mudata import MuData

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

COHORT: Final = "cohort.h5mu"
FOLDER: Final = "snapshots"
FEATURES: Final = "features"
ASSIGNMENTS: Final = "assignments.csv"
_LEDGER: Final = "ledger.json"
_LOCK: Final = "lock"
_UNFINISHED: Final = ".h5.partial"  # of a slide whose extraction was interrupted


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
        Patients of the draft who came, left or changed since and are not in it.
    """

    number: int
    cohort: Path
    features: Path
    waiting: int = 0


@dataclass(frozen=True)
class SnapshotState:
    """What a site has released, as counts.

    Attributes
    ----------
    n_snapshots, n_forbidden
        All, and those that held a patient withdrawn since.
    last
        Number of the last one; 0 before the first.
    n_patients
        In the last one.
    n_runs
        Runs that the snapshots went into.
    n_withdrawn
        Patients who are never taken in again.
    n_waiting
        Patients of the draft who came, left or changed since the last; None without a draft.
    """

    n_snapshots: int
    n_forbidden: int
    last: int
    n_patients: int
    n_runs: int
    n_withdrawn: int
    n_waiting: int | None


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
    waiting: int = 0


@dataclass
class _Ledger:
    path: Path
    snapshots: list[_Snapshot]
    withdrawn: list[str]

    @classmethod
    def read(cls, settings: SiteSettings) -> _Ledger:
        path = settings.path(FOLDER, _LEDGER)
        # The ledger is there before the first snapshot is, so that a lost one is not a new one.
        if not path.exists() and not any(path.parent.glob("[0-9]*")):
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
    with _held(settings):
        ledger = _Ledger.read(settings)
        snapshot, waiting = _chosen(settings, protocol, ledger)
        names = sorted(roster)
        if roster and names not in snapshot.rosters:
            ledger.update(snapshot.number, rosters=[*snapshot.rosters, names])
        folder = _folder(settings, snapshot.number)
        if not (folder / COHORT).is_file():
            raise _damaged(snapshot.number)
        return Released(snapshot.number, folder / COHORT, folder / FEATURES, waiting)


def _chosen(
    settings: SiteSettings, protocol: StudyProtocol, ledger: _Ledger
) -> tuple[_Snapshot, int]:
    """Find or cut the snapshot, and count who of the draft is not in it."""
    digest, wanted = read_cohort_digest(settings.path(COHORT)), protocol.fingerprint()
    for known in reversed(ledger.snapshots):
        if (known.draft, known.protocol, known.forbidden) == (digest, wanted, False):
            return known, known.waiting
    draft = read_cohort(settings.path(COHORT))
    if str(draft.uns["protocol_fingerprint"]) != wanted:
        raise DataError(
            "other_protocol",
            "cohort: found one of another protocol; run `consilium site prepare` again",
        )
    patients = keyed_patients(settings.key, draft)
    if not set(ledger.withdrawn).isdisjoint(patients):
        raise DataError(
            "withdrawn",
            "cohort: found a patient who was withdrawn; run `consilium site prepare` again",
        )
    # A site's own limit holds beside the protocol's.
    least = max(protocol.privacy.snapshot, int(settings.limits.get("snapshot", 1)))
    before = _before(ledger, patients, least)
    if before is None:
        return _cut(settings, ledger, draft, digest), 0
    if before.forbidden:
        raise DataError(
            "withdrawn",
            f"cohort: found fewer than {least} patients who differ from a snapshot from which one "
            f"was withdrawn, needed at least {least} before this site takes part again",
        )
    snapshot = _as_before(settings, ledger, draft, before, least)
    waiting = differing(snapshot.patients, patients)
    if snapshot.draft == digest:
        ledger.update(snapshot.number, waiting=waiting)
    return snapshot, waiting


def _before(ledger: _Ledger, patients: dict[str, list[str]], least: int) -> _Snapshot | None:
    """Find the last snapshot of all the same patients and outcomes, or else of almost the same."""
    n_differing = [differing(x.patients, patients, facts_only=True) for x in ledger.snapshots]
    same = [x for x, n in zip(ledger.snapshots, n_differing, strict=True) if n == 0]
    near = [x for x in ledger.snapshots if few_behind_a_sum(x.patients, patients, least=least)]
    found = same or near
    return found[-1] if found else None


def _as_before(
    settings: SiteSettings, ledger: _Ledger, draft: MuData, before: _Snapshot, least: int
) -> _Snapshot:
    """Give a snapshot of the same patients and outcomes as one released before.

    It is an old one wherever there is one of this protocol, unless enough patients have other
    features now.
    """
    alike = [
        x
        for x in ledger.snapshots
        if not x.forbidden and not differing(x.patients, before.patients, facts_only=True)
    ]
    ours = [x for x in alike if x.protocol == str(draft.uns["protocol_fingerprint"])]
    patients = keyed_patients(settings.key, draft)
    if ours and differing(before.patients, patients, facts_only=True):
        return ours[-1]
    try:
        cohort = settled(draft, [_frozen(settings, x) for x in alike], least=least)
    except FewChanged:
        if ours:
            return ours[-1]
        raise DataError(
            "cohort_locked",
            f"cohort: found that fewer than {least} patients, slides or scans left or changed "
            f"since snapshot {before.number}, needed them as they were or at least {least} before "
            "another protocol is run",
        ) from None
    patients = keyed_patients(settings.key, cohort)
    known = [x for x in ours if x.patients == patients]
    digest = read_cohort_digest(settings.path(COHORT))
    return known[-1] if known else _cut(settings, ledger, cohort, digest)


def _frozen(settings: SiteSettings, snapshot: _Snapshot) -> MuData:
    path = _folder(settings, snapshot.number) / COHORT
    if not path.is_file():
        raise _damaged(snapshot.number)
    return read_cohort(path)


def _damaged(number: int) -> DataError:
    return DataError(
        "damaged_snapshot",
        f"{FOLDER}: found snapshot {number} without its cohort, needed it; restore it from a "
        "backup",
    )


def _cut(settings: SiteSettings, ledger: _Ledger, cohort: MuData, draft: str) -> _Snapshot:
    """Freeze a cohort with the bags that it refers to; the ledger knows of it last."""
    if not ledger.path.exists():
        ledger.save()
    number = 1 + max((x.number for x in ledger.snapshots), default=0)
    folder = _folder(settings, number)
    shutil.rmtree(folder, ignore_errors=True)  # of a cut that was killed
    folder.mkdir(parents=True)
    for reference in _bags(cohort.mod.values()):
        target = folder / FEATURES / reference
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(settings.path(FEATURES, reference), target)
    write_cohort(cohort, folder / COHORT)
    keep_rows(settings, folder)
    remember(settings, (x for x in folder.rglob("*") if x.is_file()))
    snapshot = _Snapshot(
        number,
        str(cohort.uns["protocol_fingerprint"]),
        draft,
        keyed_patients(settings.key, cohort),
    )
    ledger.snapshots.append(snapshot)
    ledger.save()
    return snapshot


def record_run(settings: SiteSettings, number: int, run: str) -> None:
    """Remember that a snapshot went into a run."""
    with _held(settings):
        ledger = _Ledger.read(settings)
        found = next(x for x in ledger.snapshots if x.number == number)
        if run not in found.runs:
            ledger.update(number, runs=[*found.runs, run])


def contributed(settings: SiteSettings, run: str, *, protocol: str) -> tuple[Released, bool] | None:
    """Find the snapshot that went into a run, or else the last one of its protocol.

    Nothing is cut or changed.

    Returns
    -------
    tuple or None
        The snapshot, and whether it is the run's own; None where the site has none that may be
        used.
    """
    known = [x for x in _Ledger.read(settings).snapshots if not x.forbidden]
    own = [x for x in known if run in x.runs]
    for snapshot in reversed([*(x for x in known if x.protocol == protocol), *own]):
        folder = _folder(settings, snapshot.number)
        if (folder / COHORT).is_file():
            found = Released(snapshot.number, folder / COHORT, folder / FEATURES)
            return found, run in snapshot.runs
    return None


def snapshot_state(settings: SiteSettings) -> SnapshotState:
    """Count what a site has released, and who waits for the next snapshot.

    Raises
    ------
    DataError
        If ledger or draft is damaged.
    """
    ledger = _Ledger.read(settings)
    last = ledger.snapshots[-1] if ledger.snapshots else None
    seen = {} if last is None else last.patients
    waiting = None
    if settings.path(COHORT).is_file():
        waiting = differing(seen, keyed_patients(settings.key, read_cohort(settings.path(COHORT))))
    return SnapshotState(
        n_snapshots=len(ledger.snapshots),
        n_forbidden=sum(x.forbidden for x in ledger.snapshots),
        last=0 if last is None else last.number,
        n_patients=len(seen),
        n_runs=len({run for x in ledger.snapshots for run in x.runs}),
        n_withdrawn=len(ledger.withdrawn),
        n_waiting=waiting,
    )


def is_withdrawn(settings: SiteSettings, patient_ids: Iterable[str]) -> dict[str, bool]:
    """Say of each patient whether it was withdrawn, for ever."""
    withdrawn = set(_Ledger.read(settings).withdrawn)
    return {x: keyed(settings.key, "patient", x) in withdrawn for x in patient_ids}


def withdraw(settings: SiteSettings, patient_id: str) -> Withdrawal:
    """Delete a patient's features at once, and never take the patient in again.

    Snapshots that hold the patient are deleted and never used again, and so are this site's
    encoders. What was asked for is on the disk before anything is deleted, and a second call ends
    what a killed first one began.

    Raises
    ------
    DataError
        If this site never listed such a patient.
    """
    with _held(settings):
        ledger = _Ledger.read(settings)
        holding = _forbid(settings, ledger, patient_id)
        removed = sum(_remove(_folder(settings, x.number)) for x in holding)
        if holding:
            removed += _remove(settings.path("encoders"))
            removed += _remove(settings.path("runs", "artifacts"))  # registered encoders
            removed += _remove(settings.path("runs", "encoders.json"))
        removed += _remove_features(settings, patient_id)
        removed += _remove(settings.path("explained"))  # maps of slides, which are soon made again
        runs = sorted({run for x in holding for run in x.runs})
        tables = {settings.path("runs", run[:12], "patients.csv") for run in runs}
        # A run in one process is not noted in the ledger; its table of risks says who was there.
        tables |= {x for x in settings.path("runs").glob("*/*.csv") if _lists(x, patient_id)}
        removed += sum(_remove(x) for x in tables)
        removed += forget_patient(settings.home, patient_id)
        forget_missing(settings)
    return Withdrawal(removed, tuple(x.number for x in holding), tuple(runs))


def withdraw_again(settings: SiteSettings, *, after: int) -> int:
    """Delete what was written meanwhile of patients who were withdrawn since.

    Parameters
    ----------
    after
        How many withdrawals nothing was written behind.

    Returns
    -------
    int
        How many withdrawals there are.
    """
    withdrawn = _Ledger.read(settings).withdrawn
    latest = set(withdrawn[after:])
    if latest:
        listing = (settings.path(ASSIGNMENTS), settings.path(settings.manifest))
        ids = {row.get("patient_id", "") for path in listing for row in read_rows(path)}
        for patient_id in sorted(ids):
            if keyed(settings.key, "patient", patient_id) in latest:
                withdraw(settings, patient_id)
    return len(withdrawn)


def _forbid(settings: SiteSettings, ledger: _Ledger, patient_id: str) -> list[_Snapshot]:
    """Record a withdrawal, and give the snapshots that must go."""
    who = keyed(settings.key, "patient", patient_id)
    holding = [x for x in ledger.snapshots if who in x.patients]
    if who not in ledger.withdrawn:
        if not holding and not _is_listed(settings, patient_id):
            raise DataError(
                "unknown_patient",
                "patient: found nobody of this pseudonym in the site's cohorts or manifest, "
                "needed one as the manifest writes it",
            )
        ledger.withdrawn.append(who)
    ledger.snapshots = [
        replace(x, forbidden=True) if who in x.patients else x for x in ledger.snapshots
    ]
    ledger.save()
    return holding


def _is_listed(settings: SiteSettings, patient_id: str) -> bool:
    """Whether the site ever took a patient in, or is about to."""
    listing = (settings.path(ASSIGNMENTS), settings.path(settings.manifest))
    return any(_lists(path, patient_id) for path in listing)


def _lists(path: Path, patient_id: str) -> bool:
    return any(row.get("patient_id") == patient_id for row in read_rows(path))


def _remove_features(settings: SiteSettings, patient_id: str) -> int:
    """Take a patient out of the draft: bags first, then the rows that name them."""
    import anndata as ad

    removed = 0
    for path in sorted(settings.path(FEATURES).glob("*.h5ad")):
        table = ad.read_h5ad(path)
        if patient_id not in table.obs_names:
            continue
        for reference in _bags([table[[patient_id]]]):
            removed += _remove_bag(settings.path(FEATURES, reference))
        kept = table[table.obs_names != patient_id].copy()
        with replacing(path) as temporary:
            temporary.unlink()
            kept.write_h5ad(temporary)
        remember(settings, [path])
    # Bags that no table names yet go by their slide; another's of that name is made again.
    for row in read_rows(settings.path(settings.manifest)):
        stem = Path(row.get("path", "")).stem
        if row.get("patient_id") == patient_id and stem:
            for suffix in (".h5", _UNFINISHED):
                pattern = f"*/{glob.escape(stem)}-????????{suffix}"
                for bag in sorted(settings.path(FEATURES).glob(pattern)):
                    removed += _remove_bag(bag.with_name(bag.name.removesuffix(suffix) + ".h5"))
    # The next `site prepare` writes the draft again, without the patient.
    return removed + _remove(settings.path(COHORT))


def _remove_bag(path: Path) -> int:
    return sum(_remove(path.with_suffix(x)) for x in (".h5", ".geojson", ".jpg", _UNFINISHED))


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


@contextmanager
def _held(settings: SiteSettings) -> Iterator[None]:
    """Keep other processes from cutting or deleting snapshots meanwhile."""
    path = settings.path(FOLDER, _LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


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
