"""A level of the network in one launch: programs branch to their operation, tiles of the longest operation first."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ...errors import ParNetError
from .constants import constants
from .convolution import Convolution
from .fused_conv import fused_conv_tile
from .launch import Launch


@triton.jit
def level_kernel(operations, n, COUNT: tl.constexpr):
    """operations: COUNT pairs of (`Operands`, `Constants`), longest first, of n pictures each.

    The loop is unrolled: each operation has code of its own, with its shapes as constants, so that loads stay wide and
    asynchronous. Descriptors read from memory would lose that.
    """
    pid = tl.program_id(0)
    for i in tl.static_range(COUNT):
        programs = n * operations[i][1].PROGRAMS
        if (pid >= 0) & (pid < programs):
            fused_conv_tile(operations[i][0], operations[i][1], pid)
        pid -= programs


def level(convolutions: Sequence[Convolution], num_warps: int = 4, num_stages: int = 4, name: str = "level") -> Launch:
    """The launch that runs these convolutions, which must not read each other's outputs, side by side."""
    if not convolutions:
        raise ParNetError("a level needs at least one convolution")
    for conv in convolutions:
        conv.check()
    n, device = convolutions[0].n, convolutions[0].x.a.device
    if any(conv.n != n or conv.x.a.device != device for conv in convolutions):
        raise ParNetError("the convolutions of a level must have as many pictures, on one device")
    longest_first = sorted(convolutions, key=_work, reverse=True)
    programs = n * sum(conv.tile.programs(conv.shape) for conv in convolutions)
    operations = tuple((conv.x, constants(conv)) for conv in longest_first)
    return Launch(name, level_kernel, (operations, n, len(operations)), (programs,), num_warps, num_stages)


def _work(conv: Convolution) -> int:
    """Multiplications of one program."""
    return conv.shape.k * conv.tile.bm * conv.tile.bn // conv.tile.split_k
