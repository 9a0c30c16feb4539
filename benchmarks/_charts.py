"""Charts of measurements. Need matplotlib."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from _program import BUSY, with_unit
from _rows import LIMIT, OURS, REFERENCE
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from matplotlib.axes import Axes

# Colors of the sides: forkshm stands out, and related libraries have related colors.
COLOURS = {
    OURS: "#d1242f",
    "multiprocessing": "#0a3069",
    "multiprocess": "#54aeff",
    "concurrent.futures": "#1b7c83",
    "joblib": "#bf8700",
    "joblib (multiprocessing)": "#eac54f",
    "loky": "#8250df",
    "mpire": "#2da44e",
    "ray": "#57606a",
    LIMIT: "#1f2328",
}
MARKERS = {
    "multiprocessing": "s",
    "multiprocess": "D",
    "concurrent.futures": "^",
    "joblib": "v",
    "joblib (multiprocessing)": "<",
    "loky": "P",
    "mpire": "X",
    "ray": "h",
}
# Width in inches; at the width of a README, an inch is about 90 pixels.
WIDTH = 9.2
INK, FAINT, GRID = "#1f2328", "#57606a", "#d8dee4"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "xtick.color": FAINT,
    "ytick.color": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.dpi": 175,
}


def seconds(value: float, _: object = None) -> str:
    return with_unit(value)


def size(value: float, _: object = None) -> str:
    # Powers of two, like the sizes.
    for factor, name in ((2**30, "GB"), (2**20, "MB"), (2**10, "KB")):
        if value >= factor:
            return f"{value / factor:g} {name}"
    return f"{value:g}"


def count(value: float, _: object = None) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def footnote(report: dict[str, Any]) -> str:
    machine = report["machine"]
    others = statistics.median(row["others"] for row in report["rows"])
    return (
        f"2 workers; medians, in one run. {machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, "
        f"Python {machine['python']}, NumPy {machine['numpy']}"
        + (f"; busy: other processes took {others:.0%} of the machine" if others > BUSY else "")
    )


def marker(side: str) -> dict[str, Any]:
    if side == OURS:
        return {"marker": "o", "markersize": 9, "zorder": 5}
    if side == LIMIT:
        return {"marker": "|", "markersize": 12, "markeredgewidth": 2.2, "zorder": 6}
    return {"marker": MARKERS[side], "markersize": 6, "zorder": 3, "markeredgecolor": "white", "markeredgewidth": 0.6}


def draw_transport(report: dict[str, Any], path: str) -> None:
    """Draw one line for each row, and one mark for each side, on an axis of seconds."""
    rows = [row for row in report["rows"] if row["unit"] == "s" and OURS in row["sides"]]
    if not rows:
        raise SystemExit("nothing to draw: no row has a time of forkshm")
    sides = [side for side in COLOURS if any(side in row["sides"] for row in rows)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.9 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        beside = axes.get_yaxis_transform()  # x from the left edge to the right, y by rows
        for height, row in enumerate(rows):
            medians = {side: taken["median"] for side, taken in row["sides"].items()}
            ours = medians[OURS]
            axes.plot([min(medians.values()), max(medians.values())], [height] * 2, color=GRID, linewidth=1.5, zorder=1)
            for side, median in medians.items():
                axes.plot(median, height, color=COLOURS[side], linestyle="none", **marker(side))
            axes.annotate(
                with_unit(ours),
                (ours, height),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8.5,
                color=COLOURS[OURS],
            )
            if REFERENCE in medians:
                weight = "bold" if ours <= medians[REFERENCE] else "normal"
                text = times(medians[REFERENCE] / ours)
                axes.text(1.01, height, text, transform=beside, va="center", fontweight=weight)
        axes.set_yticks(range(len(rows)), [row["title"] for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.75)
        axes.text(1.01, -0.75, "faster than\nmultiprocessing", transform=beside, fontsize=8.5, color=FAINT)
        axes.set_xlabel("time, on a logarithmic axis: left is faster", fontsize=9, color=FAINT)
        logarithmic(axes, "x", seconds)
        bare(axes)
        axes.grid(axis="y", visible=False)
        finish(figure, sides, report, path)


def times(factor: float) -> str:
    return f"{factor:,.0f}x" if factor >= 10 else f"{factor:.1f}x"


@dataclasses.dataclass(frozen=True)
class Panel:
    """Description of a panel for one row of growth."""

    title: str
    across: str
    across_text: Callable[..., str]
    up: str
    # Whether the vertical axis shows calls or tasks per second, instead of seconds.
    is_rate: bool = False


PANELS = {
    "by_value": Panel("An array as argument, by value", "size", size, "time of a call"),
    "shared": Panel("An array in shared memory as argument", "size", size, "time of a call"),
    "tasks": Panel("A map of noops", "tasks", count, "tasks per second", is_rate=True),
    "regions": Panel("One of many shared arrays as argument", "live regions", count, "calls per second", is_rate=True),
}


def draw_growth(report: dict[str, Any], path: str) -> None:
    """Draw one panel for each row, and one line for each side."""
    panels = [name for name in PANELS if any(row["name"] == name for row in report["rows"])]
    sides = [side for side in COLOURS if any(side in row["sides"] for row in report["rows"])]
    lines = -(-len(panels) // 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.1 + 3.3 * lines), layout="constrained")
        grid = figure.subplots(lines, 2, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, name in zip(grid.flat, panels, strict=False):
            rows = [row for row in report["rows"] if row["name"] == name]
            draw_panel(axes, PANELS[name], rows, sides)
        finish(figure, sides, report, path)


def draw_panel(axes: Axes, panel: Panel, rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> None:
    for side in sides:
        points = {row["parameters"]["size"]: row["sides"][side]["median"] for row in rows if side in row["sides"]}
        if not points:
            continue
        heights = [1 / took if panel.is_rate else took for took in points.values()]
        style = marker(side) | {"markersize": 6 if side == OURS else 4}
        if side == LIMIT:
            style = {"linestyle": (0, (4, 2)), "zorder": 2}
        axes.plot([*points], heights, color=COLOURS[side], linewidth=2.4 if side == OURS else 1.2, **style)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.across, fontsize=8.5, color=FAINT)
    axes.set_ylabel(panel.up, fontsize=8.5, color=FAINT)
    logarithmic(axes, "x", panel.across_text)
    axes.set_xticks(sorted(row["parameters"]["size"] for row in rows))
    logarithmic(axes, "y", count if panel.is_rate else seconds)
    axes.tick_params(labelsize=8.5)
    bare(axes)


def logarithmic(axes: Axes, which: str, text: Callable[..., str]) -> None:
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(numticks=12))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def bare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.7)
    axes.tick_params(which="both", length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def finish(figure: Figure, sides: Sequence[str], report: dict[str, Any], path: str) -> None:
    """Add the common parts of all charts, and write the file."""
    handles = [
        Line2D(
            [],
            [],
            color=COLOURS[side],
            linestyle="none",
            label="limit of the machine" if side == LIMIT else side,
            **marker(side),
        )
        for side in sides
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=5, frameon=False, fontsize=9, handletextpad=0.3)
    figure.supxlabel(footnote(report), fontsize=7.5, color=FAINT)
    figure.savefig(path)
