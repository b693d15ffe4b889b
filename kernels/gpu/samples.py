"""Random fused convolutions of every kind, to test kernels on and to time them with."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from .convolution import E4M3, Convolution, Operands, allocate, outputs
from .geometry import Geometry, Tile, padded_channels
from .packing import pack_weight, unpack_weight

GATED = ("identity", "plain", "down", "picture", "grouped", "fusion", "fusion_down")
UNGATED = ("projection", "residual", "fours", "wide_picture")
KINDS = (*GATED, *UNGATED)
UNIT = 64.0  # of what is stored in fp8


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
    stored: torch.dtype | None = None,
) -> Convolution:
    """Random operands of the order of one; sums of the inputs that have nothing to do with them, for so many tiles.

    dtype: of the output, unless it is `stored` in another, and of the inputs; in fp8 a picture is in fp16, as are the
    weights of gates, features and weights are of the order of `UNIT`, and some outputs are larger than e4m3 holds.
    """
    stored = stored or dtype
    in_fp8 = dtype == E4M3 and not shape.planar
    plain = torch.float16 if dtype == E4M3 else dtype
    dtype, unit = (E4M3, UNIT) if in_fp8 else (plain, 1.0)
    generator, (t_a, t_b) = torch.Generator(device).manual_seed(seed), input_tiles

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device) * scale

    def padded(made: torch.Tensor, itemsize: int = dtype.itemsize) -> torch.Tensor:
        return F.pad(made, (0, padded_channels(made.shape[-1], itemsize) - made.shape[-1]))

    def feature(size: tuple[int, ...]) -> torch.Tensor:
        return (random(*size) if shape.planar else padded(random(*size, scale=unit))).to(dtype)

    def averaged(tiles: int) -> torch.Tensor:
        return padded(random(n, tiles, c, scale=pixels / tiles))

    def powers(size: int) -> torch.Tensor:
        return 2.0 ** -torch.randint(5, 9, (size,), generator=generator, device=device, dtype=torch.float32)

    c, rows, o = shape.cin // shape.inputs, shape.cin // shape.groups, shape.cout
    second, identity, gated = shape.inputs == 2, shape.gate == "identity", shape.gate != "none"
    size = (n, c, shape.h, shape.w) if shape.planar else (n, shape.h, shape.w, c)
    pixels = shape.h * shape.w
    x = Operands(
        a=feature(size),
        b=feature(size) if second else None,
        a_sums=averaged(t_a) if gated and not shape.planar else None,
        b_sums=averaged(t_b) if gated and second else None,
        weight=pack_weight(random(o, rows, *(shape.kernel,) * 2, scale=unit * shape.k**-0.5), shape, tile, dtype),
        bias=random(o),
        border=random(shape.taps, o) if (second if border is None else border) else None,
        gate_weight=padded(random(rows, o, scale=rows**-0.5).to(plain), stored.itemsize) if gated else None,
        gate_bias=random(o) if gated else None,
        scale=random(o, scale=1 / unit) if identity else None,
        shift=random(o) if identity else None,
        residual=feature((n, shape.hout, shape.wout, o)) if shape.residual else None,
        **allocate(outputs(shape, tile, n, stored), torch.device(device)),
        weight_step=(0.5 + random(o).abs()) / unit**2 if in_fp8 else None,
        step=powers(o) if stored == E4M3 else None,
    )
    return Convolution(x, shape, tile)


def in_fp32(conv: Convolution) -> Convolution:
    """A convolution of the same rounded operands in fp32, with outputs of its own."""
    made = allocate(outputs(conv.shape, conv.tile, conv.n, torch.float32), conv.x.a.device)
    wide = {name: t.float() if t is not None and t.is_floating_point() else t for name, t in conv.x._asdict().items()}
    if conv.x.weight.dtype == E4M3:
        unpacked = unpack_weight(conv.x.weight, conv.shape, conv.tile)
        wide["weight"] = pack_weight(unpacked, conv.shape, conv.tile, torch.float32)
    return dataclasses.replace(conv, x=Operands(**{**wide, **made}))


def without_values(conv: Convolution) -> Convolution:
    """A convolution whose tensors are on torch's "meta" device: good for compiling, and for nothing else."""
    x = Operands._make(None if tensor is None else tensor.to("meta") for tensor in conv.x)
    return dataclasses.replace(conv, x=x)
