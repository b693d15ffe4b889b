"""What planning needs from the machine: the link by its name, and how long each operation takes here."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program
from parallel_parnet.executors.available import choose_executor, facts
from parallel_parnet.executors.backends import lacking, storage_type
from parallel_parnet.executors.binding import Bindings
from parallel_parnet.executors.making import make_backend
from parallel_parnet.executors.native_plan import NativePlan
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.executors.torch_backend import compile_module
from parallel_parnet.planning.costs import LINKS, Costs, Link, Measured
from parallel_parnet.planning.search import search
from parallel_parnet.program.inputs import picture_side
from parallel_parnet.program.placement import Segment
from parallel_parnet.program.program import INPUT
from parallel_parnet.transport import announce

from ..ranks import Ranks

LOOPBACK = Path(__file__).with_name("links-gloo-loopback.json")
PASSES = 15


def find_link(text: str) -> Link:
    """A preset, "loopback" as measured into results/, "FILE.json" or "FILE.json:NAME" of a measurement of one's own, or
    numbers as "5us,20GB/s"."""
    file, _, name = text.partition(".json")
    if text == "loopback":
        return Link.read(LOOPBACK)
    if text.endswith(".json") or name.startswith(":"):
        return Link.read(Path(f"{file}.json"), name[1:] or None)
    return LINKS.get(text) or Link.parse(text)


def measure(
    program: Program, device: torch.device, dtype: torch.dtype, size: int | None, batch: int, executor: str = "auto",
    passes: int = PASSES,
) -> Measured:  # fmt: skip
    """Seconds of each operation on this device by the backend of an executor: the median of each, by the factor by
    which a pass of one lane is shorter than their sum. For "auto" on a GPU, Triton's, where it can be had.

    Operations are timed one after the other in the order of a pass, so that weights come from where a pass has them,
    and not from caches that the same operation has just filled. Those of native, which runs a level at a time, are
    parts of its own pass: they read what the one before has just written, in the kernels' layout. Operations of other
    executors are each a segment, and read what a first pass left.
    """
    if executor == "auto" and device.type == "cuda":
        executor = "eager" if lacking("triton") or program.quantised else "triton"
    executor = choose_executor(executor, device, dtype, program.quantised)
    side = picture_side(program, size)
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    engine = Engine(program, Placement.single(program), device, dtype, executor)
    with torch.inference_mode():
        parts = (in_a_pass if executor == "native" else by_themselves)(program, device, dtype, executor, x)
        runs = [partial(engine, x), *parts.values()]
        rounds = [[timed(run, device) for run in runs] for _ in range(passes + 1)]
    whole, *each = (median(times) for times in zip(*rounds[1:], strict=True))
    alone = {name: t for name, t in zip(parts, each, strict=True) if name != INPUT}
    factor = whole / sum(alone.values())
    seconds = {name: factor * t for name, t in alone.items()}
    source = (
        f"measured on this {device.type} by {executor}: medians of {passes} runs, {torch.get_num_threads()} thread(s); "
        f"a pass took {factor:.2f} of its operations' sum"
    )
    return Measured(f"measured {device.type}", seconds, source, own_layout=facts(executor).own_layout)


def on_a_thread(
    program: Program, dtype: torch.dtype, size: int | None, batch: int, executor: str, passes: int = PASSES
) -> Measured:
    """As `measure` on one thread of the CPU, which is what a lane has that has a core of its own."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return measure(program, torch.device("cpu"), dtype, size, batch, executor, passes)
    finally:
        torch.set_num_threads(threads)


def in_a_pass(
    program: Program, device: torch.device, dtype: torch.dtype, executor: str, x: Tensor
) -> dict[str, Callable[[], object]]:
    """Each operation of native's pass of one lane, by its name, and under INPUT the copy of the picture into the
    kernels' layout: run in this order they are a pass, which has run once."""
    (segment,) = Placement.single(program).segments(program)
    module = SegmentModule(program, segment, storage_type(executor, dtype), device, torch.contiguous_format)
    plan = compile_module(module, executor, (x,), dtype)
    assert isinstance(plan, NativePlan)
    plan(x)
    return plan.steps()


def by_themselves(
    program: Program, device: torch.device, dtype: torch.dtype, executor: str, x: Tensor
) -> dict[str, Callable[[], object]]:
    """Each operation by itself, by its name, as a segment of its own that reads what the ones before it left; each has
    run once."""
    segments = [Segment(0, (op.name,), tuple(dict.fromkeys(op.inputs)), (op.name,)) for op in program.operations]
    backend = make_backend(executor, program, segments, [device], dtype)
    n, _, h, w = x.shape
    bindings = Bindings(backend, (n, h, w), device)
    features, runs = {INPUT: bindings.enter(x)}, {}
    for segment in segments:
        reads = tuple(features[name] for name in segment.reads)
        runner = bindings.runner(segment, reads, {})
        (name,) = segment.operations
        (features[name],) = runner(reads)
        runs[name] = partial(runner, reads)
    return runs


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a run, until the device is done: on a GPU between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    events[1].synchronize()
    return events[0].elapsed_time(events[1]) * 1e-3


def plan_for_ranks(
    program: Program, ranks: Ranks, device: torch.device, dtype: torch.dtype, size: int | None, batch: int, link: Link,
    executor: str,
) -> Placement:  # fmt: skip
    """The fastest placement on exactly as many lanes as ranks, the same on all: rank 0 measures for everyone."""
    if ranks.world == 1:
        return Placement.single(program)
    numbers = [0] * (1 + len(program.operations))
    if ranks.rank == 0:
        lane = measure(program, device, dtype, size, batch, executor)
        numbers = [int(lane.own_layout), *(max(1, round(lane.seconds[op.name] * 1e9)) for op in program.operations)]
    copied, *nanoseconds = announce(numbers, 0)
    times = {op.name: t * 1e-9 for op, t in zip(program.operations, nanoseconds, strict=True)}
    lane = Measured("rank 0", times, "measured on rank 0", own_layout=bool(copied))
    costs = Costs.of(program, lane, link, size, batch, dtype.itemsize)
    return search(program, costs, ranks.world, exactly=True, runner_up=False).best.placement
