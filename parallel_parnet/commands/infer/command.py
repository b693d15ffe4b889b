"""Classify pictures with ParNet, its streams on as many devices as there are, and tell the latency.

    python launch/infer.py
    torchrun launch/infer.py --streams-per-gpu 1
    torchrun --nproc-per-node 3 launch/infer.py --streams-per-gpu 1 --image FOLDER --json answer.json
    torchrun --nproc-per-node 2 launch/infer.py --placement auto
    torchrun --standalone --nproc-per-node 3 --max-restarts 3 launch/infer.py --image FOLDER --jsonl answers.jsonl

--streams-per-gpu counts the network's parallel branches inside one inference. It has nothing to do with the
concurrent requests that trtexec (--infStreams) and OpenVINO (-nstreams) call streams.

--dtype int8 and fp8 need ranges of the network's features: --calibrate FOLDER finds them in pictures like those that it
will see, and the demo has its own.

--jsonl FILE is for thousands of pictures: requests follow one another without a gap, and each picture is one line of
FILE, an object with "image" and "top5", or "image" and "reason" where it has no answer. A FILE that is there is
continued: a picture that has its answer is not computed again; one with a reason is tried again, and gets a second line
where it then has an answer. "settings" in each line stands for network, weights, picture size, precision and labels; a
FILE made with others is refused. A line is whole or absent, whatever dies; it is on the disk itself a second later, or
when the run ends.

Exit status: 0; 1 where --verify found a difference, a rank was lost, logits were NaN or inf, or, without --jsonl, a
picture of a folder was skipped; 2 for wrong input, and where, without --jsonl, no picture has an answer; 130,
143 and 129 after SIGINT, SIGTERM and SIGHUP.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from rich.console import Console

from parallel_parnet import Engine, ParNetError, ParNetWarning, Program, fold
from parallel_parnet.files import check_writable, write_json
from parallel_parnet.preprocess import Preprocess, find_images, passed_over
from parallel_parnet.program.inputs import picture_side
from parallel_parnet.transport import join_ranks

from ..calibration import QUANTISED, quantised
from ..common import DEMO, RANDOM, Parser, add_model_arguments, count, load_model, plain_console, process_age
from ..engine_arguments import (
    add_engine_arguments,
    check_engine_arguments,
    describe,
    lane_hosts,
    place,
    type_of,
    warm_up,
)
from ..ranks import Ranks
from ..stopping import stop_on_signals
from ..tracing import add_trace_arguments, check_trace_arguments, write_traces
from .few import classify_and_time
from .lines import AnswerLines, stamp
from .links import measure_links
from .many import Pictures, answer_into
from .tables import read_labels, show_latency, show_setting, top5


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--image", action="extend", nargs="+", type=Path, help="pictures or folders; what is transparent is black"
    )
    parser.add_argument("--labels", type=Path, help="text file with a class name per line")
    add_engine_arguments(parser)
    parser.add_argument("--measure-links", action="store_true", help="of two ranks, for each transport, and end")
    parser.add_argument("--iterations", type=count, default=50, help="timed passes (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="passes before them (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare with the sequential fp32 reference")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    add_trace_arguments(parser)
    parser.add_argument("--jsonl", type=Path, metavar="FILE", help="append an answer per line; continues a FILE")
    args = parser.parse_args()
    check_trace_arguments(args)
    given = (args.checkpoint, args.labels, args.calibrate, *(args.image or ()))
    check_writable(args.json, args.trace, args.report, reads=given)
    check_engine_arguments(args)
    if args.warmup < 0:
        raise ParNetError(f"--warmup {args.warmup}: must not be negative")

    def among(*names: str) -> list[str]:
        return [f"--{name}" for name in names if getattr(args, name) != parser.get_default(name)]

    if args.measure_links and (idle := among("image", "verify", "jsonl", "trace", "report", "warmup")):
        raise ParNetError(f"--measure-links measures links alone: leave {', '.join(idle)} out")
    written = {os.path.realpath(path) for path in (args.json, args.trace, args.report) if path is not None}
    if args.jsonl and os.path.realpath(args.jsonl) in written:  # which other hosts need no place for
        raise ParNetError(f"--jsonl {args.jsonl}: named twice: give each file a name of its own")
    if args.verify and args.jsonl:
        raise ParNetError("--verify keeps all logits in memory: leave it out with --jsonl")
    if args.jsonl and (idle := among("iterations", "warmup")):
        raise ParNetError(f"--jsonl times the requests themselves, once each: leave {', '.join(idle)} out")
    return args


def wanted(args: argparse.Namespace, program: Program, console: Console) -> tuple[list[str], Pictures]:
    """A name for each class, and the pictures to classify; ParNetError where they are not there."""
    labels = read_labels(args.labels, program)
    given = args.image or [os.path.relpath(DEMO / "pictures")]
    named = frozenset(path for path in given if not os.path.isdir(path))  # a pipe is refused when it is read
    paths = list(dict.fromkeys(find_images(given)))
    for folder in (Path(path) for path in given if Path(path) not in named):
        if left_out := passed_over(folder):
            console.print(f"note: {left_out}")
    return labels, Pictures.at(paths, args.batch_size, Preprocess.of(program.config, args.img_size), named)


def coordinate(
    engine: Engine, exact: Program, pictures: Pictures, labels: list[str], args: argparse.Namespace, setting: dict,
    console: Console,
) -> int:  # fmt: skip
    """The coordinator's part: the pictures, to a file where there are many, or shown and timed. exact: in fp32."""
    if setting["weights"] == RANDOM:
        console.print("note: no checkpoint was given; the weights are random, so only the times mean anything")
    if args.jsonl is None:
        return classify_and_time(engine, exact, pictures, labels, setting, args, console)
    settings = stamp(engine.program.digest, setting["size"], setting["dtype"], labels)
    with AnswerLines(args.jsonl, settings) as lines:
        result = answer_into(lines, engine, pictures, lambda _, logits: {"top5": top5(logits, labels)}, console)
    show_setting(setting, console)
    if result["latency_ms"]:
        show_latency(result["latency_ms"], "Latency of a request, ms, its queues included", console)
    console.print(
        f"{args.jsonl}: {result['pictures']} pictures, of which {result['already_there']} were there already; "
        f"{result['skipped']} new ones have no answer; {result['pictures_per_s']:.1f} pictures/s"
    )
    if args.trace or args.report:
        write_traces(engine, pictures.first().to(engine.device), args, console)
    if args.json:
        write_json(args.json, result | setting)
    return 1 if result["faults"] else 0


def main() -> int:
    stop_on_signals()
    args, ranks = parse_arguments(), Ranks.from_environment()
    ranks.take_threads(args.threads)
    console = plain_console(120, quiet=ranks.rank != 0)
    device = ranks.device(args.device)
    if args.measure_links:
        return measure_links(args.transport, ranks, device, args.iterations, args.timeout, args.json, console)
    imported, start = process_age(), time.perf_counter()
    model, weights = load_model(args)
    loaded = time.perf_counter()
    program = exact = fold(model)
    picture_side(program, args.img_size)
    start_up, calibration = {"import": imported, "load": loaded - start, "fold": time.perf_counter() - loaded}, None
    if args.dtype in QUANTISED:
        start = time.perf_counter()
        program, calibration = quantised(exact, args, args.dtype)
        start_up[args.dtype] = time.perf_counter() - start
    if ranks.world > 1:
        join_ranks(device, args.timeout)
    placement = place(program, args, ranks, device, console)
    warnings.simplefilter("ignore", ParNetWarning)  # which every rank gives: the coordinator's notes are enough
    dtype = type_of(args.dtype, args.executor)
    with Engine(program, placement, device, dtype, args.executor, args.transport) as engine:
        hosts = lane_hosts(engine, ranks)  # for which all ranks wait, before what one alone may end at
        if not engine.is_coordinator:
            if ranks.local_rank == 0:
                print(f"rank {ranks.rank} of {ranks.world} serves; rank 0's machine shows the answers", file=sys.stderr)
            return engine.serve()
        labels, pictures = wanted(args, program, console)
        if placement is None or (ranks.world == 1 and args.executor == "auto"):
            first = pictures.first()
            start = time.perf_counter()
            warm_up(engine, first, console)
            start_up["warm-up"] = time.perf_counter() - start
            hosts = lane_hosts(engine, ranks)  # as they were chosen
        for line in engine.notes:
            print(f"note: {line}", file=sys.stderr)
        setting = describe(engine, args, weights, hosts, ranks.world) | {"start_up_s": start_up}
        setting |= {"calibration": calibration} if calibration else {}
        return coordinate(engine, exact, pictures, labels, args, setting, console)
