"""Skip-squeeze-excitation's gate, sigmoid(gate_weight avg(x) + gate_bias), from the channel sums of x.

Source: "Non-deep Networks" (arXiv 2110.07641), section 3.1. Batch norms before the average are folded into weight and
bias (program/fold.py), so that whoever produced x only has to emit its sums. Every program of a convolution
computes the gates of its own output channels; `sse_gate_kernel` computes all of them in a launch of its own, for
comparison.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .constants import constants
from .convolution import Convolution, check_tensors
from .launch import Launch


@triton.jit
def feature_average(sums, n, c, mask, C: tl.constexpr, T: tl.constexpr, PIXELS: tl.constexpr, BT: tl.constexpr):
    """Averages fp32 of channels c [BC] of picture n, from sums fp32 [N, T, C], always added in the same order."""
    base = sums + n.to(tl.int64) * (T * C)
    total = tl.zeros(c.shape, dtype=tl.float32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        lanes = (t < T)[:, None] & mask[None, :]
        total += tl.sum(tl.load(base + (t[:, None] * C + c[None, :]), mask=lanes, other=0.0), axis=0)
    return total / PIXELS


@triton.jit
def picture_average(picture, n, c, mask, C: tl.constexpr, PIXELS: tl.constexpr, BP: tl.constexpr):
    """Averages fp32 of channels c [BC] of picture n, [N, C, H, W], for which nobody has made sums.

    Every program reads the whole picture, 0.3 MB at 224 x 224 in half precision, mostly from the L2 cache: 98 programs
    of 128 pixels read 30 MB. That saves the launch that a kernel for the sums would be; large tiles make it cheaper.
    The loads are pipelined, since each would else wait for the last.
    """
    base = picture + n.to(tl.int64) * (C * PIXELS)
    total = tl.zeros([c.shape[0], BP], dtype=tl.float32)
    for p0 in tl.range(0, PIXELS, BP, num_stages=4):
        p = p0 + tl.arange(0, BP)
        lanes = mask[:, None] & (p < PIXELS)[None, :]
        total += tl.load(base + (c[:, None] * PIXELS + p[None, :]), mask=lanes, other=0).to(tl.float32)
    return tl.sum(total, axis=1) / PIXELS


@triton.jit
def gate_products(x, s, n, i_group, i_split, o, mask_o, BO: tl.constexpr, SPLIT_K: tl.constexpr):
    """gate_weight avg(x) fp32 [BO] for outputs o of a group, over every SPLIT_K-th block of input channels.

    x is an `Operands`, s a `Constants`. The splits of a convolution share this work as they share K. Two pipeline
    stages overlap one block's loads with the last one's additions, in shared memory that the products need anyway.
    """
    columns = i_group * (s.COUT // s.GROUPS) + o
    gate = tl.zeros((BO,), dtype=tl.float32)
    for i_input in tl.static_range(s.INPUTS):
        for c0 in tl.range(i_split * s.BC, s.PART, SPLIT_K * s.BC, num_stages=2):
            c = c0 + tl.arange(0, s.BC)
            mask_c = c < s.PART
            rows = i_input * s.PART + c
            lanes = mask_c[:, None] & mask_o[None, :]
            weight = tl.load(x.gate_weight + (rows[:, None] * s.COUT + columns[None, :]), mask=lanes, other=0.0)
            channel = i_group * s.PART + c
            if s.PLANAR:
                average = picture_average(x.a, n, channel, mask_c, s.C, s.H * s.W, s.BP)
            elif i_input == 0:
                average = feature_average(x.a_sums, n, channel, mask_c, s.C, s.A_TILES, s.H * s.W, s.A_BT)
            else:
                average = feature_average(x.b_sums, n, channel, mask_c, s.C, s.B_TILES, s.H * s.W, s.B_BT)
            gate += tl.sum(weight.to(tl.float32) * average[:, None], axis=0)
    return gate


@triton.jit
def sse_gate_kernel(x, s, gate, BO: tl.constexpr):
    """gate fp32 [N, O]; program (i_o, n) computes BO outputs of one group for one picture."""
    O_GROUP: tl.constexpr = s.COUT // s.GROUPS
    O_TILES: tl.constexpr = (O_GROUP + BO - 1) // BO
    i_group = tl.program_id(0) // O_TILES
    n = tl.program_id(1)
    o = tl.program_id(0) % O_TILES * BO + tl.arange(0, BO)
    mask_o = o < O_GROUP
    columns = i_group * O_GROUP + o
    value = gate_products(x, s, n, i_group, 0, o, mask_o, BO, 1)
    value += tl.load(x.gate_bias + columns, mask=mask_o, other=0.0)
    tl.store(gate + n.to(tl.int64) * s.COUT + columns, tl.sigmoid(value), mask=mask_o)


def sse_gate(conv: Convolution, gate: Tensor, bo: int = 64, num_warps: int = 4) -> Launch:
    """The launch that fills gate fp32 [N, O] for a convolution, which may then take it as its operand `gate`."""
    conv.check()
    s = conv.shape
    check_tensors({"gate": gate}, {"gate": ((conv.n, s.cout), torch.float32)}, conv.x.a.device)
    grid = (s.groups * -(-(s.cout // s.groups) // bo), conv.n)
    return Launch("sse_gate", sse_gate_kernel, (conv.x, constants(conv), gate, bo), grid, num_warps, num_stages=1)
