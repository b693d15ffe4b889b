"""Which lane runs which operation, and what must cross between lanes.

A lane is a resource that runs operations one after another: a GPU, a CUDA stream, a rank, or the CPU of one process. An
operation may run on several lanes at once (the stem does, as in the released code: recomputing it is cheaper than
waiting for it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ParNetError
from .program import INPUT, Program

MOST_LANES = 1024  # of each something is made, also where a file names a billion


@dataclass(frozen=True)
class Transfer:
    """A feature that one lane computes and another reads."""

    feature: str
    source: int
    target: int


@dataclass(frozen=True)
class Segment:
    """Operations that a lane runs without waiting for another lane in between.

    reads: features that come from earlier segments or other lanes. writes: features that others read.
    """

    lane: int
    operations: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """where: each operation's lanes, the first of them being the one that sends its output to lanes without it.

    The coordinator lane holds the picture at the start and the answers at the end.
    """

    lanes: int
    where: Mapping[str, tuple[int, ...]]
    coordinator: int = 0

    @classmethod
    def by_streams(cls, program: Program, lanes: int) -> Placement:
        """Put the network's streams on so many lanes, in order, as evenly as can be.

        The first lane is the coordinator: it also runs fusion and classifier. Each lane recomputes the stem that its
        streams need. Raises ParNetError for no lane, and for more lanes than streams, of which one would stay empty.
        """
        streams = program.streams
        if not streams:
            raise ParNetError("a program without streams: Placement.single puts it on one lane")
        if lanes < 1:
            raise ParNetError(f"{lanes} lanes: there must be at least 1")
        if lanes > streams:
            raise ParNetError(f"{lanes} lanes for {streams} streams: start at most {streams} ranks")
        # what an even division leaves over goes to the last lanes: the first one also runs fusion and classifier
        lane_of = [lanes - 1 - (streams - 1 - i) * lanes // streams for i in range(streams)]
        where: dict[str, set[int]] = {op.name: set() for op in program.operations}
        for op in reversed(program.operations):
            if op.stage == "stream":
                assert op.stream is not None
                where[op.name].add(lane_of[op.stream])
            elif op.stage != "stem":
                where[op.name].add(0)
            if op.stage in ("stem", "stream"):
                for name in op.inputs:
                    if name != INPUT and program.by_name[name].stage == "stem":
                        where[name] |= where[op.name]
        return cls(lanes, {name: tuple(sorted(on)) for name, on in where.items()})

    @classmethod
    def single(cls, program: Program) -> Placement:
        """Put everything on one lane."""
        return cls(1, {op.name: (0,) for op in program.operations})

    def check(self, program: Program) -> None:
        """ParNetError where an operation is left out or put on a lane that does not exist, and for very many lanes."""
        if self.lanes > MOST_LANES:
            raise ParNetError(f"{self.lanes} lanes: {MOST_LANES} at most")
        if not 0 <= self.coordinator < self.lanes:
            raise ParNetError(f"coordinator lane {self.coordinator} of {self.lanes} lanes: count from 0")
        for op in program.operations:
            on = self.where.get(op.name, ())
            if not on:
                raise ParNetError(f"placement leaves out operation {op.name}")
            if len(set(on)) != len(on) or not all(0 <= lane < self.lanes for lane in on):
                raise ParNetError(f"operation {op.name} on lanes {on}: name each of 0 to {self.lanes - 1} once at most")
        if foreign := sorted(self.where.keys() - program.by_name.keys()):
            raise ParNetError(f"placement names {foreign[0]!r}, which the program does not have")

    def _holders(self, feature: str) -> tuple[int, ...]:
        return (self.coordinator,) if feature == INPUT else self.where[feature]

    def transfers(self, program: Program) -> list[Transfer]:
        """List every feature that crosses lanes, once for each lane that reads it, in program order."""
        found: dict[Transfer, None] = {}
        for op in program.operations:
            for lane in self.where[op.name]:
                for name in op.inputs:
                    if lane not in self._holders(name):
                        found[Transfer(name, self._holders(name)[0], lane)] = None
        for name in program.answers.values():
            if self.coordinator not in self.where[name]:
                found[Transfer(name, self.where[name][0], self.coordinator)] = None
        return list(found)

    def segments(self, program: Program) -> list[Segment]:
        """Cut the lanes' work where a lane must receive first, or has run a level of which it must send.

        The segments come in an order in which one process can run them all: what a segment reads was written by an
        earlier one.
        """
        transfers = self.transfers(program)
        sent = {(t.feature, t.source) for t in transfers}
        received = {(t.feature, t.target) for t in transfers}
        runs: list[tuple[int, list[str]]] = []
        by_level = sorted(program.operations, key=lambda op: op.level)  # so that a run's first one is its lowest
        for lane in range(self.lanes):
            run: list[str] = []
            arrived: set[str] = set()
            for op in (op for op in by_level if lane in self.where[op.name]):
                needed = {name for name in op.inputs if (name, lane) in received} - arrived
                arrived |= needed
                sends = run and op.level > program.by_name[run[-1]].level and any((name, lane) in sent for name in run)
                if run and (needed or sends):
                    runs.append((lane, run))
                    run = []
                run.append(op.name)
            if run:
                runs.append((lane, run))
        runs.sort(key=lambda item: program.by_name[item[1][0]].level)
        return [self._segment(program, lane, run, sent) for lane, run in runs]

    def _segment(self, program: Program, lane: int, run: list[str], sent: set[tuple[str, int]]) -> Segment:
        inside, answers = set(run), set(program.answers.values())
        reads = dict.fromkeys(name for n in run for name in program.by_name[n].inputs if name not in inside)
        later = {
            name for op in program.operations if lane in self.where[op.name] and op.name not in inside
            for name in op.inputs
        }  # fmt: skip
        writes = [n for n in run if n in later or (n, lane) in sent or n in answers]
        return Segment(lane, tuple(run), tuple(reads), tuple(writes))

    def describe(self, program: Program) -> list[str]:
        """Name each lane's stages, such as "stem, stream 0, fusion, head"."""
        labels: list[dict[str, None]] = [{} for _ in range(self.lanes)]
        for op in program.operations:
            for lane in self.where[op.name]:
                labels[lane][op.label] = None
        order = ["stem", *(f"stream {i}" for i in range(program.streams)), "fusion", "head"]
        return [", ".join(sorted(lane, key=order.index)) for lane in labels]
