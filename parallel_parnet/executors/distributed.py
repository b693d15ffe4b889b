"""A lane per rank: each rank runs its segments, sends what others read and receives what it reads."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LaneError, ParNetError
from ..profiling.clocks import Clock, ask, reading
from ..profiling.lanes import from_bytes, to_bytes
from ..profiling.ranges import Ranges
from ..profiling.spans import GATHER, REQUEST, SENDS, Recorder, Spans, send_name, span, wait_name
from ..profiling.traced import traced
from ..program.placement import Placement, Transfer
from ..program.program import INPUT, Program, check_input
from ..settings import with_own_settings
from ..transport import agree, choose, open_as
from ..transport.base import IN_FLIGHT, Inbox, Pending
from .backends import Runner, compile_module, storage_type
from .local import synchroniser
from .segment import SegmentModule
from .shapes import Shapes

STOP, RUN, PROFILE, TRACE, CLOCK = range(5)
HEADER = 4  # int64s: the command, then N, H, W, or the exit status
MAX_FEATURE_BYTES = 1 << 32
CPU = torch.device("cpu")


class _Shape:
    """What a lane keeps for one shape of input: places for what arrives, one set for each request in flight, by tag;
    and compiled segments."""

    def __init__(self, inboxes: list[dict[int, Inbox]]) -> None:
        self.inboxes = inboxes
        self.runners: list[Runner] = []


@dataclass
class _Request:
    """A request that was announced. arriving: by tag. sends: under way, with their tags.

    spans: what marks its work, if anything. eager: operation by operation, each in a span of its own.
    """

    shape: _Shape
    arriving: dict[int, Inbox]
    features: dict[str, Tensor] = field(default_factory=dict)
    sends: list[tuple[Pending | None, int]] = field(default_factory=list)
    spans: Spans | None = None
    eager: bool = False

    def span(self, name: str) -> AbstractContextManager[object]:
        """A span, where there is something to mark."""
        return span(self.spans, name)


class DistributedExecutor:
    """On the coordinator, call it; on every other lane, `serve`.

    The lanes compare their settings first: ParNetError, on all of them, where one differs. transport: one of
    `TRANSPORTS`.
    """

    def __init__(
        self,
        program: Program,
        placement: Placement,
        lane: int,
        transport: str,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        agree(
            {
                "program and weights": program.digest,
                "placement": hashlib.sha256(repr(placement).encode()).hexdigest(),
                "executor": f"{backend} in {dtype} on {device.type}",
                "transport": transport,
                "sources of parallel_parnet": _sources_digest(),
                "torch": torch.__version__,
            }
        )
        self.program, self.placement, self.lane, self.device = program, placement, lane, device
        self.name, self.precision, self.storage = backend, dtype, storage_type(backend, dtype)
        self.transfers = placement.transfers(program)
        others = [lane for lane in range(placement.lanes) if lane != placement.coordinator]
        headers = [Transfer("the next request", placement.coordinator, lane) for lane in others]
        told = [Transfer("spans", lane, placement.coordinator) for lane in others]
        self._header = {lane: len(self.transfers) + i for i, lane in enumerate(others)}
        self._told = {lane: len(self.transfers) + len(headers) + i for i, lane in enumerate(others)}
        self.transport = open_as(choose(transport, device), [*self.transfers, *headers, *told])
        self.modules = [
            SegmentModule(program, s, self.storage, device) for s in placement.segments(program) if s.lane == lane
        ]
        self.ranges = Ranges.of(program)
        self._shapes: Shapes[tuple[int, ...], _Shape] = Shapes(self._make_shape)
        self._begun = 0
        self._pending: deque[tuple[_Request, torch.device]] = deque()

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device. On the coordinator only."""
        return self._request(x_nchw, self.ranges)

    def _request(self, x_nchw: Tensor, spans: Spans | None) -> Tensor:
        self._begin(RUN, x_nchw, spans, alone=True)
        return self._answer()

    def map(self, pictures: Iterable[Tensor]) -> Generator[Tensor]:
        """Logits of each in turn, the next request being announced before the last is answered."""
        try:
            for x_nchw in pictures:
                while self._pending and tuple(x_nchw.shape) not in self._shapes:
                    yield self._answer()  # a new shape comes alone: its compiling is no reason to hold an answer back
                self._begin(RUN, x_nchw, self.ranges)
                if len(self._pending) == IN_FLIGHT:
                    yield self._answer()
            while self._pending:
                yield self._answer()
        finally:
            self._drain()

    def serve(self) -> int:
        """Do this lane's part of every request until the coordinator closes; returns the status it closed with."""
        tag = self._header[self.lane]
        header = self.transport.inbox(tag, (HEADER,), torch.int64, CPU)
        self.transport.post(header, tag)
        while True:
            command, *shape = self._next(header)
            if command == STOP:
                return shape[0]
            if command == CLOCK:
                self._tell(torch.tensor(reading(), dtype=torch.float64, device=CPU))
            elif command == TRACE:
                self._tell_spans(self._traced(lambda spans: self._serve_traced(header, spans)))
            else:
                recorder = self._recorder(command)
                with span(self.ranges, REQUEST):
                    self._finish(self._prepare(command, shape, recorder or self.ranges))
                if recorder:
                    self._tell_spans(recorder)

    def _next(self, header: Inbox) -> list[int]:
        """The next announcement, which is checked."""
        tag = self._header[self.lane]
        command, *shape = self.transport.wait(header, tag, idle=True).tolist()
        header.release()
        if command != STOP:
            self.transport.post(header, tag)
        if command not in (STOP, TRACE, CLOCK):
            self._check_header(command, shape)
        return [command, *shape]

    def _serve_traced(self, header: Inbox, spans: Spans) -> None:
        with span(spans, wait_name(REQUEST)):
            command, *shape = self._next(header)
        if command != RUN:
            raise LaneError(f"rank {self.placement.coordinator} gave up in the middle of its traced requests")
        self._finish(self._prepare(command, shape, spans))

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation in eager mode, transfers included: a recorder of spans for each lane."""
        own = self._recorder(PROFILE)
        assert own is not None
        self._begin(PROFILE, x_nchw, own, alone=True)
        self._answer()
        return self._with_others(own)

    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """Run a few requests as calls run them: a recorder of spans for each lane."""
        for work, tag in self._announce(TRACE, (0, 0, 0)):
            self.transport.finish(work, tag)
        return self._with_others(self._traced(lambda spans: self._request(x_nchw, spans)))

    def clocks(self) -> list[Clock]:
        """Each lane's clock against the coordinator's."""
        lanes = range(self.placement.lanes)
        return [Clock() if lane == self.lane else ask(partial(self._ping, lane)) for lane in lanes]

    def _ping(self, lane: int) -> list[float]:
        tag = self._header[lane]
        self.transport.finish(self.transport.send(_numbers(CLOCK, 0, 0, 0), tag), tag)
        return self._hear(lane, (2,), torch.float64).tolist()

    def _traced(self, request: Callable[[Spans], object]) -> Recorder:
        return traced(request, self.device, synchroniser(self.device), self.ranges)

    def _recorder(self, command: int) -> Recorder | None:
        return Recorder(synchroniser(self.device)) if command == PROFILE else None

    def close(self, status: int = 0) -> None:
        """End the other lanes' `serve`. On the coordinator only."""
        self._drain()
        for work, tag in self._announce(STOP, (status, 0, 0)):
            self.transport.finish(work, tag)

    def _announce(self, command: int, numbers: tuple[int, ...]) -> list[tuple[Pending | None, int]]:
        header = _numbers(command, *numbers)
        return [(self.transport.send(header, tag), tag) for tag in self._header.values()]

    def _check_header(self, command: int, shape: list[int]) -> None:
        """LaneError for an announcement that no coordinator of this program makes."""
        try:
            if command not in (RUN, PROFILE):
                raise ParNetError(f"command {command}")
            if not all(0 < number <= MAX_FEATURE_BYTES for number in shape):
                raise ParNetError(f"shape {shape}")
            check_input(self.program, torch.empty(shape[0], 3, *shape[1:], dtype=torch.float32, device="meta"))
            if max(self._sizes(*shape), default=0) > MAX_FEATURE_BYTES:
                raise ParNetError(f"{shape[0]} pictures of {shape[1]} x {shape[2]} pixels")
        except ParNetError as error:
            raise LaneError(f"refused what rank {self.placement.coordinator} announced: {error}") from None

    @with_own_settings
    def _begin(self, command: int, x_nchw: Tensor, spans: Spans | None, alone: bool = False) -> None:
        """Announce a request to the other lanes, and send the picture. alone: the caller wants its answer next."""
        if alone and self._pending:
            raise ParNetError("a map of this engine is still running: take all its answers, or close it, first")
        n, _, h, w = x_nchw.shape
        sizes = self._sizes(n, h, w)
        if max(sizes, default=0) > MAX_FEATURE_BYTES:
            raise ParNetError(
                f"{n} pictures of {h} x {w} pixels: a feature would take {max(sizes)} bytes; give a smaller batch"
            )
        with span(spans, send_name(REQUEST)):
            announcements = self._announce(command, (n, h, w))
        request = self._prepare(command, (n, h, w), spans)
        request.sends += announcements
        request.features[INPUT] = x_nchw.to(self.device, self.storage, memory_format=torch.channels_last)
        self._send(request, INPUT)
        self._pending.append((request, x_nchw.device))

    def _sizes(self, n: int, h: int, w: int) -> list[int]:
        """Bytes of each transfer of a request."""
        return [math.prod(self.program.shape(t.feature, n, h, w)) * self.storage.itemsize for t in self.transfers]

    def _prepare(self, command: int, shape_nhw: Sequence[int], spans: Spans | None) -> _Request:
        """Be ready for what arrives in a request."""
        n, h, w = shape_nhw
        shape = self._shapes((n, 3, h, w))
        arriving = shape.inboxes[self._begun % IN_FLIGHT]
        self._begun += 1
        for tag, inbox in arriving.items():
            self.transport.post(inbox, tag)
        return _Request(shape, dict(arriving), spans=spans, eager=command == PROFILE)

    @with_own_settings
    def _answer(self) -> Tensor:
        """Finish the oldest request."""
        request, device = self._pending.popleft()
        logits = self._finish(request)
        assert logits is not None, "the coordinator has the logits"
        return logits.to(device)

    def _drain(self) -> None:
        """Finish what nobody asks for any more, since the other lanes are at work on it; not where one is lost."""
        while self._pending and not self.transport.monitor.has_lost:
            self._answer()

    @torch.inference_mode()
    def _finish(self, request: _Request) -> Tensor | None:
        """This lane's part of a request: on the coordinator the logits, fp32."""
        for i, module in enumerate(self.modules):
            awaited = {self.transfers[tag].feature for tag in request.arriving} - request.features.keys()
            gathers = self.lane == self.placement.coordinator and not awaited.isdisjoint(module.segment.reads)
            with span(request.spans if gathers else None, GATHER):
                for name in module.segment.reads:
                    self._receive(request, name)
            reads = tuple(request.features[name] for name in module.segment.reads)
            if request.eager:
                outputs = module.run(reads, request.spans)
            else:
                runners = request.shape.runners
                if len(runners) <= i:
                    runners.append(compile_module(module, self.name, reads, self.precision))
                by_operation = request.spans is not None and self.name == "eager"
                with request.span(module.label):
                    outputs = module.run(reads, request.spans) if by_operation else runners[i](*reads)
            request.features.update(zip(module.segment.writes, outputs, strict=True))
            for name in module.segment.writes:
                self._send(request, name)
        logits = None
        if self.lane == self.placement.coordinator:
            self._receive(request, self.program.output)
            logits = request.features[self.program.output].to(torch.float32, copy=True)
        with request.span(SENDS):
            for work, tag in request.sends:
                self.transport.finish(work, tag)
        for inbox in request.arriving.values():
            inbox.release()
        return logits

    def _receive(self, request: _Request, name: str) -> None:
        for tag, inbox in request.arriving.items():
            if self.transfers[tag].feature == name and name not in request.features:
                with request.span(wait_name(name)):
                    request.features[name] = self.transport.wait(inbox, tag)

    def _send(self, request: _Request, name: str) -> None:
        tags = [tag for tag, t in enumerate(self.transfers) if t.feature == name and t.source == self.lane]
        if tags:
            with request.span(send_name(name)):
                request.sends += [(self.transport.send(request.features[name], tag), tag) for tag in tags]

    def _tell(self, numbers: Tensor) -> None:
        """Send something else than features to the coordinator, which has to `_hear` it."""
        tag = self._told[self.lane]
        self.transport.finish(self.transport.send(numbers, tag), tag)

    def _hear(self, lane: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tag = self._told[lane]
        inbox = self.transport.inbox(tag, shape, dtype, CPU)
        self.transport.post(inbox, tag)
        numbers = self.transport.wait(inbox, tag).clone()
        inbox.release()
        return numbers

    def _tell_spans(self, recorder: Recorder) -> None:
        text = to_bytes(recorder)
        self._tell(_numbers(len(text)))
        self._tell(text)

    def _with_others(self, own: Recorder) -> list[Recorder]:
        def heard(lane: int) -> Recorder:
            length = int(self._hear(lane, (1,), torch.int64))
            return from_bytes(self._hear(lane, (length,), torch.uint8), lane)

        return [own if lane == self.lane else heard(lane) for lane in range(self.placement.lanes)]

    def _make_shape(self, shape_nchw: tuple[int, ...]) -> _Shape:
        n, _, h, w = shape_nchw
        self.transport.reserve(self._sizes(n, h, w), self.device)
        here = [(tag, t.feature) for tag, t in enumerate(self.transfers) if t.target == self.lane]
        inboxes = [
            {
                tag: self.transport.inbox(tag, self.program.shape(name, n, h, w), self.storage, self.device)
                for tag, name in here
            }
            for _ in range(IN_FLIGHT)
        ]
        return _Shape(inboxes)


def _numbers(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=CPU)


def _sources_digest() -> str:
    """Of the package's code that decides what a lane computes: it changes with the version, and with any edit."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("executors", "kernels", "network", "program", "transport"):
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in (".py", ".c")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
