"""Compile a level's kernel for the GPU at hand, by NVIDIA's run-time compiler, and launch it."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from torch import Tensor

from ...errors import ParNetError, ParNetWarning
from ..gpu.convolution import Convolution
from .source import POINTERS, Source, arguments, source

OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17", b"--ptxas-options=-v")


@dataclass(frozen=True, eq=False)
class WarpLaunch:
    """A kernel with its arguments, prepared: nothing is computed, checked or allocated when it runs, so that a graph
    can hold it; by one thread at a time. operands: kept for as long as it may run. early: see `level`."""

    name: str
    source: Source
    device: torch.device
    operands: tuple[Any, ...]
    addresses: Any = field(repr=False)
    early: bool = True

    def __call__(self) -> None:
        """Start it on the current CUDA stream."""
        function, config, parameters = self._prepared
        config.hStream = driver.CUstream(torch.cuda.current_stream(self.device).cuda_stream)
        _done(driver.cuLaunchKernelEx(config, function, ctypes.addressof(parameters), 0))

    @cached_property
    def _prepared(self) -> tuple[Any, Any, Any]:
        """The kernel on the GPU, how it is launched but for the CUDA stream, and where its one parameter lies."""
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = self.source.blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = self.source.threads, 1, 1
        config.sharedMemBytes = self.source.shared
        config.attrs = _attributes(self.source.cluster, self.early)  # copied
        config.numAttrs = len(config.attrs)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self.addresses))
        return loaded(self.source.text, self.source.shared, self.device), config, parameters


def level(
    convolutions: Sequence[Convolution], name: str = "level", early: bool = True, ahead: Sequence[Tensor] = ()
) -> WarpLaunch:
    """The launch that runs these convolutions, which must not read each other's outputs, side by side; ParNetError
    where the kernel does not take one. early: it may start before the launch before it on the same CUDA stream has
    ended, and fetches weights meanwhile. ahead: what the launch after it reads from memory, the first of which it sends
    for, to the L2 cache."""
    for conv in convolutions:
        conv.check()
    made = source(convolutions)
    operands = *(getattr(conv.x, pointer) for conv in convolutions for pointer in POINTERS), *ahead
    values = arguments(convolutions, ahead, made.blocks)
    addresses = (ctypes.c_uint64 * len(values))(*values)
    return WarpLaunch(name, made, convolutions[0].x.a.device, operands, addresses, early)


def prepare(launches: Iterable[Any]) -> None:
    """Compile those of them that are for warpgroups, side by side; it is said where the compiler lets no product start
    before the last has ended."""
    texts = {launch.source.text for launch in launches if isinstance(launch, WarpLaunch)}
    with ThreadPoolExecutor() as pool:
        slow = sum("serialized" in said for _, said in pool.map(compiled, texts))
    if slow:
        version = ".".join(map(str, nvrtc.nvrtcVersion()[1:]))
        warnings.warn(
            f"NVRTC {version} makes {slow} of {len(texts)} kernels slow, one product after the other: take NVRTC 12.9 "
            "or newer",
            ParNetWarning,
            stacklevel=2,
        )


@cache
def compiled(text: str) -> tuple[bytes, str]:
    """A kernel's code for compute capability 9.0, and what the compiler said of it."""
    program = _done(nvrtc.nvrtcCreateProgram(text.encode(), b"level.cu", 0, [], []))
    status = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), list(OPTIONS))[0]
    log = bytes(_done(nvrtc.nvrtcGetProgramLogSize(program)))  # written to: never one that Python shares, as b" "
    _done(nvrtc.nvrtcGetProgramLog(program, log))
    said = log.decode(errors="replace").strip("\0 \n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ParNetError(f"a level's kernel does not compile: {said}")
    code = bytes(_done(nvrtc.nvrtcGetCUBINSize(program)))
    _done(nvrtc.nvrtcGetCUBIN(program, code))
    _done(nvrtc.nvrtcDestroyProgram(program))
    return code, said


@cache
def loaded(text: str, shared: int, device: torch.device) -> Any:
    """The kernel on a GPU, where a block may use so many bytes of shared memory."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the GPU's context, where nobody has
        module = _done(driver.cuModuleLoadData(compiled(text)[0]))
        function = _done(driver.cuModuleGetFunction(module, b"level"))
        attribute = driver.CUfunction_attribute
        _done(driver.cuFuncSetAttribute(function, attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
        # of all levels the same share of a multiprocessor, which is not divided anew while anything runs on it
        carveout = attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
        _done(driver.cuFuncSetAttribute(function, carveout, 100))
    return function


def _attributes(cluster: int, early: bool) -> list[Any]:
    """The attributes of a launch: the size of its clusters, and whether it may start before the last one has ended."""
    of_cluster, of_start = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    of_cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = driver.CUlaunchAttributeValue()
    size.clusterDim.x, size.clusterDim.y, size.clusterDim.z = cluster, 1, 1
    of_cluster.value = size
    of_start.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    allowed = driver.CUlaunchAttributeValue()
    allowed.programmaticStreamSerializationAllowed = int(early)
    of_start.value = allowed
    return [of_cluster, of_start]


def _done(answer: tuple) -> Any:
    """The value that a call of CUDA returned; ParNetError where it failed."""
    status, *values = answer
    if int(status) != 0:
        raise ParNetError(f"CUDA: {status.name}")
    return values[0] if values else None
