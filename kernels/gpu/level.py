"""A level of the network in one launch: programs branch to their operation, tiles of the longest operation first."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ...errors import ParNetError
from .arguments import Shared, encoded, numbers, shared, tensors, told
from .convolution import Convolution
from .fused_conv import fused_conv_tile
from .geometry import MOST_LEADERS
from .launch import Launch
from .sse_gate import lead


@triton.jit
def chosen(tensors, numbers, program, LEAD: tl.constexpr, COUNT: tl.constexpr):
    """The operands and numbers of the operation to which a program, or a unit of gate work, belongs."""
    x, s = tensors[0], numbers[0]
    for i in tl.static_range(1, COUNT):
        if program >= (numbers[i].lead if LEAD else numbers[i].first) >> 4:
            x, s = tensors[i], numbers[i]
    return x, told(s)


@triton.jit(do_not_specialize=["leaders", "units"])
def level_kernel(tensors, numbers, leaders, units, m, COUNT: tl.constexpr, EARLY: tl.constexpr):
    """tensors, numbers: `Operands` and `encoded` `Numbers` of COUNT operations, longest first. m: `Shared`. leaders:
    how many of the programs make gates, all `units` together; they come first, since others wait for them.
    """
    pid = tl.program_id(0)
    if EARLY:  # let the next launch start once all programs of this one have
        tl.extra.cuda.gdc_launch_dependents()
    if pid < leaders:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        for unit in range(pid, units, leaders):
            x, s = chosen(tensors, numbers, unit, True, COUNT)
            lead(x, s, unit - s.lead, m.bn, m.align, m.planar)
    else:
        x, s = chosen(tensors, numbers, pid - leaders, False, COUNT)
        fused_conv_tile(x, s, m, pid - leaders - s.first, EARLY)


def level(
    convolutions: Sequence[Convolution],
    num_warps: int = 4,
    num_stages: int = 4,
    name: str = "level",
    early: bool = False,
) -> Launch:
    """The launch that runs these convolutions, which must not read each other's outputs, side by side. early: as in
    `Launch`."""
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
        of_each.append(encoded(numbers(conv, programs, units)))
        programs, units = programs + n * conv.tile.programs(conv.shape), units + n * conv.tile.units(conv.shape)
    leaders = min(units, MOST_LEADERS)
    m = Shared(*(tl.constexpr(value) for value in shared(convolutions)))
    arguments = (
        tuple(tensors(conv.x) for conv in longest_first), tuple(of_each), leaders, units, m, len(of_each), early
    )  # fmt: skip
    return Launch(name, level_kernel, arguments, (leaders + programs,), num_warps, num_stages, early)


def _work(conv: Convolution) -> int:
    """Multiplications of one program."""
    return conv.shape.k * conv.tile.bm * conv.tile.bn // conv.tile.split_k
