"""One tile of the fused RepVGG-SSE convolution: implicit GEMM, gate, activation and channel sums in one pass.

    y = act(conv(x) + bias + border + (scale x + shift) gate)      gate "identity"
    y = act((conv(x) + bias + border) 2 gate)                      gate "plain"

A row of the GEMM is an output pixel, a column an output channel, and its depth K runs over taps and input channels.
Source: "Non-deep Networks" (arXiv 2110.07641), section 3.1; the folding is in program/fold.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sse_gate import gate_products


@triton.jit
def taps_inside(row, column, mask, H: tl.constexpr, W: tl.constexpr):
    """int32 bit sets [BM]: which of the nine taps around input pixels (row, column) lie inside the picture."""
    bits = tl.zeros(row.shape, dtype=tl.int32)
    for tap in tl.static_range(9):
        h = row + tap // 3 - 1
        w = column + tap % 3 - 1
        inside = mask & (h >= 0) & (h < H) & (w >= 0) & (w < W)
        bits |= inside.to(tl.int32) << tap
    return bits


@triton.jit
def multiply(acc, source, i_input: tl.constexpr, x, s, n, i_group, i_split, row, column, inside, o, mask_o):
    """Add the products with one input, `source`, over this split's part of K, to acc fp32 [BM, BN].

    K counts taps, then the group's channels in `source`. A step of BK may straddle taps, so that no step but the last
    is ragged; every lane knows its own tap.
    """
    K: tl.constexpr = 9 * s.PART
    STEPS: tl.constexpr = (K + s.BK - 1) // s.BK
    pixel_stride: tl.constexpr = 1 if s.PLANAR else s.C
    channel_stride: tl.constexpr = s.H * s.W if s.PLANAR else 1
    picture = source + n.to(tl.int64) * (s.H * s.W * s.C)
    pixels = (row * s.W + column) * pixel_stride
    columns = i_group * (s.COUT // s.GROUPS) + o
    for step in tl.range(i_split * STEPS // s.SPLIT_K, (i_split + 1) * STEPS // s.SPLIT_K):
        k = step * s.BK + tl.arange(0, s.BK)
        tap = k // s.PART
        c = k % s.PART
        neighbour = ((tap // 3 - 1) * s.W + tap % 3 - 1) * pixel_stride + (i_group * s.PART + c) * channel_stride
        bit = tl.where(k < K, tap, 9)  # the tenth tap is never inside: that masks a ragged last step
        lanes = ((inside[:, None] >> bit[None, :]) & 1) != 0
        a = tl.load(picture + (pixels[:, None] + neighbour[None, :]), mask=lanes, other=0)
        rows = tap * s.CIN + i_input * s.PART + c
        lanes = (k < K)[:, None] & mask_o[None, :]
        b = tl.load(x.weight + (rows[:, None] * s.COUT + columns[None, :]), mask=lanes, other=0.0)
        if source.dtype.element_ty == tl.uint8:  # 0 to 255 are exact in every storage type
            a = a.to(tl.float32).to(b.dtype)
        acc = tl.dot(a, b, acc, input_precision=s.PRECISION)
    return acc


@triton.jit
def add_splits(x, s, acc, gate, i_tile, i_split):
    """Split-K inside one launch: whether this program arrived last, and then the sums over all splits.

    The last program adds all partial sums in the order of the splits, so that the result does not depend on who was
    last, and sets the counter back for the next launch. A split's part of the workspace holds acc [BM, BN], then gate.
    """
    PART: tl.constexpr = (s.BM + 1) * s.BN
    columns = tl.arange(0, s.BN)
    cells = tl.arange(0, s.BM)[:, None] * s.BN + columns[None, :]
    tile = x.workspace + i_tile.to(tl.int64) * (s.SPLIT_K * PART)
    tl.store(tile + i_split * PART + cells, acc)
    tl.store(tile + i_split * PART + s.BM * s.BN + columns, gate)
    tl.debug_barrier()  # the release below orders one thread's stores: all threads must have made theirs before it
    last = tl.atomic_add(x.counters + i_tile, 1, sem="acq_rel", scope="gpu") == s.SPLIT_K - 1
    if last:
        acc = tl.zeros((s.BM, s.BN), dtype=tl.float32)
        gate = tl.zeros((s.BN,), dtype=tl.float32)
        for split in tl.static_range(s.SPLIT_K):  # unrolled, so that all loads are under way at once
            acc += tl.load(tile + split * PART + cells, cache_modifier=".cg")
            gate += tl.load(tile + split * PART + s.BM * s.BN + columns, cache_modifier=".cg")
        tl.store(x.counters + i_tile, 0)
    return last, acc, gate


@triton.jit
def finish(x, s, acc, gate, n, i_m, i_group, p, inside, o, mask_o):
    """Bias, border, gate, activation; store the tile and its channel sums in the stored order of channels."""
    O_GROUP: tl.constexpr = s.COUT // s.GROUPS
    REST: tl.constexpr = O_GROUP // s.SHUFFLE
    computed = i_group * O_GROUP + o
    stored = (o // REST * s.GROUPS + i_group) * REST + o % REST
    mask_p = p < s.PIXELS
    mask = mask_p[:, None] & mask_o[None, :]
    if x.gate is not None:
        gate = tl.load(x.gate + n.to(tl.int64) * s.COUT + computed, mask=mask_o, other=0.0)
    else:
        gate = tl.sigmoid(gate + tl.load(x.gate_bias + computed, mask=mask_o, other=0.0))
    acc += tl.load(x.bias + computed, mask=mask_o, other=0.0)[None, :]
    if x.border is not None:
        for tap in range(9):
            border = tl.load(x.border + tap * s.COUT + computed, mask=mask_o, other=0.0)
            acc += tl.where((((inside >> tap) & 1) != 0)[:, None], border[None, :], 0.0)
    cells = n.to(tl.int64) * (s.PIXELS * s.COUT) + (p[:, None] * s.COUT + stored[None, :])
    if s.GATE == "identity":
        identity = tl.load(x.a + cells, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(x.scale + computed, mask=mask_o, other=0.0)
        shift = tl.load(x.shift + computed, mask=mask_o, other=0.0)
        acc += identity * (scale * gate)[None, :] + (shift * gate)[None, :]
    else:
        acc *= (2 * gate)[None, :]
    if s.ACTIVATION == "silu":
        acc *= tl.sigmoid(acc)
    else:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    y = acc.to(x.y.dtype.element_ty)
    tl.store(x.y + cells, y, mask=mask)
    sums = tl.sum(tl.where(mask_p[:, None], y.to(tl.float32), 0.0), axis=0)  # of y as the readers will read it
    tl.store(x.sums + (n.to(tl.int64) * s.TILES + i_m) * s.COUT + stored, sums, mask=mask_o)


@triton.jit
def fused_conv_tile(x, s, pid):
    """Program `pid` of an operation: splits vary fastest, then channel tiles, spatial tiles and pictures.

    x is an `Operands`, s a `Constants`.
    """
    O_GROUP: tl.constexpr = s.COUT // s.GROUPS
    O_TILES: tl.constexpr = (O_GROUP + s.BN - 1) // s.BN
    i_split = pid % s.SPLIT_K
    i_tile = pid // s.SPLIT_K
    i_o = i_tile % (s.GROUPS * O_TILES)
    i_m = i_tile // (s.GROUPS * O_TILES) % s.TILES
    n = i_tile // (s.GROUPS * O_TILES * s.TILES)
    i_group = i_o // O_TILES
    o = i_o % O_TILES * s.BN + tl.arange(0, s.BN)
    mask_o = o < O_GROUP
    p = i_m * s.BM + tl.arange(0, s.BM)
    row = p // s.WOUT * s.STRIDE
    column = p % s.WOUT * s.STRIDE
    inside = taps_inside(row, column, p < s.PIXELS, s.H, s.W)
    gate = tl.zeros((s.BN,), dtype=tl.float32)
    if x.gate is None:  # before the products, while their registers are free
        gate = gate_products(x, s, n, i_group, i_split, o, mask_o, s.BN, s.SPLIT_K)
    acc = tl.zeros((s.BM, s.BN), dtype=tl.float32)
    acc = multiply(acc, x.a, 0, x, s, n, i_group, i_split, row, column, inside, o, mask_o)
    if s.INPUTS == 2:
        acc = multiply(acc, x.b, 1, x, s, n, i_group, i_split, row, column, inside, o, mask_o)
    if s.SPLIT_K == 1:
        finish(x, s, acc, gate, n, i_m, i_group, p, inside, o, mask_o)
    else:
        last, acc, gate = add_splits(x, s, acc, gate, i_tile, i_split)
        if last:
            finish(x, s, acc, gate, n, i_m, i_group, p, inside, o, mask_o)
