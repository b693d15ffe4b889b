"""A level of the network in one launch: programs branch to their operation, tiles of the longest operation first."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ...errors import ParNetError
from .arguments import forms, known, numbers, tensors
from .convolution import Convolution
from .fused_conv import fused_conv_tile
from .geometry import MOST_LEADERS
from .launch import Launch
from .sse_gate import lead


@triton.jit
def level_kernel(tensors, numbers, leaders: tl.constexpr, units: tl.constexpr, forms, COUNT: tl.constexpr):
    """tensors, numbers, forms: `Operands`, `Numbers` and `Form` of COUNT operations, longest first. leaders: how many
    of the programs make gates, all `units` together; they come first, since others wait for them. Where no operation
    has a gate, there are none.
    """
    pid = tl.program_id(0)
    if leaders == 0:
        convolve(tensors, numbers, forms, pid, COUNT)
    elif pid < leaders:
        for unit in range(pid, units, leaders):
            for i in tl.static_range(COUNT):
                s = numbers[i]
                if forms[i].gate != "none" and (unit >= s.lead) & (unit < s.lead + s.units):
                    lead(tensors[i], s, forms[i], unit - s.lead)
    else:
        convolve(tensors, numbers, forms, pid - leaders, COUNT)


@triton.jit
def convolve(tensors, numbers, forms, program, COUNT: tl.constexpr):
    """The tile of this number, counted over all operations."""
    for i in tl.static_range(COUNT):
        s = numbers[i]
        if (program >= s.first) & (program < s.first + s.programs):
            fused_conv_tile(tensors[i], s, forms[i], program - s.first)


def level(
    convolutions: Sequence[Convolution],
    num_warps: int = 4,
    num_stages: int = 4,
    name: str = "level",
) -> Launch:
    """The launch that runs these convolutions, which must not read each other's outputs, side by side."""
    if not convolutions:
        raise ParNetError("a level needs at least one convolution")
    for conv in convolutions:
        conv.check()
    n, device = convolutions[0].n, convolutions[0].x.a.device
    if any(conv.n != n or conv.x.a.device != device for conv in convolutions):
        raise ParNetError("the convolutions of a level must have as many pictures, on one device")
    longest_first = sorted(convolutions, key=_work, reverse=True)
    programs, units, of_each = 0, 0, []
    for conv in longest_first:
        of_each.append(numbers(conv, programs, units))
        programs, units = programs + of_each[-1].programs, units + of_each[-1].units
    leaders = min(units, MOST_LEADERS)
    operands = tuple(tensors(conv.x) for conv in longest_first)
    kinds = tuple(map(known, forms(longest_first)))
    arguments = (operands, tuple(map(known, of_each)), leaders, units, kinds, len(of_each))
    return Launch(name, level_kernel, arguments, (leaders + programs,), num_warps, num_stages)


def _work(conv: Convolution) -> int:
    """Multiplications of one program."""
    return conv.shape.k * conv.tile.bm * conv.tile.bn // conv.tile.split_k
