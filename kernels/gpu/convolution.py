"""A fused convolution with its tensors: what it reads, what it writes, and whether all that fits together.

Shape letters as in geometry.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import ParNetError
from .geometry import Geometry, Tile

PRECISIONS = ("ieee", "tf32x3")
STORAGE = (torch.float32, torch.float16, torch.bfloat16)

Layout = tuple[tuple[int, ...], torch.dtype]


class Operands(NamedTuple):
    """The tensors of a fused convolution, contiguous; None where it has none. "Storage" is fp32, fp16 or bf16.

    a, b: inputs, storage, [N, H, W, C] each, or a picture [N, 3, H, W], which may be uint8; b None for one input.
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


class Outputs(NamedTuple):
    """The last four of `Operands`: all that a fused convolution writes."""

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

    @property
    def dtype(self) -> torch.dtype:
        """The storage type: that of the inputs, or of the weights where the input is a picture in uint8."""
        raw = self.shape.planar and self.x.a.dtype == torch.uint8
        return self.x.weight.dtype if raw else self.x.a.dtype

    def check(self) -> None:
        """ParNetError where a tensor's presence, shape, type, layout or device does not fit."""
        if self.precision not in PRECISIONS:
            raise ParNetError(f"precision {self.precision!r}: choose of {PRECISIONS}")
        x, dtype = self.x, self.dtype
        if dtype not in STORAGE:
            raise ParNetError(f"a has type {dtype}: choose float32, float16 or bfloat16")
        check_tensors(x._asdict(), self._layouts(dtype), x.a.device, elsewhere=("y", "sums"))
        if self.n < 1:
            raise ParNetError("a holds no picture")

    def _layouts(self, dtype: torch.dtype) -> dict[str, Layout | None]:
        x, shape, n, fp32 = self.x, self.shape, self.n, torch.float32
        c, row = shape.cin // shape.inputs, ((shape.cout,), fp32)
        size = (n, c, shape.h, shape.w) if shape.planar else (n, shape.h, shape.w, c)
        feature = size, x.a.dtype if shape.planar else dtype
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


def allocate(shape: Geometry, tile: Tile, n: int, dtype: torch.dtype, device: torch.device) -> Outputs:
    """Tensors for `outputs`, of any content but for the counters, which start at zero."""
    layouts = outputs(shape, tile, n, dtype)
    y, sums = (torch.empty(size, dtype=kind, device=device) for size, kind in (layouts["y"], layouts["sums"]))
    return Outputs(y, sums, *between(layouts, device))


def between(layouts: Mapping[str, Layout], device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Workspace and counters of `outputs`, where K is split."""
    if "workspace" not in layouts:
        return None, None
    (size, kind), (size_of_counters, kind_of_counters) = layouts["workspace"], layouts["counters"]
    return (
        torch.empty(size, dtype=kind, device=device),
        torch.zeros(size_of_counters, dtype=kind_of_counters, device=device),
    )


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
