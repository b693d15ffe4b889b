"""How far a kernel is from its twin in fp32: a number that says pass or fail by itself."""

from __future__ import annotations

import torch

from parallel_parnet.kernels.gpu import twins
from parallel_parnet.kernels.gpu.convolution import E4M3, Convolution
from parallel_parnet.kernels.gpu.samples import in_fp32

# half a unit in the last place
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, E4M3: 2.0**-4}
LEAST = {E4M3: 2.0**-10}  # half of the smallest number, where it is more than other errors are
ORDER = 1e-4  # of the largest output: tensor cores add in an order, and with a truncation, of their own
ORDER_IN_FP8 = 2e-3  # which a Hopper truncates to some 14 bits


def poison(*convolutions: Convolution) -> None:
    """Fill everything that convolutions must write with NaN; split-K's counters stay, as they must be zero."""
    for x in (conv.x for conv in convolutions):
        for tensor in (x.y, x.sums, x.gate, x.products, x.workspace):
            if tensor is not None:
                tensor.fill_(float("nan"))


def deviation(conv: Convolution) -> float:
    """Of a convolution that has run: its largest error over what rounding allows. Up to 1 passes; NaN is infinite.

    y may be off by one rounding of the exact answer, and its sums by their own order of additions.
    """
    exact = in_fp32(conv)
    twins.fused_conv(exact)
    channels, dtype = conv.shape.cout, conv.x.y.dtype
    y, reference = conv.x.y.float()[..., :channels], exact.x.y[..., :channels]
    order = ORDER_IN_FP8 if conv.x.weight_step is not None else ORDER
    allowed = 1.01 * ROUNDING[dtype] * reference.abs() + order * reference.abs().max() + LEAST.get(dtype, 1e-7)
    if conv.x.step is not None:
        y, reference, allowed = (t * conv.x.step for t in (y, reference, allowed))
    stored = twins.per_tile(y.double(), conv)
    magnitude = twins.per_tile(y.double().abs(), conv)
    errors = [(y - reference).abs() / allowed]
    if conv.x.sums is not None:
        errors.append((conv.x.sums[..., :channels] - stored).abs() / (1e-5 * magnitude + 1e-9))
    worst = max(error.max().item() if not error.isnan().any() else float("inf") for error in errors)
    return float(worst)
