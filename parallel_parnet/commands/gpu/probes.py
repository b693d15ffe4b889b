"""What the design of the kernels rests on, measured by itself: launch gaps, the caches, and levels warm and cold."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import median

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from parallel_parnet.kernels.gpu.compiled import stand_in
from parallel_parnet.kernels.gpu.config import HOPPER, Table
from parallel_parnet.kernels.gpu.launch import FUSED

from .device import event_times, in_a_graph, measure_rates, quantiles
from .journal import Values
from .level_tuning import Level, levels_of, measure
from .machines import machine_of
from .precompile import Target, build_launcher, shapes_of
from .scope import DTYPE
from .work import Work, verdict

GRIDS = (1, 132, 396)  # one program, one a multiprocessor of an H100 or H200, three
EMPTY = 100  # such launches in a graph
BLOCK, BLOCKS, ROUNDS = 4096, 1024, 64  # int32 values read at a time; 16 MB in all; reads of each program
PROGRAMS = 1056
RUNS = 20
LACKING = "no dependent launches, which need compute capability 9.0"


@triton.jit
def empty_kernel(x, DEPENDENT: tl.constexpr):  # noqa: N803
    """Nothing; DEPENDENT: and lets the next launch start before it has ended."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def read_kernel(x, out, blocks, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Each program reads ROUNDS blocks that lie apart, past the first cache, and adds them up lest they be left out."""
    pid = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in range(ROUNDS):
        total += tl.load(x + (pid + 131 * i) % blocks * BLOCK + offsets, cache_modifier=".cg")
    tl.store(out + pid * BLOCK + offsets, total)


def check_probes(work: Work) -> Values:
    """A row for each probe."""
    device, dry = work.device, work.scope.dry
    found = machine_of(work)
    capability = tuple(found["capability"])
    # the interpreter knows no dependent launch; the kernels with it are compiled all the same
    dependents = (False,) if dry or capability < HOPPER else (False, True)
    ways = [(grid, dependent) for grid in GRIDS[: 1 if dry else None] for dependent in dependents]
    rows = [
        work.row(f"gap, {grid} programs{', dependent launch' * dependent}", partial(gap, grid, dependent, device))
        for grid, dependent in ways
    ]
    rows.append(work.row("read of L2", lambda: l2_bandwidth(device, 2 if dry else PROGRAMS)))
    copied = lambda: {"tb_per_s": round(measure_rates(device, DTYPE).bytes / 1e12, 3)}  # noqa: E731
    rows.append(work.row("copy in memory", copied))
    table = Table.load(capability, multiprocessors=found["multiprocessors"])
    for variant in work.scope.decisive:
        for level in levels_of(shapes_of(variant), 1, DTYPE)[: work.scope.levels]:
            rows.append(work.row(f"{variant} {level.key}", partial(warm_and_cold, level, table, device)))
    return verdict(rows, **({"lacking": LACKING} if capability < HOPPER else {}))


def gap(grid: int, dependent: bool, device: torch.device) -> Values:
    """Microseconds of an empty kernel among others in a CUDA graph."""
    x = torch.zeros(1, dtype=torch.int32, device=device)
    options = FUSED | ({"launch_pdl": True} if dependent else {})
    launches = [lambda: empty_kernel[(grid,)](x, dependent, num_warps=4, **options)] * EMPTY
    times = event_times(in_a_graph(launches, device), RUNS)
    return {"us": quantiles([seconds / EMPTY for seconds in times])}


def l2_bandwidth(device: torch.device, programs: int) -> Values:
    """Bytes a second that all multiprocessors together read of what lies in the L2 cache."""
    x = torch.zeros(BLOCKS, BLOCK, dtype=torch.int32, device=device)
    out = torch.empty(programs, BLOCK, dtype=torch.int32, device=device)
    read = lambda: read_kernel[(programs,)](x, out, BLOCKS, ROUNDS, BLOCK, num_warps=8, **FUSED)  # noqa: E731
    seconds = median(event_times(in_a_graph([read], device), RUNS))
    return {"tb_per_s": round(programs * ROUNDS * BLOCK * 4 / seconds / 1e12, 3), "us": round(seconds * 1e6, 3)}


def warm_and_cold(level: Level, table: Table, device: torch.device) -> Values:
    """One launch with its inputs in the L2 cache, and with inputs that no cache holds."""
    config = table.level(level.shapes, level.n, level.dtype)
    return {
        name: quantiles(measure(replace(level, cold=cold), config, device))
        for name, cold in (("warm_us", False), ("cold_us", True))
    }


def compile_probes(target: Target) -> None:
    """The probes' kernels, as `check_probes` launches them, into Triton's cache."""
    x = torch.empty(16, dtype=torch.int32, device="meta")
    with stand_in(target.capability):
        made = [empty_kernel.warmup(x, False, grid=(1,), num_warps=4, **FUSED)]
        if target.capability >= HOPPER:  # below, ptxas refuses them
            made.append(empty_kernel.warmup(x, True, grid=(1,), num_warps=4, launch_pdl=True, **FUSED))
        made.append(read_kernel.warmup(x, x, BLOCKS, ROUNDS, BLOCK, grid=(1,), num_warps=8, **FUSED))
    for compiled in made if target.launchers else ():
        build_launcher(compiled)
