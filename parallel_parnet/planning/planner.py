"""Simulated lanes: when each operation and each transfer of a placement starts and ends, and what the answer waits for.

The model: a lane runs its operations level by level, each when the lane is free and the inputs have arrived. What
others read of a level is sent when the lane has run all of that level. A transfer starts when its feature is there and
the sending lane's port is free, and takes the link's latency and bytes / bandwidth; over a link where lanes copy
themselves, the lane is its own port, and sends before it goes on. Where there are fewer processors than busy lanes,
these share them evenly. All times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from ..errors import ParNetError
from ..program.placement import Placement, Transfer
from ..program.program import INPUT, Operation, Program
from .costs import Costs

LANE, PORT = "lane", "port"


@dataclass(frozen=True)
class Launched:
    """A launch on a lane: the operations that it runs, from when to when. after: what ended as it started."""

    lane: int
    operations: tuple[str, ...]
    start: float
    end: float
    after: Launched | Sent | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        return f"{' + '.join(self.operations)} on lane {self.lane}"


@dataclass(frozen=True)
class Sent:
    """A transfer, from when to when. after: what ended as it started."""

    transfer: Transfer
    start: float
    end: float
    after: Launched | Sent | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        t = self.transfer
        return f"transfer of {t.feature} from lane {t.source} to lane {t.target}"


@dataclass(frozen=True)
class Bounds:
    """Brent's bounds on the time T of any placement, over any link, on so many lanes that compute side by side:
    T >= work / lanes, and T >= span.

    work: seconds of one lane alone. span: the longest path of operations through the program.
    """

    work: float
    span: float
    lanes: int

    @classmethod
    def of(cls, program: Program, costs: Costs, lanes: int) -> Bounds:
        """Compute the bounds of a program on so many lanes. ParNetError for fewer than one."""
        if lanes < 1:
            raise ParNetError(f"{lanes} lanes: there must be at least 1")
        work = sum(map(costs.seconds, costs.launches(program.operations)))
        ends = {INPUT: 0.0}
        for op in program.operations:
            ends[op.name] = costs.seconds([op]) + max(ends[name] for name in op.inputs)
        return cls(work, max(ends.values()), lanes)

    @property
    def lower(self) -> float:
        """Seconds that no placement on so many lanes can beat."""
        return max(self.work / self.lanes, self.span)


@dataclass(frozen=True)
class Schedule:
    """What a placement is predicted to do. runs and transfers are in order of their end. last: what brings the last of
    the answers to the coordinator."""

    program: Program
    placement: Placement
    runs: tuple[Launched, ...]
    transfers: tuple[Sent, ...]
    last: Launched | Sent
    bounds: Bounds

    @property
    def makespan(self) -> float:
        """Seconds from the picture on the coordinator to all answers, mostly the logits, on the coordinator."""
        return self.last.end

    def lane(self, lane: int) -> list[Launched]:
        """List what a lane runs, in order."""
        return [run for run in self.runs if run.lane == lane]

    def idle(self, lane: int) -> float:
        """Return the seconds in which a lane computes nothing."""
        return self.makespan - sum(run.end - run.start for run in self.lane(lane))

    @property
    def speed_up(self) -> float:
        """Times faster than one lane of the same kind."""
        return self.bounds.work / self.makespan

    @cached_property
    def critical_path(self) -> tuple[Launched | Sent, ...]:
        """What the last of the answers waited for, from the start: each item starts when the one before ends."""
        path = [self.last]
        while before := path[-1].after:
            path.append(before)
        return tuple(reversed(path))


def schedule(program: Program, placement: Placement, costs: Costs, processors: int | None = None) -> Schedule:
    """Predict what a placement does: when each launch and each transfer starts and ends, in seconds.

    processors: where lanes share fewer of them, running operations slow down evenly. Raises ParNetError for a
    placement that does not fit the program, and for numbers that mean nothing.
    """
    placement.check(program)
    if processors is not None and processors < 1:
        raise ParNetError(f"{processors} processors: there must be at least 1")
    clock = _Clock(program, placement, costs, processors)
    clock.play()
    there = [clock.held[name, placement.coordinator] for name in program.answers.values()]
    last = max((item for item in there if item), key=lambda item: item.end)
    bounds = Bounds.of(program, costs, placement.lanes)
    return Schedule(program, placement, tuple(clock.runs), tuple(clock.sent), last, bounds)


@dataclass
class _Activity:
    """Something under way: seconds of it left, were it not slowed down. after: what ended as it started."""

    item: tuple[Operation, ...] | Transfer
    start: float
    left: float
    after: Launched | Sent | None


class _Clock:
    """The state of all lanes and ports, which have the names (LANE, number) and (PORT, number), at one moment."""

    def __init__(self, program: Program, placement: Placement, costs: Costs, processors: int | None) -> None:
        self.costs, self.processors, self.now = costs, processors, 0.0
        self.launches = [
            costs.launches(op for op in program.operations if lane in placement.where[op.name])
            for lane in range(placement.lanes)
        ]
        self.levels = {INPUT: 0} | {op.name: op.level for op in program.operations}
        features = [*self.levels]
        self.transfers = sorted(placement.transfers(program), key=lambda t: features.index(t.feature))
        self.held: dict[tuple[str, int], Launched | Sent | None] = {}  # (feature, lane): what brought it there
        self.taken: set[tuple[str, int]] = set()
        self.queues: list[list[tuple[Transfer, Launched | None]]] = [[] for _ in range(placement.lanes)]
        self.under_way: dict[tuple[str, int], _Activity] = {}
        self.before: dict[tuple[str, int], Launched | Sent] = {}  # what ended last on a lane or a port
        self.runs: list[Launched] = []
        self.sent: list[Sent] = []
        self.held[INPUT, placement.coordinator] = None
        self._queue(placement.coordinator, 0, None)

    def play(self) -> None:
        """Advance from event to event until all work is done."""
        while self._start():
            busy = sum(kind == LANE for kind, _ in self.under_way)
            share = min(1.0, self.processors / busy) if self.processors and busy else 1.0
            speeds = [share if kind == LANE else 1.0 for kind, _ in self.under_way]
            each = list(zip(self.under_way.items(), speeds, strict=True))
            step = min(activity.left / speed for (_, activity), speed in each)
            self.now += step
            for (where, activity), speed in each:
                # what ends is decided by the same comparison that chose the step: no tolerance is needed
                if activity.left / speed <= step:
                    self._finish(where, self.under_way.pop(where))
                else:
                    activity.left -= step * speed
        assert not any(self.launches) and not any(self.queues), "a checked placement runs to its end"

    def _start(self) -> bool:
        """Start whatever can start now, and say whether anything is under way."""
        for lane, (waiting, queue) in enumerate(zip(self.launches, self.queues, strict=True)):
            port = (LANE if self.costs.by_lanes else PORT, lane)
            if queue and port not in self.under_way:
                transfer, run = queue.pop(0)
                self._begin(port, transfer, self.costs.transfer[transfer.feature], [run])
            inputs = dict.fromkeys((name, lane) for op in waiting[0] for name in op.inputs) if waiting else {}
            if waiting and (LANE, lane) not in self.under_way and self.held.keys() >= inputs.keys():
                launch, brought = waiting.pop(0), [self.held[one] for one in inputs]
                taken = [one for one in inputs if isinstance(self.held[one], Sent) and one not in self.taken]
                self.taken.update(taken)
                self._begin((LANE, lane), launch, self.costs.seconds(launch, [name for name, _ in taken]), brought)
        return bool(self.under_way)

    def _begin(
        self, where: tuple[str, int], item: tuple[Operation, ...] | Transfer, seconds: float,
        needed: list[Launched | Sent | None],
    ) -> None:  # fmt: skip
        ended = [one for one in (*needed, self.before.get(where)) if one]
        after = max(ended, key=lambda one: one.end, default=None)
        self.under_way[where] = _Activity(item, self.now, seconds, after)

    def _finish(self, where: tuple[str, int], activity: _Activity) -> None:
        item, lane = activity.item, where[1]
        if isinstance(item, Transfer):
            sent = Sent(item, activity.start, self.now, activity.after)
            self.sent.append(sent)
            self.before[where] = self.held[item.feature, item.target] = sent
            return
        run = Launched(lane, tuple(op.name for op in item), activity.start, self.now, activity.after)
        self.runs.append(run)
        self.before[where] = run
        self.held |= {(name, lane): run for name in run.operations}
        level = item[0].level
        if not self.launches[lane] or self.launches[lane][0][0].level > level:
            self._queue(lane, level, run)

    def _queue(self, lane: int, level: int, run: Launched | None) -> None:
        """Queue the features of a level that other lanes read, once the lane has run it. run: its last launch."""
        self.queues[lane] += [(t, run) for t in self.transfers if (t.source, self.levels[t.feature]) == (lane, level)]
