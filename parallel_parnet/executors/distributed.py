"""A lane per rank: each rank runs its segments, sends what others read and receives what it reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..placement import Placement
from ..profiling.spans import Recorder
from ..program import INPUT, Program
from ..transport import Pending, Transport
from .backends import Runner, compile_module, storage_type
from .local import MAX_SHAPES, synchroniser
from .segment import SegmentModule

STOP, RUN, PROFILE = range(3)


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
        self._shapes: dict[tuple[int, ...], _Shape] = {}
        transport.agree(program.digest)

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device. On the coordinator only."""
        self._announce(RUN, x_nchw)
        logits = self._run(x_nchw, None)
        assert logits is not None
        return logits.to(x_nchw.device, torch.float32)

    def serve(self) -> int:
        """Do this lane's part of every request until the coordinator closes; returns the status it closed with."""
        while True:
            command, *shape = self.transport.announce([0] * 4, self.placement.coordinator)
            if command == STOP:
                return shape[0]
            if command == RUN:
                self._run(torch.empty(shape[0], 3, *shape[1:], device="meta"), None)
            else:
                self._profile(torch.empty(shape[0], 3, *shape[1:], device="meta"))

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation in eager mode, waits included: a recorder of spans for each lane."""
        self._announce(PROFILE, x_nchw)
        own = self._profile(x_nchw)
        recorders = []
        for lane in range(self.placement.lanes):
            if lane == self.transport.lane:
                recorders.append(own)
                continue
            names = self._span_names(lane)
            times = torch.empty(len(names), 2, dtype=torch.float64)
            self.transport.wait(self.transport.receive(times, lane, len(self.transfers), "times"), "times")
            recorders.append(Recorder.of(names, times.tolist()))
        return recorders

    def close(self, status: int = 0) -> None:
        """End the other lanes' `serve`. On the coordinator only."""
        self.transport.announce([STOP, status, 0, 0], self.placement.coordinator)

    def _announce(self, command: int, x_nchw: Tensor) -> None:
        n, _, h, w = x_nchw.shape
        self.transport.announce([command, n, h, w], self.placement.coordinator)

    def _profile(self, x_nchw: Tensor) -> Recorder:
        recorder = Recorder(synchroniser(self.device))
        self._run(x_nchw, recorder)
        coordinator = self.placement.coordinator
        if self.transport.lane != coordinator:
            by_name = {span.name: span for span in recorder.spans}
            spans = [by_name[name] for name in self._span_names(self.transport.lane)]
            times = torch.tensor([[s.start, s.end] for s in spans], dtype=torch.float64).view(-1, 2)
            self.transport.wait(self.transport.send(times, coordinator, len(self.transfers), "times"), "times")
        return recorder

    def _span_names(self, lane: int) -> list[str]:
        waits = [wait_name(t.feature) for t in self.transfers if t.target == lane]
        return waits + [op.name for op in self.program.operations if lane in self.placement.where[op.name]]

    @torch.inference_mode()
    def _run(self, x_nchw: Tensor, recorder: Recorder | None) -> Tensor | None:
        """This lane's part of one request; `x_nchw` matters beyond its shape on the coordinator alone."""
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
                with_span(recorder, wait_name(name), lambda: self.transport.wait(work, name))

        def send(name: str) -> None:
            for tag, t in enumerate(self.transfers):
                if t.feature == name and t.source == lane:
                    feature = features[name].contiguous(memory_format=_format(features[name]))
                    sends.append((self.transport.send(feature, t.target, tag, name), name))

        if lane == self.placement.coordinator:
            features[INPUT] = x_nchw.to(self.device, self.storage, memory_format=torch.channels_last)
            send(INPUT)
        for i, module in enumerate(self.modules):
            for name in module.segment.reads:
                receive(name)
            reads = tuple(features[name] for name in module.segment.reads)
            if recorder:
                outputs = module.run(reads, recorder)
            else:
                if len(shape.runners) <= i:
                    shape.runners.append(compile_module(module, self.name, reads, self.precision))
                outputs = shape.runners[i](*reads)
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


def wait_name(feature: str) -> str:
    """Name of the span in which a lane waits for a feature."""
    return f"wait {feature}"


def with_span(recorder: Recorder | None, name: str, action: Callable[[], None]) -> None:
    """Do it, in a span where there is a recorder."""
    if recorder is None:
        action()
    else:
        with recorder.span(name):
            action()


def _format(feature: Tensor) -> torch.memory_format:
    return torch.channels_last if feature.ndim == 4 else torch.contiguous_format
