"""Spans of time: what ran on which lane, from when to when.

A span is known by its name alone, also where it was an NVTX range that comes back out of an export of Nsight Systems.
So names are made here, and read here: nobody else takes them apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

REQUEST = "request"  # a lane's whole part of a request
SENDS = "wait for sends"  # at a request's end, until all that was sent has left
GATHER = "gather"  # the coordinator's waits for what fusion reads
CLASSIFIER = "classifier"  # the launch of the last level, where levels are launched as one: `kernels.gpu.classifier`


def kind_of(name: str, labels: Mapping[str, str]) -> tuple[str, str]:
    """Return the kind of a lane's span, by its name: operation, level, segment, request, gather, wait or send; and the
    stage or stream that it belongs to, "" for none. labels: the stage or stream of each operation, by name."""
    if name in labels:
        return "operation", labels[name]
    if name == CLASSIFIER:
        return "level", "head"
    first = name.split(" ")[0]
    if name == SENDS:
        return "send", ""
    if name in (REQUEST, GATHER) or first in ("wait", "send", "level"):
        return first, labels.get(name.partition(" ")[2], "")
    parts = name.split(", ")
    if sum(part.startswith("stream") for part in parts) > 1:
        return "segment", "all streams"
    return "segment", next((part for part in parts if part != "stem"), parts[0])


def wait_name(feature: str) -> str:
    """Return the name of the span in which a lane waits for a feature."""
    return f"wait {feature}"


def send_name(feature: str) -> str:
    """Return the name of the span in which a lane hands a feature to the transport."""
    return f"send {feature}"


def feature_of(name: str) -> str:
    """Return the feature that a span waits for or hands over, by the span's name."""
    return name.split(" ", 1)[1]


def level_name(level: int) -> str:
    """Return the name of the span of a level's launch."""
    return f"level {level}"


def level_of(name: str, levels: Mapping[str, int]) -> int | None:
    """Return the level that an operation stands on, or a launch runs, by the span's name; None for other spans. levels:
    of each operation, by name."""
    if name == CLASSIFIER:
        return max(levels.values())
    return int(name.removeprefix("level ")) if name.startswith("level ") else levels.get(name)


@dataclass(frozen=True)
class Span:
    """Seconds on the lane's monotonic clock. row: where it ran, "" for the lane itself, else a CUDA stream."""

    name: str
    start: float
    end: float
    row: str = ""


class Spans(Protocol):
    """What executors mark their work with: a recorder, or ranges for a profiler from outside."""

    def span(self, name: str) -> AbstractContextManager[object]: ...


NOTHING: AbstractContextManager[object] = nullcontext()  # one for all: making it anew would double what off costs


def span(spans: Spans | None, name: str) -> AbstractContextManager[object]:
    """Mark a span where there is something to mark; nothing but this branch where there is not."""
    return NOTHING if spans is None else spans.span(name)


@dataclass
class Recorder:
    """Collects the spans of one lane. `synchronise` waits for the device, so that a span holds its own work.

    each: synchronise after every span; otherwise after a whole request alone, which leaves the lane's course as it is.
    """

    synchronise: Callable[[], None] = lambda: None
    each: bool = True
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record what happens inside as a span of this name."""
        start = time.perf_counter()
        yield
        if self.each or name == REQUEST:
            self.synchronise()
        self.spans.append(Span(name, start, time.perf_counter()))

    def totals(self, label: Callable[[str], str]) -> dict[str, float]:
        """Add up seconds by the label of each span's name, in order of first appearance."""
        sums: dict[str, float] = {}
        for span in self.spans:
            sums[label(span.name)] = sums.get(label(span.name), 0.0) + span.end - span.start
        return sums
