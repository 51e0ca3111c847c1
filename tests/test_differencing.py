"""The differencing attack: ask a site the same twice, a patient apart, and subtract.

The coordinator is the attacker. It has every message of the first run, and replays each request,
word for word, to the same site after one patient came, changed or was withdrawn: in a run of
another name, under another protocol, or with another roster.
"""

from __future__ import annotations

import csv
import shutil
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from flows.demo import write_consortium
from flows.extraction import collect
from flows.gate import SitePart
from flows.identity import identity
from flows.protocol import load_protocol
from flows.site import (
    assemble_cohort,
    extract_site_batch,
    list_inputs,
    read_site_registry,
)
from flows.snapshots import COHORT, withdraw
from fusion import messages as m
from fusion.federation import run_federation
from fusion.federation.consortium import Consortium
from fusion.federation.gate import SiteGate
from infra.settings import STUDY_FILE, Workspace
from modalities.cohort import read_cohort

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from flows.protocol import StudyProtocol
    from infra.settings import SiteSettings

pytestmark = pytest.mark.border

SITES = ("site-01", "site-02", "site-03")
VICTIM = "site-01"
INTRODUCE = m.Introduce(
    "0" * 64, "0" * 64, "0" * 64, (VICTIM,), ("0" * 64,), np.zeros((1, 64), np.uint8)
)
Heard = list[tuple[Any, dict[str, m.Message]]]


@dataclass
class Country:
    """A consortium on one disk, and what its attacking coordinator may do to it."""

    root: Path
    n_runs: int = 0

    def site(self, name: str = VICTIM) -> SiteSettings:
        return Workspace(root=self.root).site(name)

    @property
    def protocol(self) -> StudyProtocol:
        return load_protocol(self.root / STUDY_FILE)

    def amend(self, old: str, new: str) -> None:
        path = self.root / STUDY_FILE
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def registry(self, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> None:
        """Let the victim's registry have other rows."""
        path = self.site().path("clinical.csv")
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(change(rows))

    def night(self, *names: str) -> None:
        """Prepare sites as the flow does, without its server."""
        for name in names or (VICTIM,):
            settings, protocol = self.site(name), self.protocol
            registry, _ = read_site_registry.fn(settings, protocol)
            works, _ = list_inputs.fn(settings, protocol)
            for work in works:
                for at in range(len(work.pending)):
                    extract_site_batch.fn(work, at, "")
            tables = {w.modality: table for w in works if (table := collect(w)) is not None}
            assemble_cohort.fn(settings, protocol, registry, tables)

    def run(self, sites: Sequence[str] = SITES) -> Run:
        """Start every site's end anew, for a run of a name that was never used."""
        self.n_runs += 1
        keys = {s: identity(self.site(s).home).public for s in sites}
        consortium = Consortium(
            study=self.protocol.study.name,
            coordinator=identity(self.root / "coordinator").public,
            sites=keys,
            quorum=1,
        )
        parts = {s: SitePart(self.site(s), self.protocol, consortium) for s in sites}
        return Run(parts, f"{self.n_runs:064x}", self.protocol)


class Run:
    """One run over the sites' own ends, everything of which is kept."""

    def __init__(self, parts: dict[str, SitePart], name: str, protocol: StudyProtocol) -> None:
        self.name, self.protocol, self.heard = name, protocol, Heard()
        self._studies: list[Any] = []
        self.gates = {
            site: SiteGate(
                permits=lambda _: None,  # approved by everybody
                cohort=part.cohort,
                open_study=lambda run, part=part: self._kept(part.open_study(run)),  # type: ignore[misc]
                on_error=lambda _: None,
            )
            for site, part in parts.items()
        }

    def _kept(self, study: Any) -> Any:
        self._studies.append(study)
        return study

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.gates)

    def ask(self, payload: bytes, sites: Sequence[str]) -> dict[str, bytes]:
        replies = {site: self.gates[site].answer(payload) for site in sites}
        self.heard.append((m.decode(payload), {s: m.decode(r) for s, r in replies.items()}))
        return replies

    def honest(self) -> Heard:
        """Run the study as it is."""
        self.ask(m.encode(INTRODUCE), self.sites)
        run_federation(self.protocol.plan(self.name), self)
        return self.close()

    def replay(self, heard: Heard) -> Heard:
        """Ask the victim what it was asked before, as far as it lets one."""
        for request, replies in heard:
            if VICTIM in replies:
                said = {f.name for f in fields(request)} & {"run", "protocol"}
                mine = {"run": self.name, "protocol": self.protocol.fingerprint()}
                again = replace(request, **{name: mine[name] for name in said})
                self.ask(m.encode(again), (VICTIM,))
        return self.close()

    def close(self) -> Heard:
        """End the processes of the sites."""
        for study in self._studies:
            study._book.ledger.close()
        return self.heard


@dataclass(frozen=True)
class First:
    """An honest run's messages, and one patient of the victim's whom the attacker wants to know.

    Attributes
    ----------
    newcomer
        Row of the registry of a patient who was not there yet.
    patient
        Pseudonym of one who was.
    rows
        Covariates of both as the site holds them, by pseudonym.
    """

    root: Path
    heard: Heard
    newcomer: dict[str, str]
    patient: str
    rows: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    """A consortium of tables after one honest run."""
    country = Country(tmp_path_factory.mktemp("first"))
    write_consortium(country.root, (150, 110, 100), seed=4, tables_only=True)
    country.night(*SITES)
    cohort = read_cohort(country.site().path(COHORT))
    training = cohort.obs_names[(cohort.obs["split"] == "train") & cohort.obs["event"]]
    rows = cohort.mod["clinical"].to_df().loc[training].dropna().T.to_dict()
    newcomer, patient = list(rows)[:2]
    kept: list[dict[str, str]] = []
    country.registry(lambda found: kept.extend(found) or found)
    country.registry(lambda found: [x for x in found if x["patient_id"] != newcomer])
    country.night()
    row = next(x for x in kept if x["patient_id"] == newcomer)
    return First(country.root, country.run().honest(), row, patient, rows)


@pytest.fixture
def country(first: First, tmp_path: Path) -> Country:
    """The same consortium, in a folder of its own."""
    shutil.copytree(first.root, tmp_path / "country")
    return Country(tmp_path / "country", n_runs=1)


def comes(country: Country, first: First) -> None:
    country.registry(lambda rows: [*rows, first.newcomer])


def dies(country: Country, first: First) -> None:
    """One more day, and no event: the outcome of one patient is another."""
    country.registry(lambda rows: [_changed(x, first.patient, event="0") for x in rows])


def ages(country: Country, first: First) -> None:
    country.registry(lambda rows: [_changed(x, first.patient, age_years="99") for x in rows])


def leaves(country: Country, first: First) -> None:
    country.registry(lambda rows: [x for x in rows if x["patient_id"] != first.patient])


def is_withdrawn(country: Country, first: First) -> None:
    withdraw(country.site(), first.patient)


def _changed(row: dict[str, str], patient_id: str, **fields_: str) -> dict[str, str]:
    return row | fields_ if row["patient_id"] == patient_id else row


def asks_again(country: Country) -> Run:
    return country.run()


def asks_under_another_protocol(country: Country) -> Run:
    country.amend("seed = 0", "seed = 1")
    country.night()
    return country.run()


def asks_with_another_roster(country: Country) -> Run:
    return country.run(SITES[:2])


def asks_with_both(country: Country) -> Run:
    country.amend("seed = 0", "seed = 1")
    country.night()
    return country.run(SITES[:2])


CHANGES = {
    "one more": comes,
    "an outcome changed": dies,
    "a value changed": ages,
    "one left": leaves,
    "one withdrawn": is_withdrawn,
}
WAYS = {
    "another run": asks_again,
    "another protocol": asks_under_another_protocol,
    "another roster": asks_with_another_roster,
    "another protocol and roster": asks_with_both,
}


def learned(before: Heard, after: Heard) -> dict[str, set[str]]:
    """Name by request what is not as it was in the victim's replies; no reply tells nothing."""
    said = [(request, replies[VICTIM]) for request, replies in before if VICTIM in replies]
    again = [replies[VICTIM] for _, replies in after]
    assert len(said) == len(again) > 20
    if all(isinstance(reply, m.Refused) for reply in again):
        return {}
    found: dict[str, set[str]] = {}
    for (request, one), other in zip(said, again, strict=True):
        parts = {type(one).__name__, type(other).__name__}
        if len(parts) == 1:
            parts = {
                f.name
                for f in fields(one)  # type: ignore[arg-type]
                if not np.array_equal(getattr(one, f.name), getattr(other, f.name))
            }
        if parts:
            found.setdefault(type(request).__name__, set()).update(parts)
    return found


def answers(heard: Heard, kind: type, design: str) -> list[tuple[int, Any]]:
    """What the victim said of a design in its replies to requests of a kind, and at which row."""
    found = []
    for request, replies in heard:
        designs = getattr(request, "designs", getattr(request, "fits", ()))
        if isinstance(request, kind) and design in designs:
            found.append((designs.index(design), replies[VICTIM]))
    return found


def totals(heard: Heard) -> np.ndarray:
    """Sum of each clinical covariate over the victim's training patients, from its moments."""
    row, told = answers(heard, m.AskMoments, "clinical")[0]
    return np.asarray(told.n[row] * told.mean[row])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_subtracting_two_runs_a_patient_apart_gives_nothing(
    country: Country,
    first: First,
    change: Callable[[Country, First], None],
    way: Callable[[Country], Run],
) -> None:
    change(country, first)
    country.night()
    after = way(country).replay(first.heard)
    assert learned(first.heard, after) == {}
    # Whoever left has no features under another protocol: then, and only then, nobody answers.
    answered = not isinstance(after[-1][1][VICTIM], m.Refused)
    is_amended = way in (asks_under_another_protocol, asks_with_both)
    assert answered == (change is not is_withdrawn and not (change is leaves and is_amended))


def test_a_run_asked_again_of_unchanged_patients_is_the_same(
    country: Country, first: First
) -> None:
    country.night(*SITES)
    again = country.run().honest()
    for (one, replies), (other, replies_again) in zip(first.heard, again, strict=True):
        assert type(one) is type(other)
        assert all(
            np.array_equal(getattr(reply, f.name), getattr(replies_again[site], f.name))
            for site, reply in replies.items()
            for f in fields(reply)  # type: ignore[arg-type]
        )


@pytest.fixture
def unlocked(country: Country) -> Country:
    """The same without the lock: a cohort may differ from another by one patient."""
    country.amend("[privacy]", "[privacy]\nsnapshot = 1")
    country.night()
    return country


def test_without_the_lock_one_more_patient_is_read_off_the_sums(
    unlocked: Country, first: First
) -> None:
    comes(unlocked, first)
    unlocked.night()
    after = unlocked.run().replay(first.heard)
    found = totals(after) - totals(first.heard)
    row = first.rows[first.newcomer["patient_id"]]
    np.testing.assert_allclose(found[: len(row)], list(row.values()), atol=1e-6)


def test_without_the_lock_a_withdrawn_patient_is_read_off_the_sums(
    unlocked: Country, first: First
) -> None:
    is_withdrawn(unlocked, first)
    unlocked.night()
    after = unlocked.run().replay(first.heard)
    row = list(first.rows[first.patient].values())
    found = (totals(first.heard) - totals(after))[: len(row)]
    np.testing.assert_allclose(found, row, atol=1e-6)


def test_without_the_lock_a_changed_outcome_and_whose_it_is_are_read_off_the_sums(
    unlocked: Country, first: First
) -> None:
    dies(unlocked, first)
    unlocked.night()
    after = unlocked.run().replay(first.heard)
    (row, before), (_, now) = (
        answers(heard, m.AskSums, "clinical")[0] for heard in (first.heard, after)
    )
    assert before.n_events[row] - now.n_events[row] == 1
    assert np.abs(before.gradient[row] - now.gradient[row]).max() > 1e-3


def test_without_the_lock_a_changed_value_is_read_off_the_sums(
    unlocked: Country, first: First
) -> None:
    ages(unlocked, first)
    unlocked.night()
    after = unlocked.run().replay(first.heard)
    was = list(first.rows[first.patient].values())
    found = totals(after) - totals(first.heard)
    at = list(first.rows[first.patient]).index("age_years")
    assert found[at] == pytest.approx(99.0 - was[at], abs=1e-6)
    assert found[np.arange(len(found)) != at] == pytest.approx(0.0, abs=1e-6)
