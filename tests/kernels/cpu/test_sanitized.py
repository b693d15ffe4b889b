"""Sanitizers see kernels that read beyond the end of a tensor. `make sanitize` runs it, on objects that have them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

import parallel_parnet

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "__asan_init"), reason="make sanitize runs it")

CODE = """
import torch
from parallel_parnet import Config, Engine, create_model, fold
from parallel_parnet.kernels.cpu import native
native.SLACK = {slack}
engine = Engine(fold(create_model(Config((4, 20, 12, 36), num_classes=10))), device="cpu", executor="native")
print(engine(torch.randn(1, 3, 32, 32)).shape)
"""


@pytest.mark.parametrize("slack", [0, 64])
def test_a_planted_overflow(slack: int, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(parallel_parnet.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", CODE.format(slack=slack)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert (run.returncode == 0) == (slack > 0), run.stderr
    seen = "ERROR: AddressSanitizer" in run.stderr and "/kernels/cpu/native" in run.stderr
    assert seen == (slack == 0), run.stderr
