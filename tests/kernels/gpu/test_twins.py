"""The kernels' twins against the arithmetic of the torch executors, on real operations of a real program."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from parallel_parnet import load_checkpoint
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.kernels.gpu import twins
from parallel_parnet.kernels.gpu.convolution import Convolution, Operands, allocate, outputs
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile, padded_channels
from parallel_parnet.kernels.gpu.packing import pack_border, pack_gate_weight, pack_weight
from parallel_parnet.program.fold import fold
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import INPUT, Operation, Program
from small import GOLDEN

CHECKPOINT = GOLDEN / "official_narrow_silu.pth.tar"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def program() -> Program:
    return fold(load_checkpoint(CHECKPOINT, activation="silu"))


def by_segment(program: Program, op: Operation, inputs: list[torch.Tensor]) -> torch.Tensor:
    """An operation's output as the torch executors compute it."""
    alone = Segment(0, (op.name,), op.inputs, (op.name,))
    return SegmentModule(program, alone, torch.float32, CPU)(*inputs)[0]


def by_twin(program: Program, op: Operation, inputs: list[torch.Tensor], bm: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An operation's output [N, C, H, W] and its sums, from inputs in the same layout."""
    w = program.weights_of(op)
    nhwc = [F.pad(x.permute(0, 2, 3, 1), (0, padded_channels(x.shape[1]) - x.shape[1])).contiguous() for x in inputs]
    sums = [x.flatten(1, 2).unflatten(1, (4, -1)).sum(2) for x in nhwc]
    planar = op.inputs[0] == INPUT
    second = len(inputs) == 2
    shape = Geometry(
        *inputs[0].shape[2:], op.cin, op.cout, op.stride, op.groups, op.shuffle, op.gate, op.activation, len(inputs),
        planar,
    )  # fmt: skip
    tile = Tile(bm=bm)
    x = Operands(
        a=inputs[0] if planar else nhwc[0], b=nhwc[1] if second else None,
        a_sums=None if planar else sums[0], b_sums=sums[1] if second else None,
        weight=pack_weight(w["weight"], shape, tile, torch.float32), bias=w["bias"],
        border=pack_border(w["border"]) if "border" in w else None,
        gate_weight=pack_gate_weight(w["gate_weight"], torch.float32), gate_bias=w["gate_bias"],
        scale=w.get("scale"), shift=w.get("shift"), residual=None,
        **allocate(outputs(shape, tile, len(nhwc[0]), torch.float32), CPU),
    )  # fmt: skip
    conv = Convolution(x, shape, tile)
    conv.check()
    twins.fused_conv(conv)
    assert not x.y[..., op.cout :].any() and not x.sums[..., op.cout :].any()
    return x.y.permute(0, 3, 1, 2)[:, : op.cout], x.sums[..., : op.cout]


def test_every_convolution_of_a_program(program):
    torch.manual_seed(0)
    for op in program.operations:
        if op.kind != "conv":
            continue
        inputs = [torch.randn(program.shape(name, 2, 64, 64)) for name in op.inputs]
        expected = by_segment(program, op, inputs)
        y, sums = by_twin(program, op, inputs, bm=16)
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5, msg=lambda m, op=op: f"{op.name}: {m}")
        torch.testing.assert_close(sums.sum(1), expected.sum((2, 3)), atol=1e-3, rtol=1e-4)


def test_classifier(program):
    op = program.by_name[program.output]
    x = torch.randn(2, op.cin, 5, 3)
    expected = by_segment(program, op, [x])
    logits = torch.empty(2, op.cout)
    w = program.weights_of(op)
    sums = F.pad(x.flatten(2).unflatten(2, (3, 5)).sum(3).transpose(1, 2), (0, padded_channels(op.cin) - op.cin))
    twins.classifier(sums, 15, w["weight"], w["bias"], logits)
    torch.testing.assert_close(logits, expected)
