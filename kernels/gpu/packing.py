"""From torch's weight layouts to the kernels', once, before the first picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .geometry import Geometry, Tile, WarpTile, padded_channels


def weight_blocks(shape: Geometry, tile: Tile | WarpTile, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape of packed weights: channel tiles x steps x bk x bn; in fp8 x bn x bk, since tensor cores take bytes
    only where K runs fastest; for warpgroups x bk / 8 x bn x 8, as they read shared memory. A step's block lies in one
    piece."""
    if isinstance(tile, WarpTile):
        return tile.channels(shape), shape.taps * shape.inputs * tile.chunks(shape), 2 * tile.kk(shape), tile.bn, 8
    block = (tile.bn, tile.bk) if dtype.itemsize == 1 else (tile.bk, tile.bn)
    return tile.channels(shape), tile.steps(shape), *block


def pack_weight(weight_oihw: Tensor, shape: Geometry, tile: Tile | WarpTile, dtype: torch.dtype) -> Tensor:
    """[O, cin / groups, kernel, kernel] to `weight_blocks`, in the order in which programs read them, with zeros where
    a block is wider than the operation: channel tiles group by group; steps by input, then `bk` channels, then tap."""
    if isinstance(tile, WarpTile):
        return _pack_columns(weight_oihw, shape, tile, dtype)
    tiles, steps, bk, bn = tile.channels(shape), tile.steps(shape), tile.bk, tile.bn
    given = weight_oihw.to(dtype)
    given = given.view(torch.uint8) if dtype.itemsize == 1 else given  # which torch can pad
    rows = given.view(shape.groups, -1, shape.inputs, shape.part, shape.taps)
    rows = F.pad(rows, (0, 0, 0, 0, 0, 0, 0, tiles // shape.groups * bn - rows.shape[1]))
    if shape.planar:
        taps = rows.flatten(0, 2).transpose(1, 2).flatten(1)
        blocks = F.pad(taps, (0, steps * bk - taps.shape[1])).view(tiles, bn, steps, bk).permute(0, 2, 3, 1)
    else:
        padded = F.pad(rows, (0, 0, 0, steps // shape.taps // shape.inputs * bk - shape.part))
        blocks = padded.reshape(tiles, bn, steps // shape.taps, bk, shape.taps).permute(0, 2, 4, 3, 1).flatten(1, 2)
    if dtype.itemsize == 1:
        return blocks.transpose(2, 3).contiguous().view(dtype)
    return blocks.contiguous()


def _pack_columns(weight_oihw: Tensor, shape: Geometry, tile: WarpTile, dtype: torch.dtype) -> Tensor:
    """Weights packed for a `WarpTile`: columns of eight channels of K, in which output channels follow each other."""
    tiles, chunks, columns = tile.channels(shape), tile.chunks(shape), 2 * tile.kk(shape)
    rows = weight_oihw.to(dtype).view(shape.groups, -1, shape.inputs, shape.part, shape.taps)
    absent = tiles // shape.groups * tile.bn - rows.shape[1]
    rows = F.pad(rows, (0, 0, 0, chunks * columns * 8 - shape.part, 0, 0, 0, absent))
    blocks = rows.reshape(tiles, tile.bn, shape.inputs, chunks, columns, 8, shape.taps)
    return blocks.permute(0, 2, 3, 6, 4, 1, 5).reshape(weight_blocks(shape, tile, dtype)).contiguous()


def _unpack_columns(blocks: Tensor, shape: Geometry, tile: WarpTile) -> Tensor:
    """The weights that `_pack_columns` packed."""
    chunks, columns = tile.chunks(shape), 2 * tile.kk(shape)
    rows = blocks.view(-1, shape.inputs, chunks, shape.taps, columns, tile.bn, 8).permute(0, 5, 1, 2, 4, 6, 3)
    rows = rows.reshape(shape.groups, -1, shape.inputs, chunks * columns * 8, shape.taps)
    rows = rows[:, : shape.cout // shape.groups, :, : shape.part]
    return rows.reshape(shape.cout, -1, shape.kernel, shape.kernel)


def unpack_weight(blocks: Tensor, shape: Geometry, tile: Tile | WarpTile) -> Tensor:
    """The weights that `pack_weight` packed, [O, cin / groups, kernel, kernel]; those of fp8 in fp32."""
    if isinstance(tile, WarpTile):
        return _unpack_columns(blocks, shape, tile)
    tiles, steps, bk, bn = tile.channels(shape), tile.steps(shape), tile.bk, tile.bn
    if blocks.dtype.itemsize == 1:
        blocks = blocks.float().transpose(2, 3).contiguous()
    if shape.planar:
        taps = blocks.permute(0, 3, 1, 2).reshape(tiles * bn, steps * bk)[:, : shape.k]
        rows = taps.view(-1, shape.taps, shape.cin).transpose(1, 2).unsqueeze(1)
    else:
        rows = blocks.view(tiles, steps // shape.taps, shape.taps, bk, bn).permute(0, 4, 1, 3, 2)
        rows = rows.reshape(tiles * bn, shape.inputs, -1, shape.taps)[:, :, : shape.part]
    rows = rows.unflatten(0, (shape.groups, -1))[:, : shape.cout // shape.groups]
    return rows.reshape(shape.cout, -1, shape.kernel, shape.kernel)


def pack_border(border_ohw: Tensor) -> Tensor:
    """[O, kernel, kernel] to fp32 [taps, O]."""
    return border_ohw.flatten(1).T.float().contiguous()


def pack_gate_weight(weight_oi: Tensor, dtype: torch.dtype, itemsize: int = 2) -> Tensor:
    """A gate's weights [O, cin / groups] as [cin / groups, padded O]. itemsize: of the gated output."""
    o = weight_oi.shape[0]
    return F.pad(weight_oi.T.to(dtype), (0, padded_channels(o, itemsize) - o)).contiguous()
