"""Hold the planner's predictions against what this machine really does, placement by placement.

    python launch/plan_check.py
    python launch/plan_check.py --json --page docs/planner.md

Measures the link between two ranks, and each model's operations on one lane; predicts; then runs each placement in as
many ranks, one compute thread each on a CPU, and takes the median latency. All by the executor that runs there without
being chosen: our kernels, on a GPU captured in CUDA graphs. Ranks beyond the cores or GPUs share them, in the
prediction as well. About four minutes on two cores. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.progress import track

from parallel_parnet import Engine, ParNetError, Placement, Program, create_model, fold
from parallel_parnet.cores import cores
from parallel_parnet.executors.available import EXECUTORS, choose_executor
from parallel_parnet.files import as_json, check_writable, write_json
from parallel_parnet.network.variants import variant
from parallel_parnet.planning.costs import Costs, Link, Measured
from parallel_parnet.planning.planner import schedule

from .. import sections
from ..bench.machine import describe
from ..common import RESULTS, Parser, count, fit_norms, machine, plain_console, slug
from ..common import table as make_table
from ..processes import command, environment, run_within
from ..ranks import Ranks
from .measured import find_link, measure, timed
from .prediction import HEADS, NEXT, TITLE, cells, middle_error, section, sentences

CASES = {  # name: ranks, arguments of launch/infer.py
    "1 lane": (1, ()),
    "2 lanes, by streams": (2, ("--streams-per-gpu", "2")),
    "2 lanes, planned": (2, ("--placement", "auto")),
    "3 lanes, by streams": (3, ("--streams-per-gpu", "1")),
    "3 lanes, planned": (3, ("--placement", "auto")),
}
MEASURED = "measured"
MESSAGES = 100  # of each size, between two ranks
LIMIT_S = 600.0  # of one start of ranks
HERE = Path()  # stands for a name of its own


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["parnet_s", "parnet_xl"], help="default: %(default)s")
    parser.add_argument("--iterations", type=count, default=20, help="timed passes of a case (default: %(default)s)")
    parser.add_argument("--link", default=MEASURED, help="measured, or as launch/plan.py (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument(
        "--executor", choices=EXECUTORS, help="default: what runs there by itself, native or, on GPUs, cuda_graph"
    )
    parser.add_argument(
        "--json", type=Path, nargs="?", const=HERE, metavar="FILE",
        help="write the result; without a name to results/planner-check-MACHINE.json",
    )  # fmt: skip
    parser.add_argument("--page", type=Path, metavar="FILE", help="put the result on this page as well; needs --json")
    args = parser.parse_args()
    if args.page and not (args.json and os.path.isfile(args.page)):
        raise ParNetError(f"--page {args.page}: give --json too, which the page links to, and a page that there is")
    if args.page:
        sections.check(args.page, TITLE, NEXT)
    if args.json != HERE:
        check_writable(args.json)
    args.models = list(dict.fromkeys(args.models))  # whose rows are found by name
    for model in args.models:
        variant(model)  # a wrong one is told before anything is measured
    if args.link != MEASURED:
        find_link(args.link)  # a wrong link is told before anything is measured
    return args


def alone(program: Program, device: torch.device, executor: str, iterations: int) -> tuple[Placement, float]:
    """One lane in this process: its placement, and the median seconds of a pass."""
    placement = Placement.single(program)
    engine = Engine(program, placement, device, executor=executor)
    x = torch.randn(1, 3, program.config.image_size, program.config.image_size, device=device)
    times = [timed(partial(engine, x), device) for _ in range(iterations + 1)]
    return placement, median(times[1:])


def start_ranks(ranks: int, arguments: tuple[str, ...], device: torch.device, answer: Path) -> dict:
    """What launch/infer.py writes with these arguments, started by torchrun with a thread for each rank, as in the
    measurement of the operations. ParNetError where it fails, or is not done after LIMIT_S."""
    line = [*command("infer", ranks), *arguments, "--device", device.type, "--json", str(answer)]
    what = f"{ranks} ranks ({' '.join(arguments)})"
    status, _, errors = run_within(line, LIMIT_S, environment(OMP_NUM_THREADS="1"))
    if status is None:
        raise ParNetError(f"{what} were not done after {LIMIT_S:g} s")
    if status:
        raise ParNetError(f"{what} failed: {(errors.strip().splitlines() or ['they said nothing'])[0]}")
    return json.loads(answer.read_text())


def in_ranks(model: str, case: str, device: torch.device, executor: str, link: str, iterations: int) -> dict:
    """A case as launch/infer.py ran it over ranks."""
    ranks, arguments = CASES[case]
    asked = ("--model", model, *arguments, "--executor", executor, "--iterations", str(iterations))
    planned = ("--link", link) if "auto" in arguments else ()
    with tempfile.TemporaryDirectory() as folder:
        result = start_ranks(ranks, (*asked, *planned), device, Path(folder) / "answer.json")
    threads = {lane["threads"] for lane in result["placement"]["lanes"]}
    if device.type == "cpu" and threads != {1}:
        raise ParNetError(f"{ranks} ranks took {max(threads)} threads each, where the operations were measured on one")
    if result["executor"] != executor:
        raise ParNetError(f"{ranks} ranks ran {result['executor']}, where the operations were those of {executor}")
    return result


def check(
    model: str, case: str, program: Program, operations: Measured, way: str, device: torch.device, executor: str,
    iterations: int,
) -> dict:  # fmt: skip
    """Predict, run, compare. operations: as measured on one lane; way: the link, as text."""
    ranks, _ = CASES[case]
    if ranks == 1:
        placement, measured = alone(program, device, executor, iterations)
    else:
        result = in_ranks(model, case, device, executor, way, iterations)
        where = {name: tuple(lanes) for name, lanes in result["placement"]["operations"].items()}
        placement, measured = Placement(ranks, where), result["latency_ms"]["median"] * 1e-3
    costs = Costs.of(program, operations, find_link(way))
    predicted = schedule(program, placement, costs, processors(device)).makespan
    return {
        "model": model, "case": case, "lanes": ranks, "predicted_s": predicted, "measured_s": measured,
        "error": predicted / measured - 1, "load_average": os.getloadavg()[0],
    }  # fmt: skip


def processors(device: torch.device) -> int:
    """That lanes share where they are more."""
    return torch.cuda.device_count() if device.type == "cuda" else cores()


def described(way: Link) -> dict:
    """A link as the result has it."""
    speed = {"latency_us": way.latency_s * 1e6, "gb_per_s": way.bytes_per_s / 1e9}
    return {"name": way.name, **speed, "source": way.source}


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    device = ranks.device(args.device)
    executor = args.executor or ("cuda_graph" if device.type == "cuda" else "auto")
    executor = choose_executor(executor, device, torch.float32)
    torch.set_num_threads(1)
    progress, rows = plain_console(stderr=True), []
    with tempfile.TemporaryDirectory() as folder:
        way = args.link
        if way == MEASURED:
            progress.print("measuring the link between two ranks")
            way = str(Path(folder) / "links.json")
            start_ranks(2, ("--measure-links", "--iterations", str(MESSAGES)), device, Path(way))
        between = find_link(way)
        for model in args.models:
            program = fold(fit_norms(create_model(model)))
            for case in track(CASES, model, console=progress, transient=True):
                if not progress.is_terminal:  # which shows no bar
                    progress.print(f"{model}, {case}")
                # anew for each case, since other work on a machine comes and goes
                operations = measure(program, device, torch.float32, None, 1, executor)
                rows.append(check(model, case, program, operations, way, device, executor, args.iterations))
    result = {
        "machine": machine(device), "processors": processors(device), "executor": executor, "dtype": "float32",
        "batch": 1, "threads": 1, **describe(device), "link": described(between),
        "median_absolute_error": middle_error(rows), "cases": rows,
    }  # fmt: skip
    console = plain_console()
    shown = make_table(*HEADS, title=f"By {executor}")
    for row in cells(result):
        shown.add_row(*row)
    console.print(shown)
    for sentence in sentences(result):
        console.print(sentence, soft_wrap=True)
    if args.json:
        file = RESULTS / f"planner-check-{slug(result['machine'])}.json" if args.json == HERE else args.json
        write_json(file, result)
        if args.page:
            sections.put(args.page, TITLE, section(result, sections.link(file, args.page)), NEXT)
    print(as_json({key: result[key] for key in ("median_absolute_error", "executor", "machine", "date")}))
    return 0
