from __future__ import annotations

import copy
import dataclasses
import json
import re
import shutil
from datetime import UTC, datetime
from itertools import combinations
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from flows.approvals import Statement, approve, write_approval
from flows.cli import app
from flows.demo import write_consortium
from flows.dossier import (
    FACTS,
    PAGE,
    Approvals,
    Version,
    files_of,
    refresh_dossier,
    write_dossier,
    write_facts,
)
from flows.dossier_cells import hidden_cells
from flows.dossier_check import check_dossier, dossier_warnings, history_faults
from flows.dossier_claim import CLAIM, STATED_CLAIM, STATED_TRIPOD
from flows.dossier_facts import Surroundings, facts_of, shown_record
from flows.dossier_history import approvals_of_study, decision_in_words, gates_in_words
from flows.gates import epsilon_of_run
from flows.memory import fit_in_memory, read_workspace
from flows.mlflow_store import client_of
from flows.protocol import NOT_STATED, GovernanceSection
from flows.record_values import record_values
from flows.records import StudyRecord
from flows.registry import track_study
from flows.report_checklist import CHECKLIST
from flows.shown import resolve
from fusion.federation import summarise
from fusion.federation.consortium import Consortium
from fusion.federation.private_fitting import Schedule, schedule
from fusion.keys import SigningKey
from infra.settings import Workspace
from modalities.cohort import DataError
from tests.simulated_record import bare_record, full_record, study_protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CREATED = datetime(2026, 11, 23, 20, 0, tzinfo=UTC)
MADE = "2026-11-24T06:00:00+00:00"
RUN = "5a" * 32
HISTORY = (
    Version("2", "2026-11-23 20:01 UTC", RUN[:12], "candidate", "9 passed", "none yet"),
    Version("1", "2026-10-02 08:15 UTC", "0f" * 6, "champion", "9 passed", "approved by site-01"),
)
SAID = {name: f"what the lead says of {name}" for name in GovernanceSection.model_fields}
FILES = {
    "dossier.html", "facts.json", "bom.cdx.json", "tripod_ai.json", "tripod_ai.md", "claim.md",
    "model_card.md", "data.md", "privacy.md", "history.md",
}  # fmt: skip
Values = dict[str, Any]


def keep(record: StudyRecord, folder: Path, **around: Any) -> Path:
    """Write the record and the dossier of a run below a folder; give the dossier's."""
    folder.mkdir(parents=True, exist_ok=True)
    values = record_values(record, created=CREATED)
    (folder / "record.json").write_text(json.dumps(values))
    return write_dossier(record, folder / "dossier", **around).parent


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> StudyRecord:
    """Run a real small study, in memory."""
    root = tmp_path_factory.mktemp("consortium")
    write_consortium(root, (100, 90, 20), seed=3, tables_only=True)
    protocol, inputs, _ = read_workspace(Workspace(root=root))
    _, fitted = fit_in_memory(protocol, inputs)
    return StudyRecord(RUN, protocol, fitted, summarise(fitted), "c0ffee" * 6 + "c0de")


@pytest.fixture(scope="module")
def kept(small: StudyRecord, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / RUN[:12]
    approvals = Approvals(
        ({"site": "site-01", "protocol": "ab" * 32, "code": "cd" * 32, "same": "yes",
          "signature": "valid"},), "1 of 2 sites",
    )  # fmt: skip
    return keep(small, folder, history=HISTORY, approvals=approvals, version="2")


@pytest.fixture
def dossier(kept: Path, tmp_path: Path) -> Path:
    """Copy of the small study's dossier, to be spoiled."""
    return shutil.copytree(kept.parent, tmp_path / "run") / "dossier"


@pytest.fixture(scope="module")
def texts(kept: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in kept.iterdir()}


def rewritten(dossier: Path, change: Callable[[Values], None]) -> None:
    """Change a dossier's facts, and write all its files from the changed ones."""
    facts = json.loads((dossier / FACTS).read_text())
    change(facts)
    write_facts(facts, dossier)


def test_the_dossier_of_a_real_study_stands(kept: Path) -> None:
    assert {path.name for path in kept.iterdir()} == FILES
    assert check_dossier(kept) == []
    assert dossier_warnings(kept) == []


def test_every_number_of_the_page_is_in_the_run(kept: Path, texts: dict[str, str]) -> None:
    record = json.loads((kept.parent / "record.json").read_text())
    facts = json.loads(texts[FACTS])
    shown = re.findall(r'<data value="([^"]*)" data-key="([^"]*)">', texts[PAGE])
    of_run = [(value, key) for value, key in shown if not key.startswith("/dossier/")]
    assert len(of_run) > 100
    for value, key in of_run:
        found = resolve(record, key)
        assert value == (found if isinstance(found, str) else json.dumps(found))
    assert all(resolve(facts, key) is not None for _, key in shown)


def test_the_page_needs_nothing_from_outside(texts: dict[str, str]) -> None:
    page = texts[PAGE]
    ids = set(re.findall(r' id="([^"]+)"', page))
    links = re.findall(r' href="([^"]+)"', page)
    assert links
    assert {x for x in links if x.removeprefix("#") not in ids} == set()
    assert re.findall(r"<(?:img|link|iframe|object)|\ssrc=|url\(|@import", page) == []
    assert "default-src 'none'" in page


def test_what_people_must_find_is_there(texts: dict[str, str]) -> None:
    assert "Concordance was" in texts["model_card.md"]
    assert "site-03 | external" in texts["data.md"]
    assert "plain: the coordinator sees the sums of each site" in texts["privacy.md"]
    assert "| 1 | 2026-10-02 08:15 UTC |" in texts["history.md"]
    assert "approved by site-01" in texts["history.md"]
    assert "| site-01 | " + "ab" * 32 in texts["history.md"]
    assert "does not apply" in texts["claim.md"]
    items = json.loads(texts["tripod_ai.json"])
    assert [x["item"] for x in items] == [i.number for s in CHECKLIST.values() for i in s]


def test_a_field_that_is_blanked_is_found(texts: dict[str, str], kept: Path) -> None:
    for name, (start, end) in Random(0).sample(_fields(texts), 40):
        faults = _with(kept, name, texts[name][:start] + texts[name][end:])
        blanked = (name, texts[name][start:end])
        assert any("empty field" in x and x.startswith(name) for x in faults), blanked


def _fields(texts: dict[str, str]) -> list[tuple[str, tuple[int, int]]]:
    """Places of what stands in cells, sentences and JSON strings."""
    patterns = {
        ".html": r"<(td|dd|li)>(?P<x>.+?)</\1>",
        ".md": r"(?:\| |^- )(?P<x>[^|\n-][^|\n]*?)(?= \||$)",
        ".json": r'": "(?P<x>[^"\n]+)"',
    }  # fmt: skip
    chosen = ("dossier.html", "model_card.md", "data.md", "privacy.md", "tripod_ai.md",
              "history.md", "tripod_ai.json")  # fmt: skip
    return [
        (name, found.span("x"))
        for name in chosen
        for found in re.finditer(
            patterns[name[name.rindex(".") :]], _visible(texts[name]), re.MULTILINE
        )
    ]


def _visible(text: str) -> str:
    return text.split("<script")[0]


def _with(kept: Path, name: str, text: str) -> list[str]:
    """Check a dossier of which one file has another text."""
    original = (kept / name).read_text()
    try:
        (kept / name).write_text(text)
        return check_dossier(kept)
    finally:
        (kept / name).write_text(original)


def test_a_number_that_is_changed_is_found(texts: dict[str, str], kept: Path) -> None:
    digits = [
        (name, found.start())
        for name in sorted(set(texts) - {FACTS})
        for found in re.finditer(r"\d", _visible(texts[name]))
    ]
    for name, at in Random(0).sample(digits, 40):
        other = "7" if texts[name][at] != "7" else "3"
        faults = _with(kept, name, texts[name][:at] + other + texts[name][at + 1 :])
        assert faults, (name, texts[name][at - 40 : at + 40])
        assert all(x.startswith(name) for x in faults)


def test_a_number_changed_in_the_facts_and_everywhere_is_found(dossier: Path) -> None:
    def change(facts: Values) -> None:
        facts["results"]["arms"]["protocol"]["concordance"]["value"] = 0.912

    rewritten(dossier, change)
    assert "0.912" in (dossier / "model_card.md").read_text()
    (fault,) = check_dossier(dossier)
    assert "/results/arms/protocol/concordance/value: found 0.912, needed 0." in fault


def test_a_number_that_is_from_nowhere_is_found(dossier: Path) -> None:
    page = dossier / PAGE
    page.write_text(page.read_text().replace("What weakens it:", "It is right in 97 of 100."))
    faults = check_dossier(dossier)
    assert any("found the number 97" in x for x in faults)


def test_facts_without_a_word_are_found(dossier: Path) -> None:
    def change(facts: Values) -> None:
        facts["dossier"]["history"][0]["decision"] = " "
        facts["dossier"]["quorum"] = ""

    rewritten(dossier, change)
    faults = check_dossier(dossier)
    assert f"{FACTS}: /dossier/history/0/decision: found an empty field" in faults[0]
    assert any("/dossier/quorum: found an empty field" in x for x in faults)


@pytest.mark.parametrize("name", sorted(FILES - {FACTS}))
def test_a_missing_file_is_found(dossier: Path, name: str) -> None:
    (dossier / name).unlink()
    assert check_dossier(dossier) == [f"{name}: found none, needed it in the dossier"]


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "found none"), ("{", "no valid JSON"), ("{}", "no facts of this version"),
     ("[]", "no facts of this version")],
)  # fmt: skip
def test_unusable_facts_are_one_fault(dossier: Path, text: str | None, words: str) -> None:
    (dossier / FACTS).unlink()
    if text is not None:
        (dossier / FACTS).write_text(text)
    (fault,) = check_dossier(dossier)
    assert words in fault
    assert dossier_warnings(dossier) == []


def test_a_dossier_without_its_run_is_a_fault(dossier: Path) -> None:
    (dossier.parent / "record.json").unlink()
    (fault,) = check_dossier(dossier)
    assert "found none in the run's folder" in fault


def test_facts_that_no_page_can_show_are_a_fault(dossier: Path) -> None:
    facts = json.loads((dossier / FACTS).read_text())
    del facts["models"]
    (dossier / FACTS).write_text(json.dumps(facts))
    assert any("no page can be written" in x for x in check_dossier(dossier))


def test_an_unknown_item_is_found(tmp_path: Path) -> None:
    dossier = keep(full_record(), tmp_path / "run")
    claim = dossier / "claim.md"
    claim.write_text(claim.read_text().replace("| 44 |", "| 45 |"))
    assert any("found '45', needed an item of the checklist" in x for x in check_dossier(dossier))


def test_a_study_with_images_answers_every_item_of_claim(tmp_path: Path) -> None:
    dossier = keep(full_record(), tmp_path / "run")
    lines = (dossier / "claim.md").read_text().splitlines()
    rows = [x.split(" | ") for x in lines if re.match(r"\| \d+ \|", x)]
    assert [x[0].removeprefix("| ") for x in rows] == [str(i) for i in range(1, 45)]
    assert all(all(cell.strip(" |") for cell in row) for row in rows)
    assert check_dossier(dossier) == []


def test_checklists_ask_for_governance_by_its_keys() -> None:
    items = {
        "claim": {i.number for s in CLAIM.values() for i in s},
        "tripod": {i.number for s in CHECKLIST.values() for i in s},
    }
    assert set(STATED_CLAIM) <= items["claim"]
    assert set(STATED_TRIPOD) <= items["tripod"]
    assert {*STATED_CLAIM.values(), *STATED_TRIPOD.values()} <= set(GovernanceSection.model_fields)


def test_what_the_lead_says_is_shown_and_unsaid_of_patients_is_a_fault(tmp_path: Path) -> None:
    dossier = keep(bare_record(), tmp_path / "silent")
    faults = check_dossier(dossier)
    assert len(faults) == len(SAID)
    assert all(f"found {NOT_STATED!r}" in x for x in faults)
    assert dossier_warnings(dossier) == []
    simulated = keep(full_record(), tmp_path / "simulated")
    assert check_dossier(simulated) == []
    assert [x.split(":")[1].strip() for x in dossier_warnings(simulated)] == [
        f"governance.{name}" for name in GovernanceSection.model_fields
    ]
    record = bare_record()
    protocol = record.protocol.model_copy(update={"governance": GovernanceSection(**SAID)})
    said = StudyRecord(**{**vars(record), "protocol": protocol})
    dossier = keep(said, tmp_path / "said")
    assert check_dossier(dossier) == []
    card = (dossier / "model_card.md").read_text()
    assert SAID["intended_use"] in card
    assert "Study lead: what the lead says of ethics." in (dossier / "tripod_ai.md").read_text()
    items = {x["item"]: x for x in json.loads((dossier / "tripod_ai.json").read_text())}
    assert items["17"]["said"] == SAID["ethics"]
    assert items["17"]["state"] == "◐ In part"


def small_cells(record: StudyRecord) -> Values:
    """Give a record whose smallest cell is 10, with counts below it."""
    values = json.loads(json.dumps(record_values(record, created=CREATED)))
    values["protocol"]["privacy"]["cell"] = 10
    values["sites"][0] |= {"n_test": 90, "n_test_events": 6}
    values["totals"] |= {"n_test_events": 6 + 30 + 22 + 33}
    values["results"]["subgroups"][0] |= {"n_patients": 7, "n_events": 3}
    return values


def test_small_counts_and_those_that_tell_them_are_hidden(tmp_path: Path) -> None:
    values = small_cells(full_record())
    (tmp_path / "record.json").write_text(json.dumps(values))
    dossier = write_facts(facts_of(values, Surroundings(MADE)), tmp_path / "dossier").parent
    assert check_dossier(dossier) == []
    data = (dossier / "data.md").read_text()
    assert "| 90 (< 10) |" in data
    assert "| 42 (hidden) |" in data  # the smallest other, or the total would tell the first
    assert "| 54 (30) |" in data
    card = (dossier / "model_card.md").read_text()
    assert "age, below 60.5 | < 10 |" in card
    assert "age, 60.5 and above | hidden |" in card
    facts = json.loads((dossier / FACTS).read_text())
    assert facts["sites"][0]["n_test_events"] is None
    assert '"n_test_events": 6' not in (dossier / PAGE).read_text()


def test_a_small_cell_that_is_shown_is_found(tmp_path: Path) -> None:
    values = small_cells(full_record())
    (tmp_path / "record.json").write_text(json.dumps(values))
    dossier = write_facts(facts_of(values, Surroundings(MADE)), tmp_path / "dossier").parent

    def change(facts: Values) -> None:
        facts["sites"][0]["n_test_events"] = 6
        del facts["dossier"]["hidden"]["/sites/0/n_test_events"]

    rewritten(dossier, change)
    assert "| 90 (6) |" in (dossier / "data.md").read_text()
    faults = check_dossier(dossier)
    assert any("found 6, needed it hidden: it is below 10" in x for x in faults)


def test_hidden_totals_stay_hidden_where_all_rows_are(tmp_path: Path) -> None:
    values = small_cells(full_record())
    for site in values["sites"]:
        site |= {"n_test": 4, "n_test_events": 1}
    values["totals"] |= {"n_test": 20, "n_test_events": 5}
    shown, hidden = shown_record(values)
    assert hidden["/sites/2/n_test"] == "small"
    assert shown["totals"]["n_test_events"] is None
    files = files_of(facts_of(values, Surroundings(MADE)))
    assert "| All | all of the above | 434 (242) | 20 (hidden) |" in files["data.md"]


ROWS = st.lists(
    st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    min_size=1,
    max_size=7,
)


@given(ROWS, st.integers(2, 12))
def test_no_small_count_follows_from_what_is_shown(rows: list[tuple[int, int]], least: int) -> None:
    found = hidden_cells(rows, least=least)
    for states, kinds, total in (
        (found.patients, [[n for n, _ in rows]], found.totals[0]),
        (found.events, [[e for _, e in rows], [n - e for n, e in rows]], found.totals[1]),
    ):
        hidden = [i for i, state in enumerate(states) if state]
        assert len(hidden) != 1 or total
        for counts in kinds:
            shown = [counts[i] for i, state in enumerate(states) if not state and rows[i][0]]
            assert not [x for x in shown if 0 < x < least]
            # The total gives the sum of what is hidden away, and no more than that.
            assert total or not hidden or not 0 < sum(counts[i] for i in hidden) < least


@given(ROWS)
def test_where_any_count_may_be_shown_none_is_hidden(rows: list[tuple[int, int]]) -> None:
    found = hidden_cells(rows, least=1)
    assert not any((*found.patients, *found.events, *found.totals))


def test_no_more_is_hidden_than_needed_in_small_tables() -> None:
    found = hidden_cells([(50, 20), (40, 5), (60, 30)], least=10)
    assert found.events == ("beside", "small", "")
    assert found.patients == ("", "", "")
    assert found.totals == ("", "")
    assert all(len(x) == 2 for x in combinations(found.totals, 2))


def patients_record() -> Values:
    """Give a record of patients' data whose sums no single site's coordinator sees."""
    values = record_values(full_record(), created=CREATED)
    values = copy.deepcopy(json.loads(json.dumps(values)))
    values["protocol"]["study"]["data"] = "patients"
    values["protocol"]["governance"] = SAID
    values["protocol"]["federation"]["sums"] = "secure_sum"
    values["protocol"]["evaluation"]["leave_one_site_out"] = False
    values["protocol"]["privacy"]["cell"] = 10
    return values


def private_record() -> Values:
    """Give a record of noisy sums."""
    values = patients_record()
    values["protocol"]["differential_privacy"]["epsilon"] = 3.0
    return values


def test_budgets_are_told_by_site(tmp_path: Path) -> None:
    dossier, _ = spent(private_record(), tmp_path / "run")
    assert check_dossier(dossier) == []
    privacy = (dossier / "privacy.md").read_text()
    assert "epsilon 3, delta 1e−05" in privacy
    assert "| site-01 | 3.000 over all releases |" in privacy
    assert "| site-04 | nothing: it trained nothing |" in privacy
    assert "of at least three sites together" in privacy


def test_audits_are_told_by_network(tmp_path: Path) -> None:
    values = patients_record()  # whose networks' weights leave the sites
    values["protocol"]["encoder"]["pathology"]["sharing"] = "weights"
    dossier, _ = spent(values, tmp_path / "run")
    assert check_dossier(dossier) == []
    privacy = (dossier / "privacy.md").read_text()
    assert "| pathology | site-01, site-02 | passed" in privacy
    assert "| site-01 | no budget: sums without noise |" in privacy
    values["protocol"]["study"]["data"] = "public"
    files = files_of(facts_of(values, Surroundings(MADE)))
    assert "| pathology | none | not asked for" in files["privacy.md"]


def spent(values: Values, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Write the dossier of a record; give it, and what it says was spent per site."""
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(values))
    facts = facts_of(values, Surroundings(MADE))
    dossier = write_facts(facts, folder / "dossier").parent
    return dossier, {x["site"]: x.get("epsilon") for x in facts["dossier"]["privacy"]["budgets"]}


@pytest.mark.parametrize("epsilon", [0.7, 3.0])
def test_epsilon_is_that_of_the_run_s_releases_and_says_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epsilon: float
) -> None:
    values = private_record()
    values["protocol"]["differential_privacy"]["epsilon"] = epsilon
    values["sites"][1]["code"] = "below_minimum_events"
    dossier, found = spent(values, tmp_path / "one")
    assert found["site-01"] == pytest.approx(epsilon_of_run(values), abs=1e-4)
    assert found["site-01"] == pytest.approx(epsilon, rel=0.01)
    assert found["site-04"] is None
    page = (dossier / PAGE).read_text()
    keys = [f"/dossier/privacy/budgets/{i}/epsilon" for i in range(5)]
    assert [key in page for key in keys] == [True, True, True, False, False]
    assert f'data-key="{keys[0]}">{found["site-01"]:.3f}</data>' in page
    assert "at most: it left before the end" in (dossier / "privacy.md").read_text()
    assert check_dossier(dossier) == []

    # Releases that come to more than the protocol's epsilon: what they come to is shown.
    def with_more_steps(*given: Any) -> Schedule:
        found = schedule(*given)
        return dataclasses.replace(found, steps=2 * found.steps)

    monkeypatch.setattr("fusion.federation.private_fitting.schedule", with_more_steps)
    other, more = spent(values, tmp_path / "other")
    assert more["site-01"] > 1.2 * epsilon
    assert f"{more['site-01']:.3f} over all releases" in (other / "privacy.md").read_text()


def test_an_epsilon_that_is_not_the_run_s_is_found(tmp_path: Path) -> None:
    dossier, found = spent(private_record(), tmp_path / "run")

    def change(facts: Values) -> None:
        facts["dossier"]["privacy"]["budgets"][0]["epsilon"] = 2.0

    rewritten(dossier, change)
    assert "| site-01 | 2.000 over all releases |" in (dossier / "privacy.md").read_text()
    (fault,) = check_dossier(dossier)
    assert f"/privacy/budgets/0/epsilon: found 2.0, needed {found['site-01']}" in fault
    text = (dossier / "privacy.md").read_text().replace("2.000 over", "1.000 over")
    (dossier / "privacy.md").write_text(text)
    assert any(x.startswith("privacy.md: line") for x in check_dossier(dossier))


def test_releases_that_cannot_be_counted_are_said_to_be_unknown(tmp_path: Path) -> None:
    values = private_record()
    values["protocol"]["evaluation"]["leave_one_site_out"] = True  # which such a study may not ask
    dossier, found = spent(values, tmp_path / "run")
    assert set(found.values()) == {None}
    assert "| site-01 | unknown: the releases" in (dossier / "privacy.md").read_text()
    assert check_dossier(dossier) == []


@pytest.mark.parametrize(
    ("tags", "words"),
    [({}, "not computed"),
     ({"gate.min_sites": "passed", "gate.min_sites.found": "3"}, "1 passed"),
     ({"gate.min_sites": "passed", "gate.signatures": "failed", "gate.left_out": "not_applicable"},
      "1 passed; failed: signatures; 1 did not apply")],
)  # fmt: skip
def test_gates_are_summed_up(tags: dict[str, str], words: str) -> None:
    assert gates_in_words(tags) == words


@pytest.mark.parametrize(
    ("tags", "words"),
    [({}, "none yet"),
     ({"approved_by": "site-01,site-02", "approved_at": "2026-11-24T05:00:00Z"},
      "approved by site-01, site-02 at 2026-11-24T05:00:00Z"),
     ({"consilium.approved_by": "site-01"}, "approved by site-01"),
     ({"consilium.rejected": "calibration", "consilium.rejected_by": "site-02",
       "consilium.rejected_at": "2026-11-24T05:00:00Z"},
      "rejected: calibration by site-02 at 2026-11-24T05:00:00Z")],
)  # fmt: skip
def test_decisions_are_told(tags: dict[str, str], words: str) -> None:
    assert decision_in_words(tags) == words


def test_approvals_tell_whose_signature_stands(tmp_path: Path) -> None:
    keys = {f"site-0{i}": SigningKey(bytes([i]) * 32) for i in (1, 2)}
    consortium = Consortium(
        "lung-os", SigningKey(b"c" * 32).public, {x: k.public for x, k in keys.items()}, quorum=2
    )
    protocol = study_protocol().fingerprint()
    assert approvals_of_study(tmp_path, protocol) == Approvals()
    folder = tmp_path / "coordinator" / "approvals"
    stated = Statement("lung-os", protocol, "a" * 64, consortium.digest(), "b" * 64)
    write_approval(approve(stated, "site-01", keys["site-01"]), folder)
    write_approval(approve(stated, "site-02", keys["site-01"]), folder)
    (unchecked, _) = approvals_of_study(tmp_path, protocol).sites
    assert unchecked["signature"].startswith("not checked")
    kit = tmp_path / "kits" / "coordinator"
    kit.mkdir(parents=True)
    (kit / "consortium.json").write_bytes(consortium.to_bytes())
    found = approvals_of_study(tmp_path, protocol)
    assert [x["signature"] for x in found.sites] == ["valid", "not valid in this consortium"]
    assert found.quorum == "2 of 2 sites"
    assert approvals_of_study(tmp_path, "f" * 64).sites[0]["same"] == "no, of another protocol"
    (folder / "site-01.json").write_text("{}")
    assert approvals_of_study(tmp_path, protocol).quorum.startswith("unknown")


@pytest.fixture(scope="module")
def registered(
    small: StudyRecord, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Workspace, StudyRecord]:
    """Give a coordinator's folder in which the small study is registered."""
    root = tmp_path_factory.mktemp("coordinator")
    write_consortium(root, (5,), seed=3, tables_only=True)  # for its study.toml
    workspace = Workspace(root=root)
    folder = root / "runs" / RUN[:12]
    report = keep(small, folder).parent / "report.html"
    report.write_text("<html></html>")
    track_study(
        small, tracking_uri=workspace.mlflow_uri, artifact_root=root / "artifacts", report=report
    )
    return workspace, small


@pytest.mark.slow
def test_a_refreshed_dossier_knows_its_version(
    registered: tuple[Workspace, StudyRecord], tmp_path: Path
) -> None:
    workspace, record = registered
    study = record.protocol.study.name
    found = refresh_dossier(workspace, study)
    assert found.version == "1"
    assert check_dossier(found.page.parent) == []
    assert "candidate | not computed | none yet" in (found.page.parent / "history.md").read_text()
    client = client_of(workspace.mlflow_uri)
    client.set_model_version_tag(f"{study}-fusion", "1", "gate.min_sites", "passed")
    client.set_model_version_tag(f"{study}-fusion", "1", "approved_by", "site-01")
    (version,) = client.search_model_versions(f"name = '{study}-fusion'")
    refresh_dossier(workspace, study, 1)
    kept = tmp_path / "kept"
    kept.mkdir()
    client.download_artifacts(version.run_id, "dossier", str(kept))
    history = (kept / "dossier" / "history.md").read_text()
    assert "candidate | 1 passed | approved by site-01" in history
    client.download_artifacts(version.run_id, "record.json", str(kept))
    assert check_dossier(kept / "dossier") == []
    with pytest.raises(DataError, match="found no version 7, needed one of: 1"):
        refresh_dossier(workspace, study, 7)


@pytest.mark.slow
def test_a_run_that_is_gone_from_the_disk_is_read_from_the_registry(
    registered: tuple[Workspace, StudyRecord], tmp_path: Path
) -> None:
    workspace, record = registered
    elsewhere = Workspace(root=tmp_path, tracking_uri=workspace.mlflow_uri)
    found = refresh_dossier(elsewhere, record.protocol.study.name)
    assert found.page == tmp_path / "runs" / RUN[:12] / "dossier" / PAGE
    assert check_dossier(found.page.parent) == []


@pytest.mark.slow
def test_the_command_writes_checks_and_finds_faults(
    registered: tuple[Workspace, StudyRecord], tmp_path: Path
) -> None:
    workspace, record = registered
    name, root = f"{record.protocol.study.name}-fusion", str(workspace.root)
    run = CliRunner().invoke
    done = run(app, ["dossier", f"{name}@candidate", "--root", root, "--out", str(tmp_path / "d")])
    assert done.exit_code == 0, done.output
    assert {x.name for x in (tmp_path / "d").iterdir()} == FILES
    done = run(app, ["dossier", "--root", root, "--out", str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").is_file()
    stands = run(app, ["dossier", f"{name}/1", "--root", root, "--check"])
    assert stands.exit_code == 0
    assert "stands" in stands.output
    card = workspace.root / "runs" / RUN[:12] / "dossier" / "model_card.md"
    card.write_text(card.read_text().replace("Concordance was 0.", "Concordance was 1."))
    falls = run(app, ["dossier", "1", "--root", root, "--check", "--json"])
    assert falls.exit_code == 1
    (fault,) = json.loads(falls.stdout)["faults"]
    assert "model_card.md: line" in fault
    unknown = run(app, ["dossier", "7", "--root", root])
    assert isinstance(unknown.exception, DataError)
    assert f"needed one of: {name}/1" in str(unknown.exception)


def test_a_version_that_the_registry_does_not_have_is_found(kept: Path) -> None:
    assert history_faults(kept, HISTORY) == []
    (fault,) = history_faults(kept, HISTORY[:1])
    assert "found version 1 of run" in fault
