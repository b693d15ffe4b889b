"""What a backend is: how a lane computes a segment. And the segments of a lane, bound for one shape of pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import ParNetError
from ..profiling.spans import Spans
from ..program.placement import Segment
from ..program.program import INPUT, Program
from ..settings import is_watched, outside_torch_modes

Reads = tuple[Tensor, ...]
NHW = tuple[int, int, int]  # pictures, their height and width


class Layout(NamedTuple):
    """Shape and type of a feature's tensor, as it crosses lanes."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Runner(Protocol):
    """A segment, ready to run. What it gives may lie in buffers of its own, which its next run overwrites."""

    def fits(self, reads: Reads) -> bool:
        """Return whether it can read these features where they lie in memory."""

    def __call__(self, reads: Reads, spans: Spans | None = None) -> tuple[Tensor, ...]:
        """Compute the features `segment.writes` from the features `segment.reads`, both in the segment's order."""

    def run_stepwise(self, reads: Reads, spans: Spans) -> tuple[Tensor, ...]:
        """Return what a call returns, computed step by step, each step in a span of its own."""


class Backend(Protocol):
    """How lanes compute the segments of a program.

    storage, memory_format: of pictures [N, 3, H, W], as segments read them.
    in_place: runners read their inputs where these lay when they were bound, and nowhere else.
    tiles: equal on ranks whose kernels cut operations alike, without which they read no feature of each other's.
    """

    program: Program
    in_place: bool
    storage: torch.dtype
    memory_format: torch.memory_format

    @property
    def tiles(self) -> str: ...
    def layout(self, feature: str, n: int, h: int, w: int) -> Layout:
        """Return shape and type of a feature's message, for n pictures of h x w pixels."""

    def bind(self, segment: Segment, nhw: NHW, reads: Reads, homes: Mapping[str, Tensor]) -> Runner:
        """Return a runner of the segment. homes: tensors for some of its features, by name, used if it can choose."""

    def nchw(self, feature: str, tensor: Tensor, nhw: NHW) -> Tensor:
        """Return a view [N, C, H, W] of a feature's message; logits [N, classes] as they are."""


class Bindings:
    """A lane's segments for one shape of pictures, bound to where their inputs lie.

    fixed: pictures enter in a buffer that stays in place. wrap: what becomes of a bound runner, as its capture in a
    CUDA graph.
    """

    def __init__(
        self,
        backend: Backend,
        nhw: NHW,
        device: torch.device,
        fixed: bool = False,
        wrap: Callable[[Runner, Reads], Runner] | None = None,
    ) -> None:
        self.backend, self.nhw, self.device, self._wrap = backend, nhw, device, wrap
        self._fixed = fixed or backend.in_place
        self._runners: dict[Segment, Runner] = {}

    @cached_property
    @outside_torch_modes
    def picture(self) -> Tensor:
        """The buffer for pictures [N, 3, H, W], on `device`."""
        shape, backend = self.backend.program.shape(INPUT, *self.nhw), self.backend
        return torch.empty(shape, dtype=backend.storage, device=self.device, memory_format=backend.memory_format)

    def enter(self, x_nchw: Tensor) -> Tensor:
        """Return pictures [N, 3, H, W] as segments read them: in the buffer, or converted."""
        if self._fixed:
            return self.picture.copy_(x_nchw)
        return x_nchw.to(self.device, self.backend.storage, memory_format=self.backend.memory_format)

    def runner(self, segment: Segment, reads: Reads, homes: Mapping[str, Tensor]) -> Runner:
        """Return the segment's runner for these inputs, bound anew where they lie elsewhere than before."""
        runner = self._runners.get(segment)
        if runner is None or not runner.fits(reads):
            runner = self._runners[segment] = self._bind(segment, reads, homes)
        return runner

    @outside_torch_modes
    def _bind(self, segment: Segment, reads: Reads, homes: Mapping[str, Tensor]) -> Runner:
        runner = self.backend.bind(segment, self.nhw, reads, homes)
        return self._wrap(runner, reads) if self._wrap else runner


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's data; ParNetError where it has none, as a fake tensor or what wraps others."""
    at = tensor.data_ptr()
    if not at:
        raise ParNetError(f"a {type(tensor).__name__} without memory of its own: give an ordinary tensor")
    return at


def refuse_without_memory(tensor: Tensor) -> None:
    """Raise ParNetError for a fake tensor, or one that wraps others, outside of the mode that computes with it."""
    if type(tensor) is not Tensor and not is_watched():
        address(tensor)


def in_fp32(tensor: Tensor) -> np.ndarray:
    """Return a CPU tensor's values in fp32, as it strides. By numpy, in this thread: torch's threads would wake up for
    it, and then spin on the cores of the kernels'. ParNetError as of `address`."""
    address(tensor)
    exact = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # which numpy lacks
    return exact.detach().numpy().astype(np.float32, copy=False)


def in_same_places(some: Reads, others: Reads) -> bool:
    """Return whether tensors begin, pair by pair, at the same addresses."""
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(some, others, strict=True))
