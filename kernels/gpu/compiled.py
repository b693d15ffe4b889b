"""What the compiler made of a launch: registers, memory, spills and instructions, with or without the GPU at hand."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from .rates import REGISTERS, block_memory

INSTRUCTIONS = ("UTCHMMA", "HGMMA", "QGMMA", "HMMA", "LDGSTS", "LDG", "LDL", "STL")
SPILLED = 96  # bytes of a thread's registers that may be in memory where no loop is: there they cost next to nothing
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


@dataclass(frozen=True)
class StandIn:
    """A stand-in for as much of a Triton driver as compiling asks for, of a GPU that need not be there.

    With it `Launch.compile` specialises as a call would. That matters: without the knowledge of what is divisible by
    16, a different and worse kernel is compiled.
    """

    capability: tuple[int, int]

    def get_current_target(self) -> GPUTarget:
        major, minor = self.capability
        return GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        """A number for each architecture: Triton keeps compiled kernels by device, not by target."""
        return 10 * self.capability[0] + self.capability[1]

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def stand_in(capability: tuple[int, int]) -> Iterator[None]:
    """Compile for `capability` within; the driver of before returns after."""
    before = triton.runtime.driver._active  # `active` would look for a GPU
    triton.runtime.driver.set_active(StandIn(capability))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(before)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. registers: of a thread. shared, stack, local, spilled: bytes. in_loops:
    instructions that reach spilled registers in loops that multiply. serialised: products wait for each other, as they
    do where the assembler does not follow their sums. counts: by opcode."""

    registers: int
    threads: int
    shared: int
    stack: int
    local: int
    spilled: int
    in_loops: int
    serialised: bool
    instructions: int
    counts: dict[str, int]

    def complaints(self, capability: tuple[int, int]) -> list[str]:
        """Why it would run badly, or not at all, on a GPU of this capability; nothing where all is well."""
        found = []
        if self.in_loops or self.spilled > SPILLED:
            found.append(f"spills {self.spilled} bytes, {self.in_loops} times in loops")
        if self.serialised and not self.counts["QGMMA"]:  # in fp8 every step has a sum of its own, which is waited for
            found.append("multiplies one product after the other")
        if max(self.stack, self.local) > SPILLED:
            found.append(f"keeps {self.stack} bytes of stack and {self.local} of local memory")
        if self.shared > (there := block_memory(capability)):
            found.append(f"{self.shared} bytes of shared memory: {there} are there")
        if self.registers * self.threads > REGISTERS:
            found.append(f"{self.registers} registers x {self.threads} threads: {REGISTERS} are there")
        return found

    @property
    def blocks(self) -> int:
        """Blocks that a Hopper multiprocessor holds at a time, as registers and shared memory bound them.

        Registers are given to warps in units of 256, and each block takes 1 KB of shared memory for itself.
        """
        of_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // of_warp // (self.threads // 32)
        return min(by_registers, 228 * 1024 // (self.shared + 1024), 2048 // self.threads, 32)


def resources(compiled: Any) -> Resources:
    """What a kernel compiled by Triton uses, by its cubin and by its PTX, which is assembled once more, since only the
    assembler tells of spills."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        target = _find(r"\.target (\w+)", compiled.asm["ptx"])
        ptxas = get_ptxas(compiled.metadata.target.arch).path  # of two, by architecture
        log = _run(ptxas, "-v", f"--gpu-name={target}", ptx, "-o", Path(folder, "again.cubin"))
    return read(compiled.asm["cubin"], log, compiled.metadata.num_warps * 32, compiled.metadata.shared)


def read(code: bytes, log: str, threads: int, shared: int) -> Resources:
    """What the kernel of a cubin uses. log: what the assembler said when it made it. threads, shared: of a block, as
    launched."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(code)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    opcodes = [found[1] for line in sass.splitlines() if (found := INSTRUCTION.match(line))]
    return Resources(
        registers=int(_find(r"REG:(\d+)", usage)),
        threads=threads,
        shared=shared,
        stack=int(_find(r"STACK:(\d+)", usage)),
        local=int(_find(r"LOCAL:(\d+)", usage)),
        spilled=int(_find(r"(\d+) bytes spill stores", log)) + int(_find(r"(\d+) bytes spill loads", log)),
        in_loops=spills_in_loops(sass),
        serialised="serialized" in log,
        instructions=len(opcodes),
        counts={name: opcodes.count(name) for name in INSTRUCTIONS},
    )


def spills_in_loops(sass: str) -> int:
    """Instructions that reach spilled registers, in the loops of a disassembly that multiply: from a label to a branch
    back to it."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    loops: set[int] = set()
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            opcodes.append(found[1])
            back = labels.get(target[1]) if (target := re.search(r"BRA.*`\((\.L_\w+)\)", line)) else None
            if back is not None and {"UTCHMMA", "HGMMA", "QGMMA", "HMMA", "FFMA"}.intersection(opcodes[back:]):
                loops.update(range(back, len(opcodes)))
    return sum(opcodes[i] in ("LDL", "STL") for i in loops)


def _run(*command: str | Path) -> str:
    """All that one of the CUDA tools in Triton's package prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _find(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in {text[:500]!r}")
    return found[1]
