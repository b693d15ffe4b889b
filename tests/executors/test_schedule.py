"""Lanes of one device: every read comes after its write, in the schedule and in whatever order queues really run."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SMALL, lively, random_placement, relative
from parallel_parnet import Engine, Placement, Program, fold
from parallel_parnet.executors.graph import GraphExecutor
from parallel_parnet.executors.schedule import START, Record, Run, Step, Wait, fork_and_join, sources
from parallel_parnet.executors.streams import StreamsSource
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import INPUT

PROGRAM = fold(lively(SMALL, 6))
CPU = torch.device("cpu")
X = torch.randn(2, 3, 32, 64)
EXPECTED = Engine(PROGRAM, device="cpu", executor="reference")(X)


def races(program: Program, segments: list[Segment], steps: tuple[Step, ...], origin: int) -> list[str]:
    """Reads that nothing orders after a write of what they read, from which steps each lane's queue has seen end."""
    seen: dict[int, set[int]] = {}
    at_event: dict[int, set[int]] = {}
    found = []
    for step in steps:
        known = seen.setdefault(step.lane, set())
        match step:
            case Record(lane, event):
                at_event[event] = known | ({START} if event == START else set())
                known |= at_event[event]
            case Wait(lane, event):
                known |= at_event[event]
            case Run(lane, i):
                assert segments[i].lane == lane
                written = {name for j in known if j != START for name in segments[j].writes}
                written |= {INPUT} if START in known else set()
                found += [f"{i} reads {name}" for name in segments[i].reads if name not in written]
                found += [f"{i} reads {j}" for j in sources(segments)[i] if j not in known]
                known.add(i)
    if not set(range(len(segments))) <= seen[origin]:
        found.append("the origin does not wait for all")
    return found


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_no_placement_races(data: st.DataObject, lanes: int) -> None:
    placement = random_placement(PROGRAM, lanes, data.draw)
    segments = placement.segments(PROGRAM)
    steps = fork_and_join(segments, placement.coordinator)
    assert races(PROGRAM, segments, steps, placement.coordinator) == []
    assert sorted(step.segment for step in steps if isinstance(step, Run)) == list(range(len(segments)))


@pytest.mark.parametrize("lanes", [2, 3])
def test_every_event_of_the_usual_placements_is_needed(lanes: int) -> None:
    placement = Placement.from_streams_per_gpu(PROGRAM, -(-3 // lanes), lanes)
    segments = placement.segments(PROGRAM)
    steps = fork_and_join(segments)
    waits = [step for step in steps if isinstance(step, Wait)]
    assert len(waits) >= 2 * (lanes - 1), "a fork and a join for each other lane"
    for wait in waits:
        assert races(PROGRAM, segments, tuple(step for step in steps if step != wait), 0)


@dataclass
class RandomQueues:
    """Queues whose work is done when the last lane has been handed out, in a random order that the events allow."""

    coordinator: int
    seed: int
    broken: bool = False
    items: list[tuple[int, str, object]] = field(default_factory=list)

    def start(self) -> None:
        self.items.clear()

    def run(self, lane: int, work: Callable[[], None]) -> None:
        self.items.append((lane, "run", work))

    def record(self, lane: int, event: int) -> None:
        self.items.append((lane, "record", event))

    def wait(self, lane: int, event: int) -> None:
        self.items.append((lane, "wait", event))

    def finish(self) -> None:
        draw, reached = random.Random(self.seed), set()
        queues: dict[int, list[tuple[str, object]]] = {}
        for lane, kind, what in self.items:
            queues.setdefault(lane, []).append((kind, what))
        while queues:
            ready = [
                lane for lane, (head, *_) in queues.items() if self.broken or head[0] != "wait" or head[1] in reached
            ]
            lane = draw.choice(ready)
            kind, what = queues[lane].pop(0)
            if kind == "run":
                what()  # type: ignore[operator]
            elif kind == "record":
                reached.add(what)
            if not queues[lane]:
                del queues[lane]


def run_in_random_order(placement: Placement, seed: int, broken: bool = False) -> torch.Tensor:
    queues = RandomQueues(placement.coordinator, seed, broken)
    made = StreamsSource(PROGRAM, placement, CPU, torch.float32, queues).make(X.shape)
    made.picture.copy_(X)
    with torch.inference_mode():
        made.launch()
        queues.finish()
    return made.logits


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 2**31))
def test_any_order_that_the_events_allow_gives_the_answer(data: st.DataObject, lanes: int, seed: int) -> None:
    placement = random_placement(PROGRAM, lanes, data.draw)
    assert relative(run_in_random_order(placement, seed), EXPECTED) < 1e-5


def test_without_events_some_order_fails() -> None:
    """The test above would see a missing event."""
    placement = Placement.from_streams_per_gpu(PROGRAM, 1, 3)

    def fails(seed: int) -> bool:
        try:
            return relative(run_in_random_order(placement, seed, broken=True), EXPECTED) > 1e-5
        except KeyError:  # a feature that nobody has written
            return True

    assert any(fails(seed) for seed in range(20))


def test_in_a_graph() -> None:
    """Forked, joined and replayed, with queues that run in order."""

    class InOrder(RandomQueues):
        def run(self, lane: int, work: Callable[[], None]) -> None:
            work()

    source = StreamsSource(PROGRAM, Placement.from_streams_per_gpu(PROGRAM, 1, 3), CPU, torch.float32, InOrder(0, 0))
    executor = GraphExecutor("cuda_streams", source, capture=lambda made: made.launch)
    assert relative(executor(X), EXPECTED) < 1e-5
    assert [len(lane.spans) for lane in executor.profile(X)] == [11, 8, 9]
