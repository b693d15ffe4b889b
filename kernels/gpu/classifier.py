"""The head in one small launch: logits = weight avg(x) + bias, the average from the last convolution's sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .convolution import STORAGE, check_tensors
from .geometry import aligned, power_of_two
from .launch import Launch
from .sse_gate import feature_average


@triton.jit
def classifier_kernel(
    sums, weight, bias, logits,
    C: tl.constexpr, ROOM: tl.constexpr, CLASSES: tl.constexpr, PIXELS: tl.constexpr, T: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (i_o, n): BO logits of picture n. Shapes and types as in `classifier`; EARLY as in `fused_conv_tile`."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    mask_o = o < CLASSES
    total = tl.load(bias + o, mask=mask_o, other=0.0)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        mask_c = c < C
        average = feature_average(sums, n, c, mask_c, ROOM, T, PIXELS)
        lanes = mask_o[:, None] & mask_c[None, :]
        rows = tl.load(weight + (o[:, None] * C + c[None, :]), mask=lanes, other=0.0)
        total += tl.sum(rows.to(tl.float32) * average[None, :], axis=1)
    tl.store(logits + n.to(tl.int64) * CLASSES + o, total, mask=mask_o)


def classifier(
    sums: Tensor,
    pixels: int,
    weight: Tensor,
    bias: Tensor,
    logits: Tensor,
    bo: int = 8,
    num_warps: int = 4,
    early: bool = False,
) -> Launch:
    """sums fp32 [N, T, C aligned] over `pixels` pixels, weight storage [classes, C], bias fp32 [classes], logits fp32
    [N, classes]. Eight rows a program spread a thousand classes over 125 multiprocessors.
    """
    (n, t, room), (classes, c) = sums.shape, weight.shape
    layouts = {
        "sums": ((n, t, aligned(c)), torch.float32),
        "weight": ((classes, c), weight.dtype if weight.dtype in STORAGE else torch.float32),
        "bias": ((classes,), torch.float32),
        "logits": ((n, classes), torch.float32),
    }
    check_tensors({"sums": sums, "weight": weight, "bias": bias, "logits": logits}, layouts, sums.device)
    bc = min(1024, power_of_two(c))
    arguments = (sums, weight, bias, logits, c, room, classes, pixels, t, bo, bc, early)
    return Launch(
        "classifier", classifier_kernel, arguments, (-(-classes // bo), n), num_warps, num_stages=1, early=early
    )
