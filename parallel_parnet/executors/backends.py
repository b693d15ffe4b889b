"""Backends: what each needs and computes in, and how those of torch and the CPU compile a segment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from ..errors import ParNetError
from ..forking import is_forked
from ..kernels.cpu import native, objects
from .native_plan import NativePlan
from .segment import SegmentModule

Compiled = Callable[..., tuple[Tensor, ...]]

BACKENDS = ("eager", "inductor", "openvino", "native", "triton")
ON_CPUS = ("native", "openvino")  # where they can be had; the likely fastest first
NOT_FORKED = ("openvino", "inductor")  # which have pools of threads of their own


def lacking(backend: str) -> str | None:
    """What a backend lacks in this process, and what to do."""
    if backend in NOT_FORKED and is_forked():
        return "its threads do not survive a fork; start the process by spawn"
    return missing(backend)


@cache
def missing(backend: str) -> str | None:
    """What a backend lacks on this machine, and what to do. ParNetError where PARNET_ISA asks for what native lacks."""
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
    """Why it cannot be loaded though it is installed, which takes too long for `missing` to try."""
    try:
        importlib.import_module("openvino")
    except ImportError as error:
        return f"openvino cannot be loaded ({error})"
    return None


def refuse_recorders(executor: str) -> None:
    """ParNetError where torch's operations are recorded (make_fx, torch.jit.trace) and an executor has none to record:
    a buffer's address would be taken for the answer."""
    recorded = torch.jit.is_tracing()
    if not recorded and torch._C._len_torch_dispatch_stack():
        from torch.fx.experimental.proxy_tensor import get_proxy_mode  # here, since it takes a while

        recorded = get_proxy_mode() is not None
    if recorded and executor not in ("reference", "eager"):
        raise ParNetError(
            f"executor {executor} has no operations of torch to record: choose eager, or Program.to_exported_program"
        )


def isa(executor: str) -> str | None:
    """The instruction set of the CPU kernels that run, where the executor is native."""
    return objects.in_use() if executor == "native" else None


def interprets() -> bool:
    """Whether Triton, once imported, interprets kernels on the CPU rather than compiling them for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_bf16() -> bool:
    """Whether this CPU computes in bf16; torch emulates it elsewhere, slowly."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def storage_type(backend: str, dtype: torch.dtype) -> torch.dtype:
    """Type of features and weights as torch sees them. native and OpenVINO convert by themselves."""
    return torch.float32 if backend in ON_CPUS else dtype


def arithmetic(backend: str, dtype: torch.dtype, quantised: torch.dtype | None = None) -> torch.dtype:
    """The type that convolutions really run in: fp32 on CPUs without bf16 instructions, for native and OpenVINO; that
    of a quantised program's weights, though torch's backends hold them as fp32 numbers."""
    if quantised:
        return quantised
    if backend == "native" and dtype == torch.bfloat16 and not native.library().has_bf16():
        return torch.float32
    if backend == "openvino" and dtype == torch.bfloat16:
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            return torch.float32
    return dtype


def compile_module(
    module: SegmentModule, backend: str, reads: tuple[Tensor, ...], dtype: torch.dtype, threads: int | None = None
) -> Compiled:
    """A function from the module's inputs to its outputs. `reads` shows shapes and memory formats to specialise for.

    threads: of native and OpenVINO, torch's number where not given.
    """
    threads = threads or torch.get_num_threads()
    if backend == "native":
        shapes = [t.shape for t in reads]
        return NativePlan(module, shapes, threads, arithmetic(backend, dtype))
    if backend == "openvino":
        return _openvino(module, reads, dtype, threads)
    if backend == "inductor":
        # exported first, since torch.compile limits how often it specialises one piece of source code; freezing folds
        # layout changes of the weights into compile time, and must be set while the first run traces
        graph = torch.export.export(module, reads).module()
        compiled = torch.compile(graph, fullgraph=True, dynamic=False)
        with torch._inductor.config.patch(freezing=True):
            compiled(*reads)
        return compiled
    return module


def _openvino(module: SegmentModule, reads: tuple[Tensor, ...], dtype: torch.dtype, threads: int) -> Compiled:
    from .openvino_model import compile_model, model_of

    model = model_of(module, [t.shape for t in reads])
    request = compile_model(model, dtype, threads, alone=False).create_infer_request()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = request.infer([t.contiguous().numpy() for t in inputs], share_inputs=True, share_outputs=False)
        return tuple(torch.from_numpy(results[i]) for i in range(len(model.outputs)))

    return run
