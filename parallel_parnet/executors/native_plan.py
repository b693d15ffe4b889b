"""A segment as tasks of the CPU kernels: what threads take on each level, and the buffers in between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu import native
from ..kernels.cpu.native import Op, Panel, Task
from ..profiling.spans import Spans, span
from ..program.program import INPUT, Operation
from .binding import address
from .native_algorithm import algorithm, tiles
from .native_weights import pack
from .segment import SegmentModule

# of a task, at most; the same for any number of threads, since sums are kept by task
TILES, FEWER = {native.F2: 98, native.F4: 98, native.S2: 98, native.S4: 49}, 25
PIXELS, ROWS = 256, 8
TILE_ROWS = 8  # that a product makes at once, at most; also where fewer are left
LINE = 64  # bytes, of a line of the cache
TASKS_PER_THREAD = 2  # on a level, where there are enough channels to split
SHARED = 3  # tasks, at least, for which an input is transformed once: two have it in their caches sooner by themselves
# channels, at least, of what tasks transform side by side, as the longest vector stores them
NEIGHBOURS = {native.F32: 16, native.BF16: 16, native.U8: 32}


@dataclass(frozen=True)
class Feature:
    """A feature map with a border of `edge` zeros, [N, H + 2 edge, W + 2 edge, C], and its channels' sums, where a gate
    or a classifier reads them, [N, chunks, C].

    padded: of one of `native.TYPES`. Its values, and what the sums are of, are step * (padded - zero).
    copy: the same in fp32, where somebody reads that.
    """

    padded: Tensor
    sums: Tensor | None
    edge: int = 1
    step: float = 1.0
    zero: int = 0
    copy: Tensor | None = None

    @property
    def kind(self) -> int:
        """In the kernels' numbers."""
        return native.TYPES.index(self.padded.dtype)

    @property
    def fp32(self) -> Tensor:
        """[N, H + 2 edge, W + 2 edge, C]."""
        return self.padded if self.copy is None else self.copy

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.padded.shape[1] - 2 * self.edge, self.padded.shape[2] - 2 * self.edge

    @property
    def nchw(self) -> Tensor:
        """[N, C, H, W] in fp32, where it lies."""
        return self.fp32[:, self.edge : -self.edge, self.edge : -self.edge].permute(0, 3, 1, 2)


class NativePlan:
    """A segment, ready to run for inputs of these shapes: fp32 on the CPU, with any strides; out come
    buffers, which the next call overwrites.

    All operations of a level run side by side, on `threads` threads.
    dtype: fp32 or bf16, of the products and of features, where the program has not quantised them. The convolution
    that reads the picture computes in fp32.
    """

    def __init__(
        self,
        module: SegmentModule,
        shapes: Sequence[Sequence[int]],
        threads: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.threads, self.module, self.n, self.dtype = threads, module, shapes[0][0], dtype
        self._ops: list[Op] = []
        self._names: list[str] = []
        self._kept: list[object] = []  # what the structs point to
        self._scratch = self._counts = self._shared = self._shared_size = 0
        self._sharing: list[tuple[Op, int]] = []  # and where in the shared memory their rows are
        self._free: dict[tuple[object, ...], list[Tensor]] = {}
        self._features: dict[str, Feature] = {}
        self._logits: dict[str, Tensor] = {}
        # features that somebody reads in fp32: the caller, or a convolution that is not quantised as they are
        self._in_fp32 = {*module.segment.writes} | {
            name
            for op, w in module.operations
            for name in op.inputs
            if op.kind == "conv" and name in module.steps and self._kind(op, w) != native.U8
        }
        # of the others nobody reads the sums
        self._summed = {
            name for op, _ in module.operations for name in op.inputs if op.kind == "classifier" or op.gate != "none"
        }
        tasks = [
            task for name, shape in zip(module.segment.reads, shapes, strict=True) for task in self._read(name, shape)
        ]
        ends = [len(tasks)]
        for level in sorted({op.level for op, _ in module.operations}):
            self._shared = 0
            tasks += self._level([(op, w) for op, w in module.operations if op.level == level])
            ends.append(len(tasks))
            self._release(level)
        self._arguments = self._call(tasks, ends)
        self._outputs = tuple(
            self._logits[name] if name in self._logits else self._features[name].nchw for name in module.segment.writes
        )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        self._read_at(inputs)
        self.run()
        return self._outputs

    def apart(self, inputs: Sequence[Tensor], spans: Spans) -> tuple[Tensor, ...]:
        """The same operation by operation, each on all threads and in a span of its own."""
        self._read_at(inputs)
        for name, step in self.steps().items():
            with span(None if name in self.module.segment.reads else spans, name):
                step()
        return self._outputs

    def _read_at(self, inputs: Sequence[Tensor]) -> None:
        for op, x in zip(self._arguments[0], inputs, strict=False):  # which the first operations read
            op.x[0], op.strides[:] = address(x), x.stride()

    def run(self) -> None:
        """The kernels alone."""
        native.library().run(*self._arguments)

    def steps(self) -> dict[str, Callable[[], object]]:
        """The kernels of each operation by its name, in an order in which all, one after the other, are a run; first,
        by the names of what is read, those that bring it in, from where the last call had it."""
        own: dict[str, list[Task]] = {name: [] for name in self._names}
        for task in self._arguments[1]:
            own[self._names[task.op]].append(task)
        return {name: partial(self._step, (Task * len(tasks))(*tasks)) for name, tasks in own.items()}

    def _step(self, tasks: ctypes.Array) -> None:
        ops, _, _, _, *rest = self._arguments
        native.library().run(ops, tasks, (native.INT * 1)(len(tasks)), 1, *rest)

    def _read(self, name: str, shape: Sequence[int]) -> list[Task]:
        n, c, h, w = shape
        chunks = -(-h // ROWS)
        kernels = [op.kernel for op, _ in self.module.operations if name == INPUT and name in op.inputs]
        x = self._feature(name, n, h, w, c, chunks, edge=max([3, *kernels]) // 2)
        picture = self._array(native.POINTER, [0])  # which each call fills in
        index = self._add(name, Op(x=picture, **_output(x), h=h, w=w, cout=c, chunks=chunks, edge=x.edge))
        return [Task(index, native.IMPORT, *part) for part in _parts(n, h, ROWS)]

    def _level(self, operations: list[tuple[Operation, dict[str, Tensor]]]) -> list[Task]:
        """Gates and transforms first, since convolutions wait for them; then the longest."""
        first: list[Task] = []
        others: list[tuple[float, Task]] = []
        for op, w in operations:
            inputs = [self._features[name] for name in op.inputs]
            if op.kind == "classifier":
                others += [(0, task) for task in self._classifier(op, w, inputs)]
            elif op.kind == "maxpool":
                others += [(0, task) for task in self._pool(op, w, *inputs)]
            else:
                before, tasks = self._convolution(op, w, inputs, len(operations))
                gates = range(self.n if op.gate != "none" else 0)
                first = [Task(len(self._ops) - 1, native.GATE, n) for n in gates] + first + before
                others += [(_work(op, self._ops[-1].how, task), task) for task in tasks]
        return first + [task for _, task in sorted(others, key=lambda pair: -pair[0])]

    def _convolution(
        self, op: Operation, w: dict[str, Tensor], inputs: list[Feature], beside: int
    ) -> tuple[list[Task], list[Task]]:
        """What transforms its input, where tasks share that, and what convolves. beside: operations on this level."""
        residual = inputs[-1] if op.residual else None
        inputs = inputs[: len(op.convolved)]
        h, width = inputs[0].size
        kind = self._kind(op, w)
        dtype = native.TYPES[kind]
        out_h, out_w = h // op.stride, width // op.stride
        how = algorithm(op, w, kind, out_h, out_w)
        each = _places_of_a_task(how, out_h, out_w)
        parts = _parts(self.n, tiles(how, out_h, out_w), each)
        chunks = len(parts) // self.n
        which = native.panels(op.cout, op.groups, op.shuffle)
        y = self._feature(op.name, self.n, out_h, out_w, op.cout, chunks)
        weights = self.module.packed((op.name, how), lambda: pack(op, w, [x.zero for x in inputs], which, dtype, how))
        table = self._array(Panel, [Panel(*panel) for panel in which])
        gates = [native.zeros(self.n, op.cout) for _ in range(2 if op.gate != "none" else 0)]
        self._kept += gates
        index = self._add(
            op.name,
            Op(
                **self._inputs(inputs, kind), **_output(y), **{name: _at(tensor) for name, tensor in weights.items()},
                **dict(zip(("multiply", "add"), map(_at, gates), strict=False)),
                residual=None if residual is None else _at(_read_as(residual, kind)),
                panels=ctypes.addressof(table), cout=op.cout, groups=op.groups, stride=op.stride,
                panel_count=len(which), chunks=chunks, kernel=op.kernel,
                activation=native.ACTIVATIONS.index(op.activation), border="border" in w, how=how, counts=self._counts,
            )
        )  # fmt: skip
        self._counts += self.n + len(parts)
        split = min(len(which), -(-TASKS_PER_THREAD * self.threads // (len(parts) * beside)))
        panels = list(pairwise(len(which) * i // split for i in range(split + 1)))
        self._need(op.cin)
        transforms: list[Task] = []
        if how != native.DIRECT:
            found = native.ALGORITHMS[how]
            rows = each * found.tiles[0][1] ** 2 + found.weights + 2 * TILE_ROWS
            library = native.library()
            self._need(rows * (op.cin + library.panel_width() * library.panels_at_once() + native.SLACK))
            if len(panels) >= SHARED:
                size = max(2, dtype.itemsize)  # of a transformed value
                transforms = self._share(index, rows * (op.cin + native.SLACK) * size, parts, len(panels))
        return transforms, [Task(index, native.CONVOLVE, *part, *some) for part in parts for some in panels]

    def _share(self, index: int, size: int, parts: list[tuple[int, int, int, int]], split: int) -> list[Task]:
        """Tasks that transform an operation's input once for all others, so many for each part; size: bytes of one."""
        op = self._ops[index]
        channels = op.c * op.inputs
        side = NEIGHBOURS[op.x_type]
        whole = op.c // op.groups % side == 0
        each = side * -(-channels // (side * split)) if whole else channels
        some = [(start, min(start + each, channels)) for start in range(0, channels, each)]
        op.rows_size, op.transforms = -(-size // LINE) * LINE, len(some)
        self._sharing.append((op, self._shared))
        self._shared += op.rows_size * len(parts)
        self._shared_size = max(self._shared_size, self._shared)
        return [Task(index, native.TRANSFORM, *part, *range_) for part in parts for range_ in some]

    def _pool(self, op: Operation, w: dict[str, Tensor], x: Feature) -> list[Task]:
        h, width = (side // op.stride for side in x.size)
        parts = _parts(self.n, h * width, PIXELS)
        chunks = len(parts) // self.n
        y = self._feature(op.name, self.n, h, width, op.cout, chunks)
        inputs = self._inputs([x], self._kind(op, w))
        index = self._add(op.name, Op(**inputs, **_output(y), cout=op.cout, stride=op.stride, chunks=chunks))
        return [Task(index, native.POOL, *part) for part in parts]

    def _kind(self, op: Operation, w: dict[str, Tensor]) -> int:
        """The type of an operation's products, in the kernels' numbers."""
        if "weight_step" in w:
            return native.U8
        return native.F32 if INPUT in op.inputs else native.TYPES.index(self.dtype)

    def _classifier(self, op: Operation, w: dict[str, Tensor], inputs: list[Feature]) -> list[Task]:
        logits = self._logits[op.name] = torch.empty(self.n, op.cout, dtype=torch.float32, device="cpu")
        weights = self.module.packed(
            (op.name,), lambda: {name: native.with_slack(w[name]) for name in ("weight", "bias")}
        )
        index = self._add(
            op.name,
            Op(
                **self._inputs(inputs, native.F32), y=_at(logits), cout=op.cout, groups=1,
                **{name: _at(tensor) for name, tensor in weights.items()},
            )
        )  # fmt: skip
        self._need(op.cin)
        each = -(-op.cout // (TASKS_PER_THREAD * self.threads))
        return [Task(index, native.CLASSIFIER, *part) for part in _parts(self.n, op.cout, each)]

    def _inputs(self, inputs: list[Feature], kind: int) -> dict:
        """kind: the type in which an operation reads them."""
        x, (h, w) = inputs[0], inputs[0].size
        return {
            "x": self._array(native.POINTER, [_at(_read_as(i, kind)) for i in inputs]),
            "x_sums": self._array(native.POINTER, [_at(i.sums) for i in inputs]),
            "x_chunks": self._array(native.INT, [0 if i.sums is None else i.sums.shape[1] for i in inputs]),
            "x_step": self._array(native.FLOAT, [i.step for i in inputs]),
            "x_zero": self._array(native.FLOAT, [i.zero for i in inputs]),
            "x_type": kind, "h": h, "w": w, "c": x.padded.shape[3], "inputs": len(inputs), "edge": x.edge,
        }  # fmt: skip

    def _array(self, kind: Any, values: Sequence[object]) -> ctypes.Array:
        made = (kind * len(values))(*values)
        self._kept.append(made)
        return made

    def _add(self, name: str, op: Op) -> int:
        self._names.append(name)
        self._ops.append(op)
        return len(self._ops) - 1

    def _need(self, floats: int) -> None:
        """Scratch memory of each thread."""
        self._scratch = max(self._scratch, floats + native.SLACK)

    def _feature(self, name: str, n: int, h: int, w: int, c: int, chunks: int, edge: int = 1) -> Feature:
        """Its border is zeros also where another feature of this shape stood before."""
        step, zero = self.module.steps.get(name, (1.0, 0))
        quantised = name in self.module.steps
        dtype = torch.uint8 if quantised else torch.float32 if name == INPUT else self.dtype
        shape = n, h + 2 * edge, w + 2 * edge, c
        padded = self._buffer(shape, dtype, zero)
        copy = self._buffer(shape, torch.float32, 0) if dtype != torch.float32 and name in self._in_fp32 else None
        sums = native.zeros(n, chunks, c) if name in self._summed else None
        feature = self._features[name] = Feature(padded, sums, edge, step, zero, copy)
        self._kept.append(feature)
        return feature

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype, zero: int) -> Tensor:
        free = self._free.get((shape, dtype, zero))
        return free.pop() if free else native.zeros(*shape, dtype=dtype).fill_(zero)

    def _release(self, level: int) -> None:
        """Give back features that nothing reads after this level."""
        read = {name for op, _ in self.module.operations if op.level > level for name in op.inputs}
        for name in [name for name in self._features if name not in read and name not in self.module.segment.writes]:
            feature = self._features.pop(name)
            for tensor, zero in ((feature.padded, feature.zero), (feature.copy, 0)):
                if tensor is not None:
                    self._free.setdefault((tuple(tensor.shape), tensor.dtype, zero), []).append(tensor)

    def _call(self, tasks: list[Task], ends: list[int]) -> tuple:
        """The arguments of native.c's `run`."""
        sizes = 3 * len(ends), 2 * max(1, self._counts)  # in int32s: native.c's `Level` and `Count`
        states, counts = (torch.zeros(size, dtype=torch.int32, device="cpu") for size in sizes)
        size = -(-4 * max(1, self._scratch) // LINE) * LINE
        sizes = self.threads * size, self._shared_size
        scratch, shared = (native.zeros(size, dtype=torch.uint8) for size in sizes)
        self._kept += [states, counts, scratch, shared]
        for op, offset in self._sharing:
            op.rows = shared.data_ptr() + offset
        return (
            (Op * len(self._ops))(*self._ops), (Task * len(tasks))(*tasks), (native.INT * len(ends))(*ends), len(ends),
            *(ctypes.c_void_p(_at(t)) for t in (states, counts)), self._counts, self.n, ctypes.c_void_p(_at(scratch)),
            ctypes.c_int64(size), self.threads,
        )  # fmt: skip


def _read_as(x: Feature, kind: int) -> Tensor:
    """Where an operation reads a feature in this type."""
    return x.padded if x.kind == kind else x.fp32


def _output(y: Feature) -> dict:
    return {
        "y": _at(y.padded), "copy": _at(y.copy), "sums": _at(y.sums),
        "y_type": y.kind, "step": y.step, "zero": y.zero, "per_step": 1 / y.step,
    }  # fmt: skip


def _places_of_a_task(how: int, h: int, width: int) -> int:
    """Pixels of a direct convolution, else tiles. Evenly: 28 x 28 pixels, of which a task has 9 rows at most, are four
    tasks of 7 rows."""
    if how == native.DIRECT:
        unit, most = width if width <= PIXELS else 1, PIXELS  # whole rows: blocks of pixels begin where one does
    else:  # fewer where there is no AVX-512, since second caches are often smaller there
        unit, most = 1, TILES[how] if native.library().panels_at_once() == 1 else FEWER
    units = tiles(how, h, width) // unit
    tasks = -(-units // (most // unit))
    return unit * -(-units // tasks)


def _work(op: Operation, how: int, task: Task) -> float:
    """Multiplications of a task, for comparison."""
    taps = op.kernel**2 if how == native.DIRECT else native.ALGORITHMS[how].tiles[0][1] ** 2
    places = (task.stop - task.start) * taps
    return places * (task.panel_stop - task.panel_start) * op.cin / op.groups


def _parts(n: int, count: int, each: int) -> list[tuple[int, int, int, int]]:
    """(picture, chunk, start, stop): `each` at a time, of `count` in each of n pictures."""
    return [(i, start // each, start, min(start + each, count)) for i in range(n) for start in range(0, count, each)]


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else address(tensor)
