"""Times on a GPU: the grouped launches beside what torch does, and level by level beside the computed floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program, create_model, fold
from parallel_parnet.executors.segment import SegmentModule
from parallel_parnet.executors.triton_backend import TritonSegment, whole
from parallel_parnet.kernels.gpu.rates import Rates

from ..common import DTYPES, plain_console, settle
from .device import capture, event_times, measure_rates, quantiles, require_gpu
from .level_tuning import levels_of, predicted_floor
from .tune import fill_table, read_table

VARIANTS = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
TUNED, TUNED_LEVELS = ("parnet_l", "bfloat16"), 4
WIND_DOWN = 12  # seconds for compilers that are at work when the tuning ends
ROUNDS, RUNS = 10, 10  # contenders take turns, so that a clock that moves moves all of them
LAUNCHES = 20  # of one level in a CUDA graph
MAX_AUTOTUNE = {"max_autotune": True, "triton.cudagraphs": True}


def check_tuning(deadline: float, out: Path) -> dict:
    """A short pass of the tuning script over the costliest levels; its table stays among the results."""
    variant, dtype = TUNED
    device = require_gpu()
    rates = measure_rates(device, DTYPES[dtype])
    levels = levels_of(fold(create_model(variant).to("meta").eval()), 1, DTYPES[dtype])
    costliest = sorted(levels, key=lambda level: predicted_floor(level, rates), reverse=True)[:TUNED_LEVELS]
    path = out / f"device_name={rates.gpu.replace(' ', '_')}.json"
    fill_table(costliest, (deadline - WIND_DOWN - time.monotonic()) / 60, path, plain_console(stderr=True, width=200))
    tuned = read_table(path)
    return {"passed": bool(tuned), "left_out": len(costliest) - len(tuned), "levels": tuned}


def check_timings(deadline: float, out: Path) -> dict:
    """Every variant at batch 1: one pass, picture on the GPU to logits on the GPU, and each level's launch."""
    device, rows = require_gpu(), []
    rates = {name: measure_rates(device, DTYPES[name]) for name in ("bfloat16", "float16")}
    cases = [(variant, name) for name in rates for variant in VARIANTS]
    for variant, name in cases:
        if time.monotonic() > deadline - 5:
            break
        program = fold(settle(create_model(variant)))
        plan = _plan(program, DTYPES[name], device)
        rows.append(
            {
                "network": variant,
                "dtype": name,
                "launches": len(plan.launches),
                "us": interleaved(contenders(program, plan, DTYPES[name], device)),
                "levels": levels(plan, program, rates[name]),
                "computed_floor_us": round(sum(floors(program, rates[name])) * 1e6, 3),
            }
        )
    return {"passed": len(rows) > 0, "left_out": len(cases) - len(rows), "rows": rows}


def check_inductor(deadline: float, out: Path) -> dict:
    """torch.compile at its best beside a CUDA graph of the grouped launches, on the smallest network."""
    device, variant, dtype = require_gpu(), VARIANTS[0], torch.bfloat16
    program = fold(settle(create_model(variant)))
    plan, x = _plan(program, dtype, device), _picture(program, device)
    (segment,) = Placement.single(program).segments(program)
    module = SegmentModule(program, segment, dtype, device)
    storage = x.to(dtype, memory_format=torch.channels_last)
    exported = torch.export.export(module, (storage,)).module()
    compiled = torch.compile(exported, fullgraph=True, dynamic=False, options=MAX_AUTOTUNE)
    with torch.inference_mode():
        work = {"grouped": capture(lambda: run(plan, x), device)[1], "max-autotune": lambda: compiled(storage)}
        return {"passed": True, "network": variant, "dtype": "bfloat16", "us": interleaved(work)}


def run(plan: TritonSegment, x: Tensor) -> Tensor:
    """Logits of a whole program, from a picture that must be copied to its place."""
    plan.reads[0].copy_(x)
    return plan(plan.reads)[0]


def contenders(
    program: Program, plan: TritonSegment, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Ways to run the folded program on one picture that lies on the GPU."""
    x = _picture(program, device)
    eager = Engine(program, Placement.single(program), device, dtype, "eager")
    return {
        "grouped": capture(lambda: run(plan, x), device)[1],
        "eager": lambda: eager(x),
        "eager, CUDA graph": capture(lambda: eager(x), device)[1],
    }


def interleaved(work: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Each contender's p20, p50 and p80 in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, once in work.items():
            times[name] += event_times(once, RUNS)
    return {name: quantiles(found) for name, found in times.items()}


def levels(plan: TritonSegment, program: Program, rates: Rates) -> list[dict]:
    """Each launch by itself, many times in a CUDA graph: its inputs lie in the L2 cache, and a gap is included."""
    rows = []
    for launch, floor in zip(plan.launches, floors(program, rates), strict=True):
        _, replay = capture(lambda launch=launch: [launch() for _ in range(LAUNCHES)], plan.device)
        spread = quantiles([seconds / LAUNCHES for seconds in event_times(replay, RUNS)])
        rows.append({"level": launch.name, "us": spread, "computed_floor_us": round(floor * 1e6, 3)})
    return rows


def floors(program: Program, rates: Rates) -> list[float]:
    """Seconds below which no level can run at batch 1 in half precision."""
    cost = program.cost(itemsize=2).by("level")
    return [rates.floor(level.flops, level.bytes) for level in cost.values()]


def _picture(program: Program, device: torch.device) -> Tensor:
    side = program.config.image_size
    return torch.randn(1, 3, side, side, device=device)


def _plan(program: Program, dtype: torch.dtype, device: torch.device) -> TritonSegment:
    side = program.config.image_size
    return whole(program, (1, side, side), dtype, device)
