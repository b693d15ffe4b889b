"""Spans of time: what ran on which lane, from when to when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """Seconds on the lane's monotonic clock."""

    name: str
    start: float
    end: float


@dataclass
class Recorder:
    """Collects the spans of one lane. `synchronise` waits for the device, so that a span holds its own work."""

    synchronise: Callable[[], None] = lambda: None
    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.synchronise()
        self.spans.append(Span(name, start, time.perf_counter()))

    @classmethod
    def of(cls, names: list[str], times: list[list[float]]) -> Recorder:
        """A recorder holding spans that another lane measured, [start, end] for each name."""
        return cls(spans=[Span(name, *pair) for name, pair in zip(names, times, strict=True)])

    def totals(self, label: Callable[[str], str]) -> dict[str, float]:
        """Seconds by label of the span's name, in order of first appearance."""
        sums: dict[str, float] = {}
        for span in self.spans:
            sums[label(span.name)] = sums.get(label(span.name), 0.0) + span.end - span.start
        return sums
