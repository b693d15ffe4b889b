"""A few pictures, all kept in memory: classified, the pass timed one at a time, and compared with the reference."""

from __future__ import annotations

import argparse
import json
import time
from array import array
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from parallel_parnet import Engine, ParNetError, Placement
from parallel_parnet.files import write_atomically
from parallel_parnet.profiling.sampler import Sampler
from report import show_latency, show_predictions, show_setting, show_stages, show_start_up, top5
from stream import Pictures, answers, progress_bar, spread
from tracing import write_traces

KEPT_BATCHES = 16  # for timing: enough that no cache holds the answer
PROFILE_PASSES = 10
# largest relative error against the fp32 reference that rounding explains
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}


@dataclass
class Answers:
    """What classifying the pictures gave; `logits` [classes] for each of `images`. first_s: until the first answer."""

    images: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    first_s: float = 0.0


def classify_and_time(
    engine: Engine, pictures: Pictures, labels: list[str], setting: dict, args: argparse.Namespace, console: Console
) -> int:
    """Classify every picture, time, verify where asked, report; returns the exit status."""
    found = classify(engine, pictures, console)
    for skipped in found.skipped:
        console.print(f"skipped: {skipped['reason']}")
    setting["start_up_s"]["first answer"] = found.first_s
    inputs = [batch.x.to(engine.device) for batch in islice(pictures.batches(), KEPT_BATCHES)]
    with Sampler() as sampler:
        latency = measure(engine, inputs, args, console)
    result = {
        "predictions": [
            {"image": image, "top5": top5(logits, labels)}
            for image, logits in zip(found.images, found.logits, strict=True)
        ],
        "logits": torch.stack(found.logits).tolist(),
        "latency_ms": latency,
        "sampled": sampler.summary((args.warmup + args.iterations) * len(inputs[0])),
        "stages_ms": stage_times(engine, inputs[0]),
        **setting,
        "skipped": found.skipped,
    }
    show_predictions(result["predictions"], console)
    show_latency(result["latency_ms"], "Latency of one pass, ms", console)
    show_stages(result["stages_ms"], console)
    show_setting(setting, console)
    show_start_up(setting["start_up_s"], result["latency_ms"]["median"], console)
    sampler.tell(console.print)
    status = 1 if found.skipped else 0
    if args.verify:
        absolute, relative = verify(engine, pictures, found)
        result |= {"max_abs_difference": absolute, "relative_difference": relative}
        limit = TOLERANCE[engine.dtype]
        verdict = "equal up to rounding" if relative <= limit else "DIFFERENT"
        console.print(
            f"verify: {verdict}: largest difference from the sequential reference {absolute:.2e}, "
            f"relative {relative:.1e} (limit {limit:.0e})"
        )
        status = status if relative <= limit else 1
    write_traces(engine, inputs[0], args, console)
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1) + "\n")
    return status


def classify(engine: Engine, pictures: Pictures, console: Console) -> Answers:
    """Every picture once."""
    found = Answers()
    with progress_bar(console) as progress:
        task = progress.add_task("classifying", total=len(pictures.paths))
        latencies = array("d")
        for batch, logits in answers(engine, pictures.batches(), latencies):
            for image, row in zip(batch.images, logits, strict=True):
                if image in batch.reasons:
                    found.skipped.append({"image": image, "reason": batch.reasons[image]})
                else:
                    found.images.append(image)
                    found.logits.append(row)
            progress.advance(task, len(batch.images))
    if latencies:
        found.first_s = latencies[0]
    if not found.images:
        first = found.skipped[0]["reason"]
        raise ParNetError(f"none of {len(pictures.paths)} pictures could be read; the first: {first}")
    return found


def measure(engine: Engine, inputs: list[Tensor], args: argparse.Namespace, console: Console) -> dict[str, float]:
    """Milliseconds from input on the device to logits on the device, one pass at a time."""

    def once(x: Tensor) -> float:
        start = time.perf_counter()
        engine(x)
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
        return time.perf_counter() - start

    for x in islice(cycle(inputs), args.warmup):
        once(x)
    passes, hidden = islice(cycle(inputs), args.iterations), not console.is_terminal
    timed = track(passes, "timing", total=args.iterations, console=console, disable=hidden, transient=True)
    return spread([once(x) for x in timed])


def stage_times(engine: Engine, x: Tensor) -> list[dict[str, float]]:
    """For each lane: median milliseconds by stage and stream, and waiting for other lanes."""
    by_name = engine.program.by_name

    def label(span: str) -> str:
        if span in by_name:
            return by_name[span].label
        return {"wait": "waiting", "send": "sending"}.get(span.split(" ")[0], span)

    passes = [[lane.totals(label) for lane in engine.profile(x)] for _ in range(PROFILE_PASSES)]
    return [
        {stage: median(run[lane].get(stage, 0.0) for run in passes) * 1e3 for stage in passes[0][lane]}
        for lane in range(len(passes[0]))
    ]


def verify(engine: Engine, pictures: Pictures, found: Answers) -> tuple[float, float]:
    """Largest absolute and relative difference of the logits from the sequential fp32 reference."""
    program, got = engine.program, dict(zip(found.images, found.logits, strict=True))
    reference = Engine(program, Placement.single(program), engine.device, executor="reference")
    absolute = relative = 0.0
    for batch in pictures.batches():
        read = [i for i, image in enumerate(batch.images) if image in got]
        if read:
            expected = reference(batch.x.to(engine.device)).cpu()[read]
            difference = torch.stack([got[batch.images[i]] for i in read]) - expected
            absolute = max(absolute, difference.abs().max().item())
            relative = max(relative, (difference.norm() / expected.norm()).item())
    return absolute, relative
