"""Figures that show one estimate with its interval per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from flows.figure_style import (
    COLOURS,
    DASHED,
    GREY,
    INK,
    new_axes,
    p_text,
    sentence,
    set_titles,
)
from flows.record_values import fusion_terms, ratio_name, site_ratios
from fusion.evaluation import Estimate
from fusion.federation import PROTOCOL
from fusion.federation.plan import without

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from flows.records import StudyRecord
    from fusion.evaluation import Heterogeneity
    from fusion.federation.results import SubgroupResult

Kind = Literal["one", "pooled", "absence", "heading"]
_ROW_INCHES = 0.36
_PANELS_PER_LINE = 2


@dataclass(frozen=True)
class ForestRow:
    """One line of a forest plot.

    Attributes
    ----------
    estimate
        None, or not finite, where there is no figure; the row then says so.
    kind
        One unit's figure, one over all units, that of a modality's absence, or a heading.
    """

    label: str
    estimate: Estimate | None = None
    kind: Kind = "one"


@dataclass(frozen=True)
class ForestScale:
    """What a forest plot measures.

    Attributes
    ----------
    nothing
        The value that means no effect, or chance; a dashed line.
    log
        Whether the scale is that of ratios.
    within
        The limits that the measure cannot pass.
    decimals
        Of the figures in words.
    """

    label: str
    nothing: float
    log: bool = False
    within: tuple[float, float] = (-np.inf, np.inf)
    decimals: int = 2


CONCORDANCE = ForestScale("Concordance (95 % interval)", 0.5, within=(0.0, 1.0))
GAIN = ForestScale(
    "Concordance lost without it (95 % interval)", 0.0, within=(-1.0, 1.0), decimals=3
)


def ratio_scale(record: StudyRecord) -> ForestScale:
    """Scale of the fusion model's ratios."""
    name = sentence(ratio_name(record.protocol.fusion.model))
    return ForestScale(f"{name} (log scale, 95 % interval)", 1.0, log=True)


def draw_forest(axes: Axes, rows: Sequence[ForestRow], scale: ForestScale) -> None:
    """Draw rows from top to bottom, each with its figure in words at the right edge."""
    axes.axvline(scale.nothing, color=GREY, linewidth=1, linestyle=DASHED, zorder=1)
    for y, row in enumerate(rows):
        if row.kind != "heading":
            _draw_row(axes, y, row, scale)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row.kind in ("heading", "pooled") else "normal")
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=scale.label)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    set_range(axes, rows, scale)


def _draw_row(axes: Axes, y: int, row: ForestRow, scale: ForestScale) -> None:
    estimate = row.estimate
    if estimate is None or not np.isfinite(estimate.value):
        _at_right_edge(axes, y, "no figure")
        return
    colour = {"pooled": COLOURS[2], "absence": GREY}.get(row.kind, COLOURS[0])
    low, high = np.clip([estimate.low, estimate.high], *scale.within)
    axes.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(
        estimate.value, y, marker="D" if row.kind == "pooled" else "o", markersize=8,
        color=colour, markerfacecolor="white" if row.kind == "absence" else colour,
        markeredgewidth=2,
    )  # fmt: skip
    _at_right_edge(axes, y, _in_words(estimate, scale.decimals))


def _in_words(estimate: Estimate, decimals: int) -> str:
    value, low, high = (
        f"{x:.{decimals}f}".replace("-", "−") for x in (estimate.value, estimate.low, estimate.high)
    )
    if not np.isfinite([estimate.low, estimate.high]).all():
        return value
    return f"{value} ({low} to {high})"


def _at_right_edge(axes: Axes, y: int, text: str) -> None:
    axes.annotate(
        text, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK,
        annotation_clip=False,
    )  # fmt: skip


def set_range(axes: Axes, rows: Sequence[ForestRow], scale: ForestScale) -> None:
    """Show every interval of these rows, which may be those of several panels."""
    found = [row.estimate for row in rows if row.estimate is not None]
    ends = np.array([[e.value, e.low, e.high] for e in found]).ravel()
    ends = np.append(ends[np.isfinite(ends)], scale.nothing)
    if scale.log:
        _hazard_ratio_range(axes, np.clip(ends, 0.02, 50.0))
        return
    ends = np.clip(ends, *scale.within)
    margin = max(0.05 * (ends.max() - ends.min()), 0.01)
    axes.set_xlim(ends.min() - margin, ends.max() + margin)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def _hazard_ratio_range(axes: Axes, ends: np.ndarray) -> None:
    axes.set_xscale("log")
    # Enough width that an interval close to 1 does not fill the figure.
    low, high = min(ends.min() / 1.05, 0.8), max(ends.max() * 1.05, 1.25)
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]
    if high / low < 6:
        ticks += [1.5, 3.0] if high / low > 3 else [0.67, 0.8, 1.25, 1.5]
    axes.set_xticks([x for x in ticks if low <= x <= high])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.set_xlim(low, high)


def _forest_figure(
    rows: Sequence[ForestRow], scale: ForestScale, *, title: str, subtitle: str
) -> Figure:
    figure = Figure(figsize=(7.4, 1.7 + _ROW_INCHES * len(rows)), layout="constrained")
    axes = new_axes(figure)
    draw_forest(axes, rows, scale)
    set_titles(axes, title, subtitle)
    return figure


def modality_weights_figure(record: StudyRecord) -> Figure | None:
    """Hazard or odds ratio of each modality in the fusion model, and of its absence.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no coefficient was fitted.
    """
    terms = [x for x in fusion_terms(record.fitted.models[PROTOCOL]) if x["varies"]]
    if not terms:
        return None
    terms.sort(key=lambda x: (x["absent"], -x["coefficient"]))
    rows = [
        ForestRow(
            f"{x['modality']} {'missing' if x['absent'] else '(per SD)'}",
            _estimate(x["ratio"]),
            "absence" if x["absent"] else "one",
        )
        for x in terms
    ]
    return _forest_figure(
        rows,
        ratio_scale(record),
        title="What each modality adds to the predicted hazard",
        subtitle="Above 1 means worse prognosis",
    )


def ablation_figure(record: StudyRecord) -> Figure | None:
    """Concordance of each modality alone, and what the model loses without it.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where there is neither for any modality.
    """
    results, names = record.results, record.protocol.modalities
    alone = [ForestRow(x, results.alone.get(x)) for x in names]
    arms = [results.arms.get(without(x)) for x in names]
    lost = [
        ForestRow(x, None if arm is None else arm.difference)
        for x, arm in zip(names, arms, strict=True)
    ]
    if all(row.estimate is None for row in (*alone, *lost)):
        return None
    alone.append(ForestRow("All together", _of_protocol(record), "pooled"))
    figure = Figure(figsize=(10.6, 1.9 + _ROW_INCHES * len(alone)), layout="constrained")
    cells = figure.add_gridspec(1, 2)
    for cell, rows, scale, title, subtitle in (
        (cells[0], alone, CONCORDANCE, "Each modality alone", "Among patients who have it"),
        (cells[1], lost, GAIN, "The model without it", "Above 0, the modality adds"),
    ):
        axes = new_axes(figure, cell)
        draw_forest(axes, rows, scale)
        axes.set_ylim(len(alone) - 0.5, -0.5)
        set_titles(axes, title, subtitle)
    return figure


def _of_protocol(record: StudyRecord) -> Estimate | None:
    arm = record.results.arms.get(PROTOCOL)
    return None if arm is None else arm.concordance


def heterogeneity_figure(record: StudyRecord) -> Figure | None:
    """Each training site's own hazard or odds ratio per modality beside the consortium's.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no two sites could be compared.
    """
    found, ratios, scale = record.results.heterogeneity, site_ratios(record), ratio_scale(record)
    terms = [x for x in fusion_terms(record.fitted.models[PROTOCOL]) if not x["absent"]]
    shown = [i for i in range(len(terms)) if _n_known(ratios, i) >= 2]
    if found is None or not shown:
        return None
    n_lines = -(-len(shown) // _PANELS_PER_LINE)
    height = n_lines * (1.9 + _ROW_INCHES * (len(ratios) + 1))
    figure = Figure(figsize=(10.6, height), layout="constrained")
    cells = figure.add_gridspec(n_lines, _PANELS_PER_LINE)
    panels: list[tuple[Axes, list[ForestRow]]] = []
    for at, i in enumerate(shown):
        rows = [
            *(ForestRow(x["site"], _estimate(x["ratios"][i])) for x in ratios),
            ForestRow("Consortium", _estimate(terms[i]["ratio"]), "pooled"),
        ]
        axes = new_axes(figure, cells[at // _PANELS_PER_LINE, at % _PANELS_PER_LINE])
        draw_forest(axes, rows, scale)
        set_titles(axes, sentence(terms[i]["modality"]), _inconsistency(found, i))
        panels.append((axes, rows))
    for axes, _ in panels:
        set_range(axes, [row for _, rows in panels for row in rows], scale)
    return figure


def _n_known(ratios: Sequence[dict[str, Any]], term: int) -> int:
    return sum(x["ratios"][term] is not None for x in ratios)


def _estimate(ratio: dict[str, float] | None) -> Estimate | None:
    """Ratio with its interval; its standard error is that of the logarithm and is not shown."""
    return None if ratio is None else Estimate(standard_error=np.nan, **ratio)


def _inconsistency(found: Heterogeneity, term: int) -> str:
    i_squared, p_value = found.i_squared[term], found.p_value[term]
    if not np.isfinite(i_squared):
        return "Per SD"
    return f"Per SD; I² {i_squared:.0%}, Q test p {p_text(p_value)}"


def left_out_figure(record: StudyRecord) -> Figure | None:
    """Concordance at each site of the model that was fitted without it.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where the study does not leave sites out, or none has a figure.
    """
    results = record.results
    if all(x.concordance is None for x in results.left_out):
        return None
    rows = [ForestRow(_with_counts(x.site, x.n_patients), x.concordance) for x in results.left_out]
    rows.append(ForestRow("All of them", results.left_out_pooled, "pooled"))
    return _forest_figure(
        rows,
        CONCORDANCE,
        title="Fitted without the site, tested at the site",
        subtitle="All patients of each site",
    )


def subgroup_figure(record: StudyRecord) -> Figure | None:
    """Concordance of the protocol's arm in each level of each subgroup variable.

    Returns
    -------
    matplotlib.figure.Figure or None
        None where no level has a figure.
    """
    found = record.results.subgroups
    if all(x.concordance is None for x in found):
        return None
    rows = [
        row
        for variable in dict.fromkeys(x.variable for x in found)
        for row in _of_variable([x for x in found if x.variable == variable])
    ]
    rows.append(ForestRow("All test patients", _of_protocol(record), "pooled"))
    return _forest_figure(
        rows,
        CONCORDANCE,
        title="Concordance by subgroup",
        subtitle="Test patients; levels below the minimum counts have no figure",
    )


def _of_variable(levels: Sequence[SubgroupResult]) -> list[ForestRow]:
    heading = ForestRow(sentence(levels[0].variable.replace("_", " ")), kind="heading")
    rows = [ForestRow(_with_counts(x.level, x.n_patients), x.concordance) for x in levels]
    return [heading, *rows]


def _with_counts(name: str, n_patients: int) -> str:
    return f"{name} (n = {n_patients})" if n_patients else name
