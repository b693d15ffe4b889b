"""A segment of a program as a torch module: the arithmetic of every torch executor."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..network.blocks import ACTIVATION
from ..profiling.spans import Spans, span
from ..program.placement import Segment
from ..program.program import Operation, Program


class SegmentModule(nn.Module):
    """Features `segment.reads` in, features `segment.writes` out, in NCHW shape and any memory format.

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
        self.label = ", ".join(dict.fromkeys(program.by_name[name].label for name in segment.operations))
        # plain dictionaries, since looking up a module's buffers by name would cost more than small operations do
        self.operations: list[tuple[Operation, dict[str, Tensor]]] = []
        for op in (program.by_name[name] for name in segment.operations):
            weights = {}
            for name, tensor in program.of(op).items():
                in_convolution = op.kind == "conv" and name in ("weight", "bias")
                tensor = _shaped(name, tensor).to(device, dtype if in_convolution else torch.float32)
                is_kernel = tensor.ndim == 4
                weights[name] = tensor.contiguous(memory_format=memory_format) if is_kernel else tensor
            self.operations.append((op, weights))
        self._packed: dict[Hashable, dict[str, Tensor]] = {}

    def packed(self, key: Hashable, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Weights as a backend reads them, made once for all shapes of input."""
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


def convolution(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """A gated 3x3 convolution as `Operation` defines it: features [N, C, H, W] in and out."""
    x = inputs[0] if len(inputs) == 1 else _pair(inputs, op.groups)
    y = F.conv2d(x, w["weight"], w["bias"], op.stride, padding=1, groups=op.groups).float()
    if "border" in w:
        inside = torch.ones_like(x[:1, :1], dtype=torch.float32)
        y = y.add_(F.conv2d(inside, w["border"], None, op.stride, padding=1))
    average = x.mean((2, 3), keepdim=True, dtype=torch.float32)
    gate = torch.sigmoid(F.conv2d(average, w["gate_weight"], w["gate_bias"], groups=op.groups))
    if op.gate == "identity":
        y.addcmul_(x.float(), w["scale"] * gate).add_(w["shift"] * gate)
    else:
        y.mul_(2 * gate)
    y = ACTIVATION[op.activation](y, inplace=True).to(x.dtype)
    if op.shuffle > 1:
        y = y.unflatten(1, (op.groups, op.shuffle, -1)).transpose(1, 2).flatten(1, 3)
    return y


def classifier(op: Operation, w: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """Global averages and linear layer: features [N, C, H, W] to logits fp32 [N, classes]."""
    averages = [x.mean((2, 3), dtype=torch.float32) for x in inputs]
    return F.linear(torch.cat(averages, 1), w["weight"], w["bias"])


OPERATIONS = {"conv": convolution, "classifier": classifier}


def _pair(inputs: list[Tensor], groups: int) -> Tensor:
    """[N, C, H, W] twice to [N, 2 C, H, W]: group by group, the first input's part, then the second's."""
    return torch.cat([x.unflatten(1, (groups, -1)) for x in inputs], 2).flatten(1, 2)


def _shaped(name: str, tensor: Tensor) -> Tensor:
    """A weight in the shape in which the arithmetic above takes it."""
    if name in ("scale", "shift"):
        return tensor.view(1, -1, 1, 1)
    if name == "gate_weight":
        return tensor[:, :, None, None]
    return tensor.unsqueeze(1) if name == "border" else tensor
