"""What the lanes did, on one clock: bars on rows, arrows between them, and what is known about the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import ParNetError
from ..program.placement import Placement, Transfer
from ..program.program import INPUT, Program
from .clocks import Clock
from .spans import REQUEST, Recorder, Span, feature_of, kind_of, level_of, send_name

REAL, APART = "real path", "operation by operation"
ANNOUNCED = REQUEST  # the feature, so to speak, by which a request is announced to the other lanes


@dataclass(frozen=True)
class Bar:
    """Something that a lane did, in seconds on the coordinator's clock.

    row: REAL, APART, or a CUDA stream by its name. kind: request, gather, wait, send, segment, level, operation or
    kernel. label: the stage or stream, "" where there is none. number: which request of its row.
    """

    lane: int
    row: str
    kind: str
    name: str
    label: str
    number: int
    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def feature(self) -> str:
        """What a wait waits for, or a send sends."""
        return feature_of(self.name)


@dataclass(frozen=True)
class Arrow:
    """A feature from the bar that sent it to the bar that waited for it."""

    feature: str
    source: Bar
    target: Bar


@dataclass(frozen=True)
class Operations:
    """What names mean: each operation's label and level, and each feature's transfers."""

    labels: dict[str, str]
    levels: dict[str, int]
    transfers: tuple[Transfer, ...]
    coordinator: int
    lanes: int

    @classmethod
    def of(cls, program: Program, placement: Placement) -> Operations:
        """Collect them from a program and its placement."""
        operations = program.operations
        return cls(
            {op.name: op.label for op in operations},
            {op.name: op.level for op in operations},
            tuple(placement.transfers(program)),
            placement.coordinator,
            placement.lanes,
        )

    def source(self, feature: str) -> str:
        """Say whose feature it is: "stream 2's features"."""
        if feature in (INPUT, ANNOUNCED):
            return "the picture" if feature == INPUT else "the request"
        return f"{self.labels[feature]}'s features" if feature in self.labels else feature

    def level(self, name: str) -> int | None:
        """Return the level that a span of this name belongs to, if any; see `spans.level_of`."""
        return level_of(name, self.levels)


@dataclass(frozen=True)
class Timeline:
    """bars: of every pass. arrows: their transfers. known: what the names mean. about: the run, as JSON."""

    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    known: Operations
    about: dict

    @classmethod
    def of(
        cls, known: Operations, about: dict, clocks: Sequence[Clock], real: Sequence[Recorder],
        stepwise: Sequence[Sequence[Recorder]],
    ) -> Timeline:  # fmt: skip
        """Make a timeline of a trace of the real path and of passes operation by operation, each a recorder for every
        lane."""
        bars: list[Bar] = []
        for lane, clock in enumerate(clocks):
            bars += bars_of(known, lane, REAL, real[lane].spans, clock.applied)
            for number, lanes in enumerate(stepwise):
                bars += bars_of(known, lane, APART, lanes[lane].spans, clock.applied, number)
        return cls(tuple(bars), tuple(arrows(known, bars)), known, about)

    def passes(self, row: str) -> list[int]:
        """List the numbers of a row's requests."""
        return sorted({bar.number for bar in self.bars if bar.row == row})

    def of_pass(self, row: str, number: int) -> Pass:
        """Return one request of a row. ParNetError where the trace has none of it."""
        bars = [bar for bar in self.bars if bar.row == row and bar.number == number]
        own = [bar for bar in bars if bar.lane == self.known.coordinator]
        if not own:
            raise ParNetError(f"the trace has no request {number} of the {row} on the coordinator's lane")
        start, end = min(bar.start for bar in own), max(bar.end for bar in own)
        kernels = (
            [b for b in self.bars if b.kind == "kernel" and b.end > start and b.start < end] if row == REAL else []
        )
        inside = [bar for bar in bars if bar.end > start and bar.start < end]
        arrows = [a for a in self.arrows if a.target.row == row and a.target.number == number]
        return Pass(start, end, tuple(inside + kernels), tuple(arrows), self.known)

    def typical(self, row: str) -> Pass:
        """Return the request whose duration is the median of its row's. ParNetError where the row has none."""
        found = sorted((self.of_pass(row, number) for number in self.passes(row)), key=lambda one: one.seconds)
        if not found:
            raise ParNetError(f"the trace holds nothing of the {row}")
        return found[(len(found) - 1) // 2]


@dataclass(frozen=True)
class Pass:
    """One request from the coordinator's start to its end, and what every lane did meanwhile."""

    start: float
    end: float
    bars: tuple[Bar, ...]
    arrows: tuple[Arrow, ...]
    known: Operations

    @property
    def seconds(self) -> float:
        return self.end - self.start

    def leaves(self, lane: int) -> list[Bar]:
        """List what a lane did one after another, in order, as finely as it is known.

        Kernels, where a GPU's are, stand for what the host merely launched; else operations, or launches of a level;
        else segments, which a compiled executor runs as one.
        """
        own = [bar for bar in self.bars if bar.lane == lane]
        by_kind = ({"kernel"}, {"operation", "level"}, {"segment"})
        computing: list[Bar] = next((found for kinds in by_kind if (found := [b for b in own if b.kind in kinds])), [])
        return sorted(
            computing + [bar for bar in own if bar.kind in ("wait", "send")], key=lambda bar: (bar.start, bar.end)
        )


def bars_of(
    known: Operations, lane: int, row: str, spans: Iterable[Span], offset: float, number: int | None = None
) -> list[Bar]:
    """Make bars of a lane's spans; without a number, a span belongs to the request that holds it."""
    spans = list(spans)
    requests = sorted((s for s in spans if s.name == REQUEST), key=lambda s: s.start)
    bars = []
    for s in spans:
        holding = (i for i, r in enumerate(requests) if r.start <= (s.start + s.end) / 2 <= r.end)
        which = next(holding, 0) if number is None else number
        kind, label = ("kernel", "") if s.row else kind_of(s.name, known.labels)
        bars.append(Bar(lane, s.row or row, kind, s.name, label, which, s.start - offset, s.end - offset))
    return bars


def arrows(known: Operations, bars: Iterable[Bar]) -> list[Arrow]:
    """Tie each send to the waits for what it sent."""
    ends: dict[tuple[str, int, str, int], list[Bar]] = {}
    for bar in sorted(bars, key=lambda bar: bar.start):
        if bar.kind in ("wait", "send"):
            ends.setdefault((bar.row, bar.number, bar.name, bar.lane), []).append(bar)
    found = []
    for (row, number, _, lane), waits in ends.items():
        if waits[0].kind != "wait":
            continue
        feature = waits[0].feature
        source = known.coordinator
        if feature != ANNOUNCED:
            (source,) = (t.source for t in known.transfers if (t.feature, t.target) == (feature, lane))
        if sends := ends.get((row, number, send_name(feature), source)):
            found.append(Arrow(feature, sends[0], waits[0]))
    return found
