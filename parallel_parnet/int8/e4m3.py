"""A program's kernels in fp8, once it is known how far its features reach."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import ParNetError
from ..program.arithmetic import E4M3_MAX, of_columns
from ..program.contract import E4M3, LEAST_STEP, MOST_STEP
from ..program.program import Program
from ..settings import with_own_settings
from .kernels import input_features, quantisable_operations, stepped
from .samples import sample

# How much further than on the pictures of the calibration a feature may reach before it is clipped: e4m3 is floating,
# so that unused room costs no digits.
HEADROOM = 8.0


def reach(program: Program, pictures: Iterable[Tensor] | Tensor, keep: Collection[str] = ()) -> dict[str, Tensor]:
    """Find how large the features that fp8 operations read become: fp32 [C], for each channel, by name. Arguments and
    errors as of `quantize`."""
    found = sample(program, input_features(quantisable_operations(program, keep)), pictures)
    return {name: taken.largest for name, taken in found.items()}


@with_own_settings
def in_fp8(program: Program, largest: Mapping[str, Tensor], keep: Collection[str] = ()) -> Program:
    """Make the program with kernels in e4m3, in steps of each output channel, over features that reach as far as
    `largest` says, fp32 [C].

    A weight's step is its output channel's largest, times the step of the channel that it multiplies, over 448.
    keep: operations that stay in fp32, as do features that only these read.
    Raises ParNetError for a feature of which nothing is told, and as `quantisable_operations`.
    """
    weights = dict(program.weights)
    operations = quantisable_operations(program, keep)
    if missing := [name for name in input_features(operations) if name not in largest]:
        raise ParNetError(f"feature {missing[0]!r} has no range: calibrate the program on pictures")
    steps = {name: step_of(largest[name]) for name in input_features(operations)}
    weights |= {f"{name}.step": step for name, step in steps.items()}
    for op in operations:
        columns = of_columns(op, [steps[name] for name in op.inputs])
        exact, step = stepped(weights[f"{op.name}.weight"].double() * columns, E4M3_MAX)
        weights |= {f"{op.name}.weight": exact.float().to(E4M3), f"{op.name}.weight_step": step}
    return replace(program, weights=weights, original=program)


def step_of(largest: Tensor) -> Tensor:
    """Return the smallest powers of two, as steps, by which values up to HEADROOM times these fit into e4m3."""
    _, exponent = torch.frexp(largest * (HEADROOM / E4M3_MAX))
    return torch.ldexp(torch.ones_like(largest), exponent).clamp(LEAST_STEP, MOST_STEP)
