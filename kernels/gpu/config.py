"""Tile shapes, warps and pipeline stages of each level: an explicit table per GPU, and the model where it is silent.

configs/compute_capability=9.0.json holds the rates of a family's GPU, from which the model chooses.
configs/device_name=NVIDIA_H200.json holds levels that were timed on that GPU. Nothing is tuned inside a user's call.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...errors import ParNetError
from .candidates import candidates
from .geometry import Geometry, Tile
from .model import LevelConfig
from .rates import Rates

CONFIGS = Path(__file__).with_name("configs")


@dataclass(frozen=True)
class Table:
    """rates: of a GPU for which levels are chosen that were not tuned. levels: tuned ones, by `key`. early: whether
    launches may start before those ahead of them have ended, where a GPU has confirmed that it helps."""

    rates: Rates
    levels: Mapping[str, Any]
    early: bool = False

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
        timed = json.loads(tuned.read_text()) if tuned.is_file() else {"levels": {}}
        return cls(Rates(**json.loads(known[max(older)].read_text())), timed["levels"], timed.get("early", False))

    @classmethod
    def of_device(cls, device: torch.device) -> Table:
        """The table for the GPU at hand."""
        return cls.load(torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device))

    def level(self, shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> LevelConfig:
        """What was tuned for these operations on n pictures, else what the rules say."""
        if (tuned := self.levels.get(key(shapes, n, dtype))) is not None:
            return LevelConfig(tuple(Tile(*t) for t in tuned["tiles"]), tuned["num_warps"], tuned["num_stages"])
        return candidates(shapes, n, dtype, self.rates)[0].config


def key(shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> str:
    """A level's name in a table: type, batch, and each operation as HxWxcin>cout/stride, in program order."""
    parts = [f"{s.h}x{s.w}x{s.cin}>{s.cout}/{s.stride}g{s.groups}i{s.inputs}" for s in shapes]
    return f"{str(dtype).removeprefix('torch.')} n{n} " + " + ".join(parts)
