"""One GPU, one kernel launch per level of depth: the program as Triton kernels over buffers of its own.

Shape letters: N pictures, H and W height and width, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ParNetError
from ..kernels.gpu.classifier import classifier
from ..kernels.gpu.config import Table
from ..kernels.gpu.convolution import Convolution, Operands, allocate
from ..kernels.gpu.geometry import Geometry
from ..kernels.gpu.launch import Launch
from ..kernels.gpu.level import level
from ..kernels.gpu.packing import pack_border, pack_gate_weight, pack_weight
from ..profiling.ranges import Ranges
from ..profiling.spans import Recorder, Spans, span
from ..program.program import INPUT, Operation, Program
from .local import synchroniser
from .shapes import Shapes

Weights = dict[str, dict[str, Tensor]]


class Plan:
    """The launches of a forward pass over n pictures of h x w pixels, and the buffers that they read and write.

    picture: storage or, with `raw`, uint8 [N, 3, H, W], to be filled before the launches. logits: fp32 [N, classes],
    filled by the last. A launch allocates nothing and waits for nothing, so a CUDA graph can hold it. On torch's "meta"
    device a plan serves to compile its launches for a GPU that is not there.
    """

    def __init__(
        self, program: Program, weights: Weights, n: int, h: int, w: int, table: Table, raw: bool = False
    ) -> None:
        first = weights[program.operations[0].name]["weight"]
        self.dtype, self.device, self.table, self.weights = first.dtype, first.device, table, weights
        self.shape = (n, h, w)
        self.picture = torch.empty(n, 3, h, w, dtype=torch.uint8 if raw else self.dtype, device=self.device)
        self._features: dict[str, tuple[Tensor, Tensor | None]] = {INPUT: (self.picture, None)}
        self.launches = [self._launch(program, group) for group in program.groups]
        self.logits = self._features[program.output][0]

    def run(self, x_nchw: Tensor, spans: Spans | None = None) -> Tensor:
        """Logits fp32 [N, classes], in a buffer that the next run overwrites."""
        self.picture.copy_(x_nchw)
        self.launch(spans)
        return self.logits

    def launch(self, spans: Spans | None = None) -> None:
        """Fill the logits from the picture."""
        with torch.cuda.device_of(self.picture):
            for launch in self.launches:
                with span(spans, launch.name):
                    launch()

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
        logits = torch.empty(self.shape[0], op.cout, dtype=torch.float32, device=self.device)
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
    raw: pictures are uint8, and the program is one that `pixels.fold_pixels` made.
    """

    name = "triton"

    def __init__(
        self, program: Program, device: torch.device, dtype: torch.dtype, table: Table | None = None, raw: bool = False
    ) -> None:
        if device.type != "cuda" and table is None:
            raise ParNetError(f"executor triton runs on NVIDIA GPUs, not on {device}: choose another")
        self.program, self.device, self.precision, self.raw = program, device, dtype, raw
        self.table = table or Table.of_device(device)
        self.weights = pack(program, dtype, device)
        self.ranges = Ranges.of(program)
        self._plans: Shapes[tuple[int, ...], Plan] = Shapes(self.make)

    def make(self, shape: tuple[int, ...]) -> Plan:
        """A new plan for pictures [N, 3, H, W] of this shape."""
        n, _, h, w = shape
        return Plan(self.program, self.weights, n, h, w, self.table, self.raw)

    def plan(self, n: int, h: int, w: int) -> Plan:
        """The plan for n pictures of h x w pixels; the oldest of too many goes."""
        return self._plans((n, 3, h, w))

    def __call__(self, x_nchw: Tensor) -> Tensor:
        """Logits, fp32, on the picture's device."""
        return self.run(x_nchw, self.ranges)

    @torch.inference_mode()
    def run(self, x_nchw: Tensor, spans: Spans | None) -> Tensor:
        """The same, each launch marked."""
        return self._plans(x_nchw.shape).run(x_nchw, spans).to(x_nchw.device, copy=True)

    @torch.inference_mode()
    def profile(self, x_nchw: Tensor) -> list[Recorder]:
        """Run once, level by level, waiting for each: a recorder of spans for the one lane."""
        plan, recorder = self._plans(x_nchw.shape), Recorder(synchroniser(self.device))
        plan.picture.copy_(x_nchw)
        for launch in plan.launches:
            with recorder.span(launch.name), torch.cuda.device_of(plan.picture):
                launch()
        return [recorder]

    def close(self, status: int = 0) -> None:
        """Nothing to release."""
