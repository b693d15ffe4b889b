"""Figures as files, and a schedule as one: lanes as rows, time from left to right, readable without colour."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from parallel_parnet import ParNetError
from parallel_parnet.files import check_writable, write_atomically
from parallel_parnet.planning.planner import Schedule
from parallel_parnet.profiling.colours import PALE

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

HATCHES = {
    "stem": "", "stream 0": "///", "stream 1": "...", "stream 2": "xxx", "stream 3": "|||", "fusion": "---",
    "head": "+++",
}  # fmt: skip
HEIGHT = 0.6
FORMATS = (".svg", ".png")


def need_matplotlib(option: str) -> None:
    """ParNetError, in the name of the option that draws, where there is none."""
    if find_spec("matplotlib") is None:
        raise ParNetError(f"{option} needs matplotlib: pip install 'parallel_parnet[figures]'")


def check(path: Path) -> None:
    """ParNetError, before anything is computed, where no schedule can be drawn there: another ending than .svg or .png,
    no matplotlib, or no place to write."""
    if path.suffix not in FORMATS:
        raise ParNetError(f"--figure {path}: give a name that ends in {' or '.join(FORMATS)}")
    need_matplotlib("--figure")
    check_writable(path)


def draw(schedule: Schedule, title: str, path: Path) -> None:
    """Write the schedule as .svg or .png. Raises ParNetError without matplotlib, or for another ending."""
    check(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    lanes, unit = schedule.placement.lanes, 1e6
    figure = Figure(figsize=(11, 1.2 + 0.9 * lanes), layout="constrained")
    axes = figure.subplots()
    labels: dict[str, None] = {}
    for run in schedule.runs:
        at = run.start
        for name in run.operations:  # a launch of several operations is divided evenly among them
            label = schedule.program.by_name[name].label
            labels[label] = None
            share = (run.end - run.start) / len(run.operations)
            colour, hatch = PALE[label], HATCHES[label]
            axes.barh(
                run.lane, share * unit, HEIGHT, at * unit, color=colour, hatch=hatch, edgecolor="#666", linewidth=0.5
            )
            at += share
    for sent in schedule.transfers:
        ends = (sent.start * unit, sent.transfer.source), (sent.end * unit, sent.transfer.target)
        critical = sent in schedule.critical_path
        style = {"arrowstyle": "-|>", "lw": 2.0 if critical else 1.0, "ls": "-" if critical else "--"}
        axes.annotate("", ends[1], ends[0], arrowprops=style)
    axes.set_yticks(range(lanes), [f"lane {lane}" for lane in range(lanes)])
    axes.invert_yaxis()
    axes.set_xlim(0, schedule.makespan * unit * 1.01)
    axes.set_xlabel("microseconds; thick arrows: transfers that the answer waits for")
    axes.set_title(f"{title}: {schedule.makespan * unit:.1f} us, {schedule.speed_up:.2f}x over one lane (predicted)")
    patches = [Patch(facecolor=PALE[x], hatch=HATCHES[x], edgecolor="#666", label=x) for x in labels]
    figure.legend(handles=patches, loc="outside right upper")
    save(figure, path)


def logarithmic(axis: Axis, marks: Sequence[float] = (1, 2, 5)) -> None:
    """Such an axis, with plain numbers at these of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=marks))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, path: Path) -> None:
    """Write a figure as .svg or .png; the same data give the same SVG."""
    from matplotlib import rc_context

    is_svg, buffer = path.suffix == ".svg", io.BytesIO()
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, metadata={"Date": None} if is_svg else {})
    write_atomically(path, buffer.getvalue())
