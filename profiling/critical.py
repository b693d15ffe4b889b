"""Where the time of a request went: the measured critical path, what each lane did, and how far lanes overlap."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .timeline import Bar, Pass

COMPUTING, TRAVELLING, SENDING, OVERHEAD = "computing", "waiting", "sending", "overhead"
IMMEDIATE = 50e-6  # seconds


@dataclass(frozen=True)
class Step:
    """A piece of the critical path. what: the stage or stream that computes, the feature that travels, or "".

    kind: COMPUTING; TRAVELLING, from a feature's being handed to the transport to its reader's going on; SENDING, while
    it is handed over; OVERHEAD, what lies between two spans.
    """

    kind: str
    what: str
    lane: int
    start: float
    end: float
    bar: Bar | None = None

    @property
    def seconds(self) -> float:
        return self.end - self.start


def critical_path(one: Pass) -> list[Step]:
    """Find what the answer waited for, from the request's start to its end without a gap.

    Walks back from the answer. Where a lane was held up by a feature that had not arrived, the path goes on with the
    lane that sent it, at the moment at which it did.
    """
    return list(reversed(list(_back(one))))


def blocked(wait: Bar) -> bool:
    """Whether a feature came later than its reader asked for it: a wait for one that is there takes microseconds."""
    return wait.seconds > IMMEDIATE


def _back(one: Pass) -> Iterator[Step]:
    arrows = {id(arrow.target): arrow for arrow in one.arrows}
    leaves = {lane: one.leaves(lane) for lane in range(one.known.lanes)}
    lane, now = one.known.coordinator, one.end
    while now > one.start:
        bar = next((b for b in reversed(leaves[lane]) if b.start < now), None)
        if bar is None or bar.end <= one.start:
            yield Step(OVERHEAD, "", lane, one.start, now)
            return
        if bar.end < now:
            yield Step(OVERHEAD, "", lane, bar.end, now)
            now = bar.end
        begin = max(bar.start, one.start)
        arrow = arrows.get(id(bar))
        if arrow and blocked(bar):
            # clocks that disagree within their uncertainty may put a sending behind its arrival
            begin = max(one.start, arrow.source.start) if arrow.source.start < now else begin
            lane = arrow.source.lane
        yield Step(*_kind(bar), bar.lane, begin, now, bar)
        now = begin


def _kind(bar: Bar) -> tuple[str, str]:
    if bar.kind == "wait":
        return TRAVELLING, bar.feature
    if bar.kind == "kernel":
        return (TRAVELLING, "NCCL") if bar.name.startswith("nccl") else (COMPUTING, "kernels")
    return (SENDING, "") if bar.kind == "send" else (COMPUTING, bar.label)


@dataclass(frozen=True)
class Share:
    """A part of the critical path in words, and its seconds."""

    kind: str
    what: str
    seconds: float


def shares(one: Pass, path: Iterable[Step]) -> list[Share]:
    """Add up the critical path: computing by stage and stream, waiting by whose feature, and the rest."""
    sums: dict[tuple[str, str], float] = {}
    for step in path:
        what = one.known.source(step.what) if step.kind == TRAVELLING else step.what
        sums[step.kind, what] = sums.get((step.kind, what), 0.0) + step.seconds
    found = [Share(kind, what, seconds) for (kind, what), seconds in sums.items()]
    return sorted(found, key=lambda share: -share.seconds)


@dataclass(frozen=True)
class LaneTime:
    """Seconds of one request on one lane; they add up to the request."""

    lane: int
    computing: float
    sending: float
    waiting: float
    idle: float


def lane_times(one: Pass) -> list[LaneTime]:
    """Return what each lane did of the request's time; idle is what lies between its spans, before them and after
    them."""
    found = []
    for lane in range(one.known.lanes):
        sums = {"wait": 0.0, "send": 0.0, "": 0.0}
        for bar, begin, end in _counted(one, one.leaves(lane)):
            sums[bar.kind if bar.kind in sums else ""] += end - begin
        found.append(LaneTime(lane, sums[""], sums["send"], sums["wait"], one.seconds - sum(sums.values())))
    return found


def _counted(one: Pass, bars: Iterable[Bar]) -> Iterator[tuple[Bar, float, float]]:
    """Cut each bar to what lies in the request and in no bar before it: kernels of CUDA streams may lie side by
    side."""
    before = one.start
    for bar in bars:
        begin, end = max(bar.start, before), min(bar.end, one.end)
        if end > begin:
            yield bar, begin, end
            before = end


def overlap(one: Pass) -> float:
    """Return the share of the time in which at least two lanes compute, of that in which any does."""
    edges: list[tuple[float, int]] = []
    for lane in range(one.known.lanes):
        computing = [bar for bar in one.leaves(lane) if bar.kind not in ("wait", "send")]
        for _, begin, end in _counted(one, computing):
            edges += [(begin, 1), (end, -1)]
    busy = shared = 0.0
    running, before = 0, one.start
    for at, change in sorted(edges):
        busy += (at - before) * (running >= 1)
        shared += (at - before) * (running >= 2)
        running, before = running + change, at
    return shared / busy if busy else 0.0
