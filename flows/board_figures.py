"""Figures of one patient's page: survival, what each modality adds, and maps of a slide."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from flows.figure_style import COLOURS, DASHED, GREY, INK, in_percent, new_axes, readable_units
from flows.figures import to_svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from numpy.typing import NDArray

    from flows.tile_maps import TileMap

    Floats = NDArray[np.float64]

LOWER: Final = COLOURS[0]
HIGHER: Final = COLOURS[2]
_SHARES: Final = LinearSegmentedColormap.from_list("shares", [LOWER, "#F2F0EC", HIGHER])
_CENTRAL: Final = 98.0  # per cent of tiles that the colours span


def survival_figure(
    times_days: Floats,
    interval: tuple[Floats, Floats, Floats],
    *,
    usual: Floats | None,
    horizon_days: float,
) -> str:
    """Draw a patient's survival with its interval, as SVG.

    Parameters
    ----------
    times_days
        (t,) from 0.
    interval
        Lower end, value and upper end, each (t,).
    usual
        (t,) of the middle training patient, drawn beside it.
    horizon_days
        Marked on the curve.
    """
    low, value, high = interval
    times, unit = readable_units(times_days)
    figure = Figure(figsize=(4.9, 2.75), layout="constrained")
    axes = new_axes(figure)
    axes.fill_between(times, low, high, color=HIGHER, alpha=0.14, linewidth=0)
    if usual is not None:
        axes.plot(times, usual, color=GREY, linewidth=1.5, linestyle=DASHED)
        at = len(times) * 2 // 3
        axes.annotate(
            "middle patient", (times[at], usual[at]), xytext=(0, 9), color=GREY, fontsize=9,
            textcoords="offset points",
        )  # fmt: skip
    axes.plot(times, value, color=HIGHER, linewidth=2.4)
    then = float(np.interp(horizon_days, times_days, value))
    when = float(np.interp(horizon_days, times_days, times))
    axes.plot([when], [then], marker="o", markersize=7, color=HIGHER, markeredgecolor="white")
    axes.annotate(
        f"{then:.0%}", (when, then), xytext=(-4, -17) if then > 0.15 else (7, 6), fontsize=11,
        textcoords="offset points", fontweight="bold", color=HIGHER,
        ha="right" if then > 0.15 else "left",
    )  # fmt: skip
    axes.set_xlabel(f"{unit.capitalize()} from the landmark")
    axes.set_xlim(0, times[-1])
    axes.set_ylim(0, 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    in_percent(axes.yaxis)
    return to_svg(figure)


def contributions_figure(
    names: Sequence[str], parts: Floats, has: NDArray[np.bool_], *, spread: Floats
) -> str:
    """Draw what each modality adds to a patient's log hazard, as SVG.

    Parameters
    ----------
    parts
        (m,) contributions; positive raises the risk.
    has
        (m,) whether the modality counts with a value, or as missing.
    spread
        (m,) what a standard deviation of the modality adds among patients in training, for scale.
    """
    order = np.argsort(~has, kind="stable")
    reach = max(1.1 * float(np.abs(parts).max(initial=0.0)), 2.0 * float(spread.max(initial=0.1)))
    figure = Figure(figsize=(4.9, 0.75 + 0.42 * len(names)), layout="constrained")
    axes = new_axes(figure)
    axes.grid(visible=False, axis="y")
    for row, at in enumerate(order):
        _bar(axes, row, float(parts[at]), has=bool(has[at]), reach=reach)
    axes.axvline(0.0, color=INK, linewidth=1.0)
    axes.set_yticks(range(len(names)), [names[at] for at in order])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-reach, reach)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    ticks = _hazard_ticks(reach)
    axes.set_xticks(np.log(ticks), [f"\u00d7{x:g}" for x in ticks])
    axes.set_xlabel("Factor on the hazard; \u00d71 is average")
    return to_svg(figure)


def _bar(axes: Axes, row: int, part: float, *, has: bool, reach: float) -> None:
    colour = HIGHER if part > 0 else LOWER
    if has:
        axes.barh(row, part, height=0.62, color=colour)
    else:
        axes.barh(row, part, height=0.62, facecolor="none", edgecolor=GREY, hatch="////")
    text = f"\u00d7{np.exp(part):.2f}" if has else "missing"
    side = -1.0 if part < 0 else 1.0
    outside = abs(part) < 0.72 * reach
    axes.annotate(
        text, (part, row), xytext=((5 if outside else -5) * side, 0), va="center", fontsize=9.5,
        textcoords="offset points", ha="left" if (side > 0) == outside else "right",
        color=(INK if has else GREY) if outside else "white",
    )  # fmt: skip


def _hazard_ticks(reach: float) -> list[float]:
    """Factors to label: round ones, at most two to a side."""
    above = [x for x in (1.25, 1.5, 2, 3, 5, 10, 20, 50, 100, 1000) if np.log(x) < 0.95 * reach]
    kept = [above[-1]] if above else []
    kept += [x for x in above[:-1] if abs(np.log(x) - np.log(kept[0]) / 2) < 0.16 * reach][:1]
    return sorted({1.0, *kept, *(float(f"{1 / x:.2g}") for x in kept)})


def shares_figure(tiles: TileMap) -> str:
    """Draw each tile's log hazard over the slide, as a PNG's data address."""
    assert tiles.share is not None
    centre = float(np.mean(tiles.share))
    reach = float(np.percentile(np.abs(tiles.share - centre), _CENTRAL)) or 1.0
    colours = Normalize(centre - reach, centre + reach)
    return _map(tiles, tiles.share, _SHARES, colours, ("lower risk", "higher risk"))


def attention_figure(tiles: TileMap) -> str:
    """Draw each tile's attention over the slide, as a PNG's data address."""
    assert tiles.attention is not None
    even = 1.0 / len(tiles.attention) if tiles.attention.sum() > 0 else 1.0
    top = max(float(np.percentile(tiles.attention, _CENTRAL)), 2.0 * even)
    colours = Normalize(0.0, top)
    return _map(tiles, tiles.attention, colormaps["cividis"], colours, ("ignored", "looked at"))


def _map(
    tiles: TileMap, values: Floats, palette: Colormap, colours: Normalize, ends: tuple[str, str]
) -> str:
    (left, top), (right, bottom) = _crop(tiles)
    ratio = (bottom - top) / (right - left)
    figure = Figure(figsize=(4.6, min(max(4.6 * ratio, 1.6), 4.6) + 0.42), layout="constrained")
    axes = figure.add_subplot(111)
    width, height = tiles.size_px
    if tiles.overview is not None:
        pale = 255.0 - 0.6 * (255.0 - tiles.overview.mean(axis=2))
        axes.imshow(
            pale, extent=(0, width, height, 0), cmap="gray", vmin=0, vmax=255,
            interpolation="bilinear",
        )  # fmt: skip
    side = tiles.side_px
    squares = PatchCollection(
        [Rectangle((x, y), side, side) for x, y in tiles.coords.tolist()],
        cmap=palette, norm=colours, alpha=0.72 if tiles.overview is not None else 1.0,
        linewidth=0,
    )  # fmt: skip
    squares.set_array(values)
    axes.add_collection(squares)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#D5D9DE")
    bar = figure.colorbar(squares, ax=axes, orientation="horizontal", fraction=0.04, pad=0.02)
    bar.set_ticks([colours.vmin or 0.0, colours.vmax or 1.0], labels=list(ends))
    bar.ax.tick_params(labelsize=12, colors=INK, length=0)
    bar.outline.set_visible(False)
    image = BytesIO()
    figure.savefig(image, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()


def _crop(tiles: TileMap) -> tuple[Floats, Floats]:
    """Corners of what is drawn: the tiles with a margin, within the slide."""
    margin = 2.0 * tiles.side_px
    low = np.maximum(tiles.coords.min(axis=0) - margin, 0.0)
    high = np.minimum(tiles.coords.max(axis=0) + tiles.side_px + margin, tiles.size_px)
    return np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64)
