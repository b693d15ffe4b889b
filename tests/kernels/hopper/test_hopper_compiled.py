"""What NVIDIA's compiler makes of the timed levels, where it is at hand: products side by side, and nothing spilled."""

from __future__ import annotations

import random
import re
import shutil
import subprocess

import pytest
import torch

from parallel_parnet.commands.gpu.level_tuning import levels_of, operands
from parallel_parnet.commands.gpu.precompile import shapes_of
from parallel_parnet.kernels.gpu.config import Table
from parallel_parnet.kernels.gpu.samples import without_values
from parallel_parnet.kernels.hopper.source import source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
DTYPES = (torch.float16, torch.bfloat16)
TABLE = Table.load((9, 0), "NVIDIA H200").with_warpgroups((9, 0), "NVIDIA H200")


# made while modules load, before a fixture fills new tensors
PROGRAMS = {variant: shapes_of(variant) for variant in ("parnet_s", "parnet_m", "parnet_l", "parnet_xl")}


@pytest.mark.parametrize("variant", PROGRAMS)
def test_a_timed_level(variant, tmp_path):
    """ptxas says so where it puts products one after the other, as it does where it does not follow their sums."""
    dtype = random.choice(DTYPES)
    known = [level for level in levels_of(PROGRAMS[variant], 1, dtype) if level.key in TABLE.warpgroups]
    wanted = random.choice(known)
    tiles = TABLE.of_warpgroups(wanted.shapes, 1, dtype)
    made = source([without_values(conv) for conv in operands(wanted, tiles, 0, "cpu")])
    (tmp_path / "level.cu").write_text(made.text)
    command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run([*command, "-o", "level.cubin", "level.cu"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "serialized" not in done.stderr, (wanted.key, dtype)
    assert re.findall(r"(\d+) bytes spill", done.stderr) == ["0", "0"], (wanted.key, dtype, done.stderr)
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    assert int(registers) * made.threads <= 65536
