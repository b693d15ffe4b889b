"""Skip-squeeze-excitation's gate, sigmoid(gate_weight avg(x) + gate_bias), from the channel sums of x.

Source: "Non-deep Networks" (arXiv 2110.07641), section 3.1. Batch norms before the average are folded into weight and
bias (program/fold.py), so that whoever produced x only has to emit its sums.

The first programs of a launch, its leaders, make the products in parts, each from some of x's channels, while the
others convolve; who finishes a tile waits for the parts of its channels, and adds them up. A leader waits for nobody,
and programs start in the order of their numbers, so nobody waits for a program that cannot start.

In all of them x is an operation's `Operands`, s its `Numbers`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import COLOURS, GATE_PART, PICTURE_PART

PART = tl.constexpr(GATE_PART)
PIXELS = tl.constexpr(PICTURE_PART)
CHANNELS = tl.constexpr(COLOURS)
PART_DONE = tl.constexpr(1 << 16)  # added to a flag by who made a part; who has read them all adds one
TILES = tl.constexpr(64)  # tiles of sums that a program holds at once
PARTS = tl.constexpr(32)  # parts of gates, likewise


@triton.jit
def feature_average(sums, n, c, mask, room, tiles, pixels):
    """Averages fp32 of channels c [BC] of picture n, from sums fp32 [N, tiles, room], always added in one order."""
    base = sums + n.to(tl.int64) * (tiles * room)
    total = tl.zeros(c.shape, dtype=tl.float32)
    for t0 in range(0, tiles, TILES):
        t = t0 + tl.arange(0, TILES)
        lanes = (t < tiles)[:, None] & mask[None, :]
        total += tl.sum(tl.load(base + (t[:, None] * room + c[None, :]), mask=lanes, other=0.0), axis=0)
    return total / pixels


@triton.jit
def gate_part(x, s, n, i_o, part, BN: tl.constexpr, ALIGN: tl.constexpr):
    """Store gate_weight avg(x) fp32 [BN] for the outputs of channel tile i_o, over the channels of a part."""
    i_group = i_o // s.columns
    i_input = part // (s.parts // s.inputs)
    c = part % (s.parts // s.inputs) * PART + tl.arange(0, PART)
    o = i_o % s.columns * BN + tl.arange(0, BN)
    computed = i_group * (s.group // ALIGN * ALIGN) + o
    o_room = s.o_room // 8 * 8
    mask_o = o < (s.group + ALIGN - 1) // ALIGN * ALIGN  # as many as are one copy; behind the last there are zeros
    rows = (i_input * s.part + c)[:, None] * o_room
    lanes = (c < s.part)[:, None] & mask_o[None, :]
    weight = tl.load(x.gate_weight + (rows + computed[None, :]), mask=lanes, other=0.0)
    source = tl.where(i_input == 0, x.a_sums, x.b_sums)
    tiles = tl.where(i_input == 0, s.a_tiles, s.b_tiles)
    channel = i_group * (s.part // ALIGN * ALIGN) + c
    mask_c = c < s.part_room // ALIGN * ALIGN
    average = feature_average(source, n, channel, mask_c, s.room // 8 * 8, tiles, s.h * s.w)
    value = tl.sum(weight.to(tl.float32) * average[:, None], axis=0)
    tl.store(x.gate + (n.to(tl.int64) * s.parts + part) * o_room + computed, value, mask=mask_o)


@triton.jit
def picture_part(x, s, n, part):
    """Store the sums fp32 [C] of a part of a picture [N, C, H, W], for which nobody else has made them."""
    c = tl.arange(0, CHANNELS)
    p = part * PIXELS + tl.arange(0, PIXELS)
    lanes = (c < s.c)[:, None] & (p < s.h * s.w)[None, :]
    base = x.a + n.to(tl.int64) * (s.c * s.h * s.w)
    values = tl.load(base + (c[:, None] * (s.h * s.w) + p[None, :]), mask=lanes, other=0).to(tl.float32)
    tl.store(x.gate + (n.to(tl.int64) * s.parts + part) * s.c + c, tl.sum(values, axis=1), mask=c < s.c)


@triton.jit
def lead(x, s, unit, BN: tl.constexpr, ALIGN: tl.constexpr, PLANAR: tl.constexpr):
    """A unit of an operation's gate work: parts vary fastest, then channel tiles and pictures."""
    part = unit % s.parts
    i_flag = unit // s.parts
    if PLANAR:
        picture_part(x, s, i_flag, part)
    else:
        gate_part(x, s, i_flag // (s.groups * s.columns), i_flag % (s.groups * s.columns), part, BN, ALIGN)
    tl.debug_barrier()  # the release below orders one thread's stores: all threads must have made theirs before it
    tl.atomic_add(x.flags + i_flag, PART_DONE, sem="release", scope="gpu")


@triton.jit
def flag_of(x, s, n, i_o, PLANAR: tl.constexpr):
    """Where leaders say how many parts are there of what channel tile i_o of picture n needs."""
    return x.flags + (n if PLANAR else n * (s.groups * s.columns) + i_o)


@triton.jit
def leave(x, s, n, i_o, PLANAR: tl.constexpr):
    """Whoever leaves last, of all that needed the same parts, sets their flag back for the next launch."""
    readers = s.tiles * s.columns if PLANAR else s.tiles
    flag = flag_of(x, s, n, i_o, PLANAR)
    if tl.atomic_add(flag, 1, sem="relaxed", scope="gpu") == s.parts * PART_DONE + readers - 1:
        tl.store(flag, 0)


@triton.jit
def gates(x, s, n, i_o, o, computed, ALIGN: tl.constexpr, PLANAR: tl.constexpr):
    """Gates fp32 [BN] of output channels `computed`, those of channel tile i_o, once their parts are there."""
    mask_o = o < s.group
    value = tl.load(x.gate_bias + computed, mask=mask_o, other=0.0)
    while tl.atomic_add(flag_of(x, s, n, i_o, PLANAR), 0, sem="acquire", scope="gpu") < s.parts * PART_DONE:
        pass
    if PLANAR:
        c = tl.arange(0, CHANNELS)
        average = feature_average(x.gate, n, c, c < s.c, s.c, s.parts, s.h * s.w)
        lanes = (c < s.c)[:, None] & mask_o[None, :]
        weight = tl.load(x.gate_weight + (c[:, None] * s.o_room + computed[None, :]), mask=lanes, other=0.0)
        value += tl.sum(weight.to(tl.float32) * average[:, None], axis=0)
    else:
        room = s.o_room // 8 * 8
        base = x.gate + n.to(tl.int64) * (s.parts * room)
        for first in range(0, s.parts, PARTS):
            part = first + tl.arange(0, PARTS)
            lanes = (part < s.parts)[:, None] & (o < (s.group + ALIGN - 1) // ALIGN * ALIGN)[None, :]
            made = tl.load(
                base + (part[:, None] * room + computed[None, :]), mask=lanes, other=0.0, cache_modifier=".cg"
            )
            value += tl.sum(made, axis=0)
    return tl.sigmoid(value)
