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


# of a family's GPU, by the compute capability from which on it counts: from these the model chooses
FAMILIES = {
    (8, 0): Rates("NVIDIA A100", 1.4e12, 250e12, 108),
    (9, 0): Rates("NVIDIA H100 or H200", 3.0e12, 790e12, 132),
}

# measured on an H200: a device-to-device copy, bytes read and written; an 8192^3 bf16 product of random numbers
H200 = Rates("NVIDIA H200", 4.3e12, 790e12, 132)
