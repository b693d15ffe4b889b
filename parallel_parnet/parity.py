"""How far a network's logits may be from the reference's: numbers that say pass or fail by themselves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# relative errors of logits that pass; in half precision see `tolerance`
LIMIT = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
FURTHEST = 0.1  # where logits cancel: MARGIN / 2 times torch's own error may pass LIMIT, up to this
MARGIN = 3.0  # few logits make a noisy sample; and OpenVINO rounds averages and gates, for all pixels alike


def relative(got: Tensor, expected: Tensor) -> float:
    """Return the relative error |got - expected| / |expected|, computed in fp64: 0 where both are equal, infinite where
    either holds a NaN, or `expected` is all zeros and `got` is not."""
    difference, size = (v.norm().item() for v in (got.double() - expected.double(), expected.double()))
    error = 0.0 if difference == 0 else difference / size if size else math.inf
    return error if error == error else math.inf


def tolerance_quantised(error_of_type: float) -> float:
    """Return the relative error up to which logits in int8 or fp8 pass against the reference in the same type.

    error_of_type: how far the reference in this type is from fp32. A value close to the middle of two numbers may be
    rounded the other way, which moves it by a step, and what is computed from it by a little, so that more is rounded
    the other way. At the worst all features are: then both have rounded independently, and differ by sqrt(2) times what
    rounding does to either. `int8.agreement` is stricter, where each operation can be looked at.
    """
    return min(1.0, max(LIMIT[torch.float32], math.sqrt(2) * error_of_type))


def tolerance(dtype: torch.dtype, error_of_torch: float) -> float:
    """Return the relative error up to which logits pass. error_of_torch: of torch's own run in this type."""
    if dtype == torch.float32:
        return LIMIT[dtype]
    most = max(LIMIT[dtype], min(FURTHEST, MARGIN / 2 * error_of_torch))
    return min(most, max(LIMIT[torch.float32], MARGIN * error_of_torch))  # where both ran in fp32 after all
