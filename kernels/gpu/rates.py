"""How fast a GPU can be at best, and the time below which nothing can fall on it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Of one GPU, for one type of numbers. gpu: its name. bytes and flops: per second, as measured."""

    gpu: str
    bytes: float
    flops: float
    multiprocessors: int

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that `flops` operations or `moved` bytes take at least, whichever takes longer."""
        return max(flops / self.flops, moved / self.bytes)


# measured on an H200: a device-to-device copy, bytes read and written; an 8192^3 bf16 product of random numbers
H200 = Rates("NVIDIA H200", 4.3e12, 790e12, 132)
