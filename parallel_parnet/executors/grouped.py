"""One GPU, one kernel launch per level of depth: the program as Triton kernels over buffers of its own.

Shape letters: N pictures, H and W height and width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ParNetError
from ..kernels.classifier import classifier
from ..kernels.config import Table
from ..kernels.convolution import Convolution, Operands, allocate
from ..kernels.geometry import Geometry
from ..kernels.launch import Launch
from ..kernels.level import level
from ..kernels.packing import pack_border, pack_gate_weight, pack_weight
from ..profiling.ranges import Ranges
from ..profiling.spans import REQUEST, Recorder, Spans, span
from ..profiling.traced import traced
from ..program import INPUT, Operation, Program
from .local import MAX_SHAPES, synchroniser

Weights = dict[str, dict[str, Tensor]]


class Plan:
    """The launches of a forward pass over n pictures of h x w pixels, and the buffers that they read and write.

    picture: storage [N, 3, H, W], to be filled before the launches. logits: fp32 [N, classes], filled by the last. A
    run allocates nothing and waits for nothing, so a CUDA graph can hold it. On torch's "meta" device a plan serves to
    compile its launches for a GPU that is not there.
    """

    def __init__(self, program: Program, weights: Weights, n: int, h: int, w: int, table: Table) -> None:
        first = weights[program.operations[0].name]["weight"]
        self.dtype, self.device, self.table, self.weights = first.dtype, first.device, table, weights
        self.shape = (n, h, w)
        self.picture = torch.empty(n, 3, h, w, dtype=self.dtype, device=self.device)
        self._features: dict[str, tuple[Tensor, Tensor | None]] = {INPUT: (self.picture, None)}
        self.launches = [self._launch(program, group) for group in program.groups]
        self.logits = self._features[program.output][0]

    def run(self, x_nchw: Tensor, spans: Spans | None = None) -> Tensor:
        """Logits fp32 [N, classes], in a buffer that the next run overwrites."""
        self.picture.copy_(x_nchw)
        with torch.cuda.device_of(self.picture):
            for launch in self.launches:
                with span(spans, launch.name):
                    launch()
        return self.logits

    def _launch(self, program: Program, group: tuple[Operation, ...]) -> Launch:
        if group[0].kind == "classifier":
            (op,) = group
            return self._classifier(op)
        shapes = [geometry(program, op, *self.shape[1:]) for op in group]
        config = self.table.level(shapes, self.shape[0], self.dtype)
        convolutions = []
        for op, shape, tile in zip(group, shapes, config.tiles, strict=True):
            w = self.weights[op.name]
            (a, a_sums), *second = (self._features[name] for name in op.inputs)
            b, b_sums = second[0] if second else (None, None)
            made = allocate(shape, tile, self.shape[0], self.dtype, self.device)
            x = Operands(
                a, b, a_sums, b_sums, w["weight"], w["bias"], w.get("border"), None, w["gate_weight"], w["gate_bias"],
                w.get("scale"), w.get("shift"), *made,
            )  # fmt: skip
            convolutions.append(Convolution(x, shape, tile))
        for op, conv in zip(group, convolutions, strict=True):
            self._features[op.name] = conv.x.y, conv.x.sums
        return level(convolutions, config.num_warps, config.num_stages, f"level {group[0].level}")

    def _classifier(self, op: Operation) -> Launch:
        w = self.weights[op.name]
        feature, sums = self._features[op.inputs[0]]
        assert sums is not None
        logits = torch.empty(self.shape[0], op.cout, device=self.device)
        self._features[op.name] = logits, None
        return classifier(sums, feature.shape[1] * feature.shape[2], w["weight"], w["bias"], logits)


def geometry(program: Program, op: Operation, h: int, w: int) -> Geometry:
    """The shape of a convolution of the program where the pictures have h x w pixels."""
    h, w = program.shape(op.inputs[0], 1, h, w)[2:]
    return Geometry(
        h, w, op.cin, op.cout, op.stride, op.groups, op.shuffle, op.gate, op.activation, len(op.inputs),
        planar=op.inputs[0] == INPUT,
    )  # fmt: skip


def pack(program: Program, dtype: torch.dtype, device: torch.device) -> Weights:
    """Every operation's weights as the kernels read them: by operation, then by name."""
    packed: Weights = {}
    for op in program.operations:
        w = {name: tensor.to(device) for name, tensor in program.of(op).items()}
        if op.kind == "classifier":
            w["weight"] = w["weight"].to(dtype)
        else:
            w["weight"] = pack_weight(w["weight"], dtype)
            w["gate_weight"] = pack_gate_weight(w["gate_weight"], dtype)
            if "border" in w:
                w["border"] = pack_border(w["border"])
        packed[op.name] = w
    return packed


class GroupedExecutor:
    """Runs a program on one GPU, one launch per level, with a plan for each shape of input.

    table: tile shapes, by default those for `device`. With a table, Triton's interpreter may run it on the CPU.
    """

    name = "triton"

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype, table: Table | None = None) -> None:
        if device.type != "cuda" and table is None:
            raise ParNetError(f"executor triton runs on NVIDIA GPUs, not on {device}: choose another")
        self.program, self.device, self.precision = program, device, dtype
        self.table = table or Table.of_device(device)
        self.weights = pack(program, dtype, device)
        self.ranges = Ranges.of(program)
        self._plans: dict[tuple[int, ...], Plan] = {}

    def plan(self, n: int, h: int, w: int) -> Plan:
        """The plan for n pictures of h x w pixels; the oldest of too many goes."""
        if (n, h, w) not in self._plans:
            if len(self._plans) >= MAX_SHAPES:
                del self._plans[next(iter(self._plans))]
            self._plans[n, h, w] = Plan(self.program, self.weights, n, h, w, self.table)
        return self._plans[n, h, w]

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device."""
        with span(self.ranges, REQUEST):
            return self._run(x_nchw, self.ranges)

    def trace(self, x_nchw: Tensor) -> list[Recorder]:
        """Run a few requests as calls run them: a recorder of spans for the one lane."""
        return [traced(lambda spans: self._run(x_nchw, spans), self.device, synchroniser(self.device), self.ranges)]

    @torch.inference_mode()
    def _run(self, x_nchw: Tensor, spans: Spans | None) -> Tensor:
        n, _, h, w = x_nchw.shape
        return self.plan(n, h, w).run(x_nchw, spans).to(x_nchw.device, copy=True)

    @torch.inference_mode()
    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, level by level, waiting for each: a recorder of spans for the one lane."""
        n, _, h, w = x_nchw.shape
        plan, recorder = self.plan(n, h, w), Recorder(synchroniser(self.device))
        plan.picture.copy_(x_nchw)
        for launch in plan.launches:
            with recorder.span(launch.name), torch.cuda.device_of(plan.picture):
                launch()
        return [recorder]

    def close(self, status: int = 0) -> None:
        """Nothing to release."""
