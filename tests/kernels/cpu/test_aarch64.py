"""native.c for aarch64, where a cross compiler is at hand: compiled, and asked who it is where qemu can run it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from parallel_parnet.kernels.cpu.instruction_sets import SETS, InstructionSet, command, sources

TRIPLE = "aarch64-linux-gnu"
pytestmark = [
    pytest.mark.skipif(shutil.which(f"{TRIPLE}-gcc") is None, reason=f"no cross compiler: apt install gcc-{TRIPLE}"),
    pytest.mark.parametrize("instruction_set", SETS["aarch64"], ids=lambda each: each.name),
]
MAIN = """#include <stdio.h>
int panel_width(void);
int cpu_has(const char *feature);
const char *sources(void);
int main(void) { printf("%d %d %s", panel_width(), cpu_has("avx2"), sources()); }
"""


def run(*words: object) -> str:
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True, timeout=120).stdout


def test_compiles_to_vectors_and_runs_under_emulation(instruction_set: InstructionSet, tmp_path: Path) -> None:
    """One test, since compiling takes the better part of a minute."""
    compiler = f"{TRIPLE}-gcc"
    run(*command((compiler, "-Werror"), "aarch64", instruction_set, tmp_path / "native.so"))
    code = run(f"{TRIPLE}-objdump", "-d", tmp_path / "native.so")
    assert "fmla\tv" in code, "products and sums are vectors', fused"
    if shutil.which("qemu-aarch64") is None:
        pytest.skip("nothing runs it here: apt install qemu-user")
    (tmp_path / "main.c").write_text(MAIN)
    run(compiler, "-o", tmp_path / "main", tmp_path / "main.c", tmp_path / "native.so", f"-Wl,-rpath,{tmp_path}")
    assert run("qemu-aarch64", "-L", f"/usr/{TRIPLE}", tmp_path / "main") == f"16 0 {sources()}"
