"""Where the time went, in words, and the three largest things to fix."""

from __future__ import annotations

from dataclasses import dataclass

from ..planning.explain import duration
from .critical import COMPUTING, OVERHEAD, SENDING, TRAVELLING, Share, Step, critical_path, lane_times, overlap, shares
from .timeline import APART, REAL, Pass, Timeline


@dataclass(frozen=True)
class Story:
    """One typical request: its critical path, added up, and what could be done."""

    one: Pass
    path: tuple[Step, ...]
    shares: tuple[Share, ...]

    @classmethod
    def of(cls, timeline: Timeline) -> Story:
        """Tell the story of the real path's median request."""
        one = timeline.typical(REAL)
        path = critical_path(one)
        return cls(one, tuple(path), tuple(shares(one, path)))

    def part(self, seconds: float) -> str:
        """Write seconds as a share of the request, such as "62%"."""
        return f"{seconds / self.one.seconds:.0%}"

    @property
    def headline(self) -> str:
        """One sentence, such as "4.3 ms: 62% computing on the critical path, 21% waiting for stream 2's features"."""
        computing = sum(s.seconds for s in self.shares if s.kind == COMPUTING)
        parts = [f"{self.part(computing)} computing on the critical path"]
        parts += [f"{self.part(s.seconds)} {words(s)}" for s in self.shares if s.kind == TRAVELLING]
        parts += [f"{self.part(s.seconds)} {words(s)}" for s in self.shares if s.kind in (SENDING, OVERHEAD)]
        return f"{duration(self.one.seconds)}: " + ", ".join(part for part in parts if not part.startswith("0%"))

    def fixes(self, timeline: Timeline) -> list[str]:
        """List the three largest things to fix, the largest first, each with what it costs on the critical path."""
        return [f"{self.part(s.seconds)}, {duration(s.seconds)}: {_fix(s, self, timeline)}" for s in self.shares[:3]]


def words(share: Share) -> str:
    """Say what took the time."""
    kinds = {
        COMPUTING: f"computing {share.what}",
        TRAVELLING: f"waiting for {share.what}",
        SENDING: "sending",
        OVERHEAD: "launches and overhead",
    }
    return kinds[share.kind]


def _fix(share: Share, story: Story, timeline: Timeline) -> str:
    if share.kind == TRAVELLING:
        if share.what == "the request":
            return "announcing the request to the other lanes: fewer lanes, or larger batches per request"
        names = dict.fromkeys(
            s.what for s in story.path if s.kind == TRAVELLING and timeline.known.source(s.what) == share.what
        )
        ways = ["a faster link", "a placement that keeps it on its lane (launch/plan.py, --placement auto)"]
        if crowded(timeline):
            ways.insert(0, "a core for each lane")
        return f"waiting for {share.what} ({', '.join(names)}) after it was sent: {', or '.join(ways)}"
    if share.kind == SENDING:
        return "handing features to the transport, which copies them: fewer or smaller transfers (launch/plan.py)"
    if share.kind == OVERHEAD:
        return (
            "launches and overhead between operations: a compiled executor, or a CUDA graph; "
            "on a CPU, fewer threads and ranks than cores"
        )
    lanes = sorted({step.lane for step in story.path if (step.kind, step.what) == (COMPUTING, share.what)})
    where = f"on lane {', '.join(map(str, lanes))}"
    return f"computing {share.what} {where}: {_slowest(share.what, timeline)}"


def _slowest(label: str, timeline: Timeline) -> str:
    """Name the operation of a stage or stream that takes longest when each runs alone."""
    if not timeline.passes(APART):
        return "a faster executor (--executor), or its operations divided among more lanes"
    bars = [bar for bar in timeline.typical(APART).bars if bar.kind in ("operation", "level")]
    slowest = max([bar for bar in bars if bar.label == label] or bars, key=lambda bar: bar.seconds)
    return (
        f"{slowest.name} is its longest operation, {duration(slowest.seconds)} alone, by {timeline.about['alone_by']}: "
        "a faster executor (--executor), or other lanes for it (--placement auto)"
    )


def crowded(timeline: Timeline) -> bool:
    """Whether lanes outnumber the cores that they share."""
    return timeline.about["device"] == "cpu" and timeline.about["cores"] < timeline.known.lanes


def explain(timeline: Timeline) -> str:
    """Explain where the time went, as lines of text: shares, lanes, prediction, and the largest things to fix."""
    story = Story.of(timeline)
    passes = len(timeline.passes(REAL))
    lines = [
        story.headline + ".",
        f"The median of {passes} traced requests, {timeline.about['executor']} executor. launch/infer.py prints the "
        "latency of others, not traced.",
    ]
    for time in lane_times(story.one):
        role = " (coordinator)" if time.lane == timeline.known.coordinator else ""
        parts = (f"{story.part(getattr(time, kind))} {kind}" for kind in ("computing", "waiting", "sending", "idle"))
        lines.append(f"  lane {time.lane}{role}: {', '.join(parts)}")
    if timeline.known.lanes > 1:
        lines.append(f"Two lanes or more compute during {overlap(story.one):.0%} of the time in which any does.")
    if crowded(timeline):
        lines.append(
            f"{timeline.known.lanes} lanes share {timeline.about['cores']} core(s): part of the waiting and of the "
            "sending is for a core."
        )
    if predicted := timeline.about["predicted"]:
        ran, alone_by = timeline.about["executor"], timeline.about["alone_by"]
        of_others = "eager" in alone_by and ran not in ("eager", "reference")
        lines.append(
            f"The planner predicts {duration(predicted['makespan'])} for this placement, from its operations as "
            f"{alone_by} ran them one by one{f': of {ran} it says nothing' if of_others else ''}."
        )
    lines.append("Largest things to fix:")
    lines += [f"  {i}. {fix}" for i, fix in enumerate(story.fixes(timeline), start=1)]
    return "\n".join(lines)
