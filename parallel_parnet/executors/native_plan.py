"""A segment as tasks of the CPU kernels: what threads take on each level, and the buffers in between."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.cpu import native
from ..kernels.cpu.native import Op, Panel, Task
from ..program.program import Operation
from .segment import SegmentModule

# of a task, at most; the same for any number of threads, since sums are kept by task
TILES, PIXELS, ROWS = 98, 256, 8
TASKS_PER_THREAD = 2  # on a level, where there are enough channels to split; each transforms its input anew
LARGEST = 1e30  # of weights for Winograd: sums of larger ones may leave fp32's range


@dataclass(frozen=True)
class Feature:
    """A feature map with a border of zeros, [N, H + 2, W + 2, C], and its channels' sums [N, chunks, C]."""

    padded: Tensor
    sums: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.padded.shape[1] - 2, self.padded.shape[2] - 2

    @property
    def nchw(self) -> Tensor:
        """[N, C, H, W], where it lies."""
        return self.padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


class NativePlan:
    """A segment, ready to run for inputs of these shapes: fp32 on the CPU, with any strides; fresh tensors out.

    All operations of a level run side by side, on `threads` threads.
    """

    def __init__(self, module: SegmentModule, shapes: Sequence[Sequence[int]], threads: int) -> None:
        self.threads, self.module, self.n = threads, module, shapes[0][0]
        self._ops: list[Op] = []
        self._kept: list[object] = []  # what the structs point to
        self._scratch = 0
        self._free: dict[tuple[int, ...], list[Tensor]] = {}
        self._features: dict[str, Feature] = {}
        self._logits: dict[str, Tensor] = {}
        tasks = [
            task for name, shape in zip(module.segment.reads, shapes, strict=True) for task in self._read(name, shape)
        ]
        ends = [len(tasks)]
        for level in sorted({op.level for op, _ in module.operations}):
            tasks += self._level([(op, w) for op, w in module.operations if op.level == level])
            ends.append(len(tasks))
            self._release(level)
        self._arguments = self._call(tasks, ends)
        self._outputs = [
            self._logits[name] if name in self._logits else self._features[name].nchw for name in module.segment.writes
        ]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for op, x in zip(self._arguments[0], inputs, strict=False):  # which the first operations read
            op.x[0], op.strides[:] = x.data_ptr(), x.stride()
        self.run()
        return tuple(y.clone() for y in self._outputs)

    def run(self) -> None:
        """The kernels alone."""
        native.library().run(*self._arguments)

    def _read(self, name: str, shape: Sequence[int]) -> list[Task]:
        n, c, h, w = shape
        chunks = -(-h // ROWS)
        x = self._features[name] = self._feature(n, h, w, c, chunks)
        picture = self._array(native.POINTER, [0])  # which each call fills in
        index = self._add(Op(x=picture, y=_at(x.padded), sums=_at(x.sums), h=h, w=w, cout=c, chunks=chunks))
        return [Task(index, native.IMPORT, *part) for part in _parts(n, h, ROWS)]

    def _level(self, operations: list[tuple[Operation, dict[str, Tensor]]]) -> list[Task]:
        """Gates first, since convolutions wait for them; then the longest."""
        gates: list[Task] = []
        others: list[tuple[float, Task]] = []
        for op, w in operations:
            inputs = [self._features[name] for name in op.inputs]
            if op.kind == "classifier":
                others += [(0, task) for task in self._classifier(op, w, inputs)]
            else:
                tasks = self._convolution(op, w, inputs, len(operations))
                gates += [Task(tasks[0].op, native.GATE, n) for n in range(self.n)]
                others += [(_work(op, task), task) for task in tasks]
        return gates + [task for _, task in sorted(others, key=lambda pair: -pair[0])]

    def _convolution(self, op: Operation, w: dict[str, Tensor], inputs: list[Feature], beside: int) -> list[Task]:
        """beside: operations on this level."""
        h, width = inputs[0].size
        winograd = op.stride == 1 and h % 2 == 0 and width % 2 == 0 and float(w["weight"].abs().max()) < LARGEST
        places = (h // 2) * (width // 2) if winograd else (h // op.stride) * (width // op.stride)
        most = TILES if winograd else PIXELS
        each = -(-places // -(-places // most))
        parts = _parts(self.n, places, each)
        chunks = len(parts) // self.n
        which = native.panels(op.cout, op.groups, op.shuffle)
        y = self._features[op.name] = self._feature(self.n, h // op.stride, width // op.stride, op.cout, chunks)
        weights = self.module.packed((op.name, winograd), lambda: _pack(op, w, len(inputs), which, winograd))
        table = self._array(Panel, [Panel(*panel) for panel in which])
        gates = [native.zeros(self.n, op.cout) for _ in range(2)]
        self._kept += gates
        index = self._add(
            Op(
                **self._inputs(inputs), y=_at(y.padded), sums=_at(y.sums),
                **{name: _at(tensor) for name, tensor in weights.items()},
                multiply=_at(gates[0]), add=_at(gates[1]), panels=ctypes.addressof(table), cout=op.cout,
                groups=op.groups, stride=op.stride, panel_count=len(which), chunks=chunks,
                silu=op.activation == "silu", border="border" in w,
            )
        )  # fmt: skip
        split = -(-TASKS_PER_THREAD * self.threads // (len(parts) * beside))
        step = -(-len(which) // min(len(which), split))
        self._need(op.cin)
        if winograd:
            self._need(16 * each * (op.cin + step * native.library().panel_width() + native.SLACK))
        kind = native.WINOGRAD if winograd else native.DIRECT
        panels = [(j, min(j + step, len(which))) for j in range(0, len(which), step)]
        return [Task(index, kind, *part, *some) for part in parts for some in panels]

    def _classifier(self, op: Operation, w: dict[str, Tensor], inputs: list[Feature]) -> list[Task]:
        logits = self._logits[op.name] = torch.empty(self.n, op.cout, dtype=torch.float32, device="cpu")
        weights = self.module.packed(
            (op.name,), lambda: {name: native.with_slack(w[name]) for name in ("weight", "bias")}
        )
        index = self._add(
            Op(
                **self._inputs(inputs), y=_at(logits), cout=op.cout, groups=1,
                **{name: _at(tensor) for name, tensor in weights.items()},
            )
        )  # fmt: skip
        self._need(op.cin)
        each = -(-op.cout // (TASKS_PER_THREAD * self.threads))
        return [Task(index, native.CLASSIFIER, *part) for part in _parts(self.n, op.cout, each)]

    def _inputs(self, inputs: list[Feature]) -> dict:
        x, (h, w) = inputs[0], inputs[0].size
        return {
            "x": self._array(native.POINTER, [_at(i.padded) for i in inputs]),
            "x_sums": self._array(native.POINTER, [_at(i.sums) for i in inputs]),
            "x_chunks": self._array(native.INT, [i.sums.shape[1] for i in inputs]),
            "h": h, "w": w, "c": x.padded.shape[3], "inputs": len(inputs),
        }  # fmt: skip

    def _array(self, kind: Any, values: Sequence[object]) -> ctypes.Array:
        made = (kind * len(values))(*values)
        self._kept.append(made)
        return made

    def _add(self, op: Op) -> int:
        self._ops.append(op)
        return len(self._ops) - 1

    def _need(self, floats: int) -> None:
        """Scratch memory of each thread."""
        self._scratch = max(self._scratch, floats + native.SLACK)

    def _feature(self, n: int, h: int, w: int, c: int, chunks: int) -> Feature:
        """Its border is zeros also where another feature of this shape stood before."""
        free = self._free.get((n, h + 2, w + 2, c))
        padded = free.pop() if free else native.zeros(n, h + 2, w + 2, c)
        feature = Feature(padded, native.zeros(n, chunks, c))
        self._kept.append(feature)
        return feature

    def _release(self, level: int) -> None:
        """Give back features that nothing reads after this level."""
        read = {name for op, _ in self.module.operations if op.level > level for name in op.inputs}
        for name in [name for name in self._features if name not in read and name not in self.module.segment.writes]:
            padded = self._features.pop(name).padded
            self._free.setdefault(tuple(padded.shape), []).append(padded)

    def _call(self, tasks: list[Task], ends: list[int]) -> tuple:
        """The arguments of native.c's `run`."""
        gate_count = len(self._ops) * self.n
        sizes = 3 * len(ends), 2 * gate_count  # in int32s: native.c's `Level` and `Count`
        states, gates = (torch.zeros(size, dtype=torch.int32, device="cpu") for size in sizes)
        scratch = torch.empty(self.threads * self._scratch, dtype=torch.float32, device="cpu")
        self._kept += [states, gates, scratch]
        return (
            (Op * len(self._ops))(*self._ops), (Task * len(tasks))(*tasks), (native.INT * len(ends))(*ends), len(ends),
            *(ctypes.c_void_p(_at(t)) for t in (states, gates)), gate_count, self.n, ctypes.c_void_p(_at(scratch)),
            ctypes.c_int64(self._scratch), self.threads,
        )  # fmt: skip


def _pack(op: Operation, w: dict[str, Tensor], inputs: int, which: native.Panels, winograd: bool) -> dict[str, Tensor]:
    """An operation's weights, by the names of `Op`."""
    rows = {
        name: native.stored(tensor.flatten(1) if name == "gate_weight" else tensor, op.groups, op.shuffle)
        for name, tensor in w.items()
        if name not in ("scale", "shift")
    }
    weight, border = rows.pop("weight"), rows.pop("border", None)
    if border is not None:
        rows["bias"] = native.bias_by_edge(rows["bias"], border[:, 0])
    rows |= {name: w[name].flatten() for name in ("scale", "shift") if name in w}
    packed = native.pack_winograd(weight, which) if winograd else native.pack_direct(weight, inputs, which)
    return {"weight": packed, **{name: native.with_slack(tensor) for name, tensor in rows.items()}}


def _work(op: Operation, task: Task) -> float:
    """Multiplications of a task, for comparison."""
    places = (task.stop - task.start) * (16 if task.kind == native.WINOGRAD else 9)
    return places * (task.panel_stop - task.panel_start) * op.cin / op.groups


def _parts(n: int, count: int, each: int) -> list[tuple[int, int, int, int]]:
    """(picture, chunk, start, stop): `each` at a time, of `count` in each of n pictures."""
    return [(i, start // each, start, min(start + each, count)) for i in range(n) for start in range(0, count, each)]


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()
