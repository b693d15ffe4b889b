"""How far a kernel is from its twin in fp32: a number that says pass or fail by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel_parnet.kernels.gpu import twins
from parallel_parnet.kernels.gpu.convolution import Convolution
from parallel_parnet.kernels.gpu.samples import in_fp32

ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a unit in the last place
ORDER = 1e-4  # of the largest output: tensor cores add in an order, and with a truncation, of their own


def poison(conv: Convolution) -> None:
    """Fill everything that the convolution must write with NaN; split-K's counters stay, as they must be zero."""
    for tensor in (conv.x.y, conv.x.sums, conv.x.gate, conv.x.workspace):
        if tensor is not None:
            tensor.fill_(float("nan"))


def deviation(conv: Convolution) -> float:
    """Of a convolution that has run: its largest error over what rounding allows. Up to 1 passes; NaN is infinite.

    y may be off by one rounding of the exact answer, and its sums by their own order of additions.
    """
    exact = in_fp32(conv)
    twins.fused_conv(exact)
    y, reference = conv.x.y.float(), exact.x.y
    allowed = 1.01 * ROUNDING[conv.x.y.dtype] * reference.abs() + ORDER * reference.abs().max() + 1e-7
    stored = _per_tile(y.double(), conv)
    magnitude = _per_tile(y.double().abs(), conv)
    errors = [(y - reference).abs() / allowed]
    if conv.x.sums is not None:
        errors.append((conv.x.sums - stored).abs() / (1e-5 * magnitude + 1e-9))
    worst = max(error.max().item() if not error.isnan().any() else float("inf") for error in errors)
    return float(worst)


def _per_tile(values: Tensor, conv: Convolution) -> Tensor:
    """Sums [N, T, O] over each spatial tile of values [N, H, W, O]."""
    bm = conv.tile.bm
    flat = torch.nn.functional.pad(values.flatten(1, 2), (0, 0, 0, -conv.shape.pixels % bm))
    return flat.unflatten(1, (-1, bm)).sum(2)
