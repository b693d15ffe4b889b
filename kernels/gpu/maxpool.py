"""The largest of 3 x 3 values: a launch of its own, which moves bytes and multiplies nothing."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .convolution import STORAGE, Layout, check_tensors, outputs
from .geometry import Geometry, Tile, padded_channels
from .launch import Launch

TILE = Tile(16, 64)  # pixels and channels of a program: with four warps a thread copies 16 bytes in half precision


@triton.jit
def maxpool_kernel(
    x, y, sums, H: tl.constexpr, W: tl.constexpr, WOUT: tl.constexpr, PIXELS: tl.constexpr, STRIDE: tl.constexpr,
    ROOM: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """Program (tile, columns, n): BM pixels x BC channels of picture n. ROOM: places for channels. See `maxpool`."""
    i_m, n = tl.program_id(0), tl.program_id(2).to(tl.int64)
    p = i_m * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    mask_p, mask_c = p < PIXELS, c < ROOM
    row, column = p // WOUT * STRIDE - 1, p % WOUT * STRIDE - 1
    best = tl.full((BM, BC), float("-inf"), tl.float32)
    for tap in tl.static_range(9):
        i, j = row + tap // 3, column + tap % 3
        inside = mask_p & (i >= 0) & (i < H) & (j >= 0) & (j < W)
        cells = (i * W + j)[:, None] * ROOM + c[None, :]
        value = tl.load(x + n * (H * W * ROOM) + cells, mask=inside[:, None] & mask_c[None, :], other=float("-inf"))
        best = tl.maximum(best, value.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
    cells = p[:, None] * ROOM + c[None, :]
    tl.store(y + n * (PIXELS * ROOM) + cells, best.to(y.dtype.element_ty), mask=mask_p[:, None] & mask_c[None, :])
    if SUMMED:
        column_sums = tl.sum(tl.where(mask_p[:, None], best, 0.0), axis=0)
        tl.store(sums + (n * TILES + i_m) * ROOM + c, column_sums, mask=mask_c)


def maxpool(x: Tensor, y: Tensor, sums: Tensor | None, shape: Geometry, name: str = "maxpool") -> Launch:
    """x storage [N, H, W, C] to y and sums as `convolution.outputs` has them for the shape: that of a 3x3 convolution
    with the same stride, and as many channels in as out. What lies outside counts for nothing, and a value that is no
    number wins.
    """
    n, dtype = x.shape[0], x.dtype if x.dtype in STORAGE else STORAGE[0]
    read: Layout = (n, shape.h, shape.w, padded_channels(shape.cin)), dtype
    layouts = {"sums": None, "x": read, **outputs(shape, TILE, n, dtype)}
    check_tensors({"x": x, "y": y, "sums": sums}, layouts, x.device, elsewhere=("y", "sums"))
    padded, spatial = padded_channels(shape.cout), TILE.spatial(shape)
    arguments = (
        x, y, y if sums is None else sums, shape.h, shape.w, shape.wout, shape.pixels, shape.stride, padded, spatial,
        TILE.bm, TILE.bn, sums is not None,
    )  # fmt: skip
    return Launch(name, maxpool_kernel, arguments, (spatial, -(-padded // TILE.bn), n), num_warps=4, num_stages=1)
