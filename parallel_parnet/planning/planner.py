"""Simulated lanes: when each operation and each transfer of a placement starts and ends, and what the answer waits for.

The model: a lane runs its operations in program order, each when the lane is free and the inputs have arrived. A
transfer starts when its feature is ready and the sending lane's port is free, and takes the link's latency and bytes /
bandwidth. Where there are fewer processors than running lanes, these share them evenly. All times in seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile

from ..errors import ParNetError
from ..program.placement import Placement, Transfer
from ..program.program import INPUT, Operation, Program
from .costs import Costs


@dataclass(frozen=True)
class Run:
    """A launch on a lane: the operations that it runs, from when to when."""

    lane: int
    operations: tuple[str, ...]
    start: float
    end: float

    def __str__(self) -> str:
        return f"{' + '.join(self.operations)} on lane {self.lane}"


@dataclass(frozen=True)
class Sent:
    """A transfer. It waits from ready, when its feature is computed, to start, when the sender's port is free."""

    transfer: Transfer
    ready: float
    start: float
    end: float

    def __str__(self) -> str:
        t = self.transfer
        return f"transfer of {t.feature} from lane {t.source} to lane {t.target}"


@dataclass(frozen=True)
class Bounds:
    """Brent's bounds on the time T of any placement on so many lanes that compute side by side.

    work: seconds of one lane alone. span: the longest path of operations through the program. steps: the longest
    operation of each level, added up; equal to the span where a level's operations take equally long.

    T >= work / lanes and T >= span hold for every placement and every link. T <= work / lanes + steps holds for the
    best of all assignments of operations to lanes where transfers are free: a greedy one, level by level, reaches it.
    """

    work: float
    span: float
    steps: float
    lanes: int

    @classmethod
    def of(cls, program: Program, costs: Costs, lanes: int) -> Bounds:
        if lanes < 1:
            raise ParNetError(f"{lanes} lanes: there must be at least 1")
        work = sum(map(costs.seconds, costs.launches(program.operations)))
        ends = {INPUT: 0.0}
        steps: dict[int, float] = {}
        for op in program.operations:
            alone = costs.seconds([op])
            ends[op.name] = alone + max(ends[name] for name in op.inputs)
            steps[op.level] = max(steps.get(op.level, 0.0), alone)
        return cls(work, max(ends.values()), sum(steps.values()), lanes)

    @property
    def lower(self) -> float:
        """No placement on so many lanes is faster."""
        return max(self.work / self.lanes, self.span)

    @property
    def upper(self) -> float:
        """Some assignment is at least as fast, were transfers free."""
        return self.work / self.lanes + self.steps


@dataclass(frozen=True)
class Schedule:
    """What a placement is predicted to do. runs and transfers are in order of their end."""

    program: Program
    placement: Placement
    runs: tuple[Run, ...]
    transfers: tuple[Sent, ...]
    bounds: Bounds

    @cached_property
    def makespan(self) -> float:
        """Seconds from the picture on the coordinator to all answers, mostly the logits, on the coordinator."""
        return self.critical_path[-1].end

    def lane(self, lane: int) -> list[Run]:
        """What a lane runs, in order."""
        return [run for run in self.runs if run.lane == lane]

    def idle(self, lane: int) -> float:
        """Seconds in which a lane computes nothing."""
        return self.makespan - sum(run.end - run.start for run in self.lane(lane))

    @property
    def speed_up(self) -> float:
        """Times faster than one lane of the same kind."""
        return self.bounds.work / self.makespan

    @cached_property
    def critical_path(self) -> tuple[Run | Sent, ...]:
        """What the last of the answers waited for, from the start: each item starts when the one before ends."""
        return tuple(reversed(list(self._back())))

    def _back(self) -> Iterator[Run | Sent]:
        coordinator = self.placement.coordinator
        there = [self._arrival(n, coordinator) or self._made(n, coordinator) for n in self.program.answers.values()]
        item: Run | Sent | None = max((one for one in there if one), key=lambda one: one.end)
        while item:
            yield item
            item = self._blocker(item)

    def _blocker(self, item: Run | Sent) -> Run | Sent | None:
        """Of all that had to end before an item could start, the one that ended last; None at the start."""
        if isinstance(item, Sent):
            source = item.transfer.source
            if item.start > item.ready:
                return next(s for s in self._sent_by(source) if s.end == item.start and s.start < item.start)
            return self._made(item.transfer.feature, source)
        inputs = dict.fromkeys(name for op in item.operations for name in self.program.by_name[op].inputs)
        # those that come first on the lane: one whose work is lost in the sum of seconds ends when it starts
        before: list[Run | Sent] = list(takewhile(lambda run: run is not item, self.lane(item.lane)))
        before += [arrival for name in inputs if (arrival := self._arrival(name, item.lane))]
        return max(before, key=lambda other: other.end, default=None)

    def _sent_by(self, lane: int) -> list[Sent]:
        return [s for s in self.transfers if s.transfer.source == lane]

    def _arrival(self, feature: str, lane: int) -> Sent | None:
        return next((s for s in self.transfers if (s.transfer.feature, s.transfer.target) == (feature, lane)), None)

    def _made(self, feature: str, lane: int) -> Run | None:
        return next((run for run in self.lane(lane) if feature in run.operations), None)


def schedule(program: Program, placement: Placement, costs: Costs, processors: int | None = None) -> Schedule:
    """What a placement is predicted to do.

    processors: where lanes share fewer of them, running operations slow down evenly. Raises ParNetError for a
    placement that does not fit the program, and for numbers that mean nothing.
    """
    placement.check(program)
    if processors is not None and processors < 1:
        raise ParNetError(f"{processors} processors: there must be at least 1")
    runs, sent = _Clock(program, placement, costs, processors).play()
    return Schedule(program, placement, tuple(runs), tuple(sent), Bounds.of(program, costs, placement.lanes))


@dataclass
class _Activity:
    """Something under way: seconds of it left, were it not slowed down."""

    item: tuple[Operation, ...] | Transfer
    start: float
    left: float


class _Clock:
    """The state of all lanes and ports at one moment."""

    def __init__(self, program: Program, placement: Placement, costs: Costs, processors: int | None) -> None:
        self.costs, self.processors, self.now = costs, processors, 0.0
        self.launches = [
            costs.launches(op for op in program.operations if lane in placement.where[op.name])
            for lane in range(placement.lanes)
        ]
        self.transfers = placement.transfers(program)
        self.held: dict[tuple[str, int], float] = {}  # (feature, lane): since when
        self.queues: list[list[Transfer]] = [[] for _ in range(placement.lanes)]
        self.lanes: dict[int, _Activity] = {}
        self.ports: dict[int, _Activity] = {}
        self.runs: list[Run] = []
        self.sent: list[Sent] = []
        self._have(INPUT, placement.coordinator)

    def play(self) -> tuple[list[Run], list[Sent]]:
        """From event to event, until nothing is left to do."""
        while self._start():
            share = min(1.0, self.processors / len(self.lanes)) if self.processors and self.lanes else 1.0
            step = min([a.left / share for a in self.lanes.values()] + [a.left for a in self.ports.values()])
            self.now += step
            # what ends is decided by the same comparison that chose the step: no tolerance is needed
            computed = [lane for lane, a in self.lanes.items() if a.left / share <= step]
            arrived = [lane for lane, a in self.ports.items() if a.left <= step]
            for activity in self.lanes.values():
                activity.left -= step * share
            for activity in self.ports.values():
                activity.left -= step
            for lane in computed:
                self._finish_run(lane, self.lanes.pop(lane))
            for lane in arrived:
                self._finish_transfer(self.ports.pop(lane))
        assert not any(self.launches) and not any(self.queues), "a checked placement runs to its end"
        return self.runs, self.sent

    def _start(self) -> bool:
        """Start all that can; whether anything is under way."""
        for lane, waiting in enumerate(self.launches):
            inputs = {name for op in waiting[0] for name in op.inputs} if waiting else set()
            if waiting and lane not in self.lanes and all((name, lane) in self.held for name in inputs):
                launch = waiting.pop(0)
                self.lanes[lane] = _Activity(launch, self.now, self.costs.seconds(launch))
        for lane, queue in enumerate(self.queues):
            if queue and lane not in self.ports:
                transfer = queue.pop(0)
                self.ports[lane] = _Activity(transfer, self.now, self.costs.transfer[transfer.feature])
        return bool(self.lanes or self.ports)

    def _finish_run(self, lane: int, activity: _Activity) -> None:
        assert isinstance(activity.item, tuple)
        names = tuple(op.name for op in activity.item)
        self.runs.append(Run(lane, names, activity.start, self.now))
        for name in names:
            self._have(name, lane)

    def _finish_transfer(self, activity: _Activity) -> None:
        transfer = activity.item
        assert isinstance(transfer, Transfer)
        ready = self.held[transfer.feature, transfer.source]
        self.sent.append(Sent(transfer, ready, activity.start, self.now))
        self.held[transfer.feature, transfer.target] = self.now

    def _have(self, feature: str, lane: int) -> None:
        self.held[feature, lane] = self.now
        self.queues[lane] += [t for t in self.transfers if (t.feature, t.source) == (feature, lane)]
