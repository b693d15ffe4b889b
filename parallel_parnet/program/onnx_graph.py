"""A program as an ONNX model, operation by operation, of standard operators alone.

Channels are paired and shuffled by Split and Concat, which need no sizes, so that batch, height and width stay open;
the 2 of a gate `2 sigmoid(g)` is in the kernel already.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from ..errors import ParNetError
from .arithmetic import pixel_affine, shaped
from .contract import INPUT

if TYPE_CHECKING:
    from .program import Operation, Program

OPSET = 17  # which every reader of the last years knows; nothing here needs a later one
MOST_BYTES = 2**31 - 1  # bytes of a file: protobuf's limit


@dataclass
class _Graph:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        """An operator with one output, which has its name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, name: str, values: Tensor | np.ndarray | list[int]) -> str:
        array = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def regrouped(self, name: str, parts: list[tuple[str, int]], order: list[int], channels: int) -> str:
        """Features, each cut into so many parts of `channels` channels, joined part by part in this order."""
        cut: list[str] = []
        for number, (feature, count) in enumerate(parts):  # which may be the same one twice
            part = f"{name}/{number}/{feature}"
            pieces = [f"{part}/{i}" for i in range(count)]
            if count > 1:
                sizes = self.constant(f"{part}/sizes", [channels] * count)
                self.nodes.append(helper.make_node("Split", [feature, sizes], pieces, name=part, axis=1))
            cut += pieces if count > 1 else [feature]
        return self.node("Concat", name, *(cut[i] for i in order), axis=1)


def model_of(program: Program, raw: bool = False) -> onnx.ModelProto:
    """Make an ONNX model of a program.

    Its input is called "input", fp32 [batch, 3, height, width], normalised; outputs have the names of
    `program.answers`.

    raw: the input is uint8, RGB, and normalised first. The model's metadata hold the network's configuration as JSON.
    Raises ParNetError for a quantised program, for a network that fits no ONNX file, and for operators that ONNX lacks.
    """
    if program.quantised:
        raise ParNetError("a quantised program has no ONNX file here: export the fp32 program that it was made of")
    if 4 * program.parameters > MOST_BYTES:
        raise ParNetError(f"{program.parameters} parameters: an ONNX file holds 2 GB; torch.export has no such limit")
    graph, x = _Graph(), INPUT
    if raw:
        affine = pixel_affine(program.config, torch.device("cpu"))
        scale, shift = (graph.constant(f"{INPUT}.{n}", v) for n, v in zip(("scale", "shift"), affine, strict=True))
        x = graph.node("Cast", f"{INPUT}/float", x, to=TensorProto.FLOAT)
        x = graph.node("Add", f"{INPUT}/normalised", graph.node("Mul", f"{INPUT}/scaled", x, scale), shift)
    features = {INPUT: x}
    for op in program.operations:
        make = {"conv": _convolution, "maxpool": _maximum, "classifier": _classifier}[op.kind]
        features[op.name] = make(graph, op, program.weights_of(op), [features[name] for name in op.inputs])
    for name, feature in program.answers.items():
        graph.node("Identity", name, features[feature])
    kind = TensorProto.UINT8 if raw else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(INPUT, kind, ["batch", 3, "height", "width"])]
    outputs = [_output(program, name, feature) for name, feature in program.answers.items()]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "ParNet", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8, producer_name="parallel_parnet",
    )  # fmt: skip
    helper.set_model_props(model, {"config": json.dumps(asdict(program.config)), "digest": program.digest})
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ParNetError(f"ONNX cannot hold this network: {str(error).splitlines()[0]}") from None
    return model


def _output(program: Program, name: str, feature: str) -> onnx.ValueInfoProto:
    op = program.by_name[feature]
    places = ["height", "width"] if op.kind != "classifier" else []
    sizes = [f"{side} / {program.reductions[feature]}" for side in places]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", op.cout, *sizes])


def _convolution(g: _Graph, op: Operation, w: dict[str, Tensor], inputs: list[str]) -> str:
    at = f"{op.name}/"
    factor = 2 if op.gate == "plain" else 1
    c = {name: g.constant(f"{op.name}.{name}", _shaped(name, tensor, factor)) for name, tensor in w.items()}
    read = inputs[: len(op.convolved)]
    (x, *second), each = read, op.cin // len(read) // op.groups
    if second:
        order = [part + i * op.groups for part in range(op.groups) for i in range(2)]
        x = g.regrouped(at + "pair", [(feature, op.groups) for feature in read], order, each)
    shape = {"kernel_shape": [op.kernel] * 2, "strides": [op.stride] * 2, "pads": [op.kernel // 2] * 4}
    y = g.node("Conv", at + "conv", x, c["weight"], c["bias"], group=op.groups, **shape)
    if "border" in c:
        y = g.node("Add", at + "bordered", y, g.node("Conv", at + "border", _inside(g, at, x), c["border"], **shape))
    if op.gate != "none":
        y = _gated(g, op, c, x, y)
    if op.residual:
        y = g.node("Add", at + "residual", y, inputs[-1])
    if op.activation == "silu":
        y = g.node("Mul", at + "silu", y, g.node("Sigmoid", at + "sigmoid", y))
    elif op.activation == "relu":
        y = g.node("Relu", at + "relu", y)
    if op.shuffle > 1:
        order = [group * op.shuffle + chunk for chunk in range(op.shuffle) for group in range(op.groups)]
        y = g.regrouped(at + "shuffle", [(y, len(order))], order, op.cout // len(order))
    return y


def _gated(g: _Graph, op: Operation, c: dict[str, str], x: str, y: str) -> str:
    at = f"{op.name}/"
    average = g.node("GlobalAveragePool", at + "average", x)
    gate = g.node("Conv", at + "excitation", average, c["gate_weight"], c["gate_bias"], group=op.groups)
    gate = g.node("Sigmoid", at + "gate", gate)
    if op.gate == "plain":
        return g.node("Mul", at + "gated", y, gate)
    scale, shift = (g.node("Mul", f"{at}gated_{name}", gate, c[name]) for name in ("scale", "shift"))
    identity = g.node("Add", at + "identity", g.node("Mul", at + "scaled", x, scale), shift)
    return g.node("Add", at + "sum", y, identity)


def _maximum(g: _Graph, op: Operation, w: dict[str, Tensor], inputs: list[str]) -> str:
    shape = {"kernel_shape": [op.kernel] * 2, "strides": [op.stride] * 2, "pads": [1] * 4}
    return g.node("MaxPool", f"{op.name}/largest", inputs[0], **shape)


def _classifier(g: _Graph, op: Operation, w: dict[str, Tensor], inputs: list[str]) -> str:
    at = f"{op.name}/"
    c = {name: g.constant(f"{op.name}.{name}", tensor) for name, tensor in w.items()}
    averages = [g.node("GlobalAveragePool", f"{at}average/{i}/{x}", x) for i, x in enumerate(inputs)]
    x = averages[0] if len(averages) == 1 else g.node("Concat", at + "averages", *averages, axis=1)
    return g.node("Gemm", at + "linear", g.node("Flatten", at + "flat", x), c["weight"], c["bias"], transB=1)


def _inside(g: _Graph, at: str, x: str) -> str:
    """Ones [1, 1, H, W]: the taps of a kernel that lie inside the picture count them."""
    sides = g.node("Shape", at + "sides", x, start=2)
    shape = g.node("Concat", at + "plane", g.constant(at + "one", [1, 1]), sides, axis=0)
    return g.node("ConstantOfShape", at + "inside", shape, value=numpy_helper.from_array(np.ones(1, np.float32)))


def _shaped(name: str, tensor: Tensor, factor: int) -> Tensor:
    if name in ("weight", "bias", "border"):
        tensor = factor * tensor
    return tensor.view(-1, 1, 1) if name in ("scale", "shift") else shaped(name, tensor)
