"""Tile shapes, warps and pipeline stages of each level: an explicit table per GPU, and the model where it is silent.

configs/compute_capability=9.0.json holds the rates of a family's GPU, from which the model chooses.
configs/tuned.NVIDIA_H200.json holds levels that were timed on that GPU, configs/warpgroups.NVIDIA_H200.json those of
the kernel for a Hopper's warpgroups. Nothing is tuned inside a user's call.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import ParNetError
from .candidates import candidates
from .geometry import Geometry, Tile, WarpTile
from .model import LevelConfig
from .rates import Rates

CONFIGS = Path(__file__).with_name("configs")
HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)
# whose tuned levels GPUs of a compute capability take that have none of their own
INSTEAD: dict[tuple[int, ...], str] = {HOPPER: "NVIDIA H200"}


@dataclass(frozen=True)
class Table:
    """rates: of a GPU for which levels are chosen that were not tuned. levels: tuned ones, by `key`. warpgroups: those
    that the kernel for a Hopper's warpgroups takes, none where there is no such kernel. ahead: whether it sends for the
    weights of the next launch."""

    rates: Rates
    levels: Mapping[str, Any]
    warpgroups: Mapping[str, Any] = field(default_factory=dict)
    ahead: bool = False

    @classmethod
    def load(cls, capability: tuple[int, int], device_name: str | None = None) -> Table:
        """The table for a GPU; where its model has none, which is said, that of a sister or the defaults of its compute
        capability. Without a name, the defaults."""
        known = {tuple(map(int, p.stem.split("=")[1].split("."))): p for p in CONFIGS.glob("compute_capability=*.json")}
        older = [version for version in known if version <= capability]
        if not older:
            raise ParNetError(f"compute capability {capability}: the kernels need {min(known)} or newer")
        rates = Rates(**json.loads(known[max(older)].read_text()))
        path, instead = CONFIGS / tuned_name(device_name or ""), INSTEAD.get(max(older))
        if device_name and not path.is_file():
            taken = f"those timed on an {instead}" if instead else "the defaults"
            warnings.warn(f"no tuned kernels for {device_name}: taking {taken}", stacklevel=2)
            path = CONFIGS / tuned_name(instead or "")
        return cls(rates, read_levels(path))

    @classmethod
    def of_device(cls, device: torch.device) -> Table:
        """The table for the GPU at hand."""
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        table = cls.load(capability, name)
        if capability == HOPPER and not bindings():
            warnings.warn("no cuda-bindings, or no NVRTC: Triton's kernels run where others are faster", stacklevel=2)
            return table
        return table.with_warpgroups(capability, name)

    def with_warpgroups(self, capability: tuple[int, int], device_name: str) -> Table:
        """This table and, for a Hopper, the levels of the kernel for its warpgroups, or those of a sister."""
        if capability != HOPPER:
            return self
        paths = [CONFIGS / tuned_name(name, "warpgroups") for name in (device_name, INSTEAD[HOPPER])]
        known = [path for path in paths if path.is_file()]
        return replace(self, warpgroups=read_levels(known[0])) if known else self

    def level(self, shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> LevelConfig:
        """What was tuned for these operations on n pictures, else what the rules say."""
        if (tuned := self.levels.get(key(shapes, n, dtype))) is not None:
            return LevelConfig(tuple(Tile(*t) for t in tuned["tiles"]), tuned["num_warps"], tuned["num_stages"])
        return candidates(shapes, n, dtype, self.rates)[0].config

    def of_warpgroups(self, shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> tuple[WarpTile, ...] | None:
        """The tiles of a level that the kernel for warpgroups takes."""
        timed = self.warpgroups.get(key(shapes, n, dtype)) if dtype in HALF else None
        return None if timed is None else tuple(WarpTile(*tile) for tile in timed["tiles"])


def bindings() -> bool:
    """Whether CUDA's own bindings for Python and its run-time compiler can be used, as torch brings them along where it
    is built for CUDA."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError):
        return False
    return True


def tuned_name(gpu: str, kernel: str = "tuned") -> str:
    """Of a GPU's table, in letters, digits, ".", "_" and "-" alone: tuned.NVIDIA_H200.json."""
    return f"{kernel}.{re.sub('[^A-Za-z0-9._-]+', '_', gpu)}.json"


def read_levels(path: Path) -> dict[str, Any]:
    """The levels of a table of this GPU's model, by `key`; none where there is no such file."""
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text())["levels"]
    except (OSError, ValueError, KeyError) as error:
        raise ParNetError(f"{path}: not a table of configurations ({error})") from None


def key(shapes: Sequence[Geometry], n: int, dtype: torch.dtype) -> str:
    """A level's name in a table: bits of a number, batch, and each operation as HxWxcin>cout/stride, with its kernel
    where it has no gate, in program order. Both types of 16 bits share their entries: on an H200 a pass in one takes
    within 3% of one in the other."""
    kernels = [f"k{s.kernel}" if s.gate == "none" else "" for s in shapes]
    parts = [
        f"{s.h}x{s.w}x{s.cin}>{s.cout}/{s.stride}g{s.groups}i{s.inputs}{kernel}"
        for s, kernel in zip(shapes, kernels, strict=True)
    ]
    return f"{8 * dtype.itemsize}-bit n{n} " + " + ".join(parts)
