"""Timelines in the Trace Event Format, as Perfetto and chrome://tracing open it, and back.

A lane is a process, a row is a thread, a bar a complete event, an arrow a pair of flow events. What else is known of
the run stands under "otherData", which viewers show as the trace's metadata.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import asdict
from pathlib import Path

from ..errors import ParNetError
from ..files import as_json, write_atomically
from ..program.placement import Transfer
from .timeline import APART, REAL, Bar, Operations, Timeline, arrows

FORMAT = "parallel_parnet.trace.2"
SUFFIXES = (".json", ".json.gz")
TOLD = (  # of the run, by `about`: what words and pages are made of
    "executor", "alone_by", "device", "dtype", "size", "batch", "date", "torch", "cores", "load_average", "clocks",
    "operations", "floor", "predicted",
)  # fmt: skip


def events(timeline: Timeline) -> dict:
    """Make one JSON object of a timeline, as Python has it; times in microseconds from the first bar on."""
    zero = min((bar.start for bar in timeline.bars), default=0.0)
    rows = sorted({(bar.lane, bar.row) for bar in timeline.bars}, key=lambda at: (at[0], _order(at[1]), at[1]))
    threads = {at: i for i, at in enumerate(rows, start=1)}
    found: list[dict] = []
    for lane in range(timeline.known.lanes):
        role = ", coordinator" if lane == timeline.known.coordinator else ""
        found.append(_metadata("process_name", lane, 0, name=f"lane {lane}{role}"))
        found.append(_metadata("process_sort_index", lane, 0, sort_index=lane))
    for (lane, row), thread in threads.items():
        found.append(_metadata("thread_name", lane, thread, name=row))
        found.append(_metadata("thread_sort_index", lane, thread, sort_index=thread))

    def place(bar: Bar, at: float) -> dict:
        return {"pid": bar.lane, "tid": threads[bar.lane, bar.row], "ts": round((at - zero) * 1e6, 3)}

    for bar in sorted(timeline.bars, key=lambda bar: (bar.start, -bar.end)):
        level = timeline.known.level(bar.name)
        args = {"label": bar.label, "request": bar.number} | ({} if level is None else {"level": level})
        # from the rounded ends, so that what lies within a bar still does
        at, end = place(bar, bar.start), place(bar, bar.end)["ts"]
        shown = {"name": bar.name, "cat": bar.kind, "dur": round(end - at["ts"], 3), "args": args}
        found.append({"ph": "X", **at, **shown})
    for i, arrow in enumerate(timeline.arrows, start=1):
        flow = {"name": arrow.feature, "cat": "transfer", "id": i}
        found.append({"ph": "s", **flow, **place(arrow.source, arrow.source.start)})
        found.append({"ph": "f", "bp": "e", **flow, **place(arrow.target, arrow.target.end)})
    about = {"format": FORMAT, "names": asdict(timeline.known), **timeline.about}
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": about}


def write(timeline: Timeline, path: Path) -> None:
    """Write a timeline as .json or .json.gz. ParNetError where the place cannot be written."""
    text = as_json(events(timeline), separators=(",", ":"))
    write_atomically(path, gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text)


def read(path: Path) -> Timeline:
    """Read what `write` wrote; ParNetError, in one line, where it is missing, cut off or foreign."""
    try:
        data = path.read_bytes()
        content = json.loads(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except OSError as error:
        raise ParNetError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError, RecursionError, zlib.error) as error:
        raise ParNetError(f"{path}: not a whole trace ({error}); record it again with --trace") from None
    about = content.get("otherData") if isinstance(content, dict) else None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise ParNetError(f"{path}: not a trace of this project (no otherData.format {FORMAT}); --trace writes one")
    try:
        return _timeline(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ParNetError(f"{path}: a damaged trace ({error!r}); record it again with --trace") from None


def _timeline(content: dict) -> Timeline:
    about = dict(content["otherData"])
    names = about.pop("names")
    del about["format"]
    if missing := [key for key in TOLD if key not in about]:
        raise KeyError(missing[0])
    known = Operations(**{**names, "transfers": tuple(Transfer(**t) for t in names["transfers"])})
    rows = {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in content["traceEvents"] if e["ph"] == "M" and e["name"] == "thread_name"
    }  # fmt: skip
    bars = []
    for e in (e for e in content["traceEvents"] if e["ph"] == "X"):
        start, args = e["ts"] * 1e-6, e["args"]
        row = rows[e["pid"], e["tid"]]
        bars.append(
            Bar(e["pid"], row, e["cat"], e["name"], args["label"], args["request"], start, (e["ts"] + e["dur"]) * 1e-6)
        )
    if strangers := [bar for bar in bars if bar.kind == "operation" and bar.name not in known.labels]:
        raise ParNetError(
            f"lane {strangers[0].lane} ran {strangers[0].name}, which the program of the trace does not have: "
            "ranks with differing programs; start all with the same arguments"
        )
    return Timeline(tuple(bars), tuple(arrows(known, bars)), known, about)


def _metadata(kind: str, lane: int, thread: int, **args: object) -> dict:
    return {"ph": "M", "name": kind, "pid": lane, "tid": thread, "args": args}


def _order(row: str) -> int:
    return (REAL, APART).index(row) if row in (REAL, APART) else 2
