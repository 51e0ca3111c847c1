"""What a study found, drawn from released sums only; `flows.forests` draws one figure per row."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.figure_style import (
    COLOURS,
    DASHED,
    GREY,
    INK,
    LINES,
    MARKERS,
    group_colour,
    group_names,
    in_percent,
    new_axes,
    p_text,
    readable_units,
    sentence,
    set_titles,
    span,
)
from flows.forests import (
    ablation_figure,
    heterogeneity_figure,
    left_out_figure,
    modality_weights_figure,
    subgroup_figure,
)
from flows.record_values import at_risk
from fusion.federation import PROTOCOL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from flows.records import StudyRecord
    from fusion.evaluation import Calibration, Estimates
    from fusion.federation import RoundRecord
    from fusion.federation.results import TreatmentResult

    Floats = NDArray[np.float64]


def figures(record: StudyRecord) -> dict[str, Figure]:
    """Draw every figure for which some site released the sums, by file name without suffix."""
    drawn = {name: draw(record) for name, draw in _DRAWN.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def figure_svgs(record: StudyRecord) -> dict[str, str]:
    """Draw the same figures as SVG text, letters as outlines; equal records give equal text."""
    return {name: to_svg(figure) for name, figure in figures(record).items()}


def to_svg(figure: Figure) -> str:
    """Write a figure as SVG text without a date, on white, so that it reads on any page."""
    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "consilium", "svg.fonttype": "path"}):
        figure.savefig(
            written, format="svg", facecolor="white", metadata={"Date": None, "Creator": None}
        )
    return written.getvalue()


def kaplan_meier_figure(record: StudyRecord) -> Figure | None:
    """Survival by predicted risk group on the test patients, with numbers at risk below.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no site released a life table.
    """
    result, counts = record.results.arms.get(PROTOCOL), at_risk(record)
    if result is None or result.survival is None or counts is None:
        return None
    times, unit = readable_units(_edges(record))
    names = [f"{name} risk" for name in group_names(len(counts))]
    figure = Figure(figsize=(7.0, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(10, 0.7 + 0.6 * len(counts)))
    axes = new_axes(figure, grid[0])
    _survival_curves(axes, times, result.survival, names)
    subtitle = f"{counts[:, 0].sum():.0f} test patients"
    if result.log_rank is not None:
        subtitle += f"; log-rank test stratified by site, p {p_text(result.log_rank.p_value)}"
    set_titles(axes, "Survival by predicted risk", subtitle)
    _survival_scales(axes, times, unit, record.protocol.study.endpoint)
    _at_risk_table(figure.add_subplot(grid[1], sharex=axes), times[:-1], counts)
    return figure


def _edges(record: StudyRecord) -> Floats:
    return np.append(0.0, record.fitted.plan.edges_days)


def _survival_curves(axes: Axes, times: Floats, survival: Estimates, names: Sequence[str]) -> None:
    for group, name in enumerate(names):
        value, low, high = (
            np.append(1.0, values[group])
            for values in (survival.value, survival.low, survival.high)
        )
        if np.isnan(value[1:]).all():
            continue
        colour = group_colour(group, len(names))
        axes.fill_between(times, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(
            times, value, color=colour, marker=MARKERS[group % len(MARKERS)], markersize=5,
            linewidth=2, linestyle=LINES[group % len(LINES)], label=name,
        )  # fmt: skip


def _survival_scales(axes: Axes, times: Floats, unit: str, endpoint: str) -> None:
    axes.set(
        xlim=(0.0, times[-1] * 1.02), ylim=(0.0, 1.02), xlabel=f"Time since the landmark ({unit})",
        ylabel=sentence(endpoint),
    )  # fmt: skip
    in_percent(axes.yaxis)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)


def _at_risk_table(axes: Axes, times: Floats, counts: Floats) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False, bottom=False, labelbottom=False, pad=14)
    axes.set_ylim(len(counts) - 0.5, -0.5)
    axes.set_title("Patients at risk", loc="left", fontsize=10, color=GREY)
    axes.set_yticks(range(len(counts)), group_names(len(counts)), fontsize=10)
    for group, label in enumerate(axes.get_yticklabels()):
        label.set_color(group_colour(group, len(counts)))
        for time, n in zip(times, counts[group], strict=True):
            axes.text(time, group, f"{n:.0f}", ha="center", va="center", fontsize=10, color=INK)


def calibration_figure(record: StudyRecord) -> Figure | None:
    """Predicted against observed risk at the horizon, by risk group of the test patients.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no site released calibration sums.
    """
    result = record.results.arms.get(PROTOCOL)
    if result is None or result.calibration is None:
        return None
    found = result.calibration
    figure = Figure(figsize=(5.4, 5.2), layout="constrained")
    axes = new_axes(figure)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=DASHED, linewidth=1, zorder=1)
    names = group_names(len(found.predicted))
    for group in np.flatnonzero(np.isfinite(found.observed.value)).tolist():
        _calibration_point(axes, found, group, f"{names[group]} risk")
    horizon = span(record.protocol.study.horizon_days)
    set_titles(
        axes, f"Calibration at {horizon}", "On the dashed line, prediction meets observation"
    )
    axes.set(
        xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel=f"Predicted risk by {horizon}",
        ylabel=f"Observed risk by {horizon} (95 % interval)",
    )  # fmt: skip
    in_percent(axes.xaxis, axes.yaxis)
    axes.legend(frameon=False, loc="upper left", labelcolor=INK)
    return figure


def _calibration_point(axes: Axes, found: Calibration, group: int, name: str) -> None:
    value = found.observed.value[group]
    spread = [[value - found.observed.low[group]], [found.observed.high[group] - value]]
    axes.errorbar(
        found.predicted[group], value, yerr=np.maximum(spread, 0.0),
        color=group_colour(group, len(found.predicted)), marker=MARKERS[group % len(MARKERS)],
        markersize=8, capsize=4, linewidth=2, linestyle="none", label=name,
    )  # fmt: skip


def net_benefit_figure(record: StudyRecord) -> Figure | None:
    """Decision curve: net benefit of the model, of treating all and of treating nobody.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where the study has no thresholds, or no site released one.
    """
    found = record.results.net_benefit
    if found is None or not np.isfinite(found.model.value).any():
        return None
    shown = np.isfinite(found.model.value)
    cuts, model, everybody = (
        values[shown] for values in (found.thresholds, found.model.value, found.treat_all.value)
    )
    low, high = found.model.low[shown], found.model.high[shown]
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    axes = new_axes(figure)
    axes.fill_between(cuts, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    axes.plot(cuts, model, color=COLOURS[0], marker="o", linewidth=2, label="By the model")
    axes.plot(
        cuts, everybody, color=COLOURS[2], marker="s", linestyle=LINES[1], label="Treat everybody"
    )
    axes.axhline(0.0, color=GREY, linestyle=DASHED, linewidth=1.5, label="Treat nobody")
    horizon = span(record.protocol.study.horizon_days)
    set_titles(axes, "Decision curve", "Higher is better; the band is the 95 % interval")
    axes.set(xlabel=f"Risk by {horizon} at which one would treat", ylabel="Net benefit per patient")
    # What treating everybody loses at high thresholds would flatten all the rest.
    top = max(model.max(), everybody.max(), high.max(), 0.02)
    axes.set_ylim(max(min(low.min(), everybody.min(), -0.05 * top), -0.4 * top), 1.25 * top)
    behind = zip(cuts, found.n_patients[shown], strict=True)
    axes.set_xticks(cuts, [f"{cut:.0%}\nn = {n:.0f}" for cut, n in behind])
    axes.legend(frameon=False, loc="upper right", labelcolor=INK)
    return figure


def treatment_figure(record: StudyRecord) -> Figure | None:
    """Survival by treatment within each risk group of the test patients; not randomised.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no treatments are compared, or no site released a table.
    """
    found = [x for x in record.results.treatment if x.survival is not None]
    if not found:
        return None
    names = group_names(len(record.results.treatment))
    figure = Figure(figsize=(1.0 + 3.8 * len(found), 4.2), layout="constrained")
    cells = figure.add_gridspec(1, len(found))
    for at, result in enumerate(found):
        axes = new_axes(figure, cells[at])
        _treatment_panel(axes, record, result, f"{names[result.group]} risk")
        if at:
            axes.set_ylabel("")
    return figure


def _treatment_panel(axes: Axes, record: StudyRecord, result: TreatmentResult, title: str) -> None:
    if result.survival is None:
        return
    times, unit = readable_units(_edges(record))
    _survival_curves(axes, times, result.survival, record.fitted.plan.treatments)
    subtitle = "No test of a difference"
    if result.log_rank is not None:
        subtitle = f"Log-rank by site, p {p_text(result.log_rank.p_value)}"
    set_titles(axes, title, subtitle)
    _survival_scales(axes, times, unit, record.protocol.study.endpoint)
    axes.legend(frameon=False, loc="lower left", labelcolor=INK)


def convergence_figure(record: StudyRecord) -> Figure | None:
    """Objective after each round that all fits took part in, one panel per stage that fits.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no round fitted anything.
    """
    stages = {
        stage: [r for r in record.fitted.rounds if r.stage == stage and np.isfinite(r.objective)]
        for stage in dict.fromkeys(r.stage for r in record.fitted.rounds)
        if not stage.endswith("_ridge")  # fits that only choose a penalty
    }
    stages = {stage: rounds for stage, rounds in stages.items() if rounds}
    if not stages:
        return None
    figure = Figure(figsize=(1.6 + 3.4 * len(stages), 3.9), layout="constrained")
    panels = figure.add_gridspec(1, len(stages))
    for i, (stage, rounds) in enumerate(stages.items()):
        axes = new_axes(figure, panels[i])
        _convergence_panel(axes, rounds, f"Fitting the {stage}")
        if i == 0:
            axes.set_ylabel("Penalised log-likelihood per patient\n(mean of the fits)")
    return figure


def _convergence_panel(axes: Axes, rounds: Sequence[RoundRecord], title: str) -> None:
    n_fits = max(r.n_fits for r in rounds)
    # A converged fit is asked for no more, and a mean over fewer fits is another figure.
    whole = [r for r in rounds if r.n_fits == n_fits]
    axes.plot(
        [r.number for r in whole], [r.objective for r in whole], color=COLOURS[0], marker="o",
        markersize=5, linewidth=2,
    )  # fmt: skip
    fits = "1 fit" if n_fits == 1 else f"{n_fits} fits side by side"
    set_titles(axes, title, f"{fits}, {len(rounds)} rounds")
    axes.set_xlabel("Communication round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.ticklabel_format(axis="y", useOffset=False)


# In the order of the report.
_DRAWN: dict[str, Callable[[StudyRecord], Figure | None]] = {
    "convergence": convergence_figure,
    "modality_weights": modality_weights_figure,
    "kaplan_meier": kaplan_meier_figure,
    "calibration": calibration_figure,
    "ablation": ablation_figure,
    "heterogeneity": heterogeneity_figure,
    "left_out": left_out_figure,
    "subgroups": subgroup_figure,
    "net_benefit": net_benefit_figure,
    "treatment": treatment_figure,
}
