"""Skip-squeeze-excitation's gate, sigmoid(gate_weight avg(x) + gate_bias), from the channel sums of x.

Source: "Non-deep Networks" (arXiv 2110.07641), section 3.1. Batch norms before the average are folded into weight and
bias (program/fold.py), so that whoever produced x only has to emit its sums.

The first programs of a launch, its leaders, multiply parts of the averages with the gates' weights, and whoever makes
the last part of a gate adds them up, while the others convolve. Who finishes a tile waits for the gates of its
channels. No leader waits, and programs start in the order of their numbers, so nobody waits for a program that cannot
start.

Flags are never set back, which would take each program a round trip at its end: they count the launches that made the
gates, and every tile counts those that it has been through. Both wrap around together.

In all of them x is an operation's `Operands`, s its `Numbers`, m its `Form`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .geometry import COLOURS, GATE_PART, PICTURE_PART

PART = tl.constexpr(GATE_PART)
PIXELS = tl.constexpr(PICTURE_PART)
CHANNELS = tl.constexpr(COLOURS)
PARTS = tl.constexpr(32)  # parts of gates that a program holds at once
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# two instructions for what takes fifteen where infinities and subnormal numbers are cared for; what a gate or SiLU
# makes of those is the same
SIGMOID = tl.constexpr(
    "{ .reg .f32 t; mul.ftz.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.ftz.f32 t, t, 0f3F800000;"
    " rcp.approx.ftz.f32 $0, t; }"
)


@triton.jit
def sigmoid(x):
    """fp32, within a few units in the last place."""
    if INTERPRETED:
        y = tl.sigmoid(x)
    else:
        y = tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def feature_average(sums, n, c, mask, padded, tiles, pixels, ROWS: tl.constexpr):
    """Averages fp32 of channels c [BC] of picture n, from sums fp32 [N, tiles, padded], always added in one order."""
    base = sums + n.to(tl.int64) * (tiles * padded)
    total = tl.zeros(c.shape, dtype=tl.float32)
    for t0 in range(0, tiles, ROWS):
        t = t0 + tl.arange(0, ROWS)
        lanes = (t < tiles)[:, None] & mask[None, :]
        total += tl.sum(tl.load(base + (t[:, None] * padded + c[None, :]), mask=lanes, other=0.0), axis=0)
    return total / pixels


@triton.jit
def gate_part(x, s, m, n, i_o, part):
    """Store gate_weight avg(x) fp32 [BN] for the outputs of channel tile i_o, over the channels of a part."""
    i_group = i_o // s.columns
    i_input = part // (s.parts // s.inputs)
    c = part % (s.parts // s.inputs) * PART + tl.arange(0, PART)
    o = i_o % s.columns * m.bn + tl.arange(0, m.bn)
    computed = i_group * (s.group // m.align * m.align) + o
    mask_o = o < (s.group + m.align - 1) // m.align * m.align  # as many as are one copy; behind the last are zeros
    rows = (i_input * s.part + c)[:, None] * s.cout_padded
    lanes = (c < s.part)[:, None] & mask_o[None, :]
    weight = tl.load(x.gate_weight + (rows + computed[None, :]), mask=lanes, other=0.0)
    source = tl.where(i_input == 0, x.a_sums, x.b_sums)
    tiles = tl.where(i_input == 0, s.a_tiles, s.b_tiles)
    channel = i_group * (s.part // m.align * m.align) + c
    mask_c = c < s.part_padded
    average = feature_average(source, n, channel, mask_c, s.c_padded, tiles, s.h * s.w, m.rows)
    value = tl.sum(weight.to(tl.float32) * average[:, None], axis=0)
    tl.store(x.products + (n.to(tl.int64) * s.parts + part) * s.cout_padded + computed, value, mask=mask_o)


@triton.jit
def gates_of_parts(x, s, m, n, i_o):
    """Store the gates of channel tile i_o, whose products are there."""
    o = i_o % s.columns * m.bn + tl.arange(0, m.bn)
    computed = i_o // s.columns * (s.group // m.align * m.align) + o
    base = x.products + n.to(tl.int64) * (s.parts * s.cout_padded)
    value = tl.load(x.gate_bias + computed, mask=o < s.group, other=0.0)
    for first in range(0, s.parts, PARTS):
        part = first + tl.arange(0, PARTS)
        lanes = (part < s.parts)[:, None] & (o < (s.group + m.align - 1) // m.align * m.align)[None, :]
        made = tl.load(
            base + (part[:, None] * s.cout_padded + computed[None, :]), mask=lanes, other=0.0, cache_modifier=".cg"
        )
        value += tl.sum(made, axis=0)
    tl.store(x.gate + n.to(tl.int64) * s.cout_padded + computed, sigmoid(value), mask=o < s.group)


@triton.jit
def lead(x, s, m, unit):
    """A unit of an operation's gate work: parts vary fastest, then channel tiles and pictures."""
    part = unit % s.parts
    i_flag = unit // s.parts
    if m.planar:
        picture_part(x, s, i_flag, part)
        tl.debug_barrier()  # a release orders one thread's stores: all threads must have made theirs before it
        tl.atomic_add(x.flags + i_flag, 1, sem="release", scope="gpu")
    else:
        n = i_flag // (s.groups * s.columns)
        i_o = i_flag % (s.groups * s.columns)
        gate_part(x, s, m, n, i_o, part)
        tl.debug_barrier()
        if tl.atomic_add(x.arrived + i_flag, 1, sem="acq_rel", scope="gpu") == s.parts - 1:
            tl.store(x.arrived + i_flag, 0)
            gates_of_parts(x, s, m, n, i_o)
            tl.debug_barrier()
            tl.atomic_add(x.flags + i_flag, 1, sem="release", scope="gpu")


@triton.jit
def picture_part(x, s, n, part):
    """Store the sums fp32 [C] of a part of a picture [N, C, H, W], for which nobody else has made them."""
    c = tl.arange(0, CHANNELS)
    p = part * PIXELS + tl.arange(0, PIXELS)
    lanes = (c < s.c)[:, None] & (p < s.h * s.w)[None, :]
    base = x.a + n.to(tl.int64) * (s.c * s.h * s.w)
    values = tl.load(base + (c[:, None] * (s.h * s.w) + p[None, :]), mask=lanes, other=0).to(tl.float32)
    tl.store(x.products + (n.to(tl.int64) * s.parts + part) * s.c + c, tl.sum(values, axis=1), mask=c < s.c)


@triton.jit
def gates(x, s, m, n, i_o, computed, mask_o, launch):
    """Gates fp32 [BN] of output channels `computed`, of channel tile i_o, in the launch of this number; those of a
    picture, which has few channels, are made here from its sums."""
    if m.planar:
        while tl.atomic_add(x.flags + n, 0, sem="acquire", scope="gpu") - launch * s.parts < 0:
            pass
        c = tl.arange(0, CHANNELS)
        average = feature_average(x.products, n, c, c < s.c, s.c, s.parts, s.h * s.w, m.rows)
        lanes = (c < s.c)[:, None] & mask_o[None, :]
        weight = tl.load(x.gate_weight + (c[:, None] * s.cout_padded + computed[None, :]), mask=lanes, other=0.0)
        value = tl.load(x.gate_bias + computed, mask=mask_o, other=0.0)
        gate = sigmoid(value + tl.sum(weight.to(tl.float32) * average[:, None], axis=0))
    else:
        flag = x.flags + (n * (s.groups * s.columns) + i_o)
        while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") - launch < 0:
            pass
        base = x.gate + n.to(tl.int64) * s.cout_padded
        gate = tl.load(base + computed, mask=mask_o, other=0.0, cache_modifier=".cg")
    return gate
