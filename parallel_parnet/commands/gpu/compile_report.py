"""Compile every level of ParNet-S, M, L and XL for Hopper, with no GPU, and write down what came of it.

    python launch/compile_report.py --out results/kernels-compiled.md

Takes two to three minutes of one core.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track

from parallel_parnet import create_model, fold
from parallel_parnet.executors.triton_backend import whole
from parallel_parnet.files import write_atomically
from parallel_parnet.kernels.gpu.compiled import Resources, resources, stand_in
from parallel_parnet.kernels.gpu.config import Table
from parallel_parnet.kernels.gpu.rates import H200, Rates

from ..common import RESULTS, Parser, plain_console

VARIANTS = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
HOPPER = (9, 0)
SIZE = 224

INTRODUCTION = """# The kernels as compiled for Hopper

Each level of ParNet is one kernel launch. This page says what the compiler made of each, in fp16 for one picture of
{size} x {size} pixels, with the default tiles of compute capability {major}.{minor} (bf16 compiles to the same
resources). It was made without a GPU by `python launch/compile_report.py`, torch {torch}, triton {triton}.

**Nothing on this page is a measured time.** The floor is computed: the longer of FLOPs over {flops:.0f} TFLOP/s and
bytes over {bytes:.1f} TB/s, the rates that were measured on an H200 for a large matrix product and a large copy. Bytes
count each input and weight read once and each output written once, per operation. Sums and split-K's workspace come on
top. A level's floor says nothing of the start and end of its kernel.

- *programs*: tiles times splits, for {processors} multiprocessors; *per mp.*: how many of them each holds at a time,
  by registers and shared memory.
- *fill*: programs over the places for them; above 1 they come in several waves.
- *spilled*: bytes of registers that went to memory, loads and stores. *HGMMA*: tensor-core instructions (wgmma);
  *LDGSTS*: asynchronous copies to shared memory.
"""

HEADER = (
    "| level | programs | threads | registers | shared KB | per mp. | fill | spilled | instructions | HGMMA | LDGSTS "
    "| MFLOP | MB | computed floor, us |\n" + "|---|" + "---:|" * 13
)


@dataclass(frozen=True)
class Row:
    """One launch."""

    name: str
    programs: int
    used: Resources
    flops: int
    bytes: int

    def text(self, rates: Rates) -> str:
        """A line of the table."""
        used, places = self.used, self.used.blocks * rates.multiprocessors
        cells = (
            self.name, self.programs, used.threads, used.registers, f"{used.shared / 1024:.0f}", used.blocks,
            f"{self.programs / places:.2f}", used.spilled, used.instructions, used.counts["HGMMA"],
            used.counts["LDGSTS"], f"{self.flops / 1e6:.0f}", f"{self.bytes / 1e6:.2f}",
            f"{rates.floor(self.flops, self.bytes) * 1e6:.2f}",
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=VARIANTS, help="variants (default: S, M, L and XL)")
    default = RESULTS / "kernels-compiled.md"
    parser.add_argument("--out", type=Path, default=default, help="default: results/kernels-compiled.md")
    return parser.parse_args()


def compile_variant(name: str, console: Console) -> list[Row]:
    """Every launch of a variant."""
    meta = torch.device("meta")
    program = fold(create_model(name).to(meta).eval())
    plan = whole(program, (1, SIZE, SIZE), torch.float16, meta, Table.load(HOPPER))
    costs = program.cost(SIZE, itemsize=torch.float16.itemsize).by("level")
    rows = []
    launches = track(plan.launches, name, console=console, transient=True, disable=not console.is_terminal)
    for launch, cost in zip(launches, costs.values(), strict=True):
        with stand_in(HOPPER):
            used = resources(launch.compile())
        programs = launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)
        rows.append(Row(launch.name, programs, used, cost.flops, cost.bytes))
    return rows


def section(name: str, rows: list[Row], rates: Rates) -> str:
    """A variant's table, and its sum."""
    flops, moved = sum(row.flops for row in rows), sum(row.bytes for row in rows)
    floors = sum(rates.floor(row.flops, row.bytes) for row in rows) * 1e6
    once = rates.floor(flops, moved) * 1e6
    return "\n".join(
        [
            f"## {name}\n",
            HEADER,
            *(row.text(rates) for row in rows),
            f"\n{len(rows)} launches, {flops / 1e9:.2f} GFLOP, {moved / 1e6:.1f} MB. Computed floors: {floors:.1f} us "
            f"summed level by level; {once:.1f} us if arithmetic and transfers of all levels could overlap.\n",
        ]
    )


def main() -> int:
    args, console = parse_arguments(), plain_console()
    parts = [
        INTRODUCTION.format(
            size=SIZE, major=HOPPER[0], minor=HOPPER[1], torch=torch.__version__.partition("+")[0],
            triton=triton.__version__, flops=H200.flops / 1e12, bytes=H200.bytes / 1e12,
            processors=H200.multiprocessors,
        )
    ]  # fmt: skip
    faults = []
    for name in args.model:
        rows = compile_variant(name, console)
        parts.append(section(name, rows, H200))
        faults += [f"{name}, {row.name}: {fault}" for row in rows for fault in row.used.complaints(HOPPER)]
    write_atomically(args.out, "\n".join(parts))
    console.print(f"wrote {args.out}")
    for fault in faults:
        console.print(fault)
    return 1 if faults else 0
