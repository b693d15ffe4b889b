"""A segment as tasks of the CPU kernels: what threads take on each level, and the buffers in between."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import ParNetError
from ..kernels.cpu import native
from ..kernels.cpu.native import Op, Pass, Task
from ..kernels.cpu.shared import NUMBERS, STRUCTS
from ..profiling.spans import Spans, span
from ..program.program import INPUT, Operation
from .binding import address, in_fp32
from .native_algorithm import algorithm_of, tiles
from .native_feature import Feature
from .native_weights import pack
from .segment import SegmentModule

# of a task, at most; the same for any number of threads, since sums are kept by task
TILES, FEWER = {native.F2: 98, native.F4: 98, native.S2: 98, native.S4: 49}, 25
PIXELS, ROWS = NUMBERS["MOST_PIXELS"], 8
TILE_ROWS = 8  # that a product makes at once, at most; also where fewer are left
# on a level, where there are enough channels to split: so many if there are more than NARROW, else one, since what
# threads make for each other has to come out of each other's caches
TASKS_PER_THREAD, NARROW = 2, 128
SHARED = 3  # tasks, at least, for which an input is transformed once: two have it in their caches sooner by themselves
# channels, of which each of the tasks that share a transform takes a multiple: what the longest vector stores
NEIGHBOURS = {torch.float32: 16, torch.bfloat16: 16, torch.uint8: 32}
Part = dict[str, int]  # values of some of a Task's fields


class NativePlan:
    """A segment, ready to run for inputs of `shapes`: tensors on the CPU, of any type that an engine takes, and of any
    strides. A call gives the plan's own buffers, which the next call overwrites. ParNetError where a convolution is
    larger than the kernels compute.

    All operations of a level run side by side, on `threads` threads.
    dtype: fp32 or bf16, of the products and of features, where the program has not quantised them. The convolution
    that reads the picture computes in fp32.
    ops, tasks, ends: what the kernels run; tasks of level i are tasks[ends[i - 1] : ends[i]].
    """

    def __init__(
        self,
        module: SegmentModule,
        shapes: Sequence[Sequence[int]],
        threads: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.threads, self.module, self.n, self.dtype = threads, module, shapes[0][0], dtype
        for op, _ in module.operations:
            _check(op)
        self._made: list[Op] = []
        self._names: list[str] = []  # of the operations made
        self._pictures: list[ctypes.Array] = []  # addresses of the inputs
        self._kept: list[object] = []  # what the structs point to
        self._scratch = self._counts = self._shared = self._shared_size = 0
        self._sharing: list[tuple[int, int]] = []  # operations, and where in the shared memory their rows are
        self._free: dict[tuple[object, ...], list[Tensor]] = {}
        self._features: dict[str, Feature] = {}
        self._logits: dict[str, Tensor] = {}
        # features that somebody reads in fp32: the caller, or a convolution that is not quantised as they are
        self._in_fp32 = {*module.segment.writes} | {
            name
            for op, w in module.operations
            for name in op.inputs
            if op.kind == "conv" and name in module.steps and self._dtype(op, w) != torch.uint8
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
        self.ops, self.tasks = (Op * len(self._made))(*self._made), (Task * len(tasks))(*tasks)
        self.ends = (ctypes.c_int32 * len(ends))(*ends)
        self.imports = list(zip(self.ops, self._pictures, strict=False))  # what reads each input, and its address
        self._pass = self._whole_pass()
        self._run = partial(native.library().run, ctypes.byref(self._pass))
        self.outputs = tuple(
            self._logits[name] if name in self._logits else self._features[name].nchw for name in module.segment.writes
        )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        readable = tuple(map(_readable, inputs))
        self._read_at(readable)
        self.run()
        return self.outputs

    def run_stepwise(self, inputs: Sequence[Tensor], spans: Spans) -> tuple[Tensor, ...]:
        """Return what a call returns, computed operation by operation, each on all threads and in a span of its own."""
        readable = tuple(map(_readable, inputs))
        self._read_at(readable)
        for name, step in self.steps().items():
            with span(None if name in self.module.segment.reads else spans, name):
                step()
        return self.outputs

    def _read_at(self, inputs: Sequence[Tensor]) -> None:
        for (op, picture), x in zip(self.imports, inputs, strict=True):
            picture[0], op.x_type, op.strides = address(x), native.TYPES[x.dtype], x.stride()

    def run(self) -> None:
        """Run the kernels alone, on what the last call read."""
        self._run()

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return what runs the kernels of each operation alone, by its name; calling all in this order is a run.

        Those that import what is read come first, by the names of the features; they read what the last call read.
        """
        own: dict[str, list[Task]] = {name: [] for name in self._names}
        for task in self.tasks:
            own[self._names[task.op]].append(task)
        return {name: partial(self._step, (Task * len(tasks))(*tasks)) for name, tasks in own.items()}

    def _step(self, tasks: ctypes.Array) -> None:
        step, ends = Pass.from_buffer_copy(self._pass), ctypes.c_int32(len(tasks))
        step.tasks, step.ends, step.levels = ctypes.addressof(tasks), ctypes.addressof(ends), 1
        native.library().run(ctypes.byref(step))

    def _read(self, name: str, shape: Sequence[int]) -> list[Task]:
        n, c, h, w = shape
        chunks = -(-h // ROWS)
        kernels = [op.kernel for op, _ in self.module.operations if name == INPUT and name in op.inputs]
        x = self._feature(name, n, h, w, c, chunks, edge=max([native.FEATURE_KERNEL, *kernels]) // 2)
        self._pictures.append((ctypes.c_void_p * 1)())
        picture = ctypes.addressof(self._pictures[-1])
        index = self._add(name, Op(x=picture, **_output(x), h=h, w=w, cout=c, chunks=chunks, edge=x.edge))
        return [Task(op=index, kind=native.IMPORT, **part) for part in _parts(n, h, ROWS)]

    def _level(self, operations: list[tuple[Operation, dict[str, Tensor]]]) -> list[Task]:
        """The tasks of a level: gates, transforms, and then the longest first.

        Convolutions wait for gates and transforms. Threads take tasks in order, so whatever one waits for was taken
        before, by a thread that waits for nothing.
        """
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
                # a gate is one task for all its channels, so it starts before the transforms, which many tasks share
                first = [Task(op=len(self._made) - 1, kind=native.GATE, n=n) for n in gates] + first + before
                others += [(_work(op, self._made[-1].algorithm, task), task) for task in tasks]
        return first + [task for _, task in sorted(others, key=lambda pair: -pair[0])]

    def _convolution(
        self, op: Operation, w: dict[str, Tensor], inputs: list[Feature], beside: int
    ) -> tuple[list[Task], list[Task]]:
        """The tasks that transform a convolution's input, where others share that, and those that convolve.

        beside: how many operations are on its level.
        """
        residual = inputs[-1] if op.residual else None
        inputs = inputs[: len(op.convolved)]
        h, width = inputs[0].size
        dtype = self._dtype(op, w)
        out_h, out_w = h // op.stride, width // op.stride
        algorithm = algorithm_of(op, w, dtype, out_h, out_w)
        each = _places_of_a_task(algorithm, out_h, out_w)
        parts = _parts(self.n, tiles(algorithm, out_h, out_w), each)
        chunks = len(parts) // self.n
        panels = native.panels_of(op.cout, op.groups, op.shuffle)
        y = self._feature(op.name, self.n, out_h, out_w, op.cout, chunks)
        weights = self.module.packed((op.name, algorithm), lambda: pack(op, w, inputs, panels, dtype, algorithm))
        gates = [native.zeros(self.n, op.cout) for _ in range(2 if op.gate != "none" else 0)]
        self._kept += gates
        index = self._add(
            op.name,
            Op(
                **self._inputs(inputs, dtype), **_output(y), **{name: _at(tensor) for name, tensor in weights.items()},
                **dict(zip(("multiply", "add"), map(_at, gates), strict=False)),
                residual=None if residual is None else _at(residual.read_as(dtype)),
                panels=self._array(native.Panel, panels), cout=op.cout, groups=op.groups, stride=op.stride,
                panel_count=len(panels), chunks=chunks, kernel=op.kernel, algorithm=algorithm, counts=self._counts,
                activation=native.ACTIVATIONS[op.activation], border="border" in w,
            )
        )  # fmt: skip
        self._counts += self.n + len(parts)
        per_thread = TASKS_PER_THREAD if op.cin > NARROW else 1
        split = min(len(panels), -(-per_thread * self.threads // (len(parts) * beside)))
        shares = _ranges(len(panels) * i // split for i in range(split + 1))
        self._need(op.cin)
        transforms: list[Task] = []
        if algorithm != native.DIRECT:
            along = native.ALGORITHMS[algorithm]
            rows = each * along.tiles[0][1] ** 2 + along.weights + 2 * TILE_ROWS
            library = native.library()
            self._need(rows * (op.cin + library.panel_width() * library.panels_at_once() + native.SLACK))
            if len(shares) >= SHARED:
                bytes_ = max(2, dtype.itemsize)  # of a transformed value
                size = rows * (op.cin + native.SLACK) * bytes_
                transforms = self._share(index, size, parts, len(shares), NEIGHBOURS[dtype])
        return transforms, [Task(op=index, kind=native.CONVOLVE, **part, **share) for part in parts for share in shares]

    def _share(self, index: int, size: int, parts: list[Part], split: int, side: int) -> list[Task]:
        """The tasks that transform an operation's input once for all that convolve it, at most `split` for each part.

        size: bytes of what they make of a part. side: channels, of which each takes a multiple where that can be.
        """
        op = self._made[index]
        channels = op.c * op.inputs
        whole = op.c // op.groups % side == 0
        each = side * -(-channels // (side * split)) if whole else channels
        shares = _ranges([*range(0, channels, each), channels])
        op.rows_size, op.transforms = -(-size // native.LINE) * native.LINE, len(shares)
        self._sharing.append((index, self._shared))
        self._shared += op.rows_size * len(parts)
        self._shared_size = max(self._shared_size, self._shared)
        return [Task(op=index, kind=native.TRANSFORM, **part, **share) for part in parts for share in shares]

    def _pool(self, op: Operation, w: dict[str, Tensor], x: Feature) -> list[Task]:
        h, width = (side // op.stride for side in x.size)
        parts = _parts(self.n, h * width, PIXELS)
        chunks = len(parts) // self.n
        y = self._feature(op.name, self.n, h, width, op.cout, chunks)
        inputs = self._inputs([x], self._dtype(op, w))
        index = self._add(op.name, Op(**inputs, **_output(y), cout=op.cout, stride=op.stride, chunks=chunks))
        return [Task(op=index, kind=native.POOL, **part) for part in parts]

    def _dtype(self, op: Operation, w: dict[str, Tensor]) -> torch.dtype:
        """The type of the features that an operation reads, as far as they are kept in it, and of its products."""
        if "weight_step" in w:
            return torch.uint8
        return torch.float32 if INPUT in op.inputs else self.dtype

    def _classifier(self, op: Operation, w: dict[str, Tensor], inputs: list[Feature]) -> list[Task]:
        logits = self._logits[op.name] = torch.empty(self.n, op.cout, dtype=torch.float32, device="cpu")
        weights = self.module.packed(
            (op.name,), lambda: {name: native.with_slack(w[name]) for name in ("weight", "bias")}
        )
        index = self._add(
            op.name,
            Op(
                **self._inputs(inputs, torch.float32), y=_at(logits), cout=op.cout, groups=1,
                **{name: _at(tensor) for name, tensor in weights.items()},
            )
        )  # fmt: skip
        self._need(op.cin)
        each = -(-op.cout // (TASKS_PER_THREAD * self.threads))
        return [Task(op=index, kind=native.CLASSIFIER, **part) for part in _parts(self.n, op.cout, each)]

    def _inputs(self, inputs: list[Feature], dtype: torch.dtype) -> dict:
        """The fields of an Op that say what it reads. dtype: the type in which it reads it."""
        x, (h, w) = inputs[0], inputs[0].size
        return {
            "x": self._array(ctypes.c_void_p, [_at(i.read_as(dtype)) for i in inputs]),
            "x_sums": self._array(ctypes.c_void_p, [_at(i.sums) for i in inputs]),
            "x_chunks": self._array(ctypes.c_int32, [0 if i.sums is None else i.sums.shape[1] for i in inputs]),
            "x_step": self._array(ctypes.c_float, [i.step for i in inputs]),
            "x_zero": self._array(ctypes.c_float, [i.zero for i in inputs]),
            "x_type": native.TYPES[dtype], "h": h, "w": w, "c": x.padded.shape[3], "inputs": len(inputs),
            "edge": x.edge, "pitch": x.pitch,
        }  # fmt: skip

    def _array(self, type_: Any, values: Sequence[object]) -> int:
        """The address of an array of ctypes' `type_` that holds these values."""
        made = (type_ * len(values))(*values)
        self._kept.append(made)
        return ctypes.addressof(made)

    def _add(self, name: str, op: Op) -> int:
        self._names.append(name)
        self._made.append(op)
        return len(self._made) - 1

    def _need(self, floats: int) -> None:
        """Makes each thread's scratch memory at least as large."""
        self._scratch = max(self._scratch, floats + native.SLACK)

    def _feature(self, name: str, n: int, h: int, w: int, c: int, chunks: int, edge: int = native.EDGE) -> Feature:
        """Memory for a feature. Its border means zeros, also where another feature of this shape stood before: no
        kernel writes there."""
        step, zero = self.module.steps.get(name, (1.0, 0))
        quantised = name in self.module.steps
        dtype = torch.uint8 if quantised else torch.float32 if name == INPUT else self.dtype
        shape = n, h + 2 * edge, w + 2 * edge, c, native.pitch_of(c, dtype)
        padded = self._buffer(shape, dtype, zero)
        copy = self._buffer(shape, torch.float32, 0) if dtype != torch.float32 and name in self._in_fp32 else None
        sums = native.zeros(n, chunks, c) if name in self._summed else None
        feature = self._features[name] = Feature(padded, sums, edge, step, zero, copy)
        self._kept.append(feature)
        return feature

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype, zero: int) -> Tensor:
        """shape: that of the tensor, and its pitch."""
        free = self._free.get((shape, dtype, zero))
        *outer, channels, pitch = shape
        return free.pop() if free else native.zeros(*outer, pitch, dtype=dtype)[..., :channels].fill_(zero)

    def _release(self, level: int) -> None:
        """Gives back the buffers of features that nothing reads after this level."""
        read = {name for op, _ in self.module.operations if op.level > level for name in op.inputs}
        for name in [name for name in self._features if name not in read and name not in self.module.segment.writes]:
            feature = self._features.pop(name)
            for tensor, zero in ((feature.padded, feature.zero), (feature.copy, 0)):
                if tensor is not None:
                    key = (*tensor.shape, feature.pitch), tensor.dtype, zero
                    self._free.setdefault(key, []).append(tensor)

    def _whole_pass(self) -> Pass:
        states = native.zeros(len(self.ends) * ctypes.sizeof(STRUCTS["Level"]), dtype=torch.uint8)
        counts = native.zeros(max(1, self._counts) * ctypes.sizeof(STRUCTS["Count"]), dtype=torch.uint8)
        size = -(-4 * max(1, self._scratch) // native.LINE) * native.LINE
        sizes = self.threads * size, self._shared_size
        scratch, shared = (native.zeros(size, dtype=torch.uint8) for size in sizes)
        self._kept += [states, counts, scratch, shared]
        for op, offset in self._sharing:
            self.ops[op].rows = shared.data_ptr() + offset
        return Pass(
            ops=ctypes.addressof(self.ops), tasks=ctypes.addressof(self.tasks), ends=ctypes.addressof(self.ends),
            states=_at(states), counts=_at(counts), scratch=_at(scratch), scratch_size=size, levels=len(self.ends),
            count_number=self._counts, pictures=self.n, threads=self.threads,
        )  # fmt: skip


def _readable(x: Tensor) -> Tensor:
    """An input of a type that the kernels read."""
    return x if x.dtype in native.TYPES else torch.from_numpy(in_fp32(x))


def _check(op: Operation) -> None:
    """ParNetError where a convolution exceeds the limits of kernels/cpu/shared.h."""
    if op.kind != "conv":
        return
    of_what, most = ("the picture", "PICTURE_KERNEL") if INPUT in op.inputs else ("features", "FEATURE_KERNEL")
    if op.kernel > NUMBERS[most]:
        fault = f"a {op.kernel}x{op.kernel} convolution of {of_what}: {most}"
    elif len(op.convolved) > NUMBERS["MOST_INPUTS"]:
        most = "MOST_INPUTS"
        fault = f"{len(op.convolved)} inputs of a convolution: {most}"
    else:
        return
    raise ParNetError(f"operation {op.name!r}: {fault} in kernels/cpu/shared.h allows the CPU kernels {NUMBERS[most]}")


def _output(y: Feature) -> dict:
    """The fields of an Op that say what it writes."""
    return {
        "y": _at(y.padded), "copy": _at(y.copy), "sums": _at(y.sums), "y_pitch": y.pitch,
        "y_type": native.TYPES[y.padded.dtype], "step": y.step, "zero": y.zero, "per_step": 1 / y.step,
    }  # fmt: skip


def _places_of_a_task(algorithm: int, h: int, width: int) -> int:
    """How many pixels of a direct convolution, or otherwise tiles, a task computes. Tasks are even: 28 x 28 pixels, of
    which a task may have 9 rows, are four tasks of 7 rows."""
    if algorithm == native.DIRECT:
        unit, most = width if width <= PIXELS else 1, PIXELS  # whole rows: blocks of pixels begin where one does
    else:  # fewer where there is no AVX-512, since second caches are often smaller there
        unit, most = 1, TILES[algorithm] if native.library().panels_at_once() == 1 else FEWER
    units = tiles(algorithm, h, width) // unit
    tasks = -(-units // (most // unit))
    return unit * -(-units // tasks)


def _work(op: Operation, algorithm: int, task: Task) -> float:
    """How many multiplications a task takes, for comparison with others."""
    taps = op.kernel**2 if algorithm == native.DIRECT else native.ALGORITHMS[algorithm].tiles[0][1] ** 2
    places = (task.stop - task.start) * taps
    return places * (task.panel_stop - task.panel_start) * op.cin / op.groups


def _parts(n: int, count: int, each: int) -> list[Part]:
    """What tasks take of `count` pixels, tiles, rows or classes in each of n pictures: `each` of them at a time."""
    return [
        {"n": i, "chunk": start // each, "start": start, "stop": min(start + each, count)}
        for i in range(n)
        for start in range(0, count, each)
    ]


def _ranges(ends: Iterable[int]) -> list[Part]:
    """What tasks take of panels, or of channels to transform: all from each of these to the next."""
    return [{"panel_start": start, "panel_stop": stop} for start, stop in pairwise(ends)]


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else address(tensor)
