"""What planning needs from the machine: the link by its name, and how long each operation takes here."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch

from parallel_parnet import Engine, Placement, Program
from parallel_parnet.planning.costs import LINKS, Costs, Link, Measured
from parallel_parnet.planning.search import search
from parallel_parnet.transport import announce

from ..common import Ranks

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
    program: Program, device: torch.device, dtype: torch.dtype, size: int | None, batch: int, passes: int = PASSES
) -> Measured:
    """Median seconds of each operation on this device, one lane, eager mode."""
    side = size or program.config.image_size
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    engine = Engine(program, Placement.single(program), device, dtype, "eager")
    engine.profile(x)  # warm-up
    runs = [engine.profile(x)[0].spans for _ in range(passes)]
    seconds = {spans[0].name: median(span.end - span.start for span in spans) for spans in zip(*runs, strict=True)}
    source = f"measured on this {device.type}: median of {passes} eager passes, {torch.get_num_threads()} thread(s)"
    return Measured(f"measured {device.type}", seconds, source)


def plan_for_ranks(
    program: Program, ranks: Ranks, device: torch.device, dtype: torch.dtype, size: int | None, batch: int, link: Link
) -> Placement:
    """The fastest placement on exactly as many lanes as ranks, the same on all: rank 0 measures for everyone."""
    if ranks.world == 1:
        return Placement.single(program)
    nanoseconds = [0] * len(program.operations)
    if ranks.rank == 0:
        seconds = measure(program, device, dtype, size, batch).seconds
        nanoseconds = [max(1, round(seconds[op.name] * 1e9)) for op in program.operations]
    agreed = announce(nanoseconds, 0)
    times = {op.name: t * 1e-9 for op, t in zip(program.operations, agreed, strict=True)}
    costs = Costs.of(program, Measured("rank 0", times, "measured on rank 0"), link, size, batch, dtype.itemsize)
    return search(program, costs, ranks.world, exactly=True, runner_up=False).best.placement
