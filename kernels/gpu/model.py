"""How long a level may take, from what its programs move and multiply: a model, never a measurement.

A level is a launch. Its time is the gap before it, the start of its programs, the longest of six things that go on
side by side, and the end of the last program. The constants stand in `LevelCosts`; what was measured on an H200, and
how far the model is from measured levels, is in docs/kernels.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .geometry import MOST_LEADERS, Geometry, Tile, padded_channels
from .rates import Rates

SORTED = 4096  # programs; of more, the queue for the multiprocessors is as good as even


@dataclass(frozen=True)
class LevelConfig:
    """A tile for each operation of a level, in program order, and what they share."""

    tiles: tuple[Tile, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class LevelCosts:
    """Seconds, or bytes a second. l2: from the L2 cache to all multiprocessors. port: to one of them. gap: between two
    launches of a CUDA graph. start: until a program's first operands are there. step: the least that a step takes.
    unit: of gate work. end: bias, gate, activation and stores. ticket: to meet the other splits of a tile.
    """

    l2: float = 7.5e12
    port: float = 82e9
    gap: float = 0.7e-6
    start: float = 1.5e-6
    step: float = 0.12e-6
    unit: float = 2.3e-6
    end: float = 1.2e-6
    ticket: float = 1.2e-6


class Prediction(NamedTuple):
    """seconds: of the launch and the gap before it. limit: which of the six things takes longest."""

    seconds: float
    limit: str


def predict(
    shapes: Sequence[Geometry],
    n: int,
    dtype: torch.dtype,
    config: LevelConfig,
    rates: Rates,
    costs: LevelCosts = LevelCosts(),
) -> Prediction:
    """A level of n pictures. The six things: "memory", everything once; "tensor cores", whole tiles; "L2", what all
    programs read; "multiprocessor", what the busiest one reads; "steps", those of the longest program; "gates", the
    rounds of the leaders.
    """
    units = n * sum(tile.units(shape) for shape, tile in zip(shapes, config.tiles, strict=True))
    flops, queue, longest, ends = 0.0, [], 0.0, 0.0
    for shape, tile in zip(shapes, config.tiles, strict=True):
        steps, programs = tile.steps(shape) / tile.split_k, n * tile.programs(shape)
        flops += programs * steps * 2 * tile.bm * tile.bn * tile.bk
        longest = max(longest, steps * costs.step)
        partial = tile.bm * tile.bn * 4 if tile.split_k > 1 else 0
        queue += [(operand_bytes(shape, tile, dtype) / tile.split_k + partial) / costs.port] * programs
        if partial:
            ends = max(ends, costs.ticket + tile.split_k * partial / costs.port)
    limits = {
        "memory": sum(_bytes_once(shape, n, dtype) for shape in shapes) / rates.bytes,
        "tensor cores": flops / rates.flops,
        "L2": sum(queue) * costs.port / costs.l2,
        "multiprocessor": _busiest(queue, rates.multiprocessors),
        "steps": longest,
        "gates": -(-units // MOST_LEADERS) * costs.unit,
    }
    limit = max(limits, key=limits.__getitem__)
    return Prediction(costs.gap + costs.start + limits[limit] + ends + costs.end, limit)


def floor(shapes: Sequence[Geometry], n: int, dtype: torch.dtype, rates: Rates) -> float:
    """Seconds below which these operations cannot run: all arithmetic, or all bytes once."""
    flops = sum(2 * n * s.pixels * s.k * s.cout for s in shapes)
    return rates.floor(flops, sum(_bytes_once(shape, n, dtype) for shape in shapes))


def operand_bytes(shape: Geometry, tile: Tile, dtype: torch.dtype) -> float:
    """What the programs of one tile read, on average: pixels for every tap, and the weights of its channels."""
    rows = shape.pixels / tile.spatial(shape)
    columns = padded_channels(shape.cout // shape.groups, dtype.itemsize) * shape.groups / tile.channels(shape)
    depth = shape.k if shape.planar else shape.taps * shape.inputs * padded_channels(shape.part, dtype.itemsize)
    return depth * (rows + columns) * dtype.itemsize


def _bytes_once(shape: Geometry, n: int, dtype: torch.dtype) -> int:
    pixels = n * (shape.h * shape.w * shape.cin + shape.pixels * shape.cout * (2 if shape.residual else 1))
    return (pixels + shape.k * shape.cout) * dtype.itemsize


def _busiest(queue: Sequence[float], multiprocessors: int) -> float:
    """The busiest multiprocessor's share, where each program goes to whichever has least to do, the longest first."""
    if len(queue) > SORTED:
        return sum(queue) / multiprocessors + max(queue)
    shares = [0.0] * multiprocessors
    for seconds in sorted(queue, reverse=True):
        heapq.heapreplace(shares, shares[0] + seconds)
    return max(shares)
