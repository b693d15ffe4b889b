"""What a fused convolution is: its shape, its tiles, its tensors, and what fits together. Plain data, no Triton.

Shape letters: N pictures; H, W input height and width; P output pixels of one picture (rows x columns); C input
channels of one tensor; K = 9 cin / groups; O output channels; T spatial tiles of one picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ParNetError

GATES = ("identity", "plain")
ACTIVATIONS = ("silu", "relu")
PRECISIONS = ("ieee", "tf32x3")
STORAGE = (torch.float32, torch.float16, torch.bfloat16)

Layout = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Geometry:
    """A 3x3 convolution with padding 1 of pictures of h x w pixels.

    cin: input channels over all `inputs` tensors, one or two of cin / inputs channels each.
    stride, groups, shuffle, gate and activation as in `program.Operation`.
    planar: the input is the picture, [N, C, H, W], and comes without sums; any other input is [N, H, W, C].
    """

    h: int
    w: int
    cin: int
    cout: int
    stride: int = 1
    groups: int = 1
    shuffle: int = 1
    gate: str = "plain"
    activation: str = "silu"
    inputs: int = 1
    planar: bool = False

    def __post_init__(self) -> None:
        if min(self.h, self.w, self.cin, self.cout) < 1 or self.stride not in (1, 2) or self.groups not in (1, 2):
            raise ParNetError(f"{self}: sizes must be positive, stride and groups 1 or 2")
        if self.inputs not in (1, 2) or self.cin % (self.inputs * self.groups):
            raise ParNetError(f"cin {self.cin}: must divide into {self.inputs} inputs x {self.groups} groups")
        if self.shuffle < 1 or self.cout % (self.groups * self.shuffle):
            raise ParNetError(f"cout {self.cout}: must divide into {self.groups} groups x {self.shuffle} chunks")
        if self.gate not in GATES or self.activation not in ACTIVATIONS:
            raise ParNetError(f"gate {self.gate!r}, activation {self.activation!r}: choose of {GATES}, {ACTIVATIONS}")
        if self.gate == "identity" and (self.cin != self.cout or self.stride + self.groups + self.inputs > 3):
            raise ParNetError("gate 'identity': needs one input of cout channels, stride 1 and no groups")
        if self.planar and self.inputs * self.groups > 1:
            raise ParNetError("a planar picture is the only input of a convolution without groups")
        if max(self.h * self.w * self.cin, self.pixels * self.cout, 9 * self.cin * self.cout) >= 2**31:
            raise ParNetError(f"{self}: one picture, or the weights, hold 2^31 values or more")

    @property
    def hout(self) -> int:
        return (self.h + self.stride - 1) // self.stride

    @property
    def wout(self) -> int:
        return (self.w + self.stride - 1) // self.stride

    @property
    def pixels(self) -> int:
        """P, the output pixels of a picture."""
        return self.hout * self.wout

    @property
    def k(self) -> int:
        """K, the terms of each output value's sum."""
        return 9 * self.cin // self.groups


@dataclass(frozen=True)
class Tile:
    """What one program computes: `bm` pixels x `bn` output channels, in steps of `bk` of K, a `split_k`-th of K."""

    bm: int = 64
    bn: int = 64
    bk: int = 64
    split_k: int = 1

    def __post_init__(self) -> None:
        if any(b < 16 or b & (b - 1) for b in (self.bm, self.bn, self.bk)) or self.split_k < 1:
            raise ParNetError(f"{self}: bm, bn and bk must be powers of two from 16, split_k positive")

    def spatial(self, shape: Geometry) -> int:
        """T: no tile crosses from one picture to the next, so that each channel sum belongs to one picture."""
        return -(-shape.pixels // self.bm)

    def channels(self, shape: Geometry) -> int:
        """Tiles over the output channels of all groups; none crosses from one group to the next."""
        return shape.groups * -(-(shape.cout // shape.groups) // self.bn)

    def programs(self, shape: Geometry) -> int:
        """Programs for one picture."""
        return self.spatial(shape) * self.channels(shape) * self.split_k


def power_of_two(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


class Operands(NamedTuple):
    """The tensors of a fused convolution, contiguous; None where it has none. "Storage" is fp32, fp16 or bf16.

    a, b: inputs, storage, [N, H, W, C] each, or a picture [N, 3, H, W]; b None for one input.
    a_sums, b_sums: their channel sums per tile, fp32 [N, T, C], by whoever made them; None for a picture.
    weight: storage [9, cin / groups, O]. bias: fp32 [O]. border: fp32 [9, O] or None.
    gate: fp32 [N, O], the sigmoids where `sse_gate` computed them, else None, and then:
    gate_weight: storage [cin / groups, O]. gate_bias: fp32 [O].
    scale, shift: fp32 [O] for gate "identity", else None.
    y: storage [N, H out, W out, O]. sums: fp32 [N, T, O], the sums of y per tile.
    workspace: fp32 [N, tiles, split_k, bm + 1, bn], the splits' products and, in the last row, their parts of the gate;
        counters: int32 [N, tiles], zero before and after; None without split-K.
    """

    a: Tensor
    b: Tensor | None
    a_sums: Tensor | None
    b_sums: Tensor | None
    weight: Tensor
    bias: Tensor
    border: Tensor | None
    gate: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    y: Tensor
    sums: Tensor
    workspace: Tensor | None
    counters: Tensor | None


@dataclass(frozen=True, eq=False)
class Convolution:
    """One fused convolution, ready to run. precision: of fp32 products, "ieee" (exact) or "tf32x3"."""

    x: Operands
    shape: Geometry
    tile: Tile
    precision: str = "ieee"

    @property
    def n(self) -> int:
        """N, the number of pictures."""
        return self.x.a.shape[0]

    def check(self) -> None:
        """ParNetError where a tensor's presence, shape, type, layout or device does not fit."""
        if self.precision not in PRECISIONS:
            raise ParNetError(f"precision {self.precision!r}: choose of {PRECISIONS}")
        x, dtype = self.x, self.x.a.dtype
        if dtype not in STORAGE:
            raise ParNetError(f"a has type {dtype}: choose float32, float16 or bfloat16")
        check_tensors(x._asdict(), self._layouts(dtype), x.a.device)
        if self.n < 1:
            raise ParNetError("a holds no picture")

    def _layouts(self, dtype: torch.dtype) -> dict[str, Layout | None]:
        x, shape, n, fp32 = self.x, self.shape, self.n, torch.float32
        c, row = shape.cin // shape.inputs, ((shape.cout,), fp32)
        feature = ((n, c, shape.h, shape.w) if shape.planar else (n, shape.h, shape.w, c)), dtype
        second, gated = shape.inputs == 2, x.gate is not None
        made = outputs(shape, self.tile, n, dtype)
        return {
            "a": feature,
            "b": feature if second else None,
            "a_sums": None if gated or shape.planar else ((n, _tiles(x.a_sums), c), fp32),
            "b_sums": None if gated or not second else ((n, _tiles(x.b_sums), c), fp32),
            "weight": ((9, shape.cin // shape.groups, shape.cout), dtype),
            "bias": row,
            "border": None if x.border is None else ((9, shape.cout), fp32),
            "gate": ((n, shape.cout), fp32) if gated else None,
            "gate_weight": None if gated else ((shape.cin // shape.groups, shape.cout), dtype),
            "gate_bias": None if gated else row,
            "scale": row if shape.gate == "identity" else None,
            "shift": row if shape.gate == "identity" else None,
            "y": made["y"],
            "sums": made["sums"],
            "workspace": made.get("workspace"),
            "counters": made.get("counters"),
        }


def outputs(shape: Geometry, tile: Tile, n: int, dtype: torch.dtype) -> dict[str, Layout]:
    """Shape and type of all that a convolution of n pictures writes."""
    t, tiles = tile.spatial(shape), tile.spatial(shape) * tile.channels(shape)
    made: dict[str, Layout] = {
        "y": ((n, shape.hout, shape.wout, shape.cout), dtype),
        "sums": ((n, t, shape.cout), torch.float32),
    }
    if tile.split_k > 1:
        made["workspace"] = (n, tiles, tile.split_k, tile.bm + 1, tile.bn), torch.float32
        made["counters"] = (n, tiles), torch.int32
    return made


def allocate(
    shape: Geometry, tile: Tile, n: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor | None]:
    """Tensors for `outputs`, of any content but for the counters, which start at zero."""
    made: dict[str, Tensor | None] = dict.fromkeys(("y", "sums", "workspace", "counters"))
    for name, (size, kind) in outputs(shape, tile, n, dtype).items():
        make = torch.zeros if name == "counters" else torch.empty
        made[name] = make(size, dtype=kind, device=device)
    return made


def check_tensors(tensors: Mapping[str, Tensor | None], layouts: Mapping[str, Layout | None], device: object) -> None:
    """ParNetError where a tensor is missing, not wanted, not of the given shape and type, or not dense on `device`."""
    for name, layout in layouts.items():
        tensor = tensors[name]
        if layout is None or tensor is None:
            if layout is not None:
                raise ParNetError(f"{name} is missing: expected {list(layout[0])} of {layout[1]}")
            if tensor is not None:
                raise ParNetError(f"{name} has no place in this operation: leave it out")
            continue
        if tuple(tensor.shape) != layout[0] or tensor.dtype != layout[1]:
            raise ParNetError(
                f"{name} is {list(tensor.shape)} of {tensor.dtype}: expected {list(layout[0])} of {layout[1]}"
            )
        if not tensor.is_contiguous():
            raise ParNetError(f"{name} is not contiguous: strides {tensor.stride()} for {list(tensor.shape)}")
        if tensor.device != device:
            raise ParNetError(f"{name} is on {tensor.device}: the others are on {device}")


def _tiles(sums: Tensor | None) -> int:
    return sums.shape[1] if sums is not None and sums.ndim == 3 else 1
