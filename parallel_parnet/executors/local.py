"""One process: every lane is a device of this process, or all lanes are one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..profiling.ranges import Ranges
from ..profiling.spans import Recorder, Spans, span
from ..program.placement import Placement
from ..program.program import INPUT, Program
from .backends import Runner, compile_module, storage_type
from .segment import SegmentModule
from .shapes import Shapes


class LocalExecutor:
    """Runs a placement's segments in order, each on the device of its lane, moving features between devices.

    Backend "reference" is eager mode in the plain NCHW layout: the oracle that others are held against.
    threads: of each segment, for the native kernels.
    """

    def __init__(
        self,
        program: Program,
        placement: Placement,
        devices: list[torch.device],
        dtype: torch.dtype,
        backend: str,
        threads: int | None = None,
    ) -> None:
        self.program, self.devices, self.name, self.precision = program, devices, backend, dtype
        self.threads = threads
        plain = backend in ("reference", "native")
        self.memory_format = torch.contiguous_format if plain else torch.channels_last
        self.storage = storage_type(backend, dtype)
        self.modules = [
            SegmentModule(program, s, self.storage, devices[s.lane], self.memory_format)
            for s in placement.segments(program)
        ]
        self.ranges = Ranges.of(program)
        self._runners: Shapes[tuple[int, ...], list[Runner]] = Shapes(lambda shape: [])

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device."""
        return self.run(x_nchw, self.ranges)

    @torch.inference_mode()
    def run(self, x_nchw: Tensor, spans: Spans | None) -> Tensor:
        """The same, each segment marked, and each operation where it is one by one that they run."""
        runners = self._runners(x_nchw.shape)
        features = self._start(x_nchw)
        for i, module in enumerate(self.modules):
            reads = on_device(module, self.devices[module.segment.lane], features)
            if len(runners) <= i:
                runners.append(compile_module(module, self.name, reads, self.precision, self.threads))
            by_operation = spans is not None and self.name == "eager"
            with span(spans, module.label):
                outputs = module.run(reads, spans) if by_operation else runners[i](*reads)
            features.update(zip(module.segment.writes, outputs, strict=True))
        return features[self.program.output].to(x_nchw.device, torch.float32)

    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, operation by operation in eager mode, and return a recorder of spans for each lane."""
        return profile(self.modules, self.devices, self._start(x_nchw))

    def _start(self, x_nchw: Tensor) -> dict[str, Tensor]:
        return {INPUT: x_nchw.to(self.storage, memory_format=self.memory_format)}

    def close(self, status: int = 0) -> None:
        """Nothing to release."""


@torch.inference_mode()
def profile(
    modules: Sequence[SegmentModule], devices: Sequence[torch.device], features: dict[str, Tensor]
) -> list[Recorder]:
    """Run segments once, operation by operation in eager mode: a recorder of spans for each lane, each on its device.

    features: the picture as `program.INPUT`, of the modules' type.
    """
    recorders = [Recorder(synchroniser(device)) for device in devices]
    for module in modules:
        lane = module.segment.lane
        outputs = module.run(on_device(module, devices[lane], features), recorders[lane])
        features.update(zip(module.segment.writes, outputs, strict=True))
    return recorders


def on_device(module: SegmentModule, device: torch.device, features: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """What a segment reads, moved to its lane's device."""
    return tuple(features[name].to(device, non_blocking=True) for name in module.segment.reads)


def synchroniser(device: torch.device) -> Callable[[], None]:
    """What waits until `device` has done its work."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
