"""Made-up contenders on a small network, and results of a benchmark with known times."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from parallel_parnet import fold
from parallel_parnet.commands.bench.fused import fuse
from parallel_parnet.commands.bench.rows import add_ratios
from parallel_parnet.commands.bench.statistics import median_interval, summary
from parallel_parnet.commands.bench.subject import Contender, Runner, Subject
from small import SMALL, lively

QUIET = Console(quiet=True)
HEADER = {"possible": {"float32": {"flop_per_s": 1e11, "bytes_per_s": 1e10}}}


@cache
def subject() -> Subject:
    model = lively(SMALL, 0).requires_grad_(False)
    return Subject("small", model, fuse(model), fold(model), 64, 1, torch.device("cpu"), torch.float32, 1)


def result(times: dict[str, np.ndarray], **header: object) -> dict:
    """A result as the benchmark writes it, from made-up times in ms; names that begin with "ours" are ours."""
    rows = [
        {
            "model": "small", "infer_samples_per_sec": 1e3 / np.median(ms), "infer_step_time": float(np.median(ms)),
            "infer_batch_size": 1, "contender": name, "ours": name.startswith("ours"), "arithmetic": "float32",
            "settings": "as it comes", "error": 1e-7, "n": len(ms), "unstable": [], "latency_ms": summary(ms / 1e3),
            "median_interval_ms": [t * 1e3 for t in median_interval(ms / 1e3)], "setup_s": 0.1, "first_call_s": 0.2,
            "gflop_per_s": 1.0, "of_matmul": 0.5, "rounds": list(range(len(ms))), "samples_ms": list(ms),
        }
        for name, ms in times.items()
    ]  # fmt: skip
    told = {
        "model": "small", "size": 64, "batch_size": 1, "dtype": "float32", "machine": "2-core x86-64 (AVX2)",
        "cpu": "a CPU", "threads": 2, "torch": "2.13.0+cpu", "date": "2026-01-01T00:00:00", "commit": "abc",
        "command": "python launch/bench.py",
    }  # fmt: skip
    add_ratios(rows, paired=True)
    return {"header": told | header, "rows": rows, "missing": {"absent": "not installed"}, "disagree": {}}


def planted(name: str, wrong: float, is_ours: bool = False) -> Contender:
    """A contender whose logits are off by so much, relative."""

    def build(subject: Subject) -> Runner:
        def call(x: Tensor) -> Tensor:
            logits = subject.network(x)
            return logits + wrong * logits.norm() * nn.functional.one_hot(torch.tensor([1]), 10)

        return Runner(call, "planted", "float32")

    return Contender(name, is_ours, build)
