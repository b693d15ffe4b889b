"""The experiment's figures, each as SVG and PNG: markers and line styles tell the curves apart without colour."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parallel_parnet.executors.available import METHODS

from ..drawing import FORMATS, logarithmic, save
from .busiest import brent

CHOSEN = {
    "eager": {"color": "#1f4e79", "marker": "o", "linestyle": "-"},
    "native": {"color": "#b2182b", "marker": "*", "linestyle": "-", "linewidth": 2.2, "markersize": 9},
    "openvino": {"color": "#b35806", "marker": "s", "linestyle": "--"},
    "inductor": {"color": "#542788", "marker": "D", "linestyle": "-."},
}
# each executor that there is has a style: those that were given none share a line and differ in colour and marker
STYLES = {
    name: {"color": f"C{i}", "marker": "PXvdph<>"[i % 8], "linestyle": (0, (5, 1))} for i, name in enumerate(METHODS)
}
STYLES |= CHOSEN | {"lanes": {"color": "#1b7837", "marker": "^", "linestyle": ":"}}


def draw(rows: list[dict], header: dict, folder: Path, name: str) -> dict[str, Path]:
    """Draw every figure that the rows allow; the SVGs by figure."""
    made = {}
    for figure, make in (("depth", _depth), ("work", _work), ("lanes", _lanes), ("scaling", _scaling)):
        drawn = make(rows)
        if drawn is None:
            continue
        drawn.suptitle(f"{header['machine']}, {header['dtype']}, {header['threads']} thread(s), batch 1", fontsize=9)
        for ending in FORMATS:
            save(drawn, folder / f"{name}-{figure}{ending}")
        made[figure] = folder / f"{name}-{figure}.svg"
    return made


def select(rows: Iterable[dict], group: str, executor: str | None = None) -> list[dict]:
    """Rows of the groups whose names begin so, of one executor or all."""
    return [r for r in rows if r["group"].startswith(group) and executor in (None, r["executor"])]


def groups(rows: Iterable[dict], beginning: str = "") -> list[str]:
    """Groups whose names begin so, in order of appearance."""
    return list(dict.fromkeys(r["group"] for r in select(rows, beginning)))


def executors(rows: Iterable[dict]) -> list[str]:
    """Executors in order of appearance."""
    return list(dict.fromkeys(r["executor"] for r in rows))


def _curve(axes: Axes, rows: list[dict], x: str, y: str, style: str, label: str) -> None:
    rows = sorted((r for r in rows if r[y] is not None), key=lambda r: r[x])
    axes.plot([r[x] for r in rows], [r[y] for r in rows], label=label, **STYLES[style])


def _panels(titles: list[str], width: float = 3.4) -> tuple[Figure, list[Axes]]:
    """Two in a line, which can be read on a telephone too."""
    columns = min(2, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(width * columns, width * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, title in zip(grid.flat, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(titles) :]:
        axes.set_axis_off()
    for first in grid[:, 0]:
        first.set_ylabel("latency, ms")
    return figure, list(grid.flat[: len(titles)])


def shown(rows: Iterable[dict]) -> str:
    """The executor that runs a level side by side, where there is one."""
    names = executors(rows)
    return "native" if "native" in names else names[0]


def _curves(axes: Axes, rows: list[dict], group: str, x: str, simulated: str) -> None:
    """Every executor; Brent's bounds for the lanes of one that has several; and a lane for each stream, from the times
    of the executor `simulated`."""
    for executor in executors(rows):
        own = sorted(select(rows, group, executor), key=lambda r: r[x])
        if not own:
            continue
        lanes = f", {own[0]['lanes']} lanes" if own[0]["one_lane_ms"] else ""
        _curve(axes, own, x, "median_ms", executor, f"{executor}{lanes}")
        if lanes:
            bounds = [brent(r["one_lane_ms"], r["span_gflops"] / r["gflops"], r["lanes"]) for r in own]
            axes.fill_between([r[x] for r in own], *zip(*bounds, strict=True), color="#b2182b", alpha=0.15, linewidth=0)
    label = f"{simulated}, a lane per stream, simulated"
    _curve(axes, select(rows, group, simulated), x, "lanes_ms", "lanes", label)


def _depth(rows: list[dict]) -> Figure | None:
    """(a): the same blocks, arranged in 1 to 24 streams."""
    found = groups(rows, "depth")
    if not found:
        return None
    figure, panels = _panels([f"48 blocks, {g.split(', ')[1]}" for g in found])
    for axes, group in zip(panels, found, strict=True):
        _curves(axes, rows, group, "depth", shown(rows))
        axes.set_xlabel("depth, levels")
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _work(rows: list[dict]) -> Figure | None:
    """(b): depth 10, work from 1x to 16x."""
    found = groups(rows, "work")
    if not found:
        return None
    figure, panels = _panels([g.removeprefix("work ") for g in found])
    for axes, group in zip(panels, found, strict=True):
        _curves(axes, rows, group, "gflops", executors(rows)[0])
        axes.set_xlabel("work, GFLOP")
        logarithmic(axes.xaxis)
        logarithmic(axes.yaxis)
        axes.set_ylim(0.5 * min(r["median_ms"] for r in select(rows, group)), None)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return figure


def _lanes(rows: list[dict]) -> Figure | None:
    """Measured on one lane, against the sum of the operations measured alone, which the simulation starts from."""
    eager = [r for r in rows if r["sum_ms"] is not None]
    if not eager:
        return None
    figure, (axes,) = _panels(["one lane: simulated against measured"], width=4.4)
    axes.scatter([r["median_ms"] for r in eager], [r["sum_ms"] for r in eager], s=14, color="#1f4e79")
    ends = [min(r["median_ms"] for r in eager) * 0.7, max(r["median_ms"] for r in eager) * 1.4]
    axes.plot(ends, ends, color="grey", linewidth=1, label="equal")
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.set_xlabel("measured, ms")
    axes.set_ylabel("simulated, ms")
    axes.legend(fontsize=8)
    return figure


def _scaling(rows: list[dict]) -> Figure | None:
    """ParNet-S to XL at three resolutions, with three streams and with one of the same depth and work."""
    found = groups(rows, "scaling")
    if not found:
        return None
    names = executors(select(rows, "scaling"))
    figure, panels = _panels(names)
    for axes, executor in zip(panels, names, strict=True):
        for group, marker in zip(found, "o^s", strict=False):
            for one, line in ((False, "-"), (True, ":")):
                chosen = [r for r in select(rows, group, executor) if r["network"].endswith("one stream") == one]
                label = f"{group.split(', ')[1]}, {'one stream' if one else 'three streams'}"
                values = [r["median_ms"] for r in chosen]
                axes.plot(["S", "M", "L", "XL"], values, marker=marker, linestyle=line, color="#444", label=label)
        axes.set_xlabel("variant")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    return figure
