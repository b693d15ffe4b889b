"""A lane per rank: each rank runs its segments, sends what others read and receives what it reads."""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LaneError, ParNetError
from ..placement import Placement, Transfer
from ..profiling.spans import Recorder
from ..program import INPUT, Program, check_input
from ..transport import agree, choose, open_as
from ..transport.base import IN_FLIGHT, Inbox, Pending
from .backends import Runner, compile_module, storage_type
from .local import MAX_SHAPES, synchroniser
from .segment import SegmentModule

STOP, RUN, PROFILE = range(3)
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
    """A request that was announced. arriving: by tag. sends: under way, with their tags."""

    shape: _Shape
    arriving: dict[int, Inbox]
    features: dict[str, Tensor] = field(default_factory=dict)
    sends: list[tuple[Pending | None, int]] = field(default_factory=list)
    recorder: Recorder | None = None

    def span(self, name: str) -> AbstractContextManager[None]:
        """A span of the recorder, where there is one."""
        return self.recorder.span(name) if self.recorder else nullcontext()


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
        times = [Transfer("times", lane, placement.coordinator) for lane in others]
        self._header = {lane: len(self.transfers) + i for i, lane in enumerate(others)}
        self._times = {lane: len(self.transfers) + len(headers) + i for i, lane in enumerate(others)}
        self.transport = open_as(choose(transport, device), [*self.transfers, *headers, *times])
        self.modules = [
            SegmentModule(program, s, self.storage, device) for s in placement.segments(program) if s.lane == lane
        ]
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        self._begun = 0
        self._pending: deque[tuple[_Request, torch.device]] = deque()

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device. On the coordinator only."""
        self._begin(RUN, x_nchw, alone=True)
        return self._answer()

    def map(self, pictures: Iterable[Tensor]) -> Generator[Tensor]:
        """Logits of each in turn, the next request being announced before the last is answered."""
        try:
            for x_nchw in pictures:
                while self._pending and tuple(x_nchw.shape) not in self._shapes:
                    yield self._answer()  # a new shape comes alone: its compiling is no reason to hold an answer back
                self._begin(RUN, x_nchw)
                if len(self._pending) == IN_FLIGHT:
                    yield self._answer()
            while self._pending:
                yield self._answer()
        finally:
            self._drain()

    def serve(self) -> int:
        """Do this lane's part of every request until the coordinator closes; returns the status it closed with."""
        tag = self._header[self.lane]
        inbox = self.transport.inbox(tag, (HEADER,), torch.int64, CPU)
        self.transport.post(inbox, tag)
        while True:
            command, *shape = self.transport.wait(inbox, tag, idle=True).tolist()
            inbox.release()
            if command == STOP:
                return shape[0]
            self.transport.post(inbox, tag)
            self._check_header(command, shape)
            request = self._prepare(command, (shape[0], 3, *shape[1:]))
            self._finish(request)
            if request.recorder:
                self._send_times(request.recorder)

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation in eager mode, transfers included: a recorder of spans for each lane."""
        own = self._begin(PROFILE, x_nchw, alone=True).recorder
        self._answer()
        assert own is not None
        return [own if lane == self.lane else self._receive_times(lane) for lane in range(self.placement.lanes)]

    def close(self, status: int = 0) -> None:
        """End the other lanes' `serve`. On the coordinator only."""
        self._drain()
        for work, tag in self._announce(STOP, (status, 0, 0)):
            self.transport.finish(work, tag)

    def _announce(self, command: int, numbers: tuple[int, ...]) -> list[tuple[Pending | None, int]]:
        header = torch.tensor([command, *numbers])
        return [(self.transport.send(header, tag), tag) for tag in self._header.values()]

    def _check_header(self, command: int, shape: list[int]) -> None:
        """LaneError for an announcement that no coordinator of this program makes."""
        try:
            if command not in (RUN, PROFILE):
                raise ParNetError(f"command {command}")
            if not all(0 < number <= MAX_FEATURE_BYTES for number in shape):
                raise ParNetError(f"shape {shape}")
            check_input(self.program, torch.empty(shape[0], 3, *shape[1:], device="meta"))
            if max(self._sizes(*shape), default=0) > MAX_FEATURE_BYTES:
                raise ParNetError(f"{shape[0]} pictures of {shape[1]} x {shape[2]} pixels")
        except ParNetError as error:
            raise LaneError(f"refused what rank {self.placement.coordinator} announced: {error}") from None

    def _begin(self, command: int, x_nchw: Tensor, alone: bool = False) -> _Request:
        """Announce a request to the other lanes, and send the picture. alone: the caller wants its answer next."""
        if alone and self._pending:
            raise ParNetError("a map of this engine is still running: take all its answers, or close it, first")
        n, _, h, w = x_nchw.shape
        sizes = self._sizes(n, h, w)
        if max(sizes, default=0) > MAX_FEATURE_BYTES:
            raise ParNetError(
                f"{n} pictures of {h} x {w} pixels: a feature would take {max(sizes)} bytes; give a smaller batch"
            )
        announcements = self._announce(command, (n, h, w))
        request = self._prepare(command, (n, 3, h, w))
        request.sends += announcements
        request.features[INPUT] = x_nchw.to(self.device, self.storage, memory_format=torch.channels_last)
        self._send(request, INPUT)
        self._pending.append((request, x_nchw.device))
        return request

    def _sizes(self, n: int, h: int, w: int) -> list[int]:
        """Bytes of each transfer of a request."""
        return [math.prod(self.program.shape(t.feature, n, h, w)) * self.storage.itemsize for t in self.transfers]

    def _prepare(self, command: int, shape_nchw: tuple[int, ...]) -> _Request:
        """Be ready for what arrives in a request."""
        shape = self._shape(shape_nchw)
        arriving = shape.inboxes[self._begun % IN_FLIGHT]
        self._begun += 1
        for tag, inbox in arriving.items():
            self.transport.post(inbox, tag)
        recorder = Recorder(synchroniser(self.device)) if command == PROFILE else None
        return _Request(shape, dict(arriving), recorder=recorder)

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
            for name in module.segment.reads:
                self._receive(request, name)
            reads = tuple(request.features[name] for name in module.segment.reads)
            if request.recorder:
                outputs = module.run(reads, request.recorder)
            else:
                runners = request.shape.runners
                if len(runners) <= i:
                    runners.append(compile_module(module, self.name, reads, self.precision))
                outputs = runners[i](*reads)
            request.features.update(zip(module.segment.writes, outputs, strict=True))
            for name in module.segment.writes:
                self._send(request, name)
        logits = None
        if self.lane == self.placement.coordinator:
            self._receive(request, self.program.output)
            logits = request.features[self.program.output].to(torch.float32, copy=True)
        with request.span("wait for sends"):
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
            with request.span(f"send {name}"):
                request.sends += [(self.transport.send(request.features[name], tag), tag) for tag in tags]

    def _send_times(self, recorder: Recorder) -> None:
        by_name = {span.name: span for span in recorder.spans}
        spans = [by_name[name] for name in self._span_names(self.lane)]
        tag = self._times[self.lane]
        times = torch.tensor([[span.start, span.end] for span in spans], dtype=torch.float64)
        self.transport.finish(self.transport.send(times, tag), tag)

    def _receive_times(self, lane: int) -> Recorder:
        names, tag = self._span_names(lane), self._times[lane]
        inbox = self.transport.inbox(tag, (len(names), 2), torch.float64, CPU)
        self.transport.post(inbox, tag)
        times = self.transport.wait(inbox, tag).tolist()
        inbox.release()
        return Recorder.of(names, times)

    def _span_names(self, lane: int) -> list[str]:
        waits = [wait_name(t.feature) for t in self.transfers if t.target == lane]
        sends = dict.fromkeys(f"send {t.feature}" for t in self.transfers if t.source == lane)
        return [
            *waits, *(op.name for op in self.program.operations if lane in self.placement.where[op.name]), *sends,
            "wait for sends",
        ]  # fmt: skip

    def _shape(self, shape_nchw: tuple[int, ...]) -> _Shape:
        if shape_nchw not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                del self._shapes[next(iter(self._shapes))]
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
            self._shapes[shape_nchw] = _Shape(inboxes)
        return self._shapes[shape_nchw]


def wait_name(feature: str) -> str:
    """Name of the span in which a lane waits for a feature."""
    return f"wait {feature}"


def _sources_digest() -> str:
    """Of the package's code that decides what a lane computes: it changes with the version, and with any edit."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder in ("", "executors", "kernels", "transport"):
        for path in sorted((root / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()
