"""The lock on a site's cohort: what may be released, and what becomes of a withdrawn patient."""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from flows import snapshots
from flows.protocol import read_protocol
from flows.snapshots import (
    ASSIGNMENTS,
    COHORT,
    Released,
    SnapshotState,
    is_withdrawn,
    record_run,
    released,
    snapshot_state,
    withdraw,
)
from infra.settings import SiteSettings
from modalities.cohort import DataError, assemble, feature_table, read_cohort, write_cohort

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import anndata as ad
    from mudata import MuData

    from flows.protocol import StudyProtocol

pytestmark = pytest.mark.border

K, N = 4, 20
IDS = tuple(f"patient-{i:03d}" for i in range(N))
# All of these train, and none has a slide.
MANY = tuple(f"other-{i:03d}x" for i in range(40))
PLAIN = tuple(x for x in IDS if x[-1] not in "035")


def protocol(*columns: str, k: int = K, **study: Any) -> StudyProtocol:
    return read_protocol(
        {
            "study": {
                "name": "small", "data": "simulated", "horizon_days": 730,
                "grid_days": [365, 730], **study,
            },
            "modality": {
                "clinical": {"kind": "clinical", "numeric": ["age"]},
                "blood": {"kind": "tabular", "columns": ["hb", "crp", *columns]},
            },
            "privacy": {"snapshot": k},
        }
    )  # fmt: skip


@dataclass
class Patient:
    event: bool
    time_days: float
    age: float
    blood: dict[str, float] | None
    slide: str = "one"


@dataclass
class Site:
    """A site whose nights go by: :meth:`draft` is what `prepare` leaves."""

    settings: SiteSettings
    patients: dict[str, Patient] = field(default_factory=dict)
    protocol: StudyProtocol = field(default_factory=protocol)

    def come(self, *ids: str) -> Site:
        for patient_id in ids:
            rng = np.random.default_rng(list(patient_id.encode()))
            values = dict(zip(("hb", "crp", "wbc"), rng.normal(size=3), strict=True))
            self.patients[patient_id] = Patient(
                bool(rng.random() < 0.6), float(rng.integers(30, 900)), rng.normal(60, 9), values
            )
        return self

    def leave(self, *ids: str) -> Site:
        for patient_id in ids:
            self.patients.pop(patient_id)
        return self

    def change(self, *ids: str, **fields: Any) -> Site:
        for patient_id in ids:
            self.patients[patient_id] = replace(self.patients[patient_id], **fields)
        return self

    def lab(self, name: str, *ids: str, by: float = 1.0) -> Site:
        for patient_id in ids:
            blood = self.patients[patient_id].blood
            assert blood is not None
            self.change(patient_id, blood=blood | {name: blood[name] + by})
        return self

    def draft(self, *, tables_too: bool = False) -> Site:
        gone = is_withdrawn(self.settings, self.patients)
        here = {x: p for x, p in self.patients.items() if not gone[x]}
        spec = self.protocol.modality["blood"]
        columns = list(spec.columns)  # type: ignore[union-attr]
        rows = {x: [p.blood[c] for c in columns] for x, p in here.items() if p.blood is not None}
        slides = [x for x in here if x.endswith(("0", "5"))]
        bags = feature_table(
            slides, ["mean_0"], np.zeros((len(slides), 1)),
            input_digests=[here[x].slide for x in slides], spec_fingerprint="slides",
        )  # fmt: skip
        bags.obs["bag"] = [f"pathology/{x}-01234567.h5" for x in slides]
        for x in slides:
            path = self.settings.path("features", f"pathology/{x}-01234567.h5")
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != here[x].slide:
                path.unlink(missing_ok=True)
                path.write_text(here[x].slide)
        outcome = pd.DataFrame(
            {
                "event": [p.event for p in here.values()],
                "time_days": [p.time_days for p in here.values()],
                "split": ["test" if x.endswith("3") else "train" for x in here],
                "fold_unit": 0.5,
            },
            index=pd.Index(list(here), dtype=str),
        )
        tables = {
            "clinical": _table({x: [p.age] for x, p in here.items()}, ["age"], "clinical"),
            "blood": _table(rows, columns, f"blood {columns}"),
            "pathology": bags,
        }
        if tables_too:
            for name, table in tables.items():
                table.write_h5ad(self.settings.path("features", f"{name}.h5ad"))
        pd.DataFrame({"patient_id": list(here), "split": outcome["split"]}).to_csv(
            self.settings.path(ASSIGNMENTS), index=False
        )
        cohort = assemble(tables, outcome, protocol_fingerprint=self.protocol.fingerprint())
        write_cohort(cohort, self.settings.path(COHORT))
        return self

    def release(self, *roster: str) -> Released:
        return released(self.settings, self.protocol, roster=roster)

    def tonight(self) -> Released:
        return self.draft().release()

    def code(self) -> str:
        with pytest.raises(DataError) as error:
            self.release()
        assert not any(x in str(error.value) for x in (*IDS, *MANY, str(self.settings.home)))
        return error.value.code


def _table(rows: dict[str, list[float]], columns: list[str], spec: str) -> ad.AnnData:
    return feature_table(
        list(rows), columns, np.array(list(rows.values())).reshape(len(rows), len(columns)),
        input_digests=[str(x) for x in rows.values()], spec_fingerprint=spec,
    )  # fmt: skip


def new_site(home: Path, **limits: int) -> Site:
    home.mkdir(parents=True, exist_ok=True)
    (home / "manifest.csv").write_text("patient_id,modality,path\n")
    secret = SecretStr("0123456789abcdef" * 4)
    return Site(SiteSettings(name="site-01", home=home, secret=secret, limits=limits)).come(*IDS)


@pytest.fixture(scope="module")
def first_night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Home of a site of 20 patients, whose first snapshot is cut."""
    home = tmp_path_factory.mktemp("first") / "site-01"
    assert new_site(home).tonight().number == 1
    return home


@pytest.fixture
def site(first_night: Path, tmp_path: Path) -> Site:
    """The same in a folder of its own."""
    shutil.copytree(first_night, tmp_path / "site-01")
    return new_site(tmp_path / "site-01")


def people(found: Released) -> set[str]:
    return set(read_cohort(found.cohort).obs_names)


def rows_of_(cohort: MuData) -> dict[str, dict[str, Any]]:
    """Per column of every modality the values by patient, NaN where absent."""
    found = {"age": cohort.mod["clinical"].to_df()["age"]}
    found |= dict(cohort.mod["blood"].to_df().items())
    return {name: column.reindex(cohort.obs_names).to_dict() for name, column in found.items()}


def test_the_same_draft_is_released_again_from_the_same_file(site: Site) -> None:
    first = site.release()
    before = first.cohort.stat()
    again = site.tonight()
    assert again == first
    assert again.cohort.stat() == before
    assert again.waiting == 0


FEW: dict[str, Callable[[Site], Site]] = {
    "one came": lambda s: s.come(MANY[0]),
    "all but one of k came": lambda s: s.come(*MANY[: K - 1]),
    "one left": lambda s: s.leave(IDS[7]),
    "all but one of k left": lambda s: s.leave(*PLAIN[: K - 1]),
    "one came, one left": lambda s: s.come(MANY[0]).leave(IDS[3]),
    "an outcome changed": lambda s: s.change(IDS[4], event=not s.patients[IDS[4]].event),
    "a follow-up grew": lambda s: s.change(IDS[4], time_days=901.5),
    "a covariate changed": lambda s: s.change(IDS[4], age=41.0),
    "a laboratory value changed": lambda s: s.lab("hb", IDS[4]),
    "a table lost a patient": lambda s: s.change(IDS[4], blood=None),
    "a slide was scanned anew": lambda s: s.change(IDS[5], slide="two"),
}


@pytest.mark.border
@pytest.mark.parametrize("change", FEW.values(), ids=FEW.keys())
def test_a_change_of_few_patients_is_not_released(
    site: Site, change: Callable[[Site], Site]
) -> None:
    first = site.release()
    content = first.cohort.read_bytes()
    again = change(site).tonight()
    assert (again.number, again.cohort) == (1, first.cohort)
    assert again.cohort.read_bytes() == content
    assert 1 <= again.waiting < K
    assert snapshot_state(site.settings).n_waiting == again.waiting
    assert not site.settings.path("snapshots", "0002").exists()


HIDDEN: dict[str, Callable[[Site], Site]] = {
    "k came, one of them has a slide": lambda s: s.come(*MANY[: K - 1], "sliced-0"),
    "k outcomes, one of one with a slide": lambda s: s.change(
        *PLAIN[: K - 1], IDS[5], time_days=905.0
    ),
    "k values, one of one held out": lambda s: s.lab("hb", *PLAIN[: K - 1], IDS[3]),
    "k tables lost, one of one held out": lambda s: s.change(*PLAIN[: K - 1], IDS[3], blood=None),
}


@pytest.mark.border
@pytest.mark.parametrize("change", HIDDEN.values(), ids=HIDDEN.keys())
def test_one_patient_does_not_hide_in_a_crowd_that_is_behind_other_sums(
    site: Site, change: Callable[[Site], Site]
) -> None:
    first = site.release()
    again = change(site).tonight()
    assert (again.number, again.cohort) == (1, first.cohort)
    assert again.waiting == K


ENOUGH: dict[str, Callable[[Site], Site]] = {
    "k came": lambda s: s.come(*MANY[:K]),
    "k left": lambda s: s.leave(*PLAIN[:K]),
    "k outcomes changed": lambda s: s.change(*PLAIN[:K], time_days=905.0),
    "k values changed": lambda s: s.lab("crp", *PLAIN[:K]),
    "came, left and changed": lambda s: (
        s.come(MANY[0]).leave(PLAIN[1]).change(*PLAIN[4:6], time_days=905.0)
    ),
}


@pytest.mark.parametrize("change", ENOUGH.values(), ids=ENOUGH.keys())
def test_a_change_of_enough_patients_is_released(
    site: Site, change: Callable[[Site], Site]
) -> None:
    again = change(site).tonight()
    assert (again.number, again.waiting) == (2, 0)
    assert people(again) == set(site.patients)
    assert site.release() == again


def test_nights_add_up_to_a_new_snapshot(site: Site) -> None:
    numbers = [site.come(x).tonight().number for x in MANY[: 2 * K]]
    assert numbers == [1] * (K - 1) + [2] * K + [3]


@pytest.mark.border
def test_going_back_almost_to_an_old_snapshot_is_not_released(site: Site) -> None:
    assert site.come(*MANY[: 2 * K]).tonight().number == 2
    assert site.leave(*MANY[1 : 2 * K]).tonight().number == 1
    assert people(site.release()) == set(IDS)
    assert site.leave(MANY[0]).tonight().number == 1


@pytest.mark.border
def test_one_value_does_not_hide_behind_those_of_others(site: Site) -> None:
    """Ten patients changed, yet one column by one patient only: its mean gives the value away."""
    before = rows_of_(read_cohort(site.release().cohort))
    again = site.lab("crp", *PLAIN[:K]).lab("hb", IDS[9]).tonight()
    assert again.number == 2
    assert again.waiting == 1
    after = rows_of_(read_cohort(again.cohort))
    assert after["hb"] == before["hb"]
    assert sum(after["crp"][x] != before["crp"][x] for x in IDS) == K
    assert site.release() == again
    assert site.lab("hb", *PLAIN[-K:]).tonight().number == 3


OTHER_STUDIES = {"another column": protocol("wbc"), "another seed": protocol(seed=1)}


@pytest.mark.border
@pytest.mark.parametrize("other", OTHER_STUDIES.values(), ids=OTHER_STUDIES.keys())
def test_another_protocol_sees_the_patients_and_outcomes_of_the_first(
    site: Site, other: StudyProtocol
) -> None:
    """A new protocol makes other features of everybody, and must not carry one patient more."""
    first = read_cohort(site.release().cohort)
    site.protocol = other
    site.come(MANY[0]).change(IDS[2], time_days=901.0).change(IDS[3], age=17.0).lab("hb", IDS[8])
    again = site.tonight()
    second = read_cohort(again.cohort)
    assert (again.number, again.waiting) == (2, 4)
    assert str(second.uns["protocol_fingerprint"]) == other.fingerprint()
    assert set(second.obs_names) == set(IDS)
    for column in ("event", "time_days", "split"):
        assert second.obs[column].to_dict() == first.obs[column].to_dict()
    before, after = rows_of_(first), rows_of_(second)
    assert all(after[name] == before[name] for name in ("age", "hb", "crp"))
    assert site.release() == again
    site.protocol = protocol()
    assert site.tonight().number == 1


def test_another_protocol_after_enough_patients_sees_them_all(site: Site) -> None:
    site.protocol = protocol("wbc")
    again = site.come(*MANY[:K]).tonight()
    assert (again.number, again.waiting) == (2, 0)
    assert people(again) == {*IDS, *MANY[:K]}


def test_another_protocol_of_unchanged_patients_is_released(site: Site) -> None:
    site.protocol = protocol("wbc")
    again = site.tonight()
    assert (again.number, again.waiting) == (2, 0)
    assert rows_of_(read_cohort(again.cohort)).keys() == {"age", "hb", "crp", "wbc"}


@pytest.mark.border
def test_who_left_cannot_be_subtracted_by_another_protocol(site: Site) -> None:
    site.leave(IDS[2])
    site.protocol = protocol("wbc")
    site.draft()
    assert site.code() == "cohort_locked"
    site.come(IDS[2]).change(IDS[5], slide="two").draft()
    assert site.code() == "cohort_locked"
    assert site.change(IDS[5], slide="one").tonight().number == 2


@pytest.mark.border
def test_a_changed_roster_gets_no_other_patients(site: Site) -> None:
    site.come(MANY[0]).draft()
    for roster in ((), ("a", "b", "c"), ("c", "b", "a"), ("a", "b")):
        assert site.release(*roster).number == 1
    (line,) = json.loads(site.settings.path("snapshots/ledger.json").read_text())["snapshots"]
    assert line["rosters"] == [["a", "b", "c"], ["a", "b"]]


def test_a_sites_own_limit_holds_beside_the_protocols(tmp_path: Path) -> None:
    strict, lax = new_site(tmp_path / "a", snapshot=6), new_site(tmp_path / "b", snapshot=2)
    for site, numbers in ((strict, [1, 1, 2]), (lax, [1, 2, 2])):
        site.tonight()
        assert [site.come(*MANY[:n]).tonight().number for n in (K - 1, K, 6)] == numbers


def test_with_the_lock_off_every_draft_is_released(tmp_path: Path) -> None:
    site = new_site(tmp_path)
    site.protocol = protocol(k=1)
    assert [site.come(x).tonight().number for x in MANY[:3]] == [1, 2, 3]
    assert site.lab("hb", IDS[0]).tonight().number == 4


@pytest.mark.border
@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_the_nights_bring_two_releases_never_differ_by_few(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    site = new_site(tmp_path_factory.mktemp("site"))
    seen: dict[int, Released] = {}
    for _ in range(5):
        site.protocol = data.draw(st.sampled_from([protocol(), protocol("wbc")]))
        out = sorted({*IDS, *MANY[:8]} - set(site.patients))
        site.come(
            *data.draw(
                st.lists(st.sampled_from(out), unique=True, max_size=6) if out else st.just([])
            )
        )
        here = st.sampled_from(sorted(site.patients))
        site.change(*data.draw(st.lists(here, unique=True, max_size=5)), time_days=950.0)
        site.lab(data.draw(st.sampled_from(["hb", "crp"])), *data.draw(st.lists(here, max_size=6)))
        if data.draw(st.booleans()):
            site.leave(data.draw(here))
        with suppress(DataError):
            found = site.tonight()
            seen[found.number] = found
    cohorts = [read_cohort(x.cohort) for x in seen.values()]
    for i, one in enumerate(cohorts):
        for other in cohorts[:i]:
            _require_many(one, other)


def _require_many(one: MuData, other: MuData) -> None:
    facts = [c.obs[["event", "time_days", "split"]].T.to_dict("list") for c in (one, other)]
    n = sum(facts[0].get(x) != facts[1].get(x) for x in {*facts[0], *facts[1]})
    assert n == 0 or n >= K
    if n == 0:
        before, after = rows_of_(one), rows_of_(other)
        for name in before.keys() & after.keys():
            changed = sum(
                before[name][x] != after[name][x] and before[name][x] == before[name][x]
                for x in before[name]
            )
            assert changed == 0 or changed >= K


def test_slides_of_a_snapshot_are_shared_with_the_draft_and_never_change(tmp_path: Path) -> None:
    site = new_site(tmp_path)
    found = site.tonight()
    name = f"pathology/{IDS[5]}-01234567.h5"
    assert found.features.joinpath(name).samefile(site.settings.path("features", name))
    site.change(IDS[5], slide="two").draft()
    assert site.settings.path("features", name).read_text() == "two"
    assert found.features.joinpath(name).read_text() == "one"
    assert site.release() == replace(found, waiting=1)


def test_where_files_cannot_be_shared_they_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    found = new_site(tmp_path).tonight()
    assert found.features.joinpath(f"pathology/{IDS[0]}-01234567.h5").read_text() == "one"


def test_a_missing_slide_is_one_sentence(tmp_path: Path) -> None:
    site = new_site(tmp_path).draft()
    site.settings.path(f"features/pathology/{IDS[0]}-01234567.h5").unlink()
    assert site.code() == "missing_bag"
    assert site.tonight().number == 1


def test_the_ledger_is_the_owners_and_names_nobody(site: Site) -> None:
    record_run(site.settings, 1, "f" * 64)
    path = site.settings.path("snapshots/ledger.json")
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert not any(x in text for x in IDS)
    assert '"runs": ["' + "f" * 64 in text
    # Not even who knows the pseudonyms finds them without the site's secret.
    other = SiteSettings(name="x", home=site.settings.home, secret=SecretStr("z" * 64))
    withdraw(site.settings, IDS[0])
    assert not any(is_withdrawn(other, IDS).values())
    assert is_withdrawn(site.settings, IDS)[IDS[0]]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "lost": lambda x: x.unlink(),
    "torn": lambda x: x.write_text(x.read_text()[:-5]),
    "emptied": lambda x: x.write_text("{}"),
    "of another kind": lambda x: x.write_text('{"snapshots": [{"number": 1}], "withdrawn": []}'),
}


@pytest.mark.border
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_without_its_ledger_a_site_releases_nothing(
    site: Site, damage: Callable[[Path], object]
) -> None:
    site.come(MANY[0]).draft()
    damage(site.settings.path("snapshots/ledger.json"))
    assert site.code() == "damaged_ledger"


def test_a_snapshot_that_lost_its_cohort_is_not_made_anew(site: Site) -> None:
    site.release().cohort.unlink()
    assert site.code() == "damaged_snapshot"
    site.protocol = protocol("wbc")
    site.draft()
    assert site.code() == "damaged_snapshot"


def test_a_draft_of_another_protocol_is_not_released(site: Site) -> None:
    site.protocol = protocol("wbc")
    assert site.code() == "other_protocol"
    # Whatever the snapshots say: the same patients give the same digest under a new seed.
    site.protocol = protocol(seed=1)
    assert site.code() == "other_protocol"


@dataclass
class Kill:
    """Lets this many steps of a function pass, and ends the process at the next."""

    left: int

    def at(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def _step(*args: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return step(*args)

        return _step


@pytest.mark.border
@pytest.mark.parametrize("n_steps", range(7))
def test_a_cut_that_was_killed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_steps: int
) -> None:
    site, kill = new_site(tmp_path).draft(), Kill(n_steps)
    with monkeypatch.context() as patch:
        for name in ("_link", "write_cohort"):
            patch.setattr(snapshots, name, kill.at(getattr(snapshots, name)))
        patch.setattr(snapshots._Ledger, "save", kill.at(snapshots._Ledger.save))
        with pytest.raises(KeyboardInterrupt):
            site.release()
    found = site.release()
    assert found.number == 1
    assert people(found) == set(IDS)
    slides = {x.name for x in found.features.rglob("*.h5")}
    assert slides == {f"{x}-01234567.h5" for x in IDS[::5]}


def test_two_that_cut_at_once_cut_one_snapshot(tmp_path: Path) -> None:
    site = new_site(tmp_path).draft()
    found: list[Released] = []
    threads = [threading.Thread(target=lambda: found.append(site.release("a"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [x.number for x in found] == [1] * 4
    assert snapshot_state(site.settings).n_snapshots == 1


def test_its_state_is_counts(site: Site) -> None:
    record_run(site.settings, 1, "1" * 64)
    record_run(site.settings, 1, "1" * 64)
    assert snapshot_state(site.settings) == SnapshotState(1, 0, 1, N, 1, 0, 0)
    site.come(*MANY[:K]).tonight()
    record_run(site.settings, 2, "1" * 64)
    withdraw(site.settings, MANY[0])
    assert snapshot_state(site.settings) == SnapshotState(2, 1, 2, N + K, 1, 1, None)
    site.draft()
    assert snapshot_state(site.settings).n_waiting == 1


def test_before_the_first_night_there_is_nothing(tmp_path: Path) -> None:
    site = new_site(tmp_path)
    assert snapshot_state(site.settings) == SnapshotState(0, 0, 0, 0, 0, 0, None)
    assert site.code() == "missing_cohort"


def files_with(site: Site, patient_id: str) -> list[str]:
    """Files of the site, its own lists left out, that still name a patient."""
    own = {"manifest.csv", ASSIGNMENTS}
    return [
        str(path)
        for path in site.settings.home.rglob("*")
        if path.is_file()
        and path.name not in own
        and (patient_id in str(path) or patient_id.encode() in path.read_bytes())
    ]


def encoders(site: Site) -> list[Path]:
    for name in ("clinical/encoder.json", "clinical/log_hazard.npy"):
        path = site.settings.path("encoders", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return [p for p in site.settings.path("encoders").rglob("*") if p.is_file()]


def withdrawing(site: Site) -> str:
    """Give everything that a run leaves, and the patient who wants it gone."""
    gone = IDS[5]
    site.draft(tables_too=True)
    encoders(site)
    record_run(site.settings, 1, "a" * 64)
    table = site.settings.path("runs", "a" * 12, "patients.csv")
    table.parent.mkdir(parents=True)
    table.write_text(f"{gone},0.3\n")
    for suffix in ("geojson", "jpg", "h5.partial"):
        site.settings.path("features", f"pathology/{gone}-01234567.{suffix}").write_text("{}")
    return gone


@pytest.mark.border
def test_whoever_is_withdrawn_is_gone_at_once_and_for_ever(site: Site) -> None:
    gone = withdrawing(site)
    assert len(files_with(site, gone)) >= 5
    done = withdraw(site.settings, gone)
    assert (done.snapshots, done.runs) == ((1,), ("a" * 64,))
    assert done.n_files_removed >= 7
    assert files_with(site, gone) == []
    assert not site.settings.path("encoders").exists()
    site.draft()  # still in the registry and in the manifest
    assert gone not in read_cohort(site.settings.path(COHORT)).obs_names
    assert site.code() == "withdrawn"
    assert withdraw(site.settings, gone) == replace(done, n_files_removed=1)


@pytest.mark.border
def test_after_a_withdrawal_a_site_takes_part_with_enough_others(site: Site) -> None:
    withdraw(site.settings, PLAIN[0])
    assert site.come(*MANY[: K - 2]).draft().code() == "withdrawn"
    site.protocol = protocol("wbc")
    assert site.draft().code() == "withdrawn"
    found = site.come(MANY[K - 2]).tonight()
    assert found.number == 2
    assert people(found) == {*IDS, *MANY[: K - 1]} - {PLAIN[0]}
    # From here on the lock goes on as before.
    assert site.come(MANY[10]).tonight() == replace(found, waiting=1)


@pytest.mark.border
def test_who_was_withdrawn_with_a_slide_is_not_the_only_one_gone_from_the_slides_sums(
    site: Site,
) -> None:
    withdraw(site.settings, IDS[5])
    assert site.come(*MANY[: 2 * K]).draft().code() == "withdrawn"
    assert site.come(*(f"sliced-{i}0" for i in range(K - 1))).tonight().number == 2


@pytest.mark.border
def test_a_draft_that_still_holds_a_withdrawn_patient_is_not_released(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `prepare` leaves it where the withdrawal came while it ran."""
    withdraw(site.settings, IDS[5])
    with monkeypatch.context() as patch:
        patch.setattr("tests.test_snapshots.is_withdrawn", lambda _, ids: dict.fromkeys(ids, False))
        site.come(*MANY[:K]).draft()
    assert site.code() == "withdrawn"


@pytest.mark.border
@pytest.mark.parametrize("n_steps", range(10))
def test_a_withdrawal_that_was_killed_is_ended_by_the_next(
    site: Site, monkeypatch: pytest.MonkeyPatch, n_steps: int
) -> None:
    gone, kill = withdrawing(site), Kill(n_steps)
    with monkeypatch.context() as patch:
        for name in ("_remove", "replacing"):
            patch.setattr(snapshots, name, kill.at(getattr(snapshots, name)))
        with pytest.raises(KeyboardInterrupt):
            withdraw(site.settings, gone)
    if n_steps:  # from the first write on, nothing with the patient is released
        assert is_withdrawn(site.settings, [gone])[gone]
        if site.settings.path(COHORT).exists():
            assert site.code() == "withdrawn"
    done = withdraw(site.settings, gone)
    assert (done.snapshots, done.runs) == ((1,), ("a" * 64,))
    assert files_with(site, gone) == []
    assert not site.settings.path("encoders").exists()


def test_whoever_is_in_no_snapshot_yet_can_be_withdrawn(site: Site) -> None:
    site.come(*MANY[:2]).draft()
    kept = len(encoders(site))
    assert withdraw(site.settings, MANY[0]).snapshots == ()
    assert withdraw(site.settings, MANY[1]).snapshots == ()  # with the draft gone
    assert len(list(site.settings.path("encoders").rglob("*.*"))) == kept
    assert site.tonight() == site.release()
    assert site.release().number == 1


def test_slides_that_no_table_names_yet_go_too(site: Site) -> None:
    manifest = "patient_id,modality,path\nnew-1,pathology,slides/s [1].svs\nnew-2,pathology,t.svs\n"
    site.settings.path("manifest.csv").write_text(manifest)
    bags = [site.settings.path("features/pathology", f"{x}-89abcdef.h5") for x in ("s [1]", "t")]
    for bag in bags:
        bag.write_text("features")
    assert withdraw(site.settings, "new-1").n_files_removed == 2
    assert [bag.exists() for bag in bags] == [False, True]


def test_a_pseudonym_that_the_site_never_listed_is_one_sentence(site: Site) -> None:
    with pytest.raises(DataError, match="found nobody of this pseudonym") as error:
        withdraw(site.settings, "patient-999")
    assert error.value.code == "unknown_patient"
    assert site.release().number == 1
