"""A level's kernel compiled without a GPU, by NVIDIA's compiler where it is at hand."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from ...errors import ParNetError
from ..gpu.compiled import Resources, read
from .source import Source

LIMIT_S = 600  # of one level, which takes seconds


def at_hand() -> bool:
    """Whether there is an nvcc."""
    return shutil.which("nvcc") is not None


def resources(source: Source) -> Resources:
    """What the compiler made of it for compute capability 9.0."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "level.cu").write_text(source.text)
        options = ["-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas", "-v"]
        command = ["nvcc", *options, "-o", "level.cubin", "level.cu"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S)
        if done.returncode:
            raise ParNetError(f"a level's kernel does not compile: {done.stderr.strip()}")
        return read(Path(folder, "level.cubin").read_bytes(), done.stderr, source.threads, source.shared)
