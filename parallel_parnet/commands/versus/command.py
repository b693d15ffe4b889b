"""Is ParNet really faster than ResNet, on this machine? Both by one engine, and by the best other library at hand.

    python launch/versus.py
    python launch/versus.py --json versus.json --figure versus.svg
    python launch/versus.py --page docs/performance.md           # also numbers and picture, into results/

ParNet-S to XL, ResNet-34 and 50, RepVGG-B1g4 and B2g4 at batch 1, 224 x 224 pixels, fp32: measured on one thread and on
all, in turns with the other libraries that are installed, and simulated on two and three lanes. Weights are random,
accuracy is quoted. Three to four minutes on two cores. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from parallel_parnet import ParNetError
from parallel_parnet.executors.backends import lacking
from parallel_parnet.files import as_json, check_writable, write_json

from ..bench.machine import describe
from ..bench.measure import Settings
from ..bench.poster import QUOTED, SIZE
from ..common import RESULTS, Parser, machine, plain_console, positive, slug
from ..common import table as make_table
from ..drawing import FORMATS, need_matplotlib
from ..ranks import Ranks
from ..sections import check, link, put
from .measure import group, measure
from .page import NEXT, TITLE, cells, heads, section
from .simulated import WHAT
from .verdict import pairs, sentences

BUSY = 0.3  # of the load average before the start: above it, times say as much about who else was there
BUDGET = 30.0  # seconds of timed runs
SOURCE = 'Accuracy and depth are those of the poster of "Non-deep Networks" (arXiv 2110.07641), ImageNet top-1.'


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers and sentences")
    parser.add_argument("--figure", type=Path, metavar="FILE", help=f"accuracy against latency, {' or '.join(FORMATS)}")
    parser.add_argument(
        "--budget", type=positive, default=BUDGET, metavar="SECONDS",
        help="of timed runs together (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--page", type=Path, metavar="FILE", help="put table, picture and words on this page")
    args = parser.parse_args()
    if args.page:
        check(args.page, TITLE, NEXT)
        name = RESULTS / f"versus-{slug(machine(torch.device('cpu')))}.json"
        args.json, args.figure = args.json or name, args.figure or name.with_suffix(".svg")
    if args.figure and args.figure.suffix not in FORMATS:
        raise ParNetError(f"--figure {args.figure}: give a name that ends in {' or '.join(FORMATS)}")
    check_writable(args.json, args.figure)
    return args


def show(rows: list[dict], cores: int, console: Console) -> None:
    """The table: as published, by our engine, by the best peer, and simulated."""
    table = make_table(*heads(cores), title="Latency of a picture")
    for row in rows:
        table.add_row(*cells(row), style="bold" if row["ours"] else None)
    console.print(table)


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    if reason := lacking("native"):
        raise ParNetError(f"the comparison is by our CPU kernels: {reason}")
    began, cores, device = time.perf_counter(), ranks.take_threads(), torch.device("cpu")
    console, progress = plain_console(140), plain_console(stderr=True)
    if args.figure:
        need_matplotlib("--figure")
    header = {
        "machine": machine(device), "threads": cores, "size": SIZE, "dtype": "float32", "budget_s": args.budget,
        "load_before": round(os.getloadavg()[0], 2), **describe(device),
    }  # fmt: skip
    rows = []
    for networks in track(group(QUOTED), "", console=progress, transient=True):
        if not progress.is_terminal:  # which shows no bar
            progress.print(f"timing {', '.join(quoted.name for quoted in networks)}")
        share = args.budget * len(networks) / len(QUOTED)
        rows += measure(networks, cores, Settings(runs=30, least=5, warm_up=1, budget=share))
    rows.sort(key=lambda row: (row["ours"], row["top1"]))
    show(rows, cores, console)
    said = sentences(rows, cores)
    if header["load_before"] > BUSY:
        console.print(f"The machine was busy (load average {header['load_before']}): run this again when it is not.")
    for text in (SOURCE, WHAT, "", *said):
        console.print(text, soft_wrap=True)
    header["seconds"] = round(time.perf_counter() - began, 1)
    if args.json:
        write_json(args.json, {"header": header, "rows": rows, "sentences": said})
    if args.figure:
        from .picture import draw

        draw(rows, header, args.figure)
    if args.page:
        links = (link(path, args.page) for path in (args.json, args.figure))
        put(args.page, TITLE, section(header, rows, said, *links), NEXT)
    compared = {pair.rival["network"]: pair.parnet["network"] for pair in pairs(rows)}
    print(as_json({"seconds": header["seconds"], "compared": compared, "verdict": said[-1]}))
    return 0
