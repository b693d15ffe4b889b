"""One tile of a fused convolution: implicit GEMM, gate, activation and channel sums in one pass.

    y = act(conv(x) + bias + border + (scale x + shift) gate)      gate "identity"
    y = act((conv(x) + bias + border) 2 gate)                      gate "plain"
    y = act(conv(x) + bias + border + residual)                    gate "none"

A row of the GEMM is an output pixel, a column an output channel, and its depth K runs over taps and input channels.
Source: "Non-deep Networks" (arXiv 2110.07641), section 3.1; the folding is in program/fold.py.

In all functions x is an operation's `Operands`, s its `Numbers`, m its `Form`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sse_gate import INTERPRETED, gates, sigmoid

ROUND = tl.constexpr(
    "{ .reg .b16 two; .reg .b32 halves; .reg .f16 low, high; cvt.rn.satfinite.e4m3x2.f32 two, 0f00000000, $1;"
    " cvt.rn.f16x2.e4m3x2 halves, two; mov.b32 {low, high}, halves; cvt.f32.f16 $0, low; }"
)


@triton.jit
def as_e4m3(x):
    """fp32, rounded to what e4m3 holds. By itself: where ptxas of CUDA 12.8 packs what is stored into larger words, it
    converts back from registers that nothing was packed into yet, and sums were wrong, on an H200.
    """
    if INTERPRETED:
        y = x.to(tl.float8e4nv).to(tl.float32)
    else:
        y = tl.inline_asm_elementwise(ROUND, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def near(rows, columns, tap, m):
    """bool: whether a tap lies inside the picture, where rows and columns are `offsets_inside`."""
    return ((rows >> (tap // m.kernel)) & (columns >> (tap % m.kernel)) & 1) != 0


@triton.jit
def offsets_inside(position, size, m):
    """int32, a bit for each tap along a side: which of the positions around `position`, in order, lie inside `size`."""
    half: tl.constexpr = m.kernel // 2
    bits = tl.full(position.shape, 1, tl.int32) << half
    for away in tl.static_range(1, half + 1):
        bits |= (position >= away).to(tl.int32) << (half - away)
        bits |= (position + away < size).to(tl.int32) << (half + away)
    return bits


@triton.jit
def multiply(acc, x, s, m, n, i_o, i_group, i_split, pixel, rows, columns, mask_o):
    """Add the products over this split's part of K, to acc fp32 [BM, BN], one input after the other.

    A step is one tap of BK channels; as many steps in a row as there are taps read the surroundings of the same pixels.
    What a block of weights holds beyond the operation's channels is zero, and not read. In fp8 a Hopper's tensor cores
    keep some 14 bits of a sum: they add up one step alone, and the steps are added in fp32.
    """
    lane = tl.arange(0, m.bk)
    cells = pixel[:, None] * s.c_padded + lane[None, :]
    in_fp8: tl.constexpr = x.weight.dtype.element_ty == tl.float8e4nv
    if in_fp8:
        block = lane[:, None] + tl.arange(0, m.bn)[None, :] * m.bk
    else:
        block = lane[:, None] * m.bn + tl.arange(0, m.bn)[None, :]
    for i_input in range(s.inputs):
        source = tl.where(i_input == 0, x.a, x.b)
        source += n.to(tl.int64) * (s.h * s.w * s.c_padded) + i_group * (s.part // m.align * m.align)
        weight = x.weight + (i_o * s.inputs + i_input).to(tl.int64) * (s.steps * (m.bk * m.bn))
        for step in tl.range(i_split * s.steps // s.split_k, (i_split + 1) * s.steps // s.split_k):
            tap = step % (m.kernel * m.kernel)
            c0 = step // (m.kernel * m.kernel) * m.bk
            there = lane + c0 < s.part_padded
            offset = ((tap // m.kernel - m.kernel // 2) * s.w + tap % m.kernel - m.kernel // 2) * s.c_padded + c0
            inside = near(rows, columns, tap, m)
            a = tl.load(source + offset + cells, mask=inside[:, None] & there[None, :], other=0.0)
            b = tl.load(weight + step * (m.bk * m.bn) + block, mask=there[:, None] & mask_o[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee", max_num_imprecise_acc=m.bk if in_fp8 else None)
    return acc


@triton.jit
def multiply_picture(acc, x, s, m, n, i_o, i_split, pixel, rows, columns, mask_o):
    """Products for a picture [N, C, H, W] of few channels: a step takes BK of all its taps and channels."""
    lane = tl.arange(0, m.bk)
    picture = x.a + n.to(tl.int64) * (s.h * s.w * s.c)
    weight = x.weight + i_o * (s.steps * (m.bk * m.bn))
    block = lane[:, None] * m.bn + tl.arange(0, m.bn)[None, :]
    for step in tl.range(i_split * s.steps // s.split_k, (i_split + 1) * s.steps // s.split_k):
        k = step * m.bk + lane
        tap = k // s.c
        offset = (tap // m.kernel - m.kernel // 2) * s.w + tap % m.kernel - m.kernel // 2 + k % s.c * (s.h * s.w)
        inside = near(rows[:, None], columns[:, None], tap[None, :], m)  # no row's bit stands for a tap too many
        a = tl.load(picture + (pixel[:, None] + offset[None, :]), mask=inside, other=0)
        b = tl.load(weight + step * (m.bk * m.bn) + block, mask=mask_o[None, :], other=0.0)
        if x.a.dtype.element_ty == tl.uint8:  # 0 to 255 are exact in every storage type
            a = a.to(tl.float32).to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def add_splits(acc, x, s, m, i_tile, i_split):
    """Split-K inside one launch: whether this program arrived last, and then the sum over all splits.

    The last program adds all partial sums in the order of the splits, so that the result does not depend on who was
    last, and sets the counter back for the next launch.
    """
    PART: tl.constexpr = m.bm * m.bn
    cells = tl.arange(0, m.bm)[:, None] * m.bn + tl.arange(0, m.bn)[None, :]
    tile = x.workspace + i_tile.to(tl.int64) * (s.split_k * PART)
    tl.store(tile + i_split * PART + cells, acc)
    tl.debug_barrier()  # the release below orders one thread's stores: all threads must have made theirs before it
    last = tl.atomic_add(x.counters + i_tile, 1, sem="acq_rel", scope="gpu") == s.split_k - 1
    if last:
        acc = tl.zeros((m.bm, m.bn), dtype=tl.float32)
        for first in range(0, s.split_k, 2):
            for split in tl.static_range(2):  # so many loads are under way at once
                there = first + split < s.split_k
                acc += tl.load(tile + (first + split) * PART + cells, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(x.counters + i_tile, 0)
    return last, acc


@triton.jit
def places(i_group, o, s, m):
    """The places in a pixel at which the channels o of a group are stored."""
    stored = (o // s.rest * s.groups + i_group) * s.rest + o % s.rest
    return tl.max_contiguous(tl.multiple_of(stored, m.align), m.align)


@triton.jit
def finish(acc, x, s, m, n, i_tile, i_m, i_o, i_group, p, rows, columns, o, ahead):
    """Bias, border, gate or residual, activation; store the tile and its channel sums in the stored order of
    channels."""
    added, bias, scale, shift, weight_step, step, launch = ahead
    in_fp8: tl.constexpr = x.y.dtype.element_ty == tl.float8e4nv
    computed = i_group * (s.group // m.align * m.align) + o
    mask_p = p < s.pixels
    if x.weight.dtype.element_ty == tl.float8e4nv:
        acc *= weight_step[None, :]
    if s.bordered == 1:
        for tap in range(m.kernel * m.kernel):
            border = tl.load(x.border + tap * s.cout + computed, mask=o < s.group, other=0.0)
            acc += tl.where(near(rows, columns, tap, m)[:, None], border[None, :], 0.0)
    if m.gate != "none":
        gate = gates(x, s, m, n, i_o, computed, o < s.group, launch)
        tl.store(x.passes + i_tile, launch)
        if m.gate == "identity":
            acc += added.to(tl.float32) * (scale * gate)[None, :] + (bias + shift * gate)[None, :]
        else:
            acc = acc * (2 * gate)[None, :] + (bias * 2 * gate)[None, :]
    else:
        acc += added.to(tl.float32) + bias[None, :]
    if m.activation == "silu":
        acc *= sigmoid(acc)
    elif m.activation == "relu":
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if in_fp8:  # the conversion makes the largest number of what is larger, and keeps what is none
        acc *= (1 / step)[None, :]
    y = acc.to(x.y.dtype.element_ty)
    if m.summed:  # as the readers will read y
        if in_fp8:
            column_sums = tl.sum(tl.where(mask_p[:, None], as_e4m3(acc), 0.0), axis=0) * step
        else:
            column_sums = tl.sum(tl.where(mask_p[:, None], y.to(tl.float32), 0.0), axis=0)
    stored = places(i_group, o, s, m)
    mask_o = o < tl.where(s.groups == 1, s.cout_padded, s.group)  # behind the last channel, zeros
    pixels = x.y + n.to(tl.int64) * (s.pixels * s.cout_padded)
    tl.store(pixels + (p[:, None] * s.cout_padded + stored[None, :]), y, mask=mask_p[:, None] & mask_o[None, :])
    if m.summed:
        sums = x.sums + (n.to(tl.int64) * s.tiles + i_m) * s.cout_padded
        tl.store(sums + stored, column_sums, mask=mask_o)
    if (s.cout_padded > s.cout) & (s.groups > 1) & (i_o == 0):
        PLACES: tl.constexpr = 16 if in_fp8 else 8
        behind = s.cout + tl.arange(0, PLACES)
        lanes = mask_p[:, None] & (behind < s.cout_padded)[None, :]
        zeros = tl.zeros((m.bm, PLACES), x.y.dtype.element_ty)
        tl.store(pixels + (p[:, None] * s.cout_padded + behind[None, :]), zeros, mask=lanes)
        if m.summed:
            tl.store(sums + behind, tl.zeros((PLACES,), tl.float32), mask=behind < s.cout_padded)


@triton.jit
def read_ahead(x, s, m, n, i_tile, i_group, p, o):
    """What `finish` needs and is there already, on its way while the products are made: the residual, or the block's
    input where the gate is on the identity, storage [BM, BN]; bias, scale, shift and, in fp8, the steps of weights and
    of what is stored, fp32 [BN]; and, where there is a gate, which launch of this tile it is.
    """
    computed = i_group * (s.group // m.align * m.align) + o
    mask_o = o < s.group
    bias = tl.load(x.bias + computed, mask=mask_o, other=0.0)
    launch = i_tile
    if m.gate != "none":
        launch = tl.load(x.passes + i_tile) + 1
    weight_step, step = bias, bias
    if x.weight.dtype.element_ty == tl.float8e4nv:
        weight_step = tl.load(x.weight_step + computed, mask=mask_o, other=0.0)
    if x.y.dtype.element_ty == tl.float8e4nv:
        step = tl.load(x.step + places(i_group, o, s, m), mask=mask_o, other=1.0)
    scale, shift, added = bias, bias, tl.zeros((m.bm, m.bn), x.y.dtype.element_ty)
    if m.gate == "identity":
        scale = tl.load(x.scale + computed, mask=mask_o, other=0.0)
        shift = tl.load(x.shift + computed, mask=mask_o, other=0.0)
        if m.planar:
            lanes = (p < s.pixels)[:, None] & (o < s.c)[None, :]
            pixels = x.a + n.to(tl.int64) * (s.c * s.pixels)
            added = tl.load(pixels + (p[:, None] + o[None, :] * s.pixels), mask=lanes, other=0).to(tl.float32)
        else:
            lanes = (p < s.pixels)[:, None] & (o < s.c_padded)[None, :]
            pixels = x.a + n.to(tl.int64) * (s.pixels * s.c_padded)
            added = tl.load(pixels + (p[:, None] * s.c_padded + o[None, :]), mask=lanes, other=0.0)
    elif m.residual:
        lanes = (p < s.pixels)[:, None] & (o < tl.where(s.groups == 1, s.cout_padded, s.group))[None, :]
        pixels = x.residual + n.to(tl.int64) * (s.pixels * s.cout_padded)
        added = tl.load(pixels + (p[:, None] * s.cout_padded + computed[None, :]), mask=lanes, other=0.0)
    return added, bias, scale, shift, weight_step, step, launch


@triton.jit
def fused_conv_tile(x, s, m, pid):
    """Program `pid` of an operation: splits vary fastest, then channel tiles, spatial tiles and pictures."""
    i_split = pid % s.split_k
    i_tile = pid // s.split_k
    i_o = i_tile % (s.groups * s.columns)
    i_m = i_tile // (s.groups * s.columns) % s.tiles
    n = i_tile // (s.groups * s.columns * s.tiles)
    i_group = i_o // s.columns
    o = i_o % s.columns * m.bn + tl.arange(0, m.bn)
    p = i_m * m.bm + tl.arange(0, m.bm)
    row = p // s.wout * s.stride
    column = p % s.wout * s.stride
    pixel = row * s.w + column
    rows = tl.where(p < s.pixels, offsets_inside(row, s.h, m), 0)
    columns = offsets_inside(column, s.w, m)
    mask_o = o < (s.group + 7) // 8 * 8  # the weights' blocks have room for eight, and eight are one copy
    ahead = read_ahead(x, s, m, n, i_tile, i_group, p, o)
    acc = tl.zeros((m.bm, m.bn), dtype=tl.float32)
    if m.planar:
        acc = multiply_picture(acc, x, s, m, n, i_o, i_split, pixel, rows, columns, mask_o)
    else:
        acc = multiply(acc, x, s, m, n, i_o, i_group, i_split, pixel, rows, columns, mask_o)
    last = True
    if s.split_k > 1:
        last, acc = add_splits(acc, x, s, m, i_tile, i_split)
    if last:
        finish(acc, x, s, m, n, i_tile, i_m, i_o, i_group, p, rows, columns, o, ahead)
