"""This process among the ranks that torchrun started, and its share of the machine's cores."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from parallel_parnet import ParNetError
from parallel_parnet.cores import MOST_THREADS, cores
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
