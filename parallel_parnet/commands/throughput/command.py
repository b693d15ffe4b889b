"""What a batch costs: pictures a second and latency as the batch grows, by our executor and the peers at hand.

    python launch/throughput.py --model parnet_s
    python launch/throughput.py --model parnet_xl --batches 1 2 4 8 16 --budget 130
    python launch/throughput.py --page docs/performance.md

At each batch the executor that the engine chooses and the libraries that are installed are set up, proven and timed in
turns, as by launch/bench.py, which tells what is timed; peers that are far from the fastest are listed and not timed.
The result goes to a folder as JSON. --page measures nothing: it draws the results of this machine that lie in the
folder, and puts them, in words and numbers, on a page. The last line on stdout is one JSON object.

Exit status: 0; 1 where an executor of ours failed at some batch; 2 for wrong input, or where parity fails.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console

from parallel_parnet import ParNetError
from parallel_parnet.files import as_json, write_json
from parallel_parnet.program.contract import dtype_name

from ..bench.command import subject_from
from ..bench.machine import describe, possible
from ..bench.measure import contenders
from ..bench.ours import usual
from ..bench.rows import SHORT
from ..bench.rows import read as read_result
from ..common import (
    DTYPES,
    RESULTS,
    Parser,
    add_model_arguments,
    check_folder,
    count,
    machine,
    pixels,
    plain_console,
    positive,
    slug,
    typed,
)
from ..common import table as make_table
from ..drawing import FORMATS, need_matplotlib
from ..gpu.device import exact_fp32, require_gpu
from ..ranks import Ranks
from ..sections import check, link, put
from .measure import LEAST, PEERS, measure
from .words import HEADS, NEXT, TITLE, WHAT, cells, section, sentences

BATCHES = (1, 2, 4, 8, 16)
BUDGET = 60.0  # seconds of timed runs
KEYS = ("header", "batches", "sentences")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--batches", nargs="+", type=count, default=BATCHES, help="sizes (default: 1 2 4 8 16)")
    parser.add_argument("--img-size", type=pixels, help="pixels; default: the network's own")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument(
        "--budget", type=positive, default=BUDGET, metavar="SECONDS",
        help=f"of timed runs together, set-ups aside; {LEAST} of each at least (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="contenders of launch/bench.py, by name or part of one"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results (default: results)")
    parser.add_argument("--page", type=Path, metavar="FILE", help="draw this machine's results, and write them here")
    args = parser.parse_args()
    args.batches = sorted(set(args.batches))
    check_folder(args.out)
    if args.page:
        check(args.page, TITLE, NEXT)
    return args


def show(result: dict, console: Console) -> None:
    """The table, what was not timed, and what the numbers say."""
    table = make_table(*HEADS, title="Batches")
    for row in cells(result):
        table.add_row(*row)
    console.print(table)
    for found in result["batches"]:
        for name, why in {**found["missing"], **found["disagree"]}.items():
            console.print(f"batch {found['batch']}: {name}: {why}", soft_wrap=True)
    for text in (WHAT, "", *result["sentences"]):
        console.print(text, soft_wrap=True)


def read(path: Path) -> dict:
    """A result of this command; ParNetError where the file is something else."""
    return read_result(path, KEYS, "launch/throughput.py")


def write_page(page: Path, folder: Path, where: str) -> Path:
    """The figure of a machine's results beside them, as SVG and PNG, and the section on the page; the SVG's path.

    where: the type and the machine, as in file names.
    """
    files = list(folder.glob(f"throughput-*-{where}.json"))
    if not files:
        raise ParNetError(
            f"--page: no results of this type and machine ({where}) in {folder}: run make throughput first"
        )
    found = sorted(((read(path), path) for path in files), key=lambda pair: pair[0]["header"]["parameters_m"])
    need_matplotlib("--page")
    from .picture import draw

    figure = folder / f"throughput-{where}.svg"
    results = [result for result, _ in found]
    for ending in FORMATS:
        draw(results, figure.with_suffix(ending))
    links = [link(path, page) for _, path in found]
    put(page, TITLE, section(results, links, link(figure, page)), NEXT)
    return figure


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    began, threads, device = time.perf_counter(), ranks.take_threads(), ranks.device(args.device)
    where = f"{SHORT[dtype_name(DTYPES[args.dtype])]}-{slug(machine(device))}"
    if args.page:
        print(as_json({"figure": str(write_page(args.page, args.out, where)), "page": str(args.page)}))
        return 0
    console, progress = plain_console(160), plain_console(stderr=True)
    if device.type == "cuda":
        require_gpu()
        exact_fp32()
    args.batch_size = max(args.batches)
    subject = subject_from(args, device, threads)
    chosen = contenders(args.only or [usual(subject), *PEERS[device.type]])
    header = {
        "model": subject.name, "size": subject.size, "dtype": dtype_name(subject.dtype), "machine": machine(device),
        "threads": threads, "budget_s": args.budget, "load_before": round(os.getloadavg()[0], 2),
        "parameters_m": round(subject.program.parameters / 1e6, 2), **describe(device),
        "command": typed(),
        "possible": possible(device, subject.dtype),
    }  # fmt: skip
    batches = measure(subject, args.batches, chosen, args.budget, header["possible"], progress)
    header["seconds"] = round(time.perf_counter() - began, 1)
    result = {"header": header, "batches": batches}
    result["sentences"] = sentences(result)
    path = args.out / f"throughput-{Path(subject.name).stem}-{subject.size}-{where}.json"
    write_json(path, result)
    show(result, console)
    failed = sorted({name for found in batches for name in found["failed"]})
    print(
        as_json(
            {"seconds": header["seconds"], "verdict": result["sentences"][-1], "failed": failed, "results": str(path)}
        )
    )
    return 1 if failed else 0
