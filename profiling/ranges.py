"""NVTX ranges: the same spans, for Nsight Systems and Nsight Compute to show and to filter by.

In a domain of their own, `parallel_parnet`, with a colour for each stream and a category for each kind of work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..program.program import Operation, Program
from .colours import COLOURS, NEUTRAL
from .spans import Spans, kind_of, level_name, span

if TYPE_CHECKING:
    import nvtx

DOMAIN = "parallel_parnet"
CAPTURED = "traced"  # around the requests that a profiler from outside should capture


@dataclass(frozen=True)
class Ranges:
    """Pushes and pops ranges of a program's work. inner: marks the same spans as well."""

    domain: nvtx._lib.Domain
    operations: dict[str, Operation]
    labels: dict[str, str]
    inner: Spans | None = None
    attributes: dict[tuple[str, str, str], object] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program) -> Ranges | None:
        """Make ranges for a program; None where no tool listens, so that marking nothing costs a branch."""
        try:
            from nvtx import get_domain
            from nvtx._lib import DummyDomain
        except ImportError:  # macOS, for which there is no wheel, or an nvtx before 0.2.12
            return None
        domain = get_domain(DOMAIN)
        listening = not isinstance(domain, DummyDomain)
        labels = {op.name: op.label for op in program.operations}
        return cls(domain, program.by_name, labels) if listening else None

    def around(self, inner: Spans) -> Ranges:
        """Return ranges that mark each span for `inner` as well."""
        return replace(self, inner=inner)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Mark a range; for an operation, within one for its level."""
        op = self.operations.get(name)
        ranges = [(level_name(op.level), "level", op.label)] if op else []
        ranges.append((name, *category(name, self.labels)))
        for found in ranges:
            self.domain.push_range(self._attributes(*found))
        try:
            with span(self.inner, name):
                yield
        finally:
            for _ in ranges:
                self.domain.pop_range()

    def _attributes(self, name: str, kind: str, label: str) -> object:
        key = name, kind, label
        if key not in self.attributes:
            colour = int(COLOURS.get(label, NEUTRAL)[1:], 16)
            self.attributes[key] = self.domain.get_event_attributes(name, 0xFF000000 | colour, kind)
        return self.attributes[key]


def category(name: str, labels: Mapping[str, str]) -> tuple[str, str]:
    """Return the kind of work that a span holds, by its name, and the stage or stream that gives it its colour. A wait
    or a send has none, as in the report, where it would look like that stream's work."""
    if name == CAPTURED:
        return "capture", ""
    kind, label = kind_of(name, labels)
    if kind == "segment":
        return "fusion" if label == "fusion" else "stream", label
    return kind, "" if kind in ("wait", "send") else label
