"""Tile shapes, warps and pipeline stages of each level: an explicit table per GPU, and the model where it is silent.

configs/tuned.NVIDIA_H200.json holds levels that were timed on that GPU, configs/warpgroups.NVIDIA_H200.json those of
the kernel for a Hopper's warpgroups. Nothing is tuned inside a user's call.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...errors import ParNetError
from .candidates import candidates
from .geometry import Geometry, Tile, WarpTile
from .model import LevelConfig
from .rates import Rates, family_rates

CONFIGS = Path(__file__).with_name("configs")
HALF = (torch.float16, torch.bfloat16)
HOPPER = (9, 0)
LEAST = 'extern "C" __global__ void level() { asm volatile("wgmma.fence.sync.aligned;"); }'
# whose tuned levels GPUs of just this compute capability take that have none of their own: a newer one may have less
# shared memory, and other products
INSTEAD = {HOPPER: "NVIDIA H200"}


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
    def load(
        cls, capability: tuple[int, int], device_name: str = "", warpgroups: bool = False, multiprocessors: int = 0
    ) -> Table:
        """The table for a GPU; where its model has none, which is said, that of a sister or the defaults of its compute
        capability. Without a name, the defaults. warpgroups: with the levels of the kernel for a Hopper's.
        multiprocessors: of the GPU, which its family's need not have; 0 for as many."""
        rates, instead = family_rates(capability, multiprocessors), INSTEAD.get(capability, "")
        gpus = device_name, instead
        kernels = ("tuned", "warpgroups") if warpgroups and capability == HOPPER else ("tuned",)
        names = [tuned_name(device_name, kernel) for kernel in kernels if device_name]
        if lacking := [name for name in names if not (CONFIGS / name).is_file()]:
            taken = f"those timed on an {instead}" if instead else "the defaults"
            warnings.warn(f"no tuned kernels for {device_name}, {', '.join(lacking)}: taking {taken}", stacklevel=2)
        of_hopper = _levels(gpus, "warpgroups") if "warpgroups" in kernels else {}
        return cls(rates, _levels(gpus, "tuned") if device_name else {}, of_hopper)

    @classmethod
    def of_device(cls, device: torch.device) -> Table:
        """The table for the GPU at hand."""
        capability, name = torch.cuda.get_device_capability(device), torch.cuda.get_device_name(device)
        if reason := refused(device) if capability == HOPPER else None:
            warnings.warn(f"{reason}: Triton's kernels run where others are faster", stacklevel=2)
        count = torch.cuda.get_device_properties(device).multi_processor_count
        return cls.load(capability, name, warpgroups=not reason, multiprocessors=count)

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


@cache
def refused(device: torch.device) -> str | None:
    """Why the kernel for warpgroups cannot run on this Hopper, where the least of its kind does not: the bindings or
    NVRTC are not there, NVRTC is too old, or newer than the driver."""
    try:
        from ..hopper import launch  # here, since it needs the bindings

        launch.loaded(LEAST, 0, device)
    except (ImportError, RuntimeError, ParNetError) as error:
        return str(error)
    return None


def tuned_name(gpu: str, kernel: str = "tuned") -> str:
    """Of a GPU's table, in letters, digits, ".", "_" and "-" alone: tuned.NVIDIA_H200.json."""
    return f"{kernel}.{re.sub('[^A-Za-z0-9._-]+', '_', gpu)}.json"


def _levels(gpus: Sequence[str], kernel: str) -> dict[str, Any]:
    """Of the first GPU that has a table for the kernel."""
    return next(filter(None, (read_levels(CONFIGS / tuned_name(gpu, kernel)) for gpu in gpus)), {})


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
