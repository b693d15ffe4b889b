"""The machine: what it is, what it can do at best, and its clocks."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch

from parallel_parnet.executors.backends import isa, lacking
from parallel_parnet.program.contract import dtype_name

from ..gpu.device import machine as gpu_machine
from ..gpu.device import measure_rates
from ..processes import commit

SIDE, COPIED = 1024, 2**25  # of matrices on a CPU; floats
SECONDS = 1.0  # of each measurement, the best run of which counts: shared machines are slow for tenths of a second
PACKAGES = (
    "torch", "numpy", "openvino", "nncf", "onnxruntime", "onnxruntime-gpu", "onnx", "onnxscript", "ncnn", "pnnx", "MNN",
    "torchao", "tensorrt",
)  # fmt: skip


def describe(device: torch.device) -> dict:
    """Hardware and versions, as the file of results records them."""
    found: dict = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        return {**gpu_machine(device), **found}
    kernels = None if lacking("native") else isa("native")
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {**found, "cpu": cpu_name(), "isa": kernels, "commit": commit(), "date": date}


def cpu_name() -> str:
    """What the processor calls itself."""
    names = re.findall(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def has_vnni() -> bool:
    """Whether this CPU adds up products of 8 bits in 32; others saturate at 16, and want weights of 7 bits."""
    return "vnni" in _read("/proc/cpuinfo")


def clock_mhz(device: torch.device) -> float | None:
    """The clock now, the slowest core's on a CPU; None where it cannot be read. Many virtual machines show a constant.

    torch asks NVML for a GPU's, through the package nvidia-ml-py.
    """
    if device.type == "cuda":
        try:
            return float(torch.cuda.clock_rate(device))
        except (ModuleNotFoundError, RuntimeError):
            return None
    clocks = re.findall(r"^cpu MHz\s*: ([\d.]+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return min(map(float, clocks)) if clocks else None


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What a matrix product of this type and a large copy reach here: FLOP/s, and bytes/s read and written."""
    if device.type == "cuda":
        found = measure_rates(device, dtype)
        return {"flop_per_s": found.flops, "bytes_per_s": found.bytes}
    a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    product = torch._int_mm if dtype == torch.int8 else torch.mm  # the latter adds up int8 in int8, slowly
    source = torch.rand(COPIED)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes
    return {
        "flop_per_s": 2 * SIDE**3 / _best(lambda: product(a, b)),
        "bytes_per_s": copied / _best(lambda: target.copy_(source)),
    }


def possible(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Rates by type: of `dtype`, and of fp32, which some contenders compute in whatever is asked for."""
    return {dtype_name(kind): rates(device, kind) for kind in dict.fromkeys((torch.float32, dtype))}


def _best(work: Callable[[], object]) -> float:
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""
