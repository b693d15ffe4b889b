"""A few pictures, all kept in memory: classified, the pass timed one at a time, and compared with the reference."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from parallel_parnet import Engine, ParNetError, Placement, Program
from parallel_parnet.files import write_json
from parallel_parnet.int8.agreement import agreement
from parallel_parnet.parity import relative, tolerance, tolerance_quantised
from parallel_parnet.profiling.sampler import Sampler

from ..common import RANDOM
from ..tracing import write_traces
from .many import Latencies, Pictures, answers, progress_bar, spread
from .tables import fault_of, show_latency, show_predictions, show_setting, show_stages, show_start_up, top5

KEPT_BATCHES = 16  # for timing: enough that no cache holds the answer
PROFILE_PASSES = 10


@dataclass
class Answers:
    """What classifying the pictures gave; `logits` [classes] for each of `images`. first_s: until the first answer."""

    images: list[str] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    first_s: float = 0.0


def classify_and_time(
    engine: Engine, exact: Program, pictures: Pictures, labels: list[str], setting: dict, args: argparse.Namespace,
    console: Console,
) -> int:  # fmt: skip
    """Classify every picture, time, verify where asked, report; returns the exit status. exact: the program in fp32."""
    found = classify(engine, pictures, console)
    for skipped in found.skipped:
        console.print(f"skipped: {skipped['reason']}")
    setting["start_up_s"]["first answer"] = found.first_s
    inputs = [x.to(engine.device) for x in equal_batches(pictures)]
    setting["batch_size"] = len(inputs[0])
    if len(inputs[0]) < args.batch_size:
        console.print(
            f"note: {len(inputs[0])} pictures fill no batch of {args.batch_size}: one of all of them is timed"
        )
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
    status, said = 1 if found.skipped else 0, []
    if args.verify:
        checked = verify(engine, exact, pictures, found)
        result |= {"max_abs_difference": checked.absolute, "relative_difference": checked.error, "limit": checked.limit}
        equal = checked.error <= checked.limit
        reference = f"in {setting['dtype']} " if engine.program.quantised else ""
        said.append(
            f"verify: {'equal up to rounding' if equal else 'DIFFERENT'}: largest difference from the sequential "
            f"reference {reference}{checked.absolute:.2e}, relative {checked.error:.1e} (limit {checked.limit:.0e})"
        )
        if engine.program.quantised:
            alone = agreement(engine.program, engine.executor, inputs[0])
            result |= {f"error_of_{setting['dtype']}": checked.of_type, "operations": alone._asdict()}
            equal = equal and alone.right
            said.append(f"verify: operation by operation {'equal' if alone.right else 'DIFFERENT'}: {alone}")
            of_type = f"{setting['dtype']} itself: relative difference {checked.of_type:.1e}"
            said.append(f"{of_type} from fp32 on these pictures")
        status = status if equal else 1
    if args.json:  # before anything is shown, since who reads that may have enough of it
        write_json(args.json, result)
    if setting["weights"] != RANDOM:  # whose classes mean nothing, however sure they look
        show_predictions(result["predictions"], console)
    show_latency(result["latency_ms"], "Latency of one pass, ms", console)
    show_stages(result["stages_ms"], engine.executor, console)
    show_setting(setting, console)
    show_start_up(setting["start_up_s"], result["latency_ms"]["median"], console)
    sampler.tell(console.print)
    for line in said:
        console.print(line)
    write_traces(engine, inputs[0], args, console)
    return status


def classify(engine: Engine, pictures: Pictures, console: Console) -> Answers:
    """Every picture once."""
    found = Answers()
    with progress_bar(console) as progress:
        task = progress.add_task("classifying", total=pictures.count)
        latencies = Latencies()
        for batch, logits in answers(engine, pictures.batches(), latencies):
            for image, row in zip(batch.images, logits, strict=True):
                if reason := batch.reasons.get(image) or fault_of(image, row):
                    found.skipped.append({"image": image, "reason": reason})
                else:
                    found.images.append(image)
                    found.logits.append(row)
            progress.advance(task, len(batch.images))
    if latencies.n:
        found.first_s = latencies.kept[0]
    if not found.images:
        first = found.skipped[0]["reason"]
        raise ParNetError(f"none of {pictures.count} pictures has an answer; the first: {first}")
    return found


def equal_batches(pictures: Pictures) -> list[Tensor]:
    """What is timed: batches as large as they were asked for, without what is left over at the end; where there are
    too few pictures for one, all of them as one that is smaller."""
    kept = [batch.x for batch in islice(pictures.batches(), KEPT_BATCHES)]
    return [x for x in kept if len(x) == len(kept[0])]


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


class Verified(NamedTuple):
    """Of all logits, against the reference: the largest absolute difference, the relative one, and its limit. of_type:
    what the type itself does to these pictures: of a quantised program the reference's own difference from fp32, else
    torch's."""

    absolute: float
    error: float
    limit: float
    of_type: float


def verify(engine: Engine, exact: Program, pictures: Pictures, found: Answers) -> Verified:
    """Against the sequential reference: in fp32, of a quantised program in its type. In reduced precision the limit
    follows from what rounding does to these pictures. exact: the program in fp32."""
    single = Placement.single(exact)

    def logits(program: Program, executor: str, dtype: torch.dtype) -> Tensor:
        run = Engine(program, single, engine.device, dtype, executor)
        rows = {}
        for batch in pictures.batches():
            rows |= zip(batch.images, run(batch.x.to(engine.device)).cpu(), strict=True)
        return torch.stack([rows[image] for image in found.images])

    got, expected = torch.stack(found.logits), logits(engine.program, "reference", torch.float32)
    absolute, error = (got - expected).abs().max().item(), relative(got, expected)
    if engine.program.quantised:
        of_type = relative(expected, logits(exact, "reference", torch.float32))
        return Verified(absolute, error, tolerance_quantised(of_type), of_type)
    of_torch = 0.0 if engine.dtype == torch.float32 else relative(logits(exact, "eager", engine.dtype), expected)
    return Verified(absolute, error, tolerance(engine.dtype, of_torch), of_torch)
