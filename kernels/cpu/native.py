"""The CPU kernels of native.c: their structs, and weights as they read them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import objects

IMPORT, GATE, DIRECT, WINOGRAD, CLASSIFIER = range(5)
SLACK = 64  # floats behind what vectors read: the last one reaches over the end
POINTER, INT = ctypes.c_void_p, ctypes.c_int32

Panels = Sequence[tuple[int, int, int]]


class Panel(ctypes.Structure):
    """Stored output channels that are computed together, from the inputs' parts of one group."""

    _fields_ = [(name, INT) for name in ("group", "first", "count")]


class Op(ctypes.Structure):
    """An operation, as native.c explains it."""

    _fields_ = [
        ("x", ctypes.POINTER(POINTER)), ("x_sums", ctypes.POINTER(POINTER)), ("x_chunks", ctypes.POINTER(INT)),
        ("y", POINTER), ("sums", POINTER), ("weight", POINTER), ("bias", POINTER),
        ("scale", POINTER), ("shift", POINTER), ("gate_weight", POINTER), ("gate_bias", POINTER),
        ("multiply", POINTER), ("add", POINTER), ("panels", POINTER), ("strides", ctypes.c_int64 * 4),
        ("h", INT), ("w", INT), ("c", INT), ("inputs", INT), ("cout", INT), ("groups", INT), ("stride", INT),
        ("panel_count", INT), ("chunks", INT), ("silu", INT), ("border", INT),
    ]  # fmt: skip


class Task(ctypes.Structure):
    """What a thread takes, as native.c explains it."""

    _fields_ = [(name, INT) for name in ("op", "kind", "n", "chunk", "start", "stop", "panel_start", "panel_stop")]


def library() -> ctypes.CDLL:
    """native.c, for the instruction set in use. ParNetError, saying why, where there is none."""
    return objects.load(objects.in_use())


def zeros(*shape: int) -> Tensor:
    """fp32, with SLACK behind it."""
    size = prod(shape)
    return torch.zeros(size + SLACK, dtype=torch.float32, device="cpu")[:size].view(shape)


def with_slack(tensor: Tensor) -> Tensor:
    """A copy, fp32, with SLACK behind it."""
    return zeros(*tensor.shape).copy_(tensor)


def panels(cout: int, groups: int, shuffle: int) -> Panels:
    """(group, first, count) of each panel, in the order in which channels are stored."""
    width, rest = library().panel_width(), cout // (groups * shuffle)
    return [
        (chunk % groups, chunk * rest + first, min(width, rest - first))
        for chunk in range(groups * shuffle)
        for first in range(0, rest, width)
    ]


def stored(rows: Tensor, groups: int, shuffle: int) -> Tensor:
    """Output channels, the first dimension, as they are stored: (groups, shuffle, rest) to (shuffle, groups, rest)."""
    return rows.unflatten(0, (groups, shuffle, -1)).transpose(0, 1).flatten(0, 2)


def pack_direct(weight: Tensor, inputs: int, which: Panels) -> Tensor:
    """[cout, cin / groups, 3, 3], channels as stored, to [panels, K, panel width]: K by input, tap and channel."""
    return _pack(weight.unflatten(1, (inputs, -1)).permute(0, 1, 3, 4, 2).flatten(1), which)


def pack_winograd(weight: Tensor, which: Panels) -> Tensor:
    """The same to G w G', [16, panels, cin / groups, panel width]."""
    g = _matrix([1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1])
    return _pack(torch.einsum("ia,jb,okab->ijok", g, g, weight).flatten(0, 1), which)


def _pack(rows: Tensor, which: Panels) -> Tensor:
    """[..., cout, K] to [..., panels, K, panel width]; zeros where a panel has fewer channels."""
    packed = zeros(*rows.shape[:-2], len(which), rows.shape[-1], library().panel_width())
    for i, (_, first, count) in enumerate(which):
        packed[..., i, :, :count] = rows[..., first : first + count, :].transpose(-1, -2)
    return packed


def bias_by_edge(bias: Tensor, border: Tensor) -> Tensor:
    """[cout] and [cout, 3, 3] to [16, cout]: the border's taps inside the picture added, by which of them lack.

    Rows by 4 vertical + horizontal, each 1 where the first taps lack, 2 where the last do, 3 where both.
    """
    kept = _matrix([1, 1, 1], [0, 1, 1], [1, 1, 0], [0, 1, 0])
    return bias + torch.einsum("va,hb,oab->vho", kept, kept, border).flatten(0, 1)


def _matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")
