"""What a program costs: FLOPs and bytes of its operations, added up and in a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .inputs import check_batch, picture_side

if TYPE_CHECKING:
    from .program import Program


@dataclass(frozen=True)
class OperationCost:
    """flops: 2 per multiply-accumulate. bytes: each input and weight read once, the output written once."""

    name: str
    label: str
    level: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of each operation at one picture size, batch and storage type, in program order."""

    operations: tuple[OperationCost, ...]

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.operations)

    @property
    def bytes(self) -> int:
        return sum(row.bytes for row in self.operations)

    def by(self, field: str) -> dict[int | str, Cost]:
        """The operations of each "level", or of each "label" (stage and stream), in order of first appearance."""
        groups: dict[int | str, list[OperationCost]] = {}
        for row in self.operations:
            groups.setdefault(getattr(row, field), []).append(row)
        return {key: Cost(tuple(rows)) for key, rows in groups.items()}


def cost_of(program: Program, size: int | None, batch: int, itemsize: int) -> Cost:
    """See `Program.cost`."""
    side = picture_side(program, size)
    check_batch(batch, itemsize)
    rows = []
    for op in program.operations:
        weights = program.weights_of(op)
        moved = sum(t.numel() * min(itemsize, t.itemsize) for t in weights.values())
        for name in (*op.inputs, op.name):
            shape = program.shape(name, batch, side, side)
            moved += math.prod(shape) * (1 if f"{name}.step" in program.weights else itemsize)
        pixels = math.prod(shape[2:])
        sizes = {name: tensor.numel() for name, tensor in weights.items()}
        macs = batch * (pixels * sizes.get("weight", 0) + sizes.get("gate_weight", 0))
        rows.append(OperationCost(op.name, op.label, op.level, 2 * macs, moved))
    return Cost(tuple(rows))


def table_of(program: Program, size: int | None) -> str:
    """See `Program.table`."""
    cost = {row.name: row for row in program.cost(size).operations}
    lines = [f"{'level':>5}  {'operation':<17} {'stage':<9} {'reads':<36} {'shape':>14}  {'gate':<8} {'MFLOP':>9}"]
    for op in sorted(program.operations, key=lambda op: op.level):
        shape = f"{op.cin}>{op.cout}" + (f" /{op.stride}" if op.stride > 1 else "")
        shape += f" g{op.groups}" if op.groups > 1 else ""
        shape += f" {op.kernel}x{op.kernel}" if op.kernel != 3 else ""
        reads, mflop = " + ".join(op.inputs), cost[op.name].flops / 1e6
        lines.append(f"{op.level:>5}  {op.name:<17} {op.label:<9} {reads:<36} {shape:>14}  {op.gate:<8} {mflop:>9.1f}")
    return "\n".join(lines)
