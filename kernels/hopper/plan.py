"""How to cut a level for a Hopper: which operations its kernel takes, in which tiles, and how long each may take."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import NamedTuple

from ..gpu.geometry import Geometry, WarpTile, padded_channels
from ..gpu.rates import H200, MOST_REGISTERS, REGISTERS

CLOCK = 1.9e9
PIXELS = (64, 128)  # of a tile
CHUNKS = (48, 64, 80, 96, 112, 128)
SPLITS = (1, 2, 4, 8)
STAGES = (2, 8)  # at least, at most
TAPS = (1, 3, 9)  # of a step
WORTH = 1.25  # times the best prediction: up to it, tiles are tried with other taps as well
# of so many blocks, that an H200 holds at a time: what its timed levels fit best
CLUSTERS = {1: 132, 2: 66, 4: 30, 8: 15}
BARRIERS = 256  # bytes of shared memory for them
GATERS = 96  # threads of a block that make gates
OTHER_REGISTERS = 64  # that a thread needs besides its sums


@dataclass(frozen=True)
class WarpCosts:
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


class Part(NamedTuple):
    """An operation's part of a launch: its clusters, and the seconds that each of them takes."""

    tile: WarpTile
    seconds: float
    clusters: int


def predict(shapes: Sequence[Geometry], tiles: Sequence[WarpTile], n: int, costs: WarpCosts = WarpCosts()) -> float:
    """Seconds of a launch."""
    cluster = max(tile.split_k for tile in tiles)
    return _span([_part(*each, n, cluster, costs) for each in zip(shapes, tiles, strict=True)], cluster)


def _part(shape: Geometry, tile: WarpTile, n: int, cluster: int, costs: WarpCosts) -> Part:
    warpgroups = tile.bm // 64
    products = tile.kk(shape) * warpgroups * tile.bn / 2 / CLOCK
    copies = tile.rows(shape) * tile.kk(shape) * 2 / (128 * warpgroups)
    of_step = tile.taps * (costs.products * products + costs.copy * copies / shape.taps) + costs.step
    steps = tile.steps(shape) / tile.split_k
    seconds = costs.block + costs.second * (warpgroups - 1) + steps * of_step + costs.meet[tile.split_k]
    every = n * tile.spatial(shape) * tile.channels(shape)
    return Part(tile, seconds, -(-every // (cluster // tile.split_k)))


def _span(parts: Sequence[Part], cluster: int) -> float:
    """Clusters go to whichever place is free first, the longest before the others."""
    places = [0.0] * CLUSTERS[cluster]
    for seconds in sorted((part.seconds for part in parts for _ in range(part.clusters)), reverse=True):
        heapq.heapreplace(places, places[0] + seconds)
    return max(places)


def threads(bm: int) -> int:
    """The threads of a block: those that multiply, and a warpgroup that fetches weights and makes gates."""
    return 2 * bm + 128


def room(shape: Geometry, bm: int) -> int:
    """Bytes of shared memory for averages and parts of the gates, and, later, for parts of the sums."""
    items = shape.inputs * padded_channels(shape.part) // 4
    parts = max(4 * items * max(1, GATERS // items), 8 * GATERS)
    return 4 * max(4 * items + parts, 8 * threads(bm))


def shared(shape: Geometry, tile: WarpTile, room: int) -> int:
    """Bytes of a block's shared memory."""
    head = BARRIERS + -(-4 * tile.rows(shape) // 16) * 16 + 12 * tile.bn // tile.split_k + room
    of_tap = tile.kk(shape) * 32
    operands = (tile.buffers(shape) * (tile.rows(shape) | 1) + tile.stages * tile.taps * tile.bn) * of_tap
    return -(-head // 128) * 128 + max(operands, 4 * tile.bm * (tile.bn + 8))


def candidates(shapes: Sequence[Geometry], n: int) -> list[tuple[float, tuple[WarpTile, ...]]]:
    """The most promising tiles first, each with its prediction: for each number of pixels and size of clusters the best
    that fit, and what differs from them in one operation's; of the best the same with as many taps to each step."""
    made: dict[tuple[WarpTile, ...], None] = {}
    for bm, cluster in product(PIXELS, SPLITS):
        of_each = [list(_parts(shape, bm, cluster, n, _room(shapes, bm))) for shape in shapes]
        if best := _best(of_each, cluster):
            for i, parts in enumerate(of_each):
                made |= {(*best[:i], part.tile, *best[i + 1 :]): None for part in parts}
    found = {tiles: predict(shapes, tiles, n) for tiles in made}
    most = WORTH * min(found.values(), default=0.0)
    for tiles, taps in product([tiles for tiles, seconds in found.items() if seconds < most], TAPS):
        if alike := _alike(shapes, tiles, taps):
            found[alike] = predict(shapes, alike, n)
    return sorted(((seconds, tiles) for tiles, seconds in found.items()), key=lambda each: each[0])


def _best(of_each: Sequence[Sequence[Part]], cluster: int) -> tuple[WarpTile, ...]:
    """The fastest combination of the operations' parts; none where an operation has none."""
    best: tuple[Part, ...] = ()
    least = math.inf
    for parts in product(*map(_undominated, of_each)):
        even = sum(part.seconds * part.clusters for part in parts) / CLUSTERS[cluster]
        if max(even, *(part.seconds for part in parts)) < least and (seconds := _span(parts, cluster)) < least:
            best, least = parts, seconds
    return tuple(part.tile for part in best)


def _undominated(parts: Sequence[Part]) -> list[Part]:
    """Those that no other beats both in clusters and in seconds of each."""
    best: list[Part] = []
    for part in sorted(parts, key=lambda part: (part.clusters, part.seconds)):
        if not best or part.seconds < best[-1].seconds:
            best.append(part)
    return best


def _parts(shape: Geometry, bm: int, cluster: int, n: int, of_level: int) -> Iterator[Part]:
    """The parts of an operation that fit, in a launch of such clusters."""
    # with stride 2 a block of inputs has four times the rows
    fewer = [max(16, chunk // 32 * 16) if shape.stride == 2 else chunk for chunk in CHUNKS]
    chunks = {WarpTile(bm, 8, chunk, 1, 0).kk(shape): chunk for chunk in fewer}.values()
    for split, chunk, taps in product([split for split in SPLITS if split <= cluster], chunks, TAPS):
        widest = min(256, padded_channels(shape.cout // shape.groups) + 8 * (split - 1))
        for bn in range(8 * split, widest + 1, 8 * split):
            if tile := _staged(shape, WarpTile(bm, bn, chunk, split, 0, taps), of_level):
                yield _part(shape, tile, n, cluster, WarpCosts())


def _alike(shapes: Sequence[Geometry], tiles: Sequence[WarpTile], taps: int) -> tuple[WarpTile, ...] | None:
    """The tiles with this many taps to every step, and as many stages as fit; nothing where one does not fit."""
    of_level = _room(shapes, tiles[0].bm)
    made = [_staged(shape, replace(t, taps=taps), of_level) for shape, t in zip(shapes, tiles, strict=True)]
    fit = tuple(tile for tile in made if tile)
    return fit if len(fit) == len(tiles) else None


def _room(shapes: Sequence[Geometry], bm: int) -> int:
    return max(room(shape, bm) for shape in shapes)


def _staged(shape: Geometry, tile: WarpTile, of_level: int) -> WarpTile | None:
    """The tile with as many stages as fit; nothing where too few do, where a thread lacks registers, or where there are
    fewer steps than blocks that share them."""
    if tile.bn // 2 + OTHER_REGISTERS > min(MOST_REGISTERS, REGISTERS // threads(tile.bm)):
        return None
    bare = replace(tile, stages=0)
    left = H200.shared - shared(shape, bare, of_level)
    stages = min(STAGES[1], left // (tile.taps * tile.bn * tile.kk(shape) * 32))
    return replace(bare, stages=stages) if stages >= STAGES[0] and bare.steps(shape) >= tile.split_k else None
