"""Which configurations of a level are worth timing: a grid of tiles, ranked by a rough prediction.

The prediction only orders candidates. Its constants are round numbers for Hopper, and no report quotes it as a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from .config import LevelConfig, share_out
from .geometry import Geometry, Tile
from .rates import Rates

TILES = tuple(product((64, 128), (32, 64, 128, 256), (32, 64, 128)))  # wgmma has 64 rows, so bm = 32 would not use it
PICTURE_TILES = tuple(product((64, 128, 256), (32, 64), (32,)))  # K is 27
SINGLE_TILES = tuple(product((32, 64, 128), (32, 64), (16, 32)))
WARPS, STAGES = (4, 8), (2, 3, 4, 5)
PROGRAMS_PER_PROCESSOR = (1, 2, 3, 4)  # what split-K aims at
SHARED = 227 * 1024  # bytes a block may have
REGISTERS = 65536
ACCUMULATORS = (16, 128)  # fp32 values of the tile that a thread may hold: fewer waste it, more spill
OTHER_REGISTERS = 72  # that a thread needs besides: addresses, masks, the gate

L2_BYTES = 5.5e12  # a second, all multiprocessors together
LATENCY = 0.7e-6  # of a load, seconds
START = 1.5e-6  # seconds for a program's index arithmetic, gate and epilogue
TICKET = 1e-6  # seconds to meet the other splits


@dataclass(frozen=True)
class Candidate:
    """A configuration, and the seconds that it may take."""

    config: LevelConfig
    predicted: float


def candidates(shapes: Sequence[Geometry], n: int, dtype: torch.dtype, rates: Rates) -> list[Candidate]:
    """All that could fit, the most promising first."""
    configs = dict.fromkeys(_grid(shapes, n, dtype, rates.multiprocessors))
    found = [Candidate(config, predict(shapes, n, dtype, config, rates)) for config in configs]
    return sorted(found, key=lambda candidate: candidate.predicted)


def floor(shapes: Sequence[Geometry], n: int, dtype: torch.dtype, rates: Rates) -> float:
    """Seconds below which these operations cannot run: all arithmetic, or all bytes once."""
    flops = sum(2 * n * s.pixels * s.k * s.cout for s in shapes)
    values = sum(n * (s.h * s.w * s.cin + s.pixels * s.cout) + s.k * s.cout for s in shapes)
    return rates.floor(flops, values * dtype.itemsize)


def predict(shapes: Sequence[Geometry], n: int, dtype: torch.dtype, config: LevelConfig, rates: Rates) -> float:
    """The floor, or what the multiprocessors together must do, or how the programs queue for them."""
    blocks = resident(config, dtype)
    programs, busy = [], 0.0
    for shape, tile in zip(shapes, config.tiles, strict=True):
        steps = -(-shape.k // tile.bk) / tile.split_k
        arithmetic = 2 * tile.bm * tile.bn * tile.bk * rates.multiprocessors / rates.flops
        traffic = (tile.bm + tile.bn) * tile.bk * dtype.itemsize * rates.multiprocessors / L2_BYTES
        waiting = LATENCY / max(1, config.num_stages - 1)
        seconds = START + steps * max(arithmetic, traffic, waiting)
        if tile.split_k > 1:
            seconds += TICKET + (tile.split_k + 1) * tile.bm * tile.bn * 4 * rates.multiprocessors / L2_BYTES
        count = n * tile.programs(shape)
        programs += [seconds] * count
        busy += count * steps * max(arithmetic, traffic)
    queue = [0.0] * (blocks * rates.multiprocessors)
    for seconds in sorted(programs, reverse=True):
        heapq.heapreplace(queue, queue[0] + seconds)
    return max(floor(shapes, n, dtype, rates), busy / rates.multiprocessors, max(queue))


def resident(config: LevelConfig, dtype: torch.dtype) -> int:
    """Blocks on a multiprocessor at a time, at most; 0 where not even one fits."""
    threads = 32 * config.num_warps
    accumulators = max(tile.bm * tile.bn for tile in config.tiles) // threads
    shared = max(config.num_stages * (t.bm + t.bn) * t.bk * dtype.itemsize for t in config.tiles)
    if not ACCUMULATORS[0] <= accumulators <= ACCUMULATORS[1] or shared > SHARED:
        return 0
    return min(REGISTERS // (threads * (accumulators + OTHER_REGISTERS)), (SHARED + 1024) // (shared + 1024))


def _grid(shapes: Sequence[Geometry], n: int, dtype: torch.dtype, processors: int) -> Iterator[LevelConfig]:
    planar = any(shape.planar for shape in shapes)
    tiles = SINGLE_TILES if dtype == torch.float32 else PICTURE_TILES if planar else TILES
    for (bm, bn, bk), warps, depth, share in product(tiles, WARPS, STAGES, PROGRAMS_PER_PROCESSOR):
        config = LevelConfig(share_out(shapes, n, Tile(bm, bn, bk), share * processors), warps, depth)
        if resident(config, dtype):
            yield config
