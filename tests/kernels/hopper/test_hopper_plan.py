"""How levels are cut for a Hopper's warpgroups: what fits, what covers, what the committed table holds."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from conftest import ROOT
from parallel_parnet import ParNetError
from parallel_parnet.commands.gpu.level_tuning import levels_of
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.commands.gpu.warpgroups import chosen
from parallel_parnet.kernels.gpu import config
from parallel_parnet.kernels.gpu.config import Table, key
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile, WarpTile
from parallel_parnet.kernels.gpu.level import level
from parallel_parnet.kernels.gpu.packing import pack_weight, unpack_weight, weight_blocks
from parallel_parnet.kernels.gpu.rates import H200
from parallel_parnet.kernels.gpu.samples import convolution, geometry
from parallel_parnet.kernels.hopper import plan
from parallel_parnet.kernels.hopper.source import POINTERS, numbers, source

HALF = torch.bfloat16
# made while modules load, before a fixture fills new tensors
LEVELS = {
    level.key: level
    for variant in ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")
    for level in levels_of(shapes_of(variant), 1, HALF)
    if all(map(plan.takes, level.shapes))
}


def test_weights_come_back_as_they_were():
    for kind in ("identity", "plain", "fusion_down"):
        shape, tile = geometry(kind, 9, 7, 44 if kind != "fusion_down" else 96), WarpTile(64, 32, 48, 2, 2)
        weight = torch.randn(shape.cout, shape.cin // shape.groups, 3, 3, dtype=HALF)
        packed = pack_weight(weight, shape, tile, HALF)
        assert packed.shape == weight_blocks(shape, tile, HALF)
        assert torch.equal(unpack_weight(packed, shape, tile), weight)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (14, 14), (28, 28), (9, 64)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_every_pixel_is_in_one_tile(size, stride):
    """Numbered along rows one longer than the picture's, the last pixel lies in the last tile."""
    shape, tile = Geometry(*size, 64, 64, stride), WarpTile(64, 64, 64, 1, 2)
    last = (shape.hout - 1) * tile.pitch(shape) + shape.wout - 1
    assert (tile.spatial(shape) - 1) * tile.bm <= last < tile.spatial(shape) * tile.bm


def test_the_model_by_hand():
    """14 x 14 pixels are 209 numbers, four tiles of 64; a block has nine steps of 64 channels, and 96 pixels of eight
    pieces to fetch, six for each of its 128 threads."""
    shape, costs = Geometry(14, 14, 64, 64), plan.WarpCosts(5e-6, 2.0, 1e-7, 1e-8, 2e-6, {1: 0.0, 2: 1e-6, 8: 1e-6})
    products = 2.0 * 4 * 32 / plan.CLOCK
    block = 5e-6 + 9 * (products + 1e-7) + 6 * 1e-8
    assert plan.predict([shape], [WarpTile(64, 64, 64, 1, 2)], 1, costs) == pytest.approx(block)
    assert plan.predict([shape], [WarpTile(64, 64, 64, 1, 2)], 100, costs) == pytest.approx(4 * block)  # 400 for 132
    split = 5e-6 + 4.5 * (products + 1e-7) + 3 * 1e-8 + 1e-6
    assert plan.predict([shape], [WarpTile(64, 64, 64, 2, 2)], 1, costs) == pytest.approx(split)
    two = 5e-6 + 2e-6 + 9 * (2 * products + 1e-7) + 160 * 8 / 256 * 1e-8  # two tiles of 128, which read 160 pixels
    assert plan.predict([shape] * 2, [WarpTile(128, 64, 64, 1, 2)] * 2, 1, costs) == pytest.approx(two)
    eighth = 5e-6 + 9 / 8 * (products + 1e-7) + 6 / 8 * 1e-8 + 1e-6
    assert plan.predict([shape], [WarpTile(64, 64, 64, 8, 2)], 4, costs) == pytest.approx(2 * eighth)  # 16 for 15


def timed(file: str, us: str) -> dict[str, list[tuple[float, float]]]:
    """Of each level, what the model says of the launches that were timed, and what they took, in microseconds."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in (ROOT / "results" / file).read_text().splitlines():
        row = json.loads(line)
        if row.get("what") == "level":
            tiles = [WarpTile(*tile) for tile in row["tiles"]]
            predicted = plan.predict(LEVELS[row["level"]].shapes, tiles, 1) * 1e6
            found.setdefault(row["level"], []).append((predicted, row[us]))
    return found


def test_the_model_knows_timed_levels():
    launches = [each for rows in timed("hopper-clocks-nvidia-h200.jsonl", "us").values() for each in rows]
    errors = [abs(predicted / us - 1) for predicted, us in launches]
    assert len(errors) == 29 and statistics.median(errors) < 0.06 and max(errors) < 0.27


def test_the_model_finds_good_tiles():
    """Of the many candidates of the kernel's first form: how much longer than the best its first choice takes."""
    levels = timed("hopper-trials-nvidia-h200.jsonl", "early")
    first = [min(rows)[1] / min(us for _, us in rows) for rows in levels.values()]
    assert levels.keys() == LEVELS.keys() and sum(map(len, levels.values())) == 672
    assert statistics.geometric_mean(first) < 1.06 and max(first) < 1.18


def assert_fit(shapes: Sequence[Geometry], tiles: Sequence[WarpTile]) -> None:
    room = max(plan.room(shape, tiles[0].bm) for shape in shapes)
    assert len({tile.bm for tile in tiles}) == 1
    assert 1024 + max(plan.shared(s, t, room) for s, t in zip(shapes, tiles, strict=True)) <= 228 * 1024
    assert all(tile.bn % (8 * tile.split_k) == 0 and tile.stages >= 2 for tile in tiles)
    assert all(t.steps(s) >= t.split_k for s, t in zip(shapes, tiles, strict=True)), "a step for each"


def test_candidates_fit_and_the_most_promising_come_first():
    for wanted in random.sample(list(LEVELS.values()), 6):
        found = plan.candidates(wanted.shapes, 1)
        assert [seconds for seconds, _ in found] == sorted(seconds for seconds, _ in found)
        for _, tiles in random.sample(found, 100):
            assert_fit(wanted.shapes, tiles)
        by_kind = {(tiles[0].bm, tiles[0].taps) for _, tiles in found}
        assert by_kind == {(bm, taps) for bm in plan.PIXELS for taps in plan.TAPS}


def drawn(shape: Geometry, bm: int) -> WarpTile:
    """Any tile of so many pixels that the launch could have, with as few stages as it may."""
    split = random.choice((1, 2, 4, 8))
    most = shape.cout // shape.groups // (8 * split) + 1
    chunk = random.choice((16, 32, 48, 64) if shape.stride == 2 else plan.CHUNKS)
    return WarpTile(bm, 8 * split * random.randint(1, max(1, min(most, 208 // (8 * split)))), chunk, split, 2, taps=3)


def test_nothing_beats_the_most_promising():
    """By its prediction, of many tiles that are drawn those that fit."""
    wanted, fit = random.choice(list(LEVELS.values())), 0
    best = plan.candidates(wanted.shapes, 1)[0][0]
    for _ in range(3000):
        bm = random.choice(plan.PIXELS)
        tiles = [drawn(shape, bm) for shape in wanted.shapes]
        room = max(plan.room(shape, bm) for shape in wanted.shapes)
        pairs = list(zip(wanted.shapes, tiles, strict=True))
        if all(plan.shared(s, t, room) <= H200.shared and t.steps(s) >= t.split_k for s, t in pairs):
            fit += 1
            assert plan.predict(wanted.shapes, tiles, 1) >= best * 0.999, tiles
    assert fit > 100


def test_what_is_timed():
    """Of each kind some; and first what the table has, so that being tuned anew makes no GPU slower."""
    wanted, table = random.choice(list(LEVELS.values())), Table.load((9, 0), "NVIDIA H200", warpgroups=True)
    found, promising = chosen(wanted, 24, table), chosen(wanted, 24, replace(table, warpgroups={}))
    assert found[0] == table.of_warpgroups(wanted.shapes, 1, HALF)
    assert found[1:] == [tiles for tiles in promising if tiles != found[0]][:23]
    assert {(t[0].bm, t[0].taps) for t in promising} == {(bm, taps) for bm in plan.PIXELS for taps in plan.TAPS}


def test_the_timed_levels_are_those_of_the_networks():
    """With every level that the kernel takes, and nothing that does not fit."""
    table = Table.load((9, 0), "NVIDIA H200", warpgroups=True)
    assert set(table.warpgroups) == set(LEVELS)
    for wanted in LEVELS.values():
        tiles = table.of_warpgroups(wanted.shapes, 1, HALF)
        room = max(plan.room(shape, tiles[0].bm) for shape in wanted.shapes)
        assert all(plan.shared(s, t, room) <= H200.shared for s, t in zip(wanted.shapes, tiles, strict=True))
    some = next(iter(LEVELS.values())).shapes
    assert table.of_warpgroups(some, 1, torch.float32) is None and table.of_warpgroups(some, 2, HALF) is None


def test_only_hoppers_have_the_table_and_a_sister_takes_it(monkeypatch, tmp_path):
    assert not Table.load((9, 0), "NVIDIA H200").warpgroups
    assert not Table.load((8, 0), "NVIDIA H200", warpgroups=True).warpgroups
    with pytest.warns(UserWarning, match="no tuned kernels for NVIDIA H100"):
        assert Table.load((9, 0), "NVIDIA H100 80GB HBM3", warpgroups=True).warpgroups
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    assert not Table.load((9, 0), warpgroups=True).warpgroups


def test_a_launch_is_described_for_its_operations():
    tiles = WarpTile(64, 32, 32, 2, 2), WarpTile(64, 64, 32, 1, 3)
    kinds = geometry("identity", 14, 14, 64), geometry("down", 28, 28, 32)
    pair = [convolution(shape, tile, 1, HALF, 0) for shape, tile in zip(kinds, tiles, strict=True)]
    made, whole = numbers(pair), source(pair)
    # 210 numbers in four tiles of 64 x two of 32 channels x two splits; one of 41 channels, two to a cluster
    assert [s.blocks for s in made] == [16, 4] and whole.blocks == 20 and whole.cluster == 2
    assert [s.first for s in made] == [4, 0] and whole.threads == 256  # the longest first
    assert len(POINTERS) == 13 and all(hasattr(pair[0].x, name) for name in POINTERS)


def test_what_the_kernels_do_not_take_is_refused():
    ungated = convolution(geometry("residual", 9, 9, 32), WarpTile(64, 32, 32, 1, 2), 1, HALF, 0)
    with pytest.raises(ParNetError, match="not for warpgroups"):
        source([ungated])
    with pytest.raises(ParNetError, match="not for warpgroups"):
        source([convolution(geometry("plain", 9, 9, 32), Tile(), 1, HALF, 0)])
    with pytest.raises(ParNetError, match="tiles of one bm"):
        source([convolution(geometry("plain", 9, 9, 32), WarpTile(bm, 32, 32, 1, 2), 1, HALF, 0) for bm in (64, 128)])
    with pytest.raises(ParNetError, match="fewer steps than blocks"):
        source([convolution(geometry("plain", 9, 9, 32), WarpTile(64, 32, 32, 4, 2, taps=9), 1, HALF, 0)])
    with pytest.raises(ParNetError, match="not for Triton's kernels"):
        level([convolution(geometry("plain", 9, 9, 32), WarpTile(64, 32, 32, 1, 2), 1, HALF, 0)])
    for wrong in (
        (63, 32, 32, 1, 2),
        (64, 24, 32, 2, 2),
        (64, 32, 24, 1, 2),
        (64, 32, 32, 3, 2),
        (64, 32, 32, 1, 16),
        (64, 32, 32, 1, 2, 2),
    ):
        with pytest.raises(ParNetError, match=r"bm in steps|stages at most|taps 1, 3 or 9"):
            WarpTile(*wrong)


def test_keys_name_levels_alike_for_both_kernels():
    shapes = [geometry("identity", 14, 14, 64)]
    assert key(shapes, 1, torch.float16) == key(shapes, 1, HALF)
