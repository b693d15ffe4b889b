"""A lane per rank: each rank runs its segments, sends what others read and receives what it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from ..placement import Placement
from ..profiling.clocks import Clock, answer, ask
from ..profiling.lanes import hear, tell
from ..profiling.ranges import Ranges
from ..profiling.spans import GATHER, REQUEST, Recorder, Spans, send_name, span, wait_name
from ..profiling.traced import traced
from ..program import INPUT, Program
from ..transport import Pending, Transport
from .backends import Runner, compile_module, storage_type
from .local import MAX_SHAPES, synchroniser
from .segment import SegmentModule

STOP, RUN, PROFILE, TRACE, CLOCK = range(5)


class _Shape:
    """What a lane keeps for one shape of input: receive buffers, and compiled segments."""

    def __init__(self, buffers: list[tuple[int, Tensor]]) -> None:
        self.buffers = buffers
        self.runners: list[Runner] = []


class DistributedExecutor:
    """On the coordinator, call it; on every other lane, `serve`. Headers carry [command, N, H, W]."""

    def __init__(
        self,
        program: Program,
        placement: Placement,
        transport: Transport,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        self.program, self.placement, self.transport, self.device = program, placement, transport, device
        self.name, self.precision, self.storage = backend, dtype, storage_type(backend, dtype)
        self.transfers = placement.transfers(program)
        self.modules = [
            SegmentModule(program, s, self.storage, device)
            for s in placement.segments(program)
            if s.lane == transport.lane
        ]
        self.ranges = Ranges.of(program)
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        transport.agree(program.digest)

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device. On the coordinator only."""
        with span(self.ranges, REQUEST):
            logits = self._request(x_nchw, self.ranges)
        assert logits is not None
        return logits.to(x_nchw.device, torch.float32)

    def serve(self) -> int:
        """Do this lane's part of every request until the coordinator closes; returns the status it closed with."""
        while True:
            command, *shape = self.transport.announce([0] * 4, self.placement.coordinator)
            if command == STOP:
                return shape[0]
            if command == CLOCK:
                answer(self.transport, self.placement.coordinator, len(self.transfers))
                continue
            picture = torch.empty(shape[0], 3, *shape[1:], device="meta")
            if command == RUN:
                with span(self.ranges, REQUEST):
                    self._run(picture, self.ranges)
            else:
                recorder = self._recorded(command, picture)
                tell(self.transport, self.placement.coordinator, len(self.transfers), recorder)

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation in eager mode, waits included: a recorder of spans for each lane."""
        return self._record(PROFILE, x_nchw)

    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """Run a few requests as calls run them: a recorder of spans for each lane."""
        return self._record(TRACE, x_nchw)

    def clocks(self) -> list[Clock]:
        """Each lane's clock against the coordinator's."""
        self.transport.announce([CLOCK, 0, 0, 0], self.placement.coordinator)
        here, tag = self.transport.lane, len(self.transfers)
        return [Clock() if lane == here else ask(self.transport, lane, tag) for lane in range(self.placement.lanes)]

    def close(self, status: int = 0) -> None:
        """End the other lanes' `serve`. On the coordinator only."""
        self.transport.announce([STOP, status, 0, 0], self.placement.coordinator)

    def _request(self, x_nchw: Tensor, spans: Spans | None) -> Tensor | None:
        coordinates = self.transport.lane == self.placement.coordinator
        with span(spans, send_name(REQUEST) if coordinates else wait_name(REQUEST)):
            self._announce(RUN, x_nchw)
        return self._run(x_nchw, spans)

    def _announce(self, command: int, x_nchw: Tensor) -> None:
        n, _, h, w = x_nchw.shape
        self.transport.announce([command, n, h, w], self.placement.coordinator)

    def _record(self, command: int, x_nchw: Tensor) -> list[Recorder]:
        self._announce(command, x_nchw)
        own, lanes = self._recorded(command, x_nchw), range(self.placement.lanes)
        here, tag = self.transport.lane, len(self.transfers)
        return [own if lane == here else hear(self.transport, lane, tag) for lane in lanes]

    def _recorded(self, command: int, x_nchw: Tensor) -> Recorder:
        synchronise = synchroniser(self.device)
        if command == TRACE:
            return traced(lambda spans: self._request(x_nchw, spans), self.device, synchronise, self.ranges)
        recorder = Recorder(synchronise)
        self._run(x_nchw, recorder, eager=True)
        return recorder

    @torch.inference_mode()
    def _run(self, x_nchw: Tensor, spans: Spans | None, eager: bool = False) -> Tensor | None:
        """This lane's part of one request; `x_nchw` matters beyond its shape on the coordinator alone.

        eager: operation by operation, each in a span of its own.
        """
        lane, shape = self.transport.lane, self._shape(tuple(x_nchw.shape))
        arriving: dict[str, tuple[Tensor, Pending]] = {}
        for tag, buffer in shape.buffers:
            t = self.transfers[tag]
            arriving[t.feature] = buffer, self.transport.receive(buffer, t.source, tag, t.feature)
        features: dict[str, Tensor] = {}
        sends: list[tuple[Pending, str]] = []

        def receive(name: str) -> None:
            if name in arriving:
                features[name], work = arriving.pop(name)
                with span(spans, wait_name(name)):
                    self.transport.wait(work, name)

        def send(name: str) -> None:
            for tag, t in enumerate(self.transfers):
                if t.feature == name and t.source == lane:
                    feature = features[name].contiguous(memory_format=_format(features[name]))
                    with span(spans, send_name(name)):
                        sends.append((self.transport.send(feature, t.target, tag, name), name))

        if lane == self.placement.coordinator:
            features[INPUT] = x_nchw.to(self.device, self.storage, memory_format=torch.channels_last)
            send(INPUT)
        for i, module in enumerate(self.modules):
            gathers = lane == self.placement.coordinator and arriving.keys() & module.segment.reads
            with span(spans if gathers else None, GATHER):
                for name in module.segment.reads:
                    receive(name)
            reads = tuple(features[name] for name in module.segment.reads)
            if eager:
                outputs = module.run(reads, spans)
            else:
                if len(shape.runners) <= i:
                    shape.runners.append(compile_module(module, self.name, reads, self.precision))
                by_operation = spans is not None and self.name == "eager"
                with span(spans, module.label):
                    outputs = module.run(reads, spans) if by_operation else shape.runners[i](*reads)
            features.update(zip(module.segment.writes, outputs, strict=True))
            for name in module.segment.writes:
                send(name)
        if lane == self.placement.coordinator:
            receive(self.program.output)
        for work, name in sends:
            self.transport.wait(work, name)
        return features.get(self.program.output)

    def _shape(self, shape: tuple[int, ...]) -> _Shape:
        if shape not in self._shapes:
            if len(self._shapes) >= MAX_SHAPES:
                del self._shapes[next(iter(self._shapes))]
            n, _, h, w = shape
            self._shapes[shape] = _Shape(
                [
                    (tag, self._buffer(self.program.shape(t.feature, n, h, w)))
                    for tag, t in enumerate(self.transfers)
                    if t.target == self.transport.lane
                ]
            )
        return self._shapes[shape]

    def _buffer(self, shape: tuple[int, ...]) -> Tensor:
        buffer = torch.empty(shape, dtype=self.storage, device=self.device)
        return buffer.contiguous(memory_format=_format(buffer))


def _format(feature: Tensor) -> torch.memory_format:
    return torch.channels_last if feature.ndim == 4 else torch.contiguous_format
