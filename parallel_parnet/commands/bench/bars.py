"""Latency by contender as horizontal bars, a panel for each network and type; ours stand out without colour too."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .rows import FEWEST, SHORT, Result

OURS = {"color": "#1f4e79", "hatch": "//", "edgecolor": "white"}
PEERS = {"color": "#d9d9d9", "edgecolor": "#777777"}
COLUMNS = 2


def draw(results: Sequence[Result]) -> Figure:
    """A panel for each result, in their order, and the machine beneath; all of them are of one machine."""
    columns = min(COLUMNS, len(results))
    lines = [results[i : i + columns] for i in range(0, len(results), columns)]
    bars = [max(len(result["rows"]) for result in line) for line in lines]
    heights = [1.1 + 0.26 * most for most in bars]
    figure = Figure(figsize=(5.6 * columns, sum(heights) + 0.4), layout="constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat[len(results) :]:
        axes.set_axis_off()
    for i, result in enumerate(results):
        _panel(grid.flat[i], result, bars[i // columns])
    header = results[0]["header"]
    figure.supxlabel(
        f"{header['machine']}, {header.get('gpu') or header['cpu']}, {header['threads']} thread(s), "
        f"torch {header['torch']}, {header['date'][:10]}.\nMedians, with their 95% intervals; hatched: this project",
        fontsize=8,
    )
    return figure


def _panel(axes: Axes, result: Result, bars: int) -> None:
    """bars: for which there is room, so that all of a line of panels are equally thick."""
    header, rows = result["header"], sorted(result["rows"], key=lambda row: row["infer_step_time"])
    for i, row in enumerate(rows):
        median, (low, high) = row["infer_step_time"], row["median_interval_ms"]
        error = [[max(0.0, median - low)], [max(0.0, high - median)]]
        axes.barh(i, median, 0.7, xerr=error, error_kw={"linewidth": 1}, **(OURS if row["ours"] else PEERS))
        few = "" if row["n"] >= FEWEST else f" (n = {row['n']})"
        figures = f"{median:.0f}" if median >= 100 else f"{median:.3g}"
        axes.annotate(figures + few, (high, i), (4, 0), textcoords="offset points", va="center", fontsize=7)
    asked = SHORT[header["dtype"]]
    ran = [" ".join(SHORT.get(word, word) for word in row["arithmetic"].split(", ")) for row in rows]
    as_asked = set(ran) == {asked}
    names = [
        row["contender"] if as_asked else f"{row['contender']} [{kind}]" for row, kind in zip(rows, ran, strict=True)
    ]
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if row["ours"] else "normal")
    axes.set_ylim(bars - 0.4, -0.6)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    note = "" if as_asked else "\n(in brackets: what ran)"
    size, batch = header["size"], header["batch_size"]
    axes.set_title(f"{header['model']}, {size} x {size}, batch {batch}, {asked}{note}", fontsize=9, parse_math=False)
    axes.set_xlabel("ms a pass", fontsize=8)
