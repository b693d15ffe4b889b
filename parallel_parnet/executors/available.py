"""Which executor runs: what was asked for, or the likely fastest that can be had here."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import ParNetError
from ..program.contract import E4M3, dtype_name
from .backends import BACKENDS, ON_CPUS, Facts, arithmetic, has_bf16, interprets, lacking

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Method(NamedTuple):
    """How lanes compute, and whether what they do is captured in CUDA graphs and replayed. What a lane is, and so how
    features get from one to another, follows from placement and devices."""

    backend: str
    captured: bool = False


FP8 = (8, 9)  # the first compute capability with tensor cores for it
METHODS = {name: Method(name) for name in BACKENDS}
METHODS |= {"cuda_graph": Method("triton", True), "cuda_streams": Method("eager", True)}
ON_GPUS = [name for name, method in METHODS.items() if method.captured or BACKENDS[method.backend].only_on == "cuda"]
EXECUTORS = ("auto", *METHODS)


def facts(executor: str) -> Facts:
    """Return what is known of the backend of an executor."""
    return BACKENDS[METHODS[executor].backend]


def profiled_by(executor: str) -> str:
    """Say in words whose kernels or operations `Engine.profile` measures for an executor."""
    return f"{METHODS[executor].backend}'s kernels" if facts(executor).own_kernels else "torch in eager mode"


def find_device(wanted: str | int | torch.device | None) -> torch.device:
    """Return the device of a name or a GPU's number, or for None a GPU where there is one, else the CPU.

    ParNetError where it is neither the CPU nor a GPU that is here.
    """
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(f"cuda:{wanted}" if type(wanted) is int else wanted)
    except (RuntimeError, TypeError):
        raise ParNetError(f"device {wanted}: choose cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ParNetError(f"device {device}: choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ParNetError(f"device {device}: torch sees no NVIDIA GPU here; choose cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ParNetError(f"device {device}: there are {torch.cuda.device_count()} GPUs here; count from 0")
    return device


def choose_executor(
    executor: str, device: torch.device, dtype: torch.dtype, quantised: torch.dtype | None = None
) -> str:
    """Return the executor that "auto" stands for, else the one that was named.

    ParNetError where it cannot run on this device, in this type, or a program quantised to this type.
    """
    if executor not in EXECUTORS:
        raise ParNetError(f"unknown executor {executor!r}: choose one of {', '.join(EXECUTORS)}")
    if dtype not in DTYPES:
        raise ParNetError(f"dtype {dtype!r}: choose torch.float32, torch.bfloat16 or torch.float16")
    if executor == "reference" and dtype != torch.float32:
        raise ParNetError("executor reference is the fp32 oracle: leave dtype at float32")
    if device.type == "cpu" and executor in ON_GPUS and not interprets():
        raise ParNetError(
            f"executor {executor} runs on NVIDIA GPUs: choose eager, or set TRITON_INTERPRET=1 to try it on a CPU"
        )
    for_gpus = executor != "auto" and facts(executor).only_on == "cuda"
    if device.type == "cpu" and dtype == torch.float16 and not for_gpus:
        raise ParNetError("float16 on the CPU: choose float32 or bfloat16")
    if device.type == "cuda" and executor in ON_CPUS:
        raise ParNetError(f"executor {executor} runs on the CPU only: choose device cpu")
    if device.type == "cuda" and executor in ON_GPUS and interprets():
        raise ParNetError(f"executor {executor} with TRITON_INTERPRET=1: unset it, or choose device cpu")
    if quantised and dtype != torch.float32 and (quantised != E4M3 or not for_gpus):
        raise ParNetError(f"dtype {dtype} for a quantised program, which has types of its own: leave it at float32")
    if executor == "auto":
        return [*(for_cpu(dtype, quantised) if device.type == "cpu" else []), "eager"][0]
    if quantised and quantised not in facts(executor).quantised:
        able = [name for name in reversed(BACKENDS) if quantised in BACKENDS[name].quantised]
        raise ParNetError(
            f"executor {executor} runs no program quantised to {dtype_name(quantised)}: choose {', '.join(able)}"
        )
    if quantised == E4M3 and device.type == "cuda" and for_gpus:
        capability = torch.cuda.get_device_capability(device)
        if capability < FP8:
            raise ParNetError(
                f"executor {executor} runs fp8 from compute capability 8.9 on, this GPU has "
                f"{'.'.join(map(str, capability))}: choose eager"
            )
    if reason := lacking(METHODS[executor].backend):
        raise ParNetError(f"executor {executor}: {reason}, or choose eager")
    return executor


def for_cpu(dtype: torch.dtype, quantised: torch.dtype | None = None) -> list[str]:
    """List the executors for CPUs that this machine has and that compute in this type, the likely fastest first."""
    names = [name for name in ON_CPUS if quantised is None or quantised in BACKENDS[name].quantised]
    names = [name for name in names if not lacking(name)]
    if "native" in names and arithmetic("native", dtype) != dtype and has_bf16():  # which others compute in here
        names.remove("native")
    return names


def notes(executor: str, chosen: str, device: torch.device, quantised: torch.dtype | None) -> list[str]:
    """List what the user should know of the choice of "auto": that the kernels for CPUs are not available, or that on a
    GPU a quantised program is computed in fp32."""
    if executor != "auto":
        return []
    found = []
    if device.type == "cpu" and (reason := lacking("native")):
        found.append(f"executor {chosen} runs, since native cannot be had: {reason}")
    if device.type == "cuda" and quantised:
        faster = "executor cuda_graph with dtype bfloat16" if quantised == E4M3 else "bfloat16 or fp8"
        found.append(f"executor {chosen} computes in fp32 what is quantised, to no gain in time: choose {faster}")
    return found
