"""What a launch is told of each of its operations: its tensors, and its numbers, which the compiler knows.

An operation's code is made for its numbers: with numbers told at run time it was more than twice as long, and on an
H200 what a program costs beside its products goes with the length of its way through instructions that no cache holds
yet (docs/kernels.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton.language as tl

from ...errors import ParNetError
from .convolution import E4M3, Convolution, Operands
from .geometry import ALIGNED, COPY, Tile, padded_channels, power_of_two

MOST_ROWS = 64  # of sums, that a program holds at once


class Numbers(NamedTuple):
    """One operation's numbers.

    first, programs: its first program in the launch, and how many it has. lead, units: its first unit of gate work, and
    how many. h, w: input. wout: output width. pixels: P, output pixels. stride. c, c_padded: channels of one input,
    and places for them. part, part_padded: those of a group. cout, cout_padded: output channels, and places for them.
    group, rest: output channels of a group, and of one of its chunks that the shuffle moves. groups, inputs. bordered:
    0 or 1. split_k. steps: of one input. tiles: T, spatial tiles. columns: channel tiles of a group. parts: of the
    gate. a_tiles, b_tiles: T of the inputs' sums.
    """

    first: int
    programs: int
    lead: int
    units: int
    h: int
    w: int
    wout: int
    pixels: int
    stride: int
    c: int
    c_padded: int
    part: int
    part_padded: int
    cout: int
    cout_padded: int
    group: int
    rest: int
    groups: int
    inputs: int
    bordered: int
    split_k: int
    steps: int
    tiles: int
    columns: int
    parts: int
    a_tiles: int
    b_tiles: int


class Form(NamedTuple):
    """What code an operation has. Code that is not needed is never made, where with `Numbers` the compiler removes it.

    The first six, to planar, the operations of a launch have in common.
    rows: of sums that are read at once, a power of two. planar: whether the input is a picture. align: channels of
    which every group's share is a multiple, where there are several: 16 in fp8, 8 or 1.
    `i_group * (share // align * align)` says so to the compiler, who does not see that a lone group, of any width, is
    number 0. kernel: taps along a side. gate and activation as in `program.Operation`. residual, summed: whether it
    adds a residual, makes sums.
    """

    bm: int
    bn: int
    bk: int
    rows: int
    align: int
    planar: bool
    kernel: int
    gate: str
    activation: str
    residual: bool
    summed: bool


def numbers(conv: Convolution, first: int, lead: int) -> Numbers:
    """The numbers of a convolution whose tensors have been checked. first, lead: as in `Numbers`."""
    s, tile = conv.shape, tile_of(conv)
    a_tiles, b_tiles = (0 if sums is None else sums.shape[1] for sums in (conv.x.a_sums, conv.x.b_sums))
    c, group, read, stored = s.cin // s.inputs, s.cout // s.groups, conv.dtype.itemsize, conv.x.y.dtype.itemsize
    # one group is stored as computed, whatever rest is
    rest = group // s.shuffle if s.groups > 1 else padded_channels(group, stored)
    return Numbers(
        first=first, programs=conv.n * tile.programs(s), lead=lead, units=conv.n * tile.units(s),
        h=s.h, w=s.w, wout=s.wout, pixels=s.pixels, stride=s.stride,
        c=c, c_padded=padded_channels(c, read), part=s.part,
        part_padded=s.part if s.groups > 1 else padded_channels(s.part, read),
        cout=s.cout, cout_padded=padded_channels(s.cout, stored), group=group, rest=rest,
        groups=s.groups, inputs=s.inputs, bordered=int(conv.x.border is not None), split_k=tile.split_k,
        steps=tile.steps(s) // s.inputs, tiles=tile.spatial(s), columns=tile.channels(s) // s.groups,
        parts=tile.parts(s), a_tiles=a_tiles, b_tiles=b_tiles,
    )  # fmt: skip


def tile_of(conv: Convolution) -> Tile:
    """The tile of a convolution; ParNetError where that is not one for Triton's kernels."""
    if not isinstance(conv.tile, Tile):
        raise ParNetError(f"{conv.tile}: not for Triton's kernels")
    return conv.tile


def known(values: tuple) -> tuple:
    """These values as a kernel takes what the compiler is to know: a tuple of the same type, of Triton's constants."""
    return type(values)(*map(tl.constexpr, values))


def tensors(x: Operands) -> Operands:
    """The operands, and for those that its code names and an operation has not, others, which it does not touch."""
    named = ("a_sums", "b_sums", "border", "scale", "shift", "workspace", "counters")
    missing = {name: x.bias for name in named if getattr(x, name) is None}
    return x._replace(b=x.a if x.b is None else x.b, **missing)


def forms(convolutions: Sequence[Convolution]) -> list[Form]:
    """The forms of a level's convolutions; ParNetError where they differ in what they must have in common."""
    tiles = [tile_of(conv) for conv in convolutions]
    every = {(tile.bm, tile.bn, tile.bk, conv.shape.planar) for tile, conv in zip(tiles, convolutions, strict=True)}
    if len(every) > 1:
        raise ParNetError(f"a level's operations must share tile and kind of input: {every}")
    grouped = [s for s in (conv.shape for conv in convolutions) if s.groups > 1]
    shares = [n for s in grouped for n in (s.part, s.cout // s.groups // s.shuffle)]
    in_fp8 = all(conv.dtype == conv.x.y.dtype == E4M3 for conv in convolutions)
    even = [n for n in ((COPY, ALIGNED) if in_fp8 else (ALIGNED,)) if all(share % n == 0 for share in shares)]
    bm, bn, bk, planar = every.pop()
    given = [sums.shape[1] for conv in convolutions for sums in (conv.x.a_sums, conv.x.b_sums) if sums is not None]
    made = [tile.parts(conv.shape) for tile, conv in zip(tiles, convolutions, strict=True) if planar]
    rows = min(MOST_ROWS, power_of_two(max(given + made, default=1)))
    common = bm, bn, bk, rows, max(even, default=1), planar
    shapes = [conv.shape for conv in convolutions]
    return [Form(*common, s.kernel, s.gate, s.activation, s.residual, s.sums) for s in shapes]
