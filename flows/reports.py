"""What a study found, for people: one table, from released sums only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from flows.report_words import alarm_words
from fusion.evaluation import NoComparablePairs, PairCounts, concordance_index
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flows.records import Reference, StudyRecord
    from fusion.evaluation import Estimate
    from fusion.federation import SiteOutcome

NOTHING = "–"
HIDDEN = "hidden"
ARM_NAMES = {
    LOCAL_ONLY: "Local only",
    PROTOCOL: "Federated",
    LOCAL_ENCODERS: "Federated with local encoders",
}
REFERENCE_NAMES = {"pooled": "Pooled rows", "true_hazard": "True hazard"}


@dataclass(frozen=True)
class ResultsTable:
    """A table of text, for Markdown and for the terminal.

    Attributes
    ----------
    rows
        One per site, then one or two for the consortium; each as long as ``columns``.
    notes
        Sentences that a reader needs before comparing columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


def results_table(record: StudyRecord) -> ResultsTable:
    """Concordance with 95 % intervals per site and arm, with counts and what to keep in mind.

    Models that only training sites have (their own, and those on local encoders) are compared with
    the federated one on the training sites' test patients; the last row adds external sites.
    """
    arms = [arm for arm in ARM_NAMES if arm in record.results.arms]
    references = [x for x in REFERENCE_NAMES if _reference_has(record.reference, x)]
    columns = ("Site", "Training patients (events)", "Test patients (events)")
    return ResultsTable(
        title=f"{record.protocol.study.name}: concordance for {record.protocol.study.endpoint} "
        "(95 % interval)",
        columns=(
            *columns,
            *(ARM_NAMES[x] for x in arms),
            *(REFERENCE_NAMES[x] for x in references),
        ),
        rows=(
            *(_site_row(record, site, arms, references) for site in record.fitted.sites),
            *_consortium_rows(record, arms, references),
        ),
        notes=_notes(record),
    )


def _reference_has(reference: Reference | None, arm: str) -> bool:
    return reference is not None and arm in reference.concordance


def is_external(site: SiteOutcome) -> bool:
    """Whether a site takes part with test patients only."""
    return not site.trains and not site.code


def _site_row(
    record: StudyRecord, site: SiteOutcome, arms: Sequence[str], references: Sequence[str]
) -> tuple[str, ...]:
    name = f"{site.site} (external)" if is_external(site) else site.site
    estimates = [record.results.arms[x].by_site.get(site.site) for x in arms]
    by_site = record.reference.by_site if record.reference is not None else {}
    estimates += [by_site.get(x, {}).get(site.site) for x in references]
    return (
        f"{name} (left: {site.code})" if site.code else name,
        _counts(site.n_train, site.n_train_events) if site.trains else NOTHING,
        _counts(site.n_test, site.n_test_events),
        *(_interval(x) for x in estimates),
    )


def _counts(n_patients: int, n_events: int) -> str:
    return f"{n_patients} ({n_events})" if n_patients else HIDDEN


def _interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    return f"{estimate.value:.3f} ({estimate.low:.2f}–{estimate.high:.2f})"


def _consortium_rows(
    record: StudyRecord, arms: Sequence[str], references: Sequence[str]
) -> list[tuple[str, ...]]:
    sites = record.fitted.sites
    training = [s for s in sites if s.trains]
    rows = [
        ("Training sites", *_totals(training), *(_over(record, x, training) for x in arms),
         *(NOTHING for _ in references)),
        ("All sites", *_totals(sites),
         *(_over(record, x, sites) if x == PROTOCOL else NOTHING for x in arms),
         *(_reference_cell(record.reference, x) for x in references)),
    ]  # fmt: skip
    if any(is_external(s) for s in sites):
        return rows
    (_, *only), (_, *whole) = rows
    merged = [a if a != NOTHING else b for a, b in zip(only, whole, strict=True)]
    return [("All sites", *merged)]


def _totals(sites: Sequence[SiteOutcome]) -> tuple[str, str]:
    return (
        _counts(sum(s.n_train for s in sites), sum(s.n_train_events for s in sites)),
        _counts(sum(s.n_test for s in sites), sum(s.n_test_events for s in sites)),
    )


def _over(record: StudyRecord, arm: str, sites: Sequence[SiteOutcome]) -> str:
    return _interval(concordance_over(record, arm, [s.site for s in sites]))


def concordance_over(record: StudyRecord, arm: str, sites: Sequence[str]) -> Estimate | None:
    """Concordance of an arm over some sites that released pairs for it; None where none did."""
    row = record.fitted.plan.scored.index(arm)
    counts = [
        PairCounts.from_vector(found.pairs[row])
        for site, found in record.fitted.evaluations.items()
        if site in sites and found.pairs[row].any()
    ]
    try:
        return concordance_index(counts) if counts else None
    except NoComparablePairs:
        return None


def _reference_cell(reference: Reference | None, arm: str) -> str:
    return _interval(reference.concordance[arm]) if reference is not None else NOTHING


def _notes(record: StudyRecord) -> tuple[str, ...]:
    found = [
        *_alarm_notes(record),
        "Concordance is Harrell's, within each site and pooled over its comparable pairs; 0.5 is "
        "chance, higher is better.",
        *_gain_note(record),
        *_lowered_note(record),
        *_cross_fitting_note(record),
        *_site_notes(record),
        *_external_note(record),
        *_reference_notes(record),
    ]
    return tuple(found)


def _alarm_notes(record: StudyRecord) -> list[str]:
    return [
        f"Alarm at {alarm.site}: {alarm_words(alarm.reason)} (z = {alarm.z:.1f}); a person has to "
        "look at its data, with the site."
        for alarm in record.results.alarms
    ]


def _gain_note(record: StudyRecord) -> list[str]:
    gain = record.results.holdout_gain
    if gain is None:
        return []
    return [
        "On held-out patients, concordance of the federated model less that of the sites' own "
        f"models is {gain.value:+.3f} ({gain.low:+.2f} to {gain.high:+.2f}): above 0 the "
        "consortium is worth it."
    ]


def _lowered_note(record: StudyRecord) -> list[str]:
    lowered = record.protocol.privacy.lowered()
    if not lowered:
        return []
    return [
        f"Minimum counts are lowered for {record.protocol.study.data} data: {', '.join(lowered)}."
    ]


def _cross_fitting_note(record: StudyRecord) -> list[str]:
    names = [x for x, encoder in record.fitted.encoders.items() if not encoder.cross_fitted]
    if not names:
        return []
    return [
        f"Fitted without cross-fitting, as some site's folds are too small: {', '.join(names)}. "
        "The fusion model saw these modalities more optimistic than they are."
    ]


def _site_notes(record: StudyRecord) -> list[str]:
    notes = []
    for site in record.fitted.sites:
        lacking = [x for x in record.protocol.modalities if x not in site.contributes]
        if site.code:
            notes.append(f"{site.site} left the study: {site.code}.")
        elif site.trains and lacking:
            notes.append(f"{site.site} does not contribute {', '.join(lacking)}.")
    if any(not s.n_test for s in record.fitted.sites if not s.code):
        minimum = record.protocol.privacy.test_events
        notes.append(f"Hidden: fewer than {minimum} test events at the site.")
    return notes


def _external_note(record: StudyRecord) -> list[str]:
    encoders = record.protocol.encoder
    local = [x for x in record.protocol.modalities if encoders[x].sharing == "local"]
    if not any(is_external(s) for s in record.fitted.sites):
        return []
    notes = [
        "External sites train nothing, so that local models and local encoders have no figure "
        "there; compare these columns in the row of the training sites."
    ]
    if local:
        notes.append(
            f"External sites cannot use {', '.join(local)}: local encoders never leave a site."
        )
    return notes


def _reference_notes(record: StudyRecord) -> list[str]:
    reference = record.reference
    if reference is None:
        return []
    values = ", ".join(
        f"{arm.replace('_', ' ')} {x.value:.3f}" for arm, x in reference.concordance.items()
    )
    return [
        f"On all test patients of all sites, whose rows may be pooled as the data are "
        f"{record.protocol.study.data}: {values}; mean of models trained at one site "
        f"{reference.local_mean:.3f}.",
        "Largest gap between the federated coefficients and those of a fit of the pooled rows, by "
        f"an independent library where there is one: {reference.max_coefficient_gap:.1e}.",
    ]


def to_markdown(table: ResultsTable) -> str:
    """Write a table as Markdown, notes as a list below it."""
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"- {note}" for note in table.notes)
    return f"**{table.title}**\n\n{body}\n\n{notes}\n"


def to_rich(table: ResultsTable) -> Table:
    """Lay a table out for the terminal, notes as its caption."""
    laid_out = Table(
        title=Text(table.title, style="bold"),
        caption=Text("\n".join(f"· {note}" for note in table.notes)),
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        caption_justify="left",
        title_justify="left",
    )
    for i, column in enumerate(table.columns):
        lines = [column, *(_in_two_lines(row[i]) for row in table.rows)]
        words = " ".join(lines).split()
        laid_out.add_column(
            column.replace(" (", "\n("),
            justify="right" if i else "left",
            overflow="fold",
            min_width=max(map(len, words)),  # no figure is broken in two
        )
    n_sites = sum(row[0] not in ("Training sites", "All sites") for row in table.rows)
    for i, row in enumerate(table.rows, start=1):
        # The interval goes below its figure, so that a usual terminal holds every column.
        cells = [Text(_in_two_lines(cell)) for cell in row]
        laid_out.add_row(*cells, end_section=i == n_sites)
    return laid_out


def _in_two_lines(cell: str) -> str:
    if "–" in cell.strip(NOTHING) or cell.endswith("(external)"):
        return cell.replace(" (", "\n").rstrip(")")
    return cell.replace(" (", "\n(")
