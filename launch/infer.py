#!/usr/bin/env python
"""Classify pictures with ParNet, its streams on as many devices as there are, and tell the latency.

    python launch/infer.py
    torchrun launch/infer.py --streams-per-gpu 1
    torchrun --nproc-per-node 3 launch/infer.py --streams-per-gpu 1 --image FOLDER --json answer.json
    torchrun --nproc-per-node 2 launch/infer.py --placement auto

--streams-per-gpu counts the network's parallel branches inside one inference. It has nothing to do with the
concurrent requests that trtexec (--infStreams) and OpenVINO (-nstreams) call streams.

Exit status: 0; 1 where a picture of a folder was skipped or --verify found a difference; 2 for wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from common import DEMO, DTYPES, Parser, Ranks, add_model_arguments, load_model, run
from parallel_parnet import Engine, ParNetError, Placement, Program, fold
from parallel_parnet.engine import EXECUTORS
from parallel_parnet.files import write_atomically
from parallel_parnet.preprocess import Preprocess, find_images
from parallel_parnet.profiling.sampler import Sampler
from parallel_parnet.transport import Transport, join_ranks
from planning import find_link, plan_for_ranks
from tracing import add_trace_arguments, check_trace_arguments, write_traces

KEPT_BATCHES = 16  # batches kept in memory for timing: enough that no cache holds the answer
PROFILE_PASSES = 10
# largest relative error against the fp32 reference that rounding explains
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@dataclass
class Answers:
    """What classifying the pictures gave."""

    images: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    batches: list[Tensor] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--image", action="append", type=Path, help="picture or folder; may be repeated")
    parser.add_argument("--labels", type=Path, help="text file with a class name per line")
    parser.add_argument("--img-size", type=int, help="pixels; default: the network's own")
    parser.add_argument("-b", "--batch-size", type=int, default=1, help="pictures per pass (default: %(default)s)")
    parser.add_argument("--streams-per-gpu", type=int, default=1, help="branches per device (default: %(default)s)")
    parser.add_argument("--placement", choices=["streams", "auto"], default="streams", help="auto: measure and plan")
    parser.add_argument("--link", help="for --placement auto, as launch/plan.py (default: loopback, on GPUs nvlink)")
    parser.add_argument("--strict", action="store_true", help="refuse rather than fold streams onto fewer devices")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    parser.add_argument("--executor", choices=EXECUTORS, default="auto", help="default: %(default)s")
    parser.add_argument("--iterations", type=int, default=50, help="timed passes (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="passes before them (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare with the sequential fp32 reference")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    add_trace_arguments(parser)
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a rank (default: %(default)s)")
    args = parser.parse_args()
    check_trace_arguments(args)
    for name in ("batch_size", "iterations", "streams_per_gpu"):
        if getattr(args, name) < 1:
            raise ParNetError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.warmup < 0 or args.timeout <= 0:
        raise ParNetError("--warmup must not be negative, and --timeout must be positive")
    return args


def place(program: Program, args: argparse.Namespace, ranks: Ranks, device: torch.device) -> tuple[Placement, str]:
    """The placement that was asked for, or the nearest that one process can have, with a line that says so."""
    k, streams = args.streams_per_gpu, program.streams
    if args.placement == "auto":
        link = find_link(args.link or ("nvlink" if device.type == "cuda" else "loopback"))
        return plan_for_ranks(program, ranks, device, DTYPES[args.dtype], args.img_size, args.batch_size, link), ""
    if ranks.world > 1:
        return Placement.from_streams_per_gpu(program, k, ranks.world), ""
    whole_machine = device.type == "cuda" and device.index is None
    devices = torch.cuda.device_count() if whole_machine else 1
    wanted = -(-streams // max(1, k))
    if devices >= wanted:
        return Placement.from_streams_per_gpu(program, k, wanted), ""
    note = (
        f"this process sees {devices} device ({device.type}) where {k} stream(s) per GPU want {wanted}: "
        f"{streams} streams share {devices} lane(s); "
        f"torchrun --nproc-per-node {wanted} gives each lane a process of its own"
    )
    if args.strict:
        raise ParNetError(note)
    return Placement.from_streams_per_gpu(program, -(-streams // devices), devices), f"note: {note}"


def batches(paths: list[Path], args: argparse.Namespace, preprocess: Preprocess, answers: Answers) -> Iterator[Tensor]:
    """Pictures as tensors [N, 3, H, W]; a bad one in a folder is skipped, one that was named ends the run."""
    named = {path for path in args.image or [] if path.is_file()}
    batch: list[Tensor] = []
    for path in paths:
        try:
            batch.append(preprocess(path))
        except ParNetError as error:
            if path in named:
                raise
            answers.skipped.append({"image": str(path), "reason": str(error)})
            continue
        answers.images.append(str(path))
        if len(batch) == args.batch_size:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def classify(engine: Engine, args: argparse.Namespace, preprocess: Preprocess, console: Console) -> Answers:
    """Every picture once."""
    answers, paths = Answers(), find_images(args.image or [os.path.relpath(DEMO / "pictures")])
    total, hidden = -(-len(paths) // args.batch_size), not console.is_terminal
    work = batches(paths, args, preprocess, answers)
    for x in track(work, "classifying", total=total, console=console, disable=hidden, transient=True):
        x = x.to(engine.device)
        answers.logits.append(engine(x).cpu())
        if len(answers.batches) < KEPT_BATCHES:
            answers.batches.append(x)
    if not answers.logits:
        raise ParNetError(f"none of {len(paths)} pictures could be read; the first: {answers.skipped[0]['reason']}")
    return answers


def measure(engine: Engine, inputs: list[Tensor], args: argparse.Namespace, console: Console) -> dict[str, float]:
    """Milliseconds from input on the device to logits on the device, one pass at a time."""

    def once(x: Tensor) -> float:
        start = time.perf_counter()
        engine(x)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return (time.perf_counter() - start) * 1e3

    for x in islice(cycle(inputs), args.warmup):
        once(x)
    passes = islice(cycle(inputs), args.iterations)
    hidden = not console.is_terminal
    times = [
        once(x) for x in track(passes, "timing", total=args.iterations, console=console, disable=hidden, transient=True)
    ]
    p50, p90, p95, p99 = np.percentile(times, [50, 90, 95, 99])
    return {"median": p50, "p90": p90, "p95": p95, "p99": p99, "mean": float(np.mean(times)), "n": len(times)}


def stage_times(engine: Engine, x: Tensor) -> list[dict[str, float]]:
    """For each lane: median milliseconds by stage and stream, and waiting for other lanes."""
    by_name = engine.program.by_name

    def label(span: str) -> str:
        return by_name[span].label if span in by_name else "waiting" if span.startswith("wait ") else "sending"

    passes = [[lane.totals(label) for lane in engine.profile(x)] for _ in range(PROFILE_PASSES)]
    return [
        {stage: median(run[lane].get(stage, 0.0) for run in passes) * 1e3 for stage in passes[0][lane]}
        for lane in range(len(passes[0]))
    ]


def verify(program: Program, answers: Answers, args: argparse.Namespace, device: torch.device) -> tuple[float, float]:
    """Largest absolute and relative difference of the logits from the sequential fp32 reference."""
    reference = Engine(program, Placement.single(program), device, executor="reference")
    absolute = relative = 0.0
    paths = [Path(image) for image in answers.images]
    preprocess = Preprocess.of(program.config, args.img_size)
    for x, logits in zip(batches(paths, args, preprocess, Answers()), answers.logits, strict=True):
        expected = reference(x.to(device)).cpu()
        absolute = max(absolute, (logits - expected).abs().max().item())
        relative = max(relative, ((logits - expected).norm() / expected.norm()).item())
    return absolute, relative


def read_labels(args: argparse.Namespace, program: Program) -> list[str]:
    """A name for each class: from --labels, the checkpoint, or numbers."""
    classes = program.config.num_classes
    if args.labels is None:
        return list(program.config.labels) or [f"class {i}" for i in range(classes)]
    try:
        labels = args.labels.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ParNetError(f"{args.labels}: cannot be read ({error})") from None
    if len(labels) != classes:
        raise ParNetError(f"{args.labels}: {len(labels)} lines for {classes} classes; give one name per line")
    return labels


def predictions(answers: Answers, labels: list[str]) -> list[dict]:
    """Top-5 of each picture, most probable first."""
    top = torch.cat(answers.logits).softmax(1).topk(min(5, len(labels)))
    return [
        {
            "image": image,
            "top5": [
                {"label": labels[i], "index": i, "probability": p}
                for p, i in zip(values.tolist(), indices.tolist(), strict=True)
            ],
        }
        for image, values, indices in zip(answers.images, *top, strict=True)
    ]


def show(result: dict, console: Console) -> None:
    """Tables of answers, latency, time by stage, and placement."""
    table = Table("picture", "1st", "2nd", "3rd", "4th", "5th", title="Top 5, with probabilities", title_justify="left")
    for row in result["predictions"]:
        table.add_row(Path(row["image"]).name, *(f"{t['label']} {t['probability']:.1%}" for t in row["top5"]))
    console.print(table)
    latency = result["latency_ms"]
    table = Table("median", "p90", "p95", "p99", "mean", "n", title="Latency of one pass, ms", title_justify="left")
    table.add_row(*(f"{latency[key]:.3f}" for key in ("median", "p90", "p95", "p99", "mean")), str(latency["n"]))
    console.print(table)
    stages = result["stages_ms"]
    columns = list(dict.fromkeys(label for lane in stages for label in lane))
    table = Table("lane", *columns, title="Time by stage, ms (each operation alone, eager)", title_justify="left")
    for lane, times in enumerate(stages):
        table.add_row(str(lane), *(f"{times[label]:.3f}" if label in times else "" for label in columns))
    console.print(table)
    table = Table("lane", "device", "threads", "runs", title="Placement", title_justify="left")
    for lane in result["placement"]["lanes"]:
        table.add_row(str(lane["lane"]), lane["device"], str(lane["threads"]), lane["runs"])
    console.print(table)
    if result["arithmetic"] != result["dtype"]:
        console.print(
            f"note: {result['dtype']} was asked for; this device has no such arithmetic, {result['arithmetic']} ran"
        )
    console.print(
        f"executor {result['executor']}, {result['dtype']}, {result['size']} x {result['size']} pixels, "
        f"batch {result['batch_size']}, depth {result['depth']}, {result['world_size']} rank(s), "
        f"weights {result['weights']}"
    )


def lane_hosts(engine: Engine, ranks: Ranks, threads: int) -> list[tuple[str, int]]:
    """Device and compute threads of each lane."""
    if ranks.world == 1:
        return [(str(engine.lane_device(lane)), threads) for lane in range(engine.placement.lanes)]
    index = -1 if engine.device.index is None else engine.device.index
    everyone = Transport.of_ranks().gather([threads, index])
    return [(engine.device.type if i < 0 else f"{engine.device.type}:{i}", count) for count, i in everyone]


def coordinate(
    engine: Engine, args: argparse.Namespace, weights: str, hosts: list[tuple[str, int]], ranks: Ranks, console: Console
) -> int:
    """The coordinator's part: classify, time, verify, report."""
    program, placement = engine.program, engine.placement
    labels = read_labels(args, program)
    if weights == "random":
        console.print("note: no checkpoint was given; the weights are random, so only the times mean anything")
    answers = classify(engine, args, Preprocess.of(program.config, args.img_size), console)
    for skipped in answers.skipped:
        console.print(f"skipped: {skipped['reason']}")
    with Sampler() as sampler:
        latency = measure(engine, answers.batches, args, console)
    result = {
        "predictions": predictions(answers, labels),
        "logits": torch.cat(answers.logits).tolist(),
        "latency_ms": latency,
        "sampled": sampler.summary((args.warmup + args.iterations) * args.batch_size),
        "stages_ms": stage_times(engine, answers.batches[0]),
        "placement": {
            "streams_per_gpu": args.streams_per_gpu,
            "lanes": [
                {"lane": i, "device": device, "threads": threads, "runs": runs}
                for i, ((device, threads), runs) in enumerate(zip(hosts, placement.describe(program), strict=True))
            ],
            "operations": {name: list(lanes) for name, lanes in placement.where.items()},
        },
        "executor": engine.executor,
        "device": str(engine.device),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "arithmetic": str(engine.arithmetic).removeprefix("torch."),
        "world_size": ranks.world,
        "depth": program.depth,
        "batch_size": args.batch_size,
        "size": args.img_size or program.config.image_size,
        "weights": weights,
        "skipped": answers.skipped,
    }
    status = 1 if answers.skipped else 0
    show(result, console)
    sampler.tell(console.print)
    if args.verify:
        absolute, relative = verify(program, answers, args, engine.device)
        result |= {"max_abs_difference": absolute, "relative_difference": relative}
        limit = TOLERANCE[engine.dtype]
        verdict = "equal up to rounding" if relative <= limit else "DIFFERENT"
        console.print(
            f"verify: {verdict}: largest difference from the sequential reference {absolute:.2e}, "
            f"relative {relative:.1e} (limit {limit:.0e})"
        )
        status = status if relative <= limit else 1
    write_traces(engine, answers.batches[0], args, console)
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    return status


def main() -> int:
    args, ranks = parse_arguments(), Ranks.from_environment()
    threads = ranks.take_threads()
    console = Console(quiet=ranks.rank != 0, highlight=False)
    if not console.is_terminal:
        console.width = 120
    model, weights = load_model(args)
    program = fold(model)
    device = ranks.device(args.device)
    if ranks.world > 1:
        join_ranks(device, args.timeout)
    placement, note = place(program, args, ranks, device)
    if note:
        console.print(note)
    with Engine(program, placement, device, DTYPES[args.dtype], args.executor) as engine:
        hosts = lane_hosts(engine, ranks, threads)
        if engine.is_coordinator:
            return coordinate(engine, args, weights, hosts, ranks, console)
        return engine.serve()


if __name__ == "__main__":
    run(main)
