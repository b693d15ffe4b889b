"""Backends: what each needs, and what it computes in."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch

from ..errors import ParNetError
from ..forking import is_forked
from ..kernels.cpu import native, objects
from ..program.contract import E4M3
from ..settings import is_watched


class Facts(NamedTuple):
    """What is known of a backend before one is made; `missing` and `arithmetic` depend on the machine as well."""

    quantised: tuple[torch.dtype, ...] = ()  # types of the quantised programs that it runs
    only_on: str = ""  # the kind of device, where it runs on one alone
    plain: bool = False  # reads torch's tensors in the plain NCHW layout, and not in channels_last
    converts: bool = False  # torch's tensors are fp32 for it, whatever type it computes in
    own_kernels: bool = False  # they are profiled, and not torch's operations in eager mode
    own_layout: bool = False  # a lane copies what it reads into the layout in which it computes
    forks: bool = True  # runs in a forked process, having no pool of threads of its own


BACKENDS = {
    "reference": Facts((torch.int8, E4M3), plain=True),
    "eager": Facts((torch.int8, E4M3)),
    "inductor": Facts((torch.int8,), forks=False),
    "openvino": Facts(only_on="cpu", converts=True, forks=False),
    "native": Facts((torch.int8,), "cpu", plain=True, converts=True, own_kernels=True, own_layout=True),
    "triton": Facts((E4M3,), "cuda", own_kernels=True),
}
ON_CPUS = [name for name in reversed(BACKENDS) if BACKENDS[name].only_on == "cpu"]  # the likely fastest first


def lacking(backend: str) -> str | None:
    """Say what a backend lacks in this process, and what to do; None where it lacks nothing."""
    if not BACKENDS[backend].forks and is_forked():
        return "its threads do not survive a fork; start the process by spawn"
    return missing(backend)


@cache
def missing(backend: str) -> str | None:
    """Say what a backend lacks on this machine, and what to do; None where it lacks nothing.

    ParNetError where PARNET_ISA names an instruction set that native or this CPU lacks.
    """
    if backend == "openvino" and importlib.util.find_spec("openvino") is None:
        return "not installed here; pip install openvino"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "not installed here; pip install triton, which is made for Linux"
    if backend == "native":
        try:
            native.library()
        except objects.NotCompiledError as error:
            return str(error)
    return None


def broken_openvino() -> str | None:
    """Say why OpenVINO, though installed, cannot be imported; else None. Importing it takes too long for `missing`."""
    try:
        importlib.import_module("openvino")
    except ImportError as error:
        return f"openvino cannot be loaded ({error})"
    return None


def refuse_broken_openvino() -> None:
    """Raise ParNetError where OpenVINO cannot be imported."""
    if reason := broken_openvino():
        raise ParNetError(f"{reason}: choose native")


def refuse_recorders(executor: str) -> None:
    """Raise ParNetError where torch's operations are recorded (make_fx, torch.jit.trace) and an executor has none to
    record: a buffer's address would be taken for the answer."""
    recorded = torch.jit.is_tracing()
    if not recorded and is_watched():
        from torch.fx.experimental.proxy_tensor import get_proxy_mode  # here, since it takes a while

        recorded = get_proxy_mode() is not None
    if recorded and executor not in ("reference", "eager"):
        raise ParNetError(
            f"executor {executor} has no operations of torch to record: choose eager, or Program.to_exported_program"
        )


def isa(executor: str) -> str | None:
    """Return the name of the instruction set that executor native's kernels use; None for other executors."""
    return objects.in_use() if executor == "native" else None


def interprets() -> bool:
    """Whether Triton, once imported, interprets kernels on the CPU rather than compiling them for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_bf16() -> bool:
    """Whether this CPU computes in bf16; torch emulates it elsewhere, slowly."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def storage_type(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Return the type of features and weights in torch's tensors: fp32 for backends that convert, else `dtype`."""
    return torch.float32 if BACKENDS[backend].converts else dtype


def arithmetic(backend: str, dtype: torch.dtype, quantised: torch.dtype | None = None) -> torch.dtype:
    """Return the type that convolutions really compute in.

    For native and OpenVINO this is fp32 on CPUs without bf16 instructions. For a quantised program it is the type of
    its weights, though torch's backends hold them as fp32 numbers.
    """
    if quantised:
        return quantised
    if backend == "native" and dtype == torch.bfloat16 and not native.library().has_bf16():
        return torch.float32
    if backend == "openvino" and dtype == torch.bfloat16:
        from .openvino_model import CORE  # here, since it takes a while

        if "BF16" not in CORE.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return torch.float32
    return dtype
