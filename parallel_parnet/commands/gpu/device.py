"""What the scripts that measure on a GPU share: the machine, its rates, CUDA graphs, times and their spread."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import median

import numpy as np
import torch
import triton

from parallel_parnet import ParNetError
from parallel_parnet.executors.graph import capture
from parallel_parnet.kernels.gpu.rates import H200, Rates, block_memory

from ..processes import asked, commit

SIDE = 8192  # of the matrices whose product is timed
COPIED = 2**31  # bytes, several times any cache
REPEATS = 30
NOBODY = {  # what a dry run describes: as much of an H200 as the choice of candidates asks for
    "gpu": "no GPU", "capability": [9, 0], "multiprocessors": H200.multiprocessors, "l2_bytes": 50 * 2**20,
    "memory_bytes": 0, "driver": None,
}  # fmt: skip


def require_gpu() -> torch.device:
    """The GPU to measure on; ParNetError where torch sees none."""
    if not torch.cuda.is_available():
        raise ParNetError("torch sees no NVIDIA GPU here: run this on a machine that has one")
    return torch.device("cuda", torch.cuda.current_device())


def exact_fp32() -> None:
    """Let references in fp32 be fp32: torch's convolutions take TF32 by default."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def machine(device: torch.device) -> dict:
    """Date, GPU and versions, as every file of results records them; on the CPU, `NOBODY`."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **(_gpu(device) if device.type == "cuda" else NOBODY),
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _gpu(device: torch.device) -> dict:
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": found.name,
        "capability": [found.major, found.minor],
        "multiprocessors": found.multi_processor_count,
        "l2_bytes": found.L2_cache_size,
        "memory_bytes": found.total_memory,
        "driver": asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", f"--id={device.index}"),
    }


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Bytes per second of a large copy, read and written, and FLOP/s of a large product of random numbers; on the CPU,
    nobody's: an H200's, by which candidates are ordered."""
    if device.type == "cpu":
        return replace(H200, gpu=NOBODY["gpu"])

    def copy_time() -> float:
        source, target = (torch.randint(0, 255, (COPIED,), dtype=torch.uint8, device=device) for _ in range(2))
        return median(event_times(lambda: target.copy_(source), REPEATS))

    a, b = (torch.randn(SIDE, SIDE, dtype=dtype, device=device) for _ in range(2))
    copy, product = copy_time(), median(event_times(lambda: a @ b, REPEATS // 3))
    found = torch.cuda.get_device_properties(device)
    shared = block_memory((found.major, found.minor))
    return Rates(found.name, 2 * COPIED / copy, 2 * SIDE**3 / product, found.multi_processor_count, shared)


def l2_bytes(device: torch.device) -> int:
    """Of the L2 cache."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else NOBODY["l2_bytes"]


def in_a_graph(launches: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """What replays these launches, one after the other, as one CUDA graph."""

    def work() -> None:
        for launch in launches:
            launch()

    return capture(work, device)[1]


def event_times(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run on the GPU, between two events, after three runs that do not count.

    In a process that sees no GPU, as a dry run's, one run by the host's clock.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        work()
        return [time.perf_counter() - start]
    for _ in range(3):
        work()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in pairwise(marks)]


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 in microseconds, and how many there were."""
    p20, p50, p80 = (round(float(value) * 1e6, 3) for value in np.percentile(times, [20, 50, 80]))
    return {"p20": p20, "p50": p50, "p80": p80, "n": len(times)}
