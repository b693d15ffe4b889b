"""The checks that `gpu_check.py` makes on a GPU: whether kernels, networks and executors are right, and stay so."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement
from parallel_parnet.executors.available import ON_GPUS
from parallel_parnet.executors.graph import capture
from parallel_parnet.executors.triton_backend import TritonSegment
from parallel_parnet.kernels.gpu import twins
from parallel_parnet.kernels.gpu.classifier import Averaged, classifier
from parallel_parnet.parity import LIMIT, relative, tolerance
from parallel_parnet.program.arithmetic import pixel_affine
from parallel_parnet.program.contract import dtype_name

from ..processes import environment, run_within
from .journal import Values
from .machines import target_of
from .networks import network, picture, planned, run
from .parity import deviation, poison
from .precompile import (
    KernelCase,
    NetworkCase,
    compile_all,
    jobs_of,
    kernel_cases,
    network_cases,
    raw_cases,
    single_launches,
)
from .scope import config, scope
from .work import Work, skipped, verdict

INPUTS = 3  # fresh ones for every network
SMALL, SMALL_IN_A_DRY_RUN = "parnet_fashion", "narrow"  # that the sanitizer watches
Run = Callable[[Tensor], Tensor]


def check_compile(work: Work) -> Values:
    """Every kernel that the steps of the parity launch."""
    networks = [*single_launches(network_cases(work.scope)), *raw_cases(work.scope)]
    return compile_all(jobs_of([*kernel_cases(work.scope), *networks]), target_of(work), work.end)


def check_kernels(work: Work) -> Values:
    """Every kind of convolution and the classifier, against their twins in fp32."""
    rows = [
        work.row(kernel_name(case), partial(kernel_row, case, seed, work.device))
        for seed, case in enumerate(kernel_cases(work.scope))
    ]
    rows.append(work.row("classifier", lambda: _classifier(work.device)))
    return verdict(rows, lambda row: row["deviation"] <= 1, worst=_worst(rows, lambda row: row["deviation"]))


def check_networks(work: Work) -> Values:
    """Every variant, type and batch against the reference executor in fp32, and no further from it than torch."""
    cases = sorted(network_cases(work.scope), key=lambda case: case.variant)  # of which one is kept in memory
    rows = [
        work.row(f"{case.variant} {dtype_name(case.dtype)} n{case.n}", partial(_logits, case, work)) for case in cases
    ]
    return _within_tolerance(rows)


def check_executors(work: Work) -> Values:
    """Every executor of GPUs, on one lane and with a CUDA stream for each of three, as callers use it."""
    halves = [dtype for dtype in work.scope.dtypes if dtype != torch.float32]
    executors = ON_GPUS if work.device.type == "cuda" else ("triton",)
    rows = [
        work.row(
            f"{name} {dtype_name(dtype)} {executor}, {lanes} lane(s)",
            partial(_used, work, name, dtype, executor, lanes),
        )
        for name, dtype, executor, lanes in product(work.scope.used, halves, executors, work.scope.lanes)
    ]
    return _within_tolerance(rows, lambda row: row["right"])


def check_repeats(work: Work) -> Values:
    """Whether a thousand runs, one by one and as a CUDA graph, give the same bits."""
    rows = [
        work.row(f"{name} n{n}, {way}", partial(_repeated, work, name, n, way))
        for name, n in work.scope.repeated
        for way in ("launches", "graph")
    ]
    return verdict(rows, lambda row: row["different"] == 0 and row["finite"])


def check_sanitizer(work: Work) -> Values:
    """A small network under compute-sanitizer, which sees stray accesses that give the right answer; in a dry run, the
    small network alone."""
    dry = work.scope.dry
    if not dry and shutil.which("compute-sanitizer") is None:
        return skipped("compute-sanitizer is not installed")
    tools = ("memcheck",) if dry else ("memcheck", "racecheck")
    rows = [work.row(tool, partial(_watched, work, tool), seconds=15) for tool in tools]
    return verdict(rows, lambda row: row["status"] == 0)


def _watched(work: Work, tool: str) -> Values:
    command = [sys.executable, "-m", __name__]
    if work.scope.dry:
        command += ["--dry-run"]
    else:  # errors of the API are no errors here: torch and Triton provoke some to find out what a GPU can do
        watcher = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--report-api-errors", "no"]
        command = [*watcher, *command]
    ends = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # every tensor ends where it ends
    status, output, errors = run_within(command, work.left, ends)
    if status is None:
        return {"fault": "not done when its time was over"}
    return {"status": status, "said": output[-1000:] + errors[-500:]}


def _within_tolerance(rows: list[Values | None], right: Callable[[Values], bool] = lambda row: True) -> Values:
    worst = _worst(rows, lambda row: row["error"] / row["tolerance"])
    return verdict(rows, lambda row: row["error"] <= row["tolerance"] and right(row), worst=worst)


def _worst(rows: list[Values | None], of: Callable[[Values], float]) -> float:
    return round(max((of(row) for row in rows if row and "fault" not in row), default=float("inf")), 4)


def kernel_row(case: KernelCase, seed: int, device: torch.device) -> Values:
    """How far a random convolution is from its twin, of what rounding allows."""
    conv = case.make((torch.initial_seed() + seed) % 2**31, device)  # others in every run
    poison(conv)
    case.launch(conv)()
    return {"deviation": round(deviation(conv), 4)}


def _logits(case: NetworkCase, work: Work) -> Values:
    program, reference = network(case.variant, work.device)
    eager = Engine(program, Placement.single(program), work.device, case.dtype, "eager")
    with poisoned():
        plan = planned(program, case.dtype, work.device, case.n)
    return compare(case, lambda x: run(plan, x).clone(), eager, reference, work.device)


def _used(work: Work, name: str, dtype: torch.dtype, executor: str, lanes: int) -> Values:
    program, reference = network(name, work.device)
    placement = Placement.by_streams(program, lanes)
    return {"network": name, "lanes": lanes, **use(Engine(program, placement, work.device, dtype, executor), reference)}


def _repeated(work: Work, name: str, n: int, way: str) -> Values:
    program, _ = network(name, work.device)
    with poisoned():
        plan: TritonSegment = planned(program, work.scope.dtypes[0], work.device, n)
    x = picture(program, work.device, n)
    once = partial(run, plan, x)
    again = capture(once, work.device)[1] if way == "graph" else once
    return {"network": f"{name} n{n}", "by": way, **repeat(again, plan.outputs[0], work.scope.repeats)}


def compare(case: NetworkCase, executor: Run, eager: Run, reference: Run, device: torch.device) -> dict:
    """The relative error of the logits over some fresh inputs, beside that of torch in the same type."""
    side = config(case.variant).image_size
    inputs = [torch.randn(case.n, 3, side, side, device=device) for _ in range(INPUTS)]
    expected = torch.cat([reference(x) for x in inputs])
    error, of_torch = (relative(torch.cat([run(x) for x in inputs]), expected) for run in (executor, eager))
    return {
        "network": case.variant,
        "dtype": dtype_name(case.dtype),
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
    scale, shift = pixel_affine(config, device)
    pairs = (answers, pictures), (of_raw, [x * scale + shift for x in raw])
    return {
        "executor": engine.executor,
        "dtype": dtype_name(engine.dtype),
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


def _classifier(device: torch.device) -> dict:
    sums, bias = torch.randn(3, 5, 1280, device=device), torch.randn(1003, device=device)
    weight = torch.randn(1003, 1280, device=device).half()
    logits, expected = (torch.full((3, 1003), float("nan"), device=device) for _ in range(2))
    classifier([Averaged(sums, weight.shape[1], 49)], weight, bias, logits)()
    twins.classifier(sums, 49, weight, bias, expected)
    return {"deviation": round(relative(logits, expected) / 1e-5, 4)}


def kernel_name(case: KernelCase) -> str:
    return f"{case.kind} {dtype_name(case.dtype)} {case.tile}"


if __name__ == "__main__":  # the small run that compute-sanitizer watches
    dry = "--dry-run" in sys.argv
    where = scope(dry).device
    small, _ = network(SMALL_IN_A_DRY_RUN if dry else SMALL, where)
    answer = run(planned(small, torch.bfloat16 if dry else torch.float16, where), picture(small, where))
    assert answer.isfinite().all(), "the small network's logits are not finite"
