"""This process among the ranks that torchrun started, and its share of the machine's cores."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel_parnet import ParNetError
from parallel_parnet.engine import MOST_THREADS
from parallel_parnet.executors.available import find_device

DIGITS = 20


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started; alone without torchrun."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; other launchers leave the local ones
        out, whose ranks then count as this machine's. ParNetError where they cannot be right."""
        world = _variable("WORLD_SIZE", 1, 1)
        if world > 1 and "RANK" not in os.environ:
            raise ParNetError(
                f"WORLD_SIZE='{world}' in the environment without RANK: torchrun sets both, else unset both"
            )
        rank = _variable("RANK", 0, 0, world - 1)
        local_world = _variable("LOCAL_WORLD_SIZE", world, 1, world)
        return cls(rank, world, _variable("LOCAL_RANK", rank % local_world, 0, local_world - 1), local_world)

    def take_threads(self, wanted: int | None = None) -> int:
        """Give this process as many threads as are `wanted`, else, where it is alone, as OMP_NUM_THREADS says (which
        torchrun sets to 1 for ranks), else its share of the cores, at least one; and say how many."""
        asked = os.environ.get("OMP_NUM_THREADS", "") if self.world == 1 else ""
        if wanted is not None and not 1 <= wanted <= MOST_THREADS:
            raise ParNetError(f"--threads {wanted}: must be at least 1, and at most {MOST_THREADS}")
        threads = wanted or within(asked, 1, MOST_THREADS) or max(1, cores() // self.local_world)
        torch.set_num_threads(threads)
        return threads

    def device(self, wanted: str | None) -> torch.device:
        """The device of this rank: ranks of one machine take its GPUs in turn."""
        device = find_device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and self.world > 1:
            return torch.device("cuda", self.local_rank % max(1, torch.cuda.device_count()))
        return device


def cores() -> int:
    """That this process may use: those it is bound to, or fewer where a control group grants less time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *(math.floor(quota) for quota in quotas())]))


def quotas(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Cores' worth of time that control groups of version 2 or 1 grant, of this process's own and those above it."""
    lines = own.read_text().splitlines() if own.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        for folder in {top, *(top / path.strip("/")).parents, top / path.strip("/")}:
            if (file := folder / "cpu.max").is_file():
                quota, period = file.read_text().split()
            elif (file := folder / "cpu.cfs_quota_us").is_file():
                quota, period = file.read_text().strip(), (folder / "cpu.cfs_period_us").read_text().strip()
            else:
                continue
            if quota.isdecimal():  # neither "max" nor -1
                yield int(quota) / int(period)


def _variable(name: str, default: int, least: int, most: int = 1 << 20) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if (number := within(text, least, most)) is None:
        raise ParNetError(
            f"{name}={text!r} in the environment: torchrun sets {least} to {most}; without it, unset {name}"
        )
    return number


def within(text: str, least: int, most: int) -> int | None:
    """The number that a text says, None for any other text: also for digits by the thousand, which int refuses."""
    number = int(text) if text.isdecimal() and len(text) <= DIGITS else -1
    return number if least <= number <= most else None
