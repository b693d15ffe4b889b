"""A segment of a program as a torch module, which every executor of torch runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from ..profiling.spans import Spans, span
from ..program.arithmetic import OPERATIONS, held
from ..program.placement import Segment
from ..program.program import Operation, Program


class SegmentModule(nn.Module):
    """A module from features `segment.reads` to features `segment.writes`, [N, C, H, W] in any memory format.

    Convolution kernels and features are of type `dtype`; gates, epilogues and the classifier are computed in fp32, so
    that a feature is rounded once where it leaves the convolution and once where it is stored.
    """

    def __init__(
        self,
        program: Program,
        segment: Segment,
        dtype: torch.dtype,
        device: torch.device,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        super().__init__()
        self.segment = segment
        # plain dictionaries, since looking up a module's buffers by name would cost more than small operations do
        self.operations: list[tuple[Operation, dict[str, Tensor]]] = []
        for op in (program.by_name[name] for name in segment.operations):
            weights = {}
            for name, tensor in held(program, op).items():
                in_convolution = op.kind == "conv" and name in ("weight", "bias")
                tensor = tensor.to(device, dtype if in_convolution else torch.float32)
                is_kernel = tensor.ndim == 4
                weights[name] = tensor.contiguous(memory_format=memory_format) if is_kernel else tensor
            self.operations.append((op, weights))
        self.steps = program.steps
        self._packed: dict[Hashable, dict[str, Tensor]] = {}

    def packed(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return weights as a backend reads them, made once for all shapes of input. key: tells them from others."""
        if key not in self._packed:
            self._packed[key] = make()
        return self._packed[key]

    def forward(self, *reads: Tensor) -> tuple[Tensor, ...]:
        return self.run(reads, None)

    def run(self, reads: tuple[Tensor, ...], spans: Spans | None) -> tuple[Tensor, ...]:
        """Run operation by operation, each in a span of its own where there is something to mark."""
        features = dict(zip(self.segment.reads, reads, strict=True))
        for op, weights in self.operations:
            inputs = [features[name] for name in op.inputs]
            with span(spans, op.name):
                features[op.name] = OPERATIONS[op.kind](op, weights, inputs)
        return tuple(features[name] for name in self.segment.writes)
