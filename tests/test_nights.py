"""The differencing attack over many nights: whatever is subtracted, many patients stand behind it.

The coordinator asks one site the same every night, while patients come one by one, and subtracts
any night from any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flows.inputs import site_rows
from flows.loading import load_inputs
from flows.snapshots import withdraw
from fusion import messages as m
from fusion.federation import SiteStudy
from modalities.cohort import DataError
from tests.hospitals import (
    BLOOD,
    CLINICAL,
    leave_draft,
    listen,
    local_columns,
    patients,
    protocol,
    settings_at,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

pytestmark = pytest.mark.border
K, N_NIGHTS = 10, 24
ROSTER = ("site-01", "site-02", "site-03")
# Raw values make the attacker's task as easy as can be.
RAW = {"encoder": {"blood": {"harmonise": "none"}}}
LOCKED = protocol(**RAW)
OPEN = protocol(**RAW, privacy={"snapshot": 1, "patients_per_input": 3})


@dataclass(frozen=True)
class Heard:
    """What one night's answers come to: counts, and sums over the training patients.

    Attributes
    ----------
    n
        Patients who train and who are held out.
    totals
        Per modality the count, sum and sum of squares of each input.
    gradient
        Of each modality's fit at zero.
    """

    n: tuple[int, int]
    totals: dict[str, np.ndarray]
    gradient: dict[str, np.ndarray]

    def __sub__(self, other: Heard) -> Heard:
        return Heard(
            (self.n[0] - other.n[0], self.n[1] - other.n[1]),
            {x: self.totals[x] - other.totals[x] for x in self.totals},
            {x: self.gradient[x] - other.gradient[x] for x in self.gradient},
        )

    @property
    def tells_nothing(self) -> bool:
        parts = [*self.totals.values(), *self.gradient.values()]
        return self.n == (0, 0) and not any(x.any() for x in parts)

    def row_of_one(self, modality: str) -> np.ndarray | None:
        """Solve for the values of a single patient behind a difference, if it is one's."""
        n, first, second = self.totals[modality]
        if not np.allclose(np.abs(n), 1.0) or not np.allclose(second * n, first**2, rtol=1e-6):
            return None
        return np.asarray(first * n)


class Night:
    """A coordinator who asks one site only what every run asks."""

    def __init__(self, settings: SiteSettings, study: StudyProtocol, run: int) -> None:
        self.run, self.study = f"{run:064x}", study
        inputs = load_inputs(settings, study, roster=ROSTER)
        rows = site_rows(inputs, local_columns(inputs), study)
        self._site = SiteStudy(study.plan(self.run), rows)

    def ask(self, request: m.Message) -> Any:
        reply = m.decode(self._site.answer(m.encode(request)))
        assert not isinstance(reply, m.Refused), reply
        return reply

    def hear(self) -> Heard:
        designs = ("clinical", "blood")
        told = self.ask(m.Describe(self.run, self.study.fingerprint(), self.study.modalities, True))
        found = self.ask(m.AskMoments(self.run, 1, designs))
        zeros = np.zeros_like(found.mean)
        self.ask(m.SetScaling(self.run, 1, designs, zeros, zeros + 1.0))
        sums = self.ask(m.AskSums(self.run, 2, designs, zeros))
        widths = {"clinical": len(CLINICAL), "blood": len(BLOOD)}
        raw = np.stack([found.n, found.n * found.mean, found.m2 + found.n * found.mean**2])
        return Heard(
            (told.n_train, told.n_test),
            {x: raw[:, i, : widths[x]] for i, x in enumerate(designs)},
            {x: sums.gradient[i, : widths[x]] for i, x in enumerate(designs)},
        )


def hear(settings: SiteSettings, table: pd.DataFrame, study: StudyProtocol, run: int) -> Heard:
    leave_draft(settings, table, study)
    return Night(settings, study, run).hear()


@pytest.fixture
def site(tmp_path: Path) -> SiteSettings:
    return settings_at(tmp_path, "site-01")


def test_with_one_patient_more_each_night_no_two_nights_differ_by_a_few(
    site: SiteSettings,
) -> None:
    everybody = patients(120 + N_NIGHTS, 1)
    heard = [hear(site, everybody.iloc[: 120 + i], LOCKED, i) for i in range(N_NIGHTS)]
    differences = [b - a for a, b in combinations(heard, 2)]
    sizes = {sum(d.n) for d in differences}
    assert sizes == {0, K, 2 * K}
    assert all(d.tells_nothing for d in differences if sum(d.n) == 0)
    # Nor do differences of differences, which hold twenty patients or none.
    steps = [b - a for a, b in pairwise(heard)]
    assert sum(not d.tells_nothing for d in steps) == 2
    for one, other in combinations([*steps, *differences[:N_NIGHTS]], 2):
        for modality in ("clinical", "blood"):
            assert (one - other).row_of_one(modality) is None


def test_without_the_lock_each_nights_patient_is_read_off(site: SiteSettings) -> None:
    everybody = patients(126, 1)
    heard = [hear(site, everybody.iloc[: 120 + i], OPEN, i) for i in range(7)]
    n_read = 0
    for i, (before, after) in enumerate(pairwise(heard)):
        row = everybody.iloc[120 + i]
        found = (after - before).row_of_one("clinical")
        if row["split"] == "train":
            assert found is not None
            np.testing.assert_allclose(found, row[list(CLINICAL)].astype(float), atol=1e-6)
            blood = (after - before).row_of_one("blood")
            assert blood is not None
            np.testing.assert_allclose(blood, row[list(BLOOD)].astype(float), atol=1e-4)
            n_read += 1
    assert n_read == 5
    # The second difference of three nights is that of two patients: solved as well.
    assert ((heard[2] - heard[1]) - (heard[1] - heard[0])).totals["clinical"].any()


@pytest.mark.parametrize(
    "change", [{"event": "not"}, {"age": 99.0}, {"hb": 1.0}, {"time_days": 7.0}], ids=str
)
def test_a_changed_patient_is_not_read_off_and_without_the_lock_would_be(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    before = patients(120, 1)
    after, name = before.copy(), next(iter(change))
    who = before.index[before["event"] & (before["split"] == "train")][3]
    after.loc[who, name] = not before.loc[who, name] if name == "event" else change[name]
    for study, is_told in ((LOCKED, False), (OPEN, True)):
        site = settings_at(tmp_path / str(is_told), "site-01")
        difference = hear(site, after, study, 2)
        site = settings_at(tmp_path / f"{is_told} again", "site-01")
        first = hear(site, before, study, 1)
        assert not (difference - first).tells_nothing  # of two sites that share no lock
        assert (hear(site, after, study, 2) - first).tells_nothing != is_told


def test_who_leaves_and_comes_back_is_not_read_off(site: SiteSettings) -> None:
    table = patients(130, 1)
    nights = [
        table.iloc[:120],
        table.iloc[:120].drop(index=table.index[4]),
        table.iloc[:121],
        table.iloc[1:121],
        table.iloc[:129],
        table.iloc[:120],
    ]
    heard = [hear(site, night, LOCKED, i) for i, night in enumerate(nights)]
    assert all((b - a).tells_nothing for a, b in combinations(heard, 2))


def test_many_changed_values_do_not_hide_one_who_came(site: SiteSettings) -> None:
    table = patients(121, 1)
    first = hear(site, table.iloc[:120], LOCKED, 1)
    table.loc[table.index[:9], "hb"] += 1.0
    second = hear(site, table, LOCKED, 2)
    assert (second - first).n == (0, 0)
    assert (second - first).row_of_one("clinical") is None


def test_of_ten_who_came_the_only_one_with_a_blood_count_is_not_read_off(
    site: SiteSettings,
) -> None:
    table = patients(130, 1)
    who = next(x for x in table.index[120:] if table.loc[x, "split"] == "train")
    first = hear(site, table.iloc[:120], LOCKED, 1)
    table.loc[[x for x in table.index[120:] if x != who], list(BLOOD)] = np.nan
    found = (hear(site, table, LOCKED, 2) - first).row_of_one("blood")
    assert found is None or not np.allclose(found, table.loc[who, list(BLOOD)].astype(float))


def test_a_site_that_withdrew_somebody_is_silent_until_many_others_differ(
    site: SiteSettings,
) -> None:
    table = patients(140, 1)
    first = hear(site, table.iloc[:120], LOCKED, 1)
    who = table.index[5]
    withdraw(site, who)
    for n in (120, 121, 128):
        with pytest.raises(DataError, match="withdrawn") as refusal:
            hear(site, table.iloc[:n].drop(index=who), LOCKED, n)
        assert refusal.value.code == "withdrawn"
        assert who not in str(refusal.value)
    again = hear(site, table.iloc[:129].drop(index=who), LOCKED, 200)
    difference = again - first
    assert sum(difference.n) == 8  # nine came and one left
    assert difference.row_of_one("clinical") is None
    assert (hear(site, table.iloc[:135].drop(index=who), LOCKED, 201) - again).tells_nothing


def test_whole_runs_over_three_sites_a_patient_apart_are_the_same_to_the_bit(
    tmp_path: Path,
) -> None:
    sites = {name: settings_at(tmp_path, name) for name in ROSTER}
    everybody = {name: patients(141, i) for i, name in enumerate(sites)}
    heard = []
    for run, n in ((1, 140), (2, 141)):
        for name, settings in sites.items():
            leave_draft(settings, everybody[name].iloc[:n], LOCKED)
        record = listen(sites, LOCKED, f"{run:064x}").heard
        heard.append([{s: m.encode(r) for s, r in replies.items()} for _, replies in record])
    assert heard[0] == heard[1]
    assert len(heard[0]) > 20
