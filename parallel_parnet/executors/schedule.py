"""When lanes of one device wait for each other, as data: what each lane's queue holds, and the events between queues.

Lanes are queues that run in order, side by side: on a GPU, CUDA streams. An event is recorded in one queue and waited
for in others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..program.placement import Segment
from ..program.program import INPUT

START = -1  # the event after the picture is in its buffer


@dataclass(frozen=True)
class RunSegment:
    """Run segment number `segment` on its lane."""

    lane: int
    segment: int


@dataclass(frozen=True)
class Record:
    """Mark the point that the lane's queue has reached. event: the segment that has ended there, or START."""

    lane: int
    event: int


@dataclass(frozen=True)
class Wait:
    """Hold the lane's queue until the event's point has been reached."""

    lane: int
    event: int


Step = RunSegment | Record | Wait


def sources(segments: Sequence[Segment]) -> list[tuple[int, ...]]:
    """Return, for each segment and each feature that it reads, the segment that writes it, or START for the picture.

    A feature that several lanes compute is read where the reader's own lane computed it, if it did.
    """
    found: list[tuple[int, ...]] = []
    own: dict[tuple[str, int], int] = {}
    first: dict[str, int] = {INPUT: START}
    for i, segment in enumerate(segments):
        found.append(tuple(own.get((name, segment.lane), first[name]) for name in segment.reads))
        for name in segment.writes:
            own[name, segment.lane] = i
            first.setdefault(name, i)
    return found


def fork_and_join(segments: Sequence[Segment], origin: int = 0) -> tuple[Step, ...]:
    """Return the order in which to hand out segments, with the events that make every read follow its write.

    segments: in an order in which one lane could run them all, as `Placement.segments` gives them. origin: the lane
    that has the picture at the start and waits for all others at the end, as the capture of a CUDA graph demands.
    """
    last = {segment.lane: i for i, segment in enumerate(segments)}
    joins = [i for lane, i in last.items() if lane != origin]
    waits = [
        sorted({event for event in events if event == START or segments[event].lane != segment.lane})
        for segment, events in zip(segments, sources(segments), strict=True)
    ]
    awaited = {*joins, *(event for events in waits for event in events)}
    steps: list[Step] = [Record(origin, START)]
    done = {(origin, START)}
    for i, segment in enumerate(segments):
        for event in [START, *waits[i]]:
            if (segment.lane, event) not in done:
                done.add((segment.lane, event))
                steps.append(Wait(segment.lane, event))
        steps.append(RunSegment(segment.lane, i))
        if i in awaited:
            steps.append(Record(segment.lane, i))
    return (*steps, *(Wait(origin, event) for event in joins if (origin, event) not in done))
