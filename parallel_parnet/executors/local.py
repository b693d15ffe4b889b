"""One process: every lane is a device of this process, or all lanes are one device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..placement import Placement
from ..profiling.ranges import Ranges
from ..profiling.spans import REQUEST, Recorder, Spans, span
from ..profiling.traced import traced
from ..program import INPUT, Program
from .backends import Runner, compile_module, storage_type
from .segment import SegmentModule

MAX_SHAPES = 8  # input shapes with compiled segments; the oldest goes first


class LocalExecutor:
    """Runs a placement's segments in order, each on the device of its lane, moving features between devices.

    Backend "reference" is eager mode in the plain NCHW layout: the oracle that others are held against.
    """

    def __init__(
        self, program: Program, placement: Placement, devices: list[torch.device], dtype: torch.dtype, backend: str
    ) -> None:
        self.program, self.devices, self.name, self.precision = program, devices, backend, dtype
        self.memory_format = torch.contiguous_format if backend == "reference" else torch.channels_last
        self.storage = storage_type(backend, dtype)
        self.modules = [
            SegmentModule(program, s, self.storage, devices[s.lane], self.memory_format)
            for s in placement.segments(program)
        ]
        self.ranges = Ranges.of(program)
        self._runners: dict[tuple[int, ...], list[Runner]] = {}

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device."""
        with span(self.ranges, REQUEST):
            return self._run(x_nchw, self.ranges)

    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """Run a few requests as calls run them: this process's spans, on its first lane."""
        recorder = traced(lambda spans: self._run(x_nchw, spans), self.devices[0], self._synchronise, self.ranges)
        return [recorder, *(Recorder() for _ in self.devices[1:])]

    @torch.inference_mode()
    def _run(self, x_nchw: Tensor, spans: Spans | None) -> Tensor:
        runners = self._runners.setdefault(tuple(x_nchw.shape), [])
        if len(self._runners) > MAX_SHAPES:
            del self._runners[next(iter(self._runners))]
        features = self._start(x_nchw)
        for i, module in enumerate(self.modules):
            reads = self._on_lane(module, features)
            if len(runners) <= i:
                runners.append(compile_module(module, self.name, reads, self.precision))
            by_operation = spans is not None and self.name == "eager"
            with span(spans, module.label):
                outputs = module.run(reads, spans) if by_operation else runners[i](*reads)
            features.update(zip(module.segment.writes, outputs, strict=True))
        return features[self.program.output].to(x_nchw.device, torch.float32)

    @torch.inference_mode()
    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation in eager mode, and return a recorder of spans for each lane."""
        recorders = [Recorder(synchroniser(device)) for device in self.devices]
        features = self._start(x_nchw)
        for module in self.modules:
            outputs = module.run(self._on_lane(module, features), recorders[module.segment.lane])
            features.update(zip(module.segment.writes, outputs, strict=True))
        return recorders

    def _synchronise(self) -> None:
        for device in set(self.devices):
            synchroniser(device)()

    def _start(self, x_nchw: Tensor) -> dict[str, Tensor]:
        return {INPUT: x_nchw.to(self.storage, memory_format=self.memory_format)}

    def _on_lane(self, module: SegmentModule, features: dict[str, Tensor]) -> tuple[Tensor, ...]:
        device = self.devices[module.segment.lane]
        return tuple(features[name].to(device, non_blocking=True) for name in module.segment.reads)

    def close(self, status: int = 0) -> None:
        """Nothing to release."""


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until `device` has done its work."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
