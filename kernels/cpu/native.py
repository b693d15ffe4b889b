"""The CPU kernels of native.c: what they are told, and weights as they read them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import objects, pages
from .shared import NUMBERS, STRUCTS

# kinds of tasks
IMPORT, GATE, CLASSIFIER = NUMBERS["IMPORT"], NUMBERS["GATE"], NUMBERS["CLASSIFIER"]
POOL, TRANSFORM, CONVOLVE = NUMBERS["POOL"], NUMBERS["TRANSFORM"], NUMBERS["CONVOLVE"]
# algorithms
DIRECT, F2, F4 = NUMBERS["DIRECT"], NUMBERS["F2"], NUMBERS["F4"]
S2, S4 = NUMBERS["S2"], NUMBERS["S4"]
ACTIVATIONS = {"none": NUMBERS["NONE"], "relu": NUMBERS["RELU"], "silu": NUMBERS["SILU"]}
# of features; the weights of uint8 are signed
TYPES = {torch.float32: NUMBERS["F32"], torch.bfloat16: NUMBERS["BF16"], torch.uint8: NUMBERS["U8"]}
FEATURE_KERNEL, PICTURE_KERNEL = NUMBERS["FEATURE_KERNEL"], NUMBERS["PICTURE_KERNEL"]
EDGE = FEATURE_KERNEL // 2  # zeros around a feature
LINE = 64  # bytes, of a line of the cache, and of a row of AMX's tiles
SLACK = 64  # values behind what vectors read: the last one reaches over the end


class Algorithm(NamedTuple):
    """One of native.c's algorithms of 3x3 convolutions, along one side of a feature.

    tiles: the pixels that a tile makes, at most, and its points, the largest tile first; the last is for what is left.
    taps: the rows of Winograd's matrix G, each of which makes one transformed weight of a kernel's three taps; of the
    direct algorithm, those that leave each tap as it is.
    """

    tiles: tuple[tuple[int, int], ...]
    taps: tuple[list[float], ...]

    @property
    def weights(self) -> int:
        """How many weights it reads for each pair of an input channel and an output channel."""
        return len(self.taps) ** 2

    def sides(self, size: int) -> tuple[int, int]:
        """How many tiles cover a side of `size` pixels, and how many points they have together."""
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


class Panel(ctypes.Structure):
    """Output channels, in stored order, that are computed together from one group's part of the inputs."""

    __slots__ = ()  # so that a name that is no field's is refused
    _fields_ = STRUCTS["Panel"]._fields_


class Op(ctypes.Structure):
    """An operation; shared.h explains its fields."""

    __slots__ = ()
    _fields_ = STRUCTS["Op"]._fields_


class Task(ctypes.Structure):
    """A part of an operation, which one thread computes; shared.h explains its fields."""

    __slots__ = ()
    _fields_ = STRUCTS["Task"]._fields_


class Pass(ctypes.Structure):
    """All that `run` needs to know; shared.h explains its fields."""

    __slots__ = ()
    _fields_ = STRUCTS["Pass"]._fields_


def library() -> ctypes.CDLL:
    """The compiled kernels, for the instruction set in use. ParNetError, saying why, where there are none."""
    return objects.load(objects.in_use())


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros in a tensor of this shape, and SLACK more behind it. MemoryError where so much memory cannot be had."""
    size = prod(shape)
    return pages.zeros((size + SLACK) * dtype.itemsize).view(dtype)[:size].view(shape)


def with_slack(tensor: Tensor) -> Tensor:
    """A copy of a tensor with SLACK zeros behind it."""
    return zeros(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def pitch_of(channels: int, dtype: torch.dtype) -> int:
    """How many values stand between one pixel of a feature and the next. Where tiles load a line of each pixel, that
    begins where one of the cache does, or half of one: what is more to multiply costs more than lines in two parts."""
    side = LINE // 2 // dtype.itemsize if _tiled(dtype) else 1
    return -(-channels // side) * side


def _tiled(dtype: torch.dtype) -> bool:
    """Whether AMX's tiles multiply this type."""
    return dtype != torch.float32 and bool(library().has_tiles())


def panels_of(cout: int, groups: int, shuffle: int) -> list[Panel]:
    """The panels of `cout` output channels, group after group; none holds channels of two chunks of the shuffle."""
    width, rest = library().panel_width(), cout // (groups * shuffle)
    return [
        Panel(group=group, first=(chunk * groups + group) * rest + first, count=min(width, rest - first))
        for group in range(groups)
        for chunk in range(shuffle)
        for first in range(0, rest, width)
    ]


def in_stored_order(rows: Tensor, groups: int, shuffle: int) -> Tensor:
    """The output channels of `rows`, its first dimension, in the order in which features store them: (groups, shuffle,
    rest) becomes (shuffle, groups, rest)."""
    return rows.unflatten(0, (groups, shuffle, -1)).transpose(0, 1).flatten(0, 2)


def pack_direct(weight: Tensor, inputs: int, panels: Sequence[Panel], pitch: int) -> Tensor:
    """Weights [cout, cin / groups, k, k], cout in stored order, as [panels, K, panel width, values of a word], where K
    counts words, run after run. A run is what lies side by side in an input: a row of taps where there is one input in
    one group, otherwise a tap. pitch: of the inputs. Tiles take whole lines of a run."""
    rows = weight.unflatten(1, (inputs, -1)).permute(0, 1, 3, 4, 2)
    merged = inputs == 1 and all(panel.group == 0 for panel in panels)
    k = weight.shape[-1]
    if merged:
        rows = F.pad(rows, (0, pitch - rows.shape[-1]))
    rows = rows.reshape(len(rows), k if merged else k * k * inputs, -1)
    return _pack(_by_lines(rows) if _tiled(weight.dtype) else rows, panels)


def _by_lines(rows: Tensor) -> Tensor:
    """Rows [..., length] as [..., whole lines]. A tile's last line of a run ends where that does, so what it has in
    common with the line before gets zeros; a run shorter than a line has them behind it."""
    values, word = LINE // rows.itemsize, 4 // rows.itemsize
    rows = F.pad(rows, (0, -rows.shape[-1] % word))
    rest = rows.shape[-1] % values if rows.shape[-1] > values else 0
    whole, last = rows.split([rows.shape[-1] - rest, rest], -1)
    return torch.cat([F.pad(whole, (0, -whole.shape[-1] % values)), F.pad(last, (-rest % values, 0))], -1)


def pack_winograd(weight: Tensor, algorithm: int, dtype: torch.dtype, panels: Sequence[Panel]) -> Tensor:
    """Weights w [cout, cin / groups, 3, 3], cout in stored order, transformed to G w G', as [panels, planes, K, panel
    width, values of a word], where K counts words of channels. dtype: of the inputs, and of the transformed weights;
    those for uint8 are int16, by the smallest multiples of G's rows that are integers."""
    g = torch.tensor(ALGORITHMS[algorithm].taps, dtype=torch.float64, device="cpu")
    if dtype == torch.uint8:
        g, dtype = (g / g.abs().where(g != 0, torch.inf).amin(1, keepdim=True)).round(), torch.int16
    planes = torch.einsum("ia,jb,okab->ijok", g, g, weight.double()).to(dtype)
    return with_slack(_pack(planes.flatten(0, 1).unsqueeze(-2), panels).transpose(0, 1))


def _pack(rows: Tensor, panels: Sequence[Panel]) -> Tensor:
    """Rows [..., cout, runs, length] as [..., panels, K, panel width, values of a word]: K counts words, run after run.

    Zeros fill up the last word of each run, and panels that have fewer channels.
    """
    values = 4 // rows.itemsize
    words = F.pad(rows, (0, -rows.shape[-1] % values)).unflatten(-1, (-1, values)).flatten(-3, -2)
    packed = zeros(*rows.shape[:-3], len(panels), words.shape[-2], library().panel_width(), values, dtype=rows.dtype)
    for i, panel in enumerate(panels):
        channels = words[..., panel.first : panel.first + panel.count, :, :]
        packed[..., i, :, : panel.count, :] = channels.transpose(-3, -2)
    return packed


def bias_by_edge(bias: Tensor, border: Tensor) -> Tensor:
    """The bias [cout] plus the border [cout, k, k] of those taps that lie inside the picture, for each way in which a
    pixel near the edge lacks taps: [ways * ways, cout].

    Its row is ways * vertical + horizontal, where each is how many of the first taps are missing, 0 to k // 2, plus
    k // 2 + 1 times how many of the last; so a side has ways = (k // 2 + 1) ** 2.
    """
    k = border.shape[-1]
    lacking = [(first, last) for last in range(k // 2 + 1) for first in range(k // 2 + 1)]
    kept = torch.zeros(len(lacking), k, dtype=torch.float32, device="cpu")
    for row, (first, last) in zip(kept, lacking, strict=True):
        row[first : k - last] = 1
    return bias + torch.einsum("va,hb,oab->vho", kept, kept, border).flatten(0, 1)
