"""Does latency follow depth, or work? Measure families of networks that part the two, fit, draw, and say.

    python launch/latency_vs_depth.py            # resumes where it was interrupted
    python launch/latency_vs_depth.py --quick    # three minutes on two CPU cores

Families: (a) the same blocks in one to many streams: depth varies, work does not; (b) the same depth, work growing by
width or by streams; (c) batches and resolutions; (d) the published networks. Each is measured on this device with
every executor asked for, and simulated with a lane per stream. Networks of a group are in memory together, those of
ParNet-S to XL in 11 GB.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from parallel_parnet import ParNetError
from parallel_parnet.executors.available import METHODS
from parallel_parnet.executors.backends import lacking
from parallel_parnet.executors.distributed import sources_digest
from parallel_parnet.files import as_json, check_writable, write_csv, write_json
from parallel_parnet.planning.costs import Link
from parallel_parnet.program.contract import dtype_name

from ..bench.machine import describe
from ..bench.measure import bars
from ..common import DTYPES, RESULTS, Parser, check_folder, machine, plain_console, slug
from ..plan.measured import find_link
from ..ranks import Ranks
from .busiest import busiest
from .curves import draw
from .measure import interleaved, operation_seconds, prepare
from .page import write_page
from .points import Point, points
from .simulated import lane_per_stream

EXECUTORS = ("eager", "native", "inductor", "openvino", "cuda_graph", "cuda_streams")
SIDE_BY_SIDE = ("native",)  # on the CPU: those whose threads share a level
PASSING = ("date", "commit")  # what may differ between rows of one file
SECONDS = 8.0  # of timed runs for a group and executor; a quarter of it with --quick


class Log:
    """Rows measured so far, in a JSON file that is whole after every group. foreign: why none may be added to those
    that the file has, whose header stays theirs; empty where some may."""

    def __init__(self, path: Path, header: dict) -> None:
        self.path, self.header, self.today, self.foreign = path, header, header["date"], ""
        self.rows: list[dict] = []
        if path.exists():
            try:
                content = json.loads(path.read_text())
                self.header, self.rows = content["header"], content["rows"]
                changed = [key for key in header if key not in PASSING and self.header.get(key) != header[key]]
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ParNetError(f"{path}: no result of this experiment ({error}); move it away") from None
            if changed:
                told = self.header.get(changed[0], "not told")
                self.foreign = (
                    f"its {changed[0]} is {told}, and {header[changed[0]]} here; move it away to measure anew"
                )

    def has(self, group: str, executor: str) -> bool:
        """Whether this group was measured with this executor."""
        return any(row["group"] == group and row["executor"] == executor for row in self.rows)

    def add(self, rows: list[dict]) -> None:
        """Keep these rows, on disk too, as JSON and as CSV."""
        first = self.header["date"].split(" ")[0]
        self.header = self.header | {"date": first if first == self.today else f"{first} to {self.today}"}
        self.rows += rows
        write_json(self.path, {"header": self.header, "rows": self.rows})
        write_csv(self.path.with_suffix(".csv"), self.rows)


def measure_group(
    group: list[Point], executor: str, device: torch.device, dtype: torch.dtype, link: Link, seconds: float
) -> list[dict]:
    """A row for each network of the group."""
    subjects = [prepare(point, executor, device, dtype) for point in group]
    alone = [prepare(point, executor, device, dtype, threads=1) for point in group if executor in SIDE_BY_SIDE]
    found = interleaved([*subjects, *alone], device, seconds)
    one_lane = {s.point: float(np.median(own)) for s, own in zip(alone, found[len(subjects) :], strict=True)}
    rows = []
    for subject, times in zip(subjects, found, strict=False):
        point, program = subject.point, subject.program
        gflops = program.cost(point.size, point.batch).flops / 1e9
        p20, p50, p80 = np.percentile(times, [20, 50, 80])
        lanes = point.streams if METHODS[executor].captured else 1
        if executor in SIDE_BY_SIDE:
            lanes = torch.get_num_threads()
        steps, work = busiest(program, point.size, point.batch, lanes)
        if executor in SIDE_BY_SIDE:  # whose lanes share operations too
            work = gflops / lanes
        span = busiest(program, point.size, point.batch, point.streams).gflops
        row = {
            "group": point.group, "network": point.network, "executor": executor, "depth": point.depth,
            "streams": point.streams, "batch": point.batch, "size": point.size, "gflops": round(gflops, 6),
            "parameters": program.parameters, "median_ms": round(p50, 4), "p20_ms": round(p20, 4),
            "p80_ms": round(p80, 4), "n": len(times), "one_lane_ms": one_lane.get(point),
            "lanes": lanes, "steps": steps, "busiest_gflops": work, "span_gflops": span, "sum_ms": None,
            "lanes_ms": None, "linked_lanes_ms": None,
        }  # fmt: skip
        if row["one_lane_ms"] is not None:
            row["lanes_ms"] = round(row["one_lane_ms"] * span / gflops, 4)
        if executor == "eager":
            each = operation_seconds(program, point, device, dtype)
            row["sum_ms"] = round(sum(each.values()) * 1e3, 4)
            row["lanes_ms"] = round(lane_per_stream(program, point, each) * 1e3, 4)
            row["linked_lanes_ms"] = round(lane_per_stream(program, point, each, link) * 1e3, 4)
        rows.append(row)
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer networks and runs")
    parser.add_argument(
        "--executors",
        nargs="+",
        choices=EXECUTORS,
        help="default: eager, native and openvino where they can be had; on a GPU CUDA graphs",
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--only", metavar="TEXT", default="", help="groups whose names contain this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results (default: results)")
    parser.add_argument("--page", type=Path, help="Markdown page to write; default: beside the results")
    return parser.parse_args()


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    threads, device, dtype = ranks.take_threads(), ranks.device(args.device), DTYPES[args.dtype]
    compiled = ("native",) if args.quick else ("native", "openvino")
    on_cpu = ["eager", *(name for name in compiled if not lacking(name))]
    link = find_link("loopback" if device.type == "cpu" else "nvlink")
    about = describe(device)
    header = {
        "machine": machine(device), "dtype": dtype_name(dtype), "threads": threads,
        "torch": torch.__version__, "quick": args.quick, "link": link.name, "date": time.strftime("%Y-%m-%d"),
        "sources_digest": sources_digest()[:16], **{k: about[k] for k in ("cpu", "isa", "commit") if k in about},
    }  # fmt: skip
    name = f"latency-vs-depth-{slug(header['machine'])}-{header['dtype']}{'-quick' if args.quick else ''}"
    check_folder(args.out)
    check_writable(args.page)
    log = Log(args.out / f"{name}.json", header)
    groups = {name: group for name, group in points(args.quick).items() if args.only in name}
    if not groups:
        raise ParNetError(f"--only {args.only}: choose part of one of {', '.join(points(args.quick))}")
    executors = args.executors or (on_cpu if device.type == "cpu" else ["cuda_graph"])
    todo = [(group, executor) for group in groups for executor in executors if not log.has(group, executor)]
    console = plain_console(stderr=True)
    if log.foreign and todo:
        raise ParNetError(f"{log.path}: not continued: {log.foreign}")
    if not todo:
        console.print(f"{log.path}: all is there already, of {log.header['date']}: nothing is measured", soft_wrap=True)
    if log.foreign:
        console.print(f"note: {log.foreign}", soft_wrap=True)
    with bars(console) as progress:
        task = progress.add_task("", total=sum(len(groups[group]) for group, _ in todo))
        for group, executor in todo:
            progress.update(task, description=f"{group}, {executor}")
            seconds = SECONDS / 4 if args.quick else SECONDS
            log.add(measure_group(groups[group], executor, device, dtype, link, seconds))
            progress.advance(task, len(groups[group]))
    page = args.page or args.out / f"{name}.md"
    write_page(page, log.rows, log.header, draw(log.rows, log.header, args.out, name))
    print(as_json({"results": str(log.path), "page": str(page), "rows": len(log.rows)}))
    return 0
