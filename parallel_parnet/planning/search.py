"""The fastest placement on so many lanes, exactly: dynamic programming over the levels of the program.

The space: every operation on any lane, and stem operations on several at once, the lowest of which sends. What the
future needs to know of lanes that have run some levels is when they, their ports and their latest features are ready.
Nothing ever starts later because something else ended earlier, so of two states with the same lanes to come, one that
is nowhere later replaces the other. States whose lower bound exceeds a limit are dropped, and the limit grows until a
placement is found below it. Only sums and comparisons of the given numbers, in a fixed order: the same costs give the
same placement everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from ..errors import ParNetError
from ..program.placement import Placement
from ..program.program import INPUT, Operation, Program
from .costs import Costs
from .planner import Bounds, Schedule, schedule

MAX_LANES = 4  # states multiply with every lane: ParNet takes about a second on 3 lanes, and ten on 4
WIDER = 1.15  # factor by which the limit grows

Lanes = tuple[int, ...]
Kind = tuple[int, ...]


@dataclass(frozen=True)
class Plans:
    """best: the fastest schedule, of these the one with the fewest transfers.

    runner_up: the fastest of another kind: one in which other streams end together on a lane, or on the coordinator's.
    None where there is no other kind.
    """

    best: Schedule
    runner_up: Schedule | None


def search(program: Program, costs: Costs, lanes: int, exactly: bool = False, runner_up: bool = True) -> Plans:
    """Find the fastest placement on at most, or exactly, so many lanes, lane 0 being the coordinator.

    The coordinator counts as used even where it only holds picture and answer. Lanes compute side by side.
    Raises ParNetError for a number of lanes that cannot be used or searched.
    """
    if lanes < 1:
        raise ParNetError(f"{lanes} lanes: there must be at least 1")
    if lanes > MAX_LANES:
        raise ParNetError(f"{lanes} lanes: placements are searched for at most {MAX_LANES}")
    space = _Space(program, costs, lanes)
    first = space.fastest(exactly, ())
    if first is None:
        raise ParNetError(f"no placement of {len(program.operations)} operations uses exactly {lanes} lanes")
    second = space.fastest(exactly, {space.kind(first)}) if runner_up else None

    def result(state: _State) -> Schedule:
        return schedule(program, Placement(state.used, state.where), costs)

    return Plans(result(first), result(second) if second else None)


@dataclass(frozen=True)
class _State:
    """Lanes that have run all levels up to one.

    where: lanes of the operations decided so far. free, port: seconds from which each lane, and its way out, is idle.
    made: when the level's features were ready, by feature and lane. ready: when the inputs of operations that are
    decided and not yet run have arrived, by operation and lane. owed: seconds for which the lane takes them in, by the
    same. answered: when the coordinator had the last of the answers from below the level. used: lanes touched, which
    are the first ones.
    """

    where: dict[str, Lanes]
    free: tuple[float, ...]
    port: tuple[float, ...]
    made: dict[tuple[str, int], float]
    ready: dict[tuple[str, int], float]
    owed: dict[tuple[str, int], float]
    answered: float
    used: int
    transfers: int

    @property
    def times(self) -> tuple[float, ...]:
        """All that must not be larger in a state that replaces this one."""
        arrivals = *self.made.values(), *self.ready.values()
        return (*self.free, *self.port, *arrivals, *self.owed.values(), self.answered, self.transfers)


class _Space:
    """The states of a program's levels on so many lanes."""

    def __init__(self, program: Program, costs: Costs, lanes: int) -> None:
        self.program, self.costs, self.lanes = program, costs, lanes
        self.answers = {*program.answers.values()}
        self.levels = [[op for op in program.operations if op.level == level] for level in range(program.depth + 1)]
        self.readers = {
            name: [op for op in program.operations if name in op.inputs] for name in (INPUT, *program.by_name)
        }
        self.ends = [name for name, op in program.by_name.items() if op.stage == "stream" and self._leaves(op)]
        self.tail = dict.fromkeys(self.readers, 0.0)  # seconds that must follow a feature
        for op in reversed(program.operations):
            for name in op.inputs:
                self.tail[name] = max(self.tail[name], costs.seconds([op]) + self.tail[op.name])
        work = [sum(map(costs.seconds, costs.launches(ops))) for ops in self.levels]
        self.left = [sum(work[level + 1 :]) for level in range(len(work))]  # seconds of work above each level

    def _leaves(self, op: Operation) -> bool:
        return all(reader.stream != op.stream for reader in self.readers[op.name])

    def kind(self, state: _State) -> Kind:
        """Tell which streams end together and which on the coordinator: lanes renumbered as they first appear."""
        number = {0: 0}
        return tuple(number.setdefault(state.where[name][0], len(number)) for name in self.ends)

    def fastest(self, exactly: bool, without: Collection[Kind]) -> _State | None:
        """Find the best final state that is of none of these kinds."""
        limit = Bounds.of(self.program, self.costs, self.lanes).lower
        worst = sum(map(self.costs.seconds, [[op] for op in self.program.operations])) * self.lanes
        worst += sum((*self.costs.transfer.values(), *self.costs.taking.values())) * self.lanes
        while limit < worst * WIDER:
            limit *= WIDER
            found = self._below(limit, without)
            if exactly:
                found = [state for state in found if state.used == self.lanes]
            if found:
                return min(found, key=lambda state: (self._end(state), state.transfers))
        return None

    def _below(self, limit: float, without: Collection[Kind]) -> list[_State]:
        """Find the best final states of each kind that end by the limit."""
        nothing = (0.0,) * self.lanes
        states = [_State({}, nothing, nothing, {(INPUT, 0): 0.0}, {}, {}, 0.0, 1, 0)]
        for level in range(1, self.program.depth + 1):
            groups: dict[tuple, list[_State]] = {}
            for state in states:
                for child in self._next(state, level):
                    if self._bound(child, level) <= limit:
                        # where kinds are forbidden, the lanes on which streams ended are part of what lies ahead
                        ends = tuple(child.where.get(name) for name in self.ends) if without else ()
                        groups.setdefault((child.used, *child.made, *child.ready, ends), []).append(child)
            states = [state for group in groups.values() for state in _best(group)]
            if without:
                states = [s for s in states if any(e not in s.where for e in self.ends) or self.kind(s) not in without]
        return [state for state in states if self._end(state) <= limit]

    def _next(self, state: _State, level: int) -> Iterator[_State]:
        """Run a level, wherever the readers of the features below it may go."""
        features = [op.name for op in self.levels[level - 1]] or [INPUT]
        new = [op for op in self.program.operations if {*op.inputs} & {*features} and op.name not in state.where]
        for choice, used in self._choices(new, state.used):
            where = {**state.where, **choice}
            if all(self._useful(name, where) for name in features):
                yield self._run(self._sent(replace(state, where=where, used=used), features), level)

    def _choices(self, operations: list[Operation], used: int) -> Iterator[tuple[dict[str, Lanes], int]]:
        """Lanes for each operation. Lanes that have done nothing are alike: they are taken in order."""
        if not operations:
            yield {}, used
            return
        op, *others = operations
        for count in range(1, self.lanes + 1 if op.stage == "stem" else 2):
            for lanes in combinations(range(self.lanes), count):
                fresh = [lane for lane in lanes if lane >= used]
                if fresh == list(range(used, used + len(fresh))):
                    for choice, total in self._choices(others, used + len(fresh)):
                        yield {op.name: lanes, **choice}, total

    def _useful(self, feature: str, where: dict[str, Lanes]) -> bool:
        """Whether each lane that computes a feature, where they are several, reads it too."""
        lanes = where.get(feature, (0,))
        return len(lanes) == 1 or {*lanes} <= {lane for op in self.readers[feature] for lane in where[op.name]}

    def _sent(self, state: _State, features: Iterable[str]) -> _State:
        """The state once the features of a level, whose readers are decided, are with all of them."""
        free, port, ready, owed = list(state.free), list(state.port), dict(state.ready), dict(state.owed)
        ports = free if self.costs.by_lanes else port
        answered, transfers = state.answered, state.transfers
        for name in features:
            held = {lane: at for (feature, lane), at in state.made.items() if feature == name}
            source, answers = min(held), name in self.answers
            reads = [(op.name, lane) for op in self.readers[name] for lane in state.where[op.name]]
            for lane in [*(lane for _, lane in reads), *[0] * answers]:
                if lane not in held:
                    held[lane] = ports[source] = max(ports[source], held[source]) + self.costs.transfer[name]
                    transfers += 1
            for op, lane in reads:
                ready[op, lane] = max(ready.get((op, lane), 0.0), held[lane])
                owed.setdefault((op, lane), 0.0)
            for lane in held.keys() - {*state.where.get(name, (0,))}:
                first = min((op for op, at in reads if at == lane), key=self._level, default=None)
                if first:
                    owed[first, lane] += self.costs.taking.get(name, 0.0)
            answered = max(answered, held[0]) if answers else answered
        return replace(
            state, free=tuple(free), port=tuple(port), ready=ready, owed=owed, answered=answered, transfers=transfers
        )

    def _level(self, operation: str) -> int:
        return self.program.by_name[operation].level

    def _run(self, state: _State, level: int) -> _State:
        """The state after a level's launches on every lane."""
        free, ready, owed, operations = list(state.free), dict(state.ready), dict(state.owed), self.levels[level]
        for lane in range(state.used):
            for launch in self.costs.launches(op for op in operations if lane in state.where[op.name]):
                start = max(free[lane], *(ready.pop((op.name, lane)) for op in launch))
                taken = sum(owed.pop((op.name, lane)) for op in launch)
                free[lane] = start + taken + self.costs.seconds(launch)
        made = {(op.name, lane): free[lane] for op in operations for lane in state.where[op.name]}
        ready, owed = dict(sorted(ready.items())), dict(sorted(owed.items()))
        now = min([*made.values(), *ready.values()])  # nothing more starts before: idling until then changes nothing
        idle = [tuple(max(at, now) for at in times) for times in (free, state.port)]
        return replace(state, free=idle[0], port=idle[1], made=made, ready=ready, owed=owed)

    def _bound(self, state: _State, level: int) -> float:
        """No placement that goes on from a state is faster."""
        first: dict[str, float] = {}
        for (name, _), at in state.made.items():
            first[name] = min(at, first.get(name, math.inf))
        paths = [state.answered, *(at + self.tail[name] for name, at in first.items())]
        for (name, lane), at in state.ready.items():
            paths.append(max(at, state.free[lane]) + self.costs.seconds([self.program.by_name[name]]) + self.tail[name])
        return max(*paths, (sum(state.free) + self.left[level]) / self.lanes)

    def _end(self, state: _State) -> float:
        """Makespan of a final state."""
        return self._sent(state, [op.name for op in self.levels[-1]]).answered


def _best(states: list[_State]) -> list[_State]:
    """Drop the states that another one replaces."""
    kept: list[tuple[tuple[float, ...], _State]] = []
    for times, state in sorted(((state.times, state) for state in states), key=lambda pair: pair[0]):
        if not any(all(a <= b for a, b in zip(other, times, strict=True)) for other, _ in kept):
            kept.append((times, state))
    return [state for _, state in kept]
