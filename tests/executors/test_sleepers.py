"""Whom a call wakes: the engine's own threads, and not torch's, which spin on the cores of the engine's when awake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from parallel_parnet.commands.processes import environment
from small import OPTIONAL

CALLS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from parallel_parnet import Engine, Preprocess, fold
from small import SMALL, lively

def slices():
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[task.name] = (task / "comm").read_text().strip(), int((task / "schedstat").read_text().split()[2])
    return found

torch.set_num_threads(2)
before = set(slices())
torch.randn(1 << 20).add_(1)
workers = set(slices()) - before
assert workers, "torch has threads of its own"
program, x = fold(lively(SMALL, 0), outputs=("streams.0", "logits")), torch.randn(1, 3, 512, 512)
preprocess, pixels = Preprocess.of(program.config), torch.zeros(512, 512, 3, dtype=torch.uint8)
pictures = [x, x.half(), x.bfloat16(), pixels.movedim(-1, 0)[None]]
for executor in sys.argv[2:]:
    engine = Engine(program, device="cpu", executor=executor, threads=2)
    for picture in pictures if executor == "native" else pictures[-1:]:
        engine(picture)
        time.sleep(0.5)
        asleep = slices()
        for _ in range(5):
            engine(picture), preprocess.normalise(pixels)
        woken = {name: now for name, now in slices().items() if name in workers and now != asleep[name]}
        assert not woken, (executor, picture.dtype, woken)
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux tells how often threads ran")
def test_torchs_threads_sleep_on() -> None:
    """Pictures and features of more values than torch converts or copies by one thread."""
    command = [sys.executable, "-c", CALLS, str(ROOT / "tests"), *OPTIONAL]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
