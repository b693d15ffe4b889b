"""FP8 on the GPU at hand: each launch against its twin, the logits against the reference's, a pass beside bf16's."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program, quantize
from parallel_parnet.executors.available import FP8
from parallel_parnet.executors.triton_backend import TritonSegment
from parallel_parnet.kernels.gpu.convolution import E4M3
from parallel_parnet.parity import relative, tolerance_quantised

from .device import capture, exact_fp32
from .first import deviations, once
from .journal import Values
from .machines import capability_and_gpu
from .networks import network, picture, planned, run
from .precompile import BESIDE_FP8, NetworkCase, compile_all, compile_case, single_launches
from .timing import interleaved
from .work import Work, verdict

CALIBRATED = 4  # pictures


def check_fp8(work: Work) -> Values:
    """The networks that decide, compiled first on all cores; nothing on a GPU that has no fp8."""
    capability, gpu, launchers = capability_and_gpu(work)
    if capability < FP8:
        return {"passed": True, "left_out": 0, "skipped": "fp8 needs compute capability 8.9"}
    exact_fp32()
    cases = single_launches([NetworkCase(variant, E4M3, 1) for variant in work.scope.decisive])
    if not all(f"{variant} pass" in work.journal.rows(work.step) for variant in work.scope.decisive):
        compile_all([(str(case), compile_case, (case, capability, gpu, launchers)) for case in cases], work.end)
    rows = []
    for variant in work.scope.decisive:
        program, reference = network(variant, work.device)
        x = picture(program, work.device)
        in_fp8 = _quantised(program, work.device)
        plan = planned(in_fp8, BESIDE_FP8, work.device)
        logits = once(plan, x)
        rows += deviations(work, variant, plan)
        rows.append(work.row(f"{variant} logits", partial(_error, in_fp8, logits, reference(x), x)))
        rows.append(work.row(f"{variant} pass", partial(_times, work, program, plan, x)))
    return verdict(rows, lambda row: row.get("deviation", 0) <= 1 and row.get("error", 0) <= row.get("tolerance", 0))


@lru_cache(maxsize=1)
def _quantised(program: Program, device: torch.device) -> Program:
    return quantize(program, picture(program, device, CALIBRATED), to=E4M3)


def _error(program: Program, logits: Tensor, exact: Tensor, x: Tensor) -> Values:
    expected = Engine(program, Placement.single(program), x.device, executor="reference")(x)
    assert isinstance(expected, Tensor)
    of_fp8 = relative(expected, exact)
    return {"error": relative(logits, expected), "error_of_fp8": of_fp8, "tolerance": tolerance_quantised(of_fp8)}


def _times(work: Work, program: Program, plan: TritonSegment, x: Tensor) -> Values:
    plans = {"fp8": plan, "bfloat16": planned(program, BESIDE_FP8, work.device)}
    ways = {name: capture(partial(run, each, x), work.device)[1] for name, each in plans.items()}
    return {"us": interleaved(ways, work.scope.rounds)}
