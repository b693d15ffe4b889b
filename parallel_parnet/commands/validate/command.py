"""Top-1 and top-5 of a checkpoint on labelled pictures, with 95% intervals, through any executor and precision.

    python launch/validate.py DIR --checkpoint FILE
    python launch/validate.py /usr/share/datasets/fashion-mnist --against reference --results-file result.json
    python launch/validate.py imagenet --checkpoint FILE.pth.tar --img-size 352 --ten-crop --dtype bf16
    torchrun --nproc-per-node 3 launch/validate.py DIR --checkpoint FILE --resume answers.jsonl
    python launch/validate.py DIR --checkpoint FILE --dtype int8 --calibrate FOLDER --against fp32

DIR is a folder per class, itself or in val/ (valid/, validation/), test/ and train/; the four files of MNIST's layout;
or CIFAR's batches, binary or in Python. --split says which part; val and test stand for each other where only one is
there, as in the last two. Names of classes are compared with the checkpoint's; where both have names, they decide which
class is which. Pictures are resized and cut as for infer; --ten-crop averages the logits of middle, corners and their
mirror images, as the released evaluation does.

--resume FILE keeps an answer per picture, a line each, and goes on with a FILE that is there, trying again what could
not be read; one that was made with other settings is refused. Another executor may go on with it: lines tell theirs.
--against runs everything a second time, in another precision or by the executor reference, and says which pictures got
another answer; it keeps its answers in a file beside FILE.

Exit status: 0; 1 where a picture was skipped, or a rank was lost; 2 for wrong input; 130, 143 and 129 after SIGINT,
SIGTERM and SIGHUP.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from parallel_parnet import Engine, ParNetError, ParNetWarning, Program, fold
from parallel_parnet.executors.available import choose_executor
from parallel_parnet.executors.backends import isa
from parallel_parnet.preprocess import Preprocess
from parallel_parnet.program.contract import dtype_name
from parallel_parnet.program.inputs import picture_side
from parallel_parnet.transport import join_ranks

from ..calibration import QUANTISED, quantised
from ..common import DTYPES, RANDOM, Parser, add_model_arguments, load_model, machine, named, plain_console
from ..data.classes import match
from ..data.finding import open_split
from ..data.split import TEST, TRAIN, VAL, Split
from ..engine_arguments import add_engine_arguments, check_engine_arguments, place, precision, type_of, warm_up
from ..infer.lines import AnswerLines, stamp
from ..infer.many import Pictures, answer_into
from ..infer.tables import read_labels
from ..ranks import Ranks
from ..stopping import stop_on_signals
from .report import check_result_files, show, write
from .scores import compare, lines, makers, score

REFERENCE = "reference"
SAID = 10  # reasons of skipped pictures on the terminal


class Work(NamedTuple):
    """What is to be answered. numbers: a folder's class as the network counts it, int64 [classes]. pictures: the
    split's."""

    split: Split
    numbers: np.ndarray
    pictures: Pictures


def answer(kept: AnswerLines, engine: Engine, work: Work, console: Console) -> int:
    """Append the answers that `kept` lacks: "label", best first "top5", and what it was made "by", or a "reason";
    returns how many."""
    truth = dict(zip(work.pictures.names, work.numbers[work.split.truth].tolist(), strict=True))
    by = made_by(engine)

    def said(image: str, logits: Tensor) -> dict:
        return {"label": truth[image], "top5": logits.topk(min(5, len(logits))).indices.tolist(), "by": by}

    found = answer_into(kept, engine, work.pictures, said, console, f"{engine.executor}, {engine.arithmetic}")
    return found["pictures"] - found["already_there"]


def made_by(engine: Engine) -> dict:
    """What computes an answer, and may be another one when a run goes on."""
    return {
        "executor": engine.executor, "device": str(engine.device), "machine": machine(engine.device),
        "arithmetic": dtype_name(engine.arithmetic), "isa": isa(engine.executor),
    }  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("data", type=Path, metavar="DIR", help="labelled pictures, in any of the layouts above")
    parser.add_argument("--split", choices=[VAL, TEST, TRAIN], default=VAL, help="default: %(default)s")
    add_model_arguments(parser)
    parser.add_argument("--labels", type=Path, help="text file with a class name per line, as the network counts")
    add_engine_arguments(parser)
    parser.set_defaults(batch_size=32)
    parser.add_argument("--ten-crop", action="store_true", help="average ten crops of each picture")
    precisions = [*DTYPES, *QUANTISED, REFERENCE]
    parser.add_argument("--against", choices=precisions, help="answer everything in this precision too, and compare")
    parser.add_argument("--resume", type=named, metavar="FILE", help="an answer per line; continues a FILE")
    parser.add_argument(
        "--results-file", type=Path, action="append", default=[], metavar="FILE", help=".json or .csv; may be repeated"
    )
    args = parser.parse_args()
    check_engine_arguments(args)
    check_result_files(args.results_file, (args.checkpoint, args.labels, args.calibrate))
    kept = [args.resume, args.resume and args.against and beside(args.resume, args.against)]
    taken = {os.path.realpath(path) for path in kept if path}
    for file in args.results_file:
        if os.path.realpath(file) in taken:
            raise ParNetError(f"--results-file {file}: named twice: give each file a name of its own")
    return args


def prepare(args: argparse.Namespace, program: Program, console: Console) -> tuple[Work, list[str]]:
    """What is to be answered, and the names of the network's classes."""
    config, split = program.config, open_split(args.data, args.split)
    names = read_labels(args.labels, program)
    numbers, words = match(split, names if args.labels else config.labels, config.num_classes)
    if numbers is None:
        raise ParNetError(f"{args.data}: {words}")
    console.print(split.told(args.data))
    if words:
        console.print(words)
    preprocess = Preprocess.of(config, args.img_size)
    pictures = Pictures(len(split), split.name, split.open, args.batch_size, preprocess, args.ten_crop)
    return Work(split, numbers, pictures), names


def run(
    program: Program, work: Work, file: Path, dtype: str, executor: str, args: argparse.Namespace, ranks: Ranks,
    console: Console,
) -> dict:  # fmt: skip
    """Every rank's part in answering all pictures into `file`. The coordinator gets what ran, and how fast; the others
    the exit "status" that it gave them."""
    device = ranks.device(args.device)
    placement = place(program, args, ranks, device, console)
    with Engine(program, placement, device, type_of(dtype, executor), executor, args.transport) as engine:
        if not engine.is_coordinator:
            return {"status": engine.serve()}
        settings = stamp(
            program.digest, work.pictures.preprocess.size, str(engine.dtype), executor == REFERENCE, args.ten_crop,
            work.numbers.tolist(), work.split.layout, work.split.part, str(args.data.resolve()),
            list(work.pictures.names), work.split.truth.tolist(),
        )  # fmt: skip
        with AnswerLines(file, settings) as kept:
            if placement is None and not all(name in kept.done for name in work.pictures.names):
                warm_up(engine, work.pictures.first(), console)
            start = time.perf_counter()
            new = answer(kept, engine, work, console)
            seconds = time.perf_counter() - start
        for line in engine.notes:
            print(f"note: {line}", file=sys.stderr)
        return {
            **made_by(engine), **makers(file), "dtype": precision(engine),
            "seconds": round(seconds, 2), "pictures_per_s": round(new / seconds, 1),
        }  # fmt: skip


def way(name: str, executor: str) -> tuple[str, str]:
    """The --dtype and the executor that a precision stands for."""
    return ("float32", REFERENCE) if name == REFERENCE else (name, executor)


def beside(file: Path, name: str) -> Path:
    """Where the second precision's answers are kept."""
    return file.with_name(f"{file.stem}.{name}{file.suffix}")


def report(
    args: argparse.Namespace, work: Work, program: Program, weights: str, ran: dict, second: dict, file: Path,
    ranks: Ranks, labels: list[str], console: Console,
) -> int:  # fmt: skip
    """Count, show and write; returns the exit status."""
    scores, preprocess = score(file), work.pictures.preprocess
    settings = {
        "data": str(args.data), "layout": work.split.layout, "split": work.split.part, "checkpoint": weights,
        "program": program.digest, "parameters": program.parameters, "img_size": preprocess.size,
        "crop_pct": preprocess.crop, "ten_crop": args.ten_crop, "batch_size": args.batch_size,
        "ranks": ranks.world, **ran, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    result = {**scores, "settings": settings}
    if args.against:
        other = beside(file, args.against)
        result["against"] = {"name": args.against, **score(other), **compare(file, other), "settings": second}
    write(result, args.results_file)
    for row in islice((row for row in lines(file) if "reason" in row), SAID):
        console.print(f"skipped: {row['reason']}")
    show(result, labels, console)
    console.print(
        f"executor {ran['executor']}, {ran['dtype']} (computed in {ran['arithmetic']}), {settings['img_size']} pixels, "
        f"batch {args.batch_size}, {'ten crops, ' if args.ten_crop else ''}{ranks.world} rank(s), weights {weights}, "
        f"{scores['skipped']} skipped, {ran['pictures_per_s']} pictures/s"
    )
    return 1 if scores["skipped"] or result.get("against", scores)["skipped"] else 0


def main() -> int:
    stop_on_signals()
    args, ranks = parse_arguments(), Ranks.from_environment()
    ranks.take_threads(args.threads)
    console = plain_console(quiet=ranks.rank != 0, soft_wrap=True)
    model, weights = load_model(args)
    if weights == RANDOM:
        raise ParNetError("random weights have no accuracy: give a --checkpoint, or leave --model out for the demo")
    program = fold(model)
    picture_side(program, args.img_size)
    runs = {name: way(name, args.executor) for name in (args.dtype, args.against) if name}
    for dtype, executor in runs.values():  # what cannot run is told before anything is answered
        choose_executor(executor, ranks.device(args.device), type_of(dtype, executor), QUANTISED.get(dtype))
    work, labels = prepare(args, program, console)
    programs, made = dict.fromkeys([*DTYPES, REFERENCE], program), {}
    for name in QUANTISED.keys() & {args.dtype, args.against}:
        programs[name], made[name] = quantised(program, args, name)
        console.print(f"{name} by {made[name]}")
    warnings.simplefilter("ignore", ParNetWarning)  # which every rank gives: the coordinator's notes are enough
    if ranks.world > 1:
        join_ranks(ranks.device(args.device), args.timeout)
    with tempfile.TemporaryDirectory(prefix="parnet-validate-") as scratch:
        file = args.resume or Path(scratch) / "answers.jsonl"
        ran = run(programs[args.dtype], work, file, *runs[args.dtype], args, ranks, console)
        second = {}
        if args.against and not ran.get("status"):
            other, kept = programs[args.against], beside(file, args.against)
            second = run(other, work, kept, *runs[args.against], args, ranks, console)
        if "status" in ran:
            return second.get("status", ran["status"])
        for settings, name in ((ran, args.dtype), (second, args.against)):
            settings |= {"calibration": made[name]} if name in made else {}
        return report(args, work, programs[args.dtype], weights, ran, second, file, ranks, labels, console)
