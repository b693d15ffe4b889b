"""What a GPU has, how fast it can be at best, and the time below which nothing can fall on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from ...errors import ParNetError

Value = TypeVar("Value")
REGISTERS = 65536  # of a multiprocessor, 32 bits each
MOST_REGISTERS = 255  # of a thread
# KB of shared memory that a block may have, by the compute capability from which on it counts: CUDA's programming guide
SHARED_KB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


@dataclass(frozen=True)
class Rates:
    """How fast one GPU is, for one type of numbers. gpu: its name. bytes and flops: per second, as measured. shared:
    bytes that a block may have; where it is not told, what every GPU has."""

    gpu: str
    bytes: float
    flops: float
    multiprocessors: int
    shared: int = 1024 * min(SHARED_KB.values())

    def floor(self, flops: float, moved: float) -> float:
        """Seconds that `flops` operations or `moved` bytes take at least, whichever takes longer."""
        return max(flops / self.flops, moved / self.bytes)


# of a family's GPU, by the compute capability from which on it counts: from these the model chooses
FAMILIES = {
    (8, 0): Rates("NVIDIA A100", 1.4e12, 250e12, 108),
    (9, 0): Rates("NVIDIA H100 or H200", 3.0e12, 790e12, 132),
}

# measured on an H200: a device-to-device copy, bytes read and written; an 8192^3 bf16 product of random numbers
H200 = Rates("NVIDIA H200", 4.3e12, 790e12, 132, 227 * 1024)


def block_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that a block may have."""
    return 1024 * _of_family(SHARED_KB, capability)


def family_rates(capability: tuple[int, int], multiprocessors: int = 0) -> Rates:
    """Of a GPU that was not measured: its family's, with its own shared memory and, where told, multiprocessors."""
    family = _of_family(FAMILIES, capability)
    count = multiprocessors or family.multiprocessors
    return replace(family, shared=block_memory(capability), multiprocessors=count)


def _of_family(values: Mapping[tuple[int, int], Value], capability: tuple[int, int]) -> Value:
    """The value for the newest family that is no newer than this; ParNetError where all are newer."""
    older = [family for family in values if family <= capability]
    if not older:
        raise ParNetError(f"compute capability {capability}: the kernels need {min(values)} or newer")
    return values[max(older)]
