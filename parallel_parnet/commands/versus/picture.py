"""Accuracy against latency: a row for each network, the most accurate on top, from one lane to many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..drawing import logarithmic, save

COLOURS = {True: "#1f4e79", False: "#8c510a"}  # ParNet, and the others, whose lines are dashed


def draw(rows: Sequence[dict], header: dict, path: Path) -> None:
    """As .svg or .png."""
    rows = sorted(rows, key=lambda row: row["top1"])
    cores = str(header["threads"])
    figure = Figure(figsize=(6.4, 5.4), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        lanes, colour = row["lanes_ms"], COLOURS[row["ours"]]
        most = max(lanes, key=int)
        # what is simulated stands above the line, what others measure below it, so that none hides another
        points = [("one thread, measured", "o", lanes["1"], 0.0), (f"{most} lanes, simulated", "^", lanes[most], 0.25)]
        if cores != "1":
            points.insert(1, (f"{cores} threads, measured", "s", row["threads"][cores]["ms"], 0.0))
        ends = [x for _, _, x, _ in points]
        if row["peer"]:
            points.append((f"best other library, {cores} thread(s)", "x", row["peers"][row["peer"]]["ms"], -0.25))
        axes.plot(
            [min(ends), max(ends)], [y, y], color=colour, linestyle="-" if row["ours"] else "--",
            linewidth=2.5 if row["ours"] else 1.5, zorder=1,
        )  # fmt: skip
        for label, marker, x, above in points:
            face = "white" if marker == "^" else colour
            axes.scatter(x, y + above, s=50, marker=marker, color=colour, facecolor=face, zorder=2, label=label)
    axes.set_yticks(range(len(rows)), [f"{row['network']}\n{row['top1']:.2f}%, depth {row['depth']}" for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    logarithmic(axes.xaxis, (1, 2, 3, 5, 7))
    axes.grid(axis="x", alpha=0.4)
    axes.tick_params(labelsize=10)
    axes.set_xlabel("milliseconds for a picture, 224 x 224, fp32 (fewer is better)", fontsize=10)
    figure.suptitle(f"Top-1 accuracy and latency on {header['machine']}", fontsize=11)
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handles[labels.index(label)] for label in labels}  # each stands in many rows
    looks = {"loc": "outside lower center", "ncols": 2, "fontsize": 10, "frameon": False}
    figure.legend(list(first.values()), list(first), **looks)
    save(figure, path)
