"""Lanes of several ranks whose passes are captured with their transfers: threads stand in for ranks, a stand-in graph
repeats what was captured, and symmetric memory is memory that the threads share."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from parallel_parnet import Engine, LaneError, Placement, fold
from parallel_parnet.commands.infer import links
from parallel_parnet.executors import lane as lanes
from parallel_parnet.executors import local
from parallel_parnet.executors.binding import Backend
from parallel_parnet.executors.graph import GraphExecutor
from parallel_parnet.executors.lane import Lane, LaneBackends, Request
from parallel_parnet.executors.shapes import MAX_SHAPES, Shapes
from parallel_parnet.executors.torch_backend import TorchBackend
from parallel_parnet.program.placement import Segment
from parallel_parnet.transport import symmetric, torch_distributed
from parallel_parnet.transport.base import IN_FLIGHT
from parallel_parnet.transport.health import Watched
from small import SMALL, lively, relative
from standins import enqueue, graph

CPU = torch.device("cpu")
PROGRAM = fold(lively(SMALL, 9))
PATIENCE_S = 20


class Peers:
    """The symmetric memory of so many ranks, and its signals, as torch's handle gives them to one of these."""

    def __init__(self, world: int) -> None:
        self.world, self.buffers = world, [torch.empty(0, dtype=torch.uint8, device=CPU)] * world
        self.raised: set[tuple[int, int, int]] = set()  # at which rank, by which rank, channel
        self.changed, self.met = threading.Condition(), threading.Barrier(world, timeout=PATIENCE_S)

    def signal(self, key: tuple[int, int, int], before: bool) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: (key in self.raised) == before, PATIENCE_S):
                raise RuntimeError(f"signal {key} stayed {'down' if before else 'up'}")
            (self.raised.remove if before else self.raised.add)(key)
            self.changed.notify_all()


class Handle:
    """What `symm_mem.rendezvous` gives a rank."""

    def __init__(self, peers: Peers, rank: int) -> None:
        self.peers, self.rank = peers, rank

    def get_buffer(self, rank: int, shape: Sequence[int], dtype: torch.dtype, offset: int) -> Tensor:
        bytes_ = torch.Size(shape).numel() * dtype.itemsize
        start = offset * dtype.itemsize
        return self.peers.buffers[rank][start : start + bytes_].view(dtype).view(*shape)

    def put_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
        assert timeout_ms == 1000 * PATIENCE_S
        enqueue(lambda: self.peers.signal((rank, self.rank, channel), before=False))

    def wait_signal(self, rank: int, channel: int, timeout_ms: int) -> None:
        assert timeout_ms == 1000 * PATIENCE_S
        enqueue(lambda: self.peers.signal((self.rank, rank, channel), before=True))


class Symmetric(symmetric.Symmetric):
    """torch's symmetric memory, on the CPU, between threads."""

    kind = "cpu"

    def __init__(self, routes: Sequence, peers: Peers, rank: int) -> None:
        monitor = SimpleNamespace(rank=rank, timeout_s=PATIENCE_S, world=peers.world, has_lost=False, operation="")
        self.monitor, self.routes, self.peers = monitor, tuple(routes), peers  # type: ignore[assignment]
        self._capacities = [0] * len(self.routes)
        self._sending = self._waiting = [Watched(monitor, "", None) for _ in routes]  # type: ignore[arg-type]


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> threading.local:
    """What each rank's thread has of its own: its transport, as the process of a rank has its own group."""
    own = threading.local()

    def gather(numbers: list[int]) -> None:
        assert own.waited, "for what the GPU was given before: it may write into the old buffer"
        own.waited = False
        own.transport.peers.met.wait()

    monkeypatch.setattr(symmetric, "gather", gather)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(own, "waited", True))
    monkeypatch.setattr(symmetric.dist, "group", SimpleNamespace(WORLD="all"))

    def empty(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        peers, rank = own.transport.peers, own.transport.lane
        peers.raised -= {key for key in peers.raised if key[0] == rank}  # a buffer comes with signals of its own
        peers.buffers[rank] = torch.full((size,), 0x7F, dtype=dtype, device=device)
        return peers.buffers[rank]

    def rendezvous(buffer: Tensor, group: object) -> Handle:
        own.transport.peers.met.wait()
        return Handle(own.transport.peers, own.transport.lane)

    monkeypatch.setattr(symmetric.symm_mem, "empty", empty)
    monkeypatch.setattr(symmetric.symm_mem, "rendezvous", rendezvous)
    return own


def eager(placement: Placement) -> Callable[[Sequence[Segment], bool], Backend]:
    def make(segments: Sequence[Segment], raw: bool) -> Backend:
        return TorchBackend("eager", PROGRAM, segments, [CPU] * placement.lanes, torch.float32)

    return make


def one_lane(transport: object, captured: bool = True, device: torch.device = CPU) -> Lane:
    """The only lane of PROGRAM, which sends nothing."""
    single = Placement.single(PROGRAM)
    backends = LaneBackends(PROGRAM, single, 0, eager(single))
    return Lane(PROGRAM, single, 0, device, backends, [], transport, captured, graph)  # type: ignore[arg-type]


def run_ranks(
    placement: Placement,
    backend: Callable[[Sequence[Segment], bool], Backend],
    pictures: list[Tensor],
    own: threading.local,
    program=PROGRAM,
) -> list[Tensor]:
    """Logits of each picture, of which two are always under way."""
    peers, transfers = Peers(placement.lanes), placement.transfers(program)

    def rank(number: int) -> list[Tensor]:
        own.transport = Symmetric(transfers, peers, number)
        backends = LaneBackends(program, placement, number, backend)
        lane = Lane(program, placement, number, CPU, backends, transfers, own.transport, True, graph)
        pending, answers, known = [], [], set()
        for x in pictures:
            n, _, h, w = x.shape
            key = n, h, w, int(x.dtype == torch.uint8)
            if key not in lane:
                answers += [lane.finish(request) for request in pending]
                pending = []
            memory = peers.buffers[number]
            request = lane.prepare(key, None, stepwise=False)
            if peers.buffers[number] is not memory:  # and so the old one is gone, with all that was bound to it
                assert key in lane and not any(earlier in lane for earlier in known - {key})
            known.add(key)
            if lane.coordinates:
                lane.give(request, x, lasting=True)
            pending.append(request)
            if len(pending) == IN_FLIGHT:
                answers.append(lane.finish(pending.pop(0)))
        return [answer for answer in (*answers, *map(lane.finish, pending)) if answer is not None]

    with ThreadPoolExecutor(placement.lanes) as pool:
        found = list(pool.map(rank, range(placement.lanes)))
    assert peers.raised and all(channel % 2 == symmetric.FREE for *_, channel in peers.raised), "all was read"
    return found[placement.coordinator]


def wandering(lanes: int) -> Placement:
    """Fusion wanders over the lanes, the last has the answer, and the stem is sent."""
    where = dict(Placement.by_streams(PROGRAM, lanes).where)
    for op in PROGRAM.operations:
        if op.stage == "stem":
            where[op.name] = (0,)
        elif op.stage in ("fusion", "head"):
            where[op.name] = (op.level % lanes,)
    return Placement(lanes, where, coordinator=lanes - 1)


@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.parametrize("usual", [True, False])
def test_passes_are_replayed_with_their_transfers(lanes: int, usual: bool, threads: threading.local) -> None:
    """A graph for each of two slots: a count that a capture froze, or one slot for both, would mix answers up."""
    placement = Placement.by_streams(PROGRAM, lanes) if usual else wandering(lanes)
    torch.manual_seed(lanes)
    small, large = (
        [torch.randn(n, 3, side, side, device=CPU) for _ in range(count)] for n, side, count in ((1, 32, 7), (2, 64, 3))
    )
    pictures = [*small, *large, *small[:3]]
    reference = Engine(PROGRAM, Placement.single(PROGRAM), CPU, executor="reference")
    answers = run_ranks(placement, eager(placement), pictures, threads)
    assert len(answers) == len(pictures)
    for x, answer in zip(pictures, answers, strict=True):
        assert relative(answer, reference(x)) < 1e-5


def test_links_of_memory_that_gpus_share_are_measured(
    threads: threading.local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And GPUs that may not read each other's are told of, not the end of it."""
    monkeypatch.setattr(links, "gather", lambda numbers: [numbers])
    monkeypatch.setattr(links, "WARM_UP", 1)
    peers, refusing = Peers(2), Peers(2)
    share = symmetric.symm_mem.rendezvous

    def rendezvous(buffer: Tensor, group: object) -> object:
        handle = share(buffer, group)
        if handle.peers is refusing:  # type: ignore[attr-defined]
            raise RuntimeError("CUDA: no access\nfrom here")
        return handle

    monkeypatch.setattr(symmetric.symm_mem, "rendezvous", rendezvous)

    def rank(number: int) -> tuple[dict[str, dict[int, list[float]]], list[str]]:
        ready, lines = {}, []
        for name, memory in (("symmetric", peers), ("refused", refusing)):
            threads.transport = Symmetric(links.ROUTES, memory, number)
            found = links.connected({name: threads.transport}, 4096, CPU)
            ready |= found[0]
            lines += found[1]
        return links.transfer_times(ready, [64, 4096], 2, CPU), lines

    with ThreadPoolExecutor(2) as pool:
        for times, lines in pool.map(rank, range(2)):
            assert {name: list(map(len, rows.values())) for name, rows in times.items()} == {"symmetric": [2, 2]}
            assert lines == ["refused: left out, CUDA: no access"]


class Communicator:
    """Of a route of NCCL, as torch makes it when it is first used: an end's first call waits for the other end's."""

    def __init__(self) -> None:
        self.messages: queue.Queue[Tensor] = queue.Queue()
        self.met, self.used = threading.Barrier(2, timeout=PATIENCE_S / 4), set[int]()

    def use(self, rank: int) -> None:
        if rank not in self.used:
            self.used.add(rank)
            self.met.wait()  # RuntimeError where the other end never comes

    def send(self, tensor: Tensor, rank: int) -> SimpleNamespace:
        self.use(rank)
        enqueue(lambda: self.messages.put(tensor.clone()))
        return SimpleNamespace(wait=lambda: None)

    def receive(self, tensor: Tensor, rank: int) -> SimpleNamespace:
        self.use(rank)
        return SimpleNamespace(wait=lambda: enqueue(lambda: tensor.copy_(self.messages.get(timeout=PATIENCE_S))))


class Nccl(torch_distributed.Nccl):
    """NCCL on the CPU, between threads."""

    kind = "cpu"

    def __init__(self, routes: Sequence, communicators: list[Communicator], rank: int, world: int) -> None:
        def explain(reason: str, culprit: int | None) -> LaneError:
            return LaneError(f"{monitor.operation} ({reason})")

        monitor = SimpleNamespace(
            rank=rank, timeout_s=PATIENCE_S, world=world, has_lost=False, operation="", explain=explain
        )
        self.monitor, self.routes, self._connected = monitor, tuple(routes), False  # type: ignore[assignment]
        self._groups = [(communicator, rank) for communicator in communicators]
        self._sending = self._waiting = [Watched(monitor, "", None) for _ in routes]  # type: ignore[arg-type]


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("lanes", [2, 3])
def test_ranks_of_nccl_meet_before_they_receive(lanes: int, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each posts its receives first: the calls that make their communicators would wait for each other in a circle."""
    monkeypatch.setattr(torch_distributed, "dist", SimpleNamespace(
        isend=lambda tensor, target, group: group[0].send(tensor, group[1]),
        irecv=lambda tensor, source, group, tag: group[0].receive(tensor, group[1]),
    ))  # fmt: skip
    placement = Placement.by_streams(PROGRAM, lanes)
    transfers = placement.transfers(PROGRAM)
    made = [Communicator() for _ in range(len(transfers) + 1)]  # and of what goes by gloo
    pictures = [torch.randn(1, 3, 32, 32, device=CPU) for _ in range(3)]

    def rank(number: int) -> list[Tensor | None]:
        nccl = Nccl([*transfers, transfers[0]], made, number, lanes)
        backends = LaneBackends(PROGRAM, placement, number, eager(placement))
        lane = Lane(PROGRAM, placement, number, CPU, backends, transfers, nccl, captured, graph)
        answers = []
        for x in pictures:
            request = lane.prepare((1, 32, 32, 0), None, stepwise=False)
            if lane.coordinates:
                lane.give(request, x, lasting=True)
            answers.append(lane.finish(request))
        return answers

    with ThreadPoolExecutor(lanes) as pool:
        found = list(pool.map(rank, range(lanes)))[placement.coordinator]
    reference = Engine(PROGRAM, Placement.single(PROGRAM), CPU, executor="reference")
    for x, answer in zip(pictures, found, strict=True):
        assert answer is not None and relative(answer, reference(x)) < 1e-5
    assert not made[-1].used, "what goes by gloo needs no communicator"


def test_an_answer_waits_for_the_gpu_and_for_what_was_sent() -> None:
    """Of a GPU that never gets there, as where it waits, in a graph, for what a lost rank will not send, it tells."""

    class Monitor(SimpleNamespace):
        def explain(self, reason: str, culprit: int | None) -> LaneError:
            return LaneError(f"{self.operation} ({reason})")

    done: list[object] = []
    monitor = Monitor(rank=0, timeout_s=PATIENCE_S, has_lost=False, operation="")
    transport = SimpleNamespace(
        monitor=monitor, waiting=lambda action: Watched(monitor, action), in_graph=True,
        reserve=lambda sizes, device: False, finish=lambda work, tag: done.append(tag),
    )  # fmt: skip
    lane = one_lane(transport)

    def given(*reached: bool) -> Request:
        request, there = lane.prepare((1, 32, 32, 0), None, stepwise=False), iter(reached)
        lane.give(request, torch.randn(1, 3, 32, 32), lasting=True)
        query = lambda: (done.append(reached), next(there, reached[-1]))[1]  # noqa: E731
        request.reached, request.sends = SimpleNamespace(query=query), [(None, 7)]  # type: ignore[assignment]
        return request

    assert lane.finish(given(False, True)) is not None
    assert done == [(False, True), (False, True), 7]
    monitor.timeout_s = 0.05
    with pytest.raises(LaneError, match=r"waiting for the GPU \(0\.\d s\)"):
        lane.finish(given(False))
    monitor.timeout_s, monitor.has_lost = 100, True
    with pytest.raises(LaneError, match=r"waiting for the GPU \(0\.0 s\)"):
        lane.finish(given(False))
    there = iter((False, True))
    lane._reached = SimpleNamespace(query=lambda: next(there))  # type: ignore[assignment]
    with pytest.raises(LaneError, match=r"waiting for the GPU \(0\.0 s\)"):
        lane.close()
    lane.close()
    assert (1, 32, 32, 0) not in lane


@pytest.mark.parametrize(("outputs", "alone"), [(("fused",), True), (("streams.0", "fused"), False)])
def test_an_answer_is_not_only_written_where_another_lane_reads_it(outputs: tuple[str, ...], alone: bool) -> None:
    program = fold(lively(SMALL, 9), outputs=outputs)
    placement = Placement(2, {op.name: (int(op.label not in ("stem", "stream 0")),) for op in program.operations})
    transfers = placement.transfers(program)
    backends, transport = LaneBackends(program, placement, 0, eager(placement)), SimpleNamespace(in_graph=False)
    lane = Lane(program, placement, 0, CPU, backends, transfers, transport, False)  # type: ignore[arg-type]
    (tag,) = (tag for tag, transfer in enumerate(transfers) if transfer.feature == "streams.0.3")
    assert lane._is_read_there_alone(tag) == alone


def test_what_a_gpu_reaches_lies_on_the_lanes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one."""
    lane = one_lane(SimpleNamespace(in_graph=True, reserve=lambda *_: False))
    request, recorded = lane.prepare((1, 32, 32, 0), None, stepwise=False), []
    request.slot.replay, lane.device = lambda: None, torch.device("cuda", 1)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream=None: recorded.append(stream))
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    lane.finish(request)
    assert recorded == [lane.device]


def test_of_too_many_shapes_that_goes_which_was_used_least_recently() -> None:
    """And not one that was made first and is asked for all the time."""
    shapes = Shapes[int, int]()
    for key in (*range(MAX_SHAPES), 0, 1, MAX_SHAPES, 0, MAX_SHAPES + 1):
        assert shapes(key, lambda key: key) == key
    assert [key for key in range(MAX_SHAPES + 2) if key in shapes] == [0, 1, *range(4, MAX_SHAPES + 2)]


@pytest.mark.parametrize("captured", [False, True])
def test_nothing_is_dropped_that_a_device_may_use(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of too many shapes, and what goes with its owner: by a lane, and by the executors of one process."""
    waited: list[torch.device] = []
    capturing: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    for module in (local, lanes):
        monkeypatch.setattr(module, "synchroniser", lambda device: lambda: waited.append(device))
    placement = Placement.by_streams(PROGRAM, 2)
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]  # whose tensors are all torch's "cpu"
    made = TorchBackend("eager", PROGRAM, placement.segments(PROGRAM), devices, torch.float32)
    executor = local.LocalExecutor(placement, devices, made, peers=lambda writer, reader: False)
    run = GraphExecutor("cuda_graph", executor).buffers if captured else executor.kept
    lane = one_lane(SimpleNamespace(in_graph=captured, reserve=lambda *_: False), captured, devices[1])
    for n in range(1, MAX_SHAPES + 1):
        run(torch.Size((n, 3, 32, 32)))
        lane.prepare((n, 32, 32, 0), None, stepwise=False)
    assert not waited
    run(torch.Size((1, 3, 32, 64)))
    assert waited == devices
    lane.prepare((1, 32, 64, 0), None, stepwise=False)
    assert waited == [*devices, devices[1]]
    waited.clear()
    del executor, run, made
    assert waited == devices * (2 if captured else 1), "by each that keeps something"
    waited.clear()
    capturing.append(True)
    del lane
    assert not waited, "which would break what this thread captures"
