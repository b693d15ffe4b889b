"""The model of a level's time against examples worked by hand."""

from __future__ import annotations

import pytest
import torch

from parallel_parnet.kernels.gpu.convolution import E4M3
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile
from parallel_parnet.kernels.gpu.model import LevelConfig, LevelCosts, floor, operand_bytes, predict
from parallel_parnet.kernels.gpu.rates import Rates

HALF = torch.bfloat16
SHAPE = Geometry(8, 8, 64, 64)  # one tile of 64 pixels x 64 channels, nine steps of 64
RATES = Rates("by hand", bytes=1e12, flops=100e12, multiprocessors=2)
COSTS = LevelCosts(l2=4e12, port=1e12, gap=1e-6, start=2e-6, step=0.1e-6, unit=0, end=3e-6, ticket=4e-6)
ROUND = Tile(64, 64, 64)
READ = 9 * 64 * (64 + 64) * 2  # bytes: nine taps of 64 channels, for 64 pixels and for 64 output channels


def seconds(
    tile: Tile = ROUND, shapes: tuple[Geometry, ...] = (SHAPE,), rates: Rates = RATES, costs: LevelCosts = COSTS
):
    return predict(shapes, 1, HALF, LevelConfig((tile,) * len(shapes), 4, 4), rates, costs)


def test_bytes_of_a_tile():
    assert operand_bytes(SHAPE, ROUND, HALF) == READ
    ragged = Geometry(6, 6, 92, 92)  # 36 pixels; 92 channels in 96 places, in two tiles
    assert operand_bytes(ragged, ROUND, HALF) == 9 * 96 * (36 + 48) * 2
    assert operand_bytes(Geometry(6, 6, 36, 36), ROUND, E4M3) == 9 * 48 * (36 + 48)  # 48 places of a byte
    assert operand_bytes(Geometry(4, 4, 3, 16, planar=True), Tile(16, 16, 32), HALF) == 27 * (16 + 16) * 2


def test_the_floor():
    """All bytes once: pixels in and out, and weights; or all products."""
    once = (8 * 8 * 64 * 2 + 9 * 64 * 64) * 2
    assert floor([SHAPE], 1, HALF, RATES) == once / 1e12
    flops = 2 * 64 * 9 * 64 * 64
    assert floor([SHAPE], 1, HALF, Rates("", 1e15, 1e12, 2)) == flops / 1e12


def test_each_limit():
    around = 1e-6 + 2e-6 + 3e-6  # gap, start and end
    steps = seconds()
    assert steps.limit == "steps" and steps.seconds == pytest.approx(around + 9 * 0.1e-6)
    port = seconds(costs=LevelCosts(**{**vars(COSTS), "port": 1e11}))
    assert port.limit == "multiprocessor" and port.seconds == pytest.approx(around + READ / 1e11)
    l2 = seconds(costs=LevelCosts(**{**vars(COSTS), "l2": 1e10}))
    assert l2.limit == "L2" and l2.seconds == pytest.approx(around + READ / 1e10)
    memory = seconds(rates=Rates("", 1e9, 100e12, 2))
    assert memory.limit == "memory"
    assert memory.seconds == pytest.approx(around + (8 * 8 * 64 * 2 + 9 * 64 * 64) * 2 / 1e9)
    products = seconds(rates=Rates("", 1e12, 1e10, 2))
    assert products.limit == "tensor cores" and products.seconds == pytest.approx(around + 2 * 64 * 64 * 9 * 64 / 1e10)


def test_rounds_of_the_leaders():
    """The tile's 64 channels are gated by one part of 64: one unit, of 200 pictures 200, for 128 leaders in turns."""
    costs = LevelCosts(**{**vars(COSTS), "unit": 1e-3})
    config = LevelConfig((ROUND,), 4, 4)
    assert predict([SHAPE], 1, HALF, config, RATES, costs) == (pytest.approx(6e-6 + 1e-3), "gates")
    assert predict([SHAPE], 200, HALF, config, RATES, costs) == (pytest.approx(6e-6 + 2e-3), "gates")


def test_the_busiest_multiprocessor():
    """Three equal programs on two multiprocessors: one has two."""
    slow = LevelCosts(**{**vars(COSTS), "port": 1e11})
    assert seconds(shapes=(SHAPE,) * 3, costs=slow).seconds == pytest.approx(6e-6 + 2 * READ / 1e11)


def test_splits_share_steps_and_meet():
    """Each of three reads a third, and stores its products, which the last to come reads."""
    costs = LevelCosts(**{**vars(COSTS), "step": 1e-6})
    split = seconds(Tile(64, 64, 64, 3), costs=costs)
    assert split.limit == "steps"
    assert split.seconds == pytest.approx(6e-6 + 3 * 1e-6 + 4e-6 + 3 * 64 * 64 * 4 / 1e12)
