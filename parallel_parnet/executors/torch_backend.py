"""Segments as torch computes them, or as a compiler or our CPU kernels make them: all backends but Triton's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cores import usual_threads
from ..profiling.spans import NOTHING, Spans
from ..program.placement import Segment
from ..program.program import Program
from ..settings import Together, outside_torch_modes
from .backends import BACKENDS, arithmetic, refuse_broken_openvino, storage_type
from .binding import NHW, Layout, Reads, Runner, address, in_fp32
from .native_plan import NativePlan
from .queues import wait_for_packing
from .segment import SegmentModule

Compiled = Callable[..., tuple[Tensor, ...]]

COMPILERS = ("inductor", "openvino")


class TorchBackend:
    """A backend whose features are tensors [N, C, H, W], of the type in which torch stores them. See `binding.Backend`.

    Backend "reference" is eager mode in the plain layout: the oracle that others are held against.
    devices: of each lane. threads: of each segment, for native and OpenVINO.
    """

    in_place = False
    tiles = "none"

    def __init__(
        self,
        name: str,
        program: Program,
        segments: Sequence[Segment],
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        threads: int | None = None,
    ) -> None:
        self.name, self.program, self.precision, self.threads = name, program, dtype, threads
        self.memory_format = torch.contiguous_format if BACKENDS[name].plain else torch.channels_last
        self.storage = storage_type(name, dtype)
        self.modules = {
            s: SegmentModule(program, s, self.storage, devices[s.lane], self.memory_format) for s in segments
        }
        wait_for_packing(segments, devices)

    def layout(self, feature: str, n: int, h: int, w: int) -> Layout:
        """Return a feature's shape [N, C, H, W] and the type in which torch stores it; logits are fp32 [N, classes]."""
        shape = self.program.shape(feature, n, h, w)
        return Layout(shape, self.storage if len(shape) == 4 else torch.float32)

    def nchw(self, feature: str, tensor: Tensor, nhw: NHW) -> Tensor:
        return tensor

    def bind(self, segment: Segment, nhw: NHW, reads: Reads, homes: Mapping[str, Tensor]) -> Runner:
        exact = self.precision == torch.float32 and reads[0].device.type == "cuda"
        within = without_tf32 if exact else NOTHING
        return TorchRunner(self.modules[segment], self.name, self.precision, self.threads, within)


class TorchRunner:
    """A segment's module, compiled when it first runs. See `binding.Runner`. within: what it runs in."""

    def __init__(
        self, module: SegmentModule, name: str, dtype: torch.dtype, threads: int | None,
        within: AbstractContextManager[object],
    ) -> None:  # fmt: skip
        self.module, self.name, self.precision, self.threads, self.within = module, name, dtype, threads, within
        self._compiled: Compiled | None = None

    def fits(self, reads: Reads) -> bool:
        return True

    def __call__(self, reads: Reads, spans: Spans | None = None) -> tuple[Tensor, ...]:
        if self.name == "eager" and spans is not None:
            return self.run_stepwise(reads, spans)
        if self.name in COMPILERS:
            for x in reads:
                address(x)  # refuses what has no memory
        with self.within:
            return self.function(reads)(*reads)

    def run_stepwise(self, reads: Reads, spans: Spans) -> tuple[Tensor, ...]:
        with self.within:
            if self.name == "native":
                plan = self.function(reads)
                assert isinstance(plan, NativePlan)
                return plan.run_stepwise(reads, spans)
            return self.module.run(reads, spans)

    def function(self, reads: Reads) -> Compiled:
        """Return the module as compiled for these inputs, by the first call."""
        if self._compiled is None:
            self._compiled = compile_module(self.module, self.name, reads, self.precision, self.threads)
        return self._compiled


@outside_torch_modes
def compile_module(
    module: SegmentModule, backend: str, reads: tuple[Tensor, ...], dtype: torch.dtype, threads: int | None = None
) -> Compiled:
    """Compile a segment's module for a backend: a function from its inputs to its outputs.

    reads: inputs, which show the shapes and memory formats to specialise for. threads: of native and OpenVINO,
    `usual_threads` where not given.
    """
    threads = threads or usual_threads()
    if backend == "native":
        shapes = [t.shape for t in reads]
        return NativePlan(module, shapes, threads, arithmetic(backend, dtype))
    if backend == "openvino":
        return _openvino(module, reads, dtype, threads)
    if backend == "inductor":
        # exported first, since torch.compile limits how often it specialises one piece of source code; freezing folds
        # layout changes of the weights into compile time, and must be set while the first run traces
        graph = torch.export.export(module, reads).module(check_guards=False)
        compiled = torch.compile(graph.forward, fullgraph=True, dynamic=False)
        # all come in one memory format, and where a size is 1 a stride means nothing: no reason to compile anew
        strides = [t.stride() for t in reads]

        @outside_torch_modes  # which would break it for good
        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            return compiled(*(x.detach().as_strided(x.shape, s) for x, s in zip(inputs, strides, strict=True)))

        with torch._inductor.config.patch(freezing=True):
            run(*reads)
        return run
    return module


def _openvino(module: SegmentModule, reads: tuple[Tensor, ...], dtype: torch.dtype, threads: int) -> Compiled:
    refuse_broken_openvino()
    from .openvino_model import compile_model, model_of

    model = model_of(module, [t.shape for t in reads])
    request = compile_model(model, dtype, threads).create_infer_request()

    @outside_torch_modes
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        arrays = [np.ascontiguousarray(in_fp32(x)) for x in inputs]
        results = request.infer(arrays, share_inputs=True, share_outputs=False)
        return tuple(torch.from_numpy(results[i]) for i in range(len(model.outputs)))

    return run


@Together
@contextmanager
def without_tf32() -> Iterator[None]:
    """A context in which torch's convolutions and products of fp32 on GPUs are computed in fp32, and not in TF32. What
    is captured in a CUDA graph within stays so."""
    places: tuple[Any, ...] = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "ieee"
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision
