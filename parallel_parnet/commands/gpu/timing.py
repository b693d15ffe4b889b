"""Times on a GPU: the grouped launches beside what torch does, and level by level beside the computed floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from parallel_parnet import Engine, Placement, Program
from parallel_parnet.executors.graph import capture
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.executors.triton_backend import TritonSegment
from parallel_parnet.kernels.gpu.rates import Rates
from parallel_parnet.program.contract import dtype_name

from ..common import DTYPES
from .device import event_times, in_a_graph, quantiles
from .journal import Values
from .machines import RATED, rates_of
from .networks import network, picture, planned, run
from .scope import DTYPE
from .work import Work, verdict

RUNS = 10  # of a contender at a time: they take turns, so that a clock that moves moves all of them
LAUNCHES = 20  # of one level in a CUDA graph
MAX_AUTOTUNE = {"max_autotune": True, "triton.cudagraphs": True}


def check_timings(work: Work) -> Values:
    """Every variant at batch 1: one pass, picture on the GPU to logits on the GPU, and each level's launch."""
    rows = [
        work.row(f"{variant} {name}", partial(_timed, work, variant, name), seconds=3)
        for name in (RATED[:1] if work.scope.dry else RATED)
        for variant in work.scope.timed
    ]
    return verdict(rows)


def check_inductor(work: Work) -> Values:
    """torch.compile at its best beside a CUDA graph of the grouped launches, on the smallest network."""
    variant = work.scope.decisive[0]
    return verdict([work.row(f"{variant} {dtype_name(DTYPE)}", partial(_beside_inductor, work, variant))])


def _timed(work: Work, variant: str, name: str) -> Values:
    program, _ = network(variant, work.device)
    plan, rates = planned(program, DTYPES[name], work.device), rates_of(work, DTYPES[name])
    return {
        "network": variant,
        "dtype": name,
        "launches": len(plan.launches),
        "us": interleaved(contenders(program, plan, DTYPES[name], work.device), work.scope.rounds),
        "levels": levels(plan, program, rates),
        "computed_floor_us": round(sum(floors(program, rates)) * 1e6, 3),
    }


def _beside_inductor(work: Work, variant: str) -> Values:
    device = work.device
    program, _ = network(variant, device)
    plan, x = planned(program, DTYPE, device), picture(program, device)
    (segment,) = Placement.single(program).segments(program)
    module = SegmentModule(program, segment, DTYPE, device)
    storage = x.to(DTYPE, memory_format=torch.channels_last)
    exported = torch.export.export(module, (storage,)).module()
    way = {"backend": "eager"} if work.scope.dry else {"options": MAX_AUTOTUNE}
    compiled = torch.compile(exported, fullgraph=True, dynamic=False, **way)
    with torch.inference_mode():
        ways = {"grouped": capture(lambda: run(plan, x), device)[1], "max-autotune": lambda: compiled(storage)}
        return {"network": variant, "dtype": dtype_name(DTYPE), "us": interleaved(ways, work.scope.rounds)}


def contenders(
    program: Program, plan: TritonSegment, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Ways to run the folded program on one picture that lies on the GPU."""
    x = picture(program, device)
    eager = Engine(program, Placement.single(program), device, dtype, "eager")
    return {
        "grouped": capture(lambda: run(plan, x), device)[1],
        "eager": lambda: eager(x),
        "eager, CUDA graph": capture(lambda: eager(x), device)[1],
    }


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Each contender's p20, p50 and p80 in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, once in work.items():
            times[name] += event_times(once, RUNS)
    return {name: quantiles(found) for name, found in times.items()}


def levels(plan: TritonSegment, program: Program, rates: Rates) -> list[dict]:
    """Each launch by itself, many times in a CUDA graph: its inputs lie in the L2 cache, and a gap is included."""
    rows = []
    for launch, floor in zip(plan.launches, floors(program, rates), strict=True):
        launches = [launch] * (LAUNCHES if plan.device.type == "cuda" else 1)
        times = event_times(in_a_graph(launches, plan.device), RUNS)
        spread = quantiles([seconds / len(launches) for seconds in times])
        rows.append({"level": launch.name, "us": spread, "computed_floor_us": round(floor * 1e6, 3)})
    return rows


def floors(program: Program, rates: Rates) -> list[float]:
    """Seconds below which no level can run at batch 1 in half precision."""
    cost = program.cost(itemsize=2).by("level")
    return [rates.floor(level.flops, level.bytes) for level in cost.values()]
