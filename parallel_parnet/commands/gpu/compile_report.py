"""Compile every level of ParNet-S, M, L and XL for Hopper, with no GPU, and write down what came of it.

    python launch/compile_report.py --out results/kernels-compiled.md

    python launch/compile_report.py --json kernels.json          # the same as data

Takes five to seven minutes of one core.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from rich.console import Console
from rich.progress import track

from parallel_parnet import Program
from parallel_parnet.cores import cores
from parallel_parnet.executors.triton_backend import geometry, multiplied, whole
from parallel_parnet.files import check_writable, write_atomically, write_json
from parallel_parnet.kernels.gpu.compiled import Resources, read, resources, stand_in
from parallel_parnet.kernels.gpu.config import CONFIGS, HOPPER, Table, bindings, tuned_name
from parallel_parnet.kernels.gpu.model import LevelCosts, Prediction, predict
from parallel_parnet.kernels.gpu.rates import H200
from parallel_parnet.kernels.gpu.samples import without_values
from parallel_parnet.kernels.hopper import plan as warpgroups
from parallel_parnet.kernels.hopper.source import Source, source

from ..common import RESULTS, S_TO_XL, Parser, plain_console
from .level_tuning import Level, operands
from .precompile import shapes_in_fp8, shapes_of

SIZE, DTYPE = 224, torch.float16

INTRODUCTION = """# The kernels as compiled for Hopper

Each level of ParNet is one kernel launch. This page says what the compiler made of each, in fp16, and in fp8 with fp16
beside it, for one picture of {size} x {size} pixels, with the default tiles of compute capability {major}.{minor} (bf16
compiles to the same resources). It was made without a GPU by `python launch/compile_report.py`, torch {torch}, triton
{triton}.

**Of all times, those under "timed" alone are measured.** The floor is computed: the longer of FLOPs over {flops:.0f}
TFLOP/s and bytes over {bytes:.1f} TB/s, the rates that were measured on an H200 for a large matrix product and a large
copy. Bytes count each input and weight read once and each output written once, per operation. fp8 is taken to multiply
no faster than fp16, since it was never measured. The model is that of `kernels/gpu/model.py`, with {l2:.1f} TB/s of L2
and {memory:.1f} TB/s of memory; it leaves the classifier out.
{warpgroups}
- *programs*: those that convolve, tiles times splits, for {processors} multiprocessors; *per mp.*: how many of them
  each holds at a time, by registers and shared memory.
- *fill*: programs over the places for them; above 1 they come in several waves. Leaders, which are short, come first.
- *spilled*: bytes of registers that went to memory, loads and stores, none of them in a loop. *wgmma*: tensor-core
  instructions, HGMMA and in fp8 QGMMA; *LDGSTS*: asynchronous copies to shared memory.
"""

WARPGROUPS = """
In fp16 an {gpu} runs most levels by the kernel for warpgroups. A second table of each network has those, with the tiles
that it takes: as NVRTC {nvrtc} compiled them, by the model of `kernels/hopper/plan.py`, and as they were timed.
{timed}
"""

HEADER = (
    "| level | programs | threads | registers | shared KB | per mp. | fill | spilled | instructions | wgmma | LDGSTS "
    "| MFLOP | MB | computed floor, us | model, us | {last} |\n" + "|---|" + "---:|" * 14 + "---|"
)


@dataclass(frozen=True)
class Row:
    """One launch. timed: microseconds, where its tiles were; then least: of the model's own choice."""

    name: str
    programs: int
    used: Resources
    flops: int
    bytes: int
    model: Prediction | None
    timed: float | None = None
    least: float | None = None

    @property
    def waves(self) -> float:
        """Programs over the places for them."""
        return self.programs / (self.used.blocks * H200.multiprocessors)

    def text(self) -> str:
        """A line of the table."""
        used = self.used
        modelled = (f"{self.model.seconds * 1e6:.2f}", self.timed or self.model.limit) if self.model else ("", "")
        cells = (
            self.name, self.programs, used.threads, used.registers, f"{used.shared / 1024:.0f}", used.blocks,
            f"{self.waves:.2f}", used.spilled, used.instructions, used.counts["HGMMA"] + used.counts["QGMMA"],
            used.counts["LDGSTS"], f"{self.flops / 1e6:.0f}", f"{self.bytes / 1e6:.2f}",
            f"{H200.floor(self.flops, self.bytes) * 1e6:.2f}", *modelled,
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", default=S_TO_XL, help="variants (default: S, M, L and XL)")
    default = RESULTS / "kernels-compiled.md"
    parser.add_argument("--out", type=Path, default=default, help="default: results/kernels-compiled.md")
    parser.add_argument("--json", type=Path, help="file for the same as data")
    args = parser.parse_args()
    check_writable(args.out, args.json)
    return args


def compile_network(name: str, program: Program, console: Console) -> list[Row]:
    """Every launch of a network."""
    table = Table.load(HOPPER)
    plan = whole(program, (1, SIZE, SIZE), DTYPE, torch.device("meta"), table)
    models = []
    for group in (group for group in program.launch_groups if group[0].kind == "conv"):
        level, dtype = [plan.cuts[op.name].shape for op in group], multiplied(program, group[0], DTYPE)
        models.append(predict(level, 1, dtype, table.level(level, 1, dtype), table.rates))
    costs = program.cost(SIZE, itemsize=DTYPE.itemsize).by("level")
    rows = []
    launches = track(plan.launches, name, console=console, transient=True, disable=not console.is_terminal)
    for launch, cost, model in zip(launches, costs.values(), [*models, None], strict=True):
        with stand_in(HOPPER):
            used = resources(launch.compile())
        programs = launch.grid[0] - (launch.arguments[2] if model else 0)
        rows.append(Row(launch.name, programs, used, cost.flops, cost.bytes, model))
    return rows


def compile_for_warpgroups(program: Program) -> list[Row]:
    """Every launch of a network that the kernel for warpgroups takes on an H200."""
    table = Table.load(HOPPER, H200.gpu, warpgroups=True)
    costs, found = program.cost(SIZE, itemsize=DTYPE.itemsize).by("level"), []
    for group, (number, cost) in zip(program.launch_groups, costs.items(), strict=True):
        level = Level(tuple(geometry(program, op, SIZE, SIZE) for op in group if op.kind == "conv"), 1, DTYPE)
        if tiles := table.of_warpgroups(level.shapes, 1, DTYPE):
            made = source([without_values(conv) for conv in operands(level, tiles, 0, "cpu")])
            model = Prediction(warpgroups.predict(level.shapes, tiles, 1), "blocks")
            timed, least = table.warpgroups[level.key]["us"], warpgroups.candidates(level.shapes, 1)[0][0] * 1e6
            row = partial(Row, flops=cost.flops, bytes=cost.bytes, model=model, timed=timed, least=least)
            found.append((made, partial(row, f"level {number}", made.blocks)))
    with ThreadPoolExecutor(cores()) as pool:
        used = pool.map(resources_for_warpgroups, [made for made, _ in found])
        return [row(of_it) for (_, row), of_it in zip(found, used, strict=True)]


def resources_for_warpgroups(made: Source) -> Resources:
    """What the compiler made of a launch by the kernel for warpgroups."""
    from parallel_parnet.kernels.hopper.launch import compiled  # here, since it needs CUDA's bindings

    return read(*compiled(made.text), made.threads, made.shared)


def introduction_to_warpgroups() -> str:
    """Its paragraph."""
    from cuda.bindings import nvrtc

    timed = json.loads((CONFIGS / tuned_name(H200.gpu, "warpgroups")).read_text())["note"]
    return WARPGROUPS.format(gpu=H200.gpu, nvrtc=".".join(map(str, nvrtc.nvrtcVersion()[1:])), timed=timed)


def section(title: str, rows: list[Row], last: str, sums: str) -> str:
    """A table under its title, and what its rows come to. last: what its last column has."""
    lines = [row.text() for row in rows]
    return "\n".join([f"{title}\n", HEADER.format(last=last), *lines, f"\n{len(rows)} launches{sums}\n"])


def sums_of_network(rows: list[Row], data: dict) -> str:
    """In words."""
    flops, moved = sum(row.flops for row in rows), sum(row.bytes for row in rows)
    floors = sum(H200.floor(row.flops, row.bytes) for row in rows) * 1e6
    return (
        f", {flops / 1e9:.2f} GFLOP, {moved / 1e6:.1f} MB. Computed floors: {floors:.1f} us summed level by level; "
        f"{H200.floor(flops, moved) * 1e6:.1f} us if arithmetic and transfers of all levels could overlap. Model, "
        f"without the classifier: {data['modelled_us']} us. At most {data['waves_max']} of a wave; spilled: "
        f"{data['spilled_bytes']} bytes."
    )


def sums_of_warpgroups(data: dict) -> str:
    """In words."""
    return (
        f". Model: {data['modelled_us']} us, and {data['least_us']} with the tiles that it would choose. Timed, each "
        f"by itself: {data['timed_us']} us. Spilled: "
        f"{data['spilled_bytes']} bytes."
    )


def figures(rows: list[Row]) -> dict:
    """Launches in numbers, and the model's of each."""
    return {
        "modelled_us": round(sum(row.model.seconds for row in rows if row.model) * 1e6, 1),
        "spilled_bytes": sum(row.used.spilled for row in rows),
        "waves_max": round(max(row.waves for row in rows), 2),
        "launches": len(rows),
        "levels": {
            row.name: {"modelled_us": round(row.model.seconds * 1e6, 2), "limited_by": row.model.limit}
            for row in rows
            if row.model
        },
    }


def figures_of_warpgroups(rows: list[Row]) -> dict:
    """What `figures` returns, and what was timed."""
    times = {f"{of}_us": [getattr(row, of) for row in rows] for of in ("least", "timed")}
    return {**figures(rows), **{name: round(sum(us), 1) for name, us in times.items()}}


def main() -> int:
    args, console, at_hand = parse_arguments(), plain_console(), bindings()
    parts = [
        INTRODUCTION.format(
            size=SIZE, major=HOPPER[0], minor=HOPPER[1], torch=torch.__version__.partition("+")[0],
            triton=triton.__version__, flops=H200.flops / 1e12, bytes=H200.bytes / 1e12,
            warpgroups=introduction_to_warpgroups() if at_hand else "",
            processors=H200.multiprocessors, l2=LevelCosts().l2 / 1e12, memory=Table.load(HOPPER).rates.bytes / 1e12,
        )
    ]  # fmt: skip
    if not at_hand:
        console.print("note: no cuda-bindings, or no NVRTC: the kernel for warpgroups is left out")
    faults, networks = [], {}
    plain = {name: shapes_of(name) for name in args.model}
    for name, program in [*plain.items(), *((f"{name}, fp8", shapes_in_fp8(plain[name])) for name in plain)]:
        if not console.is_terminal:  # which shows no bar
            console.print(f"compiling {name}")
        rows = compile_network(name, program, console)
        data = networks[name] = figures(rows)
        parts.append(section(f"## {name}", rows, "limited by", sums_of_network(rows, data)))
        if name in plain and at_hand and (of_warpgroups := compile_for_warpgroups(program)):
            data = networks[f"{name}, warpgroups"] = figures_of_warpgroups(of_warpgroups)
            title = f"### {name}, the kernel for warpgroups"
            parts.append(section(title, of_warpgroups, "timed, us", sums_of_warpgroups(data)))
            rows += of_warpgroups
        faults += [f"{name}, {row.name}: {fault}" for row in rows for fault in row.used.complaints(HOPPER)]
    write_atomically(args.out, "\n".join(parts))
    console.print(f"wrote {args.out}")
    if args.json:
        write_json(args.json, {"torch": torch.__version__, "triton": triton.__version__, "networks": networks})
    for fault in faults:
        console.print(fault)
    return 1 if faults else 0
