"""How to cut a level for a Hopper: which operations its kernel takes, a grid of tiles, and how long each may take."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product

from ..gpu.geometry import Geometry, WarpTile, aligned
from ..gpu.rates import H200, MOST_REGISTERS, REGISTERS

CLOCK = 1.9e9
WIDTHS = (48, 64, 96, 104, 128, 144, 160, 192, 208, 256)  # channels of a tile, about
CHUNKS = (48, 64, 80, 96, 112, 128)
SHARES = (0.5, 0.75, 1.0, 1.5)  # of a multiprocessor's equal share of the work, what a block may have at most
SPLITS = (1, 2, 4, 8)
STAGES = (2, 8)  # at least, at most
TAPS = (3, 9)  # of a step, besides 1
STARTS = 4  # of the grid's most promising, which are improved tile by tile
# of so many blocks, that an H200 holds at a time: what its timed levels fit best
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
BARRIERS = 256  # bytes of shared memory for them
GATERS = 96  # threads of a block that make gates
OTHER_REGISTERS = 64  # that a thread needs besides its sums


@dataclass(frozen=True)
class Costs:
    """Seconds, but for `products`. block: from the launch before until a block's first operands are there, and from
    its products to its end. products: what they take, over what they take at their peak rate. step: of a step, beside
    them. copy: of a block of inputs, for each copy of a thread. second: of a second warpgroup. meet: where so many
    blocks share a tile.

    Fitted to 29 timed launches (results/hopper-clocks-nvidia-h200.jsonl).
    """

    block: float = 4.3e-6
    products: float = 1.4
    step: float = 0.03e-6
    copy: float = 0.09e-6
    second: float = 1.25e-6
    meet: Mapping[int, float] = field(default_factory=lambda: {1: 0.0, 2: 0.95e-6, 4: 1.5e-6, 8: 2.2e-6})


def takes(shape: Geometry) -> bool:
    """Whether level.cu computes such an operation: gated, not of a picture, and in groups of whole eights."""
    eights = (shape.part, shape.cout // shape.groups, shape.cout // shape.groups // shape.shuffle)
    return shape.gate != "none" and not shape.planar and (shape.groups == 1 or all(n % 8 == 0 for n in eights))


def predict(shapes: Sequence[Geometry], tiles: Sequence[WarpTile], n: int, costs: Costs = Costs()) -> float:
    """Seconds of a launch: clusters go to whichever place is free first, the longest before the others."""
    cluster = max(tile.split_k for tile in tiles)
    queue: list[float] = []
    for shape, tile in zip(shapes, tiles, strict=True):
        warpgroups = tile.bm // 64
        products = tile.kk(shape) * warpgroups * tile.bn / 2 / CLOCK
        copies = tile.rows(shape) * tile.kk(shape) * 2 / (128 * warpgroups)
        of_step = tile.taps * (costs.products * products + costs.copy * copies / shape.taps) + costs.step
        steps = tile.steps(shape) / tile.split_k
        seconds = costs.block + costs.second * (warpgroups - 1) + steps * of_step + costs.meet[tile.split_k]
        every = n * tile.spatial(shape) * tile.channels(shape)
        queue += [seconds] * -(-every // (cluster // tile.split_k))
    places = [0.0] * CLUSTERS[cluster]
    for seconds in sorted(queue, reverse=True):
        heapq.heapreplace(places, places[0] + seconds)
    return max(places)


def threads(bm: int) -> int:
    """Of a block: those that multiply, and a warpgroup that fetches weights and makes gates."""
    return 2 * bm + 128


def room(shape: Geometry, tile: WarpTile) -> int:
    """Bytes of shared memory for averages and parts of the gates, and, later, for parts of the sums."""
    items = shape.inputs * aligned(shape.part) // 4
    parts = max(4 * items * max(1, GATERS // items), 8 * GATERS)
    return 4 * max(4 * items + parts, 8 * threads(tile.bm))


def shared(shape: Geometry, tile: WarpTile, room: int) -> int:
    """Bytes of a block's shared memory."""
    head = BARRIERS + -(-4 * tile.rows(shape) // 16) * 16 + 12 * tile.bn // tile.split_k + room
    of_tap = tile.kk(shape) * 32
    operands = (tile.buffers(shape) * (tile.rows(shape) | 1) + tile.stages * tile.taps * tile.bn) * of_tap
    return -(-head // 128) * 128 + max(operands, 4 * tile.bm * (tile.bn + 8))


def candidates(shapes: Sequence[Geometry], n: int) -> list[tuple[float, tuple[WarpTile, ...]]]:
    """All of a grid that fit, and what may be better than its best, the most promising first, each with its
    prediction; and the same with more taps to a step."""
    grid = {tiles: predict(shapes, tiles, n) for tiles in dict.fromkeys(_grid(shapes, n)) if tiles}
    best = sorted(grid, key=grid.__getitem__)[:STARTS]
    better = {tiles: seconds for start in best for seconds, tiles in _improved(shapes, n, grid[start], start)}
    alone = grid | better
    longer = [_staged(shapes, tiles, taps) for tiles in alone for taps in TAPS]
    found = alone | {tiles: predict(shapes, tiles, n) for tiles in longer if tiles}
    return sorted(((seconds, tiles) for tiles, seconds in found.items()), key=lambda each: each[0])


def _improved(
    shapes: Sequence[Geometry], n: int, seconds: float, tiles: tuple[WarpTile, ...]
) -> Iterator[tuple[float, tuple[WarpTile, ...]]]:
    """Whatever is better than the tiles before, where one operation's is changed at a time."""
    for i, shape in enumerate(shapes):
        for width, chunk, split in product(WIDTHS, CHUNKS, SPLITS):
            other = _tile(shape, tiles[i].bm, width, chunk, split)
            changed = _staged(shapes, (*tiles[:i], other, *tiles[i + 1 :]))
            if changed and (found := predict(shapes, changed, n)) < seconds:
                seconds, tiles = found, changed
                yield seconds, tiles


def _grid(shapes: Sequence[Geometry], n: int) -> Iterator[tuple[WarpTile, ...] | None]:
    for groups, width, chunk, share in product((1, 2), WIDTHS, CHUNKS, SHARES):
        whole = [_tile(shape, 64 * groups, width, chunk, 1) for shape in shapes]
        work = [tile.work(shape) for tile, shape in zip(whole, shapes, strict=True)]
        tiled = zip(shapes, whole, work, strict=True)
        fair = share * sum(w * n * t.spatial(s) * t.channels(s) for s, t, w in tiled) / H200.multiprocessors
        splits = [min(8, 2 ** max(0, round(w / fair).bit_length() - 1)) for w in work]
        tiles = [_tile(shape, 64 * groups, width, chunk, split) for shape, split in zip(shapes, splits, strict=True)]
        yield _staged(shapes, tiles)


def _tile(shape: Geometry, bm: int, width: int, chunk: int, split: int) -> WarpTile:
    """As wide as `width` allows, and no wider than the group's channels ask for."""
    group, eights = shape.cout // shape.groups, 8 * split
    even = -(-group // -(-group // width))
    bn = -(-even // eights) * eights
    half = max(16, chunk // 32 * 16)  # with stride 2 a block of inputs has four times the rows
    return WarpTile(bm, bn, half if shape.stride == 2 else chunk, split, 0)


def _staged(shapes: Sequence[Geometry], tiles: Sequence[WarpTile], taps: int = 1) -> tuple[WarpTile, ...] | None:
    """With as many stages as there is room for; nothing where there is none, or where threads lack registers, or blocks
    steps."""
    widest = max(tile.bn for tile in tiles)
    if widest > 256 or widest // 2 + OTHER_REGISTERS > min(MOST_REGISTERS, REGISTERS // threads(tiles[0].bm)):
        return None
    of_level, made = max(map(room, shapes, tiles)), []
    for shape, tile in zip(shapes, tiles, strict=True):
        bare = replace(tile, stages=0, taps=taps)
        left = H200.shared - shared(shape, bare, of_level)
        stages = min(STAGES[1], left // (taps * tile.bn * tile.kk(shape) * 32))
        if stages < STAGES[0] or bare.steps(shape) < tile.split_k:
            return None
        made.append(replace(bare, stages=stages))
    return tuple(made)
