"""--trace and --report of infer and bench: record some requests, merge the lanes, write."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from parallel_parnet import Engine, ParNetError
from parallel_parnet.cores import cores
from parallel_parnet.executors.available import facts, profiled_by
from parallel_parnet.files import check_writable
from parallel_parnet.planning.costs import Costs, Measured
from parallel_parnet.planning.planner import schedule
from parallel_parnet.profiling import advice, report, trace_format
from parallel_parnet.profiling.clocks import Clock
from parallel_parnet.profiling.spans import Recorder
from parallel_parnet.profiling.timeline import Operations, Timeline
from parallel_parnet.program.contract import dtype_name

from .common import machine
from .engine_arguments import threads_of
from .plan.measured import find_link

PASSES_APART = 5


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """--trace and --report."""
    parser.add_argument("--trace", type=Path, help="write a trace for Perfetto, .json or .json.gz, after the timing")
    parser.add_argument("--report", type=Path, help="write the same as one page, .html, after the timing")


def check_trace_arguments(args: argparse.Namespace) -> None:
    """ParNetError, before anything has run, for a place that cannot be written."""
    for path, endings in ((args.trace, trace_format.SUFFIXES), (args.report, (".html",))):
        if path and not path.name.endswith(endings):
            raise ParNetError(f"{path}: give a name that ends in {' or '.join(endings)}")
    check_writable(args.trace, args.report)


def write_traces(engine: Engine, pictures: Tensor, args: argparse.Namespace, console: Console) -> None:
    """On the coordinator, while the other ranks serve: what --trace and --report ask for, after all measurements.

    A trace that cannot be made costs one line, and not the run.
    """
    if not (args.trace or args.report):
        return
    clocks = engine.clocks()
    real = engine.trace(pictures)
    engine.profile(pictures)  # warm-up
    alone = [engine.profile(pictures) for _ in range(PASSES_APART)]
    try:
        timeline = merged(engine, pictures, clocks, real, alone, getattr(args, "link", None))
        if args.trace:
            trace_format.write(timeline, args.trace)
        if args.report:
            report.write(timeline, args.report)
        console.print(f"trace: {advice.Story.of(timeline).headline}")
    except ParNetError as error:
        console.print(f"warning: no trace: {error}")


def merged(
    engine: Engine, pictures: Tensor, clocks: list[Clock], real: list[Recorder], alone: list[list[Recorder]],
    link: str | None = None,
) -> Timeline:  # fmt: skip
    """The lanes' spans on one clock, with all that a reader needs to judge them."""
    from .bench.machine import rates  # here, since it needs triton, which is only installed on Linux

    program, placement = engine.program, engine.placement
    size, batch = pictures.shape[-1], len(pictures)
    costs = {row.name: row for row in program.cost(size, batch, engine.dtype.itemsize).operations}
    floor = rates(engine.device, engine.dtype)
    about = {
        "executor": engine.executor,
        "device": str(engine.device),
        "dtype": dtype_name(engine.arithmetic),
        "size": size,
        "batch": batch,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "threads": threads_of(engine),
        "cores": cores(),
        "load_average": round(os.getloadavg()[0], 1),
        "rows": {
            "real path": "requests as the executor runs them; the device is waited for at their end alone",
            "operation by operation": "other passes: each operation by itself, and waited for",
        },
        "alone_by": profiled_by(engine.executor),
        "clocks": [asdict(clock) | {"applied": clock.applied} for clock in clocks],
        "operations": [
            {
                "name": op.name, "label": op.label, "level": op.level, "reads": list(op.inputs),
                "flops": costs[op.name].flops, "bytes": costs[op.name].bytes,
            }
            for op in program.operations
        ],
        "floor": {
            "flops_per_s": floor["flop_per_s"], "bytes_per_s": floor["bytes_per_s"],
            "of": f"{machine(engine.device)}, {torch.get_num_threads()} thread(s)"
            + (f", whose FLOP/s are those of {dtype_name(engine.dtype)}" if program.quantised else ""),
        },
    }  # fmt: skip
    about["predicted"] = predicted(engine, pictures, alone, clocks, link)
    return Timeline.of(Operations.of(program, placement), about, clocks, real, alone)


def predicted(
    engine: Engine, pictures: Tensor, alone: list[list[Recorder]], clocks: list[Clock], link: str | None
) -> dict | None:
    """The planner's schedule of the same placement, from the operations as they were measured here.

    None where the executor tells no operation apart.
    """
    seconds: dict[str, float] = {}
    for span in (span for lanes in alone for lane in lanes for span in lane.spans):
        seconds[span.name] = min(span.end - span.start, seconds.get(span.name, math.inf))
    if not engine.program.by_name.keys() <= seconds.keys():
        return None
    source = f"each operation's fastest of {PASSES_APART} passes of this run"
    device = Measured("measured", seconds, source, own_layout=facts(engine.executor).own_layout)
    way = find_link(link or ("nvlink" if engine.device.type == "cuda" else "loopback"))
    size, batch = pictures.shape[-1], len(pictures)
    costs = Costs.of(engine.program, device, way, size, batch, engine.dtype.itemsize)
    shared = cores() if engine.device.type == "cpu" and all(clock.shared for clock in clocks) else None
    found = schedule(engine.program, engine.placement, costs, shared)
    return {
        "makespan": found.makespan,
        "runs": [[run.lane, run.operations[0], run.start, run.end] for run in found.runs],
        "sources": [*costs.sources, f"{shared} cores shared" if shared else "a processor for each lane"],
    }
