"""Whom a call wakes: the engine's own threads, and not torch's, which spin on the cores of the engine's when awake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from parallel_parnet.commands.processes import environment

CALLS = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
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
kind, executor = sys.argv[1:3]
program, x = fold(lively(SMALL, 0), outputs=("streams.0", "logits")), torch.randn(1, 3, 512, 512)
engine, preprocess = Engine(program, device="cpu", executor=executor, threads=2), Preprocess.of(program.config)
pixels = torch.zeros(512, 512, 3, dtype=torch.uint8)
x = x.to(getattr(torch, kind)) if kind != "uint8" else pixels.movedim(-1, 0)[None]
engine(x)
time.sleep(0.5)
asleep = slices()
for _ in range(5):
    engine(x), preprocess.normalise(pixels)
woken = {name: now for name, now in slices().items() if name in workers and now != asleep[name]}
assert not woken, woken
"""


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux tells how often threads ran")
@pytest.mark.parametrize(
    ("kind", "executor"),
    [(kind, "native") for kind in ("float32", "float16", "bfloat16", "uint8")] + [("uint8", "openvino")],
)
def test_torchs_threads_sleep_on(kind: str, executor: str) -> None:
    """Pictures and features of more values than torch converts or copies by one thread."""
    command = [sys.executable, "-c", CALLS, kind, executor, str(ROOT / "tests")]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
