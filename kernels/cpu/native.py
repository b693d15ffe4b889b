"""The CPU kernels of native.c: their structs, and weights as they read them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import objects, pages

IMPORT, GATE, CLASSIFIER, POOL, TRANSFORM, CONVOLVE = range(6)
DIRECT, F2, F4, S2, S4 = range(5)
ACTIVATIONS = "none", "relu", "silu"
F32, BF16, U8 = range(3)
TYPES = torch.float32, torch.bfloat16, torch.uint8  # of features; weights of U8 are signed
SLACK = 64  # values behind what vectors read: the last one reaches over the end
POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Algorithm(NamedTuple):
    """One of native.c's, along one side.

    tiles: pixels that a tile makes, at most, and its points, the largest tile first; the last is for what is left.
    taps: the rows of its G, each of which makes weights of three taps; of a direct convolution each tap as it is.
    """

    tiles: tuple[tuple[int, int], ...]
    taps: tuple[list[float], ...]

    @property
    def weights(self) -> int:
        """For each channel of input and output."""
        return len(self.taps) ** 2

    def sides(self, size: int) -> tuple[int, int]:
        """Tiles and points along a side of so many pixels."""
        (outs, points), (least, fewer) = self.tiles[0], self.tiles[-1]
        count, left = -(-size // outs), size % outs
        return count, count * points - (points - fewer if 0 < left <= least else 0)


ALGORITHMS = {
    DIRECT: Algorithm(((1, 3),), ([1, 0, 0], [0, 1, 0], [0, 0, 1])),
    F2: Algorithm(((2, 4),), ([1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1])),
    F4: Algorithm(  # at 0, 1, -1, 2, -2 and infinity
        ((4, 6), (2, 4)),
        (
            [1 / 4, 0, 0],
            [-1 / 6, -1 / 6, -1 / 6],
            [-1 / 6, 1 / 6, -1 / 6],
            [1 / 24, 1 / 12, 1 / 6],
            [1 / 24, -1 / 12, 1 / 6],
            [0, 0, 1],
        ),
    ),
    S2: Algorithm(((2, 5),), ([1, 0, 0], [1, 0, 1], [0, 0, 1], [0, 1, 0])),
    S4: Algorithm(  # the outer taps at 0, 1, -1, 2 and infinity, and the middle one
        ((4, 9), (2, 5)),
        ([1 / 2, 0, 0], [-1 / 2, 0, -1 / 2], [-1 / 6, 0, 1 / 6], [1 / 6, 0, 1 / 3], [0, 0, 1], [0, 1, 0]),
    ),
}
Panels = Sequence[tuple[int, int, int]]


class Panel(ctypes.Structure):
    """Stored output channels that are computed together, from the inputs' parts of one group."""

    _fields_ = [(name, INT) for name in ("group", "first", "count")]


class Op(ctypes.Structure):
    """An operation, as native.c explains it."""

    _fields_ = [
        ("x", ctypes.POINTER(POINTER)), ("x_sums", ctypes.POINTER(POINTER)), ("x_chunks", ctypes.POINTER(INT)),
        ("x_step", ctypes.POINTER(FLOAT)), ("x_zero", ctypes.POINTER(FLOAT)),
        ("y", POINTER), ("copy", POINTER), ("sums", POINTER), ("residual", POINTER), ("weight", POINTER),
        ("bias", POINTER), ("scale", POINTER), ("shift", POINTER), ("gate_weight", POINTER), ("gate_bias", POINTER),
        ("weight_step", POINTER), ("weight_zero", POINTER), ("multiply", POINTER), ("add", POINTER),
        ("panels", POINTER), ("rows", POINTER), ("rows_size", ctypes.c_int64),
        ("strides", ctypes.c_int64 * 4), ("step", FLOAT), ("zero", FLOAT), ("per_step", FLOAT),
        ("x_type", INT), ("y_type", INT), ("h", INT), ("w", INT), ("c", INT), ("inputs", INT), ("cout", INT),
        ("groups", INT), ("stride", INT), ("panel_count", INT), ("chunks", INT), ("kernel", INT), ("activation", INT),
        ("how", INT), ("transforms", INT), ("counts", INT), ("edge", INT),
        ("border", INT),
    ]  # fmt: skip


class Task(ctypes.Structure):
    """What a thread takes, as native.c explains it."""

    _fields_ = [(name, INT) for name in ("op", "kind", "n", "chunk", "start", "stop", "panel_start", "panel_stop")]


def library() -> ctypes.CDLL:
    """native.c, for the instruction set in use. ParNetError, saying why, where there is none."""
    return objects.load(objects.in_use())


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """With SLACK behind it."""
    size = prod(shape)
    return pages.zeros((size + SLACK) * dtype.itemsize).view(dtype)[:size].view(shape)


def with_slack(tensor: Tensor) -> Tensor:
    """A copy, with SLACK behind it."""
    return zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def panels(cout: int, groups: int, shuffle: int) -> Panels:
    """(group, first, count) of each panel, a group after the other; first: of the channels as they are stored."""
    width, rest = library().panel_width(), cout // (groups * shuffle)
    return [
        (group, (chunk * groups + group) * rest + first, min(width, rest - first))
        for group in range(groups)
        for chunk in range(shuffle)
        for first in range(0, rest, width)
    ]


def stored(rows: Tensor, groups: int, shuffle: int) -> Tensor:
    """Output channels, the first dimension, as they are stored: (groups, shuffle, rest) to (shuffle, groups, rest)."""
    return rows.unflatten(0, (groups, shuffle, -1)).transpose(0, 1).flatten(0, 2)


def pack_direct(weight: Tensor, inputs: int, which: Panels) -> Tensor:
    """[cout, cin / groups, k, k], channels as stored, to [panels, K, panel width, values of a word]: K in words, by
    runs of what lies side by side in the inputs: a row of taps where there is one input in one group, else a tap."""
    rows = weight.unflatten(1, (inputs, -1)).permute(0, 1, 3, 4, 2)
    merged = inputs == 1 and all(group == 0 for group, _, _ in which)
    k = weight.shape[-1]
    return _pack(rows.reshape(len(rows), k if merged else k * k * inputs, -1), which)


def pack_winograd(weight: Tensor, how: int, dtype: torch.dtype, which: Panels) -> Tensor:
    """The same to G w G' in `dtype`: [panels, planes, K, panel width, values of a word], K by channel. dtype: that of
    the inputs; for 8 bits the weights are integers of 16, from multiples of G's rows."""
    g = torch.tensor(ALGORITHMS[how].taps, dtype=torch.float64, device="cpu")
    if dtype == torch.uint8:
        g, dtype = (g / g.abs().where(g != 0, torch.inf).amin(1, keepdim=True)).round(), torch.int16
    planes = torch.einsum("ia,jb,okab->ijok", g, g, weight.double()).to(dtype)
    return with_slack(_pack(planes.flatten(0, 1).unsqueeze(-2), which).transpose(0, 1))


def _pack(rows: Tensor, which: Panels) -> Tensor:
    """[..., cout, runs, length] to [..., panels, K, panel width, values of a word], a run after the other.

    Zeros where a run fills no word, and where a panel has fewer channels.
    """
    values = 4 // rows.itemsize
    words = F.pad(rows, (0, -rows.shape[-1] % values)).unflatten(-1, (-1, values)).flatten(-3, -2)
    packed = zeros(*rows.shape[:-3], len(which), words.shape[-2], library().panel_width(), values, dtype=rows.dtype)
    for i, (_, first, count) in enumerate(which):
        packed[..., i, :, :count, :] = words[..., first : first + count, :, :].transpose(-3, -2)
    return packed


def bias_by_edge(bias: Tensor, border: Tensor) -> Tensor:
    """[cout] and [cout, k, k] to [ways * ways, cout]: the border's taps inside the picture added, by which ones lack.

    Rows by ways * vertical + horizontal: each of the first taps that lack, 0 to k // 2, plus k // 2 + 1 times the last
    ones that do; so a side has (k // 2 + 1) ** 2 ways.
    """
    k = border.shape[-1]
    lacking = [(first, last) for last in range(k // 2 + 1) for first in range(k // 2 + 1)]
    kept = torch.zeros(len(lacking), k, dtype=torch.float32, device="cpu")
    for row, (first, last) in zip(kept, lacking, strict=True):
        row[first : k - last] = 1
    return bias + torch.einsum("va,hb,oab->vho", kept, kept, border).flatten(0, 1)
