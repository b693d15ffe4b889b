"""Time every executor of ours and every installed peer on one network, side by side, and say what can be trusted.

    python launch/bench.py --model parnet_s
    python launch/bench.py --model parnet_xl --dtype bfloat16 --budget 100
    python launch/bench.py --model parnet_s --dtype int8
    python launch/bench.py --poster
    python launch/bench.py --compare OLD.json NEW.json

Contenders take turns in one process (A B C C A B) on fresh random pictures in fp32, from the picture on the device to
the logits on the device. In int8 each quantises the network by itself, all of them by the same random pictures.
Nothing is timed unless every executor of ours gives the reference's logits; a peer that disagrees is listed and not
compared. Results go to a folder, as JSON and CSV; the last line on stdout is one JSON object.

Exit status: 0; 1 where an executor of ours failed, which the tables name while the others are timed; 2 for wrong input,
or where parity fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console

from parallel_parnet import ParNetError, fold
from parallel_parnet.files import as_json, write_atomically
from parallel_parnet.program.contract import dtype_name
from parallel_parnet.program.inputs import picture_side

from ..common import (
    DEMO_MODEL,
    DTYPES,
    RESULTS,
    Parser,
    add_model_arguments,
    check_folder,
    count,
    load_model,
    machine,
    pixels,
    plain_console,
    positive,
    typed,
)
from ..common import table as make_table
from ..gpu.device import exact_fp32, require_gpu
from ..ranks import Ranks
from ..tracing import add_trace_arguments, check_trace_arguments, write_traces
from .comparison import SAME, changes, differences
from .fused import fuse
from .isolation import isolated
from .machine import describe, possible
from .measure import Settings, contenders, measure
from .ours import engine_of
from .poster import SIZE, markdown, measure_poster, subject_of
from .rows import FEWEST, last_line, read, result_name, show, write
from .subject import CALIBRATING, PICTURES, Subject

ISOLATE = "--is"  # the shortest that argparse takes for --isolate, by which a process would start itself without end
PRECISIONS = {**DTYPES, "int8": torch.int8}


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("-b", "--batch-size", type=count, default=1, help="pictures per pass (default: %(default)s)")
    parser.add_argument("--img-size", type=pixels, help="pixels; default: the network's own")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=Settings.runs, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--warmup", type=count, default=Settings.warm_up, help="runs before (default: %(default)s)")
    parser.add_argument(
        "--budget", type=positive, default=Settings.budget, metavar="SECONDS",
        help=f"of timed runs, set-ups aside: slower contenders get fewer, {Settings.least} at least, and are marked",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contenders, by name or part of one")
    parser.add_argument("--isolate", action="store_true", help="each contender in a process of its own, not in turns")
    parser.add_argument("--poster", action="store_true", help="the poster's table: eight networks instead of --model")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what changed between two results"
    )
    add_trace_arguments(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for results (default: results)")
    args = parser.parse_args()
    if args.runs < 2:
        raise ParNetError(f"--runs {args.runs}: must be at least 2")
    if not args.compare:  # which writes nothing
        check_folder(args.out)
    if args.poster and (args.isolate or args.batch_size > 1 or args.img_size or args.only):
        raise ParNetError(
            f"--poster times networks in turns, each by its fastest ways, at batch 1 and {SIZE} pixels: "
            "leave --isolate out, and --batch-size, --img-size and --only"
        )
    if args.dtype == "int8" and (args.poster or args.batch_size > 1):
        raise ParNetError("--dtype int8 is of one network and one picture at a time: leave --poster, --batch-size out")
    check_trace_arguments(args)
    if (args.trace or args.report) and (args.isolate or args.poster or args.compare):
        raise ParNetError("--trace and --report are of one network in turns: leave --isolate, --poster, --compare out")
    return args


def subject_from(args: argparse.Namespace, device: torch.device, threads: int) -> Subject:
    """The network that was asked for."""
    model, _ = load_model(args)
    model.requires_grad_(False)
    name = args.checkpoint.name if args.checkpoint else args.model or DEMO_MODEL
    program = fold(model)
    size = picture_side(program, args.img_size)
    return Subject(name, model, fuse(model), program, size, args.batch_size, device, PRECISIONS[args.dtype], threads)


def header_of(args: argparse.Namespace, model: str, size: int, device: torch.device, threads: int) -> dict:
    """What a reader must know to make the numbers again."""
    dtype = PRECISIONS[args.dtype]
    return {
        "model": model, "size": size, "batch_size": args.batch_size, "dtype": dtype_name(dtype),
        "machine": machine(device), "threads": threads, "runs": args.runs, "warm_up": args.warmup,
        "budget_s": args.budget if args.budget < float("inf") else None, "pictures": PICTURES, "isolated": False,
        **describe(device), "command": typed(),
        "possible": possible(device, dtype),
    }  # fmt: skip


def introduce(header: dict, console: Console) -> None:
    """What is on, what is not, before the numbers."""
    turns = "each in a process of its own" if header["isolated"] else "in turns in one process"
    console.print(
        f"{header['model']}, {header['size']} x {header['size']} pixels, batch {header['batch_size']}, "
        f"{header['dtype']}, on {header['machine']}, {header['threads']} thread(s); {header['runs']} timed runs after "
        f"{header['warm_up']} warm-up runs, {turns}. Picture and logits stay on the device; {header['pictures']} "
        "pictures in turn; in turns, caches hold others' weights when a run starts. TF32 is off in fp32."
    )
    if header["dtype"] == "int8":
        console.print(
            f"All quantise after training by the same {CALIBRATING} random pictures; errors are against fp32."
        )
    if header["runs"] < FEWEST:
        console.print(f"note: {header['runs']} runs are few: {FEWEST} make a result")
    for kind, rate in header["possible"].items():
        console.print(
            f"possible here: {rate['flop_per_s'] / 1e9:.1f} GFLOP/s by a matrix product in {kind}, "
            f"{rate['bytes_per_s'] / 1e9:.1f} GB/s by a copy"
        )


def compare(old: Path, new: Path, console: Console) -> int:
    """Print what changed between two results, and the same as JSON."""
    results = read(old), read(new)
    for key in SAME:
        a, b = (result["header"][key] for result in results)
        if a != b:
            raise ParNetError(f"--compare: {key} is {a} in {old.name} and {b} in {new.name}: they cannot be compared")
    table = make_table("contender", "old ms", "new ms", "new / old (95% interval)", "", title="What changed")
    found = changes(*results)
    for change in found:
        interval = f"{change.value:.3f} ({change.low:.3f} to {change.high:.3f})"
        table.add_row(change.contender, f"{change.old_ms:.3f}", f"{change.new_ms:.3f}", interval, change.verdict)
    console.print(table)
    for key, a, b in differences(*results):
        console.print(f"{key}: {a} before, {b} now", soft_wrap=True)
    print(as_json({change.contender: {**vars(change), "verdict": change.verdict} for change in found}))
    return 0


def trace(subject: Subject, args: argparse.Namespace, console: Console) -> None:
    """What --trace and --report ask for, of the engine as a user has it who chooses nothing."""
    if not (args.trace or args.report):
        return
    picture = subject.pictures(1)[0]
    with engine_of(subject, "auto") as engine:
        engine.warm_up(picture)
        write_traces(engine, picture, args, console)


def poster(
    args: argparse.Namespace, device: torch.device, threads: int, settings: Settings, console: Console,
    progress: Console,
) -> int:  # fmt: skip
    """The poster's table, as JSON, CSV and Markdown."""
    dtype = PRECISIONS[args.dtype]
    header = header_of(args, "poster", SIZE, device, threads)
    introduce(header, console)
    result = measure_poster(header, lambda name: subject_of(name, device, dtype, threads), settings, progress)
    path = write(result, args.out, result_name("bench", header))
    write_atomically(path.with_suffix(".md"), markdown(result))
    console.print(markdown(result), soft_wrap=True)
    print(as_json({"results": str(path), "rows": len(result["rows"]), "failed": result["failed"]}))
    return 1 if result["failed"] else 0


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    console, progress = plain_console(160), plain_console(stderr=True)
    if args.compare:
        return compare(*args.compare, console)
    threads, device = ranks.take_threads(), ranks.device(args.device)
    if device.type == "cuda":
        if args.dtype == "int8":
            raise ParNetError("--dtype int8 runs on CPUs alone: add --device cpu")
        require_gpu()
        exact_fp32()
    settings = Settings(args.runs, min(Settings.least, args.runs), args.warmup, args.budget)
    if args.poster:
        return poster(args, device, threads, settings, console, progress)
    chosen = contenders(args.only, PRECISIONS[args.dtype])
    if args.isolate:
        result = isolated([a for a in sys.argv[1:] if not a.startswith(ISOLATE)], [c.name for c in chosen])
        result["header"] |= {"isolated": True, "command": typed()}
        introduce(result["header"], console)
    else:
        subject = subject_from(args, device, threads)
        header = header_of(args, subject.name, subject.size, device, threads)
        introduce(header, console)
        began = time.perf_counter()
        result = measure(subject, header, chosen, settings, progress)
        whole, timed = time.perf_counter() - began, sum(sum(row["samples_ms"]) for row in result["rows"]) / 1e3
        console.print(f"timed runs took {timed:.0f} s of {whole:.0f} s, proofs, set-ups and warm-ups the rest")
        trace(subject, args, progress)
    path = write(result, args.out, result_name("bench-infer", result["header"]))
    show(result, console)
    if not result["rows"] and not result["failed"]:  # after writing: --isolate reads what each of its processes lacks
        raise ParNetError("nothing was timed: none of these contenders runs here")
    print(as_json(last_line(result, path)))
    return 1 if result["failed"] else 0
