"""The table of tile shapes: defaults, rules, files of one GPU model."""

from __future__ import annotations

import json

import pytest
import torch

from parallel_parnet import ParNetError
from parallel_parnet.kernels.gpu import config
from parallel_parnet.kernels.gpu.config import LevelConfig, Table, key
from parallel_parnet.kernels.gpu.geometry import Geometry, Tile

HALF = torch.float16
XL_LEVEL_5 = [Geometry(side, side, c, c, gate="identity") for c, side in ((200, 56), (400, 28), (800, 14))]


def test_rules_share_out_the_longest_operation():
    chosen = Table.load((9, 0)).level(XL_LEVEL_5, 1, HALF)
    assert (chosen.num_warps, chosen.num_stages) == (4, 4)
    splits = [tile.split_k for tile in chosen.tiles]
    assert splits[0] == splits[1] == 1 and splits[2] > 1
    tuned = [Tile(64, 64, 64, split) for split in splits]
    assert list(chosen.tiles) == tuned


def test_rules_fill_the_gpu_at_batch_one():
    """A level with fewer tiles than multiprocessors is split until it has at least as many programs."""
    shape = Geometry(14, 14, 800, 3200, stride=2)
    (tile,) = Table.load((9, 0)).level([shape], 1, HALF).tiles
    assert Tile().programs(shape) < 132 <= tile.programs(shape)


def test_rules_take_large_tiles_and_no_split_for_large_batches():
    chosen = Table.load((9, 0)).level(XL_LEVEL_5, 64, HALF)
    assert chosen == LevelConfig((Tile(128, 64, 64),) * 3, 8, 4)


def test_no_tile_is_wider_than_its_operation():
    (tile,) = Table.load((9, 0)).level([Geometry(8, 8, 3, 20, planar=True, stride=2)], 1, HALF).tiles
    assert (tile.bn, tile.bk, tile.split_k) == (32, 32, 1)


def test_newer_gpus_take_the_newest_defaults_and_older_ones_are_refused():
    assert Table.load((12, 0)).defaults == Table.load((9, 0)).defaults
    assert Table.load((8, 9)).defaults == Table.load((8, 0)).defaults
    with pytest.raises(ParNetError, match="compute capability"):
        Table.load((7, 5))


def test_a_tuned_level_overrides_the_rules_and_a_missing_file_is_said(tmp_path, monkeypatch):
    for path in config.CONFIGS.glob("compute_capability=*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    tuned = {"tiles": [[128, 64, 64, 1], [64, 64, 64, 2], [64, 64, 64, 5]], "num_warps": 4, "num_stages": 3}
    levels = {key(XL_LEVEL_5, 1, HALF): tuned}
    (tmp_path / "device_name=NVIDIA_H200.json").write_text(json.dumps({"levels": levels}))
    monkeypatch.setattr(config, "CONFIGS", tmp_path)
    table = Table.load((9, 0), "NVIDIA H200")
    assert table.level(XL_LEVEL_5, 1, HALF) == LevelConfig((Tile(128), Tile(split_k=2), Tile(split_k=5)), 4, 3)
    assert table.level(XL_LEVEL_5, 2, HALF) == Table.load((9, 0)).level(XL_LEVEL_5, 2, HALF)
    with pytest.warns(UserWarning, match="no tuned kernels for NVIDIA Unheard"):
        Table.load((9, 0), "NVIDIA Unheard")
