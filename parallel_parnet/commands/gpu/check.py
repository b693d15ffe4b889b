"""Prove the kernels on the GPU at hand, then time them, in ten minutes at most.

    python launch/gpu_check.py --out results/gpu
    python launch/gpu_check.py --out results/gpu --step kernels networks

Every step runs in a process of its own under a limit of its own, so that a kernel that hangs or faults costs one step,
not all. gpu-check.json is written after each step, gpu-check.md at the end.

Exit status: 0 where every step passed, 1 where one failed or did not finish, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.files import as_json, write_atomically, write_json

from ..common import RESULTS, Parser, plain_console
from ..common import table as make_table
from ..processes import command, environment
from . import placements
from . import proofs as checks
from . import timing as timings
from .device import require_gpu, run_within
from .page import markdown, verdicts

TOTAL = 585  # seconds for all steps
SPARE = 8  # seconds before its limit when a step begins nothing new


@dataclass(frozen=True)
class Step:
    """A check and the seconds it may take. `check(deadline, out)` gives a dictionary with "passed".

    required: whether the whole check fails where this step had too little time.
    """

    name: str
    seconds: float
    check: Callable[[float, Path], dict]
    required: bool = True


STEPS = (
    Step("machine", 40, checks.check_machine),
    Step("compile", 140, checks.check_compile),
    Step("kernels", 60, checks.check_kernels),
    Step("networks", 90, checks.check_networks),
    Step("executors", 40, checks.check_executors),
    Step("placements", 90, placements.check_placements),
    Step("auto", 30, placements.check_auto),
    Step("repeats", 30, checks.check_repeats),
    Step("tuning", 60, timings.check_tuning),
    Step("timings", 100, timings.check_timings),
    Step("sanitizer", 50, checks.check_sanitizer),
    Step("inductor", 125, timings.check_inductor, required=False),
)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder (default: results/gpu)")
    names = [step.name for step in STEPS]
    parser.add_argument("--step", nargs="+", choices=names, default=names, help="default: all of them")
    # in the process of one step: when it ends, on the monotonic clock, which processes share
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_step(command: Sequence[str], seconds: float, required: bool) -> dict:
    """What a step's process prints as its last line, or how it ended."""
    started = time.monotonic()
    status, output, errors = run_within(command, seconds, environment())
    if (result := _printed(output)) is None or status not in (0, None):
        how = f"killed after {seconds:.0f} s" if status is None else f"exit status {status}"
        last = errors.strip().splitlines()[-1:] or ["it said nothing"]
        excused = status is None and not required
        result = {"passed": excused, "fault": f"{how}: {last[0]}", "stderr": errors[-4000:]}
    return {"seconds": round(time.monotonic() - started, 1), **result}


def _printed(output: str) -> dict | None:
    """The result on the last line, if there is one."""
    try:
        found = json.loads((output.strip().splitlines() or [""])[-1])
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) and "passed" in found else None


def run_inside(step: Step, end: float, out: Path) -> int:
    """In the process of a step: its result as one line on stdout, with the seed that repeats its random numbers."""
    seed = torch.seed()
    print(as_json({**step.check(end - SPARE, out), "seed": seed}), flush=True)
    return 0


def run_steps(steps: Sequence[Step], out: Path, console: Console) -> dict[str, dict]:
    """All steps, one after the other, each within what is left of the ten minutes."""
    end, results = time.monotonic() + TOTAL, {}
    for step in steps:
        seconds = min(step.seconds, end - time.monotonic())
        if seconds < 2 * SPARE:
            results[step.name] = {"passed": not step.required, "fault": "not run: the time was over", "seconds": 0.0}
        else:
            limit = str(time.monotonic() + seconds)
            line = [*command("gpu-check"), "--out", str(out), "--step", step.name, "--inside", limit]
            results[step.name] = run_step(line, seconds, step.required)
        write_json(out / "gpu-check.json", results)
        result = results[step.name]
        console.print(f"{step.name}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s")
    return results


def main() -> int:
    args, console = parse_arguments(), plain_console()
    require_gpu()
    chosen = [step for step in STEPS if step.name in args.step]
    if args.inside is not None:
        return run_inside(chosen[0], args.inside, args.out)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParNetError(f"--out {args.out}: cannot be made ({error.strerror})") from None
    results = run_steps(chosen, args.out, console)
    write_atomically(args.out / "gpu-check.md", markdown(results))
    table = make_table("step", "verdict", "seconds", "what", title="GPU check")
    for row in verdicts(results):
        table.add_row(*row)
    console.print(table)
    return 0 if all(result["passed"] for result in results.values()) else 1
