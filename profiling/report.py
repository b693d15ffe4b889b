"""One page that tells where a request's time went: lanes, operations, transfers, critical path, levels.

Everything is in the file: data as JSON, drawn by report.js into report.html; a browser fetches nothing.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from ..files import as_json, write_atomically
from ..kernels.gpu.rates import Rates
from .advice import Story, words
from .colours import COLOURS, NEUTRAL
from .critical import TRAVELLING, Step, blocked, critical_path, lane_times, overlap
from .timeline import APART, REAL, Bar, Pass, Timeline

HERE = Path(__file__).parent


def write(timeline: Timeline, path: Path) -> None:
    """Write the page; ParNetError where the place cannot be written."""
    write_atomically(path, page(timeline))


def page(timeline: Timeline) -> str:
    """Make the page, as text."""
    data = as_json(content(timeline)).replace("<", "\\u003c")  # no text in it begins a tag or a comment
    text = (HERE / "report.html").read_text(encoding="utf-8")
    return text.replace("/*SCRIPT*/", (HERE / "report.js").read_text(encoding="utf-8")).replace("/*DATA*/", data)


def content(timeline: Timeline) -> dict:
    """Collect what the page shows, times in seconds from the start of the request."""
    story, about = Story.of(timeline), timeline.about
    real = panel("Real path", story.one, list(story.path))
    real["note"] = (
        f"One request as the {about['executor']} executor runs it, the median of {len(timeline.passes(REAL))} traced "
        f"ones. {_grain(story.one)}"
    )
    panels = [real]
    if timeline.passes(APART):
        one = timeline.typical(APART)
        panels.append(panel("Operation by operation", one, critical_path(one)))
        panels[-1]["note"] = (
            f"Another pass, the median of {len(timeline.passes(APART))}: each operation by itself, by "
            f"{about['alone_by']}, and waited for. It tells the operations apart; how long a request takes, the real "
            "path tells."
        )
        panels[-1]["predicted"] = about["predicted"]
    return {
        "headline": story.headline,
        "about": {key: about[key] for key in ("executor", "device", "dtype", "size", "batch", "date", "torch", "cores")}
        | {"lanes": timeline.known.lanes, "load": about["load_average"]},
        "colours": COLOURS | {"": NEUTRAL},
        "labels": list(dict.fromkeys(timeline.known.labels.values())),
        "shares": [{"text": words(s), "kind": s.kind, "label": s.what, "seconds": s.seconds} for s in story.shares],
        "panels": panels,
        "lanes": [vars(time) for time in lane_times(story.one)],
        "total": story.one.seconds,
        "overlap": overlap(story.one),
        "fixes": story.fixes(timeline),
        "levels": levels(timeline),
        "operations": about["operations"],
        "floor": about["floor"],
        "clocks": about["clocks"],
    }


def panel(title: str, one: Pass, path: list[Step]) -> dict:
    """Describe one request: each lane's bars and the arrows between them; what is on the critical path is marked."""
    critical = {id(step.bar) for step in path}
    followed = {id(step.bar) for step in path if step.kind == TRAVELLING}
    lanes = []
    for lane in range(one.known.lanes):
        bars = [_bar(bar, one, id(bar) in critical) for bar in one.leaves(lane)]
        lanes.append({"lane": lane, "coordinator": lane == one.known.coordinator, "bars": bars})
    arrows = [
        {
            "feature": arrow.feature, "from": arrow.source.lane, "to": arrow.target.lane,
            "start": _within(arrow.source.start, one), "end": _within(arrow.target.end, one),
            "critical": id(arrow.target) in followed and blocked(arrow.target),
        }
        for arrow in one.arrows
    ]  # fmt: skip
    steps = [{"lane": s.lane, "start": s.start - one.start, "end": s.end - one.start, "kind": s.kind} for s in path]
    return {"title": title, "seconds": one.seconds, "lanes": lanes, "arrows": arrows, "path": steps}


def levels(timeline: Timeline) -> list[dict]:
    """Add up each level's operations: FLOPs, bytes, the floor's seconds, and the median seconds of each alone."""
    floor, known = timeline.about["floor"], timeline.known
    rates = Rates(floor["of"], floor["bytes_per_s"], floor["flops_per_s"], 0)
    times: dict[str, list[float]] = {}
    for bar in timeline.bars:
        if bar.row == APART and bar.kind in ("operation", "level"):
            times.setdefault(bar.name, []).append(bar.seconds)
    found = []
    for level in sorted(set(known.levels.values())):
        operations = [op for op in timeline.about["operations"] if op["level"] == level]
        row = {
            "level": level,
            "names": [op["name"] for op in operations],
            "seconds": sum(median(seconds) for name, seconds in times.items() if known.level(name) == level),
            "flops": sum(op["flops"] for op in operations),
            "bytes": sum(op["bytes"] for op in operations),
            "floor": sum(rates.floor(op["flops"], op["bytes"]) for op in operations),
        }
        found += [row] if row["seconds"] else []
    return found


def _bar(bar: Bar, one: Pass, critical: bool) -> dict:
    return {
        "name": bar.name, "kind": bar.kind, "label": bar.label, "level": one.known.level(bar.name),
        "start": _within(bar.start, one), "end": _within(bar.end, one), "critical": critical,
    }  # fmt: skip


def _within(at: float, one: Pass) -> float:
    return min(max(at - one.start, 0.0), one.seconds)


def _grain(one: Pass) -> str:
    """What a bar stands for."""
    kinds = {bar.kind for lane in range(one.known.lanes) for bar in one.leaves(lane)}
    if "segment" in kinds:
        return "Bars are segments: operations that a lane runs without waiting in between, compiled into one."
    return "Bars are what its GPUs ran." if "kernel" in kinds else "Bars are operations, or launches of a level."
