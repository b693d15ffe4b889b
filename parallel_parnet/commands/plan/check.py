"""Hold the planner's predictions against what this machine really does, placement by placement.

    python launch/plan_check.py --json results/planner-check-cpu.json

Each case measures the operations on one lane, predicts, then runs the placement in as many ranks over loopback, one
compute thread each, and takes the median latency. Ranks beyond the cores share them, in the prediction as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch

from parallel_parnet import Engine, ParNetError, Placement, Program, create_model, fold
from parallel_parnet.files import as_json, write_json
from parallel_parnet.planning.costs import Costs
from parallel_parnet.planning.planner import schedule

from ..common import Parser, plain_console, settle
from ..common import table as make_table
from ..processes import environment
from .measured import find_link, measure

CASES = {  # name: ranks, arguments of launch/infer.py
    "1 lane": (1, ()),
    "2 lanes, by streams": (2, ("--streams-per-gpu", "2")),
    "2 lanes, planned": (2, ("--placement", "auto")),
    "3 lanes, by streams": (3, ("--streams-per-gpu", "1")),
    "3 lanes, planned": (3, ("--placement", "auto")),
}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["parnet_s", "parnet_xl"], help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=20, help="timed passes of a case (default: %(default)s)")
    parser.add_argument("--link", default="loopback", help="as launch/plan.py (default: %(default)s)")
    parser.add_argument("--cpu", default=platform.processor() or platform.machine(), help="the machine, in words")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    args = parser.parse_args()
    if args.iterations < 1:
        raise ParNetError(f"--iterations {args.iterations}: must be at least 1")
    return args


def alone(program: Program, iterations: int) -> tuple[Placement, float]:
    """One lane in this process: its placement, and the median seconds of a pass."""
    placement = Placement.single(program)
    engine = Engine(program, placement, "cpu", executor="eager")
    x = torch.randn(1, 3, program.config.image_size, program.config.image_size)
    times = []
    for _ in range(iterations + 1):
        start = time.perf_counter()
        engine(x)
        times.append(time.perf_counter() - start)
    return placement, median(times[1:])


def in_ranks(model: str, ranks: int, arguments: tuple[str, ...], iterations: int) -> tuple[Placement, float]:
    """The same over ranks: torchrun runs launch/infer.py."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "parallel_parnet.commands.infer", "--model", model, *arguments, "--executor", "eager"]
        command += ["--iterations", str(iterations), "--json", str(answer), "--device", "cpu"]
        # 1 thread each, whatever the number of cores, as in the measurement of the operations
        done = subprocess.run(command, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True)
        if done.returncode:
            raise ParNetError(f"{model} on {ranks} ranks failed: {done.stderr.strip().splitlines()[0]}")
        result = json.loads(answer.read_text())
    if threads := {lane["threads"] for lane in result["placement"]["lanes"]} - {1}:
        raise ParNetError(f"{ranks} ranks took {max(threads)} threads each: the check is for as many ranks as cores")
    where = {name: tuple(lanes) for name, lanes in result["placement"]["operations"].items()}
    return Placement(ranks, where), result["latency_ms"]["median"] * 1e-3


def check(model: str, case: str, link: str, iterations: int, cores: int) -> dict:
    """Measure, predict, run, compare."""
    ranks, arguments = CASES[case]
    program = fold(settle(create_model(model)))
    device = measure(program, torch.device("cpu"), torch.float32, None, 1, "eager")
    ran = alone(program, iterations) if ranks == 1 else in_ranks(model, ranks, arguments, iterations)
    placement, measured = ran
    predicted = schedule(program, placement, Costs.of(program, device, find_link(link)), cores).makespan
    return {
        "model": model, "case": case, "predicted_s": predicted, "measured_s": measured,
        "error": predicted / measured - 1, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    rows = []
    table = make_table("model", "case", "predicted ms", "measured ms", "error", "load")
    for model in args.models:
        for case in CASES:
            row = check(model, case, args.link, args.iterations, cores)
            rows.append(row)
            table.add_row(
                model, case, f"{row['predicted_s'] * 1e3:.1f}", f"{row['measured_s'] * 1e3:.1f}",
                f"{row['error']:+.1%}", f"{row['load_average']:.1f}",
            )  # fmt: skip
    plain_console().print(table)
    result = {
        "cpu": args.cpu,
        "cores": cores,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "executor": "eager, float32, batch 1, one thread a rank",
        "link": args.link,
        "median_absolute_error": median(abs(row["error"]) for row in rows),
        "cases": rows,
    }
    if args.json:
        write_json(args.json, result)
    print(as_json({key: result[key] for key in ("median_absolute_error", "date", "cores")}))
    return 0
