"""The checks that `gpu_check.py` makes on a GPU. Each returns what it saw, and under "passed" whether that is right."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from parallel_parnet import VARIANTS, Engine, Placement, Program, create_model, fold
from parallel_parnet.executors.available import ON_GPUS
from parallel_parnet.executors.triton_backend import TritonSegment, whole
from parallel_parnet.kernels.gpu import twins
from parallel_parnet.kernels.gpu.classifier import classifier
from parallel_parnet.kernels.gpu.sse_gate import sse_gate
from parallel_parnet.parity import LIMIT, relative, tolerance
from parallel_parnet.program.pixels import normalise

from ..common import DTYPES, settle
from ..processes import environment, module
from .device import capture, exact_fp32, machine, measure_rates, require_gpu, run_within
from .parity import deviation, poison
from .precompile import TILES, KernelCase, NetworkCase, compile_all, kernel_cases, network_cases, single_launches
from .timing import run

INPUTS = 3  # fresh ones for every network
USED = ("parnet_fashion", "parnet_s")
REPEATS = 1000
REPEATED = (("parnet_s", 1), ("parnet_xl", 1), ("parnet_xl", 4))
Run = Callable[[Tensor], Tensor]


def check_machine(deadline: float, out: Path) -> dict:
    """What it is, and what it reaches."""
    device = require_gpu()
    rates = {name: measure_rates(device, DTYPES[name]) for name in ("bfloat16", "float16")}
    return {
        "passed": True,
        **machine(device),
        "copy_tb_per_s": round(rates["bfloat16"].bytes / 1e12, 3),
        "matmul_tflop_per_s": {name: round(rate.flops / 1e12, 1) for name, rate in rates.items()},
    }


def check_compile(deadline: float, out: Path) -> dict:
    """Every kernel that the steps after this one launch."""
    found = machine(require_gpu())
    cases = [*kernel_cases(), *single_launches(network_cases())]
    return compile_all(cases, tuple(found["capability"]), found["gpu"], deadline)


def check_kernels(deadline: float, out: Path) -> dict:
    """Every kind of convolution, the separate gate and the classifier, against their twins in fp32."""
    device = require_gpu()
    exact_fp32()
    rows: list[dict] = []
    for seed, case in enumerate(kernel_cases()):
        if time.monotonic() > deadline:
            break
        conv = case.make(_fresh(seed), device)
        poison(conv)
        case.launch(conv)()
        rows.append({"case": _name(case.kind, case.dtype, case.tile), "deviation": round(deviation(conv), 4)})
    rows += [_separate_gate(device), _classifier(device)]
    worst = max(row["deviation"] for row in rows)
    return {"passed": worst <= 1, "worst": worst, "left_out": len(kernel_cases()) + 2 - len(rows), "rows": rows}


def check_networks(deadline: float, out: Path) -> dict:
    """Every variant, type and batch against the reference executor in fp32, and no further from it than torch."""
    device = require_gpu()
    exact_fp32()
    rows, cases = [], network_cases()
    for case in sorted(cases, key=lambda case: case.variant):
        if time.monotonic() > deadline:
            break
        program, reference = _network(case.variant)
        eager = Engine(program, Placement.single(program), device, case.dtype, "eager")
        plan = _plan(program, case, device)
        rows.append(compare(case, lambda x, plan=plan: run(plan, x).clone(), eager, reference, device))
    worst = max((row["error"] / row["tolerance"] for row in rows), default=float("inf"))
    passed = all(row["error"] <= row["tolerance"] for row in rows) and len(rows) > 0
    return {"passed": passed, "worst": round(worst, 4), "left_out": len(cases) - len(rows), "rows": rows}


def check_executors(deadline: float, out: Path) -> dict:
    """Every executor of GPUs, on one lane and with a CUDA stream for each of three, as callers use it."""
    device = require_gpu()
    exact_fp32()
    rows, cases = [], list(product(USED, (torch.bfloat16, torch.float16), ON_GPUS, (1, 3)))
    for variant, dtype, executor, lanes in cases:
        if time.monotonic() > deadline:
            break
        program, reference = _network(variant)
        placement = Placement.from_streams_per_gpu(program, 3 // lanes, lanes)
        engine = Engine(program, placement, device, dtype, executor)
        rows.append({"network": variant, "lanes": lanes, **use(engine, reference)})
    worst = max((row["error"] / row["tolerance"] for row in rows), default=float("inf"))
    passed = worst <= 1 and all(row["right"] for row in rows)
    return {"passed": passed, "worst": round(worst, 4), "left_out": len(cases) - len(rows), "rows": rows}


def check_repeats(deadline: float, out: Path) -> dict:
    """The same bits from a thousand runs, one by one and as a CUDA graph."""
    device, rows = require_gpu(), []
    for variant, n in REPEATED:
        if time.monotonic() > deadline:
            break
        rows += _repeat_network(NetworkCase(variant, torch.float16, n), device)
    passed = all(row["different"] == 0 and row["finite"] for row in rows) and len(rows) > 0
    return {"passed": passed, "left_out": 2 * len(REPEATED) - len(rows), "rows": rows}


def check_sanitizer(deadline: float, out: Path) -> dict:
    """A small network under compute-sanitizer, which sees stray accesses that give the right answer."""
    if shutil.which("compute-sanitizer") is None:
        return {"passed": True, "skipped": "compute-sanitizer is not installed"}
    ends = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # every tensor ends where it ends
    rows: list[dict] = []
    for tool in ("memcheck", "racecheck"):
        left = deadline - time.monotonic()
        if left < 15:
            rows.append({"tool": tool, "left_out": "no time"})
            continue
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *module("gpu.proofs")]
        status, output, errors = run_within(command, left, ends)
        if status is None:
            rows.append({"tool": tool, "left_out": f"not done after {left:.0f} s"})
        else:
            rows.append({"tool": tool, "status": status, "said": output[-1000:] + errors[-500:]})
    return {"passed": all(row.get("status", 0) == 0 for row in rows), "rows": rows}


def compare(case: NetworkCase, executor: Run, eager: Run, reference: Run, device: torch.device) -> dict:
    """The relative error of the logits over some fresh inputs, beside that of torch in the same type."""
    side = VARIANTS[case.variant].image_size
    inputs = [torch.randn(case.n, 3, side, side, device=device) for _ in range(INPUTS)]
    expected = torch.cat([reference(x) for x in inputs])
    error, of_torch = (relative(torch.cat([run(x) for x in inputs]), expected) for run in (executor, eager))
    return {
        "network": case.variant,
        "dtype": str(case.dtype).removeprefix("torch."),
        "n": case.n,
        "error": error,
        "error_of_torch": of_torch,
        "tolerance": tolerance(case.dtype, of_torch),
    }


def use(engine: Engine, reference: Run) -> dict:
    """The larger error of fresh pictures and of raw ones, and whether an answer outlives later calls, fills `out`, and
    is the same from another CUDA stream."""
    config, device = engine.program.config, engine.device
    shape = INPUTS, 1, 3, config.image_size, config.image_size
    pictures = torch.randn(shape, device=device)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    answers = [engine(x) for x in pictures]
    first, filled = answers[0].clone(), torch.full_like(answers[0], float("nan"))
    engine(pictures[1], out=filled)
    with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext():
        elsewhere = engine(pictures[2])
    of_raw = [engine(x) for x in raw]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    pairs = (answers, pictures), (of_raw, [normalise(x, config) for x in raw])
    return {
        "executor": engine.executor,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "error": max(relative(torch.cat(got), torch.cat([reference(x) for x in given])) for got, given in pairs),
        "tolerance": LIMIT[engine.dtype],
        "right": all(map(torch.equal, answers, (first, filled, elsewhere))),
    }


def repeat(work: Callable[[], object], logits: Tensor, times: int) -> dict:
    """How many of so many runs gave other bits than the first, each into a poisoned buffer."""
    work()
    first, different = logits.clone(), torch.zeros((), dtype=torch.int64, device=logits.device)
    for _ in range(times):
        logits.fill_(float("nan"))
        work()
        different += (logits != first).any()
    return {"runs": times, "different": int(different), "finite": bool(first.isfinite().all())}


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, as torch fills them in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _repeat_network(case: NetworkCase, device: torch.device) -> list[dict]:
    program, _ = _network(case.variant)
    side = program.config.image_size
    plan, x = _plan(program, case, device), torch.randn(case.n, 3, side, side, device=device)
    ways = {"launches": lambda: run(plan, x), "graph": capture(lambda: run(plan, x), device)[1]}
    name = f"{case.variant} n{case.n}"
    return [{"network": name, "by": way, **repeat(work, plan.outputs[0], REPEATS)} for way, work in ways.items()]


@lru_cache(maxsize=1)
def _network(variant: str) -> tuple[Program, Run]:
    """A lively random program, and its reference on the GPU; of the last variant alone, for the sake of memory."""
    program = fold(settle(create_model(variant)))
    return program, Engine(program, Placement.single(program), require_gpu(), executor="reference")


def _plan(program: Program, case: NetworkCase, device: torch.device) -> TritonSegment:
    side = program.config.image_size
    with poisoned():
        return whole(program, (case.n, side, side), case.dtype, device)


def _separate_gate(device: torch.device) -> dict:
    conv = KernelCase("fusion_down", torch.float16, TILES[0]).make(_fresh(0), device)
    gate = torch.full((conv.n, conv.shape.cout), float("nan"), device=device)
    sse_gate(conv, gate)()
    return {"case": "separate gate", "deviation": round(relative(gate, twins.sse_gate(conv)) / 1e-5, 4)}


def _classifier(device: torch.device) -> dict:
    sums, bias = torch.randn(3, 5, 1284, device=device), torch.randn(1003, device=device)
    weight = torch.randn(1003, 1284, device=device).half()
    logits, expected = (torch.full((3, 1003), float("nan"), device=device) for _ in range(2))
    classifier(sums, 49, weight, bias, logits)()
    twins.classifier(sums, 49, weight, bias, expected)
    return {"case": "classifier", "deviation": round(relative(logits, expected) / 1e-5, 4)}


def _fresh(seed: int) -> int:
    """Different in every run of the script."""
    return (torch.initial_seed() + seed) % 2**31


def _name(kind: str, dtype: torch.dtype, tile: object) -> str:
    return f"{kind} {str(dtype).removeprefix('torch.')} {tile}"


if __name__ == "__main__":  # the small run that compute-sanitizer watches
    small, _ = _network("parnet_fashion")
    answer = run(
        _plan(small, NetworkCase("parnet_fashion", torch.float16, 1), require_gpu()), torch.randn(1, 3, 32, 32)
    )
    assert answer.isfinite().all(), "the small network's logits are not finite"
