"""The instruction sets that native.c is compiled for, an object each. setup.py reads this file, without the package."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FLAGS = ("-O3", "-pthread", "-fPIC", "-shared", "-std=gnu11", "-D_GNU_SOURCE")


class InstructionSet(NamedTuple):
    """needs: what a CPU must have to run what `flags` make, by the names of GCC's __builtin_cpu_supports."""

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ()


V3 = ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
BF16 = ("-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16")
AMX = ("amx-tile", "amx-bf16", "amx-int8")
MACHINE = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())  # as macOS spells it

# by machine; best first, and last what every CPU of its kind has
SETS = {
    "x86_64": (
        InstructionSet("amx", (*BF16, *(f"-m{part}" for part in AMX)), (*V4, "avx512vnni", "avx512bf16", *AMX)),
        InstructionSet("avx512bf16", BF16, (*V4, "avx512vnni", "avx512bf16")),
        InstructionSet("avx512vnni", BF16[:2], (*V4, "avx512vnni")),
        InstructionSet("avx512", BF16[:1], V4),
        InstructionSet("avxvnni", ("-march=x86-64-v3", "-mavxvnni"), (*V3, "avxvnni")),
        InstructionSet("avx2", ("-march=x86-64-v3",), V3),
        InstructionSet("sse", ("-march=x86-64",)),
    ),
    "aarch64": (InstructionSet("neon", ("-march=armv8-a",)),),
}


def command(compiler: Sequence[str], machine: str, instruction_set: InstructionSet, to: Path) -> list[str]:
    """The command that compiles native.c for an instruction set of a machine, to the object `to`."""
    needs = dict.fromkeys(need for known in SETS[machine] for need in known.needs)
    features = " ".join(f'FEATURE("{need}")' for need in needs)
    return [
        *compiler, *FLAGS, *instruction_set.flags, f'-DSOURCES="{sources()}"', f"-DFEATURES={features}",
        str(HERE / "native.c"), str(HERE / "object.c"), "-o", str(to),
    ]  # fmt: skip


def sources() -> str:
    """A digest of all that an object is made from: the C beside this file, and this file."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.[ch]"), HERE / "instruction_sets.py"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
