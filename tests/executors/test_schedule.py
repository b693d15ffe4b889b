"""Lanes of one device: every read comes after its write, in the schedule and in whatever order queues really run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_parnet import Engine, Placement, Program, fold
from parallel_parnet.executors import local
from parallel_parnet.executors.graph import GraphExecutor
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.executors.queues import CudaQueues, Queues, are_peers
from parallel_parnet.executors.schedule import START, Record, RunSegment, Step, Wait, fork_and_join, sources
from parallel_parnet.executors.torch_backend import TorchBackend
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import INPUT
from small import OPTIONAL, SMALL, lively, relative
from standins import RandomQueues, Streams, graph
from ungated import random_placement

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
            case RunSegment(lane, i):
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
    assert sorted(step.segment for step in steps if isinstance(step, RunSegment)) == list(range(len(segments)))


@pytest.mark.parametrize("lanes", [2, 3])
def test_every_event_of_the_usual_placements_is_needed(lanes: int) -> None:
    placement = Placement.by_streams(PROGRAM, lanes)
    segments = placement.segments(PROGRAM)
    steps = fork_and_join(segments)
    waits = [step for step in steps if isinstance(step, Wait)]
    assert len(waits) >= 2 * (lanes - 1), "a fork and a join for each other lane"
    for wait in waits:
        assert races(PROGRAM, segments, tuple(step for step in steps if step != wait), 0)


def lanes(placement: Placement, queues: Queues | None = None, backend: str = "eager") -> LocalExecutor:
    devices = [CPU] * placement.lanes
    made = TorchBackend(backend, PROGRAM, placement.segments(PROGRAM), devices, torch.float32)
    return LocalExecutor(placement, devices, made, queues)


@settings(max_examples=15, deadline=None)
@given(st.data(), st.integers(1, 4), st.integers(0, 2**31))
def test_any_order_that_the_events_allow_gives_the_answer(data: st.DataObject, lanes_: int, seed: int) -> None:
    placement = random_placement(PROGRAM, lanes_, data.draw)
    assert relative(lanes(placement, RandomQueues(seed))(X), EXPECTED) < 1e-5


def test_without_events_some_order_fails() -> None:
    """The test above would see a missing event."""
    placement = Placement.by_streams(PROGRAM, 3)

    def fails(seed: int) -> bool:
        try:
            return relative(lanes(placement, RandomQueues(seed, broken=True))(X), EXPECTED) > 1e-5
        except (KeyError, IndexError):  # a feature that nobody has written
            return True

    assert any(fails(seed) for seed in range(20))


@pytest.mark.parametrize("backend", ["eager", *(name for name in OPTIONAL if name == "native")])
def test_several_devices(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another device reads is copied there once, in the queues of both; a profile waits for each lane's own."""
    placement = Placement.by_streams(PROGRAM, 3)
    devices = [torch.device("cpu", lane) for lane in range(3)]  # whose tensors are all torch's "cpu"
    made = TorchBackend(backend, PROGRAM, placement.segments(PROGRAM), devices, torch.float32)
    between: list[tuple[int, int]] = []

    class Watched(RandomQueues):
        def between(self, source: int, target: int) -> AbstractContextManager[object]:
            between.append((source, target))
            return nullcontext()

    executor = LocalExecutor(placement, devices, made, Watched(0), peers=lambda writer, reader: True)
    for _ in range(2):
        assert relative(executor(X), EXPECTED) < 1e-5
    crossing = [(t.source, t.target) for t in placement.transfers(PROGRAM)]
    assert sorted(between) == sorted(2 * crossing), "torch's operations write where they like"
    assert len(executor.kept(X.shape)._copies) == len(crossing), "a place for each device"
    waited: list[torch.device] = []
    monkeypatch.setattr(local, "synchroniser", lambda device: lambda: waited.append(device))
    spans = [len(lane.spans) for lane in executor.profile(X)]
    assert [waited.count(device) for device in devices] == spans and all(spans)


def test_features_are_written_where_the_device_lets_them() -> None:
    """And copied where it does not, as all that is read in several places."""
    placement = Placement.by_streams(PROGRAM, 3)
    devices = [torch.device("cpu", lane) for lane in range(3)]
    made = TorchBackend("eager", PROGRAM, placement.segments(PROGRAM), devices, torch.float32)
    made.in_place = True  # as Triton's kernels are
    for reached in ({1}, {1, 2}, set()):
        executor = LocalExecutor(
            placement, devices, made, peers=lambda writer, reader, reached=reached: writer.index in reached
        )
        homes = {executor.maker(writer).index for _, writer in executor.homes}
        assert homes == reached and set(executor.homes.values()) <= {devices[0]}


def test_an_answer_is_not_written_where_another_device_reads_it() -> None:
    """All but the stem and stream 0, which are the coordinator's, run on the other device."""
    program = fold(lively(SMALL, 6), outputs=("streams.0", "fused"))
    placement = Placement(2, {op.name: (int(op.label not in ("stem", "stream 0")),) for op in program.operations})
    devices = [torch.device("cpu", lane) for lane in range(2)]
    made = TorchBackend("eager", program, placement.segments(program), devices, torch.float32)
    made.in_place = True
    executor = LocalExecutor(placement, devices, made, peers=lambda writer, reader: True)
    homes = {name: device.index for (name, _), device in executor.homes.items()}
    assert program.answers["streams.0"] not in homes and homes[program.answers["fused"]] == 0


def test_in_a_graph() -> None:
    """Forked, joined and replayed; a profile is of the pass and not of the graph."""
    executor = GraphExecutor("cuda_streams", lanes(Placement.by_streams(PROGRAM, 3), RandomQueues(1)), graph)
    for x in (X, X.flip(0), 2 * X):
        assert relative(executor(x), Engine(PROGRAM, device="cpu", executor="reference")(x)) < 1e-5
    assert [len(lane.spans) for lane in executor.profile(X)] == [11, 8, 9]


def test_lanes_are_cuda_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator's the current one of its GPU, which a capture holds; a copy lies in those of both ends."""
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    streams = Streams(monkeypatch)
    queues = CudaQueues([first, second], 1, [START, 3])
    queues.start()
    seen: list[list[str]] = []
    for lane in (0, 1):
        queues.run(lane, lambda: seen.append([*streams.inside]))
    with queues.between(1, 0):
        seen.append([*streams.inside])
    assert seen == [["A"], ["current of cuda:1"], ["current of cuda:1", "A"]] and not streams.inside
    queues.record(1, START)
    queues.record(0, 3)
    for lane, event in ((0, START), (1, 3)):
        queues.wait(lane, event)
    assert streams.said == ["A waits for an event of current of cuda:1", "current of cuda:1 waits for an event of A"]


@pytest.mark.parametrize("can", [True, False])
def test_peers_are_asked_and_switched_on(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, reader, asked, copied = torch.device("cuda", 0), torch.device("cuda", 1), [], []

    def empty(size: int, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        return SimpleNamespace(device=device, copy_=lambda other: copied.append((other.device, device)))

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *devices: asked.append(devices) or can)
    monkeypatch.setattr(torch, "empty", empty)
    assert are_peers(writer, reader) == can
    assert asked == [(writer, reader)] and copied == [(writer, reader)] * can
