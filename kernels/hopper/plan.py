"""How to cut a level for a Hopper: which operations its kernel takes, a grid of tiles, and how long each may take."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..gpu.candidates import MOST_REGISTERS, REGISTERS, SHARED
from ..gpu.geometry import Geometry, WarpTile, aligned
from ..gpu.rates import H200

CLOCK = 1.9e9
WIDTHS = (48, 64, 96, 104, 128, 144, 160, 192, 208, 256)  # channels of a tile, about
CHUNKS = (48, 64, 80, 96, 112, 128)
SHARES = (0.5, 0.75, 1.0, 1.5)  # of a multiprocessor's equal share of the work, what a block may have at most
STAGES = (2, 8)  # at least, at most
BARRIERS = 256  # bytes of shared memory for them
GATERS = 96  # threads of a block that make gates
OTHER_REGISTERS = 64  # that a thread needs besides its sums


@dataclass(frozen=True)
class Costs:
    """Seconds. gap: between two launches. start: until a block's first operands are there. step: of a step, beside its
    products. meet: for blocks of a cluster to read each other's sums. end: gate, activation and stores."""

    gap: float = 1.0e-6
    start: float = 2.0e-6
    step: float = 0.1e-6
    meet: float = 1.0e-6
    end: float = 1.0e-6


def takes(shape: Geometry) -> bool:
    """Whether level.cu computes such an operation: gated, not of a picture, and in groups of whole eights."""
    eights = (shape.part, shape.cout // shape.groups, shape.cout // shape.groups // shape.shuffle)
    return shape.gate != "none" and not shape.planar and (shape.groups == 1 or all(n % 8 == 0 for n in eights))


def predict(shapes: Sequence[Geometry], tiles: Sequence[WarpTile], n: int, costs: Costs = Costs()) -> float:
    """Seconds of a launch: blocks go to whichever multiprocessor is free first, the longest before the others."""
    cluster = max(tile.split_k for tile in tiles)
    blocks: list[float] = []
    for shape, tile in zip(shapes, tiles, strict=True):
        steps = shape.taps * shape.inputs * tile.chunks(shape) / tile.split_k
        products = tile.kk(shape) * tile.bm // 64 * tile.bn / 2 / CLOCK
        seconds = costs.start + steps * (products + costs.step) + (costs.meet if tile.split_k > 1 else 0) + costs.end
        every = n * tile.spatial(shape) * tile.channels(shape)
        blocks += [seconds] * (-(-every // (cluster // tile.split_k)) * cluster)
    places = [0.0] * (H200.multiprocessors // cluster * cluster)
    for seconds in sorted(blocks, reverse=True):
        heapq.heapreplace(places, places[0] + seconds)
    return costs.gap + max(places)


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
    of_step = tile.kk(shape) * 32
    operands = (tile.buffers(shape) * (tile.rows(shape) | 1) + tile.stages * tile.bn) * of_step
    return -(-head // 128) * 128 + max(operands, 4 * tile.bm * (tile.bn + 8))


def candidates(shapes: Sequence[Geometry], n: int) -> list[tuple[float, tuple[WarpTile, ...]]]:
    """All that fit, the most promising first, each with its prediction."""
    found = dict.fromkeys(tiles for tiles in _grid(shapes, n) if tiles)
    return sorted(((predict(shapes, tiles, n), tiles) for tiles in found), key=lambda each: each[0])


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


def _staged(shapes: Sequence[Geometry], tiles: Sequence[WarpTile]) -> tuple[WarpTile, ...] | None:
    """With as many stages as there is room for; nothing where there is none, or where threads lack registers."""
    widest, most = max(tile.bn for tile in tiles), min(MOST_REGISTERS, REGISTERS // threads(tiles[0].bm))
    if widest > 256 or widest // 2 + OTHER_REGISTERS > most:
        return None
    of_level, made = max(map(room, shapes, tiles)), []
    for shape, tile in zip(shapes, tiles, strict=True):
        left = SHARED - shared(shape, replace(tile, stages=0), of_level)
        stages = min(STAGES[1], left // (tile.bn * tile.kk(shape) * 32))
        if stages < STAGES[0]:
            return None
        made.append(replace(tile, stages=stages))
    return tuple(made)
