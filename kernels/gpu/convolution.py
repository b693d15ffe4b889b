"""A fused convolution with its tensors: what it reads, what it writes, and whether all that fits together.

Shape letters as in geometry.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import ParNetError
from .geometry import Geometry, Tile, WarpTile, padded_channels
from .packing import weight_blocks

STORAGE = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn

# of `Operands`: all that a fused convolution writes
OUTPUTS = ("y", "sums", "gate", "products", "arrived", "flags", "passes", "workspace", "counters")

Layout = tuple[tuple[int, ...], torch.dtype]


class Operands(NamedTuple):
    """The tensors of a fused convolution, contiguous; None where it has none. "Storage" is fp32, fp16 or bf16.

    Channels [C] and [O] of features and of what is kept for each of them have `geometry.padded_channels` places, with
    zeros behind the last, unless it says "exactly".
    In fp8, a, b and weight are e4m3, or the input is a picture; y is e4m3, or what only a classifier reads. Values are
        then steps times what is stored: weight_step fp32 [O], exactly, of weight, in which the inputs' steps are; step
        fp32 [O], exactly, of y, as it is stored. The step of a is in scale. gate_weight is in storage. Else both None.
    a, b: inputs, storage, [N, H, W, C] each; or a picture [N, 3, H, W], exactly, which may be uint8; b None for one
        input. a_sums, b_sums: their channel sums per tile, fp32 [N, T, C], by whoever made them; None for a picture.
    weight: storage, as `packing.pack_weight` makes it. bias: fp32 [O], exactly. border: fp32 [taps, O], exactly, or
        None. gate_weight: storage [cin / groups, O]. gate_bias: fp32 [O], exactly.
    scale, shift: fp32 [O], exactly, for gate "identity", else None. residual: storage, as y, or None.
    y: storage [N, H out, W out, O]. sums: fp32 [N, T, O], the sums of y per tile, where somebody reads them.
    Without a gate, all that has to do with it is None: a_sums, b_sums, gate_weight, gate_bias, gate to passes.
    gate: fp32 [N, O], which the first programs of a launch make for the others, from products fp32 [N, parts, O] of
        gate weights and averages, each from some channels of the input; where the input is a picture, those are its
        sums, [N, parts, 3], and there is no more. arrived: int32 [N, channel tiles], or [N, 1] for a picture: how many
        parts of the products are there; zero before and after. flags: int32, of the same shape: how many launches have
        made these gates, or, of a picture, parts. passes: int32 [N, tiles]: how many launches have used them.
    workspace: fp32 [N, tiles, split_k, bm, bn], the splits' products; counters: int32
        [N, tiles], zero before and after; both None without split-K.
    """

    a: Tensor
    b: Tensor | None
    a_sums: Tensor | None
    b_sums: Tensor | None
    weight: Tensor
    bias: Tensor
    border: Tensor | None
    gate_weight: Tensor | None
    gate_bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    residual: Tensor | None
    y: Tensor
    sums: Tensor | None
    gate: Tensor | None
    products: Tensor | None
    arrived: Tensor | None
    flags: Tensor | None
    passes: Tensor | None
    workspace: Tensor | None
    counters: Tensor | None
    weight_step: Tensor | None = None
    step: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Convolution:
    """One fused convolution, ready to run."""

    x: Operands
    shape: Geometry
    tile: Tile | WarpTile

    @property
    def n(self) -> int:
        """N, the number of pictures."""
        return self.x.a.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The storage type: that of the inputs, or of the weights where the input is a picture in uint8."""
        raw = self.shape.planar and self.x.a.dtype == torch.uint8
        return self.x.weight.dtype if raw else self.x.a.dtype

    def check(self) -> None:
        """ParNetError where a tensor's presence, shape, type, layout or device does not fit."""
        x, dtype = self.x, self.dtype
        if dtype not in STORAGE and (dtype != E4M3 or self.shape.planar):
            raise ParNetError(f"a has type {dtype}: choose float32, float16, bfloat16 or, of features, float8_e4m3fn")
        if E4M3 in (dtype, x.y.dtype) and self.shape.gate == "none":
            raise ParNetError("an operation without a gate is not in fp8")
        check_tensors(x._asdict(), self._layouts(dtype), x.a.device, elsewhere=("y", "sums"))
        if self.n < 1:
            raise ParNetError("a holds no picture")
        tile, most = self.tile, 32 * self.shape.kernel * self.shape.cin
        if self.shape.planar and isinstance(tile, Tile) and tile.bk * tile.steps(self.shape) > most:
            raise ParNetError(f"bk {tile.bk}: the rows of a picture's taps, as numbered, must be bits of a number")

    def _layouts(self, dtype: torch.dtype) -> dict[str, Layout | None]:
        x, shape, n, fp32 = self.x, self.shape, self.n, torch.float32
        c, row = shape.cin // shape.inputs, ((shape.cout,), fp32)
        padded = padded_channels(c, dtype.itemsize)
        size = (n, c, shape.h, shape.w) if shape.planar else (n, shape.h, shape.w, padded)
        feature = size, x.a.dtype if shape.planar else dtype
        second, gated = shape.inputs == 2, shape.gate != "none"
        stored = x.y.dtype if E4M3 in (dtype, x.y.dtype) and x.y.dtype in (*STORAGE, E4M3) else dtype
        of_gate = x.gate_weight.dtype if dtype == E4M3 and x.gate_weight is not None else dtype
        identity, made = row if shape.gate == "identity" else None, outputs(shape, self.tile, n, stored)
        return {
            "a": feature,
            "b": feature if second else None,
            "a_sums": ((n, _tiles(x.a_sums), padded), fp32) if gated and not shape.planar else None,
            "b_sums": ((n, _tiles(x.b_sums), padded), fp32) if gated and second else None,
            "weight": (weight_blocks(shape, self.tile, dtype), dtype),
            "weight_step": row if dtype == E4M3 else None,
            "step": row if stored == E4M3 else None,
            "bias": row,
            "border": None if x.border is None else ((shape.taps, shape.cout), fp32),
            "gate_weight": ((shape.cin // shape.groups, made["y"][0][3]), of_gate) if gated else None,
            "gate_bias": row if gated else None,
            "scale": identity,
            "shift": identity,
            "residual": made["y"] if shape.residual else None,
            **dict.fromkeys(OUTPUTS),
            **made,
        }


def outputs(shape: Geometry, tile: Tile | WarpTile, n: int, dtype: torch.dtype) -> dict[str, Layout]:
    """Shape and type of all that a convolution of n pictures writes. dtype: of y."""
    t, columns, padded = tile.spatial(shape), tile.channels(shape), padded_channels(shape.cout, dtype.itemsize)
    made: dict[str, Layout] = {"y": ((n, shape.hout, shape.wout, padded), dtype)}
    if shape.sums:
        made["sums"] = (n, t, padded), torch.float32
    if shape.gate != "none" and isinstance(tile, Tile):
        made |= {
            "gate": ((n, padded), torch.float32),
            "products": ((n, tile.parts(shape), shape.cin if shape.planar else padded), torch.float32),
            "arrived": ((n, 1 if shape.planar else columns), torch.int32),
            "flags": ((n, 1 if shape.planar else columns), torch.int32),
            "passes": ((n, t * columns), torch.int32),
        }
    if tile.split_k > 1 and isinstance(tile, Tile):
        made["workspace"] = (n, t * columns, tile.split_k, tile.bm, tile.bn), torch.float32
        made["counters"] = (n, t * columns), torch.int32
    return made


def allocate(
    layouts: Mapping[str, Layout], device: torch.device, given: Mapping[str, Tensor | None] | None = None
) -> dict[str, Any]:
    """`OUTPUTS` by name, None where there is no layout: tensors that are given, or new ones, of any content, but for
    those that count, which are zero."""
    made = {**dict.fromkeys(OUTPUTS), **(given or {})}
    for name, (size, kind) in layouts.items():
        if made[name] is None:
            make = torch.zeros if kind == torch.int32 else torch.empty
            made[name] = make(size, dtype=kind, device=device)
    return made


def check_tensors(
    tensors: Mapping[str, Tensor | None],
    layouts: Mapping[str, Layout | None],
    device: torch.device,
    elsewhere: Collection[str] = (),
) -> None:
    """ParNetError where a tensor is missing, not wanted, not of the given shape and type, or not dense on `device`.

    elsewhere: those that may lie on another device of its kind, since they are only written: a peer's memory.
    """
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
        if tensor.device != device and not (name in elsewhere and tensor.device.type == device.type):
            raise ParNetError(f"{name} is on {tensor.device}: the others are on {device}")


def _tiles(sums: Tensor | None) -> int:
    return sums.shape[1] if sums is not None and sums.ndim == 3 else 1
