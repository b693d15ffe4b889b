"""The head in one small launch: logits = weight avg(x) + bias, the averages from the last convolutions' sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, float32

from .arguments import MOST_ROWS, known
from .convolution import STORAGE, check_tensors
from .geometry import padded_channels, power_of_two
from .launch import Launch
from .sse_gate import feature_average

LOGITS = 8  # of a program, which spread a thousand classes over 125 multiprocessors


class Averaged(NamedTuple):
    """A feature that a classifier reads: sums fp32 [N, T, padded channels], and how many channels and pixels it has."""

    sums: Tensor
    channels: int
    pixels: int


class Columns(NamedTuple):
    """The numbers of one feature. first: its first column of the weights. c_padded, tiles: padded channels, and T, of
    its sums."""

    first: int
    channels: int
    c_padded: int
    tiles: int
    pixels: int


@triton.jit
def classifier_kernel(
    sums, weight, bias, logits, columns, C: tl.constexpr, CLASSES: tl.constexpr, COUNT: tl.constexpr,
    BO: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (i_o, n): BO logits of picture n. sums, columns: of COUNT features; C: of all. See `classifier`."""
    n = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    mask_o = o < CLASSES
    total = tl.load(bias + o, mask=mask_o, other=0.0)
    for i in tl.static_range(COUNT):
        s = columns[i]
        for c0 in range(0, s.channels, BC):
            c = c0 + tl.arange(0, BC)
            mask_c = c < s.channels
            average = feature_average(sums[i], n, c, mask_c, s.c_padded, s.tiles, s.pixels, ROWS)
            lanes = mask_o[:, None] & mask_c[None, :]
            rows = tl.load(weight + (o[:, None] * C + (c + s.first)[None, :]), mask=lanes, other=0.0)
            total += tl.sum(rows.to(tl.float32) * average[None, :], axis=1)
    tl.store(logits + n.to(tl.int64) * CLASSES + o, total, mask=mask_o)


def classifier(features: Sequence[Averaged], weight: Tensor, bias: Tensor, logits: Tensor) -> Launch:
    """weight storage [classes, channels of all features, one after the other], bias fp32 [classes], logits fp32
    [N, classes].
    """
    (n, classes), c = logits.shape, sum(feature.channels for feature in features)
    layouts = {
        "weight": ((classes, c), weight.dtype if weight.dtype in STORAGE else float32),
        "bias": ((classes,), float32),
        "logits": ((n, classes), float32),
    }
    check_tensors({"weight": weight, "bias": bias, "logits": logits}, layouts, bias.device)
    columns, first = [], 0
    for sums, channels, pixels in features:
        check_tensors({"sums": sums}, {"sums": ((n, sums.shape[1], padded_channels(channels)), float32)}, bias.device)
        columns.append(known(Columns(first, channels, padded_channels(channels), sums.shape[1], pixels)))
        first += channels
    bc = min(1024, power_of_two(max(feature.channels for feature in features)))
    rows = min(MOST_ROWS, power_of_two(max(feature.sums.shape[1] for feature in features)))
    given = tuple(feature.sums for feature in features)
    arguments = (given, weight, bias, logits, tuple(columns), c, classes, len(columns), LOGITS, bc, rows)
    return Launch("classifier", classifier_kernel, arguments, (-(-classes // LOGITS), n), num_warps=4, num_stages=1)
