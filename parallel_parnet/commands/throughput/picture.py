"""Pictures a second against latency, a panel for each network, one under the other so that they can be read on a
telephone too, and a line for each contender, readable without colour.

All points of one batch lie on one line, since pictures a second = batch / latency: on logarithmic axes a straight one,
which carries the batch's number where no contender's points can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..drawing import logarithmic, save
from .words import SPEED, TIME, name_of

LOOKS = (("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (5, 1, 1, 1, 1, 1))), ("P", (0, (1, 3))), ("X", (0, (8, 3))))
OURS, PEERS = "#1f4e79", ("#8c510a", "#5e7d27", "#7b3294", "#b2182b", "#01665e", "#666666")
ROOM = 1.3  # factor between the outermost points and the axes' ends, where the batches' numbers stand


def draw(results: Sequence[Mapping], path: Path) -> None:
    """Write results of one machine as .svg or .png."""
    figure = Figure(figsize=(5.6, 4.2 * len(results) + 0.6), layout="constrained")
    panels = figure.subplots(len(results), 1, squeeze=False)[:, 0]
    peers = dict.fromkeys(row["contender"] for result in results for row in _rows(result) if not row["ours"])
    looks = {name: (*LOOKS[i % len(LOOKS)], PEERS[i % len(PEERS)]) for i, name in enumerate(peers)}
    for axes, result in zip(panels, results, strict=True):
        _panel(axes, result, looks)
    header = results[0]["header"]
    figure.suptitle(f"What a batch costs, on {header['machine']}, {header['threads']} thread(s)", fontsize=11)
    handles = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=2, fontsize=9, frameon=False,
        handlelength=3.5,
    )  # fmt: skip
    save(figure, path)


def _rows(result: Mapping) -> list[Mapping]:
    return [row for found in result["batches"] for row in found["rows"]]


def _row(found: Mapping, name: str) -> Mapping:
    """A contender's at one batch; empty, and so a gap in its line, where it was not raced."""
    return next((row for row in found["rows"] if row["contender"] == name), {})


def _panel(axes: Axes, result: Mapping, looks: Mapping[str, tuple]) -> None:
    rows = _rows(result)
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = [_row(found, name) for found in result["batches"]]
        is_ours = name not in looks
        marker, line, colour = looks.get(name, ("o", "-", OURS))
        axes.plot(
            [row.get(TIME, nan) for row in own], [row.get(SPEED, nan) for row in own], label=name, marker=marker,
            linestyle=line, color=colour, markersize=6, linewidth=2.2 if is_ours else 1.3,
            markerfacecolor=colour if is_ours else "white", zorder=3,
        )  # fmt: skip
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis, (1, 1.5, 2, 3, 4, 5, 7))
    low, high = min(row[SPEED] for row in rows) / ROOM, max(row[SPEED] for row in rows) * ROOM
    for found in result["batches"]:
        batch = found["batch"]
        ends = [1e3 * batch / speed for speed in (high, low)]
        axes.plot(ends, [high, low], color="#bbbbbb", linewidth=0.8, zorder=1)
        axes.annotate(
            f"batch {batch}" if found is result["batches"][0] else f"{batch}", (ends[1], low), (-9, 3),
            textcoords="offset points", ha="right", va="bottom", fontsize=9, color="#444444", zorder=2,
        )  # fmt: skip
    axes.set_ylim(low, high)
    _, right = axes.get_xlim()
    axes.set_xlim(min(row[TIME] for row in rows) / ROOM, right)
    axes.tick_params(labelsize=9)
    axes.set_xlabel("milliseconds for a batch (fewer is better)", fontsize=9)
    axes.set_ylabel("pictures a second (more is better)", fontsize=9)
    header = result["header"]
    title = f"{name_of(result)}, {header['size']} x {header['size']}, {header['dtype']}"
    axes.set_title(title, fontsize=10, parse_math=False)
