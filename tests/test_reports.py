from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from rich.console import Console

from flows.protocol import StudyProtocol, read_protocol
from flows.records import Reference, StudyRecord
from flows.reports import (
    HIDDEN,
    NOTHING,
    ResultsTable,
    concordance_over,
    results_table,
    to_markdown,
    to_rich,
)
from fusion.evaluation import Estimate
from fusion.federation import (
    LOCAL_ENCODERS,
    LOCAL_ONLY,
    PROTOCOL,
    InProcess,
    Outcome,
    SiteRows,
    SiteStudy,
    Split,
    StudyResults,
    run_federation,
    summarise,
)
from fusion.federation.alarms import SiteAlarm

EXTERNAL = "site-04"


def study_protocol(**sections: object) -> StudyProtocol:
    columns = [f"r{i}" for i in range(4)]
    return read_protocol(
        {
            "study": {
                "name": "lung", "data": "simulated", "horizon_days": 1095,
                "grid_days": [365, 730, 1095, 1825],
            },
            "modality": {
                "pathology": {"kind": "pathology"},
                "radiology": {"kind": "tabular", "columns": columns},
                "clinical": {"kind": "clinical", "numeric": ["age", "stage"]},
            },
            "fusion": {"folds": 3},
            "privacy": {"cell": 1},
            **sections,
        }
    )  # fmt: skip


def site_rows(rng: np.random.Generator, n: int, *, external: bool, slides: bool) -> SiteRows:
    radiology, clinical, slide = (
        rng.normal(size=(n, 4)),
        rng.normal(size=(n, 2)),
        rng.normal(size=n),
    )
    log_hazard = radiology @ np.linspace(-0.8, 0.8, 4) + clinical.sum(axis=1) / 2 + slide / 3
    event_time = np.ceil(rng.exponential(1500 * np.exp(-log_hazard)))
    censored = rng.uniform(300, 2500, n)
    event, time = event_time <= censored, np.minimum(event_time, censored)
    radiology[rng.random(n) < 0.15] = np.nan
    slide[rng.random(n) < (0.1 if slides else 1.1)] = np.nan
    cut = 0 if external else int(0.7 * n)
    local = {"pathology": slide, "radiology": radiology @ np.ones(4), "clinical": clinical[:, 0]}
    return SiteRows(
        cohort=f"{rng.integers(2**60):064x}",
        train=Outcome(event[:cut], time[:cut]),
        test=Outcome(event[cut:], time[cut:]),
        folds=rng.integers(0, 3, cut),
        tables={
            "radiology": Split(radiology[:cut], radiology[cut:]),
            "clinical": Split(clinical[:cut], clinical[cut:]),
        },
        local={} if external else {k: Split(v[:cut], v[cut:]) for k, v in local.items()},
    )


def study_record(*, n_external: int = 60, n_site_03: int = 140, **sections: object) -> StudyRecord:
    rng = np.random.default_rng(0)
    protocol = study_protocol(**sections)
    plan = protocol.plan("a" * 64)
    rows = {
        "site-01": site_rows(rng, 300, external=False, slides=True),
        "site-02": site_rows(rng, 180, external=False, slides=True),
        "site-03": site_rows(rng, n_site_03, external=False, slides=False),
        EXTERNAL: site_rows(rng, n_external, external=True, slides=False),
    }
    fitted = run_federation(plan, InProcess({s: SiteStudy(plan, x) for s, x in rows.items()}))
    return StudyRecord("a" * 64, protocol, fitted, summarise(fitted), "0.1.0")


@pytest.fixture(scope="module")
def record() -> StudyRecord:
    return study_record()


def with_reference(record: StudyRecord) -> StudyRecord:
    truth = Estimate(0.81, 0.01, 0.79, 0.83)
    reference = Reference(
        concordance={"federated": truth, "pooled": truth, "true_hazard": truth},
        by_site={"pooled": {EXTERNAL: truth}, "true_hazard": {EXTERNAL: truth}},
        local={},
        local_mean=0.612,
        max_coefficient_gap=3e-10,
    )
    return dataclasses.replace(record, reference=reference)


def cell(table: ResultsTable, row: str, column: str) -> str:
    found = next(x for x in table.rows if x[0].startswith(row))
    return found[table.columns.index(column)]


def test_each_row_is_as_long_as_the_columns(record: StudyRecord) -> None:
    for table in (results_table(record), results_table(with_reference(record))):
        assert {len(row) for row in table.rows} == {len(table.columns)}


def test_a_cell_holds_the_released_estimate(record: StudyRecord) -> None:
    estimate = record.results.arms[PROTOCOL].by_site["site-02"]
    text = f"{estimate.value:.3f} ({estimate.low:.2f}–{estimate.high:.2f})"
    assert cell(results_table(record), "site-02", "Federated") == text


def test_counts_are_those_that_the_site_told(record: StudyRecord) -> None:
    site = record.fitted.sites[0]
    table = results_table(record)
    assert cell(table, "site-01", "Training patients (events)") == (
        f"{site.n_train} ({site.n_train_events})"
    )
    assert cell(table, EXTERNAL, "Training patients (events)") == NOTHING


def test_an_external_site_is_marked_and_has_no_figure_of_local_models(record: StudyRecord) -> None:
    table = results_table(record)
    row = next(x for x in table.rows if x[0].startswith(EXTERNAL))
    assert row[0] == f"{EXTERNAL} (external)"
    assert cell(table, EXTERNAL, "Local only") == NOTHING
    assert cell(table, EXTERNAL, "Federated with local encoders") == NOTHING
    assert cell(table, EXTERNAL, "Federated") != NOTHING
    assert any("External sites cannot use pathology" in note for note in table.notes)


def test_arms_are_compared_on_the_same_patients(record: StudyRecord) -> None:
    training = ["site-01", "site-02", "site-03"]
    table = results_table(record)
    shared = concordance_over(record, PROTOCOL, training)
    assert shared is not None
    assert shared.value != record.results.arms[PROTOCOL].concordance.value  # type: ignore[union-attr]
    assert cell(table, "Training sites", "Federated").startswith(f"{shared.value:.3f}")
    assert cell(table, "All sites", "Local only") == NOTHING


def test_concordance_over_all_sites_is_the_consortium_s(record: StudyRecord) -> None:
    sites = list(record.fitted.evaluations)
    for arm in (PROTOCOL, LOCAL_ENCODERS, LOCAL_ONLY):
        assert concordance_over(record, arm, sites) == record.results.arms[arm].concordance
    assert concordance_over(record, PROTOCOL, []) is None


def test_without_external_sites_one_row_sums_up() -> None:
    full = study_record()
    inside = tuple(s for s in full.fitted.sites if s.site != EXTERNAL)
    released = {s: e for s, e in full.fitted.evaluations.items() if s != EXTERNAL}
    fitted = dataclasses.replace(full.fitted, sites=inside, evaluations=released)
    table = results_table(dataclasses.replace(full, fitted=fitted))
    assert [row[0] for row in table.rows] == ["site-01", "site-02", "site-03", "All sites"]
    assert NOTHING not in table.rows[-1]


def test_a_site_below_its_minimum_test_events_is_hidden() -> None:
    table = results_table(study_record(n_site_03=110, privacy={"cell": 1, "test_events": 18}))
    assert cell(table, "site-03", "Test patients (events)") == HIDDEN
    assert cell(table, "site-03", "Federated") == NOTHING
    assert any(note.startswith("Hidden: fewer than 18 test events") for note in table.notes)


def test_notes_say_what_was_lowered_lacking_and_not_cross_fitted(record: StudyRecord) -> None:
    encoders = {
        name: dataclasses.replace(encoder, cross_fitted=name != "radiology")
        for name, encoder in record.fitted.encoders.items()
    }
    fitted = dataclasses.replace(record.fitted, encoders=encoders)
    notes = "\n".join(results_table(dataclasses.replace(record, fitted=fitted)).notes)
    assert "lowered for simulated data: cell 1 (default 10)" in notes
    assert "site-03 does not contribute pathology." in notes
    assert "too small: radiology." in notes


def test_notes_say_which_site_left_and_why(record: StudyRecord) -> None:
    left = dataclasses.replace(record.fitted.sites[1], code="unreachable")
    sites = (record.fitted.sites[0], left, *record.fitted.sites[2:])
    table = results_table(
        dataclasses.replace(record, fitted=dataclasses.replace(record.fitted, sites=sites))
    )
    assert "site-02 left the study: unreachable." in table.notes
    assert table.rows[1][0] == "site-02 (left: unreachable)"


def test_notes_say_in_a_line_each_what_held_out_patients_gain_and_which_site_to_look_at(
    record: StudyRecord,
) -> None:
    gain = record.results.arms[LOCAL_ONLY].difference
    assert gain is not None
    text = f"models is {gain.value:+.3f} ({gain.low:+.2f} to {gain.high:+.2f})"
    assert sum(text in note for note in results_table(record).notes) == 1
    alarms = (SiteAlarm("site-02", "below_chance", -4.15),)
    results = dataclasses.replace(record.results, alarms=alarms)
    first, *_ = results_table(dataclasses.replace(record, results=results)).notes
    assert first == (
        "Alarm at site-02: patients at higher predicted hazard lived longer (z = -4.2); a person "
        "has to look at its data, with the site."
    )
    bare = dataclasses.replace(record, results=StudyResults(arms={}))
    assert bare.results.holdout_gain is None
    assert not any("held-out" in note for note in results_table(bare).notes)


def test_reference_columns_appear_for_simulated_data_only(record: StudyRecord) -> None:
    assert "Pooled rows" not in results_table(record).columns
    table = results_table(with_reference(record))
    assert cell(table, EXTERNAL, "True hazard") == "0.810 (0.79–0.83)"
    assert cell(table, "site-01", "True hazard") == NOTHING
    assert cell(table, "All sites", "Pooled rows") == "0.810 (0.79–0.83)"
    assert any("3.0e-10" in note for note in table.notes)


def test_markdown_is_a_table_and_a_list(record: StudyRecord) -> None:
    table = results_table(record)
    lines = to_markdown(table).splitlines()
    assert sum(line.startswith("|") for line in lines) == 2 + len(table.rows)
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert sum(line.startswith("- ") for line in lines) == len(table.notes)


@pytest.mark.parametrize("width", [60, 100])
def test_the_terminal_table_loses_no_figure(record: StudyRecord, width: int) -> None:
    screen = io.StringIO()
    Console(file=screen, width=width).print(to_rich(results_table(with_reference(record))))
    assert "…" not in screen.getvalue()
    assert f"{record.results.arms[PROTOCOL].by_site['site-02'].value:.3f}" in screen.getvalue()
