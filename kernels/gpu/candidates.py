"""Which configurations of a level may be worth their time: a grid of tiles, the most promising first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from .geometry import COPY, Geometry, Tile, power_of_two
from .model import LevelConfig, predict
from .rates import MOST_REGISTERS, REGISTERS, Rates

TILES = ((64, 32, 4), (64, 64, 4), (64, 128, 4))  # bm, bn and warps; others win nowhere on an H200
PICTURE_TILES = ((64, 64, 4),)
SINGLE_TILES = ((64, 64, 8), (64, 32, 8))
STEP = 64  # channels of a step, of 16 bits
PROGRAMS = (1.0, 1.5, 2.0, 2.5, 3.0)  # for each multiprocessor, what split-K aims at
STAGES = 4
LEAST_STEPS = 6  # a program with fewer steps of K spends its time on starting and finishing
MOST_SPLITS = 4  # so that whoever comes last has few of them to add up
OTHER_REGISTERS = 100  # that a thread needs besides its share of the tile: what was read ahead, addresses, masks
OTHER_IN_FP8 = 130  # besides that share twice, of all steps and of one: steps of more channels have more addresses


@dataclass(frozen=True)
class Candidate:
    """A configuration, and the seconds that it may take."""

    config: LevelConfig
    predicted: float


def candidates(
    shapes: Sequence[Geometry],
    n: int,
    dtype: torch.dtype,
    rates: Rates,
    steps: Sequence[int] = (STEP,),
    stages: Sequence[int] = (STAGES,),
) -> list[Candidate]:
    """All that fit, the most promising first. Of levels that fill the GPU but once, those come first that do so in one
    wave: a second one starts when the first ends. steps: channels of one, at most. stages: of the pipeline."""
    configs = dict.fromkeys(_grid(shapes, n, dtype, rates, steps, stages))
    found = [Candidate(config, predict(shapes, n, dtype, config, rates).seconds) for config in configs]
    places = {c: resident(c.config, dtype, rates) * rates.multiprocessors for c in found}
    return sorted(found, key=lambda c: (n == 1 and launched(shapes, n, c.config) > places[c], c.predicted))


def launched(shapes: Sequence[Geometry], n: int, config: LevelConfig) -> int:
    """Programs of a launch that convolve. Those that make gates are short, and start before them."""
    return n * sum(tile.programs(shape) for shape, tile in zip(shapes, config.tiles, strict=True))


def share_out(shapes: Sequence[Geometry], n: int, tiles: Sequence[Tile], programs: float) -> tuple[Tile, ...]:
    """The tiles, with K split so that about `programs` programs have equal work."""
    steps = [tile.steps(shape) * tile.bk for tile, shape in zip(tiles, shapes, strict=True)]
    work = [k * t.bm * t.bn for k, t in zip(steps, tiles, strict=True)]
    share = n * sum(w * t.programs(s) for w, t, s in zip(work, tiles, shapes, strict=True)) / programs
    most = [max(1, min(MOST_SPLITS, k // t.bk // LEAST_STEPS)) for k, t in zip(steps, tiles, strict=True)]
    return tuple(
        replace(tile, split_k=min(limit, max(1, round(w / share))))
        for tile, w, limit in zip(tiles, work, most, strict=True)
    )


def fitted(shapes: Sequence[Geometry], bm: int, bn: int, bk: int, least: int = 16) -> Tile:
    """A tile for all operations of a level, since they run the same code: no wider than the widest of them, and with
    steps of half as many channels where that spares a fifth of the products. least: channels of a step."""
    bn = min(bn, max(16, *(power_of_two(shape.cout // shape.groups) for shape in shapes)))
    if any(shape.planar for shape in shapes):
        return Tile(bm, bn, min(bk, 32))
    bk = max(least, min(bk, max(power_of_two(shape.part) for shape in shapes)))
    whole, half = (sum(_padded(shape, step) for shape in shapes) for step in (bk, bk // 2))
    return Tile(bm, bn, bk // 2 if bk > 32 and half <= 0.8 * whole else bk)


def _padded(shape: Geometry, bk: int) -> int:
    return shape.pixels * shape.cout * shape.inputs * -(-shape.part // bk) * bk


def shared(config: LevelConfig, dtype: torch.dtype) -> int:
    """Bytes of a block's shared memory, for the operands of its products."""
    return max(config.num_stages * (t.bm + t.bn) * t.bk * dtype.itemsize for t in config.tiles)


def resident(config: LevelConfig, dtype: torch.dtype, rates: Rates) -> int:
    """Blocks on a multiprocessor at a time, at most."""
    threads = 32 * config.num_warps
    accumulators = max(tile.bm * tile.bn for tile in config.tiles) // threads
    used = 2 * accumulators + OTHER_IN_FP8 if dtype.itemsize == 1 else accumulators + OTHER_REGISTERS
    by_registers = REGISTERS // (threads * min(used, MOST_REGISTERS))
    return min(by_registers, (rates.shared + 1024) // (shared(config, dtype) + 1024))


def _grid(
    shapes: Sequence[Geometry], n: int, dtype: torch.dtype, rates: Rates, steps: Sequence[int], stages: Sequence[int]
) -> Iterator[LevelConfig]:
    planar, single = any(shape.planar for shape in shapes), dtype == torch.float32
    # copies of half the width, as of groups that begin in the middle of one, need twice the registers
    ragged = dtype.itemsize == 1 and any(shape.groups > 1 and shape.part % COPY for shape in shapes)
    tiles = SINGLE_TILES if single else PICTURE_TILES if planar else TILES
    for (bm, bn, warps), step, depth, share in product(tiles, steps, stages, PROGRAMS):
        least = 32 // dtype.itemsize if dtype.itemsize < 4 else 16  # channels of a tensor core's product
        base = [fitted(shapes, bm, bn, 2 * step // dtype.itemsize // (2 if ragged else 1), least)] * len(shapes)
        depth = 2 if planar else 3 if single else depth
        config = LevelConfig(share_out(shapes, n, base, share * rates.multiprocessors), warps, depth)
        if shared(config, dtype) <= rates.shared:
            yield config
