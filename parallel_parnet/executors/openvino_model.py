"""A segment of a program as an OpenVINO model, made operation by operation from the program itself.

Converting what torch exports gives the same graph, and takes seconds where this takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import openvino
import torch
from openvino import Model, Node, opset1
from openvino import opset13 as ov

from ..program.program import Operation
from .segment import SegmentModule

FEW = 16  # channels, that do not fill a vector of AVX-512
# one for the process: each gives the thread that first compiles with it a stack for signals, and takes it away as it
# goes, so that the next signal handled there, such as Ctrl-C's, would crash the process
CORE = openvino.Core()


def compile_model(model: Model, dtype: torch.dtype, threads: int) -> openvino.CompiledModel:
    """Compile a model for the lowest latency on the CPU. dtype: of the arithmetic, float32 or bfloat16."""
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # which would take the first cores, in every process the same
    }
    return CORE.compile_model(model, "CPU", settings)


def model_of(module: SegmentModule, shapes: Sequence[Sequence[int]]) -> Model:
    """Return a segment as an OpenVINO model, with the arithmetic of `SegmentModule`.

    shapes: [N, C, H, W] of the inputs, fp32, in the order of `segment.reads`. Outputs are in the order of `writes`.
    """
    inputs = [ov.parameter(list(shape), np.float32) for shape in shapes]
    features: dict[str, Node] = dict(zip(module.segment.reads, inputs, strict=True))
    for op, weights in module.operations:
        make = {"conv": _convolution, "maxpool": _maximum, "classifier": _classifier}[op.kind]
        constants = {name: _constant(tensor.float().numpy()) for name, tensor in weights.items()}
        features[op.name] = make(op, constants, [features[name] for name in op.inputs])
    return Model([features[name] for name in module.segment.writes], inputs)


def _convolution(op: Operation, w: dict[str, Node], inputs: list[Node]) -> Node:
    read, padding = inputs[: len(op.convolved)], op.kernel // 2
    x = read[0] if len(read) == 1 else _pair(read, op.groups)
    y = ov.add(_conv(x, w["weight"], op.groups, op.stride, padding), _per_channel(w["bias"]))
    if "border" in w:
        inside = _constant(np.ones((1, 1, *_shape(x)[2:])))  # constant, so OpenVINO works the border out beforehand
        y = ov.add(y, _conv(inside, w["border"], 1, op.stride, padding))
    if op.gate != "none":
        gate = ov.sigmoid(ov.add(_conv(_average(x), w["gate_weight"], op.groups, 1, 0), _per_channel(w["gate_bias"])))
        # the gate comes last, since in bf16 a product of two vectors would be rounded on its own
        if op.gate == "identity":
            y = ov.add(y, ov.multiply(ov.add(ov.multiply(x, w["scale"]), w["shift"]), gate))
        else:
            y = ov.multiply(ov.multiply(y, _constant(2.0)), gate)
    if op.residual:
        y = ov.add(y, inputs[-1])
    if op.activation != "none":
        zero = _constant(0.0)  # not its relu, which does not keep NaN
        y = ov.swish(y) if op.activation == "silu" else ov.select(ov.less(y, zero), zero, y)
    if op.shuffle > 1:
        n, c, h, width = _shape(y)
        y = ov.reshape(y, [n, op.groups, op.shuffle, -1, h, width], False)
        y = ov.reshape(ov.transpose(y, [0, 2, 1, 3, 4, 5]), [n, c, h, width], False)
    return y


def _maximum(op: Operation, w: dict[str, Node], inputs: list[Node]) -> Node:
    strides, pads = [op.stride] * 2, [1, 1]
    return opset1.max_pool(inputs[0], strides, pads, pads, [op.kernel] * 2)  # later ones give the places as well


def _classifier(op: Operation, w: dict[str, Node], inputs: list[Node]) -> Node:
    averages = [ov.reshape(_average(x), _shape(x)[:2], False) for x in inputs]
    x = averages[0] if len(averages) == 1 else ov.concat(averages, 1)
    return ov.add(ov.matmul(x, w["weight"], False, True), w["bias"])


def _conv(x: Node, weight: Node, groups: int, stride: int, padding: int) -> Node:
    strides, pads, dilations = [stride, stride], [padding, padding], [1, 1]
    if groups == 1:
        return ov.convolution(x, weight, strides, pads, pads, dilations)
    o, *rest = _shape(weight)
    grouped = ov.reshape(weight, [groups, o // groups, *rest], False)
    return ov.group_convolution(x, grouped, strides, pads, pads, dilations)


def _average(x: Node) -> Node:
    """[N, C, 1, 1]. A row first where there are few channels: OpenVINO would add all their pixels up one by one."""
    _, channels, _, width = _shape(x)
    if channels < FEW:
        x = opset1.avg_pool(x, [1, 1], [0, 0], [0, 0], [1, width], False)
    return ov.reduce_mean(x, [2, 3], keep_dims=True)


def _pair(inputs: list[Node], groups: int) -> Node:
    """Group by group, the first input's part, then the second's."""
    n, c, h, w = _shape(inputs[0])
    parts = [ov.reshape(x, [n, groups, -1, h, w], False) for x in inputs]
    return ov.reshape(ov.concat(parts, 2), [n, 2 * c, h, w], False)


def _per_channel(vector: Node) -> Node:
    return ov.reshape(vector, [1, -1, 1, 1], False)


def _constant(values: np.ndarray | float) -> Node:
    return ov.constant(np.ascontiguousarray(values, np.float32))


def _shape(node: Node) -> list[int]:
    return list(node.output(0).get_shape())
