"""Measure what decides the kernels' design on the GPU at hand, tune them, prove them and compare them with peers.

    python launch/gpu_check.py --out results/gpu                  # within 460 seconds
    python launch/gpu_check.py --out results/gpu --seconds 600    # again: goes on where the first stopped
    python launch/gpu_check.py --out results/gpu --step tuning tuned
    python launch/gpu_check.py --out results/dry --dry-run        # the whole way without a GPU, in two minutes

Every row goes to gpu-check.jsonl in OUT as soon as it is measured. A run with the same OUT measures what is missing
there; --fresh drops the rows of the steps that it runs. Every step runs in a fork of this process under a limit of its
own, so that a kernel that hangs or faults costs one step, not all; gpu-check.json and gpu-check.md, made from the rows,
are written after each, and tiles that were timed to tuned.<GPU>.json or warpgroups.<GPU>.json, which engines read once
they are put into kernels/gpu/configs/. A dry run compiles under a stand-in for the driver and runs a narrow network in
Triton's interpreter; all that it writes says so.

Exit status: 0 where every step passed, 1 where one failed or did not finish, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.files import write_atomically, write_json
from parallel_parnet.kernels.gpu.config import CONFIGS

from ..common import RESULTS, Parser, plain_console, positive
from ..common import table as make_table
from ..processes import command, environment
from . import peers, placements, proofs, timing
from .device import exact_fp32, machine
from .first import check_first, check_first_kernels
from .fp8 import check_fp8
from .journal import Journal, Values
from .machines import check_machine
from .own_process import in_own_process
from .page import markdown, verdicts
from .probes import check_probes
from .scope import scope
from .tuned import check_tuned, check_tuning
from .warpgroups import check_passes, check_warpgroups
from .work import Work

SECONDS = 460  # for all steps; who rents a GPU by the minute has spent some of them before the check starts
SPARE = 4  # seconds before its limit when a step begins nothing new
LEAST = 4  # seconds in which a step can do anything: a GPU takes one to be ready
DRY_RUN = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # which Triton reads when it is imported
ASKING = 60  # seconds in which a GPU has to say what it is
SAME = ("gpu", "torch", "triton", "commit")  # of one run and the next that goes on with its rows


@dataclass(frozen=True)
class Step:
    """A check, its seconds of `SECONDS`, and what it does.

    required: whether the whole check fails where this step had too little time. compiles: for these steps, so that it
    runs once more, in whatever cache it finds, as long as one of them has something left to do.
    """

    name: str
    seconds: float
    check: Callable[[Work], Values]
    required: bool = True
    compiles: tuple[str, ...] = ()


STEPS = (
    Step("machine", 8, check_machine),
    Step("first kernels", 30, check_first_kernels, compiles=("first", "probes")),
    Step("first", 12, check_first),
    Step("probes", 16, check_probes),
    Step("warpgroups", 70, check_warpgroups),
    Step("passes", 30, check_passes),
    Step("tuning", 20, check_tuning),
    Step("tuned", 12, check_tuned),
    Step("compile", 46, proofs.check_compile, compiles=("kernels", "networks", "executors", "repeats")),
    Step("kernels", 10, proofs.check_kernels),
    Step("networks", 22, proofs.check_networks),
    Step("executors", 44, proofs.check_executors),
    Step("placements", 26, placements.check_placements),
    Step("auto", 10, placements.check_auto),
    Step("repeats", 16, proofs.check_repeats),
    Step("timings", 16, timing.check_timings),
    Step("fp8", 30, check_fp8),
    Step("poster", 14, peers.check_poster, required=False),
    Step("depth", 10, peers.check_depth, required=False),
    Step("inductor", 8, timing.check_inductor, required=False),
    Step("sanitizer", 10, proofs.check_sanitizer, required=False),
)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder (default: results/gpu)")
    names = [step.name.replace(" ", "-") for step in STEPS]
    parser.add_argument("--step", nargs="+", choices=names, default=names, help="default: all of them")
    parser.add_argument("--seconds", type=positive, default=SECONDS, help="to stay within (default: %(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure anew what the steps have measured before")
    parser.add_argument("--dry-run", action="store_true", help="go the whole way without a GPU")
    return parser.parse_args()


def run_step(check: Callable[[], Values], seconds: float, required: bool) -> Values:
    """What a step finds in a process of its own, or how that ended."""
    started = time.monotonic()
    result, status, said = in_own_process(check, seconds)
    if result is None or status not in (0, None):
        how = f"killed after {seconds:.0f} s" if status is None else f"exit status {status}"
        last = said.strip().splitlines()[-1:] or ["it said nothing"]
        excused = status is None and not required
        result = {"passed": excused, "fault": f"{how}: {last[0]}", "said": said[-4000:]}
    return {"seconds": round(time.monotonic() - started, 1), **result}


def run_inside(step: Step, work: Work) -> Values:
    """In the process of a step: its result, with the seed that repeats its random numbers."""
    if work.scope.dry:
        from parallel_parnet.kernels.gpu import interpreter  # here, since it changes Triton's

        interpreter.install()
    exact_fp32()
    seed = torch.seed()
    return {**step.check(work), "seed": seed}


def to_run(steps: Sequence[Step], results: Mapping[str, Values]) -> list[Step]:
    """Those that have something left to measure, and those that compile for them."""
    left = {step.name for step in steps if not (step.compiles or _is_complete(results.get(step.name)))}
    again = {step.name for step in steps if results.get(step.name, {}).get("failed")}
    return [step for step in steps if step.name in left | again or left.intersection(step.compiles)]


def _is_complete(result: Values | None) -> bool:
    return result is not None and not result.get("left_out") and "fault" not in result and "faults" not in result


def run_steps(steps: Sequence[Step], journal: Journal, args: argparse.Namespace, console: Console) -> None:
    """One after the other, each until its place in the schedule: what an early one leaves is the next one's. A dry run
    has no such places, since no step takes its share there."""
    start, shares = time.monotonic(), sum(step.seconds for step in steps)
    end = start
    for step in steps:
        end += args.seconds * step.seconds / shares
        last = start + args.seconds
        limit = last if args.dry_run else min(last, max(end, time.monotonic() + LEAST))
        seconds = limit - time.monotonic()
        if seconds < LEAST / 2:
            result = {"passed": not step.required, "fault": "not run: the time was over", "seconds": 0.0}
        else:
            work = Work(step.name, journal, scope(args.dry_run), args.out, limit - SPARE)
            result = run_step(partial(run_inside, step, work), seconds, step.required)
        journal.end(step.name, result)
        write(journal, args.out)
        console.print(f"{step.name}: {'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s")


def found_here(dry: bool) -> Values:
    """The machine that is checked; ParNetError where there is no GPU. Asked in a fork: this process never uses it."""
    answer, _, said = in_own_process(partial(_machine, dry), ASKING)
    if not isinstance(answer, dict):
        raise answer if isinstance(answer, ParNetError) else ParNetError(f"the GPU does not answer: {said.strip()}")
    return answer


def _machine(dry: bool) -> Values | ParNetError:
    try:
        return machine(scope(dry).device)
    except ParNetError as error:
        return error


def write(journal: Journal, out: Path) -> dict[str, Values]:
    """gpu-check.json and gpu-check.md of all rows so far; the results, in the order of the steps."""
    found = journal.results()
    results = {step.name: found[step.name] for step in STEPS if step.name in found}
    write_json(out / "gpu-check.json", {**({"note": journal.note} if journal.note else {}), "steps": results})
    write_atomically(out / "gpu-check.md", markdown(results, journal.note))
    return results


def main() -> int:
    args, console = parse_arguments(), plain_console()
    if args.dry_run and not DRY_RUN.items() <= os.environ.items():
        line = [*command("gpu-check"), *sys.argv[1:]]
        os.execve(line[0], line, environment(**DRY_RUN))
    chosen = [step for step in STEPS if step.name.replace(" ", "-") in args.step]
    note = scope(args.dry_run).note
    journal = Journal(args.out / "gpu-check.jsonl", note)
    found = found_here(args.dry_run)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParNetError(f"--out {args.out}: cannot be made ({error.strerror})") from None
    if args.fresh:
        journal.forget({step.name for step in chosen})
    journal.begin({key: found[key] for key in SAME} | {"dry_run": args.dry_run})
    run_steps(to_run(chosen, journal.results()), journal, args, console)
    results = write(journal, args.out)
    table = make_table("step", "verdict", "seconds", "what", title=f"GPU check{f': {note}' if note else ''}")
    for row in verdicts(results):
        table.add_row(*row)
    console.print(table)
    tables = [str(args.out / result["table"]) for result in results.values() if "table" in result]
    if tables and not args.dry_run:
        console.print(f"engines read what was timed from {CONFIGS}: put {' and '.join(tables)} there", soft_wrap=True)
    # a step that compiles does not run where there is nothing to compile for
    unasked = {step.name for step in chosen if step.compiles or not step.required}
    return 0 if all(results.get(step.name, {}).get("passed", step.name in unasked) for step in chosen) else 1
