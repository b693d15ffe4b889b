"""Which GPU, and what compiles for it: what a measured choice holds for."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import pynvml
import torch

UNKNOWN = "unknown"


def lives_on_gpu(device: torch.device) -> bool:
    """Whether executors have to be proved there, since no two GPUs are alike."""
    return device.type == "cuda"


def gpu_and_versions(device: torch.device) -> str:
    """The GPU, its driver, `UNKNOWN` where nobody tells it, and the versions of torch and Triton."""
    try:
        pynvml.nvmlInit()
        try:
            driver = pynvml.nvmlSystemGetDriverVersion()
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:  # as in a container that was given CUDA alone
        driver = UNKNOWN
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return f"{torch.cuda.get_device_name(device)}, driver {driver}, torch {torch.__version__}, triton {triton}"
