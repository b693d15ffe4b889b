"""What a program must be before anything runs it: compiled kernels address memory by its numbers, unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import ParNetError
from ..network.variants import ACTIVATIONS

if TYPE_CHECKING:
    from .program import Operation, Program

INPUT = "input"
CHOICES = {
    "kind": ("conv", "maxpool", "classifier"),
    "stage": ("stem", "stream", "fusion", "head"),
    "stride": (1, 2),
    "kernel": (1, 3, 7),
    "gate": ("identity", "plain", "none"),
    "activation": (*ACTIVATIONS, "none"),
}
COUNTS = ("level", "cin", "cout", "stride", "groups", "shuffle", "kernel")
LEAST_STEP, MOST_STEP = 2.0**-126, 2.0**119  # of a feature: 1 / step, and 255 steps, are fp32 numbers of full precision
MOST_SUMMED = (2**31 - 1) // (9 * 127 * 255)  # channels whose products of 8 bits fill no more than 32
E4M3 = torch.float8_e4m3fn
NO_INT8 = "a quantised program has gated convolutions and a classifier, and nothing else"
MAX_REDUCTION = 1024  # picture pixels per pixel of a feature: more would only ask for pictures that no memory holds


class Made(NamedTuple):
    """A feature: level and width (channels), and reduction: picture pixels per pixel along one side."""

    level: int
    width: int
    reduction: int


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name without its module: "float32"."""
    return str(dtype).removeprefix("torch.")


def check(program: Program, finite: Mapping[str, Tensor]) -> None:
    """ParNetError, naming operation or tensor, where operations, weights and configuration break `Operation`'s rules
    or do not fit each other. finite: tensors that were checked before, by name."""
    features = {INPUT: Made(0, 3, 1)}
    for op in program.operations:
        for fault in _faults(op, features):
            raise ParNetError(f"operation {op.name!r}: {fault}")
        features[op.name] = Made(op.level, op.cout, op.stride * features[op.inputs[0]].reduction)
    for fault in _faults_of_outputs(program):
        raise ParNetError(fault)
    if early := [op.name for op in program.operations[:-1] if op.kind == "classifier"]:
        raise ParNetError(f"operation {early[0]!r}: a classifier must be the last operation, and the only one")
    classes, made = program.config.num_classes, program.operations[-1].cout
    if program.operations[-1].kind == "classifier" and made != classes:
        raise ParNetError(f"the classifier gives {made} logits for a configuration of {classes} classes")
    streams = {op.stream for op in program.operations if op.stream is not None}
    if streams != set(range(len(streams))):
        raise ParNetError(f"streams {sorted(streams)}: number them from 0, without a gap")
    _check_weights(program, finite)


def shapes(op: Operation) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight of an operation that is not quantised; `border` alone may be missing."""
    if op.kind == "classifier":
        return {"weight": (op.cout, op.cin), "bias": (op.cout,)}
    if op.kind == "maxpool":
        return {}
    k, taps = op.cin // op.groups, (op.kernel, op.kernel)
    kernels: dict[str, tuple[int, ...]] = {"weight": (op.cout, k, *taps), "border": (op.cout, *taps)}
    if op.gate != "none":
        kernels["gate_weight"] = (op.cout, k)
    rows = {"identity": ("bias", "gate_bias", "scale", "shift"), "plain": ("bias", "gate_bias"), "none": ("bias",)}
    return kernels | dict.fromkeys(rows[op.gate], (op.cout,))


def quantised_shapes(op: Operation, weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight that a quantised operation may have beside those of `shapes`."""
    if op.kind != "conv":
        return {}
    integer = f"{op.name}.zero" in weights
    return {"step": (1,) if integer else (op.cout,), "zero": (1,), "weight_step": (op.cout,)}


def _faults_of_outputs(program: Program) -> Iterator[str]:
    if not program.outputs and [op.kind for op in program.operations[-1:]] != ["classifier"]:
        yield "the last operation must be a classifier"
    made = {op.name for op in program.operations}
    if not isinstance(program.outputs, Mapping):
        yield f"outputs {program.outputs!r}: names, and the operations that make them"
    for name, feature in program.outputs.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            yield f"output {name!r}: its name must be of printable characters"
        if feature not in made:
            yield f"output {name!r}: {feature!r} is no operation"


def _faults(op: Operation, features: Mapping[str, Made]) -> Iterator[str]:
    """What is wrong with an operation; only the first is to be believed, since later rules rely on earlier ones."""
    if not isinstance(op.name, str) or not op.name or not op.name.isprintable():
        yield "its name must be of printable characters"
    if op.name in features:
        yield "appears twice"
    for name in COUNTS:
        value = getattr(op, name)
        if type(value) is not int or value < 1:
            yield f"{name} {value!r}: must be an integer from 1"
    for name, choices in CHOICES.items():
        if getattr(op, name) not in choices:
            yield f"{name} {getattr(op, name)!r}: choose one of {', '.join(map(str, choices))}"
    numbered = type(op.stream) is int and op.stream >= 0
    if not (numbered if op.stage == "stream" else op.stream is None):
        yield f"stream {op.stream!r} in stage {op.stage}: an integer from 0 in the stage stream, none elsewhere"
    if not isinstance(op.inputs, tuple) or not op.inputs or not all(isinstance(name, str) for name in op.inputs):
        yield f"inputs {op.inputs!r}: names of features, at least one"
    if unknown := [name for name in op.inputs if name not in features]:
        yield f"reads {unknown[0]!r}, which no earlier operation makes"
    if type(op.residual) is not bool or (op.residual and len(op.inputs) < 2):
        yield f"residual {op.residual!r}: true or false, and true where the last of several inputs is added"
    read, inputs = [features[name] for name in op.inputs], [features[name] for name in op.convolved]
    if op.level != 1 + max(x.level for x in read):
        yield f"stands on level {op.level}, not one above its inputs"
    if op.cin != sum(x.width for x in inputs):
        yield f"cin {op.cin}: its inputs have {sum(x.width for x in inputs)} channels"
    if len({(x.width, x.reduction) for x in inputs}) > 1:
        yield "its inputs must be of one width and one resolution"
    yield from (_faults_of_convolution if op.kind == "conv" else _faults_of_others)(op, read, inputs)
    if op.kind != "classifier" and op.stride * inputs[0].reduction > MAX_REDUCTION:
        yield f"a pixel for {op.stride * inputs[0].reduction} of the picture: at most {MAX_REDUCTION}"


def _faults_of_others(op: Operation, read: Sequence[Made], inputs: Sequence[Made]) -> Iterator[str]:
    none, stride = ("stride, ", 1) if op.kind == "classifier" else ("", op.stride)
    plain = (stride, 1, 1, "none", "none", 3, False)
    if (op.stride, op.groups, op.shuffle, op.gate, op.activation, op.kernel, op.residual) != plain:
        yield f"a {op.kind} has no {none}groups, shuffle, gate, activation, kernel or residual"
    if INPUT in op.inputs:
        yield f"a {op.kind} reads features, not the picture"
    if op.kind == "maxpool" and (len(op.inputs), op.cout) != (1, op.cin):
        yield "a maxpool reads one feature, and has as many channels"


def _faults_of_convolution(op: Operation, read: Sequence[Made], inputs: Sequence[Made]) -> Iterator[str]:
    if op.kernel == 7 and INPUT not in op.inputs:
        yield "a 7x7 convolution reads the picture"
    if op.gate != "none" and (op.activation, op.kernel, op.residual) not in ((a, 3, False) for a in ACTIVATIONS):
        yield f"gate {op.gate}: a gated convolution is 3x3, with an activation and without a residual"
    if len(inputs) > 2:
        yield f"{len(inputs)} inputs: a convolution reads one or two"
    if op.residual and (read[-1][1:] != (op.cout, op.stride * inputs[0].reduction) or op.shuffle > 1):
        yield "its residual must have the output's channels and resolution, and nothing may be shuffled"
    if INPUT in op.inputs and len(op.inputs) * op.groups > 1:
        yield "reads the picture: it must be its only input, and in one group"
    if inputs[0].width % op.groups or op.cout % (op.groups * op.shuffle):
        yield f"{op.groups} groups must divide each input's channels, and times {op.shuffle} chunks also cout {op.cout}"
    if op.gate == "identity" and (op.cin, op.stride, op.groups, len(op.inputs), op.shuffle) != (op.cout, 1, 1, 1, 1):
        yield "gate identity needs one input, cin equal to cout, stride 1, and neither groups nor shuffle"


def _check_weights(program: Program, finite: Mapping[str, Tensor]) -> None:
    weights = program.weights
    plain = {f"{op.name}.{name}": shape for op in program.operations for name, shape in shapes(op).items()}
    expected = dict(plain)
    for op in program.operations:
        expected |= {f"{op.name}.{name}": shape for name, shape in quantised_shapes(op, weights).items()}
    required = {name for name in plain if not name.endswith(".border")}
    if missing := sorted(required - weights.keys()):
        raise ParNetError(f"{len(missing)} tensors are missing, {missing[0]!r} among them")
    if foreign := sorted(weights.keys() - expected.keys()):
        raise ParNetError(f"{len(foreign)} tensors belong to no operation, {foreign[0]!r} among them")
    ungated = [op.name for op in program.operations if op.is_ungated]
    if ungated and any(name.endswith((".step", ".weight_step")) for name in weights):
        raise ParNetError(f"operation {ungated[0]!r}: {NO_INT8}")
    if len({f"{name[:-5]}.zero" in weights for name in weights if name.endswith(".step")}) > 1:
        raise ParNetError("features in uint8 have step and zero, those in e4m3 a step: a program has one or the other")
    for op in program.operations:
        for fault in _faults_of_steps(op, weights):
            raise ParNetError(f"operation {op.name!r}: {fault}")
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.requires_grad or tensor.is_neg() or tensor.is_cuda:
            raise ParNetError(f"{name}: expected a tensor on the CPU, detached, and no view that torch is to negate")
        owner, _, short = name.rpartition(".")
        stepped = short == "weight" and f"{owner}.weight_step" in weights  # whose type was looked at above
        dtype = tensor.dtype if stepped else torch.uint8 if short == "zero" else torch.float32
        if tensor.shape != expected[name] or tensor.dtype != dtype or tensor.layout != torch.strided:
            got = f"{list(tensor.shape)} of {tensor.dtype}, {tensor.layout}"
            raise ParNetError(f"{name} is {got}: expected {list(expected[name])} of {dtype_name(dtype)}, dense")
        binary = short == "step" and f"{owner}.zero" not in weights
        if not (tensor.is_meta or tensor is finite.get(name)) and (wrong := _wrong(short, tensor, binary)):
            raise ParNetError(f"{name} holds {wrong}")


def _faults_of_steps(op: Operation, weights: Mapping[str, Tensor]) -> Iterator[str]:
    if f"{op.name}.zero" in weights and f"{op.name}.step" not in weights:
        yield "a feature in uint8 has step and zero, one that is not quantised neither"
    dtype = None if op.kind == "maxpool" else weights[f"{op.name}.weight"].dtype
    if (dtype in (torch.int8, E4M3)) != (f"{op.name}.weight_step" in weights):
        yield "a weight in int8 or e4m3 has a weight_step, and no other has one"
    if f"{op.name}.weight_step" not in weights:
        return
    name, read = ("int8", "uint8") if dtype == torch.int8 else ("e4m3", "e4m3")
    right = [x for x in op.inputs if f"{x}.step" in weights and (f"{x}.zero" in weights) == (dtype == torch.int8)]
    if other := [x for x in op.inputs if x not in right]:
        yield f"its weight is {name}, and {other[0]!r}, which it reads, is not in {read}"
    if dtype == torch.int8 and op.cin > MOST_SUMMED * op.groups:
        yield f"{op.cin // op.groups} channels are too many for sums of 32 bits, at most {MOST_SUMMED}: keep it in fp32"


def _wrong(short: str, tensor: Tensor, binary: bool) -> str | None:
    """What is wrong with the values of a weight of this short name, of the right type. binary: powers of two only."""
    if tensor.dtype == E4M3:
        tensor = tensor.float()
    if tensor.dtype == torch.int8:
        return "-128: int8 weights are -127 to 127" if int(tensor.amin()) == -128 else None
    if tensor.dtype == torch.uint8:
        return None
    least, most = tensor.aminmax()  # in one pass without temporaries; both are NaN where any value is
    if not bool(torch.isfinite(torch.stack((least, most))).all()):
        return "non-finite values (NaN or inf)"
    if short == "step" and not LEAST_STEP <= float(least) <= float(most) <= MOST_STEP:
        return f"{float(least)} to {float(most)}: a feature's steps are {LEAST_STEP:.1e} to {MOST_STEP:.1e}"
    if binary and bool(torch.frexp(tensor)[0].ne(0.5).any()):
        return "steps of e4m3 that are no powers of two"
    return f"{float(least)}: steps are positive" if short == "weight_step" and least <= 0 else None
