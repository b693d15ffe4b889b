"""How many GPUs should run ParNet, and which operations each: the fastest placement, its schedule, and why.

    python launch/plan.py --model parnet_xl --gpus 3 --link nvlink
    python launch/plan.py --model parnet_xl --gpus 3 --link 5us,20GB/s --exactly --figure plan.svg
    python launch/plan.py --device measured --link loopback --dtype float32
    python launch/plan.py --table

Predicted from stated numbers: nothing here runs on several GPUs. --device h200 is a roofline, so a floor.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet import VARIANTS, ParNetError, Placement, Program, create_model, fold
from parallel_parnet.cores import cores
from parallel_parnet.executors.available import EXECUTORS
from parallel_parnet.executors.backends import ON_CPUS
from parallel_parnet.files import as_json, check_writable, write_json
from parallel_parnet.planning.costs import H200, Costs, Device, Measured
from parallel_parnet.planning.explain import critical_transfers, duration, explain, gantt, lanes_in_words
from parallel_parnet.planning.planner import Schedule, schedule
from parallel_parnet.planning.search import search

from .. import sections
from ..common import DTYPES, Parser, add_model_arguments, count, fit_norms, load_model, pixels, plain_console
from ..common import table as make_table
from ..drawing import check, draw
from .measured import find_link, measure, on_a_thread

TABLE_ROWS = (  # link, device, efficiency
    ("nvlink", "h200", 1.0), ("nvlink", "h200", 0.5), ("pcie", "h200", 1.0), ("pcie", "h200", 0.5),
    ("loopback", "measured", 1.0),
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--gpus", type=count, default=3, help="lanes that there are (default: %(default)s)")
    parser.add_argument("--exactly", action="store_true", help="use all of them, even where fewer are faster")
    parser.add_argument(
        "--link", default="nvlink",
        help="nvlink, peer, pcie, loopback, FILE.json[:NAME] of launch/infer.py --measure-links, or as 5us,20GB/s",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["h200", "measured"], default="h200", help="default: %(default)s (roofline)"
    )
    parser.add_argument(
        "--efficiency", type=float, default=1.0, help="share of the roofline that kernels reach, assumed"
    )
    parser.add_argument("--img-size", type=pixels, help="pixels; default: the network's own")
    parser.add_argument("-b", "--batch-size", type=int, default=1, help="pictures per pass (default: %(default)s)")
    parser.add_argument("--executor", choices=EXECUTORS, default="auto", help="whose operations are measured")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on the h200, float32 as measured here")
    parser.add_argument("--json", help="write the result to this file; - for a last line of output")
    parser.add_argument("--figure", type=Path, help="write the schedule as .svg or .png (needs matplotlib)")
    parser.add_argument("--table", action="store_true", help="S to XL on 1 to 3 lanes over all links, as Markdown")
    args = parser.parse_args()
    if args.table and len(sys.argv) > 2:
        raise ParNetError("--table has its own networks, lanes and links, and goes to standard output: give it alone")
    if args.executor != "auto" and args.device != "measured":
        raise ParNetError("--executor is whose operations are measured: add --device measured, or leave it out")
    if args.efficiency != 1 and args.device == "measured":
        raise ParNetError("--efficiency is a share of the roofline: leave it out with --device measured")
    check_writable(None if args.json == "-" else args.json or None, args.figure, reads=[args.checkpoint])
    if args.figure:
        check(args.figure)
    return args


def costs_of(
    program: Program, link: str, device: str, efficiency: float = 1.0, size: int | None = None, batch: int = 1,
    dtype: str | None = None, executor: str = "auto",
) -> tuple[Costs, Device]:  # fmt: skip
    """The costs, and the device that they come from."""
    kind, chosen = DTYPES[dtype or ("bfloat16" if device == "h200" else "float32")], find_link(link)
    lane = H200.at(efficiency) if device == "h200" else lane_here(program, kind, size, batch, executor)
    return Costs.of(program, lane, chosen, size, batch, kind.itemsize), lane


def lane_here(program: Program, dtype: torch.dtype, size: int | None, batch: int, executor: str) -> Measured:
    """A lane as this machine has it: a GPU, or a core with one thread, since the search gives each lane its own."""
    if torch.cuda.is_available() and executor not in ON_CPUS:
        return measure(program, torch.device("cuda"), dtype, size, batch, executor)
    lane = on_a_thread(program, dtype, size, batch, executor)
    return replace(lane, source=f"{lane.source}; each lane is taken to have a core, of which {cores()} are here")


def summary(result: Schedule) -> dict:
    """A schedule as JSON, in seconds."""
    return {
        "lanes": result.placement.lanes,
        "makespan_s": result.makespan,
        "speed_up": result.speed_up,
        "idle_s": [result.idle(lane) for lane in range(result.placement.lanes)],
        "bounds_s": {"work": result.bounds.work, "span": result.bounds.span, "lower": result.bounds.lower},
        "placement": {name: list(lanes) for name, lanes in result.placement.where.items()},
        "critical_path": [
            {"what": str(item), "start_s": item.start, "end_s": item.end} for item in result.critical_path
        ],
    }


def show(result: Schedule, title: str, console: Console) -> None:
    """The schedule as tables and bars."""
    table = make_table("makespan", "speed-up", "work / lanes", "longest path", "transfers", title=title)
    bounds = result.bounds
    table.add_row(
        duration(result.makespan), f"{result.speed_up:.2f}x", duration(bounds.work / bounds.lanes),
        duration(bounds.span), f"{len(result.transfers)}, {len(critical_transfers(result))} critical",
    )  # fmt: skip
    console.print(table)
    console.print("\n".join(lanes_in_words(result)))
    console.print(gantt(result, min(100, console.width - 11)))


def print_table() -> None:
    """What results/plans.md has: the fastest placement on exactly 1, 2 and 3 lanes, and a stream per lane."""
    lanes = ("1 lane", "2 lanes", "3 lanes", "3, by streams", "best")
    print(sections.table(("", "link", "lanes are", *lanes, "the answer waits for transfers of"), []))
    for model in VARIANTS:
        program = fold(fit_norms(create_model(model)))
        for link, kind, efficiency in TABLE_ROWS:
            costs, device = costs_of(program, link, kind, efficiency)
            found = [search(program, costs, n, exactly=True, runner_up=False).best for n in (1, 2, 3)]
            best = min(found, key=lambda result: result.makespan)
            found.append(schedule(program, Placement.by_streams(program, 3), costs))
            cells = [duration(found[0].makespan), *(f"{duration(s.makespan)}, {s.speed_up:.2f}x" for s in found[1:])]
            waits = ", ".join(s.transfer.feature for s in critical_transfers(best)) or "none"
            print(f"| {' | '.join((model, link, device.name, *cells, str(best.placement.lanes), waits))} |")


def main() -> int:
    args = parse_arguments()
    if args.table:
        print_table()
        return 0
    console = plain_console(120, stderr=args.json == "-")
    program = fold(load_model(args)[0])
    costs, device = costs_of(
        program, args.link, args.device, args.efficiency, args.img_size, args.batch_size, args.dtype, args.executor
    )
    answer = search(program, costs, args.gpus, args.exactly)
    lanes = answer.best.placement.lanes
    if args.figure:
        draw(answer.best, f"{lanes} lanes over {args.link}, {device.name}", args.figure)
    result = {
        "link": args.link,
        "device": device.name,
        "sources": list(costs.sources),
        "best": summary(answer.best),
        "runner_up": answer.runner_up and summary(answer.runner_up),
    }
    if args.json and args.json != "-":
        write_json(args.json, result)
    show(answer.best, f"Fastest placement, {lanes} of {args.gpus} lane(s), predicted", console)
    console.print(explain(answer, args.link))
    console.print("computed, not measured, from: " + "; ".join(costs.sources), soft_wrap=True)
    if args.json == "-":
        print(as_json(result))
    return 0
