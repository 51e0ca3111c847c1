"""How every figure looks: axes, titles, colours, and what risk groups and spans are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

# Blue, orange and wine differ in lightness too, so that they survive a grey print.
COLOURS = ("#0072B2", "#E69F00", "#882255")
MARKERS = ("o", "s", "D", "^", "v", "P")
LINES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
INK, GREY = "#222222", "#6B6B6B"
DASHED = (0, (4, 3))
DAYS_PER_YEAR = 365.25


def new_axes(figure: Figure, cell: SubplotSpec | None = None) -> Axes:
    """Add axes with a quiet grid and without a box."""
    axes = figure.add_subplot(cell if cell is not None else 111)
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.grid(visible=True, color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=10)
    axes.xaxis.label.set(color=INK, fontsize=11)
    axes.yaxis.label.set(color=INK, fontsize=11)
    return axes


def set_titles(axes: Axes, title: str, subtitle: str) -> None:
    """Write the title at the left edge, and below it what a reader should look for."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=24)
    axes.annotate(
        subtitle, (0.0, 1.0), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points",
        fontsize=10, color=GREY,
    )  # fmt: skip


def in_percent(*axes: Any) -> None:
    """Label axes that run from 0 to 1 in percent."""
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def group_names(n_groups: int) -> tuple[str, ...]:
    """Name risk groups from low to high."""
    if n_groups == 2:
        return ("Low", "High")
    if n_groups == 3:
        return ("Low", "Middle", "High")
    return tuple(f"Group {i + 1} of {n_groups}" for i in range(n_groups))


def group_colour(group: int, n_groups: int) -> Any:
    """Colour of one of several ordered groups; the lowest and the highest differ most."""
    if n_groups <= len(COLOURS):
        return COLOURS[group if n_groups > 2 else 2 * group]
    return colormaps["cividis"](group / (n_groups - 1))


def readable_units(days: Floats) -> tuple[Floats, str]:
    """Give days as they are, or in years where they are many, with the unit's name."""
    if days.max() < 1.5 * DAYS_PER_YEAR:
        return days, "days"
    return days / DAYS_PER_YEAR, "years"


def span(days: float) -> str:
    """Name a number of days, as years where it is a whole number of them."""
    years = days / DAYS_PER_YEAR
    whole = round(years)
    if whole >= 1 and abs(years - whole) < 0.01 * whole:
        return f"{whole} year{'s' if whole > 1 else ''}"
    return f"{days:g} days"


def p_text(p_value: float) -> str:
    """Write a p-value after the letter p."""
    return "< 0.001" if p_value < 0.001 else f"= {p_value:.3f}"


def sentence(text: str) -> str:
    """Begin with a capital letter."""
    return text[:1].upper() + text[1:]
