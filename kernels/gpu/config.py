"""Tile shapes, warps and pipeline stages of each level: an explicit table per GPU, and rules where it is silent.

configs/compute_capability=9.0.json holds the default tiles of a family of GPUs. configs/device_name=NVIDIA_H200.json
holds levels that were timed on that GPU. Nothing is tuned inside a user's call.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import ParNetError
from .geometry import Geometry, Tile, power_of_two

CONFIGS = Path(__file__).with_name("configs")
LEAST_STEPS = 8  # a program with fewer steps of K spends its time on starting and finishing
MOST_SPLITS = 16


@dataclass(frozen=True)
class LevelConfig:
    """A tile for each operation of a level, in program order, and what they share."""

    tiles: tuple[Tile, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Table:
    """defaults: "multiprocessors", and bm, bn, bk, num_warps, num_stages for "half", "large", "single" and "picture".

    levels: tuned levels by `key`.
    """

    defaults: Mapping[str, Any]
    levels: Mapping[str, Any]

    @classmethod
    def load(cls, capability: tuple[int, int], device_name: str | None = None) -> Table:
        """The table for a GPU; where its model has none, said once, the defaults of its compute capability."""
        known = {tuple(map(int, p.stem.split("=")[1].split("."))): p for p in CONFIGS.glob("compute_capability=*.json")}
        older = [version for version in known if version <= capability]
        if not older:
            raise ParNetError(f"compute capability {capability}: the kernels need {min(known)} or newer")
        tuned = CONFIGS / f"device_name={(device_name or '').replace(' ', '_')}.json"
        if device_name and not tuned.is_file():
            warnings.warn(f"no tuned kernels for {device_name}: taking the defaults", stacklevel=2)
        levels = json.loads(tuned.read_text())["levels"] if tuned.is_file() else {}
        return cls(json.loads(known[max(older)].read_text()), levels)

    @classmethod
    def of_device(cls, device: torch.device) -> Table:
        """The table for the GPU at hand."""
        return cls.load(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))

    def level(self, shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> LevelConfig:
        """What was tuned for these operations on n pictures, else what the rules say."""
        if (tuned := self.levels.get(key(shapes, n, dtype))) is not None:
            return LevelConfig(tuple(Tile(*t) for t in tuned["tiles"]), tuned["num_warps"], tuned["num_stages"])
        return self._by_rule(shapes, n, dtype)

    def _by_rule(self, shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> LevelConfig:
        """Small tiles unless there are enough to keep every multiprocessor busy several times over.

        Split-K then shares the longest operations out, so that no program has much more to do than the average
        multiprocessor's half: at batch 1 the deep, small features would else leave most of the GPU idle.
        """
        processors = self.defaults["multiprocessors"]
        if dtype == torch.float32:
            choice = "single"
        elif any(shape.planar for shape in shapes):
            choice = "picture"
        else:
            half = self.defaults["half"]
            tiles = [_tile(shape, Tile(half["bm"], half["bn"], half["bk"])) for shape in shapes]
            programs = n * sum(tile.programs(shape) for tile, shape in zip(tiles, shapes, strict=True))
            choice = "large" if programs > 6 * processors else "half"
        base = self.defaults[choice]
        shared = share_out(shapes, n, Tile(base["bm"], base["bn"], base["bk"]), 2 * processors)
        return LevelConfig(shared, base["num_warps"], base["num_stages"])


def share_out(shapes: Sequence[Geometry], n: int, base: Tile, programs: int) -> tuple[Tile, ...]:
    """The base tile for each operation, with K split so that about `programs` programs have equal work."""
    tiles = [_tile(shape, base) for shape in shapes]
    steps = [-(-shape.k // tile.bk) for tile, shape in zip(tiles, shapes, strict=True)]
    work = n * sum(k * t.programs(s) for k, t, s in zip(steps, tiles, shapes, strict=True))
    share = max(LEAST_STEPS, work / programs)
    splits = [min(MOST_SPLITS, max(1, round(k / share))) for k in steps]
    return tuple(replace(tile, split_k=split) for tile, split in zip(tiles, splits, strict=True))


def key(shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> str:
    """A level's name in a table: type, batch, and each operation as HxWxcin>cout/stride, in program order."""
    parts = [f"{s.h}x{s.w}x{s.cin}>{s.cout}/{s.stride}g{s.groups}i{s.inputs}" for s in shapes]
    return f"{str(dtype).removeprefix('torch.')} n{n} " + " + ".join(parts)


def _tile(shape: Geometry, base: Tile) -> Tile:
    """The base tile, no wider than the operation needs."""
    bn = min(base.bn, max(16, power_of_two(shape.cout // shape.groups)))
    return Tile(base.bm, bn, min(base.bk, max(16, power_of_two(shape.k // shape.inputs))))
