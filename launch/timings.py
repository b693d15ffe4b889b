"""Times on a GPU: the grouped launches beside what torch does, and level by level beside the computed floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from common import DTYPES, settle
from gpu import capture, event_times, machine, measure_rates, quantiles, require_gpu
from parallel_parnet import Placement, Program, create_model, fold
from parallel_parnet.executors.grouped import GroupedExecutor, Plan
from parallel_parnet.executors.local import LocalExecutor
from parallel_parnet.kernels.config import Table
from parallel_parnet.kernels.rates import Rates
from tune import fill_table, read_table
from tuning import levels_of

VARIANTS = ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
TUNED = ("parnet_l", "bfloat16")
ROUNDS, RUNS = 10, 10  # contenders take turns, so that a clock that moves moves all of them
LAUNCHES = 20  # of one level in a CUDA graph
MAX_AUTOTUNE = {"max_autotune": True, "triton.cudagraphs": True}


def check_tuning(deadline: float, out: Path) -> dict:
    """A short pass of the tuning script: does it find, check and write configurations, and do they win?"""
    variant, dtype = TUNED
    levels = levels_of(fold(create_model(variant).to("meta").eval()), 1, DTYPES[dtype])
    path = table_path(out, machine(require_gpu())["gpu"])
    fill_table(levels, (deadline - time.monotonic()) / 60, path, Console(stderr=True))
    tuned = read_table(path)
    return {"passed": bool(tuned), "left_out": len(levels) - len(tuned), "levels": tuned}


def check_timings(deadline: float, out: Path) -> dict:
    """Every variant at batch 1: one pass, picture on the GPU to logits on the GPU, and each level's launch."""
    device, rows = require_gpu(), []
    rates = {name: measure_rates(device, DTYPES[name]) for name in ("bfloat16", "float16")}
    cases = [(variant, name) for name in rates for variant in VARIANTS]
    for variant, name in cases:
        if time.monotonic() > deadline - 5:
            break
        program = fold(settle(create_model(variant)))
        plans = {"grouped": _plan(program, DTYPES[name], Table.of_device(device), device)}
        if (path := table_path(out, rates[name].gpu)).is_file():
            tuned = Table(Table.of_device(device).defaults, read_table(path))
            plans["grouped, tuned"] = _plan(program, DTYPES[name], tuned, device)
        rows.append(
            {
                "network": variant,
                "dtype": name,
                "launches": len(plans["grouped"].launches),
                "us": interleaved(contenders(program, plans, DTYPES[name], device)),
                "levels": levels(plans["grouped"], program, rates[name]),
                "computed_floor_us": round(sum(floors(program, rates[name])) * 1e6, 3),
            }
        )
    return {"passed": len(rows) > 0, "left_out": len(cases) - len(rows), "rows": rows}


def check_inductor(deadline: float, out: Path) -> dict:
    """torch.compile at its best beside a CUDA graph of the grouped launches, on the smallest network."""
    device, variant, dtype = require_gpu(), VARIANTS[0], torch.bfloat16
    program = fold(settle(create_model(variant)))
    plan, x = _plan(program, dtype, Table.of_device(device), device), _picture(program, device)
    module = LocalExecutor(program, Placement.single(program), [device], dtype, "eager").modules[0]
    storage = x.to(dtype, memory_format=torch.channels_last)
    exported = torch.export.export(module, (storage,)).module()
    compiled = torch.compile(exported, fullgraph=True, dynamic=False, options=MAX_AUTOTUNE)
    with torch.inference_mode():
        work = {"grouped": capture(lambda: plan.run(x)).replay, "max-autotune": lambda: compiled(storage)}
        return {"passed": True, "network": variant, "dtype": "bfloat16", "us": interleaved(work)}


def contenders(
    program: Program, plans: Mapping[str, Plan], dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], object]]:
    """Ways to run the folded program on one picture that lies on the GPU."""
    x = _picture(program, device)
    eager = LocalExecutor(program, Placement.single(program), [device], dtype, "eager")
    work: dict[str, Callable[[], object]] = {
        name: capture(lambda plan=plan: plan.run(x)).replay for name, plan in plans.items()
    }
    work["eager"] = lambda: eager(x)
    work["eager, CUDA graph"] = capture(lambda: eager(x)).replay
    return work


def interleaved(work: Mapping[str, Callable[[], object]]) -> dict[str, dict[str, float]]:
    """Each contender's p20, p50 and p80 in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, once in work.items():
            times[name] += event_times(once, RUNS)
    return {name: quantiles(found) for name, found in times.items()}


def levels(plan: Plan, program: Program, rates: Rates) -> list[dict]:
    """Each launch by itself, many times in a CUDA graph: its inputs lie in the L2 cache, and a gap is included."""
    rows = []
    for launch, floor in zip(plan.launches, floors(program, rates), strict=True):
        graph = capture(lambda launch=launch: [launch() for _ in range(LAUNCHES)])
        spread = quantiles([seconds / LAUNCHES for seconds in event_times(graph.replay, RUNS)])
        rows.append({"level": launch.name, "us": spread, "computed_floor_us": round(floor * 1e6, 3)})
    return rows


def floors(program: Program, rates: Rates) -> list[float]:
    """Seconds below which no level can run at batch 1 in half precision."""
    cost = program.cost(itemsize=2).by("level")
    return [rates.floor(level.flops, level.bytes) for level in cost.values()]


def table_path(out: Path, gpu: str) -> Path:
    """Where the short tuning pass leaves its table: among the results, not among the tables in use."""
    return out / f"device_name={gpu.replace(' ', '_')}.json"


def _picture(program: Program, device: torch.device) -> Tensor:
    side = program.config.image_size
    return torch.randn(1, 3, side, side, device=device)


def _plan(program: Program, dtype: torch.dtype, table: Table, device: torch.device) -> Plan:
    side = program.config.image_size
    return GroupedExecutor(program, device, dtype, table).plan(1, side, side)
