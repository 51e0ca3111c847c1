"""What a study found, for people: one table and four figures, from released sums only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from rich import box
from rich.table import Table
from rich.text import Text

from fusion.evaluation import LifeTable, NoComparablePairs, PairCounts, concordance_index
from fusion.federation import LOCAL_ENCODERS, LOCAL_ONLY, PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.gridspec import SubplotSpec
    from numpy.typing import NDArray

    from flows.records import Reference, StudyRecord
    from fusion.evaluation import Estimate
    from fusion.federation import SiteOutcome

    Floats = NDArray[np.float64]

NOTHING = "–"
HIDDEN = "hidden"
ARM_NAMES = {
    LOCAL_ONLY: "Local only",
    PROTOCOL: "Federated",
    LOCAL_ENCODERS: "Federated with local encoders",
}
REFERENCE_NAMES = {"pooled": "Pooled rows", "true_hazard": "True hazard"}
_DAYS_PER_YEAR = 365.25
# Blue, orange and wine differ in lightness too, so that they survive a grey print.
_GROUP_COLOURS = ("#0072B2", "#E69F00", "#882255")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_INK, _GREY = "#222222", "#6B6B6B"
_Z = 1.959963984540054


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
    arms = [arm for arm in ARM_NAMES if arm in record.results]
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
    estimates = [
        None if is_external(site) and arm == LOCAL_ENCODERS else found.by_site.get(site.site)
        for arm, found in ((x, record.results[x]) for x in arms)
    ]
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
    n_arms = len(record.fitted.models)
    row = n_arms if arm == LOCAL_ONLY else list(record.fitted.models).index(arm)
    counts = [
        PairCounts.from_vector(found.pairs[row])
        for site, found in record.fitted.evaluations.items()
        if site in sites and len(found.pairs) > row
    ]
    try:
        return concordance_index(counts) if counts else None
    except NoComparablePairs:
        return None


def _reference_cell(reference: Reference | None, arm: str) -> str:
    return _interval(reference.concordance[arm]) if reference is not None else NOTHING


def _notes(record: StudyRecord) -> tuple[str, ...]:
    found = [
        "Concordance is Harrell's, within each site and pooled over its comparable pairs; 0.5 is "
        "chance, higher is better.",
        *_lowered_note(record),
        *_cross_fitting_note(record),
        *_site_notes(record),
        *_external_note(record),
        *_reference_notes(record),
    ]
    return tuple(found)


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
        "Largest gap between the federated coefficients and an independent library's fit to the "
        f"pooled rows: {reference.max_coefficient_gap:.1e}.",
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


def figures(record: StudyRecord) -> dict[str, Figure]:
    """Draw every figure for which some site released the sums, by file name without suffix."""
    drawn = {
        "kaplan_meier": kaplan_meier_figure(record),
        "calibration": calibration_figure(record),
        "modality_weights": modality_weights_figure(record),
        "convergence": convergence_figure(record),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def kaplan_meier_figure(record: StudyRecord) -> Figure | None:
    """Survival by predicted risk group on the test patients, with numbers at risk below.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no site released a life table.
    """
    result = record.results[PROTOCOL]
    if result.survival is None:
        return None
    at_risk = _at_risk(record)
    edges = np.append(0.0, record.fitted.models[PROTOCOL].edges_days)
    times, unit = _in_readable_units(edges)
    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(10, 0.7 + 0.6 * len(at_risk)))
    axes = _axes(figure, grid[0])
    for group, name in enumerate(_group_names(len(at_risk))):
        lines = [
            np.append(1.0, values[group])
            for values in (result.survival.value, result.survival.low, result.survival.high)
        ]
        _survival_curve(axes, times, lines, group=group, name=name, n_groups=len(at_risk))
    subtitle = f"{at_risk[:, 0].sum():.0f} test patients"
    if result.log_rank is not None:
        subtitle += f"; log-rank test stratified by site, p {_p_value(result.log_rank.p_value)}"
    _titles(axes, "Survival by predicted risk", subtitle)
    axes.set(
        xlim=(0.0, times[-1] * 1.02), ylim=(0.0, 1.02), xlabel=f"Time since the landmark ({unit})",
        ylabel=_sentence(record.protocol.study.endpoint),
    )  # fmt: skip
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, loc="upper right", labelcolor=_INK)
    _at_risk_table(figure.add_subplot(grid[1], sharex=axes), times[:-1], at_risk)
    return figure


def _at_risk(record: StudyRecord) -> Floats:
    """(n_groups, n_intervals) test patients at risk at the start of each interval."""
    row = list(record.fitted.models).index(PROTOCOL)
    n_groups = len(record.fitted.groups[PROTOCOL]) + 1
    n_intervals = len(record.fitted.models[PROTOCOL].edges_days)
    tables = [
        LifeTable.from_vector(e.life_table[row], n_groups=n_groups, n_intervals=n_intervals)
        for e in record.fitted.evaluations.values()
    ]
    return np.sum([table.counts[:, :, 0] for table in tables], axis=0)


def _survival_curve(
    axes: Axes, times: Floats, lines: Sequence[Floats], *, group: int, name: str, n_groups: int
) -> None:
    value, low, high = lines
    if np.isnan(value).all():
        return
    colour = _colour(group, n_groups)
    axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.plot(
        times, value, color=colour, marker=_MARKERS[group % len(_MARKERS)], markersize=5,
        linewidth=2, label=f"{name} risk",
    )  # fmt: skip


def _at_risk_table(axes: Axes, times: Floats, at_risk: Floats) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False, pad=14)
    axes.set_ylim(len(at_risk) - 0.5, -0.5)
    axes.set_title("Patients at risk", loc="left", fontsize=10, color=_GREY)
    axes.set_yticks(range(len(at_risk)), _group_names(len(at_risk)), fontsize=10)
    for group, label in enumerate(axes.get_yticklabels()):
        label.set_color(_colour(group, len(at_risk)))
        for time, n in zip(times, at_risk[group], strict=True):
            axes.text(time, group, f"{n:.0f}", ha="center", va="center", fontsize=10, color=_INK)


def calibration_figure(record: StudyRecord) -> Figure | None:
    """Predicted against observed risk at the horizon, by risk group of the test patients.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no site released calibration sums.
    """
    found = record.results[PROTOCOL].calibration
    if found is None:
        return None
    figure = Figure(figsize=(5.4, 5.2), layout="constrained")
    axes = _axes(figure)
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    names = _group_names(len(found.predicted))
    for group in np.flatnonzero(np.isfinite(found.observed.value)).tolist():
        value = found.observed.value[group]
        spread = [[value - found.observed.low[group]], [found.observed.high[group] - value]]
        axes.errorbar(
            found.predicted[group], value, yerr=np.maximum(spread, 0.0),
            color=_colour(group, len(names)), marker=_MARKERS[group % len(_MARKERS)],
            markersize=8, capsize=4, linewidth=2, linestyle="none", label=f"{names[group]} risk",
        )  # fmt: skip
    horizon = _span(record.protocol.study.horizon_days)
    _titles(axes, f"Calibration at {horizon}", "On the dashed line, prediction meets observation")
    axes.set(
        xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=f"Predicted risk by {horizon}",
        ylabel=f"Observed risk by {horizon} (95 % interval)",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, loc="upper left", labelcolor=_INK)
    return figure


def modality_weights_figure(record: StudyRecord) -> Figure | None:
    """Hazard ratio of each modality in the fusion model, and of its absence, with 95 % intervals.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no coefficient was fitted.
    """
    rows = _weights(record)
    if not rows:
        return None
    figure = Figure(figsize=(6.8, 1.9 + 0.42 * len(rows)), layout="constrained")
    axes = _axes(figure)
    axes.axvline(1.0, color=_GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for y, (_, centre, error, absence) in enumerate(rows):
        low, high = np.exp(centre - _Z * error), np.exp(centre + _Z * error)
        colour = _GREY if absence else _GROUP_COLOURS[0]
        axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axes.plot(
            np.exp(centre), y, marker="o", markersize=8, color=colour,
            markerfacecolor="white" if absence else colour, markeredgewidth=2,
        )  # fmt: skip
    _titles(
        axes, "What each modality adds to the predicted hazard", "Above 1 means worse prognosis"
    )
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="Hazard ratio (log scale, 95 % interval)")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    _hazard_ratio_scale(axes)
    return figure


def _weights(record: StudyRecord) -> list[tuple[str, float, float, bool]]:
    """Label, coefficient, standard error, and whether it is an absence, strongest first."""
    model = record.fitted.models[PROTOCOL]
    errors = np.sqrt(np.diag(model.covariance))
    names = [f"{x}\n(per SD)" for x in model.modalities] + [
        f"{x}\nmissing" for x in model.modalities
    ]
    n = len(model.modalities)
    rows = [
        (name, float(beta), float(error), i >= n)
        for i, (name, beta, error) in enumerate(zip(names, model.coefficients, errors, strict=True))
        # A column that never varied has no weight: nobody lacks the modality, or everybody does.
        if abs(beta) > 1e-12
    ]
    return sorted(rows, key=lambda row: (row[3], -row[1]))


def _hazard_ratio_scale(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    # Enough width that an interval close to 1 does not fill the figure.
    low, high = min(low, 0.8), max(high, 1.25)
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 1.0, 1.25, 2.0, 5.0, 10.0, 20.0, 50.0]
    if high / low > 6:
        ticks = [x for x in ticks if x not in (0.8, 1.25)]
    axes.set_xticks([x for x in ticks if low <= x <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlim(low, high)


def convergence_figure(record: StudyRecord) -> Figure | None:
    """Objective of the fits after each round, one panel per stage that fits.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no round fitted anything.
    """
    stages = {
        stage: [r for r in record.fitted.rounds if r.stage == stage and np.isfinite(r.objective)]
        for stage in dict.fromkeys(r.stage for r in record.fitted.rounds)
    }
    stages = {stage: rounds for stage, rounds in stages.items() if rounds}
    if not stages:
        return None
    figure = Figure(figsize=(1.6 + 3.4 * len(stages), 3.9), layout="constrained")
    panels = figure.add_gridspec(1, len(stages))
    for i, (stage, rounds) in enumerate(stages.items()):
        axes = _axes(figure, panels[i])
        axes.plot(
            [r.number for r in rounds], [r.objective for r in rounds], color=_GROUP_COLOURS[0],
            marker="o", markersize=5, linewidth=2,
        )  # fmt: skip
        n_fits = max(r.n_fits for r in rounds)
        fits = "1 fit" if n_fits == 1 else f"{n_fits} fits side by side"
        _titles(axes, f"Fitting the {stage}", f"{fits}, {len(rounds)} rounds")
        axes.set_xlabel("Communication round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        if i == 0:
            axes.set_ylabel("Penalised log-likelihood per patient\n(mean of the fits)")
    return figure


def _axes(figure: Figure, cell: SubplotSpec | None = None) -> Axes:
    axes = figure.add_subplot(cell if cell is not None else 111)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GREY)
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK, labelsize=10)
    axes.xaxis.label.set(color=_INK, fontsize=11)
    axes.yaxis.label.set(color=_INK, fontsize=11)
    return axes


def _titles(axes: Axes, title: str, subtitle: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=24)
    axes.annotate(
        subtitle, (0.0, 1.0), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=10, color=_GREY,
    )  # fmt: skip


def _group_names(n_groups: int) -> tuple[str, ...]:
    if n_groups == 2:
        return ("Low", "High")
    if n_groups == 3:
        return ("Low", "Middle", "High")
    return tuple(f"Group {i + 1} of {n_groups}" for i in range(n_groups))


def _colour(group: int, n_groups: int) -> Any:
    if n_groups <= len(_GROUP_COLOURS):
        return _GROUP_COLOURS[group if n_groups > 2 else 2 * group]
    return colormaps["cividis"](group / (n_groups - 1))


def _in_readable_units(days: Floats) -> tuple[Floats, str]:
    if days.max() < 1.5 * _DAYS_PER_YEAR:
        return days, "days"
    return days / _DAYS_PER_YEAR, "years"


def _span(days: float) -> str:
    years = days / _DAYS_PER_YEAR
    whole = round(years)
    if whole >= 1 and abs(years - whole) < 0.01 * whole:
        return f"{whole} year{'s' if whole > 1 else ''}"
    return f"{days:g} days"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
