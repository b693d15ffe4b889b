"""FP8 on the GPU at hand: each launch against its twin, the logits against the reference's, a pass beside bf16's."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from parallel_parnet import Engine, Placement, Program, quantize
from parallel_parnet.executors.available import FP8
from parallel_parnet.executors.graph import capture
from parallel_parnet.executors.triton_backend import TritonSegment
from parallel_parnet.kernels.gpu.convolution import E4M3
from parallel_parnet.parity import relative, tolerance_quantised

from .first import deviations, once
from .journal import Values
from .machines import target_of
from .networks import network, picture, planned, run
from .precompile import BESIDE_FP8, KernelCase, compile_all, fp8_cases, jobs_of
from .proofs import kernel_name, kernel_row
from .timing import interleaved
from .work import Work, skipped, verdict

PICTURES = 4  # for the steps of features, and others to compare answers on


def check_fp8(work: Work) -> Values:
    """Kinds of convolutions and the networks that decide, compiled first on all cores; nothing where a GPU has no
    fp8."""
    target = target_of(work)
    if target.capability < FP8:
        return skipped("fp8 needs compute capability 8.9")
    cases = fp8_cases(work.scope)
    if not all(f"{variant} pass" in work.journal.rows(work.step) for variant in work.scope.decisive):
        compile_all(jobs_of(cases), target, work.end)
    kernels = [case for case in cases if isinstance(case, KernelCase)]
    rows = [
        work.row(kernel_name(case), partial(kernel_row, case, seed, work.device)) for seed, case in enumerate(kernels)
    ]
    for variant in work.scope.decisive:
        program, reference = network(variant, work.device)
        x = picture(program, work.device)
        in_fp8 = quantize(program, picture(program, work.device, PICTURES), to=E4M3)
        plan = planned(in_fp8, BESIDE_FP8, work.device)
        once(plan, x)
        rows += deviations(work, variant, plan)
        rows.append(work.row(f"{variant} logits", partial(_error, in_fp8, plan, reference)))
        rows.append(work.row(f"{variant} pass", partial(_times, work, program, plan, x)))
    return verdict(rows, lambda row: row.get("deviation", 0) <= 1 and row.get("error", 0) <= row.get("tolerance", 0))


def _error(program: Program, plan: TritonSegment, reference: Engine) -> Values:
    x = picture(program, plan.device, PICTURES)
    twin = Engine(program, Placement.single(program), plan.device, executor="reference")
    exact, expected = (torch.cat([engine(each) for each in x.split(1)]) for engine in (reference, twin))
    logits = torch.cat([run(plan, each).clone() for each in x.split(1)])
    of_fp8 = relative(expected, exact)
    return {"error": relative(logits, expected), "error_of_fp8": of_fp8, "tolerance": tolerance_quantised(of_fp8)}


def _times(work: Work, program: Program, plan: TritonSegment, x: Tensor) -> Values:
    plans = {"fp8": plan, "bfloat16": planned(program, BESIDE_FP8, work.device)}
    ways = {name: capture(partial(run, each, x), work.device)[1] for name, each in plans.items()}
    return {"us": interleaved(ways, work.scope.rounds)}
