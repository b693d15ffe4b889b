"""The folded network as data: operations on levels, and their weights.

Nothing here computes a picture; executors do. Shape letters: N batch, C channels, H and W height and width.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Mapping
from dataclasses import InitVar, asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import ParNetError
from ..files import open_safetensors, write_safetensors
from ..network.variants import Config
from ..settings import with_own_settings
from .contract import E4M3, INPUT, check
from .cost import Cost, cost_of, table_of
from .exported import export

if TYPE_CHECKING:
    import onnx
    from torch.export import ExportedProgram

FORMAT, DIGEST = "parallel_parnet.program.1", "digest"
LATER = {"kernel": 3, "residual": False}  # fields added after the first files, with the values implied there


@dataclass(frozen=True)
class Operation:
    """A step of the program; its output is a feature map of the same name.

    kind: "conv", a convolution with `kernel` x `kernel` taps, 1, 3 or, of the picture, 7, and padding kernel // 2;
        "maxpool", the largest of 3 x 3 values, of those inside the picture; or "classifier", a linear layer on the
        global averages of its inputs, one after the other. ParNet has gated 3x3 convolutions and a classifier; all else
        is for the networks that it is compared with, and never quantised (`is_ungated`).
    stage: "stem", "stream", "fusion" or "head"; stream: its number in the stage "stream", else None.
    level: length of the longest path from the picture; operations of one level can run side by side.
    inputs: features read; by a convolution one or two of equal width, of which its group g reads the g-th part, and,
        with `residual`, behind them one of the output's shape, which is added before the activation.
    stride, groups: of the convolution. Output channels are computed group by group, cout / groups each.
    shuffle: each group's channels are stored in this many chunks, chunk after chunk: (groups, shuffle, rest) becomes
        (shuffle, groups, rest). What is left of the network's channel shuffle once the readers' weights are permuted.
    gate: "identity": act(conv + bias + (scale x + shift) sigmoid(g)); "plain": act((conv + bias) 2 sigmoid(g)), with
        g = gate_weight avg(x) + gate_bias; "none": act(conv + bias + residual), and for all that is no convolution. A
        gated convolution is 3x3, with an activation and without a residual.

    Weights, by name: `weight` [cout, cin / groups, kernel, kernel] or [classes, cin], `bias` [cout], `gate_weight`
    [cout, cin / groups], `gate_bias` [cout], `scale` and `shift` [cout], and, where a batch norm stood before the
    convolution, `border` [cout, kernel, kernel]: what each tap adds to the output where it lies inside the picture. All
    fp32.

    Quantised to int8, a convolution may have more. With `step` [1], fp32, and `zero` [1], uint8, its feature is stored
    in uint8: of a value v that leaves the activation, every reader sees step (q - zero), where q is v (1 / step),
    rounded half to even, plus zero, within 0..255; 1 / step is fp32. With `weight_step` [cout], fp32, its `weight` is
    int8, -127 to 127, all its inputs are such features, and conv is weight_step times the sum over inputs, taps and
    channels of weight (q - zero): the inputs' steps are in the weights, and what lies outside the picture is zero. It
    reads at most 7367 channels in a group, whose sum 32 bits hold. In a quantised program every convolution is gated.

    Quantised to fp8, it has no `zero`. With `step` [cout], fp32 powers of two, in the order in which channels are
    stored, its feature is in e4m3 (torch.float8_e4m3fn: 4 bits of exponent, 3 of fraction): of a value v every reader
    sees step q, where q is v / step, rounded half to even, within -448..448; NaN stays NaN. With
    `weight_step` [cout], fp32, its `weight` is in e4m3 as well, all its inputs are such features, and conv is
    weight_step times the sum of weight q.
    """

    name: str
    kind: str
    stage: str
    stream: int | None
    level: int
    inputs: tuple[str, ...]
    cin: int
    cout: int
    stride: int = 1
    groups: int = 1
    shuffle: int = 1
    gate: str = "none"
    activation: str = "none"
    kernel: int = 3
    residual: bool = False

    @property
    def convolved(self) -> tuple[str, ...]:
        """The inputs without the residual."""
        return self.inputs[:-1] if self.residual else self.inputs

    @property
    def is_ungated(self) -> bool:
        """Whether no ParNet has such an operation: one without a gate that is not the classifier."""
        return self.kind != "classifier" and self.gate == "none"

    @property
    def described(self) -> dict:
        """The fields that files and digests hold: those of `LATER` only where they differ from the implied value, so
        that older programs keep their digests."""
        fields = asdict(self)
        return {name: value for name, value in fields.items() if name not in LATER or value != LATER[name]}

    @property
    def label(self) -> str:
        """The stage, with the stream's number: "stem", "stream 1", "fusion", "head"."""
        return self.stage if self.stream is None else f"stream {self.stream}"


@dataclass(frozen=True, eq=False)
class Program:
    """Operations in an order in which they can run, and their weights, on the CPU, as "<operation>.<weight>".

    outputs: what it gives, by the names that callers know: operations, or nothing for the logits alone; then the last
    operation is the classifier, which otherwise may be missing.
    Raises ParNetError for what breaks a rule of `Operation` (`contract`).
    """

    config: Config
    operations: tuple[Operation, ...]
    weights: Mapping[str, Tensor]
    outputs: Mapping[str, str] = field(default_factory=dict)
    original: InitVar[Program | None] = None  # the weights it shares with this one are not read again to check them

    def __post_init__(self, original: Program | None) -> None:
        check(self, {} if original is None else original.weights)

    @cached_property
    def by_name(self) -> dict[str, Operation]:
        """Operations by name."""
        return {op.name: op for op in self.operations}

    @property
    def output(self) -> str:
        """The last operation's feature: the logits, where there is a classifier."""
        return self.operations[-1].name

    @property
    def answers(self) -> Mapping[str, str]:
        """What the program gives, by the names that callers know: the features that hold it."""
        return self.outputs or {"logits": self.output}

    @property
    def streams(self) -> int:
        """The number of parallel streams."""
        return len({op.stream for op in self.operations} - {None})

    @property
    def depth(self) -> int:
        """The number of levels: the steps that no parallel machine can avoid."""
        return max(op.level for op in self.operations)

    def check_values(self) -> None:
        """Raise ParNetError where weights are on meta: what such a program has is shapes and costs."""
        if shapes := [name for name, tensor in self.weights.items() if tensor.is_meta]:
            raise ParNetError(f"{shapes[0]} is on the device meta, without its values: fold a model that has them")

    @cached_property
    def launch_groups(self) -> tuple[tuple[Operation, ...], ...]:
        """Operations that one kernel launch runs side by side: those of one level and kind, level after level."""
        found: dict[tuple[int, str], list[Operation]] = {}
        for op in sorted(self.operations, key=lambda op: op.level):
            found.setdefault((op.level, op.kind), []).append(op)
        return tuple(map(tuple, found.values()))

    @property
    def launches(self) -> int:
        """The number of kernel launches of a forward pass: 12 for ParNet."""
        return len(self.launch_groups)

    @property
    def parameters(self) -> int:
        """The number of values in the weights."""
        return sum(t.numel() for t in self.weights.values())

    @cached_property
    def steps(self) -> dict[str, tuple[float, int]]:
        """Step and zero of each feature that is stored in uint8, by name."""
        names = [op.name for op in self.operations if f"{op.name}.zero" in self.weights]
        return {name: (self.weights[f"{name}.step"].item(), int(self.weights[f"{name}.zero"].item())) for name in names}

    @cached_property
    def quantised(self) -> torch.dtype | None:
        """The type of the weights that multiply quantised features, int8 or float8_e4m3fn; None where no feature is."""
        if self.steps:
            return torch.int8
        return E4M3 if any(name.endswith(".step") for name in self.weights) else None

    @property
    def ungated(self) -> bool:
        """Whether the program has operations that no ParNet has; such programs are not quantised."""
        return any(op.is_ungated for op in self.operations)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of operations and weights: equal digests give equal answers."""
        self.check_values()
        sha = hashlib.sha256(json.dumps(self._description(), sort_keys=True).encode())
        for name in sorted(self.weights):
            tensor = self.weights[name]
            sha.update(name.encode() if tensor.dtype == torch.float32 else f"{name} {tensor.dtype}".encode())
            sha.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def weights_of(self, op: Operation) -> dict[str, Tensor]:
        """Return the weights of one operation by their short names, "weight", "bias", ...; see `Operation`."""
        split = ((name.rpartition("."), tensor) for name, tensor in self.weights.items())
        return {short: tensor for (owner, _, short), tensor in split if owner == op.name}

    @cached_property
    def reductions(self) -> dict[str, int]:
        """Picture pixels per pixel of each feature, along one side: timm's reduction; 1 for the picture, `INPUT`."""
        found = {INPUT: 1}
        for op in self.operations:
            found[op.name] = op.stride * found[op.inputs[0]]
        return found

    @cached_property
    def size_multiple(self) -> int:
        """Picture heights and widths must be multiples of this: 32, or more where four streams need it."""
        return math.lcm(32, max(self.reductions.values()))

    def shape(self, feature: str, n: int, h: int, w: int) -> tuple[int, ...]:
        """Return the shape of a feature [N, C, H, W], or of the logits [N, classes], for N pictures of h x w pixels."""
        if feature == INPUT:
            return (n, 3, h, w)
        op, reduction = self.by_name[feature], self.reductions[feature]
        return (n, op.cout) if op.kind == "classifier" else (n, op.cout, h // reduction, w // reduction)

    def cost(self, size: int | None = None, batch: int = 1, itemsize: int = 4) -> Cost:
        """Count FLOPs and bytes of each operation for `batch` square pictures of `size` pixels, or the network's own
        size, with `itemsize` bytes a value, or one where it is quantised. ParNetError for numbers that do not fit."""
        return cost_of(self, size, batch, itemsize)

    def table(self, size: int | None = None) -> str:
        """Describe the program, one operation a line, with FLOPs at the given picture size, or the network's own."""
        return table_of(self, size)

    @with_own_settings
    def to_onnx(self, raw: bool = False) -> onnx.ModelProto:
        """Make the folded network an ONNX model, fp32, of standard operators (opset 17); see `onnx_graph.model_of`.

        Input "input" [batch, 3, height, width], normalised, or raw: uint8, RGB; output "logits" [batch, classes], or
        `outputs` by their names. Batch is open, and so are height and width, which have to be multiples of
        `size_multiple`.
        Raises ParNetError where the package onnx is missing, for networks of more than 2 GB, and for quantised ones.
        """
        if importlib.util.find_spec("onnx") is None:
            raise ParNetError("onnx is not installed here: pip install 'parallel_parnet[export]'")
        self.check_values()
        from .onnx_graph import model_of  # here, since the package is optional

        return model_of(self, raw)

    @with_own_settings
    def to_exported_program(self, raw: bool = False) -> ExportedProgram:
        """Export the folded network by torch.export, for any batch, and any size that leaves no feature a single pixel;
        `torch.export.save` writes it.

        It computes in fp32, which holds a quantised program's numbers as well. Pictures and answers are those of
        `to_onnx`; several answers are a tuple.
        """
        self.check_values()
        return export(self, raw)

    def _description(self) -> dict:
        outputs = {"outputs": dict(self.outputs)} if self.outputs else {}
        return {"config": asdict(self.config), "operations": [op.described for op in self.operations], **outputs}

    def save(self, path: Path | str, beside: Mapping[str, str] | None = None) -> None:
        """Write a .safetensors file, atomically, with the operations as JSON in its metadata. beside: more metadata.

        ParNetError where it cannot be written.
        """
        self.check_values()
        # copied, since safetensors refuses tensors that share memory
        tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in self.weights.items()}
        metadata = {"format": FORMAT, "program": json.dumps(self._description()), **(beside or {})}
        write_safetensors(path, tensors, metadata | {DIGEST: self._seal(metadata)})

    @classmethod
    def load(cls, path: Path | str) -> Program:
        """Read what `save` wrote; ParNetError, naming the file, where it is missing, damaged or foreign."""
        return cls.read(path)[0]

    @classmethod
    def read(cls, path: Path | str) -> tuple[Program, dict[str, str]]:
        """Read what `save` wrote, with all metadata: its own, and what it was given as `beside`. Errors as of
        `load`."""
        if not os.path.isfile(path):
            raise ParNetError(f"{path}: no such program file")
        try:
            with open_safetensors(path) as file:
                metadata = file.metadata() or {}
                # cloned into aligned memory, since libraries choose their arithmetic, to the last bit, by alignment
                weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
            if metadata.get("format") != FORMAT:
                raise ParNetError(f"not a program (format={FORMAT}): load_checkpoint reads checkpoints")
            description = json.loads(metadata["program"])
            config = Config.of(description["config"])
            operations = (Operation(**{**op, "inputs": tuple(op["inputs"])}) for op in description["operations"])
            program = cls(config, tuple(operations), weights, description.get("outputs", {}))
            if metadata.pop(DIGEST, None) != program._seal(metadata):
                raise ParNetError("damaged: its digest does not match")
        except ParNetError as error:
            raise ParNetError(f"{path}: {error}") from None
        except (SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ParNetError(f"{path}: not a whole program file ({error!r})") from None
        return program, metadata

    def _seal(self, metadata: Mapping[str, str]) -> str:
        """SHA-256 of all that a file holds beside the seal itself."""
        return hashlib.sha256(json.dumps([self.digest, metadata], sort_keys=True).encode()).hexdigest()
