"""Segments as Triton kernels: one launch per level, over buffers of their own.

Shape letters: N pictures, H and W height and width, C channels, T tiles of a picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby, pairwise
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ParNetError
from ..kernels.gpu.classifier import Averaged, classifier
from ..kernels.gpu.config import Table
from ..kernels.gpu.convolution import E4M3, Convolution, Operands, allocate, outputs
from ..kernels.gpu.geometry import Geometry, Tile, WarpTile
from ..kernels.gpu.launch import Launch
from ..kernels.gpu.level import level
from ..kernels.gpu.maxpool import TILE, maxpool
from ..kernels.gpu.packing import pack_border, pack_gate_weight, pack_weight, weight_blocks
from ..profiling.spans import Spans, level_name, span
from ..program.placement import Placement, Segment
from ..program.program import INPUT, Operation, Program
from .binding import NHW, Bindings, Layout, Reads, in_same_places
from .queues import wait_for_packing
from .shapes import Shapes

Weights = dict[str, dict[str, Tensor]]
ALIGNMENT = 16  # bytes, of what a feature's tensor holds: the widest load of a kernel
INTERPRETED = (9, 0)  # compute capability whose default tiles the interpreter takes


class Cut(NamedTuple):
    """An operation that makes a feature: its shape, how it is cut into tiles, and, where Triton makes its level, the
    warps and stages."""

    shape: Geometry
    tile: Tile | WarpTile
    num_warps: int = 4
    num_stages: int = 1


class Feature(NamedTuple):
    """A feature as it crosses lanes, pixels and channel sums in one allocation: `message` uint8, in which lie
    y [N, H, W, C] of the storage type, or e4m3, and sums fp32 [N, T, C], where somebody reads them. Of pictures and
    logits, y alone."""

    message: Tensor
    y: Tensor
    sums: Tensor | None = None


def cuts(program: Program, nhw: NHW, table: Table, dtype: torch.dtype) -> dict[str, Cut]:
    """Return how every operation but the classifier is cut, whichever lanes run it: no placement changes the order of
    its sums."""
    n, h, w = nhw
    found: dict[str, Cut] = {}
    for group in program.launch_groups:
        if group[0].kind != "classifier":
            shapes = [geometry(program, op, h, w) for op in group]
            made = _cuts(group, shapes, n, table, multiplied(program, group[0], dtype))
            found.update(zip((op.name for op in group), made, strict=True))
    return found


def _cuts(
    group: Sequence[Operation], shapes: Sequence[Geometry], n: int, table: Table, dtype: torch.dtype
) -> list[Cut]:
    """Cut the convolutions of one level, or its max poolings."""
    if group[0].kind == "maxpool":
        return [Cut(shape, TILE) for shape in shapes]
    if (of_warpgroups := table.of_warpgroups(shapes, n, dtype)) is not None:
        return [Cut(*each) for each in zip(shapes, of_warpgroups, strict=True)]
    config = table.level(shapes, n, dtype)
    made = zip(shapes, config.tiles, strict=True)
    return [Cut(shape, tile, config.num_warps, config.num_stages) for shape, tile in made]


def geometry(program: Program, op: Operation, h: int, w: int) -> Geometry:
    """Return the shape of a convolution of the program, or of a max pooling, where the pictures have h x w pixels."""
    readers = [reader for reader in program.operations if op.name in reader.inputs]
    h, w = program.shape(op.inputs[0], 1, h, w)[2:]
    return Geometry(
        h, w, op.cin, op.cout, op.stride, op.groups, op.shuffle, op.gate, op.activation, len(op.convolved),
        op.inputs[0] == INPUT, op.kernel, op.residual,
        sums=any(reader.kind == "classifier" or reader.gate != "none" for reader in readers),
    )  # fmt: skip


def multiplied(program: Program, op: Operation, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a convolution's products: that of its weights where they are quantised, else `dtype`."""
    return program.quantised or dtype if INPUT not in op.inputs else dtype


def stored(program: Program, feature: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a feature's pixels: e4m3 where it is quantised, else `dtype`."""
    return E4M3 if f"{feature}.step" in program.weights else dtype


def pack(program: Program, dtype: torch.dtype, device: torch.device, names: Iterable[str]) -> Weights:
    """Return weights of the operations of these names as the kernels read them: by operation, then by name.

    Those of convolutions' products depend on how they are cut: `TritonBackend.blocks`.
    """
    packed: Weights = {}
    for op in (program.by_name[name] for name in names):
        w = {name: t.to(device) for name, t in program.weights_of(op).items() if (op.kind, name) != ("conv", "weight")}
        if op.kind == "classifier":
            w["weight"] = w["weight"].to(dtype)
        if "gate_weight" in w:
            w["gate_weight"] = pack_gate_weight(w["gate_weight"], dtype, stored(program, op.name, dtype).itemsize)
        if "scale" in w and f"{op.inputs[0]}.step" in program.weights:
            w["scale"] = w["scale"] * program.weights[f"{op.inputs[0]}.step"].to(device)
        if "border" in w:
            w["border"] = pack_border(w["border"])
        packed[op.name] = w
    return packed


class TritonBackend:
    """A backend of Triton's kernels, or on Hopper of CUDA C++. See `binding.Backend`.

    raw: pictures are uint8, and the program is one that `pixels.fold_pixels` made.
    dtype: of features and weights; of a program in fp8 of all that is not e4m3. Raises ParNetError where a convolution
    reads features in fp8 with other weights.
    devices: of each lane. table: tile shapes, by default those for the first device; on the CPU Triton's interpreter
    runs the kernels, and takes a GPU's. On torch's "meta" device a segment can be compiled for a GPU that is not there.
    """

    in_place = True
    memory_format = torch.contiguous_format

    def __init__(
        self,
        program: Program,
        segments: Sequence[Segment],
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        raw: bool = False,
        table: Table | None = None,
    ) -> None:
        self.program, self.dtype, self.devices = program, dtype, devices
        if program.quantised and (kept := _kept(program)):
            raise ParNetError(f"operation {kept[0]!r} is kept in fp32: the kernels need all in fp8, or executor eager")
        self.storage = torch.uint8 if raw else dtype
        self.table = table or (Table.of_device(devices[0]) if devices[0].type == "cuda" else Table.load(INTERPRETED))
        if devices[0].type == "cpu":
            from ..kernels.gpu import interpreter  # here, since it changes Triton's

            interpreter.install()
        on: dict[torch.device, dict[str, None]] = {}
        for segment in segments:
            on.setdefault(devices[segment.lane], {}).update(dict.fromkeys(segment.operations))
        self.segments = segments
        self.weights = {device: pack(program, dtype, device, names) for device, names in on.items()}
        # on every device, since an answer may be another lane's, and a capture may not copy from the host
        steps = {name: program.weights.get(f"{name}.step") for name in program.answers.values()}
        self._steps = {(n, d): t.to(d) for n, t in steps.items() if t is not None for d in set(devices)}
        wait_for_packing(segments, devices)
        self._blocks: dict[tuple[str, torch.device, tuple[int, ...]], Tensor] = {}
        self._shapes: Shapes[NHW, dict[str, Cut]] = Shapes()

    @property
    def tiles(self) -> str:
        count = self.table.rates.multiprocessors
        return f"{hashlib.sha256(repr(self.table).encode()).hexdigest()[:16]} for {count} multiprocessors"

    def _cuts(self, nhw: NHW) -> dict[str, Cut]:
        return self._shapes(nhw, lambda nhw: cuts(self.program, nhw, self.table, self.dtype))

    def layout(self, feature: str, n: int, h: int, w: int) -> Layout:
        """Return shape and type of a feature's message, bytes as `Feature` has them; logits are fp32 [N, classes].

        Pictures are [N, 3 H, W], of the storage type or uint8: four-dimensional tensors would cross lanes in
        channels_last.
        """
        if feature == INPUT:
            return Layout((n, 3 * h, w), self.storage)
        if self.program.by_name[feature].kind == "classifier":
            return Layout(self.program.shape(feature, n, h, w), torch.float32)
        start, last = self._parts(feature, self._cuts((n, h, w))[feature], n)[-1]
        return Layout((start + last.bytes,), torch.uint8)

    def bind(self, segment: Segment, nhw: NHW, reads: Reads, homes: Mapping[str, Tensor]) -> TritonSegment:
        return TritonSegment(self, segment, nhw, self._cuts(nhw), reads, homes)

    def nchw(self, feature: str, tensor: Tensor, nhw: NHW) -> Tensor:
        """Return a view [N, C, H, W] of a feature's pixels, in the storage type; logits [N, classes] as they are."""
        op = self.program.by_name[feature]
        if op.kind == "classifier":
            return tensor
        y = self.opened(feature, tensor, self._cuts(nhw), nhw).y[..., : op.cout]
        if y.dtype == E4M3:
            y = (y.float() * self._steps[feature, y.device]).to(self.dtype)
        return y.permute(0, 3, 1, 2)

    def blocks(self, operation: str, device: torch.device, cut: Cut) -> Tensor:
        """Return a convolution's weights as a cut reads them, kept for all cuts that need no others."""
        dtype = multiplied(self.program, self.program.by_name[operation], self.dtype)
        key = operation, device, weight_blocks(cut.shape, cut.tile, dtype)
        if key not in self._blocks:
            weight = self.program.weights_of(self.program.by_name[operation])["weight"].to(device)
            self._blocks[key] = pack_weight(weight, cut.shape, cut.tile, dtype)
            wait_for_packing(self.segments, [device])
        return self._blocks[key]

    def opened(self, feature: str, message: Tensor, cuts: Mapping[str, Cut], nhw: NHW) -> Feature:
        """Return a feature's message, with the views of it that kernels read and write."""
        n, h, w = nhw
        if feature == INPUT:
            return Feature(message, message.view(n, 3, h, w))
        if feature not in cuts:
            return Feature(message, message)
        parts = self._parts(feature, cuts[feature], n)
        return Feature(message, *(message[at : at + p.bytes].view(p.dtype).view(p.shape) for at, p in parts))

    def _parts(self, feature: str, cut: Cut, n: int) -> list[tuple[int, Layout]]:
        """Return the layouts of a feature's pixels, and of channel sums if it has them, with the first byte of each."""
        made = outputs(cut.shape, cut.tile, n, stored(self.program, feature, self.dtype))
        found, start = [], 0
        for part in (Layout(*made[name]) for name in ("y", "sums") if name in made):
            found.append((start, part))
            start = -(-(start + part.bytes) // ALIGNMENT) * ALIGNMENT
        return found


class TritonSegment:
    """The launches of a segment over buffers that it reads and writes. See `binding.Runner`.

    A launch allocates nothing and waits for nothing, so a CUDA graph can hold it. homes: tensors in which features are
    to be written, which may lie on a peer of this GPU; for all others there are new ones.
    """

    def __init__(
        self,
        backend: TritonBackend,
        segment: Segment,
        nhw: NHW,
        cuts: Mapping[str, Cut],
        reads: Reads,
        homes: Mapping[str, Tensor],
    ) -> None:
        self.backend, self.nhw, self.cuts, self.reads, self.homes = backend, nhw, cuts, reads, homes
        self.device = backend.devices[segment.lane]
        self._features = {
            name: backend.opened(name, message, cuts, nhw) for name, message in zip(segment.reads, reads, strict=True)
        }
        self._operations = sorted(
            (backend.program.by_name[name] for name in segment.operations), key=lambda op: (op.level, op.kind)
        )
        self._alone = len(segment.operations) == len(backend.program.operations)  # nobody runs beside it
        self.convolutions: dict[str, Convolution] = {}  # by operation
        for op in self._operations:
            made = self._features[op.name] = self._make(op.name)
            if op.kind == "conv":
                self.convolutions[op.name] = self._convolution(op, made)
        by_launch = groupby(self._operations, lambda op: (op.level, op.name if op.kind == "maxpool" else op.kind))
        groups = [list(group) for _, group in by_launch]
        self.launches = [self._launch(now, level_name(now[0].level), after) for now, after in pairwise([*groups, []])]
        self.outputs = tuple(self._features[name].message for name in segment.writes)
        if self.device.type == "cuda" and any(isinstance(cuts[name].tile, WarpTile) for name in self.convolutions):
            hopper().prepare(self.launches)

    def fits(self, reads: Reads) -> bool:
        return in_same_places(reads, self.reads)

    def __call__(self, reads: Reads = (), spans: Spans | None = None) -> tuple[Tensor, ...]:
        return self._start(self.launches, spans)

    def run_stepwise(self, reads: Reads, spans: Spans) -> tuple[Tensor, ...]:
        """Return what a call returns, computed with a launch for each operation, in a span of its own."""
        return self._start(self._single_launches, spans)

    def _start(self, launches: Sequence[Launch], spans: Spans | None) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(self.reads[0]):
            for launch in launches:
                with span(spans, launch.name):
                    launch()
        return self.outputs

    @cached_property
    def _single_launches(self) -> list[Launch]:
        return [replace(self._launch([op], op.name), name=op.name) for op in self._operations]

    def _launch(self, group: Sequence[Operation], name: str, after: Sequence[Operation] = ()) -> Launch:
        if group[0].kind == "conv":
            cut = self.cuts[group[0].name]
            convolutions = [self.convolutions[op.name] for op in group]
            if isinstance(cut.tile, WarpTile):
                ahead = [self._weight(op) for op in after if op.kind != "maxpool"] if self.backend.table.ahead else []
                return hopper().level(convolutions, name, early=self._alone, ahead=ahead)
            return level(convolutions, cut.num_warps, cut.num_stages, name)
        (op,) = group
        if op.kind == "maxpool":
            made, shape = self._features[op.name], self.cuts[op.name].shape
            return maxpool(self._features[op.inputs[0]].y, made.y, made.sums, shape, name)
        averages = [self._averaged(name) for name in op.inputs]
        bias = self.backend.weights[self.device][op.name]["bias"]
        return classifier(averages, self._weight(op), bias, self._features[op.name].y)

    def _weight(self, op: Operation) -> Tensor:
        """Return an operation's weight as its launch reads it."""
        if op.kind == "conv":
            return self.convolutions[op.name].x.weight
        return self.backend.weights[self.device][op.name]["weight"]

    def _averaged(self, name: str) -> Averaged:
        feature = self._features[name]
        assert feature.sums is not None
        _, height, width, _ = feature.y.shape
        return Averaged(feature.sums, self.backend.program.by_name[name].cout, height * width)

    def _convolution(self, op: Operation, made: Feature) -> Convolution:
        a, *second = (self._features[name] for name in op.convolved)
        b = second[0] if second else None
        w, cut = self.backend.weights[self.device][op.name], self.cuts[op.name]
        layouts = outputs(cut.shape, cut.tile, self.nhw[0], made.y.dtype)
        given = {"y": made.y, "sums": made.sums}
        a_sums, b_sums = (a.sums, b and b.sums) if op.gate != "none" else (None, None)
        x = Operands(
            a.y, b and b.y, a_sums, b_sums, self.backend.blocks(op.name, self.device, cut), w["bias"], w.get("border"),
            w.get("gate_weight"), w.get("gate_bias"), w.get("scale"), w.get("shift"),
            self._features[op.inputs[-1]].y if op.residual else None, **allocate(layouts, self.device, given),
            weight_step=w.get("weight_step"), step=w.get("step"),
        )  # fmt: skip
        return Convolution(x, cut.shape, cut.tile)

    def _make(self, name: str) -> Feature:
        message = self.homes.get(name)
        if message is None:
            shape, dtype = self.backend.layout(name, *self.nhw)
            message = torch.empty(shape, dtype=dtype, device=self.device)
        return self.backend.opened(name, message, self.cuts, self.nhw)


def hopper() -> ModuleType:
    """Import the module that launches kernels of Hopper's warpgroups, which needs CUDA's bindings."""
    from ..kernels.hopper import launch

    return launch


def _kept(program: Program) -> list[str]:
    """Convolutions of features that are not in fp8, of a program that has others."""
    read = [op for op in program.operations if op.kind == "conv" and INPUT not in op.inputs]
    return [op.name for op in read if f"{op.name}.weight_step" not in program.weights]


def whole(
    program: Program, nhw: NHW, dtype: torch.dtype, device: torch.device, table: Table | None = None, raw: bool = False
) -> TritonSegment:
    """Bind a whole program on one lane, with pictures of its own to read (`reads[0]`) and logits (`outputs[0]`)."""
    placement = Placement.single(program)
    (segment,) = placement.segments(program)
    backend = TritonBackend(program, [segment], [device], dtype, raw, table)
    return backend.bind(segment, nhw, (Bindings(backend, nhw, device).picture,), {})
