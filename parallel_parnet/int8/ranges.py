"""Which 256 numbers stand for a feature's values: step and zero, from a sample of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..program.arithmetic import quantised
from ..program.contract import LEAST_STEP, MOST_STEP

LEVELS = 255  # steps from the smallest number to the largest
CANDIDATES = 32  # ends that are tried of each side
LEAST_SHARE = 0.25  # of what a feature reaches on a side: the nearest end that is tried


class Range(NamedTuple):
    """How a feature is stored: as integers q of 0 to 255, which stand for step (q - zero). step: an fp32 number."""

    step: float
    zero: int


def between(low: float, high: float) -> Range:
    """Return the range whose numbers reach about from low to high. 0 is always one of them, since padding is."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = min(max((high - low) / LEVELS, LEAST_STEP), MOST_STEP)
    step = torch.tensor(step, dtype=torch.float32, device="cpu").item()
    return Range(step, min(max(round(-low / step), 0), LEVELS))


def best(sample: Tensor, low: float, high: float) -> Range:
    """Find the range of least squared error on a sample of a feature's values, which reach from low to high.

    Values beyond an end are clipped to it, and in return the others lie on a finer grid. Ends are tried from a quarter
    of what the feature reaches to all of it: first the upper one, then the lower one, then the upper one again, since
    the best of one depends on the other. sample: fp32 [values].
    """
    low, high = min(low, 0.0), max(high, 0.0)
    shares = [LEAST_SHARE + (1 - LEAST_SHARE) * i / (CANDIDATES - 1) for i in range(CANDIDATES)]
    found, least = (low, high), math.inf
    for side in ("high", "low", "high"):
        start = found
        for share in shares:
            ends = (start[0], share * high) if side == "high" else (share * low, start[1])
            if (error := squared_error(sample, between(*ends))) < least:
                found, least = ends, error
    return between(*found)


def squared_error(sample: Tensor, chosen: Range) -> float:
    """Return the squared error of storing a sample, fp32 [values], in this range: the sum over the sample."""
    step, zero = (torch.tensor(v, dtype=torch.float32, device=sample.device) for v in chosen)
    return (quantised(sample, step, zero) - sample).double().square().sum().item()
