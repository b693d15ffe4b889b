"""Random fused convolutions of every kind, to test kernels on and to time them with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from .convolution import Convolution, Operands, allocate, outputs
from .geometry import ALIGNED, Geometry, Tile
from .packing import pack_weight

GATED = ("identity", "plain", "down", "picture", "grouped", "fusion", "fusion_down")
UNGATED = ("projection", "residual", "fours", "wide_picture")
KINDS = (*GATED, *UNGATED)


def geometry(kind: str, h: int, w: int, channels: int, activation: str = "silu") -> Geometry:
    """About `channels` channels: as many as the kind can have."""
    even = channels + channels % 2
    four = -(-channels // 4) * 4
    fields: dict[str, dict] = {
        "identity": {"cin": channels, "cout": channels, "gate": "identity"},
        "plain": {"cin": channels, "cout": channels + 5},
        "down": {"cin": channels, "cout": channels + 9, "stride": 2},
        "picture": {"cin": 3, "cout": channels, "stride": 2, "planar": True},
        "grouped": {"cin": even, "cout": even + 2, "groups": 2},
        "fusion": {"cin": 2 * even, "cout": even, "groups": 2, "inputs": 2},
        "fusion_down": {"cin": 2 * even, "cout": four, "stride": 2, "groups": 2, "inputs": 2, "shuffle": 2},
        "projection": {"cin": channels, "cout": channels + 9, "stride": 2, "kernel": 1, "activation": "none"},
        "residual": {"cin": channels, "cout": channels + 5, "kernel": 1, "residual": True},
        "fours": {"cin": four, "cout": four + 8, "groups": 4, "residual": True, "sums": False},
        "wide_picture": {"cin": 3, "cout": channels, "stride": 2, "kernel": 7, "planar": True},
    }
    gate = {"gate": "none"} if kind in UNGATED else {}
    return Geometry(h, w, **{"activation": activation, **gate, **fields[kind]})


def convolution(
    shape: Geometry,
    tile: Tile,
    n: int,
    dtype: torch.dtype,
    seed: int,
    border: bool | None = None,
    input_tiles: tuple[int, int] = (3, 17),
    device: torch.device | str = "cpu",
) -> Convolution:
    """Random operands of the order of one; sums of the inputs that have nothing to do with them, for so many tiles."""
    generator, (t_a, t_b) = torch.Generator(device).manual_seed(seed), input_tiles

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device) * scale

    def padded(made: torch.Tensor) -> torch.Tensor:
        return F.pad(made, (0, -made.shape[-1] % ALIGNED))

    def feature(size: tuple[int, ...]) -> torch.Tensor:
        return random(*size).to(dtype) if shape.planar else padded(random(*size).to(dtype))

    def averaged(tiles: int) -> torch.Tensor:
        return padded(random(n, tiles, c, scale=pixels / tiles))

    c, rows, o = shape.cin // shape.inputs, shape.cin // shape.groups, shape.cout
    second, identity, gated = shape.inputs == 2, shape.gate == "identity", shape.gate != "none"
    size = (n, c, shape.h, shape.w) if shape.planar else (n, shape.h, shape.w, c)
    pixels = shape.h * shape.w
    x = Operands(
        a=feature(size),
        b=feature(size) if second else None,
        a_sums=averaged(t_a) if gated and not shape.planar else None,
        b_sums=averaged(t_b) if gated and second else None,
        weight=pack_weight(random(o, rows, *(shape.kernel,) * 2, scale=shape.k**-0.5), shape, tile, dtype),
        bias=random(o),
        border=random(shape.taps, o) if (second if border is None else border) else None,
        gate_weight=padded(random(rows, o, scale=rows**-0.5).to(dtype)) if gated else None,
        gate_bias=random(o) if gated else None,
        scale=random(o) if identity else None,
        shift=random(o) if identity else None,
        residual=feature((n, shape.hout, shape.wout, o)) if shape.residual else None,
        **allocate(outputs(shape, tile, n, dtype), torch.device(device))._asdict(),
    )
    return Convolution(x, shape, tile)


def in_fp32(conv: Convolution) -> Convolution:
    """The same rounded operands in fp32, with outputs of their own."""
    made = allocate(outputs(conv.shape, conv.tile, conv.n, torch.float32), conv.x.a.device)
    wide = {name: t.float() if t is not None and t.is_floating_point() else t for name, t in conv.x._asdict().items()}
    return dataclasses.replace(conv, x=Operands(**{**wide, **made._asdict()}))


def without_values(conv: Convolution) -> Convolution:
    """The same on torch's "meta" device: good for compiling, and for nothing else."""
    x: dict[str, Any] = {
        name: None if tensor is None else tensor.to("meta") for name, tensor in conv.x._asdict().items()
    }
    return dataclasses.replace(conv, x=Operands(**x))
