"""Whether an executor computes a quantised program: each operation, from the inputs that it had, up to one step. In
fp8 a step is from one of its numbers to the next.

Two executors sum fp32 numbers in different orders, so now and then a value close to the middle of two integers is
rounded the other way. That moves it by one step, and so, slightly, all that is computed from it, of which more is then
rounded the other way: over the levels, the answers of two right executors come apart as far as if they had been rounded
independently. So each operation is compared by itself, where a right one moves few values by one step, and none by two.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..engine import Engine
from ..executors.segment import SegmentModule
from ..parity import LIMIT, relative
from ..program.contract import E4M3
from ..program.placement import Placement, Segment
from ..program.program import INPUT, Program
from ..settings import with_own_settings

# Of the values. The fp32 numbers that are rounded are off by some 2^-22 of a value of up to 255 steps, so by 6e-5 of a
# step, and as large a part of them is rounded the other way.
MOVED = 1e-3
SPARE = 16  # of few values: in 3,000 right passes of 3,072 values, 1.7 moved on average, and 11 at most
EQUAL = 1e-2  # of a step: two products of a step and the same integer are closer
NOISE = 0.05  # its standard deviation, of normalised pixels
FURTHEST = 256  # steps: no two integers are so far apart


class Agreement(NamedTuple):
    """steps: the most that a value of a quantised feature is off. moved: how many of `values` are off. error: the
    largest relative error of what is not quantised, which is fp32."""

    steps: int
    moved: int
    values: int
    error: float

    @property
    def right(self) -> bool:
        """Whether rounding explains all differences."""
        return self.steps <= 1 and self.moved <= SPARE + MOVED * self.values and self.error <= LIMIT[torch.float32]

    def __str__(self) -> str:
        return (
            f"{self.moved} of {self.values} integers moved, by {self.steps} step(s) at most, fp32 numbers by "
            f"{self.error:.1e} (limits {SPARE} and {MOVED:.0e} of them, 1, {LIMIT[torch.float32]:.0e})"
        )


@with_own_settings
@torch.inference_mode()
def agreement(program: Program, executor: str, x_nchw: Tensor) -> Agreement:
    """Compare each operation of a quantised program, as this executor computes it, with the executor reference.

    The reference gets the inputs that the executor's own operation had. x_nchw: pictures, normalised; they get noise,
    since equal pixels would round alike, and one tie between two integers would count as many.
    """
    draw = torch.Generator("cpu").manual_seed(0)
    noise = torch.randn(x_nchw.shape, generator=draw, dtype=torch.float32, device="cpu")
    x_nchw = x_nchw.float() + NOISE * noise.to(x_nchw.device)
    names = {op.name: op.name for op in program.operations}
    whole = replace(program, outputs=names, original=program)
    features = Engine(whole, Placement.single(whole), x_nchw.device, executor=executor)(x_nchw)
    assert isinstance(features, dict)
    features[INPUT] = x_nchw
    steps = moved = values = 0
    error = 0.0
    for op in program.operations:
        segment = Segment(0, (op.name,), tuple(dict.fromkeys(op.inputs)), (op.name,))
        module = SegmentModule(program, segment, torch.float32, x_nchw.device, torch.contiguous_format)
        (expected,) = module(*(features[name].contiguous() for name in segment.reads))
        step = program.weights.get(f"{op.name}.step")
        if step is None:
            error = max(error, relative(features[op.name], expected))
            continue
        units = [feature / step.to(feature.device).view(1, -1, 1, 1) for feature in (features[op.name], expected)]
        if program.quantised == E4M3:
            units = [_numbered(feature) for feature in units]
        off = (units[0] - units[1]).abs()
        off = torch.where(off.isfinite(), off, FURTHEST).clamp(max=FURTHEST)
        steps = max(steps, math.ceil(float(off.max()) - EQUAL))
        moved += int((off > EQUAL).sum())
        values += off.numel()
    return Agreement(steps, moved, values, error)


def _numbered(values: Tensor) -> Tensor:
    """Number the values of e4m3, given as fp32, from 0 for 0; NaN for a value that e4m3 does not have."""
    stored = values.to(E4M3)
    bits = stored.view(torch.uint8).int()
    counted = torch.where(bits < 128, bits, 128 - bits).float()
    return torch.where(stored.float() == values, counted, torch.nan)
